# SPDX-License-Identifier: BSD-3-Clause
"""What of a disk was written and is not known to be on stable storage, by grains of 64 KiB.

A flush that fails, or a server that dies, takes all of that with it, and tells it once. So it is kept in a map of one
byte a grain, which outlives the process where it is mapped from a file (record/state.py):

    low two bits  0     flushed
                  1, 2  written since the last flush was sent, or the one before; they take turns with every flush
    EXPOSED             was unflushed when the last checkpoint was taken, so the checkpoint has it
    LOST                lost, and whoever has to know that (`on_loss`) has not kept it yet
    TOLD                lost, and told to who asked; should the process have ended before that answer was out, the
                        first flush of the next one fails once more

    flushed --begin/end--> written --a flush sent after `end` succeeds--> flushed
    written --expose--> written, EXPOSED
    written --lose--> written, LOST --on_loss has returned--> written (the server below may be alive after all, and
                                                               still have in its cache what it has not lost yet)

Invariants
* A grain is written before the disk changes, and once more at the end of a write during which a flush was sent. So a
  flush clears just what was answered before it was sent.
* One flush at a time, shared by all who wait for one: of two that overlap the kernel tells only one that it has failed.
* Nothing here does I/O, but for what the kernel does with a mapped page. About 0.6 us for a small write.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from replication.errors import DiskError

GRAIN = 64 << 10

TOLD, EXPOSED, LOST = 0x20, 0x40, 0x80
_WRITTEN = 0x03
_FLAGS = TOLD | EXPOSED | LOST
_PAGE = 4096
"""Grains of which it is known whether any is not flushed: 256 MiB of the disk."""
_RUN = 64
"""Most pages that are looked at together: 16 GiB of the disk, in 0.2 ms."""

_WAIT_S = 60.0
"""Longest wait for the flush of another request; the kernel's own limit for a disk command is 30 s."""


Keep = Callable[[int, bytes], None]


class NotKept(Exception):
    """A loss is known, but the next process would not know all of it: it has to be told again."""


class Loss(NamedTuple):
    """What a disk has lost: ranges (offset, length) in bytes."""

    ranges: list[tuple[int, int]]
    exposed: list[tuple[int, int]]
    """Those of them of which the last checkpoint has something."""
    error: DiskError
    told: bool = False
    """Whether a request fails with it, so that whoever asked for that tells it, or it was told before."""


