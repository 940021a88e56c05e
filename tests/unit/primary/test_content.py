# SPDX-License-Identifier: BSD-3-Clause
"""content.py: what is told of a range without reading it, whatever a disk answers, and what of it is sent as zeroes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from content import make_raw, pattern
from replication.disk.face import Disk, Extent
from replication.disk.file import FileDisk
from replication.errors import DiskError
from replication.image.qcow2 import BLOCK
from replication.primary.backlog import DATA_MAX, Entry, Kind
from replication.primary.content import Content, Unreadable, known_zeroes, look, what_can_be_read, what_is_read
from replication.record.changes import GRAIN

KIB = 1024
DATA, ZERO, HOLE = (False, False), (True, False), (True, True)


class Told:
    """A disk that tells extents of some lengths (bytes) and kinds, `step` bytes an answer, and counts the answers."""

    def __init__(self, *told: tuple[int, tuple[bool, bool]], step: int = 1 << 40) -> None:
        self.step = step
        self.asked = 0
        self.all: list[Extent] = []
        at = 0
        for length, (zero, hole) in told:
            self.all.append(Extent(at, length, zero, hole))
            at += length
        self.size = at

    def extents(self, offset: int, length: int) -> list[Extent]:
        self.asked += 1
        stop = offset + min(length, self.step)
        found = []
        for extent in self.all:
            first, last = max(extent.offset, offset), min(extent.offset + extent.length, stop)
            if first < last:
                found.append(extent._replace(offset=first, length=last - first))
        return found


def seen(told: Told, offset: int = 0, length: int | None = None) -> Content:
    return look(cast(Disk, told), offset, told.size - offset if length is None else length)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (Told((3 * GRAIN, HOLE), (GRAIN, DATA)), (3 * GRAIN, *HOLE)),
        (Told((3 * GRAIN, ZERO), (GRAIN, DATA)), (3 * GRAIN, *ZERO)),
        (Told((3 * GRAIN, DATA), (GRAIN, HOLE)), (3 * GRAIN, *DATA)),
        # A grain that is partly a hole is data; one that is partly a hole and partly zeroes is zeroes.
        (Told((GRAIN + 1, HOLE), (3 * GRAIN - 1, DATA)), (GRAIN, *HOLE)),
        (Told((GRAIN - 1, HOLE), (GRAIN, DATA), (2 * GRAIN + 1, HOLE)), (2 * GRAIN, *DATA)),
        (Told((1, DATA), (4 * GRAIN - 1, HOLE)), (GRAIN, *DATA)),
        (Told((GRAIN + 1, HOLE), (2 * GRAIN, ZERO)), (GRAIN, *HOLE)),
        (Told((100, HOLE), (GRAIN, ZERO), (3 * GRAIN, HOLE)), (2 * GRAIN, *ZERO)),
        # Many small ones.
        (Told(*[(4 * KIB, HOLE)] * 40, (4 * KIB, DATA)), (2 * GRAIN, *HOLE)),
        # The disk ends within a grain.
        (Told((GRAIN + 100, HOLE)), (GRAIN + 100, *HOLE)),
        (Told((GRAIN, HOLE), (99, HOLE), (1, DATA)), (GRAIN, *HOLE)),
        (Told((GRAIN, DATA), (100, HOLE)), (GRAIN, *DATA)),
        (Told((1, HOLE)), (1, *HOLE)),
        (Told((100, DATA)), (100, *DATA)),
    ],
)
def test_what_is_seen_at_the_beginning_of_a_disk(told: Told, expected: tuple[int, bool, bool]) -> None:
    assert seen(told) == expected
    assert told.asked == 1


@pytest.mark.parametrize("kind", [DATA, ZERO, HOLE])
def test_an_answer_for_less_than_asked_is_taken_in_whole_grains(kind: tuple[bool, bool]) -> None:
    told = Told((9 * GRAIN, kind), step=5 * GRAIN + 4 * KIB)
    assert seen(told) == (5 * GRAIN, *kind)
    assert seen(told, 5 * GRAIN) == (4 * GRAIN, *kind)


def test_a_hole_that_is_told_in_small_pieces_is_a_hole() -> None:
    told = Told((3 * GRAIN, HOLE), step=4 * KIB)
    assert seen(told) == (GRAIN, *HOLE)
    assert told.asked == 16


def test_who_tells_less_is_not_asked_for_ever() -> None:
    told = Told((3 * GRAIN, HOLE), step=100)
    assert seen(told) == (GRAIN, *DATA)
    assert told.asked == 16
    assert seen(told, 2 * GRAIN, 200) == (200, *HOLE), "all of the range is known after two answers"


def test_what_the_disk_cannot_tell_is_data() -> None:
    class Broken(Told):
        def extents(self, offset: int, length: int) -> list[Extent]:
            if offset:
                raise DiskError("broken")
            return super().extents(offset, length)

    assert seen(Broken((4 * GRAIN, HOLE)), GRAIN) == (3 * GRAIN, *DATA)
    assert seen(Broken((4 * GRAIN, HOLE), step=4 * KIB)) == (4 * GRAIN, *DATA)


@settings(max_examples=200)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 2 * GRAIN), st.sampled_from([DATA, ZERO, HOLE])), min_size=1, max_size=12),
    step=st.integers(1 * KIB, 8 * GRAIN),
)
def test_nothing_that_is_told_as_data_is_taken_for_zeroes_and_everything_is_covered(
    pieces: list[tuple[int, tuple[bool, bool]]], step: int
) -> None:
    told = Told(*pieces, step=step)
    at = 0
    while at < told.size:
        content = seen(told, at)
        assert content.length % GRAIN == 0 or at + content.length == told.size
        assert 0 < content.length <= told.size - at
        inside = [e for e in told.all if e.offset < at + content.length and at < e.offset + e.length]
        if content.zero:
            assert all(extent.zero for extent in inside)
        if content.hole:
            assert content.zero
            assert all(extent.hole for extent in inside)
        at += content.length


# -- what is sent ------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., FileDisk]:
    def made(content: bytes, size: int | None = None) -> FileDisk:
        return FileDisk("disk0", str(make_raw(tmp_path / "disk", len(content) if size is None else size, content)))

    return made


def shown(entries: list[Entry]) -> list[tuple[Kind, int, int]]:
    return [(entry.kind, entry.offset, entry.length) for entry in entries]


def joined(entries: list[Entry]) -> bytes:
    """What the secondary has of them."""
    return b"".join(entry.data or bytes(entry.length) for entry in entries)


def test_grains_of_zeroes_in_data_are_sent_as_zeroes_that_keep_their_space(disk: Callable[..., FileDisk]) -> None:
    content = pattern(1, GRAIN) + bytes(2 * GRAIN) + b"\1" + bytes(GRAIN - 1) + bytes(GRAIN - 1) + b"\1" + bytes(GRAIN)
    local = disk(content)
    entries = what_is_read(local, 0, 6 * GRAIN)
    assert shown(entries) == [
        (Kind.WRITE, 0, GRAIN),
        (Kind.ZERO, GRAIN, 2 * GRAIN),
        (Kind.WRITE, 3 * GRAIN, 2 * GRAIN),
        (Kind.ZERO, 5 * GRAIN, GRAIN),
    ]
    assert joined(entries) == content
    assert not any(entry.may_trim for entry in entries)
    local.close()


@pytest.mark.parametrize(
    ("tail", "kinds"), [(b"\1", [Kind.WRITE]), (bytes(100), [Kind.WRITE, Kind.ZERO]), (bytes(99) + b"\1", [Kind.WRITE])]
)
def test_the_last_grain_may_be_short(disk: Callable[..., FileDisk], tail: bytes, kinds: list[Kind]) -> None:
    content = pattern(2, GRAIN) + tail
    local = disk(content)
    entries = what_is_read(local, 0, len(content))
    assert [entry.kind for entry in entries] == kinds
    assert joined(entries) == content
    local.close()


def test_a_piece_of_nothing_but_zeroes_is_one_entry_and_half_a_grain_of_them_is_data(
    disk: Callable[..., FileDisk],
) -> None:
    local = disk(b"", DATA_MAX)
    assert shown(what_is_read(local, 0, DATA_MAX)) == [(Kind.ZERO, 0, DATA_MAX)]
    local.write([b"x"], GRAIN // 2)
    assert shown(what_is_read(local, 0, GRAIN)) == [(Kind.WRITE, 0, GRAIN)]
    local.close()


def test_nothing_is_taken_over_that_a_late_write_may_still_change(
    disk: Callable[..., FileDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = disk(b"", 4 * GRAIN)

    def check_settled(offset: int, length: int) -> None:
        if offset <= GRAIN < offset + length:
            raise DiskError("in doubt")

    monkeypatch.setattr(local, "check_settled", check_settled)
    assert known_zeroes(local, 0, 4 * GRAIN) == []
    with pytest.raises(Unreadable, match="in doubt"):
        what_is_read(local, 0, 4 * GRAIN)
    entries, failures = what_can_be_read(local, GRAIN, GRAIN)
    assert [(offset, length) for offset, length, _ in failures] == [(GRAIN, BLOCK)]
    assert shown(entries) == [(Kind.WRITE, at, BLOCK) for at in range(GRAIN + BLOCK, 2 * GRAIN, BLOCK)]
    assert shown(known_zeroes(local, 2 * GRAIN, GRAIN)) == [(Kind.ZERO, 2 * GRAIN, GRAIN)]
    local.close()


def test_zeroes_that_are_known_are_sent_unread_and_as_holes_where_they_are(
    disk: Callable[..., FileDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = disk(b"", 4 * GRAIN)
    local.write([b"x"], 2 * GRAIN)
    monkeypatch.setattr(local, "read", None)
    (entry,) = known_zeroes(local, 0, 4 * GRAIN)
    assert (shown([entry]), entry.may_trim) == ([(Kind.ZERO, 0, 2 * GRAIN)], True)
    assert known_zeroes(local, 2 * GRAIN, 2 * GRAIN) == []
    monkeypatch.setattr(local, "extents", lambda offset, length: [Extent(offset, length, True, False)])
    (entry,) = known_zeroes(local, 0, 4 * GRAIN)
    assert (shown([entry]), entry.may_trim) == ([(Kind.ZERO, 0, 4 * GRAIN)], False)
    local.close()
