# SPDX-License-Identifier: BSD-3-Clause
"""SIGTERM in the midst of every job: nbdkit has ended, in good order, within 5 s, and the next process goes on.

Whatever a thread waits for is silent for good (a stopped process, a client that does not read) and the timeouts are
the longest that are allowed, so a process that ends only when its wait does is found out. A pause point sees to it
that the thread is on its way into that wait before the signal is sent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from pathlib import Path

import nbd
import pytest

from content import KIB, MIB, changed, make_raw, pattern, whole
from endpoints import QemuNbd
from lab import Lab
from nbdprocess import silent
from nodes import Primary, Secondary, Server
from pausepoints import PausePoints
from qmp import Qmp
from waiting import wait_until

END_S = 5.0
"""Well below the time after which service managers kill: 90 s of systemd, 10 s of containers."""

SLACK_S = 8.0
"""For a busy machine: what has to be given up takes 4 s on any. With it, still far less than any of the timeouts."""

BLOCK = 4 * KIB
SIZE = 4 * MIB
OLD = pattern(1, SIZE)
NEW = pattern(2, SIZE)
OWN = pattern(3, SIZE)

START = ("xen-set-replication", '{"enable": true, "primary": false}')
CHECKPOINT = ("replication-checkpoint", "{}")
STOP = ("replication-stop", "{}")
FAILOVER = ("replication-stop", '{"failover": true}')

SLOWEST = ("timeout=30",)
"""The longest that a primary may be told to wait for its link."""


def end(server: Server) -> None:
    """SIGTERM with every client still connected; it must end within END_S with exit code 0 and no traceback."""
    begun = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    # Longer than allowed, so that a failure says how long it was.
    server.wait_ended(4 * END_S)
    took_s = time.monotonic() - begun
    server.disconnect()
    assert took_s <= END_S + SLACK_S, f"{server.name} took {took_s:.1f} s to end"
    assert "Traceback" not in server.stderr()


def send(server: Server, command: str, arguments: str = "{}") -> Qmp:
    """Send a command and do not wait for its answer; the connection stays open as long as the caller keeps it."""
    qmp = server.qmp()
    qmp.send(f'{{"execute": "{command}", "arguments": {arguments}}}\n'.encode())
    return qmp


def in_flight(handle: nbd.NBD, data: bytes, offset: int) -> None:
    """Send a write, all of it, and do not wait for its answer."""
    handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset)
    wait_until(lambda: handle.poll(0) < 1 and not handle.aio_get_direction() & 2, "the request is written out")


def out_of_sync(server: Server) -> int:
    total: int = sum(disk["out-of-sync-bytes"] for disk in server.status()["disks"])
    return total


def wait_identical(primary: Primary, secondary: Secondary) -> None:
    """The primary has sent all that the secondary lacked."""
    wait_until(lambda: out_of_sync(primary) == 0, "nothing is out of sync")
    primary.checkpoint()
    assert [disk.read_bytes() for disk in secondary.disks] == [disk.read_bytes() for disk in primary.disks]


@pytest.fixture
def points(lab: Lab) -> PausePoints:
    """Pause points of the process that the test ends."""
    return lab.pause_points()


class OverNbd:
    """A secondary in `running` whose secondary disk is behind an NBD server that can be stopped."""

    def __init__(self, lab: Lab, points: PausePoints) -> None:
        self.path = make_raw(lab.folder / "below.raw", SIZE, OLD)
        # Not nbdkit: 1.32 may abort when it answers a client that has gone (hangup.py).
        self.endpoint: QemuNbd = lab.qemu_nbd(self.path, name="below")
        arguments = ["mode=secondary", f"state={lab.folder}/s", f"disk={self.endpoint.uri()}", "top-id=top0"]
        self.server: Server = lab.start(Server(lab.folder, "over", arguments, extra_environment=points.environment))
        self.server.execute("xen-set-replication", enable=True, primary=False)
        self.target = self.server.connect("disk0")
        self.guest = self.server.connect("top0")


@pytest.fixture
def over(lab: Lab, points: PausePoints) -> OverNbd:
    return OverNbd(lab, points)


@pytest.fixture
def secondary(lab: Lab, points: PausePoints) -> Secondary:
    """In `running`, with a target write at 0 and a guest write at BLOCK since the checkpoint."""
    server: Secondary = lab.secondary((SIZE,), contents=(OLD,), extra_environment=points.environment)
    server.start_replication()
    server.connect("disk0").pwrite(NEW[:BLOCK], 0)
    server.connect("top0").pwrite(OWN[:BLOCK], BLOCK)
    return server


class Couple:
    """A pair in `running` and in sync; the pause points are the primary's."""

    def __init__(self, lab: Lab, points: PausePoints, *arguments: str, disks: int = 1) -> None:
        pair = lab.pair(
            (SIZE,) * disks,
            contents=(OLD,) * disks,
            primary_arguments=(*SLOWEST, *arguments),
            primary_options={"extra_environment": points.environment},
        )
        pair.start_replication()
        self.primary = pair.primary
        self.secondary = pair.secondary
        self.guest = pair.primary.connect("disk0")


