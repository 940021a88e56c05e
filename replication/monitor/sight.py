# SPDX-License-Identifier: BSD-3-Clause
"""What was learned of one node, as it was at one moment.

An answer is a node's word, and may be a later version's: what is read of it goes through these functions, which give
None for what is missing or of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = Mapping[str, Any]


def number(value: object) -> float | None:
    """A finite number, or None; truth values are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def text(value: object) -> str | None:
    """A string of bearable length, or None."""
    return value[:200] if isinstance(value, str) else None


def members(value: object) -> Json:
    """A JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: object) -> list[Json]:
    """The objects in a JSON list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


@dataclass(frozen=True)
class Sight:
    """One look at a node. Never changed: the next look makes another one."""

    name: str
    path: str
    up: bool
    since: float
    """When it was last seen to come or go, in seconds since 1970."""
    looked: float
    """When this was learned, in seconds since 1970."""
    trouble: str | None = None
    """Why there is no answer."""
    answer: Json = field(default_factory=dict)
    """query-replication; empty until there was one, and the last one of a node that is gone."""
    jobs: tuple[Json, ...] = ()
    failover: Json = field(default_factory=dict)
    """query-failover, of a secondary."""
    version: str | None = None

    @property
    def mode(self) -> str | None:
        """`primary` or `secondary`."""
        return text(self.answer.get("mode"))

    @property
    def stage(self) -> str | None:
        """The node's stage."""
        return text(self.answer.get("stage"))

    @property
    def link(self) -> str | None:
        """The state of the link."""
        return text(members(self.answer.get("link")).get("state"))

    @property
    def split_brain(self) -> bool | None:
        """Whether the link is refused because both nodes have gone on by themselves: by a code where the node has one,
        otherwise by the words of the reason (record/lineage.py). None: it says nothing of its link."""
        link = members(self.answer.get("link"))
        if not link:
            return None
        code, reason = text(link.get("code")) or "", text(link.get("reason")) or ""
        return "split-brain" in code or "split brain" in reason.lower()

    @property
    def checkpoint_time(self) -> float | None:
        """When the last checkpoint was taken, in seconds since 1970."""
        return number(members(self.answer.get("checkpoint")).get("time"))

    def checkpoint_age(self, now: float) -> float | None:
        """How old the last checkpoint is at `now`: the node's own measure, and the time since the look."""
        age = number(members(self.answer.get("checkpoint")).get("age"))
        return None if age is None else age + max(0.0, now - self.looked)

    @property
    def disks(self) -> Iterator[tuple[str, Json]]:
        """The disks with their names."""
        for disk in objects(self.answer.get("disks")):
            yield text(disk.get("name")) or "?", disk

    @property
    def lacking(self) -> float | None:
        """Bytes that the secondary lacks (on a primary: without what is on its way), or that this disk has lost. None:
        it does not say."""
        key = "missing-bytes" if self.mode == "primary" else "out-of-sync-bytes"
        found = [value for _, disk in self.disks if (value := number(disk.get(key))) is not None]
        return sum(found) if found else None

    def total(self, key: str) -> float:
        """The sum of a number of bytes over the disks."""
        return sum(number(disk.get(key)) or 0.0 for _, disk in self.disks)

    def moved(self, *keys: str) -> float:
        """The sum of some counters of bytes over the disks."""
        return sum(number(members(disk.get("totals")).get(key)) or 0.0 for _, disk in self.disks for key in keys)
