# SPDX-License-Identifier: BSD-3-Clause
"""Writing a file system's changes through the primary's export."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .node import Node
from .processes import Processes, end, run, wait_until


def can_mount() -> bool:
    """Whether a file system on an export can be mounted here: FUSE, a loop device and root."""
    tools = all(shutil.which(name) for name in ("nbdfuse", "fusermount3", "mount", "umount"))
    return tools and os.geteuid() == 0 and os.path.exists("/dev/fuse") and os.path.exists("/dev/loop-control")


@contextlib.contextmanager
def mounted(processes: Processes, node: Node, folder: Path) -> Iterator[Path]:
    """The file system on the primary's export, mounted through nbdfuse and a loop device; unmounted at the end."""
    fuse, mount = folder / "nbdfuse", folder / "mount"
    fuse.mkdir()
    mount.mkdir()
    server = processes.start(("nbdfuse", fuse / "disk", node.uri("disk0")), folder / "nbdfuse.log")
    processes.later(lambda: _unmount(server, fuse, mount))
    wait_until(lambda: os.path.ismount(fuse) and (fuse / "disk").exists(), "nbdfuse shows the disk")
    run("mount", "-o", "loop", fuse / "disk", mount)
    yield mount
    _unmount(server, fuse, mount)


def _unmount(server: subprocess.Popen[str], fuse: Path, mount: Path) -> None:
    if os.path.ismount(mount):
        # umount writes everything back and flushes the disk; the loop device goes with it.
        run("umount", mount)
    if os.path.ismount(fuse):
        run("fusermount3", "-u", fuse)
    end(server)


def difference_image(folder: Path, wanted: Path, node: Node) -> Path:
    """A qcow2 image with what has to be written to the primary's export to make it equal to `wanted`."""
    image = folder / "difference.qcow2"
    image.unlink(missing_ok=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", wanted, "-F", "raw", image)
    run("qemu-img", "rebase", "-b", node.uri("disk0"), "-F", "raw", image)
    return image
