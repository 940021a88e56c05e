# SPDX-License-Identifier: BSD-3-Clause
"""Host B's half: the states of a virtual machine, and which of them belongs to its disk.

A *unit* is the state of the machine and the checkpoint of its disk at one moment. They lie in two places, this store
and the plugin's overlays, and host A may die between any two steps. What decides is the number of the disk's last
checkpoint on B: one word, which the plugin changes in one store. So the order is

    1. state N is complete here, and the record names it as prepared; the state before is still there
    2. the disk takes checkpoint N: from this instant on unit N counts
    3. the record names state N as committed, and the state before is removed

    A dies before 2    the disk is at N-1, and so is the state that is committed
    A dies after 2     the disk is at N, and so is the state that is prepared, or committed by now

The other order would be as good for the choice, but with it a record could say of a unit that it is committed while it
is none. `Record.of` is the choice. It is made after the failover of the disk: then no checkpoint can be added.

A prepared state counts only if the disk's checkpoint came soon after it. A number that was given up may be used again,
by a checkpoint of somebody else, when nbdkit of A was started again meanwhile.

    Record      what is there, in one small file that is replaced by rename
    Store       the folder: the record and the files it names, nothing else outlives a start; at most two states
    Receiver    takes states and commands from host A on a Unix socket
    Remote      host A's connection to it

The record and the states outlive every process, not a power cut of B: for that A would have to be dead, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftmonitor import FtError, Lines, Monitor, Refused

SOON_S = 60.0
"""From a prepared state to the disk's checkpoint: `timeout` (30 s at most) until a hold is given up, and 30 s that the
secondary may take."""
CHUNK_BYTES = 1 << 20
PIECE_S = 30.0
"""Longest silence on a stream: a machine that is migrated is never silent for long, except before its switch-over."""
DESCRIPTION_BYTES_MAX = 1 << 20
"""Of the devices, at the end of a state: 20 KiB for a small machine."""
MAGIC = b"Q"
"""QEMU's stream begins with QEVM, a command with a brace."""


@dataclass(frozen=True)
class Unit:
    """One state."""

    epoch: int
    file: str
    bytes: int
    prepared: float
    """When it was complete, in seconds since 1970, by B's clock."""


@dataclass(frozen=True)
class Record:
    """What is there."""

    committed: Unit | None = None
    prepared: Unit | None = None

    def of(self, epoch: int, taken: float | None) -> Unit | None:
        """The state that belongs to the disk's checkpoint `epoch`, which it took at `taken` (seconds since 1970)."""
        if self.committed is not None and self.committed.epoch == epoch:
            return self.committed
        unit = self.prepared
        if unit is None or unit.epoch != epoch or taken is None:
            return None
        return unit if unit.prepared <= taken <= unit.prepared + SOON_S else None

    @property
    def files(self) -> set[str]:
        """The names of all states."""
        return {unit.file for unit in (self.committed, self.prepared) if unit is not None}

    @classmethod
    def from_json(cls, text: str) -> Record:
        """FtError if it is none."""
        try:
            values = json.loads(text)
            units = {name: None if values[name] is None else Unit(**values[name]) for name in ("committed", "prepared")}
            if any(unit is not None and Path(unit.file).name != unit.file for unit in units.values()):
                raise ValueError("a state outside the folder")
            return cls(**units)
        except (ValueError, KeyError, TypeError) as error:
            raise FtError(f"the record of states cannot be read: {error}") from error


class Store:
    """The folder of one machine's states. One process at a time writes (`lock`); any may read `load`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "units.json"

    def lock(self) -> int:
        """Be the only one who writes, until the file descriptor that is returned is closed; FtError if there is one
        already. What an interrupted process has left half done is removed."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FtError(f"another ft-agent uses {self.folder}") from None
        self.sweep()
        return descriptor

    def sweep(self) -> None:
        """Remove the states that the record does not name."""
        named = self.load().files
        for path in self.folder.glob("*.state"):
            if path.name not in named:
                path.unlink()

    def load(self) -> Record:
        """The record; FtError if it cannot be read."""
        try:
            return Record.from_json(self._path.read_text())
        except FileNotFoundError:
            return Record()

    def save(self, record: Record) -> None:
        """Replace the record at one instant, and remove the states that it does not name any more."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(record)))
        partial.chmod(0o600)
        partial.replace(self._path)
        self.sweep()

    def prepare(self, epoch: int, file: str, length: int) -> None:
        """Name a complete state as the one of the checkpoint that the disk is about to take."""
        self.save(replace(self.load(), prepared=Unit(epoch, file, length, time.time())))

    def commit(self, epoch: int) -> None:
        """The disk has taken it; FtError if the state is not there."""
        record = self.load()
        if record.prepared is None or record.prepared.epoch != epoch:
            raise FtError(f"state {epoch} is not prepared here")
        self.save(Record(committed=record.prepared))

    def abort(self) -> None:
        """What is prepared will never be committed: no checkpoint of the disk can get its number any more."""
        self.save(replace(self.load(), prepared=None))

    def settle(self, epoch: int, taken: float | None) -> None:
        """The disk's last checkpoint is known, and no other is on its way: what belongs to it is committed."""
        self.save(Record(committed=self.load().of(epoch, taken)))


def checkpoint_of(control: Monitor) -> tuple[int, float | None]:
    """Number and time (seconds since 1970) of the last checkpoint that a secondary has taken; FtError."""
    status = control.execute("query-replication")
    if status["mode"] != "secondary":
        raise FtError(f"{control.name} is a {status['mode']}")
    return int(status["epoch"]), status["checkpoint"]["time"]


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
            command, epoch = str(request["do"]), int(request.get("epoch", 0))
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


class Remote:
    """Host A's connection to the receiver."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Connect; FtError."""
        self._lines = Lines(path, "the receiver on B", timeout_s)

    def call(self, command: str, timeout_s: float, epoch: int = 0) -> dict[str, Any]:
        """Give a command: what it answers. FtError; the connection is closed after anything but Refused."""
        deadline = time.monotonic() + timeout_s
        try:
            self._lines.send({"do": command, "epoch": epoch}, deadline)
            answer = self._lines.receive(deadline)
        except FtError:
            self._lines.close()  # the answer may still come, and would be taken for that of the next command
            raise
        if "error" in answer:
            raise Refused(f"the receiver on B: {answer['error']}")
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
