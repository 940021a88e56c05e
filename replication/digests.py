# SPDX-License-Identifier: BSD-3-Clause
"""Digests of a secondary's disk, for a primary that compares the two (primary/verify.py has why it is exact).

They are read like data: the export `.data-digests:TOKEN:NAME` is `.data:TOKEN:NAME` (batch.py) with two areas more, in
which every unit of the disk has DIGEST_BYTES bytes. What is read there is made at that moment from what the disk holds.

    from the disk's end on  the room for batches, batch.SPACE bytes
    behind that             the digests of its ranges of RANGE bytes, _RANGES bytes
    behind that             the digests of its grains of 64 KiB, _GRAINS bytes

The areas have room for the largest disk there may be (sizes.SIZE_MAX), so that the size of the export tells that of the
disk. Ranges are compared, so 1 TiB costs the link 16 MiB; grains only where a range differs. The last unit of a disk
may be short.

A digest is the first 128 bits of SHA-256: OpenSSL's, without the GIL, with the instructions that processors have for it
since about 2019 (one core of an EPYC: 1,770 MB/s; BLAKE2b 850, MD5 740, SHA-1 1,890, SHA-512 860), and allowed on hosts
in FIPS mode. Nobody has to be kept from making two contents of one digest: who can write to the disks needs no such.
"""

from __future__ import annotations

import errno
import hashlib
from functools import cache
from typing import NamedTuple

from replication import batch
from replication.disk.face import ZEROES, Disk
from replication.disk.files import Buffer
from replication.disk.unflushed import GRAIN
from replication.errors import DiskError

DIGEST_BYTES = 16
RANGE = 1 << 20
_RANGES, _GRAINS = 1 << 31, 1 << 35
SPACE = _RANGES + _GRAINS
"""Bytes behind the room for batches."""

ASK_MAX = 16 << 20
"""Most bytes of the disk in one request: a secondary whose disk does not know that they are zeroes reads them, four
times as many before the first answer (compare.WINDOW), and a slow disk shall do that within `timeout`. A hole of 1 TiB
is 65,536 requests."""


class Asked(NamedTuple):
    """Of which part of the disk digests are wanted, in units of `unit` bytes."""

    offset: int
    length: int
    unit: int


def place_of(size: int, offset: int, unit: int) -> int:
    """Where the digest of the unit (RANGE or GRAIN) at `offset` is read, for a disk of `size` bytes."""
    return size + batch.SPACE + (0 if unit == RANGE else _RANGES) + offset // unit * DIGEST_BYTES


def what_is_asked(size: int, place: int, length: int) -> Asked:
    """What is wanted by who reads `length` bytes at `place`, behind the room for batches; DiskError when that is not
    whole digests of one area, or too much at once."""
    unit = RANGE if place < place_of(size, 0, GRAIN) else GRAIN
    begin = place - place_of(size, 0, unit)
    offset, stop = (at // DIGEST_BYTES * unit for at in (begin, begin + length))
    uneven = begin % DIGEST_BYTES or length % DIGEST_BYTES
    if uneven or not 0 < stop - offset <= ASK_MAX or stop - unit >= size:
        raise DiskError(f"{length} bytes at {place} are no digests", errno.EINVAL)
    return Asked(offset, min(stop, size) - offset, unit)


def digest(content: Buffer) -> bytes:
    """The digest of one unit."""
    return hashlib.sha256(content, usedforsecurity=False).digest()[:DIGEST_BYTES]


def digests(content: memoryview, unit: int) -> bytes:
    """The digests of a part of a disk, one after the other."""
    return b"".join(digest(content[at : at + unit]) for at in range(0, len(content), unit))


def digests_of_zeroes(length: int, unit: int) -> bytes:
    """The same of a part that reads as zeroes."""
    rest = length % unit
    return _of_zeroes(unit) * (length // unit) + (_of_zeroes(rest) if rest else b"")


@cache
def _of_zeroes(length: int) -> bytes:
    return digest(memoryview(ZEROES)[:length])  # only of the two units, and of the end of a few disks


def digest_of(disk: Disk, offset: int, length: int) -> bytes:
    """The digest of one unit of a disk. What is known to be zeroes is not read. DiskError."""
    if disk.hole(offset, length) >= length:
        return _of_zeroes(length)
    content = memoryview(bytearray(length))
    disk.read(content, offset)
    return digest(content)
