# SPDX-License-Identifier: BSD-3-Clause
"""The resync: sends anew what the secondary lacks, while the guest goes on.

Invariants
* What is sent is what the change map says is missing, as it is on the local disk at that moment, under the range lock
  of the guest's writes (PrimaryDisk.resend): an older content never follows a newer one.
* One pass at a time. A pass that did not bring everything over is repeated, later and later, as long as the link is
  up; a secondary that is full or has a bad disk may have been helped meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from replication.backlog import Entry
from replication.errors import DiskError
from replication.jobs import Job, JobList
from replication.log import log
from replication.primary_disk import PrimaryDisk
from replication.stage import Stage

_AGAIN_MIN_S, _AGAIN_MAX_S = 1.0, 30.0
_LOOKS = 3
_IDLE_S = 3600.0


class Resync:
    """The thread that resyncs all disks of a primary."""

    def __init__(
        self,
        disks: Sequence[PrimaryDisk],
        jobs: JobList,
        unreadable: Callable[[PrimaryDisk, DiskError], None],
        pass_ended: Callable[[], None],
    ) -> None:
        """`unreadable(disk, error)` is called when the local disk cannot be read, `pass_ended()` after every pass."""
        self._disks = disks
        self._jobs = jobs
        self._unreadable = unreadable
        self._pass_ended = pass_ended
        # Protects the fields below. Never held across I/O.
        self._changed = threading.Condition()
        self._due: float | None = None
        self._again_s = _AGAIN_MIN_S
        self._begun = 0
        self._ended = 0
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once; it has nothing to do yet."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="resync", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Something is missing: send it, but not sooner than after the last failure."""
        with self._changed:
            if self._due is None:
                self._due = time.monotonic() + self._again_s
                self._changed.notify_all()

    def now(self) -> None:
        """Send what is missing at once."""
        with self._changed:
            self._due = time.monotonic()
            self._changed.notify_all()

    def complete(self, timeout_s: float) -> bool:
        """Send what is missing at once and wait for it, `timeout_s` seconds at most; whether a whole pass has ended."""
        with self._changed:
            pass_ended = self._begun + 1
            self._due = time.monotonic()
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._ended >= pass_ended or self._closing, timeout_s)

    def stop(self, timeout_s: float) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and (self._due is None or self._due > time.monotonic()):
                    self._changed.wait(_IDLE_S if self._due is None else max(0.0, self._due - time.monotonic()))
                if self._closing:
                    return
                self._due = None
                self._begun += 1
            failed = [disk for disk in self._disks if self._has_work(disk) and self._send(disk)]
            self._pass_ended()
            with self._changed:
                self._ended = self._begun
                self._again_s = min(2 * self._again_s, _AGAIN_MAX_S) if failed else _AGAIN_MIN_S
                if any(disk.forwarder.up for disk in failed) and self._due is None:
                    self._due = time.monotonic() + self._again_s
                self._changed.notify_all()

    @staticmethod
    def _has_work(disk: PrimaryDisk) -> bool:
        """An export that only forwards has nothing from which it could send again."""
        return disk.local is not None and disk.forwarder.up and disk.changes.missing

    def _send(self, disk: PrimaryDisk) -> bool:
        """One disk, as a job; whether something is still missing that may be tried again."""
        total = disk.changes.marked_bytes
        sent = 0
        arrived = [0]

        def ended(entry: Entry) -> None:
            arrived[0] += entry.length

        job = self._jobs.add(Job("resync", disk.name, lambda: max(total, sent), lambda: arrived[0]))
        failure: str | None = None
        try:
            for offset, length in self._missing_of(disk):
                if self._closing or disk.stage is not Stage.RUNNING:
                    failure = "replication was stopped"
                    break
                sent += length
                if not disk.resend(offset, length, ended):
                    failure = "the link was lost"
                    break
        except DiskError as error:
            self._unreadable(disk, error)
            failure = str(error)
        if failure is None and not disk.finish_barrier(disk.begin_barrier()):
            failure = "the secondary did not take all of it" if disk.forwarder.up else "the link was lost"
        self._jobs.conclude(job, failure)
        if failure is not None:
            log(f"disk '{disk.name}': what the secondary lacks was not sent: {failure}")
        return failure is not None

    @staticmethod
    def _missing_of(disk: PrimaryDisk) -> Iterator[tuple[int, int]]:
        """What is missing; looked through again for what was marked behind the first look (a write that had found no
        link just before there was one)."""
        for _ in range(_LOOKS):
            yield from disk.changes.missing_ranges()
