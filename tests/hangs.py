# SPDX-License-Identifier: BSD-3-Clause
"""Ends a test that pytest's timeout cannot end, because it waits inside a C library: for an answer of a server, mostly.

The timeout is a signal, whose Python handler runs when the call has come back. So some time after it the processes of
the test are killed: the call fails, and the handler fails the test. If that does not help, pytest's process ends, which
fails the test where xdist starts another worker. Without this one hanging test would take all the time of a run, and
the names of the others that failed with it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

KILL_S = 15.0
"""How long after the limit of a test its processes are killed."""

EXIT_S = 60.0
"""And how long after that pytest's own process ends."""


class Watchdog:
    """Of one process of pytest; a plugin for it. One thread for all its tests: some count threads."""

    def __init__(self, kill_s: float = KILL_S, exit_s: float = EXIT_S) -> None:
        self._kill_s = kill_s
        self._exit_s = exit_s
        self._changed = threading.Condition()
        # The test that is watched, and its limit in seconds; another number for each.
        self._watched: tuple[int, str, float] | None = None
        self._number = 0
        self._thread: threading.Thread | None = None
        # The test whose processes were killed.
        self._killed: str | None = None
        # pytest replaces the standard one while a test runs.
        self._stderr = os.fdopen(os.dup(2), "w")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> Any:
        """pytest-timeout watches this test from now on."""
        with self._changed:
            self._number += 1
            self._watched = self._number, item.nodeid, settings.timeout
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hangs", daemon=True)
            self._thread.start()
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_timeout_cancel_timer(self) -> Any:
        """The test is over."""
        with self._changed:
            self._watched = None
            self._changed.notify()
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """A part of the test is over. What the handler of the signal raises then may be lost: where it is raised is
        where the call came back to, which may be pytest's own work on the error of the call."""
        report = (yield).get_result()
        if self._killed == item.nodeid and report.passed:
            report.outcome, report.longrepr = "failed", "it had to be ended: its processes were killed after its limit"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched is not None)
                watched = self._watched
            if watched is not None and not self._over(watched, watched[2] + self._kill_s):
                self._end(watched)

    def _over(self, watched: tuple[int, str, float], within_s: float) -> bool:
        """Whether that test is over within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._watched != watched, within_s)

    def _end(self, watched: tuple[int, str, float]) -> None:
        name = watched[1]
        self._killed = name
        killed = kill_descendants()
        self._say(f"{name} hangs: killed its processes {killed}")
        if not self._over(watched, self._exit_s):
            self._say(f"{name} hangs, with no process left: pytest ends")
            faulthandler.dump_traceback(self._stderr)
            os._exit(70)

    def _say(self, text: str) -> None:
        print(text, file=self._stderr, flush=True)


def kill_descendants() -> list[int]:
    """SIGKILL for what this process has started, and what that has; their pids."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # After the name, which may have blanks and brackets: the state, and the parent.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours and pid not in ours}:
        ours |= more
    ours.discard(os.getpid())
    for pid in ours:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return sorted(ours)
