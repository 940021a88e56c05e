# SPDX-License-Identifier: BSD-3-Clause
"""The number of an epoch that was held names one state of a machine for ever: ft-agent knows its units by it."""

from __future__ import annotations

import pytest

from lab import Lab
from nodes import Pair, in_sync
from replication.record.boot import BOOT_ID_ENVIRONMENT


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """In sync, with a checkpoint."""
    made = lab.pair()
    made.start_replication()
    in_sync(made.primary)
    made.primary.checkpoint()
    return made


@pytest.mark.parametrize("end", ["abort", "kill", "host"])
def test_a_number_that_was_held_and_given_up_is_not_given_to_another_epoch(pair: Pair, end: str) -> None:
    held = pair.primary.execute("replication-checkpoint", hold=True)["epoch"]
    if end == "abort":
        pair.primary.execute("replication-checkpoint-abort", epoch=held)
    else:
        pair.primary.kill()
        if end == "host":
            pair.primary.extra_environment[BOOT_ID_ENVIRONMENT] = "another boot"
        pair.primary.start()
    in_sync(pair.primary)
    assert pair.secondary.status()["epoch"] == held - 1
    assert pair.primary.checkpoint()["epoch"] > held
    assert pair.secondary.status()["epoch"] > held


def test_a_secondary_says_whose_checkpoint_its_last_one_is(pair: Pair) -> None:
    held = pair.primary.execute("replication-checkpoint", hold=True)["epoch"]
    assert pair.secondary.status()["checkpoint-of-primary"] is True
    pair.secondary.checkpoint()  # an operator's, who gets the number that is held
    assert (pair.secondary.status()["epoch"], pair.secondary.status()["checkpoint-of-primary"]) == (held, False)
