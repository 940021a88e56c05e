# SPDX-License-Identifier: BSD-3-Clause
"""urgency.py: what takes long is left behind when a failover asks for the way."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from replication.errors import CommandError, DiskError
from replication.order.urgency import Overdue, Urgency

DEADLINE_S = 20.0


def test_an_action_ends_as_it_would_have_without() -> None:
    urgency = Urgency()
    done: list[int] = []
    urgency.run(lambda: done.append(1))
    assert done == [1]

    def fail() -> None:
        raise DiskError("broken")

    with pytest.raises(DiskError, match="broken"):
        urgency.run(fail)


def test_who_waits_for_an_action_gives_way_and_the_action_goes_on() -> None:
    urgency = Urgency()
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def action() -> None:
        begun.set()
        assert release.wait(DEADLINE_S)
        ended.set()

    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(urgency.run, action)
        assert begun.wait(DEADLINE_S)
        with urgency.asking():
            assert urgency.asked
            with pytest.raises(CommandError, match="a failover has come first"):
                command.result(DEADLINE_S)
        assert not urgency.asked
        assert not ended.is_set()
        release.set()
        assert ended.wait(DEADLINE_S)
    urgency.run(lambda: None)


def test_without_threads_the_action_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    Urgency().run(lambda: done.append(1))
    assert done == [1]


def test_an_action_that_is_overdue_goes_on_and_a_failover_s_own_does_not_give_way() -> None:
    urgency = Urgency()
    release, ended = threading.Event(), threading.Event()

    def action() -> None:
        assert release.wait(DEADLINE_S)
        ended.set()

    with urgency.asking(), pytest.raises(Overdue, match=r"no answer within 0\.1 s"):
        urgency.run(action, 0.05, yields=False)
    assert not ended.is_set()
    release.set()
    assert ended.wait(DEADLINE_S)
