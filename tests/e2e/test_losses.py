# SPDX-License-Identifier: BSD-3-Clause
"""A server below that dies with what was not flushed: whoever promised that content says so, and it comes again.

The server has a cache that a flush writes to the file and that is gone when the server is killed.
"""

from __future__ import annotations

import errno
from pathlib import Path

import nbd
import pytest

from lab import KIB, MIB, DelayedEndpoint, Lab, Server, make_raw, nbd_refusal, pattern, silent, wait_until
from nodes import in_sync

OLD = pattern(1, MIB)
NEW = pattern(2, 64 * KIB)
OWN = pattern(3, 64 * KIB)
LATER = pattern(4, 64 * KIB)


def cached(lab: Lab, name: str) -> DelayedEndpoint:
    """Serves the file `name` behind a cache that dies with the server."""
    path = make_raw(lab.folder / f"{name}.raw", MIB, OLD)
    return lab.endpoint(path=path, name=name, filters=["cache"], filter_arguments=["cache=writeback"])


class Bench:
    """A pair of which one side's disk is behind the server `below`, in sync and with a first checkpoint."""

    def __init__(self, lab: Lab, side: str, *secondary: str) -> None:
        self.below = cached(lab, "below")
        other = str(make_raw(lab.folder / "other.raw", MIB, OLD))
        disks = (self.below.uri(), other) if side == "primary" else (other, self.below.uri())
        arguments = ["mode=secondary", f"state={lab.folder}/s2", f"disk={disks[1]}", "top-id=top0", *secondary]
        self.points = lab.pause_points()
        self.secondary = lab.start(
            Server(lab.folder, "secondary", arguments, extra_environment=self.points.environment)
        )
        uri = self.secondary.uri()
        arguments = ["mode=primary", f"state={lab.folder}/s1", f"disk={disks[0]}", f"secondary={uri}"]
        self.primary = lab.start(Server(lab.folder, "primary", arguments))
        self.secondary.execute("xen-set-replication", enable=True, primary=False)
        self.primary.execute("xen-set-replication", enable=True, primary=True)
        self.in_sync()

    def in_sync(self) -> None:
        in_sync(self.primary)

    def flushed(self, lab: Lab) -> None:
        """Wait until the secondary knows that its disk was flushed: a moment after the file has the content."""
        account = lab.folder / "s2" / "disk0.unflushed"
        wait_until(lambda: not any(account.read_bytes()[:16]), "the secondary's disk was flushed")

    def lose(self) -> None:
        """The server is killed, and there again with what was flushed."""
        self.below.kill()
        self.below.start()


def read(handle: nbd.NBD, length: int = 64 * KIB, offset: int = 0) -> bytes:
    return bytes(handle.pread(length, offset))


def wait_stage(server: Server, stage: str) -> None:
    wait_until(lambda: server.status()["stage"] == stage, f"the stage is {stage}")


def consistent(server: Server) -> bool:
    return bool(server.status()["consistent"])


def test_a_checkpoint_of_which_something_is_lost_is_not_valid_at_once_and_comes_again_by_itself(lab: Lab) -> None:
    """Nobody asks for anything meanwhile: neither guest nor primary nor operator."""
    bench = Bench(lab, "secondary")
    bench.primary.connect("disk0").pwrite(NEW, 0)
    bench.points.arm("look.flush")
    bench.primary.execute("replication-checkpoint")
    bench.points.wait_hit("look.flush")
    guest = bench.secondary.connect("top0")
    assert read(guest) == NEW
    with silent(bench.primary):  # or it would send it again before we look
        bench.lose()
        bench.points.release("look.flush")
        status = wait_until(
            lambda: (found := bench.secondary.status()) and not found["consistent"] and found, "it knows what it lost"
        )
        assert status["error"] is None or status["error"]["case"] == 4
        preflight = bench.secondary.execute("query-failover")
        assert (preflight["allowed"], preflight["force"]) == (False, True)
        with nbd_refusal(errno.EIO):
            read(guest)
    wait_until(lambda: bench.secondary.status()["disks"][0]["out-of-sync-bytes"] == 0, "the primary sends it again")
    bench.in_sync()
    bench.primary.execute("replication-checkpoint")
    assert consistent(bench.secondary)
    assert bench.secondary.status()["error"] is None
    assert read(guest) == NEW


