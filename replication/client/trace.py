# SPDX-License-Identifier: BSD-3-Clause
"""`replctl trace`: how long requests take on a node, and what they wait for (query-replication-latency)."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .session import Session, Unusable
from .status import console
from .values import human_seconds, human_stall, human_time, printable

# rich is imported where it draws: failover has to work on a host that lacks it.
# ruff: noqa: PLC0415

Json = dict[str, Any]

BAR_COLUMNS = 40
PARTS = {
    "gate": "gate (a command at work)",
    "lock": "lock (same blocks)",
    "disk": "local disk",
    "queue": "room in the queue",
    "secondary": "secondary (link and disk)",
}
"""What the parts of a request's time are called; later versions may have more."""


def show(client: Session, options: argparse.Namespace) -> None:
    """Since the node has started, or (--seconds) of that time from now on."""
    answer = _ask(client)
    if options.seconds is not None:
        time.sleep(options.seconds)
        answer = difference(_ask(client), answer)
    if options.json:
        print(json.dumps({"seconds": options.seconds, **answer}, indent=2))
        return
    screen = console()
    for part in views(answer, options.seconds):
        screen.print(part)


def _ask(client: Session) -> Json:
    answer = client.call("query-replication-latency")
    if not isinstance(answer, dict) or not isinstance(answer.get("bounds"), list):
        raise Unusable("the node answers query-replication-latency with something else")
    return answer


# -- what happened between two answers -------------------------------------------------------------------------


def difference(after: Json, before: Json) -> Json:
    """What has been added since; all of it if the node was started meanwhile."""
    if after.get("since") != before.get("since"):
        return after
    found = dict(after)
    for key in ("guest", "target", "link", "peer"):
        if isinstance(after.get(key), list):
            former = {_name(one): one for one in before.get(key) or []}
            found[key] = [_less(one, former.get(_name(one), {})) for one in after[key]]
    return found


def _name(entry: Json) -> tuple[Any, ...]:
    return entry.get("export"), entry.get("operation"), entry.get("disk")


def _less(after: Any, before: Any) -> Any:
    """Each number less the former one. A counter never goes down but when another peer counts: then all of it."""
    if isinstance(after, dict):
        if "counts" in after and isinstance(before, dict) and "counts" in before:
            counts = [new - old for new, old in zip(after["counts"], before["counts"], strict=False)]
            fell = len(counts) != len(after["counts"]) or min(counts, default=0) < 0
            return after if fell else {"counts": counts, "sum": max(0.0, after["sum"] - before["sum"])}
        former = before if isinstance(before, dict) else {}
        return {key: _less(value, former.get(key)) for key, value in after.items()}
    return after


# -- as a person reads it --------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A row of the table."""

    who: str
    part: str
    requests: str
    share: str
    mean: str
    median: str
    most: str
    longest: str


TITLES = Line("", "time", "requests", "share", "mean", "50 % within", "99 % within", "all within")


def views(answer: Json, seconds: float | None) -> Iterator[Any]:
    """The table, a histogram for each kind of requests, and the longest stall, to be printed by rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if seconds is None:
        yield Text(f"since {human_time(answer.get('since'))}")
    else:
        yield Text(f"of {seconds:g} s")
    lines = list(table_lines(answer))
    if lines:
        table = Table(box=box.SIMPLE)
        for number, title in enumerate(TITLES):
            table.add_column(title, justify="left" if number < 2 else "right")
        for line in lines:
            table.add_row(*(Text(cell) for cell in line))
        yield table
        yield Text("\n".join(histogram_lines(answer)))
    else:
        yield Text("no requests")
    yield Text(f"longest of the last hour: {human_stall(answer.get('longest-stall'))}")


def table_lines(answer: Json) -> Iterator[Line]:
    """The rows, guests first."""
    bounds = answer["bounds"]
    for kind, title in (("guest", ""), ("target", "primary's ")):
        for entry in _asked(answer, kind):
            who = f"{title}{entry['export']} {entry['operation']}"
            total = entry["total"]
            yield _line(printable(who), "all", total, total, bounds)
            parts = entry.get("parts") or {}
            for name in (*(name for name in PARTS if name in parts), *(name for name in parts if name not in PARTS)):
                yield _line("", f"  {PARTS.get(name, printable(name))}", parts[name], total, bounds)
    for entry in answer.get("link") or []:
        yield from _link_lines(answer, entry)


def _asked(answer: Json, kind: str) -> Iterator[Json]:
    return (entry for entry in answer.get(kind) or [] if any(entry["total"]["counts"]))


def _link_lines(answer: Json, entry: Json) -> Iterator[Line]:
    """What was sent to the secondary of one disk. What of the time is the link's is the difference of the means."""
    answers, bounds = entry["answers"], answer["bounds"]
    if not any(answers["counts"]):
        return
    yield _line(printable(f"{entry['disk']} sent to the secondary"), "all", answers, answers, bounds)
    there = [one["total"] for one in _asked(answer, "peer") if one.get("export") == entry["disk"]]
    if there:
        disk = {"counts": [sum(counts) for counts in zip(*(one["counts"] for one in there), strict=True)]}
        disk["sum"] = sum(one["sum"] for one in there)
        yield _line("", "  peer's disk", disk, answers, bounds)
        link = max(0.0, _mean(answers) - _mean(disk))
        yield Line("", "  link", "", "", human_seconds(link), "", "", "")


def _mean(histogram: Json) -> float:
    return float(histogram["sum"]) / max(1, sum(histogram["counts"]))


def _line(who: str, part: str, histogram: Json, total: Json, bounds: Sequence[float]) -> Line:
    share = f"{histogram['sum'] / total['sum']:.0%}" if total["sum"] else ""
    within = [_within(histogram["counts"], bounds, quantile) for quantile in (0.5, 0.99, 1.0)]
    return Line(who, part, f"{sum(histogram['counts']):,}", share, human_seconds(_mean(histogram)), *within)


def _within(counts: Sequence[int], bounds: Sequence[float], quantile: float) -> str:
    """The bound of the bucket up to which there are so many."""
    wanted, so_far = quantile * sum(counts), 0
    if not wanted:
        return ""
    for bound, count in zip(bounds, counts, strict=False):
        so_far += count
        if so_far >= wanted:
            return human_seconds(bound)
    return f"> {human_seconds(bounds[-1])}"


def histogram_lines(answer: Json) -> Iterator[str]:
    """A bar for each bucket, from the first to the last that has something."""
    bounds = answer["bounds"]
    for kind in ("guest", "target"):
        for entry in _asked(answer, kind):
            counts = entry["total"]["counts"]
            held = [number for number, count in enumerate(counts) if count]
            yield ""
            yield printable(f"{entry['export']} {entry['operation']}")
            for number in range(held[0], held[-1] + 1):
                bound = f"up to {human_seconds(bounds[number])}" if number < len(bounds) else "more"
                bar = "█" * -(-counts[number] * BAR_COLUMNS // max(counts))
                yield f"{bound:>16}  {bar:<{BAR_COLUMNS}} {counts[number]:,}"
