# SPDX-License-Identifier: BSD-3-Clause
"""1,000 kills; `make torture SEED=...` does as many more as one likes. What is verified stands in harness.py."""

from __future__ import annotations

import re

import pytest

from checkout import REPOSITORY
from torture.harness import KILLS_PER_HISTORY, PRIMARY_EVERY, history_of, run_all, told
from torture.points import ALL_POINTS, ELSEWHERE, RECOVERY_POINTS, SECONDARY_POINTS
from torture.secondary_history import OWED

SEED = "1"
BATCHES = 5
HISTORIES = 10
"""In one batch: enough that each point is owed by one of them."""


def test_the_harness_knows_every_pause_point_of_the_product() -> None:
    found = set()
    for path in (REPOSITORY / "replication").rglob("*.py"):
        if path.parent.name == "machine":
            continue
        calls = re.findall(r"\bpause\(([^)]*)\)", path.read_text())
        found |= {call.strip("\"'") for call in calls if call.startswith(("'", '"'))}
        strange = [call for call in calls if not call.startswith(("'", '"')) and path.name != "pause.py"]
        assert not strange, f"{path}: pause() wants a literal name, so that it can be found: {strange}"
    assert found == {point.name for point in ALL_POINTS} | set(ELSEWHERE)
    assert set(RECOVERY_POINTS) <= {point.name for point in SECONDARY_POINTS}


@pytest.mark.parametrize("number", [*range(len(SECONDARY_POINTS) // OWED), PRIMARY_EVERY - 1])
def test_a_history_kills_at_all_that_it_owes_without_chance(number: int) -> None:
    history = history_of(SEED, number, kills=0)
    outcome = history.run()
    assert outcome.failure is None, outcome.failure
    assert history.owed
    assert set(history.owed) <= set(outcome.points)


@pytest.mark.timeout(400)  # a minute on an idle machine; on a loaded one it is long, but no failure
@pytest.mark.parametrize("batch", range(BATCHES), ids=lambda batch: f"kills-{200 * batch + 1}-to-{200 * batch + 200}")
def test_a_process_killed_anywhere_goes_on_where_it_was(batch: int) -> None:
    numbers = range(batch * HISTORIES, (batch + 1) * HISTORIES)
    tally = run_all(SEED, numbers, lambda tally: None)
    assert not tally.failed, "\n\n".join(told(SEED, outcome) for outcome in tally.failed)
    assert tally.kills >= HISTORIES * KILLS_PER_HISTORY == 1000 // BATCHES
    missed = {point.name for point in ALL_POINTS} - set(tally.points)
    assert not missed, f"nothing was killed at {missed}, but at {dict(tally.points)}"
