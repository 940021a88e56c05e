# SPDX-License-Identifier: BSD-3-Clause
"""Who owns the disks, with real processes: roles, lineage and the codes of reasons, over a failover and back."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import nbd
import pytest

from content import MIB
from lab import Lab
from nbdprocess import stop_still
from nodes import Pair, Primary, Secondary, Server, code_of, disk_name, drained, nbd_refusal, refused, top_id
from standing import completed, restarted_alone, stands
from twins import Twins
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
    assert code_of(pair.secondary, "replication-stop", failover=True, no_primary=True) == "has-primary"
    assert pair.secondary.execute("query-failover")["primary"] == pair.primary.status()["node"]
    preflight = pair.secondary.execute("query-failover")
    assert (preflight["in-sync"], preflight["primary-left-well"], preflight["lossless"]) == (True, False, False)
    pair.primary.terminate()
    preflight = pair.secondary.execute("query-failover")
    assert (preflight["in-sync"], preflight["primary-left-well"], preflight["lossless"]) == (True, True, True)
    assert code_of(pair.secondary, "replication-stop", failover=True, max_age=0) == "too-old"
    assert preflight["primary"] is None
    pair.secondary.execute("replication-stop", failover=True, only_in_sync=True, lossless=True, no_primary=True)
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
    # A moment later its guest goes on, too.
    wait_until(lambda: role(pair.primary)["may-run"] is True, "its guest may run")


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


# -- standing still --------------------------------------------------------------------------------------------


def gone_on(lab: Lab, *arguments: str) -> Pair:
    """A pair whose secondary has failed over, and whose primary has learnt it."""
    pair = lab.pair([MIB], primary_arguments=arguments)
    in_sync(pair)
    with pair.primary.qmp() as qmp:
        pair.secondary.failover()
        qmp.wait_event("REPLICATION_OUTDATED")
    return pair


def test_the_guest_of_an_outdated_owner_waits_over_restarts(lab: Lab) -> None:
    pair = gone_on(lab, "on-outdated=suspend-io")
    before = pair.primary.disks[0].read_bytes()
    pair.secondary.terminate()
    pair.primary.terminate(timeout_s=DEADLINE_S)
    pair.primary.start()
    assert "outdated" in pair.primary.status()["guest-suspended"]
    handle = pair.primary.connect(disk_name(0))
    data, space = nbd.Buffer.from_bytearray(b"x" * 512), nbd.Buffer(512)
    write, read = handle.aio_pwrite(data, 0), handle.aio_pread(space, 0)
    stands(pair.primary, handle, write, read)
    pair.primary.execute("replication-stop")  # no command waits for the guest
    assert pair.primary.disks[0].read_bytes() == before
    stands(pair.primary, handle, write, read)
    pair.primary.execute("replication-resume-io")
    completed(handle, write, read)
    assert pair.primary.disks[0].read_bytes()[:512] == b"x" * 512
    assert pair.primary.status()["guest-suspended"] is None
    assert role(pair.primary)["code"] == "outdated"


def test_a_guest_that_waits_does_not_keep_the_process(lab: Lab) -> None:
    """nbdkit waits for requests. They are not answered with an error, which would be one of the guest's disk."""
    pair = gone_on(lab, "on-outdated=suspend-io")
    guests = [pair.primary.connect(disk_name(0)) for _ in range(3)]
    data, space = nbd.Buffer.from_bytearray(b"x" * 512), nbd.Buffer(512)
    cookies = [(guest.aio_pwrite(data, 0), guest.aio_pread(space, 0), guest.aio_flush()) for guest in guests]
    stands(pair.primary, guests[0], *cookies[0])
    pair.primary.terminate()
    assert "something did not end" not in pair.primary.stderr()
    for guest, of_guest in zip(guests, cookies, strict=True):
        assert lost(guest, of_guest) == {errno.ENOTCONN}


