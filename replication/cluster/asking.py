# SPDX-License-Identifier: BSD-3-Clause
"""What an action asks of the node: how it is, together with what the cluster's register says, and its commands.

Each question ends before the action has to."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from replication.client.qmp import Refused
from replication.client.session import NotRunning, Session, Unreachable, Unusable
from replication.replctl import nodes

from . import decision
from .codes import Code, Failed, note
from .decision import Seen
from .pacemaker import ClusterError, Pacemaker, Register
from .process import Runner
from .serials import Serials
from .told import Told

STEP_S = 0.1
"""Between two looks."""
_ANSWER_S = 5.0
"""Longest wait for an answer of the node, where nothing is to be done for it."""
_STEPS = 6
"""Of a conversation: the greeting and five commands."""
_LAST_LOOK_S = 1.0
"""For each step of a stop's look at a node that may hang."""
_END_S = 15.0
"""What a stop has left for ending the node, whatever that look takes."""


class Asking:
    """One call for one node."""

    def __init__(self, told: Told, pacemaker: Pacemaker, process: Runner) -> None:
        self._told = told
        self._pacemaker = pacemaker
        self._process = process
        self.serials = Serials(told)
        self.register: Register | None = None
        """As the last look has found it."""
        self.promoted = False
        """The node is, as its mark says."""
        self.unread = False
        """The last look could not read the register: somebody may have been promoted since."""

    def usable(self, *names: str) -> None:
        """Failed if one of these parameters is wrong."""
        for name in names:
            if (text := self._told.wrong.get(name)) is not None:
                raise Failed(Code.CONFIGURED, text)

    def control(self) -> str:
        """The node's control socket; Failed if there is no such node on this host. One whose file has gone is, as long
        as it runs."""
        self.usable("node")
        try:
            return nodes.control_of(self._told.node)
        except Unusable as error:
            usual = nodes.usual_control(self._told.node)
            if os.path.exists(usual):
                return usual
            raise Failed(Code.INSTALLED, str(error)) from error

    def _session(self, timeout_s: float | None = None) -> Session:
        """However many steps it has, it ends when the action has to."""
        return Session(self.control(), self._step_s if timeout_s is None else timeout_s, self._told.deadline)

    @property
    def _step_s(self) -> float:
        """For one of the few steps of a conversation: together they end before the deadline."""
        return max(STEP_S, min(_ANSWER_S, self._told.left_s / _STEPS))

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        """What it returns; Refused, Unreachable."""
        with self._session(), self._session(max(STEP_S, self._told.left_s)) as session:
            answer = session.call(command, **arguments)
        return answer if isinstance(answer, dict) else {}

    def look(self, certain: bool = False) -> Seen:
        """Refused, Unreachable. `certain`: Failed if the register cannot be read; else it is as if there were none."""
        with self._session() as session:
            role, status = session.call("query-role"), session.call("query-replication")
            seen = _seen(role, status)
            if not seen.owner:
                with suppress(Refused):  # it has never had a primary
                    seen = replace(seen, lossless=session.call("query-failover").get("lossless") is True)
            self.unread = False
            try:
                register = self._pacemaker.register()
            except ClusterError as error:
                if certain:
                    raise Failed(Code.GENERIC, f"who owned the disks last cannot be known: {error}") from error
                note(str(error))
                self.unread, register = True, None
            if not self.unread:
                self.register = register
            if register is None:
                return seen
            here = register.host == self._told.here
            seen = replace(
                seen,
                register_host=register.host,
                register_kept=register.kept,
                register_here=here,
                register_disputed=register.disputed,
                register_alone=register.alone,
            )
            if here:
                return seen  # what it had entered, and has lost with its power, nobody else went on from
            try:
                relation = session.call("replication-compare", lineage=register.lineage).get("relation")
                seen = replace(seen, relation=relation if isinstance(relation, str) else None)
            except Refused:  # it is no lineage that this version reads; none stands for one that is not known
                seen = replace(seen, relation=decision.UNREADABLE if register.lineage else None)
            if seen.owner and seen.relation == "diverged":
                seen = self._weigh(seen, register)
            elif seen.owner and seen.passed_over:
                seen = replace(seen, knew_register=self._came_after(register))
        return seen

    def _came_after(self, register: Register) -> bool:
        """Whether this node was promoted after that one, and knew of it: an older register has survived. That one does
        not run promoted, as far as this call says."""
        if not self.promoted and register.host in self._told.promoted | self._told.to_promote:
            return False
        own, theirs = self.serials.read(), register.promotion
        return own is not None and own.id != theirs.id and own.knows(theirs.id)

    def _weigh(self, seen: Seen, register: Register) -> Seen:
        """Whether the register can judge a node that has gone on as well. Beside one that runs promoted it does: of two
        owners that meet one would stop the other's guest."""
        running = register.host in self._told.promoted | self._told.to_promote or self._told.active is None
        if running and not self.promoted and register.disputed != self._told.here:
            return seen
        own, theirs = self.serials.read(), register.promotion
        if own is None:
            return replace(seen, unknown_to_register=bool(theirs.id))
        unknown = bool(own.id and theirs.id) and not theirs.knows(own.id)
        return replace(seen, unknown_to_register=unknown, knew_register=own.knows(theirs.id))

    def look_patiently(self) -> Seen:
        """As `look`, but a node that is being started again is waited for. NotRunning only if there is no process."""
        while True:
            try:
                return self.look()
            except Unreachable as error:
                if not self._process.alive():
                    raise
                if self._told.left_s < 1:
                    raise Unreachable(f"the node's process is there, and does not answer: {error}") from error
            time.sleep(STEP_S)

    def first_look(self) -> Seen:
        """At a node that is being started. Failed, StartFailed."""
        while True:
            try:
                return self.look()
            except Unreachable as error:
                self._process.check()
                if self._told.left_s <= STEP_S:
                    raise Failed(Code.GENERIC, f"the node does not answer: {error}") from error
            time.sleep(STEP_S)

    def last_look(self) -> Seen | None:
        """Before its end; None if it does not answer at once: what is left of the time is for ending it."""
        step_s = min(_LAST_LOOK_S, (self._told.left_s - _END_S) / _STEPS)
        if step_s <= 0:
            return None
        try:
            with self._session(step_s) as session:
                return _seen(session.call("query-role"), session.call("query-replication"))
        except (Failed, Refused, Unusable):
            return None

    def quit(self) -> bool:
        """Have a node end that somebody has started by hand. Whether none listens any more, before the deadline."""
        asked = False
        while True:
            try:
                # A stop that has used its time up still learns that nobody listens.
                with Session(self.control(), self._step_s) as session:
                    if not asked:
                        session.call("quit")
                        asked = True
            except (NotRunning, Failed):
                return True  # or there is no such node on this host
            except Unusable as error:
                note(str(error))
            if self._told.left_s <= STEP_S:
                return False
            time.sleep(STEP_S)


def _seen(role: dict[str, Any], status: dict[str, Any]) -> Seen:
    link, checkpoint, outdated = (status.get(name) or {} for name in ("link", "checkpoint", "outdated-reason"))
    return Seen(
        role=str(role.get("role")),
        score=int(role.get("score") or 0),
        may_run=decision.may_own(role),
        code=role.get("code"),
        reason=str(role.get("reason")),
        mode=str(status.get("mode")),
        stage=str(status.get("stage")),
        link=str(link.get("state")),
        checkpoint_age_s=checkpoint.get("age"),
        outdated=str(outdated.get("reason")) if outdated else None,
        outdated_by_hand=outdated.get("code") == "demoted",
        obstacle=role.get("peer-obstacle"),
        lineage=status.get("lineage") or {},
    )
