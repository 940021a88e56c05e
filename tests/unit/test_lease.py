# SPDX-License-Identifier: BSD-3-Clause
"""lease.py: when a secondary may take the disks of a primary that has a lease."""

from __future__ import annotations

import pytest

from replication.errors import CommandError, DiskError
from replication.lease import MARGIN, MARGIN_S, Tenure
from replication.reason import Reason

LEASE_S = 100.0
WAIT_S = LEASE_S * (1 + MARGIN) + MARGIN_S


class Case:
    """A tenure, its clock, and the lease that the primary has told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lease_s: float | None = LEASE_S
        self.tenure = Tenure(lambda: self.lease_s, lambda: self.now)


def _failed() -> bool:
    return True


def test_what_a_former_process_has_heard_may_have_been_just_before() -> None:
    case = Case()
    assert case.tenure.left_s == pytest.approx(WAIT_S)
    case.now += WAIT_S
    assert case.tenure.left_s == 0


def test_it_is_too_early_until_the_lease_is_over_and_some_more() -> None:
    case = Case()
    case.now += 50.0
    case.tenure.heard(case.tenure.era, paired=True)
    case.now += LEASE_S
    with pytest.raises(CommandError, match=r"for 11\.0 s still") as refused, case.tenure.taking(False, _failed):
        pytest.fail("it is too early")
    assert refused.value.reason is Reason.LEASED
    case.tenure.heard(case.tenure.era, paired=True)  # the refusal has changed nothing
    case.now += WAIT_S
    with case.tenure.taking(False, _failed):
        pass


def test_from_the_decision_on_no_connection_of_before_is_answered() -> None:
    """What comes just then would begin another lease."""
    case = Case()
    case.now += WAIT_S
    before = case.tenure.era
    with case.tenure.taking(False, _failed), pytest.raises(DiskError, match="fails over"):
        case.tenure.heard(before, paired=True)
    with pytest.raises(DiskError, match="fails over"):
        case.tenure.heard(before, paired=True)
    case.tenure.heard(case.tenure.era, paired=True)  # a new one learns what has become of this node
    case.tenure.begin()
    assert case.tenure.left_s == pytest.approx(WAIT_S), "it is a secondary again"


def test_the_lease_of_a_former_primary_lasts() -> None:
    case = Case()
    with case.tenure.replacing():
        case.lease_s = 10.0
    assert case.tenure.left_s == pytest.approx(WAIT_S)
    case.now += WAIT_S
    assert case.tenure.left_s == 0
    case.tenure.heard(0, paired=True)
    assert case.tenure.left_s == pytest.approx(12.0)


def test_a_failover_that_fails_leaves_all_as_it_was() -> None:
    case = Case()
    before = case.tenure.era
    with pytest.raises(ZeroDivisionError), case.tenure.taking(True, _failed):
        raise ZeroDivisionError
    case.tenure.heard(before, paired=True)
    assert case.tenure.left_s == pytest.approx(WAIT_S)


def test_force_and_a_primary_without_a_lease_do_not_wait() -> None:
    case = Case()
    with case.tenure.taking(True, _failed):
        pass
    case = Case()
    case.lease_s = None
    assert case.tenure.left_s == 0
    with case.tenure.taking(False, _failed):
        case.tenure.heard(0, paired=True)  # as ever
    case.tenure.heard(0, paired=True)


def test_the_cluster_renews() -> None:
    case = Case()
    case.now += WAIT_S
    assert case.tenure.renew(case.tenure.era) == LEASE_S
    assert case.tenure.left_s == pytest.approx(WAIT_S)


def _refused(case: Case, era: int, reason: Reason) -> None:
    left_s = case.tenure.left_s
    with pytest.raises(CommandError) as refused:
        case.tenure.renew(era)
    assert (refused.value.reason, case.tenure.left_s) == (reason, left_s)


def test_nothing_is_renewed_from_the_decision_to_take_the_disks_on() -> None:
    """The cluster would let the primary go on next, beside the guest of this node."""
    case = Case()
    case.now += WAIT_S
    era = case.tenure.era

    def fail() -> None:
        for seen in (era, case.tenure.era):
            _refused(case, seen, Reason.BUSY)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), case.tenure.taking(False, _failed):
        fail()
    assert case.tenure.renew(era) == LEASE_S, "it has failed"
    case.now += WAIT_S
    with case.tenure.taking(False, _failed):
        pass
    _refused(case, era, Reason.BUSY)  # who has found a secondary before


def test_nothing_is_renewed_that_is_not_waited_for() -> None:
    """The primary has left in good order, or has no lease: a failover comes at any time."""
    case = Case()
    case.lease_s = None
    _refused(case, case.tenure.era, Reason.WRONG_STAGE)


def test_who_is_no_primary_keeps_nobody_waiting() -> None:
    """A stranger that asks, or one that was refused and tries again for ever, has no lease."""
    case = Case()
    case.now += WAIT_S
    case.tenure.heard(case.tenure.era, paired=False)
    assert case.tenure.left_s == 0


def test_a_failover_that_has_come_about_and_raises_is_one() -> None:
    case = Case()
    before = case.tenure.era
    with pytest.raises(ZeroDivisionError), case.tenure.taking(True, lambda: False):
        raise ZeroDivisionError
    with pytest.raises(DiskError, match="fails over"):
        case.tenure.heard(before, paired=True)
