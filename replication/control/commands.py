# SPDX-License-Identifier: BSD-3-Clause
"""The table of control commands, and what each of them asks of the node.

Arguments are checked against the table before a handler runs, so a handler sees only what its row declares,
and a refused command has changed nothing. query-commands is derived from the table. Names, arguments and
texts of the commands that QEMU has are QEMU's (qapi/migration.json, qapi/job.json, qapi/control.json).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from replication.conditions import Conditions
from replication.control import qmp
from replication.control.qmp import Answer, Argument
from replication.errors import CommandError
from replication.record.lineage import Lineage
from replication.role import PRIMARY, ROLES
from replication.sizes import SIZE_MAX
from replication.stage import Mode

RATE_MIN, RATE_MAX = 64 << 10, 1 << 40
"""Bytes a second, as of the key resync-rate."""

SECONDS_MAX = 365 * 86400
"""Of a test."""


SUSPEND_MAX_S = 60.0
"""Of a guest whose requests are not passed on: it notices no less than a minute."""


class Replicated(Protocol):
    """What the commands need of a node. Every method may be called by several threads at once, does its own
    locking, and raises CommandError when it refuses."""

    def start(
        self,
        mode: Mode | None,
        secondary: str | None,
        sync: str,
        discard_checkpoint: bool = False,
        force: bool = False,
    ) -> None:
        """Start replication; `sync` is "auto", "none", "full", "digest" or "verify". `discard_checkpoint`: the
        secondary need not keep its last checkpoint until it has everything. `force`: serve the guest all the same."""

    def checkpoint(self) -> tuple[int, float]:
        """Take a checkpoint; its epoch, and the seconds it took."""

    def get_error(self) -> str | None:
        """The description of the failure that replication has suffered, None if there is none."""

    def stop(self, failover: bool, force: bool = False, conditions: Conditions | None = None) -> None:
        """Stop replication, as planned or by failover; `force`: although there is no valid checkpoint, or the node is
        outdated; `conditions`: of a failover, without `force`."""

    def set_role(
        self, primary: bool, peer: str | None, force: bool, lossless: bool = False, fenced: bool = False
    ) -> None:
        """Bring the node to a role; nothing if it has it. `peer`: the URI of the other node; `force`: although the node
        is outdated, or its primary is connected; `lossless`: only if the other one has everything; `fenced`: the other
        one is, so no lease of it lasts."""

    def suspend_io(self, timeout_s: float) -> None:
        """Do not pass on what the guest of this secondary asks for, for so many seconds at most; answered when the
        owner has answered what it had been passed. 0: go on, as far as it is this that holds it."""

    def resume_io(self, fenced: bool = False) -> None:
        """Let a guest go on that stands still; `fenced`: also one that would do so for fencing before the next
        agreement."""

    def renew(self) -> float:
        """The primary may go on; for how many seconds."""

    def outdate(self, text: str) -> None:
        """Another node went on: who knows it says so."""

    def retry(self, force: bool = False) -> None:
        """Go on with a commit that has failed; `force`: although there is no valid checkpoint."""

    def hold(self) -> int:
        """Cut an epoch and hold it; its number."""

    def commit(self, epoch: int) -> tuple[int, float]:
        """Have the secondary take the epoch that is held; its number there, and the seconds that it took."""

    def abort(self, epoch: int) -> None:
        """Give the epoch up that is held."""

    def verify(self, rate: int | None, repair: bool) -> None:
        """Begin to compare the disks with the secondary's, reading `rate` bytes a second at most (None: as a resync
        sends). `repair`: what differs is sent at once."""

    def cancel_verify(self) -> None:
        """Give that up."""

    def resize(self, name: str | None, size: int | None) -> list[dict[str, object]]:
        """Grow a disk, or all, as far as both nodes' disks allow, or to `size` bytes; what has become of each."""

    def start_test(self, name: str, timeout_s: float | None) -> dict[str, Any]:
        """Begin a test of a failover, which ends by itself after `timeout_s` seconds; what its exports are."""

    def stop_test(
        self, name: str | None, result: str | None, rto_s: float | None, reason: str | None, id_: str | None = None
    ) -> dict[str, Any]:
        """End a test, the only one if there is no name, and keep its result, if there is one."""

    def demote(self) -> None:
        """Make an owner of disks a secondary again."""

    def discard(self, checkpoint: bool | None = None) -> None:
        """Allow that what was written here is overwritten by a primary; `checkpoint`: give up the last checkpoint, for
        a resync that is at work; None: what can be given up as things are."""

    def lost_heartbeat(self) -> None:
        """The peer is dead: a secondary fails over, a primary stops."""

    def query(self) -> dict[str, Any]:
        """The answer of query-replication."""

    def query_latency(self) -> dict[str, Any]:
        """The answer of query-replication-latency."""

    def query_failover(self) -> dict[str, Any]:
        """The answer of query-failover."""

    def query_role(self) -> dict[str, Any]:
        """The answer of query-role."""

    def compare(self, lineage: Lineage) -> dict[str, Any]:
        """How this node's content is to one of that lineage."""

    def query_jobs(self) -> list[dict[str, Any]]:
        """The answer of query-jobs."""

    def cancel_job(self, id: str) -> None:
        """Cancel the job named `id`."""

    def dismiss_job(self, id: str) -> None:
        """Forget the finished job named `id`."""


