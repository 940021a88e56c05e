# SPDX-License-Identifier: BSD-3-Clause
"""sizes.py: which size counts of a disk that was grown, and what it may grow to."""

from __future__ import annotations

from pathlib import Path

import pytest

from replication.disk.file import FileDisk
from replication.errors import CommandError, ConfigError
from replication.sizes import SIZE_MAX, served, wanted

KIB = 1024


def test_a_grown_disk_is_served_in_the_size_that_the_folder_knows_and_the_command_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert served("/s", {"a": KIB, "b": KIB}, {"a": 2 * KIB, "b": KIB}) == {"a": KIB, "b": KIB}
    said = capsys.readouterr().err
    assert "the state folder /s is of the disks 'a' of 1024 bytes, 'b' of 1024 bytes, but these are" in said
    assert "`replctl resize` on the primary" in said


@pytest.mark.parametrize("found", [{"a": KIB - 1}, {"b": KIB}, {"a": KIB, "b": KIB}, {}], ids=repr)
def test_other_disks_are_refused(found: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="the state folder /s is of the disks 'a' of 1024 bytes, but these are"):
        served("/s", {"a": KIB}, found)


@pytest.mark.parametrize("known", [{}, {"a": 2 * KIB}], ids=["new folder", "as before"])
def test_what_is_as_it_was_is_served(known: dict[str, int]) -> None:
    assert served(None, known, {"a": 2 * KIB}) == {"a": 2 * KIB}


def test_what_a_disk_may_grow_to(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * KIB))
    disk = FileDisk("a", str(path))
    disks = {"a": (2 * KIB, disk)}
    assert wanted(disks, None, None) == {"a": 4 * KIB}
    assert wanted(disks, "a", 3 * KIB) == {"a": 3 * KIB}
    assert wanted({"a": (SIZE_MAX * 2, _Huge())}, None, None) == {"a": SIZE_MAX * 2}, "a disk is not made smaller"
    assert wanted({"a": (KIB, _Huge())}, None, None) == {"a": SIZE_MAX}, "the other side takes no more"
    for name, size, text in (
        ("x", None, "There is no disk 'x'"),
        ("a", KIB, "can be grown, and not made smaller"),
        ("a", 5 * KIB, f"cannot have {5 * KIB} bytes: {path} has {4 * KIB}, grow it"),
    ):
        with pytest.raises(CommandError, match=text):
            wanted(disks, name, size)
    with pytest.raises(CommandError, match="give 'disk' as well"):
        wanted({**disks, "b": (KIB, disk)}, None, 2 * KIB)
    disk.close()


class _Huge(FileDisk):
    """More than the other side takes."""

    def __init__(self) -> None:
        self.name, self.location = "a", "/there"

    def room(self) -> int:
        return SIZE_MAX * 4
