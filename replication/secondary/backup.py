# SPDX-License-Identifier: BSD-3-Clause
"""Copy-before-write of all disks of a secondary: the `backup` jobs, and what a failure of it means.

running     every target write preserves what it overwrites
failed      some target writes were refused, because what they would overwrite could not be preserved. The others are
            still tried: a full hidden disk may get room. The secondary's disk lacks what was refused
            (TargetWrites.lost); no checkpoint is taken until the primary has sent all of that again, then it is
            `running`.
(a reason)  ended for good, by job-cancel or because nobody knows any more what is preserved: no target write is
            accepted
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from replication.errors import DiskError
from replication.fault import Case, Fault
from replication.jobs import Job
from replication.log import log
from replication.record.state import StateError
from replication.secondary.disk import SecondaryDisk
from replication.side import Setting

RUNNING, FAILED = "running", "failed"


class Backup:
    """Copy-before-write of the disks of one node."""

    def __init__(self, setting: Setting, disks: Sequence[SecondaryDisk]) -> None:
        self._set = setting
        self._disks = disks
        # Protects `record.backup` and the list of jobs. Never held across I/O.
        self._lock = threading.Lock()
        self._jobs: list[Job] = []

    @property
    def running(self) -> bool:
        """Whether nothing has failed."""
        return self._set.record.backup == RUNNING

    @property
    def accepts_writes(self) -> bool:
        """Whether target writes are tried."""
        return self._set.record.backup in (RUNNING, FAILED)

    @property
    def blocked(self) -> bool:
        """Whether target writes are refused because what they overwrite cannot be preserved."""
        return self._set.record.backup != RUNNING

    def dispense(self) -> None:
        """There is nothing to preserve until the next checkpoint. The caller saves the record, and then ends the jobs
        (`conclude`)."""
        with self._lock:
            self._set.record.backup = RUNNING

    def begin(self) -> None:
        """Show the jobs, if it runs."""
        with self._lock:
            if self.running and not self._jobs and self._set.record.inconsistent is None:
                self._jobs = [self._job(disk) for disk in self._disks]

    def _job(self, disk: SecondaryDisk) -> Job:
        """Copy-before-write of a disk as a job: bytes that hidden holds, of the disk's size."""

        def held() -> int:
            return 0 if disk.stack is None else disk.stack.hidden.bytes_held

        job = Job("backup", disk.name, lambda: disk.size, held)
        job.cancel = partial(self._cancel, disk)
        return self._set.jobs.add(job)

    def _cancel(self, disk: SecondaryDisk) -> None:
        why = "cancelled by job-cancel"
        error = DiskError(f"copy-before-write was {why}")
        self._set.faults.report(Case.COPY_BEFORE_WRITE, disk.name, "backup", 0, disk.size, error)
        self.end(why)

    def failed(self, error: str) -> None:
        """A target write was refused. Called from requests."""
        self._turn(RUNNING, FAILED, error)

    def end(self, why: str) -> None:
        """For good. Called from requests too, so without the gate: a target write that has been let in has its own copy
        to make and may finish."""
        for disk in self._disks:
            disk.accepts_writes = False
        self._turn(None, why, why)

    def repaired(self) -> None:
        """The primary has sent something again. Called from requests, after `lost` of a disk has become empty."""
        self._set.faults.clear(self._is_repaired)
        if self._turn(FAILED, RUNNING, None):
            self.begin()

    def _is_repaired(self, fault: Fault) -> bool:
        return fault.case in (Case.COPY_BEFORE_WRITE, Case.SECONDARY_DISK) and self._nothing_lost()

    def _nothing_lost(self) -> bool:
        return self.accepts_writes and not any(disk.lost.missing for disk in self._disks)

    def _turn(self, former: str | None, state: str, error: str | None) -> bool:
        """From `former` (None: from any other) to `state`; whether it did. A request that failed has noted it in `lost`
        before it comes here, so the two cannot miss each other."""
        with self._lock:
            record = self._set.record
            if record.backup == state or (former is not None and record.backup != former):
                return False
            if state == RUNNING and not self._nothing_lost():
                return False
            record.backup = state
        if error is not None:
            self.conclude(error)
        try:
            self._set.save()
        except StateError as failure:
            log(str(failure))  # it is so all the same; only the next process would not know
            self._set.faults.keep()  # which saves the same record, and is tried again
        return True

    def conclude(self, error: str | None) -> None:
        """The jobs have ended, with the stage or with an error."""
        with self._lock:
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            self._set.jobs.conclude(job, error)
