# SPDX-License-Identifier: BSD-3-Clause
"""From any state to a role: what replication-set-role does, with the commands that each step has already.

    primary      a secondary that runs fails over, or, with and without force, stops as planned where that keeps more;
                 one that is new starts first. An owner stays one. Then the peer is looked for in the background, until
                 it is this node's secondary or the role is another one.
    secondary    a primary that runs takes a last checkpoint, stops, and is demoted; `lossless`: only if its secondary
                 says that it has everything. A secondary stays one.

What has the role already is not changed, so a manager may ask again and again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from replication.admission import Admission
from replication.conditions import Conditions
from replication.errors import CommandError
from replication.log import log
from replication.order.worker import Worker
from replication.reason import Reason
from replication.role import is_owner
from replication.stage import Mode, Stage

AGAIN_MIN_S, AGAIN_MAX_S = 0.5, 5.0
"""Between two attempts to reach the peer."""

PROMOTE_S = 0.5
"""Longest wait of a promotion for another change of role: it is answered soon."""

DEMOTE_S = 120.0
"""Longest wait of a demotion for another change of role, and for an attempt to reach the peer."""


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
    def start_pair(self, mode: Mode | None, secondary: str | None, sync: str) -> None: ...
    def stop(self, failover: bool, force: bool = False, conditions: Conditions | None = None) -> None: ...
    def hand_over(self) -> None: ...
    def demote(self) -> None: ...
    def insist(self) -> None: ...
    def go_on_alone(self) -> None: ...
    def check_demotable(self) -> None: ...
    def resume_io(self, fenced: bool = False) -> None: ...
    def checkpoint(self) -> Any: ...
    def primary_is_there(self) -> str | None: ...
    def keeps_all(self) -> bool: ...
    def lacking(self) -> str | None: ...
    @property
    def sought(self) -> str | None: ...
    def seek(self, uri: str | None, save: bool) -> None: ...
    @property
    def admission(self) -> Admission: ...


class Promotion:
    """Of one node. `to_primary` and `to_secondary` come one at a time."""

    def __init__(self, node: Commanded) -> None:
        self._node = node
        # Held for the whole of a change of role; above Node._command.
        self._changing = threading.Lock()
        # Held by the seeker for the whole of an attempt to reach the peer, across network I/O: a demotion waits for it,
        # a promotion does not. Below _changing, which the seeker, holding this, only tries to get.
        self._attempt = threading.Lock()
        self._seeker = Worker("seek-peer", self._seek)
        self._again_s = AGAIN_MIN_S
        self.obstacle: str | None = None
        """Why the peer is not this node's secondary yet, None if it is not looked for or there is nothing to say."""

    def close(self) -> None:
        """The process ends; the next one goes on looking for the peer."""
        self._seeker.stop(0.0)

    def resume(self) -> None:
        """The process has started: go on with what a former one was looking for."""
        node = self._node
        if node.sought is not None and is_owner(node.mode, node.stage) and not self._replicates:
            self._seeker.wake()
        else:
            node.seek(None, save=False)  # what it was for has been reached, or is over

    @contextmanager
    def _alone(self, within_s: float) -> Iterator[None]:
        if not self._changing.acquire(timeout=within_s):
            raise CommandError("Another change of role is at work: try again when it has ended", reason=Reason.BUSY)
        try:
            yield
        finally:
            self._changing.release()

    @property
    def _replicates(self) -> bool:
        return self._node.mode is Mode.PRIMARY and self._node.stage is Stage.RUNNING

    # -- to primary ----------------------------------------------------------------------------------------

    def to_primary(self, peer: str | None, force: bool, fenced: bool = False) -> None:
        """Own the disks, and look for the peer. CommandError says what stands in the way. `fenced`: the peer is, so
        nothing waits for it: no lease, and no guest that stands still until somebody says this."""
        with self._alone(PROMOTE_S):
            node = self._node
            sought = None if peer is None and node.peer is None else peer or ""
            if sought is not None and not self._replicates:
                self._seeker.start(AGAIN_MIN_S)  # there is no owner without the thread that it needs
            owner = is_owner(node.mode, node.stage)
            if owner:
                self._stay(force)
            else:
                node.seek(sought, save=False)  # together with the stage
                try:
                    self._take_over(force, fenced)
                except BaseException:
                    node.seek(None, save=False)
                    raise
            node.admission.promoted()
            if owner and fenced:
                node.resume_io(fenced=True)
            if not self._replicates:
                self._look_for(sought)

    def _stay(self, force: bool) -> None:
        """An owner stays one; what it has counts."""
        outdated = self._check_outdated(force)
        if outdated:
            self._node.insist()
        elif force:
            self._node.go_on_alone()

    def _check_outdated(self, force: bool) -> bool:
        """Whether this node is outdated, and that does not count; CommandError if it does."""
        outdated = self._node.outdated_reason
        if outdated is not None and not force:
            raise CommandError(f"Promotion is refused: this node is outdated ({outdated})", reason=Reason.OUTDATED)
        return outdated is not None

    def _take_over(self, force: bool, fenced: bool) -> None:
        node = self._node
        self._check_outdated(force)
        connected = node.primary_is_there()
        if connected is not None and not force:
            raise CommandError(
                f"Promotion is refused: the primary (node {connected}) is connected; demote it first",
                reason=Reason.HAS_PRIMARY,
            )
        if node.stage is not Stage.NONE:
            self._own(force, fenced)
            return
        lacking = node.lacking()
        if lacking is not None and not force:
            # Once it runs it would be a secondary without a valid checkpoint, until its primary has sent everything.
            raise CommandError(
                f"Promotion is refused: this secondary lacks something of its primary's ({lacking}), so there is no "
                "valid checkpoint; have the primary send the rest, or use force to take the disks as they are",
                reason=Reason.NO_CHECKPOINT,
            )
        node.start_pair(None, None, "auto")
        try:
            self._own(force, fenced)
        except CommandError as error:
            raise CommandError(
                f"{error}. Replication has been started: this secondary runs now", reason=error.reason
            ) from error

    def _own(self, force: bool, fenced: bool) -> None:
        """A secondary that runs ends that, with as much as can be kept."""
        node = self._node
        if not node.keeps_all():
            # Again, at that instant: a primary may have come since it was looked for.
            node.stop(True, force, None if force else Conditions(no_primary=True, early=fenced))
            return
        try:
            node.stop(True, conditions=Conditions(lossless=True, early=force or fenced))
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

    # -- to secondary --------------------------------------------------------------------------------------

    def to_secondary(self, lossless: bool = False) -> None:
        """Keep a copy of the disks. CommandError says what stands in the way. `lossless`: only if the peer takes over
        all that is here, and has said so; it is refused before anything has changed if not."""
        with self._alone(DEMOTE_S):
            node = self._node
            if is_owner(node.mode, node.stage):
                self._check_demotable()
                if lossless:
                    self._check_in_sync()
            again = node.sought
            node.seek(None, save=False)  # no further attempt
            try:
                if not self._attempt.acquire(timeout=DEMOTE_S):
                    raise CommandError("An attempt to reach the peer has not ended: try again", reason=Reason.BUSY)
                self._attempt.release()
                if self._replicates:
                    again = ""
                if is_owner(node.mode, node.stage):
                    self._check_demotable()
                    with node.admission.demoting():  # a guest that stands still does not go on in between
                        self._demote(lossless)
            except BaseException:
                self._look_for(again)
                raise
            self.obstacle = None

    def _check_demotable(self) -> None:
        node = self._node
        node.check_demotable()
        if node.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED):
            raise CommandError(
                f"Demotion is refused: the commit after failover is not complete (stage {node.stage.value})",
                reason=Reason.COMMITTING,
            )

    def _check_in_sync(self) -> None:
        if not self._replicates or not self._node.in_sync:
            raise CommandError(
                "Demotion is refused: the other node does not have everything, and the demotion was to be lossless",
                reason=Reason.NOT_LOSSLESS,
            )

    def _hand_over(self) -> None:
        """To the peer, which has everything; else nothing has changed."""
        node = self._node
        self._check_in_sync()
        try:
            node.checkpoint()
            # With the stage: a process that follows one that is killed now looks for its secondary.
            node.seek("", save=False)
            node.hand_over()
        except CommandError as error:
            passing = error.reason in (Reason.BUSY, Reason.STORAGE)
            raise CommandError(
                f"Demotion is refused, and this node goes on as the owner: {error}",
                reason=error.reason if passing else Reason.NOT_LOSSLESS,
            ) from error

    def _demote(self, lossless: bool) -> None:
        node = self._node
        if node.stage is not Stage.RUNNING:
            if lossless:
                self._check_in_sync()
            node.demote()
            return
        if lossless:
            self._hand_over()
        else:
            try:
                if node.in_sync:
                    node.checkpoint()
            except CommandError as error:  # a peer that is not there does not keep a node from being demoted
                log(f"no last checkpoint before the demotion: {error}")
            node.stop(False)
        try:
            node.demote()
        except CommandError as error:
            raise CommandError(
                f"{error}. Replication has been stopped, this node still owns its disks, and it looks for its "
                "secondary again, to replicate as before",
                reason=error.reason,
            ) from error

    # -- in the background ---------------------------------------------------------------------------------

    def _look_for(self, sought: str | None) -> None:
        """Have the seeker do so. A change of role is under way."""
        self._node.seek(sought, save=True)
        if sought is not None:
            self._again_s = AGAIN_MIN_S
            self._seeker.wake()

    def _seek(self) -> float | None:
        """Try to make the peer this node's secondary; when to try again."""
        with self._attempt:
            if not self._changing.acquire(blocking=False):
                return AGAIN_MIN_S
            try:
                sought, again_s = self._decide()
            finally:
                self._changing.release()
            return again_s if sought is None else self._try(sought)

    def _decide(self) -> tuple[str | None, float | None]:
        """Whom to reach now, or when to look again. No change of role is under way."""
        node = self._node
        if node.sought is None or not is_owner(node.mode, node.stage):
            return None, None
        if node.stage is Stage.RUNNING:
            self._found()
            return None, None
        if node.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED):  # one that has failed may be resumed
            return None, self._again_s if node.stage is Stage.FAILOVER else AGAIN_MAX_S
        return node.sought or node.peer, None

    def _try(self, sought: str) -> float | None:
        try:
            self._node.start_pair(Mode.PRIMARY, sought, "auto")
        except CommandError as error:
            if self._node.sought is None:
                return None  # it is to be a secondary meanwhile
            if str(error) != self.obstacle:
                log(f"promoted, and looks for its peer: {error}")
            self.obstacle = str(error)
            again_s, self._again_s = self._again_s, min(2 * self._again_s, AGAIN_MAX_S)
            return again_s
        self._found()
        return None

    def _found(self) -> None:
        """Not saved at once: a process that finds itself running has nobody to look for."""
        self._node.seek(None, save=False)
        self.obstacle = None
