# SPDX-License-Identifier: BSD-3-Clause
"""Why the link is not up, or not in sync, as a code: where an error has none, by the words of its text.

A secondary of version 0.2 gives none, and what breaks a link is a DiskError. The texts stay as they are.
"""

from __future__ import annotations

from replication.errors import ReplicationError
from replication.primary.dial import Refusal
from replication.reason import Reason
from replication.record.lineage import OUTDATED, SPLIT_BRAIN, UNFINISHED, UNRELATED
from replication.secondary.pairing import NOBODYS

GONE_ON = (Reason.PEER_NEWER, Reason.NOT_SECONDARY)
"""The other node owns its disks now, or has newer data than this one."""


def _beginning(text: str) -> str:
    """What of a text names the matter; what follows says what to do."""
    return text.partition(";")[0].partition(":")[0]


WORDS = (
    (Reason.RESYNC_REFUSED, ("before-resync-target",)),
    (Reason.SPLIT_BRAIN, (_beginning(SPLIT_BRAIN),)),
    (Reason.PEER_NEWER, (_beginning(OUTDATED),)),
    (Reason.UNRELATED, (_beginning(UNRELATED),)),
    (Reason.UNFINISHED_COPY, (_beginning(UNFINISHED),)),
    (Reason.NOT_SECONDARY, (_beginning(NOBODYS), "the secondary has become a ")),
    (Reason.HAS_PRIMARY, ("it has a primary already",)),
    (Reason.OTHER_NODE, ("is not the secondary that it was", "is another secondary than it was")),
    (Reason.STOPPING, ("the secondary was stopped as planned", "it is being stopped")),
    (Reason.SESSION_LOST, ("the secondary has no session of this primary any more",)),
    (Reason.CHECKPOINT_REFUSED, ("the secondary takes no checkpoint",)),
    (Reason.UNTOLD, ("the secondary cannot be told that it has everything",)),
    (Reason.OTHER_VERSION, ("is of another version",)),
    (Reason.OTHER_DISKS, ("the disks are ", "bytes there, but")),
)
"""By which words a text is known; the first counts."""


def reason_of(error: ReplicationError) -> Reason:
    """Of an attempt that has failed."""
    if isinstance(error, Refusal):
        return error.reason or reason_by(str(error), Reason.REFUSED)
    return reason_by(str(error), Reason.PEER_UNREACHABLE)


def reason_by(text: str, otherwise: Reason) -> Reason:
    """By the words of a text."""
    return next((reason for reason, words in WORDS if any(word in text for word in words)), otherwise)
