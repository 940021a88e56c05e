# SPDX-License-Identifier: BSD-3-Clause
"""What has been measured: samples, their medians, and ratios between subjects.

A ratio says how many times better a subject is than another: rates are divided, times the other way round. It is taken
between two samples of the same round, which ran one straight after the other, and only then is the median taken: what
slows the whole machine down for a while cancels out.
"""

from __future__ import annotations

import enum
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

QEMU = "qemu"
LIMIT = "file"
SKIPPED = "skipped"
"""The first word of the reason for what there was no room for."""


class Unit(enum.Enum):
    """What a sample's value counts."""

    RATE = "requests/s"
    SECONDS = "s"


@dataclass(frozen=True)
class Work:
    """One line of the tables. `block` is the bytes of a request, where there are requests."""

    name: str
    unit: Unit
    block: int = 0


@dataclass(frozen=True)
class Sample:
    """One measurement of one subject: a value, or a text that says why there is none.

    `failed` tells an operation that went wrong from one that the subject does not have.
    """

    work: str
    subject: str
    round: int
    value: float | None
    details: Mapping[str, float] = field(default_factory=dict)
    """Units are in the names; NAMES below says what there may be."""
    reason: str = ""
    failed: bool = False


NAMES = {
    "seen": "the rate that fio saw, without the time to drain",
    "drain_s": "from the end of fio until the secondary had everything",
    "p50_us": "median latency; of mixed work the slower direction's",
    "p99_us": "99th percentile, likewise",
    "processor_s_per_gib": "processor time of all processes of the subject, for each GiB moved",
    "memory_peak": "bytes resident at most (VmHWM), all processes together",
    "memory_private": "bytes resident of no other process, at the end of the run",
    "checkpoints": "taken during the run",
    "checkpoint_s": "median duration of those",
    "dirty": "bytes in each overlay",
    "bytes_per_s": "of the operation",
}


class Results:
    """All samples of one run."""

    def __init__(self, works: Iterable[Work], samples: Iterable[Sample] = ()) -> None:
        self.works = {work.name: work for work in works}
        self.samples: list[Sample] = list(samples)

    def of(self, work: str, subject: str) -> list[Sample]:
        """The samples of one cell of the table."""
        return [sample for sample in self.samples if (sample.work, sample.subject) == (work, subject)]

    def value(self, work: str, subject: str) -> float | None:
        """The median, None if nothing was measured."""
        return median(sample.value for sample in self.of(work, subject))

    def detail(self, work: str, subject: str, name: str) -> float | None:
        """The median of one of the details."""
        return median(sample.details.get(name) for sample in self.of(work, subject))

    def ratio(self, work: str, subject: str, base: str) -> float | None:
        """How many times better `subject` is than `base`: the median over the rounds that both have."""
        return median(self.ratios(work, subject, base))

    def ratios(self, work: str, subject: str, base: str) -> Iterator[float]:
        """The ratio of each round that both have."""
        others = {sample.round: sample.value for sample in self.of(work, base)}
        for sample in self.of(work, subject):
            other = others.get(sample.round)
            if not sample.value or not other:
                continue
            rate = self.works[work].unit is Unit.RATE
            yield sample.value / other if rate else other / sample.value

    def tail(self, work: str, subject: str, base: str) -> float | None:
        """How many times shorter the 99th percentile of the latency is than that of `base`, likewise."""
        others = {sample.round: sample.details.get("p99_us") for sample in self.of(work, base)}
        pairs = [(sample.details.get("p99_us"), others.get(sample.round)) for sample in self.of(work, subject)]
        return median(other / own for own, other in pairs if own and other)

    def behind(self, base: str) -> Iterator[tuple[str, str, float]]:
        """(work, subject, ratio) of what is not as good as `base`, the limit aside."""
        for work in self.done():
            for subject in self.subjects():
                ratio = self.ratio(work, subject, base)
                if subject not in (base, LIMIT) and ratio is not None and ratio < 1:
                    yield work, subject, ratio

    def reason(self, work: str, subject: str) -> str:
        """Why there is no value, or not in each round; empty if there is."""
        return next((sample.reason for sample in self.of(work, subject) if sample.reason), "")

    def failures(self) -> list[Sample]:
        """The samples of operations that went wrong."""
        return [sample for sample in self.samples if sample.failed]

    def done(self) -> list[str]:
        """The names of all works of which there is a sample, in the order of `works`."""
        there = {sample.work for sample in self.samples}
        return [name for name in self.works if name in there]

    def subjects(self) -> list[str]:
        """All subjects: QEMU first, the limit last."""
        names = list(dict.fromkeys(sample.subject for sample in self.samples))
        return sorted(names, key=lambda name: (name != QEMU, name == LIMIT))

    def plain(self) -> dict[str, Any]:
        """For JSON: each sample, and the summary of each cell."""
        summary = []
        for work in self.done():
            for subject in self.subjects():
                of = self.of(work, subject)
                if not of:
                    continue
                details = dict.fromkeys(name for sample in of for name in sample.details)
                line: dict[str, Any] = {"work": work, "subject": subject, "unit": self.works[work].unit.value}
                line["value"] = self.value(work, subject)
                line |= {
                    f"ratio_to_{base}": self.ratio(work, subject, base) for base in (QEMU, LIMIT) if base != subject
                }
                line |= {
                    f"p99_ratio_to_{base}": self.tail(work, subject, base) for base in (QEMU, LIMIT) if base != subject
                }
                line |= {name: self.detail(work, subject, name) for name in details}
                line["reason"] = self.reason(work, subject)
                summary.append(line)
        return {"samples": [asdict(sample) for sample in self.samples], "summary": summary}


def median(values: Iterable[float | None]) -> float | None:
    """The median of those that are numbers, None if none is."""
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None
