# SPDX-License-Identifier: BSD-3-Clause
"""Starts that compare: `sync=digest` sends what differs and nothing else, `sync=verify` looks into what it believed."""

from __future__ import annotations

import os
import random
import shutil
import threading
from typing import Any

import pytest

from content import KIB, MIB, make_raw, pattern, whole
from lab import Lab
from nodes import Pair, in_sync, refused
from qmp import QmpError
from waiting import DEADLINE_S, begin, chance, wait_until

GRAIN = 64 * KIB
BLOCK = 4 * KIB
SIZE = 6 * MIB + 5 * BLOCK + 100
OLD = pattern(1, SIZE)
DIFFERENT = (3 * GRAIN, 40 * GRAIN, 41 * GRAIN, SIZE // GRAIN * GRAIN)
"""Offsets of the grains in which the secondary's old copy is another one."""
SENT = 3 * GRAIN + SIZE % GRAIN


class Copied:
    """Two new nodes, of which the secondary has an old copy of the primary's disk, and runs already."""

    def __init__(self, lab: Lab, **options: Any) -> None:
        self.points = lab.pause_points()
        self.pair: Pair = lab.pair(
            [SIZE],
            contents=[OLD],
            primary_arguments=["timeout=30", *options.pop("primary_arguments", ())],
            primary_options={"extra_environment": self.points.environment},
            **options,
        )
        self.primary, self.secondary = self.pair.primary, self.pair.secondary
        with open(self.secondary.disks[0], "r+b") as file:
            for offset in DIFFERENT:
                file.seek(offset + 77)
                file.write(bytes([OLD[offset + 77] ^ 1]))
        self.secondary.start_replication()

    def start(self, sync: str = "digest", **arguments: Any) -> None:
        self.primary.execute("replication-start", sync=sync, **arguments)

    @property
    def forwarded(self) -> int:
        """Bytes that the secondary has taken."""
        total: int = self.primary.status()["disks"][0]["totals"]["forwarded"]
        return total

    def equal_in_the_end(self) -> None:
        """The next checkpoint makes both sides equal."""
        in_sync(self.primary)
        self.primary.checkpoint()
        content = whole(self.primary.connect("disk0"))
        assert whole(self.secondary.connect("disk0")) == content
        assert whole(self.secondary.connect("top0")) == content
        assert self.secondary.status()["consistent"] is True


@pytest.fixture
def copied(lab: Lab) -> Copied:
    return Copied(lab)


def test_only_what_differs_is_sent(copied: Copied) -> None:
    with copied.primary.qmp() as qmp:
        qmp.execute("replication-start", {"sync": "digest"})
        done = qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "concluded")
    assert done["data"]["id"] == "resync-disk0"
    copied.equal_in_the_end()
    assert copied.forwarded == SENT


def test_without_digests_everything_would_be(copied: Copied) -> None:
    copied.start("full")
    copied.equal_in_the_end()
    assert copied.forwarded == SIZE


def test_two_new_nodes_are_not_believed_until_it_is_proven(copied: Copied) -> None:
    """As with sync=full, nothing there counts before; and a guest that writes where it is being looked waits."""
    copied.points.arm("verify.read")
    copied.start()
    copied.points.wait_hit("verify.read")
    assert copied.primary.status()["link"]["state"] == "synchronizing"
    assert copied.secondary.status()["consistent"] is False
    assert copied.secondary.execute("query-failover")["allowed"] is False
    assert copied.primary.status()["disks"][0]["missing-bytes"] == SIZE
    guest = copied.primary.connect("disk0")
    writing = begin(guest.pwrite, pattern(2, 3 * BLOCK), GRAIN)
    assert not chance(writing)
    copied.points.release("verify.read")
    writing.result(DEADLINE_S)
    copied.equal_in_the_end()
    assert copied.forwarded < SIZE / 2


def test_a_guest_may_write_all_the_time(copied: Copied) -> None:
    guest, stop = copied.primary.connect("disk0"), threading.Event()

    def write() -> None:
        chosen = random.Random(1)
        while not stop.is_set():
            length = chosen.randrange(1, 3 * GRAIN)
            guest.pwrite(pattern(chosen.randrange(1 << 20), length), chosen.randrange(SIZE - length))

    writing = begin(write)
    try:
        copied.start()
        in_sync(copied.primary)
        for _ in range(2):
            copied.primary.execute("replication-stop")
            copied.start(secondary=copied.secondary.uri())
            in_sync(copied.primary)
    finally:
        stop.set()
        writing.result(DEADLINE_S)
    copied.equal_in_the_end()


def test_a_link_that_is_lost_goes_on_with_digests(copied: Copied) -> None:
    copied.points.arm("verify.read")
    copied.start()
    copied.points.wait_hit("verify.read")
    copied.secondary.kill()
    copied.points.release("verify.read")
    wait_until(lambda: copied.primary.status()["link"]["state"] == "lost", "the link is lost")
    copied.secondary.start()
    copied.equal_in_the_end()
    assert copied.forwarded == SENT


def test_a_write_that_the_secondary_does_not_get_stays_missing(copied: Copied) -> None:
    """It is in the grain that is being asked of, behind the question; then the link is lost."""
    copied.points.arm("verify.read")
    copied.start()
    copied.points.wait_hit("verify.read")
    copied.secondary.kill()
    guest = copied.primary.connect("disk0")
    writing = begin(guest.pwrite, pattern(3, BLOCK), GRAIN)
    copied.points.release("verify.read")
    writing.result(DEADLINE_S)
    copied.secondary.start()
    copied.equal_in_the_end()


def test_a_start_that_verifies_finds_and_sends_what_differs(copied: Copied) -> None:
    copied.start("verify")

    def ended() -> dict[str, Any] | None:
        status = copied.primary.status()
        last: dict[str, Any] | None = status["last-verify"]
        return None if status["verify"] is not None else last

    result = wait_until(ended, "the comparison ends")
    assert (result["result"], result["repair"], result["different-bytes"]) == ("different", True, SENT)
    copied.equal_in_the_end()


def test_grown_disks_are_a_pair_again_without_being_sent(copied: Copied) -> None:
    """With new state folders, as it was before there was a resize, and still is where the former ones are lost."""
    copied.start()
    copied.equal_in_the_end()
    for node in (copied.primary, copied.secondary):
        node.terminate()
        os.truncate(node.disks[0], SIZE + 3 * MIB)
        shutil.rmtree(node.state)
    copied.secondary.start()
    copied.secondary.start_replication()
    copied.primary.start()
    copied.start()
    copied.equal_in_the_end()
    assert copied.forwarded == 0
    copied.primary.connect("disk0").pwrite(pattern(4, BLOCK), SIZE + 2 * MIB)
    copied.equal_in_the_end()


@pytest.mark.parametrize("sync", ["digest", "verify"])
def test_who_tells_no_digests_is_refused_and_nothing_has_begun(lab: Lab, sync: str) -> None:
    endpoint = lab.endpoint(path=make_raw(lab.folder / "plain.raw", MIB))
    primary = lab.primary(endpoint.uri(), [MIB])
    text = refused(primary, "replication-start", {"sync": sync})
    assert "is a plain NBD server, which tells no digests" in text
    status = primary.status()
    assert (status["stage"], status["disks"][0]["out-of-sync-bytes"]) == ("none", 0)


@pytest.mark.parametrize("sync", ["digest", "verify"])
def test_it_is_for_a_primary_with_a_disk(lab: Lab, copied: Copied, sync: str) -> None:
    with pytest.raises(QmpError, match="is for the primary"):
        lab.secondary([MIB], name="other").execute("replication-start", sync=sync)
