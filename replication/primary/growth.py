# SPDX-License-Identifier: BSD-3-Clause
"""Disks of a primary that grow while the guest writes, together with the secondary's.

    1. The secondary grows (secondary/growth.py), as far as its own disk and this node's allow. It tells its size.
    2. The link is let go: over it nothing may be written behind the end that the secondary had when it came up.
    3. This node grows, to the smaller of both. What is new is marked: it may hold anything, here and there.
    4. The link comes back by itself, in the new size, and a resync sends what is marked.

So nothing is ever written behind the secondary's end. What a kill, or the other side's death, leaves in between:
after 1 a secondary that is larger than its primary, which goes on as before (Pairing._check_disks) until the command is
given again; after 3 two disks of the new size. Each step is one of these or has not begun.

While the link is away the guest writes on, and what it writes is marked; with fencing=suspend-io it waits, as for any
other link that is away. An epoch that is held would be lost with the link, so a resize is refused. A comparison of the
disks ends. A pass of the resync that has begun in the former size may go on over the new link: of the grain in which
the end was it sends a part, so that stays marked (ChangeMap.watch). Guests see the new size when they connect anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from replication.errors import CommandError, ConfigError, DiskError
from replication.order.latency import RESIZE
from replication.order.pause import pause
from replication.primary.disk import PrimaryDisk
from replication.primary.epochs import Epochs
from replication.primary.link import Link
from replication.primary.peer import PeerError
from replication.reason import Reason
from replication.record.changes import CLEAN, MISSING
from replication.record.growing import Growing, Making
from replication.side import Setting
from replication.sizes import outcome, room_of, wanted
from replication.stage import Stage
from replication.uri import export_of

GROW_S = 90.0
"""Longest wait for the secondary, which gives itself less for its overlays (secondary/growth.py)."""


class Growth:
    """Makes the disks of one primary larger. Commands come one at a time."""

    def __init__(self, setting: Setting, disks: Sequence[PrimaryDisk], link: Link, epochs: Epochs) -> None:
        self._set = setting
        self._disks = disks
        self._link = link
        self._epochs = epochs
        self._making = Making()

    def resize(self, name: str | None, size: int | None) -> list[dict[str, object]]:
        """Side.resize."""
        local = {}
        for disk in self._disks:
            if disk.local is None:
                raise CommandError(
                    f"disk '{disk.name}' only forwards what is written: its size is that with which it was started"
                )
            local[disk.name] = (disk.size, disk.local)
        asked = wanted(local, name, size)
        running = self._set.record.stage is Stage.RUNNING
        there = self._ask_secondary(asked, size is not None) if running else {}
        former = {disk.name: disk.size for disk in self._disks}
        sizes = {each: min(size, there[each][0]) if running else size for each, size in asked.items()}
        self._grow([disk for disk in self._disks if sizes.get(disk.name, 0) > disk.size], sizes, running)
        return [
            outcome(
                disk.name,
                former[disk.name],
                disk.size,
                room_of(local[disk.name][1]),
                there[disk.name][1] if running else None,
            )
            for disk in self._disks
            if disk.name in asked
        ]

    def _ask_secondary(self, asked: Mapping[str, int], exact: bool) -> dict[str, tuple[int, int]]:
        """Step 1: by disk the size of the secondary's, and the bytes that there are below it. `exact`: nothing less
        will do. CommandError."""
        if self._epochs.held is not None:
            raise CommandError(
                f"Epoch {self._epochs.held} is held, and would be lost: commit or abort it first", reason=Reason.BUSY
            )
        if self._link.agreement is None:  # since a resize just before, say
            timeout_s = self._set.options.timeout_s
            self._set.gate.urgency.run(lambda: self._link.await_connected(timeout_s), name="await-link")
        agreement = self._link.agreement
        if agreement is None:
            raise CommandError("The secondary is not connected: it has to grow first", reason=Reason.PEER_UNREACHABLE)
        if agreement.peer is None:
            raise CommandError(
                f"{agreement.uri} is a plain NBD server, which cannot be told to grow: stop, grow both disks, then "
                "resize, then start"
            )
        theirs = {name: export_of(agreement.uri) or name for name in asked}
        arguments = {
            "token": agreement.token,
            "disks": {theirs[name]: size for name, size in asked.items()},
            "exact": exact,
        }
        try:
            answer = agreement.peer.call("replication-pair-resize", arguments, GROW_S)
            found = {name: (answer[theirs[name]]["size"], answer[theirs[name]]["room"]) for name in asked}
            if not all(type(number) is int and number >= 0 for pair in found.values() for number in pair):
                raise ValueError("its sizes are none")
        except PeerError as error:
            raise CommandError(f"The secondary does not grow: {error}", reason=error.reason) from error
        except DiskError as error:
            raise CommandError(
                f"It is not known whether the secondary has grown: {error}. Give the command again when it is there",
                reason=Reason.PEER_UNREACHABLE,
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise CommandError(f"The secondary is of another version: {error}") from error
        pause("resize.asked")
        return found

    def _grow(self, growing: Sequence[PrimaryDisk], sizes: Mapping[str, int], running: bool) -> None:
        """Steps 2 to 4. CommandError or StateError: this node has its former sizes, unless that says otherwise."""
        if not growing:
            return
        maps = Growing(self._set.state, self._set.record, self._set.save)

        def make() -> None:
            # A state folder that does not answer shows here, where the guest goes on.
            self._set.save()
            for disk in growing:
                assert disk.local is not None
                maps.prepare(disk.name, "changes", sizes[disk.name], disk.changes, MISSING)
                maps.prepare(disk.name, "unflushed", sizes[disk.name], disk.local.unflushed, 0)
                maps.prepare(disk.name, "lost", sizes[disk.name], None, CLEAN)
            pause("resize.mapping")

        try:
            self._making.run(self._set.gate.urgency, make, maps.drop)
            try:
                self._grow_parted(growing, sizes, maps, running)
            finally:
                maps.drop()  # what does not count by now
                if running:
                    self._link.resume()
        except (ConfigError, DiskError) as error:
            raise CommandError(f"cannot grow: {error}", reason=Reason.STORAGE) from error

    def _part(self) -> None:
        """Let the link go. The secondary is not told that this was all: the guest goes on, unless fencing=suspend-io
        has it wait for the link, as for any other that is away."""
        self._set.admission.cut_off()
        self._set.admission.tell()
        self._link.stop(self._set.options.timeout_s, 0.0, False)

    def _check_parted(self) -> None:
        """CommandError while something of the former link is under way, over which the former size counts."""
        timeout_s = self._set.options.timeout_s
        if not self._link.wait_unattempted(timeout_s) or not all(
            disk.forwarder.wait_down(timeout_s) for disk in self._disks
        ):
            raise CommandError("The former link has not ended yet: try again", reason=Reason.BUSY)

    @staticmethod
    def _finish(maps: Growing) -> None:
        try:
            maps.finish()
        except DiskError as error:
            raise CommandError(
                f"The disks have grown, but {error}: the next process may send all of them", reason=Reason.STORAGE
            ) from error

    def _grow_parted(
        self, growing: Sequence[PrimaryDisk], sizes: Mapping[str, int], maps: Growing, running: bool
    ) -> None:
        if running:
            self._part()
        pause("resize.parted")
        self._check_parted()
        with self._set.gate.closed(why=RESIZE):
            pause("resize.prepared")
            maps.enter({disk.name: sizes[disk.name] for disk in growing})
            for disk in growing:
                disk.grow(sizes[disk.name])
            self._finish(maps)