def test_a_checkpoint_is_flushed_soon_so_that_it_has_nothing_to_lose(lab: Lab) -> None:
    bench = Bench(lab, "secondary")
    bench.primary.connect("disk0").pwrite(NEW, 0)
    bench.primary.execute("replication-checkpoint")
    bench.flushed(lab)
    assert (lab.folder / "below.raw").read_bytes()[: len(NEW)] == NEW
    bench.primary.connect("disk0").pwrite(LATER, 0)
    bench.primary.execute("replication-checkpoint")
    bench.flushed(lab)
    assert (lab.folder / "below.raw").read_bytes()[: len(NEW)] == LATER
    bench.lose()
    guest = bench.secondary.connect("top0")
    wait_until(lambda: _readable(guest), "it is connected again")
    assert consistent(bench.secondary)
    assert read(guest) == LATER


def _readable(handle: nbd.NBD) -> bool:
    try:
        handle.pread(1, 512 * KIB)
    except nbd.Error:
        return False
    return True


def test_what_is_lost_of_writes_after_the_checkpoint_leaves_it_valid(lab: Lab) -> None:
    bench = Bench(lab, "secondary")
    bench.primary.connect("disk0").pwrite(NEW, 0)
    bench.primary.execute("replication-checkpoint")
    bench.flushed(lab)
    bench.primary.connect("disk0").pwrite(LATER, 0)
    target = bench.secondary.connect("disk0")
    wait_until(lambda: _readable(target) and read(target) == LATER, "it is on the secondary")
    bench.lose()
    wait_until(lambda: _readable(target) and read(target) == LATER, "the primary sends it again")
    assert consistent(bench.secondary)
    assert read(bench.secondary.connect("top0")) == NEW
    bench.in_sync()
    bench.primary.execute("replication-checkpoint")
    assert read(bench.secondary.connect("top0")) == LATER


@pytest.mark.parametrize("exposed", [False, True], ids=["after the checkpoint", "of the checkpoint"])
def test_both_killed_together_is_a_loss_too(lab: Lab, exposed: bool) -> None:
    bench = Bench(lab, "secondary")
    bench.points.arm("look.flush")
    bench.primary.connect("disk0").pwrite(NEW, 0)
    if exposed:
        bench.primary.execute("replication-checkpoint")
    target = bench.secondary.connect("disk0")
    wait_until(lambda: _readable(target) and read(target) == NEW, "it is on the secondary")
    with silent(bench.primary):  # or it would send it again before we look
        bench.secondary.kill()
        bench.points.disarm("look.flush")
        bench.lose()
        bench.secondary.start()
        assert consistent(bench.secondary) != exposed
    target = bench.secondary.connect("disk0")
    wait_until(lambda: _readable(target) and read(target) == NEW, "the primary sends it again")
    bench.in_sync()
    bench.primary.execute("replication-checkpoint")
    assert consistent(bench.secondary)
    assert read(bench.secondary.connect("top0")) == NEW


