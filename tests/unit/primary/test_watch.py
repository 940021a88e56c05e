# SPDX-License-Identifier: BSD-3-Clause
"""primary/watch.py: a checkpoint that the secondary has taken and lost is told, whenever the looks fall."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from replication.events import EventHub
from replication.fault import Case, FaultLatch
from replication.primary.dial import Agreement
from replication.primary.watch import Watch
from replication.record.lineage import Verdict


class Scene:
    """A primary that looks at a secondary when it is told to."""

    def __init__(self) -> None:
        self.consistent = False
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens between the secondary's answer and what is made of it."""
        self.faults = FaultLatch(EventHub(), lambda: None)
        self._link = SimpleNamespace(agreement=None, untold=False, obstructed=lambda agreement, text: None)
        self.agree()
        disk = SimpleNamespace(name="disk0", changes=SimpleNamespace(missing=False), forwarder=SimpleNamespace(up=True))
        setting = SimpleNamespace(faults=self.faults, record=SimpleNamespace(node="me"))
        self._watch = Watch(
            cast("Any", setting), [cast("Any", disk)], cast("Any", self._link), lambda: None, lambda agreement: None
        )

    def agree(self) -> None:
        """The link is up, perhaps again."""
        peer = SimpleNamespace(call=self._call)
        self._link.agreement = Agreement("nbd://b", cast("Any", peer), [], Verdict.QUICK)

    def checkpoint(self) -> None:
        """As primary/side.py does it."""
        self.consistent = True
        self.faults.clear()
        self._watch.checkpoint_taken()

    def look(self) -> bool:
        """Whether an error is shown now."""
        assert self._watch._round() > 0
        return self.faults.fault is not None

    def _call(self, command: str, arguments: dict[str, Any], timeout_s: float) -> object:
        if command != "query-replication":
            return []
        status = {"mode": "secondary", "stage": "running", "link": {"primary": "me"}, "consistent": self.consistent}
        self.meanwhile()
        return status


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_secondary_that_never_had_a_checkpoint_has_lost_none(scene: Scene) -> None:
    assert not scene.look()
    assert not scene.look()


@pytest.mark.parametrize("seen", [True, False])
def test_a_checkpoint_that_is_lost_is_told_whether_it_was_seen_or_not(scene: Scene, seen: bool) -> None:
    scene.look()
    scene.checkpoint()
    if seen:
        assert not scene.look()
    scene.consistent = False
    assert scene.look()
    fault = scene.faults.fault
    assert fault is not None
    assert (fault.case, fault.operation) == (Case.EMPTYING, "keep")
    assert "has lost its last checkpoint" in fault.desc


def test_it_is_told_once_and_over_with_the_next_checkpoint(scene: Scene) -> None:
    scene.checkpoint()
    scene.consistent = False
    assert scene.look()
    scene.faults.clear()
    assert not scene.look()
    scene.checkpoint()
    assert not scene.look()


def test_an_answer_from_before_a_checkpoint_says_nothing_of_it(scene: Scene) -> None:
    scene.checkpoint()
    scene.look()
    scene.consistent, scene.meanwhile = False, scene.checkpoint
    assert not scene.look()
    scene.meanwhile = lambda: None
    assert not scene.look()


def test_a_checkpoint_of_that_moment_that_is_lost_is_told_by_the_next_look(scene: Scene) -> None:
    scene.checkpoint()
    scene.look()
    scene.consistent, scene.meanwhile = False, scene.checkpoint
    assert not scene.look()
    scene.consistent, scene.meanwhile = False, lambda: None
    assert scene.look()


def test_what_was_taken_over_another_link_is_not_asked_of_this_one(scene: Scene) -> None:
    """The pair may have begun anew since."""
    scene.checkpoint()
    scene.agree()
    scene.consistent = False
    assert not scene.look()


def test_it_is_known_whether_the_secondary_has_a_checkpoint(scene: Scene) -> None:
    """A start that sends everything counts as a checkpoint here, and there is none there."""
    watch = scene._watch
    assert watch.peer_consistent is None
    scene.look()
    assert watch.peer_consistent is False
    scene.meanwhile = scene.checkpoint
    scene.look()
    assert watch.peer_consistent is True, "what it has said before that is old"
    scene.meanwhile = lambda: None
    scene.look()
    assert watch.peer_consistent is True
