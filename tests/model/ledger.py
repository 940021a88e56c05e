# SPDX-License-Identifier: BSD-3-Clause
"""What a pair claims of its disks, held against the truth: random histories of three nodes, of which two are a pair, on
disks that lose what was not flushed.

The truth is kept per grain of the guest's disk: the values that it may have. A write gives a grain one value once it is
answered; a flush makes what was answered stable; a server below that is killed gives it back any of the values since
the last flush. The claims are

    in sync         of a checkpoint that the primary takes while the link is in sync: every byte of both nodes is equal
    flushed         a flush that was answered without an error has lost nothing
    consistent      a failover that is not refused leaves one of the checkpoints that may have been the last
    in the end      with everything up again, the pair is in sync by itself, and says no error
    lost            of a checkpoint that is lost after it was taken, both nodes say so, and the next one is whole
    nothing differs of a comparison of the disks, in sync, while the guest writes
    nobody's loss   who has taken writes of its own is overwritten only after a discard

A step: write, flush, checkpoint; a flush that fails on either disk, and loses half of what it was for; kill of a node,
of both, of the server below either (its cache goes with it); a server below that hangs; cut (the secondary stands still
for longer than the primary waits); a state folder that is full; stop and start; the primary's change map removed while
it is down; a planned switch-over; a failover. After those two the old primary comes back as the secondary, or the third
node takes its place and the old one later that of another: each with or without writes of its own in between, and
perhaps as a primary that still looks for its secondary.

    make ledger [SEED=TEXT] [HISTORIES=COUNT] [HISTORY=NUMBER]

A history is replayed by its seed and number. What a replay cannot repeat is how processes are scheduled.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbd

from content import KIB, make_raw
from fullstate import FullState
from lab import Lab
from losingendpoint import LosingEndpoint
from nodes import Server
from qmp import QmpError
from waiting import Stuck, wait_until

GRAIN = 64 * KIB
GRAINS = 12
SIZE = GRAIN * GRAINS
STEPS = 14
SETTLE_S = 90.0
TIMEOUT_S = 1
_LINES = 40

Values = set[int]


class _Over(Exception):
    """There is no valid checkpoint to fail over to, and the node says so: a person has to decide."""


class _Lost(Exception):
    """The secondary has no checkpoint any more, and says so."""


class Wrong(AssertionError):
    """A claim that is not so."""


class _Roomy(Server):
    """A node whose state folder can be full."""

    def __init__(self, folder: Path, name: str, arguments: list[str], room: FullState) -> None:
        super().__init__(folder, name, arguments)
        self._room = room

    def command(self) -> list[str]:
        return self._room.instead(super().command())


class Host:
    """A node, the server below its disk, and its state folder."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.name = name
        self._lab = lab
        self.state = lab.folder / f"{name}.state"
        raw = make_raw(lab.folder / f"{name}.raw", SIZE)
        self.below = lab.start(LosingEndpoint(lab.folder, raw, f"{name}-below"))
        self.room = FullState(lab.folder, name)
        self.own: list[int] | None = None
        """What the disk has, if the last of it is its guest's own and nobody has given that up."""
        self._node: Server | None = None
        self._count = 0

    def begin(self, mode: str, secondary: str = "") -> None:
        """A process of that mode, instead of the former one."""
        self._count += 1
        # Writes to an old primary are among what may happen.
        arguments = [f"mode={mode}", f"state={self.state}", f"disk=disk0:{self.below.uri()}", "on-outdated=continue"]
        arguments += ["top-id=top0"] if mode == "secondary" else [f"secondary={secondary}", f"timeout={TIMEOUT_S}"]
        self.export = "top0" if mode == "secondary" else "disk0"
        self._node = self._lab.start(_Roomy(self._lab.folder, f"{self.name}{self._count}", arguments, self.room))

    @property
    def node(self) -> Server:
        """Its process."""
        assert self._node is not None
        return self._node

    def as_secondary(self) -> None:
        """It becomes one, whatever it was."""
        if self._node is None:
            self.begin("secondary")
            return
        self.up()
        if self.export != "top0":
            self.node.terminate()
            self.begin("secondary")
            return
        status = self.node.status()
        if status["mode"] == "primary" and status["stage"] == "running":
            self.node.execute("replication-stop")
        elif status["stage"] == "failover-failed":
            raise _Over
        if self.node.status()["stage"] == "done":
            self.node.execute("replication-demote")

    def up(self) -> None:
        """Everything runs."""
        for process in (self.below, self.node):
            if not process.running:
                process.start()

    @property
    def begun(self) -> bool:
        """Whether it has ever run."""
        return self._node is not None

    @property
    def said(self) -> str:
        """The end of the log of its last process, for a history that went wrong."""
        return "".join(self.node.stderr().splitlines(keepends=True)[-_LINES:])

    def content(self, export: str) -> list[int]:
        """The value of each grain; Wrong when a grain is torn, _Lost when it is no longer known what they were."""
        handle = self.node.connect(export)
        with contextlib.closing(_Closing(handle)):
            data = wait_until(lambda: self._read(handle), f"{self.name}: {export} can be read", SETTLE_S)
        values = []
        for at in range(0, SIZE, GRAIN):
            grain = data[at : at + GRAIN]
            if grain != grain[:8] * (GRAIN // 8):
                raise Wrong(f"{self.name}: the grain at {at} is torn")
            values.append(int.from_bytes(grain[:8]))
        return values

    def _read(self, handle: nbd.NBD) -> bytes | None:
        """All, None if that fails: the first request after the loss of the server below does."""
        try:
            return bytes(handle.pread(SIZE, 0))
        except nbd.Error:
            if self.node.status()["consistent"] is False:
                raise _Lost from None
            return None


class _Closing:
    def __init__(self, handle: nbd.NBD) -> None:
        self._handle = handle

    def close(self) -> None:
        with contextlib.suppress(nbd.Error):
            self._handle.shutdown()


class History:
    """One history."""

    def __init__(self, lab: Lab, seed: str, number: int) -> None:
        self._random = random.Random(f"{seed}/{number}")
        self.told: list[str] = []
        self._refusal = ""
        self._serial = 0
        # Something below the secondary has lost what it held; it may notice that after a checkpoint that it then loses.
        self._shaken = False
        self.first, self.second, self.spare = (Host(lab, name) for name in "abc")
        self.second.begin("secondary")
        self.first.begin("primary", self.second.node.uri())
        # Of the primary's disk: what each grain may hold now, and what it may have held since the last flush.
        self._may: list[Values] = [{0} for _ in range(GRAINS)]
        self._since: list[Values] = [{0} for _ in range(GRAINS)]
        # What the last checkpoint may be: contents of the whole disk, by grain.
        self._checkpoints: list[list[Values]] = []
        self.second.node.execute("xen-set-replication", enable=True, primary=False)
        self.first.node.execute("xen-set-replication", enable=True, primary=True)

    # -- the run -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps; Wrong or Stuck."""
        self._settle()
        steps: list[tuple[Callable[[], None], int]] = [
            (self._write, 8),
            (self._flush, 3),
            (self._checkpoint, 3),
            (self._kill_first, 1),
            (self._kill_second, 2),
            (self._kill_both, 1),
            (self._kill_below_first, 1),
            (self._kill_below_second, 2),
            (self._fail_flush_of_first, 1),
            (self._fail_flush_of_second, 1),
            (self._hang_below_first, 1),
            (self._hang_below_second, 1),
            (self._fill_first, 1),
            (self._fill_second, 1),
            (self._cut, 1),
            (self._stop, 1),
            (self._remove_map, 1),
            (self._settle, 2),
            (self._verify, 1),
            (self._fail_over, 1),
            (self._switch_over, 1),
        ]
        for _ in range(STEPS):
            (step,) = self._random.choices([step for step, _ in steps], [weight for _, weight in steps])
            self._tell(step.__name__.strip("_"))
            try:
                step()
            except _Over:
                return
        self._settle()

    def _tell(self, text: str) -> None:
        self.told.append(text)

    # -- what the guest does -------------------------------------------------------------------------------

    def _guest(self, action: Callable[[nbd.NBD], object]) -> bool:
        """Whether it was answered without an error."""
        try:
            handle = self.first.node.connect(self.first.export)
        except (nbd.Error, AssertionError):
            return False
        try:
            action(handle)
        except nbd.Error:
            return False
        finally:
            _Closing(handle).close()
        return True

    def _write(self) -> None:
        for _ in range(self._random.randint(1, 4)):
            self._serial += 1
            grain, value = self._random.randrange(GRAINS), self._serial
            self._since[grain].add(value)
            data = value.to_bytes(8) * (GRAIN // 8)
            if self._guest(lambda handle, data=data, grain=grain: handle.pwrite(data, grain * GRAIN)):  # type: ignore[misc]
                self._may[grain] = {value}
            else:
                self._may[grain] = set(self._since[grain])

    def _flush(self) -> None:
        if self._guest(lambda handle: handle.flush()):
            # A failed one says that anything since the last may be lost, and a later one does not take that back.
            self._since = [set(values) for values in self._may]
        else:
            self._doubt()

    def _doubt(self) -> None:
        """What was not flushed may be gone."""
        self._may = [set(values) for values in self._since]

    def _see(self) -> list[int]:
        """What the primary's disk holds, which must be what it may hold."""
        values = self.first.content(self.first.export)
        for grain, value in enumerate(values):
            if value not in self._may[grain]:
                raise Wrong(f"grain {grain} of {self.first.name} is {value}, and may be {sorted(self._may[grain])}")
            self._may[grain] = {value}
        return values

    # -- what happens to the nodes -------------------------------------------------------------------------

    def _kill_first(self) -> None:
        self.first.node.kill()
        self.first.up()

    def _kill_second(self) -> None:
        self.second.node.kill()
        if self._random.random() < 0.5:
            self._write()
        self.second.up()

    def _kill_both(self) -> None:
        """A node and the server below it, together: nobody was looking when the cache went."""
        host = self._random.choice([self.first, self.second])
        host.node.kill()
        host.below.kill()
        if host is self.first:
            self._doubt()
        else:
            self._shaken = True
        host.up()

    def _kill_below_first(self) -> None:
        self.first.below.kill()
        self._doubt()
        self.first.up()
        self._flush()  # this one has to fail, if anything was not flushed

    def _kill_below_second(self) -> None:
        self.second.below.kill()
        self._shaken = True
        if self._random.random() < 0.5:
            self._write()
        self.second.up()

    def _cut(self) -> None:
        os.kill(self.second.node.pid, signal.SIGSTOP)
        try:
            self._write()
            time.sleep(2 * TIMEOUT_S)
        finally:
            os.kill(self.second.node.pid, signal.SIGCONT)

    def _fail_flush_of_first(self) -> None:
        """The guest's: it must be told, whether something was lost or not."""
        self.first.below.fail_flush()
        answered = self._guest(lambda handle: handle.flush())
        if self.first.below.work() and answered:
            raise Wrong(f"a flush of {self.first.name} has failed, and the guest was told that it had not")
        self._doubt()

    def _fail_flush_of_second(self) -> None:
        """Of whoever flushes next: a checkpoint's, soon after it."""
        self.second.below.fail_flush()
        self._shaken = True
        self._write()
        self._checkpoint(compare=False)
        deadline = time.monotonic() + 2 * TIMEOUT_S
        while time.monotonic() < deadline and not self.second.below.work():
            self.second.below.fail_flush()
            time.sleep(0.05)
        self.second.below.work()

    def _hang_below_first(self) -> None:
        self._hang(self.first)

    def _hang_below_second(self) -> None:
        self._hang(self.second)

    def _hang(self, host: Host) -> None:
        """The server below stands still for longer than the primary waits for its secondary."""
        os.kill(host.below.pid, signal.SIGSTOP)
        go_on = threading.Timer(1.5 * TIMEOUT_S, os.kill, (host.below.pid, signal.SIGCONT))
        go_on.start()
        self._write()
        go_on.join()

    def _fill_first(self) -> None:
        self._fill(self.first)

    def _fill_second(self) -> None:
        self._fill(self.second)

    def _fill(self, host: Host) -> None:
        """The state folder is full while the link is lost and comes back, and for some saves not yet."""
        host.room.fill(self._random.randrange(4))
        try:
            self._cut()
            self._write()
            self._checkpoint(compare=False)
        finally:
            host.room.make_room()

    def _remove_map(self) -> None:
        self.first.node.kill()
        for path in self.first.state.glob("*.changes"):
            path.unlink()
        self.first.up()

    def _stop(self) -> None:
        if self._command(self.first, "replication-stop"):
            self._write()
            given = {"secondary": self.second.node.uri(), "sync": self._random.choice(["auto", "full", "digest"])}
            wait_until(lambda: self._command(self.first, "replication-start", **given), "a start", SETTLE_S)

    def _command(self, host: Host, command: str, **arguments: object) -> bool:
        try:
            host.node.execute(command, arguments)
        except (QmpError, OSError, EOFError) as error:
            self._refusal = str(error)
            return False
        return True

    # -- claims --------------------------------------------------------------------------------------------

    def _checkpoint(self, compare: bool = True) -> None:
        """If it is taken in sync, the two are equal; if not, it may have been taken or not. Without `compare` something
        is about to be lost of it, perhaps."""
        before = self.first.node.status()
        taken = self._command(self.first, "replication-checkpoint")
        if not taken:
            self._checkpoints.append([set(values) for values in self._may])
            return
        after = self.first.node.status()
        if before["stage"] == after["stage"] == "running" and compare:
            self._compare()
        else:
            self._checkpoints.append([set(values) for values in self._may])

    def _compare(self) -> None:
        mine = self._see()
        try:
            theirs = self.second.content("top0")
        except _Lost:
            if not self._shaken:
                raise Wrong("a checkpoint was taken and lost, and nothing had been lost below it") from None
            self._shaken = False
            wait_until(lambda: self.first.node.status()["error"] is not None, "the primary says it as well", SETTLE_S)
            wait_until(lambda: self._command(self.first, "replication-checkpoint"), "a checkpoint is taken", SETTLE_S)
            theirs = self.second.content("top0")
        self._shaken = False
        if mine != theirs:
            different = [grain for grain in range(GRAINS) if mine[grain] != theirs[grain]]
            raise Wrong(f"a checkpoint was taken, and the grains {different} differ: {mine} here, {theirs} there")
        self._checkpoints = [[{value} for value in mine]]

    def _settle(self) -> None:
        """Everything comes up, and is well by itself."""
        self.first.up()
        self.second.up()

        def in_sync() -> bool:
            if self.second.node.status()["stage"] == "none":
                self._command(self.second, "replication-start")
            return bool(self.first.node.status()["link"]["state"] == "in-sync")

        try:
            wait_until(in_sync, "in sync by itself", SETTLE_S)
            wait_until(lambda: self._command(self.first, "replication-checkpoint"), "a checkpoint is taken", SETTLE_S)
            self._compare()
            wait_until(lambda: self.first.node.status()["error"] is None, "no error is left", SETTLE_S)
        except Stuck as stuck:
            first, second = self.first.node.status(), self.second.node.status()
            keys = ("stage", "error", "link", "consistent")
            shown = {host: {key: state.get(key) for key in keys} for host, state in (("1", first), ("2", second))}
            raise Stuck(f"{stuck}: {shown}") from stuck

    def _verify(self) -> None:
        """In sync nothing differs, however much the guest writes. What could not be compared, because the machine is
        slow and the link was lost, is no finding."""
        self._settle()
        former = self.first.node.status()["last-verify"]
        if not self._command(self.first, "replication-verify"):
            raise Wrong(f"the disks of a pair in sync cannot be compared: {self._refusal}")
        self._write()

        def concluded() -> bool:
            status = self.first.node.status()
            return status["verify"] is None and status["last-verify"] != former

        wait_until(concluded, "a comparison ends", SETTLE_S)
        found = self.first.node.status()["last-verify"]
        if found["result"] == "different":
            raise Wrong(f"in sync, and a comparison has found what differs: {found}")

    def _fail_over(self) -> None:
        """The secondary's disk becomes what some checkpoint was; the old primary comes back as its secondary."""
        self.second.up()
        if not self._command(self.second, "replication-stop", failover=True):
            return  # it says that it has none, and why
        stage = self.second.node.wait_stage("done", "failover-failed", timeout_s=SETTLE_S)["stage"]
        if stage == "failover-failed":
            # The server below has died with something of the commit. What is tried again needs a valid checkpoint.
            if not self._command(self.second, "replication-retry"):
                raise _Over
            if self.second.node.wait_stage("done", "failover-failed", timeout_s=SETTLE_S)["stage"] != "done":
                raise Wrong(f"{self.second.name}: the commit fails again: {self.second.node.status()['error']}")
        values = self.second.content("top0")
        fits = [all(value in may for value, may in zip(values, each, strict=True)) for each in self._checkpoints]
        if not any(fits):
            raise Wrong(f"after the failover {self.second.name} holds {values}, which no checkpoint was")
        self._turn_round(self._random.random() < 0.5)

    def _switch_over(self) -> None:
        self._settle()
        mine = self._see()
        if not (self._command(self.first, "replication-stop") and self._command(self.second, "replication-stop")):
            self._command(self.first, "replication-start", secondary=self.second.node.uri())
            return
        theirs = self.second.content("top0")
        if theirs != mine:
            raise Wrong(f"after the switch-over {self.second.name} holds {theirs}, and had to hold {mine}")
        self._turn_round(False)

    def _turn_round(self, own_writes: bool) -> None:
        """The second is the owner; the first comes back as its secondary. `own_writes`: it has taken some before."""
        former, owner = self.first, self.second
        if own_writes:
            before = former.content(former.export)
            self._write()  # to the old primary, which does not know
            self._guest(lambda handle: handle.flush())
            after = former.content(former.export)
            former.own = None if after == before else after
        owner.own = None
        if self._random.random() < 0.4:
            # The old one stays as it is: a primary that looks for its secondary, perhaps.
            former, self.spare = self.spare, former
        try:
            former.as_secondary()
        except QmpError as error:
            raise Wrong(f"{former.name} cannot become a secondary: {error}") from error
        self.first, self.second = owner, former
        values = owner.content(owner.export)
        self._may = [{value} for value in values]
        self._since = [{value} for value in values]
        self._checkpoints = []
        self._flush()
        started = self._command(owner, "replication-start", mode="primary", secondary=former.node.uri())
        if not started:
            refusal = self._refusal
            if former.own is not None and former.content("disk0") != former.own:
                raise Wrong(f"{former.name} was refused, and overwritten")
            if not self._command(former, "replication-discard"):
                raise Wrong(f"{former.name} was refused ({refusal}), and cannot be discarded ({self._refusal})")
            wait_until(
                lambda: self._command(owner, "replication-start", mode="primary", secondary=former.node.uri()),
                "a start after the discard",
                SETTLE_S,
            )
        elif former.own is not None:
            raise Wrong(f"{former.name} has writes of its own, and was not refused")
        former.own = None
        self._settle()


def replay(seed: str, number: int) -> str | None:
    """One history; what was wrong, None if nothing."""
    with Lab() as lab:
        history = History(lab, seed, number)
        try:
            history.run()
        except (Wrong, Stuck) as error:
            said = "".join(
                f"\n--- {host.name}\n{host.said}"
                for host in (history.first, history.second, history.spare)
                if host.begun
            )
            return f"history {number} of seed {seed}: {' '.join(history.told)}: {type(error).__name__}: {error}{said}"
    return None


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(prog="model.ledger", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", default="", help="any text; without it a new one is made up")
    parser.add_argument("--histories", default="", help="how many (default: 10)")
    parser.add_argument("--history", default="", help="replay only the history of this number")
    arguments = parser.parse_args()
    seed = arguments.seed or secrets.token_hex(4)
    numbers = [int(arguments.history)] if arguments.history else range(int(arguments.histories or 10))
    wrong = 0
    for number in numbers:
        found = replay(seed, number)
        print(found or f"history {number} of seed {seed}: right", flush=True)
        wrong += found is not None
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
