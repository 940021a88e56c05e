# SPDX-License-Identifier: BSD-3-Clause
"""The QMP client: of a node of ours, and of QEMU, which speaks the same.

It is here once. Who uses it has the words and the errors that suit who reads them: `session.Session` for replctl,
`machine.monitor.Monitor` for ft-agent, and the tests' own.

    Refused        the other side has answered with an error
    Trouble        lines.py: it has not answered as it should
     +- Unwelcome  it greets with an error: too many clients, say
     +- Malformed  its answer is none

Invariants
* Every wait ends at a deadline, except where None is given for it. QEMU answers nothing while a disk is stuck.
* The answer to a command that was given up is dropped when it comes, unless `overdue` waits for it, and until then no
  other command is sent: a node that hangs for a day does not find a day's commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .lines import Gone, Lines, Nonsense, Step


class Refused(Exception):
    """A command was answered with an error; the text is its description, the code that of the reason, if it has one."""

    def __init__(self, desc: str, error_class: str = "GenericError", code: str | None = None) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class
        self.code = code


class Unwelcome(Gone):
    """The greeting is an error; `desc` is its description."""

    def __init__(self, desc: str) -> None:
        super().__init__(Step.RECEIVE)
        self.desc = desc


class Malformed(Nonsense):
    """An answer that says neither what came of the command nor why nothing did."""


class Qmp:
    """A conversation over `lines`. Events arrive while something else is waited for, and are kept in `events`, oldest
    first; the last `events_max` of them, unless that is None."""

    def __init__(self, lines: Lines, *, events_max: int | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self._events_max = events_max
        self._lines = lines
        self._serial = 0
        self._owed: int | None = None
        """The command that was given up."""

    def greet(self, deadline: float) -> dict[str, Any]:
        """Wait for the greeting and return it; Unwelcome, Late, Gone, Nonsense."""
        greeting = self.receive(deadline)
        if "error" in greeting:
            raise Unwelcome(str(greeting["error"].get("desc", "refused")))
        if "QMP" not in greeting:
            raise Nonsense
        return greeting

    def execute(self, command: str, arguments: Mapping[str, Any] | None, deadline: float) -> Any:
        """Run `command`: its `return`. Refused, Late, Gone, Malformed."""
        if self._owed is not None:
            self._answer(self._owed, deadline)
        self._serial += 1
        request: dict[str, Any] = {"execute": command, "id": self._serial}
        if arguments:
            request["arguments"] = arguments
        self._owed = self._serial  # before: an interrupt may come when it is sent, and nothing else knows of that
        self._lines.send(request, deadline)
        return self._result(self._serial, deadline)

    def overdue(self, deadline: float) -> Any:
        """The `return` of a command that was given up, when it comes; None if there is none whose answer is owed.
        Refused, Late, Gone, Malformed."""
        return None if self._owed is None else self._result(self._owed, deadline)

    def _result(self, serial: int, deadline: float) -> Any:
        message = self._answer(serial, deadline)
        if "error" in message:
            error = message["error"]
            code = error.get("code")
            raise Refused(
                str(error.get("desc", error)),
                str(error.get("class", "GenericError")),
                code if isinstance(code, str) else None,
            )
        if "return" not in message:
            raise Malformed
        return message["return"]

    def wait_event(
        self, name: str, deadline: float | None, fits: Callable[[dict[str, Any]], bool] = lambda data: True
    ) -> dict[str, Any]:
        """The oldest event `name` whose data fit, taken out of `events`; Late, Gone, Nonsense."""
        seen = 0
        while True:
            for index in range(seen, len(self.events)):
                event = self.events[index]
                if event["event"] == name and fits(event.get("data", {})):
                    return self.events.pop(index)
            seen = len(self.events)
            self._keep(self.receive(deadline))
            if self._events_max is not None:
                seen = 0  # an older one may have made room

    def next_event(self, deadline: float | None) -> dict[str, Any]:
        """The oldest event, taken out of `events`; Late, Gone, Nonsense."""
        while not self.events:
            self._keep(self.receive(deadline))
        return self.events.pop(0)

    def receive(self, deadline: float | None) -> dict[str, Any]:
        """The next message, whatever it is; Late, Gone, Nonsense."""
        message = self._lines.receive(deadline)
        if not isinstance(message.get("error", {}), dict):
            raise Nonsense
        return message

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()

    def answers(self, message: dict[str, Any], serial: int) -> bool:
        """Whether a message that is no event answers command `serial`. One without an id is by a server that knows no
        ids, or could not read the command."""
        return bool(message.get("id", serial) == serial)

    def stray(self, message: dict[str, Any]) -> None:
        """Nobody has asked for this message: it answers a command that was given up, and is dropped."""

    def _answer(self, serial: int, deadline: float) -> dict[str, Any]:
        """Wait for the answer to a command; Late: it is owed from now on."""
        self._owed = serial
        while True:
            message = self.receive(deadline)
            if "event" not in message and self.answers(message, serial):
                self._owed = None
                return message
            self._keep(message)

    def _keep(self, message: dict[str, Any]) -> None:
        if "event" not in message:
            self.stray(message)
            return
        self.events.append(message)
        if self._events_max is not None:
            del self.events[: -self._events_max]
