# SPDX-License-Identifier: BSD-3-Clause
"""The guest of a node stands still: its requests wait, or fail, because it may be that another node's guest runs.

Invariants
* A request that waits is not inside the gate, so no command waits for it, and none is kept from being given.
* Waiting ends when the node says so, or when the process ends: `end` is called before anybody waits for requests.
* Without a standstill a request pays one look at `on`, a write two.
* A write that was inside when the standstill began is not answered before it is over, or fails, although it was done.
  So is a read, with a lease: what a slow disk answers after its end is what another guest may have changed since.
* With a lease each request looks at the clock itself: no thread has to come in time, and a process that stood still for
  a while serves nothing afterwards that it must not.
* A request that has waited never reaches another role's face (`turn_away`), nor a disk that another guest may use since
  its own has gone.

Every method may be called by any thread.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

from replication.errors import DiskError
from replication.order.latency import GATE, STANDSTILL, Latency
from replication.reason import Reason

_LEASE_OVER = "lease: neither the other node nor the cluster was heard of in time"

_LOOK_S = 10.0
"""Longest wait at a stretch; whoever ends the standstill wakes all. Then a request whose client has gone ends, so that
guests which come and go leave no threads behind."""


class Standstill:
    """Of the exports that guests use on one node."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock()` is the one by which a lease ends, in seconds."""
        self._clock = clock
        # Protects the fields below. Never held across I/O. A request takes it only while `on`.
        self._changed = threading.Condition(threading.Lock())
        self.on = False
        """Whether writes and flushes wait or fail, or may (`stands` says it), also those that were done, and not
        answered yet. Read without the lock, as the next three."""
        self.reads_on = False
        """Whether reads do, or may."""
        self.leased = False
        """Whether there is a lease, so that reads which were done, and not answered yet, wait as well."""
        self._begun = self._writes_only = False
        # When the lease ends, None without one.
        self._leased_until: float | None = None
        self.era = 0
        """How often those who waited were turned away."""
        self._fails = False
        self._why = self._code = ""
        self._turned_away = ""
        self._ended = False
        self.waiting = 0
        """How many requests wait."""

    @property
    def why(self) -> str | None:
        """Why the guest stands still, None if it does not."""
        with self._changed:
            return self._why_locked()

    @property
    def standing(self) -> tuple[str, str] | None:
        """The same with its code in front (reason.py)."""
        with self._changed:
            why = self._why_locked()
            if why is None:
                return None
            return self._code if self._begun else Reason.LEASE_OVER.value, why

    @property
    def waits(self) -> bool:
        """Whether its requests wait, instead of failing."""
        return self.stands(reads=False) and not self._fails

    def begin(self, why: str, *, fails: bool, writes_only: bool = False, code: str = "") -> None:
        """From now on requests wait, or fail (`fails`), those that wait already as well. `writes_only`: reads go on."""
        with self._changed:
            self._why, self._fails, self._code = why, fails, code
            self._begun, self._writes_only = True, writes_only
            self._show_locked()

    def over(self) -> None:
        """Requests are served again, if there is a lease as long as it lasts."""
        with self._changed:
            self._begun = self._fails = False
            self._show_locked()

    def lease(self, until_s: float | None) -> None:
        """Requests are served until then, by the clock; None: there is no lease."""
        with self._changed:
            self._leased_until = until_s
            self._show_locked()

    def _show_locked(self) -> None:
        self.leased = leased = self._leased_until is not None
        self.on = leased or self._begun
        self.reads_on = leased or (self._begun and not self._writes_only)
        if self.waiting:
            self._changed.notify_all()

    def _why_locked(self) -> str | None:
        if self._begun:
            return self._why
        return _LEASE_OVER if self._lease_is_over() else None

    def _lease_is_over(self) -> bool:
        until_s = self._leased_until
        return until_s is not None and self._clock() > until_s

    def turn_away(self, why: str) -> None:
        """The disk is another one now: what waits fails."""
        with self._changed:
            self.era += 1
            self._turned_away = why
            self._changed.notify_all()

    def end(self) -> None:
        """The process ends: what waits fails, and so does what comes."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stand(self, latency: Latency, era: int, reads: bool, gone: Callable[[], bool]) -> None:
        """Wait until it is over, or (`reads`) until reads go on, which `latency` counts as time before the gate. `era`:
        as it was when the caller was inside the gate; `gone()`: whether the client has. DiskError when requests fail,
        or are turned away, or the client has gone, or the process ends."""
        course = latency.waiting(GATE, STANDSTILL)
        try:
            stands = True
            while stands:
                stands = self._stand(era, reads)
                if gone():
                    raise DiskError("a request of a guest that stood still, and has gone", errno.ESHUTDOWN)
        finally:
            if course is not None:
                course.go_on(STANDSTILL)

    def _stand(self, era: int, reads: bool) -> bool:
        """Wait for some time; whether it is to go on."""
        with self._changed:
            self.waiting += 1
            try:
                if self.stands(reads) and era == self.era and not self._fails and not self._ended:
                    self._changed.wait(_LOOK_S)
            finally:
                self.waiting -= 1
            if era != self.era:
                raise DiskError(f"the guest was standing still, and {self._turned_away}")
            if not self.stands(reads):
                return False
            if self._ended:
                why = self._why_locked()
                raise DiskError(f"the process ends, and the guest was standing still: {why}", errno.ESHUTDOWN)
            if self._fails:
                raise DiskError(f"the guest must not go on here: {self._why}")
            return True

    def stands(self, reads: bool) -> bool:
        """Whether a request waits or fails."""
        if self._begun and not (reads and self._writes_only):
            return True
        return self._lease_is_over()


NEVER = Standstill()
"""Of exports that no guest uses."""

GONE = Standstill()
"""Of an export whose client has gone while its requests stood still."""
GONE.begin("its client has gone", fails=True)
