# SPDX-License-Identifier: BSD-3-Clause
"""gate.py: many requests inside at a time, or one command alone; every wait of it has an end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from replication.errors import DiskError
from replication.order import gate as gate_module
from replication.order.gate import Gate, GateStuck
from replication.order.latency import GATE, ZERO
from waiting import DEADLINE_S, wait_until


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads of this test; their waits are bounded by the gate's own constants."""
    with ThreadPoolExecutor(16) as executor:
        yield executor


class Guest:
    """A request that stays inside the gate until it is told to leave."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.inside = threading.Event()
        self.leave = threading.Event()

    def run(self) -> None:
        with self._gate:
            self.inside.set()
            assert self.leave.wait(DEADLINE_S)


def closing(gate: Gate) -> None:
    """Wait until a command has begun to close the gate."""
    wait_until(lambda: gate._shut, "a command closes the gate")


def test_many_requests_are_inside_at_one_time(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    guests = [Guest(gate) for _ in range(8)]
    ends = [pool.submit(guest.run) for guest in guests]
    for guest in guests:
        assert guest.inside.wait(DEADLINE_S)
    for guest in guests:
        guest.leave.set()
    for end in ends:
        end.result(DEADLINE_S)


def test_a_command_waits_for_the_requests_inside_and_newcomers_wait_for_the_command(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    order: list[str] = []
    early, late = Guest(gate), threading.Event()

    def command() -> None:
        with gate.closed():
            order.append("command in")
            # The newcomer is at the gate before this ends, so it had every chance to slip in.
            assert late.wait(DEADLINE_S)
            order.append("command out")

    def newcomer() -> None:
        late.set()
        with gate:
            order.append("newcomer")

    ends = [pool.submit(early.run)]
    assert early.inside.wait(DEADLINE_S)
    ends.append(pool.submit(command))
    closing(gate)
    ends.append(pool.submit(newcomer))
    assert late.wait(DEADLINE_S)
    assert order == []
    early.leave.set()
    for end in ends:
        end.result(DEADLINE_S)
    assert order == ["command in", "command out", "newcomer"]


def test_a_request_that_comes_while_the_command_waits_for_others_does_not_get_in(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    early = Guest(gate)
    end = pool.submit(early.run)
    assert early.inside.wait(DEADLINE_S)

    def close() -> None:
        with gate.closed():
            pass

    command = pool.submit(close)
    closing(gate)
    monkeypatch.setattr(gate_module, "ENTER_S", 0.05)
    with pytest.raises(DiskError, match="kept requests waiting"), gate:
        pass
    assert not command.done()
    early.leave.set()
    end.result(DEADLINE_S)
    command.result(DEADLINE_S)


def test_a_command_that_cannot_get_the_requests_out_fails_and_leaves_the_gate_open(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    stuck, waiting = Guest(gate), Guest(gate)
    ends = [pool.submit(stuck.run)]
    assert stuck.inside.wait(DEADLINE_S)
    monkeypatch.setattr(gate_module, "DRAIN_S", 1.0)

    def close() -> None:
        with gate.closed():
            raise AssertionError("alone with a request inside")

    command = pool.submit(close)
    closing(gate)
    ends.append(pool.submit(waiting.run))
    with pytest.raises(GateStuck, match="1 requests in flight did not end"):
        command.result(DEADLINE_S)
    # The one that waited meanwhile gets in although the stuck one never left.
    assert waiting.inside.wait(DEADLINE_S)
    for guest in (stuck, waiting):
        guest.leave.set()
    for end in ends:
        end.result(DEADLINE_S)


def test_a_command_that_waits_gives_way_to_a_failover(pool: ThreadPoolExecutor) -> None:
    """Both who waits for requests, and who waits for another command; the failover itself has its own time."""
    gate = Gate()
    stuck = Guest(gate)
    end = pool.submit(stuck.run)
    assert stuck.inside.wait(DEADLINE_S)

    def close() -> None:
        with gate.closed():
            raise AssertionError("alone with a request inside")

    commands = [pool.submit(close)]
    closing(gate)
    commands.append(pool.submit(close))
    with gate.urgency.asking():
        for command in commands:
            with pytest.raises(GateStuck, match="a failover has come first"):
                command.result(DEADLINE_S)
    with pytest.raises(GateStuck, match=r"did not end within 0.05 s"), gate.closed(0.05):
        pass
    stuck.leave.set()
    end.result(DEADLINE_S)
    with gate.closed(0.05):
        pass


def test_a_request_that_gave_up_is_not_counted_as_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(gate_module, "ENTER_S", 0.05)
    with gate.closed(), pytest.raises(DiskError), gate:
        pass
    monkeypatch.setattr(gate_module, "DRAIN_S", 0.05)
    with gate.closed():
        pass


def test_of_two_commands_the_second_waits_and_then_gives_up(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()

    def close() -> None:
        with gate.closed():
            pass

    with gate.closed():
        monkeypatch.setattr(gate_module, "DRAIN_S", 0.05)
        with pytest.raises(GateStuck, match="another command"):
            pool.submit(close).result(DEADLINE_S)
        monkeypatch.setattr(gate_module, "DRAIN_S", DEADLINE_S)
        second = pool.submit(close)
    second.result(DEADLINE_S)


def test_a_failure_inside_leaves_the_gate_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(gate_module, "DRAIN_S", 0.05)
    monkeypatch.setattr(gate_module, "ENTER_S", 0.05)
    with pytest.raises(KeyError), gate:
        raise KeyError
    with pytest.raises(KeyError), gate.closed():
        raise KeyError
    with gate:
        pass
    with gate.closed():
        pass


def test_under_load_no_request_is_ever_inside_together_with_a_command(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    inside = [0] * 6
    alone = [0, 0]
    seen: list[tuple[list[int], list[int]]] = []
    stop = threading.Event()

    counts = [0] * len(inside)

    def request(number: int) -> None:
        while not stop.is_set():
            with gate:
                inside[number] = 1
                if any(alone):
                    seen.append((list(inside), list(alone)))
                inside[number] = 0
                counts[number] += 1

    def command(number: int) -> None:
        for _ in range(150):
            with gate.closed():
                alone[number] = 1
                if any(inside) or sum(alone) > 1:
                    seen.append((list(inside), list(alone)))
                alone[number] = 0

    requests = [pool.submit(request, number) for number in range(len(inside))]
    try:
        for end in [pool.submit(command, number) for number in range(len(alone))]:
            end.result(DEADLINE_S)
        # The commands may be through before each of those threads has had its turn with the processor.
        wait_until(lambda: all(counts), "no request is locked out")
    finally:
        stop.set()
    for ended in requests:
        ended.result(DEADLINE_S)
    assert seen == []


class Request:
    """A client's request of several steps, between which it gives way; a step ends when it is told to."""

    def __init__(self, gate: Gate, steps: int) -> None:
        self._gate, self._steps = gate, steps
        self._tally = gate.latency.guests.tally("disk0", ZERO)
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        course = self._gate.enter(self._tally)
        try:
            for step in range(self._steps):
                if step:
                    self._gate.give_way()
                self.begun.release()
                assert self.go_on.acquire(timeout=DEADLINE_S)
        finally:
            self._gate.leave(course)


