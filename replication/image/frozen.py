# SPDX-License-Identifier: BSD-3-Clause
"""The content that a disk had for its guest at one instant, and what a test writes over it.

Nothing is copied when the instant is taken, and nothing at a checkpoint. For each block there is noted where it was:
on the secondary disk, in the data of active or of hidden, or nowhere, because it was zeroes. Whoever is about to change
one of these three moves the block first into the file of each test that has it there (`keep`): one more layer of the
same copy-before-write, under the range lock that orders the changes of that image anyway (`below`, or `top`). That a
checkpoint empties the overlays changes bits alone; their old data is in its place until a later write, or the giving
back of space, comes to it.

Who decides when two meet on one block
--------------------------------------
keep, read of the test
    No lock. The note says that the block was moved before its source changes: a read that looks at the notes again
    afterwards, and finds the same ones, has read the right data; else it reads from the file.
keep, write of the test
    `_own`, whole blocks: a part of a block is completed from where the block is, which nobody changes meanwhile, and
    what was written is not overwritten with what was there before.
keep, keep
    `_own`: two images that change at once never are the source of one block.

A test that cannot keep a block, for whatever reason, or not within KEEP_S, has no content any more: it is over
(`spoilt`), and whoever was about to change that block goes on.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

import numpy as np

from replication.disk import files
from replication.disk.face import EXTENTS_MAX, ZEROES, Disk, Extent
from replication.disk.file import FileDisk
from replication.errors import ConfigError, DiskError
from replication.image.overlay import Overlay, states_in
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, PAGE_CLUSTERS
from replication.log import log, log_defect
from replication.order.pause import pause
from replication.order.rangelock import RangeLock

DISK: Final = 0
ACTIVE: Final = 1
HIDDEN: Final = 2
ZERO: Final = 3
OWN: Final = 4
"""Where a block is, one byte for each: so a test of a disk of 1 TiB takes 256 MiB at most, and as a rule only what it
touches, because what was never touched is 0."""

KEEP_S = 2.0
"""Longest time that a change waits for what a test has to keep of it; then the test ends. The peer gives up its link
after `timeout`, 5 s by default. (One call of the system that does not come back is waited for.)"""

PREFIX, SUFFIX = ".test.", ".data"
"""Of a file while it has a name. No disk's name begins with a dot, so it is no overlay's data."""

_PAGE_BLOCKS = PAGE_CLUSTERS * BLOCKS_PER_CLUSTER
_COPY_CHUNK = 256 << 10
_SPARSE_FROM = 64 << 10
"""As of a target write (target.py): from this length on it is asked for holes first."""

_EXTENTS_RANGE_MAX = 1 << 30
_LOOK_BLOCKS = 1 << 16
"""How many of them are looked at together."""
_LOOK_EVERY = 4 << 20
"""Bytes that the tests grow by between two looks at their file system."""


T = TypeVar("T")


class Allowance:
    """The space that all tests of a node may take."""

    def __init__(self, folder: str, limit: int, watermark: float) -> None:
        """`limit`: bytes, of all together. `watermark`: per cent of the file system of `folder` in use, from which on
        tests take no more of it, whoever uses it."""
        self.folder = folder
        self.limit = limit
        self.watermark = watermark
        # Protects the fields below. Never held across I/O.
        self._lock = threading.Lock()
        self.used = 0
        self._look_at = 0

    def take(self, count: int) -> None:
        """`count` bytes more; DiskError (ENOSPC), with nothing taken."""
        with self._lock:
            if self.used + count > self.limit:
                raise DiskError(f"tests have {self.used} bytes, of the {self.limit} of test-space", errno.ENOSPC)
            self.used += count
            due = self.used >= self._look_at
            if due:
                self._look_at = self.used + _LOOK_EVERY
        if due and not self._room():
            with self._lock:
                self._look_at = 0
                self.used -= count
            raise DiskError(f"{self.folder} is fuller than {self.watermark:g} per cent", errno.ENOSPC)

    def _room(self) -> bool:
        try:
            whole = os.statvfs(self.folder)
        except OSError:
            return True  # the write tells
        if not whole.f_blocks:
            return True  # a tmpfs without limit
        return 100 * (whole.f_blocks - whole.f_bavail) / whole.f_blocks < self.watermark

    def give(self, count: int) -> None:
        """Take `count` bytes back."""
        with self._lock:
            self.used -= count
            self._look_at = 0


def sweep(folder: str) -> None:
    """Remove what a killed process has left behind between making a file and removing its name. The folder is of this
    process alone, and nobody is making one."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(PREFIX) and name.endswith(SUFFIX):
                with suppress(OSError):
                    os.unlink(os.path.join(folder, name))


