# SPDX-License-Identifier: BSD-3-Clause
"""The Unix control socket and its clients.

Invariants:

1. A client never slows down the node or another client: it has two threads and a bounded queue of its own. An
   event that does not fit into the queue, or an answer for which no room comes up within DRAIN_S, costs the
   client its connection.
2. The socket's name appears in the file system only with mode 0600 and with a process already listening behind it.
3. Only a socket that nobody listens on is ever replaced, by one process at a time; at the end only our own is removed.
4. Failover, stop by a lost heartbeat, the queries and `quit` always get in. When all places are taken, a client that is
   idle makes room (`_choose`), and where every client has a command at work, RESERVED more are served, for these
   commands alone.

Threads: one accepts; per client one reads, runs the commands and queues the answers, and one writes the
queue out. All are daemons (nbdkit could not exit otherwise) and start after nbdkit has forked. A command runs in its
client's reading thread, so commands of different clients run in parallel and the node does the locking.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import socket
import stat
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from replication.control import qmp
from replication.control.commands import is_urgent
from replication.control.qmp import Answer
from replication.disk import files
from replication.errors import CommandError, ConfigError
from replication.events import Event, EventHub
from replication.log import log, log_defect, surviving
from replication.order.worker import NO_THREAD

CLIENTS_MAX = 16
# Who comes while others are being let in waits here. Where there is no room, a client that does not wait gets EAGAIN.
BACKLOG = 128
# Beyond these, for who has something urgent to say (commands.URGENT).
RESERVED = 4
# A client that has said nothing for so many seconds may lose its place to a newcomer: long enough for a program that
# has just connected, and short for an operator who waits for that place.
IDLE_S = 2.0
# sizeof(sockaddr_un.sun_path) less its terminating zero (unix(7)).
PATH_BYTES_MAX = 107
# About the events of a long resync, and far more than a client that reads at all ever has waiting.
QUEUE_MESSAGES_MAX = 1000
QUEUE_BYTES_MAX = 8 << 20
# How long an answer waits for room in the queue of a client that does not read, and how long the queue of a
# client that has said everything may take to be written out.
DRAIN_S = 10.0
# The same on exit, where nbdkit waits; an answer to `quit` needs microseconds.
STOP_DRAIN_S = 1.0
STOP_S = 5.0
# Two processes that start at once on one path take turns; each needs well under a millisecond.
_LOCK_S = 5.0
_LOCK_RETRY_S = 0.005
# After a failure to accept (no file descriptors left, say): often enough for a person, too rare to burn a CPU.
_ACCEPT_RETRY_S = 0.5
_RECEIVE_BYTES = 64 << 10
_PEER = struct.Struct("=iII")
"""struct ucred: the process id first."""
_FULL = f"Too many clients: this socket serves at most {CLIENTS_MAX} at a time"
_EVICTED = "This connection was idle and has made room for another client: all places were taken"


class _Outbox:
    """The bounded queue between the threads that have something for a client and the one that writes it."""

    def __init__(self) -> None:
        # Protects everything below; never held across I/O, and no other lock is taken under it.
        self._changed = threading.Condition(threading.Lock())
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._finished = False

    def put(self, message: bytes, timeout_s: float = 0.0) -> bool:
        """Queue `message`, waiting up to `timeout_s` for room; False if it was not queued."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished or self._fits(message), timeout_s):
                return False
            if self._finished:
                return False
            self._messages.append(message)
            self._bytes += len(message)
            self._changed.notify_all()
            return True

    def take(self) -> bytes | None:
        """The next message, waiting for it; None once the outbox is finished and empty.

        This is the one wait without a deadline here: an idle client has nothing to be written, and every
        way in which a client ends calls `finish` or `discard`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._finished or bool(self._messages))
            if not self._messages:
                return None
            message = self._messages.popleft()
            self._bytes -= len(message)
            self._changed.notify_all()
            return message

    def finish(self) -> None:
        """Take nothing more; what is queued may still be written."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def discard(self) -> None:
        """Take nothing more and drop what is queued."""
        with self._changed:
            self._finished = True
            self._messages.clear()
            self._bytes = 0
            self._changed.notify_all()

    def _fits(self, message: bytes) -> bool:
        # One message always fits into an empty queue, whatever its size.
        return not self._messages or (
            len(self._messages) < QUEUE_MESSAGES_MAX and self._bytes + len(message) <= QUEUE_BYTES_MAX
        )


