# SPDX-License-Identifier: BSD-3-Clause
"""`demote --lossless`: an owner becomes a secondary only if the other node has everything, and has said so."""

from __future__ import annotations

import nbd
import pytest

from content import MIB
from lab import Lab
from nodes import Secondary, Server, code_of, top_id
from pausepoints import PausePoints
from qmp import QmpError
from standing import completed
from waiting import DEADLINE_S, begin, wait_until


class Pair:
    """An owner and its secondary, which have the same command line."""

    def __init__(self, lab: Lab, points: PausePoints) -> None:
        made = []
        for name, other in (("a", "b"), ("b", "a")):
            peer = f"peer=nbd+unix:///?socket={lab.folder / other}.sock"
            node = Secondary(lab.folder, [MIB], name=name, extra_arguments=["autostart=true", peer])
            node.arguments[0] = "role=auto"
            node.extra_environment = points.environment if name == "a" else {}
            made.append(lab.start(node))
        self.a, self.b = made
        self.a.execute("replication-set-role", role="primary")
        self.joined()

    def joined(self) -> None:
        """The other one is the owner's secondary, and has everything."""
        wait_until(lambda: self.a.status()["link"]["state"] == "in-sync", "in sync", DEADLINE_S)


@pytest.fixture
def points(lab: Lab) -> PausePoints:
    return PausePoints(lab.folder / "points")


@pytest.fixture
def pair(lab: Lab, points: PausePoints) -> Pair:
    return Pair(lab, points)


def hand_over(server: Server) -> None:
    server.execute("replication-set-role", role="secondary", lossless=True)


def goes_on(pair: Pair) -> None:
    """The node is the owner as before, and the other one its secondary."""
    pair.joined()
    assert pair.a.execute("query-role")["role"] == "primary"
    assert pair.b.execute("query-failover")["primary-left-well"] is False, "it has a primary"
    pair.a.connect(top_id(0)).pwrite(b"last" * 128, 0)
    hand_over(pair.a)
    taken_over(pair)


def taken_over(pair: Pair) -> None:
    """With what was written last."""
    hand_over(pair.a)  # which does nothing any more
    assert pair.b.execute("query-failover")["lossless"] is True
    pair.b.execute("replication-set-role", role="primary")
    assert bytes(pair.b.connect(top_id(0)).pread(4, 0)) == b"last"


def test_the_other_node_dies_before_it_has_said_so(pair: Pair, points: PausePoints) -> None:
    """The guest waits for the answer, and goes on."""
    guest = pair.a.connect(top_id(0))
    points.arm("epoch.leaving")
    demotion = begin(hand_over, pair.a)
    points.wait_hit("epoch.leaving")
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"more" * 128)), 0)
    pair.b.kill()
    points.release("epoch.leaving")
    with pytest.raises(QmpError) as refused:
        demotion.result(DEADLINE_S)
    assert refused.value.code == "not-lossless"
    completed(guest, write)
    assert code_of(pair.a, "replication-set-role", role="secondary", lossless=True) == "not-lossless"
    pair.b.start()
    goes_on(pair)


def test_the_owner_is_killed_when_it_has_been_told(pair: Pair, points: PausePoints) -> None:
    """And has not noted it yet: it is the owner, and the other one learns that the good-bye does not count."""
    points.arm("side.handed-over")
    demotion = begin(hand_over, pair.a)
    points.wait_hit("side.handed-over")
    assert pair.b.execute("query-failover")["lossless"] is True
    pair.a.kill()
    assert demotion.exception(DEADLINE_S) is not None
    points.disarm("side.handed-over")
    pair.a.start()
    goes_on(pair)


def test_another_node_has_gone_on_as_the_other_one_knows(pair: Pair) -> None:
    """It takes the good-bye, and would not fail over all the same."""
    pair.b.execute("replication-outdate")
    assert code_of(pair.a, "replication-set-role", role="secondary", lossless=True) == "not-lossless"
    assert code_of(pair.a, "replication-set-role", role="primary", lossless=True) is None
    goes_on(pair)
