# SPDX-License-Identifier: BSD-3-Clause
"""How fast what is not the guest's may be sent, or read: a rate in bytes a second."""

from __future__ import annotations

from collections.abc import Sequence

from replication.disk.unflushed import GRAIN
from replication.primary.backlog import DATA_MAX, Entry

ZEROES_COST = 4 << 10
"""What a request without data counts for the rate: it is some work for the secondary."""

_BURST_MAX = 1 << 20
_PIECES_A_SECOND = 8
"""A limited resync sends smaller requests, so that a guest's write never waits behind much of it on a slow link."""


class Pace:
    """A rate in bytes a second, None for no limit. The clock is the caller's: seconds, monotonic.

    A bucket of at most a second's bytes, and at most 1 MiB, is filled at the rate. A piece may be sent when the bucket
    is not overdrawn, and then is taken out of it.
    """

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._burst = self._left = 0.0 if rate is None else float(min(rate, _BURST_MAX))
        self._seen: float | None = None
        self.piece_max = DATA_MAX
        """Most bytes of data to send at a time: whole grains."""
        if rate is not None:
            self.piece_max = min(max(rate // _PIECES_A_SECOND // GRAIN, 1) * GRAIN, DATA_MAX)

    def wait_s(self, now: float) -> float:
        """Seconds until the next piece may be sent."""
        if self._rate is None:
            return 0.0
        passed_s = 0.0 if self._seen is None else now - self._seen
        self._seen = now
        self._left = min(self._left + passed_s * self._rate, self._burst)
        return max(0.0, -self._left / self._rate)

    def spend(self, entries: Sequence[Entry]) -> None:
        """Pieces were sent."""
        self.take(sum(len(entry.data) or ZEROES_COST for entry in entries))

    def take(self, size: int) -> None:
        """So many bytes were sent."""
        self._left -= size
