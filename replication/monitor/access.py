# SPDX-License-Identifier: BSD-3-Clause
"""Where the web server listens, and who may read.

On a loopback address anybody on this host may. Any other address needs TLS and a token; without both it is refused.
A program sends the token as `Authorization: Bearer TOKEN`; a browser asks for a name, which does not matter, and a
password, which is the token.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
import ssl
import stat
from dataclasses import dataclass

from replication.errors import ConfigError

DEFAULT_LISTEN = "127.0.0.1:10810"
TOKEN_MIN, TOKEN_MAX = 16, 1024


@dataclass(frozen=True)
class Access:
    """Where to listen, and what to ask for."""

    host: str
    port: int
    token: bytes | None = None
    tls: ssl.SSLContext | None = None

    def admits(self, header: str | None) -> bool:
        """Whether a request with this Authorization header may be answered."""
        if self.token is None:
            return True
        kind, _, given = (header or "").partition(" ")
        if kind.lower() == "bearer":
            found = given.strip().encode("utf-8", "replace")
        elif kind.lower() == "basic":
            try:
                found = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        else:
            return False
        return hmac.compare_digest(found, self.token)

    def knows_host(self, header: str | None) -> bool:
        """Whether the Host header is one of ours. Without a token nothing else keeps the page of a stranger, whose
        name leads to 127.0.0.1, from having a browser on this host read this one."""
        if self.token is not None or header is None:
            return True
        name = header.strip().lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        return name in ("localhost", self.host.lower()) or _is_loopback(name)


def make_access(
    listen: str = DEFAULT_LISTEN,
    token_file: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
) -> Access:
    """What the command line says; ConfigError when it cannot be, or is not safe."""
    host, port = _address(listen)
    token = None if token_file is None else _read_token(token_file)
    tls = None
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            tls.load_cert_chain(certificate, key or certificate)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--tls-certificate={certificate}: {error}") from error
    elif key is not None:
        raise ConfigError("--tls-key needs --tls-certificate")
    if not _is_loopback(host) and (token is None or tls is None):
        raise ConfigError(
            f"--listen={listen}: others than this host can reach that address: it needs --tls-certificate and "
            "--token-file"
        )
    return Access(host, port, token, tls)


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--listen={listen} is not ADDRESS:PORT, such as {DEFAULT_LISTEN}")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    """Whether it is a loopback address; no other name counts as one, whatever it means today."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_token(path: str) -> bytes:
    """The first line of the file; ConfigError unless it is long enough, and for its owner and group only."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(TOKEN_MAX + 2).partition(b"\n")[0].strip()
    except OSError as error:
        raise ConfigError(f"--token-file={path}: {error.strerror}") from error
    if stat.S_ISREG(mode) and mode & 0o007:
        raise ConfigError(f"--token-file={path}: everybody may read or change it; chmod o= it")
    if not TOKEN_MIN <= len(token) <= TOKEN_MAX:
        raise ConfigError(f"--token-file={path}: its first line has to have {TOKEN_MIN} to {TOKEN_MAX} characters")
    return token
