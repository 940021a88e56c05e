# SPDX-License-Identifier: BSD-3-Clause
"""What makes a node outdated, and what does not end it: corners of what test_roles.py shows on the straight way."""

from __future__ import annotations

from typing import Any

import pytest

from content import MIB
from lab import Lab
from nodes import Pair, Secondary, Server, disk_name
from qmp import QmpError
from waiting import wait_until


def in_sync(pair: Pair) -> None:
    """The secondary has everything, and a checkpoint of that."""
    pair.start_replication()
    pair.primary.checkpoint()


def code_of(server: Server, command: str, **arguments: Any) -> str | None:
    """The code with which a command is refused."""
    with pytest.raises(QmpError) as refused:
        server.execute(command, **arguments)
    return refused.value.code


def outdated(server: Server) -> str | None:
    """The code of why the node is outdated, None if it is not."""
    reason = server.status()["outdated-reason"]
    return None if reason is None else str(reason["code"])


def test_half_a_copy_that_was_taken_by_force_is_outdated_once_it_is_demoted(lab: Lab) -> None:
    """It descends from nothing, so its lineage says nothing of the primary that has the other half."""
    pair = lab.pair([4 * MIB], primary_arguments=["resync-rate=64K"])
    pair.secondary.start_replication()
    pair.primary.connect(disk_name(0)).pwrite(b"x" * 4096, 0)
    pair.primary.execute("replication-start", sync="full")
    wait_until(lambda: pair.secondary.status()["link"]["state"] == "synchronizing", "the copy has begun")
    pair.primary.kill()
    taken = pair.secondary
    assert code_of(taken, "replication-stop", failover=True) == "no-checkpoint"
    taken.execute("replication-stop", failover=True, force=True)
    taken.wait_stage("done")
    assert outdated(taken) is None, "what is here counts, a person has said"
    taken.execute("replication-demote")
    for _ in range(2):
        assert outdated(taken) == "demoted"
        assert not taken.execute("query-failover")["allowed"]
        assert taken.execute("query-role")["score"] == 0
        assert code_of(taken, "replication-stop", failover=True) == "outdated"
        taken.kill()
        taken.start()


def test_a_node_that_never_had_a_primary_is_not_outdated_by_a_demotion(lab: Lab) -> None:
    alone = lab.start(Secondary(lab.folder, [MIB]))
    alone.start_replication()
    alone.failover()
    alone.execute("replication-demote")
    assert outdated(alone) is None
