# SPDX-License-Identifier: BSD-3-Clause
"""Failover in the midst of writes on the target face: a hundred and forty rounds, and not one byte lands afterwards.

A round has a secondary of its own. Three connections keep sixteen target requests each in flight (writes, zeroes and
trims, mostly unaligned), the secondary's guest keeps eight of its own, and after a number of answers drawn from the
round's seed the failover command is given, from which moment on new connections come to the target face, too.

What is known of a target request: one begun after the command was answered is refused with ESHUTDOWN. One that was in
flight then may have been answered either way (its answer may be on its way to the client while the command's is), and
is not in the disk, whichever it was. So the disk, once the commit is done, is the last checkpoint plus what the guest
wrote, in every byte, and still is when the last writer has been refused. No connection is lost over it.

A failure names its round, which is its seed.
"""

from __future__ import annotations

import errno
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbd
import pytest

from content import KIB, make_raw
from lab import Lab
from nbdprocess import NbdProcess
from nodes import Server, disk_name, nbd_refusal, top_id
from qmp import Qmp
from waiting import DEADLINE_S, wait_until

SIZE = 640 * KIB + 1234
"""The last block is short, and five clusters give the commit several steps."""

WRITERS = 3
WINDOW = 16
GUEST_WINDOW = 8
NEWCOMERS = 6
"""Connections that are made after the command has been given; the last two after the commit is done."""

AFTERWARDS = 24
"""Requests of each writer after the disk has been looked at for the first time."""

CELL = 1500
"""The guest has at most one request in flight in each cell of so many bytes, so it is known which comes last."""

ROUNDS = 35
AT_ONCE = 2

COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "xen-set-replication": ("xen-set-replication", {"enable": False, "primary": False, "failover": True}),
    "lost-heartbeat": ("x-colo-lost-heartbeat", {}),
    "replication-stop": ("replication-stop", {"failover": True}),
}


class Window:
    """Requests in flight on one connection; only one thread uses it."""

    def __init__(self, face: nbd.NBD) -> None:
        self.face = face
        self.in_flight = 0

    def issue(self, kind: str, offset: int, data: bytes, ended: Callable[[int], None]) -> None:
        """Begin a request that covers `data`; `ended(errno)` is called when it has ended."""

        def done(error: Any) -> int:
            self.in_flight -= 1
            ended(error.value)
            return 1

        self.in_flight += 1
        if kind == "write":
            self.face.aio_pwrite(data, offset, done)
        elif kind == "zero":
            self.face.aio_zero(len(data), offset, done)
        else:
            self.face.aio_trim(len(data), offset, done)

    def drive(self) -> None:
        """Let requests end; nbd.Error when the connection is lost, AssertionError when nothing moves."""
        moved = self.face.poll(int(DEADLINE_S * 1000))
        assert moved, f"no answer on a connection with {self.in_flight} requests in flight"


KINDS = ("write", "write", "write", "zero", "trim")
LENGTHS = (1, 511, 512, 4096, 4096, 4097, 9000, 16384, 70000)


class TargetWriter:
    """One connection on the target face: sixteen requests in flight until the race says that it is over."""

    def __init__(self, face: nbd.NBD, race: Race, chooser: random.Random) -> None:
        self._window = Window(face)
        self._race = race
        self._chooser = chooser
        self.outcomes: Counter[tuple[bool, int]] = Counter()
        """How many requests ended with which errno, by whether they were begun after the command's answer."""

    def work(self) -> None:
        """Until `AFTERWARDS` requests after the disk has been looked at."""
        left = AFTERWARDS
        while left or self._window.in_flight:
            while left and self._window.in_flight < WINDOW:
                left -= self._race.looked.is_set()
                self.begin()
            self._window.drive()

    def work_off(self, count: int) -> None:
        """`count` requests, all in flight at once."""
        for _ in range(count):
            self.begin()
        while self._window.in_flight:
            self._window.drive()

    def begin(self) -> None:
        """Begin one request, anywhere."""
        chooser = self._chooser
        length = chooser.choice(LENGTHS)
        offset = chooser.randrange(SIZE - length + 1)
        if chooser.random() < 0.3:
            offset -= offset % 4096
        late = self._race.answered.is_set()

        def ended(number: int) -> None:
            self.outcomes[late, number] += 1

        self._window.issue(chooser.choice(KINDS), offset, chooser.randbytes(length), ended)


