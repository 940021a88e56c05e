# SPDX-License-Identifier: BSD-3-Clause
"""Who has what: the generations of a node's content, and what two nodes that meet may do to each other.

A generation is a random 64-bit number that names a content and what was written to it. It is `shared` from the moment
another node may have it; whoever writes to a shared one without the other node begins a new one, and so leaves a
trace that the other finds when the two meet again.

Invariants
* At most two nodes have one generation as `current`. A full copy to a third begins a new one (`renewed`).
* Where a node's `current` stands in another node's `base` or `history`, it is `shared`, and nothing was written to it
  without the other node: to overwrite that node loses nothing that the two had not agreed on.
* `history` holds only what the content comes from. What was thrown away is not in it: a node that still has that is
  not overwritten because of it.
* The change map may mark too much, never too little.

Who saves what in which order; a kill between any two steps leads to a resync or a refusal, never to a wrong QUICK
    pairing     1. primary: marks in its map what the secondary's maps mark; for FULL all, and saves `renewed`
                2. secondary: saves `receiving`; only then may a grain change. Its own map stays as it is
                3. resync, until the primary's map has nothing left but what is on its way
                4. primary: saves `offered`
                5. secondary: checkpoint, saves `adopted`, clears its own map. No other checkpoint before this one
    EQUAL       the same with `renewed` and `receiving(keep=False)`, but what the map does not mark is not sent. Not
                `paired_as_equal`, unless the map is empty: a failover now would call writes agreed on that never came
    link lost   primary: saves `moved` before the first guest write is answered, or at once when answered writes are
                still on their way: some of them may be younger than the secondary's failover
    failover    marks what goes back to the checkpoint, saves `diverged`, then lets the guest write to the disk
"""

from __future__ import annotations

import enum
import re
import secrets
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from replication.reason import Reason

HISTORY_MAX = 32
"""Former generations that are remembered; one that was forgotten is unknown, which is refused, not overwritten."""

SPLIT_BRAIN = (
    "split brain: both sides have taken writes since they parted; decide whose writes are to be thrown away and run "
    "`replctl discard` there, as a secondary"
)
OUTDATED = (
    "the secondary has newer data: it went on from what this primary has; start them the other way round, or, if its "
    "writes are to be thrown away, run `replctl discard` on the secondary"
)
UNRELATED = (
    "the two sides have nothing in common: the secondary's disks come from another pair; check the address, or, if "
    "they are to be overwritten, run `replctl discard` on the secondary"
)
UNFINISHED = (
    "this node's disks are an unfinished copy of another primary's; let that primary finish it, or fail over here first"
)

_ID = re.compile("[0-9a-f]{16}")


def new_id() -> str:
    """A generation that nobody has."""
    return f"{secrets.randbelow((1 << 64) - 1) + 1:016x}"


@dataclass(frozen=True)
class Lineage:
    """What one node, all its disks together, knows of its content. Transitions return the new one, to be saved."""

    current: str = ""
    """The generation of its content (a secondary's: of its checkpoint); "" when it was never part of a pair, or when
    a copy of everything has not been completed."""
    base: str = ""
    """The generation at which its change map begins: a node that has this one lacks exactly what the maps of the two
    say. "" when there is none."""
    shared: bool = False
    """Another node may have `current`, too."""
    incoming: str = ""
    """Secondary: the generation that is being received. What its disks still lack is in the primary's change map."""
    history: tuple[str, ...] = ()
    """What `current` comes from, newest first."""
    discard: bool = False
    """A person allowed that this node's own changes are thrown away."""

    # -- a primary, or a node on its own ---------------------------------------------------------------------

    def moved(self, generation: str) -> Lineage:
        """The guest writes here without the other node. The same one where that makes no difference."""
        if self.shared:
            return Lineage(generation, base=self.current, history=self._descent())
        return replace(self, discard=False) if self.discard else self  # what is written now, nobody allowed to lose

    def diverged(self, generation: str) -> Lineage:
        """Failover: the content is the last checkpoint from here on, whether anything will be written or not."""
        return Lineage(generation, base=self.current, history=self._descent())

    def renewed(self, generation: str) -> Lineage:
        """All of the content is about to be sent: the map says nothing of any other node any more."""
        return Lineage(generation, history=self._descent())

    def offered(self) -> Lineage:
        """The secondary has everything and may adopt `current` from here on. If that fails, its `incoming` tells; the
        map says no longer what a node at `base` lacks."""
        return replace(self, base="", shared=True, discard=False)

    # -- a secondary -----------------------------------------------------------------------------------------

    def discarding(self) -> Lineage:
        """A person gives up what was written here."""
        return replace(self, discard=True)

    def kept(self) -> Lineage:
        """What is written from here on nobody has allowed to lose."""
        return replace(self, discard=False)

    def receiving(self, generation: str, keep: bool) -> Lineage:
        """A resync begins. `keep`: the last checkpoint stays valid meanwhile; otherwise nothing here is valid until
        the copy is complete, and a forced failover in the midst of it comes from nothing that anybody knows."""
        if keep:
            return replace(self, incoming=generation, discard=False)
        return Lineage(incoming=generation)

    def adopted(self, generation: str, history: tuple[str, ...]) -> Lineage:
        """The checkpoint after the resync is complete. `history` is the primary's: where this content comes from. The
        own one is not, when something was thrown away here."""
        return Lineage(generation, shared=True, history=history)

    # -- both ------------------------------------------------------------------------------------------------

    def paired_as_equal(self, generation: str) -> Lineage:
        """The disks of both ends are equal, a person says, and both change maps are cleared."""
        return Lineage(generation, shared=True, history=self._descent())

    def _descent(self) -> tuple[str, ...]:
        return (self.current, *self.history)[:HISTORY_MAX] if self.current else ()

    @property
    def known(self) -> frozenset[str]:
        """All generations that its content is or comes from."""
        return frozenset((self.current, *self.history)) - {""}

    # -- saved -----------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "history": list(self.history)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Lineage:
        """Raises KeyError, TypeError or ValueError for anything that `to_json` has not written."""
        values = {item.name: saved[item.name] for item in fields(cls)}
        if len(saved) != len(values):
            raise ValueError("lineage has unknown members")
        if type(values["shared"]) is not bool or type(values["discard"]) is not bool:
            raise TypeError("shared and discard are true or false")
        history = values["history"]
        if not isinstance(history, list):
            raise TypeError("history is a list")
        for name in ("current", "base", "incoming"):
            if values[name] != "":
                check_id(name, values[name])
        for generation in history:
            check_id("history", generation)
        if len(history) > HISTORY_MAX or len({values["current"], *history}) != len(history) + 1:
            raise ValueError("history is too long or repeats a generation")
        lineage = cls(**{**values, "history": tuple(history)})
        if (lineage.base and lineage.base != history[0]) if history else lineage.base:
            raise ValueError("base is not the generation before current")
        if not lineage.current and (lineage.shared or history):
            raise ValueError("shared and history mean nothing without current")
        return lineage


