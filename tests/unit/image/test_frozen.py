# SPDX-License-Identifier: BSD-3-Clause
"""frozen.py: the content of one instant against byte arrays, whatever changes below it, and the pairs of requests that
its docstring decides. The interleavings are forced by a secondary disk that calls back in the midst of a request.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from content import make_raw, pattern
from replication.disk import files
from replication.disk.face import Disk
from replication.disk.file import FileDisk
from replication.errors import DiskError
from replication.image import frozen, qcow2
from replication.image.frozen import OWN, Allowance, Frozen
from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCK, CLUSTER
from replication.image.stack import Stack
from waiting import DEADLINE_S, begin, chance
from watcheddisk import WatchedDisk

SIZE = 3 * CLUSTER + 5 * BLOCK + 1234
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
ROOMY = 1 << 40


class Images:
    """A disk, its overlays, its stack, and tests of it."""

    def __init__(self, folder: Path, size: int = SIZE, power: bool = False) -> None:
        self.folder = folder
        make_raw(folder / "disk.raw", size, pattern(1, size))
        for name, backing, image_format in (("hidden", "disk.raw", "raw"), ("active", "hidden.qcow2", "qcow2")):
            qcow2.create(str(folder / f"{name}.qcow2"), str(folder / backing), image_format, size)
        self.disk = WatchedDisk(folder / "disk.raw")
        active, hidden = (Overlay(role, "disk0", str(folder / f"{role}.qcow2"), power) for role in ("active", "hidden"))
        self.stack = Stack(active, hidden, self.disk)
        self.allowance = Allowance(str(folder), ROOMY, 100)
        self.made: list[Frozen] = []

    def freeze(self, allowance: Allowance | None = None, name: str = "x") -> Frozen:
        disk: Disk = self.disk
        made = Frozen(name, self.stack.active, self.stack.hidden, disk, allowance or self.allowance)
        made.freeze()
        self.stack.room.tests = (*self.stack.room.tests, made)
        self.made.append(made)
        return made

    def drop(self, test: Frozen) -> None:
        self.stack.room.tests = tuple(other for other in self.stack.room.tests if other is not test)
        test.end(DiskError("it has ended", errno.ESHUTDOWN))
        test.discard()

    def target(self, data: bytes, offset: int) -> None:
        self.stack.target.write(memoryview(data), offset, False)

    def guest(self, data: bytes, offset: int) -> None:
        self.stack.write_top(memoryview(data), offset)

    def top(self) -> bytes:
        data = bytearray(self.stack.size)
        self.stack.read(memoryview(data), 0)
        return bytes(data)

    def below(self) -> bytes:
        return (self.folder / "disk.raw").read_bytes()

    def close(self) -> None:
        for test in self.made:
            if test.end(DiskError("closed")):
                test.discard()
        self.stack.close()
        self.disk.close()


def seen(test: Frozen, offset: int = 0, length: int | None = None) -> bytes:
    data = bytearray(test.size - offset if length is None else length)
    test.read(memoryview(data), offset)
    return bytes(data)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a while is no reason for a test of a failover to end."""
    monkeypatch.setattr(frozen, "KEEP_S", DEADLINE_S)


@pytest.fixture(params=[False, True], ids=["process", "power"])
def images(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Images]:
    opened = Images(tmp_path, power=request.param)
    yield opened
    opened.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


