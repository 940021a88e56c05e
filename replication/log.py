# SPDX-License-Identifier: BSD-3-Clause
"""Lines for the operator's log, which is nbdkit's: standard error, syslog or nothing, as its --log says, and syslog
where it has gone into the background.

Invariants
* Nobody who writes a line gets an error, or waits for long: from `Log.start` on a thread hands the lines to nbdkit. As
  long as it is as quick as a log should be, a line is there before whoever has written it goes on. A full disk, a
  closed descriptor or a pipe that nobody reads costs lines, never a thread.
* At most KIND_LINES lines of one kind in KIND_S seconds, and QUEUE_LINES lines in the queue. What is left out is
  counted, and the count is a line of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

NAME = "nbdkit-replication"

KIND_LINES = 10
KIND_S = 1.0
"""A storm of one kind is cut to this; what the first lines of it say, the others would say again."""

KINDS_MAX = 256
"""Kinds that are counted at a time. A kind is a place in the source, or a callback and an errno: there are fewer."""

QUEUE_LINES = 1000
"""Waiting for a log that takes nothing. A line is some hundred bytes."""

PATIENCE_S = 0.1
"""How long the first line waits that meets a log which takes nothing. Those that follow do not wait at all."""

_LINE_MAX = 16 << 10
_FLUSH_S = 1.0


def _nbdkit_error() -> Callable[[str], None] | None:
    """nbdkit's own function, if this process is one. Called without the GIL."""
    function: Any = getattr(ctypes.CDLL(None), "nbdkit_error", None)
    if function is None:
        return None
    function.restype = None

    def write(text: str) -> None:
        function(b"%s", ctypes.c_char_p(text.encode("utf-8", "backslashreplace")))

    return write


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class _Kind:
    """What was written of one kind since `since` (time.monotonic)."""

    since: float
    lines: int = 0
    left_out: int = 0
    name: str = ""


