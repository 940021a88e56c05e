# SPDX-License-Identifier: BSD-3-Clause
"""stack.py and overlay.py with durability=power: what a power cut leaves, at any moment.

`Storage` watches the system calls of files.py. A file on it has what was there at its last fdatasync; of the changes
since, a power cut keeps any. `Histories` lets the power go before every one of these calls and looks at what the next
boot finds: the last checkpoint, and of the guest's writes all that were flushed, each later one whole or not at all.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from content import make_raw, pattern
from replication.disk import files
from replication.disk.file import FileDisk
from replication.errors import DiskError
from replication.events import EventHub
from replication.image import qcow2
from replication.image.layer import Layer, LayerError
from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCK, CLUSTER
from replication.image.stack import Stack
from replication.jobs import JobList
from replication.secondary.commit import Commit
from waiting import DEADLINE_S, wait_until

SIZE = 2 * CLUSTER + 3 * BLOCK + 1234
BLOCKS = -(-SIZE // BLOCK)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where many small folders cost least."""
NAMES = ("disk.raw", "active.qcow2", "active.data", "hidden.qcow2", "hidden.data")


@functools.cache
def pristine(role: str) -> bytes:
    """The bytes of an empty image, whose data file is looked for beside it: a folder can be copied."""
    with tempfile.TemporaryDirectory(prefix="p-") as folder:
        make_raw(Path(folder) / "disk", SIZE)
        command = qcow2.create_command(f"{folder}/{role}.qcow2", "disk", "raw", SIZE)
        command = [part.replace(f"{folder}/{role}.data", f"{role}.data") for part in command]
        subprocess.run(command, check=True, cwd=folder, timeout=60, capture_output=True)
        return (Path(folder) / f"{role}.qcow2").read_bytes()


def make_images(folder: Path, content: bytes) -> None:
    """A disk and its empty overlays."""
    make_raw(folder / "disk.raw", SIZE, content)
    for role in ("active", "hidden"):
        (folder / f"{role}.qcow2").write_bytes(pristine(role))
        make_raw(folder / f"{role}.data", qcow2.image_size(SIZE))


def open_stack(folder: Path) -> Stack:
    """With durability=power."""
    active, hidden = (Overlay(role, "disk0", str(folder / f"{role}.qcow2"), True) for role in ("active", "hidden"))
    return Stack(active, hidden, FileDisk("disk0", str(folder / "disk.raw")))


def close_stack(stack: Stack) -> None:
    stack.close()
    stack.disk.close()


def seen(stack: Stack, offset: int = 0, length: int | None = None) -> bytes:
    """What the guest sees."""
    data = bytearray(SIZE - offset if length is None else length)
    stack.read(memoryview(data), offset)
    return bytes(data)


