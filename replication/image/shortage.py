# SPDX-License-Identifier: BSD-3-Clause
"""Room for writes that meet a full file system, found once for all of them.

Emptied overlays keep their old data for a while (secondary/reclaim.py). A write that finds no room gives some of it
back, no more than it takes to go on; the others wait for that instead of doing the same, and none for long. Where there
is nothing stale, which two numbers say, nothing is searched: a full hidden disk refuses a write as quickly as it takes
one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCK

WAIT_S = 1.0
"""Longest time that a write spends on finding room, or waits for another that does. The peer gives up its link after
`timeout`, 5 s by default."""

_SLICE_S = 0.1
"""Longest search before the write is tried again, or others have their turn."""

_ENOUGH = 8 << 20
"""Bytes given back for which the search is interrupted."""

_FUTILE_S = 1.0
"""For so long what a whole search could not give back is not searched for again: somebody holds its range, or it is the
file system's own."""

Source = tuple[Overlay, Callable[[Overlay, Iterator[tuple[int, int]], int], int | None]]
"""An overlay, and what gives back stale space of some ranges of it: Room.reclaim_some."""


class Shortage:
    """The search for room in some overlays."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        # Protects the search. Held across it, so never longer than _SLICE_S and one step.
        self._searching = threading.Lock()
        self._ranges: dict[str, Iterator[tuple[int, int]]] = {}
        # What a whole search has left, by path, and until when that counts.
        self._futile: dict[str, tuple[int, float]] = {}
        self.found = 0
        """Bytes given back so far."""

    def relieve(self) -> bool:
        """For a write that has found no room: whether it is worth trying again. Never waits for a range."""
        before = self.found
        if not self._searching.acquire(timeout=WAIT_S):
            return self.found != before
        try:
            # Else another one has found room meanwhile.
            return self.found != before or self._search()
        finally:
            self._searching.release()

    def in_background(self, give_back: Callable[[], int | None]) -> int | None:
        """A step of who gives back space when nobody needs it (secondary/reclaim.py): what `give_back()` returns. A
        write that finds no room meanwhile waits for it: a search would pass by a range that the step holds. 0 when a
        search is under way for long."""
        if not self._searching.acquire(timeout=WAIT_S):
            return 0
        try:
            freed = give_back()
            self.found += freed or 0
            return freed
        finally:
            self._searching.release()

    def covers(self, device: int) -> bool:
        """Whether any of the overlays is in the file system of that number (st_dev). OSError."""
        return any(overlay.data.status().st_dev == device for overlay, _ in self._sources)

    def look_again(self) -> None:
        """More can be given back than a search has found so far: somebody needs it no longer. From the beginning, since
        a search that is under way has passed by some of it."""
        if not self._searching.acquire(timeout=WAIT_S):
            return
        try:
            self._futile.clear()
            self._ranges.clear()
        finally:
            self._searching.release()

    def _search(self) -> bool:
        """Give back a little; True when there was something, or may be."""
        before, until = self.found, time.monotonic() + _SLICE_S
        for overlay, reclaim in self._sources:
            if not self._worthwhile(overlay):
                continue
            ranges = self._ranges.setdefault(overlay.path, overlay.stale_ranges())
            freed: int | None = 0
            while freed is not None:
                if self.found - before >= _ENOUGH or time.monotonic() >= until:
                    return True
                freed = reclaim(overlay, ranges, 1)
                self.found += freed or 0
            del self._ranges[overlay.path]
            self._futile[overlay.path] = overlay.stale_bytes, time.monotonic() + _FUTILE_S
        return self.found != before

    def _worthwhile(self, overlay: Overlay) -> bool:
        stale = overlay.stale_bytes
        left, until = self._futile.get(overlay.path, (0, 0.0))
        if stale < BLOCK and overlay.data.counts_blocks:
            return False
        return stale > left or time.monotonic() >= until
