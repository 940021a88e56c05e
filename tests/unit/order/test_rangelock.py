# SPDX-License-Identifier: BSD-3-Clause
"""rangelock.py: overlapping ranges are never held together, and are given out in the order in which they were asked."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from replication.errors import DiskError
from replication.order import rangelock
from replication.order.rangelock import Range, RangeLock
from waiting import DEADLINE_S, wait_until


class Asker:
    """A thread that asks for one range and has it once `held` is set."""

    def __init__(self, lock: RangeLock, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.held: Range | None = None
        self.error: DiskError | None = None
        before = len(lock._asked)
        self.thread = threading.Thread(target=self._ask, args=(lock,), daemon=True)
        self.thread.start()
        # Asked, or granted at once: from here on the order of asking is fixed.
        wait_until(lambda: len(lock._asked) > before, "the lock knows of the range")

    def _ask(self, lock: RangeLock) -> None:
        try:
            self.held = lock.acquire(self.start, self.stop)
        except DiskError as error:
            self.error = error

    def overlaps(self, other: Asker) -> bool:
        return self.start < other.stop and other.start < self.stop

    def granted(self) -> Range:
        return wait_until(lambda: self.held, f"[{self.start}, {self.stop}) is granted")


class Histories(RuleBasedStateMachine):
    """Asking, trying and releasing in any order, against a list of who asked when."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = RangeLock()
        self.asked: list[Asker] = []

    def entitled(self) -> list[Asker]:
        """Those with nobody before them that overlaps."""
        return [
            one
            for number, one in enumerate(self.asked)
            if not any(one.overlaps(other) for other in self.asked[:number])
        ]

    def compare(self) -> None:
        entitled = self.entitled()
        for one in entitled:
            one.granted()
        assert [one for one in self.asked if one.held is not None] == entitled

    @precondition(lambda self: len(self.asked) < 8)
    @rule(start=st.integers(0, 12), length=st.integers(1, 6))
    def ask(self, start: int, length: int) -> None:
        self.asked.append(Asker(self.lock, start, start + length))
        self.compare()

    @rule(start=st.integers(0, 12), length=st.integers(1, 6))
    def try_and_give_back(self, start: int, length: int) -> None:
        free = not any(start < one.stop and one.start < start + length for one in self.asked)
        held = self.lock.try_acquire(start, start + length)
        assert (held is not None) == free
        if held is not None:
            self.lock.release(held)
        self.compare()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.entitled()))
        self.lock.release(one.granted())
        self.asked.remove(one)
        self.compare()

    def teardown(self) -> None:
        while self.asked:
            one = self.asked.pop(0)
            self.lock.release(one.granted())
            one.thread.join(DEADLINE_S)
        assert self.lock._asked == []


Histories.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestHistories = Histories.TestCase


def test_ranges_that_only_touch_are_held_together() -> None:
    lock = RangeLock()
    first, second = lock.acquire(0, 4096), lock.acquire(4096, 8192)
    lock.release(first)
    lock.release(second)


def test_trying_for_a_range_that_somebody_waits_for_fails() -> None:
    lock = RangeLock()
    holder = lock.acquire(0, 10)
    waiter = Asker(lock, 5, 15)
    # Free at the moment, but the waiter asked first.
    assert lock.try_acquire(12, 14) is None
    assert lock.try_acquire(15, 20) is not None
    lock.release(holder)
    lock.release(waiter.granted())


def test_who_waits_too_long_fails_and_stands_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RangeLock()
    holder = lock.acquire(0, 10)
    monkeypatch.setattr(rangelock, "WAIT_S", 1.0)
    impatient = Asker(lock, 5, 15)
    monkeypatch.setattr(rangelock, "WAIT_S", DEADLINE_S)
    behind = Asker(lock, 12, 20)
    wait_until(lambda: impatient.error, "the waiter gives up")
    assert "bytes 5 to 15" in str(impatient.error)
    # Still with the holder in place: only the one that gave up was in the way.
    lock.release(behind.granted())
    lock.release(holder)
    assert lock._asked == []
    lock.release(lock.acquire(0, 20))


