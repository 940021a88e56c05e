# SPDX-License-Identifier: BSD-3-Clause
"""A failover does not wait for another command's disk: who may take long gives way to it.

Two kinds of wait give way. A command that waits before the gate for requests to end (Gate.closed), and one that waits
for storage (`run`): that goes on in a thread that nobody waits for any more, since no system call can be taken back.
What the failover itself needs of a storage it waits for in the same way, until its time is over (Haste).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from replication.errors import CommandError
from replication.order.worker import NO_THREAD

GIVES_WAY = "a failover has come first"


class Overdue(CommandError):
    """It has not ended in time, and goes on by itself."""


class Haste(NamedTuple):
    """How a failover is to be done."""

    deadline: float
    """When it has to be answered, in seconds of time.monotonic."""
    force: bool = False
    """A person accepts that there is no valid checkpoint, and that a crash may undo what could not be saved."""

    @property
    def left_s(self) -> float:
        """Seconds until then."""
        return max(0.0, self.deadline - time.monotonic())


class Urgency:
    """Whether a failover waits. One for each node."""

    def __init__(self) -> None:
        # Protects the number. Never held across I/O, nor while somebody else's lock is taken.
        self._changed = threading.Condition()
        self._asking = 0
        self.wake: Callable[[], None] = _nobody
        """Called when somebody asks, without locks: who waits elsewhere looks at `asked`."""

    @property
    def asked(self) -> bool:
        """Whether others have to give way."""
        return self._asking > 0

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Have everybody give way while this is held."""
        with self._changed:
            self._asking += 1
            self._changed.notify_all()
        try:
            self.wake()
            yield
        finally:
            with self._changed:
                self._asking -= 1

    def run(
        self, action: Callable[[], None], within_s: float | None = None, *, yields: bool = True, name: str = "flush"
    ) -> None:
        """Do `action()`, which may take long, and raise what it raises. CommandError as soon as others have to give
        way, if it `yields`, and Overdue after `within_s` seconds: then it goes on by itself, and what it raises is
        nobody's. `name` is the thread's."""
        ended = False
        failure: BaseException | None = None

        def work() -> None:
            nonlocal ended, failure
            try:
                action()
            except BaseException as error:  # noqa: BLE001 (it is raised below)
                failure = error
            with self._changed:
                ended = True
                self._changed.notify_all()

        try:
            threading.Thread(target=work, name=name, daemon=True).start()
        except NO_THREAD:  # then nobody can be let go first
            action()
            return
        with self._changed:
            # Without `within_s` the action's own deadlines bound this: the kernel's for a disk, the connection's for an
            # endpoint.
            self._changed.wait_for(lambda: ended or (yields and self._asking > 0), within_s)
            if not ended and yields and self._asking:
                raise CommandError(f"This command was given up: {GIVES_WAY}")
            if not ended:
                raise Overdue(f"no answer within {within_s:.1f} s")
        if failure is not None:
            raise failure


def _nobody() -> None:
    """Nobody waits elsewhere."""
