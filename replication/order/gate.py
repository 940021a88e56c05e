# SPDX-License-Identifier: BSD-3-Clause
"""The gate: many requests inside at a time, or one command alone.

Invariants
* While `closed()` is held nobody is inside, and nobody enters until it is left. While `newcomers_held()` is, nobody
  enters either.
* Closing keeps newcomers out at once, so a stream of requests cannot starve a checkpoint.
* A command that cannot get the requests out in time opens the gate again and fails; nothing has changed. So does one
  that still waits for them when a failover comes (urgency.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from replication.errors import DiskError, ReplicationError
from replication.order.latency import GATE, STOP, Course, Latency, Tally
from replication.order.urgency import GIVES_WAY, Urgency

ENTER_S = 60.0
"""Longest wait of a request before a closed gate; a command closes it for milliseconds, and at worst for
DRAIN_S plus one write of the state file."""

DRAIN_S = 40.0
"""Longest wait of a command for the requests inside; above the deadline of a request to an NBD endpoint
(endpoint.TIMEOUT_S), after which the request has failed and left."""


class GateStuck(ReplicationError):
    """The requests inside did not leave in time."""


class Gate:
    """`course = gate.enter(tally)` and `gate.leave(course)` around every request of a client, `with gate:` around other
    work; `with gate.closed():` around what needs them all out."""

    def __init__(self) -> None:
        self.latency = Latency()
        """What requests wait for, here and further on."""
        self.urgency = Urgency()
        self.urgency.wake = self._look_again
        # Protects the four fields below. Never held across I/O.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._shut = False
        # What it is shut for, by latency.REASONS.
        self._why = STOP
        self.passed = 0
        """How many have entered so far."""

    def enter(self, tally: Tally) -> Course:
        """The calling thread begins with a client's request; `leave` is to follow, whatever comes of it. DiskError: it
        has ended already."""
        course = self.latency.begin(tally)
        self._lock.acquire()
        try:
            if self._shut:
                try:
                    self._wait_open_locked()
                except BaseException:
                    course.end()
                    raise
            self._inside += 1
            self.passed += 1
        finally:
            self._lock.release()
        return course

    def leave(self, course: Course) -> None:
        """The request has ended, well or not."""
        self._lock.acquire()
        try:
            self._inside -= 1
            if self._shut and not self._inside:
                self._changed.notify_all()
        finally:
            self._lock.release()
        course.end()

    def give_way(self) -> None:
        """Between two steps of a long request: a command finds the gate empty. DiskError: the request is to end, and is
        still to `leave`."""
        with self._lock:
            self._leave_locked()
            try:
                if self._shut:
                    self._wait_open_locked()
                self.passed += 1
            finally:
                self._inside += 1

    def wait_outside(self, wait: Callable[[], None]) -> None:
        """In the middle of a request: call `wait`, while a command finds the gate empty. Whatever that raises, and a
        DiskError, ends the request, which is still to `leave`."""
        with self._lock:
            self._leave_locked()
        back = False
        try:
            wait()
            back = True
        finally:
            with self._lock:
                try:
                    if back and self._shut:
                        self._wait_open_locked()
                finally:
                    self._inside += 1

    def __enter__(self) -> None:
        with self._lock:
            if self._shut:
                self._wait_open_locked()
            self._inside += 1
            self.passed += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._leave_locked()

    def _leave_locked(self) -> None:
        """As `leave` does, which is written out: it is of every request."""
        self._inside -= 1
        if self._shut and not self._inside:
            self._changed.notify_all()

    def count(self, more: int) -> None:
        """What has entered was more requests than one."""
        with self._lock:
            self.passed += more

    @property
    def idle(self) -> bool:
        """Whether nobody is inside."""
        with self._lock:
            return not self._inside

    def _wait_open_locked(self) -> None:
        why = self._why
        course = self.latency.waiting(GATE, why)
        try:
            if not self._changed.wait_for(lambda: not self._shut, ENTER_S):
                raise DiskError(f"a control command kept requests waiting for {ENTER_S:.0f} s")
        finally:
            if course is not None:
                course.go_on(why)

    def _look_again(self) -> None:
        with self._lock:
            self._changed.notify_all()

    @contextmanager
    def closed(self, wait_s: float | None = None, why: str = STOP) -> Iterator[None]:
        """Work alone. Raises GateStuck when the requests inside do not end within `wait_s` seconds (DRAIN_S, if nothing
        is said), or when a failover asks for the way meanwhile. `why`: what requests wait for (latency.REASONS)."""
        if wait_s is None:
            wait_s = DRAIN_S
        deadline = time.monotonic() + wait_s
        urgency = self.urgency
        with self._lock:
            if not self._changed.wait_for(lambda: not self._shut or urgency.asked, wait_s):
                raise GateStuck("another command is still at work")
            if not self._shut:
                self._shut, self._why = True, why
                left_s = max(0.0, deadline - time.monotonic())
                self._changed.wait_for(lambda: not self._inside or urgency.asked, left_s)
                if self._inside:
                    self._open_locked()
                    if not urgency.asked:
                        raise GateStuck(f"{self._inside} requests in flight did not end within {wait_s:g} s")
                    raise GateStuck(f"{self._inside} requests are in flight still: {GIVES_WAY}")
            else:
                raise GateStuck(f"another command is still at work: {GIVES_WAY}")
        try:
            yield
        finally:
            with self._lock:
                self._open_locked()

    @contextmanager
    def newcomers_held(self, wait_s: float) -> Iterator[None]:
        """Keep newcomers waiting, while who is inside goes on. A command that has closed the gate does the same; it is
        given `wait_s` seconds to open it again, and then this is no more than that."""
        with self._lock:
            held = self._changed.wait_for(lambda: not self._shut, wait_s)
            if held:
                self._shut, self._why = True, STOP
        try:
            yield
        finally:
            if held:
                with self._lock:
                    self._open_locked()

    def _open_locked(self) -> None:
        self._shut = False
        self._changed.notify_all()
