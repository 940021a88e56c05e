# SPDX-License-Identifier: BSD-3-Clause
"""Records the file operations of the product at its seam (replication/disk/files.py), and makes from them what a disk
may hold after a power cut.

Time is a counter: every file operation takes one tick when it begins and one when it has ended, and so do the requests
and commands of the history, from the same counter. A cut at tick c: what has a tick up to c has happened.

The model of the storage, by file:

    sector      512 bytes: written as a whole or not at all
    stable      a write that had ended when a sync of the file began, once that sync has ended (or the write itself,
                if it was written with RWF_DSYNC)
    unstable    any other that had begun before the cut: lost or kept, each sector for itself. The page cache holds one
                version of a page, so a sector has one of the versions that it had since the last stable one.
    mapped      files whose changes need not survive a power cut (MAPPED): each sector as at the beginning or as at the
                end of the history; X.live may also be missing. What is written to them passes the seam where blocks
                are not overwritten in place (replication/disk/mapped.py), and when they are made; it is not recorded,
                but for the seals of maps (replication/record/grainfile.py), which count from their writing on.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from replication.disk import files
from replication.disk.files import Buffer
from replication.image.overlay import Overlay

SECTOR = 512
ZERO = bytes(SECTOR)
NEVER = 1 << 60
_SEAL = b"grains 1"
"""Begins the seal of a map."""

MAPPED = (".live", ".lost", ".changes", ".unflushed")
"""How the names of files end whose changes need not survive a power cut."""


class Killed(BaseException):
    """Ends the threads of a process that is killed in the middle of what they do."""


@dataclass
class Operation:
    """One write or zeroing of a file."""

    begun: int
    stable_alone: bool
    ended: int = NEVER


@dataclass
class Saved:
    """The state.json of one save; it has ended when it is stable."""

    begun: int
    content: bytes
    ended: int = NEVER


@dataclass
class File:
    """What has become of one file's sectors."""

    size: int
    first: dict[int, bytes]
    """The sectors that were not zeroes at the beginning."""
    versions: dict[int, list[tuple[Operation, bytes]]] = field(default_factory=dict)
    """By sector, in the order in which they were begun."""
    syncs: list[tuple[int, int]] = field(default_factory=list)
    """(begun, ended) of those that have ended."""

    def newest(self, sector: int) -> bytes:
        versions = self.versions.get(sector)
        return versions[-1][1] if versions else self.first.get(sector, ZERO)

    def known(self, first: int, last: int) -> list[int]:
        """The sectors of [first, last) that are not zeroes for certain."""
        if last - first <= len(self.first) + len(self.versions):
            return [sector for sector in range(first, last) if sector in self.first or sector in self.versions]
        return [sector for sector in {*self.first, *self.versions} if first <= sector < last]

    def at(self, tick: int) -> dict[int, bytes]:
        """The sectors as whoever reads the file sees them at that time; those that are missing are zeroes."""
        content = dict(self.first)
        for sector, versions in self.versions.items():
            for operation, data in reversed(versions):
                if operation.begun <= tick:
                    content[sector] = data
                    break
        return content

    def candidates(self, tick: int) -> Iterator[tuple[int, list[tuple[Operation | None, bytes]]]]:
        """What each written sector may hold after a cut, newest first; the last one is stable."""
        synced = max((begun for begun, ended in self.syncs if ended <= tick), default=0)
        for sector, versions in self.versions.items():
            found: list[tuple[Operation | None, bytes]] = []
            for operation, data in reversed(versions):
                if operation.begun > tick:
                    continue
                found.append((operation, data))
                if operation.ended < synced or (operation.stable_alone and operation.ended <= tick):
                    break
            else:
                found.append((None, self.first.get(sector, ZERO)))
            yield sector, found

    def cut(self, tick: int, choice: random.Random) -> dict[int, bytes]:
        """One permitted content after a cut. `choice` also decides how: all kept, all lost, whole operations, or
        sectors."""
        keep = choice.choice((0.0, 1.0, choice.random(), choice.random()))
        torn = choice.random() < 0.5
        kept: dict[int, bool] = {}
        content = dict(self.first)
        for sector, found in self.candidates(tick):
            chosen = found[-1][1]
            for operation, data in found[:-1]:
                assert operation is not None
                take = choice.random() < keep
                if not torn:
                    take = kept.setdefault(operation.begun, take)
                if take:
                    chosen = data
                    break
            content[sector] = chosen
        return content


