# SPDX-License-Identifier: BSD-3-Clause
"""A host's name may have several addresses, some of which answer nothing: they are tried side by side.

libnbd tries one after the other, each for as long as the kernel does, which is two minutes. So where its first attempt
is still under way after HEAD_START_S, all addresses are tried here as well, and the connection that is there first
takes the place of the one that libnbd waits for. The order of things is that of RFC 8305 (Happy Eyeballs).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time

HEAD_START_S = 0.25
"""How long the first address is tried alone: more than a round trip to most hosts, and little to wait for."""


class Rivals:
    """Attempts to connect to all addresses of a name at once. For one thread."""

    def __init__(self, host: str, port: int) -> None:
        """Begin them; none where the name has one address, or cannot be looked up."""
        self._attempts: list[socket.socket] = []
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            return
        for family, kind, protocol, _, address in found if len(found) > 1 else ():
            with contextlib.suppress(OSError):  # this host has no address of that family, say
                self._begin(family, kind, protocol, address)

    def _begin(self, family: int, kind: int, protocol: int, address: tuple[object, ...]) -> None:
        attempt = socket.socket(family, kind, protocol)
        attempt.setblocking(False)
        if attempt.connect_ex(address) in (0, errno.EINPROGRESS):
            self._attempts.append(attempt)
        else:
            attempt.close()

    def register(self, poll: select.poll) -> None:
        """Have `poll` wake up when one of them has an outcome."""
        for attempt in self._attempts:
            poll.register(attempt, select.POLLOUT)

    def winner(self) -> socket.socket | None:
        """One that is connected, if there is one, which then is the caller's; those that have failed are dropped."""
        poll = select.poll()
        self.register(poll)
        ready = {descriptor for descriptor, _ in poll.poll(0)}
        for attempt in [each for each in self._attempts if each.fileno() in ready]:
            self._attempts.remove(attempt)
            if not attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return attempt
            attempt.close()
        return None

    @property
    def left(self) -> bool:
        """Whether any is under way."""
        return bool(self._attempts)

    def close(self) -> None:
        """Give them all up."""
        while self._attempts:
            self._attempts.pop().close()


def take_place(winner: socket.socket, descriptor: int) -> bool:
    """Put a connection in the place of a socket that is not connected yet, whoever waits for that one; whether it was
    not. The winner is closed."""
    with winner, socket.socket(fileno=os.dup(descriptor)) as waiting:
        try:
            waiting.getpeername()
        except OSError:
            winner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            os.dup2(winner.fileno(), descriptor, inheritable=False)
            return True
        return False


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """A blocking connection to one of the addresses of a name, made until `deadline` (time.monotonic). OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if len(found) == 1:
        return socket.create_connection((host, port), max(deadline - time.monotonic(), 0.001))
    rivals = Rivals(host, port)
    try:
        while True:
            poll = select.poll()
            rivals.register(poll)
            left_s = max(0.0, deadline - time.monotonic()) if rivals.left else 0.0
            ready = poll.poll(left_s * 1000)
            winner = rivals.winner()
            if winner is not None:
                winner.setblocking(True)
                return winner
            if not ready or not rivals.left:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    finally:
        rivals.close()
