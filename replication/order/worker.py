# SPDX-License-Identifier: BSD-3-Clause
"""A thread of ours that works in rounds until its owner ends it.

Whatever a stage needs somebody to do is done by one of these, or by a thread whose starter says what becomes of the
work when there is no thread (NO_THREAD). So no stage is left in which nobody works:

* A round that raises what nobody expected, a bug or no memory, is written to the log; the next one comes after a pause
  that grows to AGAIN_MAX_S.
* A thread that cannot be started, or that ended all the same, is started by the next `wake`. Whoever has something for
  it to do calls that.
* `start` is for those who can still refuse what would need the thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from replication.errors import CommandError
from replication.log import log, log_defect

NO_THREAD = (RuntimeError, MemoryError)
"""What threading.Thread.start raises when there is no thread to be had."""

AGAIN_MIN_S, AGAIN_MAX_S = 0.25, 10.0
"""Pause after a round that has failed in a way which nobody expected."""

_SLEEP_S = 3600.0


class Worker:
    """A thread named `name` that calls `work` over and over. Every method may be called by any thread."""

    def __init__(self, name: str, work: Callable[[], float | None]) -> None:
        """`work()` does what there is to do now, and returns after how many seconds it is called again at the latest;
        None: when it is woken, until when there need be no thread."""
        self.name = name
        self._work = work
        # Protects the fields below. Below all locks but the log's, never held across I/O.
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._woken = False
        self._closing = False

    @property
    def closing(self) -> bool:
        """Whether it is time to end, for a round that takes long."""
        return self._closing

    @property
    def alive(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    def start(self, first_s: float = 0.0) -> None:
        """Have the thread there, unless it is; its first round comes after `first_s` seconds. CommandError where there
        is none to be had."""
        with self._changed:
            if self._thread is None and not self._closing:
                try:
                    self._begin_locked(first_s)
                except NO_THREAD as error:
                    raise CommandError(f"There is no thread for {self.name}: {error}") from error

    def wake(self) -> None:
        """There is something to do. Where there is no thread for it, that is logged; the next `wake` tries again."""
        with self._changed:
            self._woken = True
            if self._thread is None and not self._closing:
                try:
                    self._begin_locked(0.0)
                except NO_THREAD as error:
                    log(f"there is no thread for {self.name} at present: {error}")
            self._changed.notify_all()

    def stop(self, timeout_s: float) -> bool:
        """No more rounds; waits at most `timeout_s` seconds for one that is at work, unless that is the caller's.
        Whether it has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def _begin_locked(self, first_s: float) -> None:
        thread = threading.Thread(target=self._run, args=(first_s,), name=self.name, daemon=True)
        self._thread = thread
        try:
            thread.start()
        except BaseException:
            self._thread = None
            raise

    def _run(self, wait_s: float | None) -> None:
        again_s = AGAIN_MIN_S
        try:
            while True:
                try:
                    if not self._wait(wait_s):
                        return
                    wait_s = self._work()
                    again_s = AGAIN_MIN_S
                except Exception as defect:  # noqa: BLE001 (nobody else works)
                    log_defect(defect)
                    wait_s = again_s
                    again_s = min(2 * again_s, AGAIN_MAX_S)
                    time.sleep(AGAIN_MIN_S)  # also when it is woken all the time
        finally:
            if self._thread is threading.current_thread():
                self._thread = None  # the next `wake` starts another one

    def _wait(self, wait_s: float | None) -> bool:
        """Wait for the next round and begin it; False when the thread is to end."""
        with self._changed:
            if wait_s is not None:
                self._changed.wait_for(lambda: self._woken or self._closing, min(wait_s, _SLEEP_S))
            elif not self._woken:
                self._thread = None  # while the lock is held: from now on `wake` starts another one
                return False
            self._woken = False
            return not self._closing
