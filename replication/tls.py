# SPDX-License-Identifier: BSD-3-Clause
"""TLS of the connections that this process makes: whom it trusts, who it is, and why a handshake has failed.

What holds with every libnbd:
* An nbds: URI never falls back to plain text.
* Over TCP no server is used whose certificate nobody has verified: against ca-cert.pem of the folder and nothing else,
  and against the host name in the URI; without a folder against the system's CAs.
* With a PSK both sides prove that they have the key.
* Over a Unix socket only encryption is promised: who listens there is a matter of its folder's permissions.

Facts about libnbd 1.14 (Debian 12) and 1.22 (Debian 13), from lib/crypto.c and lib/uri.c, each seen here:
* 1.14 verifies only over TCP, and only with a folder. Without one it uses whatever the server shows, so that is refused
  here (`check_verified`). 1.22 then verifies against the system's CAs.
* 1.22 also verifies over a Unix socket: the CA, and no name.
* A folder without a readable ca-cert.pem counts as no folder; a missing or unreadable client certificate is left out.
  Both are errors here.
* What GnuTLS found wrong with a certificate is not told, so OpenSSL is asked (`explain`).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import struct
import tempfile
import time
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import nbd

from replication.addresses import connect
from replication.errors import ConfigError
from replication.uri import host_of, is_tls, parameters

_PSK_FILE_MAX = 1 << 20

_OPTION_MAGIC = b"IHAVEOPT"
_GREETING = b"NBDMAGIC" + _OPTION_MAGIC
_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPT_STARTTLS = 5
_REPLY_BYTES = 20
_REPLY_ACK = struct.pack(">I", 1)

_OUT_OF_DATE = (9, 10)
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""

_TCP = "nbds://"

_KNOWS_SYSTEM_CAS = hasattr(nbd.NBD, "set_tls_hostname")
"""Whether libnbd verifies a server without `tls-certificates`. No function tells; 1.22 has this one and does."""

_UNKNOWN_CA = (2, 18, 19, 20, 21)
"""OpenSSL's X509_V_ERR_ of an issuer that it does not have, or of one that vouches for itself."""


