# SPDX-License-Identifier: BSD-3-Clause
"""overlay.py: bits and data of one image, against a dictionary, over reopening and kills. (Opening: test_qcow2.py.)"""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from content import make_raw, pattern, qemu_img
from overlays import held_clusters, store
from replication.disk import files, mapped
from replication.errors import ConfigError, DiskError
from replication.image import qcow2
from replication.image.layer import Layer, LayerError
from replication.image.overlay import Held, Overlay
from replication.image.qcow2 import BLOCK, BLOCKS_PER_CLUSTER, CLUSTER
from waiting import CHANCE_S, DEADLINE_S

CLUSTERS = 600
SIZE = CLUSTERS * CLUSTER - BLOCK - 512
"""More than two pages of words, the last cluster and its last block short."""
BLOCKS = -(-SIZE // BLOCK)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where nothing has to be waited for that is flushed thousands of times."""


@functools.cache
def pristine() -> bytes:
    """The bytes of an empty image made by qemu-img, whose data file X.data is looked for beside it."""
    with tempfile.TemporaryDirectory(prefix="o-") as folder:
        make_raw(Path(folder) / "disk", SIZE)
        command = qcow2.create_command(f"{folder}/x.qcow2", "disk", "raw", SIZE)
        subprocess.run(
            [part.replace(f"{folder}/x.data", "x.data") for part in command], check=True, cwd=folder, timeout=60
        )
        return (Path(folder) / "x.qcow2").read_bytes()


def make(folder: Path) -> Path:
    """An empty overlay in `folder`."""
    path = folder / "x.qcow2"
    path.write_bytes(pristine())
    make_raw(folder / "x.data", SIZE)
    make_raw(folder / "disk", SIZE)
    return path


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    opened = Overlay("active", "disk0", str(make(tmp_path)))
    yield opened
    opened.close()


class Histories(RuleBasedStateMachine):
    """Marking, emptying, reopening and kills, against the state of every block."""

    ranges = st.one_of(
        st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 80)),
        st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)),
        st.tuples(st.sampled_from([0, 31, 32, 256 * 32 - 1, 256 * 32, BLOCKS - 1]), st.integers(1, 33)),
    ).map(lambda at: (at[0], min(at[0] + at[1], BLOCKS)))

    @initialize(power=st.booleans())
    def open(self, power: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="overlay-", dir=MEMORY))
        self.overlay = Overlay("active", "disk0", str(make(self.folder)), power)
        self.model: dict[int, Held] = {}

    def teardown(self) -> None:
        self.overlay.close()
        # QEMU looks for the data file in its working folder.
        done = subprocess.run(
            ["qemu-img", "check", "x.qcow2"], cwd=self.folder, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done
        shutil.rmtree(self.folder)

    @rule(where=ranges, state=st.sampled_from(Held))
    def mark(self, where: tuple[int, int], state: Held) -> None:
        self.overlay.mark(*where, state)
        for block in range(*where):
            if state is Held.NOTHING:
                self.model.pop(block, None)
            else:
                self.model[block] = state

    @rule(where=ranges)
    def forget(self, where: tuple[int, int]) -> None:
        self.overlay.forget(*where)
        for block in range(*where):
            self.model.pop(block, None)

    @rule()
    def empty(self) -> None:
        self.overlay.empty()
        self.model.clear()

    @rule(power=st.booleans())
    def reopen(self, power: bool) -> None:
        self.overlay.close()
        self.overlay = Overlay("active", "disk0", str(self.folder / "x.qcow2"), power)

    @rule()
    def publish(self) -> None:
        """With durability=power: from here on the image has every word, and nothing is left to publish."""
        if self.overlay.power:
            words = self.overlay.unpublished()
            assert self.overlay.unpublished() == []
            self.overlay.publish(words)
            table = (self.folder / "x.qcow2").read_bytes()[self.overlay.layout.table_offset :]
            words = np.frombuffer(table[: self.overlay.layout.table_length], np.uint64)
            assert (words[1::2] == self.overlay._table[:, 1]).all()

    @rule(power=st.booleans())
    def be_killed(self, power: bool) -> None:
        """Nothing is closed or flushed: the next process sees what is in the mapping."""
        after = Path(tempfile.mkdtemp(prefix="overlay-", dir=MEMORY))
        shutil.copy(self.folder / "x.qcow2", after)
        if self.overlay.power:
            shutil.copy(self.folder / "x.live", after)
        make_raw(after / "x.data", SIZE)
        make_raw(after / "disk", SIZE)
        self.overlay.close()
        shutil.rmtree(self.folder)
        self.folder = after
        self.overlay = Overlay("active", "disk0", str(after / "x.qcow2"), power)

    @rule(where=ranges)
    def look(self, where: tuple[int, int]) -> None:
        start, stop = where
        states = [self.model.get(block, Held.NOTHING) for block in range(start, stop)]
        at, former = start, None
        for first, last, state in self.overlay.held(start, stop):
            assert first == at
            assert last > first
            assert state is not former, "neighbouring runs are one"
            assert states[first - start : last - start] == [state] * (last - first)
            at, former = last, state
        assert at == stop
        assert self.overlay.holds_any(start, stop) == any(state is not Held.NOTHING for state in states)
        assert self.overlay.holds_all(start, stop) == all(state is not Held.NOTHING for state in states)

    @invariant()
    def what_is_held_is_counted_and_found(self) -> None:
        assert self.overlay.blocks == BLOCKS
        assert self.overlay.allocated_blocks == len(self.model)
        assert self.overlay.bytes_held == len(self.model) * BLOCK
        clusters = sorted({block // BLOCKS_PER_CLUSTER for block in self.model})
        assert held_clusters(self.overlay) == [
            (cluster * BLOCKS_PER_CLUSTER, min((cluster + 1) * BLOCKS_PER_CLUSTER, BLOCKS)) for cluster in clusters
        ]


Histories.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestHistories = Histories.TestCase


class Shared(Histories):
    """The same where a copy of the file may share its blocks: changes are written to it before they are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(mapped, "_IN_PLACE", frozenset())

    def teardown(self) -> None:
        super().teardown()
        self.patched.undo()


Shared.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestShared = Shared.TestCase


class Sparse(Histories):
    """The same with tables that are a hole at first, as those of a large disk are."""

    def __init__(self) -> None:
        super().__init__()
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(qcow2, "FILLED_MAX", 0)

    @initialize(power=st.booleans())
    def open(self, power: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="overlay-", dir=MEMORY))
        self.overlay = Overlay("active", "disk0", str(make_sparse(self.folder)), power)
        self.model: dict[int, Held] = {}

    @rule(where=Histories.ranges)
    def be_written_by_qemu(self, where: tuple[int, int]) -> None:
        """It knows nothing of pages: it gives a cluster its entry when it writes there."""
        self.reopen(power=False)  # what it writes beside a live copy of this boot would not count
        self.overlay.close()
        start, stop = where[0], min(where[0] + 40, where[1])
        qemu_io(self.folder, f"write -z {start * BLOCK} {min(stop * BLOCK, SIZE // 512 * 512) - start * BLOCK}")
        self.overlay = Overlay("active", "disk0", str(self.folder / "x.qcow2"))
        self.model.update(dict.fromkeys(range(start, stop), Held.ZERO))

    def teardown(self) -> None:
        super().teardown()
        self.patched.undo()


Sparse.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestSparse = Sparse.TestCase


def qemu_io(folder: Path, command: str) -> None:
    """One command of qemu-io on x.qcow2, whose data file it looks for in its working folder."""
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", command, "x.qcow2"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done
    assert "failed" not in done.stdout + done.stderr, done


@functools.cache
def pristine_sparse() -> bytes:
    """As `pristine`, of one made for a large disk, which is smaller here."""
    with tempfile.TemporaryDirectory(prefix="o-") as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(qcow2, "FILLED_MAX", 0)
        patched.setattr(qcow2, "default_data_path", lambda path: "x.data")
        patched.chdir(folder)
        qcow2.create(f"{folder}/x.qcow2", "disk", "raw", SIZE)
        return (Path(folder) / "x.qcow2").read_bytes()


def make_sparse(folder: Path) -> Path:
    """An empty overlay in `folder` whose tables are a hole."""
    path = make(folder)
    content = pristine_sparse()
    path.write_bytes(content.rstrip(b"\0"))
    os.truncate(path, len(content))
    return path


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Overlay]:
    """An overlay whose words are a hole."""
    monkeypatch.setattr(qcow2, "FILLED_MAX", 0)
    opened = Overlay("hidden", "disk0", str(make_sparse(tmp_path)))
    yield opened
    opened.close()


def test_words_in_a_hole_for_which_there_is_no_room_are_an_error_of_their_layer_and_nothing_was_stored(
    sparse: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store would end the process (SIGBUS). Of a hole nothing is read either, and one page is enough for 32 MiB."""
    before = os.stat(sparse.path).st_blocks
    asked = []
    sparse.relieve = lambda: bool(asked.append(None)) or len(asked) < 3
    with monkeypatch.context() as full:
        full.setattr(files, "pwritev", no_room)
        for change in (lambda: sparse.mark(5, 6, Held.DATA), lambda: sparse.mark_each([(5, 6)], Held.ZERO)):
            with pytest.raises(LayerError, match="writing the allocation bits of") as refusal:
                change()
            assert (refusal.value.layer, refusal.value.full) == (Layer.HIDDEN, True)
        sparse.forget(0, 40)
        sparse.forget_chosen(0, np.ones(64, np.bool_))
        sparse.empty()
    assert len(asked) == 4, "it looks for room until there is none"
    assert list(sparse.held(0, BLOCKS)) == [(0, BLOCKS, Held.NOTHING)]
    assert not sparse.blocks_of(0).any()
    assert not sparse.states(0, 300)[0].any()
    assert os.stat(sparse.path).st_blocks == before
    sparse.mark(5, 6, Held.DATA)
    assert os.stat(sparse.path).st_blocks * 512 - before * 512 <= 4096
    monkeypatch.setattr(files, "pwritev", no_room)
    sparse.mark(6, 200, Held.ZERO)
    assert sparse.allocated_blocks == 195


def test_to_publish_what_was_marked_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With durability=power. A sync that has failed is the end of the checkpoint; a mark that has, of one write."""
    monkeypatch.setattr(qcow2, "FILLED_MAX", 0)
    path = make_sparse(tmp_path)
    overlay = Overlay("hidden", "disk0", str(path), power=True)
    try:
        real, writes = files.pwritev, []

        def no_more(fd: int, *rest: Any) -> Any:
            writes.append(fd)
            return no_room() if len(writes) == 1 else real(fd, *rest)

        with monkeypatch.context() as full:
            full.setattr(files, "pwritev", no_more)
            with pytest.raises(LayerError, match="No space left"):
                overlay.mark(5, 6, Held.DATA)
        assert len(writes) == 1, "the image comes first"
        overlay.mark(5, 6, Held.DATA)
        with open(path, "rb") as image:
            os.fsync(image.fileno())
        before = path.stat().st_blocks
        overlay.publish(overlay.unpublished())
        assert path.stat().st_blocks == before
    finally:
        overlay.close()


def test_room_that_is_found_meanwhile_is_used(sparse: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.pwritev
    monkeypatch.setattr(files, "pwritev", no_room)

    def found() -> bool:
        monkeypatch.setattr(files, "pwritev", real)
        return True

    sparse.relieve = found
    sparse.mark(5, 6, Held.DATA)
    assert sparse.holds_all(5, 6)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Overlay]:
    """An overlay whose words are written to the file before they are stored."""
    monkeypatch.setattr(mapped, "_IN_PLACE", frozenset())
    opened = Overlay("hidden", "disk0", str(make(tmp_path)))
    yield opened
    opened.close()


def in_file(overlay: Overlay) -> bytes:
    """The words as the next process finds them."""
    content = Path(overlay.path).read_bytes()[overlay.layout.table_offset :]
    return content[: overlay.layout.table_length]


def test_what_is_marked_while_the_words_are_checked_is_in_the_file(
    shared: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    check     reads the page ........................ writes it
    write                     marks a block of it (waits)
    """
    shared.mark(0, 1, Held.DATA)
    read = shared._page
    marking = threading.Thread(target=shared.mark, args=(5, 6, Held.DATA))

    def interrupted(page: int) -> bytes:
        words = read(page)
        marking.start()
        marking.join(CHANCE_S)
        return words

    monkeypatch.setattr(shared, "_page", interrupted)
    shared.check()
    monkeypatch.undo()
    marking.join(DEADLINE_S)
    words = np.frombuffer(in_file(shared), np.uint64)
    assert words[1] == shared._all[1]
    assert shared.holds_all(5, 6)


def test_bits_for_which_there_is_no_room_are_an_error_of_their_layer_and_are_not_set(
    shared: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.mark(0, 40, Held.DATA)
    before = in_file(shared), shared.allocated_blocks
    with monkeypatch.context() as full:
        full.setattr(files, "pwritev", no_room)
        for change in (
            lambda: shared.mark(30, 70, Held.DATA),
            lambda: shared.mark_each([(100, 101)], Held.ZERO),
            lambda: shared.forget(0, 1),
            lambda: shared.forget_chosen(0, np.ones(64, np.bool_)),
        ):
            with pytest.raises(LayerError) as refusal:
                change()
            assert (refusal.value.layer, refusal.value.full) == (Layer.HIDDEN, True)
            assert "writing the allocation bits of" in str(refusal.value)
        with pytest.raises(DiskError, match="No space left"):
            shared.check()
    assert (in_file(shared), shared.allocated_blocks) == before
    assert list(shared.held(0, 70)) == [(0, 40, Held.DATA), (40, 70, Held.NOTHING)]
    shared.check()
    shared.mark(30, 70, Held.DATA)
    assert in_file(shared) == shared._table.tobytes()


def test_bits_that_could_not_be_emptied_in_the_file_let_nothing_be_marked_until_they_are(
    shared: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.mark(0, 40, Held.DATA)
    with monkeypatch.context() as full:
        full.setattr(files, "pwritev", no_room)
        shared.empty()
    with pytest.raises(DiskError, match="No space left"):
        shared.check_emptied()
    with pytest.raises(LayerError, match="No space left"):
        shared.mark(50, 51, Held.DATA)
    shared._dirty[:] = b"\1" * len(shared._dirty)
    shared.empty()
    shared.check_emptied()
    shared.mark(50, 51, Held.DATA)
    assert in_file(shared) == shared._table.tobytes()


def no_room(*_: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("suffix", [".qcow2", ".data", ".live"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_of_an_overlay_that_is_removed_or_replaced_while_in_use_is_noticed(
    tmp_path: Path, suffix: str, how: str
) -> None:
    overlay = Overlay("active", "disk0", str(make(tmp_path)), power=True)
    try:
        overlay.check()
        path = tmp_path / f"x{suffix}"
        if how == "replaced":
            shutil.copy(path, tmp_path / "copy")
            os.rename(tmp_path / "copy", path)
        else:
            path.unlink()
        with pytest.raises(DiskError, match=rf"x\{suffix} was removed"):
            overlay.check()
    finally:
        overlay.close()


def test_an_image_fresh_from_qemu_img_holds_nothing(overlay: Overlay) -> None:
    assert list(overlay.held(0, BLOCKS)) == [(0, BLOCKS, Held.NOTHING)]
    assert overlay.allocated_blocks == 0
    assert held_clusters(overlay) == []


def test_chosen_blocks_are_let_go_of_and_all_others_stay_as_they_were(overlay: Overlay) -> None:
    """Across a page of words, whatever the pattern; the counts and what is to be published go along."""
    draw = random.Random(11)
    first, clusters = 250, 12
    blocks = range(first * BLOCKS_PER_CLUSTER, (first + clusters) * BLOCKS_PER_CLUSTER)
    states = {block: draw.choice(list(Held)) for block in blocks}
    for block, state in states.items():
        overlay.mark(block, block + 1, state)
    data, zero = overlay.states(first, first + clusters)
    assert [Held.DATA if data[at] else Held.ZERO if zero[at] else Held.NOTHING for at in range(len(blocks))] == list(
        states.values()
    )
    overlay.unpublished()
    chosen = np.array([draw.random() < 0.5 for _ in blocks])
    overlay.forget_chosen(first, chosen)
    left = {block: Held.NOTHING if gone else states[block] for block, gone in zip(blocks, chosen, strict=True)}
    assert [state for block in blocks for _, _, state in overlay.held(block, block + 1)] == list(left.values())
    assert overlay.allocated_blocks == sum(state is not Held.NOTHING for state in left.values())
    assert overlay.data_blocks == sum(state is Held.DATA for state in left.values())
    assert [page for page, _ in overlay.unpublished()] == [0, 1]
    overlay.forget_chosen(first, chosen)
    assert overlay.unpublished() == [], "there was nothing left of it"


def test_stock_qemu_reads_what_an_overlay_holds(tmp_path: Path) -> None:
    path = tmp_path / "y.qcow2"
    make_raw(tmp_path / "disk", SIZE, b"\x11" * CLUSTER)
    qcow2.create(str(path), str(tmp_path / "disk"), "raw", SIZE)
    overlay = Overlay("active", "disk0", str(path))
    data = pattern(7, 3 * BLOCK)
    store(overlay, data, 1)
    overlay.mark(10, 12, Held.ZERO)
    overlay.flush()
    overlay.close()
    qemu_img("convert", "-f", "qcow2", "-O", "raw", str(path), str(tmp_path / "flat"))
    expected = bytearray(b"\x11" * CLUSTER)
    expected[BLOCK : 4 * BLOCK] = data
    expected[10 * BLOCK : 12 * BLOCK] = bytes(2 * BLOCK)
    assert (tmp_path / "flat").read_bytes()[:CLUSTER] == expected


def test_reclaiming_gives_back_what_is_not_data_and_nothing_else(overlay: Overlay) -> None:
    data = pattern(3, 8 * BLOCK)
    store(overlay, data, 0)
    overlay.mark(2, 4, Held.ZERO)
    overlay.forget(6, 8)
    used = os.stat(overlay.data.location).st_blocks
    ranges = list(overlay.stale_ranges())
    assert ranges
    assert sum(overlay.reclaim(*where) for where in ranges) >= 4 * BLOCK
    assert os.stat(overlay.data.location).st_blocks == used - 4 * BLOCK // 512
    for first, last in ((0, 2), (4, 6)):
        kept = bytearray((last - first) * BLOCK)
        overlay.data.read(memoryview(kept), first * BLOCK)
        assert kept == data[first * BLOCK : last * BLOCK]


def test_an_image_that_went_away_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path)
    overlay = Overlay("active", "disk0", str(path))
    overlay.check()
    path.unlink()
    with pytest.raises(DiskError, match="was removed while in use"):
        overlay.check()
    overlay.close()


def test_an_image_cut_off_while_in_use_is_noticed_without_touching_its_map(overlay: Overlay) -> None:
    os.truncate(overlay.path, CLUSTER)
    try:
        with pytest.raises(DiskError, match="was truncated while in use"):
            overlay.check()
    finally:
        os.truncate(overlay.path, len(pristine()))


# -- growth ------------------------------------------------------------------------------------------------------------

LARGER = SIZE + 2 * 8192 * CLUSTER + 3 * BLOCK
"""Two more tables."""


@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
@pytest.mark.parametrize("size", [SIZE + 512, SIZE + 5 * BLOCK, LARGER], ids=["block", "cluster", "tables"])
def test_an_overlay_grows_with_what_it_holds(tmp_path: Path, power: bool, size: int) -> None:
    path = make(tmp_path)
    overlay = Overlay("hidden", "disk0", str(path), power)
    store(overlay, pattern(1, BLOCK), BLOCKS - 3)
    states = {3: Held.DATA, 40: Held.ZERO, BLOCKS - 3: Held.DATA, BLOCKS - 1: Held.ZERO}
    overlay.mark(3, 4, Held.DATA)
    overlay.mark(40, 41, Held.ZERO)
    # As QEMU does, to the end of the cluster, of which what is behind the disk's end is nothing yet.
    overlay.mark(BLOCKS - 1, CLUSTERS * BLOCKS_PER_CLUSTER, Held.ZERO)
    overlay.prepare_growth(size)
    overlay.copy_words()
    overlay.grow()
    for again in (False, True):
        assert overlay.layout.size == qcow2.image_size(size)
        found = {start: state for start, stop, state in overlay.held(0, overlay.blocks) if state is not Held.NOTHING}
        assert found == states
        assert overlay.allocated_blocks == 4
        assert overlay.data.status().st_size >= qcow2.image_size(size)
        buffer = bytearray(BLOCK)
        overlay.data.read(memoryview(buffer), (BLOCKS - 3) * BLOCK)
        assert buffer == pattern(1, BLOCK)
        if not again:
            last = overlay.blocks - 1
            overlay.mark(last, last + 1, Held.DATA)
            overlay.mark(last, last + 1, Held.NOTHING if last != BLOCKS - 1 else Held.ZERO)
            overlay.check()
            overlay.settle()
            overlay.close()
            overlay = Overlay("hidden", "disk0", str(path), power)
    overlay.close()
    qemu_img("check", str(path))
    assert not list(tmp_path.glob("*.grown*"))
    assert not list(tmp_path.glob("*~"))


@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
def test_a_growth_that_comes_to_nothing_leaves_nothing(tmp_path: Path, power: bool) -> None:
    path = make(tmp_path)
    overlay = Overlay("hidden", "disk0", str(path), power)
    overlay.mark(3, 4, Held.DATA)
    before = sorted(tmp_path.iterdir())
    overlay.prepare_growth(LARGER)
    overlay.copy_words()
    overlay.drop_growth()
    (tmp_path / "x.dat~").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="there is a file "):
        overlay.prepare_growth(LARGER)
    assert (tmp_path / "x.dat~").read_bytes() == b"mine"
    (tmp_path / "x.dat~").unlink()
    assert sorted(tmp_path.iterdir()) == before
    assert overlay.layout.size == qcow2.image_size(SIZE)
    assert overlay.holds_all(3, 4)
    overlay.close()


def test_words_for_which_there_is_no_room_stop_a_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = Overlay("hidden", "disk0", str(make(tmp_path)))
    overlay.mark(3, 4, Held.DATA)
    overlay.prepare_growth(LARGER)

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(mapped.MappedFile, "put", full)
        with pytest.raises(DiskError, match="No space left"):
            overlay.copy_words()
    overlay.drop_growth()
    assert overlay.holds_all(3, 4)
    overlay.close()


def test_the_second_copy_of_the_words_has_what_has_changed_since_the_first(tmp_path: Path) -> None:
    overlay = Overlay("hidden", "disk0", str(make(tmp_path)))
    overlay.mark(3, 4, Held.DATA)
    overlay.prepare_growth(LARGER)
    overlay.copy_words(ahead=True)
    overlay.mark(5, 6, Held.ZERO)
    overlay.mark(3, 4, Held.ZERO)
    overlay.copy_words()
    overlay.grow()
    assert [state for _, _, state in overlay.held(3, 6)] == [Held.ZERO, Held.NOTHING, Held.ZERO]
    assert overlay._outgrown
    overlay.empty()
    assert not overlay._outgrown, "the memory of the former words"
    overlay.close()


def test_a_larger_image_that_gets_no_name_is_used_by_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path)
    overlay = Overlay("hidden", "disk0", str(path))
    overlay.mark(3, 4, Held.DATA)
    overlay.prepare_growth(LARGER)
    overlay.copy_words()

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(DiskError, match="renaming"):
            overlay.grow()
    assert overlay.misplaced
    overlay.mark(overlay.blocks - 1, overlay.blocks, Held.DATA)
    assert overlay.holds_all(3, 4)
    assert overlay.holds_all(overlay.blocks - 1, overlay.blocks)
    overlay.close()
    former = Overlay("hidden", "disk0", str(path))
    assert former.layout.size == qcow2.image_size(SIZE)
    assert former.holds_all(3, 4)
    former.close()
