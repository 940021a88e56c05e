# SPDX-License-Identifier: BSD-3-Clause
"""Under which conditions a failover is wanted, and what would be lost by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from replication.errors import CommandError
from replication.reason import Reason


@dataclass(frozen=True)
class Conditions:
    """What has to be so, or there is to be no failover."""

    max_age_s: float | None = None
    """The last checkpoint is not older."""
    only_in_sync: bool = False
    """Nothing was known to be missing here when the primary was last heard of."""
    lossless: bool = False
    """The primary has left in good order, and all that it had written by then is kept."""
    no_primary: bool = False
    """No primary is heard of. Not so without being asked: QEMU's failover comes when whoever gives it says so."""
    early: bool = False
    """Not a condition: also while a lease lasts (lease.py), because whoever says so has fenced the other node."""


@dataclass(frozen=True)
class Outlook:
    """What is known on the secondary."""

    in_step: bool
    left_well: bool
    """The primary has left in good order: it had sent everything by then. Whether its guest has gone on without this
    node since, nobody here knows."""
    checkpoint_age_s: float | None
    active_bytes: int
    hidden_bytes: int
    primary: str | None = None
    """The node id of the primary that is connected, and was heard of within its time."""

    @property
    def lossless(self) -> bool:
        """Whether all that the primary had written when it left can be kept, and what the guest here has written as
        well."""
        return self.in_step and self.left_well and not (self.active_bytes and self.hidden_bytes)

    @property
    def by_stop(self) -> bool:
        """Whether it takes a planned stop to keep what came after the last checkpoint."""
        return self.hidden_bytes > 0

    def to_json(self) -> dict[str, Any]:
        """Members of query-failover."""
        return {
            "in-sync": self.in_step,
            "primary": self.primary,
            "primary-left-well": self.left_well,
            "lossless": self.lossless,
        }

    def check(self, conditions: Conditions) -> None:
        """CommandError, with the code of the first condition that does not hold."""
        if conditions.no_primary and self.primary is not None:
            raise CommandError(
                f"Failover is refused: the primary (node {self.primary}) is connected, and was heard of just now",
                reason=Reason.HAS_PRIMARY,
            )
        age_s, most_s = self.checkpoint_age_s, conditions.max_age_s
        if most_s is not None and (age_s is None or age_s > most_s):
            age = "there is none" if age_s is None else f"it is {age_s:.1f} s old"
            raise CommandError(
                f"Failover is refused: the last checkpoint must not be older than {most_s:g} s, and {age}",
                reason=Reason.TOO_OLD,
            )
        if conditions.only_in_sync and not self.in_step:
            raise CommandError(
                "Failover is refused: this secondary was not in sync when its primary was last heard of",
                reason=Reason.NOT_IN_SYNC,
            )
        if conditions.lossless and not self.lossless:
            raise CommandError(f"Failover is refused: {self._what_is_lost()}", reason=Reason.NOT_LOSSLESS)

    def _what_is_lost(self) -> str:
        if not self.in_step:
            return "this secondary lacks something of its primary's"
        if not self.left_well:
            return "the primary did not leave in good order, or is back, so it may have written what is not here"
        return "both the primary and the guest of this node have written since the last checkpoint"
