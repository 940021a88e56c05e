# SPDX-License-Identifier: BSD-3-Clause
"""Lineage: the transitions, the table of decisions, and a simulation of nodes that meet in every order.

The simulation has two or three nodes with a few grains each. Every write has a number of its own, and every node a
record of the writes that its content contains, which lineage does not see. What is held against it:

1. No write that a node would lose is overwritten without `discard`, unless a failover has given it up.
2. Where the decision is QUICK, the change maps cover every difference; after a resync the contents are equal.
3. Split brain is refused in either order of starting; and after `discard` nothing is refused.

What the simulation permits: links that are cut before the primary notices, a kill of either node between any two
steps of the pairing, failover and planned stop at any time, a third node in between, and the loss of a state folder.
What it takes as given: what was saved stays saved, and a node that was never in a pair has nothing of its own when it
becomes a secondary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from replication.reason import Reason
from replication.record.lineage import (
    HISTORY_MAX,
    OUTDATED,
    SPLIT_BRAIN,
    UNFINISHED,
    UNRELATED,
    Decision,
    Lineage,
    Relation,
    Verdict,
    compare,
    decide,
    new_id,
)

GRAINS = 3


# -- transitions ---------------------------------------------------------------------------------------------

G1, G2, G3, G4 = (f"{number:016x}" for number in (1, 2, 3, 4))
NEW = Lineage()
OWNER = Lineage(G2, base=G1, history=(G1,))
PAIRED = Lineage(G2, shared=True, history=(G1,))


def test_new_id_is_a_generation_of_its_own() -> None:
    found = {new_id() for _ in range(100)}
    assert len(found) == 100
    assert all(Lineage.from_json(Lineage(one).to_json()).current == one for one in found)


def test_only_a_shared_generation_is_left_by_writing() -> None:
    assert NEW.moved(G3) is NEW
    assert OWNER.moved(G3) is OWNER
    assert PAIRED.moved(G3) == Lineage(G3, base=G2, history=(G2, G1))
    assert replace(PAIRED, base=G1).moved(G3).base == G2


@pytest.mark.parametrize("former", [OWNER, PAIRED])
def test_writing_ends_the_permission_to_throw_away(former: Lineage) -> None:
    assert not former.discarding().moved(G3).discard


@pytest.mark.parametrize("former", [OWNER, PAIRED, replace(PAIRED, incoming=G4), PAIRED.discarding()])
def test_failover_always_begins_a_generation(former: Lineage) -> None:
    assert former.diverged(G3) == Lineage(G3, base=G2, history=(G2, G1))


@pytest.mark.parametrize("former", [NEW, Lineage(incoming=G1)])
def test_forced_failover_comes_from_nothing(former: Lineage) -> None:
    assert former.diverged(G3) == Lineage(G3)


def test_a_full_copy_begins_a_generation_without_base() -> None:
    assert NEW.renewed(G3) == Lineage(G3)
    assert PAIRED.renewed(G3) == OWNER.discarding().renewed(G3) == Lineage(G3, history=(G2, G1))


def test_the_secondarys_side_of_a_resync() -> None:
    quick = OWNER.discarding().receiving(G3, keep=True)
    assert quick == replace(OWNER, incoming=G3)
    assert OWNER.discarding().receiving(G3, keep=False) == Lineage(incoming=G3)
    assert quick.adopted(G3, (G4, G1)) == Lineage(G3, shared=True, history=(G4, G1))


def test_the_primarys_side_of_a_resync() -> None:
    assert OWNER.discarding().offered() == Lineage(G2, shared=True, history=(G1,))


def test_pairing_as_equal() -> None:
    assert NEW.paired_as_equal(G3) == Lineage(G3, shared=True)
    assert replace(OWNER, incoming=G4, discard=True).paired_as_equal(G3) == Lineage(G3, shared=True, history=(G2, G1))


def test_history_is_bounded_and_newest_first() -> None:
    lineage = PAIRED
    left = []
    for _ in range(HISTORY_MAX + 5):
        left.insert(0, lineage.current)
        lineage = lineage.moved(new_id()).offered()
    assert lineage.history == tuple(left[:HISTORY_MAX])
    assert Lineage.from_json(lineage.to_json()) == lineage


def test_a_generation_that_was_forgotten_is_refused() -> None:
    lineage = PAIRED
    for _ in range(HISTORY_MAX):
        lineage = lineage.moved(new_id()).offered()
    assert decide(lineage, PAIRED).verdict is Verdict.FULL
    assert decide(lineage.moved(new_id()), PAIRED) == (Verdict.REFUSED, UNRELATED)


def test_another_primarys_interrupted_resync_is_no_base_for_a_quick_one() -> None:
    assert decide(PAIRED, replace(PAIRED, incoming=G4)).verdict is Verdict.FULL
    assert decide(OWNER, Lineage(G1, shared=True, incoming=G4)).verdict is Verdict.FULL
    assert decide(PAIRED, Lineage(G3, base=G2, incoming=G4, history=(G2,), discard=True)).verdict is Verdict.FULL


def test_refusals_are_one_line_that_says_what_to_do() -> None:
    for refusal in (SPLIT_BRAIN, OUTDATED, UNRELATED, UNFINISHED):
        assert refusal.isprintable()
    assert all("`replctl discard`" in refusal for refusal in (SPLIT_BRAIN, OUTDATED, UNRELATED))


@pytest.mark.parametrize("lineage", [NEW, OWNER, PAIRED, replace(PAIRED, incoming=G3, discard=True)])
def test_json_and_back(lineage: Lineage) -> None:
    saved = json.loads(json.dumps(lineage.to_json()))
    assert Lineage.from_json(saved) == lineage
    assert saved == lineage.to_json()


@pytest.mark.parametrize("name", ["current", "base", "shared", "incoming", "history", "discard"])
def test_json_without_a_member(name: str) -> None:
    saved = OWNER.to_json()
    del saved[name]
    with pytest.raises(KeyError):
        Lineage.from_json(saved)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"current": wrong} for wrong in (None, 2, "2", G2.upper()[:-1] + "A", f"{G2}\n", f"+{G2[1:]}", "0" * 16, [])),
        *({"incoming": wrong} for wrong in (None, False, "x" * 16)),
        *({"base": wrong} for wrong in (None, G2, G3)),
        *({"shared": wrong} for wrong in (None, 0, "")),
        *({"discard": wrong} for wrong in (None, 1)),
        *({"history": wrong} for wrong in (None, G1, {}, [None], [""], [G1, G1], [G1, G2], [[G1]])),
        {"history": [G1, *(f"{number:016x}" for number in range(100, 100 + HISTORY_MAX))]},
        {"history": []},
        {"current": "", "base": ""},
        {"current": "", "shared": True, "base": ""},
        {"more": 1},
    ],
    ids=str,
)
def test_json_that_was_not_written_here(wrong: dict[str, object]) -> None:
    saved = {**OWNER.to_json(), **wrong}
    with pytest.raises((TypeError, ValueError)):
        Lineage.from_json(saved)


# -- the simulation ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Session:
    """One connection of a primary to a secondary, from the decision to the loss that the primary notices."""

    primary: Node
    secondary: Node
    verdict: Verdict
    steps: list[Callable[[], None]] = field(default_factory=list)
    """What the pairing still has to do."""
    attached: bool = False
    """The secondary has saved `receiving`: what the guest writes is written with it."""
    cut: bool = False
    given_up: bool = False
    """The secondary has gone on alone from its checkpoint, and the primary does not know it yet."""


@dataclass(eq=False)
class Node:
    name: str
    lineage: Lineage = field(default_factory=Lineage)
    content: list[int] = field(default_factory=lambda: [0] * GRAINS)
    changes: set[int] = field(default_factory=set)
    """The change map: grains."""
    has: list[frozenset[int]] = field(default_factory=lambda: [frozenset()] * GRAINS)
    """For every grain the writes that led to its content."""
    secondary: bool = False
    checkpoint: tuple[list[int], list[frozenset[int]]] | None = None
    """A secondary's, if it has one."""
    touched: set[int] = field(default_factory=set)
    """Grains that the primary has changed since."""
    waived: frozenset[int] = frozenset()
    """The writes that a person gave up with the discard that is being carried out."""
    session: Session | None = None

    @property
    def writes(self) -> frozenset[int]:
        """All that would be lost with this node: a secondary's checkpoint, or what its disk contains."""
        if not self.secondary:
            return frozenset().union(*self.has)
        if self.checkpoint is None or not self.lineage.current:
            return frozenset()
        return frozenset().union(*self.checkpoint[1])

    def take_checkpoint(self) -> None:
        self.checkpoint = (list(self.content), list(self.has))
        self.touched = set()


