# SPDX-License-Identifier: BSD-3-Clause
"""Overlay images with damage in every field: refused in one line, or usable, and never written to.

Beyond test_qcow2.py, which changes single bytes: here whole fields, extensions and table entries get values that mean
something, in images of one L2 table and of two, and qemu-img is asked about what was accepted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from overlays import held_clusters
from replication.errors import ConfigError
from replication.image import qcow2
from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCKS_PER_CLUSTER, CLUSTER, SECTOR, Layout, read_layout

FUZZ = settings(
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

SIZES = [(1 << 20) + SECTOR, (1 << 30) + SECTOR]
"""Of one L2 table and of two; both end with a part of a block and a part of a cluster."""

PEAK_MAX = 64 << 20
"""Bytes that checking an image may take at a time; measured is 20 MiB (64 tables of 128 KiB, a few copies)."""

SECONDS_MAX = 5.0
"""For checking one small image; measured is 2 ms."""


@functools.cache
def pristine(size: int) -> bytes:
    """The image that qcow2.create makes of a disk of `size` bytes, with names relative to its folder."""
    with tempfile.TemporaryDirectory(prefix="q-") as folder:
        os.truncate(_touched(Path(folder) / "disk.raw"), size)
        command = [part.replace(f"{folder}/x.data", "x.data") for part in _command(folder, size)]
        subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=folder)
        return (Path(folder) / "x.qcow2").read_bytes()


def _command(folder: str, size: int) -> list[str]:
    return qcow2.create_command(f"{folder}/x.qcow2", "disk.raw", "raw", size)


def _touched(path: Path) -> Path:
    path.write_bytes(b"")
    return path


# Name: offset and struct code, of docs/interop/qcow2.txt.
FIELDS = {
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
    "header_padding": (105, ">B"),
}
WIDTH = {">B": 8, ">I": 32, ">Q": 64}
EXTENSIONS = [0, 0xE2792ACA, 0x44415441, 0x6803F857, 0x23852875, 0x0537BE77, 0xDEADBEEF]


def words(bits: int, old: int) -> st.SearchStrategy[int]:
    """Values of a field of so many bits: near the old one, near every power of two, or any."""
    limit = (1 << bits) - 1
    powers = st.builds(
        lambda shift, more: max(0, (1 << shift) + more) & limit, st.integers(0, bits), st.integers(-1, 1)
    )
    near = st.sampled_from([1, -1, SECTOR, -SECTOR, CLUSTER, -CLUSTER, 1 << 30]).map(lambda by: (old + by) & limit)
    flipped = st.integers(0, bits - 1).map(lambda bit: old ^ (1 << bit))
    return near | flipped | powers | st.integers(0, limit) | st.just(0)


Damage = Callable[[bytearray], None]


@st.composite
def damages(draw: st.DrawFn, image: bytes) -> Damage:
    """One accident to an image."""

    def put(offset: int, form: str, value: int) -> Damage:
        return lambda content: struct.pack_into(form, content, offset, value) if offset + 8 <= len(content) else None

    def get(offset: int, form: str = ">Q") -> int:
        return int(struct.unpack_from(form, image, offset)[0])

    l1 = get(40)
    l2 = get(l1) & ~(1 << 63)
    match draw(st.sampled_from(["field", "field", "extension", "l1", "l2", "bitmap", "length", "bytes"])):
        case "field":
            offset, form = FIELDS[draw(st.sampled_from(sorted(FIELDS)))]
            return put(offset, form, draw(words(WIDTH[form], get(offset, form))))
        case "extension":
            return _extensions(draw(st.lists(_extension(), max_size=4)), get(100, ">I"))
        case "l1":
            offset = l1 + 8 * draw(st.integers(0, 2))
            return put(offset, ">Q", draw(words(64, get(offset))))
        case "l2":
            offset = l2 + 16 * draw(_entries(image))
            return put(offset, ">Q", draw(words(64, get(offset))))
        case "bitmap":
            offset = l2 + 16 * draw(_entries(image)) + 8
            return put(offset, ">Q", draw(words(64, 0)))
        case "length":
            length = draw(st.integers(0, len(image)) | st.sampled_from([0, 103, 104, 112, len(image) - 1, CLUSTER]))
            more = draw(st.sampled_from([b"", b"\0", b"\xff" * 4096, bytes(CLUSTER)]))

            def resize(content: bytearray) -> None:
                if more:
                    content += more
                else:
                    del content[length:]

            return resize
        case _:
            start = draw(st.sampled_from([0, 72, 104, l1, l2, get(48), CLUSTER]) | st.integers(0, len(image)))
            noise = draw(st.binary(min_size=1, max_size=64))

            def scribble(content: bytearray) -> None:
                content[start : start + len(noise)] = noise

            return scribble


def _entries(image: bytes) -> st.SearchStrategy[int]:
    """Numbers of L2 entries: the first, the last that counts, and those behind the end of the disk."""
    clusters = -(-int(struct.unpack_from(">Q", image, 24)[0]) // CLUSTER)
    per_table = CLUSTER // 16
    last = -(-clusters // per_table) * per_table - 1
    return st.sampled_from([0, 1, clusters - 1, clusters, clusters + 1, last]) | st.integers(0, last)


@st.composite
def _extension(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """A header extension: type, length (that may lie), data."""
    names = [b"x.data", b"raw", b"qcow2", b"no.data", b"/", b"x.data\0", b"\xff\xfe", b"\n", b"n" * 1024, b""]
    data = draw(st.sampled_from(names) | st.binary(max_size=40))
    length = draw(st.just(len(data)) | st.just(len(data)) | words(32, len(data)))
    return draw(st.sampled_from(EXTENSIONS)), length, data


def _extensions(found: list[tuple[int, int, bytes]], offset: int) -> Damage:
    packed = b"".join(
        struct.pack(">II", kind, length) + data + bytes(-len(data) % 8) for kind, length, data in found
    ) + bytes(8)

    def write(content: bytearray) -> None:
        content[offset : offset + len(packed)] = packed

    return write


@st.composite
def mutants(draw: st.DrawFn) -> tuple[int, bytes]:
    """The size of the disk, and its image after one to four accidents."""
    size = draw(st.sampled_from(SIZES))
    content = bytearray(pristine(size))
    for damage in draw(st.lists(damages(pristine(size)), min_size=1, max_size=4)):
        damage(content)
    return size, bytes(content)


@contextlib.contextmanager
def folder_with(size: int, content: bytes) -> Iterator[Path]:
    """A folder with the image, its data file and its backing file."""
    with tempfile.TemporaryDirectory(prefix="q-") as name:
        here = Path(name)
        for file in ("x.data", "disk.raw"):
            os.truncate(_touched(here / file), size)
        path = here / "x.qcow2"
        path.write_bytes(content)
        yield path


def extent_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, length and blocks of every file."""
    return sorted((file.name, file.stat().st_size, file.stat().st_blocks) for file in folder.iterdir())


