# SPDX-License-Identifier: BSD-3-Clause
"""The laboratory of the end-to-end tests: real processes, each with a deadline and an owner.

A test asks the `lab` fixture (conftest.py) for what it needs, or opens a `Lab` as a context manager:

    Lab                     owns a short temporary folder and every process started in it
     +- Server              one nbdkit with plugin.py;  Secondary and Primary make their disks first
     +- Pair                a Secondary and the Primary that forwards to it
     +- QemuNbd             qemu-nbd serving a file
     +- DelayedEndpoint     nbdkit file/memory behind filters: a slow or failing NBD endpoint
     +- Qemu                qemu-system without a machine: a QMP monitor and QEMU's block layer

Invariants: nothing waits without a deadline; a process is ended by its own pid and only by its owner; one that
does not end when it is asked to is killed, and that fails the test (`Lab.close`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import nbd

REPOSITORY = Path(__file__).resolve().parent.parent
PLUGIN = Path(os.environ.get("REPLICATION_PLUGIN", REPOSITORY / "plugin.py"))
"""What is tested: the sources, or what scripts/compile has made of them (make test-compiled)."""

KIB = 1024
MIB = 1024 * KIB

DEADLINE_S = 60.0
"""Longest wait for anything that should take milliseconds: long enough for a busy machine with two cores, and for an
fdatasync behind everything that the tests beside this one have written (20 s were once too short)."""

CHANCE_S = 0.25
"""How long `chance` lets a request that ought to wait do the wrong thing."""

_POLL_S = 0.002


class Stuck(AssertionError):
    """Something did not happen before its deadline."""


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = DEADLINE_S) -> Any:
    """Poll until `condition()` is true and return its value; raises Stuck, naming `what`, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Stuck(f"not within {timeout_s:g} s: {what}")
        time.sleep(_POLL_S)


def pattern(seed: int, length: int) -> bytes:
    """`length` bytes that look random and are the same for the same `seed`; a shorter one is a prefix."""
    return random.Random(seed).randbytes((length + 7) // 8 * 8)[:length]


def make_raw(path: Path, size: int, content: bytes = b"") -> Path:
    """Make a sparse raw file of `size` bytes that begins with `content`."""
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(size)
    return path


def qemu_img(*arguments: str | os.PathLike[str], timeout_s: float = 60.0) -> str:
    """Run qemu-img and return its standard output; raises AssertionError with all it said if it fails."""
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        command = " ".join(os.fspath(argument) for argument in arguments)
        raise AssertionError(f"qemu-img {command}: exit {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def changed(content: bytes, *writes: tuple[int, bytes]) -> bytes:
    """`content` with writes (offset, data) in it."""
    result = bytearray(content)
    for offset, data in writes:
        result[offset : offset + len(data)] = data
    return bytes(result)


def whole(handle: nbd.NBD) -> bytes:
    """All that an export shows."""
    return bytes(handle.pread(handle.get_size(), 0))


class MountedFolder:
    """A folder on a file system of its own."""

    def __init__(self, folder: Path, *mount: str) -> None:
        """Make it, and mount there what `mount` says; PermissionError if that is not allowed."""
        self.folder = folder
        folder.mkdir()
        done = self._run("mount", *mount)
        if done.returncode:
            raise PermissionError(f"mounting needs root: {done.stderr.strip()}")

    @property
    def free(self) -> int:
        """Bytes."""
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Unmount."""
        self._run("umount").check_returncode()

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(self.folder)], check=False, timeout=DEADLINE_S, capture_output=True, text=True
        )


class SmallFolder(MountedFolder):
    """A tmpfs that can be full."""

    def __init__(self, folder: Path, size: int) -> None:
        """With room for `size` bytes."""
        super().__init__(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave no room."""
        with open(self._filler, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4 * KIB))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def make_room(self) -> None:
        """Take back what `fill` did."""
        self._filler.unlink()

    def grow(self, size: int) -> None:
        """Make it a file system of `size` bytes."""
        self._run("mount", "-o", f"remount,size={size}").check_returncode()

    @property
    def percent(self) -> float:
        """Of its bytes in use."""
        status = os.statvfs(self.folder)
        return 100 * (status.f_blocks - status.f_bavail) / status.f_blocks


class SharingFolder(MountedFolder):
    """An XFS, in which files can share blocks (reflinks)."""

    def __init__(self, folder: Path) -> None:
        image = folder.with_suffix(".xfs")
        with open(image, "wb") as file:
            file.truncate(320 * MIB)
        subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, timeout=DEADLINE_S)
        super().__init__(folder, "-o", "loop", str(image))


