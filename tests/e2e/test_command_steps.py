# SPDX-License-Identifier: BSD-3-Clause
"""Whoever dies or fails in the midst of a command: it has changed nothing or says what, and a second one finishes it.

test_no_return.py has the state folder fail at each save; test_switchover_cut.py has `replctl switchover`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from content import KIB, MIB, make_raw, pattern, whole
from lab import Lab
from losingendpoint import LosingEndpoint
from nodes import Primary, Secondary, Server, drained, in_sync, refused
from pausepoints import PausePoints
from qmp import QmpError
from refusals import owned_up, said, seen, unchanged
from waiting import DEADLINE_S, begin, wait_until

BLOCK = 4 * KIB
PATIENT = "timeout=30"
"""Who is held must not be taken for lost, however busy the machine is."""


class Three:
    """A pair, and a node that may become the secondary of who is promoted."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.points = {name: PausePoints(lab.folder / f"pause-{name}") for name in ("primary", "secondary", "third")}
        content = [pattern(1, MIB)]
        self.secondary = lab.start(Secondary(lab.folder, contents=content, **self._options("secondary")))
        self.primary = lab.start(
            Primary(
                lab.folder,
                self.secondary.uri(),
                contents=content,
                extra_arguments=[PATIENT],
                **self._options("primary"),
            )
        )
        self.third = Secondary(lab.folder, name="third", contents=content, **self._options("third"))

    def _options(self, name: str) -> dict[str, Any]:
        return {"extra_environment": self.points[name].environment}

    def new(self) -> None:
        """The secondary runs, and no primary has ever come."""
        self.secondary.execute("replication-start")

    def running(self) -> None:
        """In sync, with a write since the last checkpoint."""
        self.new()
        self.primary.execute("replication-start")
        self.in_sync()
        self.primary.checkpoint()
        self.primary.connect("disk0").pwrite(pattern(2, BLOCK), 0)
        drained(self.primary)

    def held(self) -> None:
        """Running, and an epoch is held."""
        self.running()
        self.primary.execute("replication-checkpoint", hold=True)

    def parted(self) -> None:
        """Stopped by the primary, which has written since."""
        self.running()
        self.primary.execute("replication-stop")
        self.primary.connect("disk0").pwrite(pattern(3, BLOCK), 128 * KIB)

    def promoted(self) -> None:
        """The secondary owns its disk; the third is new and runs."""
        self.running()
        self.primary.kill()
        self.secondary.failover()
        self._lab.start(self.third)
        self.third.execute("replication-start")

    def in_sync(self, primary: Server | None = None) -> None:
        primary = primary or self.primary
        wait_until(lambda: primary.status()["link"]["state"] == "in-sync", f"{primary.name} is in sync")

    def equal(self, primary: Server, secondary: Server) -> None:
        """In sync, and the next checkpoint is of all that the primary has."""
        self.in_sync(primary)
        primary.execute("replication-checkpoint")
        content = seen(primary, "top0" if isinstance(primary, Secondary) else "disk0")
        assert content is not None
        assert seen(secondary, "top0") == content


@dataclass(frozen=True)
class Death:
    """A command in whose midst a node is killed."""

    before: str
    """The state, a method of Three."""
    asked: str
    command: str
    held: str
    """Whose thread is held at `point`."""
    point: str
    victim: str
    arguments: Callable[[Three], dict[str, Any]] = lambda _three: {}
    says: str = ""
    """Part of its answer."""
    again: Callable[[Three], None] = lambda _three: None
    """The second time, after the victim has come back."""


def start_again(three: Three) -> None:
    three.primary.execute("replication-start", secondary=three.secondary.uri())
    three.equal(three.primary, three.secondary)


def checkpoint_again(three: Three) -> None:
    three.in_sync()
    three.equal(three.primary, three.secondary)


def commit_again(three: Three) -> None:
    three.in_sync()
    number = three.primary.execute("replication-checkpoint", hold=True)["epoch"]
    three.primary.execute("replication-checkpoint-commit", epoch=number)
    assert seen(three.secondary) == seen(three.primary)


def stop_secondary_again(three: Three) -> None:
    three.in_sync()
    three.secondary.execute("replication-stop")
    assert seen(three.secondary) == three.primary.disks[0].read_bytes()


