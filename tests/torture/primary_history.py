# SPDX-License-Identifier: BSD-3-Clause
"""Histories of a primary that is killed again and again while its secondary lives.

After every kill the secondary disk must hold what the protocol has promised for it (sync: every answered write;
async: every write that an answered barrier covers), and after every restart the local disk must hold every answered
write. Most lives then wait for the resync: once `replication-checkpoint` succeeds, the raw disks of both sides must be
equal, byte for byte. The others go on at once, while the resync is under way.
"""

from __future__ import annotations

import errno
import random
import time

from lab import DEADLINE_S, Lab, QmpError, Secondary, disk_name, top_id
from torture import traffic
from torture.client import Asked, Client, Command, Kind, Request, Sent, Wrong
from torture.history import HIT_S, SIZES, WINDOW, History, VictimPrimary, as_array, raw_of
from torture.oracle import BEFORE, Content, Write
from torture.points import PRIMARY_POINTS, START_POINTS

START = Command("xen-set-replication", {"enable": True, "primary": True})
BARRIER = Command("replication-checkpoint")
EXPORTS = tuple((disk_name(index), size) for index, size in enumerate(SIZES))
DISKS = range(len(SIZES))

_RETRY_S = 0.01


class Life:
    """What is known of one process of a primary from its start to its kill."""

    def __init__(self, base: list[bytes], synced: bool) -> None:
        """`synced`: the secondary held the same as `base` when this life began."""
        self.contents = [Content(as_array(content)) for content in base]
        self.synced = synced
        self.barrier = BEFORE
        """When the last answered barrier began."""
        self.asked: Asked | None = None
        self.requests = 0

    def began(self, sent: Sent) -> None:
        """A request is about to be sent."""
        self.requests += 1
        request = sent.request
        if request.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM):
            data = as_array(request.data if request.kind is Kind.WRITE else bytes(request.length))
            sent.change = Write(request.offset, data, sent.begun)
            self._content(request).changes.append(sent.change)

    def ended(self, sent: Sent) -> None:
        """A request was answered; nothing may fail here, whatever happens to the link."""
        request = sent.request
        if sent.error:
            raise Wrong(f"{request} failed with {errno.errorcode.get(sent.error, sent.error)}")
        if sent.change is not None:
            sent.change.ended = sent.ended
        if request.kind is Kind.READ:
            wrong = History.differences(
                self._content(request), sent.content, request.offset, sent.begun, sent.ended, f"answer to {request}"
            )
            if wrong:
                raise Wrong(wrong)

    def _content(self, request: Request) -> Content:
        return self.contents[int(request.export[-1])]

    def asking(self, asked: Asked) -> None:
        """A command has been sent."""
        self.asked = asked

    def answered(self, asked: Asked) -> None:
        """The command was answered; a barrier may fail only while a resync is still under way."""
        self.asked = None
        if asked.error is None:
            self.barrier = asked.begun
            self.synced = True
        elif self.synced:
            raise Wrong(f"{asked.command} failed: {asked.error}")


