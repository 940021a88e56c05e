# SPDX-License-Identifier: BSD-3-Clause
"""The resync: sends anew what the secondary lacks, while the guest goes on.

Invariants
* What is sent is what the change map says is missing, as it is on the local disk at that moment, under the range lock
  of the guest's writes (PrimaryDisk.resend): an older content never follows a newer one. Holes are not read, and
  zeroes are sent as such (content.py).
* One pass at a time. A pass that did not bring everything over is repeated, later and later, as long as the link is
  up; a secondary that is full or has a bad disk may have been helped meanwhile.
* What the local disk cannot read stays marked; the rest is sent, up to UNREADABLE_MAX such grains in a pass.
* A disk whose job was cancelled is left alone until somebody asks for what is missing: at a start or for a barrier.
* After a start with sync=digest the secondary is asked first for digests of what is missing (proof.py), until a pass
  has brought everything over; what it has is not sent.
* All disks together send at most `rate` bytes a second, whoever waits for them. Guest writes are not counted.
* It waits for the guest, and never the guest for it but for the piece that is being read: what it sends takes no room
  in the queue, is sent where the queue is empty, and is as much at a time as the secondary answers quickly
  (backlog.py). It holds no range while it waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from replication.disk.unflushed import GRAIN
from replication.errors import DiskError
from replication.image.qcow2 import BLOCK
from replication.jobs import Job, JobList
from replication.log import log, surviving
from replication.order.worker import Worker
from replication.primary.backlog import Entry
from replication.primary.content import Unreadable, look
from replication.primary.disk import PrimaryDisk
from replication.primary.pace import Pace
from replication.primary.proof import Proof
from replication.stage import Stage

_COMPLETE_PASSES = 2
"""Passes of `complete`."""

_AGAIN_MIN_S, _AGAIN_MAX_S = 1.0, 30.0
_LOOKS = 3
_IDLE_S = 3600.0
_LINK_S = 0.1
"""How late the loss of the link is noticed by a resync that waits because of its rate."""

UNREADABLE_MAX = 64
"""Grains that a pass finds unreadable, after which it ends: not a few sectors but the disk is broken, and each try of
such a disk may take seconds."""


class _Pass:
    """What one disk sends in one pass, and how far it is. Bytes."""

    def __init__(self, disk: PrimaryDisk) -> None:
        self.disk = disk
        self.job = Job("resync", disk.name, self.total, self.current)
        self.cancelled = False
        self.over = False
        self.moved = threading.Event()
        """Set when an entry has ended: there may be room for another."""
        self.unreadable: list[tuple[int, int]] = []
        """Offset and length of what the local disk cannot read, the first of each grain."""
        # Protects the counters: entries end in the forwarder's thread and, without a link, in the one that puts them.
        self._lock = threading.Lock()
        self._queued = 0
        self._arrived = 0
        self._failed = 0
        self._total = disk.changes.missing_bytes

    def proved(self, length: int) -> None:
        """So many bytes need not be sent: the secondary has them."""
        with self._lock:
            self._queued += length
            self._arrived += length
            self._count_locked()

    def queued(self, entries: Sequence[Entry]) -> int:
        """Entries were queued; how many bytes they cover."""
        length = sum(entry.length for entry in entries)
        with self._lock:
            self._queued += length
            self._count_locked()
        return length

    def ended(self, entry: Entry) -> None:
        """The secondary has answered, or will not."""
        self.moved.set()
        with self._lock:
            if entry.arrived:
                self._arrived += entry.length
            else:
                self._failed += entry.length

    def current(self) -> int:
        """What has arrived, or was there."""
        return self._arrived

    def total(self) -> int:
        """What was missing at the beginning, and what became missing since."""
        with self._lock:
            if not self.over:
                self._count_locked()
            return self._total

    def _count_locked(self) -> None:
        # Whatever happens between these numbers makes the sum too small, never too large: what is sent is taken off the
        # map before it counts as queued, and a failure counts here before it does in the map.
        self._total = max(self._total, self._queued - self._failed + self.disk.changes.missing_bytes)

    def finish(self) -> None:
        """The job has ended: the numbers stay as they are, and the disk may be closed."""
        self.total()
        with self._lock:
            self.over = True


class Resync:
    """The thread that resyncs all disks of a primary."""

    def __init__(
        self,
        disks: Sequence[PrimaryDisk],
        jobs: JobList,
        unreadable: Callable[[PrimaryDisk, int, int, DiskError], None],
        pass_ended: Callable[[], None],
        rate: int | None = None,
        tells_digests: Callable[[], bool] = lambda: False,
    ) -> None:
        """`unreadable(disk, offset, length, error)` is called when the local disk cannot be read, `pass_ended()` after
        every pass.
        `rate`: bytes a second over all disks, None for no limit. `tells_digests()`: whether the secondary does."""
        self._disks = disks
        self._jobs = jobs
        self._unreadable = unreadable
        self._pass_ended = pass_ended
        self._tells_digests = tells_digests
        self._pace = Pace(rate)  # only the thread's, but for taking another one
        # Protects the fields below. Never held across I/O.
        self._changed = threading.Condition()
        # Somebody asked for a pass at once; if not, when the next one is due.
        self._asked = False
        self._due: float | None = None
        self._again_s = _AGAIN_MIN_S
        self._begun = 0
        self._ended = 0
        # Something was marked while the latest pass sent it.
        self._overtaken = False
        # Names of the disks whose job was cancelled.
        self._left_alone: set[str] = set()
        # Names of the disks of which the secondary is asked first.
        self._asked_first: set[str] = set()
        # What the next pass begins with, by the names of the disks: its jobs are listed already.
        self._announced: dict[str, _Pass] = {}
        self._sent: _Pass | None = None
        self._closing = False
        self._worker = Worker("resync", self._round)

    def limit(self, rate: int | None) -> None:
        """Another rate from the next piece on."""
        self._pace = Pace(rate)

    def ask_first(self, first: bool) -> None:
        """A start has said that the secondary may have much of what is missing, or not."""
        with self._changed:
            self._asked_first = {disk.name for disk in self._disks} if first else set()

    def start(self) -> None:
        """Start the thread, once; it has nothing to do yet. CommandError when there is none to be had."""
        self._worker.start()

    def request(self) -> None:
        """Something is missing: send it, but not sooner than after the last failure."""
        with self._changed:
            if self._due is None:
                self._due = time.monotonic() + self._again_s
                self._worker.wake()

    def now(self, explicit: bool = True) -> None:
        """Send what is missing at once; `explicit`: a person asks for it, so also what was cancelled. The jobs are
        listed when this returns, so that nobody who looks for them next takes the resync for done."""
        with self._changed:
            if explicit:
                self._left_alone.clear()
            self._announce_locked(self._disks)
            self._asked = True
            self._worker.wake()

    def complete(self, timeout_s: float) -> bool:
        """Send what is missing at once, also what was cancelled, and wait for it, `timeout_s` seconds at most; whether
        a whole pass has ended.

        A second one follows if the secondary took all, and something is missing still: it may have told that it lacks a
        write before its refusal of that write was heard here, which marks the grain behind the pass that has sent it.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._left_alone.clear()
            for _ in range(_COMPLETE_PASSES):
                pass_ended = self._begun + 1
                self._asked = True
                self._worker.wake()
                left_s = max(0.0, deadline - time.monotonic())
                self._changed.wait_for(partial(self._has_ended, pass_ended), left_s)
                if self._ended < pass_ended or not self._overtaken:
                    break
            return self._ended >= pass_ended

    def _has_ended(self, pass_: int) -> bool:
        return self._ended >= pass_ or self._closing

    def finish(self, timeout_s: float) -> None:
        """Wait for the end of a pass that is at work or was asked for, `timeout_s` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._begun == self._ended and not self._asked, timeout_s)

    def stop(self, timeout_s: float) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not self._worker.stop(timeout_s):
            return  # the pass that is at work ends soon, and with it what was announced for the next
        self._conclude_announced()

    def _conclude_announced(self) -> None:
        with self._changed:
            announced, self._announced = self._announced, {}
        for work in announced.values():
            work.finish()
            self._jobs.conclude(work.job, self._obstacle(work))

    # -- the thread ----------------------------------------------------------------------------------------

    def _round(self) -> float:
        """A pass, if one was asked for or is due; in how many seconds the next one is."""
        if not self._begin_pass():
            return self._idle_s()
        failed: Sequence[PrimaryDisk] = self._disks  # unless it is known better
        with surviving():
            failed = [work.disk for work in self._works() if self._send(work)]
            self._pass_ended()
        with self._changed:
            self._ended = self._begun
            self._again_s = min(2 * self._again_s, _AGAIN_MAX_S) if failed else _AGAIN_MIN_S
            if any(disk.forwarder.up for disk in failed):
                # Also instead of what was requested meanwhile: the failures of this very pass ask for the next.
                self._due = time.monotonic() + self._again_s
            self._changed.notify_all()
        if self._closing:
            self._conclude_announced()
        return self._idle_s()

    def _idle_s(self) -> float:
        with self._changed:
            if self._asked:
                return 0.0
            return _IDLE_S if self._due is None else max(0.0, self._due - time.monotonic())

    def _begin_pass(self) -> bool:
        with self._changed:
            if self._closing or not (self._asked or (self._due is not None and self._due <= time.monotonic())):
                return False
            self._asked = False
            self._due = None
            self._overtaken = False
            self._begun += 1
            return True

    def _has_work_locked(self, disk: PrimaryDisk) -> bool:
        """An export that only forwards has nothing from which it could send again."""
        if disk.name in self._left_alone:
            return False
        return disk.local is not None and disk.forwarder.up and disk.changes.missing

    def _works(self) -> Iterator[_Pass]:
        """What there is to do in this pass, disk after disk."""
        with self._changed:
            # All of them: there is no moment without a job between two disks.
            self._announce_locked(self._disks)
        for disk in self._disks:
            with self._changed:
                self._announce_locked([disk])  # what is missing only now
                work = self._sent = self._announced.pop(disk.name, None)
            if work is not None:
                yield work

    def _announce_locked(self, disks: Sequence[PrimaryDisk]) -> None:
        """Put a pass of each of these disks that has work into `_announced`, and its job into the list."""
        for disk in disks:
            if not self._closing and disk.name not in self._announced and self._has_work_locked(disk):
                work = _Pass(disk)
                work.job.cancel = partial(self._cancel, work)
                self._announced[disk.name] = work
                self._jobs.add(work.job)

    def _send(self, work: _Pass) -> bool:
        """One disk; whether something is still missing that may be tried again."""
        disk = work.disk
        try:
            failure = self._send_missing(work)
        except DiskError as error:
            self._unreadable(disk, 0, 0, error)
            failure = str(error)
        overtaken = False
        if work.unreadable and failure is None:
            disk.finish_barrier(disk.begin_barrier())  # the rest is there when the job has ended
            offset, length = work.unreadable[0]
            failure = (
                f"{len(work.unreadable)} grains of the disk cannot be read as a whole and stay marked, "
                f"the first because of {length} bytes at {offset}"
            )
        if failure is None and not disk.finish_barrier(disk.begin_barrier()):
            failure = self._obstacle(work)
            overtaken = failure is None and disk.changes.missing
            failure = failure or "the secondary did not take all of it"
        with self._changed:
            work.finish()
            self._overtaken |= overtaken
            if failure is None:
                self._left_alone.discard(disk.name)  # cancelled too late
                self._asked_first.discard(disk.name)
        self._jobs.conclude(work.job, failure)
        if failure is not None:
            log(f"disk '{disk.name}': what the secondary lacks was not sent: {failure}")
        return failure is not None and not work.cancelled

    def _cancel(self, work: _Pass) -> None:
        """job-cancel; too late for a job that has just come to its end by itself."""
        with self._changed:
            if work.over:
                return
            work.cancelled = True
            if self._sent is not None and self._sent.disk is work.disk:
                self._sent.cancelled = True  # the job of the next pass has taken its place in the list
            self._left_alone.add(work.disk.name)
            self._changed.notify_all()

    def _send_missing(self, work: _Pass) -> str | None:
        """All that is missing; why not, if it could not be sent. Looked through again for what was marked behind the
        first look (a write that had found no link just before there was one). DiskError."""
        for _ in range(_LOOKS):
            for offset, length in work.disk.changes.missing_ranges():
                failure = self._prove_run(work, offset, offset + length)
                for begin, part in work.disk.changes.missing_ranges(offset, offset + length):
                    failure = failure or self._send_run(work, begin, begin + part)
                if failure is not None:
                    return failure
            if work.unreadable:
                break  # it is missing still, and to look for what was marked behind is to try it again
        return None

    def _prove_run(self, work: _Pass, at: int, stop: int) -> str | None:
        """After a start with sync=digest: take off the map what of a run of missing grains the secondary has."""
        if work.disk.name not in self._asked_first or not self._tells_digests():
            return None
        turn, obstacle = partial(self._wait_turn, work), partial(self._obstacle, work)
        return Proof(work.disk, work.moved, turn, obstacle, self._pace.take, work.proved).run(at, stop)

    def _send_run(self, work: _Pass, at: int, stop: int) -> str | None:
        disk = work.disk
        assert disk.local is not None
        while at < stop:
            # Without the range lock: it only says how to go on. resend() makes sure of zeroes.
            seen = look(disk.local, at, stop - at)
            until = at + seen.length
            while at < until:
                obstacle = self._wait_turn(work)
                if obstacle is not None:
                    return obstacle
                forwarder = disk.forwarder
                piece = forwarder.zero_piece if seen.zero else min(self._pace.piece_max, forwarder.data_piece)
                # Whole grains: one that came in two parts the secondary would still count as lost.
                length = min(until - at, max(piece // GRAIN, 1) * GRAIN)
                try:
                    entries = disk.resend(at, length, work.ended, seen.zero)
                except Unreadable:
                    failure = self._send_grains(work, at, min(at + length, until))
                    at = min(at + length, until)
                    if failure is not None:
                        return failure
                    continue
                if not entries:
                    return self._obstacle(work) or "the link was lost"
                self._pace.spend(entries)
                at += work.queued(entries)
        return None

    def _send_grains(self, work: _Pass, start: int, stop: int) -> str | None:
        """Send a part in which something cannot be read, grain by grain, and of a grain that cannot be read what can;
        why that was all, if it was."""
        disk = work.disk
        for at in range(start, stop, GRAIN):
            obstacle = self._wait_turn(work)
            if obstacle is not None:
                return obstacle
            length = min(GRAIN, stop - at)
            try:
                entries = disk.resend(at, length, work.ended)
            except Unreadable:
                entries, failures = disk.resend_readable(at, length, work.ended)
                for offset, size, error in failures[:1]:
                    work.unreadable.append((offset, size))
                    self._unreadable(disk, offset, size, error)
                if len(work.unreadable) >= UNREADABLE_MAX:
                    return f"the disk is broken: {len(work.unreadable)} grains of it cannot be read"
                if len(failures) * BLOCK >= length:
                    continue  # nothing of it
            if not entries:
                return self._obstacle(work) or "the link was lost"
            self._pace.spend(entries)
            work.queued(entries)
        return None

    def _wait_turn(self, work: _Pass) -> str | None:
        """Wait until the rate allows another piece, and what was sent before is little enough; why the pass has to end,
        if it has."""
        while True:
            with self._changed:
                wait_s = self._pace.wait_s(time.monotonic())
                obstacle = self._obstacle(work)
                if obstacle is not None:
                    return obstacle
                if wait_s:
                    self._changed.wait(min(wait_s, _LINK_S))
                    continue
            work.moved.clear()
            if work.disk.forwarder.takes_spare:
                return None
            work.moved.wait(_LINK_S)

    def _obstacle(self, work: _Pass) -> str | None:
        if self._closing or work.disk.stage is not Stage.RUNNING:
            return "replication was stopped"
        if work.cancelled:
            return "the resync was cancelled"
        return None if work.disk.forwarder.up else "the link was lost"
