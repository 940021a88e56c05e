# SPDX-License-Identifier: BSD-3-Clause
"""Space in the overlays' file systems: noticed while it goes, given back, and found where a write has none.

Who decides when a write meets this stands in stack.py.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from replication.disk.face import Disk
from replication.disk.file import FileDisk
from replication.disk.files import Buffer
from replication.errors import DiskError
from replication.image.frozen import Frozen
from replication.image.layer import Layer, LayerError
from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER
from replication.image.shortage import WAIT_S, Shortage, Source
from replication.order.rangelock import RangeLock


class Room:
    """The space that one disk's overlays take."""

    def __init__(self, active: Overlay, hidden: Overlay, top: RangeLock, below: RangeLock) -> None:
        """`top` orders the writes to active, `below` those to hidden."""
        self._active = active
        self._hidden = hidden
        self._top = top
        self._below = below
        self.committing = False
        """From its beginning bits go while their data is still being read, so nothing may be given back."""
        self.grown: Callable[[Overlay], None] = _unwatched
        """Called when an overlay has grown to its `watch_at`; says when to look again."""
        self.sources: list[Source] = [(active, self.reclaim_some), (hidden, self.reclaim_some)]
        self.shortage = Shortage(self.sources)
        """Where a write that finds no room looks for it: here, or wherever else it may help."""
        self.tests: tuple[Frozen, ...] = ()
        """The tests of this disk, which have to keep what an overlay or the disk is about to lose. One more comes while
        the gate is closed."""
        self.sacrifice: Callable[[int, str], int] = _nothing_left
        """Called when a write to a file has found no room, with the number of its file system (st_dev) and its path:
        ends the tests that hold some there, and says how many it has ended so far in all."""
        self._sacrificed = 0
        for overlay in (active, hidden):
            overlay.relieve = partial(self._relieve, overlay)

    def keep_disk(self, spans: Sequence[tuple[int, int]]) -> None:
        """The secondary disk is about to change in these ranges of bytes, whose whole blocks `below` holds."""
        for test in self.tests:
            for start, stop in spans:
                test.keep_disk(start // BLOCK, -(-stop // BLOCK))

    def keep(self, overlay: Overlay, first: int, last: int) -> None:
        """The data of an overlay is about to change in blocks [first, last). The range of its writers is held."""
        for test in self.tests:
            test.keep(overlay, first, last)

    def reclaim_some(self, overlay: Overlay, ranges: Iterator[tuple[int, int]], steps: int) -> int | None:
        """Give back stale space of up to `steps` ranges out of `overlay.stale_ranges()`; the bytes, None when there are
        no more ranges.

        Never waits for a range, so that a writer that has run out of space may call it while it holds one.
        """
        lock = self._top if overlay is self._active else self._below
        freed = 0
        for first, last in itertools.islice(ranges, steps):
            freed += self._reclaim_unheld(overlay, lock, first, last, (BLOCKS_PER_CLUSTER, 1))
            steps -= 1
        return freed if not steps else None

    def reclaim_in_background(self, overlay: Overlay, ranges: Iterator[tuple[int, int]], steps: int) -> int | None:
        """The same for who is in no hurry."""
        return self.shortage.in_background(partial(self.reclaim_some, overlay, ranges, steps))

    def _reclaim_unheld(self, overlay: Overlay, lock: RangeLock, first: int, last: int, units: tuple[int, ...]) -> int:
        """Reclaim what nobody holds of blocks [first, last): all at once, or else in ever smaller units."""
        held = lock.try_acquire(first * BLOCK, last * BLOCK)
        if held is not None:
            try:
                return self._reclaim_held(overlay, first, last)
            finally:
                lock.release(held)
        if not units:
            return 0
        return sum(
            self._reclaim_unheld(overlay, lock, start, min(start + units[0], last), units[1:])
            for start in range(first, last, units[0])
        )

    def _relieve(self, overlay: Overlay) -> bool:
        before = self._sacrificed
        try:
            if self.committing:
                return False
            ended = self._do_without(overlay.data, overlay.path)
            return self.shortage.relieve() or ended != before
        except (DiskError, OSError):  # what is stale cannot be given back
            return False

    def _reclaim_held(self, overlay: Overlay, first: int, last: int) -> int:
        """Reclaim what no test needs of blocks [first, last), whose range is held."""
        tests = self.tests
        if not tests:
            return overlay.reclaim(first, last)
        runs = [(first, last)]
        for test in tests:
            runs = [free for run in runs for free in test.unneeded(overlay, *run)]
        return sum([overlay.reclaim(start, stop) for start, stop in runs])

    def write_again(
        self, overlay: Overlay, layer: Layer, pieces: Sequence[Buffer], offset: int, length: int, failure: DiskError
    ) -> None:
        """Write to an overlay again what has failed: when its file system is full, after room was made. LayerError."""
        again = self._again(overlay.data, overlay.path, lambda: overlay.data.write(pieces, offset), failure)
        if again is not None:
            raise LayerError(again, layer, "write", offset, length) from again

    def change_again(
        self, disk: Disk, change: Callable[[], None], operation: str, offset: int, length: int, failure: DiskError
    ) -> None:
        """The same for a change of the secondary disk; only a file has a file system that others share. LayerError."""
        again: DiskError | None = failure
        if isinstance(disk, FileDisk):
            again = self._again(disk, disk.location, change, failure)
        if again is not None:
            raise LayerError(again, Layer.SECONDARY, operation, offset, length) from again

    def _again(self, file: FileDisk, path: str, change: Callable[[], None], failure: DiskError) -> DiskError | None:
        """Do again what has failed for want of room in the file system of `file`: first tests end that hold some there,
        then what no overlay needs any more is given back; for WAIT_S at most. Once in any case: others may have given
        back the last of it since. Why it fails in the end, None if it has been done."""
        deadline = time.monotonic() + WAIT_S
        ended = 0  # those that somebody has ended since the first try count as well
        again = False
        try:
            while failure.full and not self.committing:
                before, ended = ended, self._do_without(file, path)
                if not self._given_back(file) and ended == before and again:
                    break
                again = True
                try:
                    change()
                    return None
                except DiskError as error:
                    failure = error
                if time.monotonic() >= deadline:
                    break
        except DiskError as error:  # what is stale cannot be given back
            failure = error
        except OSError as error:
            failure = DiskError.from_os(f"looking for room for {path}", error)
        return failure

    def _given_back(self, file: FileDisk) -> bool:
        return self.shortage.covers(file.status().st_dev) and self.shortage.relieve()

    def _do_without(self, file: FileDisk, path: str) -> int:
        """End the tests that hold room in the file system of `file`; how many have been ended so far. OSError."""
        ended = self.sacrifice(file.status().st_dev, path)
        if ended != self._sacrificed:
            self._sacrificed = ended
            self.shortage.look_again()
        return ended


def _nothing_left(_device: int, _path: str) -> int:
    return 0


def _unwatched(overlay: Overlay) -> None:
    overlay.watch_at = sys.maxsize
