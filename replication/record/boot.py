# SPDX-License-Identifier: BSD-3-Clause
"""Which boot of the host this is: what was in memory, tmpfs or the page cache in another one is gone or torn."""

from __future__ import annotations

import os

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
