# SPDX-License-Identifier: BSD-3-Clause
"""link.py: what becomes of a link that only some of the disks could take, and what the log says of one that is lost."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from content import make_raw
from lab import Lab
from replication.errors import ReplicationError
from replication.events import Event, EventHub
from replication.node import Node
from replication.options import DiskOptions, Options
from replication.record.state import StateFolder
from replication.stage import Mode
from waiting import wait_until

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
    assert disk.forwarder.wait_down(30), "and has given back what it had: that is missing, and the write is none of it"
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


def test_what_was_too_early_to_be_told_is_told_when_it_goes_on(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a start the secondary may still be starting, too: in the first `timeout` seconds nothing is said of it."""
    said: list[str] = []
    monkeypatch.setattr("replication.primary.link.log", said.append)
    server = lab.endpoint(size=SIZE)
    disks = [DiskOptions("disk0", str(make_raw(tmp_path / "disk0", SIZE)), None)]
    options = Options(Mode.PRIMARY, disks, str(tmp_path / "state"), None, timeout_s=1.0)
    node = Node(options, EventHub(), StateFolder(options.state))
    node.launch()
    node.start(Mode.PRIMARY, server.uri(), "none")
    wait_until(lambda: node.query()["link"]["state"] == "in-sync", "the link is up")
    server.kill()
    wait_until(lambda: node.query()["link"]["state"] == "lost", "the link is lost")
    wait_until(lambda: len(said) == 2, "both are told: that it is lost, and why it does not come back")
    assert said[0].startswith("the link to the secondary is lost: ")
    assert said[1].startswith(f"no link to the secondary: cannot connect to {server.uri()}")
    server.start()
    wait_until(lambda: node.query()["link"]["state"] == "in-sync", "the link is up again")
    assert said[2:] == ["the link to the secondary is up again"]
    node.close()


def test_a_secondary_that_is_not_there_after_a_restart_is_told_once(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = lab.endpoint(size=SIZE)
    disks = [DiskOptions("disk0", str(make_raw(tmp_path / "disk0", SIZE)), None)]
    # The first attempt is within that time.
    options = Options(Mode.PRIMARY, disks, str(tmp_path / "state"), None, timeout_s=3.0)
    node = Node(options, EventHub(), StateFolder(options.state))
    node.launch()
    node.start(Mode.PRIMARY, server.uri(), "none")
    node.close()
    server.kill()
    said: list[str] = []
    monkeypatch.setattr("replication.primary.link.log", said.append)
    node = Node(options, EventHub(), StateFolder(options.state))
    attempts = threading.Semaphore(0)
    failed = node.side._link._failed  # type: ignore[attr-defined]

    def counted(error: ReplicationError, tell: bool) -> None:
        failed(error, tell)
        attempts.release()

    monkeypatch.setattr(node.side._link, "_failed", counted)  # type: ignore[attr-defined]
    node.launch()
    assert attempts.acquire(timeout=30)
    assert said == []
    wait_until(lambda: said, "it is told")
    for _ in range(2):
        assert attempts.acquire(timeout=30)
    assert [line for line in said if not line.startswith("no link to the secondary: cannot connect")] == []
    assert len(said) == 1
    node.close()
