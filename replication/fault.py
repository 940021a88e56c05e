# SPDX-License-Identifier: BSD-3-Clause
"""What went wrong, for get-error, query-replication and the event.

The cases are those of docs/failures.md. Cases 1 and 5 are the guest's to know, so they are told by an event but
not latched; the others stay until a resync has repaired them (or a commit that failed succeeds). Failures of one case
and disk are counted together; the event comes at most once a second for each and says how many there were.
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
    """The failures, numbered as in docs/failures.md."""

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
    """Failures of one case on one disk: the first of them, how many, and when. Offset and length are bytes, `first` and
    `last` seconds since 1970."""

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

    def to_json(self) -> dict[str, Any]:
        """As in query-replication and in the state file."""
        return asdict(self)

    @classmethod
    def of(cls, case: Case, disk: str, operation: str, offset: int, length: int, error: DiskError) -> Fault:
        """One failure, now, not yet counted."""
        now = time.time()
        name = errno.errorcode.get(error.errno, str(error.errno))
        return cls(int(case), disk, operation, offset, length, name, str(error), 0, now, now)

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
}


class FaultLatch:
    """Counts failures and keeps the first kind that must not be forgotten."""

    def __init__(self, hub: EventHub, changed: Callable[[], None]) -> None:
        """`changed()` is called without locks when a fault was latched or cleared, to make it outlive the process."""
        self._hub = hub
        self._changed = changed
        # Protects the fields below. Never held across I/O.
        self._lock = threading.Lock()
        self._latched: Fault | None = None
        self._counted: dict[tuple[int, str, bool], Fault] = {}
        self._told: dict[tuple[int, str, bool], float] = {}

    def report(self, case: Case, disk: str, operation: str, offset: int, length: int, error: DiskError) -> None:
        """Note a failure, tell it, and latch it unless another one is latched."""
        if self.latch(case, disk, operation, offset, length, error):
            self.keep()

    def latch(self, case: Case, disk: str, operation: str, offset: int, length: int, error: DiskError) -> bool:
        """`report` for who holds a lock, so that the fault and something else are seen at one moment: True when `keep`
        has to be called, without locks."""
        return self._note(True, Fault.of(case, disk, operation, offset, length, error))

    def keep(self) -> None:
        """Make what is latched outlive the process."""
        self._changed()

    def tell(self, case: Case, disk: str, operation: str, offset: int, length: int, error: DiskError) -> None:
        """Note a failure and tell it, but do not latch it: the guest has learned of it (cases 1 and 5)."""
        self._note(False, Fault.of(case, disk, operation, offset, length, error))

    def _note(self, latch: bool, fault: Fault) -> bool:
        """Count a failure and tell it; whether it is latched now and was not before."""
        changed = False
        with self._lock:
            key = (fault.case, fault.disk, latch)
            counted = self._counted.setdefault(key, fault)
            counted.count += 1
            counted.last = fault.last
            if latch and self._latched is None:
                self._latched = counted
                changed = True
            now = time.monotonic()
            due = now - self._told.get(key, -_EVENT_EVERY_S) >= _EVENT_EVERY_S
            if due:
                self._told[key] = now
            shown = {**fault.to_json(), "count": counted.count, "first": counted.first}
        if due:
            self._hub.emit("REPLICATION_ERROR", **shown)
        return changed

    @property
    def fault(self) -> Fault | None:
        """The latched fault, or None."""
        with self._lock:
            return self._latched

    def clear(self, repaired: Callable[[Fault], bool] = lambda fault: True) -> bool:
        """Forget the latched fault, if `repaired(fault)` says that what it spoiled is in order again; whether it did.
        `repaired` is asked while nothing can be reported, so it sees what every reporter has done before."""
        with self._lock:
            cleared = self._latched is not None and repaired(self._latched)
            if cleared:
                self._latched = None
                self._counted.clear()
                self._told.clear()
        if cleared:
            self._changed()
        return cleared

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Take over the fault that a former process had latched."""
        if saved is not None:
            fault = Fault.from_json(saved)
            with self._lock:
                self._latched = fault
                self._counted[fault.case, fault.disk, True] = fault
