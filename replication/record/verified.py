# SPDX-License-Identifier: BSD-3-Clause
"""What the last comparison of the disks has found, and where one is: verify.json in the state folder.

A file of its own: nothing of what a node may do depends on it, and other versions need not read it. It is replaced as a
whole, or, where there is no room, not at all: then the next process knows of an older one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from replication.disk import files
from replication.log import log

_NAME = "verify.json"
_FILE_MAX = 1 << 20
_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    "result": str,
    "time": _NUMBER,
    "duration": _NUMBER,
    "compared-bytes": int,
    "different-bytes": int,
    "left-out-bytes": int,
    "ranges": list,
    "repair": bool,
    "reason": (str, type(None)),
}


@dataclass
class Place:
    """How far a comparison is."""

    disk: str
    offset: int
    """In front of it all has been compared; a multiple of digests.RANGE."""
    rate: int | None
    repair: bool
    began: float
    left_out: int
    different: int
    ranges: list[dict[str, Any]]


_PLACE_KINDS: dict[str, Any] = {
    "disk": str,
    "offset": int,
    "rate": (int, type(None)),
    "repair": bool,
    "began": _NUMBER,
    "left_out": int,
    "different": int,
    "ranges": list,
}


class Verified:
    """What is known of comparisons. One thread changes it, all may read."""

    def __init__(self, folder: str | None) -> None:
        """In memory alone without a folder. What cannot be read counts as not there."""
        self.last: dict[str, Any] | None = None
        self.place: Place | None = None
        self._path = None if folder is None else os.path.join(folder, _NAME)
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
            saved = json.loads(file.read(_FILE_MAX))
        last, place = saved["last"], saved["place"]
        if last is not None:
            _check(last, _KINDS)
        if place is not None:
            _check(place, _PLACE_KINDS)
        json.dumps(saved, allow_nan=False)  # what is shown as JSON may not be what JSON cannot say
        self.last = last
        self.place = None if place is None else Place(**place)

    def conclude(self, outcome: dict[str, Any]) -> None:
        """A comparison has ended, with this result."""
        self.last, self.place = outcome, None
        self._save()

    def note(self, place: Place) -> None:
        """A comparison is so far."""
        self.place = place
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        saved = {"last": self.last, "place": None if self.place is None else asdict(self.place)}
        try:
            files.replace(self._path, json.dumps(saved).encode())
        except OSError as error:
            log(f"cannot write {self._path}: {error.strerror}; the next process will not know of this comparison")


def _check(saved: Any, kinds: dict[str, Any]) -> None:
    """TypeError unless it has these members, of these types."""
    if not isinstance(saved, dict) or saved.keys() != kinds.keys():
        raise TypeError("it has other members")
    for name, kind in kinds.items():
        if not isinstance(saved[name], kind):
            raise TypeError(f"{name} is of another type")
    for part in saved["ranges"]:
        if not isinstance(part, dict) or part.keys() != {"disk", "offset", "length"}:
            raise TypeError("ranges are of another type")
        if not isinstance(part["disk"], str) or any(type(part[name]) is not int for name in ("offset", "length")):
            raise TypeError("ranges are of another type")
