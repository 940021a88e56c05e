# SPDX-License-Identifier: BSD-3-Clause
"""Where the process's threads run: on one core together while they serve many short requests.

Python runs one thread at a time, so nbdkit's request threads hand its lock (the GIL) to each other several times a
request. On one core that is a cheap switch, and the thread that gives the lock up goes on instead of the one that it
has woken; over two cores each hand-over is a message from core to core. Same process, 16 threads, the two ways in turn:

    4k random reads, primary     35k -> 61k a second      4k random writes, guest face    19k -> 36k
    64k random reads, primary    22k -> 25k               64k random writes, guest face   16k -> 18k
    256k reads, primary         2800 -> 2370 MB/s         256k writes, guest face       1930 -> 1570 MB/s
    1M reads, primary           3060 -> 2610 MB/s         1M writes, guest face         2480 -> 2210 MB/s

Large requests lose, because copies are made without the lock, and so side by side. What is gained is the same for
each request, what is lost the same for each byte: so the mean size of a request decides, and it is even between 64k
and 256k.

Which core: the idlest of those that this process may use, and none that another process of this plugin has chosen if
there is another. For that each puts a name on its core: a Unix socket bound in the abstract namespace, which two can
never have both, and which goes with its process. Between containers the names are not seen, and other programs put
none, so the loads are looked at again and again, too.

Invariants
* Threads are never put outside the set that the process had when they were put together, and get it back.
* Whoever changes the set meanwhile (taskset) has the last word: from then on nothing is done here.
* An error of the kernel (no /proc, no permission, a core that has gone) ends it, and costs speed only.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from replication.log import surviving
from replication.order.worker import NO_THREAD

LOOK_S = 0.1
IDLE_LOOK_S = 0.2
"""Between two looks at the requests while there are some, and while there are none. A look at nothing costs 0.15 ms,
most of which is waking up: less than a thousandth of a core."""

_CONFIRM_S = 0.05
"""Between the first look that finds many short requests and the next: long enough to see which core is idle (the kernel
tells hundredths of a second), short because the guest is served more slowly meanwhile."""

SIZE_TOGETHER = 96 << 10
SIZE_APART = 160 << 10
"""Mean bytes of a request, up to which threads are put together, and above which they are let go."""

RATE_TOGETHER = 2000.0
RATE_APART = 500.0
"""Requests a second, from which on threads are put together, and below which they are let go: at 1000 a second all the
hand-overs together take less than a hundredth of a core."""

_AGREE = 2
"""Looks in a row that must say the same before something is done."""

_SLOW_LOOKS = 10
"""Looks in a row with few requests (1 s) or none (2 s) before threads are let go: a guest's pause is no reason."""

_LOAD_LOOKS = (3, 7)
"""Looks between two at the loads, at random: two processes that share a core do not leave it for the same at once."""

CROWDED = 0.25
"""Share of the core that others use, and by how much less another core must be in use, for a move."""

_PASSES = 5
"""Lists of threads that are read until no new one is found; later ones inherit from those."""

_STOP_S = 1.0

_NAME = "\0nbdkit-replication.core"


class Pace(Enum):
    """What the requests of the time between two looks were."""

    SHORT = auto()
    LARGE = auto()
    SLOW = auto()


@dataclass(frozen=True)
class Traffic:
    """Counts since the beginning of the process."""

    at_s: float
    requests: int
    bytes: int


@dataclass(frozen=True)
class Load:
    """CPU seconds since the beginning: of this process, and of everything by core."""

    at_s: float
    own_s: float
    busy_s: Mapping[int, float] = field(default_factory=dict)


def pace(now: Traffic, before: Traffic, together: bool) -> Pace:
    """What the requests between two looks were. The limits depend on what is the case, so that a load between them
    changes nothing."""
    seconds, requests = now.at_s - before.at_s, now.requests - before.requests
    if requests <= 0 or requests < (RATE_APART if together else RATE_TOGETHER) * seconds:
        return Pace.SLOW
    # The bytes go back when a node changes its role, and with it its disks.
    if now.bytes - before.bytes <= (SIZE_APART if together else SIZE_TOGETHER) * requests:
        return Pace.SHORT
    return Pace.LARGE


