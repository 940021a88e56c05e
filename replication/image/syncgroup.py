# SPDX-License-Identifier: BSD-3-Clause
"""Group commit: many requests that need the same files stable share one sync.

Invariants
* `run` returns only after a sync that began after `run` was called.
* One sync at a time; those who come meanwhile share the next one.
* Who has waited for too long is told so (StillWaiting), and nothing else follows from it. But what it wanted to be
  stable may not be: `settle` is for who would rely on that.
* After a failed sync nobody knows what is stable (the kernel forgets the pages that it could not write), so every later
  `run` fails with the same cause until the process is restarted.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from replication.errors import DiskError, StillWaiting

_WAIT_S = 60.0
"""Longest wait for the sync of another request; the kernel's own limit for a disk command is 30 s."""


class SyncGroup:
    """Shares `sync()`, which raises DiskError."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        # Protects the fields below. Not held while syncing.
        self._changed = threading.Condition()
        self._begun = 0
        self._ended = 0
        # The last one for which somebody did not wait to the end.
        self._owed = 0
        self._failure: DiskError | None = None

    def run(self) -> None:
        """Everything done before this call is stable when it returns; DiskError otherwise."""
        with self._changed:
            self.check()
            needed = self._begun + 1
            if not self._changed.wait_for(lambda: self._ended >= needed or self._begun == self._ended, _WAIT_S):
                self._owed = max(self._owed, needed)
                raise StillWaiting(f"a sync of another request has been at work for {_WAIT_S:.0f} s", errno.ETIMEDOUT)
            self.check()
            if self._ended >= needed:
                return
            self._begun += 1
        # Not by a local variable that `finally` reads: mypyc takes it for None there.
        try:
            self._sync()
        except DiskError as error:
            self._synced(error)
            raise
        except BaseException:
            self._synced(DiskError("a sync was interrupted by an error of the program"))
            raise
        self._synced(None)

    def _synced(self, failure: DiskError | None) -> None:
        """The sync that was begun last has ended."""
        with self._changed:
            self._failure = self._failure or failure
            self._ended = self._begun
            self._changed.notify_all()

    def settle(self) -> None:
        """Everything is stable for which `run` was called before this, also where it was not waited for to the end;
        DiskError otherwise."""
        self.check()
        if self._ended < self._owed:
            self.run()

    def check(self) -> None:
        """DiskError when a sync has failed."""
        failure = self._failure
        if failure is not None:
            raise failure.again() from failure

    def fail(self, failure: DiskError) -> None:
        """Something that had to be made stable could not be, by a sync that was not this group's."""
        with self._changed:
            self._failure = self._failure or failure
