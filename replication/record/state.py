# SPDX-License-Identifier: BSD-3-Clause
"""The state folder: everything that outlives the process.

    lock            held by the process that uses the folder
    state.json      the Record below; with state.json.twin it is overwritten in place (twin.py)
    epoch           one mapped page: the checkpoint in progress or last completed, its time and duration, the
                    generation that this node's own writes have begun (ancestry.py), the boot of the host in which
                    a primary has opened the folder, until it closes it, the boot-time clock of that checkpoint, and
                    what binds the files of the folder together (binding.py); until when the nodes were in sync
    NAME.changes    what the secondary may lack (changes.py); a secondary that is done keeps it, too
    NAME.lost       what a secondary's disk lacks of its primary's writes (changes.py)
    NAME.unflushed  what of a disk was written and not flushed (disk/unflushed.py)
    verify.json     what the last comparison of the disks has found (verified.py)
    test.json       what the last test of a failover has found (tested.py)
    *.qcow2 *.data  default overlays

Invariants
* All that records a transition has its space from the start: the record, the epoch page and the maps. With every file
  system of the host full a node that has started once starts, fails over, stops and goes on.
* A process finds the old or the new record, whole.
* A file that is missing, cut off, or not of this folder and its last process is not believed: everything may differ.
* The epoch word is one aligned 64-bit store, epoch * 2 + (1 while overlays are being emptied): a kill leaves the
  checkpoint either not begun, or to be finished by the next process before it serves anything. It cannot fail,
  unlike a file operation, so a checkpoint never ends half done for want of space.
* With `durability=power` (`durable`) the word is written and synced instead: begun before a bit goes from the images,
  complete after all have gone from stable storage. Between the two a power cut leads to the new checkpoint.

Without a folder (`state` not given) the same calls keep everything in memory, the maps over a change of role, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import struct
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from replication.disk import files
from replication.disk.mapped import MappedFile
from replication.disk.unflushed import GRAIN, Unflushed
from replication.errors import ConfigError, ReplicationError
from replication.fault import Fault
from replication.log import log
from replication.order.pause import pause
from replication.reason import Reason
from replication.record.binding import Binding, Doubts
from replication.record.boot import boot_clock_s, boot_id
from replication.record.changes import MISSING, ChangeMap
from replication.record.grainfile import GrainFile, settle_grown
from replication.record.guests import together
from replication.record.keeper import Keeper
from replication.record.lineage import Lineage, check_id, new_id
from replication.record.outdated import DEMOTED_TEXT, Outdated
from replication.record.twin import TwinFile
from replication.stage import Mode, Stage

_FORMAT = 1
_PAGE = 4096
_MOVED = 3
"""Which word of the epoch page names the generation that has been begun."""
_OPENED = 4
"""Which word of the epoch page stands for the boot in which a primary has opened the folder and not yet closed it."""
_TAKEN = 5
"""Which words of the epoch page have the boot-time clock of the last checkpoint, and the boot in which it ran."""
_HELD = 16
"""Which words of the epoch page have the number of the last epoch that a primary has cut to be held, and its boot."""
_ASKED = 18
"""Which word of the epoch page has the number of the last checkpoint if that is the primary's for it, else 0."""
_SYNCED = 19
"""Which word of the epoch page has the moment (seconds since 1970) until which the nodes were in sync."""
_UNKNOWN_HOLDS = 1 << 20
"""More epochs than a primary can have held since its page was last written out: 30 s."""
EPOCH_MAX = 1 << 62
"""So that the next ones fit into their word as well: 10^11 years of a checkpoint every second."""
FOREIGN_MAX = 1 << 48
"""Up to here the other node's number of an epoch is taken over. What is beyond it nobody has counted, and a number near
EPOCH_MAX, once taken over, would leave no room for the next ones: this node then counts by itself."""


def check_epoch(number: object) -> int:
    """The number of an epoch that came from elsewhere; ValueError unless it is one."""
    if type(number) is not int or not 0 <= number < EPOCH_MAX:
        raise ValueError("it is not the number of an epoch")
    return number


_COPY = ", after a copy of the disks and their overlays was made: only the state folder says what they hold together"


class StateError(ReplicationError):
    """The record could not be made to last; nothing has changed."""


