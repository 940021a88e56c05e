# SPDX-License-Identifier: BSD-3-Clause
"""A third host that has no disk, only a vote: two of three decide, and what one alone thinks counts for nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from cluster.configuration import NODE
from cluster.journal import FRESH_S
from cluster.site import CLUSTER_NETWORK, PAIR_NETWORK, REPLCTL, Site

Make = Callable[..., Site]

pytestmark = pytest.mark.timeout(600)


SUSPEND = 'fencing = "suspend-io"'


@pytest.fixture
def three(site: Make) -> Site:
    """Whole, with the guest on node-a, which stands still while it is not known what became of the other one."""
    made = site(witness=True, node_keys=SUSPEND)
    made.begin()
    return made


def test_an_owner_that_is_cut_off_from_both_others_is_fenced(three: Site) -> None:
    """It has no quorum, so it fences nobody; the two that have go on with the copy. What its guest was answered until
    the link was lost for certain is thrown away by a person."""
    it = three
    owner, copy = it.whole()
    it.isolate(owner, CLUSTER_NETWORK, PAIR_NETWORK)
    it.wait_promoted(copy)
    assert {who for _, _, who in it.switch.log} == {owner.name}
    it.idle(8)
    assert it.journal.writes(copy.name)
    it.mend(CLUSTER_NETWORK, PAIR_NETWORK)
    it.wait(lambda: it.runs(owner), "the old owner's node runs")
    it.wait(lambda: "split brain" in copy.run("crm_mon", "-1").stdout, "a person has to look at it")
    owner.told(REPLCTL, NODE, "discard", "--yes")
    assert it.whole() == (copy, owner)
    assert {who for _, _, who in it.switch.log} == {owner.name}
    assert it.journal.violations() == []


def test_a_copy_that_is_cut_off_from_both_others_is_fenced(three: Site) -> None:
    """The guest goes on all the while."""
    it = three
    owner, copy = it.whole()
    it.isolate(copy, CLUSTER_NETWORK, PAIR_NETWORK)
    it.wait(lambda: it.switch.log, "somebody is fenced")
    it.mend(CLUSTER_NETWORK, PAIR_NETWORK)
    assert it.whole() == (owner, copy)
    assert {who for _, _, who in it.switch.log} == {copy.name}
    assert len(it.journal.begins()) == 1
    assert it.journal.violations() == []


def test_an_owner_without_quorum_stops_its_guest_and_goes_on_with_a_second_vote(three: Site) -> None:
    """The other two are gone: it cannot know that, and stands still; nothing is lost."""
    it = three
    owner, copy = it.whole()
    witness = it.all[2]
    it.switch.stays_off.update((copy.name, witness.name))
    copy.power_off()
    it.wait(lambda: it.switch.log, "the copy is fenced while there are two votes")
    fenced = time.time()
    it.wait(lambda: it.journal.acknowledged(fenced + FRESH_S), "the guest goes on")
    witness.power_off()
    it.wait(lambda: "Promoted: [" not in owner.told("crm_mon", "-1"), "nobody is promoted any more")
    it.wait(lambda: not it.journal.writes(owner.name), "the guest stands still")
    last = it.journal.acknowledged()[-1]
    it.idle(10)
    it.check_nobody()
    assert it.journal.acknowledged()[-1] == last
    it.switch.stays_off.clear()
    witness.power_on()
    it.wait_promoted(owner)
    assert it.journal.begins()[-1].number > last.number
    copy.power_on()
    assert it.whole() == (owner, copy)
    assert it.journal.violations() == []


def test_a_stale_owner_and_the_third_host_have_quorum_and_promote_nobody(three: Site) -> None:
    """The third host's configuration knows who was promoted last. That one is off, and has what is newest."""
    it = three
    old, new = it.whole()
    witness = it.all[2]
    it.switch.stays_off.update(host.name for host in it.all)
    old.power_off()
    it.wait_promoted(new)
    it.wait(lambda: it.journal.acknowledged()[-1].number > it.journal.begins()[-1].number + 50, "more records")
    for host in (new, witness):
        host.power_off()
    last = it.journal.acknowledged()[-1]
    for host in (old, witness):
        host.power_on()
    it.wait(lambda: it.runs(old), "the old owner's node runs")
    it.idle(12)
    it.check_nobody()
    assert it.score(old) is None
    assert it.journal.acknowledged()[-1] == last
    new.power_on()
    it.switch.stays_off.clear()
    assert it.whole() == (new, old)
    assert it.journal.begins()[-1].number > last.number
    assert it.journal.violations() == []
