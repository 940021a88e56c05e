# SPDX-License-Identifier: BSD-3-Clause
"""asleep.py, with a folder in place of /proc/self/task, and with the threads of this process."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from replication.server import asleep
from waiting import DEADLINE_S

SHORT_S = 0.02


class Tasks:
    """The threads of a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, task: int, state: str, switches: int) -> None:
        (self._folder / str(task)).mkdir(exist_ok=True)
        (self._folder / str(task) / "status").write_text(
            f"Name:\tnbdkit\nState:\t{state} (a word)\nTgid:\t1\nvoluntary_ctxt_switches:\t{switches}\n"
            "nonvoluntary_ctxt_switches:\t7\n"
        )


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tasks:
    monkeypatch.setattr(asleep, "_TASKS", str(tmp_path))
    return Tasks(tmp_path)


def test_threads_that_sleep_and_are_not_switched_are_asleep(tasks: Tasks) -> None:
    tasks.put(1, "S", 3)
    tasks.put(2, "D", 4)
    assert asleep.fell_asleep(DEADLINE_S)


def test_a_thread_that_could_run_is_not(tasks: Tasks) -> None:
    tasks.put(1, "S", 3)
    tasks.put(2, "R", 4)
    assert not asleep.fell_asleep(SHORT_S)


def test_a_thread_that_has_run_between_two_looks_is_not(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    real, looks = asleep._look, 0

    def look() -> dict[str, bytes] | None:
        nonlocal looks
        looks += 1
        tasks.put(1, "S", looks)
        return real()

    monkeypatch.setattr(asleep, "_look", look)
    assert not asleep.fell_asleep(SHORT_S)
    assert looks > 1


def test_it_is_waited_for_that_they_fall_asleep(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    real, looks = asleep._look, 0

    def look() -> dict[str, bytes] | None:
        nonlocal looks
        looks += 1
        tasks.put(1, "R" if looks < 4 else "S", min(looks, 6))
        return real()

    monkeypatch.setattr(asleep, "_look", look)
    assert asleep.fell_asleep(DEADLINE_S)
    assert looks == 7


def test_a_thread_that_ends_meanwhile_does_not_matter(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    assert asleep.fell_asleep(DEADLINE_S)


def test_threads_of_python_do_not_matter(tasks: Tasks) -> None:
    tasks.put(threading.get_native_id(), "R", 1)
    assert asleep.fell_asleep(DEADLINE_S)


def test_the_kernel_says_what_is_looked_for() -> None:
    assert asleep.fell_asleep(DEADLINE_S)
