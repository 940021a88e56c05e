# SPDX-License-Identifier: BSD-3-Clause
"""What is kept of a node's past, and how much of it."""

from __future__ import annotations

from typing import Any

from fakenode import status
from replication.monitor.journal import EVENT_BYTES_MAX, EVENTS_MAX, SAMPLE_S, SAMPLES_MAX, Journal
from replication.monitor.sight import Sight


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}}


def failure(count: int, first: float = 1.0, case: int = 3) -> dict[str, Any]:
    return event("REPLICATION_ERROR", case=case, disk="d", count=count, first=first)


def look(moment: float, written: int = 0, up: bool = True, mode: str = "primary") -> Sight:
    answer = status(mode)
    answer["disks"][0]["totals"]["written" if mode == "primary" else "guest-written"] = written
    return Sight("a", "/a", up, 0, moment, None, answer)


def test_the_last_events_are_kept_and_checkpoints_do_not_push_them_out() -> None:
    told: list[dict[str, Any]] = []
    journal = Journal(told.append)
    for number in range(EVENTS_MAX + 10):
        journal.put(event("E", number=number))
        journal.put(event("REPLICATION_CHECKPOINT", epoch=number, duration=0.004))
    kept = journal.events()
    assert [one["data"]["number"] for one in kept] == list(range(10, EVENTS_MAX + 10))
    assert len(told) == EVENTS_MAX + 10
    durations = journal.durations()
    assert sum(durations.counts) == EVENTS_MAX + 10
    assert durations.counts[2] == EVENTS_MAX + 10


def test_an_event_that_is_large_or_odd_is_kept_without_what_is_in_it() -> None:
    journal = Journal()
    journal.put(event("BIG", much="x" * EVENT_BYTES_MAX))
    journal.put({"event": 5, "data": [], "timestamp": "never"})
    journal.put(event("REPLICATION_CHECKPOINT", duration="long"))
    journal.put(event("REPLICATION_ERROR"))
    assert [(one["event"], list(one["data"])) for one in journal.events()] == [
        ("BIG", ["note"]),
        ("?", []),
        ("REPLICATION_ERROR", []),
    ]


def test_failures_are_counted_as_the_node_counts_them() -> None:
    """An event stands for all failures since the `first` one."""
    journal = Journal()
    for one in (failure(1), failure(5), failure(5), failure(2, first=9.0), failure(1, case=8)):
        journal.put(one)
    assert journal.errors() == {"3": 7, "8": 1}


def test_samples_have_rates_and_a_restart_is_no_negative_one() -> None:
    journal = Journal()
    taken = [
        journal.sample(look(1000 + number * SAMPLE_S, written), 1000 + number * SAMPLE_S)
        for number, written in enumerate((0, 5000, 5000, 10))
    ]
    assert [one and one.write_rate for one in taken] == [None, 5000 / SAMPLE_S, 0.0, 0.0]
    assert journal.sample(look(1016, 10), 1000 + 3 * SAMPLE_S + 1) is None  # too soon
    down = journal.sample(look(1020, 10, up=False), 1020.0)
    assert down is not None
    assert (down.write_rate, down.queue, down.lacking) == (None, None, None)


def test_a_checkpoint_counts_for_one_sample_and_a_secondary_has_overlays() -> None:
    journal = Journal()
    journal.put(event("REPLICATION_CHECKPOINT", duration=0.5))
    journal.put(event("REPLICATION_CHECKPOINT", duration=0.1))
    first, second = (journal.sample(look(moment, mode="secondary"), moment) for moment in (1000.0, 1005.0))
    assert first is not None
    assert second is not None
    assert (first.checkpoint_s, second.checkpoint_s) == (0.5, None)
    assert (first.overlay, first.queue) == (4096 + 8192, None)


def test_an_hour_of_samples_is_kept() -> None:
    journal = Journal()
    for number in range(SAMPLES_MAX + 5):
        journal.sample(look(number * SAMPLE_S), number * SAMPLE_S)
    assert len(journal.samples()) == SAMPLES_MAX
    assert journal.samples()[0].time == 5 * SAMPLE_S
