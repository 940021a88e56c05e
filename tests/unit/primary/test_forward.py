# SPDX-License-Identifier: BSD-3-Clause
"""forward.py: order, bounds and ends of what goes to the secondary, against real NBD servers.

The server is nbdkit's memory plugin with a delay that keeps requests in flight, and a log of when each came and ended.
"""

from __future__ import annotations

import errno
import itertools
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import DEADLINE_S, DelayedEndpoint, Lab, NbdProcess, Secondary, make_raw, pattern, silent, wait_until
from replication import batch
from replication.disk.connection import Connection
from replication.errors import DiskError
from replication.image.buffers import Buffers
from replication.options import DATA_EXPORT
from replication.order.latency import LINK_LOST, QUEUE_FULL, WRITE, Course, Latency
from replication.primary import backlog
from replication.primary.backlog import DATA_MAX, FLIGHT_MAX, ZERO_MAX, Budget, Entry, InFlight, Kind, cost
from replication.primary.forward import _SMALL as SMALL
from replication.primary.forward import BATCHED_WINDOW, BATCHES_IN_WINDOW, SINGLY_S, WINDOW, Forwarder, cut
from replication.primary.peer import Peer
from replication.record.lineage import Lineage

SIZE = 4 << 20
KIB = 1024


class Link:
    """A forwarder with its budget, what it reported, and how often each entry ended."""

    def __init__(
        self,
        server: NbdProcess,
        limit: int = 64 << 20,
        timeout_s: float = DEADLINE_S,
        budget: Budget | None = None,
        export: str | None = None,
        batch_at: int | None = None,
    ) -> None:
        self.failures: list[tuple[Entry, DiskError]] = []
        self.losses: list[DiskError] = []
        self.ends: dict[int, list[bool]] = {}
        self.entries: list[Entry] = []
        self.budget = budget or Budget(limit)
        self.forwarder = Forwarder(
            "disk0", self.budget, timeout_s, lambda *failure: self.failures.append(failure), self.note_loss
        )
        self.connection = Connection(server.uri(), export, DEADLINE_S)
        self.forwarder.adopt(self.connection, batch_at)
        self.forwarder._flows.data.window = FLIGHT_MAX  # as after many quick answers

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
        assert self.forwarder.reserve(entry.cost)
        self.forwarder.put(entry)
        return entry

    def put_together(self, *entries: Entry) -> None:
        assert self.forwarder.reserve(cost(entries))
        self.forwarder.put(*entries)

    def write(self, offset: int, data: bytes, waited_for: bool = True) -> Entry:
        return self.put(self.make(Kind.WRITE, offset, data=data, waited_for=waited_for))

    def wound_up(self) -> None:
        """Wait for the thread's end; then nothing is left of what was put, and everything has ended once."""
        thread = self.forwarder._sender
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


def test_everybody_is_told_after_all_of_a_batch_has_ended(lab: Lab) -> None:
    """Who is told goes on at once, and may find out what has become of the others (a barrier does)."""
    held, release = threading.Event(), threading.Event()
    link = Link(lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE)))
    first, last = (link.make(Kind.WRITE, number * 4096, data=b"x" * 4096) for number in range(2))
    on_end = last.on_end
    assert on_end is not None

    def hold(entry: Entry) -> None:
        on_end(entry)
        held.set()
        assert release.wait(DEADLINE_S)

    last.on_end = hold
    assert link.budget.take_now(cost([first, last]))
    with link.forwarder._lock:
        assert all(link.forwarder._in_flight.admit(entry) for entry in (first, last))
        link.forwarder._awaited += 2
    # As if the secondary had answered both together.
    link.forwarder._answered.append(((first, last), 0))
    link.connection.poke()
    assert held.wait(DEADLINE_S)
    assert first.arrived
    assert not first.has_ended
    release.set()
    assert link.forwarder.await_end(first)
    assert link.forwarder.await_end(last)
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()


entries = st.builds(
    lambda kind, offset, length: Entry(kind, 0 if kind is Kind.FLUSH else offset, 0 if kind is Kind.FLUSH else length),
    st.sampled_from([Kind.WRITE, Kind.ZERO, Kind.FLUSH, Kind.WRITE, Kind.WRITE]),
    st.integers(0, 400 * KIB),
    st.one_of(st.integers(1, 9000), st.integers(60 * KIB, 70 * KIB), st.integers(1, ZERO_MAX)),
)


@given(st.lists(entries, max_size=25), st.randoms(use_true_random=False))
@settings(max_examples=300)
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
        meets = not flight.admit(entry)
        assert meets or not real
        if meets and not real:
            # Only neighbours in one block may be kept in order without need.
            assert any(
                entry.offset // 4096 <= (other.offset + other.length - 1) // 4096
                and other.offset // 4096 <= (entry.offset + entry.length - 1) // 4096
                for other in model
            )
        if not meets:
            model.append(entry)
        elif model and source.random() < 0.6:
            flight.remove([model.pop(source.randrange(len(model)))])
        assert len(flight) == len(model)
        assert flight.bytes == sum(len(other.data) for other in model)


