# SPDX-License-Identifier: BSD-3-Clause
"""The primary's client of a secondary's `.control` export: QMP over NBD (control/inband.py is the other end).

Invariants
* Nothing is written to an export that has not been recognised: a plain NBD server may serve its disk under any name.
* The secondary is read four times a second, so that a link that has gone, or a process that stands still, is noticed
  within the link's timeout (and not sooner than SILENCE_MIN_S) and a pause.
* A read waits at the server only while a call waits for its answer, so a call never has to wait behind an idle read:
  nbdkit with `-t 1` takes up a write only after the read before it (0.25 s a call). Events of an idle link therefore
  come up to PAUSE_S late.
* Whatever the server sends, the thread neither dies of it nor keeps more than a message of MESSAGE_BYTES_MAX: what is
  no QMP ends the link, with the cause.
* A link that is lost is lost for good: every call that waits, and every later one, fails with the cause.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from replication.disk import requests
from replication.disk.connection import Connection, ExportRefused, Request
from replication.errors import DiskError, ReplicationError
from replication.log import log_defect
from replication.options import CONTROL_EXPORT
from replication.order.worker import NO_THREAD
from replication.reason import Reason
from replication.record.boot import boot_clock_s

CONTROL_DESCRIPTION = "control: QMP for the primary"
CONTROL_SIZE = 1 << 20
"""What makes an export a control export. The size also bounds a message to the server, which goes into one write."""

MESSAGE_BYTES_MAX = 1 << 20
"""Of the server's."""

READ_BYTES = 16 << 10

AT_ONCE = 4 << 10
"""A read at this offset does not wait for output, one at 0 does."""

PAUSE_S = 0.25
"""Between the reads of an idle link."""

SILENCE_MIN_S = 1.0
"""Four signs of life: a shorter timeout would take an idle link for a lost one."""

CLOSE_S = 1.0
"""How long a server has for answering what is in flight, when the link is closed; a healthy one needs a millisecond."""

_END_S = 5.0
"""How long the thread may take to end after that; it then waits for nobody any more."""

_BLANK_MIN_S = 0.02
"""A server that says nothing faster than this is slowed down: reading in a tight loop would take a whole core."""

_DESC_MAX = 1000

OnEvent = Callable[[str, dict[str, Any]], None]
OnLost = Callable[[DiskError], None]


class PeerError(ReplicationError):
    """The secondary refused a command; the text is its own `desc`, the reason that of its code, if it is known."""

    def __init__(self, desc: str, reason: Reason | None = None, data: object = None) -> None:
        """`data`: what it said for programs, whatever that is."""
        super().__init__(desc)
        self.reason = reason
        self.data = data


