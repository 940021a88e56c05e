# SPDX-License-Identifier: BSD-3-Clause
"""Threads that nobody would start again outlive a defect, and want of memory."""

from __future__ import annotations

import threading

import pytest

from replication import log
from replication.log import Log
from replication.primary.schedule import Ticker
from replication.server.clients import HostWatch

DEFECTS = [MemoryError("no more"), KeyError("nobody expected it")]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    monkeypatch.setattr(log, "LOG", Log(written.append))
    return written


@pytest.mark.parametrize("defect", DEFECTS, ids=["memory", "defect"])
def test_a_ticker_goes_on(defect: Exception, lines: list[str]) -> None:
    calls = threading.Semaphore(0)

    def action() -> None:
        calls.release()
        raise type(defect)(*defect.args)

    ticker = Ticker("ticker", 0.01, action)
    ticker.start()
    for _ in range(3):
        assert calls.acquire(timeout=30)
    ticker.stop(30)
    assert repr(defect).partition("(")[0] in lines[0]


@pytest.mark.parametrize("defect", [*DEFECTS, OSError(24, "Too many open files")], ids=["memory", "defect", "files"])
def test_the_watch_of_the_clients_hosts_goes_on(
    defect: Exception, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = threading.Semaphore(0)

    def look(*_: object) -> None:
        calls.release()
        raise type(defect)(*defect.args)

    monkeypatch.setattr("replication.server.clients._LOOK_S", 0.01)
    monkeypatch.setattr(HostWatch, "look", look)
    watch = HostWatch()
    watch.start()
    for _ in range(3):
        assert calls.acquire(timeout=30)
    watch.stop()
