# SPDX-License-Identifier: BSD-3-Clause
"""Runs the commands of a node's handlers.

    Situations   what has happened to a node, in the words of its handlers: from its events, and from what two looks at
                 it differ in
    Runner       one handler of one node: its commands one after the other, in a thread that lives as long
    Handlers     all of them

Invariants: whoever tells of an event waits for no command. At most one command of a handler runs at a time, and
RUNNING_MAX at all, none for longer than its time-out. Of one handler at most WAITING_MAX events wait. What a command
prints goes into the log, LINES_MAX lines of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from replication.fault import Case
from replication.log import log, log_defect
from replication.monitor.sight import Json, Sight, members, number, text
from replication.service.handlers import Handler

RUNNING_MAX = 16
WAITING_MAX = 16
LINES_MAX = 20
LINE_MAX = 500
GRACE_S = 2.0
"""From SIGTERM to SIGKILL, for a command that has not ended in time."""

VALUE_MAX = 4096
"""Characters of a variable of the environment."""

_LOCAL = frozenset(
    str(case.value)
    for case in (Case.PRIMARY_DISK, Case.COPY_BEFORE_WRITE, Case.SECONDARY_DISK, Case.ACTIVE_DISK, Case.COMMIT)
)
"""Cases of the node's own images."""

_DOWN = ("lost", "disconnected", "connecting")
"""States of a link over which nothing goes."""


class Occasion(NamedTuple):
    """Something for which there may be a handler."""

    event: str
    values: Mapping[str, str]
    """What the filters look at, and what the command finds in its environment."""
    data: Json


class Situations:
    """Of one node; used by one thread."""

    def __init__(self) -> None:
        self._link: str | None = None
        # What lasts. Told when it begins, and at the first look.
        self._standing: dict[str, bool] = {}

    def of_event(self, event: Json) -> list[Occasion]:
        """What an event of the node, or of the monitor about it, means."""
        name, data = text(event.get("event")) or "", members(event.get("data"))
        match name:
            case "REPLICATION_STAGE_CHANGE":
                return [_occasion("stage-change", data, "from", "to")]
            case "REPLICATION_LINK":
                return self._linked(text(data.get("state")))
            case "REPLICATION_ERROR":
                found = [_occasion("error", data, "case", "disk", reason="desc")]
                if found[0].values.get("case") in _LOCAL:
                    found.append(found[0]._replace(event="local-io-error"))
                return found
            case "REPLICATION_CHECKPOINT_AGE":
                return [_occasion("checkpoint-age", data)]
            case "REPLICATION_OVERLAY_WATERMARK":
                return [_occasion("overlay-watermark", data, "disk")]
            case "REPLICATION_TEST" if data.get("result") == "failed":
                return [_occasion("test-failed", data, reason="reason")]
            case "REPLICATION_GUEST":
                return self._guest(data)
            case "MONITOR_NODE_UP":
                return [_occasion("node-up", data)]
            case "MONITOR_NODE_DOWN":
                return [_occasion("node-down", data, reason="reason")]
        return []

    def of_look(self, sight: Sight) -> list[Occasion]:
        """What the node says of itself now, beside what it said before."""
        if not sight.up:
            return []
        found = self._linked(sight.link)
        reason = members(sight.answer.get("link")).get("reason")
        found += self._stands("split-brain", sight.split_brain, {"reason": reason})
        outdated, why = sight.answer.get("outdated"), members(sight.answer.get("outdated-reason"))
        if why.get("code") == "demoted":
            outdated = False  # it was made a secondary: that another one goes on is no news
        known = outdated if isinstance(outdated, bool) else None
        found += self._stands("outdated", known, {"reason": reason or why.get("reason")})
        if "guest-suspended-reason" in sight.answer:
            found += self._guest(members(sight.answer["guest-suspended-reason"]))
        lacking = sight.lacking
        found += self._stands("out-of-sync", None if lacking is None else lacking > 0, {"bytes": lacking})
        consistent = sight.answer.get("consistent")
        if sight.stage in ("running", "failover", "failover-failed") and isinstance(consistent, bool):
            found += self._stands("inconsistent", not consistent, {})
        return found

    def _guest(self, why: Json) -> list[Occasion]:
        """`why`: nothing, if the guest is served. While nobody has decided that there is to be one, none stands."""
        code = text(why.get("code"))
        return self._stands("guest-suspended", code not in (None, "not-promoted"), why)

    def _linked(self, state: str | None) -> list[Occasion]:
        former, self._link = self._link, state
        if former is None or state is None or state == former:
            return []
        data = {"from": former, "to": state}
        found = [_occasion("link-change", data, "from", "to")]
        if state in _DOWN and former not in _DOWN:
            found.append(_occasion("disconnected", data, "from", "to"))
        if state == "in-sync" and former == "synchronizing":
            found.append(_occasion("after-resync-target", data, "from", "to"))
        return found

    def _stands(self, event: str, now: bool | None, data: Json) -> list[Occasion]:
        if now is None:
            return []
        before = self._standing.get(event, False)
        self._standing[event] = now
        return [_occasion(event, data, reason="reason")] if now and not before else []


