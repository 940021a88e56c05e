# SPDX-License-Identifier: BSD-3-Clause
"""Faults by stage: every image of a pair fails in every stage, and exactly those learn whom docs/failures.md names.

Three ways to fail:
* the system calls on files (replication/disk/files.py): an errno, a short transfer, a transfer of nothing, and an
  errno after a short transfer, on one image at a time, with the node in this process (`Seam`, `SecondaryBench`,
  `PrimaryBench`);
* an NBD server behind nbdkit's error filter as primary or secondary disk, or its death, with real processes;
* overlays on a tmpfs that is full, with real processes.

The tables have a row for each fault: what fails where, in which stage, what is done then, which errno its client gets,
which case is told as an event, and which one is latched for get-error. The same is checked for every row: the faces and
the disk hold every byte that they must, the other disk of the node notices nothing, the stage stays, later requests
succeed, and checkpoint, failover or retry end as the table of failures says. test_failures.py has the failures of a
pair as its users see them; what is there is not repeated here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import nbd
import pytest

from content import KIB, MIB, changed, make_raw, pattern, whole
from endpoints import DelayedEndpoint
from lab import Lab
from mounts import SmallFolder
from nodes import Secondary, Server, nbd_refusal
from pausepoints import PausePoints
from qmp import QmpError
from replication.control.commands import Commands
from replication.control.inband import ControlExport
from replication.disk import files
from replication.errors import CommandError, DiskError
from replication.events import EventHub
from replication.node import Node
from replication.options import OptionParser
from replication.record.state import StateFolder
from replication.secondary import side as side_of_secondary
from replication.secondary.commit import Commit
from replication.secondary.disk import SecondaryDisk
from replication.secondary.failover import Failover
from replication.server.clients import Client
from replication.server.export import Exports
from waiting import DEADLINE_S, wait_until

BLOCK = 4 * KIB
GRAIN = 64 * KIB
SIZE = 512 * KIB + 1234

# What there is on each disk when a fault comes, in grains of their own.
OVERWRITTEN = 1 * GRAIN
"""The primary has written here since the last checkpoint: hidden holds the old blocks."""
OWN = 2 * GRAIN
"""The secondary's guest has written here: active holds the blocks."""
BLANK = 3 * GRAIN
"""Zeroes since ever, which hidden preserves without data."""
FREE = 4 * GRAIN
"""Only the secondary disk holds these."""
LATER = 5 * GRAIN
"""For the good requests after the fault."""
ERASED = 6 * GRAIN
"""The secondary's guest has zeroed these."""

LENGTH = 2 * BLOCK

_filled = bytearray(pattern(1, SIZE))
_filled[BLANK : BLANK + GRAIN] = bytes(GRAIN)
OLD = bytes(_filled)
NEW = pattern(2, LENGTH)
MINE = pattern(3, LENGTH)
DATA = pattern(4, LENGTH)
MORE = pattern(5, BLOCK)

IO_ERROR = "I/O error occurred"
NOT_RUNNING = "Block replication is not running"
CANCELLED = "Backup job was cancelled unexpectedly"
FAILOVER = {"enable": False, "primary": False, "failover": True}


def is_either(found: bytes, old: bytes, new: bytes) -> bool:
    """Whether each byte is the old or the new one: what a failed write may leave."""
    return all(byte in pair for byte, *pair in zip(found, old, new, strict=True))


# -- the seam ----------------------------------------------------------------------------------------------------


class Seam:
    """The system calls on the files that it is told of, which fail as a fault's text says:

    EIO, ENOSPC, ...    fails with it
    nothing             transfers nothing and returns 0
    short               transfers about half of what it is given, every time
    short-then-X        once, and then as X says
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # By path and call. Replaced as a whole, because requests of other threads look at it.
        self._faults: dict[tuple[str, str], str] = {}
        self._began: set[tuple[str, str]] = set()
        self.hits = 0
        """Calls that failed or fell short."""
        self.called: set[tuple[str, str]] = set()
        """By path and call, all that were made since `fail`."""
        for call in ("preadv", "pwritev", "fdatasync", "fallocate"):
            monkeypatch.setattr(files, call, self._replaced(call, getattr(files, call)))

    def fail(self, faults: dict[tuple[str, str], str]) -> None:
        """From now on calls fail as `faults`, by path and call, says."""
        self._began = set()
        self.hits = 0
        self.called = set()
        self._faults = faults

    def work(self) -> None:
        """Calls succeed again."""
        self._faults = {}

    def _replaced(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(fd: int, *arguments: Any) -> Any:
            faults = self._faults
            key = (os.readlink(f"/proc/self/fd/{fd}"), call)
            self.called.add(key)
            if key not in faults:
                return real(fd, *arguments)
            self.hits += 1
            kind = faults[key]
            first, then, later = kind.partition("-then-")
            if then and key in self._began:
                first = later
            self._began.add(key)
            if first == "nothing":
                return 0
            if first == "short":
                buffers, *more = arguments
                return real(fd, _half(buffers), *more)
            raise OSError(getattr(errno, first), os.strerror(getattr(errno, first)))

        return replacement


def _half(buffers: Sequence[Any]) -> list[memoryview]:
    """The first half of the bytes, at least one."""
    left = max(1, sum(map(len, buffers)) // 2)
    half = []
    for buffer in buffers:
        half.append(memoryview(buffer)[:left])
        left -= len(half[-1])
        if not left:
            break
    return half


@pytest.fixture
def seam(monkeypatch: pytest.MonkeyPatch) -> Seam:
    return Seam(monkeypatch)


# -- requests ----------------------------------------------------------------------------------------------------


class Face(Protocol):
    """What a client of an export asks for."""

    size: int

    def read(self, buffer: memoryview, offset: int) -> None: ...
    def write(self, data: memoryview, offset: int, fua: bool) -> None: ...
    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None: ...
    def flush(self) -> None: ...


@dataclass(frozen=True)
class Request:
    """One request on a face; a flush has no range."""

    face: str
    kind: str
    offset: int = 0
    length: int = 0
    fua: bool = False

    @property
    def data(self) -> bytes:
        """What is in the range when it has succeeded; for a read or a flush nothing."""
        if self.kind == "write":
            return DATA[: self.length]
        return bytes(self.length) if self.kind in ("zero", "trim") else b""

    def send(self, face: Face) -> tuple[int, bytes]:
        """The errno that a client gets, 0 for success, and what was read."""
        buffer = bytearray(self.length if self.kind == "read" else 0)
        try:
            if self.kind == "write":
                face.write(memoryview(self.data), self.offset, self.fua)
            elif self.kind == "read":
                face.read(memoryview(buffer), self.offset)
            elif self.kind == "flush":
                face.flush()
            else:
                face.zero(self.offset, self.length, self.kind == "trim", self.fua)
        except DiskError as error:
            return error.wire_errno, b""
        return 0, bytes(buffer)


PLACES = {"free": FREE, "own": OWN, "overwritten": OVERWRITTEN, "blank": BLANK}


def request_of(text: str) -> Request:
    """A request by its words: FACE KIND PLACE, with `part` for an unaligned range and `fua`."""
    face, kind, *more = text.split()
    if kind == "flush":
        return Request(face, kind)
    place = PLACES[more[0]]
    if "part" in more:
        return Request(face, kind, place + 100, BLOCK, "fua" in more)
    return Request(face, kind, place, LENGTH, "fua" in more)


# -- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One fault. `fails` is IMAGE:CALL=FAULT, or several of them; `tells` the case of the event, 0 for none;
    `latches` what query-replication names of the operation that failed, with its case and errno."""

    stage: str
    fails: str
    does: str
    errno: int = 0
    tells: int = 0
    latches: tuple[int, str, str] | None = None
    untouched: bool = False
    """The failing image is not needed, so no call on it is made at all."""

    @property
    def refused_below(self) -> bool:
        """Whether the secondary disk does not take the request's data."""
        faults = [fault for fault in self.fails.split() if fault.startswith("secondary:")]
        return not self.untouched and any(not fault.endswith(("=short", "=EOPNOTSUPP")) for fault in faults)

    def __str__(self) -> str:
        return f"{self.stage}, {self.fails}, {self.does}".replace(" ", "_")


def fine(stage: str, fails: str, *does: str) -> list[Row]:
    """Faults that nobody notices, since the call goes on, or something else takes its place."""
    return [Row(stage, fails, each) for each in does]


def spared(stage: str, fails: str, *does: str) -> list[Row]:
    """Requests that do not need the failing image."""
    return [Row(stage, fails, each, untouched=True) for each in does]


def shut_out(stage: str, *fails_and_does: tuple[str, str]) -> list[Row]:
    """The old primary after failover: refused before any image is touched."""
    return [Row(stage, fails, does, errno.ESHUTDOWN, untouched=True) for fails, does in fails_and_does]


def told(stage: str, fails: str, does: str, number: int, case: int) -> Row:
    """The client gets the errno and an event says the case; nothing is latched."""
    return Row(stage, fails, does, number, case)


def latched(stage: str, fails: str, does: str, number: int, case: int, operation: str, name: str = "") -> Row:
    """The client gets the errno, an event says the case, and get-error stays."""
    return Row(stage, fails, does, number, case, (case, operation, name or errno.errorcode[number]))


EIO, ENOSPC = errno.EIO, errno.ENOSPC

