# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of a pair (replication/primary/epochs.py): what one holds, who waits for it, and what becomes of one that
is held, interrupted or refused.

The load is made of chains. A chain is one client that does one request after the other, in turn on both disks, and each
request overwrites the whole region before it: so the regions show how many of the chain's requests somebody has, and
a state that is of no instant (a later request there, an earlier one not; half a request) is of no number at all.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import nbd
import pytest

from content import KIB, MIB, pattern, whole
from lab import Lab
from nbdprocess import silent
from nodes import Pair, Primary, Secondary, Server, disk_name, drained, in_sync, refused, top_id
from pausepoints import PausePoints
from qmp import Qmp, QmpError
from waiting import DEADLINE_S, begin, wait_until

BLOCK = 4 * KIB
PATIENCE_S = 30
PATIENT = f"timeout={PATIENCE_S}"
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

    def __init__(self, primary: Server, *chains: Chain) -> None:
        """`chains`: instead of those."""
        self.over = threading.Event()
        small = [Chain(1 + number, number * 6 * KIB + 512, 5 * KIB) for number in range(6)]
        large = [Chain(7, MIB - 512, 3 * MIB + 1024), Chain(8, 5 * MIB, 2 * MIB + 512)]
        self.chains = list(chains) or [*small, *large]
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
    # No request has waited for more than the I/O of its neighbours, which a busy disk makes long.
    assert max(chain.longest_s for chain in load.chains) < PATIENCE_S
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


def test_a_client_alone_is_fast_enough_to_write_while_the_queues_are_being_cut_and_sees_no_gap(lab: Lab) -> None:
    pair = started(lab, primary_arguments=[PATIENT])
    face = face_of(pair.secondary)
    load = Load(pair.primary, Chain(1, 512, 512))
    for _ in range(60):
        load.grows(10)
        floors = load.answered()
        pair.primary.checkpoint()
        load.look(face, floors)
    load.finish()


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
    assert seen.shows(AFTER, PLACES[1]) == [False, False]
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


def test_a_stop_in_the_midst_of_a_hold_does_not_wait_for_the_writes_that_wait_for_the_hold(lab: Lab) -> None:
    """With protocol=sync they are in the gate, which the stop closes."""
    pair = started(lab, primary_arguments=["protocol=sync", PATIENT])
    guest, target, seen = write_before(pair)
    hold(pair.primary)
    write = begin(guest.write, AFTER, PLACES[1])
    wait_until(lambda: waiting(pair.primary) == len(AFTER), "the write is in the queue")
    begun = time.monotonic()
    pair.primary.execute("replication-stop")
    assert time.monotonic() - begun < PATIENCE_S / 2
    write.result(DEADLINE_S)
    assert target.shows(AFTER, PLACES[1])[0], "the one that waited; the other disk's came behind it"
    nothing_seen(seen)


def test_a_planned_stop_of_the_secondary_in_the_midst_of_a_hold_ends_the_epoch_without_a_checkpoint(lab: Lab) -> None:
    pair, _, _, number = held_between(lab)
    pair.secondary.execute("replication-stop")
    refused(pair.primary, "replication-checkpoint-commit", {"epoch": number})
    assert pair.primary.status()["held-epoch"] is None
    assert epochs(pair.primary) == [number - 1]
    hands = Hands(pair.secondary, top_id)
    assert hands.shows(BEFORE, PLACES[0]) == [True, True]
    # The stream ends at one instant on both disks, behind what the hold has kept back.
    assert hands.shows(AFTER, PLACES[1]) == [True, True]
    wait_until(lambda: "the link to the secondary is lost" in pair.primary.stderr(), "the primary knows")
    assert "stopped as planned" in pair.primary.stderr()


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


# -- interrupted ---------------------------------------------------------------------------------------------------


