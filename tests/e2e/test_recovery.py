# SPDX-License-Identifier: BSD-3-Clause
"""After the secondary's host was restarted without warning: the primary finds it again by itself and sends everything
anew, and the pair is whole with the next checkpoint. What the secondary says until then is in test_durability.py."""

from __future__ import annotations

import errno
from typing import Any

import nbd
import pytest

from content import KIB, MIB
from lab import Lab
from nodes import Pair, drained, in_sync, nbd_refusal
from qmp import QmpError
from waiting import wait_until

OLD, FIRST, SECOND, LATER = (bytes([byte]) * (4 * KIB) for byte in b"o12l")


class Broken:
    """A pair with a checkpoint (FIRST at 0) and a later write (SECOND there), whose secondary's host was restarted.

    The primary has found it again, and is held there until `resync`."""

    def __init__(self, lab: Lab, durability: str) -> None:
        arguments = [f"durability={durability}"]
        self.points = lab.pause_points()
        self.pair: Pair = lab.pair(
            [MIB],
            contents=[OLD * 256],
            secondary_arguments=arguments,
            primary_options={"extra_environment": self.points.environment},
        )
        self.pair.start_replication()
        self.primary, self.secondary = self.pair.primary, self.pair.secondary
        self.disk = self.primary.connect("disk0")
        self.disk.pwrite(FIRST, 0)
        self.primary.checkpoint()
        self.disk.pwrite(SECOND, 0)
        drained(self.primary)
        self.restart("restarted")

    def restart(self, boot: str) -> None:
        """The secondary's process again, in that boot of its host."""
        self.secondary.extra_environment["NBDKIT_REPLICATION_BOOT_ID"] = boot
        self.points.arm("link.dialled")
        self.secondary.kill()
        self.secondary.start()
        self.guest: nbd.NBD = self.secondary.connect("top0")
        self.points.wait_hit("link.dialled")

    def resync(self) -> None:
        """Nobody has to ask for it."""
        self.disk.pwrite(LATER, 8 * KIB)
        self.points.release("link.dialled")
        self.in_sync()

    def in_sync(self) -> None:
        """Wait until the secondary has everything."""
        in_sync(self.primary)
        drained(self.primary)

    def refused(self, command: str, **arguments: Any) -> str:
        with pytest.raises(QmpError) as refusal:
            self.secondary.execute(command, arguments)
        return refusal.value.desc

    def equal(self) -> bool:
        return self.primary.disks[0].read_bytes() == self.secondary.disks[0].read_bytes()


def test_a_secondary_that_lost_its_checkpoint_has_one_again_after_a_full_resync_and_a_checkpoint(lab: Lab) -> None:
    broken = Broken(lab, "process")
    status = broken.secondary.status()
    assert (status["consistent"], status["stage"]) == (False, "running")
    assert status["disks"][0]["out-of-sync-bytes"] == MIB
    assert "full resync" in broken.refused("xen-colo-do-checkpoint")
    assert "full resync" in broken.refused("replication-stop")
    broken.resync()
    # All is there, but nothing says yet which instant it is of.
    assert broken.secondary.status()["consistent"] is False
    assert broken.secondary.status()["error"] is None
    assert broken.secondary.execute("query-jobs") == []
    with nbd_refusal(errno.EIO):
        broken.guest.pread(512, 0)
    assert "force" in broken.refused("replication-stop", failover=True)
    broken.primary.checkpoint()
    status = broken.secondary.status()
    assert (status["consistent"], status["disks"][0]["hidden-bytes"]) == (True, 0)
    assert broken.equal()
    # And replication is what it was: the checkpoint is kept from what the primary writes now.
    broken.disk.pwrite(OLD, 0)
    drained(broken.primary)
    assert bytes(broken.guest.pread(4 * KIB, 0)) == SECOND
    broken.secondary.failover()
    assert broken.secondary.disks[0].read_bytes() == SECOND + OLD + LATER + OLD * 253