class Storage:
    """What is stable of the files in a folder, and what else may be. `before(call, name)` is called before each change
    and sync; it may raise OSError."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.stable = {name: bytearray((folder / name).read_bytes()) for name in NAMES}
        self.pending: dict[str, list[tuple[int, bytes]]] = {name: [] for name in NAMES}
        self.before: Callable[[str, str], None] = lambda call, name: None
        self.calls: list[str] = []
        self._lock = threading.Lock()
        self._real = (files.pwritev, files.fallocate)
        monkeypatch.setattr(files, "pwritev", self._pwritev)
        monkeypatch.setattr(files, "fallocate", self._fallocate)
        monkeypatch.setattr(files, "fdatasync", self._fdatasync)

    def _name(self, fd: int) -> str | None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        return path.name if path.parent == self.folder and path.name in NAMES else None

    def _ask(self, call: str, fd: int) -> str | None:
        name = self._name(fd)
        if name is not None:
            self.before(call, name)
            self.calls.append(f"{call} {name}")
        return name

    def _pwritev(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        name = self._ask("write", fd)
        done = self._real[0](fd, buffers, offset, flags)
        if name is not None:
            self._change(name, offset, b"".join(buffers)[:done], bool(flags & os.RWF_DSYNC))
        return done

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        name = self._ask("zero", fd)
        self._real[1](fd, mode, offset, length)
        if name is not None:
            self._change(name, offset, bytes(max(0, min(length, len(self.stable[name]) - offset))), False)

    def _change(self, name: str, offset: int, data: bytes, forced: bool) -> None:
        with self._lock:
            if forced:
                self.stable[name][offset : offset + len(data)] = data
            self.pending[name].append((offset, data))

    def _fdatasync(self, fd: int) -> None:
        name = self._ask("sync", fd)
        with self._lock:
            # What is stable is only kept here: a real sync would tell nothing, and take its time.
            for offset, data in [] if name is None else self.pending[name]:
                self.stable[name][offset : offset + len(data)] = data
            if name is not None:
                self.pending[name].clear()

    def cut_power(self, seed: int) -> Path:
        """A folder with what the next boot finds."""
        chance = random.Random(seed)
        after = Path(tempfile.mkdtemp(prefix="cut-", dir=MEMORY))
        for name in NAMES:
            content = bytearray(self.stable[name])
            share = chance.choice((0.0, 1.0, 0.5))
            for offset, data in self.pending[name]:
                if chance.random() < share:
                    content[offset : offset + len(data)] = data
            (after / name).write_bytes(content)
        return after


def blocks_of(content: bytes | bytearray) -> list[bytes]:
    return [bytes(content[at : at + BLOCK]) for at in range(0, SIZE, BLOCK)]


def could_be(block: bytes, versions: set[bytes]) -> bool:
    """Whether a block is one of its versions, or mixed from them: of two writes to parts of it only the later may have
    become stable."""
    if block in versions:
        return True
    same = [np.frombuffer(version, np.uint8) == np.frombuffer(block, np.uint8) for version in versions]
    return bool(np.logical_or.reduce(same).all())


class Histories(RuleBasedStateMachine):
    """Requests, checkpoints, kills and a commit, one after the other, with a power cut before every system call."""

    ranges = st.one_of(
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, 2 * BLOCK)),
        st.tuples(
            st.integers(0, BLOCKS - 1).map(lambda block: block * BLOCK), st.integers(1, 8).map(lambda n: n * BLOCK)
        ),
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)),
    ).map(lambda at: (at[0], min(at[1], SIZE - at[0])))
    seeds = st.integers(0, 1 << 30)

    @initialize(seed=seeds)
    def open(self, seed: int) -> None:
        self.patches = pytest.MonkeyPatch()
        self.folder = Path(tempfile.mkdtemp(prefix="power-", dir=MEMORY))
        content = pattern(seed % 7, SIZE)
        make_images(self.folder, content)
        self.storage = Storage(self.folder, self.patches)
        self.storage.before = self.look_before
        self.stack = open_stack(self.folder)
        self.serial = 0
        self.cut_seed = seed
        self.emptying = False
        self.disk = bytearray(content)
        self.top = bytearray(content)
        # What a block may read as after a power cut: as it was at the last flush, or at any time since.
        self.possible = [{block} for block in blocks_of(content)]

    def teardown(self) -> None:
        close_stack(self.stack)
        self.patches.undo()
        shutil.rmtree(self.folder)

    def data(self, length: int) -> bytes:
        self.serial += 1
        return pattern(1000 + self.serial, length)

    def guest_changes(self, offset: int, data: bytes) -> None:
        self.top[offset : offset + len(data)] = data
        for number, block in enumerate(blocks_of(self.top)):
            self.possible[number].add(block)

    # -- the cut -------------------------------------------------------------------------------------------

    def look_before(self, call: str, name: str) -> None:
        self.cut_seed = (self.cut_seed * 1103515245 + 12345) % (1 << 31)
        if self.cut_seed % 3 == 0 or call == "sync":
            self.look_after_a_cut(f"before {call} {name}")

    def look_after_a_cut(self, when: str) -> None:
        after = self.storage.cut_power(self.cut_seed)
        stack = open_stack(after)
        try:
            if self.emptying:
                # The epoch says so (state.py), so the next process finishes it.
                stack.empty()
                assert seen(stack) == self.disk, when
            else:
                for number, block in enumerate(blocks_of(seen(stack))):
                    assert could_be(block, self.possible[number]), f"{when}: block {number}"
        finally:
            close_stack(stack)
            shutil.rmtree(after)

    # -- what happens --------------------------------------------------------------------------------------

    @rule(where=ranges, seed=seeds)
    def guest_writes(self, where: tuple[int, int], seed: int) -> None:
        data = self.data(where[1])
        self.guest_changes(where[0], data)
        if self.stack.committing:
            self.stack.write_over(memoryview(data), where[0], shelter=True)
        else:
            self.stack.write_top(memoryview(data), where[0])
        self.look_after_a_cut("a guest write")

    @rule(where=ranges)
    def guest_zeroes(self, where: tuple[int, int]) -> None:
        self.guest_changes(where[0], bytes(where[1]))
        if self.stack.committing:
            self.stack.zero_over(*where, True, shelter=True)
        else:
            self.stack.zero_top(*where)
        self.look_after_a_cut("guest zeroes")

    @rule()
    def guest_flushes(self) -> None:
        self.stack.flush_top()
        self.possible = [{block} for block in blocks_of(self.top)]
        self.look_after_a_cut("a guest flush")

    @precondition(lambda self: not self.stack.committing)
    @rule(where=ranges, fua=st.booleans(), zeroes=st.booleans())
    def primary_writes(self, where: tuple[int, int], fua: bool, zeroes: bool) -> None:
        offset, length = where
        data = bytes(length) if zeroes else self.data(length)
        if zeroes:
            self.stack.target.zero(offset, length, True, fua)
        else:
            self.stack.target.write(memoryview(data), offset, fua)
        self.disk[offset : offset + length] = data
        self.look_after_a_cut("a target write")

    @precondition(lambda self: not self.stack.committing)
    @rule(places=st.lists(ranges, min_size=2, max_size=4))
    def primary_writes_many(self, places: list[tuple[int, int]]) -> None:
        pieces = [(offset, self.data(length)) for offset, length in places]
        assert self.stack.target.write_all([(offset, memoryview(data)) for offset, data in pieces]) == []
        for offset, data in pieces:
            self.disk[offset : offset + len(data)] = data
        self.look_after_a_cut("many target writes")

    @precondition(lambda self: not self.stack.committing)
    @rule(first=st.integers(0, BLOCKS - 4))
    def copy_before_write_fails_half_way(self, first: int) -> None:
        """Of three blocks hidden holds the second. The first is preserved, the third cannot be: the write fails."""
        old = [self.disk[block * BLOCK : (block + 1) * BLOCK] for block in range(first, first + 3)]
        if self.stack.hidden.holds_any(first, first + 3) or not all(map(any, old)):
            return
        data = self.data(3 * BLOCK)
        self.primary_writes((BLOCK * (first + 1), BLOCK), False, False)
        writes: list[str] = []

        def fail(call: str, name: str) -> None:
            self.look_before(call, name)
            if (call, name) == ("write", "hidden.data"):
                writes.append(name)
                if len(writes) == 2:
                    raise OSError(errno.EIO, "broken")

        self.storage.before = fail
        with pytest.raises(LayerError):
            self.stack.target.write(memoryview(data), first * BLOCK, False)
        self.storage.before = self.look_before
        self.look_after_a_cut("half of copy-before-write")

    @precondition(lambda self: not self.stack.committing)
    @rule()
    def primary_flushes(self) -> None:
        self.stack.target.flush()
        self.look_after_a_cut("a target flush")

    @precondition(lambda self: not self.stack.committing)
    @rule()
    def checkpoint(self) -> None:
        self.stack.target.flush()
        self.emptying = True
        self.stack.empty()
        self.stack.publish_emptied()
        self.emptying = False
        self.top[:] = self.disk
        self.possible = [{block} for block in blocks_of(self.top)]
        self.look_after_a_cut("a checkpoint")

    @precondition(lambda self: not self.stack.committing)
    @rule()
    def fail_over(self) -> None:
        self.stack.committing = True

    @precondition(lambda self: self.stack.committing)
    @rule(where=ranges)
    def part_is_committed(self, where: tuple[int, int]) -> None:
        self.stack.descent.commit(where[0] // BLOCK, -(-sum(where) // BLOCK))
        self.look_after_a_cut("a part of the commit")

    @precondition(lambda self: self.stack.committing)
    @rule()
    def what_came_down_is_flushed(self) -> None:
        self.stack.flush_committed()
        self.look_after_a_cut("a flush of the commit")

    @precondition(lambda self: not self.stack.committing)
    @rule()
    def space_is_given_back(self) -> None:
        for overlay in (self.stack.active, self.stack.hidden):
            self.stack.room.reclaim_some(overlay, overlay.stale_ranges(), 100)
        self.look_after_a_cut("giving back space")

    @rule()
    def be_killed(self) -> None:
        """The next process of the same boot: nothing is lost, and nothing has become stable."""
        committing = self.stack.committing
        close_stack(self.stack)
        self.stack = open_stack(self.folder)
        if not committing:
            self.stack.settle(disk=False)
        self.stack.committing = committing
        assert seen(self.stack) == self.top


Histories.TestCase.settings = settings(max_examples=25, stateful_step_count=14)
TestHistories = Histories.TestCase


class Bench:
    """A stack on a storage."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.content = pattern(1, SIZE)
        make_images(folder, self.content)
        self.storage = Storage(folder, monkeypatch)
        self.stack = open_stack(folder)

    def calls(self, action: Callable[[], object]) -> list[str]:
        """What an action does to the files."""
        self.storage.calls.clear()
        action()
        return self.storage.calls[:]

    def target(self, data: bytes, offset: int = 0) -> None:
        self.stack.target.write(memoryview(data), offset, False)

    def guest(self, data: bytes, offset: int = 0) -> None:
        self.stack.write_top(memoryview(data), offset)

    def after_cuts(self, count: int = 30) -> set[bytes]:
        """What the guest may see in the next boot."""
        found = set()
        for seed in range(count):
            folder = self.storage.cut_power(seed)
            stack = open_stack(folder)
            found.add(seen(stack))
            close_stack(stack)
            shutil.rmtree(folder)
        return found

    def fail(self, call: str, name: str, times: int = 1) -> None:
        """Let this call fail from now on, so often."""
        left = [OSError(errno.EIO, os.strerror(errno.EIO))] * times

        def before(made: str, on: str) -> None:
            if (made, on) == (call, name) and left:
                raise left.pop()

        self.storage.before = before

    def restart(self) -> None:
        """The process is killed, and the next one started in the same boot."""
        self.storage.before = lambda call, name: None
        close_stack(self.stack)
        self.stack = open_stack(self.folder)
        self.stack.settle(disk=False)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    opened = Bench(tmp_path, monkeypatch)
    yield opened
    opened.storage.before = lambda call, name: None
    close_stack(opened.stack)


