# SPDX-License-Identifier: BSD-3-Clause
"""What a real pair tells of how long its requests take: both faces, the link, and why a guest has waited.

What holds a request up is held by a pause point for as long as the test looks; nothing is measured by a clock.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from checkout import REPOSITORY
from content import KIB, pattern
from lab import Lab
from nodes import Server, drained
from replication.order.latency import REASONS
from waiting import DEADLINE_S, begin, wait_until

BLOCK = 4 * KIB
HELD_S = 0.5
PATIENT = f"timeout={min(30.0, DEADLINE_S)}"
"""A request that is held by the test is not given up meanwhile."""


def told(node: Server) -> dict[str, Any]:
    answer: dict[str, Any] = node.execute("query-replication-latency")
    return answer


def requests(entries: list[dict[str, Any]], part: str | None = None) -> dict[tuple[str, str], int]:
    """(export, operation) -> how many there were, or how many of them have that part."""
    counted = {
        (one["export"], one["operation"]): one["total"] if part is None else one["parts"].get(part) for one in entries
    }
    return {name: sum(histogram["counts"]) for name, histogram in counted.items() if histogram is not None}


def trace(node: Server, *options: str) -> str:
    """What `replctl trace` prints."""
    command = [sys.executable, str(REPOSITORY / "scripts/replctl"), "--control", str(node.control_path), "trace"]
    return subprocess.run(
        [*command, *options], stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=True
    ).stdout


def stalled(node: Server, reason: str) -> dict[str, Any]:
    """The longest stall of the last hour, once it has that reason and is under way, and so long that nothing else that
    the request does will take longer."""

    def found() -> dict[str, Any] | None:
        stall: dict[str, Any] | None = node.status()["longest-stall"]
        return (
            stall
            if stall is not None and stall["under-way"] and stall["seconds"] > HELD_S and stall["reason"] == reason
            else None
        )

    stall: dict[str, Any] = wait_until(found, f"a request of {node.name} is known to wait: {reason}")
    return stall


def test_each_request_is_counted_once_on_the_face_that_it_came_to(lab: Lab) -> None:
    pair = lab.pair()
    pair.start_replication()
    guest, other = pair.primary.connect("disk0"), pair.secondary.connect("top0")
    for number in range(5):
        guest.pwrite(pattern(number, BLOCK), number * BLOCK)
    guest.pread(BLOCK, 0)
    guest.zero(BLOCK, 0)
    guest.flush()
    other.pwrite(pattern(9, BLOCK), 0)
    other.pread(BLOCK, 0)
    other.pread(BLOCK, 0)
    drained(pair.primary)

    def both() -> tuple[dict[str, Any], dict[str, Any]] | None:
        primary, secondary = told(pair.primary), told(pair.secondary)
        sent = [(one["export"], one["operation"], sum(one["total"]["counts"])) for one in secondary["target"]]
        known = [(one["export"], one["operation"], sum(one["total"]["counts"])) for one in primary["peer"] or ()]
        return (primary, secondary) if sent == known else None

    primary, secondary = wait_until(both, "the primary knows how long its secondary is at work")
    wanted = {("disk0", "write"): 5, ("disk0", "read"): 1, ("disk0", "zero"): 1, ("disk0", "flush"): 1}
    assert requests(primary["guest"]) == wanted
    assert requests(primary["guest"], "disk") == wanted
    assert primary["target"] == []
    assert requests(secondary["guest"]) == {("top0", "write"): 1, ("top0", "read"): 2}
    [link] = primary["link"]
    there = requests(secondary["target"])
    assert {name for name, _ in there} == {"disk0"}
    assert sum(link["answers"]["counts"]) == sum(there.values()), "each request that was sent has been answered once"
    assert link["answers"]["sum"] >= sum(one["total"]["sum"] for one in secondary["target"])
    longest = primary["longest-stall"]
    assert (longest["export"], longest["text"]) == ("disk0", REASONS[longest["reason"]])
    status = pair.primary.status()
    assert len(status["guest-stalls"]["counts"]) == len(status["guest-stalls"]["bounds"]) + 1


def test_a_synchronous_write_that_waits_for_the_secondary_is_known_while_it_does(lab: Lab) -> None:
    points = lab.pause_points()
    pair = lab.pair(
        primary_arguments=["protocol=sync", PATIENT], secondary_options={"extra_environment": points.environment}
    )
    pair.start_replication()
    guest = pair.primary.connect("disk0")
    points.arm("target-write.preserved")
    write = begin(lambda: guest.pwrite(pattern(1, BLOCK), 0))
    points.wait_hit("target-write.preserved")
    stall = stalled(pair.primary, "slow-secondary")
    assert (stall["export"], stall["operation"]) == ("disk0", "write")
    points.release("target-write.preserved")
    write.result(DEADLINE_S)
    answer = told(pair.primary)
    assert requests(answer["guest"], "secondary") == {("disk0", "write"): 1}
    assert not answer["longest-stall"]["under-way"]
    assert answer["longest-stall"]["reason"] == "slow-secondary"


def test_guests_that_a_checkpoint_holds_up_are_told_from_others(lab: Lab) -> None:
    """On the secondary, whose gate a checkpoint closes; the primary's write there waits as well, and its guest not."""
    points = lab.pause_points()
    pair = lab.pair(primary_arguments=[PATIENT], secondary_options={"extra_environment": points.environment})
    pair.start_replication()
    guest, other = pair.primary.connect("disk0"), pair.secondary.connect("top0")
    points.arm("checkpoint.begun")
    checkpoint = begin(lambda: pair.primary.execute("replication-checkpoint"))
    points.wait_hit("checkpoint.begun")
    read = begin(lambda: other.pread(BLOCK, 0))
    assert stalled(pair.secondary, "checkpoint")["operation"] == "read"
    guest.pwrite(pattern(1, BLOCK), 0)
    points.release("checkpoint.begun")
    read.result(DEADLINE_S)
    checkpoint.result(DEADLINE_S)
    assert requests(told(pair.secondary)["guest"], "gate") == {("top0", "read"): 1}
    assert requests(told(pair.primary)["guest"], "gate") == {}
    assert "checkpoint: a checkpoint had all requests wait" in trace(pair.secondary)
    assert "top0 read" in trace(pair.secondary)
    some = json.loads(trace(pair.secondary, "--json", "--seconds", "0.01"))
    assert requests(some["guest"]) == {("top0", "read"): 0}, "nothing has happened in that time"
