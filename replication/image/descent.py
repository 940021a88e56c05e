# SPDX-License-Identifier: BSD-3-Clause
"""The way down of what active and hidden hold into the secondary disk, after failover: portion by portion.

commit.py decides who takes which portion, and when it is over. Who decides when a portion meets a guest request stands
in stack.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from replication.disk.face import Disk
from replication.disk.file import FileDisk
from replication.errors import DiskError
from replication.image.buffers import Buffers
from replication.image.layer import Layer, LayerError, Source, on_layer
from replication.image.overlay import DATA_BITS, PAGE_CLUSTERS, Held, Overlay
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, CLUSTER
from replication.image.target import COPY_CHUNK
from replication.order.pause import pause
from replication.order.rangelock import RangeLock

PORTION_MIN = 8
PORTION_MAX = 64
PORTION_BLOCKS = 128
"""What is committed under one range lock: PORTION_MIN clusters of the disk (1 MiB), or up to PORTION_MAX when no more
than PORTION_BLOCKS blocks of them are held (then looking for blocks costs more than copying them). A guest write to a
block that is held waits for it: 0.4 ms, for 128 single blocks 1 ms."""

_SOURCES = (Source.DISK, Source.ACTIVE, Source.HIDDEN, Source.ZERO)
_ACTIVE, _HIDDEN, _ZERO = np.arange(1, len(_SOURCES), dtype=np.uint8)
"""Sources in arrays: their places in _SOURCES."""


class Descent:
    """What the overlays of one disk hold, and how it comes down."""

    def __init__(
        self,
        active: Overlay,
        hidden: Overlay,
        disk: Disk,
        top: RangeLock,
        read: Callable[[memoryview, int, Source], None],
        spare: Buffers,
    ) -> None:
        """`top` orders this and the guest's writes, over whole blocks. `read` reads from one of the sources."""
        self._active = active
        self._hidden = hidden
        self._disk = disk
        self._size = disk.size
        self._top = top
        self._read = read
        self._spare = spare
        # Held by the one thread that commits many short runs, across their I/O; taken before `top`. There it is Python
        # that takes the time, so two threads would only wait for each other: 64 MiB in single blocks took 0.2 s
        # instead of 0.13.
        self._many = threading.Lock()
        # Whether the disk can share blocks of an overlay; None: not tried yet. After a failure all is copied.
        self._shares: dict[Source, bool | None] = {Source.ACTIVE: None, Source.HIDDEN: None}

    def commit(self, first: int, last: int) -> int:
        """Bring blocks [first, last) down into the disk and let go of them; bytes written. Only what is held is locked:
        a guest write between has nothing to wait for. Several threads may do this, each for blocks of its own."""
        source = self._only_source(first, last)
        if source is not None:
            if self._shares[source]:
                # What sharing would wait for, with the range and both files locked.
                self._data_of(source).write_back(first * BLOCK, (last - first) * BLOCK)
            held = self._top.acquire(first * BLOCK, last * BLOCK)
            try:
                pause("commit.locked")
                if self._only_source(first, last) is source:
                    return self._commit_whole(first, last, source)
            finally:
                self._top.release(held)
        with self._many:
            return self._commit_runs(first, last)

    def _only_source(self, first: int, last: int) -> Source | None:
        """From where all of the blocks are read, if they are whole clusters and all in the one or the other overlay,
        else None. After a large write that takes 2 us, the general case 60."""
        if first % BLOCKS_PER_CLUSTER or last % BLOCKS_PER_CLUSTER:
            return None
        start, stop = first // BLOCKS_PER_CLUSTER, last // BLOCKS_PER_CLUSTER
        word = self._active.word(start)
        if word in (0, DATA_BITS) and all(self._active.word(cluster) == word for cluster in range(start + 1, stop)):
            if word:
                return Source.ACTIVE
            if all(self._hidden.word(cluster) == DATA_BITS for cluster in range(start, stop)):
                return Source.HIDDEN
        return None

    def _commit_whole(self, first: int, last: int, source: Source) -> int:
        """Bring down and let go of blocks that all have this source. `top` is held."""
        start, stop = first * BLOCK, min(last * BLOCK, self._size)
        with on_layer(Layer.SECONDARY, "commit", start, stop - start):
            if not self._share(start, stop, source):
                self._bring_down(start, stop, source)
        pause("commit.written")
        self._hidden.forget(first, last)
        pause("commit.hidden-forgotten")
        self._active.forget(first, last)
        return stop - start

    def _share(self, start: int, stop: int, source: Source) -> bool:
        """Let the disk share an overlay's clusters, on file systems with reflinks; whether that was possible. 1 GiB of
        XFS that the kernel has written out: 0.1 s instead of 1.0; that it has not: 0.9. Only what is long: each piece
        is an extent of its own in the disk's file from then on."""
        if self._shares[source] is False or stop % CLUSTER:
            return False
        self._shares[source] = shared = self._disk.share(self._data_of(source), start, stop - start)
        return shared

    def _data_of(self, source: Source) -> FileDisk:
        return (self._active if source is Source.ACTIVE else self._hidden).data

    def _commit_runs(self, first: int, last: int) -> int:
        """Bring down and let go of what is held of the blocks, in as many runs as it takes."""
        chosen = self._sources(first, last) != 0
        spans = [((first + start) * BLOCK, (first + stop) * BLOCK) for start, stop, held in _runs(chosen) if held]
        if not spans:
            self._let_go(first, last, chosen)
            return 0
        at = end = written = 0
        held = self._top.acquire_all(spans)
        try:
            pause("commit.locked")
            # Once more: some of it may have been let go, and what has come up elsewhere meanwhile is not locked.
            for start, stop, source in _runs(np.where(chosen, self._sources(first, last), 0)):
                if source:
                    at, end = (first + start) * BLOCK, min((first + stop) * BLOCK, self._size)
                    self._bring_down(at, end, _SOURCES[source])
                    written += end - at
            pause("commit.written")
            self._let_go(first, last, chosen)
        except LayerError:
            raise
        except DiskError as error:
            raise LayerError(error, Layer.SECONDARY, "commit", at, end - at) from error
        finally:
            self._top.release(held)
        return written

    def _let_go(self, first: int, last: int, chosen: npt.NDArray[np.bool_]) -> None:
        """Let go of those of the blocks [first, last) that are chosen."""
        begin, end = first // BLOCKS_PER_CLUSTER, -(-last // BLOCKS_PER_CLUSTER)
        gone = np.zeros((end - begin) * BLOCKS_PER_CLUSTER, np.bool_)
        first -= begin * BLOCKS_PER_CLUSTER
        gone[first : first + len(chosen)] = chosen
        if last >= self._active.blocks:
            gone[first + len(chosen) :] = True  # as in Overlay.forget
        self._hidden.forget_chosen(begin, gone)
        pause("commit.hidden-forgotten")
        self._active.forget_chosen(begin, gone)

    def _sources(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        """For every block where it is read from, as its place in _SOURCES. As Stack._visible, for many short runs in a
        tenth of the time (1 us a run)."""
        start, stop = first // BLOCKS_PER_CLUSTER, -(-last // BLOCKS_PER_CLUSTER)
        active_data, active_zero = self._active.states(start, stop)
        hidden_data, hidden_zero = self._hidden.states(start, stop)
        sources = np.where(
            active_data | active_zero,
            np.where(active_data, _ACTIVE, _ZERO),
            np.where(hidden_data, _HIDDEN, hidden_zero * _ZERO),
        )
        start *= BLOCKS_PER_CLUSTER
        return sources[first - start : last - start]

    def _bring_down(self, start: int, stop: int, source: Source) -> None:
        if source is Source.ZERO:
            self._disk.zero(start, stop - start, may_trim=True)
            return
        for at in range(start, stop, COPY_CHUNK):
            data = self._spare.take(min(COPY_CHUNK, stop - at))
            self._read(data, at, source)
            self._disk.write([data], at)
            self._spare.give(data)

    def portions(self) -> Iterator[tuple[int, int]]:
        """Block ranges of which active or hidden holds something, for `commit`, in whole clusters and ascending. A
        guest write waits for one: with more than PORTION_BLOCKS blocks that are held it is not longer than PORTION_MIN
        clusters."""
        for page in sorted({*self._active.dirty_pages(), *self._hidden.dirty_pages()}):
            blocks = self._active.blocks_of(page) | self._hidden.blocks_of(page)
            held = blocks.reshape(-1, BLOCKS_PER_CLUSTER).sum(axis=1)
            before = [0, *np.cumsum(held).tolist()]
            start = page * PAGE_CLUSTERS
            for at in range(0, len(held), PORTION_MAX):
                for first, last in _split(before, at, min(at + PORTION_MAX, len(held))):
                    stop = min((start + last) * BLOCKS_PER_CLUSTER, self._active.blocks)
                    yield (start + first) * BLOCKS_PER_CLUSTER, stop

    def held_grains(self, grain: int) -> Iterator[tuple[int, int]]:
        """Ranges in bytes, in whole grains (of 32, 64 or 128 KiB), of which active or hidden
        holds something."""
        for page in sorted({*self._active.dirty_pages(), *self._hidden.dirty_pages()}):
            blocks = self._active.blocks_of(page) | self._hidden.blocks_of(page)
            held = np.flatnonzero(blocks.reshape(-1, grain // BLOCK).any(axis=1))
            start = page * PAGE_CLUSTERS * BLOCKS_PER_CLUSTER * BLOCK
            for run in np.split(held, np.flatnonzero(np.diff(held) != 1) + 1):
                if len(run):
                    offset = start + int(run[0]) * grain
                    yield offset, min(len(run) * grain, self._size - offset)

    def held_bytes(self) -> int:
        """Bytes of the blocks that active or hidden holds."""
        pages = {*self._active.dirty_pages(), *self._hidden.dirty_pages()}
        held = sum(int((self._active.blocks_of(page) | self._hidden.blocks_of(page)).sum()) for page in pages) * BLOCK
        last = self._active.blocks - 1
        short = (last + 1) * BLOCK - self._size
        return held - short if self._held_at_all(last) else held

    def _held_at_all(self, block: int) -> bool:
        return any(
            state is not Held.NOTHING
            for overlay in (self._active, self._hidden)
            for _, _, state in overlay.held(block, block + 1)
        )


def _split(before: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Portions of clusters [first, last); `before[k]` is the number of blocks held before cluster k."""
    held = before[last] - before[first]
    if held > PORTION_BLOCKS and last - first > PORTION_MIN:
        middle = (first + last) // 2
        yield from _split(before, first, middle)
        yield from _split(before, middle, last)
    elif held:
        yield first, last


def _runs(values: npt.NDArray[np.generic]) -> Iterator[tuple[int, int, int]]:
    """Runs of the same value: start, stop, value."""
    starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()]
    return zip(starts, [*starts[1:], len(values)], values[starts].tolist(), strict=True)
