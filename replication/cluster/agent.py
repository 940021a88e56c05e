# SPDX-License-Identifier: BSD-3-Clause
"""The actions of ocf:nbdkit:replication.

    start        the process runs and answers; an owner from whose content another one went on gives that up
    promote      own the disks: with nothing lost where their owner has handed over or left in good order, else from the
                 last checkpoint, if the owner is gone
    demote       the guest is not to run here; where the other node is to be promoted and has everything, hand over
    monitor      how the node is, and how good an owner it would be
    stop         end the process
    notify       the same looks as a monitor, at once

Exit codes are OCF's; what stands in the way goes to stderr, where Pacemaker finds it (`ocf-exit-reason`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from replication import VERSION
from replication.client.qmp import Refused
from replication.client.session import NotRunning, Session, Unreachable, Unusable
from replication.replctl import nodes

from . import decision, metadata
from .decision import Seen
from .pacemaker import ClusterError, Pacemaker, Register
from .process import Runner, StartFailed, runner
from .told import Told, read

_ANSWER_S = 5.0
"""Longest wait for an answer of the node, where nothing is to be done for it."""
_SETTLE_S = 8.0
"""Longest wait of a start for a node that does not know yet whether another one went on."""
_IN_SYNC_S = 30.0
"""Longest wait of a hand-over for a pair that is about to be in sync: the guest stands still meanwhile."""
_LAST_LOOK_S = 1.0
"""For each step of a stop's look at a node that may hang."""
_END_S = 15.0
"""What a stop has left for ending the node, whatever that look takes."""
_GONE = "alone\n"
"""In the mark: the cluster knows that the resource runs nowhere else."""
_STEP_S = 0.1
_STEPS = 6
"""Of a conversation: the greeting and five commands."""


_PASSING = ("busy", "storage", "has-primary", "not-lossless")
"""Codes of refusals that end by themselves: another change of role, a storage that hangs, a primary that was heard of a
moment ago, and one that is back: then it is looked at anew."""

_CONNECTED = ("connecting", "synchronizing", "in-sync")


class Code(IntEnum):
    """OCF's exit codes. DEGRADED is Pacemaker's own: it works, and somebody has to look at it."""

    OK = 0
    GENERIC = 1
    ARGS = 2
    UNIMPLEMENTED = 3
    INSTALLED = 5
    CONFIGURED = 6
    NOT_RUNNING = 7
    PROMOTED = 8
    FAILED_PROMOTED = 9
    DEGRADED = 190


