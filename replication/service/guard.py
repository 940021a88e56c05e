# SPDX-License-Identifier: BSD-3-Clause
"""Asks the handlers for before-resync-target whether a primary may begin to overwrite this node's disks.

Unlike the other handlers these are run by the node itself: replication-monitor sees what has happened, and this has to
be asked before. Nothing has changed here by then, and the node holds no lock while a command is at work: a failover, a
checkpoint and the guest go on. What answers late is taken for a refusal, well before the primary stops to wait.

Invariants: one question at a time; none takes longer than ASKED_MAX_S, however many commands there are; of what a
command prints the last TAIL_BYTES are kept.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from replication.errors import CommandError
from replication.log import log, printable
from replication.service.handlers import ASKED, ASKED_MAX_S, Handler, read_handlers

TAIL_BYTES = 4096
_LINE_MAX = 200
_TURN_S = 0.1


class Guard:
    """The handlers of one node that are asked before a resync."""

    def __init__(self, handlers: Sequence[Handler], environment: Mapping[str, str]) -> None:
        """`environment`: what each command finds beside what it is asked about, by names without the prefix."""
        self._handlers = handlers
        self._environment = environment
        # Held while a command is at work, and never waited for. Protects the next one: the refusal that the log has.
        self._asking = threading.Lock()
        self._told = ""

    @classmethod
    def of(cls, tables: Sequence[Mapping[str, Any]], environment: Mapping[str, str]) -> Guard:
        """Of the tables [[handler]] of a file; ConfigError."""
        return cls(read_handlers([table for table in tables if table.get("event") == ASKED]), environment)

    def ask(self, values: Mapping[str, str]) -> None:
        """Returns when all of them agree (exit code 0). CommandError says which does not, and what it has printed last,
        or that one is being asked still."""
        if not self._handlers:
            return
        if not self._asking.acquire(blocking=False):
            raise CommandError(f"{ASKED}: the handler is at work still")
        try:
            deadline = time.monotonic() + ASKED_MAX_S
            found = {**self._environment, "event": ASKED, **values}
            environment = {f"NBDKIT_REPLICATION_{key.upper()}": value for key, value in found.items()}
            for handler in self._handlers:
                try:
                    self._run(handler, environment, min(deadline, time.monotonic() + handler.timeout_s))
                except CommandError as refusal:
                    if str(refusal) != self._told:  # the primary tries again and again
                        log(str(refusal))
                    self._told = str(refusal)
                    raise
            self._told = ""
        finally:
            self._asking.release()

    @staticmethod
    def _run(handler: Handler, environment: Mapping[str, str], deadline: float) -> None:
        named = f"{ASKED}: the handler {handler.command[0]}"
        try:
            process = handler.start(environment)
        except OSError as error:
            raise CommandError(f"{named} cannot be run, so the resync is not begun: {error.strerror}") from error
        assert process.stdout is not None
        with process.stdout:
            tail = _until_ended(process, process.stdout.fileno(), deadline)
        said = _last_line(tail)
        if tail is None:
            raise CommandError(f"{named} has not answered in time, so the resync is not begun")
        if process.returncode:
            why = f": {said}" if said else ""
            raise CommandError(f"{named} refuses the resync with exit code {process.returncode}{why}")


def _until_ended(process: subprocess.Popen[bytes], fd: int, deadline: float) -> bytes | None:
    """The last it has printed, when it has ended; None when it had to be ended at the deadline. What it has started may
    keep its output open: that is not waited for."""
    tail, over = b"", False

    def take() -> None:
        nonlocal tail, over
        data = os.read(fd, 1 << 16)
        over = not data
        tail = (tail + data)[-TAIL_BYTES:]

    ready = select.poll()  # not select(), which takes no descriptor above 1023: of a node with many clients
    ready.register(fd, select.POLLIN)
    while process.poll() is None:
        if time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        if over:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TURN_S)
        elif ready.poll(_TURN_S * 1000):
            take()
    while not over and ready.poll(0) and time.monotonic() < deadline:
        take()
    return tail


def _last_line(tail: bytes | None) -> str:
    lines = (tail or b"").decode(errors="replace").split("\n")
    return next((printable(line.strip())[:_LINE_MAX] for line in reversed(lines) if line.strip()), "")
