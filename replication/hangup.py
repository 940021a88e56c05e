# SPDX-License-Identifier: BSD-3-Clause
"""A client that hangs up in mid-request must not take the process with it.

nbdkit 1.32 has a race: when a client dies with several requests in flight, the first reply that cannot be sent
closes the sending side, and a second thread that is just about to send finds it closed and ends the process:
`connections.c:402: raw_send_socket: Assertion `sock >= 0' failed`. Killing a client with 64 writes in flight did
this to a secondary in 37 of 400 tries, and a primary that dies is the very case that this project is for. (Upstream has
mended it in 1.35: "Don't assert on send if client hangs up early".)

A failed assertion raises SIGABRT in the thread that it concerns. The handler here lets every abort go on but this one:
that thread is put to sleep for good. It belongs to a connection that is dead, and holds a lock that only this
connection's threads want; what is lost is these threads' memory, and that nbdkit waits for them in vain when it
ends, so `Disconnector` then ends the process itself.
"""

from __future__ import annotations

import ctypes
import signal
import time
from typing import Any

from replication.log import log

_ASSERTION = (b"raw_send_socket: Assertion", b"raw_send_other: Assertion")
_ABORT_MESSAGE_MAX = 4096

STUCK_MAX = 64
"""Threads put to sleep before the process is given up after all: each costs up to 16 threads of its connection."""
_SIGSET_BYTES = 128

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


class _Sigaction(ctypes.Structure):
    """struct sigaction of glibc on Linux."""

    _fields_ = (
        ("sa_handler", _Handler),
        ("sa_mask", ctypes.c_char * _SIGSET_BYTES),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_void_p),
    )


class HangupGuard:
    """Keeps the process alive through nbdkit's assertion."""

    def __init__(self) -> None:
        self.stuck = 0
        """Threads asleep for good."""
        self._libc = ctypes.CDLL(None)
        try:
            # Where glibc leaves the text of a failed assertion for debuggers; private, but there for many years.
            self._message: Any = ctypes.POINTER(ctypes.c_char).in_dll(self._libc, "__abort_msg")
        except ValueError:
            self._message = None
        self._handler = _Handler(self._aborted)

    def install(self) -> None:
        """Handle SIGABRT from now on. Without glibc's text nothing is handled: no abort may be kept by guess."""
        if self._message is None:
            log("this C library does not tell why it aborts; a client that dies may end the process")
            return
        action = _Sigaction(self._handler, b"", 0, None)
        self._libc.sigaction(int(signal.SIGABRT), ctypes.byref(action), None)

    def _aborted(self, _signal: int) -> None:
        """In the thread that has aborted, in C code of nbdkit and so without the GIL until here; returning goes on
        with the abort."""
        if not self._message:
            return
        # struct abort_msg_s: an int of the size, then the text.
        address = ctypes.addressof(self._message.contents) + ctypes.sizeof(ctypes.c_int)
        text = ctypes.string_at(address)[:_ABORT_MESSAGE_MAX]
        if not any(known in text for known in _ASSERTION) or self.stuck >= STUCK_MAX:
            return
        self.stuck += 1
        log("a client hung up with requests in flight; the failed assertion above concerns its connection only")
        while True:
            time.sleep(3600.0)
