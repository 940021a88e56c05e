# SPDX-License-Identifier: BSD-3-Clause
"""What a secondary tells its primary while the link is up and idle: no guest writes, no checkpoint is asked for."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from content import KIB, MIB, pattern
from lab import Lab
from mounts import SmallFolder
from nodes import Pair, Primary, Secondary, Server, in_sync
from qmp import QmpError
from waiting import wait_until


def link_of(server: Server) -> dict[str, Any]:
    link: dict[str, Any] = server.status()["link"]
    return link


def cannot_save(small: SmallFolder, node: Secondary | Primary) -> None:
    """Until there is room again: the file of its record has lost the room that it had."""
    os.truncate(node.state / "state.json", 0)
    small.fill()


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """In sync and idle, with a first checkpoint of the secondary."""
    made = lab.pair()
    made.start_replication()
    in_sync(made.primary)
    made.primary.checkpoint()
    return made


@pytest.mark.parametrize("how", ["failover", "stop", "stop-demote"])
def test_a_primary_learns_that_its_secondary_has_left(pair: Pair, how: str) -> None:
    if how == "failover":
        pair.secondary.failover()
    else:
        pair.secondary.execute("replication-stop")
    if how == "stop-demote":
        pair.secondary.execute("replication-demote")

    status = wait_until(
        lambda: (found := pair.primary.status())["link"]["state"] != "in-sync" and found, "it is not in sync"
    )
    assert status["error"]["case"] == 8
    if how != "stop-demote":
        left = {"failover": "has become a secondary in stage", "stop": "was stopped as planned"}[how]
        assert left in status["error"]["desc"]


def test_in_sync_is_not_said_of_a_secondary_that_takes_no_checkpoint(pair: Pair) -> None:
    job = next(job for job in pair.secondary.execute("query-jobs") if job["type"] == "backup")
    pair.secondary.execute("job-cancel", id=job["id"])

    status = wait_until(
        lambda: (found := pair.primary.status())["link"]["state"] != "in-sync" and found, "it is not in sync"
    )
    assert "Backup job was cancelled" in status["link"]["reason"]
    assert status["error"]["case"] == 6
    time.sleep(1.5)  # looks and passes since, none of which may take it for repaired
    assert link_of(pair.primary)["state"] == "synchronizing"


def test_a_removed_overlay_shows_on_the_primary(pair: Pair) -> None:
    pair.secondary.overlay("hidden").unlink()
    wait_until(lambda: link_of(pair.primary)["state"] == "synchronizing", "it is not in sync")
    assert "was removed while in use" in link_of(pair.primary)["reason"]


def test_checkpoints_go_on_when_the_secondary_has_room_again(lab: Lab) -> None:
    """Its state folder is full: the checkpoint that adopts is refused; no person asks for another one."""
    small = lab.small_folder(8 * MIB)
    secondary = lab.start(Secondary(small.folder, overlays=lab.folder))
    primary = lab.start(Primary(lab.folder, secondary.uri()))
    secondary.start_replication()
    primary.start_replication()
    in_sync(primary)
    primary.checkpoint()
    secondary.kill()
    primary.connect("disk0").pwrite(pattern(1, 64 * KIB), 0)
    wait_until(lambda: link_of(primary)["state"] == "lost", "the link is lost")
    secondary.start()
    in_sync(primary)

    cannot_save(small, secondary)
    with pytest.raises(QmpError, match="No space left"):
        primary.checkpoint()
    status = primary.status()
    assert (status["link"]["state"], "No space left" in status["link"]["reason"]) == ("synchronizing", True)
    time.sleep(1.5)
    assert link_of(primary)["state"] == "synchronizing"
    small.make_room()
    wait_until(lambda: link_of(primary)["state"] == "in-sync", "it has found out by itself")
    assert primary.checkpoint()["epoch"] > 0
    assert primary.status()["error"] is None


def test_a_secondary_is_told_that_it_has_everything_when_there_is_room_again(lab: Lab) -> None:
    """The primary's state folder is full when the resync has ended: the offer is repeated until it is saved."""
    small = lab.small_folder(8 * MIB)
    secondary = lab.start(Secondary(lab.folder))
    primary = lab.start(Primary(small.folder, secondary.uri()))
    secondary.start_replication()
    primary.start_replication()
    in_sync(primary)
    guest = primary.connect("disk0")
    guest.pwrite(pattern(0, 64 * KIB), 0)  # the disk is in that folder, too, and has its space from here on
    primary.checkpoint()
    cannot_save(small, primary)
    secondary.kill()
    guest.pwrite(pattern(1, 64 * KIB), 0)
    wait_until(lambda: link_of(primary)["state"] == "lost", "the link is lost")
    secondary.start()

    wait_until(lambda: "cannot be told" in (link_of(primary)["reason"] or ""), "why it is not in sync")
    assert link_of(primary)["state"] == "synchronizing"
    small.make_room()
    wait_until(lambda: link_of(primary)["state"] == "in-sync", "it was told again")


def test_a_planned_stop_ends_the_stream_of_a_primary_at_one_instant(lab: Lab) -> None:
    """The guest writes a number to one place, then the same to another: what the secondary keeps has never the second
    without the first, and everything that is behind the cut is marked on the primary."""
    pair = lab.pair(primary_arguments=["on-outdated=continue"])  # the writer may be at work when it is told
    pair.start_replication()
    in_sync(pair.primary)
    guest = pair.primary.connect("disk0")
    places = (0, 512 * KIB)
    done = threading.Event()

    def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            for place in places:
                guest.pwrite(number.to_bytes(8) * 512, place)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_until(lambda: pair.primary.status()["disks"][0]["totals"]["forwarded"] > MIB, "it writes")
        pair.secondary.execute("replication-stop")
    finally:
        done.set()
        writer.join()
    content = pair.secondary.disks[0].read_bytes()
    first, second = (int.from_bytes(content[place : place + 8]) for place in places)
    assert first - second in (0, 1)
    assert all(content[place : place + 4096] == content[place : place + 8] * 512 for place in places)
    wait_until(lambda: pair.primary.status()["disks"][0]["marks"] == 2, "what did not come is marked")
    assert pair.secondary.status()["stage"] == "done"


def test_a_planned_stop_is_refused_when_the_primary_cannot_end_its_stream(lab: Lab) -> None:
    points = lab.pause_points()
    pair = lab.pair(primary_arguments=["timeout=30"], primary_options={"extra_environment": points.environment})
    pair.start_replication()
    in_sync(pair.primary)
    time.sleep(1)  # it has looked after the secondary since
    points.arm("epoch.parting")
    with pytest.raises(QmpError, match="did not end what it sends"):
        pair.secondary.execute("replication-stop")
    assert pair.secondary.status()["stage"] == "running"
    points.release("epoch.parting")
