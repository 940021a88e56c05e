# SPDX-License-Identifier: BSD-3-Clause
"""How a virtual machine moves from host A to host B, with everything that is promised for that looked at.

    lose_a          host A dies at any moment, and host B takes over
    switch_over     the guest moves as planned

scripts/vm-failover tells these stories to a person, tests/vm/ to pytest.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from filesystem import inspect
from guest import BOOT_S, Guest
from hosts import Hosts, replctl
from records import Acknowledged, BadRecords, Loss, Record, due

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What a story has come to; times in seconds."""

    loss: Loss
    checkpoint_age_s: float
    """Of the checkpoint that was gone back to, as query-failover said; 0 in a planned switch-over."""
    command_s: float
    """How long the command itself took: failover, or replctl switchover."""
    copied_s: float
    """How long the copy of the guest face took that is inspected; part of all that follows."""
    booted_s: float
    """From the command to the first line of the guest on B; all of these count from there."""
    first_io_s: float
    """To its first read of the disk."""
    mounted_s: float
    """To its file system, with the journal replayed."""
    working_s: float
    """To its first new durable record."""
    boot_s: float
    """From the start of QEMU on B to the first line of the guest."""
    written: int
    """Records that there are in the end, those of B included."""

    def told(self) -> list[tuple[str, str]]:
        """For a person."""
        return [
            ("age of the checkpoint", f"{self.checkpoint_age_s:.2f} s"),
            ("records acknowledged on A", str(self.loss.acknowledged)),
            ("  of these after the checkpoint", f"at most {self.loss.allowed}"),
            ("  of these lost", str(self.loss.lost)),
            ("the command itself", f"{self.command_s * 1e3:.0f} ms"),
            ("copy of the disk, for inspection", f"{self.copied_s * 1e3:.0f} ms"),
            ("boot of the guest on B", f"{self.boot_s:.2f} s"),
            ("command to first guest I/O", f"{self.first_io_s:.2f} s"),
            ("command to mounted file system", f"{self.mounted_s:.2f} s"),
            ("command to first new record", f"{self.working_s:.2f} s"),
        ]


def one_history(disks: Sequence[list[Record]]) -> list[Record]:
    """The records on the data disk. With a journal disk beside it, BadRecords unless both are of one moment: the guest
    makes a record durable on the journal disk first, so that is never behind, and at most one ahead."""
    data = disks[0]
    for journal in disks[1:]:
        if journal[: len(data)] != data or len(journal) - len(data) > 1:
            raise BadRecords(f"two moments: {len(data)} records on the data disk, {len(journal)} on the journal disk")
    return data


def _taken_over(
    hosts: Hosts, old: Sequence[Acknowledged], required: int, age_s: float, begun: float, say: Say
) -> Outcome:
    """Host B has the disk since a command that was given at `begun`: boot the guest there, and look at everything."""
    command_s = time.monotonic() - begun
    # Before the guest there changes anything.
    copies = [hosts.seen(hosts.b, index) for index in range(hosts.disks)]
    copied_s = time.monotonic() - begun - command_s
    guest = hosts.guest(hosts.b, 2)
    first = guest.wait_working()
    at = {word: guest.console.moment_of(word) or 0.0 for word in ("alive", "disk", "mounted")}
    say(f"B: the guest works again, {first.moment - begun:.2f} s after the command")

    found = one_history([inspect(copy) for copy in copies])
    loss = Loss(old[-1].number if old else 0, required, len(found))
    loss.check(found, [1])
    say(f"B: the file system is clean; records 1 to {loss.found} are there, none is torn; {loss.lost} lost")
    mounted = int(guest.console.wait("mounted", BOOT_S))
    if mounted != loss.found:
        raise BadRecords(f"the guest on B finds {mounted} records, the inspection {loss.found}")

    guest.console.wait_more(20, BOOT_S)
    last = guest.switch_off()
    hosts.b.wait_stage("done")
    left = one_history([inspect(hosts.disk("b", index), unmounted=True) for index in range(hosts.disks)])
    if len(left) != last:
        raise BadRecords(f"the guest on B has written {last} records, its disk holds {len(left)}")
    Loss(last, last, len(left)).check(left, [1, 2])
    say(f"B: after the commit and a shutdown its disk holds records 1 to {last}")
    return Outcome(
        loss=loss,
        checkpoint_age_s=age_s,
        command_s=command_s,
        copied_s=copied_s,
        booted_s=at["alive"] - begun,
        first_io_s=at["disk"] - begun,
        mounted_s=at["mounted"] - begun,
        working_s=first.moment - begun,
        boot_s=at["alive"] - guest.begun,
        written=last,
    )


def protected(hosts: Hosts, say: Say = lambda text: None) -> Guest:
    """Start everything, and wait until the guest works and a checkpoint has some of its records."""
    hosts.start()
    say(f"A, B: the pair runs (protocol {hosts.protocol}, a checkpoint every {hosts.interval_s} s)")
    guest = hosts.guest(hosts.a, 1)
    first = guest.wait_working()
    say(
        f"A: the guest has booted and made its first record durable, {first.moment - guest.begun:.2f} s after its start"
    )
    # The one after the one that may be under way has the first record.
    hosts.checkpoints.wait(hosts.checkpoints.last + 2)
    return guest


def lose_a(hosts: Hosts, chance: random.Random, say: Say = lambda text: None) -> Outcome:
    """SIGKILL to QEMU and nbdkit of host A at any moment; host B fails over and goes on. AssertionError if something
    that is promised does not hold."""
    guest = protected(hosts, say)
    guest.console.watch(chance.uniform(0, 2 * (hosts.interval_s or 0)))
    victims = [guest, hosts.a]
    chance.shuffle(victims)
    victims[0].kill()
    time.sleep(chance.uniform(0, 0.02))  # part of the moment; the one that is left may fail or go on meanwhile
    victims[1].kill()
    old = guest.console.records
    say(f"A: QEMU and nbdkit are dead; {old[-1].number} records were acknowledged")

    preflight = hosts.b.execute("query-failover")
    required = due(old, hosts.checkpoints.not_before(preflight["epoch"]))
    age_s = float(preflight["checkpoint-age"])
    say(f"B: query-failover names checkpoint {preflight['epoch']}, {age_s:.2f} s old; it must have record {required}")
    begun = time.monotonic()
    hosts.b.execute("xen-set-replication", enable=False, primary=False, failover=True)
    return _taken_over(hosts, old, required, age_s, begun, say)


def switch_over(hosts: Hosts, chance: random.Random, say: Say = lambda text: None, *, pulled: bool = False) -> Outcome:
    """The guest of host A is switched off (`pulled`: its QEMU is killed while it writes), and `replctl switchover`
    moves its disk to host B: nothing at all is lost. AssertionError if something is."""
    guest = protected(hosts, say)
    guest.console.watch(chance.uniform(0, 2 * (hosts.interval_s or 0)))
    if pulled:
        guest.kill()
    else:
        guest.switch_off()
    old = guest.console.records
    say(f"A: the guest is off; {old[-1].number} records were acknowledged")
    begun = time.monotonic()
    replctl(hosts.a, "switchover", "--yes", "--peer", str(hosts.b.control_path))
    say("A, B: replctl switchover is done")
    return _taken_over(hosts, old, old[-1].number, 0.0, begun, say)
