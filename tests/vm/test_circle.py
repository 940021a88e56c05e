# SPDX-License-Identifier: BSD-3-Clause
"""There and back: host A dies, B takes over, A returns as the secondary of B, and the guest moves home as planned."""

from __future__ import annotations

import subprocess
from pathlib import Path

from content import MIB, pattern
from filesystem import inspect
from hosts import Checkpoints, Hosts, replctl
from lab import Lab
from nodes import Server
from records import Loss, due
from takeover import protected
from waiting import DEADLINE_S, wait_until

BALLAST_BYTES = 32 * MIB
"""In a file that no guest touches: what a full resync would send, and one of the difference does not."""

DIFFERENCE_BYTES_MAX = 12 * MIB
"""What a resync may send here: grains of 64 KiB in which either guest has written since the two parted, that is most of
the ext4 journal of 4 MiB, a few of metadata and of records; and what the guest writes meanwhile."""


def add_ballast(image: Path) -> None:
    """Write the file `ballast` into a file system that nobody uses."""
    source = image.with_suffix(".ballast")
    source.write_bytes(pattern(1, BALLAST_BYTES))
    _debugfs("-w", "-R", f"write {source} ballast", image)


def has_ballast(image: Path) -> bool:
    """Whether the file `ballast` is as it was written."""
    target = image.with_suffix(".ballast")
    target.unlink(missing_ok=True)
    _debugfs("-R", f"dump /ballast {target}", image)
    return target.read_bytes() == pattern(1, BALLAST_BYTES)


def _debugfs(*arguments: str | Path) -> None:
    subprocess.run(["debugfs", *arguments], check=True, capture_output=True, timeout=DEADLINE_S)


def sent_until_in_sync(primary: Server) -> int:
    """Wait until a new secondary lacks nothing; the bytes that have been sent to it until then."""

    def sent() -> int | None:
        status = primary.status()
        if status["link"]["state"] != "in-sync":
            return None
        return int(sum(disk["totals"]["forwarded"] for disk in status["disks"]))

    return int(wait_until(sent, f"{primary.name} is in sync"))


def test_the_whole_circle_and_then_a_dies_once_more(lab: Lab) -> None:
    hosts = Hosts(lab, interval_s=0.5)
    for name in ("a", "b"):
        add_ballast(hosts.disk(name))

    # Host A dies, and B takes over.
    guest = protected(hosts)
    guest.console.wait_more(20, DEADLINE_S)
    guest.kill()
    hosts.a.kill()
    epoch = hosts.b.execute("query-failover")["epoch"]
    required = due(guest.console.records, hosts.checkpoints.not_before(epoch))
    replctl(hosts.b, "failover", "--yes")
    on_b = hosts.guest(hosts.b, 2)
    on_b.wait_working(20)
    found = int(on_b.console.wait("mounted", DEADLINE_S))
    assert found >= required >= 1
    hosts.b.wait_stage("done")

    # A returns as the secondary of B, while the guest there works. Its disk has what A wrote after the checkpoint.
    a = hosts.secondary("a")
    checkpoints = Checkpoints(hosts.b)
    replctl(hosts.b, "start", "--mode", "primary", "--secondary", a.uri())
    assert 0 < sent_until_in_sync(hosts.b) < DIFFERENCE_BYTES_MAX
    checkpoints.wait(checkpoints.last + 2)
    assert a.status()["stage"] == "running"
    on_b.console.wait_more(20, DEADLINE_S)

    # The guest moves home as planned.
    last = on_b.switch_off()
    replctl(hosts.b, "switchover", "--yes", "--peer", str(a.control_path))
    home = inspect(hosts.seen(a), unmounted=True)
    Loss(last, last, len(home)).check(home, [1, 2])
    assert has_ballast(hosts.disk("a"))
    at_home = hosts.guest(a, 3)
    at_home.wait_working(20)

    # B is the secondary again, and A its primary.
    replctl(hosts.b, "demote", "--yes")
    replctl(a, "start", "--mode", "primary", "--secondary", hosts.b.uri())
    assert 0 < sent_until_in_sync(a) < DIFFERENCE_BYTES_MAX
    checkpoints = Checkpoints(a)
    a.execute("replication-checkpoint")
    acknowledged_before = at_home.console.last
    checkpoints.wait(hosts.b.status()["epoch"] + 1)

    # All is as at the beginning: A dies once more.
    at_home.kill()
    a.kill()
    acknowledged = at_home.console.last
    epoch = hosts.b.execute("query-failover")["epoch"]
    required = due(at_home.console.records, checkpoints.not_before(epoch))
    assert required >= acknowledged_before
    replctl(hosts.b, "failover", "--yes")
    hosts.b.wait_stage("done")
    again = inspect(hosts.seen(hosts.b))
    Loss(acknowledged, required, len(again)).check(again, [1, 2, 3])
    assert has_ballast(hosts.disk("b"))