def differing(one: Node, other: Node) -> set[int]:
    """Grains whose contents are not the same."""
    return {grain for grain in range(GRAINS) if one.content[grain] != other.content[grain]}


class World:
    """The nodes, and the truth about their writes."""

    def __init__(self, names: str = "AB") -> None:
        self.nodes = {name: Node(name) for name in names}
        self.serial = 0
        self.with_peer: dict[int, Session] = {}
        """Writes that were made with the peer, so that its failover may give them up."""
        self.lost: set[int] = set()
        """Writes that a failover or a switch-over has given up."""
        self.decisions: list[Decision] = []

    # -- what guests and people do -------------------------------------------------------------------------

    def write(self, name: str, grain: int | str = 0) -> bool:
        node, grain = self.nodes[name], int(grain)
        if node.secondary:
            return False
        self.serial += 1
        session = node.session
        if session is None or not session.attached:
            self._depart(node)
        else:
            self.with_peer[self.serial] = session
            if session.given_up:
                self.lost.add(self.serial)
        node.changes.add(grain)
        node.content[grain] = self.serial
        node.has[grain] |= {self.serial}
        return True

    def _depart(self, node: Node) -> None:
        """From here on the node's writes are its own; those that are under way as well, as it lives to tell."""
        lineage = node.lineage.moved(new_id())
        if lineage.current != node.lineage.current and node.session is not None:
            self._detach(node.session)  # decided for what the node is no longer
        node.lineage = lineage
        for serial in node.writes:
            if serial in self.with_peer and self.with_peer[serial].primary is node:
                del self.with_peer[serial]
                self.lost.discard(serial)

    def pair(self, primary: str, secondary: str, steps: int = 100, full: bool = False) -> bool:
        """Decide, and do so many steps of what follows."""
        p, s = self.nodes[primary], self.nodes[secondary]
        if p is s or p.session or (p.secondary and not p.lineage.incoming):
            return False
        if s.session is not None:
            if not s.session.cut or s.session.secondary is not s:
                return False
            s.session.given_up = True  # it has noticed before its primary did
            s.session = None
        if not (s.lineage.current or s.lineage.incoming) and s.writes:
            return False  # see above: what is taken as given
        decision = decide(p.lineage, s.lineage)
        if decision.verdict is Verdict.EQUAL and differing(p, s) - p.changes:
            return False  # of two new nodes a person has to know that
        self.check(p, s, decision)
        self.decisions.append(decision)
        if decision.verdict is Verdict.REFUSED:
            return True
        if s.lineage.discard and decide(p.lineage, replace(s.lineage, discard=False)).verdict is Verdict.REFUSED:
            s.waived = s.writes
        session = Session(p, s, Verdict.FULL if full else decision.verdict)
        session.steps = [lambda: self._mark(session), lambda: self._renew(session), lambda: self._receive(session)]
        p.session = s.session = session
        for _ in range(steps):
            self.advance(primary)
        return True

    def check(self, p: Node, s: Node, decision: Decision) -> None:
        """Hold a decision against the truth."""
        asked = decide(p.lineage, replace(s.lineage, discard=True))
        assert (asked.verdict is Verdict.REFUSED) == bool(p.lineage.incoming)
        if Verdict.QUICK in (decision.verdict, asked.verdict):
            assert differing(p, s) <= p.changes | s.changes, (p, s)
        unasked = decide(p.lineage, replace(s.lineage, discard=False))
        if unasked.verdict is not Verdict.REFUSED:
            assert s.writes - p.writes - self.lost - s.waived == frozenset(), (p, s, unasked)

    # -- the steps of a pairing ----------------------------------------------------------------------------

    def advance(self, primary: str) -> bool:
        """The next step; one that is a resync sends one grain."""
        session = self.nodes[primary].session
        if session is None or session.primary.name != primary or session.cut or not session.steps:
            return False
        session.steps.pop(0)()
        return True

    def _mark(self, session: Session) -> None:
        if session.verdict is Verdict.FULL:
            session.primary.changes = set(range(GRAINS))
        elif session.verdict is Verdict.QUICK:
            session.primary.changes |= session.secondary.changes

    def _renew(self, session: Session) -> None:
        p = session.primary
        if session.verdict is not Verdict.QUICK:
            self._own(p)
            p.lineage = p.lineage.renewed(new_id())

    def _own(self, p: Node) -> None:
        """The primary goes another way: its former secondary's failover gives nothing up any more."""
        self.with_peer = {serial: peer for serial, peer in self.with_peer.items() if peer.primary is not p}

    def _receive(self, session: Session) -> None:
        p, s = session.primary, session.secondary
        if not s.secondary:
            s.secondary = True
            s.take_checkpoint()
        s.lineage = s.lineage.receiving(p.lineage.current, keep=session.verdict is Verdict.QUICK)
        if not s.lineage.current:
            s.checkpoint = None
        if session.verdict is Verdict.EQUAL:
            for grain in range(GRAINS):
                s.has[grain] = p.has[grain] if grain not in p.changes else frozenset()
        session.attached = True
        session.steps = [lambda: self._resync(session)]

    def _resync(self, session: Session) -> None:
        if session.primary.changes:
            self.transfer(session.primary.name)
            session.steps = [lambda: self._resync(session)]
        else:
            session.steps = [lambda: self._offer(session), lambda: self._checkpoint(session)]
            session.steps += [lambda: self._adopt(session), session.secondary.changes.clear]

    def transfer(self, primary: str) -> bool:
        """One grain arrives."""
        session = self.nodes[primary].session
        if session is None or session.primary.name != primary or session.cut or not session.attached:
            return False
        p, s = session.primary, session.secondary
        if not p.changes:
            return False
        grain = p.changes.pop()
        if s.content[grain] != p.content[grain]:
            s.touched.add(grain)
        s.content[grain], s.has[grain] = p.content[grain], p.has[grain]
        return True

    @staticmethod
    def _offer(session: Session) -> None:
        session.primary.lineage = session.primary.lineage.offered()

    @staticmethod
    def _checkpoint(session: Session) -> None:
        session.secondary.take_checkpoint()
        session.secondary.waived = frozenset()

    @staticmethod
    def _adopt(session: Session) -> None:
        p, s = session.primary, session.secondary
        s.lineage = s.lineage.adopted(p.lineage.current, p.lineage.history)

    def checkpoint(self, primary: str) -> bool:
        session = self.nodes[primary].session
        if session is None or session.primary.name != primary or session.cut or session.steps:
            return False
        session.secondary.take_checkpoint()
        return True

    # -- what goes wrong, and who goes on ------------------------------------------------------------------

    def cut(self, name: str) -> bool:
        session = self.nodes[name].session
        if session is None or session.cut:
            return False
        session.cut = True
        return True

    def notice(self, name: str) -> bool:
        """The primary lives, and finds its link lost."""
        session = self.nodes[name].session
        if session is None or session.primary.name != name:
            return False
        self._detach(session)
        if session.primary.changes:
            self._depart(session.primary)
        return True

    @staticmethod
    def _detach(session: Session) -> None:
        session.primary.session = None
        if session.secondary.session is session:
            session.secondary.session = None

    def kill(self, name: str) -> bool:
        """And start again: all that was saved is there."""
        session = self.nodes[name].session
        if session is None:
            return False
        if session.primary.name == name:
            self._detach(session)
        else:
            session.cut = True
        return True

    def failover(self, name: str, force: bool = False) -> bool:
        s = self.nodes[name]
        if not s.secondary or (s.lineage.current == "") is not force:
            return False
        if s.checkpoint is None or force:
            s.has, s.changes = [frozenset()] * GRAINS, set(range(GRAINS))
        else:
            s.content, s.has = s.checkpoint
            s.changes |= s.touched
        self._go_on_alone(s)
        s.lineage = s.lineage.diverged(new_id())
        return True

    def switch_over(self, name: str) -> bool:
        """The secondary's planned stop; in the midst of a resync it is refused."""
        s = self.nodes[name]
        if not s.secondary or s.lineage.incoming:
            return False
        self._go_on_alone(s)
        return True

    def _go_on_alone(self, s: Node) -> None:
        if s.session is not None:
            s.session.cut = s.session.given_up = True
        s.secondary, s.session, s.checkpoint, s.touched, s.waived = False, None, None, set(), frozenset()
        kept = s.writes
        self.lost |= {w for w, session in self.with_peer.items() if session.secondary is s and w not in kept}

    def discard(self, name: str) -> bool:
        node = self.nodes[name]
        if node.session is not None:
            return False
        node.lineage = node.lineage.discarding()
        return True

    def wipe(self, name: str) -> bool:
        """The state folder is removed, and with it, a person says, what was worth keeping."""
        node = self.nodes[name]
        if node.session is not None:
            return False
        self.nodes[name] = Node(name, content=node.content)
        return True

    def invariants(self) -> None:
        owners: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            assert Lineage.from_json(node.lineage.to_json()) == node.lineage
            if node.lineage.current:
                owners.setdefault(node.lineage.current, []).append(node)
            session = node.session
            if session is not None and session.primary is node and not session.steps and not session.given_up:
                assert differing(node, session.secondary) <= node.changes
        for generation, nodes in owners.items():
            assert len(nodes) <= 2
            assert len(nodes) == 1 or all(node.lineage.shared for node in nodes)
            for node in self.nodes.values():
                if node not in nodes and generation in (node.lineage.base, *node.lineage.history):
                    assert all(owner.lineage.shared for owner in nodes)


