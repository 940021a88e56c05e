# SPDX-License-Identifier: BSD-3-Clause
"""The state folder's half of a resize: the maps of the disks that grow, and the record of their sizes.

    prepare     each map is made anew, larger, beside the one that counts (grainfile.GROWN)
    enter       the record has the new sizes: the one instant at which the disks have grown
    finish      the new maps take the place of the former ones

What a process finds that was killed in between, or a power cut has ended: before `enter` the former size, with the
former maps; after it the new size, with the new maps. Threads that do not pass the gate (a look at the disks, answers
of the secondary) mark in the former ones until `finish`, so whichever counts, what the other one marks is marked, too
(grainfile.settle_grown).
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from replication.disk.unflushed import GRAIN, Unflushed
from replication.errors import CommandError, DiskError
from replication.order.pause import pause
from replication.order.urgency import Urgency
from replication.reason import Reason
from replication.record.changes import MISSING, ChangeMap
from replication.record.grainfile import GrainFile
from replication.record.state import Record, StateFolder


class _Made(NamedTuple):
    """A map that was made anew."""

    disk: str
    kind: str
    size: int
    fresh: GrainFile | mmap.mmap
    former: ChangeMap | Unflushed | None
    """Who uses it; None: nobody at present."""
    marked: bool


class Making:
    """What takes as long as the storage does, in a thread that a failover does not wait for. Who throws away what was
    made is one of the two only."""

    def __init__(self) -> None:
        # Protects the two. Never held across I/O.
        self._lock = threading.Lock()
        self._at_work = self._given_up = False

    def run(
        self, urgency: Urgency, make: Callable[[], None], drop: Callable[[], None], within_s: float | None = None
    ) -> None:
        """`make()`, or whatever it raises; CommandError when a failover comes first, or `within_s` seconds are over. If
        nothing comes of it, `drop()` is called, at once or when that thread has ended."""
        with self._lock:
            if self._at_work:
                raise CommandError("What a former resize was making is not ready yet: try again", reason=Reason.BUSY)
            self._at_work, self._given_up = True, False

        def work() -> None:
            try:
                make()
            finally:
                with self._lock:
                    alone = self._given_up
                    self._at_work = alone
                if alone:
                    drop()
                    with self._lock:
                        self._at_work = False

        try:
            urgency.run(work, within_s, name="resize")
        except BaseException:
            with self._lock:
                ended = not self._at_work
                self._given_up = True
            if ended:
                drop()
            raise


class Growing:
    """The growth of some disks of one node. From `enter` on the gate is closed."""

    def __init__(self, state: StateFolder, record: Record, save: Callable[[], None]) -> None:
        """`save` makes the record last; StateError."""
        self._state = state
        self._record = record
        self._save = save
        self._made: list[_Made] = []
        # The record could not be saved in time: a process that follows may find it all the same.
        self._late = False

    def prepare(self, disk: str, kind: str, size: int, former: ChangeMap | Unflushed | None, fill: int) -> None:
        """Make room for a map: `kind` as in StateFolder.open_map, `fill` the state of what is new. ConfigError or
        DiskError; then, as for whatever fails before `enter`, `drop` is to follow."""
        if isinstance(former, ChangeMap):
            former.flush()  # a map that has no room for what it says now is not made larger
        fresh = self._state.grow_map(disk, kind, size, fill)
        if fresh is None:
            return
        if fill == MISSING and isinstance(former, ChangeMap) and former.size % GRAIN and isinstance(fresh, GrainFile):
            # The rest of the grain in which the end was is new, also for a process that follows a kill after `enter`.
            try:
                fresh.mapped.put(former.size // GRAIN, bytes((MISSING,)))
                fresh.mapped.flush()
            except OSError as error:
                fresh.drop()
                raise DiskError.from_os(f"writing {fresh.path}", error) from error
        self._made.append(_Made(disk, kind, size, fresh, former, fill == MISSING))

    def drop(self) -> None:
        """Nothing comes of it: everything is as it was."""
        made, self._made = self._made, []
        for each in made:
            if isinstance(each.fresh, GrainFile):
                each.fresh.drop(keep=self._late)

    def enter(self, sizes: Mapping[str, int]) -> None:
        """The disks have these sizes from now on, whatever becomes of this process. StateError, with nothing changed:
        but for the files, since what could not be saved in time may still be saved late."""
        record = self._record
        former = (record.disks, record.former_disks)
        grown = {name: record.disks[name] for name, size in sizes.items() if record.disks.get(name, size) != size}
        record.disks = {**record.disks, **sizes}
        record.former_disks = {**grown, **record.former_disks}
        try:
            self._save()
        except BaseException:
            record.disks, record.former_disks = former
            self._late = True
            raise
        pause("resize.entered")

    def finish(self) -> None:
        """The new maps count. DiskError: the next process may find everything to be sent."""
        made, self._made = self._made, []
        failure: OSError | None = None
        for each in made:
            whole = True
            if isinstance(each.former, ChangeMap):
                whole = each.former.grow(each.fresh, each.size, each.marked)
            elif isinstance(each.former, Unflushed):
                mapped = each.fresh.mapped if isinstance(each.fresh, GrainFile) else None
                grains = each.fresh if isinstance(each.fresh, mmap.mmap) else each.fresh.mapped.map
                each.former.grow(each.size, grains, None if mapped is None or mapped.in_place else mapped.keep)
                if isinstance(each.fresh, GrainFile):
                    each.former.closed = each.fresh.close
            try:
                self._state.replace_map(each.disk, each.kind, each.size, each.fresh, whole)
            except OSError as error:
                failure = failure or error
                continue
            if whole and isinstance(each.former, ChangeMap):
                each.former.named()
            elif each.former is None and isinstance(each.fresh, GrainFile):
                each.fresh.close()
        if failure is not None:
            raise DiskError.from_os("renaming a map of the state folder", failure)
