# SPDX-License-Identifier: BSD-3-Clause
"""The records that the test guest writes (guest_init.sh), and what must hold for those that are found after a failover.

A record is 512 bytes of text, so it never lies across a block or page, and each byte of it follows from three numbers:

    number     from 1, without a gap
    checksum   of this number, of the tag, and of the checksum before: of the whole history that led to it
    tag        which guest has written it, so that one guest's record can never be taken for another's

What a guest has said on its console to be durable is *acknowledged*.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LENGTH = 512

_MASK = 0xFFFFFFFF


class BadRecords(AssertionError):
    """What was found is no history that a guest can have written; the text says where it goes wrong."""


@dataclass(frozen=True)
class Record:
    """One record."""

    number: int
    tag: int
    checksum: int

    def encoded(self) -> bytes:
        """As it stands in the file."""
        digits = str(self.checksum)
        return f"{self.number:8d} {self.checksum:10d} {self.tag:4d} {digits * 48}{digits[:6]}\n".encode()


def following(last: Record | None, tag: int) -> Record:
    """The record that a guest with `tag` writes after `last` (None: the first)."""
    number, checksum = (1, 0) if last is None else (last.number + 1, last.checksum)
    return Record(number, tag, ((checksum * 1103515245 + number * 31 + tag) & _MASK) + _MASK + 1)


def decode(content: bytes) -> list[Record]:
    """The records in the file; BadRecords if one is torn, foreign, missing, or out of its order."""
    found: list[Record] = []
    for offset in range(0, len(content), LENGTH):
        raw = content[offset : offset + LENGTH]
        number = len(found) + 1
        if len(raw) < LENGTH:
            raise BadRecords(f"record {number} is torn: {len(raw)} of its {LENGTH} bytes are there: {raw[:40]!r}")
        field = raw[20:24]
        if not field.strip().isdigit():
            raise BadRecords(f"record {number} has no tag: {raw[:40]!r}")
        record = following(found[-1] if found else None, int(field))
        if raw != record.encoded():
            at = next(
                index for index, (is_, ought) in enumerate(zip(raw, record.encoded(), strict=True)) if is_ != ought
            )
            raise BadRecords(f"record {number} is wrong from its byte {at} on: {raw[:40]!r}... {raw[at : at + 40]!r}")
        found.append(record)
    return found


@dataclass(frozen=True)
class Acknowledged:
    """A line `vm: record` as it came out of a guest's console."""

    moment: float
    """time.monotonic() when it was read; the guest had written the record before."""
    number: int
    count: int
    """How many records the guest has written since its boot, as its memory says."""
    uptime_s: float


def due(acknowledged: Iterable[Acknowledged], moment: float) -> int:
    """The last record that must be in a checkpoint which was cut at `moment` (time.monotonic()) or later; 0 if none."""
    return max((line.number for line in acknowledged if line.moment <= moment), default=0)


@dataclass(frozen=True)
class Loss:
    """What a failover has cost."""

    acknowledged: int
    """The last record that the old guest had said to be durable."""
    due: int
    """The last of them that the checkpoint had to have."""
    found: int
    """The last one that is there."""

    @property
    def lost(self) -> int:
        """Acknowledged records that are gone."""
        return max(0, self.acknowledged - self.found)

    @property
    def allowed(self) -> int:
        """How many were acknowledged after the checkpoint."""
        return self.acknowledged - self.due

    def check(self, found: Sequence[Record], tags: Sequence[int]) -> None:
        """BadRecords unless everything up to the checkpoint is there, and nothing but what guests with `tags`, in that
        order, have written."""
        if self.found < self.due:
            raise BadRecords(f"records {self.found + 1} to {self.due} are gone, although they were in the checkpoint")
        if self.found > self.acknowledged + 1:
            raise BadRecords(f"record {self.found} is there, but only {self.acknowledged} were written")
        order = [
            tag for index, tag in enumerate(record.tag for record in found) if index == 0 or tag != found[index - 1].tag
        ]
        if order != [tag for tag in tags if tag in order]:
            raise BadRecords(f"written by guests {order}, not by {list(tags)}")
