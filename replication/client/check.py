# SPDX-License-Identifier: BSD-3-Clause
"""`replctl check`: one node as a plugin of Nagios sees it: a line, performance data, an exit code.

The form is that of the Monitoring Plugins Development Guidelines: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .qmp import Refused
from .session import Session, Unusable
from .values import human_bytes, human_seconds, printable

TIMEOUT_S = 10.0
"""Shorter than that of whoever runs checks, usually 60 s."""


class State(IntEnum):
    """What a check ends with."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


_SCALE = {"K": 10, "M": 20, "G": 30, "T": 40}
LIMITS = ("age", "out-of-sync", "overlay")
"""In seconds, bytes, per cent."""


def limits(text: str) -> dict[str, float]:
    """argparse's type for WHAT=VALUE,...: `age` in seconds, `out-of-sync` in bytes, `overlay` in per cent."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        scale = _SCALE.get(value[-1:], 0) if name == "out-of-sync" else 0
        try:
            number = float(value[:-1] if scale else value) * 2**scale
        except ValueError:
            number = math.nan
        if name not in LIMITS or not 0 <= number < 2**63:
            raise argparse.ArgumentTypeError(f"'{part}' is not age=SECONDS, out-of-sync=BYTES or overlay=PERCENT")
        found[name] = number
    return found


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    state: State
    text: str


class Check:
    """Looks at the answer to query-replication."""

    def __init__(self, warning: dict[str, float], critical: dict[str, float]) -> None:
        self._limits = {State.CRITICAL: critical, State.WARNING: warning}

    def findings(self, answer: dict[str, Any]) -> Iterator[Finding]:
        """What is wrong, the stage and the link included."""
        error = answer.get("error")
        if isinstance(error, dict):
            yield Finding(State.CRITICAL, f"failure: {error.get('desc', 'unknown')}")
        if answer.get("consistent") is False:
            yield Finding(State.CRITICAL, "no valid checkpoint")
        if answer.get("peer-consistent") is False and answer.get("stage") == "running":
            yield Finding(State.WARNING, "the secondary has no valid checkpoint until the next one is taken")
        owns = answer.get("mode") == "primary" or answer.get("stage") in ("failover", "failover-failed", "done")
        if answer.get("guest-suspended") and owns:
            yield Finding(_severity(answer), f"the guest stands still: {answer['guest-suspended']}")
        stage, link = answer.get("stage"), answer.get("link")
        if stage == "failover-failed":
            yield Finding(State.CRITICAL, "the commit has failed")
        elif stage != "running":
            yield Finding(State.WARNING, f"not replicating, the stage is {stage}")
        elif isinstance(link, dict) and link.get("state") != "in-sync":
            reason = f": {link['reason']}" if link.get("reason") else ""
            yield Finding(State.WARNING, f"link {link.get('state')}{reason}")
        if answer.get("checkpoint-obstacle"):
            yield Finding(State.WARNING, f"no checkpoint can be taken: {answer['checkpoint-obstacle']}")
        for name, value in measures(answer).items():
            # A pair that has ended has no checkpoint that could get too old.
            if value is None or name not in LIMITS or (name == "age" and stage != "running"):
                continue
            for state, of in self._limits.items():
                if name in of and value >= of[name]:
                    yield Finding(state, f"{name} {_shown(name, value)}")
                    break

    def performance(self, answer: dict[str, Any]) -> str:
        """Performance data, with the limits."""
        units = {"age": "s", "out-of-sync": "B", "overlay": "%", "queue": "B"}
        parts = []
        for name, value in measures(answer).items():
            if value is not None:
                both = [self._limits[state].get(name) for state in (State.WARNING, State.CRITICAL)]
                numbers = ";".join("" if one is None else f"{one:.15g}" for one in both)
                top = ";100" if name == "overlay" else ""
                parts.append(f"{name.replace('-', '_')}={round(value, 3):.15g}{units[name]};{numbers};0{top}")
        return " ".join(parts)


def _severity(answer: dict[str, Any]) -> State:
    """Of a guest that stands still: after a start nobody may have decided yet who is to own the disks."""
    why = answer.get("guest-suspended-reason")
    return State.WARNING if isinstance(why, dict) and why.get("code") == "not-promoted" else State.CRITICAL


def _shown(name: str, value: float) -> str:
    return f"{value:.0f}%" if name == "overlay" else human_seconds(value) if name == "age" else human_bytes(value)


def measures(answer: dict[str, Any]) -> dict[str, float | None]:
    """Age of the checkpoint (s), bytes out of sync, the fullest overlay (per cent), bytes in the queue."""
    checkpoint = answer.get("checkpoint")
    disks = [disk for disk in answer.get("disks") or [] if isinstance(disk, dict)]
    fills = [
        100 * held / limit
        for disk in disks
        for overlay in ("active", "hidden")
        if (held := disk.get(f"{overlay}-bytes")) is not None
        and (limit := disk.get(f"{overlay}-limit-bytes") or disk.get("size"))
    ]
    queues = [disk["forward-queue-bytes"] for disk in disks if "forward-queue-bytes" in disk]
    return {
        "age": checkpoint.get("age") if isinstance(checkpoint, dict) else None,
        "out-of-sync": float(sum(disk.get("out-of-sync-bytes", 0) for disk in disks)),
        "overlay": max(fills, default=None),
        "queue": float(sum(queues)) if queues else None,
    }


def run(path: str, options: argparse.Namespace) -> State:
    """Check the node at a control socket, and print what has come of it: its value is the exit code."""
    warning = {"age": 60.0, "overlay": 80.0} | (options.warning or {})
    critical = {"age": 300.0, "overlay": 95.0} | (options.critical or {})
    look = Check(warning, critical)
    performance = ""
    try:
        with Session(path, min(options.timeout, TIMEOUT_S)) as client:
            answer = client.call("query-replication")
        findings = list(look.findings(answer))
        performance = look.performance(answer)
        fine = f"{answer.get('mode')}, in sync, checkpoint {human_seconds(measures(answer)['age'])} old"
    except Unusable as error:
        findings, fine = [Finding(State.CRITICAL, str(error))], ""
    except (Refused, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        findings, fine = [Finding(State.UNKNOWN, f"an answer that cannot be read: {error}")], ""
    # The worst first; what is not known is less than what is known to be bad.
    order = (State.CRITICAL, State.WARNING, State.UNKNOWN, State.OK)
    findings.sort(key=lambda one: order.index(one.state))
    state = findings[0].state if findings else State.OK
    said = printable("; ".join(one.text for one in findings) or fine).replace("|", "/")
    if options.json:
        print(json.dumps({"state": state.name, "text": said, "performance": performance}))
    else:
        print(f"REPLICATION {state.name} - {said}" + (f" | {performance}" if performance else ""))
    return state