SECONDARY_ROWS = [
    # Stage none: the first copy. Its client learns of it, and there is nothing yet that could be latched.
    *(
        Row("none", f"secondary:{fault}", f"target {does}", number)
        for fault, does, number in (
            ("pwritev=EIO", "write free", EIO),
            ("pwritev=ENOSPC", "write free", ENOSPC),
            ("pwritev=nothing", "write free", ENOSPC),
            ("pwritev=short", "write free part", 0),
            ("pwritev=short-then-EIO", "write free", EIO),
            ("pwritev=EIO", "write free fua", EIO),
            ("preadv=EIO", "read free", EIO),
            ("preadv=short", "read free", 0),
            ("preadv=nothing", "read free", EIO),
            ("fallocate=EIO", "zero free", EIO),
            ("fallocate=EOPNOTSUPP", "zero free", 0),
            ("fdatasync=EIO", "flush", EIO),
        )
    ),
    *(Row("none", "secondary:pwritev=EIO", f"guest {does}", EIO, untouched=True) for does in ("write free", "flush")),
    *spared("none", "hidden:pwritev=EIO", "target write free"),
    *spared("none", "active:pwritev=EIO", "target write free"),
    # Running, secondary disk: case 4 for the primary's writes. The guest learns of what its own requests meet.
    latched("running", "secondary:pwritev=EIO", "target write free", EIO, 4, "write"),
    latched("running", "secondary:pwritev=ENOSPC", "target write free", ENOSPC, 4, "write"),
    latched("running", "secondary:pwritev=EDQUOT", "target write free", ENOSPC, 4, "write", "EDQUOT"),
    latched("running", "secondary:pwritev=nothing", "target write free", ENOSPC, 4, "write"),
    latched("running", "secondary:pwritev=short-then-EIO", "target write free", EIO, 4, "write"),
    latched("running", "secondary:pwritev=short-then-nothing", "target write free part", ENOSPC, 4, "write"),
    latched("running", "secondary:pwritev=EIO", "target write overwritten", EIO, 4, "write"),
    latched("running", "secondary:pwritev=EIO", "target write free fua", EIO, 4, "write"),
    latched("running", "secondary:preadv=EIO", "target write free", EIO, 4, "read"),
    latched("running", "secondary:preadv=nothing", "target write free part", EIO, 4, "read"),
    latched("running", "secondary:preadv=short-then-EIO", "target zero free", EIO, 4, "read"),
    latched("running", "secondary:fallocate=EIO", "target zero free", EIO, 4, "zero"),
    latched("running", "secondary:fallocate=ENOSPC", "target zero free", ENOSPC, 4, "zero"),
    latched("running", "secondary:fallocate=EIO", "target trim overwritten", EIO, 4, "zero"),
    latched("running", "secondary:fallocate=EOPNOTSUPP secondary:pwritev=EIO", "target zero free", EIO, 4, "zero"),
    Row("running", "secondary:preadv=EIO", "target read free", EIO),  # nothing is lost: who asked knows it
    latched("running", "secondary:fdatasync=EIO", "target zero free fua", EIO, 4, "zero"),
    latched("running", "secondary:fdatasync=EIO", "target flush", EIO, 4, "flush"),
    latched("running", "secondary:fdatasync=ENOSPC", "target flush", ENOSPC, 4, "flush"),
    *fine("running", "secondary:pwritev=short", "target write free", "target write overwritten part"),
    *fine("running", "secondary:preadv=short", "target write free", "target read free", "guest read free"),
    *fine("running", "secondary:fallocate=EOPNOTSUPP", "target zero free", "target trim free part"),
    told("running", "secondary:preadv=EIO", "guest read free", EIO, 4),
    told("running", "secondary:preadv=nothing", "guest read free", EIO, 4),
    told("running", "secondary:preadv=short-then-EIO", "guest read free", EIO, 4),
    told("running", "secondary:preadv=EIO", "guest write free part", EIO, 4),
    *spared("running", "secondary:preadv=EIO", "target write overwritten", "guest read own", "guest read overwritten"),
    *spared("running", "secondary:preadv=EIO", "guest write own part", "guest write free"),
    *spared("running", "secondary:pwritev=EIO", "guest write free", "guest zero free part", "target read free"),
    *spared("running", "secondary:fdatasync=EIO", "guest flush", "guest write free fua"),
    # Running, hidden: case 3, and nothing is overwritten that could not be copied.
    latched("running", "hidden:pwritev=EIO", "target write free", EIO, 3, "write"),
    latched("running", "hidden:pwritev=ENOSPC", "target write free", ENOSPC, 3, "write"),
    latched("running", "hidden:pwritev=EDQUOT", "target write free", ENOSPC, 3, "write", "EDQUOT"),
    latched("running", "hidden:pwritev=nothing", "target write free", ENOSPC, 3, "write"),
    latched("running", "hidden:pwritev=short-then-EIO", "target write free", EIO, 3, "write"),
    latched("running", "hidden:pwritev=short-then-ENOSPC", "target write free part", ENOSPC, 3, "write"),
    latched("running", "hidden:pwritev=EIO", "target zero free", EIO, 3, "write"),
    latched("running", "hidden:pwritev=ENOSPC", "target trim free part", ENOSPC, 3, "write"),
    *fine("running", "hidden:pwritev=short", "target write free", "target zero free part"),
    *fine("running", "hidden:preadv=short", "guest read overwritten", "guest write overwritten part"),
    told("running", "hidden:preadv=EIO", "guest read overwritten", EIO, 5),
    told("running", "hidden:preadv=nothing", "guest read overwritten", EIO, 5),
    told("running", "hidden:preadv=EIO", "guest write overwritten part", EIO, 5),
    *spared("running", "hidden:pwritev=EIO", "target write overwritten", "target write blank", "guest write free"),
    *spared("running", "hidden:preadv=EIO", "target write free", "target write overwritten part", "guest read own"),
    *spared("running", "hidden:fdatasync=EIO", "guest flush"),
    # Running, active: case 5, the guest alone.
    told("running", "active:pwritev=EIO", "guest write free", EIO, 5),
    told("running", "active:pwritev=ENOSPC", "guest write free", ENOSPC, 5),
    told("running", "active:pwritev=EDQUOT", "guest write free", ENOSPC, 5),
    told("running", "active:pwritev=nothing", "guest write free", ENOSPC, 5),
    told("running", "active:pwritev=short-then-EIO", "guest write free", EIO, 5),
    told("running", "active:pwritev=short-then-EIO", "guest write own", EIO, 5),
    told("running", "active:pwritev=EIO", "guest write own part", EIO, 5),
    told("running", "active:pwritev=ENOSPC", "guest write overwritten part", ENOSPC, 5),
    told("running", "active:pwritev=EIO", "guest zero free part", EIO, 5),
    told("running", "active:preadv=EIO", "guest read own", EIO, 5),
    told("running", "active:preadv=nothing", "guest read own", EIO, 5),
    told("running", "active:fdatasync=EIO", "guest flush", EIO, 5),
    told("running", "active:fdatasync=EIO", "guest write free fua", EIO, 5),
    *fine("running", "active:pwritev=short", "guest write free", "guest write overwritten part", "guest write own"),
    *fine("running", "active:preadv=short", "guest read own"),
    *spared("running", "active:pwritev=EIO", "guest zero free", "guest trim own", "target write free", "target flush"),
    *spared("running", "active:preadv=EIO", "guest write own part", "guest read free", "target write free"),
    *spared("running", "active:fdatasync=EIO", "target flush", "target zero free fua", "guest write free"),
    # Failover, its commit not yet begun: the guest never fails because of it, as long as one image takes its write.
    *fine("failover", "secondary:pwritev=EIO", "guest write free", "guest write free part"),
    *fine("failover", "secondary:pwritev=ENOSPC", "guest write free"),
    *fine("failover", "secondary:pwritev=short-then-nothing", "guest write free"),
    *fine("failover", "secondary:pwritev=short", "guest write free"),
    *fine("failover", "secondary:fallocate=EIO", "guest zero free", "guest trim free"),
    *fine("failover", "secondary:fallocate=EOPNOTSUPP", "guest zero free"),
    *fine("failover", "active:pwritev=ENOSPC", "guest write own", "guest write own part", "guest write overwritten"),
    *fine("failover", "active:pwritev=short-then-nothing", "guest write overwritten part"),
    *fine("failover", "active:pwritev=ENOSPC secondary:pwritev=short", "guest write own"),
    # What is held goes through to the disk as well; what that does not take comes down with the commit.
    *fine("failover", "secondary:pwritev=EIO", "guest write own", "guest write overwritten part"),
    *spared("failover", "secondary:pwritev=EIO", "guest zero own"),
    *spared("failover", "secondary:preadv=EIO", "guest read own", "guest read overwritten"),
    told("failover", "secondary:preadv=EIO", "guest read free", EIO, 4),
    told("failover", "secondary:fdatasync=EIO", "guest flush", EIO, 4),
    told("failover", "secondary:pwritev=EIO active:pwritev=ENOSPC", "guest write free", EIO, 4),
    told("failover", "secondary:pwritev=EIO active:pwritev=EIO", "guest write free", EIO, 5),
    told("failover", "active:pwritev=EIO", "guest write own", EIO, 5),
    told("failover", "active:preadv=EIO", "guest read own", EIO, 5),
    told("failover", "active:fdatasync=EIO", "guest flush", EIO, 5),
    told("failover", "hidden:preadv=EIO", "guest read overwritten", EIO, 5),
    *shut_out(
        "failover",
        ("secondary:pwritev=EIO", "target write free"),
        ("secondary:preadv=EIO", "target read free"),
        ("secondary:fdatasync=EIO", "target flush"),
        ("hidden:pwritev=ENOSPC", "target zero free"),
    ),
    # Failover-failed: what active or hidden hold goes to active, the rest to the disk; case 7 stays latched.
    told("failover-failed", "secondary:pwritev=EIO", "guest write free", EIO, 4),
    told("failover-failed", "secondary:pwritev=ENOSPC", "guest write free part", ENOSPC, 4),
    told("failover-failed", "secondary:pwritev=nothing", "guest write free", ENOSPC, 4),
    told("failover-failed", "secondary:pwritev=short-then-EIO", "guest write free", EIO, 4),
    told("failover-failed", "secondary:fallocate=EIO", "guest zero free", EIO, 4),
    told("failover-failed", "secondary:preadv=EIO", "guest read free", EIO, 4),
    told("failover-failed", "secondary:fdatasync=EIO", "guest flush", EIO, 4),
    told("failover-failed", "active:pwritev=EIO", "guest write own", EIO, 5),
    told("failover-failed", "active:pwritev=EIO", "guest write overwritten part", EIO, 5),
    told("failover-failed", "active:preadv=EIO", "guest read own", EIO, 5),
    told("failover-failed", "active:fdatasync=EIO", "guest flush", EIO, 5),
    told("failover-failed", "hidden:preadv=EIO", "guest read overwritten", EIO, 5),
    *fine("failover-failed", "secondary:pwritev=short", "guest write free"),
    *fine("failover-failed", "active:pwritev=short", "guest write own", "guest write overwritten part"),
    *fine("failover-failed", "active:preadv=short", "guest read own"),
    *spared("failover-failed", "secondary:pwritev=EIO", "guest write own", "guest write overwritten"),
    *spared("failover-failed", "active:pwritev=EIO", "guest write free", "guest zero own"),
    *shut_out(
        "failover-failed", ("secondary:pwritev=EIO", "target write free"), ("secondary:preadv=EIO", "target read own")
    ),
    # Done: the secondary disk alone.
    *(
        told(stage, f"secondary:{fault}", f"guest {does}", number, 4)
        for stage in ("done", "stopped")
        for fault, does, number in (
            ("pwritev=EIO", "write free", EIO),
            ("pwritev=ENOSPC", "write own part", ENOSPC),
            ("pwritev=nothing", "write free", ENOSPC),
            ("pwritev=short-then-EIO", "write overwritten", EIO),
            ("pwritev=EIO", "write free fua", EIO),
            ("preadv=EIO", "read own", EIO),
            ("preadv=nothing", "read free", EIO),
            ("fallocate=EIO", "zero free", EIO),
            ("fdatasync=EIO", "flush", EIO),
        )
    ),
    *fine("done", "secondary:pwritev=short", "guest write own", "guest write free part"),
    *fine("done", "secondary:preadv=short", "guest read free"),
    *fine("done", "secondary:fallocate=EOPNOTSUPP", "guest zero own"),
    *spared("done", "active:pwritev=EIO", "guest write own", "guest flush"),
    *spared("done", "active:preadv=EIO", "guest read own"),
    *spared("done", "active:fdatasync=EIO", "guest flush"),
    *spared("stopped", "hidden:preadv=EIO", "guest read overwritten"),
    *shut_out("done", ("secondary:pwritev=EIO", "target write free"), ("secondary:fdatasync=EIO", "target flush")),
    *shut_out("stopped", ("secondary:pwritev=EIO", "target zero free")),
]


