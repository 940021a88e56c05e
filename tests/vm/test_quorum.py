# SPDX-License-Identifier: BSD-3-Clause
"""QEMU on both hosts as its docs/block-replication.txt has it, with this plugin instead of its replication driver.

    host A   the guest's disk is a `quorum` of its local disk and, added by x-blockdev-change, an export that only
             forwards. QEMU itself writes to both.
    host B   QEMU has the guest face as its disk from the beginning, and its processor stands still until the failover.

Replication is started, checkpointed and stopped by QEMU's xen-* commands, on the control sockets of the plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from filesystem import inspect
from guest import Guest, nbd_node
from hosts import Hosts
from lab import Lab
from nodes import Server, top_id
from records import Loss
from waiting import DEADLINE_S, wait_until

QUORUM = {"driver": "quorum", "node-name": "colo", "vote-threshold": 1, "read-pattern": "fifo", "children": ["local0"]}


@dataclass
class Colo:
    """Both hosts, as a manager like libxl has set them up; replication runs, the guest on A works."""

    hosts: Hosts
    a: Server
    b: Server
    active: Guest
    standby: Guest

    def stop_and_checkpoint(self) -> int:
        """As COLO does it: while the guest stands still. The last record that it has acknowledged."""
        self.active.qmp.execute("stop")
        last = self.active.console.drain()
        self.a.execute("xen-colo-do-checkpoint")
        self.active.qmp.execute("cont")
        return last


def replication(server: Server, **arguments: bool) -> None:
    server.execute("xen-set-replication", arguments)


@pytest.fixture
def colo(lab: Lab) -> Colo:
    hosts = Hosts(lab, interval_s=None)
    b = hosts.secondary("b")
    arguments = ["mode=primary", f"state={lab.folder}/a.state", f"secondary={b.uri('disk0')}"]
    a = lab.start(Server(lab.folder, "a", arguments))
    file = {"driver": "file", "filename": str(hosts.disk("a"))}
    local = {"driver": "raw", "node-name": "local0", "file": file}
    active = Guest(lab.folder, "active", hosts.images, ["colo"], nodes=[local, QUORUM], paused=True)
    lab.start(active)
    active.qmp.execute("blockdev-add", nbd_node("forward0", a, "disk0"))
    active.qmp.execute("x-blockdev-change", {"parent": "colo", "node": "forward0"})
    replication(b, enable=True, primary=False)
    replication(a, enable=True, primary=True)
    standby = Guest(lab.folder, "standby", hosts.images, [nbd_node("node0", b, top_id(0))], tag=2, paused=True)
    lab.start(standby)
    active.qmp.execute("cont")
    active.wait_working(20)
    return Colo(hosts, a, b, active, standby)


def set_failover(colo: Colo) -> None:
    replication(colo.b, enable=False, primary=False, failover=True)


def lose_heartbeat(colo: Colo) -> None:
    colo.b.execute("x-colo-lost-heartbeat")


@pytest.mark.parametrize("fail_over", [set_failover, lose_heartbeat])
def test_the_standby_goes_on_from_the_checkpoint_when_a_dies(colo: Colo, fail_over: Callable[[Colo], None]) -> None:
    for _ in range(3):
        acknowledged = colo.stop_and_checkpoint()
        colo.active.console.wait_more(20, DEADLINE_S)
    assert colo.a.execute("query-xen-replication-status") == {"error": False}
    assert colo.b.execute("query-xen-replication-status") == {"error": False}
    colo.active.kill()
    colo.a.kill()
    assert len(inspect(colo.hosts.disk("a"))) >= acknowledged + 20

    fail_over(colo)
    found = inspect(colo.hosts.seen(colo.b))
    assert len(found) in (acknowledged, acknowledged + 1)
    colo.standby.qmp.execute("cont")
    colo.standby.wait_working(20)
    last = colo.standby.switch_off()
    colo.b.wait_stage("done")
    left = inspect(colo.hosts.disk("b"), unmounted=True)
    Loss(last, last, len(left)).check(left, [1, 2])


def test_a_planned_stop_gives_the_standby_all_that_was_written(colo: Colo) -> None:
    colo.stop_and_checkpoint()
    colo.active.console.wait_more(20, DEADLINE_S)
    last = colo.active.switch_off()
    colo.a.execute("xen-colo-do-checkpoint")
    replication(colo.a, enable=False, primary=True)
    replication(colo.b, enable=False, primary=False)
    found = inspect(colo.hosts.seen(colo.b), unmounted=True)
    assert len(found) == last
    colo.standby.qmp.execute("cont")
    colo.standby.wait_working(5)
    assert int(colo.standby.console.wait("mounted", DEADLINE_S)) == last
    colo.standby.switch_off()


def test_the_guest_on_a_goes_on_when_b_dies_and_its_child_is_taken_out(colo: Colo) -> None:
    colo.stop_and_checkpoint()
    colo.standby.kill()
    colo.b.kill()
    colo.active.console.wait_more(50, DEADLINE_S)
    status = {"error": True, "desc": "I/O error occurred"}
    wait_until(lambda: colo.a.execute("query-xen-replication-status") == status, "A notices the death of B")
    colo.active.qmp.execute("x-blockdev-change", {"parent": "colo", "child": "children.1"})
    replication(colo.a, enable=False, primary=True)
    colo.active.qmp.execute("blockdev-del", {"node-name": "forward0"})
    colo.active.console.wait_more(50, DEADLINE_S)
    last = colo.active.switch_off()
    left = inspect(colo.hosts.disk("a"), unmounted=True)
    Loss(last, last, len(left)).check(left, [1])
    assert len(left) == last