@dataclass(frozen=True)
class Command:
    """One row of the table."""

    handler: Callable[[Commands, Mapping[str, Any]], Any]
    """Takes the arguments given, already checked; returns QMP's `return`, or an Answer."""
    arguments: Mapping[str, Argument] = field(default_factory=dict)


class Commands:
    """Runs commands by name on one node. Stateless: any number of threads may call it at once."""

    def __init__(self, node: Replicated, shutdown: Callable[[], None]) -> None:
        """`shutdown()` ends the process in good order; `quit` calls it after it has answered."""
        self._node = node
        self._shutdown = shutdown

    def execute(self, name: str, arguments: dict[str, Any]) -> Answer:
        """Run the command `name`; raises CommandError if there is none, or if it or the node refuses."""
        command = TABLE.get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        qmp.check_arguments(command.arguments, arguments)
        result = command.handler(self, arguments)
        return result if isinstance(result, Answer) else Answer(result)

    # Under QEMU's names

    def _xen_set_replication(self, arguments: Mapping[str, Any]) -> Any:
        failover = arguments.get("failover")
        if not arguments["enable"]:
            self._node.stop(failover or False)
            return {}
        if failover is not None:
            raise CommandError("Parameter 'failover' is only for stopping replication")
        self._node.start(Mode.PRIMARY if arguments["primary"] else Mode.SECONDARY, None, "auto")
        return {}

    def _xen_checkpoint(self, _arguments: Mapping[str, Any]) -> Any:
        self._node.checkpoint()
        return {}

    def _xen_status(self, _arguments: Mapping[str, Any]) -> Any:
        # As in QEMU, a node that replicates nothing reports that as its error instead of failing the query.
        try:
            desc = self._node.get_error()
        except CommandError as error:
            desc = str(error)
        return {"error": False} if desc is None else {"error": True, "desc": desc}

    def _lost_heartbeat(self, _arguments: Mapping[str, Any]) -> Any:
        self._node.lost_heartbeat()
        return {}

    # Replication's own

    def _start(self, arguments: Mapping[str, Any]) -> Any:
        mode = Mode(arguments["mode"]) if "mode" in arguments else None
        further = {"discard_checkpoint": True} if arguments.get("discard-checkpoint", False) else {}
        if arguments.get("force", False):
            further["force"] = True
        self._node.start(mode, arguments.get("secondary"), arguments.get("sync", "auto"), **further)
        return {}

    def _checkpoint(self, arguments: Mapping[str, Any]) -> Any:
        if arguments.get("hold", False):
            return {"epoch": self._node.hold()}
        epoch, duration_s = self._node.checkpoint()
        return {"epoch": epoch, "duration": duration_s}

    def _commit(self, arguments: Mapping[str, Any]) -> Any:
        epoch, duration_s = self._node.commit(arguments["epoch"])
        return {"epoch": epoch, "duration": duration_s}

    def _abort(self, arguments: Mapping[str, Any]) -> Any:
        self._node.abort(arguments["epoch"])
        return {}

    def _verify(self, arguments: Mapping[str, Any]) -> Any:
        rate = arguments.get("rate")
        if rate is not None and not RATE_MIN <= rate <= RATE_MAX:
            raise CommandError(f"Parameter 'rate' expects {RATE_MIN} to {RATE_MAX} bytes a second")
        self._node.verify(rate, arguments.get("repair", False))
        return {}

    def _cancel_verify(self, _arguments: Mapping[str, Any]) -> Any:
        self._node.cancel_verify()
        return {}

    def _resize(self, arguments: Mapping[str, Any]) -> Any:
        size = arguments.get("size")
        if size is not None and not 0 < size <= SIZE_MAX:
            raise CommandError(f"Parameter 'size' expects 1 to {SIZE_MAX} bytes")
        return {"disks": self._node.resize(arguments.get("disk"), size)}

    def _test_start(self, arguments: Mapping[str, Any]) -> Any:
        return self._node.start_test(arguments.get("name", "test"), _seconds(arguments, "timeout"))

    def _test_stop(self, arguments: Mapping[str, Any]) -> Any:
        result, rto_s = arguments.get("result"), _seconds(arguments, "rto")
        if result is None and (rto_s is not None or "reason" in arguments):
            raise CommandError("Parameters 'rto' and 'reason' are for a result")
        return self._node.stop_test(arguments.get("name"), result, rto_s, arguments.get("reason"), arguments.get("id"))

    def _demote(self, _arguments: Mapping[str, Any]) -> Any:
        self._node.demote()
        return {}

    def _discard(self, arguments: Mapping[str, Any]) -> Any:
        if "checkpoint" in arguments:
            self._node.discard(checkpoint=arguments["checkpoint"])
        else:
            self._node.discard()
        return {}

    def _get_error(self, _arguments: Mapping[str, Any]) -> Any:
        desc = self._node.get_error()
        if desc is not None:
            raise CommandError(desc)
        return {}

    def _stop(self, arguments: Mapping[str, Any]) -> Any:
        failover, force = arguments.get("failover", False), arguments.get("force", False)
        conditions = _conditions(arguments)
        if force and not failover:
            raise CommandError("Parameter 'force' is only for failover")
        if force and conditions == Conditions(early=True):
            conditions = None  # force waits for no lease either
        if conditions is None:
            self._node.stop(failover, force)
        elif not failover or force:
            raise CommandError("Conditions are only for failover without 'force'")
        else:
            self._node.stop(failover, conditions=conditions)
        return {}

    def _outdate(self, arguments: Mapping[str, Any]) -> Any:
        self._node.outdate(arguments.get("reason", "") or "somebody who knows it has said so")
        return {}

    def _retry(self, arguments: Mapping[str, Any]) -> Any:
        self._node.retry(arguments.get("force", False))
        return {}

    def _query(self, _arguments: Mapping[str, Any]) -> Any:
        return self._node.query()

    def _query_latency(self, _arguments: Mapping[str, Any]) -> Any:
        return self._node.query_latency()

    def _query_failover(self, _arguments: Mapping[str, Any]) -> Any:
        return self._node.query_failover()

    def _query_role(self, _arguments: Mapping[str, Any]) -> Any:
        return self._node.query_role()

    def _compare(self, arguments: Mapping[str, Any]) -> Any:
        return self._node.compare(read_lineage(arguments["lineage"]))

    def _set_role(self, arguments: Mapping[str, Any]) -> Any:
        primary = arguments["role"] == PRIMARY
        fenced = {"fenced": True} if arguments.get("fenced") else {}
        self._node.set_role(
            primary, arguments.get("peer"), arguments.get("force", False), arguments.get("lossless", False), **fenced
        )
        return {}

    def _suspend_io(self, arguments: Mapping[str, Any]) -> Any:
        timeout_s = arguments["timeout"]
        if not 0 <= timeout_s <= SUSPEND_MAX_S:
            raise CommandError(f"Parameter 'timeout' expects seconds, 0 at least and {SUSPEND_MAX_S:g} at most")
        self._node.suspend_io(float(timeout_s))
        return {}

    def _resume_io(self, arguments: Mapping[str, Any]) -> Any:
        self._node.resume_io(arguments.get("fenced", False))
        return {}

    def _renew(self, _arguments: Mapping[str, Any]) -> Any:
        return {"seconds": self._node.renew()}

    # Jobs

    def _query_jobs(self, _arguments: Mapping[str, Any]) -> Any:
        return self._node.query_jobs()

    def _job_cancel(self, arguments: Mapping[str, Any]) -> Any:
        self._node.cancel_job(arguments["id"])
        return {}

    def _job_dismiss(self, arguments: Mapping[str, Any]) -> Any:
        self._node.dismiss_job(arguments["id"])
        return {}

    # The process

    def _query_commands(self, _arguments: Mapping[str, Any]) -> Any:
        return [{"name": name} for name in (qmp.NEGOTIATION, *TABLE)]

    def _query_version(self, _arguments: Mapping[str, Any]) -> Any:
        return qmp.version()

    def _quit(self, _arguments: Mapping[str, Any]) -> Any:
        return Answer({}, after=self._shutdown)

    TABLE: Mapping[str, Command] = {
        "xen-set-replication": Command(
            _xen_set_replication,
            {
                "enable": Argument("boolean", required=True),
                "primary": Argument("boolean", required=True),
                "failover": Argument("boolean"),
            },
        ),
        "xen-colo-do-checkpoint": Command(_xen_checkpoint),
        "query-xen-replication-status": Command(_xen_status),
        "x-colo-lost-heartbeat": Command(_lost_heartbeat),
        "replication-start": Command(
            _start,
            {
                "mode": Argument("string", values=tuple(mode.value for mode in Mode)),
                "secondary": Argument("string"),
                "sync": Argument("string", values=("auto", "none", "full", "digest", "verify")),
                "discard-checkpoint": Argument("boolean"),
                "force": Argument("boolean"),
            },
        ),
        "replication-checkpoint": Command(_checkpoint, {"hold": Argument("boolean")}),
        "replication-checkpoint-commit": Command(_commit, {"epoch": Argument("integer", required=True)}),
        "replication-checkpoint-abort": Command(_abort, {"epoch": Argument("integer", required=True)}),
        "replication-resize": Command(_resize, {"disk": Argument("string"), "size": Argument("integer")}),
        "replication-verify": Command(_verify, {"rate": Argument("integer"), "repair": Argument("boolean")}),
        "replication-verify-cancel": Command(_cancel_verify),
        "replication-test-start": Command(_test_start, {"name": Argument("string"), "timeout": Argument("number")}),
        "replication-test-stop": Command(
            _test_stop,
            {
                "name": Argument("string"),
                "id": Argument("string"),
                "result": Argument("string", values=("passed", "failed")),
                "rto": Argument("number"),
                "reason": Argument("string"),
            },
        ),
        "replication-get-error": Command(_get_error),
        "replication-stop": Command(
            _stop,
            {
                "failover": Argument("boolean"),
                "force": Argument("boolean"),
                "max-age": Argument("number"),
                "only-in-sync": Argument("boolean"),
                "lossless": Argument("boolean"),
                "no-primary": Argument("boolean"),
                "fenced": Argument("boolean"),
            },
        ),
        "replication-set-role": Command(
            _set_role,
            {
                "role": Argument("string", required=True, values=ROLES),
                "peer": Argument("string"),
                "force": Argument("boolean"),
                "lossless": Argument("boolean"),
                "fenced": Argument("boolean"),
            },
        ),
        "replication-suspend-io": Command(_suspend_io, {"timeout": Argument("number", required=True)}),
        "replication-resume-io": Command(_resume_io, {"fenced": Argument("boolean")}),
        "replication-renew": Command(_renew),
        "replication-outdate": Command(_outdate, {"reason": Argument("string")}),
        "replication-discard": Command(_discard, {"checkpoint": Argument("boolean")}),
        "replication-demote": Command(_demote),
        "replication-retry": Command(_retry, {"force": Argument("boolean")}),
        "query-replication": Command(_query),
        "query-replication-latency": Command(_query_latency),
        "query-failover": Command(_query_failover),
        "query-role": Command(_query_role),
        "replication-compare": Command(_compare, {"lineage": Argument("object", required=True)}),
        "query-jobs": Command(_query_jobs),
        "job-cancel": Command(_job_cancel, {"id": Argument("string", required=True)}),
        "job-dismiss": Command(_job_dismiss, {"id": Argument("string", required=True)}),
        "query-commands": Command(_query_commands),
        "query-version": Command(_query_version),
        "quit": Command(_quit),
    }


