# SPDX-License-Identifier: BSD-3-Clause
"""Tests of a failover: what one would give now, to be read and written without anything coming of it.

A test is an image/frozen.py for each disk, of one instant, exported beside the guest face. It never is in the way of
anything else: its requests do not pass the gate, its space is the first to go where an overlay or the disk finds none,
and when the stage is no longer `running` (a failover, a stop) it is over, at once. It ends with the process in any
case.

Which commands may come at any time: `stop` waits for nobody. `start` is a command of the node.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from replication.errors import CommandError, DiskError
from replication.image.frozen import Allowance, Frozen, sweep
from replication.image.shortage import WAIT_S
from replication.log import log, log_defect
from replication.order.latency import TEST
from replication.order.pause import pause
from replication.order.urgency import Overdue
from replication.order.worker import NO_THREAD
from replication.reason import Reason
from replication.record.tested import LastTest
from replication.secondary.disk import SecondaryDisk
from replication.side import TEST_FACE, Face, Setting
from replication.stage import Stage

TESTS_MAX = 16
"""Tests at a time: each has a byte in memory for each block that is touched, and copies what the primary overwrites."""

PASSED, FAILED = "passed", "failed"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}\Z")
_EXPORT_MAX = 4096  # NBD specification: longest string
_START_S = 2.0
"""Longest wait, for which all requests are held up, for those in flight to end."""
_SAVE_S = 30.0
"""Longest wait of a command for the storage of a result: above what a slow disk needs."""
_REASON_MAX = 1000


@dataclass(eq=False)
class Rehearsal:
    """One test."""

    name: str
    epoch: int
    disks: list[tuple[SecondaryDisk, Frozen]]
    until: float | None
    """When it ends by itself, by time.monotonic()."""
    faces: dict[str, Face] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """What tells it from others of its name."""
    began: float = field(default_factory=time.time)
    began_s: float = field(default_factory=time.monotonic)
    over: str | None = None
    """Why it has ended, though nobody has stopped it."""
    interrupted: bool = False
    """Whether that was no fault of it."""


class Rehearsals:
    """The tests of one secondary."""

    def __init__(self, setting: Setting, disks: Sequence[SecondaryDisk]) -> None:
        self._set = setting
        self._disks = disks
        self._tested = LastTest(setting.state.path)
        options = setting.options
        folder = options.state
        if folder is None:
            folder = os.path.dirname(options.disks[0].hidden or "")
        self._allowance = Allowance(folder, options.test_space, options.overlay_watermark)
        # Protects the tests, and the rooms' tuples of them. Never held across I/O; requests take it when a test ends.
        self._lock = threading.Lock()
        self._tests: dict[str, Rehearsal] = {}
        # Held across removing what a former process has left; no request and no other command waits for it.
        self._sweeping = threading.Lock()
        self._swept = False
        # Held while tests end because others need their room: a write that finds none as well waits for that, WAIT_S at
        # most. Across giving back the space of their files.
        self._sacrificing = threading.Lock()
        self._sacrificed = 0

    def attend(self) -> None:
        """The disks' overlays are open."""
        for disk in self._disks:
            if disk.stack is not None:
                disk.stack.room.sacrifice = self._sacrifice

    @property
    def names(self) -> list[str]:
        """Of the tests that run."""
        with self._lock:
            return list(self._tests)

    def configure(self) -> None:
        """The options have changed."""
        self._allowance.limit = self._set.options.test_space
        self._allowance.watermark = self._set.options.overlay_watermark

    # -- commands ------------------------------------------------------------------------------------------

    def start(self, name: str, timeout_s: float | None, taken: Mapping[str, Face]) -> dict[str, Any]:
        """replication-test-start. `taken`: the exports that there are beside tests. CommandError, GateStuck.

        Only the instant is a command of the node: a folder that does not answer, where the files are made, holds up
        nobody but the test."""
        self._check()
        exports = self._exports(name, taken)
        self._sweep()
        test = Rehearsal(name, 0, [], None if timeout_s is None else time.monotonic() + timeout_s)
        try:
            for disk, export in zip(self._disks, exports, strict=True):
                stack = disk.stack
                if stack is None:
                    raise CommandError("This node takes another role", reason=Reason.BUSY)
                frozen = Frozen(name, stack.active, stack.hidden, disk.disk, self._allowance)
                frozen.spoilt = partial(self._spoilt, test)
                test.disks.append((disk, frozen))
                test.faces[export] = _face(frozen)
            pause("test.made")
            with self._set.commanding(), self._set.gate.closed(_START_S, TEST):
                self._freeze(test, taken)
        except BaseException as error:
            self._end(test, "it has not begun")
            if isinstance(error, DiskError | MemoryError):
                raise CommandError(f"The test cannot begin: {error or 'no memory'}", reason=Reason.STORAGE) from error
            raise
        for _, frozen in test.disks:
            frozen.settle()
        self._tell(test, "started")
        return {
            "name": name,
            "id": test.id,
            "epoch": test.epoch,
            "exports": [
                {"disk": disk.name, "export": export, "size": disk.size}
                for (disk, _), export in zip(test.disks, test.faces, strict=True)
            ],
        }

    def _sweep(self) -> None:
        """Once, before the first file is made. In a state folder: others are not of this process alone."""
        with self._sweeping:
            if not self._swept and self._set.state.path is not None:
                sweep(self._allowance.folder)
            self._swept = True

    def _freeze(self, test: Rehearsal, taken: Mapping[str, Face]) -> None:
        """The instant. The gate is closed."""
        self._check()
        self._exports(test.name, taken)
        stacks = [disk.stack for disk, _ in test.disks]
        if any(frozen.size != disk.size for disk, frozen in test.disks):
            raise CommandError("A disk has grown meanwhile: try again", reason=Reason.BUSY)
        for _, frozen in test.disks:
            frozen.freeze()
        test.epoch = self._set.state.epoch
        with self._lock:
            for stack, (_, frozen) in zip(stacks, test.disks, strict=True):
                if stack is None:
                    raise CommandError("This node takes another role", reason=Reason.BUSY)
                stack.room.tests = (*stack.room.tests, frozen)
        self._check()  # the disk may have lost something just before it would have told the test as well
        with self._lock:
            self._tests[test.name] = test

    def _check(self) -> None:
        """CommandError unless there is something that a failover would give."""
        record = self._set.record
        if record.stage is Stage.NONE:
            raise CommandError("Block replication is not running", reason=Reason.NOT_RUNNING)
        if record.stage is not Stage.RUNNING:
            raise CommandError(
                f"The secondary has failed over already: its stage is {record.stage.value}", reason=Reason.FAILED_OVER
            )
        if record.inconsistent is not None:
            raise CommandError(
                f"There is nothing to test: there is no valid checkpoint ({record.inconsistent})",
                reason=Reason.NO_CHECKPOINT,
            )

    def _exports(self, name: str, taken: Mapping[str, Face]) -> list[str]:
        """The names of the exports, in the order of the disks; CommandError."""
        if not _NAME.match(name):
            raise CommandError(f"'{name[:80]}' cannot be a test's name: use letters, digits and _ . + -")
        exports = [f"{disk.top_id}.{name}" for disk in self._disks]
        with self._lock:
            if name in self._tests:
                raise CommandError(f"There is a test of the name '{name}'", reason=Reason.TEST_EXISTS)
            if len(self._tests) >= TESTS_MAX:
                raise CommandError(f"There are {TESTS_MAX} tests already", reason=Reason.TEST_EXISTS)
            known = {export for test in self._tests.values() for export in test.faces} | taken.keys()
        for export in exports:
            if export in known or len(export.encode()) > _EXPORT_MAX:
                raise CommandError(f"'{export[:80]}' cannot be the export of a test: choose another name for it")
        return exports

    def stop(
        self, name: str | None, result: str | None, rto_s: float | None, reason: str | None, id_: str | None = None
    ) -> dict[str, Any]:
        """replication-test-stop: what has become of it. Waits for nobody. CommandError when there is none."""
        test = self._take(name, id_)
        name = test.name
        # What has been cut off in the midst shows nothing, whoever thinks so.
        over = test.over
        self._end(test, "it was stopped")
        if test.interrupted:
            result = None
        elif over is not None and result == PASSED:
            result = FAILED
        reason = over or (None if reason is None else reason[:_REASON_MAX])
        if result is not None:
            self._conclude(test, result, rto_s if result == PASSED else None, reason)
        self._tell(test, "stopped", result, reason)
        return {"name": name, "result": result, "reason": reason}

    def _take(self, name: str | None, id_: str | None) -> Rehearsal:
        """The test of that name, or of that id, out of the list; CommandError."""
        with self._lock:
            if name is None and id_ is not None:
                name = next((test.name for test in self._tests.values() if test.id == id_), "")
            if name is None:
                if len(self._tests) != 1:
                    known = ", ".join(f"'{each}'" for each in self._tests) or "none"
                    raise CommandError(f"Say which test: there is {known}", reason=Reason.NO_TEST)
                (name,) = self._tests
            test = self._tests.get(name)
            if test is not None and id_ in (None, test.id):
                return self._tests.pop(name)
        if test is not None or not name:
            raise CommandError("That test is over: there is no test of that id", reason=Reason.NO_TEST)
        raise CommandError(f"There is no test of the name '{name[:80]}'", reason=Reason.NO_TEST)

    def _conclude(
        self, test: Rehearsal, result: str, rto_s: float | None, reason: str | None, within_s: float = _SAVE_S
    ) -> None:
        self._tested.conclude(
            {
                "name": test.name,
                "result": result,
                "time": time.time(),
                "duration": time.monotonic() - test.began_s,
                "rto": rto_s,
                "epoch": test.epoch,
                "reason": reason,
            }
        )
        with suppress(Overdue):  # it is written as soon as the storage answers
            self._set.gate.urgency.run(self._tested.save, within_s, yields=False, name="test")

    # -- the end -------------------------------------------------------------------------------------------

    def end_all(self, why: str) -> None:
        """What the tests are of is no more. Waits for nobody; they are listed until somebody stops them."""
        with self._lock:
            tests = [test for test in self._tests.values() if test.over is None]
        for test in tests:
            test.interrupted = True
            self._cut_off(test, why)

    def look(self) -> None:
        """End those whose time is up."""
        now = time.monotonic()
        with self._lock:
            due = [test for test in self._tests.values() if test.until is not None and now >= test.until]
            for test in due:
                del self._tests[test.name]
        for test in due:
            why = test.over or f"nobody has stopped it within {now - test.began_s:.0f} s"
            self._end(test, why)
            result = None if test.interrupted else FAILED
            if result is not None:
                self._conclude(test, result, None, why, 0.0)  # others have their disks looked at by this thread
            self._tell(test, "stopped", result, why)

    def _cut_off(self, test: Rehearsal, why: str, number: int = errno.ESHUTDOWN) -> None:
        """It is over, though nobody has stopped it."""
        self._end(test, why, number)
        log(f"the test '{test.name}' has ended: {why}")
        self._tell(test, "ended", None, why)

    def _spoilt(self, test: Rehearsal, error: DiskError) -> None:
        """Called by a request that could not keep what the test needs."""
        if test.over is None:
            self._cut_off(test, str(error), error.errno)

    def _end(self, test: Rehearsal, why: str, number: int = errno.ESHUTDOWN) -> None:
        """Every request of it is refused from now on, with that errno, and its space comes back, which may take its
        time."""
        with self._lock:
            fresh, test.over = test.over is None, test.over or why
            for disk, frozen in test.disks:
                if disk.stack is not None:
                    room = disk.stack.room
                    room.tests = tuple([other for other in room.tests if other is not frozen])
        failure = DiskError(f"the test '{test.name}' has ended: {why}", number)
        for _, frozen in test.disks:
            frozen.end(failure)
        if not fresh:
            return
        discard = partial(_discard, [frozen for _, frozen in test.disks])
        try:
            threading.Thread(target=discard, name="test-discard", daemon=True).start()
        except NO_THREAD as error:
            log(f"the space of the test '{test.name}' comes back with the end of the process: {error}")

    def _sacrifice(self, device: int, path: str) -> int:
        """A write to `path`, in the file system of that number, has found no room: all tests that hold some there end,
        since which of them has what is needed takes a search to know. How many have ended so for now."""
        if not self._sacrificing.acquire(timeout=WAIT_S):
            return self._sacrificed
        try:
            with self._lock:
                tests = [test for test in self._tests.values() if test.over is None and _holds_room(test, device)]
            for test in sorted(tests, key=_size, reverse=True):
                self._sacrificed += 1
                self._cut_off(test, f"its space was needed by {path}", errno.ENOSPC)
                for _, frozen in test.disks:
                    frozen.give_back()
        except Exception as defect:  # noqa: BLE001 (whoever writes learns whether there is room now)
            log_defect(defect)
        finally:
            self._sacrificing.release()
        return self._sacrificed

    # -- what there is -------------------------------------------------------------------------------------

    @property
    def faces(self) -> dict[str, Face]:
        """The exports of tests, by name. Those of a test that is over, too: whoever opens one learns why."""
        with self._lock:
            return {export: face for test in self._tests.values() for export, face in test.faces.items()}

    def query(self) -> dict[str, Any]:
        """The members of query-replication."""
        with self._lock:
            tests = list(self._tests.values())
        now = time.monotonic()
        return {
            "tests": [
                {
                    "name": test.name,
                    "exports": list(test.faces),
                    "epoch": test.epoch,
                    "time": test.began,
                    "ends-in": None if test.until is None else max(0.0, test.until - now),
                    "bytes": _size(test),
                    "limit-bytes": self._allowance.limit,
                    "ended": test.over,
                }
                for test in tests
            ],
            "last-test": self._tested.last,
        }

    def _tell(self, test: Rehearsal, state: str, result: str | None = None, reason: str | None = None) -> None:
        self._set.hub.emit("REPLICATION_TEST", name_=test.name, state=state, result=result, reason=reason)


def _size(test: Rehearsal) -> int:
    return sum(frozen.bytes_used for _, frozen in test.disks)


def _holds_room(test: Rehearsal, device: int) -> bool:
    return any(frozen.holds_room_in(device) for _, frozen in test.disks)


def _discard(disks: list[Frozen]) -> None:
    for frozen in disks:
        try:
            frozen.discard()
        except Exception as defect:  # noqa: BLE001 (the others' space comes back all the same)
            log_defect(defect)


def _face(frozen: Frozen) -> Face:
    size: Callable[[], int] = lambda: frozen.size  # noqa: E731
    return Face(TEST_FACE, size, frozen.read, frozen.write, frozen.zero, frozen.flush, frozen.extents)
