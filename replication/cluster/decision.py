# SPDX-License-Identifier: BSD-3-Clause
"""What follows from what a node says of itself and what the cluster's register says: a score, a refusal, a step.

Nothing here asks anybody or waits. The scores are few on purpose: each change of one has the cluster compute anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

OWNER, UNSURE_OWNER, IN_STEP, BEHIND = 10000, 5000, 1000, 100
"""The scores that the cluster gets."""

_IN_STEP_MIN = 501
"""The node's own score of a secondary that is in step, at least (replication/role.py)."""
_OWNER_THERE = ("synchronizing", "in-sync")
"""The link of a copy whose owner runs."""
_NEW = 10
"""The node's own score of one that never had a primary."""

UNREADABLE = "unreadable"
"""A relation that cannot be told, although the register has a lineage."""
_STALE = ("older", "diverged", "unrelated")
"""Relations to the register's owner: that one went on from something that is not here."""

_CLOSED, _SUSPENDED = "not-promoted", "suspended"
_GUEST_WAITS = (_CLOSED, _SUSPENDED)
"""Codes of an owner whose guest is kept back, though nothing is known against what it has: a promotion, or a word of
the cluster's, ends that."""

_UNDECIDED = (
    "and the cluster cannot tell who was promoted last; decide whose writes are to be thrown away, and have that node "
    "demoted (replctl demote)"
)

PRIMARY = "primary"
_SURE = 10000
"""The node's own score of an owner from which nobody can have gone on."""


def may_own(role: dict[str, Any]) -> bool | None:
    """From an answer to query-role, whether what an owner has counts; None: that cannot be told. Its guest may wait all
    the same, and for no other reason: for a promotion (guest-face), or for its peer (wfc-timeout, fencing)."""
    may_run: bool | None = role.get("may-run")
    if role.get("code") in _GUEST_WAITS:
        return True if role.get("score") == _SURE else None
    return may_run


@dataclass(frozen=True)
class Seen:
    """What a node has answered."""

    role: str
    score: int
    may_run: bool | None
    code: str | None
    reason: str
    mode: str
    stage: str
    link: str
    checkpoint_age_s: float | None
    outdated: str | None
    obstacle: str | None
    lineage: dict[str, Any] = field(default_factory=dict)
    lossless: bool = False
    """A copy that has everything: its primary has left in good order."""
    relation: str | None = None
    """To what the register's owner had; None: there is no such owner, or it cannot be told."""
    register_host: str | None = None
    """The cluster node that was promoted last, if the register says."""
    register_here: bool = False
    """That is this one."""
    register_kept: bool = False
    """That one was stopped in good order, with its disks."""
    register_disputed: str | None = None
    """The cluster node that has gone on as well, and whose promotion was not before that one."""
    register_alone: bool = False
    """That one was promoted without the other node, and has not been in sync with it since."""
    unknown_to_register: bool = False
    """This node was promoted, and the register's owner did not know of that. Found out only where it counts: both have
    gone on, and that one does not run promoted now."""
    knew_register: bool = False
    """And this node's promotion knew of that one's. Found out as well where both have the same."""
    outdated_by_hand: bool = False
    """It is outdated because somebody has made it a secondary."""

    @property
    def owner(self) -> bool:
        """It owns its disks."""
        return self.role == PRIMARY

    @property
    def in_sync(self) -> bool:
        """The pair is, at this moment."""
        return self.link == "in-sync"

    @property
    def stale(self) -> str | None:
        """Why what is here is not what the cluster's last owner had."""
        if self.relation not in _STALE:
            return None
        went_on = "another node" if self.register_host is None else self.register_host
        if self.relation == "older":
            return f"{went_on} went on from what is here"
        if self.relation == "diverged":
            return f"split brain: {went_on} and this node have both gone on from what they had in common"
        return f"what is here has nothing in common with what {went_on} has"

    @property
    def passed_over(self) -> bool:
        """Whether the register names an owner that took over from here without loss. What that one has written since is
        in the register only with its next monitor. A node that knows of the other one decides by what it knows; and one
        that has taken over from that one is not passed over: its own entry is lost."""
        elsewhere = self.register_host is not None and not self.register_here
        return elsewhere and self.relation == "same" and self.score < OWNER and not self.knew_register

    @property
    def left_out(self) -> bool:
        """Whether a copy has just what the register's owner had when that was promoted without it."""
        return not self.owner and self.register_alone and not self.register_here and self.relation == "same"

    @property
    def split(self) -> str | None:
        """Why a person has to say whose writes are to be thrown away."""
        return self.stale if self.relation in ("diverged", "unrelated") else None

    @property
    def dispute(self) -> str | None:
        """Why nobody is promoted before a person has said whose writes count."""
        if disputes(self):
            return f"split brain: {self.register_host} and this node have both gone on, {_UNDECIDED}"
        if self.register_disputed is not None:
            return f"split brain: {self.register_host} and {self.register_disputed} have both gone on, {_UNDECIDED}"
        return None


