# SPDX-License-Identifier: BSD-3-Clause
"""What the two modes have in common for the node that commands them."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from replication.admission import Admission
from replication.batch import Write
from replication.conditions import Conditions
from replication.disk.face import Extent
from replication.errors import CommandError, DiskError
from replication.events import EventHub
from replication.fault import FaultLatch
from replication.jobs import JobList
from replication.lease import Tenure
from replication.options import Options
from replication.order.gate import Gate
from replication.order.urgency import Haste
from replication.reason import Reason
from replication.record.ancestry import Ancestry
from replication.record.ledger import Ledger
from replication.record.state import Record, StateFolder
from replication.stage import Mode, Stage

GUEST_FACE = "guest face: the last checkpoint plus the guest's own writes"
GUEST_DISK = "the guest's disk"
GUEST_WRITES = "writes for the secondary"
TEST_FACE = "test: what a failover would have given, and the test's own writes"
FOR_GUESTS = (GUEST_FACE, GUEST_DISK, TEST_FACE)
"""What exports that belong to a guest say of themselves: no primary may take one of them for its secondary."""


TARGET_FACE = "target face: for the primary only"
CHANGING_FACE = "not there now"
OF_PAIRS = (TARGET_FACE, CHANGING_FACE)
"""What exports say of themselves whose node has a control export, or will have one soon."""


LOOK_S = 0.5
"""Between two looks at whether a disk behind NBD has lost its connection, of which an idle one does not learn."""


def _no_batches(_writes: Sequence[Write]) -> None:
    raise DiskError("batches of writes are for the target face", errno.EINVAL)


def _no_digests(_offset: int, _length: int) -> bytes:
    raise DiskError("digests are of the target face", errno.EINVAL)


class Face(NamedTuple):
    """What is behind an export at present. Every operation may be called by several threads at once, inside the gate,
    and raises DiskError."""

    description: str
    size: Callable[[], int]
    """Bytes; DiskError while it cannot be known."""
    read: Callable[[memoryview, int], None]
    """`read(buffer, offset)`: fill the buffer."""
    write: Callable[[memoryview, int, bool], None]
    """`write(data, offset, fua)`."""
    zero: Callable[[int, int, bool, bool], None]
    """`zero(offset, length, may_trim, fua)`: make a range read as zeroes. Trim is the same with `may_trim`: what a
    trimmed block reads must be the same on both sides."""
    flush: Callable[[], None]
    """Make stable what was answered, on any connection: that is what multi-conn promises."""
    extents: Callable[[int, int, int], list[Extent]]
    """`extents(offset, length, count)`: at most `count` extents from `offset` on."""
    write_batch: Callable[[Sequence[Write]], None] = _no_batches
    """`write_batch(writes)`: writes of a primary, as if one after the other (batch.py)."""
    digest: Callable[[int, int], bytes] = _no_digests
    """`digest(offset, length)`: of one unit of the disk (digests.py)."""


class Enter(Protocol):
    """How a side enters a stage."""

    def __call__(self, stage: Stage, haste: Haste | None = None) -> bool:
        """StateError, with nothing changed, when that cannot be made to last, for a failover in its time; with `force`
        of `haste` the stage is entered all the same. Whether it has been saved."""


@dataclass
class Setting:
    """What a side works with; the node owns it."""

    options: Options
    state: StateFolder
    record: Record
    hub: EventHub
    jobs: JobList
    faults: FaultLatch
    gate: Gate
    ancestry: Ancestry
    ledger: Ledger
    enter: Enter
    """Make the stage last, show it to all disks, tell the clients. The gate is closed."""
    save: Callable[[], None]
    """Make the record last; StateError."""
    show: Callable[[], None]
    """Show the stage to the disks anew, because something else in the record has changed. The gate is closed."""
    outdate: Callable[[Reason, str], None]
    """This node has learnt that another one went on."""
    accepted: Callable[[], None]
    """A secondary takes this primary's writes: nobody has gone on from them."""
    admission: Admission
    """When the guest is served: it is told of the link first."""
    tenure: Tenure
    """How long the primary of a secondary may serve its guest still."""
    commanding: Callable[[], AbstractContextManager[None]]
    """`with commanding():` around what no command may come in between; CommandError."""


