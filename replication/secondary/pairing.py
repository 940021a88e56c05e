# SPDX-License-Identifier: BSD-3-Clause
"""The secondary's half of a pair: which primary may write, since when, and whether the disks are complete.

A primary opens the control export and pairs (dial.py has the steps). That begins a session, with a token that its data
connections name. The session ends with the control connection, or with the next one; it ends in good order when the
primary has said before that the secondary has everything.

Who decides
-----------
two primaries
    The one that is paired. Another one is refused until nothing has been heard of the first for as long as its own
    timeout allows, twice over.
a primary and its own former connections
    The token. A new session begins with the gate closed, so what the former connections had in flight is on the disk
    before the new one sends anything, and what is still in their sockets (this process was stopped for a while, say)
    is refused: an old write never comes after a newer one.
a primary and any other NBD client on the target face
    While a session is there, only it may write; reading is free.
a checkpoint and a resync, or a link that was lost
    The disks are complete when the primary has said so, and from then on as long as the session lasts or was ended in
    good order. Otherwise they may have a later write and lack an earlier one, and no checkpoint is taken of that.
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from replication.errors import CommandError, DiskError
from replication.order.latency import PAIRING
from replication.order.pause import pause
from replication.reason import Reason
from replication.record.ancestry import Ancestry
from replication.record.lineage import Lineage, Verdict, decide
from replication.secondary.disk import SecondaryDisk
from replication.side import Setting
from replication.stage import Mode, Stage

RANGES_MAX = 4096
"""Of a change map, in one message."""

_PATIENCE, _PATIENCE_MIN_S = 2.0, 2.0
"""Times the primary's timeout, and at least so many seconds, after which a silent one counts as lost."""

WATCHING_S = 5.0
"""Within so many seconds a primary has looked after its secondary; one of an older version never does."""

NOBODYS = "it has failed over or was promoted: it is nobody's secondary"
FIRST_COPY = "a full resync from the primary is not complete"


class Channel:
    """A control connection of a primary."""

    def __init__(self, era: int = 0) -> None:
        """`era`: in which it has begun (Tenure)."""
        self.era = era
        self.heard = time.monotonic()
        self.closed = False
        self.paired = False
        """A primary was accepted on it."""
        self.watching = threading.Event()
        """Set when the primary looks after its secondary (primary/watch.py), so it sees what it is asked for there."""

    def note(self) -> None:
        """It has said something."""
        self.heard = time.monotonic()


class Session:
    """A primary that may write. It says something four times a second."""

    def __init__(self, channel: Channel, node: str, patience_s: float) -> None:
        self.channel = channel
        self.node = node
        self.patience_s = patience_s
        self.token = secrets.token_hex(16)
        self.sizes: dict[str, int] = {}
        """By disk, what the primary has of it: where it is less than here, only this disk has grown so far."""
        self.agreed = False
        """The primary has said what it is going to send. Before, the disks are what the former session has left."""

    @property
    def silent_s(self) -> float:
        """How long nothing has been heard of it, in seconds."""
        return time.monotonic() - self.channel.heard

    @property
    def lost(self) -> bool:
        """Whether that is too long; its connection may stay open for much longer."""
        return self.silent_s > self.patience_s


