# SPDX-License-Identifier: BSD-3-Clause
"""Random requests: everything that they hold comes out of one random.Random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from content import KIB
from torture.client import Kind, Request

BLOCK = 4 * KIB
"""The overlays' unit: requests shorter than it, and those that begin or end in it, take other ways than whole ones."""

_HOT = 64 * KIB
"""The part of a disk in which half of the requests meet."""

_KINDS = (Kind.WRITE, Kind.ZERO, Kind.TRIM, Kind.READ, Kind.FLUSH)
_WEIGHTS = (60, 8, 8, 18, 6)


def disk_content(rng: random.Random, size: int) -> bytes:
    """The content of a new disk: runs of data, and of zeros, of which some become holes."""
    content = bytearray(rng.randbytes(size))
    for _ in range(6):
        offset, length = _range(rng, size)
        content[offset : offset + length] = bytes(length)
    return bytes(content)


def request(rng: random.Random, exports: Sequence[tuple[str, int]], kinds: Sequence[Kind] = _KINDS) -> Request:
    """A request of one of `kinds` to one of `exports` (name, bytes)."""
    export, size = rng.choice(exports)
    weights = [_WEIGHTS[_KINDS.index(kind)] for kind in kinds]
    kind = rng.choices(kinds, weights)[0]
    offset, length = _range(rng, size)
    fua = rng.random() < 0.08
    if kind is Kind.FLUSH:
        return Request(kind, export)
    if kind is Kind.READ:
        return Request(kind, export, offset, length)
    data = b""
    if kind is Kind.WRITE:
        # Zeros that are written as data, too: copy-before-write stores them in another way.
        data = bytes(length) if rng.random() < 0.05 else rng.randbytes(length)
    return Request(kind, export, offset, length, data, fua)


def _range(rng: random.Random, size: int) -> tuple[int, int]:
    """(offset, length) within `size`, at least one byte."""
    space = min(_HOT, size) if rng.random() < 0.5 else size
    shape = rng.random()
    if shape < 0.15:
        unit, longest = 1, 200
    elif shape < 0.40:
        unit, longest = 512, 4 * KIB
    elif shape < 0.75:
        unit, longest = BLOCK, 64 * KIB
    elif shape < 0.95:
        unit, longest = 1, 40 * KIB
    else:
        unit, longest = 1, 300 * KIB
    # Now and then the end of the disk, which is no whole sector.
    base = size - longest if rng.random() < 0.08 else rng.randrange(space)
    offset = max(base, 0) // unit * unit
    length = max(unit, rng.randint(1, longest) // unit * unit)
    return offset, min(length, size - offset)
