# SPDX-License-Identifier: BSD-3-Clause
"""The point of no return of each command: one that answers with an error has changed nothing.

The state folder cannot be written: at the first save of the command, at the second, and so on, until it succeeds. After
each refusal everything is as before: what the node says of itself, what it has on disk, what the guest sees; and a kill
makes no difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from commandline import replctl
from content import KIB, MIB, make_raw, pattern, whole
from fullstate import FullState
from lab import Lab
from losingendpoint import LosingEndpoint
from nodes import Primary, Secondary, Server, drained, in_sync, refused
from qmp import QmpError
from refusals import owned_up, said, seen, unchanged
from waiting import wait_until

BLOCK = 4 * KIB
STEPS_MAX = 8


class FullSecondary(Secondary):
    """A secondary whose state folder can be full."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.room = FullState(folder, self.name)

    def command(self) -> list[str]:
        return self.room.instead(super().command())


class FullPrimary(Primary):
    """A primary whose state folder can be full."""

    def __init__(self, folder: Path, secondary: str, **options: Any) -> None:
        super().__init__(folder, secondary, **options)
        self.room = FullState(folder, self.name)

    def command(self) -> list[str]:
        return self.room.instead(super().command())


class Nodes:
    """A pair in some state; `node` is the one that is given the command, `full` the one whose folder is full."""

    def __init__(self, lab: Lab, environment: Mapping[str, str] | None = None) -> None:
        content = pattern(1, MIB)
        self.lab = lab
        options = {"contents": [content], "extra_environment": environment}
        self.secondary = lab.start(FullSecondary(lab.folder, **options))
        self.primary = lab.start(FullPrimary(lab.folder, self.secondary.uri(), **options))

    def running(self) -> None:
        """In sync, with writes of both guests since the last checkpoint."""
        self.secondary.execute("replication-start")
        self.primary.execute("replication-start")
        self.in_sync()
        self.primary.checkpoint()
        self.primary.connect("disk0").pwrite(pattern(2, BLOCK), 0)
        drained(self.primary)
        self.secondary.connect("top0").pwrite(pattern(3, BLOCK), MIB // 2)

    def received(self) -> None:
        """Running, with what has been received since the link was lost: the next checkpoint is of another
        generation."""
        self.running()
        self.secondary.kill()
        self.primary.connect("disk0").pwrite(pattern(5, BLOCK), 64 * KIB)
        self.secondary.start()
        self.in_sync()
        drained(self.primary)

    def in_sync(self) -> None:
        in_sync(self.primary)

    def stopped(self) -> None:
        """Running, and then stopped by the primary."""
        self.running()
        self.primary.execute("replication-stop")
        wait_until(lambda: self.secondary.status()["link"]["primary"] is None, "the primary has left")

    def promoted(self) -> None:
        """The secondary owns its disk."""
        self.running()
        self.primary.kill()
        self.secondary.failover()
        self.secondary.connect("top0").pwrite(pattern(4, BLOCK), 8 * BLOCK)

    def without_checkpoint(self) -> None:
        """The secondary has none, because a person gave it up in the midst of a resync."""
        self.running()
        self.primary.kill()
        self.primary.disks[0].write_bytes(pattern(7, MIB))
        self.primary.start()
        self.in_sync()

    def others(self) -> None:
        """The secondary has writes that its primary does not know; both are secondaries to be."""
        self.promoted()
        self.secondary.execute("replication-demote")


def refuse_until_done(
    nodes: Nodes,
    node: FullPrimary | FullSecondary,
    command: Callable[[], object],
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Give the command with a folder that is full, from one save later each time, until it succeeds; how often it was
    refused. `ready()` waits for what the one before has said would come back by itself."""
    for steps in range(STEPS_MAX):
        ready()
        before, guest, disk = said(node), seen(node), node.disks[0].read_bytes()
        node.room.fill(steps)
        refusal = None
        try:
            command()
        except QmpError as error:
            refusal = error.desc
        node.room.make_room()
        if refusal is None:
            return steps
        assert "Internal error" not in refusal
        unchanged(node, before, owned_up(refusal), (steps, refusal))
        assert (seen(node), node.disks[0].read_bytes()) == (guest, disk), (steps, refusal)
    raise AssertionError(f"it does not succeed with {STEPS_MAX} saves")


def kept(node: FullPrimary | FullSecondary) -> dict[str, Any]:
    """The record on disk, but for what is of one process or attempt."""
    saved = json.loads((node.state / "state.json").read_text())
    return {name: saved.get(name) for name in ("mode", "stage", "inconsistent", "promoted", "led")}


@pytest.fixture
def nodes(lab: Lab) -> Nodes:
    return Nodes(lab)


def test_start_of_a_secondary(nodes: Nodes) -> None:
    node = nodes.secondary
    assert refuse_until_done(nodes, node, lambda: node.execute("replication-start")) >= 2
    assert (node.status()["stage"], kept(node)["stage"]) == ("running", "running")


def test_start_of_a_secondary_that_its_primary_has_started(nodes: Nodes) -> None:
    nodes.primary.execute("replication-start")
    nodes.in_sync()
    nodes.primary.checkpoint()
    node = nodes.secondary
    assert kept(node)["led"] is True
    assert refuse_until_done(nodes, node, lambda: node.execute("replication-start")) == 1
    assert "running or done" in refused(node, "replication-start")


def test_start_of_a_primary(nodes: Nodes) -> None:
    nodes.secondary.execute("replication-start")
    node = nodes.primary
    refuse_until_done(nodes, node, lambda: node.execute("replication-start"))
    nodes.in_sync()
    node.checkpoint()


def test_start_of_a_primary_that_its_secondary_refuses(nodes: Nodes) -> None:
    """The secondary cannot save what it is going to receive: neither side has changed, and the next start finds two new
    nodes again."""
    nodes.secondary.execute("replication-start")
    nodes.secondary.room.fill(0)
    before = said(nodes.primary), said(nodes.secondary)
    assert "No space left" in refused(nodes.primary, "replication-start")
    # The session of the primary ends a moment after its answer.
    wait_until(lambda: (said(nodes.primary), said(nodes.secondary)) == before, "nothing has changed")
    nodes.secondary.room.make_room()
    nodes.primary.execute("replication-start")
    nodes.in_sync()
    assert nodes.primary.status()["disks"][0]["totals"]["forwarded"] == 0  # taken as equal


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_checkpoint(nodes: Nodes, role: str) -> None:
    """With what has been received since the link was lost, so that it changes the lineage as well."""
    nodes.received()
    node: FullPrimary | FullSecondary = nodes.primary if role == "primary" else nodes.secondary
    refuse_until_done(nodes, node, nodes.primary.checkpoint)
    assert whole(nodes.secondary.connect("top0")) == whole(nodes.primary.connect("disk0"))


def test_stop_of_a_primary_says_that_what_was_held_is_aborted(nodes: Nodes) -> None:
    nodes.running()
    node = nodes.primary
    held = node.execute("replication-checkpoint", hold=True)["epoch"]
    node.room.fill(0)
    assert f"epoch {held}, which was held, is aborted" in refused(node, "replication-stop")
    node.room.make_room()
    assert node.status()["held-epoch"] is None
    assert refuse_until_done(nodes, node, lambda: node.execute("replication-stop")) == 1
    assert kept(node)["stage"] == "done"


@pytest.mark.parametrize("connected", [False, True])
def test_planned_stop_of_a_secondary(nodes: Nodes, connected: bool) -> None:
    """While its primary is connected, that is asked to end its stream only when nothing here refuses the stop."""
    (nodes.running if connected else nodes.stopped)()
    node = nodes.secondary
    generation = nodes.primary.status()["generation"]
    ready = partial(both_in_sync, nodes) if connected else lambda: None
    assert refuse_until_done(nodes, node, lambda: node.execute("replication-stop"), ready) >= 1
    assert kept(node)["stage"] == "done"
    assert nodes.primary.status()["generation"] == generation
    assert whole(node.connect("top0"))[:BLOCK] == pattern(2, BLOCK)


def both_in_sync(nodes: Nodes) -> None:
    nodes.in_sync()
    wait_until(lambda: nodes.secondary.status()["link"]["state"] == "in-sync", "the secondary knows it")


def test_a_refused_stop_of_a_secondary_leaves_the_link_alone(nodes: Nodes) -> None:
    nodes.running()
    image = nodes.secondary.overlay("hidden")
    moved = image.with_suffix(".moved")
    with nodes.primary.qmp() as events:
        image.rename(moved)
        assert "was removed" in refused(nodes.secondary, "replication-stop")
        moved.rename(image)
        nodes.in_sync()
        nodes.primary.checkpoint()
        events.wait_event("REPLICATION_CHECKPOINT")
        assert "lost" not in [event["data"].get("state") for event in events.events]


def test_failover(nodes: Nodes) -> None:
    nodes.running()
    node = nodes.secondary
    assert refuse_until_done(nodes, node, lambda: node.execute("replication-stop", failover=True)) == 1
    assert node.wait_stage("done")["stage"] == "done"
    assert whole(node.connect("top0"))[:BLOCK] == pattern(1, MIB)[:BLOCK]


def test_demote(nodes: Nodes) -> None:
    """Its guest's face goes on when it fails, and it can be killed meanwhile."""
    nodes.promoted()
    node = nodes.secondary
    steps = refuse_until_done(nodes, node, lambda: node.execute("replication-demote"))
    assert steps >= 1
    assert kept(node)["stage"] == "running"


def test_demote_that_is_refused_is_the_owner_after_a_kill_as_well(nodes: Nodes) -> None:
    nodes.promoted()
    node = nodes.secondary
    before, guest = said(node), seen(node)
    node.room.fill(0)
    assert "cannot become a secondary" in refused(node, "replication-demote")
    node.connect("top0").pwrite(pattern(5, BLOCK), 0)
    node.connect("top0").flush()
    node.kill()
    node.room.make_room()
    node.start()
    after = seen(node)
    assert after is not None
    assert guest is not None
    assert after == pattern(5, BLOCK) + guest[BLOCK:]
    assert said(node, ("disks",)) == {name: value for name, value in before.items() if name != "disks"}


def test_a_promoted_one_becomes_a_primary(nodes: Nodes) -> None:
    nodes.promoted()
    other = nodes.lab.start(Secondary(nodes.lab.folder, name="third"))
    node = nodes.secondary
    refuse_until_done(
        nodes,
        node,
        lambda: node.execute("replication-start", mode="primary", secondary=other.uri()),
    )
    wait_until(lambda: node.status()["link"]["state"] == "in-sync", "in sync")
    node.checkpoint()


def test_discard(nodes: Nodes) -> None:
    nodes.others()
    node = nodes.secondary
    assert refuse_until_done(nodes, node, lambda: node.execute("replication-discard")) == 1


def test_commit_of_an_epoch_that_is_held(nodes: Nodes) -> None:
    """Each attempt has an epoch of its own; the answer of one that is refused says that it is aborted."""
    nodes.received()
    steps = refuse_until_done(nodes, nodes.secondary, lambda: hold_and_commit(nodes.primary))
    assert steps >= 1
    assert nodes.primary.status()["held-epoch"] is None
    assert whole(nodes.secondary.connect("top0")) == whole(nodes.primary.connect("disk0"))


def hold_and_commit(primary: Primary) -> None:
    """The primary's folder has room. Without a commit the hold would be aborted by itself some time."""
    number = primary.execute("replication-checkpoint", hold=True)["epoch"]
    held = said(primary)
    try:
        primary.execute("replication-checkpoint-commit", epoch=number)
    except QmpError as error:
        # The link is not in sync as long as the secondary has no room.
        unchanged(primary, held, {"held-epoch", "link"}, error.desc)
        if "is aborted, and replication goes on" not in error.desc:
            raise AssertionError(error.desc) from error
        raise


def test_full_start_of_a_primary_that_its_secondary_refuses_says_that_all_is_marked(nodes: Nodes) -> None:
    """Or that nothing has changed, if the refusal came first: a secondary whose primary had left in good order saves
    that one is back."""
    nodes.stopped()
    node = nodes.primary
    before = said(node), said(nodes.secondary)
    start = {"secondary": nodes.secondary.uri(), "sync": "full"}
    nodes.secondary.room.fill(0)
    why = refused(node, "replication-start", start)
    assert "No space left" in why
    unchanged(node, before[0], (), why)
    unchanged(nodes.secondary, before[1], (), why)
    nodes.secondary.room.fill(1)
    why = refused(node, "replication-start", start)
    assert "No space left" in why
    unchanged(node, before[0], owned_up(why), why)
    assert node.status()["disks"][0]["out-of-sync-bytes"] == MIB
    assert "may send more than has changed" in why
    unchanged(nodes.secondary, before[1], (), why)
    nodes.secondary.room.make_room()
    node.execute("replication-start", secondary=nodes.secondary.uri())
    nodes.in_sync()
    assert nodes.secondary.disks[0].read_bytes() == node.disks[0].read_bytes()


def without_checkpoint(nodes: Nodes) -> FullSecondary:
    """The secondary, whose primary is dead, and whose checkpoint is lost."""
    nodes.running()
    node = nodes.secondary
    nodes.primary.kill()
    node.kill()
    node.lose_checkpoint()
    node.start()
    return node


def test_failover_with_force(nodes: Nodes) -> None:
    """There is no checkpoint; what the overlays held nobody could see."""
    node = without_checkpoint(nodes)
    assert node.status()["consistent"] is False
    disk = node.disks[0].read_bytes()
    steps = refuse_until_done(nodes, node, lambda: node.execute("replication-stop", failover=True, force=True))
    assert steps >= 1
    node.wait_stage("done")
    assert seen(node) == disk


def test_force_is_not_advised_to_whom_has_used_it(nodes: Nodes) -> None:
    node = without_checkpoint(nodes)
    node.room.fill(0)
    why = refused(node, "replication-stop", {"failover": True, "force": True})
    assert "Nothing has changed" in why
    assert "use force" not in why


def test_retry(lab: Lab) -> None:
    points = lab.pause_points()
    nodes = Nodes(lab, points.environment)
    nodes.running()
    node = nodes.secondary
    points.arm("commit.locked")
    node.execute("replication-stop", failover=True)
    points.wait_hit("commit.locked")
    node.kill()
    points.disarm("commit.locked")
    node.lose_checkpoint()
    node.start()
    node.wait_stage("failover-failed")
    before = said(node)
    unchanged(node, before, (), refused(node, "replication-retry"))
    assert refuse_until_done(nodes, node, lambda: node.execute("replication-retry", force=True)) == 1
    node.wait_stage("done")
    assert seen(node) == pattern(1, MIB)[: MIB // 2] + pattern(3, BLOCK) + pattern(1, MIB)[MIB // 2 + BLOCK :]


def test_discard_of_a_checkpoint(lab: Lab) -> None:
    """In the midst of a resync, which is held: copy-before-write goes on as long as it is refused, its job too."""
    points = lab.pause_points()
    nodes = Nodes(lab, points.environment)
    nodes.running()
    node = nodes.secondary
    node.kill()
    nodes.primary.connect("disk0").pwrite(pattern(5, BLOCK), 128 * KIB)
    points.arm("link.synchronized")
    node.start()
    points.wait_hit("link.synchronized")
    command = partial(node.execute, "replication-discard", checkpoint=True)

    def refused_or_done() -> None:
        try:
            command()
        except QmpError:
            assert [job["status"] for job in node.execute("query-jobs")] == ["running"]
            raise

    assert refuse_until_done(nodes, node, refused_or_done) == 1
    assert node.status()["consistent"] is False
    points.release("link.synchronized")
    nodes.in_sync()
    nodes.primary.checkpoint()
    assert seen(node) == nodes.primary.disks[0].read_bytes()


DRAINED = {"epoch", "checkpoint", "checkpoint-of-primary", "active-bytes", "hidden-bytes"}
"""What the checkpoint changes with which a switch-over begins, and which it tells on a line of its own."""


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_switch_over(nodes: Nodes, role: str) -> None:
    """It has changed nothing, or says where the two stand, and running it again finishes it."""
    nodes.running()
    pair = (nodes.primary, nodes.secondary)
    room = nodes.primary.room if role == "primary" else nodes.secondary.room
    for steps in range(STEPS_MAX):
        before = [said(node) for node in pair]
        room.fill(steps)
        done = replctl(
            *("-s", nodes.primary.control_path, "switchover", "--yes", "--peer", nodes.secondary.control_path)
        )
        room.make_room()
        if done.returncode == 0:
            break
        if "nothing has changed" in done.stderr:
            for node, shown in zip(pair, before, strict=True):
                unchanged(node, shown, owned_up(done.stderr) | DRAINED, done.stderr)
        elif "as before the switch-over that was cut off" in done.stderr:
            both_in_sync(nodes)
            assert [node.status()["stage"] for node in pair] == ["running", "running"]
        else:
            assert "Repeat the switch-over to finish it" in done.stderr
            assert [node.status()["stage"] for node in pair] == ["done", "running"]
    assert [node.status()["stage"] for node in pair] == ["done", "done"]
    assert seen(nodes.secondary) == seen(nodes.primary) == nodes.secondary.disks[0].read_bytes()


def test_a_checkpoint_that_the_server_below_has_lost_before_it_is_not_answered_as_taken(lab: Lab) -> None:
    """The connection is idle, so nobody has noticed that it has gone."""
    below = lab.start(LosingEndpoint(lab.folder, make_raw(lab.folder / "below.raw", MIB), "below"))
    arguments = ["mode=secondary", f"state={lab.folder / 's2'}", f"disk=disk0:{below.uri()}", "top-id=top0"]
    secondary = lab.start(Server(lab.folder, "secondary", arguments))
    primary = lab.primary(secondary.uri(), extra_arguments=["timeout=30"])
    secondary.execute("replication-start")
    primary.execute("replication-start")
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "in sync")
    guest = primary.connect("disk0")
    for number in range(2, 5):
        guest.pwrite(pattern(number, BLOCK), 0)
        drained(primary)
        below.kill()
        below.start()
        try:
            primary.checkpoint()
        except QmpError:
            continue  # it says so
        # Perhaps it is not connected again yet.
        assert wait_until(lambda: seen(secondary, "top0"), "the checkpoint can be read") == whole(guest)
        assert secondary.status()["consistent"] is True