# -- the three orders ----------------------------------------------------------------------------------------------


def test_what_hidden_preserves_data_before_bits_is_stable_before_the_disk_is_overwritten(bench: Bench) -> None:
    assert bench.calls(lambda: bench.target(b"\xaa" * 100, 50)) == [
        "write hidden.data",
        "sync hidden.data",
        "write hidden.qcow2",
        "sync hidden.qcow2",
        "write disk.raw",
    ]
    assert bench.after_cuts() == {bench.content}


def test_what_is_preserved_already_costs_no_sync(bench: Bench) -> None:
    bench.target(b"\xaa" * 100)
    assert bench.calls(lambda: bench.target(b"\xbb" * 100, 5)) == ["write disk.raw"]
    assert bench.calls(lambda: bench.stack.target.zero(0, 10, False, False)) == ["zero disk.raw"]
    assert bench.after_cuts() == {bench.content}


def many(bench: Bench, *places: int) -> None:
    """Target writes of a few bytes at once."""
    assert bench.stack.target.write_all([(offset, memoryview(b"\xaa" * 100)) for offset in places]) == []


def test_many_target_writes_share_one_sync_of_what_they_preserve(bench: Bench) -> None:
    assert bench.calls(lambda: many(bench, 5 * BLOCK, 0, 9 * BLOCK)) == [
        *["write hidden.data"] * 3,
        "sync hidden.data",
        "write hidden.qcow2",
        "sync hidden.qcow2",
        *["write disk.raw"] * 3,
    ]
    assert bench.after_cuts() == {bench.content}
    assert bench.calls(lambda: many(bench, 5 * BLOCK + 1000, 1000, 9 * BLOCK + 1000)) == ["write disk.raw"] * 3


