# SPDX-License-Identifier: BSD-3-Clause
"""qcow2.py and the overlay that it opens: stock qemu-img's image is accepted, anything else refused, nothing written.

The images are made by qemu-img itself, then broken byte by byte; the data file is never large.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.errors import ConfigError
from replication.image import qcow2
from replication.image.overlay import Held, Overlay
from replication.image.qcow2 import BLOCK, CLUSTER

SIZE = 640 << 10
"""Five clusters: one L2 table, of which nearly all entries lie beyond the end."""

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

EXTERNAL_DATA_AND_EXTENDED_L2 = 4 | 16


def qemu_img(*arguments: str) -> str:
    """Run qemu-img; its output."""
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def pristine() -> bytes:
    """The bytes of a small valid image, backing file disk.raw and data file x.data in its own folder."""
    with tempfile.TemporaryDirectory(prefix="q-") as folder:
        here = Path(folder)
        (here / "disk.raw").write_bytes(b"")
        os.truncate(here / "disk.raw", SIZE)
        command = qcow2.create_command(f"{folder}/x.qcow2", "disk.raw", "raw", SIZE)
        command = [part.replace(f"{folder}/x.data", "x.data") for part in command]
        subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=folder)
        return (here / "x.qcow2").read_bytes()


class Image:
    """A copy of the valid image in a folder of its own, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "x.qcow2"
        self.data = folder / "x.data"
        self.content = bytearray(pristine())
        self.data.write_bytes(b"")
        os.truncate(self.data, SIZE)

    def put(self, offset: int, form: str, *values: int) -> Image:
        """Overwrite a field."""
        struct.pack_into(form, self.content, offset, *values)
        return self

    def get(self, offset: int, form: str = ">Q") -> int:
        """A field."""
        return int(struct.unpack_from(form, self.content, offset)[0])

    @property
    def l1(self) -> int:
        return self.get(40)

    @property
    def l2(self) -> int:
        return self.get(self.l1) & ~(1 << 63)

    def open(self) -> Overlay:
        """Write it out and open it; whatever happens, neither file may change."""
        self.path.write_bytes(self.content)
        before = (digest(self.path), digest(self.data))
        try:
            return Overlay("hidden", "disk0", str(self.path))
        finally:
            assert (digest(self.path), digest(self.data)) == before

    def refusal(self) -> str:
        """Why it is not opened: one line that names the image."""
        files = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError) as caught:
            self.open().close()
        text = str(caught.value)
        assert str(self.path) in text or str(self.data) in text
        assert len(text.splitlines()) == 1
        assert len(os.listdir("/proc/self/fd")) <= files, "a file stays open and locked after a refusal"
        return text


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path)


# -- accepted --------------------------------------------------------------------------------------------------


def test_qemu_imgs_own_image_is_accepted_as_empty(image: Image) -> None:
    overlay = image.open()
    try:
        assert overlay.layout.size == SIZE
        assert overlay.layout.backing == str(image.path.parent / "disk.raw")
        assert overlay.layout.data_path == str(image.data)
        assert overlay.bytes_held == 0
    finally:
        overlay.close()


def test_bits_in_the_image_are_what_the_overlay_holds(image: Image) -> None:
    image.put(image.l2 + 8, ">II", 0b10, 0b101)  # block 1 reads as zero, blocks 0 and 2 hold data
    overlay = image.open()
    try:
        assert list(overlay.held(0, 4)) == [
            (0, 1, Held.DATA),
            (1, 2, Held.ZERO),
            (2, 3, Held.DATA),
            (3, 4, Held.NOTHING),
        ]
        assert overlay.bytes_held == 3 * BLOCK
    finally:
        overlay.close()


