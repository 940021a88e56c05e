# SPDX-License-Identifier: BSD-3-Clause
"""What is compared: QEMU's replication driver, this plugin, and nbdkit's C file plugin as the limit.

A Subject is a set of processes in one arrangement (workloads.Setup), with the same faces towards fio. The file plugin
forwards nothing and has no faces: it serves its one disk in all arrangements.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.disks import Disks
from bench.results import LIMIT, QEMU
from bench.usage import stopped, with_children
from bench.workloads import Face, Setup
from content import qemu_img
from endpoints import DelayedEndpoint, Qemu
from lab import Lab
from nbdprocess import NbdProcess
from nodes import Server
from process import Process
from qmp import Qmp
from waiting import Stuck, wait_until

NAME = "disk0"
TOP_ID = "top0"
SLOW_DELAY = "1ms"
DRAIN_TIMEOUT_S = 120.0
"""Longest wait until the secondary has what fio has written."""
COMMIT_TIMEOUT_S = 300.0
RESYNC_TIMEOUT_S = 300.0
POLL_S = 0.002
"""Between two questions whether an operation has ended."""


class Unsupported(Exception):
    """The subject does not have such an operation; the text says so."""


class Subject:
    """Processes that serve the faces of one arrangement; the Lab owns them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.processes: list[Process] = []

    def uri(self, face: Face) -> str:
        """Where fio finds `face`."""
        raise NotImplementedError

    def pids(self) -> list[int]:
        """All processes of the subject, those that its servers have started included."""
        return with_children([process.pid for process in self.processes])

    def checkpoint(self) -> None:
        """Empty the overlays; QmpError if it fails."""
        raise NotImplementedError

    def checkpoint_under_load(self, guest: int) -> None:
        """A checkpoint while the process `guest` reads and writes."""
        self.checkpoint()

    def drain(self) -> None:
        """Return when the secondary has everything that fio was answered for; Stuck after DRAIN_TIMEOUT_S."""
        raise NotImplementedError

    def dirty(self) -> tuple[int, int]:
        """Bytes in the active and in the hidden disk; Unsupported."""
        raise Unsupported("has no overlays")

    def failover(self) -> None:
        """Fail over and return when the commit is done; QmpError, or Stuck after COMMIT_TIMEOUT_S; Unsupported."""
        raise Unsupported("has no failover")

    def planned_stop(self) -> None:
        """Stop replication without a failover; QmpError if it fails; Unsupported."""
        raise Unsupported("has no planned stop")

    def lose_secondary(self) -> None:
        """End the secondary's process; Unsupported where it cannot come back."""
        raise Unsupported("has no resync, only a full copy")

    def find_secondary(self) -> None:
        """Start the secondary's process again."""
        raise Unsupported("has no resync, only a full copy")

    def wait_in_sync(self) -> None:
        """Return when the pair is complete again; Stuck after RESYNC_TIMEOUT_S."""
        raise Unsupported("has no resync, only a full copy")


class FileSubject(Subject):
    """nbdkit's file plugin on one disk: what the same NBD server does in C without any replication."""

    def __init__(self, lab: Lab, disks: Disks, setup: Setup) -> None:
        super().__init__(LIMIT)
        delay = {"read": SLOW_DELAY, "write": SLOW_DELAY} if setup is Setup.SLOW else None
        self._server = lab.endpoint(path=disks.disk("file"), name="file", delay=delay)
        self.processes = [self._server]

    def uri(self, face: Face) -> str:
        return self._server.uri()

    def checkpoint(self) -> None:
        """Nothing to empty."""

    def drain(self) -> None:
        """Nothing to wait for."""


def slow_disk(lab: Lab, disks: Disks, name: str) -> DelayedEndpoint:
    """An NBD server for the primary's disk that takes SLOW_DELAY for each request. It is no part of the subject."""
    return lab.endpoint(
        path=disks.disk("primary"), name=f"{name}-slow", delay={"read": SLOW_DELAY, "write": SLOW_DELAY}
    )


