# SPDX-License-Identifier: BSD-3-Clause
"""Who meets on one block, pair by pair, each with the interleaving forced.

A thread is held either at a pause point inside the process (replication/order/pause.py), or inside the NBD server that
serves the disk below (`HeldEndpoint`), before or after it does a request. Timelines read downwards; what stands on one
line happens at the same time. `lab.CHANCE_S` is not what makes a test right: it is how long a second request that ought
to wait gets to do the wrong thing, so a correct product never fails by it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import nbd
import pytest

from content import KIB, MIB, make_raw, pattern
from heldendpoint import HeldEndpoint
from lab import Lab
from mounts import SmallFolder
from nodes import Pair, Primary, Secondary, Server, disk_name, drained, nbd_refusal, top_id
from pausepoints import PausePoints
from waiting import DEADLINE_S, begin, chance, wait_until

T = TypeVar("T")

BLOCK = 4096
SIZE = 64 * BLOCK

OLD = pattern(1, SIZE)
"""What the disks hold at the first checkpoint."""


@pytest.fixture(autouse=True)
def _nobody_stays_held(lab: Lab) -> Iterator[None]:
    """A test that failed lets the threads go that it holds, so that its processes can end."""
    yield
    for folder in (lab.folder / "pause", lab.folder / "held.points"):
        if folder.is_dir():
            for point in folder.iterdir():
                point.unlink(missing_ok=True)


def end(future: Future[T]) -> T:
    """The result, which must come in time."""
    return future.result(DEADLINE_S)


def overlay_of(content: bytes, *changes: tuple[int, bytes]) -> bytes:
    """`content` with each (offset, data) written over it."""
    changed = bytearray(content)
    for offset, data in changes:
        changed[offset : offset + len(data)] = data
    return bytes(changed)


class Bench:
    """A secondary in `running` over a disk with OLD in it, and both faces connected twice."""

    def __init__(self, lab: Lab, content: bytes = OLD, *, held: bool = False, overlays: Path | None = None) -> None:
        self.points = lab.pause_points()
        self.below: PausePoints
        if held:
            path = make_raw(lab.folder / "below.raw", len(content), content)
            endpoint = lab.start(HeldEndpoint(lab.folder, path))
            self.below = endpoint.points
            self.disk = path
            state = lab.folder / "secondary.state"
            arguments = ["mode=secondary", f"state={state}", f"disk={disk_name(0)}:{endpoint.uri()}"]
            arguments.append(f"top-id={top_id(0)}")
            self.server: Server = lab.start(
                Server(lab.folder, "secondary", arguments, extra_environment=self.points.environment)
            )
        else:
            self.server = lab.secondary(
                [len(content)], contents=[content], overlays=overlays, extra_environment=self.points.environment
            )
            self.disk = lab.folder / f"secondary-{disk_name(0)}.raw"
        self.execute("xen-set-replication", enable=True, primary=False)
        self.connect()

    def connect(self) -> None:
        """Two handles for each face: requests on one handle that libnbd makes synchronously wait for each other."""
        self.guest, self.guest2 = self.server.connect(top_id(0)), self.server.connect(top_id(0))
        self.target, self.target2 = self.server.connect(disk_name(0)), self.server.connect(disk_name(0))

    def execute(self, command: str, **arguments: Any) -> Any:
        return self.server.execute(command, arguments)

    def checkpoint(self) -> None:
        self.execute("xen-colo-do-checkpoint")

    def begin_failover(self) -> Future[Any]:
        """The command that returns when the old primary is fenced off."""
        arguments = {"enable": False, "primary": False, "failover": True}
        return begin(self.server.execute, "xen-set-replication", arguments)

    def wait_done(self) -> None:
        """Until the commit is over."""
        status = self.server.wait_stage("done", "failover-failed")
        assert status["stage"] == "done", status

    def guest_sees(self) -> bytes:
        return bytes(self.guest2.pread(self.guest2.get_size(), 0))

    def target_sees(self) -> bytes:
        return bytes(self.target2.pread(self.target2.get_size(), 0))

    def arm(self, point: str) -> PausePoints:
        """Arm a point of the process, or of the endpoint below; the points that it belongs to."""
        where = self.below if point.partition(".")[0] in ("pread", "pwrite", "zero", "extents") else self.points
        where.arm(point)
        return where


DESTROY: dict[str, Callable[[nbd.NBD, int, int], object]] = {
    "write": lambda face, length, offset: face.pwrite(pattern(77, length), offset),
    "zero": lambda face, length, offset: face.zero(length, offset),
    "trim": lambda face, length, offset: face.trim(length, offset),
}
NEW = {"write": lambda length: pattern(77, length), "zero": bytes, "trim": bytes}

# -- guest read against target write -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", DESTROY)
@pytest.mark.parametrize("point", ["pread.before", "pread.after", "guest-read.disk-read"])
def test_a_guest_read_that_a_target_request_overtakes_sees_the_checkpoint(lab: Lab, point: str, how: str) -> None:
    """The read finds the block in no overlay, and the disk changes before it gets there.

        guest read 3 blocks                    target write/zero/trim of the middle one
        active, hidden: not there
        held before reading the disk
                                               copies OLD to hidden, sets the bit
                                               changes the disk
        reads the disk: NEW
        looks at hidden again: has it, OLD

    Wrong: OLD NEW OLD. Right: OLD OLD OLD.
    """
    bench = Bench(lab, held=True)
    points = bench.arm(point)
    read = begin(bench.guest.pread, 3 * BLOCK, 8 * BLOCK)
    points.wait_hit(point)
    DESTROY[how](bench.target, BLOCK, 9 * BLOCK)
    points.release(point)
    assert end(read) == OLD[8 * BLOCK : 11 * BLOCK]
    assert bench.guest_sees() == OLD
    assert bench.target_sees() == overlay_of(OLD, (9 * BLOCK, NEW[how](BLOCK)))


def test_a_guest_read_of_zeroes_that_a_target_write_overtakes_reads_zeroes(lab: Lab) -> None:
    """As above where hidden only marks the block as zeroes. Wrong: NEW. Right: zeroes, also at odd offsets."""
    bench = Bench(lab, bytes(SIZE), held=True)
    points = bench.arm("pread.before")
    read = begin(bench.guest.pread, 5000, 8 * BLOCK + 1000)
    points.wait_hit("pread.before")
    bench.target.pwrite(pattern(7, 700), 8 * BLOCK + 3900)
    points.release("pread.before")
    assert end(read) == bytes(5000)
    assert bench.guest_sees() == bytes(SIZE)


@pytest.mark.parametrize("how", ["zero", "trim"])
def test_guest_extents_that_a_target_request_overtakes_do_not_call_data_zeroes(lab: Lab, how: str) -> None:
    """A client that copies by extents would lose the block.

        guest extents                          target zero/trim of block 9
        active, hidden: not there
        held before asking the disk
                                               copies OLD to hidden, changes the disk
        the disk says: zeroes
        looks at hidden again: data

    Wrong: block 9 is a hole. Right: no block is.
    """
    bench = Bench(lab, held=True)
    points = bench.arm("extents.before")
    found: list[int] = []

    def got(_context: str, _offset: int, entries: list[int], _error: object) -> int:
        found.extend(entries)
        return 0

    asked = begin(bench.guest.block_status, 4 * BLOCK, 8 * BLOCK, got)
    points.wait_hit("extents.before")
    DESTROY[how](bench.target, BLOCK, 9 * BLOCK)
    points.release("extents.before")
    end(asked)
    assert found
    assert not any(flags & nbd.STATE_ZERO for flags in found[1::2]), found
    assert sum(found[::2]) >= 2 * BLOCK


# -- target write against target write ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point",
    [
        "pread.before",
        "copy-before-write.read",
        "copy-before-write.before-mark",
        "target-write.preserved",
        "pwrite.before",
        "target-write.written",
    ],
)
def test_two_target_writes_to_one_block_preserve_the_checkpoint_once(lab: Lab, point: str) -> None:
    """The second to come must not copy the first one's data as if it were the checkpoint's.

        target write A: sector 0               target write B: sector 5
        hidden: not there
        held before or after it copies
                                               must wait for A, or find the bit set
                                               wrong: copies, sets the bit, changes the disk
        (wrong:) reads B's data, copies that
        changes the disk

    Wrong: the guest face has B's sector (or A's). Right: the guest face has OLD, the target face both.
    """
    bench = Bench(lab, held=True)
    a, b = pattern(10, 512), pattern(11, 512)
    points = bench.arm(point)
    first = begin(bench.target.pwrite, a, 9 * BLOCK)
    points.wait_hit(point)
    second = begin(bench.target2.pwrite, b, 9 * BLOCK + 5 * 512)
    chance(second)
    points.release(point)
    end(first)
    end(second)
    assert bench.guest_sees() == OLD
    both = overlay_of(OLD, (9 * BLOCK, a), (9 * BLOCK + 5 * 512, b))
    assert bench.target_sees() == both
    bench.checkpoint()
    assert bench.guest_sees() == both


@pytest.mark.parametrize("how", ["zero", "trim"])
@pytest.mark.parametrize(("offset", "length"), [(8192, 4096), (8192 + 512, 1024), (5000, 20000), (0, SIZE), (4095, 2)])
def test_zero_and_trim_on_the_target_face_preserve_the_checkpoint(lab: Lab, how: str, offset: int, length: int) -> None:
    """Zeroes destroy data like a write. Held between copy and change: the guest face has OLD then, and afterwards."""
    bench = Bench(lab)
    bench.points.arm("target-write.preserved")
    change = begin(DESTROY[how], bench.target, length, offset)
    bench.points.wait_hit("target-write.preserved")
    assert bench.guest_sees() == OLD
    bench.points.release("target-write.preserved")
    end(change)
    assert bench.guest_sees() == OLD
    assert bench.target_sees() == overlay_of(OLD, (offset, bytes(length)))


@pytest.mark.parametrize("how", ["zero", "trim"])
@pytest.mark.parametrize(("offset", "length"), [(8192, 4096), (8192 + 512, 1024), (5000, 20000), (0, SIZE), (4095, 2)])
def test_zero_and_trim_on_the_guest_face_leave_the_secondary_disk_alone(
    lab: Lab, how: str, offset: int, length: int
) -> None:
    """The guest sees zeroes in exactly that range, also around what it and the primary wrote; the disk does not."""
    bench = Bench(lab)
    bench.guest.pwrite(pattern(5, 3000), 9000)
    bench.target.pwrite(pattern(6, 3000), 4000)
    mine = overlay_of(OLD, (9000, pattern(5, 3000)))
    DESTROY[how](bench.guest, length, offset)
    assert bench.guest_sees() == overlay_of(mine, (offset, bytes(length)))
    assert bench.target_sees() == overlay_of(OLD, (4000, pattern(6, 3000)))
    bench.checkpoint()
    assert bench.guest_sees() == bench.target_sees()


# -- guest write against guest write and target write ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((100, 512), (2000, 100), id="two-parts-of-one-block"),
        pytest.param((0, BLOCK + 100), (BLOCK + 200, 2 * BLOCK - 200), id="two-edges-in-one-block"),
        pytest.param((BLOCK - 10, 20), (2 * BLOCK - 10, 20), id="across-both-ends-of-a-block"),
        pytest.param((300, 1000), (800, 1000), id="overlapping"),
    ],
)
@pytest.mark.parametrize("how", ["write", "zero"])
@pytest.mark.parametrize("point", ["guest-write.completed", "guest-write.before-mark"])
def test_unaligned_guest_writes_that_meet_in_one_block_both_stay(
    lab: Lab, first: tuple[int, int], second: tuple[int, int], how: str, point: str
) -> None:
    """Each completes the block with what lies around it.

        guest write A: part of the block       guest write B: another part of it
        reads the rest of the block: OLD
        held
                                               must wait; wrong: completes with OLD, writes, sets the bit
        writes A and OLD around it

    Wrong: B is gone under A's OLD. Right: A and B, and OLD around them.
    """
    bench = Bench(lab)
    a = pattern(20, first[1])
    bench.points.arm(point)
    one = begin(bench.guest.pwrite, a, first[0])
    bench.points.wait_hit(point)
    two = begin(DESTROY[how], bench.guest2, second[1], second[0])
    chance(two)
    bench.points.release(point)
    end(one)
    end(two)
    assert bench.guest_sees() == overlay_of(OLD, (first[0], a), (second[0], NEW[how](second[1])))
    assert bench.target_sees() == OLD


@pytest.mark.parametrize("how", DESTROY)
@pytest.mark.parametrize("point", ["pread.before", "pread.after", "guest-write.completed", "guest-write.before-mark"])
def test_an_unaligned_guest_write_that_a_target_request_overtakes_is_completed_from_the_checkpoint(
    lab: Lab, point: str, how: str
) -> None:
    """The guest write needs the rest of its block, which the primary overwrites meanwhile.

        guest write: 100 bytes of block 9      target write/zero/trim of block 9
        held before or after it reads the rest
                                               copies OLD to hidden, changes the disk
        reads the disk: NEW
        must take the rest from hidden: OLD

    Wrong: NEW around the 100 bytes. Right: OLD around them.
    """
    bench = Bench(lab, held=True)
    points = bench.arm(point)
    mine = pattern(30, 100)
    write = begin(bench.guest.pwrite, mine, 9 * BLOCK + 700)
    points.wait_hit(point)
    DESTROY[how](bench.target, BLOCK, 9 * BLOCK)
    points.release(point)
    end(write)
    assert bench.guest_sees() == overlay_of(OLD, (9 * BLOCK + 700, mine))


# -- checkpoint, planned stop and failover against I/O in flight ---------------------------------------------------

IN_FLIGHT = [
    "copy-before-write.read",
    "copy-before-write.before-mark",
    "target-write.preserved",
    "target-write.written",
]


@pytest.mark.parametrize("point", IN_FLIGHT)
def test_a_checkpoint_waits_for_the_target_write_in_flight(lab: Lab, point: str) -> None:
    """A checkpoint between copy and change would make half a write the checkpoint, or leave a stale copy behind.

        target write                           checkpoint
        held before, between or after copy and change
                                               waits; wrong: empties hidden, is done
        changes the disk, is answered
                                               empties hidden

    Wrong: OLD on the guest face, or NEW there although the write came after the checkpoint. Right: NEW, which was
    answered before the checkpoint was.
    """
    bench = Bench(lab)
    new = pattern(40, BLOCK)
    bench.points.arm(point)
    write = begin(bench.target.pwrite, new, 9 * BLOCK)
    bench.points.wait_hit(point)
    checkpoint = begin(bench.checkpoint)
    assert not chance(checkpoint)
    bench.points.release(point)
    end(write)
    end(checkpoint)
    assert bench.guest_sees() == overlay_of(OLD, (9 * BLOCK, new))
    bench.target.pwrite(OLD[:BLOCK], 9 * BLOCK)
    assert bench.guest_sees() == overlay_of(OLD, (9 * BLOCK, new))


@pytest.mark.parametrize("point", ["guest-write.completed", "guest-write.before-mark"])
def test_a_checkpoint_waits_for_the_guest_write_in_flight_and_drops_it_whole(lab: Lab, point: str) -> None:
    """A guest write that sets its bit after active was emptied would show an old guest's data in the new checkpoint.

    Wrong: the guest face has the write after the checkpoint. Right: it equals the secondary disk.
    """
    bench = Bench(lab)
    bench.points.arm(point)
    write = begin(bench.guest.pwrite, pattern(41, 1000), 9 * BLOCK + 500)
    bench.points.wait_hit(point)
    checkpoint = begin(bench.checkpoint)
    assert not chance(checkpoint)
    bench.points.release(point)
    end(write)
    end(checkpoint)
    assert bench.guest_sees() == OLD


def test_a_checkpoint_does_not_split_a_guest_read(lab: Lab) -> None:
    """A read that spans a checkpoint must be of one side of it.

        guest read 2 blocks, the second        checkpoint, after the target wrote both
        is in hidden
        held after reading the first
                                               waits; wrong: empties hidden
        reads the second

    Wrong: OLD NEW. Right: OLD OLD.
    """
    bench = Bench(lab)
    bench.target.pwrite(pattern(42, BLOCK), 10 * BLOCK)
    bench.points.arm("guest-read.disk-read")
    read = begin(bench.guest.pread, 2 * BLOCK, 9 * BLOCK)
    bench.points.wait_hit("guest-read.disk-read")
    checkpoint = begin(bench.checkpoint)
    assert not chance(checkpoint)
    bench.points.release("guest-read.disk-read")
    assert end(read) == OLD[9 * BLOCK : 11 * BLOCK]
    end(checkpoint)
    assert bench.guest_sees() == bench.target_sees()


@pytest.mark.parametrize("point", IN_FLIGHT)
def test_a_planned_stop_finishes_the_target_write_in_flight_and_refuses_later_ones(lab: Lab, point: str) -> None:
    """A and B come before and after the instant of the stop.

        target write A          planned stop            target write B
        held
                                waits for A
        is answered
                                stage done is saved,
                                held with the gate shut
                                                        waits at the gate
                                done
                                                        refused

    Wrong: B on the disk, or A refused although a part of it is there. Right: A answered, B ESHUTDOWN, disk OLD with A,
    and the guest face is the disk.
    """
    bench = Bench(lab)
    a = pattern(43, 1000)
    bench.points.arm(point)
    one = begin(bench.target.pwrite, a, 9 * BLOCK + 100)
    bench.points.wait_hit(point)
    bench.points.arm("stop.entered")
    stop = begin(bench.server.execute, "xen-set-replication", {"enable": False, "primary": False})
    assert not chance(stop)
    bench.points.release(point)
    end(one)
    bench.points.wait_hit("stop.entered")
    two = begin(bench.target2.pwrite, pattern(44, BLOCK), 20 * BLOCK)
    assert not chance(two)
    bench.points.release("stop.entered")
    end(stop)
    with nbd_refusal(errno.ESHUTDOWN):
        end(two)
    assert bench.disk.read_bytes() == overlay_of(OLD, (9 * BLOCK + 100, a))
    assert bench.guest_sees() == bench.disk.read_bytes()


@pytest.mark.parametrize("point", IN_FLIGHT)
def test_failover_undoes_the_target_write_in_flight_and_refuses_later_ones(lab: Lab, point: str) -> None:
    """As the planned stop, but the disk becomes the last checkpoint plus the guest's writes: without A and B. And it
    waits for A half a second at most: then the old primary is kept out all the same.

        target write A          failover                target write B
        held
                                waits for A
                                waits no longer, held
                                                        refused
                                goes on
        is answered
                                the commit undoes A
    """
    bench = Bench(lab)
    mine = pattern(45, 300)
    bench.guest.pwrite(mine, 9 * BLOCK + 1000)
    bench.points.arm(point)
    one = begin(bench.target.pwrite, pattern(46, 2 * BLOCK), 9 * BLOCK - 100)
    bench.points.wait_hit(point)
    bench.points.arm("failover.entered")
    failover = bench.begin_failover()
    bench.points.wait_hit("failover.entered")
    assert not chance(one)
    with nbd_refusal(errno.ESHUTDOWN):
        bench.target2.pwrite(pattern(47, BLOCK), 20 * BLOCK)
    bench.points.release("failover.entered")
    end(failover)
    bench.points.release(point)
    end(one)
    bench.wait_done()
    assert bench.guest_sees() == overlay_of(OLD, (9 * BLOCK + 1000, mine))
    assert bench.disk.read_bytes() == overlay_of(OLD, (9 * BLOCK + 1000, mine))


def test_a_stream_of_target_writes_does_not_starve_a_checkpoint(lab: Lab) -> None:
    """Four connections write without a gap over a disk that takes 20 ms a request: there is always one in flight.

    Wrong: the checkpoint never finds the gate empty. Right: ten in a row come through, each within its deadline, and
    the writers go on.
    """
    path = make_raw(lab.folder / "slow.raw", SIZE, OLD)
    slow = lab.endpoint(path=path, delay={"write": "20ms", "read": "20ms"})
    arguments = ["mode=secondary", f"state={lab.folder / 'state'}", f"disk={disk_name(0)}:{slow.uri()}", "top-id=top0"]
    server = lab.start(Server(lab.folder, "secondary", arguments))
    server.execute("xen-set-replication", {"enable": True, "primary": False})
    written = [0] * 4
    enough = threading.Event()

    def writer(number: int) -> None:
        face = server.connect(disk_name(0))
        while not enough.is_set():
            face.pwrite(pattern(written[number], BLOCK), (16 * number + written[number] % 16) * BLOCK)
            written[number] += 1

    writers = [begin(writer, number) for number in range(4)]
    try:
        for _ in range(10):
            before = list(written)
            end(begin(server.execute, "xen-colo-do-checkpoint"))
            wait_until(
                lambda low=before: all(new > old for new, old in zip(written, low, strict=True)), "writers go on"
            )
    finally:
        enough.set()
    for future in writers:
        end(future)


# -- commit against guest I/O ------------------------------------------------------------------------------------

BOTH, HIDDEN, ACTIVE, PART = 9, 12, 15, 18
"""Block numbers: in active and hidden, in hidden, in active, part of it written by the guest over a hidden one."""


def dirty(bench: Bench) -> bytes:
    """Have blocks in every combination of overlays; what the disk must be after failover."""
    mine = [(number * BLOCK, pattern(50 + number, BLOCK)) for number in (BOTH, ACTIVE)]
    mine.append((PART * BLOCK + 1000, pattern(49, 1000)))
    for number in (BOTH, HIDDEN, PART):
        bench.target.pwrite(pattern(90 + number, BLOCK), number * BLOCK)
    for offset, data in mine:
        bench.guest.pwrite(data, offset)
    # A block that the guest zeroed over hidden's data: zeroes come down, not hidden's older data.
    bench.target.pwrite(pattern(89, BLOCK), 21 * BLOCK)
    bench.guest.zero(BLOCK, 21 * BLOCK)
    return overlay_of(OLD, *mine, (21 * BLOCK, bytes(BLOCK)))


COMMIT_POINTS = ["commit.written", "commit.hidden-forgotten"]


@pytest.mark.parametrize("how", DESTROY)
@pytest.mark.parametrize(("offset", "length"), [(0, BLOCK), (100, 1000)], ids=["whole-block", "part"])
@pytest.mark.parametrize("point", COMMIT_POINTS)
def test_a_guest_write_that_meets_the_commit_in_one_block_is_not_lost(
    lab: Lab, point: str, offset: int, length: int, how: str
) -> None:
    """The block is in active and in hidden.

        commit                                 guest write/zero/trim of the same block
        writes active's data down
        held (before or after it forgets hidden)
                                               must wait; wrong: writes into active, which still holds the block
        forgets active's bit
                                               right: writes to the disk

    Wrong: the guest's older write. Right: this one, on the face at once and on the disk when the commit is done.
    """
    bench = Bench(lab)
    content = dirty(bench)
    bench.points.arm(point)
    end(bench.begin_failover())
    bench.points.wait_hit(point)
    change = begin(DESTROY[how], bench.guest, length, BOTH * BLOCK + offset)
    chance(change)
    bench.points.release(point)
    end(change)
    content = overlay_of(content, (BOTH * BLOCK + offset, NEW[how](length)))
    assert bench.guest_sees() == content
    bench.wait_done()
    assert bench.guest_sees() == content
    assert bench.disk.read_bytes() == content


WHOLE = SIZE // 2
"""What is committed as a whole: clusters that one overlay holds (SIZE is two of them)."""


@pytest.mark.parametrize("kill", [False, True], ids=["", "killed"])
@pytest.mark.parametrize("how", DESTROY)
@pytest.mark.parametrize("where", ["active", "hidden"])
@pytest.mark.parametrize("point", ["commit.locked", *COMMIT_POINTS])
def test_a_guest_write_that_meets_the_commit_of_whole_clusters_is_not_lost(
    lab: Lab, point: str, where: str, how: str, kill: bool
) -> None:
    """As above, where a whole cluster is in active or in hidden, so that no list of runs is made.

        commit                                 guest write/zero/trim of a part
        finds one source, locks
        held (before it looks again, after it has written, after it has let go of hidden)
                                               must wait; wrong: writes into active, which is then let go of,
                                               or into the disk, and is overwritten
        copies, lets go
                                               right: writes to the disk

    Killed while the guest's write waits, it may be lost, because it was not answered, but nothing else may.
    """
    bench = Bench(lab)
    content = OLD
    if where == "active":
        mine = (0, pattern(91, WHOLE))
        bench.guest.pwrite(mine[1], 0)
        content = overlay_of(OLD, mine)
    else:
        bench.target.pwrite(pattern(92, WHOLE), 0)
    bench.points.arm(point)
    end(bench.begin_failover())
    bench.points.wait_hit(point)
    assert bench.guest_sees() == content
    change = begin(DESTROY[how], bench.guest, 1000, 7 * BLOCK + 100)
    assert not chance(change), "the guest's write must wait for the commit"
    after = overlay_of(content, (7 * BLOCK + 100, NEW[how](1000)))
    if kill:
        bench.server.kill()
        bench.points.disarm(point)
        bench.server.start()
        bench.connect()
        bench.wait_done()
        assert bench.guest_sees() in (content, after)
    else:
        bench.points.release(point)
        end(change)
        assert bench.guest_sees() == after
        bench.wait_done()
        assert bench.guest_sees() == after
    assert bench.disk.read_bytes() == bench.guest_sees()


@pytest.mark.parametrize("point", ["failover.entered", *COMMIT_POINTS])
def test_the_guest_reads_the_same_before_during_and_after_a_commit(lab: Lab, point: str) -> None:
    """Held with one image already let go of: the guest face must not show hidden's data under active's, nor the old
    primary's data under hidden's. Wrong: either. Right: the checkpoint plus the guest's writes, all the time."""
    bench = Bench(lab)
    content = dirty(bench)
    assert bench.guest_sees() == content
    bench.points.arm(point)
    failover = bench.begin_failover()
    bench.points.wait_hit(point)
    assert bench.guest_sees() == content
    bench.points.release(point)
    end(failover)
    bench.wait_done()
    assert bench.guest_sees() == content