def loads(now: Load, before: Load, held: int | None) -> dict[int, float]:
    """Share of each core that was used between two looks, on the core `held` without our own."""
    seconds = max(now.at_s - before.at_s, 1e-3)
    used = {core: (now.busy_s[core] - busy_s) / seconds for core, busy_s in before.busy_s.items() if core in now.busy_s}
    if held in used:
        used[held] -= (now.own_s - before.own_s) / seconds
    return used


def ranking(used: Mapping[int, float], cores: Collection[int]) -> list[int]:
    """Those of `cores` whose load is known, the idlest first; at random where they differ by less than a tenth."""
    return sorted((core for core in cores if core in used), key=lambda core: (int(10 * used[core]), random.random()))


def better(used: Mapping[int, float], held: int, cores: Collection[int]) -> int | None:
    """The core to move to from the one held, if others want that and another is freer. Who may run anywhere leaves a
    busy core by himself, so this is for those that may not."""
    if used.get(held, 0.0) < CROWDED:
        return None
    other = next((core for core in ranking(used, cores) if core != held), None)
    return other if other is not None and used[other] + CROWDED <= used[held] else None


class Cores:
    """The kernel's side: OSError or ValueError when it does not play along."""

    def given(self) -> set[int]:
        """Cores on which the process may run at present; nbdkit's main thread stands for all."""
        return os.sched_getaffinity(os.getpid())

    def confine(self, cores: Collection[int]) -> None:
        """Let every thread of the process run on these only."""
        done: set[int] = set()
        for _ in range(_PASSES):
            found = {int(name) for name in os.listdir("/proc/self/task")} - done
            if not found:
                return
            # The main thread, which makes the connections' threads, is the first.
            for thread in sorted(found):
                with contextlib.suppress(ProcessLookupError):  # it has ended since the listing
                    os.sched_setaffinity(thread, cores)
            done |= found

    def clock(self) -> float:
        """Seconds since some time."""
        return time.monotonic()

    def load(self) -> Load:
        """What the cores do; those that are switched off are not there."""
        hertz = os.sysconf("SC_CLK_TCK")
        busy_s: dict[int, float] = {}
        with open("/proc/stat", encoding="ascii") as file:
            for line in file:
                # cpuN user nice system idle iowait irq softirq steal guest...; a guest's time is in the user's, too.
                name, *ticks = line.split()[:9]
                if not name.startswith("cpu"):
                    break  # what follows is long: every interrupt
                if name != "cpu":
                    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks)
                    busy_s[int(name[3:])] = (user + nice + system + irq + softirq + steal) / hertz
        return Load(self.clock(), time.process_time(), busy_s)

    def claim(self, core: int) -> socket.socket | None:
        """Put a name on a core; closing takes it away. None if another process has it, or none may be put."""
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)  # bound only: nobody can connect
        try:
            claim.bind(f"{_NAME}{core}")
        except OSError:
            claim.close()
            return None
        return claim


