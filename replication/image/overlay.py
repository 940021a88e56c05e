# SPDX-License-Identifier: BSD-3-Clause
"""One overlay image: which blocks it holds, and their data.

Invariants
* A bit says "allocated" only after the block's data is in the data file (a reader, or a process killed in between,
  never finds a bit without its data).
* The bits of 32 blocks share one word; a word is changed only under `_words`, with one aligned store, so that
  neither a thread nor a kill can see half a change.
* Nobody but `empty` and `forget` clears bits, and both say who must be kept out.
* Where the words' file system copies on write, each is written to the file before it is stored (disk/mapped.py). A
  change that finds no room there is a LayerError, and has not happened.
* A word is read only where its page is in `_dirty`, and stored only where it is in `_whole`: large tables have holes.
* With `durability=power` the image on stable storage gets a word (`publish`) only after what it says is true there: its
  data is stable (bits set), or the disk below has it (bits cleared). See table.py.

Blocks are 4 KiB. Words are used in the byte order of the mapping (big-endian in the file), so the masks
below are made once in that order and no word is ever swapped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from replication.disk import files
from replication.disk.file import FileDisk
from replication.errors import ConfigError, DiskError
from replication.image import qcow2
from replication.image.layer import Layer, LayerError
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, CLUSTER, PAGE_CLUSTERS
from replication.image.table import Table, complete_in_image, image_table, live_path, live_table, remove_live

_PAGE = 4096

_PAGE_BLOCKS = PAGE_CLUSTERS * BLOCKS_PER_CLUSTER

_RUN_MAX = 1 << 10
"""Most pages of words that are looked at together: 4 MiB."""

_ROOM_S = 1.0
"""Longest search for the room of a page of words; as image/shortage.py."""

_EMPTIED_BEHIND = 4 << 20
"""Bytes of stale data that `reclaim` gives back in one step, under one range lock of its caller."""


class Held(IntEnum):
    """What an overlay knows of a block."""

    NOTHING = 0
    DATA = 1
    ZERO = 2


NOTHING: Final = Held.NOTHING
DATA: Final = Held.DATA
ZERO: Final = Held.ZERO


def _native(bit: int) -> int:
    """The mask, in the machine's byte order, of a bit of a big-endian word."""
    return int.from_bytes((1 << bit).to_bytes(8, "big"), sys.byteorder)


def _mask_table(first_bit: int) -> list[list[int]]:
    """table[a][b]: the mask of blocks a to b - 1, for 0 <= a < b <= 32."""
    table = [[0] * (BLOCKS_PER_CLUSTER + 1) for _ in range(BLOCKS_PER_CLUSTER)]
    for start in range(BLOCKS_PER_CLUSTER):
        mask = 0
        for block in range(start, BLOCKS_PER_CLUSTER):
            mask |= _native(first_bit + block)
            table[start][block + 1] = mask
    return table


DATA_MASK = _mask_table(0)
ZERO_MASK = _mask_table(32)
DATA_BITS = DATA_MASK[0][BLOCKS_PER_CLUSTER]


class ReadOnlyImage(ConfigError):
    """The image cannot be written, so it cannot be emptied."""


def _ones(flags: bytes | bytearray) -> Iterator[int]:
    """Where a flag is 1, ascending."""
    at = flags.find(1)
    while at >= 0:
        yield at
        at = flags.find(1, at + 1)


def _no_relief() -> bool:
    return False


def _count_bits(words: npt.NDArray[np.uint64]) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


