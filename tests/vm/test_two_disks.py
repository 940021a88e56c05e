# SPDX-License-Identifier: BSD-3-Clause
"""A guest with two disks, data and journal: after a failover both are of one moment.

The guest makes each record durable on its journal disk before it writes it to its data disk (guest_init.sh). So at any
one moment the journal disk has the same records as the data disk, or one more. takeover.one_history holds that.
"""

from __future__ import annotations

import random

import pytest

from filesystem import inspect
from hosts import Hosts
from lab import Lab
from records import BadRecords, Record, following
from takeover import lose_a, one_history, switch_over
from waiting import DEADLINE_S


@pytest.mark.parametrize(("protocol", "seed"), [("async", 11), ("async", 12), ("sync", 13)])
def test_both_disks_are_on_one_checkpoint_when_a_dies_at_any_moment(lab: Lab, protocol: str, seed: int) -> None:
    outcome = lose_a(Hosts(lab, disks=2, protocol=protocol, interval_s=0.3), random.Random(seed))
    assert outcome.loss.due >= 1


def test_both_disks_are_complete_after_a_planned_switch_over(lab: Lab) -> None:
    outcome = switch_over(Hosts(lab, disks=2, interval_s=0.3), random.Random(14))
    assert outcome.loss.lost == 0


def test_every_checkpoint_under_load_is_of_one_moment_on_both_disks(lab: Lab) -> None:
    """Many checkpoints of one guest instead of many failovers: each is looked at before the next is taken."""
    hosts = Hosts(lab, disks=2, interval_s=None)
    hosts.start()
    guest = hosts.guest(hosts.a, 1)
    guest.wait_working(5)
    reached = 0
    for _ in range(25):
        due = guest.console.last
        hosts.a.execute("replication-checkpoint")
        guest.console.wait_more(5, DEADLINE_S)  # writes that must not be seen, on both disks
        found = one_history([inspect(hosts.seen(hosts.b, index)) for index in range(2)])
        assert len(found) >= due > reached
        reached = due
    guest.switch_off()


def history(length: int) -> list[Record]:
    records: list[Record] = []
    for _ in range(length):
        records.append(following(records[-1] if records else None, 1))
    return records


@pytest.mark.parametrize(("data", "journal"), [(5, 4), (5, 7)], ids=["journal behind", "journal two ahead"])
def test_disks_of_two_moments_are_found_out(data: int, journal: int) -> None:
    with pytest.raises(BadRecords, match="two moments"):
        one_history([history(data), history(journal)])
