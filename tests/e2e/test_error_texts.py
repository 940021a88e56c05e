# SPDX-License-Identifier: BSD-3-Clause
"""What a client is told of an error in words: nothing that it may not know, as the paths of the server's files.

nbdkit 1.32 sends no words; 1.42 sends, to who cannot have an export, the last line that the plugin has had printed. The
client here reads both kinds of words that the protocol has: with the refusal of an option, and in a structured reply.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import SecondaryWithTwoDoors
from checkout import PLUGIN
from content import KIB, MIB
from lab import Lab
from nodes import Secondary, nbdkit_has
from waiting import DEADLINE_S, wait_until

SENDS_TEXTS = nbdkit_has("peer_tls_dn")
"""No function tells; 1.42 does, and 1.40 has this one."""

_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")
_STRUCTURED_REPLIES, _GO = 8, 7
_ACK, _ERROR = 1, 1 << 31
_READ = 0
_CHUNK_ERROR = 1 << 15


class Words:
    """A client that keeps what the server says."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(DEADLINE_S)
        self._take(18)
        connection.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        assert self._option(_STRUCTURED_REPLIES, b"") == (_ACK, b"")

    def _take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._connection.recv(length - len(data))
            assert more, "the server has hung up"
            data += more
        return data

    def _option(self, number: int, data: bytes) -> tuple[int, bytes]:
        self._connection.sendall(_OPTION.pack(b"IHAVEOPT", number, len(data)) + data)
        while True:
            _, _, kind, length = _OPTION_REPLY.unpack(self._take(_OPTION_REPLY.size))
            text = self._take(length)
            if kind == _ACK or kind & _ERROR:
                return kind, text

    def open(self, export: str) -> str | None:
        """Choose the export; what is said if it is refused."""
        name = export.encode()
        kind, text = self._option(_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        return None if kind == _ACK else text.decode()

    def failing_read(self, offset: int, length: int) -> str:
        """What is said about a read that fails."""
        self._connection.sendall(_REQUEST.pack(0x25609513, 0, _READ, 1, offset, length))
        _, _, kind, _, size = _CHUNK.unpack(self._take(_CHUNK.size))
        data = self._take(size)
        assert kind & _CHUNK_ERROR
        (text_bytes,) = struct.unpack_from(">4xH", data)
        return data[6 : 6 + text_bytes].decode()


def on_unix_socket(path: Path) -> Words:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return Words(connection)


def test_who_asks_for_an_export_that_is_not_there_is_told_the_others(lab: Lab) -> None:
    server = lab.secondary([MIB])
    said = on_unix_socket(server.socket_path).open("nowhere")
    assert said is not None
    assert bool(said) is SENDS_TEXTS
    assert not said or said.endswith("error: there is no export 'nowhere': the exports are 'disk0', 'top0'")


def test_who_is_not_on_this_host_is_told_so(lab: Lab) -> None:
    """A loopback address counts as this host, so the client has another of the same network."""
    server = SecondaryWithTwoDoors(lab.folder, [MIB], host="0.0.0.0", extra_arguments=["guest-access=local"])
    lab.start(server)
    address = next(own_addresses(), None)
    if address is None:
        pytest.skip("this machine has no address but loopback")
    said = Words(socket.create_connection((address, server.port))).open("top0")
    assert said is not None
    assert not said or f"the client at {address} port" in said
    assert str(lab.folder) not in said


def own_addresses() -> Iterator[str]:
    """Of this machine, other than loopback: what it would use towards a host that need not exist."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return
        yield str(probe.getsockname()[0])


# The plugin, but that some exports cannot be opened.
FAILING = """
import sys
__file__ = {plugin!r}
with open(__file__) as file:
    source = file.read()
exec(compile(source, __file__, "exec"), globals())
_open = Exports.open
def _failing(self, name, *client):
    if name == "private":
        raise DiskError("/srv/secret.img is held by the client at 10.1.2.3 port 4", errno.ENOSPC)
    if name == "defect":
        raise RuntimeError("secret")
    if name == "memory":
        raise MemoryError("secret")
    return _open(self, name, *client)
Exports.open = _failing
"""


@pytest.mark.parametrize(
    ("export", "told", "logged"),
    [
        ("private", f"{os.strerror(errno.ENOSPC)}; the server's log says why", "secret.img is held by"),
        ("memory", f"{os.strerror(errno.ENOMEM)}; the server's log says why", "secret"),
        ("defect", "internal error; the server's log has more", "RuntimeError: secret"),
    ],
)
def test_what_is_wrong_on_the_server_is_for_its_log_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, export: str, told: str, logged: str
) -> None:
    script = lab.folder / "failing.py"
    script.write_text(FAILING.format(plugin=str(PLUGIN)))
    monkeypatch.setattr("nodes.PLUGIN", script)
    server = lab.secondary([MIB])
    client = on_unix_socket(server.socket_path)
    said = client.open(export)
    assert said is not None
    # What nbdkit has not printed itself it does not send (errorlines.py): then the client has the errno alone.
    assert not said or said.endswith(f"open: error: {told}")
    for private in ("secret", "10.1.2.3", "Traceback"):
        assert private not in said
    wait_until(lambda: logged in server.stderr(), "the reason is logged")
    assert client.open("disk0") is None


def test_a_request_that_fails_tells_no_paths(lab: Lab) -> None:
    server: Secondary = lab.secondary([MIB])
    server.start_replication()
    client = on_unix_socket(server.socket_path)
    assert client.open("disk0") is None
    (raw,) = lab.folder.rglob("*disk0*.raw")
    os.truncate(raw, 0)
    assert str(lab.folder) not in client.failing_read(0, 4 * KIB)
    wait_until(lambda: str(raw) in server.stderr(), "the log has the path")
