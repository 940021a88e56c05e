# SPDX-License-Identifier: BSD-3-Clause
"""Requests that stand still: they wait, fail, go on, and never outlive the process."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from replication.errors import DiskError
from replication.order import standstill
from replication.order.latency import Latency
from replication.order.standstill import Standstill
from waiting import DEADLINE_S, wait_until


class Request:
    """One that stands still, in a thread."""

    def __init__(self, still: Standstill, reads: bool = False) -> None:
        self.error: int | None = None
        self.gone = threading.Event()
        self._still = still
        self._reads = reads
        self._thread = threading.Thread(target=self._run, daemon=True)
        before = still.waiting
        self._thread.start()
        wait_until(lambda: still.waiting > before or not self._thread.is_alive(), "it waits, or is over")

    def _run(self) -> None:
        try:
            self._still.stand(Latency(), self._still.era, self._reads, self.gone.is_set)
        except DiskError as error:
            self.error = error.errno

    def ended(self) -> int | None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        return self.error


@pytest.mark.parametrize(
    ("how", "number"),
    [
        (lambda still: still.over(), None),
        (lambda still: still.end(), errno.ESHUTDOWN),
        (lambda still: still.begin("later", fails=True), errno.EIO),
        (lambda still: still.turn_away("it was demoted"), errno.EIO),
        (lambda still: (still.turn_away("it was demoted"), still.over()), errno.EIO),
    ],
    ids=["over", "end", "fails", "turned-away", "turned-away-and-over"],
)
def test_what_ends_a_wait(how: Callable[[Standstill], None], number: int | None) -> None:
    still = Standstill()
    assert not still.on
    assert still.why is None
    still.begin("because", fails=False)
    assert still.on
    assert still.why == "because"
    requests = [Request(still) for _ in range(3)]
    assert still.waiting == 3
    how(still)
    assert [request.ended() for request in requests] == [number] * 3
    assert still.waiting == 0


def test_writes_only() -> None:
    still = Standstill()
    still.begin("because", fails=False)
    read = Request(still, reads=True)
    assert (still.on, still.reads_on) == (True, True)
    still.begin("another", fails=False, writes_only=True)
    assert (still.on, still.reads_on) == (True, False)
    assert read.ended() is None
    write = Request(still)
    assert still.waiting == 1
    still.over()
    assert write.ended() is None
    assert (still.on, still.reads_on) == (False, False)


def test_after_the_end_nobody_waits() -> None:
    still = Standstill()
    still.end()
    still.begin("too late", fails=False)
    assert Request(still).ended() == errno.ESHUTDOWN


def test_a_new_reason_is_waited_for_as_well() -> None:
    still = Standstill()
    still.begin("one", fails=False)
    request = Request(still)
    still.begin("another", fails=False)
    wait_until(lambda: still.waiting == 1, "it has looked, and waits again")
    still.over()
    assert request.ended() is None


def test_a_request_of_a_client_that_has_gone_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    still = Standstill()
    still.begin("because", fails=False)
    request = Request(still)
    request.gone.set()
    still.over()
    assert request.ended() == errno.ESHUTDOWN
    # Nor does it keep its thread for long.
    monkeypatch.setattr(standstill, "_LOOK_S", 0.01)
    still.begin("because", fails=False)
    request = Request(still)
    request.gone.set()
    assert request.ended() == errno.ESHUTDOWN
    assert still.waiting == 0


def test_a_lease_ends_by_the_clock_alone() -> None:
    """Nobody has to come and say so; and nobody waits for ever when it is renewed."""
    now = [100.0]
    still = Standstill(lambda: now[0])
    assert still.why is None
    still.lease(0.0)
    assert still.why is not None, "it has never begun"
    still.lease(110.0)
    now[0] = 110.0
    assert still.on, "each request looks at the clock"
    assert still.reads_on
    assert not any(still.stands(reads) for reads in (True, False))
    assert still.why is None
    now[0] = 110.1
    assert all(still.stands(reads) for reads in (True, False))
    assert still.waits
    assert "lease" in str(still.why)
    requests = [Request(still, reads) for reads in (True, False)]
    still.lease(120.0)
    assert [request.ended() for request in requests] == [None, None]
    now[0] = 121.0
    request = Request(still)
    still.lease(None)
    assert request.ended() is None
    assert (still.on, still.reads_on) == (False, False)


def test_what_else_keeps_a_guest_back_does_so_within_a_lease() -> None:
    now = [100.0]
    still = Standstill(lambda: now[0])
    still.lease(110.0)
    still.begin("fencing", fails=False, writes_only=True)
    assert [still.stands(reads) for reads in (True, False)] == [False, True]
    still.begin("outdated", fails=False)
    assert [still.stands(reads) for reads in (True, False)] == [True, True]
    now[0] = 111.0
    assert [still.stands(reads) for reads in (True, False)] == [True, True]
    assert still.why == "outdated"
    still.over()
    assert "lease" in str(still.why)
