# SPDX-License-Identifier: BSD-3-Clause
"""QMP for somebody who must never wait for ever: of QEMU, and of this plugin, which speaks the same.

    FtError
     +- Refused    the other side has answered with an error
     +- Late       it has not answered in time; what it does is not known, and the connection can be used again
     +- Gone       it has closed the connection, or is not there

Invariants
* Every wait ends at a deadline. QEMU answers nothing while a disk is stuck.
* The answer to a command that was given up is dropped when it comes, and until then no other is sent: a QEMU that
  hangs for a day does not find a day's commands.
"""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS_MAX = 256
"""Events that nobody has asked for; a migration makes ten."""
LINE_BYTES_MAX = 1 << 22
"""Of one message. QEMU's longest are some KiB; this keeps a wrong socket from filling the memory."""


class FtError(Exception):
    """A step failed; the text says which, and why."""


class Refused(FtError):
    """The other side has answered with an error."""


class Late(FtError):
    """It has not answered in time."""


class Gone(FtError):
    """It is not there (any more)."""


class Lines:
    """JSON objects, one a line, over a Unix socket."""

    def __init__(self, path: Path, name: str, timeout_s: float) -> None:
        """Connect; Gone if nobody listens, Late if nobody accepts. `name` stands in errors."""
        self.name = name
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(path))
        except TimeoutError as error:
            self._socket.close()
            raise Late(f"{name} does not accept a connection on {path}") from error
        except OSError as error:
            self._socket.close()
            raise Gone(f"cannot connect to {name} on {path}: {error.strerror or error}") from error

    def send(self, message: dict[str, Any], deadline: float) -> None:
        """Send one; Late, Gone. `deadline` is a time.monotonic()."""
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError as error:
            self.close()  # half a message may be out
            raise Late(f"{self.name} takes nothing") from error
        except OSError as error:
            raise Gone(f"the connection to {self.name} is lost: {error.strerror or error}") from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next one; Late, Gone."""
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise Late(f"{self.name} does not answer")
            try:
                self._socket.settimeout(left_s)
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as error:
                raise Gone(f"the connection to {self.name} is lost: {error.strerror or error}") from error
            self._buffer += data
            if not data or len(self._buffer) > LINE_BYTES_MAX:
                raise Gone(f"{self.name} has closed the connection" if not data else f"{self.name} talks nonsense")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise Gone(f"{self.name} talks nonsense: {line[:80]!r}") from error
        return message

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class Monitor:
    """A QMP client. `events` arrive while something is waited for, and are kept, the last EVENTS_MAX of them."""

    def __init__(self, path: Path, name: str, timeout_s: float) -> None:
        """Connect and negotiate; FtError. `timeout_s` is also the longest wait for an answer, if nothing is said."""
        self.name = name
        self.timeout_s = timeout_s
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._serial = 0
        self._owed: int | None = None
        """The command that was given up."""
        self._lines = Lines(path, name, timeout_s)
        try:
            self._lines.receive(time.monotonic() + timeout_s)
            self.execute("qmp_capabilities")
        except FtError:
            self.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """Run `command`: its `return`. Refused, Late, Gone."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        if self._owed is not None:
            self._answer(self._owed, command, deadline)
        self._serial += 1
        self._lines.send({"execute": command, "arguments": arguments or {}, "id": self._serial}, deadline)
        message = self._answer(self._serial, command, deadline)
        if "error" in message:
            raise Refused(f"{self.name} refuses {command}: {message['error']['desc']}")
        return message["return"]

    def _answer(self, serial: int, command: str, deadline: float) -> dict[str, Any]:
        """Wait for the answer to a command; Late: it is owed from now on."""
        self._owed = serial
        while True:
            try:
                message = self._lines.receive(deadline)
            except Late as error:
                raise Late(f"{self.name} does not answer to {command}") from error
            if "event" in message:
                self._events.append(message)
            elif message.get("id") == serial:
                self._owed = None
                return message

    def forget_events(self) -> None:
        """What has come so far is of no interest."""
        self._events.clear()

    def wait_event(
        self, name: str, deadline: float, fits: Callable[[dict[str, Any]], bool] = lambda data: True
    ) -> dict[str, Any]:
        """The oldest event `name` whose data fit, taken out of those kept; Late, Gone."""
        while True:
            for event in self._events:
                if event["event"] == name and fits(event.get("data", {})):
                    self._events.remove(event)
                    return event
            try:
                message = self._lines.receive(deadline)
            except Late as error:
                raise Late(f"{self.name} tells nothing of {name}") from error
            if "event" in message:
                self._events.append(message)

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()


def stamp_s(event: dict[str, Any]) -> float:
    """When QEMU says that an event happened: seconds since 1970."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)
