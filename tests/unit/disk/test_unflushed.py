# SPDX-License-Identifier: BSD-3-Clause
"""unflushed.py: what a flush has covered, what it has not, and what is lost with it."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lab import DEADLINE_S, wait_until
from replication.disk.unflushed import GRAIN, Loss, Unflushed
from replication.errors import DiskError

SIZE = 9000 * GRAIN + 77
"""More than two of the pages in which the map is looked through."""
BROKEN = DiskError("broken")


class Keeper:
    """Takes note of losses."""

    def __init__(self, account: Unflushed, tell: bool = False) -> None:
        self.seen: list[Loss] = []
        self.tell = tell
        account.on_loss = self.note

    def note(self, loss: Loss) -> bool:
        self.seen.append(loss)
        return self.tell


def write(account: Unflushed, offset: int, length: int = 1) -> None:
    account.end(account.begin(offset, length))


def broken() -> None:
    raise BROKEN


def good() -> None:
    """A flush that succeeds."""


@pytest.fixture
def account() -> Unflushed:
    return Unflushed(SIZE)


def test_a_flush_that_fails_loses_what_was_written_since_the_last_good_one(account: Unflushed) -> None:
    keeper = Keeper(account)
    write(account, 0, GRAIN)
    account.flush(good)
    write(account, 5 * GRAIN - 1, 2)
    write(account, SIZE - 1)
    with pytest.raises(DiskError, match="broken"):
        account.flush(broken)
    (loss,) = keeper.seen
    assert loss == Loss([(4 * GRAIN, 2 * GRAIN), (9000 * GRAIN, 77)], [], BROKEN, told=True)
    assert not keeper.seen[1:]
    account.flush(good)
    assert not account.any


def test_a_map_of_many_pages_is_looked_through_to_its_end() -> None:
    """Pages that are neighbours are looked at together, and so many at a time."""
    page = 4096 * GRAIN
    account = Unflushed(130 * page - 1)
    keeper = Keeper(account)
    write(account, 0, 130 * page - 1)
    assert account.expose()
    account.flush(good)
    assert not account.any
    assert not account.exposed
    assert not account.expose()
    places = [0, 63 * page, 64 * page - 1, 65 * page, 100 * page, 130 * page - 2]
    for place in places:
        write(account, place)
    with pytest.raises(DiskError):
        account.flush(broken)
    [loss] = keeper.seen
    found = [offset for offset, _ in loss.ranges]
    assert found == sorted({place // GRAIN * GRAIN for place in places})
    assert sum(length for _, length in loss.ranges) == len(places) * GRAIN - 1
    account.flush(good)
    assert not account.any


def test_a_write_that_ends_behind_a_flush_is_not_covered_by_it(account: Unflushed) -> None:
    keeper = Keeper(account)
    number = account.begin(0, 1)
    write(account, GRAIN)

    def flush() -> None:
        write(account, 2 * GRAIN)  # sent, and ended, behind the flush

    account.flush(flush)
    account.end(number)
    account.lose(BROKEN)
    assert keeper.seen[0].ranges == [(0, GRAIN), (2 * GRAIN, GRAIN)]


def test_a_write_under_way_when_the_flush_has_succeeded_is_unflushed_for_the_next_process(account: Unflushed) -> None:
    account.begin(0, 1)
    account.flush(good)
    assert account._bytes[0], "it may be killed now, and the write be there all the same"


@pytest.mark.parametrize("tell", [False, True], ids=["kept", "to be told"])
def test_a_loss_that_nobody_else_tells_the_next_flush_tells_once(account: Unflushed, tell: bool) -> None:
    Keeper(account, tell)
    write(account, 0)
    assert account.lose(BROKEN)
    if tell:
        with pytest.raises(DiskError, match="broken"):
            account.flush(good)
    account.flush(good)
    assert not account.lose(BROKEN), "a flush has covered it"


def test_what_was_lost_may_be_lost_once_more_until_a_flush_has_covered_it(account: Unflushed) -> None:
    """As after the start of a process: the server below may have lived on, with the writes in its cache, and die
    later."""
    keeper = Keeper(account)
    write(account, 0)
    account.expose()
    account.lose(BROKEN)
    account.lose(BROKEN)
    assert keeper.seen == [Loss([(0, GRAIN)], [(0, GRAIN)], BROKEN), Loss([(0, GRAIN)], [], BROKEN)]


def test_only_what_was_unflushed_at_a_checkpoint_is_a_loss_of_its(account: Unflushed) -> None:
    keeper = Keeper(account)
    write(account, 0)
    account.flush(good)
    write(account, GRAIN)
    assert account.expose()
    write(account, GRAIN)
    write(account, 2 * GRAIN)
    account.lose(BROKEN)
    assert keeper.seen[0] == Loss([(GRAIN, 2 * GRAIN)], [(GRAIN, GRAIN)], BROKEN)
    write(account, 3 * GRAIN)
    account.expose()
    account.flush(good)
    write(account, 3 * GRAIN)
    account.lose(BROKEN)
    assert keeper.seen[1] == Loss([(3 * GRAIN, GRAIN)], [], BROKEN), "a flush behind the checkpoint has covered it"


def test_a_flush_sent_before_a_checkpoint_covers_of_it_what_was_written_before_the_flush(account: Unflushed) -> None:
    keeper = Keeper(account)
    write(account, 0)

    def flush() -> None:
        write(account, GRAIN)
        account.expose()

    account.flush(flush)
    account.lose(BROKEN)
    assert keeper.seen[0] == Loss([(GRAIN, GRAIN)], [(GRAIN, GRAIN)], BROKEN)


def mapped(path: Path) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def test_what_is_unflushed_and_what_is_lost_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(bytes(9001))
    former = Unflushed(SIZE, mapped(path))
    write(former, 0)
    former.expose()
    write(former, GRAIN)
    former.close()
    second = Unflushed(SIZE, mapped(path))

    def killed(_: Loss) -> bool:
        raise MemoryError

    second.on_loss = killed
    with pytest.raises(MemoryError):
        second.lose(BROKEN)
    second.close()
    third = Unflushed(SIZE, mapped(path))
    keeper = Keeper(third)
    write(third, 2 * GRAIN)
    third.lose(BROKEN, all_of_it=False)
    assert keeper.seen == [Loss([(0, 2 * GRAIN)], [(0, GRAIN)], BROKEN)]
    third.lose(BROKEN)
    assert keeper.seen[1:] == [Loss([(0, 3 * GRAIN)], [], BROKEN)]
    third.flush(good)
    assert not any(path.read_bytes())


@pytest.mark.parametrize("tell", [True, False], ids=["of a guest", "of a secondary"])
def test_a_failed_flush_is_told_once_more_by_the_process_that_follows_a_killed_one(tmp_path: Path, tell: bool) -> None:
    """Nobody knows whether the answer was still sent."""
    path = tmp_path / "map"
    path.write_bytes(bytes(9001))
    former = Unflushed(SIZE, mapped(path))
    Keeper(former, tell)
    write(former, 3 * GRAIN)
    with pytest.raises(DiskError, match="broken"):
        former.flush(broken)
    former.close()
    second = Unflushed(SIZE, mapped(path))
    if tell:
        with pytest.raises(DiskError, match="may not have told"):
            second.flush(good)
    second.flush(good)
    second.close()
    assert not any(path.read_bytes())
    Unflushed(SIZE, mapped(path)).flush(good)


def test_a_failed_flush_that_a_later_one_has_followed_was_told(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(bytes(9001))
    former = Unflushed(SIZE, mapped(path))
    Keeper(former, tell=True)
    write(former, 3 * GRAIN)
    with pytest.raises(DiskError, match="broken"):
        former.flush(broken)
    former.flush(good)
    former.close()
    Unflushed(SIZE, mapped(path)).flush(good)


def test_those_who_wait_for_one_flush_share_its_failure_and_its_success(account: Unflushed) -> None:
    keeper = Keeper(account)
    at_work, go_on = threading.Event(), threading.Event()
    flushes: list[str] = []

    def first() -> None:
        flushes.append("first")
        at_work.set()
        assert go_on.wait(DEADLINE_S)

    def second() -> None:
        flushes.append("second")
        raise BROKEN

    write(account, 0)
    with ThreadPoolExecutor(4) as pool:
        leader = pool.submit(account.flush, first)
        assert at_work.wait(DEADLINE_S)
        write(account, GRAIN)
        others = [pool.submit(account.flush, second) for _ in range(3)]
        waiters: Any = account._changed._waiters  # type: ignore[attr-defined]
        wait_until(lambda: len(waiters) == 3, "the others wait")
        go_on.set()
        leader.result(DEADLINE_S)
        for other in others:
            with pytest.raises(DiskError, match="broken"):
                other.result(DEADLINE_S)
    assert flushes == ["first", "second"]
    assert [loss.ranges for loss in keeper.seen] == [[(GRAIN, GRAIN)]]


places = st.one_of(st.integers(0, 20), st.integers(4090, 4100), st.integers(8990, 9000))


class Histories(RuleBasedStateMachine):
    """Writes, flushes, checkpoints and losses one after the other, against sets of grains."""

    def __init__(self) -> None:
        super().__init__()
        self.account = Unflushed(SIZE)
        self.keeper = Keeper(self.account)
        self.unflushed: set[int] = set()
        self.exposed: set[int] = set()

    @rule(grain=places, count=st.integers(1, 5))
    def write(self, grain: int, count: int) -> None:
        count = min(count, 9001 - grain)
        write(self.account, grain * GRAIN, min(count * GRAIN, SIZE - grain * GRAIN))
        self.unflushed |= set(range(grain, grain + count))

    @rule()
    def flush(self) -> None:
        self.account.flush(good)
        self.unflushed.clear()
        self.exposed.clear()

    @rule()
    def checkpoint(self) -> None:
        assert self.account.expose() == bool(self.unflushed)
        self.exposed = set(self.unflushed)

    @rule()
    def lose(self) -> None:
        self.keeper.seen.clear()
        assert self.account.lose(BROKEN) == bool(self.unflushed)
        for loss in self.keeper.seen:
            assert self.grains(loss.ranges) == self.unflushed
            assert self.grains(loss.exposed) == self.exposed
        self.exposed.clear()

    @staticmethod
    def grains(ranges: list[tuple[int, int]]) -> set[int]:
        return {grain for offset, length in ranges for grain in range(offset // GRAIN, -(-(offset + length) // GRAIN))}

    @invariant()
    def the_bytes_are_as_the_model(self) -> None:
        assert set(self.account._states.nonzero()[0].tolist()) == self.unflushed


Histories.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestHistories = Histories.TestCase
