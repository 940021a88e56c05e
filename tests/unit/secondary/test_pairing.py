# SPDX-License-Identifier: BSD-3-Clause
"""pairing.py: which sizes of a disk that has grown here a primary may have, and until when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from replication.errors import CommandError
from replication.record.lineage import Lineage, new_id
from replication.record.state import Record, StateError
from replication.secondary.pairing import Channel, Pairing, Session
from replication.stage import Mode, Stage

FORMER, SIZE = 1 << 20, 2 << 20


class Bench:
    """A secondary with one disk that has grown, and its primary's session."""

    def __init__(self) -> None:
        self.record = Record(Mode.SECONDARY, Stage.RUNNING, disks={"a": SIZE}, former_disks={"a": FORMER})
        self.save = Mock()
        self.target = SimpleNamespace(preserved_to=FORMER)
        self.stack = SimpleNamespace(target=self.target, fits=True)
        disk = SimpleNamespace(name="a", size=SIZE, stack=self.stack, strange=False)
        ancestry: Any = Mock(lineage=Lineage())
        setting: Any = Mock(record=self.record, save=self.save)
        self.pairing = Pairing(setting, ancestry, [disk])  # type: ignore[list-item]

    def complete(self, size: int) -> None:
        session = self.pairing._session = Session(Channel(), "n", 1.0)
        session.sizes = {"a": size}
        self.pairing.sync(session.token, "complete", new_id(), False, ())

    @property
    def knows_former(self) -> bool:
        assert (self.target.preserved_to == FORMER) == bool(self.record.former_disks)
        return bool(self.record.former_disks)


def test_the_former_size_counts_until_the_primary_has_sent_all_of_the_new_one() -> None:
    bench = Bench()
    bench.complete(FORMER)  # which has not grown yet
    assert bench.knows_former
    bench.complete(SIZE)
    assert not bench.knows_former
    bench.save.assert_called()


def test_a_session_is_not_complete_while_that_cannot_be_saved() -> None:
    """Else a checkpoint of all of the disk might follow, of which only a part is preserved."""
    bench = Bench()
    bench.save.side_effect = StateError("no room")
    with pytest.raises(StateError):
        bench.complete(SIZE)
    assert bench.knows_former
    assert bench.record.offered is None
    assert not bench.pairing.met
    bench.save.side_effect = None
    bench.complete(SIZE)
    assert not bench.knows_former
    assert bench.record.offered is not None


def test_an_overlay_that_has_not_grown_keeps_it() -> None:
    bench = Bench()
    bench.stack.fits = False
    bench.complete(SIZE)
    assert bench.knows_former


@pytest.mark.parametrize("size", [FORMER, FORMER + 512, SIZE, 0], ids=["former", "between", "new", "only forwards"])
def test_a_primary_may_have_any_size_between_the_two(size: int) -> None:
    bench = Bench()
    bench.pairing._check_disks({"a": size})
    assert bench.knows_former, "it may be refused still, for what it is"


@pytest.mark.parametrize("size", [FORMER - 512, SIZE + 512])
def test_no_other_size_is_taken(size: int) -> None:
    with pytest.raises(CommandError, match=f"disk 'a' has {size} bytes there, but {SIZE} here"):
        Bench().pairing._check_disks({"a": size})
