# SPDX-License-Identifier: BSD-3-Clause
"""Disks of a secondary that grow while they are in use.

What decides for each thing that is of the size of a disk:

guests, the primary     The size is told once a connection. Whoever has one goes on in the size that it was told, and
                        whoever connects anew gets the new one. The primary does so by itself (primary/growth.py).
last checkpoint         It stays valid up to the former end: the overlays grow with all that they hold. Of what is
                        behind it there has been no checkpoint, so nothing is preserved there, and hidden need not have
                        room for it, before the primary says that it has sent all (`Pairing.sync`). Until then the
                        guest here, and a failover, find there what the disk has by then. (Where the former end was
                        within a block of 4 KiB that an overlay holds, the rest of that block is zeroes.)
maps                    A secondary lacks nothing behind its former end (`lost`), and has not changed anything there by
                        itself (`changes`): all of that is its primary's to send, which marks it. An owner of disks
                        marks it as changed: whoever becomes its secondary gets it. So does a failover, or a planned
                        stop, of a node whose primary has not grown yet (`SecondarySide._enter`).
tests of a failover     A resize is refused while one runs. One that is just beginning is refused if the resize comes
                        first (rehearsals.py).
commit                  A resize is refused until it is over.
latched faults, epoch   Neither is of a size: they stay as they are.

In which order: everything that may fail is prepared beside what is in use, first what takes long, then, with the gate
closed, what must not change meanwhile. The record decides (record/growing.py). What is left can fail only where a file
cannot be renamed; then it is told, and the last checkpoint does not count any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from replication.errors import CommandError, ConfigError, DiskError
from replication.order.latency import RESIZE
from replication.order.pause import pause
from replication.reason import Reason
from replication.record.changes import CLEAN, MISSING
from replication.record.growing import Growing, Making
from replication.secondary.disk import SecondaryDisk
from replication.secondary.rehearsals import Rehearsals
from replication.side import Setting
from replication.sizes import names
from replication.stage import Stage

MAKE_S = 60.0
"""Longest wait for what is made beforehand, while which this node's other commands wait: qemu-img takes a fraction of a
second for each of the two overlays of a disk."""


class Growth:
    """Makes the disks of one secondary larger. Commands come one at a time."""

    def __init__(
        self, setting: Setting, disks: Sequence[SecondaryDisk], rehearsals: Rehearsals, lost: Callable[[str], bool]
    ) -> None:
        """`lost(why)` is called when the last checkpoint cannot be kept."""
        self._set = setting
        self._disks = disks
        self._rehearsals = rehearsals
        self._lost = lost
        self._making = Making()
        self.era = 0
        """Odd while files take the places of former ones: what is found at their names then says nothing."""

    def grow(self, sizes: Mapping[str, int]) -> None:
        """Give disks these sizes, where they are larger than what they have. CommandError or StateError, with nothing
        changed, or saying what has."""
        growing = [disk for disk in self._disks if sizes.get(disk.name, 0) > disk.size]
        if not growing:
            return
        self._check()
        maps = Growing(self._set.state, self._set.record, self._set.save)
        own = self._set.record.stage is Stage.DONE

        def make() -> None:
            # A state folder that does not answer shows here, where everybody goes on, a failover too.
            self._set.save()
            for disk in growing:
                size = sizes[disk.name]
                if disk.stack is not None:
                    disk.stack.prepare_growth(size)
                maps.prepare(disk.name, "lost", size, disk.lost, CLEAN)
                maps.prepare(disk.name, "changes", size, disk.changes, MISSING if own else CLEAN)
                maps.prepare(disk.name, "unflushed", size, disk.disk.unflushed, 0)
                if disk.stack is not None:
                    disk.stack.copy_words(ahead=True)
            pause("resize.making")

        def drop() -> None:
            maps.drop()
            for disk in growing:
                if disk.stack is not None:
                    disk.stack.drop_growth()

        try:
            self._making.run(self._set.gate.urgency, make, drop, MAKE_S)
            pause("resize.made")
            self._exchange(growing, sizes, maps, drop)
        except (ConfigError, DiskError) as error:
            raise CommandError(f"cannot grow: {error}", reason=Reason.STORAGE) from error

    def _exchange(
        self,
        growing: Sequence[SecondaryDisk],
        sizes: Mapping[str, int],
        maps: Growing,
        drop: Callable[[], None],
    ) -> None:
        entered = False
        try:
            with self._set.gate.closed(why=RESIZE):
                self._check()  # a test that was being made has begun meanwhile
                for disk in growing:
                    if disk.stack is not None:
                        disk.stack.copy_words()
                pause("resize.prepared")
                maps.enter({disk.name: sizes[disk.name] for disk in growing})
                entered = True
                self.era += 1
                try:
                    self._follow(growing, sizes, maps)
                finally:
                    self.era += 1
        finally:
            if not entered:
                drop()

    def _check(self) -> None:
        stage = self._set.record.stage
        if stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED):
            raise CommandError(
                "The commit after failover is not over: try again in stage done", reason=Reason.COMMITTING
            )
        tests = self._rehearsals.names
        if tests:
            raise CommandError(
                f"A test of a failover runs ({names(tests)}), which is of the present size: end it first",
                reason=Reason.TEST_EXISTS,
            )

    def _follow(self, growing: Sequence[SecondaryDisk], sizes: Mapping[str, int], maps: Growing) -> None:
        """The record says so. The gate is closed."""
        failure: DiskError | None = None
        try:
            maps.finish()
        except DiskError as error:
            failure = error
        for disk in growing:
            former = disk.size
            disk.grow(sizes[disk.name])
            if self._set.record.stage is Stage.DONE:
                disk.changes.mark(former, disk.size - former)  # with the rest of the grain in which the end was
            try:
                if disk.stack is not None:
                    disk.stack.grow(disk.size)
            except DiskError as error:
                failure = failure or error
                self._lost(f"the overlays of disk '{disk.name}' could not grow with it: {error}")
                self._set.show()
        if failure is not None:
            raise CommandError(
                f"The disks have grown, but {failure}: the next process may need all of them anew",
                reason=Reason.STORAGE,
            )
