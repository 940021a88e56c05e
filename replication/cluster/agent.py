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
from typing import Any

from replication import VERSION
from replication.client.qmp import Refused
from replication.client.session import NotRunning, Unreachable, Unusable
from replication.errors import ConfigError

from . import decision, metadata
from .asking import STEP_S, Asking
from .codes import Code, Failed, ended, note
from .decision import Seen
from .mark import Mark
from .pacemaker import Pacemaker
from .process import Runner, StartFailed, runner
from .telling import Telling
from .told import CLONE, Told, read

_SETTLE_S = 8.0
"""Longest wait of a start for a node that does not know yet whether another one went on."""
_IN_SYNC_S = 30.0
"""Longest wait of a hand-over for a pair that is about to be in sync: the guest stands still meanwhile."""
_SPARE_S = 5.0
"""Of a start: what is left when it gives up saying to the cluster what somebody has to decide."""


_PASSING = ("busy", "storage", "has-primary", "not-lossless", "leased")
"""Codes of refusals that end by themselves: another change of role, a storage that hangs, a primary that was heard of a
moment ago, one that is back: then it is looked at anew; and a lease that is not over yet."""

_CONNECTED = ("connecting", "synchronizing", "in-sync")


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
        return ended(error.code, str(error))
    except (Refused, Unusable) as error:
        return ended(Code.GENERIC, str(error))


