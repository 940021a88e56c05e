# SPDX-License-Identifier: BSD-3-Clause
"""A failover, status and quit are answered within two seconds while the storage of the state folder hangs.

Where it hangs is forced by pause points; and once it hangs in earnest, a disk that answers nothing.
"""

from __future__ import annotations

import errno
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from content import MIB, pattern
from lab import Lab
from nodes import nbd_refusal
from qmp import Qmp, QmpError
from replication.node import FAILOVER_S, URGENT_S
from waiting import DEADLINE_S, wait_until

ANSWER_S = 2.0
"""What is promised."""

BUSY_S = 4.0
"""What a busy machine needs beside that; what is held here is held for longer."""

BLOCK = 4096
BEFORE = pattern(1, MIB)
FIRST, SECOND, GUESTS = pattern(2, BLOCK), pattern(3, BLOCK), pattern(4, BLOCK)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is what is looked for here."""
    monkeypatch.setattr(Qmp, "patient", False)


class StateBench:
    """A running secondary of files, and a primary's connection to it, whose storage below the state folder can be made
    to hang: where the record (point record.sync) or the word of the checkpoint (epoch.sync) is to become stable."""

    def __init__(self, lab: Lab, *arguments: str, **options: Any) -> None:
        self.points = lab.pause_points()
        self.secondary = lab.secondary(
            contents=(BEFORE,), extra_arguments=arguments, extra_environment=self.points.environment, **options
        )
        self.secondary.start_replication()
        self.target, self.guest = self.secondary.connect("disk0"), self.secondary.connect("top0")
        self._pool = ThreadPoolExecutor(4)
        self.target.pwrite(FIRST, 0)
        self.guest.pwrite(GUESTS, 4 * BLOCK)

    def saved_stage(self) -> str:
        """What the next process would find."""
        return json.loads((self.secondary.state / "state.json").read_text())["stage"]

    def execute(self, name: str, arguments: dict[str, object] | None = None) -> Future[object]:
        """A command in the background."""
        return self._pool.submit(self.secondary.execute, name, arguments)

    def answered(self) -> None:
        """Status gets through, in time."""
        begun = time.monotonic()
        assert self.secondary.status()["stage"]
        for name in ("query-failover", "query-jobs", "query-xen-replication-status"):
            self.secondary.execute(name)
        assert time.monotonic() - begun < ANSWER_S + BUSY_S

    def refused(self, arguments: dict[str, object] | None = None) -> str:
        """What a failover is refused with, in time."""
        begun = time.monotonic()
        with pytest.raises(QmpError) as refusal:
            self.secondary.execute("replication-stop", {"failover": True, **(arguments or {})})
        assert time.monotonic() - begun < ANSWER_S + BUSY_S
        return str(refusal.value)

    def fails_over(self) -> bool:
        """Whether it does; not while an earlier write of the record is under way, or has just taken too long."""
        try:
            self.secondary.execute("replication-stop", {"failover": True})
        except QmpError as refusal:
            if "Nothing has changed" not in str(refusal):
                raise
            return False
        return True

    def finish(self) -> None:
        """The commit: the last checkpoint with the guest's write."""
        self.secondary.wait_stage("done")
        expected = BEFORE[: 4 * BLOCK] + GUESTS + BEFORE[5 * BLOCK :]
        assert self.guest.pread(MIB, 0) == expected
        assert self.secondary.disks[0].read_bytes() == expected


def test_the_waits_of_a_failover_fit_into_what_is_promised() -> None:
    assert FAILOVER_S + URGENT_S < ANSWER_S


def test_a_state_folder_that_hangs_refuses_a_failover_which_changes_nothing(lab: Lab) -> None:
    bench = StateBench(lab)
    bench.points.arm("record.sync")
    desc = bench.refused()
    assert "no answer within" in desc
    assert "Nothing has changed" in desc
    assert "use force" in desc
    bench.answered()
    assert bench.secondary.status()["stage"] == "running"
    assert bench.saved_stage() == "running"
    assert "has not answered an earlier write yet" in bench.refused()
    bench.target.pwrite(SECOND, 8 * BLOCK)  # nothing has changed: the primary is let in
    bench.guest.pwrite(GUESTS, 4 * BLOCK)
    bench.points.release("record.sync")
    wait_until(bench.fails_over, "the earlier write of the record is over")
    bench.finish()


