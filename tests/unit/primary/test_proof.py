# SPDX-License-Identifier: BSD-3-Clause
"""What counts as proof that the secondary has a missing grain, and what does not. The disk answers as it is told to, at
once; the place of a question in the stream is what tests/e2e/test_verify.py has."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import cast

import pytest

from content import KIB, MIB, pattern
from replication.digests import DIGEST_BYTES, digests
from replication.errors import DiskError
from replication.primary.backlog import Entry
from replication.primary.compare import WINDOW
from replication.primary.content import ZERO_RUN_MAX
from replication.primary.disk import Checked, PrimaryDisk
from replication.primary.pace import ZEROES_COST
from replication.primary.proof import Proof
from replication.record.changes import ChangeMap

GRAIN = 64 * KIB
SIZE = 9 * MIB + 100


class FakeDisk:
    """`mine` here, `theirs` there; before each answer `act(entry)` may do something."""

    def __init__(self, zeroes: bool = False) -> None:
        self.size = SIZE
        self.mine = bytearray(SIZE) if zeroes else bytearray(pattern(1, SIZE))
        self.theirs = bytearray(self.mine)
        self.changes = ChangeMap(None, SIZE)
        self.changes.mark_all()
        self.local = self
        self.zeroes = zeroes
        self.late = False
        """Answers come when they are waited for."""
        self.waiting: list[Entry] = []
        self.most = 0
        self.asked: list[tuple[int, int]] = []
        self.act: Callable[[Entry], object] = lambda _entry: None
        self.behind: Callable[[Entry], object] = lambda _entry: None
        """What happens when a question was answered, before anybody looks at the answer."""
        self.failure: DiskError | None = None

    def hole(self, _offset: int, length: int) -> int:
        return length if self.zeroes else 0

    def check(self, entry: Entry, content: memoryview | None, missing: bool = False) -> Checked:
        assert missing
        self.asked.append((entry.offset, entry.length))
        entry.marks = self.changes.marks
        if self.failure is not None:
            raise self.failure
        stop = entry.offset + entry.length
        if content is not None:
            content[:] = self.mine[entry.offset : stop]
        elif any(self.mine[entry.offset : stop]):
            return Checked.WRITTEN
        self.act(entry)
        self.waiting.append(entry)
        self.most = max(self.most, len(self.waiting))
        if not self.late:
            self.answer()
        return Checked.QUEUED

    def answer(self) -> None:
        for entry in self.waiting:
            assert entry.answer is not None
            stop = entry.offset + entry.length
            unit = entry.length // max(len(entry.answer) // DIGEST_BYTES, 1)
            assert unit <= GRAIN
            entry.answer[:] = digests(memoryview(self.theirs)[entry.offset : stop], GRAIN)
            entry.settle(True)
            self.behind(entry)
        self.waiting = []


def proven(
    disk: FakeDisk, obstacle: Callable[[], str | None] = lambda: None
) -> tuple[str | None, list[tuple[int, int]]]:
    """Ask of all; why not, and what is missing afterwards."""
    counted: list[int] = []
    read: list[int] = []

    class Moved(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            disk.answer()
            return super().wait(timeout)

    proof = Proof(cast(PrimaryDisk, disk), Moved(), obstacle, obstacle, read.append, counted.append)
    failure = proof.run(0, disk.size)
    assert sum(counted) == disk.size - disk.changes.missing_bytes
    asked = len(disk.asked) * ZEROES_COST if disk.zeroes else disk.size
    assert sum(read) == (0 if disk.failure or failure else asked)
    return failure, list(disk.changes.missing_ranges())


def test_what_is_the_same_is_not_missing_any_more() -> None:
    disk = FakeDisk()
    for offset in (3 * GRAIN + 5, 2 * MIB, SIZE - 1):
        disk.theirs[offset] ^= 1
    last = SIZE // GRAIN * GRAIN
    assert proven(disk) == (None, [(3 * GRAIN, GRAIN), (2 * MIB, GRAIN), (last, SIZE - last)])


def test_a_hole_is_asked_of_and_not_read() -> None:
    disk = FakeDisk(zeroes=True)
    disk.theirs[5 * MIB] = 1
    assert proven(disk) == (None, [(5 * MIB, GRAIN)])
    assert max(length for _, length in disk.asked) == ZERO_RUN_MAX


def test_so_many_questions_are_under_way_and_no_more() -> None:
    disk = FakeDisk()
    disk.late = True
    assert proven(disk) == (None, [])
    assert disk.most == WINDOW


def test_nothing_is_proven_if_something_became_missing_meanwhile() -> None:
    disk = FakeDisk()

    def act(entry: Entry) -> None:
        if entry.offset == 2 * MIB:
            disk.changes.mark(7 * MIB, 1)

    disk.act = act
    failure, missing = proven(disk)
    assert failure is None
    assert missing == [(2 * MIB, MIB)]


@pytest.mark.parametrize("late", [False, True])
def test_a_write_behind_the_question_that_is_refused_before_the_answer_is_judged_stays_missing(late: bool) -> None:
    """The answer is right, and of the past."""
    disk = FakeDisk()
    disk.late = late

    def behind(entry: Entry) -> None:
        if entry.offset == 2 * MIB:
            disk.changes.begin(2 * MIB, 1)
            disk.changes.end(2 * MIB, 1, False)

    disk.behind = behind
    failure, missing = proven(disk)
    assert failure is None
    assert any(offset <= 2 * MIB < offset + length for offset, length in missing)


def test_what_the_disk_cannot_read_is_left_to_who_sends_it() -> None:
    disk = FakeDisk()
    disk.failure = DiskError("a bad sector", errno.EIO)
    assert proven(disk) == (None, [(0, SIZE)])


def test_an_obstacle_ends_it() -> None:
    disk = FakeDisk()
    assert proven(disk, lambda: "the link was lost") == ("the link was lost", [(0, SIZE)])