class Failed(Exception):
    """The action ends with this code."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


def run(arguments: list[str], environment: Mapping[str, str], launcher: str) -> int:
    """One action; its exit code."""
    action = arguments[0] if len(arguments) == 1 else ""
    if action == "meta-data":
        sys.stdout.write(metadata.to_xml(VERSION))
        return Code.OK
    try:
        told = read(environment)
        agent = Agent(told, Pacemaker(told), runner(told, launcher))
        found = agent.actions.get(action)
        if found is None:
            usage = "|".join([*agent.actions, "meta-data"])
            print(f"usage: replication {usage}", file=sys.stderr)
            return Code.UNIMPLEMENTED
        return found()
    except Failed as error:
        return _ended(error.code, str(error))
    except (Refused, Unusable) as error:
        return _ended(Code.GENERIC, str(error))


def _ended(code: Code, text: str) -> Code:
    print("ocf-exit-reason:" + " ".join(text.split()), file=sys.stderr)
    return code


def _log(text: str) -> None:
    """Pacemaker takes it into its log."""
    print(f"replication: {text}", file=sys.stderr)


class Agent:
    """One call for one node."""

    def __init__(self, told: Told, pacemaker: Pacemaker, process: Runner) -> None:
        self._register: Register | None = None
        self._unread = False
        self._told = told
        self._pacemaker = pacemaker
        self._process = process
        self._mark = Path(told.folder) / f"nbdkit-replication-{told.node}.promoted"
        self.actions: dict[str, Callable[[], Code]] = {
            "start": self.start,
            "stop": self.stop,
            "monitor": self.monitor,
            "status": self.monitor,
            "promote": self.promote,
            "demote": self.demote,
            "notify": self.notify,
            "reload-agent": self.reload,
            "validate-all": self.validate,
        }

    # -- what is so ----------------------------------------------------------------------------------------

    def monitor(self) -> Code:
        """How the node is. A probe changes nothing."""
        try:
            seen = self._look_patiently()
        except NotRunning:
            if self._told.repeated:
                self._forget()
            return Code.NOT_RUNNING
        except Unreachable as error:
            raise Failed(Code.FAILED_PROMOTED if self._marked else Code.GENERIC, str(error)) from error
        if self._marked:
            return self._of_promoted(seen)
        if self._told.repeated:
            seen = self._give_way(seen, news=False)
            self._publish(self._score(seen))
            if seen.split is not None:
                return _ended(
                    Code.DEGRADED, f"{seen.split}; decide whose writes are to be thrown away: replctl discard"
                )
            if self._told.wrong:
                return _ended(Code.DEGRADED, "; ".join(self._told.wrong.values()))
        return Code.OK

    def _of_promoted(self, seen: Seen) -> Code:
        if not seen.owner:
            raise Failed(Code.FAILED_PROMOTED, "it was promoted, and somebody has made it a secondary")
        if (why := decision.obstacle(seen, 0)) is not None:
            self._publish(None)
            raise Failed(Code.FAILED_PROMOTED, f"it was promoted, and must not be: {why}")
        if self._told.repeated:
            if decision.stays_closed(seen):
                self._ask("replication-set-role", role="primary")
            self._enter(seen)
            self._publish(decision.OWNER)
            # The word that the other node is gone is said once, and the guest may stand still later.
            try:
                self._let_go_on(seen, self._others_gone and not self._unread)
            except (Refused, Unusable) as error:
                _log(f"its guest stands still: {error}")
        return Code.PROMOTED

    def validate(self) -> Code:
        """Whether the parameters, and the node's file, can be used."""
        from replication.errors import ConfigError  # noqa: PLC0415 (the plugin's part is not needed for anything else)
        from replication.service import config  # noqa: PLC0415

        self._usable(*self._told.wrong)
        self._control()
        try:
            found = config.load(self._told.node)
        except ConfigError as error:
            raise Failed(Code.CONFIGURED, str(error)) from error
        options = found.options
        if "role" not in found.given:
            raise Failed(Code.CONFIGURED, f'{found.path}: a cluster needs role = "auto" in place of mode')
        if options.secondary is None:
            raise Failed(Code.CONFIGURED, f"{found.path}: peer is missing: where the other node listens")
        if options.checkpoint_interval_s is None:
            _log(f"{found.path} has no checkpoint-interval: there will be nothing to fail over to")
        return Code.OK

    # -- start and stop ------------------------------------------------------------------------------------

    def start(self) -> Code:
        """The process runs, and the node knows as well as it can whether another one went on."""
        self._usable("node", "service")
        self._control()
        self._unmark()
        try:
            self._process.start()
            seen = self._first_answer()
        except StartFailed as error:
            raise Failed(Code.INSTALLED if error.lasting else Code.GENERIC, str(error)) from error
        if not seen.owner and seen.stage == "none":
            self._ask("replication-start")
            seen = self._look()
        until = time.monotonic() + min(_SETTLE_S, self._told.left_s)
        while True:
            seen = self._give_way(seen, news=True)
            unsure = seen.owner and (seen.may_run is None or decision.gives_up(seen, news=True) is not None)
            if not unsure or time.monotonic() > until:
                break
            time.sleep(_STEP_S)
            seen = self._look()
        self._publish(self._score(seen))
        return Code.OK

    def _first_answer(self) -> Seen:
        while True:
            try:
                return self._look()
            except Unreachable as error:
                self._process.check()
                if self._told.left_s <= _STEP_S:
                    raise Failed(Code.GENERIC, f"the node does not answer: {error}") from error
            time.sleep(_STEP_S)

    def stop(self) -> Code:
        """There is no process."""
        self._forget()
        if not self._told.node:
            return Code.OK  # nothing was ever started by that name
        last = self._last_look()
        if not self._process.stop():
            raise Failed(Code.GENERIC, "the node's process has not ended")
        self._end_others()
        if last is not None and decision.keeps(last):
            self._keep(last)
        self._unmark()
        return Code.OK

    def _last_look(self) -> Seen | None:
        """Before its end; None if it does not answer at once: what is left of the time is for ending it."""
        step_s = min(_LAST_LOOK_S, (self._told.left_s - _END_S) / _STEPS)
        if step_s <= 0:
            return None
        try:
            with Session(self._control(), step_s) as session:
                return _seen(session.call("query-role"), session.call("query-replication"))
        except (Failed, Refused, Unusable):
            return None

    def _keep(self, seen: Seen) -> None:
        """The register says that this host, which was promoted last, has its disks still. Without that the next
        promotion would take a host that is stopped for one that was fenced, and throw away what it has."""
        try:
            register = self._pacemaker.register()
            if register is not None and register.host == self._told.here:
                self._pacemaker.enter(Register(self._told.here, seen.lineage, kept=True))
        except ClusterError as error:
            _log(f"that the disks are kept here is not in the cluster's configuration: {error}")

    def _end_others(self) -> None:
        """A node that somebody has started by hand."""
        try:
            control = self._control()
        except Failed:
            return  # there is no such node on this host
        asked = False
        while True:
            try:
                with Session(control, self._step_s) as session:
                    if not asked:
                        session.call("quit")
                        asked = True
            except NotRunning:
                return
            except Unusable as error:
                _log(str(error))
            if self._told.left_s <= _STEP_S:
                raise Failed(Code.GENERIC, "the node was started by hand, and has not ended")
            time.sleep(_STEP_S)

    def reload(self) -> Code:
        """The file is read again; parameters are read with each action. One that is wrong is no failure: for that the
        cluster would stop the resource everywhere."""
        for text in self._told.wrong.values():
            _log(text)
        self._process.reload()
        return Code.OK

    # -- roles ---------------------------------------------------------------------------------------------

    def promote(self) -> Code:
        """The node owns its disks, and the guest may run."""
        if self._told.clustered and self._told.active is None:
            _log("the clone has no notify=true: whether the last owner is still there cannot be known")
        while True:
            seen = self._look(certain=True)
            why = decision.obstacle(seen, self._told.max_age_s)
            if why is not None:
                self._publish(self._score(seen))
                raise Failed(Code.GENERIC, f"promotion is refused: {why}")
            try:
                if not seen.owner:
                    self._take_over(seen)
                self._ask("replication-set-role", role="primary")
                break
            except Refused as error:
                if error.code not in _PASSING or self._told.left_s < 1:
                    raise Failed(Code.GENERIC, f"promotion is refused: {error}") from error
            time.sleep(_STEP_S)
        seen = self._look()
        try:
            # Before the guest writes: whoever is behind has to know it.
            self._pacemaker.enter(Register(self._told.here, seen.lineage))
        except ClusterError as error:
            raise Failed(Code.GENERIC, f"the cluster does not take down who owns the disks: {error}") from error
        gone = decision.others_are_gone(self._told.here, self._told.active)
        self._set_mark(gone)
        self._publish(decision.OWNER)
        self._let_go_on(seen, gone)
        return Code.OK

    def _let_go_on(self, seen: Seen, gone: bool) -> None:
        """A promoted node's guest that stands still because nobody knows of the other node."""
        if decision.goes_on(seen, gone):
            self._ask("replication-resume-io")
            _log("its guest goes on: the other node is gone, as the cluster knows")

    def _take_over(self, seen: Seen) -> None:
        """With everything, if that is here; else from the last checkpoint. Each is asked for as such: what was so a
        moment ago may not be any more."""
        if self._ask("query-failover").get("lossless") is True:
            self._ask("replication-stop", failover=True, lossless=True)
            return
        if seen.link in _CONNECTED and not decision.is_gone(seen, self._told.here, self._told.active):
            raise Refused("the primary is connected", code="has-primary")
        host = decision.lives_elsewhere(seen, self._told.here, self._told.active)
        if host is not None:
            unknown = "" if self._told.active is not None else " (without notify=true it is not known to be gone)"
            raise Failed(
                Code.GENERIC,
                f"promotion is refused: {host} still has the disks, and not everything of them is here{unknown}",
            )
        if (max_age_s := self._told.max_age_s) is None:
            raise Failed(Code.GENERIC, f"promotion is refused: {self._told.wrong['max_age']}")
        limit = {"max-age": max_age_s} if max_age_s else {}
        self._ask("replication-stop", failover=True, **limit)

    def demote(self) -> Code:
        """The guest does not run here any more."""
        try:
            seen = self._look()
        except NotRunning:
            self._unmark()
            return Code.NOT_RUNNING
        except Unreachable as error:
            raise Failed(Code.GENERIC, str(error)) from error
        seen = self._about_to_hand_over(seen)
        if decision.hands_over(seen, self._told.here, self._told.to_promote, self._told.active is not None):
            try:
                # By itself the node becomes a secondary even if its last checkpoint fails.
                self._ask("replication-checkpoint")
                self._ask("replication-set-role", role="secondary")
            except Refused as error:
                _log(f"it stays the owner of its disks: {error}")
            except Unreachable as error:
                # It may be at it still, and the cluster must not go on meanwhile.
                raise Failed(Code.GENERIC, f"whether it has handed over is not known: {error}") from error
        self._unmark()
        seen = self._look()
        if seen.owner and seen.register_here:
            # It keeps the disks, and may have gone on since the last monitor: whoever is behind has to know it.
            self._enter(seen)
        self._publish(self._score(seen))
        return Code.OK

    def _about_to_hand_over(self, seen: Seen) -> Seen:
        """A pair that is about to be in sync is waited for: nobody hands over later."""
        until = time.monotonic() + min(_IN_SYNC_S, self._told.left_s / 4)
        told = self._told.active is not None
        while decision.may_hand_over(seen, self._told.here, self._told.to_promote, told) and time.monotonic() < until:
            time.sleep(_STEP_S)
            try:
                seen = self._look()
            except Unreachable as error:
                raise Failed(Code.GENERIC, str(error)) from error
        return seen

    def notify(self) -> Code:
        """Something has changed in the cluster, or is about to. It cannot fail."""
        gone = decision.others_are_gone(self._told.here, self._told.active)
        if self._marked and (self._told.event.startswith("post-") or not gone):
            with suppress(Failed):  # the next event says it again
                self._set_mark(gone)
        if not self._told.event.startswith("post-"):
            return Code.OK
        try:
            seen = self._look()
            if self._marked:
                self._let_go_on(seen, gone)
            else:
                seen = self._give_way(seen, news=self._told.event == "post-promote")
                self._publish(self._score(seen))
        except NotRunning:
            pass  # it is stopped here
        except (Unusable, Refused) as error:
            _log(f"{self._told.event}: {error}")
        return Code.OK

    def _give_way(self, seen: Seen, news: bool) -> Seen:
        """An owner that is not promoted, and from which another one went on, becomes a secondary. What stands in the
        way is tried again with the next look."""
        why = decision.gives_up(seen, news)
        if why is None:
            return seen
        try:
            if seen.outdated is None:
                self._ask("replication-outdate", reason=why)
            self._ask("replication-set-role", role="secondary")
            _log(f"it has become a secondary: {why}")
        except Refused as error:
            _log(f"it is to become a secondary ({why}), and does not yet: {error}")
        except Unusable as error:
            # It may be at it still; a node that is ended for that has to begin anew.
            _log(f"it is to become a secondary ({why}), and has not said that it is: {error}")
            return seen
        return self._look()

    # -- the mark ------------------------------------------------------------------------------------------

    @property
    def _marked(self) -> bool:
        return self._mark.exists()

    @property
    def _others_gone(self) -> bool:
        """Whether the cluster said so last."""
        try:
            return self._mark.read_text(encoding="ascii") == _GONE
        except (OSError, ValueError):
            return False

    def _set_mark(self, gone: bool) -> None:
        """`gone`: the cluster knows that the resource runs nowhere else."""
        try:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.write_text(_GONE if gone else "", encoding="ascii")
        except OSError as error:
            raise Failed(Code.GENERIC, f"cannot note that the node is promoted: {error}") from error

    def _unmark(self) -> None:
        try:
            self._mark.unlink(missing_ok=True)
        except OSError as error:
            raise Failed(Code.GENERIC, f"cannot note that the node is not promoted: {error}") from error

    # -- asking --------------------------------------------------------------------------------------------

    def _usable(self, *names: str) -> None:
        """Failed if one of these parameters is wrong."""
        for name in names:
            if (text := self._told.wrong.get(name)) is not None:
                raise Failed(Code.CONFIGURED, text)

    def _control(self) -> str:
        """The node's control socket; Failed if there is no such node on this host."""
        self._usable("node")
        try:
            return nodes.control_of(self._told.node)
        except Unusable as error:
            raise Failed(Code.INSTALLED, str(error)) from error

    @property
    def _step_s(self) -> float:
        """For one of the few steps of a conversation: together they end before the deadline."""
        return max(_STEP_S, min(_ANSWER_S, self._told.left_s / _STEPS))

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """What it returns; Refused, Unreachable."""
        with Session(self._control(), self._step_s) as first, first.again(max(_STEP_S, self._told.left_s)) as session:
            answer = session.call(command, **arguments)
        return answer if isinstance(answer, dict) else {}

    def _look(self, certain: bool = False) -> Seen:
        """Refused, Unreachable. `certain`: Failed if the register cannot be read; else it is as if there were none."""
        with Session(self._control(), self._step_s) as session:
            role, status = session.call("query-role"), session.call("query-replication")
            seen = _seen(role, status)
            if not seen.owner:
                with suppress(Refused):  # it has never had a primary
                    seen = replace(seen, lossless=session.call("query-failover").get("lossless") is True)
            try:
                register = self._pacemaker.register()
            except ClusterError as error:
                if certain:
                    raise Failed(Code.GENERIC, f"who owned the disks last cannot be known: {error}") from error
                _log(str(error))
                self._unread, register = True, None
            if register is None:
                return seen
            self._register = register
            here = register.host == self._told.here
            seen = replace(seen, register_host=register.host, register_kept=register.kept, register_here=here)
            if here:
                return seen  # what it had entered, and has lost with its power, nobody else went on from
            with suppress(Refused):  # what is in the register is no lineage that this version reads
                relation = session.call("replication-compare", lineage=register.lineage).get("relation")
                seen = replace(seen, relation=relation if isinstance(relation, str) else None)
        return seen

    def _look_patiently(self) -> Seen:
        """As `_look`, but a node that is being started again is waited for. NotRunning only if there is no process."""
        while True:
            try:
                return self._look()
            except Unreachable as error:
                if not self._process.alive():
                    raise
                if self._told.left_s < 1:
                    raise Unreachable(f"the node's process is there, and does not answer: {error}") from error
            time.sleep(_STEP_S)

    # -- telling the cluster -------------------------------------------------------------------------------

    def _score(self, seen: Seen) -> int | None:
        return decision.score(seen, self._told.max_age_s)

    def _forget(self) -> None:
        try:
            self._pacemaker.forget()
        except ClusterError as error:
            _log(str(error))

    def _publish(self, score: int | None) -> None:
        try:
            self._pacemaker.publish(score)
        except ClusterError as error:
            _log(str(error))

    def _enter(self, seen: Seen) -> None:
        """The register follows the lineage of the owner."""
        if self._unread:
            return  # somebody may have been promoted since
        register = self._register
        mine = seen.lineage.get("current")
        entered = register is not None and (register.host, register.lineage.get("current")) == (self._told.here, mine)
        if entered and not (register is not None and register.kept and self._marked):
            return
        try:
            self._pacemaker.enter(Register(self._told.here, seen.lineage))
        except ClusterError as error:
            _log(str(error))


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
        obstacle=role.get("peer-obstacle"),
        lineage=status.get("lineage") or {},
    )