class PrimaryHistory(History):
    """One pair of which the primary is killed; `sync` with odd numbers."""

    kind = "primary"

    def play(self, lab: Lab) -> None:
        self.sync = bool(self.outcome.number // 5 % 2)
        rng = self.rng_of("disks")
        contents = [traffic.disk_content(rng, size) for size in SIZES]
        self.secondary = lab.add(Secondary(lab.folder, SIZES, name="s", contents=contents))
        self.secondary.start()
        self.secondary.start_replication()
        server = lab.add(
            VictimPrimary(
                lab.folder,
                self.secondary.uri(),
                SIZES,
                name="p",
                contents=contents,
                extra_arguments=[f"protocol={'sync' if self.sync else 'async'}"],
                extra_environment=self.points.environment,
            )
        )
        server.start()
        self._start_replication(server, contents)
        self.guests = contents
        base, synced = contents, True
        while self.outcome.kills < self.kills_wanted:
            base, synced = self.live(server, base, synced)
        self.phase = "the end"
        self._settle(server)
        server.kill()

    def _start_replication(self, server: VictimPrimary, contents: list[bytes]) -> None:
        """Start, killed on the way: at one point always, and elsewhere now and then."""
        point = START_POINTS[self.outcome.number // 5 % len(START_POINTS)].name
        self.points.arm(point)
        client = Client(server, [], 0)
        client.ask(START, lambda asked: None)
        client.until(lambda: self.points.is_hit(point), f"the start gets to {point}")
        self.kill_client(server, client, "in the midst of a start", point)
        server.start()
        stage = server.status()["stage"]
        if stage != ("running" if point == "start.entered" else "none"):
            raise Wrong(f"killed at {point}, a start leads to stage {stage}")
        while stage == "none":
            rng = self.rng_of("replication")
            client = Client(server, [], 0)
            client.ask(START, lambda asked: None)
            if rng.random() < 0.7 and self.outcome.kills < self.kills_wanted:
                client.run_for(rng.uniform(0.0, 0.01))
                self.kill_client(server, client, "in the midst of a command")
                server.start()
            else:
                client.until(lambda: client.idle, "start is answered")  # noqa: B023 (used at once)
                client.close()
            stage = server.status()["stage"]
            if stage not in ("none", "running"):
                raise Wrong(f"a start that was cut short led to stage {stage}")
            for index in DISKS:
                self.same(raw_of(server.disks[index]), contents[index], f"local disk{index} after a start")
        self._settle(server)

    # -- one life ------------------------------------------------------------------------------------------

    def live(self, server: VictimPrimary, base: list[bytes], synced: bool) -> tuple[list[bytes], bool]:
        """Use the primary, kill it, look at both sides, start it again: the local disks, and whether the secondary
        is known to hold the same."""
        rng = self.rng_of("life")
        self.phase = f"life after kill {self.outcome.kills}"
        life = Life(base, synced)
        client = Client(server, [name for name, _ in EXPORTS], WINDOW)
        try:
            self._perform(rng, client, life, rng.randrange(25))
            point = self._to_point(rng, client, life) if rng.random() < 0.5 else None
            self._perform(rng, client, life, rng.randrange(8), held=point is not None)
            client.run_for(rng.choice([0.0, rng.uniform(0.0, 0.003)]))
        except BaseException:
            self.log.extend(client.log)
            raise
        moment = "in the midst of a barrier" if client.commanding else "in the midst of the primary's writes"
        self.outcome.requests += life.requests
        self.kill_client(server, client, moment, point)
        killed = client.tick + 1
        self.phase = f"the comparison after kill {self.outcome.kills}"
        if life.synced:
            # In sync the answer came after both sides had it; in async a barrier says so.
            begun = killed if self.sync else life.barrier
            self._compare(life, self.secondary.disks, begun, killed, "secondary disk after the kill")
        self.start_after_kill(server, self.rng_of("start"), ())
        self._compare(life, server.disks, killed, killed, "local disk after the restart")
        self._look_at_guests()
        found = [raw_of(path) for path in server.disks]
        if rng.random() < 0.3:
            return found, False
        self._settle(server)
        if [raw_of(path) for path in server.disks] != found:
            raise Wrong("a resync has changed the local disks")
        if rng.random() < 0.4:
            self.secondary.checkpoint()
            self.guests = found
        return found, True

    def _compare(self, life: Life, paths: list, begun: int, killed: int, what: str) -> None:
        for index in DISKS:
            wrong = self.differences(
                life.contents[index], raw_of(paths[index]), 0, begun, killed, f"{what}, disk{index}"
            )
            if wrong:
                raise Wrong(wrong)

    def _look_at_guests(self) -> None:
        """The secondary's guest face holds the last checkpoint, whatever its primary does."""
        for index in DISKS:
            handle = self.secondary.connect(top_id(index))
            seen = bytes(handle.pread(SIZES[index], 0))
            self.same(seen, self.guests[index], f"the secondary's guest face top{index} since its last checkpoint")

    def _settle(self, server: VictimPrimary) -> None:
        """Wait for the resync, then the disks of both sides must be equal."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                server.checkpoint()
                break
            except QmpError as error:
                if time.monotonic() > deadline:
                    raise Wrong(f"no resync within {DEADLINE_S:g} s: {error}; {server.status()}") from error
            time.sleep(_RETRY_S)
        for index in DISKS:
            local, remote = raw_of(server.disks[index]), raw_of(self.secondary.disks[index])
            self.same(remote, local, f"the secondary's disk{index} and the primary's after the resync")

    # -- requests ------------------------------------------------------------------------------------------

    def _perform(self, rng: random.Random, client: Client, life: Life, count: int, held: bool = False) -> None:
        """Requests and barriers; with a thread `held`, nothing is waited for."""
        steps: list[Request | Command | float] = []
        for _ in range(count):
            chance = rng.random()
            if chance < 0.06:
                steps.append(BARRIER)
            elif chance < 0.25:
                steps.append(0.0)
            else:
                steps.append(traffic.request(rng, EXPORTS))
        for step in steps:
            if isinstance(step, float):
                client.pump(step)
            elif isinstance(step, Request):
                if not held:
                    client.until(lambda step=step: client.has_room(step.export), f"room for {step}")
                if client.has_room(step.export):
                    client.send(step, life.began, life.ended)
            elif not (held and client.commanding):
                client.until(lambda: not client.commanding, "the barrier before is answered")
                life.asking(client.ask(step, life.answered))

    def _to_point(self, rng: random.Random, client: Client, life: Life) -> str | None:
        """Hold a thread at a point; None if it was not reached."""
        points = {point.name: point for point in PRIMARY_POINTS}
        point = points[self.least_hit(rng, sorted(points))]
        kinds = (Kind.WRITE, Kind.ZERO, Kind.TRIM)
        for hit in range(rng.randint(1, point.hits)):
            self.points.arm(point.name)
            if hit:
                self.points.release(point.name)
            if not self._reach(client, life, point.name, [traffic.request(rng, EXPORTS, kinds) for _ in range(20)]):
                self.points.disarm(point.name)
                return None
        return point.name

    def _reach(self, client: Client, life: Life, name: str, steps: list[Request]) -> bool:
        def hit() -> bool:
            return self.points.is_hit(name)

        for step in steps:
            if client.has_room(step.export):
                client.send(step, life.began, life.ended)
            if client.reaches(hit, 0.004):
                return True
        return client.reaches(hit, HIT_S)
