# SPDX-License-Identifier: BSD-3-Clause
"""latency.py: what requests wait for is counted once, for requests alone, and the worst of an hour is known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from replication.order import latency as module
from replication.order.gate import Gate
from replication.order.latency import (
    BOUNDS_S,
    CHECKPOINT,
    COMMIT,
    GATE,
    LOCK,
    OVERLAP,
    READ,
    REASONS,
    SLOW_DISK,
    WAITS,
    WRITE,
    Course,
    Histogram,
    Latency,
    told_by_peer,
)
from replication.order.rangelock import RangeLock
from waiting import DEADLINE_S, wait_until


class Clock:
    """What time.monotonic says."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module.time, "monotonic", found)
    return found


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def request(latency: Latency, action: Callable[[], None], operation: str = WRITE, export: str = "disk0") -> None:
    """As server/export.py does one."""
    course = latency.begin(latency.guests.tally(export, operation))
    try:
        action()
    finally:
        course.end()


def told(latency: Latency, operation: str = WRITE, export: str = "disk0") -> dict[str, Any]:
    [found] = [one for one in latency.to_json()["guest"] if (one["operation"], one["export"]) == (operation, export)]
    return dict(found)


def buckets(histogram: dict[str, Any]) -> dict[float | None, int]:
    """Upper bound in seconds (None: above all) -> how many."""
    return {bound: count for bound, count in zip((*BOUNDS_S, None), histogram["counts"], strict=True) if count}


def waits_in(latency: Latency, part: int) -> Course:
    """The one that waits for that."""

    def found() -> Course | None:
        return next((course for course in latency._courses.values() if course.waiting == part), None)

    course: Course = wait_until(found, f"a request waits for {WAITS[part]}")
    return course


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [(0.0, 4e-6), (3.9e-6, 4e-6), (5e-6, 8e-6), (1.5e-3, 2.048e-3), (100.0, 134.217728), (500.0, None), (1e9, None)],
)
def test_each_duration_is_in_the_bucket_whose_bound_is_next_above_it(seconds: float, bound: float | None) -> None:
    histogram = Histogram()
    histogram.add(seconds)
    assert buckets(histogram.to_json()) == {bound: 1}
    assert histogram.to_json()["sum"] == seconds


def test_a_request_that_waits_for_nothing_is_its_disks(clock: Clock) -> None:
    latency = Latency()
    request(latency, lambda: setattr(clock, "now_s", clock.now_s + 0.003))
    entry = told(latency)
    assert list(entry["parts"]) == ["disk"]
    assert entry["parts"]["disk"] == entry["total"]
    assert buckets(entry["total"]) == {0.004096: 1}
    assert latency.waited()["counts"] == [0] * len(latency.waited()["counts"])


def test_the_parts_of_a_request_make_up_its_time(clock: Clock) -> None:
    latency = Latency()

    def action() -> None:
        for part, seconds in ((GATE, 0.5), (LOCK, 0.25), (LOCK, 0.25)):
            course = latency.waiting(part, OVERLAP)
            assert course is not None
            clock.now_s += seconds
            course.go_on(OVERLAP)
        clock.now_s += 0.001

    request(latency, action)
    request(latency, lambda: setattr(clock, "now_s", clock.now_s + 0.001))
    entry = told(latency)
    sums = {name: part["sum"] for name, part in entry["parts"].items()}
    assert sums == pytest.approx({"gate": 0.5, "lock": 0.5, "disk": 0.002})
    assert sum(sums.values()) == pytest.approx(entry["total"]["sum"])
    assert buckets(entry["parts"]["disk"]) == {0.001024: 2}, "the one that has waited counts without its waits"
    assert buckets(latency.waited()) == {1.048576: 1}, "and the other one has not waited"


def test_a_request_that_fails_counts(clock: Clock) -> None:
    latency = Latency()

    def fail() -> None:
        clock.now_s += 7.0
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        request(latency, fail)
    worst = latency.longest()
    assert worst is not None
    assert (worst["seconds"], worst["reason"], worst["under-way"]) == (7.0, SLOW_DISK, False)


def test_requests_at_a_closed_gate_know_why_it_is(pool: ThreadPoolExecutor) -> None:
    gate = Gate()

    def enter() -> None:
        with gate:
            pass

    with gate.closed(why=CHECKPOINT):
        guest = pool.submit(request, gate.latency, enter)
        assert waits_in(gate.latency, GATE).why == CHECKPOINT
        wait_until(lambda: (gate.latency.longest() or {}).get("reason") == CHECKPOINT, "the stall is known at once")
        worst = gate.latency.longest()
        assert worst is not None
        assert (worst["text"], worst["under-way"]) == (REASONS[CHECKPOINT], True)
    guest.result(DEADLINE_S)
    worst = gate.latency.longest()
    assert worst is not None
    assert (worst["export"], worst["operation"], worst["under-way"]) == ("disk0", WRITE, False)
    assert sum(told(gate.latency)["parts"]["gate"]["counts"]) == 1


@pytest.mark.parametrize("why", [COMMIT, OVERLAP])
def test_requests_on_a_held_range_know_who_holds_it(pool: ThreadPoolExecutor, why: str) -> None:
    latency, lock = Latency(), RangeLock()
    lock.latency = latency
    held = lock.acquire(0, 4096, why)
    guest = pool.submit(request, latency, lambda: lock.release(lock.acquire(0, 8192)))
    assert waits_in(latency, LOCK).why == why
    lock.release(held)
    guest.result(DEADLINE_S)
    assert sum(told(latency)["parts"]["lock"]["counts"]) == 1


