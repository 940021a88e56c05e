# SPDX-License-Identifier: BSD-3-Clause
"""The mark of a promoted node: a file of the cluster's run-time files, which goes with the boot."""

from __future__ import annotations

from pathlib import Path

from .codes import Code, Failed

_GONE = "alone\n"
"""In the mark: the cluster knows that the resource runs nowhere else."""


class Mark:
    """Of one node."""

    def __init__(self, folder: str, node: str) -> None:
        self._path = Path(folder) / f"nbdkit-replication-{node}.promoted"

    @property
    def there(self) -> bool:
        """Whether the node is promoted."""
        return self._path.exists()

    @property
    def others_gone(self) -> bool:
        """Whether the cluster said last that the resource runs nowhere else."""
        try:
            return self._path.read_text(encoding="ascii") == _GONE
        except (OSError, ValueError):
            return False

    def put(self, others_gone: bool) -> None:
        """The node is promoted. Failed."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(_GONE if others_gone else "", encoding="ascii")
        except OSError as error:
            raise Failed(Code.GENERIC, f"cannot note that the node is promoted: {error}") from error

    def remove(self) -> None:
        """The node is not promoted. Failed."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise Failed(Code.GENERIC, f"cannot note that the node is not promoted: {error}") from error