def lost(guest: nbd.NBD, cookies: Sequence[int]) -> set[int]:
    """What these requests have met at the end of their connection: ENOTCONN is libnbd's, other numbers the server's."""
    with suppress(nbd.Error):
        while guest.aio_in_flight():
            guest.poll(1000)
    found = set()
    for cookie in cookies:
        with pytest.raises(nbd.Error) as raised:
            guest.aio_command_completed(cookie)
        found.add(raised.value.errnum)
    return found


def test_the_guest_of_an_outdated_owner_gets_errors(lab: Lab) -> None:
    pair = gone_on(lab, "on-outdated=io-error")
    guest = pair.primary.connect(disk_name(0))
    with nbd_refusal(errno.EIO):
        guest.pwrite(b"x" * 512, 0)
    with nbd_refusal(errno.EIO):
        guest.pread(512, 0)


def test_the_guest_of_an_outdated_owner_may_go_on(lab: Lab) -> None:
    pair = gone_on(lab, "on-outdated=continue")
    pair.primary.connect(disk_name(0)).pwrite(b"x" * 512, 0)
    assert pair.primary.status()["guest-suspended"] is None


def test_by_default_it_waits_until_somebody_insists(lab: Lab) -> None:
    pair = gone_on(lab)
    guest = pair.primary.connect(disk_name(0))
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"x" * 512), 0)
    stands(pair.primary, guest, write)
    assert code_of(pair.primary, "replication-set-role", role="primary") == "outdated"
    stands(pair.primary, guest, write)
    pair.primary.execute("replication-set-role", role="primary", force=True)
    completed(guest, write)
    assert role(pair.primary)["role"] == "primary"


def test_what_a_guest_asked_for_that_has_gone_is_not_done(lab: Lab) -> None:
    """It was killed while it stood still; the next one has the disk when it goes on."""
    pair = gone_on(lab)
    before = pair.primary.disks[0].read_bytes()
    former = pair.primary.connect(disk_name(0))
    write = former.aio_pwrite(nbd.Buffer.from_bytearray(b"old" * 512), 0)
    stands(pair.primary, former, write)
    with socket.socket(fileno=os.dup(former.aio_get_fd())) as of_former:
        of_former.shutdown(socket.SHUT_RDWR)
    guest = pair.primary.connect(disk_name(0))
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"x" * 512), 4096)
    stands(pair.primary, guest, write)
    pair.primary.execute("replication-resume-io")
    completed(guest, write)
    # Its request comes to its end before the server has none under way.
    latency = "query-replication-latency"
    wait_until(lambda: not pair.primary.execute(latency)["longest-stall"]["under-way"], "the former one's has ended")
    after = pair.primary.disks[0].read_bytes()
    assert after == before[:4096] + b"x" * 512 + before[4608:]


@pytest.mark.parametrize("option", ["on-outdated=suspend-io", "fencing=suspend-io"])
def test_what_a_guest_waits_for_is_not_done_by_a_secondary(lab: Lab, option: str) -> None:
    """It is not the disk that the guest wrote to any more. Nor is it done while its node stops to become one."""
    twins = Twins(lab, option)
    a, b = twins.a, twins.b
    set_role(a, "primary")
    guest = a.connect(top_id(0))
    guest.pwrite(b"1" * 512, 0)
    twins.joined(a)
    if "fencing" in option:
        b.kill()
    else:
        b.failover()
    wait_until(lambda: a.status()["guest-suspended"], "the guest stands still")
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 0)
    stands(a, guest, write)
    a.execute("replication-set-role", role="secondary")
    with pytest.raises(nbd.Error) as raised:
        completed(guest, write)
    assert raised.value.errnum == errno.EIO
    status = a.status()
    assert (status["mode"], status["stage"], status["guest-suspended"]) == ("secondary", "running", None)
    assert status["disks"][0]["active-bytes"] == 0
    assert a.disks[0].read_bytes()[:512] == b"1" * 512


