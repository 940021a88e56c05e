# SPDX-License-Identifier: BSD-3-Clause
"""The secondary half: all its disks, their overlays, checkpoint, planned stop, failover and commit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from replication.commit import Commit, CommitThread
from replication.errors import CommandError, ConfigError, DiskError
from replication.fault import Case
from replication.gate import GateStuck
from replication.image.disk import open_disk
from replication.image.face import Disk
from replication.image.overlay import Overlay, ReadOnlyImage
from replication.image.qcow2 import create, image_size
from replication.image.stack import LayerError, Stack
from replication.jobs import Job
from replication.log import log
from replication.options import DiskOptions, is_uri
from replication.pause import pause
from replication.secondary_disk import SecondaryDisk, backup_job
from replication.side import Setting, Side
from replication.stage import Mode, Stage
from replication.state import StateError

BACKUP_CANCELLED = "Backup job was cancelled unexpectedly"

_CLOSE_S = 4.0
"""Longest wait for the commit to notice that the process ends; it copies 1 MiB between two looks."""

_RECLAIM_AFTER_S = 1.0
"""Stale overlay space is given back this long after the last checkpoint: with a checkpoint every 200 ms the same space
is written again at once, and giving it back in between only costs."""

_RECLAIM_STEPS = 4

_SETTLE_RETRY_S = 1.0


class SecondarySide(Side):
    """All disks of a secondary."""

    mode = Mode.SECONDARY

    def __init__(self, setting: Setting) -> None:
        self._set = setting
        self.disks: list[SecondaryDisk] = []
        # Why `start` is refused, by disk name: images that a former start would have refused, too.
        self._refusals: dict[str, str] = {}
        self._backup_jobs: list[Job] = []
        self._commit: CommitThread | None = None
        self._closing = threading.Event()
        self._stale = threading.Event()
        self._reclaimer: threading.Thread | None = None

    # -- opening -------------------------------------------------------------------------------------------

    def open(self) -> None:
        stage = self._set.record.stage
        try:
            for options in self._set.options.disks:
                assert options.location is not None
                assert options.top_id is not None
                disk = open_disk(options.name, options.location)
                opened = SecondaryDisk(options.name, options.top_id, disk, self._set.faults, self._end_backup)
                self.disks.append(opened)
                if stage is not Stage.DONE:
                    self._open_overlays(opened, options, disk)
            self._check_same_disks()
        except BaseException:
            self.close()
            raise
        if self._set.state.emptying:
            # A process was killed in the midst of a checkpoint (or a planned stop): it counts as taken.
            self._empty_all()
        if stage is Stage.RUNNING:
            self._begin_backup()

    def _check_same_disks(self) -> None:
        record = self._set.record
        sizes = {disk.name: disk.size for disk in self.disks}
        if record.disks and record.disks != sizes:
            raise ConfigError(
                f"the state folder {self._set.options.state} is of the disks {_list(record.disks)}, "
                f"but these are {_list(sizes)}"
            )
        record.disks = sizes

    def _open_overlays(self, disk: SecondaryDisk, options: DiskOptions, below: Disk) -> None:
        """Open hidden over the disk and active over hidden, making what is missing in stage none."""
        assert options.active is not None
        assert options.hidden is not None
        backing = (options.hidden, options.location), (options.active, options.hidden)
        fresh = self._set.record.stage is Stage.NONE
        for path, base in backing:
            if not os.path.lexists(path):
                if not fresh:
                    raise ConfigError(
                        f"{path} of disk '{disk.name}' is gone, and with it the last checkpoint: bring it back, or "
                        f"give up the state folder {self._set.options.state} and copy the disk anew from the primary"
                    )
                assert base is not None
                create(path, base, "qcow2" if base == options.hidden else "raw", below.size)
        opened: list[Overlay] = []
        try:
            for role, path in (("hidden", options.hidden), ("active", options.active)):
                opened.append(Overlay(role, disk.name, path))
            hidden, active = opened
            refusal = self._refusal(active, hidden, disk, options)
        except ReadOnlyImage as error:
            if not fresh:
                raise
            refusal = "Active disk or hidden disk doesn't support make_empty"
            log(str(error))
        except BaseException:
            for overlay in opened:
                overlay.close()
            raise
        if refusal is None:
            disk.stack = Stack(active, hidden, below)
            return
        for overlay in opened:
            overlay.close()
        if not fresh:
            raise ConfigError(f"disk '{disk.name}': {refusal}")
        self._refusals[disk.name] = refusal

    def _refusal(self, active: Overlay, hidden: Overlay, disk: SecondaryDisk, options: DiskOptions) -> str | None:
        """What start says to these images (QEMU's texts, in QEMU's order), None if it accepts them. A wrong backing
        file, which QEMU cannot see, is a ConfigError: writing over it would destroy data."""
        if active.layout.backing is None:
            return "Active disk doesn't have backing file"
        if hidden.layout.backing is None:
            return "Hidden disk doesn't have backing file"
        for overlay, expected in ((active, options.hidden), (hidden, options.location)):
            found = overlay.layout.backing
            assert expected is not None
            assert found is not None
            if found != expected and (is_uri(expected) or os.path.realpath(found) != os.path.realpath(expected)):
                raise ConfigError(f"{overlay.path} of disk '{disk.name}' has the backing file {found}, not {expected}")
        if not active.layout.size == hidden.layout.size == image_size(disk.size):
            return "Active disk, hidden disk, secondary disk's length are not the same"
        return None

    def launch(self) -> None:
        if self._set.record.stage is Stage.FAILOVER:
            self._begin_commit()
        self._reclaimer = threading.Thread(target=self._reclaim, name="reclaim", daemon=True)
        self._reclaimer.start()
        self._stale.set()

    def show_stage(self, stage: Stage) -> None:
        for disk in self.disks:
            disk.stage = stage
            disk.backup_running = self._set.record.backup == "running"
            if disk.stack is not None:
                disk.stack.committing = stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED)

    # -- commands ------------------------------------------------------------------------------------------

    def start(self, secondary: str | None, sync: str) -> None:
        if secondary is not None:
            raise CommandError("Parameter 'secondary' is for the primary; this is a secondary")
        if self._set.record.stage is Stage.DONE:
            raise CommandError("Block replication is running or done")
        if sync == "full":
            raise CommandError("Parameter 'sync' is for the primary; this is a secondary")
        for disk in self.disks:
            refusal = self._refusals.get(disk.name)
            if refusal is not None and "length" not in refusal and "make_empty" not in refusal:
                raise CommandError(refusal)
            if not disk.disk.reachable():
                raise CommandError("The secondary disk doesn't have block backend")
            if refusal is not None:
                raise CommandError(refusal)
            if disk.top_id == disk.name:
                raise CommandError("No top_bs or it is invalid")
        self._check_images()
        with self._set.gate.closed():
            self._set.record.backup = "running"
            # Empty before the stage is saved: what the overlays hold in stage none is of no use, but a process killed
            # in between must not come back as running with it.
            self._empty_all()
            pause("start.emptied")
            self._set.enter(Stage.RUNNING)
        self._begin_backup()
        self._stale.set()

    def checkpoint(self) -> None:
        record = self._set.record
        if record.stage is not Stage.RUNNING or record.backup != "running":
            raise CommandError(BACKUP_CANCELLED)
        fault = self._set.faults.fault
        if fault is not None and fault.write_lost:
            raise CommandError(
                f"The secondary disk of '{fault.disk}' lacks a write of the primary ({fault.desc}); "
                "the last checkpoint stays valid until a resync"
            )
        self._check_images()
        with self._set.gate.closed():
            self._empty_all()
        self._stale.set()

    def stop(self, failover: bool) -> None:
        if failover:
            self._fail_over()
            return
        if self._set.record.backup != "running":
            raise CommandError(BACKUP_CANCELLED)
        if self._set.faults.write_lost:
            raise CommandError(
                "The secondary disk lacks a write of the primary, so it cannot take over by a planned stop; "
                "fail over to the last checkpoint, or resync first"
            )
        self._check_images()
        with self._set.gate.closed():
            # The stage first: in done nobody looks at the overlays any more, so a process killed in between has
            # dropped them all the same, and one that cannot save the stage has dropped nothing.
            self._set.enter(Stage.DONE)
            pause("stop.entered")
            self._empty_all()
        self._end_backup_jobs(None)
        self._stale.set()

    def _fail_over(self) -> None:
        with self._set.gate.closed():
            self._set.enter(Stage.FAILOVER)
        self._end_backup_jobs(None)
        pause("failover.entered")
        self._begin_commit()

    def retry(self) -> None:
        with self._set.gate.closed():
            self._set.enter(Stage.FAILOVER)
        self._begin_commit()

    # -- checkpoint ----------------------------------------------------------------------------------------

    def _check_images(self) -> None:
        """Case 6, before anything is emptied."""
        for disk in self.disks:
            assert disk.stack is not None
            try:
                disk.stack.check_images()
            except LayerError as error:
                self._set.faults.report(Case.EMPTYING, disk.name, error.operation, error.offset, error.length, error)
                raise CommandError(f"cannot empty the overlays of disk '{disk.name}': {error}") from error

    def _empty_all(self) -> None:
        """Empty the overlays of every disk, as one step for whoever looks, now or after a kill. The gate is
        closed, or nothing is served yet."""
        begun = time.monotonic()
        self._set.state.begin_epoch()
        for disk in self.disks:
            pause("checkpoint.begun")
            if disk.stack is not None:
                disk.stack.empty()
        pause("checkpoint.emptied")
        self._set.state.end_epoch(time.monotonic() - begun)

    # -- copy-before-write as a job ------------------------------------------------------------------------

    def _begin_backup(self) -> None:
        if self._set.record.backup == "running":
            self._backup_jobs = [
                backup_job(self._set.jobs, disk, partial(self._cancel_backup, disk)) for disk in self.disks
            ]

    def _cancel_backup(self, disk: SecondaryDisk, why: str) -> None:
        error = DiskError(f"copy-before-write was {why}")
        self._set.faults.report(Case.COPY_BEFORE_WRITE, disk.name, "backup", 0, disk.size, error)
        self._end_backup(why)

    def _end_backup(self, why: str) -> None:
        """Copy-before-write has failed or was cancelled: no target write may overwrite anything from now on.

        Called from requests too, so without the gate: `backup_running` goes one way only, and a target write that
        has passed it has its own copy to make and may finish.
        """
        if self._set.record.backup != "running":
            return
        self._set.record.backup = why
        for disk in self.disks:
            disk.backup_running = False
        self._end_backup_jobs(why)
        try:
            self._set.save()
        except StateError as error:
            # It has ended all the same, and the fault says so; only a restart would try to go on with it.
            log(str(error))

    def _end_backup_jobs(self, error: str | None) -> None:
        jobs, self._backup_jobs = self._backup_jobs, []
        for job in jobs:
            self._set.jobs.conclude(job, error)

    # -- commit --------------------------------------------------------------------------------------------

    def _begin_commit(self) -> None:
        commits = []
        for disk in self.disks:
            assert disk.stack is not None
            commits.append(Commit(self._set.jobs, disk.name, disk.stack, self._closing))
        self._commit = CommitThread(commits, self._closing, self._committed, self._commit_failed)

    def _committed(self) -> bool:
        """Everything is down: the disk alone counts. False when a guest's write came back up meanwhile."""

        def all_down() -> bool:
            return not any(disk.stack is not None and any(disk.stack.held_ranges()) for disk in self.disks)

        if not self._settle(Stage.DONE, all_down):
            return False
        self._set.faults.clear()
        self._stale.set()
        return True

    def _settle(self, stage: Stage, still: Callable[[], bool] = lambda: True) -> bool:
        """Enter the stage in which a commit has ended, if `still()` with the gate closed. There is nobody to give a
        failure to, so it is tried again until it works or the process ends."""
        while not self._closing.is_set():
            try:
                with self._set.gate.closed():
                    if not still():
                        return False
                    self._set.enter(stage)
                    return True
            except (StateError, GateStuck) as error:
                log(f"the commit has ended, but stage {stage.value} cannot be entered yet: {error}")
            self._closing.wait(_SETTLE_RETRY_S)
        return False

    def _commit_failed(self, commit: Commit, error: DiskError) -> None:
        if self._closing.is_set():
            return  # the next process goes on with it
        operation, offset, length = "commit", 0, 0
        if isinstance(error, LayerError):
            offset, length = error.offset, error.length
        if self._settle(Stage.FAILOVER_FAILED):
            self._set.faults.report(Case.COMMIT, commit.disk_name, operation, offset, length, error)

    # -- space ---------------------------------------------------------------------------------------------

    def _reclaim(self) -> None:
        """Give back overlay space that checkpoints have left behind, a little at a time, inside the gate."""
        while not self._closing.is_set():
            if not self._stale.wait(1.0):
                continue
            self._stale.clear()
            if self._closing.wait(_RECLAIM_AFTER_S) or self._stale.is_set():
                continue
            for disk in self.disks:
                if disk.stack is None:
                    continue
                for overlay in (disk.stack.active, disk.stack.hidden):
                    try:
                        self._reclaim_overlay(disk.stack, overlay)
                    except DiskError as error:
                        log(f"cannot give back space of {overlay.path}: {error}")

    def _reclaim_overlay(self, stack: Stack, overlay: Overlay) -> None:
        ranges = overlay.stale_ranges()
        more = True
        while more and not self._closing.is_set() and not self._stale.is_set():
            with self._set.gate:
                # During a commit, readers may be reading data whose bit is gone.
                if self._set.record.stage not in (Stage.RUNNING, Stage.DONE):
                    return
                more = stack.reclaim_some(overlay, ranges, _RECLAIM_STEPS)

    # -- the rest ------------------------------------------------------------------------------------------

    def query(self) -> dict[str, Any]:
        return {
            "consistent": True,
            "link": None,
            "disks": [
                {
                    "name": disk.name,
                    "top-id": disk.top_id,
                    "size": disk.size,
                    "active-bytes": disk.stack.active.bytes_held if disk.stack else 0,
                    "hidden-bytes": disk.stack.hidden.bytes_held if disk.stack else 0,
                    "totals": dict(disk.totals),
                }
                for disk in self.disks
            ],
        }

    def close(self) -> None:
        self._closing.set()
        self._stale.set()
        if self._commit is not None:
            self._commit.join(_CLOSE_S)
        if self._reclaimer is not None:
            self._reclaimer.join(_CLOSE_S)
        for disk in self.disks:
            disk.close()


def _list(disks: dict[str, int]) -> str:
    return ", ".join(f"'{name}' of {size} bytes" for name, size in disks.items())