def test_a_silent_secondary_is_lost_within_the_timeout_and_everything_ends_as_not_arrived(lab: Lab) -> None:
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE))
    link = Link(server, timeout_s=1.5)
    assert link.forwarder.await_end(link.write(0, b"x" * 4096))
    with silent(server):
        begun = time.monotonic()
        stuck = [link.write(number * 4096, b"y" * 4096) for number in range(100)]
        assert not link.forwarder.await_end(stuck[0])
        assert 1.4 < time.monotonic() - begun < DEADLINE_S / 2
        assert not link.forwarder.up
        assert not link.forwarder.reserve(link.make(Kind.FLUSH).cost), "from now on nobody waits"
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


def test_what_a_lost_link_gives_back_ends_when_the_loss_is_known(lab: Lab) -> None:
    """Who learns of an entry's end and asks why finds that the link is lost."""
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE))
    link = Link(server, timeout_s=2.0)  # all of them are put before that is over
    seen: list[tuple[bool, int]] = []
    with silent(server):
        stuck = [link.write(number * 4096, b"y" * 4096, waited_for=False) for number in range(10)]
        last = link.make(Kind.WRITE, SIZE - 4096, data=b"y" * 4096)
        on_end = last.on_end

        def look(entry: Entry) -> None:
            seen.append((link.forwarder.up, len(link.losses)))
            assert on_end is not None
            on_end(entry)

        for entry in (*stuck, last):
            entry.on_end = look
        link.put(last)
        assert not link.forwarder.await_end(last)
    link.wound_up()
    assert seen == [(False, 1)] * len(link.entries)


def test_a_killed_secondary_ends_every_entry_once(lab: Lab) -> None:
    # All of them take two seconds, so that the kill is in their midst on a busy machine as well.
    server = lab.endpoint(size=SIZE, delay={"write": "50ms"})
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
        extra = Entry(Kind.WRITE, 0, 16 * KIB)
        extra.load(memoryview(b"b" * 16 * KIB))
        begun = time.monotonic()
        assert not link.forwarder.reserve(extra.cost)
        assert time.monotonic() - begun < DEADLINE_S / 2
        assert not link.forwarder.await_end(first)
    link.wound_up()
    assert not link.forwarder.up
    assert len(link.losses) == 1


def test_a_slow_secondary_that_makes_progress_is_not_lost_and_a_large_write_does_not_wait_for_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One after the other (they overlap), 0.1 s each: all of them take longer than the timeout, and none of it silent.
    server = lab.endpoint(size=SIZE, delay={"write": "100ms"})
    link = Link(server, limit=110 * KIB, timeout_s=1.0)
    for _ in range(30):
        link.write(0, b"a" * 3 * KIB)
    begun = time.monotonic()
    large = Entry(Kind.WRITE, 0, 96 * KIB)
    large.load(memoryview(b"b" * 96 * KIB))
    assert not link.forwarder.reserve(large.cost)
    assert time.monotonic() - begun > 0.9
    assert link.forwarder.behind
    with monkeypatch.context() as patch:
        patch.setattr(backlog, "_Waiter", None)  # nobody can wait
        assert not link.forwarder.reserve(large.cost), "one has waited for all"
    wait_until(lambda: link.forwarder.idle, "it has caught up")
    assert not link.forwarder.behind
    assert link.forwarder.reserve(large.cost)
    link.forwarder.unreserve(large.cost)
    assert link.forwarder.up
    link.forwarder.stop(DEADLINE_S)
    assert (link.losses, link.failures) == ([], [])
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


