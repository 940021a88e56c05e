# SPDX-License-Identifier: BSD-3-Clause
"""Commands through the control socket: start, checkpoint, get-error and stop, in every stage, with QEMU's texts.

Which check comes first, where several would refuse a start, is QEMU's order too (replication_start in its
block/replication.c).
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from content import KIB, MIB, make_raw, pattern, qemu_img
from lab import Lab
from nodes import Pair, Secondary, Server, nbd_refusal, refused
from qmp import QmpError
from waiting import wait_until

BLOCK = 4 * KIB
OLD = pattern(1, MIB)
NEW = pattern(2, BLOCK)
OWN = pattern(3, BLOCK)

NOT_RUNNING = "Block replication is not running"
RUNNING_OR_DONE = "Block replication is running or done"
CANCELLED = "Backup job was cancelled unexpectedly"
IO_ERROR = "I/O error occurred"
NO_ACTIVE_BACKING = "Active disk doesn't have backing file"
NO_HIDDEN_BACKING = "Hidden disk doesn't have backing file"
NO_BACKEND = "The secondary disk doesn't have block backend"
LENGTHS = "Active disk, hidden disk, secondary disk's length are not the same"
MAKE_EMPTY = "Active disk or hidden disk doesn't support make_empty"
NO_TOP = "No top_bs or it is invalid"

START_SECONDARY = {"enable": True, "primary": False}
START_PRIMARY = {"enable": True, "primary": True}
STOP = {"enable": False, "primary": False}
FAILOVER = {"enable": False, "primary": False, "failover": True}


def standing(server: Server) -> dict[str, Any]:
    """The status, without what changes by itself."""
    status = server.status()
    del status["checkpoint"]["age"]
    return status


def ignored(server: Server, command: str, arguments: dict[str, Any] | None = None) -> None:
    """`command` is accepted and changes nothing."""
    before = standing(server)
    server.execute(command, arguments)
    assert standing(server) == before


# -- start: images -----------------------------------------------------------------------------------------------


class Images:
    """A secondary's disk and overlays that a test spoils before the secondary opens or starts them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder / "images"
        self.folder.mkdir()
        self.disk = self.folder / "disk.raw"
        self.disk.write_bytes(OLD)
        self.active = self.folder / "active.qcow2"
        self.hidden = self.folder / "hidden.qcow2"
        self.location = str(self.disk)
        self.top_id = "top0"
        self.endpoint: Any = None
        self.unwritable: list[Path] = []

    def behind_endpoint(self) -> None:
        """Serve the disk over NBD, so that it can go away."""
        self.endpoint = self.lab.endpoint(path=self.disk)
        self.location = self.endpoint.uri()

    def make(self, path: Path, size: int = MIB, backing: bool = True) -> None:
        """An overlay in the layout that is asked for, made by stock qemu-img."""
        data = path.with_suffix(".data")
        options = f"extended_l2=on,cluster_size=128k,preallocation=metadata,data_file={data}"
        base, kind = (self.location, "raw") if path == self.hidden else (str(self.hidden), "qcow2")
        names = ("-u", "-b", base, "-F", kind) if backing else ()
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, *names, path, str(size))

    def make_both(self) -> None:
        """Both overlays, as they have to be."""
        self.make(self.hidden)
        self.make(self.active)

    def server(self) -> Server:
        """A secondary with these images, started."""
        arguments = ["mode=secondary", f"control={self.folder / 'control'}", f"disk=disk0:{self.location}"]
        arguments += [f"top-id={self.top_id}", f"active={self.active}", f"hidden={self.hidden}"]
        return self.lab.start(Server(self.lab.folder, "spoilt", arguments))


@pytest.fixture
def images(lab: Lab) -> Iterator[Images]:
    """Undoes what keeps root from writing."""
    made = Images(lab)
    yield made
    for path in made.unwritable:
        subprocess.run(["chattr", "-i", path], check=True, timeout=10)


def make_unwritable(images: Images, path: Path) -> None:
    """Nobody can open `path` for writing any more, not even root."""
    done = subprocess.run(["chattr", "+i", path], check=False, timeout=10, capture_output=True)
    if done.returncode:
        pytest.skip("chattr +i needs root and a file system that knows it")
    images.unwritable.append(path)


