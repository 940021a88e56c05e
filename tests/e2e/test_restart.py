# SPDX-License-Identifier: BSD-3-Clause
"""Close and kill: a process started again with the same state folder is in the stage it had, with every answered
write in place; and one that was killed in the midst of something ends it, or has never begun it.

Kills happen at pause points (replication/order/pause.py), so each test says between which two steps.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import nbd
import pytest

from content import KIB, MIB, changed, make_raw, pattern, qemu_img, whole
from endpoints import DelayedEndpoint
from lab import Lab
from nodes import Pair, Primary, Secondary, Server, drained, error_kept
from pausepoints import PausePoints
from qmp import QmpError
from waiting import wait_until

BLOCK = 4 * KIB
GRAIN = 64 * KIB
OLD = pattern(1, MIB)
NEW = pattern(2, BLOCK)
OWN = pattern(3, BLOCK)

IO_ERROR = "I/O error occurred"
FAILOVER = {"enable": False, "primary": False, "failover": True}

TERM_AND_KILL = pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])


def lasting(server: Server) -> dict[str, Any]:
    """The part of query-replication that a restart must not change."""
    status = server.status()
    for disk in status["disks"]:
        del disk["totals"]
    del status["checkpoint"]["age"]
    if status["stage"] == "none":
        del status["node"]  # nobody has been told of it yet
    return status


def held_at(points: PausePoints, server: Server, point: str, command: str, arguments: str = "{}") -> None:
    """Run a command until a thread is held at `point`, and leave it there."""
    points.arm(point)
    with server.qmp() as qmp:
        qmp.send(f'{{"execute": "{command}", "arguments": {arguments}}}\n'.encode())
        points.wait_hit(point)


def kill_held(points: PausePoints, server: Server, point: str) -> None:
    """Kill the process whose thread is held at `point`, and start it again with nothing armed."""
    assert points.is_hit(point)
    server.kill()
    points.disarm(point)
    server.start()


def check_images(server: Secondary) -> None:
    """qemu-img finds no fault in any overlay; the server has ended."""
    for index in range(len(server.disks)):
        for kind in ("active", "hidden"):
            qemu_img("check", "-q", "-f", "qcow2", server.overlay(kind, index))


@pytest.fixture
def points(lab: Lab) -> PausePoints:
    """Pause points of this test's processes."""
    return lab.pause_points()


@pytest.fixture
def secondary(lab: Lab, points: PausePoints) -> Secondary:
    """In stage none, with the content OLD."""
    server: Secondary = lab.secondary(contents=(OLD,), extra_environment=points.environment)
    return server


@pytest.fixture
def two(lab: Lab, points: PausePoints) -> Secondary:
    """Two disks in `running`, both with a target write at 0 and a guest write at BLOCK since the checkpoint."""
    server: Secondary = lab.secondary((MIB, MIB), contents=(OLD, OLD), extra_environment=points.environment)
    server.start_replication()
    for index in range(2):
        server.connect(f"disk{index}").pwrite(NEW, 0)
        server.connect(f"top{index}").pwrite(OWN, BLOCK)
    return server


@pytest.fixture
def pair(lab: Lab, points: PausePoints) -> Pair:
    """In `running`; the pause points are the primary's."""
    started: Pair = lab.pair(contents=(OLD,), primary_options={"extra_environment": points.environment})
    started.start_replication()
    return started


# -- secondary, stage by stage -----------------------------------------------------------------------------------


@TERM_AND_KILL
def test_a_secondary_in_none_is_in_none_again_with_the_first_copy_so_far(
    secondary: Secondary, how: signal.Signals
) -> None:
    secondary.connect("disk0").pwrite(NEW, 0)
    before = lasting(secondary)
    secondary.restart(how)
    assert lasting(secondary) == before
    assert whole(secondary.connect("disk0")) == changed(OLD, (0, NEW))
    secondary.start_replication()
    assert whole(secondary.connect("top0")) == changed(OLD, (0, NEW))


