# SPDX-License-Identifier: BSD-3-Clause
"""commit.py: the job goes over the overlays until nothing is left, is cancelled, fails, or the process ends."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from content import make_raw, pattern
from replication.disk import files
from replication.disk.file import FileDisk
from replication.disk.files import Buffer
from replication.errors import DiskError
from replication.events import EventHub
from replication.image import qcow2
from replication.image.overlay import Held, Overlay
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, CLUSTER
from replication.image.stack import Stack
from replication.jobs import JobList
from replication.record.changes import ChangeMap
from replication.secondary.commit import Cancelled, Commit, CommitThread
from replication.secondary.disk import SecondaryDisk
from replication.stage import Stage
from waiting import DEADLINE_S, wait_until

pytestmark = pytest.mark.usefixtures("no_sharing")

SIZE = 20 * CLUSTER + 777


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack of which active and hidden hold something."""
    make_raw(tmp_path / "disk", SIZE, pattern(1, SIZE))
    for name in ("active", "hidden"):
        qcow2.create(str(tmp_path / f"{name}.qcow2"), str(tmp_path / "disk"), "raw", SIZE)
    disk = FileDisk("disk0", str(tmp_path / "disk"))
    active, hidden = (Overlay(name, "disk0", str(tmp_path / f"{name}.qcow2")) for name in ("active", "hidden"))
    opened = Stack(active, hidden, disk)
    opened.target.write(memoryview(pattern(2, 6 * CLUSTER)), 5 * CLUSTER + 5, False)
    opened.write_top(memoryview(pattern(3, 3 * CLUSTER)), 9 * CLUSTER + 9)
    opened.zero_top(SIZE - 5000, 5000)
    yield opened
    opened.close()
    disk.close()


LARGE = 300 * CLUSTER + 5 * BLOCK + 1
"""More than one page of allocation words."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that holds nothing, on a sparse disk."""
    folder = tmp_path_factory.mktemp("large")
    make_raw(folder / "disk", LARGE)
    for name in ("active", "hidden"):
        qcow2.create(str(folder / f"{name}.qcow2"), str(folder / "disk"), "raw", LARGE)
    disk = FileDisk("disk0", str(folder / "disk"))
    active, hidden = (Overlay(name, "disk0", str(folder / f"{name}.qcow2")) for name in ("active", "hidden"))
    yield Stack(active, hidden, disk)
    active.close()
    hidden.close()
    disk.close()


def seen(stack: Stack) -> bytes:
    data = bytearray(SIZE)
    stack.read(memoryview(data), 0)
    return bytes(data)


def below(stack: Stack) -> bytes:
    data = bytearray(SIZE)
    stack.disk.read(memoryview(data), 0)
    return bytes(data)


def test_the_disk_becomes_what_the_guest_sees_and_the_overlays_are_empty(stack: Stack) -> None:
    jobs = JobList(EventHub())
    expected = seen(stack)
    commit = Commit(jobs, "disk0", stack, threading.Event())
    held = stack.descent.held_bytes()
    commit.run()
    assert below(stack) == seen(stack) == expected
    assert list(stack.descent.portions()) == []
    (shown,) = jobs.query()
    assert (shown["current-progress"], shown["total-progress"], shown["status"]) == (held, held, "running")
    commit.conclude()
    assert jobs.query() == []


def test_a_cancelled_commit_stops_with_everything_in_place_and_another_goes_on(stack: Stack) -> None:
    jobs = JobList(EventHub())
    expected = seen(stack)
    commit = Commit(jobs, "disk0", stack, threading.Event())
    real = stack.descent.commit

    def once(first: int, last: int) -> int:
        jobs.cancel("commit-disk0")
        return real(first, last)

    stack.descent.commit = once  # type: ignore[method-assign]
    with pytest.raises(Cancelled, match="was cancelled"):
        commit.run()
    stack.descent.commit = real  # type: ignore[method-assign]
    assert list(stack.descent.portions()) != []
    assert seen(stack) == expected
    assert jobs.query()[0]["error"] == "the commit was cancelled"
    Commit(jobs, "disk0", stack, threading.Event()).run()
    assert below(stack) == expected


def test_at_the_end_of_the_process_the_job_is_left_for_the_next_one(stack: Stack) -> None:
    jobs = JobList(EventHub())
    closing = threading.Event()
    closing.set()
    with pytest.raises(Cancelled, match="the process ends"):
        Commit(jobs, "disk0", stack, closing).run()
    assert jobs.query()[0]["status"] == "running"