def test_of_many_target_writes_what_was_preserved_is_stable_although_another_could_not_be(bench: Bench) -> None:
    writes = 0

    def fail(call: str, name: str) -> None:
        nonlocal writes
        if (call, name) == ("write", "hidden.data"):
            writes += 1
            if writes in (2, 4):  # among the others, and alone
                raise OSError(errno.EIO, "broken")

    bench.storage.before = fail
    pieces = [(offset, memoryview(b"\xaa" * 100)) for offset in (0, 5 * BLOCK)]
    assert [index for index, _ in bench.stack.target.write_all(pieces)] == [1]
    bench.storage.before = lambda call, name: None
    assert bench.after_cuts() == {bench.content}


def test_a_block_of_zeroes_is_preserved_by_its_bit_alone_and_as_strictly(bench: Bench) -> None:
    bench.stack.target.zero(0, BLOCK, False, True)
    bench.stack.target.flush()
    bench.stack.empty()
    bench.stack.publish_emptied()
    assert bench.calls(lambda: bench.target(b"\xaa" * BLOCK)) == [
        "sync hidden.data",
        "write hidden.qcow2",
        "sync hidden.qcow2",
        "write disk.raw",
    ]
    assert bench.after_cuts() == {bytes(BLOCK) + bench.content[BLOCK:]}


