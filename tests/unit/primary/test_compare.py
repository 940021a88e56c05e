# SPDX-License-Identifier: BSD-3-Clause
"""What a comparison makes of answers, of none, and of those that do not count. The disk is one that answers as it is
told to, at once; the place of a question in the stream is what tests/e2e/test_verify.py has."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, cast

import pytest

from content import KIB, MIB, pattern
from replication.digests import ASK_MAX, DIGEST_BYTES, RANGE, digests
from replication.errors import DiskError
from replication.primary import compare
from replication.primary.backlog import Entry
from replication.primary.compare import LOOKS, Comparison, Ended
from replication.primary.disk import Checked, PrimaryDisk
from replication.primary.pace import Pace
from replication.record.changes import ChangeMap
from waiting import DEADLINE_S, begin, wait_until

GRAIN = 64 * KIB
SIZE = 3 * MIB + 100

Act = Callable[[Entry], Checked | None]


@pytest.fixture(autouse=True)
def _again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_AGAIN_S", 0.0)


class FakeDisk:
    """`mine` here, `theirs` there; before each question `act(entry)` may do something, and say what becomes of it."""

    name = "disk0"

    def __init__(self, size: int = SIZE, zeroes: bool = False) -> None:
        self.size = size
        self.mine = bytearray(size) if zeroes else bytearray(pattern(1, size))
        self.theirs = bytearray(self.mine)
        self.changes = ChangeMap(None, size)
        self.local = self
        self.zeroes = zeroes
        self.asked: list[tuple[int, int]] = []
        self.act: Act = lambda _entry: None
        self.error: DiskError | None = None

    def hole(self, _offset: int, length: int) -> int:
        return length if self.zeroes else 0

    def check(self, entry: Entry, content: memoryview | None) -> Checked:
        self.asked.append((entry.offset, entry.length))
        stop = entry.offset + entry.length
        entry.marks = self.changes.marks
        if self.changes.lacks(entry.offset, entry.length):
            return Checked.LACKING
        if self.error is not None:
            raise self.error
        if content is not None:
            content[:] = self.mine[entry.offset : stop]
        result = self.act(entry)
        if result is not None:
            return result
        assert entry.answer is not None
        unit = RANGE if len(entry.answer) == -(-entry.length // RANGE) * DIGEST_BYTES else GRAIN
        entry.answer[:] = digests(memoryview(self.theirs)[entry.offset : stop], unit)
        entry.end(not entry.refusal)
        return Checked.QUEUED

    def spoil(self, offset: int) -> None:
        self.theirs[offset] ^= 1


class Bench:
    def __init__(self, disk: FakeDisk, wait_s: float = DEADLINE_S, offset: int = 0) -> None:
        self.found: list[tuple[int, int]] = []
        self.obstacle: str | None = None
        self.absence: str | None = None
        self.comparison = Comparison(
            cast("PrimaryDisk", disk),
            offset,
            Pace(None),
            lambda: self.obstacle,
            lambda: self.absence,
            lambda _disk, at, length: self.found.append((at, length)),
            wait_s,
        )

    def run(self) -> Comparison:
        self.comparison.run()
        return self.comparison


def test_equal_disks() -> None:
    disk = FakeDisk()
    done = Bench(disk).run()
    assert (done.compared, done.left_out, done.position) == (SIZE, 0, SIZE)
    assert disk.asked == [(0, MIB), (MIB, MIB), (2 * MIB, MIB), (3 * MIB, 100)]


def test_what_differs_is_found_by_the_grain() -> None:
    disk = FakeDisk()
    for at in (0, MIB - 1, MIB + 5 * GRAIN, SIZE - 1):
        disk.spoil(at)
    bench = Bench(disk)
    done = bench.run()
    assert sorted(bench.found) == [(0, GRAIN), (MIB - GRAIN, GRAIN), (MIB + 5 * GRAIN, GRAIN), (3 * MIB, 100)]
    assert (done.compared, done.left_out) == (SIZE, 0)


def test_it_begins_where_a_former_process_has_ended() -> None:
    disk = FakeDisk()
    assert Bench(disk, offset=2 * MIB).run().compared == MIB + 100
    assert disk.asked[0] == (2 * MIB, MIB)


# -- answers that do not count -----------------------------------------------------------------------------------------


def test_a_difference_does_not_count_while_anything_becomes_missing_and_is_looked_at_again() -> None:
    """A write in front of the question was refused, and a resync sends it behind the question: that is no finding."""
    disk, bench = FakeDisk(), None
    disk.spoil(5)

    def refused(_entry: Entry) -> None:
        if len(disk.asked) == 1:
            disk.changes.mark(2 * MIB, 1)  # elsewhere, and mended at once
            disk.changes.repaired(2 * MIB, GRAIN)
        else:
            disk.theirs[:] = disk.mine

    disk.act = refused
    bench = Bench(disk)
    done = bench.run()
    assert (bench.found, done.compared, done.left_out) == ([], SIZE, 0)
    assert disk.asked.count((0, MIB)) == 2


@pytest.mark.parametrize("closer", [False, True], ids=["ranges", "grains"])
def test_what_never_counts_is_left_out_in_the_end(closer: bool) -> None:
    disk = FakeDisk()
    disk.spoil(MIB + 5)

    def refused(entry: Entry) -> None:
        assert entry.answer is not None
        if entry.offset == MIB and (not closer or len(entry.answer) > DIGEST_BYTES):
            disk.changes.mark(0, 1)
            disk.changes.repaired(0, GRAIN)

    disk.act = refused
    bench = Bench(disk)
    done = bench.run()
    assert (bench.found, done.compared, done.left_out) == ([], SIZE - MIB, MIB)
    assert disk.asked.count((MIB, MIB)) == (2 if closer else 1) * LOOKS
    assert "missing something meanwhile" in str(done.reason)


def test_what_was_found_is_no_reason_to_doubt_what_is_found_elsewhere() -> None:
    disk = FakeDisk()
    for at in range(0, SIZE, GRAIN):
        disk.spoil(at)
    bench = Bench(disk)
    found = bench.found

    def note(_disk: Any, offset: int, length: int) -> None:
        found.append((offset, length))
        disk.changes.mark(offset, length, found=True)

    bench.comparison._found = note
    bench.run()
    assert sum(length for _, length in found) == SIZE
    assert bench.comparison.left_out == 0


def test_equality_counts_whatever_becomes_missing() -> None:
    disk = FakeDisk()

    def refused(_entry: Entry) -> None:
        disk.changes.mark(0, 1)
        disk.changes.repaired(0, GRAIN)

    disk.act = refused
    assert Bench(disk).run().compared == SIZE
    assert len(disk.asked) == 4


def test_what_the_guest_has_overwritten_between_the_two_looks_is_found_as_a_whole() -> None:
    disk = FakeDisk()
    disk.spoil(MIB + 5)

    def overwritten(entry: Entry) -> None:
        if disk.asked.count((entry.offset, entry.length)) == 2:
            disk.theirs[:] = disk.mine

    disk.act = overwritten
    bench = Bench(disk)
    bench.run()
    assert bench.found == [(MIB, MIB)]


# -- what cannot be asked ----------------------------------------------------------------------------------------------


def test_what_is_known_to_be_missing_waits_for_the_resync() -> None:
    disk = FakeDisk()
    disk.spoil(MIB + 5)
    disk.changes.mark(MIB, MIB)
    bench = Bench(disk)
    running = begin(bench.run)
    wait_until(lambda: bench.comparison.waits_for == "a resync is under way", "it waits")
    assert not running.done()
    disk.theirs[:] = disk.mine
    disk.changes.repaired(MIB, MIB)
    done = running.result(DEADLINE_S)
    assert (bench.found, done.compared, done.left_out) == ([], SIZE, 0)


def test_a_resync_that_does_not_get_on_is_not_waited_for() -> None:
    disk = FakeDisk()
    disk.changes.mark(MIB, 1)
    done = Bench(disk, wait_s=0.05).run()
    assert (done.compared, done.left_out) == (SIZE - MIB, MIB)
    assert "lacks something" in str(done.reason)


def test_what_the_secondary_cannot_read_is_left_out() -> None:
    disk = FakeDisk()

    def refuse(entry: Entry) -> None:
        entry.refusal = errno.EIO if entry.offset == MIB else 0

    disk.act = refuse
    bench = Bench(disk)
    done = bench.run()
    assert (bench.found, done.left_out) == ([], MIB)
    assert str(done.reason) == "the secondary answers: Input/output error"
    assert disk.asked.count((MIB, MIB)) == LOOKS


def test_what_the_local_disk_cannot_read_is_left_out() -> None:
    disk = FakeDisk()
    disk.error = DiskError("broken")
    done = Bench(disk).run()
    assert (done.compared, done.left_out) == (0, SIZE)
    assert str(done.reason) == "disk 'disk0' cannot be read: broken"


def test_a_question_that_was_not_sent_is_asked_again() -> None:
    disk = FakeDisk()

    def unsent(entry: Entry) -> Checked | None:
        if len(disk.asked) > 1:
            return None
        entry.end(False)
        return Checked.UNSENT

    disk.act = unsent
    assert Bench(disk).run().compared == SIZE


def test_a_question_that_the_link_has_lost_is_asked_again() -> None:
    disk = FakeDisk()

    def lost(entry: Entry) -> Checked | None:
        if len(disk.asked) > 1:
            return None
        entry.end(False)
        return Checked.QUEUED

    disk.act = lost
    bench = Bench(disk)
    assert bench.run().compared == SIZE
    assert bench.found == []


def test_without_a_link_it_waits_and_gives_up_in_the_end() -> None:
    disk = FakeDisk()
    bench = Bench(disk, wait_s=0.05)
    bench.absence = "the link is not up"
    with pytest.raises(Ended, match=r"the link is not up, for 0\.05 s"):
        bench.run()
    assert disk.asked == []


def test_an_obstacle_ends_it() -> None:
    bench = Bench(FakeDisk())
    bench.obstacle = "replication was stopped"
    with pytest.raises(Ended, match="replication was stopped"):
        bench.run()


# -- zeroes ------------------------------------------------------------------------------------------------------------


def test_known_zeroes_are_asked_of_in_larger_and_larger_parts() -> None:
    disk = FakeDisk(200 * MIB, zeroes=True)
    disk.spoil(150 * MIB)
    bench = Bench(disk)
    done = bench.run()
    lengths = [length for _, length in disk.asked]
    assert lengths[:2] == [RANGE, 2 * RANGE]
    assert max(lengths) == ASK_MAX
    assert bench.found == [(150 * MIB, GRAIN)]
    assert done.compared == 200 * MIB


def test_after_a_slow_answer_the_parts_are_small_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_QUICK_S", -1.0)
    monkeypatch.setattr(compare, "_SLOW_S", -1.0)
    disk = FakeDisk(8 * MIB, zeroes=True)
    bench = Bench(disk)
    bench.comparison._zeroes_max = 4 * RANGE
    bench.run()
    assert [length // MIB for _, length in disk.asked] == [4, 1, 1, 1, 1]


def test_zeroes_that_were_written_to_meanwhile_are_read() -> None:
    disk = FakeDisk(4 * MIB, zeroes=True)

    def written(entry: Entry) -> Checked | None:
        return Checked.WRITTEN if len(disk.asked) == 1 else None

    disk.act = written
    assert Bench(disk).run().compared == 4 * MIB
    assert disk.asked[:2] == [(0, MIB), (0, MIB)]


def test_too_many_parts_to_be_looked_at_again_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "AGAIN_MAX", 2)
    disk = FakeDisk(8 * MIB)
    disk.changes.mark(0, 1)
    disk.changes.mark(2 * MIB, 1)
    disk.changes.mark(4 * MIB, 1)
    done = Bench(disk, wait_s=0.02).run()
    assert done.left_out == 5 * MIB


def test_the_position_is_never_beyond_what_is_not_known() -> None:
    disk = FakeDisk()
    disk.changes.mark(MIB, 1)
    bench = Bench(disk)
    seen: list[int] = []
    disk.act = lambda _entry: seen.append(bench.comparison.position)
    running = begin(bench.run)
    wait_until(lambda: bench.comparison.waits_for, "it waits")
    assert bench.comparison.position == MIB
    disk.changes.repaired(MIB, MIB)
    running.result(DEADLINE_S)
    assert seen == sorted(seen)
    assert max(seen) <= MIB
    assert bench.comparison.position == SIZE
