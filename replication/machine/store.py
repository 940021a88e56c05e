# SPDX-License-Identifier: BSD-3-Clause
"""Host B's half: the states of a virtual machine, and which of them belongs to its disk.

A *unit* is the state of the machine and the checkpoint of its disk at one moment. They lie in two places, this store
and the plugin's overlays, and host A may die between any two steps. What decides is the number of the disk's last
checkpoint on B: one word, which the plugin changes in one store. So the order is

    1. state N is complete here, and the record names it as prepared; the state before is still there
    2. the disk takes checkpoint N: from this instant on unit N counts
    3. the record names state N as committed, and the state before is removed

    A dies before 2    the disk is at N-1, and so is the state that is committed
    A dies after 2     the disk is at N, and so is the state that is prepared, or committed by now

The other order would be as good for the choice, but with it a record could say of a unit that it is committed while it
is none. `Record.of` is the choice. It is made after the failover of the disk: then no checkpoint can be added.

A unit is known by its number alone; no clock says anything of it. That is enough because nbdkit of A gives no number
of an epoch that was held to another one, not even when it is started anew, and nbdkit of B says whether its checkpoint
is the one that A has asked for by its number (`checkpoint-of-primary`) or one of somebody on B.

A state is brought back once. Who goes on with it says so in the record, on stable storage, before the guest runs; and
one at a time does (`resuming`).

    Record      what is there, in one small file that is replaced by rename
    Store       the folder: the record and the files it names, nothing else outlives a start; at most two states

The record and the states outlive every process, not a power cut of B: for that A would have to be dead, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .monitor import FtError


@dataclass(frozen=True)
class Unit:
    """One state."""

    epoch: int
    file: str
    bytes: int
    prepared: float
    """When it was complete, in seconds since 1970, by B's clock; for people."""

    def check(self) -> None:
        """TypeError or ValueError when it is none."""
        if type(self.epoch) is not int or type(self.bytes) is not int or not isinstance(self.prepared, int | float):
            raise TypeError("a unit has numbers")
        if not isinstance(self.file, str) or Path(self.file).name != self.file:
            raise ValueError("a state outside the folder")


@dataclass(frozen=True)
class Record:
    """What is there."""

    committed: Unit | None = None
    prepared: Unit | None = None
    resumed: int | None = None
    """The number of the state with which a guest has gone on here. It has written since, so that state belongs to the
    disk no longer."""

    def of(self, epoch: int, asked: bool) -> Unit | None:
        """The state that belongs to the disk's checkpoint `epoch`; `asked`: A has asked for it by that number."""
        if self.committed is not None and self.committed.epoch == epoch:
            return self.committed
        return self.prepared if asked and self.prepared is not None and self.prepared.epoch == epoch else None

    @property
    def files(self) -> set[str]:
        """The names of all states."""
        return {unit.file for unit in (self.committed, self.prepared) if unit is not None}

    @classmethod
    def from_json(cls, text: str) -> Record:
        """FtError if it is none."""
        try:
            values = json.loads(text)
            units = {name: None if values[name] is None else Unit(**values[name]) for name in ("committed", "prepared")}
            for unit in units.values():
                if unit is not None:
                    unit.check()
            resumed = values.get("resumed")
            if resumed is not None and type(resumed) is not int:
                raise TypeError("resumed is a number")
            return cls(**units, resumed=resumed)
        except (ValueError, KeyError, TypeError) as error:
            raise FtError(f"the record of states cannot be read: {error}") from error


class Store:
    """The folder of one machine's states. One process at a time writes (`lock`); any may read `load`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "units.json"

    def lock(self) -> int:
        """Be the only one who writes, until the file descriptor that is returned is closed; FtError if there is one
        already. What an interrupted process has left half done is removed."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FtError(f"another ft-agent uses {self.folder}") from None
        self.sweep()
        return descriptor

    def sweep(self) -> None:
        """Remove the states that the record does not name."""
        named = self.load().files
        for path in self.folder.glob("*.state"):
            if path.name not in named:
                path.unlink()

    def load(self) -> Record:
        """The record; FtError if it cannot be read."""
        try:
            return Record.from_json(self._path.read_text())
        except FileNotFoundError:
            return Record()

    def save(self, record: Record) -> None:
        """Replace the record at one instant, and remove the states that it does not name any more."""
        self._replace(record, stable=False)
        self.sweep()

    def _replace(self, record: Record, stable: bool) -> None:
        partial = self._path.with_suffix(".partial")
        with open(partial, "w") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(json.dumps(asdict(record)))
            if stable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(self._path)
        if stable:
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def prepare(self, epoch: int, file: str, length: int) -> None:
        """Name a complete state as the one of the checkpoint that the disk is about to take."""
        self.save(replace(self.load(), prepared=Unit(epoch, file, length, time.time())))

    def commit(self, epoch: int) -> None:
        """The disk has taken it; FtError if the state is not there."""
        record = self.load()
        if record.prepared is None or record.prepared.epoch != epoch:
            raise FtError(f"state {epoch} is not prepared here")
        self.save(Record(committed=record.prepared))

    def abort(self) -> None:
        """What is prepared will never be committed: no checkpoint of the disk can get its number any more."""
        self.save(replace(self.load(), prepared=None))

    @contextlib.contextmanager
    def resuming(self) -> Iterator[None]:
        """Be the only one who brings a state back; FtError if there is one already."""
        descriptor = os.open(self.folder / "resuming", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FtError(f"another ft-agent brings a state of {self.folder} back") from None
            yield
        finally:
            os.close(descriptor)

    def resume(self, epoch: int) -> None:
        """A guest is about to go on with that state. On stable storage: the disk, on which that guest writes, may
        outlive a loss of power as well. FtError when one has gone on with it already."""
        record = self.load()
        if record.resumed == epoch:
            raise FtError(f"a guest has gone on with state {epoch} already")
        self._replace(replace(record, resumed=epoch), stable=True)

    def settle(self, epoch: int, asked: bool) -> None:
        """The disk's last checkpoint is known, and no other is on its way: what belongs to it is committed."""
        record = self.load()
        self.save(Record(committed=record.of(epoch, asked), resumed=record.resumed))