def promote_again(three: Three) -> None:
    three.secondary.execute("replication-start", mode="primary", secondary=three.third.uri())
    three.equal(three.secondary, three.third)


def to_secondary(three: Three) -> dict[str, Any]:
    return {"secondary": three.secondary.uri()}


def to_third(three: Three) -> dict[str, Any]:
    return {"mode": "primary", "secondary": three.third.uri()}


def epoch_held(three: Three) -> dict[str, Any]:
    return {"epoch": three.primary.status()["held-epoch"]}


def discarding(three: Three) -> dict[str, Any]:
    return {**to_secondary(three), "discard-checkpoint": True}


NOTED = "may send more than has changed"

DEATHS = {
    "start, before the session": Death(
        "new", "primary", "replication-start", "secondary", "pairing.begun", "secondary", again=start_again
    ),
    "start, before it is noted there": Death(
        "new", "primary", "replication-start", "secondary", "pairing.sync", "secondary", says=NOTED, again=start_again
    ),
    "start of one that was stopped, before it is noted there": Death(
        *("parted", "primary", "replication-start", "secondary", "pairing.sync", "secondary"),
        arguments=to_secondary,
        says=NOTED,
        again=start_again,
    ),
    "start that gives the checkpoint up": Death(
        *("parted", "primary", "replication-start", "primary", "start.entered", "secondary"),
        arguments=discarding,
        says="Replication has been started, but",
        again=checkpoint_again,
    ),
    "start of a promoted one, before the session": Death(
        *("promoted", "secondary", "replication-start", "third", "pairing.begun", "third"),
        arguments=to_third,
        again=promote_again,
    ),
    "start of a promoted one, before it is noted there": Death(
        *("promoted", "secondary", "replication-start", "third", "pairing.sync", "third"),
        arguments=to_third,
        says=NOTED,
        again=promote_again,
    ),
    "checkpoint, before it is asked for": Death(
        "running", "primary", "replication-checkpoint", "primary", "epoch.reached", "secondary", again=checkpoint_again
    ),
    "checkpoint, after it was begun": Death(
        *("running", "primary", "replication-checkpoint", "secondary", "checkpoint.begun", "secondary"),
        says="It is not known whether the secondary has taken checkpoint",
        again=checkpoint_again,
    ),
    "commit, before it is asked for": Death(
        *("held", "primary", "replication-checkpoint-commit", "primary", "epoch.reached", "secondary"),
        arguments=epoch_held,
        says="It is not known whether the secondary has taken checkpoint",
        again=commit_again,
    ),
    "commit, after it was begun": Death(
        *("held", "primary", "replication-checkpoint-commit", "secondary", "checkpoint.begun", "secondary"),
        arguments=epoch_held,
        says="It is not known whether the secondary has taken checkpoint",
        again=commit_again,
    ),
    "stop of a secondary, before the primary says good-bye": Death(
        *("running", "secondary", "replication-stop", "primary", "epoch.parting", "primary"),
        says="had been asked to end what it sends",
        again=stop_secondary_again,
    ),
}

OF_A_DEATH = ("link", "peer-node")
"""What of query-replication is about a peer that has died."""

UNKNOWN = {"held-epoch", "epoch", "checkpoint"}
"""What may be another one where it is not known whether a checkpoint was taken."""

STARTED = {"stage", "generation", "lineage", "epoch", "checkpoint", "out-of-sync-bytes", "missing-bytes", "marks"}


def may_differ(refusal: str) -> set[str]:
    """What a refusal says has changed, or may have."""
    more = UNKNOWN if "It is not known whether" in refusal else set()
    more |= STARTED if "Replication has been started" in refusal else set()
    return owned_up(refusal) | more | set(OF_A_DEATH)


