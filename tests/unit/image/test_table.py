# SPDX-License-Identifier: BSD-3-Clause
"""table.py: which words a process begins with, after a former one of the same boot or of another."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from content import make_raw
from overlays import store
from replication.disk import files
from replication.errors import ConfigError
from replication.image import qcow2
from replication.image import table as table_module
from replication.image.overlay import Held, Overlay
from replication.image.qcow2 import BLOCK, CLUSTER, Layout, read_layout
from replication.image.table import Table, image_table, live_path, live_table
from replication.record.boot import BOOT_ID_ENVIRONMENT

SIZE = 700 * CLUSTER
"""Three pages of words."""
FIRST, SECOND = 1 << 56, 3 << 56
"""Words that say that the first block, or the first two, of a cluster are allocated (big-endian in the file)."""


class Image:
    """An empty image, and its words as this or another process finds them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "x.qcow2"
        self.live = folder / "x.live"
        make_raw(folder / "disk", SIZE)
        qcow2.create(str(self.path), str(folder / "disk"), "raw", SIZE)
        self.layout: Layout = read_layout(str(self.path))

    @contextlib.contextmanager
    def power(self) -> Iterator[Table]:
        """As with durability=power."""
        with self._opened(live_table) as table:
            yield table

    @contextlib.contextmanager
    def process(self) -> Iterator[Table]:
        """As with durability=process."""
        with self._opened(image_table) as table:
            yield table

    @contextlib.contextmanager
    def _opened(self, function: Any) -> Iterator[Table]:
        fd = os.open(self.path, os.O_RDWR)
        try:
            table = function(fd, str(self.path), self.layout)
            try:
                yield table
            finally:
                table.close()
        finally:
            os.close(fd)

    def in_image(self, cluster: int) -> int:
        """What the image itself says of a cluster."""
        with open(self.path, "rb") as file:
            return int.from_bytes(os.pread(file.fileno(), 8, self.layout.table_offset + 16 * cluster + 8), "little")

    def put_into_image(self, cluster: int, word: int) -> None:
        with open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), word.to_bytes(8, "little"), self.layout.table_offset + 16 * cluster + 8)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    monkeypatch.setenv(BOOT_ID_ENVIRONMENT, "first boot")
    return Image(tmp_path)


def reboot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BOOT_ID_ENVIRONMENT, "second boot")


def test_the_live_copy_lies_beside_the_image() -> None:
    assert live_path("/a/x.qcow2") == "/a/x.live"
    assert live_path("/a/x") == "/a/x.live"
    assert live_path("/a.qcow2/x") == "/a.qcow2/x.live"


def test_words_change_in_the_live_copy_and_not_in_the_image(image: Image) -> None:
    image.put_into_image(7, FIRST)
    before = image.path.read_bytes()
    with image.power() as table:
        assert (table.words[2 * 7 + 1], table.words[2 * 8 + 1]) == (FIRST, 0)
        table.words[2 * 8 + 1] = SECOND
        assert int(table.grid[8, 1]) == SECOND
        assert len(table.words) * 8 == image.layout.table_length
    assert image.path.read_bytes() == before
    assert image.live.stat().st_mode & 0o077 == 0
    assert image.live.stat().st_blocks * 512 >= image.live.stat().st_size, "no hole: a store could kill the process"


def test_the_words_of_a_process_of_this_boot_are_used_again(image: Image) -> None:
    with image.power() as table:
        table.words[2 * 600 + 1] = SECOND
    with image.power() as table:
        assert table.words[2 * 600 + 1] == SECOND
    assert image.in_image(600) == 0


