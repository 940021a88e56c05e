# SPDX-License-Identifier: BSD-3-Clause
"""backlog.py: room in the queues is given in the order in which it was asked for, and none of it leaks.

What InFlight admits is compared with a model in test_forward.py, where the requests of a real link are, too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lab import DEADLINE_S, begin, wait_until
from replication.order.ended import Ended
from replication.primary import backlog
from replication.primary.backlog import (
    DATA_MAX,
    DATA_MIN,
    ZERO_MAX,
    ZERO_MIN,
    Budget,
    Entry,
    Flow,
    Flows,
    InFlight,
    Kind,
)

LIMIT = 1000
WAITERS_MAX = 8
AT_ONCE_S = 0.02


def needed() -> bool:
    """As `pointless`: it is not."""
    return False


def pointless() -> bool:
    """As `pointless`: it is."""
    return True


def full(limit: int = LIMIT) -> Budget:
    """A budget without room."""
    budget = Budget(limit)
    assert budget.take(limit, needed, 0)
    return budget


class Waiting:
    """A thread that waits for room."""

    def __init__(self, budget: Budget, size: int) -> None:
        self.size = size
        self.hopeless = False
        before = len(budget._line)
        self.result = begin(budget.take, size, lambda: self.hopeless, DEADLINE_S)
        # Only the test's own thread makes others wait, so it is this one that came to the line.
        wait_until(lambda: self.result.done() or len(budget._line) > before, "it has room or waits for it")


class Budgets(RuleBasedStateMachine):
    """A budget beside its model: what is in use, and who waits, in the order of the line."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(LIMIT)
        self.held: list[int] = []
        self.line: deque[Waiting] = deque()

    def fits(self, size: int) -> bool:
        return not self.held or sum(self.held) + size <= LIMIT

    def settle(self) -> None:
        """Who should have room has it, in the order of the line; the others wait."""
        while self.line and self.fits(self.line[0].size):
            first = self.line.popleft()
            assert first.result.result(DEADLINE_S) is True
            self.held.append(first.size)

    @precondition(lambda self: len(self.line) < WAITERS_MAX)
    @rule(size=st.one_of(st.integers(1, LIMIT), st.integers(1, 60), st.integers(LIMIT, 3 * LIMIT)))
    def take(self, size: int) -> None:
        """Ask, and wait if need be."""
        self.line.append(Waiting(self.budget, size))
        self.settle()

    @rule(size=st.integers(1, LIMIT))
    def take_now(self, size: int) -> None:
        """Nobody who waits is overtaken."""
        granted = self.budget.take_now(size)
        assert granted == (not self.line and self.fits(size))
        if granted:
            self.held.append(size)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """Give back what somebody has."""
        size = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.budget.give(size)
        self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """One of those who wait, anywhere in the line, has no reason to any more; the others stay or move up."""
        chosen = self.line[data.draw(st.integers(0, len(self.line) - 1))]
        chosen.hopeless = True
        self.line.remove(chosen)
        self.budget.wake()
        assert chosen.result.result(DEADLINE_S) is False
        self.settle()

    @precondition(lambda self: self.line)
    @rule()
    def wake(self) -> None:
        """Being woken is no room."""
        self.budget.wake()

    @invariant()
    def agrees_with_the_model(self) -> None:
        """What is in use, and who waits."""
        assert self.budget._used == sum(self.held)
        assert [waiter.size for waiter in self.budget._line] == [waiting.size for waiting in self.line]
        assert not any(waiting.result.done() for waiting in self.line)

    def teardown(self) -> None:
        """Everybody gets what he waits for when the others have given all back, and then nothing is in use."""
        while self.held or self.line:
            if self.held:
                self.budget.give(self.held.pop())
            self.settle()
        assert self.budget._used == 0
        assert not self.budget._line


TestBudgets = Budgets.TestCase
TestBudgets.settings = settings(max_examples=60, stateful_step_count=25)


