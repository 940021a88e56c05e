# SPDX-License-Identifier: BSD-3-Clause
"""twin.py: a document that is overwritten in place is the old or the new one wherever a write is cut off or fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mounts import SmallFolder
from replication.disk import files
from replication.record.twin import ROOM_MIN, TwinFile

OLD: dict[str, Any] = {"stage": "running", "disks": {"disk0": 4096}, "said": "ä"}
NEW: dict[str, Any] = {"stage": "failover", "disks": {"disk0": 4096, "disk1": 8192}, "said": None}
SECTOR = 512


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TwinFile]:
    """The file as a process that is started now has it."""
    twin = TwinFile(str(path))
    try:
        twin.read()
        twin.reserve({"stage": "none"})
        yield twin
    finally:
        twin.close()


def found(path: Path) -> dict[str, Any] | None:
    """What a process that is started now finds."""
    twin = TwinFile(str(path))
    try:
        return twin.read()
    finally:
        twin.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


def twin_of(path: Path) -> Path:
    return path.with_name(path.name + ".twin")


def test_what_was_written_is_read_and_stays_one_json_document_of_one_size(path: Path) -> None:
    with opened(path) as file:
        assert found(path) is None
        assert json.loads(path.read_text())["stage"] == "none"
        inodes = {item: item.stat().st_ino for item in (path, twin_of(path))}
        for count, members in enumerate((OLD, NEW, OLD), 1):
            file.write(members)
            assert found(path) == members
            shown = json.loads(path.read_text())
            assert {**members, "serial": count, "checksum": shown["checksum"]} == shown
            assert path.read_bytes() == twin_of(path).read_bytes(), "at rest both have it"
            assert len(path.read_bytes()) == ROOM_MIN
        assert {item: item.stat().st_ino for item in inodes} == inodes
    assert found(path) == OLD
    assert re.search(r'^ "stage": "running",$', path.read_text(), re.MULTILINE), "as people grep for it"


def test_without_the_file_the_twin_counts_for_nothing(path: Path) -> None:
    """It was moved away to start anew."""
    with opened(path) as file:
        file.write(OLD)
    path.unlink()
    assert found(path) is None
    with opened(path):
        assert found(path) is None
    with opened(path) as file:
        file.write(NEW)
    assert found(path) == NEW


def test_the_room_is_written_not_only_promised(path: Path) -> None:
    with opened(path):
        for item in (path, twin_of(path)):
            assert item.stat().st_size == ROOM_MIN <= 512 * item.stat().st_blocks


def test_a_full_file_system_takes_every_write(small_folder: Callable[[int], SmallFolder]) -> None:
    small = small_folder(1 << 20)
    path = small.folder / "state.json"
    with opened(path) as file:
        small.fill()
        with pytest.raises(OSError, match="No space"):
            (small.folder / "x").write_bytes(bytes(1 << 16))
        for members in (OLD, NEW, OLD):
            file.write(members)
            assert found(path) == members
    with opened(path) as file:
        file.write(NEW)
    assert found(path) == NEW


# -- a power cut, or a kill, at any point ------------------------------------------------------------------------


class Storage:
    """What the two files may hold after a cut: for each sector what was written since the last sync, or before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, paths: Sequence[Path]) -> None:
        self.stable = {str(path): path.read_bytes() for path in paths}
        self._written: dict[str, list[bytes]] = {str(path): [] for path in paths}
        self.cuts: list[dict[str, list[bytes]]] = []
        """Before and after each step: what each file holds, the stable content first."""
        self._note()
        monkeypatch.setattr(files, "pwritev", self._pwritev)
        monkeypatch.setattr(files, "fdatasync", self._fdatasync)

    def _note(self) -> None:
        self.cuts.append({path: [content, *self._written[path]] for path, content in self.stable.items()})

    def _pwritev(self, fd: int, buffers: Sequence[bytes], offset: int, flags: int = 0) -> int:
        path, data = os.readlink(f"/proc/self/fd/{fd}"), b"".join(buffers)
        count = os.pwrite(fd, data, offset)
        self._written[path].append(Path(path).read_bytes())
        self._note()
        return count

    def _fdatasync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        self.stable[path] = ([self.stable[path], *self._written[path]])[-1]
        self._written[path].clear()
        self._note()


def torn(versions: list[bytes], draw: random.Random) -> bytes:
    """Sectors of any of the versions."""
    parts = range(0, len(versions[0]), SECTOR)
    style = draw.random()
    if style < 0.4:
        at = draw.choice(parts)
        return versions[-1][:at] + versions[0][at:]
    return b"".join(draw.choice(versions)[at : at + SECTOR] for at in parts)