class Cable:
    """Between a primary and the Unix socket of its secondary, and can be cut."""

    def __init__(self, path: Path, to: Path) -> None:
        self.path = path
        self._to = to
        # Protects the fields below.
        self._lock = threading.Lock()
        self._down = False
        self._ends: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Cable:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        with contextlib.suppress(OSError):  # wakes the thread in accept, and may say that nobody is connected
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def uri(self) -> str:
        """What the primary is given."""
        return f"nbd+unix:///?socket={self.path}"

    def cut(self) -> None:
        """End every connection, and let none through."""
        with self._lock:
            self._down = True
            for end in self._ends:
                with contextlib.suppress(OSError):  # its other side has gone by itself
                    end.shutdown(socket.SHUT_RDWR)
            self._ends.clear()

    def mend(self) -> None:
        """Let connections through again."""
        with self._lock:
            self._down = False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near = self._listener.accept()[0]
                far = socket.socket(socket.AF_UNIX)
                try:
                    far.connect(str(self._to))
                except OSError:
                    near.close()
                    far.close()
                    continue
                with self._lock:
                    through = not self._down
                    if through:
                        self._ends += [near, far]
                if not through:
                    near.close()
                    far.close()
                    continue
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):  # cut
            while data := one.recv(256 * KIB):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


class Cabled:
    """A pair with a cable in between; it runs, and has written BEFORE."""

    def __init__(self, lab: Lab, cable: Cable, secondary: Secondary, primary: Primary) -> None:
        self.cable, self.secondary, self.primary = cable, secondary, primary
        secondary.start_replication()
        primary.start_replication()
        in_sync(primary)
        self.number = epochs(primary)[0]
        self.guest = Hands(primary, disk_name)
        self.guest.write(BEFORE, PLACES[0])
        self.seen = Hands(secondary, top_id)

    def over(self) -> None:
        """As all_over."""
        in_sync(self.primary)
        number = self.primary.checkpoint()["epoch"]
        assert number > self.number
        assert epochs(self.primary, self.secondary) == [number, number]
        assert self.seen.shows(BEFORE, PLACES[0]) == self.seen.shows(AFTER, PLACES[1]) == [True, True]


@contextlib.contextmanager
def cabled(lab: Lab, points: PausePoints, *arguments: str) -> Iterator[Cabled]:
    """A Cabled."""
    secondary = lab.secondary((MIB, MIB), extra_environment=points.environment)
    with Cable(lab.folder / "cable.sock", secondary.socket_path) as cable:
        primary = lab.primary(
            cable.uri, (MIB, MIB), extra_environment=points.environment, extra_arguments=arguments or [PATIENT]
        )
        yield Cabled(lab, cable, secondary, primary)


@pytest.mark.parametrize("point", ["checkpoint.begun", "checkpoint.emptied"])
def test_a_checkpoint_whose_answer_is_lost_is_an_error_and_both_sides_count_it_when_the_link_is_back(
    lab: Lab, point: str
) -> None:
    points = lab.pause_points()
    with cabled(lab, points) as pair:
        points.arm(point)
        checkpoint = begin(pair.primary.checkpoint)
        points.wait_hit(point)
        pair.guest.write(AFTER, PLACES[1])
        pair.cable.cut()
        refusal(checkpoint)
        assert points.is_hit(point)
        assert epochs(pair.primary) == [pair.number]
        points.release(point)
        wait_until(lambda: epochs(pair.secondary) == [pair.number + 1], "the secondary ends its checkpoint")
        only_before_seen(pair.seen)
        pair.cable.mend()
        in_sync(pair.primary)
        assert epochs(pair.primary, pair.secondary) == [pair.number + 1] * 2
        only_before_seen(pair.seen)
        pair.over()


