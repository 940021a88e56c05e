# SPDX-License-Identifier: BSD-3-Clause
"""One life of a secondary with durability=power, drawn from a seed: requests on both faces and commands, recorded.

The node runs in this process (no nbdkit): requests go to its faces inside the gate, as export.py does it. Histories
with one thread are the same for the same seed; with several threads only the recorded history can be looked at again.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from power.recorder import MAPPED, NEVER, File, Killed, Recorder, Saved
from replication.errors import CommandError, DiskError
from replication.events import EventHub
from replication.node import Node
from replication.options import DiskOptions, Durability, Options
from replication.record.boot import BOOT_ID_ENVIRONMENT
from replication.record.grainfile import Seal
from replication.record.state import StateFolder
from replication.secondary import reclaim
from replication.secondary.side import SecondarySide
from replication.stage import Mode, Stage

KIB = 1024
MIB = 1024 * KIB
BLOCK = 4 * KIB
GRAIN = 64 * KIB

DEADLINE_S = 30.0

# The allocation words of disk 0 lie on two pages (of 32 MiB), those of its first page in eight sectors (of 4 MiB);
# copies are cut at 1 MiB. Both disks end with a part of a block.
SIZES = (33 * MIB + 20 * KIB + 512, 300 * KIB + 1536)
ISLANDS = (
    ((0, 16 * KIB), (4 * MIB - 12 * KIB, 24 * KIB), (32 * MIB - 8 * KIB, 20 * KIB), (33 * MIB, 20 * KIB + 512)),
    ((120 * KIB, 20 * KIB), (280 * KIB, 20 * KIB + 1536)),
)
"""(offset, length) of where requests go, by disk; the rest of the disks stays zeroes."""


@dataclass
class Request:
    """A request on a face of one disk. `data` None is a flush."""

    face: str
    disk: int
    offset: int
    length: int
    data: bytes | None
    fua: bool
    begun: int
    ended: int = NEVER


@dataclass
class Command:
    """A control command; `epoch` is what a checkpoint returned."""

    name: str
    begun: int
    ended: int = NEVER
    epoch: int = 0


@dataclass
class History:
    """What was recorded."""

    seed: int
    threads: int
    folder: str
    files: dict[str, File]
    records: list[Saved]
    epochs: dict[int, int]
    requests: list[Request]
    commands: list[Command]
    mapped: dict[str, tuple[bytes, bytes]]
    """First and last content of the files that are only mapped."""
    seals: dict[str, list[tuple[int, int, bytes]]]
    """Of the maps: when, where and what was written."""
    last: int
    """The last tick."""
    interesting: list[int] = field(default_factory=list)
    """Ticks at which something has just been promised, or is about to be."""
    critical: list[int] = field(default_factory=list)
    """Ticks at which a primary sends again what a killed process, or a failed copy, had preserved."""

    def disk_path(self, index: int) -> str:
        return str(Path(self.folder) / f"disk{index}.raw")


def options_of(folder: Path) -> Options:
    """The command line of the secondary."""
    state = folder / "state"
    options = Options(Mode.SECONDARY, [], str(state), None, durability=Durability.POWER)
    for index in range(len(SIZES)):
        name = f"disk{index}"
        images = [str(state / f"{name}.{kind}.qcow2") for kind in ("active", "hidden")]
        options.disks.append(DiskOptions(name, str(folder / f"{name}.raw"), f"top{index}", *images))
    return options


class Process:
    """A node as one process has it."""

    def __init__(self, folder: Path, boot: str) -> None:
        """Open it; ConfigError."""
        os.environ[BOOT_ID_ENVIRONMENT] = boot
        self._state = StateFolder(str(folder / "state"), durable=True)
        try:
            self.node = Node(options_of(folder), EventHub(), self._state)
        except BaseException:
            self._state.close()
            raise
        assert isinstance(self.node.side, SecondarySide)
        self.side: SecondarySide = self.node.side

    @property
    def epoch(self) -> int:
        return self._state.epoch

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Read a face."""
        buffer = bytearray(length)
        with self.node.gate:
            self.node.faces[name].read(memoryview(buffer), offset)
        return bytes(buffer)

    def wait_done(self) -> None:
        """Until a commit has ended."""
        deadline = time.monotonic() + DEADLINE_S
        while self.node.stage is Stage.FAILOVER:
            assert time.monotonic() < deadline, "the commit does not end"
            time.sleep(0.0005)

    def abandon(self) -> None:
        """As a kill leaves it: nothing is flushed or saved."""
        self.side._failover.end(DEADLINE_S)
        self.side._reclaimer.stop(DEADLINE_S)
        for file in self._state._binding._files.values():
            file._seal = Seal()  # nor is a map sealed as closed
        self.side._let_go()
        self._state.close()


