# SPDX-License-Identifier: BSD-3-Clause
"""Who is at the other end of an NBD connection that nbdkit has accepted.

nbdkit sets no deadline on its clients' sockets: without the one set here, a client whose host has vanished without a
word would keep a thread and a socket for ever, and a secondary its place taken.

A client that is idle is probed by the kernel (`watch`). One that owes us an acknowledgement is given up by HostWatch,
not by Linux's TCP_USER_TIMEOUT: that counts from the first probe of a shut window, although every probe is answered, so
it cuts a client that reads its answers slowly, or stands still for a while.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from replication.log import log, surviving
from replication.order.worker import Worker
from replication.server.abilities import Abilities, Credentials
from replication.silence import silent_s

IDLE_S = 10
"""A client that says nothing for so long is asked for a sign of life, PROBES times, INTERVAL_S apart."""
INTERVAL_S = 5
PROBES = 3

DEAD_S = 25.0
"""A client whose host has acknowledged nothing for so long although it owes that: as long as an idle one is probed."""
_LOOK_S = 5.0

_FAMILY = struct.Struct("=H")
_INET = struct.Struct("!2xH4s")
_INET6 = struct.Struct("!2xH4x16s")


class Client(NamedTuple):
    """One client. Local is who reached this process over a Unix socket or a loopback address."""

    name: str
    local: bool
    address: tuple[str, int] | None = None
    """Of a TCP client: host and port."""
    credentials: Credentials | None = None
    """Of a client on the Unix socket."""
    tls: bool = False
    tls_dn: str | None = None
    """The distinguished name in the certificate that a TLS client has shown, empty without one; None if nbdkit does not
    tell."""

    @property
    def details(self) -> str:
        """All that is known, for the debug log. Not for other clients."""
        known = [self.name]
        if self.credentials is not None:
            known.append("process {}, user {}, group {}".format(*self.credentials))
        if self.tls:
            known.append(f"TLS as {self.tls_dn!r}" if self.tls_dn else "TLS")
        return ", ".join(known)


def current(abilities: Abilities) -> Client:
    """The client whose request the calling thread serves; only in nbdkit's callbacks. One that cannot be told, a pipe
    for example (nbdkit -s), is not local."""
    sockaddr = abilities.peer_name()
    client = Client("a client of unknown address", False) if sockaddr is None else client_at(sockaddr)
    on_unix_socket = sockaddr is not None and _family(sockaddr) == socket.AF_UNIX
    tls = abilities.is_tls()
    return client._replace(
        credentials=abilities.peer_credentials() if on_unix_socket else None,
        tls=tls,
        tls_dn=abilities.peer_tls_dn() if tls else None,
    )


def _family(sockaddr: bytes) -> int:
    (family,) = _FAMILY.unpack_from(sockaddr) if len(sockaddr) >= _FAMILY.size else (socket.AF_UNSPEC,)
    return int(family)


def client_at(sockaddr: bytes) -> Client:
    """The client behind a `struct sockaddr`."""
    family = _family(sockaddr)
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
    """Let the kernel end the connection of an idle TCP client whose host no longer answers."""
    if client.address is None:
        return
    for found in sockets():
        with found:
            if peer_address(found) == client.address:
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
                found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class HostWatch:
    """Ends the connections of TCP clients whose host has vanished while something was on its way to it, by a thread of
    its own. The kernel does that too, but only after 15 minutes of sending again.

    A window that is shut is no sign of that: the kernel probes it, or sends again what did not fit, less and less
    often, and a host that is there answers each time. So a host counts as gone when at every look for DEAD_S seconds
    something was sent to which it has not answered, and no answer has come in between.
    """

    def __init__(self) -> None:
        self._owing: dict[tuple[str, int], float] = {}
        self._worker = Worker("watch-hosts", self._round)

    def start(self) -> None:
        """Begin; after nbdkit has forked. CommandError when there is no thread for it."""
        self._worker.start(_LOOK_S)

    def stop(self) -> None:
        """End, without waiting: a look takes no time."""
        self._worker.stop(0.0)

    def _round(self) -> float:
        with surviving(), contextlib.suppress(OSError):  # no descriptors left, say: the next look may find some
            self.look(time.monotonic())
        return _LOOK_S

    def look(self, now: float) -> None:
        """Look at all TCP connections once; `now` is a monotonic clock's, in seconds."""
        owing: dict[tuple[str, int], float] = {}
        for found in sockets():
            with found:
                peer = peer_address(found)
                if peer is None or not _is_watched(found):
                    continue
                for_s = silent_s(found)
                if for_s is None:
                    continue
                # What was acknowledged since the last look makes it a new debt.
                owing[peer] = since = max(self._owing.get(peer, now), now - for_s)
                if now - since > DEAD_S:
                    log(f"the client at {peer[0]} port {peer[1]} has acknowledged nothing for {now - since:.0f} s")
                    with contextlib.suppress(OSError):  # it has gone meanwhile
                        found.shutdown(socket.SHUT_RDWR)
        self._owing = owing


def _is_watched(found: socket.socket) -> bool:
    """Whether `watch` has seen it: what this process has connected itself has deadlines of its own."""
    return found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == IDLE_S and (
        found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == PROBES
    )


def peer_address(found: socket.socket) -> tuple[str, int] | None:
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
