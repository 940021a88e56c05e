# SPDX-License-Identifier: BSD-3-Clause
"""Warns when the file system of an overlay fills up, while there is still time for a checkpoint.

The level is what the file system has in use, without what the overlays could give back (a checkpoint leaves old data
in the data files, see reclaim.py). It is looked at while an overlay grows: the emptier the file system, the more may
be written until the next look, so a look costs nothing worth counting. Overlays of all disks may share a file system,
so the room is divided between them, and whoever finds it smaller has the others look sooner: none comes too late.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from replication.events import EventHub
from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCK
from replication.image.stack import Stack
from replication.log import log

_STEP_MIN = 64
"""Blocks written between two looks, at least, by all overlays of a file system together."""


class _Level(NamedTuple):
    """How full a file system is; bytes."""

    size: int
    used: int
    """For good: without what could be given back."""
    held: int
    """What the overlays hold, a part of that."""
    sharers: list[Overlay]
    """The overlays in it."""


class FillWatch:
    """Watches the overlays of all disks of a secondary."""

    def __init__(self, stacks: Sequence[tuple[str, Stack]], watermark: float, hub: EventHub) -> None:
        """`stacks`: with their disks' names. `watermark`: per cent in use from which on the event comes; once for an
        overlay, until the level was lower again."""
        self._overlays = [overlay for _, stack in stacks for overlay in (stack.active, stack.hidden)]
        self._watermark = watermark
        self._hub = hub
        # Protects `_warned`, `_limits` and the overlays' `watch_at`. Never held across I/O.
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._limits: dict[str, int] = {}
        """What the overlays could hold at the last look, by their paths."""
        for disk_name, stack in stacks:
            stack.room.grown = partial(self.look, disk_name)
        for overlay in self._overlays:
            with suppress(OSError):  # the first look says it
                level = self._level(overlay)
                if level.size:
                    self._limits[overlay.path] = _limit(overlay, level)

    def warn_at(self, watermark: float) -> None:
        """Another watermark from the next write on that makes an overlay grow."""
        with self._lock:
            self._watermark = watermark
            for overlay in self._overlays:
                overlay.watch_at = 0

    def limit(self, overlay: Overlay) -> int | None:
        """What `overlay` can hold, in bytes, as of when it was opened or of the last look, which its growing brings
        about: so this asks no file system, which may hang. None where there is no limit but the disk's size."""
        with self._lock:
            found = self._limits.get(overlay.path)
        return None if found is None else min(found, overlay.layout.size)

    def look(self, disk_name: str, overlay: Overlay) -> None:
        """Called by a request when `overlay` has grown to its `watch_at`."""
        try:
            level = self._level(overlay)
        except OSError as error:
            log(f"cannot see how full the file system of {overlay.path} is: {error.strerror}")
            level = _Level(0, 0, 0, [])
        if not level.size:  # or a tmpfs without limit
            overlay.watch_at = sys.maxsize
            return
        room = int(level.size * self._watermark / 100) - level.used
        step = max(_STEP_MIN, abs(room) // 2 // BLOCK) // len(level.sharers)
        with self._lock:
            self._limits[overlay.path] = _limit(overlay, level)
            # The first look since a checkpoint may come with a request that fills everything at once.
            was_lower = room > 0 or (overlay.watch_at == 0 and room + level.held > 0)
            if was_lower:
                self._warned.discard(overlay.path)
            due = room <= 0 and overlay.path not in self._warned
            if due:
                self._warned.add(overlay.path)
            overlay.watch_at = overlay.data_blocks + step
            for other in level.sharers:
                other.watch_at = min(other.watch_at, other.data_blocks + step)
        if due:
            self._hub.emit(
                "REPLICATION_OVERLAY_WATERMARK",
                disk=disk_name,
                overlay=overlay.role,
                path=overlay.path,
                used=level.used,
                size=level.size,
                percent=round(100 * level.used / level.size, 1),
            )

    def _level(self, overlay: Overlay) -> _Level:
        device = overlay.data.status().st_dev
        stale = held = 0
        sharers = []
        for other in self._overlays:
            status = other.data.status()
            if status.st_dev == device:
                sharers.append(other)
                data = other.data_blocks * BLOCK
                held += data
                stale += max(0, status.st_blocks * 512 - data)
        whole = os.statvfs(overlay.layout.data_path)
        size = whole.f_blocks * whole.f_frsize
        return _Level(size, max(0, size - whole.f_bavail * whole.f_frsize - stale), held, sharers)


def _limit(overlay: Overlay, level: _Level) -> int:
    """What an overlay could hold, in bytes: what it holds, and the room that there is."""
    return overlay.data_blocks * BLOCK + max(0, level.size - level.used)
