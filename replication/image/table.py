# SPDX-License-Identifier: BSD-3-Clause
"""The state words of one overlay image as they are used at run time: a mapping of the image, or of a live copy beside
it.

With `durability=process` the words are those of the image itself, mapped. The kernel writes such pages back when it
likes, a bit perhaps before the data that it speaks of, so after a power cut they cannot be trusted.

With `durability=power` the words in use are in a live copy (X.live beside the image X), and the image gets only what
has been made stable, by Overlay.publish. So the image is right after a power cut; the live copy makes that a killed
process loses nothing either. It counts only in the boot in which it was made:

Where the tables are large they have holes, in the image and in the live copy, whose words are 0: nothing is read or
stored there before `complete`.

    page 0      magic, the boot's id, the size of the table; written when the copy is complete
    from 4096   the image's L2 tables
"""

from __future__ import annotations

import contextlib
import errno
import os

import numpy as np

from replication.disk import files
from replication.disk.mapped import MappedFile
from replication.errors import ConfigError
from replication.image.qcow2 import (
    PAGE_CLUSTERS,
    Layout,
    Pages,
    check_entries,
    data_runs,
    first_words,
    has_holes,
)
from replication.record.boot import boot_id

_PAGE = 4096
_MAGIC = b"nbdkit-replication live words 1\n"
_COPY_MAX = 1 << 20


class Table:
    """Mapped L2 tables: entry k has its state word at `words[2 * k + 1]`, in the byte order of the file."""

    def __init__(self, fd: int, offset: int, layout: Layout, pages: Pages) -> None:
        """Map the tables from `offset` of the file on; OSError. `pages`: what is in them."""
        self._size = layout.size
        self.whole, self.held = (bytearray(found) for found in pages)
        """As `Pages`. The second is not kept up to date."""
        self.file = MappedFile(fd, layout.table_length, offset, sparse=has_holes(layout.table_length))
        self._view = memoryview(self.file.map)
        self.words = self._view.cast("Q")
        self.grid = np.frombuffer(self.file.map, np.uint64).reshape(-1, 2)
        """The same as an array, one row an entry."""

    def complete(self, page: int) -> None:
        """Put the first words of a page there, so that second words may be stored. OSError, and then it is not done.
        Nobody may change second words meanwhile."""
        content = np.empty((PAGE_CLUSTERS, 2), np.uint64)
        content[:, 0] = first_words(page, self._size)
        content[:, 1] = self.grid[page * PAGE_CLUSTERS : (page + 1) * PAGE_CLUSTERS, 1] if self.held[page] else 0
        self.file.fill(page * _PAGE, content.tobytes())
        self.whole[page] = 1

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


def _open_live(path: str, layout: Layout) -> tuple[int, Pages] | None:
    """The live copy that a process of this boot has left, checked, and what is in it; None if there is none or it is
    of no use."""
    try:
        fd = os.open(live_path(path), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot open {live_path(path)}: {error.strerror}") from error
    try:
        if os.pread(fd, _PAGE, 0) == _header(layout) and os.fstat(fd).st_size == _PAGE + layout.table_length:
            return fd, check_entries(fd, live_path(path), layout._replace(table_offset=_PAGE))
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
        table = Table(fd, layout.table_offset, layout, layout.pages)
    except OSError as error:
        raise ConfigError(f"cannot map {path}: {error.strerror}") from error
    try:
        live = _open_live(path, layout)
        if live is not None:
            newest = Table(live[0], _PAGE, layout, live[1])
            os.close(live[0])
            try:
                _take_over(table, newest)
            finally:
                newest.close()
        remove_live(path)
    except OSError as error:
        table.close()
        raise ConfigError(f"cannot use {live_path(path)}: {error.strerror}") from error
    except BaseException:
        table.close()
        raise
    return table


def complete_in_image(fd: int, layout: Layout, page: int) -> None:
    """With a live copy: put the first words of a page into the image as well. OSError."""
    if layout.pages.whole[page]:
        return
    at = layout.table_offset + page * _PAGE
    content = np.frombuffer(bytearray(os.pread(fd, _PAGE, at)), np.uint64).reshape(-1, 2)
    content[:, 0] = first_words(page, layout.size)
    if not files.write_all(fd, content.tobytes(), at):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    layout.pages.whole[page] = 1


def _take_over(table: Table, newest: Table) -> None:
    """Change the words that are other ones in `newest`; OSError."""
    for page, (held, held_there) in enumerate(zip(newest.held, table.held, strict=True)):
        if not held and not held_there:
            continue
        first, last = page * PAGE_CLUSTERS, (page + 1) * PAGE_CLUSTERS
        words = newest.grid[first:last, 1].copy() if held else np.zeros(PAGE_CLUSTERS, np.uint64)
        if not table.whole[page]:
            table.complete(page)
        for row in np.flatnonzero(words != table.grid[first:last, 1]).tolist():
            table.file.put(16 * (first + row) + 8, words[row : row + 1].tobytes())
        table.held[page] = held


def live_table(fd: int, path: str, layout: Layout) -> Table:
    """The live copy of the words of the image open at `fd`: a former process's of this boot, or a new one."""
    found = _open_live(path, layout)
    live, pages = (None, layout.pages) if found is None else found
    try:
        if live is None:
            live = files.create(live_path(path), os.O_TRUNC)
            files.never_copy_on_write(live)
            # Read and written: copy_file_range(2) shares blocks where that is possible.
            os.ftruncate(live, _PAGE + layout.table_length)
            for start, stop in data_runs(fd, layout.table_offset, layout.table_length):
                for at in range(start, stop, _COPY_MAX):
                    part = os.pread(fd, min(_COPY_MAX, stop - at), at)
                    if len(part) < min(_COPY_MAX, stop - at):
                        raise ConfigError(f"{path} was truncated while it was opened")
                    files.write_all(live, part, _PAGE + at - layout.table_offset)
            files.write_all(live, _header(layout), 0)
        return Table(live, _PAGE, layout, pages)
    except OSError as error:
        raise ConfigError(f"cannot make {live_path(path)}: {error.strerror}") from error
    finally:
        if live is not None:
            os.close(live)
