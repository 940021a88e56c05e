# SPDX-License-Identifier: BSD-3-Clause
"""A secondary whose disk is slow, or hangs: the guest waits no longer than it was promised."""

from __future__ import annotations

import time

import pytest

from heldendpoint import HeldEndpoint
from lab import MIB, Lab, Primary, Server, pattern, wait_until

BLOCK = 4096
TIMEOUT_S = 2.0
SLACK_S = 5.0
"""For a busy machine; with it, still less than the four timeouts that a request may take."""


def secondary_over(lab: Lab, uri: str) -> Server:
    """A running secondary whose disk is there."""
    arguments = ["mode=secondary", f"state={lab.folder / 'secondary.state'}", f"disk=disk0:{uri}", "top-id=top0"]
    secondary = lab.start(Server(lab.folder, "secondary", arguments))
    secondary.execute("replication-start")
    return secondary


def primary_of(lab: Lab, secondary: Server, size: int, *arguments: str) -> Primary:
    """Its primary, in sync, with a disk of zeroes."""
    options = [f"timeout={TIMEOUT_S:g}", *arguments]
    primary = lab.start(Primary(lab.folder, secondary.uri(), [size], extra_arguments=options))
    primary.execute("replication-start", sync="none")
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the pair is in sync")
    return primary


@pytest.mark.parametrize(
    "arguments", [("protocol=sync",), ("protocol=sync", "queue-limit=1M")], ids=["", "small-queue"]
)
def test_a_guest_of_sync_waits_once_for_a_disk_that_hangs_and_the_pair_mends_itself(
    lab: Lab, arguments: tuple[str, ...]
) -> None:
    path = lab.folder / "below.raw"
    path.write_bytes(bytes(MIB))
    below = lab.start(HeldEndpoint(lab.folder, path))
    primary = primary_of(lab, secondary_over(lab, below.uri()), MIB, *arguments)
    guest = primary.connect("disk0")
    below.points.arm("pwrite.before")
    begun = time.monotonic()
    guest.pwrite(pattern(1, BLOCK), 0)
    guest.flush()
    waited_s = time.monotonic() - begun
    below.points.wait_hit("pwrite.before")
    assert waited_s < 1.25 * TIMEOUT_S + SLACK_S
    begun = time.monotonic()
    for at in range(BLOCK, 20 * BLOCK, BLOCK):
        guest.pwrite(pattern(2, BLOCK), at)
    assert time.monotonic() - begun < 2 * SLACK_S, "who is behind is waited for once"
    below.points.release("pwrite.before")
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "it has caught up")
    primary.execute("replication-checkpoint")
    assert (
        path.read_bytes()
        == primary.disks[0].read_bytes()
        == pattern(1, BLOCK) + pattern(2, BLOCK) * 19 + bytes(MIB - 20 * BLOCK)
    )


def test_a_trim_that_takes_the_secondary_many_timeouts_does_not_lose_the_link(lab: Lab) -> None:
    """It copies what the trim destroys, at 8 MiB a second: 32 MiB are twice the timeout."""
    size = 32 * MIB
    path = lab.folder / "below.raw"
    path.write_bytes(b"x" * size)
    below = lab.endpoint(path=path, name="below", filters=("rate",), filter_arguments=(f"rate={8 * 8}M",))
    primary = primary_of(lab, secondary_over(lab, below.uri()), size)
    with primary.qmp() as watch:
        primary.connect("disk0").trim(size, 0)
        wait_until(lambda: primary.status()["disks"][0]["out-of-sync-bytes"] == 0, "the secondary has it")
        assert primary.status()["error"] is None
        primary.execute("replication-checkpoint")
        watch.execute("query-version")
        assert [event for event in watch.events if event["event"] == "REPLICATION_LINK"] == []
    assert path.read_bytes() == bytes(size)