TABLE = Commands.TABLE
"""The commands by name, in the order in which query-commands lists them."""

_QUERIES = tuple(name for name in TABLE if name.startswith("query-"))
URGENT = (
    *_QUERIES,
    "x-colo-lost-heartbeat",
    "quit",
    "replication-get-error",
    "replication-compare",
    "replication-outdate",
    "replication-renew",
)
"""Commands that must get through whoever else is connected; so must a failover and a promotion (`is_urgent`)."""


def _seconds(arguments: Mapping[str, Any], name: str) -> float | None:
    """CommandError unless it is a duration, or is not there."""
    value = arguments.get(name)
    if value is None:
        return None
    if not 0 <= value <= SECONDS_MAX:
        raise CommandError(f"Parameter '{name}' expects seconds, {SECONDS_MAX} at most")
    return float(value)


def _conditions(arguments: Mapping[str, Any]) -> Conditions | None:
    """Those of a failover, None if none is given; CommandError."""
    max_age_s = arguments.get("max-age")
    if max_age_s is not None and not 0 <= max_age_s < math.inf:
        raise CommandError("Parameter 'max-age' expects seconds")
    asked = (arguments.get(name, False) for name in ("only-in-sync", "lossless", "no-primary", "fenced"))
    conditions = Conditions(max_age_s, *asked)
    return None if conditions == Conditions() else conditions


def read_lineage(value: Mapping[str, Any]) -> Lineage:
    """The `lineage` of another node's query-replication; CommandError unless it is one."""
    try:
        return Lineage.from_json(dict(value))
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"Invalid parameter 'lineage': {error}") from error


def is_urgent(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a command is one that an operator must be able to give at all times. Each of them ends soon."""
    if name in URGENT:
        return True
    if name == "replication-set-role":
        return arguments.get("role") == PRIMARY
    return name in ("replication-stop", "xen-set-replication") and arguments.get("failover") is True
