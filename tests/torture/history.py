# SPDX-License-Identifier: BSD-3-Clause
"""What histories of a secondary and of a primary have in common: kills, restarts and what is told of a failure."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from content import KIB
from lab import Lab
from nodes import Primary, Secondary, Server
from pausepoints import PausePoints
from torture.client import Client, Wrong
from torture.oracle import Bytes, Content
from waiting import DEADLINE_S, Stuck

SIZES = (1024 * KIB, 300_000)
"""Bytes of the two disks; the second one ends in the midst of a sector and of an overlay's block."""

WINDOW = 4
"""Requests in flight on one export."""

HIT_S = 2.0
"""Longest wait for a thread to reach a point; after that the process is killed wherever it is."""

PATIENCE = 30
"""Kills beyond those wanted after which a history gives up what it owes."""

STARTING_S = 0.25
"""A process that is killed while it starts is killed at most so long after it was begun."""


@dataclass
class Outcome:
    """What a history did, and what was wrong (None: nothing)."""

    number: int
    kind: str
    kills: int = 0
    points: Counter[str] = field(default_factory=Counter)
    """Kills with a thread held at a point, by its name."""
    moments: Counter[str] = field(default_factory=Counter)
    """All kills, by what was going on."""
    endings: Counter[str] = field(default_factory=Counter)
    """Commands cut short by a kill, by whether they turned out to have happened."""
    requests: int = 0
    seconds: float = 0.0
    failure: str | None = None


class HeldEarly:
    """Mixed into a Server: a process that is to be killed before it serves anything."""

    early: Callable[[], bool] | None = None
    """While set, `start` returns when this is true."""

    def wait_ready(self) -> None:
        early = self.early
        if early is None:
            super().wait_ready()  # type: ignore[misc]
            return
        deadline = time.monotonic() + DEADLINE_S
        while not early():
            self.check_alive()  # type: ignore[attr-defined]
            if time.monotonic() > deadline:
                raise Stuck("a process neither starts nor reaches its point")
            time.sleep(0.001)


class VictimSecondary(HeldEarly, Secondary):
    """A secondary that gets killed."""


class VictimPrimary(HeldEarly, Primary):
    """A primary that gets killed."""