def _occasion(event: str, data: Json, *keys: str, reason: str | None = None) -> Occasion:
    """Of the values of `data` those with these keys; `reason`: the key of the sentence that says why."""
    values = {key: _plain(data[key]) for key in keys if data.get(key) is not None}
    if reason is not None and data.get(reason) is not None:
        values["reason"] = _plain(data[reason])
    return Occasion(event, values, data)


def _plain(value: object) -> str:
    found = number(value)
    words = f"{found:g}" if found is not None else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in words[:VALUE_MAX])


class Runner:
    """One handler of one node."""

    def __init__(self, node: str, handler: Handler, slots: threading.Semaphore) -> None:
        """`slots`: of the commands that may run at a time."""
        self._node = node
        self._handler = handler
        self._slots = slots
        # Protects the fields below; never held across I/O.
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[Mapping[str, str]] = deque()
        self._left_out = 0
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def handler(self) -> Handler:
        """What it runs."""
        return self._handler

    def put(self, environment: Mapping[str, str]) -> None:
        """Run the command with these variables, after those that were put before."""
        with self._changed:
            if self._closing:
                return
            if len(self._waiting) >= WAITING_MAX:
                self._left_out += 1
                return
            self._waiting.append(environment)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"handler-{self._node}", daemon=True)
                try:
                    thread.start()
                except (RuntimeError, MemoryError) as error:
                    self._waiting.pop()
                    log(f"{self._named} was not run: {error}")
                else:
                    self._thread = thread

    def stop(self) -> None:
        """Run nothing any more; what runs is ended. Does not wait."""
        with self._changed:
            self._closing = True
            self._waiting.clear()

    def join(self, deadline: float) -> None:
        """Wait until time.monotonic() `deadline` for what runs."""
        with self._changed:
            thread = self._thread
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def _named(self) -> str:
        return f"the handler of {self._node} for {self._handler.event} ({self._handler.command[0]})"

    def _run(self) -> None:
        while True:
            with self._changed:
                left_out, self._left_out = self._left_out, 0
                if not self._waiting:
                    self._thread = None
                environment = self._waiting.popleft() if self._waiting else None
            if left_out:
                log(f"{self._named} is too slow: {left_out} events were left out")
            if environment is None:
                return
            try:
                if self._take_slot():
                    try:
                        self._execute(environment)
                    finally:
                        self._slots.release()
            except Exception as defect:  # noqa: BLE001 (the next event has a right to its command)
                log_defect(defect)

    def _take_slot(self) -> bool:
        while not self._closing:
            if self._slots.acquire(timeout=0.2):
                return True
        return False

    def _execute(self, environment: Mapping[str, str]) -> None:
        deadline = time.monotonic() + self._handler.timeout_s
        try:
            process = self._handler.start(environment)
        except OSError as error:
            log(f"{self._named} cannot be run: {error.strerror}")
            return
        assert process.stdout is not None
        with process.stdout:
            output = _Output(self._named, process.stdout.fileno())
            in_time = _until_ended(process, output, lambda: self._closing or time.monotonic() >= deadline)
            if not in_time:
                _end(process)
            output.finish()
        if not in_time and not self._closing:
            log(f"{self._named} was ended: it has not ended within {self._handler.timeout_s:g} s")
        elif in_time and process.returncode:
            log(f"{self._named} ended with {process.returncode}")