# -- the node in this process ------------------------------------------------------------------------------------


def _no_control() -> ControlExport:
    raise AssertionError("nobody pairs with a node in this process")


class Bench:
    """A node of two disks in this process, with its commands, its faces and its events. The faults are in `disk0`."""

    def __init__(self, arguments: Sequence[str], state: Path) -> None:
        parser = OptionParser()
        for argument in arguments:
            parser.add(*argument.split("=", 1))
        hub = EventHub()
        self._events: list[dict[str, Any]] = []
        self._looked_at = 0
        hub.subscribe(self._events.append)
        self._state = StateFolder(str(state), durable="durability=power" in arguments)
        self.node = Node(parser.finish(), hub, self._state)
        self.node.launch()
        self._exports = Exports(self.node, _no_control, self.node._options)
        self._commands = Commands(self.node, lambda: None)

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command as a control client does."""
        return self._commands.execute(command, arguments).value

    def refused(self, command: str, **arguments: Any) -> str:
        """The text with which a command is refused."""
        with pytest.raises(CommandError) as refusal:
            self.execute(command, **arguments)
        return str(refusal.value)

    def face(self, name: str) -> Face:
        """The face of an export."""
        export = self._exports.open(name, Client("a local process", local=True))
        assert not isinstance(export, ControlExport)
        return export

    def told(self) -> list[tuple[int, str]]:
        """The case and disk of all REPLICATION_ERROR events since the last call."""
        events, self._looked_at = self._events[self._looked_at :], len(self._events)
        return [
            (event["data"]["case"], event["data"]["disk"]) for event in events if event["event"] == "REPLICATION_ERROR"
        ]

    def times_entered(self, stage: str) -> int:
        """How often the node has entered a stage."""
        entered = [event["data"]["to"] for event in self._events if event["event"] == "REPLICATION_STAGE_CHANGE"]
        return entered.count(stage)

    def latched(self) -> dict[str, Any] | None:
        """The error of query-replication at this moment."""
        error: dict[str, Any] | None = self.execute("query-replication")["error"]
        return error

    @property
    def error(self) -> dict[str, Any] | None:
        """The latched error; get-error and QEMU's status must agree with it. Not while it may come or go."""
        error = self.latched()
        if self.stage == "none":
            assert self.refused("replication-get-error") == NOT_RUNNING
        elif error is None:
            assert self.execute("replication-get-error") == {}
            assert self.execute("query-xen-replication-status") == {"error": False}
        else:
            assert self.refused("replication-get-error") == IO_ERROR
            assert self.execute("query-xen-replication-status") == {"error": True, "desc": IO_ERROR}
        return error

    @property
    def stage(self) -> str:
        """The stage."""
        return self.node.stage.value

    def wait_stage(self, stage: str) -> None:
        """Wait until the node is in a stage."""
        wait_until(lambda: self.stage == stage, f"the stage is {stage}")

    def close(self) -> None:
        """End the node."""
        self.node.close()


def read(face: Face) -> bytes:
    """All that a face shows."""
    content = bytearray(face.size)
    face.read(memoryview(content), 0)
    return bytes(content)


class Images:
    """A folder with the overlays as qemu-img makes them. Making them anew for each row would take most of the time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, tuple[bytes, int]] = {}

    def reset(self) -> None:
        """Only unused overlays are in the folder; the first time nothing."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for name, (content, data_size) in self._made.items():
            path = self.folder / name
            path.write_bytes(content)
            make_raw(path.with_suffix(".data"), data_size)

    def keep(self) -> None:
        """The overlays in the folder are unused."""
        if not self._made:
            for path in self.folder.glob("*.qcow2"):
                self._made[path.name] = path.read_bytes(), path.with_suffix(".data").stat().st_size


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


