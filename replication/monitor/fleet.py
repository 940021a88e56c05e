# SPDX-License-Identifier: BSD-3-Clause
"""Which nodes are watched, and what all of them have to say.

Invariants: at most NODES_MAX nodes; one that is not configured any more is forgotten; who subscribes and does not read
loses news, and delays nobody.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from replication.log import log
from replication.monitor.sight import Json, Sight
from replication.monitor.watcher import Watcher

NODES_MAX = 256
RESCAN_S = 5.0
STOP_S = 5.0
NEWS_MAX = 200
"""Of one subscriber, which has not read them yet."""

News = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Which nodes there are."""

    sockets: Mapping[str, str]
    """The control sockets by the nodes' names."""
    trouble: str | None = None
    """What of the configuration cannot be read."""


class Listener(Protocol):
    """Who is told all that is heard of the nodes."""

    def heard(self, sight: Sight, event: Json | None) -> None:
        """An event of a node, or None after a look at it; must not block. By one thread for each node."""

    def keep(self, nodes: Iterable[str]) -> None:
        """There are no nodes any more but these."""


class Subscription:
    """A bounded queue of news."""

    def __init__(self) -> None:
        self._queue: queue.Queue[News | None] = queue.Queue(NEWS_MAX)

    def put(self, news: News | None) -> None:
        """Add news; dropped when the queue is full: the reader sees the whole state with its next look anyway."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(news)

    def next(self, wait_s: float) -> News | None:
        """The oldest news; None when there was none within `wait_s`, or the fleet has stopped."""
        try:
            return self._queue.get(timeout=wait_s)
        except queue.Empty:
            return None


class Fleet:
    """The watchers of all nodes."""

    def __init__(
        self,
        find: Callable[[], Found],
        make: Callable[[str, str, Callable[[Watcher, Json | None], None]], Watcher] = Watcher,
        rescan_s: float = RESCAN_S,
        listener: Listener | None = None,
    ) -> None:
        """`find()` is called every `rescan_s` seconds."""
        self._find = find
        self._make = make
        self._rescan_s = rescan_s
        self._listener = listener
        # Protects the two below; never held across I/O.
        self._lock = threading.Lock()
        self._watchers: dict[str, Watcher] = {}
        self._subscriptions: list[Subscription] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self.trouble: str | None = None
        """Why the configuration could not be read the last time."""
        self._full_told = False

    def start(self) -> None:
        """Watch what there is now; go on in a thread."""
        self.scan()
        self._thread.start()

    def stop(self) -> None:
        """End all threads, within STOP_S."""
        self._ended.set()
        deadline = time.monotonic() + STOP_S
        watchers = self.watchers()
        for watcher in watchers:
            watcher.stop()
        with self._lock:
            for subscription in self._subscriptions:
                subscription.put(None)
        for watcher in watchers:
            watcher.join(deadline)
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def ended(self) -> bool:
        """Whether it has been stopped."""
        return self._ended.is_set()

    def watchers(self) -> list[Watcher]:
        """All watchers, in the order of their names."""
        with self._lock:
            return [self._watchers[name] for name in sorted(self._watchers)]

    def subscribe(self) -> Subscription:
        """News from now on."""
        subscription = Subscription()
        with self._lock:
            self._subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """No more of them."""
        with self._lock:
            self._subscriptions.remove(subscription)

    def scan(self) -> None:
        """Begin with nodes that are new, forget those that are gone; one with another socket is another one."""
        try:
            found = self._find()
        except Exception as error:  # noqa: BLE001 (a folder that cannot be read must not end the watch over the nodes)
            found = Found({watcher.name: watcher.path for watcher in self.watchers()}, str(error) or repr(error))
        if found.trouble and found.trouble != self.trouble:
            log(f"cannot read which nodes there are: {found.trouble}")
        self.trouble = found.trouble
        wanted = dict(found.sockets)
        if len(wanted) > NODES_MAX and not self._full_told:
            self._full_told = True
            log(f"there are {len(wanted)} nodes; only the first {NODES_MAX} are watched")
        wanted = dict(sorted(wanted.items())[:NODES_MAX])
        with self._lock:
            gone = [watcher for name, watcher in self._watchers.items() if wanted.get(name) != watcher.path]
            for watcher in gone:
                del self._watchers[watcher.name]
            new = [self._make(name, path, self._heard) for name, path in wanted.items() if name not in self._watchers]
            self._watchers.update({watcher.name: watcher for watcher in new})
        for watcher in gone:
            watcher.stop()
        for watcher in new:
            watcher.start()
        if gone:
            self._tell({"kind": "nodes"})
            if self._listener is not None:
                self._listener.keep(wanted)

    def _run(self) -> None:
        while not self._ended.wait(self._rescan_s):
            self.scan()

    def _heard(self, watcher: Watcher, event: Json | None) -> None:
        if self._listener is not None:
            self._listener.heard(watcher.sight, event)
        if event is None:
            self._tell({"kind": "node", "node": watcher.name})
        else:
            self._tell({"kind": "event", "node": watcher.name, "event": event})

    def _tell(self, news: News) -> None:
        with self._lock:
            for subscription in self._subscriptions:
                subscription.put(news)
