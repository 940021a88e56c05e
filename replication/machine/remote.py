# SPDX-License-Identifier: BSD-3-Clause
"""Host A's end of the connection to the receiver."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .monitor import FtError, Refused, connected, named


class Remote:
    """Host A's connection to the receiver."""

    NAME = "the receiver on B"

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Connect; FtError."""
        self._lines = connected(path, self.NAME, timeout_s)

    def call(self, command: str, timeout_s: float, epoch: int = 0) -> dict[str, Any]:
        """Give a command: what it answers. FtError; the connection is closed after anything but Refused."""
        deadline = time.monotonic() + timeout_s
        try:
            with named(self.NAME, "does not answer"):
                self._lines.send({"do": command, "epoch": epoch}, deadline)
                answer = self._lines.receive(deadline)
        except FtError:
            self._lines.close()  # the answer may still come, and would be taken for that of the next command
            raise
        if "error" in answer:
            raise Refused(f"{self.NAME}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
