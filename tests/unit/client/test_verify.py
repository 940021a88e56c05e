# SPDX-License-Identifier: BSD-3-Clause
"""replctl verify, and what a person reads of a comparison."""

from __future__ import annotations

import argparse
import json
from typing import Any, cast

import pytest

from replication.client import verify as module
from replication.client.qmp import Refused
from replication.client.session import Session
from replication.client.values import human_last_verify, human_verify
from replication.client.verify import outcome_lines, verify
from replication.replctl.table import size

EQUAL: dict[str, Any] = {
    "result": "equal",
    "time": 2.0,
    "duration": 1.0,
    "compared-bytes": 3 << 20,
    "different-bytes": 0,
    "left-out-bytes": 0,
    "ranges": [],
    "repair": False,
    "reason": None,
}
DIFFERENT = {
    **EQUAL,
    "result": "different",
    "different-bytes": 65536,
    "ranges": [{"disk": "disk0", "offset": 131072, "length": 65536}],
}


class Node:
    """Answers query-replication with the next of `answers`, and the last one for ever."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)
        self.called: list[tuple[str, dict[str, Any]]] = []

    def call(self, command: str, **arguments: Any) -> Any:
        if command == "query-replication":
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.called.append((command, arguments))
        return {}


def run(node: Node, **options: Any) -> None:
    given = {"rate": None, "repair": False, "wait": False, "cancel": False, "json": False, **options}
    verify(cast("Session", node), argparse.Namespace(**given))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)


def test_it_is_begun_and_cancelled(capsys: pytest.CaptureFixture[str]) -> None:
    node = Node({"verify": None, "last-verify": None})
    run(node)
    run(node, rate=1 << 20, repair=True)
    run(node, cancel=True)
    assert node.called == [
        ("replication-verify", {}),
        ("replication-verify", {"rate": 1 << 20, "repair": True}),
        ("replication-verify-cancel", {}),
    ]
    assert capsys.readouterr().out.splitlines()[-1] == "the comparison is being cancelled"


def test_it_waits_for_another_result_than_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    former = {**DIFFERENT, "time": 1.0}
    run(Node({"last-verify": former}, {"verify": {}, "last-verify": former}, {"last-verify": EQUAL}), wait=True)
    assert capsys.readouterr().out == "compared 3.0 MiB: equal\n"
    run(Node({"last-verify": None}, {"verify": None, "last-verify": EQUAL}), wait=True, json=True)
    assert json.loads(capsys.readouterr().out) == {"done": True, "verify": EQUAL}


def test_disks_that_are_not_equal_are_an_error() -> None:
    with pytest.raises(Refused, match=r"64\.0 KiB differ and are sent by the next `replctl checkpoint`: disk0 131072"):
        run(Node({"last-verify": None}, {"last-verify": DIFFERENT}), wait=True)


def test_a_node_without_a_result_is_an_error() -> None:
    with pytest.raises(Refused, match="has no result"):
        run(Node({"last-verify": EQUAL}), wait=True)


def test_what_a_result_says() -> None:
    many = {**DIFFERENT, "repair": True, "ranges": DIFFERENT["ranges"] * 9}
    assert outcome_lines(many)[1].startswith("64.0 KiB differ and are sent again: disk0 131072+65536, ")
    assert outcome_lines(many)[1].endswith(", ...")
    left = {**EQUAL, "result": "incomplete", "left-out-bytes": 1 << 20, "reason": "the link\n was lost"}
    assert outcome_lines(left) == [
        "compared 3.0 MiB: incomplete",
        "1.0 MiB were left out",
        "the link  was lost",
    ]
    assert outcome_lines({}) == ["compared -: -"]


def test_what_the_status_says() -> None:
    assert (human_verify(None), human_last_verify(None)) == ("no", "never")
    progress = {"current-progress": 1 << 20, "total-progress": 2 << 20, "different-bytes": 0, "waits-for": "the link"}
    assert human_verify(progress) == "1.0 MiB of 2.0 MiB, 0 B differ, waits: the link"
    assert human_last_verify({**EQUAL, "reason": "cancelled"}).endswith(", equal (cancelled)")
    assert human_last_verify(DIFFERENT).endswith(", different, 64.0 KiB differed")
    assert (human_verify([1]), human_last_verify("x")) == ("[1]", "x")


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("65536", 65536), ("64k", 65536), ("3M", 3 << 20), ("1T", 1 << 40)]
)
def test_a_size(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "M", "1.5M", "-1", "1X", "9" * 16, "1MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 64M"):
        size(text)
