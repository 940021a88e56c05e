# SPDX-License-Identifier: BSD-3-Clause
"""A guest's requests follow the owner of the disks (follow-owner=true).

A guest attaches to the socket of its own host, whoever owns the disks. While this node does, a request is served here,
as without the option. While it does not, the request is passed on to the owner, over one connection for each disk.

Who owns which fact
    this node owns them     what is behind the export, which a request looks up inside the gate: that of a secondary
                            does nothing and raises Elsewhere
    the peer owns them      the peer alone, for each request, inside its own gate (PassedExport): it is a primary that
                            runs, and the request names the session that it has with this node now
    which session that is   the pairing. This node has accepted that primary by its lineage, and hears it. Nobody else
                            knows the token, which each shows the other that it has (acquaintance.py): in the name of
                            the export that is opened (.owner:PROOF:NAME), and in what that says of itself

So nothing is passed on by belief, nor in a circle: what was passed on is served from the owner's own disk or refused.

What becomes of a request
    here  ->  elsewhere  ->  waits for an owner, or for the end of a hold  ->  the owner has it  ->  answered
      ^                                                                           |
      +------------------ refused, or its connection is lost ---------------------+

One that was lost may have been done. It is done again by whoever owns the disks then, and before the guest is
answered. The former attempt cannot come after that, over something newer:
    the same owner          refuses what comes over a former connection, and opens another one only when it has ended
                            all that came over that (Passage)
    this node, in good order
                            the stream of the primary ended behind all that it had done, and it does nothing more: its
                            stage is another one, or the session is over (Agreement.parting)
    anything else           a failover goes back to a checkpoint, and a demoted node may have written what its peer
                            lacks. That is not the disk any more which the guest has written to: requests of a
                            connection that was open then fail for good

Every wait ends: for an owner after PATIENCE_S, for another thread that connects and for connecting after CONNECT_S, for
requests of a former connection after ENDING_S, a hold when its time is over. Two end only with the guest or the
process, as that of a guest that stands still does: where the last owner has left in good order all that the guest was
answered for is here, and somebody is to say who goes on with it; and what the owner has may take as long as the owner's
own guest would wait, as long as this node hears the owner (`look`).

Locks: Passing._changed and Passage._changed (m), below all but EventHub's.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import nbd

from replication.acquaintance import boot_of, question
from replication.disk import requests
from replication.disk.connection import CHUNK, Connection
from replication.disk.face import EXTENTS_MAX, Extent
from replication.errors import CommandError, DiskError, Elsewhere
from replication.options import OWNER_EXPORT, Options
from replication.reason import Reason
from replication.stage import Mode

PATIENCE_S = 60.0
"""Longest wait of a request for an owner: a restart of the other node and a switch-over take seconds."""

CONNECT_S = 5.0
ENDING_S = 4.0
"""Below CONNECT_S: who connects learns why it was refused."""

DRAIN_S = 10.0
"""Longest wait of a hold for what the owner has."""

_ANSWER_S = 3600.0
"""A request may take so long before its connection counts as dead: the owner's guest may stand still. That the owner
has gone is known from the link. That this connection alone is cut, by a firewall that has forgotten it, say, is known
from the kernels: the owner's is asked for signs of life while it owes nothing, and else owes an acknowledgement."""

SILENT_S = 5.0
"""Longest wait for that."""

_LOOK_S = 0.1


class Follower(Protocol):
    """A guest's connection."""

    def end(self, why: str) -> None:
        """Its requests fail from now on. The gate is closed."""


class Patience:
    """How long one request may wait yet for an owner."""

    def __init__(self) -> None:
        self.left_s = PATIENCE_S
        self.waited = False

    def spend(self, seconds: float, why: str) -> None:
        """DiskError when it is at its end."""
        self.waited = True
        self.left_s -= seconds
        if self.left_s <= 0:
            raise DiskError(f"the disk has had no owner for {PATIENCE_S:g} s: {why}")


