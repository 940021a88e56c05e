# SPDX-License-Identifier: BSD-3-Clause
"""Ending the process although clients are connected.

nbdkit 1.32 ends on SIGTERM only when every client has gone (its connection threads sit in recv, seen with its own
memory plugin): a guest that stays attached, or a primary linked to this secondary, would hold it up for ever. So the
process hears the signal as well, and closes the receiving half of the clients' connections: requests in flight are
answered, then nbdkit's threads see the end of the stream and go.

What nbdkit has read and not begun with it answers with ESHUTDOWN from two moments on (its protocol.c): when it is told
to end, and when another thread of the connection has seen the end of the stream. That is an I/O error to a guest which
would have waited for a connection that is lost: QEMU's reconnect-delay. So

* the connections are closed while requests that begin are held at their first step (`holding`), and only when
  nbdkit's threads sleep: then each is held, or works for its request, or waits for the next one, and none has read one
  that it has not begun with;
* what clients have sent beyond that, which no thread has read, is taken away: they have lost their connection with it;
* nbdkit is told when they have gone. A client that comes meanwhile, such as that guest at once, waits in `open`
  (`admit`): nbdkit reads no request of it afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

from replication.log import LOG, debug, log, surviving
from replication.order.worker import NO_THREAD
from replication.server.asleep import fell_asleep
from replication.server.clients import sockets

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_AGAIN_S = 0.5

_LEAVING_S = 2.0
"""How long the clients may take to go before nbdkit is told to end. Those whose requests in flight take longer are
answered nevertheless, and nbdkit would wait for them as well: so this is no time lost of END_S. On a machine that does
other things (128 threads of eight clients at a load of 17) one second was not always enough for them to see the end of
the stream. What a primary cannot send in what is left is in its change map."""

_QUIET_S = 0.5
"""How long nbdkit's threads may take until they sleep. Where they do not (a disk that is so fast that nobody waits for
it, a machine that does other things), clients are sent away all the same, and a request may be refused."""

_DRAIN = 256 << 10
_DRAINS_MAX = 1024
"""Bytes of one step of taking away what was not read, and how many there may be: more than a socket holds."""

_LOOK_S = 0.01

_GRACE_S = 2.0
"""How long nbdkit may take to end by itself when it waits for threads that sleep for good (hangup.py)."""

END_S = 4.0
"""How long the process may take to end in good order: a queue is sent for 3 s of it (primary/side.py). Then it ends as
if killed, which costs no answered write: whoever is still waiting waits for a dead disk, peer or client (a client
that does not read its answers would hold nbdkit up for ever)."""


class Disconnector:
    """Hears the signals that end the process, and sends its NBD clients away."""

    def __init__(
        self,
        shutdown: Callable[[], None],
        control_path: str | None,
        unended: Callable[[], bool],
        cleanup: Callable[[], None],
        reload: Callable[[], None] | None = None,
        leaving: Callable[[], None] = lambda: None,
        holding: Callable[[float], AbstractContextManager[None]] = lambda wait_s: nullcontext(),
    ) -> None:
        """`shutdown` tells nbdkit to end; the clients of `control_path` are not NBD clients. `unended()` is asked
        while nbdkit is ending: True when no request is in flight and nbdkit would wait in vain; then the process is
        ended from here, after `cleanup`. With `reload()`, SIGHUP calls that, in a thread, and ends nothing. `leaving()`
        is called again and again while clients are being sent away: to have requests end that would wait on. While
        `holding(seconds)` is held, requests that begin wait; `seconds`: how long it may take to get it."""
        self._shutdown = shutdown
        self._control_path = control_path
        self._unended = unended
        self._cleanup = cleanup
        self._reload = reload
        self._leaving = leaving
        self._holding = holding
        self.ending = False
        """Whether the process has been told to end: a client that goes has not gone by itself."""
        # nbdkit reads no more requests.
        self._told = threading.Event()
        # Protects the number of clients that are served, and the moment from which on none is any more.
        self._lock = threading.Lock()
        self._served = 0
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def start(self) -> None:
        """Take the signals over; in the main thread, after nbdkit has set its own handlers and has forked."""
        os.set_blocking(self._read, True)
        for number in _SIGNALS:
            signal.signal(number, _ignore)
        # The main thread sits in nbdkit and never runs a Python handler, but this is written by the C handler.
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, name="disconnect", daemon=True).start()

    def end(self) -> None:
        """End the process in good order, as a signal would; for the control command `quit`."""
        os.write(self._write, b"\0")

    def admit(self) -> bool:
        """A client opens an export: whether it is to be served, until `left`. One that comes when the process is ending
        waits until nbdkit knows: it is served nothing then, and its connection is lost."""
        with self._lock:
            if not self.ending:
                self._served += 1
                return True
        self._told.wait(END_S)
        return False

    def left(self) -> None:
        """A client that was admitted has gone: nbdkit has no request of it any more."""
        with self._lock:
            self._served -= 1

    def cut(self) -> None:
        """Disconnect all clients at once: nothing that is in flight is answered any more."""
        with surviving():
            self._let_go_of_clients(socket.SHUT_RDWR)

    def _wait(self) -> None:
        while (signal_number := os.read(self._read, 1)[0]) == signal.SIGHUP and self._reload is not None:
            try:
                threading.Thread(target=self._reload, name="reload", daemon=True).start()
            except NO_THREAD as error:
                log(f"nothing is read anew: {error}")
        debug(f"ending, by signal {signal_number}" if signal_number else "ending, by command")
        with self._lock:
            self.ending = True
        try:
            threading.Thread(target=self._end_late, name="end-late", daemon=True).start()
        except NO_THREAD as error:
            log(f"nobody sees to it that the process ends within {END_S:g} s: {error}")
        with surviving():
            self._have_clients_leave()
        self._shutdown()
        self._told.set()
        # A client that nbdkit was just accepting is found the next time round.
        again = threading.Event()
        deadline = time.monotonic() + _GRACE_S
        while True:
            if time.monotonic() > deadline and self._unended():
                with surviving():
                    self._cleanup()
                LOG.flush()
                os._exit(0)
            with surviving():  # nobody else lets go of the clients
                self._let_go_of_clients()
            again.wait(_AGAIN_S)

    def _have_clients_leave(self) -> None:
        """Disconnect the clients and wait until all that are served have gone, up to _LEAVING_S seconds."""
        deadline = time.monotonic() + _LEAVING_S
        with self._holding(_QUIET_S):
            self._leaving()
            connections = list(self._clients())
            self._let_go_of(connections, drained=fell_asleep(_QUIET_S))
        while self._served and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            self._leaving()
            self._let_go_of_clients()

    def _let_go_of_clients(self, how: int = socket.SHUT_RD) -> None:
        self._let_go_of(self._clients(), how)

    @staticmethod
    def _let_go_of(connections: Iterable[socket.socket], how: int = socket.SHUT_RD, drained: bool = False) -> None:
        """`drained`: no thread of nbdkit is about to read, and what none has read is taken away."""
        for connection in connections:
            try:
                connection.shutdown(how)
                if drained:
                    _drain(connection)
            except OSError as error:
                log(f"a client had gone before it was disconnected: {error.strerror}")
            finally:
                connection.close()

    @staticmethod
    def _end_late() -> None:
        """End the process if it has not ended in time. A thread of its own, since `cleanup` may be what takes long."""
        time.sleep(END_S)
        log(f"something did not end within {END_S:g} s of the signal; the process ends without it")
        LOG.flush()
        os._exit(0)

    def _clients(self) -> Iterator[socket.socket]:
        """Duplicates of the connections that nbdkit has accepted: sockets with a peer and a listener's address."""
        listeners: set[object] = set()
        connected: list[socket.socket] = []
        for found in sockets():
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listeners.add(_address(found))
                found.close()
            else:
                connected.append(found)
        listeners.discard(self._control_path)
        for found in connected:
            if _address(found) in listeners and _has_peer(found):
                yield found
            else:
                found.close()


def _ignore(number: int, frame: object) -> None:
    """The wake-up descriptor has told the thread."""


def _drain(connection: socket.socket) -> None:
    """OSError."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(_DRAINS_MAX):
            if not connection.recv(_DRAIN, socket.MSG_DONTWAIT):
                return


def _address(found: socket.socket) -> object:
    """The path or the port by which a connection and its listener know each other."""
    name = found.getsockname()
    return name[1] if isinstance(name, tuple) and len(name) > 1 else name


def _has_peer(found: socket.socket) -> bool:
    try:
        found.getpeername()
    except OSError:
        return False
    return True
