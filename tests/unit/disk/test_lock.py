# SPDX-License-Identifier: BSD-3-Clause
"""lock.py: QEMU's own tools and this plugin keep off each other's images, in both directions."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from content import make_raw
from endpoints import QemuNbd
from lab import Lab
from replication.disk.lock import lock_for_writing
from replication.errors import ConfigError

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "image", SIZE, b"x" * 512)


@contextlib.contextmanager
def descriptor(path: Path) -> Iterator[int]:
    """An open file without a lock."""
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """The image, in use as this plugin uses it."""
    with descriptor(path) as fd:
        lock_for_writing(fd, str(path))
        yield


def run(*command: str | Path) -> tuple[bool, str]:
    """Whether a QEMU tool succeeds, and what it says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode == 0, done.stdout + done.stderr


class ForceShare(QemuNbd):
    """qemu-nbd that reads an image whatever others do with it."""

    def command(self) -> list[str]:
        image = f"driver=raw,file.driver=file,file.filename={self.path},force-share=on,read-only=on"
        return ["qemu-nbd", f"--socket={self.socket_path}", "--persistent", "--read-only", "--image-opts", image]


READ = ["qemu-io", "-r", "-c", "read 0 512", "-f"]
INFO = ["qemu-img", "info", "-f"]
WRITE = ["qemu-io", "-c", "write 0 512", "-f"]


@pytest.mark.parametrize(
    ("image_format", "command"),
    [("raw", WRITE), ("qcow2", WRITE), ("qcow2", READ), ("qcow2", INFO)],
    ids=["write raw", "write qcow2", "read qcow2", "info qcow2"],
)
def test_qemus_tools_refuse_an_image_that_the_plugin_uses_and_take_it_afterwards(
    image: Path, image_format: str, command: list[str]
) -> None:
    if image_format == "qcow2":
        assert run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))[0]
    with held(image):
        succeeds, said = run(*command, image_format, image)
        assert not succeeds
        assert 'write" lock' in said
        assert "Is another process using the image" in said
    succeeds, said = run(*command, image_format, image)
    assert succeeds, said


@pytest.mark.parametrize("command", [READ, INFO], ids=["read", "info"])
def test_a_raw_disk_in_use_can_be_read_as_with_qemu_itself(image: Path, command: list[str]) -> None:
    with held(image):
        succeeds, said = run(*command, "raw", image)
        assert succeeds, said


def test_a_reader_that_shares_everything_may_look_at_an_image_in_use(image: Path) -> None:
    with held(image):
        succeeds, said = run("qemu-img", "info", "--force-share", "-f", "raw", image)
        assert succeeds, said


@pytest.mark.parametrize("options", [[], ["--read-only"]], ids=["writer", "reader"])
def test_an_image_that_qemu_nbd_serves_is_refused_and_free_when_it_has_ended(
    lab: Lab, image: Path, options: list[str]
) -> None:
    server = lab.qemu_nbd(image, options=options)
    with descriptor(image) as fd, pytest.raises(ConfigError) as refusal:
        lock_for_writing(fd, str(image))
    said = str(refusal.value)
    assert said.startswith('Failed to get "')
    assert said.endswith(f'" lock: is another process using the image {image}?')
    server.terminate()
    with held(image):
        pass


def test_a_reader_that_shares_everything_does_not_keep_the_plugin_out(lab: Lab, image: Path) -> None:
    lab.start(ForceShare(lab.folder, image))
    with held(image):
        pass


def test_two_users_of_the_plugin_do_not_share_an_image(image: Path) -> None:
    with held(image):
        with descriptor(image) as second, pytest.raises(ConfigError, match="is another process using the image"):
            lock_for_writing(second, str(image))
        # The refused one has let go of what it had claimed, so the first one is alone again.
        assert run("qemu-img", "info", "--force-share", "-f", "raw", image)[0]
    with held(image):
        pass


def test_a_file_that_cannot_be_locked_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "write-only"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(ConfigError, match=r"cannot lock the image .*Bad file descriptor"):
            lock_for_writing(fd, str(path))
    finally:
        os.close(fd)
