# SPDX-License-Identifier: BSD-3-Clause
"""Why this secondary takes no checkpoint at present, and how it finds out by itself that it can again.

A checkpoint that was refused because something here does not work (the state folder is full, an overlay was removed)
would be refused again. The primary has to know that: it asks twice a second (primary/watch.py) and does not claim to be
in sync meanwhile. Nobody need ask for another checkpoint to find out that the cause has gone: a thread tries again the
part that can be tried without taking one, later and later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from replication.errors import ReplicationError
from replication.order.worker import Worker

_AGAIN_MIN_S, _AGAIN_MAX_S = 0.25, 10.0


class Hindrance:
    """What hinders checkpoints. Every method may be called by any thread."""

    def __init__(self, attempt: Callable[[], None]) -> None:
        """`attempt()` tries what a checkpoint needs, and changes nothing; ReplicationError when it does not work."""
        self._attempt = attempt
        # Protects the fields below. Never held across I/O.
        self._lock = threading.Lock()
        self._why: str | None = None
        self._again_s = _AGAIN_MIN_S
        self._due = 0.0
        self._worker = Worker("hindrance", self._try)

    @property
    def why(self) -> str | None:
        """Why no checkpoint is taken, None when nothing is known to hinder it."""
        return self._why

    def note(self, why: str) -> None:
        """A checkpoint was refused."""
        with self._lock:
            if self._why is None:
                self._again_s = _AGAIN_MIN_S
                self._due = time.monotonic() + self._again_s
            self._why = why
        self._worker.wake()  # without a thread the next checkpoint that is refused or taken helps

    def over(self) -> None:
        """One was taken."""
        with self._lock:
            self._why = None

    def end(self, timeout_s: float) -> None:
        """The disks are about to be in other hands; waits at most `timeout_s` seconds for an attempt."""
        self._worker.stop(timeout_s)

    def _try(self) -> float | None:
        """Try it, if it is time; when again."""
        with self._lock:
            tried, left_s = self._why, self._due - time.monotonic()
            if tried is None:
                return None
            if left_s > 0:
                return left_s
            self._due = time.monotonic() + self._again_s
            again_s = self._again_s = min(2 * self._again_s, _AGAIN_MAX_S)
        try:
            self._attempt()
        except ReplicationError:
            return again_s
        with self._lock:
            if self._why == tried:  # else another checkpoint was refused meanwhile
                self._why = None
                return None
        return again_s
