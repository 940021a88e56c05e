# SPDX-License-Identifier: BSD-3-Clause
"""A secondary disk that calls back in the midst of a request, so that a test forces what comes in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from replication.disk.file import FileDisk
from replication.disk.files import Buffer


class WatchedDisk(FileDisk):
    """A raw file that calls `before(operation)` and `after(operation)`; either may raise."""

    def __init__(self, path: Path) -> None:
        super().__init__("disk0", str(path))
        self.before: Callable[[str], None] = lambda _: None
        self.after: Callable[[str], None] = lambda _: None

    def read(self, buffer: memoryview, offset: int) -> None:
        """As FileDisk's, like the others."""
        self.before("read")
        super().read(buffer, offset)
        self.after("read")

    def write(self, pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        """DiskError."""
        self.before("write")
        super().write(pieces, offset, fua)
        self.after("write")

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool = False) -> None:
        """DiskError."""
        self.before("zero")
        super().zero(offset, length, may_trim, fua)
        self.after("zero")

    def flush(self) -> None:
        """DiskError."""
        self.before("flush")
        super().flush()
        self.after("flush")
