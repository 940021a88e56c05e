# SPDX-License-Identifier: BSD-3-Clause
"""A file with one byte for every grain of a disk, and a seal at its end that says to which state folder it belongs.

    grains    a byte each, in memory as a whole (disk/mapped.py); what they mean is changes.py's and unflushed.py's
    seal      behind them, from a multiple of 8 bytes on: a magic, the identity of the state folder, the number of the
              opening in which the file was used last, and whether it was closed in good order (binding.py)

Version 0.2 had no seal. A file that is made, or made anew, has an empty one until the folder is bound to the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from enum import Enum
from typing import NamedTuple

from replication.disk import files
from replication.disk.mapped import MappedFile
from replication.errors import ConfigError

DISTRUSTED = ".distrusted"
"""Ends the name of a file that has not all of what was to be kept in it."""

_SEAL = struct.Struct("<8sQQQ")
_MAGIC = b"grains 1"
_STORE_MAX = 1 << 20


class Found(Enum):
    """What was found instead of a sealed file."""

    NOTHING = "is missing"
    OTHER = "is empty, cut off, or of another size"
    BARE = "has no seal"
    DISTRUSTED = "had no room for all of it"


class Seal(NamedTuple):
    """To what a file belongs; all zero when it was not said yet."""

    identity: int = 0
    opening: int = 0
    closed: bool = False


class GrainFile:
    """The file `path` of `count` grains."""

    def __init__(self, path: str, count: int) -> None:
        """What is there is found out, and not changed; `map` must follow. ConfigError."""
        self.path = path
        self._count = count
        self._seal_at = -(-count // 8) * 8
        self._fd = -1
        self._mapped: MappedFile | None = None
        self._seal = Seal()
        self.closed_well = False
        """Whether it says so."""
        self.found: Found | Seal = Found.NOTHING
        try:
            self.found = self._look()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot use the change map {self.path}: {error.strerror}")

    def _look(self) -> Found | Seal:
        if os.path.lexists(self.path + DISTRUSTED):
            return Found.DISTRUSTED
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return Found.NOTHING
        size = os.fstat(self._fd).st_size
        if size == self._count:
            return Found.BARE
        if size != self._seal_at + _SEAL.size:
            return Found.OTHER
        magic, identity, opening, closed = _SEAL.unpack(os.pread(self._fd, _SEAL.size, self._seal_at))
        if magic == bytes(len(_MAGIC)):
            return Seal()
        return Seal(identity, opening, bool(closed)) if magic == _MAGIC else Found.OTHER

    def map(self, fill: int | None) -> None:
        """Map it; with `fill` it is made anew before, all grains that byte. ConfigError."""
        try:
            if fill is not None:
                self._make(fill)
            elif self.found is Found.BARE:
                self._write(bytes(self._seal_at - self._count + _SEAL.size), self._count)
            self._mapped = MappedFile(self._fd, self._seal_at + _SEAL.size)
        except OSError as error:
            raise self._failure(error) from error

    def _make(self, fill: int) -> None:
        """Nobody takes it for what it was from the first change on: its seal goes first."""
        if self.found is Found.DISTRUSTED:
            self._fd = files.create(self.path + DISTRUSTED, 0)
        elif self._fd < 0:
            self._fd = files.create(self.path, 0)
        files.never_copy_on_write(self._fd)
        os.ftruncate(self._fd, self._seal_at + _SEAL.size)
        self._write(bytes(_SEAL.size), self._seal_at)
        # Written: where blocks are not overwritten in place, a hole would want one with its first change.
        for at in range(0, self._count, _STORE_MAX):
            self._write(bytes((fill,)) * min(_STORE_MAX, self._count - at), at)
        if self.found is Found.DISTRUSTED:
            os.fsync(self._fd)
            os.rename(self.path + DISTRUSTED, self.path)

    def _write(self, content: bytes, at: int) -> None:
        if not files.write_all(self._fd, content, at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def mapped(self) -> MappedFile:
        """The grains, and behind them what is none of the user's business."""
        assert self._mapped is not None
        return self._mapped

    def check(self) -> None:
        """OSError when it is in use, and no longer there under its name."""
        if self._mapped is not None:
            self._mapped.check(self.path)

    def seal(self, seal: Seal) -> None:
        """Say to what it belongs, and make it stable; OSError."""
        self._write(_SEAL.pack(_MAGIC, *seal), self._seal_at)
        files.fdatasync(self._fd)
        self._seal = seal

    def close(self) -> None:
        """Let the file go: nobody changes it any more."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        if self._fd >= 0:
            if self._seal.identity:
                with contextlib.suppress(OSError):  # the folder does not count as closed in good order then
                    self.seal(self._seal._replace(closed=True))
                    self.closed_well = True
            os.close(self._fd)
            self._fd = -1
