# SPDX-License-Identifier: BSD-3-Clause
"""What a node, or the monitor, tells systemd: datagrams to the socket that NOTIFY_SOCKET names (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from replication.log import log

_SEND_S = 1.0
"""systemd reads at once; nothing of the node waits for these threads."""


class Notifier:
    """Tells; without a socket it tells nobody."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        given = environment.get("NOTIFY_SOCKET", "")
        # An abstract name begins with a zero byte. Other kinds (vsock:...) are for virtual machines.
        self._address = "\0" + given[1:] if given.startswith("@") else given if given.startswith("/") else None
        self._failed = False
        self.watchdog_s = _watchdog_s(environment)
        """Seconds within which systemd wants a sign of life, None if it does not."""

    @property
    def heard(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address is not None

    def tell(self, **fields: object) -> None:
        """Send assignments such as READY=1 together; never an error, which is logged once."""
        if self._address is None:
            return
        text = "\n".join(f"{key}={value}" for key, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_S)
                sender.sendto(text.encode(), self._address)
        except OSError as error:
            if not self._failed:
                log(f"cannot notify {os.environ.get('NOTIFY_SOCKET')}: {error.strerror or error}")
            self._failed = True
        else:
            self._failed = False

    def reloading(self) -> None:
        """A reload has begun; READY=1 ends it. The time is how systemd knows which reload it was."""
        self.tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    given = environment.get("WATCHDOG_USEC", "")
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(given) / 1e6 if given.isascii() and given.isdigit() and int(given) else None
