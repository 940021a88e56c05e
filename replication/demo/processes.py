# SPDX-License-Identifier: BSD-3-Clause
"""What the demonstration starts and waits for."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STEP_S = 60.0
"""Longest time for any step of the default size: a minute is what the whole takes."""


class DemoError(Exception):
    """A step failed or a check does not hold; the text says which."""


class Processes:
    """What this program has started and still runs, and how to undo it; the last one first."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave a mount or a process behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._undo.close()

    def start(self, command: Sequence[str | Path], log: Path, **more: Any) -> subprocess.Popen[str]:
        """Start in the background; what it prints on standard error goes to `log`."""
        with open(log, "ab") as output:
            # A session of its own: Ctrl-C reaches this program alone, which then ends the others in order.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                **{"stdout": output, **more},
                stderr=output,
                start_new_session=True,
                text=True,
            )
        self._undo.callback(end, process)
        return process

    def later(self, action: Callable[[], None]) -> None:
        """Run `action` at the end, before what was started earlier is ended."""
        self._undo.callback(action)


def end(process: subprocess.Popen[str]) -> None:
    """End one process that we started; killed when it does not end in time. No effect if it has ended."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
    if process.stdout is not None:
        process.stdout.close()


def run(*command: str | Path, accept: Sequence[int] = (0,)) -> str:
    """Run a program and return its standard output; DemoError with what it said when it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=STEP_S,
            check=False,
        )
    except FileNotFoundError:
        raise DemoError(f"{command[0]} is not installed: run scripts/setup demo") from None
    except subprocess.TimeoutExpired:
        raise DemoError(f"{command[0]} took more than {STEP_S:.0f} s") from None
    if done.returncode not in accept:
        said = (done.stderr + done.stdout).strip()
        raise DemoError(f"{' '.join(map(str, command))}: exit code {done.returncode}: {said[-2000:]}")
    return done.stdout


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """Poll until `condition()` is true and return its value; DemoError, naming `what`, after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise DemoError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.005)
    return value
