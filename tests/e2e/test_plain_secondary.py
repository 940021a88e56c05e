# SPDX-License-Identifier: BSD-3-Clause
"""A plain NBD server as the secondary: what it has answered and not flushed dies with it, and comes again."""

from __future__ import annotations

import pytest

from content import KIB, MIB, make_raw, pattern
from endpoints import DelayedEndpoint
from lab import Lab
from nodes import Primary, refused
from pausepoints import PausePoints
from waiting import wait_until

GRAIN = 64 * KIB
OLD, NEW = pattern(1, MIB), pattern(2, 4 * KIB)


class Plain:
    """A primary, and a server that keeps in memory what was not flushed."""

    def __init__(self, lab: Lab, *arguments: str, sizes: tuple[int, ...] = (MIB,)) -> None:
        self.points: PausePoints = lab.pause_points()
        self.disk = make_raw(lab.folder / "plain.raw", MIB, OLD)
        self.server: DelayedEndpoint = lab.endpoint(
            path=self.disk, filters=["cache"], filter_arguments=["cache=writeback"]
        )
        contents = [OLD] * len(sizes)
        self.primary: Primary = lab.primary(
            self.server.uri(),
            sizes,
            contents=contents,
            extra_arguments=arguments,
            extra_environment=self.points.environment,
        )
        self.primary.start_replication()
        self.clean()

    @property
    def marked(self) -> int:
        return int(self.primary.status()["disks"][0]["out-of-sync-bytes"])

    def clean(self) -> None:
        wait_until(lambda: self.primary.status()["link"]["state"] == "in-sync" and not self.marked, "all is proven")

    def lose(self, *, also: bool = False) -> None:
        """Kill the server between its answer and the flush; `also`: and the primary."""
        self.points.arm("forward.prove")
        guest = self.primary.connect("disk0")
        guest.pwrite(NEW, 3 * GRAIN)
        self.points.wait_hit("forward.prove")
        assert self.marked == GRAIN, "its answer does not end the mark"
        self.server.kill()
        if also:
            self.primary.kill()
        self.points.release("forward.prove")
        assert self.disk.read_bytes() == OLD, "it had not been flushed"
        self.server.start()
        if also:
            self.primary.start()


@pytest.mark.parametrize("also", [False, True], ids=["server", "both"])
@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_what_a_plain_server_had_answered_comes_again_when_it_was_killed(lab: Lab, protocol: str, also: bool) -> None:
    """
    guest:    write, answered
    primary:  sent ........ answered | flush (held here)
    server:   in its cache           | killed, started anew without it
    """
    plain = Plain(lab, f"protocol={protocol}")
    plain.lose(also=also)
    plain.clean()
    plain.primary.checkpoint()
    assert plain.disk.read_bytes() == plain.primary.disks[0].read_bytes() != OLD


def test_a_mark_ends_soon_and_without_a_checkpoint(lab: Lab) -> None:
    plain = Plain(lab)
    plain.primary.connect("disk0").pwrite(NEW, 3 * GRAIN)
    plain.clean()
    plain.server.kill()
    content = plain.disk.read_bytes()
    assert content[3 * GRAIN : 3 * GRAIN + len(NEW)] == NEW, "what is not marked outlives the server"


def test_an_export_that_only_forwards_does_not_go_on_as_if_nothing_was_lost(lab: Lab) -> None:
    """Nobody can send again what the server has lost."""
    plain = Plain(lab, sizes=())
    plain.lose()
    wait_until(lambda: plain.primary.status()["link"]["state"] == "synchronizing", "the link is up again")
    assert plain.marked == GRAIN
    assert "lacks" in refused(plain.primary, "replication-checkpoint")
