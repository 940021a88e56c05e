# SPDX-License-Identifier: BSD-3-Clause
"""Disks to measure on: full of what cannot be compressed, or sparse; and whether there is room for them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MIB = 1 << 20
_PIECE = 4 * MIB
_SEED = 20240611
SYNC_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Disks:
    """The folder of one subject's disks and overlays; `make` makes a disk at the path that it is given."""

    folder: Path
    make: Callable[[Path], object]

    def disk(self, name: str) -> Path:
        """The disk `name`, made when it is asked for the first time.

        Later arrangements of the subject find what an earlier one has left in it: full and incompressible still.
        """
        path = self.folder / f"{name}.raw"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            self.make(part)
            part.rename(path)
        return path

    def fresh(self, name: str) -> Path:
        """An empty folder for overlays or state."""
        path = self.folder / name
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    def remove_fresh(self) -> None:
        """Remove the folders that `fresh` has made, but keep the disks."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)

    def remove(self) -> None:
        """Remove everything."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def full(size: int) -> Callable[[Path], None]:
    """Makes disks of `size` bytes, a multiple of 4 MiB, of pseudo-random data, all alike."""

    def make(path: Path) -> None:
        generator = np.random.default_rng(_SEED)
        with open(path, "wb", buffering=0) as file:
            for _ in range(size // _PIECE):
                file.write(generator.bytes(_PIECE))

    return make


def copy_of(template: Path) -> Callable[[Path], None]:
    """Makes disks that are copies of `template`."""

    def make(path: Path) -> None:
        shutil.copyfile(template, path)

    return make


def sparse(size: int) -> Callable[[Path], None]:
    """Makes disks of `size` bytes without content."""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(size)

    return make


def file_system(folder: Path) -> str:
    """The type of the file system, as stat(1) calls it: ext2/ext3, tmpfs, xfs, ..."""
    command = ["stat", "--file-system", "--format=%T", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SYNC_TIMEOUT_S).stdout.strip()


def room(folder: Path) -> int:
    """Bytes that can be written below `folder`; of a tmpfs not more than there is memory."""
    free = shutil.disk_usage(folder).free
    return min(free, _memory_available()) if file_system(folder) == "tmpfs" else free


def _memory_available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no line MemAvailable")


def settle(folder: Path) -> None:
    """Bring the file system's dirty pages to the disk, so that no run pays for an earlier one's."""
    subprocess.run(["sync", "--file-system", str(folder)], check=True, timeout=SYNC_TIMEOUT_S)