# -- the table -----------------------------------------------------------------------------------------------
#
# Steps: `pair A B` (B becomes A's secondary: resync and checkpoint included), `begin A B` (as far as the first grain),
# `write A` (its guest), `checkpoint A` (of the pair), `cut A` (the link, which nobody has noticed yet), `lose A` (the
# link, noticed by its primary), `kill A`, `failover B`, `force B` (failover without a valid checkpoint), `switch B`
# (planned stop, of the secondary of a pair), `discard B`, `wipe B` (its state folder is gone).

CIRCLE = "pair A B; write A; kill A; failover B"
SPLIT = "pair A B; lose A; write A; failover B; write B"

TABLE = [
    # what happened, who starts as primary and secondary, decision, reason of a refusal
    ("", "A B", Verdict.EQUAL, None),
    ("write A", "A B", Verdict.EQUAL, None),
    # the link
    ("pair A B; lose A", "A B", Verdict.QUICK, None),
    ("pair A B; lose A; write A", "A B", Verdict.QUICK, None),
    ("pair A B; cut A; write A; kill A", "A B", Verdict.QUICK, None),
    ("pair A B; lose A; write A; begin A B; lose A", "A B", Verdict.QUICK, None),
    ("pair A B; lose A; write A; begin A B; lose A; write A", "A B", Verdict.QUICK, None),
    ("pair A B; write A; kill B; notice A; write A", "A B", Verdict.QUICK, None),
    # failover and return of the old primary
    (CIRCLE, "B A", Verdict.QUICK, None),
    (f"{CIRCLE}; write B", "B A", Verdict.QUICK, None),
    (f"{CIRCLE}; write B; pair B A; write B; kill B; failover A; write A", "A B", Verdict.QUICK, None),
    (f"{CIRCLE}; write B; begin B A; lose B; write B", "B A", Verdict.QUICK, None),
    (f"{CIRCLE}; write B", "A B", Verdict.REFUSED, OUTDATED),
    (CIRCLE, "A B", Verdict.REFUSED, OUTDATED),
    (f"{CIRCLE}; discard B", "A B", Verdict.QUICK, None),
    (f"{CIRCLE}; write B; begin B A; lose B", "A B", Verdict.REFUSED, UNFINISHED),
    (f"{CIRCLE}; write B; begin B A; lose B; failover A", "A B", Verdict.REFUSED, SPLIT_BRAIN),
    (f"{CIRCLE}; write B; begin B A; lose B; failover A", "B A", Verdict.REFUSED, SPLIT_BRAIN),
    # planned switch-over
    ("pair A B; lose A; switch B", "B A", Verdict.QUICK, None),
    ("pair A B; lose A; switch B", "A B", Verdict.QUICK, None),
    ("pair A B; lose A; switch B; write B", "B A", Verdict.QUICK, None),
    ("pair A B; lose A; switch B; write B", "A B", Verdict.REFUSED, OUTDATED),
    # split brain, in either order of starting
    (SPLIT, "A B", Verdict.REFUSED, SPLIT_BRAIN),
    (SPLIT, "B A", Verdict.REFUSED, SPLIT_BRAIN),
    (f"{SPLIT}; discard B", "A B", Verdict.QUICK, None),
    (f"{SPLIT}; discard A", "B A", Verdict.QUICK, None),
    (f"{SPLIT}; discard B", "B A", Verdict.REFUSED, SPLIT_BRAIN),
    (f"{SPLIT}; discard B; write B", "A B", Verdict.REFUSED, SPLIT_BRAIN),
    (f"{SPLIT}; discard B; pair A B; lose A; write A", "A B", Verdict.QUICK, None),
    ("pair A B; failover B; lose A; write A", "B A", Verdict.REFUSED, SPLIT_BRAIN),
    ("pair A B; failover B; write A; lose A", "B A", Verdict.REFUSED, SPLIT_BRAIN),
    ("pair A B; failover B; lose A", "B A", Verdict.QUICK, None),
    ("pair A B; lose A; switch B; write A; write B", "A B", Verdict.REFUSED, SPLIT_BRAIN),
    ("pair A B; lose A; switch B; write A; write B", "B A", Verdict.REFUSED, SPLIT_BRAIN),
    ("pair A B; lose A; write A; begin A B; lose A; failover B", "A B", Verdict.REFUSED, SPLIT_BRAIN),
    ("pair A B; lose A; write A; begin A B; lose A; failover B", "B A", Verdict.REFUSED, SPLIT_BRAIN),
    ("pair A B; lose A; write A; begin A B; lose A; failover B; discard B", "A B", Verdict.QUICK, None),
    # a state folder is lost
    ("pair A B; lose A; wipe B", "A B", Verdict.FULL, None),
    ("pair A B; lose A; wipe A", "A B", Verdict.REFUSED, UNRELATED),
    ("pair A B; lose A; wipe A; discard B", "A B", Verdict.FULL, None),
    (f"{CIRCLE}; write B; wipe A", "B A", Verdict.FULL, None),
    # the first copy
    ("pair A B; lose A; wipe B; begin A B; lose A; write A", "A B", Verdict.QUICK, None),
    ("pair A B; lose A; wipe B; begin A B; lose A", "B A", Verdict.REFUSED, UNFINISHED),
    ("pair A B; lose A; wipe B; begin A B; lose A; force B", "A B", Verdict.REFUSED, UNRELATED),
    ("pair A B; lose A; wipe B; begin A B; lose A; force B", "B A", Verdict.REFUSED, UNRELATED),
    # three nodes
    ("write A; pair A B; lose A; discard B; begin C B; lose C; force B", "B A", Verdict.REFUSED, UNRELATED),
    ("pair A B; lose A", "A C", Verdict.FULL, None),
    ("pair A B; lose A", "C A", Verdict.REFUSED, UNRELATED),
    ("pair A B; lose A; pair A C; lose A", "A B", Verdict.FULL, None),
    ("pair A B; lose A; pair A C; lose A; write A", "A C", Verdict.QUICK, None),
    ("pair A B; lose A; pair A C; lose A; switch B", "B C", Verdict.REFUSED, OUTDATED),
    ("pair A B; lose A; pair A C; lose A; failover B", "B C", Verdict.REFUSED, SPLIT_BRAIN),
    ("pair A B; lose A; pair A C; lose A; failover B; failover C", "C B", Verdict.REFUSED, SPLIT_BRAIN),
    ("pair A B; lose A; pair A C; kill A; failover C", "C B", Verdict.FULL, None),
    ("pair A B; lose A; pair A C; kill A; failover C; write C", "C A", Verdict.QUICK, None),
    ("pair A B; lose A; begin A C; lose A", "A B", Verdict.FULL, None),
    ("pair A B; lose A; begin A C; lose A; pair A B; lose A", "A C", Verdict.FULL, None),
    (f"{CIRCLE}; pair B C; lose B", "B A", Verdict.FULL, None),
    (f"{CIRCLE}; pair B C; lose B", "A B", Verdict.REFUSED, OUTDATED),
    (f"{CIRCLE}; pair B C; lose B; write A", "B A", Verdict.REFUSED, SPLIT_BRAIN),
    (f"{CIRCLE}; pair B C; kill B; failover C; write C", "C A", Verdict.FULL, None),
    (f"{CIRCLE}; pair B C; kill B; failover C; write C", "C B", Verdict.QUICK, None),
    (f"{CIRCLE}; pair B C; kill B; failover C; write C", "A C", Verdict.REFUSED, OUTDATED),
    (f"{CIRCLE}; pair B C; kill B; failover C; write A", "C A", Verdict.REFUSED, SPLIT_BRAIN),
    (f"{CIRCLE}; write B; pair B A; kill B; failover A; pair A C; lose A; write A", "A B", Verdict.FULL, None),
    (f"{SPLIT}; pair B C; lose B; discard B; pair A B; lose A", "A C", Verdict.REFUSED, SPLIT_BRAIN),
    (f"{SPLIT}; pair B C; lose B; discard B; pair A B; lose A; switch B", "B C", Verdict.REFUSED, SPLIT_BRAIN),
]


