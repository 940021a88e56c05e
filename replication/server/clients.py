# SPDX-License-Identifier: BSD-3-Clause
"""Who is at the other end of an NBD connection that nbdkit has accepted.

nbdkit sets no deadline on its clients' sockets: without the one set here, a client whose host has vanished without a
word would keep a thread and a socket for ever, and a secondary its place taken.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

IDLE_S = 10
"""A client that says nothing for so long is asked for a sign of life, PROBES times, INTERVAL_S apart."""
INTERVAL_S = 5
PROBES = 3

_SOCKADDR_BYTES = 128  # struct sockaddr_storage
_FAMILY = struct.Struct("=H")
_INET = struct.Struct("!2xH4s")
_INET6 = struct.Struct("!2xH4x16s")


class Client(NamedTuple):
    """One client. Local is who reached this process over a Unix socket or a loopback address."""

    name: str
    local: bool
    address: tuple[str, int] | None = None
    """Of a TCP client: host and port."""


def current() -> Client:
    """The client whose request the calling thread serves; only in nbdkit's callbacks. One that cannot be told, a pipe
    for example (nbdkit -s), is not local."""
    ask: Any = ctypes.CDLL(None).nbdkit_peer_name
    address = ctypes.create_string_buffer(_SOCKADDR_BYTES)
    length = ctypes.c_uint32(_SOCKADDR_BYTES)
    if ask(address, ctypes.byref(length)) == -1:
        return Client("a client of unknown address", False)
    return client_at(address.raw[: length.value])


def client_at(sockaddr: bytes) -> Client:
    """The client behind a `struct sockaddr`."""
    (family,) = _FAMILY.unpack_from(sockaddr) if len(sockaddr) >= _FAMILY.size else (socket.AF_UNSPEC,)
    if family == socket.AF_UNIX:
        return Client("a client on the Unix socket", True)
    if family == socket.AF_INET and len(sockaddr) >= _INET.size:
        port, packed = _INET.unpack_from(sockaddr)
        return _tcp_client(str(ipaddress.IPv4Address(packed)), port)
    if family == socket.AF_INET6 and len(sockaddr) >= _INET6.size:
        port, packed = _INET6.unpack_from(sockaddr)
        return _tcp_client(str(ipaddress.IPv6Address(packed)), port)
    return Client(f"a client of address family {family}", False)


def _tcp_client(host: str, port: int) -> Client:
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)  # an IPv4 client of an IPv6 listener
    local = (mapped or address).is_loopback
    return Client(f"the client at {mapped or address} port {port}", local, (host, port))


def watch(client: Client) -> None:
    """Let the kernel end the connection of a TCP client whose host no longer answers."""
    if client.address is None:
        return
    for found in sockets():
        with found:
            if _peer(found) == client.address:
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
                user_timeout_ms = 1000 * (IDLE_S + PROBES * INTERVAL_S)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
                found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _peer(found: socket.socket) -> tuple[str, int] | None:
    """Host and port at the other end, written as `Client.address` is."""
    if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
        return None
    try:
        host, port = found.getpeername()[:2]
    except OSError:
        return None  # a listener, or gone
    return str(ipaddress.ip_address(host.partition("%")[0])), port


def sockets() -> Iterator[socket.socket]:
    """Duplicates of all sockets of this process; the caller closes each."""
    for name in os.listdir("/proc/self/fd"):
        try:
            # Nothing else is duplicated: closing the duplicate of a file would let go of its POSIX locks.
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                duplicate = os.dup(int(name))
            else:
                continue
        except OSError:
            continue  # closed since the listing
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)  # another file has taken its number meanwhile
            continue
        yield found
