# SPDX-License-Identifier: BSD-3-Clause
"""The comparison of one disk with the secondary's, while the guest writes (verify.py has why it is exact).

Invariants
* At most WINDOW questions are under way, and what one asks of is RANGE bytes, or up to digests.ASK_MAX of what this
  disk knows to be zeroes, as long as the secondary answers that quickly.
* Nothing counts as different but what was different in two questions, each at one place of the stream, with nothing
  that became missing on this disk between taking that place and the answer.
* What could not be compared is looked at again, up to LOOKS times in all; then it is left out, and counted.
* It waits for the guest, and for the resync, which sends what is known to be missing.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

from replication.digests import ASK_MAX, DIGEST_BYTES, RANGE, digests, digests_of_zeroes, place_of
from replication.disk.unflushed import GRAIN
from replication.errors import DiskError, ReplicationError
from replication.primary.backlog import Entry, Kind
from replication.primary.disk import Checked, PrimaryDisk
from replication.primary.pace import ZEROES_COST, Pace

WINDOW = 4
"""Questions under way. Two keep both disks busy, and four a link of 20 ms at 200 MB/s; a checkpoint waits for them."""

LOOKS = 4
AGAIN_MAX = 1024
"""Parts to be looked at again that are kept apart; beyond that they become one, with what lies between them."""

WAIT_S = 600.0
"""Longest wait for a link, or for a resync that does not get on."""

_QUICK_S, _SLOW_S = 0.05, 0.25
"""An answer so quick lets the next question about zeroes be twice as long; one so slow makes it RANGE again."""

_NAP_S = 0.1
_AGAIN_S = 0.5
"""Before what could not be compared is looked at again."""


class Ended(ReplicationError):
    """The comparison cannot go on; the text says why."""


class Question:
    """One that is under way: what the secondary has in a range, in units of RANGE or GRAIN."""

    def __init__(self, disk: PrimaryDisk, offset: int, length: int, unit: int, moved: threading.Event) -> None:
        self.unit = unit
        self.mine = b""
        """The digests of this side."""
        self.over = False
        self.sure = False
        """What the answer says is so: nothing became missing on this disk meanwhile."""
        self.asked_s = time.monotonic()
        self.took_s = 0.0
        self._changes = disk.changes
        self._moved = moved
        self.entry = Entry(Kind.CHECK, offset, length, self._ended)
        self.entry.answer = bytearray(-(-length // unit) * DIGEST_BYTES)
        self.entry.answer_at = place_of(disk.size, offset, unit)

    def _ended(self, entry: Entry) -> None:
        """Called before anything that overlaps it is sent. What failed in front of it was marked before it was sent,
        and what a resync has sent since then is behind it: the count tells, which the marks themselves need not."""
        self.sure = entry.arrived and entry.marks == self._changes.marks
        self.took_s = time.monotonic() - self.asked_s
        self.over = True
        self._moved.set()

    def units(self) -> list[tuple[int, int, bool]]:
        """(offset, length, whether it is the same there) of each unit, of one that was answered."""
        entry, theirs = self.entry, bytes(self.entry.answer or b"")
        found = []
        for index, at in enumerate(range(entry.offset, entry.offset + entry.length, self.unit)):
            place = slice(index * DIGEST_BYTES, (index + 1) * DIGEST_BYTES)
            length = min(self.unit, entry.offset + entry.length - at)
            found.append((at, length, self.mine[place] == theirs[place]))
        return found


class Comparison:
    """Compares one disk. All in one thread; others read `compared` and `waits_for`, and may `wake` it."""

    def __init__(
        self,
        disk: PrimaryDisk,
        offset: int,
        pace: Pace,
        obstacle: Callable[[], str | None],
        absence: Callable[[], str | None],
        found: Callable[[PrimaryDisk, int, int], None],
        wait_s: float = WAIT_S,
    ) -> None:
        """From `offset` on, a multiple of RANGE. `obstacle()` is why it has to end, `absence()` why nothing can be
        asked at present; `found(disk, offset, length)` is called with what differs. Seconds."""
        self.compared = 0
        """Bytes."""
        self.left_out = 0
        """Bytes that could not be compared, at the end."""
        self.reason: str | None = None
        """Why not, of the latest."""
        self.waits_for: str | None = None
        self._disk = disk
        # What is still to be looked at in this look; the first part as far as it is.
        self._parts = deque([(offset, disk.size)])
        self._size = disk.size
        self._pace = pace
        self._obstacle = obstacle
        self._absence = absence
        self._found = found
        self._wait_s = wait_s
        self._moved = threading.Event()
        self._asked: deque[Question] = deque()
        # Ranges that differ, to be asked of grain by grain.
        self._closer: deque[tuple[int, int]] = deque()
        self._again: list[tuple[int, int]] = []
        self._zeroes_max = RANGE

    def wake(self) -> None:
        """There may be a reason to end."""
        self._moved.set()

    @property
    def position(self) -> int:
        """In front of this offset all has been compared, or was found to be different."""
        under_way = (question.entry.offset for question in self._asked)
        waiting = (at for parts in (self._parts, self._closer, self._again) for at, _ in parts)
        return min((*under_way, *waiting), default=self._disk.size)

    def run(self) -> None:
        """Compare all; Ended when that is not possible any more."""
        for look in range(LOOKS):
            if look:
                self._nap(_AGAIN_S)
                if not self._await_resync():
                    break
            while self._parts:
                self._compare(*self._parts[0])
                self._parts.popleft()
            self._parts, self._again = deque(self._again), []
            if not self._parts:
                break
        self.left_out = sum(stop - start for start, stop in self._parts)

    def _compare(self, at: int, stop: int) -> None:
        while at < stop or self._asked or self._closer:
            self._moved.clear()
            self._check()
            judged = self._judge_ended()
            asked = self._ask_next(at, stop)
            if asked == at and not judged:
                self._moved.wait(_NAP_S)
            at = asked
            self._parts[0] = (at, stop)

    # -- asking --------------------------------------------------------------------------------------------

    def _ask_next(self, at: int, stop: int) -> int:
        """One more question, if it is time for one; up to where has been asked."""
        if len(self._asked) >= WINDOW or self._absence() is not None or self._pace.wait_s(time.monotonic()):
            return at
        if self._closer:
            offset, length = self._closer[0]
            if self._ask(offset, length, GRAIN, zeroes=False):
                self._closer.popleft()
            return at
        if at >= stop:
            return at
        try:
            hole = self._disk.local.hole(at, min(stop - at, self._zeroes_max)) if self._disk.local is not None else 0
        except DiskError:
            hole = 0  # the read says so, if it fails as well
        if at + hole < stop:
            hole -= hole % RANGE
        if hole and self._ask(at, hole, RANGE, zeroes=True):
            return at + hole
        length = min(RANGE, stop - at)
        return at + length if self._ask(at, length, RANGE, zeroes=False) else at

    def _ask(self, offset: int, length: int, unit: int, zeroes: bool) -> bool:
        """Whether something has come of it."""
        question = Question(self._disk, offset, length, unit, self._moved)
        content = None if zeroes else memoryview(bytearray(length))
        try:
            checked = self._disk.check(question.entry, content)
        except DiskError as error:
            self._look_again(offset, length, f"disk '{self._disk.name}' cannot be read: {error}")
            return True
        if checked is Checked.LACKING:
            self._look_again(offset, length, "the secondary lacks something of them, which a resync has to send")
        elif checked is Checked.QUEUED:
            question.mine = digests_of_zeroes(length, unit) if content is None else digests(content, unit)
            self._pace.take(ZEROES_COST if zeroes else length)
            self._asked.append(question)
        return checked in (Checked.QUEUED, Checked.LACKING)

    # -- answers -------------------------------------------------------------------------------------------

    def _judge_ended(self) -> bool:
        """Make something of what was answered; whether that was anything."""
        ended = [question for question in self._asked if question.over]
        for question in ended:
            self._judge(question)
            self._asked.remove(question)  # only now: `position` is never beyond what is not known
        return bool(ended)

    def _judge(self, question: Question) -> None:
        entry = question.entry
        if self._disk.size != self._size:
            # What is behind a disk, and what the last unit is, was asked in another size than it was answered in.
            raise Ended(f"disk '{self._disk.name}' has grown meanwhile")
        if not entry.arrived:
            cause = f"the secondary answers: {os.strerror(entry.refusal)}" if entry.refusal else "the link was lost"
            self._look_again(entry.offset, entry.length, cause)
            return
        if question.unit == GRAIN:
            self._judge_closer(question)
            return
        if question.took_s < _QUICK_S:
            self._zeroes_max = min(ASK_MAX, 2 * self._zeroes_max)
        elif question.took_s > _SLOW_S:
            self._zeroes_max = RANGE
        for offset, length, same in question.units():
            if same:
                self.compared += length
            elif question.sure:
                self._closer.append((offset, length))
            else:
                self._look_again(offset, length, "the secondary was missing something meanwhile")

    def _judge_closer(self, question: Question) -> None:
        """Of a range that was different: which grains are. If none is now, the guest has just overwritten what was, and
        it is not known where that lay."""
        entry = question.entry
        others = [(offset, length) for offset, length, same in question.units() if not same]
        if others and not question.sure:
            self._look_again(entry.offset, entry.length, "the secondary was missing something meanwhile")
            return
        for offset, length in others or [(entry.offset, entry.length)]:
            self._found(self._disk, offset, length)
        self.compared += entry.length

    def _look_again(self, offset: int, length: int, reason: str) -> None:
        self.reason = reason
        again = self._again
        if again and again[-1][1] == offset:
            again[-1] = (again[-1][0], offset + length)
        else:
            again.append((offset, offset + length))
        if len(again) > AGAIN_MAX:
            self._again = [(min(start for start, _ in again), max(stop for _, stop in again))]

    # -- waiting -------------------------------------------------------------------------------------------

    def _nap(self, nap_s: float = _NAP_S) -> None:
        self._moved.wait(nap_s)
        self._moved.clear()

    def _check(self) -> None:
        """Wait for the link if need be; Ended when there is an obstacle, or no link for too long."""
        until = time.monotonic() + self._wait_s
        while True:
            reason = self._obstacle()
            if reason is not None:
                raise Ended(reason)
            absence = self.waits_for = self._absence()
            if absence is None:
                return
            if time.monotonic() > until:
                raise Ended(f"{absence}, for {self._wait_s:g} s")
            self._nap()

    def _await_resync(self) -> bool:
        """Wait until nothing is known to be missing; False when that does not get on."""
        changes = self._disk.changes
        least, until = changes.missing_bytes, time.monotonic() + self._wait_s
        while changes.missing:
            self._check()
            self.waits_for = "a resync is under way"
            if changes.missing_bytes < least:
                least, until = changes.missing_bytes, time.monotonic() + self._wait_s
            if time.monotonic() > until:
                return False
            self._nap()
        self.waits_for = None
        return True
