# SPDX-License-Identifier: BSD-3-Clause
"""A pair of which one node's state folder was spoiled: what it says, and that both disks are equal in the end. All
files in all stages: tests/unit/test_spoiled_folder.py."""

from __future__ import annotations

import pytest

from content import KIB, MIB, pattern, whole
from lab import Lab
from nodes import Server, in_sync
from qmp import Qmp

GRAIN = 64 * KIB
OLD, NEW = pattern(1, MIB), pattern(2, 4 * KIB)


@pytest.mark.parametrize("name", ["disk0.changes", "epoch", "disk0.unflushed"])
def test_a_primary_that_does_not_know_what_its_secondary_lacks_sends_everything(lab: Lab, name: str) -> None:
    pair = lab.pair(contents=[OLD])
    pair.start_replication()
    in_sync(pair.primary)
    pair.secondary.kill()
    pair.primary.connect("disk0").pwrite(NEW, 3 * GRAIN)
    pair.primary.kill()
    (pair.primary.state / name).unlink()
    pair.primary.start()
    assert pair.primary.status()["disks"][0]["out-of-sync-bytes"] == MIB
    pair.secondary.start()
    in_sync(pair.primary)
    pair.primary.checkpoint()
    assert pair.secondary.disks[0].read_bytes() == pair.primary.disks[0].read_bytes() != OLD


@pytest.mark.parametrize("name", ["disk0.lost", "epoch", "disk0.unflushed"])
def test_a_secondary_that_does_not_know_what_it_lacks_gets_everything(lab: Lab, name: str) -> None:
    pair = lab.pair(contents=[OLD])
    pair.start_replication()
    in_sync(pair.primary)
    pair.primary.connect("disk0").pwrite(NEW, 3 * GRAIN)
    pair.primary.checkpoint()
    checkpoint = pair.primary.disks[0].read_bytes()
    pair.secondary.kill()
    with open(pair.secondary.disks[0], "r+b") as disk:  # as after a write that failed, of which only that file knew
        disk.seek(5 * GRAIN)
        disk.write(b"lost")
    (pair.secondary.state / name).unlink()
    pair.secondary.start()
    status = pair.secondary.status()
    assert status["consistent"] is (name == "disk0.lost")
    assert status["disks"][0]["out-of-sync-bytes"] or pair.primary.status()["link"]["state"] == "in-sync"
    in_sync(pair.primary)
    pair.primary.checkpoint()
    assert pair.secondary.disks[0].read_bytes() == pair.primary.disks[0].read_bytes() == checkpoint
    assert pair.secondary.status()["consistent"] is True


def test_without_a_state_folder_a_demoted_node_knows_what_it_has_changed(lab: Lab) -> None:
    control = lab.folder / "control"
    disk = lab.folder / "disk"
    disk.write_bytes(OLD)
    images = [f"{kind}={lab.folder}/{kind}.qcow2" for kind in ("active", "hidden")]
    node = lab.start(
        Server(lab.folder, "b", ["mode=secondary", f"control={control}", f"disk={disk}", "top-id=top", *images])
    )
    with Qmp(control) as qmp:
        qmp.execute("xen-set-replication", enable=True, primary=False)
        qmp.execute("xen-set-replication", enable=False, primary=False, failover=True)
        node.wait_stage("done")
        guest = node.connect("top")
        guest.pwrite(NEW, 3 * GRAIN)
        guest.flush()
        content = whole(guest)
        guest.shutdown()
        qmp.execute("replication-demote")
        status = qmp.execute("query-replication")
    assert status["stage"] == "running"
    assert status["disks"][0]["marks"] == 1
    assert disk.read_bytes() == content
