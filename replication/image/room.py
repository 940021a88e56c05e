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
        self.sacrifice: Callable[[Overlay], bool] = _nothing_left
        """Called when a write to an overlay has found no room: ends a test, and says whether there was one whose end
        makes room."""
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
        try:
            return not self.committing and (self.shortage.relieve() or self._do_without(overlay))
        except DiskError:  # what is stale cannot be given back
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
        """Write to an overlay again what has failed: when its file system is full, after what no overlay needs any more
        was given back. LayerError."""
        deadline = time.monotonic() + WAIT_S
        try:
            while failure.full and not self.committing and (self.shortage.relieve() or self._do_without(overlay)):
                try:
                    overlay.data.write(pieces, offset)
                    return
                except DiskError as error:
                    failure = error
                if time.monotonic() >= deadline:
                    break
        except DiskError as error:  # what is stale cannot be given back
            failure = error
        raise LayerError(failure, layer, "write", offset, length) from failure

    def _do_without(self, overlay: Overlay) -> bool:
        """End a test, if that makes room."""
        found = self.sacrifice(overlay)
        if found:
            self.shortage.look_again()
        return found


def _nothing_left(_overlay: Overlay) -> bool:
    return False


def _unwatched(overlay: Overlay) -> None:
    overlay.watch_at = sys.maxsize
