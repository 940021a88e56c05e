# SPDX-License-Identifier: BSD-3-Clause
"""What waits for the secondary: entries, how many bytes of them there may be, and which are in flight.

Who waits for whom, and for how long
------------------------------------
a guest's write     for room in the queue (Budget), and with protocol=sync for the secondary's answer, together for
                    PATIENCE times `timeout` at most, whatever moves on the link. Then it goes on without: the
                    primary falls behind. Until the queue has drained no write waits; what is not sent is marked as
                    missing, and a resync brings it over.
a resync            for what the guest has to send. It takes no room in the queue (Forwarder.put_spare), and no more
                    than a flight at a time of the link.
the link            is given up by its connection alone (disk/connection.py): when bytes that the peer's kernel has
                    acknowledged, and answers, no longer come. What the queue and its waiters see says nothing of it.
how much, how large what is in flight, and an entry, is as large as the link and the secondary's disk are quick (Flow).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Final

import nbd

from replication.disk.connection import Completion
from replication.image.buffers import Buffers
from replication.image.qcow2 import BLOCK
from replication.order.ended import Ended

_ENTRY_COST = 512
"""Bytes an entry counts beside its data, so that a queue of zeroes and flushes is bounded as well."""

DATA_MIN, DATA_MAX = 64 << 10, 1 << 20
"""Least and most data of one entry, unless a write has less."""

ZERO_MIN, ZERO_MAX = 256 << 10, 64 << 20
"""The same for the range of one entry of zeroes."""

FLIGHT_MAX = 8 << 20
"""Most data in flight, unless one entry has more: what 1 Gbit/s carries in 60 ms. More would only wait in the socket,
and grow old there."""
_FLIGHT_FIRST = 256 << 10
"""Data in flight before anything is known of the link: 0.5 s at 4 Mbit/s."""

ZERO_FLIGHT_MAX = 1 << 30
_ZERO_FLIGHT_FIRST = 2 << 20
"""Zeroes in flight at most, and before anything is known: they are nothing to the link, but the secondary may have to
copy what they destroy."""

PATIENCE = 1.25
"""Times the timeout that a guest waits: a link that is dead is lost within 9/8 of it (disk/connection.py), and shall
count as that."""

_QUICK_PART = 20
"""An answer within this part of the timeout is quick (0.25 s of 5): about so long does a guest's write wait behind what
is in flight."""

_QUICK_ZEROES_PART = 8
"""The same of zeroes, which hold up nobody on the link: they must only be answered well within the timeout."""

_QUICKLY_FRESH = 64 << 10
"""Up to this length the data of an entry is in fresh memory: the allocator has it at hand, without page faults."""

_SMALL = 256 << 10
"""Longest entry that is known by its blocks."""


class Flow:
    """How much may be in flight: more while what fills it is answered quickly, half as much when it is not."""

    def __init__(self, least: int, first: int, most: int) -> None:
        self.window = first
        """Bytes."""
        self._least = least
        self._most = most
        self._halved_at = 0.0

    def learn(self, size: int, sent_at: float, now: float, in_flight: int, quick_s: float) -> None:
        """`size` bytes of the `in_flight` were answered at `now`, sent at `sent_at` (seconds, monotonic)."""
        age_s = now - sent_at
        if age_s < quick_s:
            if 2 * in_flight >= self.window:
                self.window = min(self._most, self.window + size)
        elif age_s > 2 * quick_s and sent_at >= self._halved_at:
            # Once for all that was sent before that shows.
            self.window = max(self._least, self.window // 2)
            self._halved_at = now


class _Waiter:
    """Who waits for room."""

    __slots__ = ("granted", "size", "woken")

    def __init__(self, size: int) -> None:
        self.size = size
        self.granted = False
        # A lock as a binary semaphore: held until there is something to look at.
        self.woken = threading.Lock()
        self.woken.acquire()

    def wake(self) -> None:
        """Let the waiting thread look."""
        if self.woken.locked():  # only under the budget's lock, so nobody else releases it
            self.woken.release()


class Budget:
    """Bytes that all queues of a node may hold together.

    Room is given to who waits first, so that small entries do not starve a large one, and by the thread that makes it:
    only who has got room is woken.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Protects the fields below. Never held across I/O.
        self._lock = threading.Lock()
        self._used = 0
        # Whether nobody waits, and how little has to be in use before somebody does again.
        self._behind = False
        self._resumes_at = 0
        self._line: deque[_Waiter] = deque()

    def take(self, size: int, pointless: Callable[[], bool], timeout_s: float, patient: bool = False) -> bool:
        """Wait for room; False when `pointless()` has become true (`wake` has it looked at), when there was none for
        `timeout_s` seconds, or when somebody else has waited so long: from then on nobody does, until half of the room
        is free. `patient`: wait on."""
        with self._lock:
            if self._behind and not patient:
                return False
            if not self._line and self._fits(size):
                self._used += size
                return True
            waiter = _Waiter(size)
            self._line.append(waiter)
        until = time.monotonic() + timeout_s
        woken = True
        while True:
            with self._lock:
                hopeless = pointless()
                if waiter.granted and not hopeless:
                    return True
                if waiter.granted or hopeless or (not patient and (self._behind or not woken)):
                    if waiter.granted:
                        self._used -= size  # what was lost has made room
                    else:
                        self._line.remove(waiter)
                    if not (waiter.granted or hopeless or self._behind):
                        self._fall_behind_locked(self.limit // 2)
                    self._admit_locked()
                    return False
            woken = waiter.woken.acquire(timeout=timeout_s if patient else max(0.0, until - time.monotonic()))

    def resize(self, limit: int) -> None:
        """Another limit from now on; what is in use beyond it leaves as it would have."""
        with self._lock:
            self.limit = limit
            self._admit_locked()

    @property
    def behind(self) -> bool:
        """Whether nobody waits for room."""
        return self._behind

    def fall_behind(self) -> None:
        """Nobody waits any more until nothing is in use: what is waited for takes too long."""
        with self._lock:
            self._fall_behind_locked(0)

    def _fall_behind_locked(self, resumes_at: int) -> None:
        if self._used > resumes_at:
            self._behind, self._resumes_at = True, resumes_at
            for waiter in self._line:
                waiter.wake()

    def take_now(self, size: int) -> bool:
        """Take room if there is some; whether there was. For a request to try first: preparing for a wait costs more
        than this does."""
        self._lock.acquire()
        try:
            used = self._used
            if self._behind or self._line or (used and used + size > self.limit):
                return False
            self._used = used + size
            return True
        finally:
            self._lock.release()

    def _fits(self, size: int) -> bool:
        return not self._used or self._used + size <= self.limit

    def _admit_locked(self) -> None:
        line = self._line
        while line and self._fits(line[0].size):
            waiter = line.popleft()
            self._used += waiter.size
            waiter.granted = True
            waiter.wake()

    def give(self, size: int) -> None:
        """Entries have left their queue."""
        with self._lock:
            self._used -= size
            if self._behind and self._used <= self._resumes_at:
                self._behind = False
            if self._line:
                self._admit_locked()

    def wake(self) -> None:
        """Have the waiters look at `pointless` again."""
        with self._lock:
            for waiter in self._line:
                waiter.wake()


class Kind(Enum):
    """What an entry asks of the secondary."""

    WRITE = "write"
    ZERO = "zero"
    FLUSH = "flush"
    CHECK = "check"
    """Asks for digests of the range at this place of the stream (verify.py). It changes nothing, so its failure is no
    failure to forward, unless it says that nothing is taken any more."""
    CUT = "cut"
    """The end of an epoch: nothing behind it is sent before all in front of it is answered and it is let go."""


WRITE: Final = Kind.WRITE
ZERO: Final = Kind.ZERO
FLUSH: Final = Kind.FLUSH
CHECK: Final = Kind.CHECK
CUT: Final = Kind.CUT


class Entry:
    """One request on its way; one NBD request, so at most DATA_MAX bytes of data or ZERO_MAX bytes of zeroes. (A cut is
    no request; it ends when it is reached.)"""

    # What most entries do not need is kept by the class: one is made for every write of a guest.
    data: bytes | memoryview = b""
    cost = _ENTRY_COST
    fua = False
    may_trim = False
    arrived = False
    let_go = False
    ended: Ended | None = None
    memory: Buffers | None = None
    spare = False
    """Of a resync: sent where the guest has nothing to send, and without room in the queue."""
    flush_number = 0
    """Of a flush: by which the change map knows it."""
    settled = False
    left = False
    """Nobody waits for its end any more (PrimaryDisk)."""
    answer: bytearray | None = None
    """Of a check: room for the answer, which is read at `answer_at`."""
    answer_at = 0
    marks = 0
    """Of a check: ChangeMap.marks before its place in the stream was taken."""
    refusal = 0
    """Of a check that was refused by the secondary: its errno."""

    def __init__(
        self,
        kind: Kind,
        offset: int = 0,
        length: int = 0,
        on_end: Callable[[Entry], None] | None = None,
        waited_for: bool = False,
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.on_end = on_end
        if waited_for:
            self.ended = Ended()

    def load(self, data: memoryview, memory: Buffers | None = None) -> None:
        """Take a copy of the data: nbdkit's buffer is gone when the guest is answered. `memory`, if there is any, is
        for large data, and `unload` gives it back.

        With memory that is used again, writes of 256k and 1M at depth 16 (tmpfs) are 3 to 12 % more a second. The copy
        keeps the GIL all the same: without (numpy.copyto) there are 11 futex calls a write instead of 6, and on two
        cores 10 % fewer writes.
        """
        if memory is None or self.length <= _QUICKLY_FRESH:
            self.data = bytes(data)
        else:
            self.memory = memory
            self.data = memory.take(self.length)
            self.data[:] = data
        self.cost = _ENTRY_COST + self.length

    def unload(self) -> None:
        """Give back what `load` has taken. Only when the secondary has the data: else libnbd may still read it."""
        if self.memory is not None and isinstance(self.data, memoryview):
            self.memory.give(self.data)
            self.data = b""

    @property
    def weight(self) -> int:
        """Bytes that it is for the link or, of zeroes, for the secondary's disk."""
        return self.length if self.kind is ZERO else len(self.data)

    def overlaps(self, other: Entry) -> bool:
        """Whether their order matters."""
        return _overlap(self, other)

    @property
    def flags(self) -> int:
        """NBD's flags for the request."""
        flags = nbd.CMD_FLAG_FUA if self.fua else 0
        return flags | nbd.CMD_FLAG_NO_HOLE if self.kind is ZERO and not self.may_trim else flags

    def issue(self, handle: nbd.NBD, completion: Completion) -> None:
        """Make the libnbd call, for what carries no data (Connection.write_alone sends what does)."""
        if self.kind is ZERO:
            handle.aio_zero(self.length, self.offset, completion, self.flags)
        elif self.kind is CHECK:
            handle.aio_pread(self.answer, self.answer_at, completion)
        else:
            handle.aio_flush(completion)

    @property
    def has_ended(self) -> bool:
        """Of an entry that is waited for: whether it has ended."""
        return self.ended is not None and self.ended.told

    def settle(self, arrived: bool) -> None:
        """The first half of `end`, for who ends many and tells it afterwards."""
        self.arrived = arrived
        if self.on_end is not None:
            self.on_end(self)

    def end(self, arrived: bool) -> None:
        """Tell whoever waits."""
        self.settle(arrived)
        if self.ended is not None:
            self.ended.set()


class InFlight:
    """The entries that the secondary has not answered; no two of them overlap.

    A small entry is known by its blocks alone, rounded up: entries that share one without overlapping are kept in
    order, too. Only a large one is compared with the others one by one.
    """

    def __init__(self) -> None:
        self._blocks: set[int] = set()
        # As dictionaries: they are taken out in any order.
        self._large: dict[Entry, None] = {}
        self._all: dict[Entry, None] = {}
        self.bytes = 0
        """Of data."""
        self.zeroes = 0
        """Bytes that are zeroed."""

    def __len__(self) -> int:
        return len(self._all)

    def give_up(self) -> list[Entry]:
        """All of them; none is in flight any more."""
        left = [*self._all]
        self.remove(left)
        return left

    def admit(self, entry: Entry) -> bool:
        """Add the entry, which goes to the secondary; False, with nothing changed, if its order and that of one in
        flight matters."""
        block = entry.offset // BLOCK
        if block == (entry.offset + entry.length - 1) // BLOCK and not self._large:
            # Writes of one block are the many, and nothing else is asked of each: 0.4 us instead of 1.6.
            if block in self._blocks:
                return False
            self._blocks.add(block)
        elif self._meets(entry):
            return False
        elif _is_small(entry):
            self._blocks.update(_blocks(entry))
        else:
            self._large[entry] = None
        self._all[entry] = None
        self.bytes += len(entry.data)
        if entry.kind is ZERO:
            self.zeroes += entry.length
        return True

    def _meets(self, entry: Entry) -> bool:
        if entry.kind is FLUSH:
            return bool(self._all)
        blocks = _blocks(entry)
        if len(blocks) <= len(self._blocks):
            hit = not self._blocks.isdisjoint(blocks)
        else:
            hit = any(block in blocks for block in self._blocks)
        if hit or not self._large:
            return hit
        return any(_overlap(entry, other) for other in self._large)

    def remove(self, entries: Iterable[Entry]) -> None:
        """The secondary has answered."""
        for entry in entries:
            del self._all[entry]
            self.bytes -= len(entry.data)
            if entry.kind is ZERO:
                self.zeroes -= entry.length
            block = entry.offset // BLOCK
            if block == (entry.offset + entry.length - 1) // BLOCK:
                self._blocks.discard(block)
            elif _is_small(entry):
                self._blocks.difference_update(_blocks(entry))
            else:
                del self._large[entry]


def _is_small(entry: Entry) -> bool:
    return entry.length <= _SMALL and entry.kind is not FLUSH


def _blocks(entry: Entry) -> range:
    return range(entry.offset // BLOCK, (entry.offset + entry.length - 1) // BLOCK + 1)


def _overlap(one: Entry, other: Entry) -> bool:
    if other.kind is FLUSH:
        return True
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length


def cost(entries: Sequence[Entry]) -> int:
    """What the entries together take of the budget, in bytes."""
    return sum([entry.cost for entry in entries])


class Flows:
    """What may be in flight on one connection, of data and of zeroes."""

    def __init__(self) -> None:
        self.data = Flow(DATA_MIN, _FLIGHT_FIRST, FLIGHT_MAX)
        self.zeroes = Flow(ZERO_MIN, _ZERO_FLIGHT_FIRST, ZERO_FLIGHT_MAX)
        # Kept, because every write asks for it.
        self.data_piece = DATA_MIN
        """Most data of an entry now, in bytes: half of what may be in flight."""
        self.fit()

    def fit(self) -> None:
        """The window of data has changed, perhaps."""
        self.data_piece = max(DATA_MIN, min(DATA_MAX, self.data.window // 2))

    def have_room(self, in_flight: InFlight) -> bool:
        """Whether another entry may be sent. An entry may be larger than what is left."""
        return in_flight.bytes <= self.data.window and in_flight.zeroes <= self.zeroes.window

    @property
    def zero_piece(self) -> int:
        """Longest range of an entry of zeroes now, in bytes: one that fills the flight, since each is a round trip."""
        return max(ZERO_MIN, min(ZERO_MAX, 2 * self.zeroes.window))

    def learn(self, entries: Sequence[Entry], sent_at: float, in_flight: InFlight, timeout_s: float) -> None:
        """Entries that were sent together were answered now."""
        now = time.monotonic()
        if entries[0].kind is ZERO:
            self.zeroes.learn(entries[0].length, sent_at, now, in_flight.zeroes, timeout_s / _QUICK_ZEROES_PART)
        elif entries[0].kind is WRITE:
            size = sum([len(entry.data) for entry in entries])
            self.data.learn(size, sent_at, now, in_flight.bytes, timeout_s / _QUICK_PART)
            self.fit()
