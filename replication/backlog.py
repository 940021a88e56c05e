# SPDX-License-Identifier: BSD-3-Clause
"""What waits for the secondary: entries, how many bytes of them there may be, and which are in flight."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

import nbd

from replication.image.connection import Completion
from replication.image.qcow2 import BLOCK

_ENTRY_COST = 512
"""Bytes an entry counts beside its data, so that a queue of zeroes and flushes is bounded as well."""

DATA_MAX = 1 << 20
"""Most data of one entry: on a slow link every answer counts as progress, and one megabyte takes 0.8 s at 10 Mbit/s."""

ZERO_MAX = 64 << 20
"""Longest range of one entry of zeroes: the secondary has to copy before it writes, which must not look like a link
without progress."""

FLIGHT_MAX = 8 << 20
"""Most data in flight, unless one entry has more: what 1 Gbit/s carries in 60 ms. More would only wait in the socket,
and grow old there."""

_SMALL = 64 << 10


class Budget:
    """Bytes that all queues of a node may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Protects the counters. Never held across I/O. `_room` is notified when bytes are given back or a link is lost.
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._used = 0
        self._given = 0
        # Who waits for room, first come first served, so that small entries do not starve a large one.
        self._line: deque[object] = deque()

    def take(self, count: int, pointless: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for room; False when `pointless()` has become true, or when no entry has left any queue for
        `timeout_s` seconds: as long as some do, the link is slow but not lost."""
        with self._lock:
            if not self._line and self._fits(count):
                self._used += count
                return True
            ticket = object()
            self._line.append(ticket)
            try:
                given = -1
                while given != self._given:
                    given = self._given
                    if self._room.wait_for(
                        lambda: pointless() or (self._line[0] is ticket and self._fits(count)), timeout_s
                    ):
                        break
                else:
                    return False
                if pointless():
                    return False
                self._used += count
                return True
            finally:
                self._line.remove(ticket)
                self._room.notify_all()

    def _fits(self, count: int) -> bool:
        return not self._used or self._used + count <= self.limit

    def give(self, count: int) -> None:
        """An entry has left its queue."""
        with self._lock:
            self._used -= count
            self._given += 1
            if self._line:
                self._room.notify_all()

    def wake(self) -> None:
        """Have the waiters look at `pointless` again."""
        with self._lock:
            self._room.notify_all()


class Kind(Enum):
    """What an entry asks of the secondary."""

    WRITE = "write"
    ZERO = "zero"
    FLUSH = "flush"
    CUT = "cut"
    """The end of an epoch: nothing behind it is sent before all in front of it is answered and it is let go."""


class Entry:
    """One request on its way; one NBD request, so at most DATA_MAX bytes of data or ZERO_MAX bytes of zeroes. (A cut is
    no request; it ends when it is reached.)"""

    __slots__ = ("arrived", "cost", "data", "ended", "fua", "kind", "length", "let_go", "may_trim", "offset", "on_end")

    def __init__(
        self,
        kind: Kind,
        offset: int = 0,
        length: int = 0,
        fua: bool = False,
        may_trim: bool = False,
        on_end: Callable[[Entry], None] | None = None,
        waited_for: bool = False,
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.data = b""
        self.fua = fua
        self.may_trim = may_trim
        self.on_end = on_end
        self.cost = _ENTRY_COST
        self.arrived = False
        self.let_go = False
        self.ended = threading.Event() if waited_for else None

    def load(self, data: memoryview) -> None:
        """Take a copy of the data: nbdkit's buffer is gone when the guest is answered."""
        self.data = bytes(data)
        self.cost = _ENTRY_COST + len(data)

    @property
    def flags(self) -> int:
        """NBD's flags for the request."""
        flags = nbd.CMD_FLAG_FUA if self.fua else 0
        return flags | nbd.CMD_FLAG_NO_HOLE if self.kind is Kind.ZERO and not self.may_trim else flags

    def issue(self, handle: nbd.NBD, completion: Completion) -> None:
        """Make the libnbd call, for what carries no data (Connection.write_alone sends what does)."""
        if self.kind is Kind.ZERO:
            handle.aio_zero(self.length, self.offset, completion, self.flags)
        else:
            handle.aio_flush(completion)

    def end(self, arrived: bool) -> None:
        """Tell whoever waits."""
        self.arrived = arrived
        if self.on_end is not None:
            self.on_end(self)
        if self.ended is not None:
            self.ended.set()


class InFlight:
    """The entries that the secondary has not answered; no two of them overlap.

    A small entry is found by its blocks; only a large one or a flush is compared with the others one by one.
    """

    def __init__(self) -> None:
        self._blocks: set[int] = set()
        # As dictionaries: they are taken out in any order.
        self._small: dict[Entry, None] = {}
        self._large: dict[Entry, None] = {}
        self.bytes = 0
        """Of data."""

    def __len__(self) -> int:
        return len(self._small) + len(self._large)

    def __iter__(self) -> Iterator[Entry]:
        return itertools.chain(self._small, self._large)

    def meets(self, entry: Entry) -> bool:
        """Whether the order of the entry and one in flight matters. Blocks are rounded up: entries that share one
        without overlapping are kept in order, too."""
        if entry.kind is Kind.FLUSH:
            return len(self) > 0
        if _is_small(entry):
            return not self._blocks.isdisjoint(_blocks(entry)) or any(_overlap(entry, other) for other in self._large)
        return any(_overlap(entry, other) for other in self)

    def add(self, entry: Entry) -> None:
        """The entry goes to the secondary."""
        self.bytes += len(entry.data)
        if _is_small(entry):
            self._small[entry] = None
            self._blocks.update(_blocks(entry))
        else:
            self._large[entry] = None

    def remove(self, entry: Entry) -> None:
        """The secondary has answered."""
        self.bytes -= len(entry.data)
        if _is_small(entry):
            del self._small[entry]
            self._blocks.difference_update(_blocks(entry))
        else:
            del self._large[entry]


def _is_small(entry: Entry) -> bool:
    return entry.kind is not Kind.FLUSH and entry.length <= _SMALL


def _blocks(entry: Entry) -> range:
    return range(entry.offset // BLOCK, -(-(entry.offset + entry.length) // BLOCK))


def _overlap(one: Entry, other: Entry) -> bool:
    if other.kind is Kind.FLUSH:
        return True
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length


def cost(entries: Sequence[Entry]) -> int:
    """What the entries together take of the budget, in bytes."""
    return sum(entry.cost for entry in entries)
