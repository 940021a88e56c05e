# SPDX-License-Identifier: BSD-3-Clause
"""lease=SECONDS with real processes, whose boot-time clocks are set by the test: no lease ends in the time of a test by
itself."""

from __future__ import annotations

import os
from pathlib import Path

import nbd
import pytest

import commandline
from content import MIB
from lab import Lab
from nodes import Pair, Server, code_of, disk_name, drained, refused
from standing import completed, restarted_alone, stands
from waiting import wait_until

LEASE_S = 1000.0
CLOCK = """
import time
_get = time.clock_gettime
def _shifted(clock):
    by = 0.0
    if clock == time.CLOCK_BOOTTIME:
        with open({path!r}) as file:
            by = float(file.read() or 0)
    return _get(clock) + by
time.clock_gettime = _shifted
"""
"""Read by Python when it starts (sitecustomize)."""


class Clock:
    """The boot-time clock of one node."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._by = folder / "by"
        self._by.write_text("0")
        (folder / "sitecustomize.py").write_text(CLOCK.format(path=str(self._by)))
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        self.environment = {"PYTHONPATH": path}

    def advance(self, seconds: float) -> None:
        """That time goes by on this host."""
        new = self._by.with_suffix(".new")
        new.write_text(str(float(self._by.read_text()) + seconds))
        new.replace(self._by)


@pytest.fixture
def leased(lab: Lab) -> tuple[Pair, Clock, Clock]:
    of_primary, of_secondary = Clock(lab.folder / "clock-a"), Clock(lab.folder / "clock-b")
    pair = lab.pair(
        [MIB],
        primary_arguments=[f"lease={LEASE_S:g}"],
        primary_options={"extra_environment": of_primary.environment},
        secondary_options={"extra_environment": of_secondary.environment},
    )
    pair.start_replication()
    drained(pair.primary)
    pair.primary.checkpoint()
    return pair, of_primary, of_secondary


def suspended(server: Server) -> str | None:
    found = server.status()["guest-suspended"]
    return None if found is None else str(found)


def test_the_guest_is_served_while_the_secondary_or_the_cluster_is_heard_of(leased: tuple[Pair, Clock, Clock]) -> None:
    pair, clock, _ = leased
    guest = pair.primary.connect(disk_name(0))
    guest.pwrite(b"1" * 512, 0)
    clock.advance(10 * LEASE_S)
    guest.pwrite(b"2" * 512, 0)  # it is asked four times a second, and answers
    pair.secondary.kill()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "lost", "the loss is noticed")
    guest.pwrite(b"3" * 512, 0)
    clock.advance(LEASE_S)
    assert "lease" in str(suspended(pair.primary))
    data, space = nbd.Buffer.from_bytearray(b"4" * 512), nbd.Buffer(512)
    cookies = [guest.aio_pwrite(data, 0), guest.aio_pread(space, 0), guest.aio_flush()]
    stands(pair.primary, guest, *cookies)
    assert pair.primary.disks[0].read_bytes()[:1] == b"3"
    assert pair.primary.execute("replication-renew") == {"seconds": LEASE_S}
    completed(guest, *cookies)
    clock.advance(LEASE_S)
    write = guest.aio_pwrite(data, 0)
    stands(pair.primary, guest, write)
    pair.secondary.start()
    completed(guest, write)
    assert suspended(pair.primary) is None


def test_a_primary_that_starts_again_has_no_lease_yet(leased: tuple[Pair, Clock, Clock]) -> None:
    pair, _, _ = leased
    guest, write = restarted_alone(pair)
    pair.primary.execute("replication-resume-io")
    completed(guest, write)
    assert code_of(pair.primary, "replication-start", force=True) == "wrong-stage", "its guest is served"


def test_the_secondary_takes_the_disks_when_the_lease_is_over(leased: tuple[Pair, Clock, Clock]) -> None:
    pair, _, clock = leased
    secondary = pair.secondary
    preflight = secondary.execute("query-failover")
    assert (preflight["allowed"], preflight["code"], preflight["force"]) == (False, "leased", True)
    pair.primary.kill()
    assert code_of(secondary, "replication-stop", failover=True) == "leased"
    assert code_of(secondary, "replication-set-role", role="primary") in ("leased", "has-primary")
    secondary.kill()
    secondary.start()  # it does not know when it last heard of it
    clock.advance(LEASE_S)
    assert code_of(secondary, "replication-stop", failover=True) == "leased", "clocks differ"
    clock.advance(LEASE_S)
    assert secondary.execute("query-failover")["allowed"]
    secondary.execute("replication-renew")
    assert code_of(secondary, "replication-stop", failover=True) == "leased", "the cluster lets the primary go on"
    clock.advance(2 * LEASE_S)
    secondary.failover()


def test_a_primary_that_has_left_in_good_order_needs_no_lease(leased: tuple[Pair, Clock, Clock]) -> None:
    pair, _, _ = leased
    pair.primary.terminate()
    pair.secondary.failover()


def test_by_force_the_secondary_does_not_wait_and_its_former_primary_hears_no_more_of_it(
    leased: tuple[Pair, Clock, Clock],
) -> None:
    pair, clock, _ = leased
    pair.secondary.execute("replication-stop", failover=True, force=True)
    wait_until(lambda: pair.primary.status()["outdated-reason"], "it learns of the failover all the same")
    pair.primary.execute("replication-resume-io")
    clock.advance(LEASE_S)
    assert suspended(pair.primary) is None, "somebody has said that it goes on, and nothing was heard since"
    pair.primary.restart()
    assert suspended(pair.primary)


def test_nothing_is_renewed_from_a_good_bye_until_the_nodes_have_met_again(leased: tuple[Pair, Clock, Clock]) -> None:
    """The secondary may fail over at any time, so the cluster must not let the primary go on."""
    pair, _, _ = leased
    primary, secondary = pair.primary, pair.secondary
    primary.terminate()
    assert code_of(secondary, "replication-renew") == "wrong-stage"
    secondary.kill()
    primary.start()
    assert code_of(primary, "replication-renew") == "wrong-stage"
    assert "lease" in str(suspended(primary))
    secondary.start()
    wait_until(lambda: suspended(primary) is None, "they have met again")
    for node in (secondary, primary):
        assert node.execute("replication-renew") == {"seconds": LEASE_S}


def test_what_else_speaks_against_a_failover_is_said_before_the_lease(leased: tuple[Pair, Clock, Clock]) -> None:
    """Who reads only of the lease, and knows that the primary is dead, would go over it by force."""
    secondary = leased[0].secondary
    assert code_of(secondary, "replication-stop", failover=True) == "leased"
    assert code_of(secondary, "replication-stop", failover=True, lossless=True) == "not-lossless"
    assert code_of(secondary, "replication-stop", failover=True, **{"no-primary": True}) == "has-primary"
    secondary.execute("replication-outdate")
    assert code_of(secondary, "replication-stop", failover=True) == "outdated"


def test_half_a_copy_is_not_taken_for_the_sake_of_a_lease(lab: Lab) -> None:
    arguments = ["resync-rate=64K", f"lease={LEASE_S:g}"]
    pair = lab.pair([4 * MIB], contents=[b"x" * 4 * MIB], primary_arguments=arguments)
    pair.secondary.start_replication()
    pair.primary.execute("replication-start", sync="full")
    wait_until(lambda: pair.secondary.status()["link"]["state"] == "synchronizing", "the copy has begun")
    pair.primary.kill()
    wait_until(lambda: pair.secondary.status()["link"]["primary"] is None, "the loss is noticed")
    assert pair.secondary.execute("query-failover")["code"] == "no-checkpoint"
    assert code_of(pair.secondary, "replication-stop", failover=True) == "no-checkpoint"
    assert code_of(pair.secondary, "replication-set-role", role="primary") == "no-checkpoint"


def test_a_primary_whose_resync_is_refused_again_and_again_keeps_no_failover_away(lab: Lab) -> None:
    handler, config = lab.folder / "handler", lab.folder / "handlers.toml"
    handler.write_text("#!/bin/sh\nexit 4\n")
    handler.chmod(0o755)
    config.write_text(f'[[handler]]\nevent = "before-resync-target"\ncommand = "{handler}"\ntimeout = 20\n')
    clock = Clock(lab.folder / "clock")
    pair = lab.pair(
        primary_arguments=[f"lease={LEASE_S:g}"],
        secondary_arguments=[f"config={config}"],
        secondary_options={"extra_environment": clock.environment},
    )
    pair.secondary.start_replication()
    assert "refuses the resync" in refused(pair.primary, "replication-start", {"sync": "full"})
    assert pair.secondary.execute("query-failover")["code"] == "leased"
    clock.advance(2 * LEASE_S)
    assert "refuses the resync" in refused(pair.primary, "replication-start", {"sync": "full"})
    assert pair.secondary.execute("query-failover")["allowed"]


# -- who has fenced the primary -------------------------------------------------------------------------------------


def test_who_has_fenced_the_primary_waits_for_no_lease_and_the_conditions_hold(
    leased: tuple[Pair, Clock, Clock],
) -> None:
    secondary = leased[0].secondary
    leased[0].primary.kill()
    wait_until(lambda: secondary.execute("query-failover")["primary"] is None, "the loss is noticed")
    assert code_of(secondary, "replication-stop", failover=True, **{"max-age": 3600}) == "leased"
    assert code_of(secondary, "replication-stop", failover=True, fenced=True, **{"max-age": 0}) == "too-old"
    assert code_of(secondary, "replication-stop", failover=True, fenced=True, lossless=True) == "not-lossless"
    assert replctl(secondary, "failover", "--check") != 0
    assert replctl(secondary, "failover", "--check", "--fenced", "--max-age", "0.001") != 0
    assert replctl(secondary, "failover", "--check", "--fenced") == 0
    assert secondary.status()["stage"] == "running"
    assert replctl(secondary, "failover", "--yes", "--fenced", "--max-age", "3600", "--no-primary") == 0
    secondary.wait_stage("done")
    assert replctl(secondary, "failover", "--yes", "--fenced") == 0, "it is done"


def test_a_promotion_with_that_word_goes_over_the_lease_and_over_nothing_else(
    leased: tuple[Pair, Clock, Clock],
) -> None:
    pair, _, _ = leased
    a, b = pair.primary, pair.secondary
    assert code_of(b, "replication-set-role", role="primary", fenced=True) == "has-primary", "it was not fenced well"
    a.kill()
    wait_until(lambda: b.execute("query-failover")["primary"] is None, "the loss is noticed")
    assert code_of(b, "replication-set-role", role="primary") == "leased"
    b.execute("replication-outdate")
    assert code_of(b, "replication-set-role", role="primary", fenced=True) == "outdated"
    assert b.execute("query-role")["role"] == "secondary"


def test_promote_with_that_word_takes_the_disks_or_lets_an_owner_go_on(leased: tuple[Pair, Clock, Clock]) -> None:
    pair, _, _ = leased
    guest, write = restarted_alone(pair)
    assert replctl(pair.primary, "promote", "--yes") == 0
    stands(pair.primary, guest, write)
    assert replctl(pair.primary, "promote", "--yes", "--fenced") == 0
    completed(guest, write)
    pair.primary.kill()
    pair.secondary.start()
    assert code_of(pair.secondary, "replication-set-role", role="primary") == "leased", "counted from its start"
    for _ in range(2):
        assert replctl(pair.secondary, "promote", "--yes", "--fenced") == 0
        pair.secondary.wait_stage("done")


def replctl(server: Server, *words: str) -> int:
    """Its exit code."""
    return commandline.replctl("--state", server.state, *words).returncode
