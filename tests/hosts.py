# SPDX-License-Identifier: BSD-3-Clause
"""Host A, on which a virtual machine runs, and host B, which protects its disks, on this machine.

Hosts           the nbdkits and the disks of both, and QEMU with a guest on either
Checkpoints     when the automatic checkpoints were cut, from the primary's events
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commandline
from content import qemu_img
from guest import Guest, accelerator, nbd_node
from guestimages import Images, copy_sparse
from lab import Lab
from nodes import Primary, Secondary, Server, disk_name, top_id
from waiting import DEADLINE_S, Stuck

CLOCKS_S = 0.1
"""Most time between the moment at which a primary has measured how long a checkpoint took, and the one that it puts
into the event: two lines of Python, but on a busy machine."""


class Checkpoints:
    """Listens to a primary until it ends."""

    def __init__(self, primary: Server) -> None:
        """Listen; to know them all, before replication starts."""
        self._changed = threading.Condition()
        self._taken: dict[int, tuple[float, float]] = {}
        self._qmp = primary.qmp()
        threading.Thread(target=self._listen, name="checkpoints", daemon=True).start()

    def _listen(self) -> None:
        with self._qmp, suppress(EOFError, ConnectionError):
            while True:
                try:
                    message = self._qmp.receive()
                except Stuck:
                    continue  # nothing has happened for a minute
                if message.get("event") == "REPLICATION_CHECKPOINT":
                    self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        stamp = event["timestamp"]
        age_s = time.time() - (stamp["seconds"] + stamp["microseconds"] / 1e6)
        with self._changed:
            self._taken[event["data"]["epoch"]] = (time.monotonic() - age_s, event["data"]["duration"])
            self._changed.notify_all()

    @property
    def last(self) -> int:
        """The number of the last one that the primary has told of."""
        with self._changed:
            return max(self._taken, default=0)

    def wait(self, epoch: int, timeout_s: float = DEADLINE_S) -> None:
        """Wait for this one or a later one."""
        with self._changed:
            if not self._changed.wait_for(lambda: max(self._taken, default=0) >= epoch, timeout_s):
                raise Stuck(f"no checkpoint {epoch} within {timeout_s:g} s, only {sorted(self._taken)}")

    def not_before(self, epoch: int) -> float:
        """A moment (time.monotonic()) at which checkpoint `epoch` was not cut yet: what was answered before is in it.

        It was not begun before the one before it was complete. If the primary has told of the checkpoint itself, the
        moment is closer: its end, less its duration. (A primary that is killed may not have come to telling.)
        """
        with self._changed:
            before = max((moment for number, (moment, _) in self._taken.items() if number < epoch), default=0.0)
            if epoch in self._taken:
                moment, duration_s = self._taken[epoch]
                return max(before, moment - duration_s - CLOCKS_S)
            return before


@dataclass
class Hosts:
    """Both hosts: `a` is the primary, `b` the secondary, and their disks hold the same empty file systems."""

    lab: Lab
    disks: int = 1
    protocol: str = "async"
    interval_s: float | None = 1.0
    """Between automatic checkpoints; None: none."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """For nbdkit, besides the test's own."""
    accelerator: str = field(default_factory=accelerator)
    images: Images = field(default_factory=Images.get)
    a: Server = field(init=False, repr=False)
    b: Server = field(init=False, repr=False)
    checkpoints: Checkpoints = field(init=False, repr=False)

    def start(self) -> None:
        """Start both nbdkits, and replication."""
        self.b = self.secondary("b")
        self.a = self.primary("a", self.b)
        self.checkpoints = Checkpoints(self.a)
        self.b.execute("xen-set-replication", enable=True, primary=False)
        self.a.execute("xen-set-replication", enable=True, primary=True)

    @property
    def _options(self) -> dict[str, Any]:
        arguments = [f"protocol={self.protocol}"]
        if self.interval_s is not None:
            arguments.append(f"checkpoint-interval={self.interval_s:g}")
        return {"extra_arguments": arguments, "extra_environment": self.environment}

    def disk(self, name: str, index: int = 0) -> Path:
        """The file of a disk of host `name`, made if it is not there."""
        path = self.lab.folder / f"{name}-{disk_name(index)}.raw"
        if not path.exists():
            copy_sparse(self.images.disk, path)
        return path

    def _sizes(self, name: str) -> list[int]:
        return [self.disk(name, index).stat().st_size for index in range(self.disks)]

    def secondary(self, name: str) -> Secondary:
        """nbdkit of host `name` as a secondary, on what that host has."""
        return self.lab.secondary(self._sizes(name), name=name, **self._options)

    def primary(self, name: str, peer: Server) -> Primary:
        """nbdkit of host `name` as a primary of `peer`, on what that host has."""
        return self.lab.primary(peer.uri(), self._sizes(name), name=name, **self._options)

    @staticmethod
    def exports(server: Server, count: int) -> list[str]:
        """The exports for a guest on `server`."""
        return [(top_id if isinstance(server, Secondary) else disk_name)(index) for index in range(count)]

    def guest(self, server: Server, tag: int, *, reconnect_s: int = 0, **more: Any) -> Guest:
        """A started guest on the exports of `server`; it has not booted yet. `reconnect_s`: how long it waits for a
        server that has gone."""
        nodes = [
            nbd_node(f"node{index}", server, export, **{"reconnect-delay": reconnect_s})
            for index, export in enumerate(self.exports(server, self.disks))
        ]
        guest = Guest(self.lab.folder, f"guest{tag}", self.images, nodes, tag=tag, accelerator=self.accelerator, **more)
        return self.lab.start(guest)

    def seen(self, server: Server, index: int = 0) -> Path:
        """A copy of what an export for the guest shows now."""
        copy = self.lab.folder / f"{server.name}-seen{index}.raw"
        export = self.exports(server, self.disks)[index]
        qemu_img("convert", "-f", "raw", "-O", "raw", server.uri(export), copy)
        return copy


def replctl(server: Server, *arguments: str) -> str:
    """Run scripts/replctl on a host as its administrator does; what it prints. AssertionError if it fails."""
    done = commandline.replctl("--control", server.control_path, *arguments)
    if done.returncode != 0:
        raise AssertionError(f"replctl {' '.join(arguments)}: exit {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout
