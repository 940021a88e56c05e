# SPDX-License-Identifier: BSD-3-Clause
"""Memory for copying, used again: the page faults of a fresh megabyte cost as much as reading into it."""

from __future__ import annotations

from collections import deque

_KEPT = 4
"""Most buffers kept for the next use. More are in use where more requests copy at one time."""

_SMALL = 32 << 10
"""Up to this length fresh memory is as quick: the allocator has it at hand."""


class Buffers:
    """Gives out memory and takes it back. May be used by several threads at once."""

    def __init__(self, longest: int) -> None:
        """`longest`: of a buffer, in bytes."""
        self._longest = longest
        # Its own operations are atomic.
        self._spare: deque[bytearray] = deque(maxlen=_KEPT)

    def take(self, length: int) -> memoryview:
        """`length` bytes of whatever content."""
        if length <= _SMALL:
            return memoryview(bytearray(length))
        try:
            whole = self._spare.pop()
        except IndexError:
            whole = bytearray(self._longest)
        return memoryview(whole)[:length]

    def give(self, buffer: memoryview) -> None:
        """Take back what `take` has given. Not after a request with it has failed: the answer to one that was given up
        may still be on its way into it."""
        if len(buffer) > _SMALL:
            whole = buffer.obj
            assert isinstance(whole, bytearray)
            self._spare.append(whole)