def test_a_large_one_is_not_starved_by_small_ones_that_would_fit() -> None:
    budget = full()
    large = Waiting(budget, LIMIT)
    small = [Waiting(budget, 1) for _ in range(5)]
    budget.give(LIMIT - 1)
    assert not budget.take_now(1), "there is room, but not for who comes late"
    small.append(Waiting(budget, 1))
    assert not any(waiting.result.done() for waiting in (large, *small))
    assert [waiter.size for waiter in budget._line] == [LIMIT, 1, 1, 1, 1, 1, 1]
    budget.give(1)
    assert large.result.result(DEADLINE_S)
    assert not any(waiting.result.done() for waiting in small)
    budget.give(LIMIT)
    assert all(waiting.result.result(DEADLINE_S) for waiting in small)
    assert budget._used == 6


def test_who_gives_up_at_the_head_of_the_line_lets_those_behind_have_the_room() -> None:
    budget = full()
    large, small = Waiting(budget, LIMIT), Waiting(budget, 10)
    budget.give(10)
    assert not small.result.done()
    large.hopeless = True
    budget.wake()
    assert small.result.result(DEADLINE_S) is True
    assert large.result.result(DEADLINE_S) is False
    assert budget._used == LIMIT


@pytest.mark.parametrize("room", [True, False], ids=["room", "no-room"])
def test_who_asks_without_hope_gets_room_only_if_there_is_some(room: bool) -> None:
    budget = Budget(LIMIT) if room else full()
    assert budget.take(10, pointless, DEADLINE_S) is room
    assert budget._used == (10 if room else LIMIT)
    assert not budget._line


def test_without_progress_the_wait_ends_and_takes_no_room() -> None:
    budget = full()
    assert not budget.take(10, needed, AT_ONCE_S)
    assert (budget._used, len(budget._line)) == (LIMIT, 0)
    budget.give(LIMIT)
    assert budget.take_now(10)


class Script:
    """In place of the lock on which a waiter sleeps: each sleep does the next step and then ends as that says, True for
    woken and False for timed out."""

    def __init__(self, steps: list[Callable[[], bool]]) -> None:
        self.steps = steps
        self.slept: list[float] = []

    def acquire(self, timeout: float = -1) -> bool:
        if timeout == -1:
            return True  # as it is made
        self.slept.append(timeout)
        return self.steps.pop(0)()

    def locked(self) -> bool:
        return False


def scripted(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], bool]) -> Script:
    """The next who waits sleeps as the steps say."""
    script = Script(list(steps))

    class Lock:
        Lock = staticmethod(lambda: script)

    class Waiter(backlog._Waiter):
        def __init__(self, size: int) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(backlog, "threading", Lock)
                super().__init__(size)

    monkeypatch.setattr(backlog, "_Waiter", Waiter)
    return script