def test_a_primary_that_starts_again_waits_for_its_peer(lab: Lab) -> None:
    pair = lab.pair([MIB], primary_arguments=["wfc-timeout=1000"])
    in_sync(pair)
    assert pair.primary.status()["guest-suspended"] is None, "it was not started again"
    pair.secondary.kill()
    pair.primary.kill()
    pair.primary.start()
    assert "wfc-timeout" in pair.primary.status()["guest-suspended"]
    assert pair.primary.status()["guest-suspended-reason"]["code"] == "wfc-timeout"
    assert role(pair.primary)["code"] == "suspended"
    guest = pair.primary.connect(disk_name(0))
    data = nbd.Buffer.from_bytearray(b"x" * 512)
    write = guest.aio_pwrite(data, 0)
    stands(pair.primary, guest, write)
    pair.secondary.start()
    completed(guest, write)
    assert pair.primary.status()["guest-suspended"] is None


def test_the_wait_for_the_peer_ends_by_time_and_by_force(lab: Lab) -> None:
    pair = lab.pair([MIB], primary_arguments=["wfc-timeout=1000"])
    in_sync(pair)
    pair.secondary.kill()
    pair.primary.kill()
    pair.primary.start()
    assert code_of(pair.primary, "replication-start") == "wrong-stage"
    pair.primary.execute("replication-start", force=True)
    pair.primary.connect(disk_name(0)).pwrite(b"x" * 512, 0)
    pair.primary.kill()
    pair.primary.arguments[-1] = "wfc-timeout=0.1"
    pair.primary.start()
    pair.primary.connect(disk_name(0)).pwrite(b"x" * 512, 0)


def test_the_old_owner_restarted_after_a_failover_serves_nobody(lab: Lab) -> None:
    """It was killed before it could learn of it, came up as `primary, running`, and took its guest's writes."""
    pair = lab.pair([MIB], primary_arguments=["wfc-timeout=1000", "on-outdated=suspend-io"])
    in_sync(pair)
    pair.primary.kill()
    pair.secondary.failover()
    pair.secondary.kill()
    before = pair.primary.disks[0].read_bytes()
    pair.primary.start()
    guest = pair.primary.connect(disk_name(0))
    data = nbd.Buffer.from_bytearray(b"x" * 512)
    write = guest.aio_pwrite(data, 0)
    stands(pair.primary, guest, write)
    pair.secondary.start()
    wait_until(lambda: pair.primary.status()["outdated-reason"], "it has reached the new owner")
    stands(pair.primary, guest, write)
    assert pair.primary.disks[0].read_bytes() == before


# -- fencing ---------------------------------------------------------------------------------------------------


def fenced(lab: Lab, *arguments: str) -> Pair:
    """A pair in sync whose primary waits for its peer's fencing when the link is lost."""
    pair = lab.pair([MIB], primary_arguments=["fencing=suspend-io", *arguments])
    in_sync(pair)
    return pair


def test_writes_wait_for_fencing_while_there_is_no_link(lab: Lab) -> None:
    pair = fenced(lab)
    guest = pair.primary.connect(disk_name(0))
    guest.pwrite(b"1" * 512, 0)
    with pair.primary.qmp() as qmp:
        pair.secondary.kill()
        assert qmp.wait_event("REPLICATION_GUEST")["data"]["code"] == "fencing"
    assert role(pair.primary)["guest-suspended-reason"]["code"] == "fencing"
    data = nbd.Buffer.from_bytearray(b"2" * 512)
    cookies = [guest.aio_pwrite(data, 0), guest.aio_flush(), guest.aio_zero(512, 4096), guest.aio_trim(512, 8192)]
    stands(pair.primary, guest, *cookies)
    assert role(pair.primary)["code"] == "suspended"
    reader = pair.primary.connect(disk_name(0))
    assert bytes(reader.pread(1, 0)) == b"1", "reads go on"
    pair.primary.execute("replication-resume-io")
    completed(guest, *cookies)
    pair.secondary.start()
    drained(pair.primary)
    assert pair.primary.status()["guest-suspended"] is None
    pair.primary.execute("replication-resume-io", fenced=True)
    pair.secondary.kill()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "lost", "the loss is noticed")
    assert pair.primary.status()["guest-suspended"] is None, "it was said before"
    guest.pwrite(b"3" * 512, 0)
    pair.secondary.start()
    drained(pair.primary)
    # The next loss is another one, and the link's return ends it without a word from anybody.
    pair.secondary.kill()
    wait_until(lambda: pair.primary.status()["guest-suspended"], "the loss is noticed")
    write = guest.aio_pwrite(data, 0)
    stands(pair.primary, guest, write)
    pair.secondary.start()
    completed(guest, write)


