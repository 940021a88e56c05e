# SPDX-License-Identifier: BSD-3-Clause
"""forward.py: order, bounds and ends of what goes to the secondary, against real NBD servers.

The server is nbdkit's memory plugin with a delay that keeps requests in flight, and a log of when each came and ended.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import DEADLINE_S, DelayedEndpoint, Lab, NbdProcess, make_raw, pattern, silent, wait_until
from replication.backlog import ZERO_MAX, Budget, Entry, InFlight, Kind
from replication.errors import DiskError
from replication.forward import Forwarder, LinkState
from replication.image.connection import Connection

SIZE = 4 << 20
KIB = 1024


class Link:
    """A forwarder with its budget, what it reported, and how often each entry ended."""

    def __init__(self, server: NbdProcess, limit: int = 64 << 20, timeout_s: float = DEADLINE_S) -> None:
        self.failures: list[tuple[Entry | None, DiskError]] = []
        self.states: list[LinkState] = []
        self.ends: dict[int, list[bool]] = {}
        self.entries: list[Entry] = []
        self.budget = Budget(limit)
        self.forwarder = Forwarder(
            "disk0", self.budget, timeout_s, lambda *failure: self.failures.append(failure), self.states.append
        )
        self.connection = Connection(server.uri(), None, DEADLINE_S)
        self.forwarder.adopt(self.connection)

    def make(self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"", waited_for: bool = True) -> Entry:
        entry = Entry(kind, offset, length or len(data), on_end=self._ended, waited_for=waited_for)
        if data:
            entry.load(memoryview(data))
        self.entries.append(entry)
        self.ends[id(entry)] = []
        return entry

    def _ended(self, entry: Entry) -> None:
        self.ends[id(entry)].append(entry.arrived)

    def put(self, entry: Entry) -> Entry:
        assert self.forwarder.reserve([entry])
        self.forwarder.put(entry)
        return entry

    def write(self, offset: int, data: bytes, waited_for: bool = True) -> Entry:
        return self.put(self.make(Kind.WRITE, offset, data=data, waited_for=waited_for))

    def wound_up(self) -> None:
        """Wait for the thread's end; then nothing is left of what was put, and everything has ended once."""
        thread = self.forwarder._thread
        if thread is not None:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        assert all(len(ends) == 1 for ends in self.ends.values())
        assert self.budget._used == 0
        assert self.forwarder.idle
        assert self.forwarder.queue_bytes == 0