def test_an_error_that_nobody_expects_is_a_loss_of_the_link(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No memory for a request, say: a guest's wait must end, and the next connection starts with nothing in flight."""
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE), shared=2)
    link = Link(server, timeout_s=5.0)

    def no_memory(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(link.connection, "write_alone", no_memory)
    put = [link.make(Kind.WRITE, number * 4096, data=b"x" * 4096, waited_for=number < 2) for number in range(4)]
    with ThreadPoolExecutor(2) as pool:
        link.put_together(*put)
        for waiting in [pool.submit(link.forwarder.await_end, entry) for entry in put[:2]]:
            assert waiting.result(DEADLINE_S) is False
    link.wound_up()
    assert [str(error) for error in link.losses] == ["internal error, see the log: MemoryError('no more')"]
    assert "MemoryError: no more" in capsys.readouterr().err
    assert link.forwarder.wait_down(DEADLINE_S)
    link.forwarder.adopt(Connection(server.uri(), None, DEADLINE_S))
    assert link.forwarder.await_end(link.write(0, b"y" * 4096))
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()


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
    connection, thread = link.connection, link.forwarder._sender
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
    assert not budget.take_now(1)
    budget.give(5000)
    assert budget.take(1000, lambda: False, 0)
    assert not budget.take_now(1)
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


@pytest.mark.parametrize("lost", [False, True], ids=["room", "lost"])
def test_a_request_that_waits_for_room_knows_why(lab: Lab, monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    whys: list[str] = []
    monkeypatch.setattr(Course, "go_on", lambda _, why: whys.append(why))
    link = Link(lab.endpoint(size=SIZE), limit=1000)
    link.forwarder.latency = latency = Latency()
    assert link.forwarder.reserve(1000), "which does not wait"

    def ask() -> bool:
        course = latency.begin(latency.guests.tally("disk0", WRITE))
        try:
            return link.forwarder.reserve(10)
        finally:
            course.end()

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        wait_until(lambda: len(link.budget._line) == 1, "it waits")
        assert whys == []
        if lost:
            link.forwarder.abandon("the test")
        else:
            link.forwarder.unreserve(1000)
        assert asked.result(DEADLINE_S) is not lost
        assert whys == [LINK_LOST if lost else QUEUE_FULL]
        link.budget._behind = True
        assert not pool.submit(ask).result(DEADLINE_S), "nobody waits behind a secondary that is too slow"
        assert len(whys) == 1
    link.forwarder.stop(0.0)


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
    line = Line([server], timeout_s=2.0)  # the cut is made before that is over
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

    def acquire(self) -> None:
        """Have it."""
        self._before()
        self.real.acquire()

    def release(self) -> None:
        """Let it go."""
        self.real.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


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

    def watch(real: Callable[[Entry], bool]) -> Callable[[Entry], bool]:
        def admit(entry: Entry) -> bool:
            nonlocal most
            admitted = real(entry)
            most = max(most, link.forwarder._in_flight.bytes)
            return admitted

        return admit

    link.forwarder._in_flight.admit = watch(link.forwarder._in_flight.admit)  # type: ignore[method-assign]
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


# -- what a resync sends ----------------------------------------------------------------------------------------------


ONE_BY_ONE = ("-t", "1")
"""Requests begin in the order in which they were sent."""


def spare(link: Link, offset: int, data: bytes) -> Entry:
    """An entry of a resync, put."""
    entry = link.make(Kind.WRITE, offset, data=data)
    assert link.forwarder.put_spare(entry)
    return entry


def test_a_resync_is_sent_where_the_guest_has_nothing_to_send_and_takes_no_room(lab: Lab) -> None:
    server = lab.start(Logged(lab.folder, options=ONE_BY_ONE))
    link = Link(server, limit=64 * KIB)
    with silent(server):
        # All but the first wait for it, so the queue is not empty; the budget is full.
        guests = [link.write(0, b"g" * 6 * KIB) for _ in range(9)]
        resent = [spare(link, SIZE // 2 + number * 64 * KIB, b"r" * 64 * KIB) for number in range(3)]
        assert link.forwarder.queue_bytes >= 3 * 64 * KIB
        assert not link.forwarder.idle
        late = link.write(0, b"G" * 4096)
    for entry in (*guests, *resent, late):
        assert link.forwarder.await_end(entry)
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()
    order = [offset for kind, offset, *_ in server.requests() if kind == "Write"]
    assert order == sorted(order), "the guest's first, also what came behind it"
    assert link.forwarder._spare_weight == 0


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.ZERO])
def test_what_a_guest_writes_never_comes_before_the_older_content_that_a_resync_has_read(lab: Lab, kind: Kind) -> None:
    server = lab.start(Logged(lab.folder, options=ONE_BY_ONE))
    link = Link(server)
    at = (2 << 20) + 4096
    newer = link.make(kind, at, 4096, data=b"n" * 4096 if kind is Kind.WRITE else b"")
    with silent(server):  # it has answered none of the guest's writes when the last is put
        guests = [link.write(0, b"g" * 4096) for _ in range(4)]
        other = spare(link, 1 << 20, b"r" * 4096)
        overtaken = spare(link, 2 << 20, b"r" * 64 * KIB)
        link.put(newer)
    for entry in (*guests, other, overtaken, newer):
        assert link.forwarder.await_end(entry)
    expected = (b"n" if kind is Kind.WRITE else b"\0") * 4096
    assert stored(server, 2 << 20, 12288) == b"r" * 4096 + expected + b"r" * 4096
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()
    order = [offset for _, offset, length, *_ in server.requests() if length and offset]
    assert order == [2 << 20, at, 1 << 20], "only what it overlaps goes in front of the guest's write"


@pytest.mark.parametrize("what", ["flush", "cut"])
def test_a_barrier_and_a_cut_have_what_a_resync_has_sent_in_front_of_them(lab: Lab, what: str) -> None:
    server = lab.endpoint(size=SIZE, delay={"write": "20ms"})
    line = Line([server])
    (link,) = line.links
    for _ in range(5):
        link.write(0, b"g" * 4096, waited_for=False)
    resent = spare(link, 1 << 20, b"r" * 4096)
    if what == "flush":
        assert link.forwarder.await_end(link.put(link.make(Kind.FLUSH)))
    else:
        entries = line.cut()
        behind = spare(link, 2 << 20, b"r" * 4096)
        line.reached(entries)
        assert resent.arrived
        holds_still(link)
        assert not behind.arrived, "it belongs to the next epoch"
        line.let_go(entries)
        assert link.forwarder.await_end(behind)
    assert resent.arrived
    line.close()


def test_what_a_resync_has_put_ends_with_the_link(lab: Lab) -> None:
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE))
    link = Link(server, timeout_s=2.0)  # all of them are put before that is over
    with silent(server):
        link.write(0, b"g" * 4096)
        link.write(0, b"g" * 4096)
        entries = [spare(link, (1 + number) << 18, b"r" * 4096) for number in range(3)]
        assert not link.forwarder.await_end(entries[0])
    link.wound_up()
    assert link.forwarder._spare_weight == 0
    gone = link.make(Kind.WRITE, data=b"late")
    assert not link.forwarder.put_spare(gone)
    assert link.ends[id(gone)] == [False]


