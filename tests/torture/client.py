# SPDX-License-Identifier: BSD-3-Clause
"""Several requests in flight on all exports of a process that is about to be killed, and one control command.

One thread, libnbd's asynchronous calls and `poll`. Every request and answer gets a tick: a request's tick is before
it is sent, an answer's after it was read, so the interval between them holds the moment at which it took effect.
"""

from __future__ import annotations

import errno
import json
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import nbd

from nodes import Server
from torture.oracle import NEVER, Write
from waiting import DEADLINE_S, Stuck

LOG_LINES = 60
"""Events kept for the message of a failure."""


class Wrong(AssertionError):
    """The product has broken its contract."""


class Kind(Enum):
    """Requests."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"
    FLUSH = "flush"


@dataclass(frozen=True)
class Request:
    """One request to an export; `data` is a write's."""

    kind: Kind
    export: str
    offset: int = 0
    length: int = 0
    data: bytes = b""
    fua: bool = False

    def __str__(self) -> str:
        where = "" if self.kind is Kind.FLUSH else f" {self.offset}+{self.length}"
        return f"{self.export} {self.kind.value}{where}{' FUA' if self.fua else ''}"


@dataclass(frozen=True)
class Command:
    """One control command."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {json.dumps(self.arguments)}" if self.arguments else self.name


@dataclass
class Sent:
    """A request under way, or answered: `error` is then its errno, 0 if it succeeded."""

    request: Request
    begun: int
    ended: int = NEVER
    error: int = 0
    buffer: nbd.Buffer | None = None
    change: Write | None = None
    """What it does to its face, for the model."""

    @property
    def content(self) -> bytes:
        """What a read has read."""
        assert self.buffer is not None
        return bytes(self.buffer.to_bytearray())


@dataclass
class Asked:
    """A command under way, or answered: `error` is then its description, None if it succeeded."""

    command: Command
    begun: int
    ended: int = NEVER
    error: str | None = None


class _Channel:
    """One NBD connection."""

    def __init__(self, server: Server, export: str) -> None:
        self.handle = nbd.NBD()
        self.handle.connect_uri(server.uri(export))
        self.in_flight = 0
        self.dead = False


class Client:
    """Connections to `exports` of `server` and to its control socket, for as long as it lives."""

    def __init__(self, server: Server, exports: Sequence[str], window: int) -> None:
        """At most `window` requests in flight an export."""
        self._server = server
        self._window = window
        self._channels = {export: _Channel(server, export) for export in exports}
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.settimeout(DEADLINE_S)
        self._control.connect(str(server.control_path))
        self._received = b""
        self._killed = False
        self._asked: Asked | None = None
        self._on_answer: Callable[[Asked], None] = lambda asked: None
        # A callback of libnbd that raises prints and goes on; what is wrong is raised when the loop is left.
        self._trouble: list[BaseException] = []
        self.tick = 0
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self._control.sendall(b'{"execute": "qmp_capabilities", "id": 0}\n')
        deadline = time.monotonic() + DEADLINE_S
        while not self._ready(self._lines()):
            self._wait(deadline, "QMP capabilities")
            self._receive()

    @staticmethod
    def _ready(messages: list[dict[str, Any]]) -> bool:
        return any(message.get("id") == 0 for message in messages)

    # -- requests ------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether everything has been answered."""
        return self._asked is None and not any(channel.in_flight for channel in self._channels.values())

    @property
    def commanding(self) -> bool:
        """Whether a command is under way."""
        return self._asked is not None

    def has_room(self, export: str) -> bool:
        """Whether another request may be sent to `export`."""
        return self._channels[export].in_flight < self._window

    def send(self, request: Request, begun: Callable[[Sent], None], ended: Callable[[Sent], None]) -> None:
        """Send a request. `begun` is called before it is sent, `ended` when it has been answered."""
        channel = self._channels[request.export]
        self.tick += 1
        sent = Sent(request, self.tick)
        number = self.tick
        self.log.append(f"{number:5} send   {request}")
        begun(sent)

        def answered(error: Any) -> int:
            channel.in_flight -= 1
            if error.value == errno.ENOTCONN or channel.handle.aio_is_dead():
                return 1  # no answer: the connection has gone
            try:
                self.tick += 1
                sent.ended, sent.error = self.tick, error.value
                said = errno.errorcode.get(error.value, str(error.value)) if error.value else "ok"
                self.log.append(f"{self.tick:5} answer {number} {request}: {said}")
                ended(sent)
            except Exception as trouble:  # noqa: BLE001 (raised again by _check)
                self._trouble.append(trouble)
            return 1

        handle, flags = channel.handle, nbd.CMD_FLAG_FUA if request.fua else 0
        channel.in_flight += 1
        try:
            if request.kind is Kind.READ:
                sent.buffer = nbd.Buffer(request.length)
                handle.aio_pread(sent.buffer, request.offset, answered)
            elif request.kind is Kind.WRITE:
                sent.buffer = nbd.Buffer.from_bytearray(bytearray(request.data))
                handle.aio_pwrite(sent.buffer, request.offset, answered, flags)
            elif request.kind is Kind.ZERO:
                handle.aio_zero(request.length, request.offset, answered, flags)
            elif request.kind is Kind.TRIM:
                handle.aio_trim(request.length, request.offset, answered, flags)
            else:
                handle.aio_flush(answered)
        except nbd.Error as error:
            self._server.check_alive()
            raise Wrong(f"{request} cannot be sent: {error}") from error
        self._check()

    def ask(self, command: Command, answered: Callable[[Asked], None]) -> Asked:
        """Send a control command; one at a time."""
        if self._asked is not None:
            raise RuntimeError(f"{self._asked.command} is still under way")
        self.tick += 1
        self._asked, self._on_answer = Asked(command, self.tick), answered
        self.log.append(f"{self.tick:5} ask    {command}")
        message = {"execute": command.name, "arguments": command.arguments, "id": self.tick}
        self._control.sendall(json.dumps(message).encode() + b"\n")
        return self._asked

    # -- the loop ------------------------------------------------------------------------------------------

    def pump(self, timeout_s: float) -> None:
        """Handle what can be read or written, waiting for something for at most `timeout_s`."""
        poll = select.poll()
        channels = {}
        for channel in self._channels.values():
            if channel.dead:
                continue
            direction = channel.handle.aio_get_direction()
            wanted = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
            wanted |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            number = channel.handle.aio_get_fd()
            channels[number] = channel
            poll.register(number, wanted)
        if self._control.fileno() >= 0:
            poll.register(self._control, select.POLLIN)
        for number, found in poll.poll(timeout_s * 1000):
            if number in channels:
                self._notify(channels[number], found)
            else:
                self._receive()
                self._answer(self._lines())
        self._check()

    def _notify(self, channel: _Channel, found: int) -> None:
        handle = channel.handle
        try:
            if found & (select.POLLIN | select.POLLHUP | select.POLLERR):
                handle.aio_notify_read()
            if found & select.POLLOUT and handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                handle.aio_notify_write()
        except nbd.Error as error:
            channel.dead = handle.aio_is_dead() or handle.aio_is_closed()
            if not self._killed:
                self._server.check_alive()
                raise Wrong(f"the server dropped a connection: {error}") from error
            channel.dead = True
        if handle.aio_is_dead() or handle.aio_is_closed():
            channel.dead = True

    def _receive(self) -> None:
        try:
            data = self._control.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self._control.close()
            if not self._killed:
                self._server.check_alive()
                raise Wrong("the server closed the control connection")
        self._received += data

    def _lines(self) -> list[dict[str, Any]]:
        *lines, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]

    def _answer(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "event" in message:
                continue
            asked = self._asked
            if asked is None or message.get("id") != asked.begun:
                raise Wrong(f"unexpected control message {message}")
            self.tick += 1
            asked.ended = self.tick
            asked.error = message["error"]["desc"] if "error" in message else None
            self.log.append(f"{self.tick:5} answer {asked.begun} {asked.command}: {asked.error or 'ok'}")
            self._asked = None
            self._on_answer(asked)

    def _check(self) -> None:
        if self._trouble:
            raise self._trouble[0]

    def _wait(self, deadline: float, what: str) -> None:
        """Wait for the control socket."""
        if time.monotonic() > deadline:
            raise Stuck(f"not within {DEADLINE_S:g} s: {what}")

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Pump until `condition()`; raises Stuck after `timeout_s`."""
        if not self.reaches(condition, timeout_s):
            raise Stuck(f"not within {timeout_s:g} s: {what}")

    def reaches(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Pump until `condition()`, at most `timeout_s`; whether it came true."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.pump(0.002)
        return True

    def run_for(self, duration_s: float) -> None:
        """Pump for a while, at least once."""
        deadline = time.monotonic() + duration_s
        while True:
            left_s = deadline - time.monotonic()
            self.pump(max(0.0, left_s))
            if left_s <= 0:
                return

    # -- the end -------------------------------------------------------------------------------------------

    def after_kill(self) -> None:
        """The server has been killed: read the answers that it had sent, which count, then close all connections."""
        self._killed = True
        deadline = time.monotonic() + DEADLINE_S
        while self._control.fileno() >= 0 or not all(channel.dead for channel in self._channels.values()):
            if time.monotonic() > deadline:
                raise Stuck("the connections of a killed server stay open")
            self.pump(0.01)
        self.close()

    def read(self, export: str, size: int) -> bytes:
        """The whole export; nbd.Error if it is refused. Nothing else may be in flight."""
        return bytes(self._channels[export].handle.pread(size, 0))

    def query(self, command: str) -> Any:
        """What a command returns. Nothing else may be in flight."""
        self._control.sendall(json.dumps({"execute": command, "id": command}).encode() + b"\n")
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for message in self._lines():
                if message.get("id") == command:
                    if "error" in message:
                        raise Wrong(f"{command}: {message['error']['desc']}")
                    return message["return"]
            self._wait(deadline, command)
            self._receive()

    def close(self) -> None:
        """Close all connections."""
        self._control.close()
        self._channels.clear()  # a handle is closed with its last reference