def sectors_of(content: bytes) -> dict[int, bytes]:
    """The sectors that are not zeroes; the last one may be short and is filled up."""
    found = {}
    for at in range(0, len(content), 1 << 16):
        part = content[at : at + (1 << 16)]
        if part.count(0) != len(part):
            for start in range(0, len(part), SECTOR):
                data = part[start : start + SECTOR].ljust(SECTOR, b"\0")
                if data != ZERO:
                    found[(at + start) // SECTOR] = data
    return found


class Recorder:
    """Stands in for the functions of the seam while `installed`."""

    def __init__(self, seed: int, restless: bool) -> None:
        """`restless`: threads are delayed here and there, so that they meet in more ways."""
        self.files: dict[str, File] = {}
        self.records: list[Saved] = []
        """What was written to state.json, in this order."""
        self.epochs: dict[int, int] = {}
        """When each checkpoint was begun."""
        self.seals: dict[str, list[tuple[int, int, bytes]]] = {}
        """By map, when, where and what was written of its seal."""
        self.now = 0
        self.failing: Callable[[str, int], bool] = lambda path, offset: False
        """Whether a write fails (EIO)."""
        self.on_kill: Callable[[], None] | None = None
        self.kill_at = NEVER
        self._restless = restless
        self._delays = random.Random(seed)
        # Protects the clock and all that is recorded.
        self._lock = threading.Lock()

    def tick(self) -> int:
        """The next moment."""
        with self._lock:
            self.now += 1
            return self.now

    def track(self, path: Path) -> None:
        """Record a file; all that it holds now is stable."""
        content = path.read_bytes()
        self.files[str(path)] = File(len(content), sectors_of(content))

    def kill_in(self, ticks: int | None) -> None:
        """Every thread that comes to the seam after so many ticks is ended there; None: no longer."""
        with self._lock:
            self.kill_at = NEVER if ticks is None else self.now + ticks

    def _check_alive(self) -> None:
        if self.killing:
            with self._lock:
                on_kill, self.on_kill = self.on_kill, None
                if on_kill is not None:
                    on_kill()
            raise Killed

    @property
    def killing(self) -> bool:
        """Whether the process is being killed."""
        return self.now >= self.kill_at

    def delay(self, longest_s: float = 0.001) -> None:
        """Let other threads go first, perhaps."""
        if threading.current_thread().name == "commit":
            longest_s = 0.003  # it would be over before the guest does anything
        if self._restless and self._delays.random() < 0.4:
            time.sleep(self._delays.random() * longest_s)

    # -- the seam ------------------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Record from here on."""
        former = (files.preadv, files.pwritev, files.fallocate, files.clone_range, files.fdatasync, files.replace)
        unpublished, mark = Overlay.unpublished, Overlay.mark

        def delayed_unpublished(overlay: Overlay) -> list[tuple[int, bytes]]:
            words = unpublished(overlay)
            # What they say is getting old.
            self.delay(0.005)
            return words

        def delayed_mark(overlay: Overlay, *arguments: object) -> None:
            self.delay()
            mark(overlay, *arguments)

        files.preadv, files.pwritev, files.fallocate = self.preadv, self.pwritev, self.fallocate
        files.clone_range, files.fdatasync, files.replace = self.clone_range, self.fdatasync, self.replace
        if self._restless:
            Overlay.unpublished, Overlay.mark = delayed_unpublished, delayed_mark
        try:
            yield
        finally:
            files.preadv, files.pwritev, files.fallocate, files.clone_range, files.fdatasync, files.replace = former
            Overlay.unpublished, Overlay.mark = unpublished, mark

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._check_alive()
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        self._check_alive()
        path = _path(fd)
        if self.failing(path, offset):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = b"".join(buffers)
        if path.endswith(MAPPED):
            if data.startswith(_SEAL):
                self.seals.setdefault(path, []).append((self.tick(), offset, data))
            return os.pwritev(fd, [data], offset, flags)
        self.delay()
        # Done under the lock: what is recorded first has been done first, also where two writes meet.
        with self._lock:
            operation = self._begin_locked(path, offset, data, bool(flags & os.RWF_DSYNC))
            if path.endswith("/epoch") and offset == 0 and data[0] & 1:
                self.epochs.setdefault(int.from_bytes(data[:8], "little") >> 1, operation.begun)
            if path.endswith("/state.json"):
                self.records.append(Saved(operation.begun, data))
            count = os.pwritev(fd, [data], offset)
        assert count == len(data), "a short write: the file system is full"
        self.delay()
        operation.ended = self.tick()
        return count

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._check_alive()
        path = _path(fd)
        if path.endswith(MAPPED):
            former_fallocate(fd, mode, offset, length)
            return
        with self._lock:
            operation = self._begin_zero_locked(path, offset, length)
            former_fallocate(fd, mode, offset, length)
        operation.ended = self.tick()

    def clone_range(self, source: int, fd: int, offset: int, length: int) -> None:
        """This file system has no reflinks: all that reaches a file is written to it."""
        self._check_alive()
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def fdatasync(self, fd: int) -> None:
        """Nothing is synced: what that would do is in `File.cut`."""
        self._check_alive()
        path = _path(fd)
        if path.endswith(MAPPED):
            return
        begun = self.tick()
        self.delay()
        with self._lock:
            self.now += 1
            self.files[path].syncs.append((begun, self.now))
            if path.endswith("/state.json"):
                for saved in self.records:
                    saved.ended = min(saved.ended, self.now)

    def replace(self, path: str, content: bytes) -> None:
        raise AssertionError(f"{path} needed room, and was to have it from the start")

    def _begin_locked(self, path: str, offset: int, data: bytes, stable_alone: bool) -> Operation:
        self.now += 1
        operation = Operation(self.now, stable_alone)
        file = self.files[path]
        assert offset + len(data) <= file.size, f"{path} has grown"
        at = 0
        while at < len(data):
            sector, start = divmod(offset + at, SECTOR)
            part = data[at : at + SECTOR - start]
            if len(part) < SECTOR:
                old = file.newest(sector)
                part = old[:start] + part + old[start + len(part) :]
                at += SECTOR - start
            else:
                at += SECTOR
            file.versions.setdefault(sector, []).append((operation, part))
        return operation

    def _begin_zero_locked(self, path: str, offset: int, length: int) -> Operation:
        self.now += 1
        operation = Operation(self.now, False)
        file = self.files[path]
        stop = offset + length
        for sector in file.known(offset // SECTOR, -(-stop // SECTOR)):
            start, end = max(0, offset - sector * SECTOR), min(SECTOR, stop - sector * SECTOR)
            old = file.newest(sector)
            file.versions.setdefault(sector, []).append((operation, old[:start] + bytes(end - start) + old[end:]))
        return operation


former_fallocate = files.fallocate


def _path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


@contextmanager
def without_syncs() -> Iterator[None]:
    """For the process after the cut: nothing cuts it again, so its syncs would only cost time."""
    former = (files.pwritev, files.fdatasync)

    def pwritev(fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        return os.pwritev(fd, buffers, offset)

    files.pwritev, files.fdatasync = pwritev, lambda fd: None
    try:
        yield
    finally:
        files.pwritev, files.fdatasync = former
