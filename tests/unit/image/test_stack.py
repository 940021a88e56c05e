# SPDX-License-Identifier: BSD-3-Clause
"""stack.py: the three images of a disk against byte arrays, and the pairs of requests that its docstring decides.

The interleavings are forced by a secondary disk that calls back in the midst of a request.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from content import make_raw, pattern
from replication.disk import files
from replication.disk.face import Extent
from replication.disk.files import Buffer
from replication.errors import DiskError
from replication.image import overlay as overlay_module
from replication.image import qcow2, shortage, syncgroup
from replication.image.layer import Layer, LayerError
from replication.image.overlay import Held, Overlay
from replication.image.qcow2 import BLOCK, CLUSTER, PAGE_CLUSTERS
from replication.image.stack import Stack
from replication.record.changes import GRAIN
from waiting import DEADLINE_S, wait_until
from watcheddisk import WatchedDisk

pytestmark = pytest.mark.usefixtures("no_sharing")

SIZE = 3 * CLUSTER + 5 * BLOCK + 1234
"""The last block is short, and not even whole sectors."""
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where nothing has to be waited for that is flushed thousands of times."""


class Images:
    """A disk, its overlays and its stack in a folder; `disk.raw` begins with `content`. `power`: durability=power."""

    def __init__(self, folder: Path, content: bytes = b"", size: int = SIZE, power: bool = False) -> None:
        self.folder = folder
        self.power = power
        make_raw(folder / "disk.raw", size, content)
        for name, backing, image_format in (("hidden", "disk.raw", "raw"), ("active", "hidden.qcow2", "qcow2")):
            qcow2.create(str(folder / f"{name}.qcow2"), str(folder / backing), image_format, size)
        self.open()

    def open(self) -> None:
        self.disk = WatchedDisk(self.folder / "disk.raw")
        active, hidden = (
            Overlay(role, "disk0", str(self.folder / f"{role}.qcow2"), self.power) for role in ("active", "hidden")
        )
        self.stack = Stack(active, hidden, self.disk)

    def close(self) -> None:
        self.stack.close()
        self.disk.close()

    def top(self, offset: int = 0, length: int | None = None) -> bytes:
        """What the guest sees."""
        data = bytearray(self.stack.size - offset if length is None else length)
        self.stack.read(memoryview(data), offset)
        return bytes(data)

    def below(self, offset: int = 0, length: int | None = None) -> bytes:
        """What is in the secondary disk."""
        with open(self.folder / "disk.raw", "rb") as file:
            file.seek(offset)
            return file.read(self.stack.size - offset if length is None else length)


@pytest.fixture(params=[False, True], ids=["process", "power"])
def images(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Images]:
    opened = Images(tmp_path, pattern(1, SIZE), power=request.param)
    yield opened
    opened.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def once(action: Callable[[], object], operation: str) -> Callable[[str], None]:
    """A hook that runs `action` at the first `operation`."""
    left = [action]

    def hook(name: str) -> None:
        if name == operation and left:
            left.pop()()

    return hook


