# SPDX-License-Identifier: BSD-3-Clause
"""Guests that write all the time, each in a region of its own, and know what must be there.

A guest does one request after the other. Request number n fills its sectors with n, or zeroes them. One that fails, or
whose connection goes, is repeated until it succeeds. So the region holds, at any time, what it held after so many
requests, and perhaps a part of the next one; and so does each checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import nbd
import numpy as np

from content import KIB
from netpair import SECTOR, Stamps, stamps_in
from soak.bounds import Bounds
from soak.node import Node
from waiting import DEADLINE_S, Stuck, wait_until


@dataclass(frozen=True)
class Done:
    """A request that changes something; `at` and `stop` are sectors."""

    kind: str
    at: int
    stop: int
    number: int

    @property
    def value(self) -> int:
        """What its sectors hold."""
        return self.number if self.kind == "write" else 0


class Region:
    """What a guest's region must hold."""

    def __init__(self, sectors: int) -> None:
        self.now: Stamps = np.zeros(sectors, np.uint64)
        """After all that was answered."""
        self.begun: Done | None = None
        """The request under way."""
        self._base = self.now.copy()
        self._since: list[Done] = []

    def begin(self, done: Done) -> None:
        """It may be there in part from now on."""
        self.begun = done

    def end(self) -> None:
        """It was answered."""
        assert self.begun is not None
        self.now[self.begun.at : self.begun.stop] = self.begun.value
        self._since.append(self.begun)
        self.begun = None

    @property
    def count(self) -> int:
        """How many were answered since the last `keep` took effect."""
        return len(self._since)

    def keep(self, count: int) -> None:
        """What the first `count` have done is in a checkpoint that was taken: nothing goes back behind that."""
        for done in self._since[:count]:
            self._base[done.at : done.stop] = done.value
        del self._since[:count]

    def adopt(self, found: Stamps) -> bool:
        """Whether this is what a checkpoint may hold; if so, the guest goes on from there."""
        stamps = self._base.copy()
        for done in [*self._since, self.begun, None]:
            differ = np.flatnonzero(stamps != found)
            if not len(differ) or (
                done is not None
                and differ[0] >= done.at
                and differ[-1] < done.stop
                and bool((found[differ] == done.value).all())
            ):
                self.now, self._base, self._since = found.copy(), found.copy(), []
                return True
            if done is None:
                return False
            stamps[done.at : done.stop] = done.value
        return False


