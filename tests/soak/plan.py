# SPDX-License-Identifier: BSD-3-Clause
"""What a soak does, and when: all of it follows from the seed.

Each lane has its own random numbers, so that a longer plan begins as a shorter one does. Lanes run side by side, the
events of one lane one after the other.

    network         slow, lossy, cut, black hole, reset
    disk-a, -b      the disk below a node is slow, fails, or fails to flush
    space-...       the file system of the state, of the overlays, of the disk is full
    clock-a, -b     the wall clock of a host is set, by up to an hour
    clients-a, -b   clients that come, go, and stall
    commands        commands that change nothing, or that are refused; and replctl
    roles           checkpoints; kill, quit, stop, switch-over, failover; quiet points, at which everything is compared
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

HOSTS = ("a", "b")


@dataclass(frozen=True, order=True)
class Event:
    """Something that begins `at_s` seconds after the start and lasts for `seconds`."""

    at_s: float
    lane: str
    name: str
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        values = "".join(f" {key}={value}" for key, value in self.values.items())
        return (
            f"{self.at_s:7.1f} s  {self.lane}: {self.name}{values}{f' for {self.seconds:.1f} s' * bool(self.seconds)}"
        )


@dataclass(frozen=True)
class Setting:
    """What a whole soak has."""

    timeout_s: float
    protocol: str
    checkpoint_interval_s: float
    over_nbd: Mapping[str, bool]
    """By host: whether its disk is behind an NBD server, which can be slow and fail; otherwise it is a file."""


def setting(seed: str) -> Setting:
    """Of the soak with this seed."""
    random = Random(f"{seed}/setting")
    over_nbd = random.choice([{"a": True, "b": True}, {"a": True, "b": False}, {"a": False, "b": True}])
    return Setting(
        timeout_s=random.choice([1.0, 2.0, 3.0]),
        protocol=random.choice(["async", "async", "sync"]),
        checkpoint_interval_s=random.choice([1.0, 2.0, 5.0]),
        over_nbd=over_nbd,
    )


def _network(random: Random) -> tuple[str, float, dict[str, Any]]:
    name = random.choice(["slow", "slow", "lossy", "lossy", "cut", "blackhole", "reset"])
    delay = random.choice([1, 10, 40])
    if name == "slow":
        return name, random.uniform(4, 20), {"rate": random.choice([0.8e6, 2e6, 4e6, 16e6]), "delay": delay}
    if name == "lossy":
        return name, random.uniform(4, 20), {"loss": random.choice([0.5, 2, 5]), "delay": delay, "reorder": 5}
    if name == "blackhole":
        return name, random.uniform(1, 8), {"direction": random.choice([None, "ab", "ba"])}
    return name, random.uniform(0.5, 6) if name == "cut" else 0.0, {}


def _disk(random: Random) -> tuple[str, float, dict[str, Any]]:
    name = random.choice(["slow", "slow", "failing", "unflushable"])
    if name == "slow":
        return name, random.uniform(4, 15), {"delay": random.choice([0.02, 0.1, 0.25])}
    return name, random.uniform(1, 5), {"share": random.choice([0.1, 0.5, 1.0])}


def _space(random: Random) -> tuple[str, float, dict[str, Any]]:
    return "full", random.uniform(2, 12), {}


def _clock(random: Random) -> tuple[str, float, dict[str, Any]]:
    return "step", 0.0, {"by_s": random.choice([-3600, -60, -2, 2, 60, 3600])}


CLIENTS = {
    "idle-control": 24,
    "half-open-control": 24,
    "deaf-control": 2,
    "half-open-nbd": 6,
    "slow-reader": 2,
    "dying": 3,
    "many": 20,
}
"""Kinds of clients, and how many come together."""


def _clients(random: Random) -> tuple[str, float, dict[str, Any]]:
    return random.choice(list(CLIENTS)), random.uniform(2, 15), {}


def _commands(random: Random) -> tuple[str, float, dict[str, Any]]:
    names = ["query", "query", "query", "refused", "refused", "checkpoint", "hold", "cancel", "events", "replctl"]
    return random.choice(names), 0.0, {"host": random.choice(HOSTS), "choice": random.randrange(1000)}


LANES: dict[str, tuple[Callable[[Random], tuple[str, float, dict[str, Any]]], float, float]] = {
    "network": (_network, 3, 15),
    **{f"disk-{host}": (_disk, 5, 25) for host in HOSTS},
    **{f"space-{what}-{host}": (_space, 10, 60) for what in ("state", "overlays", "data") for host in HOSTS},
    **{f"clock-{host}": (_clock, 5, 30) for host in HOSTS},
    **{f"clients-{host}": (_clients, 1, 10) for host in HOSTS},
    "commands": (_commands, 0.3, 2),
}
"""Each lane's events, and the seconds between two of them: at least, at most."""

ROLES = {
    "checkpoint": 12,
    "kill": 3,
    "quit": 2,
    "stop": 2,
    "failover": 3,
    "switchover": 1,
    "quiet": 2,
}
"""What happens to the nodes, and how often relative to each other."""


def _roles(random: Random, duration_s: float) -> Iterator[Event]:
    at_s = random.uniform(2, 4)
    # A failover soon, so that a short soak has one.
    yield Event(at_s, "roles", "checkpoint")
    yield Event(at_s + 3, "roles", "failover", 0.0, {"kill": random.random() < 0.5, "how": random.randrange(3)})
    at_s += 5
    while (at_s := at_s + random.uniform(1, 7)) < duration_s:
        (name,) = random.choices(list(ROLES), list(ROLES.values()))
        values: dict[str, Any] = {}
        if name in ("kill", "quit"):
            values = {"which": random.choice(["first", "second"]), "pause": random.choice([0.0, 1.0, 4.0])}
        elif name == "failover":
            values = {"kill": random.random() < 0.5, "how": random.randrange(3)}
        yield Event(at_s, "roles", name, 0.0, values)


def plan(seed: str, duration_s: float) -> list[Event]:
    """All events of a soak in their order; the longer one begins with the shorter one."""
    lanes: list[Iterator[Event]] = [_roles(Random(f"{seed}/roles"), duration_s)]
    over_nbd = setting(seed).over_nbd
    for name, (invent, least_s, most_s) in LANES.items():
        if name.startswith("disk-") and not over_nbd[name[-1]]:
            continue
        lanes.append(_lane(name, Random(f"{seed}/{name}"), invent, least_s, most_s, duration_s))
    return list(heapq.merge(*lanes))


def _lane(
    name: str,
    random: Random,
    invent: Callable[[Random], tuple[str, float, dict[str, Any]]],
    least_s: float,
    most_s: float,
    duration_s: float,
) -> Iterator[Event]:
    at_s = random.uniform(0, most_s)
    while at_s < duration_s:
        kind, seconds, values = invent(random)
        yield Event(at_s, name, kind, seconds, values)
        at_s += seconds + random.uniform(least_s, most_s)