def no_active_backing(images: Images) -> None:
    images.active.unlink(missing_ok=True)
    images.make(images.active, backing=False)


def no_hidden_backing(images: Images) -> None:
    images.hidden.unlink(missing_ok=True)
    images.make(images.hidden, backing=False)


def active_of_other_size(images: Images) -> None:
    images.active.unlink(missing_ok=True)
    images.make(images.active, 2 * MIB)


def hidden_of_other_size(images: Images) -> None:
    images.hidden.unlink(missing_ok=True)
    images.make(images.hidden, MIB - 512)


def active_unwritable(images: Images) -> None:
    make_unwritable(images, images.active)


def hidden_unwritable(images: Images) -> None:
    make_unwritable(images, images.hidden)


def top_is_the_disk_itself(images: Images) -> None:
    images.top_id = "disk0"


def gone(_: Images) -> None:
    """The secondary disk goes away between the server's start and replication's: see refused_start."""


def refused_start(images: Images, *faults: Any) -> tuple[Server, str]:
    """Spoil, serve, start: the server and why it refused."""
    if gone in faults:
        images.behind_endpoint()
    images.make_both()
    for fault in faults:
        fault(images)
    server = images.server()
    if gone in faults:
        images.endpoint.kill()
    return server, refused(server, "xen-set-replication", START_SECONDARY)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (no_active_backing, NO_ACTIVE_BACKING),
        (no_hidden_backing, NO_HIDDEN_BACKING),
        (gone, NO_BACKEND),
        (active_of_other_size, LENGTHS),
        (hidden_of_other_size, LENGTHS),
        (active_unwritable, MAKE_EMPTY),
        (hidden_unwritable, MAKE_EMPTY),
        (top_is_the_disk_itself, NO_TOP),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_start_refuses_unusable_images_with_qemus_text(images: Images, fault: Any, text: str) -> None:
    server, desc = refused_start(images, fault)
    assert desc == text
    assert refused(server, "replication-start", {"mode": "secondary"}) == text


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ((no_hidden_backing, no_active_backing), NO_ACTIVE_BACKING),
        ((gone, no_hidden_backing), NO_HIDDEN_BACKING),
        ((gone, active_of_other_size), NO_BACKEND),
        ((gone, active_unwritable), NO_BACKEND),
        ((active_of_other_size, hidden_unwritable), LENGTHS),
        ((hidden_of_other_size, active_unwritable), LENGTHS),
        ((no_active_backing, hidden_unwritable), NO_ACTIVE_BACKING),
        ((active_unwritable, top_is_the_disk_itself), MAKE_EMPTY),
        ((active_of_other_size, top_is_the_disk_itself), LENGTHS),
    ],
    ids=lambda value: "-and-".join(one.__name__ for one in value) if isinstance(value, tuple) else "",
)
def test_of_several_things_that_are_wrong_start_names_the_one_qemu_names(
    images: Images, faults: tuple[Any, ...], text: str
) -> None:
    assert refused_start(images, *faults)[1] == text


def test_the_wrong_mode_is_named_before_anything_about_images(images: Images) -> None:
    images.make_both()
    no_active_backing(images)
    server = images.server()
    desc = refused(server, "xen-set-replication", START_PRIMARY)
    assert desc == "The parameter mode's value is invalid, needs secondary, but got primary"


def test_a_refused_start_leaves_both_faces_as_before_start(images: Images) -> None:
    server, _ = refused_start(images, active_of_other_size)
    target = server.connect("disk0")
    target.pwrite(NEW, 0)
    assert images.disk.read_bytes() == NEW + OLD[BLOCK:]
    with nbd_refusal(errno.EIO):
        server.connect("top0").pread(BLOCK, 0)
    assert server.execute("query-jobs") == []
    assert server.status()["epoch"] == 0


def test_start_works_once_the_secondary_disk_is_back(images: Images) -> None:
    server, _ = refused_start(images, gone)
    images.endpoint.start()

    def started() -> bool:
        try:
            server.execute("xen-set-replication", START_SECONDARY)
        except QmpError as error:
            if error.desc != NO_BACKEND:
                raise
            return False
        return True

    # Not at once: the plugin connects anew at most once a second.
    wait_until(started, "start finds the secondary disk again")
    assert bytes(server.connect("top0").pread(BLOCK, 0)) == OLD[:BLOCK]


