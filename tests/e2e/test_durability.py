# SPDX-License-Identifier: BSD-3-Clause
"""What a secondary is worth after a restart of its host, with durability=process and durability=power.

A restart of the host is played by another boot id (NBDKIT_REPLICATION_BOOT_ID, replication/record/boot.py) at the
next start of nbdkit. The files are then as the page cache had them, so this shows what the process makes of a restart,
and with power that it does not use what would not have been stable. What a disk may really hold after a power cut is
simulated in tests/power.
"""

from __future__ import annotations

import errno
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from content import KIB, MIB, changed, pattern, qemu_img
from lab import Lab
from mounts import SmallFolder
from nodes import Secondary, nbd_refusal
from pausepoints import PausePoints
from qmp import QmpError

BLOCK = 4 * KIB
OLD = pattern(1, MIB)
NEW = pattern(2, BLOCK)
OWN = pattern(3, BLOCK)
UNFLUSHED = pattern(4, BLOCK)
LATE = pattern(5, BLOCK)

AT_NEW, AT_OWN, AT_UNFLUSHED = 0, 300 * KIB, 700 * KIB
"""Where the primary has written; where the guest has, and flushed; and where it has not flushed."""

IO_ERROR = "I/O error occurred"
BOTH = pytest.mark.parametrize("durability", ["process", "power"])
TERM_AND_KILL = pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])


@pytest.fixture(autouse=True)
def _on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """durability=power refuses tmpfs, which /tmp often is; /var/tmp outlives a restart (FHS)."""
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")


class Host:
    """A secondary with one disk of content OLD, and the boots of its host."""

    def __init__(self, lab: Lab, durability: str, overlays: Path | None = None) -> None:
        self.points: PausePoints = lab.pause_points()
        self._boots = 1
        self.secondary = lab.add(
            Secondary(
                lab.folder,
                contents=(OLD,),
                overlays=overlays,
                extra_arguments=[f"durability={durability}"],
                extra_environment=self.points.environment,
            )
        )
        self._name_boot()
        self.secondary.start()

    def _name_boot(self) -> None:
        self.secondary.extra_environment["NBDKIT_REPLICATION_BOOT_ID"] = f"boot-{self._boots}"

    def run(self) -> None:
        """Into `running`, with writes since the checkpoint: the primary's, the guest's flushed, the guest's."""
        self.secondary.start_replication()
        self.secondary.connect("disk0").pwrite(NEW, AT_NEW)
        guest = self.secondary.connect("top0")
        guest.pwrite(OWN, AT_OWN)
        guest.flush()
        guest.pwrite(UNFLUSHED, AT_UNFLUSHED)

    def end(self, how: signal.Signals) -> None:
        """End the process."""
        if how is signal.SIGKILL:
            self.secondary.kill()
        else:
            self.secondary.terminate()

    def boot(self, how: signal.Signals) -> None:
        """End the process, restart the host, start the process."""
        self.end(how)
        self._boots += 1
        self._name_boot()
        self.secondary.start()

    def use(self, durability: str) -> None:
        """With this durability from the next start on."""
        self.secondary.arguments[-1] = f"durability={durability}"

    def guest(self) -> bytes:
        """What the guest sees."""
        return bytes(self.secondary.connect("top0").pread(MIB, 0))

    def disk(self) -> bytes:
        """What is on the secondary disk."""
        return self.secondary.disks[0].read_bytes()

    def check_images(self) -> None:
        """qemu-img finds no fault; the process has ended."""
        for kind in ("active", "hidden"):
            qemu_img("check", "-q", "-f", "qcow2", self.secondary.overlay(kind))


FLUSHED = changed(OLD, (AT_OWN, OWN))
EVERYTHING = changed(FLUSHED, (AT_UNFLUSHED, UNFLUSHED))


def refusal(server: Secondary, command: str, **arguments: object) -> str:
    """Why a command is refused."""
    with pytest.raises(QmpError) as caught:
        server.execute(command, **arguments)
    return caught.value.desc


def check_lost(host: Host) -> None:
    """The last checkpoint is lost: nobody sees or makes anything of it unless forced, and a resync is asked for."""
    secondary = host.secondary
    status = secondary.status()
    assert (status["stage"], status["consistent"]) == ("running", False)
    assert refusal(secondary, "replication-get-error") == IO_ERROR
    guest = secondary.connect("top0")
    with nbd_refusal(errno.EIO):
        guest.pread(BLOCK, 0)
    with nbd_refusal(errno.EIO):
        guest.pwrite(LATE, 0)
    assert status["disks"][0]["out-of-sync-bytes"] == MIB
    assert "resync" in refusal(secondary, "xen-colo-do-checkpoint")
    assert "resync" in refusal(secondary, "replication-stop")
    answer = secondary.execute("query-failover")
    assert (answer["allowed"], answer["force"]) == (False, True)
    assert "resync" in answer["reason"]
    assert "force" in refusal(secondary, "replication-stop", failover=True)
    assert secondary.status()["stage"] == "running"


