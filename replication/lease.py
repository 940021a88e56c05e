# SPDX-License-Identifier: BSD-3-Clause
"""A secondary's half of a lease: how long its primary may serve its guest still (`lease=SECONDS`).

    primary     serves its guest only until SECONDS after it asked what its secondary has answered (admission.py), or
                after the cluster renewed the lease
    secondary   does not fail over without force before that, and some more, has gone by since it was last asked

What counts is a connection on which a primary was accepted, and that counts whole: who only looks, or was refused, has
no lease. A good-bye ends the lease on both sides, the primary's first.

The primary counts from when it asked, and the secondary from when the question came, which is later: so however long
an answer is on its way, and whether or not it arrives, the guest of the primary stands still when the secondary's turn
comes. That takes clocks which run at nearly the same speed, and a primary's process that is not stopped between its
look at the clock and an answer to its guest: only fencing does without that.

Once this node is about to fail over, no connection of before is answered any more, so that no lease begins anew
meanwhile. On a new one a primary learns that this node is nobody's secondary: until it has been accepted as the primary
it does not count what it is answered.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from replication.errors import CommandError, DiskError
from replication.reason import Reason
from replication.record.boot import boot_clock_s

MARGIN, MARGIN_S = 0.1, 1.0
"""What the secondary waits longer, as a part of the lease and in seconds: clocks run at different speeds, and a primary
takes a moment between its look at the clock and the answer to its guest."""


class Tenure:
    """Of the primary of one node. Every method may be called by any thread."""

    def __init__(self, lease_s: Callable[[], float | None], clock: Callable[[], float] = boot_clock_s) -> None:
        """`lease_s()` is the lease of the last primary, None if it had none, or has left in good order. `clock()` is in
        seconds."""
        self._lease_s = lease_s
        self._clock = clock
        # Protects the fields below. Below all other locks, never held across I/O.
        self._lock = threading.Lock()
        # What a former process has heard is not known.
        self._heard_s = clock()
        # The earliest moment for a failover that the lease of a former primary leaves.
        self._kept_until_s = 0.0
        self.era = 0
        """How often the disks were taken, or were about to be."""
        # They are being taken: decided, and not done.
        self._taken = False

    def heard(self, era: int, paired: bool) -> None:
        """Somebody has asked something, on a connection that was begun in that era, and is about to be answered.
        `paired`: the primary. DiskError if it must not be any more."""
        with self._lock:
            if era != self.era and self._lease_s() is not None:
                raise DiskError("this node fails over, or has: its former primary hears no more of it", errno.ESHUTDOWN)
            if paired:
                self._heard_s = self._clock()

    def extend(self) -> None:
        """A primary was accepted, which may count from a question of just before."""
        with self._lock:
            self._heard_s = self._clock()

    def renew(self, era: int) -> float:
        """The cluster is about to renew the lease of the primary: this node waits for as long, in seconds. `era`: as it
        was when the caller found this node a secondary. CommandError, with nothing changed, if it may not wait."""
        with self._lock:
            if self._taken or era != self.era:
                raise CommandError("No lease is renewed: this node is about to own its disks", reason=Reason.BUSY)
            lease_s = self._lease_s()
            if lease_s is None:
                raise CommandError(
                    "There is no lease to renew: the primary has none, or it has left in good order, and this node may "
                    "fail over at any time",
                    reason=Reason.WRONG_STAGE,
                )
            self._heard_s = self._clock()
            return lease_s

    @property
    def left_s(self) -> float:
        """How many seconds the primary may serve its guest still, as far as is known here."""
        with self._lock:
            return self._left_locked()

    def refusal(self, left_s: float) -> str:
        """Why a failover is refused."""
        return (
            f"Failover is refused: the lease of the primary, which was heard of lately, may last for {left_s:.1f} s "
            "still, and so long it serves its guest; try again then, or say that it is fenced (fenced, --fenced) if it "
            "is known to be dead"
        )

    @contextmanager
    def taking(self, force: bool, untaken: Callable[[], bool]) -> Iterator[None]:
        """Around what makes this node the owner of its disks; `untaken()`: whether that has failed before it was one.
        CommandError if it is too early for that."""
        with self._lock:
            left_s = self._left_locked()
            if left_s > 0 and not force:
                raise CommandError(self.refusal(left_s), reason=Reason.LEASED)
            self.era += 1
            self._taken = True
        try:
            yield
        except BaseException:
            if untaken():
                with self._lock:
                    self.era -= 1  # who has asked meanwhile comes again by itself
            raise
        finally:
            with self._lock:
                self._taken = False

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Around what gives the node a primary with another lease, or none: that of the former one lasts."""
        with self._lock:
            until_s = self._clock() + self._left_locked()
        yield
        with self._lock:
            self._kept_until_s = max(self._kept_until_s, until_s)

    def begin(self) -> None:
        """The node is a secondary again."""
        with self._lock:
            self._kept_until_s = 0.0
            self._heard_s = self._clock()

    def _left_locked(self) -> float:
        lease_s, until_s = self._lease_s(), self._kept_until_s
        if lease_s is not None:
            until_s = max(until_s, self._heard_s + lease_s * (1 + MARGIN) + MARGIN_S)
        return max(0.0, until_s - self._clock())