@pytest.mark.parametrize("size", [512, BLOCK, CLUSTER - 512, CLUSTER, (1 << 30) - 512, 1 << 30, (1 << 30) + 512])
def test_create_makes_an_image_that_is_accepted_and_that_qemu_img_finds_sound(tmp_path: Path, size: int) -> None:
    path = str(tmp_path / "a,b.qcow2")
    qcow2.create(path, str(tmp_path / "no.raw"), "raw", size)
    overlay = Overlay("active", "disk0", path)
    try:
        assert overlay.layout.size == size
        assert overlay.layout.data_path == str(tmp_path / "a,b.data")
        assert overlay.layout.table_length == -(-size // (1 << 30)) * CLUSTER
    finally:
        overlay.close()
    assert sorted(os.listdir(tmp_path)) == ["a,b.data", "a,b.qcow2"]
    (tmp_path / "no.raw").touch()
    assert "No errors" in qemu_img("check", path)


@pytest.mark.parametrize("gib", [257, 16 << 10])
def test_the_tables_of_a_large_disk_are_a_hole_and_sound(tmp_path: Path, gib: int) -> None:
    path = tmp_path / "x.qcow2"
    qcow2.create(str(path), str(tmp_path / "disk"), "raw", (gib << 30) - CLUSTER)
    assert path.stat().st_blocks * 512 <= 8 * CLUSTER
    layout = qcow2.read_layout(str(path))
    assert (layout.table_length, sum(layout.pages.whole), sum(layout.pages.held)) == (gib * CLUSTER, 0, 0)
    (tmp_path / "disk").touch()
    if gib < 1 << 10:  # it takes 20 s for 16 TiB
        assert "No errors" in qemu_img("check", str(path))


@pytest.mark.skipif(MEMORY is None, reason="ext4 takes no file of more than 16 TiB")
def test_refcounts_that_take_more_than_one_block_are_sound() -> None:
    """From 64 TiB on."""
    with tempfile.TemporaryDirectory(prefix="q-", dir=MEMORY) as folder:
        path = f"{folder}/x.qcow2"
        qcow2.create(path, f"{folder}/disk", "raw", 130 << 40)
        assert qcow2.read_layout(path).table_length == (130 << 10) * CLUSTER


def test_a_disk_that_is_no_whole_number_of_sectors_is_rounded_up() -> None:
    assert [qcow2.image_size(size) for size in (1, 511, 512, 513, SIZE)] == [512, 512, 512, 1024, SIZE]


def test_create_does_not_take_over_a_data_file_with_content(tmp_path: Path) -> None:
    data = tmp_path / "x.data"
    data.write_bytes(b"precious" * 1000)
    with pytest.raises(ConfigError, match=r"x\.data"):
        qcow2.create(str(tmp_path / "x.qcow2"), "no.raw", "raw", SIZE)
    assert data.read_bytes() == b"precious" * 1000
    assert os.listdir(tmp_path) == ["x.data"]


def test_create_that_fails_leaves_nothing_under_the_image_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot create"):
        qcow2.create(str(tmp_path / "none" / "x.qcow2"), "no.raw", "raw", SIZE)
    assert os.listdir(tmp_path) == []


def test_create_says_why_it_failed_also_where_it_can_remove_nothing(tmp_path: Path) -> None:
    """As in a folder of somebody else; a test that runs as root needs something else that cannot be unlinked."""
    (tmp_path / "x.qcow2.new").mkdir()
    with pytest.raises(ConfigError, match=r"cannot create .*x\.qcow2: qemu-img: "):
        qcow2.create(str(tmp_path / "x.qcow2"), "no.raw", "raw", SIZE)
    assert os.listdir(tmp_path) == ["x.qcow2.new"]


# -- truncated -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["empty", "magic", "header", "extensions", "l1", "before l2", "in l2", "last byte"])
def test_a_truncated_image_is_refused(image: Image, where: str) -> None:
    length = {
        "empty": 0,
        "magic": 3,
        "header": 60,
        "extensions": 130,
        "l1": image.l1 + 4,
        "before l2": image.l2,
        "in l2": image.l2 + 100,
        "last byte": image.l2 + CLUSTER - 1,
    }[where]
    del image.content[length:]
    assert "truncated" in image.refusal()


def test_a_truncated_data_file_is_refused(image: Image) -> None:
    os.truncate(image.data, SIZE - 1)
    assert "truncated" in image.refusal()


def test_a_missing_data_file_is_refused_by_name(tmp_path: Path) -> None:
    image = Image(tmp_path)
    image.path.write_bytes(image.content)
    image.data.unlink()
    with pytest.raises(ConfigError, match=r"x\.data.*No such file"):
        Overlay("hidden", "disk0", str(image.path))
    assert os.listdir(tmp_path) == ["x.qcow2"]


# -- corrupt ---------------------------------------------------------------------------------------------------

HEADER_FIELDS = [
    ("magic", 0, ">I", 0x514649FA, "not a qcow2 image"),
    ("version 2", 4, ">I", 2, "layout"),
    ("version 4", 4, ">I", 4, "layout"),
    ("cluster bits 16", 20, ">I", 16, "layout"),
    ("cluster bits 0", 20, ">I", 0, "layout"),
    ("cluster bits 2^32 - 1", 20, ">I", 0xFFFFFFFF, "layout"),
    ("no size", 24, ">Q", 0, "corrupt"),
    ("half a sector", 24, ">Q", SIZE + 1, "corrupt"),
    ("size of 2 GiB", 24, ">Q", 2 << 30, "corrupt"),
    ("largest size", 24, ">Q", (1 << 64) - 512, "corrupt"),
    ("encrypted", 32, ">I", 2, "layout"),
    ("no L1 entries", 36, ">I", 0, "corrupt"),
    ("too many L1 entries", 36, ">I", 2, "corrupt"),
    ("L1 at 0", 40, ">Q", 0, "corrupt"),
    ("L1 not aligned", 40, ">Q", CLUSTER + 8, "corrupt"),
    ("L1 beyond the end", 40, ">Q", 1 << 40, "corrupt"),
    ("L1 at 2^63", 40, ">Q", 1 << 63, "corrupt"),
    ("a snapshot", 60, ">I", 1, "layout"),
    ("dirty", 72, ">Q", EXTERNAL_DATA_AND_EXTENDED_L2 | 1, "dirty"),
    ("marked corrupt", 72, ">Q", EXTERNAL_DATA_AND_EXTENDED_L2 | 2, "corrupt"),
    ("compression type", 72, ">Q", EXTERNAL_DATA_AND_EXTENDED_L2 | 8, "layout"),
    ("no external data", 72, ">Q", 16, "layout"),
    ("no extended L2", 72, ">Q", 4, "layout"),
    ("unknown feature", 72, ">Q", EXTERNAL_DATA_AND_EXTENDED_L2 | 1 << 63, "layout"),
    ("header length 0", 100, ">I", 0, "corrupt"),
    ("header length 2^32 - 1", 100, ">I", 0xFFFFFFFF, "corrupt"),
    ("backing file's name outside", 8, ">Q", CLUSTER, "corrupt"),
    ("backing file's name too long", 16, ">I", 1024, "corrupt"),
    ("backing file's name empty", 16, ">I", 0, "corrupt"),
]


@pytest.mark.parametrize(
    ("offset", "form", "value", "said"), [row[1:] for row in HEADER_FIELDS], ids=[row[0] for row in HEADER_FIELDS]
)
def test_a_wrong_header_field_is_refused(image: Image, offset: int, form: str, value: int, said: str) -> None:
    assert said in image.put(offset, form, value).refusal()


def test_the_other_layout_is_refused_with_the_command_that_makes_ours(image: Image) -> None:
    text = image.put(20, ">I", 16).refusal()
    assert "qemu-img create -f qcow2 -o extended_l2=on,cluster_size=128k,preallocation=metadata,data_file=" in text


def test_a_header_that_promises_tables_beyond_the_file_costs_no_memory_for_them(image: Image) -> None:
    """2^32 - 1 L1 entries are 32 GiB; the file has not a megabyte."""
    image.put(24, ">Q", 0xFFFFFFFF << 30).put(36, ">I", 0xFFFFFFFF)
    assert "truncated" in image.refusal()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (0, "layout"),
        (1 << 63, "layout"),
        (1 << 63 | 1 << 50, "corrupt"),
        (CLUSTER, "corrupt"),
        (1 << 63 | CLUSTER + 512, "corrupt"),
        ((1 << 64) - 1, "corrupt"),
        (1 << 62 | 1 << 63 | CLUSTER, "corrupt"),
    ],
    ids=lambda value: hex(value) if isinstance(value, int) else value,
)
def test_a_wrong_l1_entry_is_refused(image: Image, entry: int, said: str) -> None:
    assert said in image.put(image.l1, ">Q", entry).refusal()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (0, "layout"),
        (1 << 63, "cluster 3"),
        (3 * CLUSTER, "cluster 3"),
        (1 << 63 | 4 * CLUSTER, "cluster 3"),
        (1 << 63 | 3 * CLUSTER | 1, "cluster 3"),
        (1 << 62 | 3 * CLUSTER, "cluster 3"),
        ((1 << 64) - 1, "cluster 3"),
    ],
    ids=lambda value: hex(value) if isinstance(value, int) else value,
)
def test_a_wrong_l2_entry_is_refused(image: Image, entry: int, said: str) -> None:
    assert said in image.put(image.l2 + 3 * 16, ">Q", entry).refusal()


