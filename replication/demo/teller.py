# SPDX-License-Identifier: BSD-3-Clause
"""What a person reads: each step with the seconds since the start, and numbers with units."""

from __future__ import annotations

import time

from rich.console import Console

MIB = 1 << 20


class Teller:
    """Prints each step with the seconds since the start."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._begun = time.monotonic()

    def step(self, text: str) -> None:
        """What is done now."""
        self._say("bold", "", text)

    def fact(self, text: str) -> None:
        """What came of it."""
        self._say("", "    ", text)

    def held(self, text: str) -> None:
        """A check that holds."""
        self._say("green", " ok ", text)

    def failed(self, text: str) -> None:
        """A check that does not hold, or a step that failed."""
        self._say("bold red", "BAD ", text)

    def _say(self, style: str, mark: str, text: str) -> None:
        moment = f"{time.monotonic() - self._begun:5.1f} s  "
        self._console.print(moment + mark + text, style=style or None, markup=False)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun


def human(count: int) -> str:
    """Bytes for people."""
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


def human_s(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