@TERM_AND_KILL
def test_a_running_secondary_goes_on_as_running_with_every_answered_write(
    secondary: Secondary, how: signal.Signals
) -> None:
    secondary.start_replication()
    guest, target = secondary.connect("top0"), secondary.connect("disk0")
    target.pwrite(NEW, 0)
    secondary.checkpoint()
    below = guest_sees = changed(OLD, (0, NEW))
    for seed in range(8):
        data, offset = pattern(50 + seed, 3000), seed * 24 * KIB + 1234
        target.pwrite(data, offset)
        below = changed(below, (offset, data))
        guest.pwrite(data, offset + 9000)
        guest_sees = changed(guest_sees, (offset + 9000, data))
    guest.zero(2 * BLOCK, 600 * KIB)
    guest_sees = changed(guest_sees, (600 * KIB, bytes(2 * BLOCK)))
    target.trim(2 * BLOCK, 700 * KIB)
    below = changed(below, (700 * KIB, bytes(2 * BLOCK)))
    before = lasting(secondary)
    for _ in range(2):
        secondary.restart(how)
        assert lasting(secondary) == before
        assert whole(secondary.connect("top0")) == guest_sees
        assert whole(secondary.connect("disk0")) == secondary.disks[0].read_bytes() == below
    assert [job["id"] for job in secondary.execute("query-jobs")] == ["backup-disk0"]
    # Copy-before-write goes on where it was: what hidden holds is not copied again.
    secondary.connect("disk0").pwrite(OWN, 0)
    secondary.connect("disk0").pwrite(OWN, 900 * KIB)
    assert whole(secondary.connect("top0")) == guest_sees
    secondary.checkpoint()
    assert whole(secondary.connect("top0")) == changed(below, (0, OWN), (900 * KIB, OWN))
    assert secondary.status()["epoch"] == before["epoch"] + 1
    secondary.terminate()
    check_images(secondary)


@TERM_AND_KILL
def test_a_cancelled_backup_job_stays_cancelled(secondary: Secondary, how: signal.Signals) -> None:
    secondary.start_replication()
    secondary.execute("job-cancel", id="backup-disk0")
    secondary.restart(how)
    with pytest.raises(QmpError, match="Backup job was cancelled unexpectedly"):
        secondary.checkpoint()
    with pytest.raises(nbd.Error):
        secondary.connect("disk0").pwrite(NEW, 0)
    assert secondary.disks[0].read_bytes() == OLD


@TERM_AND_KILL
@pytest.mark.parametrize("failover", [False, True], ids=["planned", "failover"])
def test_a_secondary_that_is_done_stays_done(secondary: Secondary, how: signal.Signals, failover: bool) -> None:
    secondary.start_replication()
    secondary.connect("disk0").pwrite(NEW, 0)
    secondary.execute("xen-set-replication", enable=False, primary=False, failover=failover)
    secondary.wait_stage("done")
    guest = secondary.connect("top0")
    guest.pwrite(OWN, BLOCK)
    expected = changed(OLD, (BLOCK, OWN)) if failover else changed(OLD, (0, NEW), (BLOCK, OWN))
    before = lasting(secondary)
    secondary.restart(how)
    assert lasting(secondary) == before
    assert whole(secondary.connect("top0")) == secondary.disks[0].read_bytes() == expected
    with pytest.raises(nbd.Error, match="ESHUTDOWN"):
        secondary.connect("disk0").pwrite(NEW, 0)
    secondary.execute("xen-set-replication", enable=True, primary=False)
    assert secondary.status()["stage"] == "done"


@TERM_AND_KILL
def test_a_failed_commit_stays_failed_with_its_error_and_what_the_overlays_hold(lab: Lab, how: signal.Signals) -> None:
    path = make_raw(lab.folder / "disk.raw", MIB, OLD)
    endpoint: DelayedEndpoint = lab.endpoint(path=path, error={"pwrite": "EIO"})
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk=disk0:{endpoint.uri()}", "top-id=top0"]
    server = lab.start(Server(lab.folder, "failing", arguments))
    server.execute("xen-set-replication", enable=True, primary=False)
    server.connect("disk0").pwrite(NEW, GRAIN)
    server.connect("top0").pwrite(OWN, 0)
    endpoint.fail()
    server.execute("xen-set-replication", FAILOVER)
    server.wait_stage("failover-failed")
    wait_until(lambda: server.status()["error"], "the error is latched")
    wait_until(lambda: error_kept(lab.folder / "s"), "it is kept")
    endpoint.work()
    server.connect("top0").pwrite(OWN, 2 * GRAIN)
    before = lasting(server)
    server.restart(how)
    assert lasting(server) == before
    assert before["error"]["case"] == 7
    assert whole(server.connect("top0")) == changed(OLD, (0, OWN), (2 * GRAIN, OWN))
    server.connect("top0").pwrite(NEW, 0)
    assert path.read_bytes() == changed(OLD, (GRAIN, NEW), (2 * GRAIN, OWN))


# -- killed inside a command -------------------------------------------------------------------------------------

CHECKPOINT_POINTS = ["first disk's begin", "between the images of a disk", "between the disks", "after the last disk"]