def test_a_resync_is_to_wait_while_as_much_is_under_way_as_may_be_in_flight(lab: Lab) -> None:
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", SIZE))
    link = Link(server)
    window = link.forwarder._flows.data.window = 256 * KIB
    with silent(server):
        count = 0
        while link.forwarder.takes_spare:
            spare(link, count * 64 * KIB, b"r" * 64 * KIB)
            count += 1
        assert count == -(-window // (64 * KIB))
    for entry in link.entries:
        assert link.forwarder.await_end(entry)
    assert link.forwarder.takes_spare
    link.forwarder.stop(DEADLINE_S)
    link.wound_up()


# -- batches -----------------------------------------------------------------------------------------------------------

BATCH_SERVER = """\
import builtins, errno, itertools, json, os, struct, time
import nbdkit

API_VERSION = 2
SPACE = 1 << 20

def config(key, value):
    globals()[key] = value

def get_ready():
    global fd, log, size
    fd = os.open(os.path.join(folder, "raw"), os.O_RDWR)
    log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    size = os.fstat(fd).st_size

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

numbers = itertools.count()

def note(*what):
    os.write(log, json.dumps(what).encode() + b"\\n")

def held():
    deadline = time.monotonic() + 60
    while os.path.exists(os.path.join(folder, "held")) and time.monotonic() < deadline:
        time.sleep(0.002)

def open(readonly):
    return 1

def get_size(h):
    return size + SPACE

def can_fua(h):
    return nbdkit.FUA_NATIVE

def refused():
    try:
        with builtins.open(os.path.join(folder, "refused")) as file:
            return [int(line) for line in file]
    except FileNotFoundError:
        return []

def pread(h, buf, offset, flags):
    buf[:] = os.pread(fd, len(buf), offset)

def pwrite(h, buf, offset, flags):
    if offset == size:
        magic, count = struct.unpack_from("<QQ", buf)
        rows = [struct.unpack_from("<QQ", buf, 16 * number) for number in range(1, count + 1)]
        at = 16 + 16 * count
    else:
        rows, at = [(offset, len(buf))], 0
    number = next(numbers)
    note("begin", number, "batch" if offset == size else "write", rows, bool(flags & nbdkit.FLAG_FUA))
    held()
    bad = refused()
    failed = False
    for start, length in rows:
        if any(start <= block < start + length for block in bad):
            failed = True
        else:
            os.pwrite(fd, buf[at : at + length], start)
        at += length
    time.sleep(0.001)
    note("end", number)
    if failed:
        nbdkit.set_error(errno.ENOSPC)
        raise OSError("refused")

def zero(h, count, offset, flags):
    number = next(numbers)
    note("begin", number, "zero", [(offset, count)], bool(flags & nbdkit.FLAG_FUA))
    os.pwrite(fd, bytes(count), offset)
    note("end", number)

def flush(h, flags):
    number = next(numbers)
    note("begin", number, "flush", [(0, size)], False)
    note("end", number)
"""


class Arrived(NamedTuple):
    """A request as the secondary has seen it, and when it began and ended there, in the log's lines."""

    kind: str
    rows: list[tuple[int, int]]
    fua: bool
    begun: int
    ended: int


class BatchServer(NbdProcess):
    """A server that takes batches and notes what comes; it can refuse single bytes' writes, and hold everything."""

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        super().__init__(folder, "batches")
        self.size = size
        self.raw = make_raw(folder / "raw", size)
        self.log = folder / "log"
        self._held = folder / "held"

    def command(self) -> list[str]:
        script = self.folder / "batches.py"
        script.write_text(BATCH_SERVER)
        command = ["nbdkit", "-f", "-U", str(self.socket_path), "--exit-with-parent", "-t", "16"]
        return [*command, "python", str(script), f"folder={self.folder}"]

    def link(self, **options: Any) -> Link:
        return Link(self, batch_at=self.size, **options)

    def refuse(self, *offsets: int) -> None:
        """Writes that cover one of these bytes fail with ENOSPC; of a batch the others are done."""
        (self.folder / "refused").write_text("".join(f"{offset}\n" for offset in offsets))

    def hold(self) -> None:
        """Answer no write from now on."""
        self._held.touch()

    def release(self) -> None:
        self._held.unlink()

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def arrived(self, since: int = 0) -> list[Arrived]:
        """The requests after so many lines of the log, which have all ended, in the order of their arrival."""
        found: list[Arrived] = []
        open_at: dict[int, int] = {}
        for at, (what, number, *more) in enumerate(self.lines()[since:]):
            if what == "begin":
                open_at[number] = len(found)
                kind, rows, fua = more
                found.append(Arrived(kind, [tuple(row) for row in rows], fua, at, -1))
            else:
                place = open_at.pop(number)
                found[place] = found[place]._replace(ended=at)
        assert not open_at
        return found

    def begun(self, count: int) -> None:
        """Wait until so many requests have come."""
        wait_until(lambda: sum(line[0] == "begin" for line in self.lines()) >= count, f"{count} requests have come")


def scattered(link: Link, count: int, fill: bytes, at: int = 0, waited_for: bool = True) -> list[Entry]:
    """Writes of 1,000 bytes each to every other block from `at` on."""
    return [
        link.make(Kind.WRITE, at + number * 8192, data=fill * 1000, waited_for=waited_for) for number in range(count)
    ]


def rows_of(entries: list[Entry]) -> list[tuple[int, int]]:
    return [(entry.offset, entry.length) for entry in entries]


def ended(link: Link) -> None:
    """End in good order; everything has arrived or was refused."""
    assert link.forwarder.stop(DEADLINE_S)
    link.wound_up()


def test_of_a_batch_that_the_secondary_refuses_only_what_fails_has_not_arrived(lab: Lab) -> None:
    """It is sent again one by one, before anything that overlaps it."""
    server = lab.start(BatchServer(lab.folder))
    link = server.link()
    server.refuse(3 * 8192 + 500, 6 * 8192)
    first = scattered(link, 8, b"1")
    later = [link.make(Kind.WRITE, number * 8192 + 10, data=b"2" * 20) for number in (2, 3)]
    link.put_together(*first, *later)
    assert [link.forwarder.await_end(entry) for entry in first] == [number not in (3, 6) for number in range(8)]
    assert all(link.forwarder.await_end(entry) for entry in later)
    ended(link)
    together, *others, _flush = server.arrived()
    assert (together.kind, together.rows) == ("batch", rows_of(first))
    singles = [request for request in others if request.rows[0][1] == 1000]
    assert {single.kind for single in singles} == {"write"}
    assert sorted(single.rows for single in singles) == [[row] for row in rows_of(first)]
    assert all(single.begun > together.ended for single in singles)
    for row in rows_of(later):
        (single,) = (request for request in singles if overlap(request.rows[0], row))
        (after,) = (request for request in others if row in request.rows)
        assert after.begun > single.ended
    assert {entry.offset for entry, _ in link.failures} == {first[3].offset, first[6].offset}
    assert [error.errno for _, error in link.failures] == [errno.ENOSPC] * 2
    assert link.losses == []
    assert link.forwarder.bytes_forwarded == 6 * 1000 + 2 * 20
    expected = bytearray(8 * 8192)
    for number in range(8):
        expected[number * 8192 : number * 8192 + 1000] = bytes(1000) if number in (3, 6) else b"1" * 1000
    for number in (2, 3):
        expected[number * 8192 + 10 : number * 8192 + 30] = b"2" * 20
    assert server.raw.read_bytes()[: len(expected)] == expected


def test_a_batch_that_is_refused_as_a_whole_and_works_the_second_time_is_no_failure(lab: Lab) -> None:
    server = lab.start(BatchServer(lab.folder))
    link = server.link()
    server.refuse(0)
    server.hold()
    entries = scattered(link, 4, b"1")
    real, sent = link.connection.write_alone, []

    def write_alone(data: bytes, offset: int, *more: Any) -> None:
        if offset != SIZE and not sent:
            server.refuse()
        sent.append(offset)
        real(data, offset, *more)

    link.connection.write_alone = write_alone  # type: ignore[method-assign]
    link.put_together(*entries)
    server.begun(1)
    sent.clear()
    server.release()
    assert all(link.forwarder.await_end(entry) for entry in entries)
    ended(link)
    assert sent == [entry.offset for entry in entries]
    assert (link.failures, link.losses) == ([], [])


Operation = tuple[str, int, int, bool]

offsets = st.one_of(st.integers(0, 60 * KIB), st.integers(0, 15).map(lambda block: block * 4096))
lengths = st.one_of(st.integers(1, 9000), st.sampled_from((1, 4096, 4096, 4096, SMALL, SMALL + 1, 100 * KIB)))
operations = st.tuples(
    st.sampled_from(("write",) * 8 + ("zero", "flush", "cut")),
    offsets,
    lengths,
    st.sampled_from((False,) * 5 + (True,)),
)
histories = st.lists(st.lists(operations, min_size=1, max_size=12), min_size=1, max_size=5)


def play(link: Link, history: list[list[Operation]], content: bytearray) -> list[Entry]:
    """Put the requests, those of a list at once, and wait for them. `content` becomes what they make it."""
    entries: list[Entry] = []
    number = 0
    for together in history:
        puts = []
        for kind, offset, length, fua in together:
            number += 1
            if kind == "flush":
                puts.append(link.make(Kind.FLUSH))
            elif kind == "zero":
                puts.append(link.make(Kind.ZERO, offset, length))
                content[offset : offset + length] = bytes(length)
            elif kind == "write":
                data = pattern(number, length)
                puts.append(link.make(Kind.WRITE, offset, data=data))
                puts[-1].fua = fua
                content[offset : offset + length] = data
        link.put_together(*puts)
        entries += puts
        if any(kind == "cut" for kind, *_ in together):
            cuts = cut([link.forwarder])
            assert cuts is not None
            assert link.forwarder.await_end(cuts[0])
            link.forwarder.let_go(cuts[0])
    for entry in entries:
        assert link.forwarder.await_end(entry)
    return entries


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


def test_overlapping_writes_never_share_a_batch_and_what_is_not_small_and_plain_is_in_none(lab: Lab) -> None:
    server = lab.start(BatchServer(lab.folder))
    link = server.link()
    content = bytearray(SIZE)
    batches = 0

    @settings(max_examples=40)
    @given(histories)
    def check(history: list[list[Operation]]) -> None:
        nonlocal batches
        link.entries.clear()
        since = len(server.lines())
        entries = play(link, history, content)
        assert server.raw.read_bytes() == content
        # A request's end is noted before it is answered.
        requests = server.arrived(since)
        alone = Counter(
            (entry.kind.value, entry.offset, entry.length or SIZE, entry.fua)
            for entry in entries
            if entry.kind is not Kind.WRITE or entry.fua or entry.length > SMALL
        )
        came = Counter((request.kind, *request.rows[0], request.fua) for request in requests if request.kind != "batch")
        assert alone <= came, "they came as they are"
        assert all(not fua and length <= SMALL for kind, _, length, fua in came - alone if kind == "write")
        for request in requests:
            if request.kind == "batch":
                batches += 1
                assert not request.fua
                assert sum(length for _, length in request.rows) <= batch.DATA_MAX
                assert not any(overlap(one, other) for one, other in itertools.combinations(request.rows, 2))
        for one, other in itertools.combinations(requests, 2):
            if other.begun < one.ended:
                assert not any(overlap(*pair) for pair in itertools.product(one.rows, other.rows))

    check()
    ended(link)
    assert batches > 20
    assert (link.failures, link.losses) == ([], [])


def data_link(secondary: Secondary, size: int) -> tuple[Peer, Link]:
    """The control channel of a primary, which has to stay, and a link over its data export."""
    peer = Peer.open(secondary.uri(), DEADLINE_S, Connection, lambda *_: None, lambda _: None)
    assert peer is not None
    told = {"node": "1" * 16, "lineage": Lineage().to_json(), "disks": {"disk0": size}, "epoch": 0, "timeout": 60.0}
    answer = peer.call("replication-pair", told, DEADLINE_S)
    assert answer["batches"] is True
    return peer, Link(secondary, export=f"{DATA_EXPORT}:{answer['token']}:disk0", batch_at=size)


def test_a_secondary_has_what_was_written_in_its_order_and_its_guest_sees_none_of_it(lab: Lab) -> None:
    before = pattern(1, SIZE)
    secondary = lab.secondary([SIZE], contents=[before])
    secondary.start_replication()
    guest = secondary.connect("top0")
    peer, link = data_link(secondary, SIZE)
    content = bytearray(before)

    @settings(max_examples=30)
    @given(histories)
    def check(history: list[list[Operation]]) -> None:
        link.entries.clear()
        play(link, history, content)
        assert secondary.disks[0].read_bytes() == content
        assert guest.pread(256 * KIB, 0) == before[: 256 * KIB]

    check()
    assert guest.pread(SIZE, 0) == before
    ended(link)
    peer.close()
    assert (link.failures, link.losses) == ([], [])


def test_a_cut_ends_a_batch(lab: Lab) -> None:
    server = lab.start(BatchServer(lab.folder))
    link = server.link()
    server.hold()
    blocker = link.write(0, b"0" * 10)
    server.begun(1)
    # Overlaps what is in flight, so that all behind it is still in the queue when that is cut.
    front = [link.make(Kind.WRITE, 0, data=b"1" * 20), *scattered(link, 3, b"1", 8192)]
    behind = scattered(link, 3, b"2", 64 * KIB)
    link.put_together(*front)
    cuts = cut([link.forwarder])
    assert cuts is not None
    link.put_together(*behind)
    server.release()
    assert link.forwarder.await_end(cuts[0])
    holds_still(link)
    assert [request.rows for request in server.arrived()] == [rows_of([blocker]), rows_of(front)]
    link.forwarder.let_go(cuts[0])
    assert all(link.forwarder.await_end(entry) for entry in behind)
    assert [request.rows for request in server.arrived()][2:] == [rows_of(behind)]
    ended(link)


@pytest.mark.parametrize("how", ["killed", "silent", "stopped", "abandoned"])
def test_a_link_that_goes_with_batches_in_flight_ends_each_entry_once(lab: Lab, how: str) -> None:
    server = lab.start(BatchServer(lab.folder))
    # Silent from the first batch on, and the others have to come before that is too long.
    link = server.link(timeout_s=3.0 if how == "silent" else DEADLINE_S)
    server.hold()
    for group in range(5):
        entries = scattered(link, 20, b"x", group * 20 * 8192, waited_for=group % 2 == 0)
        link.put_together(*entries)
        server.begun(group + 1)
    waiting = scattered(link, 10, b"y")  # behind what is in flight
    link.put_together(*waiting)
    assert all(line[2] == "batch" for line in server.lines())
    if how == "killed":
        server.kill()
    elif how == "stopped":
        link.forwarder.stop(0)
    elif how == "abandoned":
        link.forwarder.abandon("another disk's connection has gone")
    link.wound_up()
    assert set(map(tuple, link.ends.values())) == {(False,)}
    assert len(link.losses) == (how in ("killed", "silent"))
    assert link.failures == [], "the link's failure is told once, not for each entry"
    assert link.forwarder.bytes_forwarded == 0
    server.kill()  # this nbdkit may abort when it answers a client that has gone (hangup.py)


def test_a_refused_batch_whose_link_goes_before_it_is_sent_again_ends_each_entry_once(lab: Lab) -> None:
    server = lab.start(BatchServer(lab.folder))
    link = server.link()
    server.refuse(0)
    real = link.connection.write_alone

    def write_alone(data: bytes, offset: int, *more: Any) -> None:
        if offset == 8192 * 2:
            link.connection.fail("cut in the midst of it")
        real(data, offset, *more)

    link.connection.write_alone = write_alone  # type: ignore[method-assign]
    link.put_together(*scattered(link, 6, b"x"))
    link.wound_up()
    assert all(len(ends) == 1 for ends in link.ends.values())
    assert len(link.losses) == 1
    assert link.failures == []
    server.kill()  # as above


def in_flight_when_nothing_is_answered(link: Link, server: BatchServer, entries: list[Entry]) -> tuple[int, int]:
    """Put the entries before a server that answers nothing; how many of them, and of their bytes, are sent."""
    server.hold()
    link.put_together(*entries)
    wait_until(lambda: link.forwarder._rest.value == "sleep" and link.forwarder._in_flight, "no more is sent")
    found = len(link.forwarder._in_flight), link.forwarder._in_flight.bytes
    server.release()
    for entry in entries:
        wait_until(lambda entry=entry: link.ends[id(entry)], "it ends")
    ended(link)
    assert all(ends == [True] for ends in link.ends.values())
    return found


def grow(link: Link) -> None:
    """Until the secondary has answered so many batches in time that the window is as large as it gets."""
    for round_ in range(100):
        entries = scattered(link, BATCHED_WINDOW // 8, b"%d" % (round_ % 10), waited_for=True)
        link.put_together(*entries)
        assert all(link.forwarder.await_end(entry) for entry in entries)
        if link.forwarder._window == BATCHED_WINDOW:
            return
    raise AssertionError(f"the window is {link.forwarder._window}")


WIDE = 3 * BATCHED_WINDOW * 4096


def tiny(link: Link, count: int) -> list[Entry]:
    return [link.make(Kind.WRITE, number * 8192, data=b"x", waited_for=False) for number in range(count)]


@pytest.mark.parametrize("batched", [True, False], ids=["batches", "singly"])
def test_so_many_writes_are_in_flight_at_most_before_anything_is_known_of_the_secondary(
    lab: Lab, batched: bool
) -> None:
    server = lab.start(BatchServer(lab.folder))
    link = server.link() if batched else Link(server)
    assert in_flight_when_nothing_is_answered(link, server, tiny(link, WINDOW * 5 // 4)) == (WINDOW, WINDOW)
    assert any(request.kind == "batch" for request in server.arrived()) == batched
    # None has more than one thread of sixteen should do; the last may be sent when the window has grown a little.
    longest = max(len(request.rows) for request in server.arrived())
    assert longest <= (2 * WINDOW // BATCHES_IN_WINDOW if batched else 1)


def test_so_many_small_writes_are_in_flight_at_most_when_the_secondary_is_quick(lab: Lab) -> None:
    server = lab.start(BatchServer(lab.folder, WIDE))
    link = server.link()
    grow(link)
    since = len(server.lines())
    found = in_flight_when_nothing_is_answered(link, server, tiny(link, BATCHED_WINDOW * 5 // 4))
    assert found == (BATCHED_WINDOW, BATCHED_WINDOW)
    longest = max(len(request.rows) for request in server.arrived(since))
    assert longest == BATCHED_WINDOW // BATCHES_IN_WINDOW


@pytest.mark.parametrize("length", [20 * KIB, 64 * KIB], ids=["batches", "singly"])
def test_so_many_bytes_are_in_flight_at_most_whether_in_batches_or_not(lab: Lab, length: int) -> None:
    server = lab.start(BatchServer(lab.folder, 2 * FLIGHT_MAX))
    link = server.link()
    grow(link)
    since = len(server.lines())
    count = FLIGHT_MAX // length * 5 // 4
    entries = [link.make(Kind.WRITE, number * length, data=b"x" * length, waited_for=False) for number in range(count)]
    _, flown = in_flight_when_nothing_is_answered(link, server, entries)
    assert FLIGHT_MAX < flown <= FLIGHT_MAX + length
    requests = [request for request in server.arrived(since) if request.kind != "flush"]
    assert any(request.kind == "batch" for request in requests) == (length <= SMALL)
    assert max(sum(size for _, size in request.rows) for request in requests) <= batch.DATA_MAX


def test_a_batch_that_is_answered_late_makes_the_window_small_again(lab: Lab) -> None:
    server = lab.start(BatchServer(lab.folder))
    link = server.link()
    grow(link)
    # Not before: on a busy machine the others would be late as well.
    link.forwarder.timeout_s = 4.0
    server.hold()
    entries = scattered(link, 4, b"x")
    link.put_together(*entries)
    sent = wait_until(time.monotonic, "now")
    wait_until(lambda: time.monotonic() - sent > 4.0 / 50 + 0.2, "it is late")
    server.release()
    assert all(link.forwarder.await_end(entry) for entry in entries)
    assert link.forwarder._window == WINDOW
    ended(link)


def test_after_a_refused_batch_writes_go_one_by_one_for_a_while(lab: Lab) -> None:
    """Then, and over a new connection, they go together again."""
    server = lab.start(BatchServer(lab.folder))
    link = server.link()

    def kinds(fill: bytes) -> set[str]:
        since = len(server.lines())
        entries = scattered(link, 6, fill)
        link.put_together(*entries)
        for entry in entries:
            link.forwarder.await_end(entry)
        return {request.kind for request in server.arrived(since)}

    assert kinds(b"1") == {"batch"}
    server.refuse(0)
    assert kinds(b"2") == {"batch", "write"}
    server.refuse()
    assert link.forwarder._window == WINDOW
    assert 0 < link.forwarder._singly_until - time.monotonic() <= SINGLY_S
    assert kinds(b"3") == {"write"}
    link.forwarder._singly_until = time.monotonic()
    assert kinds(b"4") == {"batch"}
    link.forwarder._singly_until = time.monotonic() + SINGLY_S
    assert link.forwarder.stop(DEADLINE_S)
    link.forwarder.adopt(Connection(server.uri(), None, DEADLINE_S), server.size)
    assert kinds(b"5") == {"batch"}
    ended(link)


# -- memory for large entries ------------------------------------------------------------------------------


def large(link: Link, memory: Buffers, offset: int, fill: bytes, length: int = 200_000) -> Entry:
    """A write as a guest's thread makes it: its data is a copy in memory that is used again."""
    entry = link.make(Kind.WRITE, offset, length)
    entry.load(memoryview(fill * length), memory)
    return entry


def memory_of(entry: Entry) -> object:
    assert isinstance(entry.data, memoryview)
    return entry.data.obj


def test_memory_of_a_large_write_is_used_again_when_the_secondary_has_it_and_not_before(lab: Lab) -> None:
    # writes a, b, c   sent ---------- held by the secondary ---------- answered
    # write d                loaded, must not be in their memory                  e: must be
    server = lab.start(BatchServer(lab.folder))
    link, memory = server.link(), Buffers(8 << 20)
    server.hold()
    first = [large(link, memory, number << 20, b"abc"[number : number + 1]) for number in range(3)]
    taken = {id(memory_of(entry)): memory_of(entry) for entry in first}
    link.put_together(*first)
    server.begun(3)  # their data has left libnbd, but nobody has answered
    meanwhile = large(link, memory, 3 << 20, b"d")
    other = memory_of(meanwhile)
    link.put(meanwhile)
    server.release()
    assert len(taken) == 3
    assert id(other) not in taken
    assert all(link.forwarder.await_end(entry) for entry in [*first, meanwhile])
    assert [entry.data for entry in first] == [b""] * 3, "who looks for the data must not find another write's"
    again = [large(link, memory, number << 20, b"e") for number in range(4)]
    assert set(taken) < {id(memory_of(entry)) for entry in again}
    assert memory.spare_bytes == 0
    for number, fill in enumerate((b"a", b"b", b"c", b"d")):
        assert stored(server, number << 20, 200_000) == fill * 200_000
    link.put_together(*again)
    ended(link)
    assert [stored(server, number << 20, 200_000) for number in range(4)] == [b"e" * 200_000] * 4


@pytest.mark.parametrize("how", ["killed", "abandoned", "stopped"])
def test_memory_that_may_still_be_sent_is_never_used_again(lab: Lab, how: str) -> None:
    server = lab.start(BatchServer(lab.folder))
    link, memory = server.link(), Buffers(8 << 20)
    server.hold()
    entries = [large(link, memory, number << 20, b"x") for number in range(3)]
    link.put_together(*entries)
    server.begun(3)
    if how == "killed":
        server.kill()
    elif how == "abandoned":
        link.forwarder.abandon("another disk's connection has gone")
    else:
        link.forwarder.stop(0)
    link.wound_up()
    server.kill()  # this nbdkit may abort when it answers a client that has gone (hangup.py)
    assert memory.spare_bytes == 0
    assert not any(entry.arrived for entry in entries)


def test_memory_of_a_refused_write_is_not_used_again(lab: Lab) -> None:
    server = lab.start(BatchServer(lab.folder))
    link, memory = server.link(), Buffers(8 << 20)
    server.refuse(100)
    entry = link.put(large(link, memory, 0, b"x"))
    assert not link.forwarder.await_end(entry)
    ended(link)
    assert memory.spare_bytes == 0


# -- checks ------------------------------------------------------------------------------------------------------------


def test_a_check_that_is_refused_is_no_failure_to_forward(lab: Lab) -> None:
    link = Link(lab.start(Logged(lab.folder)))
    refused, answered = (link.make(Kind.CHECK, 0, 64 * KIB) for _ in range(2))
    for entry, place in ((refused, SIZE + 100), (answered, 5)):
        entry.answer, entry.answer_at = bytearray(b"x" * 16), place
        assert link.forwarder.put_spare(entry)
        assert entry.ended is not None
        assert entry.ended.wait(DEADLINE_S)
    assert (refused.arrived, refused.refusal) == (False, errno.EINVAL)
    assert (answered.arrived, answered.refusal, answered.answer) == (True, 0, bytearray(16))
    assert link.failures == []
    assert link.forwarder.up
    assert link.forwarder.bytes_forwarded == 0
    link.forwarder.stop(0.0)
    link.wound_up()
