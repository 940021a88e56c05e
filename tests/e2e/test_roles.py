# SPDX-License-Identifier: BSD-3-Clause
"""Who owns the disks, with real processes: roles, lineage and the codes of reasons, over a failover and back."""

from __future__ import annotations

from typing import Any

import pytest

from content import MIB
from lab import Lab
from nodes import Pair, Server, disk_name
from qmp import QmpError
from waiting import wait_until


def role(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = server.execute("query-role")
    return answer


def relation(one: Server, other: Server) -> str:
    return str(one.execute("replication-compare", lineage=other.status()["lineage"])["relation"])


def in_sync(pair: Pair) -> None:
    """Both say so, and the secondary has a checkpoint of that."""
    pair.start_replication()
    pair.primary.checkpoint()
    for server in (pair.primary, pair.secondary):
        wait_until(lambda server=server: server.status()["link"]["state"] == "in-sync", f"{server.name} in sync")


def code_of(server: Server, command: str, **arguments: Any) -> str | None:
    """The code with which a command is refused."""
    with pytest.raises(QmpError) as refused:
        server.execute(command, arguments)
    return refused.value.code


def test_from_a_pair_to_a_failover(lab: Lab) -> None:
    pair = lab.pair([MIB])
    assert (role(pair.primary)["score"], role(pair.secondary)["score"]) == (10000, 0)
    assert relation(pair.primary, pair.secondary) == "unknown"
    assert pair.primary.status()["in-sync-until"] is None
    in_sync(pair)
    assert role(pair.primary) == {"role": "primary", "score": 10000, "may-run": True}
    of_secondary = role(pair.secondary)
    assert (of_secondary["role"], of_secondary["may-run"], of_secondary["code"]) == ("secondary", False, "is-secondary")
    assert of_secondary["score"] > 500
    assert relation(pair.primary, pair.secondary) == "same"
    assert code_of(pair.primary, "query-failover") == "wrong-mode"
    pair.primary.terminate()
    until = wait_until(lambda: pair.secondary.status()["in-sync-until"], "out of sync")
    assert until >= pair.secondary.status()["checkpoint"]["time"]
    assert role(pair.secondary)["score"] > 500, "it was in step when the primary left"
    pair.secondary.failover()
    assert role(pair.secondary) == {"role": "primary", "score": 10000, "may-run": True}
    assert pair.secondary.execute("query-failover")["code"] == "failed-over"
    pair.primary.start()
    restarted = role(pair.primary)
    assert (restarted["role"], restarted["score"], restarted["may-run"]) == ("primary", 5000, None)
    assert restarted["code"] == "peer-unknown"
    assert relation(pair.primary, pair.secondary) == "older"
    pair.primary.connect(disk_name(0)).pwrite(b"x" * 512, 0)
    assert relation(pair.primary, pair.secondary) == relation(pair.secondary, pair.primary) == "diverged"
    assert role(pair.primary)["may-run"], "what it has now, nobody else has"
    pair.primary.execute("replication-stop")
    assert code_of(pair.primary, "replication-start", secondary=pair.secondary.uri()) == "not-secondary"


def test_the_moment_of_a_killed_process_is_its_last_checkpoint(lab: Lab) -> None:
    pair = lab.pair([MIB])
    in_sync(pair)
    taken = pair.secondary.status()["checkpoint"]["time"]
    pair.primary.kill()
    pair.secondary.kill()
    pair.secondary.start()
    assert pair.secondary.status()["in-sync-until"] == pytest.approx(taken)


def test_codes_of_starts(lab: Lab) -> None:
    pair = lab.pair([MIB])
    assert code_of(pair.secondary, "replication-stop", failover=True) == "not-running"
    assert code_of(pair.primary, "replication-start", mode="secondary") == "wrong-mode"
    assert code_of(pair.primary, "replication-demote") == "wrong-mode"
    pair.secondary.terminate()
    assert code_of(pair.primary, "replication-start") == "peer-unreachable"
    pair.secondary.start()
    in_sync(pair)
    assert code_of(pair.secondary, "replication-start") == "wrong-stage"
    assert code_of(pair.secondary, "replication-retry") == "wrong-stage"
