# SPDX-License-Identifier: BSD-3-Clause
"""An overlay filled and looked at by hand, without the stack that does so in the product."""

from __future__ import annotations

import numpy as np

from replication.image.overlay import Held, Overlay
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, PAGE_CLUSTERS


def store(overlay: Overlay, data: bytes, block: int) -> None:
    """Whole blocks from `block` on: the data, then the bits."""
    overlay.data.write([data], block * BLOCK)
    overlay.mark(block, block + len(data) // BLOCK, Held.DATA)


def held_clusters(overlay: Overlay) -> list[tuple[int, int]]:
    """Block ranges, a cluster each, that hold something, as a commit finds them; ascending."""
    found = []
    for page in overlay.dirty_pages():
        held = overlay.blocks_of(page).reshape(-1, BLOCKS_PER_CLUSTER).any(axis=1)
        for cluster in np.flatnonzero(held).tolist():
            first = (page * PAGE_CLUSTERS + cluster) * BLOCKS_PER_CLUSTER
            found.append((first, min(first + BLOCKS_PER_CLUSTER, overlay.blocks)))
    return found
