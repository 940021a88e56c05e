# SPDX-License-Identifier: BSD-3-Clause
"""Commands that change nothing for long, or that have to be refused: all that a node knows, and replctl."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from checkout import REPOSITORY
from lab import QmpError
from soak.bounds import Bounds
from soak.node import Node
from soak.plan import Event
from waiting import Stuck

QUERIES = (
    "query-replication",
    "query-jobs",
    "query-commands",
    "query-version",
    "query-failover",
    "query-xen-replication-status",
    "replication-get-error",
)
REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("replication-start", {"mode": "elsewhere"}),
    ("replication-checkpoint-abort", {"epoch": 1 << 40}),
    ("replication-checkpoint-commit", {"epoch": 1 << 40}),
    ("job-cancel", {"id": "nobody"}),
    ("job-dismiss", {"id": "nobody"}),
    ("replication-checkpoint", {"hold": "perhaps"}),
    ("xen-set-replication", {"enable": 1}),
    ("replication-stop", {"failover": "maybe"}),
    ("no-such-command", {}),
)
REPLCTL = (["status"], ["status", "--json"], ["jobs"], ["error"], ["failover", "--check"])
GONE = (OSError, EOFError, AssertionError)
"""What a client meets whose node goes meanwhile."""


class Commands:
    """One after the other, on either node."""

    def __init__(self, nodes: dict[str, Node], first: Callable[[], Node], bounds: Bounds) -> None:
        self._nodes = nodes
        self._first = first
        self._bounds = bounds

    def run(self, event: Event) -> None:
        """One event of the plan's lane."""
        node = self._nodes[event.values["host"]]
        choice = event.values["choice"]
        self._bounds.did(f"commands: {event.name}")
        if event.name == "query":
            self.ask(node, QUERIES[choice % len(QUERIES)])
        elif event.name == "refused":
            name, arguments = REFUSED[choice % len(REFUSED)]
            if self.ask(node, name, **arguments):
                self._bounds.violate(f"{name} {arguments} was not refused")
        elif event.name == "checkpoint":
            self.ask(self._first(), "replication-checkpoint", limit_s=None)
        elif event.name == "hold":
            self._hold(choice)
        elif event.name == "cancel":
            self.ask(self._first(), "job-cancel", id="resync-disk0")
        elif event.name == "events":
            self._listen(node)
        else:
            self._replctl(node, REPLCTL[choice % len(REPLCTL)])

    def ask(self, node: Node, command: str, limit_s: float | None = 2.0, **arguments: Any) -> Any:
        """The answer, {} if it has none; None if it was refused, or the node has gone meanwhile. An answer within
        `limit_s` is a bound where that is promised: for queries."""
        begun = time.monotonic()
        try:
            answer = node.execute(command, arguments) or {True: True}
        except QmpError:
            answer = None
        except Stuck as error:
            self._bounds.violate(f"{command} on {node.name}: {error}")
            return None
        except GONE:
            return None
        if command in QUERIES and limit_s is not None:
            self._bounds.answered(command, begun, time.monotonic(), limit_s)
        return answer

    def _hold(self, choice: int) -> None:
        node = self._first()
        held = self.ask(node, "replication-checkpoint", limit_s=None, hold=True)
        if held is None:
            return
        time.sleep(choice % 10 / 20)
        name = "replication-checkpoint-commit" if choice % 2 else "replication-checkpoint-abort"
        self.ask(node, name, limit_s=None, epoch=held["epoch"])

    def _listen(self, node: Node) -> None:
        """A client that listens for a moment, and goes without a word."""
        try:
            with node.process.qmp() as qmp:
                qmp.execute("query-version")
                time.sleep(0.2)
        except (*GONE, QmpError):
            pass

    def _replctl(self, node: Node, words: list[str]) -> None:
        socket_path = node.process.control_path
        command = [sys.executable, str(REPOSITORY / "scripts/replctl"), "--control", str(socket_path), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr:
            self._bounds.violate(f"replctl {words}: exit {done.returncode}: {done.stderr[-300:]}")
