# SPDX-License-Identifier: BSD-3-Clause
"""Clients that nobody wants: that stall, leak, do not read, die, or are many."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack

import nbd

from content import MIB
from netpair import PORT
from soak.node import SIZE, Node
from soak.plan import CLIENTS

_SHORT_S = 0.5


def _control(node: Node) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_SHORT_S)
    connection.connect(os.fspath(node.process.control_path))
    return connection


def _idle_control(node: Node) -> socket.socket:
    """Leaked: greeted, and then forgotten."""
    connection = _control(node)
    connection.sendall(b'{"execute": "qmp_capabilities"}\n')
    return connection


def _half_open_control(node: Node) -> socket.socket:
    """A command without its end."""
    connection = _control(node)
    connection.sendall(b'{"execute": "query-repl')
    return connection


def _deaf_control(node: Node) -> socket.socket:
    """Asks, and reads no answer."""
    connection = _control(node)
    question = json.dumps({"execute": "query-replication"}).encode() + b"\n"
    connection.sendall(b'{"execute": "qmp_capabilities"}\n')
    connection.setblocking(False)
    with contextlib.suppress(OSError):
        for _ in range(200):
            connection.send(question)
    return connection


def _tcp(node: Node) -> socket.socket:
    with node.host.entered():
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(_SHORT_S)
        connection.connect((node.host.address, PORT))
    return connection


def _half_open_nbd(node: Node) -> socket.socket:
    """Stops in the middle of the handshake."""
    connection = _tcp(node)
    connection.sendall(b"\0\0")
    return connection


def _reads(node: Node) -> nbd.NBD:
    """Asks for 4 MiB in pieces, and reads none of it."""
    handle = nbd.NBD()
    with node.host.entered():
        handle.connect_uri(node.process.uri(node.export))
    for at in range(0, min(4 * MIB, SIZE), MIB // 4):
        handle.aio_pread(nbd.Buffer(MIB // 4), at)
    return handle


def _many(node: Node) -> socket.socket:
    """Comes and goes at once, on either socket."""
    _control(node).close()
    connection = _tcp(node)
    connection.close()
    return connection


def _hang_up(connection: socket.socket | nbd.NBD) -> None:
    if isinstance(connection, socket.socket):
        connection.close()
        return
    # As a process that dies: without a word, with requests in flight.
    with contextlib.suppress(OSError, nbd.Error):
        duplicate = socket.socket(fileno=os.dup(connection.aio_get_fd()))
        duplicate.shutdown(socket.SHUT_RDWR)
        duplicate.close()


KINDS: dict[str, Callable[[Node], socket.socket | nbd.NBD]] = {
    "idle-control": _idle_control,
    "half-open-control": _half_open_control,
    "deaf-control": _deaf_control,
    "half-open-nbd": _half_open_nbd,
    "slow-reader": _reads,
    "dying": _reads,
    "many": _many,
}


def crowd(kind: str, node: Node, undo: ExitStack) -> None:
    """Have so many of them as CLIENTS says, until `undo` is closed. A node that is down, or refuses them, is right."""
    over_nbd = kind in ("half-open-nbd", "slow-reader", "dying", "many")
    if over_nbd:
        node.connections += CLIENTS[kind]
        undo.callback(_forget, node, CLIENTS[kind])
    for _ in range(CLIENTS[kind]):
        with contextlib.suppress(OSError, nbd.Error, AssertionError):
            connection = KINDS[kind](node)
            if kind == "dying":
                _hang_up(connection)
            else:
                undo.callback(_hang_up, connection)


def _forget(node: Node, count: int) -> None:
    node.connections -= count
