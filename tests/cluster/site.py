# SPDX-License-Identifier: BSD-3-Clause
"""Two hosts with Debian's corosync and Pacemaker, a replicated disk, and a guest that follows it.

eth0 (10.78.0.x)   the cluster's own network
eth1 (10.79.0.x)   the pair's
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from checkout import REPOSITORY
from cluster.journal import Journal
from cluster.power import HERE, Host, Switch
from guestimages import Images, copy_sparse
from waiting import Stuck

NODE = "vm1"
DISK_BYTES = 64 << 20
"""As long as a guest writes 50 records a second, for five minutes."""
CHANGE_S = 150.0
"""Longest wait for anything that the cluster does by itself."""
REPLCTL = "/usr/local/bin/replctl"
AGENT = "/usr/lib/ocf/resource.d/nbdkit/replication"
NAMES = ("node-a", "node-b")
CLUSTER_NETWORK, PAIR_NETWORK = "eth0", "eth1"

COROSYNC = """\
totem {{
  version: 2
  cluster_name: replication
  transport: knet
  token: {token_ms}
  crypto_cipher: none
  crypto_hash: none
}}
nodelist {{
  node {{
    ring0_addr: 10.78.0.1
    name: node-a
    nodeid: 1
  }}
  node {{
    ring0_addr: 10.78.0.2
    name: node-b
    nodeid: 2
  }}
}}
quorum {{
  provider: corosync_votequorum
  two_node: 1
  wait_for_all: 1
}}
logging {{
  to_logfile: yes
  logfile: /var/log/corosync/corosync.log
  to_syslog: no
  to_stderr: no
}}
"""

NODE_FILE = """\
role = "auto"
peer = "nbd://10.79.0.{peer}:10809"
autostart = true
checkpoint-interval = 1
durability = "power"
guest-face = "closed-until-promoted"
timeout = 3

[disk.disk0]
disk = "/srv/disk.img"
top-id = "guest"

[service]
listen = ["10.79.0.{own}:10809"]
"""


class Site:
    """The whole of it; `close` ends everything. The guest's journal is outside of both hosts."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """Both hosts are off. `options` are those of `cib`, `token_ms` and `disk_bytes`; with `images` the guest is one
        in QEMU."""
        self.folder = folder
        self.networks = [f"rc-{letter}" for letter in "ab"]
        self._make_networks()
        self.hosts = [Host(name, folder / name, net) for name, net in zip(NAMES, self.networks, strict=True)]
        self.a, self.b = self.hosts
        self.switch = Switch(folder / "switch.sock", self.hosts)
        self.journal = Journal(folder / "journal")
        token_ms = options.pop("token_ms", 1000)
        disk_bytes: int = options.pop("disk_bytes", DISK_BYTES)
        images: Images | None = options.pop("images", None)
        program = [HERE / "writer.py", self.journal.path]
        if images is not None:
            program = [HERE / "machine.py", self.journal.path, images.kernel, images.initramfs]
        for index, host in enumerate(self.hosts):
            for below in ("etc", "srv", "pacemaker/cib"):
                (host.folder / below).mkdir(parents=True)
            (host.folder / "etc/corosync.conf").write_text(COROSYNC.format(token_ms=token_ms))
            (host.folder / f"etc/{NODE}.toml").write_text(NODE_FILE.format(own=index + 1, peer=2 - index))
            (host.folder / "pacemaker/cib/cib.xml").write_text(cib(folder, program, **options))
            disk = host.folder / "srv/disk.img"
            if images is not None and index == 0:
                copy_sparse(images.disk, disk)
                continue
            with disk.open("wb") as file:
                file.truncate(disk_bytes if images is None else images.disk.stat().st_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """No process and no network is left."""
        self.switch.close()
        for host in self.hosts:
            host.power_off()
        for name in self.networks:
            _ip("netns", "delete", name)

    # -- the hosts -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Both are on, the first owner is made, the guest runs there, and the pair is in sync."""
        for host in self.hosts:
            host.power_on()
        self.wait(lambda: all(self.runs(host) for host in self.hosts), "both nodes run", CHANGE_S)
        self.a.told(REPLCTL, NODE, "promote", "--yes")
        self.whole()

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
        """Where the cluster says that it is, if both agree on that or one is off."""
        found = {name for host in self.hosts if host.on for name in self._promoted_as_seen(host)}
        return next((host for host in self.hosts if found == {host.name}), None)

    def check_nobody(self) -> None:
        """AssertionError unless each host that is on answers, and says that nobody is promoted."""
        texts: dict[str, str] = {}

        def answered() -> bool:
            texts.update({host.name: self._monitor(host) for host in self.hosts if host.on})
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
        for interface in interfaces:
            _ip("-n", self.networks[0], "link", "set", interface, "down")

    def mend(self, *interfaces: str) -> None:
        """What `cut` and `cut_from` have done is undone."""
        for network in self.networks:
            for interface in interfaces:
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
        one, other = self.networks
        for interface, net in ((CLUSTER_NETWORK, 78), (PAIR_NETWORK, 79)):
            _ip("-n", one, "link", "add", interface, "type", "veth", "peer", "name", interface, "netns", other)
            for index, name in enumerate(self.networks):
                _ip("-n", name, "addr", "add", f"10.{net}.0.{index + 1}/24", "dev", interface)
                _ip("-n", name, "link", "set", interface, "up")

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
        for host in self.hosts:
            lines.append(f"--- {host.name}: {'on' if host.on else 'off'}, score {self.score(host)}")
            if host.on:
                lines.append(host.run("crm_mon", "-1", "-f", "-A").stdout)
                done = host.run(REPLCTL, NODE, "status")
                lines.append(done.stdout or done.stderr)
            lines += _said(host.folder / "log/pacemaker/pacemaker.log")
            lines.append((host.folder / "console").read_text()[-2000:])
        return "\n".join([*lines, *self.journal.tail()])


