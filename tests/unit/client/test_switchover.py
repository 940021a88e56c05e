# SPDX-License-Identifier: BSD-3-Clause
"""switchover.py: what is said of a stop whose answer is late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from replication.client.qmp import Refused
from replication.client.session import Session, Unanswered
from replication.client.switchover import Move

DISKS = [{"name": "disk0", "size": 4096, "out-of-sync-bytes": 0, "totals": {"written": 0}}]


class Side:
    """A node, and every conversation with it. `late()` is what becomes of its stop after the answer was given up."""

    def __init__(self, mode: str) -> None:
        self.status: dict[str, Any] = {"mode": mode, "stage": "running", "error": None, "disks": DISKS}
        self.late: Callable[[], None] | None = None
        self.calls: list[str] = []

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def again(self, _timeout_s: float) -> Side:
        return self

    def call(self, command: str, **_arguments: Any) -> Any:
        if command == "query-replication":
            return dict(self.status)
        self.calls.append(command)
        if command == "replication-stop" and self.late is not None:
            raise Unanswered("no answer to replication-stop within 1 s")
        self.status["stage"] = "running" if command == "replication-start" else self.status["stage"]
        if command == "replication-stop":
            self.stop()
        return None

    def overdue(self, _within_s: float) -> None:
        assert self.late is not None
        self.late()

    def stop(self) -> None:
        self.status["stage"] = "done"

    def refuse(self) -> None:
        raise Refused("requests are in flight")

    def hang(self) -> None:
        raise Unanswered("no answer")


@pytest.fixture
def sides() -> dict[str, Side]:
    return {"a": Side("primary"), "b": Side("secondary")}


def moved(sides: dict[str, Side]) -> str:
    """What is said when it was not; empty if it was."""
    states = {name: side.call("query-replication") for name, side in sides.items()}
    try:
        Move(cast("dict[str, Session]", sides), states, lambda _line: None).run()
    except Refused as error:
        return str(error)
    return ""


def test_a_primary_that_stops_late_is_started_again(sides: dict[str, Side]) -> None:
    sides["a"].late = sides["a"].stop
    assert "nothing has changed, the primary replicates again" in moved(sides)
    assert sides["a"].status["stage"] == "running"


def test_a_primary_that_refuses_late_has_changed_nothing(sides: dict[str, Side]) -> None:
    sides["a"].late = sides["a"].refuse
    assert "nothing has changed, the primary replicates as before" in moved(sides)


def test_of_a_primary_that_may_stop_yet_nobody_says_that_nothing_has_changed(sides: dict[str, Side]) -> None:
    sides["a"].late = sides["a"].hang
    said = moved(sides)
    assert ("nothing has changed" in said, "a may stop yet" in said) == (False, True)


def test_a_secondary_that_stops_late_owns_the_disk(sides: dict[str, Side]) -> None:
    sides["b"].late = sides["b"].stop
    assert moved(sides) == ""
    assert sides["a"].status["stage"] == "done"


def test_of_a_secondary_that_may_stop_yet_nobody_says_that_nothing_has_changed(sides: dict[str, Side]) -> None:
    sides["b"].late = sides["b"].hang
    said = moved(sides)
    assert ("nothing has changed" in said, "may stop yet, and own the disk then" in said) == (False, True)
    assert sides["a"].status["stage"] == "running"
