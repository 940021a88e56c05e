# SPDX-License-Identifier: BSD-3-Clause
"""The crash harness: processes of the product are killed with SIGKILL, started again, and compared exactly.

A run consists of histories, each with a seed of its own (SEED and its number), so that one of them can be replayed
alone: `make torture SEED=... HISTORY=...`. Four of five are of a secondary (secondary_history.py), every fifth is of
a primary (primary_history.py), in turn async and sync. A history kills KILLS_PER_HISTORY times: with a thread held at
a pause point (points.py has them all), in the midst of requests, of a command, and while the process starts again. Some
points it owes: if chance has not led there in half of the kills, the rest of them begin with those.

What is verified after each restart
* Stage and epoch are such as the history permits.
* Every byte of both faces of both disks has the value of its last answered request, or of one that was under way at
  the same time or at the kill. The same holds for every read in between.
* A start, checkpoint, stop or failover that was under way has happened for all disks, or for none.
* The raw disk is what the target face shows (none, running), or what the guest face shows (done).
* A request that must be refused is refused, with the right errno, and no other; a refusal is never taken back.
* A commit that was cut short comes to its end, and the overlays pass `qemu-img check`.
* Of a pair: the primary's disk as above; what the protocol has promised of the secondary's; after the resync both raw
  disks are equal; the secondary's guest face is what the primary's disks were at one instant of the last checkpoint, on
  both disks or, of a checkpoint that was cut short, on neither. While the two find each other again, either is killed.
* No process prints a traceback.

What is not verified
* Power cuts: the kernel lives on, so what was written but not synced survives every kill here.
* Byte order within one unanswered request: any mixture of its old and new bytes is accepted.
* Kills of a secondary while its primary's guest writes; disks behind NBD; failing disks, links and full file systems.
  The end-to-end tests have these, each with its interleaving forced.

What a replay repeats: the disks' content, every choice of requests, commands, points and kinds of kills of a life,
given the stage in which the life begins. What it cannot repeat: how the threads of the killed process, the kernel and
this client are scheduled. So after a random kill the next life may find another of the permitted outcomes than it did
the first time, and then its plan differs. A kill at a pause point replays well; for a rare one at a random moment the
history has to be run several times.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

from torture.history import History, Outcome
from torture.primary_history import PrimaryHistory
from torture.secondary_history import SecondaryHistory

KILLS_PER_HISTORY = 20

WORKERS = 2

HISTORY_S = 100.0
"""Longest time for all histories of a batch to make any progress: several times what one takes."""

PRIMARY_EVERY = 5


def history_of(seed: str, number: int, kills: int) -> History:
    """The history of this number, not yet begun."""
    kind: type[History] = PrimaryHistory if number % PRIMARY_EVERY == PRIMARY_EVERY - 1 else SecondaryHistory
    return kind(seed, number, kills)


def run_history(seed: str, number: int) -> Outcome:
    """Play one history; a failure is in the outcome."""
    return history_of(seed, number, KILLS_PER_HISTORY).run()


def run(seed: str, numbers: Iterable[int], workers: int = WORKERS) -> Iterator[Outcome]:
    """Play histories in processes of their own, and yield their outcomes as they come; none is begun any more when
    the caller leaves."""
    # Spawned, not forked: a process that has nbdkits for children (--exit-with-parent) must not have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: list[Future[Outcome]] = [pool.submit(run_history, seed, number) for number in numbers]
        try:
            for future in as_completed(futures, timeout=HISTORY_S * len(futures)):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def told(seed: str, outcome: Outcome) -> str:
    """A failure, with what replays it."""
    return f"{outcome.failure}\nto replay this history alone: make torture SEED={seed} HISTORY={outcome.number}"


class Tally:
    """The sum of several outcomes."""

    def __init__(self) -> None:
        self.histories = 0
        self.kills = 0
        self.requests = 0
        self.points: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.failed: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """Count one more."""
        self.histories += 1
        self.kills += outcome.kills
        self.requests += outcome.requests
        self.points += outcome.points
        self.moments += outcome.moments
        self.endings += outcome.endings
        if outcome.failure is not None:
            self.failed.append(outcome)


def run_all(seed: str, numbers: Iterable[int], told_of: Callable[[Tally], None], workers: int = WORKERS) -> Tally:
    """Play histories until they are through or one has failed; `told_of` is called after each."""
    tally = Tally()
    for outcome in run(seed, numbers, workers):
        tally.add(outcome)
        told_of(tally)
        if tally.failed:
            break
    return tally
