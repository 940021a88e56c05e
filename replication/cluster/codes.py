# SPDX-License-Identifier: BSD-3-Clause
"""How an action ends, and where Pacemaker finds why."""

from __future__ import annotations

import sys
from enum import IntEnum


class Code(IntEnum):
    """OCF's exit codes. The last two are Pacemaker's own: it works, and somebody has to look at it."""

    OK = 0
    GENERIC = 1
    ARGS = 2
    UNIMPLEMENTED = 3
    INSTALLED = 5
    CONFIGURED = 6
    NOT_RUNNING = 7
    PROMOTED = 8
    FAILED_PROMOTED = 9
    DEGRADED = 190
    DEGRADED_PROMOTED = 191


class Failed(Exception):
    """The action ends with this code."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


def ended(code: Code, text: str) -> Code:
    """That code; `text` is the reason that the cluster's status shows."""
    print("ocf-exit-reason:" + " ".join(text.split()), file=sys.stderr)
    return code


def note(text: str) -> None:
    """Pacemaker takes it into its log."""
    print(f"replication: {text}", file=sys.stderr)
