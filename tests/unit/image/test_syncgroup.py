# SPDX-License-Identifier: BSD-3-Clause
"""syncgroup.py: which sync answers which request. The sync is a function that the test holds and lets go."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from replication.errors import DiskError, StillWaiting
from replication.image import syncgroup
from replication.image.layer import Layer, LayerError, on_layer
from replication.image.syncgroup import SyncGroup
from waiting import DEADLINE_S, wait_until


class Sync:
    """The thing shared: every run waits until the test ends it, with or without a failure."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.count = 0
        self.at_work = 0
        self._ends: list[BaseException | None] = []
        self._may_end = threading.Semaphore(0)

    def __call__(self) -> None:
        self.count += 1
        self.at_work += 1
        assert self.at_work == 1, "one at a time"
        self.begun.release()
        assert self._may_end.acquire(timeout=DEADLINE_S)
        self.at_work -= 1
        failure = self._ends.pop(0)
        if failure is not None:
            raise failure

    def wait_begun(self) -> None:
        assert self.begun.acquire(timeout=DEADLINE_S)

    def end(self, failure: BaseException | None = None) -> None:
        self._ends.append(failure)
        self._may_end.release()


class Bench:
    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.sync = Sync()
        self.group = SyncGroup(self.sync)
        self._pool = pool

    def settle(self) -> Future[None]:
        return self._pool.submit(self.group.settle)

    def run(self) -> Future[None]:
        """A request that is asking for a sync; returns when it waits or has begun one."""
        waiting = self.waiting
        begun = self.sync.count
        future = self._pool.submit(self.group.run)
        wait_until(lambda: self.waiting > waiting or self.sync.count > begun, "the request has asked")
        return future

    @property
    def waiting(self) -> int:
        with self.group._changed:
            return len(self.group._changed._waiters)  # type: ignore[attr-defined]


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ThreadPoolExecutor(12) as pool:
        yield Bench(pool)


def test_a_request_alone_returns_when_its_sync_has_ended(bench: Bench) -> None:
    request = bench.run()
    bench.sync.wait_begun()
    assert not request.done()
    bench.sync.end()
    request.result(DEADLINE_S)
    assert bench.sync.count == 1
    again = bench.run()
    bench.sync.wait_begun()
    bench.sync.end()
    again.result(DEADLINE_S)
    assert bench.sync.count == 2


def test_a_sync_that_began_before_the_request_does_not_count(bench: Bench) -> None:
    first = bench.run()
    bench.sync.wait_begun()
    second = bench.run()
    bench.sync.end()
    first.result(DEADLINE_S)
    # The second one's own has begun, and it waits for that one.
    bench.sync.wait_begun()
    assert not second.done()
    assert bench.sync.count == 2
    bench.sync.end()
    second.result(DEADLINE_S)


def test_all_that_come_during_a_sync_share_the_next(bench: Bench) -> None:
    first = bench.run()
    bench.sync.wait_begun()
    others = [bench.run() for _ in range(8)]
    bench.sync.end()
    first.result(DEADLINE_S)
    bench.sync.wait_begun()
    assert not any(other.done() for other in others)
    late = bench.run()
    bench.sync.end()
    for other in others:
        other.result(DEADLINE_S)
    bench.sync.wait_begun()
    assert not late.done(), "it came when the shared one had begun"
    bench.sync.end()
    late.result(DEADLINE_S)
    assert bench.sync.count == 3


def test_a_failed_sync_fails_who_ran_it_who_waits_and_all_later_ones(bench: Bench) -> None:
    first = bench.run()
    bench.sync.wait_begun()
    others = [bench.run() for _ in range(3)]
    failure = DiskError("the disk is broken", errno.ENOSPC)
    bench.sync.end(failure)
    for request in (first, *others):
        with pytest.raises(DiskError, match=r"^the disk is broken$") as refusal:
            request.result(DEADLINE_S)
        assert refusal.value.errno == errno.ENOSPC
    for later in (bench.group.run, bench.group.check):
        with pytest.raises(DiskError, match=r"^the disk is broken$") as refusal:
            later()
        assert refusal.value.errno == errno.ENOSPC
    assert bench.sync.count == 1, "nobody tries again what cannot be known to have worked"


def test_every_later_one_is_told_of_the_same_image(bench: Bench) -> None:
    """Who learns of a failure depends on the image."""
    first = bench.run()
    bench.sync.wait_begun()
    bench.sync.end(LayerError(DiskError("broken", errno.ENOSPC), Layer.SECONDARY, "flush", 1, 2))
    for again in (lambda: first.result(DEADLINE_S), bench.group.run, bench.group.check):
        with pytest.raises(LayerError, match=r"^secondary disk: broken$") as refusal, on_layer(Layer.ACTIVE, "x", 3, 4):
            again()
        told = refusal.value
        assert (told.layer, told.operation, told.offset, told.length) == (Layer.SECONDARY, "flush", 1, 2)
        assert told.errno == errno.ENOSPC


def test_a_sync_that_a_defect_interrupts_is_a_failure_too(bench: Bench) -> None:
    first = bench.run()
    bench.sync.wait_begun()
    other = bench.run()
    bench.sync.end(ZeroDivisionError("defect"))
    with pytest.raises(ZeroDivisionError):
        first.result(DEADLINE_S)
    with pytest.raises(DiskError, match="interrupted by an error of the program"):
        other.result(DEADLINE_S)
    with pytest.raises(DiskError, match="interrupted by an error of the program"):
        bench.group.check()


def test_a_failure_elsewhere_fails_the_group_and_the_first_one_is_kept(bench: Bench) -> None:
    bench.group.check()
    request = bench.run()
    bench.sync.wait_begun()
    bench.group.fail(DiskError("first", errno.ENOSPC))
    bench.group.fail(DiskError("second"))
    with pytest.raises(DiskError, match=r"^first$") as refusal:
        bench.group.run()
    assert refusal.value.errno == errno.ENOSPC
    bench.sync.end()
    request.result(DEADLINE_S)
    with pytest.raises(DiskError, match=r"^first$"):
        bench.group.run()
    assert bench.sync.count == 1


def test_a_wait_for_a_sync_that_hangs_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.run()
    bench.sync.wait_begun()
    monkeypatch.setattr(syncgroup, "_WAIT_S", 0.01)
    with pytest.raises(StillWaiting, match="a sync of another request has been at work"):
        bench.group.run()
    with pytest.raises(StillWaiting):
        bench.group.settle()  # who relies on what that request has written
    bench.sync.end()
    first.result(DEADLINE_S)
    bench.group.check()
    assert bench.sync.count == 1
    owed = bench.settle()
    bench.sync.wait_begun()
    bench.sync.end()
    owed.result(DEADLINE_S)
    assert bench.sync.count == 2, "the sync that had begun before that request says nothing of it"
    bench.group.settle()
    assert bench.sync.count == 2
    request = bench.run()
    bench.sync.wait_begun()
    bench.sync.end()
    request.result(DEADLINE_S)
