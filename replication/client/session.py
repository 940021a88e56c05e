# SPDX-License-Identifier: BSD-3-Clause
"""A conversation with one node, for a person: what goes wrong is said in one line.

Refused (qmp.py)   the node has answered with an error
Unusable           nothing could be asked of a node as things are
 +- Unreachable    there is no node at the socket, or it has stopped talking
     +- NotRunning nobody listens there
     +- Unanswered it has a command, and has not answered it in time
"""

from __future__ import annotations

import contextlib
import errno
import math
import time
from collections.abc import Iterator
from typing import Any, Self

from .lines import Late, Lines, Nonsense, Step, Trouble
from .qmp import Malformed, Qmp, Unwelcome


class Unusable(Exception):
    """Nothing could be asked of a node as things are; the text says what to change."""


class Unreachable(Unusable):
    """There is no node at the socket, or it has stopped talking; the text names the socket."""


class NotRunning(Unreachable):
    """Nobody listens at the socket."""


class Unanswered(Unreachable):
    """The node has not answered a command in time; it may run it yet."""


_NOBODY = (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR)


class Session:
    """A conversation with one node; raises Unreachable when it breaks, Refused when the node says no."""

    def __init__(self, path: str, timeout_s: float, until: float = math.inf) -> None:
        """Connect and negotiate, each step within `timeout_s`, and hurry (as `hurry` has it) from the first one on."""
        self._path = path
        self._timeout_s = timeout_s
        self._until = until
        with self._broken(""):
            lines = Lines(path, self._deadline())
        self._qmp = Qmp(lines)
        try:
            with self._broken("greeting"):
                self._qmp.greet(self._deadline())
            self.call("qmp_capabilities")
        except BaseException:
            self._qmp.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._qmp.close()

    def call(self, command: str, **arguments: Any) -> Any:
        """Run one command and return its result; events that come meanwhile are kept for `events`."""
        with self._broken(f"answer to {command}", command):
            return self._qmp.execute(command, arguments, self._deadline())

    def attempt(self, within_s: float, command: str, **arguments: Any) -> Any:
        """As `call`, but Unanswered after `within_s` already, or what bounds all calls if that is less. `overdue` knows
        then what becomes of it."""
        within_s = min(within_s, self._timeout_s)
        with self._broken(f"answer to {command}", command, within_s):
            return self._qmp.execute(command, arguments, time.monotonic() + within_s)

    def overdue(self, within_s: float = math.inf) -> Any:
        """What a command returns that was given up, or during which this program was interrupted; None when the answer
        to every command has come. `within_s` as for `attempt`."""
        within_s = min(within_s, self._timeout_s)
        with self._broken("answer", within_s=within_s):
            return self._qmp.overdue(time.monotonic() + within_s)

    def again(self, timeout_s: float) -> Session:
        """Another conversation with the same node."""
        return Session(self._path, timeout_s)

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event from now on, for as long as the node lives."""
        while True:
            # A quiet node has nothing to say for days: only a broken connection ends this.
            with self._broken("event"):
                event = self._qmp.next_event(None)
            yield event

    def hurry(self, until: float) -> None:
        """Every answer has to come by then (time.monotonic()), if it has no less time."""
        self._until = until

    def _deadline(self) -> float:
        return min(time.monotonic() + self._timeout_s, self._until)

    @contextlib.contextmanager
    def _broken(self, awaited: str, command: str = "", within_s: float | None = None) -> Iterator[None]:
        """Trouble becomes Unreachable."""
        try:
            yield
        except Trouble as error:
            nobody = error.step is Step.CONNECT and getattr(error.cause, "errno", None) in _NOBODY
            unanswered = isinstance(error, Late) and error.step is Step.RECEIVE and command
            kind = NotRunning if nobody else Unanswered if unanswered else Unreachable
            raise kind(f"{self._path}: {self._text(error, awaited, command, within_s or self._timeout_s)}") from None

    @staticmethod
    def _text(error: Trouble, awaited: str, command: str, within_s: float) -> str:
        within = f"within {within_s:g} s"
        match error:
            case Unwelcome():
                return error.desc
            case Malformed():
                return f"an {awaited} that is not QMP"
            case Nonsense():
                return "what listens there does not speak QMP"
            case Late():
                late = {
                    Step.CONNECT: f"no connection {within}",
                    Step.SEND: f"{command} could not be sent {within}",
                    Step.RECEIVE: f"no {awaited} {within}",
                }
                return late[error.step]
            case _ if error.cause is None:
                return "the node closed the connection"
            case _:
                gone = {Step.CONNECT: "cannot connect", Step.SEND: f"cannot send {command}"}
                return f"{gone.get(error.step, 'connection lost')}: {error.reason}"