def cib(
    folder: Path,
    program: Sequence[Path],
    *,
    stonith: bool = True,
    max_age_s: int = 20,
    priority_delay_s: int = 0,
) -> str:
    """The cluster's configuration, as its daemons find it at their first start."""

    def pairs(prefix: str, **values: object) -> str:
        return "".join(
            f'<nvpair id="{prefix}-{name}" name="{name.replace("_", "-") if prefix == "o" else name}" value="{value}"/>'
            for name, value in values.items()
        )

    options = pairs(
        "o",
        stonith_enabled=str(stonith).lower(),
        dc_deadtime="2s",
        have_watchdog="false",
        cluster_name="replication",
        priority_fencing_delay=f"{priority_delay_s}s",
    )
    operations = "".join(
        f'<op id="disk-{name}-{role}" name="{name}" interval="{interval}" timeout="{timeout}"'
        + (f' role="{role}"/>' if role else "/>")
        for name, interval, timeout, role in (
            ("monitor", "2s", "20s", "Promoted"),
            ("monitor", "3s", "20s", "Unpromoted"),
            ("start", "0", "60s", ""),
            ("stop", "0", "30s", ""),
            ("promote", "0", "60s", ""),
            ("demote", "0", "60s", ""),
            ("notify", "0", "20s", ""),
        )
    )
    fences = "".join(
        f'<primitive id="fence-{letter}" class="stonith" type="fence_switch">'
        + f'<instance_attributes id="fence-{letter}-p">'
        + pairs(f"f{letter}", pcmk_host_list=f"node-{letter}", path=folder / "switch.sock")
        + "</instance_attributes></primitive>"
        for letter in "ab"
    )
    return f"""\
<cib crm_feature_set="3.16.1" validate-with="pacemaker-3.9" epoch="1" num_updates="0" admin_epoch="1">
<configuration>
<crm_config><cluster_property_set id="options">{options}</cluster_property_set></crm_config>
<nodes/>
<resources>
<clone id="disk-clone"><meta_attributes id="disk-m">{pairs("dm", promotable="true", interleave="true", notify="true")}
</meta_attributes>
<primitive id="disk" class="ocf" provider="nbdkit" type="replication">
<instance_attributes id="disk-p">{pairs("dp", node=NODE, max_age=max_age_s, service="process", log="/srv/node.log")}
</instance_attributes>
<meta_attributes id="disk-mm">{pairs("dmm", priority="10")}</meta_attributes>
<operations>{operations}</operations></primitive></clone>
<primitive id="guest" class="ocf" provider="heartbeat" type="anything">
<instance_attributes id="guest-p">{
        pairs(
            "gp",
            binfile=program[0],
            cmdline_options=" ".join(map(str, program[1:])),
            logfile="/srv/guest.log",
            errlogfile="/srv/guest.log",
        )
    }</instance_attributes>
<operations><op id="guest-monitor" name="monitor" interval="3s" timeout="20s"/></operations></primitive>
{fences}
</resources>
<constraints>
<rsc_location id="l-a" rsc="fence-a" node="node-a" score="-INFINITY"/>
<rsc_location id="l-b" rsc="fence-b" node="node-b" score="-INFINITY"/>
<rsc_colocation id="with" rsc="guest" with-rsc="disk-clone" with-rsc-role="Promoted" score="INFINITY"/>
<rsc_order id="after" first="disk-clone" first-action="promote" then="guest" then-action="start"/>
</constraints>
<rsc_defaults><meta_attributes id="defaults">{
        pairs("rd", **{"resource-stickiness": "100"})
    }</meta_attributes></rsc_defaults>
</configuration><status/>
</cib>
"""


def _said(log: Path) -> list[str]:
    """What the agent has printed lately."""
    words = ("replication:", "exit-reason", "fence", " error: ", "Result of")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line[:300] for line in lines if any(word in line for word in words)][-60:]


def install() -> None:
    """The plugin, the agent and the fence agent, on the system under test."""
    subprocess.run(["make", "-s", "install"], cwd=REPOSITORY, check=True, capture_output=True, timeout=CHANGE_S)
    fence = Path("/usr/sbin/fence_switch")
    fence.unlink(missing_ok=True)
    fence.symlink_to(HERE / "fence_switch")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=CHANGE_S, check=False)
    if done.returncode != 0:
        raise AssertionError(f"ip {' '.join(words)}: {done.stderr}")
