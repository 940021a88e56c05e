# SPDX-License-Identifier: BSD-3-Clause
"""QEMU's own replication driver as a System: the chain of its docs/block-replication.txt in a real QEMU.

    top0 (replication, mode=secondary) -> active (qcow2) -> hidden (qcow2) -> disk0 (raw)

The NBD server of the same process exports disk0 for the primary's writes and top0 as the guest face, instead of a
guest's virtio disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbd

from content import make_raw, qemu_img
from lab import Lab
from model.faces import RealSecondary
from model.model import Face
from nodes import disk_name, top_id
from waiting import DEADLINE_S, wait_until


class QemuDriver(RealSecondary):
    """A secondary in QEMU, with raw disks that hold `contents` (lengths are multiples of 512 bytes)."""

    def __init__(self, lab: Lab, contents: Sequence[bytes]) -> None:
        super().__init__(self._handle)
        self._lab = lab
        self._qemu = lab.qemu()
        self.disks = [
            make_raw(lab.folder / f"{disk_name(index)}.raw", len(content), content)
            for index, content in enumerate(contents)
        ]
        self._qemu.serve_nbd()
        for index, path in enumerate(self.disks):
            self._add(index, path)

    def _add(self, index: int, path: Path) -> None:
        """Make the overlays of one disk, open the chain and export both faces."""
        name, top = disk_name(index), top_id(index)
        size = str(path.stat().st_size)
        nodes: dict[str, dict[str, Any]] = {}
        for kind in ("active", "hidden"):
            image = self._lab.folder / f"{name}-{kind}.qcow2"
            qemu_img("create", "-q", "-f", "qcow2", image, size)
            file = {"driver": "file", "filename": str(image)}
            nodes[kind] = {"driver": "qcow2", "node-name": f"{name}-{kind}", "file": file}
        raw = {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": str(path)}}
        chain = {**nodes["active"], "backing": {**nodes["hidden"], "backing": name}}
        replication = {"driver": "replication", "node-name": top, "mode": "secondary", "top-id": top, "file": chain}
        execute = self._qemu.qmp.execute
        execute("blockdev-add", raw)
        execute("blockdev-add", replication)
        for export in (name, top):
            execute("block-export-add", type="nbd", id=f"export-{export}", node_name=export, name=export, writable=True)

    def _handle(self, export: str) -> nbd.NBD:
        handle = nbd.NBD()
        # QEMU states a minimum block of 512 bytes for the guest face and yet serves any alignment.
        handle.set_strict_mode(0)
        handle.connect_uri(f"nbd+unix:///{export}?socket={self._qemu.socket_path}")
        return handle

    def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Run a QMP command; raises QmpError."""
        return self._qemu.qmp.execute(command, arguments)

    def failover(self, wait: bool = True) -> None:
        """Fail over; `wait` for the end of the commit, which shows only in the false error that then goes away."""
        self.command("xen-set-replication", enable=False, primary=False, failover=True)
        if wait:
            wait_until(lambda: self.get_error() is None, "QEMU's commit ends", DEADLINE_S)

    def restart(self, kill: bool) -> None:
        """Not to be asked: QEMU keeps no stage, and its start empties the overlays."""
        raise NotImplementedError("QEMU's driver forgets its stage when the process ends")

    def guest_image(self, disk: int, size: int) -> bytes:
        """All of the guest face."""
        return self.read(Face.GUEST, disk, 0, size)
