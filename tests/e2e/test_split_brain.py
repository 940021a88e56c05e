# SPDX-License-Identifier: BSD-3-Clause
"""Two real nodes that own their disks, and meet: which of them is outdated, and which neither (record/encounter.py has
the table)."""

from __future__ import annotations

import pytest

from content import MIB
from lab import Lab
from nodes import Pair, Primary, Secondary, Server, disk_name, in_sync, refused, top_id
from waiting import DEADLINE_S, wait_until

MINE, THEIRS = b"mine" * 128, b"them" * 128


def started(lab: Lab) -> Pair:
    """In sync, and the secondary has a checkpoint of that."""
    options = {"extra_environment": lab.pause_points().environment}
    pair = lab.pair([MIB], primary_options=options, secondary_options=options)
    pair.start_replication()
    pair.primary.checkpoint()
    in_sync(pair.primary)
    return pair


def peers(lab: Lab) -> tuple[Secondary, Secondary]:
    """As `started`, of two nodes that may have either role: the owner, and the one that keeps a copy."""
    options = {"extra_environment": lab.pause_points().environment}
    a, b = (lab.start(Secondary(lab.folder, [MIB], name=name, **options)) for name in ("a", "b"))
    for server in (a, b):
        server.start_replication()
    a.failover()
    a.wait_stage("done")
    a.execute("replication-start", mode="primary", secondary=b.uri())
    in_sync(a)
    a.execute("replication-checkpoint")
    return a, b


def write(server: Server, name: str, data: bytes, offset: int = 0) -> None:
    """A guest's write, which is answered: the guest does not stand still."""
    handle = server.connect(name)
    handle.pwrite(data, offset)
    assert bytes(handle.pread(len(data), offset)) == data


def both_go_on(lab: Lab, *, meet: bool = True) -> Pair:
    """The secondary fails over while its primary is down, which writes before it sees that."""
    pair = started(lab)
    pair.primary.kill()
    pair.secondary.failover()
    pair.secondary.wait_stage("done")
    write(pair.secondary, top_id(0), THEIRS)
    pair.secondary.kill()
    pair.primary.start()
    write(pair.primary, disk_name(0), MINE)
    if meet:
        pair.secondary.start()
        for server in (pair.primary, pair.secondary):
            wait_until(lambda server=server: split(server), f"{server.name} says so")
    return pair


def split(server: Server) -> str | None:
    found = server.status()["split-brain"]
    return None if found is None else str(found["code"])


def kept(server: Primary | Secondary) -> bool:
    """Whether the next process finds it."""
    return any(b'"split-brain"' in path.read_bytes() for path in server.state.glob("state.json*"))


def outdated(server: Server) -> str | None:
    """The code. The flag beside it may come a moment before."""
    status = server.status()
    found = status["outdated-reason"]
    assert status["outdated"] or found is None
    return None if found is None else str(found["code"])


def link_code(server: Server) -> str | None:
    code = server.status()["link"].get("code")
    return None if code is None else str(code)


def test_a_split_brain_stops_neither_and_both_say_so_until_a_person_has_decided(lab: Lab) -> None:
    pair = both_go_on(lab, meet=False)
    a, b = pair.primary, pair.secondary
    b.start()
    with a.qmp() as qmp:
        if split(a) is None:
            assert qmp.wait_event("REPLICATION_SPLIT_BRAIN")["data"]["code"] == "split-brain"
    wait_until(lambda: (split(a), split(b)) == ("split-brain",) * 2, "both say so")
    wait_until(lambda: link_code(a) == "split-brain", "the link says so, too")
    assert b.status()["node"] in a.status()["split-brain"]["reason"]
    for _ in range(2):
        for server, name, data in ((a, disk_name(0), MINE), (b, top_id(0), THEIRS)):
            status = server.status()
            assert (status["outdated"], outdated(server), status["guest-suspended"]) == (False, None, None)
            write(server, name, data)
        assert (a.execute("query-role")["may-run"], a.execute("query-role")["code"]) == (None, "split-brain")
        assert b.execute("query-role")["may-run"], "somebody has promoted it"
        for server in (a, b):  # kept, on either side
            wait_until(lambda server=server: kept(server), "it is saved")
            server.kill()
            server.start()
        assert (split(a), split(b)) == ("split-brain",) * 2
    a.execute("replication-set-role", role="primary")  # it is one
    assert split(a) == "split-brain"
    a.execute("replication-set-role", role="primary", force=True)
    assert (split(a), a.execute("query-role")["may-run"]) == (None, True), "a person has said that it counts"
    b.execute("replication-demote")
    wait_until(lambda: link_code(a) == "split-brain", "it was refused again")
    assert split(a) is None, "which is no news"
    assert a.disks[0].read_bytes()[:512] == MINE
    assert b.disks[0].read_bytes()[:512] == THEIRS, "nobody has said yet that it is to be thrown away"
    b.execute("replication-discard")
    in_sync(a)
    a.checkpoint()
    assert b.disks[0].read_bytes()[:512] == MINE
    assert (split(a), split(b), outdated(a), outdated(b)) == (None,) * 4


