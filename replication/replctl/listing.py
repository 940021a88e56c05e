# SPDX-License-Identifier: BSD-3-Clause
"""All nodes of this host in one table. Each is asked by a thread of its own, and when the time is over, whoever has not
answered stands there as such: a node that hangs holds nobody up."""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from replication.client.qmp import Refused
from replication.client.session import NotRunning, Session, Unreachable, Unusable
from replication.client.values import human_bytes, human_seconds, printable

from . import nodes


@dataclass
class Entry:
    """One node, as --json shows it (with - for _); None for what is not known."""

    name: str
    state: str
    """up, not-running, no-answer, refused, or bad-config."""
    text: str | None = None
    """Why it is not up."""
    mode: str | None = None
    stage: str | None = None
    link: str | None = None
    checkpoint_age: float | None = None
    """Seconds."""
    lag_bytes: int | None = None
    """What the secondary lacks: in the forward queues, or out of sync."""
    size_bytes: int | None = None
    progress: float | None = None
    """Per cent of the resync or commit that runs."""
    error: str | None = None
    """The description of the latched failure."""


def show(options: argparse.Namespace) -> None:
    """Show the table."""
    entries = ask_all(nodes.names(), options.within)
    if options.json:
        print(json.dumps([{key.replace("_", "-"): value for key, value in asdict(e).items()} for e in entries]))
    elif not entries:
        print(f"no nodes: there is no file NAME.toml in {nodes.folder()}")
    else:
        print("\n".join(table(entries)))


def ask_all(names: list[str], within_s: float) -> list[Entry]:
    """One entry a node, in the order of `names`, after `within_s` at the latest."""
    deadline = time.monotonic() + within_s
    answers: queue.SimpleQueue[Entry] = queue.SimpleQueue()
    for name in names:
        # A daemon: what hangs does not keep the process.
        threading.Thread(target=lambda name=name: answers.put(_ask(name, deadline)), daemon=True).start()
    found: dict[str, Entry] = {}
    while len(found) < len(names):
        try:
            entry = answers.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            break
        found[entry.name] = entry
    late = f"no answer within {within_s:g} s"
    return [found.get(name) or Entry(name, "no-answer", late) for name in names]


def _ask(name: str, deadline: float) -> Entry:
    try:
        with Session(nodes.control_of(name), max(deadline - time.monotonic(), 0.001)) as session:
            return entry_of(name, session.call("query-replication"), session.call("query-jobs"))
    except NotRunning as error:
        return Entry(name, "not-running", str(error))
    except Unreachable as error:
        return Entry(name, "no-answer", str(error))
    except Unusable as error:
        return Entry(name, "bad-config", str(error))
    except Refused as error:
        return Entry(name, "refused", str(error))
    except Exception as error:  # noqa: BLE001  an answer of a form that nobody expected must not take the others down
        return Entry(name, "no-answer", f"unexpected {type(error).__name__}: {error}")


def entry_of(name: str, status: dict[str, Any], jobs: list[dict[str, Any]]) -> Entry:
    """What a node has answered."""
    disks = [disk for disk in status.get("disks") or [] if isinstance(disk, dict)]
    error = status.get("error")
    return Entry(
        name,
        "up",
        mode=status.get("mode"),
        stage=status.get("stage"),
        link=(status.get("link") or {}).get("state"),
        checkpoint_age=(status.get("checkpoint") or {}).get("age"),
        lag_bytes=sum(disk.get("forward-queue-bytes", 0) + disk.get("out-of-sync-bytes", 0) for disk in disks),
        size_bytes=sum(disk.get("size", 0) for disk in disks),
        progress=_progress(jobs),
        error=str(error.get("desc", "failed")) if isinstance(error, dict) else error,
    )


def _progress(jobs: list[dict[str, Any]]) -> float | None:
    """Of all resync and commit jobs together; copy-before-write goes on for ever."""
    running = [job for job in jobs if job.get("type") != "backup" and job.get("status") == "running"]
    total = sum(job.get("total-progress", 0) for job in running)
    return round(100 * sum(job.get("current-progress", 0) for job in running) / total, 1) if total else None


def table(entries: Iterable[Entry]) -> Iterator[str]:
    """The lines; what is wrong with a node stands at the end of its own."""
    rows = [("NAME", "MODE", "STAGE", "LINK", "CHECKPOINT", "LAG", "SIZE", "PROGRESS", "")]
    for entry in entries:
        up = entry.state == "up"
        rows.append(
            (
                entry.name,
                entry.mode or "-",
                entry.stage or "-" if up else entry.state,
                entry.link or "-",
                human_seconds(entry.checkpoint_age),
                human_bytes(entry.lag_bytes),
                human_bytes(entry.size_bytes),
                "-" if entry.progress is None else f"{entry.progress:.0f}%",
                (entry.error if up else entry.text) or "",
            )
        )
    widths = [max(len(printable(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(f"{printable(cell):<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
