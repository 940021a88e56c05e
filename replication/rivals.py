# SPDX-License-Identifier: BSD-3-Clause
"""Which other nodes own, or have owned, what this node owns as well: what it has met of them, and what it says of it.

What follows from an encounter, for which of the two, is decided by record/encounter.py. A split brain is kept in the
record and told, and changes nothing else: who stops or overwrites one of the two is a person. It ends when a primary
and its secondary have accepted each other, or a person says that what is here counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from replication.events import EventHub
from replication.log import log
from replication.order.pause import pause
from replication.reason import Reason
from replication.record.ancestry import Ancestry
from replication.record.encounter import Encounter, Finding
from replication.record.state import Record

TOLD_MAX = 64
"""Nodes of which it has been told: whoever reaches the port of the pair can say that it is another one."""


class Rivals:
    """Of one node. Every method may be called by any thread."""

    def __init__(
        self,
        record: Record,
        ancestry: Ancestry,
        hub: EventHub,
        outdate: Callable[[Reason, str, Callable[[], bool]], bool],
        keep: Callable[[], None],
    ) -> None:
        """`outdate(code, text, still)` makes the node outdated, if `still()` says so when its guest stands; whether it
        is. `keep()` saves the record, now or as soon as it can."""
        self._record = record
        self._ancestry = ancestry
        self._hub = hub
        self._outdate = outdate
        self._keep = keep
        # Protects the next one, and `split_brain` of the record. Never held across I/O.
        self._lock = threading.Lock()
        # The ids of those with which a split brain was told since the last agreement.
        self._told: set[str | None] = set()

    def met(self, encounter: Encounter) -> None:
        """Learn from it. What cannot be saved is so all the same, and is saved later."""

        def still() -> bool:
            return encounter.find(self._ancestry.lineage) is Finding.OUTDATED

        finding = encounter.find(self._ancestry.lineage)
        if finding is Finding.OUTDATED and not self._outdate(encounter.code, encounter.text, still):
            finding = encounter.find(self._ancestry.lineage)  # the guest has written meanwhile
        if finding is Finding.SPLIT_BRAIN:
            self._split(encounter)

    def _split(self, encounter: Encounter) -> None:
        record, found = self._record, encounter.as_split_brain().to_json()
        with self._lock:
            if Reason.SPLIT_BRAIN.value in record.overruled or encounter.node in self._told:
                return
            if len(self._told) >= TOLD_MAX:
                return
            self._told.add(encounter.node)
            news = record.split_brain is None
            if news:
                record.split_brain = found
        pause("split-brain.found")
        if news:
            self._keep()
        log(found["reason"])
        self._hub.emit("REPLICATION_SPLIT_BRAIN", code=found["code"], reason=found["reason"])

    @property
    def split(self) -> str | None:
        """Why a person has to decide whose writes count."""
        found = self._record.split_brain
        return None if found is None else str(found["reason"])

    def agreed(self) -> bool:
        """A primary and its secondary have accepted each other, so the two are none. Whether that was new: then the
        caller saves it."""
        with self._lock:
            self._told.clear()
            known, self._record.split_brain = self._record.split_brain is not None, None
        return known

    def overrule(self) -> bool:
        """A person says that what is here counts; that lasts until the next agreement. As `agreed`."""
        record = self._record
        with self._lock:
            known = record.split_brain is not None
            if known:
                record.overruled = sorted({*record.overruled, Reason.SPLIT_BRAIN.value})
                record.split_brain = None
        return known