def test_who_is_at_work_on_no_request_is_not_counted(pool: ThreadPoolExecutor) -> None:
    """A commit in a thread that has served requests before, as the range lock and the gate see it."""
    latency, lock = Latency(), RangeLock()
    lock.latency = latency
    asked = threading.Event()

    def serve_then_commit() -> None:
        request(latency, lambda: None)
        asked.set()
        assert latency.waiting(LOCK, COMMIT) is None
        lock.release(lock.acquire(0, 4096, COMMIT))

    held = lock.acquire(0, 4096)
    committing: Future[None] = pool.submit(serve_then_commit)
    assert asked.wait(DEADLINE_S)
    wait_until(lambda: len(lock._asked) == 2, "the commit waits")
    assert not any(course.waiting >= 0 for course in latency._courses.values())
    lock.release(held)
    committing.result(DEADLINE_S)
    assert list(told(latency)["parts"]) == ["disk"]


def test_a_wait_is_forgotten_with_its_request(clock: Clock) -> None:
    latency = Latency()

    def wait() -> None:
        course = latency.waiting(GATE, CHECKPOINT)
        assert course is not None
        clock.now_s += 5.0
        course.go_on(CHECKPOINT)

    request(latency, wait)
    clock.now_s += module.HOUR_S + 61.0
    latency.look()
    request(latency, lambda: setattr(clock, "now_s", clock.now_s + 0.5))
    worst = latency.longest()
    assert worst is not None
    assert (worst["seconds"], worst["reason"]) == (0.5, SLOW_DISK)
    assert sum(told(latency)["parts"]["gate"]["counts"]) == 1


def test_the_longest_of_the_last_hour(clock: Clock) -> None:
    latency = Latency()

    def longest_s() -> float:
        return (latency.longest() or {"seconds": 0.0})["seconds"]

    def take(seconds: float) -> None:
        latency.look()  # as the node does twice a second
        request(latency, lambda: setattr(clock, "now_s", clock.now_s + seconds))

    assert latency.longest() is None
    take(0.25)
    take(8.0)
    take(0.5)
    assert longest_s() == 8.0
    assert latency.longest(8.0) is not None, "as long as it has to be"
    assert latency.longest(8.5) is None
    for _ in range(58):
        clock.now_s += 60.0
        take(0.5)
    assert longest_s() == 8.0, "of 59 minutes ago"
    clock.now_s += 120.0
    assert longest_s() == 0.5, "also where nobody has come since"
    for _ in range(100):
        clock.now_s += 61.0
        take(0.125)
    assert longest_s() == 0.125
    assert len(latency.guests._stalls) <= 60


def test_a_minute_keeps_only_its_longest(clock: Clock) -> None:
    latency = Latency()
    for seconds in (3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0):
        request(latency, lambda seconds=seconds: setattr(clock, "now_s", clock.now_s + seconds))  # type: ignore[misc]
    assert [stall.seconds for stall in latency.guests.stalls(clock.now_s)] == [9.0]


def test_guests_are_not_taken_for_the_primary(clock: Clock) -> None:
    latency = Latency()
    course = latency.begin(latency.primarys.tally("disk0", WRITE))
    clock.now_s += 30.0
    assert latency.longest() is None, "nor while it is under way"
    course.end()
    assert latency.longest() is None
    request(latency, lambda: None, READ, "top0")
    answer = latency.to_json()
    assert [(one["export"], one["operation"]) for one in answer["guest"]] == [("top0", READ)]
    assert [(one["export"], one["operation"]) for one in answer["target"]] == [("disk0", WRITE)]


def test_threads_of_clients_that_have_gone_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    latency, thread = Latency(), 0
    monkeypatch.setattr(module, "get_ident", lambda: thread)
    busy = latency.begin(latency.guests.tally("disk0", READ))
    for thread in range(1, 3 * module._COURSES_MAX):  # noqa: B007 (get_ident says it)
        request(latency, lambda: None)
    assert len(latency._courses) <= module._COURSES_MAX
    thread = 0
    assert latency.waiting(GATE, CHECKPOINT) is busy, "who is at work is known"


def test_every_reason_has_a_text() -> None:
    codes = {value for name, value in vars(module).items() if name.isupper() and isinstance(value, str) and "_" in name}
    assert codes <= set(REASONS)


GOOD = {"export": "disk0", "operation": "write", "total": {"counts": [1] * (len(BOUNDS_S) + 1), "sum": 2.5}, "x": 1}


def test_what_a_peer_tells() -> None:
    found = told_by_peer({"target": [GOOD]})
    assert found == [{key: GOOD[key] for key in ("export", "operation", "total")}]


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        7,
        {"total": None},
        {**GOOD, "total": {"counts": [1], "sum": 1}},
        {**GOOD, "total": {"counts": [-1] * (len(BOUNDS_S) + 1), "sum": 1}},
        {**GOOD, "total": {"counts": [True] * (len(BOUNDS_S) + 1), "sum": 1}},
        {**GOOD, "total": {"counts": GOOD["total"]["counts"], "sum": "1"}},  # type: ignore[index]
        {**GOOD, "total": {"counts": GOOD["total"]["counts"], "sum": float("nan")}},  # type: ignore[index]
    ],
)
def test_what_a_peer_tells_in_another_form_is_left_out(wrong: Any) -> None:
    assert told_by_peer({"target": [wrong, GOOD]}) == told_by_peer({"target": [GOOD]})


@pytest.mark.parametrize("answer", [None, [], {}, {"target": {}}, "target"])
def test_a_peer_that_tells_nothing(answer: Any) -> None:
    assert told_by_peer(answer) is None
    assert len(told_by_peer({"target": [GOOD] * 5000}) or []) == module._KINDS_MAX
