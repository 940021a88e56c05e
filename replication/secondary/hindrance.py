# SPDX-License-Identifier: BSD-3-Clause
"""Why this secondary takes no checkpoint at present, and how it finds out by itself that it can again.

A checkpoint that was refused because something here does not work (the state folder is full, an overlay was removed)
would be refused again. The primary has to know that: it asks twice a second (primary/watch.py) and does not claim to be
in sync meanwhile. Nobody need ask for another checkpoint to find out that the cause has gone: a thread tries again the
part that can be tried without taking one, later and later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from replication.errors import ReplicationError
from replication.log import log, log_defect

_AGAIN_MIN_S, _AGAIN_MAX_S = 0.25, 10.0


class Hindrance:
    """What hinders checkpoints. Every method may be called by any thread."""

    def __init__(self, attempt: Callable[[], None]) -> None:
        """`attempt()` tries what a checkpoint needs, and changes nothing; ReplicationError when it does not work."""
        self._attempt = attempt
        # Protects the fields below. Never held across I/O.
        self._changed = threading.Condition()
        self._why: str | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def why(self) -> str | None:
        """Why no checkpoint is taken, None when nothing is known to hinder it."""
        return self._why

    def note(self, why: str) -> None:
        """A checkpoint was refused."""
        with self._changed:
            self._why = why
            if self._closing or self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="hindrance", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads: the next checkpoint that succeeds ends it
                log(f"what hinders checkpoints is not tried again: {error}")
                return
            self._thread = thread

    def over(self) -> None:
        """One was taken."""
        with self._changed:
            self._why = None
            self._changed.notify_all()

    def end(self, timeout_s: float) -> None:
        """The disks are about to be in other hands; waits at most `timeout_s` seconds for an attempt."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        again_s = _AGAIN_MIN_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._why is None, again_s)
                tried = self._why
                if self._closing or tried is None:
                    self._thread = None
                    return
            again_s = min(2 * again_s, _AGAIN_MAX_S)
            try:
                self._attempt()
            except ReplicationError:
                continue
            except Exception as defect:  # noqa: BLE001 (nobody would start this thread again)
                log_defect(defect)
                continue
            with self._changed:
                if self._why == tried:  # else another checkpoint was refused meanwhile
                    self._why = None
