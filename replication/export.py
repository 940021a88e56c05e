# SPDX-License-Identifier: BSD-3-Clause
"""Exports: which name leads to which face, and the gate before every request.

Every face's methods may be called by several threads at once; they raise DiskError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from replication.errors import DiskError
from replication.gate import Gate
from replication.image.face import Extent
from replication.node import Node
from replication.primary import PrimarySide
from replication.primary_disk import PrimaryDisk
from replication.secondary_disk import SecondaryDisk


class Face(ABC):
    """What one export offers to its clients."""

    size: int
    description: str

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    @abstractmethod
    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from `offset`."""

    @abstractmethod
    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Write the data at `offset`."""

    @abstractmethod
    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Make a range read as zeroes. Trim is the same with `may_trim`: what a trimmed block reads must be the same
        on both sides."""

    @abstractmethod
    def flush(self) -> None:
        """Make stable what was answered, on any connection: that is what multi-conn promises."""

    @abstractmethod
    def extents(self, offset: int, length: int) -> list[Extent]:
        """Extents from `offset` on."""


class PrimaryFace(Face):
    """The guest's disk on the primary."""

    def __init__(self, gate: Gate, disk: PrimaryDisk, size: int) -> None:
        super().__init__(gate)
        self._disk = disk
        self.size = size
        self.description = "the guest's disk" if disk.local is not None else "writes for the secondary"

    def read(self, buffer: memoryview, offset: int) -> None:
        with self._gate:
            self._disk.read(buffer, offset)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        with self._gate:
            self._disk.write(data, offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        with self._gate:
            self._disk.zero(offset, length, may_trim, fua)

    def flush(self) -> None:
        with self._gate:
            self._disk.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        with self._gate:
            return self._disk.extents(offset, length)


class TargetFace(Face):
    """What the primary writes to."""

    def __init__(self, gate: Gate, disk: SecondaryDisk) -> None:
        super().__init__(gate)
        self._disk = disk
        self.size = disk.size
        self.description = "target face: for the primary only"

    def read(self, buffer: memoryview, offset: int) -> None:
        with self._gate:
            self._disk.target_read(buffer, offset)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        with self._gate:
            self._disk.target_write(data, offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        with self._gate:
            self._disk.target_zero(offset, length, may_trim, fua)

    def flush(self) -> None:
        with self._gate:
            self._disk.target_flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        with self._gate:
            return self._disk.target_extents(offset, length)


class GuestFace(Face):
    """What the secondary's guest sees."""

    def __init__(self, gate: Gate, disk: SecondaryDisk) -> None:
        super().__init__(gate)
        self._disk = disk
        self.size = disk.size
        self.description = "guest face: the last checkpoint plus the guest's own writes"

    def read(self, buffer: memoryview, offset: int) -> None:
        with self._gate:
            self._disk.guest_read(buffer, offset)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        with self._gate:
            self._disk.guest_write(data, offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        with self._gate:
            self._disk.guest_zero(offset, length, may_trim, fua)

    def flush(self) -> None:
        with self._gate:
            self._disk.guest_flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        with self._gate:
            return self._disk.guest_extents(offset, length)


class Exports:
    """The exports of a node, by name."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of all exports."""
        side = self._node.side
        if isinstance(side, PrimarySide):
            return [(disk.name, "primary") for disk in side.disks]
        named = []
        for disk in side.disks:
            named.append((disk.name, "target face, for the primary only"))
            if disk.top_id != disk.name:
                named.append((disk.top_id, f"guest face of {disk.name}"))
        return named

    def default(self) -> str:
        """What the empty export name stands for: the first disk of a primary; nothing on a secondary, where a
        mistaken primary must not write into the guest face."""
        side = self._node.side
        return side.disks[0].name if isinstance(side, PrimarySide) else ""

    def open(self, name: str) -> Face:
        """The face of an export; DiskError names the valid ones."""
        side = self._node.side
        gate = self._node.gate
        if isinstance(side, PrimarySide):
            for disk in side.disks:
                if name == disk.name or (not name and disk is side.disks[0]):
                    return PrimaryFace(gate, disk, side.size_of(disk))
        else:
            for secondary in side.disks:
                if name == secondary.name:
                    return TargetFace(gate, secondary)
                if name == secondary.top_id:
                    return GuestFace(gate, secondary)
        valid = ", ".join(f"'{known}'" for known, _ in self.names())
        raise DiskError(f"there is no export '{name[:255]}': the exports are {valid}")
