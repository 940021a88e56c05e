# SPDX-License-Identifier: BSD-3-Clause
"""clients.py: who counts as local, and whose sockets get the kernel's deadlines."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from replication.server import clients
from replication.server.clients import (
    DEAD_S,
    IDLE_S,
    INTERVAL_S,
    PROBES,
    Client,
    HostWatch,
    client_at,
    sockets,
    watch,
)


def inet(address: str, port: int = 1000) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)


def inet6(address: str, port: int = 1000) -> bytes:
    packed = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + packed + bytes(4)


@pytest.mark.parametrize(
    ("sockaddr", "local"),
    [
        (inet("127.0.0.1"), True),
        (inet("127.255.3.4"), True),
        (inet("126.255.255.255"), False),
        (inet("128.0.0.0"), False),
        (inet("0.0.0.0"), False),
        (inet("192.168.0.1"), False),
        (inet6("::1"), True),
        (inet6("::2"), False),
        (inet6("::"), False),
        (inet6("::ffff:127.0.0.1"), True),
        (inet6("::ffff:10.0.0.1"), False),
        (inet6("::127.0.0.1"), False),
        (inet6("fe80::1"), False),
        (struct.pack("=H", socket.AF_UNIX), True),
        (struct.pack("=H", socket.AF_UNIX) + b"/run/x\0", True),
        (struct.pack("=HHIIB3x", 40, 0, 1000, 1, 0), False),  # AF_VSOCK, even from CID 1, the host itself
        (struct.pack("=H", socket.AF_INET) + b"\0", False),
        (b"", False),
    ],
    ids=repr,
)
def test_who_is_local(sockaddr: bytes, local: bool) -> None:
    assert client_at(sockaddr).local is local


def test_a_client_has_a_name_for_the_log() -> None:
    assert client_at(inet("10.1.2.3", 4711)) == Client("the client at 10.1.2.3 port 4711", False, ("10.1.2.3", 4711))
    assert client_at(inet6("::ffff:10.1.2.3", 1)).name == "the client at 10.1.2.3 port 1"
    assert client_at(inet6("2001:db8::1", 2)).name == "the client at 2001:db8::1 port 2"


def deadlines(found: socket.socket) -> tuple[int, ...]:
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    asked = [found.getsockopt(socket.IPPROTO_TCP, option) for option in options]
    return (found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *asked)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_the_kernel_watches_this_client_and_no_other(family: socket.AddressFamily) -> None:
    """The IPv6 listener has an IPv4 client, too."""
    listener = socket.create_server(("", 0), family=family, dualstack_ipv6=family is socket.AF_INET6)
    with listener:
        port = listener.getsockname()[1]
        ends = []
        for _ in range(2):
            near = socket.create_connection(("127.0.0.1", port))
            far, _ = listener.accept()
            ends.append((near, far))
        (near, far), (other_near, other_far) = ends
        before = deadlines(other_far)
        address = near.getsockname()
        watch(client_at(inet(*address) if family is socket.AF_INET else inet6(f"::ffff:{address[0]}", address[1])))
        assert deadlines(far) == (1, IDLE_S, INTERVAL_S, PROBES, 0), "TCP_USER_TIMEOUT cuts who reads slowly"
        assert before[0] == 0
        assert deadlines(other_far) == deadlines(near) == deadlines(other_near) == before
        for both in ends:
            for end in both:
                end.close()


def test_all_sockets_are_found_and_none_is_left_open() -> None:
    with socket.socketpair()[0] as one, open(os.devnull, "rb"):
        before = set(os.listdir("/proc/self/fd"))
        inodes = set()
        for found in sockets():
            with found:
                inodes.add(os.fstat(found.fileno()).st_ino)
        assert os.fstat(one.fileno()).st_ino in inodes
        assert set(os.listdir("/proc/self/fd")) <= before
        watch(Client("a client on the Unix socket", True))
        assert set(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def accepted() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client that does not read, and its connection here, into which nothing more goes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        with near, far:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            far.setblocking(False)
            watch(client_at(inet(*near.getsockname())))
            with contextlib.suppress(BlockingIOError):
                while far.send(bytes(4096)):
                    pass
            yield near, far


def test_client_that_does_not_read_is_not_taken_for_dead(
    accepted: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel answers each probe of the shut window; they come further and further apart."""
    near, _ = accepted
    monkeypatch.setattr(clients, "DEAD_S", 0.2)
    watcher = HostWatch()
    begun = time.monotonic()
    while time.monotonic() < begun + 2.0:
        watcher.look(time.monotonic())
        time.sleep(0.01)
    got = 0
    with contextlib.suppress(TimeoutError):
        near.settimeout(0.5)
        while piece := near.recv(1 << 16):
            got += len(piece)
        pytest.fail("it was cut off")
    assert got


def test_host_that_acknowledges_nothing_is_given_up(
    accepted: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    near, _ = accepted
    silent_s: dict[str, float | None] = {"now": 0.0}
    monkeypatch.setattr(clients, "silent_s", lambda _found: silent_s["now"])
    watcher = HostWatch()

    def look(at: float, silent: float | None) -> None:
        silent_s["now"] = silent
        watcher.look(1000.0 + at)

    look(0.0, 100.0)  # a probe of a window that has been shut for long, about to be answered
    look(DEAD_S, 5.0)  # it was
    look(2 * DEAD_S, None)
    look(3 * DEAD_S, 3 * DEAD_S)  # and again
    look(4 * DEAD_S - 1.0, 4 * DEAD_S - 1.0)
    near.settimeout(0.0)
    while True:
        try:
            assert near.recv(1 << 16), "it is still there"
        except BlockingIOError:
            break
    assert not capsys.readouterr().err
    look(4 * DEAD_S + 1.0, 4 * DEAD_S + 1.0)
    near.settimeout(10.0)
    while near.recv(1 << 16):
        pass
    assert "has acknowledged nothing for" in capsys.readouterr().err


def test_what_the_process_has_connected_itself_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "silent_s", lambda _found: 1000.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        with near, far:
            watcher = HostWatch()
            watcher.look(0.0)
            watcher.look(10 * DEAD_S)
            near.sendall(b"x")
            assert far.recv(1) == b"x"