def play(story: str) -> World:
    """A world in which this has happened; every step must have been possible."""
    world = World("ABC")
    for step in filter(None, story.split("; ")):
        verb, *names = step.split()
        actions: dict[str, Callable[[], bool]] = {
            "pair": lambda names=names: world.pair(*names),
            "begin": lambda names=names: world.pair(*names, steps=4),
            "lose": lambda names=names: (world.cut(*names) or True) and world.notice(*names),
            "force": lambda names=names: world.failover(*names, force=True),
            "switch": lambda names=names: world.switch_over(*names),
        }
        assert actions[verb]() if verb in actions else getattr(world, verb)(*names), step
        world.invariants()
    return world


@pytest.mark.parametrize(
    ("story", "start", "verdict", "refusal"), TABLE, ids=[f"{row[0] or 'new'} -> {row[1]}" for row in TABLE]
)
def test_table(story: str, start: str, verdict: Verdict, refusal: str | None) -> None:
    world = play(story)
    primary, secondary = start.split()
    before = {name: (node.lineage, list(node.content)) for name, node in world.nodes.items()}
    assert world.pair(primary, secondary)
    decision = world.decisions[-1]
    assert decision.verdict is verdict
    assert refusal in (None, decision.reason)
    if verdict is Verdict.REFUSED:
        assert before == {name: (node.lineage, node.content) for name, node in world.nodes.items()}
    else:
        p, s = world.nodes[primary], world.nodes[secondary]
        assert p.content == s.content
        assert p.lineage.current == s.lineage.current != ""
        assert p.lineage.history == s.lineage.history


