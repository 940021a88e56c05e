# SPDX-License-Identifier: BSD-3-Clause
"""promotion.py: which commands a change of role gives, in which order, and what it says when one of them is refused.
The node is played by the test."""

from __future__ import annotations

import pytest

from replication.conditions import Conditions
from replication.errors import CommandError
from replication.promotion import Promotion
from replication.reason import Reason
from replication.stage import Mode, Stage

LOSSLESS = ("stop", True, False, Conditions(lossless=True))
FORCED = ("stop", True, True, None)


class FakeNode:
    """Does as it is told at once, unless `refusals` has an error for the call."""

    def __init__(self, mode: Mode = Mode.SECONDARY, stage: Stage = Stage.RUNNING) -> None:
        self.mode, self.stage = mode, stage
        self.outdated_reason: str | None = None
        self.peer: str | None = None
        self.in_sync = True
        self.connected: str | None = None
        self.lossless = False
        self.calls: list[tuple[object, ...]] = []
        self.refusals: dict[tuple[object, ...], CommandError] = {}

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        if call in self.refusals:
            raise self.refusals[call]

    def start(self, mode: Mode | None, secondary: str | None, sync: str) -> None:
        self._call("start", mode, secondary, sync)
        self.stage = Stage.RUNNING
        self.mode = mode or self.mode

    def stop(self, failover: bool, force: bool = False, conditions: Conditions | None = None) -> None:
        self._call("stop", failover, force, conditions)
        self.stage = Stage.DONE

    def demote(self) -> None:
        self._call("demote")
        self.mode, self.stage = Mode.SECONDARY, Stage.RUNNING

    def insist(self) -> None:
        self._call("insist")

    def check_demotable(self) -> None:
        pass

    def checkpoint(self) -> None:
        self._call("checkpoint")

    def primary_is_there(self) -> str | None:
        return self.connected

    def keeps_all(self) -> bool:
        return self.lossless


# -- to primary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_what_can_be_kept_is_kept_by_force_as_well(force: bool) -> None:
    node = FakeNode()
    node.lossless = True
    Promotion(node).to_primary(None, force)
    assert node.calls == [LOSSLESS]


@pytest.mark.parametrize("reason", [None, Reason.OUTDATED, Reason.NOT_LOSSLESS])
def test_force_goes_on_where_not_everything_can_be_kept_after_all(reason: Reason | None) -> None:
    node = FakeNode()
    node.lossless = True
    node.refusals[LOSSLESS] = CommandError("the hidden disk is damaged", reason=reason)
    Promotion(node).to_primary(None, True)
    assert node.calls == [LOSSLESS, FORCED]


@pytest.mark.parametrize("reason", [Reason.STORAGE, Reason.BUSY])
def test_force_does_not_give_up_what_a_later_attempt_keeps(reason: Reason) -> None:
    node = FakeNode()
    node.lossless = True
    node.refusals[LOSSLESS] = CommandError("no answer", reason=reason)
    with pytest.raises(CommandError, match="failover --force") as refused:
        Promotion(node).to_primary(None, True)
    assert refused.value.reason is reason
    assert node.calls == [LOSSLESS]


def test_without_force_a_refusal_stands() -> None:
    node = FakeNode()
    node.lossless = True
    node.refusals[LOSSLESS] = CommandError("the hidden disk is damaged")
    with pytest.raises(CommandError, match="damaged"):
        Promotion(node).to_primary(None, False)
    assert node.calls == [LOSSLESS]