def obstacle(seen: Seen, max_age_s: float | None) -> str | None:
    """Why this node must not be promoted now, as far as it can be told without the others; None: it may. `max_age_s`: 0
    is any age, None one that is not known."""
    if seen.relation == UNREADABLE:
        return f"what {seen.register_host} has cannot be compared with what is here, by this version"
    return seen.dispute or _unfit(seen, max_age_s)


def _unfit(seen: Seen, max_age_s: float | None) -> str | None:
    if seen.outdated is not None:
        return f"it is outdated ({seen.outdated})"
    if seen.stale is not None:
        return seen.stale
    if seen.owner and seen.passed_over:
        return f"{seen.register_host} was promoted since, and may have gone on from what is here"
    if seen.owner:
        return seen.reason if seen.may_run is False and seen.code not in _GUEST_WAITS else None
    if seen.left_out:
        return f"{seen.register_host} was promoted without this node, and may have gone on from what is here"
    if seen.score <= 0:
        return "it does not run, or has no valid checkpoint"
    if seen.score == _NEW:
        return "it has never had a primary: the first owner is made by hand (replctl promote)"
    if seen.lossless:
        return None  # nothing is lost, however long ago that was
    age_s = seen.checkpoint_age_s
    if max_age_s is None:
        return "the parameter max_age cannot be used, so its last checkpoint may be too old"
    if max_age_s and (age_s is None or age_s > max_age_s):
        age = "there is none" if age_s is None else f"it is {age_s:.0f} s old"
        return f"its last checkpoint must not be older than {max_age_s:g} s, and {age}"
    return None


def score(seen: Seen, max_age_s: float | None) -> int | None:
    """What the cluster is told; None: this node is not to be promoted."""
    if obstacle(seen, max_age_s) is not None:
        return None
    if seen.owner:
        return OWNER if seen.score >= OWNER else UNSURE_OWNER
    return IN_STEP if seen.score >= _IN_STEP_MIN else BEHIND


def waits_for_first(seen: Seen) -> bool:
    """Whether nobody was ever promoted, and the owner that a person has made is there: that one is the candidate, with
    its next monitor, and a copy is none before."""
    return seen.register_host is None and not seen.owner and seen.link in _OWNER_THERE


def disputes(seen: Seen) -> bool:
    """Whether an owner has gone on as well as the one in the register, which did not know of its promotion: that is the
    register of another part of the cluster, and says nothing against what is here."""
    return seen.owner and seen.relation == "diverged" and not seen.register_here and seen.unknown_to_register


def goes_alone(seen: Seen) -> bool:
    """Whether a node that is promoted has what another one may have as well, which is not there to get the rest."""
    return seen.lineage.get("shared") is True and not seen.in_sync


def outranks(seen: Seen) -> bool:
    """Whether that was promoted before this one, for certain."""
    return disputes(seen) and seen.outdated is None and seen.knew_register


