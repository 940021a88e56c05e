# SPDX-License-Identifier: BSD-3-Clause
"""What happens by the clock: automatic checkpoints, and the warning that the last one is getting old."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from replication.errors import CommandError
from replication.events import EventHub
from replication.log import log, surviving
from replication.order.worker import Worker

_AGE_LOOKS = 10
"""How often, within the limit, the age is looked at: the event is late by a tenth of the limit at most."""
_LOOK_MAX_S = 1.0

STOP_S = 0.2
"""Longest wait for an automatic checkpoint that is at work; at the end of the process its link goes then."""


class Ticker:
    """Calls `action` every `period_s` seconds, from the beginning of one call to that of the next, until `stop`; a call
    that takes longer than that delays the next."""

    def __init__(self, name: str, period_s: float, action: Callable[[], None]) -> None:
        self._period_s = period_s
        self._action = action
        self._due = 0.0
        self._worker = Worker(name, self._tick)

    def start(self) -> None:
        """Begin; the first call comes after one period. CommandError when there is no thread for it."""
        self._due = time.monotonic() + self._period_s
        self._worker.start(self._period_s)

    def stop(self, timeout_s: float) -> None:
        """End; waits at most `timeout_s` seconds for a call that is at work."""
        self._worker.stop(timeout_s)

    def _tick(self) -> float:
        self._due = max(self._due, time.monotonic()) + self._period_s
        with surviving():  # the period stays what it is
            self._action()
        return max(0.0, self._due - time.monotonic())


class AutomaticCheckpoints(Ticker):
    """Takes a checkpoint every `interval_s` seconds."""

    def __init__(self, interval_s: float, take: Callable[[], None]) -> None:
        """`take()` takes one if it can be taken now; CommandError when it fails."""
        super().__init__("checkpoints", interval_s, self._take_one)
        self._take = take
        self._said = ""

    def _take_one(self) -> None:
        try:
            self._take()
        except CommandError as error:
            # The last one stays valid, and the next is tried after the interval. The same reason is said once.
            if str(error) != self._said:
                log(f"automatic checkpoint: {error}")
                self._said = str(error)
        else:
            self._said = ""


class AgeWatch(Ticker):
    """Emits REPLICATION_CHECKPOINT_AGE when the last checkpoint is older than `limit_s` seconds: once, until there is a
    younger one."""

    def __init__(
        self, limit_s: float, age: Callable[[], float | None], epoch: Callable[[], int], hub: EventHub
    ) -> None:
        """`age()` is the last checkpoint's in seconds, None when it does not matter now."""
        super().__init__("age", min(limit_s / _AGE_LOOKS, _LOOK_MAX_S), self._look)
        self._limit_s = limit_s
        self._age = age
        self._epoch = epoch
        self._hub = hub
        self._told = False

    def _look(self) -> None:
        age_s = self._age()
        old = age_s is not None and age_s > self._limit_s
        if old and not self._told:
            self._hub.emit("REPLICATION_CHECKPOINT_AGE", epoch=self._epoch(), age=age_s, limit=self._limit_s)
        self._told = old


class Clocks:
    """The automatic checkpoints and the age watch of a node, with periods that can change while it runs."""

    def __init__(
        self, take: Callable[[], None], age: Callable[[], float | None], epoch: Callable[[], int], hub: EventHub
    ) -> None:
        """The arguments are those of AutomaticCheckpoints and AgeWatch."""
        self._take = take
        self._age = age
        self._epoch = epoch
        self._hub = hub
        # Protects what follows. Held while a ticker is told to end, which may be in a checkpoint: STOP_S at most.
        self._lock = threading.Lock()
        self._periods: dict[str, float | None] = {}
        self._tickers: dict[str, Ticker] = {}
        self._ended = False

    def set(self, interval_s: float | None, limit_s: float | None) -> None:
        """Take a checkpoint every `interval_s` seconds and warn of one that is older than `limit_s`; None for neither.
        What stays as it was goes on undisturbed."""
        with self._lock:
            for name, period_s in (("interval", interval_s), ("limit", limit_s)):
                if self._ended or self._periods.get(name) == period_s:
                    continue
                self._periods.pop(name, None)
                self._stop_locked(name)
                if period_s is not None:
                    self._tickers[name] = self._ticker(name, period_s)
                    self._tickers[name].start()  # CommandError without a thread: the next time sets it
                self._periods[name] = period_s

    def _ticker(self, name: str, period_s: float) -> Ticker:
        if name == "interval":
            return AutomaticCheckpoints(period_s, self._take)
        return AgeWatch(period_s, self._age, self._epoch, self._hub)

    def stop(self) -> None:
        """End both for good."""
        with self._lock:
            self._ended = True
            for name in [*self._tickers]:
                self._stop_locked(name)

    def _stop_locked(self, name: str) -> None:
        if name in self._tickers:
            self._tickers.pop(name).stop(STOP_S)
