# SPDX-License-Identifier: BSD-3-Clause
"""Folders on a file system of their own: one that can be full, one whose files share blocks, one whose disk hangs."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from content import KIB, MIB
from waiting import DEADLINE_S, wait_until


class MountedFolder:
    """A folder on a file system of its own."""

    def __init__(self, folder: Path, *mount: str) -> None:
        """Make it, and mount there what `mount` says; PermissionError if that is not allowed."""
        self.folder = folder
        folder.mkdir()
        done = self._run("mount", *mount)
        if done.returncode:
            raise PermissionError(f"mounting needs root, and a kernel that can: {done.stderr.strip()}")

    @property
    def free(self) -> int:
        """Bytes."""
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Unmount."""
        self._run("umount").check_returncode()

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(self.folder)], check=False, timeout=DEADLINE_S, capture_output=True, text=True
        )


class SmallFolder(MountedFolder):
    """A tmpfs that can be full."""

    def __init__(self, folder: Path, size: int) -> None:
        """With room for `size` bytes."""
        super().__init__(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave no room."""
        with open(self._filler, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4 * KIB))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def make_room(self) -> None:
        """Take back what `fill` did."""
        self._filler.unlink()

    def grow(self, size: int) -> None:
        """Make it a file system of `size` bytes."""
        self._run("mount", "-o", f"remount,size={size}").check_returncode()

    @property
    def percent(self) -> float:
        """Of its bytes in use."""
        status = os.statvfs(self.folder)
        return 100 * (status.f_blocks - status.f_bavail) / status.f_blocks


class SharingFolder(MountedFolder):
    """A file system in which files can share blocks (reflinks): XFS, or btrfs, which copies on write besides."""

    def __init__(self, folder: Path, kind: str = "xfs") -> None:
        """PermissionError also where the kernel does not have `kind`."""
        image = folder.with_suffix(f".{kind}")
        with open(image, "wb") as file:
            file.truncate(320 * MIB)
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, timeout=DEADLINE_S, stdout=subprocess.DEVNULL)
        super().__init__(folder, "-t", kind, "-o", "loop", str(image))
        self.kind = kind

    def fill(self) -> None:
        """Leave no room, also none that the file system only promises: until what was written is on the disk, some
        comes back."""
        for _ in range(3):
            with contextlib.suppress(OSError), open(self.folder / "filler", "ab", buffering=0) as filler:
                size = MIB
                while size >= 4 * KIB:
                    try:
                        filler.write(bytes(size))
                    except OSError:
                        size //= 2
            self._run("sync", "-f")

    def make_room(self) -> None:
        """Take back what `fill` did."""
        (self.folder / "filler").unlink()

    def share(self) -> None:
        """Have a second owner for all blocks of all files, as after a backup: a snapshot, or copies."""
        self._run("sync", "-f").check_returncode()
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        if self.kind == "btrfs":
            command = ["btrfs", "-q", "subvolume", "snapshot", str(self.folder), str(self.folder / "snapshot")]
            subprocess.run(command, check=True, timeout=DEADLINE_S, stdout=subprocess.DEVNULL)
            return
        (self.folder / "copies").mkdir()
        for number, path in enumerate(files):
            command = ["cp", "--reflink=always", str(path), str(self.folder / "copies" / f"{number}")]
            subprocess.run(command, check=True, timeout=DEADLINE_S)


class HangingFolder(MountedFolder):
    """A file system whose disk can stop answering: ext4 in a file of a FUSE file system, whose server stands still."""

    SIZE = 32 * MIB

    def __init__(self, folder: Path) -> None:
        """PermissionError also where there is no FUSE, or no server for it."""
        image, file = folder.with_suffix(".ext4"), folder.with_suffix(".fuse")
        with open(image, "wb") as disk:
            disk.truncate(self.SIZE)
        file.touch()
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=DEADLINE_S, stdout=subprocess.DEVNULL)
        # It goes with the test whatever happens: what stands still would hold up the file system for ever.
        command = ["setpriv", "--pdeathsig", "KILL", "qemu-storage-daemon"]
        command += ["--blockdev", f"driver=file,filename={image},node-name=image"]
        command += ["--export", f"fuse,id=file,node-name=image,mountpoint={file},writable=on"]
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(
                lambda: file.stat().st_size == self.SIZE or self._server.poll() is not None, "the file is served"
            )
            if self._server.poll() is not None:
                raise PermissionError(f"no file system in FUSE: {self._server.communicate()[1].strip()}")
            super().__init__(folder, "-t", "ext4", "-o", "loop", str(file))
            folder.chmod(0o700)
        except BaseException:
            self._end()
            raise

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Inside, nothing is written to the disk or read from it. What was written before is on it."""
        self._run("sync", "-f").check_returncode()
        self._server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._server.send_signal(signal.SIGCONT)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._end()

    def _end(self) -> None:
        self._server.terminate()
        try:
            self._server.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.communicate(timeout=DEADLINE_S)
            raise
