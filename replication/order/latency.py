# SPDX-License-Identifier: BSD-3-Clause
"""How long requests take, and what they wait for.

Always at work, so it costs a request little: two readings of the clock, one step of a counter, no allocation, no lock.
What a request waits for is noted where it waits, and only if it does; what is left of its time is its disk's (on a
secondary, its images'), with the microseconds of this program.

Invariants
* Memory is bounded: a histogram has a fixed number of buckets; there is one set of them for each export and kind of
  request, one Course for each thread, and a stall for each minute of an hour.
* A step of a counter is not lost between threads: none of the calls in front of it lies between its reading and its
  writing, and only at calls and loops does CPython let another thread run.
* Of a thread that is not at work on a client's request (a resync, a commit) nothing is noted.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from threading import get_ident
from typing import Any, Final, NamedTuple

READ, WRITE, BATCH, ZERO, FLUSH = "read", "write", "batch", "zero", "flush"
"""The kinds of requests: `zero` is also trim, `batch` many small writes of a primary (batch.py)."""

GATE: Final = 0
LOCK: Final = 1
QUEUE: Final = 2
SECONDARY: Final = 3
WAITS = ("gate", "lock", "queue", "secondary")
"""What a request may wait for, beside its disk: the gate (gate.py), other requests on the same blocks, room in the
forward queue, and with protocol=sync the secondary's answer."""
_PARTS = range(len(WAITS))
_NOTHING: Final = -1
_SEVERAL: Final = -2

CHECKPOINT: Final = "checkpoint"
START: Final = "start"
STOP: Final = "stop"
FAILOVER: Final = "failover"
ROLE_CHANGE: Final = "role-change"
PAIRING: Final = "pairing"
RESIZE: Final = "resize"
TEST: Final = "test"
STANDSTILL: Final = "standstill"
OVERLAP: Final = "overlap"
RESYNC: Final = "resync"
VERIFY: Final = "verify"
COMMIT: Final = "commit"
QUEUE_FULL: Final = "queue-full"
LINK_LOST: Final = "link-lost"
SLOW_SECONDARY: Final = "slow-secondary"
SLOW_DISK: Final = "slow-disk"

REASONS = {
    CHECKPOINT: "a checkpoint had all requests wait",
    START: "a start of replication had all requests wait",
    STOP: "a stop of replication had all requests wait",
    FAILOVER: "a failover, or the end of its commit, had all requests wait",
    ROLE_CHANGE: "a change of this node's role had all requests wait",
    PAIRING: "an agreement with the primary had all requests wait",
    RESIZE: "the growth of a disk had all requests wait",
    TEST: "the start of a test had all requests wait",
    STANDSTILL: "the guest of this node stands still: query-replication says why",
    OVERLAP: "another request was at work on the same blocks",
    RESYNC: "the resync was reading the same blocks",
    VERIFY: "a comparison of the disks was reading the same blocks",
    COMMIT: "the commit was bringing down the same blocks",
    QUEUE_FULL: "the forward queue was full: the link or the secondary takes less than is written",
    LINK_LOST: "the link to the secondary was lost meanwhile",
    SLOW_SECONDARY: "the secondary was slow to answer",
    SLOW_DISK: "the disk took so long (on a secondary: the disk or its overlays)",
}
"""Why a request took long: code and text."""

_BUCKETS = 64
"""One for each power of two, in microseconds: more than a clock can count."""
_FIRST, _LAST = 2, 27
BOUNDS_S = tuple((1 << bucket) / 1e6 for bucket in range(_FIRST, _LAST + 1))
"""Upper bounds of the buckets that are told, in seconds: from 4 us to 134 s."""

STALL_S = 0.1
"""What is a stall: so long a guest's request is not noticed."""

_MINUTE_S = 60.0
HOUR_S = 3600.0
_KINDS_MAX, _NAME_MAX = 1024, 255
"""Of another node's answer: as many disks as there may be, times the kinds of requests."""
_COURSES_MAX = 1024
"""Threads that are known at a time, unless more of them are at work: those of clients that have gone are not told."""


