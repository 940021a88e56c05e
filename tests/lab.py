# SPDX-License-Identifier: BSD-3-Clause
"""The laboratory of the end-to-end tests: real processes, each with a deadline and an owner.

A test asks the `lab` fixture (conftest.py) for what it needs, or opens a `Lab` as a context manager:

    Lab                     owns a short temporary folder and every process started in it
     +- Server              nodes.py: one nbdkit with plugin.py;  Secondary and Primary make their disks first
     +- Pair                a Secondary and the Primary that forwards to it
     +- QemuNbd             endpoints.py: qemu-nbd serving a file
     +- DelayedEndpoint     nbdkit file/memory behind filters: a slow or failing NBD endpoint
     +- Qemu                qemu-system without a machine: a QMP monitor and QEMU's block layer

Invariants: nothing waits without a deadline; a process is ended by its own pid and only by its owner; one that
does not end when it is asked to is killed, and that fails the test (`Lab.close`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from checkout import PLUGIN, REPOSITORY
from content import KIB, MIB, changed, make_raw, pattern, qemu_img, whole
from endpoints import ABORT, DelayedEndpoint, Qemu, QemuNbd
from mounts import HangingFolder, MountedFolder, SharingFolder, SmallFolder
from nbdprocess import NbdProcess, silent, stop_still
from nodes import Pair, Primary, Secondary, Server, disk_name, drained, nbd_refusal, nbdkit_has, refused, top_id
from pausepoints import PausePoints
from process import Process
from qmp import Qmp, QmpError
from waiting import CHANCE_S, DEADLINE_S, Stuck, begin, chance, wait_until

# All that was here before it had modules of its own; new tests import from those.
__all__ = [
    "ABORT",
    "CHANCE_S",
    "DEADLINE_S",
    "DelayedEndpoint",
    "KIB",
    "Lab",
    "MIB",
    "MountedFolder",
    "NbdProcess",
    "PLUGIN",
    "Pair",
    "PausePoints",
    "Primary",
    "Process",
    "Qemu",
    "QemuNbd",
    "Qmp",
    "QmpError",
    "REPOSITORY",
    "Secondary",
    "Server",
    "SharingFolder",
    "SmallFolder",
    "Stuck",
    "begin",
    "chance",
    "changed",
    "disk_name",
    "drained",
    "make_raw",
    "nbd_refusal",
    "nbdkit_has",
    "pattern",
    "qemu_img",
    "refused",
    "silent",
    "stop_still",
    "top_id",
    "wait_until",
    "whole",
]

P = TypeVar("P", bound=Process)


class Lab:
    """A short temporary `folder` (Unix sockets allow 107 characters) and the processes in it.

    `close` ends them, newest first, and raises AssertionError if one had ended by itself or had to be killed.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self._processes: list[Process] = []
        self._mounted: list[MountedFolder] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except AssertionError as trouble:
            # What the test itself raised comes first; this is often its consequence.
            if error is None:
                raise
            error.add_note(f"and at the end: {trouble}")

    def add(self, process: P) -> P:
        """Make the lab the owner of `process`."""
        self._processes.append(process)
        return process

    def start(self, process: P) -> P:
        """Own and start `process`."""
        self.add(process).start()
        return process

    def secondary(self, sizes: Sequence[int] = (MIB,), **options: Any) -> Secondary:
        """A started Secondary."""
        return self.start(Secondary(self.folder, sizes, **options))

    def primary(self, secondary: str, sizes: Sequence[int] = (MIB,), **options: Any) -> Primary:
        """A started Primary."""
        return self.start(Primary(self.folder, secondary, sizes, **options))

    def pair(self, sizes: Sequence[int] = (MIB,), **options: Any) -> Pair:
        """A started Pair; its replication is not started."""
        pair = Pair(self.folder, sizes, **options)
        self.add(pair.secondary)
        self.add(pair.primary)
        return pair.start()

    def qemu_nbd(self, path: Path, **options: Any) -> QemuNbd:
        """A started QemuNbd."""
        return self.start(QemuNbd(self.folder, path, **options))

    def endpoint(self, **options: Any) -> DelayedEndpoint:
        """A started DelayedEndpoint."""
        return self.start(DelayedEndpoint(self.folder, **options))

    def qemu(self, **options: Any) -> Qemu:
        """A started Qemu."""
        return self.start(Qemu(self.folder, **options))

    def pause_points(self) -> PausePoints:
        """Pause points in a folder of this lab."""
        return PausePoints(self.folder / "pause")

    def small_folder(self, size: int) -> SmallFolder:
        """A folder with room for `size` bytes, mounted for as long as this lab's processes; PermissionError."""
        small = SmallFolder(self.folder / f"small{len(self._mounted)}", size)
        self._mounted.append(small)
        return small

    def sharing_folder(self, kind: str = "xfs") -> SharingFolder:
        """A folder whose files can share blocks, mounted for as long as this lab's processes; PermissionError."""
        sharing = SharingFolder(self.folder / f"sharing{len(self._mounted)}", kind)
        self._mounted.append(sharing)
        return sharing

    def hanging_folder(self, name: str) -> HangingFolder:
        """The folder `name` of this lab, whose disk can hang, mounted for as long as this lab's processes;
        PermissionError."""
        hanging = HangingFolder(self.folder / name)
        self._mounted.append(hanging)
        return hanging

    def failed_start(self, arguments: Sequence[str], **options: Any) -> tuple[int, str]:
        """`Server.failed_start` in this folder."""
        return Server.failed_start(self.folder, arguments, **options)

    def stderr(self) -> str:
        """What all processes have printed, each under its name."""
        return "".join(f"--- {process.name}\n{text}" for process in self._processes if (text := process.stderr()))

    def close(self) -> None:
        """End everything and remove the folder; raises AssertionError if a process misbehaved."""
        misbehaviour: list[str] = []
        for process in reversed(self._processes):
            try:
                process.close()
            except AssertionError as error:
                misbehaviour.append(str(error))
            misbehaviour += process.misbehaviour
        self._processes.clear()
        for mounted in self._mounted:
            mounted.close()
        self._mounted.clear()
        shutil.rmtree(self.folder)
        if misbehaviour:
            raise AssertionError("; ".join(misbehaviour))
