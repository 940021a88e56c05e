# SPDX-License-Identifier: BSD-3-Clause
"""How long the guest stood still for its epochs, and for what."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Pauses:
    """One epoch that was committed; times in milliseconds."""

    epoch: int
    state_bytes: int
    pause_ms: float
    """From STOP to RESUME, as QEMU says: the guest stood still for so long. The next four are its parts."""
    flush_ms: float
    """From STOP until QEMU tells that it waits for us: the disks are drained and flushed."""
    cut_ms: float
    """The disk's epoch."""
    rest_ms: float
    """Memory that was still to be sent, and the devices (all of the memory, where it is stop and migrate)."""
    resume_ms: float
    """`cont`."""
    send_ms: float
    """From `migrate` to STOP: the guest runs."""
    safe_ms: float
    """From RESUME until B would go on with this unit."""


PARTS = {field.name: field.name.removesuffix("_ms") for field in fields(Pauses) if field.name.endswith("_ms")}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def summary(epochs: Sequence[Pauses]) -> dict[str, Any]:
    """Median, 99th percentile and largest of each time; for the JSON, and for `table`."""
    if not epochs:
        return {"epochs": 0}
    found: dict[str, Any] = {"epochs": len(epochs)}
    for name in (*PARTS, "state_bytes"):
        values = [float(getattr(epoch, name)) for epoch in epochs]
        found[name] = {"median": statistics.median(values), "p99": percentile(values, 99), "max": max(values)}
    return found


def table(epochs: Sequence[Pauses]) -> Any:
    """For a person, to be printed by rich."""
    # Here, so that failover works on a host that lacks it.
    from rich.table import Table  # noqa: PLC0415

    titles = {
        "pause_ms": "the guest stands still",
        "flush_ms": "  disks drained and flushed",
        "cut_ms": "  the disk's epoch cut",
        "rest_ms": "  rest of the state",
        "resume_ms": "  resumed",
        "send_ms": "memory sent before",
        "safe_ms": "from resumed to committed",
    }
    found = summary(epochs)
    shown = Table(title=f"{len(epochs)} epochs, ms")
    for column in ("", "median", "p99", "max"):
        shown.add_column(column, justify="right" if column else "left")
    for name, title in titles.items():
        if epochs:
            shown.add_row(title, *(f"{found[name][column]:.1f}" for column in ("median", "p99", "max")))
    if epochs:
        sizes = (f"{found['state_bytes'][column] / 1e6:.1f}" for column in ("median", "p99", "max"))
        shown.add_row("state, MB", *sizes)
    return shown
