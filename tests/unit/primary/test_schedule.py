# SPDX-License-Identifier: BSD-3-Clause
"""schedule.py: what happens by the clock, how often it is said, and that it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from replication.errors import CommandError
from replication.events import Event, EventHub
from replication.primary import schedule
from replication.primary.schedule import AgeWatch, AutomaticCheckpoints, Clocks, Ticker
from waiting import DEADLINE_S, wait_until

PERIOD_S = 0.01


@pytest.fixture
def run() -> Iterator[Callable[[Ticker], Ticker]]:
    """Starts tickers, and sees to it that they end."""
    started: list[Ticker] = []

    def start(ticker: Ticker) -> Ticker:
        ticker.start()
        started.append(ticker)
        return ticker

    yield start
    for ticker in started:
        ticker.stop(DEADLINE_S)
        assert not ticker._worker.alive


def test_a_ticker_calls_again_and_again_until_it_is_stopped(run: Callable[[Ticker], Ticker]) -> None:
    calls = threading.Semaphore(0)
    ticker = run(Ticker("test", PERIOD_S, calls.release))
    for _ in range(5):
        assert calls.acquire(timeout=DEADLINE_S)
    ticker.stop(DEADLINE_S)
    assert not ticker._worker.alive


def test_the_first_call_comes_after_one_period_and_none_after_a_stop(run: Callable[[Ticker], Ticker]) -> None:
    called = threading.Event()
    ticker = run(Ticker("test", 3600.0, called.set))
    begun = time.monotonic()
    ticker.stop(DEADLINE_S)
    assert time.monotonic() - begun < DEADLINE_S, "it does not sleep through its period"
    assert not ticker._worker.alive
    assert not called.is_set()


def test_a_ticker_that_was_never_started_can_be_stopped() -> None:
    Ticker("test", PERIOD_S, lambda: None).stop(0.0)


def test_a_call_that_takes_long_delays_the_next_and_is_not_made_up_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock is the test's: nothing waits, and what the thread is told to wait is noted."""
    now = [100.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    def action() -> None:
        now[0] += next(takes)

    takes = iter([0.25, 3.5, 0.0, 0.0])
    monkeypatch.setattr(schedule, "time", Clock)
    ticker = Ticker("test", 1.0, action)
    ticker._due = now[0] + 1.0
    waits = []
    for _ in range(4):
        waits.append(ticker._due - now[0])
        now[0] = max(now[0], ticker._due)
        left_s = ticker._tick()
        assert left_s == max(0.0, ticker._due - now[0])
    # From the beginning of one call to that of the next; after the one of 3.5 s at once, and then every second again.
    assert [max(0.0, wait_s) for wait_s in waits] == [1.0, 0.75, 0.0, 1.0]


def test_a_stop_waits_no_longer_than_it_may_for_a_call_that_is_at_work(run: Callable[[Ticker], Ticker]) -> None:
    entered, release = threading.Event(), threading.Event()

    def action() -> None:
        entered.set()
        assert release.wait(DEADLINE_S)

    ticker = run(Ticker("test", PERIOD_S, action))
    assert entered.wait(DEADLINE_S)
    ticker.stop(0.01)
    assert ticker._worker.alive
    release.set()
    ticker.stop(DEADLINE_S)
    assert not ticker._worker.alive


# -- automatic checkpoints ---------------------------------------------------------------------------------------


def test_checkpoints_go_on_after_a_failure_and_the_same_reason_is_said_once(
    run: Callable[[Ticker], Ticker], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(schedule, "log", said.append)
    outcomes = iter(["no link", "no link", "other", "", "other", "no link", "no link"])
    ended = threading.Event()

    def take() -> None:
        outcome = next(outcomes, None)
        if outcome is None:
            ended.set()
        elif outcome:
            raise CommandError(outcome)

    run(AutomaticCheckpoints(PERIOD_S, take))
    assert ended.wait(DEADLINE_S)
    assert said == [f"automatic checkpoint: {reason}" for reason in ("no link", "other", "other", "no link")]


# -- the age -----------------------------------------------------------------------------------------------------


class Watched:
    """What an AgeWatch looks at, one look after another: `look(age)`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        hub = EventHub()
        hub.subscribe(self.events.append)
        self.age: float | None = None
        self.epoch = 7
        self.watch = AgeWatch(5.0, lambda: self.age, lambda: self.epoch, hub)

    def look(self, age: float | None) -> int:
        """How many events there have been."""
        self.age = age
        self.watch._look()
        return len(self.events)


def test_an_old_checkpoint_is_told_once_until_there_is_a_younger_one() -> None:
    watched = Watched()
    assert [watched.look(age) for age in (0.0, 4.9, 5.0, 5.1, 6.0, 60.0)] == [0, 0, 0, 1, 1, 1]
    (event,) = watched.events
    assert event["event"] == "REPLICATION_CHECKPOINT_AGE"
    assert event["data"] == {"epoch": 7, "age": 5.1, "limit": 5.0}
    assert [watched.look(age) for age in (0.1, 5.2, 9.0)] == [1, 2, 2]


def test_an_age_that_does_not_matter_is_not_told_and_counts_as_young() -> None:
    watched = Watched()
    assert [watched.look(age) for age in (None, 6.0, None, 7.0)] == [0, 1, 1, 2]


@pytest.mark.parametrize(("limit_s", "look_s"), [(0.1, 0.01), (5.0, 0.5), (10.0, 1.0), (3600.0, 1.0)])
def test_the_age_is_looked_at_often_enough(limit_s: float, look_s: float) -> None:
    assert AgeWatch(limit_s, lambda: None, lambda: 0, EventHub())._period_s == pytest.approx(look_s)


def test_the_watch_looks_by_itself(run: Callable[[Ticker], Ticker]) -> None:
    watched = Watched()
    watched.age = 6.0
    watched.watch._period_s = PERIOD_S
    run(watched.watch)
    wait_until(lambda: watched.events, "it is told")


def test_clocks_follow_new_periods_and_leave_alone_what_stays() -> None:
    taken = threading.Semaphore(0)
    clocks = Clocks(taken.release, lambda: None, lambda: 0, EventHub())
    clocks.set(None, 3600.0)
    limit = clocks._tickers["limit"]
    clocks.set(PERIOD_S, 3600.0)
    assert taken.acquire(timeout=DEADLINE_S)
    assert clocks._tickers["limit"] is limit
    fast = clocks._tickers["interval"]
    clocks.set(3600.0, None)
    wait_until(lambda: not fast._worker.alive, "the former interval has ended")
    assert [*clocks._tickers] == ["interval"]
    assert not limit._worker.alive
    slow = clocks._tickers["interval"]
    clocks.stop()
    assert not slow._worker.alive
    clocks.set(PERIOD_S, PERIOD_S)
    assert not clocks._tickers, "what has ended does not begin again"
