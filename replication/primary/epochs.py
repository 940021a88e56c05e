# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of a pair, by the primary: an epoch is cut, brought over, and becomes the secondary's checkpoint.

    cut         in the forward queues of all disks at one instant (forward.cut); no request waits for it, so the guest
                sees no pause. What a guest wrote because it had seen an answer is never in front of what was answered.
    reached     everything in front of the cut is on the secondary; nothing behind it is sent yet
    taken       the secondary has emptied its overlays (`replication-checkpoint` over the peer channel); or the cut is
                given up, and the last checkpoint stays valid
    let go      what is behind the cut is sent

With `hold`, "taken" waits for a command, so that somebody who keeps the memory of a virtual machine can make both valid
as one unit; a hold that is forgotten ends by itself after `timeout` seconds.

Invariants
* One cut at a time. Whatever happens, it is let go (in `_finish`), and the wait for it is bounded.
* A checkpoint is asked for only when nothing was missing at the cut, and nothing is when it is reached.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from replication.errors import CommandError, DiskError
from replication.log import log
from replication.order.gate import GateStuck
from replication.order.latency import STOP
from replication.order.pause import pause
from replication.order.worker import NO_THREAD
from replication.primary.backlog import Entry
from replication.primary.dial import Agreement
from replication.primary.disk import PrimaryDisk
from replication.primary.forward import cut
from replication.primary.link import Link
from replication.primary.peer import Peer, PeerError
from replication.record.state import check_epoch
from replication.side import Setting
from replication.stage import Mode, Stage

_PASSED_S = 5.0
"""Longest wait, before a stream ends, for requests that are at work: those of the secondary's guest are to be in it."""

TAKE_S = 30.0
"""Longest wait for the secondary to take a checkpoint: with durability=power it flushes its disk."""


@dataclass
class Epoch:
    """One that has been cut."""

    number: int
    entries: list[Entry]
    agreement: Agreement
    begun: float
    timer: threading.Timer | None = None


class Lacking(CommandError):
    """The secondary lacks something, which a resync has to bring over first."""


_LEAVE_MIN_S = 0.1
"""So long an answer is waited for at least."""


class Unknown(CommandError):
    """Perhaps the secondary has taken its checkpoint."""


