# SPDX-License-Identifier: BSD-3-Clause
"""JSON objects, one a line, over a Unix socket; every wait ends at a deadline.

What goes wrong is a `Trouble`. It says at which step, and why where the system has said it; the words for a person are
its catcher's, who knows what was asked of whom:

    Trouble
     +- Late         not in time; what the other side does is not known
     +- Gone         the other side is not there (any more)
         +- Nonsense it is there, and does not talk as it should

Deadlines are values of time.monotonic(), in seconds.
"""

from __future__ import annotations

import enum
import json
import socket
import time
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

CONNECT_RETRY_S = 0.05
LINE_BYTES_MAX = 16 << 20
"""Of one message. Answers are a few KiB; this only keeps a wrong socket from filling the memory."""


class Step(enum.Enum):
    """What was being done when something went wrong."""

    CONNECT = "connect"
    SEND = "send"
    RECEIVE = "receive"


class Trouble(Exception):
    """The conversation has not gone as it should."""

    def __init__(self, step: Step, cause: Exception | None = None) -> None:
        super().__init__(f"{step.value}: {type(self).__name__.lower()}")
        self.step = step
        self.cause = cause
        """What the system says; None where it has not failed: a deadline, or an end of the other side's."""

    @property
    def reason(self) -> str:
        """The cause in the system's words."""
        # OSError without errno: a path that is too long for a socket.
        return str(getattr(self.cause, "strerror", None) or self.cause)


class Late(Trouble):
    """It has not happened before the deadline."""


class Gone(Trouble):
    """The other side is not there, or not any more."""


class Nonsense(Gone):
    """What came is no JSON object; `said` is how it begins."""

    def __init__(self, said: bytes = b"") -> None:
        super().__init__(Step.RECEIVE)
        self.said = said[:80]


class Lines:
    """A connection. After a Late on receiving it can be used again; after one on sending it is closed."""

    def __init__(self, place: str | PathLike[str] | socket.socket, deadline: float) -> None:
        """Connect to the Unix socket `place`, or take a connection that there is; Late, Gone."""
        self._buffer = bytearray()
        self._scanned = 0
        if isinstance(place, socket.socket):
            self._socket = place
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(fspath(place), deadline)
        except BaseException:
            self._socket.close()
            raise

    def send(self, message: Mapping[str, Any], deadline: float) -> None:
        """Send one object; Late, Gone."""
        self.send_bytes(json.dumps(message).encode() + b"\n", deadline)

    def send_bytes(self, data: bytes, deadline: float) -> None:
        """Send what need not be an object; Late, Gone."""
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self._socket.sendall(data)
        except TimeoutError as error:
            self.close()  # half a message may be out
            raise Late(Step.SEND) from error
        except OSError as error:
            raise Gone(Step.SEND, error) from error

    def receive(self, deadline: float | None) -> dict[str, Any]:
        """The next object; without a deadline only the connection's end ends the wait. Late, Gone, Nonsense."""
        while (end := self._buffer.find(b"\n", self._scanned)) < 0:
            self._scanned = len(self._buffer)
            # An NBD server's greeting, say, has no line end at all.
            if self._scanned > LINE_BYTES_MAX or bytes(self._buffer[:1]).strip() not in (b"", b"{"):
                raise Nonsense(bytes(self._buffer[:80]))
            self._fill(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._scanned = 0
        try:
            message = json.loads(line)
        except ValueError as error:
            raise Nonsense(line) from error
        if not isinstance(message, dict):
            raise Nonsense(line)
        return message

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _connect(self, path: str, deadline: float) -> None:
        while True:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                self._socket.connect(path)
                return
            except (BlockingIOError, TimeoutError) as error:
                # EAGAIN: it lives, but more clients are waiting for it than it lets wait (unix(7)).
                if time.monotonic() >= deadline:
                    raise Late(Step.CONNECT) from error
                time.sleep(CONNECT_RETRY_S)
            except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
                raise Gone(Step.CONNECT, error) from error

    def _fill(self, deadline: float | None) -> None:
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise Late(Step.RECEIVE)
        try:
            self._socket.settimeout(left_s)
            data = self._socket.recv(1 << 16)
        except TimeoutError as error:
            raise Late(Step.RECEIVE) from error
        except OSError as error:
            raise Gone(Step.RECEIVE, error) from error
        if not data:
            raise Gone(Step.RECEIVE)
        self._buffer += data