# -- every order, and any order ------------------------------------------------------------------------------


def actions(world: World) -> list[Callable[[], bool]]:
    """What can happen next, coarse: whole pairings, and such as end after each step by the death of either side."""
    names = list(world.nodes)
    found: list[Callable[[], bool]] = []
    for name in names:
        found += [lambda name=name: world.write(name), lambda name=name: world.failover(name)]
        found += [lambda name=name: world.switch_over(name), lambda name=name: world.discard(name)]
        found += [lambda name=name: world.cut(name) and world.notice(name)]
    for primary, secondary in itertools.permutations(names, 2):
        found.append(lambda p=primary, s=secondary: world.pair(p, s))
    return found


PAIRING_STEPS = 3 + GRAINS + 1 + 4


def start_over(opening: str, order: tuple[int, ...], crash: tuple[int, str] | None) -> World | None:
    """Play an opening, a pairing of A and B that ends early if `crash` says so, and then the actions of that number;
    None when one of them is not possible."""
    world = World("AB")
    for step in opening.split("; "):
        verb, *names = step.split()
        if not (world.pair(*names) if verb == "pair" else getattr(world, verb)(*names)):
            return None
    if crash is not None:
        world.pair("A", "B", steps=crash[0])
        if not world.kill(crash[1]):
            return None
        world.notice("A")
    for number in order:
        if not actions(world)[number]():
            return None
        world.invariants()
    return world