@pytest.mark.parametrize("point", ["failover.entered", *COMMIT_POINTS])
def test_a_commit_goes_on_exactly_after_a_kill(lab: Lab, point: str) -> None:
    """Killed with the block written down and hidden forgotten, or neither, or one of them; started again, held and
    killed at the same point a second time after the guest wrote.

    Wrong: a block of hidden over the guest's, or one that the first process wrote over the guest's newer one.
    Right: the checkpoint plus all answered guest writes.
    """
    bench = Bench(lab)
    content = dirty(bench)
    bench.points.arm(point)
    failover = bench.begin_failover()
    bench.points.wait_hit(point)
    if point == "failover.entered":
        bench.server.kill()
        with pytest.raises((EOFError, ConnectionError)):
            end(failover)
    else:
        end(failover)  # its answer may come after the commit has reached the point
        bench.server.kill()
    bench.points.disarm(point)
    # The second process has no failover command, so `failover.entered` is behind it.
    second = COMMIT_POINTS[0] if point == "failover.entered" else point
    bench.points.arm(second)
    bench.server.start()
    bench.connect()
    bench.points.wait_hit(second)
    assert bench.guest_sees() == content
    change = begin(bench.guest.pwrite, pattern(60, 1000), ACTIVE * BLOCK + 100)
    if chance(change):  # a block outside the range that the commit has in hand
        end(change)
        content = overlay_of(content, (ACTIVE * BLOCK + 100, pattern(60, 1000)))
    bench.guest2.pwrite(pattern(61, 1000), 40 * BLOCK + 100)
    content = overlay_of(content, (40 * BLOCK + 100, pattern(61, 1000)))
    bench.server.kill()
    bench.points.disarm(second)
    bench.server.start()
    bench.connect()
    bench.wait_done()
    assert bench.guest_sees() in (content, overlay_of(content, (ACTIVE * BLOCK + 100, pattern(60, 1000))))
    assert bench.disk.read_bytes() == bench.guest_sees()