class _Reader:
    """The data of an overlay, for as long as the test is there, whatever becomes of the overlay."""

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        self._fd = os.dup(overlay.data.fileno())
        self.device = os.fstat(self._fd).st_dev
        self._location = overlay.data.location

    def read(self, buffer: memoryview, offset: int) -> None:
        """DiskError."""
        done = 0
        try:
            while done < len(buffer):
                count = files.preadv(self._fd, [buffer[done:]], offset + done)
                if not count:
                    raise DiskError(f"{self._location} ends at {offset + done}: it was truncated while in use")
                done += count
        except OSError as error:
            raise DiskError.from_os(f"reading {len(buffer)} bytes at {offset} of {self._location}", error) from error

    def close(self) -> None:
        """Once."""
        os.close(self._fd)


class Frozen:
    """One disk of a test. Every method may be called by several threads at once."""

    def __init__(self, name: str, active: Overlay, hidden: Overlay, disk: Disk, allowance: Allowance) -> None:
        """Make the file; `freeze` must follow. `name`: of the test, for messages. DiskError."""
        self.name = name
        self.size = disk.size
        self.blocks = -(-disk.size // BLOCK)
        self.spoilt: Callable[[DiskError], None] = _nobody
        """Called when the content could not be kept. It must not wait, nor raise."""
        self.over: DiskError | None = None
        """What every request is told, once it has ended."""
        self._disk = disk
        self._allowance = allowance
        self._used = 0
        # Orders changes of blocks of the test, in bytes, whole blocks; innermost of the range locks, since `keep` comes
        # with `below` or `top`. Held across the I/O that it orders.
        self._own = RangeLock()
        # Protects `over`, `_used`, `_closed`, and who is inside. Never held across I/O.
        self._state = threading.Condition(threading.Lock())
        self._inside = 0
        self._closed = False
        # Pages of words as they were, until somebody needs them as places. `_translating` is held across that.
        self._pending: dict[int, tuple[bytes | None, bytes | None]] = {}
        self._translating = threading.Lock()
        self._readers: dict[int, _Reader] = {}
        # The file systems in which old data of overlays is kept for it, as far as it is known without a search.
        self._pinned: set[int] = set()
        try:
            # What nobody has touched takes no memory. Closed by `discard`: clients that stay connected keep `self`.
            self._places = mmap.mmap(-1, max(1, self.blocks), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for place, overlay in ((ACTIVE, active), (HIDDEN, hidden)):
                self._readers[place] = _Reader(overlay)
            self._data = _nameless(allowance.folder, disk)
            self._device = os.fstat(self._data.fileno()).st_dev
        except BaseException as error:
            self._close_readers()
            if isinstance(error, OSError):
                raise DiskError.from_os(f"a test of disk '{disk.name}'", error) from error
            raise

    def freeze(self) -> None:
        """The instant. The gate is closed. The time goes with the pages of words that hold bits (1 us for 32 MiB of the
        disk), not with what was written."""
        active, hidden = (self._readers[place].overlay.pages() for place in (ACTIVE, HIDDEN))
        self._pinned = {self._readers[place].device for place, pages in ((ACTIVE, active), (HIDDEN, hidden)) if pages}
        self._pending = {page: (active.get(page), hidden.get(page)) for page in {**active, **hidden}}

    # -- where a block is ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Turn all words that are left into places, for whom it is no hurry. What it has no memory for is left to those
        who come to it."""
        with suppress(DiskError, MemoryError), self._within():
            for page in list(self._pending):
                self._translate(page)

    def _translate_range(self, first: int, last: int) -> None:
        for page in range(first // _PAGE_BLOCKS, (last - 1) // _PAGE_BLOCKS + 1):
            if page in self._pending:
                self._translate(page)

    def _translate(self, page: int) -> None:
        with self._translating:
            words = self._pending.get(page)
            if words is None:
                return
            places = np.zeros(_PAGE_BLOCKS, np.uint8)
            for place, content in ((HIDDEN, words[1]), (ACTIVE, words[0])):  # what is in active hides the other
                if content is not None:
                    data, zero = states_in(np.frombuffer(content, np.uint64)[1::2])
                    places[: len(data)][data != 0] = place
                    places[: len(zero)][zero != 0] = ZERO
            first = page * _PAGE_BLOCKS
            last = min(first + _PAGE_BLOCKS, self.blocks)
            if first < last:
                self._places[first:last] = places[: last - first].tobytes()
            del self._pending[page]

    def _at(self, first: int, last: int) -> bytes:
        """Where blocks [first, last) are."""
        if self._pending:
            self._translate_range(first, last)
        return self._places[first:last]

    def _mark(self, first: int, last: int, place: int) -> None:
        self._places[first:last] = bytes([place]) * (last - first)

    def needs(self, place: int, first: int, last: int) -> bool:
        """Whether any of blocks [first, last) is there."""
        return self.over is None and any(
            place in self._at(start, min(start + _LOOK_BLOCKS, last)) for start in range(first, last, _LOOK_BLOCKS)
        )

    # -- those who change what it is made of ---------------------------------------------------------------

    def keep_disk(self, first: int, last: int) -> None:
        """The secondary disk is about to change in blocks [first, last), whose range of `below` the caller has."""
        if self.over is None:
            self._harmless(lambda: self._keep(DISK, first, last), None)

    def keep(self, overlay: Overlay, first: int, last: int) -> None:
        """The same for the data of an overlay, whose writers' range the caller has."""
        place = self._place_of(overlay)
        if place != OWN and self.over is None:
            self._harmless(lambda: self._keep(place, first, last), None)

    def unneeded(self, overlay: Overlay, first: int, last: int) -> Sequence[tuple[int, int]]:
        """Those runs of blocks [first, last) whose data in the overlay the test does not need."""
        place, whole = self._place_of(overlay), [(first, last)]
        if place == OWN or self.over is not None:
            return whole
        return self._harmless(lambda: self._without(place, first, last), whole)

    def _without(self, place: int, first: int, last: int) -> list[tuple[int, int]]:
        return [(start, stop) for start, stop, found in _runs(self._at(first, last), first) if found != place]

    def _place_of(self, overlay: Overlay) -> int:
        """Where the blocks are that the overlay has; OWN for one that is not the test's."""
        for place, reader in self._readers.items():
            if reader.overlay is overlay:
                return place
        return OWN

    def lose(self, offset: int, length: int, error: DiskError) -> None:
        """The secondary disk has lost what was written to a range."""
        first, last = offset // BLOCK, min(-(-(offset + length) // BLOCK), self.blocks)
        if first < last and self._harmless(lambda: self.needs(DISK, first, last), False):
            self._spoil(error)

    def _harmless(self, request: Callable[[], T], otherwise: T) -> T:
        """What `request` returns, which is on behalf of somebody else: whatever fails is the test's end, not theirs."""
        try:
            return request()
        except DiskError as error:
            self._spoil(error)
        except Exception as defect:  # noqa: BLE001 (a test never is in the way of replication)
            self._spoil(DiskError.from_defect(defect))
        return otherwise

    def _keep(self, place: int, first: int, last: int) -> None:
        """Move what is at `place` of blocks [first, last) into the file. DiskError."""
        if not self.needs(place, first, last):
            return
        deadline = time.monotonic() + KEEP_S
        with self._within():
            held = self._own.acquire(first * BLOCK, last * BLOCK, wait_s=KEEP_S)
            try:
                # As of now: a write of the test may have come first.
                for start, stop, found in _runs(self._at(first, last), first):
                    if found == place:
                        self._move(place, start, stop, deadline)
            finally:
                self._own.release(held)

    def _move(self, place: int, first: int, last: int, deadline: float) -> None:
        at, stop = first * BLOCK, min(last * BLOCK, self.size)
        while at < stop:
            end = min(stop, at + _COPY_CHUNK)
            if place == DISK and stop - at >= _SPARSE_FROM:
                hole = at + self._hole(at, stop)
                whole = hole if hole >= stop else hole // BLOCK * BLOCK
                if whole > at:
                    self._mark(at // BLOCK, -(-whole // BLOCK), ZERO)
                    at = whole
                    continue
            old = memoryview(bytearray(end - at))
            self._read_from(place, old, at)
            _check_in_time(deadline)
            blocks = at // BLOCK, -(-end // BLOCK)
            if bytes(ZEROES[: len(old)]) == old.obj:
                self._mark(*blocks, ZERO)
            else:
                self._take(blocks[1] - blocks[0])
                self._data.write([old], at)
                _check_in_time(deadline)
                pause("test.kept")
                self._mark(*blocks, OWN)
            at = end

    def _hole(self, start: int, stop: int) -> int:
        try:
            return self._disk.hole(start, stop - start)
        except DiskError:
            return 0

    def _take(self, blocks: int) -> None:
        self._allowance.take(blocks * BLOCK)
        with self._state:
            if self.over is None:
                self._used += blocks * BLOCK
                return
        self._allowance.give(blocks * BLOCK)  # its space has been given back already
        raise self._ended()

    def _read_from(self, place: int, part: memoryview, offset: int) -> None:
        if place == DISK:
            self._disk.read(part, offset)
        elif place == OWN:
            self._data.read(part, offset)
        elif place == ZERO:
            for at in range(0, len(part), len(ZEROES)):
                end = min(at + len(ZEROES), len(part))
                part[at:end] = ZEROES[: end - at]
        else:
            self._readers[place].read(part, offset)

    # -- the test ------------------------------------------------------------------------------------------

    def read(self, buffer: memoryview, offset: int) -> None:
        """The content of the instant, and what the test has written since."""
        with self._within():
            self._read(buffer, offset)

    def _read(self, buffer: memoryview, offset: int) -> None:
        stop = offset + len(buffer)
        first, last = offset // BLOCK, -(-stop // BLOCK)

        def part(start: int, end: int) -> tuple[memoryview, int]:
            begin, finish = max(offset, start * BLOCK), min(stop, end * BLOCK)
            return buffer[begin - offset : finish - offset], begin

        places = self._at(first, last)
        for start, end, place in _runs(places, first):
            self._read_from(place, *part(start, end))
        pause("test-read.read")
        moved = self._at(first, last)
        if moved == places:
            return
        for start, end, place in _runs(moved, first):
            # What was its own before is the affair of whoever writes there at the same time.
            if place in (OWN, ZERO):
                self._read_from(place, *part(start, end))

    def write(self, data: memoryview, offset: int, _fua: bool) -> None:
        """Into the file. Nothing of it outlives the process, so there is nothing to be made stable."""
        with self._within():
            self._write([data], offset, len(data))

    def _write(self, pieces: Sequence[memoryview], offset: int, length: int) -> None:
        stop = offset + length
        first, last = offset // BLOCK, -(-stop // BLOCK)
        held = self._own.acquire(first * BLOCK, last * BLOCK)
        try:
            places = self._at(first, last)
            start, end = first * BLOCK, min(last * BLOCK, self.size)
            if places.count(OWN) != len(places) and (start, end) != (offset, stop):
                head, tail = memoryview(bytearray(offset - start)), memoryview(bytearray(end - stop))
                if head:
                    self._read(head, start)
                if tail:
                    self._read(tail, stop)
                pieces = [piece for piece in (head, *pieces, tail) if piece]
                offset = start
            fresh = len(places) - places.count(OWN)
            self._take(fresh)
            try:
                self._data.write(pieces, offset)
            except BaseException:
                self._give(fresh * BLOCK)
                raise
            pause("test-write.written")
            self._mark(first, last, OWN)
        finally:
            self._own.release(held)

    def zero(self, offset: int, length: int, _may_trim: bool, _fua: bool) -> None:
        """Zeroes or a trim: whole blocks are only noted, and their space is given back."""
        stop = offset + length
        first = -(-offset // BLOCK)
        last = self.blocks if stop == self.size else stop // BLOCK
        with self._within():
            if first >= last:
                self._write([ZEROES[:length]], offset, length)
                return
            if first * BLOCK > offset:
                self._write([ZEROES[: first * BLOCK - offset]], offset, first * BLOCK - offset)
            held = self._own.acquire(first * BLOCK, last * BLOCK)
            try:
                places = self._at(first, last)
                self._mark(first, last, ZERO)
                for start, end, place in _runs(places, first) if OWN in places else ():
                    if place == OWN:
                        self._data.discard(start * BLOCK, (end - start) * BLOCK)
                        self._give((end - start) * BLOCK)
            finally:
                self._own.release(held)
            if stop > last * BLOCK:
                self._write([ZEROES[: stop - last * BLOCK]], last * BLOCK, stop - last * BLOCK)

    def _give(self, count: int) -> None:
        with self._state:
            if self.over is not None:
                return
            self._used -= count
        self._allowance.give(count)

    def flush(self) -> None:
        """Nothing of a test outlives the process."""
        with self._within():
            pass

    def extents(self, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        """At most `count` extents."""
        with self._within():
            return self._extents(offset, min(length, _EXTENTS_RANGE_MAX), count)

    def _extents(self, offset: int, length: int, count: int) -> list[Extent]:
        stop = offset + length
        first, last = offset // BLOCK, -(-stop // BLOCK)
        found: list[Extent] = []
        for start, end, place in _runs(self._at(first, last), first):
            begin, finish = max(offset, start * BLOCK), min(stop, end * BLOCK)
            if place == DISK:
                below = self._disk.extents(begin, finish - begin, count - len(found))
                upto = below[-1].offset + below[-1].length
                if self._at(start, end).count(DISK) == end - start:
                    found += below
                else:  # what it says may be of what has come after
                    found.append(Extent(begin, upto - begin, False, False))
                if upto < finish:
                    break
            else:
                found.append(Extent(begin, finish - begin, place == ZERO, place == ZERO))
            if len(found) >= count:
                break
        return found[:count]

    # -- the end -------------------------------------------------------------------------------------------

    @contextmanager
    def _within(self) -> Iterator[None]:
        """A request. DiskError when the test has ended, also meanwhile: what was read then may be of no instant."""
        with self._state:
            if self.over is not None:
                raise self._ended()
            self._inside += 1
        try:
            yield
            if self.over is not None:
                raise self._ended()
        finally:
            with self._state:
                self._inside -= 1
                self._state.notify_all()

    def _ended(self) -> DiskError:
        assert self.over is not None
        return self.over.again()

    def _spoil(self, error: DiskError) -> None:
        failure = error
        with suppress(MemoryError):
            failure = DiskError(
                f"the test '{self.name}' has ended: what it needs could not be kept: {error}", error.wire_errno
            )
        if self.end(failure):
            try:
                self.spoilt(failure)
            except Exception as defect:  # noqa: BLE001 (nor does it keep anybody from going on)
                log_defect(defect)

    def end(self, why: DiskError) -> bool:
        """Every request is told `why` from now on. Does not wait; False if it was over already."""
        with self._state:
            if self.over is not None:
                return False
            self.over = why
            used, self._used = self._used, 0
        self._allowance.give(used)
        return True

    def discard(self) -> None:
        """After `end`, once: give the space back, and close the files when the last request has left. May take its
        time."""
        self.give_back()
        with self._state:
            self._state.wait_for(lambda: not self._inside)
            self._closed = True
        with self._translating:  # whoever keeps something comes too late, and finds that out
            self._pending.clear()
            self._places.close()
        self._data.close()
        self._close_readers()

    def give_back(self) -> None:
        """After `end`: give the space back, as far as nobody is about to take some."""
        with self._state:
            if self._closed:
                return
            self._inside += 1
        try:
            os.ftruncate(self._data.fileno(), 0)
        except OSError as error:
            log(f"giving back the space of the test '{self.name}': {error.strerror}")
        finally:
            with self._state:
                self._inside -= 1
                self._state.notify_all()

    def _close_readers(self) -> None:
        for reader in self._readers.values():
            reader.close()

    @property
    def bytes_used(self) -> int:
        """What it takes of the tests' space."""
        return self._used

    def holds_room_in(self, device: int) -> bool:
        """Whether its end may give something back in the file system of that number (st_dev): its file is there, or
        data of an overlay that it needs, though the overlay may not. Looks at no file, and through no blocks."""
        return (device == self._device and self._used > 0) or device in self._pinned


def _nameless(folder: str, disk: Disk) -> FileDisk:
    """A file as long as the disk, which ends with the process. DiskError."""
    try:
        fd, path = tempfile.mkstemp(SUFFIX, PREFIX, folder)
        try:
            try:
                os.ftruncate(fd, disk.size)
            finally:
                os.close(fd)
            return FileDisk(f"{disk.name} (test)", path)
        finally:
            os.unlink(path)
    except OSError as error:
        raise DiskError.from_os(f"making the file of a test in {folder}", error) from error
    except ConfigError as error:
        raise DiskError(str(error)) from error


def _check_in_time(deadline: float) -> None:
    """DiskError when somebody else has been held up for long enough."""
    if time.monotonic() >= deadline:
        raise DiskError(f"to keep it took more than {KEEP_S:g} s")


def _runs(places: bytes, first: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, place) of the blocks from `first` on."""
    at, stop = 0, len(places)
    if places.count(places[0]) == stop:  # nearly always
        yield first, first + stop, places[0]
        return
    while at < stop:
        place = places[at]
        end = at + 1
        while end < stop and places[end] == place:
            end += 1
        yield first + at, first + end, place
        at = end


def _nobody(_error: DiskError) -> None:
    """Nobody has asked to be told."""
