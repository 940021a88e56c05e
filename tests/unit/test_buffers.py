# SPDX-License-Identifier: BSD-3-Clause
"""buffers.py: memory that comes back is given out again, to one at a time, and not without bound."""

from __future__ import annotations

import pytest

from replication.image.buffers import _KEPT, _SMALL, Buffers


@pytest.mark.parametrize("length", [1, _SMALL, _SMALL + 1, 1 << 20])
def test_a_buffer_is_as_long_as_asked_for(length: int) -> None:
    assert len(Buffers(1 << 20).take(length)) == length


def test_what_was_given_back_is_used_again_and_what_was_not_never_is() -> None:
    buffers = Buffers(1 << 20)
    first, second = buffers.take(1 << 20), buffers.take(100_000)
    assert first.obj is not second.obj
    buffers.give(second)
    assert buffers.take(1 << 20).obj is second.obj
    third = buffers.take(1 << 20)
    assert third.obj is not first.obj
    assert third.obj is not second.obj


def test_only_a_few_are_kept() -> None:
    buffers = Buffers(_SMALL + 1)
    taken = [buffers.take(_SMALL + 1) for _ in range(_KEPT + 3)]
    for buffer in taken:
        buffers.give(buffer)
    assert len(buffers._spare) == _KEPT