class PluginServer(Server):
    """A Server that runs the plugin of another revision."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[str], plugin: Path, threads: int | None) -> None:
        super().__init__(folder, name, arguments, threads=threads)
        self._plugin = plugin

    def command(self) -> list[str]:
        command = super().command()
        command[command.index("python") + 1] = str(self._plugin)
        return command


class ReplicationSubject(Subject):
    """This plugin with nbdkit's default options, or `threads` (-t)."""

    def __init__(self, lab: Lab, disks: Disks, setup: Setup, name: str, plugin: Path, threads: int | None) -> None:
        super().__init__(name)
        self.secondary = self._secondary(lab, disks, plugin, threads)
        self.primary: Server | None = None
        self._control: Qmp | None = None
        self.processes = [self.secondary]
        if setup is not Setup.SECONDARY:
            self.primary = self._primary(lab, disks, setup, plugin, threads)
            self.processes.append(self.primary)

    def _secondary(self, lab: Lab, disks: Disks, plugin: Path, threads: int | None) -> Server:
        arguments = [
            "mode=secondary",
            f"state={disks.fresh('secondary-state')}",
            f"control={lab.folder / f'{self.name}-secondary.control'}",
            f"disk={NAME}:{disks.disk('secondary')}",
            f"top-id={TOP_ID}",
        ]
        server = lab.start(PluginServer(lab.folder, f"{self.name}-secondary", arguments, plugin, threads))
        server.execute("xen-set-replication", enable=True, primary=False)
        return server

    def _primary(self, lab: Lab, disks: Disks, setup: Setup, plugin: Path, threads: int | None) -> Server:
        location = slow_disk(lab, disks, self.name).uri() if setup is Setup.SLOW else str(disks.disk("primary"))
        arguments = [
            "mode=primary",
            f"state={disks.fresh('primary-state')}",
            f"control={lab.folder / f'{self.name}-primary.control'}",
            f"disk={NAME}:{location}",
            f"secondary={self.secondary.uri()}",
            f"protocol={'sync' if setup is Setup.SYNC else 'async'}",
        ]
        server = lab.start(PluginServer(lab.folder, f"{self.name}-primary", arguments, plugin, threads))
        server.execute("xen-set-replication", enable=True, primary=True)
        # Until the pair is complete, writes are only recorded, which would flatter.
        wait_until(lambda: server.status()["link"]["state"] == "in-sync", f"{self.name}: the primary has its secondary")
        return server

    @property
    def control(self) -> Qmp:
        """A connection to the primary, or to a secondary alone, kept for as long as the subject."""
        if self._control is None:
            self._control = (self.primary or self.secondary).qmp()
        return self._control

    def uri(self, face: Face) -> str:
        if face is Face.PRIMARY:
            assert self.primary is not None
            return self.primary.uri(NAME)
        return self.secondary.uri(TOP_ID if face is Face.GUEST else NAME)

    def checkpoint(self) -> None:
        self.control.execute("xen-colo-do-checkpoint" if self.primary is None else "replication-checkpoint")

    def drain(self) -> None:
        if self.primary is None:
            return

        def there() -> bool:
            status = self.control.execute("query-replication")
            if status["error"] or status["link"]["state"] != "in-sync":
                raise AssertionError(f"the pair has failed: {status['error']}, link {status['link']}")
            return not _waiting(status)

        wait_until(there, f"{self.name}: the secondary has everything", DRAIN_TIMEOUT_S)

    def dirty(self) -> tuple[int, int]:
        disk = self.secondary.status()["disks"][0]
        return disk["active-bytes"], disk["hidden-bytes"]

    def failover(self) -> None:
        self.control.execute("xen-set-replication", enable=False, primary=False, failover=True)

        def over() -> str | None:
            stage: str = self.control.execute("query-replication")["stage"]
            return stage if stage != "failover" else None

        stage = wait_until(over, f"{self.name}: the commit ends", COMMIT_TIMEOUT_S)
        if stage != "done":
            raise AssertionError(f"after failover the stage is {stage}")

    def planned_stop(self) -> None:
        self.control.execute("xen-set-replication", enable=False, primary=False, failover=False)

    def lose_secondary(self) -> None:
        self.secondary.terminate()
        self.processes.remove(self.secondary)
        wait_until(lambda: self._link() != "in-sync", f"{self.name}: the primary notices the loss")

    def find_secondary(self) -> None:
        self.secondary.start()
        self.processes.append(self.secondary)

    def wait_in_sync(self) -> None:
        def complete() -> bool:
            status = self.control.execute("query-replication")
            return status["link"]["state"] == "in-sync" and not _waiting(status)

        wait_until(complete, f"{self.name}: the pair is in sync", RESYNC_TIMEOUT_S)

    def _link(self) -> str:
        state: str = self.control.execute("query-replication")["link"]["state"]
        return state


def _waiting(status: dict[str, Any]) -> int:
    """Bytes that the secondary does not have yet, in the answer to query-replication."""
    total: int = sum(disk["forward-queue-bytes"] + disk["out-of-sync-bytes"] for disk in status["disks"])
    return total