def hold_checkpoint(points: PausePoints, server: Server, where: str, command: str) -> str:
    """Hold a command that empties the overlays of two disks `where`; the point's name."""
    if where == "between the disks":
        point = "checkpoint.begun"
        points.arm(point)
        with server.qmp() as qmp:
            qmp.send(f'{{"execute": "{command}"}}\n'.encode())
            points.wait_hit(point)
            points.arm(point)  # for the second disk
            points.release(point)
            points.wait_hit(point)
        return point
    point = {
        "first disk's begin": "checkpoint.begun",
        "between the images of a disk": "checkpoint.active-emptied",
        "after the last disk": "checkpoint.emptied",
    }[where]
    held_at(points, server, point, command)
    return point


@pytest.mark.parametrize("where", CHECKPOINT_POINTS)
def test_killed_inside_a_checkpoint_all_overlays_are_emptied_or_none(
    points: PausePoints, two: Secondary, where: str
) -> None:
    point = hold_checkpoint(points, two, where, "xen-colo-do-checkpoint")
    kill_held(points, two, point)
    status = two.status()
    assert status["stage"] == "running"
    # The checkpoint had begun, so it is finished before anything is served.
    assert status["epoch"] == 2
    assert [(disk["active-bytes"], disk["hidden-bytes"]) for disk in status["disks"]] == [(0, 0)] * 2
    for index in range(2):
        assert whole(two.connect(f"top{index}")) == two.disks[index].read_bytes() == changed(OLD, (0, NEW))
    two.checkpoint()
    assert two.status()["epoch"] == 3


@pytest.mark.parametrize("where", ["before the overlays", *CHECKPOINT_POINTS])
def test_killed_inside_a_planned_stop_the_disks_hold_what_the_primary_wrote_and_the_guest_uses_them(
    points: PausePoints, two: Secondary, where: str
) -> None:
    if where == "before the overlays":
        point = "stop.entered"
        held_at(points, two, point, "replication-stop")
    else:
        point = hold_checkpoint(points, two, where, "replication-stop")
    kill_held(points, two, point)
    status = two.status()
    assert (status["stage"], status["error"]) == ("done", None)
    assert [(disk["active-bytes"], disk["hidden-bytes"]) for disk in status["disks"]] == [(0, 0)] * 2
    for index in range(2):
        guest = two.connect(f"top{index}")
        assert whole(guest) == two.disks[index].read_bytes() == changed(OLD, (0, NEW))
        guest.pwrite(OWN, 0)
        assert two.disks[index].read_bytes() == changed(OLD, (0, OWN))
    two.execute("replication-stop")


@pytest.mark.parametrize(
    "point", ["checkpoint.begun", "checkpoint.active-emptied", "checkpoint.emptied", "start.emptied"]
)
def test_killed_inside_a_start_the_stage_is_none_and_start_works(
    points: PausePoints, secondary: Secondary, point: str
) -> None:
    held_at(points, secondary, point, "xen-set-replication", '{"enable": true, "primary": false}')
    kill_held(points, secondary, point)
    assert secondary.status()["stage"] == "none"
    assert secondary.execute("query-jobs") == []
    secondary.connect("disk0").pwrite(NEW, 0)
    assert secondary.disks[0].read_bytes() == changed(OLD, (0, NEW))
    secondary.start_replication()
    secondary.connect("disk0").pwrite(OWN, 0)
    assert whole(secondary.connect("top0")) == changed(OLD, (0, NEW))


COMMIT_POINTS = ["failover.entered", "commit.written", "commit.hidden-forgotten"]


@pytest.mark.parametrize("point", COMMIT_POINTS)
def test_killed_inside_a_commit_it_goes_on_by_itself_to_the_last_checkpoint_and_the_guests_writes(
    lab: Lab, points: PausePoints, two: Secondary, point: str
) -> None:
    guest, target = two.connect("top0"), two.connect("disk0")
    for offset in range(0, MIB, 192 * KIB):
        target.pwrite(NEW, offset)  # hidden keeps the old blocks
    guest.pwrite(OWN, 192 * KIB)  # active over hidden
    expected = changed(OLD, (BLOCK, OWN), (192 * KIB, OWN))
    held_at(points, two, point, "xen-set-replication", '{"enable": false, "primary": false, "failover": true}')
    assert two.status()["stage"] == "failover"
    if point == "failover.entered":
        guest.pwrite(NEW, BLOCK)  # over its own write
        guest.pwrite(NEW, 900 * KIB)  # where no overlay holds anything
        expected = changed(expected, (BLOCK, NEW), (900 * KIB, NEW))
    kill_held(points, two, point)
    assert two.wait_stage("done", "failover-failed")["stage"] == "done"
    assert two.disks[0].read_bytes() == whole(two.connect("top0")) == expected
    assert two.disks[1].read_bytes() == whole(two.connect("top1")) == changed(OLD, (BLOCK, OWN))
    assert two.status()["error"] is None
    two.terminate()
    check_images(two)


