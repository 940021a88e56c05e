# SPDX-License-Identifier: BSD-3-Clause
"""file.py: a raw file does what face.Disk promises, whatever the kernel does with parts of a request."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from content import make_raw, pattern
from replication.disk import files
from replication.disk.face import Extent
from replication.disk.file import FileDisk
from replication.errors import ConfigError, DiskError

SIZE = 5 * 65536 + 777


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FileDisk]:
    opened = FileDisk("disk0", str(make_raw(tmp_path / "raw", SIZE)))
    yield opened
    opened.close()


def content(disk: FileDisk, offset: int = 0, length: int | None = None) -> bytes:
    """What the disk reads as."""
    data = bytearray(disk.size - offset if length is None else length)
    disk.read(memoryview(data), offset)
    return bytes(data)


class Histories(RuleBasedStateMachine):
    """Any requests on a file, against a byte array."""

    @initialize()
    def open(self) -> None:
        fd = os.memfd_create("disk")
        os.truncate(fd, SIZE)
        self.disk = FileDisk("disk0", f"/proc/self/fd/{fd}")
        os.close(fd)
        self.model = bytearray(SIZE)
        self.serial = 0

    def teardown(self) -> None:
        self.disk.close()

    ranges = st.tuples(st.integers(0, SIZE), st.integers(0, 140_000)).map(lambda at: (at[0], min(at[1], SIZE - at[0])))

    @rule(where=ranges, cuts=st.lists(st.integers(0, 140_000), max_size=3), fua=st.booleans())
    def write(self, where: tuple[int, int], cuts: list[int], fua: bool) -> None:
        offset, length = where
        self.serial += 1
        data = pattern(self.serial, length)
        edges = [0, *sorted(min(cut, length) for cut in cuts), length]
        self.disk.write([data[a:b] for a, b in itertools.pairwise(edges)], offset, fua)
        self.model[offset : offset + length] = data

    @rule(where=ranges.filter(lambda at: at[1] > 0), may_trim=st.booleans(), fua=st.booleans())
    def zero(self, where: tuple[int, int], may_trim: bool, fua: bool) -> None:
        offset, length = where
        self.disk.zero(offset, length, may_trim, fua)
        self.model[offset : offset + length] = bytes(length)

    @rule(where=ranges.filter(lambda at: at[1] > 0))
    def look(self, where: tuple[int, int]) -> None:
        offset, length = where
        extents = self.disk.extents(offset, length)
        at = offset
        for extent in extents:
            assert extent.offset == at
            assert extent.length > 0
            at += extent.length
            if extent.zero:
                assert not any(self.model[extent.offset : at])
        assert offset < at <= offset + length

    @invariant()
    def reads_as_the_model(self) -> None:
        assert content(self.disk) == self.model
        assert self.disk.size == SIZE


Histories.TestCase.settings = settings(max_examples=40, stateful_step_count=15)
TestHistories = Histories.TestCase


def test_a_short_write_is_continued(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    calls: list[int] = []

    def short(fd: int, pieces: list[Any], offset: int, flags: int = 0) -> int:
        calls.append(flags)
        return real(fd, [bytes(b"".join(pieces))[:7]], offset, flags)

    monkeypatch.setattr(os, "pwritev", short)
    disk.write([b"abcde", b"", bytearray(b"fghijklmn"), memoryview(b"opqrstu")], 100, fua=True)
    monkeypatch.undo()
    assert content(disk, 99, 23) == b"\0abcdefghijklmnopqrstu\0"
    assert calls == [os.RWF_DSYNC] * 3


def test_a_write_that_gets_nowhere_is_no_space(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(DiskError, match="takes no more data at 8") as refusal:
        disk.write([b"x"], 8)
    assert refusal.value.errno == errno.ENOSPC


def test_a_short_read_is_continued(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write([b"abcdefghij"], 0)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:3]], at))
    assert content(disk, 0, 10) == b"abcdefghij"


def test_a_file_truncated_while_in_use_is_an_error_and_not_a_loop(disk: FileDisk) -> None:
    os.truncate(disk.location, 1000)
    with pytest.raises(DiskError, match="ends at 1000: it was truncated while in use"):
        content(disk, 900, 200)


def test_an_error_keeps_its_errno_and_names_the_request(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "x")

    for name in ("pwritev", "preadv", "fdatasync"):
        monkeypatch.setattr(os, name, fails)
    for action, said in (
        (lambda: disk.write([b"abc"], 5), "writing 3 bytes at 5 of"),
        (lambda: content(disk, 6, 4), "reading 4 bytes at 6 of"),
        (disk.flush, "flushing"),
        (lambda: disk.zero(0, 4096, True, fua=True), "zeroing 4096 bytes at 0 of"),
    ):
        with pytest.raises(DiskError, match=f"{said} .*No space left on device") as refusal:
            action()
        assert refusal.value.errno == errno.ENOSPC


def failing(number: int) -> Callable[..., Any]:
    """A system call that fails with this errno."""

    def fails(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fails


def test_a_file_system_without_fallocate_gets_zeroes_written(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write([b"\xaa" * SIZE], 0)
    monkeypatch.setattr(files, "fallocate", failing(errno.EOPNOTSUPP))
    disk.zero(3, SIZE - 5, may_trim=True)
    disk.discard(0, 3)  # nothing to give back there, and no error either
    assert content(disk) == b"\xaa" * 3 + bytes(SIZE - 5) + b"\xaa" * 2


def test_any_other_failure_of_fallocate_is_an_error(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fallocate", failing(errno.ENOSPC))
    for action in (lambda: disk.zero(0, 10, False), lambda: disk.discard(0, 10)):
        with pytest.raises(DiskError) as refusal:
            action()
        assert refusal.value.errno == errno.ENOSPC


def test_an_interrupted_fallocate_is_asked_again(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write([b"\xaa" * 8192], 0)
    real = files.fallocate
    calls: list[int] = []

    def interrupted(fd: int, mode: int, offset: int, length: int) -> None:
        calls.append(mode)
        if len(calls) < 3:
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        real(fd, mode, offset, length)

    monkeypatch.setattr(files, "fallocate", interrupted)
    disk.zero(0, 4096, may_trim=True)
    assert len(calls) == 3
    assert content(disk, 0, 8192) == bytes(4096) + b"\xaa" * 4096


def test_fallocate_itself_says_why_it_failed(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek") as refusal:
            files.fallocate(writing, 0, 0, 4096)
        assert refusal.value.errno == errno.ESPIPE
    finally:
        os.close(reading)
        os.close(writing)


def test_trimmed_space_is_given_back_and_zeroed_space_is_not(disk: FileDisk) -> None:
    disk.write([b"\xaa" * 65536], 0)
    full = os.stat(disk.location).st_blocks
    disk.zero(0, 65536, may_trim=False)
    assert os.stat(disk.location).st_blocks == full
    disk.zero(0, 65536, may_trim=True)
    assert os.stat(disk.location).st_blocks < full


def test_holes_and_data_are_told_apart(disk: FileDisk) -> None:
    disk.write([b"\xaa" * 65536], 65536)
    assert disk.extents(0, SIZE) == [
        Extent(0, 65536, True, True),
        Extent(65536, 65536, False, False),
        Extent(131072, SIZE - 131072, True, True),
    ]
    assert disk.extents(65540, 10) == [Extent(65540, 10, False, False)]


def test_a_file_of_very_many_holes_is_answered_in_parts(tmp_path: Path) -> None:
    size = 1200 * 8192
    disk = FileDisk("disk0", str(make_raw(tmp_path / "holes", size)))
    for at in range(0, size, 8192):
        disk.write([b"x" * 4096], at)
    at, answers = 0, 0
    while at < size:
        part = disk.extents(at, size - at)
        at = part[-1].offset + part[-1].length
        answers += 1
    assert at == size
    assert answers > 1
    disk.close()


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot open .*nothing of disk 'disk0': No such file"):
        FileDisk("disk0", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="Is a directory"):
        FileDisk("disk0", str(tmp_path))
    with pytest.raises(ConfigError, match="neither a file nor a block device"):
        FileDisk("disk0", "/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(ConfigError, match="cannot open"):
            FileDisk("disk0", str(tmp_path / "socket"))


def test_a_refused_or_closed_disk_leaves_no_lock(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "raw", SIZE)
    first = FileDisk("disk0", str(path))
    for _ in range(2):
        with pytest.raises(ConfigError, match="is another process using the image"):
            FileDisk("disk1", str(path))
    assert first.reachable()
    first.close()
    first.close()
    assert not first.reachable()
    FileDisk("disk1", str(path)).close()


def test_a_hole_is_known_without_reading_and_only_up_to_the_next_data(disk: FileDisk) -> None:
    disk.write([b"x" * 4096], 8192)
    assert disk.hole(0, 4096) == 4096
    assert disk.hole(100, 65536) == 8192 - 100
    assert disk.hole(8192, 65536) == 0
    assert disk.hole(12288, SIZE - 12288) == SIZE - 12288, "to the disk's end"


def test_a_hole_costs_one_look_however_long_the_data_is(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    real = os.lseek
    monkeypatch.setattr(os, "lseek", lambda fd, at, whence: looks.append(whence) or real(fd, at, whence))
    disk.write([b"x" * SIZE], 0)
    assert disk.hole(0, SIZE) == 0
    assert looks == [os.SEEK_DATA]


def test_beginning_to_flush_changes_nothing_and_never_fails(disk: FileDisk) -> None:
    disk.write([pattern(3, SIZE)], 0)
    disk.begin_flush(4096, 8192)
    disk.begin_flush(SIZE, 1 << 40)
    assert content(disk) == pattern(3, SIZE)
