# SPDX-License-Identifier: BSD-3-Clause
"""replctl checkpoint --quiesce: the guest is frozen for the cut alone, and thawed whatever happens."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from checkout import REPOSITORY
from fakeagent import FakeAgent
from replication.client.qmp import Refused
from replication.client.quiesce import FREEZE_S, GUARD_S, HOLD_S, Agent, checkpoint
from replication.client.session import Session, Unanswered, Unusable
from waiting import DEADLINE_S, wait_until

SOON_S = 0.5
"""Long enough for an agent to answer on a busy machine."""


class Node:
    """Notes what it is asked among what the agent is asked."""

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.mode = "primary"
        self.state = "in-sync"
        self.refusal: BaseException | None = None
        """What becomes of the next command."""
        self.owed: dict[str, Any] | None = None
        """What it answers later."""
        self.patience_s: float | None = None
        """How long that was waited for."""

    def attempt(self, within_s: float, command: str, **arguments: Any) -> Any:
        assert within_s < GUARD_S - FREEZE_S, "the guard does not come first"
        return self.call(command, **arguments)

    def overdue(self, within_s: float) -> Any:
        self.patience_s = within_s
        return self.owed

    def call(self, command: str, **arguments: Any) -> Any:
        if command == "query-replication":
            return {"mode": self.mode, "link": {"state": self.state}}
        done = command.removeprefix("replication-checkpoint-")
        self.agent.did.append(
            {"replication-checkpoint": "cut", "abort": f"abort {arguments.get('epoch')}"}.get(done, done)
        )
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            raise refusal
        return {"epoch": 7, "duration": 0.5}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path / "agent.sock")
    yield made
    made.close()


def run(node: Node, *, as_json: bool = False) -> None:
    checkpoint(cast("Session", node), argparse.Namespace(quiesce=str(node.agent.path), json=as_json))


def test_the_guest_is_frozen_for_the_cut_alone(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    run(Node(agent))
    assert agent.did == ["freeze", "cut", "thaw", "commit"]
    assert capsys.readouterr().out.startswith("checkpoint 7 took 500.0 ms; 3 file systems were frozen for ")
    run(Node(agent), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["done"], told["epoch"], told["file-systems"]) == (True, 7, 3)
    assert told["frozen-seconds"] >= 0


def test_what_a_former_client_has_left_is_passed_over(agent: FakeAgent) -> None:
    agent.first = b'{"return": 12}\n{"error": {"desc": "old"}}\n'
    run(Node(agent))
    assert agent.did == ["freeze", "cut", "thaw", "commit"]


def test_a_link_that_is_not_in_sync_leaves_the_guest_alone(agent: FakeAgent) -> None:
    node = Node(agent)
    node.state = "synchronizing"
    with pytest.raises(Refused, match=r"not in sync \(synchronizing\): the guest was not frozen"):
        run(node)
    assert agent.did == []


def test_a_secondary_freezes_nobody(agent: FakeAgent) -> None:
    node = Node(agent)
    node.mode = "secondary"
    with pytest.raises(Refused, match="--quiesce is for the primary"):
        run(node)
    assert agent.did == []


def test_a_cut_that_is_refused_thaws(agent: FakeAgent) -> None:
    node = Node(agent)
    node.refusal = Refused("no")
    with pytest.raises(Refused, match="no"):
        run(node)
    assert agent.did == ["freeze", "cut", "thaw"]
    assert not agent.frozen


def test_a_cut_that_does_not_come_in_time_is_given_up_when_it_comes(agent: FakeAgent) -> None:
    """For that, the guest does not stand still."""
    node = Node(agent)
    node.refusal = Unanswered("no answer to replication-checkpoint")
    node.owed = {"epoch": 8}
    with pytest.raises(
        Refused, match=r"did not cut in time, .* the guest was thawed, and no checkpoint of it was taken"
    ):
        run(node)
    assert agent.did == ["freeze", "cut", "thaw", "abort 8"]
    assert node.patience_s == math.inf


def test_one_who_is_interrupted_gives_up_what_is_cut(agent: FakeAgent) -> None:
    node = Node(agent)
    node.refusal = KeyboardInterrupt()
    node.owed = {"epoch": 8}
    with pytest.raises(KeyboardInterrupt):
        run(node)
    assert agent.did == ["freeze", "cut", "thaw", "abort 8"]
    assert node.patience_s == HOLD_S


def test_a_cut_that_never_comes_leaves_the_error_as_it_is(agent: FakeAgent) -> None:
    node = Node(agent)
    node.refusal = Unanswered("no answer to replication-checkpoint")
    with pytest.raises(Refused, match="did not cut in time"):
        run(node)
    assert agent.did == ["freeze", "cut", "thaw"]


@pytest.mark.parametrize("slow", [True, False])
def test_a_checkpoint_that_is_refused_after_a_slow_thaw_says_how_long_it_took(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    monkeypatch.setattr("replication.client.quiesce.SLOW_THAW_S", 0.0 if slow else math.inf)
    node = Node(agent)
    agent.before["thaw"] = lambda: setattr(node, "refusal", Refused("Epoch 7 is not held", code="some"))
    with pytest.raises(Refused, match=r"^Epoch 7 is not held") as refused:
        run(node)
    assert ("the thaw took" in str(refused.value)) == slow
    assert refused.value.code == "some"
    assert agent.did == ["freeze", "cut", "thaw", "commit"]


def test_a_freeze_that_is_refused_cuts_nothing(agent: FakeAgent) -> None:
    agent.answers["guest-fsfreeze-freeze"] = {"error": {"class": "GenericError", "desc": "a hook failed"}}
    with pytest.raises(Refused, match="refuses guest-fsfreeze-freeze: a hook failed"):
        run(Node(agent))
    assert agent.did == ["freeze"], "it has frozen nothing: to thaw is not ours"


def test_what_somebody_else_has_frozen_stays_frozen(agent: FakeAgent) -> None:
    agent.frozen = True
    with pytest.raises(Refused, match="are frozen already, by somebody else: they were left as they are"):
        run(Node(agent))
    assert agent.did == []
    assert agent.frozen


def test_what_somebody_else_freezes_after_the_question_stays_frozen(agent: FakeAgent) -> None:
    agent.before["freeze"] = lambda: setattr(agent, "frozen", True)
    with pytest.raises(Refused, match=r"refuses guest-fsfreeze-freeze: .* disabled"):
        run(Node(agent))
    assert agent.did == ["freeze"]
    assert agent.frozen


def test_a_guest_of_which_nothing_is_frozen_has_no_checkpoint_taken(agent: FakeAgent) -> None:
    """Its hooks have run, and hear of the thaw."""
    agent.answers["guest-fsfreeze-freeze"] = {"return": 0}
    with pytest.raises(Refused, match="has frozen no file system: no checkpoint was taken"):
        run(Node(agent))
    assert agent.did == ["freeze", "thaw"]


def test_a_freeze_that_is_not_answered_in_time_thaws(agent: FakeAgent) -> None:
    """The agent comes to the thaw when the freeze has ended, whenever that is."""
    asked = Agent(str(agent.path), SOON_S)
    agent.before["freeze"] = lambda: agent.answers.update({"guest-sync": None})
    text = rf"may still be frozen: .*has not answered guest-fsfreeze-thaw within {SOON_S} s"
    with pytest.raises(Unusable, match=text), asked.frozen():
        pytest.fail("it was not answered")
    asked.close()
    assert agent.did[:2] == ["freeze", "thaw"]
    assert not agent.frozen


def test_an_agent_that_answers_nothing_freezes_nothing(agent: FakeAgent) -> None:
    agent.answers["guest-sync"] = None
    with pytest.raises(Unusable, match=rf"has not answered guest-sync within {SOON_S} s"):
        Agent(str(agent.path), SOON_S)
    assert agent.did == []


def test_a_connection_that_is_lost_while_the_guest_is_frozen_is_made_again(agent: FakeAgent) -> None:
    asked = Agent(str(agent.path))
    with asked.frozen():
        assert agent.frozen
        agent.drop()
    asked.close()
    assert agent.did == ["freeze", "thaw"]


def test_an_agent_that_has_gone_while_the_guest_is_frozen_is_waited_for(agent: FakeAgent) -> None:
    def back() -> None:
        agent.before.pop("thaw")
        agent.frozen = False  # before the next thaw can come, which another thread answers
        agent.close()
        agent.listen()

    agent.before["thaw"] = back
    asked = Agent(str(agent.path))
    # Its first thaw was not answered: whether the file systems were frozen until then is not known.
    with pytest.raises(Refused, match="were thawed by somebody else"), asked.frozen():
        pass
    asked.close()
    wait_until(lambda: agent.did == ["freeze", "thaw", "thaw"], "both were asked for")


def test_an_agent_that_has_gone_for_good_is_said_loudly(agent: FakeAgent) -> None:
    asked = Agent(str(agent.path), 2 * SOON_S)
    text = "may still be frozen: thaw them with guest-fsfreeze-thaw"
    with pytest.raises(Unusable, match=text), asked.frozen():
        agent.close()
    asked.close()


def test_without_a_guard_nothing_is_frozen(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("os.fork", no_fork)
    with pytest.raises(Unusable, match="no process can be started"):
        run(Node(agent))
    assert agent.did == []


def test_somebody_who_has_thawed_before_the_cut_was_known_spoils_it(agent: FakeAgent) -> None:
    agent.answers["guest-fsfreeze-thaw"] = {"return": 0}
    with pytest.raises(Refused, match="were thawed by somebody else"):
        run(Node(agent))
    assert agent.did == ["freeze", "cut", "thaw", "abort 7"]


def test_a_thaw_that_fails_is_said_loudly(agent: FakeAgent) -> None:
    agent.answers["guest-fsfreeze-thaw"] = {"error": {"desc": "no"}}
    with pytest.raises(Unusable, match="may still be frozen: thaw them with guest-fsfreeze-thaw"):
        run(Node(agent))
    wait_until(lambda: agent.did[-2:] == ["thaw", "thaw"] or agent.did.count("thaw") == 2, "the guard tries as well")


def test_no_agent_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="no guest agent: No such file or directory"):
        Agent(str(tmp_path / "none"))
    with pytest.raises(Unusable, match="no guest agent"):
        Agent("x" * 200)


HELD = """
import sys, time
sys.path.insert(0, {folder!r})
from replication.client import quiesce
quiesce.GUARD_S = {guard_s}
with quiesce.Agent({path!r}).frozen():
    print("frozen", flush=True)
    time.sleep(600)
"""
"""Says `frozen`, and hangs."""


def processes_of(number: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    return [*map(int, children), number]


@pytest.mark.parametrize("how", ["killed", "ended", "hanging"])
def test_the_guest_is_thawed_when_the_program_dies_or_hangs(agent: FakeAgent, how: str) -> None:
    guard_s = 0.1 if how == "hanging" else 600.0
    text = HELD.format(folder=str(REPOSITORY), path=str(agent.path), guard_s=guard_s)
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "frozen\n"
        if how == "killed":
            os.kill(process.pid, signal.SIGKILL)
        if how == "ended":  # as a service manager ends a command: all of its processes
            for number in processes_of(process.pid):
                os.kill(number, signal.SIGTERM)
        wait_until(lambda: not agent.frozen, "it is thawed", DEADLINE_S)
        assert agent.did == ["freeze", "thaw"]
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        process.stdout.close()
