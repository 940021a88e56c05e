# SPDX-License-Identifier: BSD-3-Clause
"""The forward queue of one disk and the link that drains it.

Invariants
* Requests reach the secondary in the order in which they were put, as far as they overlap: the order of the queue
  is the order on the local disk (disk.py), and no request is sent while one that overlaps it is in flight,
  since an NBD server may reorder those. A flush overlaps everything.
* The queue holds at most `Budget.limit` bytes over all disks, or one request that is larger; what a resync sends is
  beside it (`put_spare`), is sent where the queue is empty, and moves into it in front of what must not overtake it.
* Every entry ends exactly once, with `arrived` true or false.
* A failure never reaches the guest: it goes to `Forwarder.failed`, and the change map keeps what is missing.
* The connection counts as lost when it goes, or makes no progress for `timeout_s` seconds; from then on entries end at
  once, so a dead secondary holds up a guest once, for at most that long. link.py makes a new one. A slow one does not
  hold it up for longer either (backlog.py).
* An epoch is cut in all queues at one instant (`cut`): of two writes of which the guest has seen the first answered
  before it issued the second, the second is never in front of the cut alone, because a write is in its queue before it
  is answered. No request waits for a cut.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from enum import Enum
from typing import Final

from replication import batch
from replication.disk.connection import Connection, Request
from replication.errors import DiskError
from replication.order.latency import LINK_LOST, QUEUE, QUEUE_FULL, Histogram, Latency
from replication.order.pause import pause
from replication.primary.backlog import CHECK, CUT, FLUSH, PATIENCE, WRITE, Budget, Entry, Flows, InFlight, cost
from replication.record.changes import ChangeMap

WINDOW = 256
"""Entries in flight that are sent one by one. On one machine 64 are enough for 77k a second, but over a
round trip of 40 ms they would be 1,600. Many more would grow too old before a slow disk comes to them: a link is lost
with a request that waits for four times its timeout (Connection)."""

BATCHED_WINDOW = 4096
"""Entries in flight at most where the secondary takes small writes together, and has shown that it is quick: the window
grows with every batch that it answers within a fiftieth of the timeout, and is WINDOW again after any other."""

BATCHES_IN_WINDOW = 16
"""A batch is no longer than this part of the window: one thread of the secondary does it, and sixteen work there."""

SINGLY_S = 10.0
"""So long nothing is sent together after a batch was refused: the secondary's disk is slow (it does single writes side
by side), or it fails, and then every write has to be answered by itself."""

_IDLE_S = 1.0
_WIND_UP_S = 1.0
"""Longest wait of a stop for what is in flight to come back; it does so at once, when the socket is shut down."""
_NAP_S = 0.0005
"""Between two batches: what an asynchronous write may be late on the secondary, and what bounds the thread to 2,000
rounds a second."""
_ACTIVE_S = 0.02
"""After the last entry the thread naps for so long before it sleeps: waking it costs the guest a system call."""


_ZEROES_WEIGHT = 4 << 10

PROVE_S = 0.25
"""Between two flushes that end marks: towards a secondary whose answers are no proof (ChangeMap.need_flushes)."""

_SMALL = 32 << 10
"""Longest write that is sent together with others: larger ones cost a request little."""

Failed = Callable[[Entry, DiskError], None]


class Rest(Enum):
    """What the forwarding thread does: who puts an entry has to wake it from SLEEP, and for an urgent one from NAP; and
    from HELD, at a cut, only who lets the cut go."""

    NONE = "working"
    NAP = "nap"
    SLEEP = "sleep"
    HELD = "held"


_NONE: Final = Rest.NONE
_NAP: Final = Rest.NAP
_SLEEP: Final = Rest.SLEEP
_HELD: Final = Rest.HELD


class Forwarder:
    """Sends one disk's writes to the secondary, by a thread of its own."""

    def __init__(
        self,
        disk_name: str,
        budget: Budget,
        timeout_s: float,
        failed: Failed,
        lost: Callable[[Connection, DiskError], None],
    ) -> None:
        """`failed(entry, error)` is called for an entry that the secondary has refused, `lost(connection, error)` when
        the connection is lost; both without locks, by the forwarding thread."""
        self.disk_name = disk_name
        self.timeout_s = timeout_s
        self.patience_s = PATIENCE * timeout_s
        """Longest wait of a guest for the secondary, in seconds."""
        self._budget = budget
        self._failed = failed
        self._lost = lost
        # Protects the fields below. Never held across I/O.
        self._lock = threading.Lock()
        self._queue: deque[Entry] = deque()
        # Of a resync: queued, and how much of it is queued or in flight.
        self._spare: deque[Entry] = deque()
        self._spare_weight = 0
        self._in_flight = InFlight()
        self._flows = Flows()
        # What the secondary has answered, entries sent together, and their errno; only the forwarding thread touches
        # it.
        self._answered: deque[tuple[Sequence[Entry], int]] = deque()
        # Entries queued or in flight that somebody waits for (of cuts, those that are not reached yet).
        self._awaited = 0
        self._rest = _NONE
        self._up = False
        self._stopping = False
        self._connection: Connection | None = None
        # Where a write of several entries goes (batch.py), None where the other side takes no such thing.
        self._batch_at: int | None = None
        self._window = WINDOW
        self._singly_until = 0.0
        # Of what the secondary has answered, what a flush has covered; None where its answers are proof enough. Only
        # the forwarding thread uses it: when the next flush is due, and what has become of those that were sent.
        self._proof: ChangeMap | None = None
        self._prove_at = 0.0
        self._proving = False
        self._proved: deque[tuple[int, int]] = deque()
        self._sender: threading.Thread | None = None
        self.bytes_forwarded = 0
        self.latency: Latency | None = None
        """Who is to know how long requests wait for room."""
        self.cut_off: Callable[[], None] = _nothing
        """Called with the lock held, when the link is lost and no write has met that yet."""
        self.answers = Histogram()
        """How long the secondary takes to answer, from the sending on; of requests, of which a batch is one."""
        self.let_go_s = 0.0
        """When a cut was let go last (monotonic)."""

    # -- connection ----------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether entries put now will be sent."""
        return self._up

    def adopt(self, connection: Connection, batch_at: int | None = None, proof: ChangeMap | None = None) -> None:
        """Begin to forward over a fresh connection; the former one, if any, has wound up (`wait_down`). `batch_at`: the
        offset for batches, if the other side takes them. `proof`: the map that learns of flushes, where they end
        marks."""
        connection.timeout_s = self.timeout_s
        self._proof, self._prove_at, self._proving = proof, 0.0, False
        self._proved.clear()
        self._sender = threading.Thread(target=self._run, args=(connection,), name="forward", daemon=True)
        with self._lock:
            self._connection = connection
            self._batch_at = batch_at
            self._window = WINDOW
            self._flows = Flows()
            self._singly_until = 0.0
            self._stopping = False
            self._up = True
        try:
            self._sender.start()
        except (RuntimeError, MemoryError) as error:  # no thread
            self._sender = None
            with self._lock:
                self._up = False
                self._connection = None
            raise DiskError(f"cannot forward: {error}") from error

    def abandon(self, cause: str) -> None:
        """The link is lost elsewhere: entries end at once from now on. Nobody is told."""
        with self._lock:
            connection = self._connection
            if not self._up or connection is None:
                return
            self._up = False
        connection.fail(cause)
        self._budget.wake()

    def wait_down(self, timeout_s: float) -> bool:
        """Wait until a lost or stopped connection has given everything back, `timeout_s` seconds at most; whether it
        has."""
        thread = self._sender
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                return False
            self._sender = None
        return True

    # -- queue ---------------------------------------------------------------------------------------------

    def reserve(self, size: int, patient: bool = False) -> bool:
        """Wait for room for entries that cost `size` bytes together, for `patience_s` seconds at most; False without a
        link, or when the secondary is behind. `patient`: wait as long as there is a link."""
        if not self._up or self._connection is None:
            return False
        if self._budget.take_now(size):
            return True
        if self._budget.behind and not patient:
            return False
        course = None if self.latency is None else self.latency.waiting(QUEUE, QUEUE_FULL)
        try:
            return self._budget.take(size, lambda: not self._up, self.patience_s, patient)
        finally:
            if course is not None:
                course.go_on(QUEUE_FULL if self._up else LINK_LOST)

    @property
    def behind(self) -> bool:
        """Whether there is a link and it carries less than is written: nobody waits for it."""
        return self._up and self._budget.behind

    def fall_behind(self) -> None:
        """An answer has taken too long: nobody waits until everything that is queued now has been answered."""
        self._budget.fall_behind()

    @property
    def data_piece(self) -> int:
        """Most data of an entry now, in bytes."""
        return self._flows.data_piece

    @property
    def zero_piece(self) -> int:
        """Longest range of an entry of zeroes now, in bytes."""
        return self._flows.zero_piece

    @property
    def takes_spare(self) -> bool:
        """Whether `put_spare` should be called now: what it has taken is less than may be in flight."""
        with self._lock:
            return self._spare_weight < self._flows.data.window

    def put_spare(self, *entries: Entry) -> bool:
        """Queue entries of a resync, which take no room (their cost is 0) and are sent where the queue is empty. May be
        called while `takes_spare`. Otherwise as `put`."""
        for entry in entries:
            entry.cost = 0
            entry.spare = True
        with self._lock:
            connection = self._connection
            taken = self._up and connection is not None
            if taken:
                self._spare.extend(entries)
                self._spare_weight += sum([_spare_weight(entry) for entry in entries])
                wake = self._rest is _SLEEP
                if wake:
                    self._rest = _NONE
        if not taken:
            for entry in entries:
                entry.end(False)
        elif wake and connection is not None:
            connection.poke()
        return taken

    def _promote_locked(self, entries: Sequence[Entry]) -> None:
        """What of a resync must not come behind these entries goes into the queue, in front of them."""
        behind: deque[Entry] = deque()
        for spare in self._spare:
            if any(entry.kind is CUT or spare.overlaps(entry) for entry in entries):
                self._queue.append(spare)
            else:
                behind.append(spare)
        self._spare = behind

    def unreserve(self, size: int) -> None:
        """The entries will not be put after all."""
        self._budget.give(size)

    def put(self, *entries: Entry) -> bool:
        """Queue entries for which `reserve` has made room, all of them on one side of a cut. They may end before this
        returns. Whether they were queued; without a link they have ended."""
        self._lock.acquire()
        try:
            connection = self._connection
            taken = self._up and connection is not None
            if taken:
                urgent = bool(entries) and entries[0].ended is not None  # all of a request are, or none
                if self._spare:
                    self._promote_locked(entries)
                self._queue.extend(entries)
                if urgent:
                    self._awaited += len(entries)
                wake = self._rest is _SLEEP or (urgent and self._rest is _NAP)
                if wake:
                    self._rest = _NONE
        finally:
            self._lock.release()
        if not taken:
            for entry in entries:
                self._budget.give(entry.cost)
                entry.end(False)
        elif wake and connection is not None:
            connection.poke()
        return taken

    def let_go(self, entry: Entry) -> None:
        """What is behind a cut may be sent."""
        with self._lock:
            entry.let_go = True
            self.let_go_s = time.monotonic()
            connection = self._connection
            self._rest = _NONE
        if connection is not None:
            connection.poke()

    def await_until(self, entry: Entry, until: float) -> bool:
        """Wait until an entry has ended, until `until` (seconds, monotonic) at most; whether it has."""
        assert entry.ended is not None
        return entry.ended.wait_until(until)

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
            waiting = (*self._queue, *self._spare)
            return self._in_flight.bytes + sum(len(entry.data) for entry in waiting)

    @property
    def idle(self) -> bool:
        """Whether everything put has ended."""
        with self._lock:
            return not self._queue and not self._spare and not self._in_flight

    def stop(self, drain_s: float) -> bool:
        """Send what is queued, for at most `drain_s` seconds, then let the connection go; whether it was drained. What
        has not arrived by then ends as not arrived."""
        barrier = Entry(FLUSH, waited_for=True)
        barrier.cost = 0  # room in a full queue would have to be waited for
        if drain_s > 0 and self.up:
            self.put(barrier)
            assert barrier.ended is not None
            barrier.ended.wait(drain_s)
        drained = barrier.arrived
        with self._lock:
            self._stopping = True
            connection = self._connection
        if connection is not None:
            connection.poke()
        self.wait_down(min(self.timeout_s, _WIND_UP_S))
        return drained

    # -- the forwarding thread -----------------------------------------------------------------------------

    def _run(self, connection: Connection) -> None:
        try:
            self._forward(connection)
        except Exception as error:  # noqa: BLE001 (no memory, say: nobody else ends what is waited for, without a bound)
            connection.fail(str(DiskError.from_defect(error)))
        if connection.dead:
            self._lose(connection, DiskError(connection.cause))
        self._wind_up(connection)

    def _forward(self, connection: Connection) -> None:
        active_until = 0.0
        while True:
            # What a lost connection has given back ends when the loss is known, in `_wind_up`.
            if not connection.dead:
                self._end_answered(connection)
                self._prove(connection)
            if self._stopping or connection.dead:  # whoever says so pokes the connection, so it is not slept over
                break
            with self._lock:
                entries = self._next_locked()
                in_flight = len(self._in_flight)
                # What the guest does not wait for is sent in batches: a hand-over of the GIL for every write costs the
                # guest more than the write itself (4k writes at depth 16 to a slow disk: 6k without, 9k with it).
                hurry = self._awaited > 0 or bool(self._queue)
                nap = not hurry and (in_flight > 0 or time.monotonic() < active_until)
                held = not in_flight and bool(self._queue)
                self._rest = _NONE if entries else _NAP if nap else _HELD if held else _SLEEP
            if entries:
                active_until = time.monotonic() + _ACTIVE_S
                for together in [entries] if len(entries) == 1 else self._sent_together(entries):
                    self._send(connection, together)
                connection.drain_alone()
            elif nap:
                connection.nap(_NAP_S)
                connection.drain_alone()
                connection.check_progress()
            else:
                connection.drive(_IDLE_S if self._proof is None else PROVE_S)
                connection.drain_alone()

    def _next_locked(self) -> list[Entry]:
        """The next entries, moved into flight, up to the first that has to wait for one in flight."""
        entries: list[Entry] = []
        queue, in_flight, flows = self._queue, self._in_flight, self._flows
        room = self._window - len(in_flight)
        while queue and len(entries) < room:
            entry = queue[0]
            if entry.kind is CUT:
                if in_flight or not self._passed_locked(entry):
                    break
            elif not flows.have_room(in_flight) or not in_flight.admit(entry):
                break
            else:
                entries.append(entry)
            queue.popleft()
        if not queue:
            spare = self._spare
            while spare and len(entries) < room and flows.have_room(in_flight) and in_flight.admit(spare[0]):
                entries.append(spare.popleft())
        return entries

    def _passed_locked(self, cut: Entry) -> bool:
        """Everything in front of the cut has been answered. Tell that; whether the queue may go on."""
        if not cut.arrived:
            self._awaited -= 1
            cut.end(True)
        return cut.let_go

    def _sent_together(self, entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
        """The entries, which do not overlap, in groups of one request each."""
        group: list[Entry] = []
        size = 0
        longest = self._window // BATCHES_IN_WINDOW
        together = self._batch_at is not None and time.monotonic() > self._singly_until
        for entry in entries:
            length = len(entry.data)
            if not together or not length or length > _SMALL or entry.fua:
                yield [entry]
                continue
            if size + length > batch.DATA_MAX or len(group) == longest:
                yield group
                group, size = [], 0
            group.append(entry)
            size += length
        if group:
            yield group

    def _send(self, connection: Connection, entries: Sequence[Entry]) -> None:
        """Send entries as one request."""
        pause("forward.send")
        sent_s = time.monotonic()

        def answered(request: Request) -> None:
            age_s = time.monotonic() - sent_s
            self.answers.add(age_s)
            if len(entries) > 1:
                self._learn(len(entries), not request.errno, age_s)
            if not request.errno:
                self._flows.learn(entries, sent_s, self._in_flight, self.timeout_s)
            self._answered.append((entries, request.errno))

        first = entries[0]
        if first.kind is FLUSH and self._proof is not None:
            first.flush_number = self._proof.begin_flush()
        try:
            if len(entries) > 1:
                assert self._batch_at is not None
                packed = batch.pack([(entry.offset, entry.data) for entry in entries])
                connection.write_alone(packed, self._batch_at, 0, answered)
            elif first.kind is WRITE:
                connection.write_alone(first.data, first.offset, first.flags, answered)
            else:
                change = (first.offset, first.length) if first.length and first.kind is not CHECK else None
                connection.issue(first.issue, 0, answered, change=change)
        except DiskError as error:
            self._answered.append((entries, error.errno))

    def _prove(self, connection: Connection) -> None:
        """Where answers are no proof, flush some times a second, beside all that is sent: a flush covers what was
        answered before it, so nothing waits for it."""
        proof = self._proof
        if proof is None or self._proving or not proof.unproven or time.monotonic() < self._prove_at:
            return
        pause("forward.prove")
        number = proof.begin_flush()
        try:
            connection.issue(
                lambda handle, done: handle.aio_flush(done),
                0,
                lambda request: self._proved.append((number, request.errno)),
            )
        except DiskError as error:
            self._proved.append((number, error.errno))
        self._proving = True
        self._prove_at = time.monotonic() + PROVE_S

    def _end_proved(self, connection: Connection) -> None:
        """The flushes of `_prove` that were answered. A failed one is told once, as the queue's are."""
        while self._proved:
            number, failure = self._proved.popleft()
            self._proving = False
            self._learn_flushed(number, failure)
            if failure and not connection.dead:
                what = f"the secondary answered flush with: {os.strerror(failure)}"
                self._failed(Entry(FLUSH), DiskError(what, failure))

    def _learn_flushed(self, number: int, failure: int) -> None:
        proof = self._proof
        if proof is not None and failure:
            proof.unflushed()
        elif proof is not None:
            proof.flushed(number)

    def _learn(self, count: int, arrived: bool, age_s: float) -> None:
        """A batch was answered: how much may be in flight, and whether anything may be sent together."""
        if not arrived:
            self._singly_until = time.monotonic() + SINGLY_S
        if arrived and age_s < self.timeout_s / 50:
            self._window = min(BATCHED_WINDOW, self._window + count)
        else:
            self._window = WINDOW

    def _end_answered(self, connection: Connection) -> None:
        """End the entries that the secondary has answered; the link's own failure is told once, not for each."""
        self._end_proved(connection)
        while self._answered:
            entries, number = self._answered.popleft()
            if number and not connection.dead:
                if len(entries) > 1:
                    # Which of them it was shows when they are sent one by one; they stay in flight until then.
                    for entry in entries:
                        self._send(connection, [entry])
                    continue
                first = entries[0]
                if first.kind is CHECK and number != errno.ESHUTDOWN:
                    first.refusal = number
                else:
                    self._tell_refused(first, number)
            if entries[0].kind is FLUSH and not number:
                self._learn_flushed(entries[0].flush_number, 0)
            waiting = [entry.ended for entry in entries if entry.ended is not None]
            with self._lock:
                self._in_flight.remove(entries)
                self._awaited -= len(waiting)
                if entries[0].spare or entries[-1].spare:
                    self._spare_weight -= sum([_spare_weight(entry) for entry in entries if entry.spare])
            self._budget.give(cost(entries))
            if not number and entries[0].kind is not CHECK:
                self.bytes_forwarded += sum([entry.length for entry in entries])
            arrived = not number
            for entry in entries:
                if arrived and entry.memory is not None:
                    entry.unload()
                entry.settle(arrived)
            # Only now, because everybody who is woken takes the GIL.
            for ended in waiting:
                ended.set()

    def _tell_refused(self, entry: Entry, number: int) -> None:
        if entry.kind is FLUSH:
            self._learn_flushed(entry.flush_number, number)
        what = f"the secondary answered {entry.kind.value} of {entry.length} bytes at {entry.offset} with"
        self._failed(entry, DiskError(f"{what}: {os.strerror(number)}", number))

    def _lose(self, connection: Connection, error: DiskError) -> None:
        """The link is lost: from now on entries end at once. Called by the forwarding thread."""
        with self._lock:
            if not self._up or self._stopping or self._connection is not connection:
                return
            self.cut_off()  # before a write finds that there is no link, and is answered
            self._up = False
        connection.fail(str(error))
        self._lost(connection, error)
        self._budget.wake()

    def _wind_up(self, connection: Connection) -> None:
        """Take back what is in flight and end everything; then the connection is nobody's."""
        deadline = time.monotonic() + self.timeout_s
        if not connection.dead and connection.in_flight:
            connection.fail("replication was stopped")
        while connection.in_flight and time.monotonic() < deadline:
            connection.drive(_IDLE_S)
        self._end_answered(connection)
        if self._proof is not None:
            self._proof.unflushed()  # before the next link: it has nothing to do with what that one sends
        with self._lock:
            self._up = False
            # What is in flight still was never sent, or libnbd keeps it.
            left = [*self._in_flight.give_up(), *self._queue, *self._spare]
            self._queue.clear()
            self._spare.clear()
            self._spare_weight = 0
            self._awaited = 0
            self._connection = None
        for entry in left:
            self._budget.give(entry.cost)
            entry.end(False)
        connection.close()
        self._budget.wake()


def _nothing() -> None:
    """Nobody wants to know."""


def _spare_weight(entry: Entry) -> int:
    """What an entry of a resync counts: zeroes are a round trip, and nothing to the link."""
    return len(entry.data) or _ZEROES_WEIGHT


def cut(forwarders: Sequence[Forwarder]) -> list[Entry] | None:
    """End an epoch in all queues at one instant: the entries that wait there for `let_go`, in the order of the
    forwarders; None, with nothing done, when one of them is not up. One at a time, which the caller sees to."""
    entries = [Entry(CUT, waited_for=True) for _ in forwarders]
    for entry in entries:
        entry.cost = 0
    with ExitStack() as locked:
        for forwarder in forwarders:
            locked.enter_context(forwarder._lock)
        if not all(forwarder._up for forwarder in forwarders):
            return None
        for forwarder, entry in zip(forwarders, entries, strict=True):
            forwarder._promote_locked([entry])
            forwarder._queue.append(entry)
            forwarder._awaited += 1
            forwarder._rest = _NONE
    for forwarder in forwarders:
        connection = forwarder._connection
        if connection is not None:
            connection.poke()
    return entries