# --- QMP ------------------------------------------------------------------------------------------------------


class QmpError(Exception):
    """The server answered a command with an error."""

    def __init__(self, desc: str, error_class: str) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class

    @property
    def cls(self) -> str:
        """QMP's `class` of the error."""
        return self.error_class


class Qmp:
    """A synchronous QMP client on a Unix socket; every operation raises Stuck after `timeout_s`.

    Events that arrive meanwhile are kept in `events`, oldest first.
    """

    def __init__(
        self, path: str | os.PathLike[str] | socket.socket, timeout_s: float = DEADLINE_S, negotiate: bool = True
    ) -> None:
        """Connect, waiting for the socket to be there, or take a connection that there is; `negotiate` false leaves
        `qmp_capabilities` to the test."""
        self.timeout_s = timeout_s
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._serial = 0
        if isinstance(path, socket.socket):
            self._socket = path
        else:
            self._socket = wait_until(lambda: _connected(path), f"QMP socket {os.fspath(path)} accepts", timeout_s)
        self.greeting = self.receive()
        if "QMP" not in self.greeting:
            raise AssertionError(f"no QMP greeting: {self.greeting}")
        if negotiate:
            self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send raw bytes: for tests that break the protocol."""
        self._socket.settimeout(self.timeout_s)
        self._socket.sendall(data)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next message, event or not; raises EOFError when the server has closed the connection."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise Stuck(f"no QMP message within {limit_s:g} s")
            self._socket.settimeout(left_s)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            if not data:
                raise EOFError("QMP connection closed by the server")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(
        self,
        command: str,
        /,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **more: Any,
    ) -> Any:
        """Run `command` and return its `return`; raises QmpError if the server refuses.

        Arguments may be a mapping, keywords (`_` stands for `-`), or both.
        """
        self._serial += 1
        request: dict[str, Any] = {"execute": command, "id": self._serial}
        values = {**(arguments or {}), **{key.replace("_", "-"): value for key, value in more.items()}}
        if values:
            request["arguments"] = values
        self.send(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while True:
            message = self.receive(max(deadline - time.monotonic(), 0.001))
            if "event" in message:
                self.events.append(message)
            elif message.get("id") == self._serial:
                if "error" in message:
                    raise QmpError(message["error"]["desc"], message["error"]["class"])
                return message["return"]
            else:
                # An answer without our id is to something a test sent raw, or a protocol error of the server.
                raise AssertionError(f"answer to {request} expected, got {message}")

    def wait_event(
        self,
        name: str,
        predicate: Callable[[dict[str, Any]], bool] = lambda data: True,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """The oldest event `name` whose data fulfil `predicate`, taken out of `events`; waits for it if need be."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        looked_at = 0
        while True:
            for index in range(looked_at, len(self.events)):
                event = self.events[index]
                if event["event"] == name and predicate(event.get("data", {})):
                    return self.events.pop(index)
            looked_at = len(self.events)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise Stuck(f"no event {name} within {limit_s:g} s, only {self.events}")
            try:
                message = self.receive(left_s)
            except Stuck:
                continue
            if "event" not in message:
                raise AssertionError(f"event expected, got {message}")
            self.events.append(message)


