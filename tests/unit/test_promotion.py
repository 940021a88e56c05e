# SPDX-License-Identifier: BSD-3-Clause
"""promotion.py: which commands a change of role gives, in which order, and what it says when one of them is refused.
The node is played by the test."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from replication import promotion as promoting
from replication.admission import Admission, Ownership
from replication.conditions import Conditions
from replication.errors import CommandError
from replication.options import Options
from replication.promotion import Promotion
from replication.reason import Reason
from replication.role import is_owner
from replication.stage import Mode, Stage
from waiting import DEADLINE_S, begin, wait_until

LOSSLESS = ("stop", True, False, Conditions(lossless=True))
LOSSLESS_BY_FORCE = ("stop", True, False, Conditions(lossless=True, early=True))
FAILOVER = ("stop", True, False, Conditions(no_primary=True))
FORCED = ("stop", True, True, None)
PEER = "nbd://peer"
SEEK = ("start", Mode.PRIMARY, PEER, "auto")


class FakeNode:
    """Does as it is told at once, unless `refusals` has an error for the call."""

    def __init__(self, mode: Mode = Mode.SECONDARY, stage: Stage = Stage.RUNNING) -> None:
        self.mode, self._stage = mode, stage
        self.looked = 0
        self.sought: str | None = None
        self.saved: str | None = None
        """What the next process finds of `sought`."""
        self.saved_with_stage: str | None = None
        self.outdated_reason: str | None = None
        self.peer: str | None = None
        self.in_sync = True
        self.connected: str | None = None
        self.lossless = False
        self.lacks: str | None = None
        self.calls: list[tuple[object, ...]] = []
        self.refusals: dict[tuple[object, ...], CommandError] = {}
        self._holds: dict[object, tuple[threading.Event, threading.Event]] = {}
        self.admission = Admission(
            Options(mode, [], None, None),
            lambda: Ownership(is_owner(self.mode, self._stage), self.mode is Mode.PRIMARY, self.outdated_reason),
        )

    @property
    def stage(self) -> Stage:
        self.looked += 1
        return self._stage

    @stage.setter
    def stage(self, stage: Stage) -> None:
        self._stage, self.saved, self.saved_with_stage = stage, self.sought, self.sought

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[threading.Event]:
        """Every call of `name` takes until the body has ended; the event says that there is one."""
        reached, released = self._holds[name] = (threading.Event(), threading.Event())
        try:
            yield reached
        finally:
            released.set()

    def seek(self, uri: str | None, save: bool) -> None:
        self.sought = uri
        if save:
            self.saved = uri

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        if call[0] in self._holds:
            reached, released = self._holds[call[0]]
            reached.set()
            assert released.wait(DEADLINE_S)
        if call in self.refusals:
            raise self.refusals[call]

    def start_pair(self, mode: Mode | None, secondary: str | None, sync: str) -> None:
        self._call("start", mode, secondary, sync)
        self.stage = Stage.RUNNING
        self.mode = mode or self.mode

    def stop(self, failover: bool, force: bool = False, conditions: Conditions | None = None) -> None:
        self._call("stop", failover, force, conditions)
        self.stage = Stage.DONE

    def hand_over(self) -> None:
        self._call("hand_over", self.sought)
        self.stage = Stage.DONE

    def demote(self) -> None:
        self._call("demote")
        self.mode, self.stage = Mode.SECONDARY, Stage.RUNNING

    def insist(self) -> None:
        self._call("insist")

    def go_on_alone(self) -> None:
        self._call("alone")

    def resume_io(self, fenced: bool = False) -> None:
        self._call("resume", fenced)

    def check_demotable(self) -> None:
        pass

    def checkpoint(self) -> None:
        self._call("checkpoint")

    def primary_is_there(self) -> str | None:
        return self.connected

    def keeps_all(self) -> bool:
        return self.lossless

    def lacking(self) -> str | None:
        return self.lacks


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def promotion(node: FakeNode) -> Iterator[Promotion]:
    promotion = Promotion(node)
    yield promotion
    promotion.close()


# -- to primary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_what_can_be_kept_is_kept_by_force_as_well(force: bool) -> None:
    node = FakeNode()
    node.lossless = True
    Promotion(node).to_primary(None, force)
    assert node.calls == [LOSSLESS_BY_FORCE if force else LOSSLESS]


@pytest.mark.parametrize("reason", [None, Reason.OUTDATED, Reason.NOT_LOSSLESS])
def test_force_goes_on_where_not_everything_can_be_kept_after_all(reason: Reason | None) -> None:
    node = FakeNode()
    node.lossless = True
    node.refusals[LOSSLESS_BY_FORCE] = CommandError("the hidden disk is damaged", reason=reason)
    Promotion(node).to_primary(None, True)
    assert node.calls == [LOSSLESS_BY_FORCE, FORCED]


@pytest.mark.parametrize("reason", [Reason.STORAGE, Reason.BUSY])
def test_force_does_not_give_up_what_a_later_attempt_keeps(reason: Reason) -> None:
    node = FakeNode()
    node.lossless = True
    node.refusals[LOSSLESS_BY_FORCE] = CommandError("no answer", reason=reason)
    with pytest.raises(CommandError, match="failover --force") as refused:
        Promotion(node).to_primary(None, True)
    assert refused.value.reason is reason
    assert node.calls == [LOSSLESS_BY_FORCE]


def test_without_force_a_refusal_stands() -> None:
    node = FakeNode()
    node.lossless = True
    node.refusals[LOSSLESS] = CommandError("the hidden disk is damaged")
    with pytest.raises(CommandError, match="damaged"):
        Promotion(node).to_primary(None, False)
    assert node.calls == [LOSSLESS]


def test_a_secondary_that_lacks_something_is_not_started_for_a_promotion() -> None:
    """It would run without a valid checkpoint, and be refused then."""
    node = FakeNode(stage=Stage.NONE)
    node.lacks = "a resync was interrupted"
    with pytest.raises(CommandError, match="a resync was interrupted") as refused:
        Promotion(node).to_primary(None, False)
    assert (refused.value.reason, node.calls) == (Reason.NO_CHECKPOINT, [])
    Promotion(node).to_primary(None, True)
    assert node.calls == [("start", None, None, "auto"), FORCED]


def test_a_promotion_that_has_started_replication_says_so() -> None:
    node = FakeNode(stage=Stage.NONE)
    node.refusals[FAILOVER] = CommandError("no answer", reason=Reason.STORAGE)
    with pytest.raises(CommandError, match=r"no answer.*has been started: this secondary runs") as refused:
        Promotion(node).to_primary(None, False)
    assert refused.value.reason is Reason.STORAGE


def test_without_a_thread_for_the_search_nothing_is_promoted(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    node = FakeNode()
    node.peer = PEER
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(CommandError, match="no thread for seek-peer"):
        Promotion(node).to_primary(None, False)
    assert (node.calls, node.stage) == ([], Stage.RUNNING)
    node.mode = Mode.PRIMARY  # and one that needs none any more is what it is to be
    Promotion(node).to_primary(None, False)


def test_a_promotion_does_not_wait_for_another_change_of_role(node: FakeNode, promotion: Promotion) -> None:
    node.mode = Mode.PRIMARY
    with node.held("demote") as demoting:
        demotion = begin(promotion.to_secondary)
        demoting.wait(DEADLINE_S)
        with pytest.raises(CommandError, match="Another change of role") as refused:
            promotion.to_primary(None, False)
        assert refused.value.reason is Reason.BUSY
    demotion.result(DEADLINE_S)
    assert node.mode is Mode.SECONDARY


def test_a_promotion_does_not_wait_for_an_attempt_to_reach_the_peer(node: FakeNode, promotion: Promotion) -> None:
    """Which takes as long as the network."""
    with node.held("start") as attempt:
        promotion.to_primary(PEER, False)
        attempt.wait(DEADLINE_S)
        promotion.to_primary(PEER, False)
        node.outdated_reason = "the cluster has said so"
        promotion.to_primary(PEER, True)
    assert ("insist",) in node.calls


# -- to secondary ----------------------------------------------------------------------------------------------


def demote_amid_an_attempt(node: FakeNode, promotion: Promotion) -> None:
    """It begins while the seeker is at work, and ends afterwards."""
    with node.held("start") as attempt:
        promotion.to_primary(PEER, False)
        attempt.wait(DEADLINE_S)
        demotion = begin(promotion.to_secondary)
        wait_until(lambda: node.sought is None, "the demotion has begun")
    demotion.result(DEADLINE_S)


def test_a_demotion_waits_for_an_attempt_to_reach_the_peer(node: FakeNode, promotion: Promotion) -> None:
    """That one succeeds, so there is a primary to be stopped."""
    demote_amid_an_attempt(node, promotion)
    assert node.calls[-4:] == [SEEK, ("checkpoint",), ("stop", False, False, None), ("demote",)]
    assert (node.mode, node.stage, promotion.obstacle) == (Mode.SECONDARY, Stage.RUNNING, None)


def test_an_attempt_that_fails_during_a_demotion_is_the_last_one(node: FakeNode, promotion: Promotion) -> None:
    node.refusals[SEEK] = CommandError("nobody there")
    demote_amid_an_attempt(node, promotion)
    assert (node.calls[-2:], promotion.obstacle) == ([SEEK, ("demote",)], None)
    wait_until(lambda: not promotion._seeker.alive, "nobody looks for the peer")


def test_a_demotion_that_is_refused_does_not_end_the_search(node: FakeNode, promotion: Promotion) -> None:
    promotion.to_primary(None, False)
    node.stage = Stage.FAILOVER
    promotion.to_primary(PEER, False)
    with pytest.raises(CommandError, match="commit after failover") as refused:
        promotion.to_secondary()
    assert refused.value.reason is Reason.COMMITTING
    node.stage = Stage.DONE
    wait_until(lambda: node.mode is Mode.PRIMARY, "it looks for its peer")


def test_the_search_goes_on_when_a_commit_that_has_failed_is_resumed(
    node: FakeNode, promotion: Promotion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promoting, "AGAIN_MAX_S", 0.01)
    promotion.to_primary(None, False)
    node.stage = Stage.FAILOVER_FAILED
    promotion.to_primary(PEER, False)
    wait_until(lambda: node.looked > 2, "the seeker has seen that")
    assert SEEK not in node.calls
    node.stage = Stage.DONE
    wait_until(lambda: node.mode is Mode.PRIMARY, "it looks for its peer")


def test_a_primary_that_was_stopped_and_cannot_be_demoted_goes_on(node: FakeNode, promotion: Promotion) -> None:
    node.mode, node.peer = Mode.PRIMARY, PEER
    node.refusals["demote",] = CommandError("cannot become a secondary: no room", reason=Reason.STORAGE)
    with pytest.raises(CommandError, match=r"no room\. Replication has been stopped, this node still owns") as refused:
        promotion.to_secondary()
    assert refused.value.reason is Reason.STORAGE
    wait_until(lambda: node.stage is Stage.RUNNING, "it replicates again")
    assert node.calls[-1] == SEEK
    assert node.mode is Mode.PRIMARY


# -- over a restart --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", [None, "nbd://other"])
def test_the_search_outlives_the_process(node: FakeNode, promotion: Promotion, peer: str | None) -> None:
    """The key peer may say something else by then; a URI that a command gave counts as it was."""
    node.peer = "nbd://former"
    seek = ("start", Mode.PRIMARY, peer or PEER, "auto")
    for uri in ("nbd://former", "nbd://other"):
        node.refusals["start", Mode.PRIMARY, uri, "auto"] = CommandError("nobody there")
    promotion.to_primary(peer, False)
    wait_until(lambda: promotion.obstacle, "it has tried")
    promotion.close()
    assert (node.sought, node.saved) == (peer or "", peer or "")
    node.peer = PEER
    node.refusals.clear()
    following = Promotion(node)
    following.resume()
    wait_until(lambda: node.mode is Mode.PRIMARY and node.sought is None, "it looks for its peer")
    assert node.calls[-1] == seek


def test_it_is_saved_with_the_stage_and_taken_back_with_it(node: FakeNode, promotion: Promotion) -> None:
    node.refusals[FAILOVER] = CommandError("no answer")
    with pytest.raises(CommandError):
        promotion.to_primary(PEER, False)
    assert node.sought is None
    node.refusals.clear()
    node.refusals[SEEK] = CommandError("nobody there")
    promotion.to_primary(PEER, False)
    assert (node.stage, node.saved_with_stage) == (Stage.DONE, PEER)


@pytest.mark.parametrize(("mode", "stage"), [(Mode.PRIMARY, Stage.RUNNING), (Mode.SECONDARY, Stage.NONE)])
def test_who_has_found_it_or_is_no_owner_does_not_go_on(mode: Mode, stage: Stage) -> None:
    """A process was killed between the start and the save after it, say; a stop by hand must not be undone later."""
    node = FakeNode(mode, stage)
    node.sought = PEER
    promotion = Promotion(node)
    promotion.resume()
    assert (node.sought, promotion._seeker.alive) == (None, False)


@pytest.mark.parametrize("what", ["checkpoint", "hand_over"])
def test_a_lossless_demotion_that_is_refused_has_changed_nothing(
    node: FakeNode, promotion: Promotion, what: str
) -> None:
    node.mode = Mode.PRIMARY
    calls = {"checkpoint": ("checkpoint",), "hand_over": ("hand_over", "")}
    node.refusals[calls[what]] = CommandError("no answer")
    with pytest.raises(CommandError, match="goes on as the owner: no answer") as refused:
        promotion.to_secondary(lossless=True)
    assert (refused.value.reason, node.stage, node.mode) == (Reason.NOT_LOSSLESS, Stage.RUNNING, Mode.PRIMARY)
    node.refusals[calls[what]] = CommandError("another one is at work", reason=Reason.BUSY)
    with pytest.raises(CommandError) as refused:
        promotion.to_secondary(lossless=True)
    assert refused.value.reason is Reason.BUSY
    node.refusals.clear()
    promotion.to_secondary(lossless=True)
    assert node.calls[-3:] == [("checkpoint",), ("hand_over", ""), ("demote",)], "killed before that, it looks for it"
    promotion.to_secondary(lossless=True)
    assert node.calls[-1] == ("demote",), "it is one"


@pytest.mark.parametrize(("stage", "in_sync"), [(Stage.RUNNING, False), (Stage.DONE, True)])
def test_nobody_has_what_an_owner_has_that_is_not_in_sync(
    node: FakeNode, promotion: Promotion, stage: Stage, in_sync: bool
) -> None:
    node.mode, node.stage, node.in_sync = Mode.PRIMARY, stage, in_sync
    with pytest.raises(CommandError, match="Demotion is refused") as refused:
        promotion.to_secondary(lossless=True)
    assert (refused.value.reason, node.calls) == (Reason.NOT_LOSSLESS, [])


@pytest.mark.parametrize("lossless", [False, True])
def test_who_has_fenced_the_peer_goes_over_its_lease_alone(node: FakeNode, lossless: bool) -> None:
    node.lossless = lossless
    Promotion(node).to_primary(None, False, fenced=True)
    condition = Conditions(lossless=True, early=True) if lossless else Conditions(no_primary=True, early=True)
    assert node.calls == [("stop", True, False, condition)]
    Promotion(node).to_primary(None, False, fenced=True)
    assert node.calls[1:] == [("resume", True)], "an owner's guest goes on"


def test_an_outdated_owner_is_not_let_go_on_by_that(node: FakeNode) -> None:
    node.stage, node.outdated_reason = Stage.DONE, "another one has gone on"
    with pytest.raises(CommandError) as raised:
        Promotion(node).to_primary(None, False, fenced=True)
    assert (raised.value.reason, node.calls) == (Reason.OUTDATED, [])
