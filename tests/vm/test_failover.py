# SPDX-License-Identifier: BSD-3-Clause
"""A Linux guest in stock QEMU on host A, and host B, which goes on with its disk. `make test-vm` runs this folder."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import REPOSITORY
from filesystem import inspect
from guest import BOOT_S, KERNEL_PARAMETERS, MEMORY_MIB, accelerator
from guestimages import Images
from hosts import Hosts
from lab import Lab
from nodes import drained
from records import Loss
from takeover import lose_a, switch_over
from waiting import DEADLINE_S, begin


@pytest.mark.parametrize(("protocol", "seed"), [("async", 1), ("async", 2), ("sync", 3)])
def test_b_goes_on_from_the_last_checkpoint_when_a_dies_at_any_moment(lab: Lab, protocol: str, seed: int) -> None:
    outcome = lose_a(Hosts(lab, protocol=protocol, interval_s=0.5), random.Random(seed))
    assert outcome.loss.due >= 1
    assert outcome.written >= outcome.loss.found + 20


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_planned_switch_over_loses_nothing(lab: Lab, protocol: str) -> None:
    outcome = switch_over(Hosts(lab, protocol=protocol, interval_s=0.5), random.Random(4))
    assert outcome.loss.found == outcome.loss.acknowledged > 0


def test_with_protocol_sync_nothing_is_lost_although_the_plug_of_the_guest_was_pulled(lab: Lab) -> None:
    outcome = switch_over(Hosts(lab, protocol="sync", interval_s=0.5), random.Random(5), pulled=True)
    assert outcome.loss.lost == 0
    assert outcome.loss.acknowledged > 0


def test_what_was_written_after_the_last_checkpoint_is_gone_and_nothing_before_it(lab: Lab) -> None:
    """By command while the guest stands still, so that the moment of the checkpoint is known to the record."""
    hosts = Hosts(lab, interval_s=None)
    hosts.start()
    guest = hosts.guest(hosts.a, 1)
    guest.wait_working(50)
    guest.qmp.execute("stop")
    acknowledged = guest.console.drain()
    hosts.a.execute("replication-checkpoint")
    then = hosts.disk("a").read_bytes()
    guest.qmp.execute("cont")
    guest.console.wait_more(200, DEADLINE_S)
    guest.kill()
    hosts.a.kill()
    on_a = inspect(hosts.disk("a"))
    assert len(on_a) >= acknowledged + 200

    hosts.b.execute("x-colo-lost-heartbeat")
    hosts.b.wait_stage("done")
    identical = hosts.disk("b").read_bytes() == then
    assert identical, "the disk of B is not what the disk of A was at the checkpoint"
    found = inspect(hosts.seen(hosts.b))
    # One more may be durable, and its line not out yet.
    assert len(found) in (acknowledged, acknowledged + 1)
    assert found == on_a[: len(found)]


def test_the_guest_on_b_boots_and_works_before_anything_has_been_committed(lab: Lab) -> None:
    points = lab.pause_points()
    hosts = Hosts(lab, interval_s=None, environment=points.environment)
    hosts.start()
    guest = hosts.guest(hosts.a, 1)
    guest.wait_working(50)
    due = guest.console.last  # before the cut: the guest goes on
    hosts.a.execute("replication-checkpoint")
    guest.console.wait_more(50, DEADLINE_S)  # copied into hidden, which is to be committed then
    guest.kill()
    drained(hosts.a)
    hosts.a.kill()
    acknowledged = guest.console.last

    points.arm("failover.entered")
    failing_over = begin(hosts.b.execute, "x-colo-lost-heartbeat")
    points.wait_hit("failover.entered")
    found = inspect(hosts.seen(hosts.b))
    Loss(acknowledged, due, len(found)).check(found, [1])
    heir = hosts.guest(hosts.b, 2)
    heir.wait_working(20)
    assert hosts.b.status()["stage"] == "failover"
    points.release("failover.entered")
    failing_over.result(DEADLINE_S)
    hosts.b.wait_stage("done")
    heir.console.wait_more(20, DEADLINE_S)
    last = heir.switch_off()
    left = inspect(hosts.disk("b"), unmounted=True)
    Loss(last, last, len(left)).check(left, [1, 2])


def test_a_machine_boots_from_a_test_on_b_while_the_guest_writes_on_a(lab: Lab) -> None:
    hosts = Hosts(lab, interval_s=0.5)
    hosts.start()
    guest = hosts.guest(hosts.a, 1)
    guest.wait_working(50)
    hosts.a.execute("replication-checkpoint")
    images = Images.get()
    parameters = f"{KERNEL_PARAMETERS} vm.tag=2 vm.disks=1"
    done = subprocess.run(
        [
            *(sys.executable, REPOSITORY / "scripts/replctl", "--state", hosts.b.control_path.parent, "test", "run"),
            *("--uri", hosts.b.uri(), "--boot", "--memory", str(MEMORY_MIB), "--marker", "vm: mounted", "--"),
            *("-machine", f"pc,accel={accelerator()}", "-kernel", images.kernel, "-initrd", images.initramfs),
            *("-append", parameters),
        ],
        capture_output=True,
        text=True,
        timeout=BOOT_S + DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "the test has passed in " in done.stdout
    assert hosts.b.status()["last-test"]["result"] == "passed"
    guest.console.wait_more(50, DEADLINE_S)
    guest.kill()
    drained(hosts.a)
    hosts.a.kill()
    hosts.b.execute("x-colo-lost-heartbeat")
    hosts.b.wait_stage("done")
    found = inspect(hosts.seen(hosts.b))
    assert {record.tag for record in found} == {1}  # nothing of the machine that was booted from the test


def test_the_guest_waits_while_nbdkit_of_a_is_killed_and_started_again(lab: Lab) -> None:
    hosts = Hosts(lab, interval_s=0.5)
    hosts.start()
    guest = hosts.guest(hosts.a, 1, reconnect_s=60)
    guest.wait_working(50)
    for _ in range(3):
        hosts.a.kill()
        before = guest.console.drain()
        hosts.a.start()
        assert hosts.a.status()["stage"] == "running"
        guest.console.wait_records(before + 50, DEADLINE_S)
    last = guest.switch_off()
    hosts.a.execute("replication-checkpoint")
    for name in ("a", "b"):
        left = inspect(hosts.disk(name), unmounted=True)
        Loss(last, last, len(left)).check(left, [1])
        assert len(left) == last


# -- scripts/vm-failover -------------------------------------------------------------------------------------------


def vm_failover(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "scripts/vm-failover", *arguments], capture_output=True, text=True, timeout=100, check=False
    )


def test_the_script_tells_what_it_has_measured_and_records_it(tmp_path: Path) -> None:
    cast = tmp_path / "run.cast"
    done = vm_failover("--planned", "--protocol", "sync", "--interval", "0.2", "--seed", "6", "--record", cast)
    assert done.returncode == 0, done.stdout + done.stderr
    for title in ("age of the checkpoint", "boot of the guest on B", "command to first guest I/O"):
        assert title in done.stdout
    assert "of these lost                   0\n" in done.stdout
    header, *events = [json.loads(line) for line in cast.read_text().splitlines()]
    assert header["version"] == 2
    assert "".join(text for _, _, text in events).replace("\r\n", "\n") == done.stdout


@pytest.mark.parametrize("wrong", [("--rounds", "0"), ("--protocol", "eventually"), ("--record", "/nowhere/run.log")])
def test_the_script_refuses_what_it_cannot_do(wrong: tuple[str, str]) -> None:
    done = vm_failover(*wrong)
    assert done.returncode == 2
    assert wrong[1] in done.stderr
