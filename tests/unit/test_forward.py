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
from replication.backlog import DATA_MAX, FLIGHT_MAX, ZERO_MAX, Budget, Entry, InFlight, Kind
from replication.errors import DiskError
from replication.forward import Forwarder, cut
from replication.image.connection import Connection

SIZE = 4 << 20
KIB = 1024


class Link:
    """A forwarder with its budget, what it reported, and how often each entry ended."""

    def __init__(
        self, server: NbdProcess, limit: int = 64 << 20, timeout_s: float = DEADLINE_S, budget: Budget | None = None
    ) -> None:
        self.failures: list[tuple[Entry, DiskError]] = []
        self.losses: list[DiskError] = []
        self.ends: dict[int, list[bool]] = {}
        self.entries: list[Entry] = []
        self.budget = budget or Budget(limit)
        self.forwarder = Forwarder(
            "disk0", self.budget, timeout_s, lambda *failure: self.failures.append(failure), self.note_loss
        )
        self.connection = Connection(server.uri(), None, DEADLINE_S)
        self.forwarder.adopt(self.connection)

    def note_loss(self, connection: Connection, error: DiskError) -> None:
        assert connection.dead
        assert not self.forwarder.up, "what is put from now on ends at once"
        self.losses.append(error)

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

    def put_together(self, *entries: Entry) -> None:
        assert self.forwarder.reserve(entries)
        self.forwarder.put(*entries)

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
    assert (link.losses, link.failures) == ([], [])


