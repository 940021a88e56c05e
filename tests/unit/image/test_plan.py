# SPDX-License-Identifier: BSD-3-Clause
"""plan.py: many writes in order, with the blocks that they touch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replication.image import plan as plan_module
from replication.image.plan import Piece, arrange
from replication.image.qcow2 import BLOCK

places = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 6 * BLOCK), st.integers(0, 12).map(lambda block: block * BLOCK // 2)),
        st.one_of(st.integers(1, 2 * BLOCK), st.sampled_from([BLOCK // 2, BLOCK])),
    ),
    min_size=1,
    max_size=8,
)


def pieces_of(places: list[tuple[int, int]]) -> list[Piece]:
    return [(offset, memoryview(bytes([index + 1]) * length)) for index, (offset, length) in enumerate(places)]


@given(places)
def test_the_runs_write_what_the_pieces_do_and_the_spans_are_their_blocks(places: list[tuple[int, int]]) -> None:
    pieces = pieces_of(places)
    covered = [at for offset, length in places for at in range(offset, offset + length)]
    plan = arrange(pieces)
    assert (plan is None) == (len(set(covered)) < len(covered)), "only writes that overlap have an order of their own"
    if plan is None:
        return
    expected, written = bytearray(12 * BLOCK), bytearray(12 * BLOCK)
    for offset, data in pieces:
        expected[offset : offset + len(data)] = data
    end = -1
    for run in plan.runs:
        assert run.offset > end, "neighbours are one run"
        end = run.offset
        for index, data in zip(run.indexes, run.data, strict=True):
            assert pieces[index] == (end, data)
            written[end : end + len(data)] = data
            end += len(data)
    assert written == expected
    assert sorted(index for run in plan.runs for index in run.indexes) == list(range(len(pieces)))
    assert all(start % BLOCK == stop % BLOCK == 0 for start, stop in plan.spans)
    assert all(before[1] < after[0] for before, after in zip(plan.spans, plan.spans[1:], strict=False))
    blocks = {block for start, stop in plan.spans for block in range(start // BLOCK, stop // BLOCK)}
    assert blocks == {at // BLOCK for at in covered}


def test_a_run_has_no_more_pieces_than_one_call_takes() -> None:
    count = 2 * plan_module._RUN_PIECES + 1
    plan = arrange([(offset, memoryview(b"x")) for offset in range(count)])
    assert plan is not None
    assert [len(run.data) for run in plan.runs] == [plan_module._RUN_PIECES, plan_module._RUN_PIECES, 1]
    assert [run.offset for run in plan.runs] == [0, plan_module._RUN_PIECES, 2 * plan_module._RUN_PIECES]