@pytest.mark.parametrize("point", COMMIT_POINTS[1:])
def test_killed_twice_inside_a_commit_it_still_ends_right(points: PausePoints, two: Secondary, point: str) -> None:
    guest = two.connect("top0")
    for offset in range(0, MIB, 160 * KIB):
        guest.pwrite(OWN, offset)
    expected = whole(guest)
    held_at(points, two, point, "xen-set-replication", '{"enable": false, "primary": false, "failover": true}')
    two.kill()
    points.disarm(point)
    points.arm(point)
    two.start()
    points.wait_hit(point)
    two.connect("top0").pwrite(NEW, MIB - BLOCK)
    expected = changed(expected, (MIB - BLOCK, NEW))
    kill_held(points, two, point)
    two.wait_stage("done")
    assert two.disks[0].read_bytes() == expected


def test_ended_by_sigterm_inside_a_commit_it_goes_on_after_the_restart(points: PausePoints, two: Secondary) -> None:
    held_at(
        points, two, "commit.written", "xen-set-replication", '{"enable": false, "primary": false, "failover": true}'
    )
    two.disconnect()
    os.kill(two.pid, signal.SIGTERM)
    points.release("commit.written")
    two.terminate()
    two.start()
    two.wait_stage("done")
    assert [disk.read_bytes() for disk in two.disks] == [changed(OLD, (BLOCK, OWN))] * 2
    assert two.status()["error"] is None


# -- killed inside a request -------------------------------------------------------------------------------------


def unanswered(handle: nbd.NBD, data: bytes, offset: int) -> None:
    """Send a write whose answer will never come. Written out before it is returned, so nobody has to wait for it."""
    buffer = nbd.Buffer.from_bytearray(bytearray(data))
    handle.aio_pwrite(buffer, offset)


@pytest.mark.parametrize(
    ("point", "arrived"),
    [
        ("copy-before-write.read", False),
        ("copy-before-write.before-mark", False),
        ("target-write.preserved", False),
        ("target-write.written", True),
    ],
)
def test_killed_inside_a_target_write_the_guest_face_still_shows_the_last_checkpoint(
    points: PausePoints, secondary: Secondary, point: str, arrived: bool
) -> None:
    secondary.start_replication()
    secondary.connect("disk0").pwrite(NEW, GRAIN)
    target = secondary.connect("disk0")
    points.arm(point)
    unanswered(target, NEW[:1000], 300)
    points.wait_hit(point)
    kill_held(points, secondary, point)
    below = changed(OLD, (GRAIN, NEW))
    assert secondary.disks[0].read_bytes() == (changed(below, (300, NEW[:1000])) if arrived else below)
    assert whole(secondary.connect("top0")) == OLD
    # The primary sends it again; that must not be copied as if it were the checkpoint's.
    secondary.connect("disk0").pwrite(NEW[:1000], 300)
    assert whole(secondary.connect("top0")) == OLD
    secondary.failover()
    assert secondary.disks[0].read_bytes() == OLD


@pytest.mark.parametrize("point", ["guest-write.completed", "guest-write.before-mark"])
def test_killed_inside_a_guest_write_the_block_is_as_before(
    points: PausePoints, secondary: Secondary, point: str
) -> None:
    secondary.start_replication()
    guest = secondary.connect("top0")
    guest.pwrite(OWN, GRAIN)
    points.arm(point)
    unanswered(guest, NEW[:1000], 300)
    points.wait_hit(point)
    kill_held(points, secondary, point)
    assert whole(secondary.connect("top0")) == changed(OLD, (GRAIN, OWN))
    secondary.failover()
    assert secondary.disks[0].read_bytes() == changed(OLD, (GRAIN, OWN))


# -- primary -----------------------------------------------------------------------------------------------------


def out_of_sync(primary: Server) -> int:
    """Bytes of the first disk that the secondary may lack."""
    size: int = primary.status()["disks"][0]["out-of-sync-bytes"]
    return size


def wait_identical(primary: Primary, secondary: Secondary) -> None:
    """Without any command, the primary sends what the secondary lacks."""
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the link is up, and nothing is out of sync")
    drained(primary)
    assert secondary.disks[0].read_bytes() == primary.disks[0].read_bytes()


