# SPDX-License-Identifier: BSD-3-Clause
"""Opening the overlays of a secondary: making those that do not exist, refusing those that would lose data, and finding
out what a restart of the host has left of them.

What a start of the process finds, by who may have changed the images since (`record` is the former process's):

    same boot                       everything is as the process left it; a missing image is refused, it may come back
    other boot, ended in good order as the same boot, but an image in tmpfs is gone
    other boot, durability=power    what was stable is right (image/stack.py, "Stable storage"): the last checkpoint is.
                                    The disk may lack what the primary wrote after the last flush.
    other boot, durability=process  the kernel wrote data and bits in an order of its own: the last checkpoint is lost
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from replication.disk import files
from replication.errors import ConfigError, DiskError
from replication.image.overlay import Overlay, ReadOnlyImage
from replication.image.qcow2 import Layout, create, image_size, read_layout, remove
from replication.image.stack import Stack
from replication.image.table import remove_live
from replication.log import log
from replication.options import DiskOptions, Durability, Options
from replication.record.boot import boot_id
from replication.record.lineage import Lineage
from replication.record.state import Record
from replication.secondary.disk import SecondaryDisk
from replication.stage import Stage
from replication.uri import absolute, is_uri

_MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs"))
_MEMORY_DEVICES = ("ram", "zram")


class Found(NamedTuple):
    """What opening the images has found out."""

    refusals: dict[str, str]
    """Why `start` is refused, by disk name: images that can be looked at but not used."""
    lost: str | None
    """Why there is no valid checkpoint."""
    unflushed: bool
    """The disks may lack writes that the primary was answered for."""


def open_images(
    disks: list[SecondaryDisk], options: Options, record: Record, then: Callable[[SecondaryDisk], None]
) -> Found:
    """Open the overlays of all disks, call `then(disk)` for each and give it its stack; ConfigError, with no image made
    or changed."""
    return _Opening(disks, options, record).run(then)


class _Opening:
    def __init__(self, disks: list[SecondaryDisk], options: Options, record: Record) -> None:
        self._disks = disks
        self._options = options
        self._fresh = record.stage is Stage.NONE
        self._power = options.durability is Durability.POWER
        self._rebooted = record.boot is not None and record.boot != boot_id()
        self._torn = record.cut_off
        self._trusted = record.durability == Durability.POWER.value
        self._running = record.stage is Stage.RUNNING
        self._committing = record.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED)
        self._former_disks = record.former_disks
        self._opened: dict[str, Overlay | None] = {}
        self._refusals: dict[str, str] = {}
        lineage = Lineage() if record.lineage is None else Lineage.from_json(record.lineage)
        self._own = bool(lineage.current) and not (lineage.shared or lineage.discard or lineage.incoming)
        """The disks hold what no other node has, and nobody has given that up."""

    def run(self, then: Callable[[SecondaryDisk], None]) -> Found:
        """In stage none images that do not exist are made, after all that do were found to be good; a start that is
        refused all the same takes away what it has made."""
        wanted = [
            (disk, role, path, base)
            for disk, options in zip(self._disks, self._options.disks, strict=True)
            for role, path, base in (
                ("hidden", _known(options.hidden), _known(options.location)),
                ("active", _known(options.active), _known(options.hidden)),
            )
        ]
        made: list[str] = []
        try:
            for disk, role, path, _ in wanted:
                if self._power:
                    _refuse_memory(f"{role} disk of '{disk.name}'", f"disk '{disk.name}'", path)
                if os.path.lexists(path):
                    with self._kept_in_mind():
                        self._opened[path] = self._grown(disk, self._open(role, disk, path))
                    if self._power:
                        overlay = self._opened[path]
                        layout = read_layout(path) if overlay is None else overlay.layout
                        _refuse_memory(
                            f"data file of the {role} disk of '{disk.name}'", f"disk '{disk.name}'", layout.data_path
                        )
                elif self._committing and not self._rebooted:
                    raise ConfigError(
                        f"{path} of disk '{disk.name}' is gone, and with it what the failover has not brought down "
                        "yet: bring it back. The disk alone has a part of it, and no other node has the rest"
                    )
                elif not self._fresh and not self._rebooted:
                    raise ConfigError(
                        f"{path} of disk '{disk.name}' is gone, and with it the last checkpoint: bring it back"
                        + (
                            ". The disk has writes that no other node has: copy it before anything else"
                            if self._own
                            else f", or give up the state folder {self._options.state} and copy the disk anew from the "
                            "primary"
                        )
                    )
            if self._power:
                self._refuse_memory_below()
            for disk, role, path, base in wanted:
                if path not in self._opened:
                    with self._kept_in_mind():
                        create(path, base, "raw" if role == "hidden" else "qcow2", disk.size)
                    made.append(path)
                    self._opened[path] = self._open(role, disk, path)
            for folder in sorted({os.path.dirname(path) for *_, path, _ in wanted} - {self._options.state}):
                files.warn_of_others("the overlays' folder", folder)
            pairs = [
                self._pair(disk, disk_options)
                for disk, disk_options in zip(self._disks, self._options.disks, strict=True)
            ]
            for disk, pair in zip(self._disks, pairs, strict=True):
                then(disk)
                if pair is not None:
                    disk.stack = Stack(*pair, disk.disk, disk.lost)
        except BaseException:
            for overlay in self._opened.values():
                if overlay is not None:
                    overlay.close()
            for path in made:
                remove(path)
                remove_live(path)
            raise
        if self._fresh:
            return Found(self._refusals, None, False)
        return self._after_restart(made)

    @contextlib.contextmanager
    def _kept_in_mind(self) -> Iterator[None]:
        """What an error says of an image (to remove it, say) is not for one that is still needed."""
        try:
            yield
        except ReadOnlyImage:
            raise
        except ConfigError as error:
            if self._fresh:
                raise
            needed = "the failover is not done, so it may hold what no other node has"
            if not self._committing:
                needed = "it may hold the last checkpoint"
            raise ConfigError(f"{error}. But copy it and the disk before anything else: {needed}") from error

    def _refuse_memory_below(self) -> None:
        """ConfigError when the disks, or the state folder with the number of the last checkpoint, are in memory."""
        for disk in self._options.disks:
            place = _known(disk.location)
            if not is_uri(place):  # of a server's disk its server knows
                _refuse_memory(f"secondary disk '{disk.name}'", f"disk '{disk.name}'", place)
        if self._options.state is not None:
            _refuse_memory("the state folder", "the state", self._options.state)

    def _after_restart(self, made: list[str]) -> Found:
        lost = None
        if made:
            lost = f"the host was restarted, and with it {made[0]} has gone"
        elif self._torn and not self._trusted:
            lost = "the host was restarted without warning, and durability=process does not outlive that"
        return Found({}, lost, lost is None and self._torn and self._running)

    def _open(self, role: str, disk: SecondaryDisk, path: str) -> Overlay | None:
        """None for an image that cannot be written, where `start` is going to say so."""
        try:
            return Overlay(role, disk.name, path, self._power)
        except ReadOnlyImage as error:
            if not self._fresh:
                raise
            log(str(error))
            return None

    def _grown(self, disk: SecondaryDisk, overlay: Overlay | None) -> Overlay | None:
        """The overlay of a disk that has grown since it was used, as large as the disk. A kill in the midst of that
        costs nothing: the former image counts until the new one, which holds the same, has its name."""
        former = self._former_disks.get(disk.name)
        if overlay is None:
            return None
        overlay.drop_growth()
        try:
            if former is not None and image_size(former) <= overlay.layout.size < image_size(disk.size):
                overlay.prepare_growth(disk.size)
                overlay.copy_words()
                overlay.grow()
        except BaseException as error:
            overlay.close()
            if isinstance(error, DiskError):
                raise ConfigError(f"disk '{disk.name}' has grown, but not its overlay: {error}") from error
            raise
        return overlay

    def _pair(self, disk: SecondaryDisk, options: DiskOptions) -> tuple[Overlay, Overlay] | None:
        """Active and hidden of one disk, or None, having noted why `start` will be refused."""
        active, hidden = self._opened[_known(options.active)], self._opened[_known(options.hidden)]
        layouts = [
            read_layout(path) if overlay is None else overlay.layout
            for overlay, path in ((active, _known(options.active)), (hidden, _known(options.hidden)))
        ]
        refusal = _refusal(layouts[0], layouts[1], disk, options, self._options.folder)
        if refusal is None and active is not None and hidden is not None:
            return active, hidden
        refusal = refusal or "Active disk or hidden disk doesn't support make_empty"
        if not self._fresh:
            raise ConfigError(f"disk '{disk.name}': {refusal}")
        for overlay in (active, hidden):
            if overlay is not None:
                overlay.close()
        self._refusals[disk.name] = refusal
        return None


def _refusal(active: Layout, hidden: Layout, disk: SecondaryDisk, options: DiskOptions, folder: str) -> str | None:
    """What start says to these images (QEMU's texts, in QEMU's order), None if it accepts them. A wrong backing
    file, which QEMU cannot see, is a ConfigError: writing over it would destroy data."""
    if active.backing is None:
        return "Active disk doesn't have backing file"
    if hidden.backing is None:
        return "Hidden disk doesn't have backing file"
    for path, layout, expected in (
        (options.active, active, options.hidden),
        (options.hidden, hidden, options.location),
    ):
        found = layout.backing
        assert expected is not None
        assert found is not None
        if not _same_place(found, expected, folder):
            raise ConfigError(f"{path} of disk '{disk.name}' has the backing file {found}, not {expected}")
    if not active.size == hidden.size == image_size(disk.size):
        return "Active disk, hidden disk, secondary disk's length are not the same"
    return None


def _same_place(found: str, expected: str, folder: str) -> bool:
    """Whether an image's backing file is what the options say; relative paths in URIs count from `folder`."""
    if is_uri(expected):
        return is_uri(found) and absolute(found, folder) == expected
    return os.path.realpath(found) == os.path.realpath(expected)