class QemuSubject(Subject):
    """QEMU's driver as its docs/block-replication.txt puts it together; its NBD servers stand for the guests' disks.

    primary     quorum (vote-threshold 1, read-pattern fifo)
                  +- raw, the primary disk
                  +- replication (mode=primary) -> nbd -> the secondary
    secondary   replication (mode=secondary, top-id) -> active (qcow2) -> hidden (qcow2) -> raw, the secondary disk
    """

    def __init__(self, lab: Lab, disks: Disks, setup: Setup) -> None:
        super().__init__(QEMU)
        self.secondary = self._secondary(lab, disks)
        self.primary: Qemu | None = None
        self.processes = [self.secondary]
        if setup is not Setup.SECONDARY:
            self.primary = self._primary(lab, disks, setup)
            self.processes.append(self.primary)

    def _secondary(self, lab: Lab, disks: Disks) -> Qemu:
        qemu = lab.qemu(name="qemu-secondary")
        disk = disks.disk("secondary")
        self._overlays = disks.fresh("overlays")
        size = str(disk.stat().st_size)
        chain: dict[str, Any] = {}
        for kind, backing in (("hidden", NAME), ("active", "hidden")):
            image = self._overlays / f"{kind}.qcow2"
            qemu_img("create", "-q", "-f", "qcow2", image, size)
            file = {"driver": "file", "filename": str(image)}
            chain = {"driver": "qcow2", "node-name": kind, "file": file, "backing": chain or backing}
        qemu.serve_nbd()
        file = {"driver": "file", "filename": str(disk)}
        qemu.qmp.execute("blockdev-add", driver="raw", node_name=NAME, file=file)
        top = {"driver": "replication", "node-name": TOP_ID, "mode": "secondary", "top-id": TOP_ID, "file": chain}
        qemu.qmp.execute("blockdev-add", top)
        for node in (NAME, TOP_ID):
            _export(qemu, node)
        qemu.qmp.execute("xen-set-replication", enable=True, primary=False)
        return qemu

    def _primary(self, lab: Lab, disks: Disks, setup: Setup) -> Qemu:
        # The slow server before its client, because processes are ended the other way round.
        local: dict[str, Any] = {"driver": "file", "filename": str(disks.disk("primary"))}
        if setup is Setup.SLOW:
            local = _nbd_client(slow_disk(lab, disks, self.name), "")
        qemu = lab.qemu(name="qemu-primary")
        execute = qemu.qmp.execute
        execute("blockdev-add", driver="raw", node_name="local", file=local)
        remote = _nbd_client(self.secondary, NAME)
        execute("blockdev-add", driver="replication", node_name="remote", mode="primary", file=remote)
        quorum = {"driver": "quorum", "vote-threshold": 1, "read-pattern": "fifo", "children": ["local", "remote"]}
        execute("blockdev-add", quorum, node_name=NAME)
        qemu.serve_nbd()
        _export(qemu, NAME)
        execute("xen-set-replication", enable=True, primary=True)
        return qemu

    def uri(self, face: Face) -> str:
        server = self.primary if face is Face.PRIMARY else self.secondary
        assert server is not None
        export = TOP_ID if face is Face.GUEST else NAME
        return f"nbd+unix:///{export}?socket={server.socket_path}"

    def checkpoint(self) -> None:
        self.secondary.qmp.execute("xen-colo-do-checkpoint")

    def checkpoint_under_load(self, guest: int) -> None:
        """As COLO does it, with the guest paused and nothing in flight: otherwise QEMU 7.2 aborts at a checkpoint
        ("First cluster in emptied image is in use"). COLO flushes the disks, too, which is left out."""
        assert self.primary is not None
        os.kill(guest, signal.SIGSTOP)
        try:
            wait_until(lambda: stopped(guest), "fio stands still")
            # An answer means one turn of QEMU's main loop, in which it reads all that fio has sent.
            for _ in range(2):
                self.primary.qmp.execute("query-version")
            # Every transaction, also one without actions, begins with waiting for all requests (bdrv_drain_all).
            self.primary.qmp.execute("transaction", actions=[])
            self.checkpoint()
        finally:
            os.kill(guest, signal.SIGCONT)

    def drain(self) -> None:
        """Nothing to wait for: QEMU answers when the secondary has the write."""

    def dirty(self) -> tuple[int, int]:
        # The files' blocks: a few clusters of metadata more than the data. Emptying an image gives them back.
        active, hidden = (512 * (self._overlays / f"{kind}.qcow2").stat().st_blocks for kind in ("active", "hidden"))
        return active, hidden

    def failover(self) -> None:
        execute = self.secondary.qmp.execute
        execute("xen-set-replication", enable=False, primary=False, failover=True)
        # QEMU 7.2 does not show the commit as a job, but it reports an error for as long as it lasts.
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        while execute("query-xen-replication-status")["error"]:
            if time.monotonic() > deadline:
                raise Stuck(f"{self.name}: the commit did not end within {COMMIT_TIMEOUT_S:g} s")
            time.sleep(POLL_S)

    def planned_stop(self) -> None:
        self.secondary.qmp.execute("xen-set-replication", enable=False, primary=False, failover=False)


def _nbd_client(server: NbdProcess | Qemu, export: str) -> dict[str, Any]:
    """QEMU's NBD client."""
    address = {"type": "unix", "path": str(server.socket_path)}
    return {"driver": "nbd", "server": address, "export": export}


def _export(qemu: Qemu, node: str) -> None:
    """Export a node, writable, under its own name."""
    qemu.qmp.execute("block-export-add", type="nbd", id=f"export-{node}", node_name=node, name=node, writable=True)


@dataclass(frozen=True)
class Spec:
    """Which subject is to be opened. `plugin` and `threads` (nbdkit's -t) are for the replication plugin only."""

    name: str
    plugin: Path | None = None
    threads: int | None = None

    def open(self, lab: Lab, disks: Disks, setup: Setup) -> Subject:
        """A Subject whose replication runs; whatever its processes can fail with."""
        if self.plugin is not None:
            return ReplicationSubject(lab, disks, setup, self.name, self.plugin, self.threads)
        return QemuSubject(lab, disks, setup) if self.name == QEMU else FileSubject(lab, disks, setup)
