# SPDX-License-Identifier: BSD-3-Clause
"""Frames between two hosts: a cable to each, and for each direction what happens to them.

Where to look:

    Port     the relay's end of the cable to one host
    Lane     one direction
"""

from __future__ import annotations

import errno
import heapq
import math
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from shape import Counters, Shape
from tcpflows import RST, Flow, Flows, Segment, reset_frame

_BATCH = 64  # frames of one direction before the other gets its turn
_FRAME_BYTES_MAX = 65536 + 14
_RECEIVE_BYTES = 16 << 20
_DELAYED_BYTES_MAX = 64 << 20
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 263, 6, 23
_SO_RCVBUFFORCE = 33
_ETH_P_ALL = 3


class Port:
    """The relay's end of the cable to one host."""

    def __init__(self, interface: str, mac: str) -> None:
        self.mac = bytes.fromhex(mac.replace(":", ""))
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ALL))
        self.socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
        self.socket.bind((interface, _ETH_P_ALL))
        self._overruns = 0

    def receive(self) -> bytes | None:
        """The next frame, if there is one. An interface that was just taken down says so once, and then nothing."""
        try:
            return self.socket.recv(_FRAME_BYTES_MAX)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENETDOWN:
                raise
            return None

    def send(self, frame: bytes) -> bool:
        """Put a frame on the cable; False if it finds no room, or the cable cut."""
        try:
            self.socket.send(frame)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ENETDOWN):
                raise
            return False
        return True

    def overruns(self) -> int:
        """Frames from the host that the kernel has dropped for want of room; its own count starts anew when read."""
        statistics = self.socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        _, dropped = struct.unpack("II", statistics)
        self._overruns += int(dropped)
        return self._overruns


@dataclass(order=True, slots=True)
class _Delayed:
    """A frame that waits for its time."""

    due: float
    serial: int
    frame: bytes = field(compare=False)
    segment: Segment | None = field(compare=False)


class Lane:
    """One direction: what arrives at `source` goes to `target`, or not. Times are in seconds, monotonic."""

    def __init__(self, source: Port, target: Port, flows: Flows, seed: str) -> None:
        self.source = source
        self.shape = Shape()
        self.silent = False
        self.counters = Counters()
        self._target = target
        self._flows = flows
        self._random = random.Random(seed)
        self._delayed: list[_Delayed] = []
        self._delayed_bytes = 0
        self._serial = 0
        self._sent_at = 0.0  # when the transmitter has sent all that waits for it
        self._last_due = 0.0
        self._unsent = 0

    @property
    def due(self) -> float:
        """When something is to be done next; infinity if nothing waits."""
        return self._delayed[0].due if self._delayed else math.inf

    def note_gauges(self) -> None:
        """Bring up to date what the counters get from elsewhere."""
        self.counters.overrun = self._unsent + self.source.overruns()
        self.counters.waiting = len(self._delayed)

    def drain(self, now: float) -> None:
        """Take what has arrived, up to a batch."""
        for _ in range(_BATCH):
            frame = self.source.receive()
            if frame is None:
                return
            self._arrived(frame, now)

    def deliver(self, now: float) -> None:
        """Pass on what is due."""
        while self._delayed and self._delayed[0].due <= now:
            delayed = heapq.heappop(self._delayed)
            self._delayed_bytes -= len(delayed.frame)
            self._pass(delayed.frame, delayed.segment)

    def forget(self, unwanted: Callable[[Segment | None], bool]) -> None:
        """Lose the frames under way that are `unwanted`."""
        kept = [delayed for delayed in self._delayed if not unwanted(delayed.segment)]
        self.counters.silenced += len(self._delayed) - len(kept)
        self._delayed_bytes = sum(len(delayed.frame) for delayed in kept)
        heapq.heapify(kept)
        self._delayed = kept

    def reset_source(self, flow: Flow, sequence: int) -> None:
        """Reset the connection whose sender is this lane's source."""
        self.source.send(reset_frame(flow, self.source.mac, self._target.mac, sequence))

    def _arrived(self, frame: bytes, now: float) -> None:
        segment = self._flows.segment(frame)
        if self.silent:
            self.counters.silenced += 1
        elif segment is not None and segment.flow.refused:
            self.counters.silenced += 1
            if not segment.flags & RST:
                self.reset_source(segment.flow, segment.ack)
        elif self._chance(self.shape.loss):
            self.counters.lost += 1
        else:
            self._schedule(frame, segment, now)

    def _schedule(self, frame: bytes, segment: Segment | None, now: float) -> None:
        shape = self.shape
        if not (shape.rate or shape.delay or self._delayed):
            self._pass(frame, segment)
            return
        due = now
        if shape.rate:
            begin = max(now, self._sent_at)
            # Otherwise a frame larger than the whole queue could never pass.
            if begin > now and (begin - now) * shape.rate / 8 + len(frame) > shape.queue:
                self.counters.overflow += 1
                return
            due = self._sent_at = begin + len(frame) * 8 / shape.rate
        if self._delayed_bytes + len(frame) > _DELAYED_BYTES_MAX:
            self.counters.overflow += 1
            return
        if self._chance(shape.reorder):
            self.counters.reordered += 1
        else:
            due += (shape.delay + shape.jitter * self._random.uniform(-1, 1)) / 1000
            due = self._last_due = max(due, self._last_due)
        self._serial += 1
        self._delayed_bytes += len(frame)
        heapq.heappush(self._delayed, _Delayed(due, self._serial, frame, segment))

    def _chance(self, percent: float) -> bool:
        return bool(percent) and self._random.random() * 100 < percent

    def _pass(self, frame: bytes, segment: Segment | None) -> None:
        counters = self.counters
        if not self._target.send(frame):
            self._unsent += 1
            return
        counters.frames += 1
        counters.bytes += len(frame)
        if segment is not None:
            counters.payload += segment.payload
            self._flows.passed(segment)
