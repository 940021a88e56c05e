# SPDX-License-Identifier: BSD-3-Clause
"""shortage.py: room is searched for once for all writes that need it, a little at a time, and only where it may be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from replication.image import shortage
from replication.image.qcow2 import BLOCK
from replication.image.shortage import Shortage
from waiting import CHANCE_S

DEADLINE_S = 20.0
PIECE = 1 << 20


class Overlay:
    """Stale space in `pieces` ranges; the first ones of `held` are held by somebody."""

    def __init__(self, path: str, pieces: int, held: int = 0) -> None:
        self.path = path
        self.data = SimpleNamespace(counts_blocks=True)
        self.left = set(range(pieces))
        self.held = set(range(held))
        self.searches = 0
        self.steps = 0
        self.arrived = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    @property
    def stale_bytes(self) -> int:
        return len(self.left) * PIECE

    def stale_ranges(self) -> Iterator[tuple[int, int]]:
        self.searches += 1
        yield from ((at, at + 1) for at in sorted(self.left))

    def reclaim(self, _: Any, ranges: Iterator[tuple[int, int]], steps: int) -> int | None:
        assert steps == 1
        self.steps += 1
        self.arrived.set()
        assert self.go_on.wait(DEADLINE_S)
        found = next(ranges, None)
        if found is None:
            return None
        if found[0] in self.held or found[0] not in self.left:
            return 0
        self.left.remove(found[0])
        return PIECE


def of(*overlays: Overlay) -> Shortage:
    sources: list[Any] = [(overlay, overlay.reclaim) for overlay in overlays]
    return Shortage(sources)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the search sees."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(shortage, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_where_nothing_is_stale_nothing_is_searched() -> None:
    overlays = Overlay("a", 0), Overlay("b", 0)
    search = of(*overlays)
    assert [search.relieve() for _ in range(100)] == [False] * 100
    assert [overlay.searches for overlay in overlays] == [0, 0]


def test_a_write_gives_back_enough_to_go_on_and_the_next_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "_ENOUGH", 4 * PIECE)
    overlay = Overlay("a", 10)
    search = of(overlay)
    for left in (6, 2, 0):
        assert search.relieve()
        assert len(overlay.left) == left
    assert overlay.searches == 1, "one search, in parts"
    assert not search.relieve()


def test_a_long_search_is_done_in_slices(clock: SimpleNamespace) -> None:
    overlay = Overlay("a", 50, held=49)
    real = overlay.reclaim

    def slow(*arguments: Any) -> int | None:
        clock.now += 0.03
        return real(*arguments)

    search = Shortage([(overlay, slow)])  # type: ignore[list-item]
    rounds = 0
    while search.found == 0:
        before = overlay.steps
        assert search.relieve(), "what is not searched yet may have room"
        assert overlay.steps - before <= 4
        rounds += 1
    assert rounds > 10
    assert overlay.searches == 1


def test_what_cannot_be_given_back_is_not_searched_for_again_at_once(clock: SimpleNamespace) -> None:
    overlay = Overlay("a", 3, held=3)
    search = of(overlay)
    assert [search.relieve() for _ in range(50)] == [False] * 50
    assert overlay.searches == 1
    overlay.left |= {7, 8}
    assert search.relieve(), "there is more than then"
    assert overlay.searches == 2
    overlay.held.clear()
    assert not search.relieve()
    clock.now += shortage._FUTILE_S
    assert search.relieve(), "nobody holds it any more"


def test_writes_that_come_while_one_searches_wait_for_what_it_finds() -> None:
    overlay = Overlay("a", 1)
    search = of(overlay)
    overlay.go_on.clear()
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(search.relieve())) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert overlay.arrived.wait(DEADLINE_S)
    overlay.go_on.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    # Who came after the end finds nothing; none has searched the same again.
    assert True in results
    assert overlay.searches == 1
    assert search.found == PIECE


def test_a_write_waits_for_what_is_given_back_in_the_background() -> None:
    """The step holds the ranges that it gives back: a search would find nothing."""
    overlay = Overlay("a", 1)
    search = of(overlay)
    ranges = overlay.stale_ranges()
    overlay.go_on.clear()
    step = threading.Thread(target=lambda: search.in_background(lambda: overlay.reclaim(overlay, ranges, 1)))
    step.start()
    assert overlay.arrived.wait(DEADLINE_S)
    results: list[bool] = []
    write = threading.Thread(target=lambda: results.append(search.relieve()))
    write.start()
    write.join(CHANCE_S)
    assert write.is_alive()
    overlay.go_on.set()
    for thread in (step, write):
        thread.join(DEADLINE_S)
    assert results == [True]
    assert search.found == PIECE
    assert overlay.steps == 1, "it has searched for nothing itself"


def test_nobody_waits_long_for_the_search_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "WAIT_S", 0.05)
    overlay = Overlay("a", 1)
    search = of(overlay)
    overlay.go_on.clear()
    first = threading.Thread(target=search.relieve)
    first.start()
    assert overlay.arrived.wait(DEADLINE_S)
    assert not search.relieve()
    overlay.go_on.set()
    first.join(DEADLINE_S)


def test_where_blocks_are_not_counted_it_searches_though_nothing_seems_stale(clock: SimpleNamespace) -> None:
    overlay = Overlay("a", 2)
    overlay.data.counts_blocks = False
    overlay.__class__ = type("Compressed", (Overlay,), {"stale_bytes": BLOCK - 1})
    search = of(overlay)
    assert search.relieve()
    assert not overlay.left
    assert [search.relieve() for _ in range(9)] == [False] * 9
    clock.now += shortage._FUTILE_S
    search.relieve()
    assert overlay.searches == 2
