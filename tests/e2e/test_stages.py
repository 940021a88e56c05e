# SPDX-License-Identifier: BSD-3-Clause
"""What every face does in every stage, and which exports there are.

Every request that is refused is sent on a handle that is used before and after it: a refusal never drops the
connection and never changes anything.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import nbd
import pytest

from content import KIB, MIB, pattern
from endpoints import DelayedEndpoint
from lab import Lab
from nodes import Pair, Primary, Secondary, Server, drained, nbd_refusal
from qmp import Qmp
from waiting import wait_until

BLOCK = 4 * KIB
OLD = pattern(1, MIB)
"""What both disks hold before anything is replicated."""

NEW = pattern(2, BLOCK)
OWN = pattern(3, BLOCK)

Request = Callable[[nbd.NBD], Any]

READING: dict[str, Request] = {
    "read": lambda handle: handle.pread(512, 100),
    "cache": lambda handle: handle.cache(BLOCK, 0),
    "extents": lambda handle: handle.block_status(MIB, 0, lambda *_: 0),
}
WRITING: dict[str, Request] = {
    "write": lambda handle: handle.pwrite(NEW, 0),
    "unaligned write": lambda handle: handle.pwrite(NEW[:700], 4000),
    "write with FUA": lambda handle: handle.pwrite(NEW, 0, nbd.CMD_FLAG_FUA),
    "zero": lambda handle: handle.zero(BLOCK, 0),
    "trim": lambda handle: handle.trim(BLOCK, 0),
}
FLUSHING: dict[str, Request] = {"flush": lambda handle: handle.flush()}


def refuse_all(handle: nbd.NBD, requests: dict[str, Request], number: int) -> None:
    """Every request is refused with errno `number`, and the connection goes on."""
    for name, request in requests.items():
        try:
            with nbd_refusal(number):
                request(handle)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert handle.aio_is_ready(), f"the connection is gone after {name}"


def whole(handle: nbd.NBD) -> bytes:
    """All that a face shows."""
    return bytes(handle.pread(handle.get_size(), 0))


def changed(content: bytes, *writes: tuple[int, bytes]) -> bytes:
    """`content` with writes (offset, data) in it."""
    result = bytearray(content)
    for offset, data in writes:
        result[offset : offset + len(data)] = data
    return bytes(result)


def held_bytes(server: Server) -> tuple[int, int]:
    """(active, hidden) bytes of the first disk of a secondary."""
    disk = server.status()["disks"][0]
    return disk["active-bytes"], disk["hidden-bytes"]


def out_of_sync(server: Server) -> int:
    """Bytes of the first disk of a primary that the secondary may lack."""
    size: int = server.status()["disks"][0]["out-of-sync-bytes"]
    return size


@pytest.fixture
def secondary(lab: Lab) -> Secondary:
    """In stage none, with the content OLD."""
    server: Secondary = lab.secondary(contents=(OLD,))
    return server


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """In stage none on both sides, with the content OLD."""
    return lab.pair(contents=(OLD,))


class Failing:
    """A secondary whose disk is behind an endpoint that can be made to refuse writes."""

    def __init__(self, lab: Lab) -> None:
        self.path = lab.folder / "behind.raw"
        self.path.write_bytes(OLD)
        self.endpoint: DelayedEndpoint = lab.endpoint(path=self.path, error={"pwrite": "EIO"})
        state = lab.folder / "behind.state"
        arguments = ["mode=secondary", f"state={state}", f"disk=disk0:{self.endpoint.uri()}", "top-id=top0"]
        self.server = lab.start(Server(lab.folder, "behind", arguments))
        self.server.execute("xen-set-replication", enable=True, primary=False)

    def fail_over(self) -> None:
        """To stage failover-failed; the endpoint works again afterwards."""
        self.endpoint.fail()
        self.server.execute("xen-set-replication", enable=False, primary=False, failover=True)
        self.server.wait_stage("failover-failed")
        self.endpoint.work()


# -- secondary, guest face ---------------------------------------------------------------------------------------


def test_before_start_the_guest_face_refuses_everything_with_eio_and_the_connection_goes_on(
    secondary: Secondary,
) -> None:
    guest = secondary.connect("top0")
    before = secondary.status()
    refuse_all(guest, READING | WRITING | FLUSHING, errno.EIO)
    assert secondary.status() == before
    assert secondary.disks[0].read_bytes() == OLD
    secondary.start_replication()
    assert whole(guest) == OLD


def test_while_running_the_guest_writes_into_active_and_the_secondary_disk_stays_as_it_is(
    secondary: Secondary,
) -> None:
    guest = secondary.connect("top0")
    secondary.start_replication()
    guest.pwrite(OWN, BLOCK)
    guest.zero(BLOCK, 3 * BLOCK)
    guest.flush()
    expected = changed(OLD, (BLOCK, OWN), (3 * BLOCK, bytes(BLOCK)))
    assert whole(guest) == expected
    assert secondary.disks[0].read_bytes() == OLD
    assert held_bytes(secondary) == (2 * BLOCK, 0)


def test_while_running_the_guest_reads_active_before_hidden_before_the_secondary_disk(secondary: Secondary) -> None:
    guest, target = secondary.connect("top0"), secondary.connect("disk0")
    secondary.start_replication()
    target.pwrite(NEW + NEW, 0)
    guest.pwrite(OWN, BLOCK)
    # Block 0 out of hidden, block 1 out of active (hidden has it, too), the rest from the disk.
    assert held_bytes(secondary) == (BLOCK, 2 * BLOCK)
    assert whole(guest) == changed(OLD, (BLOCK, OWN))


def hold_in_failover(lab: Lab) -> tuple[Any, Secondary, Qmp]:
    """A secondary with writes from both sides, held in stage failover before its commit has begun."""
    points = lab.pause_points()
    server: Secondary = lab.secondary(contents=(OLD,), extra_environment=points.environment)
    server.start_replication()
    server.connect("disk0").pwrite(NEW, 0)
    server.connect("top0").pwrite(OWN, BLOCK)
    points.arm("failover.entered")
    command = server.qmp()
    command.send(
        b'{"execute": "xen-set-replication", "arguments": {"enable": false, "primary": false, "failover": true}}\n'
    )
    points.wait_hit("failover.entered")
    return points, server, command


def test_during_failover_the_guest_face_works_as_before_and_keeps_what_it_wrote_meanwhile(lab: Lab) -> None:
    points, server, command = hold_in_failover(lab)
    with command:
        guest = server.connect("top0")
        assert server.status()["stage"] == "failover"
        expected = changed(OLD, (BLOCK, OWN))
        assert whole(guest) == expected
        for offset in (0, BLOCK, 2 * BLOCK):  # held by hidden, by active, by neither
            guest.pwrite(NEW[:1000], offset + 10)
            expected = changed(expected, (offset + 10, NEW[:1000]))
        guest.zero(BLOCK, 5 * BLOCK)
        guest.trim(BLOCK, 6 * BLOCK)
        guest.flush()
        expected = changed(expected, (5 * BLOCK, bytes(2 * BLOCK)))
        assert whole(guest) == expected
        points.release("failover.entered")
        server.wait_stage("done")
        assert whole(guest) == expected
        assert server.disks[0].read_bytes() == expected


def test_during_a_commit_the_guest_reads_and_writes_without_an_error(lab: Lab) -> None:
    points = lab.pause_points()
    server: Secondary = lab.secondary(contents=(OLD,), extra_environment=points.environment)
    server.start_replication()
    server.connect("disk0").pwrite(NEW, 0)
    guest = server.connect("top0")
    guest.pwrite(OWN, MIB - BLOCK)
    expected = changed(OLD, (MIB - BLOCK, OWN))
    points.arm("commit.written")
    server.execute("xen-set-replication", enable=False, primary=False, failover=True)
    points.wait_hit("commit.written")
    # The commit holds the first cluster: reads of it do not wait, writes elsewhere do not either.
    assert whole(guest) == expected
    guest.pwrite(OWN, 512 * KIB)
    expected = changed(expected, (512 * KIB, OWN))
    assert server.status()["stage"] == "failover"
    points.release("commit.written")
    server.wait_stage("done")
    assert whole(guest) == server.disks[0].read_bytes() == expected


def test_after_a_failed_commit_the_guest_writes_to_active_what_the_overlays_hold_and_the_rest_to_the_disk(
    lab: Lab,
) -> None:
    failing = Failing(lab)
    guest, target = failing.server.connect("top0"), failing.server.connect("disk0")
    target.pwrite(NEW, 0)
    guest.pwrite(OWN, BLOCK)
    failing.fail_over()
    below = changed(OLD, (0, NEW))
    assert whole(guest) == changed(OLD, (BLOCK, OWN))
    assert failing.path.read_bytes() == below
    third, fourth, fifth = (pattern(seed, BLOCK) for seed in (4, 5, 6))
    guest.pwrite(third, 0)  # hidden holds it
    guest.pwrite(fourth, BLOCK)  # active holds it
    guest.pwrite(fifth, 2 * BLOCK)  # neither
    assert failing.path.read_bytes() == changed(below, (2 * BLOCK, fifth))
    assert whole(guest) == changed(OLD, (0, third), (BLOCK, fourth), (2 * BLOCK, fifth))
    assert held_bytes(failing.server) == (2 * BLOCK, BLOCK)


def test_one_guest_write_over_held_and_free_blocks_is_split_after_a_failed_commit(lab: Lab) -> None:
    failing = Failing(lab)
    guest = failing.server.connect("top0")
    guest.pwrite(OWN, BLOCK)
    failing.fail_over()
    data = pattern(7, 3 * BLOCK - 200)
    guest.pwrite(data, 100)
    assert whole(guest) == changed(OLD, (BLOCK, OWN), (100, data))
    on_disk = failing.path.read_bytes()
    assert on_disk[:BLOCK] == changed(OLD, (100, data))[:BLOCK]
    assert on_disk[BLOCK : 2 * BLOCK] == OLD[BLOCK : 2 * BLOCK]
    assert on_disk[2 * BLOCK :] == changed(OLD, (100, data))[2 * BLOCK :]


def test_once_done_the_guest_uses_the_secondary_disk_directly(secondary: Secondary) -> None:
    guest = secondary.connect("top0")
    secondary.start_replication()
    guest.pwrite(OWN, 0)
    secondary.failover()
    assert secondary.disks[0].read_bytes() == whole(guest) == changed(OLD, (0, OWN))
    guest.pwrite(NEW, BLOCK)
    guest.zero(BLOCK, 2 * BLOCK)
    expected = changed(OLD, (0, OWN), (BLOCK, NEW), (2 * BLOCK, bytes(BLOCK)))
    assert secondary.disks[0].read_bytes() == whole(guest) == expected
    assert held_bytes(secondary) == (0, 0)


# -- secondary, target face --------------------------------------------------------------------------------------


def test_before_start_the_target_face_reads_and_writes_the_secondary_disk(secondary: Secondary) -> None:
    target = secondary.connect("disk0")
    assert whole(target) == OLD
    target.pwrite(NEW, 0)
    target.zero(BLOCK, BLOCK)
    target.flush()
    expected = changed(OLD, (0, NEW), (BLOCK, bytes(BLOCK)))
    assert secondary.disks[0].read_bytes() == whole(target) == expected
    assert held_bytes(secondary) == (0, 0)
    secondary.start_replication()
    assert whole(secondary.connect("top0")) == expected


def test_while_running_a_target_write_saves_the_old_block_in_hidden_and_goes_through(secondary: Secondary) -> None:
    guest, target = secondary.connect("top0"), secondary.connect("disk0")
    secondary.start_replication()
    target.pwrite(NEW[:100], BLOCK + 50)
    target.zero(BLOCK, 3 * BLOCK)
    target.trim(BLOCK, 5 * BLOCK)
    expected = changed(OLD, (BLOCK + 50, NEW[:100]), (3 * BLOCK, bytes(BLOCK)), (5 * BLOCK, bytes(BLOCK)))
    assert secondary.disks[0].read_bytes() == whole(target) == expected
    assert whole(guest) == OLD
    assert held_bytes(secondary) == (0, 3 * BLOCK)


def test_from_failover_on_the_target_face_refuses_everything_also_on_connections_made_before(lab: Lab) -> None:
    points = lab.pause_points()
    server: Secondary = lab.secondary(contents=(OLD,), extra_environment=points.environment)
    server.start_replication()
    target = server.connect("disk0")
    target.pwrite(NEW, 8 * BLOCK)
    points.arm("failover.entered")
    with server.qmp() as command:
        command.send(b'{"execute": "x-colo-lost-heartbeat"}\n')
        points.wait_hit("failover.entered")
        assert server.status()["stage"] == "failover"
        refuse_all(target, READING | WRITING | FLUSHING, errno.ESHUTDOWN)
        points.release("failover.entered")
        server.wait_stage("done")
    assert server.disks[0].read_bytes() == OLD
    refuse_all(target, READING | WRITING | FLUSHING, errno.ESHUTDOWN)
    refuse_all(server.connect("disk0"), READING | WRITING | FLUSHING, errno.ESHUTDOWN)
    assert server.disks[0].read_bytes() == OLD


def test_after_a_failed_commit_the_target_face_refuses_everything(lab: Lab) -> None:
    failing = Failing(lab)
    failing.server.connect("top0").pwrite(OWN, 0)
    target = failing.server.connect("disk0")
    failing.fail_over()
    refuse_all(target, READING | WRITING | FLUSHING, errno.ESHUTDOWN)
    assert failing.path.read_bytes() == OLD


# -- primary -----------------------------------------------------------------------------------------------------


def test_a_primary_that_is_not_started_works_locally_and_remembers_what_changed(pair: Pair) -> None:
    disk = pair.primary.connect("disk0")
    disk.pwrite(NEW, 0)
    disk.zero(BLOCK, 200 * KIB)
    disk.flush()
    expected = changed(OLD, (0, NEW), (200 * KIB, bytes(BLOCK)))
    assert pair.primary.disks[0].read_bytes() == whole(disk) == expected
    assert pair.secondary.disks[0].read_bytes() == OLD
    assert out_of_sync(pair.primary) == 2 * 64 * KIB


def test_a_running_primary_reads_locally_and_writes_to_both_disks(pair: Pair) -> None:
    disk = pair.primary.connect("disk0")
    pair.start_replication()
    disk.pwrite(NEW, 0)
    disk.pwrite(OWN[:10], 5)
    disk.zero(BLOCK, 2 * BLOCK)
    disk.trim(BLOCK, 4 * BLOCK)
    expected = changed(OLD, (0, NEW), (5, OWN[:10]), (2 * BLOCK, bytes(BLOCK)), (4 * BLOCK, bytes(BLOCK)))
    assert pair.primary.disks[0].read_bytes() == whole(disk) == expected
    drained(pair.primary)
    assert pair.secondary.disks[0].read_bytes() == expected
    assert whole(pair.secondary.connect("top0")) == OLD
    assert out_of_sync(pair.primary) == 0


def test_a_stopped_primary_works_locally_and_remembers_what_changed(pair: Pair) -> None:
    disk = pair.primary.connect("disk0")
    pair.start_replication()
    disk.pwrite(NEW, 0)
    pair.primary.execute("replication-stop")
    assert pair.primary.status()["stage"] == "done"
    assert out_of_sync(pair.primary) == 0
    disk.pwrite(OWN, 64 * KIB)
    assert pair.primary.disks[0].read_bytes() == whole(disk) == changed(OLD, (0, NEW), (64 * KIB, OWN))
    assert pair.secondary.disks[0].read_bytes() == changed(OLD, (0, NEW))
    assert out_of_sync(pair.primary) == 64 * KIB


def test_a_sync_primary_answers_when_both_disks_have_the_write(lab: Lab) -> None:
    pair: Pair = lab.pair(contents=(OLD,), primary_arguments=["protocol=sync"])
    pair.start_replication()
    disk = pair.primary.connect("disk0")
    disk.pwrite(NEW, 123)
    assert pair.secondary.disks[0].read_bytes() == pair.primary.disks[0].read_bytes() == changed(OLD, (123, NEW))


@pytest.fixture
def forwarding(lab: Lab) -> tuple[Secondary, Primary]:
    """A secondary, and a primary without a disk of its own."""
    server: Secondary = lab.secondary(contents=(OLD,))
    return server, lab.primary(server.uri("disk0"), ())


def test_a_primary_without_a_disk_refuses_everything_before_start_and_after_stop(
    forwarding: tuple[Secondary, Primary],
) -> None:
    secondary, primary = forwarding
    handle = primary.connect("disk0")
    refuse_all(handle, READING | WRITING | FLUSHING, errno.EIO)
    secondary.start_replication()
    primary.start_replication()
    handle.pwrite(NEW, 0)
    primary.execute("replication-stop")
    refuse_all(handle, READING | WRITING | FLUSHING, errno.EIO)
    assert secondary.disks[0].read_bytes() == changed(OLD, (0, NEW))


def test_a_running_primary_without_a_disk_forwards_writes_and_refuses_reads(
    forwarding: tuple[Secondary, Primary],
) -> None:
    secondary, primary = forwarding
    handle = primary.connect("disk0")
    secondary.start_replication()
    primary.start_replication()
    refuse_all(handle, {name: READING[name] for name in ("read", "cache")}, errno.EIO)
    handle.pwrite(NEW, 77)
    handle.zero(BLOCK, 3 * BLOCK)
    handle.flush()
    primary.checkpoint()
    assert secondary.disks[0].read_bytes() == changed(OLD, (77, NEW), (3 * BLOCK, bytes(BLOCK)))
    refuse_all(handle, {name: READING[name] for name in ("read", "cache")}, errno.EIO)


def test_a_primary_without_a_disk_has_the_size_of_the_secondarys_also_when_it_was_started_first(
    forwarding: tuple[Secondary, Primary],
) -> None:
    """What it asks then is an export of the pair's own, which is larger (batch.py)."""
    secondary, primary = forwarding
    secondary.start_replication()
    primary.start_replication()
    assert primary.connect("disk0").get_size() == MIB
    primary.kill()
    primary.start()
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the link comes back")
    handle = primary.connect("disk0")
    handle.pwrite(NEW, MIB - BLOCK)
    primary.checkpoint()
    assert secondary.disks[0].read_bytes() == changed(OLD, (MIB - BLOCK, NEW))