@TERM_AND_KILL
def test_a_primary_in_none_remembers_what_changed(lab: Lab, how: signal.Signals) -> None:
    pair: Pair = lab.pair(contents=(OLD,))
    pair.primary.connect("disk0").pwrite(NEW, 0)
    pair.primary.connect("disk0").pwrite(NEW, 5 * GRAIN)
    before = lasting(pair.primary)
    pair.primary.restart(how)
    assert lasting(pair.primary) == before
    assert out_of_sync(pair.primary) == 2 * GRAIN
    assert pair.primary.disks[0].read_bytes() == changed(OLD, (0, NEW), (5 * GRAIN, NEW))


@TERM_AND_KILL
def test_a_running_primary_goes_on_forwarding(pair: Pair, how: signal.Signals) -> None:
    pair.primary.connect("disk0").pwrite(NEW, 0)
    pair.primary.restart(how)
    assert pair.primary.status()["stage"] == "running"
    disk = pair.primary.connect("disk0")
    disk.pwrite(OWN, GRAIN)
    assert whole(disk) == changed(OLD, (0, NEW), (GRAIN, OWN))
    wait_identical(pair.primary, pair.secondary)
    assert pair.primary.execute("replication-get-error") == {}
    assert pair.primary.status()["link"]["state"] == "in-sync"
    assert whole(pair.secondary.connect("top0")) == OLD


@TERM_AND_KILL
def test_a_primary_that_is_done_stays_done_and_remembers_what_changed(pair: Pair, how: signal.Signals) -> None:
    pair.primary.execute("replication-stop")
    pair.primary.connect("disk0").pwrite(NEW, GRAIN)
    before = lasting(pair.primary)
    pair.primary.restart(how)
    assert lasting(pair.primary) == before
    assert out_of_sync(pair.primary) == GRAIN
    pair.primary.connect("disk0").pwrite(OWN, 3 * GRAIN)
    assert out_of_sync(pair.primary) == 2 * GRAIN
    assert pair.secondary.disks[0].read_bytes() == OLD


def test_a_primary_killed_with_a_full_queue_sends_it_after_the_restart(points: PausePoints, pair: Pair) -> None:
    disk = pair.primary.connect("disk0")
    disk.pwrite(OWN, 3 * GRAIN)
    pair.primary.checkpoint()
    checkpoint = changed(OLD, (3 * GRAIN, OWN))
    points.arm("forward.send")
    expected = checkpoint
    for seed in range(20):
        data, offset = pattern(70 + seed, 5000), seed * 40 * KIB + 77
        disk.pwrite(data, offset)
        expected = changed(expected, (offset, data))
    disk.zero(3 * BLOCK, 800 * KIB)
    expected = changed(expected, (800 * KIB, bytes(3 * BLOCK)))
    points.wait_hit("forward.send")
    assert pair.primary.status()["disks"][0]["forward-queue-bytes"] >= 20 * 5000
    assert pair.secondary.disks[0].read_bytes() == checkpoint
    kill_held(points, pair.primary, "forward.send")
    wait_identical(pair.primary, pair.secondary)
    assert pair.secondary.disks[0].read_bytes() == expected
    # All the while the last checkpoint was valid.
    assert whole(pair.secondary.connect("top0")) == checkpoint


def test_a_primary_ended_by_sigterm_with_a_full_queue_sends_it_before_it_ends(points: PausePoints, pair: Pair) -> None:
    disk = pair.primary.connect("disk0")
    points.arm("forward.send")
    for seed in range(20):
        disk.pwrite(pattern(70 + seed, 5000), seed * 40 * KIB)
    points.wait_hit("forward.send")
    pair.primary.disconnect()
    os.kill(pair.primary.pid, signal.SIGTERM)
    points.release("forward.send")
    pair.primary.terminate()
    assert pair.secondary.disks[0].read_bytes() == pair.primary.disks[0].read_bytes() != OLD
    pair.primary.start()
    assert out_of_sync(pair.primary) == 0


@pytest.mark.parametrize(("point", "written"), [("primary-write.marked", False), ("primary-write.written", True)])
def test_a_primary_killed_inside_a_write_ends_with_identical_disks(
    points: PausePoints, pair: Pair, point: str, written: bool
) -> None:
    disk = pair.primary.connect("disk0")
    points.arm(point)
    unanswered(disk, NEW, GRAIN)
    points.wait_hit(point)
    kill_held(points, pair.primary, point)
    assert pair.primary.disks[0].read_bytes() == (changed(OLD, (GRAIN, NEW)) if written else OLD)
    wait_identical(pair.primary, pair.secondary)


