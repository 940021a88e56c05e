# SPDX-License-Identifier: BSD-3-Clause
"""ledger.py: what a checkpoint makes true is true from the store of its number on, whatever can be saved and whenever
the process is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from replication.disk import files
from replication.reason import Reason
from replication.record.ancestry import Ancestry
from replication.record.ledger import Ledger, Settlement, settled
from replication.record.lineage import Lineage
from replication.record.outdated import Outdated
from replication.record.state import Record, StateError, StateFolder
from replication.stage import Mode, Stage

FORMER, OFFERED = "00000000000000aa", "00000000000000bb"


def adoption(lineage: Lineage) -> Lineage:
    return lineage.adopted(OFFERED, (FORMER,))


class Node:
    """One process of a node that has lost its checkpoint and is offered another generation."""

    def __init__(self, folder: Path) -> None:
        self.state = StateFolder(str(folder))
        found = self.state.load()
        if found is None:
            found = Record(Mode.SECONDARY, Stage.RUNNING, inconsistent="lost")
            found.lineage = Lineage(FORMER, incoming=OFFERED, shared=True).to_json()
        self.record = settled(found, self.state)
        self.state.reserve(self.record)
        self.ancestry = Ancestry(self.state, self.record, self.save)
        self.ledger = Ledger(self.record, self.ancestry, self.save)

    def save(self) -> None:
        self.state.save(self.record)

    @property
    def taken(self) -> bool:
        """Whether the checkpoint counts; both halves together."""
        whole = self.record.inconsistent is None
        assert whole == (self.ancestry.lineage.current == OFFERED)
        return whole

    def killed(self) -> None:
        self.state.close()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path)
    made.save()
    return made


def fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, content: bytes, offset: int) -> bool:
        return False

    monkeypatch.setattr(files, "write_all", full)


@pytest.mark.parametrize("step", ["promised", "begun", "fulfilled", "tidy"])
def test_a_kill_at_any_step_leaves_all_of_it_or_nothing(node: Node, tmp_path: Path, step: str) -> None:
    assert not node.taken
    node.ledger.promise(node.state.next_epoch(7), adoption)
    if step != "promised":
        node.state.begin_epoch(7)
    if step in ("fulfilled", "tidy"):
        node.ledger.fulfil(adoption)
        assert node.taken
    node.killed()
    for _ in range(2):
        after = Node(tmp_path)
        assert after.taken == (step != "promised")
        after.killed()


def test_a_promise_that_cannot_be_saved_changes_nothing(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        fail(full)
        with pytest.raises(StateError):
            node.ledger.promise(1, adoption)
    assert not node.taken
    assert node.record.promise is None
    node.killed()
    assert not Node(tmp_path).taken


def test_what_is_owed_is_saved_before_the_epoch_becomes_another_one(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.ledger.promise(1, adoption)
    node.state.begin_epoch()
    with monkeypatch.context() as full:
        fail(full)
        node.ledger.fulfil(adoption)
        assert node.taken
        assert node.ledger.state is Settlement.OWED
        with pytest.raises(StateError):
            node.ledger.tidy()
    node.state.end_epoch(0.0)
    node.ledger.tidy()
    assert node.ledger.state is Settlement.SETTLED
    node.state.begin_epoch()
    node.state.end_epoch(0.0)
    node.killed()
    assert Node(tmp_path).taken


def test_a_promise_for_an_epoch_that_was_not_begun_does_not_come_true_later(node: Node, tmp_path: Path) -> None:
    node.ledger.promise(1, adoption)
    node.ledger.withdraw()
    assert not node.taken
    node.ledger.tidy()
    node.state.count_from(1)
    node.killed()
    assert not Node(tmp_path).taken


@pytest.mark.parametrize("step", ["promised", "begun", "fulfilled"])
@pytest.mark.parametrize("current", [True, False])
def test_only_what_was_promised_as_current_ends_that_the_node_is_outdated(
    node: Node, tmp_path: Path, step: str, current: bool
) -> None:
    """A checkpoint adopts what a primary has sent, but somebody has said that a third node went on."""
    node.record.outdated = Outdated(Reason.TOLD, "c was promoted", 1.5e9).to_json()
    node.save()
    node.ledger.promise(node.state.next_epoch(7), adoption, current)
    if step != "promised":
        node.state.begin_epoch(7)
    if step == "fulfilled":
        node.ledger.fulfil(adoption)
    node.killed()
    after = Node(tmp_path)
    assert (after.record.outdated is None) == (current and step != "promised")
    after.killed()
