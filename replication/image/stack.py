# SPDX-License-Identifier: BSD-3-Clause
"""Active, hidden and secondary disk as one: the last checkpoint plus the secondary guest's own writes.

Reading a block: active if it holds it, else hidden, else the secondary disk.

Who decides when two requests meet on one block
-----------------------------------------------
`top` and `below` are range locks over whole blocks; the gate (in node.py) keeps everything here away from
checkpoint, start and stop.

guest read, target write
    No lock. The target write copies the old block into hidden, sets the bit, and only then touches the disk. A
    read that found the block nowhere and read the disk looks at hidden's bit again afterwards: still clear means
    that the disk had not been touched, set means that hidden has what the read wants.
target write, target write
    `below`, first come first served, over whole blocks: the second one to reach a 4 KiB block finds the bit set, and
    does not copy the first one's data as if it were the checkpoint's.
guest write, guest write
    `top`, over whole blocks: a part of a block is completed from what is below before the block is marked, and
    nobody else writes the block meanwhile.
guest write, target write
    They change different images. The guest write that completes a block reads it like a guest read.
guest read, guest write
    No lock. The bit is set after the data is there: the read gets the old or the new block.
commit, guest write
    `top`: commit copies (or shares), then lets go, of exactly the blocks that it has locked; a guest write comes before
    (and is copied) or after (finds the block let go, and goes to the disk itself). Which blocks to lock it finds
    without the lock, and looks again with it. Commit lets go of hidden first, then active, so that a kill between them
    never uncovers hidden's older data.
commit, commit
    Two threads of one commit take different portions (commit.py), which share no word and no block.
commit, guest read
    No lock. Commit writes the disk before it lets go of the bit, and the overlays' data stays where it is until the
    commit is over: a read that saw the bit reads the right data in the overlay.
target write, failed target write
    `below`: what the disk lacks is noted, and struck out by the write that repairs it, in the order of the writes.
reclaim, writes
    Giving back stale overlay space takes the range lock of the overlay's writers (`top` for active, `below` for
    hidden), so no data is in the file without its bit.

Stable storage
--------------
With `durability=power` three orders hold (syncgroup.py shares each sync among the requests that wait for it):

* what hidden preserves, data before bits, is stable before the disk below is overwritten (`write_below`);
* a flush of the guest face makes active's data stable, then its bits (`flush_top`);
* during a commit a bit that went is published only after the disk has what it stood for, hidden's before active's. A
  guest write that went to the disk because the commit had let go of its block is flushed together with that.

With `durability=process` a flush of the guest face syncs the same files, but the kernel may write a bit before its data
and hidden is not synced at all: after a power cut the overlays are not used (images.py).
"""

from __future__ import annotations

import errno
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from replication.changes import ChangeMap
from replication.errors import DiskError
from replication.image.buffers import Buffers
from replication.image.face import ZEROES, Disk, Extent
from replication.image.file import FileDisk
from replication.image.files import Buffer
from replication.image.layer import Layer, LayerError, Source, on_layer
from replication.image.overlay import DATA_BITS, DATA_MASK, PAGE_CLUSTERS, ZERO_MASK, Held, Overlay
from replication.image.plan import Piece, Plan, arrange
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, CLUSTER
from replication.image.syncgroup import SyncGroup
from replication.pause import pause
from replication.rangelock import Range, RangeLock

COPY_CHUNK = 1 << 20
"""Bytes copied at a time by copy-before-write and commit: what a request holds in memory beside its own data. (Pieces
of 256 or 128 KiB, which stay in a core's cache, are slower for writes of 1M: 1.4k instead of 1.5k a second.)"""

_SPARE = 16 * COPY_CHUNK
"""Bytes of memory for copying that are kept: nbdkit has 16 threads for a client, and where there is less than they use
the others map, clear and fault in a buffer for each write. 256k writes of the target face at depth 16 (tmpfs): 5.3k a
second with 4 MiB in buffers of one, 5.8 to 6.3k so; 64k writes 17k and 18.5k."""

_ZEROES = bytes(COPY_CHUNK)
"""`_ZEROES.startswith(data)` tells in 10 us whether a megabyte is zeroes, and at once when its beginning is not. (To
compare memoryviews takes 800 us: element by element.)"""

_SPARSE_FROM = 64 << 10
"""From this length on a copy asks for holes first; below, reading is cheaper than asking."""

PORTION_MIN = 8
PORTION_MAX = 64
PORTION_BLOCKS = 128
"""What is committed under one range lock: PORTION_MIN clusters of the disk (1 MiB), or up to PORTION_MAX when no more
than PORTION_BLOCKS blocks of them are held (then looking for blocks costs more than copying them). A guest write to a
block that is held waits for it: 0.4 ms, for 128 single blocks 1 ms."""

EXTENTS_MAX = 1 << 30
"""Longest range of one extents answer; the client asks again for the rest."""

