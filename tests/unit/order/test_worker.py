# SPDX-License-Identifier: BSD-3-Clause
"""worker.py: whatever a round or a start raises, what there is to do is done."""

from __future__ import annotations

import ast
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from replication.errors import CommandError
from replication.order import worker as module
from replication.order.worker import Worker
from waiting import DEADLINE_S, wait_until

ROOT = Path(__file__).resolve().parents[3]


class Rounds:
    """What a worker does: counts its rounds, and raises or returns what it is told."""

    def __init__(self) -> None:
        self.done = threading.Semaphore(0)
        self.raises: list[Exception] = []
        self.returns: float | None = 3600.0
        self.worker = Worker("test", self)

    def __call__(self) -> float | None:
        self.done.release()
        if self.raises:
            raise self.raises.pop()
        return self.returns

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.done.acquire(timeout=DEADLINE_S)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rounds]:
    monkeypatch.setattr(module, "AGAIN_MIN_S", 0.01)
    rounds = Rounds()
    yield rounds
    assert rounds.worker.stop(DEADLINE_S)
    assert not rounds.worker.alive


def refuse(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def no_memory(_thread: threading.Thread) -> None:
    raise MemoryError


@pytest.mark.parametrize("defect", [KeyError("nobody expected it"), MemoryError("no more")], ids=["defect", "memory"])
def test_a_round_that_fails_is_followed_by_another_one(rounds: Rounds, defect: Exception) -> None:
    rounds.raises = [defect, defect]
    rounds.worker.start()
    rounds.wait(3)


def test_a_failure_between_two_rounds_ends_no_thread(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds.returns = 0.0
    rounds.worker.start()
    rounds.wait()
    real, failed = rounds.worker._changed.wait_for, threading.Event()

    def fails(*arguments: object) -> bool:
        if not failed.is_set():
            failed.set()
            raise MemoryError
        return bool(real(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(rounds.worker._changed, "wait_for", fails)
    assert failed.wait(DEADLINE_S)
    while rounds.done.acquire(blocking=False):
        pass
    rounds.wait(2)


@pytest.mark.parametrize("start", [refuse, no_memory])
def test_without_a_thread_a_start_is_refused_and_the_next_wake_tries_again(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch, start: object
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(CommandError, match="There is no thread for test"):
            rounds.worker.start()
        rounds.worker.wake()
        assert not rounds.worker.alive
    rounds.worker.wake()
    rounds.wait()


def test_a_worker_with_nothing_to_do_needs_no_thread_until_it_is_woken(rounds: Rounds) -> None:
    rounds.returns = None
    rounds.worker.wake()
    rounds.wait()
    wait_until(lambda: not rounds.worker.alive, "the thread has ended")
    rounds.worker.wake()
    rounds.wait()


def test_a_round_can_end_its_worker() -> None:
    ended = threading.Event()

    def work() -> None:
        assert worker.stop(0.0), "it does not wait for itself"
        ended.set()

    worker = Worker("test", work)
    worker.start()
    assert ended.wait(DEADLINE_S)
    assert worker.stop(DEADLINE_S)
    worker.wake()
    time.sleep(0.01)
    assert not worker.alive, "after the end nothing starts it again"


# -- the rule ----------------------------------------------------------------------------------------------------

OTHER_PROGRAMS = ("client", "demo", "machine", "monitor", "replctl")
"""Wings that no node runs: their programs may end, and say so."""

AT_START = {
    "replication/server/disconnect.py": 1,
    "replication/control/server.py": 1,
    "replication/service/pulse.py": 1,
    "replication/secondary/commit.py": 1,
}
"""Starts of threads at the start of the process, which fails with them; and that of a CommitThread, of which its caller
says it (Failover.begin)."""


def test_every_start_of_a_thread_says_what_becomes_of_the_work_without_one() -> None:
    """Each function that starts one catches what `start` raises, or it is one of those at the start of the process."""
    found: dict[str, int] = {}
    for path in sorted((ROOT / "replication").rglob("*.py")):
        if path.parent.name in OTHER_PROGRAMS:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and _starts_a_thread(function) and not _prepared(function):
                name = str(path.relative_to(ROOT))
                found[name] = found.get(name, 0) + 1
    assert found == AT_START


def _starts_a_thread(function: ast.FunctionDef) -> bool:
    """Whether the function itself has a `.start()` of what is, by its name, a thread."""
    for node in _own(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "start":
            said = ast.unparse(node.func.value)
            if "Thread(" in said or said.split(".")[-1].lstrip("_") in THREADS:
                return True
    return False


THREADS = (
    *("thread", "reader", "writer", "acceptor", "sender", "drainer", "helper", "flusher", "deleting", "timer"),
    "commit",
)


def _prepared(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.ExceptHandler)
        and node.type is not None
        and ("NO_THREAD" in ast.unparse(node.type) or {"RuntimeError", "MemoryError"} <= set(_names(node.type)))
        for node in _own(function)
    ) or any(
        isinstance(node, ast.ExceptHandler) and ast.unparse(node.type or node) == "BaseException"
        for node in _own(function)
    )


def _names(node: ast.AST) -> Iterator[str]:
    return (each.id for each in ast.walk(node) if isinstance(each, ast.Name))


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What stands in a function, but not in functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
