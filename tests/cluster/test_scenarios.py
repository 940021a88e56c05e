# SPDX-License-Identifier: BSD-3-Clause
"""What can befall two hosts of a cluster, one thing at a time, with Debian's own Pacemaker and corosync.

In each the promises of journal.py hold: no two guests write at once, nothing of a checkpoint is lost, nothing stale is
promoted. Where that is safe the cluster is whole again without a hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from cluster.configuration import NODE
from cluster.site import CLUSTER_NETWORK, PAIR_NETWORK, REPLCTL, Site
from guestimages import Images

Make = Callable[..., Site]

pytestmark = pytest.mark.timeout(600)


def begun(site: Make, **options: object) -> Site:
    """Whole, with the guest on node-a."""
    made = site(**options)
    made.begin()
    return made


def good(it: Site) -> None:
    """The promises were kept."""
    assert it.journal.violations() == []


# -- one host ---------------------------------------------------------------------------------------------------------


def test_the_promoted_host_loses_power_and_comes_back_by_itself(site: Make) -> None:
    it = begun(site)
    owner, copy = it.whole()
    owner.power_off()
    it.wait_promoted(copy)
    assert [(what, who) for _, what, who in it.switch.log] == [("reboot", owner.name)]
    assert it.whole() == (copy, owner)
    good(it)


def test_the_other_host_loses_power(site: Make) -> None:
    """The guest goes on all the while."""
    it = begun(site)
    owner, copy = it.whole()
    copy.power_off()
    assert it.whole() == (owner, copy)
    assert len(it.journal.begins()) == 1
    good(it)


def test_the_node_dies_on_the_promoted_host(site: Make) -> None:
    """It is promoted again where everything is."""
    it = begun(site)
    owner, _ = it.whole()
    owner.told("sh", "-c", "kill -9 $(cut -d' ' -f1 /run/resource-agents/nbdkit-replication-vm1.pid)")
    now = time.time()
    it.wait(lambda: it.journal.acknowledged(now + 3), "a guest writes")
    it.whole()
    assert it.switch.log == [], "nobody was fenced"
    good(it)


def test_the_guest_dies(site: Make) -> None:
    it = begun(site)
    owner, copy = it.whole()
    owner.told("pkill", "-9", "-f", "writer.py")
    it.wait(lambda: len(it.journal.begins()) == 2, "the guest is started again")
    assert it.whole() == (owner, copy)
    good(it)


def test_a_guest_in_qemu_goes_on_when_its_host_or_qemu_has_died(site: Make) -> None:
    it = begun(site, images=Images.get())
    for what in ("host", "QEMU"):
        owner, copy = it.whole()
        generation = it.journal.begins()[-1].generation
        it.wait(lambda generation=generation: it.journal.safe(generation), "a checkpoint has what it wrote")
        began, now = len(it.journal.begins()), time.time()
        if what == "host":
            it.switch.stays_off.add(owner.name)  # else it may be back before the other one is promoted
            owner.power_off()
        else:
            owner.told("pkill", "-9", "qemu-system-x86")
        it.wait(lambda began=began: len(it.journal.begins()) > began, f"the guest has booted after {what} has died")
        first = it.wait(lambda now=now: it.journal.acknowledged(it.journal.begins()[-1].time), "it writes")[0]
        print(f"\n{what} dies: the first record after {first.time - now:.1f} s")
        assert first.host == (copy.name if what == "host" else owner.name)
        owner.power_on()
    it.whole()
    good(it)


# -- moves ------------------------------------------------------------------------------------------------------------


def test_a_move_and_back_loses_nothing(site: Make) -> None:
    it = begun(site)
    for _ in range(2):
        owner, copy = it.whole()
        owner.told("crm_resource", "--move", "--promoted", "--resource", "disk-clone", "--node", copy.name)
        it.wait_promoted(copy)
        owner.told("crm_resource", "--clear", "--resource", "disk-clone")
        [*_, begin] = it.journal.begins()
        before = [line for line in it.journal.acknowledged() if line.generation == begin.before]
        assert begin.number >= before[-1].number + 1, "everything that was answered is there"
        assert it.whole() == (copy, owner)
    good(it)


def test_standby_and_back(site: Make) -> None:
    it = begun(site)
    owner, copy = it.whole()
    owner.told("crm_standby", "--update", "on", "--node", owner.name)
    it.wait_promoted(copy)
    [*_, begin] = it.journal.begins()
    before = [line for line in it.journal.acknowledged() if line.generation == begin.before]
    assert begin.number >= before[-1].number + 1, "everything that was answered is there"
    owner.told("crm_standby", "--delete", "--node", owner.name)
    assert it.whole() == (copy, owner)
    good(it)


# -- both hosts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["owner", "copy"])
@pytest.mark.parametrize("after", ["failover", "in sync"])
def test_both_lose_power_and_come_back_in_either_order(site: Make, first: str, after: str) -> None:
    """What was newest is promoted, with all that was answered."""
    it = begun(site)
    owner, copy = it.whole()
    if after == "failover":
        it.switch.stays_off.add(owner.name)
        owner.power_off()
        it.wait_promoted(copy)
        it.wait(lambda: it.journal.acknowledged()[-1].number > it.journal.begins()[-1].number + 50, "more records")
        owner, copy = copy, owner
        it.switch.stays_off.clear()
    for host in (copy, owner):
        host.power_off()
    last = it.journal.acknowledged()[-1]
    hosts = [owner, copy] if first == "owner" else [copy, owner]
    hosts[0].power_on()
    if after == "in sync":
        it.idle(6)
        it.check_nobody()  # one host alone does not decide
        assert it.journal.acknowledged()[-1] == last
    hosts[1].power_on()
    assert it.whole() == (owner, copy)
    assert it.journal.begins()[-1].number > last.number
    good(it)


def test_a_stale_owner_that_reaches_nobody_is_never_promoted(site: Make) -> None:
    """The new owner has gone on for long, the two cannot pair, and the new owner dies: rather nobody."""
    it = begun(site)
    old, new = it.whole()
    it.switch.stays_off.add(old.name)
    old.power_off()
    it.wait_promoted(new)
    it.cut(PAIR_NETWORK)
    old.power_on()
    it.wait(lambda: it.runs(old), "the old owner's node runs")
    it.idle(8)
    assert it.score(old) is None
    assert it.journal.writes(new.name)
    it.switch.stays_off.add(new.name)
    new.power_off()
    last = it.journal.lines()[-1]
    it.idle(15)
    it.check_nobody()
    assert it.journal.lines()[-1] == last
    it.mend(PAIR_NETWORK)
    new.power_on()
    it.whole()
    good(it)


def test_a_configuration_that_does_not_know_the_last_promotion(site: Make) -> None:
    """A person lets the older owner start alone, and its configuration is the newer one when the other one joins:
    its guest goes on, and the other one's promotion is not taken for one that was before."""
    it = begun(site)
    old, new = it.whole()
    it.switch.stays_off.update((old.name, new.name))
    old.power_off()
    it.wait_promoted(new)
    new.power_off()
    old.power_on()
    it.wait(lambda: old.run("crm_mon", "-1").returncode == 0, "the cluster's part is there")
    old.told("corosync-cmapctl", "-s", "quorum.cancel_wait_for_all", "u8", "1")
    it.wait_promoted(old)
    began = len(it.journal.begins())
    it.cut(PAIR_NETWORK)  # else the two nodes themselves tell each other first
    new.power_on()
    it.wait(lambda: it.runs(new), "the other one's node runs")
    it.wait(lambda: "split brain" in new.run("crm_mon", "-1").stdout, "a person has to look at it")
    it.idle(8)
    assert it.promoted() is old
    assert it.journal.writes(old.name)
    assert len(it.journal.begins()) == began
    assert it.score(new) is None