def test_a_resync_from_nothing_copies_nothing_before_it_writes(lab: Lab) -> None:
    broken = Broken(lab, "process")
    held = broken.secondary.status()["disks"][0]["hidden-bytes"]
    broken.resync()
    assert broken.secondary.status()["disks"][0]["hidden-bytes"] == held


def test_with_durability_power_the_checkpoint_stays_valid_during_the_resync(lab: Lab) -> None:
    broken = Broken(lab, "power")
    assert broken.secondary.status()["consistent"] is True
    assert "lacks" in broken.refused("xen-colo-do-checkpoint")
    broken.resync()
    assert broken.secondary.status()["error"] is None
    assert bytes(broken.guest.pread(4 * KIB, 0)) == FIRST
    broken.primary.checkpoint()
    assert bytes(broken.guest.pread(12 * KIB, 0)) == SECOND + OLD + LATER
    assert broken.equal()


def test_a_resync_from_nothing_that_is_cut_off_begins_again(lab: Lab) -> None:
    broken = Broken(lab, "process")
    broken.resync()
    broken.restart("restarted again")
    assert "full resync" in broken.refused("xen-colo-do-checkpoint")
    # A person may ask for it as well.
    broken.points.release("link.dialled")
    broken.primary.execute("replication-stop")
    broken.primary.execute("replication-start", secondary=broken.secondary.uri(), sync="full")
    broken.primary.checkpoint()
    assert bytes(broken.guest.pread(12 * KIB, 0)) == SECOND + OLD + LATER


def test_a_planned_stop_after_a_resync_from_nothing_needs_no_checkpoint(lab: Lab) -> None:
    broken = Broken(lab, "process")
    broken.resync()
    broken.primary.execute("replication-stop")
    broken.secondary.execute("replication-stop")
    assert bytes(broken.guest.pread(12 * KIB, 0)) == SECOND + OLD + LATER
    assert broken.secondary.status()["consistent"] is True


@pytest.mark.parametrize("resynced", [False, True], ids=["at-once", "after-the-resync"])
def test_a_forced_failover_takes_the_disk_as_it_is(lab: Lab, resynced: bool) -> None:
    broken = Broken(lab, "process")
    if resynced:
        broken.resync()
    content = broken.secondary.disks[0].read_bytes()
    broken.secondary.execute("replication-stop", failover=True, force=True)
    broken.secondary.wait_stage("done")
    assert broken.secondary.disks[0].read_bytes() == content
    assert bytes(broken.guest.pread(MIB, 0)) == content


def test_a_primary_whose_host_was_restarted_sends_everything_anew(lab: Lab) -> None:
    pair = lab.pair([MIB], contents=[OLD * 256])
    pair.start_replication()
    disk = pair.primary.connect("disk0")
    disk.pwrite(FIRST, 0)
    pair.primary.checkpoint()
    pair.primary.kill()
    # The power cut: what the disk had not flushed is gone, and the map does not know.
    pair.primary.disks[0].write_bytes(OLD * 256)
    pair.primary.extra_environment["NBDKIT_REPLICATION_BOOT_ID"] = "restarted"
    pair.primary.start()
    pair.primary.checkpoint()
    assert pair.secondary.disks[0].read_bytes() == OLD * 256


def test_a_primary_that_ended_in_good_order_sends_nothing_anew_after_a_restart_of_its_host(lab: Lab) -> None:
    pair = lab.pair([MIB], contents=[OLD * 256])
    pair.start_replication()
    pair.primary.connect("disk0").pwrite(FIRST, 0)
    pair.primary.checkpoint()
    pair.primary.terminate()
    pair.primary.extra_environment["NBDKIT_REPLICATION_BOOT_ID"] = "restarted"
    pair.primary.start()
    pair.primary.checkpoint()
    assert pair.primary.status()["disks"][0]["totals"]["forwarded"] == 0


def lost(lab: Lab) -> tuple[Pair, nbd.NBD]:
    """A pair whose secondary was killed, which the primary has noticed when its guest wrote; and the guest."""
    pair = lab.pair([MIB], contents=[OLD * 256])
    pair.start_replication()
    disk = pair.primary.connect("disk0")
    disk.pwrite(FIRST, 0)
    pair.primary.checkpoint()
    pair.secondary.kill()
    disk.pwrite(SECOND, 64 * KIB)
    wait_until(lambda: pair.primary.status()["error"], "the link counts as lost")
    return pair, disk


