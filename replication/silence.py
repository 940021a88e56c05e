# SPDX-License-Identifier: BSD-3-Clause
"""How long the kernel at the other end of a TCP connection owes an acknowledgement (Linux)."""

from __future__ import annotations

import socket
import struct

_TCP_INFO = struct.Struct("=3xB20xI16xI8xI")
"""Of struct tcp_info (linux/tcp.h): tcpi_probes, tcpi_unacked, tcpi_last_data_sent and tcpi_last_ack_recv."""


def silent_s(found: socket.socket) -> float | None:
    """For how many seconds nothing has come from a host that owes an answer to what was sent last; None if it has
    answered that, or it is not known, as of a socket of another kind. What was sent now, after a silence, is owed for
    as long as that: so only what is owed for some time says anything."""
    try:
        info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:
        return None
    if len(info) < _TCP_INFO.size:
        return None
    probes, unacknowledged, sent_ms, heard_ms = _TCP_INFO.unpack(info)
    return heard_ms / 1000 if probes or (unacknowledged and sent_ms < heard_ms) else None
