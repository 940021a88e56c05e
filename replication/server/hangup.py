# SPDX-License-Identifier: BSD-3-Clause
"""A client that hangs up in mid-request must not take the process with it. For nbdkit 1.32 only, that is for Debian 12:
this file, `Abilities.survives_hangups` and `_unended` in plugin.py can go with it.

nbdkit before 1.34 has a race: when a client dies with several requests in flight, the first reply that cannot be sent
closes the sending side, and a second thread that is just about to send finds it closed and ends the process:
`connections.c:402: raw_send_socket: Assertion `sock >= 0' failed`. Killing a client with 64 writes in flight did
this to a secondary in 37 of 400 tries, and a primary that dies is the very case that this project is for. nbdkit 1.34
has mended it ("Don't assert on send if client hangs up early"), and there nothing is installed.

A failed assertion raises SIGABRT in the thread that it concerns. The handler here lets every abort go on but this one:
that thread is put to sleep for good. It belongs to a connection that is dead, and holds a lock that only this
connection's threads want; what is lost is these threads' memory, and that nbdkit waits for them in vain when it
ends, so `Disconnector` then ends the process itself.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import time
from typing import Any

from replication.log import log

_ASSERTION = (b"raw_send_socket: Assertion", b"raw_send_other: Assertion")

STUCK_MAX = 64
"""Threads put to sleep before the process is given up after all: each costs up to 16 threads of its connection."""
_SIGSET_BYTES = 128
_FRAMES_MAX = 64

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


class _Sigaction(ctypes.Structure):
    """struct sigaction of glibc on Linux."""

    _fields_ = (
        ("sa_handler", _Handler),
        ("sa_mask", ctypes.c_char * _SIGSET_BYTES),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_void_p),
    )


class _Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Symbol(ctypes.Structure):
    """Dl_info of glibc."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class HangupGuard:
    """Keeps the process alive through nbdkit's assertion."""

    def __init__(self) -> None:
        self.stuck = 0
        """Threads asleep for good."""
        self._libc = ctypes.CDLL(None)
        try:
            # Where glibc leaves the text of a failed assertion for debuggers; private, but there for many years.
            self._message: Any = ctypes.c_void_p.in_dll(self._libc, "__abort_msg")
        except ValueError:
            self._message = None
        self._handler = _Handler(self._aborted)

    def install(self) -> None:
        """Handle SIGABRT from now on. Without glibc's text nothing is handled: no abort may be kept by guess."""
        if self._message is None:
            log("this C library does not tell why it aborts; a client that dies may end the process")
            return
        # The first call loads a library, which nobody should do in a signal handler.
        self._in_assertion()
        self._libc.process_vm_readv.restype = ctypes.c_ssize_t
        self._libc.process_vm_readv.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_ulong,
        )
        action = _Sigaction(self._handler, b"", 0, None)
        self._libc.sigaction(int(signal.SIGABRT), ctypes.byref(action), None)

    def _aborted(self, _signal: int) -> None:
        """In the thread that has aborted, in C code of nbdkit and so without the GIL until here."""
        if not self._concerns_a_connection():
            # Returning would go on with an abort(), but not with a signal from outside. It is blocked until then.
            self._libc.signal(int(signal.SIGABRT), None)
            self._libc["raise"](int(signal.SIGABRT))
            return
        log("a client hung up with requests in flight; the failed assertion above concerns its connection only")
        while True:
            time.sleep(3600.0)

    def _concerns_a_connection(self) -> bool:
        # The text stays there when an abort without one follows, so it alone says nothing.
        if self.stuck >= STUCK_MAX or not self._in_assertion():
            return False
        text = self._read_message()
        if not any(known in text for known in _ASSERTION):
            return False
        self.stuck += 1
        return True

    def _read_message(self) -> bytes:
        """The text of the last failed assertion. Another that fails meanwhile replaces it and unmaps this one, so it
        is not read in place; then the new one is taken."""
        for _ in range(STUCK_MAX):
            # struct abort_msg_s: an int of the size, then the text; it begins a page of its own.
            address = (self._message.value or 0) + ctypes.sizeof(ctypes.c_int)
            text = ctypes.create_string_buffer(mmap.PAGESIZE - address % mmap.PAGESIZE)
            into = _Iovec(ctypes.addressof(text), len(text))
            out_of = _Iovec(address, len(text))
            if self._libc.process_vm_readv(os.getpid(), ctypes.byref(into), 1, ctypes.byref(out_of), 1, 0) > 0:
                return text.raw
        return b""

    def _in_assertion(self) -> bool:
        """Whether this thread is in glibc's __assert_fail."""
        frames = (ctypes.c_void_p * _FRAMES_MAX)()
        found = _Symbol()
        for frame in frames[: self._libc.backtrace(frames, _FRAMES_MAX)]:
            # The call does not return, so its return address may lie behind the function.
            address = ctypes.c_void_p((frame or 1) - 1)
            if self._libc.dladdr(address, ctypes.byref(found)) and found.name == b"__assert_fail":
                return True
        return False
