# SPDX-License-Identifier: BSD-3-Clause
"""What makes a node outdated, and what does not end it: corners of what test_roles.py shows on the straight way."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkout import REPOSITORY
from content import MIB
from lab import Lab
from nodes import Pair, Secondary, Server, code_of, disk_name, drained, top_id
from qmp import QmpError
from waiting import DEADLINE_S, wait_until


def in_sync(pair: Pair) -> None:
    """The secondary has everything, and a checkpoint of that."""
    pair.start_replication()
    pair.primary.checkpoint()


def outdated(server: Server) -> str | None:
    """The code of why the node is outdated, None if it is not."""
    reason = server.status()["outdated-reason"]
    return None if reason is None else str(reason["code"])


def test_half_a_copy_that_was_taken_by_force_is_outdated_once_it_is_demoted(lab: Lab) -> None:
    """It descends from nothing, so its lineage says nothing of the primary that has the other half."""
    pair = lab.pair([4 * MIB], contents=[b"x" * 4 * MIB], primary_arguments=["resync-rate=64K"])  # zeroes cost nothing
    pair.secondary.start_replication()
    pair.primary.execute("replication-start", sync="full")
    wait_until(lambda: pair.secondary.status()["link"]["state"] == "synchronizing", "the copy has begun")
    pair.primary.kill()
    taken = pair.secondary
    assert code_of(taken, "replication-stop", failover=True) == "no-checkpoint"
    taken.execute("replication-stop", failover=True, force=True)
    taken.wait_stage("done")
    assert outdated(taken) is None, "what is here counts, a person has said"
    taken.execute("replication-demote")
    for _ in range(2):
        assert outdated(taken) == "demoted"
        assert not taken.execute("query-failover")["allowed"]
        assert taken.execute("query-role")["score"] == 0
        assert code_of(taken, "replication-stop", failover=True) == "outdated"
        taken.kill()
        taken.start()


def test_a_node_that_never_had_a_primary_is_not_outdated_by_a_demotion(lab: Lab) -> None:
    alone = lab.start(Secondary(lab.folder, [MIB]))
    alone.start_replication()
    alone.failover()
    alone.execute("replication-demote")
    assert outdated(alone) is None


# -- told --------------------------------------------------------------------------------------------------------


def resynchronised(lab: Lab) -> tuple[Secondary, Secondary]:
    """The next owner, and the one before it, which was demoted and has everything from it, without a checkpoint."""
    pair = lab.pair([MIB])
    in_sync(pair)
    owner = pair.secondary
    pair.primary.kill()
    owner.failover()
    owner.connect(top_id(0)).pwrite(b"newer", 0)
    old = lab.start(
        Secondary(lab.folder, [MIB], name=pair.primary.name, extra_environment=lab.pause_points().environment)
    )
    old.start_replication()
    owner.execute("replication-start", mode="primary", secondary=old.uri())
    wait_until(lambda: owner.status()["link"]["state"] == "in-sync", "resynchronised")
    assert outdated(old) == "demoted"
    return owner, old


def tell(server: Server) -> None:
    """Say to a node that is outdated for another reason that a third one has gone on."""
    with server.qmp() as qmp:
        qmp.execute("replication-outdate", reason="c was promoted")
        assert qmp.wait_event("REPLICATION_OUTDATED")["data"]["code"] == "told"


@pytest.mark.parametrize("command", ["replication-stop", "replication-checkpoint"])
def test_what_a_primary_had_sent_is_no_resync_when_it_was_told_afterwards(lab: Lab, command: str) -> None:
    """The demoted node would have become the owner by a planned stop, or current by a checkpoint."""
    owner, old = resynchronised(lab)
    owner.terminate()
    wait_until(lambda: old.execute("query-failover")["primary-left-well"], "it has left in good order")
    tell(old)
    if command == "replication-stop":
        assert code_of(old, command) == "outdated"
    else:
        old.execute(command)
    assert outdated(old) == "told"
    old.kill()
    old.start()
    assert outdated(old) == "told"
    assert code_of(old, "replication-stop") == "outdated"


def test_a_primary_that_leaves_after_that_ends_nothing_either(lab: Lab) -> None:
    """Also not in the next process, which has the record only."""
    owner, old = resynchronised(lab)
    tell(old)
    owner.terminate()
    wait_until(lambda: old.status()["link"]["state"] == "disconnected", "it has left in good order")
    old.kill()
    old.start()
    assert code_of(old, "replication-stop") == "outdated"
    assert outdated(old) == "told"


@pytest.mark.parametrize("was_told", [True, False])
def test_a_kill_in_the_midst_of_the_checkpoint_after_a_resync(lab: Lab, was_told: bool) -> None:
    """It counts as taken, and ends what a resync ends."""
    owner, old = resynchronised(lab)
    pauses = lab.pause_points()
    if was_told:
        tell(old)
    pauses.arm("checkpoint.begun")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(owner.execute, "replication-checkpoint")
        pauses.wait_hit("checkpoint.begun")
        old.kill()
        owner.kill()
        with pytest.raises((QmpError, OSError, EOFError)):
            asked.result(DEADLINE_S)
    pauses.disarm("checkpoint.begun")
    old.start()
    assert outdated(old) == ("told" if was_told else None)


# -- learnt ------------------------------------------------------------------------------------------------------


def test_an_owner_whose_start_shows_that_the_other_has_gone_on_is_outdated(lab: Lab) -> None:
    """It was stopped as planned, so no link learns of it."""
    pair = lab.pair([MIB])
    in_sync(pair)
    former, newer = pair.primary, pair.secondary
    former.execute("replication-stop")
    newer.failover()
    assert code_of(former, "replication-start", secondary=newer.uri()) == "not-secondary"
    assert outdated(former) is None, "what owns its disks there may be another pair's"
    newer.execute("replication-demote")
    for _ in range(2):
        assert code_of(former, "replication-start", secondary=newer.uri()) == "peer-newer"
        assert outdated(former) == "peer-newer"
        assert former.execute("query-role")["may-run"] is False
        former.kill()
        former.start()
    former.execute("replication-set-role", role="primary", force=True)
    assert outdated(former) is None
    assert code_of(former, "replication-start", secondary=newer.uri()) == "peer-newer"
    assert outdated(former) is None, "a person has overruled that"


def test_what_a_person_has_overruled_the_link_does_not_learn_again(lab: Lab) -> None:
    """It meets the same refusal every few seconds; another one is news."""
    pair = lab.pair([MIB])
    in_sync(pair)
    former, newer = pair.primary, pair.secondary
    newer.failover()
    wait_until(lambda: outdated(former) == "peer-promoted", "the link has learnt of it", DEADLINE_S)
    former.execute("replication-set-role", role="primary", force=True)
    assert outdated(former) is None
    former.kill()
    former.start()
    wait_until(lambda: former.status()["link"].get("code") == "not-secondary", "it was refused again", DEADLINE_S)
    former.terminate()  # with the thread of the link
    newer.kill()
    former.start()
    assert outdated(former) is None
    newer.start()
    newer.execute("replication-demote")
    wait_until(lambda: outdated(former) == "peer-newer", "that it has a newer copy is news", DEADLINE_S)


# -- lossless ----------------------------------------------------------------------------------------------------


def left_well(lab: Lab) -> Pair:
    """A pair whose primary has written something after the last checkpoint, and left in good order."""
    pauses = lab.pause_points()
    options = {"extra_environment": pauses.environment}
    pair = lab.pair([MIB], primary_options=options, secondary_options=options)
    in_sync(pair)
    pair.primary.connect(disk_name(0)).pwrite(b"late", 0)
    drained(pair.primary)
    pair.primary.terminate()
    wait_until(lambda: pair.secondary.execute("query-failover")["lossless"], "it has left in good order")
    return pair


def test_a_write_of_the_guest_while_a_lossless_failover_flushes_is_not_dropped(lab: Lab) -> None:
    """The planned stop drops what the guest here has written; that there was nothing was seen before the flush."""
    secondary, pauses = left_well(lab).secondary, lab.pause_points()
    guest = secondary.connect(top_id(0))
    pauses.arm("stop.prepared")
    with ThreadPoolExecutor() as pool:
        refused = pool.submit(code_of, secondary, "replication-stop", failover=True, lossless=True)
        pauses.wait_hit("stop.prepared")
        guest.pwrite(b"mine", 4096)
        pauses.release("stop.prepared")
        assert refused.result(DEADLINE_S) == "not-lossless"
    assert secondary.status()["stage"] == "running"
    assert bytes(guest.pread(4, 4096)) == b"mine"


def test_a_primary_that_is_back_has_not_left_any_more(lab: Lab) -> None:
    """It has paired, and not yet said what it will send; then it is gone again, in whatever order."""
    pair, pauses = left_well(lab), lab.pause_points()
    pauses.arm("link.dialled")
    pair.primary.start()
    pauses.wait_hit("link.dialled")
    for step in ("paired", "gone", "restarted"):
        if step == "gone":
            pair.primary.kill()
        if step == "restarted":
            pair.secondary.kill()
            pair.secondary.start()
        preflight = pair.secondary.execute("query-failover")
        assert (preflight["primary-left-well"], preflight["lossless"]) == (False, False), step
        assert code_of(pair.secondary, "replication-stop", failover=True, lossless=True) == "not-lossless", step
    pauses.disarm("link.dialled")


def test_demote_does_not_say_that_a_secondary_runs_which_was_never_started(lab: Lab) -> None:
    alone = lab.start(Secondary(lab.folder, [MIB]))
    command = [REPOSITORY / "scripts/replctl", "--state", alone.state, "demote", "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert "has not been started" in done.stdout
    assert alone.status()["stage"] == "none"
