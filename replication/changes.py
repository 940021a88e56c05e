# SPDX-License-Identifier: BSD-3-Clause
"""Which parts of a disk the other side, or a disk of what the other side has sent, may lack.

A primary keeps one of what its secondary lacks (NAME.changes; a secondary that is done keeps the same, because it may
become a primary). A secondary keeps one of what its disk lacks of the primary's writes, because they failed
(NAME.lost).

One byte for every 64 KiB grain, in a mapped file, so that it outlives the process:

    0 CLEAN     the secondary has it
    1 ON_ITS_WAY  writes to it are queued or in flight; when the last has arrived it is clean
    2 MISSING   something of it was not sent or did not arrive; only sending the grain anew (`begin` with
                `repair`) makes it clean

A byte is set before the disk changes, so a killed primary knows what to send without scanning. What the next process
finds on its way did not arrive: it is missing.

Cost on the write path: a lock, a dictionary entry and a store in memory (about 1 us for a small write).
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator

import numpy as np

from replication.errors import ConfigError, DiskError

GRAIN = 64 << 10
RUN_MAX = 1 << 20
"""Most bytes in one of `missing_ranges`: what a resync reads and sends at a time."""

CLEAN, ON_ITS_WAY, MISSING = 0, 1, 2
_SCAN_STEP = 1 << 20


class ChangeMap:
    """The map of one disk. Offsets and lengths are bytes."""

    def __init__(self, path: str | None, size: int) -> None:
        """Open or make the map; ConfigError when the file is not one for a disk of this size. Without a path it
        is kept in memory."""
        self._count = -(-size // GRAIN)
        self._size = size
        # Protects the bytes and `_open`. Never held across I/O.
        self._lock = threading.Lock()
        # Writes begun and not ended, by grain. Bounded by the forward queue and the requests in flight.
        self._open: dict[int, int] = {}
        if path is None:
            self._bytes = mmap.mmap(-1, self._count)
        else:
            self._bytes = self._map(path)
        self._grain_states = np.frombuffer(self._bytes, np.uint8)
        self._grain_states[self._grain_states != CLEAN] = MISSING
        self._dirty = self._missing = int(np.count_nonzero(self._grain_states))

    def _map(self, path: str) -> mmap.mmap:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(fd).st_size
                if size not in (0, self._count):
                    raise ConfigError(f"{path} is the change map of a disk of another size; move it away to start anew")
                if not size:
                    # Space is taken now: a store into a hole of a full file system would kill the process.
                    os.posix_fallocate(fd, 0, self._count)
                return mmap.mmap(fd, self._count)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError(f"cannot use the change map {path}: {error.strerror}") from error

    def _grains(self, offset: int, length: int) -> range:
        return range(offset // GRAIN, -(-(offset + length) // GRAIN))

    def mark(self, offset: int, length: int) -> None:
        """The disk is about to change, and nobody will tell the secondary."""
        with self._lock:
            for grain in self._grains(offset, length):
                self._set_locked(grain, MISSING)

    def begin(self, offset: int, length: int, repair: bool = False) -> None:
        """The disk is about to change, and the change goes to the secondary; `end` must follow.

        `repair`: the whole range is sent as it is now, and no write of it is under way elsewhere (the caller holds its
        range lock), so what was missing of it is on its way.
        """
        with self._lock:
            for grain in self._grains(offset, length):
                if repair or not self._bytes[grain]:
                    self._set_locked(grain, ON_ITS_WAY)
                self._open[grain] = self._open.get(grain, 0) + 1

    def end(self, offset: int, length: int, arrived: bool) -> None:
        """The change of `begin` has arrived on the secondary, or will not."""
        with self._lock:
            for grain in self._grains(offset, length):
                left = self._open.pop(grain) - 1
                if left:
                    self._open[grain] = left
                if not arrived:
                    self._set_locked(grain, MISSING)
                elif not left and self._bytes[grain] == ON_ITS_WAY:
                    self._set_locked(grain, CLEAN)

    def repaired(self, offset: int, length: int) -> None:
        """The range was written anew as a whole: the grains that it covers are missing no longer."""
        first, last = -(-offset // GRAIN), (offset + length) // GRAIN
        if offset + length >= self._size:
            last = self._count
        with self._lock:
            for grain in range(first, last):
                self._set_locked(grain, CLEAN)

    def mark_all(self) -> None:
        """Nothing is known of the other side: everything is missing. Nothing may be in flight."""
        self._fill(MISSING, self._count)

    def _set_locked(self, grain: int, state: int) -> None:
        old = self._bytes[grain]
        self._dirty += (state != CLEAN) - (old != CLEAN)
        self._missing += (state == MISSING) - (old == MISSING)
        self._bytes[grain] = state

    def missing_ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of the missing parts, at most RUN_MAX bytes each, ascending. What becomes missing behind the
        iterator's position is not seen."""
        for step in range(0, self._count, _SCAN_STEP):
            found = np.flatnonzero(self._grain_states[step : step + _SCAN_STEP] == MISSING) + step
            for run in np.split(found, np.flatnonzero(np.diff(found) != 1) + 1):
                for at in range(0, len(run), RUN_MAX // GRAIN):
                    part = run[at : at + RUN_MAX // GRAIN]
                    yield self._span(int(part[0]), int(part[-1]))

    def _span(self, first: int, last: int) -> tuple[int, int]:
        return first * GRAIN, min((last + 1) * GRAIN, self._size) - first * GRAIN

    @property
    def marked_bytes(self) -> int:
        """Upper bound of the bytes that the secondary lacks."""
        return min(self._dirty * GRAIN, self._size)

    @property
    def missing(self) -> bool:
        """Whether something has to be sent anew."""
        return self._missing > 0

    def clear(self) -> None:
        """The disks are taken as equal. Nothing may be in flight."""
        self._fill(CLEAN, 0)

    def _fill(self, state: int, missing: int) -> None:
        with self._lock:
            self._grain_states[:] = state
            self._open.clear()
            self._dirty = self._missing = missing

    def flush(self) -> None:
        """Make the map stable; DiskError."""
        try:
            self._bytes.flush()
        except OSError as error:
            raise DiskError.from_os("flushing a change map", error) from error

    def close(self) -> None:
        """Let the file go."""
        del self._grain_states
        self._bytes.close()
