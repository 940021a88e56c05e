# SPDX-License-Identifier: BSD-3-Clause
"""A JSON document that is replaced without a new block: overwritten in place, with a twin for when that is cut off.

A transition must not fail because a file system is full, so the document has its room from the start: a file of fixed
size, really written, in which the text is followed by blanks up to the end. Its last members are

    serial      counts the writes; 0: nothing has been saved yet, the file only keeps the room
    checksum    BLAKE2b (64 bits, hexadecimal) of all bytes before it

Invariants
* At rest both files hold the last document. A write overwrites the file itself and syncs it, which is the moment from
  which the document counts, then the twin. Before the file is overwritten, the twin holds on stable storage what
  counts until then: a file that is cut off at any byte leads to the twin, never to anything in between.
* A write that fails puts the former document back.
* Neither file ever changes its size here. So a file of another size was put there by somebody (version 0.1, an editor,
  a backup), and counts as it is; without the file the twin counts for nothing: it was moved away to start anew.
* Only a document that has outgrown its room, and one of version 0.1, is replaced by rename, with more room.

A reader in another process, which takes no lock, may meet the middle of an overwrite, for some microseconds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from typing import Any

from replication.disk import files
from replication.disk.mapped import overwrites_in_place, take_blocks
from replication.order.pause import pause

ROOM_MIN = 16 << 10
"""Bytes of each file, unless the document wants more when the process starts: a record of one disk takes 1 to 3 KiB."""

_PAGE = 4096
_SERIAL_END = 1 << 62
_FILE_MAX = 4 << 20
_CHECKSUM = b',\n "checksum": "'
_END = b'"\n}\n'


def _sealed(members: dict[str, Any], serial: int) -> bytes:
    text = json.dumps({**members, "serial": serial}, indent=1).encode().removesuffix(b"\n}") + _CHECKSUM
    return text + hashlib.blake2b(text, digest_size=8).hexdigest().encode() + _END


def _unsealed(content: bytes) -> bytes | None:
    """The document in the content of a file without the blanks, None unless it is whole."""
    at = content.rfind(_CHECKSUM) + len(_CHECKSUM)
    text = content[:at]
    sealed = text + hashlib.blake2b(text, digest_size=8).hexdigest().encode() + _END
    return sealed if content == sealed.ljust(len(content)) and at > len(_CHECKSUM) else None


def _room(sealed: bytes) -> int:
    """Room for a document of this size, and for the same again."""
    return max(ROOM_MIN, -(-2 * len(sealed) // _PAGE) * _PAGE)


def _is_room(fd: int, length: int) -> bool:
    """Whether a file can hold so much, and may be overwritten in place."""
    size = os.fstat(fd).st_size if fd >= 0 else 0
    return size >= max(ROOM_MIN, length) and size % _PAGE == 0


def _opened_anew(path: str, former_fd: int) -> int:
    """Instead of the former one, -1 where there is no such file."""
    if former_fd >= 0:
        os.close(former_fd)
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


class TwinFile:
    """The document in the file `path` and its twin."""

    def __init__(self, path: str) -> None:
        """Nothing is opened yet."""
        self.path = path
        self._twin_path = path + ".twin"
        self._fd = -1
        self._twin_fd = -1
        self._sealed = b""
        """What counts now; b"" before `read` has found or `reserve` has written anything."""
        self._serial = 0
        self._twin_follows = False
        """The twin holds on stable storage what counts now, as it must before the next write."""

    def read(self) -> dict[str, Any] | None:
        """The members of the document, None where nothing has been saved; OSError, or what json.loads raises for what
        is no document. Changes no file."""
        self._sealed, self._serial, self._twin_follows = b"", 0, False
        content = self._content(self.path)
        if content is None:
            return None
        sealed = _unsealed(content)
        cut_off = sealed is None and len(content) >= ROOM_MIN and len(content) % _PAGE == 0
        if cut_off:
            sealed = _unsealed(self._content(self._twin_path) or b"")
        members = json.loads(content if sealed is None else sealed)
        if not isinstance(members, dict):
            raise TypeError("it is no object")
        self._serial = members.pop("serial", 1)
        if type(self._serial) is not int or not 0 <= self._serial < _SERIAL_END:
            raise ValueError("its serial is no number of a write")
        if members.pop("checksum", None) is not None and sealed is None and cut_off:
            raise ValueError("its checksum is wrong")
        self._sealed = sealed or _sealed(members, self._serial)
        self._fd, self._twin_fd = _opened_anew(self.path, self._fd), _opened_anew(self._twin_path, self._twin_fd)
        return members if self._serial else None

    @property
    def found(self) -> bool:
        """Whether `read` has found a document, or one was written."""
        return self._serial > 0

    @property
    def serial(self) -> int:
        """The number of the last write, 0 before the first."""
        return self._serial

    @staticmethod
    def _content(path: str) -> bytes | None:
        try:
            with open(path, "rb") as file:
                return file.read(_FILE_MAX)
        except FileNotFoundError:
            return None

    def reserve(self, fresh: dict[str, Any]) -> None:
        """After `read`: take the room for all writes that follow, and make stable what was found. Where nothing has
        been saved, the file shows `fresh` until then. OSError: what was found still counts, and can be written as long
        as it fits."""
        if not self._serial:
            self._sealed = _sealed(fresh, 0)
        if _is_room(self._fd, len(self._sealed)):
            if _unsealed(self._content(self.path) or b"") != self._sealed:
                self._overwrite(self._fd, self._sealed)  # cut off, or never saved
            # A process that was killed in the midst of a write may have left it in memory only.
            files.fdatasync(self._fd)
        if not all(_is_room(fd, _room(self._sealed)) for fd in (self._fd, self._twin_fd)):
            self._replace(self._sealed)

    def probe(self) -> None:
        """Write what counts anyway, into the twin: whether the storage takes a write, and how long. OSError."""
        if _is_room(self._twin_fd, len(self._sealed)):
            self._twin_follows = False
            self._overwrite(self._twin_fd, self._sealed)
            self._twin_follows = True

    def write(self, members: dict[str, Any], *, twin: bool = True) -> None:
        """Replace the document and make it last, also over a power cut. OSError: the former one still counts. Without
        `twin` the twin is left for the next write, which begins with it."""
        sealed = _sealed(members, self._serial + 1)
        if all(_is_room(fd, len(sealed)) for fd in (self._fd, self._twin_fd)):
            self._write_in_place(sealed, twin)
        else:
            self._replace(sealed)
        self._sealed = sealed
        self._serial += 1

    def _write_in_place(self, sealed: bytes, twin: bool) -> None:
        if not self._twin_follows:
            self._overwrite(self._twin_fd, self._sealed)
            self._twin_follows = True
        try:
            self._overwrite(self._fd, sealed)
        except OSError:
            # Where this fails, too, nothing more can be done: the file is cut off, or shows what may not last.
            with contextlib.suppress(OSError):
                self._overwrite(self._fd, self._sealed)
            raise
        self._twin_follows = False
        if not twin:
            return
        with contextlib.suppress(OSError):  # the document lasts all the same; the next write begins with the twin
            self._overwrite(self._twin_fd, sealed)
            self._twin_follows = True

    def _replace(self, sealed: bytes) -> None:
        """Make both files anew, with room. The twin comes first: without the file itself it does not count."""
        room = _room(sealed)
        self._twin_follows = False
        files.replace(self._twin_path, self._sealed.ljust(room))
        self._twin_fd = _opened_anew(self._twin_path, self._twin_fd)
        files.replace(self.path, sealed.ljust(room))
        self._fd = _opened_anew(self.path, self._fd)

    def _overwrite(self, fd: int, sealed: bytes) -> None:
        if not files.write_all(fd, sealed.ljust(os.fstat(fd).st_size), 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        pause("record.sync")
        files.fdatasync(fd)

    def check(self) -> None:
        """OSError when a file is no longer there under its name; takes blocks of its own again (disk/mapped.py)."""
        for fd, path in ((self._fd, self.path), (self._twin_fd, self._twin_path)):
            if fd >= 0:
                files.check_there(fd, path)
                if not overwrites_in_place(fd):
                    take_blocks(fd, 0, os.fstat(fd).st_size)

    def close(self) -> None:
        """Let the files go."""
        for fd in (self._fd, self._twin_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._twin_fd = -1
