# SPDX-License-Identifier: BSD-3-Clause
"""Host A's half: a virtual machine and its disk go to host B together, again and again, while it runs.

One epoch; the guest stands still between STOP and RESUME only:

    begin          B expects a state
    migrate        QEMU sends the memory to B's receiver while the guest runs, then (STOP) nothing but what is left
    pre-switchover QEMU waits for us: the disk's epoch is cut on the primary (`replication-checkpoint` with `hold`)
    continue       the rest of the state; `cont` (RESUME)
    prepare        B has all of state N: its record names it beside the one before
    commit         the disk of B takes checkpoint N: from this instant on unit N is the one that B would go on with
    mark           B's record says so, and the state before is removed

store.py says why in this order. Where QEMU has no `pause-before-switchover` it is `stop`, cut, `migrate`, `cont`, and
the guest stands still while all of its memory goes over.

Invariants
* Every wait has a deadline. Whatever fails, the epoch is given up, the last unit stays valid, and the guest goes on:
  `Agent.recover` has it run again as soon as QEMU answers (it answers nothing while a disk is stuck).
* The disk's epoch is given up before the state with its number is removed; when it is not known whether the disk has
  taken it, neither is, and B asks its disk before the next one begins.
* Nobody else takes checkpoints of the pair: no `checkpoint-interval`, no `replctl checkpoint`. B's disk would be ahead
  of every state of the machine, until the next epoch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from ..order.pause import pause
from .monitor import FtError, Gone, Late, Limits, Monitor, Refused, stamp_s
from .pauses import Pauses
from .remote import Remote

BANDWIDTH = 1 << 40
"""Bytes a second: no limit. QEMU's own is 128 MiB/s."""
DOWNTIME_MS = 10
"""What is left to be sent must fit in here before QEMU stops the guest: it is the largest part of a pause."""
CAPABILITY = "pause-before-switchover"


class Skipped(FtError):
    """There is no point in an epoch now."""


