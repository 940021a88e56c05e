# SPDX-License-Identifier: BSD-3-Clause
"""A planned move of the disk: the primary is drained and stopped, then its secondary owns the disk."""

from __future__ import annotations

from typing import Any

from .qmp import Refused
from .session import Session, Unusable
from .values import human_error, human_value


def primary_and_secondary(states: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Which of the two nodes is which; raises Refused unless they look like a pair in good health."""
    for name, state in states.items():
        if state.get("stage") != "running":
            raise Refused(f"replication is not running on {name}: its stage is {human_value(state.get('stage'))}")
        if state.get("error") is not None:
            raise Refused(f"{name} has an error: {human_error(state['error'])}")
    modes = {state.get("mode"): name for name, state in states.items()}
    if set(modes) != {"primary", "secondary"}:
        raise Refused(f"a primary and a secondary are needed, but both are {human_value(next(iter(modes)))}")
    disks = [{disk.get("name"): disk.get("size") for disk in state.get("disks", [])} for state in states.values()]
    if disks[0] != disks[1]:
        raise Refused("the two are not a pair: their disks have other names or sizes")
    return modes["primary"], modes["secondary"]


def switch_over(primary: Session, secondary: Session, before: dict[str, Any]) -> None:
    """Drain, stop, promote. What goes wrong is taken back: then the primary replicates again as before."""
    primary.call("replication-checkpoint")
    print("drained: all that the guest was answered for is on the secondary")
    primary.call("replication-stop")
    try:
        after = primary.call("query-replication")
        if written(after) != written(before) or any(disk.get("out-of-sync-bytes") for disk in after["disks"]):
            raise Refused("the guest still writes to the primary: stop it first")
        print("stopped: the primary forwards no more")
        secondary.call("replication-stop")
    except Refused as error:
        resume(primary, before, error)
        raise Refused(f"{error}; nothing has changed, the primary replicates again") from None


def resume(primary: Session, before: dict[str, Any], why: Refused) -> None:
    """Start a primary again that was stopped for nothing; raises Refused with both reasons when that fails."""
    try:
        primary.call("replication-start", secondary=(before.get("link") or {}).get("secondary"))
    except (Refused, Unusable) as error:
        raise Refused(f"{why}; and the primary, which is stopped now, cannot be started again: {error}") from None


def written(state: dict[str, Any]) -> int:
    """Bytes that the primary's guest has written in total."""
    return sum(disk.get("totals", {}).get("written", 0) for disk in state["disks"])
