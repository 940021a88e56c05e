# SPDX-License-Identifier: BSD-3-Clause
"""QEMU's image locks, so that QEMU's tools and this plugin keep off each other's images.

A user of an image takes a shared open-file-description lock on byte 100 + p for every permission p that it
uses and on byte 200 + p for every permission that it does not grant to others; then it looks whether somebody
else's locks contradict. Observed with qemu-img 7.2 by tracing its locks; the permissions are consistent-read (0),
write (1), write-unchanged (2) and resize (3).
"""

from __future__ import annotations

import fcntl
import struct

from replication.errors import ConfigError

_USED = 100
_UNSHARED = 200
_WRITER_USES = (0, 1, 3)
_WRITER_UNSHARES = (1, 3)
_NAMES = ("consistent read", "write", "write unchanged", "resize")

_FLOCK = struct.Struct("hhqqixxxx")  # l_type, l_whence, l_start, l_len, l_pid of struct flock on 64-bit Linux


def lock_for_writing(fd: int, path: str) -> None:
    """Claim the image as its only writer until `fd` is closed; readers that share it may stay.

    Raises ConfigError, in QEMU's words, when another process uses it in a way that contradicts.
    """
    for permission in _WRITER_USES:
        _share(fd, _USED + permission, path)
    for permission in _WRITER_UNSHARES:
        _share(fd, _UNSHARED + permission, path)
    for permission in _WRITER_USES:
        if _held_by_other(fd, _UNSHARED + permission):
            raise ConfigError(f'Failed to get "{_NAMES[permission]}" lock: is another process using the image {path}?')
    for permission in _WRITER_UNSHARES:
        if _held_by_other(fd, _USED + permission):
            raise ConfigError(
                f'Failed to get shared "{_NAMES[permission]}" lock: is another process using the image {path}?'
            )


def used_by_other(fd: int) -> bool:
    """Whether another process uses the image in a way that keeps a writer off. `fd` may be open for reading only, and
    takes no lock."""
    claims = [_UNSHARED + permission for permission in _WRITER_USES]
    claims += [_USED + permission for permission in _WRITER_UNSHARES]
    return any(_held_by_other(fd, byte) for byte in claims)


def _share(fd: int, byte: int, path: str) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
    except OSError as error:
        raise ConfigError(f"cannot lock the image {path}: {error.strerror}") from error


def _held_by_other(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK
