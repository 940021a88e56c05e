# SPDX-License-Identifier: BSD-3-Clause
"""What the crash harness permits, and above all what it does not."""

from __future__ import annotations

import numpy as np
import pytest

from torture.client import Asked, Kind, Request, Sent, Wrong
from torture.oracle import NEVER, Bytes, Content, Copy, Write
from torture.secondary_history import CHECKPOINT, FAILOVER, SIZES, START, STOP, Life, Snapshot

KILLED = 100


def filled(value: int, size: int = 8) -> Bytes:
    return np.full(size, value, np.uint8)


def permitted(content: Content, begun: int = KILLED, ended: int = KILLED) -> list[list[int]]:
    """For each byte, the values that an observation may see."""
    values: list[set[int]] = [set() for _ in range(content.size)]
    for version in content.seen(0, content.size, begun, ended):
        for index in np.flatnonzero(version.where):
            values[version.start + index].add(int(version.data[index]))
    return [sorted(each) for each in values]


def test_an_answered_write_is_all_that_is_permitted() -> None:
    content = Content(filled(1))
    content.changes.append(Write(2, filled(5, 3), 10, 11))
    assert permitted(content) == [[1]] * 2 + [[5]] * 3 + [[1]] * 3


def test_an_unanswered_write_may_be_there_or_not_at_any_byte() -> None:
    content = Content(filled(1))
    content.changes.append(Write(2, filled(5, 3), 10))
    assert permitted(content) == [[1]] * 2 + [[1, 5]] * 3 + [[1]] * 3


def test_writes_under_way_at_the_same_time_may_come_in_either_order_but_not_before_what_was_answered() -> None:
    content = Content(filled(1, 1))
    content.changes += [Write(0, filled(5, 1), 10, 13), Write(0, filled(6, 1), 11, 12)]
    assert permitted(content) == [[5, 6]]
    content.changes.append(Write(0, filled(7, 1), 14, 15))
    assert permitted(content) == [[7]]


def test_an_unanswered_write_may_come_after_a_later_one_that_was_answered() -> None:
    content = Content(filled(1, 1))
    content.changes += [Write(0, filled(5, 1), 10), Write(0, filled(6, 1), 11, 12)]
    assert permitted(content) == [[5, 6]]


def test_a_read_sees_what_was_answered_before_it_began_and_perhaps_what_began_before_it_ended() -> None:
    content = Content(filled(1, 1))
    content.changes += [Write(0, filled(5, 1), 10, 20), Write(0, filled(6, 1), 30, 40)]
    assert permitted(content, 5, 7) == [[1]]
    assert permitted(content, 5, 15) == [[1, 5]]
    assert permitted(content, 21, 25) == [[5]]
    assert permitted(content, 21, 35) == [[5, 6]]


def test_a_copy_takes_the_source_at_one_moment_of_its_interval_and_wipes_out_what_was_there_before() -> None:
    disk, guest = Content(filled(1, 3)), Content(filled(9, 3))
    disk.changes += [Write(0, filled(2, 1), 10, 11), Write(1, filled(3, 1), 19, 25), Write(2, filled(4, 1), 31, 32)]
    guest.changes += [Write(0, filled(7, 3), 12, 13), Copy(disk, 20, 30), Write(2, filled(8, 1), 40, 41)]
    assert permitted(guest) == [[2], [1, 3], [8]]


def test_a_copy_that_was_never_answered_leaves_both_contents_possible() -> None:
    disk, guest = Content(filled(1, 1)), Content(filled(9, 1))
    guest.changes.append(Copy(disk, 20))
    assert permitted(guest) == [[1, 9]]


def test_what_is_wrong_with_a_byte_is_told_with_what_was_done_to_it() -> None:
    content = Content(filled(1))
    content.changes.append(Write(2, filled(5, 3), 10, 11))
    actual = filled(1)
    assert list(content.unexplained(actual, 0, KILLED, KILLED)) == [2, 3, 4]
    assert "byte 2 is 0x01" in content.about(2, 1)
    assert "0x05: write of 2..5 sent at 10, answered 11" in content.about(2, 1)


# -- hypotheses --------------------------------------------------------------------------------------------------