def test_a_node_that_meets_the_same_as_a_secondary_says_it_as_well(lab: Lab) -> None:
    """It was made one before the two met."""
    pair = both_go_on(lab, meet=False)
    pair.primary.kill()
    pair.secondary.start()
    pair.secondary.execute("replication-demote")
    pair.primary.start()
    wait_until(lambda: split(pair.primary) and split(pair.secondary), "both say so")
    assert (outdated(pair.primary), outdated(pair.secondary)) == (None, "demoted")
    wait_until(lambda: kept(pair.secondary), "it is saved")
    pair.secondary.kill()
    pair.secondary.start()
    assert split(pair.secondary) == "split-brain"


def test_a_copy_that_the_other_went_on_from_is_outdated_and_the_other_is_not(lab: Lab) -> None:
    """Both ask at once: the primary's link, and a start on the promoted node."""
    (a, b), pauses = peers(lab), lab.pause_points()
    pauses.arm("outdate.found")
    b.failover()
    pauses.wait_hit("outdate.found")
    b.wait_stage("done")
    refused(b, "replication-start", {"mode": "primary", "secondary": a.uri()})
    pauses.release("outdate.found")
    wait_until(lambda: outdated(a) == "peer-promoted", "the link has learnt of it")
    assert (outdated(b), split(a), split(b)) == (None, None, None)
    assert a.status()["guest-suspended"] is not None
    write(b, top_id(0), THEIRS)


def test_a_guest_that_writes_while_its_node_learns_of_the_other_makes_it_a_split_brain(lab: Lab) -> None:
    """What was answered is nowhere else. A write that is not answered yet, when it stands, would not count."""
    pair, pauses = started(lab), lab.pause_points()
    a, b = pair.primary, pair.secondary
    pauses.arm("outdate.found")
    b.failover()
    pauses.wait_hit("outdate.found")
    write(a, disk_name(0), MINE)
    pauses.release("outdate.found")
    wait_until(lambda: split(a) and split(b), "both say so")
    assert (outdated(a), outdated(b), a.status()["guest-suspended"]) == (None, None, None)
    assert a.status()["outdated"] is False
    write(a, disk_name(0), MINE)


@pytest.mark.parametrize("diverged", [False, True])
def test_a_kill_between_learning_and_storing(lab: Lab, diverged: bool) -> None:
    """The next process has not learnt it, and learns it again."""
    pauses = lab.pause_points()
    point = "split-brain.found" if diverged else "outdate.learnt"
    if diverged:
        pair = both_go_on(lab, meet=False)
        pauses.arm(point)
        pair.secondary.start()
    else:
        pair = started(lab)
        pauses.arm(point)
        pair.secondary.failover()
    pauses.wait_hit(point)
    # Which of the two is held is not said: it is the first one that has come so far.
    for server in (pair.primary, pair.secondary):
        server.kill()
    pauses.disarm(point)
    pair.primary.start()
    assert outdated(pair.primary) is None
    pair.secondary.start()
    if diverged:
        wait_until(lambda: split(pair.primary) and split(pair.secondary), "both say so")
        assert (outdated(pair.primary), outdated(pair.secondary)) == (None, None)
    else:
        wait_until(lambda: outdated(pair.primary) == "peer-promoted", "the link has learnt of it")
        assert (split(pair.primary), split(pair.secondary)) == (None, None)


