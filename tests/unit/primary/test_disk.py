# SPDX-License-Identifier: BSD-3-Clause
"""primary/disk.py: what is marked before and after each step of a write, what is forwarded and in which order."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, cast

import pytest

from lab import DEADLINE_S, Lab, make_raw, pattern, wait_until
from replication.disk.connection import Connection
from replication.disk.face import Extent
from replication.disk.file import FileDisk
from replication.disk.files import Buffer
from replication.errors import DiskError
from replication.events import EventHub
from replication.fault import Case, FaultLatch
from replication.order.latency import CHECKPOINT, LINK_LOST, SLOW_SECONDARY, Course, Latency
from replication.primary.backlog import DATA_MAX, ZERO_MAX, Budget, Entry, Kind
from replication.primary.disk import Checked, PrimaryDisk
from replication.primary.forward import Forwarder
from replication.record.ancestry import Ancestry
from replication.record.changes import CLEAN, GRAIN, MISSING, ON_ITS_WAY, ChangeMap
from replication.record.state import Record, StateFolder
from replication.stage import Mode, Stage

SIZE = 4 * GRAIN
KIB = 1024


class Link:
    """In the forwarder's place: keeps what is put; the test plays the secondary (`answer`)."""

    def __init__(self) -> None:
        self.up = True
        self.put_entries: list[Entry] = []
        self.puts: list[int] = []
        self.reserved = 0
        self.before_put: Callable[[Entry], None] = lambda _: None
        self.awaited = threading.Semaphore(0)
        self.let_go_s = 0.0

    patience_s = DEADLINE_S
    data_piece, zero_piece = DATA_MAX, ZERO_MAX
    behind = False

    def reserve(self, size: int, patient: bool = False) -> bool:
        if self.up:
            self.reserved += size
        return self.up

    def fall_behind(self) -> None:
        self.behind = True

    def put_spare(self, *entries: Entry) -> bool:
        for entry in entries:
            entry.cost = 0
        return self.put(*entries)

    def await_until(self, entry: Entry, until: float) -> bool:
        assert entry.ended is not None
        self.awaited.release()
        return entry.ended.wait(max(0.0, until - time.monotonic()))

    def unreserve(self, size: int) -> None:
        self.reserved -= size

    def put(self, *entries: Entry) -> bool:
        for entry in entries:
            self.before_put(entry)
        self.put_entries += entries
        self.puts.append(len(entries))
        if not self.up:
            for entry in entries:
                self.reserved -= entry.cost
                entry.end(False)
        return self.up

    def await_end(self, entry: Entry) -> bool:
        assert entry.ended is not None
        self.awaited.release()
        assert entry.ended.wait(DEADLINE_S)
        return entry.arrived

    def answer(self, entry: Entry, arrived: bool = True) -> None:
        self.reserved -= entry.cost
        entry.end(arrived)

    @property
    def shown(self) -> list[tuple[Kind, int, int]]:
        return [(entry.kind, entry.offset, entry.length) for entry in self.put_entries]


