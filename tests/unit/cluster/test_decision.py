# SPDX-License-Identifier: BSD-3-Clause
"""What follows from what a node says and what the cluster keeps: scores, refusals, and who gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replication.cluster import decision
from replication.cluster.decision import Seen
from replication.role import BEHIND, IN_STEP, NEVER, NEW, OWNER, UNSURE_OWNER

LIMIT_S = 60.0

SOUND = Seen(
    role="primary",
    score=OWNER,
    may_run=True,
    code=None,
    reason="",
    mode="primary",
    stage="running",
    link="in-sync",
    checkpoint_age_s=1.0,
    outdated=None,
    obstacle=None,
)
COPY = replace(
    SOUND, role="secondary", mode="secondary", score=IN_STEP - 1, may_run=False, code="is-secondary", reason="it is one"
)


@pytest.mark.parametrize(
    ("seen", "score"),
    [
        (SOUND, decision.OWNER),
        (replace(SOUND, score=UNSURE_OWNER, may_run=None), decision.UNSURE_OWNER),
        (replace(SOUND, score=NEVER, may_run=False, outdated="demoted", code="outdated", reason="x"), None),
        (replace(SOUND, score=NEVER, may_run=False, reason="no checkpoint"), None),
        (COPY, decision.IN_STEP),
        (replace(COPY, score=501), decision.IN_STEP),
        (replace(COPY, score=BEHIND - 1), decision.BEHIND),
        (replace(COPY, score=NEVER), None),
        (replace(COPY, score=NEW), None),
        (replace(COPY, outdated="demoted"), None),
        (replace(COPY, checkpoint_age_s=LIMIT_S + 1), None),
        (replace(COPY, checkpoint_age_s=None), None),
        (replace(COPY, checkpoint_age_s=LIMIT_S + 1, lossless=True), decision.IN_STEP),
        (replace(COPY, checkpoint_age_s=None, lossless=True, outdated="demoted"), None),
        (replace(COPY, checkpoint_age_s=None, lossless=True, relation="older"), None),
    ],
)
def test_scores(seen: Seen, score: int | None) -> None:
    assert decision.score(seen, LIMIT_S) == score


@pytest.mark.parametrize(
    ("code", "score", "may_run", "found"),
    [
        (None, 10000, True, True),
        ("peer-unknown", 5000, None, None),
        ("outdated", 0, False, False),
        ("not-promoted", 10000, False, True),
        ("not-promoted", 5000, False, None),
        ("suspended", 5000, False, None),
        ("is-secondary", 900, False, False),
    ],
)
def test_a_guest_that_is_kept_back_is_nothing_against_what_its_owner_has(
    code: str | None, score: int, may_run: bool | None, found: bool | None
) -> None:
    """guest-face=closed-until-promoted waits for the very promotion that is to be decided."""
    assert decision.may_own({"code": code, "score": score, "may-run": may_run}) is found


def test_the_scores_are_in_order() -> None:
    found = [decision.OWNER, decision.UNSURE_OWNER, decision.IN_STEP, decision.BEHIND]
    assert found == sorted(found, reverse=True)
    assert found[-1] > 0


def test_the_age_has_no_limit_with_0_and_none_for_an_owner() -> None:
    assert decision.score(replace(COPY, checkpoint_age_s=1e6), 0) == decision.IN_STEP
    assert decision.score(replace(SOUND, checkpoint_age_s=None), LIMIT_S) == decision.OWNER


def test_with_an_age_that_is_not_known_only_a_copy_that_has_everything_is_a_candidate() -> None:
    assert decision.score(COPY, None) is None
    assert decision.score(replace(COPY, lossless=True), None) == decision.IN_STEP
    assert decision.score(SOUND, None) == decision.OWNER


@pytest.mark.parametrize("seen", [SOUND, COPY])
@pytest.mark.parametrize("relation", ["same", "newer", "unknown", None])
def test_what_comes_from_the_last_owners_is_no_obstacle(seen: Seen, relation: str | None) -> None:
    assert decision.obstacle(replace(seen, relation=relation, register_host="b"), LIMIT_S) is None


@pytest.mark.parametrize("seen", [SOUND, COPY])
@pytest.mark.parametrize("relation", ["older", "diverged", "unrelated"])
def test_what_the_last_owner_went_on_from_is_never_promoted(seen: Seen, relation: str) -> None:
    stale = replace(seen, relation=relation, register_host="b")
    assert decision.score(stale, LIMIT_S) is None
    assert "b" in str(decision.obstacle(stale, LIMIT_S))
    assert (stale.split is None) == (relation == "older")


@pytest.mark.parametrize(
    ("host", "active", "gone"),
    [
        ("b", frozenset({"a"}), True),
        ("b", frozenset({"a", "b"}), False),
        ("b", None, False),
        ("a", frozenset({"a"}), False),
        (None, frozenset({"a"}), False),
    ],
)
def test_a_primary_that_is_heard_is_gone_only_if_the_cluster_knows_it(
    host: str | None, active: frozenset[str] | None, gone: bool
) -> None:
    assert decision.is_gone(replace(COPY, register_host=host), "a", active) is gone


def test_what_only_a_promotion_ends_is_no_obstacle_to_it() -> None:
    for code in ("not-promoted", "suspended"):
        held = replace(SOUND, may_run=False, code=code, reason="it is held")
        assert decision.score(held, LIMIT_S) == decision.OWNER
        assert decision.score(replace(held, score=UNSURE_OWNER), LIMIT_S) == decision.UNSURE_OWNER
        assert decision.score(replace(held, relation="older", register_host="b"), LIMIT_S) is None
    assert decision.stays_closed(replace(SOUND, may_run=False, code="not-promoted"))
    assert not decision.stays_closed(replace(SOUND, may_run=False, code="suspended"))


@pytest.mark.parametrize(
    ("changes", "gone", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"code": "not-promoted"}, True, False),
        ({"outdated": "the other went on"}, True, False),
        ({"relation": "diverged"}, True, False),
    ],
)
def test_whose_guest_goes_on(changes: dict[str, str], gone: bool, expected: bool) -> None:
    held = replace(SOUND, may_run=False, code="suspended", reason="no link")
    assert decision.goes_on(replace(held, **changes), gone) is expected  # type: ignore[arg-type]


def test_whose_guest_is_not_to_stop_later() -> None:
    assert decision.goes_on_later(SOUND, gone=True)
    assert not decision.goes_on_later(SOUND, gone=False)
    for changes in ({"code": "outdated"}, {"outdated": "b went on"}, {"relation": "older"}, {"role": "secondary"}):
        assert not decision.goes_on_later(replace(SOUND, **changes), gone=True)  # type: ignore[arg-type]


def test_who_is_alone() -> None:
    assert decision.others_are_gone("a", frozenset({"a"}))
    assert not decision.others_are_gone("a", frozenset({"a", "b"}))
    assert not decision.others_are_gone("a", None)


def test_an_owner_that_was_stopped_in_good_order_is_not_gone() -> None:
    kept = replace(COPY, register_host="b", register_kept=True)
    assert decision.lives_elsewhere(kept, "a", frozenset({"a"})) == "b"
    assert not decision.is_gone(kept, "a", frozenset({"a"}))
    assert decision.lives_elsewhere(replace(kept, register_host="a"), "a", frozenset({"a"})) is None


def test_whose_stop_is_no_end() -> None:
    assert decision.keeps(SOUND)
    assert not decision.keeps(COPY)
    assert not decision.keeps(replace(SOUND, outdated="b went on"))


def test_an_owner_that_another_took_over_from_is_not_promoted_before_it_has_met_that_one() -> None:
    owner = replace(SOUND, score=UNSURE_OWNER, may_run=None, relation="same")
    assert decision.score(replace(owner, register_host="b"), LIMIT_S) is None
    assert "b was promoted since" in str(decision.obstacle(replace(owner, register_host="b"), 0))
    assert decision.score(replace(owner, register_host="a", register_here=True), LIMIT_S) == decision.UNSURE_OWNER
    assert decision.score(replace(owner, register_host="b", score=OWNER), LIMIT_S) == decision.OWNER
    assert decision.score(replace(owner, register_host="b", relation="newer"), LIMIT_S) == decision.UNSURE_OWNER


def test_an_owner_gives_way_only_to_one_that_went_on() -> None:
    for news in (False, True):
        assert decision.gives_up(SOUND, news) is None
        assert decision.gives_up(replace(SOUND, may_run=None), news) is None
        assert decision.gives_up(replace(SOUND, outdated="the other went on"), news) == "the other went on"
        assert decision.gives_up(replace(COPY, outdated="demoted"), news) is None
        assert decision.gives_up(replace(SOUND, relation="unrelated"), news) is None
    for relation in ("older", "diverged"):
        stale = replace(SOUND, relation=relation, register_host="b")
        assert decision.gives_up(stale, news=True) == stale.stale
        assert decision.gives_up(stale, news=False) is None, "a person may have said that it counts"


@pytest.mark.parametrize(
    ("seen", "to_promote", "told", "expected"),
    [
        (SOUND, frozenset({"b"}), True, True),
        (SOUND, frozenset({"a"}), True, False),
        (SOUND, frozenset[str](), True, False),
        (SOUND, frozenset[str](), False, True),
        (replace(SOUND, link="lost"), frozenset({"b"}), True, False),
        (COPY, frozenset({"b"}), True, False),
    ],
)
def test_who_hands_over(seen: Seen, to_promote: frozenset[str], told: bool, expected: bool) -> None:
    assert decision.hands_over(seen, "a", to_promote, told) is expected


@pytest.mark.parametrize("link", ["connecting", "synchronizing"])
def test_a_pair_that_is_about_to_be_in_sync_is_waited_for(link: str) -> None:
    soon = replace(SOUND, link=link)
    assert decision.may_hand_over(soon, "a", frozenset({"b"}), told=True)
    assert not decision.may_hand_over(soon, "a", frozenset(), told=True)
    assert not decision.may_hand_over(replace(soon, role="secondary"), "a", frozenset({"b"}), told=True)
    assert not decision.may_hand_over(replace(SOUND, link="lost"), "a", frozenset({"b"}), told=True)


@pytest.mark.parametrize(
    ("host", "active", "expected"),
    [
        ("b", frozenset({"a", "b"}), "b"),
        ("b", frozenset({"a"}), None),
        ("a", frozenset({"a", "b"}), None),
        (None, frozenset({"a", "b"}), None),
        ("b", None, "b"),
        ("a", None, None),
        (None, None, None),
    ],
)
def test_where_the_disks_are_still_owned(host: str | None, active: frozenset[str] | None, expected: str | None) -> None:
    assert decision.lives_elsewhere(replace(COPY, register_host=host), "a", active) == expected


@pytest.mark.parametrize("relation", ["same", "newer", "older", "diverged", "unrelated", "unknown", None])
@pytest.mark.parametrize(("unknown", "knew"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("outdated", [None, "b went on"])
def test_every_way_in_which_two_promotions_can_meet(
    relation: str | None, unknown: bool, knew: bool, here: bool, role: str, outdated: str | None
) -> None:
    """The register is doubted only by an owner that has gone on as well and of whose promotion it did not know."""
    seen = replace(
        SOUND if role == "primary" else COPY,
        relation=relation,
        register_host="a" if here else "b",
        register_here=here,
        unknown_to_register=unknown,
        knew_register=knew,
        outdated=outdated,
    )
    doubts = role == "primary" and relation == "diverged" and not here and unknown
    assert decision.disputes(seen) is doubts
    assert decision.outranks(seen) is (doubts and knew and outdated is None)
    if doubts:
        assert decision.gives_up(seen, news=True) is None
        assert decision.score(seen, LIMIT_S) is None
        assert "both gone on" in str(decision.obstacle(seen, 0))
        assert (decision.must_go(seen) is None) is (outdated is None)
    elif role == "primary" and (relation in ("older", "diverged") or outdated is not None):
        assert decision.gives_up(seen, news=True) is not None
        assert decision.must_go(seen) is not None


def test_what_a_person_decides_in_a_dispute() -> None:
    loser = replace(COPY, register_host="b", register_disputed="a", relation="diverged")
    assert decision.ends_dispute(loser, "a")
    assert decision.ends_dispute(replace(loser, outdated="demoted", outdated_by_hand=True), "a")
    assert not decision.ends_dispute(replace(loser, outdated="b went on"), "a"), "no person has said so"
    assert not decision.ends_dispute(loser, "c"), "only who has raised it ends it"
    owner = replace(SOUND, register_host="b", register_disputed="a", relation="diverged")
    assert not decision.ends_dispute(owner, "a")
    assert not decision.ends_dispute(replace(owner, relation=None), "a"), "it cannot be told"
    assert decision.ends_dispute(replace(owner, relation="newer"), "a"), "another one was promoted since"
    named = replace(COPY, register_host="a", register_here=True, register_disputed="b")
    assert decision.concedes(named, "a")
    assert not decision.concedes(replace(named, outdated="b went on"), "a")
    assert not decision.concedes(replace(named, register_disputed=None), "a")
    assert not decision.concedes(replace(named, role="primary"), "a")
    assert not decision.concedes(replace(named, register_here=False), "a")
    assert decision.must_go(replace(SOUND, register_here=True, register_disputed="b")) is None
    assert decision.keeps(replace(SOUND, register_here=True, register_disputed="b"))


@pytest.mark.parametrize("relation", ["same", "newer", None])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_who_is_left_out(relation: str | None, alone: bool, here: bool) -> None:
    copy = replace(
        COPY, relation=relation, register_host="a" if here else "b", register_here=here, register_alone=alone
    )
    assert (decision.score(copy, LIMIT_S) is None) is (relation == "same" and alone and not here)
    assert decision.score(replace(SOUND, relation=relation, register_alone=alone), LIMIT_S) == decision.OWNER
