# SPDX-License-Identifier: BSD-3-Clause
"""NBD URIs, read as libnbd reads them, so that both mean the same export, user and file.

Facts about libnbd 1.14 (lib/uri.c), each tried here:
* Percent signs introduce bytes in hexadecimal, everywhere; a plus sign is a plus sign.
* The query is cut at the next `&`, or at the next `;` where no `&` follows. Of a parameter given twice the last one
  counts, also if it is empty.
* A relative path counts from the working folder of the process, which nbdkit changes when it goes into the background.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import nbd

from replication.errors import ConfigError

_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")
_TLS_URI = re.compile(r"nbds(\+unix|\+vsock)?://")
_SOCKET = "socket"
_FILES = (_SOCKET, "tls-certificates", "tls-psk-file")
"""Parameters that name files."""

SOCKET_PATH_MAX = 107
"""Bytes of a path that fit into the address of a Unix socket (sun_path, unix(7))."""


def is_uri(location: str) -> bool:
    """Whether libnbd, not open(2), opens it."""
    return _URI.match(location) is not None


def is_tls(uri: str) -> bool:
    """Whether the URI demands TLS."""
    return _TLS_URI.match(uri) is not None


def export_of(uri: str) -> str:
    """The export name in an NBD URI, empty if it has none (NBD URI specification)."""
    try:
        return unquote(urlsplit(uri).path.removeprefix("/"))
    except ValueError as error:
        raise ConfigError(f"'{uri}' is not an NBD URI: {error}") from error


PORT = 10809
"""Where NBD servers listen (IANA)."""


def host_of(uri: str) -> tuple[str, int] | None:
    """Name and port of a server that is reached over TCP; None for the other kinds."""
    if not re.match(r"nbds?://", uri):
        return None
    try:
        parts = urlsplit(uri)
        return None if parts.hostname is None else (parts.hostname, parts.port or PORT)
    except ValueError:
        return None  # libnbd says what is wrong


def parameters(uri: str) -> dict[str, str]:
    """The query, decoded: paths as os.fsencode takes them."""
    return {name: _decoded(value) for _, name, value, _ in _spelled(_parts(uri)[1]) if name}


def absolute(uri: str, folder: str) -> str:
    """The same URI with the paths in its query made absolute, from `folder`. ConfigError when a socket's path becomes,
    or is, too long for the kernel."""
    head, query, tail = _parts(uri)
    made = "".join(
        separator + (text[: -len(value)] + _placed(name, value, folder) if name in _FILES and value else text)
        for separator, name, value, text in _spelled(query)
    )
    return f"{head}?{made}{tail}" if query else uri


def _placed(name: str, value: str, folder: str) -> str:
    path = _decoded(value)
    whole = os.path.join(folder, path)
    if name == _SOCKET and len(os.fsencode(whole)) > SOCKET_PATH_MAX:
        raise ConfigError(f"{whole} is too long for the path of a Unix socket, which has {SOCKET_PATH_MAX} bytes")
    return value if whole == path else quote(os.fsencode(whole))


def _decoded(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text))


def _parts(uri: str) -> tuple[str, str, str]:
    """What comes before the query, the query, and what comes after it."""
    body, mark, fragment = uri.partition("#")
    head, _, query = body.partition("?")
    return head, query, mark + fragment


@functools.cache
def _socket_in_any_case() -> bool:
    """Whether libnbd takes `SOCKET` for `socket`, as it does with the other names. No function tells, so it is tried
    with a path that nobody can listen at: 1.14 misses the socket, 1.22 cannot connect."""
    try:
        nbd.NBD().aio_connect_uri(f"nbd+unix:///?SOCKET={os.devnull}/none")
    except nbd.Error as error:
        return bool(error.errnum != errno.EINVAL)
    return True


def _spelled(query: str) -> Iterator[tuple[str, str, str, str]]:
    """(separator before it, name, encoded value, text) of each section of a query."""
    separator = ""
    while query or separator:
        cut = query.find("&")
        if cut < 0:
            cut = query.find(";")
        text, following = (query, "") if cut < 0 else (query[:cut], query[cut])
        name, _, value = text.partition("=")
        name = _decoded(name)
        if name.lower() in _FILES[1:] or (name.lower() == _SOCKET and _socket_in_any_case()):
            name = name.lower()
        yield separator, name, value, text
        query, separator = query[len(text) + 1 :], following
