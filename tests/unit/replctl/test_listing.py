# SPDX-License-Identifier: BSD-3-Clause
"""`replctl list`: nodes that answer, hang, are down, or have a broken file, side by side."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commandline import REPLCTL
from nodes import Pair
from replication.replctl import listing
from waiting import DEADLINE_S, wait_until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "config"
    made.mkdir()
    monkeypatch.setenv("NBDKIT_REPLICATION_CONFIG_DIR", str(made))
    return made


def listed(*arguments: str) -> str:
    done = subprocess.run(
        [REPLCTL, "list", *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@contextlib.contextmanager
def hanging(folder: Path, *names: str) -> Iterator[None]:
    """Nodes that accept and say nothing."""
    with contextlib.ExitStack() as stack:
        for name in names:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / f"{name}.sock"))
            listener.listen()
            (folder / f"{name}.toml").write_text(f'control = "{folder}/{name}.sock"\n')
        yield


def resyncs(pair: Pair) -> list[Any]:
    """Those at work."""
    jobs = pair.primary.execute("query-jobs")
    return [job for job in jobs if job["type"] == "resync" and job["status"] == "running"]


def test_a_table_of_all_nodes(folder: Path, tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with contextlib.closing(pair):
        pair.start()
        pair.start_replication()
        wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "nothing is missing")
        wait_until(lambda: not resyncs(pair), "and the job of it has ended")
        for name, node in (("p", pair.primary), ("s", pair.secondary)):
            (folder / f"{name}.toml").write_text(f'control = "{node.control_path}"\n')
        (folder / "down.toml").write_text(f'control = "{tmp_path}/nobody.sock"\n')
        (folder / "broken.toml").write_text("mode = primary\n")
        begin = time.monotonic()
        with hanging(folder, "hangs1", "hangs2", "hangs3"):
            shown = json.loads(listed("--within", "4", "--json"))
        # Three that hang cost what one does.
        assert time.monotonic() - begin < 3 * 4
        text = listed("--within", "20")
    found = {entry["name"]: entry for entry in shown}
    assert list(found) == sorted(found)
    assert {name: entry["state"] for name, entry in found.items()} == {
        "broken": "bad-config",
        "down": "not-running",
        **dict.fromkeys(("hangs1", "hangs2", "hangs3"), "no-answer"),
        "p": "up",
        "s": "up",
    }
    assert found["p"] | {"checkpoint-age": 0} == {
        "name": "p",
        "state": "up",
        "text": None,
        "mode": "primary",
        "stage": "running",
        "link": "in-sync",
        "checkpoint-age": 0,
        "lag-bytes": 0,
        "size-bytes": 1 << 20,
        "progress": None,
        "error": None,
    }
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["NAME", "MODE", "STAGE", "LINK", "CHECKPOINT", "LAG", "SIZE", "PROGRESS"]
    assert [line[0] for line in lines[1:]] == sorted(found)
    assert lines[-1][:4] == ["s", "secondary", "running", "in-sync"]
    assert "is not TOML" in text


def test_no_nodes(folder: Path) -> None:
    assert listed() == f"no nodes: there is no file NAME.toml in {folder}\n"
    assert listed("--json") == "[]\n"


@pytest.mark.parametrize(
    ("jobs", "progress"),
    [
        ([], None),
        ([{"type": "backup", "status": "running", "total-progress": 4, "current-progress": 1}], None),
        ([{"type": "resync", "status": "concluded", "total-progress": 4, "current-progress": 4}], None),
        ([{"type": "commit", "status": "running", "total-progress": 0, "current-progress": 0}], None),
        ([{"type": "resync", "status": "running", "total-progress": 8, "current-progress": 1}] * 2, 12.5),
    ],
)
def test_progress(jobs: list[dict[str, Any]], progress: float | None) -> None:
    assert listing.entry_of("a", {}, jobs).progress == progress


def test_lag_is_what_the_secondary_lacks() -> None:
    disks = [{"forward-queue-bytes": 1, "out-of-sync-bytes": 2, "size": 8}, {"out-of-sync-bytes": 4, "size": 8}]
    entry = listing.entry_of("a", {"disks": disks, "error": {"desc": "link lost"}}, [])
    assert (entry.lag_bytes, entry.size_bytes, entry.error) == (7, 16, "link lost")
    assert list(listing.table([entry]))[-1].endswith("link lost")