class Life:
    """Draws and runs one history."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._random = random.Random(seed)
        self._seed = seed
        self._folder = folder
        self._threads = self._random.choice((1, 2, 3, 4))
        self._recorder = Recorder(seed, self._threads > 1)
        self._requests: list[Request] = []
        self._commands: list[Command] = []
        self._fail_at: int | None = None
        self._failed = False
        self._resent = 0
        self._critical: list[int] = []
        self._flushes = 0.2
        self._disks = self._random.choice(((0, 1), (0, 1), (1,)))
        """Where requests go: with one small disk they meet more often."""
        self.process: Process

    # -- the whole -----------------------------------------------------------------------------------------

    def run(self) -> History:
        """Live it."""
        self._folder.mkdir(parents=True)
        for index, size in enumerate(SIZES):
            with open(self._folder / f"disk{index}.raw", "wb") as file:
                file.truncate(size)
                for offset, length in ISLANDS[index]:
                    file.seek(offset)
                    # Whole blocks of zeroes, too: copy-before-write only marks them.
                    for start in range(0, length, BLOCK):
                        part = min(BLOCK, length - start)
                        file.write(self._random.randbytes(part) if self._random.random() < 0.8 else bytes(part))
        Process(self._folder, "boot-1").abandon()  # it makes the images
        state = self._folder / "state"
        written = ("*.qcow2", "*.data", "epoch", "state.json*")
        for path in (*self._folder.glob("disk*.raw"), *(path for name in written for path in state.glob(name))):
            self._recorder.track(path)
        self._recorder.failing = self._failing
        mapped = {str(path): path.read_bytes() for path in state.iterdir() if path.suffix in MAPPED}
        unknown = {str(path) for path in state.iterdir()} - {*self._recorder.files, *mapped, str(state / "lock")}
        assert not unknown, f"no cut would give {unknown} a content: say in recorder.py what a cut does to it"
        former = reclaim.AFTER_S
        # With one thread nothing else shall run beside it.
        reclaim.AFTER_S = 0.01 if self._threads > 1 else 2 * DEADLINE_S
        try:
            with self._recorder.installed():
                self.process = Process(self._folder, "boot-1")
                self.process.node.launch()
                self._live()
        finally:
            self._recorder.kill_in(0)
            self.process.abandon()
            reclaim.AFTER_S = former
        return self._history(mapped)

    def _history(self, mapped: dict[str, bytes]) -> History:
        recorder = self._recorder
        interesting = [
            *(request.ended for request in self._requests if request.data is None or request.fua),
            *(command.ended for command in self._commands),
            *(tick for file in recorder.files.values() for _, ended in file.syncs for tick in (ended - 1, ended)),
            *(tick for saved in recorder.records for tick in (saved.ended - 1, saved.ended)),
            *(tick + more for tick in recorder.epochs.values() for more in range(4)),
        ]
        return History(
            self._seed,
            self._threads,
            str(self._folder),
            recorder.files,
            recorder.records,
            recorder.epochs,
            self._requests,
            self._commands,
            {path: (content, Path(path).read_bytes()) for path, content in mapped.items()},
            recorder.seals,
            recorder.now,
            sorted({tick for tick in interesting if 0 < tick <= recorder.now}),
            self._critical,
        )

    def _live(self) -> None:
        draw = self._random
        if draw.random() < 0.3:
            self._work(draw.randint(1, 4), ("disk",))
        self._command("start", lambda: self.process.node.start(None, None, "auto"))
        for _ in range(draw.randint(1, 3)):
            if draw.random() < 0.25:
                self._fail_at = draw.randint(0, 3)
            if draw.random() < 0.3:
                self._kill_in(draw.randint(2, 120))
            self._work(draw.randint(5, 50), ("disk", "top"), checkpoints=True)
            if self._recorder.kill_at != NEVER:
                self._restart()
            if self._failed:
                self._repair()
            if draw.random() < 0.5:
                self._checkpoint()
        end = draw.random()
        if end < 0.2:
            self._command("stop", lambda: self.process.node.stop(False))
        elif end < 0.75:
            self._work(draw.randint(2, 8), ("disk", "top"))
            self._command("failover", lambda: self.process.node.stop(True))
            if self._threads > 1:
                if draw.random() < 0.3:
                    self._kill_in(draw.randint(2, 150))
                self._flushes = 0.5
                self._work(draw.randint(5, 30), ("top",))
                self._flushes = 0.2
                if self._recorder.kill_at != NEVER:
                    self._restart()
            self.process.wait_done()
            assert self.process.node.stage is Stage.DONE
        if self.process.node.stage is Stage.DONE:
            self._work(draw.randint(2, 8), ("top",))
        if draw.random() < 0.4:
            self._command("close", self.process.node.close)
            self.process = Process(self._folder, "boot-1")  # to be abandoned; a cut before it saves anything

    # -- requests ------------------------------------------------------------------------------------------

    def _work(self, count: int, faces: tuple[str, ...], checkpoints: bool = False) -> None:
        """Requests, `count` a thread."""
        draws = [random.Random(self._random.random()) for _ in range(self._threads)]
        errors: list[BaseException] = []

        def work(draw: random.Random) -> None:
            try:
                for _ in range(count):
                    if checkpoints and draw.random() < 0.06:
                        self._checkpoint()
                    else:
                        self._request(draw, draw.choice(faces))
            except Killed:
                return
            except BaseException as error:  # noqa: BLE001 (raised again below, in the thread that waits)
                errors.append(error)

        threads = [threading.Thread(target=work, args=(draw,)) for draw in draws]
        if len(threads) == 1:
            work(draws[0])
        else:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(2 * DEADLINE_S)
                assert not thread.is_alive(), "a request does not end"
        if errors:
            raise errors[0]

    def _request(self, draw: random.Random, side: str) -> None:
        disk = draw.choice(self._disks)
        face = self.process.node.faces[f"{side}{disk}"]
        kind = draw.random()
        if kind < self._flushes:
            self._run(Request(side, disk, 0, 0, None, False, 0), face.flush)
            return
        island, size = draw.choice(ISLANDS[disk])
        grain = draw.choice((BLOCK, BLOCK, 512, 512, 512, 1))
        offset = draw.randrange(0, size, grain)
        length = draw.randint(1, max(1, min(size - offset, draw.choice((BLOCK, 16 * KIB))) // grain)) * grain
        length = min(length, size - offset)
        offset += island
        fua = draw.random() < 0.15
        if kind < self._flushes + 0.15:
            if side == "top" and draw.random() < 0.1:
                offset, length = 0, SIZES[disk]
            request = Request(side, disk, offset, length, bytes(length), fua, 0)
            self._run(request, partial(face.zero, offset, length, draw.random() < 0.5, fua))
            return
        data = draw.randbytes(length)
        self._run(Request(side, disk, offset, length, data, fua, 0), partial(face.write, memoryview(data), offset, fua))

    def _run(self, request: Request, action: Callable[[], None]) -> None:
        with self.process.node.gate:
            request.begun = self._recorder.tick()
            self._requests.append(request)
            try:
                action()
            except DiskError:
                # It may have been done or not, as far as the client knows.
                failed = self._failed and request.face == "disk"
                assert failed or self._recorder.killing, "a request failed by itself"
                return
            request.ended = self._recorder.tick()

    # -- commands ------------------------------------------------------------------------------------------

    def _command(self, name: str, action: Callable[[], object]) -> Command:
        command = Command(name, self._recorder.tick())
        self._commands.append(command)
        action()
        command.ended = self._recorder.tick()
        return command

    def _checkpoint(self) -> None:
        command = Command("checkpoint", self._recorder.tick())
        self._commands.append(command)
        try:
            command.epoch = self.process.node.checkpoint()[0]
        except CommandError:
            assert self._failed or self._recorder.killing, "a checkpoint failed by itself"
            return
        command.ended = self._recorder.tick()

    # -- failures ------------------------------------------------------------------------------------------

    def _failing(self, path: str, offset: int) -> bool:
        """The copy of a range behind its first chunk fails, once: what lies before it has been copied."""
        if self._fail_at is None or not path.endswith(".hidden.data") or offset % MIB:
            return False
        self._fail_at = None
        self._failed = True
        return True

    def _repair(self) -> None:
        """What a primary does: send again what the secondary lacks."""
        first = self._recorder.now
        for index, disk in enumerate(self.process.side.disks):
            for offset, length in list(disk.lost.missing_ranges()):
                data = self._random.randbytes(length)
                face = self.process.node.faces[f"disk{index}"]
                request = Request("disk", index, offset, length, data, False, 0)
                self._run(request, partial(face.write, memoryview(data), offset, False))
        assert self.process.side._backup.running
        self._failed = False
        self._critical += range(first, self._recorder.now)

    def _kill_in(self, ticks: int) -> None:
        self._recorder.on_kill = self._keep_lost
        self._recorder.kill_in(ticks)

    def _keep_lost(self) -> None:
        """A killed thread notes nothing more; those that are ended here do, on their way out."""
        self._lost = [disk.lost._grain_states.copy() for disk in self.process.side.disks]

    def _restart(self) -> None:
        """The process is killed, if it was not yet, and another one of the same boot takes over."""
        self._recorder.kill_in(0)
        if self._recorder.on_kill is not None:
            self._keep_lost()
            self._recorder.on_kill = None
        for disk, lost in zip(self.process.side.disks, self._lost, strict=True):
            disk.lost._grain_states[:] = lost
        self.process.abandon()
        self._recorder.kill_in(None)
        self.process = Process(self._folder, "boot-1")
        self.process.node.launch()
        self._failed = self._failed or not self.process.side._backup.running
        if self.process.node.stage is Stage.RUNNING:
            self._send_again()

    def _send_again(self) -> None:
        """What a primary does with writes that it has got no answer for."""
        first = self._recorder.now
        for request in [item for item in self._requests if item.face == "disk" and item.data and item.ended == NEVER]:
            if request.begun > self._resent:
                data = self._random.randbytes(request.length)
                face = self.process.node.faces[f"disk{request.disk}"]
                again = Request("disk", request.disk, request.offset, request.length, data, False, 0)
                self._run(again, partial(face.write, memoryview(data), request.offset, False))
        self._resent = self._recorder.now
        self._critical += range(first, self._resent)
