# SPDX-License-Identifier: BSD-3-Clause
"""epochs.py: what becomes of the link when a stream is to end, and what a secondary must have said before a primary
hands over to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from replication.errors import CommandError, DiskError
from replication.order.gate import Gate
from replication.primary.dial import Agreement
from replication.primary.epochs import Epochs, check_takes_over
from replication.primary.peer import PeerError
from replication.record.lineage import Verdict


@pytest.mark.parametrize("follow_owner", [False, True])
@pytest.mark.parametrize(
    ("error", "breaks"), [(PeerError("its state folder does not answer"), False), (DiskError("no answer"), True)]
)
def test_a_secondary_that_refuses_the_good_bye_stays_linked(error: Exception, breaks: bool, follow_owner: bool) -> None:
    """It is asked again soon. One that has not answered may have taken it for the end of the stream."""
    agreement = Agreement("nbd://b", cast("Any", Mock()), [], Verdict.QUICK, token="t")
    link = SimpleNamespace(agreement=agreement, broken=Mock(), farewell=Mock(side_effect=error))
    setting = SimpleNamespace(
        options=SimpleNamespace(follow_owner=follow_owner, sync=False, timeout_s=1.0),
        gate=Gate(),
        state=SimpleNamespace(epoch=1, last_held=0),
    )
    with pytest.raises(type(error)):
        Epochs(cast("Any", setting), [], cast("Any", link)).part()
    assert (link.broken.called, agreement.parting) == (breaks, breaks)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, "would lose something"),
        ({"allowed": True}, "would lose something"),  # of an earlier version: it goes back to its checkpoint
        ({"allowed": True, "lossless": "yes"}, "would lose something"),
        ([], "answers with something else"),
        ({"lossless": True}, "would not take over"),
        ({"lossless": True, "allowed": False, "reason": "not yet"}, "would not take over: not yet"),
    ],
)
def test_only_who_says_that_it_takes_over_everything_is_handed_over_to(answer: object, said: str) -> None:
    with pytest.raises(CommandError, match=said):
        check_takes_over(answer)


def test_who_says_so_is() -> None:
    check_takes_over({"allowed": True, "lossless": True})
