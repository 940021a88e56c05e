# SPDX-License-Identifier: BSD-3-Clause
"""The commit after failover: active and hidden go down into the secondary disk while the guest goes on.

Invariants
* Work left is what the overlays still hold, so a process that was killed goes on where it was by looking. They hold it
  until a flush of the disk has covered it: whatever a flush that failed has lost comes down again with a retry.
* No new work arises, except a guest write that the disk refused (Stack.write_over), which this job then meets and
  fails on: in failover guest writes go to the disk, too.
* Never holds more than two portions (image/descent.py) against the guest, one for each of its threads.
* Each portion is given to one thread. When run() returns or raises, no thread of it is left.
* One pass over what is held, in rounds; after each the disk is flushed, and the overlays let go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from replication.errors import DiskError
from replication.image.layer import LayerError
from replication.image.qcow2 import BLOCK
from replication.image.stack import Stack
from replication.jobs import Job, JobList
from replication.order.worker import NO_THREAD

_ROUND = 2048
"""Portions between two flushes: 2 GiB where all is held. More would be much to bring down again after a kill."""

_FLUSHED_FROM = 512 << 10
"""Bytes of a portion from which on it is worth while to begin with its flush; single blocks are written in a better
order at the end."""


class Cancelled(DiskError):
    """job-cancel, or the end of the process."""


class Commit:
    """Commits one disk; `run` is called by the thread that commits all of them."""

    def __init__(self, jobs: JobList, disk_name: str, stack: Stack, closing: threading.Event) -> None:
        self._stack = stack
        self._closing = closing
        self._cancelled = threading.Event()
        self._total = 0
        # Protects `_done`, which two threads add to.
        self._counting = threading.Lock()
        self._done = 0
        self._jobs = jobs
        self.disk_name = disk_name
        self.job = Job("commit", disk_name, lambda: max(self._total, self._done), lambda: self._done)
        self.job.cancel = self._cancelled.set
        jobs.add(self.job)

    def run(self) -> None:
        """Until the overlays are empty. Raises DiskError (Cancelled included) with the job concluded."""
        self._total = self._stack.descent.held_bytes()
        # The server of the disk may be there again although somebody has just found that it was not: a person who has
        # started it, and retries, would find the commit failed again.
        self._stack.disk.await_turn()
        try:
            self._go_over()
            while not self._stack.descent.whole:
                self._go_over()
        except DiskError as error:
            if not self._closing.is_set():
                self.conclude(str(error))
            raise

    def _flush(self) -> None:
        """Make stable what came down, however long that takes: a disk that is slow has not failed."""
        while True:
            try:
                self._stack.flush_committed()
            except LayerError as error:
                if not error.still_waiting or self._closing.is_set() or self._cancelled.is_set():
                    raise
            else:
                return

    def _go_over(self) -> None:
        """Bring down what the overlays hold now, and make it stable."""
        all_of_it = self._stack.descent.portions()
        while self._bring_down(_Portions(all_of_it, _ROUND)):
            self._flush()
        self._flush()

    def _bring_down(self, portions: _Portions) -> bool:
        """One round; whether it was a whole one.

        By two threads, so that one reads while the other writes: the kernel lets only one write to a file at a time,
        but writing is half of the work. 1 GiB of tmpfs takes 0.2 instead of 0.35 s (with copy_file_range by one thread
        0.3 s, by two 0.25). A third thread gains nothing.
        """
        helper = threading.Thread(target=self._copy, args=(portions,), name="commit", daemon=True)
        try:
            helper.start()
        except NO_THREAD:  # then without
            self._copy(portions)
        else:
            self._copy(portions)
            # It ends after the portion that it has in hand, whose I/O would hold up this thread as well.
            helper.join()
        if portions.error is not None:
            raise portions.error
        return not portions.left

    def _copy(self, portions: _Portions) -> None:
        """What each thread does. Its error is everybody's."""
        try:
            for first, last in portions:
                if self._cancelled.is_set():
                    raise Cancelled("the commit was cancelled")
                if self._closing.is_set():
                    raise Cancelled("the process ends")
                written = self._stack.descent.commit(first, last)
                with self._counting:
                    self._done += written
                if written >= _FLUSHED_FROM:
                    # The disk is busy while the rest is copied: 1 GiB of ext4 takes 0.4 instead of 0.7 s, with the
                    # flush at the end.
                    self._stack.disk.begin_flush(first * BLOCK, (last - first) * BLOCK)
        except DiskError as error:
            portions.end(error)
        except Exception as error:  # noqa: BLE001 (in the second thread it would be nobody's, pass after pass)
            portions.end(DiskError.from_defect(error))

    @property
    def bytes_done(self) -> int:
        """Bytes brought down."""
        return self._done

    def conclude(self, error: str | None = None) -> None:
        """All disks are done, or one of them has failed."""
        self._jobs.conclude(self.job, error)


class _Portions:
    """Some portions of a pass over what the overlays hold: each for the thread that asks first, until there are no more
    or one of the threads has failed."""

    def __init__(self, portions: Iterator[tuple[int, int]], left: int) -> None:
        """At most `left` of them."""
        # Protects the rest. Never held across I/O: to look for portions is to look at words in memory.
        self._lock = threading.Lock()
        self._portions = portions
        self.left = left
        self.error: DiskError | None = None
        """The first one."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self

    def __next__(self) -> tuple[int, int]:
        with self._lock:
            if self.error is not None or not self.left:
                raise StopIteration
            portion = next(self._portions)
            self.left -= 1
            return portion

    def end(self, error: DiskError) -> None:
        """Give out no more."""
        with self._lock:
            if self.error is None:
                self.error = error


class CommitThread:
    """Commits the disks of a node one after the other, then says how it went: `finished()` answers whether that was
    all, `failed(disk_name, error)` is called for the disk that failed."""

    def __init__(
        self,
        commits: list[Commit],
        closing: threading.Event,
        finished: Callable[[], bool],
        failed: Callable[[str, DiskError], None],
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
        try:
            self._commit_all()
        except Exception as defect:  # noqa: BLE001 (nobody else works in stage failover)
            error = DiskError.from_defect(defect)
            for commit in self._commits:
                commit.conclude(f"the commit failed: {error}")
            self._failed(self._commits[0].disk_name, error)

    def _commit_all(self) -> None:
        while True:
            for commit in self._commits:
                try:
                    commit.run()
                except DiskError as error:
                    if not self._closing.is_set():
                        for other in self._commits:
                            other.conclude(f"the commit of disk '{commit.disk_name}' failed: {error}")
                    self._failed(commit.disk_name, error)
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

    def join(self, timeout_s: float) -> bool:
        """Wait for the end, `timeout_s` seconds at most; whether it has come. The caller has asked for it."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
