# SPDX-License-Identifier: BSD-3-Clause
"""What the hosts of a site are configured with: corosync, Pacemaker and the node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NODE = "vm1"
NAMES = ("node-a", "node-b")
"""The two with the disk."""
WITNESS = "node-c"
"""A third host, which only has a vote."""

_COROSYNC = """\
totem {{
  version: 2
  cluster_name: replication
  transport: knet
  token: {token_ms}
  crypto_cipher: none
  crypto_hash: none
}}
nodelist {{
{nodes}
}}
quorum {{
  provider: corosync_votequorum
{quorum}
}}
logging {{
  to_logfile: yes
  logfile: /var/log/corosync/corosync.log
  to_syslog: no
  to_stderr: no
}}
"""

_TWO = """\
  two_node: 1
  wait_for_all: 1"""
_THREE = "  expected_votes: 3"

_NODE_FILE = """\
role = "auto"
peer = "nbd://10.79.0.{peer}:10809"
autostart = true
checkpoint-interval = 1
durability = "power"
guest-face = "closed-until-promoted"
timeout = 3
{keys}

[disk.disk0]
disk = "/srv/disk.img"
top-id = "guest"

[service]
listen = ["10.79.0.{own}:10809"]
{more}"""


def corosync(names: Sequence[str], token_ms: int) -> str:
    """corosync.conf: two hosts wait for each other, of three any two go on."""
    # A { ends its line, a } stands alone.
    nodes = "\n".join(
        f"  node {{\n    ring0_addr: 10.78.0.{number}\n    name: {name}\n    nodeid: {number}\n  }}"
        for number, name in enumerate(names, 1)
    )
    return _COROSYNC.format(token_ms=token_ms, nodes=nodes, quorum=_TWO if len(names) == 2 else _THREE)


def node_file(own: int, keys: str, more: str) -> str:
    """Of the node on the host of that number, 1 or 2, with more `keys`, and `more` lines of its service."""
    return _NODE_FILE.format(own=own, peer=3 - own, keys=keys, more=more)


def cib(
    folder: Path,
    program: Sequence[Path],
    *,
    names: Sequence[str] = NAMES,
    stonith: bool = True,
    max_age_s: int = 20,
    priority_delay_s: int = 0,
    service: str = "process",
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
        f'<primitive id="fence-{name}" class="stonith" type="fence_switch">'
        + f'<instance_attributes id="fence-{name}-p">'
        + pairs(f"f-{name}", pcmk_host_list=name, path=folder / "switch.sock")
        + "</instance_attributes></primitive>"
        for name in names
    )
    places = "".join(
        f'<rsc_location id="l-{name}" rsc="fence-{name}" node="{name}" score="-INFINITY"/>' for name in names
    )
    if WITNESS in names:
        never = 'score="-INFINITY" resource-discovery="never"'
        places += f'<rsc_location id="l-disk" rsc="disk-clone" node="{WITNESS}" {never}/>'
    return f"""\
<cib crm_feature_set="3.16.1" validate-with="pacemaker-3.9" epoch="1" num_updates="0" admin_epoch="1">
<configuration>
<crm_config><cluster_property_set id="options">{options}</cluster_property_set></crm_config>
<nodes/>
<resources>
<clone id="disk-clone"><meta_attributes id="disk-m">{pairs("dm", promotable="true", interleave="true", notify="true")}
</meta_attributes>
<primitive id="disk" class="ocf" provider="nbdkit" type="replication">
<instance_attributes id="disk-p">{pairs("dp", node=NODE, max_age=max_age_s, service=service, log="/srv/node.log")}
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
{places}
<rsc_colocation id="with" rsc="guest" with-rsc="disk-clone" with-rsc-role="Promoted" score="INFINITY"/>
<rsc_order id="after" first="disk-clone" first-action="promote" then="guest" then-action="start"/>
</constraints>
<rsc_defaults><meta_attributes id="defaults">{
        pairs("rd", **{"resource-stickiness": "100"})
    }</meta_attributes></rsc_defaults>
</configuration><status/>
</cib>
"""
