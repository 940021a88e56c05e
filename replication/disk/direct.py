# SPDX-License-Identifier: BSD-3-Clause
"""libnbd calls that keep the GIL, for a handle that only one thread uses.

The `nbd` module lets go of the GIL around every call and for every callback, and has to win it back each time. For
a thread that sends and collects thousands of small writes beside the threads of a busy guest this fight costs more
than the calls, which never wait: 4k writes at depth 16 over a disk of 1 ms a request, 8.4k a second with the module,
9.6k with these; with a slow secondary as well, 7.4k and 9.4k.

A second thread must not use the handle: while it holds the handle's lock inside a call of the module, its callback
would wait for the GIL that a thread here keeps while it waits for the lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import nbd


class _Completion(ctypes.Structure):
    """nbd_completion_callback of libnbd.h, passed by value; null: ask with peek."""

    _fields_ = (("callback", ctypes.c_void_p), ("user_data", ctypes.c_void_p), ("free", ctypes.c_void_p))


_NO_CALLBACK = _Completion(None, None, None)

_library = ctypes.PyDLL("libnbd.so.0")
_library.nbd_poll.argtypes = (ctypes.c_void_p, ctypes.c_int)
_library.nbd_aio_pwrite.restype = ctypes.c_int64
_library.nbd_aio_pwrite.argtypes = (
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_uint64,
    _Completion,
    ctypes.c_uint32,
)
_library.nbd_aio_peek_command_completed.restype = ctypes.c_int64
_library.nbd_aio_peek_command_completed.argtypes = (ctypes.c_void_p,)
_library.nbd_aio_command_completed.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
_library.nbd_get_error.restype = ctypes.c_char_p

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)


class DirectCalls:
    """The calls on one handle. None of them waits."""

    def __init__(self, handle: nbd.NBD) -> None:
        """The handle must stay alive as long as this."""
        self._handle = _pointer_of(handle._o, b"nbd_handle")

    def pwrite(self, data: bytes | memoryview, offset: int, flags: int) -> int:
        """Begin a write and return its cookie; `data` (a memoryview of memory that may be written) must stay alive
        until `finished` has named it. OSError when libnbd refuses."""
        start = data if isinstance(data, bytes) else ctypes.byref(ctypes.c_char.from_buffer(data))
        cookie = int(_library.nbd_aio_pwrite(self._handle, start, len(data), offset, _NO_CALLBACK, flags))
        if cookie < 0:
            raise self._error()
        return cookie

    def poll(self) -> bool:
        """Move what can be moved; whether anything was. OSError when the connection is lost."""
        moved = int(_library.nbd_poll(self._handle, 0))
        if moved < 0:
            raise self._error()
        return moved > 0

    def finished(self) -> Iterator[tuple[int, int]]:
        """The cookie and the errno (0: success) of each write that has ended."""
        while (cookie := int(_library.nbd_aio_peek_command_completed(self._handle))) > 0:
            succeeded = _library.nbd_aio_command_completed(self._handle, cookie) == 1
            yield cookie, 0 if succeeded else int(_library.nbd_get_errno())

    @staticmethod
    def _error() -> OSError:
        text = _library.nbd_get_error() or b"libnbd gives no reason"
        return OSError(int(_library.nbd_get_errno()), text.decode(errors="replace"))
