# SPDX-License-Identifier: BSD-3-Clause
"""replctl checkpoint --quiesce against a real pair, with a guest agent that hangs, refuses or dies: the guest is thawed
whatever happens, and a checkpoint is taken only of an instant at which it was frozen. (tests/vm has a real agent.)"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkout import REPOSITORY
from content import KIB, MIB, pattern
from fakeagent import FakeAgent
from lab import Lab
from nodes import Pair
from pausepoints import PausePoints
from waiting import DEADLINE_S, begin, wait_until

DATA = pattern(1, 64 * KIB)

REPLCTL = """
import sys
sys.path.insert(0, {folder!r})
from replication.client import quiesce
from replication.replctl import line
quiesce.HOLD_S, quiesce.GUARD_S = {hold_s}, {guard_s}
sys.exit(line.run(sys.argv[1:]))
"""
"""With times in which what a test forces happens."""


class Bench:
    """A pair in sync whose guest has an agent."""

    def __init__(self, lab: Lab, agent: FakeAgent) -> None:
        self.points: PausePoints = lab.pause_points()
        self.agent = agent
        self.pair: Pair = lab.pair(
            [MIB],
            primary_arguments=["timeout=30"],
            primary_options={"extra_environment": self.points.environment},
        )
        self.pair.start_replication()
        status = self.pair.primary.status
        wait_until(lambda: status()["link"]["state"] == "in-sync", "the link is in sync")
        self.guest = self.pair.primary.connect("disk0")
        self.seen = self.pair.secondary.connect("top0")
        # The last that a guest does before it stands still.
        agent.before["freeze"] = lambda: self.guest.pwrite(DATA, 0)

    def begin(self, hold_s: float = DEADLINE_S) -> subprocess.Popen[str]:
        """The command, with --json, that waits for the cut for `hold_s`."""
        text = REPLCTL.format(folder=str(REPOSITORY), hold_s=hold_s, guard_s=3 * DEADLINE_S)
        command = [sys.executable, "-c", text, "--control", self.pair.primary.control_path]
        command += ["checkpoint", "--json", "--quiesce", self.agent.path]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Exit code, and what it says."""
        process = self.begin()
        try:
            said, _ = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
            process.wait(DEADLINE_S)
        return process.returncode, json.loads(said)

    @property
    def taken(self) -> bool:
        """Whether the checkpoint of the frozen guest is on the secondary."""
        return bytes(self.seen.pread(len(DATA), 0)) == DATA

    def works_on(self) -> None:
        """The guest is thawed, nothing is held, and checkpoints are taken as before."""
        wait_until(lambda: not self.agent.frozen, "the guest is thawed")
        wait_until(lambda: self.pair.primary.status()["held-epoch"] is None, "no epoch is held")
        self.pair.primary.checkpoint()
        assert self.taken


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path / "agent.sock")
    yield made
    made.close()


@pytest.fixture
def bench(lab: Lab, agent: FakeAgent) -> Bench:
    return Bench(lab, agent)


def test_what_the_guest_has_written_before_it_was_frozen_is_in_the_checkpoint(bench: Bench) -> None:
    frozen = []
    bench.agent.before["thaw"] = lambda: frozen.append(bench.pair.primary.status()["held-epoch"])
    code, said = bench.run()
    assert (code, said["done"], said["file-systems"]) == (0, True, 3)
    assert frozen == [said["epoch"]], "it is thawed when the epoch is cut"
    assert bench.pair.secondary.status()["epoch"] == said["epoch"]
    assert bench.taken


@pytest.mark.parametrize("command", ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"])
def test_an_agent_that_refuses_has_no_checkpoint_taken(bench: Bench, command: str) -> None:
    bench.agent.answers[command] = {"error": {"class": "GenericError", "desc": "a hook has failed"}}
    code, said = bench.run()
    assert code == (1 if command.endswith("freeze-freeze") else 2)
    assert "a hook has failed" in said["failed"]["text"]
    assert ("may still be frozen" in said["failed"]["text"]) == command.endswith("thaw")
    assert not bench.taken
    bench.works_on()


def test_a_guest_that_a_backup_has_frozen_stays_frozen(bench: Bench) -> None:
    bench.agent.frozen = True
    code, said = bench.run()
    assert code == 1
    assert "are frozen already, by somebody else" in said["failed"]["text"]
    assert bench.agent.frozen
    assert not bench.taken


def test_an_agent_that_dies_while_the_guest_is_frozen_is_asked_again_when_it_is_back(bench: Bench) -> None:
    bench.points.arm("epoch.cut")
    process = bench.begin()
    try:
        bench.points.wait_hit("epoch.cut")
        bench.agent.close()
        bench.agent.listen()
        bench.points.release("epoch.cut")
        said, complaint = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait(DEADLINE_S)
    assert (process.returncode, complaint) == (0, "")
    assert json.loads(said)["file-systems"] == 3
    assert bench.agent.did == ["freeze", "thaw"]
    assert bench.taken


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_program_that_is_ended_while_the_guest_is_frozen_leaves_it_thawed(bench: Bench, how: str) -> None:
    bench.points.arm("epoch.cut")
    process = bench.begin()
    try:
        bench.points.wait_hit("epoch.cut")
        assert bench.agent.frozen
        process.send_signal(signal.Signals[how])
        wait_until(lambda: not bench.agent.frozen, "the guest is thawed")
        assert not bench.taken
        if how == "SIGKILL":
            process.wait(DEADLINE_S)
        bench.points.release("epoch.cut")
        process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        bench.points.disarm("epoch.cut")
    status = bench.pair.primary.status
    if how == "SIGKILL":  # It was asked for, and nobody is left to commit it.
        held = wait_until(lambda: status()["held-epoch"], "the epoch is held")
        bench.pair.primary.execute("replication-checkpoint-abort", epoch=held)
    assert status()["held-epoch"] is None, "it was given up when it was cut"
    bench.works_on()


def test_a_node_that_is_at_another_checkpoint_keeps_the_guest_frozen_for_a_short_time_only(bench: Bench) -> None:
    bench.points.arm("epoch.reached")
    other = begin(bench.pair.primary.checkpoint)
    bench.points.wait_hit("epoch.reached")
    process = bench.begin(hold_s=0.25)
    try:
        wait_until(lambda: bench.agent.did == ["freeze", "thaw"], "the guest is thawed before the checkpoint ends")
        bench.points.release("epoch.reached")
        said, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        bench.points.disarm("epoch.reached")
    other.result(DEADLINE_S)
    assert process.returncode == 1
    assert "the guest was thawed, and no checkpoint of it was taken" in json.loads(said)["failed"]["text"]
    assert bench.pair.primary.status()["held-epoch"] is None, "what was cut after all is given up"
    assert not bench.taken
    bench.works_on()


def test_a_pair_that_is_not_in_sync_has_nobody_frozen(bench: Bench) -> None:
    bench.pair.secondary.kill()
    wait_until(lambda: bench.pair.primary.status()["link"]["state"] != "in-sync", "the link is lost")
    code, said = bench.run()
    assert code == 1
    assert "the guest was not frozen" in said["failed"]["text"]
    assert bench.agent.did == []
