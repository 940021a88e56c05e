# SPDX-License-Identifier: BSD-3-Clause
"""What the network between two hosts does to frames, and what it has done."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

DIRECTIONS = ("ab", "ba")
"""From host a to host b, and back."""

QUEUE_BYTES = 256 << 10
"""What waits for the transmitter when there is a rate, as in a router; more is dropped."""


@dataclass(frozen=True)
class Shape:
    """What one direction does to frames; the default is a perfect network."""

    rate: float = 0.0
    """bit/s, counting whole frames; 0 is unlimited."""
    delay: float = 0.0
    """ms."""
    jitter: float = 0.0
    """ms; the delay is up to so much shorter or longer, evenly distributed, but frames keep their order."""
    loss: float = 0.0
    """Percent of the frames."""
    reorder: float = 0.0
    """Percent of the frames that skip the delay, and so overtake those before them, as netem does it."""
    queue: int = QUEUE_BYTES
    """Bytes that may wait for the transmitter."""

    def __post_init__(self) -> None:
        """ValueError if it cannot be."""
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
        if self.loss > 100 or self.reorder > 100:
            raise ValueError("loss and reorder are percentages: at most 100")
        if self.jitter > self.delay:
            raise ValueError("jitter must not be larger than the delay")
        if self.reorder and not self.delay:
            raise ValueError("reorder needs a delay: without one there is nothing to overtake")


@dataclass
class Counters:
    """What one direction has done since the start."""

    frames: int = 0
    """Passed on."""
    bytes: int = 0
    """Passed on, headers included."""
    payload: int = 0
    """Bytes of TCP data passed on, those sent again included."""
    lost: int = 0
    """Frames dropped by `loss`."""
    overflow: int = 0
    """Frames that found the queue full."""
    silenced: int = 0
    """Frames dropped by a black hole, a cut or a reset."""
    reordered: int = 0
    """Frames that skipped the delay."""
    overrun: int = 0
    """Frames dropped because the relay was too slow for them."""
    waiting: int = 0
    """Frames under way at this instant."""
