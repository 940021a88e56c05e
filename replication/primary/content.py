# SPDX-License-Identifier: BSD-3-Clause
"""What a range of a local disk holds, in whole grains, and the entries that carry it to the secondary.

Zeroes are told in two ways: by the disk's extents, without reading, and by comparing what was read. Only extents say
that something is a hole; zeroes that were read are zeroes that may be allocated, and stay so on the other side.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from replication.disk.face import ZEROES, Disk, Extent
from replication.disk.unflushed import GRAIN
from replication.errors import DiskError
from replication.image.qcow2 import BLOCK
from replication.primary.backlog import Entry, Kind

ZERO_RUN_MAX = 4 << 20
"""Most zeroes in one request. For each the secondary copies what it holds there before it answers, in 16 threads, say:
64 MiB for the first answer, which a slow disk has done within `timeout`. And a hole of 1 TiB is only 262,144 requests.
"""

_ASKS_MAX = 16
"""Answers put together to learn of one grain, from a server that tells 4 KiB at a time."""

_DATA, _ZERO, _HOLE = range(3)
_ZERO_GRAIN = bytes(GRAIN)


class Unreadable(DiskError):
    """The local disk cannot be read there."""


class Content(NamedTuple):
    """What the beginning of a range holds: `length` bytes of zeroes, perhaps a hole, or of anything."""

    length: int
    zero: bool
    hole: bool


def look(disk: Disk, offset: int, length: int) -> Content:
    """What the beginning of the range holds, without reading it; a grain that is partly zeroes holds data. The range is
    whole grains, the disk's last may be short. What the disk cannot tell (DiskError) holds data, too."""
    extents = _extents(disk, offset, length)
    known = extents[-1].offset + extents[-1].length - offset
    count = -(-length // GRAIN) if known >= length else known // GRAIN
    if not count:
        return Content(min(GRAIN, length), False, False)
    kinds = np.full(count, _HOLE, np.uint8)
    for extent in extents:
        first, stop = extent.offset - offset, extent.offset + extent.length - offset
        part = kinds[first // GRAIN : -(-stop // GRAIN)]
        np.minimum(part, _HOLE if extent.zero and extent.hole else _ZERO if extent.zero else _DATA, out=part)
    others = np.flatnonzero(kinds != kinds[0])
    alike = int(others[0]) if len(others) else count
    return Content(min(alike * GRAIN, length), bool(kinds[0] != _DATA), bool(kinds[0] == _HOLE))


def _extents(disk: Disk, offset: int, length: int) -> list[Extent]:
    """Extents of a grain at least, if the disk tells them."""
    found: list[Extent] = []
    at = offset
    try:
        for _ in range(_ASKS_MAX):
            found += disk.extents(at, offset + length - at)
            at = found[-1].offset + found[-1].length
            if at - offset >= min(GRAIN, length):
                break
    except DiskError:
        # It is there only to save reading; if the disk is broken, the read says so.
        return [Extent(offset, length, False, False)]
    return found


def known_zeroes(disk: Disk, offset: int, length: int) -> list[Entry]:
    """The zeroes at the beginning of a range as an entry, if the disk knows of a grain of them; none otherwise."""
    try:
        disk.check_settled(offset, length)
    except DiskError:
        return []
    found = look(disk, offset, length)
    if not found.zero:
        return []
    entry = Entry(Kind.ZERO, offset, found.length)
    entry.may_trim = found.hole
    return [entry]


def _read(disk: Disk, buffer: memoryview, offset: int) -> None:
    """Read what will stay: not what a change that was given up may still overwrite, after the other side has got it."""
    disk.check_settled(offset, len(buffer))
    disk.read(buffer, offset)


def what_is_read(disk: Disk, offset: int, length: int) -> list[Entry]:
    """The range as entries, read now. Grains of nothing but zeroes go without data. Unreadable."""
    data = bytearray(length)
    try:
        _read(disk, memoryview(data), offset)
    except DiskError as error:
        raise Unreadable(str(error), error.errno) from error
    # Not by comparing memory views: that takes 80 times as long (a megabyte of zeroes: 0.8 ms, and 10 us so).
    if data == ZEROES[:length]:
        return [Entry(Kind.ZERO, offset, length)]

    def is_zero(at: int) -> bool:
        return data.startswith(_ZERO_GRAIN[: length - at], at)

    entries: list[Entry] = []
    for zero, grains in itertools.groupby(range(0, length, GRAIN), is_zero):
        alike = list(grains)
        start, stop = alike[0], min(alike[-1] + GRAIN, length)
        entries.append(Entry(Kind.ZERO if zero else Kind.WRITE, offset + start, stop - start))
        if not zero:
            entries[-1].load(memoryview(data)[start:stop])
    return entries


def what_can_be_read(disk: Disk, offset: int, length: int) -> tuple[list[Entry], list[tuple[int, int, DiskError]]]:
    """The blocks of the range that can be read, as entries, and (offset, length, why) of those that cannot."""
    entries: list[Entry] = []
    failures: list[tuple[int, int, DiskError]] = []
    for at in range(offset, offset + length, BLOCK):
        count = min(BLOCK, offset + length - at)
        data = memoryview(bytearray(count))
        try:
            _read(disk, data, at)
        except DiskError as error:
            failures.append((at, count, error))
            continue
        entries.append(Entry(Kind.WRITE, at, count))
        entries[-1].load(data)
    return entries, failures
