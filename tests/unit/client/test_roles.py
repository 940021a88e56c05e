# SPDX-License-Identifier: BSD-3-Clause
"""The commands by which a manager decides, and their exit codes, against nodes that answer as the test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import commandline
from fakenode import FakeNode, status
from replication.primary.link import LinkState
from replication.record.lineage import Lineage
from replication.replctl import table
from replication.role import ROLES
from replication.stage import Stage
from waiting import DEADLINE_S

NOW = {"role": "primary", "score": 10000, "may-run": True}
SOON = "0.3"
"""--timeout where no answer is to come."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[FakeNode]:
    fake = FakeNode(tmp_path / "c.sock")
    fake.answers |= {"query-role": NOW, "quit": {}}
    yield fake.start()
    fake.die()


def replctl(*arguments: object) -> tuple[int, str, str]:
    done = commandline.replctl(*arguments)
    return done.returncode, done.stdout, done.stderr


def test_role_and_score(node: FakeNode) -> None:
    assert replctl("-s", node.path, "role") == (0, "primary\n", "")
    assert replctl("-s", node.path, "score") == (0, "10000\n", "")
    assert json.loads(replctl("-s", node.path, "score", "--json")[1]) == NOW


@pytest.mark.parametrize(
    ("may", "code", "said"),
    [(True, 0, "yes\n"), (False, 1, "no: because\n"), (None, 3, "cannot tell: because\n")],
)
def test_may_run(node: FakeNode, may: bool | None, code: int, said: str) -> None:
    node.answers["query-role"] = NOW | {"may-run": may, "code": "peer-unknown", "reason": "because"}
    assert replctl("-s", node.path, "may-run") == (code, said, "")
    assert json.loads(replctl("-s", node.path, "may-run", "--json")[1])["may-run"] is may


@pytest.mark.parametrize("answer", [[], {}, {"may-run": "perhaps"}])
def test_an_answer_that_is_none_allows_nothing(node: FakeNode, answer: object) -> None:
    node.answers["query-role"] = answer
    assert replctl("-s", node.path, "may-run")[0] == 3


def test_a_node_that_is_down_or_hangs_has_a_code_of_its_own(node: FakeNode) -> None:
    node.answering.clear()
    for command, code in (("may-run", 3), ("role", 4), ("score", 4), ("quit", 4)):
        assert replctl("--timeout", SOON, "-s", node.path, command)[0] == code, command
    assert replctl("--timeout", SOON, "-s", node.path, "status")[0] == 2, "as it always was"
    node.die()
    for command, code in (("may-run", 3), ("role", 3), ("score", 3), ("quit", 3)):
        assert replctl("-s", node.path, command)[0] == code, command


def test_quit(node: FakeNode) -> None:
    assert replctl("-s", node.path, "quit") == (0, "the node ends\n", "")
    assert node.asked[-1] == "quit"


def test_wait_for_what_comes(node: FakeNode) -> None:
    """Stage, link and role of one look; any of several values."""
    node.answers["query-replication"] = status(stage="none")
    seen = threading.Event()

    def change() -> None:
        while "query-role" not in node.asked:
            if seen.wait(0.01):
                return
        node.answers["query-replication"] = status(stage="done")

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    wanted = ["--stage", "done", "--stage", "failover-failed", "--link", "in-sync", "--role", "primary"]
    assert replctl("-s", node.path, "wait", *wanted) == (0, "stage done, link in-sync, role primary\n", "")
    seen.set()
    thread.join(DEADLINE_S)


def test_wait_for_what_does_not_come(node: FakeNode) -> None:
    # Time enough for the node to say how it is.
    code, out, err = replctl("-s", node.path, "wait", "--stage", "done", "--timeout", "2", "--json")
    assert (code, err) == (5, "replctl: not reached within 2 s: stage running\n")
    assert json.loads(out)["failed"]["reason"] == "timed-out"
    node.die()
    assert replctl("-s", node.path, "wait", "--role", "primary", "--timeout", SOON)[0] == 5
    assert replctl("-s", node.path, "wait")[0] == 2


def test_wait_for_a_node_that_is_not_there_yet(node: FakeNode) -> None:
    node.die()
    node.path.unlink()
    timer = threading.Timer(0.5, node.start)
    timer.start()
    assert replctl("-s", node.path, "wait", "--stage", "running")[0] == 0
    timer.join(DEADLINE_S)


def test_the_values_are_those_of_the_plugin() -> None:
    assert tuple(stage.value for stage in Stage) == table.STAGES
    assert sorted(table.LINKS) == sorted(state.value for state in LinkState)
    assert table.ROLES == ROLES


@pytest.mark.parametrize(
    ("relation", "code", "said"),
    [
        ("same", 0, "same generation"),
        ("newer", 0, "a.sock is newer"),
        ("older", 0, "b.sock is newer"),
        ("diverged", 1, "split brain"),
        ("unrelated", 1, "nothing in common"),
        ("unknown", 1, "never part of a pair"),
        ("other", 1, "other"),
    ],
)
def test_compare(tmp_path: Path, relation: str, code: int, said: str) -> None:
    lineage = Lineage("0" * 15 + "1").to_json()
    answer: dict[str, Any] = {"relation": relation, "common": None}
    nodes = [FakeNode(tmp_path / f"{name}.sock", lineage=lineage) for name in "ab"]
    for each in nodes:
        each.answers["replication-compare"] = answer
        each.start()
    done = replctl("compare", nodes[0].path, nodes[1].path)
    assert done[0] == code
    assert said in done[1]
    assert json.loads(replctl("compare", nodes[0].path, nodes[1].path, "--json")[1]) == {"done": True, **answer}
    assert "replication-compare" in nodes[0].asked
    assert "replication-compare" not in nodes[1].asked
    for each in nodes:
        each.die()


def test_compare_needs_both(node: FakeNode, tmp_path: Path) -> None:
    assert replctl("compare", node.path, node.path)[0] == 1, "an older version does not say what its content is"
    assert replctl("compare", node.path, tmp_path / "nowhere")[0] == 2
    assert replctl("compare", node.path, tmp_path)[0] == 3
