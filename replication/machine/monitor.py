# SPDX-License-Identifier: BSD-3-Clause
"""QMP for somebody who must never wait for ever: of QEMU, and of this plugin, which speaks the same.

    FtError
     +- Refused    the other side has answered with an error
     +- Late       it has not answered in time; what it does is not known, and the connection can be used again
     +- Gone       it has closed the connection, or is not there

Invariants
* Every wait ends at a deadline. QEMU answers nothing while a disk is stuck.
* A monitor that hangs is sent no further commands (client/qmp.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client import lines, qmp

EVENTS_MAX = 256
"""Events that nobody has asked for; a migration makes ten."""


class FtError(Exception):
    """A step failed; the text says which, and why."""


class Refused(FtError):
    """The other side has answered with an error."""


class Late(FtError):
    """It has not answered in time."""


class Gone(FtError):
    """It is not there (any more)."""


def connected(path: Path, name: str, timeout_s: float) -> lines.Lines:
    """A connection to a Unix socket; Gone if nobody listens, Late if nobody accepts. `name` stands in errors."""
    try:
        return lines.Lines(path, time.monotonic() + timeout_s)
    except lines.Late as error:
        raise Late(f"{name} does not accept a connection on {path}") from error
    except lines.Gone as error:
        raise Gone(f"cannot connect to {name} on {path}: {error.reason}") from error


@contextlib.contextmanager
def named(name: str, silence: str) -> Iterator[None]:
    """Trouble becomes an FtError that names the other side; `silence` is what it does when it does not answer."""
    try:
        yield
    except lines.Late as error:
        raise Late(f"{name} takes nothing" if error.step is lines.Step.SEND else f"{name} {silence}") from error
    except qmp.Unwelcome as error:
        raise Gone(f"{name} refuses the connection: {error.desc}") from error
    except lines.Nonsense as error:
        raise Gone(f"{name} talks nonsense" + (f": {error.said!r}" if error.said else "")) from error
    except lines.Gone as error:
        lost = f"the connection to {name} is lost: {error.reason}"
        raise Gone(f"{name} has closed the connection" if error.cause is None else lost) from error


@dataclass(frozen=True)
class Limits:
    """Longest waits, in seconds."""

    answer_s: float = 5.0
    """For what should take milliseconds."""
    epoch_s: float = 20.0
    """For an epoch in all."""


class Monitor:
    """A QMP client. Events arrive while something is waited for, and are kept, the last EVENTS_MAX of them."""

    def __init__(self, path: Path, name: str, timeout_s: float) -> None:
        """Connect and negotiate; FtError. `timeout_s` is also the longest wait for an answer, if nothing is said."""
        self.name = name
        self.timeout_s = timeout_s
        self._qmp = qmp.Qmp(connected(path, name, timeout_s), events_max=EVENTS_MAX)
        try:
            with named(name, "does not answer"):
                self._qmp.greet(time.monotonic() + timeout_s)
            self.execute("qmp_capabilities")
        except FtError:
            self.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """Run `command`: its `return`. Refused, Late, Gone."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        try:
            with named(self.name, f"does not answer to {command}"):
                return self._qmp.execute(command, arguments, deadline)
        except qmp.Refused as error:
            raise Refused(f"{self.name} refuses {command}: {error.desc}") from error

    def forget_events(self) -> None:
        """What has come so far is of no interest."""
        self._qmp.events.clear()

    def wait_event(
        self, name: str, deadline: float, fits: Callable[[dict[str, Any]], bool] = lambda data: True
    ) -> dict[str, Any]:
        """The oldest event `name` whose data fit, taken out of those kept; Late, Gone."""
        with named(self.name, f"tells nothing of {name}"):
            return self._qmp.wait_event(name, deadline, fits)

    def close(self) -> None:
        """Close the connection."""
        self._qmp.close()


def stamp_s(event: dict[str, Any]) -> float:
    """When QEMU says that an event happened: seconds since 1970."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def checkpoint_of(control: Monitor) -> tuple[int, bool]:
    """Number of the last checkpoint that a secondary has taken, and whether its primary has asked for that one, by this
    number; FtError."""
    status = control.execute("query-replication")
    if status["mode"] != "secondary":
        raise FtError(f"{control.name} is a {status['mode']}")
    return int(status["epoch"]), status["checkpoint-of-primary"] is True
