# SPDX-License-Identifier: BSD-3-Clause
"""What a person does with replctl on a real pair: look at what a failover would cost, and switch over."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from commandline import replctl
from content import KIB, MIB, pattern, whole
from lab import Lab
from nodes import Pair, drained, refused
from waiting import DEADLINE_S

OLD, NEW = pattern(1, MIB), pattern(2, 64 * KIB)


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """In `running`, with equal disks."""
    made = lab.pair([MIB], contents=[OLD])
    made.start_replication()
    return made


def preflight(pair: Pair) -> dict[str, Any]:
    answer: dict[str, Any] = pair.secondary.execute("query-failover")
    return answer


def test_the_preflight_says_what_would_be_lost_and_what_is_to_be_done(pair: Pair) -> None:
    first = preflight(pair)
    assert (first["allowed"], first["stage"], first["epoch"], first["bytes-to-commit"]) == (True, "running", 1, 0)
    assert "reason" not in first
    pair.primary.connect("disk0").pwrite(NEW, 4 * KIB)
    drained(pair.primary)
    pair.secondary.connect("top0").pwrite(NEW[: 8 * KIB], 0)  # 4 KiB of it where hidden holds the block, too
    then = preflight(pair)
    assert then["bytes-to-commit"] == 68 * KIB
    assert then["predicted-seconds"] == pytest.approx(68 * KIB / then["commit-rate"])
    assert 0 < first["checkpoint-age"] < then["checkpoint-age"] < 60
    pair.primary.checkpoint()
    last = preflight(pair)
    assert (last["epoch"], last["bytes-to-commit"]) == (2, 0)
    assert last["checkpoint-age"] < then["checkpoint-age"]


def test_the_speed_of_a_commit_is_remembered_for_the_next_prediction(lab: Lab) -> None:
    size = 32 * MIB
    secondary = lab.secondary([size])
    secondary.start_replication()
    assumed = secondary.execute("query-failover")["commit-rate"]
    guest = secondary.connect("top0")
    for offset in range(0, size, MIB):
        guest.pwrite(pattern(offset, MIB), offset)
    secondary.failover()
    secondary.restart()
    measured = secondary.execute("query-failover")["commit-rate"]
    assert measured != assumed
    assert 1e6 < measured < 1e11


def test_the_preflight_names_the_reason_where_failover_is_not_possible(lab: Lab) -> None:
    secondary = lab.secondary()
    answer = secondary.execute("query-failover")
    assert (answer["allowed"], answer["reason"]) == (False, "Block replication is not running")
    assert (answer["checkpoint-age"], answer["force"]) == (None, False)
    secondary.start_replication()
    secondary.failover()
    answer = secondary.execute("query-failover")
    assert (answer["allowed"], answer["stage"], answer["bytes-to-commit"]) == (False, "done", 0)
    assert "failed over already" in answer["reason"]


def test_a_primary_has_no_preflight(pair: Pair) -> None:
    assert "secondary" in refused(pair.primary, "query-failover")


def test_failover_by_hand_shows_the_preflight_first(pair: Pair) -> None:
    done = replctl("--state", pair.secondary.state, "failover", "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("failover allowed   yes\n")
    pair.secondary.wait_stage("done")
    again = replctl("--state", pair.secondary.state, "failover", "--yes")
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "nothing to do")


@pytest.mark.parametrize("asked_at", ["primary", "secondary"])
def test_a_switch_over_moves_everything_and_back_only_what_has_changed_is_sent(lab: Lab, asked_at: str) -> None:
    pair = lab.pair([MIB], contents=[OLD])
    pair.start_replication()
    pair.primary.connect("disk0").pwrite(NEW, 4 * KIB)
    sides = [pair.primary, pair.secondary]
    here, there = sides if asked_at == "primary" else sides[::-1]
    done = replctl("--state", here.state, "switchover", "--yes", "--peer", there.control_path)
    assert done.returncode == 0, done.stderr
    assert [side.status()["stage"] for side in sides] == ["done", "done"]
    guest = pair.secondary.connect("top0")
    assert whole(guest) == OLD[: 4 * KIB] + NEW + OLD[68 * KIB :]
    guest.pwrite(NEW, 128 * KIB)
    # The old primary becomes the new secondary, on the disk and with the state folder that it has.
    pair.primary.terminate()
    returned = lab.secondary([MIB], name="primary")
    started = replctl("--state", pair.secondary.state, "start", "--mode", "primary", "--secondary", returned.uri())
    assert started.returncode == 0, started.stderr
    pair.secondary.execute("replication-checkpoint")
    assert replctl("--state", returned.state, "start").returncode == 0  # the checkpoint has started it already
    assert pair.secondary.status()["disks"][0]["totals"]["forwarded"] == 64 * KIB
    guest.pwrite(NEW, 512 * KIB)
    # And home again.
    done = replctl("--state", pair.secondary.state, "switchover", "--yes", "--peer", returned.control_path)
    assert done.returncode == 0, done.stderr
    assert whole(returned.connect("top0")) == whole(guest) == pair.secondary.disks[0].read_bytes()


def test_a_switch_over_of_a_pair_whose_guest_still_writes_changes_nothing(pair: Pair) -> None:
    writer = pair.primary.connect("disk0")
    stop = threading.Event()

    def write() -> None:
        offset = 0
        while not stop.is_set():  # a few hundred times between any two steps of replctl
            writer.pwrite(NEW[: 4 * KIB], offset)
            offset = (offset + 4 * KIB) % MIB

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write)
        try:
            done = replctl("--state", pair.primary.state, "switchover", "--yes", "--peer", pair.secondary.control_path)
        finally:
            stop.set()
        writing.result(timeout=DEADLINE_S)
    assert done.returncode == 1, done.stdout
    assert "still writes" in done.stderr
    assert "replicates again" in done.stderr
    assert [side.status()["stage"] for side in (pair.primary, pair.secondary)] == ["running", "running"]
    pair.primary.checkpoint()
    assert pair.primary.disks[0].read_bytes() == pair.secondary.disks[0].read_bytes()
