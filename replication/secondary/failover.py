# SPDX-License-Identifier: BSD-3-Clause
"""After failover: the commit of all disks, the stage in which it ends, and what it would cost beforehand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from replication.errors import CommandError, DiskError
from replication.fault import Case
from replication.image.layer import LayerError
from replication.log import log
from replication.order.gate import DRAIN_S, GateStuck
from replication.order.latency import FAILOVER
from replication.order.urgency import Haste
from replication.order.worker import NO_THREAD
from replication.reason import Reason
from replication.record.outdated import refusal as outdated_refusal
from replication.record.state import StateError
from replication.secondary.commit import Commit, CommitThread
from replication.secondary.disk import SecondaryDisk
from replication.side import Setting
from replication.stage import Stage

COMMIT_RATE = 400e6
"""Bytes a second that a commit is taken to do before one has been measured: half of what page cache and tmpfs do
here."""

_RATE_FROM = 16 << 20
"""Bytes of a commit from which on its speed says something."""

_SETTLE_RETRY_S = 1.0

_SETTLE_S = 20.0
"""So long the guest waits at most for the stage in which a commit has ended to be saved, by a storage that has just
taken a write."""

_DRAIN_MIN_S = 0.25
"""First wait with the gate closed for requests that do not end, after which it is open for as long; then twice as long,
up to DRAIN_S. So the guest goes on while a disk hangs, and requests that follow each other closely end all the same."""


class Failover:
    """The commits of one node."""

    def __init__(self, setting: Setting, disks: Sequence[SecondaryDisk], done: Callable[[], None]) -> None:
        """`done()` is called when the stage is done."""
        self._set = setting
        self._disks = disks
        self._done = done
        self._commit: CommitThread | None = None
        self._drainer: threading.Thread | None = None
        self._begun = 0.0
        self._closing = threading.Event()

    def preflight(self) -> dict[str, Any]:
        """What query-failover returns."""
        record = self._set.record
        refusal, reason = None, None
        if record.stage is Stage.NONE:
            refusal, reason = "Block replication is not running", Reason.NOT_RUNNING
        elif record.stage is not Stage.RUNNING:
            refusal = f"The secondary has failed over already: its stage is {record.stage.value}"
            reason = Reason.FAILED_OVER
        elif record.inconsistent is not None:
            refusal, reason = f"Failover is refused: {forceful(record.inconsistent)}", Reason.NO_CHECKPOINT
        elif record.outdated is not None:
            refusal, reason = outdated_refusal("Failover", record.outdated), Reason.OUTDATED
        elif (left_s := self._set.tenure.left_s) > 0:
            refusal, reason = self._set.tenure.refusal(left_s), Reason.LEASED
        to_commit = 0
        if record.stage is not Stage.DONE and record.inconsistent is None:
            stacks = [disk.stack for disk in self._disks]
            to_commit = sum(stack.descent.held_bytes() for stack in stacks if stack is not None)
        rate = record.commit_rate or COMMIT_RATE
        return {
            "allowed": refusal is None,
            **({} if refusal is None or reason is None else {"reason": refusal, "code": reason.value}),
            "force": record.inconsistent is not None or reason in (Reason.OUTDATED, Reason.LEASED),
            "stage": record.stage.value,
            "epoch": self._set.state.epoch,
            "checkpoint-age": self._set.state.checkpoint["age"],
            "bytes-to-commit": to_commit,
            "predicted-seconds": to_commit / rate,
            "commit-rate": rate,
        }

    def prepare_drained(self, drained: Callable[[], None]) -> Callable[[bool, bool], None]:
        """As `begin`, in the background, as soon as the stage is saved and no request is in flight any more: then
        `drained()` is called with the gate closed. To be called before the stage, since it may fail: CommandError when
        there is no thread for it. What is returned takes whether the stage is there, and whether it is saved."""
        decided = threading.Event()
        decision: list[tuple[bool, bool]] = []

        def decide(entered: bool, saved: bool) -> None:
            decision.append((entered, saved))
            decided.set()

        def drain() -> None:
            decided.wait()  # for the thread that fails over, which always says
            entered, saved = decision[0]
            try:
                if entered and (saved or self._saved()) and self._alone(drained):
                    self.begin()
            except Exception as error:  # noqa: BLE001 (nobody else works in this stage)
                self._lost(error)

        self._drainer = threading.Thread(target=drain, name="drain", daemon=True)
        try:
            self._drainer.start()
        except NO_THREAD as error:
            self._drainer = None
            raise CommandError(f"Failover cannot begin while requests are in flight: {error}; try again") from error
        return decide

    def _saved(self) -> bool:
        """Save the record, however long that takes; False when the process ends before."""
        while not self._closing.is_set():
            try:
                self._set.save()
            except StateError:
                self._closing.wait(_SETTLE_RETRY_S)
            else:
                log("the failover is saved now")
                return True
        return False

    def _alone(self, action: Callable[[], None]) -> bool:
        """Call `action()` with the gate closed, however long that takes; False when the process ends before."""
        wait_s = _DRAIN_MIN_S
        while not self._closing.is_set():
            try:
                with self._set.gate.closed(wait_s, FAILOVER):
                    action()
                    return True
            except GateStuck:
                self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, DRAIN_S)
        return False

    def begin(self) -> None:
        """Commit in the background, until the stage is done or failover-failed. The stage is failover."""
        commits = []
        try:
            for disk in self._disks:
                assert disk.stack is not None
                disk.mark_rollback()  # before anything comes down; a process killed before the end does it again
                commits.append(Commit(self._set.jobs, disk.name, disk.stack, self._closing))
        except Exception as error:  # noqa: BLE001 (nobody else works in this stage)
            for commit in commits:
                commit.conclude(str(error))
            self._lost(error)
            return
        self._begun = time.monotonic()
        self._commit = CommitThread(commits, self._closing, self._committed, self._failed)
        try:
            self._commit.start()
        except NO_THREAD as error:
            self._commit = None
            failure = DiskError(f"the commit has no thread: {error}")
            for commit in commits:
                commit.conclude(str(failure))
            self._failed(commits[0].disk_name, failure)

    def _lost(self, error: Exception) -> None:
        """The commit cannot even begin. It may be retried."""
        self._failed(self._disks[0].name, error if isinstance(error, DiskError) else DiskError.from_defect(error))

    def _committed(self) -> bool:
        """Everything is down and stable: the disk alone counts. False when the disk has refused or lost something
        meanwhile. What the guest has written since the flush the disk has, too, as in stage done."""

        def settled() -> bool:
            return all(disk.stack is None or disk.stack.settled for disk in self._disks)

        self._note_rate()
        lost = self._set.record.inconsistent
        if lost is not None:
            self.fail(lost)
            return True
        if settled():
            # Before the stage: a process killed in between has no error left over from a commit that has gone well.
            self._set.faults.clear()
        if not self._settle(Stage.DONE, settled):
            return False
        self._done()
        return True

    def _note_rate(self) -> None:
        """For the next prediction."""
        assert self._commit is not None
        if self._commit.bytes_done >= _RATE_FROM:
            self._set.record.commit_rate = self._commit.bytes_done / (time.monotonic() - self._begun)

    def _settle(self, stage: Stage, still: Callable[[], bool] = lambda: True) -> bool:
        """Enter the stage in which a commit has ended, if `still()` with the gate closed. There is nobody to give a
        failure to, so it is tried again until it works or the process ends."""
        wait_s = _DRAIN_MIN_S
        while not self._closing.is_set():
            try:
                self._set.save()  # while nobody waits: whether the storage answers
                with self._set.gate.closed(wait_s, FAILOVER):
                    if not still():
                        return False
                    self._set.enter(stage, Haste(time.monotonic() + _SETTLE_S))
                    if stage is Stage.DONE:
                        self._empty()
                    return True
            except (StateError, GateStuck) as error:
                if isinstance(error, StateError) or wait_s >= DRAIN_S:
                    log(f"the commit has ended, but stage {stage.value} cannot be entered yet: {error}")
                wait_s = min(2 * wait_s, DRAIN_S)
            self._closing.wait(max(wait_s, _SETTLE_RETRY_S))
        return False

    def _empty(self) -> None:
        """What the overlays still hold the disk has as well, and nobody looks at them any more. The gate is closed."""
        for disk in self._disks:
            disk.lost.clear()  # `begin` has put it into the change map
            if disk.stack is not None:
                disk.stack.empty()
                try:
                    disk.stack.publish_emptied()
                except DiskError as error:
                    log(f"the overlays of disk '{disk.name}' are of no use any more, but cannot be emptied: {error}")

    def fail(self, why: str) -> None:
        """There is no checkpoint any more to commit."""
        for disk in self._disks:
            self._set.faults.report(Case.COMMIT, disk.name, "commit", 0, disk.size, DiskError(why))
        self._settle(Stage.FAILOVER_FAILED)

    def _failed(self, disk_name: str, error: DiskError) -> None:
        if self._closing.is_set():
            return  # the next process goes on with it
        offset, length = (error.offset, error.length) if isinstance(error, LayerError) else (0, 0)
        # Before the stage, which must not be there without its cause.
        self._set.faults.report(Case.COMMIT, disk_name, "commit", offset, length, error)
        self._settle(Stage.FAILOVER_FAILED)

    def end(self, timeout_s: float) -> bool:
        """The process ends: the next one goes on. Waits for the thread, `timeout_s` seconds at most; whether it has
        ended."""
        deadline = time.monotonic() + timeout_s
        self._closing.set()
        if self._drainer is not None:
            self._drainer.join(timeout_s)
            if self._drainer.is_alive():
                return False
        return self._commit is None or self._commit.join(max(0.0, deadline - time.monotonic()))


def forceful(why: str) -> str:
    """Why something is refused for want of a checkpoint, and what to do."""
    return f"there is no valid checkpoint ({why}); resync from the primary, or use force to take the disks as they are"