class GuestWriter:
    """The secondary's guest: writes, zeroes and trims in cells of its own choice; `model` is what it must read."""

    def __init__(self, face: nbd.NBD, race: Race, model: bytearray, chooser: random.Random) -> None:
        self._window = Window(face)
        self._race = race
        self._model = model
        self._chooser = chooser
        self._cells = list(range(0, SIZE, CELL))
        self.outcomes: Counter[int] = Counter()
        self.during_failover = 0

    def work(self) -> None:
        """Until the commit is done."""
        while not self._race.done.is_set() or self._window.in_flight:
            while not self._race.done.is_set() and self._window.in_flight < GUEST_WINDOW:
                self._begin()
            self._window.drive()

    def _begin(self) -> None:
        chooser = self._chooser
        cell = self._cells.pop(chooser.randrange(len(self._cells)))
        room = min(CELL, SIZE - cell)
        start = chooser.randrange(room)
        length = chooser.randrange(1, room - start + 1)
        kind = chooser.choice(KINDS)
        data = chooser.randbytes(length)
        self._model[cell + start : cell + start + length] = data if kind == "write" else bytes(length)
        self.during_failover += self._race.answered.is_set()

        def ended(number: int) -> None:
            self.outcomes[number] += 1
            self._cells.append(cell)

        self._window.issue(kind, cell + start, data, ended)


