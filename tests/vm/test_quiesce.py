# SPDX-License-Identifier: BSD-3-Clause
"""replctl checkpoint --quiesce with a guest that runs qemu-guest-agent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import REPOSITORY
from filesystem import inspect
from guest import Guest
from guestimages import Images, run
from hosts import Hosts, replctl
from lab import Lab
from pausepoints import PausePoints
from waiting import DEADLINE_S, wait_until


def to_replay(image: Path) -> bool:
    """Whether its file system has a journal to replay."""
    return "needs_recovery" in run("dumpe2fs", "-h", image)


class Frozen:
    """A pair and a guest with an agent."""

    def __init__(self, lab: Lab, points: PausePoints) -> None:
        self.agent = lab.folder / "agent.sock"
        self.hosts = Hosts(lab, interval_s=None, images=Images.get().with_agent(), environment=points.environment)
        self.hosts.start()
        channel = ("-chardev", f"socket,id=agent,path={self.agent},server=on,wait=off", "-serial", "chardev:agent")
        self.guest: Guest = self.hosts.guest(self.hosts.a, 1, parameters="vm.agent=1", options=channel)
        self.guest.wait_working(20)


@pytest.fixture
def points(lab: Lab) -> PausePoints:
    return lab.pause_points()


@pytest.fixture
def frozen(lab: Lab, points: PausePoints) -> Frozen:
    return Frozen(lab, points)


def test_a_quiesced_checkpoint_has_nothing_to_replay(frozen: Frozen) -> None:
    hosts, guest = frozen.hosts, frozen.guest
    replctl(hosts.a, "checkpoint")
    assert to_replay(hosts.seen(hosts.b)), "an ordinary checkpoint is as after a power cut"
    for _ in range(2):
        said = replctl(hosts.a, "checkpoint", "--quiesce", str(frozen.agent))
        assert re.match(r"checkpoint \d+ took .*; 1 file systems were frozen for ", said)
        found = hosts.seen(hosts.b)
        assert not to_replay(found)
        assert len(inspect(found, unmounted=True)) >= 20
        guest.console.wait_more(20, DEADLINE_S)


def test_the_guest_writes_on_when_the_program_is_killed_while_it_is_frozen(frozen: Frozen, points: PausePoints) -> None:
    hosts, guest = frozen.hosts, frozen.guest
    points.arm("epoch.cut")
    command = [REPOSITORY / "scripts/replctl", "--control", hosts.a.control_path, "checkpoint", "--quiesce"]
    process = subprocess.Popen([sys.executable, *command, frozen.agent])
    try:
        points.wait_hit("epoch.cut")
        stands = guest.console.drain()
        process.kill()
        process.wait(DEADLINE_S)
        guest.console.wait_records(stands + 20, DEADLINE_S)
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        points.disarm("epoch.cut")
    # What was asked for in its name is not taken: it ends by itself, or like this.
    held = wait_until(lambda: hosts.a.status()["held-epoch"], "the epoch is held")
    hosts.a.execute("replication-checkpoint-abort", epoch=held)
    last = guest.switch_off()
    replctl(hosts.a, "checkpoint")
    assert len(inspect(hosts.disk("b"), unmounted=True)) == last
