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
    3 ARRIVED   answered by a secondary that keeps no account of what it has not flushed (`unproven`): clean when
                a flush that was sent after the answer has succeeded, missing when it fails or the link is lost

A byte is set before the disk changes, so a killed primary knows what to send without scanning. What the next process
finds on its way, or arrived, it takes for missing.

Cost on the write path: a lock, a dictionary entry and a store in memory (about 1 us for a small write, 4 us for a
megabyte).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from replication.disk.mapped import MappedFile
from replication.disk.unflushed import GRAIN
from replication.errors import DiskError
from replication.log import log
from replication.record.grainfile import DISTRUSTED, GrainFile

RUN_MAX = 64 << 20
"""Most bytes in one of `missing_ranges`: a sparse disk of 1 TiB takes 16,384 of them, and the extents of one fit into
one answer."""

CLEAN, ON_ITS_WAY, MISSING, ARRIVED = 0, 1, 2, 3
_CLEAN, _ON_ITS_WAY, _MISSING, _ARRIVED = (bytes([state]) for state in (CLEAN, ON_ITS_WAY, MISSING, ARRIVED))
_BEGUN = bytes([ON_ITS_WAY, ON_ITS_WAY, MISSING, ON_ITS_WAY, *range(4, 256)])
"""What a state becomes when a write begins."""
_WITHOUT_WRITES: Final = (CLEAN, ARRIVED)
_RUN_GRAINS = RUN_MAX // GRAIN
_SCAN_STEP = 16 << 10
"""Grains looked at together: few enough that what became missing ahead of a resync is not overlooked for long."""
_NONE = range(0)
_COVER_STEP = 1 << 10
"""Grains that become clean together: no request waits for more of them."""
_STORE_MAX = 1 << 20
_States = npt.NDArray[np.uint8]
_Chosen = npt.NDArray[np.bool_]