class Pairing:
    """Who is the primary of one secondary. Commands come one at a time (Node._command)."""

    def __init__(self, setting: Setting, ancestry: Ancestry, disks: Sequence[SecondaryDisk]) -> None:
        self._set = setting
        self._ancestry = ancestry
        self._disks = disks
        # Protects `_session`. Never held across I/O.
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self.leaving = False
        """This node is about to stop as planned: the primary is asked to end its stream at one instant."""
        self._session: Session | None = None
        self.met = False
        """A primary has come to an agreement with this process."""
        # Another node went on, as somebody knows: what the primary of this session has sent is no resync.
        self._doubted = False

    # -- what others see -----------------------------------------------------------------------------------

    @property
    def primary(self) -> str | None:
        """The node id of the primary that is paired, if one is."""
        session = self._session
        return None if session is None else session.node

    @property
    def live_primary(self) -> str | None:
        """The same, of one that was heard of within its time."""
        session = self._session
        return None if session is None or session.lost else session.node

    @property
    def owner_token(self) -> str | None:
        """The token of the session with the owner of the disks: with a primary that was accepted by its lineage, and
        is heard. None if there is none, or somebody knows that another node went on."""
        session, record = self._session, self._set.record
        known = session is not None and session.agreed and not session.lost and not self._doubted
        secondary = record.mode is Mode.SECONDARY and record.stage in (Stage.NONE, Stage.RUNNING)
        return session.token if session is not None and known and secondary else None

    @property
    def incomplete(self) -> str | None:
        """Why the disks are not what the primary had at one instant, None if they are (but for what is in flight)."""
        return self._incomplete[1]

    @property
    def _incomplete(self) -> tuple[Reason | None, str | None]:
        """A code for that, and the sentence."""
        record = self._set.record
        session = self._session
        if record.resync:
            if session:
                return Reason.RESYNC, "a resync is under way"
            return Reason.RESYNC_INTERRUPTED, "a resync was interrupted"
        if record.paired and (session is None or not session.agreed):
            return Reason.LINK_LOST, "the link to the primary was lost in the midst of an epoch"
        if session is not None and session.lost:
            return Reason.SILENT, f"nothing was heard of the primary for {session.silent_s:.0f} s"
        return None, None

    @property
    def link(self) -> dict[str, Any]:
        """As query-replication shows it."""
        if self._set.record.stage not in (Stage.NONE, Stage.RUNNING):
            return {"state": "disconnected", "primary": None, "reason": None}  # whoever is still connected
        session = self._session
        if session is None:
            state = "lost" if self._set.record.paired else "disconnected"
        elif session.lost:
            state = "lost"
        elif not session.agreed:
            state = "connecting"
        else:
            state = "synchronizing" if self._set.record.resync else "in-sync"
        code, reason = self._incomplete
        shown = {"state": state, "primary": self.primary, "reason": reason}
        return shown if code is None else {**shown, "code": code.value}

    def admit(self, token: str | None) -> None:
        """DiskError unless a client with that token (None: any client) may write now. Called from requests, inside the
        gate."""
        session = self._session
        if token == (None if session is None else session.token):
            return
        record = self._set.record
        if record.mode is not Mode.SECONDARY or record.stage not in (Stage.NONE, Stage.RUNNING):
            return  # nobody may write any more, whoever it is: the face itself says so (ESHUTDOWN)
        if token is not None:
            raise DiskError("this connection of the primary was replaced or has lost its control link", errno.ESHUTDOWN)
        assert session is not None
        raise DiskError(f"only the primary (node {session.node}) may write here while it is connected", errno.EPERM)

    def size_named(self, face: str, token: str | None) -> int | None:
        """Side.size_named."""
        session = self._session
        return None if session is None or session.token != token else session.sizes.get(face) or None

    def has_stranger(self) -> bool:
        """Whether what is written to the disks now comes from somebody else than the primary that they are known to,
        or from one that has not said what it will do: it will have to be sent again."""
        session = self._session
        return (session is None or not session.agreed) and self._ancestry.known

    # -- commands of the primary ---------------------------------------------------------------------------

    def pair(self, channel: Channel, node: str, lineage: Lineage, disks: dict[str, int], timeout_s: float) -> str:
        """Begin a session; its token. CommandError when this is not the secondary for that primary."""
        self._check_stage()
        if self.leaving:
            raise CommandError("it is being stopped")
        self._check_disks(disks)
        former = self._session
        if former is not None and former.node != node and not former.lost:
            raise CommandError(
                f"it has a primary already (node {former.node}), which was heard of {former.silent_s:.1f} s ago",
                reason=Reason.HAS_PRIMARY,
            )
        decision = decide(lineage, self._ancestry.lineage)
        if decision.verdict is Verdict.REFUSED:
            raise CommandError(decision.reason, reason=decision.code)
        self._note_back()
        session = Session(channel, node, max(_PATIENCE * timeout_s, _PATIENCE_MIN_S))
        session.sizes = disks
        with self._set.gate.closed(why=PAIRING), self._lock:
            if channel.closed:
                # It was given up while it waited here, and may have been followed by another one already.
                raise CommandError("the control connection was closed")
            self._session = session
        self._doubted = False
        pause("pairing.begun")
        return session.token

    def _note_back(self) -> None:
        """A primary is back, and its guest may write before it says what it will send, or go on where it never does:
        that the last one had left in good order says nothing any more. StateError, with nothing changed."""
        record = self._set.record
        if record.left_well:
            record.left_well = False
            try:
                self._set.save()
            except BaseException:
                record.left_well = True
                raise

    def _check_disks(self, disks: dict[str, int]) -> None:
        own = {disk.name: disk.size for disk in self._disks}
        if disks.keys() != own.keys():
            theirs = ", ".join(f"'{name[:80]}'" for name in disks)
            mine = ", ".join(f"'{name}'" for name in own)
            raise CommandError(f"the disks are {theirs} there, but {mine} here")
        former = self._set.record.former_disks
        for name, size in disks.items():
            # 0: an export that only forwards does not know. And one that has grown here first, as it should, takes what
            # its primary writes in the size that both had.
            if size not in (0, own[name]) and not former.get(name, own[name]) <= size < own[name]:
                raise CommandError(f"disk '{name}' has {size} bytes there, but {own[name]} here")

    def _forget_former(self, sizes: dict[str, int]) -> None:
        """The primary has sent all of its disks: where they are as large as here, no other size is of this pair any
        more. Not where an overlay has not grown: the next process has to know. StateError, with nothing changed."""
        record = self._set.record
        over = {
            disk.name
            for disk in self._disks
            if disk.name in record.former_disks
            and sizes.get(disk.name) == disk.size
            and (disk.stack is None or disk.stack.fits)
        }
        if not over:
            return
        former = record.former_disks
        record.former_disks = {name: size for name, size in former.items() if name not in over}
        try:
            self._set.save()
        except BaseException:
            record.former_disks = former
            raise
        for disk in self._disks:
            if disk.name in over and disk.stack is not None:
                disk.stack.target.preserved_to = disk.size

    def _check_stage(self) -> None:
        if self._set.record.stage not in (Stage.NONE, Stage.RUNNING):
            raise CommandError(NOBODYS, reason=Reason.NOT_SECONDARY)

    def map_part(self, token: str, name: str, start: int, lost: bool) -> dict[str, Any]:
        """What a disk lacks of what it was sent (`lost`: that alone), or has changed by itself since it was parted from
        its primary."""
        session = self.check_token(token)
        disk = next((disk for disk in self._disks if disk.name == name), None)
        if disk is None:
            raise CommandError(f"there is no disk '{name[:80]}'")
        end = session.sizes.get(name) or disk.size
        parts = [
            chosen.ranges_marked(start, RANGES_MAX) for chosen in ((disk.lost,) if lost else (disk.lost, disk.changes))
        ]
        nexts = [further for _, further in parts if further is not None]
        stop = min(nexts, default=None)
        if stop is not None and stop >= end:
            stop = None
        before = end if stop is None else stop
        ranges = [
            [offset, min(length, end - offset)] for found, _ in parts for offset, length in found if offset < before
        ]
        return {"ranges": ranges, "next": stop}

    def begins_resync(self, token: str, verdict: str, marked: bool) -> bool:
        """Whether the primary is about to send what is missing here, in a session that has just begun. CommandError."""
        session = self.check_token(token)
        resync = verdict == Verdict.FULL.value or (marked and verdict in (Verdict.QUICK.value, Verdict.EQUAL.value))
        return resync and not session.agreed

    def sync(self, token: str, verdict: str, generation: str, marked: bool, history: tuple[str, ...]) -> None:
        """What is going to be sent, or (`complete`) that it has been. `marked`: disks that are taken as equal are so
        but for what the primary's change map marks.

        Until it is complete nothing counts, also when nothing seemed to be missing: the primary's guest may write
        between this and the moment from which its writes are forwarded.
        """
        session = self.check_token(token)
        # It may have failed over since it was paired: its lineage and its change map are its own from then on.
        self._check_stage()
        pause("pairing.sync")
        if verdict == "complete":
            # Also when nothing was missing: an offer that only this process knew would be gone with it, and a planned
            # stop after that would leave a node that calls its whole copy an unfinished one.
            self._forget_former(session.sizes)  # first: no checkpoint may be taken that is not preserved as a whole
            self._become(lambda lineage: lineage, False, Lineage().adopted(generation, history))
        else:
            self._begin(verdict, generation, marked)
            for disk in self._disks:
                # The primary has asked for the marks of all that was written until its session began.
                disk.strange = False
        session.agreed = self.met = True

    def _begin(self, verdict: str, generation: str, marked: bool) -> None:
        if verdict == Verdict.FULL.value:
            self._begin_full(generation)
        elif verdict == Verdict.EQUAL.value and marked:
            self._become(lambda lineage: lineage.receiving(generation, keep=False), True)
        elif verdict == Verdict.EQUAL.value:
            self._become(lambda lineage: lineage.paired_as_equal(generation), True)
            for disk in self._disks:
                disk.changes.clear()
        elif self._ancestry.lineage.current == generation:
            self._become(lambda lineage: lineage, True)
        else:
            self._become(lambda lineage: lineage.receiving(generation, keep=True), True)

    def _begin_full(self, generation: str) -> None:
        """Nothing here is a state of that primary's disks, so there is no checkpoint to keep meanwhile."""
        record = self._set.record
        if record.stage is not Stage.RUNNING:
            self._become(lambda lineage: lineage.receiving(generation, keep=False), True)
            return
        # The gate first: requests that do not end refuse it, and then nothing has changed.
        with self._set.gate.closed(why=PAIRING):
            former, record.inconsistent = record.inconsistent, record.inconsistent or FIRST_COPY
            try:
                self._become(lambda lineage: lineage.receiving(generation, keep=False), True)
            except BaseException:
                record.inconsistent = former
                raise
            self._set.show()

    def _become(self, change: Callable[[Lineage], Lineage], resync: bool, offered: Lineage | None = None) -> None:
        """What is said of the content from now on. An offer ends when the primary says what it is going to send, before
        it does so: until then nobody has written but strangers, whose writes are marked."""
        record = self._set.record
        former = (record.resync, record.paired, record.offered, record.left_well)
        lineage = self._ancestry.lineage
        becoming = (resync, True, None if offered is None else offered.to_json(), False)
        if former == becoming and change(lineage) == lineage:
            return
        try:
            Lineage.from_json(change(lineage).to_json())
        except ValueError as error:  # a generation that stands in this node's history, say
            raise CommandError(f"what the primary says of its generations does not fit: {error}") from error
        take_back = self._ancestry.note(change)  # may fail, so first
        record.resync, record.paired, record.offered, record.left_well = becoming
        try:
            self._set.save()
        except BaseException:
            record.resync, record.paired, record.offered, record.left_well = former
            take_back()
            raise

    def end(self, token: str) -> None:
        """The primary has sent everything, and leaves."""
        self.check_token(token)
        record = self._set.record
        record.paired, record.left_well = False, not (record.resync or self._doubted)
        try:
            self._set.save()
        except BaseException:
            record.paired, record.left_well = True, False
            raise
        with self._ended:
            self._session = None
            self._ended.notify_all()

    @contextmanager
    def parting(self, timeout_s: float) -> Iterator[None]:
        """Before a planned stop: have the primary that is connected end its stream at one instant, for which it has
        `timeout_s` seconds, and let none pair meanwhile. CommandError when it does not.

        An older version of a primary is not asked, and is stopped in the midst of what it sends.
        """
        session, asked = self._session, False
        try:
            if session is not None and self._can_be_asked(session):
                with self._ended:
                    self.leaving = True
                    ended = self._ended.wait_for(lambda: self._session is not session, timeout_s)
                if not ended:
                    raise CommandError(
                        f"The primary (node {session.node}) is connected, and did not end what it sends within "
                        f"{timeout_s:g} s: stop it first"
                    )
                asked = True
            yield
        except CommandError as error:
            if not asked or session is None:
                raise
            raise CommandError(
                f"{error}. The primary (node {session.node}) had been asked to end what it sends; it connects again by "
                "itself",
                reason=error.reason,
            ) from error
        finally:
            self.leaving = False

    def _can_be_asked(self, session: Session) -> bool:
        """Whether that primary would see that it is asked to end its stream. One that has only just come has not looked
        yet."""
        if not session.agreed or self.incomplete is not None:
            return False
        session.channel.watching.wait(WATCHING_S)
        return session.channel.watching.is_set() and self._session is session and self.incomplete is None

    def closed(self, channel: Channel) -> None:
        """A control connection has ended; if it was the primary's, so has its session."""
        with self._lock:
            channel.closed = True
            if self._session is not None and self._session.channel is channel:
                self._session = None
                self._ended.notify_all()

    def check_token(self, token: str) -> Session:
        """The session, if it has that token; CommandError."""
        session = self._session
        if session is None or session.token != token:
            raise CommandError("this is not the session of the primary any more")
        return session

    # -- what the secondary does ---------------------------------------------------------------------------

    @property
    def adoption(self) -> Callable[[Lineage], Lineage] | None:
        """What a checkpoint of what the primary has offered makes of the lineage; None when there is nothing new, and
        while a primary is here that has not yet said what it will do."""
        saved, lineage, session = self._set.record.offered, self._ancestry.lineage, self._session
        if saved is None or (session is not None and not session.agreed):
            return None
        offered = Lineage.from_json(saved)
        if lineage.current == offered.current and not lineage.incoming:
            return None
        return lambda lineage: lineage.adopted(offered.current, offered.history)

    @property
    def resynchronised(self) -> bool:
        """Whether a checkpoint now is one of what the primary has, which is connected or has left in good order."""
        session, record = self._session, self._set.record
        there = record.left_well or (session is not None and session.agreed)
        return record.offered is not None and there and not record.resync and not self._doubted

    def doubt(self) -> None:
        """Another node went on: what the primary has sent until now does not count as a resync."""
        self._doubted = True

    def adopt(self) -> Callable[[], None] | None:
        """Note the adoption in the record, which the caller saves. What takes that back; None when there is nothing
        new."""
        adoption = self.adoption
        return None if adoption is None else self._ancestry.note(adoption)

    def adopted(self) -> None:
        """That is saved: what this node had written by itself the primary has sent instead. But not what somebody else
        has written since."""
        for disk in self._disks:
            if not disk.strange:
                disk.changes.clear()

    def discard(self) -> None:
        """A person gives up what was written here; CommandError."""
        if self._session is not None:
            raise CommandError("There is nothing to discard: a primary is connected")
        if not self._ancestry.lineage.current:
            raise CommandError("There is nothing to discard: this node has not been part of a pair")
        self._ancestry.become(lambda lineage: lineage.discarding())