# -- secondary: copy-before-write and commands that wait for it ---------------------------------------------------


@pytest.mark.parametrize(
    ("command", "point"),
    [
        (None, "copy-before-write.before-mark"),
        (None, "target-write.preserved"),
        (CHECKPOINT, "target-write.preserved"),
        (STOP, "target-write.preserved"),
        (FAILOVER, "target-write.preserved"),
    ],
    ids=["write not yet preserved", "write", "checkpoint", "stop", "failover"],
)
def test_with_a_target_write_that_waits_for_a_silent_secondary_disk(
    points: PausePoints, over: OverNbd, command: tuple[str, str] | None, point: str
) -> None:
    """
    primary:   write -- copied -- pause point ------------- waits for the disk
    operator:                        |         command, waits for the write
    disk:                            | stops                                     goes on
    test:                            | release                         SIGTERM            start
    """
    over.target.pwrite(NEW[:BLOCK], 0)
    over.guest.pwrite(OWN[:BLOCK], BLOCK)
    points.arm(point)
    in_flight(over.target, NEW[: 2 * BLOCK], 8 * BLOCK)
    points.wait_hit(point)
    with silent(over.endpoint):
        points.release(point)
        asked = None if command is None else send(over.server, *command)
        if asked is not None:
            wait_until(lambda: gate_is_shut(over.guest), "the command keeps requests out")
        end(over.server)
        if asked is not None:
            asked.close()
    over.server.start()
    status = over.server.status()
    # The command was not answered: it has been carried out or it has not.
    expected = {None: {"running"}, CHECKPOINT: {"running"}, STOP: {"running", "done"}}
    assert status["stage"] in expected.get(command, {"running", "failover", "done"})
    if status["stage"] == "running":
        checkpoints = [changed(OLD, (BLOCK, OWN[:BLOCK]))]
        if command == CHECKPOINT:
            checkpoints += [
                changed(OLD, (0, NEW[:BLOCK])),
                changed(OLD, (0, NEW[:BLOCK]), (8 * BLOCK, NEW[: 2 * BLOCK])),
            ]
        assert whole(over.server.connect("top0")) in checkpoints


def gate_is_shut(handle: nbd.NBD) -> bool:
    """Whether a request is kept waiting; the one that shows it stays in flight."""
    cookie = handle.aio_pread(nbd.Buffer(BLOCK), 20 * BLOCK)
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        handle.poll(20)
        if handle.aio_command_completed(cookie):
            return False
    return True


@pytest.mark.parametrize(
    ("command", "point", "stages"),
    [
        (CHECKPOINT, "checkpoint.begun", {"running"}),
        (CHECKPOINT, "checkpoint.active-emptied", {"running"}),
        (STOP, "stop.entered", {"done"}),
        (FAILOVER, "failover.entered", {"failover", "done"}),
    ],
    ids=["checkpoint begun", "checkpoint half done", "planned stop", "failover"],
)
def test_a_command_that_is_at_work_is_carried_out_first(
    points: PausePoints, secondary: Secondary, command: tuple[str, str], point: str, stages: set[str]
) -> None:
    points.arm(point)
    with send(secondary, *command):
        points.wait_hit(point)
        os.kill(secondary.pid, signal.SIGTERM)
        wait_until(lambda: not secondary.control_path.exists(), "the process is winding up")
        points.release(point)
        end(secondary)
    secondary.start()
    assert secondary.status()["stage"] in stages
    if command == FAILOVER:
        secondary.wait_stage("done")
        assert secondary.disks[0].read_bytes() == changed(OLD, (BLOCK, OWN[:BLOCK]))
    else:
        assert whole(secondary.connect("top0")) == changed(OLD, (0, NEW[:BLOCK]))