class Side(ABC):
    """A primary or a secondary: the disks of one process in one mode.

    Commands come one at a time (the node holds its command lock) and raise CommandError when they changed nothing.
    """

    mode: Mode
    goes_back = True
    """Of a failover that is being entered: whether something is lost by it that the guest was answered for."""

    @abstractmethod
    def __init__(self, setting: Setting) -> None: ...

    @abstractmethod
    def faces(self) -> dict[str, Face]:
        """The exports, by name; the first is the default one if `default` is not empty."""

    @property
    @abstractmethod
    def default(self) -> str:
        """The export that the empty name stands for, empty if there is none."""

    @abstractmethod
    def open(self) -> None:
        """Open disks and images as the recorded stage needs them; ConfigError says what is wrong. No threads yet."""

    @abstractmethod
    def launch(self) -> None:
        """Start the threads, and go on with what a former process had begun."""

    @abstractmethod
    def configure(self) -> None:
        """Take over what has changed in the options (options.CHANGEABLE); also from other threads than the node's."""

    @abstractmethod
    def look(self) -> None:
        """Called every LOOK_S seconds by a thread of its own: find out what the disks have lost meanwhile."""

    @abstractmethod
    def show_stage(self, stage: Stage) -> None:
        """Requests from now on follow this stage. The gate is closed, or nothing is served yet."""

    @abstractmethod
    def start(self, secondary: str | None, sync: str, discard_checkpoint: bool = False) -> None:
        """From none (or, with a new secondary, done) to running. `discard_checkpoint`: the secondary's last one need
        not be kept until it has everything."""

    @abstractmethod
    def checkpoint(self) -> None:
        """A checkpoint, or on a primary a barrier, in stage running."""

    @abstractmethod
    def stop(self, lossless: bool = False) -> None:
        """Leave stage running as planned. `lossless`: of a failover that takes that to keep everything
        (`check_failover`); CommandError, with nothing changed, if that is not so any more at that instant."""

    @abstractmethod
    def fail_over(self, haste: Haste) -> None:
        """Leave stage running at once: a secondary fails over, a primary goes on without its secondary. CommandError,
        StateError or GateStuck, with nothing changed, in the time of `haste`."""

    def check_failover(self, conditions: Conditions) -> bool:
        """CommandError unless they hold; whether it takes a planned stop then to keep everything."""
        raise CommandError("Conditions of a failover are for a secondary", reason=Reason.WRONG_MODE)

    def make_way(self) -> str:
        """A failover waits for another command, which waits for what only this side can end. Harmless, and soon
        done. What has changed by it, for the answer of a failover that is refused all the same."""
        return ""

    @abstractmethod
    def retry(self, force: bool) -> None:
        """From failover-failed back to failover. `force`: although there is no valid checkpoint."""

    @abstractmethod
    def discard(self, checkpoint: bool | None) -> None:
        """Give up what was written here, if a primary wants to overwrite it; `checkpoint`: the last checkpoint, for a
        resync that is at work."""

    @abstractmethod
    def resize(self, name: str | None, size: int | None) -> list[dict[str, object]]:
        """Grow the disk `name`, or all of them, to `size`, or as far as what is below them allows; what has become of
        each. CommandError."""

    def tests(self) -> dict[str, Face]:
        """The exports of tests of a failover, by name. Their requests do not pass the gate."""
        return {}

    def face_of(self, export: str) -> tuple[str, str | None]:
        """Which face a client means that opens `export`, and the token that it has, if it has one."""
        return export, None

    def size_named(self, face: str, token: str | None) -> int | None:
        """What a primary with that token has named as the size of the disk, if it has: less than it is here while only
        this node has grown."""
        return None

    def size_of_owner(self, export: str) -> int | None:
        """Of a disk that has grown here, behind a guest's export: the size that its owner's may still have, None if
        that is the same."""
        return None

    @abstractmethod
    def admit(self, face: str, token: str | None) -> None:
        """DiskError unless a client with that token may write to that face now. Called from requests."""

    @property
    def session(self) -> str | None:
        """On a secondary, the token of its session with the owner of the disks, if it has one now."""
        return None

    def owned_by(self, asked: str, disk: str) -> str | None:
        """On a primary that runs, and whose secondary asks so in this session (acquaintance.py): the guest's export of
        the disk. Asked inside the gate, so it is that for the whole of a request."""
        return None

    def answer_to(self, asked: str) -> str:
        """What shows who asks so that this is that primary; empty if it is not."""
        return ""

    @abstractmethod
    def query_failover(self) -> dict[str, Any]:
        """What query-failover returns; CommandError on a primary."""

    @abstractmethod
    def query(self) -> dict[str, Any]:
        """The members of query-replication that depend on the mode: `consistent`, `link`, `disks`."""

    def query_latency(self) -> dict[str, Any]:
        """The members of query-replication-latency that depend on the mode."""
        return {}

    @property
    @abstractmethod
    def in_sync(self) -> bool:
        """Whether the nodes are in sync at this moment."""

    @property
    @abstractmethod
    def in_step(self) -> bool:
        """Whether they are, or were when the link was lost or ended: nothing is known to be missing."""

    @property
    @abstractmethod
    def met(self) -> bool:
        """Whether this process has come to an agreement with the other node."""

    @property
    @abstractmethod
    def bytes_served(self) -> int:
        """Read and written by clients since the side is there."""

    @abstractmethod
    def settle(self) -> None:
        """Make what was answered stable, however long that takes; DiskError."""

    @abstractmethod
    def close(self, wait_s: float | None = None) -> bool:
        """End threads, and let go of disks when everything is on stable storage. False when that takes longer than
        `wait_s` seconds (as long as the end of a process may take, if nothing is said): then it keeps the disks. Only
        the end of a process is noted as a good one: with `wait_s` another side follows, or this one again."""


def disk_list(disks: dict[str, int]) -> str:
    """Names and sizes for a message."""
    return ", ".join(f"'{name}' of {size} bytes" for name, size in disks.items())
