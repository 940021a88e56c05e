# SPDX-License-Identifier: BSD-3-Clause
"""A disk in a raw file or on a block device, and the file operations that overlays share with it.

The system calls are in files.py, the seam for failing and recording them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from replication.disk import files
from replication.disk.face import EXTENTS_MAX, ZEROES, Disk, Extent
from replication.disk.files import Buffer
from replication.disk.lock import lock_for_writing
from replication.disk.mapped import overwrites_in_place
from replication.errors import ConfigError, DiskError

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

_UNSUPPORTED = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV))


class FileDisk(Disk):
    """A raw file or block device, opened for writing and locked as QEMU locks it."""

    def __init__(self, name: str, path: str) -> None:
        """Open `path`; ConfigError when it cannot be opened, is neither kind, or is in use."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot open {path} of disk '{name}': {error.strerror}") from error
        try:
            kind = os.fstat(self._fd).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise ConfigError(f"{path} of disk '{name}' is neither a file nor a block device")
            lock_for_writing(self._fd, path)
            size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            os.close(self._fd)
            raise
        self._maps_holes = stat.S_ISREG(kind)
        self.counts_blocks = overwrites_in_place(self._fd)
        """Whether the file takes as many blocks as were written: none less, as where they are compressed."""
        self._open = True
        super().__init__(name, path, size)

    def read(self, buffer: memoryview, offset: int) -> None:
        try:
            done = count = files.preadv(self._fd, [buffer], offset)
            while done < len(buffer):
                if not count:
                    raise DiskError(f"{self.location} ends at {offset + done}: it was truncated while in use")
                count = files.preadv(self._fd, [buffer[done:]], offset + done)
                done += count
        except OSError as error:
            raise DiskError.from_os(f"reading {len(buffer)} bytes at {offset} of {self.location}", error) from error

    def write(self, pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        length = len(pieces[0]) if len(pieces) == 1 else sum([len(piece) for piece in pieces])
        unflushed = self.unflushed
        if unflushed is None:
            self._write(pieces, offset, length, fua)
        elif fua:
            try:
                self._write(pieces, offset, length, fua)
            except DiskError as error:
                # The kernel tells it once that it could not write its pages: to the next sync, whoever asks for it.
                unflushed.lose(error, told=True)
                raise
        else:
            number = unflushed.begin(offset, length)
            try:
                self._write(pieces, offset, length, False)
            finally:
                unflushed.end(number)

    def _write(self, pieces: Sequence[Buffer], offset: int, length: int, fua: bool) -> None:
        flags = os.RWF_DSYNC if fua else 0
        try:
            done = files.pwritev(self._fd, pieces, offset, flags)
            while done < length:
                rest = _after(pieces, done)
                count = files.pwritev(self._fd, rest, offset + done, flags)
                if not count:
                    raise DiskError(f"{self.location} takes no more data at {offset + done}", errno.ENOSPC)
                done += count
        except OSError as error:
            raise DiskError.from_os(f"writing {length} bytes at {offset} of {self.location}", error) from error

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool = False) -> None:
        unflushed = self.unflushed
        number = 0 if unflushed is None else unflushed.begin(offset, length)
        try:
            self._zero(offset, length, may_trim)
        finally:
            if unflushed is not None:
                unflushed.end(number)
        if fua:
            try:
                if unflushed is None:
                    self._flush()
                else:
                    unflushed.flush(self._flush)
            except DiskError as error:
                what = f"zeroing {length} bytes at {offset} of {self.location}"
                raise DiskError(f"{what}: {os.strerror(error.errno)}", error.errno) from error

    def _zero(self, offset: int, length: int, may_trim: bool) -> None:
        try:
            if not self._fallocate((_PUNCH_HOLE if may_trim else _ZERO_RANGE) | _KEEP_SIZE, offset, length):
                stop = offset + length
                for start in range(offset, stop, len(ZEROES)):
                    count = min(len(ZEROES), stop - start)
                    self._write([ZEROES[:count]], start, count, False)
        except OSError as error:
            raise DiskError.from_os(f"zeroing {length} bytes at {offset} of {self.location}", error) from error

    def begin_flush(self, offset: int, length: int) -> None:
        files.begin_writeback(self._fd, offset, length)

    def write_back(self, offset: int, length: int) -> None:
        """Let the kernel write what it has not yet, and wait for it: who shares the range then has not to."""
        files.write_back(self._fd, offset, length)

    def share(self, source: Disk, offset: int, length: int) -> bool:
        """By reflinks: both are files of one XFS or btrfs, and the range is whole blocks of the file system. A failure
        has its cause in what copying does, too, or does not matter."""
        if not isinstance(source, FileDisk):
            return False
        unflushed = self.unflushed
        number = 0 if unflushed is None else unflushed.begin(offset, length)
        try:
            return self._clone(source._fd, offset, length)
        finally:
            if unflushed is not None:
                unflushed.end(number)

    def _clone(self, source_fd: int, offset: int, length: int) -> bool:
        while True:
            try:
                files.clone_range(source_fd, self._fd, offset, length)
            except InterruptedError:
                continue
            except OSError:
                return False
            return True

    def discard(self, offset: int, length: int) -> None:
        """Give the space of a range back; its content is of no use to anybody."""
        try:
            self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError as error:
            raise DiskError.from_os(f"discarding {length} bytes at {offset} of {self.location}", error) from error

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate(2); False where the file system cannot do it, OSError for any other failure."""
        while True:
            try:
                files.fallocate(self._fd, mode, offset, length)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    return False
                if error.errno != errno.EINTR:
                    raise
            else:
                return True

    def room(self) -> int:
        try:
            return os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise DiskError.from_os(f"looking for the end of {self.location}", error) from error

    def check_there(self) -> None:
        """DiskError when the file was removed or replaced while in use: what it holds ends with the process."""
        try:
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                files.check_there(self._fd, self.location)
        except OSError as error:
            raise DiskError(f"{self.location} was removed or replaced while in use") from error

    def flush(self) -> None:
        if self.unflushed is None:
            self._flush()
        else:
            self.unflushed.flush(self._flush)

    def _flush(self) -> None:
        try:
            files.fdatasync(self._fd)
        except OSError as error:
            raise DiskError.from_os(f"flushing {self.location}", error) from error

    def extents(self, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        stop = offset + length
        if not self._maps_holes:
            return [Extent(offset, length, False, False)]
        found: list[Extent] = []
        at = offset
        while at < stop and len(found) < count:
            data = min(self._seek(at, os.SEEK_DATA, stop), stop)
            if data > at:
                found.append(Extent(at, data - at, True, True))
            if data < stop and len(found) < count:
                hole = min(self._seek(data, os.SEEK_HOLE, stop), stop)
                found.append(Extent(data, hole - data, False, False))
                data = hole
            at = data
        return found

    def hole(self, offset: int, length: int) -> int:
        # Not by `extents`: where data ends is of no interest here, and tmpfs finds out page by page (0.6 ms where the
        # next 256 MiB are data).
        return min(self._seek(offset, os.SEEK_DATA, offset + length) - offset, length) if self._maps_holes else 0

    def _seek(self, at: int, whence: int, otherwise: int) -> int:
        try:
            return os.lseek(self._fd, at, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after `at`
                return otherwise
            raise DiskError.from_os(f"looking for holes at {at} of {self.location}", error) from error

    def fileno(self) -> int:
        """Of the open file."""
        return self._fd

    def status(self) -> os.stat_result:
        """fstat(2) of the file; OSError."""
        return os.fstat(self._fd)

    def reachable(self) -> bool:
        return self._open

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)


def _after(pieces: Sequence[Buffer], done: int) -> list[Buffer]:
    """The pieces without their first `done` bytes."""
    rest: list[Buffer] = []
    for piece in pieces:
        if done >= len(piece):
            done -= len(piece)
        else:
            rest.append(memoryview(piece)[done:])
            done = 0
    return rest
