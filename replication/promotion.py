# SPDX-License-Identifier: BSD-3-Clause
"""From any state to a role: what replication-set-role does, with the commands that each step has already.

    primary      a secondary that runs fails over, or, with and without force, stops as planned where that keeps more;
                 one that is new starts first. An owner stays one. Then the peer is looked for in the background, until
                 it is this node's secondary or the role is another one.
    secondary    a primary that runs takes a last checkpoint, stops, and is demoted. A secondary stays one.

What has the role already is not changed, so a manager may ask again and again.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from replication.conditions import Conditions
from replication.errors import CommandError
from replication.log import log
from replication.order.worker import Worker
from replication.reason import Reason
from replication.role import is_owner
from replication.stage import Mode, Stage

AGAIN_MIN_S, AGAIN_MAX_S = 0.5, 5.0
"""Between two attempts to reach the peer."""


class Commanded(Protocol):
    """What this needs of a node: its commands, and where it stands."""

    @property
    def mode(self) -> Mode: ...
    @property
    def stage(self) -> Stage: ...
    @property
    def outdated_reason(self) -> str | None: ...
    @property
    def peer(self) -> str | None: ...
    @property
    def in_sync(self) -> bool: ...
    def start(self, mode: Mode | None, secondary: str | None, sync: str) -> None: ...
    def stop(self, failover: bool, force: bool = False, conditions: Conditions | None = None) -> None: ...
    def demote(self) -> None: ...
    def insist(self) -> None: ...
    def check_demotable(self) -> None: ...
    def checkpoint(self) -> Any: ...
    def primary_is_there(self) -> str | None: ...
    def keeps_all(self) -> bool: ...


class Promotion:
    """Of one node. `to_primary` and `to_secondary` come one at a time."""

    def __init__(self, node: Commanded) -> None:
        self._node = node
        # Held for the whole of a change of role, and of an attempt to reach the peer; above Node._command.
        self._changing = threading.Lock()
        self._seeker = Worker("seek-peer", self._seek)
        self._again_s = AGAIN_MIN_S
        self._sought: str | None = None
        self.obstacle: str | None = None
        """Why the peer is not this node's secondary yet, None if it is not looked for or there is nothing to say."""

    def close(self) -> None:
        """The process ends."""
        self._sought = None
        self._seeker.stop(0.0)

    def to_primary(self, peer: str | None, force: bool) -> None:
        """Own the disks, and look for the peer. CommandError says what stands in the way."""
        with self._changing:
            node = self._node
            outdated = node.outdated_reason
            if is_owner(node.mode, node.stage):
                if outdated is not None and not force:
                    raise CommandError(
                        f"Promotion is refused: this node is outdated ({outdated})", reason=Reason.OUTDATED
                    )
                if outdated is not None:
                    node.insist()
            else:
                self._take_over(force)
            if node.mode is Mode.PRIMARY and node.stage is Stage.RUNNING:
                return
            self._sought = peer or node.peer
            if self._sought is not None:
                self._again_s = AGAIN_MIN_S
                self._seeker.start()
                self._seeker.wake()

    def _take_over(self, force: bool) -> None:
        node = self._node
        if node.outdated_reason is not None and not force:
            raise CommandError(
                f"Promotion is refused: this node is outdated ({node.outdated_reason})", reason=Reason.OUTDATED
            )
        connected = node.primary_is_there()
        if connected is not None and not force:
            raise CommandError(
                f"Promotion is refused: the primary (node {connected}) is connected; demote it first",
                reason=Reason.HAS_PRIMARY,
            )
        if node.stage is Stage.NONE:
            node.start(None, None, "auto")
        if not node.keeps_all():
            node.stop(True, force)
            return
        try:
            node.stop(True, conditions=Conditions(lossless=True))
        except CommandError as error:
            if not force:
                raise
            # What the storage holds up, a later attempt may keep.
            if error.reason in (Reason.STORAGE, Reason.BUSY):
                raise CommandError(
                    f"{error}. This node has all that its primary wrote; a failover with force (replctl failover "
                    "--force) would go back to the last checkpoint",
                    reason=error.reason,
                ) from error
            log(f"promoted by force, from the last checkpoint: {error}")
            node.stop(True, True)

    def to_secondary(self) -> None:
        """Keep a copy of the disks. CommandError says what stands in the way."""
        with self._changing:
            node = self._node
            self._sought = self.obstacle = None
            if not is_owner(node.mode, node.stage):
                return
            node.check_demotable()
            if node.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED):
                raise CommandError(
                    f"Demotion is refused: the commit after failover is not complete (stage {node.stage.value})",
                    reason=Reason.COMMITTING,
                )
            if node.stage is Stage.RUNNING:
                try:
                    if node.in_sync:
                        node.checkpoint()
                except CommandError as error:  # a peer that is not there does not keep a node from being demoted
                    log(f"no last checkpoint before the demotion: {error}")
                node.stop(False)
            node.demote()

    # -- in the background ---------------------------------------------------------------------------------

    def _seek(self) -> float | None:
        """Try to make the peer this node's secondary; when to try again."""
        if not self._changing.acquire(blocking=False):
            return AGAIN_MIN_S
        try:
            return self._seek_alone(self._sought)
        finally:
            self._changing.release()

    def _seek_alone(self, sought: str | None) -> float | None:
        node = self._node
        if sought is None or not is_owner(node.mode, node.stage):
            return None
        if node.stage is Stage.FAILOVER:
            return self._again_s  # the commit is under way
        if node.stage not in (Stage.DONE, Stage.NONE):
            self.obstacle = None
            return None
        try:
            node.start(Mode.PRIMARY, sought, "auto")
        except CommandError as error:
            if str(error) != self.obstacle:
                log(f"promoted, and looks for its peer: {error}")
            self.obstacle = str(error)
            again_s, self._again_s = self._again_s, min(2 * self._again_s, AGAIN_MAX_S)
            return again_s
        self.obstacle = self._sought = None
        return None
