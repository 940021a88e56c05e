# SPDX-License-Identifier: BSD-3-Clause
"""Overlays on a small tmpfs that fills up: the warning comes in time, and a manager that checkpoints on it never loses
a write; one that does not gets a refusal that heals as soon as there is room.

All overlays of the secondary are in the tmpfs (SmallFolder). How full it is at the moment of an event is what the file
system itself says, not what the event says.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

import nbd
import pytest

from content import KIB, MIB, pattern
from lab import Lab
from mounts import SmallFolder
from nodes import Primary, Secondary, disk_name, drained, nbd_refusal, top_id
from waiting import wait_until

BLOCK = 4 * KIB
GRAIN = 64 * KIB
ROOM = 8 * MIB
"""Size of the tmpfs."""
SIZE = 16 * MIB
EVENT = "REPLICATION_OVERLAY_WATERMARK"
LATE = 6.0
"""Per cent of ROOM by which an event may be late: 64 blocks and one write of 64 KiB are 4 per cent."""


@pytest.fixture
def small(small_folder: Callable[[int], SmallFolder]) -> SmallFolder:
    """A file system of ROOM bytes."""
    return small_folder(ROOM)


def old(index: int = 0) -> bytes:
    """What disk number `index` holds at first, on both sides."""
    return pattern(100 + index, MIB) * (SIZE // MIB)


class Rig:
    """A running secondary with all overlays in the small folder, and a primary if wanted; a listener for events."""

    def __init__(
        self, lab: Lab, small: SmallFolder, disks: int = 1, arguments: Sequence[str] = (), primary: Sequence[str] = ()
    ) -> None:
        sizes, contents = [SIZE] * disks, [old(index) for index in range(disks)]
        self.small = small
        self.secondary: Secondary = lab.start(
            Secondary(lab.folder, sizes, contents=contents, overlays=small.folder, extra_arguments=arguments)
        )
        self.secondary.start_replication()
        self.guests = [self.secondary.connect(top_id(index)) for index in range(disks)]
        self.targets = [self.secondary.connect(disk_name(index)) for index in range(disks)]
        self.primary: Primary | None = None
        self.disks: list[nbd.NBD] = []
        if primary:
            self.primary = lab.start(
                Primary(lab.folder, self.secondary.uri(), sizes, contents=contents, extra_arguments=primary)
            )
            self.primary.start_replication()
            self.disks = [self.primary.connect(disk_name(index)) for index in range(disks)]
        self._listener = self.secondary.qmp()

    def writer(self, overlay: str, index: int = 0) -> nbd.NBD:
        """What fills "active" or "hidden"."""
        return (self.guests if overlay == "active" else self.targets)[index]

    def warnings(self) -> list[dict[str, Any]]:
        """The events since the last call. What was emitted before this call is there: it stands before the answer."""
        self._listener.execute("query-version")
        events = [event["data"] for event in self._listener.events if event["event"] == EVENT]
        self._listener.events.clear()
        return events

    def checkpoint(self) -> None:
        """On the secondary."""
        self.secondary.checkpoint()

    def fill_until(self, overlay: str, stop: Callable[[], bool], index: int = 0, start: int = 0) -> int:
        """Write grains from `start` on until `stop()` is true or the disk ends; where it has stopped."""
        at = start
        while at < SIZE and not stop():
            self.writer(overlay, index).pwrite(pattern(at + 1, GRAIN), at)
            at += GRAIN
        return at


# -- the warning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", ["active", "hidden"])
def test_the_warning_comes_once_before_the_overlay_is_full_and_says_which(
    lab: Lab, small: SmallFolder, overlay: str
) -> None:
    rig = Rig(lab, small)
    heard: list[dict[str, Any]] = []
    levels: list[float] = []

    def full() -> bool:
        for event in rig.warnings():
            heard.append(event)
            levels.append(small.percent)
        return False

    with nbd_refusal(errno.ENOSPC):
        rig.fill_until(overlay, full)
    full()
    assert len(heard) == 1
    assert 80 <= levels[0] <= 80 + LATE
    (event,) = heard
    assert event["disk"] == "disk0"
    assert event["overlay"] == overlay
    assert event["path"] == str(rig.secondary.overlay(overlay))
    assert event["size"] == ROOM
    assert 0.8 * ROOM <= event["used"] <= levels[0] / 100 * ROOM
    assert event["percent"] == round(100 * event["used"] / ROOM, 1)
    assert set(event) == {"disk", "overlay", "path", "used", "size", "percent"}


@pytest.mark.parametrize("overlay", ["active", "hidden"])
def test_after_a_checkpoint_writing_goes_on_and_the_warning_comes_at_every_crossing(
    lab: Lab, small: SmallFolder, overlay: str
) -> None:
    rig = Rig(lab, small)
    at = 0
    for turn in range(4):
        heard: list[dict[str, Any]] = []

        def warned(heard: list[dict[str, Any]] = heard) -> bool:
            heard += rig.warnings()
            return bool(heard)

        begun = at = at if at < SIZE // 2 else 0
        at = rig.fill_until(overlay, warned, start=at)
        assert [event["overlay"] for event in heard] == [overlay]
        held = rig.secondary.status()["disks"][0][f"{overlay}-bytes"]
        assert held == at - begun
        assert 0.65 * ROOM <= held <= (0.8 + LATE / 100) * ROOM, turn  # what is stale does not count
        rig.checkpoint()
        assert rig.warnings() == []
    assert rig.secondary.execute("query-xen-replication-status") == {"error": False}


@pytest.mark.parametrize("overlay", ["active", "hidden"])
def test_the_warning_comes_again_when_one_request_alone_reaches_the_watermark(
    lab: Lab, small: SmallFolder, overlay: str
) -> None:
    """Between two of them nobody has had a reason to look at the level; the checkpoint has made it low all the same."""
    small.grow(16 * MIB)
    rig = Rig(lab, small, arguments=["overlay-watermark=60"])
    for turn in range(3):
        rig.writer(overlay).pwrite(pattern(turn, 12 * MIB), 0)
        assert [event["overlay"] for event in rig.warnings()] == [overlay], turn
        rig.checkpoint()


def test_each_disk_and_each_overlay_is_named_by_a_warning_of_its_own(lab: Lab, small: SmallFolder) -> None:
    rig = Rig(lab, small, 2)
    heard: list[dict[str, Any]] = []

    def warned() -> bool:
        heard.extend(rig.warnings())
        return bool(heard)

    rig.fill_until("hidden", warned, 1)
    assert [(event["disk"], event["overlay"]) for event in heard] == [("disk1", "hidden")]
    assert heard[0]["path"] == str(rig.secondary.overlay("hidden", 1))


@pytest.mark.parametrize(
    ("arguments", "percent"),
    [
        ([], 80),
        (["overlay-watermark=50"], 50),
        (["overlay-watermark=33.5%"], 33.5),
        (["overlay-watermark=93"], 93),
    ],
    ids=["default", "50", "33.5%", "93"],
)
def test_the_watermark_is_80_per_cent_or_what_the_key_says(
    lab: Lab, small: SmallFolder, arguments: list[str], percent: float
) -> None:
    rig = Rig(lab, small, arguments=arguments)
    rig.fill_until("active", lambda: bool(rig.warnings()))
    assert percent <= small.percent <= percent + LATE


@pytest.mark.parametrize("value", ["", "0", "0.5", "101", "100.1", "-5", "nan", "inf", "many", "80%%", "8 0", "80\n80"])
def test_a_watermark_that_is_none_is_refused_in_one_line(lab: Lab, value: str) -> None:
    disk = lab.folder / "disk"
    disk.write_bytes(bytes(MIB))
    _, said = lab.failed_start(
        ["mode=secondary", f"state={lab.folder / 'state'}", f"disk={disk}", "top-id=top", f"overlay-watermark={value}"]
    )
    (line,) = said.strip().splitlines()
    assert "overlay-watermark" in line
    assert not (lab.folder / "state").exists()


def test_a_primary_has_no_watermark(lab: Lab) -> None:
    disk = lab.folder / "disk"
    disk.write_bytes(bytes(MIB))
    _, said = lab.failed_start(
        ["mode=primary", f"state={lab.folder / 'state'}", f"disk={disk}", "secondary=nbd://h", "overlay-watermark=80"]
    )
    assert "The primary side does not support option overlay-watermark" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("then", ["active", "hidden"])
@pytest.mark.parametrize("first", ["active", "hidden"])
def test_stale_space_after_a_checkpoint_does_not_count(lab: Lab, small: SmallFolder, first: str, then: str) -> None:
    rig = Rig(lab, small)
    rig.fill_until(first, lambda: bool(rig.warnings()))
    rig.checkpoint()
    assert small.percent >= 80  # nothing has been given back yet
    for at in range(8 * MIB, 9 * MIB, GRAIN):
        rig.writer(then).pwrite(pattern(at, GRAIN), at)
    assert rig.warnings() == []


def test_zeroes_do_not_count_as_space(lab: Lab, small: SmallFolder) -> None:
    """They are held without taking any, so what the data file has is stale all the same."""
    rig = Rig(lab, small)
    rig.fill_until("active", lambda: bool(rig.warnings()))
    rig.checkpoint()
    rig.guests[0].zero(6 * MIB, 0)
    at = rig.fill_until("active", lambda: bool(rig.warnings()), start=6 * MIB)
    assert at - 6 * MIB >= 0.65 * ROOM


def test_stale_space_of_another_disk_does_not_count_either(lab: Lab, small: SmallFolder) -> None:
    rig = Rig(lab, small, 2)
    rig.fill_until("active", lambda: bool(rig.warnings()), 0)
    rig.checkpoint()
    assert small.percent >= 80
    for at in range(0, MIB, GRAIN):
        rig.targets[1].pwrite(pattern(at, GRAIN), at)
    assert rig.warnings() == []


def test_stale_space_of_one_disk_is_room_for_another(lab: Lab, small: SmallFolder) -> None:
    rig = Rig(lab, small, 2)
    rig.fill_until("active", lambda: bool(rig.warnings()), 0)
    rig.checkpoint()
    # Sooner than it is given back in the background.
    for overlay, at in (("active", 0), ("hidden", 4 * MIB)):
        rig.writer(overlay, 1).pwrite(pattern(at, 2 * MIB), at)
    assert bytes(rig.guests[1].pread(2 * MIB, 0)) == pattern(0, 2 * MIB)
    assert bytes(rig.guests[1].pread(2 * MIB, 4 * MIB)) == old(1)[: 2 * MIB]


def test_the_warning_comes_in_time_when_one_overlay_grows_after_the_other(lab: Lab, small: SmallFolder) -> None:
    rig = Rig(lab, small)
    for writer in (rig.guests[0], rig.targets[0]):
        writer.pwrite(pattern(1, GRAIN), 0)  # both have seen much room
    rig.fill_until("active", lambda: small.percent >= 78, start=GRAIN)
    assert rig.warnings() == []
    rig.fill_until("hidden", lambda: bool(rig.warnings()), start=GRAIN)
    assert 80 <= small.percent <= 80 + LATE


def test_the_warning_comes_in_time_when_all_overlays_of_two_disks_grow_together(lab: Lab, small: SmallFolder) -> None:
    rig = Rig(lab, small, 2)
    heard: list[dict[str, Any]] = []
    for at in range(0, SIZE, GRAIN):
        for writer in (*rig.guests, *rig.targets):
            writer.pwrite(pattern(at + 1, GRAIN), at)
        heard += rig.warnings()
        if heard:
            break
    assert heard
    assert 80 <= small.percent <= 80 + 2 * LATE


# -- really full ------------------------------------------------------------------------------------------------


def test_a_full_overlay_refuses_the_write_and_heals_by_itself_when_there_is_room(lab: Lab, small: SmallFolder) -> None:
    rig = Rig(lab, small, primary=["timeout=5"])
    primary, secondary, disk = rig.primary, rig.secondary, rig.disks[0]
    assert primary is not None
    disk.pwrite(pattern(50, MIB), 0)
    primary.checkpoint()
    face = pattern(50, MIB) + old()[MIB:]
    written = bytearray(face)
    rig.guests[0].pwrite(b"own", 5 * MIB)
    face = face[: 5 * MIB] + b"own" + face[5 * MIB + 3 :]
    with primary.qmp() as events:
        for at in range(0, 12 * MIB, GRAIN):
            disk.pwrite(pattern(at + 1, GRAIN), at)  # the guest is never told
            written[at : at + GRAIN] = pattern(at + 1, GRAIN)
        told = events.wait_event("REPLICATION_ERROR")["data"]
    assert (told["case"], told["disk"], told["errno"]) == (2, "disk0", "ENOSPC")
    wait_until(lambda: secondary.status()["error"], "the secondary knows")
    fault = secondary.status()["error"]
    assert (fault["case"], fault["errno"]) == (3, "ENOSPC")
    assert rig.warnings()  # it had been said
    assert bytes(rig.guests[0].pread(SIZE, 0)) == face
    with pytest.raises(Exception, match="Backup job was cancelled unexpectedly"):
        secondary.checkpoint()
    small.grow(4 * ROOM)
    wait_until(lambda: primary.status()["disks"][0]["out-of-sync-bytes"] == 0, "it was sent again")
    wait_until(lambda: secondary.status()["error"] is None, "and the secondary is whole again")
    assert bytes(rig.guests[0].pread(SIZE, 0)) == face
    wait_until(lambda: primary.status()["error"] is None, "on the primary, too")
    assert primary.execute("query-xen-replication-status") == {"error": False}
    primary.checkpoint()
    assert secondary.execute("query-xen-replication-status") == {"error": False}
    assert bytes(rig.guests[0].pread(SIZE, 0)) == written
    assert secondary.disks[0].read_bytes() == primary.disks[0].read_bytes() == written
    # And on it goes.
    disk.pwrite(pattern(60, MIB), 3 * MIB)
    drained(primary)
    assert bytes(rig.guests[0].pread(SIZE, 0)) == written
    primary.checkpoint()
    written[3 * MIB : 4 * MIB] = pattern(60, MIB)
    assert bytes(rig.guests[0].pread(SIZE, 0)) == written


def test_an_overlay_that_was_full_heals_without_anybody_asking_the_primary(lab: Lab, small: SmallFolder) -> None:
    """What the primary reports is repaired as well, when all of it has arrived: nothing but room was missing."""
    rig = Rig(lab, small, primary=["timeout=5"])
    primary, disk = rig.primary, rig.disks[0]
    assert primary is not None
    for at in range(0, 10 * MIB, GRAIN):
        disk.pwrite(pattern(at + 1, GRAIN), at)
    wait_until(lambda: rig.secondary.status()["error"], "it is full")
    small.grow(4 * ROOM)
    with primary.qmp() as qmp:
        wait_until(lambda: qmp.execute("query-replication")["disks"][0]["out-of-sync-bytes"] == 0, "all has arrived")
        wait_until(lambda: qmp.execute("query-replication")["error"] is None, "the error is repaired")
    wait_until(lambda: rig.secondary.status()["error"] is None, "here, too")


# -- a manager that listens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("disks", [1, 2])
def test_a_manager_that_checkpoints_on_the_warning_never_sees_a_write_refused(
    lab: Lab, small: SmallFolder, disks: int
) -> None:
    """Six times what the tmpfs holds, the primary's guest and the secondary's taking turns, disk by disk: what one disk
    has left behind is room for the other."""
    rig = Rig(lab, small, disks, primary=["protocol=sync"])
    primary = rig.primary
    assert primary is not None
    written = [bytearray(old(index)) for index in range(disks)]
    faces = [bytes(content) for content in written]
    own: list[dict[int, bytes]] = [{} for _ in range(disks)]
    warnings = 0
    for turn in range(12):
        index = turn // 2 % disks
        for number in range(4 * MIB // GRAIN):
            at = (turn * 4 * MIB + number * GRAIN) % SIZE
            if turn % 2:
                data = pattern(1000 * turn + number, GRAIN)
                rig.guests[index].pwrite(data, at)
                own[index][at] = data
            else:
                data = pattern(1000 * turn + number, GRAIN)
                rig.disks[index].pwrite(data, at)
                written[index][at : at + GRAIN] = data
            if rig.warnings():
                warnings += 1
                assert_sees(rig, faces, own, index, at)
                primary.checkpoint()
                faces = [bytes(content) for content in written]
                own = [{} for _ in range(disks)]
    assert 4 <= warnings <= 16
    drained(primary)
    for server in (primary, rig.secondary):
        assert server.execute("query-xen-replication-status") == {"error": False}
    for index in range(disks):
        assert rig.secondary.disks[index].read_bytes() == primary.disks[index].read_bytes() == written[index]
        assert_sees(rig, faces, own, index, 0, SIZE)


def assert_sees(
    rig: Rig, faces: list[bytes], own: list[dict[int, bytes]], index: int, at: int, length: int = GRAIN
) -> None:
    """The guest face is the last checkpoint plus the guest's own writes."""
    expected = bytearray(faces[index])
    for offset, data in own[index].items():
        expected[offset : offset + len(data)] = data
    assert bytes(rig.guests[index].pread(length, at)) == expected[at : at + length]
