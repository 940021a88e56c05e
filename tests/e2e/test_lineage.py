# SPDX-License-Identifier: BSD-3-Clause
"""Lineage with real processes: what two nodes agree on when they meet again, and what is on their disks then.

    World       nodes A, B and C, and what each disk should hold; its methods are the verbs of a story
     +- Node    a disk, a state folder, and the process on them: a primary's, a secondary's, or none
     +- Relay   the way to a node as a secondary: closed between two pairings, cut or silent when told to

A story is a line such as `pair A B; write A 3; kill A; failover B`. What it names are grains (64 KiB) of the disk. Each
write has a content of its own, so a byte that comes from the wrong node is seen. tests/unit/test_lineage.py has the
same decisions without processes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd
import pytest

from content import KIB, changed, make_raw, pattern, whole
from fakeprimary import FakePrimary
from lab import Lab
from nbdprocess import silent
from nodes import Server, drained, nbd_refusal, refused
from pausepoints import PausePoints
from qmp import Qmp, QmpError
from replication.record.lineage import OUTDATED, SPLIT_BRAIN, UNRELATED
from waiting import DEADLINE_S, wait_until

GRAIN = 64 * KIB
GRAINS = 8
SIZE = GRAINS * GRAIN
BLOCK = 4 * KIB
OLD = pattern(1, SIZE)

ONE_GRAIN = 100 * KIB
"""Of what a connection sends: more than a request of one grain and all that comes before it, less than two."""

NOBODYS = "nobody's secondary"
NOT_A_PRIMARY = "belongs to a secondary"


class Relay:
    """Passes connections to a Unix socket on to another one, while it is open."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.verdicts: list[str] = []
        """What primaries have said to the secondary that they would do, in order."""
        self._target = target
        self._silent = False
        self._limit: int | None = None
        self._listener: socket.socket | None = None
        # Protects the two lists.
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def open(self, limit: int | None = None) -> None:
        """Let connections through; of each, only `limit` bytes from its client."""
        self.close()
        self._silent, self._limit = False, limit
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen(16)
        self._begin(self._accept, self._listener)

    def silence(self) -> None:
        """Pass nothing on any more. The connections stay."""
        self._silent = True

    def close(self) -> None:
        """Reset all connections and take no more."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            sockets, self._sockets = self._sockets, []
            threads, self._threads = self._threads, []
        for each in sockets:
            with contextlib.suppress(OSError):  # the other end has gone already
                each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        for each in sockets:
            each.close()

    def _begin(self, action: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=action, args=arguments, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with self._lock:
                self._sockets += [client, server]
            try:
                server.connect(os.fspath(self._target))
            except OSError:
                client.shutdown(socket.SHUT_RDWR)
                continue
            self._begin(self._pass, client, server, True)
            self._begin(self._pass, server, client, False)

    def _pass(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        passed = 0
        tail = b""
        with contextlib.suppress(OSError):  # one of the two has gone, and so goes the other
            while data := source.recv(256 * KIB):
                if self._silent:
                    continue
                if from_client:
                    if self._limit is not None:
                        data = data[: max(0, self._limit - passed)]
                    passed += len(data)
                    tail = self._note(tail + data)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _note(self, data: bytes) -> bytes:
        """Look for verdicts; what may be the beginning of one."""
        end = 0
        for found in re.finditer(rb'"verdict": "(\w+)"', data):
            end = found.end()
            self.verdicts.append(found[1].decode())
        return data[max(end, len(data) - 30) :]


class Node:
    """A disk, its state folder, and the process that has them, if there is one."""

    def __init__(self, lab: Lab, name: str, points: PausePoints, primary: str, secondary: str) -> None:
        self.name = name
        self.path = make_raw(lab.folder / f"{name}.raw", SIZE, OLD)
        self.state = lab.folder / f"{name}.state"
        self.server = lab.add(Server(lab.folder, name, [], extra_environment=points.environment))
        self.relay = Relay(lab.folder / f"{name}.way", self.server.socket_path)
        self.content = OLD
        """What the owner's disk holds; a secondary's: what its primary has written to it."""
        self.checkpoint = OLD
        """Secondary: with which its guest has begun."""
        self.own: list[tuple[int, bytes]] = []
        """Secondary: what its guest has written since the last checkpoint."""
        self.mode = "primary"
        """On the command line."""
        self.boots = 1
        self._more = {"primary": primary.split(), "secondary": ["top-id=top0", *secondary.split()]}
        self._guest: nbd.NBD | None = None

    # -- the process ---------------------------------------------------------------------------------------

    @property
    def uri(self) -> str:
        """Where a primary finds it."""
        return f"nbd+unix:///?socket={self.relay.path}"

    def arguments(self, mode: str) -> list[str]:
        """The command line. Requests of a resync are of one grain."""
        # Of the whole disk a second, so it is not slowed down by that. Both may write when they have parted: what
        # becomes of that is what is tried here.
        common = [f"mode={mode}", f"state={self.state}", f"disk=disk0:{self.path}", f"resync-rate={SIZE}"]
        common += ["on-outdated=continue"]
        return common + self._more[mode]

    def start(self, mode: str) -> None:
        """Start a process of that mode."""
        self.mode = mode
        self.server.arguments = self.arguments(mode)
        self.server.extra_environment["NBDKIT_REPLICATION_BOOT_ID"] = f"{self.name}-{self.boots}"
        self.server.start()

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process, if there is one."""
        self._guest = None
        if self.server.running:
            self.server.kill() if how is signal.SIGKILL else self.server.terminate()

    def status(self) -> dict[str, Any]:
        return self.server.status()

    @property
    def forwarded(self) -> int:
        """Bytes that it has brought to its secondary as a primary, in this process."""
        return int(self.status()["disks"][0]["totals"].get("forwarded", 0))

    @property
    def record(self) -> dict[str, Any]:
        """state.json; before it is written for the first time, what counts until then."""
        path = self.state / "state.json"
        return dict(json.loads(path.read_text())) if path.exists() else {"mode": "primary", "partner": None}

    @property
    def guest(self) -> nbd.NBD:
        """Its guest's connection."""
        if self._guest is None:
            self._guest = self.server.connect("top0" if self.mode == "secondary" else "disk0")
        return self._guest

    # -- roles ---------------------------------------------------------------------------------------------

    def be_secondary(self) -> None:
        """A process that is a secondary: started as one, or demoted in place."""
        former = self.record
        if former["mode"] == "primary" or former["stage"] == "done":
            self.checkpoint, self.own = self.content, []
        if self.server.running and self.mode != "secondary":
            self.end()
        if not self.server.running:
            self.start("secondary")
        status = self.status()
        if (status["mode"], status["stage"]) == ("primary", "running"):  # it was promoted, and had a secondary
            self.server.execute("replication-stop")
        if self.status()["stage"] == "done":
            self._guest = None
            self.server.execute("replication-demote")

    def be_owner(self) -> None:
        """A process that can be started as a primary."""
        if not self.server.running:
            self.start("primary")

    def content_now(self) -> bytes:
        """What is on the disk."""
        return self.path.read_bytes()


