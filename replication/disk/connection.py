# SPDX-License-Identifier: BSD-3-Clause
"""One libnbd handle on which many requests run side by side, each with a deadline.

Invariants
* A request's buffer is not touched after `Request.done`: a connection that fails is shut down at its socket and
  driven until libnbd has given every request back, so nobody ever returns while libnbd still owns a buffer.
* No thread of its own: a thread that waits for its request drives the handle for all (the leader) while the others
  sleep; when the leader's own request is done it wakes one of the others to lead. At queue depth 1 a request
  therefore costs no hand-over between threads.
* Waiting ends (`check_progress`): a silent server is given up after `timeout_s`, a slow link that moves bytes is not.

libnbd facts relied on (1.14): the asynchronous calls only take the handle's lock for a moment;
completion callbacks run inside `aio_notify_*` or the issuing call; a handle whose socket is shut down fails all
requests in flight with their callbacks; a lost handle cannot reconnect; TCP_NODELAY is set. Over TLS, what GnuTLS has
decrypted is used up before a call returns, so poll(2) on the socket tells all; but see `_read_on`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import nbd

from replication.addresses import HEAD_START_S, Rivals, take_place
from replication.disk.direct import DirectCalls
from replication.disk.fence import Fence
from replication.errors import ConfigError, DiskError
from replication.order.worker import NO_THREAD
from replication.silence import silent_s
from replication.tls import Tls, explain
from replication.uri import host_of

CHUNK = 32 << 20
"""Most bytes that one NBD request may carry everywhere (NBD specification, default maximum payload)."""

_DRAIN_MAX = 256

_FITS_SOCKET = 8 << 10
"""A request that carries no more than this is taken to fit into the socket's buffer (208 KiB by default), which saves
two libnbd calls, and so two fights for the GIL, for each small request. Should it ever not fit, it goes on when the
next answer comes or a wait ends."""

_SEND_BUFFER = 2 << 20
_SO_SNDBUFFORCE = 32
"""Bytes that a Unix socket takes from us before they are read there, if we may ask for so many. A request that does not
fit is sent in pieces, and each costs a turn of `drive`: 256k writes of a primary 3.0k a second with the default of 208
KiB and 4.0k so. Over TCP the kernel finds the size by itself."""

_LOOKS = 16
"""How often in `timeout_s` the progress is looked at while requests are in flight."""

_HEADER = 28
"""Bytes of an NBD request without its payload."""

_TCP_INFO_BYTES = struct.Struct("=QQ")
_TCP_INFO_AT = 120
"""Where tcpi_bytes_acked and tcpi_bytes_received are in struct tcp_info (linux/tcp.h, since Linux 4.2)."""

Completion = Callable[[Any], int]
Issue = Callable[[nbd.NBD, Completion], object]


class Request:
    """One request in flight."""

    __slots__ = ("_wake", "change", "done", "errno", "length", "moved_before", "on_done", "since", "to_move")

    def __init__(self, length: int, on_done: Callable[[Request], None] | None = None) -> None:
        """`length` is the number of bytes that the request and its answer carry."""
        self.done = False
        self.errno = 0
        self.change: tuple[int, int] | None = None
        """Offset and length of what it changes, for a connection that is `fenced`."""
        self.since = time.monotonic()
        """Since when only the server keeps it waiting: when it was issued, or last seen to be moving."""
        self.length = length + _HEADER
        self.to_move = 0
        """Bytes that have to move until this request has: its own and those in flight before it."""
        self.moved_before = 0
        self.on_done = on_done
        # A lock as a binary semaphore: held until there is something to wake up for.
        self._wake = threading.Lock()
        self._wake.acquire()

    def wake(self) -> None:
        """Let the thread in `sleep` go on, or the next one that comes there."""
        # Two wakers may race for the release; the loser finds the sleeper already awake, which is all it wants.
        with contextlib.suppress(RuntimeError):
            self._wake.release()

    def sleep(self, timeout_s: float) -> None:
        """Until somebody calls `wake`."""
        self._wake.acquire(timeout=timeout_s)

    def finish(self, number: int) -> None:
        """The request has ended with an errno, 0 for success."""
        self.errno = number
        self.done = True
        self.wake()
        if self.on_done is not None:
            self.on_done(self)


class ExportRefused(DiskError):
    """The server was reached and does not serve the export; `errno` is ENOENT when it says that there is none."""


class Connection:
    """A connected handle. Errors are DiskError and name the URI."""

    def __init__(self, uri: str, export: str | None, timeout_s: float, tls: Tls | None = None) -> None:
        """Connect within `timeout_s` seconds; `export` replaces the URI's export name unless None, and `tls` is for an
        nbds: URI that says nothing of it itself."""
        self.uri = uri
        self.fenced = False
        """Whether what is in flight when the connection is given up has to be waited for (fence.py)."""
        self.fence: Fence | None = None
        """That, once it was given up so."""
        self._timeout_s = timeout_s
        # Protects `_cause`, `_socket` and the wake-up descriptor against `close`. Never held across I/O.
        self._lock = threading.Lock()
        self._pending: dict[int, Request] = {}
        # Writes of `write_alone` and their data, by libnbd's cookie; only the one thread touches it.
        self._written_alone: dict[int, tuple[Request, bytes | memoryview]] = {}
        self._cause: str | None = None
        self._leader = threading.Lock()
        self._completed = 0
        # Bytes of requests issued and ended; the difference is in flight. `_lock` protects the first, libnbd's own lock
        # the second.
        self._issued_bytes = self._ended_bytes = 0
        # What `_bytes_moved` said at the last look.
        self._moved = 0
        self._suspect = False
        # Whether libnbd may hold bytes that did not fit into the socket.
        self._unsent = False
        self._polled = 0
        self._check_at = 0.0
        self._progress = time.monotonic()
        self._wakefd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._close_wakefd = weakref.finalize(self, os.close, self._wakefd)
        self._poll = select.poll()
        self._poll.register(self._wakefd, select.POLLIN)
        self._napping = select.poll()
        self._napping.register(self._wakefd, select.POLLIN)
        self._socket: socket.socket | None = None
        self._fd = -1
        self.handle = nbd.NBD()
        self._tls: Tls | None = None
        self._connecting: Future[None] = Future()
        try:
            self._tls = Tls.of(uri, tls)
            if self._tls is None:
                self._connect(export)
            else:
                self._connect_over_tls(export)
        except (ConfigError, RuntimeError) as error:  # RuntimeError: no more threads
            self.close()
            raise DiskError(f"cannot connect to {uri}: {error}") from error
        except BaseException:
            self.close()
            raise
        self._direct = DirectCalls(self.handle)
        self.size = int(self.handle.get_size())
        self.can_zero = bool(self.handle.can_zero())
        self.can_fua = bool(self.handle.can_fua())
        self.can_flush = bool(self.handle.can_flush())
        self.can_extents = bool(self.handle.can_meta_context("base:allocation"))
        self.read_only = bool(self.handle.is_read_only())
        self._structured = bool(self.handle.get_structured_replies_negotiated())
        self.description = self._description()
        """What the server says of the export, empty if nothing."""
        self.block_size = max(1, int(self.handle.get_block_size(nbd.SIZE_MINIMUM)))

    def _description(self) -> str:
        try:
            return str(self.handle.get_export_description())
        except nbd.Error:
            return ""  # ENOTSUP: the server has not said any

    def _connect_over_tls(self, export: str | None) -> None:
        """Connect in a thread that can be left behind: libnbd lets GnuTLS wait inside a call for a server that falls
        silent in mid-handshake, for up to 40 s, and holds the handle meanwhile."""

        def connect() -> None:
            try:
                self._connect(export)
            except (ConfigError, DiskError, OSError) as error:
                self._connecting.set_exception(error)
            except Exception as defect:  # noqa: BLE001 (who waits is to learn of it)
                self._connecting.set_exception(DiskError.from_defect(defect))
            else:
                self._connecting.set_result(None)

        try:
            threading.Thread(target=connect, name="tls-connect", daemon=True).start()
        except NO_THREAD as error:
            raise DiskError(f"cannot connect to {self.uri}: {error}", errno.ENOMEM) from error
        try:
            self._connecting.result(self._timeout_s * (1 + 2 / _LOOKS))
        except TimeoutError as error:
            raise DiskError(self._unanswered(), errno.ETIMEDOUT) from error

    def _unanswered(self) -> str:
        return f"cannot connect to {self.uri}: no answer within {self._timeout_s:g} s"

    def _connect(self, export: str | None) -> None:
        handle = self.handle
        deadline = time.monotonic() + self._timeout_s
        try:
            handle.set_uri_allow_local_file(True)
            handle.add_meta_context("base:allocation")
            handle.set_opt_mode(True)
            handle.set_full_info(True)
            if self._tls is not None:
                self._tls.put_on(handle)
            handle.aio_connect_uri(self.uri)
            self._reach(deadline)
            self._until(deadline, handle.aio_is_negotiating)
            if self._tls is not None:
                self._tls.check_verified(self.uri)
            if export is not None:
                handle.set_export_name(export)
            self._go(deadline)
        except nbd.Error as error:
            cause = error.string if self._tls is None else explain(self.uri, error.string, self._tls, deadline)
            raise DiskError(f"cannot connect to {self.uri}: {cause}", error.errnum or errno.EIO) from error
        self._fd = int(handle.aio_get_fd())
        self._socket = socket.socket(fileno=os.dup(self._fd))
        self._poll.register(self._fd, select.POLLIN)
        if self._socket.family == socket.AF_UNIX:
            self._enlarge_buffer(self._socket)
        self._set_socket_deadlines()
        self._moved = self._bytes_moved()

    @staticmethod
    def _enlarge_buffer(connected: socket.socket) -> None:
        try:
            connected.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        except PermissionError:  # then as many as everybody may have
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def _go(self, deadline: float) -> None:
        """Choose the export."""
        handle = self.handle
        failures: list[int] = []

        def gone(error: Any) -> int:
            failures.extend([error.value] if error.value else [])
            return 1

        handle.aio_opt_go(gone)
        self._until(deadline, lambda: handle.aio_is_ready() or bool(failures))
        if failures and failures[0] == errno.ENOTSUP and self._tls is None:
            # NBD_REP_ERR_TLS_REQD; no server answers so for another reason (NBD_REP_ERR_PLATFORM).
            raise DiskError(f"the server at {self.uri} requires TLS: use an nbds: URI")
        if failures:
            name = handle.get_export_name()
            text = f"the server at {self.uri} refuses the export '{name}': {os.strerror(failures[0])}"
            raise ExportRefused(text, failures[0])

    def _reach(self, deadline: float) -> None:
        """Drive the handle until it has a connection, where the server's name has several addresses perhaps one that
        libnbd would not come to in time (addresses.py). What goes wrong shows when it is driven further."""
        host = host_of(self.uri)
        if host is None:
            return
        handle = self.handle
        alone_until = time.monotonic() + HEAD_START_S
        rivals: Rivals | None = None
        try:
            while (left_s := deadline - time.monotonic()) > 0 and self._is_unconnected():
                poll = select.poll()
                poll.register(handle.aio_get_fd(), self._wanted())
                if rivals is None:
                    left_s = min(left_s, max(0.0, alone_until - time.monotonic()))
                else:
                    rivals.register(poll)
                ready = poll.poll(left_s * 1000)
                winner = None if rivals is None else rivals.winner()
                if winner is not None:
                    take_place(winner, handle.aio_get_fd())
                    return
                for descriptor, events in ready:
                    if descriptor == handle.aio_get_fd():
                        self._notify(events)
                if rivals is None and time.monotonic() >= alone_until:
                    rivals = Rivals(*host)
        finally:
            if rivals is not None:
                rivals.close()

    def _is_unconnected(self) -> bool:
        """Whether libnbd still waits for a connection."""
        handle = self.handle
        if not handle.aio_is_connecting():
            return False
        with socket.socket(fileno=os.dup(handle.aio_get_fd())) as found:
            try:
                found.getpeername()
            except OSError:
                return True
            return False

    def _until(self, deadline: float, ready: Callable[[], bool]) -> None:
        """Drive the handle while it connects."""
        handle = self.handle
        while not ready():
            if handle.aio_is_closed() and self._tls is not None:
                # Closed by libnbd: a connection that the server closes is dead.
                raise DiskError(f"the server at {self.uri} does not offer TLS: it has to be started with it")
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise DiskError(f"cannot connect to {self.uri}: the server closed the connection")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DiskError(self._unanswered(), errno.ETIMEDOUT)
            poll = select.poll()
            poll.register(handle.aio_get_fd(), self._wanted())
            for _, events in poll.poll(left_s * 1000):
                self._notify(events)

    def _wanted(self) -> int:
        direction = self.handle.aio_get_direction()
        wanted = 0
        if direction & nbd.AIO_DIRECTION_READ:
            wanted |= select.POLLIN
        if direction & nbd.AIO_DIRECTION_WRITE:
            wanted |= select.POLLOUT
        return wanted

    def _notify(self, events: int) -> None:
        """Tell libnbd what the socket is ready for; a hang-up shows itself when it reads."""
        direction = self.handle.aio_get_direction()
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_READ:
            self.handle.aio_notify_read()
        elif events & (select.POLLOUT | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_WRITE:
            self.handle.aio_notify_write()

    # -- deadlines -----------------------------------------------------------------------------------------

    @property
    def timeout_s(self) -> float:
        """Longest time without progress, in seconds; may be set at any time."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._timeout_s = seconds
        self._set_socket_deadlines()

    def wait_for_answers(self, seconds: float) -> None:
        """As `timeout_s`, but only for answers: the peer's kernel is asked for a sign of life as often as before, while
        nothing is to be acknowledged. Whether it owes that, `owing_s` says."""
        self._timeout_s = seconds

    @property
    def owing_s(self) -> float | None:
        """How long the peer's kernel, which has something to acknowledge, has said nothing, in seconds; None where it
        owes nothing, or that is not known (silence.py)."""
        with self._lock:
            return None if self._socket is None else silent_s(self._socket)

    def _set_socket_deadlines(self) -> None:
        """Let the kernel give up a TCP peer that owes nothing and is silent: it is asked for a sign of life from half
        the time on. The kernel's unit is 1 s.

        A peer that owes something is given up by `check_progress` alone. Linux's TCP_USER_TIMEOUT must not be set: it
        counts from the first probe of a shut window, and starts anew only when the window has taken a whole segment
        (64 KiB on many links). So it would end a link whose peer takes 4 KiB at a time, however steadily.
        """
        idle_s = max(1, int(self._timeout_s / 2))
        every_s = max(1, int(self._timeout_s / 6))
        with self._lock:
            found = self._socket
            if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
                return
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, int((self._timeout_s - idle_s) / every_s)))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _bytes_moved(self) -> int:
        """Bytes that the peer's kernel has acknowledged or that have come from it; always 0 where that is not known."""
        with self._lock:
            found = self._socket
            if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
                return 0
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_AT + _TCP_INFO_BYTES.size)
        if len(info) < _TCP_INFO_AT + _TCP_INFO_BYTES.size:
            return 0
        acked, received = _TCP_INFO_BYTES.unpack_from(info, _TCP_INFO_AT)
        return int(acked) + int(received)

    def hung_up(self) -> bool:
        """Whether the server has closed the connection, which an idle one does not notice. Then it is dead."""
        with self._lock:
            found = self._socket
            if found is None:
                return True
            poll = select.poll()
            poll.register(found.fileno(), select.POLLRDHUP)
            if not poll.poll(0):
                return False
        self.fail("the server closed it")
        return True

    # -- requests -----------------------------------------------------------------------------------------

    @property
    def dead(self) -> bool:
        """Whether the connection is of no more use."""
        return self._cause is not None

    @property
    def cause(self) -> str:
        """Why the connection is dead; empty while it is not."""
        return self._cause or ""

    @property
    def in_flight(self) -> int:
        """Requests issued and not done."""
        return len(self._pending) + len(self._written_alone)

    def issue(
        self,
        issue: Issue,
        payload: int,
        on_done: Callable[[Request], None] | None = None,
        answer: int = 0,
        change: tuple[int, int] | None = None,
    ) -> Request:
        """Send one request; `issue(handle, completion)` makes the libnbd call. `wait` or `drive` must follow.

        `payload` is the number of bytes that it carries, `answer` that of its answer. `on_done` is for an owner that
        drives the handle itself and never calls `wait`; it is called with libnbd's lock held, so it may only note.
        `change` is the offset and length of what the request changes, if it changes anything.
        """
        request = Request(payload + answer, on_done)
        request.change = change
        key = id(request)

        def completed(error: Any) -> int:
            if self._pending.pop(key, None) is not None:  # else given back already
                self._ended(request, error.value)
            return 1  # libnbd may forget the command

        with self._lock:
            if self._cause is not None:
                raise DiskError(self._cause)
            self._count(request)
            self._pending[key] = request
        try:
            issue(self.handle, completed)
            if payload > _FITS_SOCKET:
                self._unsent = True
                if on_done is None and self.handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                    self.poke()  # a leader that is asleep must now wait for room in the socket, too
        except nbd.Error as error:
            self._suspect = True
            self._look_if_suspect(error.string)
            if self._pending.pop(key, None) is not None:
                with self._lock:
                    self._issued_bytes -= request.length
                if self._cause is not None:
                    raise DiskError(self._cause) from error
                raise DiskError(f"{self.uri}: {error.string}", error.errnum or errno.EIO) from error
        else:
            # Sending may have found out that the server has gone; libnbd has ended the request then.
            self._look_if_suspect("the server closed it")
        return request

    def _count(self, request: Request) -> None:
        """Note what has to move until the request has."""
        self._issued_bytes += request.length
        request.to_move = self._issued_bytes - self._ended_bytes
        request.moved_before = self._moved

    def _ended(self, request: Request, number: int) -> None:
        """libnbd has ended a request. An errno is perhaps the server's answer, perhaps the end of the connection:
        whoever drives has to look."""
        self._suspect |= number != 0
        self._completed += 1
        self._ended_bytes += request.length
        self._progress = time.monotonic()
        request.finish(number)

    def _look_if_suspect(self, reason: str) -> None:
        """Mark a connection as lost when libnbd has given it up."""
        if self._suspect:
            self._suspect = False
            if self.handle.aio_is_dead() or self.handle.aio_is_closed():
                self.fail(f"lost the connection to {self.uri}: {reason}")

    def wait(self, request: Request) -> None:
        """Until the request is done; DiskError if it failed."""
        while not request.done:
            if self._leader.acquire(blocking=False):
                try:
                    self._lead(request)
                finally:
                    self._leader.release()
                    self._appoint()
            else:
                request.sleep(self._timeout_s)
        if request.errno:
            raise DiskError(self._cause or f"{self.uri}: {os.strerror(request.errno)}", request.errno)

    def _lead(self, request: Request) -> None:
        """Drive for all until one's own request is done."""
        while not request.done:
            self.drive(self._timeout_s)
        if self._pending:
            # The others' answers tend to come together with one's own: one call for each here, instead of a change
            # of leader, a poll and a call.
            self.drain()

    def _appoint(self) -> None:
        """Wake one of the sleeping threads to lead. A thread that has issued but not yet slept finds its wake-up
        waiting, so none is lost."""
        for request in list(self._pending.values())[:1]:
            request.wake()

    def drive(self, wait_s: float) -> None:
        """Move bytes, or wait for them at most `wait_s` seconds. One thread at a time: `wait` sees to
        that, and an owner that never calls `wait` does it by itself."""
        self.check_progress()
        # Every libnbd call lets go of the GIL and has to win it back, so as few as possible are made here.
        wanted: int = select.POLLIN
        if self._unsent:
            wanted = self._wanted()
            self._unsent = bool(wanted & select.POLLOUT)
        if wanted != self._polled:
            self._polled = wanted
            self._poll.modify(self._fd, wanted)
        before = self._completed
        pace_s = self._timeout_s / (_LOOKS if self.in_flight else 4)
        ready = self._poll.poll(max(0.0, min(wait_s, pace_s)) * 1000)
        if not ready:
            self._unsent = True  # nothing came: look again whether something is left to send
        for fd, events in ready:
            if fd == self._wakefd:
                os.eventfd_read(self._wakefd)
                continue
            try:
                if events & ~select.POLLOUT and wanted & select.POLLIN:
                    self.handle.aio_notify_read()
                    self._read_on()
                else:
                    self.handle.aio_notify_write()
            except nbd.Error as error:
                self.fail(f"lost the connection to {self.uri}: {error.string}")
        if self._written_alone:
            self._collect()
        if self._completed == before:
            self._suspect = True
        self._look_if_suspect("the server closed it")
        if self._cause is not None and (self.handle.aio_is_dead() or self.handle.aio_is_closed()):
            self._give_back()

    def _give_back(self) -> None:
        """End what libnbd did not: a closed handle (unlike a dead one) does not call back."""
        for request in list(self._pending.values()):
            self._pending.pop(id(request), None)
            if not request.done:
                request.finish(errno.ENOTCONN)

    def check_progress(self) -> None:
        """Give the connection up when nothing moves any more; part of `drive`.

        The clock of a request starts when it is issued. Over TCP it starts anew whenever bytes are seen to have moved
        (acknowledged by the peer's kernel, or come from it) until as many have as the request needs: its own and
        those in flight before it, both ways. So no link is too slow for a large request, but what fills the buffers
        of a stopped server does not count for the requests that are there already. The connection is lost
        * when the oldest clock and the last answer are `timeout_s` old: a server that stops is given up between
          `timeout_s` and 9/8 of it after its last answer or after the last byte of the oldest request, or
        * when the oldest clock is four times as old, whatever else moves or is answered.
        What is in a Unix socket's buffers is not known: there, the clock is never started anew.
        """
        now = time.monotonic()
        if now < self._check_at or not self.in_flight:
            return
        self._check_at = now + self._timeout_s / _LOOKS
        alone = (request for request, _ in self._written_alone.values())
        in_flight = (*list(self._pending.values()), *alone)
        moved = self._bytes_moved()
        if moved > self._moved:
            for request in in_flight:
                if moved - request.moved_before < request.to_move:
                    request.since = now
        self._moved = moved
        since = min((request.since for request in in_flight), default=now)
        if now - max(self._progress, since) > self._timeout_s or now - since > 4 * self._timeout_s:
            self.fail(f"no progress on the connection to {self.uri} for {self._timeout_s:g} s")

    def _read_on(self) -> None:
        """Over TLS, after libnbd was told that there is something to read.

        A part of a TLS record, or a record of TLS's own, leaves libnbd 1.14 waiting for the next bytes (its state
        REPLY.START), and what is issued meanwhile unsent: for good, if the server has no answer to give. Told once
        more, it finds nothing and is ready again.
        """
        if self._tls is None or self.handle.aio_is_ready():
            return
        if self.handle.aio_get_direction() == nbd.AIO_DIRECTION_READ:
            self.handle.aio_notify_read()

    def drain(self) -> None:
        """Take the answers that are there, without waiting; for the one thread that drives."""
        try:
            # One libnbd call an answer: it moves one at a time, and every call costs a fight for the GIL.
            _repeat(lambda: self.handle.poll(0) == 1)
            self._read_on()
        except nbd.Error as error:
            self.fail(f"lost the connection to {self.uri}: {error.string}")
        self._look_if_suspect("the server closed it")

    def write_alone(
        self, data: bytes | memoryview, offset: int, flags: int, on_done: Callable[[Request], None]
    ) -> None:
        """Send a write, as `issue` does, from the one thread that uses this connection (direct.py). `data` is not
        changed, and when the write has succeeded no longer needed."""
        request = Request(len(data), on_done)
        request.change = (offset, len(data))
        if self._cause is not None:
            raise DiskError(self._cause)
        try:
            cookie = self._direct.pwrite(data, offset, flags)
        except OSError as error:
            self._suspect = True
            self._look_if_suspect(str(error.strerror))
            raise DiskError(self._cause or f"{self.uri}: {error.strerror}", error.errno or errno.EIO) from error
        self._count(request)
        self._written_alone[cookie] = request, data
        if len(data) > _FITS_SOCKET:
            self._unsent = True

    def drain_alone(self) -> None:
        """As `drain`, for the one thread that uses this connection."""
        try:
            _repeat(self._direct.poll)
            self._read_on()
        except (OSError, nbd.Error) as error:
            reason = error.string if isinstance(error, nbd.Error) else error.strerror
            self.fail(f"lost the connection to {self.uri}: {reason}")
        self._collect()
        self._look_if_suspect("the server closed it")

    def _collect(self) -> None:
        """End the writes of `write_alone` that libnbd has finished."""
        for cookie, number in self._direct.finished():
            request, _ = self._written_alone.pop(cookie)
            self._ended(request, number)

    def nap(self, wait_s: float) -> None:
        """Let others work for at most `wait_s` seconds, unless somebody calls `poke`."""
        if self._napping.poll(wait_s * 1000):
            os.eventfd_read(self._wakefd)

    def poke(self) -> None:
        """Wake the thread in `drive` or `nap`; no effect on a closed connection."""
        with self._lock:
            self._poke_locked()

    def _poke_locked(self) -> None:
        if self._close_wakefd.alive:
            os.eventfd_write(self._wakefd, 1)

    def fail(self, cause: str) -> None:
        """Give the connection up: every request in flight fails soon, later ones at once. First cause wins."""
        with self._lock:
            if self._cause is None:
                self._cause = cause
                if self.fenced and self._fence_locked():
                    self._poke_locked()
                    return
            if self._socket is not None and self.fence is None:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError as error:
                    if error.errno != errno.ENOTCONN:  # the other side was faster
                        raise
            self._poke_locked()

    def _fence_locked(self) -> bool:
        """Take the socket from libnbd, if changes are in flight, which then finds its own end closed and gives back
        what it has; whether that was so."""
        requests = [*self._pending.values(), *(request for request, _ in list(self._written_alone.values()))]
        changes = [request.change for request in requests if request.change is not None]
        if not changes or self._socket is None or self.handle.aio_is_dead() or self.handle.aio_is_closed():
            return False
        sent = not self.handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE
        aligned = self.handle.aio_is_ready()
        kept = self._socket.dup()
        closed, other = socket.socketpair()
        other.close()
        os.dup2(closed.fileno(), self._fd, inheritable=False)
        closed.close()
        readable = self._tls is None and sent and aligned and self._structured
        self.fence = Fence(self.uri, kept, changes, len(requests), readable)
        return True

    def close(self) -> None:
        """Disconnect, politely when nothing is in flight. The owner makes sure that no thread uses it any more."""
        if self._tls is not None and not self._connecting.done():
            self._connecting.add_done_callback(lambda _: self.close())  # by the thread that was left behind
            return
        with self._lock:
            polite = self._cause is None and not self.in_flight
            self._cause = self._cause or f"the connection to {self.uri} is closed"
            connected, self._socket = self._socket, None
            self._close_wakefd()
        if polite:
            with contextlib.suppress(nbd.Error):  # it is going away in any case
                self.handle.aio_disconnect()
        if connected is not None:
            connected.close()
        del self.handle  # libnbd closes a handle that nobody refers to


def _repeat(moved: Callable[[], bool]) -> None:
    """Until nothing was moved; bounded, so that a server that answers without end cannot keep the thread."""
    for _ in range(_DRAIN_MAX):
        if not moved():
            return
