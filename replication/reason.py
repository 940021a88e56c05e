# SPDX-License-Identifier: BSD-3-Clause
"""Why a node does not do something, as a code: what a program decides by, where a person reads the text beside it.

The codes are public (nbdkit-replication-plugin(1), REASON CODES): they stay, and new ones may come.
"""

from __future__ import annotations

from enum import Enum


class Reason(Enum):
    """The value is the code."""

    NOT_RUNNING = "not-running"
    NOT_PROMOTED = "not-promoted"
    FAILED_OVER = "failed-over"
    COMMITTING = "committing"
    WRONG_STAGE = "wrong-stage"
    WRONG_MODE = "wrong-mode"
    NO_CHECKPOINT = "no-checkpoint"
    OUTDATED = "outdated"
    DEMOTED = "demoted"
    PEER_PROMOTED = "peer-promoted"
    TOLD = "told"
    TOO_OLD = "too-old"
    NOT_IN_SYNC = "not-in-sync"
    NOT_LOSSLESS = "not-lossless"
    NOT_SECONDARY = "not-secondary"
    IS_SECONDARY = "is-secondary"
    PASSES_ON = "passes-on"
    SPLIT_BRAIN = "split-brain"
    PEER_NEWER = "peer-newer"
    UNRELATED = "unrelated"
    UNFINISHED_COPY = "unfinished-copy"
    PEER_UNKNOWN = "peer-unknown"
    PEER_UNREACHABLE = "peer-unreachable"
    HAS_PRIMARY = "has-primary"
    SUSPENDED = "suspended"
    WFC_TIMEOUT = "wfc-timeout"
    FENCING = "fencing"
    LEASE_OVER = "lease-over"
    LEASED = "leased"
    STORAGE = "storage"
    BUSY = "busy"
    LINK_LOST = "link-lost"
    REFUSED = "refused"
    RESYNC_REFUSED = "resync-refused"
    CHECKPOINT_REFUSED = "checkpoint-refused"
    OTHER_NODE = "other-node"
    OTHER_VERSION = "other-version"
    OTHER_DISKS = "other-disks"
    SESSION_LOST = "session-lost"
    STOPPING = "stopping"
    UNTOLD = "untold"
    RESYNC = "resync"
    RESYNC_INTERRUPTED = "resync-interrupted"
    SILENT = "silent"
    TEST_EXISTS = "test-exists"
    NO_TEST = "no-test"
