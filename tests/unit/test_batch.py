# SPDX-License-Identifier: BSD-3-Clause
"""batch.py: what is packed comes out again, and nothing but a batch is taken for one."""

from __future__ import annotations

import errno
import struct
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replication.batch import COUNT_MAX, DATA_MAX, MAGIC, SPACE, pack, unpack
from replication.errors import DiskError

SIZE = 1 << 30
UINT64_MAX = (1 << 64) - 1

FUZZ_S = 10.0
"""Longest time for one refusal or one batch of the largest kind, on a busy machine; it takes milliseconds, and minutes
if each write were compared with all others."""


def unpacked(batch: bytes, size: int = SIZE) -> list[tuple[int, bytes]]:
    return [(offset, bytes(data)) for offset, data in unpack(memoryview(batch), size)]


def merged(writes: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """What a batch holds of the writes: each joined to the one before it where it goes on there."""
    result: list[tuple[int, bytes]] = []
    for offset, data in writes:
        if result and result[-1][0] + len(result[-1][1]) == offset:
            result[-1] = (result[-1][0], result[-1][1] + data)
        else:
            result.append((offset, data))
    return result


def raw(rows: list[tuple[int, int]], data: bytes, magic: int = MAGIC, count: int | None = None) -> bytes:
    """A batch by hand, as the module's docstring says."""
    head = struct.pack("<QQ", magic, len(rows) if count is None else count)
    return head + b"".join(struct.pack("<QQ", *row) for row in rows) + data


def refused(batch: bytes, size: int = SIZE) -> None:
    with pytest.raises(DiskError) as caught:
        unpack(memoryview(batch), size)
    assert caught.value.errno == caught.value.wire_errno == errno.EINVAL
    assert "\n" not in str(caught.value)


@st.composite
def writes_of_a_batch(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """Writes that do not overlap, many of them neighbours, in any order."""
    at, writes = draw(st.integers(0, 5000)), []
    for _ in range(draw(st.integers(1, 40))):
        length = draw(st.one_of(st.integers(1, 40), st.sampled_from((512, 3000))))
        writes.append((at, draw(st.binary(min_size=1, max_size=1)) * length))
        at += length + draw(st.sampled_from((0, 0, 1, 4096)))
    # Neighbours in the order of the writes are one, in any other order they stay apart.
    return draw(st.permutations(writes)) if draw(st.booleans()) else writes


@given(writes_of_a_batch())
def test_what_is_packed_comes_out_in_its_order_with_neighbours_as_one(writes: list[tuple[int, bytes]]) -> None:
    assert unpacked(pack(writes)) == merged(writes)


@given(writes_of_a_batch())
def test_a_batch_is_laid_out_as_it_is_described(writes: list[tuple[int, bytes]]) -> None:
    rows = [(offset, len(data)) for offset, data in merged(writes)]
    assert pack(iter(writes)) == raw(rows, b"".join(data for _, data in writes))


@given(writes_of_a_batch())
def test_a_batch_fits_the_disk_that_ends_with_its_last_write_and_no_smaller_one(
    writes: list[tuple[int, bytes]],
) -> None:
    end = max(offset + len(data) for offset, data in writes)
    assert unpacked(pack(writes), end) == merged(writes)
    refused(pack(writes), end - 1)


def test_a_batch_of_as_much_data_as_may_be_comes_out() -> None:
    writes = [(number * 8192, bytes([number]) * 4096) for number in range(DATA_MAX // 4096)]
    assert unpacked(pack(writes)) == writes
    assert unpacked(pack([(0, b"x" * DATA_MAX)])) == [(0, b"x" * DATA_MAX)]


def test_a_batch_of_as_many_writes_as_may_be_fits_behind_the_disk() -> None:
    """Together with as much data as may be, which a batch may have at the same time."""
    lengths = [DATA_MAX - COUNT_MAX + 1] + [1] * (COUNT_MAX - 1)
    writes, at = [], 0
    for number, length in enumerate(lengths):
        writes.append((at, bytes([number % 251]) * length))
        at += length + 1
    begun = time.monotonic()
    batch = pack(writes)
    assert len(batch) <= SPACE < len(batch) + 16, "one more would not fit"
    assert unpacked(batch) == writes
    assert time.monotonic() - begun < FUZZ_S


def test_the_last_byte_of_the_largest_disk_can_be_written() -> None:
    size = (1 << 63) - 1
    assert unpacked(pack([(size - 1, b"x")]), size) == [(size - 1, b"x")]


# -- damage ----------------------------------------------------------------------------------------------------------

GOOD = [(0, 3), (SIZE - 5, 5), (8192, 4)]
DATA = b"abcdefghijkl"


@pytest.mark.parametrize(
    "batch",
    [
        b"",
        raw([], b"")[:15],
        raw([], b""),
        raw([], b"data"),
        raw(GOOD, DATA, magic=MAGIC + 1),
        raw(GOOD, DATA, magic=0),
        struct.pack(">QQ", MAGIC, 3) + raw(GOOD, DATA)[16:],
        raw(GOOD, DATA, count=0),
        raw(GOOD, DATA, count=2),
        raw(GOOD, DATA, count=4),
        raw(GOOD, DATA, count=COUNT_MAX),
        raw(GOOD, DATA, count=COUNT_MAX + 1),
        raw(GOOD, DATA, count=UINT64_MAX),
        raw([(0, 1)] * (COUNT_MAX + 1), b"x" * (COUNT_MAX + 1)),
        raw(GOOD, DATA)[: 16 + 16 * 3 - 1],
        raw(GOOD, DATA)[: 16 + 16 * 3],
        raw(GOOD, DATA[:-1]),
        raw(GOOD, DATA + b"m"),
        raw([(0, 0)], b""),
        raw([(0, 3), (100, 0), (200, 4)], b"abcdefg"),
        raw([(SIZE, 1)], b"x"),
        raw([(SIZE - 1, 2)], b"xy"),
        raw([(SIZE + 1, 1)], b"x"),
        raw([(UINT64_MAX, 1)], b"x"),
        raw([(UINT64_MAX, 2)], b"xy"),
        raw([(0, UINT64_MAX)], b"x"),
        raw([(1, UINT64_MAX)], b"x"),
        raw([(0, 1 << 63)], b"x"),
        raw([(0, SIZE)], b"x"),
    ],
    ids=[
        "nothing",
        "half-a-head",
        "no-writes",
        "no-writes-but-data",
        "another-magic",
        "no-magic",
        "big-endian",
        "count-of-none",
        "count-too-small",
        "count-too-large",
        "count-of-the-largest-batch",
        "count-beyond-the-largest-batch",
        "count-without-end",
        "more-writes-than-may-be",
        "half-a-row",
        "no-data",
        "a-byte-missing",
        "a-byte-too-much",
        "empty-write",
        "empty-write-between",
        "behind-the-end",
        "across-the-end",
        "far-behind-the-end",
        "last-offset",
        "offset-that-wraps-around",
        "length-without-end",
        "range-that-wraps-around",
        "length-with-a-sign",
        "length-of-the-whole-disk",
    ],
)
def test_a_damaged_batch_is_refused(batch: bytes) -> None:
    refused(batch)


@given(writes_of_a_batch(), st.data())
def test_a_batch_that_was_cut_off_or_lengthened_is_refused(
    writes: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    batch = pack(writes)
    refused(batch[: data.draw(st.integers(0, len(batch) - 1))])
    refused(batch + data.draw(st.binary(min_size=1, max_size=40)))


uint64 = st.one_of(st.integers(0, UINT64_MAX), st.integers(0, 70), st.integers(UINT64_MAX - 2, UINT64_MAX))


@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            raw,
            st.lists(st.tuples(uint64, uint64), max_size=6),
            st.binary(max_size=200),
            st.one_of(st.just(MAGIC), uint64),
            st.one_of(st.none(), uint64),
        ),
    ),
    st.one_of(st.integers(0, 5000), st.just((1 << 63) - 1)),
)
@example(raw([(0, 1), (0, 1)], b"xy"), 1)
@settings(max_examples=1000, deadline=FUZZ_S * 1000)
def test_any_bytes_are_writes_within_the_disk_or_refused(batch: bytes, size: int) -> None:
    try:
        writes = unpacked(batch, size)
    except DiskError:
        refused(batch, size)
        return
    assert writes
    assert all(data and offset >= 0 and offset + len(data) <= size for offset, data in writes)
    # It was one, then: nothing of it was left out or made up.
    assert raw([(offset, len(data)) for offset, data in writes], b"".join(data for _, data in writes)) == batch