# -- secondary: commit and reclaim --------------------------------------------------------------------------------


def test_in_a_commit_that_waits_for_a_silent_secondary_disk(points: PausePoints, over: OverNbd) -> None:
    over.guest.pwrite(OWN[: 3 * MIB], 0)
    over.target.pwrite(NEW[:MIB], 3 * MIB)
    points.arm("commit.hidden-forgotten")
    over.server.execute(FAILOVER[0], failover=True)
    points.wait_hit("commit.hidden-forgotten")
    with silent(over.endpoint):
        points.release("commit.hidden-forgotten")  # the next range waits for the disk
        end(over.server)
    over.server.start()
    over.server.wait_stage("done")
    assert over.path.read_bytes() == changed(OLD, (0, OWN[: 3 * MIB]))
    assert whole(over.server.connect("top0")) == over.path.read_bytes()


def test_in_a_commit_of_much_data(lab: Lab, points: PausePoints) -> None:
    size = 96 * MIB
    server: Secondary = lab.secondary((size,), extra_environment=points.environment)
    server.start_replication()
    guest = server.connect("top0")
    for offset in range(0, size, SIZE):
        guest.pwrite(OWN, offset)
    points.arm("commit.written")
    server.execute(FAILOVER[0], failover=True)
    points.wait_hit("commit.written")
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: not server.control_path.exists(), "the process is winding up")
    points.release("commit.written")
    end(server)
    server.start()
    server.wait_stage("done")
    assert server.disks[0].read_bytes() == OWN * (size // SIZE)


def test_in_a_commit_of_a_slow_disk_between_two_of_its_writes(lab: Lab) -> None:
    path = make_raw(lab.folder / "slow.raw", SIZE, OLD)
    slow = lab.endpoint(path=path, name="slow", delay={"write": "400ms"})
    arguments = ["mode=secondary", f"state={lab.folder}/s", f"disk={slow.uri()}", "top-id=top0"]
    server: Server = lab.start(Server(lab.folder, "server", arguments))
    server.execute("xen-set-replication", enable=True, primary=False)
    server.connect("top0").pwrite(OWN, 0)
    server.execute(FAILOVER[0], failover=True)

    def halfway() -> bool:
        return any(0 < job["current-progress"] < job["total-progress"] for job in server.execute("query-jobs"))

    wait_until(halfway, "the commit is in its midst")
    end(server)
    server.start()
    server.wait_stage("done")
    assert path.read_bytes() == OWN


def space(path: Path) -> int:
    """Bytes that a file takes."""
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("when", ["before", "amid"])
def test_while_stale_overlay_space_is_given_back(lab: Lab, when: str) -> None:
    size = 64 * MIB
    server: Secondary = lab.secondary((size,))
    server.start_replication()
    guest = server.connect("top0")
    for offset in range(0, size, SIZE):
        guest.pwrite(OWN, offset)
    server.checkpoint()
    guest.pwrite(OWN[:BLOCK], BLOCK)
    data = server.overlay("active").with_suffix(".data")
    if when == "amid":
        wait_until(lambda: space(data) < size, "giving back has begun")
    end(server)
    server.start()
    assert whole(server.connect("top0")) == changed(bytes(size), (BLOCK, OWN[:BLOCK]))
    wait_until(lambda: space(data) < MIB, "the space is given back")
    assert whole(server.connect("top0")) == changed(bytes(size), (BLOCK, OWN[:BLOCK]))


# -- primary: whatever waits for a silent secondary ---------------------------------------------------------------


def test_a_primary_with_a_barrier_that_waits_for_a_silent_secondary(lab: Lab, points: PausePoints) -> None:
    both = Couple(lab, points)
    points.arm("forward.send")
    both.guest.pwrite(NEW[:BLOCK], 0)
    points.wait_hit("forward.send")
    points.arm("epoch.cut")
    with send(both.primary, *CHECKPOINT):
        points.wait_hit("epoch.cut")
        with silent(both.secondary):
            points.release("epoch.cut")
            points.release("forward.send")
            end(both.primary)
    both.primary.start()
    wait_identical(both.primary, both.secondary)
    assert both.secondary.disks[0].read_bytes() == changed(OLD, (0, NEW[:BLOCK]))


def test_a_primary_whose_planned_stop_waits_for_a_silent_secondary(lab: Lab, points: PausePoints) -> None:
    both = Couple(lab, points)
    with silent(both.secondary):
        both.guest.pwrite(NEW[:BLOCK], 0)
        with send(both.primary, *STOP):
            both.primary.wait_stage("done")
            end(both.primary)
    both.primary.start()
    assert both.primary.status()["stage"] == "done"
    assert both.primary.disks[0].read_bytes() == changed(OLD, (0, NEW[:BLOCK]))
    assert out_of_sync(both.primary) > 0, "what was never confirmed is remembered"


def test_a_primary_whose_start_is_connecting_to_a_silent_secondary(lab: Lab) -> None:
    path = lab.folder / "mute.sock"
    primary: Primary = lab.primary(f"nbd+unix:///?socket={path}", (SIZE,), contents=(OLD,), extra_arguments=SLOWEST)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(END_S)
        with send(primary, "replication-start"):
            connection, _ = listener.accept()  # and never a greeting
            with connection:
                primary.connect("disk0").pwrite(NEW[:BLOCK], 0)
                end(primary)
    primary.start()
    assert primary.status()["stage"] == "none"
    assert whole(primary.connect("disk0")) == changed(OLD, (0, NEW[:BLOCK]))


def test_a_restarted_primary_that_is_connecting_to_a_silent_secondary(lab: Lab, points: PausePoints) -> None:
    both = Couple(lab, points)
    with silent(both.secondary):
        both.guest.pwrite(NEW[:BLOCK], 0)
        both.primary.kill()
        both.primary.start()
        wait_until(lambda: both.primary.status()["link"]["state"] == "connecting", "it connects")
        both.primary.connect("disk0").pwrite(NEW[:BLOCK], BLOCK)
        end(both.primary)
    both.primary.start()
    wait_identical(both.primary, both.secondary)
    assert both.secondary.disks[0].read_bytes() == changed(OLD, (0, NEW[:BLOCK] * 2))


@pytest.mark.parametrize("queue", ["1M", "64M"])
def test_a_primary_in_the_midst_of_a_resync_to_a_silent_secondary(lab: Lab, points: PausePoints, queue: str) -> None:
    """With 1M the job waits for room in the queue, with 64M for its barrier."""
    both = Couple(lab, points, f"queue-limit={queue}")
    points.arm("forward.send")
    both.guest.pwrite(NEW[: 3 * MIB], 0)
    points.wait_hit("forward.send")
    both.primary.kill()
    points.disarm("forward.send")
    points.arm("forward.send")
    both.primary.start()
    points.wait_hit("forward.send")
    with silent(both.secondary):
        points.release("forward.send")
        assert [job["type"] for job in both.primary.execute("query-jobs")] == ["resync"]
        end(both.primary)
    both.primary.start()
    wait_identical(both.primary, both.secondary)
    assert both.secondary.disks[0].read_bytes() == changed(OLD, (0, NEW[: 3 * MIB]))


def test_a_primary_of_two_disks_with_a_queue_for_a_silent_secondary(lab: Lab, points: PausePoints) -> None:
    both = Couple(lab, points, disks=2)
    with silent(both.secondary):
        for index in range(2):
            both.primary.connect(f"disk{index}").pwrite(NEW[:MIB], 0)
        end(both.primary)
    both.primary.start()
    wait_identical(both.primary, both.secondary)


# -- requests in flight -------------------------------------------------------------------------------------------


def test_a_primary_whose_guest_waits_for_a_silent_secondary(lab: Lab, points: PausePoints) -> None:
    both = Couple(lab, points, "protocol=sync")
    points.arm("primary-write.marked")
    in_flight(both.guest, NEW[:BLOCK], 0)
    points.wait_hit("primary-write.marked")
    with silent(both.secondary):
        points.release("primary-write.marked")
        wait_until(lambda: both.primary.status()["disks"][0]["forward-queue-bytes"] == BLOCK, "it is on its way")
        end(both.primary)
    both.primary.start()
    wait_identical(both.primary, both.secondary)


def test_a_primary_whose_guest_waits_for_room_in_the_queue(lab: Lab, points: PausePoints) -> None:
    both = Couple(lab, points, "queue-limit=1M")
    with silent(both.secondary):
        for index in range(2):
            both.guest.pwrite(NEW[: 400 * KIB], index * 400 * KIB)
        in_flight(both.guest, NEW[: 400 * KIB], 800 * KIB)
        # Marked, which is the last thing before it waits.
        wait_until(lambda: out_of_sync(both.primary) >= 1200 * KIB, "the third write waits")
        end(both.primary)
    both.primary.start()
    wait_identical(both.primary, both.secondary)
    assert both.primary.disks[0].read_bytes()[: 800 * KIB] == NEW[: 400 * KIB] * 2


def test_a_primary_whose_guest_waits_for_a_silent_primary_disk(lab: Lab, points: PausePoints) -> None:
    path = make_raw(lab.folder / "local.raw", SIZE, OLD)
    endpoint = lab.qemu_nbd(path, name="local")  # as in OverNbd
    there: Secondary = lab.secondary((SIZE,), contents=(OLD,))
    arguments = ["mode=primary", f"state={lab.folder}/s1", f"disk={endpoint.uri()}", f"secondary={there.uri()}"]
    here: Server = lab.start(Server(lab.folder, "here", arguments, extra_environment=points.environment))
    there.start_replication()
    here.execute("xen-set-replication", enable=True, primary=True)
    guest = here.connect("disk0")
    guest.pwrite(NEW[:BLOCK], 0)
    points.arm("primary-write.marked")
    in_flight(guest, NEW[:BLOCK], 8 * BLOCK)
    points.wait_hit("primary-write.marked")
    with silent(endpoint):
        points.release("primary-write.marked")
        end(here)
    here.start()
    wait_until(lambda: out_of_sync(here) == 0, "nothing is out of sync")
    here.execute(CHECKPOINT[0])
    assert there.disks[0].read_bytes() == path.read_bytes()
    assert path.read_bytes()[:BLOCK] == NEW[:BLOCK]


def test_clients_that_do_not_read_their_answers(secondary: Secondary) -> None:
    reader = secondary.connect("disk0")
    for _ in range(24):
        reader.aio_pread(nbd.Buffer(MIB), 0)  # libnbd takes an answer only when it is polled
    wait_until(lambda: secondary.status()["disks"][0]["totals"]["target-read"] >= 4 * MIB, "answers are waiting")
    with secondary.qmp() as deaf:
        deaf.send(b'{"execute": "query-commands"}\n' * 1500)
        end(secondary)
    secondary.start()
    assert whole(secondary.connect("top0")) == changed(OLD, (BLOCK, OWN[:BLOCK]))


def greet(path: Path, sent: bytes) -> socket.socket:
    """A client that hears the greeting, sends this and nothing more."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(END_S)
    connection.connect(str(path))
    greeting = b""
    while len(greeting) < 18:
        greeting += connection.recv(18 - len(greeting))
    connection.sendall(sent)
    return connection


FLAGS = struct.pack(">I", 3)
EXPORT_DISK0 = b"IHAVEOPT" + struct.pack(">II", 1, 5) + b"disk0"
WRITE_HEADER = struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, 0, BLOCK)
MIDWAY: dict[str, bytes] = {
    "greeted": b"",
    "half an option": FLAGS + EXPORT_DISK0[:11],
    "half a request": FLAGS + EXPORT_DISK0 + WRITE_HEADER[:9],
    "half a write's data": FLAGS + EXPORT_DISK0 + WRITE_HEADER + NEW[:1000],
}


def test_clients_in_the_midst_of_everything_they_can_send(secondary: Secondary) -> None:
    with contextlib.ExitStack() as clients:
        for sent in MIDWAY.values():
            clients.enter_context(greet(secondary.socket_path, sent))
        half = clients.enter_context(secondary.qmp())
        half.send(b'{"execute": "replication-st')
        end(secondary)
    secondary.start()
    assert secondary.disks[0].read_bytes() == changed(OLD, (0, NEW[:BLOCK])), "half a write is no write"
