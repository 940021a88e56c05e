# SPDX-License-Identifier: BSD-3-Clause
"""A small JSON file beside the record, with a result that a person looks at.

A file of its own: nothing of what a node may do depends on it, and other versions need not read it. It is replaced as a
whole, or, where there is no room, not at all: then the next process knows of an older one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from replication.disk import files
from replication.log import log

T = TypeVar("T")

NUMBER = (int, float)


class ResultFile:
    """One, in the state folder, if there is one."""

    def __init__(self, folder: str | None, name: str, size_max: int, what: str) -> None:
        """`size_max`: bytes that are read; `what`: whose result it is, for the log."""
        self._path = None if folder is None else os.path.join(folder, name)
        self._size_max = size_max
        self._what = what

    def load(self, read: Callable[[Any], T]) -> T | None:
        """What `read` makes of the content. None if there is none, and if it, or `read`, is not as it should be, of
        which the log tells; `read` may raise TypeError or KeyError."""
        if self._path is None:
            return None
        try:
            with open(self._path, "rb") as file:
                saved = json.loads(file.read(self._size_max))
            found = read(saved)
            json.dumps(saved, allow_nan=False)  # what is shown as JSON may not be what JSON cannot say
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log(f"{self._path} is not used: {error}")
            return None
        return found

    def save(self, content: Any) -> None:
        """Replace it, or say that it cannot be; however long that takes."""
        if self._path is None:
            return
        try:
            files.replace(self._path, json.dumps(content).encode())
        except OSError as error:
            log(f"cannot write {self._path}: {error.strerror}; the next process will not know of this {self._what}")


def check_members(saved: Any, kinds: Mapping[str, Any]) -> None:
    """TypeError unless it has these members, of these types, and no others."""
    if not isinstance(saved, dict) or saved.keys() != kinds.keys():
        raise TypeError("it has other members")
    for name, kind in kinds.items():
        if not isinstance(saved[name], kind):
            raise TypeError(f"{name} is of another type")
