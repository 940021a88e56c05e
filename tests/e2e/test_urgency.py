# SPDX-License-Identifier: BSD-3-Clause
"""A failover answers within two seconds, whatever the secondary's disk does, and whoever waits for it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import nbd
import pytest

from content import MIB, pattern
from heldendpoint import HeldEndpoint
from lab import Lab
from nodes import Server, nbd_refusal
from qmp import QmpError
from waiting import DEADLINE_S

ANSWER_S = 2.0
"""What is promised."""

BUSY_S = 4.0
"""What a busy machine needs beside that; what is held here is held for longer."""

BLOCK = 4096
BEFORE = pattern(1, MIB)
FIRST, SECOND, GUESTS = pattern(2, BLOCK), pattern(3, BLOCK), pattern(4, BLOCK)


class Bench:
    """A running secondary whose disk is behind a server that holds requests. Its target face is written to as a plain
    NBD client does."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        path = lab.folder / "below.raw"
        path.write_bytes(BEFORE)
        self.below = lab.start(HeldEndpoint(lab.folder, path))
        named = ["mode=secondary", f"state={lab.folder / 'state'}", f"disk=disk0:{self.below.uri()}", "top-id=top0"]
        self.secondary = lab.start(Server(lab.folder, "secondary", [*named, *arguments]))
        self.secondary.execute("replication-start")
        self.target, self.guest = self.secondary.connect("disk0"), self.secondary.connect("top0")
        self._pool = ThreadPoolExecutor(4)

    @property
    def content(self) -> bytes:
        """The secondary disk's."""
        return self.below.path.read_bytes()

    def hold(self, point: str, request: Callable[[], object]) -> Future[object]:
        """A request or command whose request of the disk is held at the point."""
        self.below.points.arm(point)
        future = self._pool.submit(request)
        self.below.points.wait_hit(point)
        return future

    def hold_write(self, at: int) -> Future[object]:
        """A write of the old primary, held where the disk is about to do it."""
        return self.hold("pwrite.before", lambda: self.target.pwrite(SECOND, at))

    def fail_over(self) -> None:
        """Fail over, in time."""
        begun = time.monotonic()
        self.secondary.execute("replication-stop", {"failover": True})
        assert time.monotonic() - begun < ANSWER_S + BUSY_S
        assert self.secondary.status()["stage"] in ("failover", "done")

    def finish(self, *guests: int) -> None:
        """Wait for the commit: the disk holds the last checkpoint and what the guest wrote at these offsets."""
        self.secondary.wait_stage("done")
        expected = bytearray(BEFORE)
        for at in guests:
            expected[at : at + BLOCK] = GUESTS
        assert self.guest.pread(MIB, 0) == expected
        assert self.content == expected


@pytest.fixture
def bench(lab: Lab) -> Iterator[Bench]:
    bench = Bench(lab)
    yield bench
    for point in list(bench.below.points.folder.iterdir()):
        point.unlink(missing_ok=True)


@pytest.fixture
def durable(lab: Lab) -> Iterator[Bench]:
    """With durability=power: a checkpoint flushes the disk."""
    bench = Bench(lab, "durability=power")
    yield bench
    for point in list(bench.below.points.folder.iterdir()):
        point.unlink(missing_ok=True)


def test_a_target_write_that_hangs_holds_up_no_failover_and_the_guest_goes_on(bench: Bench) -> None:
    """The disk does that write only after the failover: neither the guest nor, in the end, the disk keeps it."""
    bench.guest.pwrite(GUESTS, 4 * BLOCK)
    bench.target.pwrite(FIRST, 0)
    late = bench.hold_write(0)
    bench.fail_over()
    other = bench.secondary.connect("disk0")
    with nbd_refusal(errno.ESHUTDOWN):
        other.pwrite(SECOND, 8 * BLOCK)
    assert bench.guest.pread(BLOCK, 0) == BEFORE[:BLOCK]
    bench.guest.pwrite(GUESTS, 0)
    bench.guest.pwrite(GUESTS, 12 * BLOCK)
    assert bench.guest.pread(BLOCK, 0) == GUESTS
    assert bench.content[:BLOCK] == FIRST
    bench.below.points.release("pwrite.before")
    late.result(DEADLINE_S)
    bench.finish(0, 4 * BLOCK, 12 * BLOCK)


def test_what_was_in_flight_at_the_failover_is_rolled_back(bench: Bench) -> None:
    """No guest writes there: the last checkpoint's content comes back, also where it is not preserved yet."""
    late = bench.hold_write(0)
    other = bench.secondary.connect("disk0")  # libnbd takes one synchronous call at a time
    before_copy = bench.hold("pread.before", lambda: other.pwrite(SECOND, 4 * BLOCK))
    bench.fail_over()
    bench.below.points.release("pread.before")
    before_copy.result(DEADLINE_S)
    assert bench.content[4 * BLOCK : 5 * BLOCK] == SECOND
    bench.below.points.release("pwrite.before")
    late.result(DEADLINE_S)
    bench.finish()