class Promise(NamedTuple):
    """What is true when the checkpoint of that number has been begun: it is a valid one."""

    epoch: int
    lineage: dict[str, Any] | None
    """What the node descends from then, None if as before."""
    current: bool = False
    """It is not outdated any more then. (A record that does not say so yet: it stays so until the next checkpoint.)"""

    def to_json(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "lineage": self.lineage, "current": self.current}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Promise:
        """Raises KeyError, TypeError or ValueError for anything that `to_json` has not written."""
        promise = cls(**saved)
        if type(promise.epoch) is not int or not 0 < promise.epoch <= EPOCH_MAX:
            raise ValueError("promise has no epoch")
        if type(promise.current) is not bool:
            raise TypeError("current of promise is true or false")
        if promise.lineage is not None:
            Lineage.from_json(promise.lineage)
        return promise


@dataclass
class Record:
    """What a process must know when it is started again."""

    mode: Mode
    """The one it has now: a promoted secondary may have become a primary."""
    stage: Stage = Stage.NONE
    backup: str = "running"
    """Copy-before-write: "running", or why it has ended ("cancelled", "failed")."""
    secondary: str | None = None
    """URI of the secondary, when a command has replaced the one of the command line."""
    fault: dict[str, Any] | None = None
    disks: dict[str, int] = field(default_factory=dict)
    """Name and size of every disk; the next process must have the same."""
    promoted: bool = False
    """A primary that was a secondary, and whose command line says so."""
    boot: str | None = None
    """The host's boot in which the process ran (boot.py)."""
    durability: str = "process"
    """The key of that name with which the process ran."""
    clean: bool = False
    """The process has ended in good order, with everything on stable storage."""
    inconsistent: str | None = None
    """Why a secondary has no valid checkpoint, None when it has."""
    commit_rate: float | None = None
    """Bytes a second of the last commit."""
    node: str = field(default_factory=new_id)
    """Names this node to the others."""
    lineage: dict[str, Any] | None = None
    """Who wrote what since when (lineage.py)."""
    next_generation: str = ""
    """The id of the generation that the node's own next write begins (ancestry.py)."""
    partner: str | None = None
    """The node id of a running primary's secondary."""
    paired: bool = False
    """A primary writes to this secondary, or its link was lost in the midst of an epoch."""
    led: bool = False
    """A secondary that was started by its primary's checkpoint: the start of its own operator is still to come."""
    resync: bool = False
    """The secondary's disk lacks something of its primary's, which a resync is sending."""
    replaced: str | None = ""
    """What the command line said when a command gave `secondary`, empty if that is not known: one that says something
    else now is newer than the command."""

    offered: dict[str, Any] | None = None
    """The lineage that this secondary's content has from its next checkpoint on: its primary has said that everything
    was sent."""
    promise: dict[str, Any] | None = None
    """What becomes true with the next checkpoint (ledger.py)."""
    outdated: dict[str, Any] | None = None
    """That another node went on from what this one has (outdated.py)."""
    overruled: list[str] = field(default_factory=list)
    """Codes of why it was outdated, of which a person has said since that what is here counts all the same: what the
    link learns again of that is nothing new."""
    left_well: bool = False
    """A secondary's last primary has left in good order, after it had sent everything."""
    kept_back: bool = False
    """An owner that was stopped on the way to a secondary, and whose guest stood still: nobody has let it go on."""
    lease_s: float | None = None
    """Seconds for which a secondary's last primary serves its guest without having heard of it (lease.py)."""
    received: bool = False
    """A failover by force has ended a copy that a primary was sending here: that primary has what this node lacks."""
    sought: str | None = None
    """Whom an owner looks for, to make it its secondary: a URI, or, if empty, the one that the command line names."""
    guests: list[str] = field(default_factory=list)
    """Who was attached to the disks as they are, and whose disk is another one now (guests.py)."""
    guests_over: list[str] = field(default_factory=list)
    former_disks: dict[str, int] = field(default_factory=dict)
    """Of disks that have grown, the size that the other node's disk and the overlays here may still have."""
    identity: str = ""
    """Of the state folder, and the number of the opening in which it was saved (binding.py)."""
    opens: int = 0

    def as_secondary(self) -> Record:
        """An owner of disks that comes back as a secondary: what it knows of its content stays. If it was part of a
        pair, another one is the owner then, or will be, so it is outdated until it is resynchronised. What was taken
        of an unfinished copy descends from nothing, and is half of what that copy's primary has all the same."""
        outdated, lineage = self.outdated, self.lineage
        of_pair = self.received or (lineage is not None and (lineage["shared"] or lineage["history"]))
        if outdated is None and of_pair:
            outdated = Outdated(Reason.DEMOTED, DEMOTED_TEXT, time.time()).to_json()
        return replace(
            self,
            mode=Mode.SECONDARY,
            stage=Stage.NONE,
            backup="running",
            fault=None,
            secondary=None,
            replaced="",
            sought=None,
            partner=None,
            promoted=False,
            inconsistent=None,
            paired=False,
            led=False,
            resync=False,
            offered=None,
            promise=None,
            outdated=outdated,
            overruled=[],
            left_well=False,
            kept_back=False,
            lease_s=None,
            guests=[],
            guests_over=together(self.guests_over, self.guests),
        )

    def take(self, other: Record) -> None:
        """Become equal to another one, in place."""
        for item in fields(self):
            setattr(self, item.name, getattr(other, item.name))

    def as_primary(self) -> Record:
        """A promoted secondary whose command line says now what it is."""
        return replace(self, mode=Mode.PRIMARY, promoted=False)

    @property
    def cut_off(self) -> bool:
        """The host was restarted, and the process had not ended in good order before: what was not synced is gone."""
        return self.boot not in (None, boot_id()) and not self.clean

    def to_json(self) -> dict[str, Any]:
        shown = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"format": _FORMAT, **shown, "mode": self.mode.value, "stage": self.stage.value}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Record:
        """Raises KeyError, TypeError or ValueError for anything that `to_json` has not written."""
        written = saved.pop("format")
        if written != _FORMAT:
            raise ValueError(f"it has format {str(written)[:20]}, this version knows {_FORMAT}")
        record = cls(**{**saved, "mode": Mode(saved["mode"]), "stage": Stage(saved["stage"])})
        for name, kind in _KINDS.items():
            if not isinstance(getattr(record, name), kind):
                raise TypeError(f"{name} is of another type")
        if record.fault is not None:
            Fault.from_json(record.fault)
        for disks in (record.disks, record.former_disks):
            if not isinstance(disks, dict) or not all(type(size) is int for size in disks.values()):
                raise TypeError("disks is not a table of sizes")
        check_id("node", record.node)
        for name in ("next_generation", "identity"):
            if getattr(record, name):
                check_id(name, getattr(record, name))
        if type(record.opens) is not int or not 0 <= record.opens <= EPOCH_MAX:
            raise ValueError("opens is no number of an opening")
        for lineage in (record.lineage, record.offered):
            if lineage is not None:
                Lineage.from_json(lineage)
        if record.promise is not None:
            Promise.from_json(record.promise)
        if record.outdated is not None:
            Outdated.from_json(record.outdated)
        if not isinstance(record.overruled, list):
            raise TypeError("overruled is a list")
        for guests in (record.guests, record.guests_over):
            if not isinstance(guests, list) or not all(isinstance(guest, str) for guest in guests):
                raise TypeError("guests and guests_over are lists of names")
        for code in record.overruled:
            Reason(code)
        json.dumps(record.to_json(), allow_nan=False)  # what is shown as JSON may not be what JSON cannot say
        return record


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("backup", "durability", "node", "next_generation", "identity"), str),
    **dict.fromkeys(("secondary", "replaced", "sought", "boot", "inconsistent", "partner"), str | None),
    **dict.fromkeys(("promoted", "clean", "paired", "led", "resync", "left_well", "received", "kept_back"), bool),
    "commit_rate": float | None,
    "lease_s": float | None,
}


