# SPDX-License-Identifier: BSD-3-Clause
"""What has happened to one node: its last events, its last hour as numbers, and counters over its events.

Invariants: memory is bounded by EVENTS_MAX events of EVENT_BYTES_MAX bytes and SAMPLES_MAX samples. Checkpoints, which
come every second, are counted and do not push other events out.
"""

from __future__ import annotations

import bisect
import json
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from replication.monitor.sight import Json, Sight, members, number, text

EVENTS_MAX = 500
EVENT_BYTES_MAX = 4096
SAMPLE_S = 5.0
SAMPLES_MAX = int(3600 / SAMPLE_S)
CASES_MAX = 100
"""Of kinds of failures that are counted: a case times a disk."""

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """How often a duration was how long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    def copy(self) -> Histogram:
        """A copy."""
        other = Histogram()
        other.counts, other.sum_s = list(self.counts), self.sum_s
        return other


class Sample(NamedTuple):
    """A node at one moment; None: not known. Rates are bytes a second since the sample before."""

    time: float
    age: float | None
    read_rate: float | None
    write_rate: float | None
    queue: float | None
    lacking: float | None
    overlay: float | None
    checkpoint_s: float | None
    """The longest checkpoint since the sample before, in seconds."""


class Journal:
    """The history of one node. Every method may be called by several threads."""

    def __init__(self, told: Callable[[dict[str, Any]], None] = lambda event: None) -> None:
        """`told(event)` is called for each event that is kept; it must not block."""
        self._told = told
        # Protects all below; never held across I/O.
        self._lock = threading.Lock()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self._durations = Histogram()
        self._failures: dict[tuple[str, str], tuple[object, int]] = {}
        self._errors: dict[str, int] = {}
        self._longest_s: float | None = None
        self._moved: tuple[float, float, float] | None = None

    def put(self, event: Json) -> None:
        """Keep an event of the node, or of the monitor about it."""
        name, data = text(event.get("event")) or "?", members(event.get("data"))
        if name == "REPLICATION_CHECKPOINT":
            self._count_checkpoint(number(data.get("duration")))
            return
        if name == "REPLICATION_ERROR":
            self._count_failure(data)
        kept = {"event": name, "data": data, "timestamp": members(event.get("timestamp"))}
        if len(json.dumps(kept)) > EVENT_BYTES_MAX:
            stamp = members(event.get("timestamp"))
            kept["timestamp"] = {key: number(stamp.get(key)) for key in ("seconds", "microseconds")}
            kept["data"] = {"note": f"more than {EVENT_BYTES_MAX} bytes of data, not kept"}
        with self._lock:
            self._events.append(kept)
        self._told(kept)

    def sample(self, sight: Sight, now: float) -> Sample | None:
        """Take a sample unless the last one is younger than SAMPLE_S."""
        with self._lock:
            if self._samples and 0 <= now - self._samples[-1].time < SAMPLE_S * 0.9:
                return None
            read, written = sight.moved("read", "guest-read"), sight.moved("written", "guest-written")
            before, self._moved = self._moved, (now, read, written) if sight.up else None
            taken = Sample(
                now,
                sight.checkpoint_age(now),
                _rate(before, self._moved, 1),
                _rate(before, self._moved, 2),
                sight.total("forward-queue-bytes") if sight.up and sight.mode == "primary" else None,
                sight.total("out-of-sync-bytes") if sight.up else None,
                sight.total("active-bytes") + sight.total("hidden-bytes")
                if sight.up and sight.mode == "secondary"
                else None,
                self._longest_s,
            )
            self._longest_s = None
            self._samples.append(taken)
            return taken

    def events(self) -> list[dict[str, Any]]:
        """The events that are kept, oldest first."""
        with self._lock:
            return list(self._events)

    def samples(self) -> list[Sample]:
        """The samples of the last hour, oldest first."""
        with self._lock:
            return list(self._samples)

    def durations(self) -> Histogram:
        """How long the checkpoints took that were seen."""
        with self._lock:
            return self._durations.copy()

    def errors(self) -> dict[str, int]:
        """How many failures there were of each case."""
        with self._lock:
            return dict(self._errors)

    def _count_checkpoint(self, duration_s: float | None) -> None:
        if duration_s is None or duration_s < 0:
            return
        with self._lock:
            self._durations.add(duration_s)
            self._longest_s = max(duration_s, self._longest_s or 0.0)

    def _count_failure(self, data: Json) -> None:
        """An event stands for several failures: its `count` goes up from the `first` one on."""
        case, disk = (str(data.get(key))[:40] for key in ("case", "disk"))
        count = int(number(data.get("count")) or 1)
        first = number(data.get("first"))
        with self._lock:
            if (case, disk) not in self._failures and len(self._failures) >= CASES_MAX:
                return
            known = self._failures.get((case, disk))
            before = known[1] if known is not None and known[0] == first else 0
            self._errors[case] = self._errors.get(case, 0) + max(0, count - before)
            self._failures[case, disk] = (first, max(count, before))


def _rate(before: tuple[float, float, float] | None, now: tuple[float, float, float] | None, part: int) -> float | None:
    """Bytes a second between two counts; a node that has started again counts from zero."""
    if before is None or now is None or now[0] <= before[0]:
        return None
    return max(0.0, now[part] - before[part]) / (now[0] - before[0])
