# SPDX-License-Identifier: BSD-3-Clause
"""This node's lineage (lineage.py), and how it outlives the process.

Invariants
* Before a guest's write that the other node will not get changes a disk, the node is at a generation of its own
  (`part`). That costs the guest no I/O: the next generation's id stands in the record beforehand, and one store into a
  mapped word says that it counts.
* A guest's flush makes that word stable (`flush`), so a power cut never leaves a flushed write without its generation.
* Everything else that changes the lineage is saved before anybody acts on it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from replication.errors import DiskError
from replication.record.lineage import Lineage, new_id
from replication.record.state import Record, StateError, StateFolder

NOTE_S = 0.5
"""Longest wait of a command for another thread's store or save; a failover is answered within 2 seconds."""


class Ancestry:
    """The lineage of one node."""

    def __init__(self, state: StateFolder, record: Record, save: Callable[[], None]) -> None:
        """`save()` makes the record last; StateError."""
        self._state = state
        self._record = record
        self._save = save
        # Protects the lineage. Held across the save of the record (it is in the lock order above Keeper._writing) by
        # `become`, which gives way to a failover, and across one store by `part`; never across a flush. A guest's write
        # waits for it only when it is the first one after the nodes have parted.
        self._lock = threading.Lock()
        self._lineage = Lineage() if record.lineage is None else Lineage.from_json(record.lineage)
        record.next_generation = record.next_generation or new_id()
        # What a killed process has begun may be in memory only, and the guest's next flush is for its writes, too.
        self._unstable = state.moved_to == record.next_generation
        # How often `part` has begun a generation.
        self._parted = 0
        if self._unstable:
            self._note(self._lineage.moved(record.next_generation))
        self.shared = self._lineage.shared
        """Whether the next write that the other node does not get begins a new generation."""

    @property
    def lineage(self) -> Lineage:
        """As it is now. Without the lock, which may be held for as long as a storage takes: it is replaced as one."""
        return self._lineage

    @property
    def known(self) -> bool:
        """Whether the content has ever been part of a pair. Without a lock: for requests."""
        return bool(self._lineage.current or self._lineage.incoming)

    def part(self) -> None:
        """The guest is about to write what the other node will not get. Called from requests, before the disk
        changes; costs a comparison unless it is the first such write. DiskError (StateFolder.move_to says when)."""
        if not self.shared:
            return
        with self._lock:
            if self.shared:
                try:
                    self._state.move_to(self._record.next_generation)
                except StateError as error:
                    raise DiskError(str(error), errno.ENOSPC) from error
                self._unstable = True
                self._parted += 1
                self._lineage = self._lineage.moved(self._record.next_generation)
                self.shared = False

    def flush(self) -> None:
        """Make `part` stable; called with every flush of the guest. DiskError."""
        if not self._unstable:
            return
        with self._lock:
            parted = self._parted
        try:
            self._state.flush_page()
        except StateError as error:
            raise DiskError(str(error)) from error
        with self._lock:
            if self._parted == parted:  # else another one has been begun, which the flush may have missed
                self._unstable = False

    def become(self, change: Callable[[Lineage], Lineage]) -> Lineage:
        """Replace the lineage by `change(lineage)` and make it last; StateError, with nothing changed."""
        with self._lock:
            former = (self._lineage, self._record.lineage, self._record.next_generation)
            changed = change(self._lineage)
            if changed == self._lineage:
                return changed
            self._note(changed)
            try:
                self._save()
            except BaseException:
                self._lineage, self._record.lineage, self._record.next_generation = former
                raise
            self.shared = changed.shared
            self._unstable = False
            return changed

    def note(self, change: Callable[[Lineage], Lineage]) -> Callable[[], None]:
        """As `become`, for a caller that saves the record itself, with more in it, before anybody acts on it. Returns
        what takes it back, should that save fail. StateError when the storage of the state folder holds up whoever
        changes the lineage now."""
        if not self._lock.acquire(timeout=NOTE_S):
            raise StateError(f"the storage of the state folder has not answered for {NOTE_S:g} s")
        try:
            former = (self._lineage, self._record.lineage, self._record.next_generation, self.shared)
            self._note(change(self._lineage))
            self.shared = self._lineage.shared
        finally:
            self._lock.release()

        def take_back() -> None:
            with self._lock:
                self._lineage, self._record.lineage, self._record.next_generation, self.shared = former

        return take_back

    def _note(self, lineage: Lineage) -> None:
        """Fold what `part` has done into the record: with another next id, the mapped word says nothing any more."""
        if self._state.moved_to == self._record.next_generation:
            self._record.next_generation = new_id()
        self._lineage = lineage
        self._record.lineage = lineage.to_json()
