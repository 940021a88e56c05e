# SPDX-License-Identifier: BSD-3-Clause
"""What the test guest is made of: Debian's cloud kernel, busybox-static and guest_init.sh, and an empty file system;
in a guest that is to have it, QEMU's guest agent too.

All of it is kept under build/guest/, by what it is made of, so the second start of a guest builds nothing. The kernel
is downloaded by apt, which checks its signature, and unpacked, not installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from checkout import REPOSITORY
from content import MIB

T = TypeVar("T")

CACHE = REPOSITORY / "build/guest"
INIT = Path(__file__).resolve().parent / "guest_init.sh"

MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
"""What a cloud kernel may not have built in, in the order in which guest_init.sh loads it."""

AGENT = Path("/usr/sbin/qemu-ga")

DISK_BYTES = 64 * MIB


class GuestError(AssertionError):
    """The guest, or what it is made of, failed; the text says how."""


def run(*command: str | os.PathLike[str], timeout_s: float = 300.0, **more: Any) -> str:
    """Run a tool that must succeed; its standard output. GuestError."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL, **more
        )
    except FileNotFoundError:
        raise GuestError(f"{command[0]} is missing: run scripts/setup vm") from None
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()
        raise GuestError(f"{' '.join(os.fspath(word) for word in command)}: exit {done.returncode}: {said}")
    return str(done.stdout)


