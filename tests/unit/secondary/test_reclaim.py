# SPDX-License-Identifier: BSD-3-Clause
"""When the space that checkpoints leave behind is given back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from replication.order.gate import Gate
from replication.secondary import reclaim
from replication.secondary.reclaim import Reclaimer
from replication.stage import Stage
from waiting import wait_until

DEADLINE_S = 20.0


class Overlay:
    """Stale space in `pieces` pieces."""

    path = "overlay"

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def stale_ranges(self) -> Iterator[tuple[int, int]]:
        yield from ((at, at + 1) for at in range(self.pieces))


class Stack:
    """A stack and its room: notes when it was asked to give back; a step takes `step_s`."""

    def __init__(self, pieces: int, step_s: float = 0.0) -> None:
        self.active, self.hidden, self.room = Overlay(pieces), Overlay(0), self
        self.begun: list[float] = []
        self.step_s = step_s
        self.asked = threading.Event()

    def reclaim_in_background(self, overlay: Overlay, ranges: Iterator[tuple[int, int]], steps: int) -> int | None:
        if overlay is self.hidden:
            return None
        self.begun.append(time.monotonic())
        self.asked.set()
        time.sleep(self.step_s)
        return 1 if all(next(ranges, None) is not None for _ in range(steps)) else None


@pytest.fixture
def at_work(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """A Reclaimer that has done with what it found at its start, and its Stack."""
    stack = Stack(**getattr(request, "param", {"pieces": 0}))
    reclaimer = Reclaimer(Gate(), lambda: Stage.RUNNING)
    stacks: Any = [stack]
    reclaimer.start(stacks)
    assert stack.asked.wait(DEADLINE_S)
    yield SimpleNamespace(stack=stack, reclaimer=reclaimer)
    reclaimer.stop(DEADLINE_S)
    assert not reclaimer._worker.alive


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "AFTER_S", 0.3)


@pytest.mark.usefixtures("_quick")
def test_space_is_given_back_some_time_after_the_last_checkpoint(
    at_work: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many times what is slept between two of them, which on a busy machine may be longer.
    monkeypatch.setattr(reclaim, "AFTER_S", 2.0)
    for _ in range(5):
        last = time.monotonic()
        at_work.reclaimer.wake()
        time.sleep(0.1)
    wait_until(lambda: at_work.stack.begun[-1] > last, "it is given back")
    # A machine that has stood still between two of them has given something back before.
    assert min(begun for begun in at_work.stack.begun if begun > last) >= last + reclaim.AFTER_S


@pytest.mark.usefixtures("_quick")
def test_checkpoint_after_checkpoint_does_not_keep_the_space_for_ever(
    at_work: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaim, "AFTER_S", DEADLINE_S)
    monkeypatch.setattr(reclaim, "LATEST_S", 0.2)
    at_work.stack.asked.clear()
    deadline = time.monotonic() + DEADLINE_S / 2
    while not at_work.stack.asked.is_set():
        assert time.monotonic() < deadline, "nothing is given back as long as there are checkpoints"
        at_work.reclaimer.wake()
        at_work.stack.asked.wait(0.02)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("at_work", [{"pieces": 40, "step_s": 0.02}], indirect=True)
def test_giving_back_leaves_most_of_the_time_to_the_guests(at_work: SimpleNamespace) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while len(at_work.stack.begun) < 11:
        assert time.monotonic() < deadline, "giving back does not go on"
        time.sleep(0.01)
    gaps = [after - before for before, after in zip(at_work.stack.begun, at_work.stack.begun[1:], strict=False)]
    assert min(gaps) >= reclaim._SHARE * at_work.stack.step_s
