# SPDX-License-Identifier: BSD-3-Clause
"""fault.py: what is latched, what is kept of it, and who is told how often."""

from __future__ import annotations

import errno
import threading
from dataclasses import fields
from types import SimpleNamespace

import pytest

from replication import fault as fault_module
from replication.errors import DiskError
from replication.events import Event, EventHub
from replication.fault import Case, Fault, FaultLatch
from waiting import DEADLINE_S


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

    def report(self, case: Case, disk: str = "disk0", text: str = "trouble", offset: int = 4096) -> None:
        self.latch.report(case, disk, "write", offset, 512, DiskError(text, errno.ENOSPC))

    def tell(self, case: Case, disk: str = "disk0", text: str = "trouble") -> None:
        self.latch.tell(case, disk, "write", 4096, 512, DiskError(text, errno.ENOSPC))

    def whole(self, case: Case, count: int = 1) -> dict[str, object]:
        """What is shown of a failure by `report` or `tell` at this moment."""
        return {
            "case": int(case),
            "disk": "disk0",
            "operation": "write",
            "offset": 4096,
            "length": 512,
            "errno": "ENOSPC",
            "desc": "trouble",
            "count": count,
            "first": self.wall,
            "last": self.wall,
        }


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


@pytest.mark.parametrize("case", Case, ids=lambda case: case.name)
def test_what_is_only_told_is_an_event_with_all_that_is_known_and_not_latched(desk: Desk, case: Case) -> None:
    desk.tell(case)
    assert desk.latch.fault is None
    assert desk.kept == []
    assert desk.events == [desk.whole(case)]


@pytest.mark.parametrize("case", Case, ids=lambda case: case.name)
def test_what_is_reported_is_told_and_latched_with_all_that_is_known(desk: Desk, case: Case) -> None:
    desk.report(case)
    fault = desk.latch.fault
    assert fault is not None
    assert fault.to_json() == desk.whole(case)
    assert desk.kept == [True]
    assert desk.events == [desk.whole(case)]


def test_an_errno_without_a_name_is_shown_as_its_number(desk: Desk) -> None:
    desk.latch.report(Case.LINK, "disk0", "link", 0, 0, DiskError("odd", 4242))
    assert desk.events[0]["errno"] == "4242"


def test_failures_of_one_kind_and_disk_are_counted_and_the_first_of_all_is_kept(desk: Desk) -> None:
    desk.report(Case.FORWARD, text="first")
    begun = desk.wall
    desk.pass_time(10)
    desk.report(Case.FORWARD, text="again", offset=0)
    desk.report(Case.FORWARD, disk="disk1", text="of another disk")
    desk.report(Case.LINK, text="of another kind")
    desk.tell(Case.FORWARD, text="not to be latched")
    fault = desk.latch.fault
    assert fault is not None
    assert (fault.case, fault.disk, fault.desc, fault.offset) == (Case.FORWARD, "disk0", "first", 4096)
    assert (fault.count, fault.first, fault.last) == (2, begun, desk.wall)
    assert desk.kept == [True], "only the first one is worth a write of the state file"


def test_events_of_one_case_and_disk_come_at_most_once_a_second(desk: Desk) -> None:
    for _ in range(25):
        desk.report(Case.FORWARD)
    desk.report(Case.FORWARD, disk="disk1")
    desk.report(Case.LINK)
    told = [(event["case"], event["disk"], event["count"]) for event in desk.events]
    assert told == [(Case.FORWARD, "disk0", 1), (Case.FORWARD, "disk1", 1), (Case.LINK, "disk0", 1)]
    desk.pass_time(1.0)
    desk.report(Case.FORWARD, text="the last", offset=8192)
    (event,) = desk.events[3:]
    assert (event["count"], event["desc"], event["offset"]) == (26, "the last", 8192), "how many, and the latest"
    assert (event["first"], event["last"]) == (desk.wall - 1.0, desk.wall)


def test_what_is_latched_and_what_is_only_told_do_not_silence_each_other(desk: Desk) -> None:
    desk.tell(Case.SECONDARY_DISK, text="to the guest")
    desk.report(Case.SECONDARY_DISK, text="to the primary")
    assert [(event["desc"], event["count"]) for event in desk.events] == [("to the guest", 1), ("to the primary", 1)]