def _connected(path: str | os.PathLike[str]) -> socket.socket | None:
    """A connection to the Unix socket `path`, or None if nobody listens there yet."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


# --- processes --------------------------------------------------------------------------------------------------


class Process:
    """One process with its standard output and error in a file; started, ended and awaited by its owner."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.stderr_path = folder / f"{name}.stderr"
        self.misbehaviour: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """The environment: the test's own."""
        return dict(os.environ)

    def wait_ready(self) -> None:
        """Return when the process does its work; raises Stuck, or AssertionError if it has ended."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process id; raises AssertionError if it is not running."""
        if self._process is None:
            raise AssertionError(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def stderr(self) -> str:
        """All that the process has printed, over all its starts."""
        return self.stderr_path.read_text(errors="replace") if self.stderr_path.exists() else ""

    def start(self) -> Self:
        """Start and wait until it is ready; raises AssertionError with what it printed if it is not."""
        if self.running:
            raise AssertionError(f"{self.name} is running already")
        with open(self.stderr_path, "ab") as stderr:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env=self.environment()
            )
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def check_alive(self) -> None:
        """Raise AssertionError with what the process printed if it has ended."""
        if not self.running:
            code = None if self._process is None else self._process.returncode
            raise AssertionError(f"{self.name} has ended ({code}): {self.stderr()}")

    def kill(self) -> None:
        """SIGKILL and wait; no effect if it has ended."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait(DEADLINE_S)

    def terminate(self, timeout_s: float = DEADLINE_S) -> None:
        """SIGTERM and wait; raises AssertionError if it does not end in time or not with exit code 0."""
        if self._process is None:
            return
        self._process.terminate()
        self.wait_ended(timeout_s)

    def wait_ended(self, timeout_s: float = DEADLINE_S) -> None:
        """Wait for a process that was told to end; raises AssertionError if it does not in time or not with 0."""
        process = self._process
        if process is None:
            raise AssertionError(f"{self.name} is not running")
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.misbehaviour.append(f"{self.name} had to be killed after {timeout_s:g} s")
            self.kill()
            raise Stuck(f"{self.name} did not end within {timeout_s:g} s: {self.stderr()}") from None
        self._process = None
        if code != 0:
            raise AssertionError(f"{self.name} ended with {code}: {self.stderr()}")

    def restart(self, how: signal.Signals = signal.SIGTERM) -> Self:
        """End by SIGTERM or SIGKILL and start again."""
        if how is signal.SIGKILL:
            self.kill()
        else:
            self.terminate()
        return self.start()

    def close(self) -> None:
        """End it, at the end of a test. What was wrong is left in `misbehaviour`."""
        if self._process is not None and self._process.poll() is not None:
            self.misbehaviour.append(f"{self.name} ended by itself with {self._process.returncode}: {self.stderr()}")
            self._process = None
        with contextlib.suppress(Stuck):  # terminate has noted it in `misbehaviour`
            self.terminate()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        if error is None and self.misbehaviour:
            raise AssertionError("; ".join(self.misbehaviour))


P = TypeVar("P", bound=Process)
T = TypeVar("T")


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


def _nbdkit(socket_path: Path) -> list[str]:
    """The beginning of every nbdkit command line."""
    command = ["nbdkit", "-f", "-U", str(socket_path), "--pidfile", str(socket_path.with_suffix(".pid"))]
    # Dies with the test run, also when that is killed. The kernel means the parent *thread* (PR_SET_PDEATHSIG), so
    # a server that a test starts from a short-lived thread must do without.
    if threading.current_thread() is threading.main_thread():
        command.append("--exit-with-parent")
    return command


def nbdkit_has(function: str) -> bool:
    """Whether the Python module of the nbdkit here has this function."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(f"import nbdkit\nprint('has', hasattr(nbdkit, {function!r}), flush=True)\n")
        script.flush()
        said = subprocess.run(
            ["nbdkit", "python", script.name, "--dump-plugin"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,  # it is no plugin
        )
    found = re.search(r"^has (True|False)$", said.stdout, re.MULTILINE)
    assert found is not None, said
    return found[1] == "True"


def _stands_still(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)


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


class Server(NbdProcess):
    """One nbdkit that runs plugin.py with `arguments` (KEY=VALUE, in order).

    `threads` is nbdkit's -t, `filters` the names of its filters with `filter_arguments`, `options` more options of
    nbdkit's own, `extra_environment` (NBDKIT_REPLICATION_PAUSE=..., say) is added to the test's.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        arguments: Sequence[str],
        *,
        threads: int | None = None,
        filters: Sequence[str] = (),
        filter_arguments: Sequence[str] = (),
        options: Sequence[str] = (),
        extra_environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, name)
        self.arguments = list(arguments)
        self.threads = threads
        self.filters = list(filters)
        self.filter_arguments = list(filter_arguments)
        self.options = list(options)
        self.extra_environment = dict(extra_environment or {})

    def command(self) -> list[str]:
        command = _nbdkit(self.socket_path)
        if self.threads is not None:
            command += ["-t", str(self.threads)]
        command += [f"--filter={name}" for name in self.filters]
        return command + self.options + ["python", str(PLUGIN), *self.arguments, *self.filter_arguments]

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.extra_environment}

    @property
    def control_path(self) -> Path:
        """The control socket: `control=`, or in `state=`."""
        values = dict(argument.split("=", 1) for argument in self.arguments)
        if "control" in values:
            return Path(values["control"])
        if "state" in values:
            return Path(values["state"]) / "control.sock"
        raise AssertionError(f"{self.name} was given neither control= nor state=")

    def qmp(self, *, negotiate: bool = True) -> Qmp:
        """A new QMP connection to the control socket."""
        return Qmp(self.control_path, negotiate=negotiate)

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /, **more: Any) -> Any:
        """Run one QMP command on a connection of its own."""
        with self.qmp() as qmp:
            return qmp.execute(command, arguments, **more)

    def status(self) -> dict[str, Any]:
        """`query-replication`."""
        status: dict[str, Any] = self.execute("query-replication")
        return status

    def wait_stage(self, *stages: str, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """Wait until the stage is one of `stages` and return the status."""
        with self.qmp() as qmp:

            def reached() -> dict[str, Any] | None:
                status: dict[str, Any] = qmp.execute("query-replication")
                return status if status["stage"] in stages else None

            reached_status: dict[str, Any] = wait_until(reached, f"{self.name} reaches stage {stages}", timeout_s)
            return reached_status

    @classmethod
    def failed_start(
        cls, folder: Path, arguments: Sequence[str], *, options: Sequence[str] = (), timeout_s: float = DEADLINE_S
    ) -> tuple[int, str]:
        """Start with `arguments` that must be refused: (exit code, stderr). AssertionError if it serves."""
        socket_path = folder / "refused.sock"
        process = subprocess.Popen(
            [*_nbdkit(socket_path), *options, "python", str(PLUGIN), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            _, stderr = process.communicate(timeout=DEADLINE_S)
            raise AssertionError(f"nbdkit serves {arguments}: {stderr}") from None
        if process.returncode == 0:
            raise AssertionError(f"nbdkit ended with 0 for {arguments}: {stderr}")
        return process.returncode, stderr


def disk_name(index: int) -> str:
    """NAME of disk number `index`: the target face's export."""
    return f"disk{index}"


def top_id(index: int) -> str:
    """TOP-ID of disk number `index`: the guest face's export."""
    return f"top{index}"


class Secondary(Server):
    """A secondary with raw disks of `sizes` (bytes) that hold `contents`; NAME disk0..., TOP-ID top0...

    Overlays are in the state folder unless `overlays` names another one. Existing disks are used as they are.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[int] = (MIB,),
        *,
        name: str = "secondary",
        contents: Sequence[bytes] = (),
        overlays: Path | None = None,
        extra_arguments: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.state = folder / f"{name}.state"
        self.sizes = list(sizes)
        self.disks = _make_disks(folder, name, sizes, contents)
        self._overlays = overlays
        arguments = ["mode=secondary", f"state={self.state}"]
        for index, path in enumerate(self.disks):
            arguments += [f"disk={disk_name(index)}:{path}", f"top-id={top_id(index)}"]
            if overlays is not None:
                arguments += [f"{kind}={self.overlay(kind, index)}" for kind in ("active", "hidden")]
        super().__init__(folder, name, [*arguments, *extra_arguments], **options)

    def overlay(self, kind: str, index: int = 0) -> Path:
        """The image file of `kind` ("active" or "hidden") of disk number `index`."""
        if self._overlays is not None:
            return self._overlays / f"{disk_name(index)}-{kind}.qcow2"
        found = [path for path in self.state.rglob(f"*{kind}*.qcow2") if disk_name(index) in str(path)]
        if len(found) != 1:
            raise AssertionError(f"one {kind} image of {disk_name(index)} expected in {self.state}, found {found}")
        return found[0]

    def start_replication(self) -> None:
        """Start as QEMU's management does."""
        self.execute("xen-set-replication", enable=True, primary=False)

    def checkpoint(self) -> None:
        """Take a checkpoint."""
        self.execute("xen-colo-do-checkpoint")

    def failover(self, timeout_s: float = DEADLINE_S) -> None:
        """Fail over and wait until the commit is done."""
        self.execute("xen-set-replication", enable=False, primary=False, failover=True)
        status = self.wait_stage("done", "failover-failed", timeout_s=timeout_s)
        if status["stage"] != "done":
            raise AssertionError(f"failover failed: {status}")


class Primary(Server):
    """A primary that forwards to `secondary` (a URI), with raw disks of `sizes`; without sizes it only forwards."""

    def __init__(
        self,
        folder: Path,
        secondary: str,
        sizes: Sequence[int] = (MIB,),
        *,
        name: str = "primary",
        contents: Sequence[bytes] = (),
        extra_arguments: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.state = folder / f"{name}.state"
        self.sizes = list(sizes)
        self.disks = _make_disks(folder, name, sizes, contents)
        arguments = ["mode=primary", f"state={self.state}", f"secondary={secondary}"]
        arguments += [f"disk={disk_name(index)}:{path}" for index, path in enumerate(self.disks)]
        super().__init__(folder, name, [*arguments, *extra_arguments], **options)

    def start_replication(self) -> None:
        """Start as QEMU's management does."""
        self.execute("xen-set-replication", enable=True, primary=True)

    def checkpoint(self) -> dict[str, Any]:
        """The barrier; with the peer channel up, also the secondary's checkpoint."""
        result: dict[str, Any] = self.execute("replication-checkpoint")
        return result


def _make_disks(folder: Path, name: str, sizes: Sequence[int], contents: Sequence[bytes]) -> list[Path]:
    """The raw files NAME-disk0.raw and so on, made unless they are there."""
    paths = []
    for index, size in enumerate(sizes):
        path = folder / f"{name}-{disk_name(index)}.raw"
        if not path.exists():
            make_raw(path, size, contents[index] if index < len(contents) else b"")
        paths.append(path)
    return paths


class Pair:
    """A secondary and the primary that forwards to it over a Unix socket, with equal disks."""

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[int] = (MIB,),
        *,
        contents: Sequence[bytes] = (),
        primary_arguments: Sequence[str] = (),
        secondary_arguments: Sequence[str] = (),
        primary_options: Mapping[str, Any] | None = None,
        secondary_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.secondary = Secondary(
            folder, sizes, contents=contents, extra_arguments=secondary_arguments, **(secondary_options or {})
        )
        self.primary = Primary(
            folder,
            self.secondary.uri(),
            sizes,
            contents=contents,
            extra_arguments=primary_arguments,
            **(primary_options or {}),
        )

    def start(self) -> Self:
        """Start both processes; replication is not started."""
        self.secondary.start()
        self.primary.start()
        return self

    def start_replication(self) -> None:
        """Start replication on both, the secondary first, as QEMU's documentation says."""
        self.secondary.start_replication()
        self.primary.start_replication()

    def close(self) -> None:
        """End both, the primary first."""
        self.primary.close()
        self.secondary.close()


class PausePoints:
    """Arms and releases the pause points of processes started with `environment` (replication/order/pause.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {"NBDKIT_REPLICATION_PAUSE": str(folder)}

    def arm(self, name: str) -> None:
        """Hold the next thread that reaches point `name`, one thread."""
        (self.folder / name).touch()

    def wait_hit(self, name: str, timeout_s: float = DEADLINE_S) -> None:
        """Wait until a thread is held at `name`."""
        wait_until((self.folder / f"{name}.hit").exists, f"a thread reaches pause point {name}", timeout_s)

    def is_hit(self, name: str) -> bool:
        """Whether a thread is held at `name` now."""
        return (self.folder / f"{name}.hit").exists()

    def release(self, name: str) -> None:
        """Let the held thread go on; AssertionError if there is none."""
        try:
            (self.folder / f"{name}.hit").unlink()
        except FileNotFoundError:
            raise AssertionError(f"no thread is held at {name}") from None

    def disarm(self, name: str) -> None:
        """Take back an `arm` that nothing has reached, and release what has."""
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / f"{name}.hit").unlink(missing_ok=True)


class QemuNbd(NbdProcess):
    """qemu-nbd serving `path` until it is closed; `shared` is its --shared (0: any number of clients)."""

    def __init__(
        self,
        folder: Path,
        path: Path,
        *,
        name: str = "qemu-nbd",
        image_format: str = "raw",
        shared: int = 0,
        cache: str = "writeback",
        export: str = "",
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, name)
        self.path = path
        self.image_format = image_format
        self.shared = shared
        self.cache = cache
        self.export = export
        self.options = list(options)

    def command(self) -> list[str]:
        return [
            "qemu-nbd",
            f"--socket={self.socket_path}",
            f"--format={self.image_format}",
            f"--shared={self.shared}",
            f"--cache={self.cache}",
            "--persistent",
            *([f"--export-name={self.export}"] if self.export else []),
            *self.options,
            str(self.path),
        ]


ABORT = "Assertion `sock >= 0' failed"


class DelayedEndpoint(NbdProcess):
    """A slow or failing NBD endpoint: nbdkit's file plugin on `path`, or memory of `size` bytes, behind filters.

    `delay` and `error` are the parameters of those filters without the prefix (`delay={"write": "50ms"}`,
    `error={"pwrite": "ENOSPC"}`); the error filter fails requests only between `fail()` and `work()`, unless
    `error` has a rate or file of its own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        path: Path | None = None,
        size: int | None = None,
        name: str = "endpoint",
        delay: Mapping[str, str] | None = None,
        error: Mapping[str, str] | None = None,
        filters: Sequence[str] = (),
        filter_arguments: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, name)
        if (path is None) == (size is None):
            raise ValueError("either path or size")
        self.path = path
        self.size = size
        self.delay = dict(delay or {})
        self.error = dict(error or {})
        self.filters = list(filters)
        self.filter_arguments = list(filter_arguments)
        self.options = list(options)
        self.failing = folder / f"{name}.failing"

    def command(self) -> list[str]:
        command = [*_nbdkit(self.socket_path), *self.options]
        parameters = list(self.filter_arguments)
        names = list(self.filters)
        if self.delay:
            names.append("delay")
            parameters += [f"delay-{key}={value}" for key, value in self.delay.items()]
        if self.error:
            names.append("error")
            for key, value in self.error.items():
                parameters += [f"error-{key}={value}"]
                if key in ("pread", "pwrite", "trim", "zero", "extents", "cache"):
                    parameters += [f"error-{key}-rate=100%", f"error-{key}-file={self.failing}"]
        command += [f"--filter={name}" for name in names]
        command += ["memory", str(self.size)] if self.path is None else ["file", str(self.path)]
        return command + parameters

    def close(self) -> None:
        # nbdkit 1.32 may abort when it answers a client that has gone. The plugin guards its own process against that
        # (hangup.py). Here nobody does, and a test that still needed the endpoint has noticed.
        if self._process is not None and self._process.poll() == -signal.SIGABRT and ABORT in self.stderr():
            self._process = None
        super().close()

    def fail(self) -> None:
        """From now on requests fail as `error` says."""
        self.failing.touch()

    def work(self) -> None:
        """Requests succeed again."""
        self.failing.unlink(missing_ok=True)


class Qemu(Process):
    """qemu-system without a machine, for its block layer and QMP monitor; `qmp` is connected while it runs."""

    def __init__(self, folder: Path, *, name: str = "qemu") -> None:
        super().__init__(folder, name)
        self.qmp_path = folder / f"{name}.qmp"
        self.socket_path = folder / f"{name}.sock"
        self.qmp: Qmp

    def command(self) -> list[str]:
        return [
            "qemu-system-x86_64",
            "-M",
            "none",
            "-display",
            "none",
            "-nodefaults",
            "-S",
            "-qmp",
            f"unix:{self.qmp_path}",
        ]

    def start(self) -> Self:
        # QEMU connects to us: when it listens itself, a client that comes while it is still starting is now and then
        # greeted twice, or never answered (QEMU 7.2, 1 of 3,000 starts).
        self.qmp_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as self._listener:
            self._listener.bind(os.fspath(self.qmp_path))
            self._listener.listen(1)
            self._listener.setblocking(False)
            return super().start()

    def wait_ready(self) -> None:
        def come() -> socket.socket | None:
            self.check_alive()
            try:
                return self._listener.accept()[0]
            except BlockingIOError:
                return None

        self.qmp = Qmp(wait_until(come, f"{self.name} connects its monitor"))

    def serve_nbd(self) -> None:
        """Start QEMU's NBD server on `socket_path`."""
        address = {"type": "unix", "data": {"path": str(self.socket_path)}}
        self.qmp.execute("nbd-server-start", {"addr": address})


class Lab:
    """A short temporary `folder` (Unix sockets allow 107 characters) and the processes in it.

    `close` ends them, newest first, and raises AssertionError if one had ended by itself or had to be killed.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self._processes: list[Process] = []
        self._mounted: list[MountedFolder] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except AssertionError as trouble:
            # What the test itself raised comes first; this is often its consequence.
            if error is None:
                raise
            error.add_note(f"and at the end: {trouble}")

    def add(self, process: P) -> P:
        """Make the lab the owner of `process`."""
        self._processes.append(process)
        return process

    def start(self, process: P) -> P:
        """Own and start `process`."""
        self.add(process).start()
        return process

    def secondary(self, sizes: Sequence[int] = (MIB,), **options: Any) -> Secondary:
        """A started Secondary."""
        return self.start(Secondary(self.folder, sizes, **options))

    def primary(self, secondary: str, sizes: Sequence[int] = (MIB,), **options: Any) -> Primary:
        """A started Primary."""
        return self.start(Primary(self.folder, secondary, sizes, **options))

    def pair(self, sizes: Sequence[int] = (MIB,), **options: Any) -> Pair:
        """A started Pair; its replication is not started."""
        pair = Pair(self.folder, sizes, **options)
        self.add(pair.secondary)
        self.add(pair.primary)
        return pair.start()

    def qemu_nbd(self, path: Path, **options: Any) -> QemuNbd:
        """A started QemuNbd."""
        return self.start(QemuNbd(self.folder, path, **options))

    def endpoint(self, **options: Any) -> DelayedEndpoint:
        """A started DelayedEndpoint."""
        return self.start(DelayedEndpoint(self.folder, **options))

    def qemu(self, **options: Any) -> Qemu:
        """A started Qemu."""
        return self.start(Qemu(self.folder, **options))

    def pause_points(self) -> PausePoints:
        """Pause points in a folder of this lab."""
        return PausePoints(self.folder / "pause")

    def small_folder(self, size: int) -> SmallFolder:
        """A folder with room for `size` bytes, mounted for as long as this lab's processes; PermissionError."""
        small = SmallFolder(self.folder / f"small{len(self._mounted)}", size)
        self._mounted.append(small)
        return small

    def sharing_folder(self) -> SharingFolder:
        """A folder whose files can share blocks, mounted for as long as this lab's processes; PermissionError."""
        sharing = SharingFolder(self.folder / f"sharing{len(self._mounted)}")
        self._mounted.append(sharing)
        return sharing

    def failed_start(self, arguments: Sequence[str], **options: Any) -> tuple[int, str]:
        """`Server.failed_start` in this folder."""
        return Server.failed_start(self.folder, arguments, **options)

    def stderr(self) -> str:
        """What all processes have printed, each under its name."""
        return "".join(f"--- {process.name}\n{text}" for process in self._processes if (text := process.stderr()))

    def close(self) -> None:
        """End everything and remove the folder; raises AssertionError if a process misbehaved."""
        misbehaviour: list[str] = []
        for process in reversed(self._processes):
            try:
                process.close()
            except AssertionError as error:
                misbehaviour.append(str(error))
            misbehaviour += process.misbehaviour
        self._processes.clear()
        for mounted in self._mounted:
            mounted.close()
        self._mounted.clear()
        shutil.rmtree(self.folder)
        if misbehaviour:
            raise AssertionError("; ".join(misbehaviour))


def begin(call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Run `call` in a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:  # noqa: BLE001 (it is the future's business)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def chance(future: Future[T]) -> bool:
    """Give a request that ought to wait the time to do the wrong thing; whether it has ended."""
    try:
        future.exception(CHANCE_S)
    except FutureTimeoutError:
        return False
    return True


def drained(primary: Server) -> dict[str, Any]:
    """Wait until the secondary of `primary` has everything, without a checkpoint; the status then."""

    def all_there() -> dict[str, Any] | None:
        status = primary.status()
        waiting = sum(disk["forward-queue-bytes"] + disk["out-of-sync-bytes"] for disk in status["disks"])
        return None if waiting else status

    there: dict[str, Any] = wait_until(all_there, f"the secondary of {primary.name} has everything")
    return there


def refused(server: Server, command: str, arguments: Mapping[str, Any] | None = None) -> str:
    """The description with which `command` is refused."""
    try:
        answer = server.execute(command, arguments)
    except QmpError as error:
        return error.desc
    raise AssertionError(f"{command} should have been refused, but returned {answer}")


@contextlib.contextmanager
def nbd_refusal(number: int) -> Iterator[None]:
    """The body must end with an nbd.Error of errno `number`."""
    try:
        yield
    except nbd.Error as error:
        if error.errnum != number:
            raise AssertionError(f"errno {number} ({os.strerror(number)}) expected, got {error}") from error
    else:
        raise AssertionError(f"errno {number} ({os.strerror(number)}) expected, but it succeeded")
