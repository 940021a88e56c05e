# SPDX-License-Identifier: BSD-3-Clause
"""nbdkit's threads, as Python sees them.

Python keeps a thread state for every thread that runs Python code. For a thread that it has not started, nbdkit's
Python module makes one at the beginning of each callback and takes it away at its end, and with it the thread's stack
of frames, which is mapped and unmapped each time, under a lock of the whole process. That costs more than a small
request: a passthrough of 4k writes at depth 16 does 43k a second with it and 195k without (nbdkit 1.32, Python 3.11, 16
threads).

So a thread keeps its state from its first request on, by holding one more reference to it than nbdkit gives back. The
states of one client are let go when the client has gone: nbdkit has joined its request threads by then, and calls
`close` in the one thread that is left, which has served the requests itself if nbdkit was told to use one thread
(`-t 1`).

The state of an ended thread is deleted by a thread that Python has started itself, and that ends with it. Since Python
3.12 a deletion also clears the deleting thread's own entry in the table of threads that came from outside (pystate.c:
unbind_gilstate_tstate), and nbdkit, which looks its thread up there when the callback ends, would end the process.
A thread of Python's own is never looked up there.
"""

from __future__ import annotations

import ctypes
import os
import threading

from replication.order.worker import NO_THREAD

_api = ctypes.pythonapi  # keeps the GIL
_api.PyGILState_Ensure.restype = ctypes.c_int
_api.PyGILState_Release.argtypes = (ctypes.c_int,)
_api.PyThreadState_Get.restype = ctypes.c_void_p
_api.PyThreadState_Clear.argtypes = (ctypes.c_void_p,)
_api.PyThreadState_Delete.argtypes = (ctypes.c_void_p,)

_LOCKED = 0
"""PyGILState_LOCKED: the thread had the GIL when it asked for it in `keep`."""


class _Here(threading.local):
    """Of the calling thread; it goes when the thread's state goes."""

    kept = False


_here = _Here()

_lock = threading.Lock()
_left: list[tuple[int, int]] = []
"""Thread ids and states of threads that had not ended when the client had gone with which they began: they serve
another one. To be looked at when the next client goes. `_lock` protects it."""


class ThreadStates:
    """The states of the threads that serve one client."""

    def __init__(self) -> None:
        self._states: list[tuple[int, int]] = []

    def keep(self) -> None:
        """Called at the beginning of each request."""
        if not _here.kept:
            _here.kept = True
            _api.PyGILState_Ensure()
            self._states.append((threading.get_native_id(), _api.PyThreadState_Get()))

    def let_go(self) -> None:
        """The client has gone, and no thread serves it any more but the calling one."""
        own = _api.PyThreadState_Get()
        ended = []
        with _lock:
            states = [*self._states, *_left]
            _left.clear()
            self._states = []
            for thread, state in states:
                if state == own:
                    _here.kept = False
                    _api.PyGILState_Release(_LOCKED)
                elif os.path.exists(f"/proc/self/task/{thread}"):
                    # nbdkit's filter multi-conn calls one client's handle from another one's threads.
                    _left.append((thread, state))
                else:
                    ended.append((thread, state))
        if ended:
            deleting = threading.Thread(target=_delete, args=(ended,), name="client-gone")
            try:
                deleting.start()
            except NO_THREAD:  # when the next client goes
                with _lock:
                    _left.extend(ended)
                return
            deleting.join()


def _delete(ended: list[tuple[int, int]]) -> None:
    """Delete the states of threads that are no more."""
    for _, state in ended:
        _api.PyThreadState_Clear(state)
        _api.PyThreadState_Delete(state)
