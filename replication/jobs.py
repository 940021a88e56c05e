# SPDX-License-Identifier: BSD-3-Clause
"""What query-jobs shows: copy-before-write, commit and resync as QMP jobs.

A job here is the face of work that is done elsewhere; it holds no thread and decides nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

from replication.errors import CommandError
from replication.events import EventHub


class JobStatus(Enum):
    """Those of QEMU's job states that occur here."""

    RUNNING = "running"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Job:
    """One job. Progress is in bytes."""

    def __init__(self, kind: str, disk: str, total: Callable[[], int], current: Callable[[], int]) -> None:
        self.id = f"{kind}-{disk}"
        self.kind = kind
        self.disk = disk
        self.status = JobStatus.RUNNING
        self.error: str | None = None
        self.total = total
        self.current = current
        self.cancel: Callable[[], None] | None = None

    def to_json(self) -> dict[str, Any]:
        """As query-jobs returns it."""
        shown: dict[str, Any] = {
            "id": self.id,
            "type": self.kind,
            "status": self.status.value,
            "current-progress": self.current(),
            "total-progress": self.total(),
        }
        if self.error is not None:
            shown["error"] = self.error
        return shown


class JobList:
    """The jobs of one node; one job an id."""

    def __init__(self, hub: EventHub) -> None:
        self._hub = hub
        # Protects the dictionary and the jobs' status. Never held across I/O.
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def add(self, job: Job) -> Job:
        """Show a running job, in place of a former one of the same id."""
        with self._lock:
            self._jobs[job.id] = job
        self._hub.emit("JOB_STATUS_CHANGE", id=job.id, status=job.status.value)
        return job

    def conclude(self, job: Job, error: str | None = None) -> None:
        """The work has ended, by itself or with an error; it stays listed until dismissed, unless it went well."""
        with self._lock:
            if job.status in (JobStatus.CONCLUDED, JobStatus.NULL):
                return
            job.status = JobStatus.CONCLUDED
            job.error = error
            if error is None and self._jobs.get(job.id) is job:
                del self._jobs[job.id]
        self._hub.emit("JOB_STATUS_CHANGE", id=job.id, status=JobStatus.CONCLUDED.value)
        if error is None:
            self._hub.emit("JOB_STATUS_CHANGE", id=job.id, status=JobStatus.NULL.value)

    def query(self) -> list[dict[str, Any]]:
        """All jobs, as query-jobs returns them."""
        with self._lock:
            jobs = list(self._jobs.values())
        return [job.to_json() for job in jobs]

    def cancel(self, job_id: str) -> None:
        """job-cancel; CommandError when there is no such job or it cannot be cancelled any more."""
        job = self._find(job_id)
        if job.status is not JobStatus.RUNNING or job.cancel is None:
            raise CommandError(f"Job '{job_id}' in state '{job.status.value}' cannot accept command verb 'cancel'")
        job.cancel()

    def dismiss(self, job_id: str) -> None:
        """job-dismiss; CommandError unless the job has concluded."""
        job = self._find(job_id)
        if job.status is not JobStatus.CONCLUDED:
            raise CommandError(f"Job '{job_id}' in state '{job.status.value}' cannot accept command verb 'dismiss'")
        with self._lock:
            self._jobs.pop(job_id, None)
            job.status = JobStatus.NULL
        self._hub.emit("JOB_STATUS_CHANGE", id=job_id, status=JobStatus.NULL.value)

    def _find(self, job_id: str) -> Job:
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None:
            raise CommandError("Job not found")
        return job
