# SPDX-License-Identifier: BSD-3-Clause
"""What the agent says of itself: parameters, actions, and how long they may take (action meta-data)."""

from __future__ import annotations

from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr


class Parameter(NamedTuple):
    """One of the agent's parameters."""

    name: str
    short: str
    long: str
    type: str = "string"
    default: str | None = None
    required: bool = False
    unique: bool = False
    reloadable: bool = False


PARAMETERS = (
    Parameter(
        "node",
        "The node's NAME",
        'The NAME of the node of this host: its file is /etc/nbdkit-replication.d/NAME.toml, with role="auto", peer= '
        "and checkpoint-interval=, on every host of the cluster (replication.toml(5)).",
        required=True,
        unique=True,
    ),
    Parameter(
        "max_age",
        "Oldest checkpoint that may be promoted, in seconds",
        "A copy whose last checkpoint is older than this number of seconds is not promoted after its owner has died; "
        "0: whatever its age. What loses nothing has no such limit: a move, an owner that comes back, and a copy whose "
        "owner has left in good order. With a value that is no number no copy is promoted that lacks anything.",
        type="integer",
        default="60",
        reloadable=True,
    ),
    Parameter(
        "service",
        "Who runs the node: auto, systemd or process",
        "systemd: the units nbdkit-replication@NAME, which must not be enabled. process: the agent itself starts "
        "nbdkit-replication(8), as root. auto: systemd where it runs the host.",
        default="auto",
    ),
    Parameter(
        "log",
        "Where the node writes, with service=process",
        "The file to which a node writes that the agent itself has started; systemd's go to the journal.",
        default="/var/log/nbdkit-replication.log",
    ),
)

DEFAULTS = {parameter.name: parameter.default for parameter in PARAMETERS if parameter.default is not None}

ACTIONS: tuple[tuple[str, dict[str, str]], ...] = (
    # systemd gives a start as long: the overlays of large disks are looked through.
    ("start", {"timeout": "300s"}),
    ("stop", {"timeout": "40s"}),
    ("promote", {"timeout": "90s"}),
    # What the disk has not made stable yet is waited for.
    ("demote", {"timeout": "180s"}),
    ("monitor", {"timeout": "20s", "interval": "5s", "role": "Promoted", "depth": "0"}),
    ("monitor", {"timeout": "20s", "interval": "7s", "role": "Unpromoted", "depth": "0"}),
    ("notify", {"timeout": "30s"}),
    ("reload-agent", {"timeout": "20s"}),
    ("meta-data", {"timeout": "5s"}),
    ("validate-all", {"timeout": "20s"}),
)

_SHORT = "A disk that nbdkit-replication keeps on two hosts"
_LONG = """\
A node of nbdkit-replication as a promotable clone: on each host one node with the same NAME, whose file has role="auto"
and peer=. Promoted, it owns the disk and serves the guest; unpromoted, it keeps a copy of the owner's.
A move loses nothing. When the owner has died, and the cluster has fenced it, the copy goes on from its last checkpoint.
Clone options: promotable=true notify=true interleave=true. The cluster must have fencing.
The first owner is made by hand, once: replctl NAME promote."""

# The DTD of resource-agents knows neither reload-agent nor reloadable, which Pacemaker wants of OCF 1.1. What stands
# here comes before it.
_HEAD = """\
<?xml version="1.0"?>
<!DOCTYPE resource-agent SYSTEM "ra-api-1.dtd" [
<!ATTLIST action name NMTOKEN #REQUIRED>
<!ATTLIST parameter reloadable (1|0) "0">
]>
"""


def to_xml(version: str) -> str:
    """The whole document."""
    lines = [f'<resource-agent name="replication" version={quoteattr(version)}>', "<version>1.1</version>"]
    lines += [f'<longdesc lang="en">{escape(_LONG)}</longdesc>', f'<shortdesc lang="en">{escape(_SHORT)}</shortdesc>']
    lines.append("<parameters>")
    for parameter in PARAMETERS:
        flags = "".join(f' {flag}="{int(getattr(parameter, flag))}"' for flag in ("required", "unique", "reloadable"))
        default = "" if parameter.default is None else f" default={quoteattr(parameter.default)}"
        lines += [
            f'<parameter name="{parameter.name}"{flags}>',
            f'<longdesc lang="en">{escape(parameter.long)}</longdesc>',
            f'<shortdesc lang="en">{escape(parameter.short)}</shortdesc>',
            f'<content type="{parameter.type}"{default}/>',
            "</parameter>",
        ]
    lines += ["</parameters>", "<actions>"]
    for name, settings in ACTIONS:
        lines.append(f'<action name="{name}"' + "".join(f' {key}="{value}"' for key, value in settings.items()) + "/>")
    return _HEAD + "\n".join([*lines, "</actions>", "</resource-agent>", ""])