@dataclass
class Outcome:
    """How a meeting went."""

    verdict: str
    """As the primary has told the secondary; or "refused"."""
    sent: int
    """Bytes that the primary's process had forwarded before; once it is complete, the grains that it has since."""
    reason: str = ""


@dataclass
class Approach:
    """Two nodes that are about to meet."""

    primary: Node
    secondary: Node
    resumes: bool
    """The primary goes on by itself; else it has to be told."""
    before: int
    """Bytes that its process has forwarded already."""
    said: int
    """How many verdicts the secondary has heard."""


class World:
    """The nodes of a test."""

    def __init__(self, lab: Lab, primary: str = "timeout=30", secondary: str = "") -> None:
        """`primary`, `secondary`: more keys of theirs. A link that was silenced must not be noticed before a story says
        so, however busy the machine is."""
        self.points = lab.pause_points()
        self.nodes = {name: Node(lab, name, self.points, primary, secondary) for name in "ABC"}
        self.peers: dict[str, str] = {}
        """The secondary with which a primary is connected now."""
        self._serial = 10

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def close(self) -> None:
        for node in self.nodes.values():
            node.relay.close()

    def play(self, story: str) -> None:
        """Do what the story says, step by step."""
        for step in filter(None, story.split("; ")):
            verb, *names = step.split()
            getattr(self, verb)(*names)

    # -- guests --------------------------------------------------------------------------------------------

    def _next(self, grain: str) -> tuple[int, bytes]:
        """Where and what to write: another block of the grain, with another content, each time."""
        self._serial += 1
        return int(grain) * GRAIN + self._serial % 16 * BLOCK, pattern(self._serial, BLOCK)

    def write(self, name: str, *grains: str) -> None:
        """The guest of an owner writes; with a link, the secondary has it afterwards."""
        node = self[name]
        node.be_owner()
        for grain in grains:
            at, data = self._next(grain)
            node.guest.pwrite(data, at)
            node.content = changed(node.content, (at, data))
        if name in self.peers:
            drained(node.server)
            self[self.peers[name]].content = node.content

    def late(self, name: str, *grains: str) -> None:
        """The guest of a primary writes, and what becomes of it is another matter."""
        for grain in grains:
            at, data = self._next(grain)
            self[name].guest.pwrite(data, at)
            self[name].content = changed(self[name].content, (at, data))

    def own(self, name: str, *grains: str) -> None:
        """The guest of a secondary writes."""
        for grain in grains:
            at, data = self._next(grain)
            self[name].guest.pwrite(data, at)
            self[name].own.append((at, data))

    # -- pairs ---------------------------------------------------------------------------------------------

    def approach(self, primary: str, secondary: str, first: str, limit: int | None = None) -> Approach:
        """Both processes are there, `first` was started first, and the way between them is open."""
        p, s = self[primary], self[secondary]
        if primary in self.peers:
            self.lose(primary)
        if first == "secondary":
            s.be_secondary()
            if s.status()["stage"] == "none":
                s.server.execute("replication-start")
            p.be_owner()
        else:
            s.end()
            p.be_owner()
            if p.status()["stage"] != "running":
                assert "cannot start" in refused(p.server, *self.start_of(p, s))
            s.be_secondary()
        status = p.status()
        resumes = status["stage"] == "running"
        if resumes and p.record["partner"] != s.status()["node"]:
            p.server.execute("replication-stop")
            resumes = False
        before = p.forwarded if status["mode"] == "primary" else 0
        approach = Approach(p, s, resumes, before, len(s.relay.verdicts))
        for other in self.nodes.values():
            # One that was its primary and goes on by itself would be there first, now and then.
            if other not in (p, s) and goes_on_by_itself(other) and other.status()["link"]["secondary"] == s.uri:
                other.end()
        s.relay.open(limit)
        return approach

    def meet(self, primary: str, secondary: str, first: str = "secondary", limit: int | None = None) -> Outcome:
        """Start `primary` with `secondary`; what came of it. Nothing is awaited but the decision."""
        approach = self.approach(primary, secondary, first, limit)
        p, s = approach.primary, approach.secondary
        try:
            if not approach.resumes:
                p.server.execute(*self.start_of(p, s))
            else:
                self.wait_decided(p)
        except QmpError as error:
            s.relay.close()
            return Outcome("refused", 0, error.desc)
        link = p.status()["link"]
        if link["state"] not in ("in-sync", "synchronizing"):
            s.relay.close()
            assert p.forwarded == approach.before
            return Outcome("refused", 0, link["reason"])
        self.peers[primary] = secondary
        verdict = wait_until(lambda: s.relay.verdicts[approach.said :], "the primary says what it will do")[0]
        return Outcome(verdict, approach.before)

    @staticmethod
    def start_of(p: Node, s: Node) -> tuple[str, dict[str, str]]:
        return "replication-start", {"mode": "primary", "secondary": s.uri}

    @staticmethod
    def wait_decided(p: Node) -> None:
        """The link of a primary that goes on by itself is up, or was refused."""

        def decided() -> bool:
            link = p.status()["link"]
            refusal = link["state"] == "lost" and re.search("refuses: |what answers at", link["reason"] or "")
            return link["state"] in ("in-sync", "synchronizing") or bool(refusal)

        wait_until(decided, "the link is up or refused")

    def pair(self, primary: str, secondary: str, first: str = "secondary") -> Outcome:
        """Until the secondary has a checkpoint of everything."""
        outcome = self.meet(primary, secondary, first)
        assert outcome.verdict != "refused", outcome.reason
        return self.complete(primary, outcome)

    def complete(self, primary: str, outcome: Outcome) -> Outcome:
        """Await the resync and take a checkpoint; and hold the disks against what they should be."""
        p, s = self[primary], self[self.peers[primary]]
        p.server.execute("replication-checkpoint")
        sent, rest = divmod(p.forwarded - outcome.sent, GRAIN)
        assert not rest
        if s.record["led"]:
            s.server.execute("replication-start")
        s.content = s.checkpoint = p.content
        s.own = []
        s._guest = None
        status = p.status()
        assert (status["stage"], status["link"]["state"], status["error"]) == ("running", "in-sync", None)
        status = s.status()
        assert (status["stage"], status["consistent"], status["error"]) == ("running", True, None)
        shown = [p.content_now(), s.content_now(), whole(p.guest), whole(s.guest)]
        assert [differing(each, p.content) for each in shown] == [set()] * 4
        return Outcome(outcome.verdict, sent)

    def sent(self, primary: str, secondary: str) -> None:
        """Until the secondary has everything, and was told so; it has no checkpoint of that."""
        self.meet(primary, secondary)
        wait_until(lambda: self[primary].status()["link"]["state"] == "in-sync", "everything is sent, and offered")
        self[secondary].content = self[primary].content

    def stranger(self, name: str, grain: str) -> None:
        """Somebody who is no primary writes to a secondary."""
        at, data = self._next(grain)
        handle = self[name].server.connect("disk0")
        handle.pwrite(data, at)
        handle.shutdown()
        self[name].content = changed(self[name].content, (at, data))

    def begin(self, primary: str, secondary: str) -> None:
        """As far as the first grain of the resync, the lowest."""
        outcome = self.meet(primary, secondary, limit=ONE_GRAIN)
        p, s = self[primary], self[secondary]
        wait_until(lambda: p.forwarded == outcome.sent + GRAIN, "one grain has arrived")
        if s.status()["consistent"]:
            assert differing(whole(s.guest), changed(s.checkpoint, *s.own)) == set()

    # -- what goes wrong, and who goes on ------------------------------------------------------------------

    def cut(self, primary: str) -> None:
        """Nothing goes over the link any more, and nobody has noticed."""
        self[self.peers.pop(primary)].relay.silence()

    def lose(self, primary: str) -> None:
        """The link is lost, and both have noticed."""
        p, s = self[primary], self[self.peers.pop(primary)]
        s.relay.close()
        for node in (p, s):
            if node.server.running:
                wait_until(lambda node=node: not _connected(node.status()), f"{node.name} has noticed the loss")

    def kill(self, name: str) -> None:
        """The process, without warning."""
        self[name].end(signal.SIGKILL)
        for primary, secondary in list(self.peers.items()):
            if name in (primary, secondary):
                self.lose(primary)

    def power(self, name: str) -> None:
        """The host, likewise: what comes next is another boot."""
        self.kill(name)
        self[name].boots += 1

    def exit(self, name: str) -> None:
        """The process, in good order; and its host, after that."""
        self.peers.pop(name, None)
        self[name].end()
        for primary, secondary in list(self.peers.items()):
            if secondary == name:
                self.lose(primary)
        self[name].boots += 1

    def reopen(self, name: str) -> None:
        """An owner gets a command line that says so."""
        self[name].end()
        self[name].start("primary")

    def alone(self, name: str) -> None:
        """A secondary runs, and no primary has ever come."""
        self[name].be_secondary()
        self[name].server.execute("replication-start")

    def _up(self, name: str) -> Node:
        node = self[name]
        if not node.server.running:
            node.start("secondary")
        return node

    def failover(self, name: str, force: bool = False) -> None:
        node = self._up(name)
        outdated = node.status()["outdated-reason"] is not None  # a demoted owner, say: a person insists
        node.server.execute("replication-stop", failover=True, force=force or outdated)
        status = node.server.wait_stage("done", "failover-failed")
        assert (status["stage"], status["consistent"]) == ("done", True)
        node.content = node.content_now() if force else changed(node.checkpoint, *node.own)
        node.own = []
        self.check_owner(name)

    def force(self, name: str) -> None:
        """Failover without a valid checkpoint."""
        assert "force" in refused(self._up(name).server, "replication-stop", {"failover": True})
        self.failover(name, force=True)

    def stop(self, primary: str) -> None:
        """In good order: the secondary has everything, and knows it."""
        self[primary].server.execute("replication-stop")
        self.peers.pop(primary, None)

    def switch(self, secondary: str) -> None:
        """Planned stop of a secondary."""
        node = self._up(secondary)
        if node.status()["outdated-reason"] is not None:
            assert "outdated" in refused(node.server, "replication-stop")
            self.failover(secondary)
            return
        node.server.execute("replication-stop")
        assert node.status()["stage"] == "done"
        node.own = []
        self.check_owner(secondary)

    def discard(self, name: str) -> None:
        self[name].be_secondary()
        self[name].server.execute("replication-discard")

    def wipe(self, name: str) -> None:
        """The state folder is gone."""
        self[name].end()
        shutil.rmtree(self[name].state)

    def check_owner(self, name: str) -> None:
        """The disk of an owner is as it should be, for whoever looks."""
        node = self[name]
        assert differing(node.content_now(), node.content) == set()
        if node.server.running:
            assert differing(whole(node.guest), node.content) == set()


