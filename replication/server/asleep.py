# SPDX-License-Identifier: BSD-3-Clause
"""Whether nbdkit's threads sleep: the proof that none of them is in the midst of nbdkit's own code.

A thread that was asleep in two looks, and was not switched to another one in between, has slept all that time. When
that holds for all of them, they slept at one instant: between the last of the first looks and the first of the second.
"""

from __future__ import annotations

import os
import threading
import time

_TASKS = "/proc/self/task"
_SLEEPING = (b"S", b"D")
"""States of proc(5): waiting, which includes waiting for storage. Whoever runs, or could, is R."""
_LOOK_S = 0.002


def fell_asleep(wait_s: float) -> bool:
    """Wait until all threads that Python has not started sleep at one instant; False after `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    before = _look()
    while True:
        time.sleep(_LOOK_S)
        now = _look()
        if now is not None and now == before:
            return True
        if time.monotonic() >= deadline:
            return False
        before = now


def _look() -> dict[str, bytes] | None:
    """What tells how often each thread was switched; None when one of them is awake."""
    own = {str(thread.native_id) for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
    found: dict[str, bytes] = {}
    for task in os.listdir(_TASKS):
        if task in own:
            continue
        try:
            with open(f"{_TASKS}/{task}/status", "rb") as file:
                status = file.read()
        except OSError:
            continue  # it has ended
        state = status.partition(b"\nState:")[2].lstrip()[:1]
        if state not in _SLEEPING:
            return None
        found[task] = status[status.index(b"\nvoluntary_ctxt_switches:") :]
    return found
