# SPDX-License-Identifier: BSD-3-Clause
"""The commands of replctl, one row each: add a row here, and an entry to man/replctl.pod.

Parser, help and completion are made of this table. A command's function is named with its module, which is imported
when the command runs. --json is an option of every command and stands in no row: `options.json` is there for all.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

WATCH_S = 2.0
LIST_S = 3.0
RECONNECT_S = 60
"""A restart of a node takes seconds, a repair by hand longer."""

TIMEOUT_S = 60.0
SOON_S = 5.0
"""For commands by which a manager decides: a cluster's monitor has 20 s, a hook of libvirt holds up a guest's start."""
WAIT_S = 60.0
TEST_S = 600.0
WITHIN_S = 10.0
"""A switch-over of a guest that goes on takes a second; Linux tells of a disk that has not answered for 30 s."""
RESIZE_S = 300.0
"""Above what a secondary may take to make its overlays anew, and the drain of the link."""

_COMMANDS = "replication.client.commands"
_ROLES = "replication.client.roles"


class On(Enum):
    """What a command works on, and so what its function is called with, before the parsed options."""

    NODE = "node"
    """One node that answers: a client.session.Session."""
    SOCKET = "socket"
    """One node that need not answer: the path of its control socket. The function returns an exit code."""
    CONFIG = "config"
    """One node of this host by its name, running or not: its name. (`replctl NAME command`)"""
    ANY = "any"
    """What its own arguments say; a node may be named as well: `options.node`, or None."""
    HOST = "host"
    """The host: no node can be named."""


@dataclass(frozen=True)
class Row:
    """One command."""

    name: str
    run: str
    """MODULE:FUNCTION"""
    text: str
    """The line in the help, without a full stop."""
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    on: On = On.NODE
    asks: Callable[[argparse.Namespace], bool] = lambda options: False
    """Whether it will ask for confirmation: refused before anything else where there is nobody to ask."""
    timeout_s: float = TIMEOUT_S
    """Longest wait for an answer, unless --timeout is given."""
    takes_command: bool = False
    """Whether a command may follow, behind `--`: `options.command`."""
    distinct: bool = False
    """Whether a node that is down, or hangs, has an exit code of its own also where it is given by a path."""

    def function(self) -> Callable[..., Any]:
        """Imports the module."""
        module, _, name = self.run.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found


def argument(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """As argparse's add_argument takes it. `complete` is what bash completes a value with: files, folders or nodes
    (choices complete themselves)."""
    return names, settings


def flag(name: str, text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An option without a value."""
    return argument(name, action="store_true", help=text)


def positive_seconds(text: str) -> float:
    """argparse's type for a duration."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 86400 * 365 or math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def whole_seconds(text: str) -> int:
    """argparse's type for a duration that QEMU takes in whole seconds."""
    if not text.isascii() or not text.isdigit() or int(text) > 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of seconds from 0 to 86400")
    return int(text)


_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def size(text: str) -> int:
    """argparse's type for a number of bytes, as the keys of a node have it."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isascii() or not number.isdigit() or len(number) > 15 or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 64M")
    return int(number) << _UNITS[unit]


def limits(text: str) -> dict[str, float]:
    """argparse's type for the limits of check."""
    from replication.client.check import limits as read  # noqa: PLC0415 (loaded by the command that needs it)

    return read(text)


YES = flag("--yes", "do not ask")

STAGES = ("none", "running", "failover", "failover-failed", "done")
LINKS = ("disconnected", "connecting", "synchronizing", "in-sync", "lost")
ROLES = ("primary", "secondary")

RECONNECT = argument(
    "--reconnect",
    metavar="SECONDS",
    type=whole_seconds,
    default=RECONNECT_S,
    help="how long the guest's requests wait for a node that has gone; 0: not at all (default: %(default)s)",
)

# Without a default: what fits is a question to the libvirt of the host.
DOMAIN_RECONNECT = argument(
    "--reconnect",
    metavar="SECONDS",
    type=whole_seconds,
    help="how long the guest's requests wait for a node that has gone; 0: not at all "
    f"(default: {RECONNECT_S}, or what the libvirt of this host can do instead)",
)

MONITOR = (
    argument("--monitor", metavar="URL", help="the monitor (default: $REPLCTL_MONITOR or http://127.0.0.1:10810)"),
    argument("--token-file", metavar="FILE", complete="files", help="a file whose first line is its token"),
    argument(
        "--tls-ca", metavar="FILE", complete="files", help="who has signed its certificate (default: the system's)"
    ),
)


def _unless_yes(options: argparse.Namespace) -> bool:
    return not options.yes


