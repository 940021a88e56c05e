# SPDX-License-Identifier: BSD-3-Clause
"""The power-cut simulator (simulator.py says what it verifies), and that it notices what it is there for.

Each history has a process of its own: its node runs there, with the seam, the boot id and threads that are killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from power.faults import FAULTS

_REPOSITORY = Path(__file__).resolve().parent.parent.parent
_SAMPLES = 80
_SEEDS = range(1, 29)
_TRIES = (28, *range(20, 28), *range(29, 40))
"""Histories in one of which a mistake must be noticed; most are in the first."""
_FEW, _MANY = 100, 600
"""Cuts in the first of them, and in the others: what shows only while a record is written shows in 1 of 10 histories
with few cuts, and in 3 of 4 with many. It differs from run to run, as threads are killed."""
_DEADLINE_S = 90


def simulate(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the simulator."""
    return subprocess.run(
        [sys.executable, "-m", "power.simulator", *map(str, arguments)],
        cwd=_REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{_REPOSITORY}:{_REPOSITORY / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize("seed", _SEEDS)
def test_after_a_power_cut_everything_that_was_promised_is_there(seed: int) -> None:
    done = simulate(seed, _SAMPLES)
    assert done.returncode == 0, done.stderr
    found = dict(item.split("=") for item in done.stdout.split())
    assert sum(map(int, found.values())) == _SAMPLES
    assert set(found) <= {"none", "running", "failover", "done"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_noticed(fault: str) -> None:
    for seed in _TRIES:
        done = simulate(seed, _FEW if seed == _TRIES[0] else _MANY, fault)
        if done.returncode:
            assert "power.verify.Violation: " in done.stderr
            return
    pytest.fail(f"{fault}: {len(_TRIES)} histories have not shown it")
