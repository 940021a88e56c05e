# SPDX-License-Identifier: BSD-3-Clause
"""One process, with a deadline and an owner.

Nothing waits without a deadline; a process is ended by its own pid and only by its owner; one that does not end when it
is asked to is killed, and that fails the test (`Lab.close`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from waiting import DEADLINE_S, Stuck, wait_until


class Process:
    """One process with its standard output and error in a file; started, ended and awaited by its owner."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.stderr_path = folder / f"{name}.stderr"
        self.misbehaviour: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """The environment: the test's own."""
        return dict(os.environ)

    def wait_ready(self) -> None:
        """Return when the process does its work; raises Stuck, or AssertionError if it has ended."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process id; raises AssertionError if it is not running."""
        if self._process is None:
            raise AssertionError(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def stderr(self) -> str:
        """All that the process has printed, over all its starts."""
        return self.stderr_path.read_text(errors="replace") if self.stderr_path.exists() else ""

    def wait_said(self, text: str, times: int = 1) -> None:
        """Wait until it has printed `text` so often, which it must not do more often. A line of the log is there before
        whoever has written it goes on, but where the machine is too busy for that (replication/log.py, PATIENCE_S)."""
        wait_until(lambda: self.stderr().count(text) >= times, f"{self.name} says {text!r}; it said {self.stderr()}")
        assert self.stderr().count(text) == times, self.stderr()

    def start(self) -> Self:
        """Start and wait until it is ready; raises AssertionError with what it printed if it is not."""
        if self.running:
            raise AssertionError(f"{self.name} is running already")
        with open(self.stderr_path, "ab") as stderr:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env=self.environment()
            )
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def check_alive(self) -> None:
        """Raise AssertionError with what the process printed if it has ended."""
        if not self.running:
            code = None if self._process is None else self._process.returncode
            raise AssertionError(f"{self.name} has ended ({code}): {self.stderr()}")

    def kill(self) -> None:
        """SIGKILL and wait; no effect if it has ended."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait(DEADLINE_S)

    def terminate(self, timeout_s: float = DEADLINE_S) -> None:
        """SIGTERM and wait; raises AssertionError if it does not end in time or not with exit code 0."""
        if self._process is None:
            return
        self._process.terminate()
        self.wait_ended(timeout_s)

    def wait_ended(self, timeout_s: float = DEADLINE_S) -> None:
        """Wait for a process that was told to end; raises AssertionError if it does not in time or not with 0."""
        process = self._process
        if process is None:
            raise AssertionError(f"{self.name} is not running")
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.misbehaviour.append(f"{self.name} had to be killed after {timeout_s:g} s")
            self.kill()
            raise Stuck(f"{self.name} did not end within {timeout_s:g} s: {self.stderr()}") from None
        self._process = None
        if code != 0 and not self.excused(code):
            raise AssertionError(f"{self.name} ended with {code}: {self.stderr()}")

    def excused(self, _code: int) -> bool:
        """Whether a server that is not ours may end like this: a defect of its own, which is no concern of a test."""
        return False

    def restart(self, how: signal.Signals = signal.SIGTERM) -> Self:
        """End by SIGTERM or SIGKILL and start again."""
        if how is signal.SIGKILL:
            self.kill()
        else:
            self.terminate()
        return self.start()

    def close(self) -> None:
        """End it, at the end of a test. What was wrong is left in `misbehaviour`."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            if not self.excused(code):
                self.misbehaviour.append(f"{self.name} ended by itself with {code}: {self.stderr()}")
            self._process = None
        with contextlib.suppress(Stuck):  # terminate has noted it in `misbehaviour`
            self.terminate()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        if error is None and self.misbehaviour:
            raise AssertionError("; ".join(self.misbehaviour))
