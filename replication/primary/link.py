# SPDX-License-Identifier: BSD-3-Clause
"""The link of a primary: its state, its loss, and its coming back by itself.

    disconnected    replication does not run
    connecting      the secondary is being reached, or has been and an agreement is sought (dial.py)
    synchronizing   writes are forwarded, and a resync sends what the secondary lacks besides; or it lacks nothing, and
                    takes no checkpoint, or could not be told (`reason`; watch.py)
    in-sync         the secondary has everything but what is in the queue, and would take a checkpoint
    lost            nothing is forwarded; what the secondary lacks is recorded, and the thread here tries again

Who notices a loss: a forwarder, whose connection has gone or makes no progress for `timeout` seconds; the peer channel,
over which the secondary says something four times a second, so that an idle link is watched as well. Whoever it is, all
disks lose their link at that moment. The guest waits for none of it.

Invariants
* One attempt to connect at a time, by the thread or (a start) by the node's command, never by both: the thread tries
  only while `_wanted`, which a start sets last, and a start waits for an attempt that a stop has torn loose.
* An attempt begins when the former connections have given back everything that was in flight.
* Who ends the link lets an attempt that has told the secondary what it is going to be sent come to its end, for a
  while: that secondary takes no checkpoint, and no planned stop, before it is told that it has everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

from replication.disk.connection import Connection
from replication.errors import DiskError, ReplicationError
from replication.fault import Case
from replication.log import log, surviving
from replication.order.pause import pause
from replication.order.worker import Worker
from replication.primary.cause import reason_by, reason_of
from replication.primary.dial import Agreement, Dialler, Refusal
from replication.primary.disk import PrimaryDisk
from replication.primary.peer import PeerError, forgotten
from replication.reason import Reason
from replication.record.ancestry import Ancestry
from replication.record.state import StateError
from replication.side import Setting

_AGAIN_MIN_S, _AGAIN_MAX_S = 0.1, 5.0
"""Between two attempts to connect: a cut of a second is mended within one more, and a host that is gone for a day costs
one attempt in five seconds."""
_IDLE_S = 3600.0

_OFFER, _CHECKPOINT = "offer", "checkpoint"
"""Operations of the faults of a secondary that has everything, and cannot be told or takes no checkpoint."""


_WENT_ON = {Reason.NOT_SECONDARY: Reason.PEER_PROMOTED, Reason.PEER_NEWER: Reason.PEER_NEWER}
"""Refusals by which this node learns that the other one went on. Not split brain: that one is a secondary again, and
which of the two counts a person says."""


class LinkState(Enum):
    """What query-replication and REPLICATION_LINK say of the link."""

    DISCONNECTED = "disconnected"
    CONNECTING = "connecting"
    SYNCHRONIZING = "synchronizing"
    IN_SYNC = "in-sync"
    LOST = "lost"


class Link:
    """The link of all disks of one primary."""

    def __init__(
        self,
        setting: Setting,
        ancestry: Ancestry,
        disks: Sequence[PrimaryDisk],
        uri: Callable[[], str | None],
        resync_now: Callable[[bool], None],
    ) -> None:
        """`uri()` is the secondary's at present; `resync_now(explicit)` is called when a link has
        come up, with true for one that a start has made."""
        self.dialler = Dialler(setting, ancestry, disks, self.broken)
        self._set = setting
        self._ancestry = ancestry
        self._disks = disks
        self._uri = uri
        self._resync_now = resync_now
        # Protects the fields below. Never held across I/O.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._state = LinkState.DISCONNECTED
        self._agreement: Agreement | None = None
        self.met = False
        """There has been an agreement: what the secondary descends from was known then."""
        self._wanted = False
        # A loss has been noticed and is being told: no attempt to connect begins before.
        self._losing = False
        self._closing = False
        # An attempt tells the secondary what it is going to be sent, or has, and the link is not up yet.
        self._settling = False
        self._reason: str | None = None
        # The code of that.
        self._code = Reason.LINK_LOST
        # The reason that the log has, since the link was up last.
        self._told: str | None = None
        # Of the agreement: why the secondary takes no checkpoint, and why it was not told that it has everything.
        self._obstacle: str | None = None
        self._untold: str | None = None
        # Lost ones, whose peer channel the thread closes: who notices a loss may be a thread of theirs.
        self._leaving: list[Agreement] = []
        self._worker = Worker("link", self._serve)
        # Held for the whole of an attempt to connect. Above all other locks here.
        self._attempting = threading.Lock()

    # -- what others see -----------------------------------------------------------------------------------

    @property
    def state(self) -> LinkState:
        """The state."""
        with self._lock:  # it changes together with the error (`_tell_lost_locked`)
            return self._state

    @property
    def reason(self) -> str | None:
        """Why it is not up, or not in sync although nothing is missing; None when there is nothing to say."""
        return self._reason or self._untold or self._obstacle

    @property
    def trouble(self) -> tuple[str | None, Reason | None]:
        """The reason, and the same for programs, of one moment."""
        with self._lock:
            if self._reason is not None:
                return self._reason, self._code
            reason = self.reason
        return reason, None if reason is None else reason_by(reason, Reason.REFUSED)

    @property
    def untold(self) -> bool:
        """Whether the secondary has everything and could not be told so."""
        return self._untold is not None

    @property
    def agreement(self) -> Agreement | None:
        """What has been agreed with the secondary, while the link is up."""
        return self._agreement

    @property
    def paired(self) -> bool:
        """Whether it is up, and the secondary is no plain NBD server."""
        agreement = self._agreement
        return agreement is not None and agreement.peer is not None

    @property
    def ready(self) -> bool:
        """Whether a checkpoint can be asked for: it is in sync, or all that is known to be in the way is that the
        secondary has refused one, which may be over."""
        obstructed = self._state is LinkState.SYNCHRONIZING and self._obstacle is not None and self._untold is None
        missing = any(disk.changes.missing for disk in self._disks)
        return self._agreement is not None and (self._state is LinkState.IN_SYNC or (obstructed and not missing))

    def await_connected(self, timeout_s: float) -> None:
        """Wait for the first attempts after a restart, `timeout_s` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._state is not LinkState.CONNECTING or self._closing, timeout_s)

    # -- coming up -----------------------------------------------------------------------------------------

    def establish(self, agreement: Agreement, begin: bool) -> bool:
        """Forward from now on; False, with the agreement closed, when nobody wants that any more. The stage is
        running. `begin`: by a start, which wants it."""
        left: list[Connection] = []
        told = None
        with self._changed:
            taken = not self._closing and self._agreement is None and (begin or self._wanted)
            if taken:
                self._wanted = self.met = True
                self._reason = self._obstacle = self._untold = None
                agreement.losses = self._set.admission.losses
                told, self._told = self._told, None
                for disk, connection in zip(self._disks, agreement.connections, strict=True):
                    # A plain server keeps no account of what it has not flushed, and may be started anew unseen.
                    plain = agreement.peer is None
                    disk.changes.need_flushes(plain)
                    batch_at = agreement.disk_size(connection) if agreement.batches else None
                    try:
                        disk.forwarder.adopt(connection, batch_at, disk.changes if plain else None)
                    except DiskError as error:
                        # The link is lost as soon as it is up (below): the other disks forward already, and their
                        # connections are no longer ours to close.
                        agreement.broken = error
                        left.append(connection)
                self._agreement = agreement
                self._show_locked(LinkState.SYNCHRONIZING)
                self._changed.notify_all()
        if not taken:
            agreement.close()
            return False
        if told is not None:
            log("the link to the secondary is up again")
        for connection in left:
            connection.close()
        if agreement.broken is not None:  # before it was this link's
            self.lost(None, agreement.broken)
        self.synchronized()
        self._resync_now(begin)
        return True

    def start(self) -> None:
        """Start the thread, once; it has nothing to do yet. CommandError when there is none to be had."""
        self._worker.start()

    def resume(self) -> None:
        """A former process was running: bring the link back."""
        with self._changed:
            self._wanted = True
            self._show_locked(LinkState.CONNECTING)
            self._changed.notify_all()
        self._worker.wake()

    def synchronized(self) -> None:
        """A pass of the resync has ended, or the link is up: if nothing is missing, say so to the secondary."""
        agreement = self._agreement
        if agreement is None or any(disk.changes.missing or not disk.forwarder.up for disk in self._disks):
            return
        refused = agreement.refused
        pause("link.synchronized")
        try:
            if agreement.peer is not None:
                self.dialler.tell_complete(agreement)
        except DiskError as error:
            self.broken(agreement, error)
            return
        except (StateError, PeerError) as error:
            self._could_not_tell(agreement, f"the secondary cannot be told that it has everything: {error}")
            return
        with self._changed:
            agreement.settled = agreement.refused == refused
            told_late, self._untold = self._untold is not None, None
            self._show_synchronized_locked(agreement)
        if told_late:
            self._set.faults.clear(lambda fault: fault.case == Case.LINK and fault.operation == _OFFER)

    def _show_synchronized_locked(self, agreement: Agreement) -> None:
        """In sync, if nothing is in the way."""
        missing = any(disk.changes.missing for disk in self._disks)  # something may have been refused meanwhile
        synchronizing = self._agreement is agreement and self._state is LinkState.SYNCHRONIZING
        if synchronizing and agreement.settled and not missing and self._obstacle is None:
            self._show_locked(LinkState.IN_SYNC)

    def _could_not_tell(self, agreement: Agreement, why: str) -> None:
        """It will be tried again (watch.py)."""
        with self._changed:
            if self._agreement is not agreement:
                return
            news, self._untold = self._untold != why, why
            latched = self._set.faults.latch(Case.LINK, self._disks[0].name, _OFFER, 0, 0, DiskError(why))
        if news:
            log(why)
        if latched:
            self._set.faults.keep()

    def obstructed(self, agreement: Agreement, why: str | None) -> None:
        """Why the secondary takes no checkpoint; None when it does, or says that it would."""
        latched = False
        with self._changed:
            if self._agreement is not agreement:
                return
            former, self._obstacle = self._obstacle, why
            if why is not None and why != former:
                latched = self._set.faults.latch(Case.EMPTYING, self._disks[0].name, _CHECKPOINT, 0, 0, DiskError(why))
                if self._state is LinkState.IN_SYNC:
                    self._show_locked(LinkState.SYNCHRONIZING)
            elif why is None and former is not None:
                self._show_synchronized_locked(agreement)
        if latched:
            self._set.faults.keep()
        if why is None:
            self._set.faults.clear(lambda fault: fault.case == Case.EMPTYING and fault.operation == _CHECKPOINT)

    def desynchronized(self) -> None:
        """Something is missing on the secondary: it has refused it, or it was not sent."""
        with self._changed:
            if self._agreement is not None:
                self._agreement.refused += 1
                self._agreement.settled = False
            if self._state is LinkState.IN_SYNC:
                self._show_locked(LinkState.SYNCHRONIZING)

    def _show_locked(self, state: LinkState) -> None:
        if state is not self._state:
            self._state = state
            self._set.hub.emit("REPLICATION_LINK", state=state.value)

    # -- going down ----------------------------------------------------------------------------------------

    def lost(self, connection: Connection | None, error: DiskError) -> None:
        """The link is lost, as the forwarder of a connection or (None) somebody else has noticed."""
        with self._changed:
            agreement = self._agreement
            if agreement is None or not (connection is None or connection in agreement.connections):
                return  # or it is a former one's: who has noticed may be late
            self._set.admission.cut_off()
            self._agreement = None
            self._losing = True
            self._reason, self._code = str(error), reason_by(str(error), Reason.LINK_LOST)
        # Before the error: what clears it asks whether the forwarders are up.
        for disk in self._disks:
            disk.forwarder.abandon(str(error))
        at = 0 if connection is None else agreement.connections.index(connection)
        latched = False
        with self._changed:
            news = self._wanted and self._agreement is None
            if news:
                latched = self._tell_lost_locked(self._disks[at].name, error)
            self._leaving.append(agreement)
        if news:
            # Before the thread goes on, which tells why the link does not come back.
            log(f"the link to the secondary is lost: {error}")
            self._told = str(error)
        self._set.admission.tell()
        with self._changed:
            self._losing = False
            self._changed.notify_all()
        self._worker.wake()
        if latched:
            self._set.faults.keep()

    def _tell_lost_locked(self, disk_name: str, error: DiskError) -> bool:
        """Latch the error and show the state at one moment: who sees either finds the other. Whether the fault has to
        be kept."""
        latched = self._set.faults.latch(Case.LINK, disk_name, "link", 0, 0, error)
        self._show_locked(LinkState.LOST)
        return latched

    def broken(self, agreement: Agreement, error: DiskError) -> None:
        """The link is lost, if it is still that of `agreement`."""
        if self._agreement is agreement:
            self.lost(None, error)

    def cut(self, error: DiskError) -> None:
        """The link is lost, and whoever waits for an answer of the secondary learns it at once."""
        agreement = self._agreement
        if agreement is not None:
            self.broken(agreement, error)
            if agreement.peer is not None:
                agreement.peer.cut(str(error))

    def stop(self, drain_s: float, farewell_s: float, whole: bool, *, hasty: bool = False) -> None:
        """Send what is queued, for at most `drain_s` seconds, and let the link go. `whole`: nothing else was missing.
        Then, if it has arrived, the secondary is told that this was all, which it has `farewell_s` seconds to note.
        `hasty`: the end of the peer channel, which may take seconds, is not waited for."""
        with self._changed:
            self._wanted = False
        if self._agreement is None:
            self.dialler.give_up()
        deadline = time.monotonic() + drain_s
        agreement = self._agreement
        refused = agreement.refused if agreement is not None else 0
        drained = [disk.forwarder.stop(max(0.0, deadline - time.monotonic())) for disk in self._disks]
        with self._changed:
            agreement, self._agreement = self._agreement, None
            self._show_locked(LinkState.DISCONNECTED)
        if agreement is None:
            return
        if agreement.peer is not None and whole and all(drained) and agreement.refused == refused:
            try:
                self.farewell(agreement, farewell_s)
            except (DiskError, PeerError) as error:
                log(f"cannot tell the secondary that it has everything: {error}")
        if hasty:
            with self._changed:
                self._leaving.append(agreement)
                self._changed.notify_all()
        elif agreement.peer is not None:
            agreement.peer.close()

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """In here the secondary is told that this was all, so it is not connected to again; with an error it is."""
        with self._changed:
            self._wanted = False
        try:
            yield
        except BaseException:
            with self._changed:
                self._wanted = True
                if self._agreement is None:
                    self._show_locked(LinkState.CONNECTING)
                self._changed.notify_all()
            self._worker.wake()
            raise

    def farewell(self, agreement: Agreement, timeout_s: float) -> None:
        """Tell the secondary that it has everything. It may fail over as soon as it hears that, so this node's lease
        ends before. DiskError, PeerError: it has refused, and stays this node's secondary."""
        peer, admission = agreement.peer, self._set.admission
        assert peer is not None
        peer.heard = forgotten
        admission.leave()
        try:
            peer.call("replication-unpair", {"token": agreement.token}, timeout_s)
        except PeerError:
            admission.stay()
            peer.heard = admission.heard
            raise
        except DiskError as error:
            if self._set.options.lease_s is not None:  # it may have heard it, or hear it later
                self.broken(agreement, error)
            raise

    def wait_unattempted(self, timeout_s: float) -> bool:
        """Wait until no attempt to connect is under way, `timeout_s` seconds at most. Replication does not run, so none
        begins."""
        if not self._attempting.acquire(timeout=timeout_s):
            return False
        self._attempting.release()
        return True

    def await_settled(self, timeout_s: float, *, last: bool = False) -> None:
        """Let an attempt that has told the secondary what it is going to be sent bring the link up and say that this
        was all, for `timeout_s` seconds at most. `last`: no other attempt gets so far."""
        with self._changed:
            self._changed.wait_for(lambda: not self._settling, timeout_s)
            self._closing = self._closing or last
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """End, within about `timeout_s` seconds."""
        with self._changed:
            self._closing = True
            if self._agreement is not None:
                self._agreement.parting = True  # a secondary that is told that this was all goes on from that
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        self.stop(timeout_s / 2, timeout_s / 2, not any(disk.changes.missing for disk in self._disks))
        self.dialler.interrupt()
        self._worker.stop(max(0.0, deadline - time.monotonic()))

    # -- the thread ----------------------------------------------------------------------------------------

    def _serve(self) -> float | None:
        """Until the end: one round is all of it."""
        again_s = _AGAIN_MIN_S
        up_since: float | None = None
        patient_until = time.monotonic() + self._set.options.timeout_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._has_work_locked(), _IDLE_S)
                if self._closing:
                    return None
                leaving, self._leaving = self._leaving, []
                due = self._wanted and self._agreement is None and not self._losing
            for agreement in leaving:
                with surviving():
                    if agreement.peer is not None:
                        agreement.peer.close()
            if not due:
                continue
            if up_since is not None and time.monotonic() - up_since > _AGAIN_MAX_S:
                again_s, up_since = _AGAIN_MIN_S, None
            if up_since is None and self._attempt_alone(time.monotonic() > patient_until):
                up_since = time.monotonic()
                continue
            # Also for a link that was lost as soon as it was up: two that take it from each other shall not do it as
            # fast as they can.
            up_since = None
            with self._changed:
                self._changed.wait_for(lambda: self._closing or not self._wanted, again_s)
            again_s = min(2 * again_s, _AGAIN_MAX_S)

    def _has_work_locked(self) -> bool:
        return bool(self._leaving) or (self._wanted and self._agreement is None and not self._losing)

    def _attempt_alone(self, impatient: bool) -> bool:
        with self._attempting:
            return self._wanted and self._attempt(impatient)

    def _attempt(self, impatient: bool) -> bool:
        """Connect again; whether the link is up. `impatient`: from now on a secondary that cannot be reached is an
        error, also after a restart."""
        agreement = None
        try:
            if not all(disk.forwarder.wait_down(self._set.options.timeout_s) for disk in self._disks):
                return False
            agreement = self.dialler.dial(self._uri(), "auto", self._set.record.partner)
            self._show_connecting()
            pause("link.dialled")
            with self._going_to_settle():
                self.dialler.settle(agreement, "auto")
                self._set.state.count_from(agreement.epoch)
                up = self.establish(agreement, begin=False)
            if up:
                self.accepted(agreement)
            return up
        except Exception as error:  # noqa: BLE001 (this thread must live: nobody else brings the link back)
            if agreement is not None:
                agreement.close()
            if isinstance(error, ReplicationError):
                self._failed(error, impatient or isinstance(error, Refusal))
            else:
                self._failed(DiskError.from_defect(error), tell=True)
            return False

    @contextmanager
    def _going_to_settle(self) -> Iterator[None]:
        """In here the secondary is told what it is going to be sent. DiskError when nobody wants that any more."""
        with self._changed:
            if not self._wanted or self._closing:
                raise DiskError("replication was stopped")
            self._settling = True
        try:
            yield
        finally:
            with self._changed:
                self._settling = False
                self._changed.notify_all()

    def _show_connecting(self) -> None:
        with self._changed:
            if self._wanted and self._agreement is None:
                self._show_locked(LinkState.CONNECTING)

    def accepted(self, agreement: Agreement) -> None:
        """The secondary takes this node's writes, so nobody has gone on from them; a plain server says nothing of
        that."""
        self._set.admission.linked(agreement.losses)
        peer = agreement.peer
        if peer is not None:
            peer.heard = self._set.admission.heard
            peer.heard(peer.asked)
            self._set.accepted()

    def _failed(self, error: ReplicationError, tell: bool) -> None:
        """An attempt has failed. The same reason is told once."""
        with self._changed:
            if not self._wanted:
                return
            # What was not to be told yet (`tell`) is still to be told when it goes on.
            self._code = reason_of(error)
            news = tell and (self._told != str(error) or self._state is not LinkState.LOST)
            self._reason = str(error)
            latched = False
            if news:
                failure = error if isinstance(error, DiskError) else DiskError(str(error))
                latched = self._tell_lost_locked(self._disks[0].name, failure)
        if news:
            log(f"no link to the secondary: {error}")
            self._told = str(error)
        # First: until then the guest goes on, and what is kept waits for the storage.
        if isinstance(error, Refusal) and error.reason in _WENT_ON:
            self._set.outdate(_WENT_ON[error.reason], str(error))
        if latched:
            self._set.faults.keep()