class Logged(DelayedEndpoint):
    """A server that notes when each request begins and ends."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.log = folder / "requests.log"
        super().__init__(folder, size=SIZE, filters=["log"], filter_arguments=[f"logfile={self.log}"], **options)

    def requests(self) -> list[tuple[str, int, int, int, int]]:
        """(kind, offset, length, time of beginning, time of ending) in the order of arrival; times are line numbers."""
        open_at: dict[str, int] = {}
        found: list[list[Any]] = []
        for number, line in enumerate(self.log.read_text().splitlines()):
            if begun := re.search(r" (Write|Zero|Trim) id=(\d+) offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", line):
                open_at[begun[2]] = len(found)
                found.append([begun[1], int(begun[3], 16), int(begun[4], 16), number, -1])
            elif begun := re.search(r" (Flush) id=(\d+)", line):
                open_at[begun[2]] = len(found)
                found.append([begun[1], 0, SIZE, number, -1])
            elif (ended := re.search(r"\.\.\.\w+ id=(\d+)", line)) and ended[1] in open_at:
                # Other connections number their requests anew, after all of these have ended.
                found[open_at.pop(ended[1])][4] = number
        return [tuple(request) for request in found]


def test_overlapping_requests_are_never_in_flight_together_and_arrive_in_order(lab: Lab) -> None:
    server = lab.start(Logged(lab.folder, delay={"write": "2ms", "zero": "2ms"}))
    link = Link(server)
    source = random.Random(5)
    expected = bytearray(SIZE)
    for number in range(250):
        large = source.random() < 0.1
        length = source.randrange(1, 300 * KIB if large else 9 * KIB)
        offset = source.randrange(0, 512 * KIB if source.random() < 0.5 else SIZE - length)
        if source.random() < 0.05:
            link.put(link.make(Kind.FLUSH))
        elif source.random() < 0.2:
            link.put(link.make(Kind.ZERO, offset, length))
            expected[offset : offset + length] = bytes(length)
        else:
            data = pattern(number, length)
            link.write(offset, data)
            expected[offset : offset + length] = data
    for entry in link.entries:
        assert link.forwarder.await_end(entry)
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()
    assert bytes(server.connect().pread(SIZE, 0)) == expected
    requests = server.requests()
    together = 0
    for number, (_, offset, length, begun, ended) in enumerate(requests):
        assert ended > begun
        for kind, other_offset, other_length, _other_begun, other_ended in requests[:number]:
            if other_ended > begun:
                together += 1
                assert kind != "Flush"
                assert other_offset + other_length <= offset or offset + length <= other_offset
    assert together > 100, "requests that do not overlap go side by side"
    sent = [(entry.offset, entry.length) for entry in link.entries if entry.kind is Kind.WRITE]
    arrived = [(offset, length) for kind, offset, length, _, _ in requests if kind == "Write"]
    assert sorted(sent) == sorted(arrived)
    assert link.failures == []


entries = st.builds(
    lambda kind, offset, length: Entry(kind, 0 if kind is Kind.FLUSH else offset, 0 if kind is Kind.FLUSH else length),
    st.sampled_from([*Kind, Kind.WRITE, Kind.WRITE]),
    st.integers(0, 400 * KIB),
    st.one_of(st.integers(1, 9000), st.integers(60 * KIB, 70 * KIB), st.integers(1, ZERO_MAX)),
)


@given(st.lists(entries, max_size=25), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_whether_an_entry_meets_one_in_flight_is_found_as_by_comparing_them_all(
    candidates: list[Entry], source: random.Random
) -> None:
    flight = InFlight()
    model: list[Entry] = []
    for entry in candidates:
        real = any(
            Kind.FLUSH in (entry.kind, other.kind)
            or (entry.offset < other.offset + other.length and other.offset < entry.offset + entry.length)
            for other in model
        )
        meets = flight.meets(entry)
        assert meets or not real
        if meets and not real:
            # Only neighbours in one block may be kept in order without need.
            assert any(
                entry.offset // 4096 <= (other.offset + other.length - 1) // 4096
                and other.offset // 4096 <= (entry.offset + entry.length - 1) // 4096
                for other in model
            )
        if not meets:
            flight.add(entry)
            model.append(entry)
        elif model and source.random() < 0.6:
            flight.remove(model.pop(source.randrange(len(model))))
        assert len(flight) == len(model)
        assert {id(other) for other in flight} == {id(other) for other in model}


def test_a_silent_secondary_is_lost_within_the_timeout_and_everything_ends_as_not_arrived(lab: Lab) -> None:
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE))
    link = Link(server, timeout_s=0.5)
    assert link.forwarder.await_end(link.write(0, b"x" * 4096))
    with silent(server):
        begun = time.monotonic()
        stuck = [link.write(number * 4096, b"y" * 4096) for number in range(100)]
        assert not link.forwarder.await_end(stuck[0])
        # Generous for a busy machine; the deadline of the harness is far beyond it.
        assert 0.4 < time.monotonic() - begun < 0.5 + 4
        assert link.forwarder.state is LinkState.LOST
        assert not link.forwarder.reserve([link.make(Kind.FLUSH)]), "from now on nobody waits"
        link.entries.pop()
        del link.ends[next(reversed(link.ends))]
        late = link.make(Kind.WRITE, data=b"late")
        link.budget.take(late.cost, lambda: False, 0)
        link.forwarder.put(late)
        assert link.ends[id(late)] == [False]
    link.wound_up()
    assert link.states == [LinkState.IN_SYNC, LinkState.LOST]
    ((entry, error),) = link.failures
    assert entry is None
    assert "no progress" in str(error)


def test_a_killed_secondary_ends_every_entry_once(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, delay={"write": "5ms"})
    link = Link(server)
    for number in range(600):
        link.write(number % 500 * 4096, b"z" * 4096, waited_for=number % 3 == 0)
    wait_until(lambda: link.forwarder.bytes_forwarded > 4096 * 50, "some have arrived")
    server.kill()
    link.wound_up()
    arrived = sum(ends == [True] for ends in link.ends.values())
    assert 50 <= arrived < 600
    assert link.forwarder.bytes_forwarded == arrived * 4096
    assert [entry for entry, _ in link.failures] == [None], "told once, not for each entry"


def test_a_full_queue_before_a_silent_secondary_pushes_back_no_longer_than_the_timeout(
    lab: Lab,
) -> None:
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE))
    link = Link(server, limit=20 * KIB, timeout_s=0.6)
    with silent(server):
        first = link.write(0, b"a" * 16 * KIB)
        begun = time.monotonic()
        extra = Entry(Kind.WRITE, 0, 16 * KIB)
        extra.load(memoryview(b"b" * 16 * KIB))
        assert not link.forwarder.reserve([extra])
        assert time.monotonic() - begun < 0.6 + 4
        assert not link.forwarder.await_end(first)
    link.wound_up()
    assert link.forwarder.state is LinkState.LOST


def test_a_slow_secondary_that_makes_progress_is_not_lost_while_a_large_write_waits_for_room(lab: Lab) -> None:
    # One after the other (they overlap), 0.3 s each: five of them take longer than the timeout, and none of it silent.
    server = lab.endpoint(size=SIZE, delay={"write": "300ms"})
    link = Link(server, limit=100 * KIB, timeout_s=1.0)
    for _ in range(5):
        link.write(0, b"a" * 16 * KIB)
    large = link.make(Kind.WRITE, data=b"b" * 96 * KIB)
    assert link.forwarder.reserve([large]), link.failures
    link.forwarder.put(large)
    assert link.forwarder.await_end(large)
    assert link.failures == []
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()


def test_a_request_that_the_secondary_refuses_is_reported_and_the_link_stays(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, error={"pwrite": "ENOSPC"})
    link = Link(server)
    server.fail()
    refused = link.write(4096, b"x" * 100)
    assert not link.forwarder.await_end(refused)
    server.work()
    assert link.forwarder.await_end(link.write(4096, b"y" * 100))
    ((entry, error),) = link.failures
    assert entry is refused
    assert "answered write of 100 bytes at 4096 with: No space left" in str(error)
    assert link.forwarder.up
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()


def test_stopping_sends_what_is_queued(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, delay={"write": "10ms"})
    link = Link(server)
    for number in range(20):
        link.write(0, pattern(number, 4096), waited_for=False)
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()
    assert bytes(server.connect().pread(4096, 0)) == pattern(19, 4096)
    assert link.states == [LinkState.IN_SYNC, LinkState.DISCONNECTED]
    assert link.failures == []


def test_stopping_without_time_ends_what_has_not_arrived_and_reports_nothing(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, delay={"write": "200ms"})
    link = Link(server)
    for number in range(20):
        link.write(0, pattern(number, 4096), waited_for=number % 2 == 0)
    link.forwarder.stop(0)
    link.wound_up()
    assert [False] in link.ends.values()
    assert not link.forwarder.up
    assert link.failures == []


def test_after_a_loss_a_fresh_connection_is_adopted(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE)
    link = Link(server)
    server.kill()
    wait_until(lambda: link.forwarder.state is LinkState.LOST, "the loss is noticed without any request")
    link.wound_up()
    server.start()
    link.forwarder.adopt(Connection(server.uri(), None, DEADLINE_S))
    assert link.forwarder.await_end(link.write(0, b"again"))
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()
    assert link.states == [LinkState.IN_SYNC, LinkState.LOST, LinkState.IN_SYNC, LinkState.DISCONNECTED]


@pytest.mark.parametrize("action", ["put", "lose", "stop"])
def test_a_connection_that_closes_at_the_very_moment_fails_nobody(lab: Lab, action: str) -> None:
    """A guest's thread has taken hold of the connection; before it goes on the forwarder's thread closes it."""
    server = lab.endpoint(size=SIZE)
    link = Link(server)
    connection, thread = link.connection, link.forwarder._thread
    assert thread is not None
    assert link.forwarder.await_end(link.write(0, b"x"))
    wait_until(lambda: link.forwarder._rest.value == "sleep", "the thread sleeps, so that it has to be woken")

    def late(call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            if threading.current_thread() is not thread:
                server.kill()
                thread.join(DEADLINE_S)
                assert not thread.is_alive()
            call(*arguments)

        return wrapped

    connection.poke = late(connection.poke)  # type: ignore[method-assign]
    if action == "put":
        link.write(0, b"y")
    elif action == "stop":
        link.forwarder.stop(0)
    else:
        connection.fail = late(connection.fail)  # type: ignore[method-assign]
        link.forwarder._lose(connection, DiskError("the queue is stuck"))
    link.wound_up()


def test_the_budget_admits_one_request_that_is_larger_and_then_nothing() -> None:
    budget = Budget(1000)
    assert budget.take(5000, lambda: False, 0)
    assert not budget.take(1, lambda: False, 0.01)
    budget.give(5000)
    assert budget.take(1000, lambda: False, 0)
    assert not budget.take(1, lambda: False, 0.01)
    budget.give(400)
    assert budget.take(400, lambda: False, 0)
    assert not budget.take(1, lambda: True, DEADLINE_S), "waiting would be pointless"
    assert budget._used == 1000


def test_whoever_waits_for_room_gets_it_when_it_comes_and_goes_when_the_link_is_lost() -> None:
    budget = Budget(1000)
    lost = threading.Event()
    assert budget.take(1000, lambda: False, 0)
    with ThreadPoolExecutor(2) as pool:
        waiter = pool.submit(budget.take, 500, lost.is_set, DEADLINE_S)
        wait_until(lambda: len(budget._line) == 1, "it waits")
        budget.give(499)
        assert not waiter.done()
        budget.give(1)
        assert waiter.result(DEADLINE_S)
        waiter = pool.submit(budget.take, 500, lost.is_set, DEADLINE_S)
        wait_until(lambda: len(budget._line) == 1, "it waits")
        lost.set()
        budget.wake()
        assert not waiter.result(DEADLINE_S)
    assert budget._used == 1000