def test_a_commit_that_fails_names_the_cause_and_loses_nothing(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = JobList(EventHub())
    expected = seen(stack)
    failed: list[tuple[str, str]] = []
    done = threading.Event()

    def refuse(*_: object) -> None:
        raise DiskError("broken")

    def note(disk_name: str, error: DiskError) -> None:
        failed.append((disk_name, str(error)))
        done.set()

    closing = threading.Event()
    with monkeypatch.context() as broken:
        broken.setattr(stack.disk, "write", refuse)
        thread = CommitThread([Commit(jobs, "disk0", stack, closing)], closing, lambda: True, note)
        thread.start()
        assert done.wait(DEADLINE_S)
        thread.join(DEADLINE_S)
    assert failed == [("disk0", "secondary disk: broken")]
    assert "broken" in jobs.query()[0]["error"]
    assert seen(stack) == expected


def hold(monkeypatch: pytest.MonkeyPatch, stack: Stack, place: int) -> tuple[threading.Event, threading.Event]:
    """Hold the write to the disk at `place`: (it is held, let it go on)."""
    held, release = threading.Event(), threading.Event()
    real = stack.disk.write

    def write(pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        if offset == place:
            held.set()
            assert release.wait(DEADLINE_S)
        real(pieces, offset, fua)

    monkeypatch.setattr(stack.disk, "write", write)
    return held, release


MIB = 1 << 20


def test_while_one_portion_is_written_another_thread_brings_down_the_rest(
    large: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    large.empty()
    content = pattern(4, 5 * MIB)
    large.write_top(memoryview(content), 0)
    held, release = hold(monkeypatch, large, MIB)
    commit = Commit(JobList(EventHub()), "disk0", large, threading.Event())
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(commit.run)
        try:
            assert held.wait(DEADLINE_S)
            wait_until(lambda: commit.bytes_done == 4 * MIB, "all but the held portion is down")
            assert sorted(first * BLOCK // MIB for first, _ in large.descent._down) == [0, 2, 3, 4]
            assert commit.job.to_json()["current-progress"] == 4 * MIB
        finally:
            release.set()
        run.result(DEADLINE_S)
    assert commit.bytes_done == 5 * MIB
    assert list(large.descent.portions()) == []
    data = bytearray(5 * MIB)
    large.disk.read(memoryview(data), 0)
    assert data == content


def test_when_one_thread_fails_the_other_ends_too_and_none_is_left(
    large: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is held when the other fails finishes what it has in hand, and begins nothing more."""
    large.empty()
    large.write_top(memoryview(pattern(4, 8 * MIB)), 0)
    held, release = hold(monkeypatch, large, 0)
    failed = threading.Event()
    slow = large.disk.write

    def write(pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        if offset == 3 * MIB:
            assert held.wait(DEADLINE_S)
            failed.set()
            raise DiskError("broken")
        slow(pieces, offset, fua)

    monkeypatch.setattr(large.disk, "write", write)
    commit = Commit(JobList(EventHub()), "disk0", large, threading.Event())
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(commit.run)
        try:
            assert failed.wait(DEADLINE_S)
            wait_until(lambda: copying() == 1, "the thread that has failed has ended, or waits for the other")
            assert not run.done()
        finally:
            release.set()
        with pytest.raises(DiskError, match="broken"):
            run.result(DEADLINE_S)
    assert copying() == 0
    assert commit.bytes_done == 3 * MIB
    assert sorted(first * BLOCK // MIB for first, _ in large.descent._down) == [0, 1, 2]
    assert [first * BLOCK // MIB for first, _ in large.descent.portions()] == list(range(8))
    assert large.top._asked == []


def copying() -> int:
    """Threads that bring something down now."""
    inside = Commit._copy.__code__
    count = 0
    for frame in sys._current_frames().values():
        at: FrameType | None = frame
        while at is not None and at.f_code is not inside:
            at = at.f_back
        count += at is not None
    return count


def test_without_another_thread_one_does_it_all(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = seen(stack)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    Commit(JobList(EventHub()), "disk0", stack, threading.Event()).run()
    assert below(stack) == expected


@pytest.mark.parametrize("by", ["both threads", "second thread"])
def test_an_error_of_the_program_ends_the_commit_too(stack: Stack, by: str) -> None:
    real = stack.descent.commit
    main: list[threading.Thread] = []
    met = threading.Event()
    assert len(list(stack.descent.portions())) > 1

    def broken(first: int, last: int) -> int:
        if by == "both threads" or threading.current_thread() not in main:
            met.set()
            raise MemoryError
        assert met.wait(DEADLINE_S)
        return real(first, last)

    stack.descent.commit = broken  # type: ignore[method-assign]
    commit = Commit(JobList(EventHub()), "disk0", stack, threading.Event())

    def run() -> None:
        main.append(threading.current_thread())
        with pytest.raises(DiskError, match="MemoryError"):
            commit.run()

    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(run).result(DEADLINE_S)
        finally:
            commit._cancelled.set()
    assert copying() == 0
    stack.descent.commit = real  # type: ignore[method-assign]
    Commit(JobList(EventHub()), "disk0", stack, threading.Event()).run()
    assert list(stack.descent.portions()) == []


@pytest.mark.parametrize("request_of", ["flush", "write", "zero"])
@pytest.mark.parametrize("power", [False, True])
def test_what_the_disk_could_not_make_stable_fails_the_commit_whoever_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power: bool, request_of: str
) -> None:
    """That pages of a file could not be written Linux tells once: to the next sync, or to the next write with FUA."""
    make_raw(tmp_path / "disk", SIZE)
    for name in ("active", "hidden"):
        qcow2.create(str(tmp_path / f"{name}.qcow2"), str(tmp_path / "disk"), "raw", SIZE)
    disk = FileDisk("disk0", str(tmp_path / "disk"))
    active, hidden = (Overlay(name, "disk0", str(tmp_path / f"{name}.qcow2"), power) for name in ("active", "hidden"))
    stack = Stack(active, hidden, disk)
    stack.write_top(memoryview(pattern(3, 2 * CLUSTER)), 5 * CLUSTER)
    stack.committing = True
    untold: list[int] = []
    sync, write = files.fdatasync, files.pwritev

    def tell(fd: int) -> None:
        if untold and fd == disk._fd:
            raise OSError(untold.pop(), "broken")

    def told_sync(fd: int) -> None:
        tell(fd)
        sync(fd)

    def told_write(fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        count = write(fd, buffers, offset, flags)
        if flags & os.RWF_DSYNC:
            tell(fd)
        return count

    monkeypatch.setattr(files, "fdatasync", told_sync)
    monkeypatch.setattr(files, "pwritev", told_write)
    guest = SecondaryDisk("disk0", "top0", disk, cast("Any", MagicMock()), cast("Any", MagicMock()))
    guest.stack, guest.stage, guest.changes = stack, Stage.FAILOVER, ChangeMap(None, SIZE)
    real = stack.descent.commit

    answers: list[str] = []

    def ask() -> None:
        try:
            if request_of == "flush":
                guest.guest_flush()
            elif request_of == "write":
                guest.guest_write(memoryview(pattern(4, BLOCK)), 0, True)
            else:
                guest.guest_zero(0, BLOCK, False, True)
        except DiskError as error:
            answers.append(str(error))
        else:
            answers.append("ok")

    def commit(first: int, last: int) -> int:
        written = real(first, last)
        if not answers:
            untold.append(errno.EIO)
            ask()
        return written

    stack.descent.commit = commit  # type: ignore[method-assign]
    with pytest.raises(DiskError, match="Input/output error"):
        Commit(JobList(EventHub()), "disk0", stack, threading.Event()).run()
    assert not untold
    assert "Input/output error" in answers[0]
    stack.committing = True  # as with a retry
    Commit(JobList(EventHub()), "disk0", stack, threading.Event()).run()
    stack.close()
    disk.close()


def test_short_runs_are_committed_by_one_thread_at_a_time(large: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    large.empty()
    for block in range(0, 300 * BLOCKS_PER_CLUSTER, 7):
        large.active.mark(block, block + 1, Held.DATA)
    inside = 0
    most = 0
    real = large.disk.write

    def write(pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        real(pieces, offset, fua)
        inside -= 1

    monkeypatch.setattr(large.disk, "write", write)
    held = large.descent.held_bytes()
    commit = Commit(JobList(EventHub()), "disk0", large, threading.Event())
    commit.run()
    assert (most, commit.bytes_done, list(large.descent.portions())) == (1, held, [])


def test_the_flush_of_large_portions_begins_while_the_rest_is_copied(
    large: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    large.empty()
    large.write_top(memoryview(pattern(4, 2 * MIB)), 0)
    large.write_top(memoryview(pattern(5, BLOCK)), 100 * CLUSTER)
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(large.disk, "begin_flush", lambda offset, length: begun.append((offset, length)))
    Commit(JobList(EventHub()), "disk0", large, threading.Event()).run()
    assert sorted(begun) == [(0, MIB), (MIB, MIB)]


held_blocks = st.one_of(
    st.sets(st.integers(0, LARGE // BLOCK), max_size=40),
    st.sets(st.integers(0, 40), max_size=4).map(
        lambda found: {block for cluster in found for block in range(cluster * 32, cluster * 32 + 32)}
    ),
    st.integers(1, 12).map(lambda step: set(range(0, LARGE // BLOCK + 1, step))),
)


@settings(max_examples=30)
@given(held_blocks, held_blocks)
def test_portions_cover_what_is_held_and_a_guest_write_waits_for_a_megabyte_at_most(
    large: Stack, above: set[int], below: set[int]
) -> None:
    large.empty()
    for overlay, blocks in ((large.active, above), (large.hidden, below)):
        overlay.mark_each([(block, block + 1) for block in sorted(blocks)], Held.DATA)
    held = above | below
    portions = list(large.descent.portions())
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(portions))
    covered = [set(range(*portion)) & held for portion in portions]
    assert set().union(*covered) == held
    assert all(covered)
    for (first, last), blocks in zip(portions, covered, strict=True):
        assert first % BLOCKS_PER_CLUSTER == 0
        assert last % BLOCKS_PER_CLUSTER == 0 or last == large.active.blocks
        assert len(blocks) * BLOCK <= 1 << 20
        assert last - first <= 64 * BLOCKS_PER_CLUSTER
