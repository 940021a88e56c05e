# SPDX-License-Identifier: BSD-3-Clause
"""fill.py: when a look is due, at which level it warns, and when it warns again. The file system is the test's."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from content import make_raw, pattern
from replication.disk.file import FileDisk
from replication.events import EventHub
from replication.image import qcow2
from replication.image.overlay import Overlay
from replication.image.qcow2 import BLOCK, CLUSTER
from replication.image.stack import Stack
from replication.secondary import fill
from replication.secondary.fill import FillWatch

SIZE = 64 * CLUSTER
FRAME = 4096


class Bench:
    """A stack on a file system of 1000 frames, of which `used` are not available."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, watermark: float) -> None:
        make_raw(folder / "disk", SIZE, pattern(1, SIZE))
        for name in ("active", "hidden"):
            qcow2.create(str(folder / f"{name}.qcow2"), str(folder / "disk"), "raw", SIZE)
        active, hidden = (Overlay(name, "disk0", str(folder / f"{name}.qcow2")) for name in ("active", "hidden"))
        self.stack = Stack(active, hidden, FileDisk("disk0", str(folder / "disk")))
        for overlay in (active, hidden):
            overlay.data.discard(0, overlay.data.size)  # qemu-img has taken a block on some file systems
        self.frames, self.used = 1000, 0
        self.asked: list[str] = []
        monkeypatch.setattr(fill.os, "statvfs", self.statvfs)
        hub = EventHub()
        self.events: list[dict[str, Any]] = []
        hub.subscribe(lambda event: self.events.append(event["data"]))
        self.watch = FillWatch([("disk0", self.stack)], watermark, hub)
        self.asked.clear()

    def statvfs(self, path: str) -> Any:
        self.asked.append(os.path.basename(path))
        return SimpleNamespace(f_blocks=self.frames, f_bavail=self.frames - self.used, f_frsize=FRAME)

    def close(self) -> None:
        self.stack.close()
        self.stack.disk.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    opened = Bench(tmp_path, monkeypatch, 80.0)
    yield opened
    opened.close()


def test_at_the_watermark_there_is_one_event_with_what_is_known(bench: Bench) -> None:
    active = bench.stack.active
    bench.used = 799
    bench.watch.look("disk0", active)
    assert bench.events == []
    bench.used = 800
    bench.watch.look("disk0", active)
    assert bench.events == [
        {
            "disk": "disk0",
            "overlay": "active",
            "path": active.path,
            "used": 800 * FRAME,
            "size": 1000 * FRAME,
            "percent": 80.0,
        }
    ]
    bench.used = 900
    bench.watch.look("disk0", active)
    assert len(bench.events) == 1, "once"


def test_the_limit_is_what_it_holds_and_the_room_at_the_last_look(bench: Bench) -> None:
    active, hidden = bench.stack.active, bench.stack.hidden
    bench.stack.write_top(pattern(2, 4 * BLOCK), 0)
    held = active.data_blocks * BLOCK
    assert held
    bench.used = 990
    bench.watch.look("disk0", active)
    limit = bench.watch.limit(active)
    assert limit is not None
    assert held + 10 * FRAME <= limit <= held + 10 * FRAME + active.data.status().st_blocks * 512
    bench.used = 0
    assert bench.watch.limit(active) == limit
    assert bench.watch.limit(hidden) == 1000 * FRAME, "as of when it was opened"
    bench.frames = 10**9
    bench.watch.look("disk0", active)
    assert bench.watch.limit(active) == SIZE


def test_the_limit_is_known_before_anything_grows(bench: Bench) -> None:
    """After a restart, too: what the overlay holds counts to what it can hold."""
    active = bench.stack.active
    bench.stack.write_top(pattern(2, 4 * BLOCK), 0)
    bench.used = 990
    watch = FillWatch([("disk0", bench.stack)], 80.0, EventHub())
    limit = watch.limit(active)
    assert limit is not None
    held = active.data_blocks * BLOCK + 10 * FRAME
    assert held <= limit <= held + active.data.status().st_blocks * 512
    assert bench.events == [], "it is no growth"


def test_a_file_system_that_cannot_be_seen_keeps_no_secondary_from_opening(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: str) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fill.os, "statvfs", fails)
    watch = FillWatch([("disk0", bench.stack)], 80.0, EventHub())
    assert watch.limit(bench.stack.active) is None


def test_it_warns_again_after_the_level_was_lower(bench: Bench) -> None:
    for used in (850, 799, 850):
        bench.used = used
        bench.watch.look("disk0", bench.stack.hidden)
    assert [event["overlay"] for event in bench.events] == ["hidden", "hidden"]


def test_active_and_hidden_warn_each_for_itself(bench: Bench) -> None:
    bench.used = 850
    for overlay in (bench.stack.active, bench.stack.hidden, bench.stack.active):
        bench.watch.look("disk0", overlay)
    assert [event["overlay"] for event in bench.events] == ["active", "hidden"]
    assert bench.asked == ["active.data", "hidden.data", "active.data"]