def test_a_link_that_is_lost_before_the_secondary_was_asked_leaves_the_former_checkpoint(lab: Lab) -> None:
    points = lab.pause_points()
    with cabled(lab, points) as pair:
        points.arm("epoch.reached")
        checkpoint = begin(pair.primary.checkpoint)
        points.wait_hit("epoch.reached")
        pair.guest.write(AFTER, PLACES[1])
        pair.cable.cut()
        points.release("epoch.reached")
        refusal(checkpoint)
        wait_until(lambda: pair.secondary.status()["link"]["state"] == "lost", "the secondary notices")
        assert epochs(pair.primary, pair.secondary) == [pair.number] * 2
        nothing_seen(pair.seen)
        # Its disk may have a later write and lack an earlier one.
        refused(pair.secondary, "replication-checkpoint")
        pair.cable.mend()
        pair.over()


def test_a_link_that_is_lost_while_an_epoch_is_held_and_comes_back_ends_the_epoch(lab: Lab) -> None:
    points = lab.pause_points()
    with cabled(lab, points) as pair:
        number = hold(pair.primary)
        pair.guest.write(AFTER, PLACES[1])
        pair.cable.cut()
        wait_until(lambda: pair.primary.status()["link"]["state"] == "lost", "the primary notices")
        pair.cable.mend()
        in_sync(pair.primary)
        refused(pair.primary, "replication-checkpoint-commit", {"epoch": number})
        assert pair.primary.status()["held-epoch"] is None
        nothing_seen(pair.seen)
        assert pair.primary.status()["link"]["state"] == "in-sync"
        pair.over()


def test_a_secondary_that_falls_silent_before_the_commit_makes_it_an_error_and_both_sides_know_later_what_it_did(
    lab: Lab,
) -> None:
    pair = started(lab, primary_arguments=["timeout=1"])
    guest, _, seen = write_before(pair)
    drained(pair.primary)
    number = hold(pair.primary)
    with silent(pair.secondary):
        guest.write(AFTER, PLACES[1])
        refused(pair.primary, "replication-checkpoint-commit", {"epoch": number})
        assert pair.primary.status()["held-epoch"] is None
        for handle in guest.handles:
            handle.flush()
    # It may find the command in its socket, and the link still there.
    in_sync(pair.primary)
    counted = epochs(pair.primary)[0]
    assert epochs(pair.secondary) == [counted]
    if counted == number:
        only_before_seen(seen)
    else:
        assert counted == number - 1
        nothing_seen(seen)
    all_over(pair)


@pytest.mark.parametrize("point", ["checkpoint.begun", "checkpoint.active-emptied", "checkpoint.emptied"])
def test_a_secondary_that_is_killed_in_its_checkpoint_has_all_of_it_after_the_restart(lab: Lab, point: str) -> None:
    points = lab.pause_points()
    pair = started(lab, points=points, primary_arguments=[PATIENT])
    guest, _, _ = write_before(pair)
    number = epochs(pair.primary)[0] + 1
    points.arm(point)
    checkpoint = begin(pair.primary.checkpoint)
    points.wait_hit(point)
    guest.write(AFTER, PLACES[1])
    pair.secondary.kill()
    refusal(checkpoint)
    points.disarm(point)
    pair.secondary.start()
    only_before_seen(Hands(pair.secondary, top_id))
    in_sync(pair.primary)
    assert epochs(pair.primary, pair.secondary) == [number, number]
    all_over(pair)


@pytest.mark.parametrize(
    ("point", "taken"), [("epoch.cut", False), ("epoch.reached", False), ("checkpoint.begun", True)]
)
def test_a_primary_that_is_killed_in_a_checkpoint_leaves_the_former_one_or_all_of_the_new_one(
    lab: Lab, point: str, taken: bool
) -> None:
    points = lab.pause_points()
    pair = started(lab, points=points, primary_arguments=[PATIENT])
    guest, _, seen = write_before(pair)
    former = epochs(pair.primary)[0]
    points.arm(point)
    checkpoint = begin(pair.primary.checkpoint)
    points.wait_hit(point)
    guest.write(AFTER, PLACES[1])
    pair.primary.kill()
    assert isinstance(checkpoint.exception(DEADLINE_S), EOFError | OSError)
    points.disarm(point)
    wait_until(lambda: epochs(pair.secondary) == [former + taken], "the secondary ends what it has begun")
    if taken:
        only_before_seen(seen)
    else:
        nothing_seen(seen)
    pair.primary.start()
    in_sync(pair.primary)
    assert epochs(pair.primary, pair.secondary) == [former + taken] * 2
    all_over(pair)


