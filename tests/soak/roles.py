# SPDX-License-Identifier: BSD-3-Clause
"""What happens to the nodes: checkpoints, kills, quits, stops, switch-overs, failovers, and quiet points."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from checkout import REPOSITORY
from lab import QmpError
from soak.bounds import CONNECTIONS_KEPT_S, END_S, Bounds
from soak.commands import GONE, Commands
from soak.guests import Guests
from soak.node import SIZE, Node
from soak.plan import Event
from soak.weather import Weather
from waiting import Stuck, wait_until

SETTLE_S = 60.0
"""By when a pair is well by itself once nothing is wrong any more: retries come after 30 s at the latest."""

READ_S = 30.0
"""By when a disk that fails at times can be read as a whole."""


def _patiently(condition: Callable[[], bool], what: str, timeout_s: float = SETTLE_S) -> None:
    """Ask five times a second, because that costs the nodes something; Stuck."""

    def asked() -> bool:
        if condition():
            return True
        time.sleep(0.2)
        return False

    wait_until(asked, what, timeout_s)


class Roles:
    """The two nodes: the first is the guests', the second its secondary."""

    def __init__(self, nodes: dict[str, Node], guests: Guests, weather: Weather, bounds: Bounds) -> None:
        self.first, self.second = nodes["a"], nodes["b"]
        self._nodes = nodes
        self._guests = guests
        self._weather = weather
        self._bounds = bounds
        self._commands = Commands(nodes, lambda: self.first, bounds)
        self._refusal = ""

    def begin(self) -> None:
        """Start both, until they are in sync."""
        self.second.begin("secondary")
        self.first.begin("primary", self.second.process.uri())
        self.second.execute("replication-start")
        self.first.execute("replication-start")
        self._guests.go(self.first)
        self.quiet(Event(0.0, "roles", "quiet"))

    def run(self, event: Event) -> None:
        """One event; Stuck when the pair does not come back."""
        self._bounds.did(f"roles: {event.name}")
        action: Callable[[Event], None] = getattr(self, event.name)
        action(event)

    # -- small ones ----------------------------------------------------------------------------------------

    def checkpoint(self, _: Event) -> None:
        """Under whatever weather; taken, what is in it does not come back as older."""
        counts = self._guests.counts()
        begun = time.monotonic()
        if self._command(self.first, "replication-checkpoint"):
            self._guests.keep(counts)
            self._bounds.did("checkpoints taken")
            self._bounds.figures.longest["a checkpoint"] = max(
                self._bounds.figures.longest.get("a checkpoint", 0.0), time.monotonic() - begun
            )
        else:
            self._bounds.did("checkpoints refused")

    def kill(self, event: Event) -> None:
        """SIGKILL, and a start after a while."""
        node = getattr(self, event.values["which"])
        node.expected_down = True
        node.process.kill()
        time.sleep(event.values["pause"])
        self._up(node)
        self._weather.killed(node)

    def quit(self, event: Event) -> None:
        """The command, and a start after a while."""
        node = getattr(self, event.values["which"])
        node.expected_down = True
        begun = time.monotonic()
        try:
            node.execute("quit")
            self._bounds.answered("quit", begun, time.monotonic())
            begun = time.monotonic()
            slow_s = 20 * self._weather.slowest_s()
            node.process.wait_ended(60)
            self._bounds.answered("the end after quit", begun, time.monotonic(), END_S + slow_s)
        except (*GONE, QmpError, Stuck) as error:
            self._bounds.violate(f"quit on {node.name}: {error}")
            node.process.kill()
        time.sleep(event.values["pause"])
        self._up(node)
        self._weather.killed(node)

    def stop(self, _: Event) -> None:
        """A planned stop of the primary; the guests go on, and a start follows."""
        uri = self.second.process.uri()
        if not self._command(self.first, "replication-stop"):
            self._bounds.did("stops refused")
            if self.first.status()["stage"] == "running":
                return
        time.sleep(1.0)
        try:
            _patiently(lambda: self._command(self.first, "replication-start", secondary=uri), "a start", 10.0)
        except Stuck:
            with self._weather.calm():
                self._start(self.first, {"secondary": uri})

    def _up(self, node: Node) -> None:
        """Start it. With a disk that fails that may be refused: then once more when it works."""
        try:
            node.process.start()
        except (AssertionError, Stuck):
            self._bounds.did("starts refused")
            with self._weather.calm():
                node.process.start()
        node.expected_down = False

    def _command(self, node: Node, command: str, **arguments: Any) -> bool:
        try:
            node.execute(command, arguments)
        except Stuck as error:
            self._bounds.violate(f"{command} on {node.name}: {error}")
            return False
        except (QmpError, *GONE) as error:
            self._refusal = str(error)
            return False
        return True

    def _start(self, node: Node, arguments: dict[str, Any]) -> None:
        self._insist(node, "replication-start", **arguments)

    def _insist(self, node: Node, command: str, **arguments: Any) -> None:
        """A command that succeeds in the end."""
        try:
            _patiently(lambda: self._command(node, command, **arguments), f"{command} on {node.name}")
        except Stuck as stuck:
            raise Stuck(f"{stuck}: {self._refusal}") from stuck

    # -- quiet points --------------------------------------------------------------------------------------

    def quiet(self, _: Event) -> None:
        """With nothing wrong and the guests at rest: both disks, and the guest face, are what they have written."""
        with self._weather.calm():
            self._guests.hold()
            self._settle()
            self._compare()
            for node in (self.first, self.second):
                self._measure(node, "owner" if node is self.first else "secondary")
            self._guests.go(self.first)

    def _measure(self, node: Node, role: str) -> None:
        """Without its bad clients a node is as it was; nbdkit takes a moment to end their threads."""
        deadline = time.monotonic() + CONNECTIONS_KEPT_S
        guests = self._guests.connected if node is self.first else 0
        while (sample := node.sample(guests)) is not None:
            if not self._bounds.grown(role, sample) or time.monotonic() > deadline:
                self._bounds.quiet(node.name, role, sample)
                return
            time.sleep(0.2)

    def _settle(self) -> None:
        """Well by itself, with a checkpoint of now, and no error left."""

        def taken() -> bool:
            if self.second.status()["stage"] == "none":
                self._command(self.second, "replication-start")
            counts = self._guests.counts()
            if not self._command(self.first, "replication-checkpoint"):
                return False
            self._guests.keep(counts)
            if self.first.status()["link"]["state"] != "in-sync":
                return False
            return all(node.status()["error"] is None for node in self._nodes.values())

        begun = time.monotonic()
        try:
            _patiently(taken, "well by itself")
        except Stuck as stuck:
            keys = ("stage", "error", "link", "consistent", "checkpoint-obstacle")
            shown = {name: {key: node.status().get(key) for key in keys} for name, node in self._nodes.items()}
            raise Stuck(f"{stuck}: {self._refusal}: {shown}") from stuck
        longest = self._bounds.figures.longest
        longest["until well by itself"] = max(longest.get("until well by itself", 0.0), time.monotonic() - begun)

    def _compare(self) -> None:
        ours = self.first.content(self.first.export, 0, SIZE, READ_S)
        theirs = self.second.content(self.second.export, 0, SIZE, READ_S)
        self._guests.compare(ours, f"{self.first.name}, what the guest sees")
        if self.first.raw.read_bytes() != ours:
            self._bounds.violate(f"{self.first.name}: the disk is not what the guest sees")
        if theirs != ours:
            self._bounds.violate(f"{self.second.name}: the guest face is not the disk of {self.first.name}")
        if self.second.raw.read_bytes() != ours:
            self._bounds.violate(f"the disks of {self.first.name} and {self.second.name} differ")
        self._bounds.did("disks compared")

    # -- changes of the owner ------------------------------------------------------------------------------

    def switchover(self, _: Event) -> None:
        """By replctl: nothing is lost, and the roles are exchanged."""
        with self._weather.calm():
            self._guests.hold()
            self._settle()
            _patiently(self._switched, "a switch-over in fair weather")
            self._turn_round()
            self._guests.go(self.first)

    def _switched(self) -> bool:
        """Whether it is done; False when somebody was just holding an epoch, which nobody may while that is done."""
        words = ["--control", self.first.process.control_path, "switchover", "--yes", "--peer"]
        done = subprocess.run(
            [sys.executable, REPOSITORY / "scripts/replctl", *words, self.second.process.control_path],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode and "is held: commit or abort it first" not in done.stderr:
            raise Stuck(f"a switch-over in fair weather: {done.stdout} {done.stderr}")
        return not done.returncode

    def failover(self, event: Event) -> None:
        """The first node dies, or only seems to; the second becomes the owner, and the first comes back."""
        if event.values["kill"]:
            self.first.expected_down = True
            self.first.process.kill()
        self._guests.hold()
        if not self._failed_over(event.values["how"]):
            self._bounds.did("failovers refused")
            if event.values["kill"]:
                self._up(self.first)
                self._weather.killed(self.first)
            self._guests.go(self.first)
            return
        self._bounds.did("failovers")
        owner = self.second
        self._guests.adopt(owner.content(owner.export, 0, SIZE, READ_S), f"after the failover of {owner.name}")
        self._guests.go(owner)
        time.sleep(1.5)
        with self._weather.calm():
            self._committed(owner)
            self._guests.hold()
            self._turn_round()
            self._guests.go(self.first)

    def _failed_over(self, how: int) -> bool:
        """Ask the second for it, which has to answer in time."""
        try:
            preflight = self.second.execute("query-failover")
        except (*GONE, QmpError) as error:
            self._bounds.violate(f"query-failover on {self.second.name}: {error}")
            preflight = {"allowed": False}
        command, arguments = (
            ("replication-stop", {"failover": True}),
            ("xen-set-replication", {"enable": False, "primary": False, "failover": True}),
            ("x-colo-lost-heartbeat", {}),
        )[how]
        begun = time.monotonic()
        taken = self._command(self.second, command, **arguments)
        self._bounds.answered("failover", begun, time.monotonic())
        if not taken and preflight["allowed"]:
            self._bounds.violate(f"a failover of {self.second.name} that was allowed is refused: {self._refusal}")
        return taken

    def _committed(self, node: Node) -> None:
        """Wait for the commit; one that has failed, because the disk has, is tried again."""

        def done() -> bool:
            stage = node.status()["stage"]
            if stage == "failover-failed":
                self._bounds.did("commits tried again")
                self._command(node, "replication-retry")
            return bool(stage == "done")

        _patiently(done, f"the commit of {node.name}")

    def _turn_round(self) -> None:
        """The second is the owner; the first becomes its secondary."""
        former, owner = self.first, self.second
        if not former.process.running:
            self._up(former)
        if former.line == "secondary":
            if former.status()["stage"] == "running":
                self._insist(former, "replication-stop")
            self._insist(former, "replication-demote")
        else:
            former.expected_down = True
            former.process.terminate()
            former.begin("secondary")
        self.first, self.second = owner, former
        arguments = {"mode": "primary", "secondary": former.process.uri()}
        if not self._command(owner, "replication-start", **arguments):
            self._bounds.did("writes of a former primary thrown away")
            if not self._command(former, "replication-discard"):
                raise Stuck(f"{former.name} cannot be discarded: {self._refusal}")
            self._start(owner, arguments)
        self._settle()
        self._compare()
