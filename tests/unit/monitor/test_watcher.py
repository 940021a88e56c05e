# SPDX-License-Identifier: BSD-3-Clause
"""Watching one node, and many, that answer, hang, die, come back and change."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakenode import FakeNode, status
from replication.monitor import fleet as fleet_module
from replication.monitor.fleet import NEWS_MAX, Fleet, Found
from replication.monitor.sight import Sight
from replication.monitor.watcher import Watcher
from waiting import wait_until

Nodes = Callable[..., FakeNode]
Fleets = Callable[..., Fleet]


def sight(fleet: Fleet, name: str = "a") -> Sight:
    return next(watcher.sight for watcher in fleet.watchers() if watcher.name == name)


def names_of_events(fleet: Fleet, name: str = "a") -> list[str]:
    return [
        event["event"] for watcher in fleet.watchers() if watcher.name == name for event in watcher.journal.events()
    ]


def seen(fleet: Fleet, what: str, fits: Callable[[Sight], bool], name: str = "a") -> Sight:
    found: Sight = wait_until(lambda: next((one for one in [sight(fleet, name)] if fits(one)), None), what)
    return found


def heard(fleet: Fleet, *names: str) -> None:
    """These events and no others; each comes a moment after what it tells of can be seen."""
    wait_until(lambda: len(names_of_events(fleet)) >= len(names), f"the events {names}")
    assert names_of_events(fleet) == list(names)


def test_a_node_is_asked_and_only_asked(node: Nodes, fleet: Fleets) -> None:
    there = node("a", "secondary")
    watched = fleet({"a": str(there.path)})
    found = seen(watched, "it is up", lambda s: s.up)
    assert (found.mode, found.stage, found.link) == ("secondary", "running", "in-sync")
    assert found.failover["bytes-to-commit"] == 4096
    assert found.version == "nbdkit-replication 0"
    heard(watched, "MONITOR_NODE_UP")
    assert {command for command in there.asked if not command.startswith("query-")} == {"qmp_capabilities"}


def test_a_new_role_and_events_are_seen(node: Nodes, fleet: Fleets) -> None:
    there = node()
    watched = fleet({"a": str(there.path)})
    seen(watched, "it is up", lambda s: s.up)
    there.answers["query-replication"] = status("secondary", stage="done")
    there.emit("REPLICATION_STAGE_CHANGE", mode="secondary", **{"from": "failover", "to": "done"})
    seen(watched, "the new role", lambda s: s.mode == "secondary" and s.stage == "done")
    wait_until(lambda: "REPLICATION_STAGE_CHANGE" in names_of_events(watched), "the event")


def test_a_node_that_dies_and_comes_back(node: Nodes, fleet: Fleets) -> None:
    there = node()
    watched = fleet({"a": str(there.path)})
    before = seen(watched, "it is up", lambda s: s.up)
    there.die()
    down = seen(watched, "it is down", lambda s: not s.up)
    assert down.trouble
    assert down.checkpoint_time == before.checkpoint_time
    there.path.unlink()
    there.start()
    seen(watched, "it is up again", lambda s: s.up)
    heard(watched, "MONITOR_NODE_UP", "MONITOR_NODE_DOWN", "MONITOR_NODE_UP")


def test_a_node_that_hangs_delays_nobody_else(node: Nodes, fleet: Fleets) -> None:
    hangs, lives = node("a"), node("b")
    watched = fleet({"a": str(hangs.path), "b": str(lives.path)}, answer_s=0.3)
    for name in "ab":
        seen(watched, "both are up", lambda s: s.up, name)
    hangs.answering.clear()
    gone = seen(watched, "it counts as gone", lambda s: not s.up)
    assert gone.trouble is not None
    assert gone.trouble.startswith("no answer within 0.3 s")
    looked = sight(watched, "b").looked
    # On a loaded machine that one, too, may need longer than 0.3 s for an answer; it is asked again.
    seen(watched, "the other is asked on", lambda s: s.up and s.looked > looked, "b")
    assert not hangs.answering.is_set()
    hangs.answering.set()
    seen(watched, "it is there again", lambda s: s.up)


@pytest.mark.parametrize(
    ("greeting", "trouble"),
    [
        (b"NBDMAGICIHAVEOPT", "does not speak QMP"),
        (b'{"error": {"class": "GenericError", "desc": "Too many clients"}}\n', "Too many clients"),
        (b'{"hello": 1}\n', "does not speak QMP"),
    ],
)
def test_what_is_no_node_says_so(node: Nodes, fleet: Fleets, greeting: bytes, trouble: str) -> None:
    there = node()
    there.greeting = greeting
    watched = fleet({"a": str(there.path)}, answer_s=0.5)
    there.restart()
    assert trouble in str(seen(watched, "it says so", lambda s: trouble in str(s.trouble)).trouble)


@pytest.mark.parametrize("odd", [[], 5, None, "x"])
def test_an_odd_answer_does_not_end_the_watch(node: Nodes, fleet: Fleets, odd: Any) -> None:
    there = node()
    there.answers["query-replication"] = odd
    watched = fleet({"a": str(there.path)})
    seen(watched, "it has been tried", lambda s: s.trouble != "not asked yet")
    there.answers["query-replication"] = status()
    seen(watched, "it is up", lambda s: s.up)


def test_nodes_appear_and_disappear(node: Nodes, fleet: Fleets) -> None:
    first, second = node("a"), node("b")
    sockets = {"a": str(first.path)}
    watched = fleet(sockets)
    seen(watched, "the first", lambda s: s.up)
    sockets["b"] = str(second.path)
    wait_until(lambda: len(watched.watchers()) == 2 and sight(watched, "b").up, "the second")
    old = watched.watchers()[0]
    del sockets["a"]
    wait_until(lambda: [watcher.name for watcher in watched.watchers()] == ["b"], "the first is forgotten")
    assert old.join(time.monotonic() + 30)
    sockets["b"] = str(first.path)
    wait_until(lambda: sight(watched, "b").path == str(first.path), "the other socket")


def test_a_configuration_that_cannot_be_read_changes_nothing(node: Nodes) -> None:
    there = node()
    answers: list[Found | Exception] = [Found({"a": str(there.path)}), OSError("broken"), Found({}, "half broken")]

    def find() -> Found:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watched = Fleet(find, rescan_s=1000)
    watched.start()
    watched.scan()
    assert [watcher.name for watcher in watched.watchers()] == ["a"]
    assert watched.trouble == "broken"
    watched.scan()
    assert (watched.watchers(), watched.trouble) == ([], "half broken")
    watched.stop()


def test_there_are_not_more_threads_than_nodes_may_be(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(fleet_module, "NODES_MAX", 3)
    watched = Fleet(lambda: Found({f"n{number}": str(folder / str(number)) for number in range(9)}), rescan_s=1000)
    watched.start()
    assert [watcher.name for watcher in watched.watchers()] == ["n0", "n1", "n2"]
    watched.stop()


def test_who_does_not_read_news_loses_some_and_delays_nobody(node: Nodes, fleet: Fleets) -> None:
    there = node()
    watched = fleet({"a": str(there.path)})
    lazy = watched.subscribe()
    seen(watched, "it is up", lambda s: s.up)
    for _ in range(NEWS_MAX + 50):
        there.emit("SOMETHING")
    there.emit("LAST")
    wait_until(lambda: names_of_events(watched)[-1:] == ["LAST"], "the last event")
    assert sum(lazy.next(0.01) is not None for _ in range(NEWS_MAX)) == NEWS_MAX
    watched.unsubscribe(lazy)


def test_stop_does_not_wait_for_a_node_that_hangs(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(folder / "deaf"))
        deaf.listen()
        before = threading.enumerate()
        watcher = Watcher("a", str(folder / "deaf"), answer_s=0.2)
        watcher.start()
        watcher.stop()
        assert watcher.join(time.monotonic() + 30)
        assert set(threading.enumerate()) <= set(before)
