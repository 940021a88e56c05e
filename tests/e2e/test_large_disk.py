# SPDX-License-Identifier: BSD-3-Clause
"""A disk so large that the tables of its overlays begin as holes (image/qcow2.py): through a checkpoint, kills and a
failover no pass over them gives them blocks, and what was written is there."""

from __future__ import annotations

import os

import pytest

from content import KIB
from lab import Lab
from nodes import drained

SIZE = (300 << 30) + 4 * KIB
PLACES = (0, 100 << 30, (200 << 30) - 4 * KIB, SIZE - 4 * KIB)
OLD, NEW, OWN = (bytes([byte]) * (4 * KIB) for byte in b"onw")


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_large_disk_through_kills_and_a_failover(lab: Lab, durability: str) -> None:
    pair = lab.pair([SIZE], secondary_arguments=[f"durability={durability}"])
    pair.start_replication()
    disk = pair.primary.connect("disk0")
    for place in PLACES:
        disk.pwrite(OLD, place)
    pair.primary.checkpoint()
    for place in PLACES:
        disk.pwrite(NEW, place)
    drained(pair.primary)
    guest = pair.secondary.connect("top0")
    guest.pwrite(OWN, PLACES[2])
    for _ in range(2):
        pair.secondary.kill()
        pair.secondary.start()
    guest = pair.secondary.connect("top0")
    seen = [OWN if place == PLACES[2] else OLD for place in PLACES]
    assert [bytes(guest.pread(4 * KIB, place)) for place in PLACES] == seen
    assert pair.secondary.status()["disks"][0]["active-bytes"] == 4 * KIB
    for kind in ("active", "hidden"):
        image = pair.secondary.overlay(kind)
        assert os.stat(image).st_blocks * 512 <= 2 << 20, "no pass over the tables"
        assert image.with_suffix(".live").exists() == (durability == "power")
    pair.primary.kill()
    pair.secondary.failover()
    with open(pair.secondary.disks[0], "rb") as after:
        assert [os.pread(after.fileno(), 4 * KIB, place) for place in PLACES] == seen