class Guest:
    """One of them."""

    def __init__(self, number: int, region: tuple[int, int], rate: float, seed: str, bounds: Bounds) -> None:
        """It writes between two offsets, at most `rate` requests a second."""
        self.start_at, stop = region
        self.length = stop - self.start_at
        self.region = Region(self.length // SECTOR)
        self.node: Node | None = None
        """Where it runs; set while it rests."""
        self.excused: Callable[[str], tuple[bool, float]] = lambda kind: (False, 0.0)
        """Whether its disk fails such a request, and how slow it is, in seconds a request."""
        self._number = number
        self._bounds = bounds
        self._rate = rate
        self._random = Random(f"{seed}/guest-{number}")
        self._going, self._resting, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._resting.set()
        self._handle: nbd.NBD | None = None
        self._serial = 0
        self._thread = threading.Thread(target=self._run, name=f"guest-{number}", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin, resting."""
        self._thread.start()

    def go(self, node: Node) -> None:
        """Go on, there."""
        if node is not self.node:
            self._handle = None
        self.node = node
        self._resting.clear()
        self._going.set()

    def hold(self) -> None:
        """No request is under way when this returns. One whose connection has gone may be there in part."""
        self._going.clear()
        wait_until(self._resting.is_set, f"guest {self._number} rests")
        if self.failure is not None:
            raise self.failure

    @property
    def connected(self) -> bool:
        """Whether it has a connection."""
        return self._handle is not None

    def stop(self) -> None:
        """End."""
        self._ending.set()
        self._going.set()
        self._thread.join(DEADLINE_S)

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            due = time.monotonic()
            while not self._ending.is_set():
                if not self._going.is_set():
                    self._resting.set()
                    self._going.wait(1.0)
                    continue
                due = max(due, time.monotonic() - 0.2) + self._random.uniform(0.5, 1.5) / self._rate
                self._ending.wait(max(0.0, due - time.monotonic()))
                self._next()
        except BaseException as error:  # noqa: BLE001 (`hold` raises it)
            self.failure = error
        finally:
            self._resting.set()

    def _next(self) -> None:
        kind = self._random.choices(["write", "zero", "trim", "flush", "read"], [70, 3, 5, 6, 16])[0]
        sectors = self.length // SECTOR
        most = 256 * KIB if kind != "write" or self._random.random() < 0.05 else 32 * KIB
        count = self._random.randint(1, most // SECTOR)
        at = self._random.randrange(sectors - count)
        if self.region.begun is not None:
            done: Done | None = self.region.begun  # what was under way when it was held
        elif kind in ("write", "zero", "trim"):
            self._serial += 1
            done = Done(kind, at, at + count, self._serial)
            self.region.begin(done)
        else:
            done = None
        while self._going.is_set() and not self._ending.is_set():
            if self._tried(kind if done is None else done.kind, done, at, count):
                return

    def _tried(self, kind: str, done: Done | None, at: int, count: int) -> bool:
        """Whether it succeeded."""
        begun, disk_s = time.monotonic(), self.excused(kind)[1]
        offset = self.start_at + (at if done is None else done.at) * SECTOR
        length = (count if done is None else done.stop - done.at) * SECTOR
        what = f"guest {self._number} on {self.node.name if self.node else '?'}: {kind} {offset}+{length}"
        handle = self._connected()
        if handle is None:
            self._ending.wait(0.05)
            return False
        begun = time.monotonic()
        try:
            if kind == "write":
                assert done is not None
                handle.pwrite(done.number.to_bytes(8, "big") * (length // 8), offset)
            elif kind in ("zero", "trim"):
                getattr(handle, kind)(length, offset)
            elif kind == "flush":
                handle.flush()
            else:
                found = stamps_in(bytes(handle.pread(length, offset)))
                if not np.array_equal(found, self.region.now[at : at + count]):
                    self._bounds.violate(f"{what} reads something else than was written")
        except nbd.Error as error:
            ended = time.monotonic()
            if not handle.aio_is_ready():
                self._handle = None  # its node has gone; whoever has ended it knows
                self._bounds.did("guest's connections lost")
                return False
            self._bounds.waited(what, begun, ended, max(disk_s, self.excused(kind)[1]), kind)
            self._bounds.refused(what, f"{error} ({self.node.last_words()})", self.excused(kind)[0])
            self._ending.wait(0.1)
            return False
        self._bounds.waited(what, begun, time.monotonic(), max(disk_s, self.excused(kind)[1]), kind)
        if done is not None:
            self.region.end()
        self._bounds.did(f"guest: {kind}")
        return True

    def _connected(self) -> nbd.NBD | None:
        assert self.node is not None
        if self._handle is None:
            try:
                self._handle = self.node.process.connect(self.node.export)
            except nbd.Error:
                return None
        return self._handle


class Guests:
    """All of them, and what their disk must hold."""

    def __init__(self, guests: list[Guest], bounds: Bounds) -> None:
        self._guests = guests
        self._bounds = bounds
        for guest in guests:
            guest.start()

    def go(self, node: Node) -> None:
        """They go on, there."""
        for guest in self._guests:
            guest.go(node)

    def hold(self) -> None:
        """They rest when this returns."""
        for guest in self._guests:
            guest.hold()

    def counts(self) -> list[int]:
        """How many requests of each were answered: before a checkpoint."""
        return [guest.region.count for guest in self._guests]

    def keep(self, counts: list[int]) -> None:
        """That checkpoint was taken; to be called before any other `keep`, and with nobody else changing it."""
        for guest, count in zip(self._guests, counts, strict=True):
            guest.region.keep(count)

    @property
    def connected(self) -> int:
        """How many have a connection: one that has lost it connects again with its next request."""
        return sum(guest.connected for guest in self._guests)

    def compare(self, disk: bytes, what: str) -> None:
        """With the guests resting: a disk holds exactly what they have written."""
        for number, guest in enumerate(self._guests):
            found = stamps_in(disk[guest.start_at : guest.start_at + guest.length])
            begun = guest.region.begun
            differ = [
                int(sector)
                for sector in np.flatnonzero(found != guest.region.now)
                if begun is None or not (begun.at <= sector < begun.stop and found[sector] == begun.value)
            ]
            if differ:
                self._bounds.violate(
                    f"{what}: {len(differ)} sectors of guest {number} differ, the first is {differ[0]}:"
                    f" {found[differ[0]]} instead of {guest.region.now[differ[0]]}"
                )

    def adopt(self, disk: bytes, what: str) -> None:
        """With the guests resting: what a failover has left is one of the checkpoints that it may be; go on there."""
        for number, guest in enumerate(self._guests):
            found = stamps_in(disk[guest.start_at : guest.start_at + guest.length])
            if not guest.region.adopt(found):
                raise Stuck(f"{what}: the region of guest {number} is as after none of its requests")

    def stop(self) -> None:
        """End."""
        for guest in self._guests:
            guest.stop()