class Passing:
    """Of one node. Every method may be called by any thread."""

    def __init__(self, options: Options, session: Callable[[], str | None], left_well: Callable[[], bool]) -> None:
        """`session()`: the token of the primary that this secondary has, and hears; None if it has none, or is none.
        `left_well()`: whether the last one has left in good order, and none has come since."""
        self._session = session
        self._left_well = left_well
        self._changed = threading.Condition(threading.Lock())
        self._exports: set[Follower] = set()
        self._held_until = 0.0
        # What the owner has, by request: who passes it on, and whether its guest has gone.
        self._in_flight: dict[object, tuple[Passer, Callable[[], bool]]] = {}
        self._waiting = 0
        self._ended = False
        self._obstacle: str | None = None
        uri = options.secondary
        self._passers: dict[str, Passer] = {}
        if options.mode is Mode.SECONDARY and uri is not None:
            for disk in options.disks:
                assert disk.top_id is not None
                self._passers[disk.top_id] = Passer(disk.name, partial(self._connect, uri, options, disk.name))

    @staticmethod
    def _connect(uri: str, options: Options, name: str, token: str) -> Connection:
        return Connection(uri, f"{OWNER_EXPORT}:{question(token)}:{name}", CONNECT_S, options.tls)

    # -- a guest's connection ------------------------------------------------------------------------------

    def attend(self, export: Follower) -> None:
        """A guest has come: what the owner has of one that has gone must not be done after what this one asks for."""
        self._look_for_gone()
        with self._changed:
            self._exports.add(export)

    def forget(self, export: Follower) -> None:
        """It has gone."""
        with self._changed:
            self._exports.discard(export)

    def turn(self, why: str | None) -> None:
        """Another node owns the disks from now on, or this one does. The gate is closed. `why`: the disk is not the one
        any more that guests have used until now."""
        for passer in self._passers.values():
            passer.forget()
        with self._changed:
            if why is not None:
                for export in self._exports:
                    export.end(why)
                self._exports.clear()
            self._changed.notify_all()

    def run(
        self, export: str, request: Callable[[Passer, Connection], None], patience: Patience, gone: Callable[[], bool]
    ) -> bool:
        """Have the owner do a request; False when that was not to be had, and this node may own the disks by now.
        `gone()`: whether the guest has. DiskError: it has failed."""
        passer, token, mine = self._passers.get(export), self._session(), object()
        if patience.waited and gone():
            raise DiskError("a request that has waited for an owner, of a guest that has gone", errno.ESHUTDOWN)
        begun = time.monotonic()
        with self._changed:
            if self._ended:
                raise DiskError("the process ends, and a request was waiting for an owner", errno.ESHUTDOWN)
            held = time.monotonic() < self._held_until
            if held or passer is None or token is None:
                self._wait_locked()
                free = held or self._left_well()
                patience.spend(0.0 if free else time.monotonic() - begun, "this node is in no pair now")
                return False
            self._in_flight[mine] = (passer, gone)
        why = ""
        try:
            connection = passer.connected(token)
            if time.monotonic() - begun > _LOOK_S and gone():
                raise DiskError("a request that has waited for the owner, of a guest that has gone", errno.ESHUTDOWN)
            begun = time.monotonic()
            try:
                request(passer, connection)
            except DiskError as error:
                if not (connection.dead or error.errno in (errno.ESHUTDOWN, errno.ENOTCONN)):
                    raise
                begun, self._obstacle, why = time.monotonic(), str(error), str(error)
                # It is of another session, perhaps, or another one has taken its place: no request is served over it.
                connection.fail(why)
            else:
                self._obstacle = None
                return True
        except Elsewhere as error:
            self._obstacle = why = str(error)
        finally:
            with self._changed:
                del self._in_flight[mine]
                self._changed.notify_all()
        with self._changed:
            self._wait_locked()
        patience.spend(time.monotonic() - begun, why)
        return False

    def _wait_locked(self) -> None:
        self._waiting += 1
        try:
            self._changed.wait(_LOOK_S)
        finally:
            self._waiting -= 1

    # -- who looks after it --------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a request waits for an owner."""
        with self._changed:
            return self._waiting > 0

    @property
    def busy(self) -> bool:
        """Whether the owner has a request."""
        with self._changed:
            return bool(self._in_flight)

    def hold(self, timeout_s: float) -> None:
        """Pass nothing on for so long, or until `release`; what the owner has is waited for. CommandError, and nothing
        is held, when that does not end."""
        with self._changed:
            until = self._held_until = time.monotonic() + timeout_s
            if self._changed.wait_for(lambda: not self._in_flight, min(timeout_s, DRAIN_S)):
                return
            if self._held_until == until:
                self._held_until = 0.0
                self._changed.notify_all()
        raise CommandError("The owner has not answered all requests of the guest: nothing is held", reason=Reason.BUSY)

    def release(self) -> None:
        """Go on."""
        with self._changed:
            self._held_until = 0.0
            self._changed.notify_all()

    def look(self) -> None:
        """Called twice a second: give up connections to a node that is not this one's primary any more, and those that
        have brought over what a guest asked for that has gone."""
        token = self._session()
        for passer in self._passers.values():
            passer.check(token)
        self._look_for_gone()

    def _look_for_gone(self) -> None:
        """It may stand still there, and be done when that is over, beside what another guest does then. The requests of
        others are done again."""
        with self._changed:
            at_owner = set(self._in_flight.values())
        for passer, gone in at_owner:
            if gone():
                passer.give_up("a guest has gone of which the owner has a request")

    def end(self) -> None:
        """The process ends: what waits fails."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for passer in self._passers.values():
            passer.check(None)

    def query(self) -> dict[str, Any]:
        """The member `passing` of query-replication."""
        there = self._session() is not None
        with self._changed:
            return {
                "owner-heard": there,
                "owner-left": self._left_well(),
                "obstacle": self._obstacle,
                "guests": len(self._exports),
                "held": time.monotonic() < self._held_until,
                "in-flight": len(self._in_flight),
                "waiting": self._waiting,
            }


class Passer:
    """Passes the requests for one disk on. Those that get a connection from `connected` do their request over it with
    the other methods, which raise DiskError as Connection.wait does."""

    def __init__(self, name: str, connect: Callable[[str], Connection]) -> None:
        """`connect(token)` opens the owner's export; DiskError."""
        self._name = name
        self._connect = connect
        # Protects the fields below. Not held while connecting.
        self._changed = threading.Condition(threading.Lock())
        self._connecting = False
        self._connection: Connection | None = None
        self._token: str | None = None
        # Since when that owes an acknowledgement, as far as was seen; only who looks touches it.
        self._owing: tuple[Connection, float] | None = None
        self._boot = ""
        # How many changes the owner has answered, and how many of them a flush covers: what its host has not flushed
        # goes with its boot.
        self._answered = self._flushed = 0
        self._lost = False

    def connected(self, token: str) -> Connection:
        """A connection to the owner that has that session. Elsewhere when there is none to be had."""
        deadline = time.monotonic() + CONNECT_S
        with self._changed:
            while True:
                former = self._connection
                if former is not None and self._token == token and not former.dead:
                    return former
                if not self._connecting:
                    break
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise Elsewhere("the owner is being connected to")
            self._connecting, self._connection = True, None
        fresh = None
        try:
            if former is not None:
                former.fail("another connection takes its place")  # who waits for an answer of it, asks over that
            fresh = self._open(token)
        finally:
            with self._changed:
                self._connecting = False
                self._connection, self._token = fresh, token
                self._changed.notify_all()
        return fresh

    def _open(self, token: str) -> Connection:
        try:
            fresh = self._connect(token)
        except DiskError as error:  # which may name the export
            raise Elsewhere(str(error).replace(question(token), "...")) from error
        boot = boot_of(fresh.description, token)
        if boot is None or fresh.read_only:
            fresh.close()
            raise Elsewhere(f"what answers at {fresh.uri} is no owner of disk '{self._name}'")
        fresh.wait_for_answers(_ANSWER_S)
        with self._changed:
            former, self._boot = self._boot, boot
            if not former:
                self._answered = self._flushed = 0
            self._lost |= former not in ("", self._boot) and self._answered > self._flushed
        return fresh

    def check(self, token: str | None) -> None:
        """Give the connection up unless it belongs to that session, and nothing is to be heard of it for too long."""
        with self._changed:
            found, strange = self._connection, self._token != token
        if found is None or found.dead:
            self._owing = None
        elif strange:
            found.fail("the owner of the disk is not this node's primary any more")
        else:
            self._check_silence(found)

    def _check_silence(self, connection: Connection) -> None:
        silent_s, now = connection.owing_s, time.monotonic()
        if silent_s is None:
            self._owing = None
            return
        former = self._owing
        # What was heard since the last look makes it a new debt.
        begun = max(former[1], now - silent_s) if former is not None and former[0] is connection else now
        self._owing = (connection, begun)
        if now - begun > SILENT_S:
            connection.fail(f"the owner's host has acknowledged nothing for {now - begun:.0f} s")

    def forget(self) -> None:
        """Another node owns the disk from now on, or this one does. What the last owner has answered is the guest's no
        more, or, after a stop in good order, has been flushed here with the disk."""
        with self._changed:
            self._boot, self._lost = "", False

    def give_up(self, cause: str) -> None:
        """Whatever has been asked for over the connection fails there, or was done."""
        with self._changed:
            found = self._connection
        if found is not None and not found.dead:
            found.fail(cause)

    # -- requests ------------------------------------------------------------------------------------------

    @staticmethod
    def read(connection: Connection, buffer: memoryview, offset: int) -> None:
        """Fill the buffer."""
        for start in range(0, len(buffer), CHUNK):
            part = buffer[start : start + CHUNK]
            connection.wait(connection.issue(partial(requests.pread, part, offset + start), 0, None, len(part)))

    def write(self, connection: Connection, data: memoryview, offset: int, fua: bool) -> None:
        """Write."""
        flags = nbd.CMD_FLAG_FUA if fua else 0
        for start in range(0, len(data), CHUNK):
            part = data[start : start + CHUNK]
            connection.wait(connection.issue(partial(requests.pwrite, part, offset + start, flags), len(part)))
        self._note(fua)

    def zero(self, connection: Connection, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Make a range read as zeroes."""
        flags = (0 if may_trim else nbd.CMD_FLAG_NO_HOLE) | (nbd.CMD_FLAG_FUA if fua else 0)
        connection.wait(connection.issue(partial(requests.zero, length, offset, flags), 0))
        self._note(fua)

    def _note(self, stable: bool) -> None:
        if not stable:
            with self._changed:
                self._answered += 1

    def flush(self, connection: Connection) -> None:
        """Make stable what was answered. DiskError, once, when the owner's host was started anew with something of that
        unflushed: as fsync(2) tells of a page that was lost."""
        with self._changed:
            covered, lost, self._lost = self._answered, self._lost, False
            if lost:
                self._flushed = covered
        if lost:
            raise DiskError(f"disk '{self._name}': the owner's host was started anew, and unflushed writes may be gone")
        connection.wait(connection.issue(requests.flush, 0))
        with self._changed:
            self._flushed = max(self._flushed, covered)

    @staticmethod
    def extents(connection: Connection, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        """What is known of the content."""
        if not connection.can_extents:
            return [Extent(offset, length, False, False)]
        return requests.extents(offset, length, count, lambda issue: connection.wait(connection.issue(issue, 0)))


class Passage:
    """On the owner, for one disk: which connection of the other node passes requests on. A new one takes the place of
    the former, and is there when all that came over that has ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._current: object | None = None
        # Requests at work of the current one, and of former ones.
        self._inside = self._former = 0

    def take_over(self, connection: object) -> None:
        """DiskError when requests of a former one do not end, or another one takes over meanwhile."""
        with self._changed:
            self._former, self._inside, self._current = self._former + self._inside, 0, connection
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: not self._former or self._current is not connection, ENDING_S)
            if self._current is not connection:
                raise _replaced()
            if not ended:
                raise DiskError("requests of a former connection have not ended: try again", errno.ESHUTDOWN)

    def begin(self, connection: object) -> None:
        """Before a request; `end` is to follow. DiskError, with nothing begun, for a former connection."""
        with self._changed:
            if self._current is not connection:
                raise _replaced()
            self._inside += 1

    def end(self, connection: object) -> None:
        """After it."""
        with self._changed:
            if self._current is connection:
                self._inside -= 1
            else:
                self._former -= 1
                self._changed.notify_all()


def _replaced() -> DiskError:
    return DiskError("another connection of the other node has taken the place of this one", errno.ESHUTDOWN)
