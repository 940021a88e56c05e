# SPDX-License-Identifier: BSD-3-Clause
"""systemd is the first process of both hosts: corosync and Pacemaker are Debian's services, and the node is the one
that is installed, as its own user, in its sandbox."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.configuration import NODE
from cluster.power import Host
from cluster.site import Site

Make = Callable[..., Site]

pytestmark = pytest.mark.timeout(900)

UNIT = f"nbdkit-replication@{NODE}"


def state(host: Host, kind: str) -> str:
    """Of the unit of that kind."""
    return host.run("systemctl", "is-active", f"{UNIT}.{kind}").stdout.strip()


@pytest.fixture
def services(site: Make) -> Site:
    """Whole, with the guest on node-a."""
    made = site(systemd=True, service="auto")
    made.begin()
    return made


def test_the_node_is_a_service_of_systemd(services: Site) -> None:
    it = services
    owner, copy = it.whole()
    for host in it.hosts:
        assert (state(host, "service"), state(host, "socket")) == ("active", "active")
        assert host.run("systemctl", "is-enabled", f"{UNIT}.service").stdout.strip() == "disabled"
        process = host.told("systemctl", "show", "--property=MainPID", "--value", f"{UNIT}.service").strip()
        assert host.told("ps", "-o", "user:32=", "-p", process).strip() == "nbdkit-replication"

    # systemd starts it again before the cluster looks, or the cluster does: either way its guest goes on.
    begins = len(it.journal.begins())
    owner.told("systemctl", "kill", "--signal=KILL", "--kill-who=main", f"{UNIT}.service")
    it.wait(lambda: len(it.journal.begins()) > begins, "a guest is started for the new process")
    it.whole()
    assert it.switch.log == [], "nobody was fenced"

    # A standby stops what systemd has started, the socket as well.
    owner, copy = it.whole()
    owner.told("crm_standby", "--update", "on", "--node", owner.name)
    it.wait_promoted(copy)
    it.wait(lambda: state(owner, "service") != "active", "the service is stopped")
    assert (state(owner, "service"), state(owner, "socket")) == ("inactive", "inactive")
    [*_, begin] = it.journal.begins()
    before = [line for line in it.journal.acknowledged() if line.generation == begin.before]
    assert begin.number >= before[-1].number + 1, "everything that was answered is there"
    owner.told("crm_standby", "--delete", "--node", owner.name)
    assert it.whole() == (copy, owner)

    # A host that has lost power boots, its cluster starts, and its node is one of that again.
    it.switch.stays_off.add(copy.name)  # it would be back before the other one is promoted
    copy.power_off()
    it.wait_promoted(owner)
    copy.power_on()
    assert it.whole() == (owner, copy)
    assert [(what, who) for _, what, who in it.switch.log] == [("reboot", copy.name)]
    assert it.journal.violations() == []


def test_a_host_that_is_shut_down_hands_over_before_its_node_is_stopped(services: Site) -> None:
    """systemd stops everything at once; the node and its socket have to wait for Pacemaker."""
    it = services
    owner, copy = it.whole()
    owner.run("systemctl", "poweroff")
    it.wait_promoted(copy)
    [*_, begin] = it.journal.begins()
    before = [line for line in it.journal.acknowledged() if line.generation == begin.before]
    assert begin.number >= before[-1].number + 1, "everything that was answered is there"
    it.wait(lambda: not owner.on, "the host is off")
    assert "error" not in (owner.folder / "srv/guest.log").read_text().lower(), "the guest was stopped first"
    assert it.switch.log == [], "nobody was fenced"
    owner.power_on()
    assert it.whole() == (copy, owner)
    assert it.journal.violations() == []