OPENINGS = [
    "write A",
    "pair A B; write A 1; cut A; notice A",
    "pair A B; write A 1; cut A; write A 2; notice A; write A 1",
    "pair A B; write A 1; cut A; write A 2; notice A; write A 1; failover B; write B 2; discard B",
    "pair A B; write A 1; kill A; failover B; write B 2; discard B",
]


@pytest.mark.parametrize("opening", ["write A", "pair A B; write A 1"])
def test_every_order_of_four(opening: str) -> None:
    played = [start_over(opening, order, None) for order in itertools.product(range(len(actions(World()))), repeat=4)]
    verdicts = {decision.verdict for world in played if world is not None for decision in world.decisions}
    assert verdicts >= {Verdict.QUICK, Verdict.REFUSED}


@pytest.mark.parametrize("dies", ["A", "B"])
@pytest.mark.parametrize("opening", OPENINGS)
def test_death_after_each_step_of_the_pairing(opening: str, dies: str) -> None:
    """And then every order of two things, and whoever may still begin the pair, in either order."""
    for steps in range(PAIRING_STEPS + 1):
        survived = 0
        for order in itertools.product(range(len(actions(World()))), repeat=2):
            survived += start_over(opening, order, (steps, dies)) is not None
        assert survived > 0, steps


NAMES = st.sampled_from("ABC")


