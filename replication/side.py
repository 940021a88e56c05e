# SPDX-License-Identifier: BSD-3-Clause
"""What the two modes have in common for the node that commands them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from replication.events import EventHub
from replication.fault import FaultLatch
from replication.gate import Gate
from replication.jobs import JobList
from replication.options import Options
from replication.stage import Mode, Stage
from replication.state import Record, StateFolder


@dataclass
class Setting:
    """What a side works with; the node owns it."""

    options: Options
    state: StateFolder
    record: Record
    hub: EventHub
    jobs: JobList
    faults: FaultLatch
    gate: Gate
    enter: Callable[[Stage], None]
    """`enter(stage)`: make the stage last, show it to all disks, tell the clients. The gate is closed."""
    save: Callable[[], None]
    """Make the record last."""


class Side(ABC):
    """A primary or a secondary: the disks of one process in one mode.

    Commands come one at a time (the node holds its command lock) and raise CommandError when they changed nothing.
    """

    mode: Mode

    @abstractmethod
    def open(self) -> None:
        """Open disks and images as the recorded stage needs them; ConfigError says what is wrong. No threads yet."""

    @abstractmethod
    def launch(self) -> None:
        """Start the threads, and go on with what a former process had begun."""

    @abstractmethod
    def show_stage(self, stage: Stage) -> None:
        """Requests from now on follow this stage. The gate is closed, or nothing is served yet."""

    @abstractmethod
    def start(self, secondary: str | None, sync: str) -> None:
        """From none (or, with a new secondary, done) to running."""

    @abstractmethod
    def checkpoint(self) -> None:
        """A checkpoint, or on a primary a barrier, in stage running."""

    @abstractmethod
    def stop(self, failover: bool) -> None:
        """Leave stage running."""

    @abstractmethod
    def retry(self) -> None:
        """From failover-failed back to failover."""

    @abstractmethod
    def query(self) -> dict[str, Any]:
        """The members of query-replication that depend on the mode: `consistent`, `link`, `disks`."""

    @abstractmethod
    def close(self) -> None:
        """End threads, within bounded time, and let go of disks."""


def disk_list(disks: dict[str, int]) -> str:
    """Names and sizes for a message."""
    return ", ".join(f"'{name}' of {size} bytes" for name, size in disks.items())
