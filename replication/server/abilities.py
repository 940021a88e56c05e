# SPDX-License-Identifier: BSD-3-Clause
"""What the nbdkit that runs us can do.

Whatever depends on nbdkit's version asks here, and here the API decides that is there, not a version number. A function
that this nbdkit has, but not for Python, is called by ctypes:

    function                          nbdkit   its Python module
    nbdkit_peer_name                  1.14     never (1.42 is the newest seen)
    nbdkit_is_tls                     1.22     1.38
    nbdkit_peer_pid, _uid, _gid       1.24     1.38
    nbdkit_disconnect                 1.34     1.34
    nbdkit_peer_tls_dn                1.40     1.40
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

_SOCKADDR_BYTES = 128  # struct sockaddr_storage


class Credentials(NamedTuple):
    """The process at the other end of a Unix socket."""

    pid: int
    uid: int
    gid: int


class Abilities:
    """Of one nbdkit. The methods are about the client whose request the calling thread serves: only in callbacks."""

    def __init__(self, api: Any) -> None:
        """`api` is the module `nbdkit`, which only plugin.py can import."""
        self._api = api
        self._library: Any = ctypes.CDLL(None)

    @property
    def survives_hangups(self) -> bool:
        """Whether nbdkit itself lives on when a client dies with requests in flight (hangup.py). That was mended in
        the version that brought `disconnect`."""
        return hasattr(self._api, "disconnect")

    def peer_name(self) -> bytes | None:
        """The client's `struct sockaddr`; None for a pipe (nbdkit -s)."""
        address = ctypes.create_string_buffer(_SOCKADDR_BYTES)
        length = ctypes.c_uint32(_SOCKADDR_BYTES)
        if self._library.nbdkit_peer_name(address, ctypes.byref(length)) == -1:
            return None
        return address.raw[: length.value]

    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        if hasattr(self._api, "is_tls"):
            return bool(self._api.is_tls())
        return bool(self._library.nbdkit_is_tls() == 1)

    def peer_credentials(self) -> Credentials | None:
        """Who is at the other end of a Unix socket; None if the kernel does not say. Do not ask of another socket:
        nbdkit logs that as an error."""
        values = [self._peer_number(name) for name in ("peer_pid", "peer_uid", "peer_gid")]
        return Credentials(*values) if min(values) >= 0 else None

    def _peer_number(self, name: str) -> int:
        ask = getattr(self._api, name, None)
        if ask is None:
            ask = self._library[f"nbdkit_{name}"]
            ask.restype = ctypes.c_int64
        try:
            return int(ask())
        except RuntimeError:  # of the Python module, instead of -1
            return -1

    @property
    def tells_tls_names(self) -> bool:
        """Whether `peer_tls_dn` has an answer."""
        return hasattr(self._api, "peer_tls_dn")

    def peer_tls_dn(self) -> str | None:
        """The distinguished name in the client's certificate, empty if it has shown none; None if this nbdkit does not
        tell."""
        if not self.tells_tls_names:
            return None
        try:
            return str(self._api.peer_tls_dn())
        except RuntimeError:
            return ""