# -- the way to done ---------------------------------------------------------------------------------------------


def test_a_planned_stop_drops_the_buffers_and_the_guest_face_shows_what_the_primary_wrote(secondary: Secondary) -> None:
    guest, target = secondary.connect("top0"), secondary.connect("disk0")
    secondary.start_replication()
    target.pwrite(NEW, 0)
    guest.pwrite(OWN, 0)
    guest.pwrite(OWN, BLOCK)
    secondary.execute("xen-set-replication", enable=False, primary=False)
    status = secondary.status()
    assert (status["stage"], status["error"]) == ("done", None)
    assert held_bytes(secondary) == (0, 0)
    assert secondary.disks[0].read_bytes() == whole(guest) == changed(OLD, (0, NEW))
    guest.pwrite(OWN, BLOCK)
    assert secondary.disks[0].read_bytes() == whole(guest) == changed(OLD, (0, NEW), (BLOCK, OWN))
    refuse_all(target, READING | WRITING | FLUSHING, errno.ESHUTDOWN)


def test_failover_without_a_guest_on_the_secondary_is_the_last_checkpoint(secondary: Secondary) -> None:
    target = secondary.connect("disk0")
    secondary.start_replication()
    target.pwrite(NEW, 0)
    secondary.checkpoint()
    target.pwrite(OWN, 0)
    target.zero(BLOCK, BLOCK)
    secondary.failover()
    assert secondary.disks[0].read_bytes() == changed(OLD, (0, NEW))