class LocalDisk(FileDisk):
    """A raw file that tells the test before each change, where the test may hold or fail it."""

    before: Callable[[int], None] = staticmethod(lambda _: None)
    flushes = 0

    def write(self, pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        self.before(offset)
        super().write(pieces, offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool = False) -> None:
        self.before(offset)
        super().zero(offset, length, may_trim, fua)

    def flush(self) -> None:
        self.before(0)
        super().flush()
        self.flushes += 1


class Hold:
    """Holds the thread that comes to `here` first until `release`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()

    def here(self, _: object = None) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self._released.wait(DEADLINE_S)

    def wait(self) -> None:
        assert self.reached.wait(DEADLINE_S)

    def release(self) -> None:
        self._released.set()


class Bench:
    """A primary disk in `running`; `states` is what the change map says of each grain."""

    def __init__(self, folder: Path, sync: bool, with_local: bool) -> None:
        hub = EventHub()
        self.told: list[int] = []
        hub.subscribe(lambda event: self.told.append(event["data"]["case"]))
        self.faults = FaultLatch(hub, lambda: None)
        self.raw = make_raw(folder / "disk", SIZE, b"\x11" * SIZE)
        self.local = LocalDisk("disk0", str(self.raw)) if with_local else None
        self.changes = ChangeMap(None, SIZE)
        self.link = Link()
        forwarder = cast(Forwarder, self.link)
        self.state = StateFolder(None)
        self.ancestry = Ancestry(self.state, Record(Mode.PRIMARY), lambda: None)
        self.disk = PrimaryDisk("disk0", self.local, self.changes, forwarder, self.faults, self.ancestry, sync)
        self.disk.size = SIZE
        self.disk.stage = Stage.RUNNING
        self.undefined = 0
        self.disk.left_undefined = self._left_undefined
        self.pool = ThreadPoolExecutor(4)

    def _left_undefined(self) -> None:
        assert self.states[0] == MISSING  # before anybody is told
        self.undefined += 1

    @property
    def states(self) -> list[int]:
        return list(self.changes._bytes[:])

    @property
    def content(self) -> bytes:
        return self.raw.read_bytes()

    def write(self, data: bytes, offset: int = 0, fua: bool = False) -> Future[None]:
        return self.pool.submit(self.disk.write, memoryview(data), offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool = True, fua: bool = False) -> Future[None]:
        return self.pool.submit(self.disk.zero, offset, length, may_trim, fua)

    def waiting(self, count: int) -> None:
        """Wait until `count` requests have or want a range."""
        wait_until(lambda: len(self.disk.ranges._asked) == count, f"{count} requests have or want a range")

    def close(self) -> None:
        self.pool.shutdown()
        self.disk.close()


Make = Callable[..., Bench]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    benches: list[Bench] = []

    def made(sync: bool = False, with_local: bool = True) -> Bench:
        benches.append(Bench(tmp_path, sync, with_local))
        return benches[-1]

    yield made
    for bench in benches:
        bench.close()


def done(future: Future[Any]) -> Any:
    return future.result(DEADLINE_S)


def fail(_: object) -> None:
    raise DiskError("broken", errno.EIO)


CLEAN_MAP = [CLEAN] * 4
both_protocols = pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
not_running = pytest.mark.parametrize("stage", [Stage.NONE, Stage.DONE], ids=lambda stage: stage.value)
kinds = pytest.mark.parametrize("kind", ["write", "zero"])


def change(bench: Bench, kind: str, offset: int = 0, length: int = 4 * KIB) -> Future[None]:
    return bench.write(b"\xaa" * length, offset) if kind == "write" else bench.zero(offset, length)


def changed(kind: str, length: int = 4 * KIB) -> bytes:
    return b"\xaa" * length if kind == "write" else bytes(length)


def resend(bench: Bench, ended: list[bool], offset: int = 0) -> Future[Sequence[Entry]]:
    return bench.pool.submit(bench.disk.resend, offset, GRAIN, lambda entry: ended.append(entry.arrived))


# -- not running -------------------------------------------------------------------------------------------------


@not_running
@both_protocols
@kinds
def test_when_not_running_a_change_is_local_and_remembered(make: Make, stage: Stage, sync: bool, kind: str) -> None:
    bench = make(sync)
    assert bench.local is not None
    bench.disk.stage = stage
    seen: list[list[int]] = []
    bench.local.before = lambda _: seen.append(bench.states)
    done(change(bench, kind, GRAIN))
    assert seen == [[CLEAN, MISSING, CLEAN, CLEAN]]
    assert bench.states == [CLEAN, MISSING, CLEAN, CLEAN]
    assert bench.content[GRAIN : GRAIN + 4 * KIB] == changed(kind)
    bench.disk.flush()
    assert (bench.local.flushes, bench.link.put_entries, bench.link.reserved) == (1, [], 0)
    assert bench.disk.bytes_written == 4 * KIB


@not_running
@both_protocols
def test_when_not_running_an_export_that_only_forwards_is_refused(make: Make, stage: Stage, sync: bool) -> None:
    bench = make(sync, with_local=False)
    bench.disk.stage = stage
    for request in (bench.write(b"x"), bench.zero(0, 1), bench.pool.submit(bench.disk.flush)):
        with pytest.raises(DiskError, match="only forwards, and replication is not running") as refusal:
            done(request)
        assert refusal.value.wire_errno == errno.EIO
    assert (bench.states, bench.link.put_entries, bench.disk.bytes_written) == (CLEAN_MAP, [], 0)


@pytest.mark.parametrize("stage", [Stage.NONE, Stage.RUNNING, Stage.DONE], ids=lambda stage: stage.value)
def test_an_export_that_only_forwards_can_never_be_read(make: Make, stage: Stage) -> None:
    bench = make(with_local=False)
    bench.disk.stage = stage
    with pytest.raises(DiskError, match="cannot be read") as refusal:
        bench.disk.read(memoryview(bytearray(8)), 0)
    assert refusal.value.wire_errno == errno.EIO
    with pytest.raises(DiskError, match="cannot be read"):
        bench.disk.extents(0, 8)


def test_a_read_is_local_and_the_guest_learns_of_its_failure(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    data = bytearray(8)
    bench.disk.read(memoryview(data), 0)
    assert (data, bench.disk.bytes_read) == (b"\x11" * 8, 8)
    assert bench.disk.extents(0, SIZE) == [Extent(0, SIZE, False, False)]
    monkeypatch.setattr(bench.local, "read", lambda *_: fail(None))
    with pytest.raises(DiskError, match="broken"):
        bench.disk.read(memoryview(data), 0)
    assert (bench.told, bench.faults.fault) == ([Case.PRIMARY_DISK], None)
    assert bench.link.put_entries == []


# -- running: what is marked at each step ------------------------------------------------------------------------


@kinds
def test_async_marks_then_writes_then_queues_then_answers_and_is_clean_on_arrival(make: Make, kind: str) -> None:
    bench = make()
    assert bench.local is not None
    steps: list[tuple[str, list[int]]] = []
    bench.local.before = lambda _: steps.append(("write", bench.states))
    bench.link.before_put = lambda _: steps.append(("put " + bench.content[:1].hex(), bench.states))
    done(change(bench, kind))
    on_its_way = [ON_ITS_WAY, CLEAN, CLEAN, CLEAN]
    assert steps == [("write", on_its_way), ("put " + changed(kind)[:1].hex(), on_its_way)]
    assert bench.states == on_its_way
    (entry,) = bench.link.put_entries
    assert (entry.ended, entry.offset, entry.length) == (None, 0, 4 * KIB)
    bench.link.answer(entry)
    assert bench.states == CLEAN_MAP


@kinds
def test_what_sync_could_not_send_is_missing_before_anybody_is_told(make: Make, kind: str) -> None:
    """A barrier behind it must find that: it may be answered before the guest's thread runs."""
    bench = make(sync=True)
    guest = change(bench, kind)
    assert bench.link.awaited.acquire(timeout=DEADLINE_S)
    (entry,) = bench.link.put_entries
    entry.settle(False)
    assert bench.changes.missing
    assert bench.states == [MISSING, CLEAN, CLEAN, CLEAN]
    assert not guest.done()
    assert entry.ended is not None
    entry.ended.set()
    done(guest)
    assert bench.states == [MISSING, CLEAN, CLEAN, CLEAN]


@pytest.mark.parametrize("first", ["guest", "repair"])
def test_what_was_sent_anew_before_the_guest_went_on_is_not_missing_again(make: Make, first: str) -> None:
    bench = make(sync=True)
    guest = bench.write(b"\xaa" * 4 * KIB)
    assert bench.link.awaited.acquire(timeout=DEADLINE_S)
    (entry,) = bench.link.put_entries
    entry.settle(False)
    ended: list[bool] = []
    (repair,) = done(resend(bench, ended))
    assert bytes(repair.data[: 4 * KIB]) == b"\xaa" * 4 * KIB
    assert bench.states == [ON_ITS_WAY, CLEAN, CLEAN, CLEAN]
    assert entry.ended is not None
    if first == "guest":
        entry.ended.set()
        done(guest)
        assert bench.states == [ON_ITS_WAY, CLEAN, CLEAN, CLEAN]
        bench.link.answer(repair)
    else:
        bench.link.answer(repair)
        entry.ended.set()
        done(guest)
    assert (ended, bench.states) == ([True], CLEAN_MAP)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_guest_of_sync_goes_on_after_the_timeout_and_the_mark_ends_with_the_write(make: Make, arrived: bool) -> None:
    """What moves on the link meanwhile is no reason to keep it waiting: from then on the secondary is behind."""
    bench = make(sync=True)
    bench.link.patience_s = 0.05
    told: list[tuple[object, ...]] = []
    bench.disk.left_behind = lambda *what: told.append(what)
    done(bench.write(b"\xaa" * 4 * KIB))
    assert bench.states == [ON_ITS_WAY, CLEAN, CLEAN, CLEAN]
    assert bench.link.behind
    assert told == [("write", 0, 4 * KIB, True)]
    bench.link.answer(bench.link.put_entries[0], arrived)
    assert bench.states == [CLEAN if arrived else MISSING, CLEAN, CLEAN, CLEAN]


def test_a_guest_of_sync_flushes_no_longer_than_the_timeout(make: Make) -> None:
    bench = make(sync=True)
    bench.link.patience_s = 0.05
    told: list[tuple[object, ...]] = []
    bench.disk.left_behind = lambda *what: told.append(what)
    done(bench.pool.submit(bench.disk.flush))
    assert told == [("flush", 0, 0, True)]
    assert bench.link.behind
    begun = len(bench.link.put_entries)
    done(bench.pool.submit(bench.disk.flush))
    assert len(bench.link.put_entries) == begun, "who is behind is not waited for"


@kinds
def test_sync_marks_then_queues_then_writes_and_answers_on_arrival(make: Make, kind: str) -> None:
    bench = make(sync=True)
    assert bench.local is not None
    steps: list[tuple[str, list[int]]] = []
    bench.local.before = lambda _: steps.append(("write", bench.states))
    bench.link.before_put = lambda _: steps.append(("put " + bench.content[:1].hex(), bench.states))
    guest = change(bench, kind)
    assert bench.link.awaited.acquire(timeout=DEADLINE_S)
    on_its_way = [ON_ITS_WAY, CLEAN, CLEAN, CLEAN]
    assert steps == [("put 11", on_its_way), ("write", on_its_way)]
    assert bench.states == on_its_way
    assert bench.content[: 4 * KIB] == changed(kind)
    assert not guest.done()
    # Who waits for the secondary does not hold up others on the same block.
    bench.waiting(0)
    bench.link.answer(bench.link.put_entries[0])
    done(guest)
    assert bench.states == CLEAN_MAP


@both_protocols
def test_a_write_waits_for_the_local_disk_although_the_secondary_has_it(make: Make, sync: bool) -> None:
    bench = make(sync)
    assert bench.local is not None
    hold = Hold()
    bench.local.before = hold.here
    guest = bench.write(b"x")
    hold.wait()
    if sync:
        bench.link.answer(bench.link.put_entries[0])
    else:
        assert bench.link.put_entries == []
    assert not guest.done()
    # The secondary has it, the local disk may not: a process killed now has to send the grain again.
    assert bench.states[0] == ON_ITS_WAY
    hold.release()
    done(guest)
    assert bench.content[:1] == b"x"


@both_protocols
@kinds
def test_an_export_that_only_forwards_forwards(make: Make, sync: bool, kind: str) -> None:
    bench = make(sync, with_local=False)
    guest = change(bench, kind)
    wait_until(lambda: bench.link.put_entries, "the write is queued")
    assert bench.states[0] == ON_ITS_WAY
    if not sync:
        done(guest)
    bench.link.answer(bench.link.put_entries[0])
    done(guest)
    assert bench.states == CLEAN_MAP
    assert bench.disk.bytes_written == 4 * KIB


@both_protocols
def test_a_write_that_does_not_arrive_succeeds_and_stays_missing(make: Make, sync: bool) -> None:
    bench = make(sync)
    guest = bench.write(b"x" * 4 * KIB, GRAIN - KIB)
    wait_until(lambda: bench.link.put_entries, "the write is queued")
    assert bench.states == [ON_ITS_WAY, ON_ITS_WAY, CLEAN, CLEAN]
    bench.link.answer(bench.link.put_entries[0], arrived=False)
    done(guest)
    assert bench.states == [MISSING, MISSING, CLEAN, CLEAN]
    assert bench.faults.fault is None
    # A later write of the same grain that arrives does not hide it.
    guest = bench.write(b"y", GRAIN)
    wait_until(lambda: len(bench.link.put_entries) == 2, "the second write is queued")
    bench.link.answer(bench.link.put_entries[1])
    done(guest)
    assert bench.states == [MISSING, MISSING, CLEAN, CLEAN]


@both_protocols
@kinds
@pytest.mark.parametrize("with_local", [True, False], ids=["with disk", "forwarding only"])
def test_without_a_link_a_change_succeeds_and_its_grain_is_missing(
    make: Make, sync: bool, kind: str, with_local: bool
) -> None:
    bench = make(sync, with_local)
    bench.link.up = False
    seen: list[list[int]] = []
    if bench.local is not None:
        bench.local.before = lambda _: seen.append(bench.states)
    done(change(bench, kind))
    assert all(states == [MISSING, CLEAN, CLEAN, CLEAN] for states in seen)
    assert len(seen) == with_local
    assert bench.states == [MISSING, CLEAN, CLEAN, CLEAN]
    assert (bench.link.put_entries, bench.link.reserved) == ([], 0)
    if with_local:
        assert bench.content[: 4 * KIB] == changed(kind)


def test_a_link_lost_during_the_local_write_leaves_the_grain_missing(make: Make) -> None:
    bench = make()
    assert bench.local is not None
    hold = Hold()
    bench.local.before = hold.here
    guest = bench.write(b"x")
    hold.wait()
    bench.link.up = False
    hold.release()
    done(guest)
    assert bench.states == [MISSING, CLEAN, CLEAN, CLEAN]
    assert bench.link.reserved == 0


@both_protocols
@kinds
def test_a_change_that_is_refused_without_a_link_leaves_no_mark_open(
    make: Make, monkeypatch: pytest.MonkeyPatch, sync: bool, kind: str
) -> None:
    """The state folder cannot tell that the nodes have parted. The grain is sent anew, and is clean then."""
    bench = make(sync)
    bench.link.up = False
    monkeypatch.setattr(bench.ancestry, "flush", lambda: fail(None))
    request = bench.write(b"\xaa" * 4 * KIB, fua=True) if kind == "write" else bench.zero(0, 4 * KIB, fua=True)
    with pytest.raises(DiskError, match="broken"):
        done(request)
    bench.waiting(0)
    assert bench.content == b"\x11" * SIZE
    assert bench.states == [MISSING, CLEAN, CLEAN, CLEAN]
    bench.link.up = True
    (entry,) = done(resend(bench, []))
    bench.link.answer(entry)
    assert bench.states == CLEAN_MAP


# -- running: the local disk fails -------------------------------------------------------------------------------


@kinds
def test_async_forwards_nothing_of_a_change_that_failed_locally(make: Make, kind: str) -> None:
    bench = make()
    assert bench.local is not None
    bench.local.before = fail
    with pytest.raises(DiskError, match="broken"):
        done(change(bench, kind))
    assert bench.states == [MISSING, CLEAN, CLEAN, CLEAN]
    assert (bench.link.put_entries, bench.link.reserved) == ([], 0)
    assert (bench.told, bench.faults.fault, bench.disk.bytes_written) == ([Case.PRIMARY_DISK], None, 0)
    assert bench.undefined == 1
    bench.waiting(0)


@kinds
def test_sync_keeps_a_change_that_failed_locally_marked_although_it_arrives(make: Make, kind: str) -> None:
    bench = make(sync=True)
    assert bench.local is not None
    bench.local.before = fail
    with pytest.raises(DiskError, match="broken"):
        done(change(bench, kind))
    (entry,) = bench.link.put_entries
    bench.link.answer(entry)
    assert bench.states == [MISSING, CLEAN, CLEAN, CLEAN]
    assert (bench.told, bench.faults.fault, bench.disk.bytes_written) == ([Case.PRIMARY_DISK], None, 0)
    assert bench.undefined == 1
    bench.waiting(0)


@both_protocols
@kinds
def test_resending_what_failed_locally_makes_it_clean(make: Make, sync: bool, kind: str) -> None:
    bench = make(sync)
    assert bench.local is not None
    bench.local.before = fail
    with pytest.raises(DiskError, match="broken"):
        done(change(bench, kind))
    ended: list[bool] = []
    assert done(resend(bench, ended))
    for entry in bench.link.put_entries:
        bench.link.answer(entry)
    assert (bench.states, ended) == (CLEAN_MAP, [True])


@both_protocols
@pytest.mark.parametrize("stage", [Stage.NONE, Stage.RUNNING, Stage.DONE], ids=lambda stage: stage.value)
def test_a_local_failure_without_a_link_leaves_the_grain_missing(make: Make, sync: bool, stage: Stage) -> None:
    bench = make(sync)
    assert bench.local is not None
    bench.disk.stage = stage
    bench.link.up = False
    bench.local.before = fail
    with pytest.raises(DiskError, match="broken"):
        done(bench.write(b"x"))
    assert bench.states == [MISSING, CLEAN, CLEAN, CLEAN]
    assert bench.told == [Case.PRIMARY_DISK]


# -- splitting ---------------------------------------------------------------------------------------------------


def test_a_large_write_goes_as_several_entries_that_end_separately(make: Make) -> None:
    bench = make()
    bench.link.data_piece = GRAIN
    data = pattern(1, 2 * GRAIN + 10)
    done(bench.write(data, 5))
    assert bench.link.shown == [
        (Kind.WRITE, 5, GRAIN),
        (Kind.WRITE, 5 + GRAIN, GRAIN),
        (Kind.WRITE, 5 + 2 * GRAIN, 10),
    ]
    assert b"".join(entry.data for entry in bench.link.put_entries) == data
    assert bench.link.puts == [3], "together: no cut comes in between"
    assert bench.content[5 : 5 + len(data)] == data
    first, second, third = bench.link.put_entries
    bench.link.answer(second)
    assert bench.states == [ON_ITS_WAY, ON_ITS_WAY, ON_ITS_WAY, CLEAN]
    bench.link.answer(first)
    assert bench.states == [CLEAN, CLEAN, ON_ITS_WAY, CLEAN]
    bench.link.answer(third, arrived=False)
    assert bench.states == [CLEAN, CLEAN, MISSING, CLEAN]


def test_a_large_range_of_zeroes_goes_as_several_entries(make: Make) -> None:
    bench = make()
    bench.link.zero_piece = GRAIN
    done(bench.zero(0, 2 * GRAIN + 1, may_trim=False))
    assert bench.link.shown == [(Kind.ZERO, 0, GRAIN), (Kind.ZERO, GRAIN, GRAIN), (Kind.ZERO, 2 * GRAIN, 1)]
    assert not any(entry.may_trim for entry in bench.link.put_entries)
    assert bench.content == bytes(2 * GRAIN + 1) + b"\x11" * (2 * GRAIN - 1)


@both_protocols
def test_a_forced_write_is_forced_on_the_secondary_only_where_it_is_waited_for(make: Make, sync: bool) -> None:
    bench = make(sync)
    guests = [bench.write(b"x", 0, fua=True), bench.zero(GRAIN, 10, fua=True)]
    wait_until(lambda: len(bench.link.put_entries) == 2, "both are queued")
    assert [entry.fua for entry in bench.link.put_entries] == [sync, sync]
    for entry in bench.link.put_entries:
        bench.link.answer(entry)
    for guest in guests:
        done(guest)


@both_protocols
def test_writes_larger_than_the_queue_all_arrive(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    monkeypatch.setattr(Forwarder, "data_piece", 8 * KIB)
    server = lab.endpoint(size=SIZE)
    limit = 16 * KIB
    forwarder = Forwarder("disk0", Budget(limit), DEADLINE_S, lambda *_: None, lambda *_: None)
    forwarder.adopt(Connection(server.uri(), None, DEADLINE_S))
    changes = ChangeMap(None, SIZE)
    local = FileDisk("disk0", str(make_raw(tmp_path / "disk", SIZE)))
    ancestry = Ancestry(StateFolder(None), Record(Mode.PRIMARY), lambda: None)
    disk = PrimaryDisk("disk0", local, changes, forwarder, FaultLatch(EventHub(), lambda: None), ancestry, sync)
    disk.stage = Stage.RUNNING
    with ThreadPoolExecutor(4) as pool:
        guests = [
            pool.submit(disk.write, memoryview(pattern(number, GRAIN)), (number % 4) * GRAIN // 2, False)
            for number in range(24)
        ]
        for guest in guests:
            done(guest)
    assert disk.finish_barrier(disk.begin_barrier())
    assert server.connect().pread(SIZE, 0) == (tmp_path / "disk").read_bytes()
    assert changes.marked_bytes == 0
    forwarder.stop(0.0)
    disk.close()


@pytest.mark.parametrize("operation", ["write", "flush"])
@pytest.mark.parametrize("why", [SLOW_SECONDARY, CHECKPOINT, LINK_LOST])
def test_who_waits_for_the_secondary_knows_why(
    make: Make, monkeypatch: pytest.MonkeyPatch, operation: str, why: str
) -> None:
    """A checkpoint: what is behind its cut is sent when that is let go."""
    whys: list[str] = []
    monkeypatch.setattr(Course, "go_on", lambda _, why: whys.append(why))
    bench, latency = make(True), Latency()
    bench.disk.attend(latency)

    def act() -> None:
        course = latency.begin(latency.guests.tally("disk0", operation))
        try:
            if operation == "write":
                bench.disk.write(memoryview(b"x"), 0, False)
            else:
                bench.disk.flush()
        finally:
            course.end()

    guest = bench.pool.submit(act)
    assert bench.link.awaited.acquire(timeout=DEADLINE_S)
    assert whys == []
    if why == CHECKPOINT:
        bench.link.let_go_s = time.monotonic()
    bench.link.up = why != LINK_LOST
    bench.link.answer(bench.link.put_entries[0], why != LINK_LOST)
    done(guest)
    assert whys == [why]


# -- order -------------------------------------------------------------------------------------------------------


@both_protocols
def test_overlapping_writes_are_queued_in_the_order_of_the_local_disk(make: Make, sync: bool) -> None:
    """
    first:   local write held ------------ released
    second:          asked for its range            local write
    other:           on another block: goes by
    """
    bench = make(sync)
    assert bench.local is not None
    hold = Hold()
    bench.local.before = hold.here
    first = bench.write(b"1" * 6 * KIB, 0)
    hold.wait()
    # They share the block from 4096 on, though not a byte.
    second = bench.write(b"2" * KIB, 7 * KIB)
    bench.waiting(2)
    other = bench.write(b"3", 8 * KIB)
    wait_until(lambda: (Kind.WRITE, 8 * KIB, 1) in bench.link.shown, "who touches neither is not held up")
    assert (Kind.WRITE, 7 * KIB, KIB) not in bench.link.shown
    assert bench.content[7 * KIB : 8 * KIB] == b"\x11" * KIB
    hold.release()
    wait_until(lambda: len(bench.link.put_entries) == 3, "all are queued")
    assert bench.link.shown.index((Kind.WRITE, 0, 6 * KIB)) < bench.link.shown.index((Kind.WRITE, 7 * KIB, KIB))
    for entry in bench.link.put_entries:
        bench.link.answer(entry)
    for guest in (first, second, other):
        done(guest)
    assert bench.states == CLEAN_MAP


def test_a_grain_is_clean_only_when_the_last_write_to_it_has_arrived(make: Make) -> None:
    bench = make()
    done(bench.write(b"1", 0))
    done(bench.write(b"2", 4 * KIB))
    first, second = bench.link.put_entries
    bench.link.answer(second)
    assert bench.states[0] == ON_ITS_WAY
    bench.link.answer(first)
    assert bench.states[0] == CLEAN


def test_the_queue_has_the_data_as_it_was_when_the_guest_was_answered(make: Make) -> None:
    bench = make()
    data = bytearray(b"then")
    bench.disk.write(memoryview(data), 0, False)
    data[:] = b"now!"
    assert bench.link.put_entries[0].data == b"then"


# -- flush and barrier -------------------------------------------------------------------------------------------


def test_a_barrier_is_a_flush_behind_what_was_answered(make: Make) -> None:
    bench = make()
    done(bench.write(b"x"))
    barrier = bench.disk.begin_barrier()
    assert [kind for kind, _, _ in bench.link.shown] == [Kind.WRITE, Kind.FLUSH]
    write, flush = bench.link.put_entries
    assert barrier.entry is flush
    waiting = bench.pool.submit(bench.disk.finish_barrier, barrier)
    assert bench.link.awaited.acquire(timeout=DEADLINE_S)
    assert not waiting.done()
    bench.link.answer(write)
    bench.link.answer(flush)
    assert done(waiting) is True


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_barrier_fails_without_a_link(make: Make, when: str) -> None:
    bench = make()
    bench.link.up = when == "after"
    barrier = bench.disk.begin_barrier()
    assert barrier.entry.has_ended == (when == "before")
    if when == "after":
        bench.link.answer(barrier.entry, arrived=False)
    assert bench.disk.finish_barrier(barrier) is False
    assert bench.link.reserved == 0


@pytest.mark.parametrize("when", ["before", "while it is waited for"])
def test_a_barrier_fails_when_the_secondary_lacks_something(make: Make, when: str) -> None:
    bench = make()
    if when == "before":
        bench.changes.mark(0, 1)
    barrier = bench.disk.begin_barrier()
    if when == "before":
        # It is sent behind the barrier's flush: that says nothing of it.
        assert done(resend(bench, []))
        bench.link.answer(bench.link.put_entries[1])
        assert not bench.changes.missing
    else:
        bench.changes.mark(0, 1)
    bench.link.answer(barrier.entry)
    assert bench.disk.finish_barrier(barrier) is False


def test_a_barrier_finds_a_range_missing_or_its_data_before_the_flush(make: Make) -> None:
    """
    resync:   taken off what is missing, held -------------- put into the queue
    barrier:                                  asks for the order               flush put
    """
    bench = make()
    bench.changes.mark(0, 1)
    hold = Hold()
    bench.link.before_put = hold.here
    sending = resend(bench, [])
    hold.wait()
    assert not bench.changes.missing
    barrier = bench.pool.submit(bench.disk.begin_barrier)
    assert not wait([barrier], 0.1).done
    assert [kind for kind, _, _ in bench.link.shown] == []
    hold.release()
    assert done(sending)
    assert not done(barrier).lacking
    assert [kind for kind, _, _ in bench.link.shown] == [Kind.WRITE, Kind.FLUSH]


def test_a_barrier_does_not_wait_for_room(make: Make) -> None:
    """It is begun with the gate closed: whoever waits before that would wait for the link."""
    bench = make()

    def reserve(_size: int) -> bool:
        raise AssertionError("waits for room")

    bench.link.reserve = reserve  # type: ignore[method-assign]
    barrier = bench.disk.begin_barrier()
    bench.link.answer(barrier.entry)
    assert bench.disk.finish_barrier(barrier) is True
    assert bench.link.reserved == 0


@both_protocols
def test_a_flush_of_the_guest_is_local_and_with_sync_a_barrier(make: Make, sync: bool) -> None:
    bench = make(sync)
    assert bench.local is not None
    guest = bench.pool.submit(bench.disk.flush)
    if sync:
        assert bench.link.awaited.acquire(timeout=DEADLINE_S)
        assert (bench.local.flushes, guest.done()) == (1, False)
        bench.link.answer(bench.link.put_entries[0], arrived=False)
    done(guest)
    assert bench.local.flushes == 1
    assert bench.link.shown == [(Kind.FLUSH, 0, 0)] * sync


def test_a_flush_that_fails_locally_is_told_to_the_guest(make: Make) -> None:
    bench = make(sync=True)
    assert bench.local is not None
    bench.local.before = fail
    with pytest.raises(DiskError, match="broken"):
        bench.disk.flush()
    assert bench.told == [Case.PRIMARY_DISK]


# -- resend ------------------------------------------------------------------------------------------------------


def test_resending_a_grain_makes_it_clean_on_arrival(make: Make) -> None:
    bench = make()
    bench.changes.mark(GRAIN, 1)
    ended: list[bool] = []
    assert done(resend(bench, ended, GRAIN))
    assert (bench.states, ended) == ([CLEAN, ON_ITS_WAY, CLEAN, CLEAN], [])
    (entry,) = bench.link.put_entries
    assert (entry.offset, entry.data) == (GRAIN, bench.content[GRAIN : 2 * GRAIN])
    bench.link.answer(entry)
    assert (bench.states, ended) == (CLEAN_MAP, [True])


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_grain_whose_resending_does_not_arrive_is_missing_again(make: Make, lost: str) -> None:
    bench = make()
    bench.changes.mark(0, 1)
    bench.link.up = lost == "after"
    ended: list[bool] = []
    assert len(done(resend(bench, ended))) == (lost == "after")
    if lost == "after":
        bench.link.answer(bench.link.put_entries[0], arrived=False)
    assert (bench.states[0], bench.link.reserved) == (MISSING, 0)
    assert ended == ([False] if lost == "after" else []), "what was never sent has not ended"
    bench.waiting(0)


def test_a_grain_that_cannot_be_read_stays_missing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    bench.changes.mark(0, 1)
    monkeypatch.setattr(bench.local, "read", lambda *_: fail(None))
    ended: list[bool] = []
    with pytest.raises(DiskError, match="broken"):
        done(resend(bench, ended))
    assert (bench.states[0], ended, bench.link.put_entries, bench.link.reserved) == (MISSING, [], [], 0)
    bench.waiting(0)


def test_a_write_begun_before_a_resend_is_queued_first_and_is_in_what_is_resent(make: Make) -> None:
    """
    guest:   local write held ------------- written, queued
    resync:        asked for the grain                      read, queued
    """
    bench = make()
    assert bench.local is not None
    bench.changes.mark(0, 1)
    hold = Hold()
    bench.local.before = hold.here
    guest = bench.write(b"new" * KIB, 100)
    hold.wait()
    assert bench.states[0] == MISSING
    ended: list[bool] = []
    resending = resend(bench, ended)
    bench.waiting(2)
    assert bench.link.put_entries == []
    hold.release()
    done(guest)
    assert done(resending)
    assert bench.link.shown == [(Kind.WRITE, 100, 3 * KIB), (Kind.WRITE, 0, GRAIN)]
    write, repair = bench.link.put_entries
    assert repair.data == bench.content[:GRAIN]
    assert repair.data[100:103] == b"new"
    bench.link.answer(repair)
    assert bench.states[0] == ON_ITS_WAY
    bench.link.answer(write)
    assert bench.states[0] == CLEAN


def test_a_write_during_a_resend_is_queued_behind_it(make: Make) -> None:
    """
    resync:  read done, held ------------- queued
    guest:        asked for its range             written, queued
    """
    bench = make()
    bench.changes.mark(0, 1)
    hold = Hold()
    bench.link.before_put = hold.here
    ended: list[bool] = []
    resending = resend(bench, ended)
    hold.wait()
    guest = bench.write(b"new", GRAIN - 3)
    bench.waiting(2)
    assert bench.content[GRAIN - 3 : GRAIN] == b"\x11" * 3
    hold.release()
    assert done(resending)
    done(guest)
    assert bench.link.shown == [(Kind.WRITE, 0, GRAIN), (Kind.WRITE, GRAIN - 3, 3)]
    repair, write = bench.link.put_entries
    bench.link.answer(repair)
    assert (bench.states[0], ended) == (ON_ITS_WAY, [True])
    bench.link.answer(write)
    assert bench.states[0] == CLEAN


@pytest.mark.parametrize("order", ["write first", "repair first"])
def test_a_write_that_is_lost_while_the_grain_is_resent_leaves_it_missing(make: Make, order: str) -> None:
    bench = make()
    bench.changes.mark(0, 1)
    ended: list[bool] = []
    assert done(resend(bench, ended))
    done(bench.write(b"new"))
    repair, write = bench.link.put_entries
    if order == "write first":
        bench.link.answer(write, arrived=False)
        bench.link.answer(repair)
    else:
        bench.link.answer(repair)
        bench.link.answer(write, arrived=False)
    assert bench.states[0] == MISSING


# -- lineage -----------------------------------------------------------------------------------------------------

OWN = "00000000000000aa"


def shared(bench: Bench) -> Bench:
    """The other node has the same."""
    bench.ancestry.become(lambda lineage: lineage.paired_as_equal(OWN))
    return bench


def parted(bench: Bench) -> bool:
    lineage = bench.ancestry.lineage
    assert lineage.current == (OWN if lineage.shared else bench.state.moved_to)
    return not lineage.shared


@both_protocols
@kinds
def test_what_the_other_node_gets_does_not_part_the_nodes(make: Make, sync: bool, kind: str) -> None:
    bench = shared(make(sync))
    future = change(bench, kind)
    wait_until(lambda: bench.link.put_entries, "it is queued")
    bench.link.answer(bench.link.put_entries[0])
    done(future)
    assert not parted(bench)


@pytest.mark.parametrize("why", ["stopped", "no link"])
@both_protocols
@kinds
def test_a_write_that_the_other_node_will_not_get_parts_them_before_the_disk_changes(
    make: Make, sync: bool, kind: str, why: str
) -> None:
    bench = shared(make(sync))
    assert bench.local is not None
    if why == "stopped":
        bench.disk.stage = Stage.DONE
    else:
        bench.link.up = False
    seen: list[tuple[bool, bool]] = []
    bench.local.before = lambda _: seen.append((parted(bench), bench.changes.missing))
    done(change(bench, kind))
    assert seen == [(True, True)]


def test_a_write_that_does_not_arrive_parts_the_nodes_before_it_counts_as_missing(make: Make) -> None:
    """Its guest was answered long ago; at the loss the nodes are parted at once."""
    bench = shared(make())
    done(bench.write(b"x"))
    assert not parted(bench)
    real = bench.changes.end
    seen: list[bool] = []

    def end(offset: int, length: int, arrived: bool) -> None:
        seen.append(parted(bench))
        real(offset, length, arrived)

    bench.changes.end = end  # type: ignore[method-assign]
    bench.link.answer(bench.link.put_entries[0], arrived=False)
    assert seen == [True]


def test_with_sync_a_write_is_not_answered_before_the_nodes_are_parted(make: Make) -> None:
    bench = shared(make(sync=True))
    future = bench.write(b"x")
    assert bench.link.awaited.acquire(timeout=DEADLINE_S)
    assert not parted(bench)
    assert not future.done()
    bench.link.answer(bench.link.put_entries[0], arrived=False)
    done(future)
    assert parted(bench)


@pytest.mark.parametrize("how", ["flush", "write", "zero"])
def test_what_the_guest_wants_stable_has_its_generation_on_stable_storage_first(
    make: Make, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bench = shared(make())
    assert bench.local is not None
    bench.disk.stage = Stage.DONE
    steps: list[str] = []
    monkeypatch.setattr(bench.state, "flush_page", lambda: steps.append("generation"))
    done(bench.write(b"x"))
    assert steps == []
    bench.local.before = lambda _: steps.append("disk")
    if how == "flush":
        bench.disk.flush()
    elif how == "write":
        done(bench.write(b"x", fua=True))
    else:
        done(bench.zero(0, 8, fua=True))
    assert steps == ["generation", "disk"]


def test_a_question_whose_reading_began_while_replication_was_stopped_is_not_put(make: Make) -> None:
    """
    guest:     marks its write, which is slow                       ... is answered
    question:                              reads what was there              ... and would be queued
    command:  (stopped)                                                          starts again
    """
    bench = make()
    written, looked = Hold(), Hold()
    assert bench.local is not None
    bench.local.before = written.here
    bench.disk.stage = Stage.DONE
    write = bench.write(b"new", 0)
    written.wait()
    settled = bench.local.check_settled

    def check_settled(offset: int, length: int) -> None:
        looked.here()
        settled(offset, length)

    bench.local.check_settled = check_settled  # type: ignore[method-assign]
    entry = Entry(Kind.CHECK, 0, GRAIN)
    asked = bench.pool.submit(bench.disk.check, entry, memoryview(bytearray(GRAIN)), True)
    wait_until(lambda: asked.done() or looked.reached.is_set(), "the question has looked at the stage")
    written.release()
    write.result(DEADLINE_S)
    bench.disk.stage = Stage.RUNNING
    looked.release()
    assert asked.result(DEADLINE_S) is Checked.UNSENT
    assert not bench.link.put_entries