class StateFolder:
    """One process's state, in a folder or, without one, in memory."""

    def __init__(self, path: str | None, durable: bool = False) -> None:
        """Create the folder if need be and claim it; ConfigError when another process has it. `durable`: checkpoints
        are on stable storage."""
        self.path = path
        self._durable = durable
        self._lock_fd = -1
        self._epoch_fd = -1
        self._binding = Binding(self)
        # Until when the nodes were in sync, while they are (`note_sync`).
        self._synced: float | None = None
        # The words of _TAKEN of a former checkpoint, with the word of its time: who asks for the age while the next one
        # is being stored, or when that has failed, gets both of the same. Replaced as a whole.
        self._former: tuple[int, int, int] | None = None
        # Without a folder: the maps, by name.
        self._kept: dict[str, mmap.mmap] = {}
        self._file = None if path is None else TwinFile(self.file("state.json"))
        self._keeper = None if self._file is None else Keeper(self._file)
        self._epoch: MappedFile | None = None
        page = mmap.mmap(-1, _PAGE)
        if path is not None:
            try:
                _make_folder(path)
                self._lock_fd = files.create(self.file("lock"), 0)
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._epoch = self._map_page()
                page = self._epoch.map
                if durable:
                    # What a killed process has written may be in memory only, and counts as stable from here on.
                    files.fdatasync(self._epoch_fd)
            except BlockingIOError as error:
                self.close()
                raise ConfigError(f"the state folder {path} is in use by another process") from error
            except OSError as error:
                self.close()
                raise ConfigError(f"cannot use the state folder {path}: {error.strerror}") from error
        self._words = memoryview(page).cast("Q")
        if self.epoch > EPOCH_MAX or not all(math.isfinite(moment or 0.0) for moment in self.checkpoint.values()):
            self.close()
            raise ConfigError(f"{path}/epoch is not a file of this program; move it away to start anew{_COPY}")

    def _map_page(self) -> MappedFile:
        self._epoch_fd = files.create(self.file("epoch"), 0)
        if os.fstat(self._epoch_fd).st_size != _PAGE:
            files.never_copy_on_write(self._epoch_fd)
            os.ftruncate(self._epoch_fd, 0)
            os.pwrite(self._epoch_fd, bytes(_PAGE), 0)
            os.fsync(self._epoch_fd)
        return MappedFile(self._epoch_fd, _PAGE)

    def file(self, name: str) -> str:
        """The path of a file in the folder."""
        assert self.path is not None
        return os.path.join(self.path, name)

    # -- maps ----------------------------------------------------------------------------------------------

    def open_map(self, disk_name: str, kind: str, size: int) -> ChangeMap:
        """The map of that kind ("changes", "lost") of a disk of `size` bytes: the only way to one. All is marked where
        it is not believed (`take_doubts`). Without a folder it is what was kept of it in this process. ConfigError."""
        if self.path is None:
            kept = self._kept.setdefault(f"{disk_name}.{kind}/{size}", mmap.mmap(-1, max(-(-size // GRAIN), 1)))
            return ChangeMap(kept, size)
        return ChangeMap(self._grain_file(disk_name, kind, size, MISSING), size)

    def account_of(self, disk_name: str, size: int) -> Unflushed:
        """What of a disk of `size` bytes is unflushed: nothing where it is not believed (`take_doubts`). ConfigError"""
        if self.path is None or not size:
            return Unflushed(size)
        file = self._grain_file(disk_name, "unflushed", size, 0)
        mapped = file.mapped
        account = Unflushed(size, mapped.map, None if mapped.in_place else mapped.keep)
        account.closed = file.close
        return account

    def _grain_file(self, disk_name: str, kind: str, size: int, doubtful: int) -> GrainFile:
        path = self.file(f"{disk_name}.{kind}")
        settle_grown(path, -(-size // GRAIN))
        file = self._binding.open(path, disk_name, kind, -(-size // GRAIN), doubtful)
        try:
            self._binding.add(f"{disk_name}.{kind}")
        except OSError as error:
            raise ConfigError(f"cannot use the map {path}: {error.strerror}") from error
        except StateError as error:
            raise ConfigError(str(error)) from error
        return file

    def grow_map(self, disk_name: str, kind: str, size: int, fill: int) -> GrainFile | mmap.mmap | None:
        """Room for a map of a disk that is about to have `size` bytes, of which what is new has the state `fill`;
        `replace_map` or `drop` of it is to follow. None where there is no such map. ConfigError."""
        count = -(-size // GRAIN)
        if self.path is not None:
            return self._binding.grow(f"{disk_name}.{kind}", count, fill)
        grains = mmap.mmap(-1, max(count, 1))
        if fill:
            grains[:] = bytes((fill,)) * len(grains)
        return grains

    def replace_map(
        self, disk_name: str, kind: str, size: int, fresh: GrainFile | mmap.mmap, whole: bool = True
    ) -> None:
        """It counts from now on, under the name of the former one, if it is `whole`. OSError."""
        if isinstance(fresh, GrainFile):
            self._binding.replace(f"{disk_name}.{kind}", fresh, whole)
        else:
            self._kept[f"{disk_name}.{kind}/{size}"] = fresh

    def take_doubts(self) -> Doubts:
        """What was not believed of the record and the page, and of the maps opened since the last call."""
        return self._binding.take_doubts()

    def bind(self, record: Record, save: Callable[[], None], needed: bool) -> None:
        """Bind all that was opened to this process; once, before anything is served. `save()` saves the record, which
        is also done when it was saved before, or must be (`needed`). StateError (Binding.bind)."""
        twin = self._file
        if twin is None:
            return

        def saved() -> int:
            if needed or twin.found or self._binding.doubted:
                save()
            return twin.serial

        self._binding.bind(record, saved, needed)

    # -- record --------------------------------------------------------------------------------------------

    def load(self) -> Record | None:
        """The former process's record, None if there is none; ConfigError when it cannot be understood."""
        if self._file is None:
            return None
        path = self._file.path
        try:
            members = self._file.read()
            record = None if members is None else Record.from_json(members)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not a state file of this program ({error}); move it away to start anew{_COPY}"
            ) from error
        self._binding.examine(record, self._file.serial)
        return record

    def reserve(self, record: Record) -> None:
        """After `load`: take the room that `save` needs. Until the first one the file shows `record`. ConfigError when
        there is no room; where there was a record, that is only logged: saving may work again by then."""
        if self._file is None:
            return
        try:
            self._file.reserve(record.to_json())
        except OSError as error:
            said = f"cannot take room for {self._file.path}: {error.strerror}"
            if not self._file.found:
                raise ConfigError(said) from error
            log(f"{said}; the next change of stage needs it")

    def save(self, record: Record, deadline: float = math.inf, *, hasty: bool = False) -> None:
        """Make the record last as it is when its turn comes, also over a power cut; StateError when it cannot, or when
        its turn has not come by time.monotonic() `deadline`. `hasty`: or when it cannot be expected to last by then
        (keeper.py). Takes as long as the storage does."""
        if self._file is None or self._keeper is None:
            return
        try:
            self._keeper.write(record.to_json, deadline, hasty=hasty)
        except OSError as error:
            raise StateError(f"cannot write {self._file.path}: {error.strerror}") from error
        self._binding.note_saved(self._file.serial)

    # -- epoch ---------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Number of the last checkpoint, begun or complete; 0 before the first."""
        return self._words[0] >> 1

    @property
    def emptying(self) -> bool:
        """Whether that checkpoint is still to be finished."""
        return bool(self._words[0] & 1)

    def next_epoch(self, number: int = 0) -> int:
        """The number that `begin_epoch` would give."""
        return self.epoch if self.emptying else max(self.epoch + 1, _countable(number))

    def begin_epoch(self, number: int = 0) -> None:
        """From here on the next checkpoint will be finished, if not by this process then by the next, which begins
        the same one again. It gets the primary's `number`, if that is a later one than its own would be. StateError,
        with nothing changed, only when `durable`."""
        if not self.emptying:
            following = self.next_epoch(number)
            # Before: with the word of the epoch it is stored, stable and all.
            self.put_if_room(_ASKED, following if following == number else 0)
            self._store(0, following << 1 | 1)

    def end_epoch(self, duration_s: float) -> None:
        """The checkpoint is complete. StateError only when `durable`: the next process completes it again."""
        self._note_taken()
        self._store(1, *_clock(duration_s))
        self._store(0, self.epoch << 1)

    def count_epoch(self, duration_s: float, number: int = 0, joins: bool = False) -> None:
        """A primary's checkpoint, which empties nothing: it cannot fail, and a power cut may forget it. `number`: as
        the secondary counts it, if that is a later one; `joins`: it is the secondary's last one already."""
        self._note_taken()
        self.put_if_room(1, *_clock(duration_s))
        self.put_if_room(0, max(self.epoch + (not joins), _countable(number)) << 1)

    def count_from(self, number: int) -> None:
        """The next epoch comes after `number`, too: the other node has got so far."""
        if _countable(number) > self.epoch and not self.emptying:
            self._store(0, number << 1)

    @property
    def asked(self) -> bool:
        """Whether the last checkpoint has the number that its primary gave it: it is the one that was asked for by that
        number, and no other."""
        return self._words[_ASKED] == self.epoch

    def note_held(self, number: int) -> None:
        """An epoch of that number was cut to be held: whatever becomes of it, no other one gets its number."""
        self.put_if_room(_HELD, number, _boot_word())

    @property
    def last_held(self) -> int:
        """The highest number that an epoch can have had that was held; 0 when none was."""
        number = self._words[_HELD]
        if not 0 < number <= EPOCH_MAX:
            return 0
        return number if self._words[_HELD + 1] == _boot_word() else number + _UNKNOWN_HOLDS

    # -- in sync -------------------------------------------------------------------------------------------

    def note_sync(self, in_sync: bool) -> None:
        """Called a few times a second. Stored only when it ends, so that an idle pair writes nothing."""
        if in_sync:
            self._synced = time.time()
        elif self._synced is not None:
            synced, self._synced = self._synced, None
            self.put_if_room(_SYNCED, *struct.unpack("Q", struct.pack("d", synced)))

    @property
    def in_sync_until(self) -> float | None:
        """Seconds since 1970; None when it is not known ever to have been. A process that was killed in sync is known
        to have been until the last checkpoint of the pair."""
        (noted,) = struct.unpack("d", struct.pack("Q", self._words[_SYNCED]))
        known = [moment for moment in (noted, self._synced or 0.0) if math.isfinite(moment) and moment > 0]
        if self.asked and self.epoch and (taken := self.checkpoint["time"]) is not None:
            known.append(taken)
        return max(known, default=None)

    # -- a primary's host ----------------------------------------------------------------------------------

    @property
    def cut_off(self) -> bool:
        """The host was restarted while a primary had the folder open: what was not synced is gone. Unlike the record's,
        this is known of stage none as well, in which no record need have been saved."""
        return self._words[_OPENED] not in (0, _boot_word())

    def open_until_closed(self) -> None:
        """A primary begins to use its disks. StateError."""
        self.put(_OPENED, _boot_word())
        self.flush_page()

    def closed_well(self) -> None:
        """All of its maps and disks are on stable storage. StateError: it counts as cut off then."""
        self.put(_OPENED, 0)
        self.flush_page()

    # -- generation ----------------------------------------------------------------------------------------

    @property
    def moved_to(self) -> str:
        """The generation that this node's own writes have begun, as `move_to` has noted it last."""
        return f"{self._words[_MOVED]:016x}"

    def move_to(self, generation: str) -> None:
        """Note it: one store, which a kill does not undo. StateError when a copy of the folder shares the page's block
        and there is no room for another one (disk/mapped.py)."""
        self.put(_MOVED, int(generation, 16))

    def word(self, index: int) -> int:
        """A word of the epoch page."""
        return self._words[index]

    def write_words(self, index: int, *values: int) -> None:
        """Write words of the epoch page, for what a power cut must find in order (`flush_page`); StateError."""
        data = struct.pack(f"{len(values)}Q", *values)
        try:
            if files.pwritev(self._epoch_fd, [data], 8 * index) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StateError(f"cannot write {self.file('epoch')}: {error.strerror}") from error
        self._words[index : index + len(values)] = memoryview(array("Q", values))

    def flush_page(self) -> None:
        """Make `move_to`, say, stable; StateError."""
        if self._epoch_fd >= 0:
            try:
                files.fdatasync(self._epoch_fd)
            except OSError as error:
                raise StateError(f"cannot write {self.file('epoch')}: {error.strerror}") from error

    def _store(self, index: int, *values: int) -> None:
        if self._epoch_fd < 0 or not self._durable:
            self.put(index, *values)
            return
        former = self._words[index : index + len(values)].tobytes()
        try:
            files.pwritev(self._epoch_fd, [struct.pack(f"{len(values)}Q", *values)], 8 * index)
            pause("epoch.sync")
            files.fdatasync(self._epoch_fd)
            self._words[index : index + len(values)] = memoryview(array("Q", values))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._epoch_page().put(8 * index, former)
            raise StateError(f"cannot write {self.file('epoch')}: {error.strerror}") from error

    def put(self, index: int, *values: int) -> None:
        """Store words, each at once; StateError when there is no room (disk/mapped.py), with nothing changed."""
        for at, value in enumerate(values, index):
            if self._epoch is not None:
                try:
                    self._epoch.keep(8 * at, struct.pack("Q", value))
                except OSError as error:
                    raise StateError(f"cannot write {self.file('epoch')}: {error.strerror}") from error
            self._words[at] = value

    def put_if_room(self, index: int, *values: int) -> None:
        """As `_put`, for what the next process may do without."""
        try:
            self.put(index, *values)
        except StateError:
            self._words[index : index + len(values)] = memoryview(array("Q", values))

    def _epoch_page(self) -> MappedFile:
        assert self._epoch is not None
        return self._epoch

    def check(self) -> None:
        """At times, with each checkpoint: StateError when a file of the folder was removed or replaced while in use.
        Takes blocks of their own for them where a copy of the folder shares them."""
        if self._file is None or self._epoch is None:
            return
        at = self.file("epoch")
        try:
            self._epoch.check(at)
            self._epoch.own_blocks()
            at = self._file.path
            self._file.check()
            at = ""
            self._binding.check()
        except OSError as error:
            at = at or str(error.filename)
            raise StateError(f"{at} was removed or replaced while in use") from error

    @property
    def checkpoint(self) -> dict[str, float | None]:
        """Time (seconds since 1970), duration and age (seconds) of the last complete checkpoint. The age is not the
        time's distance from now when the wall clock was set meanwhile (`_age_s`), and never another checkpoint's."""
        taken, word = self._words[_TAKEN], self._words[1]
        while taken != self._words[_TAKEN]:  # another checkpoint was complete in between
            taken, word = self._words[_TAKEN], self._words[1]
        former = self._former
        if former is None or former[0] != word:
            former = (word, taken, self._words[_TAKEN + 1])
        moment, duration_s = struct.unpack("dd", struct.pack("QQ", word, self._words[2]))
        age_s = _age_s(moment, *former[1:]) if moment else None
        return {"time": moment or None, "duration": duration_s if moment else None, "age": age_s}

    def _note_taken(self) -> None:
        """Never synced: in another boot nobody looks at it."""
        if self._former is None or self._former[0] != self._words[1]:  # else one that could not be stored was here
            self._former = (self._words[1], self._words[_TAKEN], self._words[_TAKEN + 1])
        (taken,) = struct.unpack("Q", struct.pack("d", boot_clock_s()))
        self.put_if_room(_TAKEN, taken, _boot_word())

    def close(self, good: bool = False) -> None:
        """Let the folder go; `good`: the process ends in good order."""
        if self._epoch is not None:
            self.note_sync(False)
        if good and self._epoch is not None:
            self._binding.close()
        if self._file is not None:
            self._file.close()
        if self._epoch is not None:
            self._words.release()
            self._epoch.close()
            self._epoch = None
        for fd in (self._epoch_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._epoch_fd = self._lock_fd = -1


def _countable(number: int) -> int:
    """The other node's number, 0 where it is beyond what anybody has counted."""
    return number if number <= FOREIGN_MAX else 0


def _make_folder(path: str) -> None:
    """For its owner alone, whatever the umask. One that is there is somebody's choice; what it means is said."""
    try:
        os.makedirs(path, mode=0o700)
        os.chmod(path, 0o700)
    except FileExistsError:
        files.warn_of_others("the state folder", path)


def _boot_word() -> int:
    return int.from_bytes(hashlib.blake2b(boot_id().encode(), digest_size=8).digest(), "little") | 1


def _age_s(moment: float, taken_word: int, boot_word: int) -> float:
    """How old the checkpoint of `moment` (seconds since 1970) is: within a boot by the clock that nobody sets, after
    another boot, of which only the wall clock tells anything, by that."""
    if boot_word == _boot_word():
        (taken_s,) = struct.unpack("d", struct.pack("Q", taken_word))
        return max(0.0, boot_clock_s() - float(taken_s))
    return max(0.0, time.time() - moment)


def _clock(duration_s: float) -> tuple[int, int]:
    """Now and a duration, both in seconds, as words."""
    moment, duration = struct.unpack("QQ", struct.pack("dd", time.time(), duration_s))
    return moment, duration
