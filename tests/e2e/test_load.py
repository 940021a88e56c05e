# SPDX-License-Identifier: BSD-3-Clause
"""Many connections at once, with checkpoints all the time, in a form that can be checked byte for byte.

Everything written is made of 512-byte units, each of which says who wrote it, in which write, where and in which
epoch (`stamp`). So a unit that is torn, misplaced, or older or newer than it may be shows itself, although which of two
overlapping writes comes last is open. Writers choose offsets from a seed; a failure prints it.

What is checked while it runs, beside the final content:
* a unit that the guest has not written since a checkpoint never changes on the guest face until the next one;
* a unit that the guest has written shows one of the guest's own writes;
* between two checkpoints no target write is seen on the guest face.
"""

from __future__ import annotations

import contextlib
import errno
import random
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import nbd
import pytest

from content import KIB, MIB, make_raw, pattern, qemu_img
from lab import Lab
from nodes import Secondary, Server, disk_name, top_id
from waiting import DEADLINE_S, Stuck, wait_until

UNIT = 512
BLOCK = 4096
SIZE = 4 * MIB
RUN_S = 10.0
SEED = 20240611
CHECKPOINT_S = (0.02, 0.05)

_STAMP = struct.Struct(">4sHHIQ")
"""Magic, writer, epoch (mod 65536), sequence number of the write, offset of the unit."""


