# SPDX-License-Identifier: BSD-3-Clause
"""resync.py: when a pass begins, what it sends, when it is repeated, and how it ends. The secondary is played by the
test, and the clock of the waiting is its own."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from lab import DEADLINE_S, MIB, make_raw, pattern, wait_until
from replication.disk.face import Extent
from replication.disk.file import FileDisk
from replication.errors import CommandError, DiskError
from replication.events import EventHub
from replication.fault import FaultLatch
from replication.image.qcow2 import BLOCK
from replication.jobs import JobList
from replication.primary import resync as resync_module
from replication.primary.backlog import DATA_MAX, Entry, Kind
from replication.primary.content import ZERO_RUN_MAX
from replication.primary.disk import PrimaryDisk
from replication.primary.forward import Forwarder
from replication.primary.pace import Pace
from replication.primary.resync import Resync
from replication.record.ancestry import Ancestry
from replication.record.changes import GRAIN, ChangeMap
from replication.stage import Stage

SIZE = 40 * GRAIN
RUN = 16 * GRAIN
"""The most data that is sent at a time."""


class Link:
    """In the forwarder's place: `answer(entry)` says whether it arrives, in the thread that puts it."""

    def __init__(self) -> None:
        self.up = True
        self.sent: list[tuple[int, int]] = []
        self.flushes = 0
        self.answer: Callable[[Entry], bool] = lambda _: True

    data_piece, zero_piece = DATA_MAX, ZERO_RUN_MAX
    takes_spare = True

    def put_spare(self, *entries: Entry) -> None:
        self.put(*entries)

    def put(self, *entries: Entry) -> None:
        for entry in entries:
            if entry.kind is Kind.FLUSH:
                self.flushes += 1
            else:
                self.sent.append((entry.offset, entry.length))
            entry.end(self.answer(entry))

    def await_end(self, entry: Entry) -> bool:
        return entry.arrived


class Alone:
    """In the ancestry's place."""

    def part(self) -> None:
        pass

    def flush(self) -> None:
        pass


def disk_over(name: str, local: FileDisk, link: Link, hub: EventHub) -> PrimaryDisk:
    """A disk that is running, with a map in memory."""
    latch = FaultLatch(hub, lambda: None)
    changes = ChangeMap(None, local.size)
    disk = PrimaryDisk(name, local, changes, cast(Forwarder, link), latch, cast(Ancestry, Alone()), False)
    disk.size = local.size
    disk.stage = Stage.RUNNING
    return disk


class Clock:
    """`time.monotonic` and the condition's waiting: time passes only when the test lets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Bench:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, rate: int | None = None) -> None:
        self.clock = Clock()
        monkeypatch.setattr(resync_module, "time", self.clock)
        self.told: list[dict[str, Any]] = []
        hub = EventHub()
        hub.subscribe(self.told.append)
        self.jobs = JobList(hub)
        self.unreadable: list[tuple[str, int, int, str]] = []
        self.disks = []
        self.links = []
        for name in ("disk0", "disk1"):
            make_raw(folder / name, SIZE, b"\x11" * SIZE)
            link = Link()
            local = FileDisk(name, str(folder / name))
            self.disks.append(disk_over(name, local, link, hub))
            self.links.append(link)
        self.disk, self.link = self.disks[0], self.links[0]
        self.told_ended = 0
        self.resync = Resync(self.disks, self.jobs, self.note_unreadable, self.note_end, rate)
        self.resync.start()

    def note_unreadable(self, disk: PrimaryDisk, offset: int, length: int, error: DiskError) -> None:
        self.unreadable.append((disk.name, offset, length, str(error)))

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
        self.resync._worker.wake()

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

    def job(self) -> dict[str, Any]:
        """The only job."""
        (job,) = self.jobs.query()
        return job

    def close(self) -> None:
        self.resync.stop(DEADLINE_S)
        assert not self.resync._worker.alive
        for disk in self.disks:
            disk.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    opened = Bench(tmp_path, monkeypatch)
    yield opened
    opened.close()


RATE = 4 * MIB


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench with a rate of RATE bytes a second. Time passes only in `let_pass`."""
    opened = Bench(tmp_path, monkeypatch, RATE)
    yield opened
    opened.close()


