# SPDX-License-Identifier: BSD-3-Clause
"""Events on their way from the node to the control clients.

Invariants: emitting never blocks and never fails; a subscriber that does not read loses its
subscription, not the node its speed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
Subscriber = Callable[[Event], None]


class EventHub:
    """Hands every event to every subscriber, in the order of emission."""

    def __init__(self) -> None:
        # Protects the list of subscribers and the order of delivery. Last in the lock order: a
        # subscriber only puts the event into a bounded queue of its own and must take no other lock
        # of this package.
        self._lock = threading.Lock()
        self._subscribers: list[Subscriber] = []

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber(event)` for every event from now on; it must not block."""
        with self._lock:
            self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Stop calling `subscriber`; no effect if it is not subscribed."""
        with self._lock:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

    def emit(self, name: str, **data: Any) -> None:
        """Publish QMP event `name`; the data's members are named as on the wire ("from" as `from_`)."""
        now_us = time.time_ns() // 1000
        event: Event = {
            "event": name,
            "data": {key.rstrip("_"): value for key, value in data.items()},
            "timestamp": {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000},
        }
        with self._lock:
            for subscriber in self._subscribers:
                subscriber(event)
