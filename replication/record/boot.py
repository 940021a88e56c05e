# SPDX-License-Identifier: BSD-3-Clause
"""Which boot of the host this is: what was in memory, tmpfs or the page cache in another one is gone or torn; and the
clock that tells how long ago something was within a boot."""

from __future__ import annotations

import os
import time

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
BOOT_ID_ENVIRONMENT = "NBDKIT_REPLICATION_BOOT_ID"
"""A test names another boot with this variable."""


def boot_id() -> str:
    """A name that is another one after every boot of the host (random(4)); OSError where /proc is not mounted."""
    named = os.environ.get(BOOT_ID_ENVIRONMENT)
    if named:
        return named
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


def boot_clock_s() -> float:
    """Seconds since the host was booted, those in which it was suspended included. Nobody sets this clock, so what is
    measured by it is a duration; in another boot, or on another host, it means nothing."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