def snapshot(stage: str, epoch: int, target: int, guest: int) -> Snapshot:
    return Snapshot(stage, epoch, [bytes([target]) * size for size in SIZES], [bytes([guest]) * size for size in SIZES])


@pytest.fixture
def life() -> Life:
    """In `running`; the disks hold 1, the guests see 2."""
    return Life(snapshot("running", 7, target=1, guest=2))


def test_a_checkpoint_cut_short_has_happened_on_all_disks_or_on_none(life: Life) -> None:
    life.asking(Asked(CHECKPOINT, 1))
    assert life.explain(KILLED, snapshot("running", 7, target=1, guest=2)).endswith("has not happened")
    assert life.explain(KILLED, snapshot("running", 8, target=1, guest=1)).endswith("has happened")
    half = snapshot("running", 8, target=1, guest=1)
    half.guests[1] = life.base.guests[1]
    with pytest.raises(
        Wrong, match=r"if .* has not happened: the epoch is 8(.|\n)*if .* has happened: guest face top1"
    ):
        life.explain(KILLED, half)
    half.epoch = 7
    with pytest.raises(Wrong, match=r"has not happened: guest face top0(.|\n)*has happened: the epoch is 7"):
        life.explain(KILLED, half)


def test_a_planned_stop_cut_short_leaves_what_the_primary_wrote_or_goes_on_running(life: Life) -> None:
    life.asking(Asked(STOP, 1))
    for epoch in (7, 8):
        assert life.explain(KILLED, snapshot("done", epoch, target=0, guest=1)).endswith("has happened")
    assert life.explain(KILLED, snapshot("running", 7, target=1, guest=2)).endswith("has not happened")
    for wrong in (snapshot("done", 7, 0, 2), snapshot("running", 8, 1, 2), snapshot("running", 7, 1, 1)):
        with pytest.raises(Wrong, match="nothing explains"):
            life.explain(KILLED, wrong)


def test_a_failover_keeps_what_the_guest_sees_and_a_refused_target_write_proves_it(life: Life) -> None:
    life.asking(Asked(FAILOVER, 1))
    going_on = snapshot("running", 7, target=1, guest=2)
    assert life.explain(KILLED, going_on).endswith("has not happened")
    sent = Sent(Request(Kind.WRITE, "disk0", 0, 1, b"x"), 2)
    life.began(sent)
    sent.ended, sent.error = 3, 108  # ESHUTDOWN
    life.ended(sent)
    for stage in ("failover", "done"):
        assert life.explain(KILLED, snapshot(stage, 7, target=0, guest=2)).endswith("has happened")
    with pytest.raises(Wrong, match="the stage is running, not done or failover"):
        life.explain(KILLED, going_on)


def test_a_start_cut_short_leaves_none_or_running_with_the_disk_for_the_guest() -> None:
    life = Life(snapshot("none", 0, target=1, guest=0))
    life.asking(Asked(START, 1))
    for epoch in (0, 1):
        assert life.explain(KILLED, snapshot("none", epoch, target=1, guest=0)).endswith("has not happened")
    assert life.explain(KILLED, snapshot("running", 1, target=1, guest=1)).endswith("has happened")
    with pytest.raises(Wrong, match="guest face top0"):
        life.explain(KILLED, snapshot("running", 1, target=1, guest=0))


@pytest.mark.parametrize(
    ("export", "error", "why"),
    [
        ("disk0", 108, "refused in stage"),
        ("top0", 5, "refused in stage"),
        ("top0", 28, "failed with ENOSPC"),
    ],
)
def test_a_refusal_without_a_reason_is_wrong(life: Life, export: str, error: int, why: str) -> None:
    with pytest.raises(Wrong, match=why):
        life.ended(Sent(Request(Kind.FLUSH, export), 1, 2, error))


def test_a_request_served_after_the_target_face_was_closed_is_wrong(life: Life) -> None:
    asked = Asked(FAILOVER, 1)
    life.asking(asked)
    life.ended(Sent(Request(Kind.FLUSH, "disk0"), 2, 3))
    asked.ended = 4
    life.answered(asked)
    with pytest.raises(Wrong, match="served in stage"):
        life.ended(Sent(Request(Kind.FLUSH, "disk0"), 5, 6))


def test_nothing_ends_later_than_never() -> None:
    assert np.int32(NEVER) == NEVER
