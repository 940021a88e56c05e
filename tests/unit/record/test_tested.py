# SPDX-License-Identifier: BSD-3-Clause
"""tested.py: the last result is kept, and what is not one is not believed."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from replication.disk import files
from replication.record.tested import LastTest

OUTCOME = {
    "name": "test",
    "result": "passed",
    "time": 1.5,
    "duration": 2.5,
    "rto": None,
    "epoch": 3,
    "reason": None,
}


def test_the_last_result_is_there_for_the_next_process(tmp_path: Path) -> None:
    tested = LastTest(str(tmp_path))
    assert tested.last is None
    for name in ("former", OUTCOME["name"]):
        tested.conclude({**OUTCOME, "name": name})
        tested.save()
    assert tested.last == OUTCOME
    assert LastTest(str(tmp_path)).last == OUTCOME


def test_without_a_folder_it_is_kept_in_memory() -> None:
    tested = LastTest(None)
    tested.conclude(OUTCOME)
    tested.save()
    assert tested.last == OUTCOME


def test_a_folder_without_room_costs_the_next_process_the_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = LastTest(str(tmp_path))

    def full(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "replace", full)
    tested.conclude(OUTCOME)
    tested.save()
    assert tested.last == OUTCOME
    assert LastTest(str(tmp_path)).last is None
    assert "test.json: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"name": 5, "result": "passed", "time": 1, "duration": 1, "rto": null, "epoch": 1, "reason": null}',
        b'{"name": "x", "result": "passed", "time": NaN, "duration": 1, "rto": null, "epoch": 1, "reason": null}',
        b"[" * 100_000,
    ],
)
def test_what_is_not_a_result_counts_as_not_there(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.json").write_bytes(content)
    assert LastTest(str(tmp_path)).last is None
    assert "test.json is not used" in capsys.readouterr().err
