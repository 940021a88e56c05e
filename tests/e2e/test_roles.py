# SPDX-License-Identifier: BSD-3-Clause
"""Who owns the disks, with real processes: roles, lineage and the codes of reasons, over a failover and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from content import MIB
from lab import Lab
from nodes import Pair, Primary, Secondary, Server, code_of, disk_name, drained, refused, top_id
from waiting import DEADLINE_S, wait_until

OWNER = {"role": "primary", "score": 10000, "may-run": True, "peer-obstacle": None}


def role(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = server.execute("query-role")
    return answer


def relation(one: Server, other: Server) -> str:
    return str(one.execute("replication-compare", lineage=other.status()["lineage"])["relation"])


def in_sync(pair: Pair) -> None:
    """Both say so, and the secondary has a checkpoint of that."""
    pair.start_replication()
    pair.primary.checkpoint()
    for server in (pair.primary, pair.secondary):
        wait_until(lambda server=server: server.status()["link"]["state"] == "in-sync", f"{server.name} in sync")


def test_from_a_pair_to_a_failover(lab: Lab) -> None:
    pair = lab.pair([MIB])
    assert (role(pair.primary)["score"], role(pair.secondary)["score"]) == (10000, 0)
    assert relation(pair.primary, pair.secondary) == "unknown"
    assert pair.primary.status()["in-sync-until"] is None
    in_sync(pair)
    assert role(pair.primary) == OWNER
    of_secondary = role(pair.secondary)
    assert (of_secondary["role"], of_secondary["may-run"], of_secondary["code"]) == ("secondary", False, "is-secondary")
    assert of_secondary["score"] > 500
    assert relation(pair.primary, pair.secondary) == "same"
    assert code_of(pair.primary, "query-failover") == "wrong-mode"
    pair.primary.terminate()
    until = wait_until(lambda: pair.secondary.status()["in-sync-until"], "out of sync")
    assert until >= pair.secondary.status()["checkpoint"]["time"]
    assert role(pair.secondary)["score"] > 500, "it was in step when the primary left"
    pair.secondary.failover()
    assert role(pair.secondary) == OWNER
    assert pair.secondary.execute("query-failover")["code"] == "failed-over"
    lineage = pair.secondary.status()["lineage"]
    pair.secondary.kill()
    pair.primary.start()
    restarted = role(pair.primary)
    assert (restarted["role"], restarted["score"], restarted["may-run"]) == ("primary", 5000, None)
    assert restarted["code"] == "peer-unknown"
    assert pair.primary.execute("replication-compare", lineage=lineage)["relation"] == "older"
    pair.primary.connect(disk_name(0)).pwrite(b"x" * 512, 0)
    assert pair.primary.execute("replication-compare", lineage=lineage)["relation"] == "diverged"
    assert role(pair.primary)["may-run"], "what it has now, nobody else has"
    pair.primary.execute("replication-stop")
    pair.secondary.start()
    assert relation(pair.secondary, pair.primary) == "diverged"
    assert code_of(pair.primary, "replication-start", secondary=pair.secondary.uri()) == "not-secondary"


def test_the_moment_of_a_killed_process_is_its_last_checkpoint(lab: Lab) -> None:
    pair = lab.pair([MIB])
    in_sync(pair)
    taken = pair.secondary.status()["checkpoint"]["time"]
    pair.primary.kill()
    pair.secondary.kill()
    pair.secondary.start()
    assert pair.secondary.status()["in-sync-until"] == pytest.approx(taken)


def test_codes_of_starts(lab: Lab) -> None:
    pair = lab.pair([MIB])
    assert code_of(pair.secondary, "replication-stop", failover=True) == "not-running"
    assert code_of(pair.primary, "replication-start", mode="secondary") == "wrong-mode"
    assert code_of(pair.primary, "replication-demote") == "wrong-mode"
    pair.secondary.terminate()
    assert code_of(pair.primary, "replication-start") == "peer-unreachable"
    pair.secondary.start()
    in_sync(pair)
    assert code_of(pair.secondary, "replication-start") == "wrong-stage"
    assert code_of(pair.secondary, "replication-retry") == "wrong-stage"


# -- conditions of a failover ----------------------------------------------------------------------------------


def test_a_lossless_failover_keeps_what_came_after_the_checkpoint(lab: Lab) -> None:
    """And one without that condition goes back to the checkpoint: query-failover tells the two apart."""
    pair = lab.pair([MIB])
    in_sync(pair)
    pair.primary.connect(disk_name(0)).pwrite(b"late" * 128, 0)
    drained(pair.primary)
    assert code_of(pair.secondary, "replication-stop", failover=True, lossless=True) == "not-lossless"
    preflight = pair.secondary.execute("query-failover")
    assert (preflight["in-sync"], preflight["primary-left-well"], preflight["lossless"]) == (True, False, False)
    pair.primary.terminate()
    preflight = pair.secondary.execute("query-failover")
    assert (preflight["in-sync"], preflight["primary-left-well"], preflight["lossless"]) == (True, True, True)
    assert code_of(pair.secondary, "replication-stop", failover=True, max_age=0) == "too-old"
    pair.secondary.execute("replication-stop", failover=True, only_in_sync=True, lossless=True)
    assert pair.secondary.status()["stage"] == "done"
    assert bytes(pair.secondary.connect(top_id(0)).pread(4, 0)) == b"late"


def test_only_in_sync_is_no_failover_in_the_midst_of_a_resync(lab: Lab) -> None:
    """It is slow, so that it is seen; then the primary dies, and what it had not sent is missing for good."""
    pair = lab.pair([MIB], primary_arguments=["resync-rate=64K"])
    in_sync(pair)
    pair.secondary.kill()
    pair.primary.connect(disk_name(0)).pwrite(b"x" * MIB, 0)
    pair.secondary.start()
    wait_until(lambda: pair.secondary.status()["link"]["state"] == "synchronizing", "the resync has begun")
    pair.primary.kill()
    wait_until(lambda: pair.secondary.status()["link"]["state"] == "lost", "the link is lost")
    assert pair.secondary.execute("query-failover")["allowed"]
    assert code_of(pair.secondary, "replication-stop", failover=True, only_in_sync=True) == "not-in-sync"
    assert 100 < role(pair.secondary)["score"] <= 500
    pair.secondary.failover()


# -- outdated --------------------------------------------------------------------------------------------------


def returned(lab: Lab, primary: Primary) -> Secondary:
    """The old primary, which was killed, as a secondary with the disks and the state folder that it has. Started, and
    not paired."""
    node = lab.start(Secondary(lab.folder, primary.sizes, name=primary.name))
    node.start_replication()
    return node


def test_an_owner_that_was_demoted_is_not_promoted_before_it_is_resynchronised(lab: Lab) -> None:
    """Both nodes had lost power, both came back as secondaries, and the stale one was promoted: 650 records gone."""
    pair = lab.pair([MIB])
    in_sync(pair)
    owner = pair.secondary
    pair.primary.kill()
    owner.failover()
    owner.connect(top_id(0)).pwrite(b"newer" * 100, 0)
    old = returned(lab, pair.primary)
    for _ in range(2):
        assert old.status()["outdated-reason"]["code"] == "demoted"
        preflight = old.execute("query-failover")
        assert (preflight["allowed"], preflight["code"], preflight["force"]) == (False, "outdated", True)
        assert code_of(old, "replication-stop", failover=True) == "outdated"
        assert code_of(old, "xen-set-replication", enable=False, primary=False, failover=True) == "outdated"
        assert code_of(old, "x-colo-lost-heartbeat") == "outdated"
        assert code_of(old, "replication-stop") == "outdated"
        assert role(old)["score"] == 0
        assert old.status()["stage"] == "running"
        old.kill()
        old.start()
    owner.execute("replication-start", mode="primary", secondary=old.uri())
    wait_until(lambda: owner.status()["link"]["state"] == "in-sync", "resynchronised")
    owner.execute("replication-checkpoint")
    assert old.status()["outdated-reason"] is None
    owner.kill()
    old.kill()
    old.start()
    assert old.status()["outdated-reason"] is None
    old.failover()
    assert bytes(old.connect(top_id(0)).pread(5, 0)) == b"newer"


def test_demote_outdates_and_force_takes_what_is_there(lab: Lab) -> None:
    pair = lab.pair([MIB])
    in_sync(pair)
    pair.primary.kill()
    pair.secondary.failover()
    pair.secondary.execute("replication-demote")
    assert pair.secondary.status()["outdated-reason"]["code"] == "demoted"
    assert code_of(pair.secondary, "replication-stop", failover=True) == "outdated"
    pair.secondary.execute("replication-stop", failover=True, force=True)
    assert pair.secondary.wait_stage("done")["outdated-reason"] is None


def test_a_planned_stop_in_good_order_makes_an_owner_again(lab: Lab) -> None:
    """Resynchronised, and no checkpoint taken since: what the primary sent is there."""
    pair = lab.pair([MIB])
    in_sync(pair)
    owner = pair.secondary
    pair.primary.kill()
    owner.failover()
    old = returned(lab, pair.primary)
    owner.execute("replication-start", mode="primary", secondary=old.uri())
    wait_until(lambda: owner.status()["link"]["state"] == "in-sync", "resynchronised")
    assert old.status()["outdated-reason"]["code"] == "demoted"
    owner.execute("replication-stop")
    old.execute("replication-stop")
    assert (old.status()["stage"], old.status()["outdated-reason"]) == ("done", None)


def test_an_old_primary_that_learns_of_it_knows_it_after_a_restart(lab: Lab) -> None:
    """Restarted with its command line, it was `primary, running`, although it knew that the other had failed over."""
    pair = lab.pair([MIB])
    in_sync(pair)
    with pair.primary.qmp() as qmp:
        pair.secondary.failover()
        assert qmp.wait_event("REPLICATION_OUTDATED")["data"]["code"] == "peer-promoted"
    pair.secondary.kill()
    for how in ("kill", "terminate"):
        getattr(pair.primary, how)()
        pair.primary.start()
        assert pair.primary.status()["outdated-reason"]["code"] == "peer-promoted"
        answer = role(pair.primary)
        assert (answer["score"], answer["may-run"], answer["code"]) == (0, False, "outdated")
    # Its writes are to count after all: the other one is made its secondary again.
    pair.secondary.start()
    pair.secondary.execute("replication-demote")
    pair.secondary.execute("replication-discard")
    wait_until(lambda: pair.primary.status()["outdated-reason"] is None, "accepted as the primary", DEADLINE_S)
    assert role(pair.primary)["may-run"] is True


def test_a_node_is_told(lab: Lab) -> None:
    pair = lab.pair([MIB])
    in_sync(pair)
    pair.primary.kill()
    with pair.secondary.qmp() as qmp:
        qmp.execute("replication-outdate", reason="the cluster has promoted c")
        assert qmp.wait_event("REPLICATION_OUTDATED")["data"]["code"] == "told"
    pair.secondary.kill()
    pair.secondary.start()
    assert pair.secondary.status()["outdated-reason"]["reason"] == "the cluster has promoted c"
    assert code_of(pair.secondary, "replication-stop", failover=True) == "outdated"


# -- promote and demote ----------------------------------------------------------------------------------------


class Twins:
    """Two nodes with the same command line but for the address: role=auto, and each other's peer."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        self.nodes = [Twin(lab.folder, name, other, arguments) for name, other in (("a", "b"), ("b", "a"))]
        self.a, self.b = (lab.start(node) for node in self.nodes)

    def joined(self, owner: Server) -> None:
        """Wait until the other one is the owner's secondary and has everything, and take a checkpoint of that."""
        wait_until(lambda: owner.status()["link"]["state"] == "in-sync", "in sync", DEADLINE_S)
        owner.execute("replication-checkpoint")


