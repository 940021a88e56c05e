# SPDX-License-Identifier: BSD-3-Clause
"""The reference model: what a secondary must show on both faces, in as few words as possible.

Per disk there are two arrays of bytes. `disk` is the secondary disk, `guest` what the guest face shows; the two
overlays, the copying and the commit do not occur here. A checkpoint copies `disk` to `guest`, a failover `guest` to
`disk`. From `done` on both are the same array. Stages, refusals and texts are those of the project's contract, which
takes them from QEMU's `replication` driver; where the two differ, tests/model/test_qemu_driver.py says so.

Trim on either face makes the range read as zeros, as zero does: NBD leaves the content open, this project does not.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Face(Enum):
    """The two exports of a disk."""

    TARGET = "target"
    GUEST = "guest"

    def __repr__(self) -> str:
        return f"Face.{self.name}"  # as in the source, so that a failing history can be pasted into a test


@dataclass(unsafe_hash=True)
class Refused(Exception):
    """A request was answered with `errno`."""

    errno: int


@dataclass(unsafe_hash=True)
class CommandRefused(Exception):
    """A command was answered with the error `desc`."""

    desc: str


class ModelDisk:
    """One secondary disk of the model; the same object in `disk` and `guest` once the stage is `done`."""

    def __init__(self, content: bytes) -> None:
        self.disk = bytearray(content)
        self.guest = bytearray(content)


class Model:
    """A secondary with disks that hold `contents` at first, all of one stage.

    There is no stage `failover`: for the guest, for the target face and for every command it is as `done`, and how
    long the commit takes is nobody's business.
    """

    def __init__(self, contents: Sequence[bytes]) -> None:
        self.disks = [ModelDisk(content) for content in contents]
        self.stage = "none"

    # --- requests

    def read(self, face: Face, disk: int, offset: int, length: int) -> bytes:
        """Bytes of a face; raises Refused."""
        return bytes(self._face(face, disk)[offset : offset + length])

    def write(self, face: Face, disk: int, offset: int, data: bytes, fua: bool = False) -> None:
        """Overwrite bytes of a face; raises Refused."""
        self._face(face, disk)[offset : offset + len(data)] = data

    def zero(self, face: Face, disk: int, offset: int, length: int, fua: bool = False) -> None:
        """Write zeros to a face; raises Refused."""
        self.write(face, disk, offset, bytes(length), fua)

    def trim(self, face: Face, disk: int, offset: int, length: int, fua: bool = False) -> None:
        """As `zero`."""
        self.zero(face, disk, offset, length, fua)

    def flush(self, face: Face, disk: int) -> None:
        """Nothing is ever in flight here; raises Refused as a write would."""
        self._face(face, disk)

    def _face(self, face: Face, disk: int) -> bytearray:
        if face is Face.TARGET:
            if self.stage == "done":
                raise Refused(errno.ESHUTDOWN)
            return self.disks[disk].disk
        if self.stage == "none":
            raise Refused(errno.EIO)
        return self.disks[disk].guest

    # --- commands

    def start(self) -> None:
        """Start replication, with its first checkpoint; a promoted secondary ignores it."""
        if self.stage == "running":
            raise CommandRefused("Block replication is running or done")
        if self.stage == "none":
            self.stage = "running"
            self.checkpoint()

    def checkpoint(self) -> None:
        """The guest face becomes the secondary disk."""
        if self.stage == "none":
            raise CommandRefused("Backup job was cancelled unexpectedly")
        if self.stage == "running":
            for each in self.disks:
                each.guest = bytearray(each.disk)

    def stop(self) -> None:
        """Planned stop: the guest goes on with what the primary wrote."""
        self._end(guest_wins=False)

    def failover(self, wait: bool = True) -> None:
        """The guest goes on with the last checkpoint and its own writes."""
        self._end(guest_wins=True)

    def _end(self, *, guest_wins: bool) -> None:
        if self.stage == "none":
            raise CommandRefused("Block replication is not running")
        if self.stage == "running":
            self.stage = "done"
            for each in self.disks:
                if guest_wins:
                    each.disk = each.guest
                else:
                    each.guest = each.disk

    def get_error(self) -> str | None:
        """The error to report, None if there is none."""
        return "Block replication is not running" if self.stage == "none" else None

    def restart(self, kill: bool) -> None:
        """A process that is ended, however, and started again goes on as if nothing had happened."""