def check_id(name: str, generation: object) -> None:
    """TypeError or ValueError unless `generation` is one, or a node's id."""
    if not isinstance(generation, str):
        raise TypeError(f"{name} is not a generation")
    if not _ID.fullmatch(generation) or not int(generation, 16):
        raise ValueError(f"{name} is not a generation: {generation!r}")


class Verdict(enum.Enum):
    """What a primary does with the secondary that it has found."""

    EQUAL = "equal"
    """Both are new: their disks are taken as equal, except for what the primary's change map says."""
    QUICK = "quick"
    """What the primary's change map and the secondary's maps mark is sent, perhaps nothing."""
    FULL = "full"
    """Everything is sent."""
    REFUSED = "refused"
    """Nothing is sent: something would be lost that nobody has given up."""


class Decision(NamedTuple):
    """The reason is one line; that of a refusal says what to do, and has a code."""

    verdict: Verdict
    reason: str

    @property
    def code(self) -> Reason | None:
        """Of a refusal."""
        return _CODES.get(self.reason)


_CODES = {
    SPLIT_BRAIN: Reason.SPLIT_BRAIN,
    OUTDATED: Reason.PEER_NEWER,
    UNRELATED: Reason.UNRELATED,
    UNFINISHED: Reason.UNFINISHED_COPY,
}


def decide(primary: Lineage, secondary: Lineage) -> Decision:
    """What is to be done when these two meet."""
    if primary.incoming:
        return Decision(Verdict.REFUSED, UNFINISHED)
    if not (primary.current or secondary.current or secondary.incoming):
        return Decision(Verdict.EQUAL, "neither side was ever part of a pair")
    if secondary.incoming and secondary.incoming in (primary.current, primary.base):
        return Decision(Verdict.QUICK, "an interrupted resync goes on")
    if not secondary.current:
        return Decision(Verdict.FULL, "the secondary has no complete copy of anything")
    if primary.current and secondary.current in (primary.current, primary.base):
        return _quick(secondary, "the change maps say what the secondary lacks")
    if secondary.current in primary.history:
        return Decision(Verdict.FULL, "the secondary's copy is older than the change map")
    refusal = _refusal(primary, secondary)
    if not secondary.discard:
        return Decision(Verdict.REFUSED, refusal)
    if secondary.base and secondary.base in (primary.current, primary.base):
        return _quick(secondary, "the secondary's changes are thrown away, as a person has allowed")
    return Decision(Verdict.FULL, "the secondary's disks are overwritten, as a person has allowed")


def _quick(secondary: Lineage, reason: str) -> Decision:
    """QUICK, unless another primary's resync has been at the secondary's disks: no map has what that changed."""
    if secondary.incoming:
        return Decision(Verdict.FULL, "another primary's resync of the secondary was interrupted")
    return Decision(Verdict.QUICK, reason)


def _refusal(primary: Lineage, secondary: Lineage) -> str:
    """Why nobody may overwrite the secondary without being asked."""
    if primary.current in secondary.history:
        return OUTDATED
    if primary.known & secondary.known:
        return SPLIT_BRAIN
    return UNRELATED


class Relation(enum.Enum):
    """How the content of one node is to that of another one."""

    SAME = "same"
    """Both are of one generation. A secondary's is its checkpoint, so its primary may be ahead of it."""
    NEWER = "newer"
    """It comes from the other one's: to overwrite that loses nothing that the two had agreed on."""
    OLDER = "older"
    """The other one went on from it."""
    DIVERGED = "diverged"
    """Split brain: both went on from something that they have had in common."""
    UNRELATED = "unrelated"
    """They have nothing in common that is remembered."""
    UNKNOWN = "unknown"
    """One of them was never part of a pair, or has no complete copy of anything."""


def compare(mine: Lineage, other: Lineage) -> tuple[Relation, str]:
    """How mine is to the other one, and the newest generation that both are or come from ("" if there is none).

    What a node has promised to overwrite (`discard`), and what it is receiving (`incoming`), changes nothing before it
    is there.
    """
    if not mine.current or not other.current:
        return Relation.UNKNOWN, ""
    common = next((one for one in (mine.current, *mine.history) if one in other.known), "")
    if mine.current == other.current:
        return Relation.SAME, common
    if other.current in mine.history:
        return Relation.NEWER, common
    if mine.current in other.history:
        return Relation.OLDER, common
    return (Relation.DIVERGED if common else Relation.UNRELATED), common