def test_a_range_granted_at_the_moment_of_giving_up_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(RangeLock):
        def _give_up(self, mine: Range, wait_s: float) -> None:
            self.release(holder)  # exactly between the timeout and the look at who is waited for
            super()._give_up(mine, wait_s)

    lock = Late()
    holder = lock.acquire(0, 10)
    monkeypatch.setattr(rangelock, "WAIT_S", 0.05)
    held = lock.acquire(0, 10)
    assert lock.try_acquire(9, 12) is None
    lock.release(held)
    assert lock._asked == []


def test_under_load_two_holders_never_overlap() -> None:
    lock = RangeLock()
    owners = [0] * 16
    clashes: list[int] = []

    def work(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(200):
            start = source.randrange(16)
            stop = min(16, start + source.randint(1, 5))
            take: Callable[[int, int], Range | None] = lock.acquire if source.random() < 0.8 else lock.try_acquire
            held = take(start, stop)
            if held is None:
                continue
            for block in range(start, stop):
                if owners[block]:
                    clashes.append(block)
                owners[block] = seed
            for block in range(start, stop):
                if owners[block] != seed:
                    clashes.append(block)
                owners[block] = 0
            lock.release(held)

    with ThreadPoolExecutor(6) as pool:
        for end in [pool.submit(work, seed) for seed in range(1, 7)]:
            end.result(DEADLINE_S)
    assert clashes == []
    assert lock._asked == []


# -- several ranges at one instant -----------------------------------------------------------------------------------


class Many(Asker):
    """A thread that asks for several ranges at once."""

    def __init__(self, lock: RangeLock, spans: list[tuple[int, int]]) -> None:
        self.spans = spans
        super().__init__(lock, spans[0][0], spans[-1][1])

    def _ask(self, lock: RangeLock) -> None:
        try:
            self.held = lock.acquire_all(self.spans)
        except DiskError as error:
            self.error = error


several = st.sets(st.integers(0, 20), min_size=1, max_size=8).map(
    lambda places: [(place * 10, place * 10 + 10) for place in sorted(places)]
)


@given(several, several)
def test_two_that_ask_for_several_ranges_meet_where_one_of_each_overlap(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    overlap = not set(one).isdisjoint(other)
    for mine, theirs in ((one, other), (other, one)):
        lock = RangeLock()
        held = lock.acquire_all(mine)
        for start, stop in theirs:
            got = lock.try_acquire(start + 3, stop - 3)
            assert (got is None) == ((start, stop) in mine)
            if got is not None:
                lock.release(got)
        second = Range(theirs[0][0], theirs[-1][1], theirs if len(theirs) > 1 else ())
        hulls = held.start < second.stop and second.start < held.stop
        assert (hulls and held.meets(second)) == overlap
        lock.release(held)


def test_between_the_ranges_of_one_that_asked_for_several_others_go_on() -> None:
    lock = RangeLock()
    held = lock.acquire_all([(0, 10), (20, 30)])
    between = lock.acquire(10, 20)
    assert lock.try_acquire(5, 15) is None
    lock.release(held)
    lock.release(between)


def test_who_asks_for_several_waits_for_each_of_them_and_keeps_the_free_ones_meanwhile() -> None:
    lock = RangeLock()
    low, high = lock.acquire(0, 10), lock.acquire(20, 30)
    many = Many(lock, [(5, 8), (12, 14), (22, 24)])
    later = Asker(lock, 12, 14)
    lock.release(low)
    assert many.held is None
    assert later.held is None, "whoever asked first"
    lock.release(high)
    lock.release(many.granted())
    lock.release(later.granted())
    assert lock._asked == []


def test_two_that_ask_for_the_same_ranges_crosswise_with_others_do_not_block_each_other_for_ever() -> None:
    lock = RangeLock()
    first = lock.acquire(20, 30)
    one = Many(lock, [(0, 10), (20, 30)])
    other = Many(lock, [(0, 10), (20, 30), (40, 50)])
    third = Many(lock, [(40, 50), (60, 70)])
    lock.release(first)
    lock.release(one.granted())
    assert third.held is None
    lock.release(other.granted())
    lock.release(third.granted())
    assert lock._asked == []


def test_who_gives_up_on_several_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RangeLock()
    monkeypatch.setattr(rangelock, "WAIT_S", 0.05)
    held = lock.acquire(20, 30)
    with pytest.raises(DiskError, match="waited"):
        lock.acquire_all([(0, 10), (20, 30)])
    lock.release(lock.acquire(0, 10))
    lock.release(held)
    assert lock._asked == []