def states_in(words: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Overlay.states, of these words."""
    # Bytes as in `blocks_of`, turned round to blocks 0..7 up to 24..31.
    halves = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 2, 4)[:, :, ::-1]
    zero, data = (np.unpackbits(halves[:, half].ravel(), bitorder="little") for half in (0, 1))
    return data, zero


Words = list[tuple[int, bytes]]
"""Pages of words as they were at one moment: page number and content."""


class _Larger(NamedTuple):
    """An image that is about to take the place of one that has become too small."""

    path: str
    fd: int
    layout: qcow2.Layout
    mapped: Table


class Overlay:
    """An open overlay. Offsets are bytes; ranges that change bits are whole blocks (the last one of the disk may
    be short)."""

    def __init__(self, role: str, disk_name: str, path: str, power: bool = False) -> None:
        """Open, lock and check the image; ConfigError otherwise. `role` is "active" or "hidden", for messages; `power`:
        durability=power."""
        self.role = role
        self.power = power
        self.path = path
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise ReadOnlyImage(f"cannot open the {role} disk {path} for writing: {error.strerror}") from error
            raise ConfigError(f"cannot open the {role} disk {path}: {error.strerror}") from error
        try:
            self.layout = qcow2.open_layout(fd, path)
            self._mapped = (live_table if power else image_table)(fd, path, self.layout)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._all = self._mapped.words
        self._in_place = self._mapped.file.in_place
        # While the disk grows; and what was in use before it has grown, which another thread may still look at.
        self._larger: _Larger | None = None
        self._outgrown: list[tuple[int, Table]] = []
        self.misplaced = False
        """It has grown, and the next process does not find it under its name."""
        self._unkept: DiskError | None = None
        """Why the file may hold words that are no longer there: then nothing may be marked, until it is emptied."""
        self.relieve: Callable[[], bool] = _no_relief
        """Whether something was done for room in a full file system (Shortage.relieve)."""
        # Protects changes of words, `_dirty`, `_unpublished` and the two counts of blocks. Never held across I/O.
        self._words = threading.Lock()
        self._table = self._mapped.grid
        try:
            self.data = FileDisk(f"{disk_name} ({role})", self.layout.data_path)
            if self.data.size < self.layout.size:
                self.data.close()
                raise ConfigError(
                    f"{self.layout.data_path} is truncated: {self.data.size} bytes instead of {self.layout.size}"
                )
        except BaseException:
            self._unmap()
            raise
        # Pages of words in which a bit may be set; and those that have all first words.
        self._dirty = bytearray(self._mapped.held)
        self._whole = self._mapped.whole
        self.allocated_blocks = self.data_blocks = 0
        """The latter: those of them that take space in the data file; the others are known to be zeroes."""
        self._count()
        self.watch_at = 0
        """The fill level is looked at when `data_blocks` gets here (fill.py)."""
        # Pages of words that the image does not have as they are here, with durability=power. What a former process
        # had not published is not known, so at first that is every page with bits in the one or the other.
        self._unpublished = bytearray(len(self._dirty))
        if power:
            self._find_unpublished()

    def _count(self) -> None:
        self.allocated_blocks = self.data_blocks = 0
        for first, last in self._dirty_runs():
            words = self._words_of(first, last)
            words = words[words != 0]
            self.allocated_blocks += _count_bits(words)
            self.data_blocks += _count_bits(words & np.uint64(DATA_BITS))

    def _find_unpublished(self) -> None:
        known = bytes(here | there for here, there in zip(self._dirty, self.layout.pages.held, strict=True))
        with open(self.path, "rb") as image:
            for page in _ones(known):
                image.seek(self.layout.table_offset + page * _PAGE)
                self._unpublished[page] = image.read(_PAGE) != self._page(page)

    def _page(self, page: int) -> bytes:
        if not self._whole[page] and not self._dirty[page]:
            return bytes(_PAGE)
        return self._table[page * PAGE_CLUSTERS : (page + 1) * PAGE_CLUSTERS].tobytes()

    # -- what is held -------------------------------------------------------------------------------------

    def word(self, cluster: int) -> int:
        """The state word of a cluster, to be tested with DATA_MASK and ZERO_MASK."""
        return self._all[2 * cluster + 1] if self._dirty[cluster // PAGE_CLUSTERS] else 0

    def held(self, start: int, stop: int) -> Iterator[tuple[int, int, Held]]:
        """Runs of blocks [start, stop) in the same state, as (start, stop, state); block numbers."""
        run_start, run_state = start, None
        for at, upto, state in self._pieces(start, stop):
            if state is not run_state:
                if run_state is not None:
                    yield run_start, at, run_state
                run_start, run_state = at, state
            if upto == stop:
                yield run_start, stop, state

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Held]]:
        while start < stop:
            cluster, first = divmod(start, BLOCKS_PER_CLUSTER)
            last = min(BLOCKS_PER_CLUSTER, first + stop - start)
            word = self._all[2 * cluster + 1] if self._dirty[cluster // PAGE_CLUSTERS] else 0
            data, zero = DATA_MASK[first][last], ZERO_MASK[first][last]
            upto = start + last - first
            if not word & (data | zero):
                yield start, upto, NOTHING
            elif word & data == data:
                yield start, upto, DATA
            elif word & zero == zero:
                yield start, upto, ZERO
            else:
                for block in range(first, last):
                    if word & DATA_MASK[block][block + 1]:
                        state = DATA
                    elif word & ZERO_MASK[block][block + 1]:
                        state = ZERO
                    else:
                        state = NOTHING
                    yield start, start + 1, state
                    start += 1
            start = upto

    def holds_any(self, start: int, stop: int) -> bool:
        """Whether any of the blocks [start, stop) is held."""
        return any(state is not NOTHING for _, _, state in self._pieces(start, stop))

    def holds_all(self, start: int, stop: int) -> bool:
        """Whether every one of the blocks [start, stop) is held."""
        return all(state is not NOTHING for _, _, state in self._pieces(start, stop))

    # -- changes -------------------------------------------------------------------------------------------

    def mark(self, start: int, stop: int, state: Held) -> None:
        """Set the state of blocks [start, stop)."""
        page = start // _PAGE_BLOCKS
        if state is not NOTHING and (not self._whole[page] or stop > (page + 1) * _PAGE_BLOCKS):
            self._make_whole(start, stop)
        with self._words:
            self._mark_locked(start, stop, state)

    def mark_each(self, ranges: Sequence[tuple[int, int]], state: Held) -> None:
        """As `mark`, for many ranges of blocks."""
        for start, stop in ranges:
            self._make_whole(start, stop)
        with self._words:
            for start, stop in ranges:
                self._mark_locked(start, stop, state)

    def _make_whole(self, start: int, stop: int) -> None:
        """Have the words of blocks [start, stop) ready for a change. LayerError where that takes room, and there is
        none."""
        for page in range(start // _PAGE_BLOCKS, (stop - 1) // _PAGE_BLOCKS + 1):
            if not self._whole[page]:
                self._complete(page)

    def _complete(self, page: int) -> None:
        deadline = time.monotonic() + _ROOM_S
        while True:
            try:
                with self._words:
                    if not self._whole[page]:
                        if self.power:
                            # Before there is anything to publish, which may not fail for want of room.
                            complete_in_image(self._fd, self.layout, page)
                        self._mapped.complete(page)
                return
            except OSError as error:
                failure = DiskError.from_os(f"writing the allocation bits of {self.path}", error)
            if not failure.full or time.monotonic() >= deadline or not self.relieve():
                layer = Layer.ACTIVE if self.role == "active" else Layer.HIDDEN
                raise LayerError(failure, layer, "write", page * _PAGE_BLOCKS * BLOCK, 0) from failure

    def _mark_locked(self, start: int, stop: int, state: Held) -> None:
        while start < stop:
            cluster, first = divmod(start, BLOCKS_PER_CLUSTER)
            last = first + stop - start
            if last > BLOCKS_PER_CLUSTER:
                last = BLOCKS_PER_CLUSTER
            data, zero = DATA_MASK[first][last], ZERO_MASK[first][last]
            some = data | zero
            page = cluster // PAGE_CLUSTERS
            old = self._all[2 * cluster + 1] if self._dirty[page] else 0
            new = (old | some) ^ (zero if state is DATA else data if state is ZERO else some)
            if new != old:
                if not self._in_place:
                    self._keep(2 * cluster + 1, new.to_bytes(8, sys.byteorder), start * BLOCK)
                # The word first: a page that is not dirty is known to hold nothing.
                self._all[2 * cluster + 1] = new
                self._dirty[page] = self._unpublished[page] = 1
                if old & some:
                    self.allocated_blocks += new.bit_count() - old.bit_count()
                    self.data_blocks += (new & DATA_BITS).bit_count() - (old & DATA_BITS).bit_count()
                else:  # the first write to a block is what happens most often: that takes half the time
                    self.allocated_blocks += last - first
                    if state is DATA:
                        self.data_blocks += last - first
            start += last - first

    def _keep(self, word: int, words: bytes, offset: int) -> None:
        """Write words, from number `word` on, to their file, before they are stored. LayerError."""
        failure = self._unkept
        if failure is None:
            try:
                self._mapped.file.keep(8 * word, words)
            except OSError as error:
                failure = DiskError.from_os(f"writing the allocation bits of {self.path}", error)
        if failure is not None:
            layer = Layer.ACTIVE if self.role == "active" else Layer.HIDDEN
            raise LayerError(failure, layer, "write", offset, 0) from failure

    def forget(self, start: int, stop: int) -> None:
        """Let go of blocks [start, stop) (commit). The caller holds their range: nobody writes them now; readers
        may still be reading the data, so it stays where it is."""
        if stop >= self.blocks:
            # QEMU, zeroing up to the disk's end, marks its last cluster to the end.
            stop = -(-stop // BLOCKS_PER_CLUSTER) * BLOCKS_PER_CLUSTER
        self.mark(start, stop, NOTHING)

    def forget_chosen(self, first: int, chosen: npt.NDArray[np.bool_]) -> None:
        """`forget` for those of the clusters' blocks, from cluster `first` on, that are chosen: a megabyte in 15 us,
        whatever the pattern, instead of 5 us for one run and 200 for many. Each word is one store here, too."""
        # Bytes as in the file: blocks 24..31 first, and the same for data and for zeroes.
        half = np.packbits(chosen.reshape(-1, 4, 8), axis=2, bitorder="little").reshape(-1, 4)[:, ::-1]
        masks = np.concatenate((half, half), axis=1).view(np.uint64).reshape(-1)
        last = first + len(masks)
        pages = range(first // PAGE_CLUSTERS, (last - 1) // PAGE_CLUSTERS + 1)
        if not any(self._dirty[page] for page in pages):
            return
        # What is stored, be it nothing new, may not be into a hole.
        self._make_whole(first * BLOCKS_PER_CLUSTER, last * BLOCKS_PER_CLUSTER)
        with self._words:
            if not self._in_place:
                # Before there is a view of the mapping, which a failure, for as long as somebody keeps it, would keep.
                rows = self._table[first:last].copy()
                rows[:, 1] &= ~masks
                self._keep(2 * first, rows.tobytes(), first * CLUSTER)
            words = self._table[first:last, 1]
            gone = words & masks
            if not gone.any():
                return
            self.allocated_blocks -= _count_bits(gone)
            self.data_blocks -= _count_bits(gone & np.uint64(DATA_BITS))
            words &= ~masks
            for page in pages:
                self._unpublished[page] = 1

    def empty(self) -> None:
        """Let go of all blocks. The caller has closed the gate. Time goes with the pages that hold bits, not with
        the data, which `reclaim` gives back afterwards."""
        self._let_outgrown_go()
        with self._words:
            self._unkept = None
            for first, last in self._dirty_runs():
                if not self._in_place:
                    for page in range(first, last):
                        self._empty_page(page)
                self._table[first * PAGE_CLUSTERS : last * PAGE_CLUSTERS, 1] = 0
                self._unpublished[first:last] = b"\1" * (last - first)
            self._dirty[:] = bytes(len(self._dirty))
            self.allocated_blocks = self.data_blocks = 0

    def _empty_page(self, page: int) -> None:
        rows = self._table[page * PAGE_CLUSTERS : (page + 1) * PAGE_CLUSTERS].copy()
        rows[:, 1] = 0
        try:
            self._mapped.file.keep(page * _PAGE, rows.tobytes())
        except OSError as error:
            self._unkept = DiskError.from_os(f"writing the allocation bits of {self.path}", error)

    def refuse(self, failure: DiskError) -> None:
        """Nothing may be marked any more, until it is emptied: the next process may not find it."""
        self._unkept = failure

    def check_emptied(self) -> None:
        """DiskError when the file still holds what was emptied, which takes a copy of the file made since `check`, and
        no room. The next process finds the checkpoint unfinished, and empties it again."""
        if self._unkept is not None:
            raise self._unkept.again()

    def dirty_pages(self) -> Iterator[int]:
        """Pages (of PAGE_CLUSTERS clusters) that may hold bits."""
        return _ones(self._dirty)

    def _dirty_runs(self) -> Iterator[tuple[int, int]]:
        """The same as runs (first, last) of at most _RUN_MAX."""
        page = self._dirty.find(1)
        while page >= 0:
            last = self._dirty.find(0, page, page + _RUN_MAX)
            last = min(page + _RUN_MAX, len(self._dirty)) if last < 0 else last
            yield page, last
            page = self._dirty.find(1, last)

    @property
    def blocks(self) -> int:
        """Number of blocks, the last possibly short."""
        return -(-self.layout.size // BLOCK)

    @property
    def bytes_held(self) -> int:
        """Bytes of blocks held, rounded up to whole blocks."""
        return self.allocated_blocks * BLOCK

    def blocks_of(self, page: int) -> npt.NDArray[np.uint8]:
        """For every block of a page (of PAGE_CLUSTERS clusters) whether it is held, 1 or 0; in ascending order, but for
        the eight blocks of a quarter of a cluster among themselves."""
        words = self._words_of(page, page + 1) if self._dirty[page] else self._no_words(page)
        # Bytes as in the file: the zero half, then the data half, each from blocks 24..31 down to blocks 0..7.
        halves = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 2, 4)
        return np.unpackbits((halves[:, 0] | halves[:, 1])[:, ::-1])

    def states(self, first: int, last: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """For every block of clusters [first, last), ascending, whether it is held as data, and whether as zeroes: 1 or
        0."""
        words = np.zeros(last - first, np.uint64)
        for page in range(first // PAGE_CLUSTERS, (last - 1) // PAGE_CLUSTERS + 1):
            if self._dirty[page]:
                start, stop = max(first, page * PAGE_CLUSTERS), min(last, (page + 1) * PAGE_CLUSTERS)
                words[start - first : stop - first] = self._table[start:stop, 1]
        return states_in(words)

    def pages(self) -> dict[int, bytes]:
        """The table, of each page that may hold bits, as it is now: for each cluster 16 bytes, of which the second half
        is its word. The caller has closed the gate."""
        return {page: self._page(page) for page in self.dirty_pages()}

    def _words_of(self, first: int, last: int) -> npt.NDArray[np.uint64]:
        """Of dirty pages [first, last)."""
        # The words behind the last cluster are of no use, whatever is in them.
        end = min(last * PAGE_CLUSTERS, -(-self.blocks // BLOCKS_PER_CLUSTER))
        return self._table[first * PAGE_CLUSTERS : end, 1]

    def _no_words(self, page: int) -> npt.NDArray[np.uint64]:
        clusters = -(-self.blocks // BLOCKS_PER_CLUSTER) - page * PAGE_CLUSTERS
        return np.zeros(max(0, min(PAGE_CLUSTERS, clusters)), np.uint64)

    # -- space ---------------------------------------------------------------------------------------------

    @property
    def stale_bytes(self) -> int:
        """Space in the data file beyond what is held as data; on some file systems only roughly."""
        return max(0, self.data.status().st_blocks * 512 - self.data_blocks * BLOCK)

    def stale_ranges(self) -> Iterator[tuple[int, int]]:
        """Block ranges whose space is taken in the data file; `reclaim` finds out which of it is of use."""
        at = 0
        while at < self.layout.size:
            for extent in self.data.extents(at, self.layout.size - at):
                at = extent.offset + extent.length
                if not extent.zero:
                    first = extent.offset // BLOCK
                    last = -(-at // BLOCK)
                    step = _EMPTIED_BEHIND // BLOCK
                    for start in range(first, last, step):
                        yield start, min(start + step, last)

    def reclaim(self, start: int, stop: int) -> int:
        """Give back the space of what is not data in blocks [start, stop); bytes given back. The caller holds the
        range, so that no write is between its data and its bit."""
        freed = 0
        for first, last, state in self.held(start, stop):
            if state is not DATA:
                self.data.discard(first * BLOCK, (last - first) * BLOCK)
                freed += (last - first) * BLOCK
        return freed

    def check(self) -> None:
        """DiskError when the image or its data is no longer the file that was opened, or when its bits have no room to
        be emptied."""
        self._check_files()
        try:
            self._mapped.file.own_blocks()
            if not self._in_place:
                for page in self.dirty_pages():
                    with self._words:  # else what is marked meanwhile would be overwritten in the file
                        self._mapped.file.keep(page * _PAGE, self._page(page))
        except OSError as error:
            raise DiskError.from_os(f"writing the allocation bits of {self.path}", error) from error

    def _check_files(self) -> None:
        status = os.fstat(self._fd)
        if status.st_size < self.layout.table_offset + self.layout.table_length:
            raise DiskError(f"{self.path} was truncated while in use")
        if not status.st_nlink:
            raise DiskError(f"{self.path} was removed while in use")
        try:
            at = self.path
            files.check_there(self._fd, at)
            if self.power:
                at = live_path(self.path)
                self._mapped.file.check(at)
        except OSError as error:
            raise DiskError(f"{at} was removed or replaced while in use") from error
        self.data.check_there()

    # -- growth --------------------------------------------------------------------------------------------

    def prepare_growth(self, size: int) -> None:
        """Make a larger image, for a disk of `size` bytes, beside this one, which stays what counts; `grow` or
        `drop_growth` is to follow. Takes as long as qemu-img does. ConfigError, with nothing changed."""
        path = self.path + qcow2.GROWN
        self._let_outgrown_go()
        try:
            remove_live(path)
            qcow2.create_larger(path, self.layout, "raw" if self.role == "hidden" else "qcow2", size)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                layout = qcow2.open_layout(fd, path)
                mapped = (live_table if self.power else image_table)(fd, path, layout)
            except BaseException:
                os.close(fd)
                raise
            self._larger = _Larger(path, fd, layout, mapped)
            if self.data.room() < layout.size:
                os.ftruncate(self.data.fileno(), layout.size)
        except (OSError, DiskError) as error:
            self.drop_growth()
            raise ConfigError(f"cannot make {path}: {error}") from error
        except BaseException:
            self.drop_growth()
            raise

    def copy_words(self, ahead: bool = False) -> None:
        """Have the larger image hold what this one does, on stable storage where that counts. The gate is closed; but
        before that once `ahead`, while words are changed, which takes what is long: then only what has changed since is
        left to be copied. DiskError."""
        larger = self._larger
        assert larger is not None
        if self.power and not ahead:
            self.settle()  # what the image says from the first moment on must be true
        changed = ahead
        try:
            for page in self.dirty_pages():
                changed |= self._copy_page(larger, page)
            if changed and (ahead or self.power):
                larger.mapped.flush()
                files.fdatasync(larger.fd)
        except OSError as error:
            raise DiskError.from_os(f"writing the allocation bits of {larger.path}", error) from error

    def _copy_page(self, larger: _Larger, page: int) -> bool:
        """Whether there was anything to copy; OSError."""
        first = page * PAGE_CLUSTERS
        words = self._table[first : first + PAGE_CLUSTERS, 1].copy()
        last, within = divmod(self.blocks, BLOCKS_PER_CLUSTER)
        # What is marked behind the former end (QEMU does that) is of blocks that come to be only now.
        if within and first <= last < first + PAGE_CLUSTERS:
            words[last - first] &= np.uint64(DATA_MASK[0][within] | ZERO_MASK[0][within])
        words[max(0, last + (within > 0) - first) :] = 0
        mapped = larger.mapped
        if mapped.held[page] and bool(np.array_equal(mapped.grid[first : first + PAGE_CLUSTERS, 1], words)):
            return False
        if self.power:
            complete_in_image(larger.fd, larger.layout, page)
        if not mapped.whole[page]:
            mapped.complete(page)
        rows = mapped.grid[first : first + PAGE_CLUSTERS].copy()
        rows[:, 1] = words
        content = rows.tobytes()
        mapped.file.put(page * _PAGE, content)
        mapped.held[page] = 1
        if self.power and not files.write_all(larger.fd, content, larger.layout.table_offset + page * _PAGE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True

    def grow(self) -> None:
        """The larger image takes the place of this one. The gate is closed, and nothing has changed since `copy_words`.
        DiskError: this process goes on in the larger one, and the next one may find the former."""
        larger = self._larger
        assert larger is not None
        failure: OSError | None = None
        try:
            # The live copy goes first: it fits no other image than its own, and each of the two images has all words.
            remove_live(self.path)
            os.rename(larger.path, self.path)
            files.sync_folder(self.path)
            if self.power:
                os.rename(live_path(larger.path), live_path(self.path))
        except OSError as error:
            failure = error
        with self._words:
            self._outgrown.append((self._fd, self._mapped))
            dirty = bytearray(len(larger.mapped.held))
            dirty[: len(self._dirty)] = self._dirty
            self._fd, self.layout, self._mapped = larger.fd, larger.layout, larger.mapped
            self._all, self._table = larger.mapped.words, larger.mapped.grid
            self._in_place = larger.mapped.file.in_place
            self._dirty, self._whole = dirty, larger.mapped.whole
            self._unpublished = bytearray(len(dirty))
            self._count()
            self.watch_at = 0
        self.data.size = larger.layout.size
        self._larger = None
        if failure is not None:
            self.misplaced = True
            raise DiskError.from_os(f"renaming {larger.path}", failure) from failure

    def _let_outgrown_go(self) -> None:
        """The files that were in use before it has grown, with their memory. Long after that: no thread looks at them
        any more."""
        outgrown, self._outgrown = self._outgrown, []
        for fd, mapped in outgrown:
            with contextlib.suppress(BufferError):
                mapped.close()
            os.close(fd)

    def drop_growth(self) -> None:
        """Nothing comes of it."""
        larger, self._larger = self._larger, None
        if larger is not None:
            larger.mapped.close()
            os.close(larger.fd)
        for name in (self.path + qcow2.GROWN, live_path(self.path + qcow2.GROWN)):
            with contextlib.suppress(OSError):
                os.unlink(name)

    # -- stable storage ------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Make data, then bits, stable (durability=process: as far as that goes, see table.py)."""
        self.data.flush()
        try:
            self._mapped.flush()
        except OSError as error:
            raise DiskError.from_os(f"flushing {self.path}", error) from error

    def unpublished(self) -> Words:
        """The words that the image does not have, as they are now. The caller makes stable what they say, then calls
        `publish`; when that fails nothing may be published any more."""
        with self._words:
            pages: list[int] = []
            page = self._unpublished.find(1)
            while page >= 0:
                self._unpublished[page] = 0
                pages.append(page)
                page = self._unpublished.find(1, page + 1)
            return [(page, self._page(page)) for page in pages]

    def publish(self, words: Words) -> None:
        """Put words into the image, on stable storage."""
        if not words:
            return
        try:
            for page, content in words:
                if not files.write_all(self._fd, content, self.layout.table_offset + page * _PAGE):
                    raise DiskError(f"{self.path} takes no more data", errno.ENOSPC)
            files.fdatasync(self._fd)
        except OSError as error:
            raise DiskError.from_os(f"writing the allocation bits of {self.path}", error) from error

    def settle(self) -> None:
        """Make stable all there is, also what a process with durability=process has written: its words are in the image
        already, though perhaps only in memory."""
        words = self.unpublished()
        self.data.flush()
        self.publish(words)
        try:
            files.fdatasync(self._fd)
        except OSError as error:
            raise DiskError.from_os(f"flushing {self.path}", error) from error

    def close(self) -> None:
        """Let go of the files; no other method may be called after it."""
        if self._fd >= 0:
            self.data.close()
            self._unmap()

    def _unmap(self) -> None:
        self._table = np.empty((0, 2), np.uint64)  # a mapping with a view of it cannot be closed
        self._mapped.close()
        os.close(self._fd)
        self._fd = -1
        self._let_outgrown_go()
