# SPDX-License-Identifier: BSD-3-Clause
"""Host A's half of scripts/ft-agent, as far as it needs no QEMU: the times, and the command line."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from checkout import REPOSITORY
from replication.machine.pauses import Pauses, percentile, summary, table
from waiting import DEADLINE_S


def pauses(epoch: int, pause_ms: float) -> Pauses:
    return Pauses(epoch, 80_000_000, pause_ms, 1.0, 0.5, pause_ms - 2.0, 0.5, 100.0, 50.0)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7.0], 99, 7.0), ([3.0, 1.0, 2.0], 50, 2.0), (range(1, 101), 99, 99), (range(1, 201), 99, 198), ([1.0], 0, 1.0)],
)
def test_a_percentile_is_a_value_that_there_was(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_the_summary_has_median_p99_and_largest() -> None:
    found = summary([pauses(number, 10.0 + number) for number in range(5)])
    assert found["epochs"] == 5
    assert found["pause_ms"] == {"median": 12.0, "p99": 14.0, "max": 14.0}
    assert summary([]) == {"epochs": 0}


@pytest.mark.parametrize("count", [0, 3])
def test_the_table_can_be_printed(count: int) -> None:
    text = io.StringIO()
    Console(file=text, width=100).print(table([pauses(number, 4.25) for number in range(count)]))
    assert f"{count} epochs" in text.getvalue()
    assert ("4.2" in text.getvalue()) == (count > 0)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("protect", "--control", "c", "--qmp", "q"),
        ("protect", "--control", "c", "--qmp", "q", "--receiver", "r", "--interval", "0"),
        ("receive", "--control", "c", "--store", "s", "--listen", "l", "--state-limit", "much"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).returncode == 2


def test_a_machine_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    done = run("protect", "--control", "c", "--qmp", str(tmp_path / "none"), "--receiver", "r")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert str(tmp_path / "none") in done.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [REPOSITORY / "scripts/ft-agent", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