class ChangeMap:
    """The map of one disk. Offsets and lengths are bytes."""

    def __init__(self, source: GrainFile | mmap.mmap | None, size: int) -> None:
        """The map in a file, or in memory that the caller keeps for the next one, or in memory of its own
        (StateFolder.open_map)."""
        self._count = -(-size // GRAIN)
        self._size = size
        # Protects the bytes and the fields below. Never held across I/O.
        self._lock = threading.Lock()
        # Writes begun and not ended, by grain. Bounded by the forward queue and the requests in flight.
        self._open: dict[int, int] = {}
        # A mark ends by a flush. Then: what has arrived and no flush has covered, and how many had begun by then.
        self._unproven = False
        self._arrived: dict[int, int] = {}
        self._flushes = 0
        # The grains of `watch`, none once one of them was marked.
        self._watched = _NONE
        self.marks = 0
        """How many times something has become missing since the process began, but for what a comparison has found."""
        # By grain, what was marked since `claim`; None when nobody has claimed anything.
        self._since: bytearray | None = None
        self._path = source.path if isinstance(source, GrainFile) else None
        self._file: MappedFile | None = None
        self._distrusted = False
        """The file has not all of it, and has another name meanwhile."""
        if isinstance(source, GrainFile):
            self._file = source.mapped
            self._bytes = self._file.map
        else:
            self._bytes = mmap.mmap(-1, self._count) if source is None else source
        self._source = source
        self._kept_first = self._file is not None and not self._file.in_place
        """A change is written to the file before it is stored (disk/mapped.py)."""
        self._grain_states = np.frombuffer(self._bytes, np.uint8, self._count)
        # Each part in one go, while it is in the cache: of 16 TiB there are 256 MiB.
        for grain in range(0, self._count, _STORE_MAX):
            states = self._grain_states[grain : grain + _STORE_MAX]
            if states.any() and ((states == ON_ITS_WAY) | (states > MISSING)).any():
                states = states.copy()
                states[states != CLEAN] = MISSING
                self._store_locked(grain, states.tobytes())
        self._dirty = self._missing = int(np.count_nonzero(self._grain_states))
        # Whether `close` was called, and the state of the last grain then.
        self._closed = False
        self._last = CLEAN

    def grow(self, source: GrainFile | mmap.mmap, size: int, marked: bool) -> bool:
        """The disk has become larger, and the map goes on in `source`, which has room for it and says what is new is
        missing (`marked`), or is not; whoever uses the map need not stand still. Whether the file has all of it: else
        it may get no name that a process believes. `named` is to follow."""
        with self._lock:
            former, count = self._bytes, self._count
            if isinstance(source, GrainFile):
                self._file, self._bytes = source.mapped, source.mapped.map
            else:
                self._bytes = source
            # What was marked since `source` was made.
            self._bytes[:count] = former[:count]
            self._watched = _NONE
            if marked and self._size % GRAIN:
                self._bytes[count - 1] = MISSING  # the rest of that grain is new
            self._source, self._size, self._count = source, size, -(-size // GRAIN)
            self._kept_first = self._file is not None and not self._file.in_place
            self._grain_states = np.frombuffer(self._bytes, np.uint8, self._count)
            self._dirty = int(np.count_nonzero(self._grain_states))
            self._missing = int(np.count_nonzero(self._grain_states == MISSING))
            if self._since is not None:
                self._since.extend(b"\1" * (self._count - count))
            self.marks += 1
            return self._keep_all_locked()

    def _keep_all_locked(self) -> bool:
        if self._file is None:
            return True
        try:
            if self._kept_first:
                self._file.keep(0, self._bytes[: self._count])
        except OSError as error:
            if not self._distrusted:
                self._distrust(error)
            return False
        self._distrusted = False
        return True

    def named(self) -> None:
        """`source` of `grow` has its name now. What it has not taken since, it is not believed for."""
        with self._lock:
            if self._distrusted and os.path.lexists(str(self._path)):
                with contextlib.suppress(OSError):
                    os.rename(str(self._path), f"{self._path}{DISTRUSTED}")

    def _store_locked(self, grain: int, states: bytes) -> None:
        """Change the states from `grain` on. Where the file has no room for that, it gets another name, for which a
        full file system does have room, and no process takes it for what it was."""
        if self._kept_first and not self._distrusted:
            assert self._file is not None
            try:
                self._file.keep(grain, states)
            except OSError as error:
                self._distrust(error)
        self._bytes[grain : grain + len(states)] = states

    def _distrust(self, error: OSError) -> None:
        assert self._path is not None
        self._distrusted = True
        log(f"cannot write {self._path}: {error.strerror}; after a kill before there is room, all is resent")
        try:
            os.rename(self._path, self._path + DISTRUSTED)
        except OSError as failure:
            log(
                f"cannot rename {self._path}: {failure.strerror}; after a kill the change map would be wrong: remove it"
            )

    def settle(self) -> None:
        """At times, while there is room: have the file hold all of it, in blocks of its own (disk/mapped.py). DiskError
        when it is no longer there under its name."""
        if self._file is None:
            return
        try:
            if self._distrusted:
                with self._lock:
                    self._file.keep(0, self._bytes[: self._count])
                    os.rename(f"{self._path}{DISTRUSTED}", str(self._path))
                    self._distrusted = False
            self._file.own_blocks()
        except OSError:
            return  # still no room
        try:
            self._file.check(str(self._path))
        except OSError as error:
            raise DiskError(f"{self._path} was removed or replaced while in use") from error

    @staticmethod
    def _grains(offset: int, length: int) -> range:
        return range(offset // GRAIN, -(-(offset + length) // GRAIN))

    def mark(self, offset: int, length: int, found: bool = False) -> None:
        """The disk is about to change, and nobody will tell the secondary. `found`: it is not, but what the secondary
        has was found to differ, which is no reason to doubt what is found elsewhere (`marks`)."""
        grains = self._grains(offset, length)
        with self._lock:
            self.marks += 0 if found else 1
            if grains.start < self._watched.stop and self._watched.start < grains.stop:
                self._watched = _NONE
            if self._since is not None:
                self._since[grains.start : grains.stop] = b"\1" * len(grains)
            self._put_locked(grains, _MISSING * len(grains))

    def claim(self) -> None:
        """A person says that the disks are equal now. What is marked from here on is not covered by that."""
        with self._lock:
            self._since = bytearray(self._count)

    @property
    def outdated(self) -> bool:
        """Whether something was marked since `claim`."""
        return self._since is not None and 1 in self._since

    def clear_claimed(self) -> None:
        """Act on the claim: what was marked before it is not missing. Nothing may be in flight."""
        with self._lock:
            since, self._since = self._since, None
            self._open.clear()
            self._arrived.clear()
            self._watched = _NONE
            if since is not None:
                states = (np.frombuffer(since, np.uint8) * np.uint8(MISSING)).tobytes()
                for grain in range(0, self._count, _STORE_MAX):
                    self._store_locked(grain, states[grain : grain + _STORE_MAX])
                self._dirty = self._missing = int(np.count_nonzero(self._grain_states))
            self.marks += 1

    def drop_claim(self) -> None:
        """Nothing comes of it."""
        with self._lock:
            self._since = None

    def mark_ranges(self, ranges: Iterable[Sequence[int]]) -> None:
        """Mark ranges [offset, length] that came from elsewhere; ValueError, and nothing is marked, when one of them
        is not a range of this disk."""
        checked = [self._checked(pair) for pair in ranges]
        for offset, length in checked:
            self.mark(offset, length)

    def _checked(self, pair: Sequence[int]) -> tuple[int, int]:
        if len(pair) == 2 and all(type(number) is int for number in pair):
            offset, length = pair
            if offset >= 0 and 0 < length <= self._size - offset:
                return offset, length
        raise ValueError(f"not a range of a disk of {self._size} bytes: {str(pair)[:80]}")

    def watch(self, offset: int, length: int) -> None:
        """The range is about to be read, to be sent as a repair: what is marked of it from now on stays missing. One
        range at a time: the latest."""
        with self._lock:
            stop = offset + length
            # A grain is sent as a whole, or it stays missing: a disk may have grown since somebody has looked where it
            # ends.
            last = -(-stop // GRAIN) if stop >= self._size else stop // GRAIN
            self._watched = range(offset // GRAIN, last)

    def begin(self, offset: int, length: int, repair: bool = False) -> None:
        """The disk is about to change, and the change goes to the secondary; `end` must follow.

        `repair`: the range is sent as it was read since `watch`, and no write of it that is sent, too, is under way
        (the caller holds its range lock). So what was missing of it is on its way, unless a `mark` came in between: the
        content read may lack that write, and the grains stay missing.
        """
        grain = offset // GRAIN
        if not repair and offset + length <= (grain + 1) * GRAIN:
            # As below, for the writes that are many: without ranges.
            self._lock.acquire()
            try:
                state = self._bytes[grain]
                if state in _WITHOUT_WRITES:
                    if state == CLEAN:
                        self._dirty += 1
                    if self._kept_first:
                        self._store_locked(grain, _ON_ITS_WAY)
                    else:
                        self._bytes[grain] = ON_ITS_WAY
                self._open[grain] = self._open.get(grain, 0) + 1
            finally:
                self._lock.release()
            return
        grains = self._grains(offset, length)
        with self._lock:
            if repair and self._watched.start <= grains.start and grains.stop <= self._watched.stop:
                self._put_locked(grains, _ON_ITS_WAY * len(grains))
                self._open_locked(grains)
            else:
                states = self._bytes[grains.start : grains.stop]
                self._put_locked(grains, states.translate(_BEGUN))
                self._open_locked(grains)

    def end(self, offset: int, length: int, arrived: bool) -> None:
        """The change of `begin` has arrived on the secondary, or will not."""
        grain = offset // GRAIN
        if arrived and offset + length <= (grain + 1) * GRAIN:
            self._lock.acquire()
            try:
                left = self._open.pop(grain) - 1
                if left:
                    self._open[grain] = left
                elif self._bytes[grain] == ON_ITS_WAY and self._unproven:
                    self._arrived[grain] = self._flushes
                    self._store_locked(grain, _ARRIVED)
                elif self._bytes[grain] == ON_ITS_WAY:
                    self._dirty -= 1
                    if self._kept_first:
                        self._store_locked(grain, _CLEAN)
                    else:
                        self._bytes[grain] = CLEAN
            finally:
                self._lock.release()
            return
        grains = self._grains(offset, length)
        with self._lock:
            still_open = self._close_locked(grains)
            if not arrived:
                self.marks += 1
                self._put_locked(grains, _MISSING * len(grains))
                return
            ended = _ARRIVED if self._unproven else _CLEAN
            states = bytearray(self._bytes[grains.start : grains.stop].replace(_ON_ITS_WAY, ended))
            for grain in still_open:
                states[grain - grains.start] = self._bytes[grain]
            self._put_locked(grains, states)
            if self._unproven:
                self._arrived.update(dict.fromkeys(grains, self._flushes))

    def _open_locked(self, grains: range) -> None:
        if self._open.keys().isdisjoint(grains):
            self._open.update(dict.fromkeys(grains, 1))
            return
        for grain in grains:
            self._open[grain] = self._open.get(grain, 0) + 1

    def _close_locked(self, grains: range) -> Iterable[int]:
        """One write less on each of the grains; those on which there is another."""
        counts = list(map(self._open.pop, grains))
        if sum(counts) == len(counts):
            return ()
        left = {grain: count - 1 for grain, count in zip(grains, counts, strict=True) if count > 1}
        self._open.update(left)
        return left

    def _put_locked(self, grains: range, states: bytes | bytearray) -> None:
        """Store the states of some grains. What is not stored anew is not touched, so that pages stay clean."""
        former = self._bytes[grains.start : grains.stop]
        if former == states:
            return
        self._dirty += former.count(CLEAN) - states.count(CLEAN)
        self._missing += states.count(MISSING) - former.count(MISSING)
        self._store_locked(grains.start, bytes(states))

    # -- a secondary that keeps no account of its flushes ----------------------------------------------------

    def need_flushes(self, needed: bool) -> None:
        """Whether an answer is no proof from here on. Nothing may be in flight."""
        with self._lock:
            self._unproven = needed

    @property
    def unproven(self) -> bool:
        """Whether something has arrived that no flush has covered."""
        return bool(self._arrived)

    def begin_flush(self) -> int:
        """A flush is about to be sent; its number, for `flushed`."""
        with self._lock:
            self._flushes += 1
            return self._flushes - 1

    def flushed(self, number: int) -> None:
        """That flush has succeeded: what had arrived before it is clean."""
        with self._lock:
            covered = [grain for grain, begun in self._arrived.items() if begun <= number]
        for at in range(0, len(covered), _COVER_STEP):
            with self._lock:
                for grain in covered[at : at + _COVER_STEP]:
                    begun = self._arrived.get(grain)
                    if begun is None or begun > number:
                        continue  # it was written again meanwhile
                    del self._arrived[grain]
                    if self._bytes[grain] == ARRIVED:
                        self._dirty -= 1
                        self._store_locked(grain, _CLEAN)

    def unflushed(self) -> bool:
        """A flush has failed, or the link is lost: what no flush has covered is missing, what is on its way too.
        Whether there was anything."""
        with self._lock:
            grains = {*self._arrived, *self._open} if self._unproven else set()
            self._arrived.clear()
            self.marks += 1
            for grain in grains:
                self._put_locked(range(grain, grain + 1), _MISSING)
            self._watched = _NONE
        return bool(grains)

    def repaired(self, offset: int, length: int) -> None:
        """The range was written anew as a whole: the grains that it covers are missing no longer."""
        first, last = -(-offset // GRAIN), (offset + length) // GRAIN
        if offset + length >= self._size:
            last = self._count
        if first < last:
            with self._lock:
                self._put_locked(range(first, last), _CLEAN * (last - first))

    def prove(self, offset: int, length: int, marks: int) -> bool:
        """The secondary was found to have what the disk had at one place of the stream of writes: what was missing of
        these whole grains is not, or is on its way, if writes of it have begun. But nothing changes, False, when
        anything has become missing since `marks` was the number of marks, before the disk was read."""
        grains = self._grains(offset, length)
        with self._lock:
            if self.marks != marks:
                return False
            states = bytearray(self._bytes[grains.start : grains.stop])
            for index, grain in enumerate(grains):
                if states[index] == MISSING:
                    states[index] = ON_ITS_WAY if grain in self._open else CLEAN
            self._put_locked(grains, states)
        return True

    def mark_all(self) -> None:
        """Nothing is known of the other side: everything is missing, what is in flight included."""
        self._fill(MISSING, self._count)

    # -- what is marked ------------------------------------------------------------------------------------

    def missing_ranges(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """(offset, length) of the missing parts from `begin` to `end`, whole grains, at most RUN_MAX bytes each,
        ascending. What becomes missing behind the iterator's position is not seen."""
        last = self._count if end is None else -(-end // GRAIN)
        for first, stop in self._runs(begin // GRAIN, lambda states: states == MISSING, last):
            for at in range(first, stop, _RUN_GRAINS):
                yield self._span(at, min(at + _RUN_GRAINS, stop))

    def ranges_marked(self, start: int, limit: int) -> tuple[list[list[int]], int | None]:
        """What the secondary may lack, as [offset, length] from the grain of byte `start` on, ascending, at most
        `limit` of them; and the `start` for what follows, None at the end: a map in messages of bounded size."""
        found: list[list[int]] = []
        for first, stop in self._runs(start // GRAIN, lambda states: states != CLEAN):
            offset, length = self._span(first, stop)
            if found and sum(found[-1]) == offset:
                found[-1][1] += length
            elif len(found) < limit:
                found.append([offset, length])
            else:
                return found, offset
        return found, None

    def _runs(
        self, grain: int, chosen: Callable[[_States], _Chosen], last: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """(first, stop) of the runs of chosen grains from `grain` on, up to `last`; a long one is in parts, one after
        the other."""
        last = self._count if last is None else last
        for step in range(grain, last, _SCAN_STEP):
            states = self._grain_states[step : min(step + _SCAN_STEP, last)]
            inside = np.zeros(len(states) + 2, np.bool_)
            inside[1:-1] = chosen(states)
            edges = cast("list[int]", (np.flatnonzero(inside[1:] != inside[:-1]) + step).tolist())
            yield from zip(edges[::2], edges[1::2], strict=True)

    def _span(self, first: int, stop: int) -> tuple[int, int]:
        return first * GRAIN, min(stop * GRAIN, self._size) - first * GRAIN

    @property
    def size(self) -> int:
        """Of the disk, in bytes."""
        return self._size

    @property
    def marked_bytes(self) -> int:
        """Upper bound of the bytes that the secondary lacks."""
        return min(self._dirty * GRAIN, self._size)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the grains that have to be sent anew."""
        with self._lock:
            last = self._last if self._closed else self._bytes[self._count - 1]
            beyond = self._count * GRAIN - self._size if last == MISSING else 0
            return max(0, self._missing * GRAIN - beyond)

    @property
    def missing(self) -> bool:
        """Whether something has to be sent anew."""
        return self._missing > 0

    def lacks(self, offset: int, length: int) -> bool:
        """Whether something of the range has to be sent anew."""
        if not self._missing:
            return False
        grains = self._grains(offset, length)
        with self._lock:
            return _MISSING in self._bytes[grains.start : grains.stop]

    def clear(self) -> None:
        """The disks are taken as equal. Nothing may be in flight."""
        with self._lock:
            self._open.clear()
        self._fill(CLEAN, 0)

    def _fill(self, state: int, missing: int) -> None:
        with self._lock:
            if self._kept_first:
                for grain in range(0, self._count, _STORE_MAX):
                    self._store_locked(grain, bytes((state,)) * min(_STORE_MAX, self._count - grain))
            else:
                self._grain_states[:] = state
            self._watched = _NONE
            self._arrived.clear()
            if self._since is not None and state == MISSING:
                self._since[:] = b"\1" * self._count
            self._dirty = self._missing = missing
            self.marks += 1

    def flush(self) -> None:
        """Make the map stable; DiskError."""
        self.settle()
        if self._file is None:
            return
        if self._distrusted:
            raise DiskError(f"{self._path} has no room", errno.ENOSPC)
        try:
            self._file.flush()
        except OSError as error:
            raise DiskError.from_os("flushing a change map", error) from error

    def close(self) -> None:
        """Let the file go. What is counted stays: in a change of role somebody may ask until the disk is another
        side's."""
        with self._lock:
            if not self._closed:
                self._last = self._bytes[self._count - 1]
                self._closed = True
        self._grain_states = np.empty(0, np.uint8)  # a mapping with a view of it cannot be closed
        if self._source is None:
            self._bytes.close()
        elif isinstance(self._source, GrainFile):
            self._source.close()
