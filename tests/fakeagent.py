# SPDX-License-Identifier: BSD-3-Clause
"""A guest agent of QEMU's that notes what it is asked, and answers what a test says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class FakeAgent:
    """`did` is what it was asked to do, without guest-fsfreeze-, and whatever others note in between. As a channel of
    QEMU's, it serves one client at a time; as QEMU's agent, it refuses to freeze while something is frozen, and a
    freeze that fails has frozen nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.did: list[str] = []
        self.frozen = False
        self.answers: dict[str, Any] = {}
        """In place of what a command is answered with; None: nothing at all."""
        self.before: dict[str, Callable[[], object]] = {}
        """What is called when it is asked something, by the names in `did`."""
        self.first = b""
        """What a former client has left unread."""
        self._client: socket.socket | None = None
        self.listen()

    def listen(self) -> None:
        """Be there (again)."""
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._serve, args=(self._listener,), name="agent", daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                self._client, _ = listener.accept()
            except OSError:
                return
            with suppress(OSError), self._client as client, client.makefile("rwb") as lines:
                lines.write(self.first)
                lines.flush()
                for line in lines:
                    answer = self._answer(json.loads(line.lstrip(b"\xff")))
                    if answer is not None:
                        lines.write(json.dumps(answer).encode() + b"\n")
                        lines.flush()

    def _answer(self, message: dict[str, Any]) -> dict[str, Any] | None:
        command = message["execute"]
        name = command.removeprefix("guest-fsfreeze-")
        self.before.get(name, bool)()
        if command == "guest-sync":
            found = self.answers.get(command, {"return": message["arguments"]["id"]})
        elif name == "status":
            found = self.answers.get(command, {"return": "frozen" if self.frozen else "thawed"})
        else:
            self.did.append(name)
            found = self.answers.get(command, self._freeze() if name == "freeze" else {"return": 3 * self.frozen})
            self.frozen = name == "freeze" and (self.frozen or "error" not in (found or {}))
        return dict(found) if found is not None else None

    def _freeze(self) -> dict[str, Any]:
        if self.frozen:
            return {"error": {"class": "CommandNotFound", "desc": "Command guest-fsfreeze-freeze has been disabled"}}
        return {"return": 3}

    def drop(self) -> None:
        """The connection to the client ends."""
        if self._client is not None:
            with suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody is there any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