TABLE: tuple[Row, ...] = (
    Row(
        "list",
        "replication.replctl.listing:show",
        "show all nodes of this host: mode, stage, link, age of the checkpoint, lag, size, progress",
        (
            argument(
                "--within",
                metavar="SECONDS",
                type=positive_seconds,
                default=LIST_S,
                help="longest wait for all of them together (default: %(default)g)",
            ),
        ),
        on=On.HOST,
    ),
    Row(
        "status",
        f"{_COMMANDS}:status",
        "show mode, stage, error, last checkpoint, link and disks",
        (
            argument(
                "--watch",
                metavar="SECONDS",
                nargs="?",
                const=WATCH_S,
                type=positive_seconds,
                help=f"repeat every SECONDS (default: {WATCH_S:g})",
            ),
        ),
    ),
    Row(
        "start",
        f"{_COMMANDS}:start",
        "start replication",
        (
            argument(
                "--mode",
                choices=("primary", "secondary"),
                help="mode of the node after the start (default: the one that it has)",
            ),
            argument("--secondary", metavar="URI", help="NBD URI of the secondary, for a primary of a new pair"),
            argument(
                "--sync",
                choices=("auto", "none", "full", "digest", "verify"),
                help="what is sent first: what the secondary lacks, nothing, everything, everything that differs; or "
                "what it lacks, and then compare (default: auto)",
            ),
            flag("--discard-checkpoint", "do not keep the secondary's last checkpoint until it has everything"),
            flag("--force", "on a primary that runs: serve its guest, although it stands still"),
        ),
    ),
    Row(
        "checkpoint",
        "replication.client.quiesce:checkpoint",
        "take a checkpoint; on the primary it is one of the pair",
        (
            argument(
                "--quiesce",
                metavar="SOCKET",
                complete="files",
                help="have the guest agent of QEMU at this socket freeze the guest's file systems for it",
            ),
        ),
    ),
    Row(
        "verify",
        "replication.client.verify:verify",
        "compare the disks with the secondary's, while the guest writes (on the primary)",
        (
            argument(
                "--rate", metavar="SIZE", type=size, help="bytes to compare in a second, at most (default: resync-rate)"
            ),
            flag("--repair", "send what differs at once"),
            flag("--wait", "wait for the result; exit with code 1 unless the disks are equal"),
            flag("--cancel", "give up the comparison that is under way"),
        ),
    ),
    Row(
        "resize",
        "replication.client.resize:resize",
        "use what disks have grown by, when those of both nodes were grown (on the primary)",
        (
            argument("disk", metavar="DISK", nargs="?", help="its name (default: all disks)"),
            argument(
                "--size",
                metavar="SIZE",
                type=size,
                help="the new size (default: that of the smaller one of both nodes' disks)",
            ),
        ),
        timeout_s=RESIZE_S,
    ),
    Row(
        "test",
        "replication.replctl.rehearsal:test",
        "test a failover: export what it would give now, and throw that away (on the secondary)",
        (
            argument("action", choices=("start", "stop", "run"), help="begin one, end it, or do all of it"),
            argument("--name", metavar="NAME", help="its exports are TOP-ID.NAME (default: test, or the only one)"),
            argument(
                "--ends",
                metavar="SECONDS",
                type=positive_seconds,
                help="when it ends by itself, if nobody has stopped it (default: with the node's process)",
            ),
            argument("--uri", metavar="URI", help="where the node listens (default: the guest's socket of a NAME)"),
            argument(
                "--deadline",
                metavar="SECONDS",
                type=positive_seconds,
                default=TEST_S,
                help="with run, when it has failed (default: %(default)g)",
            ),
            flag("--boot", "with run, boot a machine from the test in QEMU, with the arguments of QEMU behind --"),
            argument(
                "--marker", metavar="TEXT", help="with run, it has passed when the command, or the console, says TEXT"
            ),
            flag("--agent", "with run, it has passed when the QEMU guest agent of the machine answers"),
            flag("--network", "with run, a network of QEMU's own for the machine, from which nothing can be reached"),
            argument(
                "--memory", metavar="MIB", type=int, default=1024, help="with run, MiB of the machine (default: 1024)"
            ),
            argument("--qemu", metavar="PROGRAM", complete="files", help="with run, QEMU (default: that of this host)"),
            flag(
                "--if-secondary", "with run, do nothing on a node that is no secondary now, for a timer on both hosts"
            ),
        ),
        takes_command=True,
    ),
    Row(
        "retry",
        f"{_COMMANDS}:retry",
        "resume a commit that has failed",
        (flag("--force", "do it although there is no valid checkpoint"),),
    ),
    Row("stop", f"{_COMMANDS}:stop", "stop replication as planned and keep everything that the primary wrote"),
    Row(
        "discard",
        f"{_COMMANDS}:discard",
        "after a split brain: allow the primary to overwrite what was written here",
        (
            flag("--checkpoint", "give up the last checkpoint, for a resync that is larger than the hidden disk"),
            YES,
        ),
    ),
    Row(
        "promote",
        f"{_ROLES}:promote",
        "make the node the owner of its disks, from any state; nothing if it is",
        (
            argument("--peer", metavar="URI", help="NBD URI of the other node (default: the key peer)"),
            flag("--force", "do it although the node is outdated, or its primary is connected"),
            flag("--fenced", "the other node is fenced: wait for no lease of it"),
            YES,
        ),
        asks=_unless_yes,
        distinct=True,
    ),
    Row(
        "demote",
        f"{_COMMANDS}:demote",
        "make the node a secondary, from any state; nothing if it is",
        (flag("--lossless", "only if the other node has everything, and has said so"), YES),
    ),
    Row(
        "failover",
        f"{_COMMANDS}:failover",
        "lock the primary out and make this secondary the owner of the disk",
        (
            YES,
            flag("--check", "only show whether it is allowed and what would be lost"),
            flag("--force", "do it although there is no valid checkpoint, or the node is outdated"),
            argument(
                "--max-age",
                metavar="SECONDS",
                type=positive_seconds,
                help="only if the last checkpoint is not older",
            ),
            flag("--only-in-sync", "only if the node was in sync when the primary was last heard of"),
            flag("--lossless", "only if the primary left in good order; keep all that it has written"),
            flag("--no-primary", "only if no primary is connected and heard of"),
            flag("--fenced", "the other node is fenced: wait for no lease of it"),
        ),
        asks=lambda options: not options.yes and not options.check,
    ),
    Row(
        "switchover",
        f"{_COMMANDS}:switchover",
        "drain and stop the primary, then make the secondary the owner of the disk",
        (
            argument(
                "--peer", metavar="SOCKET", required=True, complete="files", help="the control socket of the other side"
            ),
            flag("--live", "the guest has been migrated to the secondary's host, and goes on: follow-owner=true"),
            argument(
                "--within",
                metavar="SECONDS",
                type=positive_seconds,
                default=WITHIN_S,
                help="with --live, how long its requests wait at most (default: %(default)g)",
            ),
            YES,
        ),
        asks=_unless_yes,
    ),
    Row(
        "jobs",
        f"{_COMMANDS}:jobs",
        "show background jobs",
        (flag("--watch", "repeat until all have ended, except copy-before-write"),),
    ),
    Row(
        "cancel",
        f"{_COMMANDS}:cancel",
        "cancel a background job",
        (argument("job", metavar="JOB", help="its name, from `replctl jobs`"),),
    ),
    Row(
        "init",
        "replication.replctl.initial:init",
        "write the file of a new node of this host, with comments; never over one that is there",
        (
            argument("name", metavar="NAME", help="what the node is to be called"),
            argument("--mode", choices=("primary", "secondary"), required=True, help="mode of the node"),
            argument(
                "--disk",
                metavar="[NAME:]PATH",
                action="append",
                required=True,
                complete="files",
                help="a disk of the guest, by path or NBD URI; again for each disk",
            ),
            argument("--peer", metavar="HOST[:PORT]", help="where the secondary listens (needed for a primary)"),
            argument(
                "--listen",
                metavar="[ADDRESS]:PORT",
                action="append",
                help="where the other host connects (default: a secondary :10809, a primary nowhere)",
            ),
            argument("--tls", metavar="DIR", complete="folders", help="the folder of the certificates, for TLS"),
            argument("--top-id", metavar="EXPORT", help="a secondary's export for the guest (default: guest)"),
            argument("--overlays", metavar="DIR", complete="folders", help="where a secondary has its overlays"),
            argument(
                "--checkpoint-interval",
                metavar="SECONDS",
                type=positive_seconds,
                help="how often a primary takes a checkpoint (default: 1)",
            ),
        ),
        on=On.HOST,
    ),
    Row(
        "check-config",
        "replication.replctl.initial:check",
        "check the file of a node, or of all",
        (
            argument(
                "what", metavar="NAME|FILE", nargs="?", complete="nodes", help="a node, or a file (default: all nodes)"
            ),
        ),
        on=On.ANY,
    ),
    Row(
        "doctor",
        "replication.replctl.doctor:show",
        "look at what is often wrong with a node, or with all, and say what to do",
        (argument("name", metavar="NAME", nargs="?", complete="nodes", help="a node (default: all)"),),
        on=On.ANY,
    ),
    Row(
        "domain-xml",
        "replication.replctl.guest:domain_xml",
        "print the disks of this node for the XML of a libvirt domain",
        (DOMAIN_RECONNECT,),
        on=On.CONFIG,
    ),
    Row(
        "qemu-args",
        "replication.replctl.guest:qemu_args",
        "print the disks of this node as arguments of QEMU",
        (RECONNECT,),
        on=On.CONFIG,
    ),
    Row("role", f"{_ROLES}:role", "print who the node is: primary or secondary", timeout_s=SOON_S, distinct=True),
    Row(
        "score",
        f"{_ROLES}:score",
        "print how good an owner of the disks the node would be; 0: none",
        timeout_s=SOON_S,
        distinct=True,
    ),
    Row(
        "may-run",
        f"{_ROLES}:may_run",
        "say by the exit code whether a guest may run on this node now: 0 yes, 1 no, 3 it cannot be told",
        on=On.SOCKET,
        timeout_s=SOON_S,
    ),
    Row(
        "libvirt-hook",
        "replication.replctl.veto:libvirt_hook",
        "as libvirt's hook: exit with code 1 before a guest starts that may not run on its node now",
        (
            argument("guest", metavar="GUEST", help="the name of the domain, whose XML is on stdin"),
            argument("operation", metavar="OPERATION", help="what libvirt does; prepare and migrate are looked at"),
            argument("more", metavar="ARGUMENT", nargs="*", help="what else libvirt gives"),
            flag("--allow-unknown", "let the guest start also where it cannot be told"),
            flag("--allow-migration", "let one in that comes by live migration, to a secondary: follow-owner=true"),
        ),
        on=On.HOST,
        timeout_s=SOON_S,
    ),
    Row(
        "compare",
        "replication.replctl.comparison:compare",
        "say which of two nodes is newer, or that they cannot be compared",
        (
            argument("a", metavar="A", complete="nodes", help="a node, its control socket or its state folder"),
            argument("b", metavar="B", complete="nodes", help="the other one"),
        ),
        on=On.HOST,
        distinct=True,
    ),
    Row(
        "wait",
        f"{_ROLES}:wait",
        "wait until the node is as it is wanted",
        (
            argument("--stage", choices=STAGES, action="append", help="its stage; again: or another one"),
            argument("--link", choices=LINKS, action="append", help="the state of its link; again: or another one"),
            argument("--role", choices=ROLES, action="append", help="its role"),
            argument(
                "--timeout",
                metavar="SECONDS",
                dest="wait_s",
                type=positive_seconds,
                default=WAIT_S,
                help="how long at most (default: %(default)g)",
            ),
        ),
        on=On.SOCKET,
        timeout_s=SOON_S,
    ),
    Row(
        "outdate",
        f"{_ROLES}:outdate",
        "say that another node has gone on: this one must not be promoted",
        (argument("--reason", metavar="TEXT", help="how that is known"),),
        distinct=True,
    ),
    Row(
        "resume-io",
        f"{_ROLES}:resume_io",
        "let a guest go on that stands still",
        (flag("--fenced", "the other node is fenced: nor does it stand still when the loss is noticed only later"),),
        distinct=True,
    ),
    Row("renew", f"{_ROLES}:renew", "have a primary with a lease serve its guest for another while", distinct=True),
    Row("quit", f"{_ROLES}:quit_node", "end the node in good order", distinct=True),
    Row("events", f"{_COMMANDS}:events", "print events as they come"),
    Row(
        "trace",
        "replication.client.trace:show",
        "show how long requests take, what they wait for, and the longest stall of the last hour",
        (
            argument(
                "--seconds",
                metavar="N",
                type=positive_seconds,
                help="of the next N seconds (default: since the node has started)",
            ),
        ),
    ),
    Row("error", f"{_COMMANDS}:error", "exit with code 1 and an error if replication has failed"),
    Row(
        "check",
        "replication.client.check:run",
        "check the node as a plugin of Nagios does, with its exit codes and performance data",
        (
            argument(
                "--warning",
                metavar="LIMITS",
                type=limits,
                help="age=SECONDS, out-of-sync=BYTES, overlay=PERCENT, with commas (default: age=60,overlay=80)",
            ),
            argument("--critical", metavar="LIMITS", type=limits, help="the same (default: age=300,overlay=95)"),
        ),
        on=On.SOCKET,
    ),
    Row(
        "top",
        "replication.client.history:top",
        "show all nodes of this host and their last hour, from replication-monitor",
        (
            *MONITOR,
            flag("--once", "show them once"),
            argument(
                "--interval",
                metavar="SECONDS",
                type=positive_seconds,
                default=WATCH_S,
                help="repeat so often (default: %(default)g)",
            ),
        ),
        on=On.HOST,
    ),
    Row(
        "history",
        "replication.client.history:history",
        "print the events that replication-monitor has kept, of one node or of all",
        MONITOR,
        on=On.ANY,
    ),
)


def row_of(name: str) -> Row | None:
    """The command of that name."""
    return next((row for row in TABLE if row.name == name), None)
