# SPDX-License-Identifier: BSD-3-Clause
"""The system calls by which the images change and become stable: one thin seam.

Everything that must survive a power cut goes through these functions, called by their module (`files.pwritev`), so
that a test can count, fail, cut short or record them. Stores into mappings do not pass here: what they say outlives
the process, never the host (state.py and image/overlay.py say what does).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from replication.log import log

Buffer = bytes | bytearray | memoryview

# fallocate(2) with a mode is not in Python's os module. ctypes lets go of the GIL meanwhile.
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = ctypes.CDLL(None).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 7

_FICLONERANGE = 0x4020940D
"""linux/fs.h, as most architectures have it; on the others the kernel does not know the number. (Python has a name for
it from 3.12 on.)"""


_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """preadv(2): bytes read, which may be fewer than asked for."""
    return os.preadv(fd, buffers, offset)


def pwritev(fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
    """pwritev2(2): bytes written, which may be fewer than given."""
    return os.pwritev(fd, buffers, offset, flags) if flags else os.pwritev(fd, buffers, offset)


def write_all(fd: int, content: bytes, offset: int) -> bool:
    """Write all of it, in as many pieces as it takes; False when no more is taken."""
    done = 0
    while done < len(content):
        count = pwritev(fd, [content[done:]], offset + done)
        if not count:
            return False
        done += count
    return True


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); OSError, EINTR included."""
    if _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def begin_writeback(fd: int, offset: int, length: int) -> None:
    """sync_file_range(2): begin to write dirty pages of the range. What fails here a sync will say."""
    _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def write_back(fd: int, offset: int, length: int) -> None:
    """sync_file_range(2): write dirty pages of the range, and wait for it. That makes nothing stable."""
    _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE_AND_WAIT)


def clone_range(source: int, fd: int, offset: int, length: int) -> None:
    """ioctl_ficlonerange(2): the range of the file `fd` shares the blocks of `source` at the same offset; OSError,
    EINTR included. Dirty pages of `source` are written before."""
    fcntl.ioctl(fd, _FICLONERANGE, struct.pack("qQQQ", source, offset, length, offset))


def fdatasync(fd: int) -> None:
    """fdatasync(2): data, and what is needed to find it, are stable."""
    os.fdatasync(fd)


def create(path: str, flags: int, folder: int | None = None) -> int:
    """Open a file for reading and writing that is made if it is not there: for its owner alone, whatever the umask.
    `flags` of open(2) besides, and the descriptor of the folder from which a relative path counts."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600, dir_fd=folder)
    if os.fstat(fd).st_mode & 0o600 != 0o600:  # a umask that takes its own rights from the owner
        os.fchmod(fd, 0o600)
    return fd


def warn_of_others(what: str, folder: str) -> None:
    """Say that others than its owner may enter a folder with what is private in it."""
    mode = os.stat(folder).st_mode
    if mode & 0o077:
        log(f"others may enter {what} {folder} (its mode is {mode & 0o7777:04o}): chmod 0700 keeps them out")


def replace(path: str, content: bytes) -> None:
    """Give a file new content as a whole: whoever opens it, also after a power cut, finds the old or the new. Stable
    when it returns."""
    temporary = path + ".new"
    fd = create(temporary, os.O_TRUNC)
    try:
        never_copy_on_write(fd)
        if not write_all(fd, content, 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_folder(path)


def never_copy_on_write(fd: int) -> None:
    """Have btrfs overwrite an empty file's blocks in place from now on (chattr +C), so that a full file system takes
    what is written over. Other file systems do, or cannot."""
    flags = bytearray(8)
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
        flags[2] |= _FS_NOCOW_FL >> 16
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags)


def check_there(fd: int, path: str) -> None:
    """OSError when the open file is no longer the one of this name: it was removed, renamed or replaced. What this
    process may not look at, with the rights that nbdkit has left it, is taken for there."""
    status = os.fstat(fd)
    try:
        there = os.stat(path)
    except PermissionError:
        return
    if (status.st_dev, status.st_ino) != (there.st_dev, there.st_ino):
        raise FileNotFoundError(errno.ENOENT, "another file has taken its place", path)


def sync_folder(path: str) -> None:
    """A file of this name that was made or renamed is there after a power cut, too."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
