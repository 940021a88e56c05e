# SPDX-License-Identifier: BSD-3-Clause
"""What is asked of an NBD server: for Connection.issue, with everything but the last two arguments filled in."""

from __future__ import annotations

from collections.abc import Callable

import nbd

from replication.disk.connection import Completion, Issue
from replication.disk.face import Extent

_EXTENT_CHUNK = 1 << 30


def pread(part: memoryview | bytearray, offset: int, handle: nbd.NBD, done: Completion) -> None:
    """Fill `part`."""
    handle.aio_pread(part, offset, done)


def pwrite(part: memoryview | bytes, offset: int, flags: int, handle: nbd.NBD, done: Completion) -> None:
    """Write `part`."""
    handle.aio_pwrite(part, offset, done, flags)


def zero(length: int, offset: int, flags: int, handle: nbd.NBD, done: Completion) -> None:
    """Make a range read as zeroes."""
    handle.aio_zero(length, offset, done, flags)


def flush(handle: nbd.NBD, done: Completion) -> None:
    """Make stable what was answered."""
    handle.aio_flush(done)


def extents(offset: int, length: int, count: int, run: Callable[[Issue], None]) -> list[Extent]:
    """`count` extents at most from the beginning of a range on, of a server that tells them; data for all of it if it
    tells none. `run` issues a request, and returns when it is done."""
    found: list[Extent] = []

    def got(context: str, at: int, entries: list[int], _error: object) -> int:
        if context == "base:allocation":
            for size, flags in zip(entries[::2], entries[1::2], strict=True):
                inside = min(size, offset + length - at)
                if inside > 0 and len(found) < count:
                    found.append(Extent(at, inside, bool(flags & nbd.STATE_ZERO), bool(flags & nbd.STATE_HOLE)))
                    at += inside
        return 0

    asked, only = min(length, _EXTENT_CHUNK), nbd.CMD_FLAG_REQ_ONE if count == 1 else 0
    run(lambda handle, done: handle.aio_block_status(asked, offset, got, done, only))
    return found or [Extent(offset, length, False, False)]