# -- networks ---------------------------------------------------------------------------------------------------------


def test_the_pairs_network_is_cut_and_mended(site: Make) -> None:
    """The guest goes on; the copy is no candidate; then it is one again."""
    it = begun(site)
    owner, copy = it.whole()
    it.cut(PAIR_NETWORK)
    it.wait(lambda: it.score(copy) is None, "the copy is no candidate any more")
    assert it.journal.writes(owner.name)
    it.mend(PAIR_NETWORK)
    assert it.whole() == (owner, copy)
    assert len(it.journal.begins()) == 1
    good(it)


def test_standby_a_moment_after_the_pairs_network_was_cut(site: Make) -> None:
    """A host that is stopped is not a dead one: nobody goes on without what it has."""
    it = begun(site)
    owner, copy = it.whole()
    it.cut(PAIR_NETWORK)
    owner.told("crm_standby", "--update", "on", "--node", owner.name)
    it.wait(lambda: not it.runs(owner), "the owner's node is stopped")
    last = it.journal.acknowledged()[-1]
    it.idle(12)
    assert it.runs(copy)
    assert len(it.journal.begins()) == 1
    owner.told("crm_standby", "--delete", "--node", owner.name)
    it.wait_promoted(owner)
    it.mend(PAIR_NETWORK)
    assert it.whole() == (owner, copy)
    assert it.journal.begins()[-1].number > last.number
    good(it)


