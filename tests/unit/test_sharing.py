# SPDX-License-Identifier: BSD-3-Clause
"""A commit on a file system with reflinks: what it shares, what it copies all the same, and who meets it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from content import MIB, make_raw, pattern
from mounts import SharingFolder
from replication.disk import files
from replication.disk.face import Disk
from replication.disk.file import FileDisk
from replication.events import EventHub
from replication.image import qcow2
from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCK, CLUSTER
from replication.image.stack import Stack
from replication.jobs import JobList
from replication.secondary.commit import Commit
from waiting import DEADLINE_S

SIZE = 4 * MIB + 3 * BLOCK + 777
"""The last cluster is short, the last block, too."""


class Ranges:
    """Stands in for a function of the seam: notes the ranges, in clusters, then goes on to `then`."""

    def __init__(self, then: Callable[..., None]) -> None:
        self.then = then
        self.seen: list[tuple[int, int]] = []

    def __call__(self, *arguments: int) -> None:
        offset, length = arguments[-2:]
        self.seen.append((offset // CLUSTER, length // CLUSTER))
        self.then(*arguments)


@pytest.fixture
def cloned(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    ranges = Ranges(files.clone_range)
    monkeypatch.setattr(files, "clone_range", ranges)
    return ranges


@pytest.fixture
def written_back(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    ranges = Ranges(files.write_back)
    monkeypatch.setattr(files, "write_back", ranges)
    return ranges


def opened(folder: Path, power: bool, disk: Path | None = None) -> Stack:
    """A stack in the folder, of a disk full of 1."""
    disk = make_raw(folder / "disk" if disk is None else disk, SIZE, pattern(1, SIZE))
    for name in ("active", "hidden"):
        qcow2.create(str(folder / f"{name}.qcow2"), str(disk), "raw", SIZE)
    active, hidden = (Overlay(name, "disk0", str(folder / f"{name}.qcow2"), power) for name in ("active", "hidden"))
    stack = Stack(active, hidden, FileDisk("disk0", str(disk)))
    stack.committing = True
    return stack


@pytest.fixture(params=[False, True], ids=["process", "power"])
def stack(sharing_folder: SharingFolder, request: pytest.FixtureRequest) -> Iterator[Stack]:
    made = opened(sharing_folder.folder, request.param)
    yield made
    made.close()
    made.disk.close()


def guest(stack: Stack, offset: int = 0, length: int = SIZE) -> bytes:
    data = bytearray(length)
    stack.read(memoryview(data), offset)
    return bytes(data)


def below(stack: Stack, offset: int = 0, length: int = SIZE) -> bytes:
    data = bytearray(length)
    stack.disk.read(memoryview(data), offset)
    return bytes(data)


def run(stack: Stack) -> None:
    Commit(JobList(EventHub()), "disk0", stack, threading.Event()).run()


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(sharing_folder: SharingFolder) -> Iterator[tuple[FileDisk, FileDisk]]:
    disks = [
        FileDisk(f"disk{each}", str(make_raw(sharing_folder.folder / f"disk{each}", MIB, pattern(each, MIB))))
        for each in (1, 2)
    ]
    yield disks[0], disks[1]
    for disk in disks:
        disk.close()


def whole(disk: Disk) -> bytes:
    data = bytearray(disk.size)
    disk.read(memoryview(data), 0)
    return bytes(data)


def test_what_is_shared_is_the_same_until_one_of_them_is_written(
    two: tuple[FileDisk, FileDisk], sharing_folder: SharingFolder
) -> None:
    source, disk = two
    disk.flush()
    source.write([b"new"], CLUSTER)  # is not on the disk yet
    free = sharing_folder.free
    assert disk.share(source, CLUSTER, 4 * CLUSTER)
    assert sharing_folder.free >= free
    shared = b"new" + pattern(1, MIB)[CLUSTER + 3 : 5 * CLUSTER]
    assert whole(disk) == pattern(2, MIB)[:CLUSTER] + shared + pattern(2, MIB)[5 * CLUSTER :]
    source.write([b"later"], CLUSTER)
    disk.write([b"below"], 2 * CLUSTER)
    assert whole(disk)[CLUSTER : CLUSTER + 3] == b"new"
    assert whole(source)[2 * CLUSTER : 2 * CLUSTER + 5] == pattern(1, MIB)[2 * CLUSTER : 2 * CLUSTER + 5]


def test_what_cannot_be_shared_is_said_to_be_so(two: tuple[FileDisk, FileDisk]) -> None:
    source, disk = two
    fd = os.memfd_create("other")
    os.truncate(fd, MIB)
    elsewhere = FileDisk("disk3", f"/proc/self/fd/{fd}")
    os.close(fd)
    try:
        assert not disk.share(elsewhere, 0, CLUSTER)
        assert not elsewhere.share(source, 0, CLUSTER)
        assert not disk.share(source, 0, 1000), "not whole blocks"
        assert not Disk.share(elsewhere, source, 0, CLUSTER), "any other kind of disk"
    finally:
        elsewhere.close()
    assert whole(disk) == pattern(2, MIB)


def test_a_share_that_is_interrupted_is_asked_for_again(
    two: tuple[FileDisk, FileDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [errno.EINTR, errno.EINTR]
    real = files.clone_range

    def interrupted(source: int, fd: int, offset: int, length: int) -> None:
        if left:
            raise OSError(left.pop(), "interrupted")
        real(source, fd, offset, length)

    monkeypatch.setattr(files, "clone_range", interrupted)
    source, disk = two
    assert disk.share(source, 0, CLUSTER)
    assert not left
    assert whole(disk)[:CLUSTER] == whole(source)[:CLUSTER]


# -- commit --------------------------------------------------------------------------------------------------------


def test_whole_clusters_of_either_overlay_are_shared_and_the_rest_is_copied(
    stack: Stack, cloned: Ranges, written_back: Ranges
) -> None:
    stack.target.write(memoryview(pattern(2, 2 * MIB)), MIB, False)  # hidden: the second and third MiB
    stack.write_top(memoryview(pattern(3, 2 * MIB)), 0)  # active: the first and second one
    stack.write_top(memoryview(pattern(4, BLOCK)), 30 * CLUSTER + 7)
    stack.write_top(memoryview(pattern(5, SIZE - 32 * CLUSTER)), 32 * CLUSTER)
    expected = guest(stack)
    run(stack)
    assert below(stack) == guest(stack) == expected
    assert list(stack.descent.portions()) == []
    # Two MiB of active, one of hidden; neither the blocks nor the last MiB, which is not whole clusters.
    assert sorted(cloned.seen) == [(0, 8), (8, 8), (16, 8)]
    # The first of each overlay has shown that it goes: from then on what is dirty is written without the locks.
    assert len(written_back.seen) <= 1


def test_a_large_commit_takes_no_space(sharing_folder: SharingFolder, cloned: Ranges) -> None:
    stack = opened(sharing_folder.folder, power=False)
    try:
        stack.disk.zero(0, SIZE, may_trim=True)
        stack.write_top(memoryview(pattern(3, 4 * MIB)), 0)
        stack.flush_all()
        free = sharing_folder.free
        run(stack)
        assert below(stack, 0, 4 * MIB) == pattern(3, 4 * MIB)
        assert free - sharing_folder.free < MIB
        assert len(cloned.seen) == 4
    finally:
        stack.close()
        stack.disk.close()


def test_where_sharing_fails_it_is_copied_and_not_tried_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, written_back: Ranges
) -> None:
    tried: list[int] = []

    def full(source: int, fd: int, offset: int, length: int) -> None:
        tried.append(offset)
        os.pwrite(fd, b"torn", offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "clone_range", full)
    stack.write_top(memoryview(pattern(3, 4 * MIB)), 0)
    expected = guest(stack)
    for first, last in stack.descent.portions():
        stack.descent.commit(first, last)
    stack.flush_committed()
    assert below(stack) == expected
    assert (tried, written_back.seen) == ([0], [])
    # The other overlay may be somewhere else.
    stack.target.write(memoryview(pattern(4, 2 * MIB)), 0, False)
    for first, last in stack.descent.portions():
        stack.descent.commit(first, last)
    stack.flush_committed()
    assert below(stack) == expected
    assert tried == [0, 0]


def test_overlays_elsewhere_are_copied(sharing_folder: SharingFolder, tmp_path: Path, cloned: Ranges) -> None:
    stack = opened(tmp_path, power=False, disk=sharing_folder.folder / "disk")
    try:
        stack.write_top(memoryview(pattern(3, 3 * MIB)), 0)
        expected = guest(stack)
        run(stack)
        assert below(stack) == expected
        assert len(cloned.seen) <= 2, "each of the two threads may try at first"
    finally:
        stack.close()
        stack.disk.close()


def test_what_is_dirty_is_written_before_the_range_is_locked_and_what_is_written_then_is_shared_too(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, cloned: Ranges
) -> None:
    """A guest write that comes while a portion is written back does not wait, and comes down with it."""
    stack.write_top(memoryview(pattern(3, 2 * MIB)), 0)
    stack.descent.commit(0, MIB // BLOCK)  # it goes, so the next one writes back

    def overtaken(ranges: Callable[..., None]) -> Callable[..., None]:
        def write_back(fd: int, offset: int, length: int) -> None:
            ranges(fd, offset, length)
            assert stack.top._asked == []
            stack.write_top(memoryview(b"late"), MIB + 5)

        return write_back

    monkeypatch.setattr(files, "write_back", overtaken(files.write_back))
    stack.descent.commit(MIB // BLOCK, 2 * MIB // BLOCK)
    expected = pattern(3, 2 * MIB)
    expected = expected[: MIB + 5] + b"late" + expected[MIB + 9 :]
    assert guest(stack, 0, 2 * MIB) == below(stack, 0, 2 * MIB) == expected
    assert cloned.seen == [(0, 8), (8, 8)]


def test_a_guest_write_waits_for_what_is_being_shared_and_goes_to_the_disk(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    commit:  locks, shares -- held ------- lets go
    guest:                     writes, waits       to the disk
    """
    stack.write_top(memoryview(pattern(3, MIB)), 0)
    held, release = threading.Event(), threading.Event()
    real = files.clone_range

    def slow(source: int, fd: int, offset: int, length: int) -> None:
        real(source, fd, offset, length)
        held.set()
        assert release.wait(DEADLINE_S)

    monkeypatch.setattr(files, "clone_range", slow)
    with ThreadPoolExecutor(2) as pool:
        commit = pool.submit(stack.descent.commit, 0, MIB // BLOCK)
        assert held.wait(DEADLINE_S)
        write = pool.submit(stack.write_over, memoryview(b"mine"), 100, True)
        assert guest(stack, 0, MIB) == pattern(3, MIB), "reads do not wait"
        assert not write.done()
        release.set()
        assert commit.result(DEADLINE_S) == MIB
        write.result(DEADLINE_S)
    expected = pattern(3, MIB)[:100] + b"mine" + pattern(3, MIB)[104:]
    assert guest(stack, 0, MIB) == below(stack, 0, MIB) == expected
    stack.flush_committed()
    assert list(stack.descent.portions()) == []