def test_of_two_disks_one_that_is_unusable_keeps_both_from_starting(lab: Lab) -> None:
    folder = lab.folder / "images"
    folder.mkdir()
    disks = [make_raw(folder / f"disk{index}.raw", MIB, OLD) for index in range(2)]
    data = folder / "disk1.data"
    options = f"extended_l2=on,cluster_size=128k,preallocation=metadata,data_file={data}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, folder / "disk1-active.qcow2", str(MIB))
    arguments = ["mode=secondary", f"state={folder / 'state'}"]
    for index, disk in enumerate(disks):
        arguments += [f"disk=disk{index}:{disk}", f"top-id=top{index}"]
        arguments += [f"active={folder}/disk{index}-active.qcow2"]
    server = lab.start(Server(lab.folder, "two", arguments))
    assert refused(server, "xen-set-replication", START_SECONDARY) == NO_ACTIVE_BACKING
    assert server.execute("query-jobs") == []
    for index in range(2):
        with nbd_refusal(errno.EIO):
            server.connect(f"top{index}").pread(BLOCK, 0)


def test_an_image_in_another_layout_is_refused_before_serving_with_the_command_that_makes_it(lab: Lab) -> None:
    disk = make_raw(lab.folder / "disk.raw", MIB)
    active = lab.folder / "active.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", active, str(MIB))
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk={disk}", "top-id=top0", f"active={active}"]
    _, said = lab.failed_start(arguments)
    assert f"{active} does not have the layout that overlays need" in said
    assert "qemu-img create -f qcow2 -o extended_l2=on,cluster_size=128k,preallocation=metadata,data_file=" in said


# -- start: stages and modes -------------------------------------------------------------------------------------


@pytest.fixture
def secondary(lab: Lab) -> Secondary:
    """In stage none."""
    server: Secondary = lab.secondary(contents=(OLD,))
    return server


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """In stage none on both sides."""
    return lab.pair(contents=(OLD,))


def test_start_of_the_wrong_mode_is_refused_on_either_side(pair: Pair) -> None:
    text = "The parameter mode's value is invalid, needs {}, but got {}"
    for command, to_secondary, to_primary in (
        ("xen-set-replication", START_PRIMARY, START_SECONDARY),
        ("replication-start", {"mode": "primary"}, {"mode": "secondary"}),
    ):
        assert refused(pair.secondary, command, to_secondary) == text.format("secondary", "primary")
        assert refused(pair.primary, command, to_primary) == text.format("primary", "secondary")


def test_start_while_running_is_refused_on_either_side_also_with_the_wrong_mode(pair: Pair) -> None:
    pair.start_replication()
    for server in (pair.primary, pair.secondary):
        for arguments in (START_PRIMARY, START_SECONDARY):
            assert refused(server, "xen-set-replication", arguments) == RUNNING_OR_DONE


def test_start_takes_a_first_checkpoint_and_begins_copy_before_write(secondary: Secondary) -> None:
    target, guest = secondary.connect("disk0"), secondary.connect("top0")
    target.pwrite(NEW, 0)
    assert secondary.status()["epoch"] == 0
    secondary.start_replication()
    status = secondary.status()
    assert (status["stage"], status["epoch"], status["error"]) == ("running", 1, None)
    jobs = secondary.execute("query-jobs")
    assert [(job["id"], job["type"], job["status"]) for job in jobs] == [("backup-disk0", "backup", "running")]
    target.pwrite(OWN, 0)
    assert bytes(guest.pread(2 * BLOCK, 0)) == NEW + OLD[BLOCK : 2 * BLOCK]
    job = secondary.execute("query-jobs")[0]
    assert (job["current-progress"], job["total-progress"]) == (BLOCK, MIB)


def test_start_without_a_mode_starts_what_the_process_is(pair: Pair) -> None:
    pair.secondary.execute("replication-start")
    pair.primary.execute("replication-start")
    assert pair.secondary.status()["stage"] == pair.primary.status()["stage"] == "running"


