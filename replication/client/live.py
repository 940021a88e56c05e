# SPDX-License-Identifier: BSD-3-Clause
"""The move of a disk whose guest goes on: it was migrated to the secondary's host, and its requests are passed on to
the primary (follow-owner=true).

    held        the guest's requests wait; the primary has answered all that it had been passed
    moved       as switchover.py does it, and takes it back
    let go      the guest's requests are served where it is
    turned      the former primary is made the secondary of the new one, for which nobody waits

The hold ends by itself after `--within` seconds. Then the requests go to whoever owns the disk, so no harm comes of
that; half-way nobody does, and they wait until somebody does, because the primary has left in good order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from .qmp import Refused
from .session import Session, Unusable
from .switchover import RECOVERY_S, Move

LIVE_TEXT = """\
This moves the disk to the secondary while the guest goes on there. Make sure first that the guest has been migrated to
the secondary's host: what one on the primary's host writes meanwhile is lost."""


class LiveMove:
    """One between two nodes, by name."""

    def __init__(self, sides: dict[str, Session], within_s: float, say: Callable[[str], None]) -> None:
        """Refused unless the disk can be moved, and a guest is there to go on."""
        self._sides, self._within_s, self._say = sides, within_s, say
        states = self._ask()
        self._move = Move(sides, states, say)
        self.primary, self.secondary = self._move.primary, self._move.secondary
        self.waited_s = 0.0
        """How long the guest's requests were held."""
        passing = states[self.secondary].get("passing")
        if self._move.over:
            self._check_over(passing if isinstance(passing, dict) else {})
        elif isinstance(passing, dict) and not passing.get("guests"):
            raise Refused(
                f"no guest is attached to {self.secondary}, the secondary: migrate it there first, or stop it and "
                "switch over without --live"
            )

    def _check_over(self, passing: dict[str, Any]) -> None:
        """What is over may have been another one, or a failover, and both may have gone on since."""
        lineage = self._move.before.get("lineage")
        answer = self._sides[self.secondary].call("replication-compare", lineage=lineage)
        if not passing.get("handed-over") or answer.get("relation") not in ("same", "newer") or self._move.lacking:
            raise Refused(
                f"both own a disk, and {self.secondary} has not got its own from {self.primary} by a move with --live "
                "that was cut off; nothing has changed. `replctl compare` says which of the two is newer"
            )

    def _ask(self) -> dict[str, dict[str, Any]]:
        return {name: side.call("query-replication") for name, side in self._sides.items()}

    def run(self) -> None:
        """Move the disk. Refused: it is where it was, or the text says where and what to do."""
        if not self._move.over:
            begun = time.monotonic()
            for side in self._sides.values():
                side.hurry(begun + self._within_s)
            try:
                self._sides[self.secondary].call("replication-suspend-io", timeout=self._within_s)
                self._say("held: the guest's requests wait")
                # Anew: what the guest had written until now is no sign of one that goes on elsewhere.
                Move(self._sides, self._ask(), self._say).run()
            finally:
                with contextlib.suppress(Refused, Unusable), self._sides[self.secondary].again(RECOVERY_S) as secondary:
                    # Not as somebody who lets the guest go on: the node may have a reason of its own by now.
                    secondary.call("replication-suspend-io", timeout=0)
                self.waited_s = time.monotonic() - begun
            self._say(f"moved: the guest goes on after {self.waited_s:.2f} s")

    def turn(self, timeout_s: float) -> None:
        """Have the pair replicate the other way. Refused: it does not yet, and the text says what to type."""
        roles = {self.primary: "secondary", self.secondary: "primary"}
        for name, role in roles.items():
            try:
                with self._sides[name].again(timeout_s) as side:
                    side.call("replication-set-role", role=role)
            except (Refused, Unusable) as error:
                raise Refused(
                    f"{self.secondary} owns the disk, and the guest goes on there, but nothing replicates it yet: "
                    f"{name} is not made a {role} ({error}). Repeat the switch-over, or type `replctl demote` on "
                    f"{self.primary} and `replctl promote` on {self.secondary}"
                ) from error
