# SPDX-License-Identifier: BSD-3-Clause
"""Certificates and keys, made by the `openssl` command; and servers with two listeners, as systemd starts them."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from endpoints import DelayedEndpoint
from nbdprocess import NbdProcess
from nodes import Primary, Secondary
from waiting import DEADLINE_S

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

_CA_CONFIG = """
[ca]
default_ca = expired
[expired]
new_certs_dir = {folder}
database = {folder}/index
serial = {folder}/serial
default_md = sha256
policy = any
[any]
commonName = supplied
"""

HERE = "DNS:localhost,IP:127.0.0.1"


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr


class Authority:
    """A CA, and folders with the files that nbdkit and libnbd want."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._name = name
        self.certificate, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        usage = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=keyCertSign,cRLSign")
        subject = ("-subj", f"/CN={name}", "-days", "30")
        _openssl("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.certificate, *subject, *usage)

    def server(self, name: str = "server", hosts: str = HERE, days: int = 30) -> Path:
        """A folder for a server that `hosts` (subjectAltName) may call itself; with `days` 0 it has expired."""
        return self._folder_with("server", name, hosts, days)

    def client(self, name: str = "client", days: int = 30) -> Path:
        """A folder for a client that can say who it is: CN=NAME; with `days` 0 its certificate has expired."""
        return self._folder_with("client", name, f"DNS:{name}", days)

    def nobody(self, name: str = "nobody") -> Path:
        """A folder for a client without a certificate."""
        folder = self._folder / f"{self._name}-{name}"
        folder.mkdir()
        shutil.copy(self.certificate, folder / "ca-cert.pem")
        return folder

    def _folder_with(self, kind: str, name: str, hosts: str, days: int) -> Path:
        folder = self.nobody(name)
        request, extensions = folder / "request", folder / "extensions"
        extensions.write_text(f"subjectAltName={hosts}\n")
        _openssl("req", *_KEY, "-keyout", folder / f"{kind}-key.pem", "-out", request, "-subj", f"/CN={name}")
        issuer = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-extfile", extensions)
        out = folder / f"{kind}-cert.pem"
        if days > 0:
            _openssl("x509", "-req", "-in", request, "-out", out, "-days", str(days), *issuer)
        else:
            self._sign_expired(request, extensions, out)
        return folder

    def _sign_expired(self, request: Path, extensions: Path, out: Path) -> None:
        """`openssl x509` of 3.5 makes none, of either sign of -days."""
        folder = request.parent / "signed"
        folder.mkdir()
        (folder / "index").touch()
        (folder / "serial").write_text("1000\n")
        (folder / "config").write_text(_CA_CONFIG.format(folder=folder))
        issuer = ("-cert", self.certificate, "-keyfile", self._key, "-config", folder / "config")
        dates = ("-startdate", "20200101000000Z", "-enddate", "20200102000000Z")
        _openssl("ca", "-batch", "-notext", "-in", request, "-out", out, "-extfile", extensions, *dates, *issuer)


def psk_file(path: Path, *users: str) -> Path:
    """A file with a fresh key for every user."""
    path.write_text("".join(f"{user}:{secrets.token_hex(32)}\n" for user in users))
    return path


def reserved_port() -> tuple[socket.socket, int]:
    """A TCP port that nobody else is given as long as the socket is there, and its number. Who binds with SO_REUSEADDR,
    as the servers here do, may listen there all the same, because this socket does not."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder, int(holder.getsockname()[1])


_ACTIVATE = """
import os, socket, sys
unix = socket.socket(socket.AF_UNIX)
unix.bind(sys.argv[1])
tcp = socket.socket()
tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
tcp.bind((sys.argv[2], int(sys.argv[3])))
for number, listener in enumerate((unix, tcp)):
    listener.listen()
    os.dup2(listener.fileno(), 10 + number)
for number in range(2):
    os.dup2(10 + number, 3 + number)
    os.close(10 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
os.execvp(sys.argv[4], sys.argv[4:])
"""


class TwoDoors(NbdProcess):
    """A server that socket activation has given a Unix socket, for the guest, and a TCP port, for the pair.

    To be put before the class of the server: `class Both(TwoDoors, Secondary)`.
    """

    def __init__(self, *arguments: Any, host: str = "127.0.0.1", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.host = host
        # Other tests run at the same time, and a port that is merely free may be another's by the time of the start.
        self._holder, self.port = reserved_port()

    def command(self) -> list[str]:
        command = super().command()
        at = command.index("-U")
        nbdkit = command[:at] + command[at + 2 :]
        return [sys.executable, "-c", _ACTIVATE, str(self.socket_path), self.host, str(self.port), *nbdkit]

    def close(self) -> None:
        super().close()
        self._holder.close()

    def tcp_uri(self, scheme: str = "nbds", export: str = "", host: str = "localhost") -> str:
        """The URI of the TCP port."""
        return f"{scheme}://{host}:{self.port}/{export}"


class SecondaryWithTwoDoors(TwoDoors, Secondary):
    """A secondary of this project."""


class PrimaryWithTwoDoors(TwoDoors, Primary):
    """A primary of this project."""


class EndpointWithTwoDoors(TwoDoors, DelayedEndpoint):
    """nbdkit's own plugins."""
