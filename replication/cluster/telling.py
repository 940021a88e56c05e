# SPDX-License-Identifier: BSD-3-Clause
"""What an action tells the cluster: the score of this host, and who owns the disks. A cluster that does not take it is
logged where the next action says it again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from . import decision
from .asking import Asking
from .codes import Code, Failed, note
from .decision import Seen
from .pacemaker import ClusterError, Pacemaker, Register
from .serials import Known
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
        waits = not self._asking.unread and decision.waits_for_first(seen)
        self.publish(None if waits else decision.score(seen, self._told.max_age_s))

    def forget(self) -> None:
        """The resource does not run here."""
        try:
            self._pacemaker.forget()
        except ClusterError as error:
            note(str(error))

    def promoted(self, seen: Seen, judged: Register | None) -> None:
        """This host is the owner from now on. Failed, also if the register says something else by now than when the
        promotion was `judged`: somebody else was promoted, or has raised a dispute."""
        if not self._told.clustered:
            return
        register = self._asking.register
        with suppress(ClusterError):  # what was read a moment ago counts; whether it takes anything shows next
            register = self._pacemaker.register()
        if _last(register) != _last(judged):
            raise Failed(Code.GENERIC, "promotion is refused: the cluster's register has changed meanwhile")
        known = self._asking.serials.read() or Known()
        promotion = known.next(Known() if register is None else register.promotion)
        alone = decision.goes_alone(seen)
        try:
            self._pacemaker.enter(Register(self._told.here, seen.lineage, promotion=promotion, alone=alone))
        except ClusterError as error:
            raise Failed(Code.GENERIC, f"the cluster does not take down who owns the disks: {error}") from error
        # In this order: a node with a promotion that the register does not have would dispute what comes after.
        self._asking.serials.write(promotion)

    def follow(self, seen: Seen, promoted: bool) -> bool:
        """The register follows the lineage of the owner; whether it does. `promoted`: it runs, and so can die."""
        if self._asking.unread:
            return False  # somebody may have been promoted since
        register = self._asking.register
        mine = seen.lineage.get("current")
        if register is None or register.host != self._told.here:
            own = self._asking.serials.read() or Known()
            return self._enter(Register(self._told.here, seen.lineage, promotion=replace(own, seen=0)))
        moved = register.lineage.get("current") != mine
        entry = replace(
            register,
            lineage=seen.lineage if moved else register.lineage,
            kept=register.kept and not (promoted or moved),
            alone=register.alone and not (moved or seen.in_sync),
        )
        known = self._asking.serials.read() if promoted else None
        if known is not None:
            entry = replace(entry, promotion=_lifted(known, register.promotion))
        if entry != register and not self._enter(entry):
            return False
        if known is not None and not known.id and not register.promotion.id:
            self._asking.serials.write(entry.promotion)
        return True

    def settle(self, seen: Seen) -> Seen:
        """Raise a dispute with the owner that the register names, or end one; what is so then."""
        register, here = self._asking.register, self._told.here
        if register is None or self._asking.unread:
            return seen
        if decision.disputes(seen):
            if register.disputed != here and self._enter(replace(register, disputed=here)):
                return replace(seen, register_disputed=here)
        elif decision.ends_dispute(seen, here):
            self._enter(replace(register, disputed=None))
            return replace(seen, register_disputed=None)
        elif decision.concedes(seen, here):
            # What that one has stands here with its promotion.
            self._enter(Register(str(register.disputed), {}, promotion=register.promotion))
            return replace(seen, register_host=register.disputed, register_here=False, register_disputed=None)
        return seen

    def seen(self) -> None:
        """This host keeps the number that the register has."""
        register = self._asking.register
        if register is not None and register.promotion.serial:
            self._asking.serials.saw(register.promotion.serial)

    def _enter(self, register: Register) -> bool:
        """Whether the register has it. Not if it has changed since the last look, from which this follows: the next one
        says anew what does. (Pacemaker's tool does not compare: what is left is the time of one call.) What an entry of
        this host says of its disks nobody else writes."""
        former = self._asking.register
        try:
            found = self._pacemaker.register()
            own = found is not None and found.host == self._told.here and _last(found) == _last(former)
            if found != former and not own:
                note("the cluster's register has changed meanwhile, and is looked at anew")
                return False
            self._pacemaker.enter(register)
        except ClusterError as error:
            note(str(error))
            return False
        self._asking.register = register
        return True

    def keep(self, seen: Seen) -> None:
        """The register says that this host, which was promoted last, has its disks still. Without that the next
        promotion would take a host that is stopped for one that was fenced, and throw away what it has."""
        try:
            register = self._pacemaker.register()
            if register is not None and register.host == self._told.here:
                alone = register.alone and not seen.in_sync
                self._pacemaker.enter(replace(register, lineage=seen.lineage, kept=True, alone=alone))
        except ClusterError as error:
            note(f"that the disks are kept here is not in the cluster's configuration: {error}")


def _last(register: Register | None) -> tuple[str, str, str | None] | None:
    """Which promotion was the last one, and who disputes it."""
    return None if register is None else (register.host, register.promotion.id, register.disputed)


def _lifted(own: Known, register: Known) -> Known:
    """What the register of a node that is promoted is to say of that promotion: an entry of before may have come back,
    or is of an agent that gave no ids, by which nobody could be judged."""
    if not own.id and not register.id:
        return own.next(register)
    behind = own.id != register.id and (own.knows(register.id) or not register.id)
    return replace(own, seen=0) if behind else register