class SecondaryBench(Bench):
    """A secondary of two disks."""

    def __init__(
        self, images: Images, seam: Seam, monkeypatch: pytest.MonkeyPatch, more_arguments: Sequence[str] = ()
    ) -> None:
        self.seam = seam
        images.reset()
        self.folder = folder = images.folder
        self._disks = [make_raw(folder / f"secondary{index}.raw", SIZE, OLD) for index in range(2)]
        arguments = ["mode=secondary", f"state={folder / 'state'}", *more_arguments]
        for index, path in enumerate(self._disks):
            arguments += [f"disk=disk{index}:{path}", f"top-id=top{index}"]
            arguments += [f"{kind}={folder / f'{kind}{index}.qcow2'}" for kind in ("active", "hidden")]
        super().__init__(arguments, folder / "state")
        images.keep()
        self.guest, self.target = self.face("top0"), self.face("disk0")
        self.paths = {"secondary": str(self._disks[0])}
        self.paths |= {kind: str(folder / f"{kind}0.data") for kind in ("active", "hidden")}
        self.paths |= {"record": str(folder / "state/state.json"), "twin": str(folder / "state/state.json.twin")}
        assert all(os.path.exists(path) for path in self.paths.values())
        self._held = threading.Event()
        self._go_on = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._failover: Future[Any] | None = None
        self._holding = False
        for name, module in list(sys.modules.items()):
            if name.startswith("replication.") and callable(getattr(module, "pause", None)):
                monkeypatch.setattr(module, "pause", self._pause)

    def _pause(self, name: str) -> None:
        if name == "failover.entered" and self._holding:
            self._held.set()
            assert self._go_on.wait(DEADLINE_S)

    def below(self, index: int = 0) -> bytes:
        """What is in the secondary disk's file."""
        return self._disks[index].read_bytes()

    def fail(self, faults: str) -> None:
        """From now on IMAGE:CALL=FAULT, several of them separated by spaces."""
        found = {}
        for fault in faults.split():
            image, _, what = fault.partition(":")
            call, _, kind = what.partition("=")
            found[self.paths[image], call] = kind
        self.seam.fail(found)

    # -- stages --------------------------------------------------------------------------------------------

    def bring_to(self, stage: str) -> None:
        """Go to a stage with everything in place; see OVERWRITTEN and so on."""
        if stage == "none":
            return
        self.execute("xen-set-replication", enable=True, primary=False)
        for target, guest in ((self.target, self.guest), (self.face("disk1"), self.face("top1"))):
            target.write(memoryview(NEW), OVERWRITTEN, False)
            guest.write(memoryview(MINE), OWN, False)
            guest.zero(ERASED, LENGTH, False, False)
        if stage == "failover":
            self.hold_failover()
        elif stage == "failover-failed":
            self.fail("secondary:pwritev=EIO")
            self.fail_over()
            self.wait_stage("failover-failed")
            wait_until(self.latched, "the failed commit is latched")
            self.seam.work()
        elif stage == "done":
            self.fail_over()
            self.wait_done()
        elif stage == "stopped":
            self.execute("xen-set-replication", enable=False, primary=False)
        self.told()

    def fail_over(self) -> None:
        """Begin a failover."""
        self.execute("xen-set-replication", **FAILOVER)

    def hold_failover(self) -> None:
        """Begin a failover, with the commit held before its first block."""
        self._holding = True
        self._failover = self._pool.submit(self.fail_over)
        assert self._held.wait(DEADLINE_S)

    def release_failover(self) -> None:
        """Let the commit begin."""
        assert self._failover is not None
        self._go_on.set()
        self._failover.result(DEADLINE_S)

    def wait_done(self) -> None:
        """Wait for the end of a good commit; the error goes with its cause."""
        wait_until(lambda: self.stage in ("done", "failover-failed"), "the commit ends")
        assert self.stage == "done", self.latched()
        wait_until(lambda: self.latched() is None, "no error is left")
        assert self.error is None

    def close(self) -> None:
        self.seam.work()
        self._go_on.set()
        self._pool.shutdown()
        super().close()

    # -- what must hold in every row -----------------------------------------------------------------------

    def check_other_disk(self) -> None:
        """The other disk of the node goes on as if nothing was wrong."""
        guest, target = self.face("top1"), self.face("disk1")
        if self.stage == "none":
            target.write(memoryview(MORE), LATER, False)
            assert self.below(1) == changed(OLD, (LATER, MORE))
            return
        guest.write(memoryview(MORE), LATER, True)
        guest.flush()
        planned = self.below(1)[OVERWRITTEN : OVERWRITTEN + LENGTH] == NEW and self.stage == "done"
        own = [] if planned else [(OWN, MINE), (ERASED, bytes(LENGTH))]
        preserved = [(OVERWRITTEN, NEW)] if planned else []
        assert read(guest) == changed(OLD, *own, *preserved, (LATER, MORE))
        if self.stage != "running":
            assert Request("target", "write", FREE, LENGTH).send(target)[0] == errno.ESHUTDOWN

    def check_other_disk_after_checkpoint(self) -> None:
        """The checkpoint was one for the other disk, too."""
        assert read(self.face("top1")) == self.below(1) == changed(OLD, (OVERWRITTEN, NEW))

    def check_content(self, request: Request, number: int, before: tuple[bytes, bytes], copied: bool, row: Row) -> None:
        """The guest face and the disk after the request of `row`, which ended with errno `number`. `copied`: the
        request may have reached the disk, as far as copy-before-write decides that."""
        seen_before, below_before = before
        seen, below = self.seen(), self.below()
        after = changed(seen_before, (request.offset, request.data))
        below_after = changed(below_before, (request.offset, request.data))
        if request.face == "target":
            assert self.stage == "none" or seen == seen_before, "the last checkpoint has changed"
            if number == errno.ESHUTDOWN or not copied:
                assert below == below_before, "a refused write is in the disk"
            elif number:
                assert is_either(below, below_before, below_after)
            else:
                assert below == below_after
        else:
            if self.stage == "none":
                assert not seen
            elif number:
                assert is_either(seen, seen_before, after)
            else:
                assert seen == after
            if self.stage in ("none", "running") or not request.data:
                assert below == below_before, "a request of the guest has changed the secondary disk"
            elif self.stage == "failover" and not number:
                # In the disk as well, with whole blocks of it, unless that has refused it: then with the commit.
                assert is_either(below, below_before, after)
                if "short-then" not in row.fails:
                    part = slice(request.offset, request.offset + request.length)
                    assert below[part] == (below_before if row.refused_below else after)[part]
            else:
                # A write that is committed at once brings its whole blocks down.
                assert is_either(below, below_before, after)

    def seen(self) -> bytes:
        """What the guest sees, if there is anything."""
        return b"" if self.stage == "none" else read(self.guest)

    def check_later_requests(self, latched_case: int) -> None:
        """With the fault gone, good requests succeed."""
        seen, below = self.seen(), self.below()
        stage = self.stage
        if stage != "none":
            self.guest.write(memoryview(MORE), LATER, False)
            assert self.seen() == changed(seen, (LATER, MORE))
            if stage == "running":
                assert self.below() == below
        at = LATER + 2 * BLOCK
        if stage in ("none", "running") and latched_case != 3:
            # After case 3 it depends on what the primary does first, whether they succeed: test_failures.py.
            self.target.write(memoryview(MORE), at, False)
            assert self.below() == changed(below, (at, MORE))
            if stage == "running":
                assert self.seen() == changed(seen, (LATER, MORE))
        elif stage not in ("none", "running"):
            assert Request("target", "write", at, BLOCK).send(self.target)[0] == errno.ESHUTDOWN

    def check_end(self, latched: tuple[int, str, str] | None, unflushed: bool = False) -> None:
        """From here, a checkpoint goes as the failure demands, and failover ends with what the guest sees; `unflushed`:
        at the second try, because the disk could not be made stable while the commit was under way."""
        if self.stage == "none":
            self.execute("xen-set-replication", enable=True, primary=False)
            assert self.seen() == self.below()
        if self.stage == "running":
            self._check_checkpoint(latched)
            seen = self.seen()
            self.fail_over()
            self.wait_done()
            assert self.below() == seen
            assert Request("target", "write", FREE, BLOCK).send(self.target)[0] == errno.ESHUTDOWN
        elif self.stage in ("failover", "failover-failed"):
            seen = self.seen()
            if self.stage == "failover":
                self.release_failover()
            else:
                self.execute("replication-retry")
            if unflushed:
                self.wait_stage("failover-failed")
                error = wait_until(self.latched, "the failed commit is latched")
                assert (error["case"], error["operation"], error["errno"]) == (7, "commit", "EIO")
                self.execute("replication-retry")
            self.wait_done()
            assert self.below() == seen
        assert self.seen() == self.below()

    def _check_checkpoint(self, latched: tuple[int, str, str] | None) -> None:
        before = self.seen(), self.execute("query-replication")["epoch"]
        if latched is None:
            self.execute("xen-colo-do-checkpoint")
            assert self.seen() == self.below()
            return
        case, operation, _ = latched
        if operation != "flush":
            # A flush has lost no write that the primary could be asked for; what comes of it is not decided here.
            text = self.refused("xen-colo-do-checkpoint")
            assert case != 3 or text == CANCELLED
            assert self.stage == "running"
            assert (self.seen(), self.execute("query-replication")["epoch"]) == before


@pytest.fixture
def secondary(images: Images, seam: Seam, monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondaryBench]:
    bench = SecondaryBench(images, seam, monkeypatch)
    yield bench
    bench.close()


@pytest.mark.parametrize("row", SECONDARY_ROWS, ids=str)
def test_a_fault_on_the_secondary_is_told_to_whom_it_concerns_and_breaks_nothing_else(
    secondary: SecondaryBench, row: Row
) -> None:
    secondary.bring_to(row.stage)
    stage, error = secondary.stage, secondary.error
    before = secondary.seen(), secondary.below()
    request = request_of(row.does)
    face = secondary.target if request.face == "target" else secondary.guest
    secondary.fail(row.fails)
    number, got = request.send(face)
    hits = secondary.seam.hits
    assert number == row.errno
    assert bool(hits) is not row.untouched
    if request.kind == "read" and not number:
        content = before[0] if request.face == "guest" else before[1]
        assert got == content[request.offset : request.offset + request.length]
    assert secondary.told() == ([(row.tells, "disk0")] if row.tells else [])
    assert secondary.stage == stage
    if row.latches is None:
        assert secondary.error == error
    else:
        now = secondary.error
        assert now is not None
        assert (now["case"], now["operation"], now["errno"]) == row.latches
        assert (now["disk"], now["count"]) == ("disk0", 1)
        assert now["offset"] // BLOCK == request.offset // BLOCK
    secondary.check_other_disk()
    secondary.seam.work()
    assert secondary.told() == []
    copied = row.latches is None or (row.latches[0] == 4 and row.latches[1] != "read")
    secondary.check_content(request, number, before, copied, row)
    secondary.check_later_requests(row.latches[0] if row.latches else 0)
    # In stage failover-failed there is no commit that could fail for it: the next one brings down everything anyway.
    unflushed = (row.stage, row.fails, row.does) == ("failover", "secondary:fdatasync=EIO", "guest flush")
    secondary.check_end(row.latches, unflushed)


