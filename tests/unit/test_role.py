# SPDX-License-Identifier: BSD-3-Clause
"""Who may own the disks and who may not: the table of roles, scores and verdicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from replication.reason import Reason
from replication.role import BEHIND, IN_STEP, NEVER, NEW, OWNER, UNSURE_OWNER, Standing, judge
from replication.stage import Mode, Stage

SECONDARY = Standing(Mode.SECONDARY, Stage.RUNNING, None, None, True, False, True, True, 0.0)
PRIMARY = Standing(Mode.PRIMARY, Stage.RUNNING, None, None, True, False, True, True, 0.0)
RESTARTED = replace(PRIMARY, met=False)


@pytest.mark.parametrize(
    ("standing", "role", "score", "may_run", "reason"),
    [
        (PRIMARY, "primary", OWNER, True, None),
        (replace(PRIMARY, stage=Stage.NONE, paired_before=False, alone=True, met=False), "primary", OWNER, True, None),
        (RESTARTED, "primary", UNSURE_OWNER, None, Reason.PEER_UNKNOWN),
        (replace(RESTARTED, alone=True), "primary", OWNER, True, None),
        (replace(SECONDARY, stage=Stage.FAILOVER, alone=True), "primary", OWNER, True, None),
        (replace(SECONDARY, stage=Stage.DONE, met=False), "primary", UNSURE_OWNER, None, Reason.PEER_UNKNOWN),
        (
            replace(SECONDARY, stage=Stage.FAILOVER_FAILED, inconsistent="x", alone=True),
            "primary",
            NEVER,
            False,
            Reason.NO_CHECKPOINT,
        ),
        (replace(PRIMARY, outdated="x"), "primary", NEVER, False, Reason.OUTDATED),
        (replace(SECONDARY, outdated="x"), "secondary", NEVER, False, Reason.IS_SECONDARY),
        (replace(PRIMARY, closed="x"), "primary", OWNER, False, Reason.NOT_PROMOTED),
        (replace(RESTARTED, closed="x"), "primary", UNSURE_OWNER, False, Reason.NOT_PROMOTED),
        (replace(PRIMARY, suspended="x"), "primary", UNSURE_OWNER, False, Reason.SUSPENDED),
        (SECONDARY, "secondary", IN_STEP, False, Reason.IS_SECONDARY),
        (replace(SECONDARY, checkpoint_age_s=7.9), "secondary", IN_STEP - 7, False, Reason.IS_SECONDARY),
        (replace(SECONDARY, in_step=False, checkpoint_age_s=None), "secondary", BEHIND, False, Reason.IS_SECONDARY),
        (replace(SECONDARY, inconsistent="x"), "secondary", NEVER, False, Reason.IS_SECONDARY),
        (replace(SECONDARY, stage=Stage.NONE), "secondary", NEVER, False, Reason.IS_SECONDARY),
        (replace(SECONDARY, paired_before=False), "secondary", NEW, False, Reason.IS_SECONDARY),
    ],
)
def test_judgement(standing: Standing, role: str, score: int, may_run: bool | None, reason: Reason | None) -> None:
    judged = judge(standing)
    assert (judged.role, judged.score, judged.may_run, judged.reason) == (role, score, may_run, reason)
    shown: dict[str, Any] = judged.to_json()
    assert (shown["may-run"], shown.get("code")) == (may_run, reason and reason.value)
    assert bool(shown.get("reason")) == (reason is not None)


def test_who_lacks_something_is_never_before_who_does_not() -> None:
    """However old the checkpoint of the one, and new that of the other."""
    oldest = replace(SECONDARY, checkpoint_age_s=1e9)
    newest = replace(SECONDARY, in_step=False)
    assert judge(oldest).score > judge(newest).score > judge(replace(newest, checkpoint_age_s=1e9)).score > NEW > NEVER
