# SPDX-License-Identifier: BSD-3-Clause
"""The commands that a primary gives over the control export of its secondary.

What everybody may ask (the queries, as on the control socket), and what only a primary does: pairing (dial.py has the
steps), and the checkpoint of its epoch. Nothing else is taken there: who can reach the port of the pair is not yet an
operator of this node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from replication.control import qmp
from replication.control.commands import Commands, read_lineage
from replication.control.qmp import Answer, Argument
from replication.errors import CommandError
from replication.options import LEASE_MAX_S, LEASE_MIN_S
from replication.record.lineage import Lineage, check_id
from replication.record.state import check_epoch
from replication.secondary.pairing import Channel

SHARED = (
    "query-xen-replication-status",
    "replication-get-error",
    "query-replication",
    "query-replication-latency",
    "query-failover",
    "query-jobs",
    "query-version",
)
"""Commands of the control socket that are taken here as well."""

_DISKS_MAX = 256


class Paired(Protocol):
    """What these commands need of a node. Every method may be called by several threads at once, does its own locking,
    and raises CommandError when it refuses."""

    def pair(
        self,
        channel: Channel,
        node: str,
        lineage: Lineage,
        disks: dict[str, int],
        epoch: int,
        timeout_s: float,
        lease_s: float | None = None,
    ) -> dict[str, Any]:
        """Begin a session of a primary. `lease_s`: how long it serves its guest without hearing of this node."""

    def pair_map(self, token: str, disk: str, start: int, lost: bool) -> dict[str, Any]:
        """Part of what a disk lacks, and (not with `lost`) of what it has changed."""

    def pair_sync(self, token: str, verdict: str, generation: str, marked: bool, history: tuple[str, ...]) -> None:
        """What is going to be sent, or has been."""

    def pair_prepare(self, token: str) -> None:
        """A checkpoint is about to be taken."""

    def pair_resize(self, token: str, disks: dict[str, int], exact: bool) -> dict[str, Any]:
        """Disks grow to these sizes, as far as they can, or `exact`; what they have then."""

    def pair_discard(self, token: str) -> None:
        """The last checkpoint is given up."""

    def unpair(self, token: str) -> None:
        """The primary leaves in good order."""

    def checkpoint_of_primary(self, token: str, epoch: int) -> tuple[int, float]:
        """The checkpoint of an epoch."""


class PairCommands:
    """The commands of one control connection."""

    def __init__(self, node: Paired, commands: Commands, channel: Channel) -> None:
        """`commands` executes what the control socket takes as well."""
        self._node = node
        self._commands = commands
        self._channel = channel

    def execute(self, name: str, arguments: dict[str, Any]) -> Answer:
        """Run the command `name`; raises CommandError if there is none, or if it or the node refuses."""
        if name == "query-commands":
            qmp.check_arguments({}, arguments)
            return Answer([{"name": known} for known in (qmp.NEGOTIATION, name, *SHARED, *self.TABLE)])
        if name in SHARED:
            if name == "query-replication":
                self._channel.watching.set()
            return self._commands.execute(name, arguments)
        row = self.TABLE.get(name)
        if row is None:
            raise CommandError(f"The command {name} has not been found on the control export", "CommandNotFound")
        handler, declared = row
        qmp.check_arguments(declared, arguments)
        return Answer(handler(self, arguments))

    def _pair(self, arguments: Mapping[str, Any]) -> Any:
        disks, timeout_s = arguments["disks"], arguments["timeout"]
        _check_sizes(disks)
        if not 0.0 < timeout_s <= 3600.0:
            raise CommandError("Parameter 'timeout' expects seconds")
        _check_epoch(arguments["epoch"])
        lineage = read_lineage(arguments["lineage"])
        lease_s = arguments.get("lease")
        if lease_s is not None and not LEASE_MIN_S <= lease_s <= LEASE_MAX_S:
            raise CommandError("Parameter 'lease' expects seconds")
        return self._node.pair(
            self._channel,
            arguments["node"][:64],
            lineage,
            disks,
            arguments["epoch"],
            float(timeout_s),
            None if lease_s is None else float(lease_s),
        )

    def _pair_map(self, arguments: Mapping[str, Any]) -> Any:
        if not 0 <= arguments["start"] < 1 << 62:
            raise CommandError("Parameter 'start' expects an offset")
        lost = arguments.get("lost", False)
        return self._node.pair_map(arguments["token"], arguments["disk"], arguments["start"], lost)

    def _pair_sync(self, arguments: Mapping[str, Any]) -> Any:
        generation, history = arguments["generation"], arguments.get("history", [])
        try:
            # A primary's lineage must be one: what is adopted stands in the state folder of this node afterwards.
            check_id("generation", generation)
            Lineage.from_json({**Lineage(generation).to_json(), "history": history})
        except (TypeError, ValueError) as error:
            raise CommandError(f"Invalid parameter 'generation' or 'history': {error}") from error
        self._node.pair_sync(arguments["token"], arguments["verdict"], generation, arguments["marked"], tuple(history))
        return {}

    def _prepare(self, arguments: Mapping[str, Any]) -> Any:
        self._node.pair_prepare(arguments["token"])
        return {}

    def _resize(self, arguments: Mapping[str, Any]) -> Any:
        _check_sizes(arguments["disks"])
        return self._node.pair_resize(arguments["token"], arguments["disks"], arguments.get("exact", False))

    def _discard(self, arguments: Mapping[str, Any]) -> Any:
        self._node.pair_discard(arguments["token"])
        return {}

    def _unpair(self, arguments: Mapping[str, Any]) -> Any:
        self._node.unpair(arguments["token"])
        return {}

    def _checkpoint(self, arguments: Mapping[str, Any]) -> Any:
        _check_epoch(arguments["epoch"])
        epoch, duration_s = self._node.checkpoint_of_primary(arguments["token"], arguments["epoch"])
        return {"epoch": epoch, "duration": duration_s}

    TABLE: Mapping[str, tuple[Callable[[PairCommands, Mapping[str, Any]], Any], Mapping[str, Argument]]] = {
        "replication-pair": (
            _pair,
            {
                "node": Argument("string", required=True),
                "lineage": Argument("object", required=True),
                "disks": Argument("object", required=True),
                "epoch": Argument("integer", required=True),
                "timeout": Argument("number", required=True),
                "lease": Argument("number"),
            },
        ),
        "replication-pair-map": (
            _pair_map,
            {
                "token": Argument("string", required=True),
                "disk": Argument("string", required=True),
                "start": Argument("integer", required=True),
                "lost": Argument("boolean"),
            },
        ),
        "replication-pair-sync": (
            _pair_sync,
            {
                "token": Argument("string", required=True),
                "verdict": Argument("string", required=True, values=("equal", "quick", "full", "complete")),
                "generation": Argument("string", required=True),
                "history": Argument("array"),
                "marked": Argument("boolean", required=True),
            },
        ),
        "replication-pair-prepare": (_prepare, {"token": Argument("string", required=True)}),
        "replication-pair-resize": (
            _resize,
            {
                "token": Argument("string", required=True),
                "disks": Argument("object", required=True),
                "exact": Argument("boolean"),
            },
        ),
        "replication-pair-discard": (_discard, {"token": Argument("string", required=True)}),
        "replication-unpair": (_unpair, {"token": Argument("string", required=True)}),
        "replication-checkpoint": (
            _checkpoint,
            {"token": Argument("string", required=True), "epoch": Argument("integer", required=True)},
        ),
    }


def _check_sizes(disks: Mapping[str, object]) -> None:
    if len(disks) > _DISKS_MAX or not all(type(size) is int and 0 <= size < 1 << 62 for size in disks.values()):
        raise CommandError("Invalid parameter type for 'disks', expected: names and sizes")


def _check_epoch(epoch: int) -> None:
    try:
        check_epoch(epoch)
    except ValueError as error:
        raise CommandError("Parameter 'epoch' expects the number of an epoch") from error
