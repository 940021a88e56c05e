# SPDX-License-Identifier: BSD-3-Clause
"""The two modes and the five stages of a node (names and meaning as in QEMU's driver)."""

from __future__ import annotations

from enum import Enum


class Mode(Enum):
    """Which half of the pair a process is."""

    PRIMARY = "primary"
    SECONDARY = "secondary"


class Stage(Enum):
    """Where a node is in the life of its pair; all its disks share one stage."""

    NONE = "none"
    RUNNING = "running"
    FAILOVER = "failover"
    FAILOVER_FAILED = "failover-failed"
    DONE = "done"


TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.NONE: frozenset((Stage.RUNNING,)),
    Stage.RUNNING: frozenset((Stage.FAILOVER, Stage.DONE)),
    Stage.FAILOVER: frozenset((Stage.DONE, Stage.FAILOVER_FAILED)),
    Stage.FAILOVER_FAILED: frozenset((Stage.FAILOVER,)),
    Stage.DONE: frozenset((Stage.RUNNING,)),
}
"""What may follow what: FAILOVER_FAILED goes back to FAILOVER when the commit is retried, DONE to
RUNNING when a stopped primary is given a new secondary."""