def test_writes_made_while_the_resend_runs_are_not_overwritten_by_it(points: PausePoints, pair: Pair) -> None:
    disk = pair.primary.connect("disk0")
    points.arm("forward.send")
    for offset in range(0, MIB, GRAIN):
        disk.pwrite(NEW, offset)
    points.wait_hit("forward.send")
    pair.primary.kill()
    points.disarm("forward.send")
    points.arm("forward.send")
    pair.primary.start()
    points.wait_hit("forward.send")  # the first of what is sent again is held; its content has been read
    again = pair.primary.connect("disk0")
    again.pwrite(OWN, 0)
    again.pwrite(OWN, MIB - BLOCK)
    points.release("forward.send")
    wait_identical(pair.primary, pair.secondary)
    blocks = [(offset, NEW) for offset in range(0, MIB, GRAIN)]
    assert pair.secondary.disks[0].read_bytes() == changed(OLD, *blocks, (0, OWN), (MIB - BLOCK, OWN))


def test_a_pair_whose_secondary_was_killed_is_identical_after_both_were_started_again(pair: Pair) -> None:
    disk = pair.primary.connect("disk0")
    disk.pwrite(OWN, 0)
    pair.primary.checkpoint()
    pair.secondary.kill()
    disk.pwrite(NEW, 0)
    disk.pwrite(NEW, 7 * GRAIN)
    wait_until(lambda: pair.primary.status()["error"], "the primary learns of it")
    pair.secondary.start()
    pair.primary.restart()
    wait_identical(pair.primary, pair.secondary)
    assert whole(pair.secondary.connect("top0")) == changed(OLD, (0, OWN))
    pair.primary.checkpoint()
    assert pair.primary.execute("replication-get-error") == {}  # the loss of the link ends with a checkpoint
    assert whole(pair.secondary.connect("top0")) == changed(OLD, (0, NEW), (7 * GRAIN, NEW))


def test_a_primary_started_before_its_secondary_is_there_serves_its_guest_and_says_so(lab: Lab) -> None:
    pair: Pair = lab.pair(contents=(OLD,), primary_arguments=["timeout=1"])
    pair.start_replication()
    pair.primary.terminate()
    pair.secondary.terminate()
    pair.primary.start()
    disk = pair.primary.connect("disk0")
    disk.pwrite(NEW, 0)
    assert whole(disk) == changed(OLD, (0, NEW))
    error = wait_until(lambda: pair.primary.status()["error"], "the primary learns of it")
    assert error["case"] == 8
    assert pair.primary.status()["stage"] == "running"
    assert out_of_sync(pair.primary) == GRAIN
    pair.secondary.start()
    pair.primary.restart()
    wait_identical(pair.primary, pair.secondary)


# -- latched errors ----------------------------------------------------------------------------------------------


@TERM_AND_KILL
def test_a_latched_error_survives_a_restart_on_both_sides(lab: Lab, how: signal.Signals) -> None:
    path = make_raw(lab.folder / "behind.raw", MIB, OLD)
    endpoint: DelayedEndpoint = lab.endpoint(path=path, error={"pwrite": "EIO"})
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk=disk0:{endpoint.uri()}", "top-id=top0"]
    secondary = lab.start(Server(lab.folder, "secondary", arguments))
    primary: Primary = lab.primary(secondary.uri(), contents=(OLD,))
    secondary.execute("xen-set-replication", enable=True, primary=False)
    primary.start_replication()
    endpoint.fail()
    primary.connect("disk0").pwrite(NEW, GRAIN)
    wait_until(lambda: primary.status()["error"], "the primary learns of it")
    for folder in (primary.state, lab.folder / "s"):
        wait_until(lambda folder=folder: error_kept(folder), f"it is kept in {folder}")  # type: ignore[misc]
    before = {server.name: server.status()["error"] for server in (primary, secondary)}
    primary.kill() if how is signal.SIGKILL else primary.terminate()  # so that it does not see the secondary end
    secondary.restart(how)
    primary.start()
    for server in (primary, secondary):
        with pytest.raises(QmpError, match=IO_ERROR):
            server.execute("replication-get-error")
        error = server.status()["error"]
        for member in ("case", "disk", "operation", "offset", "length", "errno", "desc", "first"):
            assert error[member] == before[server.name][member]
    with pytest.raises(QmpError, match="lacks"):
        secondary.execute("xen-colo-do-checkpoint")


# -- the state folder --------------------------------------------------------------------------------------------


def test_a_state_folder_in_use_is_refused(lab: Lab, secondary: Secondary) -> None:
    _, said = lab.failed_start(secondary.arguments)
    assert f"the state folder {secondary.state} is in use by another process" in said
    assert secondary.status()["stage"] == "none"


