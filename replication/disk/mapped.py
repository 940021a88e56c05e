# SPDX-License-Identifier: BSD-3-Clause
"""A part of a file in memory, of which no change needs a block that is not there.

A store into a shared mapping cannot fail: where the file system finds no block for the page, the kernel ends the
process (SIGBUS). In a file system that overwrites in place that happens only in holes, and `MappedFile` leaves none. In
one that copies on write (btrfs), or whose files can share blocks with a copy that somebody makes at any time (XFS),
nothing that was there before helps. There, and wherever it is not known, the mapping is private, and a change is
written to the file first, which answers ENOSPC like any other write. Both outlive the process alike.

What does not fail either way: reading, and what was written before.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os

from replication.disk import files

_IN_PLACE = frozenset((0xEF53, 0x01021994, 0x858458F6))
"""ext2 to ext4, tmpfs, ramfs (linux/magic.h): a block that a file has stays its own."""

_UNSHARE_RANGE = 0x40
_KEEP_SIZE = 0x01
_STEP = 1 << 20

_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


def overwrites_in_place(fd: int) -> bool:
    """Whether a block that the file has is overwritten where it is, whatever happens to other files."""
    status = (ctypes.c_long * 64)()
    return not _fstatfs(fd, status) and status[0] & 0xFFFFFFFF in _IN_PLACE


def take_blocks(fd: int, offset: int, length: int) -> None:
    """Give a range of a file blocks of its own, whatever it holds. OSError where there is no room, unless other writes
    answer that (see above)."""
    if not overwrites_in_place(fd):
        with contextlib.suppress(OSError):  # what cannot be, or has no room: the writes to come will say
            files.fallocate(fd, _UNSHARE_RANGE | _KEEP_SIZE, offset, length)
        return
    at, stop = offset, offset + length
    while at < stop:
        try:
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            data = os.lseek(fd, hole, os.SEEK_DATA) if hole < stop else stop
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = stop
        if hole >= stop:
            return
        # Written, not only allocated: what is read as zeroes may be blocks that are only promised.
        for part in range(hole, min(data, stop), _STEP):
            files.write_all(fd, bytes(min(_STEP, min(data, stop) - part)), part)
        at = data


class MappedFile:
    """`length` bytes of an open file from `offset` (whole pages) on. The file stays the caller's."""

    def __init__(self, fd: int, length: int, offset: int = 0, sparse: bool = False) -> None:
        """OSError, also when a hole of the file gets no block. `sparse`: holes stay, and of a page that was one nothing
        is stored, or read (in tmpfs even that takes memory), before `fill` has put something there."""
        if not sparse:
            take_blocks(fd, offset, length)
        self._offset = offset
        self._fd = os.dup(fd)
        try:
            self.in_place = overwrites_in_place(fd)
            """Whether a store into `map` is all that a change takes."""
            access = mmap.ACCESS_WRITE if self.in_place else mmap.ACCESS_COPY
            self.map = mmap.mmap(fd, length, access=access, offset=offset)
            """The bytes. Each change is a store here, after `keep` with the same."""
        except BaseException:
            os.close(self._fd)
            raise

    def keep(self, at: int, data: bytes) -> None:
        """Make a change outlive the process, before it is stored into `map`. OSError: what the file holds there may
        be a part of it."""
        if self.in_place or files.pwritev(self._fd, (data,), self._offset + at) == len(data):
            return
        if not files.write_all(self._fd, data, self._offset + at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def put(self, at: int, data: bytes) -> None:
        """`keep` a change, and store it."""
        self.keep(at, data)
        self.map[at : at + len(data)] = data

    def fill(self, at: int, data: bytes) -> None:
        """`put` what may be a hole; OSError."""
        if not self.in_place:
            self.put(at, data)
        elif not files.write_all(self._fd, data, self._offset + at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def own_blocks(self) -> None:
        """Take blocks of its own again where a copy of the file shares them since: while there is room, no later change
        fails for want of it."""
        if not self.in_place:
            take_blocks(self._fd, self._offset, len(self.map))

    def flush(self) -> None:
        """Make it stable; OSError."""
        if self.in_place:
            self.map.flush()
        else:
            os.fsync(self._fd)

    def check(self, path: str) -> None:
        """OSError when the file is no longer there under its name: what is changed from now on would not outlive the
        process."""
        files.check_there(self._fd, path)

    def let_go(self) -> None:
        """As `close`, where somebody may still look at it: the memory goes with the last who does."""
        with contextlib.suppress(BufferError):
            self.map.close()
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """Unmap; BufferError while there is a view of the map."""
        self.map.close()
        os.close(self._fd)
