# SPDX-License-Identifier: BSD-3-Clause
"""Host B's end of the connection: takes states and commands from host A on a Unix socket.

Stream      one state on its way here
Receiver    expects, takes, and names them in the store
receive     a receiver on a socket of its own, until the process ends
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .monitor import FtError, Monitor, checkpoint_of
from .store import Store

CHUNK_BYTES = 1 << 20
PIECE_S = 30.0
"""Longest silence on a stream: a machine that is migrated is never silent for long, except before its switch-over."""
DESCRIPTION_BYTES_MAX = 1 << 20
"""Of the devices, at the end of a state: 20 KiB for a small machine."""
MAGIC = b"Q"
"""QEMU's stream begins with QEVM, a command with a brace."""


def is_whole(path: Path) -> bool:
    """Whether a file is a QEMU migration stream to its end: an end can also be that of a tunnel which broke.

    docs/devel/migration.rst of QEMU: after the last section come a byte 0 (end of file), a byte 6, and a description of
    the devices: its length, 32 bits big-endian, and so many bytes of JSON.
    """
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - DESCRIPTION_BYTES_MAX))
        tail = file.read()
    at = len(tail)
    while (at := tail.rfind(b"\0\6", 0, at)) >= 0:
        if len(tail) >= at + 6 and len(tail) - at - 6 == int.from_bytes(tail[at + 2 : at + 6]):
            return tail.endswith(b"}") and b'"devices"' in tail[at + 6 :]
    return False


class Stream:
    """One state on its way here, received by a thread of its own."""

    def __init__(self, connection: socket.socket, path: Path, bytes_max: int) -> None:
        self.path = path
        self.length = 0
        self.error: str | None = None
        self._connection = connection
        self._bytes_max = bytes_max
        self._thread = threading.Thread(target=self._receive, name="stream", daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        try:
            with self._connection, open(self.path, "wb", buffering=0) as file:
                self._connection.settimeout(PIECE_S)
                while count := self._connection.recv_into(buffer):
                    self.length += count
                    if self.length > self._bytes_max:
                        raise OSError(f"it is larger than {self._bytes_max} bytes")
                    done = 0
                    while done < count:
                        done += file.write(buffer[done:count])
        except OSError as error:
            self.error = f"the state cannot be received: {error.strerror or error}"

    def wait(self, timeout_s: float) -> None:
        """Wait for the end; FtError if it is no good one."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise FtError("the state has not come to its end")
        if self.error is not None:
            raise FtError(self.error)

    def cut(self) -> None:
        """Have it end now, with an error or as it is."""
        with contextlib.suppress(OSError):  # the thread has closed it
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(PIECE_S)
        self.path.unlink(missing_ok=True)


class Receiver:
    """Serves one host A. `control` is the control socket of B's nbdkit."""

    def __init__(self, store: Store, control: Path, bytes_max: int, answer_s: float, state_s: float) -> None:
        """`bytes_max` of a state; longest waits for an answer of `control`, and for the rest of a state."""
        self._store = store
        self._control = control
        self._bytes_max = bytes_max
        self._answer_s = answer_s
        self._state_s = state_s
        # Protects all below; held across the work of one command, but not while one waits for a stream.
        self._lock = threading.Condition()
        self._agent: socket.socket | None = None
        self._expecting = False
        self._stream: Stream | None = None
        self._serial = 0

    def serve(self, listener: socket.socket) -> None:
        """Until the process ends. Each connection has a thread; a newer one of an agent replaces an older."""
        while True:
            connection = listener.accept()[0]
            threading.Thread(target=self._welcome, args=(connection,), name="connection", daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(PIECE_S)
            first = connection.recv(1, socket.MSG_PEEK)
        except OSError:
            first = b""
        if first == MAGIC:
            with self._lock:
                if self._expecting:
                    self._expecting = False
                    self._serial += 1
                    name = f"{os.getpid()}-{self._serial}.state"
                    self._stream = Stream(connection, self._store.folder / name, self._bytes_max)
                    self._lock.notify_all()
                    return
        elif first == b"{":
            self._obey(connection)
        connection.close()

    def _obey(self, connection: socket.socket) -> None:
        with self._lock:
            if self._agent is not None:
                with contextlib.suppress(OSError):  # that agent has gone by itself
                    self._agent.shutdown(socket.SHUT_RDWR)
            self._agent = connection
        connection.settimeout(None)
        # An error: A has died. What it was about to do, `settle` or the failover finds out.
        with connection.makefile("rb") as lines, contextlib.suppress(OSError):
            while line := lines.readline(1 << 16):
                connection.sendall(json.dumps(self._answer(line)).encode() + b"\n")
        with self._lock:
            if self._agent is connection:
                self._agent = None
                self._drop_stream_locked()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command, epoch = str(request["do"]), request.get("epoch", 0)
            if type(epoch) is not int or not 0 <= epoch < 1 << 63:
                raise ValueError("epoch is no number of a checkpoint")
            if command == "prepare":
                return {"bytes": self._prepare(epoch)}
            with self._lock:
                {"begin": self._begin_locked, "commit": self._commit_locked, "abort": self._abort_locked}[command](
                    epoch
                )
            return {}
        except FtError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"error": f"{self._store.folder}: {error.strerror or error}"}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"not understood: {error!r}"}

    def _begin_locked(self, _: int) -> None:
        """Expect a state. Whoever asks has made sure that the disk's checkpoint is not on its way."""
        self._drop_stream_locked()
        if self._store.load().prepared is not None:
            control = Monitor(self._control, "nbdkit of B", self._answer_s)
            try:
                self._store.settle(*checkpoint_of(control))
            finally:
                control.close()
        self._expecting = True

    def _prepare(self, epoch: int) -> int:
        with self._lock:
            # QEMU may be done with a small one before its connection has been looked at.
            if not self._lock.wait_for(lambda: self._stream is not None, self._state_s):
                raise FtError("no state has come")
            stream = self._stream
        assert stream is not None
        stream.wait(self._state_s)
        if not is_whole(stream.path):
            raise FtError("the state has come to an end too early")
        with self._lock:
            if self._stream is not stream:
                raise FtError("the state was given up")
            self._stream = None
            self._store.prepare(epoch, stream.path.name, stream.length)
        return stream.length

    def _commit_locked(self, epoch: int) -> None:
        self._store.commit(epoch)

    def _abort_locked(self, _: int) -> None:
        self._drop_stream_locked()
        if self._store.load().prepared is not None:
            self._store.abort()

    def _drop_stream_locked(self) -> None:
        self._expecting = False
        if self._stream is not None:
            self._stream.cut()
            self._stream = None


def receive(receiver: Receiver, store: Store, listen: Path, say: Callable[[str], None]) -> None:
    """Serve on the Unix socket `listen`, which is made for it, until a signal comes; FtError if the store is in use."""
    lock = store.lock()
    try:
        # The lock says that nobody listens on what is left of it, unless it is somebody else's file.
        if listen.is_socket():
            listen.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            mask = os.umask(0o177)
            listener.bind(str(listen))
            os.umask(mask)
            listener.listen(8)
            say(f"receiving on {listen}")
            receiver.serve(listener)
    finally:
        listen.unlink(missing_ok=True)
        os.close(lock)