# -- the commit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fails", "name"),
    [
        ("secondary:pwritev=EIO", "EIO"),
        ("secondary:pwritev=ENOSPC", "ENOSPC"),
        ("secondary:pwritev=nothing", "ENOSPC"),
        ("secondary:pwritev=short-then-EIO", "EIO"),
        ("secondary:fallocate=EIO", "EIO"),
        ("secondary:fallocate=EOPNOTSUPP secondary:pwritev=ENOSPC", "ENOSPC"),
        ("secondary:fdatasync=EIO", "EIO"),
        ("active:preadv=EIO", "EIO"),
        ("active:preadv=nothing", "EIO"),
        ("hidden:preadv=EIO", "EIO"),
        ("hidden:preadv=short-then-nothing", "EIO"),
    ],
)
def test_a_commit_that_meets_a_fault_is_failover_failed_and_goes_on_when_it_is_gone(
    secondary: SecondaryBench, fails: str, name: str
) -> None:
    secondary.bring_to("running")
    seen = secondary.seen()
    secondary.fail(fails)
    secondary.fail_over()
    secondary.wait_stage("failover-failed")
    error = wait_until(secondary.latched, "the failed commit is latched")
    assert (error["case"], error["disk"], error["operation"], error["errno"]) == (7, "disk0", "commit", name)
    assert secondary.told() == [(7, "disk0")]
    jobs = {job["id"]: job for job in secondary.execute("query-jobs")}
    assert set(jobs) == {"commit-disk0", "commit-disk1"}
    assert all(job["status"] == "concluded" and job["error"] for job in jobs.values())
    secondary.check_other_disk()
    # It fails again while the fault is there, and loses nothing.
    secondary.execute("replication-retry")
    wait_until(lambda: secondary.times_entered("failover-failed") == 2, "it has failed again")
    wait_until(secondary.latched, "it is latched again")
    secondary.seam.work()
    assert secondary.seen() == seen
    secondary.check_later_requests(7)
    secondary.check_end(None)


@pytest.mark.parametrize(
    "fails",
    [
        "secondary:pwritev=short",
        "secondary:fallocate=EOPNOTSUPP",
        "secondary:preadv=EIO",
        "active:preadv=short",
        "hidden:preadv=short",
        "active:pwritev=ENOSPC",
        "active:fdatasync=EIO",
        "hidden:pwritev=EIO",
        "hidden:fdatasync=EIO",
    ],
)
def test_a_commit_that_can_do_without_what_fails_ends_well(secondary: SecondaryBench, fails: str) -> None:
    secondary.bring_to("running")
    seen = secondary.seen()
    secondary.fail(fails)
    secondary.fail_over()
    secondary.wait_done()
    assert secondary.told() == []
    assert secondary.below() == seen
    secondary.seam.work()
    assert secondary.seen() == seen
    secondary.check_later_requests(0)


def test_a_commit_for_which_there_is_no_thread_has_failed_and_can_be_retried(
    secondary: SecondaryBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    secondary.bring_to("running")
    seen = secondary.seen()
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "commit":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        secondary.fail_over()
    assert secondary.stage == "failover-failed"
    error = secondary.latched()
    assert error is not None
    assert (error["case"], error["operation"]) == (7, "commit")
    assert "no thread: can't start new thread" in secondary.execute("query-jobs")[0]["error"]
    assert secondary.seen() == seen
    secondary.execute("replication-retry")
    secondary.wait_done()
    assert secondary.below() == seen


@pytest.mark.parametrize("defect", [MemoryError("no more"), KeyError("nobody expected it")], ids=["memory", "defect"])
@pytest.mark.parametrize(
    "place", [(SecondaryDisk, "mark_rollback"), (Commit, "run"), (Failover, "_committed")], ids=lambda place: place[1]
)
def test_a_commit_that_meets_a_defect_has_failed_and_can_be_retried(
    secondary: SecondaryBench, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str], defect: Exception
) -> None:
    """It would leave stage failover with nobody who works, for good."""
    secondary.bring_to("running")
    seen = secondary.seen()

    def raise_it(*_: object) -> None:
        raise defect

    with monkeypatch.context() as patched:
        patched.setattr(*place, raise_it)
        secondary.fail_over()
        wait_until(lambda: secondary.stage == "failover-failed", "it has failed")
    error = secondary.latched()
    assert error is not None
    assert (error["case"], error["operation"]) == (7, "commit")
    assert f"internal error, see the log: {defect!r}" in error["desc"]
    secondary.execute("replication-retry")
    secondary.wait_done()
    assert secondary.below() == seen


