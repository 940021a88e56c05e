# SPDX-License-Identifier: BSD-3-Clause
"""The epochs of one machine, one an interval, for as long as it is protected."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .agent import Agent, Skipped
from .monitor import FtError, Gone
from .pauses import Pauses

KEPT_MAX = 100_000
"""Epochs whose times are kept for the summary: a day of one a second."""


class Protection:
    """The epochs of `protect`, one an interval."""

    def __init__(self, agent: Agent, interval_s: float, epochs_max: int | None, say: Callable[[str], None]) -> None:
        """`epochs_max` is after how many committed ones it ends; None: never."""
        self._agent = agent
        self._interval_s = interval_s
        self._epochs_max = epochs_max
        self._say = say
        self._ending = threading.Event()
        self.epochs: list[Pauses] = []
        self.failed = 0
        self._said = ""

    def end(self) -> None:
        """For a signal: the epoch that is under way is completed, or given up within its limit."""
        self._ending.set()

    def run(self) -> None:
        """Until `end`, or QEMU has gone (FtError)."""
        self._agent.prepare()
        self._say(f"protecting, by {'live migration' if self._agent.live else 'stop and copy'}")
        due = time.monotonic()
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            due = max(due, time.monotonic()) + self._interval_s
            self._one()
            if self._epochs_max is not None and len(self.epochs) >= self._epochs_max:
                break
        self._agent.close()

    def _one(self) -> None:
        try:
            done = self._agent.epoch()
        except Skipped as error:
            self._told(f"skipped: {error}")
        except FtError as error:
            self.failed += 1
            self._told(f"given up: {error}")
            self._recover()
        else:
            self._said = ""
            if len(self.epochs) < KEPT_MAX:
                self.epochs.append(done)
            self._say(
                f"epoch {done.epoch} is committed: pause {done.pause_ms:.1f} ms, state {done.state_bytes / 1e6:.1f} MB"
            )

    def _recover(self) -> None:
        """The guest goes on, however long that takes: nothing else is worth doing before."""
        while True:
            try:
                self._agent.recover()
                self._say("the guest goes on")
                return
            except Gone:
                raise
            except FtError as error:
                self._told(f"the guest stands still: {error}")
                if self._ending.is_set():
                    raise

    def _told(self, text: str) -> None:
        """The same is said once."""
        if text != self._said:
            self._say(text)
            self._said = text
