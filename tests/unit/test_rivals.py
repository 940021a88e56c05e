# SPDX-License-Identifier: BSD-3-Clause
"""rivals.py: what is told once, what is kept, and what the guest writes while a node learns of another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from replication.events import Event, EventHub
from replication.reason import Reason
from replication.record.ancestry import Ancestry
from replication.record.encounter import Encounter
from replication.record.lineage import Lineage
from replication.record.state import Record, StateFolder
from replication.rivals import TOLD_MAX, Rivals
from replication.stage import Mode

G, H = (f"{number:016x}" for number in range(1, 3))
SHARED = Lineage(G, shared=True)
PROMOTED = SHARED.diverged(H)


class Owner:
    """A node that has what a promoted one has gone on from; without a folder, and without disks."""

    def __init__(self) -> None:
        self.record = Record(Mode.PRIMARY, lineage=SHARED.to_json())
        self.ancestry = Ancestry(StateFolder(None), self.record, lambda: None)
        self.saves = 0
        self.outdated: list[Reason] = []
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens before the guest stands."""
        hub = EventHub()
        self.events: list[Event] = []
        hub.subscribe(self.events.append)
        self.rivals = Rivals(self.record, self.ancestry, hub, self._outdate, self._keep)

    def _keep(self) -> None:
        self.saves += 1

    def _outdate(self, code: Reason, _text: str, still: Callable[[], bool]) -> bool:
        self.meanwhile()
        if still():
            self.outdated.append(code)
            return True
        return False

    def meet(self, node: str = "b", lineage: Lineage = PROMOTED) -> None:
        self.rivals.met(Encounter(Reason.PEER_PROMOTED, "it was promoted", node, lineage))


@pytest.fixture
def owner() -> Owner:
    return Owner()


def test_what_the_guest_was_answered_before_it_stands_counts(owner: Owner) -> None:
    """It is nowhere else, so the node is no ancestor any more."""
    owner.meanwhile = owner.ancestry.part
    owner.meet()
    assert (owner.outdated, owner.rivals.split is not None) == ([], True)


def test_a_copy_that_the_other_one_went_on_from_is_outdated(owner: Owner) -> None:
    owner.meet()
    assert (owner.outdated, owner.rivals.split, owner.events) == ([Reason.PEER_PROMOTED], None, [])


def test_a_split_brain_is_told_once_for_each_node_and_saved_once(owner: Owner) -> None:
    """The link meets it every few seconds."""
    owner.ancestry.part()
    for node in ("b", "b", "c", "b"):
        owner.meet(node)
    assert [event["event"] for event in owner.events] == ["REPLICATION_SPLIT_BRAIN"] * 2
    assert owner.saves == 1
    assert "node b " in str(owner.rivals.split), "the first one"
    assert owner.rivals.agreed()
    assert not owner.rivals.agreed()
    owner.meet()
    assert (len(owner.events), owner.saves) == (3, 2)


def test_what_a_person_has_overruled_is_not_learnt_again_before_an_agreement(owner: Owner) -> None:
    owner.ancestry.part()
    owner.meet()
    assert owner.rivals.overrule()
    owner.meet("c")
    assert (owner.rivals.split, owner.record.overruled) == (None, ["split-brain"])
    assert not owner.rivals.overrule()


def test_who_says_to_be_ever_another_node_fills_neither_memory_nor_log(owner: Owner) -> None:
    owner.ancestry.part()
    for number in range(2 * TOLD_MAX):
        owner.meet(str(number))
    assert len(owner.events) == TOLD_MAX
