# SPDX-License-Identifier: BSD-3-Clause
"""keeper.py: what is written in time, or not begun."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from replication.disk import files
from replication.record import keeper as module
from replication.record.keeper import Keeper
from replication.record.twin import TwinFile
from waiting import DEADLINE_S

FOREVER_S = 60.0


class Storage:
    """A file whose syncs take `slow_s` seconds, or wait for `works` to be set. Time passes where the test lets it: in a
    sync, and by `now`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 1000.0
        self.works = threading.Event()
        self.works.set()
        self.reached = threading.Event()
        self.slow_s = 0.0
        self.syncs = 0
        file = TwinFile(str(path))
        file.reserve({"says": "nothing"})
        file.write({"says": "before"})
        self.keeper = Keeper(file)

    def sync(self, _fd: int) -> None:
        self.syncs += 1
        self.reached.set()
        assert self.works.wait(FOREVER_S)
        self.now += self.slow_s

    def write(self, says: str, within_s: float, *, hasty: bool = True) -> None:
        self.keeper.write(lambda: {"says": says}, self.now + within_s, hasty=hasty)

    @property
    def says(self) -> str:
        return str(json.loads(self.path.read_text())["says"])


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    storage = Storage(tmp_path / "record.json")
    monkeypatch.setattr(files, "fdatasync", storage.sync)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: storage.now))
    yield storage
    storage.works.set()


def test_what_a_storage_takes_is_written(storage: Storage) -> None:
    storage.write("after", FOREVER_S)
    assert storage.says == "after"
    storage.write("again", FOREVER_S, hasty=False)
    assert storage.says == "again"


def test_nothing_begins_that_the_storage_takes_too_long_for_and_a_second_attempt_needs_one_write(
    storage: Storage,
) -> None:
    storage.slow_s = 0.2
    with pytest.raises(TimeoutError, match=r"takes 0\.2 s for a write, which has 0\.1 s left"):
        storage.write("after", 0.3)
    assert storage.says == "before"
    storage.syncs = 0
    storage.write("after", 0.3)
    assert (storage.says, storage.syncs) == ("after", 1)


def test_a_write_behind_one_that_hangs_is_not_begun(storage: Storage) -> None:
    storage.works.clear()
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(storage.write, "first", FOREVER_S)
        assert storage.reached.wait(DEADLINE_S)
        with pytest.raises(TimeoutError, match="has not answered an earlier write yet"):
            storage.write("second", 0.05)
        assert storage.says == "before", "until the storage has answered it gets what counts anyway"
        storage.works.set()
        hanging.result(DEADLINE_S)
    assert storage.says == "first"


def test_one_that_has_answered_too_late_gets_nothing(storage: Storage) -> None:
    storage.works.clear()
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(storage.write, "first", 0.05)
        assert storage.reached.wait(DEADLINE_S)
        storage.now += 0.06
        storage.works.set()
        with pytest.raises(TimeoutError, match=r"has 0\.0 s left"):
            hanging.result(DEADLINE_S)
    assert storage.says == "before"
