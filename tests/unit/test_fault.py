# SPDX-License-Identifier: BSD-3-Clause
"""fault.py: what is latched, what is kept of it, and who is told how often."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from replication import fault as fault_module
from replication.errors import DiskError
from replication.events import Event, EventHub
from replication.fault import Case, FaultLatch


class Desk:
    """A latch with a clock of its own, its events, and how often it asked to be made to last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = 1_000_000.0
        self.uptime = 50.0
        clock = SimpleNamespace(time=lambda: self.wall, monotonic=lambda: self.uptime)
        monkeypatch.setattr(fault_module, "time", clock)
        hub = EventHub()
        self.events: list[dict[str, object]] = []
        hub.subscribe(self._note)
        self.kept: list[bool] = []
        self.latch = FaultLatch(hub, lambda: self.kept.append(self.latch.fault is not None))

    def _note(self, event: Event) -> None:
        assert event["event"] == "REPLICATION_ERROR"
        self.events.append(event["data"])

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.uptime += seconds

    def report(self, case: Case, disk: str = "disk0", text: str = "trouble", write_lost: bool = False) -> None:
        self.latch.report(case, disk, "write", 4096, 512, DiskError(text, errno.ENOSPC), write_lost)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


@pytest.mark.parametrize("case", Case, ids=lambda case: case.name)
def test_what_is_only_told_is_an_event_and_not_latched(desk: Desk, case: Case) -> None:
    desk.latch.tell(case, "disk0", DiskError("trouble"))
    assert desk.latch.fault is None
    assert desk.kept == []
    assert desk.events == [{"case": int(case), "disk": "disk0", "desc": "trouble"}]


@pytest.mark.parametrize("case", Case, ids=lambda case: case.name)
def test_what_is_reported_is_told_and_latched_with_all_that_is_known(desk: Desk, case: Case) -> None:
    desk.report(case)
    fault = desk.latch.fault
    assert fault is not None
    assert fault.to_json() == {
        "case": int(case),
        "disk": "disk0",
        "operation": "write",
        "offset": 4096,
        "length": 512,
        "errno": "ENOSPC",
        "desc": "trouble",
        "count": 1,
        "first": desk.wall,
        "last": desk.wall,
        "write_lost": False,
    }
    assert desk.kept == [True]
    assert desk.events == [{"case": int(case), "disk": "disk0", "desc": "trouble"}]


def test_the_first_fault_is_kept_and_later_ones_are_counted(desk: Desk) -> None:
    desk.report(Case.FORWARD, text="first")
    begun = desk.wall
    desk.pass_time(10)
    desk.report(Case.LINK, disk="disk1", text="second")
    fault = desk.latch.fault
    assert fault is not None
    assert (fault.case, fault.disk, fault.desc, fault.count) == (Case.FORWARD, "disk0", "first", 2)
    assert (fault.first, fault.last) == (begun, desk.wall)
    assert desk.kept == [True], "only the first one is worth a write of the state file"


def test_a_write_of_the_primary_that_is_lost_later_is_added_to_the_fault_and_kept(desk: Desk) -> None:
    desk.report(Case.COPY_BEFORE_WRITE)
    assert not desk.latch.write_lost
    desk.report(Case.SECONDARY_DISK, write_lost=True)
    assert desk.latch.write_lost
    desk.report(Case.SECONDARY_DISK)
    assert desk.latch.write_lost
    assert desk.kept == [True, True]


def test_events_of_one_case_and_disk_come_at_most_once_a_second(desk: Desk) -> None:
    for _ in range(25):
        desk.report(Case.FORWARD)
        desk.latch.tell(Case.FORWARD, "disk0", DiskError("trouble"))
    desk.report(Case.FORWARD, disk="disk1")
    desk.report(Case.LINK)
    told = [(event["case"], event["disk"]) for event in desk.events]
    assert told == [(Case.FORWARD, "disk0"), (Case.FORWARD, "disk1"), (Case.LINK, "disk0")]
    desk.pass_time(1.0)
    desk.report(Case.FORWARD)
    assert len(desk.events) == 4


def test_a_clock_that_is_set_back_does_not_silence_the_events(desk: Desk) -> None:
    desk.report(Case.FORWARD)
    desk.pass_time(5)
    desk.wall -= 3600
    desk.report(Case.FORWARD)
    assert len(desk.events) == 2


def test_after_clearing_the_next_fault_is_a_first_one_again(desk: Desk) -> None:
    desk.report(Case.FORWARD, text="old", write_lost=True)
    desk.latch.clear()
    assert desk.latch.fault is None
    assert not desk.latch.write_lost
    desk.latch.clear()
    desk.report(Case.LINK, text="new")
    fault = desk.latch.fault
    assert fault is not None
    assert (fault.desc, fault.count) == ("new", 1)
    assert [event["desc"] for event in desk.events] == ["old", "new"], "without waiting for the second to pass"
    assert desk.kept == [True, False, True], "clearing what is clear is not worth a write"


def test_the_next_process_has_the_fault_of_the_former_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.report(Case.SECONDARY_DISK, write_lost=True)
    fault = desk.latch.fault
    assert fault is not None
    following = Desk(monkeypatch)
    following.latch.restore(fault.to_json())
    assert following.latch.fault == fault
    assert following.latch.write_lost
    following.latch.restore(None)
    assert following.latch.fault is None
    assert following.events == []


def test_the_callback_may_look_at_the_latch(desk: Desk) -> None:
    # It is called without locks: keeping a fault reads it (node.py).
    desk.report(Case.EMPTYING)
    assert desk.kept == [True]
