# SPDX-License-Identifier: BSD-3-Clause
"""images.py: which overlays are made, opened or refused, and what a restart of the host has left of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from content import make_raw, pattern, qemu_img
from replication.disk.file import FileDisk
from replication.errors import ConfigError
from replication.events import EventHub
from replication.fault import FaultLatch
from replication.image import qcow2
from replication.image.qcow2 import BLOCK, CLUSTER
from replication.options import DiskOptions, Durability, Options
from replication.record.ancestry import Ancestry
from replication.record.boot import BOOT_ID_ENVIRONMENT
from replication.record.changes import ChangeMap
from replication.record.lineage import Lineage
from replication.record.state import Record, StateFolder
from replication.secondary import images
from replication.secondary.disk import SecondaryDisk
from replication.secondary.images import Found, open_images
from replication.stage import Mode, Stage

SIZE = 2 * CLUSTER + 1234
GOOD = Found({}, None, False)


class Host:
    """A host with the disks of a secondary, over processes and boots."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
        self.folder = folder
        self._patch = monkeypatch
        self.names = names
        self.boot("first")
        for name in names:
            make_raw(folder / name, SIZE, pattern(1, SIZE))
        self.disks: list[SecondaryDisk] = []
        self.mapped: list[str] = []

    def boot(self, name: str) -> None:
        self._patch.setenv(BOOT_ID_ENVIRONMENT, name)

    def path(self, role: str, name: str = "a") -> Path:
        return self.folder / f"{name}.{role}.qcow2"

    @property
    def made(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - set(self.names)

    def record(self, stage: Stage, durability: str = "process", clean: bool = False, boot: str = "first") -> Record:
        """What the former process has left."""
        return Record(Mode.SECONDARY, stage, boot=boot, durability=durability, clean=clean)

    def start(self, record: Record, durability: str = "process") -> Found:
        """What the next process finds; its disks are open until `end`."""
        options = Options(
            Mode.SECONDARY,
            [
                DiskOptions(
                    name, str(self.folder / name), "t", str(self.path("active", name)), str(self.path("hidden", name))
                )
                for name in self.names
            ],
            str(self.folder),
            None,
            durability=Durability(durability),
        )
        faults = FaultLatch(EventHub(), lambda: None)
        ancestry = Ancestry(StateFolder(None), record, lambda: None)
        self.disks = [
            SecondaryDisk(name, "t", FileDisk(name, str(self.folder / name)), faults, ancestry) for name in self.names
        ]
        self.mapped = []

        def then(disk: SecondaryDisk) -> None:
            self.mapped.append(disk.name)
            disk.open_maps(lambda kind: ChangeMap(None, SIZE))

        return open_images(self.disks, options, record, then)

    def end(self) -> None:
        for disk in self.disks:
            disk.close()
        self.disks = []

    def first_start(self, durability: str = "process") -> None:
        """A process in stage none, which makes the images, writes one block of each kind and ends."""
        assert self.start(Record(Mode.SECONDARY), durability) == GOOD
        for disk in self.disks:
            assert disk.stack is not None
            disk.stack.write_top(memoryview(b"\xaa" * BLOCK), 0)
            disk.stack.target.write(memoryview(b"\xbb" * BLOCK), BLOCK, False)
            disk.stack.flush_all()
        self.end()

    def seen(self) -> bytes:
        stack = self.disks[0].stack
        assert stack is not None
        data = bytearray(2 * BLOCK)
        stack.read(memoryview(data), 0)
        return bytes(data)


CONTENT = b"\xaa" * BLOCK + pattern(1, SIZE)[BLOCK : 2 * BLOCK]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    # Where the tests run may be in memory; which file system it is has tests of its own.
    monkeypatch.setattr(images, "_file_system", lambda device: "ext4")
    return Host(tmp_path, monkeypatch, ("a", "b"))


@pytest.fixture(autouse=True)
def _end(host: Host) -> object:
    yield
    host.end()


# -- making and refusing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["process", "power"])
def test_in_stage_none_images_that_do_not_exist_are_made(host: Host, durability: str) -> None:
    assert host.start(Record(Mode.SECONDARY), durability) == GOOD
    assert host.mapped == ["a", "b"]
    for disk in host.disks:
        assert disk.stack is not None
        assert disk.stack.target.lost is disk.lost
        assert disk.stack.power == (durability == "power")
        assert (disk.stack.active.role, disk.stack.hidden.role) == ("active", "hidden")
    assert {str(host.path(role, name).name) for role in ("active", "hidden") for name in ("a", "b")} <= host.made
    assert qcow2.read_layout(str(host.path("active"))).backing == str(host.path("hidden"))
    assert qcow2.read_layout(str(host.path("hidden"))).backing == str(host.folder / "a")


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_start_that_is_refused_because_of_one_image_has_made_none(host: Host, durability: str) -> None:
    host.path("hidden", "b").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"b\.hidden\.qcow2"):
        host.start(Record(Mode.SECONDARY), durability)
    assert host.made == {"b.hidden.qcow2"}
    assert host.mapped == []