def test_a_lost_link_comes_back_by_itself_and_sends_only_what_is_missing(lab: Lab) -> None:
    pair, disk = lost(lab)
    disk.pwrite(LATER, 192 * KIB)
    before = pair.primary.status()["disks"][0]["totals"]["forwarded"]
    pair.secondary.start()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "the link is up again")
    # Until the next checkpoint the secondary's is as old as the loss.
    assert pair.primary.status()["error"]["case"] == 8
    pair.primary.checkpoint()
    status = pair.primary.status()
    assert (status["error"], status["disks"][0]["totals"]["forwarded"] - before) == (None, 128 * KIB)
    assert pair.primary.disks[0].read_bytes() == pair.secondary.disks[0].read_bytes()


def test_a_lost_link_is_taken_up_again_by_a_stop_and_a_start_that_send_only_what_is_missing(lab: Lab) -> None:
    pair, disk = lost(lab)
    pair.primary.execute("replication-stop")
    pair.secondary.start()
    disk.pwrite(LATER, 192 * KIB)
    before = pair.primary.status()["disks"][0]["totals"]["forwarded"]
    pair.primary.execute("replication-start", secondary=pair.secondary.uri())
    pair.primary.checkpoint()
    status = pair.primary.status()
    assert (status["error"], status["disks"][0]["totals"]["forwarded"] - before) == (None, 128 * KIB)
    assert pair.primary.disks[0].read_bytes() == pair.secondary.disks[0].read_bytes()
    pair.secondary.checkpoint()


def copied_before_the_start(lab: Lab) -> Pair:
    """The secondary has what its primary has, which has left in good order; itself it was never started."""
    pair = lab.pair([MIB], contents=[OLD * 256])
    pair.primary.start_replication()
    pair.primary.connect("disk0").pwrite(FIRST, 0)
    drained(pair.primary)
    pair.primary.execute("replication-stop")
    assert pair.secondary.disks[0].read_bytes() == FIRST + OLD * 255
    pair.secondary.extra_environment["NBDKIT_REPLICATION_BOOT_ID"] = "restarted"
    return pair


def test_what_was_written_before_the_start_does_not_outlive_a_power_cut_and_nobody_says_so(lab: Lab) -> None:
    pair = copied_before_the_start(lab)
    pair.secondary.kill()
    pair.secondary.disks[0].write_bytes(OLD * 256)
    pair.secondary.start()
    pair.secondary.start_replication()
    status = pair.secondary.status()
    assert (status["consistent"], status["disks"][0]["out-of-sync-bytes"]) == (False, MIB)
    with pytest.raises(QmpError, match="force"):
        pair.secondary.execute("replication-stop", failover=True)
    pair.primary.execute("replication-start", secondary=pair.secondary.uri())
    pair.primary.checkpoint()
    assert pair.secondary.disks[0].read_bytes() == FIRST + OLD * 255
    status = pair.secondary.status()
    assert (status["consistent"], status["disks"][0]["out-of-sync-bytes"], status["error"]) == (True, 0, None)


def test_what_was_written_before_the_start_outlives_a_restart_in_good_order(lab: Lab) -> None:
    pair = copied_before_the_start(lab)
    pair.secondary.terminate()
    pair.secondary.start()
    pair.secondary.start_replication()
    assert pair.secondary.status()["consistent"] is True
    pair.primary.execute("replication-start", secondary=pair.secondary.uri())
    pair.primary.checkpoint()
    assert pair.primary.status()["disks"][0]["totals"]["forwarded"] == len(FIRST)
    # The next end is not that one: a power cut after it costs everything.
    pair.primary.execute("replication-stop")
    pair.secondary.kill()
    pair.secondary.extra_environment["NBDKIT_REPLICATION_BOOT_ID"] = "restarted again"
    pair.secondary.start()
    assert pair.secondary.status()["consistent"] is False