class Race:
    """One round: a running secondary, those who write to it, and what has happened so far."""

    def __init__(self, server: Server, disk: Path, number: int) -> None:
        self._server = server
        self._disk = disk
        self._chooser = random.Random(number)
        self.begun = threading.Event()
        """The failover command is being given."""
        self.answered = threading.Event()
        """It has been answered."""
        self.done = threading.Event()
        """The commit has ended."""
        self.looked = threading.Event()
        """The disk has been compared for the first time."""
        self.outcomes: Counter[tuple[bool, int]] = Counter()
        self.guest_during_failover = 0

    def run(self, command: str, arguments: dict[str, Any]) -> None:
        """The whole round; AssertionError if anything is not as it must be."""
        server, chooser = self._server, self._chooser
        server.execute("xen-set-replication", enable=True, primary=False)
        checkpoint = bytearray(self._disk.read_bytes())
        faces = [server.connect(disk_name(0)) for _ in range(WRITERS)]
        mark = chooser.randbytes(100_001)
        faces[0].pwrite(mark, 333)
        checkpoint[333 : 333 + len(mark)] = mark
        server.execute("xen-colo-do-checkpoint")

        model = checkpoint
        guest = GuestWriter(server.connect(top_id(0)), self, model, random.Random(chooser.random()))
        writers = [TargetWriter(face, self, random.Random(chooser.random())) for face in faces]
        moment = chooser.randrange(400)
        newcomers: list[TargetWriter] = []
        with ThreadPoolExecutor(WRITERS + 2) as pool, server.qmp() as qmp:
            working = [pool.submit(writer.work) for writer in writers]
            guest_working = pool.submit(guest.work)
            coming = pool.submit(self._come, newcomers, faces, random.Random(chooser.random()))
            try:
                self._fail_over(qmp, command, arguments, writers, moment, [*working, guest_working, coming])
                guest_working.result(DEADLINE_S)
                self._compare(model, "once the commit is done")
            finally:
                # Whatever went wrong, nobody goes on for ever.
                for event in (self.begun, self.done, self.looked):
                    event.set()
            for future in (*working, coming):
                future.result(DEADLINE_S)
        self._compare(model, "after the last writer has been refused")
        for writer in (*writers, *newcomers):
            self.outcomes.update(writer.outcomes)
        self._check(guest)
        for face in faces:
            assert face.aio_is_ready(), "a connection was lost"
            with nbd_refusal(errno.ESHUTDOWN):
                face.pread(512, 0)
        assert bytes(server.connect(top_id(0)).pread(SIZE, 0)) == model
        assert server.execute("query-xen-replication-status") == {"error": False}
        self.guest_during_failover = guest.during_failover

    def _fail_over(
        self,
        qmp: Qmp,
        command: str,
        arguments: dict[str, Any],
        writers: Sequence[TargetWriter],
        moment: int,
        working: Sequence[Future[None]],
    ) -> None:
        """Give the command when the writers have had `moment` answers, and wait until the commit is done."""

        def due() -> bool:
            assert not any(future.done() for future in working), "somebody has given up"
            return sum(writer.outcomes.total() for writer in writers) >= moment

        wait_until(due, f"{moment} target requests have been answered")
        self.begun.set()
        qmp.execute(command, arguments)
        self.answered.set()

        def ended() -> Any:
            status = qmp.execute("query-replication")
            return status if status["stage"] != "failover" else None

        status = wait_until(ended, "the commit ends")
        assert (status["stage"], status["error"]) == ("done", None)
        self.done.set()

    def _come(self, newcomers: list[TargetWriter], faces: list[nbd.NBD], chooser: random.Random) -> None:
        """New connections on the target face from the command on, each with some requests at once."""
        assert self.begun.wait(DEADLINE_S)
        for index in range(NEWCOMERS):
            if index == NEWCOMERS - 2:
                assert self.looked.wait(DEADLINE_S)
            face = self._server.connect(disk_name(0))
            faces.append(face)
            newcomers.append(TargetWriter(face, self, chooser))
            newcomers[-1].work_off(4)

    def _compare(self, model: bytes | bytearray, when: str) -> None:
        found = self._disk.read_bytes()
        if found != model:
            wrong = [at for at in range(SIZE) if found[at] != model[at]]
            blocks = sorted({at // 4096 for at in wrong})
            raise AssertionError(f"{when}: {len(wrong)} bytes of the disk differ, from {wrong[0]} on, blocks {blocks}")

    def _check(self, guest: GuestWriter) -> None:
        assert set(guest.outcomes) == {0}, f"the guest had failures: {guest.outcomes}"
        for (late, number), count in self.outcomes.items():
            if late:
                assert number == errno.ESHUTDOWN, f"{count} target requests begun after the answer ended with {number}"
            else:
                assert number in (0, errno.ESHUTDOWN), f"{count} target requests ended with errno {number}"
        assert self.outcomes[True, errno.ESHUTDOWN] >= WRITERS * AFTERWARDS


def race(lab: Lab, command: str, rounds: range, slow: bool) -> None:
    """Run the rounds, two at a time; what they had in common must show that there was a race at all."""
    outcomes: Counter[tuple[bool, int]] = Counter()
    guest_during_failover = 0
    racing: deque[tuple[int, Future[Race]]] = deque()

    def finish() -> None:
        nonlocal guest_during_failover
        number, future = racing.popleft()
        try:
            ended = future.result(3 * DEADLINE_S)
        except BaseException as error:
            error.add_note(f"in round {number}")
            raise
        outcomes.update(ended.outcomes)
        guest_during_failover += ended.guest_during_failover

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in rounds:
            # Started here, in the main thread, while others race: so they end with the test run whatever happens.
            racing.append((number, pool.submit(one_round, *prepare(lab, number, slow), COMMANDS[command], number)))
            if len(racing) > AT_ONCE:
                finish()
        while racing:
            finish()
    print(f"rounds {rounds}: {dict(outcomes)}, guest during failover {guest_during_failover}")
    assert outcomes[False, 0] > 0
    assert outcomes[False, errno.ESHUTDOWN] > 0, "in no round was anything in flight when failover began"
    assert guest_during_failover > 0


def prepare(lab: Lab, number: int, slow: bool) -> tuple[Server, Path, list[NbdProcess]]:
    """A secondary in stage none, its disk's file, and the processes of the round in the order of their ending."""
    path = make_raw(lab.folder / f"disk{number}.raw", SIZE, random.Random(-number).randbytes(SIZE))
    location = str(path)
    processes: list[NbdProcess] = []
    if slow:
        # Holds every write for so long that many are between copy-before-write and the disk when failover begins.
        below = lab.endpoint(path=path, name=f"below{number}", delay={"write": "1ms", "zero": "1ms", "trim": "1ms"})
        processes.append(below)
        location = below.uri()
    arguments = ["mode=secondary", f"state={lab.folder / f'state{number}'}", f"disk={disk_name(0)}:{location}"]
    server = lab.start(Server(lab.folder, f"round{number}", [*arguments, f"top-id={top_id(0)}"]))
    return server, path, [server, *processes]


def one_round(
    server: Server, path: Path, processes: Sequence[NbdProcess], command: tuple[str, dict[str, Any]], number: int
) -> Race:
    """Run one round and end its processes."""
    ran = Race(server, path, number)
    ran.run(*command)
    for process in processes:
        process.terminate()
    return ran


@pytest.mark.timeout(400)  # half a minute beside other tests, on an idle machine
@pytest.mark.parametrize(
    ("command", "first", "slow"),
    [
        ("xen-set-replication", 1000, False),
        ("lost-heartbeat", 2000, False),
        ("replication-stop", 3000, False),
        ("xen-set-replication", 4000, True),
    ],
    ids=["xen-set-replication", "lost-heartbeat", "replication-stop", "slow-disk"],
)
def test_of_target_writes_in_flight_when_failover_begins_not_one_byte_is_in_the_disk_afterwards(
    lab: Lab, command: str, first: int, slow: bool
) -> None:
    race(lab, command, range(first, first + ROUNDS), slow)