def test_a_primary_without_a_reachable_secondary_does_not_start_and_changes_nothing(lab: Lab) -> None:
    primary = lab.primary(
        f"nbd+unix:///disk0?socket={lab.folder}/nobody", contents=(OLD,), extra_arguments=["timeout=1"]
    )
    disk = primary.connect("disk0")
    disk.pwrite(NEW, 0)
    desc = refused(primary, "xen-set-replication", START_PRIMARY)
    assert desc.startswith("cannot start: cannot connect to nbd+unix:///disk0?socket=")
    assert primary.status()["disks"][0]["out-of-sync-bytes"] == 64 * KIB
    assert refused(primary, "replication-get-error") == NOT_RUNNING


def test_a_primary_does_not_start_towards_a_disk_of_another_size(lab: Lab) -> None:
    server = lab.secondary((2 * MIB,))
    primary = lab.primary(server.uri(), contents=(OLD,))
    desc = refused(primary, "xen-set-replication", START_PRIMARY)
    assert "the secondary" in desc
    assert f"disk 'disk0' has {MIB} bytes there, but {2 * MIB} here" in desc


# -- xen-set-replication's forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Parameter 'enable' is missing"),
        ({"enable": True}, "Parameter 'primary' is missing"),
        ({"enable": False}, "Parameter 'primary' is missing"),
        ({"enable": True, "primary": False, "failover": True}, "Parameter 'failover' is only for stopping replication"),
        (
            {"enable": True, "primary": False, "failover": False},
            "Parameter 'failover' is only for stopping replication",
        ),
        ({"enable": 1, "primary": False}, "Invalid parameter type for 'enable', expected: boolean"),
        ({"enable": True, "primary": "no"}, "Invalid parameter type for 'primary', expected: boolean"),
        ({"enable": True, "primary": False, "x": 1}, "Parameter 'x' is unexpected"),
    ],
)
def test_xen_set_replication_refuses_other_forms(secondary: Secondary, arguments: dict[str, Any], text: str) -> None:
    assert refused(secondary, "xen-set-replication", arguments) == text


@pytest.mark.parametrize("primary", [True, False])
@pytest.mark.parametrize("failover", [None, False, True])
def test_stopping_ignores_the_argument_primary(secondary: Secondary, primary: bool, failover: bool | None) -> None:
    secondary.start_replication()
    secondary.connect("disk0").pwrite(NEW, 0)
    arguments = {"enable": False, "primary": primary} | ({} if failover is None else {"failover": failover})
    secondary.execute("xen-set-replication", arguments)
    secondary.wait_stage("done")
    first = OLD[:BLOCK] if failover else NEW
    assert secondary.disks[0].read_bytes() == first + OLD[BLOCK:]


# -- checkpoint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["xen-colo-do-checkpoint", "replication-checkpoint"])
def test_checkpoint_before_start_has_no_backup_job(secondary: Secondary, command: str) -> None:
    assert refused(secondary, command) == CANCELLED


def test_checkpoint_on_a_primary_before_start_is_refused(pair: Pair) -> None:
    assert refused(pair.primary, "xen-colo-do-checkpoint") == NOT_RUNNING


def test_checkpoint_makes_the_guest_face_equal_the_secondary_disk(secondary: Secondary) -> None:
    guest, target = secondary.connect("top0"), secondary.connect("disk0")
    secondary.start_replication()
    target.pwrite(NEW, 0)
    guest.pwrite(OWN, BLOCK)
    secondary.checkpoint()
    disk = secondary.status()["disks"][0]
    assert (disk["active-bytes"], disk["hidden-bytes"]) == (0, 0)
    assert bytes(guest.pread(MIB, 0)) == secondary.disks[0].read_bytes() == NEW + OLD[BLOCK:]


def test_checkpoints_count_epochs_and_say_when_and_how_long(secondary: Secondary) -> None:
    secondary.start_replication()
    answers = [secondary.execute("replication-checkpoint") for _ in range(3)]
    assert [answer["epoch"] for answer in answers] == [2, 3, 4]
    assert all(0 < answer["duration"] < 20 for answer in answers)
    status = secondary.status()
    assert status["epoch"] == 4
    assert status["checkpoint"]["time"] > 1e9
    assert 0 <= status["checkpoint"]["duration"] < 20


