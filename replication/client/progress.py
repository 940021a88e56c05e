# SPDX-License-Identifier: BSD-3-Clause
"""The jobs of a node, as bars."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .session import Session
from .values import human_bytes, human_value, printable

# rich is imported where it draws: failover has to work on a host that lacks it.
# ruff: noqa: PLC0415

JOBS_WATCH_S = 0.5


def watch_jobs(client: Session, failed: dict[str, str], show: Callable[[list[dict[str, Any]]], None]) -> None:
    """Show the jobs until none is left that will end; `failed` gets the error of each that ended with one."""
    while True:
        jobs = client.call("query-jobs")
        show(jobs)
        failed.update({str(job.get("id")): str(job["error"]) for job in jobs if job.get("error")})
        # The backup job is copy-before-write, which lasts as long as replication itself.
        if all(job.get("type") == "backup" or job.get("status") in ("concluded", "null") for job in jobs):
            return
        time.sleep(JOBS_WATCH_S)


def job_progress(screen: Any) -> Any:
    """rich's progress display with the columns that a job has."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TextColumn("{task.fields[state]}", markup=False),
        console=screen,
        auto_refresh=False,
    )


def show_jobs(progress: Any, jobs: list[dict[str, Any]], tasks: dict[str, Any]) -> None:
    """Bring the display up to date with `jobs`; `tasks` remembers which line is whose."""
    names = {str(job.get("id")) for job in jobs}
    for name in [name for name in tasks if name not in names]:
        progress.remove_task(tasks.pop(name))
    for job in jobs:
        name = str(job.get("id"))
        total, current = (
            value if isinstance(value := job.get(f"{which}-progress"), int | float) else 0
            for which in ("total", "current")
        )
        state = human_value(job.get("status")) + (f": {printable(job['error'])}" if job.get("error") else "")
        fields = {"amount": f"{human_bytes(current)} of {human_bytes(total)}", "state": state}
        # Nothing to do is all done, not an endless bar.
        total, current = (total, current) if total else (1, 1 if job.get("status") == "concluded" else 0)
        if name not in tasks:
            tasks[name] = progress.add_task(f"{printable(name)} ({human_value(job.get('type'))})", total=1, **fields)
        progress.update(tasks[name], total=total, completed=current, **fields)
    progress.refresh()
