# SPDX-License-Identifier: BSD-3-Clause
"""The server's end of a QMP connection, word by word as a test wants it."""

from __future__ import annotations

import json
import socket
from typing import Any

from waiting import DEADLINE_S


class JsonEnd:
    """Reads commands and tells messages on a connected socket. OSError after DEADLINE_S without a command."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(DEADLINE_S)
        self._lines = connection.makefile("rb")

    def tell(self, message: Any) -> None:
        """Send one message."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def asked(self) -> dict[str, Any]:
        """The next command."""
        request: dict[str, Any] = json.loads(self._lines.readline())
        return request

    def answer(self, value: Any) -> str:
        """Answer the next command: its name."""
        request = self.asked()
        self.tell({"return": value, "id": request["id"]})
        return str(request["execute"])

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self.connection.close()
