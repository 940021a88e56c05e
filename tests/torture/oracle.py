# SPDX-License-Identifier: BSD-3-Clause
"""What the bytes of one face may be, when requests overlap in time and the last ones were never answered.

A change (a write, or a copy of another content: a checkpoint) takes effect at one unknown moment of the interval from
`begun`, when it was sent, to `ended`, when its answer was read; one that was never answered takes effect at any later
moment, or never, or in part. Moments are ticks of one counter, one tick an event. An observation in an interval of its
own (a read, or the whole content after a kill) may see a change that began before the observation ended, unless
another one certainly came between: it began after the first had ended, and had ended before the observation began.

That is decided for every byte by itself, so an unanswered write may have arrived in any mixture of old and new bytes,
and what an earlier read has seen binds no later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

NEVER = 2**31 - 1
"""The tick at which an unanswered request ended."""

BEFORE = -1
"""The tick of what was there at first."""


@dataclass(frozen=True)
class Version:
    """`data` may be what bytes [start, start + len(data)) are, where `where` is true."""

    start: int
    data: Bytes
    where: Mask


class Change(Protocol):
    """Something that overwrites bytes [start, stop)."""

    start: int
    stop: int
    begun: int
    ended: int

    def versions(self, start: int, stop: int, now: int) -> Iterator[Version]:
        """What it may have put into [start, stop), a part of its range, if it took effect by tick `now`."""
        ...


class Write:
    """A request that sets bytes to `data`."""

    def __init__(self, start: int, data: Bytes, begun: int, ended: int = NEVER) -> None:
        self.start, self.stop = start, start + len(data)
        self.data = data
        self.begun, self.ended = begun, ended

    def versions(self, start: int, stop: int, now: int) -> Iterator[Version]:
        data = self.data[start - self.start : stop - self.start]
        yield Version(start, data, np.ones(len(data), np.bool_))

    def __repr__(self) -> str:
        ended = "never" if self.ended == NEVER else self.ended
        return f"write of {self.start}..{self.stop} sent at {self.begun}, answered {ended}"


class Copy:
    """A checkpoint (or what acts like one): all bytes become those of `source` at one moment."""

    def __init__(self, source: Content, begun: int, ended: int = NEVER) -> None:
        self.start, self.stop = 0, source.size
        self.source = source
        self.begun, self.ended = begun, ended

    def versions(self, start: int, stop: int, now: int) -> Iterator[Version]:
        yield from self.source.seen(start, stop, self.begun, min(self.ended, now))

    def __repr__(self) -> str:
        ended = "never" if self.ended == NEVER else self.ended
        return f"copy of the disk sent at {self.begun}, answered {ended}"


class Content:
    """One face of one disk, from a content that is known exactly."""

    def __init__(self, base: Bytes) -> None:
        self.size = len(base)
        self.changes: list[Change] = [Write(0, base, BEFORE, BEFORE)]

    def seen(self, start: int, stop: int, begun: int, ended: int) -> list[Version]:
        """What an observation of bytes [start, stop) in the interval from `begun` to `ended` may see."""
        # For each byte: when the last change began that certainly came before the observation.
        floor = np.full(stop - start, BEFORE, np.int32)
        meeting = [each for each in self.changes if each.begun < ended and each.start < stop and each.stop > start]
        for change in meeting:
            if change.ended < begun:
                part = floor[max(change.start - start, 0) : change.stop - start]
                np.maximum(part, change.begun, out=part)
        found = []
        for change in meeting:
            low, high = max(change.start, start), min(change.stop, stop)
            allowed = floor[low - start : high - start] <= change.ended
            if not allowed.any():
                continue
            for version in change.versions(low, high, ended):
                at = version.start - low
                found.append(Version(version.start, version.data, version.where & allowed[at : at + len(version.data)]))
        return found

    def unexplained(self, actual: Bytes, start: int, begun: int, ended: int) -> NDArray[np.intp]:
        """Offsets at which an observation of `actual` at `start` cannot be."""
        explained = np.zeros(len(actual), np.bool_)
        for version in self.seen(start, start + len(actual), begun, ended):
            at = version.start - start
            stop = at + len(version.data)
            explained[at:stop] |= version.where & (version.data == actual[at:stop])
        return np.flatnonzero(~explained) + start

    def about(self, offset: int, actual: int) -> str:
        """What is known of one byte that is wrong, for a message."""
        meeting = [each for each in self.changes if each.start <= offset < each.stop]
        lines = []
        for change in meeting:
            values = {
                int(version.data[0]) for version in change.versions(offset, offset + 1, NEVER) if version.where[0]
            }
            lines.append(f"    {' or '.join(f'{value:#04x}' for value in sorted(values))}: {change}")
        return f"byte {offset} is {actual:#04x}; what was done to it:\n" + "\n".join(lines)
