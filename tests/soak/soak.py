# SPDX-License-Identifier: BSD-3-Clause
"""A soak: two nodes on two hosts, guests that write all the time, and everything that can go wrong, at random.

    Guests    guests.py    write, and know what must be there
    Weather   weather.py   network, disks, full file systems, clocks, bad clients (clients.py)
    Commands  commands.py  commands that change nothing
    Roles     roles.py     checkpoint, kill, quit, stop, switch-over, failover, quiet points
    Bounds    bounds.py    what must hold throughout

What is done follows from the seed (plan.py). What a replay cannot repeat is how processes are scheduled. Needs root:
the hosts are network namespaces, and the small file systems are mounted.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable

from content import MIB
from lab import Lab, QmpError
from soak.bounds import CONNECTIONS_KEPT_S, Bounds, Stalls
from soak.commands import GONE, Commands
from soak.guests import Guest, Guests
from soak.node import SIZE, Node
from soak.plan import HOSTS, Event, plan, setting
from soak.roles import Roles
from soak.weather import Weather
from waiting import Stuck
from wire import Wire

GUESTS = 3
RATE = 12.0
"""Requests a second of one guest: a soak is long, and the machine is not its alone."""

SAMPLE_S = 0.5


class Watcher:
    """Looks at both nodes twice a second: size, log, whether they live; and asks them how they are."""

    def __init__(self, nodes: dict[str, Node], bounds: Bounds) -> None:
        self._nodes = nodes
        self._bounds = bounds
        self.ending = threading.Event()
        self._looked = time.monotonic()
        self._connections: dict[str, deque[int]] = {
            name: deque(maxlen=int(CONNECTIONS_KEPT_S / SAMPLE_S)) for name in nodes
        }
        self._ages: dict[str, tuple[str, float, float, float]] = {}

    def look(self) -> None:
        """Once."""
        now = time.monotonic()
        for name, node in self._nodes.items():
            self._connections[name].append(node.connections)
            sample = node.sample(max(self._connections[name]) + GUESTS)
            if sample is not None:
                self._bounds.sampled(name, sample)
            self._bounds.logged(name, node.new_lines(), now - self._looked)
            if not node.expected_down and not node.process.running and not node.expected_down:
                self._bounds.violate(f"{name} has ended by itself: {node.process.stderr()[-500:]}")
                node.expected_down = True
        self._looked = now

    def watch(self) -> None:
        """Until `ending`."""
        while not self.ending.wait(SAMPLE_S):
            self.look()

    def ask(self, node: Node) -> None:
        """Until `ending`: a query on a fresh connection, which has to be answered, and to be right."""
        while not self.ending.wait(2 * SAMPLE_S):
            process = node.process
            begun = time.monotonic()
            try:
                status = node.execute("query-replication")
            except (*GONE, QmpError, Stuck) as error:
                if not node.expected_down and process is node.process and process.running:
                    self._bounds.violate(f"query-replication on {node.name}: {type(error).__name__}: {error}")
                continue
            ended = time.monotonic()
            self._bounds.answered("query-replication", begun, ended)
            self._aged(node, process.pid if process.running else 0, status, begun, ended)

    def _aged(self, node: Node, pid: int, status: dict[str, object], begun: float, ended: float) -> None:
        checkpoint, epoch = status["checkpoint"], status["epoch"]
        if not isinstance(checkpoint, dict) or checkpoint.get("age") is None or not isinstance(epoch, int):
            return
        age_s = float(checkpoint["age"])
        self._bounds.reached(epoch)
        former = self._ages.get(node.name)
        # A checkpoint that is taken anew gets another epoch, and another process or role looks it up anew.
        which = f"{pid} {status['mode']} {status['stage']} {epoch} {checkpoint['time']}"
        if former is not None and former[0] == which:
            _, former_s, former_begun, former_ended = former
            took_s = ended - begun + former_ended - former_begun
            self._bounds.aged(node.name, age_s, former_s, begun - former_begun, took_s)
        self._ages[node.name] = (which, age_s, begun, ended)


class Soak:
    """One of them."""

    def __init__(self, seed: str, duration_s: float, told: Callable[[str], None] = lambda text: None) -> None:
        self.seed = seed
        self.duration_s = duration_s
        self.setting = setting(seed)
        self.events = plan(seed, duration_s)
        self.stalls = Stalls()
        self.bounds = Bounds(self.setting.timeout_s, self.stalls, told)
        self._told = told
        self._threads: list[threading.Thread] = []

    def run(self) -> Bounds:
        """All of it; the bounds know what was wrong. PermissionError where hosts or mounts are not allowed."""
        self.stalls.start()
        try:
            with Wire(seed=zlib.crc32(self.seed.encode())) as wire, Lab() as lab:
                hosts = {"a": wire.a, "b": wire.b}
                nodes = {name: Node(lab, hosts[name], self.setting) for name in HOSTS}
                self._run(wire, nodes)
        except AssertionError as error:
            self.bounds.violate(f"in the end: {error}")
        finally:
            self.stalls.stop()
        return self.bounds

    def _run(self, wire: Wire, nodes: dict[str, Node]) -> None:
        weather, watcher = Weather(wire, nodes, self.bounds), Watcher(nodes, self.bounds)
        share = (SIZE - MIB) // GUESTS // 4096 * 4096
        each = [Guest(n, (n * share, (n + 1) * share), RATE, self.seed, self.bounds) for n in range(GUESTS)]
        for guest in each:
            guest.excused = lambda kind, guest=guest: weather.excuse(guest.node, kind)  # type: ignore[misc]
        guests = Guests(each, self.bounds)
        roles = Roles(nodes, guests, weather, self.bounds)
        commands = Commands(nodes, lambda: roles.first, self.bounds)
        try:
            roles.begin()
            self.bounds.begun = time.monotonic()
            self._start(watcher.watch)
            for node in nodes.values():
                self._start(lambda node=node: watcher.ask(node))  # type: ignore[misc]
            lanes = {event.lane for event in self.events} - {"roles"}
            for lane in sorted(lanes):
                do = commands.run if lane == "commands" else weather.run
                self._start(lambda lane=lane, do=do: self._lane(lane, do, weather.ending))  # type: ignore[misc]
            for event in self._in_time("roles", weather.ending):
                self._told(str(event))
                roles.run(event)
            weather.ending.wait(max(0.0, self.bounds.begun + self.duration_s - time.monotonic()))
            roles.quiet(Event(self.duration_s, "roles", "quiet"))
        except (Stuck, AssertionError, QmpError) as error:
            self.bounds.violate(f"{type(error).__name__}: {error}")
        finally:
            for node in nodes.values():
                node.expected_down = True
            weather.ending.set()
            watcher.ending.set()
            guests.stop()
            for thread in self._threads:
                thread.join(120)

    def _start(self, action: Callable[[], None]) -> None:
        def run() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 (a soak whose parts have died proves nothing)
                self.bounds.violate(f"the soak itself fails: {type(error).__name__}: {error}")

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _in_time(self, lane: str, ending: threading.Event) -> Iterable[Event]:
        """A lane's events, each when it is due, or as soon as the one before is over."""
        for event in self.events:
            if event.lane != lane:
                continue
            if ending.wait(max(0.0, self.bounds.begun + event.at_s - time.monotonic())):
                return
            if time.monotonic() - self.bounds.begun > self.duration_s:
                return
            yield event

    def _lane(self, lane: str, do: Callable[[Event], None], ending: threading.Event) -> None:
        for event in self._in_time(lane, ending):
            do(event)