@dataclass(frozen=True)
class Tls:
    """What nbdkit's options of the same names say on the server side. Paths are absolute."""

    certificates: str | None = None
    psk: str | None = None
    username: str | None = None

    @classmethod
    def of(cls, uri: str, default: Tls | None) -> Tls | None:
        """What holds for one URI: None unless it demands TLS; what it says itself (tls-certificates and tls-psk-file in
        its query, its user) takes the place of the default. ConfigError names a file that is of no use."""
        if not is_tls(uri):
            return None
        default = default or cls()
        try:
            parts = urlsplit(uri)
            said = parameters(uri)
            username = default.username if parts.username is None else unquote(parts.username)
        except ValueError as error:
            raise ConfigError(f"'{uri}' is not an NBD URI: {error}") from error
        certificates, psk = said.get("tls-certificates"), said.get("tls-psk-file")
        if certificates is None and psk is None:
            return cls(default.certificates, default.psk, username)
        own = cls(certificates, psk, username)
        own.check()
        return own

    def check(self) -> None:
        """ConfigError names what contradicts, or the file that is of no use."""
        if self.certificates is not None and self.psk is not None:
            raise ConfigError("tls-certificates and tls-psk are two ways to the same end: give one of them")
        if self.username is not None and self.psk is None:
            raise ConfigError("tls-username is the user of tls-psk, which is missing")
        if self.certificates is not None:
            _check_certificates(self.certificates)
        if self.psk is not None:
            self._check_psk(self.psk)

    def _check_psk(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                lines = file.read(_PSK_FILE_MAX).decode(errors="replace").splitlines()
        except OSError as error:
            raise ConfigError(f"tls-psk: cannot read {path}: {error.strerror}") from error
        user = self.user
        key = next((line.partition(":")[2] for line in lines if line.startswith(f"{user}:")), None)
        if key is None:
            raise ConfigError(f"tls-psk: there is no line '{user}:KEY' in {path} (tls-username says whose it is)")
        if not re.fullmatch(r"([0-9a-fA-F]{2})+", key):
            raise ConfigError(f"tls-psk: the key of '{user}' in {path} is not hexadecimal")

    @property
    def user(self) -> str:
        """Who this side is with a PSK: by default the login name, as libnbd takes it."""
        if self.username is not None:
            return self.username
        try:
            return str(nbd.NBD().get_tls_username())
        except nbd.Error as error:
            raise ConfigError(f"tls-psk needs tls-username: the login name is not known ({error.string})") from error

    def put_on(self, handle: nbd.NBD) -> None:
        """Prepare a handle that is about to connect."""
        if self.certificates is not None:
            handle.set_tls_certificates(self.certificates)
        if self.psk is not None:
            handle.set_tls_psk_file(self.psk)
        if self.username is not None:
            handle.set_tls_username(self.username)

    def check_verified(self, uri: str) -> None:
        """For a handle that has shaken hands: ConfigError if that was with a server that nobody has verified."""
        if self.certificates is None and self.psk is None and not _KNOWS_SYSTEM_CAS and uri.startswith(_TCP):
            raise ConfigError(
                "this libnbd does not verify the server without tls-certificates (a folder with ca-cert.pem; for the"
                " system's CAs a link to /etc/ssl/certs/ca-certificates.crt) or tls-psk"
            )


def _check_certificates(folder: str) -> None:
    """The files that libnbd takes from the folder, under nbdkit's names for them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    names = ("ca-cert.pem", "ca-crl.pem", "client-cert.pem", "client-key.pem")
    paths = [os.path.join(folder, name) for name in names]
    for path, needed in zip(paths, (True, False, False, False), strict=True):
        if needed or os.path.lexists(path):
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise ConfigError(f"tls-certificates: cannot read {path}: {error.strerror}") from error
    authority, _, certificate, key = paths
    if os.path.exists(certificate) != os.path.exists(key):
        raise ConfigError(f"tls-certificates: of client-cert.pem and client-key.pem only one is in {folder}")
    try:
        context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise ConfigError(f"tls-certificates: there is no certificate in {authority}") from error
    if os.path.exists(certificate):
        try:
            # Nobody is there to be asked for a password.
            context.load_cert_chain(certificate, key, password=lambda: b"")
        except ssl.SSLError as error:
            why = error.reason or "not in PEM"
            raise ConfigError(f"tls-certificates: {certificate} and client-key.pem are no pair: {why}") from error


# -- why a handshake has failed ---------------------------------------------------------------------------------------


def explain(uri: str, said: str, tls: Tls, deadline: float) -> str:
    """What libnbd said of a connection that failed, and what it means. Before `deadline` (time.monotonic) the server
    may be asked once more."""
    said = said.removeprefix("nbd_aio_notify_read: ").removeprefix("nbd_aio_notify_write: ")
    if "certificate verification" in said:
        found = _verdict(uri, tls, deadline) or "it is of another CA, expired, or of another host"
        return f"the server's certificate is refused: {found}"
    if "gnutls" not in said:
        return said
    if tls.psk is not None and "Insufficient credentials" in said:
        return f"the server wants certificates, but tls-psk was given ({said})"
    if tls.psk is not None:
        return f"the server refuses the key of '{tls.user}': tls-psk has to be the same there ({said})"
    if "gnutls_record" in said:
        return f"the server refuses the client certificate, or there is none in tls-certificates{_own(tls)} ({said})"
    return f"the server broke the TLS handshake off; perhaps it wants tls-psk ({said})"


def _own(tls: Tls) -> str:
    """Which client certificate was shown, and its dates: one that was renewed is read at the next attempt."""
    path = os.path.join(tls.certificates or "", "client-cert.pem")
    dates = _dates(path)
    return "" if dates is None else f": {path} {dates}"


def _dates(path: str) -> str | None:
    """From when until when the certificate in a file is valid, None if that cannot be said."""
    try:
        # What the ssl module decodes a peer's certificate with; it is not public, so it may be missing.
        shown = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]
        return f"is valid from {shown['notBefore']} until {shown['notAfter']}"
    except (OSError, AttributeError, KeyError):  # ssl.SSLError is an OSError
        return None


def _verdict(uri: str, tls: Tls, deadline: float) -> str | None:
    """What OpenSSL finds wrong with the server's certificate; None if nothing, or if it cannot be asked."""
    server = host_of(uri)
    if server is None:
        return None
    authority = None if tls.certificates is None else os.path.join(tls.certificates, "ca-cert.pem")
    try:
        context = ssl.create_default_context(cafile=authority)
        _shake_hands(context, server, deadline)
    except ssl.SSLCertVerificationError as error:
        found = error.verify_message.rstrip(".")
        if error.verify_code in _OUT_OF_DATE:
            return f"{found}{_out_of_date(server, authority, deadline)}"
        if error.verify_code not in _UNKNOWN_CA:
            return found
        if authority is None:
            return f"{found} (its CA is none of this system's; tls-certificates names another)"
        return f"{found} (its CA is not the one in {authority})"
    except (OSError, ValueError):
        # The failure that is to be explained has been noticed; this one would only be another.
        return None
    return None


def _shake_hands(context: ssl.SSLContext, server: tuple[str, int], deadline: float) -> bytes:
    """The certificate that the server shows, as DER; OSError or ValueError."""
    with connect(*server, deadline) as link:
        _start_tls(link, deadline)
        link.settimeout(_left_s(deadline))
        with context.wrap_socket(link, server_hostname=server[0]) as shaken:
            return shaken.getpeercert(binary_form=True) or b""


def _out_of_date(server: tuple[str, int], authority: str | None, deadline: float) -> str:
    """Which files these are, and their dates: the server's, which only it has, and that of the CA."""
    said = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: its dates are all that is wanted
    with contextlib.suppress(OSError, ValueError), tempfile.NamedTemporaryFile("w", suffix=".pem") as shown:
        shown.write(ssl.DER_cert_to_PEM_cert(_shake_hands(context, server, deadline)))
        shown.flush()
        said.append(f"server-cert.pem in the folder of the server's --tls-certificates {_dates(shown.name)}")
    dates = None if authority is None else _dates(authority)
    if dates is not None:
        said.append(f"{authority} {dates}")
    return f" ({'; '.join(said)}; nbdkit reads its own when it starts)" if said else ""


def _left_s(deadline: float) -> float:
    """For a socket's timeout, which 0 would switch to non-blocking."""
    return max(deadline - time.monotonic(), 0.001)


def _start_tls(link: socket.socket, deadline: float) -> None:
    """NBD's part of the handshake; ValueError when the server does not play it."""
    if not _received(link, len(_GREETING) + 2, deadline).startswith(_GREETING):
        raise ValueError("no NBD server")
    link.sendall(struct.pack(">I8sII", _FIXED_NEWSTYLE_NO_ZEROES, _OPTION_MAGIC, _OPT_STARTTLS, 0))
    if _received(link, _REPLY_BYTES, deadline)[12:16] != _REPLY_ACK:
        raise ValueError("no TLS")


def _received(link: socket.socket, length: int, deadline: float) -> bytes:
    """Just so many bytes."""
    data = b""
    while len(data) < length:
        link.settimeout(_left_s(deadline))
        more = link.recv(length - len(data))
        if not more:
            raise ValueError("the server closed the connection")
        data += more
    return data
