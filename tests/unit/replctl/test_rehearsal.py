# SPDX-License-Identifier: BSD-3-Clause
"""replctl test, and what a person reads of tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from replication.client.session import Session, Unusable
from replication.client.values import human_last_test, human_tests
from replication.replctl.line import parser, with_node
from replication.replctl.rehearsal import test as run_test

STARTED = {"name": "a", "epoch": 7, "exports": [{"disk": "disk0", "export": "top id.a", "size": 4096}]}


class Node:
    """Answers every command with `answer`."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        self.called: list[tuple[str, dict[str, Any]]] = []

    def call(self, command: str, **arguments: Any) -> Any:
        self.called.append((command, arguments))
        return self.answer


def run(node: Node, *arguments: str) -> None:
    run_test(cast("Session", node), parser().parse_args(with_node(list(arguments))))


@pytest.fixture(autouse=True)
def _nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDKIT_REPLICATION_CONFIG_DIR", str(tmp_path))
    (tmp_path / "web1.toml").write_text('mode = "secondary"\n[service]\nguest-socket = "/run/a b/guest.sock"\n')


def test_a_start_prints_where_the_test_is(capsys: pytest.CaptureFixture[str]) -> None:
    node = Node(STARTED)
    run(node, "web1", "test", "start", "--name", "a", "--ends", "60")
    assert node.called == [("replication-test-start", {"name": "a", "timeout": 60.0})]
    uri = "nbd+unix:///top%20id.a?socket=/run/a%20b/guest.sock"
    assert capsys.readouterr().out == f"test a, of checkpoint 7:\n  disk0  {uri}\n"
    run(node, "test", "start", "--uri", "nbds://host:10809/ignored?tls-certificates=/t", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["exports"][0]["uri"] == "nbds://host:10809/top%20id.a?tls-certificates=/t"
    run(node, "--state", "/s", "test", "start")
    assert capsys.readouterr().out.endswith("  disk0  top id.a\n")


def test_what_is_no_uri_is_refused() -> None:
    with pytest.raises(Unusable, match="it is no NBD URI"):
        run(Node(STARTED), "test", "start", "--uri", "http://host")


def test_a_stop_tells_why_it_had_ended_before(capsys: pytest.CaptureFixture[str]) -> None:
    node = Node({"name": "a", "result": None, "reason": None})
    run(node, "web1", "test", "stop")
    assert node.called == [("replication-test-stop", {})]
    assert capsys.readouterr().out == "test a is over, and nothing of it is left\n"
    node.answer["reason"] = "the stage is failover"
    run(node, "web1", "test", "stop", "--name", "a")
    assert node.called[-1] == ("replication-test-stop", {"name": "a"})
    assert "(it had ended: the stage is failover)" in capsys.readouterr().out


def test_tests_for_a_person() -> None:
    one = {"name": "a", "epoch": 7, "bytes": 4096, "ended": None}
    assert human_tests([]) == "none"
    assert human_tests([one, {**one, "name": "b", "ended": "it is full"}]) == (
        "a (of checkpoint 7, 4.0 KiB), b (of checkpoint 7, 4.0 KiB, ended: it is full)"
    )
    assert human_tests("?") == "?"
    assert human_last_test(None) == "never"
    last = {"time": 0, "result": "passed", "rto": 2.5, "reason": None}
    assert human_last_test(last).endswith(", passed in 2.5 s")
    assert human_last_test({**last, "result": "failed", "rto": None, "reason": "no"}).endswith(", failed (no)")
    assert human_last_test(5) == "5"
