# SPDX-License-Identifier: BSD-3-Clause
"""What goes wrong around the nodes: the network, the disks, full file systems, the clocks, bad clients.

A fault lasts from its event's begin to its end, or to the next `calm`, in which nothing is wrong.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from soak.bounds import Bounds
from soak.clients import crowd
from soak.node import Node
from soak.plan import Event
from wire import Wire

RECENT_S = 6.0
"""For so long after a fault of its disk a guest's error is still that fault's: a loss is found out by the next flush,
and a disk that was given up is connected to again."""


class Weather:
    """Takes the events of all lanes but the nodes' own."""

    def __init__(self, wire: Wire, nodes: dict[str, Node], bounds: Bounds) -> None:
        self._wire = wire
        self._nodes = nodes
        self._bounds = bounds
        # Protects the fields below, and is held while a fault begins or ends.
        self._changed = threading.Condition()
        self._calm = 0
        self._active: dict[str, ExitStack] = {}
        self._ended: dict[str, float] = {}
        self._failing: set[str] = set()
        self._delays: dict[str, float] = {}
        self.ending = threading.Event()

    # -- faults --------------------------------------------------------------------------------------------

    def run(self, event: Event) -> None:
        """Do it, and return when it is over."""
        with self._changed:
            while self._calm and not self.ending.is_set():
                self._changed.wait(0.5)
            if self.ending.is_set():
                return
            undo = ExitStack()
            self._active[event.lane] = undo
            self._begin(event, undo)
            self._bounds.did(f"{event.lane.partition('-')[0]}: {event.name}")
        self.ending.wait(event.seconds)
        with self._changed:
            if self._active.get(event.lane) is undo:
                self._end_locked(event.lane)

    def _end_locked(self, lane: str) -> None:
        self._active.pop(lane).close()
        self._delays.pop(lane, None)
        if lane in self._failing:
            self._failing.remove(lane)
            self._ended[lane] = time.monotonic()

    @contextlib.contextmanager
    def calm(self) -> Iterator[None]:
        """Inside, nothing is wrong, and nothing begins."""
        with self._changed:
            self._calm += 1
            for lane in list(self._active):
                self._end_locked(lane)
        try:
            yield
        finally:
            with self._changed:
                self._calm -= 1
                self._changed.notify_all()

    def killed(self, node: Node) -> None:
        """It is there again. What it had not flushed on a disk behind NBD counts as lost, and the next flush says so
        (docs/failures.md)."""
        if node.disk is not None:
            self._ended[f"flush-{node.name}"] = time.monotonic()

    def excuse(self, node: Node, kind: str) -> tuple[bool, float]:
        """Whether a guest's request there, write or flush, say, may meet errors of its own disk, and how many seconds
        each request of that disk takes."""
        lanes = (f"disk-{node.name}", f"space-data-{node.name}", *([f"flush-{node.name}"] if kind == "flush" else []))
        now = time.monotonic()
        failing = any(lane in self._failing or now - self._ended.get(lane, 0.0) < RECENT_S for lane in lanes)
        return failing, self._delays.get(lanes[0], 0.0)

    def slowest_s(self) -> float:
        """Seconds that a request of the slowest disk takes."""
        return max(self._delays.values(), default=0.0)

    # -- what they are -------------------------------------------------------------------------------------

    def _begin(self, event: Event, undo: ExitStack) -> None:
        kind = event.lane.split("-")
        begin: dict[str, Callable[[Event, ExitStack], None]] = {
            "network": self._network,
            "disk": self._disk,
            "space": self._space,
            "clock": self._clock,
            "clients": self._clients,
        }
        begin[kind[0]](event, undo)

    def _network(self, event: Event, undo: ExitStack) -> None:
        if event.name in ("slow", "lossy"):
            undo.callback(self._wire.shape)
            self._wire.shape(**event.values)
        elif event.name == "reset":
            self._wire.reset()
        else:
            undo.callback(self._wire.mend)
            getattr(self._wire, event.name)(**event.values)

    def _disk(self, event: Event, undo: ExitStack) -> None:
        disk = self._nodes[event.lane[-1]].disk
        assert disk is not None
        undo.callback(disk.behave)
        if event.name == "slow":
            self._delays[event.lane] = event.values["delay"]
            disk.behave(delay=event.values["delay"])
            return
        self._failing.add(event.lane)
        if event.name == "failing":
            disk.behave(pwrite=event.values["share"], pread=event.values["share"] / 4)
        else:
            disk.behave(flush=event.values["share"])

    def _space(self, event: Event, undo: ExitStack) -> None:
        _, what, host = event.lane.split("-")
        space = self._nodes[host].spaces[what]
        self._failing.add(event.lane)
        undo.callback(space.make_room)
        space.fill()

    def _clock(self, event: Event, undo: ExitStack) -> None:
        self._nodes[event.lane[-1]].set_clock(event.values["by_s"])

    def _clients(self, event: Event, undo: ExitStack) -> None:
        crowd(event.name, self._nodes[event.lane[-1]], undo)