# -- overlapping writes on the primary ---------------------------------------------------------------------------

FIRST, SECOND = (0, BLOCK), (BLOCK // 2, BLOCK)


def same_on_both(lab: Lab, pair: Pair) -> bytes:
    """After a barrier, the content that both disks have."""
    pair.primary.checkpoint()
    local = pair.primary.disks[0].read_bytes()
    assert pair.secondary.disks[0].read_bytes() == local
    return local


@pytest.mark.parametrize("how", DESTROY)
@pytest.mark.parametrize("point", ["primary-write.marked", "primary-write.written", "forward.send"])
@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_overlapping_writes_on_the_primary_reach_both_disks_in_one_order(
    lab: Lab, protocol: str, point: str, how: str
) -> None:
    """Two requests in flight that share half a block.

        guest write A                          guest write/zero/trim B
        held before or after the local write,
        or before it is sent
                                               must wait; wrong: writes locally and is queued
        writes locally, is queued

    Wrong: A over B on one disk, B over A on the other. Right: one order on both.
    """
    points = lab.pause_points()
    pair = lab.pair(
        [SIZE],
        contents=[OLD],
        primary_arguments=[f"protocol={protocol}"],
        primary_options={"extra_environment": points.environment},
    )
    pair.start_replication()
    one, two = pair.primary.connect(disk_name(0)), pair.primary.connect(disk_name(0))
    a = pattern(70, FIRST[1])
    points.arm(point)
    first = begin(one.pwrite, a, FIRST[0])
    points.wait_hit(point)
    second = begin(DESTROY[how], two, SECOND[1], SECOND[0])
    chance(second)
    points.release(point)
    end(first)
    end(second)
    b = (SECOND[0], NEW[how](SECOND[1]))
    assert same_on_both(lab, pair) == overlay_of(OLD, (FIRST[0], a), b)


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_secondary_that_reorders_gets_overlapping_writes_one_after_the_other(lab: Lab, protocol: str) -> None:
    """An NBD server may do requests in flight in any order; this one holds A and would do B first.

        link                                   the secondary's server
        sends A                                holds A
        must not send B; wrong: sends B        (wrong:) does B
                                               does A

    Wrong: A over B there, B over A here. Right: B over A on both. A write that meets neither overtakes both.
    """
    path = make_raw(lab.folder / "there.raw", SIZE, OLD)
    endpoint = lab.start(HeldEndpoint(lab.folder, path))
    primary = lab.start(
        Primary(lab.folder, endpoint.uri(), [SIZE], contents=[OLD], extra_arguments=[f"protocol={protocol}"])
    )
    primary.start_replication()
    faces = [primary.connect(disk_name(0)) for _ in range(3)]
    a, b, c = pattern(71, FIRST[1]), pattern(72, SECOND[1]), pattern(73, BLOCK)
    endpoint.points.arm("pwrite.before")
    first = begin(faces[0].pwrite, a, FIRST[0])
    endpoint.points.wait_hit("pwrite.before")
    third = begin(faces[2].pwrite, c, 30 * BLOCK)
    wait_until(lambda: path.read_bytes()[30 * BLOCK : 31 * BLOCK] == c, "a write that overlaps nothing gets through")
    second = begin(faces[1].pwrite, b, SECOND[0])
    chance(second)
    endpoint.points.release("pwrite.before")
    for future in (first, second, third):
        end(future)
    primary.checkpoint()
    expected = overlay_of(OLD, (FIRST[0], a), (SECOND[0], b), (30 * BLOCK, c))
    assert primary.disks[0].read_bytes() == expected
    assert path.read_bytes() == expected


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_slow_secondary_disk_gets_overlapping_writes_in_the_order_of_the_primary(lab: Lab, protocol: str) -> None:
    """The same with the whole pair, and the disk below the secondary holding A: neither the link nor the target face
    lets B past it. Wrong: the disks differ. Right: B over A on both, and the guest face still OLD."""
    bench = Bench(lab, held=True)
    uri = bench.server.uri(disk_name(0))
    primary = lab.start(Primary(lab.folder, uri, [SIZE], contents=[OLD], extra_arguments=[f"protocol={protocol}"]))
    primary.start_replication()
    one, two = primary.connect(disk_name(0)), primary.connect(disk_name(0))
    a, b = pattern(74, FIRST[1]), pattern(75, SECOND[1])
    bench.below.arm("pwrite.before")
    first = begin(one.pwrite, a, FIRST[0])
    bench.below.wait_hit("pwrite.before")
    second = begin(two.pwrite, b, SECOND[0])
    chance(second)
    bench.below.release("pwrite.before")
    end(first)
    end(second)
    drained(primary)
    expected = overlay_of(OLD, (FIRST[0], a), (SECOND[0], b))
    assert primary.disks[0].read_bytes() == expected
    assert bench.target_sees() == expected
    assert bench.guest_sees() == OLD


# -- stale overlay space -----------------------------------------------------------------------------------------

WIDE = 24 * MIB


def space_of(overlay: Path) -> int:
    """Bytes that the overlay's data file takes."""
    return os.stat(f"{overlay.with_suffix('.data')}").st_blocks * 512


def fill(bench: Bench, kind: str, offset: int, length: int) -> None:
    """Have `kind` hold a range, of which the disk has something else than zeroes below."""
    face = bench.guest if kind == "active" else bench.target
    for at in range(offset, offset + length, MIB):
        face.pwrite(pattern(at, MIB), at)


def wide_bench(lab: Lab) -> Bench:
    """A disk large enough for several steps of reclaim, on which the primary's data is at the first checkpoint."""
    return Bench(lab, pattern(3, MIB) * (WIDE // MIB))


@pytest.mark.parametrize(
    ("kind", "point"), [("active", "guest-write.before-mark"), ("hidden", "copy-before-write.before-mark")]
)
def test_reclaim_spares_data_that_has_no_bit_yet(lab: Lab, kind: str, point: str) -> None:
    """After a checkpoint all space of the overlay is stale, and one write is between its data and its bit.

        write of a block                       reclaim
        stores the data
        held
                                               gives back the others' space
                                               must leave this range alone; wrong: punches a hole
        sets the bit

    Wrong: the block reads as zeroes. Right: what was written (guest face), what was preserved (target write).
    """
    bench = wide_bench(lab)
    before = bench.guest_sees()
    fill(bench, kind, 0, MIB)
    fill(bench, kind, 20 * MIB, MIB)
    bench.checkpoint()
    before = bench.target_sees()
    overlay = _overlay(bench, kind)
    bench.points.arm(point)
    at = 20 * MIB + 5 * BLOCK
    face = bench.guest if kind == "active" else bench.target
    write = begin(face.pwrite, pattern(80, BLOCK), at)
    bench.points.wait_hit(point)
    wait_until(lambda: space_of(overlay) <= MIB, "the space of the other range is given back")
    bench.points.release(point)
    end(write)
    expected = overlay_of(before, (at, pattern(80, BLOCK))) if kind == "active" else before
    assert bench.guest_sees() == expected


def _overlay(bench: Bench, kind: str) -> Path:
    assert isinstance(bench.server, Secondary)
    return bench.server.overlay(kind)


@pytest.mark.parametrize(
    ("kind", "point"), [("active", "guest-write.before-mark"), ("hidden", "copy-before-write.before-mark")]
)
def test_a_range_in_use_does_not_keep_reclaim_from_the_rest(lab: Lab, kind: str, point: str) -> None:
    """As above, with the held write in the first range that reclaim comes to. Wrong: reclaim ends there, and the
    space of all the others stays taken until another checkpoint. Right: only the range in use keeps its space."""
    bench = wide_bench(lab)
    for at in range(0, WIDE, 4 * MIB):
        fill(bench, kind, at, MIB)
    bench.checkpoint()
    overlay = _overlay(bench, kind)
    bench.points.arm(point)
    face = bench.guest if kind == "active" else bench.target
    write = begin(face.pwrite, pattern(80, BLOCK), 5 * BLOCK)
    bench.points.wait_hit(point)
    try:
        wait_until(lambda: space_of(overlay) <= MIB, "the space of the free ranges is given back")
    finally:
        bench.points.release(point)
        end(write)


@pytest.mark.parametrize("kind", ["active", "hidden"])
def test_reclaim_gives_back_stale_blocks_between_ones_in_use(lab: Lab, kind: str) -> None:
    """Every second block is written again after the checkpoint, so a stale one lies beside each that counts.

    Wrong: a block in use is punched. Right: the face reads exactly, and half the space comes back.
    """
    bench = wide_bench(lab)
    fill(bench, kind, 0, 2 * MIB)
    bench.checkpoint()
    expected = bench.target_sees()
    face = bench.guest if kind == "active" else bench.target
    for at in range(0, 2 * MIB, 2 * BLOCK):
        face.pwrite(pattern(at + 1, BLOCK), at)
        if kind == "active":
            expected = overlay_of(expected, (at, pattern(at + 1, BLOCK)))
    wait_until(lambda: space_of(_overlay(bench, kind)) <= MIB + 64 * KIB, "the stale half is given back")
    assert bench.guest_sees() == expected


# -- full overlay file system --------------------------------------------------------------------------------------


@pytest.fixture
def small_tmpfs(small_folder: Callable[[int], SmallFolder]) -> Path:
    """A tmpfs of 8 MiB, where the overlays are."""
    return small_folder(8 * MIB).folder


def free_of(folder: Path) -> int:
    """Free bytes, in whole MiB."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_bsize // MIB * MIB


OVERLAY = {"active": lambda bench: bench.guest, "hidden": lambda bench: bench.target}


@pytest.mark.parametrize("then", OVERLAY)
@pytest.mark.parametrize("first", OVERLAY)
def test_a_full_tmpfs_takes_writes_again_after_a_checkpoint(lab: Lab, small_tmpfs: Path, first: str, then: str) -> None:
    """Everything that fills the file system is stale after a checkpoint, and the next write needs that space before
    it has been given back in the background, in the same overlay or in the other one.

    Wrong: ENOSPC (active), case 3 (hidden). Right: it goes on, three times in a row, and the guest face is exact.
    """
    bench = Bench(lab, pattern(3, MIB) * (WIDE // MIB), overlays=small_tmpfs)
    room = free_of(small_tmpfs)
    assert room >= 4 * MIB
    for turn in range(3):
        at = turn * 8 * MIB
        fill(bench, first, at, room)
        assert free_of(small_tmpfs) < MIB
        bench.checkpoint()
        expected = bytearray(bench.target_sees())
        offset = (at + 8 * MIB) % WIDE
        fill(bench, then, offset, MIB)
        if then == "active":
            expected[offset : offset + MIB] = pattern(offset, MIB)
        assert bench.guest_sees() == expected
        bench.checkpoint()
        wait_until(lambda: free_of(small_tmpfs) >= room - MIB, "stale space is given back")
    assert bench.execute("query-xen-replication-status") == {"error": False}


def test_a_write_that_straddles_stale_space_on_a_full_tmpfs_finds_room(lab: Lab, small_tmpfs: Path) -> None:
    """The write's own range is a part of the only stale extent: its lock must not keep the rest from being given
    back. Wrong: ENOSPC. Right: it goes on."""
    bench = Bench(lab, pattern(3, MIB) * (WIDE // MIB), overlays=small_tmpfs)
    room = free_of(small_tmpfs)
    # All but 2 MiB are in use again after the checkpoint.
    for at in range(0, room - 2 * MIB, MIB):
        bench.guest.pwrite(pattern(at, MIB), 12 * MIB + at)
    bench.guest.pwrite(pattern(1, 2 * MIB), 0)
    assert free_of(small_tmpfs) < MIB
    bench.checkpoint()
    for at in range(0, room - 2 * MIB, MIB):
        bench.guest.pwrite(pattern(at + 1, MIB), 12 * MIB + at)
    # Its first 256 KiB lie in stale space; the rest needs more than what is free.
    at = 2 * MIB - 256 * KIB
    length = MIB + 256 * KIB
    bench.guest.pwrite(pattern(2, length), at)
    assert bytes(bench.guest.pread(length, at)) == pattern(2, length)


def test_a_tmpfs_that_is_really_full_fails_the_write_and_keeps_the_checkpoint(lab: Lab, small_tmpfs: Path) -> None:
    """Active full: the guest's own error, and a checkpoint helps. Hidden full: case 3, the target write fails, the
    disk and the guest face keep what they had."""
    content = pattern(3, MIB) * (WIDE // MIB)
    bench = Bench(lab, content, overlays=small_tmpfs)
    room = free_of(small_tmpfs)
    fill(bench, "active", 0, room)
    with nbd_refusal(errno.ENOSPC):
        for at in range(room, room + 2 * MIB, BLOCK):
            bench.guest.pwrite(pattern(at, BLOCK), at)
    assert bench.execute("query-xen-replication-status") == {"error": False}
    bench.checkpoint()
    assert bench.guest_sees() == content
    fill(bench, "active", 0, room)
    expected = bench.guest_sees()

    def overwrite() -> None:
        for at in range(0, 2 * MIB, 64 * KIB):
            bench.target.pwrite(pattern(at, 64 * KIB), 16 * MIB + at)

    with pytest.raises(nbd.Error, match=r"No space left|Input/output error"):
        overwrite()
    assert bench.guest_sees() == expected
    assert bench.execute("query-replication")["error"]["case"] == 3


def test_a_guest_read_during_a_commit_survives_the_reclaim_of_a_full_tmpfs(lab: Lab, small_tmpfs: Path) -> None:
    """During a commit readers may be reading overlay data whose bit is gone already, so nobody may punch it.

        guest read of blocks 0 and 1           commit                     guest write, active full
        block 0: in no overlay
        block 1: in active
        held after reading block 0
                                               writes block 1 down,
                                               flushes, forgets it,
                                               waits for the read
                                                                          no room: gives back stale space
        reads block 1 out of active

    Wrong: zeroes for block 1. Right: what the guest wrote there.
    """
    content = pattern(3, MIB) * (WIDE // MIB)
    bench = Bench(lab, content, overlays=small_tmpfs)
    room = free_of(small_tmpfs)
    mine = pattern(95, BLOCK)
    bench.guest.pwrite(mine, BLOCK)
    # Hidden holds the target's range: a guest write there during the commit goes into active.
    fill(bench, "hidden", 16 * MIB, MIB)
    fill(bench, "active", 4 * MIB, room - 2 * MIB)
    at = 20 * MIB
    with nbd_refusal(errno.ENOSPC):
        while True:
            bench.guest.pwrite(pattern(at, BLOCK), at)
            at += BLOCK
    bench.points.arm("guest-read.disk-read")
    read = begin(bench.guest.pread, 2 * BLOCK, 0)
    bench.points.wait_hit("guest-read.disk-read")
    bench.points.arm("failover.entered")
    failover = bench.begin_failover()
    # Closing the gate waits for the read, which is inside it.
    assert not chance(failover)
    bench.points.release("guest-read.disk-read")
    assert end(read) == overlay_of(content[: 2 * BLOCK], (BLOCK, mine))
    bench.points.wait_hit("failover.entered")
    bench.points.arm("guest-read.disk-read")
    read = begin(bench.guest.pread, 2 * BLOCK, 0)
    bench.points.wait_hit("guest-read.disk-read")
    bench.points.release("failover.entered")
    # It lets go of all of it at once, and its end waits for the read.
    wait_until(lambda: not bench.execute("query-failover")["bytes-to-commit"], "the overlays have been let go")
    assert bench.server.status()["stage"] == "failover"
    write = begin(bench.guest2.pwrite, pattern(96, BLOCK), 16 * MIB + 5 * BLOCK)
    # Whether there is room is another matter; the file system is full, after all.
    error = write.exception(DEADLINE_S)
    bench.points.release("guest-read.disk-read")
    seen = end(read)
    assert seen == overlay_of(content[: 2 * BLOCK], (BLOCK, mine))
    assert error is None or (isinstance(error, nbd.Error) and error.errnum == errno.ENOSPC), error
    end(failover)
    bench.wait_done()


# -- the last block of a disk of any size ----------------------------------------------------------------------------

TAILS = [9 * BLOCK + 1, 9 * BLOCK + 513, 9 * BLOCK + 4095, 100]


@pytest.mark.parametrize("size", TAILS)
def test_a_last_block_of_any_length_is_preserved_completed_and_committed(lab: Lab, size: int) -> None:
    """A disk whose size is a multiple of neither 4096 nor 512, with both faces writing the last block.

        guest read of the last block           target write of its last bytes
        held after reading the disk
                                               copies it to hidden, changes the disk
        the guest writes one byte in front of the end

    Wrong: the target's bytes, bytes behind the end, a longer file. Right: OLD and the guest's byte, at the same size.
    """
    content = pattern(4, size)
    bench = Bench(lab, content)
    tail = size % BLOCK
    start = size - tail
    cut = min(7, tail)
    assert bench.guest.get_size() == bench.target.get_size() == size
    bench.points.arm("guest-read.disk-read")
    read = begin(bench.guest.pread, tail, start)
    bench.points.wait_hit("guest-read.disk-read")
    bench.target.pwrite(b"T" * cut, size - cut)
    bench.points.release("guest-read.disk-read")
    assert end(read) == content[start:]
    bench.guest.pwrite(b"G", size - 1)
    mine = overlay_of(content, (size - 1, b"G"))
    assert bench.guest_sees() == mine
    assert bench.target_sees() == overlay_of(content, (size - cut, b"T" * cut))
    end(bench.begin_failover())
    bench.wait_done()
    assert bench.disk.read_bytes() == mine
    assert bench.guest_sees() == mine


@pytest.mark.parametrize("size", TAILS)
@pytest.mark.parametrize("how", DESTROY)
def test_two_requests_that_meet_in_a_short_last_block_both_stay(lab: Lab, size: int, how: str) -> None:
    """The guest zeroes, trims or overwrites the tail's first half while a write of its last byte is completed; then
    the target does the same to all of it.

    Wrong: one of the two is gone, or bytes behind the end turn up. Right: both; after a checkpoint the target's.
    """
    content = pattern(4, size)
    bench = Bench(lab, content)
    tail = size % BLOCK
    start = size - tail
    half = max(1, tail // 2)
    point = "guest-write.before-mark"  # a tail of one byte needs no completion
    bench.points.arm(point)
    one = begin(bench.guest.pwrite, b"G", size - 1)
    bench.points.wait_hit(point)
    two = begin(DESTROY[how], bench.guest2, half, start)
    chance(two)
    bench.points.release(point)
    end(one)
    end(two)
    mine = overlay_of(content, (size - 1, b"G"), (start, NEW[how](half)))
    assert bench.guest_sees() == mine
    DESTROY[how](bench.target, tail, start)
    assert bench.guest_sees() == mine
    bench.checkpoint()
    assert bench.guest_sees() == overlay_of(content, (start, NEW[how](tail)))
    assert bench.disk.stat().st_size == size


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_pair_keeps_a_short_last_block_the_same_on_both_sides(lab: Lab, protocol: str) -> None:
    """Overlapping requests of every kind at the end of the disk, the first held before it is sent."""
    size = 9 * BLOCK + 77
    points = lab.pause_points()
    pair = lab.pair(
        [size],
        contents=[pattern(4, size)],
        primary_arguments=[f"protocol={protocol}"],
        primary_options={"extra_environment": points.environment},
    )
    pair.start_replication()
    one, two = pair.primary.connect(disk_name(0)), pair.primary.connect(disk_name(0))
    points.arm("forward.send")
    first = begin(one.pwrite, b"A" * 77, size - 77)
    points.wait_hit("forward.send")
    second = begin(two.trim, 10, size - 10)
    chance(second)
    points.release("forward.send")
    end(first)
    end(second)
    one.zero(1, size - 40)
    two.pwrite(b"C", size - 1)
    expected = overlay_of(
        pattern(4, size), (size - 77, b"A" * 77), (size - 10, bytes(10)), (size - 40, bytes(1)), (size - 1, b"C")
    )
    assert same_on_both(lab, pair) == expected
