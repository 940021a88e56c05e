# SPDX-License-Identifier: BSD-3-Clause
"""The plot: ratios to QEMU as bars, and what is wanted as a line across them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot

from bench.figures import FIGURES
from bench.results import LIMIT, QEMU, Results

_ROW_INCHES = 0.34


@dataclass(frozen=True)
class Bars:
    """What is drawn: the ratios of each subject, in the order of `works`; None leaves a gap."""

    works: list[str]
    ratios: dict[str, list[float | None]]
    wanted: list[float | None]


def bars(results: Results) -> Bars:
    """All work of which a ratio to QEMU is there; raises ValueError if there is none."""
    subjects = [subject for subject in results.subjects() if subject != QEMU]
    ratios = {work: {subject: results.ratio(work, subject, QEMU) for subject in subjects} for work in results.done()}
    works = [work for work, of in ratios.items() if any(value is not None for value in of.values())]
    if not works:
        raise ValueError("nothing was measured of both QEMU and another subject, so there is nothing to plot")
    figures = {figure.work: figure.at_least for figure in FIGURES if figure.base == QEMU and figure.at_least}
    return Bars(
        works,
        {subject: [ratios[work][subject] for work in works] for subject in subjects},
        [figures.get(work) for work in works],
    )


def plot(results: Results, path: Path) -> None:
    """Draw to a PNG file; OSError, or ValueError as `bars`."""
    data = bars(results)
    mpl.use("Agg")
    count = len(data.ratios)
    figure, axes = pyplot.subplots(figsize=(11, 2 + _ROW_INCHES * len(data.works) * max(1.0, count / 2)))
    height = 0.8 / count
    for index, (subject, ratios) in enumerate(data.ratios.items()):
        rows = [row for row, ratio in enumerate(ratios) if ratio is not None]
        axes.barh(
            [row + (index - (count - 1) / 2) * height for row in rows],
            [(ratios[row] or 0) - 1 for row in rows],
            height,
            left=1,  # so that better than QEMU is to the right and worse to the left
            label=f"{subject} (limit)" if subject == LIMIT else subject,
            color="lightgrey" if subject == LIMIT else None,
        )
    for row, wanted in enumerate(data.wanted):
        if wanted is not None:
            axes.plot([wanted, wanted], [row - 0.45, row + 0.45], color="red")
    axes.plot([], [], color="red", label="wanted")
    axes.axvline(1, color="black", linewidth=0.8, label="QEMU")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(data.works)), data.works)
    axes.invert_yaxis()
    axes.set_xlabel("times as good as QEMU's driver (median of the rounds)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=count + 2, frameon=False)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
