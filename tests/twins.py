# SPDX-License-Identifier: BSD-3-Clause
"""Two nodes that are each other's peer, either of which may own the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from content import MIB
from lab import Lab
from nodes import Secondary, Server
from waiting import DEADLINE_S, wait_until


class Twins:
    """Two nodes with the same command line but for the address: role=auto, and each other's peer."""

    def __init__(self, lab: Lab, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.nodes = [
            Twin(lab.folder, name, other, arguments, extra_environment=environment)
            for name, other in (("a", "b"), ("b", "a"))
        ]
        self.a, self.b = (lab.start(node) for node in self.nodes)

    def joined(self, owner: Server) -> None:
        """Wait until the other one is the owner's secondary and has everything, and take a checkpoint of that."""
        wait_until(lambda: owner.status()["link"]["state"] == "in-sync", "in sync", DEADLINE_S)
        owner.execute("replication-checkpoint")


class Twin(Secondary):
    """`name` with `other` as its peer."""

    def __init__(self, folder: Path, name: str, other: str, arguments: Sequence[str], **options: Any) -> None:
        peer = f"nbd+unix:///?socket={folder / other}.sock"
        more = ["autostart=true", f"peer={peer}", *arguments]
        super().__init__(folder, [MIB], name=name, extra_arguments=more, **options)
        self.arguments[0] = "role=auto"
