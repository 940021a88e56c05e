# SPDX-License-Identifier: BSD-3-Clause
"""presence.py: which socket is whose, and whether its client has gone."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest

from replication.server import presence
from replication.server.abilities import Credentials
from replication.server.clients import Client
from replication.server.clients import sockets as all_sockets
from replication.server.presence import Presence

HERE = Client("a client on the Unix socket", True, credentials=Credentials(os.getpid(), os.getuid(), os.getgid()))
ELSEWHERE = HERE._replace(credentials=Credentials(1, 0, 0))
UNKNOWN = Client("a client of unknown address", False)


class Server:
    """Accepts clients, of which each test has the far ends and this process's."""

    def __init__(self, stack: ExitStack, path: Path | None = None) -> None:
        self._stack = stack
        self._listener = stack.enter_context(
            socket.socket(socket.AF_UNIX) if path else socket.create_server(("127.0.0.1", 0))
        )
        if path is not None:
            self._listener.bind(os.fspath(path))
            self._listener.listen()

    def connect(self) -> tuple[socket.socket, int]:
        """A client's end, and the inode of what was accepted."""
        client = self._stack.enter_context(socket.socket(self._listener.family))
        client.connect(self._listener.getsockname())
        served = self._stack.enter_context(self._listener.accept()[0])
        return client, os.fstat(served.fileno()).st_ino


@pytest.fixture(autouse=True)
def _only_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test has left open in this process may be on a Unix socket, too, and of this process."""
    others = set()
    for found in all_sockets():
        with found:
            others.add(os.fstat(found.fileno()).st_ino)

    def sockets() -> Iterator[socket.socket]:
        for found in all_sockets():
            if os.fstat(found.fileno()).st_ino in others:
                found.close()
            else:
                yield found

    monkeypatch.setattr(presence, "sockets", sockets)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_tcp_client(stack: ExitStack) -> None:
    server, looking = Server(stack), Presence(None)
    clients = [server.connect() for _ in range(3)]
    for client, inode in reversed(clients):
        address = client.getsockname()
        assert looking.note(Client("", True, (address[0], address[1]))) == inode
        assert not looking.gone(inode)
    clients[1][0].close()
    assert [looking.gone(inode) for _, inode in clients] == [False, True, False]


def test_clients_of_one_process_on_a_unix_socket(stack: ExitStack, tmp_path: Path) -> None:
    server, looking = Server(stack, tmp_path / "nbd"), Presence(str(tmp_path / "control"))
    control = Server(stack, tmp_path / "control")
    control.connect()
    assert looking.note(HERE) is None, "a client of the control socket is none of nbdkit's"
    first, first_inode = server.connect()
    assert looking.note(ELSEWHERE) is None
    assert looking.note(HERE) == first_inode
    second, second_inode = server.connect()
    assert looking.note(HERE) == second_inode
    assert looking.note(HERE) is None, "both are known already"
    first.shutdown(socket.SHUT_WR)
    assert (looking.gone(first_inode), looking.gone(second_inode)) == (True, False)
    second.close()
    assert looking.gone(second_inode)
    looking.forget(first_inode)
    assert looking.note(HERE) is None, "nbdkit has not closed it yet; it is not that of a client that comes"
    third, third_inode = server.connect()
    assert looking.note(HERE) == third_inode
    looking.forget(third_inode)
    assert looking.note(HERE) == third_inode, "its number is another one's now"
    third.close()


def test_a_client_that_cannot_be_told_is_not_taken_for_gone(stack: ExitStack) -> None:
    looking = Presence(None)
    Server(stack).connect()
    assert looking.note(UNKNOWN) is None
    assert not looking.gone(None)
    looking.forget(None)


def test_when_nobody_can_look(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptors are left, say: the client is served, and not taken for gone."""
    server, looking = Server(stack), Presence(None)
    client, inode = server.connect()
    address = client.getsockname()
    monkeypatch.setattr(presence, "sockets", Mock(side_effect=OSError))
    assert looking.note(Client("", True, (address[0], address[1]))) is None
    monkeypatch.setattr(os, "dup", Mock(side_effect=OSError(errno.EMFILE, "too many")))
    assert not looking.gone(inode)
    client.close()
    assert looking.gone(inode), "that takes no other descriptor"
    monkeypatch.setattr(os, "listdir", Mock(side_effect=OSError(errno.EMFILE, "too many")))
    assert not looking.gone(inode)


def test_a_socket_that_is_closed_already(stack: ExitStack) -> None:
    assert Presence(None).gone(0)