@pytest.mark.parametrize("long", [False, True], ids=["one sector", "many sectors"])
def test_a_cut_at_any_point_leaves_the_old_document_or_the_new_one_whole(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    draw = random.Random(1)
    documents = [{"number": n, "more": str(draw.random()) * (300 if long else 1)} for n in range(4)]
    after = tmp_path / "after" / "state.json"
    after.parent.mkdir()
    with opened(path) as file:
        file.write(documents[0])
        storage = Storage(monkeypatch, (path, twin_of(path)))
        begun = [0]
        for document in documents[1:]:
            file.write(document)
            begun.append(len(storage.cuts) - 1)
    monkeypatch.undo()
    outcomes = set()
    for cut, contents in enumerate(storage.cuts):
        answered = sum(cut >= tick for tick in begun[1:])
        for _ in range(15):
            for name, versions in contents.items():
                after.with_name(Path(name).name).write_bytes(torn(versions, draw))
            members = found(after)
            assert members is not None, f"cut {cut}"
            assert answered <= members["number"] <= answered + 1, f"cut {cut}"
            outcomes.add((cut, members["number"]))
            with opened(after) as recovered:  # what is found can be written over
                recovered.write({"number": 9})
            assert found(after) == {"number": 9}
    assert any((cut, n) in outcomes and (cut, n + 1) in outcomes for cut, n in outcomes), "some cuts leave either"


def test_a_cut_while_the_files_are_made_leaves_no_document_or_the_one_of_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rooms, the conversion of version 0.1's file and a document that has outgrown its room."""
    real = files.replace

    class Killed(BaseException):
        pass

    def killed(target: str, content: bytes, step: list[int]) -> None:
        step[0] -= 1
        if step[0] < 0:
            raise Killed
        real(target, content)

    for former, following in ((None, None), (OLD, OLD), (OLD, {"long": "x" * 40_000})):
        for steps in range(3):
            for item in path.parent.iterdir():
                item.unlink()
            if former is not None:
                path.write_text(json.dumps(former))
                if following is not former:
                    with opened(path):
                        pass
            with monkeypatch.context() as cut, contextlib.suppress(Killed):
                left = [steps]
                cut.setattr(files, "replace", lambda target, content, left=left: killed(target, content, left))
                with opened(path) as file:
                    if following is not None and following is not former:
                        file.write(following)
            assert found(path) in (former, following if steps == 2 else former)
            with opened(path) as file:
                file.write(NEW)
            assert found(path) == NEW


# -- writes that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
@pytest.mark.parametrize("failing", range(5))
def test_a_write_that_fails_changes_nothing_and_the_next_one_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failing: int
) -> None:
    with opened(path) as file:
        file.write(OLD)
    with opened(path) as file:  # the twin is to be written first
        real, count = getattr(files, call), 0

        def counted(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        monkeypatch.setattr(files, call, counted)
        expected = OLD
        for members in (NEW, {"third": 3}):
            try:
                file.write(members)
            except OSError:
                pass
            else:
                expected = members
            assert found(path) == expected
            assert json.loads(path.read_text())["serial"] >= 1
        assert count > failing
        file.write({"last": True})
        assert found(path) == {"last": True}
        assert path.read_bytes() == twin_of(path).read_bytes()


def test_a_document_that_outgrows_its_room_gets_more_or_nothing_changes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"long": "x" * ROOM_MIN}
    with opened(path) as file:
        file.write(OLD)
        with monkeypatch.context() as full:
            real, made = files.replace, []

            def replace(target: str, content: bytes) -> None:
                made.append(target)
                if target == str(path):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(target, content)

            full.setattr(files, "replace", replace)
            with pytest.raises(OSError, match="No space"):
                file.write(long)
            assert len(made) == 2
            assert found(path) == OLD
            file.write(NEW)
            assert found(path) == NEW
            assert twin_of(path).read_bytes().rstrip() == path.read_bytes().rstrip()
        file.write(long)
        assert found(path) == long
        file.write(OLD)
        assert found(path) == OLD


# -- files that somebody else has written ------------------------------------------------------------------------


def test_a_file_that_a_person_has_edited_counts_as_it_is(path: Path) -> None:
    with opened(path) as file:
        file.write(OLD)
    path.write_text(json.dumps({**json.loads(path.read_text()), "stage": "done"}))
    assert found(path) == {**OLD, "stage": "done"}
    with opened(path) as file:
        file.write(NEW)
    assert found(path) == NEW


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"serial": -1}', b'{"serial": 1e3}'])
def test_what_is_no_document_is_refused_although_the_twin_is_whole(path: Path, content: bytes) -> None:
    with opened(path) as file:
        file.write(OLD)
    path.write_bytes(content)
    with pytest.raises((ValueError, TypeError)):
        found(path)
    assert path.read_bytes() == content


def test_a_file_that_is_cut_off_without_a_twin_is_refused(path: Path) -> None:
    with opened(path) as file:
        file.write(OLD)
    twin_of(path).unlink()
    path.write_bytes(path.read_bytes().replace(b"running", b"runnnig"))
    with pytest.raises(ValueError, match="checksum"):
        found(path)