def test_the_wait_has_a_deadline_of_its_own_whatever_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that moves all the time is not quick enough for that reason."""
    budget = full()
    now = 100.0
    monkeypatch.setattr(backlog.time, "monotonic", lambda: now)

    def progress() -> bool:
        nonlocal now
        budget.give(1)
        budget.wake()
        now += 3.0
        return True

    script = scripted(monkeypatch, progress, progress, progress, lambda: False)
    assert not budget.take(500, needed, 7.0)
    assert (script.steps, script.slept) == ([], [7.0, 4.0, 1.0, 0.0])
    assert (budget._used, len(budget._line)) == (LIMIT - 3, 0)
    assert budget.behind


def test_who_has_waited_in_vain_spares_the_others_that_until_half_of_the_room_is_free() -> None:
    budget = full()
    others = [Waiting(budget, 10) for _ in range(3)]
    patient = begin(budget.take, 10, needed, AT_ONCE_S, True)
    wait_until(lambda: len(budget._line) == 4, "it waits")
    assert not budget.take(10, needed, AT_ONCE_S)
    assert [other.result.result(DEADLINE_S) for other in others] == [False] * 3
    assert budget.behind
    assert not budget.take(1, needed, DEADLINE_S), "at once"
    assert not patient.done(), "who could not send it later waits on"
    budget.give(LIMIT // 2 - 1)
    assert patient.result(DEADLINE_S)
    assert not budget.take_now(1)
    assert budget.behind
    budget.give(11)
    assert not budget.behind
    assert budget.take_now(10)


def test_after_an_answer_that_came_too_late_nobody_waits_until_all_is_answered() -> None:
    budget = Budget(LIMIT)
    budget.fall_behind()
    assert not budget.behind, "there is nothing to wait for"
    assert budget.take(100, needed, 0)
    assert budget.take(1, needed, 0)
    budget.fall_behind()
    assert not budget.take(1, needed, DEADLINE_S)
    budget.give(100)
    assert budget.behind
    budget.give(1)
    assert budget.take(1, needed, 0)


class TestFlow:
    """What may be in flight: 0.25 s of it, more or less."""

    def flow(self) -> Flow:
        return Flow(10, 100, 1000)

    def test_grows_with_quick_answers_as_long_as_it_is_made_use_of(self) -> None:
        flow = self.flow()
        flow.learn(40, 0.0, 0.2, 49, 0.25)
        assert flow.window == 100, "less than half was in flight: that says nothing of more"
        for _ in range(100):
            flow.learn(40, 0.0, 0.2, flow.window, 0.25)
        assert flow.window == 1000

    def test_is_halved_once_for_what_was_sent_before_that_shows(self) -> None:
        flow = self.flow()
        flow.learn(10, 0.0, 0.4, 100, 0.25)
        assert flow.window == 100, "neither quick nor slow"
        for at in range(3):
            flow.learn(10, at * 0.1, 1.0 + at, 100, 0.25)
        assert flow.window == 50
        flow.learn(10, 1.1, 2.0, 50, 0.25)
        assert flow.window == 25
        for at in range(10):
            flow.learn(10, 10.0 * at + 10, 10.0 * at + 15, 50, 0.25)
        assert flow.window == 10

    def test_entries_are_as_small_as_the_link_is_slow(self) -> None:
        flows = Flows()
        flight = InFlight()
        for size, piece in ((1, DATA_MIN), (256 << 10, 128 << 10), (4 << 20, DATA_MAX), (1 << 30, DATA_MAX)):
            flows.data.window = size
            flows.fit()
            assert flows.data_piece == piece
        for size, piece in ((1, ZERO_MIN), (2 << 20, 4 << 20), (1 << 40, ZERO_MAX)):
            flows.zeroes.window = size
            assert flows.zero_piece == piece
        flows.data.window = flows.zeroes.window = 1000
        assert flows.have_room(flight)
        zero = Entry(Kind.ZERO, 0, 1001)
        assert flight.admit(zero)
        assert not flows.have_room(flight)
        flight.remove([zero])
        write = Entry(Kind.WRITE, 0, 1001)
        write.load(memoryview(bytes(1001)))
        assert flight.admit(write)
        assert not flows.have_room(flight)
        flight.remove([write])
        assert (flight.bytes, flight.zeroes) == (0, 0)


def test_being_woken_is_no_progress_and_no_reason_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = full()
    script = scripted(monkeypatch, lambda: True, lambda: True, lambda: False)
    assert not budget.take(500, needed, 7.0)
    assert (script.steps, len(script.slept)) == ([], 3)
    assert (budget._used, len(budget._line)) == (LIMIT, 0)


def test_room_that_comes_in_the_moment_of_the_timeout_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be nobody's: the giver has counted it as given."""
    budget = full()

    def room() -> bool:
        budget.give(LIMIT)
        return False

    scripted(monkeypatch, room)
    assert budget.take(500, needed, 7.0)
    assert budget._used == 500
    budget.give(500)
    assert budget._used == 0


@pytest.mark.parametrize("woken", [True, False], ids=["woken", "timed-out"])
def test_room_that_comes_in_the_moment_of_the_loss_goes_to_the_next_in_the_line(
    monkeypatch: pytest.MonkeyPatch, woken: bool
) -> None:
    budget = full()
    lost = False
    behind: list[Waiting] = []

    def room_and_loss() -> bool:
        nonlocal lost
        lost = True
        monkeypatch.undo()
        behind.append(Waiting(budget, LIMIT))
        budget.give(LIMIT)
        assert not behind[0].result.done(), "the first in the line has it"
        return woken

    scripted(monkeypatch, room_and_loss)
    assert not budget.take(500, lambda: lost, 7.0)
    assert behind[0].result.result(DEADLINE_S)
    assert budget._used == LIMIT
    budget.give(LIMIT)
    assert budget._used == 0


