# SPDX-License-Identifier: BSD-3-Clause
"""mapped.py: no change of a mapped file ends the process for want of a block."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import DEADLINE_S, REPOSITORY, Lab, SharingFolder, SmallFolder
from replication.disk import files, mapped
from replication.disk.mapped import MappedFile

LENGTH = 64 << 10


@contextlib.contextmanager
def opened(path: Path, offset: int = 0) -> Iterator[MappedFile]:
    """A mapped file of LENGTH bytes; what it does not have yet is a hole."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, offset + LENGTH)
        file = MappedFile(fd, LENGTH, offset)
    finally:
        os.close(fd)
    try:
        yield file
    finally:
        file.close()


@pytest.mark.parametrize("known", [True, False], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("offset", [0, 8192])
def test_what_was_put_is_in_memory_and_outlives_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool, offset: int
) -> None:
    if not known:
        monkeypatch.setattr(mapped, "_IN_PLACE", frozenset())
    path = tmp_path / "m"
    path.write_bytes(b"a" * offset + b"b" * LENGTH)
    with opened(path, offset) as file:
        file.put(5000, b"xyz")
        assert file.map[4999:5004] == b"bxyzb"
        assert path.read_bytes() == b"a" * offset + b"b" * 5000 + b"xyz" + b"b" * (LENGTH - 5003)
        file.flush()


def test_holes_get_blocks_before_anything_is_stored(small_folder: Callable[[int], SmallFolder]) -> None:
    small = small_folder(1 << 20)
    path = small.folder / "m"
    with open(path, "wb") as file:
        file.write(b"x" * 4096)
        file.truncate(LENGTH)
    with opened(path):
        assert path.stat().st_blocks * 512 == LENGTH
        assert path.read_bytes() == b"x" * 4096 + bytes(LENGTH - 4096)
    hole = small.folder / "hole"
    small.fill()
    with pytest.raises(OSError, match="No space left"), opened(hole):
        pass
    with opened(path) as again:
        again.put(LENGTH - 1, b"y")


def test_a_store_that_finds_no_room_fails_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_IN_PLACE", frozenset())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path / "m") as file:
        file.put(0, b"before")
        monkeypatch.setattr(files, "pwritev", full)
        with pytest.raises(OSError, match="No space left"):
            file.put(0, b"after.")
        assert file.map[:6] == b"before"


STORES = (
    "import errno, os, sys\n"
    "from replication.disk.mapped import MappedFile\n"
    "fd = os.open(sys.argv[1], os.O_RDWR)\n"
    "file = MappedFile(fd, os.fstat(fd).st_size)\n"
    "print('mapped', flush=True)\n"
    "if sys.stdin.readline() == 'own\\n':\n"
    "    file.own_blocks()\n"
    "    print('owned', flush=True)\n"
    "sys.stdin.readline()\n"
    "try:\n"
    "    for at in range(0, len(file.map), 4096):\n"
    "        file.put(at, b'z')\n"
    "    print('stored')\n"
    "except OSError as error:\n"
    "    print(errno.errorcode[error.errno])\n"
)


def storing(path: Path) -> subprocess.Popen[str]:
    """A process that has STORES at work on the file."""
    return subprocess.Popen(
        [sys.executable, "-c", STORES, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


@pytest.mark.parametrize("own", [True, False], ids=["unshared in time", "still shared"])
def test_on_a_full_xfs_a_file_that_a_copy_shares_answers_enospc_and_no_signal(
    sharing_folder: SharingFolder, own: bool
) -> None:
    """With a plain store: SIGBUS. With blocks of its own since the copy: it succeeds."""
    path = sharing_folder.folder / "m"
    path.write_bytes(os.urandom(1 << 20))
    with storing(path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        sharing_folder.share()
        process.stdin.write("own\n" if own else "go\n")
        process.stdin.flush()
        if own:
            assert process.stdout.readline() == "owned\n"
        sharing_folder.fill()
        said, _ = process.communicate("\n", DEADLINE_S)
        assert (process.returncode, said) == (0, "stored\n" if own else "ENOSPC\n")


def test_on_a_full_btrfs_a_store_answers_enospc_and_no_signal(lab: Lab) -> None:
    """It copies on write: each store needs a new block, although nobody else has the old one."""
    try:
        btrfs = lab.sharing_folder("btrfs")
    except PermissionError as error:
        pytest.skip(str(error))
    path = btrfs.folder / "m"
    path.write_bytes(os.urandom(1 << 20))
    with storing(path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        btrfs.fill()
        said, _ = process.communicate("go\n\n", DEADLINE_S)
        assert (process.returncode, said) == (0, "ENOSPC\n")
