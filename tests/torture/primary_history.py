# SPDX-License-Identifier: BSD-3-Clause
"""Histories of a pair of which the primary is killed again and again, and now and then the secondary.

After every kill the secondary disk must hold what the protocol has promised for it (sync: every answered write;
async: every write that an answered checkpoint covers), the secondary's guest face what the primary's disks held at one
instant of the last checkpoint, and after every restart the local disk must hold every answered write. While the
restarted primary finds its secondary again either of them may be killed. Most lives then wait for the resync: once
`replication-checkpoint` succeeds, the raw disks of both sides must be equal, byte for byte, and the guest face as well.
The others go on at once, while the resync is under way.
"""

from __future__ import annotations

import errno
import random
import time

from lab import Lab
from nodes import Secondary, Server, disk_name, top_id
from pausepoints import PausePoints
from qmp import QmpError
from torture import traffic
from torture.client import Asked, Client, Command, Kind, Request, Sent, Wrong
from torture.history import HIT_S, SIZES, WINDOW, History, VictimPrimary, as_array, raw_of
from torture.oracle import BEFORE, Content, Copy, Write
from torture.points import LINK_POINTS, PAIRING_POINTS, PRIMARY_POINTS, Cause
from waiting import DEADLINE_S, wait_until

START = Command("xen-set-replication", {"enable": True, "primary": True})
BARRIER = Command("replication-checkpoint")
EXPORTS = tuple((disk_name(index), size) for index, size in enumerate(SIZES))
DISKS = range(len(SIZES))

STARTS = (("start.connected", "start.entered"), ("start.settled",))
"""Where the starts of a history are killed; of two in a row one has each."""

RETURNS = {
    **{point.name: "primary" for point in LINK_POINTS},
    **{point.name: "secondary" for point in PAIRING_POINTS},
}
"""The points at which the two find each other again, and whose threads get there."""

UNKNOWN = "It is not known whether the secondary has taken checkpoint"
"""How a checkpoint fails that may have been taken."""

_RETRY_S = 0.01


class Life:
    """What is known of one process of a primary from its start to its kill."""

    def __init__(self, base: list[bytes], guests: list[bytes], synced: bool) -> None:
        """`synced`: the secondary held the same as `base` when this life began. `guests`: its guest faces then."""
        self.contents = [Content(as_array(content)) for content in base]
        self.guests = [Content(as_array(content)) for content in guests]
        self.copies: list[Copy] = []
        """What the checkpoint under way does to the guest faces."""
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
        """A checkpoint has been asked for."""
        self.asked = asked
        self.copies = [Copy(content, asked.begun) for content in self.contents]
        for guest, copy in zip(self.guests, self.copies, strict=True):
            guest.changes.append(copy)

    def answered(self, asked: Asked) -> None:
        """The checkpoint was answered; it may fail only while a resync is still under way."""
        self.asked = None
        for guest, copy in zip(self.guests, self.copies, strict=True):
            copy.ended = asked.ended
            if asked.error is not None and UNKNOWN not in asked.error:
                guest.changes.remove(copy)
        self.copies = []
        if asked.error is None:
            self.barrier = asked.begun
            self.synced = True
        elif self.synced:
            raise Wrong(f"{asked.command} failed: {asked.error}")


