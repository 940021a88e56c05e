# SPDX-License-Identifier: BSD-3-Clause
"""What is not a workload of fio: checkpoint, commit, planned stop, resync, start.

Each operation begins with processes of its own. Its value is seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from bench import fio, usage
from bench.disks import Disks, full, room, settle, sparse
from bench.measure import TROUBLE, Opened, Plan
from bench.results import LIMIT, SKIPPED, Sample, Unit, Work
from bench.subjects import Spec, Subject, Unsupported
from bench.workloads import GIB, KIB, MIB, Face, Setup, Workload

TIB = 1024 * GIB

SIZES = {"64m": 64 * MIB, "256m": 256 * MIB, "1g": GIB, "4g": 4 * GIB, "16g": 16 * GIB, "128g": 128 * GIB, "1t": TIB}
SIZES["15t"] = 15 * TIB  # ext4 has no file of 16 TiB

CHECKPOINTS = {f"checkpoint-{name}": SIZES[name] for name in ("64m", "256m", "1g", "4g")}
"""Bytes that are dirty in each of the two overlays."""
STARTS = {f"start-{name}": SIZES[name] for name in ("1g", "16g", "128g", "1t", "15t")}
"""Bytes of the sparse disk."""
COMMIT, SCATTERED, RESYNC, STOP = "commit-1g", "commit-64m-scattered", "resync-1g", "planned-stop"

OPERATIONS = (*CHECKPOINTS, COMMIT, SCATTERED, STOP, RESYNC, *STARTS)
WORKS = [Work(name, Unit.SECONDS) for name in OPERATIONS]

_SPARE = 512 * MIB
"""Room that is left, for metadata and for other programs."""
_SAMPLE = MIB
_SAMPLES_AT = (0, 512 * MIB, GIB - MIB)
"""What is compared after a commit: so many bytes at these offsets."""


def run_operations(plan: Plan, names: Sequence[str]) -> None:
    """Run those of `names`; what there is no room for is reported as skipped."""
    checkpoints = {name: size for name, size in CHECKPOINTS.items() if name in names}
    while checkpoints and not _fits(plan, list(checkpoints)[-1:], 3 * max(checkpoints.values())):
        checkpoints.popitem()
    if checkpoints:
        disks = Disks(plan.folder / "checkpoint", full(max(checkpoints.values())))
        _each(plan, list(checkpoints), disks, Setup.SECONDARY, lambda subject: checkpoint_times(subject, checkpoints))
    for name in (COMMIT, SCATTERED):
        if name in names and _fits(plan, [name], 4 * GIB):
            commit(plan, name, Disks(plan.folder / name, full(2 * GIB)))
    if STOP in names:
        disks = Disks(plan.folder / "stop", full(64 * MIB))
        _each(plan, [STOP], disks, Setup.SECONDARY, lambda subject: [stop_time(subject)])
    if RESYNC in names and _fits(plan, [RESYNC], 3 * GIB):
        disks = Disks(plan.folder / "resync", full(GIB))
        _each(plan, [RESYNC], disks, Setup.PAIR, lambda subject: [resync_time(subject)])
    for name in STARTS:
        if name in names:
            _starts(plan, name)


Measured = tuple[float, dict[str, float]]
"""Seconds, and details as in results.NAMES."""


def _fits(plan: Plan, names: Sequence[str], needed: int) -> bool:
    """Whether there is room for `needed` bytes; if not, `names` are reported as skipped."""
    free = room(plan.folder)
    if needed + _SPARE <= free:
        return True
    text = f"{SKIPPED}: needs {needed / GIB:.1f} GiB in {plan.folder.parent}, where {free / GIB:.1f} GiB are free"
    for name in names:
        for spec in plan.specs:
            plan.report(Sample(name, spec.name, 0, None, reason=text))
    return False


def _each(
    plan: Plan, names: list[str], disks: Disks, setup: Setup, run: Callable[[Subject], Iterable[Measured]]
) -> None:
    """Run on each subject in each round; `run` yields one Measured for each of `names`.

    All subjects use the same disks, one after the other, so that only one set of them has to fit.
    """
    try:
        for round_ in range(plan.rounds):
            for spec in plan.turn(round_):
                if spec.name == LIMIT:
                    continue
                left = list(names)
                with Opened(plan, spec, disks, setup) as opened:
                    try:
                        for seconds, details in run(opened.get()):
                            plan.report(Sample(left.pop(0), spec.name, round_, seconds, details))
                    except (Unsupported, *TROUBLE) as error:
                        sample = opened.failure(left[0], round_, error)
                        for name in left:
                            plan.report(replace(sample, work=name))
                disks.remove_fresh()
    finally:
        disks.remove()


def _timed(run: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun = time.monotonic()
    run()
    return time.monotonic() - begun


def checkpoint_times(subject: Subject, sizes: dict[str, int]) -> Iterator[Measured]:
    """A checkpoint with so many bytes dirty in each overlay, one size after the other."""
    for size in sizes.values():
        for face in (Face.TARGET, Face.GUEST):
            fio.fill(subject.uri(face), size)
        dirty = min(subject.dirty())
        if dirty < size:
            raise AssertionError(f"only {dirty} of {size} bytes are dirty")
        yield _timed(subject.checkpoint), {"dirty": dirty}


def commit(plan: Plan, name: str, disks: Disks) -> None:
    """A failover with the guest's writes in the active disk, until everything is in the secondary disk.

    In order, they are 1 GiB; scattered, 64 MiB in pieces of 4 KiB all over the disk.
    """

    def run(subject: Subject) -> Iterator[Measured]:
        face = subject.uri(Face.GUEST)
        if name == COMMIT:
            fio.fill(face, GIB)
        else:
            fio.scatter(face, 64 * MIB)
        dirty = subject.dirty()[0]
        expected = [fio.read(face, offset, _SAMPLE) for offset in _SAMPLES_AT]
        settle(plan.folder)
        seconds = _timed(subject.failover)
        with open(disks.disk("secondary"), "rb") as file:
            for offset, data in zip(_SAMPLES_AT, expected, strict=True):
                file.seek(offset)
                if file.read(_SAMPLE) != data:
                    raise AssertionError(f"after the commit the disk does not hold what the guest saw at {offset}")
        yield seconds, {"dirty": dirty}

    _each(plan, [name], disks, Setup.SECONDARY, run)


def stop_time(subject: Subject) -> Measured:
    """A planned stop with a little in each overlay."""
    for face in (Face.TARGET, Face.GUEST):
        fio.fill(subject.uri(face), 16 * MIB)
    return _timed(subject.planned_stop), {}


def resync_time(subject: Subject) -> Measured:
    """From the start of a secondary that has missed 1 GiB of writes until it has all of them."""
    subject.lose_secondary()
    fio.fill(subject.uri(Face.PRIMARY), GIB)
    subject.find_secondary()
    seconds = _timed(subject.wait_in_sync)
    return seconds, {"bytes_per_s": GIB / seconds}


def _starts(plan: Plan, name: str) -> None:
    """From nothing to a pair that replicates, with overlays made on the way, and its memory then and in use."""
    size = STARTS[name]
    workload = Workload("primary", "randwrite", 4 * KIB, 16)
    for round_ in range(plan.rounds):
        for spec in plan.turn(round_):
            disks = Disks(plan.folder / "start", sparse(size))
            try:
                plan.report(_start(plan, name, spec, disks, workload, size, round_))
            finally:
                disks.remove()


def _start(plan: Plan, name: str, spec: Spec, disks: Disks, workload: Workload, size: int, round_: int) -> Sample:
    with Opened(plan, spec, disks, Setup.PAIR) as opened:
        try:
            for disk in ("primary", "secondary", LIMIT):
                disks.disk(disk)
            seconds = _timed(opened.get)
            subject = opened.get()
            started = usage.memory(subject.pids())
            fio.run(fio.command(workload, subject.uri(Face.PRIMARY), 1.0, size, round_ + 1), 1.0)
            subject.drain()
            memory = usage.memory(subject.pids())
        except TROUBLE as error:
            return opened.failure(name, round_, error)
    settle(plan.folder)
    details = {"memory_start": started.private, "memory_private": memory.private, "memory_peak": memory.peak}
    return Sample(name, spec.name, round_, seconds, details)
