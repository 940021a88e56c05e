# SPDX-License-Identifier: BSD-3-Clause
"""The pause points of the product, and what makes a thread reach each of them.

The table is written by hand, so that a person has thought about every point; test_torture.py compares it with the
source, so that a new point cannot be forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Cause(Enum):
    """What a process must be asked for, so that a thread reaches a point."""

    START = "start"
    CHECKPOINT = "checkpoint"
    STOP = "stop"
    FAILOVER = "failover"
    GUEST_READ = "guest-read"
    GUEST_WRITE = "guest-write"
    TARGET_WRITE = "target-write"
    PRIMARY_WRITE = "primary-write"
    BARRIER = "barrier"
    CONNECT = "connect"


@dataclass(frozen=True)
class Point:
    """One pause point. `causes`: any of them leads there. `hits`: how often one cause surely leads there: there are two
    disks, each so small that a commit brings it down in one portion."""

    name: str
    causes: tuple[Cause, ...]
    hits: int = 1


EMPTYING = (Cause.CHECKPOINT, Cause.START, Cause.STOP)

SECONDARY_POINTS = (
    Point("start.emptied", (Cause.START,)),
    Point("stop.entered", (Cause.STOP,)),
    Point("failover.entered", (Cause.FAILOVER,)),
    Point("checkpoint.begun", EMPTYING, hits=2),
    Point("checkpoint.active-emptied", EMPTYING, hits=2),
    Point("checkpoint.emptied", EMPTYING),
    Point("guest-read.disk-read", (Cause.GUEST_READ,)),
    Point("guest-write.completed", (Cause.GUEST_WRITE,), hits=3),
    Point("guest-write.before-mark", (Cause.GUEST_WRITE,), hits=3),
    Point("copy-before-write.read", (Cause.TARGET_WRITE,), hits=3),
    Point("copy-before-write.before-mark", (Cause.TARGET_WRITE,), hits=3),
    Point("target-write.preserved", (Cause.TARGET_WRITE,), hits=3),
    Point("target-write.written", (Cause.TARGET_WRITE,), hits=3),
    Point("commit.locked", (Cause.FAILOVER,), hits=2),
    Point("commit.written", (Cause.FAILOVER,), hits=2),
    Point("commit.hidden-forgotten", (Cause.FAILOVER,), hits=2),
)

PRIMARY_POINTS = (
    Point("primary-write.marked", (Cause.PRIMARY_WRITE,), hits=3),
    Point("primary-write.written", (Cause.PRIMARY_WRITE,), hits=3),
    Point("forward.send", (Cause.PRIMARY_WRITE,), hits=3),
    Point("epoch.cut", (Cause.BARRIER,)),
    Point("epoch.reached", (Cause.BARRIER,)),
)

START_POINTS = (
    Point("start.connected", (Cause.START,)),
    Point("start.settled", (Cause.START,)),
    Point("start.entered", (Cause.START,)),
)
"""Of a primary's start, before and after the stage is saved."""

LINK_POINTS = (
    Point("link.dialled", (Cause.CONNECT,)),
    Point("link.synchronized", (Cause.CONNECT,)),
)
"""Of a primary that goes on with its secondary."""

PAIRING_POINTS = (
    Point("pairing.begun", (Cause.CONNECT,)),
    Point("pairing.sync", (Cause.CONNECT,)),
)
"""Of a secondary to which its primary comes back."""

ELSEWHERE = (
    "epoch.parting",
    "epoch.leaving",
    "side.handed-over",
    "look.flush",
    "forward.prove",
    "verify.read",
    "verify.found",
    "query.begun",
    "record.sync",
    "epoch.sync",
    "stop.prepared",
    "test.made",
    "test.kept",
    "test-read.read",
    "test-write.written",
    "resize.making",
    "resize.made",
    "resize.asked",
    "resize.mapping",
    "resize.parted",
    "resize.prepared",
    "resize.entered",
)
"""Points at which no history kills: its secondaries are not stopped by a second process, have their disks in files and
are no plain servers, nobody compares their disks, nobody hands them over, nobody tests a failover, nobody has them
grow, and nothing changes with a query, nor before a planned stop has the gate closed. Storage that hangs is what
record.sync and epoch.sync are for. In e2e they have test_speaking.py, test_hand_over.py, test_losses.py,
test_plain_secondary.py, test_verify.py, test_rehearsals.py, test_resize.py, test_service.py, test_hanging_state.py and
test_outdated.py; the agent of virtual machines has vm/test_ft.py."""

ALL_POINTS = SECONDARY_POINTS + PRIMARY_POINTS + START_POINTS + LINK_POINTS + PAIRING_POINTS

RECOVERY_POINTS = (
    "checkpoint.begun",
    "checkpoint.active-emptied",
    "checkpoint.emptied",
    "commit.locked",
    "commit.written",
    "commit.hidden-forgotten",
)
"""What a process may reach while it goes on with what a killed one has left."""
