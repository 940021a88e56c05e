# SPDX-License-Identifier: BSD-3-Clause
"""Locks on ranges of a disk, first come first served.

Invariants
* Two holders never overlap.
* Of two overlapping requests the one that asked first gets the range first, so nobody starves and the
  order of overlapping writes is the order in which they asked.
* A holder waits for nobody; a waiter waits only for ranges asked for before its own: no cycles. Several ranges are
  asked for at one instant, so that this is true of them as well.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence

from replication.errors import DiskError
from replication.order.latency import LOCK, OVERLAP, Latency

WAIT_S = 60.0
"""Longest wait for a range. Holders do one request's I/O, whose own deadline is shorter."""


class Range:
    """One asked-for or held range [start, stop), in bytes; or several that are asked for and given back together, of
    which it is the hull."""

    __slots__ = ("_spans", "_wake", "followers", "start", "stop", "waits_for", "why")

    def __init__(self, start: int, stop: int, spans: Sequence[tuple[int, int]] = (), why: str = OVERLAP) -> None:
        """`spans`: the ranges, disjoint and ascending, if they are several. `why`: what others wait for meanwhile
        (latency.REASONS)."""
        self.start = start
        self.stop = stop
        self.why = why
        self.waits_for = 0
        self.followers: list[Range] = []
        self._wake: threading.Semaphore | None = None
        self._spans = spans

    def meets(self, other: Range) -> bool:
        """Whether the two overlap, when their hulls do."""
        if not self._spans:
            return not other._spans or other._covers_some(self.start, self.stop)
        if not other._spans:
            return self._covers_some(other.start, other.stop)
        few, many = (self, other) if len(self._spans) < len(other._spans) else (other, self)
        return any(many._covers_some(start, stop) for start, stop in few._spans)

    def _covers_some(self, start: int, stop: int) -> bool:
        """Whether one of several spans overlaps [start, stop)."""
        before = bisect_left(self._spans, (stop, 0)) - 1  # the last one that begins before `stop`
        return before >= 0 and self._spans[before][1] > start

    def prepare_wait_locked(self) -> threading.Semaphore:
        """The semaphore that `wake_locked` releases."""
        self._wake = threading.Semaphore(0)
        return self._wake

    def wake_locked(self) -> None:
        """Let the waiting thread go on."""
        if self._wake is not None:
            self._wake.release()

    def tell_followers_locked(self) -> None:
        """Nobody has to wait for it any more."""
        for follower in self.followers:
            follower.waits_for -= 1
            if not follower.waits_for:
                follower.wake_locked()


class RangeLock:
    """`held = lock.acquire(start, stop)` ... `lock.release(held)`; ranges are bytes, callers round them to blocks."""

    def __init__(self) -> None:
        # Protects the list and the ranges in it. Never held across I/O.
        self._lock = threading.Lock()
        self._asked: list[Range] = []
        self.latency: Latency | None = None
        """Who is to know how long requests wait here."""

    def acquire(self, start: int, stop: int, why: str = OVERLAP, wait_s: float | None = None) -> Range:
        """Wait for every overlapping range asked for before; DiskError after `wait_s` seconds, WAIT_S if
        None. `why`: what others wait for meanwhile (latency.REASONS)."""
        mine = Range(start, stop, (), why)
        self._lock.acquire()
        try:
            for other in self._asked:
                if other.start < stop and start < other.stop:
                    break
            else:
                self._asked.append(mine)
                return mine
        finally:
            self._lock.release()
        return self._ask(mine, wait_s)

    def acquire_all(self, spans: Sequence[tuple[int, int]], why: str = OVERLAP) -> Range:
        """As `acquire`, for several ranges (disjoint, ascending) at one instant. So here, too, nobody waits for what
        was asked for later, although some of the ranges are kept from others while the rest is waited for."""
        return self._ask(Range(spans[0][0], spans[-1][1], spans if len(spans) > 1 else (), why))

    def _ask(self, mine: Range, wait_s: float | None = None) -> Range:
        with self._lock:
            start, stop = mine.start, mine.stop
            why = OVERLAP
            for other in self._asked:
                if other.start < stop and start < other.stop and other.meets(mine):
                    other.followers.append(mine)
                    mine.waits_for += 1
                    why = other.why
            self._asked.append(mine)
            if not mine.waits_for:
                return mine
            wake = mine.prepare_wait_locked()
        if wait_s is None:
            wait_s = WAIT_S
        course = None if self.latency is None else self.latency.waiting(LOCK, why)
        try:
            if not wake.acquire(timeout=wait_s):
                self._give_up(mine, wait_s)
        finally:
            if course is not None:
                course.go_on(why)
        return mine

    def try_acquire(self, start: int, stop: int) -> Range | None:
        """The range if nobody has it or waits for it, else None; never waits, so it is safe for a thread that
        holds another range."""
        mine = Range(start, stop)
        with self._lock:
            if any(other.start < stop and start < other.stop and other.meets(mine) for other in self._asked):
                return None
            self._asked.append(mine)
        return mine

    def _give_up(self, mine: Range, wait_s: float) -> None:
        with self._lock:
            if not mine.waits_for:
                return  # granted between the timeout and here
            for other in self._asked:
                if mine in other.followers:
                    other.followers.remove(mine)
            self._asked.remove(mine)
            mine.tell_followers_locked()
        raise DiskError(f"waited {wait_s:.0f} s for another request on bytes {mine.start} to {mine.stop}")

    def release(self, held: Range) -> None:
        """Give the range back."""
        self._lock.acquire()
        try:
            self._asked.remove(held)
            if held.followers:
                held.tell_followers_locked()
        finally:
            self._lock.release()
