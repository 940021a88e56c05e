# SPDX-License-Identifier: BSD-3-Clause
"""buffers.py: memory that comes back is given out again, to one at a time, and not without bound."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path
from typing import Any

import pytest

from replication.errors import DiskError
from replication.image import buffers as module
from replication.image.buffers import SMALL, Buffers

MIB = 1 << 20


@pytest.mark.parametrize("length", [1, SMALL, SMALL + 1, 64 << 10, (64 << 10) + 1, MIB - 1, MIB])
def test_a_buffer_is_as_long_as_asked_for(length: int) -> None:
    buffers = Buffers(MIB)
    buffer = buffers.take(length)
    assert len(buffer) == length
    buffer[:] = bytes(length)
    buffers.give(buffer)
    assert len(buffers.take(length)) == length


def test_what_was_given_back_is_used_again_and_what_was_not_never_is() -> None:
    buffers = Buffers(4 * MIB)
    first, second = buffers.take(MIB), buffers.take(MIB - 5)
    assert first.obj is not second.obj
    buffers.give(second)
    assert buffers.take(MIB).obj is second.obj
    third = buffers.take(MIB)
    assert third.obj is not first.obj
    assert third.obj is not second.obj


@pytest.mark.parametrize("length", [SMALL + 1, 256 << 10, MIB])
def test_as_many_as_sixteen_threads_use_are_kept_and_no_more_bytes_than_that(length: int) -> None:
    buffers = Buffers(16 * MIB)
    for buffer in [buffers.take(length) for _ in range(300)]:
        buffers.give(buffer)
    assert buffers.spare_bytes == 16 * MIB
    kept = {id(buffers.take(length).obj) for _ in range(16)}
    assert len(kept) == 16


def test_memory_of_another_length_makes_room() -> None:
    buffers = Buffers(MIB)
    for buffer in [buffers.take(64 << 10) for _ in range(16)]:
        buffers.give(buffer)
    assert buffers.spare_bytes == MIB
    large = buffers.take(512 << 10)
    buffers.give(large)
    assert buffers.spare_bytes == MIB
    assert buffers.take(512 << 10).obj is large.obj
    assert buffers.spare_bytes == MIB // 2


def test_what_is_longer_than_all_that_may_be_kept_is_not() -> None:
    buffers = Buffers(MIB)
    buffers.give(buffers.take(2 * MIB))
    assert buffers.spare_bytes == 0


def test_a_long_queue_does_not_reach_the_kernels_limit_of_mappings() -> None:
    """Of 65530 (vm.max_map_count); with a queue-limit of 8 GiB that many writes may wait, and a process that is there
    gets no memory at all."""
    buffers = Buffers(MIB)
    before = mappings()
    waiting = [buffers.take(SMALL + 1) for _ in range(2000)]
    assert mappings() < before + len(waiting) // 2


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_without_memory_a_request_fails_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", none_left)
    assert module.mmap is mmap
    with pytest.raises(DiskError, match="Cannot allocate memory") as refusal:
        Buffers(MIB).take(MIB)
    assert refusal.value.errno == errno.ENOMEM