def test_a_clock_that_is_set_back_does_not_silence_the_events(desk: Desk) -> None:
    desk.report(Case.FORWARD)
    desk.pass_time(5)
    desk.wall -= 3600
    desk.report(Case.FORWARD)
    assert len(desk.events) == 2


def test_after_clearing_the_next_fault_is_a_first_one_again(desk: Desk) -> None:
    desk.report(Case.FORWARD, text="old")
    desk.report(Case.FORWARD, text="old")
    assert desk.latch.clear()
    assert desk.latch.fault is None
    assert not desk.latch.clear()
    desk.report(Case.FORWARD, text="new")
    fault = desk.latch.fault
    assert fault is not None
    assert (fault.desc, fault.count) == ("new", 1)
    assert [event["desc"] for event in desk.events] == ["old", "new"], "without waiting for the second to pass"
    assert desk.kept == [True, False, True], "clearing what is clear is not worth a write"


def test_only_what_is_repaired_is_cleared(desk: Desk) -> None:
    desk.report(Case.FORWARD)
    asked: list[Case] = []

    def not_this(fault: Fault) -> bool:
        asked.append(Case(fault.case))
        return fault.case == Case.LINK

    assert not desk.latch.clear(not_this)
    assert asked == [Case.FORWARD]
    fault = desk.latch.fault
    assert fault is not None
    assert (fault.case, fault.count) == (Case.FORWARD, 1)
    desk.report(Case.FORWARD)
    assert fault.count == 2, "it goes on as the same"
    assert desk.kept == [True]
    assert desk.latch.clear(lambda found: found is fault)
    assert desk.kept == [True, False]
    assert not desk.latch.clear(not_this)
    assert asked == [Case.FORWARD], "nobody is asked about nothing"


def test_a_fault_that_comes_while_one_is_found_repaired_is_not_cleared_with_it(desk: Desk) -> None:
    desk.report(Case.FORWARD, text="old")
    reporting = threading.Event()
    reporter = threading.Thread(target=lambda: (reporting.set(), desk.report(Case.FORWARD, text="new")))

    def repaired(_: Fault) -> bool:
        reporter.start()
        assert reporting.wait(DEADLINE_S)
        return True

    assert desk.latch.clear(repaired)
    reporter.join(DEADLINE_S)
    fault = desk.latch.fault
    assert fault is not None
    assert (fault.desc, fault.count) == ("new", 1)
    assert desk.kept[-1]


def test_the_next_process_has_the_fault_of_the_former_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.report(Case.SECONDARY_DISK)
    fault = desk.latch.fault
    assert fault is not None
    following = Desk(monkeypatch)
    following.latch.restore(fault.to_json())
    assert following.latch.fault == fault
    following.latch.restore(None)
    assert following.latch.fault == fault
    assert following.events == []
    following.report(Case.SECONDARY_DISK, text="again")
    counted = following.latch.fault
    assert counted is not None
    assert (counted.desc, counted.count) == ("trouble", 2), "and goes on counting"


@pytest.mark.parametrize("member", [item.name for item in fields(Fault)])
def test_a_saved_fault_with_a_member_of_another_type_is_refused(desk: Desk, member: str) -> None:
    good = Fault.of(Case.LINK, "disk0", "link", 0, 0, DiskError("lost")).to_json()
    assert Fault.from_json(good).to_json() == good
    for wrong in (None, [], {}, True, 1 if isinstance(good[member], str | float) else "text"):
        with pytest.raises(TypeError):
            Fault.from_json({**good, member: wrong})
    with pytest.raises(TypeError):
        Fault.from_json({name: value for name, value in good.items() if name != member})
    with pytest.raises(TypeError):
        Fault.from_json({**good, "colour": "red"})


def test_the_callback_may_look_at_the_latch(desk: Desk) -> None:
    # It is called without locks: keeping a fault reads it (node.py).
    desk.report(Case.EMPTYING)
    assert desk.kept == [True]


def test_latch_leaves_the_keeping_to_who_holds_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    error = DiskError("trouble", errno.ENOSPC)
    assert desk.latch.latch(Case.LINK, "disk0", "link", 0, 0, error)
    assert desk.latch.fault is not None
    assert desk.kept == []
    assert not desk.latch.latch(Case.LINK, "disk0", "link", 0, 0, error)
    desk.latch.keep()
    assert desk.kept == [True]