class _Client:
    """One connection: a session, an outbox and the two threads that serve them."""

    def __init__(
        self,
        connection: socket.socket,
        number: int,
        execute: Callable[[_Client, str, dict[str, Any]], Answer],
        hub: EventHub,
        ended: Callable[[_Client], None],
    ) -> None:
        """`execute(client, command, arguments)` runs a command of this client."""
        self._connection = connection
        self._session = qmp.Session(lambda name, arguments: execute(self, name, arguments))
        self.process = _process_of(connection)
        """The process that has connected."""
        self.reserved = False
        """Whether it has one of the RESERVED places. The server's lock protects it."""
        # Protects the three below, which say whether its place may be given to another; never held across I/O.
        self._place = threading.Lock()
        self._working = False
        self._idle_since = time.monotonic()
        self._evicted = False
        self._hub = hub
        self._ended = ended
        self._outbox = _Outbox()
        self._reader = threading.Thread(target=self._read, name=f"control-{number}-read", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"control-{number}-write", daemon=True)

    def start(self) -> None:
        """Greet and serve; RuntimeError if the system gives no thread."""
        self._outbox.put(self._session.greeting())
        self._writer.start()
        try:
            self._reader.start()
        except NO_THREAD:
            self.drop()
            raise

    def finish(self) -> None:
        """Send what is queued and nothing more. Returns at once."""
        self._hub.unsubscribe(self._on_event)
        self._outbox.finish()

    def drop(self) -> None:
        """End the connection now, whatever is queued or being sent. Returns at once; takes no lock but the outbox's."""
        self._outbox.discard()
        # Wakes both threads; the descriptor is closed by the reader, so its number is not reused under the writer.
        with contextlib.suppress(OSError):  # the peer may have gone first
            self._connection.shutdown(socket.SHUT_RDWR)

    @property
    def idle_s(self) -> float:
        """For how many seconds it has said nothing and no command of its was at work; 0 while one is."""
        with self._place:
            return 0.0 if self._working or self._evicted else time.monotonic() - self._idle_since

    def evict(self) -> bool:
        """Tell it that its place is another's and end the connection, unless it has something at work by now; whether
        it was. Returns at once."""
        with self._place:
            if self._working or self._evicted:
                return False
            self._evicted = True
        self._outbox.put(qmp.encode(qmp.error_message(_EVICTED)))
        self.finish()
        with contextlib.suppress(OSError):  # the peer may have gone first
            self._connection.shutdown(socket.SHUT_RD)
        return True

    def join_writer(self, deadline: float) -> bool:
        """Wait until all that was queued is written, up to time.monotonic() `deadline`; whether it is."""
        return _join(self._writer, deadline)

    def join(self, deadline: float) -> bool:
        """Wait for both threads up to time.monotonic() `deadline`; whether they have ended."""
        return _join(self._reader, deadline) and _join(self._writer, deadline)

    def _on_event(self, event: Event) -> None:
        # Runs under the hub's lock, in whatever thread has emitted the event: must neither block nor raise.
        message = qmp.encode_event(event)
        if message is not None and not self._outbox.put(message):
            self.drop()

    def _read(self) -> None:
        try:
            self._serve()
        except OSError:
            pass  # the connection is gone, which is the usual way for a client to leave
        except Exception as defect:  # noqa: BLE001 (the client is to be let go of all the same)
            log_defect(defect)
            self.drop()
        finally:
            self.finish()
            if not self.join_writer(time.monotonic() + DRAIN_S):
                self.drop()
                self.join_writer(time.monotonic() + STOP_S)
            self._connection.close()
            self._ended(self)

    def _serve(self) -> None:
        subscribed = False
        while (data := self._connection.recv(_RECEIVE_BYTES)) and self._turn(working=True):
            with contextlib.closing(self._session.feed(data)) as messages:
                for message in messages:
                    if not self._outbox.put(message, DRAIN_S):
                        self.drop()
                        return
                    # Only now, so that no event gets in front of the answer to qmp_capabilities.
                    if self._session.negotiated and not subscribed:
                        subscribed = True
                        self._hub.subscribe(self._on_event)
            self._turn(working=False)

    def _turn(self, working: bool) -> bool:
        """Note whether commands are at work; False when the place is another's."""
        with self._place:
            self._working = working
            self._idle_since = time.monotonic()
            return not self._evicted

    def _write(self) -> None:
        try:
            while (message := self._outbox.take()) is not None:
                self._connection.sendall(message, socket.MSG_NOSIGNAL)
        except OSError:
            self.drop()  # the peer is gone: the reader has nobody to work for either
        except Exception as defect:  # noqa: BLE001 (the same)
            log_defect(defect)
            self.drop()


