# SPDX-License-Identifier: BSD-3-Clause
"""With every file system of the states full: what records a transition has its space beforehand. And what is in use
must stay: a checkpoint notices what was removed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import MIB, Lab, Pair, QmpError, SmallFolder, changed, pattern, whole

OLD = pattern(1, MIB)
NEW = pattern(2, 64 << 10)


@pytest.fixture
def pair(lab: Lab, small_folder: Callable[[int], SmallFolder]) -> Pair:
    """A running pair, in sync, with a checkpoint. Its states share a small file system, which is full now."""
    made = Pair(lab.folder, (MIB,), contents=(OLD, OLD))
    small = small_folder(16 * MIB)
    for server in (made.primary, made.secondary):
        (small.folder / server.name).mkdir()
        os.symlink(small.folder / server.name, server.state)
        lab.add(server)
    made.start()
    made.start_replication()
    made.primary.connect("disk0").pwrite(NEW, 0)
    made.primary.execute("replication-checkpoint")
    small.fill()
    return made


@pytest.mark.parametrize("restart", [False, True], ids=["at once", "after a kill"])
def test_failover_works_with_every_state_folder_full(pair: Pair, restart: bool) -> None:
    """Wrong: state.json is a new file, for which there is no room, and the stage stays running."""
    pair.primary.kill()
    if restart:
        pair.secondary.restart(signal.SIGKILL)
        assert pair.secondary.status()["stage"] == "running"
    pair.secondary.failover()
    assert pair.secondary.disks[0].read_bytes() == changed(OLD, (0, NEW))
    pair.secondary.restart(signal.SIGKILL)
    assert pair.secondary.status()["stage"] == "done"
    assert whole(pair.secondary.connect("top0")) == changed(OLD, (0, NEW))


def test_a_planned_stop_and_a_new_start_work_with_every_state_folder_full(pair: Pair) -> None:
    pair.primary.execute("replication-checkpoint")
    pair.primary.execute("replication-stop")
    pair.secondary.execute("replication-stop")
    assert [server.status()["stage"] for server in (pair.primary, pair.secondary)] == ["done", "done"]
    pair.primary.restart(signal.SIGTERM)
    assert pair.primary.status()["stage"] == "done"
    assert whole(pair.secondary.connect("top0")) == changed(OLD, (0, NEW))


# -- what is in use was removed ----------------------------------------------------------------------------------


@pytest.fixture
def running(lab: Lab) -> Pair:
    made = lab.pair((MIB,), contents=(OLD, OLD))
    made.start_replication()
    made.primary.connect("disk0").pwrite(NEW, 0)
    made.primary.execute("replication-checkpoint")
    return made


def secondary_file(name: str) -> Callable[[Pair], Path]:
    return lambda pair: pair.secondary.state / name


REMOVED = {
    "hidden's data": (secondary_file("disk0.hidden.data"), 6),
    "active's image": (secondary_file("disk0.active.qcow2"), 6),
    "a map": (secondary_file("disk0.lost"), 6),
    "the record": (secondary_file("state.json"), 6),
    "the epoch": (secondary_file("epoch"), 6),
    "the disk": (lambda pair: pair.secondary.disks[0], 4),
}


@pytest.mark.parametrize("what", REMOVED)
def test_a_file_that_was_removed_while_in_use_is_noticed_by_the_next_checkpoint(running: Pair, what: str) -> None:
    """Wrong: checkpoints go on, into files that end with the process."""
    where, case = REMOVED[what]
    path = where(running)
    monitor = running.secondary.qmp()
    path.rename(path.with_suffix(".away"))
    with pytest.raises(QmpError, match=f"{path.name} was removed"):
        running.secondary.execute("replication-checkpoint")
    assert monitor.wait_event("REPLICATION_ERROR")["data"]["case"] == case
    assert running.secondary.status()["error"]["case"] == case
    with pytest.raises(QmpError, match="was removed"):
        running.primary.execute("replication-checkpoint")


@pytest.mark.parametrize("name", ["disk0.changes", "state.json", "epoch"])
def test_a_file_of_the_primary_that_was_removed_while_in_use_is_noticed(running: Pair, name: str) -> None:
    (running.primary.state / name).unlink()
    with pytest.raises(QmpError, match=f"{name} was removed or replaced while in use"):
        running.primary.execute("replication-checkpoint")
    assert running.primary.connect("disk0").pread(len(NEW), 0) == NEW
