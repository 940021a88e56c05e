# SPDX-License-Identifier: BSD-3-Clause
"""Whether the secondary that is started after a cut has what was promised.

The content of a face is checked sector by sector. Permitted is what a write put there that had begun before the cut,
unless a later one that is known to be stable covers it; and what was there at first (for the guest face: at the
checkpoint), unless a stable write covers it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from power.history import ISLANDS, SIZES, History, Process, Request
from power.recorder import NEVER, SECTOR, File, Recorder, without_syncs
from replication.errors import CommandError, ReplicationError
from replication.record.twin import TwinFile

Bytes = npt.NDArray[np.uint8]
Content = dict[int, bytes]
"""The sectors of a file that are not zeroes."""

_QEMU_S = 60

_AGAIN = 0.15
"""How often the recovery is cut, too."""


class Violation(AssertionError):
    """A state that a cut permits does not lead to what was promised."""


class Sample:
    """One state after a cut of one history."""

    def __init__(self, history: History, cut: int, sample: int) -> None:
        self._history = history
        self._cut = cut
        self._choice = random.Random(f"{history.seed} {cut} {sample}")
        self._folder = Path(history.folder)
        self._state_file = str(self._folder / "state" / "state.json")

    def check(self, qemu: bool = False) -> str:
        """Put the files there, start a process, and look; the stage that was found. Violation says what is wrong.
        `qemu`: look with qemu-img, too, before the process starts."""
        contents = {path: file.cut(self._cut, self._choice) for path, file in self._history.files.items()}
        self._restore(contents)
        try:
            if qemu:
                self._check_images()
            if self.stage in ("running", "failover") and self._choice.random() < _AGAIN:
                self._cut_again(contents)
            else:
                with without_syncs():
                    self._recover()
        except ReplicationError as error:
            raise self._violation(f"{type(error).__name__}: {error}") from error
        return self.stage

    def _violation(self, what: str) -> Violation:
        return Violation(what)

    # -- the state -----------------------------------------------------------------------------------------

    def _restore(self, contents: dict[str, Content]) -> None:
        for path, content in contents.items():
            _write(path, content, self._history.files[path].size)
        record, self._record_begun = self._find_record()
        self.stage = str(record.get("stage", "none"))
        # The stage was saved again, perhaps, by the processes that followed.
        saved = ((item.begun, _members(item.content)) for item in self._history.records)
        self._done_begun = next((begun for begun, members in saved if members.get("stage") == "done"), NEVER)
        self.clean = bool(record.get("clean", False))
        for path, (first, last) in self._history.mapped.items():
            Path(path).unlink(missing_ok=True)
            if path.endswith(".live") and self._choice.random() < 0.5:
                continue
            mixed = bytearray(first)
            for at in range(0, len(mixed), SECTOR):
                if first[at : at + SECTOR] != last[at : at + SECTOR] and self._choice.random() < 0.5:
                    mixed[at : at + SECTOR] = last[at : at + SECTOR]
            for number, (begun, at, seal) in enumerate(self._history.seals.get(path, ())):
                if not number:
                    mixed[at : at + len(seal)] = first[at : at + len(seal)]
                if begun <= self._cut:
                    mixed[at : at + len(seal)] = seal
            Path(path).write_bytes(mixed)

    def _find_record(self) -> tuple[dict[str, Any], int]:
        """What a process finds in state.json and its twin, {} where nothing has been saved, and when it was written:
        the last one that was stable, or one that was begun after it."""
        file = TwinFile(self._state_file)
        try:
            found = file.read() or {}
        except (ValueError, TypeError) as error:
            raise self._violation(f"the state file cannot be understood: {error}") from error
        finally:
            file.close()
        begun = [item for item in self._history.records if item.begun <= self._cut]
        stable = max((number for number, item in enumerate(begun, 1) if item.ended <= self._cut), default=0)
        permitted = [({}, NEVER), *((_members(item.content), item.begun) for item in begun)][stable:]
        for members, when in permitted:
            if members == found:
                return found, when
        raise self._violation(f"the state file says {found.get('stage')}, which is not what was saved last")

    # -- what may be there ---------------------------------------------------------------------------------

    def _promised(self, face: str, disk: int) -> Callable[[Request], bool]:
        """Whether a request's data must be stable, by what was answered before the cut."""
        flushes = [
            request.begun
            for request in self._history.requests
            if (request.face, request.disk, request.data) == (face, disk, None) and request.ended <= self._cut
        ]
        if self.clean:
            flushes.append(self._record_begun)
        if face == "disk":
            # A checkpoint and a planned stop count only what is stable.
            flushes += [begun for epoch, begun in self._history.epochs.items() if epoch <= self._epoch]
            if self.stage == "done":
                flushes.append(self._done_begun)
        synced = max(flushes, default=0)
        return lambda request: request.ended < synced or (request.fua and request.ended <= self._cut)

    def _check_content(
        self, what: str, face: str, disk: int, read: Callable[[int, int], bytes], base: Content, since: int
    ) -> None:
        """`base` is the content at tick `since`; requests of the face begun before do not count."""
        promised = self._promised(face, disk)
        writes = [
            (request, promised(request))
            for request in self._history.requests
            if request.face == face and request.disk == disk and request.data is not None
            if since < request.begun <= self._cut
        ]
        for island, length in ISLANDS[disk]:
            found = np.frombuffer(read(island, length), np.uint8)
            wrong = _wrong_sectors(found, _part(base, island, length), island, writes, self._cut)
            if wrong.size:
                at = island + int(wrong[0]) * SECTOR
                raise self._violation(
                    f"{what} of disk {disk}: {wrong.size} sectors from {at} hold what nobody promised"
                )

    def _bases(self) -> tuple[list[Content], int]:
        """What the guest face shows where the guest has not written, and since when its writes count."""
        history = self._history
        since = history.epochs[self._epoch]
        if self.stage == "done" and not any(command.name == "failover" for command in history.commands):
            since = self._done_begun  # a planned stop: all that the primary has written
        return [history.files[history.disk_path(disk)].at(since) for disk in range(len(SIZES))], since

    # -- recovery ------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        process = Process(self._folder, "boot-2")
        try:
            self._epoch = process.epoch
            self._check_commands(process)
            if self.stage == "none":
                process.node.launch()
                self._check_target()
                return
            bases, since = self._bases()
            if self.stage == "running":
                self._check_target()
                process.node.launch()
                before = [self._guest(process, disk) for disk in range(len(SIZES))]
                for disk in range(len(SIZES)):
                    self._check_content("the guest face", "top", disk, _reader(before[disk], disk), bases[disk], since)
                self._check_refusals(process)
                process.node.stop(True)
            else:
                process.node.launch()
            process.wait_done()
            if process.node.stage.value != "done":
                raise self._violation(f"the stage is {process.node.stage.value}: {process.node.query()['error']}")
            for disk in range(len(SIZES)):
                path = self._history.disk_path(disk)
                self._check_content("the raw disk", "top", disk, partial(_read, path), bases[disk], since)
                if self.stage == "running" and [_read(path, *item) for item in ISLANDS[disk]] != before[disk]:
                    raise self._violation(f"failover has changed disk {disk}")
                if self._guest(process, disk) != [_read(path, *item) for item in ISLANDS[disk]]:
                    raise self._violation(f"the guest face of disk {disk} is not the disk although the stage is done")
        finally:
            process.abandon()

    def _cut_again(self, contents: dict[str, Content]) -> None:
        """Another cut, while the process recovers and fails over. What the guest saw after the first was stable, and
        it has written nothing since, so it is exactly that."""
        recorder = Recorder(0, False)
        before = {path: Path(path).read_bytes() for path in self._history.mapped if Path(path).exists()}
        recorder.files = {path: File(self._history.files[path].size, content) for path, content in contents.items()}
        with recorder.installed():
            process = Process(self._folder, "boot-2")
            try:
                seen = [self._guest(process, disk) for disk in range(len(SIZES))]
                process.node.launch()
                if self.stage == "running":
                    process.node.stop(True)
                process.wait_done()
            finally:
                process.abandon()
        cut = self._choice.randint(0, recorder.now)
        for path, file in recorder.files.items():
            _write(path, file.cut(cut, self._choice), file.size)
        for path, seals in recorder.seals.items():
            at = seals[0][1]
            begun = [before[path][at:], *(seal for when, _, seal in seals if when <= cut)]
            with open(path, "r+b") as file_of_map:
                file_of_map.seek(at)
                file_of_map.write(begun[-1])
        with without_syncs():
            process = Process(self._folder, "boot-3")
            try:
                process.node.launch()
                if process.node.stage.value == "running":
                    if [self._guest(process, disk) for disk in range(len(SIZES))] != seen:
                        raise self._violation("a second cut has changed the guest face")
                    process.node.stop(True)
                process.wait_done()
                found = [[_read(self._history.disk_path(disk), *item) for item in ISLANDS[disk]] for disk in range(2)]
                if process.node.stage.value != "done" or found != seen:
                    raise self._violation(f"after a second cut at {cut} of {recorder.now} the disks are wrong")
            finally:
                process.abandon()

    def _guest(self, process: Process, disk: int) -> list[bytes]:
        return [process.read(f"top{disk}", *item) for item in ISLANDS[disk]]

    def _check_commands(self, process: Process) -> None:
        """Stage and epoch are those of a command that was answered, or of a later one that had begun."""
        if process.node.stage.value != self.stage:
            raise self._violation(f"the stage is {process.node.stage.value}, but the record said {self.stage}")
        answered = [command for command in self._history.commands if command.ended <= self._cut]
        allowed = {"start": ("running", "failover", "done"), "stop": ("done",), "failover": ("failover", "done")}
        for command in answered:
            if self.stage not in allowed.get(command.name, (self.stage,)):
                raise self._violation(f"{command.name} was answered, but the stage is {self.stage}")
            if command.epoch > self._epoch:
                raise self._violation(f"checkpoint {command.epoch} was answered, but the epoch is {self._epoch}")
        begun = max((epoch for epoch, tick in self._history.epochs.items() if tick <= self._cut), default=0)
        if self._epoch > begun:
            raise self._violation(f"the epoch is {self._epoch}, but only {begun} had begun")
        if process.node.query()["consistent"] is not True:
            raise self._violation("the process says that the last checkpoint is lost")

    def _check_target(self) -> None:
        for disk in range(len(SIZES)):
            path = self._history.disk_path(disk)
            first = self._history.files[path].at(0)
            self._check_content("the secondary disk", "disk", disk, partial(_read, path), first, 0)

    def _check_refusals(self, process: Process) -> None:
        """Writes after the last flush may be missing: what counts on the disk being complete is refused until a resync,
        unless the process had ended in good order."""
        if self.clean:
            return
        for what in (process.node.checkpoint, lambda: process.node.stop(False)):
            try:
                what()
            except CommandError:
                continue
            raise self._violation("a checkpoint or planned stop is accepted although writes may be missing")
        if process.node.get_error() is None or process.node.query_failover()["allowed"] is not True:
            raise self._violation("get-error or query-failover is wrong after an unclean end")

    # -- qemu-img ------------------------------------------------------------------------------------------

    def _check_images(self) -> None:
        """The images themselves are right, for QEMU's tools, too, in stage running outside a checkpoint."""
        state = self._folder / "state"
        epoch = int.from_bytes((state / "epoch").read_bytes()[:8], "little")
        for disk in range(len(SIZES)):
            active = state / f"disk{disk}.active.qcow2"
            for image in (active, state / f"disk{disk}.hidden.qcow2"):
                self._qemu_img("check", "-q", "-f", "qcow2", str(image))
            if self.stage != "running" or epoch & 1:
                continue
            self._epoch = epoch >> 1
            bases, since = self._bases()
            converted = str(self._folder / "converted.raw")
            self._qemu_img("convert", "-f", "qcow2", "-O", "raw", str(active), converted)
            self._check_content("qemu-img convert", "top", disk, partial(_read, converted), bases[disk], since)

    def _qemu_img(self, *arguments: str) -> None:
        done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, timeout=_QEMU_S, check=False)
        if done.returncode:
            raise self._violation(f"qemu-img {' '.join(arguments)}: {done.stderr}{done.stdout}")