class Held:
    """An `answer` that holds the first entry put until `release`."""

    def __init__(self, link: Link) -> None:
        self._at_work, self._may_go_on = threading.Event(), threading.Event()
        self._real = link.answer
        link.answer = self._hold

    def _hold(self, entry: Entry) -> bool:
        if not self._at_work.is_set():
            self._at_work.set()
            assert self._may_go_on.wait(DEADLINE_S)
        return self._real(entry)

    def wait(self) -> None:
        assert self._at_work.wait(DEADLINE_S)

    def release(self) -> None:
        self._may_go_on.set()


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


def test_pieces_end_with_a_grain_whatever_the_speed_of_the_link_makes_of_them(bench: Bench) -> None:
    """The secondary strikes out only grains that are written as a whole."""
    bench.link.data_piece = 2 * GRAIN + 100
    bench.disk.changes.mark(20 * GRAIN, 5 * GRAIN)
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == [(20 * GRAIN, 2 * GRAIN), (22 * GRAIN, 2 * GRAIN), (24 * GRAIN, GRAIN)]


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
    bench.resync.now()
    bench.wait_passes(1)
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
    assert bench.told_ended == 3, "two passes, because everything was marked anew while it was sent"


def test_what_is_marked_while_a_pass_sends_it_is_sent_again_before_anybody_who_waits_goes_on(bench: Bench) -> None:
    """The refusal of a write that was in flight is heard behind the pass (changes.end)."""
    bench.disk.changes.mark(0, GRAIN)
    bench.disk.changes.begin(0, 4096)

    def answer(entry: Entry) -> bool:
        if entry.kind is Kind.FLUSH and not bench.disk.changes.missing and len(bench.link.sent) == 1:
            bench.disk.changes.end(0, 4096, False)
        return True

    bench.link.answer = answer
    assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == [(0, GRAIN)] * 2
    assert not bench.disk.changes.missing


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
    assert bench.unreadable == [("disk0", 0, BLOCK, "broken")]
    assert bench.disk.changes.missing
    assert "cannot be read as a whole" in bench.concluded["resync-disk0"]
    assert bench.link.sent == []
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
    wait_until(lambda: bench.resync._asked, "the second pass is asked for")
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
    assert answers == [False], "no whole pass has ended"
    may_go_on.set()
    bench.resync.stop(DEADLINE_S)
    assert bench.link.sent == [(0, RUN)]
    assert list(bench.disk.changes.missing_ranges()) == [(RUN, RUN)]


def test_stopping_before_starting_and_starting_twice_are_of_no_consequence() -> None:
    resync = Resync([], JobList(EventHub()), lambda disk, error: None, lambda: None)
    resync.stop(DEADLINE_S)
    running = Resync([], JobList(EventHub()), lambda disk, error: None, lambda: None)
    running.start()
    thread = running._worker._thread
    running.start()
    assert running._worker._thread is thread
    running.stop(DEADLINE_S)


# -- what is sent ------------------------------------------------------------------------------------------------


