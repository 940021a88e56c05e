# SPDX-License-Identifier: BSD-3-Clause
"""replctl verify: the comparison of the disks of both nodes, begun, cancelled, or awaited for its result."""

from __future__ import annotations

import argparse
import time
from typing import Any

from .commands import tell
from .qmp import Refused
from .session import Session
from .values import human_bytes, human_value, printable

LOOK_S = 0.5

_SHOWN = 8
"""Ranges that a line names."""


def verify(client: Session, options: argparse.Namespace) -> None:
    """Begin or cancel it; with --wait Refused unless the disks are equal."""
    if options.cancel:
        client.call("replication-verify-cancel")
        tell(options, "the comparison is being cancelled")
        return
    former = client.call("query-replication").get("last-verify")
    given = {"rate": options.rate, "repair": options.repair or None}
    client.call("replication-verify", **{name: value for name, value in given.items() if value is not None})
    if not options.wait:
        tell(options, "the disks are being compared; `replctl status` shows how far, and the result")
        return
    outcome = _outcome(client, former)
    text = "; ".join(outcome_lines(outcome))
    if outcome.get("result") != "equal":
        raise Refused(text)
    tell(options, text, verify=outcome)


def _outcome(client: Session, former: Any) -> dict[str, Any]:
    """Wait for the result; Refused when the node has none in the end."""
    while True:
        answer = client.call("query-replication")
        last = answer.get("last-verify")
        if answer.get("verify") is None:
            if isinstance(last, dict) and last != former:
                return last
            raise Refused("the comparison has ended, and the node has no result of it")
        time.sleep(LOOK_S)


def outcome_lines(outcome: dict[str, Any]) -> list[str]:
    """A result, for a person."""
    compared, different = (human_bytes(outcome.get(f"{name}-bytes")) for name in ("compared", "different"))
    lines = [f"compared {compared}: {human_value(outcome.get('result'))}"]
    if outcome.get("different-bytes"):
        ranges = [part for part in outcome.get("ranges") or [] if isinstance(part, dict)]
        shown = [
            f"{human_value(part.get('disk'))} {human_value(part.get('offset'))}+{human_value(part.get('length'))}"
            for part in ranges[:_SHOWN]
        ]
        more = ", ..." if len(ranges) > _SHOWN else ""
        sent = "are sent again" if outcome.get("repair") else "are sent by the next `replctl checkpoint`"
        lines.append(f"{different} differ and {sent}: {', '.join(shown)}{more}")
    if outcome.get("left-out-bytes"):
        lines.append(f"{human_bytes(outcome['left-out-bytes'])} were left out")
    if outcome.get("reason"):
        lines.append(printable(outcome["reason"]))
    return lines
