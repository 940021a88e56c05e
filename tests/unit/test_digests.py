# SPDX-License-Identifier: BSD-3-Clause
"""Where digests are read, and what of: each of the two areas, at its first and last place, and nothing else."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from content import KIB, MIB, make_raw, pattern
from replication import batch
from replication.digests import (
    ASK_MAX,
    DIGEST_BYTES,
    RANGE,
    SPACE,
    Asked,
    digest,
    digest_of,
    digests,
    digests_of_zeroes,
    place_of,
    what_is_asked,
)
from replication.disk.file import FileDisk
from replication.errors import DiskError
from replication.primary.dial import SIZE_MAX

GRAIN = 64 * KIB
SIZE = 3 * MIB + 100
BEHIND = SIZE + batch.SPACE


@pytest.mark.parametrize(
    ("offset", "length", "unit"),
    [
        (0, MIB, RANGE),
        (MIB, 2 * MIB, RANGE),
        (3 * MIB, 100, RANGE),
        (0, SIZE, RANGE),
        (0, GRAIN, GRAIN),
        (3 * MIB - GRAIN, GRAIN + 100, GRAIN),
    ],
)
def test_what_is_read_at_its_place_is_what_was_meant(offset: int, length: int, unit: int) -> None:
    count = -(-length // unit)
    assert what_is_asked(SIZE, place_of(SIZE, offset, unit), count * DIGEST_BYTES) == Asked(offset, length, unit)


@pytest.mark.parametrize(
    ("place", "length"),
    [
        (BEHIND, 0),
        (BEHIND, DIGEST_BYTES - 1),
        (BEHIND + 1, DIGEST_BYTES),
        (BEHIND, 5 * DIGEST_BYTES),
        (BEHIND + 4 * DIGEST_BYTES, DIGEST_BYTES),
        (place_of(SIZE, 0, GRAIN) - DIGEST_BYTES, 2 * DIGEST_BYTES),
        (BEHIND + SPACE - DIGEST_BYTES, DIGEST_BYTES),
    ],
    ids=["nothing", "half", "askew", "beyond", "behind", "both", "last"],
)
def test_what_is_no_digest_of_this_disk_is_refused(place: int, length: int) -> None:
    with pytest.raises(DiskError) as refused:
        what_is_asked(SIZE, place, length)
    assert refused.value.errno == errno.EINVAL


def test_so_much_is_asked_at_once_and_no_more() -> None:
    size = 1 << 40
    count = ASK_MAX // RANGE
    assert what_is_asked(size, place_of(size, MIB, RANGE), count * DIGEST_BYTES).length == ASK_MAX
    with pytest.raises(DiskError):
        what_is_asked(size, place_of(size, MIB, RANGE), (count + 1) * DIGEST_BYTES)


def test_the_largest_disk_has_room_in_both_areas() -> None:
    first, last = place_of(SIZE_MAX, 0, GRAIN), place_of(SIZE_MAX, SIZE_MAX - GRAIN, GRAIN)
    assert place_of(SIZE_MAX, SIZE_MAX - RANGE, RANGE) + DIGEST_BYTES == first
    assert last + DIGEST_BYTES == SIZE_MAX + batch.SPACE + SPACE
    assert what_is_asked(SIZE_MAX, last, DIGEST_BYTES) == Asked(SIZE_MAX - GRAIN, GRAIN, GRAIN)


def test_a_digest_is_sha256_cut_off() -> None:
    """It is what the other side makes as well, whichever version that has."""
    content = pattern(1, 2 * MIB + 5)
    parts = (content[:MIB], content[MIB : 2 * MIB], content[2 * MIB :])
    assert digests(memoryview(content), RANGE) == b"".join(hashlib.sha256(part).digest()[:16] for part in parts)


@pytest.mark.parametrize("length", [RANGE, 3 * RANGE + 100, GRAIN, 100])
def test_zeroes_that_are_known_have_the_digests_of_zeroes(length: int) -> None:
    for unit in (RANGE, GRAIN):
        assert digests_of_zeroes(length, unit) == digests(memoryview(bytes(length)), unit)


def test_a_hole_of_a_disk_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = pattern(1, MIB)
    disk = FileDisk("disk0", str(make_raw(tmp_path / "disk.raw", SIZE, content)))
    assert digest_of(disk, 0, MIB) == digest(content)
    assert digest_of(disk, MIB - GRAIN, 2 * GRAIN) == digest(content[-GRAIN:] + bytes(GRAIN))
    monkeypatch.setattr(FileDisk, "read", None)
    assert digest_of(disk, 2 * MIB, MIB) == digest(bytes(MIB))
    assert digest_of(disk, 3 * MIB, 100) == digest(bytes(100))
    disk.close()
