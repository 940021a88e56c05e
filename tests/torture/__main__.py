# SPDX-License-Identifier: BSD-3-Clause
"""`make torture SEED=... KILLS=... HISTORY=...`: the crash harness for as long as one likes; exit code 1 on failure."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from torture.harness import KILLS_PER_HISTORY, WORKERS, Tally, run_all, told


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--seed", default="", help="any text; without it a new one is made up")
    parser.add_argument("--kills", default="", help="how many, rounded up to whole histories (default 5,000)")
    parser.add_argument("--history", default="", help="replay only the history of this number")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"histories at a time (default {WORKERS})")
    arguments = parser.parse_args()
    seed = arguments.seed or secrets.token_hex(4)
    if arguments.history:
        numbers = range(int(arguments.history), int(arguments.history) + 1)
    else:
        numbers = range(-(-int(arguments.kills or 5000) // KILLS_PER_HISTORY))
    console = Console()
    console.print(f"seed {seed}: {len(numbers)} histories of {KILLS_PER_HISTORY} kills", highlight=False)
    begun = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("kills"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("no failure", total=len(numbers) * KILLS_PER_HISTORY)

        def told_of(tally: Tally) -> None:
            state = f"{len(tally.failed)} FAILED" if tally.failed else "no failure"
            progress.update(task, completed=tally.kills, description=f"{state}, {tally.requests:,} requests")

        tally = run_all(seed, numbers, told_of, arguments.workers)
    _show(console, tally, time.monotonic() - begun)
    for outcome in tally.failed:
        console.print(told(seed, outcome), highlight=False, markup=False, soft_wrap=True)
    return 1 if tally.failed else 0


def _show(console: Console, tally: Tally, duration_s: float) -> None:
    """What was done, so that one sees what was not."""
    table = Table(title=f"{tally.kills:,} kills in {tally.histories} histories, {duration_s:.0f} s")
    table.add_column("killed")
    table.add_column("times", justify="right")
    groups: tuple[tuple[Counter[str], str], ...] = (
        (tally.moments, ""),
        (tally.points, "at point "),
        (tally.endings, "under way: "),
    )
    for counted, prefix in groups:
        for name, count in sorted(counted.items()):
            table.add_row(prefix + name, f"{count:,}")
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
