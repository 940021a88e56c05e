# SPDX-License-Identifier: BSD-3-Clause
"""What the test guest is made of: the parts that need no network."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

import guestimages
from guestimages import GuestError, dynamic, kernel_package, module_content, newc

ENTRIES = [
    ("bin", 0o040755, b""),
    ("bin/tool", 0o100755, b"#!tool\n"),
    ("bin/sh", 0o120777, b"tool"),
    ("dev/console", 0o020600, b""),
]


def parsed(archive: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """Path, mode, content and device numbers of each entry, as Linux' buffer-format.rst describes them."""
    found, at = [], 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        mode, size, name_length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_length]
        assert name.endswith(b"\0")
        begin = at + (110 + name_length + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert begin == len(archive)
            return found
        found.append((name[:-1].decode(), mode, archive[begin : begin + size], (fields[9], fields[10])))
        at = begin + (size + 3) // 4 * 4


def test_an_initramfs_holds_its_entries_in_order() -> None:
    assert parsed(newc(ENTRIES)) == [
        (path, mode, content, (5, 1) if path == "dev/console" else (0, 0)) for path, mode, content in ENTRIES
    ]


def test_an_initramfs_depends_on_nothing_but_its_entries() -> None:
    assert newc(ENTRIES) == newc(list(ENTRIES))
    assert newc(ENTRIES) != newc(ENTRIES[:-1])


def test_a_program_brings_its_libraries_along() -> None:
    entries = dynamic("bin/sh", Path("/bin/sh"))
    assert entries[-1] == ("bin/sh", 0o100755, Path("/bin/sh").read_bytes())
    libraries = [path for path, mode, _ in entries[:-1] if mode == 0o100755]
    assert any("libc.so" in path for path in libraries)
    folders = [path for path, mode, _ in entries if mode == 0o040755]
    assert all(str(Path(path).parent) in folders for path in libraries)


def apt_says(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(guestimages, "run", lambda *command: text)


def test_the_newest_kernel_is_what_the_meta_package_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    apt_says(monkeypatch, "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n")
    assert kernel_package(["linux-image-6.1.0-99-cloud-amd64"]) == "linux-image-6.1.0-56-cloud-amd64"


def test_without_apts_lists_the_newest_kernel_in_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    apt_says(monkeypatch, "")
    cached = [f"linux-image-6.1.0-{number}-cloud-amd64" for number in (9, 56, 41)]
    assert kernel_package(cached) == "linux-image-6.1.0-56-cloud-amd64"


def test_without_both_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    apt_says(monkeypatch, "")
    with pytest.raises(GuestError, match="apt-get update"):
        kernel_package([])


def test_a_failing_tool_is_told_with_what_it_said() -> None:
    with pytest.raises(GuestError, match=r"debugfs .*/nothing: exit 1: .*No such file"):
        guestimages.run("sh", "-c", "echo No such file >&2; exit 1", "debugfs", "/nothing")
    with pytest.raises(GuestError, match="scripts/setup vm"):
        guestimages.run("/no/such/tool")


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with guestimages._building(tmp_path / "made") as partial:
            (partial / "file").touch()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with guestimages._building(tmp_path / "made") as partial:
        (partial / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made/file").exists()


@pytest.mark.parametrize(("place", "suffix"), [("lib", ".ko"), ("usr/lib", ".ko.xz")], ids=["12", "13"])
def test_a_module_is_found_in_the_package_of_each_debian(tmp_path: Path, place: str, suffix: str) -> None:
    drivers = tmp_path / place / "modules/6.1.0/kernel/drivers"
    drivers.mkdir(parents=True)
    for name in ("virtio", "virtio_blk"):
        content = f"ELF {name}".encode()
        (drivers / f"{name}{suffix}").write_bytes(lzma.compress(content) if suffix == ".ko.xz" else content)
    (tmp_path / place / "modules/6.1.0/modules.builtin").write_text("kernel/drivers/virtio_ring.ko\n")
    assert module_content(tmp_path, "virtio") == b"ELF virtio"
    assert module_content(tmp_path, "virtio_ring") is None
    with pytest.raises(ValueError, match="not enough values"):
        module_content(tmp_path, "virtio_pci")
