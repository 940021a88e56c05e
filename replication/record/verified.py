# SPDX-License-Identifier: BSD-3-Clause
"""What the last comparison of the disks has found, and where one is: verify.json in the state folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from replication.record.resultfile import NUMBER, ResultFile, check_members

_NAME = "verify.json"
_FILE_MAX = 1 << 20
_KINDS: dict[str, Any] = {
    "result": str,
    "time": NUMBER,
    "duration": NUMBER,
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
    "began": NUMBER,
    "left_out": int,
    "different": int,
    "ranges": list,
}


class Verified:
    """What is known of comparisons. One thread changes it, all may read."""

    def __init__(self, folder: str | None) -> None:
        """In memory alone without a folder. What cannot be read counts as not there."""
        self._file = ResultFile(folder, _NAME, _FILE_MAX, "comparison")
        self.last: dict[str, Any] | None = None
        self.place: Place | None = None
        found = self._file.load(_read)
        if found is not None:
            self.last, self.place = found

    def conclude(self, outcome: dict[str, Any]) -> None:
        """A comparison has ended, with this result."""
        self.last, self.place = outcome, None
        self._save()

    def note(self, place: Place) -> None:
        """A comparison is so far."""
        self.place = place
        self._save()

    def _save(self) -> None:
        self._file.save({"last": self.last, "place": None if self.place is None else asdict(self.place)})


def _read(saved: Any) -> tuple[dict[str, Any] | None, Place | None]:
    last, place = saved["last"], saved["place"]
    if last is not None:
        _check(last, _KINDS)
    if place is not None:
        _check(place, _PLACE_KINDS)
    return last, None if place is None else Place(**place)


def _check(saved: Any, kinds: dict[str, Any]) -> None:
    """TypeError unless it has these members, of these types."""
    check_members(saved, kinds)
    for part in saved["ranges"]:
        if not isinstance(part, dict) or part.keys() != {"disk", "offset", "length"}:
            raise TypeError("ranges are of another type")
        if not isinstance(part["disk"], str) or any(type(part[name]) is not int for name in ("offset", "length")):
            raise TypeError("ranges are of another type")
