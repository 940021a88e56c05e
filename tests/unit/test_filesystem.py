# SPDX-License-Identifier: BSD-3-Clause
"""What is said of a disk that a guest has used: that of a sound one, and what is wrong with another."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from content import MIB, make_raw
from filesystem import inspect
from records import BadRecords, Record, following
from waiting import DEADLINE_S

FIRST = following(None, 1)
RECORDS = [FIRST, following(FIRST, 1)]


def debugfs(image: Path, request: str) -> None:
    subprocess.run(["debugfs", "-w", "-R", request, image], capture_output=True, timeout=DEADLINE_S, check=True)


def disk(folder: Path, content: bytes) -> Path:
    """An ext4 file system with the file `records`."""
    image = make_raw(folder / "disk.raw", 8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", image], timeout=DEADLINE_S, check=True)
    source = folder / "source"
    source.write_bytes(content)
    debugfs(image, f"write {source} records")
    source.unlink()
    return image


def encoded(records: list[Record]) -> bytes:
    return b"".join(record.encoded() for record in records)


@pytest.mark.parametrize("unmounted", [True, False])
def test_the_records_of_a_sound_disk_are_returned_and_nothing_is_left_behind(tmp_path: Path, unmounted: bool) -> None:
    image = disk(tmp_path, encoded(RECORDS))
    before = image.read_bytes()
    assert inspect(image, unmounted=unmounted) == RECORDS
    assert list(tmp_path.iterdir()) == [image]
    assert image.read_bytes() == before


def test_no_record_is_a_history_too(tmp_path: Path) -> None:
    assert inspect(disk(tmp_path, b"")) == []


@pytest.mark.parametrize("unmounted", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        "set_inode_field /records links_count 5",
        "set_inode_field /records blocks 999",
        "setb 1500 3",
        "set_bg 0 free_blocks_count 3",
    ],
    ids=["link count", "blocks", "bitmap", "count of a group"],
)
def test_a_damaged_file_system_is_found_out(tmp_path: Path, damage: str, unmounted: bool) -> None:
    image = disk(tmp_path, encoded(RECORDS))
    debugfs(image, damage)
    with pytest.raises(AssertionError, match="not clean"):
        inspect(image, unmounted=unmounted)
    assert list(tmp_path.iterdir()) == [image]


def test_free_blocks_that_the_superblock_has_not_counted_yet_are_no_damage(tmp_path: Path) -> None:
    """As in every ext4 that was in use: the next mount sums them up."""
    image = disk(tmp_path, encoded(RECORDS))
    debugfs(image, "set_super_value free_blocks_count 17")
    assert inspect(image) == RECORDS
    with pytest.raises(AssertionError, match="not clean"):
        inspect(image, unmounted=True)


def test_a_disk_that_was_not_unmounted_is_found_out(tmp_path: Path) -> None:
    image = disk(tmp_path, encoded(RECORDS))
    debugfs(image, "feature needs_recovery")
    with pytest.raises(AssertionError, match="skipping journal recovery"):
        inspect(image, unmounted=True)
    assert inspect(image) == RECORDS


def test_a_torn_record_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(BadRecords, match="record 2 is torn"):
        inspect(disk(tmp_path, encoded(RECORDS)[:-10]))


def test_a_missing_file_is_found_out(tmp_path: Path) -> None:
    image = disk(tmp_path, b"")
    debugfs(image, "rm records")
    with pytest.raises(AssertionError, match=r"no file of records|not clean"):
        inspect(image)