def must_go(seen: Seen) -> str | None:
    """Why a node that is promoted must not be; None: it stays. What a person has to decide stops nobody's guest."""
    return None if disputes(seen) and seen.outdated is None else _unfit(seen, 0)


def ends_dispute(seen: Seen, here: str) -> bool:
    """Whether the dispute that this host has raised is over: a person has demoted it, or the register has another
    entry."""
    return seen.register_disputed == here and (_given_up(seen) or seen.relation not in (None, "diverged"))


def concedes(seen: Seen, here: str) -> bool:
    """Whether a person has demoted the host in the register, so that the one that has disputed it counts."""
    return seen.register_here and seen.register_disputed not in (None, here) and _given_up(seen)


def _given_up(seen: Seen) -> bool:
    """Whether a person has made it a secondary, or it has got the content of another owner since; not what the two have
    told each other."""
    return not seen.owner and (seen.outdated_by_hand or seen.outdated is None)


def gives_up(seen: Seen, news: bool) -> str | None:
    """Why an owner that is not promoted is to become a secondary; None: it waits, or is none.

    `news`: what the register says may be new to this node, at its start and after a promotion elsewhere. At other times
    it is not repeated: a person may have said meanwhile that what is here counts (replctl promote --force).
    """
    if not seen.owner:
        return None
    if seen.dispute is not None:
        return None  # whatever the two have told each other, a person decides
    if seen.outdated is not None:
        return seen.outdated
    return seen.stale if news and seen.relation in ("older", "diverged") else None


def is_gone(seen: Seen, here: str, active: frozenset[str] | None) -> bool:
    """Whether the primary that a copy may have heard of a moment ago is known to be gone: stopped, or fenced."""
    host = seen.register_host
    return active is not None and host not in (None, here) and host not in active and not seen.register_kept


def stays_closed(seen: Seen) -> bool:
    """Whether an owner that is promoted lets no guest in: its process was started again since."""
    return seen.owner and seen.code == _CLOSED


def others_are_gone(here: str, active: frozenset[str] | None) -> bool:
    """Whether the cluster knows that the resource runs nowhere else."""
    return active is not None and not active - {here}


def goes_on(seen: Seen, gone: bool) -> bool:
    """Whether a guest that stands still until somebody knows of the other node may go on: that one is `gone`, or was
    fenced, and nothing is known of its having gone on."""
    return seen.owner and seen.code == _SUSPENDED and seen.stale is None and seen.outdated is None and gone


def goes_on_later(seen: Seen, gone: bool) -> bool:
    """Whether a guest that runs is to run on when the loss of the link to a node that is `gone` is noticed."""
    return seen.owner and seen.code is None and seen.stale is None and seen.outdated is None and gone


def hands_over(seen: Seen, here: str, to_promote: frozenset[str], told: bool) -> bool:
    """Whether an owner that is demoted becomes a secondary at once. Only where the other one has everything, and is to
    be promoted: an owner that is stopped, or has no such copy beside it, stays the one whose content counts."""
    return seen.owner and seen.in_sync and (not told or bool(to_promote - {here}))


def lives_elsewhere(seen: Seen, here: str, active: frozenset[str] | None) -> str | None:
    """The cluster node that still has the disks, so that a failover here would lose what it has; None if there is none:
    it has handed over, is gone, or was fenced. If the cluster does not say where the resource runs (notify=false), it
    cannot be known to be gone; and one that was stopped in good order (`kept`) is not."""
    host = seen.register_host
    there = active is None or host in active or seen.register_kept
    return host if host not in (None, here) and there else None


def keeps(seen: Seen) -> bool:
    """Whether a node that is stopped is the owner whose content counts, so that its stop is not its end."""
    return seen.owner and _unfit(seen, 0) is None


def may_hand_over(seen: Seen, here: str, to_promote: frozenset[str], told: bool) -> bool:
    """Whether an owner that is demoted would hand over as soon as the pair is in sync, which it is about to be."""
    return seen.link in ("connecting", "synchronizing") and hands_over(
        replace(seen, link="in-sync"), here, to_promote, told
    )