def test_between_two_steps_of_a_request_a_command_finds_the_gate_empty(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    request = Request(gate, 2)
    end = pool.submit(request.run)
    assert request.begun.acquire(timeout=DEADLINE_S)
    entered, done = threading.Event(), threading.Event()

    def command() -> None:
        with gate.closed(DEADLINE_S):
            entered.set()
            assert done.wait(DEADLINE_S)

    commanded = pool.submit(command)
    closing(gate)
    assert not entered.is_set()
    request.go_on.release()
    assert entered.wait(DEADLINE_S)
    assert not request.begun.acquire(blocking=False), "the second step waits for the command"
    done.set()
    commanded.result(DEADLINE_S)
    assert request.begun.acquire(timeout=DEADLINE_S)
    assert not gate.idle
    request.go_on.release()
    end.result(DEADLINE_S)
    assert gate.idle
    assert gate.passed == 2


def test_a_request_that_waits_outside_lets_commands_in_and_comes_back_when_they_have_gone(
    pool: ThreadPoolExecutor,
) -> None:
    gate, over = Gate(), threading.Event()
    outside, back = threading.Event(), threading.Event()

    def wait() -> None:
        outside.set()
        assert over.wait(DEADLINE_S)

    def request() -> None:
        course = gate.enter(gate.latency.guests.tally("disk", ZERO))
        try:
            gate.wait_outside(wait)
            back.set()
        finally:
            gate.leave(course)

    ended = pool.submit(request)
    assert outside.wait(DEADLINE_S)
    with gate.closed(0.0):
        over.set()
        waits = list(gate.latency._courses.values())
        wait_until(lambda: waits[0].waiting == GATE, "it waits before the gate")
        assert not back.is_set()
    ended.result(DEADLINE_S)
    assert back.is_set()
    assert gate.idle


def test_a_request_that_fails_outside_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it wait for a command then, of which there is one in here."""
    gate = Gate()
    monkeypatch.setattr(gate_module, "ENTER_S", DEADLINE_S)

    def fail() -> None:
        raise DiskError("the process ends")

    course = gate.enter(gate.latency.guests.tally("disk", ZERO))
    with ExitStack() as closed:

        def fail_before_a_command() -> None:
            closed.enter_context(gate.closed(0.0))
            fail()

        with pytest.raises(DiskError, match="the process ends"):
            gate.wait_outside(fail_before_a_command)
        gate.leave(course)
        assert gate.idle


@pytest.mark.parametrize("steps", [1, 2])
def test_a_request_that_a_command_keeps_waiting_for_too_long_fails_and_has_left(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """At its beginning, or between two steps."""
    gate = Gate()
    request = Request(gate, steps)
    monkeypatch.setattr(gate_module, "ENTER_S", 0.05)
    if steps == 1:
        with gate.closed(), pytest.raises(DiskError, match="kept requests waiting"):
            request.run()
    else:
        end = pool.submit(request.run)
        assert request.begun.acquire(timeout=DEADLINE_S)

        def command() -> None:
            with gate.closed(DEADLINE_S), pytest.raises(DiskError, match="kept requests waiting"):
                end.result(DEADLINE_S)

        commanded = pool.submit(command)
        closing(gate)
        request.go_on.release()
        commanded.result(DEADLINE_S)
    assert gate.idle
    assert gate.latency.longest() is not None, "what has failed is counted, too"
    with gate.closed(DEADLINE_S):
        pass


# -- newcomers alone are kept out --------------------------------------------------------------------------------


def test_newcomers_are_held_while_who_is_inside_goes_on(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    first, late = Guest(gate), Guest(gate)
    ended = pool.submit(first.run)
    assert first.inside.wait(DEADLINE_S)
    with gate.newcomers_held(DEADLINE_S):
        pool.submit(late.run)
        assert not late.inside.wait(0.05)
        with pytest.raises(GateStuck, match="another command"), gate.closed(0.0):
            pass
        first.leave.set()
        ended.result(DEADLINE_S)
    assert late.inside.wait(DEADLINE_S)
    late.leave.set()
    with gate.closed(DEADLINE_S):
        pass


def test_newcomers_are_held_by_a_command_that_does_not_end_in_time(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    late = Guest(gate)
    with gate.closed():
        with gate.newcomers_held(0.01):
            pool.submit(late.run)
        assert not late.inside.wait(0.05)  # the gate is the command's to open
    assert late.inside.wait(DEADLINE_S)
    late.leave.set()