class Sparse:
    """One disk of `size` bytes, a file with holes, and a link that keeps all entries."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        hub = EventHub()
        self.link = Link()
        self.entries: list[Entry] = []
        self.link.answer = self.keep
        self.local = FileDisk("disk0", str(make_raw(folder / "sparse", size)))
        self.disk = disk_over("disk0", self.local, self.link, hub)
        self.changes = self.disk.changes
        self.unreadable: list[str] = []
        self.resync = Resync(
            [self.disk], JobList(hub), lambda *what: self.unreadable.append(str(what[3])), lambda: None
        )
        self.resync.start()

    def keep(self, entry: Entry) -> bool:
        if entry.kind is not Kind.FLUSH:
            self.entries.append(entry)
        return True

    @property
    def data_bytes(self) -> int:
        return sum(len(entry.data) for entry in self.entries)

    def send_all(self) -> None:
        """A full resync."""
        self.changes.mark_all()
        assert self.resync.complete(DEADLINE_S)
        assert self.changes.marked_bytes == 0

    def check(self, content: dict[int, bytes]) -> None:
        """The entries, one after the other, cover the disk, and say that it holds `content` by offset, else zeroes."""
        at = 0
        for entry in self.entries:
            assert entry.offset == at
            assert entry.length <= (DATA_MAX if entry.kind is Kind.WRITE else ZERO_RUN_MAX)
            inside = {offset: data for offset, data in content.items() if at <= offset < at + entry.length}
            assert entry.kind is Kind.WRITE or not inside
            for offset, data in inside.items():
                assert entry.data[offset - at : offset - at + len(data)] == data
            at += entry.length
        assert at == self.size

    def close(self) -> None:
        self.resync.stop(DEADLINE_S)
        self.disk.close()


MakeSparse = Callable[[int], Sparse]


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[MakeSparse]:
    made: list[Sparse] = []

    def make(size: int) -> Sparse:
        made.append(Sparse(tmp_path, size))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("rest", [0, 1, 100, GRAIN - 1, GRAIN + 1])
def test_a_sparse_disk_is_sent_as_holes_and_only_its_data_is_read(
    sparse: MakeSparse, monkeypatch: pytest.MonkeyPatch, rest: int
) -> None:
    setup = sparse(200 * MIB + rest)
    content = {3 * MIB + 5: b"one", 100 * MIB - 2: b"over the border", setup.size - 1: b"!"}
    for offset, data in content.items():
        setup.local.write([data], offset)
    read: list[int] = []
    real = setup.local.read
    monkeypatch.setattr(setup.local, "read", lambda buffer, at: (read.append(len(buffer)), real(buffer, at)))
    setup.send_all()
    setup.check({3 * MIB + 5: b"one", 100 * MIB - 2: b"ov", 100 * MIB: b"er the border", setup.size - 1: b"!"})
    assert all(entry.may_trim for entry in setup.entries if entry.kind is Kind.ZERO)
    assert sum(read) == setup.data_bytes <= 4 * GRAIN
    assert len(setup.entries) < 200 // 4 + 10


def test_a_long_run_of_data_is_read_and_locked_a_mebibyte_at_a_time(
    sparse: MakeSparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = sparse(5 * MIB + 100)
    setup.local.write([b"\x22" * setup.size], 0)
    locked: list[int] = []
    asked = [0]
    real_read, real_extents = setup.local.read, setup.local.extents

    def read(buffer: memoryview, at: int) -> None:
        locked.extend(held.stop - held.start for held in setup.disk.ranges._asked)
        real_read(buffer, at)

    def extents(offset: int, length: int) -> list[Extent]:
        asked[0] += 1
        return real_extents(offset, length)

    monkeypatch.setattr(setup.local, "read", read)
    monkeypatch.setattr(setup.local, "extents", extents)
    setup.send_all()
    assert locked == [MIB] * 5 + [100]
    assert [entry.length for entry in setup.entries] == locked
    assert asked[0] == 1, "once for the run, not for each piece"


def test_a_hole_that_is_written_after_it_was_seen_is_sent_as_data(
    sparse: MakeSparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    resync:  sees a hole of 8 MiB                      takes the range, looks again, sends
    guest:                         writes in its midst
    """
    setup = sparse(8 * MIB)
    real = setup.disk.resend
    fresh = b"fresh" * 10

    def resend(*arguments: Any) -> Sequence[Entry]:
        monkeypatch.setattr(setup.disk, "resend", real)
        setup.local.write([fresh], 2 * MIB + 5)
        return real(*arguments)

    monkeypatch.setattr(setup.disk, "resend", resend)
    setup.send_all()
    setup.check({2 * MIB + 5: fresh})
    assert setup.data_bytes == GRAIN


