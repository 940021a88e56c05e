# SPDX-License-Identifier: BSD-3-Clause
"""secondary/disk.py: what each face does in each stage (the table of the design), and who learns of a failure."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from content import make_raw
from replication.disk.file import FileDisk
from replication.disk.files import Buffer
from replication.disk.unflushed import Loss
from replication.errors import DiskError
from replication.events import EventHub
from replication.fault import Case, FaultLatch
from replication.image import qcow2
from replication.image.frozen import Frozen
from replication.image.overlay import Overlay
from replication.image.stack import Stack
from replication.record.ancestry import Ancestry
from replication.record.changes import GRAIN, ChangeMap
from replication.record.state import Record, StateFolder
from replication.secondary import disk as secondary_disk
from replication.secondary.disk import SecondaryDisk
from replication.stage import Mode, Stage

SIZE = 256 << 10


class Disk(FileDisk):
    """A raw file that knows which of its writes are not stable yet, and may be told to fail."""

    unstable = 0
    broken = False

    def write(self, pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        if self.broken:
            raise DiskError("broken", errno.EIO)
        super().write(pieces, offset, fua)
        self.unstable += not fua

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool = False) -> None:
        if self.broken:
            raise DiskError("broken", errno.EIO)
        super().zero(offset, length, may_trim, fua)
        self.unstable += not fua

    def flush(self) -> None:
        super().flush()
        self.unstable = 0


class Bench:
    def __init__(self, folder: Path) -> None:
        make_raw(folder / "disk", SIZE, b"\x11" * SIZE)
        for name in ("active", "hidden"):
            qcow2.create(str(folder / f"{name}.qcow2"), str(folder / "disk"), "raw", SIZE)
        self.raw = Disk("disk0", str(folder / "disk"))
        hub = EventHub()
        self.told: list[int] = []
        hub.subscribe(lambda event: self.told.append(event["data"]["case"]))
        self.faults = FaultLatch(hub, lambda: None)
        self.failed: list[str] = []
        self.repairs = 0
        self.state = StateFolder(None)
        self.ancestry = Ancestry(self.state, Record(Mode.SECONDARY), lambda: None)
        self.disk = SecondaryDisk("disk0", "top", self.raw, self.faults, self.ancestry)
        self.disk.open_maps(lambda kind: ChangeMap(None, SIZE))
        self.disk.backup_failed = lambda error: self.failed.append(error.operation)
        self.disk.repaired = self.note_repair
        overlays = (Overlay(name, "disk0", str(folder / f"{name}.qcow2")) for name in ("active", "hidden"))
        self.stack = Stack(*overlays, self.raw, self.disk.lost)
        self.disk.stack = self.stack

    def note_repair(self) -> None:
        self.repairs += 1

    def guest(self, offset: int = 0) -> bytes:
        data = bytearray(8)
        self.disk.guest_read(memoryview(data), offset)
        return bytes(data)

    def target(self, offset: int = 0) -> bytes:
        data = bytearray(8)
        self.disk.target_read(memoryview(data), offset)
        return bytes(data)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(tmp_path)
    yield opened
    opened.disk.close()


def refused(number: int, *actions: Callable[[], object]) -> None:
    for action in actions:
        with pytest.raises(DiskError) as refusal:
            action()
        assert refusal.value.wire_errno == number


DATA = memoryview(b"\xaa" * 8)


def guest_requests(disk: SecondaryDisk) -> list[Callable[[], object]]:
    return [
        lambda: disk.guest_read(memoryview(bytearray(8)), 0),
        lambda: disk.guest_write(DATA, 0, False),
        lambda: disk.guest_zero(0, 8, True, False),
        disk.guest_flush,
        lambda: disk.guest_extents(0, 8),
    ]


def target_requests(disk: SecondaryDisk) -> list[Callable[[], object]]:
    return [
        lambda: disk.target_read(memoryview(bytearray(8)), 0),
        lambda: disk.target_write(DATA, 0, False),
        lambda: disk.target_zero(0, 8, True, False),
        disk.target_flush,
        lambda: disk.target_extents(0, 8),
    ]


def test_before_start_the_guest_is_refused_and_the_primary_writes_through(bench: Bench) -> None:
    refused(errno.EIO, *guest_requests(bench.disk))
    bench.disk.target_write(DATA, 0, False)
    assert bench.target() == bytes(DATA)
    assert bench.stack.descent.held_bytes() == 0


def test_while_running_each_face_has_its_own_view(bench: Bench) -> None:
    bench.disk.stage = Stage.RUNNING
    bench.disk.target_write(DATA, 0, False)
    assert (bench.guest(), bench.target()) == (b"\x11" * 8, bytes(DATA))
    bench.disk.guest_write(memoryview(b"g" * 8), 0, True)
    bench.disk.guest_zero(8, 8, True, True)
    assert (bench.guest(), bench.guest(8)) == (b"g" * 8, bytes(8))
    assert bench.target() == bytes(DATA)
    assert bench.target(8) == b"\x11" * 8


@pytest.mark.parametrize("stage", [Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE], ids=lambda stage: stage.value)
def test_from_failover_on_the_old_primary_is_shut_out_and_latches_nothing(bench: Bench, stage: Stage) -> None:
    bench.disk.stage = stage
    refused(errno.ESHUTDOWN, *target_requests(bench.disk))
    assert bench.faults.fault is None
    for request in guest_requests(bench.disk):
        request()


@pytest.mark.parametrize("stage", [Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE], ids=lambda stage: stage.value)
@pytest.mark.parametrize("kind", ["write", "zero"])
def test_a_forced_change_of_the_guest_is_stable_when_it_is_answered(bench: Bench, stage: Stage, kind: str) -> None:
    bench.disk.stage = stage
    bench.stack.committing = stage is not Stage.DONE
    if kind == "write":
        bench.disk.guest_write(DATA, 0, True)
    else:
        bench.disk.guest_zero(0, 8192, True, True)
    assert bench.raw.unstable == 0


@pytest.mark.parametrize("kind", ["write", "zero"])
def test_a_write_that_the_secondary_disk_refuses_is_latched_as_lost(bench: Bench, kind: str) -> None:
    bench.disk.stage = Stage.RUNNING
    bench.raw.broken = True
    refused(errno.EIO, target_requests(bench.disk)[1 if kind == "write" else 2])
    fault = bench.faults.fault
    assert fault is not None
    assert (fault.case, fault.operation) == (Case.SECONDARY_DISK, kind)
    assert bench.disk.lost.missing
    assert bench.failed == []
    assert bench.guest() == b"\x11" * 8


def test_when_copy_before_write_fails_the_write_fails_and_the_backup_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskError("full", errno.ENOSPC)

    bench.disk.stage = Stage.RUNNING
    monkeypatch.setattr(bench.stack.hidden.data, "write", full)
    refused(errno.ENOSPC, lambda: bench.disk.target_write(DATA, 0, False))
    fault = bench.faults.fault
    assert fault is not None
    assert fault.case == Case.COPY_BEFORE_WRITE
    assert bench.disk.lost.missing
    assert bench.failed == ["write"]
    assert bench.target() == bench.guest() == b"\x11" * 8


def test_once_the_backup_has_ended_nothing_is_overwritten(bench: Bench) -> None:
    bench.disk.stage = Stage.RUNNING
    bench.disk.accepts_writes = False
    refused(errno.EIO, *target_requests(bench.disk)[1:3])
    assert bench.target() == b"\x11" * 8
    assert bench.disk.lost.missing


def test_what_the_guest_meets_is_told_and_not_latched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise DiskError("broken")

    bench.disk.stage = Stage.RUNNING
    monkeypatch.setattr(bench.stack.active.data, "write", broken)
    refused(errno.EIO, lambda: bench.disk.guest_write(DATA, 0, False))
    monkeypatch.setattr(bench.raw, "read", broken)
    refused(errno.EIO, lambda: bench.guest(64 << 10))
    assert bench.faults.fault is None
    assert bench.told == [Case.ACTIVE_DISK, Case.SECONDARY_DISK]


def test_a_lost_write_is_repaired_when_all_of_it_was_written_anew(bench: Bench) -> None:
    bench.disk.stage = Stage.RUNNING
    bench.raw.broken = True
    refused(errno.EIO, lambda: bench.disk.target_write(DATA, GRAIN - 4, False))
    assert bench.disk.lost.marked_bytes == 2 * GRAIN
    bench.raw.broken = False
    grain = memoryview(bytes(GRAIN))
    bench.disk.target_write(grain[:-1], 0, False)
    assert bench.disk.lost.marked_bytes == 2 * GRAIN
    bench.disk.target_write(grain, 0, False)
    assert (bench.disk.lost.marked_bytes, bench.repairs) == (GRAIN, 0)
    bench.disk.target_zero(0, SIZE, True, False)
    assert (bench.disk.lost.marked_bytes, bench.repairs) == (0, 1)


def test_without_a_valid_checkpoint_the_guest_sees_nothing(bench: Bench) -> None:
    bench.disk.stage = Stage.RUNNING
    bench.disk.inconsistent = "the host was restarted"
    refused(errno.EIO, *guest_requests(bench.disk))
    bench.disk.stage = Stage.DONE
    for request in guest_requests(bench.disk):
        request()


def test_what_the_guest_changes_when_done_is_recorded(bench: Bench) -> None:
    bench.disk.stage = Stage.RUNNING
    bench.disk.guest_write(DATA, 0, False)
    assert not bench.disk.changes.missing
    bench.disk.stage = Stage.DONE
    bench.disk.guest_write(DATA, 0, False)
    bench.disk.guest_zero(3 * GRAIN, 1, True, False)
    assert list(bench.disk.changes.missing_ranges()) == [(0, GRAIN), (3 * GRAIN, GRAIN)]


def test_a_rollback_marks_what_the_overlays_hold_and_keeps_what_was_marked_before(bench: Bench) -> None:
    """At failover the disk becomes the last checkpoint plus the guest's writes: there it is another than the old
    primary's, and where it was another already it still is."""
    bench.disk.changes.mark(3 * GRAIN, 1)
    bench.disk.mark_rollback()
    assert list(bench.disk.changes.missing_ranges()) == [(3 * GRAIN, GRAIN)]
    bench.disk.stage = Stage.RUNNING
    bench.disk.guest_write(DATA, 4096, False)
    bench.disk.target_write(DATA, 2 * GRAIN - 8, False)
    assert list(bench.disk.changes.missing_ranges()) == [(3 * GRAIN, GRAIN)], "while it runs nothing is marked"
    bench.disk.mark_rollback()
    assert list(bench.disk.changes.missing_ranges()) == [(0, 2 * GRAIN), (3 * GRAIN, GRAIN)]


