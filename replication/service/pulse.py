# SPDX-License-Identifier: BSD-3-Clause
"""Tells systemd that the node is ready, that it lives, and how it is.

Ready and alive is a node that answers: it is asked over its own control socket, as an operator would, and an answer is
what the watchdog hears of. A thread that only ran by the clock would also run in a node whose locks are stuck.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from replication.client.qmp import Refused
from replication.client.session import Session, Unusable
from replication.client.values import human_seconds, printable
from replication.events import Event, EventHub
from replication.log import log, surviving
from replication.service.notify import Notifier

PERIOD_S = 5.0
"""Between two questions: the age of the checkpoint in STATUS= is as old as that."""

_PARTS = 4
"""Questions within the time of the watchdog: one that is answered late does not end the node."""

_EARLY_S = 0.05
"""Between two questions until the node is ready."""

_SPACING_S = 0.2
"""Between two questions, however much happens."""

_TOLD_OF = ("REPLICATION_STAGE_CHANGE", "REPLICATION_LINK", "REPLICATION_ERROR")


class Pulse:
    """The thread that asks and tells."""

    def __init__(self, notifier: Notifier, control: str | None, hub: EventHub) -> None:
        """`control` is the path of the node's control socket; a node without one is ready when it serves, and no more
        is told."""
        self._notifier = notifier
        self._control = control
        self._hub = hub
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._ready = False
        self._silent = False
        self._watchdog_s = notifier.watchdog_s
        # Protects `_watchdog_s`, which a reload changes, together with what is told of it.
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin, if there is anybody to tell."""
        if self._control is None:
            self._notifier.tell(READY=1)
        elif self._notifier.heard:
            self._hub.subscribe(self._on_event)
            threading.Thread(target=self._run, args=(self._control,), name="pulse", daemon=True).start()

    def stop(self) -> None:
        """The node is ending: it answers no more, and nobody shall be told so."""
        if not self._closing.is_set():
            self._closing.set()
            self._changed.set()
            self._notifier.tell(STOPPING=1, STATUS="ending")

    def watch(self, watchdog_s: float | None) -> None:
        """Another time for the watchdog than the unit's, from now on; 0 for none, None for the unit's."""
        with self._lock:
            wanted = self._notifier.watchdog_s if watchdog_s is None else watchdog_s or None
            if wanted != self._watchdog_s:
                self._watchdog_s = wanted
                self._notifier.tell(WATCHDOG_USEC=round((wanted or 0) * 1e6))
        self._changed.set()

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Tell the beginning and the end of a reload, of a node that is ready."""
        told = self._ready and not self._closing.is_set()
        if told:
            self._notifier.reloading()
        try:
            yield
        finally:
            if told:
                self._notifier.tell(READY=1)

    def _on_event(self, event: Event) -> None:
        if event["event"].startswith(_TOLD_OF):
            self._changed.set()

    def _run(self, control: str) -> None:
        while not self._closing.wait(_SPACING_S if self._ready else _EARLY_S):
            self._changed.clear()
            watchdog_s = self._watchdog_s
            period_s = PERIOD_S if watchdog_s is None else min(PERIOD_S, watchdog_s / _PARTS)
            with surviving():
                self._ask(control, period_s, watchdog_s is not None)
            if self._ready:
                self._changed.wait(period_s)

    def _ask(self, control: str, patience_s: float, watched: bool) -> None:
        try:
            with Session(control, patience_s) as session:
                answer = session.call("query-replication")
        except (Unusable, Refused) as error:
            if self._closing.is_set():
                return
            if not self._silent:
                log(f"the node does not answer itself: {error}")
            self._silent = True
            self._notifier.tell(STATUS=f"does not answer: {printable(error)}")
            return
        if self._closing.is_set():
            return
        self._silent = False
        fields: dict[str, object] = {"STATUS": summary(answer)}
        if not self._ready:
            self._ready = True
            fields["READY"] = 1
        if watched:
            fields["WATCHDOG"] = 1
        self._notifier.tell(**fields)


def summary(answer: dict[str, Any]) -> str:
    """What query-replication says, in one line for `systemctl status`."""
    parts = [f"{answer.get('mode')}, {answer.get('stage')}"]
    link = answer.get("link")
    if isinstance(link, dict):
        reason = f" ({link['reason']})" if link.get("reason") else ""
        parts.append(f"link {link.get('state')}{reason}")
    checkpoint = answer.get("checkpoint")
    if isinstance(checkpoint, dict):
        age = checkpoint.get("age")
        parts.append("no checkpoint yet" if age is None else f"checkpoint {human_seconds(age)} old")
    error = answer.get("error")
    if isinstance(error, dict):
        parts.append(f"failed: {error.get('desc')}")
    return printable("; ".join(parts))
