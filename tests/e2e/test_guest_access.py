# SPDX-License-Identifier: BSD-3-Clause
"""Who may open a guest's export, and two doors in one process: a Unix socket for the guest, a TCP port for the pair.

The remote client sits in a network namespace that a veth pair joins to this one.
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest
from pyroute2 import IPRoute, NetNS, netns

from certificates import PrimaryWithTwoDoors, SecondaryWithTwoDoors
from content import KIB, MIB, pattern
from lab import Lab
from nodes import Primary
from waiting import DEADLINE_S, wait_until

OPEN = """
import json, sys, nbd
from pyroute2 import netns
netns.setns(sys.argv[1])
answers = {}
for uri in sys.argv[2:]:
    handle = nbd.NBD()
    try:
        handle.connect_uri(uri)
        answers[uri] = "open"
        handle.shutdown()
    except nbd.Error as error:
        answers[uri] = error.string
handle = nbd.NBD()
handle.set_opt_mode(True)
handle.connect_uri(sys.argv[2])
listed = []
handle.opt_list(lambda name, _: listed.append(name) or 0)
handle.opt_abort()
print(json.dumps([answers, sorted(listed)]))
"""


class FarHost:
    """A network namespace at the other end of a cable."""

    def __init__(self) -> None:
        self.name = f"replication-{os.getpid()}"
        self._cable = f"rep{os.getpid()}"
        # A /30 of 198.18.0.0/15, which is for tests (RFC 2544), for each process that runs them.
        base = int(ipaddress.IPv4Address("198.18.0.0")) + os.getpid() % 2**15 * 4
        self.here, self.there = (str(ipaddress.IPv4Address(base + number)) for number in (1, 2))
        netns.create(self.name)
        try:
            with IPRoute() as near, NetNS(self.name) as far:
                near.link("add", ifname=self._cable, kind="veth", peer={"ifname": "far0", "net_ns_fd": self.name})
                for route, name, address in ((near, self._cable, self.here), (far, "far0", self.there)):
                    index = route.link_lookup(ifname=name)[0]
                    route.addr("add", index=index, address=address, prefixlen=30)
                    route.link("set", index=index, state="up")
        except BaseException:
            self.close()
            raise

    def try_to_open(self, *uris: str) -> tuple[dict[str, str], list[str]]:
        """What becomes of each URI when a client there opens it, and which exports it is shown."""
        command = [sys.executable, "-c", OPEN, self.name, *uris]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stderr
        answers, listed = json.loads(done.stdout)
        return answers, listed

    def close(self) -> None:
        """Remove the namespace, and the cable with it."""
        with IPRoute() as near:
            for index in near.link_lookup(ifname=self._cable):
                near.link("del", index=index)
        netns.remove(self.name)


@pytest.fixture
def far() -> Iterator[FarHost]:
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")
    host = FarHost()
    try:
        yield host
    finally:
        host.close()


def test_a_guest_over_unix_and_the_pair_over_tcp(lab: Lab) -> None:
    """One secondary, two listeners by socket activation: each carries its traffic, and a restart finds both again."""
    secondary = SecondaryWithTwoDoors(lab.folder, [MIB], extra_arguments=["guest-access=local"])
    lab.start(secondary)
    secondary.start_replication()
    primary = lab.start(Primary(lab.folder, secondary.tcp_uri("nbd"), [MIB]))
    primary.start_replication()
    theirs, ours = pattern(1, 100 * KIB), pattern(2, 50 * KIB)
    primary.connect("disk0").pwrite(theirs, 0)
    guest = secondary.connect("top0")
    guest.pwrite(ours, 512 * KIB)
    assert bytes(guest.pread(len(ours), 512 * KIB)) == ours
    primary.checkpoint()
    content = (lab.folder / "secondary-disk0.raw").read_bytes()
    assert content[: len(theirs)] == theirs
    assert not any(content[len(theirs) :])
    primary.terminate()
    secondary.restart()
    guest = secondary.connect("top0")
    guest.pwrite(ours, 512 * KIB)
    assert bytes(guest.pread(len(ours), 512 * KIB)) == ours
    handle = nbd.NBD()
    handle.connect_uri(secondary.tcp_uri("nbd", "disk0"))
    assert handle.get_size() == MIB
    handle.shutdown()


def test_loopback_is_local(lab: Lab) -> None:
    secondary = lab.start(SecondaryWithTwoDoors(lab.folder, [MIB], extra_arguments=["guest-access=local"]))
    for export in ("top0", "disk0"):
        handle = nbd.NBD()
        handle.connect_uri(secondary.tcp_uri("nbd", export))
        assert handle.get_size() == MIB
        handle.shutdown()


@pytest.mark.parametrize("access", ["any", "local", None])
def test_a_guest_face_for_local_clients_is_closed_to_others(lab: Lab, far: FarHost, access: str | None) -> None:
    keys = [] if access is None else [f"guest-access={access}"]
    secondary = lab.start(SecondaryWithTwoDoors(lab.folder, [MIB], extra_arguments=keys, host="0.0.0.0"))
    guest, target = (secondary.tcp_uri("nbd", export, far.here) for export in ("top0", "disk0"))
    answers, listed = far.try_to_open(guest, target)
    assert answers[target] == "open"
    assert {"disk0", "top0"} <= set(listed)
    if access == "local":
        assert answers[guest] != "open"
        wait_until(lambda: "guest-access" in secondary.stderr(), "the log says why")
    log = [line for line in secondary.stderr().splitlines() if "guest-access" in line]
    if access == "local":
        [line] = log
        assert f"guest-access=local: 'top0' is for clients on this host, and the client at {far.there} port" in line
    else:
        assert answers[guest] == "open"
        assert not log
    assert secondary.connect("top0").get_size() == MIB


@pytest.mark.parametrize("sizes", [[MIB], []], ids=["with a disk", "that only forwards"])
def test_a_disk_of_a_primary_for_local_clients_is_closed_to_others(lab: Lab, far: FarHost, sizes: list[int]) -> None:
    """By its name, and as the default export."""
    secondary = lab.start(SecondaryWithTwoDoors(lab.folder, [MIB]))
    uri = secondary.tcp_uri("nbd", "" if sizes else "disk0")
    primary = PrimaryWithTwoDoors(lab.folder, uri, sizes, extra_arguments=["guest-access=local"], host="0.0.0.0")
    lab.start(primary)
    named, default = (primary.tcp_uri("nbd", export, far.here) for export in ("disk0", ""))
    answers, listed = far.try_to_open(named, default)
    assert "open" not in answers.values()
    assert listed == ["disk0"]
    primary.wait_said("guest-access=local: 'disk0' is for clients on this host", 2)
    assert primary.connect("disk0").get_size() == MIB


def keepalive_timers(port: int) -> list[int]:
    """Of the connections that a listener on `port` has accepted: the kind of the kernel's timer (proc_net_tcp(5)),
    2 when the client will be asked for a sign of life."""
    timers = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        established = fields[3] == "01"
        if established and int(fields[1].partition(":")[2], 16) == port:
            timers.append(int(fields[5].partition(":")[0]))
    return timers


def test_a_client_over_tcp_is_watched_by_the_kernel(lab: Lab) -> None:
    secondary = lab.start(SecondaryWithTwoDoors(lab.folder, [MIB]))
    handle = nbd.NBD()
    handle.connect_uri(secondary.tcp_uri("nbd", "disk0"))
    # Something just sent and not yet acknowledged has another timer for a moment.
    wait_until(lambda: keepalive_timers(secondary.port) == [2], "the connection has a keepalive timer")
    handle.shutdown()
