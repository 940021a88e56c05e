# SPDX-License-Identifier: BSD-3-Clause
"""The way down of what active and hidden hold into the secondary disk, after failover: portion by portion.

commit.py decides who takes which portion, and when it is over. Who decides when a portion meets a guest request stands
in stack.py.

What becomes of one block
    held        by an overlay; the disk may be older
    down        still held, and the disk has the same; a guest's write goes to both. After a kill it counts as held
    let go      a flush that was sent after the block was down has succeeded, and nobody has written it since: the disk
                alone has it

    held --commit--> down --flush, let_go--> let go
    down --the disk has refused a guest's write (`spoilt`)--> held
    let go --a guest's write--> down (its copy in active stays until the next flush)

So whatever a flush that fails has lost is in the overlays, and the next commit brings it down again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from replication.disk.face import Disk
from replication.disk.file import FileDisk
from replication.errors import DiskError
from replication.image.buffers import Buffers
from replication.image.layer import Layer, LayerError, Source, on_layer
from replication.image.overlay import DATA_BITS, Held, Overlay
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, CLUSTER, PAGE_CLUSTERS
from replication.image.target import COPY_CHUNK
from replication.order.latency import COMMIT
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
        # Portions that came down since the last flush. Protected by `_counting`, which is not held across I/O.
        self._counting = threading.Lock()
        self._down: list[tuple[int, int]] = []
        # By cluster: the guest has written it since the latest flush was sent; the disk lacks such a write. Empty until
        # the first commit. One store each, under the range of the block.
        self._written = bytearray()
        self._spoilt = bytearray()

    def grow(self, size: int) -> None:
        """The disk has `size` bytes. The gate is closed, and there is no commit."""
        self._size = size

    def begin(self) -> None:
        """A commit is going to go over everything that is held. The gate is closed."""
        clusters = -(-self._size // CLUSTER)
        with self._counting:
            self._down.clear()
        self._written = bytearray(clusters)
        self._spoilt = bytearray(clusters)

    def begin_flush(self) -> None:
        """A flush of the disk is about to be sent: it covers what is down by now."""
        self._written = bytearray(len(self._written))

    def written(self, start: int, stop: int) -> None:
        """The guest has written bytes [start, stop), to active or the disk or both. `top` is held."""
        # Behind the write, so that it counts for a flush that was sent meanwhile.
        written = self._written
        for cluster in range(start // CLUSTER, -(-stop // CLUSTER)) if written else ():
            written[cluster] = 1

    def spoilt(self, start: int, stop: int) -> None:
        """The disk may lack such a write, which is held, so it has to come down again. `top` is held."""
        spoilt = self._spoilt
        for cluster in range(start // CLUSTER, -(-stop // CLUSTER)) if spoilt else ():
            spoilt[cluster] = 1

    @property
    def whole(self) -> bool:
        """Whether nothing that came down, or that a guest wrote afterwards, has to come down again."""
        return 1 not in self._spoilt

    def let_go(self) -> None:
        """The flush has succeeded: let go of what was down when it was sent, and was not written since."""
        with self._counting:
            portions, self._down = self._down, []
        while portions:
            first, last = portions.pop()
            start, stop = first // BLOCKS_PER_CLUSTER, -(-last // BLOCKS_PER_CLUSTER)
            held = self._top.acquire(first * BLOCK, last * BLOCK, COMMIT)
            try:
                if 1 in self._written[start:stop] or 1 in self._spoilt[start:stop]:
                    kept = np.frombuffer(bytes(self._written[start:stop]), np.uint8) > 0
                    kept |= np.frombuffer(bytes(self._spoilt[start:stop]), np.uint8) > 0
                    gone = np.repeat(~kept, BLOCKS_PER_CLUSTER)
                    gone[: first - start * BLOCKS_PER_CLUSTER] = False
                    if last < self._active.blocks:  # else to the end of the cluster, as in Overlay.forget
                        gone[last - start * BLOCKS_PER_CLUSTER :] = False
                    self._hidden.forget_chosen(start, gone)
                    pause("commit.hidden-forgotten")
                    self._active.forget_chosen(start, gone)
                else:
                    self._hidden.forget(first, last)
                    pause("commit.hidden-forgotten")
                    self._active.forget(first, last)
            finally:
                self._top.release(held)

    def commit(self, first: int, last: int) -> int:
        """Bring blocks [first, last) down into the disk; bytes written. Only what is held is locked: a guest write
        between has nothing to wait for. Several threads may do this, each for blocks of its own."""
        if self._spoilt:
            # Before anything is looked at: a guest's write that is spoilt from here on comes down once more.
            start, stop = first // BLOCKS_PER_CLUSTER, -(-last // BLOCKS_PER_CLUSTER)
            self._spoilt[start:stop] = bytes(stop - start)
        written = self._commit(first, last)
        with self._counting:
            self._down.append((first, last))
        return written

    def _commit(self, first: int, last: int) -> int:
        source = self._only_source(first, last)
        if source is not None:
            if self._shares[source]:
                # What sharing would wait for, with the range and both files locked.
                self._data_of(source).write_back(first * BLOCK, (last - first) * BLOCK)
            held = self._top.acquire(first * BLOCK, last * BLOCK, COMMIT)
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
        """Bring down blocks that all have this source. `top` is held."""
        start, stop = first * BLOCK, min(last * BLOCK, self._size)
        with on_layer(Layer.SECONDARY, "commit", start, stop - start):
            if not self._share(start, stop, source):
                self._bring_down(start, stop, source)
        pause("commit.written")
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
        """Bring down what is held of the blocks, in as many runs as it takes."""
        chosen = self._sources(first, last) != 0
        spans = [((first + start) * BLOCK, (first + stop) * BLOCK) for start, stop, held in _runs(chosen) if held]
        if not spans:
            return 0
        at = end = written = 0
        held = self._top.acquire_all(spans, COMMIT)
        try:
            pause("commit.locked")
            # Once more: some of it may be held no longer, and what has come up elsewhere meanwhile is not locked.
            for start, stop, source in _runs(np.where(chosen, self._sources(first, last), 0)):
                if source:
                    at, end = (first + start) * BLOCK, min((first + stop) * BLOCK, self._size)
                    self._bring_down(at, end, _SOURCES[source])
                    written += end - at
            pause("commit.written")
        except LayerError:
            raise
        except DiskError as error:
            raise LayerError(error, Layer.SECONDARY, "commit", at, end - at) from error
        finally:
            self._top.release(held)
        return written

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
    starts = [0, *cast("list[int]", (np.flatnonzero(values[1:] != values[:-1]) + 1).tolist())]
    return zip(starts, [*starts[1:], len(values)], cast("list[int]", values[starts].tolist()), strict=True)
