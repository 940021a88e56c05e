# SPDX-License-Identifier: BSD-3-Clause
"""A guest that writes is migrated to another QEMU, and then its disk: docs/operating/live-migration.md."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from commandline import replctl
from filesystem import inspect
from guest import BOOT_S, Guest, nbd_node
from hosts import Hosts
from lab import Lab
from nodes import Server, top_id
from twins import Twins
from waiting import DEADLINE_S, wait_until

WITHIN_S = 60
"""Of a switch-over: on a busy machine a second may take long."""


class Site:
    """Two hosts, and the QEMU on which the guest runs."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.hosts = Hosts(lab)
        for name in ("a", "b"):
            self.hosts.disk(name)
        self.twins = Twins(lab, "follow-owner=true", "checkpoint-interval=0.5")
        self.twins.a.execute("replication-set-role", role="primary")
        self.twins.joined(self.twins.a)
        self.count = 0
        self.guest = self.qemu(self.twins.a)

    def qemu(self, server: Server, *options: str) -> Guest:
        """One that is attached to the socket of a host, whoever owns the disk."""
        self.count += 1
        node = nbd_node("node0", server, top_id(0), **{"reconnect-delay": 60})
        name = f"qemu{self.count}"
        guest = Guest(
            self.lab.folder, name, self.hosts.images, [node], accelerator=self.hosts.accelerator, options=options
        )
        return self.lab.start(guest)

    def migrate(self, server: Server) -> None:
        """Move the guest to another host. Its disk stays where it is."""
        way = f"unix:{self.lab.folder}/migration{self.count}"
        heir, former = self.qemu(server, "-incoming", way), self.guest
        former.qmp.execute("migrate", {"uri": way})
        seen: dict[str, Any] = {}

        def over() -> bool:
            seen.update(former.qmp.execute("query-migrate"))
            return seen.get("status") in ("completed", "failed", "cancelled")

        wait_until(over, "the guest is migrated", BOOT_S)
        assert seen["status"] == "completed", seen
        self.guest = heir
        former.kill()
        heir.console.wait_more(20, DEADLINE_S)

    def move_disk(self, here: Server, there: Server) -> float:
        """The disk follows; the longest time, in seconds, between two records of the guest meanwhile."""
        begun = self.guest.console.last
        done = replctl(
            *("--state", here.control_path.parent, "switchover", "--live", "--within", WITHIN_S, "--yes"),
            *("--peer", there.control_path),
        )
        assert done.returncode == 0, done.stderr
        self.guest.console.wait_more(50, DEADLINE_S)
        moments = [record.moment for record in self.guest.console.records if record.number >= begun]
        return max(later - earlier for earlier, later in pairwise(moments))


def test_a_guest_is_migrated_and_its_disk_follows_and_back(lab: Lab) -> None:
    """Nothing that it was answered for is lost, and nothing is there that it has not written: each record follows from
    the one before."""
    site = Site(lab)
    a, b = site.twins.a, site.twins.b
    site.guest.wait_working(50)
    pauses = []
    for here, there in ((a, b), (b, a)):
        site.migrate(there)
        assert there.status()["mode"] == "secondary", "the guest is there, and its disk is not"
        pauses.append(site.move_disk(here, there))
        site.twins.joined(there)
        assert (there.status()["mode"], here.status()["mode"]) == ("primary", "secondary")
    last = site.guest.switch_off()
    site.twins.joined(a)
    for name in ("a", "b"):
        found = inspect(site.hosts.disk(name), unmounted=True)
        assert len(found) == last
    print(f"the guest has paused for {pauses[0]:.2f} and {pauses[1]:.2f} s, and has written {last} records")
    assert max(pauses) < WITHIN_S
