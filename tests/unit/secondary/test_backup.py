# SPDX-License-Identifier: BSD-3-Clause
"""backup.py: running, failed, ended for good; what each means for target writes, jobs, the record and get-error."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from content import make_raw, pattern
from replication.disk.file import FileDisk
from replication.errors import CommandError, DiskError
from replication.events import EventHub
from replication.fault import Case, FaultLatch
from replication.image import qcow2
from replication.image.overlay import Overlay
from replication.image.stack import Stack
from replication.jobs import JobList
from replication.record.ancestry import Ancestry
from replication.record.changes import GRAIN, ChangeMap
from replication.record.state import Record, StateError, StateFolder
from replication.secondary.backup import FAILED, RUNNING, Backup
from replication.secondary.disk import SecondaryDisk
from replication.side import Setting
from replication.stage import Mode, Stage

SIZE = 4 * GRAIN


class Bench:
    """Two disks in `running`, wired to their backup as secondary.py does it."""

    def __init__(self, folder: Path) -> None:
        hub = EventHub()
        self.jobs = JobList(hub)
        self.record = Record(Mode.SECONDARY, Stage.RUNNING)
        self.saved: list[str] = []
        self.can_save = True
        self.faults = FaultLatch(hub, lambda: None)
        setting = SimpleNamespace(jobs=self.jobs, record=self.record, faults=self.faults, save=self.save)
        self.ancestry = Ancestry(StateFolder(None), self.record, lambda: None)
        self.disks = [self.open_disk(folder, name) for name in ("a", "b")]
        self.backup = Backup(cast(Setting, setting), self.disks)
        for disk in self.disks:
            disk.backup_failed = lambda error: self.backup.failed(str(error))
            disk.repaired = self.backup.repaired
        self.disk = self.disks[0]
        self.backup.begin()

    def save(self) -> None:
        if not self.can_save:
            raise StateError("cannot write the record")
        self.saved.append(self.record.backup)

    def open_disk(self, folder: Path, name: str) -> SecondaryDisk:
        make_raw(folder / name, SIZE, pattern(1, SIZE))
        for role in ("active", "hidden"):
            qcow2.create(str(folder / f"{name}.{role}.qcow2"), str(folder / name), "raw", SIZE)
        disk = SecondaryDisk(name, f"top-{name}", FileDisk(name, str(folder / name)), self.faults, self.ancestry)
        disk.open_maps(lambda kind: ChangeMap(None, SIZE))
        active, hidden = (Overlay(role, name, str(folder / f"{name}.{role}.qcow2")) for role in ("active", "hidden"))
        disk.stack = Stack(active, hidden, disk.disk, disk.lost)
        disk.stage = Stage.RUNNING
        return disk

    @property
    def shown(self) -> dict[str, tuple[str, str | None]]:
        return {job["id"]: (job["status"], job.get("error")) for job in self.jobs.query()}

    def write(self, disk: SecondaryDisk, offset: int = 0, length: int = GRAIN) -> None:
        disk.target_write(memoryview(b"\xaa" * length), offset, False)

    def write_in_vain(self, disk: SecondaryDisk, monkeypatch: pytest.MonkeyPatch, of: str = "hidden") -> None:
        """A target write that fails because `hidden` or the disk does."""

        def broken(*_: object) -> Any:
            raise DiskError("broken", errno.ENOSPC)

        assert disk.stack is not None
        with monkeypatch.context() as patched:
            patched.setattr(disk.stack.hidden.data if of == "hidden" else disk.disk, "write", broken)
            with pytest.raises(DiskError, match="broken"):
                self.write(disk)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(tmp_path)
    yield opened
    for disk in opened.disks:
        disk.close()


BOTH_RUN = {"backup-a": ("running", None), "backup-b": ("running", None)}


def test_while_it_runs_each_disk_has_a_job_that_shows_what_hidden_holds(bench: Bench) -> None:
    assert bench.shown == BOTH_RUN
    bench.write(bench.disk, 0, 5000)
    first, second = bench.jobs.query()
    assert (first["type"], first["current-progress"], first["total-progress"]) == ("backup", 8192, SIZE)
    assert second["current-progress"] == 0
    bench.backup.begin()
    assert bench.shown == BOTH_RUN, "begun once"
    assert (bench.backup.running, bench.backup.accepts_writes) == (True, True)


def test_the_end_of_the_stage_ends_the_jobs_without_an_error(bench: Bench) -> None:
    bench.backup.conclude(None)
    assert bench.shown == {}
    assert bench.backup.running


def test_a_failed_copy_fails_the_jobs_of_all_disks_and_later_writes_are_tried(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write_in_vain(bench.disk, monkeypatch)
    error = "hidden disk: broken"
    assert bench.shown == {"backup-a": ("concluded", error), "backup-b": ("concluded", error)}
    assert (bench.backup.running, bench.backup.accepts_writes) == (False, True)
    assert (bench.record.backup, bench.saved) == (FAILED, [FAILED])
    bench.write_in_vain(bench.disk, monkeypatch)
    assert bench.saved == [FAILED], "only the first failure is worth a write of the state file"
    bench.write(bench.disks[1])
    bench.write(bench.disk, 2 * GRAIN)
    assert bench.record.backup == FAILED, "that was not what the disk lacks"
    assert bench.faults.fault is not None


def test_it_runs_again_when_the_primary_has_sent_all_that_was_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for disk in bench.disks:
        bench.write_in_vain(disk, monkeypatch)
    bench.write(bench.disk)
    assert bench.record.backup == FAILED, "the other disk still lacks something"
    assert bench.faults.fault is not None
    bench.write(bench.disks[1])
    assert (bench.record.backup, bench.saved) == (RUNNING, [FAILED, RUNNING])
    assert bench.faults.fault is None
    assert bench.shown == BOTH_RUN


def test_a_write_that_the_disk_refused_is_repaired_without_the_backup_having_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write_in_vain(bench.disk, monkeypatch, "disk")
    assert bench.record.backup == RUNNING
    assert bench.shown == BOTH_RUN
    fault = bench.faults.fault
    assert fault is not None
    assert fault.case == Case.SECONDARY_DISK
    bench.write(bench.disk)
    assert bench.faults.fault is None
    assert bench.saved == []


def test_a_fault_of_another_kind_is_not_repaired_by_writing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.faults.report(Case.EMPTYING, "a", "make-empty", 0, SIZE, DiskError("gone"))
    bench.write_in_vain(bench.disk, monkeypatch)
    bench.write(bench.disk)
    assert bench.record.backup == RUNNING
    fault = bench.faults.fault
    assert fault is not None
    assert fault.case == Case.EMPTYING


def test_a_failure_that_comes_while_it_is_repaired_is_not_overlooked(bench: Bench) -> None:
    bench.backup.failed("first")
    bench.disk.lost.mark(0, 1)  # noted by a request that has not yet said so
    bench.backup.repaired()
    assert bench.record.backup == FAILED
    bench.backup.failed("second")
    bench.disk.lost.repaired(0, GRAIN)
    bench.backup.repaired()
    assert bench.record.backup == RUNNING


@pytest.mark.parametrize("before", [RUNNING, FAILED])
def test_a_cancelled_backup_takes_no_write_any_more_and_is_not_repaired(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    if before == FAILED:
        bench.write_in_vain(bench.disk, monkeypatch)
        with pytest.raises(CommandError, match="cannot accept command verb 'cancel'"):
            bench.jobs.cancel("backup-b")
        bench.backup.end("cancelled by job-cancel")
    else:
        bench.jobs.cancel("backup-b")
        error = "cancelled by job-cancel"
        assert bench.shown == {"backup-a": ("concluded", error), "backup-b": ("concluded", error)}
        fault = bench.faults.fault
        assert fault is not None
        assert (fault.case, fault.disk, fault.length) == (Case.COPY_BEFORE_WRITE, "b", SIZE)
    assert bench.saved[-1] == bench.record.backup == "cancelled by job-cancel"
    assert (bench.backup.running, bench.backup.accepts_writes) == (False, False)
    for disk in bench.disks:
        with pytest.raises(DiskError, match="takes no writes: copy-before-write has ended"):
            bench.write(disk)
        assert disk.lost.missing
        disk.lost.clear()
    bench.backup.repaired()
    bench.backup.failed("later")
    bench.backup.begin()
    assert bench.record.backup == "cancelled by job-cancel"
    assert not any(status == "running" for status, _ in bench.shown.values())
    assert bench.faults.fault is not None


def test_the_same_end_twice_is_one_and_another_end_is_kept_as_the_reason(bench: Bench) -> None:
    bench.backup.end("one")
    bench.backup.end("one")
    assert bench.saved == ["one"]
    bench.backup.end("other")
    assert (bench.record.backup, bench.saved) == ("other", ["one", "other"])


def test_without_a_valid_checkpoint_there_is_nothing_to_preserve_and_no_job(bench: Bench) -> None:
    bench.backup.conclude(None)
    bench.record.inconsistent = "the host was restarted"
    bench.backup.begin()
    assert bench.shown == {}


def test_what_cannot_be_saved_is_so_all_the_same_and_is_said(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.can_save = False
    bench.backup.end("cancelled")
    assert "cannot write the record" in capsys.readouterr().err
    assert not bench.backup.accepts_writes
    assert all(status == "concluded" for status, _ in bench.shown.values())
    assert not any(disk.accepts_writes for disk in bench.disks)