@pytest.mark.parametrize("command", ["xen-colo-do-checkpoint", "replication-checkpoint"])
def test_after_the_backup_job_was_cancelled_every_checkpoint_is_refused(secondary: Secondary, command: str) -> None:
    guest, target = secondary.connect("top0"), secondary.connect("disk0")
    secondary.start_replication()
    target.pwrite(NEW, 0)
    secondary.execute("job-cancel", id="backup-disk0")
    assert refused(secondary, command) == CANCELLED
    assert refused(secondary, command) == CANCELLED
    assert bytes(guest.pread(MIB, 0)) == OLD
    # Nothing may be overwritten that nobody would copy first.
    with nbd_refusal(errno.EIO):
        target.pwrite(OWN, 64 * KIB)
    assert secondary.disks[0].read_bytes() == NEW + OLD[BLOCK:]
    assert bytes(guest.pread(MIB, 0)) == OLD


def test_a_planned_stop_after_the_backup_job_was_cancelled_is_refused_and_failover_is_not(
    secondary: Secondary,
) -> None:
    guest, target = secondary.connect("top0"), secondary.connect("disk0")
    secondary.start_replication()
    target.pwrite(NEW, 0)
    guest.pwrite(OWN, BLOCK)
    secondary.execute("job-cancel", id="backup-disk0")
    assert refused(secondary, "xen-set-replication", STOP) == CANCELLED
    assert refused(secondary, "replication-get-error") == IO_ERROR
    secondary.failover()
    assert secondary.disks[0].read_bytes() == OLD[:BLOCK] + OWN + OLD[2 * BLOCK :]


def test_a_cancelled_backup_job_is_listed_with_its_error_until_dismissed(secondary: Secondary) -> None:
    secondary.start_replication()
    assert refused(secondary, "job-dismiss", {"id": "backup-disk0"}).endswith("cannot accept command verb 'dismiss'")
    secondary.execute("job-cancel", id="backup-disk0")
    job = secondary.execute("query-jobs")[0]
    assert (job["id"], job["status"]) == ("backup-disk0", "concluded")
    assert "cancelled" in job["error"]
    assert refused(secondary, "job-cancel", {"id": "backup-disk0"}).endswith("cannot accept command verb 'cancel'")
    secondary.execute("job-dismiss", id="backup-disk0")
    assert secondary.execute("query-jobs") == []
    assert refused(secondary, "job-dismiss", {"id": "backup-disk0"}) == "Job not found"


# -- get-error ---------------------------------------------------------------------------------------------------


def test_get_error_before_start_is_not_running_and_while_all_is_well_nothing(pair: Pair) -> None:
    for server in (pair.primary, pair.secondary):
        assert refused(server, "replication-get-error") == NOT_RUNNING
        assert server.execute("query-xen-replication-status") == {"error": True, "desc": NOT_RUNNING}
    pair.start_replication()
    for server in (pair.primary, pair.secondary):
        assert server.execute("replication-get-error") == {}
        assert server.execute("query-xen-replication-status") == {"error": False}


@pytest.mark.parametrize("arguments", [STOP, FAILOVER], ids=["planned", "failover"])
def test_there_is_no_false_error_after_a_stop(secondary: Secondary, arguments: dict[str, Any]) -> None:
    secondary.start_replication()
    secondary.connect("disk0").pwrite(NEW, 0)
    secondary.execute("xen-set-replication", arguments)
    secondary.wait_stage("done")
    assert secondary.execute("replication-get-error") == {}
    assert secondary.status()["error"] is None


def test_an_error_stays_over_queries_and_further_commands(secondary: Secondary) -> None:
    secondary.start_replication()
    secondary.execute("job-cancel", id="backup-disk0")
    for _ in range(2):
        assert refused(secondary, "replication-get-error") == IO_ERROR
        assert secondary.execute("query-xen-replication-status") == {"error": True, "desc": IO_ERROR}
        assert refused(secondary, "xen-colo-do-checkpoint") == CANCELLED


# -- stop and lost heartbeat -------------------------------------------------------------------------------------


def test_stop_before_start_is_not_running_on_either_side(pair: Pair) -> None:
    for server in (pair.primary, pair.secondary):
        assert refused(server, "xen-set-replication", STOP) == NOT_RUNNING
        assert refused(server, "xen-set-replication", FAILOVER) == NOT_RUNNING
        assert refused(server, "replication-stop") == NOT_RUNNING
        assert refused(server, "x-colo-lost-heartbeat") == NOT_RUNNING


