# SPDX-License-Identifier: BSD-3-Clause
"""The primary half: its disks, the link to their secondary, barriers and checkpoints."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from replication.acquaintance import answer, asks
from replication.disk.face import Disk
from replication.disk.open import open_disk
from replication.disk.unflushed import GRAIN
from replication.errors import CommandError, ConfigError, DiskError
from replication.fault import Case, Fault
from replication.log import log
from replication.options import check_uri
from replication.order.gate import GateStuck
from replication.order.latency import CHECKPOINT, START, STOP
from replication.order.pause import pause
from replication.order.urgency import Haste
from replication.primary.backlog import Budget, Entry, Kind
from replication.primary.cause import GONE_ON
from replication.primary.dial import ANSWER_S, COMPARING, EVERYTHING, Agreement, Refusal
from replication.primary.disk import PrimaryDisk
from replication.primary.epochs import Epochs, Lacking, Unknown
from replication.primary.forward import Forwarder
from replication.primary.growth import Growth
from replication.primary.link import Link, LinkState
from replication.primary.peer import PeerError
from replication.primary.resync import Resync
from replication.primary.verify import Verify
from replication.primary.watch import Watch
from replication.reason import Reason
from replication.record.binding import Doubts
from replication.record.boot import boot_id
from replication.record.changes import ChangeMap
from replication.record.lineage import new_id
from replication.record.state import StateError
from replication.secondary.disk import SecondaryDisk, closed_face
from replication.side import GUEST_DISK, GUEST_WRITES, Face, Setting, Side
from replication.sizes import served
from replication.stage import Mode, Stage
from replication.uri import absolute

_RESYNC_S = 30.0
"""Longest wait of a barrier for what is still missing."""

_REPAIRED_BY_RESYNC = (Case.FORWARD, Case.LINK, Case.PRIMARY_DISK)
"""Errors that end when nothing is missing any more; of case 1 those of a resync, and losses of what was not flushed."""

_GATE_S = 0.4
"""Longest wait, twice, of a primary that goes on without its secondary for the requests in flight."""

_VERIFY_STOP_S = 0.5
"""Longest wait for a comparison at the end of the process: it may be reading the disk."""

_STOP_S = 3.0
"""At the end of the process the queue is sent for at most this long; what is left is in the change map."""

_FINISH_S = 1.0
"""So much of it may go by until the secondary knows that it has everything, where that is soon: see `_finish`."""

_FINISH_MAX = 64 << 20
"""Bytes that may be missing for that: a guest waits for this end when its nbdkit is started anew, and a resync of more
would not end in the time anyway."""


class PrimarySide(Side):
    """All disks of a primary."""

    mode = Mode.PRIMARY

    def __init__(self, setting: Setting) -> None:
        self._set = setting
        self.disks: list[PrimaryDisk] = []
        self._ancestry = setting.ancestry
        self._budget = Budget(setting.options.queue_limit)
        rate = setting.options.resync_rate
        self._resync = Resync(
            self.disks, setting.jobs, self._unreadable, self._pass_ended, rate, lambda: self._verify.able
        )
        self._link = Link(setting, self._ancestry, self.disks, lambda: self._uri, self._resync.now)
        self._epochs = Epochs(setting, self.disks, self._link)
        self._watch = Watch(setting, self.disks, self._link, self._left_behind, self._part)
        self._verify = Verify(setting, self.disks, self._link, self._resync.now)
        self._growth = Growth(setting, self.disks, self._link, self._epochs)
        # Protects the size of an export that only forwards. Held while connecting for it, by intent.
        self._sizing = threading.Lock()

    @property
    def _uri(self) -> str | None:
        return self._set.record.secondary or self._set.options.secondary

    # -- opening -------------------------------------------------------------------------------------------

    def _choose_secondary(self) -> None:
        """The later word counts: the command's, or a command line that has changed since."""
        record, given = self._set.record, self._set.options.secondary
        if record.secondary is None:
            return
        record.secondary = absolute(record.secondary, self._set.options.folder)
        if given is None or given == record.secondary:
            return
        if record.replaced in ("", given):
            log(
                f"secondary={given} is not used: an earlier start has given {record.secondary}, which counts until the "
                "command line or a start names another one"
            )
        else:
            log(f"secondary={given} is new and counts from now on, not {record.secondary} of an earlier start")
            record.secondary = None

    def open(self) -> None:
        self._choose_secondary()
        options, state, record = self._set.options, self._set.state, self._set.record
        locals_: list[Disk | None] = []
        try:
            for disk in options.disks:
                locals_.append(None if disk.location is None else open_disk(disk.name, disk.location, options.tls))
            sizes = {
                disk.name: record.disks.get(disk.name, 0) if local is None else local.size
                for disk, local in zip(options.disks, locals_, strict=True)
            }
            sizes = served(options.state, record.disks, sizes)
            record.disks = {name: size for name, size in sizes.items() if size}
            for disk, local in zip(options.disks, locals_, strict=True):
                if local is not None:
                    local.size = sizes[disk.name]
                # The maps last: a start that is refused because of a disk has made none.
                kept = sizes[disk.name] > 0 and (local is not None or record.stage is not Stage.NONE)
                size = max(sizes[disk.name], 1)
                changes = state.open_map(disk.name, "changes", size) if kept else ChangeMap(None, size)
                self._add(disk.name, disk.top_id, local, changes, sizes[disk.name])
                if local is not None:
                    self.disks[-1].watch(state.account_of(disk.name, local.size))
                if record.cut_off or (local is not None and record.stage is Stage.NONE and state.cut_off):
                    changes.mark_all()  # neither what it said nor what the disk had not flushed is known any more
            self._note_doubts(state.take_doubts())
        except BaseException:
            for local in locals_[len(self.disks) :]:
                if local is not None:
                    local.close()
            self._let_go()
            raise

    def _note_doubts(self, doubts: Doubts) -> None:
        """Files of the state folder are not believed, so everything may differ. Nobody knows either whether the guest
        has written without the secondary, so it is taken for that."""
        for disk in self.disks:
            if doubts.of(disk.name, "unflushed") is not None:
                disk.changes.mark_all()
        if self._ancestry.shared and any(doubts.of(disk.name, "unflushed") for disk in self.disks):
            self._ancestry.note(lambda lineage: lineage.moved(new_id()))

    def adopt(self, promoted: Sequence[SecondaryDisk]) -> None:
        """Instead of `open`: go on with the disks of a promoted secondary, and with what it knows of their changes."""
        for disk in promoted:
            self._add(disk.name, disk.top_id, disk.disk, disk.changes, disk.size)

    def take_account(self) -> None:
        """After `adopt`, when this side is the node's: what the disks lose is its to know."""
        for disk in self.disks:
            if disk.local is not None and disk.local.unflushed is not None:
                disk.watch(disk.local.unflushed)

    def _add(self, name: str, top_id: str | None, local: Disk | None, changes: ChangeMap, size: int) -> None:
        forwarder = Forwarder(
            name,
            self._budget,
            self._set.options.timeout_s,
            partial(self._forward_failed, name),
            self._link.lost,
        )
        forwarder.cut_off = self._set.admission.cut_off
        disk = PrimaryDisk(name, local, changes, forwarder, self._set.faults, self._ancestry, self._set.options.sync)
        disk.attend(self._set.gate.latency)
        disk.left_behind = partial(self._not_sent, disk)
        disk.left_undefined = self._left_undefined
        disk.size = size
        disk.top_id = top_id
        self.disks.append(disk)

    def launch(self) -> None:
        self._set.state.open_until_closed()
        for disk in self.disks:
            disk.lose_former()
        self._start_threads()
        if self._set.record.stage is Stage.RUNNING:
            self._link.resume()
            self._verify.resume()

    def look(self) -> None:
        for disk in self.disks:
            if disk.local is not None:
                disk.local.look()

    def show_stage(self, stage: Stage) -> None:
        for disk in self.disks:
            disk.stage = stage

    def size_of(self, disk: PrimaryDisk) -> int:
        """The size that the export has; asked of the secondary where there is no local disk. DiskError when it
        cannot be reached."""
        if not disk.size:
            with self._sizing:
                if not disk.size:
                    self._learn_size(disk, self._link.dialler.size_of(disk, self._uri))
        return disk.size

    def _learn_size(self, disk: PrimaryDisk, size: int) -> None:
        if not disk.size:
            former, disk.changes = disk.changes, ChangeMap(None, size)
            former.close()
            disk.size = size
            self._set.record.disks[disk.name] = size

    def _keep_map(self, disk: PrimaryDisk) -> None:
        """An export that only forwards is about to: what the secondary lacks must outlive this process, too, because
        nobody can send it again. Before, there is nothing to keep, and the size may be another one. DiskError."""
        try:
            changes = self._set.state.open_map(disk.name, "changes", disk.size)
        except ConfigError as error:
            raise DiskError(str(error)) from error
        disk.changes.close()
        disk.changes = changes

    # -- commands ------------------------------------------------------------------------------------------

    def start(self, secondary: str | None, sync: str, discard_checkpoint: bool = False) -> None:
        if sync in (*EVERYTHING, *COMPARING) and any(disk.local is None for disk in self.disks):
            raise CommandError(f"Parameter 'sync' does not accept value '{sync}': there is no local disk to send")
        if secondary is not None:
            try:
                check_uri(secondary, len(self.disks))
                secondary = absolute(secondary, self._set.options.folder)
            except ConfigError as error:
                raise CommandError(f"Parameter 'secondary': {error}") from error
        # Before anything else: a node that has no thread left for them must not have begun.
        try:
            self._start_threads()
        except CommandError as error:
            raise CommandError(f"cannot start: {error}") from error
        if not self._link.wait_unattempted(ANSWER_S):
            raise CommandError("cannot start: an attempt to reach the former secondary has not ended yet; try again")
        if not all(disk.forwarder.wait_down(self._set.options.timeout_s) for disk in self.disks):
            raise CommandError("cannot start: what the former link had in flight has not come back yet; try again")
        if sync == "none":
            for disk in self.disks:
                disk.changes.claim()  # what the guest writes while this goes on nobody has called equal
        try:
            agreement = self._link.dialler.dial(secondary or self._uri, sync, None)
        except (DiskError, Refusal) as error:
            for disk in self.disks:
                disk.changes.drop_claim()
            self._learn(error)
            raise _cannot_start(error, self._noted) from error
        record = self._set.record
        former = (record.secondary, record.replaced, record.partner)
        try:
            pause("start.connected")
            self._set.save()  # what cannot be saved shows before the two agree on anything
            # Before the stage is saved: a process killed in between must not forget what is to be sent.
            self._link.dialler.settle(agreement, sync)
            pause("start.settled")
            with self._set.gate.closed(why=START):
                if secondary is not None:
                    record.secondary, record.replaced = secondary, self._set.options.secondary
                record.partner = agreement.node
                for disk, connection in zip(self.disks, agreement.connections, strict=True):
                    self._learn_size(disk, agreement.disk_size(connection))
                    if disk.local is None:
                        self._keep_map(disk)
                self._set.enter(Stage.RUNNING)
                # The start counts as a checkpoint, as it does on the secondary, so that both count alike.
                self._set.state.count_epoch(0.0, agreement.epoch, joins=agreement.running)
                pause("start.entered")
                self._set.faults.clear()
                for disk in self.disks:
                    # Only after the stage is saved: a process killed in between sends some grains for nothing, the
                    # other way round it would forget what it has recorded.
                    if sync == "none":
                        disk.changes.clear_claimed()
                    elif disk.local is None:
                        disk.changes.clear()
        except BaseException as error:
            for disk in self.disks:
                disk.changes.drop_claim()
            record.secondary, record.replaced, record.partner = former
            agreement.close()
            if isinstance(error, DiskError | Refusal):
                self._learn(error)
                raise _cannot_start(error, self._noted) from error
            if isinstance(error, StateError | GateStuck):
                reason = Reason.STORAGE if isinstance(error, StateError) else Reason.BUSY
                raise CommandError(f"{error}{self._noted}", reason=reason) from error
            raise
        self._resync.ask_first(sync == "digest")
        self._link.establish(agreement, begin=True)
        self._link.accepted(agreement)
        failures: list[str] = []
        if discard_checkpoint:
            try:
                self._link.dialler.discard_checkpoint(agreement)
            except (DiskError, PeerError) as error:
                failures.append(f"the secondary's last checkpoint was not given up: {error}")
        if sync == "verify":
            try:
                self._verify.start(None, repair=True)
            except CommandError as error:
                failures.append(f"the disks are not compared: {error}")
        if failures:
            raise CommandError(f"Replication has been started, but {'; '.join(failures)}")

    def _learn(self, error: DiskError | Refusal) -> None:
        """A start that is refused because the other node's content comes from this one's proves that it has gone on.
        One that owns its disks does not: the URI may be a wrong one."""
        if isinstance(error, Refusal) and error.reason is Reason.PEER_NEWER:
            self._set.outdate(Reason.PEER_NEWER, str(error))

    @property
    def _noted(self) -> str:
        """What a start that is refused has to say of what it has changed."""
        noted = self._link.dialler.noted.value
        return f". Replication has not begun, but {noted}" if noted else ""

    def _start_threads(self) -> None:
        """Those that are not there yet; they have nothing to do before there is a link. CommandError."""
        self._resync.start()
        self._watch.start()
        self._link.start()

    def end_threads(self) -> None:
        """A start has failed of a side that is nobody's, and is given up: the disks are another side's."""
        self._resync.stop(_STOP_S)
        self._link.close(_STOP_S)
        self._watch.stop(_STOP_S)

    def checkpoint(self) -> None:
        """With a secondary that takes checkpoints, one of the pair (epochs.py); else a barrier: every write answered
        before it is on the secondary's disk when it returns."""
        if self._set.record.stage is not Stage.RUNNING:
            raise CommandError("Block replication is not running")
        urgency = self._set.gate.urgency
        urgency.run(self._check_in_place, name="look")
        if self._link.agreement is None:
            urgency.run(lambda: self._link.await_connected(self._set.options.timeout_s), name="await-link")
        agreement = self._link.agreement
        if agreement is not None and agreement.peer is None:
            self._plain_checkpoint()
            return
        try:
            self._epochs.checkpoint()
        except Lacking:
            # Something was refused a while ago, or a resync is under way.
            urgency.run(self._await_resync, name="await-resync")
            with self._lacking_explained():
                self._epochs.checkpoint()
        except CommandError as error:
            if agreement is None and any(disk.changes.marked_bytes for disk in self.disks):
                raise CommandError(self._why_incomplete()) from error
            raise
        self._set.faults.clear(lambda fault: fault.case == Case.EMPTYING or self._is_repaired(fault))
        self._watch.checkpoint_taken()

    def _check_in_place(self) -> None:
        """What is in use has not been removed: otherwise the next process would not find it. StateError."""
        self._set.state.check()
        for disk in self.disks:
            try:
                disk.changes.settle()
                if disk.local is not None:
                    disk.local.check_there()
            except DiskError as error:
                self._set.faults.tell(Case.PRIMARY_DISK, disk.name, "checkpoint", 0, disk.size, error)
                raise CommandError(f"no checkpoint of disk '{disk.name}': {error}") from error

    def _is_repaired(self, fault: Fault) -> bool:
        return fault.case in _REPAIRED_BY_RESYNC and all(
            disk.forwarder.up and not disk.changes.missing for disk in self.disks
        )

    @contextmanager
    def _lacking_explained(self) -> Iterator[None]:
        """What the secondary lacks, as the control client is told."""
        try:
            yield
        except Lacking as error:
            raise CommandError(self._why_incomplete()) from error

    def _plain_checkpoint(self) -> None:
        begun = time.monotonic()
        complete = self._barrier()
        if not complete and any(disk.forwarder.up and disk.local is not None for disk in self.disks):
            self._set.gate.urgency.run(self._await_resync, name="await-resync")
            complete = self._barrier()
        if not complete:
            raise CommandError(self._why_incomplete())
        self._set.state.count_epoch(time.monotonic() - begun)
        self._set.faults.clear(self._is_repaired)

    def _await_resync(self) -> None:
        self._resync.complete(_RESYNC_S)

    @property
    def ready(self) -> bool:
        """Whether a checkpoint can be expected to succeed, without waiting for a resync."""
        return self._link.ready and self._epochs.held is None

    def hold(self) -> int:
        """replication-checkpoint with `hold`: the number of the epoch that was cut."""
        if self._set.record.stage is not Stage.RUNNING:
            raise CommandError("Block replication is not running")
        agreement = self._link.agreement
        if agreement is not None and agreement.peer is None:
            raise CommandError("Parameter 'hold' needs a secondary that takes checkpoints, not a plain NBD server")
        with self._lacking_explained():
            return self._epochs.hold()

    def commit(self, epoch: int) -> None:
        """replication-checkpoint-commit."""
        held = self._epochs.held
        try:
            with self._lacking_explained():
                self._epochs.commit(epoch)
        except (CommandError, StateError) as error:
            if held != epoch or isinstance(error, Unknown):
                raise
            reason = error.reason if isinstance(error, CommandError) else Reason.STORAGE
            raise CommandError(f"{error}; epoch {epoch} is aborted, and replication goes on", reason=reason) from error
        self._set.faults.clear(lambda fault: fault.case == Case.EMPTYING)
        self._watch.checkpoint_taken()

    def abort(self, epoch: int) -> None:
        """replication-checkpoint-abort."""
        self._epochs.abort(epoch)

    def verify(self, rate: int | None, repair: bool) -> None:
        """replication-verify: begin to compare the disks with the secondary's."""
        self._verify.start(rate, repair)

    def cancel_verify(self) -> None:
        """replication-verify-cancel."""
        self._verify.cancel()

    def owned_by(self, asked: str, disk: str) -> str | None:
        agreement = self._link.agreement
        if self._set.record.stage is not Stage.RUNNING or agreement is None or agreement.parting:
            return None
        if not asks(asked, agreement.token):
            return None
        for own in self.disks:
            if own.name == disk:
                kept = self._kept_export(own)
                return disk if kept is None else kept
        return None

    def answer_to(self, asked: str) -> str:
        agreement = self._link.agreement
        return answer(agreement.token, boot_id()) if agreement is not None and asks(asked, agreement.token) else ""

    def _kept_export(self, disk: PrimaryDisk) -> str | None:
        """Over which the guest of a promoted secondary goes on; None of another primary."""
        return disk.top_id if self._set.record.promoted else None

    def resize(self, name: str | None, size: int | None) -> list[dict[str, object]]:
        return self._growth.resize(name, size)

    def admit(self, face: str, token: str | None) -> None:
        """Whoever opens it: the target face of a promoted secondary is closed by itself."""

    def discard(self, checkpoint: bool | None) -> None:
        if checkpoint:
            raise CommandError("This is a primary: the last checkpoint is its secondary's, so give it up there")
        raise CommandError(
            "This is a primary: run discard on the node whose changes are to be thrown away, as a secondary",
            reason=Reason.WRONG_MODE,
        )

    def _pass_ended(self) -> None:
        """A pass of the resync has ended."""
        self._link.synchronized()

        def over(fault: Fault) -> bool:
            # The loss of a link ends with the next checkpoint: until then the secondary's is as old as the loss.
            agreement = self._link.agreement
            plain = agreement is not None and agreement.peer is None
            return (plain or fault.case != Case.LINK) and self._is_repaired(fault)

        self._set.faults.clear(over)

    def _barrier(self) -> bool:
        """Wait for all that was answered; whether the secondaries' disks have it."""
        with self._set.gate.closed(why=CHECKPOINT):
            # The gate makes it one instant for all disks; the waiting happens outside.
            barriers = [disk.begin_barrier() for disk in self.disks]
        arrived = [disk.finish_barrier(barrier) for disk, barrier in zip(self.disks, barriers, strict=True)]
        return all(arrived)  # all of them are awaited, whatever the first one says

    def _why_incomplete(self) -> str:
        fault = self._set.faults.fault
        cause = "the link is not up" if fault is None else fault.desc
        if fault is None and all(disk.forwarder.up for disk in self.disks):
            cause = "it is being sent"
        lacking = next((disk for disk in self.disks if disk.changes.marked_bytes), self.disks[0])
        return (
            f"The secondary lacks {lacking.changes.marked_bytes} bytes of disk '{lacking.name}' ({cause}); "
            "a resync is needed"
        )

    def stop(self, lossless: bool = False) -> None:
        assert not lossless  # `check_failover`
        urgency, timeout_s = self._set.gate.urgency, self._set.options.timeout_s
        urgency.run(lambda: self._link.await_settled(timeout_s), name="await-link")
        held = self._epochs.held
        self._epochs.drop()  # first: writes of protocol=sync that wait for the end of a hold are in the gate
        try:
            with self._set.gate.closed(why=STOP):
                whole = not any(disk.changes.missing for disk in self.disks)  # what is on its way is waited for
                self._set.enter(Stage.DONE)
        except (GateStuck, StateError) as error:
            if held is None:
                raise
            raise CommandError(f"{error}; replication goes on, but epoch {held}, which was held, is aborted") from error
        self._link.stop(self._set.options.timeout_s, ANSWER_S, whole)

    def hand_over(self) -> None:
        """Stop as planned, if the secondary has everything and says so within `timeout`; the guest waits so long. If
        not, CommandError, and replication goes on."""
        urgency, timeout_s = self._set.gate.urgency, self._set.options.timeout_s
        urgency.run(lambda: self._link.await_settled(timeout_s), name="await-link")
        if self._epochs.held is not None:
            raise CommandError(f"epoch {self._epochs.held} is held: commit or abort it first", reason=Reason.BUSY)
        try:
            self.settle()  # what takes long, and may fail
        except DiskError as error:
            raise CommandError(f"the disks cannot be flushed: {error}", reason=Reason.STORAGE) from error
        agreement = self._link.agreement
        # Nothing may come between the last word and the stage.
        with self._set.gate.closed(why=STOP), self._link.leaving():
            try:
                self._epochs.hand_over(timeout_s)
            except (CommandError, DiskError, PeerError) as error:
                raise CommandError(str(error), reason=Reason.NOT_LOSSLESS) from error
            pause("side.handed-over")
            try:
                self._set.enter(Stage.DONE)
            except BaseException:
                if agreement is not None:
                    self._link.broken(agreement, DiskError("the secondary was not handed over to"))
                raise
        self._link.stop(0.0, ANSWER_S, False)

    def fail_over(self, haste: Haste) -> None:
        """The secondary gets what arrives in the time."""
        held, cut = self._epochs.held, ""
        self._epochs.drop()
        try:
            try:
                whole = self._leave(haste)
            except GateStuck:
                cut = self.make_way()  # a guest's writes of protocol=sync wait for the secondary inside the gate
                whole = self._leave(haste)
        except (GateStuck, StateError) as error:
            aborted = "" if held is None else f"epoch {held}, which was held, is aborted"
            changed = " and ".join(filter(None, (aborted, cut)))
            if not changed:
                raise
            reason = Reason.STORAGE if isinstance(error, StateError) else Reason.BUSY
            raise CommandError(f"{error}. Replication goes on, but {changed}; try again", reason=reason) from error
        self._link.stop(haste.left_s / 2, haste.left_s / 2, whole, hasty=True)

    def _leave(self, haste: Haste) -> bool:
        with self._set.gate.closed(min(_GATE_S, haste.left_s), STOP):
            whole = not any(disk.changes.missing for disk in self.disks)
            self._set.enter(Stage.DONE, haste)
            return whole

    def make_way(self) -> str:
        """Nobody waits for the secondary any more. If replication goes on, the link comes back by itself."""
        if self._link.agreement is None:
            return ""
        self._link.cut(DiskError("it was given up: this primary is to go on without its secondary"))
        return "the link to the secondary was cut and comes back by itself"

    def retry(self, force: bool) -> None:
        raise AssertionError("a primary is never in stage failover-failed")

    def query_failover(self) -> dict[str, Any]:
        raise CommandError("This is a primary: failover is a matter of its secondary", reason=Reason.WRONG_MODE)

    # -- link ----------------------------------------------------------------------------------------------

    def _forward_failed(self, name: str, entry: Entry, error: DiskError) -> None:
        if entry.kind is Kind.CHECK:
            pass  # it lacks nothing by that
        elif entry.length:
            # Noted before it is told, so that a resync which ends at this moment does not take it for repaired.
            next(disk for disk in self.disks if disk.name == name).changes.mark(entry.offset, entry.length)
            self._link.desynchronized()
        elif any(disk.changes.missing for disk in self.disks):
            self._link.desynchronized()  # a flush has failed, and with it what it was to prove
        self._set.faults.report(Case.FORWARD, name, entry.kind.value, entry.offset, entry.length, error)
        if error.errno != errno.ESHUTDOWN:
            self._resync.request()
        elif self._link.paired:
            # It has failed over, or has another primary: it says so to who tries to pair.
            self._link.lost(None, error)

    def _not_sent(self, disk: PrimaryDisk, operation: str, offset: int, length: int, late: bool) -> None:
        """A guest's request went on without the secondary, although there is a link; `late`: which is too slow."""
        if late:
            why = (
                f"the secondary takes less than is written: the guest has waited for {self._set.options.timeout_s:g} s"
            )
            error = DiskError(f"{why} and goes on without it until it has caught up", errno.ETIMEDOUT)
            self._set.faults.report(Case.FORWARD, disk.name, operation, offset, length, error)
        self._left_behind()

    def _left_behind(self) -> None:
        """A write has found no link, and there is one now: whoever looked for what is missing when it came up may have
        looked before that write was marked."""
        self._link.desynchronized()
        self._resync.now(explicit=False)

    def _left_undefined(self) -> None:
        """The local disk has refused a guest's change, which is marked. What it holds there is read and sent, but not
        at once: a disk that refuses much would else be read as often."""
        self._link.desynchronized()
        self._resync.request()

    def _part(self, agreement: Agreement) -> None:
        """The secondary is about to be stopped as planned."""
        with self._set.commanding():
            if self._link.agreement is agreement and self._set.record.stage is Stage.RUNNING:
                self._epochs.drop()
                self._epochs.part()

    def _unreadable(self, disk: PrimaryDisk, offset: int, length: int, error: DiskError) -> None:
        self._set.faults.report(Case.PRIMARY_DISK, disk.name, "resync", offset, length, error)

    # -- the rest ------------------------------------------------------------------------------------------

    def query(self) -> dict[str, Any]:
        reason, code = self._link.trouble
        link = {"state": self._link.state.value, "secondary": self._uri, "reason": reason}
        return {
            "consistent": True,
            **({"peer-consistent": False} if self._watch.peer_consistent is False else {}),
            "outdated": code in GONE_ON,
            "held-epoch": self._epochs.held,
            "peer-node": self._set.record.partner,
            "link": link if code is None else {**link, "code": code.value},
            **self._verify.query(),
            "disks": [
                {
                    "name": disk.name,
                    "size": disk.size,
                    "forward-queue-bytes": disk.forwarder.queue_bytes,
                    "out-of-sync-bytes": disk.changes.marked_bytes,
                    "missing-bytes": disk.changes.missing_bytes,
                    "marks": -(-disk.changes.marked_bytes // GRAIN),
                    "totals": {
                        "read": disk.bytes_read,
                        "written": disk.bytes_written,
                        "forwarded": disk.forwarder.bytes_forwarded,
                    },
                }
                for disk in self.disks
            ],
        }

    @property
    def in_sync(self) -> bool:
        return self._link.state is LinkState.IN_SYNC

    @property
    def in_step(self) -> bool:
        return not any(disk.changes.marked_bytes for disk in self.disks)

    @property
    def met(self) -> bool:
        return self._link.met

    def query_latency(self) -> dict[str, Any]:
        return {
            "link": [{"disk": disk.name, "answers": disk.forwarder.answers.to_json()} for disk in self.disks],
            "peer": self._watch.peer_latency if self._link.paired else None,
        }

    def configure(self) -> None:
        self._budget.resize(self._set.options.queue_limit)
        self._resync.limit(self._set.options.resync_rate)

    @property
    def bytes_served(self) -> int:
        return sum(disk.bytes_read + disk.bytes_written for disk in self.disks)

    def faces(self) -> dict[str, Face]:
        shown = {}
        for disk in self.disks:
            what = GUEST_DISK if disk.local is not None else GUEST_WRITES
            face = Face(what, partial(self.size_of, disk), disk.read, disk.write, disk.zero, disk.flush, disk.extents)
            kept = self._kept_export(disk)
            if kept is not None:
                # The other one stays closed: the old primary knows it.
                shown[kept] = face
                shown[disk.name] = closed_face(disk.name, disk.size)
            else:
                shown[disk.name] = face
        return shown

    @property
    def default(self) -> str:
        return self.disks[0].name if self._kept_export(self.disks[0]) is None else ""

    def settle(self) -> None:
        for disk in self.disks:
            disk.settle()

    def close(self, wait_s: float | None = None) -> bool:
        deadline = time.monotonic() + _STOP_S
        self._epochs.drop()
        self._verify.close(_VERIFY_STOP_S)
        self._finish()
        self._resync.stop(max(0.0, deadline - time.monotonic()))
        self._link.close(max(0.0, deadline - time.monotonic()))
        self._watch.stop(max(0.0, deadline - time.monotonic()))
        try:
            self.settle()
            for disk in self.disks:
                disk.changes.flush()
            if wait_s is None:
                if self._set.record.stage is not Stage.NONE:
                    self._set.record.clean = True
                    self._set.save()
                self._set.state.closed_well()
        except (DiskError, StateError) as error:
            log(f"not everything is on stable storage: {error}")
        self._let_go()
        return True

    def _finish(self) -> None:
        """Have the secondary know that it has everything, if that takes a moment only: the link has just come back, or
        little is missing. Left in the midst of it, the secondary would take no checkpoint, and refuse a planned stop,
        until this node is there again. That costs no write: what it lacks is in the change map."""
        until = time.monotonic() + _FINISH_S
        self._link.await_settled(_FINISH_S, last=True)
        if self._link.paired and sum(disk.changes.missing_bytes for disk in self.disks) <= _FINISH_MAX:
            self._resync.finish(max(0.0, until - time.monotonic()))

    def _let_go(self) -> None:
        for disk in self.disks:
            disk.close()


def _cannot_start(error: DiskError | Refusal, noted: str) -> CommandError:
    reason = error.reason if isinstance(error, Refusal) else Reason.PEER_UNREACHABLE
    return CommandError(f"cannot start: {error}{noted}", reason=reason)
