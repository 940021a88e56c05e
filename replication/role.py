# SPDX-License-Identifier: BSD-3-Clause
"""The role of a node, how good an owner it would be, and whether a guest may run on it: what query-role answers.

A role is what is left of mode and stage for who has to decide about owners: the primary owns the disks, the secondary
keeps a copy of them. A promoted secondary owns them, in whatever mode it is.

The score is for a manager that compares nodes. Higher is better, and 0 is never to be promoted:

    10000           owns the disks, and nobody else can have gone on from them without being seen
    5000            owns the disks, but has not met the other node since it was started, which may have gone on
    501 to 1000     a secondary that is in step, or was when the link was lost: 1000 less the age of its checkpoint
    101 to 500      a secondary with a valid checkpoint that lacks something: 500 less the age
    10              a secondary that never had a primary
    0               not running, without a valid checkpoint, or outdated
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from replication.reason import Reason
from replication.stage import Mode, Stage

OWNER, UNSURE_OWNER, IN_STEP, BEHIND, NEW, NEVER = 10000, 5000, 1000, 500, 10, 0
AGE_MAX_S = 499
"""The age of a checkpoint that makes no more difference."""
_BEHIND_AGE_MAX_S = 399

PRIMARY, SECONDARY = "primary", "secondary"
ROLES = (PRIMARY, SECONDARY)


@dataclass(frozen=True)
class Standing:
    """What a node knows of itself."""

    mode: Mode
    stage: Stage
    inconsistent: str | None
    """Why there is no valid checkpoint."""
    outdated: str | None
    """Why it is outdated."""
    paired_before: bool
    """It was part of a pair at some time."""
    alone: bool
    """No other node has its content, so none can go on from it."""
    met: bool
    """This process has come to an agreement with the other node."""
    in_step: bool
    checkpoint_age_s: float | None
    closed: str | None = None
    """Why guests cannot open their exports."""
    suspended: str | None = None
    """Why its guest stands still."""
    passes_on: bool = False
    """Whether it passes requests on to the owner, which it hears (passing.py)."""


@dataclass(frozen=True)
class Judgement:
    """What follows from it. `may_run` is None when this node cannot tell; then, and when it is False, there is a
    reason."""

    role: str
    score: int
    may_run: bool | None
    reason: Reason | None = None
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """As query-role answers."""
        why = {} if self.reason is None else {"code": self.reason.value, "reason": self.text}
        return {"role": self.role, "score": self.score, "may-run": self.may_run, **why}


def is_owner(mode: Mode, stage: Stage) -> bool:
    """Whether a node in that mode and stage owns its disks."""
    return mode is Mode.PRIMARY or stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE)


def judge(standing: Standing) -> Judgement:
    """The role, the score, and whether a guest may run."""
    if not is_owner(standing.mode, standing.stage):
        return _secondary(standing)
    if standing.outdated is not None:
        return Judgement(PRIMARY, NEVER, False, Reason.OUTDATED, f"this node is outdated ({standing.outdated})")
    if standing.inconsistent is not None:
        text = f"there is no valid checkpoint ({standing.inconsistent})"
        return Judgement(PRIMARY, NEVER, False, Reason.NO_CHECKPOINT, text)
    if standing.closed is not None:
        score = OWNER if standing.alone or standing.met else UNSURE_OWNER
        return Judgement(PRIMARY, score, False, Reason.NOT_PROMOTED, standing.closed)
    if standing.suspended is not None:
        return Judgement(PRIMARY, UNSURE_OWNER, False, Reason.SUSPENDED, standing.suspended)
    if standing.alone or standing.met:
        return Judgement(PRIMARY, OWNER, True)
    text = "the other node has the same content, may have gone on from it, and was not reached since this one started"
    return Judgement(PRIMARY, UNSURE_OWNER, None, Reason.PEER_UNKNOWN, text)


def _secondary(standing: Standing) -> Judgement:
    if standing.passes_on:
        text = "this secondary passes a guest's requests on to the owner, and cannot know whether the guest runs there"
        return Judgement(SECONDARY, _score(standing), None, Reason.PASSES_ON, text)
    text = "this is a secondary: the guest runs where the disks are owned"
    return Judgement(SECONDARY, _score(standing), False, Reason.IS_SECONDARY, text)


def _score(standing: Standing) -> int:
    if standing.stage is Stage.NONE or standing.inconsistent is not None or standing.outdated is not None:
        return NEVER
    if not standing.paired_before:
        return NEW
    age_s = standing.checkpoint_age_s or 0.0
    if standing.in_step:
        return IN_STEP - min(int(age_s), AGE_MAX_S)
    return BEHIND - min(int(age_s), _BEHIND_AGE_MAX_S)
