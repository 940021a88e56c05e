# SPDX-License-Identifier: BSD-3-Clause
"""That a node is outdated: it has learnt that another one went on from what it has, or is to.

    demoted         it owned its disks and was made a secondary: the next owner is another one
    peer-promoted   over the link: the secondary has failed over or was promoted
    peer-newer      over the link: the other node's content comes from what is here
    told            by a command: the cluster, or a person, knows it

It is kept in the record, so no restart forgets it. What ends it is that the two nodes have the same again: a checkpoint
of a secondary that has received everything, or an agreement of an owner with a secondary that may be overwritten. That
does not end what an owner was told: the other one may be about to be promoted. Or a person says so (`force`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from replication.reason import Reason

_TEXT_MAX = 400
"""Characters: it is part of the record, which has its room from the start."""


@dataclass(frozen=True)
class Outdated:
    """Why, and since when (seconds since 1970)."""

    code: Reason
    text: str
    time: float

    def to_json(self) -> dict[str, Any]:
        """As in query-replication and in the record."""
        return {"code": self.code.value, "reason": self.text[:_TEXT_MAX], "time": self.time}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Outdated:
        """Raises KeyError, TypeError or ValueError for anything that `to_json` has not written."""
        if set(saved) != {"code", "reason", "time"} or not isinstance(saved["reason"], str):
            raise ValueError("outdated has other members")
        if type(saved["time"]) not in (int, float):
            raise TypeError("time of outdated is no number")
        return cls(Reason(saved["code"]), saved["reason"], float(saved["time"]))


DEMOTED_TEXT = "it was made a secondary, and has not been resynchronised from the next owner"


def refusal(what: str, outdated: dict[str, Any]) -> str:
    """One line: what is refused, why, and what to do."""
    return (
        f"{what} is refused: this node is outdated ({outdated['reason']}); resynchronise it from the node that has "
        "gone on, or use force to take what is here all the same"
    )
