# SPDX-License-Identifier: BSD-3-Clause
"""A process that serves NBD on a Unix socket of its own, and one that stands still."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import nbd

from process import Process
from waiting import DEADLINE_S, wait_until


class NbdProcess(Process):
    """A process that serves NBD on a Unix socket of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self.socket_path = folder / f"{name}.sock"
        self._connections: list[socket.socket] = []

    def start(self) -> Self:
        # Left behind by a SIGKILL; nobody else ever listens there.
        self.socket_path.unlink(missing_ok=True)
        return super().start()

    def wait_ready(self) -> None:
        def greeted() -> bool:
            self.check_alive()
            connection = _connected(self.socket_path)
            if connection is None:
                return False
            with connection:
                return _nbd_greeting(connection)

        wait_until(greeted, f"{self.name} accepts NBD connections; it said: {self.stderr()}")

    def uri(self, export: str = "") -> str:
        """The libnbd URI of `export`."""
        return f"nbd+unix:///{export}?socket={self.socket_path}"

    def connect(self, export: str = "", *, strict: bool = True) -> nbd.NBD:
        """A connected libnbd handle; `strict` false sends what libnbd itself would refuse (nbd_set_strict_mode)."""
        handle = nbd.NBD()
        if not strict:
            handle.set_strict_mode(0)
        handle.add_meta_context("base:allocation")
        handle.connect_uri(self.uri(export))
        # A duplicate, because aio_get_fd itself waits behind a synchronous call; it goes with the handle.
        connection = socket.socket(fileno=os.dup(handle.aio_get_fd()))
        weakref.finalize(handle, connection.close)
        self._connections.append(connection)
        return handle

    def disconnect(self) -> None:
        """Cut the connection of every handle made by `connect`, without waiting for the server."""
        while self._connections:
            connection = self._connections.pop()
            if connection.fileno() != -1:
                with contextlib.suppress(OSError):  # the server has closed it already
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()

    def kill(self) -> None:
        super().kill()
        self.disconnect()

    def terminate(self, timeout_s: float = DEADLINE_S) -> None:
        """As Process; the handles are closed first, since nbdkit 1.32 ends only when its clients have gone."""
        self.disconnect()
        super().terminate(timeout_s)


def _nbd_greeting(connection: socket.socket) -> bool:
    """Whether an NBD server greets on `connection`; leaves it politely (NBD_OPT_ABORT), so that it logs nothing."""
    connection.settimeout(DEADLINE_S)
    greeting = b""
    try:
        while len(greeting) < 18:
            data = connection.recv(18 - len(greeting))
            if not data:
                return False
            greeting += data
        connection.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 2, 0))
        while connection.recv(64):
            pass
    except ConnectionError:
        return False
    return greeting.startswith(b"NBDMAGICIHAVEOPT")


def _connected(path: str | os.PathLike[str]) -> socket.socket | None:
    """A connection to the Unix socket `path`, or None if nobody listens there yet."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def nbdkit_command(socket_path: Path) -> list[str]:
    """The beginning of every nbdkit command line."""
    command = ["nbdkit", "-f", "-U", str(socket_path), "--pidfile", str(socket_path.with_suffix(".pid"))]
    # Dies with the test run, also when that is killed. The kernel means the parent *thread* (PR_SET_PDEATHSIG), so
    # a server that a test starts from a short-lived thread must do without.
    if threading.current_thread() is threading.main_thread():
        command.append("--exit-with-parent")
    return command


def _stands_still(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    try:
        return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)
    except (FileNotFoundError, ProcessLookupError):
        return False  # one of them has just come to its end


def stop_still(server: NbdProcess) -> None:
    """SIGSTOP, and wait until all threads are stopped: until then one of them may still answer."""
    os.kill(server.pid, signal.SIGSTOP)
    wait_until(lambda: _stands_still(server.pid), "all threads of the server are stopped")


@contextlib.contextmanager
def silent(server: NbdProcess) -> Iterator[None]:
    """The server's process stands still; its sockets stay open."""
    try:
        stop_still(server)
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)
