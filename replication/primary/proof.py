# SPDX-License-Identifier: BSD-3-Clause
"""What of a run of missing grains the secondary has nevertheless, found by digests: it need not be sent.

    replication-start with sync=digest: everything counts as missing, a run of it is asked of, and what differs is sent

A question is one of verify.py: it has a place in the forward stream, and the answer says what the secondary has at that
place. Where that is what the local disk held there, nothing is missing, and what the guest has written since is on its
way like any write (PrimaryDisk.check, ChangeMap.prove).

Invariants
* A grain stays missing until its digest has been answered, so nobody takes the secondary for complete meanwhile.
* It stays missing as well if anything became missing on this disk between the question and the answer, if the
  secondary does not answer, and if the local disk cannot be read. Then it is sent.
* At most WINDOW questions are under way.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from replication.digests import RANGE, digests, digests_of_zeroes
from replication.disk.unflushed import GRAIN
from replication.errors import DiskError
from replication.primary.compare import WINDOW, Question
from replication.primary.content import ZERO_RUN_MAX
from replication.primary.disk import Checked, PrimaryDisk
from replication.primary.pace import ZEROES_COST

_NAP_S = 0.1


class Proof:
    """Of one disk. All in one thread."""

    def __init__(
        self,
        disk: PrimaryDisk,
        moved: threading.Event,
        wait_turn: Callable[[], str | None],
        obstacle: Callable[[], str | None],
        read: Callable[[int], None],
        proved: Callable[[int], None],
    ) -> None:
        """`moved` is set when an answer has come. `wait_turn()` waits until something may be read and asked; it and
        `obstacle()` say why the pass has to end, if it has. `read(cost)` is called with what a question counts
        for the rate, `proved(length)` with bytes that need not be sent."""
        self._disk = disk
        self._moved = moved
        self._wait_turn = wait_turn
        self._obstacle = obstacle
        self._read = read
        self._proved = proved
        self._asked: deque[Question] = deque()

    def run(self, at: int, stop: int) -> str | None:
        """Ask of all that lies between two offsets, whole grains but for the disk's end; why not, if that has to
        end."""
        while at < stop or self._asked:
            self._moved.clear()
            while self._asked and self._asked[0].over:
                self._judge(self._asked.popleft())
            if at < stop and len(self._asked) < WINDOW:
                failure = self._wait_turn()
                if failure is None:
                    at += self._ask(at, stop)
            else:
                failure = self._obstacle()
                if failure is None and self._asked:
                    self._moved.wait(_NAP_S)
            if failure is not None:
                return failure
        return None

    def _ask(self, at: int, stop: int) -> int:
        """How many bytes of the range are dealt with."""
        local = self._disk.local
        assert local is not None
        try:
            hole = local.hole(at, min(stop - at, ZERO_RUN_MAX))
            if at + hole < stop:
                hole -= hole % GRAIN
            if hole and self._put(at, hole, zeroes=True):
                return hole
            length = min(RANGE, stop - at)
            self._put(at, length, zeroes=False)
        except DiskError:
            length = min(RANGE, stop - at)  # who sends it says so
        return length

    def _put(self, offset: int, length: int, zeroes: bool) -> bool:
        """Whether something has come of it."""
        question = Question(self._disk, offset, length, GRAIN, self._moved)
        content = None if zeroes else memoryview(bytearray(length))
        checked = self._disk.check(question.entry, content, missing=True)
        if checked is Checked.WRITTEN:
            return False
        if checked is Checked.QUEUED:
            question.mine = digests_of_zeroes(length, GRAIN) if content is None else digests(content, GRAIN)
            self._read(ZEROES_COST if zeroes else length)
            self._asked.append(question)
        return True

    def _judge(self, question: Question) -> None:
        if not question.sure:
            return
        changes = self._disk.changes
        for offset, length, same in question.units():
            if same and changes.prove(offset, length, question.entry.marks):
                self._proved(length)
