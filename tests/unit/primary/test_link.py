# SPDX-License-Identifier: BSD-3-Clause
"""link.py: what becomes of a link that only some of the disks could take."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from lab import Lab, make_raw, wait_until
from replication.events import Event, EventHub
from replication.node import Node
from replication.options import DiskOptions, Options
from replication.record.state import StateFolder
from replication.stage import Mode

SIZE = 1 << 20


@pytest.mark.parametrize("when", ["at the start", "when it comes back"])
def test_a_link_that_one_of_the_disks_cannot_take_is_lost_and_comes_back(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The other disk's thread uses its connection already: it must not be closed under it, nor forward alone."""
    server = lab.endpoint(size=SIZE)
    disks = [DiskOptions(name, str(make_raw(tmp_path / name, SIZE)), None) for name in ("first", "second")]
    states: list[str] = []

    def note(event: Event) -> None:
        if event["event"] == "REPLICATION_LINK":
            states.append(event["data"]["state"])

    hub = EventHub()
    hub.subscribe(note)
    node = Node(Options(Mode.PRIMARY, disks, str(tmp_path / "state"), None), hub, StateFolder(str(tmp_path / "state")))
    node.launch()
    if when == "when it comes back":
        node.start(Mode.PRIMARY, server.uri(), "none")
        wait_until(lambda: states[-1:] == ["in-sync"], "the link is up")
    start, begun = threading.Thread.start, []

    def second_fails(thread: threading.Thread) -> None:
        if thread.name == "forward":
            begun.append(thread)
            if len(begun) == 2:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    states.clear()
    if when == "at the start":
        node.start(Mode.PRIMARY, server.uri(), "none")
    else:
        server.restart(signal.SIGKILL)
    wait_until(lambda: "in-sync" in states, "the link has come back")
    assert len(begun) == 4
    assert "lost" in states
    side = node.side
    for disk in side.disks:  # type: ignore[attr-defined]
        assert disk.forwarder.up
        disk.write(memoryview(b"x" * 4096), 0, False)
        assert disk.finish_barrier(disk.begin_barrier())
    node.close()


def test_a_write_that_found_no_link_is_sent_although_it_is_marked_when_all_seems_to_be_there(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for a checkpoint here: the link must not be called in sync for good."""
    server = lab.endpoint(size=SIZE)
    disks = [DiskOptions("disk0", str(make_raw(tmp_path / "disk0", SIZE)), None)]
    node = Node(
        Options(Mode.PRIMARY, disks, str(tmp_path / "state"), None), EventHub(), StateFolder(str(tmp_path / "state"))
    )
    node.launch()
    node.start(Mode.PRIMARY, server.uri(), "none")
    disk = node.side.disks[0]  # type: ignore[attr-defined]
    wait_until(lambda: node.query()["link"]["state"] == "in-sync", "the link is up")
    server.kill()
    wait_until(lambda: not disk.forwarder.up, "the link is lost")
    come, go_on = threading.Event(), threading.Event()

    def held() -> None:
        come.set()
        assert go_on.wait(30)

    monkeypatch.setattr(node._ancestry, "part", held)
    guest = threading.Thread(target=disk.write, args=(memoryview(b"x" * 4096), 0, False), daemon=True)
    guest.start()
    assert come.wait(30)
    server.start()
    wait_until(lambda: node.query()["link"]["state"] == "in-sync", "nothing seems to be missing")
    go_on.set()
    guest.join(30)
    wait_until(lambda: not disk.changes.marked_bytes, "it was sent")
    wait_until(lambda: node.query()["link"]["state"] == "in-sync", "the link is in sync again")
    node.close()
