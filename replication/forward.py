# SPDX-License-Identifier: BSD-3-Clause
"""The forward queue of one disk and the link that drains it.

Invariants
* Requests reach the secondary in the order in which they were put, as far as they overlap: the order of the queue
  is the order on the local disk (primary_disk.py), and no request is sent while one that overlaps it is in flight,
  since an NBD server may reorder those. A flush overlaps everything.
* The queue holds at most `Budget.limit` bytes over all disks, or one request that is larger.
* Every entry ends exactly once, with `arrived` true or false.
* A failure never reaches the guest: it goes to `Forwarder.failed`, and the change map keeps what is missing.
* The link counts as lost when the connection goes, or makes no progress for `timeout_s` seconds; from then
  on entries end at once, so a dead secondary holds up a guest once, for at most that long.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum

from replication.backlog import Budget, Entry, InFlight, Kind, cost
from replication.errors import DiskError
from replication.image.connection import Connection, Request
from replication.pause import pause

WINDOW = 64
"""Requests in flight; DESIGN 8: libnbd reaches 77k requests a second from one thread with this many."""

_IDLE_S = 1.0
_NAP_S = 0.0005
"""Between two batches: what an asynchronous write may be late on the secondary, and what bounds the thread to 2,000
rounds a second."""
_ACTIVE_S = 0.02
"""After the last entry the thread naps for so long before it sleeps: waking it costs the guest a system call."""


class LinkState(Enum):
    """What query-replication and REPLICATION_LINK say of the link."""

    DISCONNECTED = "disconnected"
    CONNECTING = "connecting"
    IN_SYNC = "in-sync"
    LOST = "lost"


Failed = Callable[[Entry | None, DiskError], None]


class Rest(Enum):
    """What the forwarding thread does: who puts an entry has to wake it from SLEEP, and for an urgent one from NAP."""

    NONE = "working"
    NAP = "nap"
    SLEEP = "sleep"


class Forwarder:
    """Sends one disk's writes to the secondary, by a thread of its own."""

    def __init__(
        self,
        disk_name: str,
        budget: Budget,
        timeout_s: float,
        failed: Failed,
        state_changed: Callable[[LinkState], None],
    ) -> None:
        self.disk_name = disk_name
        self.timeout_s = timeout_s
        self._budget = budget
        self._failed = failed
        self._state_changed = state_changed
        # Protects the fields below. Never held across I/O.
        self._lock = threading.Lock()
        self._queue: deque[Entry] = deque()
        self._in_flight = InFlight()
        # Entries that the secondary has answered and their errno; only the forwarding thread touches it.
        self._answered: deque[tuple[Entry, int]] = deque()
        # Entries queued or in flight that somebody waits for.
        self._awaited = 0
        self._rest = Rest.NONE
        self._state = LinkState.DISCONNECTED
        self._stopping = False
        self._connection: Connection | None = None
        self._thread: threading.Thread | None = None
        self.bytes_forwarded = 0

    # -- link ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> LinkState:
        """The link's state."""
        return self._state

    @property
    def up(self) -> bool:
        """Whether entries put now will be sent."""
        return self._state is LinkState.IN_SYNC

    def adopt(self, connection: Connection) -> None:
        """Begin to forward over a fresh connection; the former one, if any, was lost or stopped."""
        connection.timeout_s = self.timeout_s
        with self._lock:
            self._connection = connection
            self._stopping = False
            self._state = LinkState.IN_SYNC
        self._thread = threading.Thread(target=self._run, args=(connection,), name="forward", daemon=True)
        self._thread.start()
        self._state_changed(LinkState.IN_SYNC)

    def note(self, state: LinkState) -> None:
        """Show a state while there is no connection."""
        self._state = state
        self._state_changed(state)

    # -- queue ---------------------------------------------------------------------------------------------

    def reserve(self, entries: Sequence[Entry]) -> bool:
        """Wait for room for all the entries, at most until the link counts as lost; False when it does."""
        connection = self._connection
        if not self.up or connection is None:
            return False
        if self._budget.take(cost(entries), lambda: not self.up, self.timeout_s):
            return True
        if self.up:
            self._lose(
                connection, DiskError(f"the secondary took no data from the full queue for {self.timeout_s:g} s")
            )
        return False

    def unreserve(self, entries: Sequence[Entry]) -> None:
        """The entries will not be put after all."""
        self._budget.give(cost(entries))

    def put(self, entry: Entry) -> None:
        """Queue an entry for which `reserve` has made room. It may end before this returns."""
        with self._lock:
            connection = self._connection
            taken = self._state is LinkState.IN_SYNC and connection is not None
            if taken:
                self._queue.append(entry)
                self._awaited += entry.ended is not None
            wake = taken and (self._rest is Rest.SLEEP or (self._rest is Rest.NAP and entry.ended is not None))
            if wake:
                self._rest = Rest.NONE
        if wake and connection is not None:
            connection.poke()
        if not taken:
            self._budget.give(entry.cost)
            entry.end(False)

    def await_end(self, entry: Entry) -> bool:
        """Wait until an entry has ended; whether it arrived. Bounded: the link is lost without progress."""
        assert entry.ended is not None
        while not entry.ended.wait(self.timeout_s):
            if not self.up:
                # What was lost ends in the forwarder's thread; without one it has ended already.
                entry.ended.wait(self.timeout_s)
                break
        return entry.arrived

    @property
    def queue_bytes(self) -> int:
        """Bytes put and not yet answered."""
        with self._lock:
            return sum(len(entry.data) for entry in [*self._queue, *self._in_flight])

    @property
    def idle(self) -> bool:
        """Whether everything put has ended."""
        with self._lock:
            return not self._queue and not self._in_flight

    def stop(self, drain_s: float) -> None:
        """Send what is queued, for at most `drain_s` seconds, then let the connection go. What has not arrived by
        then ends as not arrived."""
        barrier = Entry(Kind.FLUSH, waited_for=True)
        if drain_s > 0 and self.up and self.reserve([barrier]):
            self.put(barrier)
            assert barrier.ended is not None
            barrier.ended.wait(drain_s)
        with self._lock:
            self._stopping = True
            connection = self._connection
        if connection is not None:
            connection.poke()
        thread = self._thread
        if thread is not None:
            thread.join(self.timeout_s)
            if not thread.is_alive():
                self._thread = None

    # -- the forwarding thread -----------------------------------------------------------------------------

    def _run(self, connection: Connection) -> None:
        active_until = 0.0
        while True:
            self._end_answered(connection)
            with self._lock:
                if self._stopping or connection.dead:
                    break
                entries = self._next_locked()
                in_flight = len(self._in_flight)
                # What the guest does not wait for is sent in batches: a hand-over of the GIL for every write costs the
                # guest more than the write itself (4k writes at depth 16 to a slow disk: 6k without, 9k with it).
                hurry = self._awaited > 0 or bool(self._queue) or in_flight >= WINDOW
                nap = not hurry and (in_flight > 0 or time.monotonic() < active_until)
                self._rest = Rest.NONE if entries else Rest.NAP if nap else Rest.SLEEP
            if entries:
                active_until = time.monotonic() + _ACTIVE_S
                for entry in entries:
                    self._send(connection, entry)
                connection.drain_alone()
            elif nap:
                connection.nap(_NAP_S)
                connection.drain_alone()
                connection.check_progress()
            else:
                connection.drive(_IDLE_S)
                connection.drain_alone()
        if connection.dead:
            self._lose(connection, DiskError(connection.cause))
        self._wind_up(connection)

    def _next_locked(self) -> list[Entry]:
        """The next entries, moved into flight, up to the first that has to wait for one in flight."""
        entries: list[Entry] = []
        while self._queue and len(self._in_flight) < WINDOW and not self._in_flight.meets(self._queue[0]):
            entry = self._queue.popleft()
            self._in_flight.add(entry)
            entries.append(entry)
        return entries

    def _send(self, connection: Connection, entry: Entry) -> None:
        pause("forward.send")

        def answered(request: Request) -> None:
            self._answered.append((entry, request.errno))

        try:
            if entry.kind is Kind.WRITE:
                connection.write_alone(entry.data, entry.offset, entry.flags, answered)
            else:
                connection.issue(entry.issue, 0, answered)
        except DiskError as error:
            self._answered.append((entry, error.errno))

    def _end_answered(self, connection: Connection) -> None:
        """End the entries that the secondary has answered; the link's own failure is told once, not for each."""
        while self._answered:
            entry, number = self._answered.popleft()
            if number and not connection.dead:
                what = f"the secondary answered {entry.kind.value} of {entry.length} bytes at {entry.offset} with"
                self._failed(entry, DiskError(f"{what}: {os.strerror(number)}", number))
            with self._lock:
                self._in_flight.remove(entry)
                self._awaited -= entry.ended is not None
            if not number:
                self.bytes_forwarded += entry.length
            self._budget.give(entry.cost)
            entry.end(not number)

    def _lose(self, connection: Connection, error: DiskError) -> None:
        """The link is lost: from now on entries end at once. Called by the forwarding thread, and by a guest's
        thread that found the queue stuck."""
        with self._lock:
            if self._state is LinkState.LOST or self._stopping:
                return
            self._state = LinkState.LOST
        connection.fail(str(error))
        self._failed(None, error)
        self._state_changed(LinkState.LOST)
        self._budget.wake()

    def _wind_up(self, connection: Connection) -> None:
        """Take back what is in flight and end everything; then the connection is nobody's."""
        deadline = time.monotonic() + self.timeout_s
        if not connection.dead and connection.in_flight:
            connection.fail("replication was stopped")
        while connection.in_flight and time.monotonic() < deadline:
            connection.drive(_IDLE_S)
        self._end_answered(connection)
        with self._lock:
            if self._state is LinkState.IN_SYNC:
                self._state = LinkState.DISCONNECTED
            left = [*self._queue]
            self._queue.clear()
            self._awaited = 0
            self._connection = None
            stopped = self._state is LinkState.DISCONNECTED
        for entry in left:
            self._budget.give(entry.cost)
            entry.end(False)
        connection.close()
        if stopped:
            self._state_changed(LinkState.DISCONNECTED)
        self._budget.wake()
