# SPDX-License-Identifier: BSD-3-Clause
"""What the secondary says of itself while the link is up, and what the primary makes of it.

Twice a second, over the peer channel, also on an idle link. Asked for (query-replication), not told by events: what is
asked for is the state as it is, so nothing can have been missed, and a secondary of an older version answers as well.

    it is no secondary any more, or of another primary      the link is lost
    it is being stopped as planned                           the stream ends at one instant, then the link
    it lacks something that nobody here knows of             it goes into the change map, and is sent
    it would refuse a checkpoint                             the link is not in sync, and why stands in its reason
    it has lost its checkpoint                               an error, until the next one is taken; also one that it has
                                                             taken and lost between two looks
    it could not be told that it has everything              it is told again, later and later

What was found stays until the secondary says otherwise or a checkpoint succeeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from replication.errors import DiskError, ReplicationError
from replication.fault import Case
from replication.log import log
from replication.order.latency import told_by_peer
from replication.order.worker import Worker
from replication.primary.dial import ANSWER_S, Agreement
from replication.primary.disk import PrimaryDisk
from replication.primary.link import Link
from replication.primary.peer import PeerError
from replication.side import Setting
from replication.stage import Mode, Stage

WATCH_S = 0.4
"""Between two looks: what happens to the secondary shows here within a second."""

_SOON_S = 0.1
"""Until the look that decides whether the secondary lacks something that nobody here knows of."""

LATENCY_S = 1.0
"""Between two questions for how long the secondary is at work on what it is sent."""

_AGAIN_MIN_S, _AGAIN_MAX_S = 0.4, 5.0
"""Between two attempts to tell it that it has everything."""


class Watch:
    """Looks after the secondary of one primary."""

    def __init__(
        self,
        setting: Setting,
        disks: Sequence[PrimaryDisk],
        link: Link,
        lacking: Callable[[], None],
        part: Callable[[Agreement], None],
    ) -> None:
        """`lacking()` is called when something was marked that the secondary says it lacks, `part(agreement)` when the
        secondary is about to be stopped as planned."""
        self._set = setting
        self._disks = disks
        self._link = link
        self._lacking = lacking
        self._part = part
        self._worker = Worker("watch", self._round)
        # Of the thread alone. The first: what the log has of a secondary that does not say how it is.
        self._said = ""
        self._watched: Agreement | None = None
        self._consistent = False
        self._taken = 0
        self._suspect = False
        # How many refusals were known when it was found to lack something that nobody here knows of.
        self._lacked: int | None = None
        self._again_s = _AGAIN_MIN_S
        self._again_at = 0.0
        self._latency_at = 0.0
        self.peer_consistent: bool | None = None
        """Whether the secondary, which runs, has a valid checkpoint, as it has told last."""
        self.peer_latency: list[dict[str, Any]] | None = None
        """How long the secondary is at work on what it is sent, as it has told last (query-replication-latency)."""

    def start(self) -> None:
        """Start the thread, once. CommandError when there is none to be had."""
        self._worker.start(WATCH_S)

    def stop(self, timeout_s: float) -> None:
        """End it, within `timeout_s` seconds if the secondary answers."""
        self._worker.stop(timeout_s)

    def checkpoint_taken(self) -> None:
        """The secondary has answered for a checkpoint, and what was wrong before it is over. One call at a time."""
        agreement = self._link.agreement
        if agreement is not None:
            agreement.taken += 1
            self.peer_consistent = True

    def _round(self) -> float:
        agreement = self._link.agreement
        if agreement is None or agreement.peer is None:
            return WATCH_S if self._lacked is None else _SOON_S
        try:
            self._look(agreement)
            self._said = ""
        except ReplicationError as error:
            # A lost link shows by itself. One that is busy (a checkpoint is being made stable) is asked again. The same
            # reason is said once.
            if self._link.agreement is agreement and not isinstance(error, DiskError) and str(error) != self._said:
                log(f"the secondary does not say how it is: {error}")
                self._said = str(error)
        except Exception as defect:  # noqa: BLE001 (what a peer sends is to cost the link, not this thread)
            self._link.broken(agreement, DiskError.from_defect(defect))
        return WATCH_S

    def _look(self, agreement: Agreement) -> None:
        assert agreement.peer is not None
        if agreement is not self._watched:
            self._watched, self._consistent, self._suspect, self._lacked = agreement, False, False, None
            self._taken = 0
            self._again_s, self._again_at = _AGAIN_MIN_S, 0.0
            self._latency_at = 0.0
            self.peer_latency = None
        refused, taken = agreement.refused, agreement.taken
        status = agreement.peer.call("query-replication", {}, ANSWER_S)
        if not isinstance(status, dict):
            raise PeerError("it answers with something else")
        parted = self._parted(status)
        if parted is not None:
            if self._suspect:
                self._link.broken(agreement, DiskError(parted))
            # Twice: a guest's write that is on its way may tell more (which one the secondary has refused).
            self._suspect = True
            return
        self._suspect = False
        if status.get("stopping") is True:
            self._part(agreement)
            return
        # Twice as well: the secondary's refusal of what it lacks may be on its way. Nothing is well until then.
        lacks = agreement.refused == refused and self._lacks(status)
        former, self._lacked = self._lacked, refused if lacks else None
        if lacks and former != refused:
            self._note_checkpoint(agreement, taken, status)
            return
        if lacks and self._take_lost(agreement):
            self._lacked = None
            lacking = next((disk for disk in self._disks if disk.changes.missing), self._disks[0])
            error = DiskError("the secondary has lost writes that it had answered: they are sent again")
            self._set.faults.report(Case.FORWARD, lacking.name, "write", 0, 0, error)
            self._lacking()
        self._note_checkpoint(agreement, taken, status)
        if "checkpoint-obstacle" in status:
            obstacle = status["checkpoint-obstacle"]
            self._link.obstructed(
                agreement, None if obstacle is None else f"the secondary takes no checkpoint: {str(obstacle)[:1000]}"
            )
        if self._link.untold and time.monotonic() >= self._again_at:
            self._link.synchronized()
            self._again_s = min(2 * self._again_s, _AGAIN_MAX_S) if self._link.untold else _AGAIN_MIN_S
            self._again_at = time.monotonic() + self._again_s
        self._ask_latency(agreement)

    def _parted(self, status: dict[str, Any]) -> str | None:
        """Why it is this node's secondary no longer, None if it is."""
        mode, stage = str(status.get("mode"))[:20], str(status.get("stage"))[:20]
        if mode != Mode.SECONDARY.value or stage not in (Stage.NONE.value, Stage.RUNNING.value):
            return f"the secondary has become a {mode} in stage {stage}"
        link = status.get("link")
        primary = link.get("primary") if isinstance(link, dict) else None
        if primary != self._set.record.node:
            return f"the secondary has no session of this primary any more (its primary: {str(primary)[:16]})"
        return None

    def _lacks(self, status: dict[str, Any]) -> bool:
        """Whether it lacks something although nothing is known here to be missing."""
        if any(disk.changes.missing or not disk.forwarder.up for disk in self._disks):
            return False
        disks = status.get("disks")
        return isinstance(disks, list) and any(
            isinstance(disk, dict) and disk.get("out-of-sync-bytes") for disk in disks
        )

    def _ask_latency(self, agreement: Agreement) -> None:
        """Last of all: nothing depends on it."""
        assert agreement.peer is not None
        if time.monotonic() < self._latency_at:
            return
        self._latency_at = time.monotonic() + LATENCY_S
        try:
            told = agreement.peer.call("query-replication-latency", {}, ANSWER_S)
        except PeerError:  # an older one, which does not know the question: it is not asked again
            self._latency_at = math.inf
            return
        self.peer_latency = told_by_peer(told)

    def _take_lost(self, agreement: Agreement) -> bool:
        """Put what it lacks into the change maps; whether that was anything."""
        try:
            return self._link.dialler.take_lost(agreement)
        except PeerError as error:
            # An older one. With the next pairing it tells all.
            self._link.broken(agreement, DiskError(f"the secondary lacks something: {error}"))
            return False

    def _note_checkpoint(self, agreement: Agreement, taken: int, status: dict[str, Any]) -> None:
        """`taken`: how many checkpoints it had answered for when it was asked."""
        had = self._consistent or taken != self._taken
        self._consistent, self._taken = status.get("consistent") is True, taken
        if taken == agreement.taken:
            self.peer_consistent = self._consistent if status.get("stage") == Stage.RUNNING.value else None
        if self._consistent or not had:
            return
        if taken != agreement.taken:  # it has taken another one since: the next look tells of that
            return
        self._lacking()  # what was refused for the checkpoint's sake is taken now
        error = DiskError("the secondary has lost its last checkpoint: it has none until the next one is taken")
        self._set.faults.report(Case.EMPTYING, self._disks[0].name, "keep", 0, 0, error)
