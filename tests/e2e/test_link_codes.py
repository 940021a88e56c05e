# SPDX-License-Identifier: BSD-3-Clause
"""What a real primary says to programs of why its link is not up, and whether it has learnt that the other went on."""

from __future__ import annotations

from typing import Any

from content import KIB, pattern
from lab import Lab
from nodes import Pair, Server, code_of, drained
from waiting import wait_until


def coded(node: Server, *codes: str) -> dict[str, Any]:
    """The status of a node, once its link has one of these codes."""

    def found() -> dict[str, Any] | None:
        status = node.status()
        return status if status["link"].get("code") in codes else None

    status: dict[str, Any] = wait_until(found, f"{node.name} says {codes}")
    assert status["link"]["reason"], "a code stands beside its sentence"
    return status


def replicating(lab: Lab, *arguments: str) -> Pair:
    pair = lab.pair(primary_arguments=arguments)
    pair.start_replication()
    pair.primary.connect("disk0").pwrite(pattern(1, KIB), 0)
    wait_until(lambda: drained(pair.primary)["link"]["state"] == "in-sync", "the pair is in sync")
    return pair


def test_a_primary_whose_secondary_has_failed_over_is_outdated(lab: Lab) -> None:
    pair = replicating(lab, "on-outdated=continue")
    status = pair.primary.status()
    assert "code" not in status["link"]
    assert status["outdated"] is False
    pair.secondary.failover()
    assert coded(pair.primary, "not-secondary")["outdated"] is True
    # Its own guest goes on, so both have, and that is what it says as long as it asks.
    assert pair.primary.status()["disks"][0]["missing-bytes"] == 0
    pair.primary.connect("disk0").pwrite(pattern(2, KIB), 0)
    assert pair.primary.status()["disks"][0]["missing-bytes"] == 64 * KIB


def test_a_first_copy_is_no_checkpoint_of_the_secondary(lab: Lab) -> None:
    """The start counts as a checkpoint, so a primary said that the last one was some seconds old."""
    pair = lab.pair()
    pair.secondary.execute("replication-start")
    pair.primary.execute("replication-start", sync="full")
    wait_until(lambda: pair.primary.status().get("peer-consistent") is False, "the secondary has said so")
    wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "the copy is complete")
    assert pair.primary.status()["peer-consistent"] is False
    pair.primary.checkpoint()
    assert "peer-consistent" not in pair.primary.status()


def test_a_primary_whose_secondary_is_gone_is_not(lab: Lab) -> None:
    pair = replicating(lab)
    pair.secondary.kill()
    assert coded(pair.primary, "link-lost", "peer-unreachable")["outdated"] is False
    assert coded(pair.primary, "peer-unreachable")["outdated"] is False
    pair.secondary.start()
    wait_until(lambda: "code" not in pair.primary.status()["link"], "the link is up again")


def test_a_stranger_at_the_address_of_the_secondary_proves_nothing(lab: Lab) -> None:
    """Another VM's promoted node, at a port that was mixed up: its refusal made a primary outdated, whose guest stood
    still then."""
    pair = replicating(lab)
    pair.secondary.kill()
    other = lab.secondary(name="other")
    stranger, friend = other.socket_path, pair.secondary.socket_path
    other.execute("replication-start")
    other.failover()
    other.wait_stage("done")
    friend.unlink(missing_ok=True)
    friend.symlink_to(stranger)
    status = coded(pair.primary, "other-node")
    assert (status["outdated"], status["outdated-reason"], status["guest-suspended"]) == (False, None, None)
    friend.unlink()
    pair.secondary.start()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "the pair is in sync")
    pair.secondary.failover()
    wait_until(lambda: pair.primary.status()["outdated-reason"], "it has learnt that its own secondary has failed over")
    pair.primary.execute("replication-stop")
    assert code_of(pair.primary, "replication-start", secondary=other.uri()) == "not-secondary", "a start asks for it"
