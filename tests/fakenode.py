# SPDX-License-Identifier: BSD-3-Clause
"""A node that is only a control socket: it answers as the test says, hangs, dies and comes back."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

from waiting import DEADLINE_S


def status(mode: str = "primary", **more: Any) -> dict[str, Any]:
    """query-replication of a healthy node with one disk."""
    link = {"state": "in-sync", "reason": None, "secondary" if mode == "primary" else "primary": "x"}
    disk: dict[str, Any] = {"name": "disk0", "size": 1 << 30, "out-of-sync-bytes": 0, "marks": 0}
    if mode == "primary":
        disk |= {"forward-queue-bytes": 4096, "totals": {"read": 10, "written": 20, "forwarded": 30}}
    else:
        disk |= {"top-id": "top0", "active-bytes": 4096, "hidden-bytes": 8192}
        disk["totals"] = {"guest-read": 1, "guest-written": 2, "target-read": 3, "target-written": 4}
    return {
        "mode": mode,
        "stage": "running",
        "error": None,
        "epoch": 7,
        "checkpoint": {"time": time.time() - 2, "duration": 0.002, "age": 2.0},
        "node": "n" + mode,
        "peer-node": "n" + ("secondary" if mode == "primary" else "primary"),
        "generation": "g",
        "consistent": True,
        "link": link,
        "disks": [disk],
        **({"checkpoint-obstacle": None} if mode == "secondary" else {}),
        **more,
    }


class FakeNode:
    """Serves `answers` (command -> return) at `path` while it is started. `hanging` set: it takes requests, and does
    not answer until it is cleared."""

    def __init__(self, path: Path, mode: str = "primary", **more: Any) -> None:
        self.path = path
        self.answers: dict[str, Any] = {
            "qmp_capabilities": {},
            "query-version": {"qemu": {"major": 7}, "package": "nbdkit-replication 0"},
            "query-replication": status(mode, **more),
            "query-jobs": [],
            "query-failover": {"allowed": True, "checkpoint-age": 2.0, "bytes-to-commit": 4096, "predicted-seconds": 1},
        }
        self.greeting = b'{"QMP": {"version": {}, "capabilities": []}}\n'
        self.asked: list[str] = []
        self.answering = threading.Event()
        self.answering.set()
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._clients: list[socket.socket] = []

    def start(self) -> FakeNode:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def die(self) -> None:
        """As a process that is killed does: the socket's file stays."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        self.answering.set()

    def restart(self) -> None:
        self.die()
        self.path.unlink()
        self.start()

    def emit(self, name: str, **data: Any) -> None:
        now = time.time()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        line = json.dumps({"event": name, "data": data, "timestamp": stamp}).encode() + b"\n"
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.sendall(line)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError), client.makefile("rb") as lines:
            client.sendall(self.greeting)
            for line in lines:
                request = json.loads(line)
                self.asked.append(request["execute"])
                if not self.answering.wait(DEADLINE_S):
                    return
                answer = json.dumps({"return": self.answers[request["execute"]], "id": request["id"]}).encode() + b"\n"
                with self._lock:
                    client.sendall(answer)
                    if client not in self._clients:
                        self._clients.append(client)
        with self._lock:
            if client in self._clients:
                self._clients.remove(client)
