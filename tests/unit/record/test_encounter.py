# SPDX-License-Identifier: BSD-3-Clause
"""encounter.py: each row of its table."""

from __future__ import annotations

import pytest

from replication.reason import Reason
from replication.record.encounter import Encounter, Finding
from replication.record.lineage import Lineage

G, H, K, X = (f"{number:016x}" for number in range(1, 5))
SHARED = Lineage(G, shared=True)
"""What a pair has."""
PROMOTED = SHARED.diverged(H)
"""Of a secondary that has failed over."""
MOVED = SHARED.moved(K)
"""Of a primary that has written without it."""
STRANGER = Lineage(X, shared=True)
HALF = Lineage(incoming=G).diverged(H)
"""Of a secondary that was promoted by force in the midst of its first copy."""
LONG_AGO = Lineage(H, shared=True, history=(G,)).diverged(X)
"""Of a third node, which comes from the promoted one."""

OUT, SPLIT, NONE = Finding.OUTDATED, Finding.SPLIT_BRAIN, Finding.NOTHING

ROWS = [
    # mine, theirs, what follows for who has asked, and for who was asked
    pytest.param(SHARED, PROMOTED, OUT, NONE, id="older"),
    pytest.param(SHARED, LONG_AGO, OUT, NONE, id="older than a third node"),
    pytest.param(SHARED, SHARED, OUT, NONE, id="same"),
    pytest.param(MOVED, SHARED, NONE, NONE, id="newer"),
    pytest.param(MOVED, PROMOTED, SPLIT, SPLIT, id="diverged"),
    pytest.param(MOVED, LONG_AGO, SPLIT, SPLIT, id="diverged from a third node"),
    pytest.param(SHARED, STRANGER, NONE, NONE, id="unrelated"),
    pytest.param(SHARED, HALF, NONE, NONE, id="half a copy"),
    pytest.param(SHARED, Lineage(incoming=G), NONE, NONE, id="nothing complete there"),
    pytest.param(Lineage(), PROMOTED, NONE, NONE, id="nothing complete here"),
    pytest.param(SHARED, None, OUT, NONE, id="not told, and another node may have it"),
    pytest.param(MOVED, None, NONE, NONE, id="not told, and nobody else has it"),
]


@pytest.mark.parametrize(("mine", "theirs", "asking", "asked"), ROWS)
def test_what_follows(mine: Lineage, theirs: Lineage | None, asking: Finding, asked: Finding) -> None:
    met = Encounter(Reason.PEER_PROMOTED, "it was promoted", "b", theirs)
    assert met.find(mine) is asking
    assert Encounter(Reason.PEER_NEWER, "it is asked", "b", theirs, asked=True).find(mine) is asked


@pytest.mark.parametrize(("mine", "theirs", "asking", "asked"), ROWS)
def test_of_two_nodes_that_meet_at_most_one_is_outdated_and_a_split_brain_is_one_for_both(
    mine: Lineage, theirs: Lineage | None, asking: Finding, asked: Finding
) -> None:
    """Whoever asks whom; but for two that own the same, of which neither has written: the one that asks is."""
    del asking, asked
    if theirs is None:
        return
    one, other = (Encounter(Reason.PEER_PROMOTED, "", None, lineage) for lineage in (theirs, mine))
    found = [one.find(mine), other.find(theirs)]
    assert (SPLIT in found) == (found == [SPLIT, SPLIT])
    assert found.count(OUT) <= (2 if mine == theirs else 1)


def test_what_is_kept_of_a_split_brain_advises_nothing_that_loses_data() -> None:
    found = Encounter(Reason.PEER_NEWER, "", "b" * 16, PROMOTED).as_split_brain().to_json()
    assert found["code"] == "split-brain"
    assert found["reason"].endswith("has run `replctl discard` there, as a secondary"), "nothing is cut off"
    assert found["reason"].index("a person has decided") < found["reason"].index("discard")
