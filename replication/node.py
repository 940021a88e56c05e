# SPDX-License-Identifier: BSD-3-Clause
"""The process's half of the pair: one stage for all its disks, and the commands that change it.

Invariants
* Commands that change the stage come one at a time (`_command`).
* A stage is in the state file before any request follows it, and the gate is closed while it changes.
* A command that raises has changed nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from replication.admission import Admission, Ownership
from replication.conditions import Conditions
from replication.errors import CommandError, ConfigError, DiskError, ReplicationError
from replication.events import EventHub
from replication.fault import FaultLatch
from replication.jobs import JobList
from replication.lease import Tenure
from replication.log import log, log_defect
from replication.options import CHANGEABLE, Durability, Options, check_uri
from replication.order.gate import Gate, GateStuck
from replication.order.latency import ROLE_CHANGE, STALL_S
from replication.order.pause import pause
from replication.order.urgency import Haste
from replication.order.worker import NO_THREAD, Worker
from replication.passing import Passing
from replication.primary.schedule import STOP_S, Clocks, Ticker
from replication.primary.side import PrimarySide
from replication.promotion import Promotion
from replication.reason import Reason
from replication.record.ancestry import Ancestry
from replication.record.boot import boot_id
from replication.record.guests import Guests, of_this_boot
from replication.record.ledger import Ledger, settled
from replication.record.lineage import Lineage, compare
from replication.record.outdated import Outdated
from replication.record.state import Record, StateError, StateFolder
from replication.role import Standing, is_owner, judge
from replication.secondary.disk import changing_face
from replication.secondary.pairing import NOBODYS, Channel
from replication.secondary.rehearsals import Rehearsals
from replication.secondary.side import SecondarySide
from replication.side import LOOK_S, Face, Setting, Side
from replication.stage import TRANSITIONS, Mode, Stage
from replication.uri import absolute

COMMAND_S = 120.0
"""Longest wait for another command to end; each is bounded by the gate's and the link's deadlines."""

ROLE_S = 600.0
"""Longest wait for a side to let its disks go when another takes its place; at the end of the process it is shorter."""

FAILOVER_S = 1.4
"""A failover is answered within 2 seconds, whatever the storage does: so long its steps may take together."""

URGENT_S = 0.5
"""Longest wait of a failover for another command to end, which gives way to it."""

SAVE_S = 30.0
"""Longest wait of others for the storage of the state folder: above what a slow disk needs for two syncs."""

LATCH_S = 1.0
"""The same where a fault is to be kept that a request has met: it is saved later."""

PARTING_S = 10.0
"""How long the primary has to end its stream before a planned stop of its secondary: it may be in a checkpoint."""

SAVE_AGAIN_MIN_S, SAVE_AGAIN_MAX_S = 0.5, 10.0
"""Between two attempts to save a record that could not be saved, for which no command waits."""

_AUTOSTART_RETRY_S = 1.0

_OF_PEER = (Reason.PEER_PROMOTED.value, Reason.PEER_NEWER.value)
"""Why a node is outdated, as its peer has shown it, and can show that it is so no longer."""


class Node:
    """A primary or a secondary: by `options.mode`, or what a former process of the state folder has become."""

    def __init__(self, options: Options, hub: EventHub, state: StateFolder) -> None:
        """Open everything; ConfigError says what is wrong, and the state folder stays the caller's to close. Nothing is
        served and no thread runs yet."""
        self.gate = Gate()
        self._hub = hub
        self.admission = Admission(options, self._ownership, told=self._tell_standing)
        """When the guest is served."""
        self.passing = Passing(options, lambda: self.side.session, self._has_left) if options.follow_owner else None
        """Where it is served, with follow-owner=true."""
        self.tenure = Tenure(self._lease_of_primary)
        self._promotion = Promotion(self)
        self._options = options
        # One command at a time. First in the lock order. Held across I/O (a start connects, a stop drains), but no
        # request waits for it.
        self._command = threading.Lock()
        # Protects the next one, and puts the latched fault into the record. Never held across I/O.
        self._saving = threading.Lock()
        self._unsaved = False
        # Protects why an owner is outdated, which a command, the link and a start may say at once. Never across I/O.
        self._judging = threading.Lock()
        self.before_resync: Callable[[Mapping[str, str]], None] = _agreed
        """Called with `verdict` and `peer` before a primary begins to send what this secondary lacks; CommandError
        refuses that. It may take its time, without a lock."""
        self._closing = threading.Event()
        self._looks = Ticker("disks", LOOK_S, self._look_at_disks)
        self._owner_looks = Ticker("owner", LOOK_S, self._look_at_owner) if self.passing is not None else None
        self._clocks = Clocks(self._checkpoint_when_ready, self._checkpoint_age, lambda: self._state.epoch, hub)
        self._autostarter = Worker("autostart", self._autostart)
        self._autostart_failure = ""
        self._state = state
        self._record = self._former_record() or Record(options.mode)
        self._jobs = JobList(hub)
        self._faults = FaultLatch(hub, self._keep_fault)
        self._faults.restore(self._record.fault)
        self._distrust_early()
        self._ancestry = Ancestry(state, self._record, self._save)
        self._ledger = Ledger(self._record, self._ancestry, self._save)
        kind = PrimarySide if self._record.mode is Mode.PRIMARY else SecondarySide
        self.side: Side = kind(self._setting(lambda: self.side))
        self.side.open()
        self._stage = self._record.stage
        self.side.show_stage(self.stage)
        self.faces: dict[str, Face] = self.side.faces()
        """What is behind the exports, by name. Changes only while the gate is closed."""
        # A good end that the next process must not take for this one's.
        self._was_clean = self._record.clean
        self._note_process()
        self.guests = Guests(self._record, self._keep_soon)
        """Who may attach to a guest's export, with follow-owner=true."""
        state.reserve(self._record)
        restarted = self._ownership().forwards
        self.admission.begin(restarted, self._record.partner is not None, self._record.kept_back, self._was_clean)

    def _setting(self, side: Callable[[], Side]) -> Setting:
        """What a side works with; `side()` is that side, when it enters a stage."""
        return Setting(
            self._options,
            self._state,
            self._record,
            self._hub,
            self._jobs,
            self._faults,
            self.gate,
            self._ancestry,
            self._ledger,
            lambda stage, haste=None: self._enter(side(), stage, haste),
            self._save,
            lambda: side().show_stage(self.stage),
            self._outdate,
            self._accepted,
            self.admission,
            self.tenure,
            self._commanding,
        )

    def _former_record(self) -> Record | None:
        record = self._state.load()
        if record is None:
            return None
        record = settled(record, self._state)
        if record.mode is self._options.mode:
            return record
        if self._options.mode is Mode.SECONDARY:
            # A promoted one has become a primary since it was started by this command line, and stays it. A former
            # primary comes back as a secondary: what may happen to its content is decided by its lineage.
            if self._options.role_auto and not record.promoted and record.stage is not Stage.NONE:
                return replace(record, promoted=True)
            if record.promoted:
                log("mode=secondary: this node was promoted and is a primary now; it stays one until it is demoted")
                return record
            log(f"mode=secondary: the state folder of a primary in stage {record.stage.value}, now of a secondary")
            return record.as_secondary()
        if record.stage is Stage.DONE:
            return record.as_primary()
        raise ConfigError(
            f"the state folder {self._options.state} belongs to a {record.mode.value}; "
            f"start with mode={record.mode.value} or use another folder, with other disks: "
            "only this one knows what these hold"
        )

    def _distrust_early(self) -> None:
        """With durability=process the images get words that are not stable as soon as they are opened. If a former
        process of this boot had durability=power, a power cut from then on must not find that in the record."""
        record = self._record
        powerful = record.durability == Durability.POWER.value and self._options.durability is not Durability.POWER
        if powerful and record.stage is not Stage.NONE and record.boot == boot_id():
            try:
                self._state.save(replace(record, durability=self._options.durability.value))
            except StateError as error:
                raise ConfigError(str(error)) from error

    def _note_process(self) -> None:
        """From here on the record is this process's."""
        record, same_boot = self._record, self._record.boot == boot_id()
        record.guests = of_this_boot(record.guests, same_boot)
        record.guests_over = of_this_boot(record.guests_over, same_boot)
        self._record.boot = boot_id()
        self._record.durability = self._options.durability.value
        self._record.clean = False

    def launch(self) -> None:
        """Start the threads; after nbdkit has forked. StateError when the record cannot be written."""
        # From here on the former process's good end counts no longer.
        self._state.bind(self._record, self._save, needed=self.stage is not Stage.NONE or self._was_clean)
        self.side.launch()
        self._clocks.set(self._options.checkpoint_interval_s, self._options.checkpoint_age_limit_s)
        self._looks.start()
        if self._owner_looks is not None:
            self._owner_looks.start()
        self.admission.launch()
        if self._options.autostart and self.stage is Stage.DONE:
            log("autostart=true starts nothing in stage done: a person says who owns the disks now")
        if self._options.autostart and self.stage is Stage.NONE:
            self._autostart_failure = self._autostarted("")
            if self._autostart_failure:
                self._autostarter.start(_AUTOSTART_RETRY_S)
        self._promotion.resume()

    def _autostarted(self, former: str) -> str:
        """Start; why that failed, empty if it did not. The `former` reason is not said again."""
        try:
            self.start_pair(None, None, "auto")
        except CommandError as error:
            if str(error) != former:
                log(f"autostart: {error}")
            return str(error)
        return ""

    def _autostart(self) -> float | None:
        """Try again until the secondary is there, somebody has started by hand, or the process ends."""
        if self.stage is Stage.NONE:
            self._autostart_failure = self._autostarted(self._autostart_failure)
            if self._autostart_failure:
                return _AUTOSTART_RETRY_S
        return None

    def close(self) -> None:
        """End threads and let go of everything; the stage stays as it is for the next process."""
        self._closing.set()
        self.admission.close()
        self._promotion.close()
        self._autostarter.stop(0.0)
        self._clocks.stop()
        self._looks.stop(STOP_S)
        if self._owner_looks is not None:
            self._owner_looks.stop(STOP_S)
        good = self.side.close()
        self._state.close(good)

    def configure(self, options: Options) -> None:
        """Take over what can change while the node runs (options.CHANGEABLE), after `launch`. From any thread, without
        waiting for a command."""
        for name in CHANGEABLE:
            setattr(self._options, name, getattr(options, name))
        self._clocks.set(self._options.checkpoint_interval_s, self._options.checkpoint_age_limit_s)
        self.side.configure()

    def _look_at_disks(self) -> None:
        self.gate.latency.look()
        try:
            self._state.note_sync(self.side.in_sync)
            self.side.look()
        except Exception as error:  # noqa: BLE001 (a role change closes the disks meanwhile; the next look is soon)
            log(f"looking at the disks: {error}")

    def _look_at_owner(self) -> None:
        """By a thread of its own: a disk that hangs does not keep the loss of the owner from being seen."""
        assert self.passing is not None
        try:
            self.passing.look()
        except Exception as error:  # noqa: BLE001 (the session changes meanwhile; the next look is soon)
            log(f"looking at the owner of the disks: {error}")

    def traffic(self) -> tuple[int, int]:
        """Requests and bytes served so far; for placement.py, so roughly."""
        return self.gate.passed, self.side.bytes_served

    # -- stage ---------------------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """The stage of all disks. Told only once it has been saved: what somebody has seen is so after a kill, too."""
        return self._stage

    def _enter(self, side: Side, stage: Stage, haste: Haste | None = None) -> bool:
        """Make a stage last, then follow it. StateError, with nothing changed, when it cannot be made to last, in a
        failover's time. With `force` of that it is followed all the same, and saved later; whether it was saved.

        Called by the side at work; one that is not the node's yet becomes it. The gate is closed.
        """
        record = self._record
        former = (record.stage, record.mode, record.promoted, record.kept_back)
        if stage not in TRANSITIONS[record.stage]:
            raise AssertionError(f"no way from stage {record.stage.value} to {stage.value}")
        record.stage, record.mode, record.promoted = stage, side.mode, record.promoted or side.mode is not record.mode
        # With the stage: from a stop that nobody has demoted, the next process lets the guest go on.
        record.kept_back = stage is Stage.DONE and self.admission.keeps_back
        was_owner = is_owner(self.side.mode, self._stage)  # the record is another one's already, in a demotion
        takes_over = not was_owner and is_owner(record.mode, stage)
        goes_back = takes_over and not self._handed_over and (stage is not Stage.FAILOVER or side.goes_back)
        guests = self.guests.end() if goes_back else None
        saved = True
        try:
            self._save(haste)
        except StateError as error:
            if haste is None or not haste.force:
                record.stage, record.mode, record.promoted, record.kept_back = former
                if guests is not None:
                    self.guests.take_back(guests)
                raise
            log(f"stage {stage.value} is not saved yet, and the end of this process would undo it (force): {error}")
            saved = False
        self._stage = stage
        side.show_stage(stage)
        if side is not self.side:
            self.side = side
            self.faces.clear()
            self.faces.update(side.faces())
            side.configure()  # what was changed while it was not the node's yet
        self._tell_followers(was_owner, goes_back)
        if stage is Stage.DONE:
            self.admission.stopped()
            if self.admission.keeps_back and not record.kept_back:  # the link was lost while that was saved
                record.kept_back = True
                self._save_later()
        else:
            self.admission.review()
        self._hub.emit("REPLICATION_STAGE_CHANGE", mode=record.mode.value, from_=former[0].value, to=stage.value)
        return saved

    def _query_passing(self) -> dict[str, Any]:
        assert self.passing is not None
        over = len(self._record.guests_over)
        return {**self.passing.query(), "guests-over": over, "handed-over": self._handed_over}

    def _has_left(self) -> bool:
        """Whether this secondary's last primary has left in good order."""
        return self._record.left_well

    @property
    def _handed_over(self) -> bool:
        """Whether this node owns the disks as their former owner has left them, in good order."""
        record = self._record
        return is_owner(record.mode, record.stage) and record.stage is Stage.DONE and record.left_well

    def _tell_followers(self, was_owner: bool, goes_back: bool) -> None:
        """Guests whose requests follow the owner learn who that is. The gate is closed."""
        record = self._record
        owner = is_owner(record.mode, record.stage)
        if self.passing is None or owner == was_owner:
            return
        if not owner:
            self.passing.turn("the node was made a secondary")
        elif goes_back:
            self.passing.turn("the disk went back to the last checkpoint when this node took it over")
        else:
            self.passing.turn(None)  # all that the former owner has answered is here
        # After that: a failover does not always have the gate closed, and no former guest is to find what is here now.
        self.faces.update(self.side.faces())

    def _save(self, haste: Haste | None = None) -> None:
        """Make the record last. StateError when it does not within SAVE_S, or when a failover has come first, or
        (`haste`) not in the failover's time: then, too, it is saved again as the caller has left it."""
        with self._saving:
            fault = self._faults.fault
            self._record.fault = None if fault is None else fault.to_json()
        if self._state.path is None:
            return
        within_s = SAVE_S if haste is None else haste.left_s
        deadline = time.monotonic() + within_s

        def write() -> None:
            self._state.save(self._record, deadline, hasty=haste is not None)

        try:
            # A little longer than the write itself may wait, which knows better why it was not done.
            self.gate.urgency.run(write, within_s + 0.1, yields=haste is None, name="save")
        except CommandError as error:
            self._save_later()
            raise StateError(f"cannot write the record to {self._state.path}: {error}") from error

    def _keep_fault(self) -> None:
        """The fault is latched all the same, and there is nobody to give an error to: until the record can be saved,
        only a restart would forget what it says."""
        self._keep_soon()

    def _keep_soon(self) -> None:
        """Save, for a while at once, and else later."""
        try:
            self._save(Haste(time.monotonic() + LATCH_S))
        except StateError as error:
            log(str(error))
            self._save_later()

    def _save_later(self) -> None:
        """Try again until it is saved or the process ends; one thread at a time."""
        with self._saving:
            if self._unsaved:
                return
            self._unsaved = True
        try:
            threading.Thread(target=self._save_again, name="save", daemon=True).start()
        except NO_THREAD as error:  # the next thing that is saved brings it along
            self._unsaved = False
            log(f"the record is not saved later: {error}")

    def _save_again(self) -> None:
        again_s = SAVE_AGAIN_MIN_S
        while not self._closing.wait(again_s):
            again_s = min(2 * again_s, SAVE_AGAIN_MAX_S)
            with self._saving:
                self._unsaved = False  # before: whoever fails from here on starts another one
            try:
                self._save()
            except Exception as error:  # noqa: BLE001 (nobody else saves what is not saved)
                if not isinstance(error, StateError):
                    log_defect(error)
                with self._saving:
                    if self._unsaved:
                        return
                    self._unsaved = True
            else:
                return

    @contextmanager
    def _commanding(self, haste: Haste | None = None) -> Iterator[None]:
        """One command at a time, and failures as the control client sees them. Who holds up a failover (`haste`) gives
        way to it, and it waits for URGENT_S seconds only."""
        if haste is not None:
            with self.gate.urgency.asking():
                if not self._command.acquire(timeout=URGENT_S / 2):
                    changed = self.side.make_way()
                    if not self._command.acquire(timeout=URGENT_S / 2):
                        raise CommandError(
                            "another command is at a step that cannot be interrupted: a checkpoint or a stop whose "
                            "storage (of the state folder or the overlays) does not answer; try again"
                            + " (force does not help: which checkpoint a power cut would find is not known)"
                            * haste.force
                            + (changed and f" ({changed})"),
                            reason=Reason.BUSY,
                        )
        elif not self._command.acquire(timeout=COMMAND_S):
            raise CommandError(f"another command has been at work for {COMMAND_S:.0f} s", reason=Reason.BUSY)
        try:
            yield
        except StateError as error:
            raise CommandError(str(error), reason=Reason.STORAGE) from error
        except GateStuck as error:
            raise CommandError(str(error), reason=Reason.BUSY) from error
        finally:
            self._command.release()

    # -- commands ------------------------------------------------------------------------------------------

    def start(
        self,
        mode: Mode | None,
        secondary: str | None,
        sync: str,
        discard_checkpoint: bool = False,
        force: bool = False,
    ) -> None:
        """replication-start; texts and their order as in QEMU's replication_start. `force`: of a primary that runs, and
        whose guest stands still."""
        if force:
            self._start_by_force()
            return
        self.start_pair(mode, secondary, sync, discard_checkpoint)
        if self._ownership().forwards:
            self.admission.promoted()

    def start_pair(self, mode: Mode | None, secondary: str | None, sync: str, discard_checkpoint: bool = False) -> None:
        with self._commanding():
            if self.stage in (Stage.DONE, Stage.FAILOVER) and secondary is None:
                return
            if self.stage is Stage.FAILOVER:
                raise CommandError(
                    "The commit after failover is still under way: try again in stage done", reason=Reason.COMMITTING
                )
            if self.stage is Stage.RUNNING and self._record.led and mode is not Mode.PRIMARY and secondary is None:
                self._record.led = False
                try:
                    self._save()
                except BaseException:
                    self._record.led = True
                    raise
                return
            if self.stage not in (Stage.NONE, Stage.DONE):
                raise CommandError("Block replication is running or done", reason=Reason.WRONG_STAGE)
            self._state.check()  # what is saved in a file that was removed, the next process would not find
            promoted = self.stage is Stage.DONE and isinstance(self.side, SecondarySide)
            if promoted and mode is Mode.PRIMARY:
                self._become_primary(secondary, sync, discard_checkpoint)
                return
            if mode is not None and mode is not self.side.mode:
                raise CommandError(
                    f"The parameter mode's value is invalid, needs {self.side.mode.value}, but got {mode.value}",
                    reason=Reason.WRONG_MODE,
                )
            self.side.start(secondary, sync, discard_checkpoint)

    def _start_by_force(self) -> None:
        if not self._ownership().forwards or self.admission.still.why is None:
            raise CommandError(
                "Parameter 'force' is for a primary that runs, and whose guest stands still", reason=Reason.WRONG_STAGE
            )
        self.resume_io()

    def _become_primary(self, secondary: str | None, sync: str, discard_checkpoint: bool) -> None:
        """A promoted secondary gets a secondary of its own; its guest goes on over the export that it has."""
        former = self.side
        assert isinstance(former, SecondarySide)
        side = PrimarySide(self._setting(lambda: side))
        side.adopt(former.disks)
        try:
            side.start(secondary, sync, discard_checkpoint)
        finally:
            if self.side is side:  # also when only the secondary's checkpoint could not be given up
                side.take_account()
                former.retire()
            else:
                side.end_threads()

    def demote(self) -> None:
        """replication-demote: a secondary that was promoted becomes one again, with its disks as they are, and runs.
        Its guest has been moved away."""
        with self._commanding():
            self.check_demotable()
            if self.stage is not Stage.DONE:
                raise CommandError(
                    f"Only the owner of its disks can be demoted, in stage done, not {self.stage.value}",
                    reason=Reason.WRONG_STAGE,
                )
            with self.admission.demoting():
                self._become_secondary()
            self.tenure.begin()

    def check_demotable(self) -> None:
        """CommandError when this process cannot be a secondary: it lacks the keys for that."""
        if self._options.mode is not Mode.SECONDARY:
            raise CommandError(
                "This was started as a primary: start it with mode=secondary and its top-id instead",
                reason=Reason.WRONG_MODE,
            )

    def _become_secondary(self) -> None:
        former, record = self.side, self._record
        kind, kept = type(former), replace(record)
        take_back = self._ancestry.note(lambda lineage: lineage)
        try:
            former.settle()  # what takes long, while the guest's face is still there
        except DiskError as error:
            raise CommandError(f"cannot become a secondary: {error}") from error
        with self.gate.closed(why=ROLE_CHANGE):
            for name, face in list(self.faces.items()):
                self.faces[name] = changing_face(name, face.size())
        if not former.close(ROLE_S):
            with self.gate.closed(why=ROLE_CHANGE):
                self.faces.update(former.faces())
            raise CommandError(f"cannot become a secondary: the disks could not be flushed within {ROLE_S:.0f} s")
        self.guests.replace(kept, lambda: record.take(kept.as_secondary()))
        side = SecondarySide(self._setting(lambda: side))
        try:
            side.open()
            try:
                side.start(None, "auto")
            except BaseException:
                side.close(ROLE_S)
                raise
        except Exception as error:  # whatever it is, the guest's face must come back
            if not isinstance(error, ReplicationError):
                log_defect(error)
            self.guests.take_back((kept.guests, kept.guests_over))
            self.guests.replace(kept, lambda: record.take(kept))
            take_back()
            try:
                self._restore(kind)
            except ConfigError as failure:
                raise CommandError(f"cannot become a secondary: {error}; nor be what it was: {failure}") from error
            raise CommandError(f"cannot become a secondary: {error}") from error
        self._faults.clear()
        side.launch()
        try:
            self._state.closed_well()  # as a primary
        except StateError as error:
            log(f"after a loss of power this node would take all of its disks for changed: {error}")

    def _restore(self, kind: type[Side]) -> None:
        """As it was before, which needs no save: a side that makes room for another one has not ended in good order
        (Side.close). ConfigError when its own disks cannot be opened any more."""
        side: Side = kind(self._setting(lambda: side))
        side.open()
        side.show_stage(self.stage)
        with self.gate.closed(why=ROLE_CHANGE):
            self.side = side
            self.faces.clear()
            self.faces.update(side.faces())
        try:
            side.launch()
        except StateError as error:  # the page says already that it is open
            log(str(error))

    def checkpoint(self) -> tuple[int, float]:
        """replication-checkpoint: the epoch and the seconds that it took."""
        return self._checkpoint(lambda: self.side.checkpoint())  # noqa: PLW0108 (the side may be another one by then)

    def _checkpoint(self, take: Callable[[], None], ignored: bool = True) -> tuple[int, float]:
        """`ignored`: as QEMU's is after a failover or stop; if not, `take` refuses there."""
        with self._commanding():
            if ignored and self.stage in (Stage.FAILOVER, Stage.DONE):
                return self._state.epoch, 0.0
            begun = time.monotonic()
            take()
            duration_s = time.monotonic() - begun
            self._hub.emit("REPLICATION_CHECKPOINT", epoch=self._state.epoch, duration=duration_s)
            return self._state.epoch, duration_s

    def _checkpoint_when_ready(self) -> None:
        """An automatic one: only on a primary, and if nothing stands in its way."""
        side = self.side
        if self.stage is Stage.RUNNING and isinstance(side, PrimarySide) and side.ready:
            self.checkpoint()

    def _checkpoint_age(self) -> float | None:
        """In seconds, while there is a pair for which it matters."""
        return self._state.checkpoint["age"] if self.stage is Stage.RUNNING else None

    def hold(self) -> int:
        """replication-checkpoint with `hold`: the number of the epoch that was cut."""
        with self._commanding():
            return self._primary("hold").hold()

    def commit(self, epoch: int) -> tuple[int, float]:
        """replication-checkpoint-commit."""
        return self._checkpoint(lambda: self._primary("commit").commit(epoch), ignored=False)

    def abort(self, epoch: int) -> None:
        """replication-checkpoint-abort."""
        with self._commanding():
            self._primary("abort").abort(epoch)

    def verify(self, rate: int | None, repair: bool) -> None:
        """replication-verify: begin to compare the disks with the secondary's."""
        with self._commanding():
            self._comparing().verify(rate, repair)

    def cancel_verify(self) -> None:
        """replication-verify-cancel; without waiting for a command."""
        self._comparing().cancel_verify()

    def resize(self, name: str | None, size: int | None) -> list[dict[str, object]]:
        """replication-resize: what has become of each disk."""
        with self._commanding():
            self._state.check()  # what is saved in a file that was removed, the next process would not find
            return self.side.resize(name, size)

    def start_test(self, name: str, timeout_s: float | None) -> dict[str, Any]:
        """replication-test-start."""
        return self._testing().start(name, timeout_s, self.faces)

    def stop_test(
        self, name: str | None, result: str | None, rto_s: float | None, reason: str | None, id_: str | None = None
    ) -> dict[str, Any]:
        """replication-test-stop; without waiting for a command."""
        return self._testing().stop(name, result, rto_s, reason, id_)

    def _testing(self) -> Rehearsals:
        if not isinstance(self.side, SecondarySide):
            raise CommandError("This is a primary: a failover is tested on its secondary", reason=Reason.WRONG_MODE)
        return self.side.rehearsals

    def _comparing(self) -> PrimarySide:
        if not isinstance(self.side, PrimarySide):
            raise CommandError(
                "This is a secondary: to compare the disks is a matter of its primary", reason=Reason.WRONG_MODE
            )
        return self.side

    def _primary(self, what: str) -> PrimarySide:
        if not isinstance(self.side, PrimarySide):
            raise CommandError(f"This is a secondary: to {what} an epoch is a matter of its primary")
        return self.side

    def discard(self, checkpoint: bool | None = None) -> None:
        """replication-discard: what was written here may be overwritten by a primary, or (`checkpoint`) the last
        checkpoint by the one that is connected; None: whichever keeps one from going on."""
        with self._commanding():
            self.side.discard(checkpoint)

    # -- commands of a primary, over the peer channel ------------------------------------------------------

    def _secondary(self) -> SecondarySide:
        if not isinstance(self.side, SecondarySide):
            raise CommandError(NOBODYS, reason=Reason.NOT_SECONDARY)
        return self.side

    def pair(
        self,
        channel: Channel,
        node: str,
        lineage: Lineage,
        disks: dict[str, int],
        epoch: int,
        timeout_s: float,
        lease_s: float | None = None,
    ) -> dict[str, Any]:
        """replication-pair: who is here, and the token with which the primary may write."""
        if node == self._record.node:
            # The command that asks has the lock which this one would wait for.
            raise CommandError("it is this very node, and no secondary")
        with self._commanding(), self._introducing():
            secondary = self._secondary()
            self._ledger.tidy()
            token = secondary.pairing.pair(channel, node, lineage, disks, timeout_s)
            self._note_lease(lease_s)  # before the primary hears that it is one
            try:
                self._state.count_from(epoch)
            except StateError as error:  # with a checkpoint it can be, the number comes along
                log(f"the primary's epoch {epoch} is not counted from: {error}")
            return {
                "token": token,
                "node": self._record.node,
                "lineage": self._ancestry.lineage.to_json(),
                "stage": self.stage.value,
                "epoch": self._state.epoch,
                "durability": self._options.durability.value,
                "batches": self._secondary().takes_batches,
                "digests": True,
            }

    @contextmanager
    def _introducing(self) -> Iterator[None]:
        """A refusal because this is nobody's secondary says whose that is: only of its own secondary a primary
        concludes that another one went on."""
        try:
            yield
        except CommandError as error:
            if error.reason is Reason.NOT_SECONDARY:
                error.data = {"node": self._record.node, "lineage": self._ancestry.lineage.to_json()}
            raise

    def _note_lease(self, lease_s: float | None) -> None:
        """Over restarts of this process too. StateError."""
        record = self._record
        former = record.lease_s
        if lease_s == former:
            return
        with self.tenure.replacing():
            record.lease_s = lease_s
            try:
                self._save()
            except BaseException:
                record.lease_s = former
                raise

    def pair_prepare(self, token: str) -> None:
        """replication-pair-prepare."""
        with self._commanding():
            self._secondary().prepare_checkpoint(token)

    def pair_map(self, token: str, disk: str, start: int, lost: bool) -> dict[str, Any]:
        """replication-pair-map."""
        with self._commanding():
            return self._secondary().pairing.map_part(token, disk, start, lost)

    def pair_sync(self, token: str, verdict: str, generation: str, marked: bool, history: tuple[str, ...]) -> None:
        """replication-pair-sync."""
        pairing = self._secondary().pairing
        if pairing.begins_resync(token, verdict, marked):
            # Before the command lock: a failover does not wait for it, and the session is looked at again afterwards.
            self.before_resync({"verdict": verdict, "peer": pairing.primary or "", "stage": self.stage.value})
        with self._commanding():
            pairing = self._secondary().pairing
            session = pairing.check_token(token)
            pairing.sync(token, verdict, generation, marked, history)
            # Not before: one that is refused on the way, and comes again for ever, keeps no failover away. Nor after
            # the answer: the primary counts from what it asked last.
            session.channel.paired = True
            self.tenure.extend()

    def pair_resize(self, token: str, disks: dict[str, int], exact: bool) -> dict[str, Any]:
        """replication-pair-resize: the secondary's disks grow first."""
        with self._commanding():
            self._state.check()
            return dict(self._secondary().resize_for(token, disks, exact))

    def pair_discard(self, token: str) -> None:
        """replication-pair-discard: a person at the primary gives up the last checkpoint."""
        with self._commanding():
            self._secondary().discard_checkpoint_of(token)

    def unpair(self, token: str) -> None:
        """replication-unpair."""
        with self._commanding():
            self._secondary().pairing.end(token)

    def checkpoint_of_primary(self, token: str, epoch: int) -> tuple[int, float]:
        """replication-checkpoint, of a primary."""
        return self._checkpoint(lambda: self._secondary().checkpoint_of_primary(token, epoch), ignored=False)

    def channel_closed(self, channel: Channel) -> None:
        """A control connection has ended."""
        side = self.side
        if isinstance(side, SecondarySide):
            side.pairing.closed(channel)

    def get_error(self) -> str | None:
        """replication-get-error: QEMU's text, or None."""
        if self.stage is Stage.NONE:
            return "Block replication is not running"
        return None if self._faults.fault is None else "I/O error occurred"

    def stop(self, failover: bool, force: bool = False, conditions: Conditions | None = None) -> None:
        """replication-stop. `conditions`: of a failover."""
        if failover and not self._check_running():
            self._opens()
            return  # without waiting for whoever is at work
        haste = Haste(time.monotonic() + FAILOVER_S, force) if failover else None
        early = conditions is not None and conditions.early
        with ExitStack() as parted:
            side = self.side
            if not failover and isinstance(side, SecondarySide) and self._check_running():
                with self._commanding():
                    if self._check_running():
                        side.prepare_stop()
                # Without the command lock: the primary says good-bye by a command.
                parted.enter_context(side.pairing.parting(PARTING_S))
            with self._commanding(haste):
                if not self._check_running():
                    self._opens()
                    return
                if not isinstance(self.side, SecondarySide):
                    self._end_stage(haste, conditions)
                    return
                if failover:
                    self.side.check_unleased(force, conditions)
                with self.tenure.taking(force or early, lambda: self.stage is Stage.RUNNING):
                    self._end_stage(haste, conditions)
                self._opens()

    def hand_over(self) -> None:
        """Stop a primary whose secondary would take over without loss, and has said so. CommandError, with nothing
        changed, if it does not."""
        with self._commanding():
            if self.stage is not Stage.RUNNING:
                raise CommandError(f"the stage is {self.stage.value}", reason=Reason.NOT_LOSSLESS)
            self._primary("hand over").hand_over()

    def _opens(self) -> None:
        """A secondary that was stopped, or was before, is an owner by somebody's word: guests may come."""
        if isinstance(self.side, SecondarySide):
            self.admission.promoted()

    def _end_stage(self, haste: Haste | None, conditions: Conditions | None) -> None:
        if haste is None:
            self.side.stop()
        else:
            self._hasten(haste, conditions)

    def _hasten(self, haste: Haste, conditions: Conditions | None) -> None:
        try:
            if conditions is not None and self.side.check_failover(conditions):
                self.side.stop(lossless=True)
            else:
                self.side.fail_over(haste)
        except StateError as error:
            said = f"{error}. Nothing has changed. Try again when the storage of the state folder answers"
            if haste.force:
                # Without a checkpoint force has another meaning: what it empties must not be there after a kill.
                raise CommandError(said, reason=Reason.STORAGE) from error
            raise CommandError(
                f"{said}, or use force: then this process fails over all the same, and saves that as soon as it can; "
                "if it is killed before, the failover is undone",
                reason=Reason.STORAGE,
            ) from error

    def _check_running(self) -> bool:
        """Whether a stop has anything to do; CommandError when replication has not begun."""
        if self.stage in (Stage.FAILOVER, Stage.DONE):
            return False
        if self.stage is not Stage.RUNNING:
            raise CommandError("Block replication is not running", reason=Reason.NOT_RUNNING)
        return True

    def retry(self, force: bool = False) -> None:
        """replication-retry: go on with a commit that has failed."""
        with self._commanding():
            if self.stage is not Stage.FAILOVER_FAILED:
                raise CommandError(
                    f"There is no failed commit to retry: the stage is {self.stage.value}", reason=Reason.WRONG_STAGE
                )
            self.side.retry(force)

    def lost_heartbeat(self) -> None:
        """x-colo-lost-heartbeat: the other host is dead. A primary stops, without waiting for it."""
        self.stop(failover=True)

    def query(self) -> dict[str, Any]:
        """query-replication."""
        pause("query.begun")
        fault, standing = self._faults.fault, self.admission.standing
        answer = {
            "mode": self.side.mode.value,
            "stage": self.stage.value,
            "error": None if fault is None else fault.to_json(),
            "epoch": self._state.epoch,
            "checkpoint": self._state.checkpoint,
            "node": self._record.node,
            "generation": self._ancestry.lineage.current,
            "lineage": self._ancestry.lineage.to_json(),
            "guest-suspended": None if standing is None else standing["reason"],
            "guest-suspended-reason": standing,
            **({} if self.passing is None else {"passing": self._query_passing()}),
            "in-sync-until": None if self.side.in_sync else self._state.in_sync_until,
            "guest-stalls": self.gate.latency.waited(),
            "longest-stall": self.gate.latency.longest(STALL_S),
            **self.side.query(),
        }
        outdated = self._record.outdated
        answer["outdated"] = outdated is not None or answer.get("outdated") is True
        answer["outdated-reason"] = outdated
        return answer

    def outdate(self, text: str) -> None:
        """replication-outdate: who knows it says that another node went on. StateError as CommandError, with nothing
        changed. It takes the place of another reason: what would end that one does not end this."""
        with self.admission.hearing(), self._commanding():
            record = self._record
            told = Outdated(Reason.TOLD, text, time.time()).to_json()
            with self._judging:
                former, had_left_well = record.outdated, record.left_well
                record.left_well = False  # whoever has left is not the last word
                news = former is None or any(former[key] != told[key] for key in ("code", "reason"))
                if news:
                    record.outdated = told
            try:
                if news or had_left_well:
                    self._save()
            except BaseException:
                record.outdated, record.left_well = former, had_left_well
                raise
            if isinstance(self.side, SecondarySide):
                self.side.pairing.doubt()
            if self.admission.learnt(Reason.TOLD) or news:  # also a guest that somebody has let go on since
                self._tell_outdated(told)

    def _outdate(self, code: Reason, text: str) -> None:
        """As a thread of the link, or a start, has learnt. It is so all the same when it cannot be saved: it is saved
        later."""
        learnt = Outdated(code, text, time.time()).to_json()
        with self._judging:
            if code.value in self._record.overruled:
                return
            again = self._record.outdated is not None
            if not again:
                self._record.outdated = learnt
        # Before it is saved: storage that takes its time is no reason to serve the guest meanwhile.
        stops = self.admission.learnt(code, again)
        if again:
            if stops:
                self._tell_outdated(learnt)
            return
        try:
            self._save()
        except StateError as error:
            log(f"that this node is outdated is not saved yet: {error}")
            self._save_later()
        if self._record.outdated is not None:  # it may have ended meanwhile
            self._tell_outdated(learnt)

    def _tell_outdated(self, outdated: Mapping[str, Any]) -> None:
        log(f"this node is outdated: {outdated['reason']}")
        self._hub.emit("REPLICATION_OUTDATED", code=outdated["code"], reason=outdated["reason"])

    def _tell_standing(self, standing: dict[str, str] | None) -> None:
        code, reason = (None, None) if standing is None else (standing["code"], standing["reason"])
        self._hub.emit("REPLICATION_GUEST", suspended=standing is not None, code=code, reason=reason)

    # -- roles ---------------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """Of the side at work."""
        return self.side.mode

    @property
    def outdated_reason(self) -> str | None:
        """Why the node is outdated."""
        outdated = self._record.outdated
        return None if outdated is None else str(outdated["reason"])

    @property
    def peer(self) -> str | None:
        """The URI of the other node as a secondary, if the command line or an earlier start has named it."""
        return self._record.secondary or self._options.secondary

    @property
    def sought(self) -> str | None:
        """Whom this owner looks for (Record.sought)."""
        return self._record.sought

    def seek(self, uri: str | None, save: bool) -> None:
        """Look for that one, over restarts too. Not `save`: it is saved with what changes next."""
        self._record.sought = uri
        if save:
            self._keep_fault()

    @property
    def in_sync(self) -> bool:
        """Whether the nodes are in sync at this moment."""
        return self.side.in_sync

    def primary_is_there(self) -> str | None:
        """The node id of the primary that this secondary has, and hears."""
        return self.side.pairing.live_primary if isinstance(self.side, SecondarySide) else None

    def keeps_all(self) -> bool:
        """Whether a failover loses nothing."""
        return isinstance(self.side, SecondarySide) and self.side.outlook.lossless

    def lacking(self) -> str | None:
        """What this secondary lacks of its primary's, so that it has no valid checkpoint once it is started."""
        side = self.side
        if not isinstance(side, SecondarySide):
            return None
        lost = next((disk.name for disk in side.disks if disk.lost.missing), None)
        return side.pairing.incomplete or (lost and f"disk '{lost}' has lost something")

    def _lease_of_primary(self) -> float | None:
        record = self._record
        return None if record.left_well else record.lease_s

    def _ownership(self) -> Ownership:
        mode, stage = self._record.mode, self._stage
        forwards = mode is Mode.PRIMARY and stage is Stage.RUNNING
        outdated = self._record.outdated
        why, code = (None, None) if outdated is None else (str(outdated["reason"]), str(outdated["code"]))
        return Ownership(is_owner(mode, stage), forwards, why, code)

    def insist(self) -> None:
        """Somebody promotes this node by force: what is here counts, whoever has gone on, and nobody is waited for.
        That lasts until something new is learnt: the link meets the same refusal again within seconds."""
        with self._commanding():
            record = self._record
            with self._judging:
                former = (record.outdated, record.overruled, record.kept_back)
                if record.outdated is not None:
                    record.overruled = sorted({*record.overruled, record.outdated["code"]})
                record.outdated, record.kept_back = None, False
            try:
                self._save()
            except BaseException:
                record.outdated, record.overruled, record.kept_back = former
                raise
            self.admission.alone()

    def go_on_alone(self) -> None:
        """As `insist`, of a node that is not outdated. Without waiting for a command."""
        self.admission.alone()
        self._forget_kept_back()

    def _forget_kept_back(self) -> None:
        """A kill before that is saved: the guest stands still again."""
        if self._record.kept_back:
            self._record.kept_back = False
            self._save_later()

    def set_role(
        self, primary: bool, peer: str | None, force: bool, lossless: bool = False, fenced: bool = False
    ) -> None:
        """replication-set-role."""
        if primary:
            if lossless:
                raise CommandError("Parameter 'lossless' is for role 'secondary'")
            if peer is not None:
                try:
                    check_uri(peer, len(self._options.disks))
                    peer = absolute(peer, self._options.folder)
                except ConfigError as error:
                    raise CommandError(f"Parameter 'peer': {error}") from error
            self._promotion.to_primary(peer, force, fenced)
        elif peer is not None or force:
            raise CommandError("Parameters 'peer' and 'force' are for role 'primary'")
        elif fenced:
            raise CommandError("Parameter 'fenced' is for role 'primary'")
        else:
            self._promotion.to_secondary(lossless)

    def _accepted(self) -> None:
        """A secondary takes this primary's writes, so it has not gone on from them. What somebody has told this node
        stays: it may be about to."""
        record = self._record
        with self._judging:
            over = record.outdated is not None and record.outdated["code"] in _OF_PEER
            known = over or bool(record.overruled)
            if over:
                record.outdated = None
            record.overruled = []
        self.admission.accepted()
        if known:
            try:
                self._save()
            except StateError as error:
                log(f"that this node is outdated no longer is not saved yet: {error}")
                self._save_later()

    def resume_io(self, fenced: bool = False) -> None:
        """replication-resume-io: a person, or a manager that has `fenced` the other node, lets the guest go on. Without
        waiting for a command."""
        stood = self.admission.still.why is not None
        if self.passing is not None:
            self.passing.release()
        self.admission.resume(fenced)
        self._forget_kept_back()
        if fenced or stood:
            return  # whoever says that has looked at the other node, not at who was attached here
        count = self.guests.forgive()
        if count:
            log(f"{count} guests are let in again whose disk has become another one")
            self._save_later()  # a kill before that: they are kept out again

    def renew(self) -> float:
        """replication-renew: for how many seconds the primary may go on, as the cluster says to either node."""
        era = self.tenure.era  # before: whoever takes the disks after this look changes it
        if isinstance(self.side, SecondarySide) and self.stage is Stage.RUNNING:
            return self.tenure.renew(era)
        return self.admission.renew()

    def heard(self, channel: Channel) -> None:
        """A primary has asked something on its control connection. DiskError if it must not be answered."""
        self.tenure.heard(channel.era, channel.paired)
        channel.note()

    def suspend_io(self, timeout_s: float) -> None:
        """replication-suspend-io: the requests of this secondary's guest are not passed on for so long, or until it is
        resumed; 0 ends that, and nothing else for which a guest may stand still, whoever owns the disks now. Without
        waiting for a command."""
        if self.passing is None:
            raise CommandError("Only a node with follow-owner=true passes requests on", reason=Reason.WRONG_MODE)
        if not timeout_s:
            self.passing.release()
            return
        if is_owner(self._record.mode, self._record.stage):
            raise CommandError("This node owns its disks: nothing is passed on", reason=Reason.WRONG_STAGE)
        self.passing.hold(timeout_s)

    def compare(self, lineage: Lineage) -> dict[str, Any]:
        """replication-compare: how this node's content is to one of that lineage."""
        mine = self._ancestry.lineage
        relation, common = compare(mine, lineage)
        return {
            "relation": relation.value,
            "generation": mine.current,
            "other": lineage.current,
            "common": common or None,
        }

    def query_role(self) -> dict[str, Any]:
        """query-role."""
        record, lineage, standing = self._record, self._ancestry.lineage, self.admission.standing
        suspended = {} if standing is None else {"guest-suspended-reason": standing}
        return judge(
            Standing(
                mode=self.side.mode,
                stage=self.stage,
                inconsistent=record.inconsistent,
                outdated=None if record.outdated is None else str(record.outdated["reason"]),
                paired_before=bool(lineage.current or lineage.incoming),
                alone=not lineage.shared,
                met=self.side.met,
                in_step=self.side.in_step,
                checkpoint_age_s=self._state.checkpoint["age"],
                closed=self.admission.closed,
                suspended=None if standing is None else standing["reason"],
                passes_on=self.side.session is not None and self.passing is not None,
            )
        ).to_json() | {"peer-obstacle": self._promotion.obstacle, **suspended}

    def query_latency(self) -> dict[str, Any]:
        """query-replication-latency."""
        return {**self.gate.latency.to_json(), **self.side.query_latency()}

    def query_failover(self) -> dict[str, Any]:
        """query-failover."""
        return self.side.query_failover()

    def query_jobs(self) -> list[dict[str, Any]]:
        """query-jobs."""
        return self._jobs.query()

    def cancel_job(self, job_id: str) -> None:
        """job-cancel."""
        self._jobs.cancel(job_id)

    def dismiss_job(self, job_id: str) -> None:
        """job-dismiss."""
        self._jobs.dismiss(job_id)


def _agreed(_values: Mapping[str, str]) -> None:
    """Nobody has to be asked."""