class ControlServer:
    """Serves QMP on a Unix socket: `bind` before nbdkit forks, `start` after it, `stop` at the end."""

    def __init__(self, path: str, execute: qmp.Execute, hub: EventHub) -> None:
        """Serve `execute` (Commands.execute) and the events of `hub` on the socket `path`."""
        self._path = os.path.abspath(path)
        self._execute = execute
        self._hub = hub
        self._listener: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        self._acceptor: threading.Thread | None = None
        self._wake_read: int | None = None
        self._wake_write: int | None = None
        # Protects the two below and who has a reserved place; last in the lock order but for _Client._place, and never
        # held across I/O.
        self._lock = threading.Lock()
        self._clients: list[_Client] = []
        self._stopping = False

    def bind(self) -> None:
        """Create the socket and listen; clients wait in the backlog until `start`.

        A stale socket of a killed process is replaced. Raises ConfigError, having changed nothing, if the path
        is too long, in use by a live process, taken by another kind of file, or cannot be created.
        """
        length = len(os.fsencode(self._path))
        if length > PATH_BYTES_MAX:
            raise ConfigError(
                f"control={self._path}: the path of a Unix socket may have {PATH_BYTES_MAX} bytes,"
                f" this one has {length}; give a shorter one with control=PATH"
            )
        try:
            with _opened_folder(os.path.dirname(self._path)) as folder:
                self._bind(folder, os.path.basename(self._path))
        except TimeoutError:
            raise self._in_use() from None
        except OSError as error:
            raise ConfigError(
                f"control={self._path}: cannot create the control socket: {error.strerror or error}"
            ) from None

    def start(self) -> None:
        """Serve from now on, in daemon threads."""
        if self._listener is None:
            raise RuntimeError("ControlServer.start before bind")
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener, self._wake_read), name="control-accept", daemon=True
        )
        self._acceptor.start()

    def stop(self) -> None:
        """Remove the socket, send what is queued, close every connection and end the threads, within STOP_S.

        A command that is still running then is left to its daemon thread; that is logged. Harmless when
        repeated, or without `start`.
        """
        deadline = time.monotonic() + STOP_S
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._unlink()
        self._stop_accepting(deadline)
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.finish()
        drained = time.monotonic() + STOP_DRAIN_S
        for client in clients:
            client.join_writer(drained)
            client.drop()
        left = sum(not client.join(deadline) for client in clients)
        if left:
            log(f"{left} control client(s) still had a command running after {STOP_S:g} s")

    # Binding

    def _bind(self, folder: int, name: str) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Bound under a name of its own and linked to the real one when it is ready: otherwise another process could
        # find the socket before it listens, and take it for a stale one. The detour over /proc makes room for the
        # longer name.
        fresh = f".{secrets.token_hex(8)}.control"
        try:
            # Before bind, the mode of the descriptor becomes that of the file (the umask can only take from it).
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(f"/proc/self/fd/{folder}/{fresh}")
            try:
                os.chmod(fresh, 0o600, dir_fd=folder)
                listener.listen(BACKLOG)
                self._claim(folder, fresh, name)
            finally:
                os.unlink(fresh, dir_fd=folder)
        except BaseException:
            listener.close()
            raise
        # Accepting is done after poll, and a client may have gone in between.
        listener.setblocking(False)
        self._listener = listener

    def _claim(self, folder: int, fresh: str, name: str) -> None:
        """Give the listening socket `fresh` the name `name`, clearing a stale socket out of the way."""
        with _locked(folder, f".{name}.lock"):
            if self._is_stale(folder, name):
                os.unlink(name, dir_fd=folder)
            try:
                os.link(fresh, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                # Only what does not know of the lock can have come in between.
                raise self._in_use() from None
        status = os.stat(fresh, dir_fd=folder, follow_symlinks=False)
        self._inode = (status.st_dev, status.st_ino)

    def _is_stale(self, folder: int, name: str) -> bool:
        """Whether `name` is a socket that nobody listens on; False if it is not there, ConfigError if it must stay."""
        try:
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISSOCK(mode):
            raise ConfigError(
                f"control={self._path}: there is a file in the way that is no socket; remove it or give another path: "
                "it may be somebody's"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            # Not to wait for a live listener whose backlog is full: that one is in use as well (EAGAIN).
            probe.setblocking(False)
            try:
                probe.connect(f"/proc/self/fd/{folder}/{name}")
            except ConnectionRefusedError:
                return True
            except BlockingIOError:
                pass
        raise self._in_use()

    def _in_use(self) -> ConfigError:
        return ConfigError(f"control={self._path}: the socket is in use by another process")

    def _unlink(self) -> None:
        try:
            status = os.lstat(self._path)
            if (status.st_dev, status.st_ino) == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass  # someone tidied up before us
        except OSError as error:
            log(f"cannot remove the control socket {self._path}: {error.strerror}")
        self._inode = None

    # Serving

    def _accept(self, listener: socket.socket, wake: int) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(wake, select.POLLIN)
        number = 0
        while True:
            ready = dict(poll.poll())  # idle until a client comes or `stop` wakes it
            if wake in ready:
                return
            number += 1
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                log(f"cannot accept a control client: {error.strerror}")
                if select.select([wake], [], [], _ACCEPT_RETRY_S)[0]:
                    return
                continue
            with surviving():
                self._admit(connection, number)

    def _admit(self, connection: socket.socket, number: int) -> None:
        connection.setblocking(True)
        client = _Client(connection, number, self._execute_for, self._hub, self._forget)
        if not self._find_place(client):
            _turn_away(connection, _FULL)
            return
        try:
            client.start()
        except NO_THREAD as error:
            log(f"cannot serve a control client: {error}")
            self._forget(client)
            _turn_away(connection, f"Cannot serve this client: {error}")

    def _find_place(self, client: _Client) -> bool:
        """Put a newcomer among the clients; False when there is no place, not even a reserved one."""
        while True:
            with self._lock:
                seated = sum(not other.reserved for other in self._clients)
                leaving = self._choose(IDLE_S) if seated >= CLIENTS_MAX else None
                if leaving is None:
                    client.reserved = seated >= CLIENTS_MAX
                    if len(self._clients) >= CLIENTS_MAX + RESERVED:
                        leaving = self._choose(0.0)
                    if leaving is None:
                        full = len(self._clients) >= CLIENTS_MAX + RESERVED
                        self._clients += [] if full else [client]
                        return not full
            if leaving.evict():
                self._forget(leaving)  # its threads may need a moment yet
                log("all places of the control socket were taken: a client that was idle has lost its own")

    def _choose(self, idle_s: float) -> _Client | None:
        """Who has to make room, with the lock held: of those who have been idle for more than `idle_s` seconds the one
        who has been so longest, of the process that has most connections. So who leaks connections loses them, and not
        the program that has held its one connection for the longest time."""
        held = Counter(other.process for other in self._clients)
        idle = [(held[other.process], other.idle_s, other) for other in self._clients]
        most = max((entry for entry in idle if entry[1] > idle_s), key=lambda entry: entry[:2], default=None)
        return None if most is None else most[2]

    def _execute_for(self, client: _Client, name: str, arguments: dict[str, Any]) -> Answer:
        """Run a command of a client; one that has a reserved place gives urgent ones, until there is a free one."""
        if client.reserved and not is_urgent(name, arguments):
            with self._lock:
                client.reserved = sum(not other.reserved for other in self._clients) >= CLIENTS_MAX
            if client.reserved:
                raise CommandError(_FULL)
        return self._execute(name, arguments)

    def _forget(self, client: _Client) -> None:
        with self._lock:
            if client in self._clients:
                self._clients.remove(client)

    def _stop_accepting(self, deadline: float) -> None:
        if self._acceptor is not None and self._wake_write is not None and self._wake_read is not None:
            os.write(self._wake_write, b"\0")
            if _join(self._acceptor, deadline):
                os.close(self._wake_write)
                os.close(self._wake_read)
        if self._listener is not None:
            self._listener.close()


@contextlib.contextmanager
def _opened_folder(path: str) -> Iterator[int]:
    folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def _locked(folder: int, name: str) -> Iterator[None]:
    """Hold the lock file `name` in `folder`, which exists only while it is held; TimeoutError after _LOCK_S.

    Without it, two processes that find the same stale socket could remove it one after the other, the second
    one removing what the first has just put there. The lock ends with the process that holds it.
    """
    deadline = time.monotonic() + _LOCK_S
    while True:
        lock = files.create(name, os.O_NOFOLLOW, folder)
        try:
            if _holds(lock, folder, name):
                try:
                    yield
                finally:
                    os.unlink(name, dir_fd=folder)
                return
        finally:
            os.close(lock)
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{name} is held by another process")
        time.sleep(_LOCK_RETRY_S)


def _holds(lock: int, folder: int, name: str) -> bool:
    """Try to lock; whether it worked, and on the file that has the name now (its last holder removed the other)."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except (BlockingIOError, FileNotFoundError):
        return False


def _process_of(connection: socket.socket) -> int:
    """The id of the process at the other end (unix(7), SO_PEERCRED), or its own where the system does not tell."""
    try:
        return int(_PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0])
    except OSError:
        return os.getpid()


def _turn_away(connection: socket.socket, desc: str) -> None:
    with connection, contextlib.suppress(OSError):  # nothing is owed to a client that does not wait for it
        connection.setblocking(False)
        connection.send(qmp.encode(qmp.error_message(desc)), socket.MSG_NOSIGNAL)


def _join(thread: threading.Thread, deadline: float) -> bool:
    """Join up to time.monotonic() `deadline`; whether it has ended. A thread never waits for itself."""
    if thread.ident is None:
        return True
    if thread is threading.current_thread():
        return False
    thread.join(max(0.0, deadline - time.monotonic()))
    return not thread.is_alive()