def test_who_has_gone_on_from_what_a_stopped_one_owns_is_not_outdated(lab: Lab) -> None:
    """The secondary was stopped as planned while its primary was down, and nobody has written there since."""
    pair = started(lab)
    a, b = pair.primary, pair.secondary
    a.terminate()
    wait_until(lambda: b.execute("query-failover")["primary-left-well"], "it has left in good order")
    b.execute("replication-stop")
    b.kill()
    a.start()
    write(a, disk_name(0), MINE)
    b.start()
    wait_until(lambda: link_code(a) == "not-secondary", "the two have met")
    for server in (a, b):
        assert (outdated(server), split(server), server.status()["guest-suspended"]) == (None, None, None)
    write(b, top_id(0), THEIRS)
    wait_until(lambda: split(a) and split(b), "now both have gone on")
    assert (outdated(a), outdated(b)) == (None, None)


def test_who_owns_the_same_as_one_that_was_stopped_is_outdated(lab: Lab) -> None:
    """Somebody has made the other one the owner since, and nothing here would be lost."""
    pair = started(lab)
    pair.secondary.execute("replication-stop")
    wait_until(lambda: outdated(pair.primary) == "peer-promoted", "the link has learnt of it")
    assert (outdated(pair.secondary), split(pair.primary), split(pair.secondary)) == (None, None, None)


@pytest.mark.parametrize("written", [False, True])
def test_a_third_node_that_comes_from_what_is_here(lab: Lab, written: bool) -> None:
    """It has its content by way of the promoted one, and answers at that one's address."""
    pair = started(lab)
    a, b = pair.primary, pair.secondary
    a.kill()
    b.failover()
    b.wait_stage("done")
    c = lab.start(Secondary(lab.folder, [MIB], name="third"))
    c.start_replication()
    b.execute("replication-start", mode="primary", secondary=c.uri())
    in_sync(b)
    b.execute("replication-checkpoint")
    third, address = c.socket_path, b.socket_path
    b.kill()
    c.failover()
    c.wait_stage("done")
    a.start()
    if written:
        write(a, disk_name(0), MINE)
    address.unlink(missing_ok=True)
    address.symlink_to(third)
    if written:
        wait_until(lambda: split(a) and split(c), "both say so")
        assert c.status()["node"] in a.status()["split-brain"]["reason"]
        assert (outdated(a), outdated(c)) == (None, None)
    else:
        wait_until(lambda: outdated(a) == "peer-promoted", "it has learnt of it")
        assert (outdated(c), split(a), split(c)) == (None, None, None)


def test_half_a_copy_that_was_promoted_by_force_outdates_nobody(lab: Lab) -> None:
    """It comes from nothing that anybody knows, and the primary has all."""
    pair = lab.pair([4 * MIB], contents=[b"x" * 4 * MIB], primary_arguments=["resync-rate=64K"])
    a, b = pair.primary, pair.secondary
    b.start_replication()
    a.execute("replication-start", sync="full")
    wait_until(lambda: b.status()["link"]["state"] == "synchronizing", "the copy has begun")
    b.execute("replication-stop", failover=True, force=True)
    wait_until(lambda: link_code(a) == "not-secondary", "the two have met")
    wait_until(lambda: "nobody's secondary" in a.status()["link"]["reason"], "and have said what they come from")
    assert (outdated(a), split(a), a.status()["guest-suspended"]) == (None, None, None)
    write(a, disk_name(0), MINE)


def test_what_its_guest_writes_by_the_operators_choice_after_it_was_outdated(lab: Lab) -> None:
    """It stays outdated, and says besides that both have gone on."""
    pair = lab.pair([MIB], primary_arguments=["on-outdated=continue"])
    pair.start_replication()
    pair.primary.checkpoint()
    pair.secondary.failover()
    wait_until(lambda: outdated(pair.primary), "the link has learnt of it", DEADLINE_S)
    write(pair.primary, disk_name(0), MINE)
    wait_until(lambda: split(pair.primary) and split(pair.secondary), "both say so")
    assert outdated(pair.primary) == "peer-promoted"


def test_a_start_in_a_split_brain_changes_nothing(lab: Lab) -> None:
    """Whoever is started, and whatever it is told to send."""
    a, b = peers(lab)
    a.execute("replication-stop")
    b.failover()
    b.wait_stage("done")
    for server, data in ((a, MINE), (b, THEIRS)):
        write(server, top_id(0), data)
    before = [server.disks[0].read_bytes() for server in (a, b)]
    for sync in ("auto", "full"):
        for server, other in ((a, b), (b, a)):
            refused(server, "replication-start", {"mode": "primary", "secondary": other.uri(), "sync": sync})
    assert [server.disks[0].read_bytes() for server in (a, b)] == before
    assert (outdated(a), outdated(b)) == (None, None)
    assert (split(a), split(b)) == ("split-brain",) * 2
