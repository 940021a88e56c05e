# SPDX-License-Identifier: BSD-3-Clause
"""A guest that Debian's libvirtd runs on host A, and host B, whose libvirtd goes on with its disk. The disk stands in
the domains as `replctl NAME domain-xml` prints it. `make test-libvirt` runs this folder."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from filesystem import inspect
from guest import BOOT_S
from lab import Lab
from records import Loss
from virthost import NODE, Domain, VirtHost
from waiting import DEADLINE_S, wait_until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="libvirtd has to be started by root"),
    pytest.mark.skipif(shutil.which("libvirtd", path="/usr/sbin") is None, reason="run scripts/setup libvirt vm"),
    pytest.mark.timeout(600),
]


def protected(a: VirtHost, b: VirtHost, port: int) -> None:
    """The pair as README.md leads to it."""
    a.make_disk()
    b.make_disk(empty=True)
    b.start_node("--mode", "secondary", "--listen", f"127.0.0.1:{port}")
    a.start_node("--mode", "primary", "--peer", f"127.0.0.1:{port}")
    b.replctl(NODE, "start")
    a.replctl(NODE, "start", "--sync", "full")
    wait_until(lambda: a.node.status()["link"]["state"] == "in-sync", "the pair is in sync")


def acknowledged_before_a_checkpoint(a: VirtHost, guest: Domain) -> int:
    """The number of a record that the checkpoint taken now has."""
    due = guest.wait_working(20)
    a.replctl(NODE, "checkpoint")
    return due


def test_a_guest_of_libvirt_goes_on_by_the_libvirtd_of_b_when_a_has_lost_its_power(lab: Lab, port: int) -> None:
    a, b = VirtHost(lab, "a"), VirtHost(lab, "b")
    protected(a, b, port)
    guest = a.guest(1)
    due = acknowledged_before_a_checkpoint(a, guest)
    guest.console.wait_more(20, DEADLINE_S)
    a.cut_power(guest)
    acknowledged = guest.console.last

    told = json.loads(b.replctl(NODE, "failover", "--yes", "--json"))
    assert told["done"]
    heir = b.guest(2)
    found = int(heir.console.wait("mounted", BOOT_S))
    assert due <= found <= acknowledged + 1
    heir.wait_working(20)
    assert heir.state() == "running (booted)"
    last = heir.switch_off()
    wait_until(lambda: b.node.status()["stage"] == "done", "everything is committed")
    left = inspect(b.disk, unmounted=True)
    assert len(left) == last
    Loss(last, last, last).check(left, [1, 2])


def test_a_restart_of_the_node_is_a_pause_for_the_guest(lab: Lab, port: int) -> None:
    """With a libvirt that knows <reconnect>. An older one pauses the guest by its I/O error; after `virsh resume` it
    goes on as if nothing had been."""
    a, b = VirtHost(lab, "a"), VirtHost(lab, "b")
    protected(a, b, port)
    guest = a.guest(1)
    guest.wait_working(20)
    waits = "<reconnect delay='60'/>" in guest.xml
    assert waits != ("error_policy='stop'" in guest.xml)
    a.node.kill()
    if not waits:
        wait_until(lambda: guest.state() == "paused (I/O error)", "libvirt has paused the guest")
    before = guest.console.last
    a.node.start()

    def goes_on() -> bool:
        # Once is not enough: the request that is made again only has QEMU begin to connect, and fails.
        if not waits and guest.state().startswith("paused"):
            a.libvirtd.virsh("resume", NODE)
        return guest.console.last >= before + 20

    wait_until(goes_on, "the guest goes on")
    assert guest.state().startswith("running")
    last = guest.switch_off()
    a.replctl(NODE, "checkpoint")
    left = inspect(a.disk, unmounted=True)
    assert len(left) == last
    Loss(last, last, last).check(left, [1])
