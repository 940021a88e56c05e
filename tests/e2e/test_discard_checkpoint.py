# SPDX-License-Identifier: BSD-3-Clause
"""A resync that is larger than hidden: a person gives the last checkpoint up; nothing is preserved until it is over."""

from __future__ import annotations

import pytest

from content import KIB, MIB, pattern, whole
from lab import Lab
from nodes import Pair, Primary, Secondary, refused
from qmp import QmpError
from waiting import wait_until

SIZE = 16 * MIB


@pytest.fixture
def pair(lab: Lab) -> tuple[Secondary, Primary]:
    """Hidden has room for a quarter of the disk; all of the disk has been written while the link was down."""
    small = lab.small_folder(6 * MIB)
    contents = [pattern(99, SIZE)]
    secondary = lab.start(Secondary(lab.folder, [SIZE], contents=contents, overlays=small.folder))
    primary = lab.start(Primary(lab.folder, secondary.uri(), [SIZE], contents=contents))
    secondary.start_replication()
    primary.start_replication()
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the link is in sync")
    primary.checkpoint()
    secondary.kill()
    guest = primary.connect("disk0")
    for offset in range(0, SIZE, MIB):
        guest.pwrite(pattern(offset, MIB), offset)
    secondary.start()
    wait_until(lambda: (secondary.status()["error"] or {}).get("case") == 3, "hidden is full")
    return secondary, primary


def equal_in_the_end(secondary: Secondary, primary: Primary) -> None:
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "all was sent")
    primary.checkpoint()
    status = secondary.status()
    assert (status["consistent"], status["error"], primary.status()["error"]) == (True, None, None)
    assert secondary.disks[0].read_bytes() == primary.disks[0].read_bytes()
    guest = secondary.connect("top0")
    assert whole(guest) == primary.disks[0].read_bytes()
    primary.connect("disk0").pwrite(b"later" * KIB, 0)  # is preserved again
    wait_until(lambda: secondary.disks[0].read_bytes()[:5] == b"later", "it has come")
    assert bytes(guest.pread(5, 0)) != b"later"


def test_the_status_names_the_command_and_the_command_lets_the_resync_go_on(
    pair: tuple[Secondary, Primary],
) -> None:
    secondary, primary = pair
    wait_until(
        lambda: "discard --checkpoint" in (primary.status()["link"]["reason"] or ""), "the primary names the command"
    )
    secondary.execute("replication-discard", checkpoint=True)
    status = secondary.status()
    assert not status["consistent"]
    assert "no valid checkpoint" in refused(secondary, "x-colo-lost-heartbeat")
    equal_in_the_end(secondary, primary)


def test_a_start_gives_the_checkpoint_up(pair: tuple[Secondary, Primary]) -> None:
    secondary, primary = pair
    primary.execute("replication-stop")
    primary.execute("replication-start", {"secondary": secondary.uri(), "sync": "full", "discard-checkpoint": True})
    equal_in_the_end(secondary, primary)


def test_a_checkpoint_that_is_good_for_something_is_kept(lab: Lab) -> None:
    pair: Pair = lab.pair()
    pair.start_replication()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "the link is in sync")
    for arguments in ({"checkpoint": True}, {}):
        with pytest.raises(QmpError):
            pair.secondary.execute("replication-discard", arguments)
    pair.primary.kill()
    wait_until(lambda: pair.secondary.status()["peer-node"] is None, "the primary has gone")
    assert "all there is" in refused(pair.secondary, "replication-discard", {"checkpoint": True})
    assert pair.secondary.status()["consistent"]


def test_a_manager_sees_who_is_paired_and_what_will_be_sent(lab: Lab) -> None:
    pair: Pair = lab.pair()
    pair.start_replication()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "the link is in sync")
    pair.primary.checkpoint()
    here, there = pair.primary.status(), pair.secondary.status()
    assert (here["peer-node"], there["peer-node"]) == (there["node"], here["node"])
    assert here["generation"] == there["generation"] != ""
    assert here["disks"][0]["marks"] == there["disks"][0]["marks"] == 0
    pair.secondary.kill()
    pair.primary.connect("disk0").pwrite(b"x" * 100, 60 * KIB)
    assert pair.primary.status()["disks"][0]["marks"] == 1
    pair.primary.connect("disk0").pwrite(b"x" * 8 * KIB, 60 * KIB)
    assert pair.primary.status()["disks"][0]["marks"] == 2