def _refuse_memory(what: str, owner: str, path: str) -> None:
    """ConfigError for a file that would not outlive a power cut whatever is done, or will not once it is made."""
    try:
        kind = _memory_below(os.path.realpath(path))
    except OSError as error:
        raise ConfigError(f"cannot use the folder {os.path.dirname(path)} of {owner}: {error.strerror}") from error
    if kind is not None:
        raise ConfigError(
            f"durability=power, but {path} ({what}) is in {kind}, which a power cut empties: "
            "put it on a disk, or use durability=process"
        )


def _memory_below(path: str) -> str | None:
    """The kind of memory that holds a file or a block device, None if it is on a disk as far as one can see."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = os.stat(os.path.dirname(path))
    if not stat.S_ISBLK(status.st_mode):
        kind = _file_system(status.st_dev)
        return kind if kind in _MEMORY_FILE_SYSTEMS else None
    return _memory_device(os.path.realpath(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"))


def _memory_device(device: str) -> str | None:
    """As `_memory_below`, for a block device by its folder in sysfs."""
    name = os.path.basename(device)
    if name.startswith(_MEMORY_DEVICES):
        return name
    with contextlib.suppress(OSError), open(f"{device}/loop/backing_file", encoding="utf-8") as file:
        return _memory_below(file.read().rstrip("\n"))
    with contextlib.suppress(OSError):
        for below in os.listdir(f"{device}/slaves"):  # device mapper, md
            kind = _memory_device(os.path.realpath(f"{device}/slaves/{below}"))
            if kind is not None:
                return kind
    return None


def _file_system(device: int) -> str | None:
    """The type of a mounted file system, from /proc/self/mountinfo (proc(5)); None for one that is not listed there
    under the device number that stat(2) gives (btrfs)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
        for line in table:
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    return None


def _known(path: str | None) -> str:
    """An option that options.py has completed."""
    assert path is not None
    return path