def _members(content: bytes) -> dict[str, Any]:
    """The record in a state.json, {} when it was not yet saved."""
    members: dict[str, Any] = json.loads(content)
    del members["checksum"]
    return members if members.pop("serial") else {}


def _wrong_sectors(
    found: Bytes, base: Bytes, island: int, writes: Iterable[tuple[Request, bool]], cut: int
) -> npt.NDArray[np.intp]:
    """The sectors of an island that hold what is not permitted."""
    stop = island + len(found)
    covering = [(request, stable) for request, stable in writes if request.offset < stop]
    covering = [item for item in covering if item[0].offset + item[0].length > island]
    stable_since = np.full(len(found), -1, np.int64)
    """When the latest stable write of each byte was begun."""
    for request, stable in covering:
        if stable:
            part = slice(max(0, request.offset - island), min(stop, request.offset + request.length) - island)
            stable_since[part] = np.maximum(stable_since[part], request.begun)
    good = (found == base) & (stable_since < 0)
    # A sector is whole: all its bytes are of one version, where every write is of whole sectors.
    sectors = np.arange(0, len(found), SECTOR)
    whole = np.logical_and.reduceat(good, sectors)
    parted = np.zeros(len(found), np.bool_)
    for request, _ in covering:
        assert request.data is not None
        first, last = max(island, request.offset), min(stop, request.offset + request.length)
        part = slice(first - island, last - island)
        data = np.frombuffer(request.data, np.uint8)[first - request.offset : last - request.offset]
        ended = request.ended if request.ended <= cut else NEVER
        same = np.zeros(len(found), np.bool_)
        same[part] = (found[part] == data) & (stable_since[part] <= ended)
        good |= same
        whole |= np.logical_and.reduceat(same, sectors)
        for edge in (first, last):
            if edge % SECTOR and edge != stop:
                parted[(edge - island) // SECTOR * SECTOR] = True
    partly = np.logical_or.reduceat(parted, sectors)
    return np.flatnonzero(~(whole | (partly & np.logical_and.reduceat(good, sectors))))


def _part(content: Content, offset: int, length: int) -> Bytes:
    part = np.zeros(length, np.uint8)
    for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
        data = content.get(sector)
        if data is not None:
            at = sector * SECTOR - offset
            part[at : at + SECTOR] = np.frombuffer(data, np.uint8)[: length - at]
    return part


def _reader(parts: list[bytes], disk: int) -> Callable[[int, int], bytes]:
    by_offset = {offset: data for (offset, _), data in zip(ISLANDS[disk], parts, strict=True)}
    return lambda offset, length: by_offset[offset]


def _read(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _write(path: str, content: Content, size: int) -> None:
    """Make a file of these sectors; the rest are holes."""
    Path(path).unlink(missing_ok=True)  # ext4 writes a file out that was truncated; nobody waits here
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        run: list[bytes] = []
        start = 0
        for sector in sorted(content):
            if run and sector != start + len(run):
                os.pwritev(fd, run, start * SECTOR)
                run = []
            if not run:
                start = sector
            run.append(content[sector] if (sector + 1) * SECTOR <= size else content[sector][: size - sector * SECTOR])
            if len(run) == 512:
                os.pwritev(fd, run, start * SECTOR)
                run = []
        if run:
            os.pwritev(fd, run, start * SECTOR)
    finally:
        os.close(fd)
