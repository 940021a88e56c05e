# SPDX-License-Identifier: BSD-3-Clause
"""What fio does: the catalogue of workloads, by name.

Two states of the secondary's overlays are told apart, because QEMU copies 64 KiB for the first write to each 64 KiB:

    fresh    a checkpoint has just emptied the overlays, and the run ends before it has filled them. This is the rule:
             a pair that takes checkpoints all the time lives in it.
    warm     the overlays hold everything already: a pair long after its last checkpoint. Such names end in -warm.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

BLOCKS = {"4k": 4 * KIB, "64k": 64 * KIB, "256k": 256 * KIB, "1m": MIB}
DEPTHS = (1, 16)
PATTERNS = ("randread", "randwrite", "read", "write")

CHECKPOINT_EVERY_S = 0.2
"""From one checkpoint to the next in a workload with `checkpoints`."""

READS_OF_MIXED = 70
"""Per cent of the requests of `randrw` that read."""

LARGE = 64 * KIB
"""Requests of more bytes than this are reported as bytes a second."""


class Setup(enum.Enum):
    """How the processes are put together."""

    PAIR = "pair"
    """A primary forwards to a secondary over a Unix socket."""
    SYNC = "sync"
    """As PAIR, with protocol=sync. QEMU has nothing else."""
    SECONDARY = "secondary"
    """A secondary alone."""
    SLOW = "slow"
    """As PAIR, but the primary's disk is behind an NBD server that takes 1 ms for each request."""


class Face(enum.Enum):
    """Which export fio works on."""

    PRIMARY = "primary"
    GUEST = "guest"
    TARGET = "target"


PLACES = {
    "primary": (Setup.PAIR, Face.PRIMARY),
    "sync": (Setup.SYNC, Face.PRIMARY),
    "guest": (Setup.SECONDARY, Face.GUEST),
    "target": (Setup.SECONDARY, Face.TARGET),
    "slow": (Setup.SLOW, Face.PRIMARY),
}


@dataclass(frozen=True)
class Workload:
    """One thing for fio to do at one of PLACES. `block` is bytes, `fsync_every` a number of writes (0: never)."""

    place: str
    pattern: str
    block: int
    depth: int
    fsync_every: int = 0
    checkpoints: bool = False
    warm: bool = False

    @property
    def setup(self) -> Setup:
        """The arrangement that it needs."""
        return PLACES[self.place][0]

    @property
    def face(self) -> Face:
        """The export that it works on."""
        return PLACES[self.place][1]

    @property
    def name(self) -> str:
        """PLACE-PATTERN-BLOCK-DEPTH, for example primary-randwrite-4k-16, and what is special."""
        block = next(text for text, size in BLOCKS.items() if size == self.block)
        name = f"{self.place}-{self.pattern}-{block}-{self.depth}"
        if self.fsync_every:
            name += f"-fsync{self.fsync_every}"
        return name + ("-checkpoints" if self.checkpoints else "") + ("-warm" if self.warm else "")

    @property
    def writes(self) -> bool:
        """Whether it changes the disk, and so the overlays."""
        return "read" not in self.pattern

    @property
    def large(self) -> bool:
        """Whether its rate is reported as bytes a second."""
        return self.block > LARGE


def _catalogue() -> list[Workload]:
    plain = [
        Workload(place, pattern, block, depth)
        for place in ("primary", "sync", "guest", "target")
        for pattern in PATTERNS
        for block in BLOCKS.values()
        for depth in DEPTHS
    ]
    warm = [Workload(place, "randwrite", 4 * KIB, 16, warm=True) for place in ("primary", "sync", "guest", "target")]
    warm += [Workload(place, "write", 256 * KIB, 16, warm=True) for place in ("primary", "guest", "target")]
    mixed = [Workload("primary", "randrw", 4 * KIB, depth, checkpoints=True) for depth in DEPTHS]
    fsync = [
        Workload("primary", "randwrite", 4 * KIB, depth, fsync_every=every) for every in (1, 8) for depth in DEPTHS
    ]
    slow = [Workload("slow", pattern, 4 * KIB, depth) for pattern in ("randread", "randwrite") for depth in DEPTHS]
    return [*plain, *warm, *mixed, *fsync, *slow]


WORKLOADS = {workload.name: workload for workload in _catalogue()}

USUAL = (
    *("primary-randwrite-4k-1", "primary-randwrite-4k-16", "primary-randread-4k-1", "primary-randread-4k-16"),
    *("primary-write-256k-16", "primary-write-1m-16", "primary-read-256k-16", "primary-read-1m-16"),
    *("primary-randwrite-64k-16", "primary-randread-64k-16", "primary-write-1m-1", "primary-randwrite-4k-16-warm"),
    *("primary-randrw-4k-16-checkpoints", "primary-randwrite-4k-16-fsync1", "primary-randwrite-4k-16-fsync8"),
    *("sync-randwrite-4k-1", "sync-randwrite-4k-16", "sync-write-256k-16"),
    *("guest-randwrite-4k-1", "guest-randwrite-4k-16", "guest-write-256k-16", "guest-randread-4k-16"),
    *("guest-read-256k-16", "guest-randwrite-4k-16-warm"),
    *("target-randwrite-4k-1", "target-randwrite-4k-16", "target-write-256k-16", "target-randread-4k-16"),
    *("target-read-256k-16", "target-randwrite-4k-16-warm"),
    *("slow-randread-4k-16", "slow-randwrite-4k-16", "slow-randwrite-4k-1"),
)
"""What runs if nothing is said: each kind of work once, in about 20 minutes."""
