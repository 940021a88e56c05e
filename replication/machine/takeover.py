# SPDX-License-Identifier: BSD-3-Clause
"""Host B goes on: failover of the disk, then the state that belongs to it."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .monitor import FtError, Limits, Monitor, checkpoint_of
from .store import Store, Unit


@dataclass(frozen=True)
class TakenOver:
    """What a take-over has come to; times in milliseconds from its beginning."""

    epoch: int
    fenced_ms: float
    """The disk is B's."""
    loaded_ms: float
    """The state is in QEMU."""
    running_ms: float
    """The guest runs."""

    def to_json(self) -> str:
        """For a program."""
        return json.dumps(asdict(self))


def unit_of(store: Store, control: Monitor) -> Unit:
    """The state that belongs to the last checkpoint of B's disk; FtError if there is none."""
    epoch, asked = checkpoint_of(control)
    record = store.load()
    unit = record.of(epoch, asked)
    if unit is None:
        known = [str(each.epoch) for each in (record.committed, record.prepared) if each is not None]
        raise FtError(
            f"no state belongs to checkpoint {epoch} of the disk, only to {' and '.join(known) or 'none'}: "
            "boot the guest from the guest face instead"
        )
    if record.resumed == unit.epoch:
        raise FtError(
            f"a guest has gone on with state {unit.epoch} already, and may have written since: the state belongs to "
            "the disk no longer. Boot the guest from the guest face instead"
        )
    if not (store.folder / unit.file).exists():
        raise FtError(f"the state of checkpoint {epoch} is gone: {store.folder / unit.file}")
    return unit


@contextlib.contextmanager
def _monitors(control: Path, qmp: Path, timeout_s: float) -> Iterator[tuple[Monitor, Monitor]]:
    nbdkit = Monitor(control, "nbdkit of B", timeout_s)
    with contextlib.closing(nbdkit), contextlib.closing(Monitor(qmp, "QEMU of B", timeout_s)) as qemu:
        yield nbdkit, qemu


def take_over(store: Store, control: Path, qmp: Path, limits: Limits, say: Callable[[str], None]) -> TakenOver:
    """Host A is dead: the guest goes on here. `qmp` is the monitor of a QEMU that was started with `-incoming defer` on
    the guest face. FtError; nothing has changed if what is needed was not there."""
    with store.resuming(), _monitors(control, qmp, limits.answer_s) as (nbdkit, qemu):
        state = qemu.execute("query-status")["status"]
        if state != "inmigrate":
            raise FtError(f"QEMU of B does not wait for a state (-incoming defer), it is {state}")
        begun = time.monotonic()
        preflight = nbdkit.execute("query-failover")
        if preflight["stage"] == "running":
            if not preflight["allowed"]:
                raise FtError(str(preflight["reason"]))
            unit_of(store, nbdkit)
            nbdkit.execute("replication-stop", {"failover": True}, timeout_s=limits.epoch_s)
        fenced_ms = (time.monotonic() - begun) * 1e3
        # Only now: A may have had a checkpoint on its way, and cannot any more.
        unit = unit_of(store, nbdkit)
        say(f"the disk is at checkpoint {unit.epoch}, {unit.bytes / 1e6:.0f} MB of state belong to it")
        qemu.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
        qemu.execute("migrate-incoming", {"uri": f"exec:exec cat {shlex.quote(str(store.folder / unit.file))}"})
        ends = ("completed", "failed")
        deadline = time.monotonic() + limits.epoch_s
        event = qemu.wait_event("MIGRATION", deadline, lambda data: data["status"] in ends)
        if event["data"]["status"] != "completed":
            raise FtError("QEMU of B cannot load the state: see what it has printed")
        loaded_ms = (time.monotonic() - begun) * 1e3
        store.resume(unit.epoch)  # before: whatever becomes of this process, nobody brings the state back once more
        qemu.execute("cont")
        return TakenOver(unit.epoch, fenced_ms, loaded_ms, (time.monotonic() - begun) * 1e3)
