# SPDX-License-Identifier: BSD-3-Clause
"""Named points at which a test can hold a thread, to force an interleaving instead of hoping for one.

Off, and one cheap call, unless NBDKIT_REPLICATION_PAUSE names a folder when the process starts. Then
a thread that reaches point P and finds the file P in the folder renames it to P.hit and waits until P.hit is
removed, at most PAUSE_S seconds. The rename picks exactly one thread, also among several that arrive at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

PAUSE_S = 30.0
_POLL_S = 0.002


def _never(name: str) -> None:
    """Pause points are off."""


def _pauser(folder: str) -> Callable[[str], None]:
    def pause(name: str) -> None:
        armed = os.path.join(folder, name)
        held = armed + ".hit"
        try:
            os.rename(armed, held)
        except FileNotFoundError:
            return
        deadline = time.monotonic() + PAUSE_S
        while os.path.exists(held) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    return pause


_folder = os.environ.get("NBDKIT_REPLICATION_PAUSE")
pause: Callable[[str], None] = _pauser(_folder) if _folder else _never
"""`pause(name)`: hold the calling thread here if a test asked for it."""
