# SPDX-License-Identifier: BSD-3-Clause
"""What a connection that was given up may still do to the disk, and when that is over.

A request that was not answered in time is not undone by giving it up: the server has it, or finds it in its socket, and
may write it to the disk an hour later, over what was written meanwhile over another connection. So a connection that is
given up with changes in flight is kept, by this object, until nothing can come of it any more:

    answered    every request that was in flight has been answered. The proof for every server
    ended       the server has closed the connection, which it was not asked to: its process has ended, or it has
                dropped this client

The connection is left open on this side, because a server that is told to go (qemu-nbd is one) closes it while its
requests are at work. Only where answers cannot be followed the sending side is shut down, and the server's end is
waited for: over TLS, when a request was sent in part, and after an answer that was read in part. nbdkit closes when its
requests are done.

No proof is ever had from a host that has vanished: after the kernel has given such a connection up, what it had in
flight stays in doubt for as long as this process lives.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Sequence

from replication.log import log
from replication.order.worker import NO_THREAD

_SIMPLE, _STRUCTURED = 0x67446698, 0x668E33EF
"""Magic numbers of the two kinds of answers (NBD specification)."""
_SIMPLE_REST = struct.Struct(">IQ")
_STRUCTURED_REST = struct.Struct(">HHQI")
_MAGIC = struct.Struct(">I")
_LAST_CHUNK = 1

_RECEIVE = 1 << 16
_PROBE_S, _PROBES = 10, 120
"""A server's host that was restarted says so when it is asked for a sign of life."""

_LOST = (ConnectionResetError, BrokenPipeError)


class Fence:
    """A connection that was given up with changes in flight; it owns the socket."""

    def __init__(
        self, name: str, connected: socket.socket, changes: Sequence[tuple[int, int]], in_flight: int, readable: bool
    ) -> None:
        """`changes` are the ranges (offset, length) of the changes among the `in_flight` requests; `readable`: the
        answers can be followed from the next byte on."""
        self.name = name
        self.changes = tuple(changes)
        self._socket = connected
        # Answers still to come. Only the thread's.
        self._unanswered = in_flight
        self._readable = readable
        self._skip = 0
        self._begun = b""
        self._over = threading.Event()
        with contextlib.suppress(OSError):  # it may have ended already
            self._ask_for_life()
        # Protects the next one.
        self._starting = threading.Lock()
        self._started = False
        self._begin()

    def _begin(self) -> None:
        """Start the thread, unless there is one. Where there is none to be had it is tried again whenever somebody
        asks: until then the changes are in doubt."""
        with self._starting:
            if self._started:
                return
            try:
                threading.Thread(target=self._run, name="fence", daemon=True).start()
            except NO_THREAD as error:
                log(f"{self.name}: the connection that was given up cannot be watched yet: {error}")
            else:
                self._started = True

    @property
    def pending(self) -> bool:
        """Whether a change may still come."""
        if not self._started:
            self._begin()
        return not self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until none can come, `timeout_s` seconds at most; whether it is so."""
        if not self._started:
            self._begin()
        return self._over.wait(timeout_s)

    def covers(self, offset: int, length: int) -> bool:
        """Whether one of the changes in doubt overlaps the range."""
        return self.pending and any(at < offset + length and offset < at + count for at, count in self.changes)

    def _ask_for_life(self) -> None:
        self._socket.setblocking(True)
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _run(self) -> None:
        try:
            self._follow()
        except _LOST:
            pass  # closed at the other end
        except OSError as error:
            log(f"{self.name}: the connection that was given up has not ended where it can be seen: {error.strerror}")
            return
        finally:
            self._socket.close()
        self._over.set()

    def _follow(self) -> None:
        """Until all is answered, or the server has closed. OSError when there is no proof of either."""
        if not self._readable:
            self._shut()
        while self._unanswered > 0:
            data = self._receive()
            if not data:
                return
            if self._readable and not self._count(data):
                self._readable = False
                self._shut()

    def _receive(self) -> bytes:
        # Non-blocking for libnbd, whose file description it is.
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll()
        return self._socket.recv(_RECEIVE)

    def _shut(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def _count(self, data: bytes) -> bool:
        """Take answers off; False when it is none."""
        data = self._begun + data
        while data:
            if self._skip:
                skipped = min(self._skip, len(data))
                self._skip -= skipped
                data = data[skipped:]
                continue
            if len(data) < _MAGIC.size:
                break
            (magic,) = _MAGIC.unpack_from(data)
            kind = {_SIMPLE: _SIMPLE_REST, _STRUCTURED: _STRUCTURED_REST}.get(magic)
            if kind is None:
                return False
            if len(data) < _MAGIC.size + kind.size:
                break
            fields = kind.unpack_from(data, _MAGIC.size)
            data = data[_MAGIC.size + kind.size :]
            if magic == _STRUCTURED:
                self._skip = fields[3]
            self._unanswered -= magic == _SIMPLE or bool(fields[0] & _LAST_CHUNK)
        self._begun = data
        return True