class Histories(RuleBasedStateMachine):
    """Any requests one after the other, and up to three tests: each sees its instant and its own writes, and neither
    the guest face nor the disk sees anything of them."""

    ranges = st.one_of(
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK)),
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)),
        st.tuples(st.integers(0, SIZE // BLOCK).map(lambda block: block * BLOCK), st.integers(1, 40 * BLOCK)),
    ).map(lambda at: (at[0], min(at[1], SIZE - at[0])))
    serial = 0

    @initialize(power=st.booleans())
    def open(self, power: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="frozen-", dir=MEMORY))
        self.images = Images(self.folder, power=power)
        self.below = bytearray(pattern(1, SIZE))
        self.top = bytearray(self.below)
        self.tests: list[tuple[Frozen, bytearray]] = []

    def teardown(self) -> None:
        self.images.close()
        shutil.rmtree(self.folder)

    def data(self, length: int, zeroes: bool = False) -> bytes:
        self.serial += 1
        return bytes(length) if zeroes else pattern(1000 + self.serial, length)

    @rule()
    def test_starts(self) -> None:
        if len(self.tests) < 3:
            self.tests.append((self.images.freeze(), bytearray(self.top)))

    @rule(which=st.integers(0, 2))
    def test_ends(self, which: int) -> None:
        if which < len(self.tests):
            self.images.drop(self.tests.pop(which)[0])

    @rule(which=st.integers(0, 2), where=ranges, zeroes=st.booleans())
    def test_writes(self, which: int, where: tuple[int, int], zeroes: bool) -> None:
        if which < len(self.tests):
            test, content = self.tests[which]
            offset, length = where
            data = self.data(length, zeroes)
            if zeroes:
                test.zero(offset, length, True, False)
            else:
                test.write(memoryview(data), offset, False)
            content[offset : offset + length] = data

    @rule(where=ranges, zeroes=st.booleans())
    def guest_writes(self, where: tuple[int, int], zeroes: bool) -> None:
        offset, length = where
        data = self.data(length, zeroes)
        if zeroes:
            self.images.stack.zero_top(offset, length)
        else:
            self.images.guest(data, offset)
        self.top[offset : offset + length] = data

    @rule(where=ranges, zeroes=st.booleans())
    def primary_writes(self, where: tuple[int, int], zeroes: bool) -> None:
        offset, length = where
        data = self.data(length, zeroes)
        if zeroes:
            self.images.stack.target.zero(offset, length, True, False)
        else:
            self.images.target(data, offset)
        self.below[offset : offset + length] = data

    @rule(places=st.lists(ranges, min_size=1, max_size=6))
    def primary_writes_many(self, places: list[tuple[int, int]]) -> None:
        pieces = [(offset, self.data(min(length, BLOCK))) for offset, length in places]
        assert self.images.stack.target.write_all([(offset, memoryview(data)) for offset, data in pieces]) == []
        for offset, data in pieces:
            self.below[offset : offset + len(data)] = data

    @rule()
    def checkpoint(self) -> None:
        self.images.stack.empty()
        self.top[:] = self.below

    @rule()
    def reclaim(self) -> None:
        for overlay in (self.images.stack.active, self.images.stack.hidden):
            self.images.stack.room.reclaim_some(overlay, overlay.stale_ranges(), 100)

    @rule(which=st.integers(0, 2), where=ranges)
    def look(self, which: int, where: tuple[int, int]) -> None:
        if which >= len(self.tests):
            return
        (test, content), (offset, length) = self.tests[which], where
        assert seen(test, offset, length) == content[offset : offset + length]
        at = offset
        for extent in test.extents(offset, length):
            assert extent.offset == at
            at += extent.length
            assert not extent.zero or not any(content[extent.offset : at])
        assert offset < at <= offset + length
        assert len(test.extents(offset, length, 1)) == 1

    @invariant()
    def all_is_as_the_model(self) -> None:
        assert self.images.top() == self.top
        assert self.images.below() == self.below
        for test, content in self.tests:
            assert seen(test) == content
        assert self.images.allowance.used == sum(test.bytes_used for test, _ in self.tests)


Histories.TestCase.settings = settings(max_examples=50, stateful_step_count=20)
TestHistories = Histories.TestCase


@pytest.mark.parametrize("zeroes", [False, True], ids=["write", "zero"])
def test_a_read_that_a_target_write_overtakes_still_gets_the_instant(
    images: Images, pool: ThreadPoolExecutor, zeroes: bool
) -> None:
    test, expected = images.freeze(), images.top()
    images.stack.empty()

    def overtake(operation: str) -> None:
        if operation == "read":
            images.disk.before = lambda _: None
            if zeroes:
                pool.submit(images.stack.target.zero, 100, 2 * CLUSTER, True, False).result(DEADLINE_S)
            else:
                pool.submit(images.target, pattern(9, 2 * CLUSTER), 100).result(DEADLINE_S)

    images.disk.before = overtake
    assert seen(test, 0, CLUSTER) == expected[:CLUSTER]
    assert seen(test) == expected
    assert images.below()[4096:8192] != expected[4096:8192]