@pytest.fixture
def shared(bench: Bench) -> Bench:
    """A disk of a node whose content another one has."""
    bench.ancestry.become(lambda lineage: lineage.paired_as_equal("00000000000000aa"))
    return bench


@pytest.mark.parametrize("kind", ["write", "zero"])
def test_the_guest_of_a_running_secondary_does_not_part_the_nodes(shared: Bench, kind: str) -> None:
    shared.disk.stage = Stage.RUNNING
    guest_requests(shared.disk)[1 if kind == "write" else 2]()
    shared.disk.target_write(DATA, 0, False)
    assert shared.ancestry.lineage.current == "00000000000000aa"


@pytest.mark.parametrize("stage", [Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE], ids=lambda stage: stage.value)
@pytest.mark.parametrize("kind", ["write", "zero"])
def test_a_guest_that_owns_the_disk_parts_the_nodes_before_the_disk_changes(
    shared: Bench, monkeypatch: pytest.MonkeyPatch, stage: Stage, kind: str
) -> None:
    seen: list[tuple[str, bool]] = []
    for name in ("write", "zero"):
        real = getattr(shared.raw, name)

        def change(*arguments: object, real: Callable[..., None] = real) -> None:
            seen.append((shared.state.moved_to, shared.disk.changes.missing))
            real(*arguments)

        monkeypatch.setattr(shared.raw, name, change)
    shared.disk.stage = stage
    guest_requests(shared.disk)[1 if kind == "write" else 2]()
    lineage = shared.ancestry.lineage
    assert (lineage.base, lineage.shared) == ("00000000000000aa", False)
    assert set(seen) == {(lineage.current, True)}


