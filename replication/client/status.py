# SPDX-License-Identifier: BSD-3-Clause
"""What query-replication says, and an event, for a person: lines, and a table of the disks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from .values import (
    human_bytes,
    human_checkpoint,
    human_error,
    human_last_test,
    human_last_verify,
    human_lineage,
    human_link,
    human_member,
    human_outdated,
    human_stall,
    human_tests,
    human_time,
    human_value,
    human_verify,
    printable,
)

# rich is imported where it draws: failover has to work on a host that lacks it.
# ruff: noqa: PLC0415

PIPE_COLUMNS = 10_000
"""Wide enough for the status of a disk, and for an error with a long path, when there is no terminal whose width would
count: who reads lines wants whole ones."""


STATUS_LINES: dict[str, Callable[[object], str]] = {
    "mode": human_value,
    "stage": human_value,
    "error": human_error,
    "consistent": human_value,
    "epoch": human_value,
    "checkpoint": human_checkpoint,
    "link": human_link,
    "lineage": human_lineage,
    "in-sync-until": human_time,
    "longest-stall": human_stall,
    "verify": human_verify,
    "last-verify": human_last_verify,
    "tests": human_tests,
    "last-test": human_last_test,
    "outdated-reason": human_outdated,
}
LEFT_OUT = ("disks", "guest-stalls")
"""What stands elsewhere: in the table, and in `replctl trace`."""

DISK_COLUMNS: dict[str, tuple[str, Callable[[object], str]]] = {
    "name": ("disk", human_value),
    "top-id": ("guest face", human_value),
    "size": ("size", human_bytes),
    "active-bytes": ("active", human_bytes),
    "hidden-bytes": ("hidden", human_bytes),
    "forward-queue-bytes": ("forward queue", human_bytes),
    "out-of-sync-bytes": ("out of sync", human_bytes),
}


def status_lines(answer: dict[str, Any]) -> Iterator[str]:
    """The status of the node as a whole, one line a fact; members of later versions come last, as they are."""
    others = (name for name in answer if name not in STATUS_LINES and name not in LEFT_OUT)
    names = [*(name for name in STATUS_LINES if name in answer), *others]
    width = max((len(printable(name)) for name in names), default=0)
    for name in names:
        yield f"{printable(name):<{width}}  {STATUS_LINES.get(name, human_value)(answer[name])}"


def totals_lines(disks: list[dict[str, Any]]) -> Iterator[str]:
    """What each disk has done in total."""
    for disk in disks:
        totals = disk.get("totals")
        if isinstance(totals, dict) and totals:
            facts = ", ".join(f"{printable(key)} {human_member(key, value)}" for key, value in totals.items())
            yield f"{printable(disk.get('name', '?'))} in total: {facts}"


def disk_table(disks: list[dict[str, Any]]) -> Any:
    """A table with one row a disk and a column for whatever any disk has."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    present = [*dict.fromkeys(key for disk in disks for key in disk if key != "totals")]
    columns = [*(key for key in DISK_COLUMNS if key in present), *(key for key in present if key not in DISK_COLUMNS)]
    table = Table(box=box.SIMPLE)
    shown: list[tuple[str, Callable[[object], str]]] = []
    for key in columns:
        title, show = DISK_COLUMNS.get(key, (printable(key), lambda value, key=key: human_member(key, value)))
        table.add_column(Text(title), justify="right" if show is human_bytes else "left", overflow="fold")
        shown.append((key, show))
    for disk in disks:
        table.add_row(*(Text(show(disk.get(key))) for key, show in shown))
    return table


def status_view(answer: dict[str, Any]) -> Any:
    """All that query-replication says, to be printed by rich."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text("\n".join(status_lines(answer)))]
    disks = [disk for disk in answer.get("disks") or [] if isinstance(disk, dict)]
    if disks:
        parts.append(disk_table(disks))
        parts += [Text(line) for line in totals_lines(disks)]
    return Group(*parts)


def console() -> Any:
    """Where tables go: the terminal as wide as it is, anything else wide enough not to break lines."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def event_line(event: dict[str, Any]) -> str:
    """One event: time, name, then its data."""
    stamp = event.get("timestamp", {})
    moment = human_time(stamp.get("seconds")) if isinstance(stamp, dict) else "-"
    if isinstance(stamp, dict) and isinstance(stamp.get("microseconds"), int):
        moment += f".{max(0, stamp['microseconds']) // 1000:03d}"
    data = event.get("data")
    facts = [f"{printable(key)}={human_value(value)}" for key, value in data.items()] if isinstance(data, dict) else []
    return "  ".join([moment, printable(event["event"]), *facts])
