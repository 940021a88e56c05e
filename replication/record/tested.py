# SPDX-License-Identifier: BSD-3-Clause
"""What the last test of a failover has found: test.json in the state folder."""

from __future__ import annotations

import threading
from typing import Any

from replication.record.resultfile import NUMBER, ResultFile, check_members

_NAME = "test.json"
_FILE_MAX = 1 << 16
_KINDS: dict[str, Any] = {
    "name": str,
    "result": str,
    "time": NUMBER,
    "duration": NUMBER,
    "rto": (int, float, type(None)),
    "epoch": int,
    "reason": (str, type(None)),
}


class LastTest:
    """What is known of tests."""

    def __init__(self, folder: str | None) -> None:
        """In memory alone without a folder. What cannot be read counts as not there."""
        self._file = ResultFile(folder, _NAME, _FILE_MAX, "test")
        # Orders the files. Held across writing one, which no request waits for.
        self._writing = threading.Lock()
        self.last: dict[str, Any] | None = self._file.load(_checked)

    def conclude(self, outcome: dict[str, Any]) -> None:
        """A test has ended, with this result; `save` makes it last."""
        self.last = outcome

    def save(self) -> None:
        """Write it down, or say that it cannot be; however long that takes."""
        with self._writing:
            self._file.save(self.last)


def _checked(saved: Any) -> dict[str, Any]:
    check_members(saved, _KINDS)
    found: dict[str, Any] = saved
    return found