def test_many_threads_at_once_leave_no_room_in_use_and_nobody_behind() -> None:
    """Each takes and gives many times, of different sizes, and some give up; the bound holds at every moment."""
    budget = Budget(LIMIT)
    threads, rounds = 8, 150
    lock = threading.Lock()
    used: list[int] = []

    def work(place: int) -> int:
        taken = 0
        for number in range(rounds):
            size = (1, 40, 333, 700, LIMIT, 2 * LIMIT, 90, 5)[(place * 3 + number) % 8]
            hopeless = (place + number) % 5 == 0
            if not budget.take(size, (lambda: True) if hopeless else needed, DEADLINE_S):
                assert hopeless, "only who has no hope goes without room"
                continue
            taken += 1
            with lock:
                used.append(size)
                assert sum(used) <= LIMIT or len(used) == 1
            os.sched_yield()  # let the others find it taken
            with lock:
                used.remove(size)
            budget.give(size)
            budget.wake()
        return taken

    with ThreadPoolExecutor(threads) as pool:
        workers: list[Future[int]] = [pool.submit(work, place) for place in range(threads)]
        taken = [worker.result(DEADLINE_S) for worker in workers]
    assert all(count >= rounds * 3 // 5 for count in taken)
    assert (budget._used, len(budget._line)) == (0, 0)


# -- Ended ------------------------------------------------------------------------------------------------------------


def test_who_waits_for_the_end_after_it_goes_on_at_once_and_so_does_the_next() -> None:
    ended = Ended()
    assert not ended.wait(0)
    ended.set()
    assert ended.wait(0)
    assert ended.wait(0)


def test_an_end_that_is_told_twice_is_one() -> None:
    ended = Ended()
    ended.set()
    ended.set()
    assert ended.wait(0)
    ended.set()
    assert ended.wait(0)


def test_an_end_wakes_all_who_wait() -> None:
    ended = Ended()
    waiters = [begin(ended.wait, DEADLINE_S) for _ in range(3)]
    assert not ended.wait(AT_ONCE_S)
    assert not any(waiter.done() for waiter in waiters)
    ended.set()
    assert all(waiter.result(DEADLINE_S) for waiter in waiters)


def test_an_end_that_two_threads_tell_at_once_is_told_without_error() -> None:
    for _ in range(200):
        ended, barrier = Ended(), threading.Barrier(3)

        def tell(ended: Ended = ended, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(DEADLINE_S)
            ended.set()

        tellers = [begin(tell) for _ in range(2)]
        waiter = begin(ended.wait, DEADLINE_S)
        barrier.wait(DEADLINE_S)
        assert waiter.result(DEADLINE_S)
        for teller in tellers:
            teller.result(DEADLINE_S)
        assert ended.wait(0)


def test_a_signal_does_not_cut_a_wait_short() -> None:
    ended, handled = Ended(), threading.Event()
    former = signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    assert threading.current_thread() is threading.main_thread(), "only it handles signals"
    waiting = threading.get_ident()

    def tell() -> None:
        # The wait comes back from the kernel with EINTR, or else the handler would not run before its end.
        while not handled.wait(AT_ONCE_S):
            signal.pthread_kill(waiting, signal.SIGUSR1)
        ended.set()

    try:
        teller = begin(tell)
        assert ended.wait(DEADLINE_S)
        teller.result(DEADLINE_S)
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_more_room_is_given_at_once_and_less_waits_until_it_is_free() -> None:
    budget = full()
    waiting = Waiting(budget, 10)
    budget.resize(LIMIT + 10)
    assert waiting.result.result(DEADLINE_S)
    budget.resize(100)
    assert not budget.take_now(1)
    budget.give(LIMIT - 80)
    assert budget.take_now(10)
    assert not budget.take_now(1)