class Histogram:
    """How often something took how long."""

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count(int(seconds * 1e6).bit_length(), seconds)

    def count(self, bucket: int, seconds: float) -> None:
        """`add`, for who knows the bucket."""
        self.counts[bucket] += 1
        self.sum_s += seconds

    def to_json(self) -> dict[str, Any]:
        """`counts`, one for each of BOUNDS_S and one for what is above, and their sum in seconds."""
        return _told(self.counts, self.sum_s)


def _told(counts: list[int], sum_s: float) -> dict[str, Any]:
    told = [sum(counts[: _FIRST + 1]), *counts[_FIRST + 1 : _LAST + 1], sum(counts[_LAST + 1 :])]
    return {"counts": told, "sum": sum_s}


class Tally:
    """The requests of one kind to one export."""

    def __init__(self, account: Account, export: str, operation: str) -> None:
        self.account = account
        self.export = export
        self.operation = operation
        # All of them, as in a Histogram, and a step nearer.
        self.counts = [0] * _BUCKETS
        self.sum_s = 0.0
        self.waits = [Histogram() for _ in WAITS]
        # By how much the counts and the sum of the disk's time differ from those above: for a request that has waited,
        # one less in the bucket of all its time, one more in that of what was not waiting. The others' time is all the
        # disk's, so nothing more is counted for them.
        self._moved = [0] * _BUCKETS
        self._moved_s = 0.0

    def note_waits(self, course: Course, elapsed_s: float) -> None:
        """A request has waited."""
        waited_s = course.waited_s
        bucket = int(waited_s * 1e6).bit_length()
        self.account.waited.count(bucket, waited_s)
        if course.part != _SEVERAL:
            self.waits[course.part].count(bucket, waited_s)
        else:
            for part in _PARTS:
                if course.waits[part] > 0:
                    self.waits[part].add(course.waits[part])
        rest_s = elapsed_s - waited_s if elapsed_s > waited_s else 0.0
        self._moved[int(elapsed_s * 1e6).bit_length()] -= 1
        self._moved[int(rest_s * 1e6).bit_length()] += 1
        self._moved_s += rest_s - elapsed_s

    def to_json(self) -> dict[str, Any]:
        """`parts` has only what somebody has waited for, and the disk."""
        moved_s, sum_s = self._moved_s, self.sum_s
        # Requests may end meanwhile, so it is an estimate.
        counts = [max(0, all_ + moved) for all_, moved in zip(self.counts, self._moved, strict=True)]
        parts = {
            name: histogram.to_json() for name, histogram in zip(WAITS, self.waits, strict=True) if histogram.sum_s > 0
        }
        parts["disk"] = _told(counts, max(0.0, sum_s + moved_s))
        total = _told(self.counts, sum_s)
        return {"export": self.export, "operation": self.operation, "total": total, "parts": parts}


class Stall(NamedTuple):
    """A request that took long."""

    seconds: float
    ended_s: float
    """By the monotonic clock; of one that is under way, now."""
    export: str
    operation: str
    reason: str
    under_way: bool


