# SPDX-License-Identifier: BSD-3-Clause
"""What must hold throughout a soak, and the figures that are held against it.

Each bound is a promise of the documentation, which is named with it. What the machine itself stood still (`Stalls`) is
no fault of the product, and is added to what a wait may take.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from content import MIB

ANSWER_S = 2.0
"""Failover, the queries and `quit` (docs/failures.md, and the text of control/server.py)."""

WAIT_FACTOR = 1.25
"""A guest waits for the secondary for this much of `timeout` at most (docs/link.md)."""

SLACK_S = 1.0
"""On top of each wait: a process has to be scheduled, several times, on a machine that does other things."""

DISK_REQUESTS = 6
"""Requests of the disk that one of the guest may wait for, one after the other: of those before it on its blocks, and
its own."""

END_S = 8.0
"""From the answer to `quit` to the end of the process, which ends as if killed after 4 s (server/disconnect.py)."""

KIND_LINES = 10
"""Lines of one kind in a second (docs/operating.md), and one more, with their count."""

ANON_MAX = 200 * MIB
"""Private memory of a node: Python with numpy, twice queue-limit, and the buffers of nbdkit's workers."""

THREADS_PER_CONNECTION = 17
"""nbdkit's own: 16 workers and the one that reads."""

CONNECTIONS_KEPT_S = 10.0
"""How long nbdkit may take to notice that a client has gone: its threads count for so long."""

PAIR_CONNECTIONS = 8
"""Those of the other node at a time, those being replaced included."""

THREADS_OWN = 24
CONTROL_CLIENTS = 20
"""The most that a control socket serves, two threads each."""

FILES_MAX = 96
"""Descriptors of a node without its NBD clients."""

QUIET_GROWTH = 12
"""By how much the threads, and the descriptors, of one process may differ between two quiet points."""

TOLD_MAX = 40

_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")


@dataclass(frozen=True)
class Sample:
    """One look at a process."""

    pid: int
    resident: int
    anonymous: int
    """Bytes."""
    threads: int
    descriptors: int
    connections: int
    """NBD clients that the soak itself has at that node, at most, in the last seconds."""
    stuck: int = 0
    """Connections that this process cannot end, because a thread of nbdkit 1.32 was put to sleep (server/hangup.py)."""


@dataclass
class Figures:
    """The extremes of a soak."""

    longest: dict[str, float] = field(default_factory=dict)
    """Seconds, by what was waited for."""
    most: dict[str, float] = field(default_factory=dict)
    """By what was counted."""
    done: Counter[str] = field(default_factory=Counter)
    """How often what was done."""


class Stalls:
    """When this machine stood still: how late a thread is woken that wants to run every STEP_S."""

    STEP_S = 0.05

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """No more."""
        self._ending.set()
        self._thread.join(10)

    def _run(self) -> None:
        before = time.monotonic()
        while not self._ending.wait(self.STEP_S):
            now = time.monotonic()
            self.note(now, now - before - self.STEP_S)
            before = now

    def note(self, now: float, late_s: float) -> None:
        """Woken so late, at `now` (monotonic)."""
        if late_s > self.STEP_S:
            self._late.append((now, late_s))

    def within(self, begun: float, ended: float) -> float:
        """Seconds lost between two moments."""
        return sum(late_s for at, late_s in list(self._late) if begun <= at <= ended + self.STEP_S)


