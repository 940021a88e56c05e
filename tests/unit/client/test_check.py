# SPDX-License-Identifier: BSD-3-Clause
"""`replctl check`: what a monitoring system gets to see."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkout import REPOSITORY
from fakenode import FakeNode, status
from waiting import DEADLINE_S

FORM = re.compile(r"REPLICATION (OK|WARNING|CRITICAL|UNKNOWN) - [^|\n]+( \| (\S+=\S+ ?)+)?\n\Z")
CODES = {"OK": 0, "WARNING": 1, "CRITICAL": 2, "UNKNOWN": 3}


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with tempfile.TemporaryDirectory(prefix="chk-") as folder:
        made = FakeNode(Path(folder) / "control.sock").start()
        yield made
        made.die()


def check(node: FakeNode, *options: str) -> tuple[str, str]:
    """State and the whole line."""
    done = subprocess.run(
        [REPOSITORY / "scripts/replctl", "--control", node.path, "check", *options],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "REPLCTL_SOCKET"},
    )
    assert done.stderr == ""
    match = FORM.match(done.stdout)
    assert match, done.stdout
    assert done.returncode == CODES[match[1]]
    return match[1], done.stdout


def test_a_healthy_node(node: FakeNode) -> None:
    state, line = check(node)
    assert state == "OK"
    assert line == (
        "REPLICATION OK - primary, in sync, checkpoint 2.0 s old | age=2s;60;300;0 out_of_sync=0B;;;0 queue=4096B;;;0\n"
    )
    node.answers["query-replication"] = status("secondary")
    assert " overlay=0.001%;80;95;0;100" in check(node)[1]


@pytest.mark.parametrize(
    ("more", "state", "text"),
    [
        (
            {"guest-suspended": "this node is outdated (x)"},
            "CRITICAL",
            "the guest stands still: this node is outdated (x)",
        ),
        (
            {"mode": "secondary", "stage": "done", "guest-suspended": "nobody has promoted it"},
            "CRITICAL",
            "the guest stands still: nobody has promoted it",
        ),
        (
            {"guest-suspended": "not yet", "guest-suspended-reason": {"code": "not-promoted", "reason": "not yet"}},
            "WARNING",
            "the guest stands still: not yet",
        ),
        (
            {"guest-suspended": "no link", "guest-suspended-reason": {"code": "fencing", "reason": "no link"}},
            "CRITICAL",
            "the guest stands still: no link",
        ),
        ({"error": {"desc": "copy-before-write failed | so"}}, "CRITICAL", "copy-before-write failed / so"),
        ({"consistent": False}, "CRITICAL", "no valid checkpoint"),
        ({"peer-consistent": False}, "WARNING", "the secondary has no valid checkpoint until the next one is taken"),
        ({"peer-consistent": False, "stage": "done"}, "WARNING", "the stage is done"),
        ({"peer-consistent": None}, "OK", "in sync"),
        ({"stage": "failover-failed"}, "CRITICAL", "the commit has failed"),
        ({"stage": "done"}, "WARNING", "the stage is done"),
        ({"link": {"state": "lost", "reason": "silent"}}, "WARNING", "link lost: silent"),
        ({"checkpoint-obstacle": "too little room"}, "WARNING", "too little room"),
        ({"checkpoint": {"age": 61.0}}, "WARNING", "age 61.0 s"),
        ({"checkpoint": {"age": 301.0}, "consistent": False}, "CRITICAL", "age 301.0 s"),
        ({"checkpoint": {"age": 301.0}, "stage": "done"}, "WARNING", "the stage is done"),
        ({"checkpoint": {"time": None, "age": None}}, "OK", "in sync"),
        ({"disks": [{"hidden-bytes": 90, "hidden-limit-bytes": 100}]}, "WARNING", "overlay 90%"),
        ({"disks": [{"active-bytes": 96, "size": 100}]}, "CRITICAL", "overlay 96%"),
        ({"disks": [{"out-of-sync-bytes": "many"}]}, "UNKNOWN", "cannot be read"),
    ],
)
def test_what_is_wrong(node: FakeNode, more: dict[str, Any], state: str, text: str) -> None:
    node.answers["query-replication"] = status(**more)
    found, line = check(node)
    assert found == state
    assert text in line


def test_limits(node: FakeNode) -> None:
    node.answers["query-replication"]["disks"][0]["out-of-sync-bytes"] = 2 << 20
    assert check(node)[0] == "OK"
    state, line = check(node, "--warning", "out-of-sync=1M,age=1", "--critical", "age=100")
    assert state == "WARNING"
    assert "age 2.0 s; out-of-sync 2.0 MiB" in line
    assert "age=2s;1;100;0 out_of_sync=2097152B;1048576;;0" in line
    assert check(node, "--critical", "out-of-sync=2M")[0] == "CRITICAL"


def test_a_node_that_is_not_there(node: FakeNode) -> None:
    node.die()
    state, line = check(node)
    assert (state, "Connection refused" in line) == ("CRITICAL", True)


def test_as_json(node: FakeNode) -> None:
    done = subprocess.run(
        [REPOSITORY / "scripts/replctl", "--control", node.path, "check", "--json"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert json.loads(done.stdout)["state"] == "OK"


@pytest.mark.parametrize("wrong", ["age", "age=", "age=x", "age=-1", "age=nan", "queue=1", "overlay=1M"])
def test_limits_that_are_none(node: FakeNode, wrong: str) -> None:
    done = subprocess.run(
        [REPOSITORY / "scripts/replctl", "--control", node.path, "check", "--warning", wrong],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 2
    assert "is not age=SECONDS, out-of-sync=BYTES or overlay=PERCENT" in done.stderr
