# SPDX-License-Identifier: BSD-3-Clause
"""One disk of a primary: local I/O, and everything written goes to the secondary as well.

Who decides when two requests meet on one block
-----------------------------------------------
write, write
    A range lock over whole 4 KiB blocks, first come first served, held from the change map's mark over the local
    write to the entry in the forward queue: the queue has overlapping writes in the order of the local disk.
write, read
    No lock: the read gets the old or the new content, as from any disk.
write, resync or check
    The resync takes the same range lock while it reads a grain and queues it, a comparison (verify.py) while it reads a
    range and queues the question what the secondary has there.
barrier or cut, resync
    `_order`: a barrier or a cut finds a range still missing, or its data in the queue in front of itself.
write, cut
    The queue (forward.cut): a write is in its queue before it is answered, so what the guest wrote in the knowledge of
    an answer is never in an earlier epoch than what was answered.
write, stop or start
    The gate (in node.py).

In which order things happen to one write, and what a kill in between leaves: marked in the change map, then written
locally, then queued (async) or queued, written locally and awaited (sync), then answered. Whatever was not answered
by the secondary is still marked.

The mark of a write ends when its entry does (async), or when the guest's thread goes on (sync): half the work, and the
forwarding thread has less to do while the guest waits. What the secondary did not get is marked as missing before
anybody is told of its end in either case, so that a barrier behind it finds that. Towards a plain NBD server, of which
nobody knows whether it was started anew, a flush that was sent after that has to succeed as well.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Final, NamedTuple

from replication.disk.face import EXTENTS_MAX, Disk, Extent
from replication.disk.unflushed import Loss, Unflushed
from replication.errors import DiskError
from replication.fault import Case, FaultLatch
from replication.image.buffers import Buffers
from replication.image.qcow2 import BLOCK
from replication.order.latency import CHECKPOINT, LINK_LOST, RESYNC, SECONDARY, SLOW_SECONDARY, VERIFY, Latency
from replication.order.pause import pause
from replication.order.rangelock import RangeLock
from replication.primary.backlog import DATA_MAX, FLIGHT_MAX, FLUSH, WRITE, ZERO, Entry, cost
from replication.primary.content import ZERO_RUN_MAX, known_zeroes, what_can_be_read, what_is_read
from replication.primary.forward import Forwarder
from replication.record.ancestry import Ancestry
from replication.record.changes import ChangeMap
from replication.stage import Stage

_SPARE = 2 * FLIGHT_MAX
"""Bytes of memory for large entries that are kept for the next ones: a flight comes back almost at once while the next
is being filled. (With 4 MiB a third of 256k writes found none.)"""


_RUNNING: Final = Stage.RUNNING


class Barrier(NamedTuple):
    """A flush in the queue, which without a link has ended already, and whether the secondary lacked something when it
    was queued."""

    entry: Entry
    lacking: bool


class Checked(Enum):
    """What has become of a question to the secondary."""

    QUEUED = "queued"
    LACKING = "lacking"
    """It is known that the secondary lacks something of the range."""
    WRITTEN = "written"
    """The range is not known to be zeroes any more."""
    UNSENT = "unsent"
    """There is no link, or replication does not run."""


class PrimaryDisk:
    """The guest's disk. `local` is None where the export only forwards."""

    def __init__(
        self,
        name: str,
        local: Disk | None,
        changes: ChangeMap,
        forwarder: Forwarder,
        faults: FaultLatch,
        ancestry: Ancestry,
        sync: bool,
    ) -> None:
        self.name = name
        self.local = local
        self.changes = changes
        self.forwarder = forwarder
        self._faults = faults
        self._ancestry = ancestry
        self._sync = sync
        self._on_end = self._keep_missing if sync else self._ended
        self.stage = Stage.NONE
        """Set by the node while the gate is closed."""
        self.size = local.size if local is not None else 0
        self.top_id: str | None = None
        """The export that the guest of a promoted secondary uses."""
        self.left_behind: Callable[[str, int, int, bool], None] = _nobody
        """`left_behind(operation, offset, length, late)` is called when a write was not forwarded although there is a
        link by now; `late`: because the secondary takes too long."""
        self.left_undefined: Callable[[], None] = _nothing
        """Called when the local disk has refused a change: nobody knows what either disk holds there, and it is
        marked."""
        self.ranges = RangeLock()
        # What is missing and what is queued behind it: a barrier may not pass between a resend's taking a range off the
        # one and putting it on the other. Never held across I/O.
        self._order = threading.Lock()
        # Whether a write of protocol=sync ends first, or who waits for it goes on. Never held across I/O.
        self._leaving = threading.Lock()
        # For the data of large entries; it comes back when the secondary has it.
        self._memory = Buffers(_SPARE)
        self.bytes_read = 0
        self.bytes_written = 0
        self._latency: Latency | None = None

    def attend(self, latency: Latency) -> None:
        """Who is to know what requests wait for here."""
        self._latency = self.ranges.latency = self.forwarder.latency = latency

    def watch(self, account: Unflushed) -> None:
        """Keep account of what of the local disk is unflushed."""
        assert self.local is not None
        account.on_loss = self._lose
        self.local.watch(account)

    def grow(self, size: int) -> None:
        """The disk has `size` bytes from now on, for whoever opens the export anew. The gate is closed."""
        assert self.local is not None
        self.size = self.local.size = size

    def lose_former(self) -> None:
        """Take note of what a former process has left unflushed, where that is lost."""
        account = None if self.local is None else self.local.unflushed
        if self.local is not None and account is not None:
            error = DiskError(
                f"{self.local.location}: a former process has left unflushed writes, and its server may have been "
                "started anew since: some may be gone"
            )
            account.lose(error, all_of_it=not self.local.outlives)

    def _lose(self, loss: Loss) -> bool:
        """The local disk has lost what was not flushed, and the secondary may have it: both shall be equal again, as
        the local disk is. The guest is told by its flush. Called from requests, by the disk."""
        self._ancestry.part()
        for lost in loss.ranges:
            self.changes.mark(*lost)
        offset, length = loss.ranges[0]
        if self.stage is _RUNNING:
            self.left_behind("flush", offset, length, False)
        if not loss.told:  # otherwise the guest has asked, and is told what has become of that
            self._report_lost(offset, length, loss.error)
        return True

    def _report_lost(self, offset: int, length: int, error: DiskError) -> None:
        note = self._faults.report if self.stage is _RUNNING else self._faults.tell
        note(Case.PRIMARY_DISK, self.name, "flush", offset, length, error)

    def settle(self) -> None:
        """Make the local disk stable for the end of this role, or of the process; DiskError, which is reported."""
        if self.local is not None:
            try:
                self.local.flush()
            except DiskError as error:
                self._report_lost(0, 0, error)
                raise

    # -- reads ---------------------------------------------------------------------------------------------

    def read(self, buffer: memoryview, offset: int) -> None:
        """Local; an export that only forwards has nothing to read (as QEMU's primary, whose quorum reads elsewhere)."""
        local = self._readable()
        try:
            local.read(buffer, offset)
        except BaseException as error:
            self._tell_failure("read", offset, len(buffer), error)
            raise
        self.bytes_read += len(buffer)

    def extents(self, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        """What the local disk knows about its content."""
        return self._readable().extents(offset, length, count)

    def _readable(self) -> Disk:
        if self.local is None:
            raise DiskError(f"disk '{self.name}' only forwards writes and cannot be read", errno.EIO)
        return self.local

    def _tell(self, operation: str, offset: int, length: int, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            self._tell_failure(operation, offset, length, error)
            raise

    # -- writes --------------------------------------------------------------------------------------------

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Write locally and forward."""
        length, piece = len(data), self.forwarder.data_piece
        if length <= piece:
            entry = Entry(WRITE, offset, length, self._on_end, self._sync)
            entry.load(data, self._memory)
            entries: Sequence[Entry] = (entry,)
        else:
            entries = [
                Entry(WRITE, offset + at, min(piece, length - at), self._on_end, self._sync)
                for at in range(0, length, piece)
            ]
            for entry in entries:
                part = data[entry.offset - offset : entry.offset - offset + entry.length]
                entry.load(part, self._memory)
        self._change("write", offset, length, fua, entries, (data,), offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Zero locally and forward. Trim comes here, too: both disks must read the same afterwards."""
        piece = self.forwarder.zero_piece
        entries = [
            Entry(ZERO, offset + at, min(piece, length - at), self._on_end, self._sync)
            for at in range(0, length, piece)
        ]
        for entry in entries:
            entry.may_trim = may_trim
        self._change("zero", offset, length, fua, entries, offset, length, may_trim, fua)

    def flush(self) -> None:
        """Make stable what the guest was answered for: on the local disk, and with protocol=sync on the
        secondary. With async the secondary's disk is flushed by barriers."""
        self._ancestry.flush()
        if self.local is not None:
            self._tell("flush", 0, 0, self.local.flush)
        elif self.stage is not _RUNNING:
            raise self._not_running()
        if self._sync and self.stage is _RUNNING and not self.forwarder.behind:
            barrier = self.begin_barrier()
            until = time.monotonic() + self.forwarder.patience_s
            course = None if self._latency is None else self._latency.waiting(SECONDARY, SLOW_SECONDARY)
            try:
                late = not self.forwarder.await_until(barrier.entry, until)
            finally:
                if course is not None:
                    course.go_on(self._why_awaited(course.since_s))
            if late:
                self._fall_behind("flush", 0, 0)

    def _change(
        self, operation: str, offset: int, length: int, fua: bool, entries: Sequence[Entry], *arguments: object
    ) -> None:
        """Change the local disk by its method `operation(*arguments)`, and the secondary's by the entries."""
        if self.stage is not _RUNNING:
            if self.local is None:
                raise self._not_running()
            # Not forwarded, but remembered for the resync of the next pair.
            self.changes.mark(offset, length)
            self._part(fua)
            self._tell(operation, offset, length, lambda: getattr(self.local, operation)(*arguments))
            self.bytes_written += length
            return
        sync, changes, forwarder = self._sync, self.changes, self.forwarder
        until = time.monotonic() + forwarder.patience_s if sync else 0.0
        if fua and sync:
            for entry in entries:
                entry.fua = True
        held = self.ranges.acquire(offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK)
        try:
            for entry in entries:
                changes.begin(entry.offset, entry.length)
            size = entries[0].cost if len(entries) == 1 else cost(entries)
            # Without a local disk nobody could send later what is not sent now.
            queued = forwarder.reserve(size, self.local is None)
            late = not queued and forwarder.up
            if not queued:
                # Without a link the mark is all that remains of the write.
                try:
                    self._part(fua)
                except BaseException:
                    if sync:
                        self._end_marks(entries, False)
                    raise
                finally:
                    _end(entries)
            pause("primary-write.marked")
            if queued and sync:
                # Both sides work at the same time; the answer waits for the slower, and so does the mark: a process
                # killed when the secondary has it and the local disk does not must send it again.
                queued = forwarder.put(*entries)
            try:
                if self.local is not None:
                    getattr(self.local, operation)(*arguments)
            except BaseException as error:
                self._tell_failure(operation, offset, length, error)
                # The guest knows that the content is undefined now. The two sides may differ, so it stays marked until
                # what the local disk has was read and sent.
                changes.mark(offset, length)
                if sync:
                    self._end_marks(entries, False)
                elif queued:
                    forwarder.unreserve(size)
                    _end(entries)
                self.left_undefined()
                raise
            pause("primary-write.written")
            if queued and not sync:
                queued = forwarder.put(*entries)
        finally:
            self.ranges.release(held)
        if sync:
            self._await_end(operation, offset, length, entries, until)
        if not queued and forwarder.up:
            self.left_behind(operation, offset, length, late)
        self.bytes_written += length

    def _await_end(self, operation: str, offset: int, length: int, entries: Sequence[Entry], until: float) -> None:
        """Wait until the secondary has a write of protocol=sync, or will not get it, and end its marks; at `until`
        (seconds, monotonic) the guest goes on, and the marks of what is still on its way end when it does.

        What has not arrived was marked as missing by `_keep_missing`, before the entry ended; so what was sent anew
        since then is not marked a second time here.
        """
        late = False
        course = None if self._latency is None else self._latency.waiting(SECONDARY, SLOW_SECONDARY)
        try:
            for entry in entries:
                if self.forwarder.await_until(entry, until) or not self._leave(entry):
                    self.changes.end(entry.offset, entry.length, True)
                else:
                    late = True
        finally:
            if course is not None:
                course.go_on(self._why_awaited(course.since_s))
        if late and self.forwarder.up:
            self._fall_behind(operation, offset, length)

    def _why_awaited(self, since_s: float) -> str:
        """Why the secondary's answer has been waited for since then (seconds, monotonic)."""
        if not self.forwarder.up:
            return LINK_LOST
        return CHECKPOINT if self.forwarder.let_go_s >= since_s else SLOW_SECONDARY

    def _leave(self, entry: Entry) -> bool:
        """Nobody waits for it any more, so `_keep_missing` ends its mark; False when it has just ended."""
        with self._leaving:
            entry.left = not entry.settled
            return entry.left

    def _fall_behind(self, operation: str, offset: int, length: int) -> None:
        """The secondary has taken too long for what a guest has waited for: nobody waits until it has caught up."""
        self.forwarder.fall_behind()
        self.left_behind(operation, offset, length, True)

    def _end_marks(self, entries: Sequence[Entry], known: bool) -> None:
        for entry in entries:
            self.changes.end(entry.offset, entry.length, known)

    def _tell_failure(self, operation: str, offset: int, length: int, error: BaseException) -> None:
        """Local I/O: its failure is the guest's to know (case 1), and an event's."""
        if isinstance(error, DiskError):
            self._faults.tell(Case.PRIMARY_DISK, self.name, operation, offset, length, error)

    def _part(self, fua: bool) -> None:
        """The other node will not get a write that is about to be made here."""
        self._ancestry.part()
        if fua:
            self._ancestry.flush()

    def _keep_missing(self, entry: Entry) -> None:
        """A write of protocol=sync has ended; who waits for it, if anybody does, ends its mark."""
        if not entry.arrived:
            self._ancestry.part()
            self.changes.mark(entry.offset, entry.length)
        self._leaving.acquire()
        try:
            entry.settled = True
        finally:
            self._leaving.release()
        if entry.left:
            self.changes.end(entry.offset, entry.length, True)

    def _ended(self, entry: Entry) -> None:
        if not entry.arrived:
            self._ancestry.part()
        self.changes.end(entry.offset, entry.length, entry.arrived)

    def _not_running(self) -> DiskError:
        return DiskError(f"disk '{self.name}' only forwards, and replication is not running", errno.EIO)

    # -- barrier, cut and resync ---------------------------------------------------------------------------

    def begin_barrier(self) -> Barrier:
        """Queue a flush behind everything answered so far. Never waits."""
        entry = Entry(FLUSH, waited_for=True)
        # Whoever asks for it waits, so there are few; to wait for room as well would be to do it with the gate closed.
        entry.cost = 0
        with self._order:
            lacking = self.changes.missing
            self.forwarder.put(entry)
        return Barrier(entry, lacking)

    def finish_barrier(self, barrier: Barrier) -> bool:
        """Wait for a barrier; whether everything that was answered before it is on the secondary's disk."""
        arrived = self.forwarder.await_end(barrier.entry)
        return arrived and not barrier.lacking and not self.changes.missing

    @contextmanager
    def still(self) -> Iterator[bool]:
        """In here nothing becomes complete or incomplete by a resend; whether something is missing."""
        with self._order:
            yield self.changes.missing

    def resend(
        self, offset: int, length: int, on_end: Callable[[Entry], None], zeroes: bool = False
    ) -> Sequence[Entry]:
        """Queue the beginning of a range as it is now, because the secondary lacks something of it.

        Returns what was queued: up to DATA_MAX bytes, or with `zeroes` (just seen) up to ZERO_RUN_MAX bytes
        of zeroes if they still are; nothing without a link, or when replication is stopped. The range is whole grains,
        the disk's last may be short. `on_end(entry)` is called when an entry has ended, before the change map has it.
        Unreadable when the local disk cannot be read.
        """
        known = self._resend(offset, min(length, ZERO_RUN_MAX), on_end, known_zeroes) if zeroes else ()
        return known or self._resend(offset, min(length, DATA_MAX), on_end, what_is_read)

    def resend_readable(
        self, offset: int, length: int, on_end: Callable[[Entry], None]
    ) -> tuple[Sequence[Entry], Sequence[tuple[int, int, DiskError]]]:
        """As `resend`, for a range that is Unreadable as a whole: queues what can be read of it. Its grains stay
        marked: the secondary lacks the rest, which is (offset, length, why)."""
        failures: list[tuple[int, int, DiskError]] = []

        def readable(local: Disk, at: int, size: int) -> list[Entry]:
            entries, found = what_can_be_read(local, at, size)
            failures.extend(found)
            return entries

        return self._resend(offset, length, on_end, readable, repair=False), failures

    def _resend(
        self,
        offset: int,
        length: int,
        on_end: Callable[[Entry], None],
        entries_of: Callable[[Disk, int, int], list[Entry]],
        repair: bool = True,
    ) -> Sequence[Entry]:
        assert self.local is not None

        def ended(entry: Entry) -> None:
            on_end(entry)
            self._ended(entry)

        held = self.ranges.acquire(offset, offset + length, RESYNC)
        try:
            self.changes.watch(offset, length)
            if self.stage is not _RUNNING:
                # Looked at behind `watch`: a guest that writes after a stop takes no range lock, but what it marks from
                # now on stays missing.
                return ()
            entries = entries_of(self.local, offset, length)
            if not entries or not self.forwarder.up:
                return ()
            for entry in entries:
                entry.on_end = ended
            with self._order:
                for entry in entries:
                    self.changes.begin(entry.offset, entry.length, repair)
                self.forwarder.put_spare(*entries)
            return entries
        finally:
            self.ranges.release(held)

    def check(self, entry: Entry, content: memoryview | None, missing: bool = False) -> Checked:
        """Read the range of a CHECK entry into `content`, and queue it: what the secondary answers is what it has at
        the place of the stream at which this disk had that content, as far as nothing became missing meanwhile
        (ChangeMap.marks). Without `content` the range is looked at only: it has to be zeroes. `missing`: also what the
        secondary is known to lack. DiskError when the local disk cannot be read."""
        assert self.local is not None
        held = self.ranges.acquire(entry.offset, entry.offset + entry.length, VERIFY)
        try:
            entry.marks = self.changes.marks
            # While replication does not run, a guest's write takes no range lock: one that was marked before may come
            # after what is read here. A start is after it, and whatever is marked after this look shows in `marks`.
            if self.stage is not _RUNNING:
                return Checked.UNSENT
            if not missing and self.changes.lacks(entry.offset, entry.length):
                return Checked.LACKING
            self.local.check_settled(entry.offset, entry.length)
            if content is not None:
                self.local.read(content, entry.offset)
            elif self.local.hole(entry.offset, entry.length) < entry.length:
                return Checked.WRITTEN
            pause("verify.read")
            # Once more: a write that has come since a stop is not in the stream.
            if self.stage is not _RUNNING or not self.forwarder.put_spare(entry):
                return Checked.UNSENT
            return Checked.QUEUED
        finally:
            self.ranges.release(held)

    def close(self) -> None:
        """Let go of the disk."""
        if self.local is not None:
            self.local.close()
        self.changes.close()


def _nobody(_operation: str, _offset: int, _length: int, _late: bool) -> None:
    """Nobody has asked to be told."""


def _nothing() -> None:
    """Nobody has asked to be told."""


def _end(entries: Sequence[Entry]) -> None:
    """End entries that were not put."""
    for entry in entries:
        entry.end(False)
