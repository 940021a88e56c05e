# SPDX-License-Identifier: BSD-3-Clause
"""What is on a disk: sizes, bytes that look random, raw files, and qemu-img."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import nbd

KIB = 1024
MIB = 1024 * KIB


def pattern(seed: int, length: int) -> bytes:
    """`length` bytes that look random and are the same for the same `seed`; a shorter one is a prefix."""
    return random.Random(seed).randbytes((length + 7) // 8 * 8)[:length]


def changed(content: bytes, *writes: tuple[int, bytes]) -> bytes:
    """`content` with writes (offset, data) in it."""
    result = bytearray(content)
    for offset, data in writes:
        result[offset : offset + len(data)] = data
    return bytes(result)


def whole(handle: nbd.NBD) -> bytes:
    """All that an export shows."""
    return bytes(handle.pread(handle.get_size(), 0))


def make_raw(path: Path, size: int, content: bytes = b"") -> Path:
    """Make a sparse raw file of `size` bytes that begins with `content`."""
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(size)
    return path


def qemu_img(*arguments: str | os.PathLike[str], timeout_s: float = 60.0) -> str:
    """Run qemu-img and return its standard output; raises AssertionError with all it said if it fails."""
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        command = " ".join(os.fspath(argument) for argument in arguments)
        raise AssertionError(f"qemu-img {command}: exit {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout
