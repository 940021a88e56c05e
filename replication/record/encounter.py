# SPDX-License-Identifier: BSD-3-Clause
"""What a node concludes when it meets another one that is not its secondary (any more): by lineage, never by who was
asked first or has failed over last.

Only a node whose copy is an ancestor of the other one's becomes outdated: what it has is there as well, but for what
the two had not agreed on. In a split brain neither is: each has what the other one lacks, so both say so, and neither
is stopped or overwritten without a person's word.

    how this node's content is        this node has asked, as a        this node was asked
    to the other one's                primary: it looked for its
                                      secondary
    ------------------------------    -----------------------------    ---------------------------------------------
    older: that one went on           outdated                         nothing: somebody has made this node an owner,
    from what is here                                                  and who asks looks at its own row
    same: that one owns what is       outdated: somebody has made      nothing
    here, and has not gone on yet     that one the owner since
    newer: this one has gone on       nothing                          nothing: who asks is outdated
    from what that one owns
    diverged: both have gone on       split brain                      split brain, as an owner and as a secondary
    unrelated, or nothing complete    nothing: it proves nothing       nothing
    that one does not say what it     outdated only if another node    (a primary always says it)
    descends from (version 0.2)       may have what is here (shared):
                                      nobody can come from the rest

It counts what this node has when its guest stands still: a write that was answered before that is part of it, and one
that was not yet answered reaches nobody who could miss it. A node that has become outdated stays it, whatever its guest
is allowed to write afterwards; then it is in a split brain besides.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass

from replication.reason import Reason
from replication.record.lineage import Lineage, Relation, compare
from replication.record.outdated import Outdated


class Finding(enum.Enum):
    """What follows for this node."""

    OUTDATED = "outdated"
    SPLIT_BRAIN = "split brain"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Encounter:
    """What the other node has shown."""

    code: Reason
    """Why this node is outdated, if it is."""
    text: str
    node: str | None = None
    """The id of the other one."""
    theirs: Lineage | None = None
    """None: it has not said."""
    asked: bool = False
    """By the other one."""

    def find(self, mine: Lineage) -> Finding:
        """By the table above."""
        if self.theirs is None:
            return Finding.OUTDATED if mine.shared and not self.asked else Finding.NOTHING
        relation, _ = compare(mine, self.theirs)
        if relation is Relation.DIVERGED:
            return Finding.SPLIT_BRAIN
        if relation in (Relation.OLDER, Relation.SAME) and not self.asked:
            return Finding.OUTDATED
        return Finding.NOTHING

    def as_split_brain(self) -> Outdated:
        """To be kept in the record."""
        who = "" if self.node is None else f" {self.node}"
        return Outdated(
            Reason.SPLIT_BRAIN,
            f"split brain: this node and node{who} have both gone on from what they had in common; neither is stopped, "
            "nor overwritten, before a person has decided whose writes are to be thrown away and has run "
            "`replctl discard` there, as a secondary",
            time.time(),
        )
