# SPDX-License-Identifier: BSD-3-Clause
"""Starts and ends the process of a node: systemd does it, or the agent itself.

What the agent has started is known by its number and the moment of its start, in a file that goes with the boot: a
number that another process has got since is nobody that may be killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from .told import Told

LAUNCHER_VARIABLE = "NBDKIT_REPLICATION_LAUNCHER"
"""Names another nbdkit-replication(8) than the one that is installed with this library."""

_SYSTEMD = "/run/systemd/system"
_STEP_S = 0.05
_KILL_SPARE_S = 4.0
"""Before the deadline: what a process that has been killed gets to be gone."""
_MANNERLY_S = 6.0
"""A node ends within 4 s of the signal, whatever hangs."""
_LASTING = ("2", "78")
"""Exit codes of nbdkit-replication(8) after which another start would find the same."""

# nbdkit that is handed its sockets ends with its parent (its --exit-with-parent), and the agent ends at once. So the
# parent is this shell, which also notes whom it has started, and with which code that has ended.
_GUARD = """\
noted=$1 ended=$2
shift 2
rm -f "$ended"
"$@" &
child=$!
if read -r stat <"/proc/$child/stat"; then
    set -- $stat
    echo "$child ${22}" >"$noted.new" && mv "$noted.new" "$noted" || kill -9 "$child"
fi
wait "$child"
echo $? >"$ended"
"""

_NO_SYSTEMD = 127
_ASK_SPARE_S = 3.0
"""Of a stop: what is kept to ask whether the unit has ended."""
_AT_ONCE = "--job-mode=ignore-dependencies"
_UNIT_STATES = ("active", "activating", "reloading", "deactivating")


class StartFailed(Exception):
    """The node's process could not be started, or has ended; the text says why. `lasting`: so would the next one."""

    def __init__(self, text: str, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


class Runner(Protocol):
    """Who runs the process."""

    def start(self) -> None:
        """Returns when it was begun, or is there already; StartFailed."""

    def check(self) -> None:
        """StartFailed if what was started has ended."""

    def alive(self) -> bool:
        """Whether there is a process, or there will be one again without a start."""

    def stop(self) -> bool:
        """Whether there is none any more, before the deadline."""

    def reload(self) -> None:
        """Have it read its file again, if it is there."""


def runner(told: Told, launcher: str) -> Runner:
    """As the parameter `service` says."""
    if not told.service:
        return Either((Child(told, launcher), *([Unit(told)] if os.path.isdir(_SYSTEMD) else [])))
    if told.service == "systemd" or (told.service == "auto" and os.path.isdir(_SYSTEMD)):
        return Unit(told)
    return Child(told, launcher)


class Either:
    """One of these, and it is not known which: what runs is found, and ended, but nothing is started."""

    def __init__(self, runners: tuple[Runner, ...]) -> None:
        self._runners = runners

    def start(self) -> None:
        raise StartFailed("the parameter service cannot be used", lasting=True)

    def check(self) -> None:
        if not self.alive():
            raise StartFailed("nothing runs")

    def alive(self) -> bool:
        return any(each.alive() for each in self._runners)

    def stop(self) -> bool:
        return all([each.stop() for each in self._runners])  # noqa: C419 (each of them, whatever the first says)

    def reload(self) -> None:
        for each in self._runners:
            each.reload()


class Unit:
    """Of systemd: nbdkit-replication@NAME.service, and the socket of its guest."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._service = f"nbdkit-replication@{told.node}.service"
        self._socket = f"nbdkit-replication@{told.node}.socket"

    def start(self) -> None:
        code, said = self._systemctl("start", self._socket, self._service)
        if code != 0:
            # EX_CONFIG, by which the unit says that its file is wrong.
            _, status = self._systemctl("show", "--property=ExecMainStatus", "--value", self._service)
            raise StartFailed(f"systemctl start {self._service}: {said}", lasting=status == "78")

    def check(self) -> None:
        if not self.alive():
            raise StartFailed(f"{self._service} has ended: journalctl -u {self._service}")

    def alive(self) -> bool:
        code, state = self._systemctl("show", "--property=ActiveState", "--value", self._service)
        # A systemd that does not answer has not said that the process is gone.
        if code == 0:
            return state in _UNIT_STATES
        return code is None or (code != _NO_SYSTEMD and os.path.isdir(_SYSTEMD))

    def stop(self) -> bool:
        # While the host is shut down both wait for Pacemaker to end, which waits for this.
        self._systemctl("stop", _AT_ONCE, self._socket, self._service, spare_s=_ASK_SPARE_S)
        return not self.alive()

    def reload(self) -> None:
        if self.alive():
            self._systemctl("reload", self._service)

    def _systemctl(self, *words: str, spare_s: float = 0.0) -> tuple[int | None, str]:
        """Its exit code and what it says; None if it has not answered in time. `spare_s` is left for what follows."""
        try:
            done = subprocess.run(
                ["systemctl", *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=max(0.1, self._told.left_s - spare_s),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return None, str(error)
        except FileNotFoundError as error:
            return _NO_SYSTEMD, str(error)
        except OSError as error:
            return None, str(error)
        return done.returncode, (done.stdout.strip() or done.stderr.strip())


class Child:
    """nbdkit-replication(8), started by the agent."""

    def __init__(self, told: Told, launcher: str) -> None:
        self._told = told
        self._launcher = os.environ.get(LAUNCHER_VARIABLE) or launcher
        self._noted = Path(told.folder) / f"nbdkit-replication-{told.node}.pid"
        self._ended = self._noted.with_suffix(".ended")
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.alive():
            return
        try:
            self._noted.parent.mkdir(parents=True, exist_ok=True)
            with open(self._told.log, "ab") as log:
                self._guard = subprocess.Popen(
                    [
                        "/bin/sh",
                        "-c",
                        _GUARD,
                        "sh",
                        self._noted,
                        self._ended,
                        sys.executable,
                        self._launcher,
                        self._told.node,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            raise StartFailed(f"cannot start {self._launcher} {self._told.node}: {error}") from error

    def check(self) -> None:
        if self._guard is not None and self._guard.poll() is not None:
            code = self._ended.read_text(encoding="ascii").strip() if self._ended.exists() else "unknown"
            raise StartFailed(
                f"{self._launcher} {self._told.node} has ended with code {code}: see {self._told.log}",
                lasting=code in _LASTING,
            )

    def alive(self) -> bool:
        return self._number() is not None

    def stop(self) -> bool:
        number = self._number()
        if number is None:
            return True
        for how, until_s in (
            (signal.SIGTERM, min(_MANNERLY_S, self._told.left_s - _KILL_SPARE_S)),
            (signal.SIGKILL, 1e9),
        ):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, how)
            if self._gone(min(until_s, self._told.left_s)):
                with contextlib.suppress(OSError):
                    self._noted.unlink()
                return True
        return False

    def reload(self) -> None:
        if (number := self._number()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGHUP)

    def _gone(self, within_s: float) -> bool:
        until = time.monotonic() + within_s
        while self._number() is not None:
            if time.monotonic() >= until:
                return False
            time.sleep(_STEP_S)
        return True

    def _number(self) -> int | None:
        """Of the process, if it lives."""
        try:
            number, began = self._noted.read_text(encoding="ascii").split()
            return int(number) if _began(int(number)) == began else None
        except (OSError, ValueError):
            return None


def _began(number: int) -> str:
    """When that process was started, in ticks since the boot; "" for one that has ended."""
    try:
        state, *fields = (
            Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