class Log:
    """Takes lines from any thread, and hands them to `sink` one after the other."""

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self.verbose = False
        """Whether `debug` writes anything."""
        # Protects everything below; never held while a line is written. Below all other locks: any thread may log.
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[str] = deque()
        self._dropped = 0
        self._writing = False
        # How many lines were put into the queue and taken out of it again, written.
        self._put_in = self._done = 0
        # The log takes nothing, as somebody has found out by waiting.
        self._stuck = False
        self._threaded = False
        self._held = False
        self._kinds: dict[Hashable, _Kind] = {}

    def start(self) -> None:
        """From now on a thread writes; nbdkit has forked. Without one, who has a line to write writes it."""
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._threaded = True
        try:
            thread.start()
        except (RuntimeError, MemoryError):  # no thread
            self._threaded = False

    @contextlib.contextmanager
    def held(self, unless: type[BaseException]) -> Iterator[None]:
        """Write what is put in meanwhile at the end, unless that is an error of this type: a refusal is one line, and
        what would have been said of what is refused is of no interest."""
        self._held = True
        try:
            yield
        except unless:
            with self._changed:
                self._queue.clear()
            raise
        finally:
            self._held = False
            self._write_queued()

    def put(self, text: str, kind: Hashable, name: str = "") -> None:
        """Write a line, unless there were too many of its kind. `name` says in the count what was left out."""
        with contextlib.suppress(Exception):  # not even for want of memory does a line fail
            with self._changed:
                if not self._counted_locked(kind, name, time.monotonic()):
                    return
                self._put_locked(text[:_LINE_MAX])
                if self._threaded and not self._stuck:
                    mine = self._put_in
                    self._stuck = not self._changed.wait_for(lambda: self._done >= mine or self._stuck, PATIENCE_S)
            if not self._threaded and not self._held:
                self._write_queued()

    def flush(self, timeout_s: float = _FLUSH_S) -> bool:
        """Wait until all has been written, for so many seconds at most; whether it has."""
        with self._changed:
            self._count_out_locked(float("inf"))
            if self._threaded:
                return self._changed.wait_for(lambda: not self._queue and not self._writing, timeout_s)
        self._write_queued()
        return True

    def _counted_locked(self, kind: Hashable, name: str, now: float) -> bool:
        self._count_out_locked(now - KIND_S)
        counted = self._kinds.get(kind)
        if counted is None:
            if len(self._kinds) >= KINDS_MAX:
                self._dropped += 1
                return False
            counted = self._kinds[kind] = _Kind(now, name=name)
            self._changed.notify_all()
        if counted.lines >= KIND_LINES:
            counted.left_out += 1
            return False
        counted.lines += 1
        return True

    def _count_out_locked(self, before: float) -> None:
        """Forget the kinds that began so long ago, and say how many lines of them were left out."""
        for kind in [kind for kind, counted in self._kinds.items() if counted.since <= before]:
            counted = self._kinds.pop(kind)
            if counted.left_out:
                what = f" ({counted.name})" if counted.name else ""
                self._put_locked(f"{NAME}: {counted.left_out} more lines of this kind were left out{what}")

    def _put_locked(self, text: str) -> None:
        if len(self._queue) >= QUEUE_LINES:
            self._dropped += 1
            return
        self._queue.append(text)
        self._put_in += 1
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with contextlib.suppress(Exception):
                with self._changed:
                    if not self._queue:
                        self._changed.wait(KIND_S if self._kinds else None)
                    self._count_out_locked(time.monotonic() - KIND_S)
                self._write_queued()

    def _write_queued(self) -> None:
        while True:
            with self._changed:
                if self._writing or not self._queue:
                    self._changed.notify_all()
                    return
                text = self._queue.popleft()
                dropped, self._dropped = self._dropped, 0
                self._writing = True
            try:
                if dropped:
                    self._sink(f"{NAME}: {dropped} lines were left out: the log was full or too slow")
                self._sink(text)
            except Exception:  # noqa: BLE001, S110 (there is no other place to say it)
                pass
            finally:
                with self._changed:
                    self._writing = self._stuck = False
                    self._done += 1
                    self._changed.notify_all()


LOG = Log(_nbdkit_error() or _stderr)
"""This process's."""


def log(text: str) -> None:
    """Write one line. Its kind is where it is called."""
    caller = sys._getframe(1)
    name = f"{caller.f_code.co_name} in {caller.f_globals.get('__name__', '?')}"
    LOG.put(f"{NAME}: {printable(text)}", (caller.f_code.co_filename, caller.f_lineno), name)


def debug(text: str) -> None:
    """Write one line if somebody wants to see what the process does (Log.verbose)."""
    if LOG.verbose:
        caller = sys._getframe(1)
        LOG.put(f"{NAME}: debug: {printable(text)}", (caller.f_code.co_filename, caller.f_lineno), "debug lines")


def log_defect(error: BaseException) -> None:
    """Write the traceback of what nobody expected: a bug, or no memory."""
    with contextlib.suppress(Exception):
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        LOG.put(f"{NAME}: {text.rstrip()}", ("defect", type(error)), type(error).__name__)
        return
    LOG.put(f"{NAME}: {type(error).__name__}", "defect", "defects")


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """For a round of a thread that nobody would start again: a defect, or no memory, ends the round alone."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (see above)
        log_defect(error)


def log_uncaught() -> None:
    """From now on, also what ends a thread or is raised where nobody can be told goes to the log."""

    def thread_ended(told: threading.ExceptHookArgs) -> None:
        if told.exc_value is not None and told.exc_type is not SystemExit:
            log_defect(told.exc_value)

    def unraisable(told: Any) -> None:
        if told.exc_value is not None:
            log_defect(told.exc_value)

    threading.excepthook = thread_ended
    sys.unraisablehook = unraisable


def printable(text: str) -> str:
    """The text with what does not belong into a line written out: a name that a client sent may hold a line end."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
