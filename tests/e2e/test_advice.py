# SPDX-License-Identifier: BSD-3-Clause
"""What an error advises is followed, in a state in which it is printed: nothing is overwritten that nobody gave up.

What each node knows of whom, when two of them meet, is in test_lineage.py. Here are the errors that name a file to
move, a command or an option.
"""

from __future__ import annotations

import pytest

from content import KIB, MIB, pattern, whole
from lab import Lab
from nodes import Pair, Secondary, in_sync, refused
from pausepoints import PausePoints
from waiting import wait_until

BLOCK = 4 * KIB
OLD = pattern(1, MIB)


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """Replicated, with a checkpoint."""
    made = lab.pair(contents=[OLD])
    made.start_replication()
    in_sync(made.primary)
    made.primary.checkpoint()
    return made


def failed_over(pair: Pair) -> bytes:
    """The secondary owns its disk, and its guest has written; what it holds then."""
    pair.primary.execute("replication-stop")
    pair.secondary.failover()
    guest = pair.secondary.connect("top0")
    guest.pwrite(pattern(3, BLOCK), 0)
    guest.flush()
    return whole(guest)


def spoil(secondary: Secondary, name: str) -> None:
    """Its process is killed, and a file of its state folder is no longer one."""
    secondary.kill()
    path = secondary.state / name
    path.write_bytes(b"\xff" * path.stat().st_size)


def move_away(secondary: Secondary, names: str) -> None:
    """What the error says, and start anew."""
    for path in secondary.state.glob(names):
        path.rename(path.with_name(f"moved-{path.name}"))
    secondary.start()


@pytest.mark.parametrize("name", ["state.json", "epoch"])
def test_an_owner_whose_state_was_moved_away_to_start_anew_is_not_overwritten(pair: Pair, name: str) -> None:
    content = failed_over(pair)
    spoil(pair.secondary, name)
    if name == "state.json":
        (pair.secondary.state / "state.json.twin").unlink()
    code, said = pair.secondary.failed_start(pair.secondary.folder, pair.secondary.arguments)
    assert code != 0
    assert "move it away to start anew" in said
    move_away(pair.secondary, name)
    why = refused(pair.primary, "replication-start", {"secondary": pair.secondary.uri()})
    assert pair.secondary.disks[0].read_bytes() == content, why
    if name == "epoch":
        assert "nobody's secondary" in why
        return
    assert "run `replctl discard` on the secondary" in why
    pair.secondary.execute("replication-discard")
    pair.primary.execute("replication-start", {"secondary": pair.secondary.uri()})
    in_sync(pair.primary)
    assert pair.secondary.disks[0].read_bytes() == pair.primary.disks[0].read_bytes()


def stopped_after_a_checkpoint(lab: Lab, points: PausePoints) -> Pair:
    """The primary was stopped as planned; the secondary, which has the pause points, may fail over."""
    pair = lab.pair(contents=[OLD], secondary_options={"extra_environment": points.environment})
    pair.start_replication()
    in_sync(pair.primary)
    pair.primary.checkpoint()
    pair.primary.execute("replication-stop")
    return pair


def test_an_image_that_is_gone_is_not_to_be_copied_anew_from_the_primary_when_this_node_owns_the_disk(
    lab: Lab,
) -> None:
    points = lab.pause_points()
    pair = stopped_after_a_checkpoint(lab, points)
    pair.secondary.connect("top0").pwrite(pattern(3, BLOCK), 0)
    points.arm("commit.locked")
    pair.secondary.execute("replication-stop", failover=True)
    points.wait_hit("commit.locked")
    image = pair.secondary.overlay("active")
    pair.secondary.kill()
    moved = image.with_suffix(".moved")
    image.rename(moved)
    _, said = pair.secondary.failed_start(pair.secondary.folder, pair.secondary.arguments)
    assert "bring it back" in said
    assert "from the primary" not in said
    moved.rename(image)
    pair.secondary.start()
    pair.secondary.wait_stage("done")
    assert whole(pair.secondary.connect("top0")) == pattern(3, BLOCK) + OLD[BLOCK:]


def test_after_a_failover_nobody_is_told_to_copy_from_the_primary_or_to_remove_anything(lab: Lab) -> None:
    """The commit is cut off; from then on active holds what no other node has."""
    points = lab.pause_points()
    pair = stopped_after_a_checkpoint(lab, points)
    node = pair.secondary
    node.connect("top0").pwrite(pattern(3, BLOCK), 0)
    points.arm("commit.locked")
    node.execute("replication-stop", failover=True)
    points.wait_hit("commit.locked")
    node.kill()
    points.disarm("commit.locked")
    arguments = ["mode=primary", f"state={node.state}", f"disk=disk0:{node.disks[0]}", "secondary=nbd://localhost"]
    _, said = node.failed_start(node.folder, arguments)
    assert "or use another folder, with other disks" in said
    node.lose_checkpoint()
    node.start()
    node.wait_stage("failover-failed")
    why = refused(node, "replication-retry")
    assert "use force" in why
    assert "from the primary" not in why
    node.execute("replication-retry", force=True)
    node.wait_stage("done")
    assert whole(node.connect("top0")) == pattern(3, BLOCK) + OLD[BLOCK:]


def test_a_discard_that_means_a_nodes_writes_gives_up_no_checkpoint(lab: Lab) -> None:
    """Two operators: the one follows "split brain", meanwhile the other's primary has connected, and hidden is full."""
    small = lab.small_folder(6 * MIB)
    content = [pattern(9, 16 * MIB)]
    secondary = lab.start(Secondary(lab.folder, [16 * MIB], contents=content, overlays=small.folder))
    primary = lab.primary(secondary.uri(), [16 * MIB], contents=content)
    secondary.start_replication()
    primary.start_replication()
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "in sync")
    primary.checkpoint()
    guest = primary.connect("disk0")
    for offset in range(0, 16 * MIB, MIB):
        guest.pwrite(pattern(offset, MIB), offset)
    wait_until(lambda: (secondary.status()["error"] or {}).get("case") == 3, "hidden is full")
    assert "a primary is connected" in refused(secondary, "replication-discard", {"checkpoint": False})
    assert secondary.status()["consistent"] is True
    assert whole(secondary.connect("top0")) == content[0]
    secondary.execute("replication-discard")
    assert secondary.status()["consistent"] is False