@pytest.mark.parametrize(
    ("used", "blocks"),
    [(0, 200), (400, 100), (600, 50), (700, 32), (799, 32), (800, 32), (1000, 50)],
    ids=str,
)
def test_the_emptier_the_file_system_the_later_the_next_look_of_the_two_that_share_it(
    bench: Bench, used: int, blocks: int
) -> None:
    bench.stack.write_top(memoryview(b"\xaa" * (10 * BLOCK)), 0)
    bench.used = used
    bench.watch.look("disk0", bench.stack.active)
    assert bench.stack.active.watch_at == 10 + blocks


def test_what_the_overlays_could_give_back_does_not_count(bench: Bench) -> None:
    bench.stack.write_top(memoryview(b"\xaa" * (100 * BLOCK)), 0)
    bench.stack.target.write(memoryview(b"\xbb" * (100 * BLOCK)), 0, False)
    stale = sum(overlay.data.status().st_blocks * 512 for overlay in (bench.stack.active, bench.stack.hidden))
    assert stale >= 200 * BLOCK
    bench.used = 900
    bench.watch.look("disk0", bench.stack.active)
    (event,) = bench.events
    held = bench.stack.active.bytes_held + bench.stack.hidden.bytes_held
    assert event["used"] == 900 * FRAME - (stale - held)
    bench.stack.empty()
    bench.watch.look("disk0", bench.stack.active)
    bench.watch.look("disk0", bench.stack.hidden)
    assert len(bench.events) == 1, "after a checkpoint it is not full any more"


def test_an_overlay_on_another_file_system_gives_nothing_back_here(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.stack.target.write(memoryview(b"\xbb" * (100 * BLOCK)), 0, False)
    bench.stack.empty()
    there = bench.stack.hidden.data.status()
    other = SimpleNamespace(st_dev=there.st_dev + 1, st_blocks=there.st_blocks)
    monkeypatch.setattr(bench.stack.hidden.data, "status", lambda: other)
    bench.used = 800
    bench.watch.look("disk0", bench.stack.active)
    assert [event["used"] for event in bench.events] == [800 * FRAME]


def test_a_look_at_one_overlay_brings_the_look_at_the_others_of_its_file_system_nearer(bench: Bench) -> None:
    active, hidden = bench.stack.active, bench.stack.hidden
    bench.watch.look("disk0", hidden)
    assert hidden.watch_at == 200
    bench.used = 600
    bench.watch.look("disk0", active)
    assert (active.watch_at, hidden.watch_at) == (50, 50)
    bench.used = 0
    bench.watch.look("disk0", active)
    assert (active.watch_at, hidden.watch_at) == (200, 50)


def test_looks_come_while_an_overlay_grows_and_not_at_every_write(bench: Bench) -> None:
    bench.used = 790
    for block in range(200):
        bench.stack.write_top(memoryview(b"\xaa" * BLOCK), block * BLOCK)
    assert bench.asked == ["active.data"] * 7, "at the first block and every 32 from there"
    for block in range(200):
        bench.stack.write_top(memoryview(b"\xbb" * BLOCK), block * BLOCK)
    bench.stack.zero_top(300 * BLOCK, 500 * BLOCK)
    assert len(bench.asked) == 7, "what is overwritten, or only marked as zeroes, takes no space"
    bench.stack.empty()
    bench.stack.write_top(memoryview(b"\xaa" * BLOCK), 0)
    assert len(bench.asked) == 8, "an emptied overlay is looked at anew"


def test_a_single_request_after_a_checkpoint_that_fills_everything_again_warns_again(bench: Bench) -> None:
    bench.used = 900
    for _ in range(2):
        bench.stack.write_top(memoryview(b"\xaa" * (200 * BLOCK)), 0)
        bench.stack.empty()
    assert [event["percent"] for event in bench.events] == [90.0, 90.0]


def test_copy_before_write_is_watched_too(bench: Bench) -> None:
    bench.used = 990
    bench.stack.target.write(memoryview(b"\xbb" * BLOCK), 0, False)
    assert [event["overlay"] for event in bench.events] == ["hidden"]


def test_a_file_system_without_limit_is_not_looked_at_again(bench: Bench) -> None:
    bench.frames = 0
    bench.watch.look("disk0", bench.stack.active)
    assert bench.events == []
    assert bench.stack.active.watch_at == sys.maxsize


def test_a_level_that_cannot_be_seen_is_said_and_fails_no_write(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: str) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fill.os, "statvfs", broken)
    bench.stack.write_top(memoryview(b"\xaa" * BLOCK), 0)
    bench.stack.write_top(memoryview(b"\xaa" * BLOCK), BLOCK)
    said = capsys.readouterr().err
    assert said.count("cannot see how full the file system of") == 1
    assert "Input/output error" in said
    assert bench.stack.active.watch_at == sys.maxsize


def test_another_watermark_counts_from_the_next_write_on_that_grows(bench: Bench) -> None:
    bench.used = 700
    bench.watch.look("disk0", bench.stack.active)
    assert bench.stack.active.watch_at > 0
    bench.watch.warn_at(60.0)
    assert bench.stack.active.watch_at == bench.stack.hidden.watch_at == 0, "the next one looks"
    bench.watch.look("disk0", bench.stack.active)
    assert [event["percent"] for event in bench.events] == [70.0]
    bench.watch.warn_at(90.0)
    bench.watch.look("disk0", bench.stack.active)
    assert len(bench.events) == 1
