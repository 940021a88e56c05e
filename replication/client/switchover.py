# SPDX-License-Identifier: BSD-3-Clause
"""A planned move of the disk: the primary is drained and stopped, then its secondary owns the disk.

    running, running    before
    done, running       half-way: the primary forwards no more, and nobody owns the disk
    done, done          the secondary owns it

Whatever breaks between two steps (a refusal, an answer that does not come, Ctrl-C), the nodes are asked anew where they
stand. Half-way is taken back: the primary is started again. It finds out over the link itself whether the secondary is
its secondary still, so this is right also when the secondary's answer has got lost, or can be had from nobody here.
A stop that is late is waited for before the stages are believed; where that is in vain, nobody is told that nothing has
changed.
What cannot even be taken back is said, with what to type. A second run goes on from half-way.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from .qmp import Refused
from .session import Session, Unusable
from .values import human_error, human_value

RECOVERY_S = 10.0
"""Longest wait for an answer while what broke is taken back."""

LATE_S = 60.0
"""Longest wait for the late answer to a stop, which may wait for another command, and for requests at work."""

_OWNER = "nobody's secondary"
"""In a primary's error: its secondary has stopped, as planned or by failover."""


class Move:
    """One switch-over between two nodes, by name."""

    def __init__(
        self, sides: dict[str, Session], states: dict[str, dict[str, Any]], say: Callable[[str], None] = print
    ) -> None:
        """`states` is what they answered to query-replication; `say` takes a line for each step that is done. Refused
        unless they are each other's pair, and the disk can be moved."""
        self._say = say
        self.primary, self.secondary = _who_is_who(states)
        self._sessions = sides
        self.before = states[self.primary]
        stages = states[self.primary].get("stage"), states[self.secondary].get("stage")
        # Of an older version it is not known whose pair they are, once the primary is stopped.
        known = bool(self.before.get("peer-node") and self.before.get("generation"))
        self.over = known and stages == ("done", "done")
        self.halfway = known and stages == ("done", "running")
        if self.over:
            return
        if self.halfway:
            if self.before.get("generation") != states[self.secondary].get("generation"):
                raise Refused("the two are not a pair any more: what they hold has become different")
            if self.lacking:
                raise Refused(
                    f"{self.primary}, the primary, is stopped, and its guest has written since: stop the guest and "
                    f"type `replctl start{self._to_secondary}` there, then repeat the switch-over"
                )
            return
        for name, state in states.items():
            if state.get("stage") != "running":
                raise Refused(f"replication is not running on {name}: its stage is {human_value(state.get('stage'))}")
            if state.get("error") is not None:
                raise Refused(f"{name} has an error: {human_error(state['error'])}")

    @property
    def lacking(self) -> bool:
        """Whether the primary has had something before the move that its secondary had not."""
        return _lacking(self.before)

    @property
    def _to_secondary(self) -> str:
        uri = (self.before.get("link") or {}).get("secondary")
        return f" --secondary {uri}" if uri else ""

    def run(self) -> None:
        """Move the disk. Refused: it is where it was, or the text says where and what to do."""
        if not self.halfway:
            primary = self._sessions[self.primary]
            primary.call("replication-checkpoint")
            self._say("drained: all that the guest was answered for is on the secondary")
            try:
                primary.call("replication-stop")
                self._check_still(primary.call("query-replication"))
            except Refused as error:
                self._take_back(str(error))
            except (Unusable, KeyboardInterrupt) as error:
                self._recover(error, self.primary)
            self._say("stopped: the primary forwards no more")
        try:
            self._sessions[self.secondary].call("replication-stop")
        except Refused as error:
            self._take_back(str(error))
        except (Unusable, KeyboardInterrupt) as error:
            self._recover(error, self.secondary)

    def _check_still(self, after: dict[str, Any]) -> None:
        if _written(after) != _written(self.before) or _lacking(after):
            raise Refused("the guest still writes to the primary: stop it first")

    # -- taking back ---------------------------------------------------------------------------------------

    def _recover(self, error: BaseException, stopping: str) -> None:
        """The answer of that node has got lost, or is late. Returns when the disk was moved all the same."""
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is short, and not to be left half done
        try:
            ended = self._has_ended(stopping, RECOVERY_S if isinstance(error, KeyboardInterrupt) else LATE_S)
            if self._stage_of(self.secondary) == "done":
                return
            stage = self._stage_of(self.primary)
            if stage == "running" and not ended:
                raise Refused(
                    f"{why}; {self.primary}, the primary, replicates as before, but {stopping} may stop yet. "
                    "Repeat the switch-over when it answers"
                )
            if stage == "running":
                raise Refused(f"{why}; nothing has changed, the primary replicates as before")
            if stage is None:
                raise Refused(
                    f"{why}; {self.primary}, the primary, does not answer: it may be stopped. Repeat the switch-over "
                    f"when it answers, or type `replctl start{self._to_secondary}` there to go back"
                )
            self._take_back(why, certain=ended or stopping != self.secondary)
        finally:
            signal.signal(signal.SIGINT, former)

    def _has_ended(self, name: str, within_s: float) -> bool:
        """Whether what a node was told to do is over: it has answered by now, whatever it says."""
        try:
            self._sessions[name].overdue(within_s)
        except Refused:
            return True
        except Unusable:
            return False
        return True

    def _take_back(self, why: str, certain: bool = True) -> None:
        """Start the primary again, if it was stopped. Returns when the secondary has become the owner. `certain`: it
        does not do so later."""
        if self._stage_of(self.primary) == "running":  # it has refused to stop
            raise Refused(f"{why}; nothing has changed, the primary replicates as before")
        try:
            with self._again(self.primary) as primary:
                primary.call("replication-start", secondary=(self.before.get("link") or {}).get("secondary"))
        except Refused as error:
            if _OWNER in str(error):
                return
            raise self._stuck(
                f"{why}; and the primary, which is stopped now, cannot be started again: {error}"
            ) from None
        except Unusable as error:
            raise self._stuck(
                f"{why}; and the primary, which is stopped now, cannot be started again: {error}"
            ) from None
        if not certain:
            raise Refused(
                f"{why}; the primary replicates again, but {self.secondary}, the secondary, may stop yet, and own the "
                "disk then. Repeat the switch-over when it answers"
            )
        if self.halfway:
            raise Refused(f"{why}; the primary replicates again, as before the switch-over that was cut off")
        raise Refused(f"{why}; nothing has changed, the primary replicates again")

    def _stuck(self, why: str) -> Refused:
        stage = self._stage_of(self.secondary)
        where = "does not answer" if stage is None else f"is in stage {stage}"
        return Refused(
            f"{why}. {self.secondary}, the secondary, {where}. Repeat the switch-over to finish it, or type "
            f"`replctl start{self._to_secondary}` on the primary to go back"
        )

    def _stage_of(self, name: str) -> str | None:
        """The stage, asked over a fresh connection; None when there is no answer."""
        try:
            with self._again(name) as session:
                return str(session.call("query-replication").get("stage"))
        except (Refused, Unusable):
            return None

    def _again(self, name: str) -> Session:
        return self._sessions[name].again(RECOVERY_S)


def _who_is_who(states: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """The names of the primary and the secondary; Refused unless they are each other's."""
    modes = {state.get("mode"): name for name, state in states.items()}
    if set(modes) != {"primary", "secondary"}:
        raise Refused(f"a primary and a secondary are needed, but both are {human_value(next(iter(modes)))}")
    disks = [{disk.get("name"): disk.get("size") for disk in state.get("disks", [])} for state in states.values()]
    if disks[0] != disks[1]:
        raise Refused("the two are not a pair: their disks have other names or sizes")
    primary, secondary = modes["primary"], modes["secondary"]
    for name, other in ((primary, secondary), (secondary, primary)):
        peer, node = states[name].get("peer-node"), states[other].get("node")
        if peer is not None and node is not None and peer != node:
            raise Refused(f"the two are not a pair: the other node of {name} is {peer}, and {other} is {node}")
    return primary, secondary


def _lacking(state: dict[str, Any]) -> bool:
    return any(disk.get("out-of-sync-bytes") for disk in state["disks"])


def _written(state: dict[str, Any]) -> int:
    """Bytes that the primary's guest has written in total."""
    return sum(disk.get("totals", {}).get("written", 0) for disk in state["disks"])
