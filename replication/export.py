# SPDX-License-Identifier: BSD-3-Clause
"""Exports: which name leads to which face, and the gate before every request.

What is behind a name may change while clients are connected (a promoted secondary becomes a primary). So an export
looks its face up for every request, inside the gate, with which such a change is alone.
"""

from __future__ import annotations

from replication.errors import DiskError
from replication.gate import Gate
from replication.image.face import Extent
from replication.node import Node
from replication.side import Face


class Export:
    """One export as one client sees it. Every method may be called by several threads at once; they raise DiskError."""

    def __init__(self, gate: Gate, faces: dict[str, Face], name: str) -> None:
        self._gate = gate
        self._faces = faces
        self._name = name
        face = faces[name]
        self.size = face.size()
        self.description = face.description

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from `offset`."""
        with self._gate:
            self._faces[self._name].read(buffer, offset)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Write the data at `offset`."""
        with self._gate:
            self._faces[self._name].write(data, offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Make a range read as zeroes."""
        with self._gate:
            self._faces[self._name].zero(offset, length, may_trim, fua)

    def flush(self) -> None:
        """Make stable what was answered."""
        with self._gate:
            self._faces[self._name].flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Extents from `offset` on."""
        with self._gate:
            return self._faces[self._name].extents(offset, length)


class Exports:
    """The exports of a node, by name."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of all exports."""
        return [(name, face.description) for name, face in self._node.faces.items()]

    def default(self) -> str:
        """What the empty export name stands for: the first disk of a primary; nothing on a secondary, where a
        mistaken primary must not write into the guest face."""
        return self._node.side.default

    def open(self, name: str) -> Export:
        """An export by name; DiskError names the valid ones."""
        wanted = name or self.default()
        if wanted not in self._node.faces:
            valid = ", ".join(f"'{known}'" for known in self._node.faces)
            raise DiskError(f"there is no export '{name[:255]}': the exports are {valid}")
        return Export(self._node.gate, self._node.faces, wanted)