def newc(entries: Sequence[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the format of an initramfs, of (path, mode, content); folders have no content.

    Documentation/driver-api/early-userspace/buffer-format.rst of Linux has the format. The archive depends on nothing
    but its entries: numbers stand for inodes, and every time is 0.
    """
    archive = bytearray()

    def put(path: str, mode: int, content: bytes, inode: int) -> None:
        name = path.encode() + b"\0"
        device = (5, 1) if mode & 0o170000 == 0o020000 else (0, 0)  # a character device is the console
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
        archive.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        archive.extend(bytes(-len(archive) % 4))
        archive.extend(content)
        archive.extend(bytes(-len(archive) % 4))

    for number, (path, mode, content) in enumerate(entries, 1):
        put(path, mode, content, number)
    put("TRAILER!!!", 0, b"", 0)
    return bytes(archive)


def kernel_package(cached: Sequence[str]) -> str:
    """The name of the package with Debian's newest cloud kernel, or of the newest of `cached` if apt knows none."""
    try:
        said = run("apt-cache", "depends", "linux-image-cloud-amd64")
    except GuestError:
        if not cached:
            raise
        said = ""
    found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)", said)
    if found is not None:
        return found[1]
    if not cached:
        raise GuestError("apt knows no package linux-image-cloud-amd64: as root run apt-get update")
    return max(cached, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def with_fresh_lists(ask: Callable[[], T]) -> T:
    """Ask apt; once more, with fresh package lists, if it fails: there may be none yet, or they name what has gone."""
    try:
        return ask()
    except GuestError:
        run("apt-get", "-qq", "update")
        return ask()


def module_content(package: Path, name: str) -> bytes | None:
    """A module of an unpacked kernel package; None if the kernel has it built in. Debian 13 compresses them, has them
    below /usr, and all that is virtio but the disk built in."""
    for builtin in package.glob("**/modules.builtin"):
        if f"/{name}.ko\n" in builtin.read_text():
            return None
    [file] = package.glob(f"**/kernel/**/{name}.ko*")
    content = file.read_bytes()
    return lzma.decompress(content) if file.suffix == ".xz" else content


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the body has succeeded; nobody ever sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Images:
    """The files of the guest."""

    kernel: Path
    initramfs: Path
    disk: Path
    """An empty ext4 file system of DISK_BYTES: to be copied, never to be used."""

    @classmethod
    @functools.cache
    def get(cls, cache: Path = CACHE) -> Images:
        """What is cached, made first if need be (with the network, for the kernel); GuestError."""
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kernel = cls._kernel(cache)
            busybox = Path("/bin/busybox")
            if not busybox.exists():
                raise GuestError("busybox-static is missing: run scripts/setup vm")
            entries = cls._entries(kernel, busybox.read_bytes())
            archive = newc(entries)
            made = kernel / f"guest-{hashlib.sha256(archive).hexdigest()[:12]}"
            if not made.exists():
                with _building(made) as folder:
                    (folder / "initramfs").write_bytes(archive)
                    _make_file_system(folder / "disk.ext4")
        return cls(kernel / "vmlinuz", made / "initramfs", made / "disk.ext4")

    def with_agent(self) -> Images:
        """The same with the guest agent of this host's Debian, which guest_init.sh starts if it is told to."""
        if not AGENT.exists():
            raise GuestError("qemu-guest-agent is missing: run scripts/setup vm")
        archive = self.initramfs.read_bytes() + newc(dynamic("bin/qemu-ga", AGENT))
        made = self.initramfs.parent.parent / f"agent-{hashlib.sha256(archive).hexdigest()[:12]}"
        with open(self.initramfs.parent.parent.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                with _building(made) as folder:
                    (folder / "initramfs").write_bytes(archive)
        return replace(self, initramfs=made / "initramfs")

    @staticmethod
    def _kernel(cache: Path) -> Path:
        """The folder with vmlinuz and modules of the newest kernel."""
        cached = [path.name for path in cache.glob("linux-image-*")]
        package = kernel_package(cached) if cached else with_fresh_lists(lambda: kernel_package(cached))
        folder = cache / package
        if folder.exists():
            return folder
        with _building(folder) as partial, tempfile.TemporaryDirectory() as scratch:
            # As root apt would drop to a user of its own, who cannot write here, and complain.
            download = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package)
            with_fresh_lists(lambda: run(*download, cwd=scratch))
            [archive] = Path(scratch).glob("*.deb")
            run("dpkg-deb", "-x", archive, f"{scratch}/unpacked")
            [vmlinuz] = Path(scratch).glob("unpacked/boot/vmlinuz-*")
            shutil.copy(vmlinuz, partial / "vmlinuz")
            for module in MODULES:
                content = module_content(Path(scratch, "unpacked"), module)
                if content is not None:
                    (partial / f"{module}.ko").write_bytes(content)
        return folder

    @staticmethod
    def _entries(kernel: Path, busybox: bytes) -> list[tuple[str, int, bytes]]:
        folders = ("bin", "data", "dev", "journal", "modules", "proc", "run", "sys")
        return [
            *((name, 0o040755, b"") for name in folders),
            ("dev/console", 0o020600, b""),
            ("bin/busybox", 0o100755, busybox),
            ("bin/sh", 0o120777, b"busybox"),
            *(
                (f"modules/{name}.ko", 0o100644, (kernel / f"{name}.ko").read_bytes())
                for name in MODULES
                if (kernel / f"{name}.ko").exists()
            ),
            ("init", 0o100755, INIT.read_bytes()),
        ]


def dynamic(name: str, program: Path) -> list[tuple[str, int, bytes]]:
    """Entries of a program of this host and of the libraries that it is linked with."""
    libraries = [Path(word) for word in re.findall(r"(/\S+) \(0x", run("ldd", program))]
    folders = sorted({str(parent)[1:] for path in libraries for parent in path.parents if parent != Path("/")})
    return [
        *((folder, 0o040755, b"") for folder in folders),
        *((str(path)[1:], 0o100755, path.read_bytes()) for path in libraries),
        (name, 0o100755, program.read_bytes()),
    ]


def _make_file_system(path: Path) -> None:
    """An empty ext4 of DISK_BYTES, all of it written now: a guest would otherwise go on with that in the background."""
    with open(path, "wb") as file:
        file.truncate(DISK_BYTES)
    options = ("-F", "-q", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard")
    run("mkfs.ext4", *options, path)


def copy_sparse(source: Path, target: Path) -> Path:
    """A copy of a file whose holes stay holes."""
    run("cp", "--sparse=always", source, target)
    return target
