# SPDX-License-Identifier: BSD-3-Clause
"""One disk of a primary: local I/O, and everything written goes to the secondary as well.

Who decides when two requests meet on one block
-----------------------------------------------
write, write
    A range lock over whole 4 KiB blocks, first come first served, held from the change map's mark over the local
    write to the entry in the forward queue: the queue has overlapping writes in the order of the local disk.
write, read
    No lock: the read gets the old or the new content, as from any disk.
write, resync
    The resync takes the same range lock while it reads a grain and queues it.
barrier, resync
    `_order`: a barrier finds a range still missing, or its data in the queue before the barrier's flush.
write, stop or start
    The gate (in node.py).

In which order things happen to one write, and what a kill in between leaves: marked in the change map, then written
locally, then queued (async) or queued, written locally and awaited (sync), then answered. Whatever was not answered
by the secondary is still marked.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import NamedTuple

from replication.backlog import ZERO_MAX, Entry, Kind
from replication.changes import ChangeMap
from replication.errors import DiskError
from replication.fault import Case, FaultLatch
from replication.forward import Forwarder
from replication.image.connection import CHUNK
from replication.image.face import Disk, Extent
from replication.image.qcow2 import BLOCK
from replication.pause import pause
from replication.rangelock import RangeLock
from replication.stage import Stage


class Barrier(NamedTuple):
    """A flush in the queue, None without a link, and whether the secondary lacked something when it was queued."""

    entry: Entry | None
    lacking: bool


class PrimaryDisk:
    """The guest's disk. `local` is None where the export only forwards."""

    def __init__(
        self,
        name: str,
        local: Disk | None,
        changes: ChangeMap,
        forwarder: Forwarder,
        faults: FaultLatch,
        sync: bool,
    ) -> None:
        self.name = name
        self.local = local
        self.changes = changes
        self.forwarder = forwarder
        self._faults = faults
        self._sync = sync
        self.stage = Stage.NONE
        """Set by the node while the gate is closed."""
        self.size = local.size if local is not None else 0
        self.top_id: str | None = None
        """The export that the guest of a promoted secondary uses."""
        self.ranges = RangeLock()
        # What is missing and what is queued behind it: a barrier may not pass between a resend's taking a range off the
        # one and putting it on the other. Never held across I/O.
        self._order = threading.Lock()
        self.bytes_read = 0
        self.bytes_written = 0

    # -- reads ---------------------------------------------------------------------------------------------

    def read(self, buffer: memoryview, offset: int) -> None:
        """Local; an export that only forwards has nothing to read (as QEMU's primary, whose quorum reads elsewhere)."""
        local = self._readable()
        self._tell("read", offset, len(buffer), lambda: local.read(buffer, offset))
        self.bytes_read += len(buffer)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """What the local disk knows about its content."""
        return self._readable().extents(offset, length)

    def _readable(self) -> Disk:
        if self.local is None:
            raise DiskError(f"disk '{self.name}' only forwards writes and cannot be read", errno.EIO)
        return self.local

    def _tell(self, operation: str, offset: int, length: int, action: Callable[[], None]) -> None:
        """Local I/O: its failure is the guest's to know (case 1), and an event's."""
        try:
            action()
        except DiskError as error:
            self._faults.tell(Case.PRIMARY_DISK, self.name, operation, offset, length, error)
            raise

    # -- writes --------------------------------------------------------------------------------------------

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Write locally and forward."""
        entries = [
            Entry(Kind.WRITE, offset + at, min(CHUNK, len(data) - at), fua=fua and self._sync, waited_for=self._sync)
            for at in range(0, len(data), CHUNK)
        ]
        for entry in entries:
            entry.load(data[entry.offset - offset : entry.offset - offset + entry.length])

        def locally(local: Disk) -> None:
            local.write([data], offset, fua)

        self._change("write", offset, len(data), entries, locally)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Zero locally and forward. Trim comes here, too: both disks must read the same afterwards."""
        entries = [
            Entry(
                Kind.ZERO,
                offset + at,
                min(ZERO_MAX, length - at),
                fua=fua and self._sync,
                may_trim=may_trim,
                waited_for=self._sync,
            )
            for at in range(0, length, ZERO_MAX)
        ]

        def locally(local: Disk) -> None:
            local.zero(offset, length, may_trim, fua)

        self._change("zero", offset, length, entries, locally)

    def flush(self) -> None:
        """Make stable what the guest was answered for: on the local disk, and with protocol=sync on the
        secondary. With async the secondary's disk is flushed by barriers."""
        if self.local is not None:
            self._tell("flush", 0, 0, self.local.flush)
        elif self.stage is not Stage.RUNNING:
            raise self._not_running()
        if self._sync and self.stage is Stage.RUNNING:
            self.finish_barrier(self.begin_barrier())

    def _change(
        self, operation: str, offset: int, length: int, entries: list[Entry], locally: Callable[[Disk], None]
    ) -> None:
        local = self.local
        if self.stage is not Stage.RUNNING:
            if local is None:
                raise self._not_running()
            # Not forwarded, but remembered for the resync of the next pair.
            self.changes.mark(offset, length)
            self._tell(operation, offset, length, lambda: locally(local))
            self.bytes_written += length
            return
        held = self.ranges.acquire(offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK)
        try:
            self._change_held(operation, offset, length, entries, locally)
        finally:
            self.ranges.release(held)
        if self._sync:
            for entry in entries:
                self.forwarder.await_end(entry)
        self.bytes_written += length

    def _change_held(
        self, operation: str, offset: int, length: int, entries: list[Entry], locally: Callable[[Disk], None]
    ) -> None:
        """One write in `running`, with its range held: mark, write, queue."""
        local = self.local
        for entry in entries:
            entry.on_end = self._ended
            self.changes.begin(entry.offset, entry.length)
        queued = self.forwarder.reserve(entries)
        if not queued:
            # Without a link the mark is all that remains of the write.
            _end(entries)
        pause("primary-write.marked")
        if queued and self._sync:
            # Both sides work at the same time; the answer waits for the slower, and so does the mark: a process killed
            # when the secondary has it and the local disk does not must send it again.
            self.changes.begin(offset, length)
            self._put(entries)
        try:
            if local is not None:
                self._tell(operation, offset, length, lambda: locally(local))
        except BaseException:
            # The guest knows that the content is undefined now. The two sides may differ, so it stays marked.
            self.changes.mark(offset, length)
            if queued and self._sync:
                self.changes.end(offset, length, False)
            elif queued:
                self.forwarder.unreserve(entries)
                _end(entries)
            raise
        pause("primary-write.written")
        if queued and self._sync:
            self.changes.end(offset, length, True)
        elif queued:
            self._put(entries)

    def _put(self, entries: list[Entry]) -> None:
        for entry in entries:
            self.forwarder.put(entry)

    def _ended(self, entry: Entry) -> None:
        self.changes.end(entry.offset, entry.length, entry.arrived)

    def _not_running(self) -> DiskError:
        return DiskError(f"disk '{self.name}' only forwards, and replication is not running", errno.EIO)

    # -- barrier and resync --------------------------------------------------------------------------------

    def begin_barrier(self) -> Barrier:
        """Queue a flush behind everything answered so far."""
        entry = Entry(Kind.FLUSH, waited_for=True)
        if not self.forwarder.reserve([entry]):
            return Barrier(None, True)
        with self._order:
            lacking = self.changes.missing
            self.forwarder.put(entry)
        return Barrier(entry, lacking)

    def finish_barrier(self, barrier: Barrier) -> bool:
        """Wait for a barrier; whether everything that was answered before it is on the secondary's disk."""
        arrived = barrier.entry is not None and self.forwarder.await_end(barrier.entry)
        return arrived and not barrier.lacking and not self.changes.missing

    def resend(self, offset: int, length: int, on_end: Callable[[Entry], None]) -> bool:
        """Queue a range as it is now, because the secondary lacks something of it; False without a link."""
        assert self.local is not None

        def ended(entry: Entry) -> None:
            self._ended(entry)
            on_end(entry)

        held = self.ranges.acquire(offset, offset + length)
        try:
            entry = Entry(Kind.WRITE, offset, length, on_end=ended)
            data = bytearray(length)
            self.local.read(memoryview(data), offset)
            entry.load(memoryview(data))
            if not self.forwarder.reserve([entry]):
                return False
            with self._order:
                self.changes.begin(offset, length, repair=True)
                self.forwarder.put(entry)
            return True
        finally:
            self.ranges.release(held)

    def close(self) -> None:
        """Let go of the disk."""
        if self.local is not None:
            self.local.close()
        self.changes.close()


def _end(entries: list[Entry]) -> None:
    """End entries that were not put."""
    for entry in entries:
        entry.end(False)
