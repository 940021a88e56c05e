# SPDX-License-Identifier: BSD-3-Clause
"""What the last test of a failover has found: test.json in the state folder.

As with verify.json (verified.py), nothing of what a node may do depends on it. It is replaced as a whole, or, where
there is no room, not at all: then the next process knows of an older one.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

from replication.disk import files
from replication.log import log

_NAME = "test.json"
_FILE_MAX = 1 << 16
_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    "name": str,
    "result": str,
    "time": _NUMBER,
    "duration": _NUMBER,
    "rto": (int, float, type(None)),
    "epoch": int,
    "reason": (str, type(None)),
}


class LastTest:
    """What is known of tests."""

    def __init__(self, folder: str | None) -> None:
        """In memory alone without a folder. What cannot be read counts as not there."""
        self.last: dict[str, Any] | None = None
        self._path = None if folder is None else os.path.join(folder, _NAME)
        # Orders the files. Held across writing one, which no request waits for.
        self._writing = threading.Lock()
        try:
            self._load()
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log(f"{self._path} is not used: {error}")

    def _load(self) -> None:
        if self._path is None:
            return
        with open(self._path, "rb") as file:
            last = json.loads(file.read(_FILE_MAX))
        if not isinstance(last, dict) or last.keys() != _KINDS.keys():
            raise TypeError("it has other members")
        for name, kind in _KINDS.items():
            if not isinstance(last[name], kind):
                raise TypeError(f"{name} is of another type")
        json.dumps(last, allow_nan=False)  # what is shown as JSON may not be what JSON cannot say
        self.last = last

    def conclude(self, outcome: dict[str, Any]) -> None:
        """A test has ended, with this result; `save` makes it last."""
        self.last = outcome

    def save(self) -> None:
        """Write it down, or say that it cannot be; however long that takes."""
        with self._writing:
            if self._path is None:
                return
            try:
                files.replace(self._path, json.dumps(self.last).encode())
            except OSError as error:
                log(f"cannot write {self._path}: {error.strerror}; the next process will not know of this test")