def test_a_state_folder_of_the_other_mode_is_refused(lab: Lab, secondary: Secondary) -> None:
    secondary.start_replication()
    secondary.terminate()
    arguments = ["mode=primary", f"state={secondary.state}", f"disk={secondary.disks[0]}"]
    _, said = lab.failed_start([*arguments, "secondary=nbd://localhost"])
    assert f"the state folder {secondary.state} belongs to a secondary" in said
    secondary.start()
    assert secondary.status()["stage"] == "running"


def test_a_state_folder_of_other_disks_is_refused_on_either_side(lab: Lab, pair: Pair) -> None:
    pair.primary.terminate()
    pair.secondary.terminate()
    other = make_raw(lab.folder / "other.raw", MIB // 2)
    arguments = ["mode=primary", f"state={pair.primary.state}", f"secondary={pair.secondary.uri()}"]
    _, said = lab.failed_start([*arguments, f"disk={other}"])
    assert f"is of the disks 'disk0' of {MIB} bytes, but these are 'disk0' of {MIB // 2} bytes" in said
    arguments = ["mode=secondary", f"state={pair.secondary.state}"]
    _, said = lab.failed_start([*arguments, f"disk=another:{pair.secondary.disks[0]}", "top-id=top0"])
    assert str(pair.secondary.state) in said
    _, said = lab.failed_start([*arguments, f"disk={other}", "top-id=top0"])
    assert str(pair.secondary.state) in said or "length" in said or "size" in said
    pair.secondary.start()
    pair.primary.start()
    wait_identical(pair.primary, pair.secondary)


def test_a_disk_added_to_or_taken_from_a_state_folder_is_refused_on_either_side(lab: Lab) -> None:
    pair: Pair = lab.pair((MIB, MIB), contents=(OLD, OLD))
    pair.start_replication()
    pair.primary.terminate()
    pair.secondary.terminate()
    for server in (pair.secondary, pair.primary):
        fewer = [argument for argument in server.arguments if "disk1" not in argument and argument != "top-id=top1"]
        _, said = lab.failed_start(fewer)
        assert str(server.state) in said, server.name
        third = make_raw(lab.folder / f"{server.name}-third.raw", MIB)
        more = [*server.arguments, f"disk=third:{third}"]
        _, said = lab.failed_start([*more, "top-id=top3"] if server is pair.secondary else more)
        assert str(server.state) in said, server.name


def test_a_running_secondary_whose_overlay_is_gone_is_refused_and_nothing_is_made_anew(secondary: Secondary) -> None:
    secondary.start_replication()
    secondary.connect("disk0").pwrite(NEW, 0)
    hidden = secondary.overlay("hidden")
    secondary.terminate()
    moved = hidden.with_suffix(".away")
    hidden.rename(moved)
    _, said = Server.failed_start(secondary.folder, secondary.arguments)
    assert f"{hidden} of disk 'disk0' is gone, and with it the last checkpoint" in said
    assert not hidden.exists()
    moved.rename(hidden)
    secondary.start()
    assert whole(secondary.connect("top0")) == OLD


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 9}', '{"format": 1, "mode": "x", "stage": "none"}'])
def test_a_state_file_that_cannot_be_understood_is_refused_and_left_alone(
    lab: Lab, secondary: Secondary, content: str
) -> None:
    secondary.start_replication()
    secondary.terminate()
    path = secondary.state / "state.json"
    good = path.read_text()
    path.write_text(content)
    _, said = lab.failed_start(secondary.arguments)
    assert f"{path} is not a state file of this program" in said
    assert path.read_text() == content
    path.write_text(good)
    secondary.start()
    assert secondary.status()["stage"] == "running"


# -- several disks -----------------------------------------------------------------------------------------------


def test_a_primary_of_two_disks_does_not_start_when_the_secondary_has_only_one(lab: Lab) -> None:
    secondary: Secondary = lab.secondary((MIB,), contents=(OLD,))
    primary: Primary = lab.primary(secondary.uri(), (MIB, MIB), contents=(OLD, OLD))
    secondary.start_replication()
    with pytest.raises(QmpError, match=r"cannot start: .*disk1"):
        primary.start_replication()
    status = primary.status()
    assert (status["stage"], status["link"]["state"]) == ("none", "disconnected")
    primary.connect("disk0").pwrite(NEW, 0)
    assert secondary.disks[0].read_bytes() == OLD


@TERM_AND_KILL
def test_two_disks_fail_over_together(two: Secondary, how: signal.Signals) -> None:
    two.restart(how)
    two.failover()
    for index in range(2):
        expected = changed(OLD, (BLOCK, OWN))
        assert two.disks[index].read_bytes() == whole(two.connect(f"top{index}")) == expected


