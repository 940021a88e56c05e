# SPDX-License-Identifier: BSD-3-Clause
"""What every disk under this project can do, whatever it lives in.

`offset` and `length` are bytes and may have any alignment. Every method may be called from several
threads at once; an operation that returned is seen by all that start later. Errors are DiskError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from replication.disk.files import Buffer
from replication.disk.unflushed import Unflushed

ZEROES = memoryview(bytes(1 << 20))
"""A megabyte of zeroes, to write and to compare with."""

EXTENTS_MAX = 1024
"""Most extents that a disk is asked for at once: a request that looks for more would hold up whoever waits for it."""


class Extent(NamedTuple):
    """A range whose content is known without reading it: zeroes, or anything."""

    offset: int
    length: int
    zero: bool
    hole: bool


class Disk(ABC):
    """A raw disk."""

    def __init__(self, name: str, location: str, size: int) -> None:
        self.name = name
        self.location = location
        self.size = size
        """Bytes that are served, of those that there are (`room`)."""
        self.unflushed: Unflushed | None = None
        """What of it a flush has not covered yet; None where nobody wants to know (`watch`)."""

    def watch(self, unflushed: Unflushed) -> None:
        """Keep account of what is unflushed in this map from now on. Before the first request."""
        self.unflushed = unflushed

    def look(self) -> None:
        """Find out, without waiting, whether what is unflushed has been lost; for who does not want to learn of it by
        the next request only."""
        return

    def await_turn(self) -> None:
        """For who would fail for good with the next request: wait until a disk that was lost may be tried again."""
        return

    def room(self) -> int:
        """Bytes that there are below by now: more than `size` where the disk was grown and nobody has said yet that
        this counts. DiskError."""
        return self.size

    @property
    def outlives(self) -> bool:
        """Whether what was written and not flushed is there for the next process of this boot, whatever becomes of this
        one."""
        return True

    @abstractmethod
    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer from `offset`."""

    @abstractmethod
    def write(self, pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        """Write the pieces one after the other from `offset` on; `fua`: stable before returning."""

    @abstractmethod
    def zero(self, offset: int, length: int, may_trim: bool, fua: bool = False) -> None:
        """Make the range read as zeroes, as a hole where `may_trim` and the disk allow."""

    @abstractmethod
    def flush(self) -> None:
        """Make everything written before this call stable."""

    @abstractmethod
    def extents(self, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        """At most `count` extents from `offset` on, without gaps, covering at least one byte and at most the range."""

    def hole(self, offset: int, length: int) -> int:
        """For how many bytes of the range, from `offset` on, it is known without reading that they are zeroes."""
        first = self.extents(offset, length, 1)[0]
        return first.length if first.zero else 0

    def check_settled(self, offset: int, length: int) -> None:
        """DiskError while a change of the range that was given up may still come, so that what is read of it now need
        not be what it holds in the end."""
        return

    def begin_flush(self, offset: int, length: int) -> None:
        """What was written to the range will have to be stable soon: begin with it, if that saves time."""
        return

    def check_there(self) -> None:
        """DiskError when it is known that what is written will not be found again."""
        return

    def share(self, source: Disk, offset: int, length: int) -> bool:
        """Take over what `source` has at the range, without copying; whether that was possible. If not, the range may
        hold anything."""
        return False

    @abstractmethod
    def reachable(self) -> bool:
        """Whether requests can be expected to succeed."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the disk; no method may be called after it."""