def test_a_checkpoint_that_meets_a_failover_is_taken_or_refused_but_never_only_said_to_be_taken(lab: Lab) -> None:
    points = lab.pause_points()
    pair = started(lab, points=points, primary_arguments=[PATIENT])
    _, _, seen = write_before(pair)
    drained(pair.primary)
    former = epochs(pair.primary)[0]
    points.arm("guest-read.disk-read")
    inside = begin(pair.secondary.connect(top_id(0)).pread, BLOCK, 0)
    points.wait_hit("guest-read.disk-read")
    failover = begin(pair.secondary.failover)
    late: list[Future[bytearray]] = []

    def is_closed() -> bool:
        late.append(begin(pair.secondary.connect(top_id(1)).pread, BLOCK, 0))
        return not _ends_soon(late[-1])

    wait_until(is_closed, "the failover waits for the read")
    # It has the command lock; the checkpoint gets to it and waits as well.
    checkpoint = begin(pair.primary.checkpoint)
    _ends_soon(checkpoint)
    points.release("guest-read.disk-read")
    failover.result(DEADLINE_S)
    inside.result(DEADLINE_S)
    taken = seen.shows(BEFORE, PLACES[0])
    try:
        said = checkpoint.result(DEADLINE_S)["epoch"] > former
    except QmpError:
        said = False
    assert taken == [said, said]
    assert epochs(pair.primary) == [former + said]


def _ends_soon(future: Future[Any]) -> bool:
    """Give what is expected to wait the time to show that it does not; whether it has ended."""
    return bool(wait({future}, 0.3).done)


# -- numbers and clocks --------------------------------------------------------------------------------------------


def test_both_sides_have_the_same_number_from_the_start_on_and_after_every_restart(lab: Lab) -> None:
    pair = started(lab)
    number = epochs(pair.primary)[0]
    assert epochs(pair.primary, pair.secondary) == [number, number]
    for server, how in (
        (pair.primary, signal.SIGTERM),
        (pair.secondary, signal.SIGTERM),
        (pair.primary, signal.SIGKILL),
        (pair.secondary, signal.SIGKILL),
    ):
        server.restart(how)
        assert epochs(server) == [number]
        in_sync(pair.primary)
        assert epochs(pair.primary, pair.secondary) == [number, number]
        number += 1
        assert pair.primary.checkpoint()["epoch"] == number
        assert epochs(pair.primary, pair.secondary) == [number, number]
    pair.primary.execute("replication-stop")
    assert epochs(pair.primary, pair.secondary) == [number, number]


def test_a_checkpoint_that_the_secondarys_operator_takes_counts_and_the_primarys_next_one_comes_after_it(
    lab: Lab,
) -> None:
    pair = started(lab)
    _, _, seen = write_before(pair)
    drained(pair.primary)
    former = epochs(pair.secondary)[0]
    pair.secondary.checkpoint()
    only_before_seen(seen)
    assert epochs(pair.secondary) == [former + 1]
    pair.secondary.checkpoint()
    number = pair.primary.checkpoint()["epoch"]
    assert number == former + 3
    assert epochs(pair.primary, pair.secondary) == [number, number]


def test_a_commit_after_the_secondarys_operator_took_a_checkpoint_answers_the_number_that_it_has_there(
    lab: Lab,
) -> None:
    pair, _, seen, number = held_between(lab)
    pair.secondary.checkpoint()
    only_before_seen(seen)
    answered = pair.primary.execute("replication-checkpoint-commit", epoch=number)["epoch"]
    assert answered == number + 1
    assert epochs(pair.primary, pair.secondary) == [answered, answered]
    only_before_seen(seen)


