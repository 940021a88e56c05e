# SPDX-License-Identifier: BSD-3-Clause
"""changes.py: whatever becomes of writes in flight, the map knows every grain in which the secondary may differ."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replication.disk import files, mapped
from replication.errors import ConfigError, DiskError
from replication.record import changes as changes_module
from replication.record.changes import ARRIVED, CLEAN, GRAIN, MISSING, ON_ITS_WAY, RUN_MAX, ChangeMap
from replication.record.grainfile import Found, GrainFile, Seal

BLOCK = 16 << 10
BLOCKS_PER_GRAIN = GRAIN // BLOCK
GRAINS = 5
SIZE = GRAINS * GRAIN - BLOCK - 100
"""The last grain is short, and ends within a block of the model."""
BLOCKS = -(-SIZE // BLOCK)


def opened(path: Path, size: int) -> ChangeMap:
    """The map in a file, which is believed if there is one of that size."""
    file = GrainFile(str(path), -(-size // GRAIN))
    believed = isinstance(file.found, Seal) or file.found is Found.BARE
    file.map(None if believed else CLEAN if file.found is Found.NOTHING else MISSING)
    return ChangeMap(file, size)


@dataclass
class Sent:
    """An entry on its way: the versions of its blocks at the time of sending."""

    offset: int
    length: int
    versions: dict[int, int] = field(default_factory=dict)

    def overlaps(self, other: Sent) -> bool:
        return not self.versions.keys().isdisjoint(other.versions)


class Replication(RuleBasedStateMachine):
    """Two disks as version numbers of blocks, the queue between them, and kills of the primary."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="changes-"))
        self.serial = 0
        self.local = [0] * BLOCKS
        self.remote = [0] * BLOCKS
        self.queue: list[Sent] = []
        self.spoiled: set[int] = set()
        """Grains of which something was marked or failed since the disks were equal."""

    @initialize()
    def open(self) -> None:
        self.path = self.folder / "0"
        self.map = opened(self.path, SIZE)

    def teardown(self) -> None:
        self.map.close()
        shutil.rmtree(self.folder)

    def change(self, blocks: range) -> Sent:
        """The local disk gets new content; what of it would be sent now."""
        for block in blocks:
            self.serial += 1
            self.local[block] = self.serial
        offset = blocks.start * BLOCK
        return Sent(offset, min(blocks.stop * BLOCK, SIZE) - offset, {block: self.local[block] for block in blocks})

    @staticmethod
    def grains(sent: Sent) -> set[int]:
        return {block // BLOCKS_PER_GRAIN for block in sent.versions}

    @rule(start=st.integers(0, BLOCKS - 1), count=st.integers(1, 9))
    def write(self, start: int, count: int) -> None:
        sent = self.change(range(start, min(start + count, BLOCKS)))
        self.map.begin(sent.offset, sent.length)
        self.queue.append(sent)

    @rule(start=st.integers(0, BLOCKS - 1), count=st.integers(1, 9))
    def write_that_is_not_sent(self, start: int, count: int) -> None:
        sent = self.change(range(start, min(start + count, BLOCKS)))
        self.map.mark(sent.offset, sent.length)
        self.spoiled |= self.grains(sent)

    @rule()
    def resync(self) -> None:
        """Send everything missing, as it is now."""
        for offset, length in list(self.map.missing_ranges()):
            blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
            self.map.watch(offset, length)
            self.map.begin(offset, length, repair=True)
            self.queue.append(Sent(offset, length, {block: self.local[block] for block in blocks}))

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), arrived=st.booleans())
    def answer(self, data: st.DataObject, arrived: bool) -> None:
        """Of overlapping entries the first sent ends first, as the forwarder has it."""
        free = [
            number
            for number, sent in enumerate(self.queue)
            if not any(sent.overlaps(earlier) for earlier in self.queue[:number])
        ]
        self.end(self.queue.pop(data.draw(st.sampled_from(free))), arrived)

    def end(self, sent: Sent, arrived: bool) -> None:
        if arrived:
            for block, version in sent.versions.items():
                self.remote[block] = version
        else:
            self.spoiled |= self.grains(sent)
        self.map.end(sent.offset, sent.length, arrived)

    @rule()
    def lose_the_link(self) -> None:
        while self.queue:
            self.end(self.queue.pop(0), False)

    @rule(arrive=st.booleans())
    def be_killed(self, arrive: bool) -> None:
        """The next process finds the file as it is at this moment; nobody tells it what arrived."""
        for sent in self.queue:
            self.spoiled |= self.grains(sent)
            if arrive:
                for block, version in sent.versions.items():
                    self.remote[block] = version
        self.queue.clear()
        copy = self.folder / f"{int(self.path.name) + 1}"
        shutil.copy(self.path, copy)  # instead of closing it, which a killed process does not do
        self.map.close()
        self.path = copy
        self.map = opened(copy, SIZE)

    @rule()
    def take_the_disks_as_equal(self) -> None:
        self.lose_the_link()
        self.map.clear()
        self.remote = list(self.local)
        self.spoiled.clear()

    @invariant()
    def every_difference_is_known(self) -> None:
        states = self.map._grain_states
        on_its_way = set().union(*map(self.grains, self.queue))
        missing: set[int] = set()
        for offset, length in self.map.missing_ranges():
            assert 0 < length <= RUN_MAX
            assert offset + length <= SIZE
            missing.update(range(offset // GRAIN, -(-(offset + length) // GRAIN)))
        for block in range(BLOCKS):
            grain = block // BLOCKS_PER_GRAIN
            if self.local[block] != self.remote[block]:
                assert grain in missing | on_its_way
                assert states[grain] != CLEAN
        for grain in range(GRAINS):
            assert (states[grain] == MISSING) == (grain in missing)
            if states[grain] == ON_ITS_WAY:
                assert grain in on_its_way
            if grain not in self.spoiled | on_its_way:
                assert states[grain] == CLEAN, "sent again for nothing"

    @invariant()
    def the_counters_are_those_of_the_map(self) -> None:
        states = list(self.map._grain_states)
        assert self.map.missing == (MISSING in states)
        assert self.map.marked_bytes == min(GRAIN * sum(state != CLEAN for state in states), SIZE)


Replication.TestCase.settings = settings(max_examples=120, stateful_step_count=30)
TestReplication = Replication.TestCase


class Shared(Replication):
    """The same where a copy of the file may share its blocks, and at times there is no room for others."""

    def __init__(self) -> None:
        super().__init__()
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(mapped, "_IN_PLACE", frozenset())
        self.full = False
        real = files.pwritev

        def pwritev(fd: int, *arguments: Any) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, *arguments)

        self.patched.setattr(files, "pwritev", pwritev)

    def teardown(self) -> None:
        super().teardown()
        self.patched.undo()

    @rule()
    def fill_up(self) -> None:
        self.full = True

    @rule()
    def make_room(self) -> None:
        self.full = False
        self.map.settle()

    @rule(arrive=st.booleans())
    def be_killed(self, arrive: bool) -> None:
        self.full = False
        distrusted = self.map._distrusted
        if distrusted:
            shutil.copy(f"{self.path}.distrusted", f"{self.folder / str(int(self.path.name) + 1)}.distrusted")
            self.path.touch()  # so that there is something to copy
            self.spoiled = set(range(GRAINS))
        super().be_killed(arrive)
        if distrusted:
            assert list(self.map._grain_states) == [MISSING] * GRAINS, "nothing is taken for equal"


Shared.TestCase.settings = settings(max_examples=120, stateful_step_count=30)
TestShared = Shared.TestCase


def test_a_map_that_was_removed_while_in_use_is_noticed(tmp_path: Path) -> None:
    kept = opened(tmp_path / "m", SIZE)
    kept.settle()
    (tmp_path / "m").unlink()
    with pytest.raises(DiskError, match="m was removed or replaced while in use"):
        kept.settle()
    kept.close()


def test_a_map_has_blocks_for_all_of_it_also_where_a_copy_of_the_folder_had_holes(tmp_path: Path) -> None:
    path = tmp_path / "m"
    size = 1 << 40
    with open(path, "wb") as file:
        file.truncate(size // GRAIN)
    opened(path, size).close()
    assert path.stat().st_blocks * 512 >= size // GRAIN


def test_a_write_that_arrived_leaves_nothing_behind() -> None:
    changes = ChangeMap(None, SIZE)
    changes.begin(GRAIN - 1, 2)
    assert changes.marked_bytes == 2 * GRAIN
    assert not changes.missing
    changes.end(GRAIN - 1, 2, True)
    assert changes.marked_bytes == 0
    changes.close()


def test_a_write_on_its_way_is_missing_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "disk0.changes"
    killed = opened(path, SIZE)
    killed.begin(3 * GRAIN + 5, 1)
    following = opened(path, SIZE)
    assert list(following.missing_ranges()) == [(3 * GRAIN, GRAIN)]
    following.close()
    killed.close()


def test_missing_ranges_end_at_the_disks_end_and_are_cut_to_runs() -> None:
    size = 2 * RUN_MAX + 5 * GRAIN + 1
    changes = ChangeMap(None, size)
    changes.mark(GRAIN, size - GRAIN)
    ranges = list(changes.missing_ranges())
    assert ranges == [(GRAIN, RUN_MAX), (GRAIN + RUN_MAX, RUN_MAX), (GRAIN + 2 * RUN_MAX, 4 * GRAIN + 1)]
    changes.close()


def test_runs_that_cross_the_step_of_the_scan_are_all_there() -> None:
    step = changes_module._SCAN_STEP
    changes = ChangeMap(None, (2 * step + 3) * GRAIN)
    changes.mark((step - 2) * GRAIN, 4 * GRAIN)
    changes.mark((2 * step + 1) * GRAIN, 1)
    covered = [(offset // GRAIN, length // GRAIN) for offset, length in changes.missing_ranges()]
    assert covered == [(step - 2, 2), (step, 2), (2 * step + 1, 1)]
    assert changes.ranges_marked(0, 9) == (
        [[(step - 2) * GRAIN, 4 * GRAIN], [(2 * step + 1) * GRAIN, GRAIN]],
        None,
    ), "and for the other side they are one"
    changes.close()


# -- the map for the other side --------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    marked=st.lists(st.sampled_from([CLEAN, ON_ITS_WAY, MISSING]), min_size=1, max_size=24),
    short=st.integers(0, GRAIN - 1),
    limit=st.integers(1, 5),
    start=st.integers(0, 24 * GRAIN),
)
def test_a_map_in_bounded_messages_is_the_whole_map(marked: list[int], short: int, limit: int, start: int) -> None:
    size = len(marked) * GRAIN - short
    changes = ChangeMap(None, size)
    for grain, state in enumerate(marked):
        if state == MISSING:
            changes.mark(grain * GRAIN, 1)
        elif state == ON_ITS_WAY:
            changes.begin(grain * GRAIN, 1)
    at: int | None = start
    told: list[list[int]] = []
    while at is not None:
        found, following = changes.ranges_marked(at, limit)
        assert len(found) <= limit
        assert following is None or following > at, "every message goes on"
        assert following is None or len(found) == limit
        told += found
        at = following
    assert all(offset % GRAIN == 0 and 0 < length <= size - offset for offset, length in told)
    covered = {byte // GRAIN for offset, length in told for byte in range(offset, offset + length, GRAIN)}
    assert covered == {grain for grain, state in enumerate(marked) if state != CLEAN and grain >= start // GRAIN}
    other = ChangeMap(None, size)
    other.mark_ranges(told)
    assert states(other) == [MISSING if grain in covered else CLEAN for grain in range(len(marked))]
    changes.close()
    other.close()


def test_a_map_of_which_nothing_is_marked_needs_one_message() -> None:
    changes = ChangeMap(None, SIZE)
    assert changes.ranges_marked(0, 1) == ([], None)
    assert changes.ranges_marked(SIZE, 1) == ([], None)
    changes.close()


@pytest.mark.parametrize(
    "bad",
    [[-1, 5], [0, 0], [0, -1], [0, SIZE + 1], [SIZE, 1], [SIZE - 1, 2], [0], [0, 1, 2], [0.0, 1], [True, 1], [0, "1"]],
    ids=str,
)
def test_ranges_that_are_not_of_the_disk_are_refused_all_together(bad: list[Any]) -> None:
    changes = ChangeMap(None, SIZE)
    with pytest.raises(ValueError, match="not a range of a disk of"):
        changes.mark_ranges([[0, 5], bad])
    assert states(changes) == [CLEAN] * GRAINS
    changes.mark_ranges([[GRAIN - 1, 2], [SIZE - 1, 1]])
    assert states(changes) == [MISSING, MISSING, CLEAN, CLEAN, MISSING]
    changes.close()


# -- repair -----------------------------------------------------------------------------------------------------------


def test_what_is_marked_while_a_repair_is_read_stays_missing() -> None:
    changes = ChangeMap(None, SIZE)
    changes.mark_all()
    changes.watch(0, 2 * GRAIN)
    changes.mark(2 * GRAIN, 5)  # beside it
    changes.begin(0, GRAIN, repair=True)
    assert states(changes)[:3] == [ON_ITS_WAY, MISSING, MISSING]
    changes.mark(GRAIN, 5)
    changes.begin(GRAIN, GRAIN, repair=True)
    changes.end(0, GRAIN, True)
    changes.end(GRAIN, GRAIN, True)
    assert states(changes) == [CLEAN, MISSING, MISSING, MISSING, MISSING]
    # Read once more, it is repaired.
    changes.watch(GRAIN, GRAIN)
    changes.begin(GRAIN, GRAIN, repair=True)
    changes.end(GRAIN, GRAIN, True)
    assert states(changes)[1] == CLEAN
    changes.close()


def test_a_mark_after_the_beginning_of_a_repair_outlives_it() -> None:
    changes = ChangeMap(None, SIZE)
    changes.mark(0, 1)
    changes.watch(0, GRAIN)
    changes.begin(0, GRAIN, repair=True)
    changes.mark(0, 1)
    changes.end(0, GRAIN, True)
    assert states(changes)[0] == MISSING
    changes.close()


def test_everything_is_missing_also_what_is_in_flight() -> None:
    changes = ChangeMap(None, SIZE)
    changes.begin(0, 2 * GRAIN)
    changes.watch(3 * GRAIN, GRAIN)
    changes.mark_all()
    changes.begin(3 * GRAIN, GRAIN, repair=True)
    changes.end(3 * GRAIN, GRAIN, True)
    changes.end(0, 2 * GRAIN, True)
    assert states(changes) == [MISSING] * GRAINS
    assert changes.missing_bytes == SIZE
    changes.close()


def test_a_repair_that_was_not_watched_repairs_nothing() -> None:
    changes = ChangeMap(None, SIZE)
    changes.mark_all()
    changes.watch(0, GRAIN)
    changes.begin(0, 2 * GRAIN, repair=True)
    changes.end(0, 2 * GRAIN, True)
    assert states(changes) == [MISSING] * GRAINS
    changes.close()


@pytest.mark.parametrize(("grain", "missing"), [(0, GRAIN), (GRAINS - 1, SIZE - (GRAINS - 1) * GRAIN)])
def test_missing_bytes_are_exact_at_the_disks_end(grain: int, missing: int) -> None:
    changes = ChangeMap(None, SIZE)
    assert changes.missing_bytes == 0
    changes.mark(grain * GRAIN, 1)
    assert changes.missing_bytes == missing
    changes.mark_all()
    assert changes.missing_bytes == SIZE
    changes.clear()
    changes.begin(grain * GRAIN, 1)
    assert changes.missing_bytes == 0
    changes.close()


def test_a_map_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot use the change map .*: No such file or directory"):
        opened(tmp_path / "nowhere" / "x", SIZE)


def states(changes: ChangeMap) -> list[int]:
    return list(changes._grain_states)


def test_everything_is_missing_when_nothing_is_known(tmp_path: Path) -> None:
    path = tmp_path / "disk0.changes"
    changes = opened(path, SIZE)
    changes.mark(0, 1)
    changes.mark_all()
    assert list(changes.missing_ranges()) == [(0, SIZE)]
    assert (changes.missing, changes.marked_bytes) == (True, SIZE)
    changes.close()
    after = opened(path, SIZE)
    assert list(after.missing_ranges()) == [(0, SIZE)]
    after.clear()
    assert (after.missing, after.marked_bytes, list(after.missing_ranges())) == (False, 0, [])
    after.close()


@pytest.mark.parametrize(
    ("offset", "length", "repaired"),
    [
        (0, SIZE, range(GRAINS)),
        (0, GRAIN, [0]),
        (0, GRAIN - 1, []),
        (1, GRAIN, []),
        (1, 2 * GRAIN - 1, [1]),
        (GRAIN - 1, GRAIN + 1, [1]),
        (GRAIN, 2 * GRAIN + 5, [1, 2]),
        ((GRAINS - 1) * GRAIN, SIZE - (GRAINS - 1) * GRAIN, [GRAINS - 1]),
        ((GRAINS - 1) * GRAIN, SIZE - (GRAINS - 1) * GRAIN - 1, []),
        ((GRAINS - 1) * GRAIN + 1, SIZE - (GRAINS - 1) * GRAIN - 1, []),
        ((GRAINS - 2) * GRAIN + 1, SIZE - (GRAINS - 2) * GRAIN - 1, [GRAINS - 1]),
    ],
)
def test_only_grains_that_were_written_as_a_whole_are_repaired(
    offset: int, length: int, repaired: Sequence[int]
) -> None:
    changes = ChangeMap(None, SIZE)
    changes.mark_all()
    changes.repaired(offset, length)
    assert [grain for grain, state in enumerate(states(changes)) if state == CLEAN] == list(repaired)
    assert changes.missing == (len(repaired) < GRAINS)
    assert changes.marked_bytes == min((GRAINS - len(repaired)) * GRAIN, SIZE)
    changes.close()


def test_repairing_what_is_not_missing_changes_nothing() -> None:
    changes = ChangeMap(None, SIZE)
    changes.mark(GRAIN, 1)
    changes.repaired(0, GRAIN)
    assert list(changes.missing_ranges()) == [(GRAIN, GRAIN)]
    changes.repaired(0, SIZE)
    changes.repaired(0, SIZE)
    assert (changes.missing, changes.marked_bytes) == (False, 0)
    changes.close()


def test_what_is_written_after_a_claim_that_the_disks_are_equal_is_not_covered_by_it() -> None:
    changes = ChangeMap(None, SIZE)
    changes.mark(0, 2 * GRAIN)
    changes.claim()
    assert not changes.outdated
    changes.mark(GRAIN, 1)
    changes.mark(SIZE - 1, 1)
    assert changes.outdated
    changes.clear_claimed()
    assert list(changes.missing_ranges()) == [(GRAIN, GRAIN), (4 * GRAIN, SIZE - 4 * GRAIN)]
    assert not changes.outdated


@pytest.mark.parametrize("how", ["dropped", "everything"])
def test_a_claim_of_which_nothing_comes_changes_nothing(how: str) -> None:
    changes = ChangeMap(None, SIZE)
    changes.mark(0, 1)
    changes.claim()
    if how == "dropped":
        changes.drop_claim()
    else:
        changes.mark_all()
        changes.clear_claimed()
    assert changes.marked_bytes == (GRAIN if how == "dropped" else SIZE)


class Unproven:
    """The map of a primary whose secondary is a plain NBD server."""

    def __init__(self, path: Path | None = None) -> None:
        self.changes = ChangeMap(None, SIZE) if path is None else opened(path, SIZE)
        self.changes.need_flushes(True)

    def arrive(self, offset: int, length: int = 1) -> None:
        self.changes.begin(offset, length)
        self.changes.end(offset, length, True)

    @property
    def states(self) -> list[int]:
        return states(self.changes)


def test_an_answer_is_no_proof_but_a_flush_that_was_sent_after_it_is() -> None:
    primary = Unproven()
    primary.arrive(0)
    primary.arrive(GRAIN, 2 * GRAIN)
    assert primary.states == [ARRIVED, ARRIVED, ARRIVED, CLEAN, CLEAN]
    assert (primary.changes.unproven, primary.changes.missing) == (True, False)
    assert primary.changes.marked_bytes == 3 * GRAIN
    first = primary.changes.begin_flush()
    primary.arrive(0)
    primary.arrive(3 * GRAIN)
    primary.changes.flushed(first)
    assert primary.states == [ARRIVED, CLEAN, CLEAN, ARRIVED, CLEAN], "what came after it was sent it does not cover"
    primary.changes.flushed(primary.changes.begin_flush())
    assert not any(primary.states)
    assert (primary.changes.unproven, primary.changes.marked_bytes) == (False, 0)
    primary.changes.close()


def test_a_flush_does_not_end_the_mark_of_a_write_that_is_on_its_way() -> None:
    primary = Unproven()
    primary.arrive(0)
    primary.changes.begin(0, 1)
    primary.changes.begin(0, 2 * GRAIN)
    primary.changes.flushed(primary.changes.begin_flush())
    assert primary.states[:2] == [ON_ITS_WAY, ON_ITS_WAY]
    primary.changes.end(0, 1, True)
    primary.changes.end(0, 2 * GRAIN, True)
    assert primary.states[:2] == [ARRIVED, ARRIVED]
    primary.changes.close()


@pytest.mark.parametrize("later", [False, True])
def test_after_a_flush_that_failed_nothing_that_it_was_to_cover_is_proven_by_a_later_one(later: bool) -> None:
    primary = Unproven()
    primary.arrive(0)
    primary.changes.begin(2 * GRAIN, 1)
    if later:
        primary.changes.begin(0, 1)
    primary.changes.begin_flush()
    assert primary.changes.unflushed()
    primary.changes.end(2 * GRAIN, 1, True)
    if later:
        primary.changes.end(0, 1, True)
    primary.changes.flushed(primary.changes.begin_flush())
    assert list(primary.changes.missing_ranges()) == [(0, GRAIN), (2 * GRAIN, GRAIN)]
    primary.changes.close()


def test_what_no_flush_has_covered_is_missing_for_the_next_process(tmp_path: Path) -> None:
    killed = Unproven(tmp_path / "m")
    killed.arrive(3 * GRAIN)
    following = opened(tmp_path / "m", SIZE)
    assert list(following.missing_ranges()) == [(3 * GRAIN, GRAIN)]
    following.close()
    killed.changes.close()


def test_a_repair_that_arrived_has_to_be_flushed_as_well() -> None:
    primary = Unproven()
    primary.changes.mark_all()
    primary.changes.watch(0, 2 * GRAIN)
    primary.changes.begin(0, 2 * GRAIN, repair=True)
    primary.changes.end(0, 2 * GRAIN, True)
    assert primary.states == [ARRIVED, ARRIVED, MISSING, MISSING, MISSING]
    primary.changes.clear()
    assert not primary.changes.unproven
    primary.changes.close()


def test_whatever_becomes_missing_is_counted_but_what_a_comparison_has_found() -> None:
    """A comparison does not believe a difference while the count moves."""
    changes = ChangeMap(None, SIZE)

    def counted(act: Any) -> int:
        former = changes.marks
        act()
        return changes.marks - former

    assert counted(lambda: changes.mark(0, 1)) == 1
    assert counted(lambda: changes.mark(GRAIN, 1, found=True)) == 0
    assert changes.lacks(0, 1)
    assert changes.lacks(GRAIN + 5, 1)
    assert not changes.lacks(2 * GRAIN, SIZE - 2 * GRAIN)
    assert counted(lambda: changes.repaired(0, 2 * GRAIN)) == 0
    assert not changes.lacks(0, SIZE)
    for at, length in ((0, 1), (GRAIN - 1, 2)):
        assert counted(lambda at=at, length=length: changes.begin(at, length)) == 0
        assert counted(lambda at=at, length=length: changes.end(at, length, True)) == 0
        changes.begin(at, length)
        assert counted(lambda at=at, length=length: changes.end(at, length, False)) == 1
    assert counted(changes.mark_all) == 1
    assert changes.lacks(SIZE - 1, 1)
    changes.claim()
    assert counted(changes.clear_claimed) == 1
    changes.need_flushes(True)
    assert counted(changes.unflushed) == 1


# -- what was proven ---------------------------------------------------------------------------------------------------


def test_what_is_proven_is_clean_or_on_its_way() -> None:
    changes = ChangeMap(None, 4 * GRAIN)
    changes.mark(0, 3 * GRAIN)
    marks = changes.marks
    changes.begin(GRAIN, 10)  # a guest's write, behind the question
    assert changes.prove(0, 2 * GRAIN, marks)
    assert list(changes.missing_ranges()) == [(2 * GRAIN, GRAIN)]
    assert changes.marked_bytes == 2 * GRAIN, "the write is on its way"
    changes.end(GRAIN, 10, arrived=True)
    assert changes.marked_bytes == GRAIN


def test_nothing_is_proven_when_anything_became_missing_since() -> None:
    changes = ChangeMap(None, 4 * GRAIN)
    changes.mark_all()
    marks = changes.marks
    changes.begin(GRAIN, 10)
    changes.end(GRAIN, 10, arrived=False)
    assert not changes.prove(0, 4 * GRAIN, marks)
    assert changes.missing_bytes == 4 * GRAIN


def test_missing_ranges_of_a_part() -> None:
    changes = ChangeMap(None, 4 * GRAIN + 7)
    changes.mark_all()
    assert list(changes.missing_ranges(GRAIN, 3 * GRAIN)) == [(GRAIN, 2 * GRAIN)]
    assert list(changes.missing_ranges(3 * GRAIN, 4 * GRAIN + 7)) == [(3 * GRAIN, GRAIN + 7)]
