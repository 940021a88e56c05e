# SPDX-License-Identifier: BSD-3-Clause
"""One disk of a secondary and its two faces: what the primary writes to, and what the secondary's guest sees.

The stage decides what a request does (the manual page); which of two requests on one block goes first is
decided in image/stack.py. Who learns of a failure (docs/failures.md): on the guest face the guest; on the target face
the primary, and a write that failed is latched, because the secondary disk now lacks it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from replication.batch import Write
from replication.digests import digest_of
from replication.disk.face import EXTENTS_MAX, Disk, Extent
from replication.disk.unflushed import GRAIN, Loss, NotKept, Unflushed
from replication.errors import DiskError, Elsewhere
from replication.fault import Case, FaultLatch
from replication.image.layer import Layer, LayerError
from replication.image.stack import Stack
from replication.order.pause import pause
from replication.record.ancestry import Ancestry
from replication.record.changes import ChangeMap
from replication.side import CHANGING_FACE, GUEST_FACE, TARGET_FACE, Face
from replication.stage import Stage

_TARGET_CASES = {
    Layer.HIDDEN: Case.COPY_BEFORE_WRITE,
    Layer.SECONDARY: Case.SECONDARY_DISK,
    Layer.ACTIVE: Case.ACTIVE_DISK,
}

SLOW_S = 1e-3
"""Seconds that a write of a batch may take before the disk counts as slow: a hundred times what it takes in the page
cache, a fifth of what a disk with heads needs to read the old content."""
_SLOW_BATCHES, _PACE_COUNT = 3, 4
"""So many batches in a row, of so many writes at least, must have been slow: one may have been held up by chance."""
SLOW_AGAIN_S = 30.0
"""So long batches are refused then."""

_NONE: Final = Stage.NONE
_RUNNING: Final = Stage.RUNNING
_FAILOVER: Final = Stage.FAILOVER
_DONE: Final = Stage.DONE


class SecondaryDisk:
    """The two faces of one disk. `stack` is None until the overlays are open (stage none, with images that `start`
    will refuse)."""

    lost: ChangeMap
    """What the disk lacks of the primary's writes, because they failed."""
    changes: ChangeMap
    """From failover, or a planned stop, on: what has changed since the pair was parted."""

    def __init__(self, name: str, top_id: str, disk: Disk, faults: FaultLatch, ancestry: Ancestry) -> None:
        """`open_maps` must follow before the first request."""
        self.name = name
        self.top_id = top_id
        self.disk = disk
        self.size = disk.size
        self.stack: Stack | None = None
        self.stage = _NONE
        """Set by the node while the gate is closed."""
        self.fenced = False
        """Whether the old primary is kept out: from the first instant of failover on, at which the gate may be open."""
        self.inconsistent: str | None = None
        """Why there is nothing that the guest may see; set by the node while the gate is closed."""
        self.from_stranger: Callable[[], bool] = lambda: False
        """Whether who writes to the target face now is not the primary that this node knows."""
        self.strange = False
        """Whether somebody who is not the primary has written here since that was paired last."""
        self.accepts_writes = True
        """False once copy-before-write has ended for good."""
        self.backup_failed: Callable[[LayerError], None] = _nobody
        """Called when copy-before-write of a target write has failed."""
        self.repaired: Callable[[], None] = _nobody
        """Called when a target write has made `lost` empty."""
        self.checkpoint_lost: Callable[[str], bool] = _kept
        """Called when the disk has lost something of the last checkpoint, with why; whether that will outlive the
        process."""
        self._faults = faults
        self._ancestry = ancestry
        self._slow_batches = 0
        # Until when batches are refused.
        self._slow_until = 0.0
        self.totals = {"guest-read": 0, "guest-written": 0, "target-read": 0, "target-written": 0}

    def open_maps(self, open_map: Callable[[str], ChangeMap]) -> None:
        """Open what is known of the other side: `open_map(kind)` opens the map of that kind ("lost", "changes")."""
        self.lost = open_map("lost")
        self.changes = open_map("changes")

    def grow(self, size: int) -> None:
        """The disk has `size` bytes from now on, for whoever opens an export anew. The gate is closed."""
        self.size = self.disk.size = size

    def check_maps(self) -> None:
        """DiskError when a map is no longer there under its name."""
        self.lost.settle()
        self.changes.settle()

    def watch(self, account: Unflushed) -> None:
        """Keep account of what of the disk is unflushed."""
        account.on_loss = self._lose
        self.disk.watch(account)

    def lose_former(self) -> None:
        """Take note of what a former process has left unflushed, where that is lost. The disk is a secondary's or its
        owner's, whose stage has been shown."""
        account = self.disk.unflushed
        if account is not None:
            error = DiskError(
                f"{self.disk.location}: a former process has left unflushed writes, and its server may have been "
                "started anew since: some may be gone"
            )
            account.lose(error, all_of_it=not self.disk.outlives)
            if self.stack is not None and self.stack.committing:
                self.stack.committing = True  # the commit brings down everything anew, so that is no failure of its

    def look(self) -> None:
        """Find out what the disk has lost, and make short the time in which it could lose something of the last
        checkpoint."""
        account, disk = self.disk.unflushed, self.disk
        disk.look()
        if account is None:
            return
        if not account.kept:
            account.again()
        if self.stage is _RUNNING and account.exposed and not disk.outlives:
            pause("look.flush")
            try:
                disk.flush()
            except DiskError as error:
                self._report_lost(0, 0, error)

    def settle(self) -> None:
        """Make everything stable for the end of this role, or of the process; DiskError, which is reported where it is
        the disk's."""
        try:
            if self.stack is not None and self.stage is not _DONE:
                self.stack.flush_all()
            else:
                self.disk.flush()
        except DiskError as error:
            if not isinstance(error, LayerError) or error.layer is Layer.SECONDARY:
                self._report_lost(0, 0, error)
            raise

    @property
    def _own(self) -> bool:
        """Whether the disk is this node's own, or about to be."""
        return self.stage not in (_NONE, _RUNNING)

    def _report_lost(self, offset: int, length: int, error: DiskError) -> None:
        note = self._faults.tell if self._own else self._faults.report
        note(Case.SECONDARY_DISK, self.name, "flush", offset, length, error)

    def _lose(self, loss: Loss) -> bool:
        """The disk has lost what was not flushed. Called from requests, by the disk; whether its flush has to tell it
        as well."""
        error, stack = loss.error, self.stack
        offset, length = loss.ranges[0]
        own = self._own
        # Marks first: whoever finds that the checkpoint is lost finds what has to come again.
        for lost in loss.ranges:
            (self.changes if own else self.lost).mark(*lost)
        kept = True
        if self.stage is not _NONE and not all(self._preserved(*lost) for lost in loss.exposed):
            kept = self.checkpoint_lost(f"disk '{self.name}' has lost what was not flushed: {error}")
        # After what counts; and then a test that begins at the same time either is here or finds no checkpoint.
        for test in () if stack is None else stack.room.tests:
            for lost in loss.ranges:
                test.lose(*lost, error)
        if own and stack is not None:
            stack.lost_below(error)
        if not loss.told:  # otherwise whoever asked reports it, as what it asked for
            self._report_lost(offset, length, error)
        if not kept:
            raise NotKept
        # A disk that is this node's own tells its guest, as any disk does. While a commit is under way that is told
        # instead: the overlays still have what the guest wrote.
        return own and (stack is None or not stack.committing)

    def _preserved(self, offset: int, length: int) -> bool:
        """Whether the overlays have all of the range, so that it does not matter what the disk holds."""
        return self.stage is _DONE or (self.stack is not None and self.stack.holds_all(offset, offset + length))

    # -- guest face ----------------------------------------------------------------------------------------

    def guest_face(self) -> Face:
        """What the secondary's guest sees."""
        return Face(
            GUEST_FACE,
            lambda: self.size,
            self.guest_read,
            self.guest_write,
            self.guest_zero,
            self.guest_flush,
            self.guest_extents,
        )

    def guest_read(self, buffer: memoryview, offset: int) -> None:
        """The last checkpoint plus the guest's own writes; once done, the disk."""
        stack = self._for_guest()
        try:
            (self.disk if stack is None else stack).read(buffer, offset)
            if stack is not None and self.inconsistent is not None:
                self._for_guest()  # it was lost meanwhile
        except DiskError as error:
            self._tell_guest("read", offset, len(buffer), error)
            raise
        self.totals["guest-read"] += len(buffer)

    def guest_write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Into active while replication runs."""
        stack = self._for_guest()
        try:
            if stack is None:
                self._note(offset, len(data), fua)
                self.disk.write([data], offset, fua)
            elif self.stage is _RUNNING:
                stack.write_top(data, offset)
            else:
                self._note(offset, len(data), fua)
                stack.write_over(data, offset, shelter=self.stage is _FAILOVER)
            if fua and stack is not None:
                stack.flush_top()
        except DiskError as error:
            self._tell_guest("write", offset, len(data), error)
            raise
        self.totals["guest-written"] += len(data)

    def guest_zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Zeroes, and trims, which read as zeroes afterwards."""
        stack = self._for_guest()
        try:
            if stack is None:
                self._note(offset, length, fua)
                self.disk.zero(offset, length, may_trim, fua)
            elif self.stage is _RUNNING:
                stack.zero_top(offset, length)
            else:
                self._note(offset, length, fua)
                stack.zero_over(offset, length, may_trim, shelter=self.stage is _FAILOVER)
            if fua and stack is not None:
                stack.flush_top()
        except DiskError as error:
            self._tell_guest("zero", offset, length, error)
            raise
        self.totals["guest-written"] += length

    def _note(self, offset: int, length: int, fua: bool) -> None:
        """The disk is about to become another than what the old primary has."""
        self.changes.mark(offset, length)
        self._ancestry.part()
        if fua:
            self._ancestry.flush()

    def guest_flush(self) -> None:
        """Make stable what the guest was answered for."""
        stack = self._for_guest()
        self._ancestry.flush()
        try:
            if stack is None:
                self.disk.flush()
            else:
                stack.flush_top()
        except DiskError as error:
            self._tell_guest("flush", 0, 0, error)
            raise

    def guest_extents(self, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        """What is known of the content."""
        stack = self._for_guest()
        return (self.disk if stack is None else stack).extents(offset, length, count)

    def _for_guest(self) -> Stack | None:
        """The stack while the overlays count; None once the disk alone does."""
        if self.stage is _DONE:
            return None
        if self.stage is _NONE or self.stack is None:
            raise DiskError(
                f"disk '{self.name}' has no content for the guest yet: replication is not running", errno.EIO
            )
        if self.inconsistent is not None:
            raise DiskError(f"disk '{self.name}' has no valid checkpoint: {self.inconsistent}", errno.EIO)
        return self.stack

    def _tell_guest(self, operation: str, offset: int, length: int, error: DiskError) -> None:
        """A failure here is the guest's to know, whichever image it was on; nothing is latched."""
        below = self.stage is _DONE or (isinstance(error, LayerError) and error.layer is Layer.SECONDARY)
        case = Case.SECONDARY_DISK if below else Case.ACTIVE_DISK
        self._faults.tell(case, self.name, operation, offset, length, error)

    # -- target face ---------------------------------------------------------------------------------------

    def target_face(self) -> Face:
        """What the primary writes to."""
        return Face(
            TARGET_FACE,
            lambda: self.size,
            self.target_read,
            self.target_write,
            self.target_zero,
            self.target_flush,
            self.target_extents,
            self.target_write_batch,
            self.target_digest,
        )

    def target_read(self, buffer: memoryview, offset: int) -> None:
        """What the primary has written: the secondary disk itself."""
        self._for_target()
        self.disk.read(buffer, offset)
        self.totals["target-read"] += len(buffer)

    def target_digest(self, offset: int, length: int) -> bytes:
        """The digest of what the primary has written to a range of the disk."""
        self._for_target()
        if self.lost.lacks(offset, length):
            raise DiskError(f"disk '{self.name}' lacks something of {length} bytes at {offset}, as it knows", errno.EIO)
        return digest_of(self.disk, offset, length)

    def target_write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Copy-before-write, then through; before start, straight to the disk (first copy)."""
        stack = self._for_target_write(offset, len(data))
        if self.from_stranger():
            self.strange = True
            self.changes.mark(offset, len(data))
        if stack is None:
            self._first_copy(offset, len(data), lambda: self.disk.write([data], offset, fua))
        else:
            lacked = self.lost.missing
            try:
                stack.target.write(data, offset, fua)
            except DiskError as error:
                self._target_failed("write", offset, len(data), error)
                raise
            if lacked and not self.lost.missing:
                self.repaired()
        self.totals["target-written"] += len(data)

    def target_write_batch(self, writes: Sequence[Write]) -> None:
        """Do what `target_write` does for each, in their order, at half the cost for small ones
        (TargetWrites.write_all). When some fail the others are done all the same; DiskError for the first."""
        self._for_target()
        begun_s = time.monotonic()
        if begun_s < self._slow_until:
            raise DiskError(f"disk '{self.name}' is slow: its writes should come one by one", errno.EBUSY)
        stack = self.stack
        failures: list[DiskError] = []
        if self.stage is _NONE or stack is None or not self.accepts_writes:
            for offset, data in writes:
                try:
                    self.target_write(data, offset, False)
                except DiskError as error:
                    failures.append(error)
        else:
            if self.from_stranger():
                self.strange = True
                for offset, data in writes:
                    self.changes.mark(offset, len(data))
            lacked = self.lost.missing
            self.totals["target-written"] += sum([len(data) for _, data in writes])
            for index, failure in stack.target.write_all(writes):
                offset, data = writes[index]
                self._target_failed("write", offset, len(data), failure)
                self.totals["target-written"] -= len(data)
                failures.append(failure)
            if lacked and not self.lost.missing:
                self.repaired()
        self._learn_pace(len(writes), time.monotonic() - begun_s)
        if failures:
            raise failures[0]

    def _learn_pace(self, count: int, seconds: float) -> None:
        """A batch has taken so long. Writes that wait for the disk should do so side by side."""
        if count < _PACE_COUNT or seconds < count * SLOW_S:
            self._slow_batches = 0
            return
        self._slow_batches += 1  # several threads may be here; to miss one is nothing
        if self._slow_batches >= _SLOW_BATCHES:
            self._slow_until = time.monotonic() + SLOW_AGAIN_S

    def target_zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Zeroes and trims of the primary; they destroy data, so they are copied before like writes."""
        stack = self._for_target_write(offset, length)
        if self.from_stranger():
            self.strange = True
            self.changes.mark(offset, length)
        if stack is None:
            self._first_copy(offset, length, lambda: self.disk.zero(offset, length, may_trim, fua))
        else:
            self._target("zero", offset, length, lambda: stack.target.zero(offset, length, may_trim, fua))
        self.totals["target-written"] += length

    def _first_copy(self, offset: int, length: int, write: Callable[[], None]) -> None:
        """A write in stage none. What the disk has lost of it is lacking until it comes again."""
        if not self.lost.missing:
            write()
            return
        write()
        self.lost.repaired(offset, length)
        if not self.lost.marked_bytes:
            self.repaired()

    def target_flush(self) -> None:
        """Make stable what the primary was answered for."""
        self._for_target()
        if self.stage is _NONE or self.stack is None:
            self.disk.flush()
        else:
            self._target("flush", 0, 0, self.stack.target.flush)

    def target_extents(self, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        """What is known of the secondary disk's content."""
        self._for_target()
        return self.disk.extents(offset, length, count)

    def _for_target(self) -> None:
        """From the first instant of failover on the old primary is kept out."""
        if self.fenced or self.stage not in (_NONE, _RUNNING):
            raise kept_out(self.name)

    def _for_target_write(self, offset: int, length: int) -> Stack | None:
        self._for_target()
        if self.stage is _NONE:
            return None
        if not self.accepts_writes:
            self.lost.mark(offset, length)
            error = DiskError(f"disk '{self.name}' takes no writes: copy-before-write has ended")
            self._faults.report(Case.COPY_BEFORE_WRITE, self.name, "write", offset, length, error)
            raise error
        return self.stack

    def _target(self, operation: str, offset: int, length: int, action: Callable[[], None]) -> None:
        """A write in `running`. What fails is the primary's to know, and latched: the disk lacks it now."""
        lacked = self.lost.missing
        try:
            action()
        except DiskError as error:
            self._target_failed(operation, offset, length, error)
            raise
        if lacked and not self.lost.missing:
            self.repaired()

    def _target_failed(self, operation: str, offset: int, length: int, error: DiskError) -> None:
        case = Case.SECONDARY_DISK
        if isinstance(error, LayerError):
            case = _TARGET_CASES[error.layer]
            operation, offset, length = error.operation, error.offset, error.length
        self._faults.report(case, self.name, operation, offset, length, error)
        if case is Case.COPY_BEFORE_WRITE and isinstance(error, LayerError):
            self.backup_failed(error)

    # -- the rest ------------------------------------------------------------------------------------------

    def mark_rollback(self) -> None:
        """Failover: what the overlays hold is about to come down, so the disk becomes another than the old primary's
        there. `changes` has what was written here before the pair, if it was not overwritten since."""
        assert self.stack is not None
        for offset, length in (*self.stack.descent.held_grains(GRAIN), *self.lost.missing_ranges()):
            self.changes.mark(offset, length)

    def let_go(self) -> None:
        """Close the overlays: the stage is done, and the disk and its changes are in other hands."""
        if self.stack is not None:
            self.stack.close()
            self.stack = None
        if hasattr(self, "lost"):
            self.lost.close()

    def close(self) -> None:
        """Let go of everything that is open."""
        self.let_go()
        if hasattr(self, "changes"):
            self.changes.close()
        self.disk.close()


def kept_out(name: str) -> DiskError:
    """What an old primary is told."""
    return DiskError(f"disk '{name}' takes nothing from its old primary any more", errno.ESHUTDOWN)


def closed_face(name: str, size: int) -> Face:
    """The target face of a disk that has been promoted: nothing, for good."""

    return _refusing("target face: closed", lambda: size, lambda: kept_out(name))


def changing_face(name: str, size: int) -> Face:
    """Any face of a disk while its process takes another role."""
    return _refusing(CHANGING_FACE, lambda: size, lambda: DiskError(f"disk '{name}' is becoming a secondary's"))


def elsewhere_face(name: str, size: Callable[[], int]) -> Face:
    """A guest's face while another node owns the disk, and is passed on what the guest asks for (passing.py). `size()`
    is the disk's, in bytes."""
    return _refusing(GUEST_FACE, size, lambda: Elsewhere(f"another node owns disk '{name}'"))


def ended_face(size: int, why: str) -> Face:
    """A guest's face whose disk is not the one any more that the guest has used."""
    return _refusing("not this guest's any more", lambda: size, lambda: DiskError(why))


def _refusing(description: str, size: Callable[[], int], error: Callable[[], DiskError]) -> Face:
    def refuse(*_arguments: object) -> NoReturn:
        raise error()

    return Face(description, size, refuse, refuse, refuse, refuse, refuse, refuse)


def _nobody(*_arguments: object) -> None:
    """Nobody has asked to be told."""


def _kept(_why: str) -> bool:
    """Nothing outlives the process."""
    return True