def test_failover_with_a_guest_is_the_last_checkpoint_plus_its_writes(secondary: Secondary) -> None:
    guest, target = secondary.connect("top0"), secondary.connect("disk0")
    secondary.start_replication()
    guest.pwrite(OWN, 5 * BLOCK)
    target.pwrite(NEW, 0)
    secondary.checkpoint()  # drops the guest's first write
    target.pwrite(OWN, 0)
    guest.pwrite(OWN[:512], BLOCK + 512)
    secondary.failover()
    assert secondary.disks[0].read_bytes() == changed(OLD, (0, NEW), (BLOCK + 512, OWN[:512]))


def test_an_old_primary_that_goes_on_after_failover_keeps_its_guest_and_learns_of_the_fence(lab: Lab) -> None:
    pair = lab.pair(contents=(OLD,), primary_arguments=["on-outdated=continue"])
    disk = pair.primary.connect("disk0")
    pair.start_replication()
    disk.pwrite(NEW, 0)
    pair.primary.checkpoint()
    pair.secondary.failover()
    disk.pwrite(OWN, BLOCK)  # the guest is never told
    wait_until(lambda: pair.primary.status()["error"], "the primary knows")
    assert whole(disk) == changed(OLD, (0, NEW), (BLOCK, OWN))
    assert pair.secondary.disks[0].read_bytes() == changed(OLD, (0, NEW))
    assert out_of_sync(pair.primary) == 64 * KIB
    error = pair.primary.status()["error"]
    if error["case"] == 8:  # it has looked after its secondary before the guest's write came there
        assert "has become a secondary in stage" in error["desc"] or "no session of this primary" in error["desc"]
    else:
        assert (error["case"], error["offset"], error["length"], error["errno"]) == (2, BLOCK, BLOCK, "ESHUTDOWN")


