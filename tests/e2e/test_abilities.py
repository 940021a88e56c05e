# SPDX-License-Identifier: BSD-3-Clause
"""What nbdkit tells of its clients, by its Python module or past it, arrives: seen in the debug log (nbdkit -v)."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import nbd
import pytest

from certificates import Authority, SecondaryWithTwoDoors, psk_file
from content import MIB
from lab import Lab
from nodes import Server, nbdkit_has
from waiting import wait_until


def opened(server: Server) -> list[str]:
    """What was logged of each client that has opened the disk; of one at least, which it waits for."""
    said = re.compile(r"export 'disk0': (.+)\n")
    wait_until(lambda: said.search(server.stderr()), "a client is in the log")
    return said.findall(server.stderr())


def test_a_client_on_the_unix_socket_is_known_by_its_process(lab: Lab) -> None:
    server = lab.secondary([MIB], options=["-v"])
    server.connect("disk0").shutdown()
    who = f"process {os.getpid()}, user {os.getuid()}, group {os.getgid()}"
    assert opened(server) == [f"a client on the Unix socket, {who}"]


@pytest.mark.parametrize("kind", ["plain", "psk", "nobody", "certificate"])
def test_a_client_over_tcp_is_known_by_its_address_and_its_certificate(lab: Lab, tmp_path: Path, kind: str) -> None:
    authority = Authority(tmp_path)
    psk = psk_file(tmp_path / "psk", "pair")
    tls = [f"--tls-psk={psk}"] if kind == "psk" else [f"--tls-certificates={authority.server()}"]
    if kind == "certificate":
        tls.append("--tls-verify-peer")
    server = SecondaryWithTwoDoors(lab.folder, [MIB], options=["-v", "--tls=on", *tls])
    lab.start(server)
    handle = nbd.NBD()
    if kind == "psk":
        handle.set_tls_psk_file(str(psk))
        handle.set_tls_username("pair")
    elif kind != "plain":
        handle.set_tls_certificates(str(authority.client() if kind == "certificate" else authority.nobody()))
    handle.connect_uri(server.tcp_uri("nbd" if kind == "plain" else "nbds", "disk0"))
    with socket.socket(fileno=os.dup(handle.aio_get_fd())) as connection:
        port = connection.getsockname()[1]
    handle.shutdown()
    (said,) = opened(server)
    name, *more = said.split(", ")
    assert name == f"the client at 127.0.0.1 port {port}"
    named = kind == "certificate" and nbdkit_has("peer_tls_dn")
    assert more == ([] if kind == "plain" else ["TLS as 'CN=client'"] if named else ["TLS"])
