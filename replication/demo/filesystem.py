# SPDX-License-Identifier: BSD-3-Clause
"""A real file system in an image: made of real files, read back with debugfs, compared."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .processes import DemoError, run
from .teller import MIB

BLOCK = 4096
GUEST_FILE = "guest.bin"
GUEST_FILE_BYTES = 8 * MIB
SOURCES = ("/usr/lib/python3.11", "/usr/bin", "/usr/lib", "/usr/share", "/usr/include")
SMALL_FILES_MAX = 2500

SMALL_BYTES = 64 << 10
"""Small files are the interesting ones, but thousands of them make debugfs, which reads them back, slow."""


class Entry(NamedTuple):
    """One file, folder or link, as far as it has to be the same afterwards."""

    kind: str
    mode: int
    size: int
    content: str
    """SHA-256 of a file, target of a link."""


Tree = dict[str, Entry]


def read_tree(folder: Path) -> Tree:
    """All that is in a folder, by path relative to it."""
    tree: Tree = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            found = path.lstat()
            mode = stat.S_IMODE(found.st_mode)
            if stat.S_ISLNK(found.st_mode):
                entry = Entry("link", 0, 0, os.readlink(path))
            elif stat.S_ISDIR(found.st_mode):
                entry = Entry("folder", mode, 0, "")
            else:
                with open(path, "rb") as file:
                    entry = Entry("file", mode, found.st_size, hashlib.file_digest(file, "sha256").hexdigest())
            tree[str(path.relative_to(folder))] = entry
    return tree


def image_tree(image: Path, folder: Path) -> Tree:
    """All that is in the file system of an image, read with debugfs; `folder` is used for it and removed."""
    folder.mkdir()
    try:
        run("debugfs", "-R", f"rdump / {folder}", image)
        tree = read_tree(folder)
    finally:
        shutil.rmtree(folder)
    if "lost+found" not in tree:
        raise DemoError(f"debugfs could not read the file system of {image}")
    return tree


def differences(expected: Tree, found: Tree) -> list[str]:
    """One line for each path that is not the same in both; empty if the trees are equal."""
    lines = [f"{path} is missing" for path in sorted(expected.keys() - found.keys())]
    lines += [f"{path} should not be there" for path in sorted(found.keys() - expected.keys())]
    for path in sorted(expected.keys() & found.keys()):
        if expected[path] != found[path]:
            names = [
                f"{name} {was} became {now}"
                for name, was, now in zip(Entry._fields, expected[path], found[path], strict=True)
                if was != now
            ]
            lines.append(f"{path}: {', '.join(names)}")
    return lines


def first_difference(one: Path, other: Path) -> int | None:
    """Offset of the first byte in which two files differ, None if they are equal."""
    if one.stat().st_size != other.stat().st_size:
        return min(one.stat().st_size, other.stat().st_size)
    with open(one, "rb") as a, open(other, "rb") as b:
        at = 0
        while True:
            left, right = a.read(MIB), b.read(MIB)
            if left != right:
                return at + next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y)
            if not left:
                return None
            at += len(left)


def collect_files(folder: Path, size: int) -> int:
    """Copy real files of this machine into `folder` until they are `size` bytes; returns how many bytes they are."""
    total = small = 0
    for source in SOURCES:
        for parent, folders, files in os.walk(source):
            folders.sort()
            target = folder / Path(parent).relative_to("/")
            for name in sorted(files):
                path = Path(parent, name)
                if total >= size:
                    return total
                count = _collect(path, target / name, size - total, SMALL_BYTES if small >= SMALL_FILES_MAX else 0)
                small += count < SMALL_BYTES
                total += count
    return total


def _collect(path: Path, target: Path, room: int, least: int) -> int:
    try:
        found = path.lstat()
        if target.is_symlink() or target.exists() or not least <= found.st_size <= max(room, MIB):
            return 0
        if stat.S_ISLNK(found.st_mode):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(path))
            return 0
        if not stat.S_ISREG(found.st_mode):
            return 0
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(stat.S_IMODE(found.st_mode) & 0o777 | 0o400)
        return found.st_size
    except PermissionError:
        return 0  # not ours to read; any other file does as well


@dataclass
class Changes:
    """Changes to a file system: files to remove, then files to write (their path there, and here)."""

    remove: list[str] = field(default_factory=list)
    write: list[tuple[str, Path]] = field(default_factory=list)

    @property
    def write_bytes(self) -> int:
        """Bytes of the files to write."""
        return sum(path.stat().st_size for _, path in self.write)

    def by_debugfs(self, image: Path, script: Path) -> None:
        """Make the changes in an image that nobody uses."""
        lines = [f'rm "{path}"' for path in self.remove]
        for path, source in self.write:
            lines.append(f'write "{source}" "{path}"')
        script.write_text("\n".join(lines) + "\n")
        run("debugfs", "-w", "-f", script, image)

    def by_mount(self, mount: Path) -> None:
        """Make the changes below a mount point."""
        for path in self.remove:
            (mount / path).unlink()
        for path, source in self.write:
            shutil.copyfile(source, mount / path)


def first_changes(tree: Tree, folder: Path, size: int) -> Changes:
    """An ordinary working day: an eighth of `size` in new files, and some small ones removed."""
    folder.mkdir()
    changes = Changes(remove=_files(tree)[5:400:40])
    for number in range(8):
        path = folder / f"letter-{number}.bin"
        path.write_bytes(random.Random(number).randbytes(size // 64))
        changes.write.append((path.name, path))
    # Room for the guest of the secondary to write into, later.
    guest = folder / GUEST_FILE
    guest.write_bytes(random.Random("guest").randbytes(GUEST_FILE_BYTES))
    changes.write.append((GUEST_FILE, guest))
    return changes


def second_changes(tree: Tree, folder: Path, size: int) -> Changes:
    """A bad day: three quarters of everything is removed, and other files are written over it."""
    folder.mkdir()
    changes = Changes()
    removed = 0
    for path in _files(tree):
        if removed < size * 3 // 4:
            changes.remove.append(path)
            removed += tree[path].size
    for number in range(16):
        source = folder / f"garbage-{number}.bin"
        source.write_bytes(random.Random(1000 + number).randbytes(removed // 16))
        changes.write.append((source.name, source))
    return changes


def _files(tree: Tree) -> list[str]:
    """Ordinary files with names that need no quoting in debugfs."""
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+")
    return sorted(p for p, entry in tree.items() if entry.kind == "file" and p != GUEST_FILE and plain.issuperset(p))


def file_blocks(image: Path, path: str) -> list[int]:
    """Offsets on the disk of a file's blocks, in order."""
    listed = run("debugfs", "-R", f"blocks /{path}", image).split()
    return [int(number) * BLOCK for number in listed]