@pytest.mark.parametrize("how", ["command", "automatic", "hold"])
def test_the_primarys_checkpoint_starts_a_secondary_and_its_operators_start_is_then_taken_once(
    lab: Lab, how: str
) -> None:
    pair = lab.pair((MIB, MIB), primary_arguments=["checkpoint-interval=0.1"] if how == "automatic" else [PATIENT])
    with pair.secondary.qmp() as qmp:
        guest = Hands(pair.primary, disk_name)
        pair.primary.start_replication()
        in_sync(pair.primary)
        guest.write(BEFORE, PLACES[0])
        if how == "command":
            pair.primary.checkpoint()
        elif how == "hold":
            number = hold(pair.primary)
            assert pair.secondary.status()["stage"] == "none"
            pair.primary.execute("replication-checkpoint-commit", epoch=number)
        qmp.wait_event("REPLICATION_STAGE_CHANGE", lambda data: data["to"] == "running")
    seen = Hands(pair.secondary, top_id)
    wait_until(lambda: seen.shows(BEFORE, PLACES[0]) == [True, True], "it has a checkpoint")
    if how != "automatic":
        assert len(set(epochs(pair.primary, pair.secondary))) == 1
    pair.secondary.restart(signal.SIGKILL)
    seen = Hands(pair.secondary, top_id)
    pair.secondary.start_replication()
    assert "running or done" in refused(pair.secondary, "xen-set-replication", {"enable": True, "primary": False})
    assert seen.shows(BEFORE, PLACES[0]) == [True, True]
    in_sync(pair.primary)
    guest.write(AFTER, PLACES[1])
    pair.primary.checkpoint()
    assert seen.shows(AFTER, PLACES[1]) == [True, True]


def test_the_age_of_the_last_checkpoint_is_shown_and_told_once_each_time_that_it_passes_the_limit(lab: Lab) -> None:
    limit_s = 1.0
    key = f"checkpoint-age-limit={limit_s:g}"
    pair = lab.pair(primary_arguments=[key], secondary_arguments=[key])
    with pair.primary.qmp() as primary, pair.secondary.qmp() as secondary:
        both = (primary, secondary)
        pair.start_replication()
        in_sync(pair.primary)
        for _ in range(2):
            number = epochs(pair.primary)[0]
            for qmp in both:
                data = qmp.wait_event("REPLICATION_CHECKPOINT_AGE")["data"]
                assert (data["epoch"], data["limit"]) == (number, limit_s)
                assert data["age"] > limit_s
                wait_until(lambda qmp=qmp: _age(qmp) > 1.7 * limit_s, "some more looks")  # type: ignore[misc]
                assert "REPLICATION_CHECKPOINT_AGE" not in [event["event"] for event in qmp.events]
            old = [_age(qmp) for qmp in both]
            begun = time.monotonic()
            pair.primary.checkpoint()
            young = [_age(qmp) for qmp in both]
            passed_s = time.monotonic() - begun
            assert all(age <= passed_s + 0.1 for age in young), f"{young} after {passed_s}, was {old}"


def _age(qmp: Qmp) -> float:
    age: float = qmp.execute("query-replication")["checkpoint"]["age"]
    return age


# -- automatic checkpoints that fail --------------------------------------------------------------------------------