def test_a_flush_of_the_guest_makes_actives_data_stable_then_its_bits(bench: Bench) -> None:
    assert bench.calls(lambda: bench.guest(b"\xaa" * BLOCK)) == ["write active.data"]
    assert bench.calls(bench.stack.flush_top) == ["sync active.data", "write active.qcow2", "sync active.qcow2"]
    assert bench.after_cuts() == {b"\xaa" * BLOCK + bench.content[BLOCK:]}
    bench.guest(b"\xbb" * 10)
    assert bench.calls(bench.stack.flush_top) == ["sync active.data"], "its bits are there already"


def test_a_write_that_comes_during_a_flush_is_not_published_with_it(bench: Bench) -> None:
    def write_another(call: str, name: str) -> None:
        if (call, name) == ("write", "active.qcow2"):
            bench.storage.before = lambda call, name: None
            bench.guest(b"\xbb" * BLOCK, BLOCK)

    bench.guest(b"\xaa" * BLOCK)
    bench.storage.before = write_another
    bench.stack.flush_top()
    assert bench.after_cuts() == {b"\xaa" * BLOCK + bench.content[BLOCK:]}, "its bit would be there before its data"
    bench.stack.flush_top()
    assert bench.after_cuts() == {b"\xaa" * BLOCK + b"\xbb" * BLOCK + bench.content[2 * BLOCK :]}


def test_a_flush_of_the_primary_needs_only_the_disk(bench: Bench) -> None:
    bench.target(b"\xaa" * BLOCK)
    assert bench.calls(bench.stack.target.flush) == ["sync disk.raw"]


def test_during_a_commit_bits_go_after_the_disk_has_what_they_stood_for_hiddens_first(bench: Bench) -> None:
    bench.target(b"\xaa" * BLOCK)
    bench.guest(b"\xbb" * BLOCK, BLOCK)
    bench.stack.flush_top()
    bench.stack.committing = True
    expected = seen(bench.stack)
    assert bench.calls(lambda: bench.stack.descent.commit(0, 2)) == ["write disk.raw", "write disk.raw"]
    assert bench.after_cuts() == {expected}
    assert bench.calls(bench.stack.flush_top) == ["sync active.data", "sync hidden.data", "sync disk.raw"]
    assert list(bench.stack.descent.portions()), "what came down since the last flush of the commit is still held"
    assert bench.calls(bench.stack.flush_committed) == [
        "sync disk.raw",
        "sync active.data",
        "sync hidden.data",
        "write hidden.qcow2",
        "sync hidden.qcow2",
        "write active.qcow2",
        "sync active.qcow2",
        "sync disk.raw",
    ]
    assert bench.storage.cut_power(0).joinpath("disk.raw").read_bytes() == expected
    assert bench.after_cuts() == {expected}


