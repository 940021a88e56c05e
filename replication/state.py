# SPDX-License-Identifier: BSD-3-Clause
"""The state folder: everything that outlives the process.

    lock            held by the process that uses the folder
    state.json      the Record below, replaced as a whole
    epoch           one mapped page: the checkpoint in progress or last completed
    NAME.changes    the primary's change map (changes.py)
    *.qcow2 *.data  default overlays

Invariants
* state.json is replaced by rename after it was synced: a reader finds the old or the new record, whole.
* The epoch word is one aligned 64-bit store, epoch * 2 + (1 while overlays are being emptied): a kill leaves the
  checkpoint either not begun, or to be finished by the next process before it serves anything. It cannot fail,
  unlike a file operation, so a checkpoint never ends half done for want of space.

Without a folder (`state` not given) the same calls keep everything in memory.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass, field, fields
from typing import Any

from replication.errors import ConfigError, ReplicationError
from replication.fault import Fault
from replication.stage import Mode, Stage

_FORMAT = 1
_PAGE = 4096
_FILE_MAX = 1 << 20


class StateError(ReplicationError):
    """The record could not be made to last; nothing has changed."""


@dataclass
class Record:
    """What a process must know when it is started again."""

    mode: Mode
    stage: Stage = Stage.NONE
    backup: str = "running"
    """Copy-before-write: "running", or why it has ended ("cancelled", "failed")."""
    secondary: str | None = None
    """URI of the secondary, when a command has replaced the one of the command line."""
    fault: dict[str, Any] | None = None
    disks: dict[str, int] = field(default_factory=dict)
    """Name and size of every disk; the next process must have the same."""

    def to_json(self) -> dict[str, Any]:
        shown = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"format": _FORMAT, **shown, "mode": self.mode.value, "stage": self.stage.value}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Record:
        """Raises KeyError, TypeError or ValueError for anything that `to_json` has not written."""
        if saved.pop("format") != _FORMAT:
            raise ValueError("unknown format")
        record = cls(**{**saved, "mode": Mode(saved["mode"]), "stage": Stage(saved["stage"])})
        if not isinstance(record.backup, str):
            raise TypeError("backup is not a text")
        if not isinstance(record.secondary, str | None):
            raise TypeError("secondary is not a text")
        if record.fault is not None:
            Fault.from_json(record.fault)
        if not isinstance(record.disks, dict) or not all(type(size) is int for size in record.disks.values()):
            raise TypeError("disks is not a table of sizes")
        return record


class StateFolder:
    """One process's state, in a folder or, without one, in memory."""

    def __init__(self, path: str | None) -> None:
        """Create the folder if need be and claim it; ConfigError when another process has it."""
        self.path = path
        self._lock_fd = -1
        # Serializes saving. Held across the write of the state file, which no request waits for except one that
        # reports the first fault.
        self._saving = threading.Lock()
        if path is None:
            self._page = mmap.mmap(-1, _PAGE)
        else:
            try:
                os.makedirs(path, mode=0o700, exist_ok=True)
                self._lock_fd = os.open(self.file("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._page = self._map_page()
            except BlockingIOError as error:
                self.close()
                raise ConfigError(f"the state folder {path} is in use by another process") from error
            except OSError as error:
                self.close()
                raise ConfigError(f"cannot use the state folder {path}: {error.strerror}") from error
        self._words = memoryview(self._page).cast("Q")

    def _map_page(self) -> mmap.mmap:
        fd = os.open(self.file("epoch"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Written, not only truncated to size: a mapped hole on a full disk would kill the process.
            if os.fstat(fd).st_size != _PAGE:
                os.pwrite(fd, bytes(_PAGE), 0)
                os.fsync(fd)
            return mmap.mmap(fd, _PAGE)
        finally:
            os.close(fd)

    def file(self, name: str) -> str:
        """The path of a file in the folder."""
        assert self.path is not None
        return os.path.join(self.path, name)

    # -- record --------------------------------------------------------------------------------------------

    def load(self) -> Record | None:
        """The former process's record, None if there is none; ConfigError when it cannot be understood."""
        if self.path is None:
            return None
        path = self.file("state.json")
        try:
            with open(path, encoding="utf-8") as file:
                return Record.from_json(json.loads(file.read(_FILE_MAX)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not a state file of this program ({error}); move it away to start anew"
            ) from error

    def save(self, record: Record) -> None:
        """Make the record last, also over a power cut; StateError when it cannot."""
        if self.path is None:
            return
        path = self.file("state.json")
        with self._saving:
            try:
                with open(path + ".new", "w", encoding="utf-8") as file:
                    json.dump(record.to_json(), file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(path + ".new", path)
                folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except OSError as error:
                raise StateError(f"cannot write {path}: {error.strerror}") from error

    # -- epoch ---------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Number of the last checkpoint, begun or complete; 0 before the first."""
        return self._words[0] >> 1

    @property
    def emptying(self) -> bool:
        """Whether that checkpoint is still to be finished."""
        return bool(self._words[0] & 1)

    def begin_epoch(self) -> None:
        """From here on the next checkpoint will be finished, if not by this process then by the next, which begins
        the same one again."""
        if not self.emptying:
            self._words[0] = (self.epoch + 1) << 1 | 1

    def end_epoch(self, duration_s: float) -> None:
        """The checkpoint is complete."""
        self._words[1], self._words[2] = struct.unpack("QQ", struct.pack("dd", time.time(), duration_s))
        self._words[0] = self.epoch << 1

    @property
    def checkpoint(self) -> dict[str, float | None]:
        """Time (seconds since 1970) and duration (seconds) of the last complete checkpoint."""
        moment, duration_s = struct.unpack("dd", struct.pack("QQ", self._words[1], self._words[2]))
        return {"time": moment or None, "duration": duration_s if moment else None}

    def close(self) -> None:
        """Let the folder go."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
