# SPDX-License-Identifier: BSD-3-Clause
"""What befalls the two hosts at seeded random moments, one thing after the other in one cluster.

`make test-cluster ROUNDS=50 SEED=1` replays the plan, though not how processes are scheduled. After each round the
promises of journal.py hold, and the cluster is whole again without a hand.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable

import pytest

from cluster.site import CLUSTER_NETWORK, DISK_BYTES, PAIR_NETWORK, Site

ROUNDS = int(os.environ.get("ROUNDS") or 4)
SEED = os.environ.get("SEED") or str(random.randrange(1 << 30))
ROUND_S = 180
ROUND_BYTES = 4 << 20
"""What the guests write meanwhile, on a quiet machine."""


class Rounds:
    """One cluster, and what is done to it. A kind of fault returns whether a guest had to be started for it."""

    def __init__(self, it: Site, chance: random.Random) -> None:
        self._it = it
        self._chance = chance
        self.outages: dict[str, list[float]] = {}
        """By fault: seconds from a loss of power, or a kill, to the first record that a new guest was answered."""
        self.kinds: tuple[Callable[[], None], ...] = (
            self.owner_loses_power,
            self.owner_loses_power,
            self.copy_loses_power,
            self.both_lose_power,
            self.node_dies,
            self.guest_dies,
            self.pair_is_cut,
            self.one_way_is_cut,
            self.all_is_cut,
            self.standby,
            self.fence_device_is_dead_for_a_while,
        )

    def one(self, kind: Callable[[], None]) -> None:
        """Whole, a random moment, the fault, whole again."""
        it = self._it
        it.whole()
        it.idle(self._chance.uniform(0, 3))
        kind()
        it.whole()
        assert it.journal.violations() == []

    def _outage(self, what: str, since: float, begins: int) -> None:
        it = self._it
        it.wait(lambda: len(it.journal.begins()) > begins and it.journal.acknowledged(since)[-1:], "a guest writes")
        begin = it.journal.begins()[begins]
        first = next(line for line in it.journal.acknowledged(since) if line.generation == begin.generation)
        self.outages.setdefault(what, []).append(first.time - since)
        print(f"{what}: first record after {first.time - since:.1f} s")

    def owner_loses_power(self) -> None:
        owner, _ = self._it.whole()
        begins, now = len(self._it.journal.begins()), time.time()
        owner.power_off()
        self._outage("the promoted host loses power", now, begins)

    def copy_loses_power(self) -> None:
        self._it.whole()[1].power_off()

    def both_lose_power(self) -> None:
        hosts = list(self._it.whole())
        for host in hosts:
            self._it.switch.stays_off.add(host.name)
        self._chance.shuffle(hosts)
        for host in hosts:
            host.power_off()
            self._it.idle(self._chance.choice([0, 0, 2, 6]))
        self._it.switch.stays_off.clear()
        self._chance.shuffle(hosts)
        for host in hosts:
            host.power_on()
            self._it.idle(self._chance.choice([0, 3, 8]))

    def node_dies(self) -> None:
        owner, copy = self._it.whole()
        begins, now = len(self._it.journal.begins()), time.time()
        host = self._chance.choice([owner, copy])
        host.told("sh", "-c", "kill -9 $(cut -d' ' -f1 /run/resource-agents/nbdkit-replication-vm1.pid)")
        if host is owner:
            self._outage("its node is killed", now, begins)
        else:
            self._it.idle(4)

    def guest_dies(self) -> None:
        owner, _ = self._it.whole()
        begins, now = len(self._it.journal.begins()), time.time()
        owner.told("pkill", "-9", "-f", "writer.py")
        self._outage("the guest is killed", now, begins)

    def pair_is_cut(self) -> None:
        self._it.cut(PAIR_NETWORK)
        self._it.idle(self._chance.uniform(0, 8))
        self._it.mend(PAIR_NETWORK)

    def one_way_is_cut(self) -> None:
        self._it.cut_from(self._chance.choice(self._it.hosts), PAIR_NETWORK)
        self._it.idle(self._chance.uniform(0, 8))
        self._it.mend(PAIR_NETWORK)

    def all_is_cut(self) -> None:
        self._it.cut(CLUSTER_NETWORK, PAIR_NETWORK)
        fenced = len(self._it.switch.log)
        self._it.wait(lambda: len(self._it.switch.log) > fenced, "somebody is fenced")
        self._it.mend(CLUSTER_NETWORK, PAIR_NETWORK)

    def standby(self) -> None:
        owner, copy = self._it.whole()
        owner.told("crm_standby", "--update", "on", "--node", owner.name)
        self._it.wait_promoted(copy)
        owner.told("crm_standby", "--delete", "--node", owner.name)

    def fence_device_is_dead_for_a_while(self) -> None:
        owner, copy = self._it.whole()
        self._it.switch.dead = True
        owner.power_off()
        self._it.idle(self._chance.uniform(3, 8))
        assert not self._it.journal.writes(copy.name), "nobody has fenced the owner"
        self._it.switch.dead = False


@pytest.mark.timeout(120 + ROUNDS * ROUND_S)
def test_rounds(site: Callable[..., Site]) -> None:
    print(f"\nseed {SEED}, {ROUNDS} rounds")
    chance = random.Random(SEED)
    it = site(priority_delay_s=5, disk_bytes=DISK_BYTES + ROUNDS * ROUND_BYTES)
    it.begin()
    rounds = Rounds(it, chance)
    for number in range(ROUNDS):
        kind = chance.choice(rounds.kinds)
        began = time.monotonic()
        rounds.one(kind)
        print(f"round {number}: {kind.__name__}: whole after {time.monotonic() - began:.1f} s", flush=True)
    for what, outages in rounds.outages.items():
        middle, worst = statistics.median(outages), max(outages)
        print(f"{what}: first record after {middle:.1f} s (median), {worst:.1f} s (worst), of {len(outages)}")
