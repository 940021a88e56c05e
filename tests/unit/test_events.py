# SPDX-License-Identifier: BSD-3-Clause
"""events.py: every subscriber gets every event, in one order for all."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from replication.events import Event, EventHub
from waiting import DEADLINE_S


def test_an_event_has_the_form_that_qmp_clients_expect() -> None:
    hub = EventHub()
    seen: list[Event] = []
    hub.subscribe(seen.append)
    before_us = time.time_ns() // 1000
    hub.emit("REPLICATION_STAGE_CHANGE", mode="primary", from_="none", to="running")
    after_us = time.time_ns() // 1000
    (event,) = seen
    assert event["event"] == "REPLICATION_STAGE_CHANGE"
    assert event["data"] == {"mode": "primary", "from": "none", "to": "running"}
    stamp = event["timestamp"]
    assert 0 <= stamp["microseconds"] < 1_000_000
    assert before_us <= stamp["seconds"] * 1_000_000 + stamp["microseconds"] <= after_us


def test_nobody_gets_events_from_before_or_after_the_subscription() -> None:
    hub = EventHub()
    seen: list[Event] = []
    hub.emit("A")
    hub.subscribe(seen.append)
    hub.emit("B")
    hub.unsubscribe(seen.append)
    hub.unsubscribe(seen.append)
    hub.emit("C")
    assert [event["event"] for event in seen] == ["B"]


def test_all_subscribers_see_all_events_of_all_threads_in_the_same_order() -> None:
    hub = EventHub()
    one: list[tuple[int, int]] = []
    other: list[tuple[int, int]] = []
    for seen in (one, other):
        hub.subscribe(lambda event, seen=seen: seen.append((event["data"]["thread"], event["data"]["number"])))

    def emit(thread: int) -> None:
        for number in range(300):
            hub.emit("X", thread=thread, number=number)

    with ThreadPoolExecutor(4) as pool:
        for end in [pool.submit(emit, thread) for thread in range(4)]:
            end.result(DEADLINE_S)
    assert one == other
    for thread in range(4):
        assert [number for from_thread, number in one if from_thread == thread] == list(range(300))