class _Output:
    """What a command prints, by lines, into the log."""

    def __init__(self, name: str, fd: int) -> None:
        self._name = name
        self._fd = fd
        self._begun = b""
        self._lines = 0
        self.over = False

    def read(self, wait_s: float) -> bool:
        """Take what there is, or comes within `wait_s`; whether that was anything."""
        if not select.select([self._fd], [], [], wait_s)[0]:
            return False
        data = os.read(self._fd, 1 << 16)
        self.over = not data
        *lines, self._begun = (self._begun + data).split(b"\n")
        self._begun = self._begun[-LINE_MAX:]
        for line in lines:
            self._put(line)
        return bool(data)

    def finish(self) -> None:
        """What there is still."""
        for _ in range(LINES_MAX):
            if self.over or not self.read(0.0):
                break
        if self._begun:
            self._put(self._begun)
        if self._lines > LINES_MAX:
            log(f"{self._name} has said {self._lines - LINES_MAX} lines more")

    def _put(self, line: bytes) -> None:
        if line.strip():
            self._lines += 1
            if self._lines <= LINES_MAX:
                log(f"{self._name}: {line.decode(errors='replace').strip()[:LINE_MAX]}")


def _until_ended(process: subprocess.Popen[bytes], output: _Output, enough: Callable[[], bool]) -> bool:
    """Read what it prints until it has ended, which what it has started need not; False when it was `enough` before."""
    while process.poll() is None:
        if enough():
            return False
        if output.over:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        else:
            output.read(0.1)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, and what it has started."""
    for number_, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


class Handlers:
    """The handlers of all nodes of this host."""

    def __init__(self, configured: Callable[[str], tuple[Handler, ...]]) -> None:
        """`configured(node)`: its handlers as they are now."""
        self._configured = configured
        self._slots = threading.BoundedSemaphore(RUNNING_MAX)
        # Protects the two below; never held across I/O.
        self._lock = threading.Lock()
        self._situations: dict[str, Situations] = {}
        self._runners: dict[str, list[Runner]] = {}

    def heard(self, sight: Sight, event: Json | None) -> None:
        """An event of a node, or None after a look at it. By one thread for each node."""
        with self._lock:
            situations = self._situations.setdefault(sight.name, Situations())
        occasions = situations.of_look(sight) if event is None else situations.of_event(event)
        if occasions:
            runners = self._of(sight.name)
            for occasion in occasions:
                environment = _environment(sight, occasion)
                for runner in runners:
                    if runner.handler.fits(occasion.event, occasion.values):
                        runner.put(environment)

    def _of(self, node: str) -> list[Runner]:
        """The runners of a node, for its handlers as they are now."""
        wanted = self._configured(node)
        with self._lock:
            former = self._runners.get(node, [])
            if tuple(runner.handler for runner in former) == wanted:
                return former
            runners = self._runners[node] = [Runner(node, handler, self._slots) for handler in wanted]
        for runner in former:
            runner.stop()
        return runners

    def keep(self, nodes: Iterable[str]) -> None:
        """Forget all nodes but these."""
        wanted = frozenset(nodes)
        with self._lock:
            gone = [name for name in self._situations if name not in wanted]
            runners = [runner for name in gone for runner in self._runners.pop(name, [])]
            for name in gone:
                del self._situations[name]
        for runner in runners:
            runner.stop()

    def stop(self, timeout_s: float) -> None:
        """Run nothing any more; wait `timeout_s` seconds at most for what runs to end."""
        with self._lock:
            runners = [runner for several in self._runners.values() for runner in several]
        for runner in runners:
            runner.stop()
        deadline = time.monotonic() + timeout_s
        for runner in runners:
            runner.join(deadline)


def _environment(sight: Sight, occasion: Occasion) -> dict[str, str]:
    values = {
        "event": occasion.event,
        "node": sight.name,
        "control": sight.path,
        "mode": sight.mode or "",
        "stage": sight.stage or "",
        **occasion.values,
    }
    found = {f"NBDKIT_REPLICATION_{key.upper()}": value for key, value in values.items()}
    whole = json.dumps({**values, "data": occasion.data})
    found["NBDKIT_REPLICATION_JSON"] = whole if len(whole) <= 4 * VALUE_MAX else json.dumps(values)
    return found
