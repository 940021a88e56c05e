# SPDX-License-Identifier: BSD-3-Clause
"""On an XFS or btrfs that is full, and whose blocks have a second owner (a copy, a snapshot): every store needs a new
block. It is refused where there is none; it does not end the process (SIGBUS). Everything of both nodes is there:
images and their live copies, maps, state, epoch, disks."""

from __future__ import annotations

import errno

import nbd
import pytest

from content import KIB, MIB, pattern
from lab import Lab
from mounts import SharingFolder
from nodes import Pair, disk_name, top_id
from waiting import wait_until

SIZE = 4 * MIB
STEP = 128 * KIB


@pytest.fixture(params=["xfs", "btrfs"])
def folder(lab: Lab, request: pytest.FixtureRequest) -> SharingFolder:
    try:
        return lab.sharing_folder(request.param)
    except PermissionError as error:
        pytest.skip(str(error))


def tries(handle: nbd.NBD, seed: int) -> None:
    """Writes everywhere, of which each may find no room."""
    for at in range(0, SIZE, STEP):
        try:
            handle.pwrite(pattern(seed + at, 8 * KIB), at)
        except nbd.Error as error:
            assert error.errnum in (errno.ENOSPC, errno.EIO), error  # noqa: PT017 (most of them succeed)


@pytest.mark.parametrize("durability", ["process", "power"])
def test_no_store_ends_a_process_where_each_needs_a_block(lab: Lab, folder: SharingFolder, durability: str) -> None:
    arguments = [f"durability={durability}"]
    pair = Pair(
        folder.folder,
        [SIZE],
        contents=[pattern(1, SIZE)] * 2,
        secondary_arguments=arguments,
        primary_arguments=["timeout=1"],
    )
    lab.add(pair.secondary)
    lab.add(pair.primary)
    pair.start()
    pair.start_replication()
    owner, face = pair.primary.connect(disk_name(0)), pair.secondary.connect(top_id(0))
    for at in range(0, SIZE, 2 * STEP):
        owner.pwrite(pattern(at, 4 * KIB), at)
        face.pwrite(pattern(at, 4 * KIB), at + 64 * KIB)
    pair.primary.checkpoint()
    folder.share()
    folder.fill()
    assert folder.free < 64 * KIB
    # The primary's disk and maps; hidden, the secondary disk and what it lacks.
    tries(owner, 2)
    # Active.
    tries(face, 3)
    pair.secondary.check_alive()
    pair.primary.check_alive()
    pair.primary.status()
    pair.secondary.status()
    # Without a link the primary's map takes each first write of a grain.
    pair.secondary.kill()
    tries(owner, 4)
    pair.primary.check_alive()
    folder.make_room()
    pair.secondary.start()
    assert wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "in sync again")
    for at in range(0, SIZE, MIB):
        owner.pwrite(pattern(5 + at, MIB), at)
    pair.primary.checkpoint()
    pair.primary.kill()
    pair.secondary.failover()
    assert pair.secondary.disks[0].read_bytes() == b"".join(pattern(5 + at, MIB) for at in range(0, SIZE, MIB))
