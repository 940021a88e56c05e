# SPDX-License-Identifier: BSD-3-Clause
"""resync.py: when a pass begins, what it sends, when it is repeated, and how it ends. The secondary is played by the
test, and the clock of the waiting is its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from lab import DEADLINE_S, make_raw, wait_until
from replication import resync as resync_module
from replication.backlog import Entry, Kind
from replication.changes import GRAIN, ChangeMap
from replication.errors import DiskError
from replication.events import EventHub
from replication.fault import FaultLatch
from replication.forward import Forwarder
from replication.image.file import FileDisk
from replication.jobs import JobList
from replication.primary_disk import PrimaryDisk
from replication.resync import Resync
from replication.stage import Stage

SIZE = 40 * GRAIN
RUN = 16 * GRAIN
"""What is sent at a time."""


class Link:
    """In the forwarder's place: `answer(entry)` says whether it arrives, in the thread that puts it."""

    def __init__(self) -> None:
        self.up = True
        self.sent: list[tuple[int, int]] = []
        self.flushes = 0
        self.answer: Callable[[Entry], bool] = lambda _: True

    def reserve(self, entries: Sequence[Entry]) -> bool:
        return self.up

    def put(self, entry: Entry) -> None:
        if entry.kind is Kind.FLUSH:
            self.flushes += 1
        else:
            self.sent.append((entry.offset, entry.length))
        entry.end(self.answer(entry))

    def await_end(self, entry: Entry) -> bool:
        return entry.arrived


