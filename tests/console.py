# SPDX-License-Identifier: BSD-3-Clause
"""What a guest says on its serial line, and when."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guestimages import GuestError
from records import Acknowledged
from waiting import DEADLINE_S, Stuck, wait_until


class Console:
    """Our end of a guest's serial line. A thread reads it; each line with `vm: ` is kept, with its moment."""

    def __init__(self, connection: socket.socket, log: Path) -> None:
        """Read `connection` until its end. All that comes is appended to `log`, too."""
        self._connection = connection
        self._log = log
        self._changed = threading.Condition()
        self._lines: list[tuple[float, str]] = []
        self._records: list[Acknowledged] = []
        self._error: str | None = None
        self._ended = False
        threading.Thread(target=self._read, name=f"console-{log.name}", daemon=True).start()

    def _read(self) -> None:
        rest = b""
        with open(self._log, "ab", buffering=0) as log:
            while self._received(1, socket.MSG_PEEK):
                # Received and taken in as one, so that `drain` sees when all has been.
                with self._changed:
                    data = self._received(65536)
                    log.write(data)
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self._take_locked(line.decode(errors="replace").strip())
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._connection.close()
            self._changed.notify_all()

    def _received(self, length: int, flags: int = 0) -> bytes:
        """What comes next; nothing at the end."""
        try:
            return self._connection.recv(length, flags)
        except ConnectionError:
            return b""

    def _take_locked(self, line: str) -> None:
        moment = time.monotonic()
        if found := re.search(r"vm: (.*)", line):
            text = found[1]
            self._lines.append((moment, text))
            if record := re.fullmatch(r"record (\d+) (\d+) ([\d.]+)", text):
                self._records.append(Acknowledged(moment, int(record[1]), int(record[2]), float(record[3])))
            elif text.startswith("error "):
                self._error = text
        elif "Kernel panic" in line:
            self._error = line

    @property
    def records(self) -> list[Acknowledged]:
        """The records that the guest has acknowledged, in the order in which it said so."""
        with self._changed:
            return list(self._records)

    @property
    def last(self) -> int:
        """The number of the last acknowledged record; 0 if there is none."""
        with self._changed:
            return self._records[-1].number if self._records else 0

    def moment_of(self, word: str) -> float | None:
        """When the guest first said `vm: WORD...` (time.monotonic()); None if it has not."""
        with self._changed:
            return next((moment for moment, line in self._lines if line.split()[0] == word), None)

    def drain(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until all has been read that QEMU has put out; what `last` is then. For a guest that stands still."""

        def empty() -> bool:
            with self._changed:
                return self._ended or not select.select([self._connection], [], [], 0)[0]

        wait_until(empty, "all has been read from the console", timeout_s)
        return self.last

    def send(self, line: str) -> None:
        """Type a line."""
        self._connection.sendall(line.encode() + b"\n")

    def wait(self, word: str, timeout_s: float) -> str:
        """Wait until the guest has said `vm: WORD...`: what follows the word. GuestError if something failed in the
        guest, or if it has ended; Stuck after `timeout_s`."""

        def said() -> str | None:
            return next((line for _, line in self._lines if line.split()[0] == word), None)

        line = str(self._wait(said, f"the guest says {word!r}", timeout_s))
        return line.partition(" ")[2]

    def wait_records(self, number: int, timeout_s: float) -> Acknowledged:
        """Wait until record `number` has been acknowledged; errors as `wait`."""

        def there() -> Acknowledged | None:
            return next((line for line in reversed(self._records) if line.number >= number), None)

        acknowledged: Acknowledged = self._wait(there, f"the guest acknowledges record {number}", timeout_s)
        return acknowledged

    def wait_more(self, count: int, timeout_s: float) -> Acknowledged:
        """Wait until `count` more records than now have been acknowledged; errors as `wait`."""
        return self.wait_records(self.last + count, timeout_s)

    def watch(self, duration_s: float) -> None:
        """Let the guest work for so long; GuestError if it fails meanwhile."""
        with contextlib.suppress(Stuck):
            self._wait(lambda: None, "nothing", duration_s)

    def wait_end(self, timeout_s: float) -> None:
        """Wait until all has been read that a guest which has ended said."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout_s):
                raise Stuck(f"the console has not ended within {timeout_s:g} s")

    def _wait(self, condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (value := condition()):
                if self._error is not None:
                    raise GuestError(f"{what}: it failed: {self._error}")
                if self._ended:
                    raise GuestError(f"{what}: it has ended; its last words: {self._last_words()}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise Stuck(f"not within {timeout_s:g} s: {what}; its last words: {self._last_words()}")
                self._changed.wait(left_s)
            return value

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return " / ".join(text.split("\n")[-6:]).strip()