@contextlib.contextmanager
def unwritten(path: Path) -> Iterator[None]:
    """Nothing is written to the image, and nothing else in its folder comes, goes or grows."""
    before = path.read_bytes(), extent_of(path.parent)
    yield
    assert (path.read_bytes(), extent_of(path.parent)) == before


def checked(path: Path) -> Layout | None:
    """What read_layout says of the image: within bounds, one line, no open file left behind."""
    descriptors = len(os.listdir("/proc/self/fd"))
    layout, refusal = None, None
    tracemalloc.start()
    try:
        begun = time.process_time()
        try:
            layout = read_layout(str(path))
        except ConfigError as error:
            refusal = str(error)
        assert time.process_time() - begun < SECONDS_MAX
        assert tracemalloc.get_traced_memory()[1] < PEAK_MAX
    finally:
        tracemalloc.stop()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    if refusal is not None:
        assert len(refusal.splitlines()) == 1
        assert str(path) in refusal
    return layout


def assert_inside(layout: Layout, content: bytes) -> None:
    """Every word that is used later lies within the file, and is what the layout promises."""
    tables = -(-layout.size // (CLUSTER // 16 * CLUSTER))
    assert layout.size > 0
    assert layout.size % SECTOR == 0
    assert layout.table_offset % CLUSTER == 0
    assert layout.table_offset > 0
    assert layout.table_length == tables * CLUSTER
    assert layout.table_offset + layout.table_length <= len(content)
    for cluster in {0, -(-layout.size // CLUSTER) - 1}:
        offset, bitmap = struct.unpack_from(">QQ", content, layout.table_offset + 16 * cluster)
        assert offset == (1 << 63) | (cluster * CLUSTER)
        assert not bitmap & (bitmap >> 32) & 0xFFFFFFFF
    assert layout.data_path
    assert "\0" not in layout.data_path + (layout.backing or "")


@settings(FUZZ, max_examples=800)
@given(mutant=mutants())
def test_a_damaged_image_is_refused_in_one_line_or_has_all_its_words(mutant: tuple[int, bytes]) -> None:
    size, content = mutant
    with folder_with(size, content) as path, unwritten(path):
        layout = checked(path)
        if layout is not None:
            assert_inside(layout, content)


def opened(path: Path) -> Overlay | None:
    """The overlay, None if it is refused; neither writes anything."""
    overlay, refusal = None, ""
    with unwritten(path):
        try:
            overlay = Overlay("hidden", "disk0", str(path))
        except ConfigError as error:
            refusal = str(error)
    assert len(refusal.splitlines()) <= 1
    return overlay


def let_go_of_all(overlay: Overlay) -> None:
    """Block by block, as a commit does: it ends when nothing is held any more."""
    try:
        assert 0 <= overlay.bytes_held <= -(-overlay.layout.size // CLUSTER) * CLUSTER
        for first, last in held_clusters(overlay):
            assert 0 <= first < last <= overlay.blocks
            overlay.forget(first, last)
        assert held_clusters(overlay) == [], "a commit would never end"
        assert overlay.bytes_held == 0
    finally:
        overlay.close()


@settings(FUZZ, max_examples=400)
@given(mutant=mutants())
def test_a_damaged_image_that_can_be_opened_can_also_be_let_go_of(mutant: tuple[int, bytes]) -> None:
    size, content = mutant
    with folder_with(size, content) as path:
        overlay = opened(path)
        if overlay is not None:
            let_go_of_all(overlay)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", ["last block", "last cluster", "behind the disk", "last entry"])
@pytest.mark.parametrize("shift", [0, 32], ids=["data", "zero"])
def test_a_bit_behind_the_end_of_the_disk_is_refused_or_harmless(size: int, where: str, shift: int) -> None:
    """qemu-img makes no such bit, so the image is corrupt; what must not be is a commit that never ends."""
    content = bytearray(pristine(size))
    l2 = struct.unpack_from(">Q", content, struct.unpack_from(">Q", content, 40)[0])[0] & ~(1 << 63)
    blocks, clusters = -(-size // qcow2.BLOCK), -(-size // CLUSTER)
    entry, bit = {
        "last block": (clusters - 1, (blocks - 1) % BLOCKS_PER_CLUSTER + 1),
        "last cluster": (clusters - 1, BLOCKS_PER_CLUSTER - 1),
        "behind the disk": (clusters, 0),
        "last entry": (-(-clusters // 8192) * 8192 - 1, 5),
    }[where]
    struct.pack_into(">Q", content, l2 + 16 * entry + 8, 1 << (shift + bit))
    with folder_with(size, bytes(content)) as path:
        overlay = opened(path)
        if overlay is not None:
            let_go_of_all(overlay)


@pytest.mark.parametrize("size", SIZES)
def test_an_image_that_qemu_has_zeroed_to_its_end_can_be_let_go_of(size: int) -> None:
    """QEMU takes the last cluster for a whole one, and marks blocks behind the end of the disk as well."""
    with folder_with(size, pristine(size)) as path:
        begin = size // CLUSTER * CLUSTER
        done = asked(path.parent, "qemu-io", "-f", "qcow2", "-c", f"write -z {begin} {size - begin}", path.name)
        assert done.returncode == 0, done
        overlay = opened(path)
        assert overlay is not None
        assert overlay.holds_all(begin // qcow2.BLOCK, overlay.blocks)
        let_go_of_all(overlay)


def asked(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A run of one of QEMU's tools in the image's folder, where the relative names of its files count from."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=folder)


@settings(FUZZ, max_examples=60)
@given(mutant=mutants())
def test_qemu_img_accepts_what_is_accepted_here(mutant: tuple[int, bytes]) -> None:
    size, content = mutant
    assume(content != pristine(size))
    with folder_with(size, content) as path:
        layout = checked(path)
        # What the names mean is the secondary's to check; qemu-img could not even look for another file.
        here = str(path.parent)
        assume(layout is not None and (layout.data_path, layout.backing) == (f"{here}/x.data", f"{here}/disk.raw"))
        info = asked(path.parent, "qemu-img", "info", "-f", "qcow2", "--output=json", path.name)
        assert info.returncode == 0, info.stderr
        check = asked(path.parent, "qemu-img", "check", "-f", "qcow2", "--output=json", path.name)
        # The backing file's format is one more name; nothing here goes by it, so nothing here is harmed.
        assume("Could not open backing file: Unknown driver" not in check.stderr)
        assert check.returncode in (0, 3), (check.stdout, check.stderr)  # 3: leaked clusters, no corruption


@pytest.mark.parametrize("size", SIZES)
def test_qemu_img_accepts_the_pristine_image(size: int) -> None:
    with folder_with(size, pristine(size)) as path, unwritten(path):
        assert checked(path) is not None
        done = asked(path.parent, "qemu-img", "check", "-f", "qcow2", path.name)
        assert done.returncode == 0, done