def stamp(writer: int, epoch: int, sequence: int, offset: int, length: int) -> bytes:
    """`length` bytes of units for `offset`; both are multiples of UNIT."""
    return b"".join(
        _STAMP.pack(b"UNIT", writer, epoch & 0xFFFF, sequence, at) * (UNIT // _STAMP.size) + bytes(UNIT % _STAMP.size)
        for at in range(offset, offset + length, UNIT)
    )


def units(content: bytes, start: int = 0) -> list[tuple[int, int, int] | None]:
    """(writer, epoch, sequence) of every unit of what was read at `start`, None for one of zeroes; AssertionError for
    a torn or misplaced one."""
    found: list[tuple[int, int, int] | None] = []
    for at in range(0, len(content), UNIT):
        unit = content[at : at + UNIT]
        if not any(unit):
            found.append(None)
            continue
        magic, writer, epoch, sequence, offset = _STAMP.unpack_from(unit)
        assert magic == b"UNIT", f"torn unit at {at}: {unit[:64].hex()}"
        assert offset == start + at, f"the unit of {offset} is at {start + at}"
        assert unit == stamp(writer, epoch, sequence, offset, UNIT), f"torn unit at {offset}: {unit.hex()}"
        found.append((writer, epoch, sequence))
    return found


class Crew:
    """Threads that work until `finish`, whose first failure ends all of them and is raised there."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._futures: list[Future[None]] = []

    def hire(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run `work`, which looks at `over`, in a thread."""
        future: Future[None] = Future()

        def run() -> None:
            try:
                work(*arguments)
                future.set_result(None)
            except BaseException as error:  # noqa: BLE001 (raised in finish)
                future.set_exception(error)
                self.over.set()

        self._futures.append(future)
        threading.Thread(target=run, daemon=True).start()

    def work_for(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Let them work, on a busy machine until there is `enough` as well, then `finish`."""
        self.over.wait(seconds)
        with contextlib.suppress(Stuck):  # which of them has failed, if one has, says more
            wait_until(lambda: self.over.is_set() or enough(), "they have done enough")
        self.finish()

    def finish(self) -> None:
        """Ask all to end; the first failure is raised."""
        self.over.set()
        for future in self._futures:
            future.result(DEADLINE_S)


def somewhere(chooser: random.Random, size: int) -> tuple[int, int]:
    """(offset, length) of whole units, mostly small, at any alignment to blocks."""
    length = UNIT * chooser.choice((1, 1, 2, 3, 7, 8, 8, 9, 16, 40, 200))
    return UNIT * chooser.randrange((size - length) // UNIT + 1), length


def number_of(face: nbd.NBD) -> int:
    """The sequence number in the face's first unit."""
    unit = units(face.pread(UNIT, 0))[0]
    return 0 if unit is None else unit[2]


def qemu_check(secondary: Secondary, disks: int = 1) -> None:
    """What qemu-img says of the overlays; the process has ended, so nobody has them locked."""
    for index in range(disks):
        for kind in ("active", "hidden"):
            qemu_img("check", str(secondary.overlay(kind, index)))


def checkpoints(secondary: Secondary, crew: Crew, taken: list[int], chooser: random.Random) -> None:
    """A checkpoint every 20 to 50 ms on one QMP connection."""
    with secondary.qmp() as qmp:
        while not crew.over.wait(chooser.uniform(*CHECKPOINT_S)):
            qmp.execute("xen-colo-do-checkpoint")
            taken.append(len(taken))


def test_both_faces_under_load_stay_exact_through_checkpoints(lab: Lab) -> None:
    """Four guest writers and four target writers overlap, with a checkpoint every 20 to 50 ms.

    Writers share a lock (many) with checkpoints (alone) so that the epoch in a unit is that of its write: which is
    what lets a reader say of every unit on the guest face whether it may be there. The requests of one epoch are
    concurrent as they come.
    """
    print(f"seed {SEED}")
    secondary = lab.secondary([SIZE])
    secondary.start_replication()
    crew = Crew()
    # Protects `epoch` and `running`: requests of one epoch do not stretch into the next.
    turn = threading.Condition()
    epoch, running, closing = 1, 0, False
    written = [0] * 8

    def enter() -> int:
        nonlocal running
        with turn:
            assert turn.wait_for(lambda: not closing, DEADLINE_S)
            running += 1
            return epoch

    def leave() -> None:
        nonlocal running
        with turn:
            running -= 1
            turn.notify_all()

    def writer(number: int) -> None:
        face = secondary.connect(top_id(0) if number < 4 else disk_name(0))
        chooser = random.Random(SEED + number)
        while not crew.over.is_set():
            offset, length = somewhere(chooser, SIZE)
            now = enter()
            try:
                written[number] += 1
                kind = chooser.random()
                if kind < 0.06:
                    (face.zero if kind < 0.03 else face.trim)(length, offset)
                else:
                    face.pwrite(stamp(number, now, written[number], offset, length), offset)
            finally:
                leave()

    def reader(number: int) -> None:
        face = secondary.connect(top_id(0))
        chooser = random.Random(SEED + number)
        while not crew.over.is_set():
            offset, length = somewhere(chooser, SIZE)
            now = enter()
            try:
                content = face.pread(length, offset)
            finally:
                leave()
            for index, unit in enumerate(units(content, offset)):
                if unit is None:
                    continue
                by, of, _ = unit
                where = f"at {offset + index * UNIT} in epoch {now}: unit of writer {by}, epoch {of}"
                # The guest's own writes go with the checkpoint; the primary's come with it.
                assert (of == now) if by < 4 else (of < now), where

    def checkpoint() -> None:
        nonlocal epoch, closing
        chooser = random.Random(SEED)
        guest, target = secondary.connect(top_id(0)), secondary.connect(disk_name(0))
        snapshot: list[tuple[int, int, int] | None] | None = None
        with secondary.qmp() as qmp:
            while not crew.over.wait(chooser.uniform(*CHECKPOINT_S)):
                with turn:
                    closing = True
                    assert turn.wait_for(lambda: not running, DEADLINE_S)
                if snapshot is not None:
                    for at, (now, then) in enumerate(zip(units(guest.pread(SIZE, 0)), snapshot, strict=True)):
                        mine = now is None or (now[0] < 4 and now[1] == epoch)
                        assert now == then or mine, f"unit {at} changed from {then} to {now} in epoch {epoch}"
                    snapshot = None
                qmp.execute("xen-colo-do-checkpoint")
                if epoch % 8 == 0:
                    content = guest.pread(SIZE, 0)
                    assert content == target.pread(SIZE, 0), f"epoch {epoch}: the guest face is not the checkpoint"
                    snapshot = units(content)
                with turn:
                    epoch += 1
                    closing = False
                    turn.notify_all()

    for number in range(8):
        crew.hire(writer, number)
    for number in range(2):
        crew.hire(reader, 8 + number)
    crew.hire(checkpoint)
    crew.work_for(RUN_S, lambda: epoch > 20 and all(written))
    print(f"{epoch} checkpoints, writes {written}")
    assert epoch > 20
    assert all(written)
    content = secondary.connect(disk_name(0)).pread(SIZE, 0)
    assert all(unit is None or unit[0] >= 4 for unit in units(content))
    secondary.checkpoint()
    assert secondary.connect(top_id(0)).pread(SIZE, 0) == content
    secondary.terminate()
    qemu_check(secondary)
    assert secondary.disks[0].read_bytes() == content


def test_checkpoints_in_the_middle_of_requests_leave_every_unit_whole(lab: Lab) -> None:
    """As above without the lock around requests: checkpoints cut wherever they come. Each writer has a lane of units
    that only it writes, in sequence, so that the last one answered must be on the target face at the end; overlapping
    comes from blocks that hold units of all eight writers. Between two checkpoints no lane goes back on either face."""
    print(f"seed {SEED}")
    secondary = lab.secondary([SIZE])
    secondary.start_replication()
    crew = Crew()
    taken: list[int] = []
    last: list[dict[int, int]] = [{} for _ in range(8)]

    def writer(number: int) -> None:
        """Unit `number` of each block is this writer's."""
        face = secondary.connect(top_id(0) if number < 4 else disk_name(0))
        chooser = random.Random(SEED + number)
        sequence = 0
        while not crew.over.is_set():
            # Few blocks, so that the writers meet.
            at = BLOCK * chooser.randrange(64) + UNIT * number
            sequence += 1
            face.pwrite(stamp(number, 0, sequence, at, UNIT), at)
            last[number][at] = sequence
            if number >= 4:
                unit = units(face.pread(UNIT, at), at)[0]
                assert unit == (number, 0, sequence), f"written {sequence} at {at}, read {unit}"

    for number in range(8):
        crew.hire(writer, number)
    crew.hire(checkpoints, secondary, crew, taken, random.Random(SEED))
    crew.work_for(RUN_S / 2, lambda: len(taken) > 20)
    content = secondary.connect(disk_name(0)).pread(SIZE, 0)
    found = units(content)
    for number in range(4, 8):
        for at, sequence in last[number].items():
            assert found[at // UNIT] == (number, 0, sequence)
    for number in range(4):
        for at in last[number]:
            assert found[at // UNIT] is None, f"a guest write is on the secondary disk at {at}"
    assert len(taken) > 20
    secondary.checkpoint()
    assert secondary.connect(top_id(0)).pread(SIZE, 0) == content
    secondary.terminate()
    qemu_check(secondary)


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_pair_under_load_is_byte_identical_after_a_barrier(lab: Lab, protocol: str) -> None:
    """Four connections overlap on the primary in every kind of request, at any byte, while the secondary takes
    checkpoints and its guest writes; barriers come in between."""
    print(f"seed {SEED}")
    pair = lab.pair([SIZE], primary_arguments=[f"protocol={protocol}"])
    pair.start_replication()
    crew = Crew()
    taken: list[int] = []
    written = [0] * 5

    def writer(number: int, face: nbd.NBD) -> None:
        chooser = random.Random(SEED + number)
        while not crew.over.is_set():
            length = chooser.choice((1, 100, 512, 700, BLOCK, BLOCK, 9000, 64 * KIB, 300 * KIB))
            # Half of it in a few blocks, so that requests meet.
            span = 16 * BLOCK + length if chooser.random() < 0.5 else SIZE
            offset = chooser.randrange(span - length)
            kind = chooser.random()
            if kind < 0.05:
                face.trim(length, offset)
            elif kind < 0.1:
                face.zero(length, offset)
            elif kind < 0.12:
                face.flush()
            else:
                face.pwrite(pattern(chooser.randrange(1 << 30), length), offset)
            written[number] += 1

    def barriers() -> None:
        while not crew.over.wait(0.3):
            pair.primary.checkpoint()

    for number in range(4):
        crew.hire(writer, number, pair.primary.connect(disk_name(0)))
    crew.hire(writer, 4, pair.secondary.connect(top_id(0)))
    crew.hire(checkpoints, pair.secondary, crew, taken, random.Random(SEED))
    crew.hire(barriers)
    crew.work_for(RUN_S, lambda: len(taken) > 20 and all(written))
    print(f"{len(taken)} checkpoints, requests {written}")
    assert all(written)
    assert len(taken) > 20
    pair.primary.checkpoint()
    local = pair.primary.disks[0].read_bytes()
    assert pair.secondary.disks[0].read_bytes() == local
    assert pair.secondary.connect(top_id(0)).pread(SIZE, 0) == local
    assert pair.primary.status()["error"] is None
    assert pair.secondary.status()["error"] is None
    pair.primary.terminate()
    pair.secondary.terminate()
    qemu_check(pair.secondary)
    assert pair.secondary.disks[0].read_bytes() == local


def test_a_checkpoint_of_two_disks_is_never_seen_half_taken(lab: Lab) -> None:
    """Held after the first disk's overlays were emptied, before the second's.

        checkpoint                             guest reads disk 0, then disk 1
        empties disk 0
        held
                                               must wait; wrong: NEW, OLD
        empties disk 1

    Right: NEW, NEW.
    """
    points = lab.pause_points()
    secondary = lab.secondary([MIB, MIB], extra_environment=points.environment)
    secondary.start_replication()
    for index in range(2):
        secondary.connect(disk_name(index)).pwrite(stamp(4, 0, 7, 0, UNIT), 0)
    faces = [secondary.connect(top_id(index)) for index in range(2)]
    assert [number_of(face) for face in faces] == [0, 0]
    seen: list[int] = []
    crew = Crew()
    point = "checkpoint.begun"
    points.arm(point)
    crew.hire(secondary.checkpoint)
    points.wait_hit(point)  # before disk 0
    points.arm(point)
    points.release(point)
    points.wait_hit(point)  # between the two
    crew.hire(lambda: seen.extend(number_of(face) for face in faces))
    crew.over.wait(0.25)  # the time to do the wrong thing
    points.release(point)
    crew.finish()
    assert seen == [7, 7]


def test_two_disks_show_the_same_checkpoint_at_every_moment(lab: Lab) -> None:
    """The writer puts number N on disk 0, then on disk 1; checkpoints come whenever they come.

    The secondary disks hold N and N or N and N - 1 at any instant, and a checkpoint is one instant for both. A reader
    that sees N on disk 0, M on disk 1, N again on disk 0 with no checkpoint in between (the epoch before and after is
    one), has seen one instant. Wrong: M > N, or M < N - 1. To be sure that it is not the writer's order that saves the
    day, every third number is written in the other order, with its sign in the unit.
    """
    secondary = lab.secondary([MIB, MIB])
    secondary.start_replication()
    crew = Crew()
    taken: list[int] = []
    seen: list[int] = []

    def writer() -> None:
        faces = [secondary.connect(disk_name(index)) for index in range(2)]
        number = 0
        while not crew.over.is_set():
            number += 1
            for face in faces if number % 3 else reversed(faces):
                face.pwrite(stamp(4, 0, number, 0, UNIT), 0)

    def reader() -> None:
        faces = [secondary.connect(top_id(index)) for index in range(2)]
        with secondary.qmp() as qmp:

            def epoch() -> int:
                return int(qmp.execute("query-replication")["epoch"])

            while not crew.over.is_set():
                before = epoch()
                first, second = (number_of(face) for face in faces)
                if epoch() != before:
                    continue
                assert abs(first - second) <= 1, f"epoch {before}: {first} on disk 0, {second} on disk 1"
                # The disk that is ahead is the one that the higher number was written to first.
                assert first == second or (max(first, second) % 3 == 0) == (second > first), (first, second)
                seen.append(before)

    crew.hire(writer)
    for _ in range(2):
        crew.hire(reader)
    crew.hire(checkpoints, secondary, crew, taken, random.Random(SEED))
    crew.work_for(5.0, lambda: len(taken) > 20 and len(set(seen)) > 10)
    print(f"{len(taken)} checkpoints, {len(seen)} looks at {len(set(seen))} of them")
    assert len(set(seen)) > 10
    assert len(taken) > 20


def test_a_checkpoint_between_pairs_of_writes_shows_equal_numbers_on_both_disks(lab: Lab) -> None:
    """The checkpoint comes when both disks have the same number: whatever a reader sees within one epoch, they are
    equal, although the target faces are ahead most of the time."""
    secondary = lab.secondary([MIB, MIB])
    secondary.start_replication()
    crew = Crew()
    looks = [0]

    def writer() -> None:
        faces = [secondary.connect(disk_name(index)) for index in range(2)]
        number = 0
        with secondary.qmp() as qmp:
            while not crew.over.is_set():
                for _ in range(5):
                    number += 1
                    for face in faces:
                        face.pwrite(stamp(4, 0, number, 0, UNIT), 0)
                qmp.execute("xen-colo-do-checkpoint")

    def reader() -> None:
        faces = [secondary.connect(top_id(index)) for index in range(2)]
        with secondary.qmp() as qmp:
            while not crew.over.is_set():
                before = qmp.execute("query-replication")["epoch"]
                numbers = [number_of(face) for face in faces]
                if qmp.execute("query-replication")["epoch"] == before:
                    assert numbers[0] == numbers[1], f"epoch {before}: {numbers}"
                    looks[0] += 1

    crew.hire(writer)
    crew.hire(reader)
    crew.work_for(3.0, lambda: looks[0] > 10)
    assert looks[0] > 10


def test_nothing_from_the_target_face_lands_after_failover_has_begun(lab: Lab) -> None:
    """Ten rounds, each with a secondary of its own: four connections write on the target face and two on the guest
    face while failover begins. (More rounds, with other commands, run in test_racing_failover.py.)

    From the moment at which the command returned no target request succeeds, and none that was answered, or failed,
    earlier or later is on the disk: it becomes the last checkpoint plus the guest's writes, whole ones.
    """
    for number in range(10):
        _race_failover(lab, number)


def _race_failover(lab: Lab, number: int) -> None:
    """One round."""
    size = 64 * BLOCK
    # A disk that takes its time for a write has requests in flight at the instant of the failover.
    path = make_raw(lab.folder / f"disk{number}.raw", size)
    below = lab.endpoint(path=path, name=f"below{number}", delay={"write": "2ms"})
    arguments = ["mode=secondary", f"state={lab.folder / f'state{number}'}", f"disk={disk_name(0)}:{below.uri()}"]
    secondary = lab.start(Server(lab.folder, f"round{number}", [*arguments, f"top-id={top_id(0)}"]))
    secondary.execute("xen-set-replication", enable=True, primary=False)
    base = stamp(9, 0, number, 0, size)
    secondary.connect(disk_name(0)).pwrite(base, 0)
    secondary.execute("xen-colo-do-checkpoint")
    crew = Crew()
    fenced = threading.Event()
    guest_wrote: list[dict[int, int]] = [{}, {}]
    landed = [0] * 4
    refused = [0] * 4

    def target(who: int, face: nbd.NBD) -> None:
        chooser = random.Random(SEED + who)
        # A few more after the first refusal: it must stay so.
        while refused[who] < 5 and not crew.over.is_set():
            offset, length = somewhere(chooser, size)
            late = fenced.is_set()
            try:
                face.pwrite(stamp(who, 1, landed[who], offset, length), offset)
            except nbd.Error as error:
                if error.errnum != errno.ESHUTDOWN:
                    raise
                refused[who] += 1
            else:
                assert not late, "a target write succeeded after the command had returned"
                assert not refused[who], "a target write succeeded after one was refused"
                landed[who] += 1

    def guest(who: int, face: nbd.NBD) -> None:
        chooser = random.Random(SEED + 100 + who)
        sequence = 0
        while not crew.over.is_set():
            # Units of its own: even or odd.
            at = UNIT * (2 * chooser.randrange(size // UNIT // 2) + who)
            sequence += 1
            face.pwrite(stamp(20 + who, 2, sequence, at, UNIT), at)
            guest_wrote[who][at] = sequence

    for who in range(4):
        crew.hire(target, who, secondary.connect(disk_name(0)))
    for who in range(2):
        crew.hire(guest, who, secondary.connect(top_id(0)))
    wait_until(lambda: crew.over.is_set() or (all(landed) and all(guest_wrote)), "everybody has written")
    secondary.execute("xen-set-replication", enable=False, primary=False, failover=True)
    fenced.set()
    wait_until(lambda: crew.over.is_set() or min(refused) == 5, "everybody is refused")
    crew.finish()
    status = secondary.wait_stage("done", "failover-failed")
    assert status["stage"] == "done"
    content = secondary.connect(top_id(0)).pread(size, 0)
    expected = bytearray(base)
    for who, wrote in enumerate(guest_wrote):
        for at, sequence in wrote.items():
            expected[at : at + UNIT] = stamp(20 + who, 2, sequence, at, UNIT)
    assert content == expected, f"round {number}: {_difference(content, bytes(expected))}"
    assert path.read_bytes() == expected
    secondary.terminate()
    below.terminate()


def _difference(found: bytes, expected: bytes) -> str:
    """The first unit that differs, and what it is."""
    pairs = zip(units(found), units(expected), strict=True)
    return next((f"unit {at}: {got}, not {want}" for at, (got, want) in enumerate(pairs) if got != want), "none")
