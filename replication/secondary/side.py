# SPDX-License-Identifier: BSD-3-Clause
"""The secondary half: all its disks, their overlays, checkpoint, planned stop and failover."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from replication.conditions import Conditions, Outlook
from replication.disk.face import Disk
from replication.disk.file import FileDisk
from replication.disk.open import open_disk
from replication.disk.unflushed import GRAIN
from replication.errors import CommandError, ConfigError, DiskError
from replication.fault import Case
from replication.image.layer import LayerError
from replication.image.shortage import Shortage
from replication.log import log
from replication.options import DATA_EXPORT, DIGEST_EXPORT, DiskOptions, Durability
from replication.order.gate import GateStuck
from replication.order.latency import CHECKPOINT, FAILOVER, PAIRING, START, STOP
from replication.order.pause import pause
from replication.order.urgency import Haste, Overdue
from replication.order.worker import NO_THREAD
from replication.reason import Reason
from replication.record.binding import Doubts
from replication.record.lineage import new_id
from replication.record.outdated import refusal
from replication.record.state import StateError
from replication.secondary.backup import RUNNING, Backup
from replication.secondary.disk import SecondaryDisk, elsewhere_face
from replication.secondary.failover import Failover, forceful
from replication.secondary.fill import FillWatch
from replication.secondary.growth import Growth
from replication.secondary.hindrance import Hindrance
from replication.secondary.images import Found, open_images
from replication.secondary.pairing import NOBODYS, Pairing
from replication.secondary.reclaim import Reclaimer
from replication.secondary.rehearsals import Rehearsals
from replication.side import Face, Setting, Side
from replication.sizes import SIZE_MAX, outcome, room_of, served, wanted
from replication.stage import Mode, Stage

_FAILOVER_S = 0.5
"""Longest wait of a failover for the requests in flight; with the wait for another command it answers within 2 s."""

_LOOK_S = 0.5
"""Longest wait of a query for the storage of the overlays."""

GIVEN_UP = "the last checkpoint was given up for a resync"
BACKUP_CANCELLED = "Backup job was cancelled unexpectedly"

_CLOSE_S = 3.0
"""Longest wait, at the end of the process, for its threads (a commit copies 1 MiB between two looks) and for the disks
to be flushed."""


class SecondarySide(Side):
    """All disks of a secondary."""

    mode = Mode.SECONDARY

    def __init__(self, setting: Setting) -> None:
        self._set = setting
        self.disks: list[SecondaryDisk] = []
        self._targets: frozenset[str] = frozenset()
        # Why `start` is refused, by disk name: images that a former start would have refused, too.
        self._refusals: dict[str, str] = {}
        self._backup = Backup(setting, self.disks)
        self._unflushed = False
        # Why everything counts as lost, where the map of that is not believed.
        self._doubt: str | None = None
        self._reclaimer = Reclaimer(setting.gate, lambda: setting.record.stage)
        self._failover = Failover(setting, self.disks, self._reclaimer.wake)
        # The stage is failover and the old primary kept out, but requests that had begun before are still inside the
        # gate: until they have left, the guest's requests do what they do in stage running.
        self._draining = False
        self._ledger = setting.ledger
        self.pairing = Pairing(setting, setting.ancestry, self.disks)
        self._hindrance = Hindrance(self._try_checkpoint)
        self.rehearsals = Rehearsals(setting, self.disks)
        self._growth = Growth(setting, self.disks, self.rehearsals, self._checkpoint_lost)
        self._fill: FillWatch | None = None
        # Held by who looks at the overlays, across that, and what was found last.
        self._looking = threading.Lock()
        self._seen: str | None = None

    # -- opening -------------------------------------------------------------------------------------------

    def open(self) -> None:
        record, state = self._set.record, self._set.state
        try:
            self._open_disks()
            if record.stage is Stage.DONE:
                for disk in self.disks:
                    self._open_maps(disk)
                    disk.lost.clear()  # the failover has marked it in the change map, a planned stop had nothing
                self._note_doubts_of_owner(state.take_doubts())
            else:
                # The maps after the images: a start that is refused because of an image has made none.
                found = open_images(self.disks, self._set.options, record, self._open_maps)
                self._refusals = found.refusals
                self._note_restart(self._with_doubts(found, state.take_doubts()))
            self._claim_own_writes()
            if record.cut_off:
                self._note_cut()
        except BaseException:
            self._let_go()
            raise
        # What a checkpoint has left behind in one disk's overlays is room for another's.
        rooms = [disk.stack.room for disk in self.disks if disk.stack is not None]
        shortage = Shortage([source for room in rooms for source in room.sources])
        for disk in self.disks:
            disk.backup_failed = self._copy_failed
            disk.repaired = self._backup.repaired
            disk.checkpoint_lost = self._checkpoint_lost
            disk.from_stranger = self.pairing.has_stranger
            if disk.stack is not None:
                disk.stack.room.shortage = shortage
                disk.stack.attend(self._set.gate.latency)
        stacks = [(disk.name, disk.stack) for disk in self.disks if disk.stack is not None]
        self._fill = FillWatch(stacks, self._set.options.overlay_watermark, self._set.hub)
        self.rehearsals.attend()
        if self._set.options.durability is Durability.POWER:
            self._settle_images()
        if state.emptying:
            # A process was killed in the midst of a checkpoint (or a planned stop): it counts as taken.
            try:
                failure = self._empty_all()
            except CommandError as error:
                failure = error
            if failure is not None:
                self._let_go()
                raise ConfigError(str(failure)) from failure
        if record.stage is Stage.RUNNING:
            self._backup.begin()

    def _claim_own_writes(self) -> None:
        """An owner that never was part of a pair comes back as a secondary: what it has written is no other node's, so
        its disks are not equal to those of a new primary, and nobody has allowed that they are overwritten."""
        ancestry = self._set.ancestry
        known = ancestry.lineage.current or ancestry.lineage.incoming
        if self._set.record.stage is Stage.NONE and not known and any(disk.changes.marked_bytes for disk in self.disks):
            ancestry.note(lambda lineage: lineage.diverged(new_id()))  # the same again, should nobody save it

    def _note_cut(self) -> None:
        """The host was restarted, and what was not synced is gone: of the maps, and, of what a primary has offered that
        it wrote in stage none, of the disks. (open_images has looked after the other stages.)"""
        record = self._set.record
        offered, record.offered = record.offered, None
        for disk in self.disks:
            disk.changes.mark_all()
            if record.stage is Stage.NONE and offered is not None:
                disk.lost.mark_all()

    def _settle_images(self) -> None:
        """A process that was killed in this boot may have left in memory what counts as stable from here on."""
        record = self._set.record
        changed = record.durability != Durability.POWER.value
        if record.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED) and not changed:
            return  # what a commit has let go of may be published only after the disk was flushed; its end does both
        try:
            for disk in self.disks:
                if disk.stack is not None:
                    disk.stack.settle(disk=changed)
        except DiskError as error:
            self._let_go()
            raise ConfigError(str(error)) from error

    def _open_disks(self) -> None:
        record = self._set.record
        located: list[tuple[DiskOptions, Disk]] = []
        try:
            for options in self._set.options.disks:
                assert options.location is not None
                located.append((options, open_disk(options.name, options.location, self._set.options.tls)))
            sizes = {options.name: disk.size for options, disk in located}
            record.disks = sizes = served(self._set.options.state, record.disks, sizes)
            for options, disk in located:
                disk.size = sizes[options.name]
                assert options.top_id is not None
                secondary_disk = SecondaryDisk(options.name, options.top_id, disk, self._set.faults, self._set.ancestry)
                # With what a former process was offered goes what somebody else may have written to it since.
                secondary_disk.strange = record.offered is not None
                self.disks.append(secondary_disk)
            self._targets = frozenset(sizes)
        except BaseException:
            for _, disk in located[len(self.disks) :]:
                disk.close()
            raise

    def _open_maps(self, disk: SecondaryDisk) -> None:
        disk.open_maps(lambda kind: self._set.state.open_map(disk.name, kind, disk.size))
        disk.watch(self._set.state.account_of(disk.name, disk.size))

    def _note_doubts_of_owner(self, doubts: Doubts) -> None:
        """Files of the state folder are not believed, so everything may differ. Nobody knows either whether the guest
        has written since the nodes parted, so it is taken for that."""
        for disk in self.disks:
            if doubts.of(disk.name, "unflushed") is not None:
                disk.changes.mark_all()
        if self._set.ancestry.shared and any(doubts.of(disk.name, "unflushed") for disk in self.disks):
            self._set.ancestry.note(lambda lineage: lineage.moved(new_id()))

    def _with_doubts(self, found: Found, doubts: Doubts) -> Found:
        """What a restart has left, where files of the state folder are not believed: no valid checkpoint without the
        record, the epoch, or the account of what is unflushed; without the map of what is lost all may be."""
        wrong = [why for disk in self.disks if (why := doubts.of(disk.name, "unflushed")) is not None]
        if wrong:
            self._set.record.offered = None
        if doubts.record and any(disk.changes.marked_bytes for disk in self.disks):
            # Writes of its own, which the record may not know of: nobody has allowed that they are overwritten.
            self._set.ancestry.note(lambda lineage: lineage.diverged(new_id()))
        if wrong and self._set.record.stage is Stage.NONE:
            for disk in self.disks:
                disk.lost.mark_all()
        elif wrong:
            found = found._replace(lost=found.lost or wrong[0])
        self._doubt = next((why for disk in self.disks if (why := doubts.of(disk.name, "lost")) is not None), None)
        return found

    def _note_restart(self, found: Found) -> None:
        """What a restart of the host has done to a checkpoint outlives this process, too."""
        record = self._set.record
        if found.lost is not None:
            record.inconsistent = found.lost
            record.backup = RUNNING
            if record.stage is Stage.FAILOVER:
                # Nobody may see what the commit would leave behind, unless a person says so.
                record.stage = Stage.FAILOVER_FAILED
        if found.lost is not None or found.unflushed:
            for disk in self.disks:
                disk.lost.mark_all()
        self._unflushed = found.unflushed

    def launch(self) -> None:
        record = self._set.record
        if record.inconsistent is not None and self._set.faults.fault is None:
            case = Case.COPY_BEFORE_WRITE if record.stage is Stage.RUNNING else Case.COMMIT
            self._report_restart(case, f"the last checkpoint is lost: {record.inconsistent}")
        if self._unflushed:
            why = "the host was restarted: what the primary wrote after the last flush may be missing"
            self._report_restart(Case.SECONDARY_DISK, why)
        if self._doubt is not None and record.stage is Stage.RUNNING and not self._unflushed:
            self._report_restart(Case.SECONDARY_DISK, f"{self._doubt}: the primary has to send everything again")
        for disk in self.disks:
            disk.lose_former()
        if record.stage is Stage.FAILOVER and record.inconsistent is not None:
            self._failover.fail(record.inconsistent)
        elif record.stage is Stage.FAILOVER:
            self._failover.begin()
        self._reclaimer.start([disk.stack for disk in self.disks if disk.stack is not None])

    def _report_restart(self, case: Case, why: str) -> None:
        for disk in self.disks:
            self._set.faults.report(case, disk.name, "open", 0, disk.size, DiskError(why))

    def _checkpoint_lost(self, why: str) -> bool:
        """A disk has lost something of the last checkpoint, which no face shows any more from this moment on; whether
        the next process knows that, too. Called from requests, so without the gate."""
        record = self._set.record
        record.inconsistent = record.inconsistent or why
        for disk in self.disks:
            disk.inconsistent = record.inconsistent
        try:
            self._set.save()
        except StateError as error:
            log(f"the last checkpoint is lost ({why}), and the next process would not know: {error}")
            return False
        return True

    def look(self) -> None:
        self.rehearsals.look()
        for disk in self.disks:
            disk.look()

    def show_stage(self, stage: Stage) -> None:
        if stage is not Stage.RUNNING:
            # Before a request follows the stage: none of them keeps anything for a test.
            self.rehearsals.end_all(f"the stage is {stage.value}")
        for disk in self.disks:
            disk.fenced = stage not in (Stage.NONE, Stage.RUNNING)
            if self._draining:
                continue
            disk.stage = stage
            disk.inconsistent = self._set.record.inconsistent
            disk.accepts_writes = self._backup.accepts_writes
            if disk.stack is not None:
                disk.stack.committing = stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED)
                disk.stack.target.preserving = disk.inconsistent is None
                disk.stack.target.preserved_to = self._set.record.former_disks.get(disk.name, disk.size)

    # -- commands ------------------------------------------------------------------------------------------

    def start(self, secondary: str | None, sync: str, discard_checkpoint: bool = False) -> None:
        if secondary is not None:
            raise CommandError("Parameter 'secondary' is for the primary; this is a secondary")
        if self._set.record.stage is Stage.DONE:
            raise CommandError("Block replication is running or done")
        if discard_checkpoint:
            raise CommandError("Parameter 'discard-checkpoint' is for the primary; this is a secondary")
        if sync in ("full", "digest", "verify"):
            raise CommandError("Parameter 'sync' is for the primary; this is a secondary")
        self._check_start()
        self._start(0)

    def _check_start(self) -> None:
        for disk in self.disks:
            refusal = self._refusals.get(disk.name)
            if refusal is not None and "length" not in refusal and "make_empty" not in refusal:
                raise CommandError(refusal)
            if not disk.disk.reachable():
                raise CommandError("The secondary disk doesn't have block backend")
            if refusal is not None:
                raise CommandError(refusal)
            if disk.top_id == disk.name:
                raise CommandError("No top_bs or it is invalid")

    def _start(self, number: int, led: bool = False) -> None:
        """The first checkpoint. `number`: the primary's for it, `led`: who has asked for it."""
        self._prepare_emptying()
        record = self._set.record
        former = (record.backup, record.led)
        self._set.save()  # what cannot be saved shows before the overlays are emptied
        try:
            self._start_alone(number, led)
        except BaseException:
            record.backup, record.led = former
            raise
        self._hindrance.over()
        self._backup.begin()
        self._reclaimer.wake()

    def _start_alone(self, number: int, led: bool) -> None:
        """With the gate closed. The save of the stage is the point of no return."""
        with self._set.gate.closed(why=START):
            self._set.record.backup = RUNNING
            lacking = next((disk.name for disk in self.disks if disk.lost.missing), None)
            if lacking is not None and led:
                raise CommandError(f"The secondary disk '{lacking}' has lost something of the first copy")
            # Empty before the stage is saved: what the overlays hold in stage none is of no use, but a process killed
            # in between must not come back as running with it.
            failure = self._empty_all(number)
            if failure is not None:
                raise failure
            pause("start.emptied")
            self._set.record.led = led
            # What a resync has not completed is no state of any disk, so there is nothing to keep.
            lost = None if lacking is None else f"disk '{lacking}' has lost something that was written before the start"
            try:
                self._enter_with(Stage.RUNNING, self.pairing.incomplete or lost)
            except StateError as error:
                raise CommandError(
                    f"{error}. Replication has not begun, but the overlays, which nobody could see, are empty, and the "
                    "number of an epoch is used up",
                    reason=Reason.STORAGE,
                ) from error

    def checkpoint(self) -> None:
        if self._set.record.stage is not Stage.RUNNING:
            raise CommandError(BACKUP_CANCELLED)
        self._checkpoint(0)

    def checkpoint_of_primary(self, token: str, number: int) -> None:
        """As its primary asks for it, in stage none as well; `number` is that of its epoch. CommandError."""
        self.pairing.check_token(token)
        stage = self._set.record.stage
        if stage is Stage.NONE:
            if self.pairing.incomplete is not None:
                raise CommandError(self._why_incomplete())
            self._check_start()
            with self._noting_refusal():
                self._start(number, led=True)
        elif stage is Stage.RUNNING:
            self._checkpoint(number)
        else:
            raise CommandError(NOBODYS, reason=Reason.NOT_SECONDARY)

    def prepare_checkpoint(self, token: str) -> None:
        """The primary is about to cut an epoch: what takes time is done before, while it forwards."""
        self.pairing.check_token(token)
        if self._set.record.stage is Stage.RUNNING:
            with self._noting_refusal():
                self._prepare_emptying()

    def _checkpoint(self, number: int) -> None:
        self._check_complete()
        with self._noting_refusal():
            self._prepare_emptying()
            if self._set.options.durability is Durability.POWER:
                # The epoch is made stable with the gate closed, which no failover can end. A state folder that does not
                # answer shows here, where both the failover and the guest go on.
                self._set.save()
            with self._set.gate.closed(why=CHECKPOINT):
                # Again: a target write may have failed since.
                self._check_complete()
                failure = self._empty_settled(number)
        if failure is not None:
            # It is taken on all disks, and the answer must say so: whoever keeps VM states would else pair the former
            # one with these disks. get-error and the next checkpoint tell the rest.
            log(f"the checkpoint is complete nevertheless: {failure}")
        self._hindrance.over()
        if self._set.faults.fault is not None:
            self._backup.repaired()  # a flush, say, that failed with nothing to lose
        self._reclaimer.wake()

    @contextmanager
    def _noting_refusal(self) -> Iterator[None]:
        """A checkpoint, or a part of one. What the primary has to send first is no hindrance of ours."""
        try:
            yield
        except (CommandError, StateError, GateStuck) as error:
            if self.pairing.incomplete is None and not any(disk.lost.missing for disk in self.disks):
                self._hindrance.note(str(error))
            raise

    def _try_checkpoint(self) -> None:
        """What a checkpoint needs, without taking one; ReplicationError."""
        for disk in self.disks:
            if (stack := disk.stack) is not None:
                stack.check_images()
        self._set.save()

    @property
    def obstacle(self) -> str | None:
        """Why a checkpoint would be refused although the primary has sent everything, None if nothing is known to
        be in its way."""
        if self._set.record.stage is Stage.NONE:
            refusal = next(iter(self._refusals.values()), None)
            named_alike = any(disk.top_id == disk.name for disk in self.disks)
            return refusal or ("No top_bs or it is invalid" if named_alike else self._hindrance.why)
        if self._set.record.stage is not Stage.RUNNING:
            return None  # the stage says it
        if not self._backup.accepts_writes:
            return f"{BACKUP_CANCELLED} ({self._set.record.backup})"
        if self._backup.blocked:
            fault = self._set.faults.fault
            why = "see the log" if fault is None else fault.desc
            return (
                f"what the primary overwrites cannot be preserved ({why}): make room for the hidden disk, or give the "
                "last checkpoint up with `replctl discard --checkpoint` on the secondary"
            )
        return self._hindrance.why or self._damage()

    def _damage(self) -> str | None:
        """What has become of an overlay since it was opened. Whoever asks for the status does not wait for a storage
        that hangs, nor have two look at once: the second one gets what was found last."""
        if not self._looking.acquire(blocking=False):
            return self._seen

        era = self._growth.era

        def look() -> None:
            try:
                for disk in self.disks:
                    if (stack := disk.stack) is not None:
                        stack.check_images()
                self._seen = None
            except (DiskError, OSError) as error:  # OSError: another side has just taken the disks
                if era % 2 == 0 and era == self._growth.era:
                    self._seen = str(error)
            finally:
                self._looking.release()

        try:
            self._set.gate.urgency.run(look, _LOOK_S, yields=False, name="look")
        except Overdue as error:
            self._seen = f"the storage of the overlays: {error}"
        return self._seen

    def _check_complete(self) -> None:
        """CommandError when the disks are not what the primary has written."""
        if self.pairing.incomplete is not None:
            raise CommandError(self._why_incomplete())
        inconsistent = self._set.record.inconsistent
        if inconsistent is not None and any(disk.lost.missing for disk in self.disks):
            raise CommandError(
                f"The last checkpoint is lost ({inconsistent}): a full resync from the primary is needed"
            )
        if not self._backup.running:
            raise CommandError(BACKUP_CANCELLED)
        for disk in self.disks:
            if disk.lost.missing:
                fault = self._set.faults.fault
                raise CommandError(
                    f"The secondary disk of '{disk.name}' lacks a write of the primary "
                    f"({'see query-replication' if fault is None else fault.desc}); "
                    "the last checkpoint stays valid until a resync"
                )

    def _why_incomplete(self) -> str:
        inconsistent = self._set.record.inconsistent
        why = f"The secondary lacks something of its primary's ({self.pairing.incomplete}): "
        if inconsistent is not None:
            return f"{why}there is no valid checkpoint before a full resync ({inconsistent})"
        return f"{why}the last checkpoint stays valid"

    def _empty_settled(self, number: int) -> CommandError | None:
        """`_empty_all`, and what else a checkpoint means after a resync: it is of the primary's generation, and, if
        there was none, there is a valid one again. All of it at one instant (ledger.py). The gate is closed."""
        former, adoption = self._set.record.inconsistent, self.pairing.adoption
        resynchronised = self.pairing.resynchronised
        promised = former is not None or adoption is not None
        if promised:
            self._ledger.promise(self._set.state.next_epoch(number), adoption, resynchronised)
        try:
            failure = self._empty_all(number)
        except BaseException:
            if promised:
                self._ledger.withdraw()
            raise
        if promised:
            self._ledger.fulfil(adoption)
        elif resynchronised and self._set.record.outdated is not None:
            self._set.record.outdated = None
            with suppress(StateError):  # it comes along with what is saved next; else it is outdated until then
                self._set.save()
        if adoption is not None:
            self.pairing.adopted()
        if former is not None:
            self._set.show()
            self._backup.repaired()  # what a restart has reported of it is over as well
            self._backup.begin()
        lacking = next((disk.name for disk in self.disks if disk.lost.missing), None)
        if lacking is not None:  # the disk has lost something since the last look at that, above
            self._checkpoint_lost(f"disk '{lacking}' has lost something while the checkpoint was taken")
        return failure

    def prepare_stop(self) -> None:
        """What would refuse a planned stop refuses it here, before the primary is asked to end its stream. CommandError
        or StateError."""
        self._check_complete()
        self._check_current()
        self._prepare_emptying(flush=True)
        self._set.save()

    def _check_current(self) -> None:
        """CommandError when a planned stop would make the owner of a node that another one has left behind."""
        outdated = self._set.record.outdated
        if outdated is not None and not self.pairing.resynchronised:
            raise CommandError(refusal("This stop", outdated), reason=Reason.OUTDATED)

    def stop(self, lossless: bool = False) -> None:
        self._check_complete()
        self._check_current()
        self._prepare_emptying(flush=True)
        pause("stop.prepared")
        with self._set.gate.closed(why=STOP):
            self._check_complete()
            if lossless:  # again: the guest may have written here while the disks were flushed
                self.outlook.check(Conditions(lossless=True))
            for disk in self.disks:
                self._flush_disk(disk)
            # The stage first: in done nobody looks at the overlays any more, so a process killed in between has
            # dropped them all the same, and one that cannot save the stage has dropped nothing.
            # What this node has changed by itself stays marked, unless this adopts what the primary has sent instead.
            self._enter_with(Stage.DONE, None)
            pause("stop.entered")
            try:
                failure = self._empty_all()
            except CommandError as error:
                failure = error
            if failure is not None:
                log(f"the stage is done nevertheless: {failure}")
        self._backup.conclude(None)
        self._reclaimer.wake()

    def check_unleased(self, force: bool, conditions: Conditions | None) -> None:
        """What refuses a failover, but for the lease of the primary: who is told of that alone, and says force, must
        not go over something else. CommandError."""
        if conditions is not None and self.check_failover(conditions):
            self._check_complete()
            self._check_current()
        else:
            self._check_force(force)

    def _check_force(self, force: bool) -> None:
        inconsistent, outdated = self._set.record.inconsistent, self._set.record.outdated
        if inconsistent is not None and not force:
            raise CommandError(f"Failover is refused: {forceful(inconsistent)}", reason=Reason.NO_CHECKPOINT)
        if outdated is not None and not force:
            raise CommandError(refusal("Failover", outdated), reason=Reason.OUTDATED)

    def fail_over(self, haste: Haste) -> None:
        self._check_force(haste.force)
        record = self._set.record
        outdated = record.outdated
        if haste.force:
            record.outdated = None  # what is here counts from now on
        try:
            self._fail_over(haste)
        except BaseException:
            record.outdated = outdated
            raise

    def check_failover(self, conditions: Conditions) -> bool:
        self.outlook.check(conditions)
        return conditions.lossless and self.outlook.by_stop

    @property
    def outlook(self) -> Outlook:
        """What a failover would cost."""
        stacks = [disk.stack for disk in self.disks if disk.stack is not None]
        return Outlook(
            self.in_step,
            self._set.record.left_well,
            self._set.state.checkpoint["age"],
            sum(stack.active.bytes_held for stack in stacks),
            sum(stack.hidden.bytes_held for stack in stacks),
            self.pairing.live_primary,
        )

    def _fail_over(self, haste: Haste) -> None:
        if self._set.record.inconsistent is not None:
            self._fail_over_without(self._set.record.inconsistent, haste)
            return
        try:
            with self._set.gate.closed(min(_FAILOVER_S, haste.left_s), FAILOVER):
                self._enter_failover(haste._replace(force=False))
        except GateStuck as stuck:
            self._fail_over_around(str(stuck), haste)
            return
        except StateError as error:
            if not haste.force:
                raise
            self._fail_over_around(str(error), haste)
            return
        self._entered(haste)

    def _entered(self, haste: Haste) -> None:
        """In stage failover, with nothing in the way of the commit."""
        try:
            self._backup.conclude(None)
            pause("failover.entered")
        finally:
            # What it notes in the maps may have to wait for their storage.
            with suppress(Overdue):
                self._set.gate.urgency.run(self._failover.begin, haste.left_s, yields=False, name="begin")

    def _enter_failover(self, haste: Haste) -> bool:
        # Before the lineage forgets it. True whether this comes to be or not: the copy has begun.
        record = self._set.record
        record.received |= bool(self._set.ancestry.lineage.incoming)
        left_well = record.left_well
        if self._set.options.follow_owner:
            self.goes_back = self._draining or record.inconsistent is not None or self._loses()
            # What its primary has left may not be what is here from now on (Node._handed_over).
            record.left_well = left_well and not self.goes_back
        take_back = self._set.ancestry.note(lambda lineage: lineage.diverged(new_id()))
        try:
            return self._enter(Stage.FAILOVER, None, take_back, haste)
        except BaseException:
            record.left_well = left_well
            raise

    def _loses(self) -> bool:
        outlook = self.outlook
        return not outlook.lossless or outlook.by_stop

    def _fail_over_without(self, inconsistent: str, haste: Haste) -> None:
        """Without a checkpoint: the disks are taken as they are. What the guest sees from then on is another content,
        so its requests must be out."""
        if not haste.force:
            raise CommandError(f"Failover is refused: {forceful(inconsistent)}", reason=Reason.NO_CHECKPOINT)
        deciding = threading.Lock()
        given_up = emptied = False
        with ExitStack() as alone:

            def empty() -> None:
                nonlocal emptied
                with ExitStack() as closing:
                    closing.enter_context(self._set.gate.closed(min(_FAILOVER_S, haste.left_s), FAILOVER))
                    self._set.save()  # what cannot be saved shows before anything is emptied
                    emptied = True
                    if self._empty_all() is not None:
                        raise CommandError(
                            f"Failover is not possible: {inconsistent}, and the overlays cannot be emptied"
                        )
                    for disk in self.disks:
                        disk.changes.mark_all()
                    with deciding:
                        if not given_up:
                            alone.push(closing.pop_all())

            try:
                self._set.gate.urgency.run(empty, haste.left_s, yields=False, name="empty")
                self._enter_failover(haste._replace(force=False))
            except StateError as error:
                if not emptied:
                    raise
                raise CommandError(
                    f"{error}. Replication goes on, but the overlays, which nobody could see without a checkpoint, are "
                    "empty, and the primary sends everything when it connects next. Try again when the storage of the "
                    "state folder answers",
                    reason=Reason.STORAGE,
                ) from error
            except Overdue as error:
                raise CommandError(f"Failover is not possible: emptying the overlays: {error}; try again") from error
            finally:
                with deciding:
                    given_up = True
        self._entered(haste)

    def _fail_over_around(self, why: str, haste: Haste) -> None:
        """Fail over although some requests do not end, because their disk is slow or hangs, or (force) although that
        cannot be saved. The old primary is kept out at once; what was in flight of it goes on as in stage running, so
        what it overwrites is preserved, and the guest's writes go to active. When these requests have left, and the
        stage is saved, the commit begins: a process that ends before finds everything as in stage running."""
        begin = self._failover.prepare_drained(self._drained)
        self._draining = True
        saved = False
        try:
            for disk in self.disks:
                disk.fenced = True
            saved = self._enter_failover(haste)
        except BaseException:
            begin(False, False)
            self._draining = False
            self.show_stage(self._set.record.stage)
            raise
        try:
            log(f"failover: {why}; the commit begins when {'they have' if saved else 'that is over'}")
            self._backup.conclude(None)
            pause("failover.entered")
        finally:
            begin(True, saved)

    def _drained(self) -> None:
        """All requests that had begun before the failover have left. The gate is closed."""
        self._draining = False
        self._set.show()

    def retry(self, force: bool) -> None:
        inconsistent = self._set.record.inconsistent
        if inconsistent is not None and not force:
            # Not from the primary: the guest has gone on here since.
            raise CommandError(
                f"The commit cannot go on: there is no valid checkpoint ({inconsistent}); use force to take the disks "
                "as they are, with what is left of what the guest has written here since the failover",
                reason=Reason.NO_CHECKPOINT,
            )
        with self._set.gate.closed(why=FAILOVER):
            self._enter(Stage.FAILOVER, None)
        self._failover.begin()

    def _enter_with(self, stage: Stage, inconsistent: str | None) -> None:
        """Enter a stage in which the disks count as the primary has offered them; `inconsistent`: or why not."""
        resynchronised = inconsistent is None and self.pairing.resynchronised
        take_back = self.pairing.adopt() if inconsistent is None else None
        adopted = take_back is not None
        if take_back is None and stage is Stage.DONE:
            take_back = self._set.ancestry.note(lambda lineage: lineage.kept())
        outdated = self._set.record.outdated
        if resynchronised:
            self._set.record.outdated = None
        try:
            self._enter(stage, inconsistent, take_back)
        except BaseException:
            self._set.record.outdated = outdated
            raise
        if adopted:
            self.pairing.adopted()

    def _enter(
        self,
        stage: Stage,
        inconsistent: str | None,
        take_back: Callable[[], None] | None = None,
        haste: Haste | None = None,
    ) -> bool:
        """Enter a stage, with why there is no valid checkpoint; if that fails, `take_back` what was noted for it.
        Whether it is saved."""
        record = self._set.record
        if stage is not Stage.RUNNING:
            # This node's own from here on. A primary that has not grown yet has nothing marked behind its end.
            for disk in self.disks:
                ended = record.former_disks.get(disk.name, disk.size)
                if ended < disk.size:
                    disk.changes.mark(ended, disk.size - ended)
        former, record.inconsistent = record.inconsistent, inconsistent
        try:
            return self._set.enter(stage, haste)
        except BaseException:
            record.inconsistent = former
            if take_back is not None:
                take_back()
            raise

    def discard(self, checkpoint: bool | None) -> None:
        # While a primary is connected there is nothing else to be given up; and nobody need look up the argument when
        # it is the checkpoint alone that keeps a resync from going on. Who gives it means what it says.
        implied = checkpoint is None and self.pairing.primary is not None and self._backup.blocked
        if checkpoint or implied:
            self._discard_checkpoint()
            return
        if self._set.record.stage not in (Stage.NONE, Stage.RUNNING):
            raise CommandError(
                f"This node is the owner of its disks (stage {self._set.record.stage.value}): "
                "make it a secondary first",
                reason=Reason.WRONG_STAGE,
            )
        self.pairing.discard()

    def discard_checkpoint_of(self, token: str) -> None:
        """As `discard`, for a person at the primary. CommandError."""
        self.pairing.check_token(token)
        if self._set.record.stage is Stage.RUNNING:
            self._discard_checkpoint()

    def _discard_checkpoint(self) -> None:
        """Until the next checkpoint there is none, so nothing is preserved: a resync that is larger than hidden, or
        sends everything, goes on at full speed."""
        record = self._set.record
        if record.stage is not Stage.RUNNING:
            raise CommandError(f"There is no checkpoint to give up: the stage is {record.stage.value}")
        if self.pairing.primary is None:
            raise CommandError("The last checkpoint is not given up while no primary is connected: it is all there is")
        if record.inconsistent is not None:
            return
        if self.pairing.incomplete is None and self._backup.running:
            raise CommandError("The last checkpoint is not given up: the secondary lacks nothing that has to be sent")
        with self._set.gate.closed(why=PAIRING):
            former, record.inconsistent = (record.inconsistent, record.backup), GIVEN_UP
            self._backup.dispense()
            try:
                self._set.save()
            except BaseException:
                record.inconsistent, record.backup = former
                raise
            self._backup.conclude(None)
            for disk in self.disks:
                if disk.stack is not None and not disk.stack.power:
                    disk.stack.empty()  # gives its space back; what is in it counts no longer
            self._set.show()
        self._reclaimer.wake()

    def face_of(self, export: str) -> tuple[str, str | None]:
        prefix, _, rest = export.partition(":")
        token, colon, name = rest.partition(":")
        if prefix in (DATA_EXPORT, DIGEST_EXPORT) and colon and name in self._targets:
            return name, token
        return export, None

    def resize(self, name: str | None, size: int | None) -> list[dict[str, object]]:
        primary = self.pairing.primary
        if self._set.record.stage in (Stage.NONE, Stage.RUNNING) and primary is not None:
            raise CommandError(
                f"A primary is connected (node {primary}): resize there, which grows both, this disk first",
                reason=Reason.WRONG_MODE,
            )
        asked = wanted({disk.name: (disk.size, disk.disk) for disk in self.disks}, name, size)
        former = {disk.name: disk.size for disk in self.disks}
        self._growth.grow(asked)
        return [
            outcome(disk.name, former[disk.name], disk.size, room_of(disk.disk), None)
            for disk in self.disks
            if disk.name in asked
        ]

    def resize_for(self, token: str, sizes: dict[str, int], exact: bool) -> dict[str, dict[str, int]]:
        """As its primary asks for it: each disk gets that size, or all that is there if that is less (not if it has to
        be `exact`), and never less than it has. By disk the size now, and the bytes that there are below."""
        self.pairing.check_token(token)
        known = {disk.name: disk for disk in self.disks}
        rooms = {}
        for name, size in sizes.items():
            if name not in known:
                raise CommandError(f"there is no disk '{name[:80]}'")
            disk = known[name].disk
            rooms[name] = room_of(disk)
            if exact and size > max(rooms[name], disk.size):
                raise CommandError(
                    f"disk '{name}' cannot have {size} bytes: {disk.location} has {rooms[name]}, grow it"
                )
        self._growth.grow({name: min(size, rooms[name], SIZE_MAX) for name, size in sizes.items()})
        return {name: {"size": known[name].size, "room": room} for name, room in rooms.items()}

    @property
    def takes_batches(self) -> bool:
        """Whether a primary should send small writes together: one thread does them, one after the other, which is
        quick in a file, but not on a disk behind a network. (A file may be slow as well: SecondaryDisk finds that
        out.)"""
        return all(isinstance(disk.disk, FileDisk) for disk in self.disks)

    def size_named(self, face: str, token: str | None) -> int | None:
        return self.pairing.size_named(face, token)

    def size_of_owner(self, export: str) -> int | None:
        if self._set.record.stage not in (Stage.NONE, Stage.RUNNING):
            return None  # it is this node
        former = self._set.record.former_disks
        return next((former.get(disk.name) for disk in self.disks if disk.top_id == export), None)

    def admit(self, face: str, token: str | None) -> None:
        if face in self._targets:
            self.pairing.admit(token)

    @property
    def session(self) -> str | None:
        return self.pairing.owner_token

    def query_failover(self) -> dict[str, Any]:
        return {**self._failover.preflight(), **self.outlook.to_json()}

    # -- checkpoint ----------------------------------------------------------------------------------------

    def _prepare_emptying(self, flush: bool = False) -> None:
        """All that may fail, before anything is emptied (case 6), and most of what takes time, before the gate is
        closed. `flush`: the disks as well, which durability=power needs anyway."""
        self._ledger.tidy()
        self._set.gate.urgency.run(self._check_in_place, name="look")
        for disk in self.disks:
            assert disk.stack is not None
            if flush or disk.stack.power:
                self._flush_disk(disk)

    def _check_in_place(self) -> None:
        """What is in use has not been removed: otherwise the next process would not find it. And what a server below
        has lost shows now, not when the checkpoint is taken."""
        for disk in self.disks:
            if not disk.disk.outlives:
                self._set.gate.urgency.run(disk.disk.look)  # it may have to connect anew
        try:
            self._set.state.check()
        except StateError as error:
            raise self._cannot_empty(self.disks[0], DiskError(str(error))) from error
        for disk in self.disks:
            try:
                disk.check_maps()
            except DiskError as error:
                raise self._cannot_empty(disk, error) from error
            try:
                disk.disk.check_there()
            except DiskError as error:
                self._set.faults.report(Case.SECONDARY_DISK, disk.name, "checkpoint", 0, disk.size, error)
                raise CommandError(f"the secondary disk '{disk.name}' is gone: {error}") from error
        for disk in self.disks:
            assert disk.stack is not None
            try:
                disk.stack.check_images()
            except LayerError as error:
                raise self._cannot_empty(disk, error) from error

    def _flush_disk(self, disk: SecondaryDisk) -> None:
        """What the primary has written becomes stable, so that it may count as a checkpoint."""
        assert disk.stack is not None
        try:
            self._set.gate.urgency.run(disk.stack.target.flush)
        except DiskError as error:
            self._set.faults.report(Case.SECONDARY_DISK, disk.name, "flush", 0, 0, error)
            raise CommandError(f"cannot flush the secondary disk '{disk.name}': {error}") from error

    def _cannot_empty(self, disk: SecondaryDisk, error: DiskError) -> CommandError:
        operation, offset, length = "make-empty", 0, disk.size
        if isinstance(error, LayerError):
            operation, offset, length = error.operation, error.offset, error.length
        self._set.faults.report(Case.EMPTYING, disk.name, operation, offset, length, error)
        return CommandError(f"cannot empty the overlays of disk '{disk.name}': {error}")

    def _empty_all(self, number: int = 0) -> CommandError | None:
        """Empty the overlays of every disk, as one step for whoever looks, now or after a kill. The gate is
        closed, or nothing is served yet. `number`: the primary's for this checkpoint.

        Fails only with durability=power, or where a copy shares blocks with what has to be written, and there is no
        room (disk/mapped.py). CommandError: nothing has changed. A CommandError that is returned: all are
        empty, and would be after a power cut, since the epoch says so; but nothing can be made stable any more, so no
        target write and no flush is accepted from here on.
        """
        begun = time.monotonic()
        for disk in self.disks:
            if disk.stack is not None and disk.stack.power:
                self._flush_disk(disk)
        for disk in self.disks:
            if disk.disk.unflushed is not None:
                disk.disk.unflushed.expose()
        at = self.disks[0]
        try:
            self._set.state.begin_epoch(number)
        except StateError as error:
            failure = DiskError(str(error))
            power = self._set.options.durability is Durability.POWER
            raise self._end_stability(at, failure) if power else self._cannot_empty(at, failure) from error
        for disk in self.disks:
            pause("checkpoint.begun")
            if disk.stack is not None:
                disk.stack.empty()
        pause("checkpoint.emptied")
        try:
            for disk in self.disks:
                at = disk
                if disk.stack is not None:
                    disk.stack.publish_emptied()
            self._set.state.end_epoch(time.monotonic() - begun)
        except DiskError as error:
            return self._end_stability(at, error)
        except StateError as error:
            return self._end_stability(at, DiskError(str(error)))
        return None

    def _end_stability(self, disk: SecondaryDisk, error: DiskError) -> CommandError:
        """It is not known what a power cut would find; whatever it finds shall be right."""
        for each in self.disks:
            if each.stack is not None:
                each.stack.fail(error)
        self._backup.end(str(error))
        why = self._cannot_empty(disk, error)
        return CommandError(
            f"{why}. Copy-before-write has ended with that: nothing of the primary is taken any more", reason=why.reason
        )

    # -- copy-before-write ---------------------------------------------------------------------------------

    def _copy_failed(self, error: LayerError) -> None:
        if error.operation == "sync" and not error.still_waiting:
            self._backup.end(str(error))
        else:
            self._backup.failed(str(error))

    # -- the rest ------------------------------------------------------------------------------------------

    def query(self) -> dict[str, Any]:
        # In stage done nobody looks at the overlays any more, and the next process will not open them.
        fill = None if self._set.record.stage is Stage.DONE else self._fill
        return {
            "consistent": self._set.record.inconsistent is None,
            "checkpoint-of-primary": self._set.state.asked,
            "checkpoint-obstacle": self.obstacle,
            "peer-node": self.pairing.primary,
            "stopping": self.pairing.leaving,
            "link": self.pairing.link,
            **self.rehearsals.query(),
            "disks": [
                {
                    "name": disk.name,
                    "top-id": disk.top_id,
                    "size": disk.size,
                    "active-bytes": stack.active.bytes_held if stack else 0,
                    "hidden-bytes": stack.hidden.bytes_held if stack else 0,
                    "active-limit-bytes": fill.limit(stack.active) if stack and fill else None,
                    "hidden-limit-bytes": fill.limit(stack.hidden) if stack and fill else None,
                    "out-of-sync-bytes": disk.lost.marked_bytes,
                    "marks": -(-(disk.lost.marked_bytes + disk.changes.marked_bytes) // GRAIN),
                    "totals": dict(disk.totals),
                }
                # The stack is looked up once: a role change takes it away meanwhile.
                for disk, stack in [(disk, disk.stack) for disk in self.disks]
            ],
        }

    @property
    def in_sync(self) -> bool:
        return self._set.record.stage is Stage.RUNNING and self.pairing.link["state"] == "in-sync" and self.in_step

    @property
    def in_step(self) -> bool:
        lineage = self._set.ancestry.lineage
        whole = not self._set.record.resync and not any(disk.lost.missing for disk in self.disks)
        return whole and lineage.shared and not lineage.incoming

    @property
    def met(self) -> bool:
        return self.pairing.met

    @property
    def bytes_served(self) -> int:
        return sum(sum(disk.totals.values()) for disk in self.disks)

    def faces(self) -> dict[str, Face]:
        shown = {}
        elsewhere = self._set.options.follow_owner and self._set.record.stage in (Stage.NONE, Stage.RUNNING)
        for disk in self.disks:
            shown[disk.name] = disk.target_face()
            # Not by the stage of the disk: a failover does not wait for requests that hang, and is followed at once.
            guest = elsewhere_face(disk.top_id, partial(getattr, disk, "size")) if elsewhere else disk.guest_face()
            shown.setdefault(disk.top_id, guest)
        return shown

    def tests(self) -> dict[str, Face]:
        return self.rehearsals.faces

    @property
    def default(self) -> str:
        return ""

    def configure(self) -> None:
        self.rehearsals.configure()
        if self._fill is not None:
            self._fill.warn_at(self._set.options.overlay_watermark)

    def retire(self) -> None:
        """Another side has taken over the disks and their change maps. The gate is open: the thread that gives back
        space may be waiting before it."""
        self.rehearsals.end_all("this node is no secondary any more")
        self._hindrance.end(_CLOSE_S)
        self._failover.end(_CLOSE_S)
        self._reclaimer.stop(_CLOSE_S)
        for disk in self.disks:
            disk.let_go()

    def settle(self) -> None:
        for disk in self.disks:
            disk.settle()

    def close(self, wait_s: float | None = None) -> bool:
        last = wait_s is None
        wait_s = _CLOSE_S if wait_s is None else wait_s
        deadline = time.monotonic() + wait_s
        self._hindrance.end(0.0)
        ended = self._failover.end(wait_s)
        self._reclaimer.stop(max(0.0, deadline - time.monotonic()))
        # Not with a portion of a commit still under way: it changes disk and overlays after they were flushed.
        if not (ended and self._end_clean(deadline, last)):
            return False
        self._let_go()
        return True

    def _end_clean(self, deadline: float, last: bool) -> bool:
        """Make everything stable and, where the process ends (`last`), say so, for a restart of the host; False when
        that is still going on at the deadline: the process ends all the same, and another one of this boot finds
        everything in place."""
        if self._set.record.stage is Stage.NONE and not self._set.ancestry.known:
            return True  # nobody has written here whose loss would have to be known
        flusher = threading.Thread(target=self._flush_everything, args=(last,), name="flush", daemon=True)
        try:
            flusher.start()
        except NO_THREAD:  # then as long as it takes
            self._flush_everything(last)
            return True
        flusher.join(max(0.0, deadline - time.monotonic()))
        return not flusher.is_alive()

    def _flush_everything(self, last: bool) -> None:
        try:
            self.settle()
            for disk in self.disks:
                disk.lost.flush()
                disk.changes.flush()
            if last:
                self._set.record.clean = True
                self._set.save()
        except (DiskError, StateError) as error:
            log(f"not everything is on stable storage: {error}")

    def _let_go(self) -> None:
        for disk in self.disks:
            disk.close()
