# SPDX-License-Identifier: BSD-3-Clause
"""Clients come and go, and the process keeps nothing of them: what threads.py holds for their threads is let go.

A thread's state that is never let go costs 4 to 8 KiB, and a client has 16 of them, so that a process with many short
connections would grow without end. Memory is compared after a warm-up, and the bound is far from both sides.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import nbd
import pytest

from content import KIB, MIB, make_raw
from lab import Lab
from nbdprocess import NbdProcess
from nodes import Server
from replication.options import CONTROL_EXPORT
from waiting import DEADLINE_S, begin, wait_until

SIZE = 4 * MIB
BLOCK = 4 * KIB
WINDOW = 16
AFTER = 1000 + WINDOW * BLOCK

WARM_UP = 30
CLIENTS = 500
AT_ONCE = 4
WARM_UP_AT_ONCE = 200
CLIENTS_AT_ONCE = 400
AT_ONCE_S = 100.0

GROWTH_BYTES_MAX = 1536 * KIB
"""If what is kept for the clients were not let go: 33 MiB with 16 threads and 2.9 MiB with one were seen, and 0.4 MiB
when it is."""
GROWTH_MAPPINGS_MAX = 60

END_S = 10.0


def private_bytes(pid: int) -> int:
    """Memory that the process has made for itself. Files' pages are left out: they seem to become its own when
    another process that has them ends, another test's nbdkit for example."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = (line.split() for line in rollup.splitlines()[1:])
    return sum(int(field[1]) for field in fields if field[0] == "Anonymous:") * KIB


def mappings(pid: int) -> int:
    """Mappings of the process."""
    return len(Path(f"/proc/{pid}/maps").read_text().splitlines())


def threads(pid: int) -> int:
    """Threads of the process."""
    return len(os.listdir(f"/proc/{pid}/task"))