@pytest.mark.parametrize("where", ["active", "hidden"])
def test_a_read_that_new_data_of_an_overlay_overtakes_still_gets_the_instant(
    images: Images, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The block is in an overlay's data; a checkpoint empties it, and the next epoch writes to the same place."""
    (images.guest if where == "active" else images.target)(pattern(7, BLOCK), 0)
    test, expected = images.freeze(), images.top()

    def overtake() -> None:
        images.stack.empty()
        (images.guest if where == "active" else images.target)(pattern(8, BLOCK), 0)

    real, left = files.preadv, [overtake]

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if left:
            pool.submit(left.pop()).result(DEADLINE_S)
        return real(fd, buffers, offset)

    monkeypatch.setattr(files, "preadv", preadv)
    assert seen(test, 0, BLOCK) == expected[:BLOCK]
    assert not left
    assert seen(test) == expected


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_what_hidden_kept_is_moved_before_the_next_epoch_keeps_there(images: Images, many: bool) -> None:
    places = [block * BLOCK for block in (0, 3, 9)]
    for place in places:
        images.target(pattern(3, BLOCK), place)
    test, expected = images.freeze(), images.top()
    images.stack.empty()
    if many:
        pieces = [(place + 5, memoryview(pattern(4, 100))) for place in places]
        assert images.stack.target.write_all(pieces) == []
    else:
        for place in places:
            images.target(pattern(4, 100), place + 5)
    assert seen(test) == expected
    assert test.bytes_used == len(places) * BLOCK


def test_what_the_test_has_written_is_not_overwritten_with_what_a_target_write_keeps(
    images: Images, pool: ThreadPoolExecutor
) -> None:
    """The target write has read the old content when the test writes the same block: that waits, and comes last."""
    test = images.freeze()
    images.target(bytes(BLOCK), 0)  # hidden has it: the next write reads for the test alone
    images.stack.empty()
    other, expected = images.freeze(name="y"), bytearray(images.top())
    began = threading.Event()
    writes: list[Any] = []

    def write() -> None:
        began.set()
        other.write(memoryview(b"\xaa" * 100), 4096 + 50, False)

    def meanwhile(operation: str) -> None:
        if operation == "read" and other._own._asked and not writes:
            writes.append(pool.submit(write))
            assert began.wait(DEADLINE_S)

    images.disk.after = meanwhile
    images.target(pattern(3, BLOCK), 4096)
    assert writes
    writes[0].result(DEADLINE_S)
    expected[4096 + 50 : 4096 + 150] = b"\xaa" * 100
    assert seen(other) == expected
    assert test.over is None


def test_a_full_test_ends_and_the_target_write_goes_on(images: Images) -> None:
    test = images.freeze(Allowance(str(images.folder), 2 * BLOCK, 100))
    told: list[DiskError] = []
    test.spoilt = told.append
    expected = images.top()
    images.target(pattern(3, 2 * BLOCK), 0)
    assert seen(test) == expected
    images.target(pattern(4, BLOCK), 3 * BLOCK)
    assert images.below()[3 * BLOCK : 4 * BLOCK] == pattern(4, BLOCK)
    assert [error.errno for error in told] == [errno.ENOSPC]
    for request in (lambda: seen(test), lambda: test.write(memoryview(b"x"), 0, False), test.flush):
        with pytest.raises(DiskError, match="tests have 8192 bytes, of the 8192 of test-space") as caught:
            request()
        assert caught.value.errno == errno.ENOSPC
    assert images.top() == expected


def test_a_write_of_a_full_test_fails_alone(images: Images) -> None:
    test = images.freeze(Allowance(str(images.folder), 2 * BLOCK, 100))
    expected = bytearray(images.top())
    test.write(memoryview(pattern(3, BLOCK)), 0, False)
    with pytest.raises(DiskError) as caught:
        test.write(memoryview(pattern(3, 2 * BLOCK)), 5 * BLOCK, False)
    assert caught.value.errno == errno.ENOSPC
    test.zero(0, BLOCK, True, False)  # gives its space back
    test.write(memoryview(pattern(4, 2 * BLOCK)), 8 * BLOCK, False)
    expected[:BLOCK] = bytes(BLOCK)
    expected[8 * BLOCK : 10 * BLOCK] = pattern(4, 2 * BLOCK)
    assert seen(test) == expected


def test_tests_take_nothing_of_a_file_system_that_is_as_full_as_they_may_make_it(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs_result((4096, 4096, 1000, 200, 200, 0, 0, 0, 0, 255))
    monkeypatch.setattr(frozen.os, "statvfs", lambda _path: full)
    test = images.freeze(Allowance(str(images.folder), ROOMY, 80))
    with pytest.raises(DiskError, match="fuller than 80 per cent"):
        test.write(memoryview(b"x"), 0, False)
    assert test.over is None


def test_a_disk_that_cannot_be_read_for_a_test_ends_the_test_alone(images: Images) -> None:
    test = images.freeze()
    reads = [0]

    def fail(operation: str) -> None:
        if operation == "read":
            reads[0] += 1
            if reads[0] == 2:  # the first one is for hidden
                raise DiskError("unreadable")

    images.disk.before = fail
    images.target(pattern(7, BLOCK), 0)
    images.disk.before = lambda _: None
    assert images.below()[:BLOCK] == pattern(7, BLOCK)
    with pytest.raises(DiskError, match="unreadable"):
        seen(test)


def test_what_the_disk_has_lost_ends_a_test_that_needs_it(images: Images) -> None:
    test = images.freeze()
    images.target(pattern(3, BLOCK), 0)
    test.lose(0, BLOCK, DiskError("gone"))  # it has that for itself
    assert test.over is None
    test.lose(0, BLOCK + 1, DiskError("gone"))
    with pytest.raises(DiskError, match="gone"):
        seen(test)


def test_what_hits_a_test_is_its_end_and_nobody_elses(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a write of the primary fails, and is lost, because a test has no memory."""
    images.target(pattern(3, BLOCK), 0)
    images.guest(pattern(3, BLOCK), 5 * BLOCK)
    hidden = images.stack.hidden

    def no_memory(_words: Any) -> Any:
        raise MemoryError("a page of places")

    monkeypatch.setattr(frozen, "states_in", no_memory)
    batch = [(at * BLOCK, pattern(5, BLOCK)) for at in (9, 11)]
    for change in (
        lambda: images.target(pattern(4, BLOCK), 0),
        lambda: images.stack.target.write_all([(at, memoryview(data)) for at, data in batch]),
        lambda: images.guest(pattern(4, BLOCK), 5 * BLOCK),
        lambda: images.stack.room.reclaim_some(hidden, hidden.stale_ranges(), 9),
    ):
        test = images.freeze()
        told: list[DiskError] = []

        def tell(error: DiskError, told: list[DiskError] = told) -> None:
            told.append(error)
            raise MemoryError("a thread")

        test.spoilt = tell
        change()
        assert "could not be kept" in str(told)
        assert test.over is not None
        images.drop(test)
    assert images.below()[:BLOCK] == pattern(4, BLOCK)
    assert images.below()[9 * BLOCK : 10 * BLOCK] == pattern(5, BLOCK)
    assert not images.stack.target.lost.missing
    test = images.freeze()
    test.settle()  # for that it is no hurry
    assert test.over is None
    test.lose(0, BLOCK, DiskError("gone"))
    assert test.over is not None


def test_what_has_to_be_kept_holds_up_nobody_for_long(
    images: Images, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write of the test that stands still, and a disk that takes its time."""
    monkeypatch.setattr(frozen, "KEEP_S", 0.05)
    test, late = images.freeze(), images.freeze(name="late")
    begun, go = threading.Event(), threading.Event()

    def stand_still(operation: str) -> None:
        if operation == "read":  # what completes its block
            begun.set()
            assert go.wait(DEADLINE_S)

    images.disk.before = stand_still
    written = pool.submit(test.write, memoryview(b"x"), 0, False)
    assert begun.wait(DEADLINE_S)
    images.disk.before = lambda _: None
    images.target(pattern(4, BLOCK), 0)
    assert "waited 0 s" in str(test.over)
    go.set()
    with pytest.raises(DiskError, match="could not be kept"):
        written.result(DEADLINE_S)
    monkeypatch.setattr(frozen, "KEEP_S", 0.0)
    images.target(pattern(5, BLOCK), BLOCK)
    assert "to keep it took more than" in str(late.over)
    assert images.below()[: 2 * BLOCK] == pattern(4, BLOCK) + pattern(5, BLOCK)


def test_a_test_of_a_large_disk_takes_no_memory_but_for_what_it_touches(tmp_path: Path) -> None:
    """A byte for each of 64 Mi blocks. Wrong: 64 MiB at once, and kept by whoever stays connected."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 64 << 32
    for name in ("hidden", "active"):
        qcow2.create(str(tmp_path / f"{name}.qcow2"), str(tmp_path / "disk.raw"), "raw", 1 << 20)
    with open(tmp_path / "disk.raw", "wb") as file:
        file.truncate(size)
    disk = FileDisk("disk0", str(tmp_path / "disk.raw"))
    active, hidden = (Overlay(role, "disk0", str(tmp_path / f"{role}.qcow2")) for role in ("active", "hidden"))
    before = resident()
    test = Frozen("x", active, hidden, disk, Allowance(str(tmp_path), ROOMY, 100))
    test.write(memoryview(b"x"), size // 2, False)
    assert seen(test, size // 2, 2) == b"x\0"
    assert resident() - before < 32 << 20
    test.end(DiskError("it has ended"))
    test.discard()
    assert test._places.closed
    test.keep_disk(0, 1)
    assert list(test.unneeded(hidden, 0, 9)) == [(0, 9)]
    for each in (active, hidden, disk):
        each.close()


def test_a_file_that_cannot_be_as_long_as_the_disk_leaves_nothing(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_long(_fd: int, _length: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(frozen.os, "ftruncate", too_long)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DiskError, match="File too large"):
        images.freeze()
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    assert not list(images.folder.glob(".test.*"))


def test_stale_data_that_a_test_needs_is_not_given_back(images: Images) -> None:
    images.target(pattern(3, 4 * BLOCK), 0)
    images.guest(pattern(4, 4 * BLOCK), CLUSTER)
    test, expected = images.freeze(), images.top()
    images.stack.empty()
    for overlay in (images.stack.active, images.stack.hidden):
        images.stack.room.reclaim_some(overlay, overlay.stale_ranges(), 100)
    assert seen(test) == expected
    images.drop(test)
    for overlay in (images.stack.active, images.stack.hidden):
        images.stack.room.reclaim_some(overlay, overlay.stale_ranges(), 100)
        assert overlay.data.status().st_blocks * 512 < 4 * BLOCK


@pytest.mark.parametrize("who", ["target", "guest", "disk", "batch", "zeroes"])
def test_who_finds_no_room_gets_that_of_tests_before_it_searches_for_any(
    images: Images, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """What is stale in hidden is needed by two tests, and a search would find nothing. Wrong: it is searched first, for
    as long as the write has; or a test counts only when its own file, or the overlay that needs room, has something."""
    stack = images.stack
    images.target(pattern(3, 4 * BLOCK), 0)
    tests = [images.freeze(), images.freeze(name="y")]
    stack.empty()
    device = stack.hidden.data.status().st_dev
    full, calls = [True], []

    def sacrifice(where: int, path: str) -> int:
        calls.append("sacrifice")
        assert where == device
        assert path
        for test in tests:
            if test.over is None:
                assert test.holds_room_in(where)
                assert not test.holds_room_in(where + 1)
                images.drop(test)
        return 2

    search = stack.room.shortage.relieve

    def relieve() -> bool:
        calls.append("search")
        found = search()
        full[0] &= not found
        return found

    monkeypatch.setattr(stack.room, "sacrifice", sacrifice)
    monkeypatch.setattr(stack.room.shortage, "relieve", relieve)
    while search():  # in vain in the end: it has passed by all that the tests need
        pass
    fds = [(stack.active if who == "guest" else stack.hidden).data.fileno()]
    if who in ("disk", "batch", "zeroes"):
        fds = []
    real = files.pwritev

    def pwritev(fd: int, *arguments: Any) -> int:
        if fd in fds and full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, *arguments)

    def before(operation: str) -> None:
        if not fds and operation in ("write", "zero") and full[0]:
            raise DiskError("No space left on device", errno.ENOSPC)

    monkeypatch.setattr(files, "pwritev", pwritev)
    images.disk.before = before
    at = 10 * BLOCK
    if who == "guest":
        images.guest(pattern(4, BLOCK), at)
        assert images.top()[at : at + BLOCK] == pattern(4, BLOCK)
    elif who == "batch":
        data = memoryview(pattern(4, BLOCK))
        assert stack.target.write_all([(at, data), (at + 2 * BLOCK, data)]) == []
    elif who == "zeroes":
        stack.target.zero(at, BLOCK, False, False)
    else:
        images.target(pattern(4, BLOCK), at)
    if who != "guest":
        assert images.below()[at : at + BLOCK] == (bytes(BLOCK) if who == "zeroes" else pattern(4, BLOCK))
    assert calls == ["sacrifice", "search"]
    assert not stack.target.lost.missing


def test_a_full_disk_beside_which_there_is_nothing_to_give_back_refuses_after_a_second_try(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images.stack.room.shortage, "relieve", lambda: False)
    tries = []

    def full(operation: str) -> None:
        if operation == "write":
            tries.append(operation)
            raise DiskError("No space left on device", errno.ENOSPC)

    images.disk.before = full
    with pytest.raises(DiskError, match="No space left"):
        images.target(pattern(4, BLOCK), 0)
    assert len(tries) == 2, "others may have given something back since the first"


def test_a_request_under_way_when_the_test_ends_is_told_so(images: Images) -> None:
    test = images.freeze()

    def end(operation: str) -> None:
        if operation == "read":
            test.end(DiskError("it has ended", errno.ESHUTDOWN))

    images.disk.after = end
    with pytest.raises(DiskError, match="it has ended") as caught:
        seen(test)
    assert caught.value.errno == errno.ESHUTDOWN
    assert images.allowance.used == 0


def test_the_files_live_until_the_last_request_has_left(images: Images) -> None:
    test = images.freeze()
    ended: list[Any] = []

    def end(operation: str) -> None:
        if operation == "read" and not ended:
            test.end(DiskError("it has ended"))
            ended.append(begin(test.discard))
            assert not chance(ended[0])

    images.disk.before = end
    fd = test._data.fileno()
    with pytest.raises(DiskError, match="it has ended"):
        seen(test, 0, BLOCK)
    ended[0].result(DEADLINE_S)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_nothing_has_a_name_and_what_a_killed_process_has_left_goes(images: Images) -> None:
    images.freeze()
    assert not list(images.folder.glob("*test.*"))
    left, others = (
        images.folder / ".test.abc.data",
        [images.folder / name for name in ("test.hidden.data", ".test.toml")],
    )
    for file in (left, *others):  # there may be a disk of that name
        file.touch()
    frozen.sweep(str(images.folder))
    assert not left.exists()
    assert all(other.exists() for other in others)


def test_a_long_write_of_the_primary_over_holes_takes_no_space(tmp_path: Path) -> None:
    size = 16 * CLUSTER
    sparse = Images(tmp_path, size)
    try:
        sparse.disk.zero(0, size, True)
        test = sparse.freeze()
        sparse.target(pattern(5, size), 0)
        assert test.bytes_used == 0
        assert OWN not in test._places
        assert seen(test) == bytes(size)
    finally:
        sparse.close()
