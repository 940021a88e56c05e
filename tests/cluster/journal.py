# SPDX-License-Identifier: BSD-3-Clause
"""What the guests have written, in the order in which it happened, and what must hold of it.

* No two guests write at once: once a guest has begun, none of an older generation is acknowledged anything.
* What a checkpoint has is not lost: a guest goes on after the last record that is safe.
* Nothing stale: the record before which a guest goes on is the last one, or one that was acknowledged after the last
  checkpoint, of the generation that wrote it; and what it goes on without was acknowledged in the last seconds before
  the end of the former one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

LOST_S = 10.0
"""What a copy may lack: a checkpoint each second, and until the cluster knows that there was none, a lost link's 3 s of
timeout and a monitor's interval of 2 s; the rest is for a busy machine."""
FRESH_S = 2.0
"""A guest that was answered so long ago, or later, writes."""


@dataclass(frozen=True)
class Line:
    """One line of the journal (writer.py)."""

    time: float
    word: str
    host: str
    generation: str
    number: int
    before: str = ""


class Journal:
    """The file of the guests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[Line]:
        """All so far."""
        found = []
        for text in self.path.read_text().splitlines():
            moment, word, host, generation, number, *more = text.split()
            found.append(Line(float(moment), word, host, generation, int(number), *more))
        return found

    def tail(self, count: int = 3) -> list[str]:
        """The last lines, and all beginnings."""
        texts = self.path.read_text().splitlines()
        return [*(text for text in texts if " begin " in text), "...", *texts[-count:]]

    def acknowledged(self, since: float = 0) -> list[Line]:
        """Answered writes, oldest first."""
        return [line for line in self.lines() if line.word == "ack" and line.time > since]

    def begins(self, since: float = 0) -> list[Line]:
        """Starts of guests."""
        return [line for line in self.lines() if line.word == "begin" and line.time > since]

    def safe(self, generation: str) -> bool:
        """Whether a checkpoint has something that this guest wrote."""
        return any(line.word == "safe" and line.generation == generation for line in self.lines())

    def writes(self, host: str) -> bool:
        """Whether the guest that began last is on that host, and writes."""
        last = self.acknowledged()[-1:]
        return bool(last) and last[0].host == host and time.time() - last[0].time < FRESH_S

    def violations(self) -> list[str]:
        """What of the promises was broken."""
        found: list[str] = []
        current: Line | None = None
        newest: dict[str, int] = {}
        written_by: dict[int, str] = {}
        written: dict[int, float] = {}
        safe = -1
        for line in self.lines():
            if line.word == "begin":
                if line.number <= safe:
                    found.append(f"{line}: records up to {safe} were safe")
                last = line.number - 1
                if last >= 0 and last <= max(written_by, default=-1) and written_by.get(last) != line.before:
                    found.append(f"{line}: record {last} was written by {written_by.get(last)}")
                lost_s = max(written.values(), default=0) - min(
                    (moment for number, moment in written.items() if number >= line.number), default=1e12
                )
                if lost_s > LOST_S:
                    found.append(f"{line}: the former guest had gone on for {lost_s:.1f} s")
                written_by = {number: who for number, who in written_by.items() if number < line.number}
                written = {number: moment for number, moment in written.items() if number < line.number}
                current = line
            elif current is None or line.generation != current.generation:
                if line.word == "ack":
                    found.append(f"{line}: it was answered although {current} has begun")
            elif line.word == "ack":
                newest[line.generation] = line.number
                written_by[line.number] = line.generation
                written[line.number] = line.time
            elif line.word == "safe":
                safe = max(safe, line.number)
        return found
