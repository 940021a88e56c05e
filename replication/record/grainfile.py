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

GROWN = ".grown"
"""Ends the name of what is about to take the place of a file that has become too small."""

_SEAL = struct.Struct("<8sQQQ")
_MAGIC = b"grains 1"
_STORE_MAX = 1 << 20


def settle_grown(path: str, count: int) -> None:
    """Before the file of `count` grains is opened: a process was killed while it was about to be replaced by a larger
    one (GROWN). Which of the two counts, the record says, by the size of the disk: `count`. But either was written to:
    the former until the threads of the process went over to the new one, and that from then on. So what is marked in
    one of them is marked, in each use of these files the careful side. ConfigError."""
    grown = path + GROWN
    whole = -(-count // 8) * 8 + _SEAL.size
    try:
        if not os.path.lexists(grown):
            return
        if not os.path.lexists(path):  # somebody has taken it away: what it was is not believed, nor this
            os.unlink(grown)
            return
        with open(grown, "r+b") as fresh, open(path, "r+b") as former:
            sealed = os.fstat(fresh.fileno()).st_size
            magic = os.pread(fresh.fileno(), len(_MAGIC), sealed - _SEAL.size) if sealed > _SEAL.size else b""
            counts = sealed == whole and os.fstat(former.fileno()).st_size != whole
            if magic == _MAGIC:
                source, into = (former, fresh) if counts else (fresh, former)
                _add_marks(source.fileno(), into.fileno())
            elif counts:
                raise ConfigError(f"cannot use the change map {grown}: it is not complete")
        if counts:
            os.rename(grown, path)
        else:
            os.unlink(grown)
        files.sync_folder(path)
    except OSError as error:
        raise ConfigError(f"cannot use the change map {grown}: {error.strerror}") from error


def _add_marks(source: int, into: int) -> None:
    """Have the one file what the other has besides, as far as both go; OSError."""
    end = min(os.fstat(source).st_size, os.fstat(into).st_size) - _SEAL.size
    for at in range(0, end, _STORE_MAX):
        length = min(_STORE_MAX, end - at)
        here, there = (int.from_bytes(os.pread(fd, length, at), "little") for fd in (into, source))
        if here | there != here and not files.write_all(into, (here | there).to_bytes(length, "little"), at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    files.fdatasync(into)


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
    def in_use(self) -> bool:
        """Whether somebody may change it."""
        return self._mapped is not None

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

    def grow(self, count: int, fill: int) -> GrainFile:
        """A file of `count` grains, more than this one's: what this one has, then `fill`. It is beside this one until
        `take_place` (or `drop`), stable, and sealed last: one without a seal is not complete. ConfigError."""
        source, seal = self, self._seal
        if self._mapped is None:  # of a kind that nobody uses at present
            source = GrainFile(self.path, self._count)
            if not isinstance(source.found, Seal):
                source.close()
                raise ConfigError(f"cannot use the change map {self.path}: it {source.found.value}")
            seal = source.found._replace(closed=False)
            source.map(None)
        fresh = GrainFile(self.path + GROWN, count)
        try:
            fresh.map(fill)
            for at in range(0, self._count, _STORE_MAX):
                fresh.mapped.put(at, source.mapped.map[at : min(at + _STORE_MAX, self._count)])
            fresh.mapped.flush()
            fresh.seal(seal)
        except (OSError, ConfigError) as error:
            fresh.drop()
            raise fresh._failure(error) if isinstance(error, OSError) else error from error
        finally:
            if source is not self:
                source.close()
        return fresh

    def take_place(self, former: GrainFile, whole: bool = True) -> None:
        """Get the name of the one that it was made of, which is of no use any more; OSError. One that is not `whole`
        gets the name that no process believes, which the former one has by then."""
        distrusted = former.path + DISTRUSTED
        os.rename(self.path, former.path if whole else distrusted)
        self.path = former.path
        files.sync_folder(self.path)
        if whole:
            with contextlib.suppress(OSError):
                os.unlink(distrusted)
        former._let_go()

    def drop(self, keep: bool = False) -> None:
        """It is not going to take anybody's place in this process; `keep`: in the next one it may (`settle_grown`)."""
        self._let_go()
        if not keep:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _let_go(self) -> None:
        """As `close`, of one that is of no use any more: it gets no seal, and somebody may still look at the memory."""
        if self._mapped is not None:
            self._mapped.let_go()
            self._mapped = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

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