BAD = 5 * GRAIN + 3 * BLOCK
"""A sector of the local disk that cannot be read."""


def with_bad_sectors(local: FileDisk, monkeypatch: pytest.MonkeyPatch, *sectors: int) -> None:
    real = local.read

    def read(buffer: memoryview, offset: int) -> None:
        if any(offset <= at < offset + len(buffer) for at in sectors):
            raise DiskError("no such sector", errno.EIO)
        real(buffer, offset)

    monkeypatch.setattr(local, "read", read)


@pytest.mark.parametrize("where", [BAD, BAD + BLOCK - 1, 0, 4 * MIB - 1], ids=["within", "end", "first", "last"])
def test_an_unreadable_sector_stays_marked_and_the_rest_is_sent(
    sparse: MakeSparse, monkeypatch: pytest.MonkeyPatch, where: int
) -> None:
    setup = sparse(4 * MIB)
    content = pattern(5, 4 * MIB)
    setup.local.write([content], 0)
    grain, block = where // GRAIN * GRAIN, where // BLOCK * BLOCK
    with monkeypatch.context() as patch:
        with_bad_sectors(setup.local, patch, where)
        setup.changes.mark_all()
        assert setup.resync.complete(DEADLINE_S)
        assert list(setup.changes.missing_ranges()) == [(grain, GRAIN)], "nothing else is missing"
        received = bytearray(4 * MIB)
        for entry in setup.entries:
            received[entry.offset : entry.offset + entry.length] = entry.data
        assert received[:block] == content[:block]
        assert received[block + BLOCK :] == content[block + BLOCK :]
        assert not any(received[block : block + BLOCK])
        assert setup.unreadable == ["no such sector"]
        setup.entries.clear()
        assert setup.resync.complete(DEADLINE_S)
        assert sum(entry.length for entry in setup.entries) == GRAIN - BLOCK, "it is looked for again, and nothing else"
    setup.entries.clear()
    assert setup.resync.complete(DEADLINE_S)
    assert not setup.changes.marked_bytes, "it can be read again"
    assert b"".join(bytes(entry.data) for entry in setup.entries) == content[grain : grain + GRAIN]


def test_a_disk_that_is_broken_is_not_tried_to_its_end(sparse: MakeSparse, monkeypatch: pytest.MonkeyPatch) -> None:
    grains = resync_module.UNREADABLE_MAX + 10
    setup = sparse(grains * GRAIN)
    for at in range(0, grains * GRAIN, GRAIN):
        setup.local.write([b"x"], at)
    with_bad_sectors(setup.local, monkeypatch, *range(0, grains * GRAIN, BLOCK))
    setup.changes.mark_all()
    assert setup.resync.complete(DEADLINE_S)
    assert len(setup.unreadable) == resync_module.UNREADABLE_MAX
    assert setup.entries == []