def test_a_guest_write_that_went_to_the_disk_is_flushed_before_the_bits_above_it_go(bench: Bench) -> None:
    bench.guest(b"\xaa" * BLOCK)
    bench.stack.flush_top()
    bench.stack.committing = True
    bench.stack.descent.commit(0, 1)
    bench.stack.flush_committed()
    guest_write = bench.calls(lambda: bench.stack.write_over(memoryview(b"\xbb" * BLOCK), 0, True))
    assert guest_write == ["write disk.raw", "write active.data"], "the copy stays until the next flush"
    bench.stack.flush_top()
    assert bench.after_cuts() == {b"\xbb" * BLOCK + bench.content[BLOCK:]}


def test_a_commit_that_has_ended_is_stable(bench: Bench) -> None:
    bench.target(b"\xaa" * CLUSTER)
    bench.guest(b"\xbb" * BLOCK, BLOCK)
    expected = seen(bench.stack)
    bench.stack.committing = True
    closing = threading.Event()
    Commit(JobList(EventHub()), "disk0", bench.stack, closing).run()
    for seed in range(10):
        folder = bench.storage.cut_power(seed)
        assert (folder / "disk.raw").read_bytes() == expected
        stack = open_stack(folder)
        assert not any(stack.descent.portions())
        close_stack(stack)
        shutil.rmtree(folder)


def test_emptying_is_published_for_both_images(bench: Bench) -> None:
    bench.target(b"\xaa" * BLOCK)
    bench.guest(b"\xbb" * BLOCK)
    bench.stack.flush_all()
    assert bench.calls(bench.stack.empty) == [], "until the epoch says so nothing is changed"
    assert bench.calls(bench.stack.publish_emptied) == [
        "write active.qcow2",
        "sync active.qcow2",
        "write hidden.qcow2",
        "sync hidden.qcow2",
    ]
    assert bench.after_cuts() == {b"\xaa" * BLOCK + bench.content[BLOCK:]}


def test_target_writes_that_come_together_share_a_sync(bench: Bench) -> None:
    at_work, may_go_on = threading.Event(), threading.Event()

    def hold(call: str, name: str) -> None:
        if (call, name) == ("sync", "hidden.data") and not at_work.is_set():
            at_work.set()
            assert may_go_on.wait(DEADLINE_S)

    bench.storage.before = hold
    bench.storage.calls.clear()
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(bench.target, b"\xaa" * BLOCK, 0)
        assert at_work.wait(DEADLINE_S)
        others = [pool.submit(bench.target, b"\xaa" * BLOCK, block * BLOCK) for block in range(1, 6)]
        waiters = bench.stack.target._hidden_sync._changed._waiters  # type: ignore[attr-defined]
        wait_until(lambda: len(waiters) == 5, "the others wait for the next sync")
        assert "write disk.raw" not in bench.storage.calls
        may_go_on.set()
        for write in (first, *others):
            write.result(DEADLINE_S)
    assert bench.storage.calls.count("sync hidden.qcow2") == 2
    assert bench.after_cuts() == {bench.content}


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["sync hidden.data", "write hidden.qcow2", "sync hidden.qcow2"])
def test_when_hidden_cannot_be_made_stable_no_target_write_is_let_through_any_more(bench: Bench, call: str) -> None:
    bench.target(b"\x99" * BLOCK, 4 * BLOCK)
    bench.fail(*call.split())
    below = (bench.folder / "disk.raw").read_bytes()
    with pytest.raises(LayerError, match=r"^hidden disk: .*Input/output error") as refusal:
        bench.target(b"\xaa" * BLOCK)
    assert (refusal.value.layer, refusal.value.operation) == (Layer.HIDDEN, "sync")
    # Neither with a copy nor without one, although nothing fails now.
    for offset in (0, 2 * BLOCK, 4 * BLOCK):
        with pytest.raises(LayerError) as refusal:
            bench.target(b"\xaa" * BLOCK, offset)
        assert (refusal.value.layer, refusal.value.operation) == (Layer.HIDDEN, "sync")
    with pytest.raises(LayerError):
        bench.stack.target.flush()
    assert (bench.folder / "disk.raw").read_bytes() == below
    assert bench.stack.target.lost.missing
    assert bench.after_cuts() == {bench.content}
    bench.guest(b"\xbb" * BLOCK)
    bench.stack.flush_top()
    assert bench.after_cuts() == {b"\xbb" * BLOCK + bench.content[BLOCK:]}, "the guest goes on"


