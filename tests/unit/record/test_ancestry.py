# SPDX-License-Identifier: BSD-3-Clause
"""ancestry.py: after a kill at any step the next process knows at which generation its disks are.

A kill is a copy of the state folder as the kernel has it, opened anew.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from replication.disk import files
from replication.errors import DiskError
from replication.record.ancestry import Ancestry
from replication.record.lineage import Lineage, new_id
from replication.record.state import Record, StateError, StateFolder
from replication.stage import Mode
from waiting import DEADLINE_S

OWN, OTHER = "00000000000000aa", "00000000000000bb"
SHARED = Lineage(OWN, shared=True)

_copies = itertools.count()


class Node:
    """One process over a state folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = StateFolder(str(path))
        self.record = self.state.load() or Record(Mode.PRIMARY)
        self.saves = 0
        self.ancestry = Ancestry(self.state, self.record, self.save)

    def save(self) -> None:
        self.state.save(self.record)
        self.saves += 1

    def killed(self) -> Lineage:
        """What a process knows that is started after this one was killed now; the one after that knows the same."""
        copy = self.path.with_name(f"{self.path.name}-{next(_copies)}")
        shutil.copytree(self.path, copy)
        found = []
        for _ in range(2):
            following = Node(copy)
            found.append(following.ancestry.lineage)
            following.state.close()
        assert found[0] == found[1], "a process that changes nothing leaves what it has found"
        return found[0]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    opened = Node(tmp_path / "s")
    yield opened
    opened.state.close()


@pytest.fixture
def shared(node: Node) -> Node:
    """One that has a secondary."""
    node.ancestry.become(lambda lineage: lineage.paired_as_equal(OWN))
    assert node.ancestry.lineage == SHARED == node.killed()
    return node


def begun(node: Node) -> str:
    """The generation that the next write of its own begins."""
    return node.record.next_generation


# -- part --------------------------------------------------------------------------------------------------------


def test_a_node_that_never_was_part_of_a_pair_has_nothing_to_part_from(node: Node) -> None:
    node.ancestry.part()
    node.ancestry.flush()
    assert node.ancestry.lineage == Lineage() == node.killed()
    assert node.saves == 0


def test_the_first_write_of_its_own_begins_a_generation_and_the_second_none(shared: Node) -> None:
    saves, generation = shared.saves, begun(shared)
    assert shared.ancestry.shared
    shared.ancestry.part()
    expected = SHARED.moved(generation)
    assert shared.ancestry.lineage == expected == shared.killed()
    assert not shared.ancestry.shared
    shared.ancestry.part()
    assert shared.ancestry.lineage == expected == shared.killed()
    assert shared.saves == saves, "a guest's write waits for no file"


def test_many_threads_that_write_at_once_begin_one_generation_and_none_writes_before_it_counts(shared: Node) -> None:
    generation, together = begun(shared), threading.Barrier(8)

    def write() -> str:
        together.wait(DEADLINE_S)
        shared.ancestry.part()
        return shared.state.moved_to

    with ThreadPoolExecutor(8) as pool:
        seen = [writer.result(DEADLINE_S) for writer in [pool.submit(write) for _ in range(8)]]
    assert seen == [generation] * 8
    assert shared.killed() == SHARED.moved(generation)


