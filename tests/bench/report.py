# SPDX-License-Identifier: BSD-3-Clause
"""The tables that a run prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from bench.figures import FIGURES, Figure, Verdict
from bench.results import LIMIT, QEMU, SKIPPED, Results, Unit, Work
from bench.workloads import LARGE

NOTHING = "-"


def speed_table(results: Results) -> Table:
    """Medians of rates and times, ratios to QEMU and to the limit, and the figures where there are any."""
    subjects = results.subjects()
    ours = _ours(results)
    table = Table(title="Speed: medians; how many times as good as QEMU and as the limit; p99 against QEMU's")
    table.add_column("work", no_wrap=True)
    for subject in subjects:
        table.add_column(subject, justify="right")
    for base, sign in ((QEMU, "QEMU"), (LIMIT, "limit")):
        if base in subjects:
            for subject in ours:
                table.add_column(f"{subject if len(ours) > 1 else ''}/{sign}", justify="right")
    tails = ours if QEMU in subjects else []
    for subject in tails:
        table.add_column(f"{subject if len(ours) > 1 else ''} p99/QEMU", justify="right")
    table.add_column("wanted", justify="right")
    for name in results.done():
        work = results.works[name]
        cells = [cell_text(results, work, subject) for subject in subjects]
        for base in (QEMU, LIMIT):
            if base in subjects:
                cells += [ratio_text(results.ratio(name, subject, base)) for subject in ours]
        cells += [ratio_text(results.tail(name, subject, QEMU)) for subject in tails]
        wanted = ", ".join(wanted_text(figure) for figure in FIGURES if figure.work == name)
        table.add_row(name, *cells, wanted)
    return table


def cost_table(results: Results) -> Table:
    """Latency, processor time and memory: one column for each subject, p50/p99 and so on in it."""
    subjects = results.subjects()
    table = Table(title="Latency p50/p99 in us; processor s for each GiB; memory at most/private in MiB")
    table.add_column("work", no_wrap=True)
    for group in ("us", "s/GiB", "MiB"):
        for subject in subjects:
            table.add_column(f"{subject} {group}", justify="right")
    for name in results.done():
        latency = [_pair(results, name, subject, ("p50_us", "p99_us"), 1) for subject in subjects]
        processor = [_single(results, name, subject, "processor_s_per_gib") for subject in subjects]
        memory = [_pair(results, name, subject, ("memory_peak", "memory_private"), 1 << 20) for subject in subjects]
        cells = [*latency, *processor, *memory]
        if any(cell != NOTHING for cell in cells):
            table.add_row(name, *cells)
    return table


def figures_table(verdicts: list[Verdict]) -> Table:
    """The figures, and whether they are reached."""
    table = Table(title="Figures to reach")
    for column in ("work", "subject", "wanted", "measured", "", "limit"):
        table.add_column(column, no_wrap=True)
    for verdict in verdicts:
        measured = ratio_text(verdict.ratio)
        if verdict.seconds is not None:
            measured += f", {seconds_text(verdict.seconds)}"
        if verdict.tail is not None:
            measured += f", p99 {ratio_text(verdict.tail)}"
        limit = ratio_text(verdict.limit)
        figure = verdict.figure
        table.add_row(figure.work, verdict.subject, wanted_text(figure), measured, verdict_text(verdict), limit)
    return table


def reasons(results: Results) -> Iterator[str]:
    """One line for each cell that has no value, or lacks it in some rounds."""
    for name in results.done():
        for subject in results.subjects():
            reason = results.reason(name, subject)
            if reason:
                missing = sum(sample.value is None for sample in results.of(name, subject))
                yield f"{name}: {subject}: {reason} ({missing} of {len(results.of(name, subject))} rounds)"


def verdict_text(verdict: Verdict) -> str:
    """In words."""
    if verdict.reached is None:
        return "nothing to compare"
    return "reached" if verdict.reached else "NOT reached"


def wanted_text(figure: Figure) -> str:
    """What a figure asks for."""
    if not figure.at_least:
        return f"<= {seconds_text(figure.at_most_s or 0)}"
    text = f">= {figure.at_least:g} x {'limit' if figure.base == LIMIT else 'QEMU'}"
    if figure.tail is not None:
        text += f", p99 {figure.tail:g} x"
    return text if figure.at_most_s is None else f"{text}, <= {seconds_text(figure.at_most_s)}"


def behind_text(work: str, subject: str, ratio: float) -> str:
    """What is not as good as QEMU, as a line."""
    return f"{work}: {subject} is behind QEMU: {ratio:.2f}"


def cell_text(results: Results, work: Work, subject: str) -> str:
    """The median with its unit, or in a word why there is none."""
    value = results.value(work.name, subject)
    if value is not None:
        return value_text(work, value)
    for sample in results.of(work.name, subject):
        return "failed" if sample.failed else "skipped" if sample.reason.startswith(SKIPPED) else "none"
    return NOTHING


def value_text(work: Work, value: float) -> str:
    """A rate of small requests as requests a second, of large ones as MB/s; a time in s or ms."""
    if work.unit is Unit.SECONDS:
        return seconds_text(value)
    if work.block > LARGE:
        return f"{value * work.block / 1e6:,.0f} MB/s"
    return f"{value:,.0f} /s"


def seconds_text(value: float) -> str:
    """Seconds as s or ms, with three digits."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def ratio_text(ratio: float | None) -> str:
    """How many times."""
    return NOTHING if ratio is None else f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"


def _ours(results: Results) -> list[str]:
    return [subject for subject in results.subjects() if subject not in (QEMU, LIMIT)]


def _single(results: Results, work: str, subject: str, name: str) -> str:
    value = results.detail(work, subject, name)
    return NOTHING if value is None else f"{value:.2f}"


def _pair(results: Results, work: str, subject: str, names: tuple[str, str], unit: int) -> str:
    values = [results.detail(work, subject, name) for name in names]
    if None in values:
        return NOTHING
    return "/".join(f"{(value or 0) / unit:,.0f}" for value in values)
