# SPDX-License-Identifier: BSD-3-Clause
"""Active, hidden and secondary disk as one: the last checkpoint plus the secondary guest's own writes.

Reading a block: active if it holds it, else hidden, else the secondary disk.

Who decides when two requests meet on one block
-----------------------------------------------
`top` and `below` are range locks over whole blocks; the gate (in node.py) keeps everything here away from
checkpoint, start and stop.

guest read, target write (target.py)
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
commit (descent.py), guest write
    `top`: commit copies (or shares) exactly the blocks that it has locked; a guest write comes before (and is copied)
    or after (and goes to active and to the disk). Which blocks to lock it finds without the lock, and looks again with
    it. What came down stays in the overlays until a flush of the disk has covered it, and so does what the guest writes
    meanwhile. Commit lets go of hidden first, then active, so that a kill between them never uncovers hidden's older
    data.
commit, commit
    Two threads of one commit take different portions (secondary/commit.py), which share no word and no block.
commit, guest read
    No lock. The disk is written and flushed before the bit goes, and the overlays' data stays where it is until the
    commit is over: a read that saw the bit reads the right data in the overlay.
target write, failed target write
    `below`: what the disk lacks is noted, and struck out by the write that repairs it, in the order of the writes.
test (frozen.py), writes
    Whoever is about to change the disk, or the data of an overlay, has each test keep what it has there first, in the
    range that orders the change: `below` for the disk and for hidden, `top` for active. Tests are over before a commit.
reclaim (room.py), writes
    Giving back stale overlay space takes the range lock of the overlay's writers (`top` for active, `below` for
    hidden), so no data is in the file without its bit.

Stable storage
--------------
With `durability=power` three orders hold (syncgroup.py shares each sync among the requests that wait for it):

* what hidden preserves, data before bits, is stable before the disk below is overwritten (TargetWrites.write);
* a flush of the guest face makes active's data stable, then its bits (`flush_top`);
* during a commit a bit goes only after the disk was flushed with what it stood for; hidden's are published before
  active's. A flush of the guest face also flushes the disk, for what active had no room for.

With `durability=process` a flush of the guest face syncs the same files, but the kernel may write a bit before its data
and hidden is not synced at all: after a power cut the overlays are not used (secondary/images.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from replication.disk.face import EXTENTS_MAX, ZEROES, Disk, Extent
from replication.disk.files import Buffer
from replication.errors import DiskError
from replication.image.buffers import Buffers
from replication.image.descent import Descent
from replication.image.layer import Layer, LayerError, Source, flush_secondary, on_layer
from replication.image.overlay import DATA, DATA_MASK, ZERO, ZERO_MASK, Overlay
from replication.image.qcow2 import BLOCK, CLUSTER, image_size
from replication.image.room import Room
from replication.image.syncgroup import SyncGroup
from replication.image.target import COPY_CHUNK, TargetWrites
from replication.order.latency import Latency
from replication.order.pause import pause
from replication.order.rangelock import Range, RangeLock
from replication.record.changes import ChangeMap

_SPARE = 16 * COPY_CHUNK
"""Bytes of memory for copying that are kept: nbdkit has 16 threads for a client, and where there is less than they use
the others map, clear and fault in a buffer for each write. 256k writes of the target face at depth 16 (tmpfs): 5.3k a
second with 4 MiB in buffers of one, 5.8 to 6.3k so; 64k writes 17k and 18.5k."""

EXTENTS_RANGE_MAX = 1 << 30
"""Longest range of one extents answer; the client asks again for the rest."""
_ONE_RANGE_MAX = 16 << 20
"""The same where one extent is asked for: all images are looked through, and for each extent anew."""


class Stack:
    """The three images of one disk."""

    def __init__(self, active: Overlay, hidden: Overlay, disk: Disk, lost: ChangeMap | None = None) -> None:
        """`lost` notes what the disk lacks of the writes to the target face; without it that is forgotten with the
        process."""
        self.active = active
        self.hidden = hidden
        self.disk = disk
        self.size = disk.size
        self.power = hidden.power
        """durability=power"""
        # That the disk could not be flushed for the guest during a commit, or has lost what was not flushed: what came
        # down may be lost, too, and the kernel (or the disk's server) tells it only once.
        self._unflushed: DiskError | None = None
        # Protects it. Held across the flush, so that the commit's own does not go well before the guest's has noted
        # why; nothing else is taken with it.
        self._flushing = threading.Lock()
        # Range locks over whole blocks, in bytes; see the module's docstring. Held across the I/O they order.
        self.top = RangeLock()
        self.below = RangeLock()
        self.room = Room(active, hidden, self.top, self.below)
        spare = Buffers(_SPARE)
        lost = ChangeMap(None, disk.size) if lost is None else lost
        self.target = TargetWrites(hidden, disk, self.below, lost, self.room, spare)
        self.descent = Descent(active, hidden, disk, self.top, self._read_overlay, spare)
        self._top_sync = SyncGroup(self._sync_top)
        # The overlays of which a larger image is made.
        self._growing: list[Overlay] = []

    def attend(self, latency: Latency) -> None:
        """Who is to know what requests wait for here."""
        self.top.latency = self.below.latency = latency

    @property
    def committing(self) -> bool:
        """Set by the node while the gate is closed."""
        return self.room.committing

    @committing.setter
    def committing(self, committing: bool) -> None:
        self.room.committing = committing
        if committing:
            # Whatever it is that a commit has not brought down for good, the next one does.
            self._unflushed = None
            self.descent.begin()

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
            source = name if held is DATA else Source.ZERO if held is ZERO else Source.DISK
            yield max(start, first * BLOCK), min(stop, last * BLOCK), source

    def holds_all(self, start: int, stop: int) -> bool:
        """Whether nothing of bytes [start, stop) is read from the disk."""
        return all(source is not Source.DISK for _, _, source in self._visible(start, stop))

    def extents(self, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        """What the guest face knows about its content, at most `count` extents; as true as a read at the same
        moment."""
        stop = offset + min(length, EXTENTS_RANGE_MAX if count > 1 else _ONE_RANGE_MAX)
        found: list[Extent] = []
        for start, end, source in self._visible(offset, stop):
            if source is not Source.DISK:
                zero = source is Source.ZERO
                found.append(Extent(start, end - start, zero, zero))
            else:
                found += self._disk_extents(start, end, count - len(found))
                if found[-1].offset + found[-1].length < end:
                    break  # the disk has not told more
            if len(found) >= count:
                break
        return found[:count]

    def _disk_extents(self, start: int, stop: int, count: int) -> Iterator[Extent]:
        """What the disk says about the beginning of a range, in about `count` extents."""
        with on_layer(Layer.SECONDARY, "extents", start, stop - start):
            below = self.disk.extents(start, stop - start, count)
        stop = below[-1].offset + below[-1].length
        # As in _read_disk: what hidden holds by now may have been overwritten below.
        kept = list(self._layers_of(self.hidden, Source.HIDDEN, start, stop))
        if all(source is Source.DISK for _, _, source in kept):
            yield from below
            return
        at = 0
        for first, last, source in kept:
            if source is not Source.DISK:
                zero = source is Source.ZERO
                yield Extent(first, last - first, zero, zero)
                continue
            while at < len(below) and below[at].offset + below[at].length <= first:
                at += 1
            index = at
            while index < len(below) and below[index].offset < last:
                extent = below[index]
                begin, end = max(first, extent.offset), min(last, extent.offset + extent.length)
                yield extent._replace(offset=begin, length=end - begin)
                index += 1

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

    def _zero_active(self, offset: int, length: int, spare: bool = False) -> None:
        stop = offset + length
        first = -(-offset // BLOCK)
        last = self._whole_blocks_end(stop)
        if first >= last:
            self._write_active([ZEROES[:length]], offset, length, spare)
            return
        head = first * BLOCK - offset
        if head:
            self._write_active([ZEROES[:head]], offset, head, spare)
        with on_layer(Layer.ACTIVE, "zero", offset, length):
            self.active.mark(first, last, ZERO)
        tail = stop - last * BLOCK
        if tail > 0:
            self._write_active([ZEROES[:tail]], last * BLOCK, tail, spare)

    def _whole_blocks_end(self, stop: int) -> int:
        """The block after the last one that ends at or before `stop`; the disk's last block is whole at its end."""
        return -(-stop // BLOCK) if stop == self.size else stop // BLOCK

    def _write_active(self, pieces: Sequence[Buffer], offset: int, length: int, spare: bool = False) -> None:
        """Write into active; blocks that get only a part are completed from what is visible. `spare`: the disk has it
        already, so nothing is done to find room. `top` is held."""
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
        if self.room.tests:
            self.room.keep(self.active, first, last)
        try:
            self.active.data.write(pieces, offset)
        except DiskError as error:
            if spare:
                raise
            if error.full and self.committing:
                self._settle(pieces, offset, length)
                return
            self.room.write_again(self.active, Layer.ACTIVE, pieces, offset, length, error)
        pause("guest-write.before-mark")
        self.active.mark(first, last, DATA)
        if self.active.data_blocks >= self.active.watch_at:
            self.room.grown(self.active)

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
        # What is let go of here may be all there is of what the guest has flushed.
        self._flush_below()
        self.hidden.forget(first, last)
        self.active.forget(first, last)

    def _held_as_data(self, first: int, last: int) -> bool:
        return all(state is DATA for _, _, state in self.active.held(first, last))

    # -- guest face after failover -------------------------------------------------------------------------

    def write_over(self, data: memoryview, offset: int, shelter: bool) -> None:
        """A guest write during or after a failed commit: blocks held above go to active, the others to the disk. With
        `shelter` (during a commit) either goes to the other as well: what is held to the disk, so that what came down
        need not come down again, and what is not to active, while it has room, because the disk may not keep it; a
        block that the disk does not take goes to active alone.

        For FUA `flush_top` must follow. The disk does not get the flag: that what the commit has brought down could not
        be made stable would be told to this write, and sheltering it would be the end of that."""

        def below(start: int, end: int) -> None:
            self.disk.write([data[start - offset : end - offset]], start)

        def above(start: int, end: int, spare: bool) -> None:
            self._write_active([data[start - offset : end - offset]], start, end - start, spare)

        self._over(offset, len(data), shelter, "write", below, above)

    def zero_over(self, offset: int, length: int, may_trim: bool, shelter: bool) -> None:
        """Zeroes from the guest during or after a failed commit; as write_over."""

        def below(start: int, end: int) -> None:
            self.disk.zero(start, end - start, may_trim)

        def above(start: int, end: int, spare: bool) -> None:
            self._zero_active(start, end - start, spare)

        self._over(offset, length, shelter, "zero", below, above)

    def _over(
        self,
        offset: int,
        length: int,
        shelter: bool,
        operation: str,
        below: Callable[[int, int], None],
        above: Callable[[int, int, bool], None],
    ) -> None:
        """Change a range of the disk by `below(start, stop)`, or in active by `above(start, stop, spare)`, or both."""
        held = self._hold(self.top, offset, length)
        try:
            for start, end, is_held in self._held_above(offset, offset + length):
                try:
                    if not is_held:
                        self._over_disk(start, end, shelter, operation, below, above)
                    else:
                        above(start, end, False)
                        if shelter:
                            self._through(start, end, below)
                finally:
                    self.descent.written(start, end)
        finally:
            self.top.release(held)

    def _over_disk(
        self,
        start: int,
        end: int,
        shelter: bool,
        operation: str,
        below: Callable[[int, int], None],
        above: Callable[[int, int, bool], None],
    ) -> None:
        """Change a part that is on the disk alone."""
        try:
            with on_layer(Layer.SECONDARY, operation, start, end - start):
                below(start, end)
        except LayerError:
            if not shelter:
                raise
            above(start, end, False)
            self.descent.spoilt(start, end)
        else:
            # Until a flush has covered it. Without room there the disk alone has it, as in stage done.
            if shelter:
                with contextlib.suppress(DiskError):
                    above(start, end, True)

    def _through(self, start: int, end: int, below: Callable[[int, int], None]) -> None:
        """Change the disk as active was; what it does not take comes down again."""
        try:
            below(start, end)
        except DiskError:
            self.descent.spoilt(start, end)

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

    def settle(self, disk: bool) -> None:
        """With durability=power, at the start of a process: what a killed one has left behind in memory becomes stable,
        because from here on it is taken for that. `disk`: also what it has committed. LayerError."""
        for overlay, layer in ((self.hidden, Layer.HIDDEN), (self.active, Layer.ACTIVE)):
            with on_layer(layer, "sync", 0, 0):
                overlay.settle()
        if disk:
            flush_secondary(self.disk)

    # -- all of it -----------------------------------------------------------------------------------------

    def _hold(self, lock: RangeLock, offset: int, length: int) -> Range:
        """Take the whole blocks of a range."""
        return lock.acquire(offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK)

    def check_images(self) -> None:
        """LayerError when an overlay was truncated, removed or replaced while in use: emptying it would not last, or
        would kill the process where its mapping has lost its file. Or when its bits have no room."""
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
        """After `empty`: the images hold nothing either, with durability=power on stable storage. LayerError; the
        caller then calls `fail`."""
        for overlay, layer in ((self.active, Layer.ACTIVE), (self.hidden, Layer.HIDDEN)):
            with on_layer(layer, "make-empty", 0, self.size):
                overlay.check_emptied()
        if not self.power:
            return
        for overlay, layer in ((self.active, Layer.ACTIVE), (self.hidden, Layer.HIDDEN)):
            with on_layer(layer, "make-empty", 0, self.size):
                overlay.publish(overlay.unpublished())

    def flush_top(self) -> None:
        """Make stable what the guest was answered for, wherever it is."""
        with on_layer(Layer.ACTIVE, "flush", 0, 0):
            if self.power:
                self._top_sync.run()
            else:
                self.active.flush()
        if self.committing:
            self._flush_below()

    def _flush_below(self) -> None:
        """Flush the disk, during a commit."""
        with self._flushing:
            try:
                flush_secondary(self.disk)
            except LayerError as error:
                if not error.still_waiting:
                    self._unflushed = error
                raise

    def lost_below(self, error: DiskError) -> None:
        """The disk has lost what was not flushed: a commit that is under way fails, and the next one brings it down
        again."""
        self._unflushed = error

    def flush_committed(self) -> None:
        """Make stable what came down, and let go of it. DiskError, also when a flush for the guest has failed since the
        commit began: then everything stays where it is."""
        self.descent.begin_flush()
        self._flush_below()
        if self._unflushed is not None:
            raise self._unflushed.again()
        self.descent.let_go()
        if self.power:
            # The overlays hold it no longer; with durability=power they must say so themselves.
            self.flush_top()

    @property
    def settled(self) -> bool:
        """At the end of a commit: whether the disk has everything, and what it had when it was flushed last is
        stable."""
        return self._unflushed is None and self.descent.whole

    def flush_all(self) -> None:
        """Make everything stable: overlays and disk."""
        self.flush_top()
        if not self.power:
            with on_layer(Layer.HIDDEN, "flush", 0, 0):
                self.hidden.flush()
        self.target.flush()

    def fail(self, failure: DiskError) -> None:
        """Nothing can be made stable any more, because it is not known what is; with durability=process, nothing can be
        made to outlive the process."""
        if not self.power:
            self.active.refuse(failure)
            self.hidden.refuse(failure)
        self._top_sync.fail(failure)
        self.target.fail(failure)

    def _sync_top(self) -> None:
        # Active's words first: what they say is gone is gone from hidden, too, so hidden's must not be older.
        above = self.active.unpublished()
        if self.committing:
            below = self.hidden.unpublished()
            self.active.data.flush()
            self.hidden.data.flush()
            self.hidden.publish(below)
        else:
            self.active.data.flush()
        self.active.publish(above)

    def prepare_growth(self, size: int) -> None:
        """Make what the overlays need for a disk of `size` bytes. ConfigError, with nothing changed; else `grow` or
        `drop_growth` is to follow."""
        try:
            for overlay in (self.active, self.hidden):
                if overlay.layout.size < image_size(size):
                    overlay.prepare_growth(size)
                    self._growing.append(overlay)
        except BaseException:
            self.drop_growth()
            raise

    def copy_words(self, ahead: bool = False) -> None:
        """Have the larger images hold what the overlays do. The gate is closed from here to `grow`; but for what takes
        long, `ahead` of that. DiskError."""
        if ahead and self.power:
            self.flush_top()
            self.target.settle_hidden()
        for overlay in self._growing:
            overlay.copy_words(ahead)

    def grow(self, size: int) -> None:
        """The disk has `size` bytes. What is held of it is the last checkpoint still, and behind the former end that is
        what the disk has there now: from here on target writes preserve it. DiskError: for the next process the
        overlays may be those of the former size."""
        growing, self._growing = self._growing, []
        self.size = size
        self.target.grow(size)
        self.descent.grow(size)
        failure: DiskError | None = None
        for overlay in growing:
            try:
                overlay.grow()
            except DiskError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    @property
    def fits(self) -> bool:
        """Whether the overlays are as large as the disk: else the next process makes them so."""
        overlays = (self.active, self.hidden)
        return all(one.layout.size >= image_size(self.size) and not one.misplaced for one in overlays)

    def drop_growth(self) -> None:
        """Nothing comes of it."""
        growing, self._growing = self._growing, []
        for overlay in growing:
            overlay.drop_growth()

    def close(self) -> None:
        """Let go of the overlays; the disk belongs to whoever opened it."""
        self.active.close()
        self.hidden.close()


def _clear(part: memoryview) -> None:
    for at in range(0, len(part), len(ZEROES)):
        end = min(at + len(ZEROES), len(part))
        part[at:end] = ZEROES[: end - at]
