# SPDX-License-Identifier: BSD-3-Clause
"""Two hosts with Debian's corosync and Pacemaker, a replicated disk, and a guest that follows it; and a third host with
a vote, where a test asks for one.

eth0 (10.78.0.x)   the cluster's own network
eth1 (10.79.0.x)   the pair's
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from checkout import REPOSITORY
from cluster.booted import Booted
from cluster.configuration import NAMES, NODE, WITNESS, cib, corosync, node_file
from cluster.journal import Journal
from cluster.power import HERE, Host, Switch
from guestimages import Images, copy_sparse
from waiting import Stuck

DISK_BYTES = 64 << 20
"""As long as a guest writes 50 records a second, for five minutes."""
CHANGE_S = 150.0
"""Longest wait for anything that the cluster does by itself."""
REPLCTL = "/usr/local/bin/replctl"
AGENT = "/usr/lib/ocf/resource.d/nbdkit/replication"
CLUSTER_NETWORK, PAIR_NETWORK = "eth0", "eth1"
SWITCH = "rc-switch"
"""Of three hosts' networks: between two there is a cable."""


class Site:
    """The whole of it; `close` ends everything. The guest's journal is outside of both hosts."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """All hosts are off. `options` are those of `cib`, `token_ms` and `disk_bytes`; with `images` the guest is one
        in QEMU, with `witness` there is a third host, with `systemd` that is the first process of each, `made` is the
        text of a configuration in place of that of `cib`, and `node_keys` and `node_lines` go into the node's file, the
        latter below [service]."""
        self.folder = folder
        witness: bool = options.pop("witness", False)
        kind: type[Host] = Booted if options.pop("systemd", False) else Host
        names = [*NAMES, *([WITNESS] if witness else [])]
        self.networks = [f"rc-{name[-1]}" for name in names]
        self._make_networks()
        self.all = [kind(name, folder / name, net) for name, net in zip(names, self.networks, strict=True)]
        self.hosts = self.all[:2]
        """Those with the disk."""
        self.a, self.b = self.hosts
        self.switch = Switch(folder / "switch.sock", self.all)
        self.journal = Journal(folder / "journal")
        token_ms = options.pop("token_ms", 1000)
        disk_bytes: int = options.pop("disk_bytes", DISK_BYTES)
        images: Images | None = options.pop("images", None)
        keys: str = options.pop("node_keys", "")
        lines: str = options.pop("node_lines", "")
        program = [HERE / "writer.py", self.journal.path]
        if images is not None:
            program = [HERE / "machine.py", self.journal.path, images.kernel, images.initramfs]
        made = options.pop("made", None) or cib(folder, program, names=names, **options)
        for number, host in enumerate(self.all, 1):
            for below in ("etc", "srv", "pacemaker/cib"):
                (host.folder / below).mkdir(parents=True)
            (host.folder / "etc/corosync.conf").write_text(corosync(names, token_ms))
            (host.folder / "pacemaker/cib/cib.xml").write_text(made)
            if host not in self.hosts:
                continue
            (host.folder / f"etc/{NODE}.toml").write_text(node_file(number, keys, lines))
            disk = host.folder / "srv/disk.img"
            if images is not None and host is self.a:
                copy_sparse(images.disk, disk)
            else:
                with disk.open("wb") as file:
                    file.truncate(disk_bytes if images is None else images.disk.stat().st_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """No process and no network is left."""
        self.switch.close()
        for host in self.all:
            host.power_off()
        for name in (*self.networks, *([SWITCH] if len(self.all) > 2 else [])):
            _ip("netns", "delete", name)

    # -- the hosts -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """All are on, the first owner is made on node-a, the guest runs there, and the pair is in sync."""
        for host in self.all:
            host.power_on()
        self.wait(lambda: all(self.runs(host) for host in self.hosts), "both nodes run", CHANGE_S)
        self.a.told(REPLCTL, NODE, "promote", "--yes")
        assert self.whole()[0] is self.a, self.report()

    def other(self, host: Host) -> Host:
        """Its peer."""
        return self.b if host is self.a else self.a

    def whole(self, timeout_s: float = CHANGE_S) -> tuple[Host, Host]:
        """Wait until a guest writes on one host, and the other has everything: both, the promoted one first."""

        def found() -> tuple[Host, Host] | None:
            owner = self.promoted()
            if owner is None:
                return None
            copy = self.other(owner)
            status = self.status(owner)
            fine = (
                status is not None and status["link"]["state"] == "in-sync" and status["checkpoint"]["age"] is not None
            )
            if fine and self.journal.writes(owner.name) and self.score(copy) == 1000:
                return owner, copy
            return None

        return self.wait(found, "whole", timeout_s)

    def promoted(self) -> Host | None:
        """Where the cluster says that it is, if all that are on agree on that."""
        found = {name for host in self.all if host.on for name in self._promoted_as_seen(host)}
        return next((host for host in self.hosts if found == {host.name}), None)

    def check_nobody(self) -> None:
        """AssertionError unless each host that is on answers, and says that nobody is promoted."""
        texts: dict[str, str] = {}

        def answered() -> bool:
            texts.update({host.name: self._monitor(host) for host in self.all if host.on})
            return bool(texts) and all("Node List" in text for text in texts.values())

        self.wait(answered, "crm_mon answers")
        assert not any("Promoted: [" in text for text in texts.values()), texts

    def _promoted_as_seen(self, host: Host) -> list[str]:
        text = self._monitor(host)
        line = next((line for line in text.splitlines() if "Promoted: [" in line), "")
        return [name for name in NAMES if name in line]

    def _monitor(self, host: Host) -> str:
        try:
            return host.run("crm_mon", "-1").stdout
        except subprocess.TimeoutExpired:
            return ""

    def wait_promoted(self, host: Host, timeout_s: float = CHANGE_S) -> None:
        """The cluster has promoted that one, and its guest writes."""
        self.wait(lambda: self.promoted() is host, f"{host.name} is promoted", timeout_s)
        self.wait(lambda: self.journal.writes(host.name), f"the guest on {host.name} writes", timeout_s)

    def runs(self, host: Host) -> bool:
        """The node's process answers."""
        return self.status(host) is not None

    def status(self, host: Host) -> dict[str, Any] | None:
        """query-replication, None without an answer."""
        done = host.run(REPLCTL, "--timeout", "5", NODE, "status", "--json") if host.on else None
        if done is None or done.returncode != 0:
            return None
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def score(self, host: Host) -> int | None:
        """What the cluster knows of how good an owner it would be."""
        for asked in self.hosts:
            if not asked.on:
                continue
            done = asked.run("crm_attribute", "--promotion=disk", f"--node={host.name}", "--query", "--quiet")
            text = done.stdout.strip()
            return int(text) if done.returncode == 0 and text.lstrip("-").isdigit() else None
        return None

    # -- the networks --------------------------------------------------------------------------------------

    def cut(self, *interfaces: str) -> None:
        """Both directions."""
        self.isolate(self.a, *interfaces)

    def isolate(self, host: Host, *interfaces: str) -> None:
        """It reaches nobody over these, and nobody reaches it."""
        for interface in interfaces:
            _ip("-n", self.networks[self.all.index(host)], "link", "set", interface, "down")

    def mend(self, *interfaces: str) -> None:
        """What `cut` and `cut_from` have done is undone."""
        for network in self.networks:
            for interface in interfaces:
                if interface == PAIR_NETWORK and network not in self.networks[:2]:
                    continue
                _ip("-n", network, "link", "set", interface, "up")
                _ip("-n", network, "neigh", "flush", "dev", interface, "nud", "permanent")

    def cut_from(self, host: Host, *interfaces: str) -> None:
        """What that host sends is lost, what it is sent arrives: its frames go to an address that nobody has."""
        index = self.hosts.index(host)
        for interface in interfaces:
            net = 78 if interface == CLUSTER_NETWORK else 79
            peer = f"10.{net}.0.{2 - index}"
            where = ("lladdr", "02:00:00:00:00:99", "dev", interface, "nud", "permanent")
            _ip("-n", self.networks[index], "neigh", "replace", peer, *where)

    def _make_networks(self) -> None:
        for name in self.networks:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        pair = self.networks[:2]
        cables = ((CLUSTER_NETWORK, 78, self.networks), (PAIR_NETWORK, 79, pair))
        if len(self.networks) > 2:
            self._make_switch()
        for interface, net, networks in cables:
            if len(networks) == 2:
                one, other = networks
                _ip("-n", one, "link", "add", interface, "type", "veth", "peer", "name", interface, "netns", other)
            for number, name in enumerate(networks, 1):
                _ip("-n", name, "addr", "add", f"10.{net}.0.{number}/24", "dev", interface)
                _ip("-n", name, "link", "set", interface, "up")

    def _make_switch(self) -> None:
        subprocess.run(["ip", "netns", "delete", SWITCH], capture_output=True, check=False)
        _ip("netns", "add", SWITCH)
        _ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        _ip("-n", SWITCH, "link", "set", "bridge", "up")
        for name in self.networks:
            cable = ("type", "veth", "peer", "name", CLUSTER_NETWORK, "netns", name)
            _ip("-n", SWITCH, "link", "add", name, *cable)
            _ip("-n", SWITCH, "link", "set", name, "master", "bridge", "up")

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = CHANGE_S) -> Any:
        """As wait_until, but each look starts processes; what is so in the end is told."""
        deadline = time.monotonic() + timeout_s
        while True:
            if value := condition():
                return value
            if time.monotonic() > deadline:
                raise Stuck(f"not within {timeout_s:g} s: {what}\n{self.report()}")
            time.sleep(0.2)

    def idle(self, seconds: float) -> None:
        """Time in which nothing is to happen."""
        time.sleep(seconds)

    def report(self) -> str:
        """For a person who looks for the reason."""
        lines = []
        for host in self.all:
            lines.append(f"--- {host.name}: {'on' if host.on else 'off'}, score {self.score(host)}")
            if host.on:
                lines.append(host.run("crm_mon", "-1", "-f", "-A").stdout)
                done = host.run(REPLCTL, NODE, "status")
                lines.append(done.stdout or done.stderr)
            lines += _said(host.folder / "log/pacemaker/pacemaker.log")
            lines.append((host.folder / "console").read_text()[-2000:])
        return "\n".join([*lines, *self.journal.tail()])


def _said(log: Path) -> list[str]:
    """What the agent has printed lately."""
    words = ("replication:", "exit-reason", "fence", " error: ", "Result of")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line[:300] for line in lines if any(word in line for word in words)][-60:]


def install() -> None:
    """The plugin, the agent, the user of its service, and the fence agent, on the system under test."""
    subprocess.run(["make", "-s", "install"], cwd=REPOSITORY, check=True, capture_output=True, timeout=CHANGE_S)
    subprocess.run(["systemd-sysusers"], check=True, capture_output=True, timeout=CHANGE_S)
    fence = Path("/usr/sbin/fence_switch")
    fence.unlink(missing_ok=True)
    fence.symlink_to(HERE / "fence_switch")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=CHANGE_S, check=False)
    if done.returncode != 0:
        raise AssertionError(f"ip {' '.join(words)}: {done.stderr}")
