# SPDX-License-Identifier: BSD-3-Clause
"""The primary half: its disks, their links to the secondary, barriers, and what is sent again after a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from replication.backlog import Budget, Entry
from replication.changes import ChangeMap
from replication.errors import CommandError, ConfigError, DiskError
from replication.fault import Case
from replication.forward import Forwarder, LinkState
from replication.image.connection import Connection
from replication.image.disk import open_disk
from replication.image.face import Disk
from replication.jobs import Job
from replication.log import log
from replication.options import check_uri, export_of
from replication.primary_disk import PrimaryDisk
from replication.side import Setting, Side, disk_list
from replication.stage import Mode, Stage

_RETRY_S = 0.2
_RESEND_PASSES = 3
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
        # Protects the size of an export that only forwards. Held while connecting for it, by intent.
        self._sizing = threading.Lock()

    @property
    def _uri(self) -> str | None:
        return self._set.record.secondary or self._set.options.secondary

    # -- opening -------------------------------------------------------------------------------------------

    def open(self) -> None:
        options, state, record = self._set.options, self._set.state, self._set.record
        budget = Budget(options.queue_limit)
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
                persistent = state.path is not None and local is not None
                path = state.file(f"{disk.name}.changes") if persistent else None
                forwarder = Forwarder(
                    disk.name,
                    budget,
                    options.timeout_s,
                    partial(self._forward_failed, disk.name),
                    lambda link: self._set.hub.emit("REPLICATION_LINK", state=link.value),
                )
                changes = ChangeMap(path, max(sizes[disk.name], 1))
                opened = PrimaryDisk(disk.name, local, changes, forwarder, self._set.faults, options.sync)
                opened.size = sizes[disk.name]
                self.disks.append(opened)
        except BaseException:
            for local in locals_[len(self.disks) :]:
                if local is not None:
                    local.close()
            self.close()
            raise

    def launch(self) -> None:
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
        if connection.read_only or not (connection.can_zero and connection.can_flush and connection.can_fua):
            connection.close()
            raise DiskError(f"{uri} is read-only or lacks write-zeroes, flush or FUA: it is no secondary")
        if disk.size and connection.size != disk.size:
            size = connection.size
            connection.close()
            raise DiskError(f"disk '{disk.name}' has {disk.size} bytes here, but {size} on the secondary {uri}")
        return connection

    # -- commands ------------------------------------------------------------------------------------------

    def start(self, secondary: str | None, sync: str) -> None:
        if sync == "full":
            raise CommandError("Parameter 'sync' does not accept value 'full': a resync is not available")
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
        except DiskError as error:
            for connection in connections:
                connection.close()
            raise CommandError(f"cannot start: {error}") from error
        record = self._set.record
        former = record.secondary
        try:
            with self._set.gate.closed():
                record.secondary = secondary or former
                for disk, connection in zip(self.disks, connections, strict=True):
                    self._learn_size(disk, connection.size)
                self._set.enter(Stage.RUNNING)
                self._set.faults.clear()
                # QEMU's assumption: both disks hold the same now. Only after the stage is saved: a process killed in
                # between sends some grains for nothing, the other way round it would forget what it has recorded.
                for disk in self.disks:
                    disk.changes.clear()
                # The start counts as a checkpoint, as it does on the secondary, so that both count alike.
                self._set.state.begin_epoch()
                self._set.state.end_epoch(0.0)
                for disk, connection in zip(self.disks, connections, strict=True):
                    disk.forwarder.adopt(connection)
        except BaseException:
            record.secondary = former
            for connection in connections:
                connection.close()
            raise

    def checkpoint(self) -> None:
        """A barrier: every write answered before it is on the secondary's disk when it returns."""
        if self._set.record.stage is not Stage.RUNNING:
            raise CommandError("Block replication is not running")
        begun = time.monotonic()
        with self._set.gate.closed():
            # The gate makes it one instant for all disks; the waiting happens outside.
            barriers = [disk.begin_barrier() for disk in self.disks]
        arrived = [disk.finish_barrier(entry) for disk, entry in zip(self.disks, barriers, strict=True)]
        for disk, complete in zip(self.disks, arrived, strict=True):
            if not complete or disk.changes.missing:
                fault = self._set.faults.fault
                cause = "the link is not up" if fault is None else fault.desc
                raise CommandError(
                    f"The secondary lacks {disk.changes.marked_bytes} bytes of disk '{disk.name}' ({cause}); "
                    "a resync is needed"
                )
        self._set.state.begin_epoch()
        self._set.state.end_epoch(time.monotonic() - begun)
        fault = self._set.faults.fault
        if fault is not None and fault.case in (Case.FORWARD, Case.LINK):
            self._set.faults.clear()

    def stop(self, failover: bool) -> None:
        with self._set.gate.closed():
            self._set.enter(Stage.DONE)
        for disk in self.disks:
            disk.forwarder.stop(self._set.options.timeout_s)

    def retry(self) -> None:
        raise AssertionError("a primary is never in stage failover-failed")

    # -- link ----------------------------------------------------------------------------------------------

    def _forward_failed(self, name: str, entry: Entry | None, error: DiskError) -> None:
        if entry is None:
            self._set.faults.report(Case.LINK, name, "link", 0, 0, error)
        else:
            self._set.faults.report(Case.FORWARD, name, entry.kind.value, entry.offset, entry.length, error)

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
        for disk in self.disks:
            if disk.forwarder.up and disk.changes.missing:
                self._resend(disk)

    def _resend(self, disk: PrimaryDisk) -> None:
        if disk.local is None:
            error = DiskError("writes that were answered before the restart may be missing, and there is no local disk")
            self._forward_failed(disk.name, None, error)
            return
        total = disk.changes.marked_bytes
        sent = 0
        arrived = [0]

        def ended(entry: Entry) -> None:
            arrived[0] += entry.length

        job = self._set.jobs.add(Job("resync", disk.name, lambda: max(total, sent), lambda: arrived[0]))
        failure: str | None = None
        try:
            for offset, length in self._missing_of(disk):
                if self._closing.is_set() or disk.stage is not Stage.RUNNING:
                    failure = "replication was stopped"
                    break
                sent += length
                if not disk.resend(offset, length, ended):
                    failure = "the link was lost"
                    break
        except DiskError as error:
            self._set.faults.report(Case.PRIMARY_DISK, disk.name, "resync", 0, 0, error)
            failure = str(error)
        if failure is None and not disk.finish_barrier(disk.begin_barrier()):
            failure = "the link was lost"
        self._set.jobs.conclude(job, failure)
        if failure is not None:
            log(f"disk '{disk.name}': what the secondary lacks was not sent: {failure}")

    @staticmethod
    def _missing_of(disk: PrimaryDisk) -> Iterator[tuple[int, int]]:
        """What is missing; looked through again for what was marked behind the first look (a write that had found no
        link just before there was one)."""
        for _ in range(_RESEND_PASSES):
            yield from disk.changes.missing_ranges()

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

    def close(self) -> None:
        self._closing.set()
        if self._resuming is not None:
            self._resuming.join(self._set.options.timeout_s)
        deadline = time.monotonic() + _STOP_S
        for disk in self.disks:
            disk.forwarder.stop(max(0.0, deadline - time.monotonic()))
            disk.close()
