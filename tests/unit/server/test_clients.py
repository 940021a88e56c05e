# SPDX-License-Identifier: BSD-3-Clause
"""clients.py: who counts as local, and whose sockets get the kernel's deadlines."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from replication.server.clients import IDLE_S, INTERVAL_S, PROBES, Client, client_at, sockets, watch


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
        user_timeout_ms = 1000 * (IDLE_S + INTERVAL_S * PROBES)
        assert deadlines(far) == (1, IDLE_S, INTERVAL_S, PROBES, user_timeout_ms)
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
        assert set(os.listdir("/proc/self/fd")) == before
        watch(Client("a client on the Unix socket", True))
        assert set(os.listdir("/proc/self/fd")) == before