def test_a_writer_that_finds_another_one_at_it_waits_until_the_generation_counts(
    shared: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    first:   in move_to, held ---------------- released
    second:                    waits for its turn      goes on, and the word is there
    """
    generation = begun(shared)
    reached, released = threading.Event(), threading.Event()
    real = shared.state.move_to

    def move_to(chosen: str) -> None:
        reached.set()
        assert released.wait(DEADLINE_S)
        real(chosen)

    monkeypatch.setattr(shared.state, "move_to", move_to)

    def second() -> str:
        shared.ancestry.part()
        return shared.state.moved_to

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shared.ancestry.part)
        assert reached.wait(DEADLINE_S)
        assert shared.ancestry.shared, "or the second one would pass by"
        later = pool.submit(second)
        assert not later.done()
        released.set()
        first.result(DEADLINE_S)
        assert later.result(DEADLINE_S) == generation


def test_what_was_begun_is_folded_into_the_record_by_whatever_is_saved_next(shared: Node) -> None:
    first = begun(shared)
    shared.ancestry.part()
    shared.ancestry.become(lambda lineage: lineage.offered())
    second = begun(shared)
    assert second != first
    expected = SHARED.moved(first).offered()
    assert shared.ancestry.lineage == expected == shared.killed()
    shared.ancestry.part()
    assert shared.ancestry.lineage == expected.moved(second) == shared.killed()
    assert shared.killed().history == (first, OWN)


def test_the_next_process_goes_on_with_what_was_begun_and_begins_its_own(tmp_path: Path, shared: Node) -> None:
    first = begun(shared)
    shared.ancestry.part()
    copy = tmp_path / "next"
    shutil.copytree(shared.path, copy)
    following = Node(copy)
    assert following.ancestry.lineage == SHARED.moved(first)
    assert not following.ancestry.shared
    following.ancestry.part()
    assert following.killed() == SHARED.moved(first)
    following.ancestry.become(lambda lineage: lineage.offered())
    assert following.ancestry.shared
    following.ancestry.part()
    assert following.killed() == SHARED.moved(first).offered().moved(begun(following))
    following.state.close()


def test_a_record_that_some_other_thing_has_saved_does_not_hide_what_was_begun(shared: Node) -> None:
    generation = begun(shared)
    shared.ancestry.part()
    shared.record.commit_rate = 1.0
    shared.save()
    assert shared.killed() == SHARED.moved(generation)


# -- flush -------------------------------------------------------------------------------------------------------


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were made stable."""
    made: list[str] = []
    real = files.fdatasync

    def fdatasync(fd: int) -> None:
        made.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(files, "fdatasync", fdatasync)
    return made


def test_a_flush_makes_stable_what_was_begun_and_costs_nothing_otherwise(shared: Node, syncs: list[str]) -> None:
    shared.ancestry.flush()
    assert syncs == []
    shared.ancestry.part()
    assert syncs == []
    shared.ancestry.flush()
    assert syncs == ["epoch"]
    shared.ancestry.flush()
    assert syncs == ["epoch"]


def test_a_flush_has_nothing_to_do_after_a_save(shared: Node, syncs: list[str]) -> None:
    shared.ancestry.part()
    shared.ancestry.become(lambda lineage: lineage.offered())
    syncs.clear()
    shared.ancestry.flush()
    assert syncs == []


def test_a_flush_that_fails_is_told_to_the_guest_and_tried_again(
    shared: Node, syncs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shared.ancestry.part()
    with monkeypatch.context() as failing:
        failing.setattr(files, "fdatasync", broken)
        for _ in range(2):
            with pytest.raises(DiskError, match=r"cannot write .*epoch: Input/output error"):
                shared.ancestry.flush()
    shared.ancestry.flush()
    assert syncs == ["epoch"]


def test_a_flush_also_makes_stable_what_a_killed_process_had_begun(
    tmp_path: Path, shared: Node, syncs: list[str]
) -> None:
    """Its guest's writes are in the page cache, and the flush of the next process is for them, too."""
    generation = begun(shared)
    shared.ancestry.part()
    copy = tmp_path / "next"
    shutil.copytree(shared.path, copy)
    following = Node(copy)
    assert following.ancestry.lineage == SHARED.moved(generation)
    following.ancestry.flush()
    assert syncs == ["epoch"]
    following.state.close()


# -- become ------------------------------------------------------------------------------------------------------


def test_what_a_node_becomes_is_saved_before_anybody_acts_on_it(shared: Node) -> None:
    became = shared.ancestry.become(lambda lineage: lineage.renewed(OTHER))
    assert became == SHARED.renewed(OTHER) == shared.ancestry.lineage == shared.killed()
    assert not shared.ancestry.shared


def test_becoming_the_same_saves_nothing(shared: Node) -> None:
    saves = shared.saves
    assert shared.ancestry.become(lambda lineage: lineage) == SHARED
    assert shared.saves == saves


@pytest.mark.parametrize("parted", [False, True], ids=["as saved", "after a write of its own"])
@pytest.mark.parametrize("error", [StateError("full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_what_cannot_be_saved_has_not_happened(
    shared: Node, monkeypatch: pytest.MonkeyPatch, parted: bool, error: BaseException
) -> None:
    def fails(_: Record) -> None:
        raise error

    generation = begun(shared)
    if parted:
        shared.ancestry.part()
    before = SHARED.moved(generation) if parted else SHARED
    with monkeypatch.context() as broken:
        broken.setattr(shared.state, "save", fails)
        with pytest.raises(type(error)):
            shared.ancestry.become(lambda lineage: lineage.diverged(OTHER))
    assert shared.ancestry.lineage == before == shared.killed()
    assert shared.ancestry.shared is not parted
    shared.ancestry.part()
    assert shared.ancestry.lineage == SHARED.moved(generation) == shared.killed()
    assert shared.ancestry.become(lambda lineage: lineage.diverged(OTHER)).history == (generation, OWN)


def test_a_change_that_fails_changes_nothing(shared: Node) -> None:
    def refuse(_: Lineage) -> Lineage:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        shared.ancestry.become(refuse)
    assert shared.ancestry.lineage == SHARED == shared.killed()
    shared.ancestry.part()  # and nothing is held
    assert shared.ancestry.lineage.base == OWN


# -- note --------------------------------------------------------------------------------------------------------


def test_what_is_noted_lasts_when_the_record_is_saved(shared: Node) -> None:
    shared.ancestry.note(lambda lineage: lineage.diverged(OTHER))
    assert shared.ancestry.lineage == SHARED.diverged(OTHER)
    assert not shared.ancestry.shared
    assert shared.killed() == SHARED
    shared.save()
    assert shared.killed() == SHARED.diverged(OTHER)


def test_what_was_noted_can_be_taken_back(shared: Node) -> None:
    generation = begun(shared)
    take_back = shared.ancestry.note(lambda lineage: lineage.diverged(OTHER))
    take_back()
    assert shared.ancestry.lineage == SHARED == shared.killed()
    assert shared.ancestry.shared
    shared.ancestry.part()
    assert shared.ancestry.lineage == SHARED.moved(generation) == shared.killed()


def test_what_was_begun_before_a_note_survives_its_being_taken_back(shared: Node) -> None:
    generation = begun(shared)
    shared.ancestry.part()
    take_back = shared.ancestry.note(lambda lineage: lineage.adopted(OTHER, ()))
    assert shared.ancestry.shared
    assert shared.killed() == SHARED.moved(generation), "nothing is saved yet"
    take_back()
    assert shared.ancestry.lineage == SHARED.moved(generation) == shared.killed()
    assert not shared.ancestry.shared
    shared.save()
    assert shared.killed() == SHARED.moved(generation)


def test_the_first_own_write_after_an_adoption_begins_a_generation_of_its_own(shared: Node) -> None:
    first = begun(shared)
    shared.ancestry.part()
    shared.ancestry.note(lambda lineage: lineage.adopted(OTHER, (OWN,)))
    shared.save()
    second = begun(shared)
    assert second not in (first, OTHER, OWN)
    shared.ancestry.part()
    expected = Lineage(second, base=OTHER, history=(OTHER, OWN))
    assert shared.ancestry.lineage == expected == shared.killed()


# -- all of it ---------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Node], object]] = {
    "part": lambda node: node.ancestry.part(),
    "flush": lambda node: node.ancestry.flush(),
    "offered": lambda node: node.ancestry.become(lambda lineage: lineage.offered()),
    "renewed": lambda node: node.ancestry.become(lambda lineage: lineage.renewed(new_id())),
    "diverged": lambda node: node.ancestry.become(lambda lineage: lineage.diverged(new_id())),
    "note and save": lambda node: (node.ancestry.note(lambda lineage: lineage.adopted(new_id(), ())), node.save()),
    "note and take back": lambda node: node.ancestry.note(lambda lineage: lineage.adopted(new_id(), ()))(),
    "save": lambda node: node.save(),
}


@pytest.mark.parametrize("steps", itertools.product(STEPS, repeat=3), ids="-".join)
def test_after_any_steps_a_killed_process_knows_what_it_was(tmp_path: Path, steps: tuple[str, ...]) -> None:
    node = Node(tmp_path / "s")
    node.ancestry.become(lambda lineage: lineage.paired_as_equal(OWN))
    for step in steps:
        STEPS[step](node)
        assert node.killed() == node.ancestry.lineage, step
        assert node.ancestry.shared is node.ancestry.lineage.shared
    node.state.close()