def test_a_preference_for_a_host_that_must_not_be_promoted(site: Make) -> None:
    """As a move leaves it: the guest goes on where it is, until that host has everything."""
    it = begun(site)
    owner, copy = it.whole()
    it.cut(PAIR_NETWORK)
    it.wait(lambda: it.score(copy) is None, "the copy is no candidate any more")
    owner.told("crm_resource", "--move", "--promoted", "--resource", "disk-clone", "--node", copy.name)
    it.idle(12)
    assert it.promoted() is owner
    assert len(it.journal.begins()) == 1
    it.mend(PAIR_NETWORK)
    it.wait_promoted(copy)
    assert it.whole() == (copy, owner)
    good(it)


def test_the_pairs_network_is_cut_and_then_the_owner_dies(site: Make) -> None:
    """What the copy has is older than what the owner had: it waits for the owner, and nothing is lost."""
    it = begun(site)
    owner, copy = it.whole()
    it.cut(PAIR_NETWORK)
    it.wait(lambda: it.score(copy) is None, "the copy is no candidate any more")
    it.switch.stays_off.add(owner.name)
    owner.power_off()
    last = it.journal.acknowledged()[-1]
    it.idle(12)
    it.check_nobody()
    assert it.journal.acknowledged()[-1] == last
    it.mend(PAIR_NETWORK)
    owner.power_on()
    assert it.whole() == (owner, copy)
    assert it.journal.begins()[-1].number > last.number
    good(it)


@pytest.mark.parametrize("who", ["owner", "copy"])
def test_what_one_host_sends_the_other_is_lost(site: Make, who: str) -> None:
    it = begun(site)
    owner, copy = it.whole()
    it.cut_from(owner if who == "owner" else copy, PAIR_NETWORK)
    it.idle(8)
    assert it.journal.writes(owner.name)
    it.mend(PAIR_NETWORK)
    assert it.whole() == (owner, copy)
    good(it)


def test_all_networks_are_cut_while_both_hosts_live(site: Make) -> None:
    """The host without the guest waits, and is fenced: the guest goes on."""
    it = begun(site, priority_delay_s=5)
    owner, copy = it.whole()
    it.cut(CLUSTER_NETWORK, PAIR_NETWORK)
    it.wait(lambda: it.switch.log, "somebody is fenced")
    it.mend(CLUSTER_NETWORK, PAIR_NETWORK)
    assert [who for _, _, who in it.switch.log] == [copy.name]
    assert it.whole() == (owner, copy)
    assert len(it.journal.begins()) == 1
    good(it)


# -- fencing ----------------------------------------------------------------------------------------------------------


def test_a_dead_fence_device(site: Make) -> None:
    """Nobody is promoted, until a person says that the host is off."""
    it = begun(site)
    owner, copy = it.whole()
    it.switch.dead = True
    owner.power_off()
    it.idle(15)
    assert it.promoted() in (None, owner)
    assert len(it.journal.begins()) == 1
    copy.told("stonith_admin", "--confirm", owner.name)
    it.wait_promoted(copy)
    good(it)


def test_an_old_owner_that_is_started_by_hand_serves_nobody_for_long(site: Make) -> None:
    """By a script at boot, without the cluster: it learns from its peer that it is outdated."""
    it = begun(site)
    old, new = it.whole()
    it.switch.stays_off.add(old.name)
    old.power_off()
    it.wait_promoted(new)
    old.power_on(without="cluster")
    # The shell stays: nbdkit ends with its parent.
    old.told("sh", "-c", "setsid sh -c 'nbdkit-replication vm1; true' >/srv/by-hand.log 2>&1 </dev/null &")
    it.wait(lambda: old.run(REPLCTL, NODE, "may-run").returncode == 1, "no guest may run there")
    good(it)


def test_ocf_tester(site: Make) -> None:
    """Without a cluster. The first owner is made by hand, here as well."""
    it = site()
    it.a.power_on(without="cluster")
    began = it.a.told(
        "sh",
        "-c",
        "(nbdkit-replication vm1 >/srv/by-hand.log 2>&1 &) && "
        "replctl vm1 wait --role secondary && replctl vm1 promote --yes && replctl vm1 quit && sleep 2",
    )
    done = it.a.run(
        "ocf-tester",
        "-n",
        "disk",
        *("-o", "node=vm1", "-o", "service=process", "-o", "log=/srv/node.log"),
        "/usr/lib/ocf/resource.d/nbdkit/replication",
        timeout_s=300,
    )
    assert done.returncode == 0, (began, done.stdout, done.stderr)
    assert "passed all tests" in done.stdout
