# SPDX-License-Identifier: BSD-3-Clause
"""The model against the plugin: generated histories on a real secondary, and on a real pair.

After the steps of a history the disks, both faces and the images are compared as a whole: the raw secondary disk byte
for byte, the guest face also as stock qemu-img sees it (convert of active -> hidden -> disk, while the plugin runs),
and both overlays by qemu-img check once it has ended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from content import KIB, MIB, make_raw, pattern, qemu_img
from lab import Lab
from model.faces import NbdFaces
from model.histories import History, Rules, check_equal, first_content, histories, replay
from model.model import Face, Model
from model.nbdkit_secondary import NbdkitSecondary
from nodes import Pair, disk_name, drained

EVERYTHING = Rules()


def examples(count: int) -> settings:
    """The same `count` examples in every run."""
    return settings(
        derandomize=True,
        max_examples=count,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def run(history: History, sizes: Sequence[int]) -> None:
    """Replay on a fresh secondary, then compare everything that is left behind."""
    note("\n".join(map(repr, history)))
    contents = [first_content(size, seed) for seed, size in enumerate(sizes)]
    model = Model(contents)
    with Lab() as lab:
        secondary = NbdkitSecondary(lab, contents)
        replay(history, model, secondary)
        secondary.settle()
        assert secondary.server.status()["stage"] == model.stage
        for index in range(len(sizes)):
            check_disk(lab, model, secondary, index)
        secondary.server.terminate()
        for index, path in enumerate(secondary.server.disks):
            check_equal(bytes(model.disks[index].disk), path.read_bytes(), f"disk {index} after the end")
            for kind in ("active", "hidden"):
                qemu_img("check", "-q", "-f", "qcow2", secondary.server.overlay(kind, index))


def check_disk(lab: Lab, model: Model, secondary: NbdkitSecondary, index: int) -> None:
    """Compare one disk of a running secondary with the model: file, faces and image stack."""
    size = len(model.disks[index].disk)
    check_equal(bytes(model.disks[index].disk), secondary.server.disks[index].read_bytes(), f"disk {index}")
    if model.stage != "done":
        target = secondary.read(Face.TARGET, index, 0, size)
        check_equal(model.read(Face.TARGET, index, 0, size), target, f"target face {index}")
    if model.stage == "none":
        return
    guest = model.read(Face.GUEST, index, 0, size)
    check_equal(guest, secondary.read(Face.GUEST, index, 0, size), f"guest face {index}")
    active = secondary.server.overlay("active", index)
    check_stack(lab.folder, active, guest, f"image stack {index}")


def check_stack(folder: Path, active: Path, guest: bytes, what: str) -> None:
    """qemu-img's view of a stack in use: convert must give `guest`, compare find it identical, map cover it."""
    converted, expected = folder / "converted.raw", folder / "expected.raw"
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", active, converted)
    # qcow2 counts in sectors: the image may be up to 511 bytes longer than the disk.
    check_equal(guest, converted.read_bytes()[: len(guest)], f"{what} by qemu-img convert")
    make_raw(expected, -(-len(guest) // 512) * 512, guest)
    qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", active, expected)
    ranges = json.loads(qemu_img("map", "-U", "--output=json", "-f", "qcow2", active))
    covered = 0
    for each in ranges:
        assert each["start"] == covered, f"{what}: qemu-img map has a gap: {ranges}"
        covered += each["length"]
        if each["zero"]:
            part = guest[each["start"] : covered]
            assert part == bytes(len(part)), f"{what}: qemu-img map says zero where the guest has data: {each}"
    assert covered >= len(guest), f"{what}: qemu-img map ends at {covered}"


SIZES = [
    pytest.param((MIB,), id="1MiB"),
    pytest.param((MIB + 4608,), id="1MiB+4608"),
    pytest.param((300 * KIB + 77,), id="300KiB+77"),
    pytest.param((MIB + 4608, 300 * KIB), id="two"),
]


@pytest.mark.timeout(400)  # a minute on an idle machine
@pytest.mark.parametrize("sizes", SIZES)
def test_secondary(sizes: tuple[int, ...]) -> None:
    @examples(60)
    @given(history=histories(sizes, EVERYTHING))
    def every_history(history: History) -> None:
        run(history, sizes)

    every_history()


# --- the pair ----------------------------------------------------------------------------------------------------


class PrimaryGuest(NbdFaces):
    """The primary's guest: requests to the primary's exports, in the place of the secondary's target face."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair.primary.connect)


@pytest.mark.timeout(400)  # half a minute on an idle machine
@pytest.mark.parametrize("protocol", ["async", "sync"])
@pytest.mark.parametrize("sizes", [pytest.param((MIB + 4608,), id="one"), pytest.param((MIB, 300 * KIB), id="two")])
def test_pair(protocol: str, sizes: tuple[int, ...]) -> None:
    """Guest writes on the primary reach the secondary by themselves, and its guest by the checkpoint of the pair, not
    before."""

    @examples(20)
    @given(rounds=st.lists(st.lists(write_steps(sizes), min_size=1, max_size=12), min_size=1, max_size=4))
    def every_history(rounds: list[list[tuple[str, int, int, int, int]]]) -> None:
        run_pair(protocol, sizes, rounds)

    every_history()


def write_steps(sizes: Sequence[int]) -> st.SearchStrategy[tuple[str, int, int, int, int]]:
    """(kind, disk, offset, length, seed) of one change, cut to the size of its disk."""

    def build(kind: str, disk: int, place: float, length: int, seed: int) -> tuple[str, int, int, int, int]:
        offset = min(int(place * sizes[disk]), sizes[disk] - 1)
        return kind, disk, offset, min(length, sizes[disk] - offset), seed

    return st.builds(
        build,
        st.sampled_from(("write", "write", "zero", "trim", "flush")),
        st.integers(0, len(sizes) - 1),
        st.sampled_from((0.0, 0.001, 0.01, 0.5, 0.9, 0.999)) | st.floats(0, 1),
        st.sampled_from((1, 512, 4096, 5000, 64 * KIB, 140 * KIB)) | st.integers(1, 10_000),
        st.integers(1, 1 << 16),
    )


def run_pair(protocol: str, sizes: Sequence[int], rounds: list[list[tuple[str, int, int, int, int]]]) -> None:
    """After each round of changes: equal disks, checkpoint, and the secondary's guest face at the new one."""
    note("\n".join(map(repr, rounds)))
    contents = [first_content(size, seed) for seed, size in enumerate(sizes)]
    expected = [bytearray(content) for content in contents]
    with Lab() as lab:
        pair = lab.pair(sizes, contents=contents, primary_arguments=[f"protocol={protocol}"])
        pair.start_replication()
        guest = PrimaryGuest(pair)
        faces = NbdFaces(pair.secondary.connect)
        for steps in rounds:
            before = [bytes(content) for content in expected]
            for kind, disk, offset, length, seed in steps:
                if kind == "flush":
                    guest.flush(Face.TARGET, disk)
                    continue
                data = pattern(seed, length) if kind == "write" else bytes(length)
                expected[disk][offset : offset + length] = data
                if kind == "write":
                    guest.write(Face.TARGET, disk, offset, data)
                elif kind == "zero":
                    guest.zero(Face.TARGET, disk, offset, length)
                else:
                    guest.trim(Face.TARGET, disk, offset, length)
                if protocol == "sync":
                    actual = pair.secondary.disks[disk].read_bytes()
                    check_equal(bytes(expected[disk]), actual, f"secondary's {disk_name(disk)} after a sync write")
            drained(pair.primary)
            for disk, size in enumerate(sizes):
                arrived = pair.secondary.disks[disk].read_bytes()
                check_equal(bytes(expected[disk]), arrived, f"secondary's {disk_name(disk)} before the checkpoint")
                shown = faces.read(Face.GUEST, disk, 0, size)
                check_equal(before[disk], shown, f"secondary's guest face {disk} before the checkpoint")
            pair.primary.checkpoint()
            for disk, size in enumerate(sizes):
                want = bytes(expected[disk])
                check_equal(want, pair.primary.disks[disk].read_bytes(), f"primary's {disk_name(disk)}")
                check_equal(want, guest.read(Face.TARGET, disk, 0, size), f"primary's guest, disk {disk}")
                check_equal(want, pair.secondary.disks[disk].read_bytes(), f"secondary's {disk_name(disk)}")
                check_equal(want, faces.read(Face.GUEST, disk, 0, size), f"secondary's guest face {disk}")
        assert pair.primary.execute("query-xen-replication-status") == {"error": False}
