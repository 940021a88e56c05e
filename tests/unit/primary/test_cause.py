# SPDX-License-Identifier: BSD-3-Clause
"""cause.py: each reason has the code by which a program knows it, and the sentences are those that the code says."""

from __future__ import annotations

import ast

import pytest

from checkout import REPOSITORY
from replication.errors import DiskError, ReplicationError
from replication.primary.cause import WORDS, reason_by, reason_of
from replication.primary.dial import Refusal
from replication.reason import Reason
from replication.record.lineage import OUTDATED, SPLIT_BRAIN, UNFINISHED, UNRELATED
from replication.secondary.pairing import NOBODYS

THERE = "the secondary nbd://b refuses: "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SPLIT_BRAIN, Reason.SPLIT_BRAIN),
        (THERE + SPLIT_BRAIN, Reason.SPLIT_BRAIN),
        (THERE + OUTDATED, Reason.PEER_NEWER),
        (UNRELATED, Reason.UNRELATED),
        (UNFINISHED, Reason.UNFINISHED_COPY),
        (THERE + NOBODYS, Reason.NOT_SECONDARY),
        ("the secondary has become a secondary in stage failover", Reason.NOT_SECONDARY),
        (THERE + "it has a primary already (node 1), which was heard of 0.1 s ago", Reason.HAS_PRIMARY),
        ("what answers at nbd://b is not the secondary that it was", Reason.OTHER_NODE),
        ("the secondary was stopped as planned", Reason.STOPPING),
        ("the secondary takes no checkpoint: the disk is full", Reason.CHECKPOINT_REFUSED),
        ("the secondary nbd://b is of another version: 'token'", Reason.OTHER_VERSION),
        (THERE + "the disks are 'a' there, but 'b' here", Reason.OTHER_DISKS),
        (THERE + "disk 'a' has 4096 bytes there, but 8192 here", Reason.OTHER_DISKS),
        (THERE + "before-resync-target: the handler /bin/x refuses the resync", Reason.RESYNC_REFUSED),
        ("Connection refused", Reason.LINK_LOST),
    ],
)
def test_the_code_of_a_text(text: str, reason: Reason) -> None:
    assert reason_by(text, Reason.LINK_LOST) is reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Refusal("whatever it says", Reason.SPLIT_BRAIN), Reason.SPLIT_BRAIN),
        (Refusal(OUTDATED), Reason.PEER_NEWER),
        (Refusal("of a later version"), Reason.REFUSED),
        (DiskError("Connection refused"), Reason.PEER_UNREACHABLE),
    ],
)
def test_an_attempt_that_has_failed(error: ReplicationError, reason: Reason) -> None:
    assert reason_of(error) is reason


def test_the_words_are_those_that_the_code_says() -> None:
    """A sentence that is changed takes its code with it."""
    said = ""
    for path in sorted((REPOSITORY / "replication").rglob("*.py")):
        if path.name != "cause.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            said += "\n".join(
                node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            )
    for reason, words in WORDS:
        assert all(word in said for word in words), reason