class Placement:
    """Looks at the traffic several times a second, in a thread of its own, and puts the threads where they belong."""

    def __init__(
        self, traffic: Callable[[], tuple[int, int]], debug: Callable[[str], None], cores: Cores | None = None
    ) -> None:
        """`traffic()` returns the requests and the bytes served so far; `debug` takes lines that only a developer
        wants to read."""
        self._traffic = traffic
        self._debug = debug
        self._cores = cores or Cores()
        self._thread = threading.Thread(target=self._run, name="placement", daemon=True)
        self._over = threading.Event()
        # The rest belongs to the thread, and to `stop` once that has ended.
        self.core: int | None = None
        """Where the threads are together; None while they run where the kernel likes."""
        self._given: set[int] = set()
        self._claim: socket.socket | None = None
        self._before: Traffic | None = None
        self._idle = True
        self._load: Load | None = None
        self._until_load = 0
        self._said: tuple[Pace, int] = (Pace.SLOW, 0)
        self._crowded = 0

    def start(self) -> None:
        """Begin, after nbdkit has forked; where there is one core only there is nothing to do."""
        try:
            if len(self._cores.given()) > 1:
                self._thread.start()
        except (OSError, *NO_THREAD) as error:
            self._debug(f"placement: {error}")

    def stop(self) -> None:
        """End, and let the threads run where they could at first; waits a second at most."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
        try:
            self._let_go()
        except (OSError, ValueError) as error:
            self._debug(f"placement: {error}")

    def _run(self) -> None:
        while not self._over.wait(self._period()):
            with surviving():
                self.look()

    def _period(self) -> float:
        if self._idle:
            return IDLE_LOOK_S
        return _CONFIRM_S if self.core is None and self._said[0] is Pace.SHORT else LOOK_S

    def look(self) -> None:
        """Look once, and do what is to be done."""
        before, self._before = self._before, Traffic(self._cores.clock(), *self._traffic())
        if before is None:
            return
        self._idle = self._before.requests == before.requests
        try:
            self._follow(pace(self._before, before, self.core is not None))
        except (OSError, ValueError) as error:
            self._debug(f"placement: {error}; nothing more is done")
            self._give_up()

    def _follow(self, found: Pace) -> None:
        said, times = self._said
        self._said = (found, times + 1 if found is said else 1)
        if self.core is None:
            self._look_apart()
        else:
            self._look_together(self.core)

    def _look_apart(self) -> None:
        found, times = self._said
        if found is not Pace.SHORT:
            self._load = None
            return
        load, before = self._cores.load(), self._load
        self._load = load
        if times >= _AGREE and before is not None:
            self._given = self._cores.given()
            if len(self._given) > 1:
                self._settle(ranking(loads(load, before, None), self._given))

    def _look_together(self, core: int) -> None:
        found, times = self._said
        if (found is Pace.LARGE and times >= _AGREE) or (found is Pace.SLOW and times >= _SLOW_LOOKS):
            self._let_go()
            return
        self._until_load -= 1
        if self._until_load > 0:
            return
        self._until_load = random.randint(*_LOAD_LOOKS)
        if self._overruled(core):
            return
        load, before = self._cores.load(), self._load
        self._load = load
        if before is None:
            return
        if self._claim is None:
            self._claim = self._cores.claim(core)
        used = loads(load, before, core)
        other = better(used, core, self._given)
        self._crowded = self._crowded + 1 if other is not None else 0
        if other is not None and self._crowded >= _AGREE:
            self._settle([place for place in ranking(used, self._given) if used[place] < used[other] + CROWDED])

    def _settle(self, places: list[int]) -> None:
        """Put all threads on the first of these cores that is nobody's, or on the first if there is none."""
        claim = None
        for core in places:
            claim = self._cores.claim(core)
            if claim is not None:
                break
        else:
            if not places:
                return
            core = places[0]
        former, self._claim = self._claim, claim
        if former is not None:
            former.close()
        self.core = core
        self._cores.confine({core})
        # What was measured before is of another place.
        self._load, self._crowded, self._until_load = None, 0, 0
        self._debug(f"placement: all threads on core {core}")

    def _let_go(self) -> None:
        if self.core is None or self._overruled(self.core):
            return
        self._cores.confine(self._given)
        self._forget()
        self._debug("placement: threads run where the kernel likes")

    def _overruled(self, core: int) -> bool:
        if self._cores.given() == {core}:
            return False
        self._debug("placement: the process's cores were changed from outside; nothing more is done")
        self._over.set()
        self._forget()
        return True

    def _forget(self) -> None:
        self.core, self._load = None, None
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.close()

    def _give_up(self) -> None:
        """Leave no thread alone on a core that nobody looks after any more."""
        try:
            if self.core is not None:
                self._cores.confine(self._given)
        except (OSError, ValueError) as error:
            self._debug(f"placement: {error}")
        self._over.set()
        self._forget()
