# SPDX-License-Identifier: BSD-3-Clause
"""binding.py, grainfile.py: a file of the state folder that does not belong to the others is not believed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from replication.disk import files
from replication.disk.unflushed import GRAIN
from replication.record.binding import Doubts
from replication.record.boot import BOOT_ID_ENVIRONMENT
from replication.record.state import Record, StateError, StateFolder
from replication.stage import Mode, Stage

SIZE = 5 * GRAIN
MAPS = ("a.changes", "a.lost", "a.unflushed")


class Process:
    """What a process does with its state folder."""

    def __init__(self, path: Path, *, bind: bool = True, needed: bool = False) -> None:
        self.state = StateFolder(str(path))
        self.record = self.state.load() or Record(Mode.SECONDARY)
        self.maps = [self.state.open_map("a", kind, SIZE) for kind in ("changes", "lost")]
        self.account = self.state.account_of("a", SIZE)
        self.doubts = self.state.take_doubts()
        self.state.reserve(self.record)
        if bind:
            self.state.bind(self.record, self.save, needed)

    def save(self) -> None:
        self.state.save(self.record)

    @property
    def marked(self) -> list[int]:
        return [changes.marked_bytes for changes in self.maps]

    def end(self) -> None:
        """In good order."""
        self.close_maps()
        self.state.close(good=True)

    def die(self) -> None:
        """Killed, as far as its files can tell."""
        self.state.close()
        for file in self.state._binding._files.values():
            file._seal = file._seal._replace(identity=0)  # nothing is written any more
        self.close_maps()

    def close_maps(self) -> None:
        for changes in self.maps:
            changes.close()
        self.account.close()


def one_that(path: Path, end: Callable[[Process], None] = Process.die, *, saved: bool = True) -> None:
    """A process that has marked something and ended."""
    process = Process(path)
    if saved:
        process.record.stage = Stage.RUNNING
        process.save()
    process.maps[0].mark(0, 1)
    end(process)


def doubts_of(path: Path) -> tuple[Doubts, list[int]]:
    process = Process(path)
    found = process.doubts, process.marked
    process.die()
    return found


ENDS = pytest.mark.parametrize("end", [Process.die, Process.end], ids=["killed", "ended"])


@ENDS
@pytest.mark.parametrize("saved", [False, True])
def test_what_belongs_together_is_believed_process_after_process(
    tmp_path: Path, end: Callable[[Process], None], saved: bool
) -> None:
    path = tmp_path / "s"
    one_that(path, end, saved=saved)
    for _ in range(3):
        process = Process(path)
        assert (process.doubts, process.marked) == (Doubts(None, {}), [GRAIN, 0])
        end(process)


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"\0")


@ENDS
@pytest.mark.parametrize("how", ["missing", "empty", "short", "longer"])
@pytest.mark.parametrize("name", MAPS)
def test_a_map_that_is_not_whole_means_that_everything_may_differ(
    tmp_path: Path, name: str, how: str, end: Callable[[Process], None]
) -> None:
    path = tmp_path / "s"
    one_that(path, end)
    spoil(path / name, how)
    process = Process(path)
    assert list(process.doubts.maps) == [("a", name.partition(".")[2])]
    assert process.doubts.folder is None
    assert process.marked == [SIZE if name == "a.changes" else GRAIN, SIZE if name == "a.lost" else 0]
    process.die()
    assert doubts_of(path)[0] == Doubts(None, {}), "it was taken note of"


@pytest.mark.parametrize("name", [*MAPS, "epoch"])
@pytest.mark.parametrize("how", ["older", "another's"])
def test_a_file_of_an_earlier_process_or_another_folder_is_noticed(tmp_path: Path, name: str, how: str) -> None:
    path, other = tmp_path / "s", tmp_path / "other"
    one_that(path)
    one_that(other)
    aside = tmp_path / "aside"
    shutil.copy((path if how == "older" else other) / name, aside)
    one_that(path)
    shutil.copy(aside, path / name)
    doubts, marked = doubts_of(path)
    if name == "epoch":
        assert doubts.folder is not None
        assert marked == [SIZE, SIZE]
    else:
        assert list(doubts.maps) == [("a", name.partition(".")[2])]
    assert doubts_of(path)[0] == Doubts(None, {})


def test_a_copy_of_a_running_process_is_noticed_once_that_has_ended_in_good_order(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = Process(path)
    shutil.copy(path / "a.lost", tmp_path / "aside")
    process.maps[1].mark(0, 1)
    process.end()
    shutil.copy(tmp_path / "aside", path / "a.lost")
    assert doubts_of(path)[1] == [0, SIZE]


@pytest.mark.parametrize("how", ["missing", "short"])
def test_without_the_epoch_page_nothing_is_believed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "s"
    one_that(path)
    spoil(path / "epoch", how)
    doubts, marked = doubts_of(path)
    assert doubts.folder == "epoch is missing, empty or of another state folder"
    assert marked == [SIZE, SIZE]


def test_an_older_record_is_noticed_also_within_one_process(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = Process(path)
    process.save()
    shutil.copy(path / "state.json", tmp_path / "aside")
    process.record.stage = Stage.RUNNING
    process.save()
    process.die()
    shutil.copy(tmp_path / "aside", path / "state.json")
    doubts, marked = doubts_of(path)
    assert doubts.folder == "state.json is an older copy"
    assert marked == [0, 0], "the maps are what they were; who takes the doubts marks them"


def test_a_record_that_was_saved_and_is_gone_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    one_that(path)
    (path / "state.json").unlink()
    assert doubts_of(path)[0].folder == "state.json is missing"


def test_an_older_page_is_noticed_by_the_record_of_this_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    monkeypatch.setenv(BOOT_ID_ENVIRONMENT, "this")
    process = Process(path)
    process.record.boot = "this"
    process.save()
    shutil.copy(path / "epoch", tmp_path / "aside")
    process.save()
    process.save()
    process.die()
    shutil.copy(tmp_path / "aside", path / "epoch")
    assert doubts_of(path)[0].folder == "epoch is an older copy than state.json"


def former_version(path: Path) -> None:
    """A folder of version 0.2, with something marked."""
    state = StateFolder(str(path))
    record = Record(Mode.SECONDARY, Stage.RUNNING)
    state.load()
    state.reserve(record)
    state.save(record)
    state.close()
    (path / "epoch").write_bytes((5 << 1).to_bytes(8, "little") + bytes(4088))
    (path / "a.changes").write_bytes(b"\0\2\0\0\0")
    (path / "a.lost").write_bytes(bytes(5))


def test_a_folder_of_version_0_2_is_adopted_once(tmp_path: Path) -> None:
    path = tmp_path / "s"
    former_version(path)
    assert doubts_of(path) == (Doubts(None, {}), [GRAIN, 0])
    assert doubts_of(path) == (Doubts(None, {}), [GRAIN, 0])
    (path / "a.changes").write_bytes(bytes(5))
    assert doubts_of(path)[1] == [SIZE, 0], "a file of that version is none of this folder's any more"


def test_a_map_that_is_missing_from_a_folder_of_version_0_2_is_not_taken_for_empty(tmp_path: Path) -> None:
    path = tmp_path / "s"
    former_version(path)
    (path / "a.lost").unlink()
    assert doubts_of(path)[1] == [GRAIN, SIZE]


@pytest.mark.parametrize("after", range(1, 9))
@pytest.mark.parametrize("first", [False, True])
def test_a_binding_that_was_cut_off_costs_nothing(
    tmp_path: Path, after: int, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    former_version(path) if first else one_that(path)

    class Killed(BaseException):
        pass

    syncs = 0
    real = files.fdatasync

    def killed(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs > after:
            raise Killed
        real(fd)

    process = Process(path, bind=False)
    with monkeypatch.context() as patched:
        patched.setattr(files, "fdatasync", killed)
        with contextlib.suppress(Killed):
            process.state.bind(process.record, process.save, needed=True)
    process.die()
    marked = [GRAIN, 0]
    assert doubts_of(path) == (Doubts(None, {}), marked)
    assert doubts_of(path) == (Doubts(None, {}), marked)


def test_what_is_not_believed_is_not_forgotten_by_a_process_that_does_not_get_to_note_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    one_that(path)
    (path / "a.unflushed").unlink()
    for _ in range(2):
        process = Process(path, bind=False)
        assert ("a", "unflushed") in process.doubts.maps
        process.die()
    process = Process(path, bind=False)

    def full() -> None:
        raise StateError("no room")

    with pytest.raises(StateError):
        process.state.bind(process.record, full, needed=False)
    process.die()
    assert ("a", "unflushed") in doubts_of(path)[0].maps


def test_a_map_that_is_opened_later_is_bound_like_the_others(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = Process(path)
    later = process.state.open_map("b", "changes", SIZE)
    later.mark(0, 1)
    later.close()
    process.end()
    (path / "b.changes").unlink()
    process = Process(path, bind=False)
    assert process.state.open_map("b", "changes", SIZE).marked_bytes == SIZE
    process.die()


def test_a_map_that_no_role_had_open_is_made_anew(tmp_path: Path) -> None:
    """What the disk of a former secondary once lacked says nothing of the one that it becomes later."""
    path = tmp_path / "s"
    process = Process(path)
    process.maps[1].mark(0, SIZE)
    process.end()
    state = StateFolder(str(path))
    record = state.load() or Record(Mode.PRIMARY)
    changes = state.open_map("a", "changes", SIZE)
    state.reserve(record)
    state.bind(record, lambda: state.save(record), needed=False)
    changes.close()
    state.close(good=True)
    process = Process(path)
    assert (process.doubts, process.marked) == (Doubts(None, {}), [0, 0])
    process.die()


def test_without_a_folder_a_map_is_kept_while_the_process_lives() -> None:
    state = StateFolder(None)
    changes = state.open_map("a", "changes", SIZE)
    changes.mark(0, 1)
    changes.begin(GRAIN, 1)
    changes.close()
    again = state.open_map("a", "changes", SIZE)
    assert list(again.missing_ranges()) == [(0, 2 * GRAIN)]
    assert state.open_map("a", "lost", SIZE).marked_bytes == 0
    again.close()
    state.close(good=True)
