# SPDX-License-Identifier: BSD-3-Clause
"""The table of docs/failures.md, row by row: what fails, who learns of it, and who does not.

Disks fail behind an NBD endpoint (nbdkit's error filter, or its death), overlays on a small tmpfs that is filled up,
the link by SIGKILL and SIGSTOP of the secondary.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbd
import pytest

from content import KIB, MIB, changed, make_raw, pattern, whole
from endpoints import DelayedEndpoint
from lab import Lab
from mounts import SmallFolder
from nbdprocess import silent
from nodes import Pair, Primary, Secondary, Server, drained, in_sync, nbd_refusal, refused
from qmp import Qmp
from waiting import DEADLINE_S, wait_until

BLOCK = 4 * KIB
GRAIN = 64 * KIB
OLD = pattern(1, MIB)
NEW = pattern(2, BLOCK)
OWN = pattern(3, BLOCK)

IO_ERROR = "I/O error occurred"
CANCELLED = "Backup job was cancelled unexpectedly"
FAILOVER = {"enable": False, "primary": False, "failover": True}

MEMBERS = {
    "case",
    "disk",
    "operation",
    "offset",
    "length",
    "errno",
    "count",
    "first",
    "last",
    "desc",
}
"""What query-replication says of an error; more is allowed."""


class Watch:
    """Events of a server from now on."""

    def __init__(self, server: Server) -> None:
        self._qmp: Qmp = server.qmp()

    def cases(self) -> list[int]:
        """The cases of all REPLICATION_ERROR events up to now, each once."""
        self._qmp.execute("query-version")  # what was emitted before this answer has arrived before it
        told = [event["data"] for event in self._qmp.events if event["event"] == "REPLICATION_ERROR"]
        assert all(set(data) == MEMBERS for data in told)
        return sorted({data["case"] for data in told})

    def count(self, case: int) -> int:
        """How many REPLICATION_ERROR events of a case there were when `cases` was called last."""
        return sum(event["data"]["case"] == case for event in self._qmp.events if event["event"] == "REPLICATION_ERROR")

    def wait(self, name: str, **data: Any) -> dict[str, Any]:
        """Wait for an event with these data."""
        return self._qmp.wait_event(name, lambda found: data.items() <= found.items())

    def close(self) -> None:
        self._qmp.close()


def knows(server: Server, **members: Any) -> dict[str, Any]:
    """get-error fails, and query-replication names the cause with these members; the error."""
    assert refused(server, "replication-get-error") == IO_ERROR
    assert server.execute("query-xen-replication-status") == {"error": True, "desc": IO_ERROR}
    error: dict[str, Any] = server.status()["error"]
    assert set(error) >= MEMBERS
    assert members.items() <= error.items()
    assert error["desc"]
    assert 1e9 < error["first"] <= error["last"]
    assert error["count"] >= 1
    return error


def knows_nothing(server: Server) -> None:
    """get-error succeeds."""
    assert server.execute("replication-get-error") == {}
    assert server.status()["error"] is None


def learns(server: Server, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
    """Wait until a failure is latched; the error."""
    error: dict[str, Any] = wait_until(lambda: server.status()["error"], f"{server.name} learns of it", timeout_s)
    return error


def told_of_writes(watch: Watch) -> list[int]:
    """The cases but 6: within a second the primary also learns, once, that its secondary takes no checkpoint now."""
    cases = watch.cases()
    assert watch.count(6) <= 1
    return [case for case in cases if case != 6]


def out_of_sync(server: Server, index: int = 0) -> int:
    """Bytes of a disk of a primary that the secondary may lack."""
    size: int = server.status()["disks"][index]["out-of-sync-bytes"]
    return size


def failing_disk(lab: Lab, name: str, **error: str) -> tuple[Path, DelayedEndpoint]:
    """A disk with the content OLD behind an endpoint that fails as `error` says when it is told to."""
    path = make_raw(lab.folder / f"{name}.raw", MIB, OLD)
    return path, lab.endpoint(path=path, name=name, error=error)


class Setup:
    """A pair, either disk of which may be behind an endpoint; in `running`, with one checkpoint."""

    def __init__(
        self,
        lab: Lab,
        *,
        primary_disk: str | Path | None = None,
        secondary_disk: str | Path | None = None,
        secondary_arguments: Sequence[str] = (),
        primary_arguments: Sequence[str] = (),
        threads: int | None = None,
    ) -> None:
        disks = []
        for name, given in (("primary", primary_disk), ("secondary", secondary_disk)):
            disks.append(given or make_raw(lab.folder / f"{name}.raw", MIB, OLD))
        arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk=disk0:{disks[1]}", "top-id=top0"]
        self.secondary = lab.start(Server(lab.folder, "secondary", [*arguments, *secondary_arguments], threads=threads))
        arguments = ["mode=primary", f"state={lab.folder / 'p'}", f"disk=disk0:{disks[0]}"]
        arguments += [f"secondary={self.secondary.uri()}", *primary_arguments]
        self.primary = lab.start(Server(lab.folder, "primary", arguments))
        self.secondary.execute("xen-set-replication", enable=True, primary=False)
        self.primary.execute("xen-set-replication", enable=True, primary=True)
        self.disk = self.primary.connect("disk0")
        self.guest = self.secondary.connect("top0")
        self.at_primary, self.at_secondary = Watch(self.primary), Watch(self.secondary)

    def target(self) -> nbd.NBD:
        """The target face, for a test that writes there itself: the primary is stopped, since nobody else may write as
        long as it is connected."""
        self.primary.execute("replication-stop")
        return self.secondary.connect("disk0")


# -- case 1: primary disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fails", "request_", "number"),
    [
        ({"pwrite": "EIO"}, lambda disk: disk.pwrite(NEW, 0), errno.EIO),
        ({"pwrite": "ENOSPC"}, lambda disk: disk.pwrite(NEW, 0), errno.ENOSPC),
        ({"pread": "EIO"}, lambda disk: disk.pread(BLOCK, 0), errno.EIO),
        ({"zero": "EIO"}, lambda disk: disk.zero(BLOCK, 0, nbd.CMD_FLAG_NO_HOLE), errno.EIO),
    ],
    ids=["write", "write-no-space", "read", "zero"],
)
def test_case_1_a_failing_primary_disk_is_told_to_its_guest_and_to_nobody_else(
    lab: Lab, fails: dict[str, str], request_: Any, number: int
) -> None:
    path, endpoint = failing_disk(lab, "behind", **fails)
    setup = Setup(lab, primary_disk=endpoint.uri())
    endpoint.fail()
    with nbd_refusal(number):
        request_(setup.disk)
    endpoint.work()
    knows_nothing(setup.primary)
    knows_nothing(setup.secondary)
    assert setup.at_primary.cases() == [1]
    assert setup.at_secondary.cases() == []
    assert setup.primary.status()["stage"] == "running"
    # The same connection goes on, and so does replication of other blocks.
    setup.disk.pwrite(OWN, 512 * KIB)
    assert whole(setup.disk) == path.read_bytes() == changed(OLD, (512 * KIB, OWN))
    wait_until(
        lambda: (lab.folder / "secondary.raw").read_bytes()[512 * KIB :][:BLOCK] == OWN, "the write is forwarded"
    )


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_case_1_a_failed_local_write_leaves_the_block_marked_for_resync(lab: Lab, protocol: str) -> None:
    """Nobody calls that in sync. What the disk has there goes over by itself when it can be read, and the mark with it.
    With protocol=sync the secondary has the write that the guest was told had failed."""
    path, endpoint = failing_disk(lab, "behind", pwrite="EIO", pread="EIO")
    setup = Setup(lab, primary_disk=endpoint.uri(), primary_arguments=[f"protocol={protocol}"])
    in_sync(setup.primary)
    endpoint.fail()
    with nbd_refusal(errno.EIO):
        setup.disk.pwrite(NEW, GRAIN)
    assert out_of_sync(setup.primary) == GRAIN
    assert setup.primary.status()["link"]["state"] == "synchronizing"
    if protocol == "sync":
        there = (lab.folder / "secondary.raw").read_bytes
        wait_until(lambda: there() == changed(OLD, (GRAIN, NEW)), "the secondary has what the guest was refused")
    endpoint.work()
    in_sync(setup.primary)
    assert out_of_sync(setup.primary) == 0
    assert whole(setup.disk) == path.read_bytes() == (lab.folder / "secondary.raw").read_bytes() == OLD
    # That it could not be read was a case 1 until it was sent.
    wait_until(lambda: setup.primary.status()["error"] is None, "no error is left")
    knows_nothing(setup.secondary)


def test_case_1_a_primary_disk_whose_server_dies_comes_back_with_it(lab: Lab) -> None:
    path, endpoint = failing_disk(lab, "behind")
    setup = Setup(lab, primary_disk=endpoint.uri())
    endpoint.kill()
    for _ in range(3):
        with nbd_refusal(errno.EIO):
            setup.disk.pwrite(NEW, 0)
        with nbd_refusal(errno.EIO):
            setup.disk.pread(BLOCK, 0)
    # What the guest was told is not latched. That its former writes may be lost is, and that what was marked for that
    # cannot be read now, which is tried by itself.
    error = learns(setup.primary)
    assert (error["case"], error["disk"]) == (1, "disk0")
    assert error["operation"] in ("flush", "resync")
    endpoint.start()

    def written() -> bool:
        try:
            setup.disk.pwrite(NEW, 0)
        except nbd.Error:
            return False
        return True

    wait_until(written, "the disk is back")
    assert whole(setup.disk) == path.read_bytes() == changed(OLD, (0, NEW))
    wait_until(lambda: setup.primary.status()["error"] is None, "what it may have lost is sent")
    wait_until(lambda: not out_of_sync(setup.primary), "nothing is missing")
    assert setup.at_primary.cases() == [1]
    assert setup.at_secondary.cases() == []
    knows_nothing(setup.secondary)
    setup.primary.execute("replication-checkpoint")
    assert whole(setup.guest) == changed(OLD, (0, NEW))


# -- cases 2 and 4: the secondary disk ---------------------------------------------------------------------------


def test_case_4_a_failing_secondary_disk_fails_the_target_write_and_is_case_2_on_the_primary(lab: Lab) -> None:
    path, endpoint = failing_disk(lab, "behind", pwrite="EIO")
    setup = Setup(lab, secondary_disk=endpoint.uri())
    endpoint.fail()
    setup.disk.pwrite(NEW, 3 * GRAIN + BLOCK)  # the guest is not told
    error = learns(setup.primary)
    knows(setup.primary, case=2, disk="disk0", operation="write", offset=3 * GRAIN + BLOCK, length=BLOCK, errno="EIO")
    assert error["count"] == 1
    knows(setup.secondary, case=4, disk="disk0", operation="write", offset=3 * GRAIN + BLOCK, length=BLOCK, errno="EIO")
    assert told_of_writes(setup.at_primary) == [2]
    assert setup.at_secondary.cases() == [4]
    assert out_of_sync(setup.primary) == GRAIN
    # The secondary's guest notices nothing, and the last checkpoint is all there.
    assert whole(setup.guest) == path.read_bytes() == OLD
    assert whole(setup.disk) == changed(OLD, (3 * GRAIN + BLOCK, NEW))


def test_case_4_failures_are_counted_and_the_first_one_is_kept(lab: Lab) -> None:
    _, endpoint = failing_disk(lab, "behind", pwrite="ENOSPC")
    setup = Setup(lab, secondary_disk=endpoint.uri())
    target = setup.target()
    endpoint.fail()
    for offset in (5 * BLOCK, 0, 9 * BLOCK):
        with nbd_refusal(errno.ENOSPC):
            target.pwrite(NEW, offset)
    error = knows(setup.secondary, case=4, operation="write", offset=5 * BLOCK, length=BLOCK, errno="ENOSPC")
    assert error["count"] == 3
    assert error["first"] < error["last"]


def test_case_4_a_secondary_disk_that_cannot_be_read_fails_the_target_write_before_anything_is_overwritten(
    lab: Lab,
) -> None:
    path, endpoint = failing_disk(lab, "behind", pread="EIO")
    setup = Setup(lab, secondary_disk=endpoint.uri())
    target = setup.target()
    endpoint.fail()
    with nbd_refusal(errno.EIO):
        target.pwrite(NEW, 0)
    endpoint.work()
    knows(setup.secondary, case=4, operation="read", offset=0, length=BLOCK, errno="EIO")
    assert whole(setup.guest) == path.read_bytes() == OLD


def test_case_4_after_a_lost_write_no_checkpoint_is_taken_and_the_last_one_stays_valid(lab: Lab) -> None:
    path, endpoint = failing_disk(lab, "behind", pwrite="EIO")
    setup = Setup(lab, secondary_disk=endpoint.uri())
    setup.disk.pwrite(NEW, 0)
    setup.primary.execute("replication-checkpoint")
    setup.disk.pwrite(OWN, 0)
    endpoint.fail()
    setup.disk.pwrite(OWN, BLOCK)
    learns(setup.primary)
    assert "lacks" in refused(setup.secondary, "xen-colo-do-checkpoint")
    assert "resync" in refused(setup.primary, "replication-checkpoint")
    assert refused(setup.secondary, "replication-stop")
    assert setup.secondary.status()["stage"] == "running"
    assert whole(setup.guest) == changed(OLD, (0, NEW))
    endpoint.work()
    setup.secondary.execute("xen-set-replication", FAILOVER)
    setup.secondary.wait_stage("done")
    assert path.read_bytes() == changed(OLD, (0, NEW))


def test_case_4_when_the_secondary_disk_works_again_the_primary_sends_what_was_lost_and_all_goes_on(lab: Lab) -> None:
    path, endpoint = failing_disk(lab, "behind", pwrite="EIO")
    setup = Setup(lab, secondary_disk=endpoint.uri())
    endpoint.fail()
    setup.disk.pwrite(NEW, BLOCK)
    learns(setup.secondary)
    assert setup.secondary.status()["disks"][0]["out-of-sync-bytes"] == GRAIN
    endpoint.work()
    setup.disk.pwrite(OWN, GRAIN)  # arrives, so the disk is a mixture until the rest is repaired
    setup.primary.execute("replication-checkpoint")
    knows_nothing(setup.primary)
    knows_nothing(setup.secondary)
    content = changed(OLD, (BLOCK, NEW), (GRAIN, OWN))
    assert whole(setup.guest) == path.read_bytes() == content


def test_a_primary_sends_what_was_lost_by_itself(lab: Lab) -> None:
    path, endpoint = failing_disk(lab, "behind", pwrite="EIO")
    setup = Setup(lab, secondary_disk=endpoint.uri())
    endpoint.fail()
    setup.disk.pwrite(NEW, BLOCK)
    learns(setup.primary)
    endpoint.work()
    wait_until(lambda: not out_of_sync(setup.primary), "the primary has sent it again")
    wait_until(lambda: setup.secondary.status()["error"] is None, "the secondary knows that it has all")
    assert path.read_bytes() == changed(OLD, (BLOCK, NEW))


def test_case_4_a_secondary_disk_whose_server_dies_is_never_the_guests_problem_on_the_primary(lab: Lab) -> None:
    _, endpoint = failing_disk(lab, "behind")
    setup = Setup(lab, secondary_disk=endpoint.uri())
    endpoint.kill()
    for index in range(4):
        setup.disk.pwrite(NEW, index * GRAIN)
    learns(setup.primary)
    wait_until(lambda: setup.primary.status()["disks"][0]["forward-queue-bytes"] == 0, "all have been answered")
    assert told_of_writes(setup.at_primary) == [2]
    assert setup.at_secondary.cases() == [4]
    assert out_of_sync(setup.primary) == 4 * GRAIN
    # The secondary's guest cannot read what only the disk holds; it is told, and nobody else.
    with nbd_refusal(errno.EIO):
        setup.guest.pread(BLOCK, 512 * KIB)
    knows(setup.secondary, case=4)


# -- case 3: copy-before-write -----------------------------------------------------------------------------------


@pytest.fixture
def small(small_folder: Callable[[int], SmallFolder]) -> SmallFolder:
    """A file system of 4 MiB."""
    return small_folder(4 * MIB)


def test_case_3_a_full_hidden_disk_fails_the_target_write_and_the_old_content_is_not_lost(
    lab: Lab, small: SmallFolder
) -> None:
    setup = Setup(lab, secondary_arguments=[f"hidden={small.folder / 'hidden.qcow2'}"])
    setup.disk.pwrite(NEW, 0)
    drained(setup.primary)
    small.fill()
    setup.disk.pwrite(OWN, GRAIN)  # the guest is not told
    learns(setup.primary)
    knows(setup.primary, case=2, disk="disk0", operation="write", offset=GRAIN, length=BLOCK, errno="ENOSPC")
    knows(setup.secondary, case=3, disk="disk0", operation="write", offset=GRAIN, length=BLOCK, errno="ENOSPC")
    assert told_of_writes(setup.at_primary) == [2]
    assert setup.at_secondary.cases() == [3]
    assert whole(setup.guest) == OLD
    assert (lab.folder / "secondary.raw").read_bytes() == changed(OLD, (0, NEW))
    assert out_of_sync(setup.primary) == GRAIN
    job = setup.secondary.execute("query-jobs")[0]
    assert (job["id"], job["status"]) == ("backup-disk0", "concluded")
    assert "No space left" in job["error"]


def test_case_3_once_copy_before_write_has_failed_there_is_no_checkpoint_until_all_was_sent_again(
    lab: Lab, small: SmallFolder
) -> None:
    setup = Setup(lab, secondary_arguments=[f"hidden={small.folder / 'hidden.qcow2'}"])
    target = setup.target()
    target.pwrite(NEW, 0)
    small.fill()
    with nbd_refusal(errno.ENOSPC):
        target.pwrite(NEW, GRAIN)
    (job,) = setup.secondary.execute("query-jobs")
    assert (job["id"], job["status"]) == ("backup-disk0", "concluded")
    small.make_room()
    target.pwrite(OWN, 0)  # the others are taken, but the disk lacks one
    assert refused(setup.secondary, "xen-colo-do-checkpoint") == CANCELLED
    assert refused(setup.secondary, "replication-stop") == CANCELLED
    assert setup.secondary.status()["stage"] == "running"
    assert whole(setup.guest) == OLD
    knows(setup.secondary, case=3)
    setup.secondary.restart(signal.SIGKILL)  # what is lacking is not forgotten
    assert refused(setup.secondary, "xen-colo-do-checkpoint") == CANCELLED
    target = setup.secondary.connect("disk0")
    target.pwrite(NEW * (GRAIN // BLOCK), GRAIN)  # as the primary does it: the grain as a whole
    knows_nothing(setup.secondary)
    (job,) = setup.secondary.execute("query-jobs")
    assert (job["id"], job["status"]) == ("backup-disk0", "running")
    guest = setup.secondary.connect("top0")
    assert whole(guest) == OLD
    setup.secondary.execute("xen-colo-do-checkpoint")
    assert whole(guest) == whole(target) == changed(OLD, (0, OWN), (GRAIN, NEW * (GRAIN // BLOCK)))


def test_case_3_after_a_failed_copy_the_last_checkpoint_can_be_failed_over_to(lab: Lab, small: SmallFolder) -> None:
    setup = Setup(lab, secondary_arguments=[f"hidden={small.folder / 'hidden.qcow2'}"])
    target = setup.target()
    target.pwrite(NEW, 0)
    small.fill()
    with nbd_refusal(errno.ENOSPC):
        target.pwrite(NEW, GRAIN)
    setup.guest.pwrite(OWN, 2 * GRAIN)
    setup.secondary.execute("xen-set-replication", FAILOVER)
    setup.secondary.wait_stage("done")
    assert (lab.folder / "secondary.raw").read_bytes() == changed(OLD, (2 * GRAIN, OWN))


# -- case 5: active disk -----------------------------------------------------------------------------------------


def test_case_5_a_full_active_disk_is_told_to_the_secondarys_guest_and_to_nobody_else(
    lab: Lab, small: SmallFolder
) -> None:
    setup = Setup(lab, secondary_arguments=[f"active={small.folder / 'active.qcow2'}"])
    setup.guest.pwrite(NEW, 0)
    small.fill()
    for offset in (GRAIN, GRAIN + 100):
        with nbd_refusal(errno.ENOSPC):
            setup.guest.pwrite(OWN, offset)
    knows_nothing(setup.secondary)
    knows_nothing(setup.primary)
    assert setup.at_secondary.cases() == [5]
    assert setup.at_primary.cases() == []
    assert whole(setup.guest) == changed(OLD, (0, NEW))
    setup.guest.pwrite(OWN, 0)  # has its place already
    assert whole(setup.guest) == changed(OLD, (0, OWN))
    # The primary's side goes on, checkpoints included.
    setup.disk.pwrite(NEW, GRAIN)
    setup.primary.execute("replication-checkpoint")
    assert whole(setup.guest) == changed(OLD, (GRAIN, NEW))
    small.make_room()
    setup.guest.pwrite(OWN, GRAIN)
    assert whole(setup.guest) == changed(OLD, (GRAIN, OWN))


# -- case 6: emptying --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["active", "hidden"])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_case_6_overlays_that_cannot_be_emptied_fail_the_checkpoint_and_the_last_one_stays_valid(
    lab: Lab, kind: str, damage: str
) -> None:
    server: Secondary = lab.secondary((MIB, MIB), contents=(OLD, OLD))
    server.start_replication()
    guests = [server.connect(f"top{index}") for index in range(2)]
    targets = [server.connect(f"disk{index}") for index in range(2)]
    for target, guest in zip(targets, guests, strict=True):
        target.pwrite(NEW, 0)
        guest.pwrite(OWN, BLOCK)
    watch = Watch(server)
    path = server.overlay(kind, 1)
    length = path.stat().st_size
    if damage == "truncated":
        os.truncate(path, length - 5)
    else:
        path.unlink()
    desc = refused(server, "xen-colo-do-checkpoint")
    assert "disk1" in desc
    assert str(path) in desc
    assert damage in desc
    knows(server, case=6, disk="disk1", errno="EIO")
    assert watch.cases() == [6]
    # Neither disk was emptied.
    status = server.status()
    assert (status["stage"], status["epoch"]) == ("running", 1)
    assert [(disk["active-bytes"], disk["hidden-bytes"]) for disk in status["disks"]] == [(BLOCK, BLOCK)] * 2
    for guest in guests:
        assert whole(guest) == changed(OLD, (BLOCK, OWN))
    # And both faces still work.
    guests[1].pwrite(NEW, 2 * BLOCK)
    targets[1].pwrite(NEW, 3 * BLOCK)
    assert whole(guests[1]) == changed(OLD, (BLOCK, OWN), (2 * BLOCK, NEW))
    if damage == "truncated":
        os.truncate(path, length)
        server.checkpoint()
        assert whole(guests[1]) == server.disks[1].read_bytes() == changed(OLD, (0, NEW), (3 * BLOCK, NEW))


# -- case 7: commit ----------------------------------------------------------------------------------------------


def failed_commit(lab: Lab) -> tuple[Setup, Path, DelayedEndpoint]:
    """A secondary whose disk refused the commit, in failover-failed; the endpoint still fails writes."""
    path, endpoint = failing_disk(lab, "behind", pwrite="EIO")
    setup = Setup(lab, secondary_disk=endpoint.uri())
    setup.disk.pwrite(NEW, GRAIN)
    drained(setup.primary)
    setup.guest.pwrite(OWN, 0)
    endpoint.fail()
    setup.secondary.execute("xen-set-replication", FAILOVER)
    setup.secondary.wait_stage("failover-failed")
    return setup, path, endpoint


def test_case_7_a_failed_commit_is_failover_failed_with_an_event_and_the_guest_goes_on(lab: Lab) -> None:
    setup, path, endpoint = failed_commit(lab)
    setup.at_secondary.wait("REPLICATION_STAGE_CHANGE", mode="secondary", to="failover-failed", **{"from": "failover"})
    setup.at_secondary.wait("REPLICATION_ERROR", case=7, disk="disk0")
    wait_until(lambda: setup.secondary.status()["error"], "the error is latched")
    knows(setup.secondary, case=7, disk="disk0", operation="commit", offset=0, errno="EIO")
    job = setup.secondary.execute("query-jobs")[-1]
    assert (job["id"], job["type"], job["status"]) == ("commit-disk0", "commit", "concluded")
    assert job["error"]
    assert whole(setup.guest) == changed(OLD, (0, OWN))
    setup.guest.pwrite(NEW, 0)  # active holds it, so the disk is not asked
    with nbd_refusal(errno.EIO):
        setup.guest.pwrite(NEW, 512 * KIB)  # the disk is
    assert whole(setup.guest) == changed(OLD, (0, NEW))
    endpoint.work()
    setup.guest.pwrite(NEW, 512 * KIB)
    assert whole(setup.guest) == changed(OLD, (0, NEW), (512 * KIB, NEW))
    assert path.read_bytes() == changed(OLD, (GRAIN, NEW), (512 * KIB, NEW))


def test_case_7_a_failed_commit_can_be_retried_until_it_succeeds(lab: Lab) -> None:
    setup, path, endpoint = failed_commit(lab)
    setup.secondary.execute("replication-retry")  # fails again
    setup.secondary.wait_stage("failover-failed")
    knows(setup.secondary, case=7)
    with nbd_refusal(errno.EIO):
        setup.guest.pwrite(NEW, BLOCK)  # no overlay holds it, so it is for the disk
    endpoint.work()
    setup.guest.pwrite(NEW, BLOCK)
    setup.guest.pwrite(NEW, 2 * BLOCK)
    setup.secondary.execute("replication-retry")
    setup.secondary.wait_stage("done")
    wait_until(lambda: setup.secondary.status()["error"] is None, "the error goes with its cause")
    knows_nothing(setup.secondary)
    assert whole(setup.guest) == path.read_bytes() == changed(OLD, (0, OWN), (BLOCK, NEW), (2 * BLOCK, NEW))


def test_case_7_a_guest_write_that_the_disk_refuses_during_a_commit_does_not_fail(lab: Lab) -> None:
    points = lab.pause_points()
    path, endpoint = failing_disk(lab, "behind", pwrite="EIO")
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk=disk0:{endpoint.uri()}", "top-id=top0"]
    server = lab.start(Server(lab.folder, "secondary", arguments, extra_environment=points.environment))
    server.execute("xen-set-replication", enable=True, primary=False)
    guest = server.connect("top0")
    guest.pwrite(OWN, 0)
    points.arm("commit.hidden-forgotten")
    server.execute("xen-set-replication", FAILOVER)
    points.wait_hit("commit.hidden-forgotten")
    endpoint.fail()
    guest.pwrite(NEW, 512 * KIB)
    assert whole(guest) == changed(OLD, (0, OWN), (512 * KIB, NEW))
    points.release("commit.hidden-forgotten")
    server.wait_stage("failover-failed")
    endpoint.work()
    assert whole(guest) == changed(OLD, (0, OWN), (512 * KIB, NEW))
    assert path.read_bytes() == changed(OLD, (0, OWN))


# -- case 8: the link --------------------------------------------------------------------------------------------


def timed_writes(handle: nbd.NBD, offsets: Sequence[int], data: bytes = NEW) -> float:
    """Write at each offset; the seconds that the slowest took."""
    slowest_s = 0.0
    for offset in offsets:
        begun = time.monotonic()
        handle.pwrite(data, offset)
        slowest_s = max(slowest_s, time.monotonic() - begun)
    return slowest_s


ONE_THREAD = 1
"""For a secondary that wakes up with answers to several requests of a client that has gone: with more threads, nbdkit
1.32.5 may end at an assertion of its own (raw_send_socket, connections.c) when two of them find the socket broken."""

GONE = ("EIO", "ENOTCONN")
"""The connection for data or that for control may notice first that the secondary has gone, and each has its own errno
for it."""

TIMEOUT_S = 2.0
SLACK_S = 5.0
"""For a busy machine. Both together are below the 8 s and more that a guest would wait if the stall came twice, or
never ended."""


def test_case_8_a_killed_secondary_is_noticed_without_a_write_and_the_guest_never_fails(lab: Lab) -> None:
    setup = Setup(lab, primary_arguments=[f"timeout={TIMEOUT_S}"])
    setup.disk.pwrite(OWN, 0)
    setup.primary.execute("replication-checkpoint")
    assert setup.primary.status()["link"]["state"] == "in-sync"
    setup.secondary.kill()
    setup.at_primary.wait("REPLICATION_LINK", state="lost")
    setup.at_primary.wait("REPLICATION_ERROR", case=8, disk="disk0")
    error = knows(setup.primary, case=8, disk="disk0", operation="link", offset=0, length=0)
    assert error["errno"] in GONE
    assert setup.primary.status()["link"]["state"] == "lost"
    assert out_of_sync(setup.primary) == 0
    assert timed_writes(setup.disk, [0, BLOCK, 3 * GRAIN]) < SLACK_S
    setup.disk.zero(2 * GRAIN, 8 * GRAIN)
    assert out_of_sync(setup.primary) == 4 * GRAIN
    assert setup.primary.status()["stage"] == "running"
    assert "resync" in refused(setup.primary, "replication-checkpoint")
    expected = changed(OLD, (0, NEW), (BLOCK, NEW), (3 * GRAIN, NEW), (8 * GRAIN, bytes(2 * GRAIN)))
    assert whole(setup.disk) == (lab.folder / "primary.raw").read_bytes() == expected


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_case_8_a_silent_secondary_holds_up_the_guest_once_and_at_most_for_the_timeout(lab: Lab, protocol: str) -> None:
    setup = Setup(lab, primary_arguments=[f"timeout={TIMEOUT_S}", f"protocol={protocol}"], threads=ONE_THREAD)
    with silent(setup.secondary):
        begun = time.monotonic()
        slowest_s = timed_writes(setup.disk, range(0, 32 * BLOCK, BLOCK))
        if protocol == "async":
            assert time.monotonic() - begun < SLACK_S  # the guest does not wait for the link at all
        assert slowest_s < TIMEOUT_S + SLACK_S
        learns(setup.primary, TIMEOUT_S + 5)
        knows(setup.primary, case=8, disk="disk0", operation="link")
        setup.at_primary.wait("REPLICATION_LINK", state="lost")
        setup.at_primary.wait("REPLICATION_ERROR", case=8)
        assert out_of_sync(setup.primary) == 2 * GRAIN
        begun = time.monotonic()
        timed_writes(setup.disk, range(512 * KIB, 512 * KIB + 32 * BLOCK, BLOCK))
        assert time.monotonic() - begun < SLACK_S
        assert out_of_sync(setup.primary) == 4 * GRAIN
        assert setup.at_primary.cases() == []  # told once, and taken out above
    expected = changed(OLD, (0, NEW * 32), (512 * KIB, NEW * 32))
    assert whole(setup.disk) == expected


def test_case_8_a_full_queue_holds_up_the_guest_once_and_at_most_for_the_timeout(lab: Lab) -> None:
    size = 8 * MIB
    pair: Pair = lab.pair(
        (size,),
        primary_arguments=[f"timeout={TIMEOUT_S}", "queue-limit=1M"],
        secondary_options={"threads": ONE_THREAD},
    )
    pair.start_replication()
    disk = pair.primary.connect("disk0")
    data = pattern(9, 128 * KIB)
    with silent(pair.secondary):
        begun = time.monotonic()
        slowest_s = timed_writes(disk, range(0, size, len(data)), data)
        assert slowest_s < TIMEOUT_S + SLACK_S
        assert time.monotonic() - begun < TIMEOUT_S + SLACK_S + 1.0
        knows(pair.primary, case=8)
        assert pair.primary.status()["disks"][0]["forward-queue-bytes"] <= MIB
        wait_until(lambda: out_of_sync(pair.primary) == size, "all of it is marked")
    assert pair.primary.disks[0].read_bytes() == data * (size // len(data))


def test_case_8_a_secondary_that_wakes_up_late_is_sent_what_is_marked_and_the_next_checkpoint_ends_the_error(
    lab: Lab,
) -> None:
    setup = Setup(lab, primary_arguments=[f"timeout={TIMEOUT_S}"], threads=ONE_THREAD)
    with silent(setup.secondary):
        setup.disk.pwrite(NEW, 0)
        learns(setup.primary, TIMEOUT_S + 5)
        # What was sent before may still arrive; it is marked, since nobody has heard that it did.
        assert out_of_sync(setup.primary) == GRAIN
        before = setup.primary.status()["disks"][0]["totals"]["forwarded"]
    wait_until(lambda: setup.primary.status()["link"]["state"] == "in-sync", "the link comes back by itself")
    assert setup.primary.status()["disks"][0]["totals"]["forwarded"] == before + GRAIN
    assert (lab.folder / "secondary.raw").read_bytes() == changed(OLD, (0, NEW))
    knows(setup.primary, case=8)  # the secondary's checkpoint is as old as the loss
    knows_nothing(setup.secondary)
    assert whole(setup.guest) == OLD
    setup.primary.execute("replication-checkpoint")
    knows_nothing(setup.primary)
    assert whole(setup.guest) == changed(OLD, (0, NEW))


def test_case_8_a_link_that_breaks_while_something_is_sent_is_no_answer_of_the_secondary(lab: Lab) -> None:
    points = lab.pause_points()
    pair: Pair = lab.pair(contents=(OLD,), primary_options={"extra_environment": points.environment})
    pair.start_replication()
    watch = Watch(pair.primary)
    disk = pair.primary.connect("disk0")
    points.arm("forward.send")
    for offset in range(0, 4 * GRAIN, GRAIN):
        disk.pwrite(NEW, offset)
    points.wait_hit("forward.send")
    pair.secondary.kill()
    points.release("forward.send")
    watch.wait("REPLICATION_LINK", state="lost")
    assert knows(pair.primary, case=8, operation="link")["errno"] in GONE
    assert watch.cases() == [8]
    wait_until(lambda: pair.primary.status()["disks"][0]["forward-queue-bytes"] == 0, "the queue has been given up")
    assert out_of_sync(pair.primary) == 4 * GRAIN


def test_case_8_a_primary_without_a_disk_answers_its_guest_too(lab: Lab) -> None:
    secondary: Secondary = lab.secondary(contents=(OLD,), threads=ONE_THREAD)
    primary: Primary = lab.primary(secondary.uri("disk0"), (), extra_arguments=[f"timeout={TIMEOUT_S}"])
    secondary.start_replication()
    primary.start_replication()
    disk = primary.connect("disk0")
    with silent(secondary):
        assert timed_writes(disk, range(0, 32 * BLOCK, BLOCK)) < TIMEOUT_S + SLACK_S
        learns(primary, TIMEOUT_S + 5)
        knows(primary, case=8)
        assert out_of_sync(primary) == 2 * GRAIN


def test_a_secondary_that_is_slow_but_alive_is_not_lost(lab: Lab) -> None:
    path = make_raw(lab.folder / "slow.raw", MIB, OLD)
    endpoint = lab.endpoint(path=path, delay={"write": "250ms"})
    setup = Setup(lab, secondary_disk=endpoint.uri(), primary_arguments=[f"timeout={TIMEOUT_S}"])
    for seed in range(12):  # the same block, so each is sent when the one before has been answered: 3 s in all
        setup.disk.pwrite(pattern(20 + seed, BLOCK), 0)
    setup.primary.execute("replication-checkpoint")
    assert path.read_bytes() == changed(OLD, (0, pattern(31, BLOCK)))
    knows_nothing(setup.primary)
    assert setup.at_primary.cases() == []
    assert setup.primary.status()["link"]["state"] == "in-sync"