class Account:
    """All requests to the exports of one kind: those of guests, or those of the primary."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.waited = Histogram()
        """How long requests have waited for something else than their disk; those that have not are not in it."""
        # The longest of this minute so far. Read without the lock.
        self.longest_s = 0.0
        # Protects the fields below, and who writes the one above. Taken by requests that have taken longer than any
        # other of this minute, and twice a second; never held across I/O.
        self._lock = threading.Lock()
        self._minute_ends_s = 0.0
        self._stall: Stall | None = None
        self._stalls: deque[Stall] = deque(maxlen=int(HOUR_S / _MINUTE_S))

    def tally(self, export: str, operation: str) -> Tally:
        """The one of that kind of requests to that export."""
        return self.tallies.setdefault((export, operation), Tally(self, export, operation))

    def note(self, course: Course, elapsed_s: float) -> None:
        """A request has ended which has waited, or is the longest of its minute."""
        tally = course.tally
        if course.waited_s > 0:
            tally.note_waits(course, elapsed_s)
        if elapsed_s > self.longest_s:
            now_s, reason = time.monotonic(), course.reason(elapsed_s)
            with self._lock:
                self._look_locked(now_s)
                if elapsed_s > self.longest_s:
                    self.longest_s = elapsed_s
                    self._stall = Stall(elapsed_s, now_s, tally.export, tally.operation, reason, False)
        course.forget()

    def look(self, now_s: float) -> None:
        """Begin another minute if it is time. To be called often: until then, only what is longer than the longest of
        the former minute is noted."""
        if now_s >= self._minute_ends_s:
            with self._lock:
                self._look_locked(now_s)

    def _look_locked(self, now_s: float) -> None:
        if now_s >= self._minute_ends_s:
            if self._stall is not None:
                self._stalls.append(self._stall)
            self._stall, self.longest_s = None, 0.0
            self._minute_ends_s = now_s + _MINUTE_S

    def stalls(self, now_s: float) -> list[Stall]:
        """The longest of each minute of the last hour."""
        with self._lock:
            found = [*self._stalls] if self._stall is None else [*self._stalls, self._stall]
        return [stall for stall in found if now_s - stall.ended_s <= HOUR_S]

    def to_json(self) -> list[dict[str, Any]]:
        """What there has been of each kind of requests."""
        return [tally.to_json() for tally in list(self.tallies.values()) if any(tally.counts)]


class Course:
    """What the request does that a thread is at work on. One for each thread, used again."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.begun_s = 0.0
        """0: nothing is under way."""
        self.waits = [0.0] * len(WAITS)
        self.waited_s = 0.0
        self.part = _NOTHING
        """What it has waited for so far, or _SEVERAL."""
        # The longest wait so far and what it was for; what is waited for now (-1: nothing), why, and since when.
        self._worst_s = 0.0
        self._worst = ""
        self.waiting = -1
        self.why = ""
        self.since_s = 0.0

    def end(self) -> None:
        """The request has ended, well or not."""
        elapsed_s = time.monotonic() - self.begun_s
        self.begun_s = 0.0
        tally = self.tally
        tally.counts[int(elapsed_s * 1e6).bit_length()] += 1
        tally.sum_s += elapsed_s
        account = tally.account
        if elapsed_s > account.longest_s or self.part != _NOTHING:
            account.note(self, elapsed_s)

    def wait(self, part: int, why: str) -> None:
        """It waits from now on."""
        self.why = why
        if self.part != part:
            self.part = part if self.part == _NOTHING else _SEVERAL
        self.since_s = time.monotonic()
        self.waiting = part

    def go_on(self, why: str) -> None:
        """It waits no longer; `why` it had to, as is known now."""
        seconds = time.monotonic() - self.since_s
        self.waits[self.waiting] += seconds
        self.waited_s += seconds
        self.waiting = -1
        if seconds > self._worst_s:
            self._worst_s, self._worst = seconds, why

    def reason(self, elapsed_s: float) -> str:
        """The code of what has taken most of the time."""
        # Of one that is under way, `elapsed_s` may be of a moment before the end of its last wait.
        return self._worst if self._worst and self._worst_s > elapsed_s - self.waited_s else SLOW_DISK

    def forget(self) -> None:
        """Nothing is known of the next request."""
        if self.part >= 0:
            self.waits[self.part] = 0.0
        elif self.part == _SEVERAL:
            self.waits = [0.0] * len(WAITS)
        self.waited_s = self._worst_s = 0.0
        self.part = _NOTHING

    def stall(self, now_s: float) -> Stall | None:
        """What is under way, as one that has ended now. Read while the thread goes on: an estimate."""
        begun_s, tally, waiting, since_s = self.begun_s, self.tally, self.waiting, self.since_s
        if not begun_s:
            return None
        elapsed_s = now_s - begun_s
        reason = self.why if waiting >= 0 and now_s - since_s > elapsed_s / 2 else self.reason(elapsed_s)
        return Stall(elapsed_s, now_s, tally.export, tally.operation, reason, True)


