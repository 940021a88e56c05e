# SPDX-License-Identifier: BSD-3-Clause
"""The primary half: its disks, their links to the secondary, barriers, and what is sent again after a restart."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from replication.backlog import Budget, Entry
from replication.changes import ChangeMap
from replication.errors import CommandError, ConfigError, DiskError
from replication.fault import Case, Fault
from replication.forward import Forwarder, LinkState
from replication.image.connection import Connection
from replication.image.disk import open_disk
from replication.image.face import Disk
from replication.log import log
from replication.options import check_uri, export_of
from replication.pause import pause
from replication.primary_disk import PrimaryDisk
from replication.resync import Resync
from replication.secondary_disk import SecondaryDisk, closed_face
from replication.side import FOR_GUESTS, GUEST_DISK, Face, Setting, Side, disk_list
from replication.stage import Mode, Stage
from replication.state import StateError

_RETRY_S = 0.2
_RESYNC_S = 30.0
"""Longest wait of a barrier for what is still missing."""

_REPAIRED_BY_RESYNC = (Case.FORWARD, Case.LINK, Case.PRIMARY_DISK)
"""Errors that end when nothing is missing any more; of case 1 only a resync latches one."""

_STOP_S = 3.0
"""At the end of the process the queue is sent for at most this long; what is left is in the change map."""


class PrimarySide(Side):
    """All disks of a primary."""

    mode = Mode.PRIMARY

    def __init__(self, setting: Setting) -> None:
        self._set = setting
        self.disks: list[PrimaryDisk] = []
        self._closing = threading.Event()
        self._resuming: threading.Thread | None = None
        self._budget = Budget(setting.options.queue_limit)
        self._resync = Resync(self.disks, setting.jobs, self._unreadable, self._repaired)
        # Protects the size of an export that only forwards. Held while connecting for it, by intent.
        self._sizing = threading.Lock()

    @property
    def _uri(self) -> str | None:
        return self._set.record.secondary or self._set.options.secondary

    # -- opening -------------------------------------------------------------------------------------------

    def open(self) -> None:
        options, state, record = self._set.options, self._set.state, self._set.record
        locals_: list[Disk | None] = []
        try:
            for disk in options.disks:
                locals_.append(None if disk.location is None else open_disk(disk.name, disk.location))
            sizes = {
                disk.name: record.disks.get(disk.name, 0) if local is None else local.size
                for disk, local in zip(options.disks, locals_, strict=True)
            }
            if record.disks and record.disks != sizes:
                raise ConfigError(
                    f"the state folder {options.state} is of the disks {disk_list(record.disks)}, "
                    f"but these are {disk_list(sizes)}"
                )
            record.disks = {name: size for name, size in sizes.items() if size}
            for disk, local in zip(options.disks, locals_, strict=True):
                # The maps last: a start that is refused because of a disk has made none.
                path = None if local is None else state.map_file(disk.name, "changes")
                changes = ChangeMap(path, max(sizes[disk.name], 1))
                self._add(disk.name, disk.top_id, local, changes, sizes[disk.name])
                if record.cut_off:
                    changes.mark_all()  # neither what it said nor what the disk had not flushed is known any more
        except BaseException:
            for local in locals_[len(self.disks) :]:
                if local is not None:
                    local.close()
            self._let_go()
            raise

    def adopt(self, promoted: Sequence[SecondaryDisk]) -> None:
        """Instead of `open`: go on with the disks of a promoted secondary, and with what it knows of their changes."""
        for disk in promoted:
            self._add(disk.name, disk.top_id, disk.disk, disk.changes, disk.size)

    def _add(self, name: str, top_id: str | None, local: Disk | None, changes: ChangeMap, size: int) -> None:
        forwarder = Forwarder(
            name,
            self._budget,
            self._set.options.timeout_s,
            partial(self._forward_failed, name),
            lambda link: self._set.hub.emit("REPLICATION_LINK", state=link.value),
        )
        disk = PrimaryDisk(name, local, changes, forwarder, self._set.faults, self._set.options.sync)
        disk.size = size
        disk.top_id = top_id
        self.disks.append(disk)

    def launch(self) -> None:
        self._resync.start()
        if self._set.record.stage is Stage.RUNNING:
            self._resuming = threading.Thread(target=self._resume, name="resume", daemon=True)
            self._resuming.start()

    def show_stage(self, stage: Stage) -> None:
        for disk in self.disks:
            disk.stage = stage

    def size_of(self, disk: PrimaryDisk) -> int:
        """The size that the export has; asked of the secondary where there is no local disk. DiskError when it
        cannot be reached."""
        if not disk.size:
            with self._sizing:
                if not disk.size:
                    connection = self._connect(disk, self._uri)
                    self._learn_size(disk, connection.size)
                    connection.close()
        return disk.size

    def _learn_size(self, disk: PrimaryDisk, size: int) -> None:
        if not disk.size:
            disk.changes.close()
            disk.changes = ChangeMap(None, size)
            disk.size = size
            self._set.record.disks[disk.name] = size

    def _connect(self, disk: PrimaryDisk, uri: str | None) -> Connection:
        """A connection to the target face; DiskError names what is wrong."""
        if uri is None:
            raise DiskError("there is no secondary: give the key secondary=URI or the argument 'secondary'")
        export = None if export_of(uri) else disk.name
        connection = Connection(uri, export, self._set.options.timeout_s)
        try:
            self._check(disk, connection)
        except DiskError:
            connection.close()
            raise
        return connection

    @staticmethod
    def _check(disk: PrimaryDisk, connection: Connection) -> None:
        """DiskError unless the export can be the target face of the disk."""
        uri = connection.uri
        if connection.read_only or not (connection.can_zero and connection.can_flush and connection.can_fua):
            raise DiskError(f"{uri} is read-only or lacks write-zeroes, flush or FUA: it is no secondary")
        if connection.description in FOR_GUESTS:
            # A primary (the old one, or this very process), or the wrong face: that guest's writes would be lost.
            raise DiskError(f"{uri} is no secondary, but a guest writes there ({connection.description})")
        if disk.size and connection.size != disk.size:
            raise DiskError(
                f"disk '{disk.name}' has {disk.size} bytes here, but {connection.size} on the secondary {uri}"
            )

    @staticmethod
    def _check_open(connection: Connection) -> None:
        """DiskError when the secondary has failed over, or was promoted: it takes nothing from anybody."""
        block = memoryview(bytearray(connection.block_size))
        try:
            connection.wait(connection.issue(lambda handle, done: handle.aio_pread(block, 0, done), 0))
        except DiskError as error:
            if error.errno == errno.ESHUTDOWN:
                raise DiskError(
                    f"{connection.uri} has failed over or was promoted: it is nobody's secondary"
                ) from error
            if connection.dead:
                raise
            # A server that cannot be read may still be written to: what else is wrong shows with the first write.

    # -- commands ------------------------------------------------------------------------------------------

    def start(self, secondary: str | None, sync: str) -> None:
        if sync == "full" and any(disk.local is None for disk in self.disks):
            raise CommandError("Parameter 'sync' does not accept value 'full': there is no local disk to send")
        if secondary is not None:
            try:
                check_uri(secondary, len(self.disks))
            except ConfigError as error:
                raise CommandError(f"Parameter 'secondary': {error}") from error
        uri = secondary or self._uri
        connections: list[Connection] = []
        try:
            for disk in self.disks:
                connections.append(self._connect(disk, uri))
                self._check_open(connections[-1])
        except DiskError as error:
            for connection in connections:
                connection.close()
            raise CommandError(f"cannot start: {error}") from error
        record = self._set.record
        former = record.secondary
        try:
            pause("start.connected")
            with self._set.gate.closed():
                record.secondary = secondary or former
                for disk, connection in zip(self.disks, connections, strict=True):
                    self._learn_size(disk, connection.size)
                if sync == "full":
                    # Before the stage is saved: a process killed in between must not forget it.
                    for disk in self.disks:
                        disk.changes.mark_all()
                self._set.enter(Stage.RUNNING)
                # The start counts as a checkpoint, as it does on the secondary, so that both count alike.
                self._set.state.count_epoch(0.0)
                pause("start.entered")
                self._set.faults.clear()
                for disk in self.disks:
                    # Only after the stage is saved: a process killed in between sends some grains for nothing, the
                    # other way round it would forget what it has recorded.
                    if sync == "none" or disk.local is None:
                        disk.changes.clear()
                for disk, connection in zip(self.disks, connections, strict=True):
                    disk.forwarder.adopt(connection)
        except BaseException:
            record.secondary = former
            for connection in connections:
                connection.close()
            raise
        self._resync.start()
        self._resync.now()

    def checkpoint(self) -> None:
        """A barrier: every write answered before it is on the secondary's disk when it returns."""
        if self._set.record.stage is not Stage.RUNNING:
            raise CommandError("Block replication is not running")
        if self._resuming is not None:
            self._resuming.join(self._set.options.timeout_s)
        begun = time.monotonic()
        complete = self._barrier()
        if not complete and any(disk.forwarder.up and disk.local is not None for disk in self.disks):
            # Something was refused a while ago, or a resync is under way.
            self._resync.complete(_RESYNC_S)
            complete = self._barrier()
        if not complete:
            raise CommandError(self._why_incomplete())
        self._set.state.count_epoch(time.monotonic() - begun)
        self._set.faults.clear(lambda fault: fault.case in _REPAIRED_BY_RESYNC)

    def _repaired(self) -> None:
        """A pass of the resync has ended."""

        def nothing_missing(fault: Fault) -> bool:
            return fault.case in _REPAIRED_BY_RESYNC and all(
                disk.forwarder.up and not disk.changes.missing for disk in self.disks
            )

        self._set.faults.clear(nothing_missing)

    def _barrier(self) -> bool:
        """Wait for all that was answered; whether the secondaries' disks have it."""
        with self._set.gate.closed():
            # The gate makes it one instant for all disks; the waiting happens outside.
            barriers = [disk.begin_barrier() for disk in self.disks]
        arrived = [disk.finish_barrier(barrier) for disk, barrier in zip(self.disks, barriers, strict=True)]
        return all(arrived)  # all of them are awaited, whatever the first one says

    def _why_incomplete(self) -> str:
        fault = self._set.faults.fault
        cause = "the link is not up" if fault is None else fault.desc
        if fault is None and all(disk.forwarder.up for disk in self.disks):
            cause = "it is being sent"
        lacking = next((disk for disk in self.disks if disk.changes.marked_bytes), self.disks[0])
        return (
            f"The secondary lacks {lacking.changes.marked_bytes} bytes of disk '{lacking.name}' ({cause}); "
            "a resync is needed"
        )

    def stop(self, failover: bool, force: bool) -> None:
        with self._set.gate.closed():
            self._set.enter(Stage.DONE)
        for disk in self.disks:
            disk.forwarder.stop(self._set.options.timeout_s)

    def retry(self, force: bool) -> None:
        raise AssertionError("a primary is never in stage failover-failed")

    def query_failover(self) -> dict[str, Any]:
        raise CommandError("This is a primary: failover is a matter of its secondary")

    # -- link ----------------------------------------------------------------------------------------------

    def _forward_failed(self, name: str, entry: Entry | None, error: DiskError) -> None:
        if entry is None:
            self._set.faults.report(Case.LINK, name, "link", 0, 0, error)
            return
        if entry.length:
            # Noted before it is told, so that a resync which ends at this moment does not take it for repaired.
            next(disk for disk in self.disks if disk.name == name).changes.mark(entry.offset, entry.length)
        self._set.faults.report(Case.FORWARD, name, entry.kind.value, entry.offset, entry.length, error)
        if error.errno != errno.ESHUTDOWN:  # or it has failed over, for good
            self._resync.request()

    def _unreadable(self, disk: PrimaryDisk, error: DiskError) -> None:
        self._set.faults.report(Case.PRIMARY_DISK, disk.name, "resync", 0, 0, error)

    def _resume(self) -> None:
        """After a restart in `running`: connect again, and send what had not arrived when the former process ended."""
        deadline = time.monotonic() + self._set.options.timeout_s
        for disk in self.disks:
            disk.forwarder.note(LinkState.CONNECTING)
            while not self._closing.is_set():
                try:
                    disk.forwarder.adopt(self._connect(disk, self._uri))
                    break
                except DiskError as error:
                    if time.monotonic() > deadline:
                        disk.forwarder.note(LinkState.LOST)
                        self._forward_failed(disk.name, None, error)
                        break
                self._closing.wait(_RETRY_S)
            if disk.local is None and disk.forwarder.up and disk.changes.missing:
                why = "writes that were answered before the restart may be missing, and there is no local disk"
                self._forward_failed(disk.name, None, DiskError(why))
        self._resync.now()

    # -- the rest ------------------------------------------------------------------------------------------

    def query(self) -> dict[str, Any]:
        states = {disk.forwarder.state for disk in self.disks}
        worst = next(state for state in (LinkState.LOST, *LinkState) if state in states)
        return {
            "consistent": True,
            "link": {"state": worst.value, "secondary": self._uri},
            "disks": [
                {
                    "name": disk.name,
                    "size": disk.size,
                    "forward-queue-bytes": disk.forwarder.queue_bytes,
                    "out-of-sync-bytes": disk.changes.marked_bytes,
                    "totals": {
                        "read": disk.bytes_read,
                        "written": disk.bytes_written,
                        "forwarded": disk.forwarder.bytes_forwarded,
                    },
                }
                for disk in self.disks
            ],
        }

    def faces(self) -> dict[str, Face]:
        shown = {}
        for disk in self.disks:
            what = GUEST_DISK if disk.local is not None else "writes for the secondary"
            face = Face(what, partial(self.size_of, disk), disk.read, disk.write, disk.zero, disk.flush, disk.extents)
            if self._set.record.promoted and disk.top_id is not None:
                # The guest goes on over the export that it has. The other one stays closed: the old primary knows it.
                shown[disk.top_id] = face
                shown[disk.name] = closed_face(disk.name, disk.size)
            else:
                shown[disk.name] = face
        return shown

    @property
    def default(self) -> str:
        return "" if self._set.record.promoted and self.disks[0].top_id is not None else self.disks[0].name

    def close(self) -> None:
        self._closing.set()
        deadline = time.monotonic() + _STOP_S
        if self._resuming is not None:
            self._resuming.join(_STOP_S)
        self._resync.stop(max(0.0, deadline - time.monotonic()))
        for disk in self.disks:
            disk.forwarder.stop(max(0.0, deadline - time.monotonic()))
        if self._set.record.stage is not Stage.NONE:
            try:
                for disk in self.disks:
                    if disk.local is not None:
                        disk.local.flush()
                    disk.changes.flush()
                self._set.record.clean = True
                self._set.save()
            except (DiskError, StateError) as error:
                log(f"not everything is on stable storage: {error}")
        self._let_go()

    def _let_go(self) -> None:
        for disk in self.disks:
            disk.close()