class Clock:
    """`time.monotonic` and the condition's waiting: time passes only when the test lets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Bench:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(resync_module, "time", self.clock)
        self.told: list[dict[str, Any]] = []
        hub = EventHub()
        hub.subscribe(self.told.append)
        self.jobs = JobList(hub)
        self.unreadable: list[tuple[str, str]] = []
        self.disks = []
        self.links = []
        for name in ("disk0", "disk1"):
            make_raw(folder / name, SIZE, b"\x11" * GRAIN)
            link = Link()
            local = FileDisk(name, str(folder / name))
            latch = FaultLatch(hub, lambda: None)
            disk = PrimaryDisk(name, local, ChangeMap(None, SIZE), cast(Forwarder, link), latch, False)
            disk.size = SIZE
            disk.stage = Stage.RUNNING
            self.disks.append(disk)
            self.links.append(link)
        self.disk, self.link = self.disks[0], self.links[0]
        self.told_ended = 0
        self.resync = Resync(self.disks, self.jobs, self.note_unreadable, self.note_end)
        self.resync.start()

    def note_unreadable(self, disk: PrimaryDisk, error: DiskError) -> None:
        self.unreadable.append((disk.name, str(error)))

    def note_end(self) -> None:
        self.told_ended += 1

    @property
    def passes(self) -> int:
        with self.resync._changed:
            return self.resync._ended

    def let_pass(self, seconds: float) -> None:
        """Time goes on, and the thread looks at the clock."""
        with self.resync._changed:
            self.clock.now += seconds
            self.resync._changed.notify_all()

    def wait_passes(self, count: int) -> None:
        wait_until(lambda: self.passes >= count, f"{count} passes have ended")
        assert self.passes == count

    @property
    def due_s(self) -> float | None:
        """Seconds until the next pass, None if there is none to come."""
        with self.resync._changed:
            return None if self.resync._due is None else self.resync._due - self.clock.now

    @property
    def concluded(self) -> dict[str, str | None]:
        """Errors of the jobs that are listed."""
        return {job["id"]: job.get("error") for job in self.jobs.query()}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    opened = Bench(tmp_path, monkeypatch)
    yield opened
    opened.resync.stop(DEADLINE_S)
    assert opened.resync._thread is not None
    assert not opened.resync._thread.is_alive()
    for disk in opened.disks:
        disk.close()


def test_what_is_missing_is_sent_and_a_barrier_after_it(bench: Bench) -> None:
    bench.disk.changes.mark(3 * GRAIN + 5, 10)
    bench.disk.changes.mark(20 * GRAIN, 18 * GRAIN)
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == [(3 * GRAIN, GRAIN), (20 * GRAIN, RUN), (36 * GRAIN, 2 * GRAIN)]
    assert bench.link.flushes == 1
    assert bench.links[1].sent == []
    assert (bench.links[1].flushes, bench.due_s) == (0, None)
    assert bench.disk.changes.marked_bytes == 0
    assert bench.jobs.query() == []
    statuses = [event["data"]["status"] for event in bench.told if event["event"] == "JOB_STATUS_CHANGE"]
    assert statuses == ["running", "concluded", "null"]


def test_all_disks_are_sent_and_one_that_cannot_be_holds_up_no_other(bench: Bench) -> None:
    for disk in bench.disks:
        disk.changes.mark(0, GRAIN)
    bench.link.answer = lambda _: False
    assert bench.resync.complete(DEADLINE_S)
    assert bench.links[1].sent == [(0, GRAIN)]
    assert not bench.disks[1].changes.missing
    assert bench.disk.changes.missing
    assert list(bench.concluded) == ["resync-disk0"]


def test_what_goes_missing_behind_the_pass_is_sent_by_the_same_pass(bench: Bench) -> None:
    def mark_behind(entry: Entry) -> bool:
        if entry.offset == 5 * GRAIN:
            bench.disk.changes.mark(0, GRAIN)
        return True

    bench.disk.changes.mark(5 * GRAIN, GRAIN)
    bench.link.answer = mark_behind
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == [(5 * GRAIN, GRAIN), (0, GRAIN)]
    assert not bench.disk.changes.missing


def test_a_pass_looks_a_bounded_number_of_times(bench: Bench) -> None:
    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = lambda entry: entry.kind is Kind.FLUSH
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == [(0, GRAIN)] * 3
    assert bench.concluded == {"resync-disk0": "the secondary did not take all of it"}


def test_a_request_waits_before_it_sends_and_one_wait_serves_many(bench: Bench) -> None:
    bench.disk.changes.mark(0, GRAIN)
    bench.resync.request()
    bench.let_pass(0.5)
    bench.resync.request()
    assert (bench.passes, bench.due_s) == (0, 0.5)
    bench.let_pass(0.5)
    bench.wait_passes(1)
    assert bench.link.sent == [(0, GRAIN)]
    assert bench.due_s is None


def test_now_does_not_wait_for_what_was_requested(bench: Bench) -> None:
    bench.disk.changes.mark(0, GRAIN)
    bench.resync.request()
    bench.resync.now()
    bench.wait_passes(1)
    assert bench.link.sent == [(0, GRAIN)]


def test_a_pass_that_failed_is_repeated_later_and_later_and_at_first_pace_after_a_success(bench: Bench) -> None:
    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = lambda entry: entry.kind is Kind.FLUSH
    bench.resync.now()
    waits = []
    for count in range(1, 8):
        bench.wait_passes(count)
        waits.append(bench.due_s)
        assert bench.due_s is not None
        bench.let_pass(bench.due_s)
    assert waits == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    bench.wait_passes(8)
    bench.link.answer = lambda _: True
    bench.resync.now()
    bench.wait_passes(9)
    assert not bench.disk.changes.missing
    assert bench.due_s is None
    bench.resync.request()
    assert bench.due_s == 1.0


def test_without_a_link_nothing_is_tried(bench: Bench) -> None:
    bench.disk.changes.mark(0, GRAIN)
    bench.link.up = False
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == []
    assert bench.jobs.query() == []
    assert bench.due_s is None, "it is asked for again when there is a link"


def test_a_link_that_goes_in_the_midst_ends_the_pass_and_what_was_not_sent_stays_missing(bench: Bench) -> None:
    def lose(entry: Entry) -> bool:
        bench.link.up = False
        return True

    bench.disk.changes.mark(0, 2 * RUN)
    bench.link.answer = lose
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == [(0, RUN)]
    assert list(bench.disk.changes.missing_ranges()) == [(RUN, RUN)]
    assert bench.concluded == {"resync-disk0": "the link was lost"}
    assert bench.due_s is None


def test_a_barrier_that_does_not_arrive_is_a_failure_of_the_pass(bench: Bench) -> None:
    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = lambda entry: entry.kind is not Kind.FLUSH
    assert bench.resync.complete(DEADLINE_S)
    assert bench.concluded == {"resync-disk0": "the secondary did not take all of it"}
    assert bench.due_s == 2.0


def test_a_link_that_goes_under_the_barrier_is_the_cause_that_is_named(bench: Bench) -> None:
    def lose(entry: Entry) -> bool:
        bench.link.up = entry.kind is not Kind.FLUSH
        return bench.link.up

    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = lose
    assert bench.resync.complete(DEADLINE_S)
    assert bench.concluded == {"resync-disk0": "the link was lost"}
    assert bench.due_s is None


def test_the_end_of_every_pass_is_told_before_anybody_who_waited_goes_on(bench: Bench) -> None:
    assert bench.resync.complete(DEADLINE_S)
    assert bench.told_ended == 1
    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = lambda _: False
    assert bench.resync.complete(DEADLINE_S)
    assert bench.told_ended == 2


def test_a_stop_of_replication_ends_the_pass(bench: Bench) -> None:
    def stop(entry: Entry) -> bool:
        bench.disk.stage = Stage.DONE
        bench.link.up = False
        return True

    bench.disk.changes.mark(0, 2 * RUN)
    bench.link.answer = stop
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == [(0, RUN)]
    assert bench.concluded == {"resync-disk0": "replication was stopped"}


def test_a_local_disk_that_cannot_be_read_is_reported_and_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise DiskError("broken")

    bench.disk.changes.mark(0, GRAIN)
    with monkeypatch.context() as patched:
        patched.setattr(bench.disk.local, "read", broken)
        assert bench.resync.complete(DEADLINE_S)
    assert bench.unreadable == [("disk0", "broken")]
    assert bench.disk.changes.missing
    assert bench.concluded == {"resync-disk0": "broken"}
    assert bench.due_s == 2.0
    bench.let_pass(2.0)
    bench.wait_passes(2)
    assert not bench.disk.changes.missing


def test_a_disk_that_only_forwards_has_nothing_to_send_and_ends_no_thread(bench: Bench) -> None:
    assert bench.disk.local is not None
    bench.disk.local.close()
    bench.disk.local = None
    bench.disk.changes.mark(0, GRAIN)
    bench.disks[1].changes.mark(0, GRAIN)
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == []
    assert bench.links[1].sent == [(0, GRAIN)]
    assert [job for job in bench.jobs.query() if job["status"] == "running"] == []
    assert bench.due_s is None, "trying again would change nothing"


def test_complete_waits_for_a_pass_that_began_after_the_call(bench: Bench) -> None:
    at_work, may_go_on = threading.Event(), threading.Event()

    def hold(entry: Entry) -> bool:
        if not at_work.is_set():
            at_work.set()
            assert may_go_on.wait(DEADLINE_S)
        return True

    bench.disk.changes.mark(20 * GRAIN, GRAIN)
    bench.link.answer = hold
    bench.resync.now()
    assert at_work.wait(DEADLINE_S)
    answers: list[bool] = []
    asked = bench.resync._begun
    waiter = threading.Thread(target=lambda: answers.append(bench.resync.complete(DEADLINE_S)))
    waiter.start()
    wait_until(lambda: bench.due_s is not None, "the second pass is asked for")
    may_go_on.set()
    waiter.join(DEADLINE_S)
    assert answers == [True]
    assert bench.passes == asked + 1


def test_complete_gives_up_in_time_and_says_so(bench: Bench) -> None:
    may_go_on = threading.Event()
    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = lambda _: may_go_on.wait(DEADLINE_S)
    assert not bench.resync.complete(0.01)
    may_go_on.set()
    bench.wait_passes(1)


def test_the_end_of_the_process_ends_a_pass_a_wait_and_the_thread(bench: Bench) -> None:
    at_work, may_go_on = threading.Event(), threading.Event()

    def hold(entry: Entry) -> bool:
        at_work.set()
        assert may_go_on.wait(DEADLINE_S)
        return True

    bench.disk.changes.mark(0, 2 * RUN)
    bench.link.answer = hold
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(bench.resync.complete(DEADLINE_S)))
    waiter.start()
    assert at_work.wait(DEADLINE_S)
    bench.resync.stop(0.0)
    waiter.join(DEADLINE_S)
    assert len(answers) == 1
    may_go_on.set()
    bench.resync.stop(DEADLINE_S)
    assert bench.link.sent == [(0, RUN)]
    assert list(bench.disk.changes.missing_ranges()) == [(RUN, RUN)]


def test_stopping_before_starting_and_starting_twice_are_of_no_consequence() -> None:
    resync = Resync([], JobList(EventHub()), lambda disk, error: None, lambda: None)
    resync.stop(DEADLINE_S)
    running = Resync([], JobList(EventHub()), lambda disk, error: None, lambda: None)
    running.start()
    thread = running._thread
    running.start()
    assert running._thread is thread
    running.stop(DEADLINE_S)