def ignores_old_commands(server: Server) -> None:
    """start, checkpoint and stop, in every form, are accepted and change nothing."""
    for arguments in (START_SECONDARY, START_PRIMARY, STOP, FAILOVER):
        ignored(server, "xen-set-replication", arguments)
    for command in (
        "replication-start",
        "xen-colo-do-checkpoint",
        "replication-checkpoint",
        "replication-stop",
        "x-colo-lost-heartbeat",
    ):
        ignored(server, command)
    assert server.execute("replication-get-error") == {}


@pytest.mark.parametrize("arguments", [STOP, FAILOVER], ids=["planned", "failover"])
def test_a_promoted_secondary_ignores_old_commands(secondary: Secondary, arguments: dict[str, Any]) -> None:
    secondary.start_replication()
    secondary.execute("xen-set-replication", arguments)
    secondary.wait_stage("done")
    ignores_old_commands(secondary)


def test_a_secondary_in_failover_ignores_old_commands(lab: Lab) -> None:
    points = lab.pause_points()
    server = lab.secondary(contents=(OLD,), extra_environment=points.environment)
    server.start_replication()
    server.connect("disk0").pwrite(NEW, 0)
    points.arm("commit.written")
    server.execute("xen-set-replication", FAILOVER)
    points.wait_hit("commit.written")
    assert server.status()["stage"] == "failover"
    ignores_old_commands(server)
    assert server.status()["stage"] == "failover"
    points.release("commit.written")
    server.wait_stage("done")
    assert server.disks[0].read_bytes() == OLD


def test_a_stopped_primary_ignores_old_commands(pair: Pair) -> None:
    pair.start_replication()
    pair.primary.execute("xen-set-replication", {"enable": False, "primary": True})
    assert pair.primary.status()["stage"] == "done"
    ignores_old_commands(pair.primary)


def test_after_a_failed_commit_start_checkpoint_and_planned_stop_are_refused(lab: Lab) -> None:
    path = make_raw(lab.folder / "disk.raw", MIB, OLD)
    endpoint = lab.endpoint(path=path, error={"pwrite": "EIO"})
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk=disk0:{endpoint.uri()}", "top-id=top0"]
    server = lab.start(Server(lab.folder, "failing", arguments))
    server.execute("xen-set-replication", START_SECONDARY)
    server.connect("top0").pwrite(OWN, 0)
    endpoint.fail()
    server.execute("xen-set-replication", FAILOVER)
    server.wait_stage("failover-failed")
    assert refused(server, "xen-set-replication", START_SECONDARY) == RUNNING_OR_DONE
    assert refused(server, "xen-colo-do-checkpoint") == CANCELLED
    assert refused(server, "xen-set-replication", STOP) == NOT_RUNNING
    assert refused(server, "replication-get-error") == IO_ERROR


def test_there_is_a_commit_to_retry_only_after_one_has_failed(pair: Pair) -> None:
    text = "There is no failed commit to retry: the stage is "
    for server in (pair.primary, pair.secondary):
        assert refused(server, "replication-retry") == text + "none"
    pair.start_replication()
    for server in (pair.primary, pair.secondary):
        assert refused(server, "replication-retry") == text + "running"
    pair.secondary.failover()
    assert refused(pair.secondary, "replication-retry") == text + "done"


def test_a_lost_heartbeat_is_a_failover_on_the_secondary_and_a_stop_on_the_primary(pair: Pair) -> None:
    pair.start_replication()
    disk = pair.primary.connect("disk0")
    disk.pwrite(NEW, 0)
    pair.primary.checkpoint()
    disk.pwrite(OWN, 0)
    pair.primary.execute("x-colo-lost-heartbeat")
    assert pair.primary.status()["stage"] == "done"
    pair.secondary.execute("x-colo-lost-heartbeat")
    pair.secondary.wait_stage("done")
    assert pair.secondary.disks[0].read_bytes() == NEW + OLD[BLOCK:]
    assert pair.primary.disks[0].read_bytes() == OWN + OLD[BLOCK:]


