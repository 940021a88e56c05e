# SPDX-License-Identifier: BSD-3-Clause
"""Lines for the operator's log: nbdkit's standard error, or wherever nbdkit's user has sent it."""

from __future__ import annotations

import sys


def log(text: str) -> None:
    """Write one line."""
    print(f"nbdkit-replication: {text}", file=sys.stderr, flush=True)