@pytest.mark.parametrize("block", [0, 13, 31])
def test_a_block_that_is_both_data_and_zero_is_refused(image: Image, block: int) -> None:
    text = image.put(image.l2 + 4 * 16 + 8, ">II", 1 << block, 1 << block).refusal()
    assert "cluster 4" in text
    assert "both data and zero" in text


def extension(image: Image, kind: int) -> int:
    """Offset of a header extension."""
    offset = image.get(100, ">I")
    while True:
        found, length = struct.unpack_from(">II", image.content, offset)
        assert found, "the extension is there"
        if found == kind:
            return offset
        offset += 8 + -(-length // 8) * 8


DATA_FILE = 0x44415441


def test_an_image_that_names_no_data_file_is_refused(image: Image) -> None:
    assert "data file" in image.put(extension(image, DATA_FILE), ">I", 0x12345678).refusal()


@pytest.mark.parametrize("length", [0, 1024, 0xFFFFFFFF])
def test_a_data_files_name_of_impossible_length_is_refused(image: Image, length: int) -> None:
    assert "corrupt" in image.put(extension(image, DATA_FILE) + 4, ">I", length).refusal()


@pytest.mark.parametrize("byte", [0, 0xFF], ids=hex)
def test_a_data_files_name_that_is_no_text_is_refused(image: Image, byte: int) -> None:
    image.put(extension(image, DATA_FILE) + 9, ">B", byte).refusal()


@pytest.mark.parametrize("byte", [0, 0xFF], ids=hex)
def test_a_backing_files_name_that_is_no_text_is_refused(image: Image, byte: int) -> None:
    image.put(image.get(8) + 1, ">B", byte).refusal()


def test_a_data_file_that_is_the_image_itself_is_refused(image: Image) -> None:
    at = extension(image, DATA_FILE)
    image.put(at + 4, ">I", 7)
    image.content[at + 8 : at + 16] = b"x.qcow2\0"
    assert "lock" in image.refusal()


# -- the wrong kind of file ------------------------------------------------------------------------------------


def test_a_folder_a_pipe_and_a_missing_image_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe", "none"):
        with pytest.raises(ConfigError, match=r"active disk|not a regular file"):
            Overlay("active", "disk0", str(tmp_path / name))


def test_an_image_in_use_is_refused_in_qemus_words(image: Image) -> None:
    first = image.open()
    try:
        with pytest.raises(ConfigError, match=r'Failed to get (shared )?"write" lock') as caught:
            Overlay("hidden", "disk0", str(image.path))
        assert str(image.path) in str(caught.value)
    finally:
        first.close()
    Overlay("hidden", "disk0", str(image.path)).close()


# -- any image -------------------------------------------------------------------------------------------------


@contextmanager
def folder() -> Iterator[Path]:
    """Not tmp_path: each example of Hypothesis needs its own."""
    with tempfile.TemporaryDirectory(prefix="q-") as path:
        yield Path(path)


def interesting_offsets() -> st.SearchStrategy[int]:
    """Bytes that mean something: header and names, L1, the used part of L2 and a little of the rest."""
    image = pristine()
    l1 = struct.unpack_from(">Q", image, 40)[0]
    l2 = struct.unpack_from(">Q", image, l1)[0] & ~(1 << 63)
    return (
        st.integers(0, 700) | st.integers(l1, l1 + 16) | st.integers(l2, l2 + 6 * 16) | st.integers(0, len(image) - 1)
    )


@settings(max_examples=400)
@given(data=st.data())
def test_any_mutation_is_refused_or_opened_but_never_written(data: st.DataObject) -> None:
    changes = data.draw(st.lists(st.tuples(interesting_offsets(), st.integers(0, 255)), min_size=1, max_size=8))
    length = data.draw(st.none() | st.integers(0, len(pristine())))
    with folder() as here:
        image = Image(here)
        for offset, value in changes:
            image.content[offset] = value
        if length is not None:
            del image.content[length:]
        try:
            overlay = image.open()  # checks that nothing was written
        except ConfigError:
            return
        try:
            # What was accepted can be used: every block has a state, and can be let go.
            assert all(state in Held for _, _, state in overlay.held(0, overlay.blocks))
            overlay.empty()
            assert list(overlay.held(0, overlay.blocks)) == [(0, overlay.blocks, Held.NOTHING)]
        finally:
            overlay.close()