def test_a_disk_that_cannot_tell_its_extents_is_read(sparse: MakeSparse, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(offset: int, length: int) -> list[Extent]:
        raise DiskError("broken")

    setup = sparse(4 * MIB + 5)
    setup.local.write([b"x"], 2 * MIB)
    monkeypatch.setattr(setup.local, "extents", broken)
    setup.send_all()
    setup.check({2 * MIB: b"x"})
    assert setup.data_bytes == GRAIN, "and its zeroes are sent as such all the same"
    assert setup.unreadable == []


def test_a_guest_that_writes_after_a_stop_while_a_piece_is_read_is_not_forgotten(
    sparse: MakeSparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    resync:  reads the old content ------------------------------- queues it on a link that still drains
    stop:                           running -> done
    guest:                                          marks, writes
    """
    setup = sparse(MIB)
    setup.local.write([b"old" * 1000], 0)
    real = setup.local.read

    def read(buffer: memoryview, at: int) -> None:
        real(buffer, at)
        setup.disk.stage = Stage.DONE
        setup.disk.write(memoryview(b"new"), 0, False)

    monkeypatch.setattr(setup.local, "read", read)
    setup.changes.mark(0, 1)
    assert setup.resync.complete(DEADLINE_S)
    assert [entry.data[:3] for entry in setup.entries] == [b"old"]
    assert list(setup.changes.missing_ranges()) == [(0, GRAIN)]
    # A pass that has not yet begun to read sends nothing at all.
    assert setup.disk.resend(0, GRAIN, lambda _: None) == ()
    assert setup.disk.resend(GRAIN, GRAIN, lambda _: None, True) == ()


def test_all_that_is_marked_while_a_piece_is_read_is_sent_anew(
    sparse: MakeSparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    resync:  reads ------------------------- queues
    link:           another secondary: lacks all
    """
    setup = sparse(MIB)
    setup.local.write([b"x" * MIB], 0)
    real = setup.local.read

    def read(buffer: memoryview, at: int) -> None:
        real(buffer, at)
        monkeypatch.setattr(setup.local, "read", real)
        setup.changes.mark_all()

    monkeypatch.setattr(setup.local, "read", read)
    setup.changes.mark(0, 1)
    assert setup.resync.complete(DEADLINE_S)
    assert [(entry.offset, entry.length) for entry in setup.entries] == [(0, GRAIN), (0, MIB)]
    assert setup.changes.marked_bytes == 0


# -- how fast ------------------------------------------------------------------------------------------------------


def entry_of(length: int, zero: bool = False) -> Entry:
    entry = Entry(Kind.ZERO if zero else Kind.WRITE, 0, length)
    if not zero:
        entry.load(memoryview(bytes(length)))
    return entry


@pytest.mark.parametrize("rate", [64 << 10, 1000_003, 10 * MIB, 1 << 40])
@pytest.mark.parametrize("zeroes", [False, True])
def test_over_any_time_at_most_the_rate_and_a_burst_are_sent(rate: int, zeroes: bool) -> None:
    pace = Pace(rate)
    now = sent = 0.0
    for _ in range(200):
        wait_s = pace.wait_s(now)
        now += wait_s
        assert pace.wait_s(now) < 1e-6
        entry = entry_of(ZERO_RUN_MAX if zeroes else pace.piece_max, zeroes)
        pace.spend([entry])
        sent += 4096 if zeroes else pace.piece_max
        assert sent <= rate * now + min(rate, MIB) + DATA_MAX + 1
        assert sent >= rate * now, "and not less"


def test_an_idle_time_is_made_up_for_by_a_bounded_burst_only() -> None:
    pace = Pace(RATE)
    pace.spend([entry_of(MIB)])
    assert pace.wait_s(0.0) == 0.0
    assert pace.wait_s(1000.0) == 0.0
    pace.spend([entry_of(MIB), entry_of(MIB)])
    assert pace.wait_s(1000.0) == MIB / RATE


@pytest.mark.parametrize(
    ("rate", "piece"), [(64 << 10, GRAIN), (MIB, 2 * GRAIN), (RATE, 8 * GRAIN), (1 << 40, DATA_MAX)]
)
def test_pieces_are_smaller_on_a_slow_link_and_whole_grains(rate: int, piece: int) -> None:
    assert Pace(rate).piece_max == piece
    assert Pace(None).piece_max == DATA_MAX


def sent_bytes(bench: Bench) -> int:
    return sum(length for link in bench.links for _, length in link.sent)


def wait_sent(bench: Bench, count: int) -> None:
    """Wait until `count` bytes have been sent and the thread waits for its rate."""
    wait_until(lambda: sent_bytes(bench) >= count, f"{count} bytes are sent")
    assert sent_bytes(bench) == count
    # It counts a piece when it has put it. The clock stands still, so whatever the thread does now, it sends nothing.
    wait_until(lambda: bench.resync._pace is not None and bench.resync._pace._left < 0, "the rate is used up")
    assert sent_bytes(bench) == count


def test_all_disks_together_keep_to_the_rate_also_when_somebody_waits_for_the_resync(slow: Bench) -> None:
    for disk in slow.disks:
        disk.changes.mark_all()
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(slow.resync.complete(DEADLINE_S)))
    waiter.start()
    piece = RATE // 8
    sent = 3 * piece  # the burst of 1 MiB, and one that overdraws it
    wait_sent(slow, sent)
    while sent < 2 * SIZE:
        slow.let_pass(1 / 8)
        sent = min(sent + piece, SIZE) if sent < SIZE else min(sent + piece, 2 * SIZE)
        wait_until(lambda expected=sent: sent_bytes(slow) >= expected, "another piece is sent")
        assert sent_bytes(slow) == sent
    waiter.join(DEADLINE_S)
    assert answers == [True]
    assert slow.links[0].sent[-1][0] + slow.links[0].sent[-1][1] == SIZE
    assert not any(disk.changes.missing for disk in slow.disks)


@pytest.mark.parametrize("how", ["link", "stop", "cancel", "end"])
def test_a_wait_for_the_rate_ends_when_there_is_no_more_use_in_it(slow: Bench, how: str) -> None:
    slow.disk.changes.mark_all()
    slow.resync.now()
    sent = 3 * RATE // 8
    wait_sent(slow, sent)
    if how == "link":
        slow.link.up = False  # nobody tells: it is looked at
    elif how == "stop":
        slow.disk.stage = Stage.DONE
    elif how == "cancel":
        slow.jobs.cancel("resync-disk0")
    else:
        slow.resync.stop(DEADLINE_S)
    error = {"link": "the link was lost", "cancel": "the resync was cancelled"}.get(how, "replication was stopped")
    wait_until(lambda: slow.concluded == {"resync-disk0": error}, "the pass has ended")
    assert sent_bytes(slow) == sent
    assert slow.job()["current-progress"] == sent


# -- the job -------------------------------------------------------------------------------------------------------


def test_progress_is_what_was_missing_and_what_became_missing_and_what_arrived(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []

    def answer(entry: Entry) -> bool:
        job = bench.job()
        seen.append((job["current-progress"], job["total-progress"]))
        if entry.offset == 20 * GRAIN and len(seen) == 2:
            bench.disk.changes.mark(0, 1)
            bench.disk.changes.mark(SIZE - 1, 1)
            return False
        return True

    bench.disk.changes.mark(4 * GRAIN, 1)
    bench.disk.changes.mark(20 * GRAIN, 1)
    bench.link.answer = answer
    assert bench.resync.complete(DEADLINE_S)
    grains = [(current // GRAIN, total // GRAIN) for current, total in seen]
    assert grains == [(0, 2), (1, 2), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert bench.jobs.query() == []


def test_the_numbers_of_a_job_that_failed_stay_although_the_disk_is_closed(bench: Bench) -> None:
    bench.disk.changes.mark(0, 2 * RUN)
    bench.link.answer = lambda entry: entry.kind is Kind.FLUSH or entry.offset == 0
    bench.resync.now()
    bench.wait_passes(1)
    bench.disk.changes.mark_all()
    bench.close()
    bench.disks.clear()
    assert (bench.job()["current-progress"], bench.job()["total-progress"]) == (RUN, 2 * RUN)
    assert bench.job()["error"] == "the secondary did not take all of it"


def test_a_cancelled_resync_stays_away_until_it_is_asked_for(bench: Bench) -> None:
    for disk in bench.disks:
        disk.changes.mark(0, 2 * RUN)
    held = Held(bench.link)
    bench.resync.now()
    held.wait()
    bench.jobs.cancel("resync-disk0")
    held.release()
    bench.wait_passes(1)
    assert bench.link.sent == [(0, RUN)]
    assert bench.links[1].sent == [(0, RUN), (RUN, RUN)], "the other disk goes on"
    assert bench.concluded == {"resync-disk0": "the resync was cancelled"}
    assert bench.due_s is None
    statuses = [event["data"] for event in bench.told if event["event"] == "JOB_STATUS_CHANGE"]
    assert [each["status"] for each in statuses if each["id"] == "resync-disk0"] == ["running", "concluded"]
    with pytest.raises(CommandError, match="cannot accept command verb 'cancel'"):
        bench.jobs.cancel("resync-disk0")
    # Neither a failure of forwarding nor a link that comes back takes it up again.
    bench.resync.request()
    bench.let_pass(30.0)
    bench.wait_passes(2)
    bench.resync.now(explicit=False)
    bench.wait_passes(3)
    assert bench.link.sent == [(0, RUN)]
    assert bench.concluded == {"resync-disk0": "the resync was cancelled"}


@pytest.mark.parametrize("how", ["now", "complete"])
def test_a_cancelled_resync_is_taken_up_by_an_explicit_request(bench: Bench, how: str) -> None:
    bench.disk.changes.mark(0, 2 * RUN)
    held = Held(bench.link)
    bench.resync.now()
    held.wait()
    bench.jobs.cancel("resync-disk0")
    held.release()
    bench.wait_passes(1)
    if how == "now":
        bench.resync.now()
        bench.wait_passes(2)
    else:
        assert bench.resync.complete(DEADLINE_S)
    assert bench.link.sent == [(0, RUN), (RUN, RUN)]
    assert not bench.disk.changes.missing
    assert bench.jobs.query() == []


def test_an_explicit_request_during_a_pass_that_is_being_cancelled_is_heard(bench: Bench) -> None:
    """
    resync:  at work, held -------------------------------- ends as cancelled, begins anew
    person:                 cancels    asks for a barrier
    """
    bench.disk.changes.mark(0, 2 * RUN)
    held = Held(bench.link)
    bench.resync.now()
    held.wait()
    bench.jobs.cancel("resync-disk0")
    bench.resync.now()
    held.release()
    bench.wait_passes(2)
    assert bench.link.sent == [(0, RUN), (RUN, RUN)]
    assert not bench.disk.changes.missing


def test_who_asks_for_a_resync_finds_the_jobs_of_all_disks_listed_until_they_are_done(bench: Bench) -> None:
    """Also before the thread has woken up, and while only the first disk is sent."""
    for disk in bench.disks:
        disk.changes.mark(0, 2 * RUN)
    held = Held(bench.link)
    with bench.resync._changed:  # the thread cannot begin
        bench.resync.now()
        assert [(job["id"], job["total-progress"]) for job in bench.jobs.query()] == [
            ("resync-disk0", 2 * RUN),
            ("resync-disk1", 2 * RUN),
        ]
    held.wait()
    assert [job["status"] for job in bench.jobs.query()] == ["running", "running"]
    held.release()
    bench.wait_passes(1)
    assert bench.jobs.query() == []


def test_between_two_disks_of_a_pass_that_nobody_has_asked_for_there_is_a_job_as_well(bench: Bench) -> None:
    for disk in bench.disks:
        disk.changes.mark(0, 2 * RUN)
    held = Held(bench.link)
    bench.resync.request()
    bench.let_pass(1.0)
    held.wait()
    assert len(bench.jobs.query()) == 2
    held.release()
    bench.wait_passes(1)


def test_a_job_that_has_not_begun_can_be_cancelled(bench: Bench) -> None:
    bench.disk.changes.mark(0, 2 * RUN)
    with bench.resync._changed:
        bench.resync.now()
        bench.jobs.cancel("resync-disk0")
    bench.wait_passes(1)
    assert bench.link.sent == []
    assert bench.concluded == {"resync-disk0": "the resync was cancelled"}
    assert bench.due_s is None


def test_a_cancel_ends_what_is_sent_although_the_next_pass_is_listed(bench: Bench) -> None:
    """
    resync:  at work, held ------------------------ ends; the next pass has nothing to do either
    person:                 asks again    cancels
    """
    bench.disk.changes.mark(0, 2 * RUN)
    held = Held(bench.link)
    bench.resync.now()
    held.wait()
    bench.resync.now()
    bench.jobs.cancel("resync-disk0")
    held.release()
    bench.wait_passes(2)
    assert bench.link.sent == [(0, RUN)]
    assert bench.concluded == {"resync-disk0": "the resync was cancelled"}


def test_a_job_that_has_not_begun_ends_with_the_process(bench: Bench) -> None:
    bench.disk.changes.mark(0, 2 * RUN)
    with bench.resync._changed:
        bench.resync.now()
        bench.resync._closing = True
        bench.resync._changed.notify_all()
    bench.resync.stop(DEADLINE_S)
    assert bench.link.sent == []
    assert bench.concluded == {"resync-disk0": "replication was stopped"}


def test_a_cancel_that_comes_too_late_changes_nothing(bench: Bench) -> None:
    late: list[Callable[[], None]] = []

    def answer(entry: Entry) -> bool:
        job = bench.jobs._jobs["resync-disk0"]
        assert job.cancel is not None
        late.append(job.cancel)
        if entry.kind is Kind.FLUSH:
            job.cancel()
        return True

    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = answer
    assert bench.resync.complete(DEADLINE_S)
    assert bench.jobs.query() == [], "all had arrived"
    late[0]()
    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = lambda _: True
    bench.resync.now(explicit=False)
    bench.wait_passes(2)
    assert not bench.disk.changes.missing


def test_failures_during_a_pass_do_not_cut_the_wait_before_the_next_one_short(bench: Bench) -> None:
    """A long pass: what was requested in its midst would be due when it ends."""

    def refuse(entry: Entry) -> bool:
        if entry.kind is Kind.FLUSH:
            bench.clock.now += 100.0
            return True
        bench.resync.request()
        return False

    bench.disk.changes.mark(0, GRAIN)
    bench.link.answer = refuse
    waits = []
    bench.resync.now()
    for count in range(1, 4):
        bench.wait_passes(count)
        assert bench.due_s is not None
        waits.append(bench.due_s)
        bench.let_pass(bench.due_s)
    bench.wait_passes(4)
    assert waits == [2.0, 4.0, 8.0]


def test_what_is_asked_for_during_a_pass_is_done_at_once_although_the_pass_failed(bench: Bench) -> None:
    bench.disk.changes.mark(0, GRAIN)
    held = Held(bench.link)
    bench.link.answer = _fail_first(bench.link.answer)
    bench.resync.now()
    held.wait()
    bench.resync.now()
    held.release()
    bench.wait_passes(2)
    assert not bench.disk.changes.missing


def _fail_first(real: Callable[[Entry], bool]) -> Callable[[Entry], bool]:
    """Nothing of the first pass arrives."""
    flushes = [0]

    def answer(entry: Entry) -> bool:
        arrived = real(entry)
        first = flushes[0] == 0
        flushes[0] += entry.kind is Kind.FLUSH
        return arrived and not first

    return answer


def test_another_rate_counts_from_the_next_piece_on(slow: Bench) -> None:
    slow.disk.changes.mark_all()
    slow.resync.now()
    wait_sent(slow, 3 * RATE // 8)
    slow.resync.limit(None)  # the clock stands still: at the former rate nothing more would be sent
    wait_until(lambda: sent_bytes(slow) >= SIZE, "the rest is sent")
