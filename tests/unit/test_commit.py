# SPDX-License-Identifier: BSD-3-Clause
"""commit.py: the job goes over the overlays until nothing is left, is cancelled, fails, or the process ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import DEADLINE_S, make_raw, pattern
from replication.commit import RUN_BLOCKS, Cancelled, Commit, CommitThread, _runs
from replication.errors import DiskError
from replication.events import EventHub
from replication.image import qcow2
from replication.image.file import FileDisk
from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, CLUSTER
from replication.image.stack import Stack
from replication.jobs import JobList

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
    opened.write_below(memoryview(pattern(2, 6 * CLUSTER)), 5 * CLUSTER + 5, False)
    opened.write_top(memoryview(pattern(3, 3 * CLUSTER)), 9 * CLUSTER + 9)
    opened.zero_top(SIZE - 5000, 5000)
    yield opened
    opened.close()
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
    held = stack.held_bytes()
    commit.run()
    assert below(stack) == seen(stack) == expected
    assert list(stack.held_ranges()) == []
    (shown,) = jobs.query()
    assert (shown["current-progress"], shown["total-progress"], shown["status"]) == (held, held, "running")
    commit.conclude()
    assert jobs.query() == []


def test_a_cancelled_commit_stops_with_everything_in_place_and_another_goes_on(stack: Stack) -> None:
    jobs = JobList(EventHub())
    expected = seen(stack)
    commit = Commit(jobs, "disk0", stack, threading.Event())
    real = stack.commit

    def once(first: int, last: int) -> int:
        jobs.cancel("commit-disk0")
        return real(first, last)

    stack.commit = once  # type: ignore[method-assign]
    with pytest.raises(Cancelled, match="was cancelled"):
        commit.run()
    stack.commit = real  # type: ignore[method-assign]
    assert list(stack.held_ranges()) != []
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

    def note(commit: Commit, error: DiskError) -> None:
        failed.append((commit.disk_name, str(error)))
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


clusters = st.sets(st.integers(0, 60)).map(
    lambda found: [(number * BLOCKS_PER_CLUSTER, (number + 1) * BLOCKS_PER_CLUSTER) for number in sorted(found)]
)


@given(clusters)
def test_runs_cover_the_same_blocks_and_are_never_longer_than_a_guest_may_wait_for(
    ranges: list[tuple[int, int]],
) -> None:
    runs = list(_runs(ranges))
    assert [block for run in runs for block in range(*run)] == [block for one in ranges for block in range(*one)]
    assert all(last - first <= RUN_BLOCKS for first, last in runs)
    assert RUN_BLOCKS * BLOCK == 1 << 20