class Twin(Secondary):
    """`name` with `other` as its peer."""

    def __init__(self, folder: Path, name: str, other: str, arguments: Sequence[str]) -> None:
        peer = f"nbd+unix:///?socket={folder / other}.sock"
        super().__init__(folder, [MIB], name=name, extra_arguments=["autostart=true", f"peer={peer}", *arguments])
        self.arguments[0] = "role=auto"


def set_role(server: Server, wanted: str, **more: Any) -> None:
    server.execute("replication-set-role", role=wanted, **more)
    server.execute("replication-set-role", role=wanted)  # which does nothing any more
    assert role(server)["role"] == wanted


def test_a_role_from_every_state_and_back(lab: Lab) -> None:
    """One export name for the guest on either host; a planned move in two commands, with nothing lost."""
    twins = Twins(lab)
    a, b = twins.a, twins.b
    assert [role(node)["role"] for node in (a, b)] == ["secondary", "secondary"]
    set_role(a, "primary")
    a.connect(top_id(0)).pwrite(b"1", 0)
    twins.joined(a)
    assert code_of(b, "replication-set-role", role="primary") == "has-primary"
    a.connect(top_id(0)).pwrite(b"2", 0)
    set_role(a, "secondary")
    assert a.status()["outdated-reason"]["code"] == "demoted"
    set_role(b, "primary")
    assert bytes(b.connect(top_id(0)).pread(1, 0)) == b"2"
    twins.joined(b)
    assert a.status()["outdated-reason"] is None
    b.connect(top_id(0)).pwrite(b"3", 0)
    twins.joined(b)
    # The owner dies, and comes back when the other one has taken over: it keeps its role, and learns of it.
    b.kill()
    wait_until(lambda: a.status()["link"]["state"] == "lost", "the link is lost")
    set_role(a, "primary")
    assert bytes(a.connect(top_id(0)).pread(1, 0)) == b"3"
    b.start()
    wait_until(lambda: b.status()["outdated-reason"], "it has reached the new owner")
    assert code_of(b, "replication-set-role", role="primary") == "outdated"
    set_role(b, "secondary")
    twins.joined(a)
    assert b.status()["outdated-reason"] is None
    assert relation(a, b) == "same"