class _Call:
    """A command that was sent."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.value: Any = None
        self.error: ReplicationError | None = None

    def end(self, value: Any, error: ReplicationError | None = None) -> None:
        """Let the caller go on with an answer or an error; the first one counts."""
        if not self.ended.is_set():
            self.value, self.error = value, error
            self.ended.set()


class Peer:
    """A link to a secondary's control export. `call` and `close` may be called from any thread.

    `event` and `lost` run in the link's own thread, so they must not wait for `call`, nor for a lock that is held by
    somebody who waits in `close` (which would then take all of CLOSE_S and _END_S).
    """

    def __init__(self, connection: Connection, event: OnEvent, lost: OnLost) -> None:
        """For `open`."""
        self.uri = connection.uri
        self.last_heard = time.monotonic()
        """When the server last answered a read, by time.monotonic()."""
        self.asked = boot_clock_s()
        """When that read was issued, by boot_clock_s."""
        self.heard: Callable[[float], None] = forgotten
        """Called with that moment, by the link's own thread, whenever the server has answered."""
        self._connection = connection
        self._event = event
        self._lost = lost
        # Protects everything below up to the thread's own. Requests are issued under it, which never waits for the
        # server, so that none is issued on a connection that the thread has closed. `event`, `lost`: never under it.
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._serial = 0
        self._writes: list[tuple[Request, _Call | None]] = []
        self._error: DiskError | None = None
        self._opened = False
        # Whether a read waits at the server.
        self._listening = False
        # There is a call, or it is time to end.
        self._roused = threading.Event()
        self._closing = threading.Event()
        # Of the thread alone.
        self._greeted = False
        self._begun = b""
        self._thread = threading.Thread(target=self._run, name="peer", daemon=True)

    @classmethod
    def open(
        cls, uri: str, timeout_s: float, connect: Callable[[str, str, float], Connection], event: OnEvent, lost: OnLost
    ) -> Peer | None:
        """Connect to the control export of the server at `uri`; None if the server has none.

        `connect(uri, export, timeout_s)` makes the connection. Connecting and greeting may take `timeout_s` each.
        Later, `event(name, data)` is called for every event (perhaps before this returns), and `lost(error)` once, when
        the link is lost, unless it was closed before. DiskError if the server cannot be reached or does not speak QMP.
        """
        try:
            connection = connect(uri, CONTROL_EXPORT, timeout_s)
        except ExportRefused as refusal:
            if refusal.errno != errno.ENOENT:  # it does not say that there is none: shutting down, wants TLS
                raise
            return None
        if connection.description != CONTROL_DESCRIPTION or connection.size != CONTROL_SIZE:
            connection.close()
            return None
        if connection.read_only:
            connection.close()
            raise DiskError(f"{connection.uri} is read-only: it is no secondary", errno.EPERM)
        connection.timeout_s = max(timeout_s, SILENCE_MIN_S)
        peer = cls(connection, event, lost)
        peer._start()
        try:
            peer.call("qmp_capabilities", {}, timeout_s)
            peer._confirm()
        except BaseException:
            peer.close()
            raise
        return peer

    def call(self, command: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        """Run a command on the secondary and return its answer.

        PeerError if the secondary refuses it. DiskError if the link is lost or closed, or if no answer has come within
        `timeout_s`: then the command may still be at work, or may never have arrived.
        """
        call = _Call()
        number = self._send(command, arguments, call)
        try:
            if not call.ended.wait(timeout_s):
                raise DiskError(f"{self.uri}: no answer to {command} within {timeout_s:g} s", errno.ETIMEDOUT)
        finally:
            with self._lock:
                self._calls.pop(number, None)
        if call.error is not None:
            raise call.error
        return call.value

    def cut(self, cause: str) -> None:
        """End the link without manners; calls that wait fail. Returns at once. `close` must follow."""
        self._connection.fail(cause)

    def close(self) -> None:
        """End the link, within CLOSE_S and a little; calls that wait fail. No callback runs after this has returned,
        but one that is running already (it may be the caller) is waited for only so long."""
        self._closing.set()
        self._roused.set()
        with self._lock:
            if self._error is None and self._listening:
                # Ends the read that is in flight, so that the connection can be left in good order.
                with contextlib.suppress(DiskError):  # it is lost, which the thread will find out
                    self._issue_locked(b"\n", None)
        if self._thread is threading.current_thread() or self._ended(CLOSE_S):
            return
        self._connection.fail(f"the control link to {self.uri} is closed")
        self._ended(_END_S)

    # -- sending -------------------------------------------------------------------------------------------

    def _send(self, command: str, arguments: Mapping[str, Any], call: _Call) -> int:
        with self._lock:
            self._serial += 1
            number = self._serial
            message = json.dumps({"execute": command, "arguments": dict(arguments), "id": number}).encode() + b"\n"
            if len(message) > CONTROL_SIZE:
                raise DiskError(f"{self.uri}: {command} is too long to be sent: {len(message)} bytes", errno.EINVAL)
            if self._error is not None:
                raise DiskError(str(self._error), self._error.errno)
            self._issue_locked(message, call)
            self._calls[number] = call
            self._roused.set()
        return number

    def _issue_locked(self, data: bytes, call: _Call | None) -> None:
        request = self._connection.issue(partial(requests.pwrite, data, 0, 0), len(data))
        self._writes.append((request, call))

    # -- the thread ----------------------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            self._thread.start()
        except NO_THREAD as error:
            self._connection.close()
            raise DiskError(f"no thread for the control link to {self.uri}: {error}", errno.ENOMEM) from error

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                if not self._read(self._has_calls()):
                    self._roused.wait(PAUSE_S)
            error = DiskError(f"the control link to {self.uri} is closed", errno.ESHUTDOWN)
        except DiskError as failure:
            error = failure
        except Exception as defect:  # noqa: BLE001
            # A defect of ours, most likely of the owner's `event`: the log gets the trace, the link ends.
            log_defect(defect)
            error = DiskError(f"{self.uri}: internal error, see the log: {type(defect).__name__}")
        self._wind_up(error)

    def _has_calls(self) -> bool:
        with self._lock:
            self._roused.clear()
            self._listening = any(not call.ended.is_set() for call in self._calls.values())
            return self._listening

    def _read(self, listening: bool) -> bool:
        """One read, and what it brought; False if it is time for a pause. DiskError when the link is of no more use."""
        begun, asked = time.monotonic(), boot_clock_s()
        buffer = bytearray(READ_BYTES)
        issue = partial(requests.pread, buffer, 0 if listening else AT_ONCE)
        self._connection.wait(self._connection.issue(issue, 0))
        self.last_heard, self.asked = time.monotonic(), asked
        self.heard(asked)
        self._look_at_writes()
        lines = [line for line in self._lines(bytes(buffer)) if line.strip()]
        for line in lines:
            self._take(line)
        if lines or self._begun:
            return True
        if listening and self.last_heard - begun < _BLANK_MIN_S:
            self._closing.wait(_BLANK_MIN_S)
        return listening

    def _look_at_writes(self) -> None:
        """Fail the calls that the server did not take."""
        with self._lock:
            done = [write for write in self._writes if write[0].done]
            self._writes = [write for write in self._writes if not write[0].done]
        for request, call in done:
            if request.errno and call is not None:
                call.end(None, DiskError(f"{self.uri}: the command was not taken: {os.strerror(request.errno)}"))

    def _lines(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes; the rest is kept for the next read."""
        content = data.rstrip(b"\n")  # mostly thousands of them
        *lines, self._begun = (self._begun + content).split(b"\n")
        if len(content) < len(data):
            lines.append(self._begun)
            self._begun = b""
        if len(self._begun) > MESSAGE_BYTES_MAX:
            raise self._nonsense(f"a message of more than {MESSAGE_BYTES_MAX} bytes")
        return lines

    def _take(self, line: bytes) -> None:
        """Hand a message on; DiskError if it is none."""
        message = self._parse(line)
        if not self._greeted:
            if not isinstance(message.get("QMP"), dict):
                raise self._nonsense("no greeting")
            self._greeted = True
        elif "event" in message:
            self._take_event(message)
        elif "return" in message or "error" in message:
            self._take_answer(message)
        else:
            raise self._nonsense("a message of unknown kind")

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line.decode())
            if b"\\u" in line:
                # Half a surrogate pair is a Python string that no log takes.
                json.dumps(message, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise self._nonsense(f"no JSON: {error}") from error
        if not isinstance(message, dict):
            raise self._nonsense("a message that is no object")
        return message

    def _take_event(self, message: dict[str, Any]) -> None:
        name, data = message["event"], message.get("data", {})
        if not isinstance(name, str) or not isinstance(data, dict):
            raise self._nonsense("an event of wrong types")
        if not self._closing.is_set():
            self._event(name, data)

    def _take_answer(self, message: dict[str, Any]) -> None:
        number, refusal = message.get("id"), None
        if "error" in message:
            error = message["error"]
            desc = error.get("desc") if isinstance(error, dict) else None
            if not isinstance(desc, str):
                raise self._nonsense("an error of wrong types")
            refusal = PeerError(_one_line(desc), _reason(error.get("code")), error.get("data"))
        if number is None and refusal is not None:
            raise self._nonsense(f"an error that answers no command: {refusal}")
        with self._lock:
            # In Python a bool is an int. A number without a call is of one that no longer waits.
            if type(number) is not int or not 0 < number <= self._serial:
                raise self._nonsense("an answer to a command that was not sent")
            call = self._calls.get(number)
        if call is not None:
            call.end(message.get("return"), refusal)

    def _nonsense(self, what: str) -> DiskError:
        return DiskError(f"the server at {self.uri} does not speak QMP on {CONTROL_EXPORT}: {_one_line(what)}")

    # -- the end -------------------------------------------------------------------------------------------

    def _confirm(self) -> None:
        """From now on `lost` is called; DiskError if the link is lost already."""
        with self._lock:
            if self._error is not None:
                raise DiskError(str(self._error), self._error.errno)
            self._opened = True

    def _wind_up(self, error: DiskError) -> None:
        """Fail all calls, take back what is in flight, and tell the owner unless it was the owner who closed."""
        with self._lock:
            self._error = error
            tell = self._opened and not self._closing.is_set()
            calls, writes = list(self._calls.values()), self._writes
        for call in calls:
            call.end(None, DiskError(str(error), error.errno))
        if not self._closing.is_set():
            self._connection.fail(str(error))
        for request, _ in writes:
            with contextlib.suppress(DiskError):  # its call has been told
                self._connection.wait(request)
        self._connection.close()
        if tell:
            self._lost(error)

    def _ended(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def forgotten(_asked: float) -> None:
    """Nobody wants to know."""


def _reason(code: object) -> Reason | None:
    """None for one of a later version, and where an older one gives none."""
    return next((reason for reason in Reason if reason.value == code), None)


def _one_line(text: str) -> str:
    """What a server sent, fit for a log."""
    return "".join(c if c.isprintable() else " " for c in text[:_DESC_MAX])
