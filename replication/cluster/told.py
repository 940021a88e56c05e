# SPDX-License-Identifier: BSD-3-Clause
"""What the cluster tells an agent: the environment of one call.

https://github.com/ClusterLabs/OCF-spec (ra/1.1), and Pacemaker's `OCF_RESKEY_CRM_meta_...` for what it adds.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from replication.replctl import nodes

from .metadata import DEFAULTS

_META = "OCF_RESKEY_CRM_meta_"
_TIMEOUT_MS = 20_000
"""Where the cluster says nothing: what a monitor usually has."""

_SERVICES = ("auto", "systemd", "process")
_TRUE = ("true", "yes", "1", "on", "y")
_AT_MOST_ONE = (("promoted_max", "master_max"), ("promoted_node_max", "master_node_max"), ("clone_node_max",))
CLONE = ("notify", *(names[0].replace("_", "-") for names in _AT_MOST_ONE))
"""The clone's options that may be wrong."""
_SPARE = 0.15
"""Of the time that the cluster gives: what an action keeps for its own end."""


@dataclass(frozen=True)
class Told:
    """One call. Names are those of cluster nodes."""

    resource: str
    """Without the number of the clone's instance."""
    clustered: bool
    """Pacemaker asks, and nobody who tries the agent by hand."""
    node: str
    """The node of this host that is the resource: its NAME; "" if none is given, or what is given is no name."""
    here: str
    service: str
    """auto, systemd or process; "" if it is none of these: then it may be either."""
    max_age_s: float | None
    """0: any. None if it cannot be used: then no age is young enough."""
    log: str
    folder: str
    """Of the cluster's run-time files: empty after a boot."""
    repeated: bool
    """This is a monitor that is repeated, not a probe."""
    deadline: float
    """time.monotonic() at which the action has to have ended."""
    event: str
    """Of notify: `post-promote` and the like."""
    active: frozenset[str] | None
    """Where the resource runs and is to go on; None if the cluster does not say (notify=false)."""
    promoted: frozenset[str]
    """Where it is promoted."""
    to_promote: frozenset[str]
    """Where it is about to be."""
    wrong: Mapping[str, str] = field(default_factory=dict)
    """Of each parameter, or option of the clone, that cannot be used: why. A monitor or a stop that failed by it would
    end in fencing."""

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, 0 at least."""
        return max(0.0, self.deadline - time.monotonic())


def read(environment: Mapping[str, str]) -> Told:
    """Never fails: what cannot be used is in `wrong`."""
    wrong: dict[str, str] = {}

    def parameter(name: str) -> str:
        return environment.get(f"OCF_RESKEY_{name}") or DEFAULTS.get(name, "")

    def meta(name: str) -> str:
        return environment.get(_META + name, "")

    def hosts(*names: str) -> frozenset[str]:
        return frozenset(host for name in names for host in meta(f"notify_{name}_uname").split())

    timeout_s = _milliseconds(meta("timeout")) / 1000
    promoted = hosts("promoted", "master")
    # In an action there is no type, only the lists. An older name of a role stands beside the newer one.
    runs = hosts("active", "unpromoted", "slave") | promoted
    told = any(name.startswith(_META + "notify_") for name in environment)
    event = "-".join(filter(None, (meta("notify_type"), meta("notify_operation"))))
    node, service, age = (parameter(name) for name in ("node", "service", "max_age"))
    if not nodes.is_name(node):
        wrong["node"] = f"node={node} is not the NAME of a node" if node else "the parameter node is missing: the NAME"
    if service not in _SERVICES:
        wrong["service"] = f"service={service} should be one of {', '.join(_SERVICES)}"
    wrong.update(_of_clone(meta))
    if (max_age_s := _seconds(age)) is None:
        wrong["max_age"] = f"max_age={age} is not a number of seconds"
    return Told(
        resource=environment.get("OCF_RESOURCE_INSTANCE", "default").partition(":")[0],
        clustered="OCF_RESKEY_crm_feature_set" in environment,
        node="" if "node" in wrong else node,
        here=meta("on_node") or socket.gethostname(),
        service="" if "service" in wrong else service,
        max_age_s=max_age_s,
        log=parameter("log"),
        folder=environment.get("HA_RSCTMP") or "/run/resource-agents",
        repeated=meta("interval") not in ("", "0"),
        deadline=time.monotonic() + timeout_s * (1 - _SPARE),
        event=event,
        active=(runs - hosts("stop")) | hosts("start") if told else None,
        promoted=promoted,
        to_promote=hosts("promote"),
        wrong=wrong,
    )


def _of_clone(meta: Callable[[str], str]) -> dict[str, str]:
    """What of the clone's options, as far as they are told, is not for this agent."""
    wrong = {}
    if (notify := meta("notify")) and notify.lower() not in _TRUE:
        wrong["notify"] = f"notify={notify}: the clone needs notify=true, else nobody is known to be gone"
    for name, *older in _AT_MOST_ONE:
        value = next(filter(None, map(meta, (name, *older))), "")
        if value not in ("", "1"):
            option = name.replace("_", "-")
            wrong[option] = f"{option}={value}: one host owns the disks, and each host has one node"
    return wrong


def _milliseconds(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else _TIMEOUT_MS


def _seconds(text: str) -> float | None:
    number = text.removesuffix("s")
    return float(number) if number.isascii() and number.isdigit() and len(number) <= 8 else None