class Bounds:
    """Takes what was measured, and keeps what was violated. Any thread may tell it."""

    def __init__(
        self, timeout_s: float, stalls: Stalls | None = None, told: Callable[[str], None] = lambda text: None
    ) -> None:
        """`told(text)` is called for each violation when it is found: an hour is long."""
        self.violated: list[str] = []
        self._told = told
        self.figures = Figures()
        self.begun = time.monotonic()
        self._timeout_s = timeout_s
        self._stalls = stalls or Stalls()
        self._lock = threading.Lock()
        self._quiet: dict[tuple[int, str], Sample] = {}

    # -- what was found ------------------------------------------------------------------------------------

    def violate(self, text: str) -> None:
        """Something that must not be."""
        with self._lock:
            self.figures.done["violations"] += 1
            if len(self.violated) < TOLD_MAX:
                self.violated.append(f"after {time.monotonic() - self.begun:.1f} s: {text}")
                self._told(f"violated {self.violated[-1]}")

    def did(self, what: str, times: int = 1) -> None:
        """Count it."""
        with self._lock:
            self.figures.done[what] += times

    def reached(self, epoch: int) -> None:
        """A checkpoint has this number: those taken by themselves count, too."""
        self._most("the number of the last checkpoint", epoch)

    def _longest(self, what: str, seconds: float) -> None:
        with self._lock:
            self.figures.longest[what] = max(self.figures.longest.get(what, 0.0), seconds)

    def _most(self, what: str, value: float) -> None:
        with self._lock:
            self.figures.most[what] = max(self.figures.most.get(what, 0), value)

    # -- time ----------------------------------------------------------------------------------------------

    def answered(self, command: str, begun: float, ended: float, limit_s: float = ANSWER_S) -> None:
        """A command that has to get through, whoever else is connected and whatever the storage does."""
        took = ended - begun - self._stalls.within(begun, ended)
        self._longest(command, took)
        if took > limit_s:
            self.violate(f"{command} was answered after {took:.2f} s, and may take {limit_s:g} s")

    def waited(self, what: str, begun: float, ended: float, disk_s: float = 0.0, kind: str = "request") -> None:
        """A request of the guest, a write, say; its disk takes `disk_s` a request at that time."""
        took = ended - begun - self._stalls.within(begun, ended)
        limit_s = WAIT_FACTOR * self._timeout_s + DISK_REQUESTS * disk_s + SLACK_S
        self._longest(f"a guest's {kind}", took)
        if not disk_s:
            self._longest(f"a guest's {kind}, its disk being quick", took)
        if took > limit_s:
            self.violate(f"{what} took {took:.2f} s, and may take {limit_s:.2f} s")

    def aged(self, node: str, age_s: float, former_s: float, passed_s: float, took_s: float) -> None:
        """A checkpoint's age, `passed_s` after it was `former_s`: it grows as time does, whatever the clock is set
        to. Both queries together took `took_s`; when each looked is not known better than that."""
        wrong = abs(age_s - former_s - passed_s)
        self._longest("a checkpoint's age, too much or too little", wrong)
        if wrong > 0.5 + took_s:
            self.violate(f"{node}: the checkpoint's age went from {former_s:.1f} to {age_s:.1f} s in {passed_s:.1f} s")

    # -- resources -----------------------------------------------------------------------------------------

    def sampled(self, node: str, sample: Sample) -> None:
        """A process, at any time."""
        connections = sample.connections + PAIR_CONNECTIONS + sample.stuck
        threads = THREADS_PER_CONNECTION * connections + 2 * CONTROL_CLIENTS + THREADS_OWN
        for what, value, limit in (
            ("private memory, MiB", sample.anonymous / MIB, ANON_MAX / MIB),
            ("threads", sample.threads, threads),
            ("descriptors", sample.descriptors, FILES_MAX + connections),
        ):
            self._most(what, value)
            if value > limit:
                self.violate(f"{node}: {what}: {value:g}, and may be {limit:g}")
        self._most("resident memory, MiB", sample.resident / MIB)

    def quiet(self, node: str, role: str, sample: Sample) -> None:
        """A process with nothing but the pair and the guests: as at its first quiet point in this role."""
        for what in self.grown(role, sample):
            self.violate(f"{node}: {what} at a quiet point: {sample}; first as {role}: {self._quiet[sample.pid, role]}")
        self._quiet.setdefault((sample.pid, role), sample)
        self._most("threads at a quiet point", sample.threads)
        self._most("descriptors at a quiet point", sample.descriptors)

    def grown(self, role: str, sample: Sample) -> list[str]:
        """What there is more of than at this process's first quiet point in this role."""
        first = self._quiet.get((sample.pid, role), sample)
        more = sample.connections + sample.stuck - first.connections - first.stuck
        return [
            f"{value} {what}"
            for what, value, former in (
                ("threads", sample.threads, first.threads + THREADS_PER_CONNECTION * more),
                ("descriptors", sample.descriptors, first.descriptors + more),
            )
            if value > former + QUIET_GROWTH
        ]

    def logged(self, node: str, lines: list[str], seconds: float) -> None:
        """Lines that came within `seconds`."""
        self._most("log lines a second", len(lines) / max(seconds, 1.0))
        kinds = Counter(_NUMBERS.sub("#", line) for line in lines)
        limit = (KIND_LINES + 1) * (int(seconds) + 2)
        for kind, count in kinds.items():
            if count > limit:
                self.violate(f"{node}: {count} lines within {seconds:.1f} s, and {limit} may be: {kind[:200]}")
        self.did("log lines", len(lines))
        self.did("links up again", sum("link to the secondary is up again" in line for line in lines))
        for line in lines:
            if "Traceback" in line or "MemoryError" in line:
                self.violate(f"{node} logs a defect: {line[:300]}")

    # -- the guest -----------------------------------------------------------------------------------------

    def refused(self, what: str, error: object, allowed: bool) -> None:
        """A request of the guest got an error; `allowed`: its own disk fails at that time."""
        self.did("guest's requests refused by its own disk" if allowed else "guest's requests refused")
        if not allowed:
            self.violate(f"{what} got {error}, and nothing is wrong with its own disk")
