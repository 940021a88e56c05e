# SPDX-License-Identifier: BSD-3-Clause
"""Machine and disk together (scripts/ft-agent): when host A dies at any moment, the guest *continues* on host B.

The guest's count and uptime are in its memory only, its records on its disk only. A memory and a disk of two moments
show at once: a record is missing or there twice, its checksum does not follow, or ext4 finds what it has not written.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from checkout import REPOSITORY
from content import MIB
from filesystem import inspect
from guest import Guest, nbd_node
from hosts import Hosts
from lab import Lab
from nbdprocess import silent
from nodes import top_id
from pausepoints import PausePoints
from process import Process
from replication.machine.store import Store
from waiting import DEADLINE_S, wait_until

FT_AGENT = REPOSITORY / "scripts/ft-agent"
INTERVAL_S = 0.5


class FtAgent(Process):
    """scripts/ft-agent with one of its commands."""

    def __init__(self, folder: Path, name: str, ready: str, *arguments: str | Path, points: PausePoints) -> None:
        super().__init__(folder, name)
        self._ready = ready
        self._arguments = [str(argument) for argument in arguments]
        self._points = points

    def command(self) -> list[str]:
        return [str(FT_AGENT), *self._arguments]

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self._points.environment, "PYTHONUNBUFFERED": "1"}

    def wait_ready(self) -> None:
        self.wait_said(self._ready)

    def wait_said(self, text: str, times: int = 1) -> None:
        """Wait until it has printed `text` so often."""

        def said() -> bool:
            running = self.running  # before it is read: what an ended one has said is complete
            if self.stderr().count(text) >= times:
                return True
            if not running:
                self.check_alive()
            return False

        wait_until(said, f"{self.name} says {text!r}; it said: {self.stderr()}")


@dataclass
class Protected:
    """Both hosts with a guest, its disk and its state protected; nothing runs before `start`."""

    lab: Lab
    interval_s: float = INTERVAL_S
    options: tuple[str, ...] = ()
    hosts: Hosts = field(init=False)
    points: PausePoints = field(init=False)
    guest: Guest = field(init=False)
    agent: FtAgent = field(init=False)
    receiver: FtAgent = field(init=False)
    store: Store = field(init=False)

    def start(self) -> None:
        """Until the guest works, and B could go on with it."""
        self.hosts = Hosts(self.lab, interval_s=None)
        self.points = self.lab.pause_points()
        folder = self.lab.folder
        self.store = Store(folder / "states")
        self.hosts.start()
        self.guest = self.hosts.guest(self.hosts.a, 1, options=self._monitor("agent"))
        arguments: tuple[str | Path, ...] = (
            "receive",
            "--control",
            self.hosts.b.control_path,
            "--store",
            self.store.folder,
        )
        listen: tuple[str | Path, ...] = ("--listen", folder / "receiver.sock")
        self.receiver = FtAgent(folder, "receiver", "receiving", *arguments, *listen, points=self.points)
        self.lab.start(self.receiver)
        self.guest.wait_working(5)
        arguments = ("protect", "--control", self.hosts.a.control_path, "--qmp", folder / "agent.mon")
        more: tuple[str | Path, ...] = (
            "--receiver",
            folder / "receiver.sock",
            "--interval",
            str(self.interval_s),
            *self.options,
        )
        self.agent = FtAgent(folder, "agent", "protecting", *arguments, *more, points=self.points)
        self.lab.start(self.agent)
        self.wait_committed(1)

    def _monitor(self, name: str) -> list[str]:
        return ["-qmp", f"unix:{self.lab.folder}/{name}.mon,server=on,wait=off"]

    @property
    def committed(self) -> int:
        """The last epoch that B's record calls committed; 0 if none."""
        unit = self.store.load().committed
        return 0 if unit is None else unit.epoch

    def wait_committed(self, more: int) -> None:
        """Wait for so many units more than now."""
        for _ in range(more):
            self.wait_committed_after(self.committed)

    def wait_committed_after(self, epoch: int) -> None:
        """Wait for a unit later than `epoch`."""
        wait_until(lambda: self.committed > epoch, f"a unit after {epoch}: {self.agent.stderr()}")

    def wait_held_since(self) -> int:
        """Wait for a unit that was cut after this call: the last record acknowledged before."""
        last = self.guest.console.last
        self.wait_committed(2)  # the first may have been cut before
        return last

    def kill_a(self, order: list[Process] | None = None, gap_s: Callable[[], float] = lambda: 0.0) -> None:
        """SIGKILL to all of host A."""
        for victim in order or [self.agent, self.guest, self.hosts.a]:
            victim.kill()
            time.sleep(gap_s())

    def continue_on_b(self, at_least: int) -> str:
        """Fail over, and look at everything: the guest goes on after record `at_least` or a later one. What ft-agent
        has said."""
        on_b = self.standby()
        epoch = self.hosts.b.status()["epoch"]
        on_disk = inspect(self.hosts.seen(self.hosts.b))
        done = self.fail_over()
        assert done.returncode == 0, done.stderr
        assert f"continues from checkpoint {epoch}:" in done.stdout
        on_b.console.wait_more(1, DEADLINE_S)
        first = on_b.console.records[0]
        old = self.guest.console.records
        assert at_least < first.number <= old[-1].number + 1
        before = old[first.number - 2]
        assert (before.number, first.count) == (first.number - 1, before.count + 1)
        # The disk is of the same moment: it has no more than the record that the guest was about to tell of. (A guest
        # whose disk is ahead would write the same records again, and nothing would be wrong with them in the end.)
        assert len(on_disk) in (before.number, first.number)
        # Serial output may be cut in the midst of a line: what comes out here is the rest of the line before.
        rest = (self.lab.folder / "standby.log").read_bytes().split(b"vm: record", 1)[0]
        assert f"vm: record {before.number} {before.count} {before.uptime_s:.2f}\r\n".encode().endswith(rest)
        # Seconds of the guest's own clock, which has stood still meanwhile.
        assert before.uptime_s <= first.uptime_s < before.uptime_s + 2

        on_b.console.wait_more(20, DEADLINE_S)
        last = on_b.switch_off()
        numbers = [(line.number, line.count) for line in on_b.console.records]
        assert numbers == [(number, number) for number in range(first.number, last + 1)]
        self.hosts.b.wait_stage("done")
        left = inspect(self.hosts.disk("b"), unmounted=True)
        assert [record.number for record in left] == list(range(1, last + 1))
        assert {record.tag for record in left} == {1}
        return done.stdout

    def standby(self) -> Guest:
        """QEMU on B, which waits for a state; all that the guest sees is as on A."""
        disk = nbd_node("node0", self.hosts.b, top_id(0), **{"reconnect-delay": 0})
        options = ["-incoming", "defer", *self._monitor("standby")]
        more: dict[str, Any] = {"accelerator": self.hosts.accelerator, "options": options}
        return self.lab.start(Guest(self.lab.folder, "standby", self.hosts.images, [disk], **more))

    def fail_over(self) -> subprocess.CompletedProcess[str]:
        """ft-agent failover."""
        arguments: list[str | Path] = ["--control", self.hosts.b.control_path, "--store", self.store.folder]
        arguments += ["--qmp", self.lab.folder / "standby.mon"]
        return subprocess.run(
            [FT_AGENT, "failover", *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )


@pytest.fixture
def ft(lab: Lab) -> Protected:
    protected = Protected(lab)
    protected.start()
    return protected


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_guest_continues_on_b_when_a_dies_at_any_moment(ft: Protected, seed: int) -> None:
    chance = random.Random(seed)
    last = ft.wait_held_since()
    ft.guest.console.watch(chance.uniform(0, 2 * INTERVAL_S))
    victims: list[Process] = [ft.agent, ft.guest, ft.hosts.a]
    chance.shuffle(victims)
    ft.kill_a(victims, lambda: chance.uniform(0, 0.05))
    ft.continue_on_b(last)


@pytest.mark.parametrize(
    ("point", "prepared", "counts"),
    [("agent.cut", 0, 0), ("agent.prepared", 1, 0), ("agent.taken", 1, 1)],
    ids=["while the guest stands still", "state there, disk not yet", "disk has taken it, state not marked"],
)
def test_state_and_disk_are_of_one_moment_when_a_dies_between_the_two(
    ft: Protected, point: str, prepared: int, counts: int
) -> None:
    last = ft.wait_held_since()
    ft.points.arm(point)
    ft.points.wait_hit(point)
    committed = ft.committed
    unit = ft.store.load().prepared
    assert (unit.epoch if unit else committed) == committed + prepared
    ft.kill_a()
    assert f"continues from checkpoint {committed + counts}:" in ft.continue_on_b(last)


@pytest.mark.parametrize("protected_options", [(), ("--stop-and-copy",)], ids=["live", "stop and copy"])
def test_the_agent_tells_how_long_the_guest_stood_still(lab: Lab, protected_options: tuple[str, ...]) -> None:
    times = lab.folder / "times.json"
    ft = Protected(lab, interval_s=0.2, options=("--epochs", "8", "--json", str(times), *protected_options))
    ft.start()
    ft.agent.wait_ended()
    told = json.loads(times.read_text())
    assert told["summary"]["epochs"] == len(told["epochs"]) == 8
    for epoch in told["epochs"]:
        parts = [epoch[f"{part}_ms"] for part in ("flush", "cut", "rest", "resume")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(epoch["pause_ms"])
        assert epoch["state_bytes"] > MIB
    assert "the guest stands still" in ft.agent.stderr()
    ft.guest.console.wait_more(20, DEADLINE_S)
    # The disk's checkpoint is as old as the state, although nbdkit of A goes on without the agent.
    ft.kill_a()
    assert f"continues from checkpoint {told['epochs'][-1]['epoch']}:" in ft.continue_on_b(1)


def test_an_epoch_that_cannot_complete_is_given_up_and_the_guest_goes_on(ft: Protected) -> None:
    """nbdkit of B stands still: the disk's epoch never gets there."""
    committed = ft.committed
    with silent(ft.hosts.b):
        ft.agent.wait_said("given up: ")
        ft.guest.console.wait_more(50, DEADLINE_S)
        assert ft.committed <= committed + 1
    last = ft.wait_held_since()
    ft.kill_a()
    ft.continue_on_b(last)


def test_the_guest_goes_on_as_soon_as_a_stuck_disk_lets_qemu_answer(lab: Lab) -> None:
    """nbdkit of A stands still while QEMU stops the guest: QEMU waits for the disk, and answers nothing."""
    ft = Protected(lab, options=("--answer-limit", "1", "--epoch-limit", "3"))
    ft.start()
    ft.points.arm("agent.begun")
    ft.points.wait_hit("agent.begun")
    with silent(ft.hosts.a):
        ft.points.release("agent.begun")
        ft.agent.wait_said("the guest stands still: QEMU does not answer")
    ft.agent.wait_said("the guest goes on")
    ft.guest.console.wait_more(20, DEADLINE_S)
    last = ft.wait_held_since()
    ft.kill_a()
    ft.continue_on_b(last)


def test_the_next_agent_frees_a_guest_that_a_dead_one_has_left_standing(ft: Protected) -> None:
    ft.points.arm("agent.still")
    ft.points.wait_hit("agent.still")
    ft.agent.kill()
    ft.points.disarm("agent.still")
    assert not ft.guest.qmp.execute("query-status")["running"]
    ft.agent.start()
    ft.guest.console.wait_more(20, DEADLINE_S)
    last = ft.wait_held_since()
    ft.kill_a()
    ft.continue_on_b(last)


def test_a_disk_whose_checkpoint_has_no_state_is_not_failed_over(lab: Lab) -> None:
    """Somebody has taken a checkpoint past the agent. The standby has no guest in it, so this needs no boot."""
    ft = Protected(lab)
    ft.hosts = Hosts(lab, interval_s=None)
    ft.hosts.start()
    ft.store = Store(lab.folder / "states")
    os.close(ft.store.lock())
    (ft.store.folder / "1.state").write_bytes(b"QEVM")
    ft.store.prepare(ft.hosts.b.status()["epoch"], "1.state", 4)
    ft.store.commit(ft.hosts.b.status()["epoch"])
    ft.hosts.a.execute("replication-checkpoint")
    ft.standby()
    done = ft.fail_over()
    assert done.returncode == 1
    assert "no state belongs to checkpoint 2 of the disk, only to 1" in done.stderr
    assert ft.hosts.b.status()["stage"] == "running"