@pytest.mark.parametrize("how", ["flush", "write", "zero"])
def test_what_the_guest_wants_stable_has_its_generation_on_stable_storage(
    shared: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(shared.state, "flush_page", lambda: flushed.append(shared.state.moved_to))
    shared.disk.stage = Stage.DONE
    shared.disk.guest_write(DATA, 0, False)
    assert flushed == []
    if how == "flush":
        shared.disk.guest_flush()
    elif how == "write":
        shared.disk.guest_write(DATA, 0, True)
    else:
        shared.disk.guest_zero(0, 8, True, True)
    assert flushed == [shared.ancestry.lineage.current]


# -- many target writes at once ------------------------------------------------------------------------------------


def many(*offsets: int) -> list[tuple[int, memoryview]]:
    return [(offset, DATA) for offset in offsets]


@pytest.mark.parametrize("stage", [Stage.NONE, Stage.RUNNING], ids=lambda stage: stage.value)
def test_many_target_writes_do_what_single_ones_do(bench: Bench, stage: Stage) -> None:
    bench.disk.stage = stage
    bench.disk.target_write_batch(many(0, 8, 100_000))
    assert bench.target(0) == bench.target(8) == bench.target(100_000) == bytes(DATA)
    assert bench.disk.totals["target-written"] == 24
    assert bench.stack.hidden.holds_any(0, 1) == (stage is Stage.RUNNING)
    assert not bench.disk.changes.missing


@pytest.mark.parametrize("stage", [Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE], ids=lambda stage: stage.value)
def test_many_writes_of_an_old_primary_are_kept_out_together(bench: Bench, stage: Stage) -> None:
    bench.disk.stage = stage
    refused(errno.ESHUTDOWN, lambda: bench.disk.target_write_batch(many(0, 8)))
    data = bytearray(8)
    bench.raw.read(memoryview(data), 0)
    assert data == b"\x11" * 8


def test_what_fails_of_many_target_writes_is_latched_and_counted_like_single_ones(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.disk.stage = Stage.RUNNING
    real = bench.raw.write

    def write(pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        if offset == 2 * GRAIN:
            raise DiskError("broken", errno.ENOSPC)
        real(pieces, offset, fua)

    monkeypatch.setattr(bench.raw, "write", write)
    refused(errno.ENOSPC, lambda: bench.disk.target_write_batch(many(0, 2 * GRAIN, GRAIN)))
    assert bench.target() == bench.target(GRAIN) == bytes(DATA), "the others are done all the same"
    assert bench.told == [4]
    assert bench.failed == []
    assert list(bench.disk.lost.missing_ranges()) == [(2 * GRAIN, GRAIN)]
    assert bench.disk.totals["target-written"] == 16
    monkeypatch.undo()
    whole = memoryview(bytes(GRAIN))
    bench.disk.target_write_batch([(2 * GRAIN, whole), (0, DATA)])
    assert bench.repairs == 1


def test_when_copy_before_write_fails_for_many_target_writes_the_backup_learns_of_each(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.disk.stage = Stage.RUNNING

    def write(pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        raise DiskError("full", errno.EIO)

    monkeypatch.setattr(bench.stack.hidden.data, "write", write)
    refused(errno.EIO, lambda: bench.disk.target_write_batch(many(0, GRAIN)))
    assert bench.failed == ["write", "write"]
    assert list(bench.disk.lost.missing_ranges()) == [(0, 2 * GRAIN)]


def test_after_copy_before_write_has_ended_many_target_writes_are_refused_and_noted(bench: Bench) -> None:
    bench.disk.stage = Stage.RUNNING
    bench.disk.accepts_writes = False
    refused(errno.EIO, lambda: bench.disk.target_write_batch(many(0, 2 * GRAIN)))
    assert list(bench.disk.lost.missing_ranges()) == [(0, GRAIN), (2 * GRAIN, GRAIN)]
    assert bench.told == [3]


def test_many_writes_of_a_stranger_are_noted_as_changes(bench: Bench) -> None:
    for stage in (Stage.NONE, Stage.RUNNING):
        bench.disk.changes.clear()
        bench.disk.stage = stage
        bench.disk.from_stranger = lambda: True
        bench.disk.target_write_batch(many(0, 2 * GRAIN))
        assert list(bench.disk.changes.missing_ranges()) == [(0, GRAIN), (2 * GRAIN, GRAIN)]


def test_a_disk_that_is_slow_refuses_batches_for_a_while_and_takes_single_writes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.disk.stage = Stage.RUNNING
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(secondary_disk, "time", clock)
    real, lasts_s = bench.raw.write, 0.0

    def write(pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        clock.now += lasts_s
        real(pieces, offset, fua)

    monkeypatch.setattr(bench.raw, "write", write)
    batch = many(0, GRAIN, 2 * GRAIN, 3 * GRAIN)

    def is_refused_after(seconds: Sequence[float]) -> bool:
        nonlocal lasts_s
        for each_s in seconds:
            lasts_s = each_s
            bench.disk.target_write_batch(batch)
        try:
            bench.disk.target_write_batch(batch)
        except DiskError as error:
            return error.errno == errno.EBUSY
        return False

    slow, quick = 2 * secondary_disk.SLOW_S, secondary_disk.SLOW_S / 2
    assert not is_refused_after([slow, slow, quick, slow])
    assert is_refused_after([slow])
    bench.disk.target_write(memoryview(DATA), 0, False)
    assert bench.told == [], "nobody is told: nothing has failed"
    clock.now += secondary_disk.SLOW_AGAIN_S
    lasts_s = quick
    assert not is_refused_after([quick])


def test_what_the_disk_has_lost_counts_before_any_test_hears_of_it(bench: Bench) -> None:
    """So that a test which begins meanwhile is told as well, or finds that there is no checkpoint."""
    heard: list[tuple[bool, list[str]]] = []
    reasons: list[str] = []

    class Test:
        def lose(self, offset: int, length: int, _error: DiskError) -> None:
            assert (offset, length) == (0, GRAIN)
            heard.append((bench.disk.lost.missing > 0, list(reasons)))

    def lost(why: str) -> bool:
        reasons.append(why)
        return True

    bench.disk.stage = Stage.RUNNING
    bench.disk.checkpoint_lost = lost
    bench.stack.room.tests = (cast("Frozen", Test()),)
    whole = [(0, GRAIN)]
    bench.disk._lose(Loss(whole, whole, DiskError("gone"), told=True))
    assert heard == [(True, ["disk 'disk0' has lost what was not flushed: gone"])]
