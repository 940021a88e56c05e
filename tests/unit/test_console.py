# SPDX-License-Identifier: BSD-3-Clause
"""The console of a test guest, with a socket in place of the guest."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from console import Console
from guestimages import GuestError
from waiting import DEADLINE_S, Stuck, begin

SOON_S = 0.05


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, guests = socket.socketpair()
    with guests:
        yield ours, guests


@pytest.fixture
def console(line: tuple[socket.socket, socket.socket], tmp_path: Path) -> Console:
    return Console(line[0], tmp_path / "log")


@pytest.fixture
def guest(line: tuple[socket.socket, socket.socket]) -> socket.socket:
    return line[1]


def test_what_follows_a_word_is_returned(console: Console, guest: socket.socket, tmp_path: Path) -> None:
    guest.sendall(b"[ 0.1] noise\r\nvm: alive\r\nvm: mounted 17\r\n")
    assert console.wait("mounted", DEADLINE_S) == "17"
    assert console.wait("alive", DEADLINE_S) == ""
    assert (console.moment_of("alive") or 0) <= (console.moment_of("mounted") or 0)
    assert console.moment_of("stopped") is None
    assert b"noise" in (tmp_path / "log").read_bytes()


def test_a_waiting_thread_hears_of_a_line_in_two_pieces(console: Console, guest: socket.socket) -> None:
    waiting = begin(console.wait, "mounted", DEADLINE_S)
    guest.sendall(b"vm: moun")
    assert console.drain() == 0
    assert not waiting.done()
    guest.sendall(b"ted 3\n")
    assert waiting.result(DEADLINE_S) == "3"


def test_records_are_numbered_by_the_guest(console: Console, guest: socket.socket) -> None:
    assert console.last == 0
    guest.sendall(b"vm: record 41 1 0.50\nvm: record 42 2 0.75\nvm: record 4")
    assert console.wait_records(42, DEADLINE_S).count == 2
    assert console.drain() == console.last == 42  # half a line is no acknowledgement
    assert [(record.number, record.uptime_s) for record in console.records] == [(41, 0.5), (42, 0.75)]
    more = begin(console.wait_more, 2, DEADLINE_S)
    guest.sendall(b"3 3 1.00\nvm: record 44 4 1.25\n")
    assert more.result(DEADLINE_S).number == 44


@pytest.mark.parametrize("said", ["vm: error mount /dev/vda", "[    1.0] Kernel panic - not syncing: Fatal"])
def test_a_guest_that_fails_ends_the_wait(console: Console, guest: socket.socket, said: str) -> None:
    waiting = begin(console.wait, "mounted", DEADLINE_S)
    guest.sendall(said.encode() + b"\n")
    with pytest.raises(GuestError, match=said[-5:]):
        waiting.result(DEADLINE_S)
    with pytest.raises(GuestError):
        console.watch(DEADLINE_S)


def test_a_guest_that_ends_ends_the_wait(console: Console, guest: socket.socket) -> None:
    guest.sendall(b"vm: alive\n")
    guest.close()
    with pytest.raises(GuestError, match=r"has ended.*vm: alive"):
        console.wait("mounted", DEADLINE_S)
    console.wait_end(DEADLINE_S)
    assert console.drain() == 0


def test_a_silent_guest_is_waited_for_until_the_deadline(console: Console, guest: socket.socket) -> None:
    guest.sendall(b"vm: alive\n")
    console.wait("alive", DEADLINE_S)
    with pytest.raises(Stuck, match=r"'mounted'.*vm: alive"):
        console.wait("mounted", SOON_S)
    with pytest.raises(Stuck, match="not ended"):
        console.wait_end(SOON_S)
    console.watch(SOON_S)


def test_what_is_typed_reaches_the_guest(console: Console, guest: socket.socket) -> None:
    console.send("stop")
    guest.settimeout(DEADLINE_S)
    assert guest.recv(100) == b"stop\n"
