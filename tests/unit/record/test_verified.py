# SPDX-License-Identifier: BSD-3-Clause
"""What outlives the process of comparisons, and what of a file is not believed."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from replication.disk import files
from replication.record.verified import Place, Verified

RANGES = [{"disk": "disk0", "offset": 65536, "length": 65536}]
OUTCOME: dict[str, Any] = {
    "result": "different",
    "time": 1700000000.5,
    "duration": 2.5,
    "compared-bytes": 1 << 20,
    "different-bytes": 65536,
    "left-out-bytes": 0,
    "ranges": RANGES,
    "repair": False,
    "reason": None,
}
PLACE = Place("disk0", 1 << 20, None, True, 1700000000.5, 0, 65536, RANGES)


def test_the_next_process_knows_the_last_result(tmp_path: Path) -> None:
    first = Verified(str(tmp_path))
    assert (first.last, first.place) == (None, None)
    first.note(PLACE)
    assert Verified(str(tmp_path)).place == PLACE
    first.conclude(OUTCOME)
    then = Verified(str(tmp_path))
    assert (then.last, then.place) == (OUTCOME, None)


def test_without_a_folder_it_is_in_memory() -> None:
    verified = Verified(None)
    verified.note(PLACE)
    verified.conclude(OUTCOME)
    assert (verified.last, verified.place) == (OUTCOME, None)


def test_what_cannot_be_written_is_known_as_long_as_the_process_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_path: str, _content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "replace", full)
    verified = Verified(str(tmp_path))
    verified.conclude(OUTCOME)
    assert verified.last == OUTCOME
    assert "verify.json: No space left on device" in capsys.readouterr().err
    assert Verified(str(tmp_path)).last is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"last": 1, "place": null}',
        json.dumps({"last": {**OUTCOME, "more": 1}, "place": None}).encode(),
        json.dumps({"last": {**OUTCOME, "time": "now"}, "place": None}).encode(),
        json.dumps({"last": {**OUTCOME, "time": float("nan")}, "place": None}).encode(),
        json.dumps({"last": {**OUTCOME, "ranges": [1]}, "place": None}).encode(),
        json.dumps({"last": {**OUTCOME, "ranges": [{**RANGES[0], "offset": "0"}]}, "place": None}).encode(),
        json.dumps({"last": None, "place": {"disk": "disk0"}}).encode(),
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_none_of_ours_counts_as_none(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "verify.json").write_bytes(content)
    verified = Verified(str(tmp_path))
    assert (verified.last, verified.place) == (None, None)
    assert "verify.json is not used" in capsys.readouterr().err
    verified.conclude(OUTCOME)
    assert Verified(str(tmp_path)).last == OUTCOME
