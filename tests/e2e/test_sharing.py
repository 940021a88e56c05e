# SPDX-License-Identifier: BSD-3-Clause
"""Failover on a file system with reflinks: the commit shares what the guest sees instead of copying it."""

from __future__ import annotations

import pytest

from content import MIB, pattern, qemu_img
from lab import Lab
from mounts import SharingFolder
from nodes import Secondary, disk_name, top_id
from pausepoints import PausePoints

SIZE = 48 * MIB
OWN = 24 * MIB
BLOCK = 4096


def running(lab: Lab, folder: SharingFolder, points: PausePoints, arguments: list[str]) -> tuple[Secondary, bytes]:
    """A secondary whose guest has written the first half of an empty disk, whose primary has overwritten some of both
    halves since, and what the guest sees."""
    secondary = lab.start(
        Secondary(folder.folder, [SIZE], extra_arguments=arguments, extra_environment=points.environment)
    )
    secondary.start_replication()
    guest, target = secondary.connect(top_id(0)), secondary.connect(disk_name(0))
    for at in range(0, OWN, MIB):
        guest.pwrite(pattern(at, MIB), at)
    guest.pwrite(b"late", OWN + 10 * BLOCK + 5)
    for at in (0, OWN + 2 * MIB):
        target.pwrite(b"\xee" * 3 * MIB, at)
    guest.flush()
    seen = bytes(guest.pread(SIZE, 0))
    assert seen[:MIB] == pattern(0, MIB)
    assert seen[OWN + 2 * MIB :] == bytes(SIZE - OWN - 2 * MIB)
    return secondary, seen


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_failover_shares_what_was_written_in_large_pieces_and_is_equal_to_what_the_guest_saw(
    lab: Lab, sharing_folder: SharingFolder, durability: str
) -> None:
    secondary, seen = running(lab, sharing_folder, lab.pause_points(), [f"durability={durability}"])
    free = sharing_folder.free
    secondary.failover()
    assert sharing_folder.free > free - OWN / 4, "what the guest has written was not copied"
    assert secondary.disks[0].read_bytes() == seen
    guest = secondary.connect(top_id(0))
    assert bytes(guest.pread(SIZE, 0)) == seen
    # What is shared is the disk's own from the next write on.
    guest.pwrite(b"after", MIB + 3)
    expected = seen[: MIB + 3] + b"after" + seen[MIB + 8 :]
    secondary.restart()
    assert bytes(secondary.connect(top_id(0)).pread(SIZE, 0)) == expected == secondary.disks[0].read_bytes()


@pytest.mark.parametrize("point", ["commit.written", "commit.hidden-forgotten"])
def test_a_kill_between_sharing_and_letting_go_loses_nothing(
    lab: Lab, sharing_folder: SharingFolder, point: str
) -> None:
    points = lab.pause_points()
    secondary, seen = running(lab, sharing_folder, points, [])
    points.arm(point)
    secondary.execute("xen-set-replication", enable=False, primary=False, failover=True)
    points.wait_hit(point)
    secondary.kill()
    points.disarm(point)
    secondary.start()
    secondary.wait_stage("done")
    assert secondary.disks[0].read_bytes() == seen == bytes(secondary.connect(top_id(0)).pread(SIZE, 0))
    secondary.terminate()
    for kind in ("active", "hidden"):
        qemu_img("check", "-q", "-f", "qcow2", str(secondary.overlay(kind)))
