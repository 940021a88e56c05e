# SPDX-License-Identifier: BSD-3-Clause
"""Histories of a secondary that is killed again and again.

One life: connect to both faces of both disks, send requests and commands with several in flight, kill, start again
(sometimes killed at that, too), compare. The comparison then becomes the next life's beginning. A command that was
under way when the process was killed gives two hypotheses, "it has not happened" and "it has", each with its stage,
its epoch and its contents; one of them must explain everything that is seen, on all disks together.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import nbd

from content import qemu_img
from lab import Lab
from nodes import disk_name, top_id
from torture import traffic
from torture.client import Asked, Client, Command, Kind, Request, Sent, Wrong
from torture.history import HIT_S, SIZES, WINDOW, History, VictimSecondary, as_array, raw_of
from torture.oracle import NEVER, Content, Copy, Write
from torture.points import RECOVERY_POINTS, SECONDARY_POINTS, Cause, Point

START = Command("xen-set-replication", {"enable": True, "primary": False})
CHECKPOINT = Command("xen-colo-do-checkpoint")
STOP = Command("xen-set-replication", {"enable": False, "primary": False})
FAILOVER = Command("xen-set-replication", {"enable": False, "primary": False, "failover": True})
RETRY = Command("replication-retry")
CANCEL = tuple(Command("job-cancel", {"id": f"commit-{disk_name(index)}"}) for index in range(len(SIZES)))

NOT_RUNNING = frozenset({"failover", "failover-failed", "done"})
"""After a stop of either kind: the target face is closed."""

TARGETS = tuple((disk_name(index), size) for index, size in enumerate(SIZES))
GUESTS = tuple((top_id(index), size) for index, size in enumerate(SIZES))
DISKS = range(len(SIZES))

OWED = 4
"""Points at which one history has to kill: those of four histories in a row are all that there are."""


@dataclass
class Snapshot:
    """What a process has shown that nothing is in flight in."""

    stage: str
    epoch: int
    targets: list[bytes]
    """The secondary disks; of use in `none` and `running`."""
    guests: list[bytes]
    """The guest faces; of use in all other stages than `none`."""
    error: bool = False


@dataclass
class Hypothesis:
    """What may be found after the kill."""

    name: str
    stages: frozenset[str]
    epochs: frozenset[int]
    copies: list[Copy] = field(default_factory=list)
    """One a disk, if a command under way has made the guest face equal to the disk."""


class Life:
    """What is known of one process from its start to its kill."""

    def __init__(self, base: Snapshot) -> None:
        self.base = base
        self.stages = frozenset({base.stage, "done"} if base.stage == "failover" else {base.stage})
        """In which stage the process may be, the command under way apart; a commit ends on its own."""
        self.epoch = base.epoch
        self.targets = [Content(as_array(content)) for content in base.targets]
        self.guests = [Content(as_array(content)) for content in base.guests]
        self.asked: Asked | None = None
        # Ticks of the command that opens the guest face (start) and of the one that closes the target face (stop).
        closed = base.stage in NOT_RUNNING
        self.closing, self.closed = (-1, -1) if closed else (NEVER, NEVER)
        opened = base.stage != "none"
        self.opening, self.opened = (-1, -1) if opened else (NEVER, NEVER)
        self.copies: list[Copy] = []
        self.proven = False
        """An answer could only be given after the command under way has taken effect."""
        self.requests = 0

    # -- requests ------------------------------------------------------------------------------------------

    def content_of(self, export: str) -> Content:
        """The content of the face that is served as `export`."""
        index = int(export[-1])
        return self.guests[index] if export == top_id(index) else self.targets[index]

    def began(self, sent: Sent) -> None:
        """A request is about to be sent."""
        self.requests += 1
        request = sent.request
        if request.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM):
            data = as_array(request.data if request.kind is Kind.WRITE else bytes(request.length))
            sent.change = Write(request.offset, data, sent.begun)
            self.content_of(request.export).changes.append(sent.change)

    def ended(self, sent: Sent) -> None:
        """A request was answered."""
        request = sent.request
        change = sent.change
        self._check_answer(sent)
        if sent.error:
            if change is not None:
                self.content_of(request.export).changes.remove(change)
            return
        if change is not None:
            change.ended = sent.ended
        if request.kind is Kind.READ:
            content = self.content_of(request.export)
            wrong = History.differences(
                content, sent.content, request.offset, sent.begun, sent.ended, f"answer to {request}"
            )
            if wrong:
                raise Wrong(wrong)

    def _check_answer(self, sent: Sent) -> None:
        """Whether the request may have been refused, or served."""
        if sent.request.export.startswith("disk"):
            refusal, may_refuse, may_serve = errno.ESHUTDOWN, self.closing < sent.ended, sent.begun < self.closed
            if sent.error and self.closed == NEVER:
                self.proven = True  # a refusal shows that the stop under way has taken effect
        else:
            refusal, may_refuse, may_serve = errno.EIO, sent.begun < self.opened, self.opening < sent.ended
            if not sent.error and self.opened == NEVER:
                self.proven = True
        if sent.error not in (0, refusal):
            raise Wrong(f"{sent.request} failed with {errno.errorcode.get(sent.error, sent.error)}")
        if sent.error and not may_refuse:
            raise Wrong(f"{sent.request} was refused in stage {sorted(self.stages)}")
        if not sent.error and not may_serve:
            raise Wrong(f"{sent.request} was served in stage {sorted(self.stages)}")

    # -- commands ------------------------------------------------------------------------------------------

    def asking(self, asked: Asked) -> None:
        """A command has been sent."""
        self.asked, self.proven = asked, False
        command = asked.command
        running, none = self.stages == {"running"}, self.stages == {"none"}
        if (command == START and none) or (command in (CHECKPOINT, STOP) and running):
            self.copies = [Copy(target, asked.begun) for target in self.targets]
            for guest, copy in zip(self.guests, self.copies, strict=True):
                guest.changes.append(copy)
        if command == START and none:
            self.opening = asked.begun
        if command in (STOP, FAILOVER) and running:
            self.closing = asked.begun

    def answered(self, asked: Asked) -> None:
        """The command was answered."""
        self._check_command(asked)
        command = asked.command
        for copy in self.copies:
            copy.ended = asked.ended
        if self.copies:
            self.epoch += 1
        self.copies, self.asked, self.proven = [], None, False
        if command == START and self.stages == {"none"}:
            self.stages, self.opened = frozenset({"running"}), asked.ended
        elif command in (STOP, FAILOVER) and self.stages == {"running"}:
            self.stages = frozenset({"done"}) if command == STOP else frozenset({"failover", "done"})
            self.closed = asked.ended
        else:
            self.stages |= self._after(command)

    def _after(self, command: Command) -> frozenset[str]:
        """Stages to which a command of the commit may lead."""
        if command in CANCEL and "failover" in self.stages:
            return frozenset({"failover-failed"})
        if command == RETRY and "failover-failed" in self.stages:
            return frozenset({"failover", "done"})
        return frozenset()

    def _check_command(self, asked: Asked) -> None:
        """Whether it may have succeeded, or failed."""
        command, stages = asked.command, self.stages
        if command in CANCEL or (command == RETRY and len(stages) > 1):
            return
        if command == RETRY:
            refused_in: frozenset[str] = frozenset({"none", "running", "failover", "done"})
        elif command == START:
            refused_in = frozenset({"running", "failover-failed"})
        else:
            refused_in = frozenset({"none", "failover-failed"})
        if asked.error is not None and not stages & refused_in:
            raise Wrong(f"{command} failed in stage {sorted(stages)}: {asked.error}")
        if asked.error is None and stages <= refused_in:
            raise Wrong(f"{command} succeeded in stage {sorted(stages)}")

    # -- after the kill ------------------------------------------------------------------------------------

    def hypotheses(self, killed: int) -> Iterator[Hypothesis]:
        """What may be found after a kill at tick `killed`, at least two after the last event; the copies under way have
        been taken out of the contents."""
        here = frozenset({self.epoch})
        asked = self.asked
        if asked is None:
            yield Hypothesis("no command was under way", self.stages, here)
            return
        command, effect = asked.command, bool(self.copies)
        for copy in self.copies:
            copy.ended = killed - 1  # if it has happened, then before anybody looks
        if command in (STOP, FAILOVER) and self.stages == {"running"}:
            if not self.proven:
                yield Hypothesis(f"{command} has not happened", self.stages, here)
            after = frozenset({"done"}) if command == STOP else frozenset({"failover", "done"})
            # The overlays of a planned stop may not have been emptied: in done nobody looks at them any more.
            epochs = here | {self.epoch + 1} if command == STOP else here
            yield Hypothesis(f"{command} has happened", after, epochs, self.copies)
        elif command == START and effect:
            if not self.proven:
                # The overlays are emptied before the stage is saved; doing so in none is of no consequence.
                yield Hypothesis(f"{command} has not happened", self.stages, here | {self.epoch + 1})
            after = frozenset({"running"})
            yield Hypothesis(f"{command} has happened", after, frozenset({self.epoch + 1}), self.copies)
        elif effect:
            yield Hypothesis(f"{command} has not happened", self.stages, here)
            yield Hypothesis(f"{command} has happened", self.stages, frozenset({self.epoch + 1}), self.copies)
        else:
            yield Hypothesis(f"{command}", self.stages | self._after(command), here)

    def contradiction(self, hypothesis: Hypothesis, killed: int, found: Snapshot) -> str | None:
        """Why a hypothesis does not explain what was found, None if it does."""
        if found.stage not in hypothesis.stages:
            return f"the stage is {found.stage}, not {' or '.join(sorted(hypothesis.stages))}"
        if found.epoch not in hypothesis.epochs:
            return f"the epoch is {found.epoch}, not {' or '.join(map(str, sorted(hypothesis.epochs)))}"
        for index in DISKS:
            if found.stage in ("none", "running"):
                wrong = History.differences(
                    self.targets[index], found.targets[index], 0, killed, killed, f"target face {disk_name(index)}"
                )
                if wrong:
                    return wrong
            if found.stage == "none":
                continue
            guest = self.guests[index]
            guest.changes += hypothesis.copies[index : index + 1]
            wrong = History.differences(guest, found.guests[index], 0, killed, killed, f"guest face {top_id(index)}")
            if hypothesis.copies:
                guest.changes.pop()
            if wrong:
                return wrong
        return None

    def explain(self, killed: int, found: Snapshot) -> str:
        """The name of the hypothesis that explains what was found; raises Wrong if none does."""
        for guest in self.guests:
            guest.changes = [change for change in guest.changes if change not in self.copies]
        failed = []
        for hypothesis in self.hypotheses(killed):
            contradiction = self.contradiction(hypothesis, killed, found)
            if contradiction is None:
                return hypothesis.name
            failed.append(f"  if {hypothesis.name}: {contradiction}")
        raise Wrong(f"nothing explains what was found in stage {found.stage} after the restart:\n" + "\n".join(failed))


class SecondaryHistory(History):
    """Pairs of disks one after the other; each is used until its stage is `done`, and a little longer."""

    kind = "secondary"

    def __init__(self, seed: str, number: int, kills: int) -> None:
        super().__init__(seed, number, kills)
        turn = [SECONDARY_POINTS[(OWED * number + each) % len(SECONDARY_POINTS)] for each in range(OWED)]
        self.owed = tuple(point.name for point in turn)

    def play(self, lab: Lab) -> None:
        pair = 0
        while self.unfinished:
            pair += 1
            rng = self.rng_of("disks")
            contents = [traffic.disk_content(rng, size) for size in SIZES]
            server = lab.add(
                VictimSecondary(
                    lab.folder,
                    SIZES,
                    name=f"s{pair}",
                    contents=contents,
                    extra_environment=self.points.environment,
                )
            )
            server.start()
            base = Snapshot("none", 0, contents, contents)
            self.log.append(f"--- disks number {pair}")
            lives_done = 0
            while self.unfinished and lives_done <= 1 and not self._hopeless(base.stage):
                base = self.live(server, base)
                lives_done += base.stage == "done"
            self.finish(server, base)
            server.kill()

    def _hopeless(self, stage: str) -> bool:
        """Whether these disks lead to nothing that is owed, and the time has come for it."""
        if not self.pressed or stage == "none":
            return False
        return stage != "running" or all(point.causes == (Cause.START,) for point in self._owed_points())

    # -- one life ------------------------------------------------------------------------------------------

    def live(self, server: VictimSecondary, base: Snapshot) -> Snapshot:
        """Use the process, kill it, start it again and compare."""
        rng = self.rng_of("life")
        self.phase = f"life after kill {self.outcome.kills} in stage {base.stage}"
        life = Life(base)
        client = Client(server, [name for name, _ in (*TARGETS, *GUESTS)], WINDOW)
        before = self._steps(rng, base.stage, rng.randrange(50), commands=not self.pressed)
        wants_running = not any(Cause.START in point.causes for point in self._owed_points())
        if self.pressed and base.stage == "none" and wants_running:
            before.append(START)
        at_point = self.pressed or rng.random() < 0.62
        try:
            self._perform(client, life, before)
            if at_point:
                moment, point = self._to_point(rng, client, life)
            else:
                moment, point = self._anywhere(rng, client, life)
        except BaseException:
            self.log.extend(client.log)
            raise
        self.outcome.requests += life.requests
        self.kill_client(server, client, moment, point)
        killed = client.tick + 2
        self.phase = f"the start after kill {self.outcome.kills}"
        self.start_after_kill(server, self.rng_of("start"), RECOVERY_POINTS)
        self.phase = f"the comparison after kill {self.outcome.kills}"
        found = self.look(server)
        name = life.explain(killed, found)
        if life.asked is not None:
            self.outcome.endings[name] += 1
        self.log.append(f"    stage {found.stage}, epoch {found.epoch}: {name}")
        return found

    def _owed_points(self) -> list[Point]:
        """`owing`, with what leads there."""
        return [point for point in SECONDARY_POINTS if point.name in self.owing]

    def _steps(self, rng: random.Random, stage: str, count: int, commands: bool) -> list[Request | Command | float]:
        """Requests and commands, and pauses (seconds) in which answers are read; negative: until all are there."""
        steps: list[Request | Command | float] = []
        for _ in range(count):
            chance = rng.random()
            if commands and chance < 0.06:
                steps.append(self._command(rng, stage))
            elif chance < 0.25:
                steps.append(0.0)
            elif chance < 0.30:
                steps.append(-1.0)
            else:
                steps.append(traffic.request(rng, (*TARGETS, *GUESTS)))
        if commands and stage == "none" and rng.random() < 0.75:
            steps.insert(rng.randint(0, len(steps)), START)
        return steps

    @staticmethod
    def _command(rng: random.Random, stage: str) -> Command:
        if stage == "none":
            return rng.choice([CHECKPOINT, STOP, FAILOVER])  # refused
        if stage == "running":
            return rng.choices([CHECKPOINT, START, STOP, FAILOVER], [80, 8, 3, 9])[0]
        return rng.choice([CHECKPOINT, START, STOP, FAILOVER, RETRY, *CANCEL])

    def _perform(self, client: Client, life: Life, steps: list[Request | Command | float], held: bool = False) -> None:
        """Do the steps. With a thread `held` nothing may be waited for: what finds no room is left out."""
        for step in steps:
            if isinstance(step, float):
                if step >= 0 or held:
                    client.pump(0.0)
                else:
                    client.until(lambda: client.idle, "everything in flight is answered")
            elif isinstance(step, Request):
                if not held:
                    client.until(lambda step=step: client.has_room(step.export), f"room for {step}")
                if client.has_room(step.export):
                    client.send(step, life.began, life.ended)
            elif not (held and client.commanding):
                self.ask(client, life, step)

    def ask(self, client: Client, life: Life, command: Command) -> None:
        """Send a command after the one before has been answered."""
        client.until(lambda: not client.commanding, "the command before is answered")
        life.asking(client.ask(command, life.answered))

    def _anywhere(self, rng: random.Random, client: Client, life: Life) -> tuple[str, None]:
        """Requests, perhaps a command, then any moment."""
        steps = self._steps(rng, life.base.stage, rng.randrange(12), commands=False)
        if rng.random() < 0.6:
            steps.insert(rng.randint(0, len(steps)), self._command(rng, life.base.stage))
        self._perform(client, life, steps)
        client.run_for(rng.choice([0.0, 0.0, rng.uniform(0.0, 0.001), rng.uniform(0.0, 0.004)]))
        return ("in the midst of a command" if client.commanding else "in the midst of requests"), None

    # -- pause points --------------------------------------------------------------------------------------

    def _to_point(self, rng: random.Random, client: Client, life: Life) -> tuple[str, str | None]:
        """Do what leads to a point, go on a little while a thread is held there."""
        client.until(lambda: not client.commanding, "the command before is answered")
        choice = {point.name: point for point in SECONDARY_POINTS if self._causes(point, life)}
        if not choice:
            return self._anywhere(rng, client, life)
        point = choice[self.least_hit(rng, sorted(choice))]
        causes = self._causes(point, life)
        # A stop ends these disks' use, and there are points that only they have.
        cause = rng.choices(causes, [1 if cause is Cause.STOP else 3 for cause in causes])[0]
        # Not to miss what is owed because a later hit did not come.
        hits = 1 if point.name in self.owing else rng.randint(1, point.hits)
        between = self._steps(rng, life.base.stage, rng.randrange(6), commands=True)
        self._make_way(rng, client, life, point)
        for hit in range(hits):
            self.points.arm(point.name)
            if hit:
                self.points.release(point.name)
            if not self._reach(rng, client, life, point, cause, fresh=not hit):
                self.points.disarm(point.name)
                return "where the point was not reached", None
        self._perform(client, life, between, held=True)
        client.run_for(rng.choice([0.0, 0.002]))
        return f"at a point of {cause.value}", point.name

    def _causes(self, point: Point, life: Life) -> list[Cause]:
        """What leads to a point in the stage that there is now."""
        if life.stages == {"none"}:
            return [cause for cause in point.causes if cause is Cause.START]
        if life.stages == {"running"}:
            return [cause for cause in point.causes if cause is not Cause.START]
        if life.stages == {"failover-failed"}:
            return [cause for cause in point.causes if point.name.startswith("commit.")]
        return []

    def _make_way(self, rng: random.Random, client: Client, life: Life, point: Point) -> None:
        """What has to be there, so that the point can be reached."""
        if point.name.startswith("commit."):
            # Several runs on both disks, so that there is something to commit, and to cancel.
            for export, size in (*GUESTS, *TARGETS):
                for offset in (0, 256 << 10, size - 700):
                    length = rng.randint(1, 600)
                    place = Request(Kind.WRITE, export, offset, length, rng.randbytes(length))
                    self._perform(client, life, [place])
            client.until(lambda: client.idle, "the writes are answered")
        elif Cause.TARGET_WRITE in point.causes or Cause.GUEST_READ in point.causes:
            # What hidden holds already is not copied again, nor read from the disk.
            self.ask(client, life, CHECKPOINT)
            client.until(lambda: client.idle, "the checkpoint is answered")

    def _reach(
        self, rng: random.Random, client: Client, life: Life, point: Point, cause: Cause, *, fresh: bool
    ) -> bool:
        """Ask for `cause` until a thread is held; False if none comes within HIT_S."""

        def hit() -> bool:
            return self.points.is_hit(point.name)

        if cause in (Cause.START, Cause.CHECKPOINT, Cause.STOP, Cause.FAILOVER):
            if fresh:
                commands = {Cause.START: START, Cause.CHECKPOINT: CHECKPOINT, Cause.STOP: STOP}
                command = commands.get(cause, FAILOVER)
                if life.stages == {"failover-failed"}:
                    command = RETRY
                self.ask(client, life, command)
            return client.reaches(hit, HIT_S)
        exports = TARGETS if cause is Cause.TARGET_WRITE else GUESTS
        kinds = (Kind.READ,) if cause is Cause.GUEST_READ else (Kind.WRITE, Kind.ZERO, Kind.TRIM)
        # With a thread held after an earlier hit, or a request behind it, there may be no room: then there is no more.
        for step in self._aimed(rng, exports, kinds):
            if client.has_room(step.export):
                client.send(step, life.began, life.ended)
            if client.reaches(hit, 0.004):
                return True
        return client.reaches(hit, HIT_S / 4)

    @staticmethod
    def _aimed(rng: random.Random, exports: tuple[tuple[str, int], ...], kinds: tuple[Kind, ...]) -> list[Request]:
        return [traffic.request(rng, exports, kinds) for _ in range(40)]

    # -- looking -------------------------------------------------------------------------------------------

    def look(self, server: VictimSecondary) -> Snapshot:
        """What a process shows that nobody uses."""
        client = Client(server, [name for name, _ in (*TARGETS, *GUESTS)], WINDOW)
        try:
            status = client.query("query-replication")
            found = Snapshot(status["stage"], status["epoch"], [], [], status["error"] is not None)
            for (target, _), (guest, size) in zip(TARGETS, GUESTS, strict=True):
                found.targets.append(self._read(client, target, size, found.stage in NOT_RUNNING, errno.ESHUTDOWN))
                found.guests.append(self._read(client, guest, size, found.stage == "none", errno.EIO))
        finally:
            client.close()
        for index in DISKS:
            raw = raw_of(server.disks[index])
            if found.stage in ("none", "running"):
                self.same(found.targets[index], raw, f"target face disk{index} and the raw disk")
            elif found.stage == "done":
                self.same(found.guests[index], raw, f"guest face top{index} and the raw disk in done")
        if found.error and found.stage in ("none", "running"):
            raise Wrong(f"a restart has latched a fault: {status['error']}")
        return found

    @staticmethod
    def _read(client: Client, export: str, size: int, refused: bool, number: int) -> bytes:
        """A whole face. One that must be refused with `number` counts as zeros, which nobody looks at."""
        try:
            content = client.read(export, size)
        except nbd.Error as error:
            if not refused or error.errnum != number:
                raise Wrong(f"reading {export} failed: {error}") from error
            return bytes(size)
        if refused:
            raise Wrong(f"{export} was served although it must be refused")
        return content

    def finish(self, server: VictimSecondary, base: Snapshot) -> None:
        """The end of a pair of disks: a commit must come to its end, and the overlays be sound images."""
        self.phase = f"the end of the disks in stage {base.stage}"
        if base.stage in ("failover", "failover-failed"):
            status = server.wait_stage("done", "failover-failed")
            if status["stage"] == "failover-failed":
                server.execute("replication-retry")
                server.wait_stage("done")
            found = self.look(server)
            for index in DISKS:
                self.same(found.guests[index], base.guests[index], f"guest face top{index} after the commit")
        server.kill()
        for kind in ("active", "hidden"):
            qemu_img("check", "-q", "-f", "qcow2", str(server.overlay(kind, DISKS[-1])))
