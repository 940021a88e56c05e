# SPDX-License-Identifier: BSD-3-Clause
"""Many writes that came together, put in order: what to lock and to preserve, and what can be written in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from replication.image.qcow2 import BLOCK

Piece = tuple[int, memoryview]
"""One write: offset and data, which is not empty."""

_RUN_PIECES = 512
"""Most pieces in one run: pwritev(2) takes 1024, and a disk may add two."""


@dataclass(slots=True)
class Run:
    """Pieces that follow each other without a gap."""

    offset: int
    data: list[memoryview]
    indexes: list[int]
    """Which of the writes they are."""


@dataclass(slots=True)
class Plan:
    """Writes of which no two overlap."""

    runs: list[Run]
    """Ascending."""
    spans: list[tuple[int, int]]
    """The whole blocks of all of them in bytes, start and stop; ascending, no two touch."""


def arrange(pieces: Sequence[Piece]) -> Plan | None:
    """The writes in the order of their offsets; None if two of them overlap, so that their own order counts."""
    runs: list[Run] = []
    spans: list[tuple[int, int]] = []
    end = start = stop = -1
    for offset, index in sorted([(piece[0], index) for index, piece in enumerate(pieces)]):
        data = pieces[index][1]
        if offset < end:
            return None
        if offset == end and len(runs[-1].data) < _RUN_PIECES:
            runs[-1].data.append(data)
            runs[-1].indexes.append(index)
        else:
            runs.append(Run(offset, [data], [index]))
        end = offset + len(data)
        if offset - offset % BLOCK > stop:
            if stop > 0:
                spans.append((start, stop))
            start = offset - offset % BLOCK
        stop = end + -end % BLOCK
    spans.append((start, stop))
    return Plan(runs, spans)