entries = st.builds(
    lambda kind, offset, length: Entry(kind, 0 if kind is Kind.FLUSH else offset, 0 if kind is Kind.FLUSH else length),
    st.sampled_from([Kind.WRITE, Kind.ZERO, Kind.FLUSH, Kind.WRITE, Kind.WRITE]),
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
        assert not link.forwarder.up
        assert not link.forwarder.reserve([link.make(Kind.FLUSH)]), "from now on nobody waits"
        link.entries.pop()
        del link.ends[next(reversed(link.ends))]
        late = link.make(Kind.WRITE, data=b"late")
        link.budget.take(late.cost, lambda: False, 0)
        link.forwarder.put(late)
        assert link.ends[id(late)] == [False]
    link.wound_up()
    (error,) = link.losses
    assert "no progress" in str(error)
    assert link.failures == []


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
    assert (len(link.losses), link.failures) == (1, []), "told once, not for each entry"


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
    assert not link.forwarder.up
    assert len(link.losses) == 1


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
    assert (link.losses, link.failures) == ([], [])
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
    assert not link.forwarder.up
    assert (link.losses, link.failures) == ([], [])


def test_stopping_without_time_ends_what_has_not_arrived_and_reports_nothing(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, delay={"write": "200ms"})
    link = Link(server)
    for number in range(20):
        link.write(0, pattern(number, 4096), waited_for=number % 2 == 0)
    link.forwarder.stop(0)
    link.wound_up()
    assert [False] in link.ends.values()
    assert not link.forwarder.up
    assert (link.losses, link.failures) == ([], [])


def test_after_a_loss_a_fresh_connection_is_adopted(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE)
    link = Link(server)
    server.kill()
    wait_until(lambda: link.losses, "the loss is noticed without any request")
    link.wound_up()
    server.start()
    link.forwarder.adopt(Connection(server.uri(), None, DEADLINE_S))
    assert link.forwarder.await_end(link.write(0, b"again"))
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()
    assert len(link.losses) == 1, "a stop is no loss"


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


# -- cuts --------------------------------------------------------------------------------------------------------


class Line:
    """The forwarders of several disks with one budget, each with a secondary of its own, and a cut through them."""

    def __init__(self, servers: list[NbdProcess], **options: Any) -> None:
        budget = Budget(64 << 20)
        self.links = [Link(server, budget=budget, **options) for server in servers]

    def cut(self) -> list[Entry]:
        entries = cut([link.forwarder for link in self.links])
        assert entries is not None
        return entries

    def reached(self, entries: list[Entry]) -> None:
        for link, entry in zip(self.links, entries, strict=True):
            assert link.forwarder.await_end(entry)

    def let_go(self, entries: list[Entry]) -> None:
        for link, entry in zip(self.links, entries, strict=True):
            link.forwarder.let_go(entry)

    def close(self) -> None:
        for link in self.links:
            link.forwarder.stop(DEADLINE_S)
        for link in self.links:
            link.forwarder.wait_down(DEADLINE_S)
            assert link.forwarder.idle
        assert self.links[0].budget._used == 0


def stored(server: NbdProcess, offset: int, length: int) -> bytes:
    return bytes(server.connect().pread(length, offset))


def holds_still(link: Link) -> None:
    """Wait until the thread holds at a cut: nothing more will be sent until it is let go."""
    wait_until(lambda: link.forwarder._rest.value == "held", "the thread holds at the cut")


def test_nothing_behind_a_cut_is_sent_before_it_is_let_go_and_all_in_front_of_it_has_arrived(lab: Lab) -> None:
    servers: list[NbdProcess] = [
        lab.endpoint(size=SIZE, name=name, delay={"write": "5ms", "zero": "5ms"}) for name in ("one", "two")
    ]
    line = Line(servers)
    for link in line.links:
        for number in range(100):
            link.write(number * 4096, b"1" * 4096, waited_for=number % 2 == 0)
    entries = line.cut()
    for link in line.links:
        # Of each kind, and urgent ones as well; some overlap what is in front of the cut, some do not.
        behind = [link.write(number * 4096, b"2" * 4096, waited_for=number % 3 == 0) for number in range(50, 150)]
        behind.append(link.put(link.make(Kind.ZERO, SIZE - 8192, 8192)))
        behind.append(link.put(link.make(Kind.FLUSH)))
    line.reached(entries)
    for link, server in zip(line.links, servers, strict=True):
        assert stored(server, 0, 100 * 4096) == b"1" * 100 * 4096
        assert stored(server, 100 * 4096, 50 * 4096) == bytes(50 * 4096)
        holds_still(link)
        sent = link.forwarder.bytes_forwarded
        assert sent == 100 * 4096
        link.write(200 * 4096, b"3" * 4096)
        link.forwarder._connection.poke()  # type: ignore[union-attr]
        holds_still(link)
        assert (link.forwarder.bytes_forwarded, len(link.forwarder._in_flight)) == (sent, 0)
        assert link.forwarder.queue_bytes == 101 * 4096
        assert not link.forwarder.idle
    line.let_go(entries)
    line.close()
    for link, server in zip(line.links, servers, strict=True):
        assert stored(server, 0, 150 * 4096) == b"1" * 50 * 4096 + b"2" * 100 * 4096
        assert stored(server, 200 * 4096, 4096) == b"3" * 4096
        assert all(ends == [True] for ends in link.ends.values())
        assert (link.losses, link.failures) == ([], [])


@pytest.mark.parametrize("when", ["before it is reached", "when it is reached"])
def test_a_cut_may_be_let_go_at_any_time_and_ends_once(lab: Lab, when: str) -> None:
    server = lab.endpoint(size=SIZE, delay={"write": "20ms"})
    line = Line([server])
    (link,) = line.links
    for _ in range(5):
        link.write(0, b"1" * 4096, waited_for=False)
    entries = line.cut()
    if when == "when it is reached":
        line.reached(entries)
    line.let_go(entries)
    line.let_go(entries)
    last = link.write(0, b"2" * 4096)
    assert link.forwarder.await_end(last)
    line.reached(entries)
    assert link.forwarder._awaited == 0
    line.close()
    assert stored(server, 0, 4096) == b"2" * 4096


def test_cuts_follow_each_other_and_an_idle_queue_reaches_one_at_once(lab: Lab) -> None:
    line = Line([lab.endpoint(size=SIZE, name=name) for name in ("one", "two")])
    for number in range(20):
        entries = line.cut()
        line.reached(entries)
        written = [link.write(0, pattern(number, 4096)) for link in line.links]
        assert not any(entry.arrived for entry in written)
        line.let_go(entries)
        for link, entry in zip(line.links, written, strict=True):
            assert link.forwarder.await_end(entry)
    line.close()


def test_there_is_no_cut_unless_all_links_are_up(lab: Lab) -> None:
    server, gone = lab.endpoint(size=SIZE, name="one"), lab.endpoint(size=SIZE, name="two")
    line = Line([server, gone])
    gone.kill()
    line.links[1].wound_up()
    assert cut([link.forwarder for link in line.links]) is None
    assert line.links[0].forwarder.idle
    assert line.links[0].forwarder.await_end(line.links[0].write(0, b"goes on"))
    line.close()


@pytest.mark.parametrize("how", ["killed", "abandoned", "stopped"])
def test_a_link_that_goes_while_it_is_cut_ends_everything_once(lab: Lab, how: str) -> None:
    server = lab.endpoint(size=SIZE, delay={"write": "5ms"})
    line = Line([server])
    (link,) = line.links
    entries = line.cut()
    line.reached(entries)
    behind = [link.write(number * 4096, b"x" * 4096, waited_for=number % 2 == 0) for number in range(30)]
    holds_still(link)
    if how == "killed":
        server.kill()
    elif how == "abandoned":
        link.forwarder.abandon("another disk's connection has gone")
    else:
        link.forwarder.stop(0.0)
    link.wound_up()
    assert not any(entry.arrived for entry in behind)
    assert len(link.losses) == (how == "killed")
    line.let_go(entries)  # as epochs.py does, whatever has happened
    assert not link.forwarder.up


def test_a_cut_that_is_not_reached_when_the_link_goes_has_not_arrived(lab: Lab) -> None:
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE))
    line = Line([server], timeout_s=0.5)
    (link,) = line.links
    with silent(server):
        link.write(0, b"x" * 4096)
        (entry,) = line.cut()
        assert not link.forwarder.await_end(entry)
        assert not entry.arrived
    link.wound_up()
    assert link.budget._used == 0


