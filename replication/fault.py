# SPDX-License-Identifier: BSD-3-Clause
"""What went wrong, for get-error, query-replication and the event.

The cases are those of DESIGN 4. Cases 1 and 5 are the guest's to know, so they are told by an event but not
latched; the others stay until a resync has repaired them (or a commit that failed succeeds).
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from replication.errors import DiskError
from replication.events import EventHub

_EVENT_EVERY_S = 1.0
"""Least time between two events of one case and disk, so that a failing disk does not flood the clients."""


class Case(IntEnum):
    """The failures of DESIGN 4."""

    PRIMARY_DISK = 1
    FORWARD = 2
    COPY_BEFORE_WRITE = 3
    SECONDARY_DISK = 4
    ACTIVE_DISK = 5
    EMPTYING = 6
    COMMIT = 7
    LINK = 8


@dataclass
class Fault:
    """The first failure that is still latched. `first` and `last` are seconds since 1970."""

    case: int
    disk: str
    operation: str
    offset: int
    length: int
    errno: str
    desc: str
    count: int
    first: float
    last: float
    write_lost: bool

    def to_json(self) -> dict[str, Any]:
        """As in query-replication and in the state file."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Fault:
        """Raises TypeError for anything that `to_json` has not written."""
        fault = cls(**saved)
        for name, kind in _KINDS.items():
            if type(getattr(fault, name)) is not kind:
                raise TypeError(f"{name} of the fault is not of type {kind.__name__}")
        return fault


_KINDS: dict[str, type] = {
    **dict.fromkeys(("case", "offset", "length", "count"), int),
    **dict.fromkeys(("disk", "operation", "errno", "desc"), str),
    **dict.fromkeys(("first", "last"), float),
    "write_lost": bool,
}


class FaultLatch:
    """Keeps the first fault and counts those of the same kind."""

    def __init__(self, hub: EventHub, changed: Callable[[], None]) -> None:
        """`changed()` is called without locks when a fault was latched or cleared, to make it outlive the process."""
        self._hub = hub
        self._changed = changed
        # Protects the fields below. Never held across I/O.
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._told: dict[tuple[int, str], float] = {}

    def report(
        self,
        case: Case,
        disk: str,
        operation: str,
        offset: int,
        length: int,
        error: DiskError,
        write_lost: bool = False,
    ) -> None:
        """Note a failure. `write_lost`: the secondary disk lacks a write of the primary, so no checkpoint may
        be taken on it."""
        now = time.time()
        changed = False
        with self._lock:
            if self._fault is None:
                changed = True
                name = errno.errorcode.get(error.errno, str(error.errno))
                self._fault = Fault(
                    int(case), disk, operation, offset, length, name, str(error), 0, now, now, write_lost
                )
            self._fault.count += 1
            self._fault.last = now
            changed |= write_lost and not self._fault.write_lost
            self._fault.write_lost |= write_lost
        self.tell(case, disk, error)
        if changed:
            self._changed()

    def tell(self, case: Case, disk: str, error: DiskError) -> None:
        """The event alone: for a failure that the guest has learned of (cases 1 and 5, and what its reads meet)."""
        now = time.monotonic()
        with self._lock:
            key = (int(case), disk)
            due = now - self._told.get(key, -_EVENT_EVERY_S) >= _EVENT_EVERY_S
            if due:
                self._told[key] = now
        if due:
            self._hub.emit("REPLICATION_ERROR", case=int(case), disk=disk, desc=str(error))

    @property
    def fault(self) -> Fault | None:
        """The latched fault, or None."""
        with self._lock:
            return self._fault

    @property
    def write_lost(self) -> bool:
        """Whether the secondary disk lacks a write of the primary."""
        with self._lock:
            return self._fault is not None and self._fault.write_lost

    def clear(self) -> None:
        """Forget the fault: what it spoiled has been repaired."""
        with self._lock:
            had, self._fault = self._fault, None
            self._told.clear()
        if had is not None:
            self._changed()

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Take over the fault that a former process had latched."""
        with self._lock:
            self._fault = Fault.from_json(saved) if saved is not None else None
