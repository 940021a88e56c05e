# SPDX-License-Identifier: BSD-3-Clause
"""A change that was given up, and a newer one to the same place: the late one never has the last word.

t0  write OLD        the server has it and does not answer: held
t1  it is given up   the connection is replaced
t2  write NEW        to the same place over the fresh connection: refused, or else
t3  OLD lands        the disk would have OLD, and nobody would know
t4  write NEW        now it is taken
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from pathlib import Path

import pytest

from content import KIB, MIB, make_raw
from lab import Lab
from nbdprocess import NbdProcess
from replication.disk import endpoint
from replication.disk.endpoint import NbdDisk
from replication.disk.fence import Fence
from replication.errors import DiskError
from waiting import wait_until

OLD, NEW = b"o" * 4 * KIB, b"n" * 4 * KIB
PLACE, ELSEWHERE = 64 * KIB, 512 * KIB


class Holding(NbdProcess):
    """An nbdkit that holds the next write after `arm` until `release`; everything else passes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "holding")
        self.disk = make_raw(folder / "held.raw", MIB)
        self._hold, self._held, self._go = (folder / name for name in ("hold", "held", "go"))

    def command(self) -> list[str]:
        wait = f"if mv {self._hold} {self._held} 2>/dev/null; then while ! [ -e {self._go} ]; do sleep 0.01; done; fi"
        return [
            "nbdkit",
            "-f",
            "-U",
            str(self.socket_path),
            "eval",
            "thread_model=echo parallel",
            f"get_size=echo {MIB}",
            f"pread=dd if={self.disk} iflag=skip_bytes,count_bytes skip=$4 count=$3 2>/dev/null",
            f"pwrite=cat > $tmpdir/$$; {wait}; "
            f"dd if=$tmpdir/$$ of={self.disk} oflag=seek_bytes conv=notrunc seek=$4 bs=1M 2>/dev/null",
            "can_write=exit 0",
        ]

    def arm(self) -> None:
        self._hold.touch()

    @property
    def holds(self) -> bool:
        return self._held.exists()

    def release(self) -> None:
        self._go.touch()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "TIMEOUT_S", 3.0)  # a request that is not held starts a shell and more
    monkeypatch.setattr(endpoint, "RETRY_S", 0.01)


def test_no_newer_write_passes_one_that_was_given_up(lab: Lab) -> None:
    server = lab.start(Holding(lab.folder))
    disk = NbdDisk("disk0", server.uri())
    server.arm()
    with pytest.raises(DiskError, match="no progress"):
        disk.write([OLD], PLACE)
    assert server.holds

    with pytest.raises(DiskError, match="given up"):
        disk.write([NEW], PLACE)
    with pytest.raises(DiskError, match="given up"):
        disk.zero(PLACE - 4 * KIB, 5 * KIB, may_trim=True)
    disk.write([NEW], ELSEWHERE)  # the rest of the disk goes on
    # What is read of it is not what it will be: nobody else must be given that for good.
    with pytest.raises(DiskError, match="may still change: a write there was given up"):
        disk.check_settled(PLACE - 4 * KIB, 5 * KIB)
    disk.check_settled(ELSEWHERE, 4 * KIB)

    server.release()

    def taken() -> bool:
        try:
            disk.write([NEW], PLACE)
        except DiskError:
            return False
        return True

    wait_until(taken, "the late write has been answered")
    disk.check_settled(PLACE - 4 * KIB, 5 * KIB)
    content = server.disk.read_bytes()
    assert content[PLACE : PLACE + len(NEW)] == NEW
    assert content[ELSEWHERE : ELSEWHERE + len(NEW)] == NEW
    disk.close()


def test_a_server_that_has_ended_holds_nothing_back(lab: Lab) -> None:
    server = lab.qemu_nbd(make_raw(lab.folder / "raw", MIB))
    disk = NbdDisk("disk0", server.uri())
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(DiskError, match="no progress"):
        disk.write([OLD], PLACE)
    server.kill()
    server.start()

    def taken() -> bool:
        try:
            disk.write([NEW], PLACE)
        except DiskError:
            return False
        return True

    wait_until(taken, "the former connection has ended")
    disk.close()


def simple(cookie: int = 1) -> bytes:
    return struct.pack(">IIQ", 0x67446698, 0, cookie)


def chunk(payload: bytes, last: bool) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, int(last), 1, 1, len(payload)) + payload


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_answers_are_counted_however_they_are_cut(size: int) -> None:
    ours, theirs = socket.socketpair()
    fence = Fence("it", ours, [(0, 10)], 3, readable=True)
    stream = simple() + chunk(b"x" * 50, last=False) + chunk(b"", last=True) + simple()
    for at in range(0, len(stream) - 1, size):
        theirs.sendall(stream[at : min(at + size, len(stream) - 1)])
    assert not fence.wait(0.1)
    assert fence.covers(9, 1)
    assert not fence.covers(10, 5)
    theirs.sendall(stream[-1:])
    assert fence.wait(10)
    assert not fence.covers(9, 1)
    theirs.close()


def test_what_cannot_be_read_is_told_to_go_and_its_end_is_waited_for() -> None:
    ours, theirs = socket.socketpair()
    fence = Fence("it", ours, [(0, 10)], 1, readable=True)
    theirs.sendall(b"nonsense" * 4)
    assert theirs.recv(1) == b""
    assert not fence.wait(0.1)
    theirs.close()
    assert fence.wait(10)


def test_a_connection_of_which_nothing_is_known_stays_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def lost(_self: Fence) -> bytes:
        ended.set()
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr(Fence, "_receive", lost)
    ours, theirs = socket.socketpair()
    fence = Fence("it", ours, [(0, 10)], 1, readable=True)
    assert ended.wait(10)
    assert not fence.wait(0.1)
    theirs.close()


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["none", "memory"])
def test_without_a_thread_the_changes_are_in_doubt_until_there_is_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ours, theirs = socket.socketpair()

    def none_left(_: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        fence = Fence("disk0", ours, [(0, 4096)], 1, True)
        theirs.close()
        assert fence.pending
        assert not fence.wait(0.0)
    wait_until(lambda: not fence.pending, "the end of the server has been seen")
