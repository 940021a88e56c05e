# SPDX-License-Identifier: BSD-3-Clause
"""The state words of one overlay image as they are used at run time: a mapping of the image, or of a live copy beside
it.

With `durability=process` the words are those of the image itself, mapped. The kernel writes such pages back when it
likes, a bit perhaps before the data that it speaks of, so after a power cut they cannot be trusted.

With `durability=power` the words in use are in a live copy (X.live beside the image X), and the image gets only what
has been made stable, by Overlay.publish. So the image is right after a power cut; the live copy makes that a killed
process loses nothing either. It counts only in the boot in which it was made:

    page 0      magic, the boot's id, the size of the table; written when the copy is complete
    from 4096   the image's L2 tables
"""

from __future__ import annotations

import contextlib
import os

import numpy as np

from replication.disk import files
from replication.disk.mapped import MappedFile
from replication.errors import ConfigError
from replication.image.qcow2 import Layout, check_entries
from replication.record.boot import boot_id

_PAGE = 4096
_MAGIC = b"nbdkit-replication live words 1\n"
_COPY_MAX = 1 << 20


class Table:
    """Mapped L2 tables: entry k has its state word at `words[2 * k + 1]`, in the byte order of the file."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        """Map `length` bytes of the file from `offset` on; OSError."""
        self.file = MappedFile(fd, length, offset)
        self._view = memoryview(self.file.map)
        self.words = self._view.cast("Q")
        self.grid = np.frombuffer(self.file.map, np.uint64).reshape(-1, 2)
        """The same as an array, one row an entry."""

    def flush(self) -> None:
        """Make the pages stable (msync); OSError."""
        self.file.flush()

    def close(self) -> None:
        """Unmap; the attributes are gone."""
        del self.grid
        self.words.release()
        self._view.release()
        self.file.close()


def live_path(path: str) -> str:
    """Where the live copy of an image's words is."""
    return (path[: -len(".qcow2")] if path.endswith(".qcow2") else path) + ".live"


def remove_live(path: str) -> None:
    """Take away the live copy of an image that is gone, or whose own words are the newest."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(live_path(path))


def _header(layout: Layout) -> bytes:
    return (_MAGIC + f"{boot_id()}\n{layout.table_length}\n".encode()).ljust(_PAGE, b"\0")


def _open_live(path: str, layout: Layout) -> int | None:
    """The live copy that a process of this boot has left, checked; None if there is none or it is of no use."""
    try:
        fd = os.open(live_path(path), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot open {live_path(path)}: {error.strerror}") from error
    try:
        if os.pread(fd, _PAGE, 0) == _header(layout) and os.fstat(fd).st_size == _PAGE + layout.table_length:
            check_entries(fd, live_path(path), layout._replace(table_offset=_PAGE))
            return fd
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"cannot read {live_path(path)}: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def image_table(fd: int, path: str, layout: Layout) -> Table:
    """The words of the image open at `fd`, which takes over what a live copy of this boot knows better."""
    try:
        table = Table(fd, layout.table_offset, layout.table_length)
    except OSError as error:
        raise ConfigError(f"cannot map {path}: {error.strerror}") from error
    try:
        live = _open_live(path, layout)
        if live is not None:
            newest = Table(live, _PAGE, layout.table_length)
            os.close(live)
            changed = newest.grid[:, 1] != table.grid[:, 1]
            for row in np.flatnonzero(changed).tolist():
                table.file.put(16 * row + 8, newest.grid[row, 1:].tobytes())
            newest.close()
        remove_live(path)
    except OSError as error:
        table.close()
        raise ConfigError(f"cannot use {live_path(path)}: {error.strerror}") from error
    except BaseException:
        table.close()
        raise
    return table


def live_table(fd: int, path: str, layout: Layout) -> Table:
    """The live copy of the words of the image open at `fd`: a former process's of this boot, or a new one."""
    live = _open_live(path, layout)
    try:
        if live is None:
            live = files.create(live_path(path), os.O_TRUNC)
            files.never_copy_on_write(live)
            # Read and written: copy_file_range(2) shares blocks where that is possible.
            for done in range(0, layout.table_length, _COPY_MAX):
                part = os.pread(fd, min(_COPY_MAX, layout.table_length - done), layout.table_offset + done)
                if len(part) < min(_COPY_MAX, layout.table_length - done):
                    raise ConfigError(f"{path} was truncated while it was opened")
                files.write_all(live, part, _PAGE + done)
            files.write_all(live, _header(layout), 0)
        return Table(live, _PAGE, layout.table_length)
    except OSError as error:
        raise ConfigError(f"cannot make {live_path(path)}: {error.strerror}") from error
    finally:
        if live is not None:
            os.close(live)
