# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of a pair (replication/epochs.py): what one holds, who waits for it, and what becomes of one that
is held, interrupted or refused.

The load is made of chains. A chain is one client that does one request after the other, in turn on both disks, and each
request overwrites the whole region before it: so the regions show how many of the chain's requests somebody has, and
a state that is of no instant (a later request there, an earlier one not; half a request) is of no number at all.
"""

from __future__ import annotations

import contextlib
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import nbd
import pytest

from lab import (
    DEADLINE_S,
    KIB,
    MIB,
    Lab,
    Pair,
    PausePoints,
    QmpError,
    Server,
    disk_name,
    drained,
    pattern,
    refused,
    top_id,
    wait_until,
    whole,
)

T = TypeVar("T")

BLOCK = 4 * KIB
PATIENT = "timeout=30"
"""For tests in which somebody is held: a busy machine must not make a lost link of it."""

BEFORE, AFTER = pattern(1, 3 * BLOCK + 100), pattern(2, 2 * BLOCK + 700)
PLACES = (BLOCK + 50, 40 * BLOCK)
"""Where BEFORE and AFTER are written."""


@pytest.fixture(autouse=True)
def _nobody_stays_held(lab: Lab) -> Iterator[None]:
    """A test that failed lets the threads go that it holds, so that its processes can end."""
    yield
    folder = lab.folder / "pause"
    if folder.is_dir():
        for point in folder.iterdir():
            point.unlink(missing_ok=True)


def begin(call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Run `call` in a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:  # noqa: BLE001 (it is the future's business)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def refusal(future: Future[Any]) -> str:
    """With what a command was refused that was begun in a thread."""
    error = future.exception(DEADLINE_S)
    assert isinstance(error, QmpError), f"a refusal expected, got {error or future.result()}"
    return error.desc


def started(
    lab: Lab, sizes: tuple[int, ...] = (MIB, MIB), *, points: PausePoints | None = None, **options: Any
) -> Pair:
    """A pair that runs and is in sync."""
    surroundings = {"extra_environment": points.environment} if points else {}
    pair = lab.pair(sizes, primary_options=surroundings, secondary_options=surroundings, **options)
    pair.start_replication()
    in_sync(pair.primary)
    return pair


def in_sync(primary: Server) -> None:
    """Wait for the link."""
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the link is in sync")


def epochs(*servers: Server) -> list[int]:
    """The numbers of their last checkpoints."""
    return [server.status()["epoch"] for server in servers]


class Hands:
    """Handles of a client of every disk's guest face or, on a primary, disk."""

    def __init__(self, server: Server, names: Callable[[int], str], count: int = 2) -> None:
        self.handles = [server.connect(names(index)) for index in range(count)]

    def write(self, data: bytes, offset: int) -> None:
        """The same on every disk."""
        for handle in self.handles:
            handle.pwrite(data, offset)

    def shows(self, data: bytes, offset: int) -> list[bool]:
        """On which disks it is there."""
        return [bytes(handle.pread(len(data), offset)) == data for handle in self.handles]


def write_before(pair: Pair) -> tuple[Hands, Hands, Hands]:
    """Hands on the primary, which has written BEFORE, on the target face, and on the guest face, which lacks it."""
    guest, target, seen = (
        Hands(pair.primary, disk_name),
        Hands(pair.secondary, disk_name),
        Hands(pair.secondary, top_id),
    )
    guest.write(BEFORE, PLACES[0])
    return guest, target, seen


def nothing_seen(seen: Hands) -> None:
    """The guest face is as it was in the beginning."""
    assert seen.shows(bytes(len(BEFORE)), PLACES[0]) == [True, True]
    assert seen.shows(bytes(len(AFTER)), PLACES[1]) == [True, True]


def only_before_seen(seen: Hands) -> None:
    """The guest face is the cut between BEFORE and AFTER."""
    assert seen.shows(BEFORE, PLACES[0]) == [True, True]
    assert seen.shows(bytes(len(AFTER)), PLACES[1]) == [True, True]


def all_over(pair: Pair) -> None:
    """The pair is in sync again, and its next checkpoint makes both sides equal, numbers included."""
    in_sync(pair.primary)
    number = pair.primary.checkpoint()["epoch"]
    assert epochs(pair.primary, pair.secondary) == [number, number]
    for index in range(2):
        content = whole(pair.primary.connect(disk_name(index)))
        assert whole(pair.secondary.connect(top_id(index))) == content
        assert whole(pair.secondary.connect(disk_name(index))) == content