class Epochs:
    """The epochs of one primary. Commands come one at a time (Node._command)."""

    def __init__(self, setting: Setting, disks: Sequence[PrimaryDisk], link: Link) -> None:
        self._set = setting
        self._disks = disks
        self._link = link
        # Protects `_held`. Never held across I/O.
        self._lock = threading.Lock()
        self._held: Epoch | None = None
        # Of the last one that was cut. One that was aborted keeps its number, so that a commit that comes too late does
        # not hit another epoch; a process that follows knows it, too.
        self._number = setting.state.last_held

    @property
    def held(self) -> int | None:
        """The number of the epoch that is held, None if there is none."""
        held = self._held
        return None if held is None else held.number

    def checkpoint(self) -> None:
        """Cut an epoch, wait for it, and have the secondary take it; CommandError (Lacking, if a resync would help)
        when the last checkpoint stays."""
        self._check_free()
        self._prepare()
        self._take(self._cut())

    def hold(self) -> int:
        """Cut an epoch now and return its number; CommandError."""
        self._check_free()
        epoch = self._cut()
        self._set.state.note_held(epoch.number)
        timer = threading.Timer(self._set.options.timeout_s, self._forgotten, (epoch,))
        timer.daemon = True
        with self._lock:
            self._held = epoch
        try:
            timer.start()
        except NO_THREAD as error:
            self.drop()
            raise CommandError(f"Epoch {epoch.number} cannot be held: {error}") from error
        epoch.timer = timer
        return epoch.number

    def commit(self, number: int) -> None:
        """Have the secondary take the epoch that is held; CommandError when it does not, and the epoch is aborted."""
        self._take(self._release(number))

    def abort(self, number: int) -> None:
        """Give the epoch up that is held: its writes belong to the next one; CommandError if it is not held."""
        self._finish(self._release(number))

    def drop(self) -> None:
        """Abort whatever is held."""
        with self._lock:
            epoch, self._held = self._held, None
        if epoch is not None:
            self._finish(epoch)

    def part(self) -> None:
        """End the stream at a cut: the secondary, which is being stopped as planned, gets what is in front of it and
        nothing else, and is told so; then the link is lost. CommandError, GateStuck, DiskError or PeerError."""
        agreement = self._link.agreement
        if agreement is None:
            raise CommandError("The link to the secondary was lost")
        try:
            self._end_passing(agreement)
            self._end_stream()
        except (CommandError, GateStuck, PeerError):  # the last: it has refused, and stays this node's secondary
            agreement.parting = False
            raise
        except BaseException as error:
            # The secondary knows perhaps that this was all: its guest is served here in another session, or not again.
            self._link.broken(agreement, DiskError(f"the end of the stream: {error}"))
            raise

    def _end_passing(self, agreement: Agreement) -> None:
        """The secondary's guest is not served here any more: what it was answered for is in front of the cut that
        follows, and it goes on with the secondary's disk (passing.py)."""
        agreement.parting = True
        if self._set.options.follow_owner:
            with self._set.gate.closed(_PASSED_S, STOP):
                pass  # what had been let in before is answered, or has failed

    def _end_stream(self) -> None:
        epoch = self._cut()
        try:
            for disk, entry in zip(self._disks, epoch.entries, strict=True):
                if not disk.forwarder.await_end(entry):
                    raise CommandError("The link to the secondary was lost")
            if any(disk.changes.missing for disk in self._disks):
                raise Lacking("The secondary has refused something")
            pause("epoch.parting")
            self._link.farewell(epoch.agreement, self._take_s)
            # What is behind the cut finds no link.
            self._link.broken(epoch.agreement, DiskError("the secondary was stopped as planned"))
        finally:
            self._finish(epoch)

    def hand_over(self, within_s: float) -> None:
        """Nothing is written any more: have all of it arrive, and the secondary know that this was all, within so many
        seconds. Then it would take over without loss, as it says itself. CommandError, DiskError or PeerError; the link
        is lost, and comes back, where the secondary may have heard a good-bye that does not count."""
        deadline = time.monotonic() + within_s
        epoch = self._cut()
        agreement = epoch.agreement
        try:
            for entry in epoch.entries:
                assert entry.ended is not None
                if not entry.ended.wait(max(0.0, deadline - time.monotonic())) or not entry.arrived:
                    raise CommandError("not everything has arrived at the secondary")
            if any(disk.changes.missing for disk in self._disks):
                raise Lacking("the secondary has refused something")
            if agreement.peer is None:
                raise CommandError("it is a plain NBD server, and acknowledges nothing")
            pause("epoch.leaving")
            self._link.farewell(agreement, max(_LEAVE_MIN_S, deadline - time.monotonic()))
            try:
                left_s = max(_LEAVE_MIN_S, deadline - time.monotonic())
                answer = agreement.peer.call("query-failover", {}, left_s)
                check_takes_over(answer)
            except BaseException:
                self._link.broken(agreement, DiskError("the secondary was not handed over to"))
                raise
        except DiskError as error:
            self._link.broken(agreement, error)
            raise
        finally:
            self._finish(epoch)

    # -- the steps -----------------------------------------------------------------------------------------

    def _check_free(self) -> None:
        if self.held is not None:
            raise CommandError(f"Epoch {self.held} is held: commit or abort it first")

    def _release(self, number: int) -> Epoch:
        """Take the epoch from whoever holds it."""
        with self._lock:
            epoch = self._held
            if epoch is None or epoch.number != number:
                now = "no epoch is" if epoch is None else f"epoch {epoch.number} is"
                raise CommandError(f"Epoch {number} is not held ({now}): it was committed or aborted, or timed out")
            self._held = None
        return epoch

    def _forgotten(self, epoch: Epoch) -> None:
        with self._lock:
            if self._held is not epoch:
                return
            self._held = None
        log(f"epoch {epoch.number} was held for {self._set.options.timeout_s:g} s and is aborted")
        self._finish(epoch)

    def _prepare(self) -> None:
        """Have a secondary that flushes its disk for a checkpoint do most of that now, while nothing waits for it."""
        agreement = self._link.agreement
        if agreement is None or agreement.peer is None or not agreement.durable:
            return
        try:
            agreement.peer.call("replication-pair-prepare", {"token": agreement.token}, TAKE_S)
        except PeerError as error:
            raise self._refused(agreement, agreement.peer, error) from error
        except DiskError as error:
            raise CommandError(f"The link to the secondary was lost ({error})") from error

    def _cut(self) -> Epoch:
        agreement = self._link.agreement
        if agreement is None:
            raise CommandError(f"The link to the secondary is not up ({self._link.reason or self._link.state.value})")
        begun = time.monotonic()
        with ExitStack() as still:
            # Together: what a resend takes off the map is in front of the cut, or it is still missing.
            missing = [still.enter_context(disk.still()) for disk in self._disks]
            if any(missing):
                raise Lacking("The secondary lacks something")
            entries = cut([disk.forwarder for disk in self._disks])
        if entries is None:
            raise CommandError("The link to the secondary was lost")
        pause("epoch.cut")
        self._number = max(self._set.state.epoch, self._number) + 1
        return Epoch(self._number, entries, agreement, begun)

    def _take(self, epoch: Epoch) -> None:
        try:
            for disk, entry in zip(self._disks, epoch.entries, strict=True):
                if not disk.forwarder.await_end(entry):
                    raise CommandError(f"The link to the secondary was lost ({self._link.reason})")
            if any(disk.changes.missing for disk in self._disks):
                raise Lacking("The secondary has refused something")
            pause("epoch.reached")
            number = self._ask(epoch)
        finally:
            self._finish(epoch)
        self._link.obstructed(epoch.agreement, None)
        self._set.state.count_epoch(time.monotonic() - epoch.begun, number)

    def _ask(self, epoch: Epoch) -> int:
        """Have the secondary take its checkpoint; the number that it has there."""
        peer = epoch.agreement.peer
        assert peer is not None
        if not epoch.agreement.completed:
            self._link.synchronized()  # the resync's last pass has not got so far, but the cut has
        arguments = {"token": epoch.agreement.token, "epoch": epoch.number}
        try:
            return check_epoch(peer.call("replication-checkpoint", arguments, self._take_s)["epoch"])
        except PeerError as error:
            raise self._refused(epoch.agreement, peer, error) from error
        except (KeyError, TypeError, ValueError) as error:
            self._link.broken(epoch.agreement, DiskError("the secondary answers a checkpoint with something else"))
            raise Unknown(
                f"It is not known whether the secondary has taken checkpoint {epoch.number}: it answers with something "
                "else"
            ) from error
        except DiskError as error:
            # Perhaps it has taken it: the link must not be used as if it had not.
            self._link.broken(epoch.agreement, error)
            raise Unknown(
                f"It is not known whether the secondary has taken checkpoint {epoch.number}: {error}"
            ) from error

    def _refused(self, agreement: Agreement, peer: Peer, error: PeerError) -> CommandError:
        """The error for a checkpoint that the secondary has refused. Perhaps it is a secondary no longer: while the
        guest is idle no refused write would tell, so the link is lost here."""
        try:
            status = peer.call("query-replication", {}, self._take_s)
        except (DiskError, PeerError) as failure:
            log(f"it is not known in which stage the secondary has refused a checkpoint: {failure}")
        else:
            known = isinstance(status, dict)
            mode, stage = (str(status.get(name))[:20] if known else "?" for name in ("mode", "stage"))
            if mode != Mode.SECONDARY.value or stage not in (Stage.NONE.value, Stage.RUNNING.value):
                self._link.broken(agreement, DiskError(f"the secondary has become a {mode} in stage {stage}"))
        # Until it says otherwise (watch.py), or takes one.
        self._link.obstructed(agreement, f"the secondary takes no checkpoint: {error}")
        return CommandError(f"The secondary has not taken the checkpoint: {error}")

    @property
    def _take_s(self) -> float:
        """Longest wait for the secondary; with protocol=sync the guest's writes behind the cut wait, too."""
        return min(TAKE_S, self._set.options.timeout_s) if self._set.options.sync else TAKE_S

    def _finish(self, epoch: Epoch) -> None:
        """What is behind the cut goes on."""
        if epoch.timer is not None:
            epoch.timer.cancel()
        for disk, entry in zip(self._disks, epoch.entries, strict=True):
            disk.forwarder.let_go(entry)


def check_takes_over(answer: object) -> None:
    """CommandError unless the secondary answers query-failover so that it takes over, and all that was sent. One of an
    earlier version does not say, and goes back to its last checkpoint."""
    if not isinstance(answer, dict) or answer.get("lossless") is not True:
        raise CommandError(f"the secondary would lose something: {_why(answer)}")
    if answer.get("allowed") is not True:
        raise CommandError(f"the secondary would not take over: {_why(answer)}")


def _why(answer: object) -> str:
    """What a secondary that answers query-failover has to say against a failover."""
    if not isinstance(answer, dict):
        return "it answers with something else"
    return str(answer.get("reason", "it does not hold all that was sent, or its own guest has written"))[:400]
