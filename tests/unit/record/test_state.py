# SPDX-License-Identifier: BSD-3-Clause
"""state.py: after a kill at any point the next process finds the old record or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from checkout import REPOSITORY
from replication.disk import files
from replication.errors import ConfigError
from replication.fault import Fault
from replication.record import state
from replication.record.boot import BOOT_ID_ENVIRONMENT
from replication.record.lineage import Lineage
from replication.record.state import Record, StateError, StateFolder
from replication.stage import Mode, Stage
from waiting import DEADLINE_S

OLD = Record(Mode.SECONDARY, Stage.RUNNING, disks={"disk0": 4096})
NEW = Record(
    Mode.SECONDARY,
    Stage.FAILOVER,
    "failed",
    "nbd://other/disk0",
    Fault(3, "disk0", "write", 0, 512, "ENOSPC", "Störung", 1, 1.5, 2.5).to_json(),
    {"disk0": 4096},
    True,
    "8a1c6a3e-boot",
    "power",
    True,
    "the host was restarted",
    4e8,
    "00000000000000aa",
    Lineage("00000000000000bb", shared=True, history=("00000000000000cc",)).to_json(),
    "00000000000000dd",
    "00000000000000ee",
    True,
    True,
    True,
)


@contextlib.contextmanager
def opened(path: Path, durable: bool = False) -> Iterator[StateFolder]:
    """A state folder of this process."""
    folder = StateFolder(str(path), durable)
    try:
        yield folder
    finally:
        folder.close()


def crashed(path: Path) -> Path:
    """What a process finds that is started after the one that has `path` was killed now."""
    copy = path.with_name(path.name + "-after")
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(path, copy)
    return copy


@contextlib.contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process with replication.record.state; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom replication.record.state import *\n" + code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield process
        finally:
            process.kill()
            process.wait(DEADLINE_S)


@pytest.mark.parametrize("record", [OLD, NEW, Record(Mode.PRIMARY)], ids=["old", "new", "least"])
def test_a_record_comes_back_as_it_was_saved(tmp_path: Path, record: Record) -> None:
    with opened(tmp_path / "s") as folder:
        assert folder.load() is None
        folder.save(record)
        assert folder.load() == record
    with opened(tmp_path / "s") as folder:
        assert folder.load() == record


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_a_save_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with opened(tmp_path / "s") as folder:
        folder.save(OLD)
        with monkeypatch.context() as broken:
            broken.setattr(files, call, refuse_space)
            with pytest.raises(StateError, match=r"cannot write .*state\.json: No space left"):
                folder.save(NEW)
        assert folder.load() == OLD
        folder.save(NEW)
        assert folder.load() == NEW


def test_a_folder_without_room_for_the_record_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "s") as folder, monkeypatch.context() as full:
        full.setattr(files, "replace", refuse_space)
        with pytest.raises(ConfigError, match=r"cannot take room for .*state\.json: No space left on device$"):
            folder.reserve(OLD)
    with opened(tmp_path / "s") as folder:
        assert folder.load() is None
        folder.reserve(OLD)
        assert json.loads((tmp_path / "s" / "state.json").read_text())["stage"] == "running"
        assert folder.load() is None, "it has not been saved"


def test_a_record_of_the_first_version_starts_on_a_full_file_system_and_is_converted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    path.mkdir()
    (path / "state.json").write_text(json.dumps(OLD.to_json(), indent=1))
    with opened(path) as folder:
        assert folder.load() == OLD
        with monkeypatch.context() as full:
            full.setattr(files, "replace", refuse_space)
            folder.reserve(OLD)
            assert "cannot take room for" in capsys.readouterr().err
            with pytest.raises(StateError, match="No space left"):
                folder.save(NEW)
        assert folder.load() == OLD
        folder.reserve(OLD)
        monkeypatch.setattr(files, "replace", refuse_space)
        folder.save(NEW)
        assert folder.load() == NEW
    with opened(path) as folder:
        assert folder.load() == NEW


def test_a_process_killed_while_it_saves_leaves_a_whole_record(tmp_path: Path) -> None:
    code = (
        "folder = StateFolder(sys.argv[1])\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    folder.save(Record(Mode.PRIMARY, disks={f'disk{n}': number for n in range(200)}))\n"
        "    print(number, flush=True)\n"
    )
    former = 0
    for enough in (1, 4, 9, 16):
        with child(code, str(tmp_path / "s")) as process:
            assert process.stdout is not None
            answered = 0
            while answered < enough:
                answered = int(process.stdout.readline())
            process.kill()
            answered = max([answered, *map(int, process.stdout.read().split())])
        with opened(tmp_path / "s") as folder:
            record = folder.load()
            assert record is not None
            (found,) = set(record.disks.values())
            assert answered <= found <= answered + 1, "a saved record is not lost"
            former = max(former, found)
    assert former >= 16


WRONG = {
    "empty": "",
    "cut off": json.dumps(OLD.to_json())[:-20],
    "not an object": "[1, 2]",
    "a text": '"running"',
    "nothing": "null",
    "another format": json.dumps({**OLD.to_json(), "format": 2}),
    "no format": json.dumps({key: value for key, value in OLD.to_json().items() if key != "format"}),
    "unknown stage": json.dumps({**OLD.to_json(), "stage": "sleeping"}),
    "unknown mode": json.dumps({**OLD.to_json(), "mode": "tertiary"}),
    "no mode": json.dumps({key: value for key, value in OLD.to_json().items() if key != "mode"}),
    "unknown member": json.dumps({**OLD.to_json(), "colour": "red"}),
    "disks of another type": json.dumps({**OLD.to_json(), "disks": [1]}),
    "sizes of another type": json.dumps({**OLD.to_json(), "disks": {"disk0": "big"}}),
    "backup of another type": json.dumps({**OLD.to_json(), "backup": 5}),
    "fault of another type": json.dumps({**OLD.to_json(), "fault": [1]}),
    **{
        f"{name} of another type": json.dumps({**OLD.to_json(), name: value})
        for name, value in {
            "promoted": 1,
            "boot": 5,
            "durability": None,
            "clean": "yes",
            "inconsistent": True,
            "commit_rate": "fast",
            "node": None,
            "lineage": "00000000000000aa",
            "next_generation": 7,
            "partner": 7,
            "paired": 1,
            "led": "yes",
            "resync": None,
        }.items()
    },
    "a lineage with a member too many": json.dumps({**OLD.to_json(), "lineage": {**Lineage().to_json(), "age": 1}}),
    "a lineage that lacks a member": json.dumps({**OLD.to_json(), "lineage": {"current": ""}}),
    "a lineage of no generations": json.dumps({**OLD.to_json(), "lineage": {**Lineage().to_json(), "incoming": "new"}}),
    "a node that is no id": json.dumps({**OLD.to_json(), "node": "A"}),
    "a next generation that is no id": json.dumps({**OLD.to_json(), "next_generation": "A"}),
    "a rate that JSON cannot say": json.dumps({**OLD.to_json(), "commit_rate": float("inf")}),
    "disks that are no table": json.dumps({**OLD.to_json(), "disks": "disk0"}),
    "a fault with a member too many": json.dumps(
        {**NEW.to_json(), "fault": {**(NEW.fault or {}), "write_lost": False}}
    ),
    "secondary of another type": json.dumps({**OLD.to_json(), "secondary": 7}),
    "nested without end": "[" * 100_000,
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_a_state_file_that_this_program_did_not_write_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s"
    with opened(path) as folder:
        (path / "state.json").write_text(text)
        with pytest.raises(ConfigError, match=r"is not a state file of this program .*move it away to start anew"):
            folder.load()
    assert (path / "state.json").read_text() == text


def test_a_state_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as folder:
        (tmp_path / "s" / "state.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="not a state file"):
            folder.load()


def test_a_state_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as folder:
        (tmp_path / "s" / "state.json").mkdir()
        with pytest.raises(ConfigError, match=r"cannot read .*Is a directory"):
            folder.load()


# -- epoch -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_not_begun_or_to_be_finished_or_complete_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(path) as folder:

        def after_a_kill() -> tuple[int, bool, bool]:
            with opened(crashed(path)) as following:
                return following.epoch, following.emptying, following.checkpoint["time"] is not None

        assert after_a_kill() == (0, False, False)
        folder.begin_epoch()
        assert after_a_kill() == (1, True, False)
        folder.end_epoch(0.25)
        assert after_a_kill() == (1, False, True)
        folder.begin_epoch()
        assert after_a_kill() == (2, True, True)
    with opened(path) as folder:
        folder.end_epoch(0.5)
        assert (folder.epoch, folder.emptying) == (2, False)
        assert folder.checkpoint["duration"] == 0.5


def test_the_epoch_survives_a_real_kill(tmp_path: Path) -> None:
    code = (
        "folder = StateFolder(sys.argv[1])\n"
        "folder.begin_epoch()\nfolder.end_epoch(0.1)\nfolder.begin_epoch()\nprint('begun', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with child(code, str(tmp_path / "s")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
    with opened(tmp_path / "s") as folder:
        assert (folder.epoch, folder.emptying) == (2, True)


def test_an_epoch_file_cut_off_while_it_was_made_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(path):
        pass
    os.truncate(path / "epoch", 0)
    with opened(path) as folder:
        assert (folder.epoch, folder.emptying) == (0, False)
        folder.begin_epoch()
    assert (path / "epoch").stat().st_size == 4096
    assert (path / "epoch").stat().st_blocks, "a mapped hole on a full disk would kill the process"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is done to the epoch file, as long as it is done as it should be."""
    made: list[str] = []
    real_write, real_sync = files.pwritev, files.fdatasync

    def pwritev(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        words = struct.unpack(f"{sum(map(len, buffers)) // 8}Q", b"".join(buffers))
        made.append(f"write {offset // 8}: {words[0] if offset == 0 else 'time'}")
        return real_write(fd, buffers, offset, flags)

    def fdatasync(fd: int) -> None:
        assert os.readlink(f"/proc/self/fd/{fd}").endswith("/epoch")
        made.append("sync")
        real_sync(fd)

    monkeypatch.setattr(files, "pwritev", pwritev)
    monkeypatch.setattr(files, "fdatasync", fdatasync)
    return made


@contextlib.contextmanager
def durable(path: Path) -> Iterator[StateFolder]:
    folder = StateFolder(str(path), durable=True)
    try:
        yield folder
    finally:
        folder.close()


def test_time_and_age_are_of_one_checkpoint_while_the_next_is_stored_and_when_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(state, "boot_clock_s", lambda: clock[0])
    real_write, real_sync = files.pwritev, files.fdatasync
    seen: list[tuple[float | None, float | None]] = []
    failures = [OSError(errno.EIO, "once")]

    def seen_now() -> tuple[float | None, float | None]:
        return folder.checkpoint["time"], folder.checkpoint["age"]

    def pwritev(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        seen.append(seen_now())
        return real_write(fd, buffers, offset, flags)

    def fdatasync(fd: int) -> None:
        real_sync(fd)
        if failures:
            raise failures.pop()

    with durable(tmp_path / "s") as folder:
        folder.begin_epoch()
        folder.end_epoch(0.5)
        first = folder.checkpoint["time"]
        clock[0] = 107.0
        folder.begin_epoch()
        with monkeypatch.context() as storing:
            storing.setattr(files, "pwritev", pwritev)
            storing.setattr(files, "fdatasync", fdatasync)
            with pytest.raises(StateError):
                folder.end_epoch(0.5)
            assert seen_now() == (first, 7.0)
            clock[0] = 108.0
            folder.end_epoch(0.5)
        assert seen[:2] == [(first, 7.0), (first, 8.0)]
        assert seen_now() == (folder.checkpoint["time"], 0.0)
        assert folder.checkpoint["time"] != first


def test_a_durable_checkpoint_is_on_stable_storage_when_it_is_begun_and_when_it_is_complete(
    tmp_path: Path, calls: list[str]
) -> None:
    with durable(tmp_path / "s") as folder:
        calls.clear()
        folder.begin_epoch()
        assert calls == ["write 0: 3", "sync"]
        assert (folder.epoch, folder.emptying) == (1, True)
        calls.clear()
        folder.begin_epoch()
        assert calls == [], "the same one again"
        folder.end_epoch(0.5)
        assert calls == ["write 1: time", "sync", "write 0: 2", "sync"], "never complete without its time"
        assert (folder.epoch, folder.emptying, folder.checkpoint["duration"]) == (1, False, 0.5)
    with opened(tmp_path / "s") as folder:
        assert (folder.epoch, folder.emptying, folder.checkpoint["duration"]) == (1, False, 0.5)


def test_what_a_killed_process_had_begun_is_on_stable_storage_before_the_next_one_relies_on_it(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with durable(path) as folder, monkeypatch.context() as killed:
        killed.setattr(files, "fdatasync", die)
        with pytest.raises(Killed):
            folder.begin_epoch()
    calls.clear()
    with durable(path) as following:
        assert following.emptying, "the kernel has it, though perhaps not the disk"
        following.begin_epoch()
        assert calls[-1:] == ["sync"]


class Killed(BaseException):
    """The process ends here."""


def die(*_: object) -> None:
    raise Killed


def test_without_a_power_cut_to_fear_nothing_is_synced(tmp_path: Path, calls: list[str]) -> None:
    with opened(tmp_path / "s") as folder:
        folder.begin_epoch()
        folder.end_epoch(0.5)
        assert calls == []


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_a_durable_checkpoint_that_cannot_be_begun_has_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "s"
    with durable(path) as folder:
        folder.begin_epoch()
        folder.end_epoch(0.25)
        before = (folder.epoch, folder.emptying, folder.checkpoint["time"], folder.checkpoint["duration"])
        with monkeypatch.context() as broken:
            broken.setattr(files, call, refuse_space)
            with pytest.raises(StateError, match=r"cannot write .*epoch: No space left"):
                folder.begin_epoch()
        checkpoint = folder.checkpoint
        assert (folder.epoch, folder.emptying, checkpoint["time"], checkpoint["duration"]) == before
        with opened(crashed(path)) as following:
            assert (following.epoch, following.emptying) == (1, False)
        folder.begin_epoch()
        assert (folder.epoch, folder.emptying) == (2, True)


@pytest.mark.parametrize("syncs", [0, 1], ids=["its time", "its end"])
def test_a_durable_checkpoint_that_cannot_be_ended_is_completed_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: int
) -> None:
    path = tmp_path / "s"
    real = files.fdatasync
    left = [None] * syncs

    def fdatasync(fd: int) -> None:
        if not left:
            refuse_space()
        left.pop()
        real(fd)

    with durable(path) as folder:
        folder.begin_epoch()
        with monkeypatch.context() as broken:
            broken.setattr(files, "fdatasync", fdatasync)
            with pytest.raises(StateError, match=r"cannot write .*epoch: No space left"):
                folder.end_epoch(0.25)
        assert (folder.epoch, folder.emptying) == (1, True)
        with durable(crashed(path)) as following:
            assert (following.epoch, following.emptying) == (1, True)
            following.end_epoch(0.5)
            assert (following.epoch, following.emptying, following.checkpoint["duration"]) == (1, False, 0.5)


def refuse_space(*_: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "words",
    [((1 << 63) + 2, 0, 0), (0, 0x7FF0_0000_0000_0000, 0), (0, 0x3FF0_0000_0000_0000, 0x7FF8_0000_0000_0001)],
    ids=["epoch", "time", "duration"],
)
def test_an_epoch_file_that_this_program_did_not_write_is_refused_and_kept(
    tmp_path: Path, words: tuple[int, ...]
) -> None:
    path = tmp_path / "s"
    with opened(path):
        pass
    content = struct.pack("3Q", *words).ljust(4096, b"\0")
    (path / "epoch").write_bytes(content)
    for _ in range(2):  # and the folder is free again
        with pytest.raises(ConfigError, match=r"epoch is not a file of this program; move it away"):
            StateFolder(str(path))
    assert (path / "epoch").read_bytes() == content


@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
def test_a_checkpoint_gets_the_primarys_number_if_that_is_a_later_one(tmp_path: Path, power: bool) -> None:
    folder = StateFolder(str(tmp_path / "s"), durable=power)
    for number, expected in ((0, 1), (2, 2), (9, 9), (3, 10), (11, 11), (11, 12)):
        folder.begin_epoch(number)
        assert (folder.epoch, folder.emptying) == (expected, True)
        folder.begin_epoch(number + 100)
        assert folder.epoch == expected, "the same one again keeps its number"
        folder.end_epoch(0.5)
        assert (folder.epoch, folder.emptying) == (expected, False)
    folder.close()
    with opened(tmp_path / "s") as following:
        assert following.epoch == 12


def test_a_primary_counts_as_its_secondary_does_if_that_is_ahead(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as folder:
        for number, expected in ((0, 1), (7, 7), (2, 8)):
            folder.count_epoch(0.25, number)
            assert (folder.epoch, folder.emptying, folder.checkpoint["duration"]) == (expected, False, 0.25)


@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
def test_the_next_checkpoint_comes_after_the_other_nodes_without_being_one(tmp_path: Path, power: bool) -> None:
    folder = StateFolder(str(tmp_path / "s"), durable=power)
    folder.count_from(5)
    assert (folder.epoch, folder.emptying, folder.checkpoint["time"]) == (5, False, None)
    folder.count_from(3)
    assert folder.epoch == 5, "never backwards"
    folder.begin_epoch()
    assert folder.epoch == 6
    folder.count_from(50)
    assert (folder.epoch, folder.emptying) == (6, True), "the one that was begun is to be finished"
    folder.end_epoch(0.5)
    folder.count_from(50)
    folder.close()
    with opened(tmp_path / "s") as following:
        assert (following.epoch, following.emptying, following.checkpoint["duration"]) == (50, False, 0.5)


def test_a_generation_that_was_begun_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(path) as folder:
        assert folder.moved_to == "0" * 16, "which is no generation"
        for generation in ("00000000000000aa", "ffffffffffffffff", "8000000000000001"):
            folder.move_to(generation)
            assert folder.moved_to == generation
            with opened(crashed(path)) as following:
                assert (following.moved_to, following.epoch) == (generation, 0)
        folder.begin_epoch()
        folder.end_epoch(0.5)
        assert folder.moved_to == "8000000000000001", "a checkpoint leaves it alone"


def test_a_begun_generation_is_made_stable_and_a_failure_is_said(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "s") as folder:
        folder.move_to("00000000000000aa")
        assert calls == []
        folder.flush_page()
        assert calls == ["sync"]
        monkeypatch.setattr(files, "fdatasync", refuse_space)
        with pytest.raises(StateError, match=r"cannot write .*epoch: No space left"):
            folder.flush_page()


class Clocks:
    """The wall clock and the boot-time clock of a host, as a test sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = 1000.0
        self.boot = 50.0
        monkeypatch.setattr(state.time, "time", lambda: self.wall)
        monkeypatch.setattr(state, "boot_clock_s", lambda: self.boot)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("step_s", [-3600.0, 0.0, 3600.0])
def test_age_of_the_last_checkpoint_does_not_believe_the_wall_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, step_s: float
) -> None:
    clocks = Clocks(monkeypatch)
    with opened(tmp_path / "s", durable) as folder:
        assert folder.checkpoint["age"] is None
        folder.begin_epoch()
        folder.end_epoch(0.25)
        clocks.wall += 12.5 + step_s
        clocks.boot += 12.5
        assert folder.checkpoint == {"time": 1000.0, "duration": 0.25, "age": 12.5}
    with opened(tmp_path / "s", durable) as following:
        assert following.checkpoint["age"] == 12.5, "another process of this boot"
        clocks.boot += 1.0
        assert following.checkpoint["age"] == 13.5
        following.count_epoch(0.5)
        assert following.checkpoint["age"] == 0.0


def test_age_over_a_boot_is_what_the_wall_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    with opened(tmp_path / "s") as folder:
        folder.count_epoch(0.25)
    monkeypatch.setenv(BOOT_ID_ENVIRONMENT, "second")
    clocks.boot = 3.0
    with opened(tmp_path / "s") as folder:
        clocks.wall = 1012.5
        assert folder.checkpoint["age"] == 12.5
        clocks.wall = 900.0
        assert folder.checkpoint["age"] == 0.0, "set back while the host was down"


def test_maps_of_a_disk_are_in_the_folder_or_in_memory(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as folder:
        for kind in ("changes", "lost"):
            folder.open_map("a", kind, 1).close()
            assert (tmp_path / "s" / f"a.{kind}").exists()
    StateFolder(None).open_map("a", "lost", 1).close()


# -- the folder --------------------------------------------------------------------------------------------------


def test_a_folder_in_use_by_another_process_is_refused_until_that_one_is_killed(tmp_path: Path) -> None:
    with child(
        "folder = StateFolder(sys.argv[1])\nprint('mine', flush=True)\nsys.stdin.read()", str(tmp_path)
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match=r"the state folder .* is in use by another process"):
            StateFolder(str(tmp_path))
    with opened(tmp_path):
        pass


def test_a_folder_in_use_here_is_refused_elsewhere(tmp_path: Path) -> None:
    with opened(tmp_path), child("StateFolder(sys.argv[1])", str(tmp_path)) as other:
        assert other.wait(DEADLINE_S) != 0
    with opened(tmp_path), pytest.raises(ConfigError, match="in use"):
        StateFolder(str(tmp_path))


def test_the_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "s") as folder:
        folder.save(OLD)
    assert (tmp_path / "a" / "s").stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot use the state folder .*Not a directory"):
        StateFolder(str(tmp_path / "file" / "s"))


def test_without_a_folder_the_same_calls_work_in_memory() -> None:
    folder = StateFolder(None)
    folder.save(NEW)
    assert folder.load() is None
    assert folder.checkpoint == {"time": None, "duration": None, "age": None}
    folder.begin_epoch()
    assert (folder.epoch, folder.emptying) == (1, True)
    folder.end_epoch(1.5)
    assert (folder.epoch, folder.emptying, folder.checkpoint["duration"]) == (1, False, 1.5)
    folder.close()