class Latency:
    """Of one node: the requests of its guests, and those of its primary."""

    def __init__(self) -> None:
        self.guests = Account()
        self.primarys = Account()
        self._courses: dict[int, Course] = {}
        self._since = time.time()

    def begin(self, tally: Tally) -> Course:
        """The calling thread begins with a request; `Course.end` is to follow, whatever comes of it."""
        course = self._courses.get(get_ident())
        if course is None:
            course = self._make_course(tally)
        course.tally = tally
        course.begun_s = time.monotonic()
        return course

    def _make_course(self, tally: Tally) -> Course:
        if len(self._courses) >= _COURSES_MAX:
            for thread, course in list(self._courses.items()):
                if not course.begun_s:
                    self._courses.pop(thread, None)
        return self._courses.setdefault(get_ident(), Course(tally))

    def waiting(self, part: int, why: str) -> Course | None:
        """The calling thread is about to wait. None if it is not at work on a request; otherwise `Course.go_on` is to
        follow, whatever comes of it."""
        course = self._courses.get(get_ident())
        if course is None or not course.begun_s:
            return None
        course.wait(part, why)
        return course

    def look(self) -> None:
        """To be called once a second or more."""
        now_s = time.monotonic()
        self.guests.look(now_s)
        self.primarys.look(now_s)

    def longest(self, least_s: float = 0.0) -> dict[str, Any] | None:
        """The longest that a request of a guest has taken in the last hour, also if it is under way still, and why;
        None where none has taken `least_s` seconds."""
        now_s = time.monotonic()
        self.guests.look(now_s)
        found = self.guests.stalls(now_s)
        for course in list(self._courses.values()):
            stall = course.stall(now_s)
            if stall is not None and stall.seconds > 0 and course.tally.account is self.guests:
                found.append(stall)
        worst = max(found, key=_length, default=None)
        if worst is None or worst.seconds < least_s:
            return None
        return {
            "seconds": worst.seconds,
            "time": time.time() - (now_s - worst.ended_s),
            "export": worst.export,
            "operation": worst.operation,
            "reason": worst.reason,
            "text": REASONS[worst.reason],
            "under-way": worst.under_way,
        }

    def waited(self) -> dict[str, Any]:
        """How long requests of guests have waited for something else than their disk."""
        return {"bounds": list(BOUNDS_S), **self.guests.waited.to_json()}

    def to_json(self) -> dict[str, Any]:
        """What query-replication-latency tells in both modes."""
        return {
            "since": self._since,
            "bounds": list(BOUNDS_S),
            "guest": self.guests.to_json(),
            "target": self.primarys.to_json(),
            "longest-stall": self.longest(),
        }


def _length(stall: Stall) -> float:
    return stall.seconds


def told_by_peer(answer: object) -> list[dict[str, Any]] | None:
    """From another node's answer to query-replication-latency how long it is at work on what it is sent (`target`):
    `export`, `operation` and `total` of each kind of requests. None if that is not in it."""
    target = answer.get("target") if isinstance(answer, dict) else None
    if not isinstance(target, list):
        return None
    found = []
    for one in target[:_KINDS_MAX]:
        total = one.get("total") if isinstance(one, dict) else None
        counts, seconds = (total.get("counts"), total.get("sum")) if isinstance(total, dict) else (None, None)
        if not isinstance(counts, list) or len(counts) != len(BOUNDS_S) + 1 or not isinstance(seconds, int | float):
            continue
        if not math.isfinite(seconds):
            continue
        if all(type(count) is int and 0 <= count < 1 << 63 for count in counts):
            names = {key: str(one.get(key))[:_NAME_MAX] for key in ("export", "operation")}
            found.append({**names, "total": {"counts": counts, "sum": float(seconds)}})
    return found
