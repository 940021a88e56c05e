# SPDX-License-Identifier: BSD-3-Clause
"""How the thread that forwards tells a request's thread that the secondary has answered."""

from __future__ import annotations

import ctypes
import errno
import time


class _Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# Both let go of the GIL; `wait` also while it waits.
_library = ctypes.CDLL(None, use_errno=True)
_sem_post = _library.sem_post
_sem_post.argtypes = (ctypes.c_void_p,)
_sem_clockwait = _library.sem_clockwait
_sem_clockwait.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

_Semaphore = ctypes.c_char * 32
"""sem_t: its size on 64-bit machines (16 elsewhere). All zero, it is an unnamed one of this process with the value 0.
(ctypes.create_string_buffer looks the type up for each.)"""


class Ended:
    """That an entry has ended, for who waits.

    A semaphore of the C library, posted without the GIL. Who posts one with it wakes a thread that at once has to sleep
    again, for the GIL: a Lock, 4k writes with protocol=sync at depth 16 on one core: 25.0k a second, so 26.7k.
    """

    __slots__ = ("_address", "_semaphore", "told")

    def __init__(self) -> None:
        self._semaphore = _Semaphore()
        self._address = ctypes.addressof(self._semaphore)
        self.told = False

    def set(self) -> None:
        """It has."""
        self.told = True
        _sem_post(self._address)

    def wait(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds; whether it has."""
        return self.told or self.wait_until(time.monotonic() + timeout_s)

    def wait_until(self, until_s: float) -> bool:
        """Wait until then at most (seconds, monotonic); whether it has."""
        if self.told:
            return True
        until = _Timespec(int(until_s), int(until_s % 1 * 1e9))
        while _sem_clockwait(self._address, time.CLOCK_MONOTONIC, ctypes.addressof(until)):
            if ctypes.get_errno() != errno.EINTR:
                return self.told
        _sem_post(self._address)  # for whoever waits as well
        return True
