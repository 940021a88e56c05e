# SPDX-License-Identifier: BSD-3-Clause
"""Giving back the overlay space that checkpoints leave behind.

Emptying an overlay only clears bits, so that a checkpoint takes the same short time whatever was written; the data file
keeps its old data until it is overwritten or given back here, a little at a time, inside the gate like a request. A
writer that finds the file system full waits for no more than the step that is under way (image/shortage.py gives back
what it needs).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from replication.errors import DiskError
from replication.image.overlay import Overlay
from replication.image.stack import Stack
from replication.log import log, surviving
from replication.order.gate import Gate
from replication.order.worker import Worker
from replication.stage import Stage

AFTER_S = 5.0
"""Space is given back when there was no checkpoint for so long: until then the next one's writes go to the same space,
which spares the file system finding it anew (256 KiB writes to a fresh overlay: half as much again on ext4). It is well
before the kernel writes old dirty pages to the disk (30 s), which for stale data would be in vain."""

LATEST_S = 60.0
"""Where checkpoints come faster than that, space is given back once in so many seconds: an overlay would else keep
every block that was ever in it."""

_STEPS = 4
_SHARE = 4
"""One part in so many of the time goes to giving back; guests want the gate, the ranges and the file system, too."""
_IDLE_S = 3600.0


class Reclaimer:
    """The thread that gives back stale space of all disks of a secondary."""

    def __init__(self, gate: Gate, stage: Callable[[], Stage]) -> None:
        self._gate = gate
        self._stage = stage
        self._stacks: Sequence[Stack] = ()
        self._stale = threading.Event()
        self._closing = threading.Event()
        self._worker = Worker("reclaim", self._round)

    def start(self, stacks: Sequence[Stack]) -> None:
        """Begin, with what a former process has left behind."""
        self._stacks = stacks
        self.wake()

    def wake(self) -> None:
        """Overlays have been emptied. Without a thread the next time helps."""
        self._stale.set()
        self._worker.wake()

    def stop(self, timeout_s: float) -> None:
        """End the thread, if it was started."""
        self._closing.set()
        self._stale.set()
        self._worker.stop(timeout_s)

    def _round(self) -> float:
        if not self._stale.is_set():
            return _IDLE_S
        self._await_quiet()
        for stack in self._stacks:
            for overlay in (stack.active, stack.hidden):
                with surviving():  # the others' space is given back all the same
                    try:
                        self._reclaim(stack, overlay)
                    except DiskError as error:
                        log(f"cannot give back space of {overlay.path}: {error}")
        return _IDLE_S

    def _await_quiet(self) -> None:
        """Return when no checkpoint has come for AFTER_S, or after LATEST_S, or at the end."""
        latest = time.monotonic() + LATEST_S
        while not self._closing.is_set():
            self._stale.clear()
            if not self._stale.wait(AFTER_S) or time.monotonic() > latest:
                return

    def _reclaim(self, stack: Stack, overlay: Overlay) -> None:
        ranges = overlay.stale_ranges()
        freed: int | None = 0
        while freed is not None and not self._closing.is_set():
            begun = time.monotonic()
            with self._gate:
                # During a commit, readers may be reading data whose bit is gone.
                if self._stage() not in (Stage.RUNNING, Stage.DONE):
                    return
                freed = stack.room.reclaim_in_background(overlay, ranges, _STEPS)
            self._closing.wait((_SHARE - 1) * (time.monotonic() - begun))
