# SPDX-License-Identifier: BSD-3-Clause
"""The product's QMP client (replication/client/qmp.py) as tests want it: what goes wrong fails the test."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from replication.client import lines
from replication.client.qmp import Qmp as Client
from replication.client.qmp import Refused
from waiting import DEADLINE_S, Stuck, wait_until

SLOW = re.compile(
    "(its storage takes|no answer within|has not answered an earlier write yet)"
    ".*[Tt]ry again when the storage of the state folder answers"
)
"""With this a failover is refused that could not be saved within a second and a half: it has changed nothing."""

_AGAIN_S = 0.1


class QmpError(Exception):
    """The server answered a command with an error."""

    def __init__(self, desc: str, error_class: str, code: str | None = None) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class
        self.code = code
        """Of the reason, where the node gives one."""

    @property
    def cls(self) -> str:
        """QMP's `class` of the error."""
        return self.error_class


class Strict(Client):
    """What nobody has asked for is an error: it answers what a test has sent raw, or is a fault of the server."""

    def answers(self, message: dict[str, Any], serial: int) -> bool:
        return bool(message.get("id") == serial)

    def stray(self, message: dict[str, Any]) -> None:
        raise AssertionError(f"an answer of ours or an event expected, got {message}")


class Qmp:
    """A synchronous QMP client on a Unix socket; every operation raises Stuck after `timeout_s`.

    Events that arrive meanwhile are kept in `events`, oldest first.
    """

    patient = True
    """A failover that the storage is too slow for is tried again, as its refusal says: what other tests write beside
    this one keeps a disk busy for seconds."""

    def __init__(
        self, path: str | os.PathLike[str] | socket.socket, timeout_s: float = DEADLINE_S, negotiate: bool = True
    ) -> None:
        """Connect, waiting for the socket to be there, or take a connection that there is; `negotiate` false leaves
        `qmp_capabilities` to the test."""
        self.timeout_s = timeout_s
        if isinstance(path, socket.socket):
            self._lines = lines.Lines(path, self._deadline())
        else:
            self._lines = wait_until(lambda: _connected(path), f"QMP socket {os.fspath(path)} accepts", timeout_s)
        self._client = Strict(self._lines)
        self.greeting = self.receive()
        if "QMP" not in self.greeting:
            raise AssertionError(f"no QMP greeting: {self.greeting}")
        if negotiate:
            self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def events(self) -> list[dict[str, Any]]:
        """Those that nobody has waited for yet."""
        return self._client.events

    @events.setter
    def events(self, events: list[dict[str, Any]]) -> None:
        self._client.events = events

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def send(self, data: bytes) -> None:
        """Send raw bytes: for tests that break the protocol. OSError when the server has closed the connection."""
        with _raw(f"the server takes no {len(data)} bytes"):
            self._lines.send_bytes(data, self._deadline())

    def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next message, event or not; raises EOFError when the server has closed the connection."""
        with _raw("a QMP message"):
            return self._client.receive(self._deadline(timeout_s))

    def execute(
        self,
        command: str,
        /,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **more: Any,
    ) -> Any:
        """Run `command` and return its `return`; raises QmpError if the server refuses.

        Arguments may be a mapping, keywords (`_` stands for `-`), or both.
        """
        values = {**(arguments or {}), **{key.replace("_", "-"): value for key, value in more.items()}}
        deadline = self._deadline(timeout_s)
        while True:
            try:
                with _raw(f"an answer to {command}"):
                    return self._client.execute(command, values, self._deadline(timeout_s))
            except Refused as error:
                if not self.patient or not SLOW.search(error.desc) or time.monotonic() > deadline:
                    raise QmpError(error.desc, error.error_class, error.code) from None
            time.sleep(_AGAIN_S)

    def wait_event(
        self,
        name: str,
        predicate: Callable[[dict[str, Any]], bool] = lambda data: True,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """The oldest event `name` whose data fulfil `predicate`, taken out of `events`; waits for it if need be."""
        try:
            with _raw(f"an event {name}"):
                return self._client.wait_event(name, self._deadline(timeout_s), predicate)
        except Stuck as error:
            raise Stuck(f"{error}, only {self.events}") from None

    def _deadline(self, timeout_s: float | None = None) -> float:
        return time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)


@contextlib.contextmanager
def _raw(awaited: str) -> Iterator[None]:
    """Trouble becomes what a test names: Stuck, EOFError, or the system's own error."""
    try:
        yield
    except lines.Late:
        raise Stuck(f"not within the time that it may take: {awaited}") from None
    except lines.Nonsense as error:
        raise AssertionError(f"{awaited} expected, got {error.said!r}") from None
    except lines.Gone as error:
        if error.cause is None:
            raise EOFError("QMP connection closed by the server") from None
        raise error.cause from None


def _connected(path: str | os.PathLike[str]) -> lines.Lines | None:
    """A connection to the Unix socket `path`, or None if nobody listens there yet."""
    try:
        return lines.Lines(path, time.monotonic() + DEADLINE_S)
    except lines.Gone as error:
        if isinstance(error.cause, FileNotFoundError | ConnectionRefusedError):
            return None
        raise