class Agent:
    """Protects one machine. `qmp` is a monitor of its QEMU that nobody else uses, `control` the control socket of A's
    nbdkit, `receiver` the socket of B's receiver as QEMU and this process reach it."""

    def __init__(
        self, qmp: Path, control: Path, receiver: Path, limits: Limits, say: Callable[[str], None], *, live: bool = True
    ) -> None:
        self._control_path = control
        self._receiver_path = receiver
        self._limits = limits
        self._say = say
        self._guest = Monitor(qmp, "QEMU", limits.answer_s)
        self._control: Monitor | None = None
        self._remote: Remote | None = None
        self._wanted = live
        self.live = live
        """Whether the memory goes over while the guest runs; known after `prepare`."""

    def prepare(self) -> None:
        """Set QEMU up, whatever an agent before this one has left; FtError."""
        self.recover(restarted=True)
        known = {item["capability"] for item in self._guest.execute("query-migrate-capabilities")}
        self.live = self._wanted and CAPABILITY in known
        wanted = {"events": True, CAPABILITY: self.live}
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items() if name in known]
        self._guest.execute("migrate-set-capabilities", {"capabilities": capabilities})
        self._guest.execute("migrate-set-parameters", {"max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME_MS})

    def epoch(self) -> Pauses:
        """Bring one unit over. FtError: it was given up, and the unit before is valid; the guest runs, or `recover` has
        to be called until it does. Skipped: nothing was begun."""
        deadline = time.monotonic() + self._limits.epoch_s
        status = self._guest.execute("query-status")
        if not status["running"]:
            raise Skipped(f"the guest does not run, it is {status['status']}")
        try:
            control, remote = self._connect()
        except FtError as error:
            raise Skipped(str(error)) from error
        asked = False
        try:
            remote.call("begin", self._limits.answer_s)
            pause("agent.begun")
            self._guest.forget_events()
            number, times = (self._live if self.live else self._still)(control, deadline)
            length = int(remote.call("prepare", self._left_s(deadline), number)["bytes"])
            pause("agent.prepared")
            asked = True
            taken = int(
                control.execute("replication-checkpoint-commit", {"epoch": number}, timeout_s=self._left_s(deadline))[
                    "epoch"
                ]
            )
            safe = time.time()
            pause("agent.taken")
            if taken != number:
                raise FtError(
                    f"the disk of B calls it checkpoint {taken}, not {number}: somebody else takes checkpoints"
                )
            remote.call("commit", self._limits.answer_s, number)
            pause("agent.marked")
        except FtError:
            self._give_up(asked)
            raise
        return Pauses(number, length, **times, safe_ms=(safe - self._resumed) * 1e3)

    def _live(self, control: Monitor, deadline: float) -> tuple[int, dict[str, float]]:
        began = time.time()
        self._guest.execute("migrate", {"uri": f"unix:{self._receiver_path}"})
        self._migration("pre-switchover", deadline)
        waiting = time.time()
        pause("agent.still")
        number = int(control.execute("replication-checkpoint", {"hold": True})["epoch"])
        cut = time.time()
        pause("agent.cut")
        self._guest.execute("migrate-continue", {"state": "pre-switchover"})
        self._migration("completed", deadline)
        sent = time.time()
        stopped, resumed = self._resume(deadline)
        return number, _parts(began, stopped, waiting, cut, sent, resumed)

    def _still(self, control: Monitor, deadline: float) -> tuple[int, dict[str, float]]:
        began = time.time()
        self._guest.execute("stop", timeout_s=self._limits.answer_s)
        waiting = time.time()
        pause("agent.still")
        number = int(control.execute("replication-checkpoint", {"hold": True})["epoch"])
        cut = time.time()
        pause("agent.cut")
        self._guest.execute("migrate", {"uri": f"unix:{self._receiver_path}"})
        self._migration("completed", deadline)
        sent = time.time()
        stopped, resumed = self._resume(deadline)
        return number, _parts(began, stopped, waiting, cut, sent, resumed)

    def _resume(self, deadline: float) -> tuple[float, float]:
        """`cont`; when QEMU has stopped and resumed the guest."""
        while True:
            try:
                self._guest.execute("cont")
                break
            except Refused:  # QEMU tells that the migration is completed a moment before it is through with it
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        stopped = stamp_s(self._guest.wait_event("STOP", deadline))
        self._resumed = stamp_s(self._guest.wait_event("RESUME", deadline))
        pause("agent.resumed")
        return stopped, self._resumed

    def _migration(self, wanted: str, deadline: float) -> None:
        """Wait until the migration has come so far; FtError if it has failed."""
        ends = (wanted, "failed", "cancelled")
        event = self._guest.wait_event("MIGRATION", deadline, lambda data: data["status"] in ends)
        if event["data"]["status"] != wanted:
            detail = self._guest.execute("query-migrate").get("error-desc", event["data"]["status"])
            raise FtError(f"QEMU cannot send the state: {detail}")

    def _left_s(self, deadline: float) -> float:
        return max(deadline - time.monotonic(), 0.001)

    # -- what is there ---------------------------------------------------------------------------------------------

    def _connect(self) -> tuple[Monitor, Remote]:
        """Connections to both, with no epoch held or under way, and the pair in sync; FtError."""
        try:
            if self._control is None:
                self._control = Monitor(self._control_path, "nbdkit of A", self._limits.answer_s)
            status = self._control.execute("query-replication")
            if status["mode"] != "primary" or status["stage"] != "running":
                raise FtError(f"nbdkit of A is a {status['mode']} in stage {status['stage']}")
            if status["link"]["state"] != "in-sync":
                raise FtError(f"the link to B is {status['link']['state']} ({status['link']['reason']})")
            self._drop_hold(self._control, status["held-epoch"])
            if self._remote is None:
                self._remote = Remote(self._receiver_path, self._limits.answer_s)
        except FtError as error:
            self._disconnect(error)
            raise
        return self._control, self._remote

    def _drop_hold(self, control: Monitor, held: int | None) -> None:
        """No epoch is held when this returns, and no commit is under way: commands come one at a time."""
        with contextlib.suppress(Refused):  # it is not held, which is what is wanted
            control.execute("replication-checkpoint-abort", {"epoch": held or 0}, timeout_s=self._limits.epoch_s)

    def _disconnect(self, error: FtError) -> None:
        """After an error whose connection may be no good any more."""
        if isinstance(error, Refused):
            return
        for connection in (self._control, self._remote):
            if connection is not None:
                connection.close()
        self._control = self._remote = None

    def _give_up(self, asked: bool) -> None:
        """An epoch that has failed. `asked`: the disk may have taken it, so its state stays until that is known."""
        told = None
        try:
            self.recover()
        except FtError as error:
            told = error
        control, remote = self._control, self._remote
        assert control is not None
        assert remote is not None
        try:
            if not asked:
                self._drop_hold(control, control.execute("query-replication")["held-epoch"])
                remote.call("abort", self._limits.answer_s)
        except FtError as error:
            self._say(f"giving it up: {error}")
        # Whatever answer is still to come belongs to the past.
        self._disconnect(Gone("new connections for the next"))
        if told is not None:
            raise told

    def recover(self, *, restarted: bool = False) -> None:
        """The guest runs, and QEMU is ready for the next migration. Late: QEMU does not answer yet, a disk may be
        stuck; to be called again. `restarted`: only what a migration has stopped goes on."""
        deadline = time.monotonic() + self._limits.answer_s
        while True:
            migration = self._guest.execute("query-migrate").get("status", "none")
            if migration in ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug"):
                if migration != "cancelling":
                    self._guest.execute("migrate_cancel")
            else:
                status = self._guest.execute("query-status")
                if status["running"] or (restarted and status["status"] not in ("postmigrate", "finish-migrate")):
                    return
                with contextlib.suppress(Refused):  # the end of the migration is not through yet: once more
                    self._guest.execute("cont")
            if time.monotonic() > deadline:
                raise Late(f"QEMU does not go on with the guest (migration {migration})")
            time.sleep(0.005)

    def close(self) -> None:
        """Close the connections; the guest runs."""
        self._guest.close()
        self._disconnect(Gone("closed"))


def _parts(began: float, stopped: float, waiting: float, cut: float, sent: float, resumed: float) -> dict[str, float]:
    """Seconds since 1970 to the fields of Pauses."""
    return {
        "pause_ms": (resumed - stopped) * 1e3,
        "flush_ms": (waiting - stopped) * 1e3,
        "cut_ms": (cut - waiting) * 1e3,
        "rest_ms": (sent - cut) * 1e3,
        "resume_ms": (resumed - sent) * 1e3,
        "send_ms": (stopped - began) * 1e3,
    }
