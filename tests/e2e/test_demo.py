# SPDX-License-Identifier: BSD-3-Clause
"""scripts/demo: it passes, it cleans up, and it would see a wrong result."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from checkout import REPOSITORY
from replication.demo import filesystem
from replication.demo.writing import can_mount
from waiting import wait_until

DEMO = REPOSITORY / "scripts" / "demo"
DEMO_S = 90.0

KEY_LINES = (
    r"ext4 of .* with \d+ real files and folders",
    r"of the pair: checkpoint \d+ took ",
    r"on the secondary when process \d+ was killed",
    r" ok the secondary disk itself is past the checkpoint",
    r" ok reads of 4 KiB during the commit: \d+ answered, median ",
    r" ok writes of 4 KiB during the commit: \d+ answered, median ",
    r" ok all \d+ reads, before, during and after, got the content of the checkpoint",
    r" ok a write to the target face is refused now",
    r" ok e2fsck -fn finds nothing",
    r" ok all \d+ files and folders, .* are as at the checkpoint",
    r" ok and so is every byte of the disk",
    r"everything held",
)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


def _processes_in(folder: Path) -> list[str]:
    """Command lines of all processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        if str(folder) in command:
            found.append(command)
    return found


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short path, because sockets go below it."""
    return tmp_path_factory.mktemp("d")


@pytest.mark.parametrize("writer", ["qemu-img", "mount"])
def test_everything_holds_and_nothing_is_left(folder: Path, writer: str) -> None:
    if writer == "mount" and not can_mount():
        pytest.skip("needs root, FUSE and a loop device")
    done = subprocess.run(
        [DEMO, "--size", "24M", "--writer", writer],
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEMO_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in KEY_LINES:
        assert re.search(line, done.stdout), f"{line!r} is not in:\n{done.stdout}"
    assert "BAD" not in done.stdout
    assert "\x1b" not in done.stdout, "control sequences without a terminal"
    assert done.stderr == ""
    assert list(folder.iterdir()) == []
    assert _processes_in(folder) == []


def test_interrupted_it_cleans_up(folder: Path) -> None:
    process = subprocess.Popen(
        [DEMO, "--size", "512M", "--writer", "qemu-img"],  # large, so that it is still at work when the signal comes
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        said = ""
        while "primary: nbdkit" not in said:
            line = process.stdout.readline()
            assert line, f"it ended with {process.wait(DEMO_S)}: {said}"
            said += line
        assert len(_processes_in(folder)) >= 2, "both nbdkits run"
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=DEMO_S)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert list(folder.iterdir()) == []
    assert wait_until(lambda: not _processes_in(folder), "all processes have ended")


def test_too_small_is_wrong_usage() -> None:
    done = subprocess.run([DEMO, "--size", "1M"], capture_output=True, text=True, timeout=DEMO_S, check=False)
    assert done.returncode == 2
    assert "1M is not between 24M and 16G" in done.stderr


# What compares the trees


def _plant(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"one")
    (folder / "sub" / "b").write_bytes(b"two")
    (folder / "link").symlink_to("a")
    return folder


def _flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def _point_elsewhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("sub/b")


def _become_file(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"one")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda f: (f / "a").unlink(), "a is missing", id="missing"),
        pytest.param(lambda f: (f / "new").write_bytes(b""), "new should not be there", id="extra"),
        pytest.param(lambda f: (f / "sub" / "c").mkdir(), "sub/c should not be there", id="extra folder"),
        pytest.param(lambda f: _flip(f / "sub" / "b"), "sub/b: content ", id="one bit"),
        pytest.param(lambda f: (f / "a").write_bytes(b"on"), "a: size 3 became 2, content ", id="shorter"),
        pytest.param(lambda f: (f / "a").chmod(0o640), "a: mode ", id="mode"),
        pytest.param(lambda f: _point_elsewhere(f / "link"), "link: content a became sub/b", id="target of a link"),
        pytest.param(lambda f: _become_file(f / "link"), "link: kind link became file", id="kind"),
    ],
)
def test_a_changed_tree_is_seen(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    expected = filesystem.read_tree(_plant(tmp_path / "expected"))
    spoiled = _plant(tmp_path / "found")
    assert filesystem.differences(expected, filesystem.read_tree(spoiled)) == []
    spoil(spoiled)
    lines = filesystem.differences(expected, filesystem.read_tree(spoiled))
    assert len(lines) == 1
    assert lines[0].startswith(said)


@pytest.mark.parametrize("offset", [0, 4095, (1 << 20) + 7, (1 << 21) - 1])
def test_one_changed_byte_of_a_disk_is_found(tmp_path: Path, offset: int) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    content = bytearray(1 << 21)
    one.write_bytes(content)
    other.write_bytes(content)
    assert filesystem.first_difference(one, other) is None
    content[offset] = 1
    other.write_bytes(content)
    assert filesystem.first_difference(one, other) == offset


def test_disks_of_different_length_differ(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(8192))
    other.write_bytes(bytes(4096))
    assert filesystem.first_difference(one, other) == 4096


def test_a_file_changed_in_an_image_is_seen(tmp_path: Path) -> None:
    """The whole way: mke2fs, debugfs, the tree read back."""
    files = _plant(tmp_path / "files")
    image = tmp_path / "image"
    image.write_bytes(b"")
    os.truncate(image, 8 << 20)
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", files, image], env=environment, check=True, timeout=60)
    before = filesystem.image_tree(image, tmp_path / "tree")
    assert before["sub/b"].size == 3
    assert filesystem.image_tree(image, tmp_path / "tree") == before
    other = tmp_path / "other"
    other.write_bytes(b"2wo")
    changes = filesystem.Changes(remove=["sub/b"], write=[("sub/b", other)])
    changes.by_debugfs(image, tmp_path / "script")
    lines = filesystem.differences(before, filesystem.image_tree(image, tmp_path / "tree"))
    assert [line.split(":")[0] for line in lines] == ["sub/b"]