def test_a_process_killed_before_the_requests_have_left_fails_over_in_the_next_one(bench: Bench) -> None:
    bench.guest.pwrite(GUESTS, 4 * BLOCK)
    late = bench.hold_write(0)
    bench.fail_over()
    bench.guest.pwrite(GUESTS, 12 * BLOCK)
    bench.secondary.kill()
    with pytest.raises(nbd.Error):
        late.result(DEADLINE_S)
    bench.below.points.release("pwrite.before")
    bench.secondary.start()
    bench.guest = bench.secondary.connect("top0")
    bench.finish(4 * BLOCK, 12 * BLOCK)


@pytest.mark.parametrize("name", ["replication-stop", "replication-checkpoint"])
def test_a_command_that_flushes_the_disk_gives_way(durable: Bench, name: str) -> None:
    """A planned stop, and with durability=power a checkpoint."""
    durable.target.pwrite(FIRST, 0)
    other = durable.hold("flush.before", lambda: durable.secondary.execute(name))
    durable.fail_over()
    with pytest.raises(QmpError, match="a failover has come first"):
        other.result(DEADLINE_S)
    durable.below.points.release("flush.before")
    durable.finish()


def test_a_command_that_waits_before_the_gate_gives_way(bench: Bench) -> None:
    read = bench.hold("pread.before", lambda: bench.target.pread(BLOCK, 0))
    checkpoint = bench._pool.submit(bench.secondary.execute, "replication-checkpoint")
    for _ in range(100):  # until the checkpoint has closed the gate
        blocked = bench._pool.submit(bench.guest.pread, BLOCK, 0)
        if not wait([blocked], 0.3).done:
            break
    bench.fail_over()
    with pytest.raises(QmpError, match="a failover has come first"):
        checkpoint.result(DEADLINE_S)
    assert blocked.result(DEADLINE_S) == BEFORE[:BLOCK]
    bench.below.points.release("pread.before")
    read.result(DEADLINE_S)
    bench.finish()


def test_status_and_query_failover_answer_while_the_disk_hangs(durable: Bench) -> None:
    durable.target.pwrite(FIRST, 0)
    checkpoint = durable.hold("flush.before", lambda: durable.secondary.execute("replication-checkpoint"))
    begun = time.monotonic()
    assert durable.secondary.status()["stage"] == "running"
    assert durable.secondary.execute("query-failover")["allowed"]
    assert time.monotonic() - begun < ANSWER_S + BUSY_S
    durable.below.points.release("flush.before")
    checkpoint.result(DEADLINE_S)


def test_a_guest_s_flush_that_hangs_holds_up_no_failover(bench: Bench) -> None:
    """In stage done the guest's flush goes to the disk; here it is the primary's."""
    bench.target.pwrite(FIRST, 0)
    flush = bench.hold("flush.before", bench.target.flush)
    bench.fail_over()
    bench.guest.pwrite(GUESTS, 0)
    bench.below.points.release("flush.before")
    flush.result(DEADLINE_S)
    bench.finish(0)


def test_a_demote_waits_for_a_slow_flush_and_the_guest_goes_on_meanwhile(bench: Bench) -> None:
    """Three seconds are what the end of a process has; a change of role has the time that it needs."""
    bench.fail_over()
    bench.secondary.wait_stage("done")
    bench.guest.pwrite(GUESTS, 0)
    demote = bench.hold("flush.before", lambda: bench.secondary.execute("replication-demote"))
    assert not wait([demote], 4.0).done
    assert bench.guest.pread(BLOCK, 0) == GUESTS
    bench.below.points.release("flush.before")
    demote.result(DEADLINE_S)
    assert bench.secondary.status()["stage"] == "running"
    assert bench.content[:BLOCK] == GUESTS


def test_a_demote_whose_last_flush_is_slow_is_a_demote_all_the_same(bench: Bench) -> None:
    """The flush behind the closed face: what was written since the first one may take long, too."""
    bench.fail_over()
    bench.secondary.wait_stage("done")
    bench.guest.pwrite(GUESTS, 0)
    demote = bench.hold("flush.before", lambda: bench.secondary.execute("replication-demote"))
    bench.below.points.arm("flush.before")
    bench.below.points.release("flush.before")
    bench.below.points.wait_hit("flush.before")
    assert not wait([demote], 4.0).done
    bench.below.points.release("flush.before")
    demote.result(DEADLINE_S)
    assert bench.secondary.status()["stage"] == "running"
    assert bench.content[:BLOCK] == GUESTS