def test_a_barrier_covers_all_disks(lab: Lab) -> None:
    pair: Pair = lab.pair((MIB, 300 * KIB + 77), contents=(OLD, OLD[: 300 * KIB]))
    pair.start_replication()
    for index in range(2):
        pair.primary.connect(f"disk{index}").pwrite(NEW, 300 * KIB + 77 - BLOCK)
    pair.primary.checkpoint()
    for primary_disk, secondary_disk in zip(pair.primary.disks, pair.secondary.disks, strict=True):
        assert primary_disk.read_bytes() == secondary_disk.read_bytes()
        assert NEW in primary_disk.read_bytes()


# -- autostart and config ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["secondary", "primary"])
def test_autostart_on_both_sides_works_in_either_order(lab: Lab, first: str) -> None:
    secondary = Secondary(lab.folder, contents=(OLD,), extra_arguments=["autostart=true"])
    primary = Primary(lab.folder, secondary.uri(), contents=(OLD,), extra_arguments=["autostart=true", "timeout=1"])
    order: list[Server] = [secondary, primary] if first == "secondary" else [primary, secondary]
    for server in order:
        lab.start(server)
    for server in order:
        server.wait_stage("running")
    primary.connect("disk0").pwrite(NEW, 0)
    drained(primary)
    assert secondary.disks[0].read_bytes() == changed(OLD, (0, NEW))
    assert whole(secondary.connect("top0")) == OLD
    for server in order:
        server.restart(signal.SIGKILL)
        assert server.status()["stage"] == "running"


def test_autostart_needs_no_state_folder_and_no_control_socket(lab: Lab) -> None:
    disk = make_raw(lab.folder / "disk.raw", MIB, OLD)
    arguments = ["mode=secondary", f"disk={disk}", "top-id=top0", "autostart=true"]
    overlays = [f"active={lab.folder / 'active.qcow2'}", f"hidden={lab.folder / 'hidden.qcow2'}"]
    server = lab.start(Server(lab.folder, "bare", [*arguments, *overlays]))
    server.connect("disk0").pwrite(NEW, 0)
    assert whole(server.connect("top0")) == OLD
    assert disk.read_bytes() == changed(OLD, (0, NEW))


def test_autostart_does_not_start_again_what_was_stopped(secondary: Secondary) -> None:
    secondary.start_replication()
    secondary.execute("replication-stop")
    secondary.terminate()
    secondary.arguments.append("autostart=true")
    secondary.start()
    assert secondary.status()["stage"] == "done"


def write_config(path: Path, top: dict[str, str], disks: dict[str, dict[str, str]]) -> Path:
    """A TOML file of strings."""
    lines = [f'{key} = "{value}"' for key, value in top.items()]
    for name, table in disks.items():
        lines += [f"[disk.{name}]", *(f'{key} = "{value}"' for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_pair_of_two_disks_from_config_files(lab: Lab) -> None:
    names = ("root", "data")
    raws = {side: [make_raw(lab.folder / f"{side}-{name}.raw", MIB, OLD) for name in names] for side in ("p", "s")}
    tables: dict[str, dict[str, dict[str, str]]] = {"p": {}, "s": {}}
    for index, name in enumerate(names):
        tables["p"][name] = {"disk": str(raws["p"][index])}
        tables["s"][name] = {"disk": str(raws["s"][index]), "top-id": f"guest-{name}"}
        tables["s"][name] |= {kind: str(lab.folder / f"{name}.{kind}.qcow2") for kind in ("active", "hidden")}

    def start(name: str, config: Path) -> Server:
        server = Server(lab.folder, name, [f"config={config}", f"control={lab.folder / name}.control"])
        return lab.start(server)

    top = {"mode": "secondary", "state": str(lab.folder / "s.state")}
    secondary = start("s", write_config(lab.folder / "s.toml", top, tables["s"]))
    top = {"mode": "primary", "state": str(lab.folder / "p.state"), "secondary": secondary.uri(), "timeout": "2"}
    primary = start("p", write_config(lab.folder / "p.toml", top, tables["p"]))
    secondary.execute("xen-set-replication", enable=True, primary=False)
    primary.execute("xen-set-replication", enable=True, primary=True)
    for index, name in enumerate(names):
        primary.connect(name).pwrite(NEW, index * BLOCK)
    drained(primary)
    for index, name in enumerate(names):
        assert raws["s"][index].read_bytes() == raws["p"][index].read_bytes() == changed(OLD, (index * BLOCK, NEW))
        assert whole(secondary.connect(f"guest-{name}")) == OLD
        assert (lab.folder / f"{name}.hidden.qcow2").exists()
    assert [disk["name"] for disk in secondary.status()["disks"]] == list(names)
    secondary.restart(signal.SIGKILL)
    assert whole(secondary.connect("guest-data")) == OLD