def test_an_automatic_checkpoint_that_fails_is_said_once_and_tried_again_and_the_guest_goes_on(lab: Lab) -> None:
    pair = started(lab, primary_arguments=["checkpoint-interval=0.1"])
    guest, _, seen = write_before(pair)
    wait_until(lambda: seen.shows(BEFORE, PLACES[0]) == [True, True], "a checkpoint is taken")
    hidden = pair.secondary.overlay("hidden", 1)
    length = hidden.stat().st_size
    with pair.secondary.qmp() as qmp:
        hidden.open("r+b").truncate(length - 5)
        for _ in range(3):
            qmp.wait_event("REPLICATION_ERROR", lambda data: data["case"] == 6)
    former = epochs(pair.secondary)
    guest.write(AFTER, PLACES[1])
    drained(pair.primary)
    assert refused(pair.secondary, "replication-get-error") == "I/O error occurred"
    pair.primary.wait_said("automatic checkpoint:")
    wait_until(lambda: str(hidden) in pair.primary.stderr(), "the log names the file")
    only_before_seen(seen)
    assert epochs(pair.secondary) == former
    status = pair.primary.status()
    assert (status["stage"], status["link"]["state"]) == ("running", "synchronizing")
    assert str(hidden) in status["link"]["reason"]
    hidden.open("r+b").truncate(length)
    wait_until(lambda: seen.shows(AFTER, PLACES[1]) == [True, True], "a checkpoint is taken again")


def test_after_a_failover_the_primarys_automatic_checkpoints_end_and_its_guest_goes_on(lab: Lab) -> None:
    pair = started(lab, primary_arguments=["checkpoint-interval=0.1", "on-outdated=continue"])
    guest, _, seen = write_before(pair)
    wait_until(lambda: seen.shows(BEFORE, PLACES[0]) == [True, True], "a checkpoint is taken")
    pair.secondary.failover()
    wait_until(lambda: "automatic checkpoint:" in pair.primary.stderr(), "the next one fails")
    last = epochs(pair.secondary)
    assert epochs(pair.primary) == last
    guest.write(AFTER, PLACES[1])
    assert guest.shows(AFTER, PLACES[1]) == [True, True]
    wait_until(lambda: pair.primary.status()["error"], "the primary knows that it writes alone")
    refused(pair.primary, "replication-checkpoint")
    only_before_seen(seen)
    assert epochs(pair.primary, pair.secondary) == last * 2


# -- the control export --------------------------------------------------------------------------------------------


