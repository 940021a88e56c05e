# SPDX-License-Identifier: BSD-3-Clause
"""Continuous replication: a chain of machines, each promoted in its turn, with a model of every disk throughout.

    a -> b, b promoted, b -> c, c promoted, c -> a, where a is a new machine, wiped

At every hop both guests go on with random requests (seeded) while the commit and the resync are under way, each held
at its beginning until some requests have been answered. The model of a disk is three arrays of bytes:

    written     what the primary's guest has written: both disks after a barrier
    face        what the secondary's guest sees: `written` at the last checkpoint, plus its own writes
    (promoted)  by failover `face` becomes the next `written`; by a planned switch-over `written` stays
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
from collections.abc import Sequence
from typing import Any

import nbd
import pytest

from content import KIB, MIB, pattern
from lab import Lab
from nodes import Primary, Secondary, Server, disk_name, drained, top_id
from pausepoints import PausePoints
from waiting import DEADLINE_S, wait_until

SIZE = MIB + 64 * KIB + 512
"""Neither whole grains nor whole blocks."""
DISKS = 2
LENGTHS = (1, 512, 4096, 4097, 10000, 65536, 150000)


class Guest:
    """One guest with its disks: random requests over connections that it keeps."""

    def __init__(self, server: Server, exports: Sequence[str], pick: random.Random) -> None:
        self._handles: list[nbd.NBD] = [server.connect(export) for export in exports]
        self._pick = pick

    def work(self, models: Sequence[bytearray], requests: int) -> None:
        """Do requests and note them in the models; what is read must be what the model says."""
        pick = self._pick
        for _ in range(requests):
            index = pick.randrange(len(self._handles))
            handle, model = self._handles[index], models[index]
            length = pick.choice(LENGTHS)
            offset = pick.choice((0, len(model) - length, pick.randrange(len(model) - length + 1)))
            kind = pick.choice(("write", "write", "write", "fua", "zero", "trim", "flush", "read"))
            if kind in ("write", "fua"):
                data = pick.randbytes(length)
                handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if kind == "fua" else 0)
                model[offset : offset + length] = data
            elif kind == "flush":
                handle.flush()
            elif kind == "read":
                assert bytes(handle.pread(length, offset)) == model[offset : offset + length]
            else:
                (handle.zero if kind == "zero" else handle.trim)(length, offset)
                model[offset : offset + length] = bytes(length)

    def sees(self, models: Sequence[bytearray]) -> None:
        """Every byte is what the model says."""
        for index, (handle, model) in enumerate(zip(self._handles, models, strict=True)):
            assert bytes(handle.pread(len(model), 0)) == model, f"disk {index}"


GO_ON = ["on-outdated=continue"]
"""An old primary that writes must not matter, wherever it writes."""


class Chain:
    """The present pair with its two guests and the model."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.pick = random.Random(seed)
        self.points: PausePoints = lab.pause_points()
        contents = [pattern(seed + index, SIZE) for index in range(DISKS)]
        self.written = [bytearray(content) for content in contents]
        self.secondary = self.new_secondary("b", contents)
        self.primary: Primary | Secondary = lab.start(
            Primary(
                lab.folder,
                self.secondary.uri(),
                [SIZE] * DISKS,
                name="a",
                contents=contents,
                extra_arguments=GO_ON,
            )
        )
        self.exports = [disk_name(index) for index in range(DISKS)]
        self.writer = Guest(self.primary, self.exports, self.pick)
        self.secondary.start_replication()
        self.primary.execute("replication-start", mode="primary")
        self.begin_face()

    def new_secondary(self, name: str, contents: Sequence[bytes] = ()) -> Secondary:
        """A started secondary in stage none."""
        return self.lab.start(
            Secondary(
                self.lab.folder,
                [SIZE] * DISKS,
                name=name,
                contents=contents,
                extra_environment=self.points.environment,
                extra_arguments=GO_ON,
            )
        )

    def begin_face(self) -> None:
        """The secondary has just been started: its guest comes, and sees what the primary has written."""
        self.face = [bytearray(content) for content in self.written]
        self.reader = Guest(self.secondary, [top_id(index) for index in range(DISKS)], self.pick)
        self.reader.sees(self.face)

    def check_disks(self) -> None:
        """After a barrier: the raw disks of both sides, and both guests."""
        for index, content in enumerate(self.written):
            assert self.primary.disks[index].read_bytes() == content, f"primary disk {index}"
            assert self.secondary.disks[index].read_bytes() == content, f"secondary disk {index}"
        self.writer.sees(self.written)
        self.reader.sees(self.face)

    def live(self, checkpoints: int, own_writes: bool = True) -> None:
        """Both guests work, with checkpoints between."""
        for turn in range(checkpoints + 1):
            for _ in range(6):
                self.writer.work(self.written, 5)
                if own_writes:
                    self.reader.work(self.face, 4)
            self.reader.sees(self.face)
            drained(self.primary)
            self.check_disks()
            if turn < checkpoints:
                self.primary.execute("replication-checkpoint")
                self.face = [bytearray(content) for content in self.written]
                self.reader.sees(self.face)

    # -- the two ways to the next machine ----------------------------------------------------------------------

    def fail_over(self) -> None:
        """The secondary is promoted without the primary, whose last writes are lost; its guest works meanwhile."""
        self.writer.work(self.written, 10)  # after the last checkpoint
        self.points.arm("failover.entered")
        command = threading.Thread(target=self.secondary.failover)
        command.start()
        self.points.wait_hit("failover.entered")
        self.reader.work(self.face, 15)
        self.reader.sees(self.face)
        self.points.release("failover.entered")
        while command.is_alive():
            self.reader.work(self.face, 1)  # each bounded by its own request
        command.join(DEADLINE_S)
        assert self.secondary.status()["stage"] == "done"
        # The old primary is alive and tries to go on: it must not matter.
        self.writer.work(self.written, 10)
        self._promoted(self.face)

    def switch_over(self) -> None:
        """By plan: the guest is moved, with everything that the primary has written."""
        self.primary.execute("replication-checkpoint")
        self.primary.execute("replication-stop")
        self.secondary.execute("replication-stop")
        self._promoted(self.written)

    def _promoted(self, content: list[bytearray]) -> None:
        self.primary = self.secondary
        self.writer = self.reader
        self.written = content
        self.writer.sees(self.written)
        for index, model in enumerate(self.written):
            assert self.primary.disks[index].read_bytes() == model

    def next_secondary(self, name: str, sync: str | None, copied: bool) -> None:
        """The promoted one gets a secondary, blank or a `copied` one, and sends what that lacks, under load."""
        contents = [bytes(content) for content in self.written] if copied else ()
        self.writer.work(self.written, 20)
        self.secondary = self.new_secondary(name, contents)
        arguments: dict[str, Any] = {"mode": "primary", "secondary": self.secondary.uri()}
        self.points.arm("forward.send")
        self.primary.execute("replication-start", arguments if sync is None else {**arguments, "sync": sync})
        self.points.wait_hit("forward.send")
        self.writer.work(self.written, 20)
        self.points.release("forward.send")
        self.writer.work(self.written, 20)
        with self.primary.qmp() as qmp:

            def sent() -> bool:
                return not any(job["type"] == "resync" for job in qmp.execute("query-jobs"))

            while not sent():
                self.writer.work(self.written, 1)
            qmp.execute("replication-checkpoint")
            for index, model in enumerate(self.written):
                assert self.secondary.disks[index].read_bytes() == model
            assert qmp.execute("query-xen-replication-status") == {"error": False}
        self.secondary.start_replication()
        self.begin_face()

    def wipe(self, server: Server) -> None:
        """A machine is thrown away, with all that it knows."""
        server.terminate()
        for path in self.lab.folder.glob(f"{server.name}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@pytest.mark.parametrize(
    ("first", "second", "seed"),
    [
        ("failover", "failover", 1),
        ("planned", "planned", 2),
        ("failover", "planned", 3),
        ("planned", "failover", 4),
    ],
)
def test_a_chain_of_promotions_never_loses_or_invents_a_byte(lab: Lab, first: str, second: str, seed: int) -> None:
    chain = Chain(lab, seed)
    a = chain.primary
    chain.live(checkpoints=2)
    chain.check_disks()
    hop(chain, first)
    # After a failover everything is sent; after a planned switch-over a blank disk needs `full`, and a copy taken at
    # the stop, which has what was there then, only the rest.
    chain.next_secondary("c", "full" if first == "planned" else None, copied=False)
    chain.live(checkpoints=2)
    hop(chain, second)
    # Now a comes back, as a new machine.
    chain.wipe(a)
    chain.next_secondary("a", "auto", copied=second == "planned")
    chain.live(checkpoints=1)
    chain.switch_over()
    chain.writer.work(chain.written, 20)
    chain.writer.sees(chain.written)