class History:
    """One history: `run` kills a process `kills` times, and then until it has killed at every point that it owes. Its
    choices come from `seed` alone, see `rng_of`."""

    kind = ""
    owed: tuple[str, ...] = ()
    """Points at which this history has to kill, so that several together have killed at all."""

    def __init__(self, seed: str, number: int, kills: int) -> None:
        self.seed = f"{seed}/{number}"
        self.outcome = Outcome(number, self.kind)
        self.kills_wanted = kills
        self.log: deque[str] = deque(maxlen=120)
        self.phase = "the beginning"

    def run(self) -> Outcome:
        """To the end or to the first failure, which is left in the outcome."""
        begun = time.monotonic()
        try:
            with Lab() as lab:
                self.points = PausePoints(lab.folder / "pause")
                self.play(lab)
        except Exception as error:  # noqa: BLE001 (whatever it is, it belongs to this history's report)
            self.outcome.failure = self._told(error)
        self.outcome.seconds = time.monotonic() - begun
        return self.outcome

    def play(self, lab: Lab) -> None:
        """The history."""
        raise NotImplementedError

    def _told(self, error: Exception) -> str:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        tail = "\n".join(f"  {line}" for line in self.log)
        return (
            f"history {self.outcome.number} ({self.kind}), after {self.outcome.kills} kills, during {self.phase}:\n"
            f"{type(error).__name__}: {error}{notes}\n"
            f"the last events, oldest first:\n{tail}"
        )

    # -- chance --------------------------------------------------------------------------------------------

    def rng_of(self, purpose: str) -> random.Random:
        """The source of chance for one life or one start: it depends on the seed, this history's number, how many
        kills there have been and `purpose`, and on nothing that a thread has done."""
        return random.Random(f"{self.seed}/{self.outcome.kills}/{purpose}")

    # -- what is left to do --------------------------------------------------------------------------------

    @property
    def owing(self) -> list[str]:
        """The points owed at which nothing has been killed yet."""
        return [name for name in self.owed if not self.outcome.points[name]]

    @property
    def pressed(self) -> bool:
        """The first half of the kills is left to chance; then what is still owed comes first."""
        return bool(self.owing) and self.outcome.kills >= self.kills_wanted // 2

    @property
    def unfinished(self) -> bool:
        """Whether there is another kill to come; Wrong if many more than wanted have not led to what is owed."""
        if self.owing and self.outcome.kills >= self.kills_wanted + PATIENCE:
            raise Wrong(f"{self.outcome.kills} kills, and no way has led to {self.owing}")
        return bool(self.owing) or self.outcome.kills < self.kills_wanted

    # -- killing -------------------------------------------------------------------------------------------

    def count_kill(self, moment: str, point: str | None = None) -> None:
        """Note a kill."""
        self.outcome.kills += 1
        self.outcome.moments[moment] += 1
        if point is not None:
            self.outcome.points[point] += 1
        self.log.append(f"--- kill {self.outcome.kills}: {moment}{f' at {point}' if point else ''}")

    def least_hit(self, rng: random.Random, names: list[str]) -> str:
        """One of the points at which this history has killed least often, those that it owes first."""
        names = [name for name in names if name in self.owing] or names
        fewest = min(self.outcome.points[name] for name in names)
        return rng.choice([name for name in names if self.outcome.points[name] == fewest])

    def kill_client(self, server: Server, client: Client, moment: str, point: str | None = None) -> None:
        """Kill the process of a life, then take in the answers that it had still sent."""
        server.kill()
        client.after_kill()
        self.log.extend(client.log)
        self.count_kill(moment, point)
        if point is not None:
            self.points.disarm(point)
        self.check_said(server)

    def check_said(self, server: Server) -> None:
        """Nothing that a process prints may be a bug's traceback."""
        if "Traceback (most recent call last)" in server.stderr():
            raise Wrong(f"{server.name} printed a traceback: {server.stderr()}")

    def start_after_kill(self, server: Any, rng: random.Random, recovery: tuple[str, ...]) -> None:
        """Start a killed process again; now and then kill it while it starts, at a point of `recovery` or anywhere."""
        while self.unfinished and rng.random() < 0.22:
            point = rng.choice(recovery) if recovery and rng.random() < 0.7 else None
            if not (self._killed_at(server, point) if point else self._killed_early(server, rng)):
                return  # it serves already
        server.start()

    def _killed_early(self, server: Any, rng: random.Random) -> bool:
        until = time.monotonic() + rng.uniform(0.0, STARTING_S)
        server.early = lambda: time.monotonic() >= until
        self._start_early(server)
        server.kill()
        self.count_kill("starting")
        self.check_said(server)
        return True

    def _killed_at(self, server: Any, point: str) -> bool:
        """Hold the process at a point while it starts, and kill it there; False if it serves without reaching it."""
        self.points.arm(point)
        serving = server.socket_path
        server.early = lambda: self.points.is_hit(point) or serving.exists()
        self._start_early(server)
        if serving.exists():
            # The commit begins when the socket is there, or does not begin.
            deadline = time.monotonic() + 0.05
            while not self.points.is_hit(point) and time.monotonic() < deadline:
                time.sleep(0.001)
        if self.points.is_hit(point):
            server.kill()
            self.points.disarm(point)
            self.count_kill("starting", point)
            self.check_said(server)
            return True
        self.points.disarm(point)
        server.wait_ready()
        return False

    @staticmethod
    def _start_early(server: Any) -> None:
        try:
            server.start()
        finally:
            server.early = None

    # -- comparing -----------------------------------------------------------------------------------------

    @staticmethod
    def same(actual: bytes, expected: bytes, what: str) -> None:
        """Two contents that must be equal."""
        if actual != expected:
            left, right = np.frombuffer(actual, np.uint8), np.frombuffer(expected, np.uint8)
            if len(left) != len(right):
                raise Wrong(f"{what}: {len(left)} bytes, not {len(right)}")
            wrong = np.flatnonzero(left != right)
            first = int(wrong[0])
            raise Wrong(
                f"{what}: {len(wrong)} bytes differ, the first at {first} ({actual[first : first + 8].hex()}, not "
                f"{expected[first : first + 8].hex()}), the last at {wrong[-1]}"
            )

    @staticmethod
    def differences(content: Content, actual: bytes, start: int, begun: int, ended: int, what: str) -> str | None:
        """How an observation contradicts a content; None if it does not."""
        seen: Bytes = np.frombuffer(actual, np.uint8)
        wrong = content.unexplained(seen, start, begun, ended)
        if not len(wrong):
            return None
        first = int(wrong[0])
        return (
            f"{what}: {len(wrong)} bytes are wrong, the first at {first}, the last at {int(wrong[-1])}; "
            f"{content.about(first, int(seen[first - start]))}"
        )


def as_array(content: bytes) -> Bytes:
    """The bytes for an oracle."""
    return np.frombuffer(content, np.uint8)


def raw_of(path: Path) -> bytes:
    """A raw disk."""
    return path.read_bytes()
