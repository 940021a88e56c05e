# SPDX-License-Identifier: BSD-3-Clause
"""The maps and the record of a disk that grows: what a process finds that follows one that was killed at any moment."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from replication.disk import files
from replication.disk.mapped import MappedFile
from replication.disk.unflushed import GRAIN, Unflushed
from replication.errors import CommandError, ConfigError, DiskError
from replication.order.urgency import Urgency
from replication.record.changes import CLEAN, MISSING, ChangeMap
from replication.record.grainfile import DISTRUSTED, GROWN
from replication.record.growing import Growing, Making
from replication.record.state import Record, StateError, StateFolder
from replication.stage import Mode, Stage
from waiting import DEADLINE_S, begin, wait_until

SIZE, LARGER = 10 * GRAIN + 512, 40 * GRAIN
END = (SIZE // GRAIN) * GRAIN
"""Where the grain begins in which the former end is."""


class Process:
    """A process with one disk, whose folder is that of a former one."""

    def __init__(self, folder: Path | None) -> None:
        self.state = StateFolder(None if folder is None else str(folder))
        self.record = self.state.load() or Record(Mode.SECONDARY, Stage.RUNNING, disks={"a": SIZE})
        size = self.record.disks["a"]
        self.changes: ChangeMap = self.state.open_map("a", "changes", size)
        self.lost: ChangeMap = self.state.open_map("a", "lost", size)
        self.account: Unflushed = self.state.account_of("a", size)
        self.doubts = self.state.take_doubts()
        self.state.bind(self.record, self.save, needed=True)
        self.growing = Growing(self.state, self.record, self.save)

    def save(self) -> None:
        self.state.save(self.record)

    def prepare(self) -> None:
        self.growing.prepare("a", "changes", LARGER, self.changes, MISSING)
        self.growing.prepare("a", "lost", LARGER, self.lost, CLEAN)
        self.growing.prepare("a", "unflushed", LARGER, self.account, 0)

    def enter(self) -> None:
        self.growing.enter({"a": LARGER})

    def finish(self) -> None:
        self.growing.finish()

    def marked(self, kind: ChangeMap | None = None) -> list[tuple[int, int]]:
        return [(int(offset), int(length)) for offset, length in (kind or self.changes).ranges_marked(0, 99)[0]]

    def close(self, good: bool = True) -> None:
        self.changes.close()
        self.lost.close()
        self.account.close()
        self.state.close(good)


STEPS: list[Callable[[Process], None]] = [lambda process: None, Process.prepare, Process.enter, Process.finish]


@pytest.mark.parametrize("done", [1, 2, 3, 4], ids=["before", "prepared", "entered", "finished"])
def test_what_was_marked_by_whoever_and_whenever_is_found_after_a_kill(tmp_path: Path, done: int) -> None:
    process = Process(tmp_path / "state")
    for number, step in enumerate(STEPS[:done]):
        step(process)
        # As a thread that looks at the disks, which passes no gate.
        process.changes.mark(2 * number * GRAIN, 1)
        process.lost.mark(2 * number * GRAIN, 1)
        process.account.end(process.account.begin(2 * number * GRAIN, 1))
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    process.close()
    follower = Process(tmp_path / "killed")
    assert follower.doubts == (None, {}, False)
    assert follower.record.disks == {"a": LARGER if done > 2 else SIZE}
    assert follower.record.former_disks == ({"a": SIZE} if done > 2 else {})
    marked = [(2 * number * GRAIN, GRAIN) for number in range(done)]
    # From `prepare` on the rest of the last grain is new, for whoever is killed then.
    new = [[], [], [(END, SIZE - END)], [(END, LARGER - END)], [(END, LARGER - END)]][done]
    assert follower.marked() == [*marked, *new]
    assert follower.marked(follower.lost) == marked
    lost: list[tuple[int, int]] = []
    follower.account.on_loss = lambda loss: bool(lost.extend(loss.ranges))
    follower.account.lose(DiskError("x"))
    assert lost == marked
    assert not list((tmp_path / "killed").glob(f"*{GROWN}"))
    follower.close()


def test_the_maps_go_on_in_the_larger_files(tmp_path: Path) -> None:
    process = Process(tmp_path / "state")
    process.changes.begin(GRAIN, 1)
    process.prepare()
    process.enter()
    process.finish()
    process.changes.end(GRAIN, 1, True)
    assert process.marked() == [(END, LARGER - END)]
    assert process.changes.size == LARGER
    process.changes.mark(LARGER - 1, 1)
    process.changes.clear()
    process.changes.mark(LARGER - 1, 1)
    process.account.end(process.account.begin(LARGER - 1, 1))
    assert process.account.any
    process.account.flush(lambda: None)
    assert not process.account.any
    process.state.check()
    process.close()
    follower = Process(tmp_path / "state")
    assert follower.doubts == (None, {}, False)
    assert follower.marked() == [(LARGER - GRAIN, GRAIN)]
    follower.close()


def test_without_a_folder_it_is_the_same_but_for_the_files() -> None:
    process = Process(None)
    process.changes.mark(0, 1)
    process.prepare()
    process.enter()
    process.finish()
    assert process.marked() == [(0, GRAIN), (END, LARGER - END)]
    assert process.state.open_map("a", "changes", LARGER).marked_bytes == process.changes.marked_bytes


@pytest.mark.parametrize("private", [False, True], ids=["in place", "copied"])
def test_where_changes_are_written_first_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool) -> None:
    monkeypatch.setattr("replication.disk.mapped.overwrites_in_place", lambda _fd: not private)
    process = Process(tmp_path / "state")
    process.changes.mark(0, 1)
    process.prepare()
    process.changes.mark(2 * GRAIN, 1)
    process.enter()
    process.finish()
    process.changes.mark(4 * GRAIN, 1)
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    process.close()
    follower = Process(tmp_path / "killed")
    assert follower.marked()[:3] == [(0, GRAIN), (2 * GRAIN, GRAIN), (4 * GRAIN, GRAIN)]
    follower.close()


def test_a_record_that_cannot_be_saved_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(tmp_path / "state")
    process.prepare()
    with monkeypatch.context() as patch:
        patch.setattr(process.state, "save", _refuse)
        with pytest.raises(StateError):
            process.enter()
    process.growing.drop()
    process.changes.mark(0, 1)
    assert (process.record.disks, process.record.former_disks) == ({"a": SIZE}, {})
    assert process.changes.size == SIZE
    # The save may be late, and then be found all the same: nothing is missing.
    process.record.disks, process.record.former_disks = {"a": LARGER}, {"a": SIZE}
    process.save()
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    process.close()
    follower = Process(tmp_path / "killed")
    assert follower.doubts == (None, {}, False)
    assert follower.marked() == [(0, GRAIN), (END, LARGER - END)]
    follower.close()


def _refuse(_record: Record) -> None:
    raise StateError("no room")


def test_no_room_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(tmp_path / "state")
    process.prepare()
    process.growing.drop()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", lambda *_arguments: False)
        with pytest.raises(ConfigError, match="No space left"):
            process.prepare()
    process.growing.drop()
    assert not list((tmp_path / "state").glob(f"*{GROWN}"))
    process.prepare()
    process.enter()
    process.finish()
    process.close()


def test_a_larger_file_that_was_not_complete_is_not_taken(tmp_path: Path) -> None:
    process = Process(tmp_path / "state")
    process.changes.mark(0, 1)
    process.prepare()
    grown = tmp_path / "state" / f"a.changes{GROWN}"
    content = grown.read_bytes()
    grown.write_bytes(b"\2" * (len(content) - 32) + bytes(32))  # its seal comes last
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    process.growing.drop()
    process.close()
    follower = Process(tmp_path / "killed")
    assert follower.marked() == [(0, GRAIN)]
    follower.close()


def test_a_view_of_the_former_map_is_no_obstacle(tmp_path: Path) -> None:
    """A scan of another thread looks at a part of it."""
    process = Process(tmp_path / "state")
    process.changes.mark(0, 1)
    scan = process.changes.missing_ranges()
    assert next(iter(scan)) == (0, GRAIN)
    process.prepare()
    process.enter()
    process.finish()
    list(scan)
    process.close()


def test_the_memory_of_a_map_goes_with_the_last_view(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file:
        mapped = MappedFile(file.fileno(), 4096)
    view = memoryview(mapped.map)
    mapped.let_go()
    assert view[0] == 0
    view.release()


def test_a_resync_that_knows_the_former_end_leaves_its_grain_missing(tmp_path: Path) -> None:
    """It has looked where the disk ends before the disk has grown, and sends that part of the grain only after."""
    process = Process(tmp_path / "state")
    process.changes.mark(0, SIZE)
    process.prepare()
    process.enter()
    process.finish()
    process.changes.watch(0, SIZE)
    for offset, length in ((0, END), (END, SIZE - END)):
        process.changes.begin(offset, length, repair=True)
        process.changes.end(offset, length, True)
    assert process.marked() == [(END, LARGER - END)]
    # The same of one that has begun to look before.
    process.changes.watch(END, LARGER - END)
    process.changes.begin(END, LARGER - END, repair=True)
    process.changes.end(END, LARGER - END, True)
    assert process.marked() == []
    process.close()


def test_whoever_is_last_throws_away_what_was_made() -> None:
    making, urgency = Making(), Urgency()
    made, go_on, dropped = threading.Event(), threading.Event(), threading.Event()

    def make() -> None:
        made.set()
        assert go_on.wait(DEADLINE_S)

    failed = begin(making.run, urgency, make, dropped.set)
    assert made.wait(DEADLINE_S)
    with urgency.asking(), pytest.raises(CommandError, match="a failover has come first"):
        failed.result(DEADLINE_S)
    with pytest.raises(CommandError, match="not ready yet"):
        making.run(urgency, make, dropped.set)
    assert not dropped.is_set()
    go_on.set()
    assert dropped.wait(DEADLINE_S)
    wait_until(lambda: not making._at_work, "the thread has ended")
    making.run(urgency, lambda: None, dropped.clear)
    assert dropped.is_set()


def test_what_takes_too_long_is_given_up_and_thrown_away_when_it_has_ended() -> None:
    making, go_on, dropped = Making(), threading.Event(), threading.Event()

    def make() -> None:
        assert go_on.wait(DEADLINE_S)

    with pytest.raises(CommandError, match="no answer within"):
        making.run(Urgency(), make, dropped.set, within_s=0.0)
    assert not dropped.is_set()
    go_on.set()
    assert dropped.wait(DEADLINE_S)


def test_a_map_that_has_had_no_room_meanwhile_is_believed_again_when_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replication.disk.mapped.overwrites_in_place", lambda _fd: False)
    process = Process(tmp_path / "state")
    process.prepare()
    with monkeypatch.context() as patch:
        patch.setattr(MappedFile, "keep", _full)
        process.changes.mark(0, 1)
    assert (tmp_path / "state" / f"a.changes{DISTRUSTED}").exists()
    process.enter()
    process.finish()
    process.changes.settle()
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(f"*{DISTRUSTED}"))
    process.close()
    follower = Process(tmp_path / "killed")
    assert follower.doubts == (None, {}, False)
    assert follower.marked() == [(0, GRAIN), (END, LARGER - END)]
    follower.close()


def test_a_map_that_has_no_room_when_it_grows_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replication.disk.mapped.overwrites_in_place", lambda _fd: False)
    process = Process(tmp_path / "state")
    process.prepare()
    process.changes.mark(0, 1)
    process.enter()
    with monkeypatch.context() as patch:
        patch.setattr(MappedFile, "keep", _full)
        process.finish()
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    # There is room again: the larger map, and not what it was made of, is believed.
    process.changes.settle()
    shutil.copytree(tmp_path / "state", tmp_path / "later")
    process.close()
    follower = Process(tmp_path / "killed")
    assert follower.marked() == [(0, LARGER)], "all of it may differ"
    follower.close()
    follower = Process(tmp_path / "later")
    assert follower.marked() == [(0, GRAIN), (END, LARGER - END)]
    follower.close()


def _full(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