@pytest.mark.parametrize("together", [False, True], ids=["server", "both"])
def test_what_the_primary_s_own_disk_has_lost_the_guest_is_told_and_the_two_are_equal_again(
    lab: Lab, together: bool
) -> None:
    bench = Bench(lab, "primary")
    guest = bench.primary.connect("disk0")
    guest.pwrite(NEW, 0)
    bench.primary.execute("replication-checkpoint")
    if together:
        bench.primary.kill()
    bench.lose()
    if together:
        bench.primary.start()
        guest = bench.primary.connect("disk0")
    target = bench.secondary.connect("disk0")
    wait_until(
        lambda: _readable(target) and read(target) == OLD[: len(NEW)], "the secondary has what the primary's disk has"
    )
    assert read(guest) == OLD[: len(NEW)]
    with nbd_refusal(errno.EIO):
        guest.flush()
    guest.flush()
    bench.in_sync()
    bench.primary.execute("replication-checkpoint")
    assert bench.primary.status()["error"] is None
    assert read(bench.secondary.connect("top0")) == OLD[: len(NEW)]


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_server_that_dies_during_a_commit_gets_all_of_it_again_with_a_retry(lab: Lab, durability: str) -> None:
    bench = Bench(lab, "secondary", f"durability={durability}")
    bench.primary.connect("disk0").pwrite(NEW, 0)
    bench.primary.execute("replication-checkpoint")
    guest = bench.secondary.connect("top0")
    guest.pwrite(OWN, 256 * KIB)
    guest.flush()
    bench.flushed(lab)
    bench.primary.kill()
    bench.points.arm("commit.written")
    bench.secondary.execute("replication-stop", failover=True)
    bench.points.wait_hit("commit.written")
    bench.lose()
    bench.points.release("commit.written")
    wait_stage(bench.secondary, "failover-failed")
    assert bench.secondary.status()["consistent"]
    wait_until(lambda: _readable(guest), "the server is connected again, which is tried once a second")
    guest.pwrite(LATER, 512 * KIB)
    bench.secondary.execute("replication-retry")
    wait_stage(bench.secondary, "done")
    content = (lab.folder / "below.raw").read_bytes()
    assert content[: len(NEW)] == NEW
    assert content[256 * KIB : 320 * KIB] == OWN
    assert content[512 * KIB : 576 * KIB] == LATER


def test_a_commit_does_not_fail_because_the_server_was_not_there_a_moment_ago(lab: Lab) -> None:
    """Whoever uses the disk connects to a lost server once a second: it was down at the last try, and is up now."""
    bench = Bench(lab, "secondary")
    bench.primary.connect("disk0").pwrite(NEW, 0)
    bench.primary.execute("replication-checkpoint")
    guest = bench.secondary.connect("top0")
    guest.pwrite(OWN, 256 * KIB)
    bench.flushed(lab)
    bench.primary.kill()
    bench.below.kill()
    wait_until(lambda: not _readable(guest), "the server's end was noticed")
    assert not _readable(guest)  # the try after that is the one that has failed
    bench.below.start()
    bench.secondary.execute("replication-stop", failover=True)
    assert bench.secondary.wait_stage("done", "failover-failed")["stage"] == "done"
    content = (lab.folder / "below.raw").read_bytes()
    assert (content[: len(NEW)], content[256 * KIB :][: len(OWN)]) == (NEW, OWN)


def test_a_failover_whose_checkpoint_is_lost_before_the_commit_has_ended_is_not_done(lab: Lab) -> None:
    bench = Bench(lab, "secondary")
    bench.points.arm("look.flush")
    bench.primary.connect("disk0").pwrite(NEW, 0)
    bench.primary.execute("replication-checkpoint")
    bench.points.wait_hit("look.flush")
    bench.secondary.connect("top0").pwrite(OWN, 256 * KIB)
    bench.primary.kill()
    bench.points.arm("commit.written")
    bench.secondary.execute("replication-stop", failover=True)
    bench.points.wait_hit("commit.written")
    bench.lose()
    bench.points.release("commit.written")
    bench.points.release("look.flush")
    wait_stage(bench.secondary, "failover-failed")
    assert not bench.secondary.status()["consistent"]


def test_the_account_of_what_is_unflushed_is_a_file_of_a_byte_a_grain(lab: Lab) -> None:
    bench = Bench(lab, "secondary")
    guest = bench.primary.connect("disk0")
    guest.pwrite(NEW, 128 * KIB)
    bench.primary.execute("replication-checkpoint")
    account = Path(lab.folder / "s1" / "disk0.unflushed")
    assert [number for number, byte in enumerate(account.read_bytes()[:16]) if byte] == [2]
    guest.flush()
    assert not any(account.read_bytes()[:16])