def test_an_end_that_leaves_a_commit_behind_is_no_good_end(
    secondary: SecondaryBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it still has in hand goes to the disk, and out of the overlays, after all was flushed."""
    monkeypatch.setattr(side_of_secondary, "_CLOSE_S", 0.2)
    secondary.bring_to("running")
    write, held, go_on = files.pwritev, threading.Event(), threading.Event()

    def slow(fd: int, *arguments: Any) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(secondary.folder / "secondary0.raw"):
            held.set()
            assert go_on.wait(DEADLINE_S)
        return write(fd, *arguments)

    monkeypatch.setattr(files, "pwritev", slow)
    secondary.fail_over()
    assert held.wait(DEADLINE_S)
    try:
        secondary.node.side.close()
        for thread in threading.enumerate():
            if thread.name == "flush":
                thread.join(DEADLINE_S)
        assert not json.loads((secondary.folder / "state" / "state.json").read_text()).get("clean")
    finally:
        go_on.set()
        for thread in threading.enumerate():
            if thread.name == "commit":
                thread.join(DEADLINE_S)


def test_a_commit_that_is_over_before_its_thread_is_known_ends_well(
    secondary: SecondaryBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small commit on a busy machine: the thread that has begun it goes on only after it has ended."""
    secondary.bring_to("running")
    seen = secondary.seen()
    start = threading.Thread.start

    def start_and_wait(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "commit":
            thread.join(DEADLINE_S)

    monkeypatch.setattr(threading.Thread, "start", start_and_wait)
    secondary.fail_over()
    secondary.wait_done()
    assert secondary.below() == seen


# -- the failover itself -------------------------------------------------------------------------------------------


CALLS_OF_A_FAILOVER = {
    *((name, call) for name in ("record", "twin") for call in ("pwritev", "fdatasync")),
    *(("secondary", call) for call in ("pwritev", "fallocate", "fdatasync")),
    *((name, call) for name in ("active", "hidden") for call in ("preadv", "fallocate")),
}
"""Each system call on files that a failover makes, from the command to stage done: of the record before the stage and
at the end of the commit (the rows below), of the disk and the overlays by the commit (the rows above), and of the
overlays when their space is given back (the end of "commands that need no data")."""


def test_a_failover_makes_the_calls_of_which_the_rows_have_each(secondary: SecondaryBench) -> None:
    secondary.bring_to("running")
    secondary.seam.fail({})
    secondary.fail_over()
    secondary.wait_done()
    names = {path: name for name, path in secondary.paths.items()}
    others = {path.replace("1.", "0.") for path, _ in secondary.seam.called} - names.keys()
    assert not others, "a file of which no row knows"
    called = {(names[path.replace("1.", "0.")], call) for path, call in secondary.seam.called}
    given_back = {(name, "fallocate") for name in ("active", "hidden")}
    assert called | given_back == CALLS_OF_A_FAILOVER


RECORD_FAULTS = [
    "record:pwritev=EIO",
    "record:pwritev=ENOSPC",
    "record:pwritev=nothing",
    "record:pwritev=short-then-EIO",
    "record:fdatasync=EIO",
    "twin:pwritev=EIO",
    "twin:fdatasync=EIO",
]


@pytest.mark.parametrize("fails", RECORD_FAULTS)
def test_a_failover_whose_stage_cannot_be_saved_is_refused_and_changes_nothing(
    secondary: SecondaryBench, fails: str
) -> None:
    """The next process would be the primary's secondary again, on a disk on which the commit had begun."""
    secondary.bring_to("running")
    before = secondary.seen(), secondary.below()
    secondary.fail(fails)
    refusal = secondary.refused("xen-set-replication", **FAILOVER)
    assert refusal.startswith("cannot write ")
    assert "Nothing has changed. Try again" in refusal
    assert "use force" in refusal
    assert (secondary.stage, secondary.error, secondary.told()) == ("running", None, [])
    assert (secondary.seen(), secondary.below()) == before
    # Neither the guest nor the old primary is kept out.
    secondary.check_later_requests(0)
    secondary.seam.work()
    secondary.check_end(None)


@pytest.mark.parametrize("fails", RECORD_FAULTS)
def test_a_failover_by_force_whose_stage_cannot_be_saved_keeps_the_old_primary_out_and_commits_when_it_is(
    secondary: SecondaryBench, fails: str
) -> None:
    """A person accepts that a kill before would undo it; so nothing comes down before."""
    secondary.bring_to("running")
    before = secondary.seen(), secondary.below()
    secondary.fail(fails)
    secondary.execute("replication-stop", failover=True, force=True)
    assert (secondary.stage, secondary.told()) == ("failover", [])
    assert Request("target", "write", FREE, LENGTH).send(secondary.target)[0] == errno.ESHUTDOWN
    secondary.guest.write(memoryview(MORE), LATER, False)
    assert secondary.seen() == changed(before[0], (LATER, MORE))
    assert secondary.below() == before[1], "the commit has begun"
    secondary.seam.work()
    secondary.wait_done()
    assert secondary.below() == secondary.seen() == changed(before[0], (LATER, MORE))


@pytest.mark.parametrize("fails", RECORD_FAULTS)
def test_a_commit_whose_end_cannot_be_saved_serves_the_guest_in_stage_failover_until_it_can(
    secondary: SecondaryBench, fails: str
) -> None:
    """There is nobody to give the error to, and everything has come down: nothing is told as a fault of the commit."""
    secondary.bring_to("failover")
    seen = secondary.seen()
    secondary.fail(fails)
    secondary.release_failover()
    wait_until(lambda: secondary.below() == seen, "all has come down")
    wait_until(lambda: secondary.seam.hits, "the end of the commit cannot be saved")
    assert (secondary.stage, secondary.error, secondary.told()) == ("failover", None, [])
    secondary.guest.write(memoryview(MORE), LATER, False)
    assert secondary.seen() == changed(seen, (LATER, MORE))
    assert Request("target", "write", FREE, LENGTH).send(secondary.target)[0] == errno.ESHUTDOWN
    secondary.seam.work()
    secondary.wait_done()
    assert secondary.below() == secondary.seen() == changed(seen, (LATER, MORE))


# -- commands that need no data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fails",
    [
        "active:pwritev=ENOSPC active:preadv=EIO",
        "hidden:pwritev=ENOSPC hidden:preadv=EIO",
        "secondary:pwritev=EIO secondary:preadv=EIO secondary:fallocate=EIO",
    ],
)
def test_a_checkpoint_and_a_planned_stop_move_no_data_so_no_data_that_fails_keeps_them(
    secondary: SecondaryBench, fails: str
) -> None:
    secondary.bring_to("running")
    secondary.fail(fails)
    epoch = secondary.execute("query-replication")["epoch"]
    secondary.execute("xen-colo-do-checkpoint")
    assert secondary.execute("query-replication")["epoch"] == epoch + 1
    secondary.check_other_disk_after_checkpoint()
    secondary.seam.work()
    assert secondary.seen() == secondary.below() == changed(OLD, (OVERWRITTEN, NEW))
    secondary.target.write(memoryview(DATA), FREE, False)
    secondary.fail(fails)
    secondary.execute("replication-stop")
    secondary.seam.work()
    assert secondary.seen() == secondary.below() == changed(OLD, (OVERWRITTEN, NEW), (FREE, DATA))
    assert (secondary.stage, secondary.error, secondary.told()) == ("done", None, [])


@pytest.mark.parametrize("kind", ["EIO", "EOPNOTSUPP"])
def test_space_that_cannot_be_given_back_is_nobodys_trouble(secondary: SecondaryBench, kind: str) -> None:
    secondary.bring_to("running")
    secondary.fail(f"active:fallocate={kind} hidden:fallocate={kind}")
    secondary.execute("xen-colo-do-checkpoint")
    wait_until(lambda: secondary.seam.hits >= 2, "the space of both overlays should have been given back")
    assert (secondary.stage, secondary.error, secondary.told()) == ("running", None, [])
    # What is in the overlays' files still is not taken for content.
    assert secondary.seen() == secondary.below() == changed(OLD, (OVERWRITTEN, NEW))
    secondary.target.write(memoryview(DATA), OVERWRITTEN, False)
    secondary.guest.write(memoryview(MINE[:100]), OWN + 100, False)
    assert secondary.seen() == changed(OLD, (OVERWRITTEN, NEW), (OWN + 100, MINE[:100]))
    secondary.seam.work()
    secondary.check_end(None)


@pytest.mark.parametrize(("fails", "case"), [("secondary:fdatasync=EIO", 4), ("hidden:fdatasync=EIO", 3)])
def test_a_flush_that_has_failed_is_repaired_by_sending_everything_again(
    secondary: SecondaryBench, fails: str, case: int
) -> None:
    """Nobody knows which writes did not become stable. A flush may also do without the image that fails."""
    secondary.bring_to("running")
    seen = secondary.seen()
    secondary.fail(fails)
    number, _ = request_of("target flush").send(secondary.target)
    secondary.seam.work()
    error = secondary.error
    if number or case == 4:
        assert (number, error["case"], error["operation"]) == (EIO, case, "flush")
        secondary.refused("xen-colo-do-checkpoint")
        assert secondary.seen() == seen
    else:
        assert error is None
    sent = changed(OLD, (OVERWRITTEN, NEW), (FREE, DATA))
    secondary.target.write(memoryview(sent), 0, False)
    secondary.target.flush()
    assert secondary.error is None
    assert secondary.seen() == seen
    secondary.execute("xen-colo-do-checkpoint")
    assert secondary.seen() == secondary.below() == sent


def test_a_flush_that_fails_at_the_end_of_a_role_or_a_process_is_latched(secondary: SecondaryBench) -> None:
    """There is no request of anybody who could be told."""
    secondary.bring_to("running")
    secondary.fail("secondary:fdatasync=EIO")
    with pytest.raises(DiskError):
        secondary.node.side.settle()
    secondary.seam.work()
    error = secondary.error
    assert error is not None
    assert (error["case"], error["operation"], error["count"]) == (4, "flush", 1)
    assert secondary.told() == [(4, "disk0")]


@pytest.fixture
def stable(images: Images, seam: Seam, monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondaryBench]:
    """A secondary that outlives a power cut: checkpoints write to the images."""
    bench = SecondaryBench(images, seam, monkeypatch, ["durability=power"])
    yield bench
    bench.close()


@pytest.mark.parametrize("disk", [0, 1])
@pytest.mark.parametrize("kind", ["active", "hidden"])
@pytest.mark.parametrize("fault", ["pwritev=EIO", "pwritev=short-then-nothing", "fdatasync=EIO"])
def test_a_checkpoint_that_an_image_does_not_take_is_the_same_on_all_disks_and_as_it_was_answered(
    stable: SecondaryBench, disk: int, kind: str, fault: str
) -> None:
    stable.bring_to("running")
    seen, epoch = stable.seen(), stable.execute("query-replication")["epoch"]
    call, _, name = fault.partition("=")
    stable.seam.fail({(str(stable.folder / f"{kind}{disk}.qcow2"), call): name})
    try:
        stable.execute("xen-colo-do-checkpoint")
        taken = True
    except CommandError:
        taken = False
    assert stable.seam.hits
    stable.seam.work()
    error = stable.error
    assert error is not None
    assert (error["case"], error["disk"]) == (6, f"disk{disk}")
    assert stable.execute("query-replication")["epoch"] == epoch + taken
    for index in range(2):
        assert read(stable.face(f"top{index}")) == (stable.below(index) if taken else seen)
    # No further one, until somebody has looked after it.
    stable.refused("xen-colo-do-checkpoint")
    for index in range(2):
        assert read(stable.face(f"top{index}")) == (stable.below(index) if taken else seen)


# -- the primary's own disk ------------------------------------------------------------------------------------------


class PrimaryBench(Bench):
    """A primary of two disks in this process, and the process of its secondary."""

    def __init__(self, lab: Lab, seam: Seam, protocol: str) -> None:
        self.seam = seam
        self.peer: Secondary = lab.secondary((SIZE, SIZE), contents=(OLD, OLD))
        self.peer.start_replication()
        self._disks = [make_raw(lab.folder / f"primary{index}.raw", SIZE, OLD) for index in range(2)]
        arguments = ["mode=primary", f"state={lab.folder / 'p'}", f"secondary={self.peer.uri()}"]
        arguments += [f"protocol={protocol}"]
        arguments += [f"disk=disk{index}:{path}" for index, path in enumerate(self._disks)]
        super().__init__(arguments, lab.folder / "p")
        self.disk, self.other = self.face("disk0"), self.face("disk1")

    def below(self, index: int = 0) -> bytes:
        """What is in the primary disk's file."""
        return self._disks[index].read_bytes()

    def beyond(self, index: int = 0) -> bytes:
        """What is in the secondary disk's file, once everything has been answered."""
        wait_until(lambda: not self.query_disk(index)["forward-queue-bytes"], "all has been forwarded")
        return self.peer.disks[index].read_bytes()

    def query_disk(self, index: int) -> dict[str, Any]:
        """A disk in query-replication."""
        shown: dict[str, Any] = self.execute("query-replication")["disks"][index]
        return shown

    def fail(self, fault: str) -> None:
        """From now on CALL=FAULT on the first disk."""
        call, _, kind = fault.partition("=")
        self.seam.fail({(str(self._disks[0]), call): kind})

    def bring_to(self, stage: str) -> None:
        """Go to a stage."""
        if stage != "none":
            self.execute("xen-set-replication", enable=True, primary=True)
        if stage == "done":
            self.execute("replication-stop")
        self.told()

    def close(self) -> None:
        self.seam.work()
        super().close()


def primary_rows(*, more: bool) -> list[tuple[str, str, int]]:
    """(fault, request, errno) of the primary disk; without `more` only the most telling."""
    few = [
        ("pwritev=EIO", "write free part", EIO),
        ("pwritev=nothing", "write free", ENOSPC),
        ("pwritev=short-then-EIO", "write free", EIO),
        ("pwritev=short", "write free part", 0),
        ("preadv=EIO", "read free", EIO),
        ("fallocate=EIO", "zero free", EIO),
        ("fdatasync=EIO", "flush", EIO),
    ]
    if not more:
        return few
    return [
        *few,
        ("pwritev=ENOSPC", "write free", ENOSPC),
        ("pwritev=EDQUOT", "write free", ENOSPC),
        ("pwritev=short-then-nothing", "write free part", ENOSPC),
        ("pwritev=EIO", "write free fua", EIO),
        ("preadv=nothing", "read free part", EIO),
        ("preadv=short", "read free", 0),
        ("fallocate=ENOSPC", "trim free", ENOSPC),
        ("fallocate=EOPNOTSUPP", "zero free", 0),
        ("fdatasync=EIO", "zero free fua", EIO),
    ]


PRIMARY_ROWS = [
    Row(f"{stage} {protocol}", fault, f"primary {does}", number, 1 if number else 0)
    for stage, protocol, more in (
        ("none", "async", False),
        ("running", "async", True),
        ("running", "sync", True),
        ("done", "async", False),
    )
    for fault, does, number in primary_rows(more=more)
]


@pytest.mark.parametrize("row", PRIMARY_ROWS, ids=str)
def test_a_fault_of_the_primary_disk_is_told_to_its_guest_alone_in_every_stage(lab: Lab, seam: Seam, row: Row) -> None:
    stage, protocol = row.stage.split()
    bench = PrimaryBench(lab, seam, protocol)
    with contextlib.closing(bench):
        bench.bring_to(stage)
        request = request_of(row.does)
        bench.fail(row.fails)
        number, got = request.send(bench.disk)
        assert bench.seam.hits
        assert number == row.errno
        if request.kind == "read" and not number:
            assert got == OLD[request.offset : request.offset + request.length]
        assert bench.told() == ([(1, "disk0")] if row.tells else [])
        assert (bench.stage, bench.error) == (stage, None)
        # The other disk and its replication go on, while this one fails.
        bench.other.write(memoryview(MORE), LATER, True)
        bench.other.flush()
        assert bench.below(1) == changed(OLD, (LATER, MORE))
        running = stage == "running"
        assert bench.beyond(1) == (bench.below(1) if running else OLD)
        bench.seam.work()
        after = changed(OLD, (request.offset, request.data))
        assert is_either(bench.below(), OLD, after) if number else bench.below() == after
        # So does this one, once it works.
        bench.disk.write(memoryview(MORE), LATER, False)
        assert read(bench.disk) == bench.below()
        assert bench.below()[LATER : LATER + BLOCK] == MORE
        if running:
            assert bench.beyond()[LATER : LATER + BLOCK] == MORE
            # What the failed write has left behind may differ on the two sides, but not unnoticed.
            assert bench.query_disk(0)["out-of-sync-bytes"] or bench.beyond() == bench.below()
            if not (number and request.data):
                bench.execute("replication-checkpoint")
                assert bench.query_disk(0)["out-of-sync-bytes"] == 0
                assert bench.beyond() == bench.below()
        else:
            assert bench.beyond() == OLD
        assert bench.told() == []
        # Nothing of all this is the secondary's trouble.
        assert bench.peer.execute("query-xen-replication-status") == {"error": False}
        assert bench.peer.status()["stage"] == "running"


# -- disks behind NBD endpoints --------------------------------------------------------------------------------------


class Ends:
    """A secondary whose disk is behind an endpoint that fails as it is told, and, unless `alone`, its primary."""

    def __init__(
        self,
        lab: Lab,
        error: dict[str, str],
        *,
        protocol: str = "async",
        disk: bool = True,
        alone: bool = False,
        secondary_arguments: Sequence[str] = (),
    ) -> None:
        self.points: PausePoints = lab.pause_points()
        self.below = make_raw(lab.folder / "behind.raw", SIZE, OLD)
        self.endpoint: DelayedEndpoint = lab.endpoint(path=self.below, name="behind", error=error)
        arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk=disk0:{self.endpoint.uri()}", "top-id=top0"]
        arguments += secondary_arguments
        environment = self.points.environment
        self.secondary = lab.start(Server(lab.folder, "secondary", arguments, extra_environment=environment))
        self.target, self.guest = self.secondary.connect("disk0"), self.secondary.connect("top0")
        if alone:
            return
        arguments = ["mode=primary", f"state={lab.folder / 'p'}", f"protocol={protocol}"]
        if disk:
            arguments += [f"disk=disk0:{make_raw(lab.folder / 'primary.raw', SIZE, OLD)}"]
        arguments += [f"secondary={self.secondary.uri('disk0')}"]
        self.primary = lab.start(Server(lab.folder, "primary", arguments))
        self.start()
        self.primary.execute("xen-set-replication", enable=True, primary=True)
        self.disk = self.primary.connect("disk0")

    def start(self) -> None:
        """Begin replication on the secondary."""
        self.secondary.execute("xen-set-replication", enable=True, primary=False)

    def error_of(self, server: Server) -> dict[str, Any]:
        """What a server has latched, once it has; get-error agrees."""
        error: dict[str, Any] = wait_until(lambda: server.status()["error"], f"{server.name} learns of it")
        assert server.execute("query-xen-replication-status") == {"error": True, "desc": IO_ERROR}
        return error

    def bring_to(self, stage: str) -> None:
        """The secondary alone, in a stage, with OVERWRITTEN and OWN as they say."""
        if stage == "none":
            return
        self.start()
        self.target.pwrite(NEW, OVERWRITTEN)
        self.guest.pwrite(MINE, OWN)
        if stage == "failover":
            self.points.arm("commit.written")
            self.secondary.execute("xen-set-replication", FAILOVER)
            self.points.wait_hit("commit.written")
        elif stage == "failover-failed":
            self.endpoint.fail()
            self.secondary.execute("xen-set-replication", FAILOVER)
            self.secondary.wait_stage("failover-failed")
            wait_until(lambda: self.secondary.status()["error"], "the failed commit is latched")
            self.endpoint.work()
        elif stage == "done":
            self.secondary.execute("xen-set-replication", FAILOVER)
            self.secondary.wait_stage("done")


ENDPOINT_ROWS = [
    ("none", "pwrite", "ENOSPC", "target", "write"),
    ("none", "pread", "EIO", "target", "read"),
    ("none", "zero", "EIO", "target", "zero"),
    ("running", "zero", "EIO", "target", "zero"),
    ("running", "zero", "ENOSPC", "target", "trim"),
    ("running", "pread", "EIO", "target", "trim"),
    ("running", "pread", "EIO", "guest", "read"),
    ("failover", "pwrite", "ENOSPC", "guest", "write"),
    ("failover", "zero", "EIO", "guest", "zero"),
    ("failover", "pread", "EIO", "guest", "read"),
    ("failover-failed", "pwrite", "ENOSPC", "guest", "write"),
    ("failover-failed", "zero", "EIO", "guest", "trim"),
    ("failover-failed", "pread", "EIO", "guest", "read"),
    ("done", "pwrite", "ENOSPC", "guest", "write"),
    ("done", "zero", "EIO", "guest", "zero"),
    ("done", "pread", "EIO", "guest", "read"),
]


@pytest.mark.parametrize(("stage", "fails", "name", "side", "does"), ENDPOINT_ROWS)
def test_a_secondary_disk_behind_nbd_that_fails_is_told_with_its_own_errno_in_every_stage(
    lab: Lab, stage: str, fails: str, name: str, side: str, does: str
) -> None:
    # Before stage failover-failed there is a commit that writes cannot serve.
    ends = Ends(lab, {"pwrite": "EIO", fails: name} if stage == "failover-failed" else {fails: name}, alone=True)
    ends.bring_to(stage)
    face = ends.target if side == "target" else ends.guest
    before = b"" if stage == "none" else whole(ends.guest)
    error = ends.secondary.status()["error"]
    number = getattr(errno, name)
    ends.endpoint.fail()

    def send() -> None:
        if does == "write":
            face.pwrite(DATA, FREE)
        elif does == "read":
            face.pread(LENGTH, FREE)
        elif does == "zero":
            face.zero(LENGTH, FREE)
        else:
            face.trim(LENGTH, FREE)

    sheltered = stage == "failover" and does != "read"
    if sheltered:
        send()
    else:
        with nbd_refusal(number):
            send()
    if stage == "running" and side == "target":
        latched = ends.error_of(ends.secondary)
        operation = "read" if fails == "pread" else "zero"
        assert (latched["case"], latched["operation"], latched["errno"]) == (4, operation, name)
    else:
        assert ends.secondary.status()["error"] == error
    ends.endpoint.work()
    assert ends.secondary.status()["stage"] == stage
    expected = before
    if sheltered:
        expected = changed(before, (FREE, DATA if does == "write" else bytes(LENGTH)))
    assert stage == "none" or whole(ends.guest) == expected
    if stage == "none":
        send()  # with the same connection
        assert ends.below.read_bytes() == changed(
            OLD, *([(FREE, DATA)] if does == "write" else []), *([(FREE, bytes(LENGTH))] if does == "zero" else [])
        )
        return
    ends.guest.pwrite(MORE, LATER)
    expected = changed(expected, (LATER, MORE))
    if stage == "running":
        ends.secondary.execute("xen-set-replication", FAILOVER)
    elif stage == "failover":
        ends.points.release("commit.written")
    elif stage == "failover-failed":
        ends.secondary.execute("replication-retry")
    status = ends.secondary.wait_stage("done")
    wait_until(lambda: ends.secondary.status()["error"] is None, "no error is left")
    assert status["stage"] == "done"
    assert whole(ends.guest) == ends.below.read_bytes() == expected


@pytest.mark.parametrize(
    ("protocol", "disk", "fails", "name", "does", "operations"),
    [
        ("sync", True, "pwrite", "EIO", "write", ("write", "write")),
        ("sync", True, "pwrite", "ENOSPC", "write", ("write", "write")),
        ("async", True, "pread", "EIO", "write", ("write", "read")),
        ("sync", True, "pread", "EIO", "zero", ("zero", "read")),
        ("async", True, "zero", "EIO", "zero", ("zero", "zero")),
        ("sync", True, "zero", "ENOSPC", "trim", ("zero", "zero")),
        ("async", False, "pwrite", "ENOSPC", "write", ("write", "write")),
        ("sync", False, "zero", "EIO", "trim", ("zero", "zero")),
    ],
)
def test_a_forwarded_request_that_the_secondary_disk_refuses_is_never_the_guests_trouble(
    lab: Lab, protocol: str, disk: bool, fails: str, name: str, does: str, operations: tuple[str, str]
) -> None:
    ends = Ends(lab, {fails: name}, protocol=protocol, disk=disk)
    ends.disk.pwrite(NEW, OVERWRITTEN)
    ends.primary.execute("replication-checkpoint")
    checkpoint = changed(OLD, (OVERWRITTEN, NEW))
    with ends.primary.qmp() as at_primary, ends.secondary.qmp() as at_secondary:
        ends.endpoint.fail()
        if does == "write":
            ends.disk.pwrite(DATA, FREE)
        elif does == "zero":
            ends.disk.zero(LENGTH, FREE)
        else:
            ends.disk.trim(LENGTH, FREE)
        ends.disk.flush()
        for server, qmp, case, operation in (
            (ends.primary, at_primary, 2, operations[0]),
            (ends.secondary, at_secondary, 4, operations[1]),
        ):
            error = ends.error_of(server)
            assert (error["case"], error["operation"], error["errno"]) == (case, operation, name)
            assert (error["disk"], error["offset"], error["length"]) == ("disk0", FREE, LENGTH)
            event = qmp.wait_event("REPLICATION_ERROR")["data"]
            assert (event["case"], event["disk"]) == (case, "disk0")
            assert server.status()["stage"] == "running"
        assert ends.primary.status()["disks"][0]["out-of-sync-bytes"] == GRAIN
        ends.endpoint.work()
        # The next ones arrive, and the guest of the secondary sees none of it.
        ends.disk.pwrite(MORE, LATER)
        wait_until(lambda: ends.below.read_bytes()[LATER:][:BLOCK] == MORE, "a later write arrives")
        assert whole(ends.guest) == checkpoint
        # Within a second the primary may also learn that its secondary takes no checkpoint for that: case 6.
        for qmp, cases in ((at_primary, {2, 6}), (at_secondary, {4})):
            qmp.execute("query-version")  # what was emitted before this answer has arrived before it
            told = [event["data"] for event in qmp.events if event["event"] == "REPLICATION_ERROR"]
            assert {data["case"] for data in told} <= cases
    content = changed(OLD, (OVERWRITTEN, NEW), (FREE, DATA if does == "write" else bytes(LENGTH)), (LATER, MORE))
    if disk:
        assert whole(ends.disk) == (lab.folder / "primary.raw").read_bytes() == content
    ends.guest.pwrite(MINE, OWN)
    ends.secondary.execute("xen-set-replication", FAILOVER)
    ends.secondary.wait_stage("done")
    assert ends.below.read_bytes() == changed(checkpoint, (OWN, MINE))


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_flush_that_the_secondary_disk_fails_fails_the_checkpoint_and_not_the_guest(lab: Lab, protocol: str) -> None:
    ends = Ends(lab, {}, protocol=protocol, secondary_arguments=["durability=power"])
    ends.disk.pwrite(DATA, FREE)
    wait_until(lambda: ends.below.read_bytes()[FREE:][:LENGTH] == DATA, "the write has arrived")
    ends.endpoint.kill()
    if protocol == "sync":
        ends.disk.flush()  # waits for the secondary's, and does not fail with it
    epoch = ends.secondary.status()["epoch"]
    with pytest.raises(QmpError, match=r"^The secondary has not taken the checkpoint: "):
        ends.primary.execute("replication-checkpoint")
    assert ends.secondary.status()["epoch"] == epoch
    ends.disk.flush()
    if protocol == "sync":
        error = ends.error_of(ends.primary)
        assert (error["case"], error["operation"]) == (2, "flush")
    error = ends.error_of(ends.secondary)
    assert (error["case"], error["operation"]) == (4, "flush")
    assert [server.status()["stage"] for server in (ends.primary, ends.secondary)] == ["running"] * 2
    # What the disk's server has lost is missing, and cannot be sent yet.
    wait_until(lambda: ends.primary.status()["link"]["state"] == "synchronizing", "the primary knows it")
    assert whole(ends.disk) == changed(OLD, (FREE, DATA))
    ends.endpoint.start()
    wait_until(lambda: ends.primary.status()["link"]["state"] == "in-sync", "it has been sent again")
    ends.primary.execute("replication-checkpoint")
    assert ends.secondary.status()["epoch"] > epoch
    assert whole(ends.guest) == whole(ends.disk) == ends.below.read_bytes()
    assert [server.status()["error"] for server in (ends.primary, ends.secondary)] == [None] * 2


# -- overlays on a full file system ----------------------------------------------------------------------------------


@pytest.fixture
def small(small_folder: Callable[[int], SmallFolder]) -> SmallFolder:
    """A file system of 4 MiB."""
    return small_folder(4 * MIB)


def write_everywhere(guest: nbd.NBD) -> list[tuple[int, bytes]]:
    """Guest writes over what active holds, what hidden holds and what the disk holds, whole blocks and parts."""
    writes = [(OWN, DATA), (OWN + GRAIN // 2, MORE), (OVERWRITTEN, DATA), (OVERWRITTEN + LENGTH - 100, MORE)]
    writes += [(FREE, DATA), (FREE + 5 * BLOCK + 7, MORE)]
    for offset, data in writes:
        guest.pwrite(data, offset)
    return writes


def test_a_full_active_disk_does_not_fail_the_guest_while_a_commit_is_under_way(lab: Lab, small: SmallFolder) -> None:
    points = lab.pause_points()
    server = lab.secondary((SIZE,), contents=(OLD,), overlays=small.folder, extra_environment=points.environment)
    server.start_replication()
    target, guest = server.connect("disk0"), server.connect("top0")
    target.pwrite(NEW, OVERWRITTEN)
    guest.pwrite(MINE, OWN)
    points.arm("failover.entered")
    with ThreadPoolExecutor(1) as pool:
        failover = pool.submit(server.execute, "xen-set-replication", FAILOVER)
        try:
            points.wait_hit("failover.entered")
            small.fill()
            expected = changed(OLD, (OWN, MINE), *write_everywhere(guest))
            assert whole(guest) == expected
            with nbd_refusal(errno.ESHUTDOWN):
                target.pwrite(NEW, FREE)
        finally:
            points.disarm("failover.entered")
        failover.result(DEADLINE_S)
    server.wait_stage("done")
    assert whole(guest) == server.disks[0].read_bytes() == expected
    assert server.execute("query-xen-replication-status") == {"error": False}


def test_a_full_active_disk_does_not_fail_the_guest_after_a_failed_commit(lab: Lab, small: SmallFolder) -> None:
    below = make_raw(lab.folder / "behind.raw", SIZE, OLD)
    endpoint = lab.endpoint(path=below, name="behind", error={"pwrite": "EIO"})
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk=disk0:{endpoint.uri()}", "top-id=top0"]
    arguments += [f"{kind}={small.folder / f'{kind}.qcow2'}" for kind in ("active", "hidden")]
    server = lab.start(Server(lab.folder, "secondary", arguments))
    server.execute("xen-set-replication", enable=True, primary=False)
    target, guest = server.connect("disk0"), server.connect("top0")
    target.pwrite(NEW, OVERWRITTEN)
    guest.pwrite(MINE, OWN)
    endpoint.fail()
    server.execute("xen-set-replication", FAILOVER)
    server.wait_stage("failover-failed")
    small.fill()
    guest.pwrite(MORE, OWN)  # has its place in active
    with nbd_refusal(errno.EIO):
        guest.pwrite(MORE, OVERWRITTEN)  # neither active nor the disk takes it
    endpoint.work()
    expected = changed(OLD, (OWN, MINE), (OWN, MORE))
    assert whole(guest) == expected
    expected = changed(expected, *write_everywhere(guest))
    assert whole(guest) == expected
    server.execute("replication-retry")
    server.wait_stage("done")
    assert whole(guest) == below.read_bytes() == expected


@pytest.mark.parametrize("disk", [True, False], ids=["with-disk", "only-forwarding"])
def test_a_full_hidden_disk_is_never_the_trouble_of_a_guest_that_waits_for_both_disks(
    lab: Lab, small: SmallFolder, disk: bool
) -> None:
    below = make_raw(lab.folder / "secondary.raw", SIZE, OLD)
    arguments = ["mode=secondary", f"state={lab.folder / 's'}", f"disk=disk0:{below}", "top-id=top0"]
    secondary = lab.start(Server(lab.folder, "secondary", [*arguments, f"hidden={small.folder / 'hidden.qcow2'}"]))
    arguments = ["mode=primary", f"state={lab.folder / 'p'}", "protocol=sync", f"secondary={secondary.uri('disk0')}"]
    if disk:
        arguments += [f"disk=disk0:{make_raw(lab.folder / 'primary.raw', SIZE, OLD)}"]
    primary = lab.start(Server(lab.folder, "primary", arguments))
    secondary.execute("xen-set-replication", enable=True, primary=False)
    primary.execute("xen-set-replication", enable=True, primary=True)
    face, guest = primary.connect("disk0"), secondary.connect("top0")
    guest.pwrite(MINE, OWN)
    small.fill()
    face.pwrite(DATA, FREE)
    face.flush()
    for server, case in ((primary, 2), (secondary, 3)):
        error = server.status()["error"]
        assert (error["case"], error["operation"], error["errno"]) == (case, "write", "ENOSPC")
        assert server.status()["stage"] == "running"
    assert below.read_bytes() == OLD
    assert whole(guest) == changed(OLD, (OWN, MINE))
    with pytest.raises(QmpError) as refusal:
        secondary.execute("xen-colo-do-checkpoint")
    assert refusal.value.desc == CANCELLED
    # The guest's own writes have room elsewhere, and failover needs none.
    guest.pwrite(DATA, LATER)
    secondary.execute("xen-set-replication", FAILOVER)
    secondary.wait_stage("done")
    assert whole(guest) == below.read_bytes() == changed(OLD, (OWN, MINE), (LATER, DATA))
