# SPDX-License-Identifier: BSD-3-Clause
"""live.py: how the guest is held, and let go."""

from __future__ import annotations

from typing import Any, cast

import pytest

from replication.client.live import LiveMove
from replication.client.qmp import Refused
from replication.client.session import Session

DISKS = [{"name": "disk0", "size": 4096, "out-of-sync-bytes": 0, "totals": {"written": 0}}]


class Side:
    """A node, and every conversation with it."""

    def __init__(self, mode: str, refuses: bool = False) -> None:
        self.status: dict[str, Any] = {"mode": mode, "stage": "running", "error": None, "disks": DISKS}
        self.status["passing"] = {"guests": 1}
        self.refuses = refuses
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def hurry(self, _until: float) -> None:
        pass

    def again(self, _timeout_s: float) -> Side:
        return self

    def call(self, command: str, **arguments: Any) -> Any:
        if command == "query-replication":
            return dict(self.status)
        self.calls.append((command, arguments))
        if command == "replication-stop":
            if self.refuses:
                raise Refused("no")
            self.status["stage"] = "done"
        if command == "replication-start":
            self.status["stage"] = "running"
        return None


@pytest.mark.parametrize("refuses", [False, True], ids=["moved", "taken-back"])
def test_the_hold_alone_ends_with_the_move(refuses: bool) -> None:
    """Whoever else keeps the guest back is not overruled."""
    sides = {"a": Side("primary"), "b": Side("secondary", refuses)}
    move = LiveMove(cast("dict[str, Session]", sides), 10.0, lambda _line: None)
    if refuses:
        with pytest.raises(Refused, match="nothing has changed"):
            move.run()
    else:
        move.run()
    hold, end = ("replication-suspend-io", {"timeout": 10.0}), ("replication-suspend-io", {"timeout": 0})
    assert sides["b"].calls == [hold, ("replication-stop", {}), end]
