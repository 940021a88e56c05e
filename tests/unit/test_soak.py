# SPDX-License-Identifier: BSD-3-Clause
"""The soak finds what is wrong: each bound with something just inside, and something beyond."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from content import MIB
from netpair import Stamps
from soak import bounds as limits
from soak import report
from soak.bounds import Bounds, Sample, Stalls
from soak.guests import Done, Region
from soak.plan import CLIENTS, LANES, ROLES, plan, setting

TIMEOUT_S = 2.0
GUEST_S = limits.WAIT_FACTOR * TIMEOUT_S + limits.SLACK_S
SMALL = Sample(pid=7, resident=60 * MIB, anonymous=40 * MIB, threads=40, descriptors=30, connections=3)
CONNECTIONS = SMALL.connections + limits.PAIR_CONNECTIONS
THREADS = limits.THREADS_PER_CONNECTION * CONNECTIONS + 2 * limits.CONTROL_CLIENTS + limits.THREADS_OWN


def logged(count: int, seconds: float, text: str = "no room for request {}") -> Callable[[Bounds], None]:
    return lambda bounds: bounds.logged("a", [text.format(number) for number in range(count)], seconds)


def quiet(**grown: int) -> Callable[[Bounds], None]:
    def told(bounds: Bounds) -> None:
        bounds.quiet("a", "owner", SMALL)
        bounds.quiet("a", "owner", replace(SMALL, **{what: getattr(SMALL, what) + by for what, by in grown.items()}))

    return told


CASES: dict[str, tuple[Callable[[Bounds], None], Callable[[Bounds], None]]] = {
    "an answer": (
        lambda bounds: bounds.answered("failover", 10, 10 + limits.ANSWER_S),
        lambda bounds: bounds.answered("failover", 10, 10.01 + limits.ANSWER_S),
    ),
    "a guest's wait": (
        lambda bounds: bounds.waited("write", 10, 10 + GUEST_S),
        lambda bounds: bounds.waited("write", 10, 10.01 + GUEST_S),
    ),
    "a guest's wait with a slow disk": (
        lambda bounds: bounds.waited("write", 10, 10 + GUEST_S + limits.DISK_REQUESTS * 0.25, 0.25),
        lambda bounds: bounds.waited("write", 10, 10.01 + GUEST_S + limits.DISK_REQUESTS * 0.25, 0.25),
    ),
    "an age": (
        lambda bounds: bounds.aged("a", 12.0, 10.0, 2.0, 0.0),
        lambda bounds: bounds.aged("a", 3612.0, 10.0, 2.0, 0.0),
    ),
    "an age that stands still": (
        lambda bounds: bounds.aged("a", 12.4, 10.0, 2.0, 0.0),
        lambda bounds: bounds.aged("a", 10.0, 10.0, 2.0, 0.0),
    ),
    "memory": (
        lambda bounds: bounds.sampled("a", replace(SMALL, anonymous=limits.ANON_MAX)),
        lambda bounds: bounds.sampled("a", replace(SMALL, anonymous=limits.ANON_MAX + MIB)),
    ),
    "threads": (
        lambda bounds: bounds.sampled("a", replace(SMALL, threads=THREADS)),
        lambda bounds: bounds.sampled("a", replace(SMALL, threads=THREADS + 1)),
    ),
    "descriptors": (
        lambda bounds: bounds.sampled("a", replace(SMALL, descriptors=limits.FILES_MAX + CONNECTIONS)),
        lambda bounds: bounds.sampled("a", replace(SMALL, descriptors=limits.FILES_MAX + CONNECTIONS + 1)),
    ),
    "leaked threads": (quiet(threads=limits.QUIET_GROWTH), quiet(threads=limits.QUIET_GROWTH + 1)),
    "leaked descriptors": (quiet(descriptors=limits.QUIET_GROWTH), quiet(descriptors=limits.QUIET_GROWTH + 1)),
    "lines of one kind": (
        logged(3 * (limits.KIND_LINES + 1), 1.0),
        logged(3 * (limits.KIND_LINES + 1) + 1, 1.0),
    ),
    "a defect": (logged(1, 1.0), logged(1, 1.0, "Traceback (most recent call last):")),
    "a guest's error": (
        lambda bounds: bounds.refused("write", "EIO", True),
        lambda bounds: bounds.refused("write", "EIO", False),
    ),
}


@pytest.mark.parametrize(("inside", "beyond"), CASES.values(), ids=CASES.keys())
def test_a_bound_holds_up_to_its_limit_and_is_violated_beyond(
    inside: Callable[[Bounds], None], beyond: Callable[[Bounds], None]
) -> None:
    told: list[str] = []
    bounds = Bounds(TIMEOUT_S, told=told.append)
    inside(bounds)
    assert bounds.violated == told == []
    beyond(bounds)
    assert len(bounds.violated) == len(told) == 1
    assert any("violated: 1" in line for line in report.lines("1", 1.0, setting("1"), bounds))


def test_what_nbdkit_cannot_end_since_is_no_growth() -> None:
    """Of 1.32: server/hangup.py."""
    bounds = Bounds(TIMEOUT_S)
    bounds.quiet("a", "owner", SMALL)
    more = replace(SMALL, threads=SMALL.threads + limits.THREADS_PER_CONNECTION, descriptors=SMALL.descriptors + 1)
    bounds.quiet("a", "owner", replace(more, stuck=1))
    assert bounds.violated == []
    bounds.quiet("a", "owner", more)
    assert len(bounds.violated) == 1


def test_what_the_machine_stood_still_is_no_wait() -> None:
    stalls = Stalls()
    bounds = Bounds(TIMEOUT_S, stalls)
    stalls.note(11.5, 1.0)
    bounds.answered("failover", 10, 11 + limits.ANSWER_S)
    assert bounds.violated == []
    bounds.answered("failover", 20, 21 + limits.ANSWER_S)
    assert len(bounds.violated) == 1


def test_the_lines_of_many_kinds_are_no_storm() -> None:
    bounds = Bounds(TIMEOUT_S)
    bounds.logged("a", [f"kind {chr(97 + number)}" for number in range(26)] * 30, 1.0)
    assert bounds.violated == []


def written(*values: int) -> Region:
    """A region of eight sectors, of which request n filled sectors n to n + 2."""
    region = Region(8)
    for value in values:
        region.begin(Done("write", value, value + 2, value))
        region.end()
    return region


def stamps(*values: int) -> Stamps:
    return np.array(values, np.uint64)


CONTENTS = {
    "nothing": (stamps(0, 0, 0, 0, 0, 0, 0, 0), True),
    "the first": (stamps(0, 1, 1, 0, 0, 0, 0, 0), True),
    "all": (stamps(0, 1, 2, 3, 3, 0, 0, 0), True),
    "a part of the one under way": (stamps(0, 1, 2, 3, 3, 4, 0, 0), True),
    "the second without the first": (stamps(0, 0, 2, 2, 0, 0, 0, 0), False),
    "a third that is not there in part": (stamps(0, 1, 2, 2, 3, 0, 0, 4), False),
    "of somebody else": (stamps(9, 1, 2, 3, 3, 0, 0, 0), False),
}


@pytest.mark.parametrize(("found", "right"), CONTENTS.values(), ids=CONTENTS.keys())
def test_a_checkpoint_holds_so_many_requests_in_their_order(found: Stamps, right: bool) -> None:
    region = written(1, 2, 3)
    region.begin(Done("write", 4, 6, 4))
    assert region.adopt(found) is right
    assert bool(np.array_equal(region.now, found)) is right


def test_nothing_goes_back_behind_a_checkpoint_that_was_taken() -> None:
    region = written(1, 2, 3)
    region.keep(2)
    assert not region.adopt(stamps(0, 1, 1, 0, 0, 0, 0, 0))
    assert region.adopt(stamps(0, 1, 2, 2, 0, 0, 0, 0))


def test_a_seed_is_a_plan_and_a_longer_one_begins_with_it() -> None:
    short, long = plan("1", 60), plan("1", 600)
    assert short == plan("1", 60) != plan("2", 60)
    assert short == [event for event in long if event.at_s < 60]


def test_an_hour_has_everything() -> None:
    seed = next(str(number) for number in range(100) if all(setting(str(number)).over_nbd.values()))
    found = {(event.lane, event.name) for event in plan(seed, 3600)}
    assert {lane for lane, _ in found} == {*LANES, "roles"}
    assert {name for lane, name in found if lane == "roles"} == set(ROLES)
    for host in "ab":
        assert {name for lane, name in found if lane == f"clients-{host}"} == set(CLIENTS)
        assert {name for lane, name in found if lane == f"disk-{host}"} == {"slow", "failing", "unflushable"}
    assert {name for lane, name in found if lane == "network"} == {"slow", "lossy", "cut", "blackhole", "reset"}