_SOURCES = (Source.DISK, Source.ACTIVE, Source.HIDDEN, Source.ZERO)
_ACTIVE, _HIDDEN, _ZERO = np.arange(1, len(_SOURCES), dtype=np.uint8)
"""Sources in arrays: their places in _SOURCES."""


class Stack:
    """The three images of one disk."""

    def __init__(self, active: Overlay, hidden: Overlay, disk: Disk, lost: ChangeMap | None = None) -> None:
        """`lost` notes what the disk lacks of the writes to the target face; without it that is forgotten with the
        process."""
        self.active = active
        self.hidden = hidden
        self.disk = disk
        self.size = disk.size
        self.lost = ChangeMap(None, disk.size) if lost is None else lost
        self.power = hidden.power
        """durability=power"""
        self.committing = False
        """Set by the node while the gate is closed: from here on bits go while their data is still being read, so no
        space may be given back."""
        self.preserving = True
        """Set by the node while the gate is closed: False while there is no checkpoint that could be preserved."""
        # That the disk could not be flushed for the guest during a commit: what came down may be lost, too, and the
        # kernel (or the disk's server) tells it only once. With durability=power `_top_sync` remembers it, for good.
        self._unflushed: DiskError | None = None
        # Protects it. Held across the flush, so that the commit's own does not go well before the guest's has noted
        # why; nothing else is taken with it.
        self._flushing = threading.Lock()
        # Range locks over whole blocks, in bytes; see the module's docstring. Held across the I/O they order.
        self.top = RangeLock()
        self.below = RangeLock()
        # Held by the one thread that commits many short runs, across their I/O; taken before `top`. There it is Python
        # that takes the time, so two threads would only wait for each other: 64 MiB in single blocks took 0.2 s
        # instead of 0.13.
        self._many = threading.Lock()
        self._spare = Buffers(_SPARE)
        # Whether the disk can share blocks of an overlay; None: not tried yet. After a failure all is copied.
        self._shares: dict[Source, bool | None] = {Source.ACTIVE: None, Source.HIDDEN: None}
        self._hidden_sync = SyncGroup(self._sync_hidden)
        self._top_sync = SyncGroup(self._sync_top)
        self.grown: Callable[[Overlay], None] = _unwatched
        """Called when an overlay has grown to its `watch_at`; says when to look again."""
        self.scarce: Callable[[], None] = self.give_back
        """Called when an overlay's file system is full: gives back stale space, here and wherever else it may help."""

    # -- guest face: reading -------------------------------------------------------------------------------

    def read(self, buffer: memoryview, offset: int) -> None:
        """The last checkpoint plus the guest's own writes."""
        stop = offset + len(buffer)
        cluster = offset // CLUSTER
        if (stop - 1) // CLUSTER == cluster:
            # Nearly every request lies in one cluster, and there in one image: two words decide. That takes half the
            # time of the general case (4 KiB: 2 instead of 4 us).
            first = offset % CLUSTER // BLOCK
            last = (stop - 1) % CLUSTER // BLOCK + 1
            data = DATA_MASK[first][last]
            some = data | ZERO_MASK[first][last]
            word = self.active.word(cluster)
            if word & data == data:
                self._read_layer(self.active, Layer.ACTIVE, buffer, offset)
                return
            if not word & some and not self.hidden.word(cluster) & some:
                self._read_below(buffer, offset)
                if self.hidden.word(cluster) & some:
                    self._take_preserved(buffer, offset)
                return
        self._read_runs(buffer, offset)

    def _read_runs(self, buffer: memoryview, offset: int) -> None:
        """Read what may be in several images."""
        stop = offset + len(buffer)
        for start, end, source in self._visible(offset, stop):
            part = buffer[start - offset : end - offset]
            if source is Source.DISK:
                self._read_disk(part, start)
            else:
                self._read_overlay(part, start, source)

    def _read_overlay(self, part: memoryview, start: int, source: Source) -> None:
        if source is Source.ACTIVE:
            self._read_layer(self.active, Layer.ACTIVE, part, start)
        elif source is Source.HIDDEN:
            self._read_layer(self.hidden, Layer.HIDDEN, part, start)
        else:
            _clear(part)

    @staticmethod
    def _read_layer(overlay: Overlay, layer: Layer, part: memoryview, start: int) -> None:
        try:
            overlay.data.read(part, start)
        except DiskError as error:
            raise LayerError(error, layer, "read", start, len(part)) from error

    def _read_disk(self, part: memoryview, start: int) -> None:
        """Read the disk below, then whatever a target write has preserved meanwhile from hidden."""
        self._read_below(part, start)
        self._take_preserved(part, start)

    def _read_below(self, part: memoryview, start: int) -> None:
        """Read the disk; `_take_preserved` must follow, unless hidden still holds nothing of it."""
        try:
            self.disk.read(part, start)
        except DiskError as error:
            raise LayerError(error, Layer.SECONDARY, "read", start, len(part)) from error
        pause("guest-read.disk-read")

    def _take_preserved(self, part: memoryview, start: int) -> None:
        stop = start + len(part)
        for at, end, source in self._layers_of(self.hidden, Source.HIDDEN, start, stop):
            if source is not Source.DISK:
                self._read_overlay(part[at - start : end - start], at, source)

    def _visible(self, start: int, stop: int) -> Iterator[tuple[int, int, Source]]:
        """Runs (start, stop, source) in bytes that cover the range."""
        for at, end, source in self._layers_of(self.active, Source.ACTIVE, start, stop):
            if source is Source.DISK:
                yield from self._layers_of(self.hidden, Source.HIDDEN, at, end)
            else:
                yield at, end, source

    @staticmethod
    def _layers_of(overlay: Overlay, name: Source, start: int, stop: int) -> Iterator[tuple[int, int, Source]]:
        """Runs of one overlay, in bytes; what it does not hold is DISK."""
        for first, last, held in overlay.held(start // BLOCK, -(-stop // BLOCK)):
            source = name if held is Held.DATA else Source.ZERO if held is Held.ZERO else Source.DISK
            yield max(start, first * BLOCK), min(stop, last * BLOCK), source

    def extents(self, offset: int, length: int) -> list[Extent]:
        """What the guest face knows about its content; as true as a read at the same moment."""
        stop = offset + min(length, EXTENTS_MAX)
        found: list[Extent] = []
        for start, end, source in self._visible(offset, stop):
            if source is Source.DISK:
                found += self._disk_extents(start, end)
            else:
                zero = source is Source.ZERO
                found.append(Extent(start, end - start, zero, zero))
        return found

    def _disk_extents(self, start: int, stop: int) -> Iterator[Extent]:
        at = start
        below: list[Extent] = []
        while at < stop:
            with on_layer(Layer.SECONDARY, "extents", at, stop - at):
                below += self.disk.extents(at, stop - at)
            at = below[-1].offset + below[-1].length
        # As in _read_disk: what hidden holds by now may have been overwritten below.
        kept = list(self._layers_of(self.hidden, Source.HIDDEN, start, stop))
        if all(source is Source.DISK for _, _, source in kept):
            yield from below
            return
        for first, last, source in kept:
            if source is Source.DISK:
                for extent in below:
                    begin, end = max(first, extent.offset), min(last, extent.offset + extent.length)
                    if begin < end:
                        yield extent._replace(offset=begin, length=end - begin)
            else:
                zero = source is Source.ZERO
                yield Extent(first, last - first, zero, zero)

    # -- guest face: writing -------------------------------------------------------------------------------

    def write_top(self, data: memoryview, offset: int) -> None:
        """A guest write while replication runs: into active."""
        held = self._hold(self.top, offset, len(data))
        try:
            self._write_active([data], offset, len(data))
        finally:
            self.top.release(held)

    def zero_top(self, offset: int, length: int) -> None:
        """Zeroes from the guest while replication runs: whole blocks are only marked."""
        held = self._hold(self.top, offset, length)
        try:
            self._zero_active(offset, length)
        finally:
            self.top.release(held)

    def _zero_active(self, offset: int, length: int) -> None:
        stop = offset + length
        first = -(-offset // BLOCK)
        last = self._whole_blocks_end(stop)
        if first >= last:
            self._write_active([ZEROES[:length]], offset, length)
            return
        head = first * BLOCK - offset
        if head:
            self._write_active([ZEROES[:head]], offset, head)
        with on_layer(Layer.ACTIVE, "zero", offset, length):
            self.active.mark(first, last, Held.ZERO)
        tail = stop - last * BLOCK
        if tail > 0:
            self._write_active([ZEROES[:tail]], last * BLOCK, tail)

    def _whole_blocks_end(self, stop: int) -> int:
        """The block after the last one that ends at or before `stop`; the disk's last block is whole at its end."""
        return -(-stop // BLOCK) if stop == self.size else stop // BLOCK

    def _write_active(self, pieces: Sequence[Buffer], offset: int, length: int) -> None:
        """Write into active; blocks that get only a part are completed from what is visible. `top` is held."""
        stop = offset + length
        first, last = offset // BLOCK, -(-stop // BLOCK)
        start, end = first * BLOCK, min(last * BLOCK, self.size)
        if not ((start == offset and end == stop) or self._held_as_data(first, last)):
            head = memoryview(bytearray(offset - start))
            tail = memoryview(bytearray(end - stop))
            if head:
                self.read(head, start)
            if tail:
                self.read(tail, stop)
            pause("guest-write.completed")
            pieces = [piece for piece in (head, *pieces, tail) if piece]
            offset, length = start, end - start
        try:
            self.active.data.write(pieces, offset)
        except DiskError as error:
            if error.errno == errno.ENOSPC and self.committing:
                self._settle(pieces, offset, length)
                return
            self._write_with_room(self.active, Layer.ACTIVE, pieces, offset, length, error)
        pause("guest-write.before-mark")
        self.active.mark(first, last, Held.DATA)
        if self.active.data_blocks >= self.active.watch_at:
            self.grown(self.active)

    def _settle(self, pieces: Sequence[Buffer], offset: int, length: int) -> None:
        """During a commit, a write for which active has no room: its blocks are committed here and now. `top` is
        held."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        start, end = first * BLOCK, min(last * BLOCK, self.size)
        whole = memoryview(bytearray(end - start))
        self.read(whole, start)
        whole[offset - start : offset - start + length] = b"".join(pieces)
        with on_layer(Layer.SECONDARY, "write", start, end - start):
            self.disk.write([whole], start)
        self.hidden.forget(first, last)
        self.active.forget(first, last)

    def _held_as_data(self, first: int, last: int) -> bool:
        return all(state is Held.DATA for _, _, state in self.active.held(first, last))

    # -- guest face after failover -------------------------------------------------------------------------

    def write_over(self, data: memoryview, offset: int, shelter: bool) -> None:
        """A guest write during or after a failed commit: blocks held above go to active, the others to the disk, so
        that the commit meets every block once. With `shelter`, a block that the disk does not take goes to active.

        For FUA `flush_top` must follow. The disk does not get the flag: that what the commit has brought down could not
        be made stable would be told to this write, and sheltering it would be the end of that."""
        held = self._hold(self.top, offset, len(data))
        try:
            for start, end, above in self._held_above(offset, offset + len(data)):
                part = data[start - offset : end - offset]
                if above:
                    self._write_active([part], start, end - start)
                    continue
                try:
                    with on_layer(Layer.SECONDARY, "write", start, end - start):
                        self.disk.write([part], start)
                except LayerError:
                    if not shelter:
                        raise
                    self._write_active([part], start, end - start)
        finally:
            self.top.release(held)

    def zero_over(self, offset: int, length: int, may_trim: bool, shelter: bool) -> None:
        """Zeroes from the guest during or after a failed commit; as write_over."""
        held = self._hold(self.top, offset, length)
        try:
            for start, end, above in self._held_above(offset, offset + length):
                if above:
                    self._zero_active(start, end - start)
                    continue
                try:
                    with on_layer(Layer.SECONDARY, "zero", start, end - start):
                        self.disk.zero(start, end - start, may_trim)
                except LayerError:
                    if not shelter:
                        raise
                    self._zero_active(start, end - start)
        finally:
            self.top.release(held)

    def _held_above(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """Runs (start, stop, whether active or hidden holds them) in bytes, as of now: `top` is held, so only a run
        not yet visited can change, and only by its visitor."""
        runs: list[tuple[int, int, bool]] = []
        for at, end, source in self._layers_of(self.active, Source.ACTIVE, start, stop):
            if source is not Source.DISK:
                runs.append((at, end, True))
            else:
                for low, high, below in self._layers_of(self.hidden, Source.HIDDEN, at, end):
                    runs.append((low, high, below is not Source.DISK))
        yield from runs

    # -- target face ---------------------------------------------------------------------------------------

    def write_below(self, data: memoryview, offset: int, fua: bool) -> None:
        """The primary's write: what it overwrites goes to hidden first."""
        self._overwrite(offset, len(data), self._write_disk, [data], offset, fua)

    def zero_below(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """The primary's zeroes or trim, which destroy data like a write."""

        def zero() -> None:
            with on_layer(Layer.SECONDARY, "zero", offset, length):
                self.disk.zero(offset, length, may_trim, fua)

        self._overwrite(offset, length, zero)

    def write_all_below(self, pieces: Sequence[Piece]) -> list[tuple[int, DiskError]]:
        """The primary's writes, in their order, as `write_below` would do them one by one; (index, error) of each that
        failed, ascending.

        For small ones (4 KiB, on tmpfs): 6 us each instead of 9 where they are copied before, 2.4 instead of 4.5 where
        they are not. Everything is preserved before anything is changed, and what is preserved is marked together, so
        with durability=power one sync is enough. Their own order counts only where they overlap: such are done by
        halves.
        """
        if len(pieces) == 1:
            offset, data = pieces[0]
            try:
                self.write_below(data, offset, False)
            except DiskError as error:
                return [(0, error)]
            return []
        plan = arrange(pieces)
        if plan is None:  # two of them overlap
            half = len(pieces) // 2
            failed = self.write_all_below(pieces[:half])
            return failed + [(half + index, error) for index, error in self.write_all_below(pieces[half:])]
        try:
            held = self.below.acquire_all(plan.spans)
        except DiskError as error:
            self._lose_all(pieces)
            return [(index, error) for index in range(len(pieces))]
        try:
            return self._overwrite_all(pieces, plan)
        except BaseException:
            self._lose_all(pieces)
            raise
        finally:
            self.below.release(held)

    def _overwrite_all(self, pieces: Sequence[Piece], plan: Plan) -> list[tuple[int, DiskError]]:
        """Preserve all, then change all; where that fails, once more one by one. `below` is held."""
        alone: list[int] = []
        try:
            if self.preserving:
                self._preserve_all_stably(plan.spans)
        except DiskError:
            alone.extend(range(len(pieces)))
        else:
            pause("target-write.preserved")
            for run in plan.runs:
                try:
                    self.disk.write(run.data, run.offset)
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
            self.disk.write(pieces, offset, fua)
        except DiskError as error:
            raise LayerError(error, Layer.SECONDARY, "write", offset, sum(map(len, pieces))) from error

    def _overwrite(self, offset: int, length: int, change: Callable[..., None], *arguments: object) -> None:
        """Preserve, then change the disk by `change(*arguments)`. What fails is noted as lost, and no longer when a
        later write covers it."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        try:
            held = self.below.acquire(first * BLOCK, last * BLOCK)
        except BaseException:
            self.lost.mark(offset, length)
            raise
        try:
            self._overwrite_held(offset, length, change, *arguments)
        finally:
            self.below.release(held)

    def _overwrite_held(self, offset: int, length: int, change: Callable[..., None], *arguments: object) -> None:
        """The same; `below` is held."""
        try:
            if self.preserving:
                self._preserve_stably(offset, length)
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
        if self.power:
            self._stably(lambda: self._preserve(offset, length))
        else:
            self._preserve(offset, length)

    def _preserve_all_stably(self, spans: Sequence[tuple[int, int]]) -> None:
        """The same for several ranges, in bytes from start to stop; one sync for all."""
        if self.power:
            self._stably(lambda: self._preserve_all(spans))
        else:
            self._preserve_all(spans)

    def _preserve_all(self, spans: Sequence[tuple[int, int]]) -> bool:
        """Like `_preserve` of each; but short ranges that are all new to hidden are copied one after the other, then
        marked together (with `_preserve` alone 2 us more for each of 4 KiB)."""
        copied = False
        fresh: list[tuple[int, int]] = []
        word = self.hidden.word
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
        read, write = self.disk.read, self.hidden.data.write
        for start, stop in spans:
            old = room[: (stop if stop < self.size else self.size) - start]
            try:
                read(old, start)
            except DiskError as error:
                raise LayerError(error, Layer.SECONDARY, "read", start, len(old)) from error
            pause("copy-before-write.read")
            blocks = start // BLOCK, stop // BLOCK
            if _ZEROES.startswith(old):
                zeroes.append(blocks)
                continue
            try:
                write([old], start)
            except DiskError as error:
                self._write_with_room(self.hidden, Layer.HIDDEN, [old], start, len(old), error)
            data.append(blocks)
        self._spare.give(room)
        pause("copy-before-write.before-mark")
        self.hidden.mark_each(zeroes, Held.ZERO)
        self.hidden.mark_each(data, Held.DATA)
        if self.hidden.data_blocks >= self.hidden.watch_at:
            self.grown(self.hidden)

    def _stably(self, preserve: Callable[[], bool]) -> None:
        copied = True  # in part perhaps, when it fails: nobody looks at these blocks again
        try:
            copied = preserve()
        finally:
            with on_layer(Layer.HIDDEN, "sync", 0, 0):
                if copied:
                    self._hidden_sync.run()
                else:
                    self._hidden_sync.check()

    def settle(self, disk: bool) -> None:
        """With durability=power, at the start of a process: what a killed one has left behind in memory becomes stable,
        because from here on it is taken for that. `disk`: also what it has committed. LayerError."""
        for overlay, layer in ((self.hidden, Layer.HIDDEN), (self.active, Layer.ACTIVE)):
            with on_layer(layer, "sync", 0, 0):
                overlay.settle()
        if disk:
            self._flush_disk()

    def _sync_hidden(self) -> None:
        words = self.hidden.unpublished()
        self.hidden.data.flush()
        self.hidden.publish(words)

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
            word = self.hidden.word(cluster)
            if word & data == data:
                return False
            if not word & (data | ZERO_MASK[low][high]):
                self._copy_to_hidden(first * BLOCK, min(last * BLOCK, self.size))
                return True
        copied = False
        for start, stop, held in list(self.hidden.held(first, last)):
            if held is Held.NOTHING:
                self._copy_to_hidden(start * BLOCK, min(stop * BLOCK, self.size))
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
                    self.hidden.mark(at // BLOCK, -(-whole // BLOCK), Held.ZERO)
                    at = whole
                    continue
            old = self._spare.take(end - at)
            self._copy_piece(old, at)
            self._spare.give(old)
            at = end

    def _copy_piece(self, old: memoryview, at: int) -> None:
        try:
            self.disk.read(old, at)
        except DiskError as error:
            raise LayerError(error, Layer.SECONDARY, "read", at, len(old)) from error
        pause("copy-before-write.read")
        if _ZEROES.startswith(old):
            self.hidden.mark(at // BLOCK, -(-(at + len(old)) // BLOCK), Held.ZERO)
        else:
            self._write_hidden(old, at)

    def _hole(self, start: int, stop: int) -> int:
        """How much of the disk from `start` on is known to be zeroes without reading; it is only there to save
        reading."""
        try:
            return self.disk.hole(start, stop - start)
        except DiskError:
            return 0

    def _write_hidden(self, old: memoryview, at: int) -> None:
        try:
            self.hidden.data.write([old], at)
        except DiskError as error:
            self._write_with_room(self.hidden, Layer.HIDDEN, [old], at, len(old), error)
        pause("copy-before-write.before-mark")
        self.hidden.mark(at // BLOCK, -(-(at + len(old)) // BLOCK), Held.DATA)
        if self.hidden.data_blocks >= self.hidden.watch_at:
            self.grown(self.hidden)

    # -- commit --------------------------------------------------------------------------------------------

    def commit(self, first: int, last: int) -> int:
        """Bring blocks [first, last) down into the disk and let go of them; bytes written. Only what is held is locked:
        a guest write between has nothing to wait for. Several threads may do this, each for blocks of its own."""
        source = self._only_source(first, last)
        if source is not None:
            if self._shares[source]:
                # What sharing would wait for, with the range and both files locked.
                self._data_of(source).write_back(first * BLOCK, (last - first) * BLOCK)
            held = self.top.acquire(first * BLOCK, last * BLOCK)
            try:
                pause("commit.locked")
                if self._only_source(first, last) is source:
                    return self._commit_whole(first, last, source)
            finally:
                self.top.release(held)
        with self._many:
            return self._commit_runs(first, last)

    def _only_source(self, first: int, last: int) -> Source | None:
        """From where all of the blocks are read, if they are whole clusters and all in the one or the other overlay,
        else None. After a large write that takes 2 us, the general case 60."""
        if first % BLOCKS_PER_CLUSTER or last % BLOCKS_PER_CLUSTER:
            return None
        start, stop = first // BLOCKS_PER_CLUSTER, last // BLOCKS_PER_CLUSTER
        word = self.active.word(start)
        if word in (0, DATA_BITS) and all(self.active.word(cluster) == word for cluster in range(start + 1, stop)):
            if word:
                return Source.ACTIVE
            if all(self.hidden.word(cluster) == DATA_BITS for cluster in range(start, stop)):
                return Source.HIDDEN
        return None

    def _commit_whole(self, first: int, last: int, source: Source) -> int:
        """Bring down and let go of blocks that all have this source. `top` is held."""
        start, stop = first * BLOCK, min(last * BLOCK, self.size)
        with on_layer(Layer.SECONDARY, "commit", start, stop - start):
            if not self._share(start, stop, source):
                self._bring_down(start, stop, source)
        pause("commit.written")
        self.hidden.forget(first, last)
        pause("commit.hidden-forgotten")
        self.active.forget(first, last)
        return stop - start

    def _share(self, start: int, stop: int, source: Source) -> bool:
        """Let the disk share an overlay's clusters, on file systems with reflinks; whether that was possible. 1 GiB of
        XFS that the kernel has written out: 0.1 s instead of 1.0; that it has not: 0.9. Only what is long: each piece
        is an extent of its own in the disk's file from then on."""
        if self._shares[source] is False or stop % CLUSTER:
            return False
        self._shares[source] = shared = self.disk.share(self._data_of(source), start, stop - start)
        return shared

    def _data_of(self, source: Source) -> FileDisk:
        return (self.active if source is Source.ACTIVE else self.hidden).data

    def _commit_runs(self, first: int, last: int) -> int:
        """Bring down and let go of what is held of the blocks, in as many runs as it takes."""
        chosen = self._sources(first, last) != 0
        spans = [((first + start) * BLOCK, (first + stop) * BLOCK) for start, stop, held in _runs(chosen) if held]
        if not spans:
            self._let_go(first, last, chosen)
            return 0
        at = end = written = 0
        held = self.top.acquire_all(spans)
        try:
            pause("commit.locked")
            # Once more: some of it may have been let go, and what has come up elsewhere meanwhile is not locked.
            for start, stop, source in _runs(np.where(chosen, self._sources(first, last), 0)):
                if source:
                    at, end = (first + start) * BLOCK, min((first + stop) * BLOCK, self.size)
                    self._bring_down(at, end, _SOURCES[source])
                    written += end - at
            pause("commit.written")
            self._let_go(first, last, chosen)
        except LayerError:
            raise
        except DiskError as error:
            raise LayerError(error, Layer.SECONDARY, "commit", at, end - at) from error
        finally:
            self.top.release(held)
        return written

    def _let_go(self, first: int, last: int, chosen: npt.NDArray[np.bool_]) -> None:
        """Let go of those of the blocks [first, last) that are chosen."""
        begin, end = first // BLOCKS_PER_CLUSTER, -(-last // BLOCKS_PER_CLUSTER)
        gone = np.zeros((end - begin) * BLOCKS_PER_CLUSTER, np.bool_)
        first -= begin * BLOCKS_PER_CLUSTER
        gone[first : first + len(chosen)] = chosen
        if last >= self.active.blocks:
            gone[first + len(chosen) :] = True  # as in Overlay.forget
        self.hidden.forget_chosen(begin, gone)
        pause("commit.hidden-forgotten")
        self.active.forget_chosen(begin, gone)

    def _sources(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        """For every block where it is read from, as its place in _SOURCES. As `_visible`, for many short runs in a
        tenth of the time (1 us a run)."""
        start, stop = first // BLOCKS_PER_CLUSTER, -(-last // BLOCKS_PER_CLUSTER)
        active_data, active_zero = self.active.states(start, stop)
        hidden_data, hidden_zero = self.hidden.states(start, stop)
        sources = np.where(
            active_data | active_zero,
            np.where(active_data, _ACTIVE, _ZERO),
            np.where(hidden_data, _HIDDEN, hidden_zero * _ZERO),
        )
        start *= BLOCKS_PER_CLUSTER
        return sources[first - start : last - start]

    def _bring_down(self, start: int, stop: int, source: Source) -> None:
        if source is Source.ZERO:
            self.disk.zero(start, stop - start, may_trim=True)
            return
        for at in range(start, stop, COPY_CHUNK):
            data = self._spare.take(min(COPY_CHUNK, stop - at))
            self._read_overlay(data, at, source)
            self.disk.write([data], at)
            self._spare.give(data)

    def portions(self) -> Iterator[tuple[int, int]]:
        """Block ranges of which active or hidden holds something, for `commit`, in whole clusters and ascending. A
        guest write waits for one: with more than PORTION_BLOCKS blocks that are held it is not longer than PORTION_MIN
        clusters."""
        for page in sorted({*self.active.dirty_pages(), *self.hidden.dirty_pages()}):
            blocks = self.active.blocks_of(page) | self.hidden.blocks_of(page)
            held = blocks.reshape(-1, BLOCKS_PER_CLUSTER).sum(axis=1)
            before = [0, *np.cumsum(held).tolist()]
            start = page * PAGE_CLUSTERS
            for at in range(0, len(held), PORTION_MAX):
                for first, last in _split(before, at, min(at + PORTION_MAX, len(held))):
                    stop = min((start + last) * BLOCKS_PER_CLUSTER, self.active.blocks)
                    yield (start + first) * BLOCKS_PER_CLUSTER, stop

    def held_grains(self, grain: int) -> Iterator[tuple[int, int]]:
        """Ranges in bytes, in whole grains (of 32, 64 or 128 KiB), of which active or hidden
        holds something."""
        for page in sorted({*self.active.dirty_pages(), *self.hidden.dirty_pages()}):
            blocks = self.active.blocks_of(page) | self.hidden.blocks_of(page)
            held = np.flatnonzero(blocks.reshape(-1, grain // BLOCK).any(axis=1))
            start = page * PAGE_CLUSTERS * BLOCKS_PER_CLUSTER * BLOCK
            for run in np.split(held, np.flatnonzero(np.diff(held) != 1) + 1):
                if len(run):
                    offset = start + int(run[0]) * grain
                    yield offset, min(len(run) * grain, self.size - offset)

    def held_bytes(self) -> int:
        """Bytes of the blocks that active or hidden holds."""
        pages = {*self.active.dirty_pages(), *self.hidden.dirty_pages()}
        held = sum(int((self.active.blocks_of(page) | self.hidden.blocks_of(page)).sum()) for page in pages) * BLOCK
        last = self.active.blocks - 1
        short = (last + 1) * BLOCK - self.size
        return held - short if self._held_at_all(last) else held

    def _held_at_all(self, block: int) -> bool:
        return any(
            state is not Held.NOTHING
            for overlay in (self.active, self.hidden)
            for _, _, state in overlay.held(block, block + 1)
        )

    # -- all of it -----------------------------------------------------------------------------------------

    def _hold(self, lock: RangeLock, offset: int, length: int) -> Range:
        """Take the whole blocks of a range."""
        return lock.acquire(offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK)

    def check_images(self) -> None:
        """LayerError when an overlay was truncated or removed while in use: emptying it would not last, or would
        kill the process where its mapping has lost its file."""
        for overlay, layer in ((self.active, Layer.ACTIVE), (self.hidden, Layer.HIDDEN)):
            with on_layer(layer, "make-empty", 0, self.size):
                overlay.check()

    def empty(self) -> None:
        """Let go of everything the overlays hold. The gate is closed. With durability=power `publish_emptied` must
        follow."""
        for overlay in (self.active, self.hidden):
            overlay.empty()
            overlay.watch_at = 0
            if overlay is self.active:
                pause("checkpoint.active-emptied")

    def publish_emptied(self) -> None:
        """With durability=power, after `empty`: the images on stable storage hold nothing either. LayerError; the
        caller then calls `fail`."""
        if not self.power:
            return
        for overlay, layer in ((self.active, Layer.ACTIVE), (self.hidden, Layer.HIDDEN)):
            with on_layer(layer, "make-empty", 0, self.size):
                overlay.publish(overlay.unpublished())

    def reclaim_some(self, overlay: Overlay, ranges: Iterator[tuple[int, int]], steps: int) -> bool:
        """Give back stale space of up to `steps` ranges out of `overlay.stale_ranges()`; False when there are no more.

        Never waits for a range, so that a writer that has run out of space may call it while it holds one.
        """
        lock = self.top if overlay is self.active else self.below
        for first, last in itertools.islice(ranges, steps):
            self._reclaim_unheld(overlay, lock, first, last, (BLOCKS_PER_CLUSTER, 1))
            steps -= 1
        return not steps

    def _reclaim_unheld(self, overlay: Overlay, lock: RangeLock, first: int, last: int, units: tuple[int, ...]) -> None:
        """Reclaim what nobody holds of blocks [first, last): all at once, or else in ever smaller units."""
        held = lock.try_acquire(first * BLOCK, last * BLOCK)
        if held is not None:
            try:
                overlay.reclaim(first, last)
            finally:
                lock.release(held)
        elif units:
            for start in range(first, last, units[0]):
                self._reclaim_unheld(overlay, lock, start, min(start + units[0], last), units[1:])

    def _write_with_room(
        self, overlay: Overlay, layer: Layer, pieces: Sequence[Buffer], offset: int, length: int, failure: DiskError
    ) -> None:
        """Write to an overlay again what has failed: when its file system is full, after what no overlay needs any more
        was given back. LayerError."""
        if failure.errno == errno.ENOSPC and not self.committing:
            try:
                self.scarce()
                overlay.data.write(pieces, offset)
                return
            except DiskError as error:
                failure = error
        raise LayerError(failure, layer, "write", offset, length) from failure

    def give_back(self) -> None:
        """Give back all stale space that nobody is writing to; never waits for a range. Not during a commit."""
        for overlay in (self.active, self.hidden):
            self.reclaim_some(overlay, overlay.stale_ranges(), sys.maxsize)

    def flush_top(self) -> None:
        """Make stable what the guest was answered for, wherever it is."""
        with on_layer(Layer.ACTIVE, "flush", 0, 0):
            if self.power:
                self._top_sync.run()
                return
            self.active.flush()
        if self.committing:
            with self._flushing:
                try:
                    self._flush_disk()
                except DiskError as error:
                    self._unflushed = error
                    raise

    def flush_committed(self) -> None:
        """At the end of a commit: what came down is stable. The overlays hold nothing of use any more; but with
        durability=power they must say so themselves. Fails once for a flush of the guest that has failed."""
        if self.power:
            self.flush_top()
            return
        with self._flushing:
            failure, self._unflushed = self._unflushed, None
            self._flush_disk()
        if failure is not None:
            raise failure

    def flush_all(self) -> None:
        """Make everything stable: overlays and disk."""
        self.flush_top()
        if not self.power:
            with on_layer(Layer.HIDDEN, "flush", 0, 0):
                self.hidden.flush()
        self.flush_below()

    def fail(self, failure: DiskError) -> None:
        """With durability=power: nothing can be made stable any more, because it is not known what is."""
        self._top_sync.fail(failure)
        self._hidden_sync.fail(failure)

    def _sync_top(self) -> None:
        # Active's words first: what they say is gone is gone from hidden, too, so hidden's must not be older.
        above = self.active.unpublished()
        if not self.committing:
            self.active.data.flush()
            self.active.publish(above)
            return
        below = self.hidden.unpublished()
        self._flush_disk()
        self.active.data.flush()
        self.hidden.data.flush()
        self.hidden.publish(below)
        self.active.publish(above)

    def _flush_disk(self) -> None:
        with on_layer(Layer.SECONDARY, "flush", 0, 0):
            self.disk.flush()

    def close(self) -> None:
        """Let go of the overlays; the disk belongs to whoever opened it."""
        self.active.close()
        self.hidden.close()

    def flush_below(self) -> None:
        """Make stable what the primary was answered for. With durability=power what hidden preserves is stable already;
        otherwise it is of no use after a power cut (and stable after a clean end: `flush_all`)."""
        if self.power:
            with on_layer(Layer.HIDDEN, "flush", 0, 0):
                self._hidden_sync.check()
        try:
            self._flush_disk()
        except DiskError:
            self.lost.mark_all()  # nobody knows which writes did not become stable
            raise


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


def _unwatched(overlay: Overlay) -> None:
    overlay.watch_at = sys.maxsize


def _clear(part: memoryview) -> None:
    for at in range(0, len(part), len(ZEROES)):
        end = min(at + len(ZEROES), len(part))
        part[at:end] = ZEROES[: end - at]