def hop(chain: Chain, how: str) -> None:
    """The secondary is promoted."""
    if how == "failover":
        chain.fail_over()
    else:
        chain.switch_over()


def test_a_planned_switch_over_and_back_sends_only_what_has_changed(lab: Lab) -> None:
    """a -> b, b promoted, b -> a with the disk that a has kept."""
    chain = Chain(lab, 5)
    a = chain.primary
    chain.live(checkpoints=1)
    chain.switch_over()
    a.terminate()
    kept = [path.read_bytes() for path in a.disks]
    assert kept == chain.written
    chain.writer.work(chain.written, 3)
    # With its disks and its state folder: that says what it has.
    back = chain.lab.start(Secondary(lab.folder, [SIZE] * DISKS, name="a", extra_environment=chain.points.environment))
    grain = 64 * KIB
    differing = sum(
        min(grain, SIZE - at)
        for index in range(DISKS)
        for at in range(0, SIZE, grain)
        if chain.written[index][at : at + grain] != kept[index][at : at + grain]
    )
    chain.secondary = back
    chain.primary.execute("replication-start", mode="primary", secondary=back.uri(), sync="auto")
    with chain.primary.qmp() as qmp:
        wait_until(
            lambda: not any(job["type"] == "resync" for job in qmp.execute("query-jobs")), "the resync has ended"
        )
        qmp.execute("replication-checkpoint")
        forwarded = sum(disk["totals"]["forwarded"] for disk in qmp.execute("query-replication")["disks"])
    assert forwarded == differing
    assert [path.read_bytes() for path in back.disks] == chain.written
    back.start_replication()
    chain.begin_face()
    chain.live(checkpoints=1)
    hop(chain, "failover")


@pytest.mark.parametrize("seed", [6, 7])
def test_a_chain_goes_on_when_every_process_is_killed_at_every_hop(lab: Lab, seed: int) -> None:
    chain = Chain(lab, seed)
    for number, how in enumerate(("planned", "failover", "planned")):
        chain.live(checkpoints=1)
        hop(chain, how)
        chain.primary.restart(signal.SIGKILL)  # promoted, alone
        chain.writer = Guest(chain.primary, [top_id(index) for index in range(DISKS)], chain.pick)
        chain.writer.sees(chain.written)
        chain.next_secondary(f"n{number}", "full", copied=False)
        chain.writer.work(chain.written, 10)
        chain.primary.restart(signal.SIGKILL)  # a primary, with writes perhaps on their way
        chain.writer = Guest(chain.primary, [top_id(index) for index in range(DISKS)], chain.pick)
        chain.writer.sees(chain.written)
        wait_until(lambda: chain.primary.status()["link"]["state"] == "in-sync", "the link is up again")
        drained(chain.primary)
        chain.check_disks()