def test_a_stop_of_the_primary_sends_what_the_guest_was_answered_for(lab: Lab) -> None:
    points = lab.pause_points()
    pair: Pair = lab.pair(contents=(OLD,), primary_options={"extra_environment": points.environment})
    pair.start_replication()
    disk = pair.primary.connect("disk0")
    points.arm("forward.send")
    for index in range(16):
        disk.pwrite(pattern(100 + index, BLOCK), index * 2 * BLOCK)
    points.wait_hit("forward.send")
    assert pair.primary.status()["disks"][0]["forward-queue-bytes"] == 16 * BLOCK
    with pair.primary.qmp() as qmp:
        qmp.send(b'{"execute": "replication-stop", "id": "stop"}\n')
        pair.primary.wait_stage("done")
        points.release("forward.send")
        while qmp.receive().get("id") != "stop":
            pass
    assert pair.secondary.disks[0].read_bytes() == pair.primary.disks[0].read_bytes() != OLD


# -- events ------------------------------------------------------------------------------------------------------


def until(qmp: Any, last: str, **data: Any) -> list[tuple[str, dict[str, Any]]]:
    """Events in the order in which they came, up to and with the first `last` of which `data` is true."""
    seen: list[tuple[str, dict[str, Any]]] = []
    pending = list(qmp.events)
    qmp.events.clear()
    while True:
        message = pending.pop(0) if pending else qmp.receive()
        if "event" not in message:
            continue
        seen.append((message["event"], message["data"]))
        if message["event"] == last and data.items() <= message["data"].items():
            return seen


def test_a_life_of_a_secondary_is_told_in_order(secondary: Secondary) -> None:
    with secondary.qmp() as watch:
        secondary.start_replication()
        secondary.connect("disk0").pwrite(NEW, 0)
        secondary.checkpoint()
        secondary.failover()
        seen = until(watch, "JOB_STATUS_CHANGE", id="commit-disk0", status="null")
    checkpoints = [data for name, data in seen if name == "REPLICATION_CHECKPOINT"]
    assert checkpoints
    assert checkpoints[-1]["epoch"] == 2
    assert all(set(data) == {"epoch", "duration"} for data in checkpoints)
    stages = [(data["mode"], data["from"], data["to"]) for name, data in seen if name == "REPLICATION_STAGE_CHANGE"]
    assert stages == [
        ("secondary", "none", "running"),
        ("secondary", "running", "failover"),
        ("secondary", "failover", "done"),
    ]
    order = [data.get("to") or (data.get("id"), data.get("status")) for _, data in seen if "epoch" not in data]
    assert order == [
        "running",
        ("backup-disk0", "running"),
        "failover",
        ("backup-disk0", "concluded"),
        ("backup-disk0", "null"),
        ("commit-disk0", "running"),
        "done",
        ("commit-disk0", "concluded"),
        ("commit-disk0", "null"),
    ]
    names = [name for name, _ in seen]
    assert names.index("REPLICATION_CHECKPOINT") > names.index("REPLICATION_STAGE_CHANGE")


def test_a_life_of_a_primary_is_told_in_order(pair: Pair) -> None:
    pair.secondary.start_replication()
    with pair.primary.qmp() as watch:
        pair.primary.start_replication()
        pair.primary.checkpoint()
        pair.primary.execute("replication-stop")
        seen = until(watch, "REPLICATION_LINK", state="disconnected")
    told = [data.get("to") or data.get("state") or name for name, data in seen]
    assert told == ["running", "synchronizing", "in-sync", "REPLICATION_CHECKPOINT", "done", "disconnected"]


def test_commands_that_are_ignored_or_refused_are_told_to_nobody(secondary: Secondary) -> None:
    secondary.start_replication()
    secondary.execute("xen-set-replication", STOP)
    with secondary.qmp() as watch:
        for _ in range(3):
            secondary.checkpoint()
            secondary.execute("xen-set-replication", STOP)
            with contextlib.suppress(QmpError):
                secondary.execute("job-cancel", id="backup-disk0")
        watch.execute("query-version")
        assert watch.events == []


def test_the_control_socket_is_for_its_owner_alone(secondary: Secondary) -> None:
    assert os.stat(secondary.control_path).st_mode & 0o777 == 0o600
