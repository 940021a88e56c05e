# SPDX-License-Identifier: BSD-3-Clause
"""`replctl history` and `replctl top`: what replication-monitor knows of all nodes of this host."""

from __future__ import annotations

import argparse
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from .session import Unusable
from .status import console, event_line
from .values import human_bytes, human_seconds, human_value, printable

# rich is imported where it draws: failover has to work on a host that lacks it.
# ruff: noqa: PLC0415

MONITOR, MONITOR_VARIABLE = "http://127.0.0.1:10810", "REPLCTL_MONITOR"
TIMEOUT_S = 10.0
BARS = " ▁▂▃▄▅▆▇█"
SPARK_COLUMNS = 30


def ask(options: argparse.Namespace, path: str) -> Any:
    """A JSON document of the monitor; Unusable."""
    url = options.monitor or os.environ.get(MONITOR_VARIABLE) or MONITOR
    if not url.startswith(("http://", "https://")):
        raise Unusable(f"'{url}' is not the address of a monitor, such as {MONITOR}")
    try:
        request = urllib.request.Request(url.rstrip("/") + path)
        if options.token_file:
            with open(options.token_file, encoding="utf-8") as file:
                request.add_header("Authorization", f"Bearer {file.readline().strip()}")
        context = ssl.create_default_context(cafile=options.tls_ca) if url.startswith("https") else None
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise Unusable(f"{url}: {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error  # of an URLError
        reason = getattr(reason, "strerror", None) or reason
        raise Unusable(f"cannot ask replication-monitor at {url}: {reason}") from None


def history(options: argparse.Namespace) -> None:
    """Print the events that the monitor has kept, oldest first."""
    query = f"?{urllib.parse.urlencode({'node': options.node})}" if options.node else ""
    for event in ask(options, f"/api/events{query}"):
        print(json.dumps(event) if options.json else f"{printable(event['node'])}  {event_line(event)}")


def top(options: argparse.Namespace) -> None:
    """All nodes in a table, again and again; once with --once, --json, or where there is no terminal."""
    if options.json:
        print(json.dumps(ask(options, "/api/state"), indent=2))
        return
    screen = console()
    if options.once or not screen.is_terminal:
        screen.print(_table(ask(options, "/api/state"), ask(options, "/api/samples")))
        return
    from rich.live import Live

    with Live(console=screen, auto_refresh=False, screen=True) as live:
        while True:
            live.update(_table(ask(options, "/api/state"), ask(options, "/api/samples")), refresh=True)
            time.sleep(options.interval)


def _table(state: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for title in ("node", "mode", "stage", "link", "checkpoint", "lacks", "queue", "written/s", "last hour", "job"):
        table.add_column(title, overflow="fold", no_wrap=title == "last hour")
    for node in state["nodes"]:
        table.add_row(*(Text(printable(cell)) for cell in _cells(node, samples.get(node["name"], []), state["time"])))
    return table


def _cells(node: dict[str, Any], samples: list[dict[str, Any]], now: float) -> list[str]:
    """The row of a node."""
    rates = [sample["write_rate"] for sample in samples]
    if not node["up"]:
        return [node["name"], "-", "down", str(node["trouble"]), "", "", "", "", sparkline(rates), ""]
    status = node["status"]
    age = (status.get("checkpoint") or {}).get("age")
    last = samples[-1] if samples else {}
    jobs = [
        f"{job.get('id')} {100 * job.get('current-progress', 0) // job['total-progress']}%"
        for job in node["jobs"]
        if job.get("type") != "backup" and job.get("total-progress")
    ]
    return [
        node["name"],
        human_value(status.get("mode")),
        human_value(status.get("stage")),
        human_value((status.get("link") or {}).get("state")),
        "never" if age is None else human_seconds(age + max(0.0, now - node["looked"])),
        human_bytes(last.get("lacking")),
        human_bytes(last.get("queue")),
        human_bytes(last.get("write_rate")),
        sparkline(rates),
        ", ".join(jobs),
    ]


def sparkline(values: list[float | None], columns: int = SPARK_COLUMNS) -> str:
    """Values as a line of bars, the largest of each column; a blank where nothing is known."""
    size = -(-len(values) // columns) or 1
    groups = [[one for one in values[at : at + size] if one is not None] for at in range(0, len(values), size)]
    highest = max((max(group) for group in groups if group), default=0.0)
    return "".join(
        " " if not group else BARS[1 + round((len(BARS) - 2) * max(group) / highest)] if highest else BARS[1]
        for group in groups
    )
