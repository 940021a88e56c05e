# SPDX-License-Identifier: BSD-3-Clause
"""Memory for large pieces of data, used again: the kernel clears and maps fresh memory page by page, which costs as
much as copying into it, and a bytearray is cleared once more, with the GIL held (a megabyte: 18 us)."""

from __future__ import annotations

import mmap
import threading

from replication.errors import DiskError

SMALL = 32 << 10
"""Up to this length fresh memory is as quick: the allocator has it at hand."""

_SHORTEST = 64 << 10

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
"""Python's own choice is shared memory, of which each piece counts against vm.max_map_count (65530), which a long queue
reaches; private pieces that are neighbours count as one. They are also quicker to fault in (1 MiB: 0.45 instead of 0.64
ms)."""


class Buffers:
    """Gives out memory and takes it back. May be used by several threads at once."""

    def __init__(self, kept: int) -> None:
        """`kept`: most bytes that are kept for the next use. More are in use where more are taken at one time."""
        self._kept = kept
        # Protects the fields below.
        self._lock = threading.Lock()
        # By length, a power of two.
        self._spare: dict[int, list[mmap.mmap]] = {}
        self._bytes = 0

    @property
    def spare_bytes(self) -> int:
        """Bytes of memory kept at present."""
        return self._bytes

    def take(self, length: int) -> memoryview:
        """`length` bytes of whatever content. DiskError when there is no memory."""
        if length <= SMALL:
            return memoryview(bytearray(length))
        whole = max(_SHORTEST, 1 << (length - 1).bit_length())
        with self._lock:
            spare = self._spare.get(whole)
            memory = spare.pop() if spare else None
            if memory is not None:
                self._bytes -= whole
        if memory is None:
            try:
                memory = mmap.mmap(-1, whole, flags=_PRIVATE)
            except OSError as error:
                raise DiskError.from_os(f"taking {whole} bytes of memory", error) from error
        return memoryview(memory)[:length]

    def give(self, buffer: memoryview) -> None:
        """Take back what `take` has given. Not after a request with it has failed: the answer to one that was given up
        may still be on its way into it."""
        if len(buffer) <= SMALL:
            return
        memory = buffer.obj
        assert isinstance(memory, mmap.mmap)
        whole = len(memory)
        with self._lock:
            if self._bytes + whole > self._kept:
                self._make_room_locked(whole)
            if self._bytes + whole <= self._kept:
                self._spare.setdefault(whole, []).append(memory)
                self._bytes += whole

    def _make_room_locked(self, whole: int) -> None:
        """Memory of another length goes first: requests have changed their size."""
        for length, spare in self._spare.items():
            while length != whole and spare and self._bytes + whole > self._kept:
                spare.pop()
                self._bytes -= length