def test_entries_that_are_put_together_are_never_on_two_sides_of_a_cut(lab: Lab) -> None:
    """A guest's large write is several entries: an epoch has all of it or nothing."""
    line = Line([lab.endpoint(size=SIZE)])
    (link,) = line.links
    ended = threading.Event()

    def write(place: int) -> int:
        number = 0
        while not ended.is_set():
            number += 1
            offset = place * 16 * KIB
            data = bytes([number % 251]) * 1000
            pieces = [link.make(Kind.WRITE, offset + part * 4 * KIB, data=data) for part in range(4)]
            link.put_together(*pieces)
            for piece in pieces:
                assert link.forwarder.await_end(piece)
        return number

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, place) for place in range(4)]
        try:
            for _ in range(30):
                entries = line.cut()
                line.reached(entries)
                content = line_content(line)[0]
                for place in range(4):
                    first, *others = (content[place * 16 * KIB + part * 4 * KIB] for part in range(4))
                    assert others == [first] * 3, "a write was cut in two"
                line.let_go(entries)
        finally:
            ended.set()
            line.let_go(entries)
        assert all(writer.result(DEADLINE_S) for writer in writers)
    line.close()


def line_content(line: Line) -> list[bytes]:
    """What the secondaries hold, over connections of their own."""
    contents = []
    for link in line.links:
        reader = Connection(link.connection.uri, None, DEADLINE_S)
        data = bytearray(SIZE)
        buffer = memoryview(data)
        reader.wait(reader.issue(lambda handle, done, buffer=buffer: handle.aio_pread(buffer, 0, done), 0))
        reader.close()
        contents.append(bytes(data))
    return contents


