# SPDX-License-Identifier: BSD-3-Clause
"""That two disks are equal because a person says so, or because a checkpoint was adopted: it covers what was there by
then, and nothing that was written meanwhile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from lab import DEADLINE_S, KIB, MIB, Lab, Server, make_raw, pattern, wait_until

OLD = pattern(1, MIB)
NEW = pattern(2, 64 * KIB)


@pytest.mark.parametrize("point", ["start.connected", "start.settled"])
def test_what_a_guest_writes_while_the_disks_are_called_equal_is_sent(lab: Lab, point: str) -> None:
    """
    start --sync none:  claimed   connected   settled        running
    guest:              wrote     |           writes here    what it wrote before is not sent, this is
    """
    points = lab.pause_points()
    disks = [make_raw(lab.folder / f"{name}.raw", MIB, OLD) for name in ("a", "b")]
    secondary = lab.start(
        Server(lab.folder, "b", ["mode=secondary", f"state={lab.folder}/sb", f"disk={disks[1]}", "top-id=top0"])
    )
    arguments = ["mode=primary", f"state={lab.folder}/sa", f"disk={disks[0]}", f"secondary={secondary.uri()}"]
    primary = lab.start(Server(lab.folder, "a", arguments, extra_environment=points.environment))
    guest = primary.connect("disk0")
    guest.pwrite(b"before", 512 * KIB)
    with open(disks[1], "r+b") as file:  # as the person has done who says it
        file.seek(512 * KIB)
        file.write(b"before")
    points.arm(point)
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(primary.execute, "replication-start", sync="none")
        points.wait_hit(point)
        guest.pwrite(NEW, 0)
        points.release(point)
        start.result(DEADLINE_S)
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the link is in sync")
    primary.execute("replication-checkpoint")
    assert disks[1].read_bytes() == disks[0].read_bytes()
    assert primary.status()["disks"][0]["totals"]["forwarded"] <= len(NEW)
