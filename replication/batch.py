# SPDX-License-Identifier: BSD-3-Clause
"""Many small writes of a primary in one NBD write.

A request costs the secondary more than a small write does: it is received, given to a thread, and answered. So the
data export of a primary (`.data:TOKEN:NAME`) is larger than the disk by SPACE bytes, and a write that begins where the
disk ends is a batch:

    8 bytes         MAGIC
    8 bytes         number of writes
    16 bytes each   offset and length, in the order in which the writes were made
    the rest        their data, one after the other

All numbers are little-endian. An error says that some of the writes may have failed: the primary sends them again one
by one, to learn which.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence

from replication.errors import DiskError

SPACE = 1 << 20
"""Bytes behind the disk's end: the largest batch."""

DATA_MAX = 128 << 10
"""Most data of a batch: it fits into a socket's buffer, and is done by one thread, one write after the other. 4k writes
at depth 16, both hosts on one machine: 44k a second with 64 KiB, 50k with 128, 46k with 256."""

MAGIC = 0x6863746142524E64
_HEAD = struct.Struct("<QQ")
_ROW = struct.Struct("<QQ")
COUNT_MAX = (SPACE - _HEAD.size - DATA_MAX) // _ROW.size
"""Most writes of a batch."""

Write = tuple[int, memoryview]
"""Offset and data."""


def pack(writes: Iterable[tuple[int, bytes | memoryview]]) -> bytes:
    """A batch of the writes, which do not overlap and hold DATA_MAX bytes at most. Neighbours become one write."""
    rows: list[int] = []
    pieces: list[bytes | memoryview] = [b""]
    stop = -1
    for offset, data in writes:
        if offset == stop:
            rows[-1] += len(data)
        else:
            rows += (offset, len(data))
        pieces.append(data)
        stop = offset + len(data)
    count = len(rows) // 2
    pieces[0] = struct.pack(f"<{2 + len(rows)}Q", MAGIC, count, *rows)
    return b"".join(pieces)


def unpack(batch: memoryview, size: int) -> Sequence[Write]:
    """The writes of a batch for a disk of `size` bytes; DiskError when it is not one."""
    if len(batch) < _HEAD.size:
        raise _bad("too short")
    magic, count = _HEAD.unpack_from(batch)
    if magic != MAGIC or not 0 < count <= COUNT_MAX or len(batch) < _HEAD.size + count * _ROW.size:
        raise _bad("not one")
    rows = struct.unpack_from(f"<{2 * count}Q", batch, _HEAD.size)
    at = _HEAD.size + count * _ROW.size
    writes: list[Write] = []
    for offset, length in zip(rows[::2], rows[1::2], strict=True):
        if not 0 < length <= size - offset or length > len(batch) - at:
            raise _bad(f"{length} bytes at {offset} of {size}")
        writes.append((offset, batch[at : at + length]))
        at += length
    if at != len(batch):
        raise _bad("bytes left over")
    return writes


def _bad(why: str) -> DiskError:
    return DiskError(f"a batch of writes cannot be read: {why}", errno.EINVAL)
