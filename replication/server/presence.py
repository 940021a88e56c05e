# SPDX-License-Identifier: BSD-3-Clause
"""Whether a client is there still, of which a request stands still (order/standstill.py).

nbdkit does not look at a client's socket while all of its threads are at work, and tells the plugin that a client has
gone only when its last request has ended. But what a guest wrote before it was killed must not reach the disk after
another one has begun to use it. So a request that has waited for long asks here first.

The socket of a TCP client has its address. On a Unix socket it is one that the same process has made, and that is not
known as another client's: two that come at one instant from one process may be taken for each other.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading

from replication.server.clients import Client, peer_address, sockets

_CREDENTIALS = struct.Struct("=3i")
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Presence:
    """Of the NBD clients of this process. Every method may be called by any thread."""

    def __init__(self, control_path: str | None) -> None:
        """The clients of `control_path` are not NBD clients."""
        self._control_path = control_path
        # Protects the inodes of the sockets that are known as somebody's. Held while /proc is read, never across
        # network I/O.
        self._lock = threading.Lock()
        self._known: set[int] = set()

    def note(self, client: Client) -> int | None:
        """A client has come: the inode of its socket, until `forget`. None if that cannot be told."""
        with self._lock, contextlib.suppress(OSError):  # no descriptors left, say
            for found in sockets():
                with found:
                    inode = os.fstat(found.fileno()).st_ino
                    if inode not in self._known and self._is_of(found, client) and not _hung_up(found):
                        self._known.add(inode)
                        return inode
        return None

    def forget(self, inode: int | None) -> None:
        """nbdkit has no request of this client any more."""
        with self._lock:
            self._known.discard(inode or 0)

    def gone(self, inode: int | None) -> bool:
        """Whether the client has hung up, or its process has ended. False if that cannot be told."""
        if inode is None:
            return False
        wanted = f"socket:[{inode}]"
        try:
            for name in os.listdir("/proc/self/fd"):
                if _link_of(name) == wanted:
                    hung_up = _hung_up(int(name))  # no duplicate: for that a descriptor may be missing
                    if _link_of(name) == wanted:  # another file has not taken its number meanwhile
                        return hung_up
        except OSError:
            return False
        return True

    def _is_of(self, found: socket.socket, client: Client) -> bool:
        if client.address is not None:
            return peer_address(found) == client.address
        if client.credentials is None or found.family != socket.AF_UNIX:
            return False
        name = found.getsockname()
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens or not name or name == self._control_path:  # a listener; one that this process has connected
            return False
        credentials = found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return bool(_CREDENTIALS.unpack(credentials)[0] == client.credentials[0])


def _link_of(name: str) -> str:
    """What a descriptor is of; empty if it was closed since it was listed."""
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        return ""


def _hung_up(found: socket.socket | int) -> bool:
    poll = select.poll()
    poll.register(found, _GONE)
    return bool(poll.poll(0))
