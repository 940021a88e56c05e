# SPDX-License-Identifier: BSD-3-Clause
"""epochs.py: what becomes of the link when a stream is to end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from replication.errors import DiskError
from replication.order.gate import Gate
from replication.primary.dial import Agreement
from replication.primary.epochs import Epochs
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