def test_a_write_that_waits_for_the_secondary_is_not_answered_without_it(lab: Lab) -> None:
    """With protocol=sync the guest goes on when the link is lost: with fencing it does so no sooner than it may."""
    pair = lab.pair([MIB], primary_arguments=["fencing=suspend-io", "protocol=sync"])
    in_sync(pair)
    guest = pair.primary.connect(disk_name(0))
    stop_still(pair.secondary)
    data = nbd.Buffer.from_bytearray(b"2" * 512)
    write = guest.aio_pwrite(data, 0)
    wait_until(lambda: pair.primary.disks[0].read_bytes()[:1] == b"2", "it is on the local disk")
    pair.secondary.kill()
    stands(pair.primary, guest, write)
    pair.primary.execute("replication-resume-io")
    completed(guest, write)


def test_a_stop_ends_the_wait_for_fencing_and_a_restart_does_not(lab: Lab) -> None:
    pair = fenced(lab)
    guest, write = restarted_alone(pair)
    pair.primary.execute("replication-stop")
    completed(guest, write)
    pair.primary.kill()
    pair.primary.start()
    assert pair.primary.status()["guest-suspended"] is None


# -- promote and demote ----------------------------------------------------------------------------------------


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
    wait_until(lambda: role(a)["peer-obstacle"] is None, "whoever looks for it has seen that it is there")


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
    wait_until(lambda: role(a)["peer-obstacle"] is None, "whoever looks for it has seen that it is there")


def test_a_primary_by_its_command_line_stays_one(lab: Lab) -> None:
    """It lacks the keys of a secondary, so a demotion is refused before anything has changed."""
    pair = lab.pair([MIB])
    in_sync(pair)
    pair.primary.execute("replication-set-role", role="primary")
    assert code_of(pair.primary, "replication-set-role", role="secondary") == "wrong-mode"
    assert pair.primary.status()["stage"] == "running"


def test_the_guest_face_is_closed_until_somebody_has_promoted_the_node(lab: Lab) -> None:
    twins = Twins(lab, "guest-face=closed-until-promoted")
    a = twins.a
    with pytest.raises(nbd.Error):
        a.connect(top_id(0))
    a.execute("replication-set-role", role="primary")
    guest = a.connect(top_id(0))
    guest.pwrite(b"x" * 512, 0)
    twins.joined(a)
    a.execute("replication-set-role", role="secondary")
    with nbd_refusal(errno.EIO):
        guest.pwrite(b"y" * 512, 0)
    with pytest.raises(nbd.Error):
        a.connect(top_id(0))
    a.execute("replication-set-role", role="primary", force=True)
    a.kill()
    a.start()
    assert role(a)["code"] == "not-promoted"
    with pytest.raises(nbd.Error):
        a.connect(top_id(0))
    a.execute("replication-set-role", role="primary")
    assert bytes(a.connect(top_id(0)).pread(1, 0)) == b"x"


def test_an_owner_that_finds_its_peer_by_itself_has_not_been_promoted(lab: Lab) -> None:
    """It was looking for it before it was started again: that is nobody's decision of now."""
    twins = Twins(lab, "guest-face=closed-until-promoted")
    a, b = twins.a, twins.b
    b.kill()
    a.execute("replication-set-role", role="primary")
    a.kill()
    a.start()
    b.start()
    twins.joined(a)
    assert role(a)["code"] == "not-promoted"
    with pytest.raises(nbd.Error):
        a.connect(top_id(0))
