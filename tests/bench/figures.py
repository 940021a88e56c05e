# SPDX-License-Identifier: BSD-3-Clause
"""The figures to reach, and whether a run has reached them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.results import LIMIT, QEMU, Results


@dataclass(frozen=True)
class Figure:
    """`work` must be `at_least` times as good as `base`. Where that is said, it must take `at_most_s` seconds at most,
    and its p99 must be `tail` times shorter than that of `base`. `at_least` 0: only the seconds count."""

    work: str
    at_least: float
    base: str = QEMU
    at_most_s: float | None = None
    tail: float | None = None


FIGURES = (
    Figure("primary-randwrite-4k-16", 3, tail=1),
    Figure("primary-randwrite-4k-1", 4, tail=1),
    Figure("primary-write-256k-16", 1.8),
    Figure("primary-write-1m-16", 1.8),
    Figure("primary-randread-4k-16", 2.5),
    Figure("sync-randwrite-4k-16", 1.5),
    Figure("guest-randwrite-4k-16", 3, tail=1),
    Figure("guest-randread-4k-16", 2, tail=1),
    Figure("guest-write-256k-16", 1.8),
    Figure("target-randwrite-4k-16", 2),
    Figure("target-write-256k-16", 1.8),
    Figure("checkpoint-4g", 100, at_most_s=0.010),
    Figure("commit-1g", 2),
    Figure("start-15t", 0, at_most_s=5),
    Figure("primary-randread-4k-16", 0.7, LIMIT),
    Figure("primary-write-1m-16", 0.3, LIMIT),
    Figure("slow-randread-4k-16", 0.85, LIMIT),
    Figure("slow-randwrite-4k-16", 0.85, LIMIT),
)
"""Compared is the median of the ratios of all rounds. The limit is nbdkit's C file plugin, which forwards nothing."""


@dataclass(frozen=True)
class Verdict:
    """What became of a figure with one subject. `reached` is None where there is nothing to compare."""

    figure: Figure
    subject: str
    ratio: float | None
    seconds: float | None
    reached: bool | None
    tail: float | None
    """The ratio of the p99, where the figure asks for one."""
    limit: float | None
    """The same ratio of the limit: what no server on nbdkit can do better here."""


def behind(results: Results) -> Iterator[tuple[str, str, float]]:
    """(work, subject, ratio) of what QEMU is better at, but for what a figure judges by seconds alone."""
    excused = {figure.work for figure in FIGURES if not figure.at_least}
    return (row for row in results.behind(QEMU) if row[0] not in excused)


def verdicts(results: Results, figures: Iterable[Figure] = FIGURES) -> Iterator[Verdict]:
    """One for each figure whose work has run, and each subject that is neither QEMU nor the limit."""
    for figure in figures:
        for subject in results.subjects():
            if subject in (QEMU, LIMIT) or not results.of(figure.work, subject):
                continue
            ratio = results.ratio(figure.work, subject, figure.base)
            seconds = results.value(figure.work, subject) if figure.at_most_s is not None else None
            reached = None if ratio is None else ratio >= figure.at_least
            if not figure.at_least:
                reached = None if seconds is None else True
            if reached and figure.at_most_s is not None:
                reached = seconds is not None and seconds <= figure.at_most_s
            tail = results.tail(figure.work, subject, figure.base) if figure.tail is not None else None
            if reached and figure.tail is not None:
                reached = tail is not None and tail >= figure.tail
            limit = results.ratio(figure.work, LIMIT, QEMU) if figure.base == QEMU else None
            yield Verdict(figure, subject, ratio, seconds, reached, tail, limit)
