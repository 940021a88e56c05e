# SPDX-License-Identifier: BSD-3-Clause
"""The conversation with one node: it asks again and again, and listens in between.

Invariants: every wait has a deadline, so that `stop` is soon over; a node that does not answer within ANSWER_S is gone
until it does; one that comes back is seen within RETRY_S. Nothing that a node sends ends the thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from replication.client.lines import Late, Lines, Nonsense, Trouble
from replication.client.qmp import Malformed, Qmp, Refused, Unwelcome
from replication.monitor.journal import Journal
from replication.monitor.sight import Json, Sight, members, number, objects, text

INTERVAL_S = 2.0
"""Between two looks at a quiet node; an event brings the next one on."""

ANSWER_S = 5.0
RETRY_S = 1.0
SOON_S = 0.2
"""Between two looks at a node that has much to say."""

TURN_S = 0.5
"""The longest wait for an event at a stretch: how late `stop` may be noticed."""

EVENTS_MAX = 1000
CHANGED = (
    "REPLICATION_STAGE_CHANGE",
    "REPLICATION_LINK",
    "JOB_STATUS_CHANGE",
    "REPLICATION_ERROR",
    "REPLICATION_VERIFIED",
    "REPLICATION_TEST",
)
"""Events after which a look is worth while."""


class Watcher:
    """Watches the node at one control socket, in a thread of its own."""

    def __init__(
        self,
        name: str,
        path: str,
        heard: Callable[[Watcher, Json | None], None] = lambda watcher, event: None,
        interval_s: float = INTERVAL_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        """`heard(watcher, event)` is called for each event that is kept, and with None after each look; it must not
        block."""
        self.name = name
        self.path = path
        self.journal = Journal(lambda event: heard(self, event))
        self._heard = heard
        self._interval_s = interval_s
        self._answer_s = answer_s
        now = time.time()
        # Replaced as a whole by the thread, read by anybody.
        self.sight = Sight(name, path, False, now, now, "not asked yet")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Have the thread end; `join` waits for it."""
        self._ended.set()

    def join(self, deadline: float) -> bool:
        """Wait until time.monotonic() `deadline` for the thread; whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._converse()
            except Late as error:
                self._lost(f"no answer within {self._answer_s:g} s ({error.step.value})")
            except Unwelcome as error:
                self._lost(error.desc)
            except Nonsense:
                self._lost("what listens there does not speak QMP")
            except Trouble as error:
                self._lost(error.reason if error.cause is not None else "the node closed the connection")
            except Refused as error:
                self._lost(f"refused: {error.desc}")
            except Exception as error:  # noqa: BLE001 (an answer in a form that nobody expected must not blind us)
                self._lost(f"unexpected {type(error).__name__}: {error}")
            self._ended.wait(RETRY_S)

    def _converse(self) -> None:
        """Ask and listen until the connection breaks."""
        with closing(Qmp(Lines(self.path, self._deadline()), events_max=EVENTS_MAX)) as qmp:
            qmp.greet(self._deadline())
            self._ask(qmp, "qmp_capabilities")
            version = _version(self._ask(qmp, "query-version"))
            while not self._ended.is_set():
                self._look(qmp, version)
                self._listen(qmp)

    def _look(self, qmp: Qmp, version: str | None) -> None:
        answer = self._ask(qmp, "query-replication")
        if not isinstance(answer, dict):
            raise Malformed
        jobs = tuple(objects(self._ask(qmp, "query-jobs")))
        failover: Json = {}
        if answer.get("mode") == "secondary":
            with contextlib.suppress(Refused):  # its role may have changed in between
                failover = members(self._ask(qmp, "query-failover"))
        self._take_events(qmp)
        now = time.time()
        before = self.sight
        since = before.since if before.up else now
        self.sight = Sight(self.name, self.path, True, since, now, None, answer, jobs, failover, version)
        if not before.up:
            self._note("MONITOR_NODE_UP", mode=self.sight.mode, stage=self.sight.stage)
        self._looked(now)

    def _listen(self, qmp: Qmp) -> None:
        """Keep the events until it is time for the next look."""
        begun = time.monotonic()
        due = begun + self._interval_s
        while not self._ended.is_set() and (now := time.monotonic()) < due:
            try:
                event = qmp.next_event(min(due, now + TURN_S))
            except Late:
                continue
            self.journal.put(event)
            if event.get("event") in CHANGED:
                due = min(due, begun + SOON_S)

    def _take_events(self, qmp: Qmp) -> None:
        for event in qmp.events:
            self.journal.put(event)
        qmp.events.clear()

    def _ask(self, qmp: Qmp, command: str) -> Any:
        return qmp.execute(command, None, self._deadline())

    def _deadline(self) -> float:
        return time.monotonic() + self._answer_s

    def _lost(self, trouble: str) -> None:
        now = time.time()
        before = self.sight
        since = now if before.up else before.since
        # What it said last is still what is known of its role and of its last checkpoint.
        self.sight = Sight(
            self.name, self.path, False, since, now, trouble[:200], before.answer, (), {}, before.version
        )
        if before.up:
            self._note("MONITOR_NODE_DOWN", reason=trouble[:200])
        self._looked(now)

    def _looked(self, now: float) -> None:
        self.journal.sample(self.sight, now)
        self._heard(self, None)

    def _note(self, name: str, **data: Any) -> None:
        now_us = time.time_ns() // 1000
        stamp = {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000}
        self.journal.put({"event": name, "data": data, "timestamp": stamp})


def _version(answer: object) -> str | None:
    """The plugin's version from query-version, whose `package` has it, or QEMU's numbers."""
    package = text(members(answer).get("package"))
    if package:
        return package
    numbers = members(members(answer).get("qemu"))
    found = [number(numbers.get(part)) for part in ("major", "minor", "micro")]
    return ".".join(f"{part:g}" for part in found if part is not None) or None
