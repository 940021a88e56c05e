# SPDX-License-Identifier: BSD-3-Clause
"""Where the threads of real processes run: together under many short requests, anywhere otherwise."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from content import KIB, MIB
from lab import Lab
from nodes import Primary, Secondary, Server
from waiting import DEADLINE_S, wait_until

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")

NO_SECONDARY = "nbd+unix:///?socket=/nonexistent/secondary.sock"
IN_FLIGHT = 8

CALM = 5
"""Looks in a row that two processes must be seen apart: at 0.1 s each."""


@contextmanager
def reading(server: Server, export: str, size: int, threads: int = 2) -> Iterator[None]:
    """Read `size` bytes at a time from the server, one connection a thread, until the end. Several are in flight: where
    each request waited for its turn on a busy machine, they would be too few to bring anything together."""
    over = threading.Event()

    def read(handle) -> None:
        buffers = [nbd.Buffer(size) for _ in range(IN_FLIGHT)]
        while not over.is_set():
            cookies = [handle.aio_pread(buffer, 0) for buffer in buffers]
            while cookies:
                handle.poll(1000)
                cookies = [cookie for cookie in cookies if not handle.aio_command_completed(cookie)]

    readers = [threading.Thread(target=read, args=(server.connect(export),)) for _ in range(threads)]
    for reader in readers:
        reader.start()
    try:
        yield
    finally:
        over.set()
        for reader in readers:
            reader.join(DEADLINE_S)


def cores(server: Server) -> set[frozenset[int]]:
    """Where the server's threads may run: one set if it is the same for all."""
    found = set()
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        try:
            found.add(frozenset(os.sched_getaffinity(int(task.name))))
        except ProcessLookupError:
            continue
    return found


def core(server: Server) -> int | None:
    """The core on which all threads of the server are; None if they are not on one."""
    found = cores(server)
    return next(iter(next(iter(found)))) if len(found) == 1 and len(next(iter(found))) == 1 else None


def primary(lab: Lab, *arguments: str, **options) -> Primary:
    """A primary that serves, with nobody to forward to."""
    return lab.start(Primary(lab.folder, NO_SECONDARY, [MIB], extra_arguments=arguments, **options))


def test_short_requests_bring_all_threads_together_and_large_ones_let_them_go(lab: Lab) -> None:
    server = primary(lab)
    given = {frozenset(os.sched_getaffinity(0))}
    assert cores(server) == given
    with reading(server, "disk0", 4 * KIB):
        wait_until(lambda: core(server) is not None, "all threads are on one core")
        late = server.connect("disk0")
        late.pread(4 * KIB, 0)
        assert core(server) is not None, "the threads of a new connection are there, too"
    with reading(server, "disk0", MIB):
        wait_until(lambda: cores(server) == given, "large requests let the threads go")


def test_an_idle_process_lets_its_threads_go(lab: Lab) -> None:
    server = primary(lab)
    with reading(server, "disk0", 4 * KIB):
        wait_until(lambda: core(server) is not None, "all threads are on one core")
    wait_until(lambda: cores(server) == {frozenset(os.sched_getaffinity(0))}, "nothing to do lets them go")


@pytest.mark.alone  # other busy processes of this plugin would take cores as well
def test_two_busy_processes_are_on_different_cores_and_stay_there(lab: Lab) -> None:
    one = primary(lab)
    two = lab.start(Secondary(lab.folder, [MIB]))
    apart = 0

    def calm() -> bool:
        nonlocal apart
        threading.Event().wait(0.1)
        found = (core(one), core(two))
        apart = apart + 1 if None not in found and found[0] != found[1] else 0
        return apart >= CALM

    with reading(one, "disk0", 4 * KIB), reading(two, "disk0", 4 * KIB):
        wait_until(calm, "both have a core of their own")


def test_taskset_has_the_last_word(lab: Lab) -> None:
    server = primary(lab)
    given = frozenset(os.sched_getaffinity(0))
    with reading(server, "disk0", 4 * KIB):
        held = wait_until(lambda: (core(server) is not None and (core(server),)) or None, "they are on one core")
        for task in Path(f"/proc/{server.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), given - set(held))
        claimed = f"@nbdkit-replication.core{held[0]}"
        wait_until(lambda: claimed not in Path("/proc/net/unix").read_text().split(), "the core is nobody's again")
    assert cores(server) == {given - set(held)}


def test_placement_none_leaves_the_threads_alone(lab: Lab) -> None:
    server = primary(lab, "placement=none")
    with reading(server, "disk0", 4 * KIB):
        other = primary(lab, name="other")
        with reading(other, "disk0", 4 * KIB):
            wait_until(lambda: core(other) is not None, "the threads of one without the option are together")
        assert cores(server) == {frozenset(os.sched_getaffinity(0))}