class Histories(RuleBasedStateMachine):
    """Any requests one after the other: the guest sees the last checkpoint and its own writes, always."""

    ranges = st.one_of(
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK)),
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)),
        st.tuples(st.integers(0, SIZE // BLOCK).map(lambda block: block * BLOCK), st.integers(1, 40 * BLOCK)),
        st.tuples(st.integers(0, SIZE // BLOCK).map(lambda block: block * BLOCK), st.just(SIZE)),
    ).map(lambda at: (at[0], min(at[1], SIZE - at[0])))
    serial = 0

    @initialize(seed=st.integers(0, 5), holes=st.booleans(), power=st.booleans())
    def open(self, seed: int, holes: bool, power: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stack-", dir=MEMORY))
        content = pattern(seed, CLUSTER if holes else SIZE)
        self.images = Images(self.folder, content, power=power)
        self.below = bytearray(content + bytes(SIZE - len(content)))
        self.top = bytearray(self.below)

    def teardown(self) -> None:
        self.images.close()
        shutil.rmtree(self.folder)

    def data(self, length: int) -> bytes:
        self.serial += 1
        return pattern(1000 + self.serial, length)

    @rule(where=ranges)
    def guest_writes(self, where: tuple[int, int]) -> None:
        offset, length = where
        data = self.data(length)
        self.images.stack.write_top(memoryview(data), offset)
        self.top[offset : offset + length] = data

    @rule(where=ranges)
    def guest_zeroes(self, where: tuple[int, int]) -> None:
        offset, length = where
        self.images.stack.zero_top(offset, length)
        self.top[offset : offset + length] = bytes(length)

    @rule(where=ranges, fua=st.booleans(), zeroes=st.booleans())
    def primary_writes(self, where: tuple[int, int], fua: bool, zeroes: bool) -> None:
        offset, length = where
        data = bytes(length) if zeroes else self.data(length)
        self.images.stack.target.write(memoryview(data), offset, fua)
        self.below[offset : offset + length] = data

    @rule(places=st.lists(ranges, min_size=1, max_size=6), small=st.booleans())
    def primary_writes_many(self, places: list[tuple[int, int]], small: bool) -> None:
        pieces = [(offset, self.data(min(length, BLOCK) if small else length)) for offset, length in places]
        assert self.images.stack.target.write_all([(offset, memoryview(data)) for offset, data in pieces]) == []
        for offset, data in pieces:
            self.below[offset : offset + len(data)] = data

    @rule(where=ranges, may_trim=st.booleans())
    def primary_zeroes(self, where: tuple[int, int], may_trim: bool) -> None:
        offset, length = where
        self.images.stack.target.zero(offset, length, may_trim, False)
        self.below[offset : offset + length] = bytes(length)

    @rule()
    def checkpoint(self) -> None:
        self.images.stack.empty()
        self.top[:] = self.below
        assert self.images.stack.descent.held_bytes() == 0

    @rule(where=ranges)
    def part_is_committed(self, where: tuple[int, int]) -> None:
        first, last = where[0] // BLOCK, -(-(where[0] + where[1]) // BLOCK)
        # What neither overlay holds already is below as it is seen.
        self.images.stack.descent.commit(first, last)
        self.images.stack.flush_committed()
        self.below[first * BLOCK : last * BLOCK] = self.top[first * BLOCK : min(last * BLOCK, SIZE)]

    @rule()
    def all_is_committed(self) -> None:
        descent = self.images.stack.descent
        held = descent.held_bytes()
        written = sum(descent.commit(first, last) for first, last in list(descent.portions()))
        assert written == held
        self.images.stack.flush_committed()
        self.below[:] = self.top
        assert list(self.images.stack.descent.portions()) == []

    @rule(where=ranges, zeroes=st.booleans())
    def guest_writes_during_a_commit(self, where: tuple[int, int], zeroes: bool) -> None:
        """By the table's row failover: above where held, else the disk. Both are seen the same."""
        offset, length = where
        data = bytes(length) if zeroes else self.data(length)
        if zeroes:
            self.images.stack.zero_over(offset, length, True, False)
        else:
            self.images.stack.write_over(memoryview(data), offset, False)
        self.top[offset : offset + length] = data
        self.below[:] = self.images.below()

    @rule()
    def flush(self) -> None:
        self.images.stack.flush_all()

    @rule(power=st.booleans())
    def reopen(self, power: bool) -> None:
        """The next process of this boot, which may have the other durability."""
        self.images.close()
        self.images.power = power
        self.images.open()

    @rule()
    def reclaim(self) -> None:
        for overlay in (self.images.stack.active, self.images.stack.hidden):
            self.images.stack.room.reclaim_some(overlay, overlay.stale_ranges(), 100)

    @rule(where=ranges)
    def look(self, where: tuple[int, int]) -> None:
        offset, length = where
        assert self.images.top(offset, length) == self.top[offset : offset + length]
        at = offset
        for extent in self.images.stack.extents(offset, length):
            assert extent.offset == at
            at += extent.length
            assert not extent.zero or not any(self.top[extent.offset : at])
        assert at == offset + length
        (first,) = self.images.stack.extents(offset, length, 1)
        assert first.offset == offset
        assert 0 < first.length <= length
        assert not first.zero or not any(self.top[offset : offset + first.length])

    @invariant()
    def both_sides_are_as_the_model(self) -> None:
        assert self.images.top() == self.top
        assert self.images.below() == self.below


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
TestHistories = Histories.TestCase


def test_extents_are_bounded_however_the_images_alternate(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate stands open for whoever waits behind such a request, so it ends after so many extents; who asks for one
    gets one, for next to nothing."""
    asked: list[int] = []
    real = images.stack.disk.extents

    def extents(offset: int, length: int, count: int = 1024) -> list[Extent]:
        asked.append(count)
        return real(offset, length, count)

    monkeypatch.setattr(images.stack.disk, "extents", extents)
    blocks = images.stack.size // BLOCK
    for block in range(0, blocks, 2):
        images.stack.zero_top(block * BLOCK, BLOCK)
    assert images.stack.extents(0, images.stack.size, 1) == [Extent(0, BLOCK, True, True)]
    assert not asked
    assert len(images.stack.extents(BLOCK, images.stack.size - BLOCK, 1)) == 1
    assert asked == [1]
    seen = images.stack.extents(0, images.stack.size, 7)
    assert len(seen) == 7
    assert seen[0] == Extent(0, BLOCK, True, True)
    assert len(asked) <= 1 + 4


# -- two requests on one block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeroes", [False, True], ids=["write", "zero"])
def test_a_guest_read_that_the_target_overtakes_on_the_disk_still_gets_the_checkpoint(
    images: Images, pool: ThreadPoolExecutor, zeroes: bool
) -> None:
    expected = images.top()

    def overtake() -> None:
        images.disk.before = lambda _: None
        if zeroes:
            pool.submit(images.stack.target.zero, 100, 2 * CLUSTER, True, False).result(DEADLINE_S)
        else:
            new = memoryview(pattern(9, 2 * CLUSTER))
            pool.submit(images.stack.target.write, new, 100, False).result(DEADLINE_S)

    # The read has found its blocks in no overlay when the target write changes them.
    images.disk.before = once(overtake, "read")
    assert images.top(0, CLUSTER) == expected[:CLUSTER]
    assert images.below(4096, 10) != expected[4096:4106]
    assert images.top() == expected


def test_a_guest_write_that_completes_a_block_under_a_target_write_completes_it_from_the_checkpoint(
    images: Images, pool: ThreadPoolExecutor
) -> None:
    expected = bytearray(images.top())

    def overtake() -> None:
        images.disk.before = lambda _: None
        pool.submit(images.stack.target.write, memoryview(b"\xee" * BLOCK), 0, False).result(DEADLINE_S)

    images.disk.before = once(overtake, "read")
    images.stack.write_top(memoryview(b"guest"), 1000)
    expected[1000:1005] = b"guest"
    assert images.top() == expected


def test_the_second_target_write_to_a_block_does_not_preserve_the_first_ones_data(
    images: Images, pool: ThreadPoolExecutor
) -> None:
    expected = images.top()
    second: list[Any] = []

    def start_second() -> None:
        # The first one has copied the block and not yet written; the second must wait for it, whole.
        images.disk.before = lambda _: None
        second.append(pool.submit(images.stack.target.write, memoryview(b"\xbb" * 512), 512, False))
        wait_until(lambda: len(images.stack.below._asked) == 2, "the second target write asks for the block")
        assert not second[0].done()

    images.disk.before = once(start_second, "write")
    images.stack.target.write(memoryview(b"\xaa" * 512), 0, False)
    second[0].result(DEADLINE_S)
    assert images.top() == expected
    assert images.below(0, 1025) == b"\xaa" * 512 + b"\xbb" * 512 + expected[1024:1025]


def test_the_old_block_is_in_hidden_before_the_disk_changes(images: Images) -> None:
    def look(operation: str) -> None:
        assert operation != "write" or images.stack.hidden.holds_all(0, 3)

    images.disk.before = look
    images.stack.target.write(memoryview(bytes(2 * BLOCK)), 100, False)
    assert images.stack.hidden.holds_all(0, 3)


def test_a_sync_that_takes_long_ends_nothing_and_nothing_is_overwritten_before_it(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability=power: a write that gave up waiting has left a copy that is not stable yet. The next one to its block
    finds that copied, and must not change the disk before it is stable."""
    images = Images(tmp_path, pattern(1, SIZE), power=True)
    begun, release = threading.Semaphore(0), threading.Event()
    synced: list[bool] = []
    real = images.stack.hidden.data.flush

    def flush() -> None:
        begun.release()
        assert release.wait(DEADLINE_S)
        synced.append(True)
        real()

    monkeypatch.setattr(images.stack.hidden.data, "flush", flush)
    new = memoryview(b"\xaa" * BLOCK)
    first = pool.submit(images.stack.target.write, new, 0, False)
    assert begun.acquire(timeout=DEADLINE_S)
    with monkeypatch.context() as patch:
        patch.setattr(syncgroup, "_WAIT_S", 0.01)
        with pytest.raises(LayerError) as refusal:
            images.stack.target.write(new, 8 * BLOCK, False)
        assert refusal.value.still_waiting
        assert images.stack.hidden.holds_all(8, 9)
        with pytest.raises(LayerError):
            images.stack.target.write(new, 8 * BLOCK, False)
    assert images.below(8 * BLOCK, BLOCK) == pattern(1, SIZE)[8 * BLOCK : 9 * BLOCK]
    assert images.stack.target.lost.missing, "the primary has to send it again"
    release.set()
    first.result(DEADLINE_S)
    count = len(synced)
    images.stack.target.write(new, 8 * BLOCK, False)
    assert len(synced) == count + 1
    assert images.below(8 * BLOCK, BLOCK) == new
    images.close()


def test_a_guest_write_waits_for_the_commit_of_its_block_and_is_not_overwritten_by_it(
    images: Images, pool: ThreadPoolExecutor
) -> None:
    images.stack.write_top(memoryview(b"\xaa" * BLOCK), 0)
    guest: list[Any] = []

    def write() -> None:
        images.disk.after = lambda _: None
        guest.append(pool.submit(images.stack.write_over, memoryview(b"\xbb" * 10), 5, True))
        wait_until(lambda: len(images.stack.top._asked) == 2, "the guest's write waits for the commit")

    images.disk.after = once(write, "write")
    images.stack.descent.commit(0, 1)
    guest[0].result(DEADLINE_S)
    assert images.below(0, BLOCK) == b"\xaa" * 5 + b"\xbb" * 10 + b"\xaa" * (BLOCK - 15)
    assert images.top(0, BLOCK) == images.below(0, BLOCK)


def commit_all(images: Images) -> None:
    for first, last in list(images.stack.descent.portions()):
        images.stack.descent.commit(first, last)
    images.stack.flush_committed()


@pytest.mark.parametrize("face", ["top", "below"], ids=["active", "hidden"])
def test_a_guest_write_waits_for_the_commit_of_whole_clusters_and_is_not_overwritten_by_it(
    images: Images, pool: ThreadPoolExecutor, face: str
) -> None:
    """And a guest read in the midst of it sees what it saw before."""
    if face == "top":
        images.stack.write_top(memoryview(b"\xaa" * CLUSTER), 0)
    else:
        images.stack.target.write(memoryview(b"\xaa" * CLUSTER), 0, False)
    expected = bytearray(images.top())
    guest: list[Any] = []

    def write() -> None:
        guest.append(pool.submit(images.stack.write_over, memoryview(b"\xbb" * 10), 5, True))
        wait_until(lambda: len(images.stack.top._asked) == 2, "the guest's write waits for the commit")
        assert images.top() == expected

    images.disk.after = once(write, "write")
    assert images.stack.descent.commit(0, 32) == CLUSTER
    guest[0].result(DEADLINE_S)
    expected[5:15] = b"\xbb" * 10
    assert images.below(0, CLUSTER) == expected[:CLUSTER]
    assert images.top() == expected


@pytest.mark.parametrize("full", [False, True], ids=["written above", "let go of"])
def test_whole_clusters_that_change_before_a_commit_has_locked_them_are_brought_down_as_they_are_then(
    images: Images, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """With room in active the guest's write is in it; without, its block has gone to the disk and is held no more."""
    images.stack.write_top(memoryview(b"\xaa" * 2 * CLUSTER), 0)
    expected = bytearray(images.top())
    images.stack.committing = True
    real = images.stack.top.acquire

    def acquire(start: int, stop: int, *why: str) -> Any:
        monkeypatch.undo()
        with monkeypatch.context() as broken:
            if full:
                break_overlay(broken, images.stack.active, 1, errno.ENOSPC)
            images.stack.write_over(memoryview(b"\xbb" * 10), 5 * BLOCK, shelter=True)
        assert images.stack.active.holds_any(5, 6) != full
        return real(start, stop, *why)

    monkeypatch.setattr(images.stack.top, "acquire", acquire)
    assert images.stack.descent.commit(0, 64) == 2 * CLUSTER - (BLOCK if full else 0)
    images.stack.flush_committed()
    expected[5 * BLOCK : 5 * BLOCK + 10] = b"\xbb" * 10
    assert images.below() == images.top() == expected
    assert list(images.stack.descent.portions()) == []


def test_a_guest_write_between_the_blocks_of_a_commit_does_not_wait_and_what_comes_up_there_stays(
    images: Images, pool: ThreadPoolExecutor
) -> None:
    images.stack.committing = True
    images.stack.write_top(memoryview(b"\xaa" * BLOCK), 0)
    images.stack.write_top(memoryview(b"\xaa" * BLOCK), 9 * BLOCK)
    expected = bytearray(images.top())
    below = bytearray(images.below())

    def write() -> None:
        images.disk.before = failing("write")
        pool.submit(images.stack.write_over, memoryview(b"\xbb" * 10), 5 * BLOCK, True).result(DEADLINE_S)
        images.disk.before = lambda _: None

    images.disk.after = once(write, "write")
    assert images.stack.descent.commit(0, 32) == 2 * BLOCK
    expected[5 * BLOCK : 5 * BLOCK + 10] = b"\xbb" * 10
    assert images.top() == expected, "the disk has refused it, so it must stay in active"
    for block in (0, 9):
        below[block * BLOCK : (block + 1) * BLOCK] = b"\xaa" * BLOCK
    assert images.below() == below
    images.stack.flush_committed()
    assert images.stack.active.holds_any(5, 6)
    images.stack.descent.commit(0, 32)
    assert images.below() == expected


@pytest.mark.parametrize("block", [0, 5], ids=["the same block", "between"])
def test_what_a_guest_writes_after_a_commit_has_looked_and_before_it_has_locked_is_not_lost(
    images: Images, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    images.stack.write_top(memoryview(b"\xaa" * BLOCK), 0)
    images.stack.write_top(memoryview(b"\xaa" * BLOCK), 9 * BLOCK)
    expected = bytearray(images.top())
    real = images.stack.top.acquire_all

    def acquire(spans: Sequence[tuple[int, int]], *why: str) -> Any:
        monkeypatch.undo()
        images.disk.before = failing("write")
        images.stack.write_over(memoryview(b"\xbb" * 10), block * BLOCK, shelter=True)
        images.disk.before = lambda _: None
        return real(spans, *why)

    monkeypatch.setattr(images.stack.top, "acquire_all", acquire)
    images.stack.descent.commit(0, 32)
    expected[block * BLOCK : block * BLOCK + 10] = b"\xbb" * 10
    assert images.top() == expected
    below = bytes(expected[5 * BLOCK : 6 * BLOCK]) if block == 0 else pattern(1, SIZE)[5 * BLOCK : 6 * BLOCK]
    assert images.below(5 * BLOCK, BLOCK) == below, "only what was locked has come down"
    assert images.stack.active.holds_any(block, block + 1)
    images.stack.descent.commit(0, 32)
    assert images.below() == expected


def test_what_was_let_go_after_a_commit_has_looked_is_not_brought_down_again(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a guest write for which active has no room: its block goes to the disk at once."""
    images.stack.write_top(memoryview(b"\xaa" * BLOCK), 0)
    images.stack.write_top(memoryview(b"\xaa" * BLOCK), 9 * BLOCK)
    expected = bytearray(images.top())
    images.stack.committing = True
    real = images.stack.top.acquire_all

    def acquire(spans: Sequence[tuple[int, int]], *why: str) -> Any:
        monkeypatch.undo()
        with monkeypatch.context() as full:
            break_overlay(full, images.stack.active, 1, errno.ENOSPC)
            images.stack.write_over(memoryview(b"\xbb" * 10), 0, shelter=True)
        assert not images.stack.active.holds_any(0, 1)
        return real(spans, *why)

    monkeypatch.setattr(images.stack.top, "acquire_all", acquire)
    images.stack.descent.commit(0, 32)
    expected[:10] = b"\xbb" * 10
    assert images.below() == images.top() == expected


@pytest.mark.parametrize("blocks", [(0, 32), (0, 96)], ids=["whole clusters", "runs"])
@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_a_commit_that_fails_names_the_place_and_keeps_everything_above(
    images: Images, monkeypatch: pytest.MonkeyPatch, call: str, blocks: tuple[int, int]
) -> None:
    images.stack.write_top(memoryview(pattern(5, CLUSTER)), 0)
    images.stack.write_top(memoryview(b"\xaa" * BLOCK), 40 * BLOCK)
    expected = images.top()
    real = getattr(files, call)
    offset, length = (0, CLUSTER) if blocks == (0, 32) else (40 * BLOCK, BLOCK)

    def fail(*arguments: Any) -> int:
        if arguments[2] == offset:
            raise OSError(errno.EIO, "broken")
        return int(real(*arguments))

    with monkeypatch.context() as broken:
        broken.setattr(files, call, fail)
        with pytest.raises(LayerError) as refusal:
            images.stack.descent.commit(*blocks)
    layer, operation = (Layer.SECONDARY, "commit") if call == "pwritev" else (Layer.ACTIVE, "read")
    error = refusal.value
    assert (error.layer, error.operation, error.offset, error.length) == (layer, operation, offset, length)
    assert images.top() == expected
    commit_all(images)
    assert images.below() == expected


def test_words_with_bits_behind_the_disks_end_alone_are_let_go_of(images: Images) -> None:
    """QEMU, zeroing up to the disk's end, marks its last cluster to the end; a commit must come to an end all the
    same."""
    images.stack.active.mark(3 * 32 + 10, 4 * 32, Held.ZERO)
    assert SIZE < (3 * 32 + 10) * BLOCK
    (portion,) = images.stack.descent.portions()
    assert images.stack.descent.commit(*portion) == 0
    images.stack.flush_committed()
    assert list(images.stack.descent.portions()) == []


@pytest.mark.parametrize(("length", "how"), [(BLOCK, "forget_chosen"), (CLUSTER, "forget")], ids=["runs", "whole"])
def test_commit_writes_the_disk_before_it_lets_go_and_lets_go_of_hidden_first(
    images: Images, monkeypatch: pytest.MonkeyPatch, length: int, how: str
) -> None:
    images.stack.target.write(memoryview(b"\xaa" * length), 0, False)
    images.stack.write_top(memoryview(b"\xbb" * length), 0)
    order: list[str] = []
    real = getattr(Overlay, how)

    def forget(self: Overlay, *arguments: Any) -> None:
        order.append(self.role)
        assert images.below(0, length) == b"\xbb" * length
        real(self, *arguments)
        assert images.top(0, length) == b"\xbb" * length, "at every step, so after every kill"

    monkeypatch.setattr(Overlay, how, forget)
    images.stack.committing = True
    images.stack.descent.commit(0, 32 if how == "forget" else 64)
    assert order == [], "the disk has not been flushed"
    images.disk.after = once(lambda: images.stack.write_over(memoryview(b"late"), CLUSTER, shelter=True), "flush")
    images.stack.flush_committed()
    assert order == ["hidden", "active"]
    assert images.stack.active.holds_any(32, 33), "the flush had been sent"


@pytest.mark.parametrize("how", ["held", "let go of", "no room", "refused"])
def test_what_a_guest_writes_during_a_commit_is_held_until_a_flush_has_covered_it(
    images: Images, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    images.stack.write_top(memoryview(b"\xaa" * CLUSTER), 0)
    images.stack.committing = True
    images.stack.descent.commit(0, 32)
    if how == "let go of":
        images.stack.flush_committed()
        assert not images.stack.active.holds_any(0, 32)
    if how == "refused":
        images.disk.before = failing("write")
    with monkeypatch.context() as full:
        if how == "no room":
            break_overlay(full, images.stack.active, 1, errno.ENOSPC)
        images.stack.write_over(memoryview(b"\xbb" * 10), 5 * BLOCK + 7, shelter=True)
    images.disk.before = lambda _: None
    expected = images.top()
    assert expected[5 * BLOCK : 6 * BLOCK] == b"\xaa" * 7 + b"\xbb" * 10 + b"\xaa" * (BLOCK - 17)
    assert images.stack.active.holds_any(5, 6) == (how != "no room")
    assert (images.below() == expected) == (how != "refused")
    assert images.stack.settled == (how != "refused")
    if how == "refused":
        images.stack.flush_committed()
        assert images.stack.active.holds_any(5, 6), "the disk lacks it"
        images.stack.descent.commit(0, 32)
    images.stack.flush_committed()
    assert images.stack.settled
    assert images.below() == images.top() == expected


@pytest.mark.parametrize("by", ["commit", "guest"])
def test_after_a_flush_that_failed_everything_since_the_last_good_one_is_brought_down_again(
    images: Images, by: str
) -> None:
    """The disk keeps what was flushed, and nothing else: as a kernel may do that cannot write its pages."""
    images.stack.write_top(memoryview(pattern(5, CLUSTER)), 0)
    images.stack.target.write(memoryview(pattern(6, CLUSTER)), CLUSTER, False)
    images.stack.committing = True
    images.stack.descent.commit(0, 32)
    images.stack.flush_committed()
    stable = images.below()
    images.stack.write_over(memoryview(b"\xbb" * BLOCK), 5 * BLOCK, shelter=True)
    images.stack.write_over(memoryview(b"\xcc" * BLOCK), 40 * BLOCK, shelter=True)
    images.stack.zero_over(BLOCK + 9, BLOCK, True, shelter=True)
    images.stack.descent.commit(32, 64)
    expected = images.top()
    assert images.below() == expected
    images.disk.before = failing("flush")
    with pytest.raises(DiskError):
        images.stack.flush_top() if by == "guest" else images.stack.flush_committed()
    images.disk.before = lambda _: None
    images.disk.write([stable], 0)
    with pytest.raises(DiskError):
        images.stack.flush_committed()
    assert not images.stack.settled
    assert images.top() == expected
    images.stack.committing = True  # by a retry
    commit_all(images)
    assert images.below() == images.top() == expected
    assert images.stack.settled


# -- writing to an overlay -----------------------------------------------------------------------------------------


def fill(images: Images, role: str, data: bytes) -> None:
    """Let the stack write to the overlay: what the guest writes to active, what the primary overwrites to hidden."""
    if role == "active":
        images.stack.write_top(memoryview(data), 3 * BLOCK)
    else:
        images.stack.target.write(memoryview(data), 3 * BLOCK, False)


@pytest.mark.parametrize("role", ["active", "hidden"])
def test_the_bit_comes_after_the_data(images: Images, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    overlay = getattr(images.stack, role)
    at_write: list[bool] = []
    real = overlay.data.write

    def write(*arguments: Any) -> None:
        at_write.append(overlay.holds_any(3, 5))
        real(*arguments)
        at_write.append(overlay.holds_any(3, 5))

    monkeypatch.setattr(overlay.data, "write", write)
    fill(images, role, b"\xaa" * 2 * BLOCK)
    assert at_write == [False, False]
    assert overlay.holds_all(3, 5)


@pytest.mark.parametrize("role", ["active", "hidden"])
def test_a_write_to_an_overlay_that_failed_sets_no_bit(
    images: Images, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    overlay = getattr(images.stack, role)

    def write(*_: object) -> None:
        raise DiskError("no")

    monkeypatch.setattr(overlay.data, "write", write)
    with pytest.raises(DiskError, match="no"):
        fill(images, role, b"\xaa" * 2 * BLOCK)
    assert not overlay.holds_any(0, overlay.blocks)


# -- many target writes at once ------------------------------------------------------------------------------------


def views(*pieces: tuple[int, bytes]) -> list[tuple[int, memoryview]]:
    return [(offset, memoryview(data)) for offset, data in pieces]


@pytest.mark.parametrize("length", [BLOCK, 2 * CLUSTER], ids=["one block", "clusters"])
def test_a_guest_read_that_many_target_writes_overtake_still_gets_the_checkpoint(
    images: Images, pool: ThreadPoolExecutor, length: int
) -> None:
    expected = images.top()
    pieces = views(*((offset, b"\xee" * 1000) for offset in range(10, 2 * CLUSTER, BLOCK)))

    def overtake() -> None:
        images.disk.before = lambda _: None
        pool.submit(images.stack.target.write_all, pieces).result(DEADLINE_S)

    images.disk.before = once(overtake, "read")
    assert images.top(0, length) == expected[:length]
    assert images.below(10, 5) == b"\xee" * 5
    assert images.top() == expected


def test_of_many_target_writes_none_changes_the_disk_before_all_old_blocks_are_in_hidden(images: Images) -> None:
    expected = images.top()
    seen: list[bool] = []

    def look(operation: str) -> None:
        if operation == "write":
            seen.append(all(images.stack.hidden.holds_all(block, block + 1) for block in (0, 7, 40, 41)))
            assert images.top() == expected

    images.disk.before = look
    written = views((7 * BLOCK, b"a" * BLOCK), (5, b"b" * 10), (40 * BLOCK + 1, b"c" * BLOCK))
    assert images.stack.target.write_all(written) == []
    assert seen == [True, True, True]


@pytest.mark.parametrize("many_first", [True, False])
def test_many_target_writes_and_a_single_one_preserve_a_block_that_they_share_once(
    images: Images, pool: ThreadPoolExecutor, many_first: bool
) -> None:
    expected = images.top()
    second: list[Any] = []
    many = views((0, b"\xaa" * 512), (9 * BLOCK, b"\xaa" * BLOCK), (3 * CLUSTER, b"\xaa" * 10))
    single = (memoryview(b"\xbb" * 512), 9 * BLOCK + 512, False)

    def start_second() -> None:
        # The first has preserved the block and not yet written; the second must wait for it.
        images.disk.before = lambda _: None
        second.append(
            pool.submit(images.stack.target.write, *single)
            if many_first
            else pool.submit(images.stack.target.write_all, many)
        )
        wait_until(lambda: len(images.stack.below._asked) == 2, "the second asks for the block")
        assert not second[0].done()

    images.disk.before = once(start_second, "write")
    if many_first:
        assert images.stack.target.write_all(many) == []
    else:
        images.stack.target.write(*single)
    second[0].result(DEADLINE_S)
    assert images.top() == expected
    last = b"\xbb" if many_first else b"\xaa"
    assert images.below(9 * BLOCK, 1536) == b"\xaa" * 512 + last * 512 + b"\xaa" * 512


def test_many_target_writes_that_overlap_leave_the_last_ones_data(images: Images) -> None:
    expected = images.top()
    pieces = [(offset, bytes([offset % 250 + 1]) * 3000) for offset in (0, 2000, 1000, 9000, 500, 2000, 0, 4096)]
    below = bytearray(images.below())
    for offset, data in pieces:
        below[offset : offset + len(data)] = data
    assert images.stack.target.write_all(views(*pieces)) == []
    assert images.below() == below
    assert images.top() == expected


def test_parts_of_one_block_that_come_together_preserve_it_once(images: Images) -> None:
    expected = images.top()
    reads: list[str] = []
    images.disk.before = reads.append
    pieces = views(*((sector * 512, bytes([sector + 1]) * 512) for sector in (3, 0, 1, 2, 7)))
    assert images.stack.target.write_all(pieces) == []
    assert reads == ["read", "write", "write"], "four sectors that follow each other are one write"
    assert images.top() == expected


@pytest.mark.parametrize("refused", ["disk", "hidden", "reading"])
def test_of_many_target_writes_only_those_fail_that_would_fail_alone(
    images: Images, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Writes 1 and 3, side by side with 0 and 2."""
    expected = images.top()
    bad = (BLOCK, 70 * BLOCK)
    owner = images.stack.hidden.data if refused == "hidden" else images.disk
    name = "read" if refused == "reading" else "write"
    real = getattr(owner, name)

    def fail(data: Any, offset: int, *rest: object) -> None:
        length = len(data) if refused == "reading" else sum(map(len, data))
        if any(offset <= at < offset + length for at in bad):
            raise DiskError("broken", errno.ENOSPC if refused == "disk" else errno.EIO)
        real(data, offset, *rest)

    monkeypatch.setattr(owner, name, fail)
    data = b"\xcc" * BLOCK
    images.stack.target.lost.mark(2 * GRAIN, GRAIN)
    pieces = [(0, data), (BLOCK, data), (2 * BLOCK, data), (70 * BLOCK, data), (2 * GRAIN, data * 16)]
    failed = images.stack.target.write_all(views(*pieces))
    monkeypatch.undo()
    layer = Layer.HIDDEN if refused == "hidden" else Layer.SECONDARY
    assert [(index, type(error)) for index, error in failed] == [(1, LayerError), (3, LayerError)]
    assert all(isinstance(error, LayerError) and error.layer is layer for _, error in failed)
    assert images.top() == expected
    below = bytearray(expected)
    for offset, part in (pieces[0], pieces[2], pieces[4]):
        below[offset : offset + len(part)] = part
    assert images.below() == below
    assert list(images.stack.target.lost.missing_ranges()) == [(0, GRAIN), (4 * GRAIN, GRAIN)], "2 GRAIN was repaired"


def test_what_interrupts_many_target_writes_leaves_them_noted_and_their_blocks_free(images: Images) -> None:
    def interrupt(operation: str) -> None:
        raise KeyboardInterrupt

    images.disk.before = interrupt
    pieces = views((0, b"x"), (2 * GRAIN, b"y"))
    with pytest.raises(KeyboardInterrupt):
        images.stack.target.write_all(pieces)
    images.disk.before = lambda _: None
    assert list(images.stack.target.lost.missing_ranges()) == [(0, GRAIN), (2 * GRAIN, GRAIN)]
    assert images.stack.target.write_all(pieces) == []


def test_many_target_writes_give_back_stale_space_when_hidden_is_full(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.stack.target.write(memoryview(b"\xaa" * CLUSTER), 0, False)
    images.stack.empty()
    expected = images.top()
    failures = break_overlay(monkeypatch, images.stack.hidden, 1, errno.ENOSPC)
    assert images.stack.target.write_all(views((2 * CLUSTER, b"\xbb"), (2 * CLUSTER + BLOCK, b"\xbb"))) == []
    assert len(failures) == 1
    assert images.stack.hidden.data.extents(0, CLUSTER)[0].hole
    assert images.top() == expected


def test_writes_that_a_full_hidden_disk_refuses_search_for_nothing(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refused one searched all overlays while it held its range: 1 to 4 a second, for the whole pair."""
    images.stack.target.write(memoryview(b"\xaa" * CLUSTER), 0, False)
    break_overlay(monkeypatch, images.stack.hidden, sys.maxsize, errno.EDQUOT)
    searched: list[str] = []
    for overlay in (images.stack.active, images.stack.hidden):

        def search(path: str = overlay.path) -> Iterator[tuple[int, int]]:
            searched.append(path)
            return iter(())

        monkeypatch.setattr(overlay, "stale_ranges", search)
    monkeypatch.setattr(shortage, "_FUTILE_S", 60)
    for at in range(CLUSTER, 3 * CLUSTER, BLOCK):
        with pytest.raises(LayerError) as refusal:
            images.stack.target.write(memoryview(b"\xbb" * BLOCK), at, False)
        assert refusal.value.wire_errno == errno.ENOSPC
    assert len(searched) <= 2, "what the file system itself takes may look like something stale, once"


# -- failures --------------------------------------------------------------------------------------------------------


def failing(operation: str, number: int = errno.EIO) -> Callable[[str], None]:
    """A hook that fails every `operation`."""

    def hook(name: str) -> None:
        if name == operation:
            raise DiskError("broken", number)

    return hook


def break_overlay(monkeypatch: pytest.MonkeyPatch, overlay: Overlay, times: int, number: int) -> list[int]:
    """Let the overlay's next `times` writes fail; the list grows by one each time."""
    failures: list[int] = []
    real = overlay.data.write

    def write(pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        if len(failures) < times:
            failures.append(offset)
            raise DiskError("full", number)
        real(pieces, offset, fua)

    monkeypatch.setattr(overlay.data, "write", write)
    return failures


def test_when_copy_before_write_fails_the_disk_is_not_touched(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = images.top()
    break_overlay(monkeypatch, images.stack.hidden, 10, errno.EIO)
    for action in (
        lambda: images.stack.target.write(memoryview(b"x" * 9000), 10, False),
        lambda: images.stack.target.zero(10, 9000, True, False),
    ):
        with pytest.raises(LayerError, match=r"^hidden disk: full$") as refusal:
            action()
        assert (refusal.value.layer, refusal.value.operation) == (Layer.HIDDEN, "write")
        assert images.below() == expected
        assert images.top() == expected


@pytest.mark.parametrize("operation", ["read", "write", "zero"])
def test_a_failure_of_the_secondary_disk_is_named_and_the_checkpoint_stays(images: Images, operation: str) -> None:
    expected = images.top()
    images.disk.before = failing(operation, errno.ENOSPC)

    def change() -> None:
        if operation == "zero":
            images.stack.target.zero(0, BLOCK, False, False)
        else:
            images.stack.target.write(memoryview(b"x" * 10), 0, False)

    with pytest.raises(LayerError, match=r"^secondary disk: broken$") as refusal:
        change()
    images.disk.before = lambda _: None
    assert (refusal.value.layer, refusal.value.errno) == (Layer.SECONDARY, errno.ENOSPC)
    assert images.top() == expected
    # The range is free again.
    images.stack.target.write(memoryview(b"x" * 10), 0, False)
    assert images.top() == expected


def test_a_guest_write_that_active_refuses_leaves_the_block_as_it_was(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images.top()
    break_overlay(monkeypatch, images.stack.active, 1, errno.EIO)
    with pytest.raises(LayerError) as refusal:
        images.stack.write_top(memoryview(b"x"), 5)
    assert refusal.value.layer is Layer.ACTIVE
    assert images.top() == expected
    images.stack.write_top(memoryview(b"x"), 5)
    assert images.top(4, 3) == expected[4:5] + b"x" + expected[6:7]


def test_a_full_overlay_gives_back_stale_space_and_goes_on(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    images.stack.write_top(memoryview(b"\xaa" * CLUSTER), 0)
    images.stack.empty()
    full = images.stack.active.data
    assert not full.extents(0, CLUSTER)[0].hole
    failures = break_overlay(monkeypatch, images.stack.active, 1, errno.ENOSPC)
    images.stack.write_top(memoryview(b"\xbb" * BLOCK), 2 * CLUSTER)
    assert len(failures) == 1
    assert full.extents(0, CLUSTER)[0].hole
    assert images.top(2 * CLUSTER, BLOCK) == b"\xbb" * BLOCK


def test_a_write_that_meets_a_full_overlay_is_tried_again_though_nothing_is_stale_any_more(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its failure and its look for room somebody else may have given back the last of it."""
    monkeypatch.setattr(images.stack.room.shortage, "relieve", lambda: False)
    failures = break_overlay(monkeypatch, images.stack.active, 1, errno.ENOSPC)
    images.stack.write_top(memoryview(b"\xbb" * BLOCK), 0)
    assert len(failures) == 1
    assert images.top(0, BLOCK) == b"\xbb" * BLOCK


def test_while_bits_go_no_space_is_given_back_under_a_reader(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    images.stack.write_top(memoryview(b"\xaa" * CLUSTER), 0)
    images.stack.committing = True
    images.stack.descent.commit(0, 32)
    break_overlay(monkeypatch, images.stack.active, 1, errno.ENOSPC)
    images.stack.write_top(memoryview(b"\xbb" * 100), 2 * CLUSTER + 50)
    assert images.top(2 * CLUSTER + 50, 100) == b"\xbb" * 100, "it has gone to the disk instead"
    assert not images.stack.active.holds_any(64, 96)
    assert not images.stack.active.data.extents(0, CLUSTER)[0].hole


def test_a_disk_that_refuses_a_guest_write_during_the_commit_gets_it_later(images: Images) -> None:
    expected = bytearray(images.top())
    images.disk.before = failing("write")
    images.stack.write_over(memoryview(b"guest"), 7, shelter=True)
    with pytest.raises(LayerError):
        images.stack.write_over(memoryview(b"other"), CLUSTER, shelter=False)
    images.disk.before = failing("zero")
    images.stack.zero_over(2 * BLOCK, BLOCK, False, shelter=True)
    images.disk.before = lambda _: None
    expected[7:12] = b"guest"
    expected[2 * BLOCK : 3 * BLOCK] = bytes(BLOCK)
    assert images.top() == expected
    for first, last in list(images.stack.descent.portions()):
        images.stack.descent.commit(first, last)
    assert images.below() == expected


def test_reclaiming_goes_on_behind_a_range_that_somebody_holds(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay_module, "_EMPTIED_BEHIND", BLOCK)
    images.stack.write_top(memoryview(b"\xaa" * 3 * BLOCK), 0)
    images.stack.empty()
    ranges = images.stack.active.stale_ranges()
    held = images.stack.top.acquire(0, BLOCK)
    steps = 0
    while images.stack.room.reclaim_some(images.stack.active, ranges, 1) is not None:
        steps += 1
    images.stack.top.release(held)
    assert images.stack.active.data.extents(BLOCK, 2 * BLOCK)[0].hole, "only the held block may be left"
    assert not images.stack.active.data.extents(0, BLOCK)[0].hole


def test_images_that_went_away_are_named(images: Images) -> None:
    images.stack.check_images()
    (images.folder / "hidden.qcow2").unlink()
    with pytest.raises(LayerError, match=r"hidden disk: .*was removed") as refusal:
        images.stack.check_images()
    assert refusal.value.layer is Layer.HIDDEN


# -- what the overlays hold --------------------------------------------------------------------------------------

LARGE = 3 * PAGE_CLUSTERS * CLUSTER + 5 * BLOCK + 1234


def grains_of(held: set[int], grain: int, size: int) -> list[tuple[int, int]]:
    """The grains in which one of the blocks is, one by one."""
    return [(at * grain, min(grain, size - at * grain)) for at in sorted({block * BLOCK // grain for block in held})]


def one_by_one(ranges: Iterator[tuple[int, int]], grain: int) -> list[tuple[int, int]]:
    return [
        (at, min(grain, offset + length - at))
        for offset, length in ranges
        for at in range(offset, offset + length, grain)
    ]


@pytest.mark.parametrize("grain", [32 << 10, GRAIN, CLUSTER], ids=["32K", "64K", "128K"])
def test_the_grains_that_the_overlays_hold_are_those_of_their_blocks(tmp_path: Path, grain: int) -> None:
    """On both sides of a page of allocation words, at its ends, and in the disk's last, short block."""
    images = Images(tmp_path, size=LARGE)
    page = PAGE_CLUSTERS * CLUSTER
    places = {
        "top": [0, 3 * GRAIN + BLOCK, page - BLOCK, page, 2 * page + 17 * GRAIN],
        "below": [3 * GRAIN + 2 * BLOCK, 4 * GRAIN, page + GRAIN, 2 * page - BLOCK, LARGE // BLOCK * BLOCK],
    }
    assert list(images.stack.descent.held_grains(grain)) == []
    held: set[int] = set()
    for offset in places["top"]:
        images.stack.write_top(memoryview(b"t" * min(BLOCK, LARGE - offset)), offset)
        held.add(offset // BLOCK)
        assert one_by_one(images.stack.descent.held_grains(grain), grain) == grains_of(held, grain, LARGE)
    for offset in places["below"]:
        images.stack.target.write(memoryview(b"b" * min(BLOCK, LARGE - offset)), offset, False)
        held.add(offset // BLOCK)
        assert one_by_one(images.stack.descent.held_grains(grain), grain) == grains_of(held, grain, LARGE)
    images.stack.zero_top(5 * GRAIN, BLOCK)
    held.add(5 * GRAIN // BLOCK)
    assert one_by_one(images.stack.descent.held_grains(grain), grain) == grains_of(held, grain, LARGE), "zeroes, too"
    images.close()


def test_neighbouring_grains_come_as_one_range(images: Images) -> None:
    images.stack.write_top(memoryview(b"t" * 2 * GRAIN), 0)
    images.stack.target.write(memoryview(b"b"), SIZE - 1, False)
    assert list(images.stack.descent.held_grains(GRAIN)) == [(0, 2 * GRAIN), (SIZE // GRAIN * GRAIN, SIZE % GRAIN)]


def test_after_a_checkpoint_no_grain_is_held(images: Images) -> None:
    images.stack.write_top(memoryview(b"t" * 2 * GRAIN), 0)
    images.stack.target.write(memoryview(b"b" * GRAIN), GRAIN, False)
    images.stack.empty()
    assert list(images.stack.descent.held_grains(GRAIN)) == []
