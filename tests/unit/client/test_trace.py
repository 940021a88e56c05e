# SPDX-License-Identifier: BSD-3-Clause
"""trace.py: what has been added between two answers, and how a person reads it."""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

import pytest
from rich.console import Console

from replication.client.session import Unusable
from replication.client.trace import difference, histogram_lines, show, table_lines, views

BOUNDS = [0.001, 0.002, 0.004]


def histogram(*counts: int, sum: float = 1.0) -> dict[str, Any]:
    return {"counts": list(counts), "sum": sum}


def entry(total: dict[str, Any], operation: str = "write", **parts: Any) -> dict[str, Any]:
    return {"export": "disk0", "operation": operation, "total": total, "parts": parts}


def answer(**more: Any) -> dict[str, Any]:
    return {
        "since": 5.0,
        "bounds": BOUNDS,
        "guest": [],
        "target": [],
        "longest-stall": None,
        **more,
    }


class Node:
    """A session with a node that gives these answers, one after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def call(self, command: str) -> Any:
        assert command == "query-replication-latency"
        return self.answers.pop(0)


def told(capsys: pytest.CaptureFixture[str], *answers: Any, seconds: float | None, as_json: bool) -> str:
    show(Node(*answers), argparse.Namespace(seconds=seconds, json=as_json))  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_the_difference_of_two_answers_is_what_came_in_between() -> None:
    before = answer(
        guest=[entry(histogram(5, 1, 0, 0, sum=2.0), gate=histogram(1, 0, 0, 0, sum=0.5))],
        link=[{"disk": "disk0", "answers": histogram(3, 0, 0, 0)}],
        peer=None,
    )
    after = answer(
        guest=[
            entry(histogram(6, 1, 2, 0, sum=2.5), gate=histogram(1, 0, 0, 0, sum=0.5), lock=histogram(0, 1, 0, 0)),
            entry(histogram(0, 0, 0, 7), "read"),
        ],
        link=[{"disk": "disk0", "answers": histogram(3, 0, 0, 2, sum=4.0)}],
        peer=[entry(histogram(9, 0, 0, 0))],
    )
    found = difference(after, before)
    write, read = found["guest"]
    assert write["total"] == histogram(1, 0, 2, 0, sum=0.5)
    assert write["parts"] == {"gate": histogram(0, 0, 0, 0, sum=0.0), "lock": histogram(0, 1, 0, 0)}
    assert read["total"] == histogram(0, 0, 0, 7)
    assert found["link"][0]["answers"] == histogram(0, 0, 0, 2, sum=3.0)
    assert found["peer"] == after["peer"], "there was none before"


def test_a_node_or_a_peer_that_was_started_meanwhile_counts_anew() -> None:
    before = answer(guest=[entry(histogram(9, 9, 9, 9))], peer=[entry(histogram(9, 0, 0, 0))])
    again = answer(guest=[entry(histogram(1, 0, 0, 0))], since=6.0)
    assert difference(again, before) == again
    other = answer(guest=[entry(histogram(9, 9, 9, 9))], peer=[entry(histogram(2, 0, 0, 0))])
    assert difference(other, before)["peer"] == other["peer"]


def test_the_table_has_the_parts_in_their_order_and_what_later_versions_add() -> None:
    parts = {
        "disk": histogram(99, 0, 0, 0, sum=0.1),
        "gate": histogram(0, 0, 0, 1, sum=9.9),
        "x\x1b": histogram(1, 0, 0, 0),
    }
    lines = list(table_lines(answer(guest=[entry(histogram(99, 0, 0, 1, sum=10.0), **parts)])))
    assert [line.part for line in lines] == ["all", "  gate (a command at work)", "  local disk", "  x "]
    everything, gate, disk, _ = lines
    assert (everything.who, everything.requests, everything.mean) == ("disk0 write", "100", "100.0 ms")
    assert (everything.median, everything.most, everything.longest) == ("1.0 ms", "1.0 ms", "> 4.0 ms")
    assert (gate.share, gate.requests, gate.longest) == ("99%", "1", "> 4.0 ms")
    assert (disk.share, disk.median) == ("1%", "1.0 ms")


def test_what_was_sent_is_divided_into_the_link_and_the_disk_there() -> None:
    link = [{"disk": "disk0", "answers": histogram(0, 0, 10, 0, sum=0.03)}]
    there = [entry(histogram(4, 0, 0, 0, sum=0.004)), entry(histogram(6, 0, 0, 0, sum=0.006), "flush")]
    lines = list(table_lines(answer(link=link, peer=there)))
    assert [(line.part.strip(), line.mean) for line in lines] == [
        ("all", "3.0 ms"),
        ("peer's disk", "1.0 ms"),
        ("link", "2.0 ms"),
    ]
    assert [line.part for line in table_lines(answer(link=link, peer=None))] == ["all"]


def test_the_histogram_is_as_long_as_what_there_is() -> None:
    lines = list(histogram_lines(answer(guest=[entry(histogram(0, 20, 0, 1))])))
    assert lines[1] == "disk0 write"
    assert [line.split()[-1] for line in lines[2:]] == ["20", "0", "1"]
    assert [line.count("█") for line in lines[2:]] == [40, 0, 2]
    assert lines[-1].split()[0] == "more"


def test_views_without_a_request() -> None:
    screen = Console(file=io.StringIO(), width=200)
    for part in views(answer(guest=[entry(histogram(0, 0, 0, 0))]), 3.0):
        screen.print(part)
    assert screen.file.getvalue().splitlines() == ["of 3 s", "no requests", "longest of the last hour: none"]  # type: ignore[attr-defined]


STALL = {"seconds": 2.5, "time": 0, "export": "disk0", "operation": "write", "reason": "queue-full", "text": "the text"}


@pytest.mark.parametrize(("under_way", "when"), [(True, "under way"), (False, "at 19")])
def test_the_longest_stall_and_why(capsys: pytest.CaptureFixture[str], under_way: bool, when: str) -> None:
    found = answer(**{"longest-stall": {**STALL, "under-way": under_way}}, guest=[entry(histogram(1, 0, 0, 0))])
    lines = told(capsys, found, seconds=None, as_json=False).splitlines()
    assert lines[0].startswith("since ")
    assert lines[-1].startswith(f"longest of the last hour: 2.5 s, write on disk0, {when}")
    assert lines[-1].endswith("(queue-full: the text)")


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (answer(guest=[entry(histogram(count, 0, 0, 0))]) for count in (1, 3))
    found = json.loads(told(capsys, before, after, seconds=0.001, as_json=True))
    assert found["seconds"] == 0.001
    assert found["guest"][0]["total"]["counts"] == [2, 0, 0, 0]
    assert json.loads(told(capsys, before, seconds=None, as_json=True)) == {"seconds": None, **before}


@pytest.mark.parametrize("wrong", [None, [], {}, {"bounds": 1}])
def test_an_answer_of_another_kind(capsys: pytest.CaptureFixture[str], wrong: Any) -> None:
    with pytest.raises(Unusable, match="something else"):
        told(capsys, wrong, seconds=None, as_json=True)