def test_a_write_that_knows_of_another_is_never_in_front_of_a_cut_alone(lab: Lab) -> None:
    """Threads write an ever larger number, first to one disk and, when that is answered (async: when it is queued), to
    the other one. At every cut no second disk may be ahead of its first one."""
    line = Line([lab.endpoint(size=SIZE, name=name) for name in ("one", "two")])
    ended = threading.Event()
    threads = 6

    def write(place: int) -> int:
        first, second = (line.links[0], line.links[1]) if place % 2 else (line.links[1], line.links[0])
        number = 0
        while not ended.is_set():
            number += 1
            data = number.to_bytes(8, "big")
            for link in (first, second):
                entry = link.write(place * 4096, data, waited_for=False)
                if number % 16 == 0 and link is second:
                    wait_until(
                        lambda link=link, entry=entry: link.ends[id(entry)], "the queue does not grow without bound"
                    )
        return number

    with ThreadPoolExecutor(threads) as pool:
        writers = [pool.submit(write, place) for place in range(threads)]
        try:
            seen = 0
            for _ in range(40):
                entries = line.cut()
                line.reached(entries)
                one, two = line_content(line)
                for place in range(threads):
                    numbers = [
                        int.from_bytes(content[place * 4096 : place * 4096 + 8], "big") for content in (one, two)
                    ]
                    ahead, behind = reversed(numbers) if place % 2 == 0 else numbers
                    assert ahead - 1 <= behind <= ahead, f"thread {place}: {numbers}"
                    seen = max(seen, ahead)
                line.let_go(entries)
        finally:
            ended.set()
            line.let_go(entries)
        assert all(writer.result(DEADLINE_S) for writer in writers)
    assert seen > 40, "there was something to cut"
    line.close()


class Watched:
    """In a lock's place: calls `before()` when somebody wants it."""

    def __init__(self, before: Callable[[], None]) -> None:
        self.real = threading.Lock()
        self._before = before

    def __enter__(self) -> None:
        self._before()
        self.real.acquire()

    def __exit__(self, *_: object) -> None:
        self.real.release()


def test_a_guest_that_writes_while_the_queues_are_being_cut_is_behind_the_cut_on_both(lab: Lab) -> None:
    """
    cut:     has the first queue ---------- wants the second ------- cuts both
    guest:                        writes to the first disk: waits            ... then to the second
    """
    line = Line([lab.endpoint(size=SIZE, name=name) for name in ("one", "two")])
    first, second = line.links
    wait_until(lambda: first.forwarder._rest.value == second.forwarder._rest.value == "sleep", "the threads sleep")
    wanted, cutting, test = threading.Event(), threading.Event(), threading.current_thread()
    written: list[Entry] = []

    def guest() -> None:
        written.append(first.write(0, b"cause"))
        written.append(second.write(0, b"effect"))

    writer = threading.Thread(target=guest, daemon=True)

    def at_first() -> None:
        if threading.current_thread() is writer:
            wanted.set()

    def at_second() -> None:
        if threading.current_thread() is test and not cutting.is_set():
            cutting.set()
            writer.start()
            assert wanted.wait(DEADLINE_S)
            if not locks[0].real.locked():
                writer.join(DEADLINE_S)  # nothing holds it up: it gets in between

    locks = [Watched(at_first), Watched(at_second)]
    for link, lock in zip(line.links, locks, strict=True):
        link.forwarder._lock = lock  # type: ignore[assignment]
    entries = line.cut()
    writer.join(DEADLINE_S)
    assert not writer.is_alive()
    line.reached(entries)
    assert [link.forwarder.queue_bytes for link in line.links] == [len(b"cause"), len(b"effect")]
    assert not any(entry.arrived for entry in written)
    line.let_go(entries)
    line.close()
    assert all(entry.arrived for entry in written)


def test_data_in_flight_is_bounded_but_for_one_entry(lab: Lab) -> None:
    """More would only wait in the socket. The secondary answers nothing until it is let."""
    size = FLIGHT_MAX * 2
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", size))
    link = Link(server, limit=4 * FLIGHT_MAX)
    most = 0

    def watch(real: Callable[[Entry], None]) -> Callable[[Entry], None]:
        def add(entry: Entry) -> None:
            nonlocal most
            real(entry)
            most = max(most, link.forwarder._in_flight.bytes)

        return add

    link.forwarder._in_flight.add = watch(link.forwarder._in_flight.add)  # type: ignore[method-assign]
    with silent(server):
        for offset in range(0, size, DATA_MAX):
            link.write(offset, b"x" * DATA_MAX)
        wait_until(lambda: most > FLIGHT_MAX - DATA_MAX, "as much as may be is in flight")
    for entry in link.entries:
        assert link.forwarder.await_end(entry)
    assert FLIGHT_MAX - DATA_MAX < most <= FLIGHT_MAX + DATA_MAX
    assert link.forwarder._in_flight.bytes == 0
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()