def test_the_words_of_another_boot_are_not(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    with image.power() as table:
        table.words[2 * 600 + 1] = SECOND
    reboot(monkeypatch)
    image.put_into_image(3, FIRST)
    with image.power() as table:
        assert (table.words[2 * 600 + 1], table.words[2 * 3 + 1]) == (0, FIRST)
    with image.power() as table:
        assert (table.words[2 * 600 + 1], table.words[2 * 3 + 1]) == (0, FIRST), "now of this boot"


def test_without_live_copies_the_words_are_those_of_the_image(image: Image) -> None:
    with image.process() as table:
        table.words[2 * 5 + 1] = FIRST
        table.flush()
    assert image.in_image(5) == FIRST
    assert not image.live.exists()


def test_the_image_takes_over_what_the_live_copy_of_this_boot_knows_better(image: Image) -> None:
    image.put_into_image(1, FIRST)
    image.put_into_image(2, FIRST)
    with image.power() as table:
        table.words[2 * 1 + 1] = 0
        table.words[2 * 600 + 1] = SECOND
    with image.process() as table:
        assert [table.words[2 * cluster + 1] for cluster in (1, 2, 600)] == [0, FIRST, SECOND]
    assert [image.in_image(cluster) for cluster in (1, 2, 600)] == [0, FIRST, SECOND]
    assert not image.live.exists(), "it counts no longer"
    qcow2.read_layout(str(image.path))


def test_the_image_takes_nothing_over_from_another_boot(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    with image.power() as table:
        table.words[2 * 600 + 1] = SECOND
    reboot(monkeypatch)
    with image.process() as table:
        assert table.words[2 * 600 + 1] == 0
    assert not image.live.exists()


def test_nor_does_a_later_process_get_what_was_taken_over_once(image: Image) -> None:
    with image.power() as table:
        table.words[2 * 600 + 1] = SECOND
    with image.process() as table:
        table.words[2 * 600 + 1] = 0
    with image.power() as table:
        assert table.words[2 * 600 + 1] == 0


INCOMPLETE = {
    "empty": lambda content: b"",
    "without its first page": lambda content: bytes(4096) + content[4096:],
    "cut off": lambda content: content[:-1],
    "too long": lambda content: content + b"\0",
    "of another version": lambda content: content.replace(b"words 1", b"words 2", 1),
    "of a table of another size": lambda content: content.replace(b"boot\n", b"boot\n1", 1),
}


@pytest.mark.parametrize("spoil", INCOMPLETE.values(), ids=INCOMPLETE.keys())
@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_live_copy_that_is_not_complete_does_not_count(image: Image, durability: str, spoil: Any) -> None:
    with image.power() as table:
        table.words[2 * 600 + 1] = SECOND
    image.put_into_image(3, FIRST)
    content = image.live.read_bytes()
    assert spoil(content) != content
    image.live.write_bytes(spoil(content))
    with getattr(image, durability)() as table:
        assert (table.words[2 * 600 + 1], table.words[2 * 3 + 1]) == (0, FIRST)


@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_corrupt_live_copy_is_refused_and_kept(image: Image, durability: str) -> None:
    with image.power() as table:
        table.words[2 * 600] ^= 1 << 20
    kept = image.live.read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"x\.live"), getattr(image, durability)():
            pass
    assert image.live.read_bytes() == kept


@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_live_copy_that_cannot_be_opened_is_a_clear_error(image: Image, durability: str) -> None:
    image.live.mkdir()
    with (
        pytest.raises(ConfigError, match=r"cannot open .*x\.live: Is a directory"),
        getattr(image, durability)(),
    ):
        pass


@pytest.mark.parametrize("nth", [0, 1])
def test_on_a_full_file_system_no_copy_is_made_that_counts(
    image: Image, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """While the table is copied, or at the header that makes it count."""
    real, left = files.write_all, [nth]

    def full(*arguments: Any) -> bool:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    image.put_into_image(3, FIRST)
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as broken:
        broken.setattr(files, "write_all", full)
        with pytest.raises(ConfigError, match=r"cannot make .*x\.live: No space left on device"), image.power():
            pass
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    image.put_into_image(3, SECOND)
    with image.power() as table:
        assert table.words[2 * 3 + 1] == SECOND, "of the copy that was given up nothing is used"


def test_an_image_cut_off_while_it_is_copied_is_an_error_and_not_a_loop(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pread
    monkeypatch.setattr(
        os, "pread", lambda fd, length, at: b"" if at == image.layout.table_offset else real(fd, length, at)
    )
    monkeypatch.setattr(table_module, "check_entries", lambda *_: None)
    with pytest.raises(ConfigError, match="truncated"), image.power():
        pass


def test_a_table_copied_in_several_parts_is_whole(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "_COPY_MAX", 5000)
    image.put_into_image(699, FIRST)
    with image.power() as table:
        assert table.words[2 * 699 + 1] == FIRST
        content = image.path.read_bytes()[image.layout.table_offset :][: image.layout.table_length]
        assert image.live.read_bytes()[4096:] == content


@pytest.mark.parametrize(("former", "latter"), [("power", "process"), ("process", "power"), ("power", "power")])
def test_an_overlay_has_what_the_former_process_held_whichever_durability_each_has(
    image: Image, former: str, latter: str
) -> None:
    overlay = Overlay("active", "disk0", str(image.path), former == "power")
    store(overlay, b"\xaa" * (2 * BLOCK), 40)
    overlay.mark(100, 101, Held.ZERO)
    overlay.close()
    overlay = Overlay("active", "disk0", str(image.path), latter == "power")
    assert list(overlay.held(39, 43)) == [(39, 40, Held.NOTHING), (40, 42, Held.DATA), (42, 43, Held.NOTHING)]
    assert overlay.holds_all(100, 101)
    assert overlay.allocated_blocks == 3
    overlay.close()