# -- what a checkpoint holds ---------------------------------------------------------------------------------------

_STAMP = struct.Struct(">II")


class Chain:
    """One client and its requests number 1, 2, 3 ... Each overwrites the whole of one region, on the other disk than
    the one before, after the one before was answered."""

    KINDS = ("write", "zero", "fua", "trim", "write")
    """Of request number n: the n-th, modulo. Never two of zeroes one after the other, so that every number shows."""

    def __init__(self, number: int, offset: int, length: int) -> None:
        self.number = number
        self.offset = offset
        self.length = length
        self.issued = 0
        self.answered = 0
        self.longest_s = 0.0
        self.seen = 0
        """How many of its requests the secondary has had at the last checkpoint that was looked at."""

    def run(self, primary: Server, over: threading.Event) -> None:
        """Work until `over`, or until the primary is gone."""
        handles = [primary.connect(disk_name(index)) for index in range(2)]
        with contextlib.suppress(nbd.Error):
            while not over.is_set():
                self._request(handles)
        assert over.is_set(), f"chain {self.number} has failed"

    def _request(self, handles: list[nbd.NBD]) -> None:
        number = self.issued + 1
        self.issued = number
        handle, kind = handles[number % 2], self.KINDS[number % len(self.KINDS)]
        begun = time.monotonic()
        if kind == "zero":
            handle.zero(self.length, self.offset)
        elif kind == "trim":
            handle.trim(self.length, self.offset)
        else:
            handle.pwrite(self._stamp(number), self.offset, nbd.CMD_FLAG_FUA if kind == "fua" else 0)
        self.longest_s = max(self.longest_s, time.monotonic() - begun)
        self.answered = number

    def _stamp(self, number: int) -> bytes:
        return _STAMP.pack(self.number, number) * (self.length // _STAMP.size)

    def _shown(self, index: int, count: int) -> int:
        """Which request's content disk number `index` shows after `count` of them, 0 for zeroes."""
        last = count if count % 2 == index else count - 1
        return 0 if last <= 0 or self.KINDS[last % len(self.KINDS)] in ("zero", "trim") else last

    def look(self, read: Callable[[int, int, int], bytes], floor: int, ceiling: int) -> None:
        """`read(disk, length, offset)` shows what the secondary has: it must be the first n requests, wholly, and
        nothing else, with `floor` <= n <= `ceiling`, and n must not be less than it was."""
        found = tuple(self._number(read(index, self.length, self.offset)) for index in range(2))
        floor = max(floor, self.seen)
        for count in range(floor, ceiling + 1):
            if found == tuple(self._shown(index, count) for index in range(2)):
                self.seen = count
                return
        raise AssertionError(
            f"chain {self.number}: the disks show requests {found}, of no instant in {floor}..{ceiling}"
        )

    def _number(self, content: bytes) -> int:
        chain, number = _STAMP.unpack_from(content)
        if (chain, number) == (0, 0):
            assert not any(content), f"chain {self.number}: a torn request of zeroes"
            return 0
        assert chain == self.number, f"what chain {chain} wrote is in the place of chain {self.number}"
        assert content == self._stamp(number), f"chain {self.number}: a torn request {number}"
        return int(number)


class Load:
    """Many small chains, unaligned and crowded, and two of requests of several entries each."""

    SIZE = 8 * MIB

    def __init__(self, primary: Server) -> None:
        self.over = threading.Event()
        small = [Chain(1 + number, number * 6 * KIB + 512, 5 * KIB) for number in range(6)]
        self.chains = [*small, Chain(7, MIB - 512, 3 * MIB + 1024), Chain(8, 5 * MIB, 2 * MIB + 512)]
        self._futures = [begin(chain.run, primary, self.over) for chain in self.chains]

    def look(self, read: Callable[[int, int, int], bytes], floors: list[int] | None = None) -> None:
        """At every chain; `floors`: what had been answered before the checkpoint was asked for."""
        for index, chain in enumerate(self.chains):
            chain.look(read, floors[index] if floors else 0, chain.issued)

    def answered(self) -> list[int]:
        """Per chain."""
        return [chain.answered for chain in self.chains]

    def grows(self, requests: int) -> None:
        """Wait until every chain has done so many more."""
        goals = [answered + requests for answered in self.answered()]

        def reached() -> bool:
            self.check()
            return all(now >= goal for now, goal in zip(self.answered(), goals, strict=True))

        wait_until(reached, f"every chain does {requests} more requests")

    def check(self) -> None:
        """Raise what has ended a chain."""
        for future in self._futures:
            if future.done():
                future.result()

    def finish(self) -> None:
        """End them all."""
        self.over.set()
        for future in self._futures:
            future.result(DEADLINE_S)


def face_of(secondary: Server) -> Callable[[int, int, int], bytes]:
    """Reads the guest face."""
    handles = [secondary.connect(top_id(index)) for index in range(2)]
    return lambda index, length, offset: bytes(handles[index].pread(length, offset))


def content_of(paths: list[Path]) -> Callable[[int, int, int], bytes]:
    """Reads files."""
    contents = [path.read_bytes() for path in paths]
    return lambda index, length, offset: contents[index][offset : offset + length]


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_automatic_checkpoints_under_load_are_each_of_one_instant_over_both_disks_and_so_is_a_failover(
    lab: Lab, protocol: str
) -> None:
    arguments = [f"protocol={protocol}", "checkpoint-interval=0.1", "queue-limit=8M", PATIENT]
    pair = started(lab, (Load.SIZE, Load.SIZE), primary_arguments=arguments)
    face = face_of(pair.secondary)
    load = Load(pair.primary)
    looked = 0
    deadline = time.monotonic() + DEADLINE_S
    while looked < 8 or min(chain.seen for chain in load.chains) < 10:
        assert time.monotonic() < deadline, f"{looked} checkpoints, {[chain.seen for chain in load.chains]}"
        load.check()
        before = epochs(pair.secondary)
        content = [face(index, Load.SIZE, 0) for index in range(2)]
        if epochs(pair.secondary) == before:
            load.look(lambda index, length, offset, of=content: of[index][offset : offset + length])  # type: ignore[misc]
            looked += 1
    assert pair.primary.status()["link"]["state"] == "in-sync"
    # No request has waited for more than the I/O of its neighbours.
    assert max(chain.longest_s for chain in load.chains) < 10
    chooser = random.Random(protocol)
    load.over.wait(chooser.uniform(0.0, 0.2))  # any moment will do
    load.over.set()
    pair.primary.kill()
    load.finish()
    pair.secondary.failover()
    load.look(content_of(pair.secondary.disks))


def test_a_checkpoint_on_demand_holds_what_was_answered_before_it_and_nothing_from_after_it(lab: Lab) -> None:
    pair = started(lab, (Load.SIZE, Load.SIZE), primary_arguments=["queue-limit=8M", PATIENT])
    face = face_of(pair.secondary)
    load = Load(pair.primary)
    for _ in range(6):
        load.grows(2)
        floors = load.answered()
        number = pair.primary.checkpoint()["epoch"]
        load.look(face, floors)
        assert epochs(pair.primary, pair.secondary) == [number, number]
    load.finish()
    all_over(pair)


# -- nobody waits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["epoch.cut", "epoch.reached", "checkpoint.begun", "checkpoint.emptied"])
def test_the_primarys_guest_goes_on_while_a_checkpoint_stands_still_at(lab: Lab, point: str) -> None:
    points = lab.pause_points()
    pair = started(lab, points=points, primary_arguments=[PATIENT])
    guest, _, seen = write_before(pair)
    points.arm(point)
    checkpoint = begin(pair.primary.checkpoint)
    points.wait_hit(point)
    for offset in range(0, 64 * BLOCK, 4 * BLOCK):
        guest.write(AFTER[:BLOCK], offset + 100 * BLOCK)
    for handle in guest.handles:
        handle.zero(BLOCK, 0)
        handle.trim(BLOCK, BLOCK * 8)
        handle.pwrite(AFTER, PLACES[1], nbd.CMD_FLAG_FUA)
        handle.flush()
    assert guest.shows(AFTER, PLACES[1]) == [True, True]
    assert points.is_hit(point)
    assert not checkpoint.done()
    points.release(point)
    number = checkpoint.result(DEADLINE_S)["epoch"]
    assert epochs(pair.primary, pair.secondary) == [number, number]
    only_before_seen(seen)
    assert seen.shows(bytes(BLOCK), 100 * BLOCK) == [True, True]
    all_over(pair)


def test_a_long_checkpoint_of_the_secondary_makes_the_guest_wait_only_when_the_queue_is_full(lab: Lab) -> None:
    points = lab.pause_points()
    pair = started(lab, (8 * MIB, 8 * MIB), points=points, primary_arguments=["queue-limit=1M", PATIENT])
    points.arm("checkpoint.begun")
    checkpoint = begin(pair.primary.checkpoint)
    points.wait_hit("checkpoint.begun")
    size, fitting = 64 * KIB, 15  # and 512 bytes for each
    handles = [pair.primary.connect(disk_name(number % 2)) for number in range(fitting + 3)]
    writes = [begin(handle.pwrite, pattern(number, size), number * size) for number, handle in enumerate(handles)]
    wait_until(lambda: sum(write.done() for write in writes) >= fitting, "what fits into the queue is answered")
    queued = sum(disk["forward-queue-bytes"] for disk in pair.primary.status()["disks"])
    assert queued == fitting * size
    assert sum(write.done() for write in writes) == fitting
    assert points.is_hit("checkpoint.begun")
    points.release("checkpoint.begun")
    number = checkpoint.result(DEADLINE_S)["epoch"]
    for write in writes:
        write.result(DEADLINE_S)
    assert epochs(pair.primary, pair.secondary) == [number, number]
    for handle in Hands(pair.secondary, top_id).handles:
        assert not any(whole(handle))
    status = pair.primary.status()
    assert (status["link"]["state"], status["error"]) == ("in-sync", None)
    all_over(pair)


# -- hold ----------------------------------------------------------------------------------------------------------


def hold(primary: Server) -> int:
    """The number of the epoch that is held from now on."""
    answer = primary.execute("replication-checkpoint", hold=True)
    assert list(answer) == ["epoch"]
    number: int = answer["epoch"]
    assert primary.status()["held-epoch"] == number
    return number


def held_between(lab: Lab, *arguments: str, points: PausePoints | None = None) -> tuple[Pair, Hands, Hands, int]:
    """A pair with a hold between BEFORE and AFTER, hands on the target face, which has the one and not the other, and
    on the guest face, which has neither; and the number."""
    pair = started(lab, points=points, primary_arguments=[*(arguments or [PATIENT])])
    guest, target, seen = write_before(pair)
    number = hold(pair.primary)
    guest.write(AFTER, PLACES[1])
    wait_until(lambda: target.shows(BEFORE, PLACES[0]) == [True, True], "the epoch goes on to the secondary")
    return pair, target, seen, number


def waiting(primary: Server) -> int:
    """Bytes in the queue."""
    return sum(disk["forward-queue-bytes"] for disk in primary.status()["disks"])


def no_checkpoint(pair: Pair, number: int) -> None:
    """Epoch `number` is not one on either side."""
    assert epochs(pair.primary, pair.secondary) == [number - 1, number - 1]


def is_over(primary: Server, number: int) -> None:
    """An epoch can neither be committed nor aborted, and nothing is held."""
    for command in ("replication-checkpoint-commit", "replication-checkpoint-abort"):
        assert str(number) in refused(primary, command, {"epoch": number})
    assert primary.status()["held-epoch"] is None


def test_hold_answers_at_once_also_when_the_secondary_has_not_got_the_epoch_yet(lab: Lab) -> None:
    points = lab.pause_points()
    pair = started(lab, points=points, primary_arguments=[PATIENT])
    points.arm("forward.send")
    guest, target, seen = write_before(pair)
    points.wait_hit("forward.send")
    number = hold(pair.primary)
    assert number == epochs(pair.primary)[0] + 1
    guest.write(AFTER, PLACES[1])
    commit = begin(pair.primary.execute, "replication-checkpoint-commit", {"epoch": number})
    assert points.is_hit("forward.send")
    assert False in target.shows(BEFORE, PLACES[0])
    assert not commit.done()
    points.release("forward.send")
    assert commit.result(DEADLINE_S)["epoch"] == number
    only_before_seen(seen)
    all_over(pair)


def test_while_an_epoch_is_held_it_is_brought_over_and_what_follows_waits_and_nothing_is_seen_of_either(
    lab: Lab,
) -> None:
    pair, target, seen, number = held_between(lab)
    assert target.shows(AFTER, PLACES[1]) == [False, False]
    assert waiting(pair.primary) == 2 * len(AFTER)
    no_checkpoint(pair, number)
    nothing_seen(seen)
    pair.primary.execute("replication-checkpoint-abort", epoch=number)
    all_over(pair)


def test_commit_makes_exactly_the_state_of_the_cut_visible_and_what_follows_goes_on(lab: Lab) -> None:
    pair, target, seen, number = held_between(lab)
    with pair.primary.qmp() as qmp:
        answer = qmp.execute("replication-checkpoint-commit", epoch=number)
        assert answer["epoch"] == number
        assert answer["duration"] >= 0
        event = qmp.wait_event("REPLICATION_CHECKPOINT")
        assert event["data"]["epoch"] == number
    only_before_seen(seen)
    assert epochs(pair.primary, pair.secondary) == [number, number]
    drained(pair.primary)
    assert target.shows(AFTER, PLACES[1]) == [True, True]
    only_before_seen(seen)
    is_over(pair.primary, number)
    all_over(pair)


def test_abort_leaves_the_former_checkpoint_and_the_stream_goes_on(lab: Lab) -> None:
    pair, target, seen, number = held_between(lab)
    assert pair.primary.execute("replication-checkpoint-abort", epoch=number) == {}
    drained(pair.primary)
    assert target.shows(AFTER, PLACES[1]) == [True, True]
    nothing_seen(seen)
    no_checkpoint(pair, number)
    is_over(pair.primary, number)
    all_over(pair)


def test_a_hold_that_is_forgotten_is_aborted_after_the_timeout_and_the_guest_has_not_waited(lab: Lab) -> None:
    pair = started(lab, primary_arguments=["timeout=1"])
    guest, target, seen = write_before(pair)
    number = hold(pair.primary)
    guest.write(AFTER, PLACES[1])
    wait_until(lambda: pair.primary.status()["held-epoch"] is None, "the hold is given up")
    drained(pair.primary)
    assert target.shows(AFTER, PLACES[1]) == [True, True]
    nothing_seen(seen)
    no_checkpoint(pair, number)
    is_over(pair.primary, number)
    all_over(pair)


def test_a_wrong_number_is_refused_and_the_hold_stays(lab: Lab) -> None:
    pair, _, seen, number = held_between(lab)
    for wrong in (0, -1, number - 1, number + 1, 1 << 62):
        for command in ("replication-checkpoint-commit", "replication-checkpoint-abort"):
            assert str(wrong) in refused(pair.primary, command, {"epoch": wrong})
    for arguments in ({}, {"epoch": str(number)}, {"epoch": True}, {"epoch": 10**30}, {"epoch": number, "force": True}):
        refused(pair.primary, "replication-checkpoint-commit", arguments)
    assert pair.primary.status()["held-epoch"] == number
    nothing_seen(seen)
    pair.primary.execute("replication-checkpoint-commit", epoch=number)
    only_before_seen(seen)


def test_no_other_checkpoint_comes_while_one_is_held(lab: Lab) -> None:
    pair, _, seen, number = held_between(lab, PATIENT, "checkpoint-interval=0.05")
    for command, arguments in (("replication-checkpoint", {"hold": True}), ("replication-checkpoint", {})):
        assert str(number) in refused(pair.primary, command, arguments)
    assert str(number) in refused(pair.primary, "xen-colo-do-checkpoint")
    assert pair.primary.status()["held-epoch"] == number
    # As often as an automatic one may have been due.
    assert {epochs(pair.secondary)[0] for _ in range(100)} == {number - 1}
    before = seen.shows(BEFORE, PLACES[0])
    assert before == [False, False]
    pair.primary.execute("replication-checkpoint-commit", epoch=number)
    wait_until(lambda: seen.shows(AFTER, PLACES[1]) == [True, True], "automatic checkpoints go on")


def test_an_aborted_number_is_not_used_again_so_that_a_late_commit_does_not_hit_another_epoch(lab: Lab) -> None:
    pair, _, seen, first = held_between(lab)
    pair.primary.execute("replication-checkpoint-abort", epoch=first)
    second = hold(pair.primary)
    assert second > first
    refused(pair.primary, "replication-checkpoint-commit", {"epoch": first})
    nothing_seen(seen)
    assert pair.primary.execute("replication-checkpoint-commit", epoch=second)["epoch"] == second
    assert epochs(pair.primary, pair.secondary) == [second, second]


def test_with_protocol_sync_a_write_behind_a_held_cut_waits_for_the_commit_and_one_in_front_does_not(lab: Lab) -> None:
    pair = started(lab, primary_arguments=["protocol=sync", PATIENT])
    guest, target, seen = write_before(pair)
    assert target.shows(BEFORE, PLACES[0]) == [True, True]
    number = hold(pair.primary)
    write = begin(guest.write, AFTER, PLACES[1])
    wait_until(lambda: waiting(pair.primary) == len(AFTER), "the write is in the queue")
    assert not write.done()
    pair.primary.execute("replication-checkpoint-commit", epoch=number)
    write.result(DEADLINE_S)
    only_before_seen(seen)
    assert target.shows(AFTER, PLACES[1]) == [True, True]


@pytest.mark.parametrize("how", ["stop", "quit"])
def test_the_primary_stops_in_the_midst_of_a_hold_and_the_secondary_gets_all_and_no_checkpoint(
    lab: Lab, how: str
) -> None:
    pair, target, seen, number = held_between(lab)
    if how == "stop":
        pair.primary.execute("replication-stop")
        assert pair.primary.status()["stage"] == "done"
        refused(pair.primary, "replication-checkpoint-commit", {"epoch": number})
        assert pair.primary.status()["held-epoch"] is None
    else:
        pair.primary.disconnect()
        pair.primary.execute("quit")
        pair.primary.wait_ended()
    assert target.shows(AFTER, PLACES[1]) == [True, True]
    nothing_seen(seen)
    assert epochs(pair.secondary) == [number - 1]
    # It has all, and knows it.
    pair.secondary.execute("replication-stop")
    assert seen.shows(AFTER, PLACES[1]) == [True, True]


def test_a_planned_stop_of_the_secondary_in_the_midst_of_a_hold_ends_the_epoch_without_a_checkpoint(lab: Lab) -> None:
    pair, _, _, number = held_between(lab)
    pair.secondary.execute("replication-stop")
    refused(pair.primary, "replication-checkpoint-commit", {"epoch": number})
    assert pair.primary.status()["held-epoch"] is None
    assert epochs(pair.primary) == [number - 1]
    for handle in Hands(pair.secondary, top_id).handles:
        assert bytes(handle.pread(len(BEFORE), PLACES[0])) == BEFORE
        assert bytes(handle.pread(len(AFTER), PLACES[1])) == bytes(len(AFTER))


def test_failover_in_the_midst_of_a_hold_gives_the_former_checkpoint_and_the_commit_is_refused(lab: Lab) -> None:
    pair, _, seen, number = held_between(lab)
    pair.secondary.failover()
    refused(pair.primary, "replication-checkpoint-commit", {"epoch": number})
    assert pair.primary.status()["held-epoch"] is None
    assert epochs(pair.primary) == [number - 1]
    nothing_seen(seen)
    for disk in pair.secondary.disks:
        assert not any(disk.read_bytes())


def test_the_primary_is_killed_in_the_midst_of_a_hold_and_the_former_checkpoint_stays(lab: Lab) -> None:
    pair, _, seen, number = held_between(lab)
    pair.primary.kill()
    nothing_seen(seen)
    pair.primary.start()
    is_over(pair.primary, number)
    in_sync(pair.primary)
    nothing_seen(seen)
    all_over(pair)


def test_a_failover_after_the_primary_was_killed_in_the_midst_of_a_hold_gives_the_former_checkpoint(lab: Lab) -> None:
    pair, _, _, _ = held_between(lab)
    pair.primary.kill()
    pair.secondary.failover()
    for disk in pair.secondary.disks:
        assert not any(disk.read_bytes())


def test_the_secondary_is_killed_in_the_midst_of_a_hold_and_the_former_checkpoint_stays(lab: Lab) -> None:
    pair, _, _, number = held_between(lab)
    pair.secondary.restart(signal.SIGKILL)
    refused(pair.primary, "replication-checkpoint-commit", {"epoch": number})
    no_checkpoint(pair, number)
    nothing_seen(Hands(pair.secondary, top_id))
    in_sync(pair.primary)
    is_over(pair.primary, number)
    all_over(pair)


def test_an_epoch_is_held_only_by_a_running_primary_whose_secondary_takes_checkpoints(lab: Lab) -> None:
    pair = lab.pair()
    for server in (pair.primary, pair.secondary):
        refused(server, "replication-checkpoint", {"hold": True})
        refused(server, "replication-checkpoint-commit", {"epoch": 1})
        refused(server, "replication-checkpoint-abort", {"epoch": 1})
    pair.start_replication()
    refused(pair.secondary, "replication-checkpoint", {"hold": True})
    plain = lab.endpoint(size=MIB)
    alone = lab.primary(plain.uri(), name="alone")
    alone.start_replication()
    refused(alone, "replication-checkpoint", {"hold": True})
    assert alone.status()["held-epoch"] is None
