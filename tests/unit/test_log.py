# SPDX-License-Identifier: BSD-3-Clause
"""log.py: a line costs nobody an error or a wait, and a storm of one kind is cut and counted."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from replication import log as module
from replication.errors import ConfigError, DiskError
from replication.log import KIND_LINES, QUEUE_LINES, Log, log, log_defect
from waiting import wait_until


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `log` writes in this test."""
    written: list[str] = []
    monkeypatch.setattr(module, "LOG", Log(written.append))
    return written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the log's clock on."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def advance(by_s: float) -> None:
        now[0] += by_s

    return advance


def test_a_line_says_whose_it_is(lines: list[str]) -> None:
    log("the link is lost")
    assert lines == ["nbdkit-replication: the link is lost"]


def test_a_line_is_one_line(lines: list[str]) -> None:
    log("export 'a\nnbdkit: forged\x1b[2J'")
    assert lines == ["nbdkit-replication: export 'a\\nnbdkit: forged\\x1b[2J'"]


def test_a_defect_has_its_traceback(lines: list[str]) -> None:
    try:
        raise KeyError("nobody expected it")
    except KeyError as error:
        log_defect(error)
    assert lines[0].startswith("nbdkit-replication: Traceback ")
    assert lines[0].endswith("KeyError: 'nobody expected it'")


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left"), ValueError("closed"), MemoryError()]
)
def test_what_cannot_be_written_is_nobodys_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise error

    monkeypatch.setattr(module, "LOG", Log(broken))
    log("a line")
    log_defect(error)
    assert isinstance(DiskError.from_defect(error), DiskError)


def test_a_traceback_that_cannot_be_made_leaves_the_name(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> list[str]:
        raise MemoryError

    monkeypatch.setattr(module.traceback, "format_exception", no_memory)
    log_defect(KeyError("x"))
    assert lines == ["nbdkit-replication: KeyError"]


def test_a_storm_is_cut_and_counted_and_other_kinds_are_not(lines: list[str], clock: Callable[[float], None]) -> None:
    for number in range(5000):
        log(f"refused {number}")
    log("something else")
    assert len(lines) == KIND_LINES + 1
    clock(1.0)
    log("and on it goes")
    here = f"{__name__}"
    assert lines[KIND_LINES:] == [
        "nbdkit-replication: something else",
        f"nbdkit-replication: {5000 - KIND_LINES} more lines of this kind were left out "
        f"(test_a_storm_is_cut_and_counted_and_other_kinds_are_not in {here})",
        "nbdkit-replication: and on it goes",
    ]


def test_what_was_left_out_is_told_although_nothing_comes_after_it() -> None:
    written: list[str] = []
    journal = Log(written.append)
    journal.start()
    for _ in range(KIND_LINES + 7):
        journal.put("line", "kind", "kind")
    wait_until(lambda: len(written) > KIND_LINES, "the count comes by itself")
    assert written[-1] == "nbdkit-replication: 7 more lines of this kind were left out (kind)"


def test_the_end_tells_what_was_left_out(lines: list[str]) -> None:
    for _ in range(KIND_LINES + 1):
        log("line")
    assert module.LOG.flush()
    assert lines[-1].startswith("nbdkit-replication: 1 more lines of this kind were left out")


def test_what_is_said_before_a_refusal_is_left_out() -> None:
    written: list[str] = []
    journal = Log(written.append)
    with journal.held(unless=ConfigError):
        journal.put("first", 0)
        assert written == []
    assert written == ["first"]

    def refused(error: Exception) -> None:
        with journal.held(unless=ConfigError):
            journal.put("second", 0)
            raise error

    with pytest.raises(ConfigError):
        refused(ConfigError("no"))
    with pytest.raises(MemoryError):
        refused(MemoryError())
    assert written == ["first", "second"]


def test_nobody_waits_for_a_log_that_takes_nothing() -> None:
    go_on, stuck = threading.Event(), threading.Event()
    written: list[str] = []

    def slow(text: str) -> None:
        stuck.set()
        assert go_on.wait(30)
        written.append(text)

    journal = Log(slow)
    journal.start()
    journal.put("first", 0)
    assert stuck.wait(30)
    for number in range(QUEUE_LINES + 50):
        journal.put("line", number // KIND_LINES)
    assert not journal.flush(0.05)
    go_on.set()
    assert journal.flush(30)
    assert len(written) == QUEUE_LINES + 2
    assert written[1] == "nbdkit-replication: 50 lines were left out: the log was full or too slow"


def test_kinds_are_bounded(clock: Callable[[float], None]) -> None:
    written: list[str] = []
    journal = Log(written.append)
    for number in range(10_000):
        journal.put("line", number)
    assert len(written) == module.KINDS_MAX


def test_without_a_thread_the_line_is_written_by_whom_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    written: list[str] = []
    journal = Log(written.append)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        journal.start()
    journal.put("line", 0)
    assert written == ["line"]


def test_what_ends_a_thread_goes_to_the_log(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(module.sys, "unraisablehook", module.sys.unraisablehook)
    module.log_uncaught()

    def defect() -> None:
        raise KeyError("of a thread")

    thread = threading.Thread(target=defect)
    thread.start()
    thread.join()
    assert "KeyError: 'of a thread'" in lines[0]


def test_a_line_is_there_before_whoever_has_written_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test, or a person, that looks at the log because of an answer finds the reason there."""
    monkeypatch.setattr(module, "PATIENCE_S", 30.0)  # the thread may have to wait for its turn
    written: list[str] = []
    journal = Log(written.append)
    journal.start()
    for number in range(300):
        journal.put(f"line {number}", number // KIND_LINES)
        assert written[-1:] == [f"line {number}"]


def test_only_the_first_line_waits_for_a_log_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, waits = threading.Event(), []
    journal = Log(lambda _: go_on.wait(30) and None)
    wait_for, caller = threading.Condition.wait_for, threading.current_thread()

    def counted(condition: threading.Condition, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        if threading.current_thread() is caller:  # threads that other tests have left behind may wait, too
            waits.append(timeout)
        return wait_for(condition, predicate, timeout)

    monkeypatch.setattr(threading.Condition, "wait_for", counted)
    journal.start()
    for number in range(50):
        journal.put("line", number // KIND_LINES)
    assert waits == [module.PATIENCE_S]
    go_on.set()
    assert journal.flush(30)
