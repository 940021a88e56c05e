# SPDX-License-Identifier: BSD-3-Clause
"""What an action tells the cluster: the score of this host, and who owns the disks. A cluster that does not take it is
logged where the next action says it again."""

from __future__ import annotations

from . import decision
from .asking import Asking
from .codes import Code, Failed, note
from .decision import Seen
from .pacemaker import ClusterError, Pacemaker, Register
from .told import Told


class Telling:
    """One call for one node."""

    def __init__(self, told: Told, pacemaker: Pacemaker, asking: Asking) -> None:
        self._told = told
        self._pacemaker = pacemaker
        self._asking = asking

    def publish(self, score: int | None) -> None:
        """The score; None: never."""
        try:
            self._pacemaker.publish(score)
        except ClusterError as error:
            note(str(error))

    def score(self, seen: Seen) -> None:
        """Publish the one that follows."""
        self.publish(decision.score(seen, self._told.max_age_s))

    def forget(self) -> None:
        """The resource does not run here."""
        try:
            self._pacemaker.forget()
        except ClusterError as error:
            note(str(error))

    def promoted(self, seen: Seen) -> None:
        """This host is the owner from now on. Failed."""
        try:
            self._pacemaker.enter(Register(self._told.here, seen.lineage))
        except ClusterError as error:
            raise Failed(Code.GENERIC, f"the cluster does not take down who owns the disks: {error}") from error

    def follow(self, seen: Seen, promoted: bool) -> None:
        """The register follows the lineage of the owner. `promoted`: it runs, and so can die."""
        if self._asking.unread:
            return  # somebody may have been promoted since
        register = self._asking.register
        mine = seen.lineage.get("current")
        entered = register is not None and (register.host, register.lineage.get("current")) == (self._told.here, mine)
        if entered and not (register is not None and register.kept and promoted):
            return
        try:
            self._pacemaker.enter(Register(self._told.here, seen.lineage))
        except ClusterError as error:
            note(str(error))

    def keep(self, seen: Seen) -> None:
        """The register says that this host, which was promoted last, has its disks still. Without that the next
        promotion would take a host that is stopped for one that was fenced, and throw away what it has."""
        try:
            register = self._pacemaker.register()
            if register is not None and register.host == self._told.here:
                self._pacemaker.enter(Register(self._told.here, seen.lineage, kept=True))
        except ClusterError as error:
            note(f"that the disks are kept here is not in the cluster's configuration: {error}")