def test_an_image_that_cannot_be_made_takes_the_others_with_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = images.create

    def create(path: str, *rest: object) -> None:
        if path.endswith("b.active.qcow2"):
            raise ConfigError("cannot create it")
        real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "create", create)
    with pytest.raises(ConfigError, match="cannot create it"):
        host.start(Record(Mode.SECONDARY), "power")
    assert host.made == set()


def test_a_failure_behind_the_images_closes_and_takes_away_what_was_made(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("no map")

    monkeypatch.setattr(SecondaryDisk, "open_maps", refuse)
    with pytest.raises(ConfigError, match="no map"):
        host.start(Record(Mode.SECONDARY))
    assert host.made == set()
    # Of this test's folder: what failed in another one may not have been collected yet.
    left = [_target(name) for name in os.listdir("/proc/self/fd")]
    assert not [path for path in left if path.startswith(f"{host.folder}/") and "hidden" in path]


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""  # the listing's own


def test_another_backing_file_is_refused_because_writing_over_it_would_destroy_data(host: Host) -> None:
    make_raw(host.folder / "other", SIZE)
    qcow2.create(str(host.path("hidden")), str(host.folder / "other"), "raw", SIZE)
    with pytest.raises(ConfigError, match=r"a\.hidden\.qcow2 of disk 'a' has the backing file .*/other, not .*/a"):
        host.start(Record(Mode.SECONDARY))


def test_images_that_start_will_refuse_are_looked_at_and_let_go_of(host: Host) -> None:
    qemu_img(
        "create", "-f", "qcow2", "-o",
        f"extended_l2=on,cluster_size=128k,preallocation=metadata,data_file={host.folder}/a.active.data",
        host.path("active"), str(qcow2.image_size(SIZE)),
    )  # fmt: skip
    found = host.start(Record(Mode.SECONDARY))
    assert found == Found({"a": "Active disk doesn't have backing file"}, None, False)
    assert host.disks[0].stack is None
    assert host.disks[1].stack is not None
    host.end()
    with pytest.raises(ConfigError, match="disk 'a': Active disk doesn't have backing file"):
        host.start(host.record(Stage.RUNNING))


def test_images_of_another_length_are_refused_with_qemus_words(host: Host) -> None:
    qcow2.create(str(host.path("hidden")), str(host.folder / "a"), "raw", SIZE + CLUSTER)
    found = host.start(Record(Mode.SECONDARY))
    assert found.refusals == {"a": "Active disk, hidden disk, secondary disk's length are not the same"}


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_with_durability_power_no_overlay_may_be_in_memory(
    host: Host, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(images, "_file_system", lambda device: kind)
    with pytest.raises(
        ConfigError, match=rf"durability=power, but .*a\.hidden\.qcow2 .* is in {kind}, which a power cut"
    ):
        host.start(Record(Mode.SECONDARY), "power")
    assert host.made == set()
    host.end()
    assert host.start(Record(Mode.SECONDARY), "process") == GOOD


@pytest.mark.parametrize("what", ["secondary disk", "data file of the hidden disk", "state folder"])
def test_with_durability_power_nothing_that_counts_may_be_in_memory(
    host: Host, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert host.start(Record(Mode.SECONDARY), "process") == GOOD
    host.end()
    place = {
        "secondary disk": host.folder / "a",
        "data file of the hidden disk": Path(qcow2.default_data_path(str(host.path("hidden")))),
        "state folder": host.folder,
    }[what]
    below = images._memory_below
    monkeypatch.setattr(images, "_memory_below", lambda path: "tmpfs" if path == str(place) else below(path))
    with pytest.raises(
        ConfigError, match=rf"durability=power, but {place} \(.*{what}.* is in tmpfs, which a power cut"
    ):
        host.start(Record(Mode.SECONDARY), "power")


def test_what_is_in_memory_is_seen_through_links_loops_and_mapped_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    sysfs = tmp_path / "sys"
    for name in ("ram0", "zram1", "sda", "loop0/loop", "loop1/loop", "dm-0/slaves", "dm-1/slaves"):
        (sysfs / name).mkdir(parents=True)
    monkeypatch.setattr(images, "_file_system", lambda device: "tmpfs" if device == 7 else "ext4")
    status = os.stat_result((0o100600, 1, 7, 1, 0, 0, 0, 0, 0, 0))
    real = os.stat
    monkeypatch.setattr(images.os, "stat", lambda path: status if str(path) == "/run/image" else real(path))
    (sysfs / "loop0/loop/backing_file").write_text("/run/image\n")
    (sysfs / "loop1/loop/backing_file").write_text(f"{tmp_path}\n")
    (sysfs / "dm-0/slaves/sda").symlink_to(sysfs / "sda")
    (sysfs / "dm-0/slaves/loop0").symlink_to(sysfs / "loop0")
    (sysfs / "dm-1/slaves/sda").symlink_to(sysfs / "sda")
    found = {name: images._memory_device(str(sysfs / name)) for name in sorted(os.listdir(sysfs))}
    assert found == {
        "ram0": "ram0",
        "zram1": "zram1",
        "sda": None,
        "loop0": "tmpfs",
        "loop1": None,
        "dm-0": "tmpfs",
        "dm-1": None,
    }


def test_a_folder_that_is_not_there_is_a_clear_error(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "path", lambda self, role, name="a": self.folder / "nowhere" / f"{name}.{role}.qcow2")
    with pytest.raises(ConfigError, match=r"cannot use the folder .*/nowhere of disk 'a': No such file"):
        host.start(Record(Mode.SECONDARY), "power")


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a tmpfs at /dev/shm")
def test_the_file_system_of_a_folder_is_found_in_the_kernels_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert images._file_system(os.stat("/dev/shm").st_dev) == "tmpfs"
    assert images._file_system(os.stat("/proc").st_dev) == "proc"
    assert images._file_system(os.makedev(4095, 1)) is None


# -- the table of the module's docstring ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.RUNNING, Stage.FAILOVER, Stage.FAILOVER_FAILED], ids=lambda stage: stage.value)
@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("clean", [False, True], ids=["killed", "ended"])
def test_in_the_same_boot_everything_is_as_it_was_left(host: Host, stage: Stage, durability: str, clean: bool) -> None:
    host.first_start(durability)
    assert host.start(host.record(stage, durability, clean), durability) == GOOD
    assert host.seen() == CONTENT


@pytest.mark.parametrize("role", ["active", "hidden"])
@pytest.mark.parametrize("clean", [False, True], ids=["killed", "ended"])
def test_in_the_same_boot_a_missing_image_is_refused_and_may_come_back(host: Host, role: str, clean: bool) -> None:
    host.first_start()
    away = host.folder / "away"
    host.path(role).rename(away)
    with pytest.raises(ConfigError, match=rf"a\.{role}\.qcow2 of disk 'a' is gone.*bring it back"):
        host.start(host.record(Stage.RUNNING, clean=clean))
    assert not host.path(role).exists()
    host.end()
    away.rename(host.path(role))
    assert host.start(host.record(Stage.RUNNING, clean=clean)) == GOOD
    assert host.seen() == CONTENT


@pytest.mark.parametrize("own", [False, True])
def test_of_a_disk_with_own_writes_nobody_is_told_to_copy_another_over_it(host: Host, own: bool) -> None:
    """A node that was demoted; if nobody else has what it wrote as the owner, the state folder is not given up."""
    host.first_start()
    host.path("hidden").unlink()
    record = host.record(Stage.RUNNING)
    record.lineage = Lineage("1" * 16, base="2" * 16, shared=not own, history=("2" * 16,)).to_json()
    with pytest.raises(ConfigError) as refusal:
        host.start(record)
    assert ("copy the disk anew from the primary" in str(refusal.value)) != own
    assert ("writes that no other node has" in str(refusal.value)) == own


@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        (Stage.NONE, None),
        (Stage.RUNNING, "it may hold the last checkpoint"),
        (Stage.FAILOVER, "it may hold what no other node has"),
        (Stage.FAILOVER_FAILED, "it may hold what no other node has"),
    ],
)
@pytest.mark.parametrize("how", ["corrupt", "dirty", "gone"])
def test_an_image_that_may_be_needed_is_to_be_copied_before_it_is_removed(
    host: Host, stage: Stage, needed: str | None, how: str
) -> None:
    host.first_start()
    path = host.path("active")
    header = bytearray(path.read_bytes()[:104])
    if how == "gone":
        path.unlink()
        host.boot("second")  # in this one it might be brought back
    else:
        header[79] |= {"corrupt": 2, "dirty": 1}[how]  # incompatible features, big-endian
        with path.open("r+b") as file:
            file.write(header)
    with pytest.raises(ConfigError, match=r"remove it|repair it|remove the other") as refusal:
        host.start(host.record(stage))
    assert ("copy it and the disk before anything else" in str(refusal.value)) == (needed is not None)
    assert (needed or "") in str(refusal.value)


@pytest.mark.parametrize("durability", ["process", "power"])
def test_in_another_boot_after_a_good_end_everything_is_as_it_was_left(host: Host, durability: str) -> None:
    host.first_start(durability)
    host.boot("second")
    assert host.start(host.record(Stage.RUNNING, durability, clean=True), durability) == GOOD
    assert host.seen() == CONTENT


@pytest.mark.parametrize("clean", [False, True], ids=["killed", "ended"])
def test_in_another_boot_an_image_that_is_gone_was_in_memory_and_the_checkpoint_is_lost(
    host: Host, clean: bool
) -> None:
    host.first_start()
    for path in (host.path("active"), host.folder / "a.active.data"):
        path.unlink()
    host.boot("second")
    found = host.start(host.record(Stage.RUNNING, clean=clean))
    assert found.lost is not None
    assert found.lost.startswith("the host was restarted, and with it ")
    assert found.lost.endswith("a.active.qcow2 has gone")
    assert (found.refusals, found.unflushed) == ({}, False)
    assert host.path("active").exists(), "so that a resync can begin"


@pytest.mark.parametrize("stage", [Stage.RUNNING, Stage.FAILOVER, Stage.FAILOVER_FAILED], ids=lambda stage: stage.value)
def test_in_another_boot_a_killed_process_without_durability_has_lost_the_checkpoint(host: Host, stage: Stage) -> None:
    host.first_start()
    host.boot("second")
    found = host.start(host.record(stage, "process"))
    assert found.lost == "the host was restarted without warning, and durability=process does not outlive that"
    assert not found.unflushed


@pytest.mark.parametrize(
    ("stage", "unflushed"),
    [(Stage.RUNNING, True), (Stage.FAILOVER, False), (Stage.FAILOVER_FAILED, False)],
    ids=lambda value: getattr(value, "value", value),
)
def test_in_another_boot_with_durability_power_the_checkpoint_is_valid_and_a_running_disk_may_lack_writes(
    host: Host, stage: Stage, unflushed: bool
) -> None:
    host.first_start("power")
    host.boot("second")
    assert host.start(host.record(stage, "power"), "power") == Found({}, None, unflushed)
    assert host.seen() == CONTENT


@pytest.mark.parametrize(("former", "latter"), [("process", "power"), ("power", "process")])
def test_the_durability_of_the_process_that_was_cut_off_counts_not_that_of_the_next(
    host: Host, former: str, latter: str
) -> None:
    host.first_start(former)
    host.boot("second")
    found = host.start(host.record(Stage.RUNNING, former), latter)
    assert (found.lost is None) == (former == "power")


def test_a_record_without_a_boot_counts_as_of_this_one(host: Host) -> None:
    host.first_start()
    record = Record(Mode.SECONDARY, Stage.RUNNING, boot=None)
    assert host.start(record) == GOOD


def test_in_stage_none_a_restart_of_the_host_is_of_no_consequence(host: Host) -> None:
    host.first_start()
    host.boot("second")
    assert host.start(host.record(Stage.NONE)) == GOOD
