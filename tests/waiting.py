# SPDX-License-Identifier: BSD-3-Clause
"""Deadlines, and threads that ought to wait: nothing in a test waits without a limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

DEADLINE_S = 60.0
"""Longest wait for anything that should take milliseconds: long enough for a busy machine with two cores, and for an
fdatasync behind everything that the tests beside this one have written (20 s were once too short)."""

CHANCE_S = 0.25
"""How long `chance` lets a request that ought to wait do the wrong thing."""

_POLL_S = 0.002
T = TypeVar("T")


class Stuck(AssertionError):
    """Something did not happen before its deadline."""


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = DEADLINE_S) -> Any:
    """Poll until `condition()` is true and return its value; raises Stuck, naming `what`, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Stuck(f"not within {timeout_s:g} s: {what}")
        time.sleep(_POLL_S)


def begin(call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Run `call` in a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:  # noqa: BLE001 (it is the future's business)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def chance(future: Future[T]) -> bool:
    """Give a request that ought to wait the time to do the wrong thing; whether it has ended."""
    try:
        future.exception(CHANCE_S)
    except FutureTimeoutError:
        return False
    return True