def differing(one: bytes, other: bytes) -> set[int]:
    """Grains of which two contents are not the same."""
    return {at // GRAIN for at in range(0, SIZE, BLOCK) if one[at : at + BLOCK] != other[at : at + BLOCK]}


def _connected(status: dict[str, Any]) -> bool:
    """Whether a primary has a secondary, or a secondary a primary."""
    link = status["link"]
    if status["mode"] == "secondary":
        return link["primary"] is not None
    return link["state"] in ("in-sync", "synchronizing")


@pytest.fixture
def world(lab: Lab) -> Iterator[World]:
    """Three nodes with equal disks, none of them running."""
    made = World(lab)
    try:
        yield made
    finally:
        made.close()


# -- the table -----------------------------------------------------------------------------------------------

CIRCLE = "pair A B; write A 3; kill A; failover B"
SPLIT = "pair A B; lose A; write A 2; failover B; write B 6"
SWITCH = "pair A B; write A 3; stop A; switch B"

OFFERED = "pair A B; write A 2; lose A; write A 3; sent A B; stop A"
"""B has everything of A, and no checkpoint of that."""

TABLE = [
    # what happened, who is started as primary and secondary, decision or refusal, grains that are sent
    ("", "A B", "equal", ""),
    ("write A 2", "A B", "equal", "2"),
    # the link
    ("pair A B; lose A", "A B", "quick", ""),
    ("pair A B; write A 1; lose A; write A 3 5", "A B", "quick", "3 5"),
    ("pair A B; cut A; late A 4; kill A", "A B", "quick", "4"),
    ("pair A B; lose A; write A 1 3 5; begin A B; lose A", "A B", "quick", "3 5"),
    ("pair A B; lose A; write A 1 3 5; begin A B; lose A; write A 1", "A B", "quick", "1 3 5"),
    ("pair A B; lose A; write A 1 3 5; begin A B; kill A", "A B", "quick", "3 5"),
    ("pair A B; write A 2; kill B; write A 3", "A B", "quick", "3"),
    ("pair A B; write A 2; stop A; write A 3", "A B", "quick", "3"),
    ("pair A B; write A 2; exit A; exit B", "A B", "quick", ""),
    ("pair A B; write A 2; exit B", "A B", "quick", ""),
    ("pair A B; write A 2; exit B; write A 3", "A B", "quick", "3"),
    # failover, and the return of the former primary: what was rolled back, what was in flight, what was written
    (CIRCLE, "B A", "quick", "3"),
    (f"{CIRCLE}; write B 6", "B A", "quick", "3 6"),
    (f"{CIRCLE}; write B 6; reopen B", "B A", "quick", "3 6"),
    (f"{CIRCLE}; write B 6; kill B; write B 7", "B A", "quick", "3 6 7"),
    ("pair A B; write A 3; cut A; late A 4; kill A; own B 5; failover B; write B 6", "B A", "quick", "3 4 5 6"),
    ("pair A B; cut A; late A 4; own B 5; kill A; kill B; failover B", "B A", "quick", "4 5"),
    (f"{CIRCLE}; write B 6; pair B A; write B 1; kill B; failover A; write A 7", "A B", "quick", "1 7"),
    (f"{CIRCLE}; write B 6; begin B A; lose B; write B 7", "B A", "quick", "6 7"),
    (f"{CIRCLE}; write B 6", "A B", OUTDATED, ""),
    (CIRCLE, "A B", OUTDATED, ""),
    (f"{CIRCLE}; write B 6; discard B", "A B", "quick", "3 6"),
    (f"{CIRCLE}; write B 6; begin B A; lose B", "A B", NOT_A_PRIMARY, ""),
    (f"{CIRCLE}; write B 6; begin B A; lose B; failover A", "A B", SPLIT_BRAIN, ""),
    (f"{CIRCLE}; write B 6; begin B A; lose B; failover A", "B A", SPLIT_BRAIN, ""),
    # owners that were never part of a pair
    ("write A 2; write B 3", "A B", UNRELATED, ""),
    ("alone B; failover B; write B 3", "A B", UNRELATED, ""),
    ("alone B; switch B; write B 3", "A B", UNRELATED, ""),
    ("alone B; switch B; write B 3", "B A", "equal", "3"),
    ("alone B; own B 4; failover B; write B 3", "B A", "full", "all"),
    # planned switch-over, and back
    (SWITCH, "B A", "quick", ""),
    (SWITCH, "A B", "quick", ""),
    (f"{SWITCH}; write B 6", "B A", "quick", "6"),
    (f"{SWITCH}; write B 6; reopen B", "B A", "quick", "6"),
    (f"{SWITCH}; write B 6; pair B A; write B 2; stop B; switch A; write A 5", "A B", "quick", "5"),
    (f"{SWITCH}; write B 6", "A B", OUTDATED, ""),
    (f"{SWITCH}; write A 2; write B 6", "A B", SPLIT_BRAIN, ""),
    (f"{SWITCH}; write A 2; write B 6", "B A", SPLIT_BRAIN, ""),
    (f"{SWITCH}; write A 2", "A B", "quick", "2"),
    (f"{SWITCH}; write A 2", "B A", OUTDATED, ""),
    # the same without a checkpoint since everything was sent, when the process that was told so is gone
    (f"{OFFERED}; switch B", "B A", "quick", ""),
    (f"{OFFERED}; kill B; switch B", "B A", "quick", ""),
    (f"{OFFERED}; kill B; switch B", "A B", "quick", ""),
    (f"{OFFERED}; kill B; switch B; write B 6", "B A", "quick", "6"),
    (f"{OFFERED}; kill B; switch B; write B 6", "A B", OUTDATED, ""),
    (f"{OFFERED}; kill B; switch B", "B C", "full", "all"),
    (f"{OFFERED}; stranger B 5; kill B; switch B", "B A", "quick", "5"),
    (f"{OFFERED}; stranger B 5; kill B; switch B", "A B", "quick", "5"),
    (f"{OFFERED}; kill B; failover B", "B A", SPLIT_BRAIN, ""),
    # split brain, whoever is started as the primary
    (SPLIT, "A B", SPLIT_BRAIN, ""),
    (SPLIT, "B A", SPLIT_BRAIN, ""),
    (f"{SPLIT}; discard B", "A B", "quick", "2 6"),
    (f"{SPLIT}; discard A", "B A", "quick", "2 6"),
    (f"{SPLIT}; discard B; switch B", "B A", SPLIT_BRAIN, ""),
    (f"{SPLIT}; discard B; switch B; write B 7", "A B", SPLIT_BRAIN, ""),
    (f"{SPLIT}; discard B; pair A B; lose A; write A 5", "A B", "quick", "5"),
    ("pair A B; failover B; late A 4; lose A", "B A", SPLIT_BRAIN, ""),
    ("pair A B; cut A; late A 4; failover B; kill A", "B A", "quick", "4"),
    ("pair A B; failover B; lose A", "B A", "quick", ""),
    ("pair A B; lose A; write A 1 3; begin A B; lose A; failover B", "A B", SPLIT_BRAIN, ""),
    ("pair A B; lose A; write A 1 3; begin A B; lose A; failover B", "B A", SPLIT_BRAIN, ""),
    ("pair A B; lose A; write A 1 3; begin A B; kill A; failover B; discard B", "A B", "quick", "1 3"),
    ("pair A B; own B 5; lose A; write A 1 3; begin A B; failover B; write B 6; lose A", "A B", SPLIT_BRAIN, ""),
    ("pair A B; own B 5; lose A; write A 1 3; begin A B; kill A; failover B; discard A", "B A", "quick", "1 3 5"),
    # a state folder is lost
    ("pair A B; lose A; wipe B", "A B", "full", "all"),
    ("pair A B; lose A; wipe A", "A B", UNRELATED, ""),
    ("pair A B; lose A; wipe A; discard B", "A B", "full", "all"),
    (f"{CIRCLE}; write B 6; wipe A", "B A", "full", "all"),
    # the first copy
    ("pair A B; lose A; wipe B; begin A B; lose A", "A B", "quick", "1 2 3 4 5 6 7"),
    ("pair A B; lose A; wipe B; begin A B; lose A; write A 0", "A B", "quick", "all"),
    ("pair A B; lose A; wipe B; begin A B; kill B; kill A", "A B", "quick", "1 2 3 4 5 6 7"),
    ("pair A B; lose A; wipe B; begin A B; lose A", "B A", NOT_A_PRIMARY, ""),
    ("pair A B; lose A; wipe B; begin A B; lose A; force B", "A B", UNRELATED, ""),
    ("pair A B; lose A; wipe B; begin A B; lose A; force B", "B A", UNRELATED, ""),
    # a third node
    ("pair A B; lose A", "A C", "full", "all"),
    ("pair A B; lose A", "C A", UNRELATED, ""),
    ("pair A B; lose A; pair A C; lose A", "A B", "full", "all"),
    ("pair A B; lose A; pair A C; lose A; write A 4", "A C", "quick", "4"),
    ("pair A B; stop A; pair A C; lose A; switch B", "B C", OUTDATED, ""),
    ("pair A B; lose A; pair A C; lose A; failover B", "B C", SPLIT_BRAIN, ""),
    ("pair A B; lose A; pair A C; kill A; failover C", "C B", "full", "all"),
    ("pair A B; lose A; pair A C; kill A; failover C; write C 4", "C A", "quick", "4"),
    ("pair A B; lose A; begin A C; lose A", "A B", "full", "all"),
    (f"{CIRCLE}; pair B C; lose B", "B A", "full", "all"),
    (f"{CIRCLE}; pair B C; lose B", "A B", OUTDATED, ""),
    (f"{CIRCLE}; pair B C; write B 1; kill B; failover C; write C 4", "C A", "full", "all"),
    (f"{CIRCLE}; pair B C; write B 1; kill B; failover C; write C 4", "C B", "quick", "1 4"),
    (f"{CIRCLE}; pair B C; write B 1; kill B; failover C; write C 4", "A C", OUTDATED, ""),
    # a power cut: of either host, or of both
    ("pair A B; write A 2; power A", "A B", "quick", "all"),
    ("pair A B; write A 2; power B", "A B", "quick", "all"),
    ("pair A B; write A 2; power A; power B", "A B", "quick", "all"),
    ("pair A B; write A 3; power A; failover B; write B 6", "B A", "quick", "all"),
    ("pair A B; write A 3; kill A; failover B; write B 6; power B", "B A", "quick", "all"),
    ("pair A B; write A 3; power A; failover B; write B 6", "A B", OUTDATED, ""),
    ("pair A B; lose A; write A 2; failover B; write B 6; power A; power B", "A B", SPLIT_BRAIN, ""),
    ("pair A B; lose A; write A 2; failover B; write B 6; power A; power B", "B A", SPLIT_BRAIN, ""),
    ("pair A B; lose A; write A 1 3; begin A B; lose A; power B", "A B", "quick", "all"),
    ("pair A B; lose A; write A 1 3; begin A B; lose A; power B; force B", "A B", SPLIT_BRAIN, ""),
    ("pair A B; lose A; wipe B; begin A B; power A; power B", "A B", "quick", "all"),
    (f"{SWITCH}; write B 6; power B", "A B", OUTDATED, ""),
    (f"{SWITCH}; exit A; exit B", "B A", "quick", ""),
]


EITHER = ("", CIRCLE, SPLIT, SWITCH, "pair A B; lose A; wipe B", "pair A B; write A 2; power B")
"""Stories after which either node is started first. After the others one of them is, in turn."""


def cases() -> list[Any]:
    """The table's rows, with who is started first."""
    return [
        pytest.param(*row, first, id=f"{row[0] or 'new'} -> {row[1]}, {first} first")
        for index, row in enumerate(TABLE)
        for first in ("primary", "secondary")
        if row[0] in EITHER or first == ("primary", "secondary")[index % 2]
    ]


@pytest.mark.parametrize(("story", "start", "decision", "grains", "first"), cases())
def test_table(world: World, story: str, start: str, decision: str, grains: str, first: str) -> None:
    world.play(story)
    primary, secondary = start.split()
    if decision in ("equal", "quick", "full"):
        outcome = world.pair(primary, secondary, first)
        expected = GRAINS if grains == "all" else len(grains.split())
        assert (outcome.verdict, outcome.sent) == (decision, expected)
        return
    disks = {name: node.content_now() for name, node in world.nodes.items()}
    if decision is NOT_A_PRIMARY:
        world[primary].end()
        _, said = world[primary].server.failed_start(world[primary].state.parent, world[primary].arguments("primary"))
        assert decision in said
    else:
        outcome = world.meet(primary, secondary, first)
        assert outcome.verdict == "refused"
        assert decision in outcome.reason
    assert disks == {name: node.content_now() for name, node in world.nodes.items()}
    for name in start.split():
        if world[name].server.running and world[name].status()["stage"] != "none":
            assert whole(world[name].guest) == world[name].content


# -- steps of the pairing ------------------------------------------------------------------------------------

RETURNED = (f"{CIRCLE}; write B 6", "B A", "quick")
AGAIN = ("pair A B; write A 2; lose A; write A 1 3", "A B", "quick")
WHOLE = ("pair A B; lose A; wipe B", "A B", "full")
FRESH = ("write A 2", "A B", "equal")

STEPS = [
    # what happened, who is started, and would decide so; where either is held
    (RETURNED, ("start.connected", "start.settled", "start.entered", "link.synchronized")),
    (RETURNED, ("pairing.begun", "pairing.sync", "pairing.sync again")),
    (AGAIN, ("link.dialled", "link.synchronized", "pairing.begun", "pairing.sync", "pairing.sync again")),
    (WHOLE, ("start.connected", "start.settled", "pairing.sync", "pairing.sync again")),
    (FRESH, ("start.settled", "pairing.sync", "pairing.sync again")),
]


def hold(world: World, approach: Approach, point: str) -> Qmp:
    """Let the pairing go as far as `point`; the connection on which a start was asked for."""
    name, _, again = point.partition(" ")
    qmp = approach.primary.server.qmp()
    if not approach.resumes:
        command, arguments = World.start_of(approach.primary, approach.secondary)
        qmp.send(json.dumps({"execute": command, "arguments": arguments, "id": "start"}).encode() + b"\n")
    world.points.wait_hit(name)
    if again:
        # The first one says what will be sent, the second one that it has been.
        world.points.arm(name)
        world.points.release(name)
        wait_until(lambda: approach.secondary.relay.verdicts[-1] == "complete", "the primary has sent everything")
        world.points.wait_hit(name)
    return qmp


def step_cases() -> list[Any]:
    """Every step, and who dies there."""
    return [
        pytest.param(*row, point, victim, id=f"{row[2]}, {point}, {victim} dies")
        for row, points in STEPS
        for point in points
        for victim in ("primary", "secondary")
    ]


@pytest.mark.parametrize(("story", "start", "decision", "point", "victim"), step_cases())
def test_whoever_dies_at_a_step_of_the_pairing_the_next_one_brings_everything(
    world: World, story: str, start: str, decision: str, point: str, victim: str
) -> None:
    world.play(story)
    primary, secondary = start.split()
    meet_until(world, primary, secondary, point, victim)
    p, s = world[primary], world[secondary]
    world.check_owner(primary)
    s.be_secondary()
    status = s.status()
    if decision == "quick":
        # The last checkpoint stays valid the whole time.
        assert (status["stage"], status["consistent"]) == ("running", True)
        assert differing(whole(s.guest), s.checkpoint) == set()
    elif decision == "full" and (point, victim) != ("pairing.sync", "primary"):
        # There it had been told already, but may do so at any moment.
        untold = point == "start.connected" or (point, victim) == ("pairing.sync", "secondary")
        assert (status["stage"], status["consistent"]) == ("running", untold)
    s.relay.close()
    outcome = world.pair(primary, secondary)
    allowed = {"quick": ("quick",), "full": ("full", "quick"), "equal": ("equal", "quick", "full")}
    assert outcome.verdict in allowed[decision]
    if decision == "quick":
        assert outcome.sent <= 2
    world.write(primary, "0")
    assert differing(p.content_now(), s.content_now()) == set()


def meet_until(world: World, primary: str, secondary: str, point: str, victim: str) -> None:
    """Begin a pair, and kill one of the two when it has come to `point`."""
    p, s = world[primary], world[secondary]
    name = point.partition(" ")[0]
    if goes_on_by_itself(p):
        world.points.arm(name)  # it does so at once
    approach = world.approach(primary, secondary, "secondary")
    if not approach.resumes:
        world.points.arm(name)
    with hold(world, approach, point) as qmp:
        (p if victim == "primary" else s).end(signal.SIGKILL)
        world.points.disarm(name)
        if victim == "secondary" and not approach.resumes:
            while qmp.receive().get("id") != "start":
                pass  # whatever the answer is
    s.relay.close()


def test_a_primary_that_comes_and_dies_before_it_says_anything_takes_back_no_offer(world: World) -> None:
    world.play(OFFERED)
    meet_until(world, "A", "B", "pairing.begun", "primary")
    world.switch("B")
    outcome = world.pair("B", "A")
    assert (outcome.verdict, outcome.sent) == ("quick", 0)


def goes_on_by_itself(node: Node) -> bool:
    """Whether it is a primary that goes on by itself."""
    return node.server.running and node.status()["mode"] == "primary" and node.status()["stage"] == "running"


@pytest.mark.parametrize("point", ["start.settled", "link.synchronized", "pairing.begun", "pairing.sync again"])
def test_failover_at_a_step_of_the_pairing_leads_to_the_last_checkpoint_and_overwrites_nobody(
    world: World, point: str
) -> None:
    story, start, _ = RETURNED
    world.play(story)
    primary, secondary = start.split()
    meet_until(world, primary, secondary, point, "primary")
    world.failover(secondary)  # holds the disk against the checkpoint
    for pair in ((primary, secondary), (secondary, primary)):
        disks = [world[name].content_now() for name in pair]
        outcome = world.meet(*pair)
        assert outcome.verdict == "refused"
        assert SPLIT_BRAIN in outcome.reason
        assert disks == [world[name].content_now() for name in pair]
        if pair == (primary, secondary):
            world.switch(secondary)


@pytest.mark.parametrize("point", ["failover.entered", "commit.written", "commit.hidden-forgotten"])
def test_a_failover_that_is_interrupted_forgets_nothing_that_it_rolls_back(world: World, point: str) -> None:
    world.play("pair A B; write A 3 5; own B 1; kill A")
    node = world["B"]
    world.points.arm(point)
    with node.server.qmp() as qmp:
        qmp.send(b'{"execute": "replication-stop", "arguments": {"failover": true}}\n')
        world.points.wait_hit(point)
        node.end(signal.SIGKILL)
    world.points.disarm(point)
    node.content, node.own = changed(node.checkpoint, *node.own), []
    node.start("secondary")
    node.server.wait_stage("done")
    world.check_owner("B")
    world.write("B", "6")
    outcome = world.pair("B", "A")
    assert (outcome.verdict, outcome.sent) == ("quick", 4)


@pytest.mark.parametrize("sync", ["auto", "full", "none"])
def test_no_way_of_starting_gets_around_a_refusal(world: World, sync: str) -> None:
    world.play(f"{SPLIT}; kill A; reopen B")
    world["A"].be_secondary()
    before = world["A"].content_now()
    world["A"].relay.open()
    arguments = {"mode": "primary", "secondary": world["A"].uri, "sync": sync}
    assert SPLIT_BRAIN in refused(world["B"].server, "replication-start", arguments)
    assert world["A"].content_now() == before
    world.check_owner("B")


# -- in the midst of a resync, or of an epoch -----------------------------------------------------------------


def test_after_a_lost_link_there_is_no_checkpoint_and_no_planned_stop_but_a_failover(world: World) -> None:
    world.play("pair A B; write A 2; own B 5; lose A; write A 3")
    node = world["B"]
    for command in ("replication-stop", "xen-colo-do-checkpoint"):
        assert refused(node.server, command).startswith("The secondary lacks something of its primary's (")
    assert differing(whole(node.guest), changed(node.checkpoint, *node.own)) == set()
    world.failover("B")
    outcome = world.meet("A", "B")
    assert SPLIT_BRAIN in outcome.reason


def test_in_the_midst_of_a_resync_the_last_checkpoint_is_all_there_is(world: World) -> None:
    world.play("pair A B; write A 2; own B 5; lose A; write A 1 3; begin A B")
    node = world["B"]
    for command in ("replication-stop", "xen-colo-do-checkpoint"):
        assert "a resync is under way" in refused(node.server, command)
    assert node.status()["link"]["state"] == "synchronizing"
    assert differing(node.content_now(), node.checkpoint) == {1, 2}
    world.failover("B")


def test_in_the_midst_of_the_first_copy_there_is_no_checkpoint_at_all(world: World) -> None:
    world.play("pair A B; lose A; wipe B; begin A B")
    node = world["B"]
    assert node.status()["consistent"] is False
    with nbd_refusal(errno.EIO):
        node.guest.pread(BLOCK, 0)
    for arguments in ({}, {"failover": True}):
        assert "resync" in refused(node.server, "replication-stop", arguments)
    world.play("kill B; kill A")
    assert world.pair("A", "B").sent == GRAINS - 1


def test_a_primary_does_not_go_on_with_a_secondary_that_is_another_one(world: World) -> None:
    world.play("pair A B; lose A; write A 2; wipe B")
    primary, node = world["A"], world["B"]
    before = node.content_now()
    node.start("secondary")
    node.relay.open()
    World.wait_decided(primary)
    link = primary.status()["link"]
    assert link["state"] == "lost"
    assert "another secondary than it was: stop, then start with it" in link["reason"]
    assert node.content_now() == before


def test_an_old_primary_that_lives_is_told_that_nobody_is_its_secondary(world: World) -> None:
    world.play("pair A B; write A 2; failover B; write B 6; late A 4")
    primary, node = world["A"], world["B"]
    wait_until(lambda: primary.status()["disks"][0]["out-of-sync-bytes"] == GRAIN, "the write was refused")
    world.play("late A 5; lose A")
    node.relay.open()
    World.wait_decided(primary)
    assert NOBODYS in primary.status()["link"]["reason"]
    world.check_owner("B")
    world.check_owner("A")


# -- who may say what -----------------------------------------------------------------------------------------


def test_discard_is_for_a_secondary_that_has_something_and_nobody_is_writing_to(world: World) -> None:
    world["C"].start("secondary")
    assert "has not been part of a pair" in refused(world["C"].server, "replication-discard")
    world.play("pair A B")
    assert "as a secondary" in refused(world["A"].server, "replication-discard")
    assert "a primary is connected" in refused(world["B"].server, "replication-discard")
    world.play("lose A; failover B")
    assert "make it a secondary first" in refused(world["B"].server, "replication-discard")


def test_only_the_owner_of_its_disks_can_be_demoted(world: World) -> None:
    world.play("pair A B")
    assert "started as a primary" in refused(world["A"].server, "replication-demote")
    assert "in stage done, not running" in refused(world["B"].server, "replication-demote")
    world.play("kill A; failover B; reopen B")
    assert "started as a primary" in refused(world["B"].server, "replication-demote")
    world.check_owner("B")


def test_what_a_guest_writes_after_a_discard_nobody_has_given_up(world: World) -> None:
    """The secondary's own writes are in a checkpoint of its own, and discard was for what was there before."""
    world.play(f"{SPLIT}; discard B; own B 7; failover B")
    for pair in (("A", "B"), ("B", "A")):
        outcome = world.meet(*pair)
        assert (outcome.verdict, SPLIT_BRAIN in outcome.reason) == ("refused", True)
        if pair == ("A", "B"):
            world.switch("B")


# -- one primary at a time ------------------------------------------------------------------------------------


@pytest.fixture
def secondary(world: World) -> Server:
    """That of node B, running and new."""
    world["B"].be_secondary()
    world["B"].server.execute("replication-start")
    return world["B"].server


def test_while_a_primary_is_paired_others_read_the_target_face_but_do_not_write(secondary: Server) -> None:
    stranger = secondary.connect("disk0")
    stranger.pwrite(pattern(2, BLOCK), 0)
    fake = FakePrimary(secondary, "1" * 16, SIZE)
    token = fake.pair()
    data = fake.data(token)
    for other in (stranger, secondary.connect("disk0")):
        for action in (
            lambda handle=other: handle.pwrite(pattern(3, BLOCK), 0),
            lambda handle=other: handle.zero(BLOCK, 0),
            lambda handle=other: handle.trim(BLOCK, 0),
        ):
            with nbd_refusal(errno.EPERM):
                action()
        other.flush()
        assert bytes(other.pread(BLOCK, 0)) == pattern(2, BLOCK)
    secondary.connect("top0").pwrite(pattern(4, BLOCK), BLOCK)
    data.pwrite(pattern(5, BLOCK), 0)
    assert bytes(stranger.pread(BLOCK, 0)) == pattern(5, BLOCK)
    fake.call("replication-unpair", token=token)
    stranger.pwrite(pattern(6, BLOCK), 0)
    with nbd_refusal(errno.ESHUTDOWN):
        data.pwrite(pattern(7, BLOCK), 0)
    assert bytes(stranger.pread(BLOCK, 0)) == pattern(6, BLOCK)


def test_a_connection_with_a_former_or_an_invented_token_does_not_write(secondary: Server) -> None:
    fake = FakePrimary(secondary, "1" * 16, SIZE)
    former = fake.data(fake.pair())
    former.pwrite(pattern(2, BLOCK), 0)
    token = fake.pair()
    invented = fake.data("f" * 32)
    for handle in (former, invented):
        for action in (
            lambda handle=handle: handle.pwrite(pattern(3, BLOCK), 0),
            lambda handle=handle: handle.zero(BLOCK, 0),
        ):
            with nbd_refusal(errno.ESHUTDOWN):
                action()
    fake.data(token).pwrite(pattern(4, BLOCK), 0)
    assert bytes(former.pread(BLOCK, 0)) == pattern(4, BLOCK)


def test_the_session_ends_with_the_control_connection(secondary: Server) -> None:
    fake = FakePrimary(secondary, "1" * 16, SIZE)
    token = fake.pair()
    for verdict in ("equal", "complete"):
        fake.call("replication-pair-sync", token=token, verdict=verdict, generation="2" * 16, marked=False)
    data = fake.data(token)
    fake.close()
    wait_until(lambda: secondary.status()["link"]["primary"] is None, "the secondary has noticed")
    with nbd_refusal(errno.ESHUTDOWN):
        data.pwrite(pattern(2, BLOCK), 0)
    assert "lost in the midst of an epoch" in refused(secondary, "xen-colo-do-checkpoint")


def test_a_silent_primary_counts_as_lost_although_its_connection_is_open(secondary: Server) -> None:
    fake = FakePrimary(secondary, "1" * 16, SIZE)
    token = fake.pair(0.3)
    for verdict in ("equal", "complete"):
        fake.call("replication-pair-sync", token=token, verdict=verdict, generation="2" * 16, marked=False)
    assert secondary.status()["link"]["state"] == "in-sync"
    wait_until(lambda: secondary.status()["link"]["state"] == "lost", "the secondary has noticed")
    for command in ("replication-checkpoint", "replication-stop"):
        assert "nothing was heard of the primary" in refused(secondary, command)
    fake.call("query-version")
    assert secondary.status()["link"]["state"] == "in-sync"
    secondary.execute("replication-checkpoint")


def test_a_second_primary_is_refused_until_the_first_was_silent_for_twice_its_timeout(secondary: Server) -> None:
    first, second = (FakePrimary(secondary, digit * 16, SIZE) for digit in "12")
    first.pair()
    assert second.refused_pair().startswith(f"it has a primary already (node {'1' * 16}), which was heard of ")
    timeout_s = 0.3
    begun = time.monotonic()
    data = first.data(first.pair(timeout_s))
    token = wait_until(lambda: taken_over(second), "the second one may take over")
    assert time.monotonic() - begun >= 2 * timeout_s
    with nbd_refusal(errno.ESHUTDOWN):
        data.pwrite(pattern(2, BLOCK), 0)
    with pytest.raises(QmpError, match="not the session of the primary any more"):
        first.call("replication-pair-sync", token="0" * 32, verdict="quick", generation="1" * 16, marked=False)
    # The end of the first one's connection is not that of the second one's session.
    first.close()
    second.data(token).pwrite(pattern(3, BLOCK), 0)
    assert secondary.status()["link"]["primary"] == "2" * 16


def taken_over(fake: FakePrimary) -> str | None:
    """The token, when it is allowed."""
    try:
        return fake.pair()
    except QmpError as error:
        if "it has a primary already" not in error.desc:
            raise
        return None


def test_a_primary_that_stood_still_for_too_long_finds_another_in_its_place(lab: Lab) -> None:
    world = World(lab, primary="timeout=1")
    try:
        world.play("pair A B; lose A; discard B")
        old, new, node = (world[name] for name in "ACB")
        world.points.arm("link.dialled")
        node.relay.open()
        world.points.wait_hit("link.dialled")  # it may write, and has changed nothing yet
        new.be_owner()
        with silent(old.server):
            wait_until(lambda: started(world, new, node), "the old primary was silent for long enough")
            world.peers["C"] = "B"
        world.points.disarm("link.dialled")
        assert world.complete("C", Outcome(node.relay.verdicts[-1], 0)).sent == GRAINS
        World.wait_decided(old)
        world.write("C", "5")
        assert re.search("has a primary already|not the session|control link", old.status()["link"]["reason"])
        world.late("A", "2")
        assert differing(node.content_now(), new.content) == set()
    finally:
        world.close()


def started(world: World, primary: Node, secondary: Node) -> bool:
    """Whether a start was accepted; else because of another primary."""
    try:
        primary.server.execute(*World.start_of(primary, secondary))
    except QmpError as error:
        if "it has a primary already" not in error.desc:
            raise
        return False
    return True


# -- power cuts with durability=power -------------------------------------------------------------------------


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Nodes whose checkpoints outlive their hosts. durability=power refuses tmpfs, which /tmp often is."""
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    with Lab() as lab:
        made = World(lab, secondary="durability=power")
        try:
            yield made
        finally:
            made.close()


def test_power_the_checkpoint_outlives_the_hosts_and_the_former_primary_gets_everything(durable: World) -> None:
    durable.play("pair A B; write A 3; own B 5")
    durable["B"].guest.flush()
    durable.play("power B; power A; failover B; write B 6")
    outcome = durable.pair("B", "A")
    assert (outcome.verdict, outcome.sent) == ("quick", GRAINS)


def test_power_after_a_cut_in_the_midst_of_a_resync_the_checkpoint_is_there(durable: World) -> None:
    durable.play("pair A B; write A 3; lose A; write A 1 4; begin A B; power B; power A")
    durable["B"].start("secondary")
    assert differing(whole(durable["B"].guest), durable["B"].checkpoint) == set()
    outcome = durable.pair("A", "B")
    assert (outcome.verdict, outcome.sent) == ("quick", GRAINS)


@pytest.mark.parametrize("start", ["A B", "B A"])
def test_power_a_split_brain_is_one_after_a_cut_as_well(durable: World, start: str) -> None:
    durable.play(SPLIT)
    for name in "AB":
        durable[name].guest.flush()
    durable.play("power A; power B")
    outcome = durable.meet(*start.split())
    assert SPLIT_BRAIN in outcome.reason
    for name in "AB":
        assert differing(durable[name].content_now(), durable[name].content) == set()
