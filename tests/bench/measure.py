# SPDX-License-Identifier: BSD-3-Clause
"""Runs workloads: subjects in turn within each round, each on equal terms.

Before a run that writes, a checkpoint empties the overlays and the file system's dirty pages go to the disk. The rate
of such a run is the drained rate: what fio has moved, divided by the time until the secondary had all of it. So a long
queue between primary and secondary is no advantage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import nbd

from bench import fio, usage
from bench.disks import Disks, settle
from bench.results import Sample, median
from bench.subjects import Spec, Subject, Unsupported
from bench.workloads import CHECKPOINT_EVERY_S, GIB, Setup, Workload
from lab import Lab
from qmp import QmpError
from waiting import DEADLINE_S

TROUBLE = (AssertionError, QmpError, fio.FioError, nbd.Error, OSError, EOFError)
"""What can go wrong with a subject; the lab reports a process that dies or hangs as an AssertionError."""


@dataclass(frozen=True)
class Plan:
    """What holds for the whole run: `folder` for the disks, `size` of a disk in bytes, and whom to tell."""

    specs: Sequence[Spec]
    folder: Path
    size: int
    seconds: float
    rounds: int
    report: Callable[[Sample], None]
    trouble: Callable[[str, str], None]
    """Called with a subject's name and what went wrong with it beside a sample."""

    def turn(self, round_: int) -> list[Spec]:
        """The order of a round: another one begins each time."""
        first = round_ % len(self.specs)
        return [*self.specs[first:], *self.specs[:first]]


class Opened:
    """A subject in one arrangement, opened when it is needed, and anew after a failure."""

    def __init__(self, plan: Plan, spec: Spec, disks: Disks, setup: Setup) -> None:
        self.name = spec.name
        self._plan = plan
        self._spec = spec
        self._disks = disks
        self._setup = setup
        self._lab: Lab | None = None
        self._subject: Subject | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        text = self.close()
        if text:
            self._plan.trouble(self.name, text)

    def get(self) -> Subject:
        """The subject; whatever opening it can fail with."""
        if self._subject is None:
            self._lab = Lab()
            self._subject = self._spec.open(self._lab, self._disks, self._setup)
        return self._subject

    def close(self) -> str:
        """End its processes; what they did wrong, or nothing."""
        lab, self._lab, self._subject = self._lab, None, None
        if lab is not None:
            try:
                lab.close()
            except AssertionError as error:
                return str(error)
        return ""

    def failure(self, work: str, round_: int, error: BaseException) -> Sample:
        """The sample of something that raised one of TROUBLE, or Unsupported.

        After the former the processes are ended. If they ended by themselves before, this was the cause.
        """
        if isinstance(error, Unsupported):
            return Sample(work, self.name, round_, None, reason=str(error))
        text = " ".join((self.close() or str(error)).split()) or type(error).__name__
        return Sample(work, self.name, round_, None, reason=f"failed: {text}", failed=True)


def run_workloads(plan: Plan, workloads: Sequence[Workload], make: Callable[[Path], None]) -> None:
    """Run all, arrangement by arrangement, on disks made by `make`; the plan's `report` gets the samples."""
    for setup in dict.fromkeys(workload.setup for workload in workloads):
        with ExitStack() as stack:
            opened = {
                spec.name: stack.enter_context(Opened(plan, spec, Disks(plan.folder / spec.name, make), setup))
                for spec in plan.specs
            }
            for workload in workloads:
                if workload.setup is not setup:
                    continue
                for round_ in range(plan.rounds):
                    for spec in plan.turn(round_):
                        plan.report(_sample(plan, workload, opened[spec.name], round_))


def _sample(plan: Plan, workload: Workload, opened: Opened, round_: int) -> Sample:
    """One run, or why there is none."""
    try:
        subject = opened.get()
        prepare(plan, workload, subject, round_)
        return measure(plan, workload, subject, round_)
    except TROUBLE as error:
        return opened.failure(workload.name, round_, error)


def prepare(plan: Plan, workload: Workload, subject: Subject, round_: int) -> None:
    """Bring the overlays and the page cache into the state in which the workload is to begin."""
    if not workload.writes:
        return
    if not workload.warm:
        subject.checkpoint()
    elif round_ == 0:
        fio.fill(subject.uri(workload.face), plan.size)
        subject.drain()
    settle(plan.folder)


def measure(plan: Plan, workload: Workload, subject: Subject, round_: int) -> Sample:
    """One run of fio, and what it has cost."""
    pids = subject.pids()
    usage.reset_peak(pids)
    before_s = usage.processor_s(pids)
    command = fio.command(workload, subject.uri(workload.face), plan.seconds, plan.size, seed=round_ + 1)
    details: dict[str, float] = {}
    if workload.checkpoints:
        checkpoints = Checkpoints(subject)
        result = fio.run(command, plan.seconds, checkpoints.beside)
        details |= checkpoints.details()
    else:
        result = fio.run(command, plan.seconds)
    ended = time.monotonic()
    if workload.writes:
        subject.drain()
    drain_s = time.monotonic() - ended if workload.writes else 0.0
    memory = usage.memory(subject.pids())
    processor_s = usage.processor_s(pids) - before_s
    details |= {
        "seen": result.requests / result.runtime_s,
        "drain_s": drain_s,
        "bytes_per_s": result.bytes / (result.runtime_s + drain_s),
        "p50_us": result.p50_us,
        "p99_us": result.p99_us,
        "processor_s_per_gib": processor_s / (result.bytes / GIB),
        "memory_peak": memory.peak,
        "memory_private": memory.private,
    }
    return Sample(workload.name, subject.name, round_, result.requests / (result.runtime_s + drain_s), details)


class Checkpoints:
    """Takes checkpoints, one each CHECKPOINT_EVERY_S, while fio runs; a failure is raised when that has ended."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._over = threading.Event()
        self._durations_s: list[float] = []
        self._error: Exception | None = None

    @contextmanager
    def beside(self, guest: int) -> Iterator[None]:
        """Take them while the block lasts, in which the process `guest` reads and writes."""
        thread = threading.Thread(target=self._run, args=(guest,), name="checkpoints", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(2 * DEADLINE_S)
        if thread.is_alive():
            raise AssertionError(f"{self._subject.name}: a checkpoint did not end within {2 * DEADLINE_S:g} s")
        if self._error is not None:
            raise self._error

    def _run(self, guest: int) -> None:
        due = time.monotonic()
        try:
            while not self._over.wait(max(0.0, due - time.monotonic())):
                begun = time.monotonic()
                self._subject.checkpoint_under_load(guest)
                self._durations_s.append(time.monotonic() - begun)
                due = max(due + CHECKPOINT_EVERY_S, time.monotonic())
        except TROUBLE as error:
            self._error = error

    def details(self) -> dict[str, float]:
        """How many there were, and how long one took."""
        return {"checkpoints": len(self._durations_s), "checkpoint_s": median(self._durations_s) or 0.0}
