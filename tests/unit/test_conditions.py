# SPDX-License-Identifier: BSD-3-Clause
"""Conditions of a failover against what is known on the secondary."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replication.conditions import Conditions, Outlook
from replication.errors import CommandError
from replication.reason import Reason

GOOD = Outlook(in_step=True, left_well=True, checkpoint_age_s=2.0, active_bytes=0, hidden_bytes=4096)
LOSSLESS = Conditions(lossless=True)


@pytest.mark.parametrize(
    ("outlook", "conditions", "reason"),
    [
        (GOOD, Conditions(2.0, True, True), None),
        (GOOD, Conditions(1.9), Reason.TOO_OLD),
        (replace(GOOD, checkpoint_age_s=None), Conditions(1e9), Reason.TOO_OLD),
        (replace(GOOD, in_step=False), Conditions(2.0), None),
        (replace(GOOD, in_step=False), Conditions(only_in_sync=True), Reason.NOT_IN_SYNC),
        (replace(GOOD, left_well=False), Conditions(only_in_sync=True), None),
        (replace(GOOD, left_well=False), LOSSLESS, Reason.NOT_LOSSLESS),
        (replace(GOOD, in_step=False), LOSSLESS, Reason.NOT_LOSSLESS),
        (replace(GOOD, active_bytes=1), LOSSLESS, Reason.NOT_LOSSLESS),
        (replace(GOOD, active_bytes=1, hidden_bytes=0), LOSSLESS, None),
        (replace(GOOD, primary="a"), Conditions(), None),
        (replace(GOOD, primary="a"), Conditions(no_primary=True), Reason.HAS_PRIMARY),
        (GOOD, Conditions(no_primary=True), None),
    ],
)
def test_conditions(outlook: Outlook, conditions: Conditions, reason: Reason | None) -> None:
    if reason is None:
        outlook.check(conditions)
        return
    with pytest.raises(CommandError, match="Failover is refused") as refused:
        outlook.check(conditions)
    assert refused.value.reason is reason
