# SPDX-License-Identifier: BSD-3-Clause
"""side.py: a primary that ends, or is stopped, while its link comes back does not leave the secondary in the midst of
what it is told, where that takes a moment only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from content import MIB, changed, make_raw, pattern
from lab import Lab
from nodes import Secondary
from pausepoints import PausePoints
from replication.events import EventHub
from replication.node import Node
from replication.options import DiskOptions, Options
from replication.primary import side as primary_side
from replication.record.state import StateFolder
from replication.stage import Mode, Stage
from waiting import DEADLINE_S, begin, chance, wait_until

OLD = pattern(1, MIB)
NEW = pattern(2, 4096)
LATE = pattern(3, 4096)
GRAIN = 64 << 10


class Restarted:
    """A pair of which the primary, in this process, was just started anew; the secondary can be held."""

    def __init__(self, lab: Lab) -> None:
        self.points = PausePoints(lab.folder / "pause")
        self.secondary: Secondary = lab.secondary(contents=(OLD,), extra_environment=self.points.environment)
        self.disk = make_raw(lab.folder / "primary.raw", MIB, OLD)
        self._state = str(lab.folder / "primary.state")
        self.node = self._opened()
        self.node.launch()
        self.secondary.start_replication()
        self.node.start(Mode.PRIMARY, self.secondary.uri(), "auto")
        self.write(NEW, 0)
        self.node.checkpoint()
        self.node.close()
        self.node = self._opened()
        self._closed = False

    def _opened(self) -> Node:
        disks = [DiskOptions("disk0", str(self.disk), None)]
        options = Options(Mode.PRIMARY, disks, self._state, None, timeout_s=30.0)
        return Node(options, EventHub(), StateFolder(self._state))

    def write(self, data: bytes, offset: int) -> None:
        """A guest's."""
        self.node.side.disks[0].write(memoryview(data), offset, False)  # type: ignore[attr-defined]

    def close(self) -> None:
        """The end of the process, once."""
        if not self._closed:
            self._closed = True
            self.node.close()

    def stop(self) -> None:
        """A planned stop."""
        self.node.stop(False)
        assert self.node.stage is Stage.DONE

    def launch_held(self, point: str) -> None:
        """Have the link come back as far as the secondary's `point`."""
        self.points.arm(point)
        self.node.launch()
        self.points.wait_hit(point)


@pytest.fixture
def restarted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restarted]:
    # The secondary is held for as long as this machine takes.
    monkeypatch.setattr(primary_side, "_STOP_S", DEADLINE_S)
    monkeypatch.setattr(primary_side, "_FINISH_S", DEADLINE_S)
    one = Restarted(lab)
    yield one
    for point in one.points.folder.iterdir():
        point.unlink(missing_ok=True)
    one.close()


@pytest.mark.parametrize(
    ("end", "lacking"),
    [(Restarted.close, False), (Restarted.close, True), (Restarted.stop, False)],
    ids=["end", "end, a write missing", "stop"],
)
def test_a_primary_that_ends_while_its_link_comes_back_says_first_that_the_secondary_has_everything(
    restarted: Restarted, end: Callable[[Restarted], None], lacking: bool
) -> None:
    """
    primary:    connects -- tells what it will send ------------------ sends it -- says that this was all -- ends
    secondary:                   held                    goes on
    test:                            has it end   release

    Wrong: it ends at once. Its secondary then waits for the rest of a resync, and refuses a planned stop.
    """
    if lacking:
        restarted.write(LATE, GRAIN)
    restarted.launch_held("pairing.sync")
    ended = begin(end, restarted)
    assert not chance(ended)
    restarted.points.release("pairing.sync")
    ended.result(DEADLINE_S)
    wait_until(lambda: restarted.secondary.status()["link"]["primary"] is None, "the secondary is alone")
    assert restarted.secondary.status()["link"] == {"state": "disconnected", "primary": None, "reason": None}
    restarted.secondary.execute("replication-stop")
    late = [(GRAIN, LATE)] if lacking else []
    assert restarted.secondary.disks[0].read_bytes() == changed(OLD, (0, NEW), *late)


def test_a_primary_that_ends_does_not_wait_for_a_resync_that_takes_longer(
    restarted: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest waits for this end when its nbdkit is started anew."""
    monkeypatch.setattr(primary_side, "_FINISH_MAX", -1)
    monkeypatch.setattr(primary_side, "_STOP_S", 1.0)
    restarted.write(LATE, GRAIN)
    restarted.launch_held("target-write.preserved")
    begin(restarted.close).result(DEADLINE_S / 2)
    restarted.points.release("target-write.preserved")
    why = "a resync was interrupted"
    wait_until(lambda: restarted.secondary.status()["link"]["reason"] == why, "the secondary is alone, and says why")


def test_an_attempt_that_has_told_the_secondary_nothing_yet_is_given_up(
    restarted: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secondary stays what the last good end has made of it."""
    monkeypatch.setattr(primary_side, "_STOP_S", 1.0)
    restarted.launch_held("pairing.begun")
    begin(restarted.close).result(DEADLINE_S / 2)
    restarted.points.release("pairing.begun")
    wait_until(lambda: restarted.secondary.status()["link"]["state"] == "disconnected", "its session is over")
    restarted.secondary.execute("replication-stop")
    assert restarted.secondary.disks[0].read_bytes() == changed(OLD, (0, NEW))
