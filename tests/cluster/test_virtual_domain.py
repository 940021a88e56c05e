# SPDX-License-Identifier: BSD-3-Clause
"""A protected VM from end to end: the cluster is made by the commands of docs/cluster.md, libvirt runs the VM, and asks
the node before it does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.configuration import NODE
from cluster.virt import TOOLS, VirtSite

pytestmark = pytest.mark.timeout(900)

MOVES = {
    "crm": ("crm resource move disk-clone {}", "crm resource clear disk-clone"),
    "pcs": ("pcs resource move disk-clone {} --promoted", "pcs resource clear disk-clone"),
}


@contextmanager
def protected(tool: str) -> Iterator[VirtSite]:
    """The VM runs on node-a, and is in sync."""
    with tempfile.TemporaryDirectory(prefix="rc-") as folder:
        Path(folder).chmod(0o755)
        with VirtSite(Path(folder), tool) as made:
            made.begin()
            yield made


def domain(it: VirtSite, index: int) -> str:
    """What libvirt says of the VM on that host."""
    return it.hosts[index].run("virsh", "-q", "domstate", NODE).stdout.strip()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_vm_of_libvirt_follows_its_disk(installed: None, tool: str) -> None:
    with protected(tool) as it:
        owner, copy = it.whole()
        index = it.hosts.index(owner)
        assert domain(it, index) == "running"
        refused = copy.run("virsh", "-q", "start", NODE)
        assert refused.returncode != 0
        assert f"the guest {NODE} may not run" in refused.stderr, refused.stderr
        # docs/cluster.md: the move, and what it leaves.
        move, clear = MOVES[tool]
        owner.told(*move.format(copy.name).split())
        it.wait_promoted(copy)
        owner.told(*clear.split())
        [*_, begin] = it.journal.begins()
        before = [line for line in it.journal.acknowledged() if line.generation == begin.before]
        assert begin.number >= before[-1].number + 1, "everything that was answered is there"
        assert it.whole() == (copy, owner)
        assert domain(it, index) != "running"

        it.switch.stays_off.add(copy.name)  # else it may be back before the other one is promoted
        copy.power_off()
        it.wait_promoted(owner)
        copy.power_on()
        assert it.whole() == (owner, copy)
        assert [(what, who) for _, what, who in it.switch.log] == [("reboot", copy.name)]
        assert it.journal.violations() == []
