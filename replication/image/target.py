# SPDX-License-Identifier: BSD-3-Clause
"""What the primary writes: the secondary disk changes, and what was there goes to hidden first (copy-before-write).

Who decides when two requests meet on one block stands in stack.py, and so does what is stable when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from replication.disk.face import Disk
from replication.disk.files import Buffer
from replication.errors import DiskError
from replication.image.buffers import Buffers
from replication.image.layer import Layer, LayerError, flush_secondary, on_layer
from replication.image.overlay import DATA, DATA_MASK, NOTHING, ZERO, ZERO_MASK, Overlay
from replication.image.plan import Piece, Plan, arrange
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, CLUSTER
from replication.image.room import Room
from replication.image.syncgroup import SyncGroup
from replication.order.pause import pause
from replication.order.rangelock import RangeLock
from replication.record.changes import ChangeMap

COPY_CHUNK = 1 << 20
"""Bytes copied at a time by copy-before-write and commit: what a request holds in memory beside its own data. (Pieces
of 256 or 128 KiB, which stay in a core's cache, are slower for writes of 1M: 1.4k instead of 1.5k a second.)"""

_ZEROES = bytes(COPY_CHUNK)
"""`_ZEROES.startswith(data)` tells in 10 us whether a megabyte is zeroes, and at once when its beginning is not. (To
compare memoryviews takes 800 us: element by element.)"""

_SPARSE_FROM = 64 << 10
"""From this length on a copy asks for holes first; below, reading is cheaper than asking."""


class TargetWrites:
    """The requests of the target face that change the secondary disk."""

    def __init__(
        self, hidden: Overlay, disk: Disk, below: RangeLock, lost: ChangeMap, room: Room, spare: Buffers
    ) -> None:
        """`below` orders these writes, over whole blocks. `lost` notes what the disk lacks of them."""
        self._hidden = hidden
        self._disk = disk
        self._size = disk.size
        self._power = hidden.power
        self._below = below
        self._room = room
        self._spare = spare
        self._hidden_sync = SyncGroup(self._sync_hidden)
        self.lost = lost
        self.preserving = True
        """Set by the node while the gate is closed: False while there is no checkpoint that could be preserved."""

        self.preserved_to = disk.size
        """Behind this byte of a disk that has grown there is nothing to be preserved: no checkpoint has had it."""

    def grow(self, size: int) -> None:
        """The disk has `size` bytes. The gate is closed."""
        self._size = size

    def settle_hidden(self) -> None:
        """With durability=power: make stable what hidden preserves, as a write does. LayerError."""
        with on_layer(Layer.HIDDEN, "sync", 0, 0):
            self._hidden_sync.run()

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        """The primary's write: what it overwrites goes to hidden first."""
        self._overwrite(offset, len(data), self._write_disk, [data], offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """The primary's zeroes or trim, which destroy data like a write."""

        def zero() -> None:
            self._disk.zero(offset, length, may_trim, fua)

        def change() -> None:
            try:
                zero()
            except DiskError as error:
                self._room.change_again(self._disk, zero, "zero", offset, length, error)

        self._overwrite(offset, length, change)

    def write_all(self, pieces: Sequence[Piece]) -> list[tuple[int, DiskError]]:
        """The primary's writes, in their order, as `write` would do them one by one; (index, error) of each that
        failed, ascending.

        For small ones (4 KiB, on tmpfs): 6 us each instead of 9 where they are copied before, 2.4 instead of 4.5 where
        they are not. Everything is preserved before anything is changed, and what is preserved is marked together, so
        with durability=power one sync is enough. Their own order counts only where they overlap: such are done by
        halves.
        """
        if len(pieces) == 1:
            offset, data = pieces[0]
            try:
                self.write(data, offset, False)
            except DiskError as error:
                return [(0, error)]
            return []
        plan = arrange(pieces)
        if plan is None:  # two of them overlap
            half = len(pieces) // 2
            failed = self.write_all(pieces[:half])
            return failed + [(half + index, error) for index, error in self.write_all(pieces[half:])]
        try:
            held = self._below.acquire_all(plan.spans)
        except DiskError as error:
            self._lose_all(pieces)
            return [(index, error) for index in range(len(pieces))]
        try:
            return self._overwrite_all(pieces, plan)
        except BaseException:
            self._lose_all(pieces)
            raise
        finally:
            self._below.release(held)

    def _overwrite_all(self, pieces: Sequence[Piece], plan: Plan) -> list[tuple[int, DiskError]]:
        """Preserve all, then change all; where that fails, once more one by one. `below` is held."""
        alone: list[int] = []
        try:
            if self.preserving:
                end = self.preserved_to
                spans = plan.spans
                if end < self._size:
                    end = -(-end // BLOCK) * BLOCK
                    spans = [(start, min(stop, end)) for start, stop in spans if start < end]
                if spans:
                    self._preserve_all_stably(spans)
            if self._room.tests:
                self._room.keep_disk(plan.spans)
        except DiskError:
            alone.extend(range(len(pieces)))
        else:
            pause("target-write.preserved")
            for run in plan.runs:
                try:
                    self._disk.write(run.data, run.offset)
                except DiskError:
                    alone += run.indexes
                else:
                    if self.lost.missing:
                        self.lost.repaired(run.offset, sum(map(len, run.data)))
            pause("target-write.written")
        failed: list[tuple[int, DiskError]] = []
        for index in sorted(alone):
            offset, data = pieces[index]
            try:
                self._overwrite_held(offset, len(data), self._write_disk, [data], offset, False)
            except DiskError as error:
                failed.append((index, error))
        return failed

    def _lose_all(self, pieces: Sequence[Piece]) -> None:
        for offset, data in pieces:
            self.lost.mark(offset, len(data))

    def _write_disk(self, pieces: Sequence[Buffer], offset: int, fua: bool) -> None:
        try:
            self._disk.write(pieces, offset, fua)
        except DiskError as error:

            def again() -> None:
                self._disk.write(pieces, offset, fua)

            self._room.change_again(self._disk, again, "write", offset, sum(map(len, pieces)), error)

    def _overwrite(self, offset: int, length: int, change: Callable[..., None], *arguments: object) -> None:
        """Preserve, then change the disk by `change(*arguments)`. What fails is noted as lost, and no longer when a
        later write covers it."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        try:
            held = self._below.acquire(first * BLOCK, last * BLOCK)
        except BaseException:
            self.lost.mark(offset, length)
            raise
        try:
            self._overwrite_held(offset, length, change, *arguments)
        finally:
            self._below.release(held)

    def _overwrite_held(self, offset: int, length: int, change: Callable[..., None], *arguments: object) -> None:
        """The same; `below` is held."""
        try:
            if self.preserving:
                end = self.preserved_to
                if end >= self._size:
                    self._preserve_stably(offset, length)
                elif offset < end:
                    self._preserve_stably(offset, min(length, -(-end // BLOCK) * BLOCK - offset))
            if self._room.tests:
                self._room.keep_disk([(offset, offset + length)])
            pause("target-write.preserved")
            change(*arguments)
            pause("target-write.written")
            if self.lost.missing:
                self.lost.repaired(offset, length)
        except BaseException:
            self.lost.mark(offset, length)
            raise

    def _preserve_stably(self, offset: int, length: int) -> None:
        """Preserve, and with durability=power make that stable. What was there before was made stable by whoever put it
        there, or else the group has failed."""
        if self._power:
            self._stably(lambda: self._preserve(offset, length))
        else:
            self._preserve(offset, length)

    def _preserve_all_stably(self, spans: Sequence[tuple[int, int]]) -> None:
        """The same for several ranges, in bytes from start to stop; one sync for all."""
        if self._power:
            self._stably(lambda: self._preserve_all(spans))
        else:
            self._preserve_all(spans)

    def _preserve_all(self, spans: Sequence[tuple[int, int]]) -> bool:
        """Like `_preserve` of each; but short ranges that are all new to hidden are copied one after the other, then
        marked together (with `_preserve` alone 2 us more for each of 4 KiB)."""
        copied = False
        fresh: list[tuple[int, int]] = []
        word = self._hidden.word
        for start, stop in spans:
            cluster = start // CLUSTER
            if (stop - 1) // CLUSTER == cluster:
                first = start % CLUSTER // BLOCK
                last = (stop - 1) % CLUSTER // BLOCK + 1
                data = DATA_MASK[first][last]
                held = word(cluster)
                if held & data == data:
                    continue
                if not held & (data | ZERO_MASK[first][last]) and stop - start < _SPARSE_FROM:
                    fresh.append((start, stop))
                    continue
            copied |= self._preserve(start, stop - start)
        if fresh:
            self._copy_all_to_hidden(fresh)
        return copied or bool(fresh)

    def _copy_all_to_hidden(self, spans: Sequence[tuple[int, int]]) -> None:
        """Copy short ranges in whole blocks; none is marked when one cannot be copied."""
        zeroes: list[tuple[int, int]] = []
        data: list[tuple[int, int]] = []
        room = self._spare.take(_SPARSE_FROM)
        write = self._hidden.data.write
        for start, stop in spans:
            old = room[: (stop if stop < self._size else self._size) - start]
            self._read_old(old, start)
            blocks = start // BLOCK, stop // BLOCK
            if _ZEROES.startswith(old):
                zeroes.append(blocks)
                continue
            if self._room.tests:
                self._room.keep(self._hidden, *blocks)
            try:
                write([old], start)
            except DiskError as error:
                self._room.write_again(self._hidden, Layer.HIDDEN, [old], start, len(old), error)
            data.append(blocks)
        self._spare.give(room)
        pause("copy-before-write.before-mark")
        self._hidden.mark_each(zeroes, ZERO)
        self._hidden.mark_each(data, DATA)
        if self._hidden.data_blocks >= self._hidden.watch_at:
            self._room.grown(self._hidden)

    def _stably(self, preserve: Callable[[], bool]) -> None:
        # In part perhaps, when it fails: the blocks count as preserved from then on, so that must be made stable.
        copied = True
        try:
            copied = preserve()
        finally:
            with on_layer(Layer.HIDDEN, "sync", 0, 0):
                if copied:
                    self._hidden_sync.run()
                else:
                    self._hidden_sync.settle()

    def _sync_hidden(self) -> None:
        words = self._hidden.unpublished()
        self._hidden.data.flush()
        self._hidden.publish(words)

    def _preserve(self, offset: int, length: int) -> bool:
        """Copy what hidden does not hold of the range's blocks from the disk into hidden; whether there was anything.
        `below` is held."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        cluster = first // BLOCKS_PER_CLUSTER
        if (last - 1) // BLOCKS_PER_CLUSTER == cluster:
            # Most writes lie in one cluster and are to blocks that are all new to hidden or all in it: one word decides
            # (that takes 0.4 us, the general case 3).
            low = first % BLOCKS_PER_CLUSTER
            high = low + last - first
            data = DATA_MASK[low][high]
            word = self._hidden.word(cluster)
            if word & data == data:
                return False
            if not word & (data | ZERO_MASK[low][high]):
                self._copy_to_hidden(first * BLOCK, min(last * BLOCK, self._size))
                return True
        copied = False
        for start, stop, held in list(self._hidden.held(first, last)):
            if held is NOTHING:
                self._copy_to_hidden(start * BLOCK, min(stop * BLOCK, self._size))
                copied = True
        return copied

    def _copy_to_hidden(self, start: int, stop: int) -> None:
        at = start
        while at < stop:
            end = min(stop, (at // COPY_CHUNK + 1) * COPY_CHUNK)
            if stop - at >= _SPARSE_FROM:
                hole = at + self._hole(at, stop)
                whole = hole if hole >= stop else hole // BLOCK * BLOCK
                if whole > at:
                    self._hidden.mark(at // BLOCK, -(-whole // BLOCK), ZERO)
                    at = whole
                    continue
            old = self._spare.take(end - at)
            self._copy_piece(old, at)
            self._spare.give(old)
            at = end

    def _copy_piece(self, old: memoryview, at: int) -> None:
        self._read_old(old, at)
        if _ZEROES.startswith(old):
            self._hidden.mark(at // BLOCK, -(-(at + len(old)) // BLOCK), ZERO)
        else:
            self._write_hidden(old, at)

    def _read_old(self, old: memoryview, at: int) -> None:
        """Read what is about to be overwritten."""
        try:
            self._disk.read(old, at)
        except DiskError as error:
            raise LayerError(error, Layer.SECONDARY, "read", at, len(old)) from error
        pause("copy-before-write.read")

    def _hole(self, start: int, stop: int) -> int:
        """How much of the disk from `start` on is known to be zeroes without reading; it is only there to save
        reading."""
        try:
            return self._disk.hole(start, stop - start)
        except DiskError:
            return 0

    def _write_hidden(self, old: memoryview, at: int) -> None:
        if self._room.tests:
            self._room.keep(self._hidden, at // BLOCK, -(-(at + len(old)) // BLOCK))
        try:
            self._hidden.data.write([old], at)
        except DiskError as error:
            self._room.write_again(self._hidden, Layer.HIDDEN, [old], at, len(old), error)
        pause("copy-before-write.before-mark")
        self._hidden.mark(at // BLOCK, -(-(at + len(old)) // BLOCK), DATA)
        if self._hidden.data_blocks >= self._hidden.watch_at:
            self._room.grown(self._hidden)

    def flush(self) -> None:
        """Make stable what the primary was answered for. With durability=power what hidden preserves is stable already;
        otherwise it is of no use after a power cut (and stable after a clean end: Stack.flush_all)."""
        if self._power:
            with on_layer(Layer.HIDDEN, "flush", 0, 0):
                self._hidden_sync.check()
        try:
            flush_secondary(self._disk)
        except DiskError:
            if self._disk.unflushed is None:
                self.lost.mark_all()  # nobody knows which writes did not become stable
            raise

    def fail(self, failure: DiskError) -> None:
        """With durability=power: nothing can be made stable any more, because it is not known what is."""
        self._hidden_sync.fail(failure)