# -- exports -----------------------------------------------------------------------------------------------------


def exports_of(server: Server) -> list[str]:
    """The names that NBD_OPT_LIST gives."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(server.uri())
    names: list[str] = []
    handle.opt_list(lambda name, _description: names.append(name) or 0)
    handle.opt_abort()
    return names


def test_the_exports_are_the_names_of_the_disks_and_on_a_secondary_the_top_ids(lab: Lab) -> None:
    pair: Pair = lab.pair((MIB, 300 * KIB))
    assert exports_of(pair.primary) == ["disk0", "disk1"]
    assert exports_of(pair.secondary) == ["disk0", "top0", "disk1", "top1"]
    sizes = [pair.secondary.connect(name).get_size() for name in ("disk0", "top0", "disk1", "top1")]
    assert sizes == [MIB, MIB, 300 * KIB, 300 * KIB]


def test_the_empty_export_name_is_the_first_disk_of_a_primary(lab: Lab) -> None:
    pair: Pair = lab.pair((MIB, 300 * KIB), contents=(OLD, OWN))
    handle = pair.primary.connect("")
    assert handle.get_size() == MIB
    assert whole(handle) == OLD


def test_the_empty_export_name_is_refused_on_a_secondary_with_the_valid_ones(secondary: Secondary) -> None:
    for name in ("", "disk1", ".control2", "top0 "):
        handle = nbd.NBD()
        handle.set_export_name(name)
        with pytest.raises(nbd.Error):
            handle.connect_unix(str(secondary.socket_path))
    wait_until(lambda: "there is no export ''" in secondary.stderr(), "nbdkit says why")
    wait_until(lambda: "'disk0', 'top0'" in secondary.stderr(), "nbdkit names them")
    assert secondary.connect("disk0").get_size() == MIB


def test_a_primary_without_a_disk_has_the_secondarys_export_size_and_all(lab: Lab) -> None:
    server: Secondary = lab.secondary((300 * KIB + 77,))
    primary: Primary = lab.primary(server.uri("disk0"), ())
    assert exports_of(primary) == ["disk0"]
    assert primary.connect("disk0").get_size() == 300 * KIB + 77
    assert primary.connect("").get_size() == 300 * KIB + 77


def test_every_face_offers_flush_fua_trim_zero_extents_cache_and_multi_conn_at_any_alignment(pair: Pair) -> None:
    for server, name in ((pair.secondary, "disk0"), (pair.secondary, "top0"), (pair.primary, "disk0")):
        handle = server.connect(name)
        offered = {
            "flush": handle.can_flush(),
            "fua": handle.can_fua(),
            "trim": handle.can_trim(),
            "zero": handle.can_zero(),
            "extents": handle.can_meta_context("base:allocation"),
            "cache": handle.can_cache(),
            "multi-conn": handle.can_multi_conn(),
            "write": not handle.is_read_only(),
        }
        assert offered == dict.fromkeys(offered, True), name
        assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
        assert handle.get_block_size(nbd.SIZE_PREFERRED) == 4096


def test_extents_of_the_guest_face_tell_zeroes_from_data(lab: Lab) -> None:
    server: Secondary = lab.secondary(contents=(OLD[: 128 * KIB],))
    server.start_replication()
    guest = server.connect("top0")
    guest.zero(64 * KIB, 0)
    guest.pwrite(NEW, 512 * KIB)
    offsets = (0, 32 * KIB, 64 * KIB, 100 * KIB, 256 * KIB, 512 * KIB, 520 * KIB)
    assert [_zero_at(guest, at) for at in offsets] == [True, True, False, False, True, False, True]


def _zero_at(handle: nbd.NBD, offset: int) -> bool:
    """Whether block status says that the block at `offset` reads as zeroes."""
    flags: list[int] = []

    def collect(_context: str, _offset: int, entries: list[int], _error: object) -> int:
        flags.append(entries[1])
        return 0

    handle.block_status(BLOCK, offset, collect)
    return bool(flags[0] & nbd.STATE_ZERO)


def test_requests_beyond_the_end_are_refused_and_the_connection_goes_on(pair: Pair) -> None:
    pair.start_replication()
    for server, name in ((pair.secondary, "disk0"), (pair.secondary, "top0"), (pair.primary, "disk0")):
        handle = server.connect(name, strict=False)
        refuse_all(handle, {"read": lambda handle: handle.pread(BLOCK, MIB - 512)}, errno.EINVAL)
        # ENOSPC, where something would change, is what the NBD specification asks for.
        beyond: dict[str, Request] = {
            "zero": lambda handle: handle.zero(BLOCK, MIB),
            "write": lambda handle: handle.pwrite(NEW, MIB - 512),
        }
        refuse_all(handle, beyond, errno.ENOSPC)
        assert whole(handle) == OLD
    assert pair.secondary.disks[0].read_bytes() == OLD
