# SPDX-License-Identifier: BSD-3-Clause
"""The commit after failover: active and hidden go down into the secondary disk while the guest goes on.

Invariants
* Work left is what the overlays still hold, so a process that was killed goes on where it was by looking.
* No new work arises, except a guest write that the disk refused (Stack.write_over), which this job then meets and
  fails on: in failover guest writes go to the disk wherever the overlays hold nothing.
* Never holds more than one range of RUN_BLOCKS blocks against the guest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from replication.errors import DiskError
from replication.image.qcow2 import BLOCKS_PER_CLUSTER
from replication.image.stack import Stack
from replication.jobs import Job, JobList

RUN_BLOCKS = 8 * BLOCKS_PER_CLUSTER
"""Blocks brought down under one range lock (1 MiB): a guest write to them waits for that much copying."""


class Cancelled(DiskError):
    """job-cancel, or the end of the process."""


class Commit:
    """Commits one disk; `run` is called by the thread that commits all of them."""

    def __init__(self, jobs: JobList, disk_name: str, stack: Stack, closing: threading.Event) -> None:
        self._stack = stack
        self._closing = closing
        self._cancelled = threading.Event()
        self._total = 0
        self._done = 0
        self._jobs = jobs
        self.disk_name = disk_name
        self.job = Job("commit", disk_name, lambda: max(self._total, self._done), lambda: self._done)
        self.job.cancel = self._cancelled.set
        jobs.add(self.job)

    def run(self) -> None:
        """Until the overlays are empty. Raises DiskError (Cancelled included) with the job concluded."""
        self._total = self._stack.held_bytes()
        try:
            while ranges := list(_runs(self._stack.held_ranges())):
                for first, last in ranges:
                    if self._cancelled.is_set():
                        raise Cancelled("the commit was cancelled")
                    if self._closing.is_set():
                        raise Cancelled("the process ends")
                    self._done += self._stack.commit(first, last)
            self._stack.flush_committed()
        except DiskError as error:
            if not self._closing.is_set():
                self.conclude(str(error))
            raise

    @property
    def bytes_done(self) -> int:
        """Bytes brought down."""
        return self._done

    def conclude(self, error: str | None = None) -> None:
        """All disks are done, or one of them has failed."""
        self._jobs.conclude(self.job, error)


def _runs(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges as one, up to RUN_BLOCKS."""
    start = stop = -1
    for first, last in ranges:
        if first == stop and last - start <= RUN_BLOCKS:
            stop = last
            continue
        if start >= 0:
            yield start, stop
        start, stop = first, last
    if start >= 0:
        yield start, stop


class CommitThread:
    """Commits the disks of a node one after the other, then says how it went: `finished()` answers whether that was
    all, `failed(commit, error)` is called for the disk that failed."""

    def __init__(
        self,
        commits: list[Commit],
        closing: threading.Event,
        finished: Callable[[], bool],
        failed: Callable[[Commit, DiskError], None],
    ) -> None:
        self._commits = commits
        self._closing = closing
        self._finished = finished
        self._failed = failed
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)

    def start(self) -> None:
        """Begin. Not in the constructor: `finished` and `failed` may look for this object where it is kept."""
        self._thread.start()

    def _run(self) -> None:
        while True:
            for commit in self._commits:
                try:
                    commit.run()
                except DiskError as error:
                    if not self._closing.is_set():
                        for other in self._commits:
                            other.conclude(f"the commit of disk '{commit.disk_name}' failed: {error}")
                    self._failed(commit, error)
                    return
            if self._finished():
                break
            if self._closing.is_set():
                return
        for commit in self._commits:
            commit.conclude()

    @property
    def bytes_done(self) -> int:
        """Bytes brought down, all disks together."""
        return sum(commit.bytes_done for commit in self._commits)

    def join(self, timeout_s: float) -> None:
        """Wait for the end; the caller has asked for it."""
        self._thread.join(timeout_s)