def check_forced_failover(host: Host, stage: str = "running") -> None:
    """With force there is a disk, whatever is on it."""
    before = host.disk()
    if stage == "running":
        host.secondary.execute("replication-stop", failover=True, force=True)
    else:
        host.secondary.execute("replication-retry", force=True)
    status = host.secondary.wait_stage("done", "failover-failed")
    assert (status["stage"], status["consistent"], status["error"]) == ("done", True, None)
    guest = host.secondary.connect("top0")
    assert bytes(guest.pread(MIB, 0)) == host.disk()
    if stage == "running":
        assert host.disk() == before  # as it was: nothing comes down of overlays that nobody can trust
    guest.pwrite(LATE, 64 * KIB)
    assert host.disk()[64 * KIB :][:BLOCK] == LATE


# -- ended without warning -----------------------------------------------------------------------------------------


def test_process_after_a_power_cut_the_checkpoint_is_lost_and_only_force_makes_a_disk_of_it(lab: Lab) -> None:
    host = Host(lab, "process")
    host.run()
    host.boot(signal.SIGKILL)
    check_lost(host)
    check_forced_failover(host)
    host.secondary.terminate()
    host.check_images()


@TERM_AND_KILL
def test_process_a_lost_checkpoint_is_replaced_by_one_of_all_that_the_primary_sends_anew(
    lab: Lab, how: signal.Signals
) -> None:
    host = Host(lab, "process")
    host.run()
    host.boot(signal.SIGKILL)
    secondary = host.secondary
    whole = pattern(6, MIB)
    secondary.connect("disk0").pwrite(whole[: MIB // 2], 0)
    check_half_sent(host)
    secondary.restart(how)
    check_half_sent(host)
    secondary.connect("disk0").pwrite(whole[MIB // 2 :], MIB // 2)
    # All is there, but nobody has said that it belongs together.
    assert secondary.status()["consistent"] is False
    with nbd_refusal(errno.EIO):
        secondary.connect("top0").pread(BLOCK, 0)
    secondary.checkpoint()
    status = secondary.status()
    assert (status["stage"], status["consistent"], status["error"]) == ("running", True, None)
    assert host.guest() == host.disk() == whole
    secondary.connect("disk0").pwrite(NEW, 0)
    assert host.guest() == whole
    secondary.failover()
    assert host.disk() == whole


def check_half_sent(host: Host) -> None:
    """Half of the disk was sent again: that is no checkpoint."""
    status = host.secondary.status()
    assert (status["consistent"], status["disks"][0]["out-of-sync-bytes"]) == (False, MIB // 2)
    assert "resync" in refusal(host.secondary, "xen-colo-do-checkpoint")
    assert host.secondary.execute("query-failover")["allowed"] is False


@TERM_AND_KILL
def test_process_a_checkpoint_lost_by_a_power_cut_stays_lost_in_later_processes(lab: Lab, how: signal.Signals) -> None:
    host = Host(lab, "process")
    host.run()
    host.boot(signal.SIGKILL)
    host.secondary.restart(how)
    check_lost(host)
    host.boot(how)
    check_lost(host)
    host.use("power")
    host.secondary.restart(how)
    check_lost(host)


def test_power_after_a_power_cut_the_checkpoint_and_what_the_guest_has_flushed_are_there(lab: Lab) -> None:
    host = Host(lab, "power")
    host.run()
    host.boot(signal.SIGKILL)
    status = host.secondary.status()
    assert (status["stage"], status["consistent"], status["epoch"]) == ("running", True, 1)
    # The words in use were another boot's, so they do not count: what was not flushed is not there.
    assert host.guest() == FLUSHED
    answer = host.secondary.execute("query-failover")
    assert (answer["allowed"], answer["force"], answer["epoch"]) == (True, False, 1)
    host.secondary.failover()
    assert host.guest() == host.disk() == FLUSHED
    status = host.secondary.status()
    assert (status["error"], status["consistent"]) == (None, True)
    host.secondary.terminate()
    host.check_images()


def test_power_after_a_power_cut_no_checkpoint_is_taken_because_the_primarys_last_writes_may_be_missing(
    lab: Lab,
) -> None:
    host = Host(lab, "power")
    host.run()
    host.boot(signal.SIGKILL)
    secondary = host.secondary
    assert refusal(secondary, "replication-get-error") == IO_ERROR
    status = secondary.status()
    assert (status["error"]["case"], status["disks"][0]["out-of-sync-bytes"]) == (4, MIB)
    refusal(secondary, "xen-colo-do-checkpoint")
    refusal(secondary, "replication-stop")
    assert secondary.status()["epoch"] == 1
    # All of it sent again, the disk is what the primary has.
    whole = pattern(6, MIB)
    secondary.connect("disk0").pwrite(whole, 0)
    assert host.guest() == FLUSHED
    secondary.checkpoint()
    status = secondary.status()
    assert (status["epoch"], status["error"], status["disks"][0]["out-of-sync-bytes"]) == (2, None, 0)
    assert host.guest() == host.disk() == whole


def test_power_two_power_cuts_in_a_row_lose_no_more_than_one(lab: Lab) -> None:
    host = Host(lab, "power")
    host.run()
    host.boot(signal.SIGKILL)
    guest = host.secondary.connect("top0")
    guest.pwrite(LATE, AT_UNFLUSHED, nbd.CMD_FLAG_FUA)
    host.secondary.connect("disk0").pwrite(LATE, 64 * KIB)
    host.boot(signal.SIGKILL)
    expected = changed(FLUSHED, (AT_UNFLUSHED, LATE))
    assert host.guest() == expected
    host.secondary.failover()
    assert host.disk() == expected


@BOTH
def test_without_replication_a_power_cut_is_nothing_to_report(lab: Lab, durability: str) -> None:
    host = Host(lab, durability)
    host.secondary.connect("disk0").pwrite(NEW, AT_NEW)
    host.boot(signal.SIGKILL)
    status = host.secondary.status()
    assert (status["stage"], status["consistent"], status["error"]) == ("none", True, None)
    host.run()
    assert host.guest() == changed(EVERYTHING, (AT_NEW, NEW))


@BOTH
@pytest.mark.parametrize("failover", [False, True], ids=["stop", "failover"])
def test_once_done_a_power_cut_is_nothing_to_report(lab: Lab, durability: str, failover: bool) -> None:
    host = Host(lab, durability)
    host.run()
    host.secondary.execute("replication-stop", failover=failover)
    assert host.secondary.wait_stage("done", "failover-failed")["stage"] == "done"
    expected = EVERYTHING if failover else changed(OLD, (AT_NEW, NEW))
    host.boot(signal.SIGKILL)
    status = host.secondary.status()
    assert (status["stage"], status["consistent"], status["error"]) == ("done", True, None)
    assert host.guest() == host.disk() == expected
    with nbd_refusal(errno.ESHUTDOWN):
        host.secondary.connect("disk0").pwrite(LATE, 0)


# -- a commit that was under way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["failover.entered", "commit.written", "commit.hidden-forgotten"])
def test_process_a_commit_cut_short_has_failed_and_only_force_goes_on_with_it(lab: Lab, point: str) -> None:
    host = Host(lab, "process")
    host.run()
    hold_commit(host, point)
    host.secondary.kill()
    host.points.disarm(point)
    host.boot(signal.SIGKILL)
    secondary = host.secondary
    status = secondary.status()
    assert (status["stage"], status["consistent"]) == ("failover-failed", False)
    assert refusal(secondary, "replication-get-error") == IO_ERROR
    with nbd_refusal(errno.EIO):
        secondary.connect("top0").pread(BLOCK, 0)
    with nbd_refusal(errno.ESHUTDOWN):
        secondary.connect("disk0").pwrite(LATE, 0)
    assert secondary.execute("query-failover")["allowed"] is False
    assert "force" in refusal(secondary, "replication-retry")
    assert secondary.status()["stage"] == "failover-failed"
    check_forced_failover(host, "failover-failed")


@pytest.mark.parametrize("point", ["failover.entered", "commit.written", "commit.hidden-forgotten"])
def test_power_a_commit_cut_short_goes_on_by_itself_to_the_checkpoint_and_what_was_flushed(
    lab: Lab, point: str
) -> None:
    host = Host(lab, "power")
    host.run()
    hold_commit(host, point)
    host.secondary.kill()
    host.points.disarm(point)
    host.boot(signal.SIGKILL)
    status = host.secondary.wait_stage("done", "failover-failed")
    assert (status["stage"], status["consistent"], status["error"]) == ("done", True, None)
    found = host.guest()
    assert found == host.disk()
    # What the guest had not flushed may have been brought down already.
    unflushed = found[AT_UNFLUSHED:][:BLOCK]
    assert unflushed in (UNFLUSHED, OLD[AT_UNFLUSHED:][:BLOCK])
    assert found == changed(FLUSHED, (AT_UNFLUSHED, unflushed))


def hold_commit(host: Host, point: str) -> None:
    """Fail over until the commit is held at `point`."""
    host.points.arm(point)
    with host.secondary.qmp() as qmp:
        qmp.send(b'{"execute": "replication-stop", "arguments": {"failover": true}}\n')
        host.points.wait_hit(point)


# -- overlays that are gone ----------------------------------------------------------------------------------------


@TERM_AND_KILL
@BOTH
def test_overlays_that_went_with_the_host_are_made_anew_and_their_checkpoint_is_lost(
    lab: Lab, durability: str, how: signal.Signals
) -> None:
    overlays = lab.folder / "overlays"
    overlays.mkdir()
    host = Host(lab, durability, overlays)
    host.run()
    host.end(how)
    shutil.rmtree(overlays)  # as a tmpfs is after a restart
    overlays.mkdir()
    host.boot(how)
    check_lost(host)
    check_forced_failover(host)
    host.secondary.terminate()
    host.check_images()


# -- ended in good order -------------------------------------------------------------------------------------------


@BOTH
def test_ended_in_good_order_before_a_restart_of_the_host_nothing_is_lost(lab: Lab, durability: str) -> None:
    host = Host(lab, durability)
    host.run()
    host.boot(signal.SIGTERM)
    status = host.secondary.status()
    assert (status["stage"], status["consistent"], status["error"]) == ("running", True, None)
    assert status["disks"][0]["out-of-sync-bytes"] == 0
    assert host.guest() == EVERYTHING
    host.secondary.connect("disk0").pwrite(LATE, AT_NEW)
    assert host.guest() == EVERYTHING
    host.secondary.checkpoint()
    assert host.guest() == host.disk() == changed(OLD, (AT_NEW, LATE))


def test_process_a_good_end_does_not_count_for_the_process_after_it(lab: Lab) -> None:
    host = Host(lab, "process")
    host.run()
    host.boot(signal.SIGTERM)
    host.boot(signal.SIGKILL)
    check_lost(host)


@BOTH
def test_ended_in_good_order_the_images_show_qemus_tools_what_the_guest_sees(lab: Lab, durability: str) -> None:
    host = Host(lab, durability)
    host.run()
    assert host.guest() == EVERYTHING
    host.secondary.terminate()
    host.check_images()
    expected = lab.folder / "expected.raw"
    expected.write_bytes(EVERYTHING)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", host.secondary.overlay("active"), expected)


def test_power_a_process_that_was_killed_has_left_images_that_show_the_last_flush(lab: Lab) -> None:
    host = Host(lab, "power")
    host.run()
    host.secondary.kill()
    host.check_images()
    expected = lab.folder / "expected.raw"
    expected.write_bytes(FLUSHED)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", host.secondary.overlay("active"), expected)


# -- no restart of the host ----------------------------------------------------------------------------------------


def test_power_a_killed_process_loses_nothing_at_all_while_the_host_stays_up(lab: Lab) -> None:
    host = Host(lab, "power")
    host.run()
    for _ in range(2):
        host.secondary.restart(signal.SIGKILL)
        status = host.secondary.status()
        assert (status["stage"], status["consistent"], status["error"]) == ("running", True, None)
        assert host.guest() == EVERYTHING
    host.secondary.checkpoint()
    assert host.guest() == host.disk() == changed(OLD, (AT_NEW, NEW))
    host.secondary.restart(signal.SIGKILL)
    assert host.guest() == changed(OLD, (AT_NEW, NEW))


@pytest.mark.parametrize("point", ["copy-before-write.before-mark", "target-write.preserved"])
def test_power_what_a_killed_process_had_preserved_is_stable_before_the_next_overwrites_it(
    lab: Lab, point: str
) -> None:
    # The image as it is when the disk changes is what a power cut at that moment would leave of the bits.
    host = Host(lab, "power")
    host.secondary.start_replication()
    host.points.arm(point)
    target = host.secondary.connect("disk0")
    target.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(NEW)), AT_NEW)
    host.points.wait_hit(point)
    host.secondary.kill()
    host.points.disarm(point)
    host.secondary.start()
    host.secondary.connect("disk0").pwrite(NEW, AT_NEW)
    assert host.disk() == changed(OLD, (AT_NEW, NEW))
    host.boot(signal.SIGKILL)
    assert host.guest() == OLD


@TERM_AND_KILL
@pytest.mark.parametrize(("first", "then"), [("process", "power"), ("power", "process")])
def test_durability_may_be_another_one_in_the_next_process_and_nothing_is_lost(
    lab: Lab, first: str, then: str, how: signal.Signals
) -> None:
    host = Host(lab, first)
    host.run()
    host.use(then)
    host.secondary.restart(how)
    assert host.guest() == EVERYTHING
    host.secondary.connect("disk0").pwrite(LATE, 64 * KIB)
    host.secondary.connect("top0").pwrite(LATE, 128 * KIB)
    expected = changed(EVERYTHING, (128 * KIB, LATE))
    host.use(first)
    host.secondary.restart(how)
    assert host.guest() == expected
    host.secondary.checkpoint()
    assert host.guest() == host.disk() == changed(OLD, (AT_NEW, NEW), (64 * KIB, LATE))


def test_from_process_to_power_all_that_was_written_before_outlives_a_power_cut(lab: Lab) -> None:
    host = Host(lab, "process")
    host.run()
    host.use("power")
    host.secondary.restart(signal.SIGKILL)
    host.boot(signal.SIGKILL)
    assert host.secondary.status()["consistent"] is True
    assert host.guest() == EVERYTHING


def test_from_power_to_process_a_power_cut_loses_the_checkpoint(lab: Lab) -> None:
    host = Host(lab, "power")
    host.run()
    host.use("process")
    host.secondary.restart(signal.SIGKILL)
    host.boot(signal.SIGKILL)
    check_lost(host)


# -- what power refuses --------------------------------------------------------------------------------------------


@pytest.fixture
def tmpfs(small_folder: Callable[[int], SmallFolder]) -> Path:
    """A tmpfs of 4 MiB."""
    return small_folder(4 * MIB).folder


def test_power_is_refused_with_overlays_in_tmpfs_and_nothing_is_made_there(lab: Lab, tmpfs: Path) -> None:
    disk = lab.folder / "disk.raw"
    disk.write_bytes(OLD)
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk={disk}", "top-id=top0"]
    elsewhere = [f"active={lab.folder / 'a.qcow2'}", f"hidden={lab.folder / 'h.qcow2'}"]
    for kind, overlays in (
        ("active", [f"active={tmpfs / 'a.qcow2'}", elsewhere[1]]),
        ("hidden", [elsewhere[0], f"hidden={tmpfs / 'h.qcow2'}"]),
    ):
        _, said = lab.failed_start([*arguments, *overlays, "durability=power"])
        assert "tmpfs" in said
        assert kind in said
        assert "durability=process" in said  # what can be done instead
    assert list(tmpfs.iterdir()) == []
    assert list(lab.folder.glob("*.qcow2")) == []


def test_power_is_refused_with_a_disk_in_tmpfs_also_behind_a_link(lab: Lab, tmpfs: Path) -> None:
    (tmpfs / "disk.raw").write_bytes(OLD)
    (lab.folder / "link.raw").symlink_to(tmpfs / "disk.raw")
    for disk in (tmpfs / "disk.raw", lab.folder / "link.raw"):
        arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk={disk}", "top-id=top0"]
        _, said = lab.failed_start([*arguments, "durability=power"])
        assert f"durability=power, but {disk} (secondary disk 'disk0') is in tmpfs" in said
        assert list((lab.folder / "s").glob("*.qcow2")) == []


def test_process_takes_overlays_in_tmpfs(lab: Lab, tmpfs: Path) -> None:
    host = Host(lab, "process", tmpfs)
    host.run()
    assert host.guest() == EVERYTHING


def test_power_is_refused_without_a_state_folder(lab: Lab) -> None:
    disk = lab.folder / "disk.raw"
    disk.write_bytes(OLD)
    overlays = [f"active={lab.folder / 'a.qcow2'}", f"hidden={lab.folder / 'h.qcow2'}"]
    arguments = ["mode=secondary", f"control={lab.folder / 'c'}", f"disk={disk}", "top-id=top0", *overlays]
    _, said = lab.failed_start([*arguments, "durability=power"])
    assert "Missing the option state" in said
    assert not Path(overlays[0].removeprefix("active=")).exists()


@pytest.mark.parametrize("value", ["", "Power", "disk", "power,process"])
def test_a_durability_that_does_not_exist_is_refused(lab: Lab, value: str) -> None:
    disk = lab.folder / "disk.raw"
    disk.write_bytes(OLD)
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk={disk}", "top-id=top0", f"durability={value}"]
    _, said = lab.failed_start(arguments)
    assert "durability" in said
    assert not (lab.folder / "s").exists()
