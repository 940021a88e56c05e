# SPDX-License-Identifier: BSD-3-Clause
"""The images of a stack by name: which one failed, and which one a run of blocks is read from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from replication.disk.face import Disk
from replication.errors import DiskError, StillWaiting


class Layer(Enum):
    """Which image a failed operation was on."""

    ACTIVE = "active disk"
    HIDDEN = "hidden disk"
    SECONDARY = "secondary disk"


class LayerError(DiskError):
    """An operation on one image of the stack failed."""

    def __init__(self, cause: DiskError, layer: Layer, operation: str, offset: int, length: int) -> None:
        super().__init__(f"{layer.value}: {cause}", cause.errno)
        self._cause = cause
        self.layer = layer
        self.operation = operation
        self.offset = offset
        self.length = length

    @property
    def still_waiting(self) -> bool:
        """Whether it was given up because something takes long (StillWaiting)."""
        return isinstance(self._cause, StillWaiting)

    def again(self) -> LayerError:
        return LayerError(self._cause, self.layer, self.operation, self.offset, self.length)


@contextmanager
def on_layer(layer: Layer, operation: str, offset: int, length: int) -> Iterator[None]:
    """Say where a failure happened."""
    try:
        yield
    except LayerError:
        raise
    except DiskError as error:
        raise LayerError(error, layer, operation, offset, length) from error


def flush_secondary(disk: Disk) -> None:
    """Make the secondary disk stable; LayerError."""
    with on_layer(Layer.SECONDARY, "flush", 0, 0):
        disk.flush()


class Source(Enum):
    """Where the visible content of a run of blocks is."""

    ACTIVE = "active"
    HIDDEN = "hidden"
    ZERO = "zero"
    DISK = "disk"