def use(handle: nbd.NBD, number: int, flushing: bool = False) -> None:
    """Reads and writes, and some flushes if `flushing`, 16 in flight at every moment."""
    data, buffer = bytearray(bytes([number % 251]) * BLOCK), nbd.Buffer(BLOCK)
    in_flight = failed = 0

    def ended(error: nbd.Error) -> int:
        nonlocal in_flight, failed
        in_flight -= 1
        failed += error.value != 0
        return 1

    for at in range(3 * WINDOW):
        offset = (number * 31 + at) % (SIZE // BLOCK) * BLOCK
        if flushing and at % 8 == 0:
            handle.aio_flush(ended)
        elif at % 2:
            handle.aio_pwrite(data, offset, ended)
        else:
            handle.aio_pread(buffer, offset, ended)
        in_flight += 1
        while in_flight == WINDOW:
            assert handle.poll(int(DEADLINE_S * 1000)) == 1
    while in_flight:
        assert handle.poll(int(DEADLINE_S * 1000)) == 1
    assert not failed


def ask(handle: nbd.NBD) -> None:
    """A conversation on the control export."""
    for command in ("qmp_capabilities", "query-replication"):
        handle.pwrite(json.dumps({"execute": command, "id": command}).encode() + b"\n", 0)
        said = b""
        while b'"id": "' + command.encode() not in said:
            said += bytes(handle.pread(16 * KIB, 0)).rstrip(b"\0")


def come_and_go(server: NbdProcess, count: int) -> None:
    """So many clients one after the other; every tenth is a primary's control channel."""
    for number in range(count):
        if number % 10 == 9:
            control = server.connect(CONTROL_EXPORT)
            ask(control)
            control.shutdown()
        disk = server.connect("disk0")
        use(disk, number)
        disk.shutdown()


@pytest.mark.parametrize("threads_option", [None, 1], ids=["default-threads", "one-thread"])
def test_clients_that_come_and_go_leave_nothing_behind(lab: Lab, threads_option: int | None) -> None:
    server = lab.secondary([SIZE], threads=threads_option)
    server.start_replication()
    idle = threads(server.pid)
    # With as many blocks as the others: what the first write to each takes is not the clients'.
    come_and_go(server, WARM_UP)
    wait_until(lambda: threads(server.pid) <= idle, "the threads of the clients have ended")
    before = private_bytes(server.pid), mappings(server.pid)
    come_and_go(server, CLIENTS)
    wait_until(lambda: threads(server.pid) <= idle, "the threads of the clients have ended")
    after = private_bytes(server.pid), mappings(server.pid)
    assert after[0] - before[0] < GROWTH_BYTES_MAX
    assert after[1] - before[1] < GROWTH_MAPPINGS_MAX
    server.terminate(END_S)


@pytest.mark.parametrize("emulated", [False, True], ids=["alone", "behind multi-conn"])
def test_hundreds_of_clients_at_once_leave_nothing_behind(lab: Lab, emulated: bool) -> None:
    """Several at every moment, each with all its threads at work. With nbdkit's filter multi-conn a flush of one client
    goes through the handles of the others, so that one client's threads leave a state with another one's."""
    filters = {"filters": ["multi-conn"], "filter_arguments": ["multi-conn-mode=emulate"]} if emulated else {}
    server = lab.secondary([SIZE], **filters)
    server.start_replication()
    idle = threads(server.pid)

    def clients(first: int, count: int) -> None:
        for number in range(first, first + count):
            disk = server.connect("disk0")
            use(disk, number, flushing=True)
            disk.shutdown()

    def at_once(count: int) -> tuple[int, int]:
        """What the process has after so many clients."""
        for running in [begin(clients, number * 1000, count // AT_ONCE) for number in range(AT_ONCE)]:
            running.result(AT_ONCE_S)
        wait_until(lambda: threads(server.pid) <= idle, "the threads of the clients have ended")
        # A state whose thread served another client at the time is deleted when the next client goes.
        clients(0, 1)
        wait_until(lambda: threads(server.pid) <= idle, "the threads of the clients have ended")
        return private_bytes(server.pid), mappings(server.pid)

    before = at_once(WARM_UP_AT_ONCE)
    after = at_once(CLIENTS_AT_ONCE)
    assert after[0] - before[0] < GROWTH_BYTES_MAX
    assert after[1] - before[1] < GROWTH_MAPPINGS_MAX
    server.terminate(END_S)


def kill_in_mid_request(server: NbdProcess, others: int) -> None:
    """A client, with requests that are not answered yet, whose connection goes; `others` polls of it before."""
    while True:
        handle = server.connect("disk0")
        done: list[int] = []
        for number in range(WINDOW):
            handle.aio_pwrite(bytearray(BLOCK), number * BLOCK, lambda error, done=done: done.append(error.value) or 1)  # type: ignore[misc]
        for _ in range(others):
            handle.poll(0)
        with contextlib.suppress(nbd.Error):
            handle.poll(0)
        server.disconnect()
        if not done:
            return
        # This machine was so busy that the slow disk was quicker: it was no kill in mid-request.


@pytest.mark.parametrize("threads_option", [None, 1], ids=["default-threads", "one-thread"])
def test_clients_that_die_in_mid_request_leave_a_server_that_serves_and_ends_in_time(
    lab: Lab, threads_option: int | None
) -> None:
    raw = make_raw(lab.folder / "slow.raw", SIZE)
    slow = lab.endpoint(path=raw, delay={"write": "20ms"})
    arguments = ["mode=secondary", f"state={lab.folder}/state", f"disk={slow.uri()}", "top-id=top0"]
    server = lab.start(Server(lab.folder, "secondary", arguments, threads=threads_option))
    for number in range(25):
        kill_in_mid_request(server, number % 5)
        server.check_alive()
    disk = server.connect("disk0")
    disk.pwrite(b"alive" * 100, AFTER)  # not where the dead have written, which may come late
    assert disk.pread(500, AFTER) == b"alive" * 100
    # One more in mid-request, and one that stays connected: the process ends all the same.
    kill_in_mid_request(server, 0)
    os.kill(server.pid, signal.SIGTERM)
    server.wait_ended(END_S)