@pytest.mark.parametrize("call", ["sync active.data", "write active.qcow2", "sync active.qcow2"])
def test_when_active_cannot_be_made_stable_no_flush_of_the_guest_is_answered_any_more(bench: Bench, call: str) -> None:
    bench.guest(b"\xaa" * BLOCK)
    bench.fail(*call.split())
    for _ in range(2):
        with pytest.raises(LayerError, match=r"^active disk: .*Input/output error") as refusal:
            bench.stack.flush_top()
        assert (refusal.value.layer, refusal.value.operation) == (Layer.ACTIVE, "flush")
    assert seen(bench.stack, 0, BLOCK) == b"\xaa" * BLOCK
    bench.target(b"\xbb" * BLOCK, BLOCK)
    bench.stack.target.flush()


def test_a_disk_that_cannot_be_flushed_during_a_commit_keeps_the_bits(bench: Bench) -> None:
    bench.guest(b"\xaa" * BLOCK)
    bench.stack.flush_top()
    bench.stack.committing = True
    bench.stack.descent.commit(0, 1)
    bench.fail("sync", "disk.raw")
    with pytest.raises(LayerError, match="Input/output error"):
        bench.stack.flush_top()
    bench.stack.flush_top()
    for _ in range(2):
        with pytest.raises(LayerError, match="Input/output error"):
            bench.stack.flush_committed()
    assert bench.after_cuts() == {b"\xaa" * BLOCK + bench.content[BLOCK:]}


def test_a_disk_that_could_not_be_flushed_lacks_nobody_knows_what(bench: Bench) -> None:
    bench.target(b"\xaa" * BLOCK)
    bench.fail("sync", "disk.raw")
    with pytest.raises(LayerError) as refusal:
        bench.stack.target.flush()
    assert (refusal.value.layer, refusal.value.operation) == (Layer.SECONDARY, "flush")
    assert bench.stack.target.lost.marked_bytes == SIZE


def test_a_failure_to_publish_emptied_images_ends_stability_for_both_faces(bench: Bench) -> None:
    bench.target(b"\xaa" * BLOCK)
    bench.stack.empty()
    bench.fail("sync", "hidden.qcow2")
    with pytest.raises(LayerError, match="Input/output error") as refusal:
        bench.stack.publish_emptied()
    assert (refusal.value.layer, refusal.value.operation) == (Layer.HIDDEN, "make-empty")
    bench.stack.fail(refusal.value)
    for action in (lambda: bench.target(b"x"), bench.stack.flush_top, bench.stack.target.flush):
        with pytest.raises(LayerError, match="Input/output error"):
            action()


def test_what_a_failed_copy_before_write_has_preserved_is_made_stable_before_it_is_overwritten(bench: Bench) -> None:
    bench.target(b"\x99" * BLOCK, BLOCK)
    writes: list[str] = []

    def fail_the_second(call: str, name: str) -> None:
        if (call, name) == ("write", "hidden.data"):
            writes.append(name)
            if len(writes) == 2:
                raise OSError(errno.EIO, "broken")

    bench.storage.before = fail_the_second
    with pytest.raises(LayerError):
        bench.target(b"\xaa" * (3 * BLOCK))
    assert bench.stack.hidden.holds_all(0, 2)
    assert not bench.stack.hidden.holds_any(2, 3)
    bench.target(b"\xaa" * BLOCK)
    assert bench.after_cuts() == {bench.content}


