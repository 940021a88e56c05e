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
from replication.image.layer import LayerError
from replication.image.overlay import Overlay, ReadOnlyImage
from replication.image.qcow2 import Layout, create, image_size, read_layout, remove
from replication.image.stack import Stack
from replication.jobs import Job
from replication.log import log
from replication.options import DiskOptions, is_uri
from replication.pause import pause
from replication.reclaim import Reclaimer
from replication.secondary_disk import SecondaryDisk, backup_job
from replication.side import Setting, Side, disk_list
from replication.stage import Mode, Stage
from replication.state import StateError

BACKUP_CANCELLED = "Backup job was cancelled unexpectedly"

_CLOSE_S = 4.0
"""Longest wait for the commit to notice that the process ends; it copies 1 MiB between two looks."""

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
        self._reclaimer = Reclaimer(setting.gate, lambda: setting.record.stage)

    # -- opening -------------------------------------------------------------------------------------------

    def open(self) -> None:
        stage = self._set.record.stage
        try:
            for options in self._set.options.disks:
                assert options.location is not None
                assert options.top_id is not None
                disk = open_disk(options.name, options.location)
                self.disks.append(SecondaryDisk(options.name, options.top_id, disk, self._set.faults, self._end_backup))
            self._check_same_disks()
            if stage is not Stage.DONE:
                self._open_overlays()
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
                f"the state folder {self._set.options.state} is of the disks {disk_list(record.disks)}, "
                f"but these are {disk_list(sizes)}"
            )
        record.disks = sizes

    def _open_overlays(self) -> None:
        """Open the overlays of all disks. In stage none those that do not exist are made, after all that do were found
        to be good; a start that is refused all the same takes away what it has made."""
        fresh = self._set.record.stage is Stage.NONE
        wanted = [
            (disk, role, path, base)
            for disk, options in zip(self.disks, self._set.options.disks, strict=True)
            for role, path, base in (
                ("hidden", _known(options.hidden), _known(options.location)),
                ("active", _known(options.active), _known(options.hidden)),
            )
        ]
        opened: dict[str, Overlay | None] = {}
        made: list[str] = []
        try:
            for disk, role, path, _ in wanted:
                if os.path.lexists(path):
                    opened[path] = self._open_overlay(role, disk, path, fresh)
                elif not fresh:
                    raise ConfigError(
                        f"{path} of disk '{disk.name}' is gone, and with it the last checkpoint: bring it back, or "
                        f"give up the state folder {self._set.options.state} and copy the disk anew from the primary"
                    )
            for disk, role, path, base in wanted:
                if path not in opened:
                    create(path, base, "raw" if role == "hidden" else "qcow2", disk.size)
                    made.append(path)
                    opened[path] = self._open_overlay(role, disk, path, fresh)
            for disk, options in zip(self.disks, self._set.options.disks, strict=True):
                self._stack(disk, options, opened, fresh)
        except BaseException:
            for overlay in opened.values():
                if overlay is not None:
                    overlay.close()
            for path in made:
                remove(path)
            raise

    @staticmethod
    def _open_overlay(role: str, disk: SecondaryDisk, path: str, fresh: bool) -> Overlay | None:
        """None for an image that cannot be written, where `start` is going to say so."""
        try:
            return Overlay(role, disk.name, path)
        except ReadOnlyImage as error:
            if not fresh:
                raise
            log(str(error))
            return None

    def _stack(self, disk: SecondaryDisk, options: DiskOptions, opened: dict[str, Overlay | None], fresh: bool) -> None:
        """Put the images of one disk together, or note why `start` will be refused."""
        active, hidden = opened[_known(options.active)], opened[_known(options.hidden)]
        layouts = [
            read_layout(path) if overlay is None else overlay.layout
            for overlay, path in ((active, _known(options.active)), (hidden, _known(options.hidden)))
        ]
        refusal = self._refusal(layouts[0], layouts[1], disk, options)
        if refusal is None and active is not None and hidden is not None:
            disk.stack = Stack(active, hidden, disk.disk)
            return
        refusal = refusal or "Active disk or hidden disk doesn't support make_empty"
        if not fresh:
            raise ConfigError(f"disk '{disk.name}': {refusal}")
        for overlay in (active, hidden):
            if overlay is not None:
                overlay.close()
        self._refusals[disk.name] = refusal

    def _refusal(self, active: Layout, hidden: Layout, disk: SecondaryDisk, options: DiskOptions) -> str | None:
        """What start says to these images (QEMU's texts, in QEMU's order), None if it accepts them. A wrong backing
        file, which QEMU cannot see, is a ConfigError: writing over it would destroy data."""
        if active.backing is None:
            return "Active disk doesn't have backing file"
        if hidden.backing is None:
            return "Hidden disk doesn't have backing file"
        for path, layout, expected in (
            (options.active, active, options.hidden),
            (options.hidden, hidden, options.location),
        ):
            found = layout.backing
            assert expected is not None
            assert found is not None
            if found != expected and (is_uri(expected) or os.path.realpath(found) != os.path.realpath(expected)):
                raise ConfigError(f"{path} of disk '{disk.name}' has the backing file {found}, not {expected}")
        if not active.size == hidden.size == image_size(disk.size):
            return "Active disk, hidden disk, secondary disk's length are not the same"
        return None

    def launch(self) -> None:
        if self._set.record.stage is Stage.FAILOVER:
            self._begin_commit()
        self._reclaimer.start([disk.stack for disk in self.disks if disk.stack is not None])

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
        self._reclaimer.wake()

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
        self._reclaimer.wake()

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
        self._reclaimer.wake()

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
        self._reclaimer.wake()
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
        if self._commit is not None:
            self._commit.join(_CLOSE_S)
        self._reclaimer.stop(_CLOSE_S)
        for disk in self.disks:
            disk.close()


def _known(path: str | None) -> str:
    """An option that options.py has completed."""
    assert path is not None
    return path