class Inband:
    """A client of the control export."""

    def __init__(self, secondary: Server) -> None:
        self._handle = secondary.connect(".control")
        self._begun = b""
        self._serial = 0
        assert "QMP" in self.message()
        self.execute("qmp_capabilities")

    def send(self, data: bytes) -> None:
        """Anything."""
        self._handle.pwrite(data, 0)

    def message(self) -> dict[str, Any]:
        """The next one that is no event."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            line, newline, rest = self._begun.lstrip().partition(b"\n")
            if not newline:
                self._begun += bytes(self._handle.pread(64 * KIB, 0)).lstrip(b"\n")
                continue
            self._begun = rest
            found: dict[str, Any] = json.loads(line)
            if "event" not in found:
                return found
        raise AssertionError("no message")

    def execute(self, command: str, arguments: object = None) -> Any:
        """The answer; QmpError."""
        self._serial += 1
        request = {"execute": command, "id": self._serial}
        self.send(json.dumps(request if arguments is None else {**request, "arguments": arguments}).encode())
        answer = self.message()
        assert answer["id"] == self._serial
        if "error" in answer:
            raise QmpError(answer["error"]["desc"], answer["error"]["class"])
        return answer["return"]

    def refused(self, command: str, arguments: object = None) -> QmpError:
        """The error."""
        try:
            answer = self.execute(command, arguments)
        except QmpError as error:
            return error
        raise AssertionError(f"{command} {arguments} should have been refused, but returned {answer}")


GENERATION = "0123456789abcdef"
PAIR = {"node": "stranger", "lineage": {}, "disks": {"disk0": MIB, "disk1": MIB}, "epoch": 1, "timeout": 5.0}
SYNC = {"verdict": "complete", "generation": GENERATION, "history": [], "marked": False}


def test_a_stranger_without_the_token_takes_no_checkpoint_and_changes_nothing_over_the_control_export(
    lab: Lab,
) -> None:
    pair = started(lab)
    _, _, seen = write_before(pair)
    drained(pair.primary)
    stranger = Inband(pair.secondary)
    former = epochs(pair.secondary)
    record = (pair.secondary.state / "state.json").read_bytes()
    for token in ("", "x", "0" * 32, pair.secondary.status()["node"], pair.primary.status()["node"]):
        stranger.refused("replication-checkpoint", {"token": token, "epoch": 7})
        stranger.refused("replication-unpair", {"token": token})
        stranger.refused("replication-pair-map", {"token": token, "disk": "disk0", "start": 0})
        for verdict in ("equal", "quick", "full", "complete"):
            stranger.refused("replication-pair-sync", {**SYNC, "token": token, "verdict": verdict})
    lineage = json.loads(record)["lineage"]
    stranger.refused("replication-pair", {**PAIR, "lineage": lineage})
    nothing_seen(seen)
    assert epochs(pair.secondary) == former
    assert (pair.secondary.state / "state.json").read_bytes() == record
    all_over(pair)


def test_what_is_the_operators_is_not_found_on_the_control_export(lab: Lab) -> None:
    pair = started(lab)
    stranger = Inband(pair.secondary)
    for command, arguments in (
        ("quit", None),
        ("replication-stop", None),
        ("replication-stop", {"failover": True}),
        ("replication-start", None),
        ("replication-retry", None),
        ("replication-discard", None),
        ("replication-demote", None),
        ("replication-checkpoint-commit", {"epoch": 1}),
        ("replication-checkpoint-abort", {"epoch": 1}),
        ("xen-set-replication", {"enable": False, "primary": False, "failover": True}),
        ("xen-colo-do-checkpoint", None),
        ("x-colo-lost-heartbeat", None),
        ("job-cancel", {"id": "backup-disk0"}),
        ("job-dismiss", {"id": "backup-disk0"}),
    ):
        assert stranger.refused(command, arguments).cls == "CommandNotFound", command
    stranger.refused("replication-checkpoint")
    stranger.refused("replication-checkpoint", {"hold": True})
    offered = {row["name"] for row in stranger.execute("query-commands")}
    assert not offered & {"quit", "replication-stop", "replication-start", "xen-colo-do-checkpoint"}
    assert stranger.execute("query-replication")["stage"] == "running"
    all_over(pair)


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 61,
    1 << 64,
    10**40,
    1e308,
    "",
    "x" * 5000,
    "\ud800\udc00",
    [],
    [[]],
    {},
    {"": {}},
)
VALID: dict[str, dict[str, Any]] = {
    "replication-pair": PAIR,
    "replication-pair-map": {"token": "t", "disk": "disk0", "start": 0},
    "replication-pair-sync": {**SYNC, "token": "t"},
    "replication-pair-resize": {"token": "t", "disks": {"disk0": 4096}},
    "replication-unpair": {"token": "t"},
    "replication-checkpoint": {"token": "t", "epoch": 1},
}


@pytest.mark.parametrize("command", VALID)
def test_odd_arguments_on_the_control_export_are_errors_and_never_change_a_stage(lab: Lab, command: str) -> None:
    pair = started(lab)
    stranger = Inband(pair.secondary)
    former = epochs(pair.primary, pair.secondary)
    valid = VALID[command]
    for name in valid:
        stranger.refused(command, {key: value for key, value in valid.items() if key != name})
        for odd in ODD:
            stranger.refused(command, {**valid, name: odd})
    for odd in ({**valid, "more": 1}, {**valid, "hold": True}, *ODD):
        stranger.refused(command, {} if odd is None else odd)
    cut_short = json.dumps({"execute": command, "arguments": valid}).encode()[:-1]
    for junk in (b"}", b"\0\xff", b"[1, 2]", b'{"execute": 7}', cut_short + b"]"):
        stranger.send(junk + b"\n")
        assert "error" in stranger.message()
    assert stranger.execute("query-replication")["stage"] == "running"
    assert epochs(pair.primary, pair.secondary) == former
    assert pair.primary.status()["link"]["state"] == "in-sync"
    all_over(pair)