def test_a_promotion_by_force_keeps_what_one_without_it_keeps(lab: Lab) -> None:
    """A manager that always gives `force` went back to the last checkpoint of a primary that had left in good order."""
    pair = lab.pair([MIB])
    in_sync(pair)
    pair.primary.connect(disk_name(0)).pwrite(b"late" * 128, 0)
    drained(pair.primary)
    pair.primary.terminate()
    assert pair.secondary.execute("query-failover")["lossless"]
    set_role(pair.secondary, "primary", force=True)
    assert bytes(pair.secondary.connect(top_id(0)).pread(4, 0)) == b"late"
    assert pair.secondary.status()["stage"] == "done"


def test_a_primary_that_cannot_be_demoted_goes_on_with_its_secondary(lab: Lab) -> None:
    """The demotion has stopped it before it found that its overlays cannot be opened."""
    twins = Twins(lab)
    a, b = twins.a, twins.b
    set_role(a, "primary")
    twins.joined(a)
    overlay = twins.nodes[0].overlay("active")
    kept = overlay.read_bytes()
    overlay.write_bytes(b"no image" * 1000)
    said = refused(a, "replication-set-role", {"role": "secondary"})
    assert "cannot become a secondary" in said
    assert "it looks for its secondary again" in said
    assert role(a)["role"] == "primary"
    twins.joined(a)
    overlay.write_bytes(kept)
    set_role(a, "secondary")
    set_role(b, "primary")
    twins.joined(b)