class PrimaryHistory(History):
    """One pair of which the primary is killed; `sync` with odd numbers. Those of its start apart (STARTS), it owes all
    points."""

    kind = "primary"
    owed = (*(point.name for point in PRIMARY_POINTS), *RETURNS)

    def play(self, lab: Lab) -> None:
        self.sync = bool(self.outcome.number // 5 % 2)
        rng = self.rng_of("disks")
        contents = [traffic.disk_content(rng, size) for size in SIZES]
        self.peer_points = PausePoints(lab.folder / "pause-s")
        self.secondary = lab.add(
            Secondary(lab.folder, SIZES, name="s", contents=contents, extra_environment=self.peer_points.environment)
        )
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
        self.guests = contents
        self._start_replication(server, contents)
        base, synced = contents, True
        while self.unfinished:
            base, synced = self.live(server, base, synced)
        self.phase = "the end"
        self._settle(server)
        server.kill()

    def _start_replication(self, server: VictimPrimary, contents: list[bytes]) -> None:
        """Start, killed on the way: at one or two points always, and elsewhere now and then."""
        for point in STARTS[self.outcome.number // 5 % len(STARTS)]:
            self.points.arm(point)
            client = Client(server, [], 0)
            client.ask(START, lambda asked: None)
            client.until(lambda: self.points.is_hit(point), f"the start gets to {point}")  # noqa: B023 (used at once)
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
        life = Life(base, self.guests, synced)
        client = Client(server, [name for name, _ in EXPORTS], WINDOW)
        try:
            self._perform(rng, client, life, rng.randrange(25))
            at_point = self.pressed or rng.random() < 0.5
            point = self._to_point(rng, client, life) if at_point else None
            self._perform(rng, client, life, rng.randrange(8), held=point is not None)
            client.run_for(rng.choice([0.0, rng.uniform(0.0, 0.003)]))
        except BaseException:
            self.log.extend(client.log)
            raise
        moment = "in the midst of a barrier" if client.commanding else "in the midst of the primary's writes"
        self.outcome.requests += life.requests
        self.kill_client(server, client, moment, point)
        killed = client.tick + 2
        self.phase = f"the comparison after kill {self.outcome.kills}"
        if life.synced:
            # In sync the answer came after both sides had it; in async a barrier says so.
            begun = killed if self.sync else life.barrier
            self._compare(life, self.secondary.disks, begun, killed, "secondary disk after the kill")
        self._start_again(server, self.rng_of("start"), life, killed)
        self._compare(life, server.disks, killed, killed, "local disk after the restart")
        # What the killed primary had asked for is over when the next one is paired.
        wait_until(lambda: server.status()["link"]["state"] in ("synchronizing", "in-sync"), "the pair is one again")
        self._look_at_guests(life, killed)
        found = [raw_of(path) for path in server.disks]
        if rng.random() < 0.3:
            return found, False
        self._settle(server)
        if [raw_of(path) for path in server.disks] != found:
            raise Wrong("a resync has changed the local disks")
        return found, True

    def _start_again(self, server: VictimPrimary, rng: random.Random, life: Life, killed: int) -> None:
        """Start the killed primary; now and then either side is killed while they find each other again."""
        while self.unfinished and rng.random() < self._chance_in_return():
            point = self.least_hit(rng, sorted(RETURNS))
            if rng.random() < 0.2:
                self._killed_early(server, rng)
            else:
                victim = self._killed_in_return(server, point, rng)
                if victim is self.secondary:
                    self._look_at_guests(life, killed)
                if victim is not server:
                    return  # it serves already
        server.start()

    def _chance_in_return(self) -> float:
        """How probably the two are disturbed while they find each other."""
        if not any(name in RETURNS for name in self.owing):
            return 0.3
        return 1.0 if self.pressed else 0.6

    def _killed_in_return(self, server: VictimPrimary, point: str, rng: random.Random) -> Server | None:
        """Hold a thread at a point while the two find each other again, and kill one of them: which one, None if the
        point was not reached. A killed secondary is started again."""
        points = self.points if RETURNS[point] == "primary" else self.peer_points
        points.arm(point)
        server.start()
        deadline = time.monotonic() + HIT_S
        while not points.is_hit(point):
            if time.monotonic() > deadline:
                points.disarm(point)
                return None
            time.sleep(_RETRY_S / 10)
        victim: Server = server if rng.random() < 0.5 else self.secondary
        victim.kill()
        points.disarm(point)
        self.count_kill(f"of the {'primary' if victim is server else 'secondary'} while they find each other", point)
        self.check_said(victim)
        if victim is self.secondary:
            self.secondary.start()
            stage = self.secondary.status()["stage"]
            if stage != "running":
                raise Wrong(f"a secondary killed at {point} is in stage {stage}")
        return victim

    def _compare(self, life: Life, paths: list, begun: int, killed: int, what: str) -> None:
        for index in DISKS:
            wrong = self.differences(
                life.contents[index], raw_of(paths[index]), 0, begun, killed, f"{what}, disk{index}"
            )
            if wrong:
                raise Wrong(wrong)

    def _seen_by_guests(self) -> list[bytes]:
        return [bytes(self.secondary.connect(top_id(index)).pread(SIZES[index], 0)) for index in DISKS]

    def _look_at_guests(self, life: Life, killed: int) -> None:
        """The secondary's guest faces hold the last checkpoint; one that was under way was taken of both or of none."""
        seen = self._seen_by_guests()
        wrong = self._guests_wrong(life, seen, killed)
        if wrong and life.copies:
            for guest, copy in zip(life.guests, life.copies, strict=True):
                guest.changes.remove(copy)
            self.outcome.endings["checkpoint of the pair: has not happened"] += 1
            otherwise = self._guests_wrong(life, seen, killed)
            if otherwise:
                raise Wrong(f"{wrong}\nor, if the checkpoint has not happened: {otherwise}")
        elif wrong:
            raise Wrong(wrong)
        elif life.copies:
            self.outcome.endings["checkpoint of the pair: may have happened"] += 1
        self.guests = seen
        life.guests, life.copies = [Content(as_array(content)) for content in seen], []

    def _guests_wrong(self, life: Life, seen: list[bytes], killed: int) -> str | None:
        """Why the guest faces cannot be what they are, if the checkpoint under way has happened."""
        for copy in life.copies:
            copy.ended = killed - 1
        for index in DISKS:
            wrong = self.differences(
                life.guests[index], seen[index], 0, killed, killed, f"the secondary's guest face top{index}"
            )
            if wrong:
                return wrong
        return None

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
        self.guests = self._seen_by_guests()
        for index in DISKS:
            self.same(self.guests[index], raw_of(server.disks[index]), f"guest face top{index} after the checkpoint")

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
        if Cause.BARRIER in point.causes:
            client.until(lambda: not client.commanding, "the checkpoint before is answered")
            self.points.arm(point.name)
            life.asking(client.ask(BARRIER, life.answered))
            if client.reaches(lambda: self.points.is_hit(point.name), HIT_S):
                return point.name
            self.points.disarm(point.name)
            return None
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
