# SPDX-License-Identifier: BSD-3-Clause
"""QMP over NBD: the export `.control`, over which a primary talks to its secondary.

Writing to the export is input, at whatever offset; reading from it is output. What is read is filled up with newlines,
which are white space to JSON, so all that was read is one QMP stream: greeting, answers, events.

Invariants
1. A write never waits. A read at offset 0 waits at most WAIT_S: it returns as soon as there is output, and newlines
   alone otherwise. A read at any other offset does not wait. So a client that reads at 0 in a loop gets each message at
   once, and a sign of life four times a second, also while a command is at work.
2. Newlines are only between messages, never inside one.
3. Each connection has a session of its own; its commands run one after the other, in a thread of its own that is there
   only while they come (IDLE_S).
4. Input that waits and output that nobody reads are bounded. Input beyond that is refused (ENOMEM) and may be sent
   again. An event that does not fit into the output, or an answer for which no room comes up within DRAIN_S, ends the
   session, as on the control socket: every later request gets ESHUTDOWN.

A client has one read in flight at a time (else it cannot know the order of what it gets), and puts a message into one
write or waits for each write before the next: nbdkit may swap requests that are in flight together.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import deque
from collections.abc import Callable

from replication.control import qmp
from replication.control.server import DRAIN_S, QUEUE_BYTES_MAX, QUEUE_MESSAGES_MAX
from replication.disk.face import Extent
from replication.errors import DiskError
from replication.events import Event, EventHub
from replication.log import log_defect
from replication.order.worker import NO_THREAD
from replication.primary.peer import CONTROL_DESCRIPTION, CONTROL_SIZE

WAIT_S = 0.25
"""How long a read at offset 0 waits for output."""

IDLE_S = 10.0
"""How long a session keeps its thread without a command. More than the pause between automatic checkpoints."""

INPUT_PIECES_MAX = 16
INPUT_BYTES_MAX = 2 * qmp.MESSAGE_BYTES_MAX


class ControlExport:
    """One client's connection to `.control`. Every method may be called by several threads; they raise DiskError."""

    size = CONTROL_SIZE
    description = CONTROL_DESCRIPTION

    def __init__(
        self,
        execute: qmp.Execute,
        hub: EventHub,
        closed: Callable[[], None],
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve `execute` and the events of `hub`. `closed()` is called once, by `close`; `heard()` at each request."""
        self._session = qmp.Session(execute)
        self._hub = hub
        self._closed = closed
        self._heard = heard
        # Protects everything below; never held while a command runs. Taken under the hub's lock, so the hub is never
        # called under it.
        self._changed = threading.Condition(threading.Lock())
        self._input: deque[bytes] = deque()
        self._input_bytes = 0
        self._output: deque[memoryview] = deque()
        self._output_bytes = 0
        self._working = False
        self._prodded = False
        self._ended: str | None = None
        self._closing = False
        self._put(self._session.greeting())

    # -- requests ------------------------------------------------------------------------------------------

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with output and newlines; at offset 0 waits for output at most WAIT_S."""
        self._heard()
        with self._changed:
            if offset == 0:
                self._changed.wait_for(lambda: self._output or self._prodded or self._ended is not None, WAIT_S)
            self._check_locked()
            self._prodded = False
            filled = 0
            while self._output and filled < len(buffer):
                message = self._output.popleft()
                part = message[: len(buffer) - filled]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                if len(part) < len(message):
                    self._output.appendleft(message[len(part) :])
            self._output_bytes -= filled
            self._changed.notify_all()
        buffer[filled:] = b"\n" * (len(buffer) - filled)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Take the next piece of input, all or nothing: ENOMEM when too much waits already.

        White space alone also ends the read that waits: for a client that wants to leave with no request in flight.
        """
        piece = bytes(data)
        self._heard()
        with self._changed:
            self._check_locked()
            self._prodded |= piece.isspace()
            self._changed.notify_all()
            self._take_locked(piece)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """EINVAL: there is nothing to zero or trim (after ENOTSUP nbdkit would write zeroes instead)."""
        raise DiskError("the control export takes no zeroes and no trim, only QMP", errno.EINVAL)

    def flush(self) -> None:
        """Nothing here is ever stable."""

    def extents(self, offset: int, length: int, one: bool = False) -> list[Extent]:
        """All is data."""
        return [Extent(offset, length, False, False)]

    def close(self) -> None:
        """End the session. A command that is at work goes on, its answer is dropped. Harmless when repeated."""
        with self._changed:
            closing, self._closing = self._closing, True
        if not closing:
            self._end("the control session is closed")
            self._hub.unsubscribe(self._on_event)
            self._closed()

    # -- input ---------------------------------------------------------------------------------------------

    def _take_locked(self, piece: bytes) -> None:
        # One piece always fits into an empty queue, whatever its size.
        if self._input and (len(self._input) >= INPUT_PIECES_MAX or self._input_bytes + len(piece) > INPUT_BYTES_MAX):
            raise DiskError(f"{len(self._input)} pieces of control input are waiting already", errno.ENOMEM)
        if not self._working:
            try:
                threading.Thread(target=self._work, name="control-inband", daemon=True).start()
            except NO_THREAD as error:
                raise DiskError(f"cannot serve a control client: {error}", errno.ENOMEM) from error
            self._working = True
        self._input.append(piece)
        self._input_bytes += len(piece)

    def _work(self) -> None:
        """Run the commands, until none has come for IDLE_S. After a defect nobody would answer: the session ends."""
        try:
            self._serve()
        except Exception as defect:  # noqa: BLE001 (see above)
            log_defect(defect)
            self._end("internal error, see the log")

    def _serve(self) -> None:
        subscribed = self._session.negotiated
        while (piece := self._next()) is not None:
            with contextlib.closing(self._session.feed(piece)) as answers:
                for answer in answers:
                    if not self._put(answer, DRAIN_S):
                        self._end("the control client does not read its answers")
                        return
                    # Only now, so that no event gets in front of the answer to qmp_capabilities.
                    if self._session.negotiated and not subscribed:
                        subscribed = True
                        self._subscribe()

    def _next(self) -> bytes | None:
        """The next piece of input; None, and the thread is no longer counted on, when it has to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._input or self._ended is not None, IDLE_S)
            if not self._input:
                self._working = False
                return None
            piece = self._input.popleft()
            self._input_bytes -= len(piece)
            return piece

    # -- output --------------------------------------------------------------------------------------------

    def _put(self, message: bytes, timeout_s: float = 0.0) -> bool:
        """Queue a message, waiting up to `timeout_s` for room; whether it was queued."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended is not None or self._fits_locked(message), timeout_s):
                return False
            if self._ended is not None:
                return False
            self._output.append(memoryview(message))
            self._output_bytes += len(message)
            self._changed.notify_all()
            return True

    def _fits_locked(self, message: bytes) -> bool:
        # One message always fits into an empty queue, whatever its size.
        return not self._output or (
            len(self._output) < QUEUE_MESSAGES_MAX and self._output_bytes + len(message) <= QUEUE_BYTES_MAX
        )

    def _subscribe(self) -> None:
        self._hub.subscribe(self._on_event)
        with self._changed:
            ended = self._ended is not None
        if ended:  # `close` may have been faster, and unsubscribed in vain
            self._hub.unsubscribe(self._on_event)

    def _on_event(self, event: Event) -> None:
        # Runs under the hub's lock, in whatever thread has emitted the event: must neither block nor raise.
        message = qmp.encode_event(event)
        if message is not None and not self._put(message):
            self._end("the control client does not read its events")

    # -- the end -------------------------------------------------------------------------------------------

    def _end(self, cause: str) -> None:
        """Take and give nothing more, for the first cause; what waits is dropped."""
        with self._changed:
            self._ended = self._ended or cause
            self._input.clear()
            self._output.clear()
            self._changed.notify_all()

    def _check_locked(self) -> None:
        if self._ended is not None:
            raise DiskError(self._ended, errno.ESHUTDOWN)