@pytest.mark.parametrize("killed_before", ["sync hidden.data", "write hidden.qcow2", "sync hidden.qcow2"])
def test_what_a_killed_process_had_preserved_is_made_stable_before_it_is_overwritten(
    bench: Bench, killed_before: str
) -> None:
    bench.fail(*killed_before.split())
    with pytest.raises(LayerError):
        bench.target(b"\xaa" * BLOCK)
    bench.restart()
    assert bench.stack.hidden.holds_all(0, 1), "the live copy says so"
    bench.target(b"\xaa" * BLOCK)
    assert bench.after_cuts() == {bench.content}


def test_settling_makes_stable_what_a_process_without_durability_has_written(bench: Bench) -> None:
    close_stack(bench.stack)
    active, hidden = (Overlay(role, "disk0", str(bench.folder / f"{role}.qcow2")) for role in ("active", "hidden"))
    bench.stack = Stack(active, hidden, FileDisk("disk0", str(bench.folder / "disk.raw")))
    bench.target(b"\xaa" * BLOCK)
    bench.restart()
    assert bench.calls(lambda: bench.stack.settle(disk=True)) == [
        "sync hidden.data",
        "sync hidden.qcow2",
        "sync active.data",
        "sync active.qcow2",
        "sync disk.raw",
    ]


@pytest.mark.parametrize("call", ["sync hidden.data", "sync hidden.qcow2", "sync active.qcow2", "sync disk.raw"])
def test_what_cannot_be_settled_is_an_error_of_that_image(bench: Bench, call: str) -> None:
    bench.fail(*call.split())
    with pytest.raises(LayerError, match="Input/output error") as refusal:
        bench.stack.settle(disk=True)
    layers = {"hidden": Layer.HIDDEN, "active": Layer.ACTIVE, "disk.r": Layer.SECONDARY}
    assert refusal.value.layer is layers[call.removeprefix("sync ")[:6]]


@pytest.mark.parametrize("killed_before", ["sync active.data", "write active.qcow2", "sync active.qcow2"])
def test_a_flush_covers_what_a_killed_process_had_answered(bench: Bench, killed_before: str) -> None:
    bench.guest(b"\xaa" * BLOCK)
    bench.fail(*killed_before.split())
    with pytest.raises(LayerError):
        bench.stack.flush_top()
    bench.restart()
    bench.stack.flush_top()
    assert bench.after_cuts() == {b"\xaa" * BLOCK + bench.content[BLOCK:]}


@pytest.mark.parametrize("killed_before", ["write active.qcow2", "sync active.qcow2", "sync hidden.qcow2"])
def test_a_checkpoint_that_a_killed_process_had_begun_is_completed_for_good(bench: Bench, killed_before: str) -> None:
    bench.target(b"\xaa" * BLOCK)
    bench.guest(b"\xbb" * BLOCK)
    bench.stack.flush_all()
    bench.stack.empty()
    bench.fail(*killed_before.split())
    with pytest.raises(LayerError):
        bench.stack.publish_emptied()
    bench.restart()
    bench.stack.empty()
    bench.stack.publish_emptied()
    assert bench.after_cuts() == {b"\xaa" * BLOCK + bench.content[BLOCK:]}


# -- one overlay ---------------------------------------------------------------------------------------------------


def test_a_page_that_is_written_in_parts_is_published_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.guest(b"\xaa" * CLUSTER, CLUSTER)
    real = files.pwritev
    monkeypatch.setattr(files, "pwritev", lambda fd, buffers, offset: real(fd, [bytes(buffers[0])[:1000]], offset))
    bench.stack.active.publish(bench.stack.active.unpublished())
    monkeypatch.undo()
    image = Overlay("active", "disk0", str(bench.storage.cut_power(0) / "active.qcow2"), True)
    assert list(image.held(0, BLOCKS)) == list(bench.stack.active.held(0, BLOCKS))
    image.close()


def test_an_image_that_takes_no_more_is_an_error_and_not_a_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.guest(b"\xaa" * BLOCK)
    words = bench.stack.active.unpublished()
    monkeypatch.setattr(files, "pwritev", lambda *_: 0)
    with pytest.raises(DiskError, match="takes no more data") as refusal:
        bench.stack.active.publish(words)
    assert refusal.value.errno == errno.ENOSPC