def test_who_tries_again_as_the_refusal_says_gets_through(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the other tests do (qmp.py): the storage is slow once."""
    monkeypatch.setattr(Qmp, "patient", True)
    bench = StateBench(lab)
    bench.points.arm("record.sync")
    failover = bench.execute("replication-stop", {"failover": True})
    bench.points.wait_hit("record.sync")
    with pytest.raises(TimeoutError):
        failover.result(ANSWER_S)
    bench.points.release("record.sync")
    failover.result(DEADLINE_S)
    bench.finish()


def test_with_force_a_failover_needs_no_state_folder_and_is_saved_when_that_answers(lab: Lab) -> None:
    """Until then nothing comes down, so the end of the process would find everything as in stage running."""
    bench = StateBench(lab)
    bench.points.arm("record.sync")
    begun = time.monotonic()
    bench.secondary.execute("replication-stop", {"failover": True, "force": True})
    assert time.monotonic() - begun < ANSWER_S + BUSY_S
    assert bench.secondary.status()["stage"] == "failover"
    bench.answered()
    with nbd_refusal(errno.ESHUTDOWN):
        bench.target.pwrite(SECOND, 8 * BLOCK)
    bench.guest.pwrite(GUESTS, 4 * BLOCK)
    assert bench.saved_stage() == "running"
    assert bench.secondary.disks[0].read_bytes()[: 5 * BLOCK] == FIRST + BEFORE[BLOCK : 5 * BLOCK]
    bench.points.release("record.sync")
    bench.finish()
    assert bench.saved_stage() == "done"


def test_an_unsaved_failover_is_undone_by_a_kill_and_nothing_is_lost(lab: Lab) -> None:
    bench = StateBench(lab)
    bench.points.arm("record.sync")
    bench.secondary.execute("replication-stop", {"failover": True, "force": True})
    bench.guest.pwrite(GUESTS, 12 * BLOCK)
    bench.secondary.kill()
    bench.points.disarm("record.sync")
    bench.secondary.start()
    assert bench.secondary.status()["stage"] == "running"
    expected = bytearray(BEFORE)
    for at in (4 * BLOCK, 12 * BLOCK):
        expected[at : at + BLOCK] = GUESTS
    assert bench.secondary.connect("top0").pread(MIB, 0) == expected


def test_who_saves_a_fault_holds_up_no_failover(lab: Lab) -> None:
    """A job that is cancelled, without the command lock: its save is waited for, and given up."""
    bench = StateBench(lab)
    bench.points.arm("record.sync")
    cancelled = bench.execute("job-cancel", {"id": "backup-disk0"})
    bench.points.wait_hit("record.sync")
    assert "has not answered an earlier write yet" in bench.refused()
    bench.answered()
    bench.points.release("record.sync")
    cancelled.result(DEADLINE_S)


def test_a_checkpoint_that_hangs_in_its_synced_step_has_a_failover_refused_in_time(lab: Lab) -> None:
    bench = StateBench(lab, "durability=power")
    bench.points.arm("epoch.sync")
    checkpoint = bench.execute("replication-checkpoint")
    bench.points.wait_hit("epoch.sync")
    assert bench.refused().endswith("try again")
    desc = bench.refused({"force": True})
    assert "at a step that cannot be interrupted" in desc
    assert "try again (force does not help: " in desc
    bench.answered()
    bench.points.release("epoch.sync")
    checkpoint.result(DEADLINE_S)
    bench.secondary.execute("replication-stop", {"failover": True})
    bench.secondary.wait_stage("done")


def test_a_checkpoint_that_the_state_folder_holds_up_holds_up_neither_guest_nor_failover(lab: Lab) -> None:
    """With durability=power it saves something before it closes the gate: that gives way, the synced step does not."""
    bench = StateBench(lab, "durability=power")
    bench.points.arm("record.sync")
    checkpoint = bench.execute("replication-checkpoint")
    bench.points.wait_hit("record.sync")
    bench.guest.pwrite(GUESTS, 4 * BLOCK)
    bench.target.pwrite(SECOND, 8 * BLOCK)
    bench.secondary.execute("replication-stop", {"failover": True, "force": True})
    with pytest.raises(QmpError, match="a failover has come first"):
        checkpoint.result(DEADLINE_S)
    assert bench.secondary.status()["stage"] == "failover"
    bench.guest.pwrite(GUESTS, 4 * BLOCK)
    bench.points.release("record.sync")
    bench.finish()


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_disk_that_answers_nothing_below_the_state_folder(lab: Lab, durability: str) -> None:
    """A real one: what a process cannot call back hangs in the kernel. All answers below come while it does."""
    try:
        hanging = lab.hanging_folder("secondary.state")
    except PermissionError as error:
        pytest.skip(str(error))
    overlays = lab.folder / "overlays"
    overlays.mkdir()
    bench = StateBench(lab, f"durability={durability}", overlays=overlays)
    failover = ("replication-stop", {"failover": True})
    with hanging.hanging():
        checkpoint = None
        if durability == "power":
            bench.points.arm("record.sync")
            checkpoint = bench.execute("replication-checkpoint")
            bench.points.wait_hit("record.sync")
            bench.points.release("record.sync")
        with pytest.raises(QmpError, match="Nothing has changed"):
            bench.secondary.execute(*failover)
        assert bench.secondary.status()["stage"] == "running"
        bench.target.pwrite(SECOND, 8 * BLOCK)
        bench.guest.pwrite(GUESTS, 4 * BLOCK)
        bench.secondary.execute(failover[0], {**failover[1], "force": True})
        with nbd_refusal(errno.ESHUTDOWN):
            bench.target.pwrite(SECOND, 8 * BLOCK)
        bench.guest.pwrite(GUESTS, 4 * BLOCK)
        assert bench.guest.pread(BLOCK, 0) == BEFORE[:BLOCK]
        assert bench.secondary.status()["stage"] == "failover"
        bench.secondary.execute("query-failover")
        if checkpoint is not None:
            with pytest.raises(QmpError):
                checkpoint.result(DEADLINE_S)
    bench.finish()


def test_a_process_whose_state_folder_hangs_quits(lab: Lab) -> None:
    bench = StateBench(lab)
    bench.points.arm("record.sync")
    bench.refused()
    begun = time.monotonic()
    bench.secondary.execute("quit")
    assert time.monotonic() - begun < ANSWER_S + BUSY_S
    bench.secondary.wait_ended()


def test_a_primary_whose_peer_is_dead_goes_on_alone_at_once(lab: Lab) -> None:
    """With protocol=sync a write of its guest waits for the secondary, inside the gate; so does a checkpoint."""
    points = lab.pause_points()
    pair = lab.pair(
        contents=(BEFORE,),
        secondary_options={"extra_environment": points.environment},
        primary_arguments=("protocol=sync", "timeout=30"),
    )
    pair.start_replication()
    guest = pair.primary.connect("disk0")
    pool = ThreadPoolExecutor(2)
    points.arm("target-write.preserved")
    write = pool.submit(guest.pwrite, FIRST, 0)
    points.wait_hit("target-write.preserved")
    begun = time.monotonic()
    pair.primary.execute("x-colo-lost-heartbeat")
    assert time.monotonic() - begun < ANSWER_S + BUSY_S
    assert pair.primary.status()["stage"] == "done"
    write.result(DEADLINE_S)
    assert guest.pread(BLOCK, 0) == FIRST
    points.release("target-write.preserved")


def test_a_primary_whose_state_folder_hangs_refuses_in_time_and_replicates_on(lab: Lab) -> None:
    points = lab.pause_points()
    pair = lab.pair(contents=(BEFORE,), primary_options={"extra_environment": points.environment})
    pair.start_replication()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "the start has saved what it saves")
    points.arm("record.sync")
    begun = time.monotonic()
    with pytest.raises(QmpError, match="Nothing has changed"):
        pair.primary.execute("x-colo-lost-heartbeat")
    assert time.monotonic() - begun < ANSWER_S + BUSY_S
    assert pair.primary.status()["stage"] == "running"
    points.release("record.sync")
    pair.primary.connect("disk0").pwrite(FIRST, 0)
    pair.primary.checkpoint()