class Meetings(RuleBasedStateMachine):
    """Three nodes, any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World("ABC")

    @rule(name=NAMES, grain=st.integers(0, GRAINS - 1))
    def write(self, name: str, grain: int) -> None:
        self.world.write(name, grain)

    @rule(primary=NAMES, secondary=NAMES, steps=st.one_of(st.just(100), st.integers(0, 12)), full=st.booleans())
    def pair(self, primary: str, secondary: str, steps: int, full: bool) -> None:
        self.world.pair(primary, secondary, steps, full)

    @precondition(lambda self: any(node.session for node in self.world.nodes.values()))
    @rule(
        name=NAMES,
        what=st.sampled_from([World.advance, World.transfer, World.checkpoint, World.cut, World.notice, World.kill]),
    )
    def during(self, name: str, what: Callable[[World, str], bool]) -> None:
        what(self.world, name)

    @rule(name=NAMES, what=st.sampled_from([World.failover, World.switch_over]))
    def alone(self, name: str, what: Callable[[World, str], bool]) -> None:
        what(self.world, name)

    @rule(name=NAMES)
    def force(self, name: str) -> None:
        self.world.failover(name, force=True)

    @rule(name=NAMES)
    def discard(self, name: str) -> None:
        self.world.discard(name)

    @rule(name=NAMES, sure=st.integers(0, 3))
    def wipe(self, name: str, sure: int) -> None:
        if sure == 3:
            self.world.wipe(name)

    @invariant()
    def holds(self) -> None:
        self.world.invariants()


Meetings.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestMeetings = Meetings.TestCase


# -- comparing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "other", "relation", "common"),
    [
        (PAIRED, PAIRED, Relation.SAME, G2),
        (PAIRED, PAIRED.moved(G3), Relation.OLDER, G2),
        (PAIRED.diverged(G3).diverged(G4), PAIRED, Relation.NEWER, G2),
        (PAIRED.moved(G3), PAIRED.diverged(G4), Relation.DIVERGED, G2),
        (Lineage(G3), PAIRED, Relation.UNRELATED, ""),
        (NEW, PAIRED, Relation.UNKNOWN, ""),
        (NEW, NEW, Relation.UNKNOWN, ""),
        (Lineage(incoming=G2), PAIRED, Relation.UNKNOWN, ""),
        (replace(PAIRED, incoming=G3), PAIRED.moved(G3), Relation.OLDER, G2),
        (PAIRED.discarding(), PAIRED, Relation.SAME, G2),
    ],
)
def test_comparing_two_nodes(mine: Lineage, other: Lineage, relation: Relation, common: str) -> None:
    opposite = {Relation.NEWER: Relation.OLDER, Relation.OLDER: Relation.NEWER}
    assert compare(mine, other) == (relation, common)
    assert compare(other, mine) == (opposite.get(relation, relation), common)


def test_a_refusal_and_the_comparison_say_the_same() -> None:
    """What `decide` refuses for being newer, or for split brain, is that to who compares."""
    diverged = PAIRED.diverged(G4)
    for mine, other in itertools.product((PAIRED, PAIRED.moved(G3), diverged, Lineage(G1)), repeat=2):
        code, relation = decide(mine, other).code, compare(mine, other)[0]
        expected = {Relation.OLDER: Reason.PEER_NEWER, Relation.DIVERGED: Reason.SPLIT_BRAIN}
        if code is not None:
            assert code is expected.get(relation, Reason.UNRELATED)
