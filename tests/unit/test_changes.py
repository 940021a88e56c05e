# SPDX-License-Identifier: BSD-3-Clause
"""changes.py: whatever becomes of writes in flight, the map knows every grain in which the secondary may differ."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replication.changes import CLEAN, GRAIN, MISSING, ON_ITS_WAY, RUN_MAX, ChangeMap
from replication.errors import ConfigError

BLOCK = 16 << 10
BLOCKS_PER_GRAIN = GRAIN // BLOCK
GRAINS = 5
SIZE = GRAINS * GRAIN - BLOCK - 100
"""The last grain is short, and ends within a block of the model."""
BLOCKS = -(-SIZE // BLOCK)


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
        self.map = ChangeMap(str(self.path), SIZE)

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
        self.map = ChangeMap(str(copy), SIZE)

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


Replication.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestReplication = Replication.TestCase


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
    killed = ChangeMap(str(path), SIZE)
    killed.begin(3 * GRAIN + 5, 1)
    following = ChangeMap(str(path), SIZE)
    assert list(following.missing_ranges()) == [(3 * GRAIN, GRAIN)]
    following.close()
    killed.close()


def test_missing_ranges_end_at_the_disks_end_and_are_cut_to_what_a_resync_sends_at_a_time() -> None:
    size = 40 * GRAIN + 1
    changes = ChangeMap(None, size)
    changes.mark(0, size)
    ranges = list(changes.missing_ranges())
    assert ranges == [(0, RUN_MAX), (RUN_MAX, RUN_MAX), (2 * RUN_MAX, size - 2 * RUN_MAX)]
    changes.close()


def test_runs_that_cross_the_step_of_the_scan_are_all_there() -> None:
    grains = (1 << 20) + 3
    changes = ChangeMap(None, grains * GRAIN)
    changes.mark(((1 << 20) - 2) * GRAIN, 4 * GRAIN)
    covered = [(offset // GRAIN, length // GRAIN) for offset, length in changes.missing_ranges()]
    assert covered == [((1 << 20) - 2, 2), (1 << 20, 2)]
    changes.close()


def test_the_map_of_another_disk_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk0.changes"
    changes = ChangeMap(str(path), SIZE)
    changes.mark(0, 1)
    changes.close()
    kept = path.read_bytes()
    with pytest.raises(ConfigError, match="another size"):
        ChangeMap(str(path), SIZE + GRAIN)
    assert path.read_bytes() == kept


def test_a_map_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot use the change map .*: No such file or directory"):
        ChangeMap(str(tmp_path / "nowhere" / "x"), SIZE)


def states(changes: ChangeMap) -> list[int]:
    return list(changes._grain_states)


def test_everything_is_missing_when_nothing_is_known(tmp_path: Path) -> None:
    path = tmp_path / "disk0.changes"
    changes = ChangeMap(str(path), SIZE)
    changes.mark(0, 1)
    changes.mark_all()
    assert list(changes.missing_ranges()) == [(0, SIZE)]
    assert (changes.missing, changes.marked_bytes) == (True, SIZE)
    changes.close()
    after = ChangeMap(str(path), SIZE)
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