@pytest.mark.parametrize("name", DEATHS)
def test_who_dies_in_a_command_leaves_everything_as_it_was_or_it_is_said(lab: Lab, name: str) -> None:
    death, three = DEATHS[name], Three(lab)
    getattr(three, death.before)()
    asked, victim = getattr(three, death.asked), getattr(three, death.victim)
    points = three.points[death.held]
    before, guest, disk = said(asked), seen(asked), asked.disks[0].read_bytes()
    arguments = death.arguments(three)
    points.arm(death.point)
    answer = begin(asked.execute, death.command, arguments)
    points.wait_hit(death.point)
    victim.kill()
    points.disarm(death.point)
    error = answer.exception(DEADLINE_S)
    assert isinstance(error, QmpError), error
    assert death.says in error.desc
    unchanged(asked, before, may_differ(error.desc), error.desc)
    assert (seen(asked), asked.disks[0].read_bytes()) == (guest, disk), error.desc
    victim.start()
    death.again(three)


def accepted(node: Server, command: str) -> bool:
    """Give it; whether it has succeeded."""
    try:
        node.execute(command)
    except QmpError:
        return False
    return True


class Losing:
    """A pair whose secondary disk is behind a server whose flush can fail."""

    def __init__(self, lab: Lab, *more: str) -> None:
        self.below = lab.start(LosingEndpoint(lab.folder, make_raw(lab.folder / "below.raw", MIB), "below"))
        arguments = ["mode=secondary", f"state={lab.folder / 's2'}", f"disk=disk0:{self.below.uri()}", "top-id=top0"]
        self.secondary = lab.start(Server(lab.folder, "secondary", [*arguments, *more]))
        self.primary = lab.primary(self.secondary.uri(), extra_arguments=[PATIENT])

    def running(self) -> None:
        """In sync, with a write that no flush has covered."""
        self.secondary.execute("replication-start")
        self.primary.execute("replication-start")
        self.in_sync()
        self.primary.checkpoint()
        self.primary.connect("disk0").pwrite(pattern(2, BLOCK), 0)
        drained(self.primary)

    def in_sync(self) -> None:
        in_sync(self.primary)

    def again(self, command: str) -> None:
        """As soon as the primary has sent what was lost."""
        wait_until(lambda: accepted(self.secondary, command), f"{command} succeeds")


OF_A_LOSS = ("out-of-sync-bytes", "missing-bytes", "marks", "link", "consistent", "checkpoint-obstacle", "peer-node")
"""What of query-replication says that a failed flush has lost something."""


def test_a_flush_that_fails_in_a_planned_stop_refuses_it(lab: Lab) -> None:
    losing = Losing(lab)
    losing.running()
    node = losing.secondary
    before = said(node)
    losing.below.fail_flush()
    why = refused(node, "replication-stop")
    assert losing.below.work()
    unchanged(node, before, {*OF_A_LOSS, *owned_up(why)}, why)
    losing.again("replication-stop")
    assert seen(node, "top0") == losing.primary.disks[0].read_bytes()


def test_a_flush_that_fails_in_a_demotion_refuses_it(lab: Lab) -> None:
    losing = Losing(lab)
    losing.running()
    node = losing.secondary
    losing.primary.kill()
    node.execute("replication-stop", failover=True)
    node.wait_stage("done")
    guest = node.connect("top0")
    guest.pwrite(pattern(4, BLOCK), 128 * KIB)
    before = said(node)
    losing.below.fail_flush()
    why = refused(node, "replication-demote")
    assert losing.below.work()
    assert "cannot become a secondary" in why
    unchanged(node, before, (), why)
    guest.pwrite(pattern(5, BLOCK), 128 * KIB)
    assert whole(guest)[128 * KIB : 128 * KIB + BLOCK] == pattern(5, BLOCK)
    node.execute("replication-demote")
    assert node.status()["stage"] == "running"


def test_a_primary_that_cannot_stop_for_a_dead_peer_says_that_an_epoch_is_aborted(lab: Lab) -> None:
    """Its state folder hangs; what was held is given up before, because a guest's write may wait for it."""
    three = Three(lab)
    three.held()
    node, points = three.primary, three.points["primary"]
    before = said(node)
    points.arm("record.sync")
    why = refused(node, "x-colo-lost-heartbeat")
    assert "which was held, is aborted" in why
    assert "Nothing has changed" not in why
    points.wait_hit("record.sync")
    points.release("record.sync")
    unchanged(node, before, owned_up(why), why)
    three.equal(three.primary, three.secondary)
    wait_until(lambda: accepted(node, "x-colo-lost-heartbeat"), "the storage counts as quick again")
    assert node.status()["stage"] == "done"