class Agent:
    """One call for one node."""

    def __init__(self, told: Told, pacemaker: Pacemaker, process: Runner) -> None:
        self._told = told
        self._process = process
        self._mark = Mark(told.folder, told.node)
        self._node = Asking(told, pacemaker, process)
        self._node.promoted = self._mark.there
        self._cluster = Telling(told, pacemaker, self._node)
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
            seen = self._node.look_patiently()
        except NotRunning:
            if self._told.repeated:
                self._cluster.forget()
            return Code.NOT_RUNNING
        except Unreachable as error:
            raise Failed(self._failure, str(error)) from error
        except Failed as error:
            if error.code is Code.INSTALLED and self._process.alive():
                raise Failed(self._failure, f"its process is there, and cannot be asked: {error}") from error
            raise
        if self._mark.there:
            return self._of_promoted(seen)
        if self._told.repeated:
            seen = self._give_way(seen, news=False)
            seen = self._cluster.settle(seen)
            self._cluster.score(seen)
            if seen.dispute is not None:
                return ended(Code.DEGRADED, seen.dispute)
            if seen.split is not None:
                return ended(Code.DEGRADED, f"{seen.split}; decide whose writes are to be thrown away: replctl discard")
            if self._told.wrong:
                return ended(Code.DEGRADED, "; ".join(self._told.wrong.values()))
        return Code.OK

    @property
    def _failure(self) -> Code:
        return Code.FAILED_PROMOTED if self._mark.there else Code.GENERIC

    def _of_promoted(self, seen: Seen) -> Code:
        if not seen.owner:
            raise Failed(Code.FAILED_PROMOTED, "it was promoted, and somebody has made it a secondary")
        if (why := decision.must_go(seen)) is not None:
            self._cluster.publish(None)
            raise Failed(Code.FAILED_PROMOTED, f"it was promoted, and must not be: {why}")
        if self._told.repeated:
            if decision.disputes(seen) and not decision.outranks(seen):
                seen = self._cluster.settle(seen)
                self._cluster.publish(decision.OWNER)
                return ended(Code.DEGRADED_PROMOTED, str(seen.dispute))
            if decision.outranks(seen):
                note(f"the cluster's register names {seen.register_host}, which was promoted before this node")
            if decision.stays_closed(seen):
                self._node.do("replication-set-role", role="primary")
            follows = self._cluster.follow(seen, promoted=True)
            self._cluster.publish(decision.OWNER)
            # The word that the other node is gone is said once, and the guest may stand still later.
            self._let_go_on(seen, self._mark.others_gone and not self._node.unread)
            if not follows:
                return ended(Code.DEGRADED_PROMOTED, "what the disks have is not in the cluster's register")
            if seen.register_here and seen.dispute is not None:
                return ended(Code.DEGRADED_PROMOTED, seen.dispute)
        return Code.PROMOTED

    def validate(self) -> Code:
        """Whether the parameters, and the node's file, can be used."""
        self._node.usable(*self._told.wrong)
        self._node.control()
        try:
            self._check_file(Code.CONFIGURED)
        except ConfigError as error:
            raise Failed(Code.CONFIGURED, str(error)) from error
        return Code.OK

    def _check_file(self, code: Code) -> None:
        """ConfigError if the node's file is wrong; Failed if it is not one for a cluster."""
        from replication.service import config  # noqa: PLC0415 (the plugin's part is not needed for anything else)

        found = config.load(self._told.node)
        if "role" not in found.given:
            raise Failed(code, f'{found.path}: a cluster needs role = "auto" in place of mode')
        if found.options.secondary is None:
            raise Failed(code, f"{found.path}: peer is missing: where the other node listens")
        if found.options.checkpoint_interval_s is None:
            note(f"{found.path} has no checkpoint-interval: there will be nothing to fail over to")

    # -- start and stop ------------------------------------------------------------------------------------

    def start(self) -> Code:
        """The process runs, and the node knows as well as it can whether another one went on."""
        self._node.usable("node", "service", *CLONE)
        self._node.control()
        if self._process.alive():
            if self._mark.there:
                self._node.first_look()
                return Code.OK  # a start that is repeated: its guest runs
        else:
            with suppress(ConfigError):  # the process says it when it is started
                self._check_file(Code.INSTALLED)  # a fault of this host: the others go on
        self._mark.remove()
        try:
            self._process.start()
            seen = self._node.first_look()
        except StartFailed as error:
            raise Failed(Code.INSTALLED if error.lasting else Code.GENERIC, str(error)) from error
        if not seen.owner and seen.stage == "none":
            self._node.do("replication-start")
            seen = self._node.look()
        until = time.monotonic() + min(_SETTLE_S, self._told.left_s)
        while True:
            seen = self._give_way(seen, news=True)
            unsure = seen.owner and (seen.may_run is None or decision.gives_up(seen, news=True) is not None)
            if not (unsure or self._node.unread) or time.monotonic() > until:
                break
            time.sleep(STEP_S)
            seen = self._node.look()
        self._cluster.seen()
        seen = self._cluster.settle(seen)
        while decision.disputes(seen) and seen.register_disputed != self._told.here and self._told.left_s > _SPARE_S:
            time.sleep(STEP_S)  # else another one is promoted that does not know
            seen = self._cluster.settle(self._node.look())
        self._cluster.score(seen)
        return Code.OK

    def stop(self) -> Code:
        """There is no process."""
        self._cluster.forget()
        if not self._told.node:
            return Code.OK  # nothing was ever started by that name
        last = self._node.last_look()
        if not self._process.stop():
            raise Failed(Code.GENERIC, "the node's process has not ended")
        if not self._node.quit():
            raise Failed(Code.GENERIC, "the node was started by hand, and has not ended")
        if last is not None and decision.keeps(last):
            self._cluster.keep(last)
        self._mark.remove()
        return Code.OK

    def reload(self) -> Code:
        """The file is read again; parameters are read with each action. One that is wrong is no failure: for that the
        cluster would stop the resource everywhere."""
        for text in self._told.wrong.values():
            note(text)
        self._process.reload()
        return Code.OK

    # -- roles ---------------------------------------------------------------------------------------------

    def promote(self) -> Code:
        """The node owns its disks, and the guest may run."""
        if self._told.clustered and self._told.active is None:
            note("the clone has no notify=true: whether the last owner is still there cannot be known")
        leased = False
        while True:
            seen = self._node.look(certain=True)
            why = decision.obstacle(seen, self._told.max_age_s)
            if why is not None:
                self._cluster.score(seen)
                raise Failed(Code.GENERIC, f"promotion is refused: {why}")
            try:
                if not seen.owner:
                    self._take_over(seen, leased)
                self._node.do("replication-set-role", role="primary")
                break
            except Refused as error:
                if error.code not in _PASSING or self._told.left_s < 1:
                    raise Failed(Code.GENERIC, f"promotion is refused: {error}") from error
                leased = error.code == "leased"
            time.sleep(STEP_S)
        judged = self._node.register
        seen = self._node.look()
        if seen.dispute is not None:  # raised since
            raise Failed(Code.GENERIC, f"promotion is refused: {seen.dispute}")
        # Before the guest writes: whoever is behind has to know it.
        self._cluster.promoted(seen, judged)
        gone = decision.others_are_gone(self._told.here, self._told.active)
        self._mark.put(gone)
        self._cluster.publish(decision.OWNER)
        self._let_go_on(seen, gone, news=True)
        return Code.OK

    def _let_go_on(self, seen: Seen, gone: bool, news: bool = False) -> None:
        """A promoted node's guest that stands still because nobody knows of the other node. `news`: it may have gone a
        moment ago, so that the node notices it only later. What stands in the way is tried again with the next look."""
        stands = decision.goes_on(seen, gone)
        if not stands and not (news and decision.goes_on_later(seen, gone)):
            return
        try:
            self._node.do("replication-resume-io", fenced=True)
            if stands:
                note("its guest goes on: the other node is gone, as the cluster knows")
        except (Refused, Unusable) as error:
            note(f"that the other node is gone cannot be said to this one: {error}")

    def _take_over(self, seen: Seen, leased: bool) -> None:
        """With everything, if that is here; else from the last checkpoint. Each is asked for as such: what was so a
        moment ago may not be any more. `leased`: it was refused for the lease of an owner, which ends with that one."""
        gone = decision.is_gone(seen, self._told.here, self._told.active)
        # Not before: a node of another version does not know the word.
        fenced = {"fenced": True} if leased and gone else {}
        if self._node.do("query-failover").get("lossless") is True:
            self._node.do("replication-stop", failover=True, lossless=True, **fenced)
            return
        if seen.link in _CONNECTED and not gone:
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
        conditions: dict[str, Any] = {"max-age": max_age_s} if max_age_s else {}
        if not gone:
            conditions["no-primary"] = True  # it may have been heard of since that look
        self._node.do("replication-stop", failover=True, **conditions, **fenced)

    def demote(self) -> Code:
        """The guest does not run here any more."""
        try:
            seen = self._node.look()
        except NotRunning:
            self._mark.remove()
            return Code.NOT_RUNNING
        except Unreachable as error:
            raise Failed(Code.GENERIC, str(error)) from error
        try:
            self._hand_over(self._about_to_hand_over(seen))
        except Unreachable as error:
            # It may be at it still, and the cluster must not go on meanwhile.
            raise Failed(Code.GENERIC, f"whether it has handed over is not known: {error}") from error
        self._mark.remove()
        seen = self._node.look()
        if seen.owner and seen.register_here:
            # It keeps the disks, and may have gone on since the last monitor: whoever is behind has to know it.
            self._cluster.follow(seen, promoted=False)
        self._cluster.score(seen)
        return Code.OK

    def _hand_over(self, seen: Seen) -> None:
        """To the one that is to be promoted, if that has everything. Unreachable."""
        if not decision.hands_over(seen, self._told.here, self._told.to_promote, self._told.active is not None):
            return
        if seen.register_here:
            self._cluster.follow(seen, promoted=False)  # that the other one has everything
        try:
            # What was so at the look may not be any more: by itself the node becomes a secondary anyhow.
            self._node.do("replication-set-role", role="secondary", lossless=True)
        except Refused as error:
            note(f"it stays the owner of its disks: {error}")

    def _about_to_hand_over(self, seen: Seen) -> Seen:
        """A pair that is about to be in sync is waited for: nobody hands over later."""
        until = time.monotonic() + min(_IN_SYNC_S, self._told.left_s / 4)
        told = self._told.active is not None
        while decision.may_hand_over(seen, self._told.here, self._told.to_promote, told) and time.monotonic() < until:
            time.sleep(STEP_S)
            try:
                seen = self._node.look()
            except Unreachable as error:
                raise Failed(Code.GENERIC, str(error)) from error
        return seen

    def notify(self) -> Code:
        """Something has changed in the cluster, or is about to. It cannot fail."""
        gone = decision.others_are_gone(self._told.here, self._told.active)
        if self._mark.there and (self._told.event.startswith("post-") or not gone):
            with suppress(Failed):  # the next event says it again
                self._mark.put(gone)
        late = self._told.event == "pre-promote" and not self._mark.there
        if not late and not self._told.event.startswith("post-"):
            return Code.OK
        try:
            seen = self._node.look()
            if late:
                # The pair may be in sync only since the demotion, or there was none.
                self._hand_over(seen)
            elif self._mark.there:
                self._let_go_on(seen, gone, news=True)
                if seen.register_here:
                    self._cluster.follow(seen, promoted=True)
            else:
                seen = self._give_way(seen, news=self._told.event == "post-promote")
                self._cluster.seen()
                seen = self._cluster.settle(seen)
                self._cluster.score(seen)
        except NotRunning:
            pass  # it is stopped here
        except (Unusable, Refused) as error:
            note(f"{self._told.event}: {error}")
        return Code.OK

    def _give_way(self, seen: Seen, news: bool) -> Seen:
        """An owner that is not promoted, and from which another one went on, becomes a secondary. What stands in the
        way is tried again with the next look."""
        why = decision.gives_up(seen, news)
        if why is None:
            return seen
        try:
            if seen.outdated is None:
                self._node.do("replication-outdate", reason=why)
            self._node.do("replication-set-role", role="secondary")
            note(f"it has become a secondary: {why}")
        except Refused as error:
            note(f"it is to become a secondary ({why}), and does not yet: {error}")
        except Unusable as error:
            # It may be at it still; a node that is ended for that has to begin anew.
            note(f"it is to become a secondary ({why}), and has not said that it is: {error}")
            return seen
        return self._node.look()