def test_half_a_first_copy_is_not_started_by_a_promotion(lab: Lab) -> None:
    """It was: then it ran without a valid checkpoint, and the failover was refused."""
    pair = lab.pair([MIB], contents=[b"x" * MIB], primary_arguments=["resync-rate=64K"])
    pair.primary.execute("replication-start", sync="full")
    wait_until(lambda: pair.secondary.status()["link"]["state"] == "synchronizing", "the first copy has begun")
    pair.primary.kill()
    wait_until(lambda: pair.secondary.status()["link"]["primary"] is None, "it is interrupted")
    assert code_of(pair.secondary, "replication-set-role", role="primary") == "no-checkpoint"
    assert pair.secondary.status()["stage"] == "none"
    pair.secondary.execute("replication-set-role", role="primary", force=True)
    pair.secondary.wait_stage("done")


def test_a_promoted_node_says_why_it_has_no_secondary_yet(lab: Lab) -> None:
    twins = Twins(lab)
    a, b = twins.a, twins.b
    b.kill()
    a.execute("replication-set-role", role="primary")
    wait_until(lambda: role(a)["peer-obstacle"], "it has tried")
    assert a.status()["stage"] == "done"
    b.start()
    twins.joined(a)
    assert role(a)["peer-obstacle"] is None


def test_a_promoted_node_that_is_restarted_goes_on_looking_for_its_peer(lab: Lab) -> None:
    twins = Twins(lab)
    a, b = twins.a, twins.b
    b.kill()
    a.execute("replication-set-role", role="primary")
    a.wait_stage("done")
    for how in ("kill", "terminate"):
        getattr(a, how)()
        a.start()
        wait_until(lambda: role(a)["peer-obstacle"], "it has tried")
    b.start()
    twins.joined(a)
    assert role(a)["peer-obstacle"] is None


def test_a_primary_by_its_command_line_stays_one(lab: Lab) -> None:
    """It lacks the keys of a secondary, so a demotion is refused before anything has changed."""
    pair = lab.pair([MIB])
    in_sync(pair)
    pair.primary.execute("replication-set-role", role="primary")
    assert code_of(pair.primary, "replication-set-role", role="secondary") == "wrong-mode"
    assert pair.primary.status()["stage"] == "running"
