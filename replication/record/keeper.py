# SPDX-License-Identifier: BSD-3-Clause
"""Who writes the record into its file: one at a time, and for a failover in time or not at all.

A storage that hangs cannot be called back: a write that has begun may come through an hour later. So what a failover
wants to write begins only when the storage has just shown that it takes writes, and how long it needs: until then what
is written is what counts anyway (TwinFile.probe), and a failover that is refused has left nothing behind. One whose
write has begun and does not end leaves it to the owner to save again what counts by then (Node._save_later).
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from replication.record.twin import TwinFile

TRUSTED_S = 10.0
"""For so long a storage that a failover has asked is not asked again: the second attempt of one whose first attempt has
found it slow needs one write only."""


class Keeper:
    """Writes one document. Every method may be called by any thread."""

    def __init__(self, file: TwinFile) -> None:
        self._file = file
        # One write at a time. Held across it, also by threads for which nobody waits any more: so whoever may not wait
        # for a storage gives a deadline.
        self._writing = threading.Lock()
        self._probed_at = -math.inf
        self._took_s = 0.0

    def write(self, members: Callable[[], dict[str, Any]], deadline: float = math.inf, *, hasty: bool = False) -> None:
        """Write what `members()` is when its turn comes; OSError, TimeoutError included when that has not come by
        time.monotonic() `deadline`. `hasty`: nor does it begin when it cannot be expected to end by then."""
        left_s = deadline - time.monotonic()
        if not self._writing.acquire(timeout=max(0.0, left_s) if left_s < threading.TIMEOUT_MAX else -1):
            raise TimeoutError(errno.ETIMEDOUT, "its storage has not answered an earlier write yet")
        try:
            if hasty:
                self._check_quick(deadline)
            with self._timing():
                self._file.write(members(), twin=not hasty)
        finally:
            self._writing.release()

    def _check_quick(self, deadline: float) -> None:
        if time.monotonic() - self._probed_at > TRUSTED_S:
            with self._timing():
                self._file.probe()
            self._probed_at = time.monotonic()
        left_s = deadline - time.monotonic()
        if self._took_s > left_s:
            left = f"which has {max(0.0, left_s):.1f} s left"
            raise TimeoutError(errno.ETIMEDOUT, f"its storage takes {self._took_s:.1f} s for a write, {left}")

    @contextmanager
    def _timing(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._took_s = time.monotonic() - begun