class Unflushed:
    """The map of one disk."""

    def __init__(self, size: int, grains: mmap.mmap | None = None, keep: Keep | None = None) -> None:
        """`grains`: the map of a former process, a byte for every grain; without it, it is kept in memory. `keep(at,
        bytes)`: makes a change outlive the process where the store into `grains` does not; OSError."""
        self._size = size
        self._count = -(-size // GRAIN)
        self._bytes = mmap.mmap(-1, max(self._count, 1)) if grains is None else grains
        self._keep = keep
        # Protects the bytes and the fields below. Never held across I/O, but for `keep`.
        self._lock = threading.Lock()
        # Of writes under way by their number: first grain, the one behind the last, and the turn in which they began.
        # One store each, without the lock; so `list` before a look at all of them.
        self._under_way: dict[int, tuple[int, int, int]] = {}
        self._numbers = itertools.count(1)
        self._mark = 1
        self._turn = 0
        self._checkpoints = 0
        self._exposed = False
        self._last = DiskError("it is not known why")
        # Pages in which a byte may not be 0.
        self._pages = bytearray(-(-self._count // _PAGE))
        # What the next flush fails with, because nobody else has been told yet.
        self._untold: DiskError | None = None
        # Protects the numbers of flushes begun and ended, and the last that failed. Not held while flushing.
        self._changed = threading.Condition()
        self._begun = 0
        self._ended = 0
        self._failed = 0
        self._failure: DiskError | None = None
        self.on_loss: Callable[[Loss], bool] = _nobody
        """Takes note of a loss for good; whether a flush has to tell it, too. May be called by any thread that uses the
        disk, and does not use it itself. NotKept: `again` tells the loss once more, or the next process does."""
        self.closed: Callable[[], None] = _closed
        """Called when the map was let go."""
        self.kept = True
        """Whether the last loss was kept; `again`."""
        states = np.frombuffer(self._bytes, np.uint8)[: self._count]
        for page in range(len(self._pages)):
            part = states[page * _PAGE : (page + 1) * _PAGE]
            if part.any():
                self._pages[page] = 1
                part[(part & _WRITTEN) != 0] = (part[(part & _WRITTEN) != 0] & _FLAGS) | 1
                if (part & TOLD).any():
                    self._untold = DiskError("what a former process had written is lost; it may not have told that")
        self._states: npt.NDArray[np.uint8] = states

    def grow(self, size: int, grains: mmap.mmap | None, keep: Keep | None) -> None:
        """The disk has become larger, and the map goes on in `grains`; both as for a new one. No write is under way;
        a flush may be."""
        count = -(-size // GRAIN)
        with self._lock:
            fresh = mmap.mmap(-1, max(count, 1)) if grains is None else grains
            fresh[: self._count] = self._bytes[: self._count]
            self._pages.extend(bytes(-(-count // _PAGE) - len(self._pages)))
            self._size, self._count, self._keep = size, count, keep
            self._bytes = fresh
            self._states = np.frombuffer(fresh, np.uint8)[:count]
            self._keep_locked(0, count)

    # -- writes --------------------------------------------------------------------------------------------

    def begin(self, offset: int, length: int) -> int:
        """The range is about to be written; the number with which `end` must follow, whatever becomes of it."""
        first, stop = offset // GRAIN, -(-(offset + length) // GRAIN)
        number = next(self._numbers)
        # Before the bytes are looked at: a flush that ends meanwhile leaves those of writes under way as they are. Most
        # small writes find their byte set, and take no lock.
        self._under_way[number] = (first, stop, self._turn)
        if stop - first != 1 or self._bytes[first] & _WRITTEN != self._mark:
            self._lock.acquire()
            try:
                self._put_locked(first, stop)
            finally:
                self._lock.release()
        return number

    def end(self, number: int) -> None:
        """The write has ended."""
        first, stop, turn = self._under_way[number]
        if turn != self._turn:
            with self._lock:
                self._put_locked(first, stop)
        del self._under_way[number]

    def _put_locked(self, first: int, stop: int) -> None:
        """Grains [first, stop) are written in this turn."""
        states, mark = self._bytes, self._mark
        for grain in range(first, stop):
            state = states[grain]
            if state & _WRITTEN != mark:
                states[grain] = (state & _FLAGS) | mark
                if self._keep is not None:
                    self._keep_locked(grain, grain + 1)
                self._pages[grain // _PAGE] = 1

    def _keep_locked(self, first: int, stop: int) -> None:
        """Have grains [first, stop) outlive the process. Their blocks in the file were taken when it was opened."""
        if self._keep is not None:
            with contextlib.suppress(OSError):
                self._keep(first, self._bytes[first : min(stop, self._count)])

    # -- flushes -------------------------------------------------------------------------------------------

    def flush(self, flush: Callable[[], None]) -> None:
        """Everything written before this call is stable when it returns, by `flush()` or somebody else's; DiskError
        otherwise, and what was not stable is lost."""
        with self._changed:
            needed = self._begun + 1
            if not self._changed.wait_for(lambda: self._ended >= needed or self._begun == self._ended, _WAIT_S):
                raise DiskError(f"a flush of another request has been at work for {_WAIT_S:.0f} s")
            if self._ended >= needed:
                if self._failure is not None and self._failed >= needed:
                    raise self._failure.again() from self._failure
                return
            self._begun = number = needed
        # Not by a local variable that `finally` reads: mypyc takes it for None there.
        try:
            self._flush_alone(flush)
        except DiskError as error:
            self._flushed(number, error)
            raise
        except BaseException:
            self._flushed(number, DiskError("a flush was interrupted by an error of the program"))
            raise
        self._flushed(number, None)

    def _flushed(self, number: int, failure: DiskError | None) -> None:
        """Flush `number` has ended."""
        with self._changed:
            if failure is not None:
                self._failed, self._failure = number, failure
            self._ended = number
            self._changed.notify_all()

    def _flush_alone(self, flush: Callable[[], None]) -> None:
        with self._lock:
            covered, self._mark = self._mark, 3 - self._mark
            self._turn += 1
            checkpoints = self._checkpoints
        try:
            flush()
        except DiskError as error:
            self.lose(error, told=True)
            self._untold = None  # it is being told
            raise
        self._clear(covered, checkpoints)
        untold, self._untold = self._untold, None
        if untold is not None:
            raise untold.again() from untold

    def _clear(self, covered: int, checkpoints: int) -> None:
        """A flush has succeeded."""
        with self._lock:
            for first, stop, _ in list(self._under_way.values()):
                self._put_locked(first, stop)
            left = ~np.uint8(EXPOSED if checkpoints == self._checkpoints else 0)
            for start, states in self._runs():
                flushed = (states & _WRITTEN) == covered
                np.bitwise_and(states, np.where(flushed, np.uint8(LOST), np.uint8(0xFF)) & left, out=states)
                self._keep_locked(start, start + len(states))
                for page in range(start // _PAGE, -(-(start + len(states)) // _PAGE)):
                    self._pages[page] = int(bool(self._states[page * _PAGE : (page + 1) * _PAGE].any()))
            if checkpoints == self._checkpoints:
                self._exposed = False

    # -- losses --------------------------------------------------------------------------------------------

    @property
    def any(self) -> bool:
        """Whether something may be unflushed."""
        return 1 in self._pages

    def expose(self) -> bool:
        """A checkpoint is being taken: it has what is unflushed now. Whether that is anything."""
        found = False
        with self._lock:
            self._checkpoints += 1
            for start, states in self._runs():
                written = (states & _WRITTEN) != 0
                np.bitwise_or(states & ~np.uint8(EXPOSED), written * np.uint8(EXPOSED), out=states)
                self._keep_locked(start, start + len(states))
                found |= bool(written.any())
            self._exposed = found
        return found

    def _runs(self) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """The pages in which a byte may not be 0, neighbours together: the first grain, and the states from there."""
        page = self._pages.find(1)
        while page >= 0:
            stop = self._pages.find(0, page, page + _RUN)
            if stop < 0:
                stop = min(page + _RUN, len(self._pages))
            yield page * _PAGE, self._states[page * _PAGE : stop * _PAGE]
            page = self._pages.find(1, stop)

    def lose(self, error: DiskError, all_of_it: bool = True, told: bool = False) -> bool:
        """What is unflushed is gone, because of `error`; whether there was anything. `all_of_it`: if not, only what a
        former process has lost and nobody has taken note of. `told`: as in Loss."""
        ranges: list[tuple[int, int]] = []
        exposed: list[tuple[int, int]] = []
        with self._lock:
            self._mark = 3 - self._mark
            self._turn += 1
            for start, states in self._runs():
                lost = states != 0 if all_of_it else (states & LOST) != 0
                states[lost] = (states[lost] & EXPOSED) | LOST | self._mark
                self._keep_locked(start, start + len(states))
                ranges += self._ranges(lost, start)
                exposed += self._ranges(lost & ((states & EXPOSED) != 0), start)
            for first, stop, _ in list(self._under_way.values()):
                self._put_locked(first, stop)
            self._exposed = False
        if not ranges:
            return False
        self._last = error
        owed = 0
        try:
            if self.on_loss(Loss(ranges, exposed, error, told)):
                self._untold = error
                owed = TOLD if told else 0
        except NotKept:
            self.kept = False
            return True
        self.kept = True
        with self._lock:
            for offset, length in ranges:
                first, stop = offset // GRAIN, -(-(offset + length) // GRAIN)
                self._states[first:stop] &= _WRITTEN
                self._states[first:stop] |= owed
                self._keep_locked(first, stop)
        return True

    @property
    def exposed(self) -> bool:
        """Whether the last checkpoint may have something that is unflushed."""
        return self._exposed

    def again(self) -> None:
        """Tell the losses that were not kept once more."""
        self.lose(self._last, all_of_it=False, told=True)

    def _ranges(self, chosen: npt.NDArray[np.bool_], start: int) -> list[tuple[int, int]]:
        inside = np.zeros(len(chosen) + 2, np.bool_)
        inside[1:-1] = chosen
        edges = cast("list[int]", (np.flatnonzero(inside[1:] != inside[:-1]) + start).tolist())
        return [
            (first * GRAIN, min(stop * GRAIN, self._size) - first * GRAIN)
            for first, stop in zip(edges[::2], edges[1::2], strict=True)
        ]

    def close(self) -> None:
        """Let the map go."""
        self._states = np.empty(0, np.uint8)  # a mapping with a view of it cannot be closed
        self._bytes.close()
        self.closed()


def _closed() -> None:
    """Nobody has to know."""


def _nobody(_loss: Loss) -> bool:
    """Nobody keeps what the disk lacks: the next flush tells it."""
    return True
