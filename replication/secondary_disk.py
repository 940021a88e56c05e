# SPDX-License-Identifier: BSD-3-Clause
"""One disk of a secondary and its two faces: what the primary writes to, and what the secondary's guest sees.

The stage decides what a request does (the table in DESIGN 3); which of two requests on one block goes first is
decided in image/stack.py. Who learns of a failure (DESIGN 4): on the guest face the guest; on the target face the
primary, and a write that failed is latched, because the secondary disk now lacks it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from replication.errors import DiskError
from replication.fault import Case, FaultLatch
from replication.image.face import Disk, Extent
from replication.image.layer import Layer, LayerError
from replication.image.stack import Stack
from replication.jobs import Job, JobList
from replication.stage import Stage

_TARGET_CASES = {
    Layer.HIDDEN: Case.COPY_BEFORE_WRITE,
    Layer.SECONDARY: Case.SECONDARY_DISK,
    Layer.ACTIVE: Case.ACTIVE_DISK,
}


class SecondaryDisk:
    """The two faces of one disk. `stack` is None until the overlays are open (stage none, with images that `start`
    will refuse)."""

    def __init__(
        self, name: str, top_id: str, disk: Disk, faults: FaultLatch, backup_ended: Callable[[str], None]
    ) -> None:
        """`backup_ended(why)` is called when copy-before-write has failed."""
        self.name = name
        self.top_id = top_id
        self.disk = disk
        self.size = disk.size
        self.stack: Stack | None = None
        self.stage = Stage.NONE
        """Set by the node while the gate is closed."""
        self.backup_running = True
        self._faults = faults
        self._backup_ended = backup_ended
        self.totals = {"guest-read": 0, "guest-written": 0, "target-read": 0, "target-written": 0}

    # -- guest face ----------------------------------------------------------------------------------------

    def guest_read(self, buffer: memoryview, offset: int) -> None:
        """The last checkpoint plus the guest's own writes; once done, the disk."""
        stack = self._for_guest()
        self._guest(lambda: self.disk.read(buffer, offset) if stack is None else stack.read(buffer, offset))
        self.totals["guest-read"] += len(buffer)

    def guest_write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Into active while replication runs."""
        stack = self._for_guest()

        def write() -> None:
            if stack is None:
                self.disk.write([data], offset, fua)
            elif self.stage is Stage.RUNNING:
                stack.write_top(data, offset)
            else:
                stack.write_over(data, offset, fua, shelter=self.stage is Stage.FAILOVER)
            if fua and stack is not None:
                stack.flush_top()

        self._guest(write)
        self.totals["guest-written"] += len(data)

    def guest_zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Zeroes, and trims, which read as zeroes afterwards."""
        stack = self._for_guest()

        def zero() -> None:
            if stack is None:
                self.disk.zero(offset, length, may_trim, fua)
            elif self.stage is Stage.RUNNING:
                stack.zero_top(offset, length)
            else:
                stack.zero_over(offset, length, may_trim, fua, shelter=self.stage is Stage.FAILOVER)
            if fua and stack is not None:
                stack.flush_top()

        self._guest(zero)
        self.totals["guest-written"] += length

    def guest_flush(self) -> None:
        """Make stable what the guest was answered for."""
        stack = self._for_guest()

        def flush() -> None:
            if stack is not None:
                stack.flush_top()
            if self.stage is not Stage.RUNNING:
                self.disk.flush()

        self._guest(flush)

    def guest_extents(self, offset: int, length: int) -> list[Extent]:
        """What is known of the content."""
        stack = self._for_guest()
        return self.disk.extents(offset, length) if stack is None else stack.extents(offset, length)

    def _for_guest(self) -> Stack | None:
        """The stack while the overlays count; None once the disk alone does."""
        if self.stage is Stage.DONE:
            return None
        if self.stage is Stage.NONE or self.stack is None:
            raise DiskError(
                f"disk '{self.name}' has no content for the guest yet: replication is not running", errno.EIO
            )
        return self.stack

    def _guest(self, action: Callable[[], None]) -> None:
        """A failure here is the guest's to know, whichever image it was on; nothing is latched."""
        try:
            action()
        except DiskError as error:
            below = isinstance(error, LayerError) and error.layer is Layer.SECONDARY
            self._faults.tell(Case.SECONDARY_DISK if below else Case.ACTIVE_DISK, self.name, error)
            raise

    # -- target face ---------------------------------------------------------------------------------------

    def target_read(self, buffer: memoryview, offset: int) -> None:
        """What the primary has written: the secondary disk itself."""
        self._for_target()
        self.disk.read(buffer, offset)
        self.totals["target-read"] += len(buffer)

    def target_write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Copy-before-write, then through; before start, straight to the disk (first copy)."""
        stack = self._for_target_write()
        if stack is None:
            self._target("write", offset, len(data), lambda: self.disk.write([data], offset, fua))
        else:
            self._target("write", offset, len(data), lambda: stack.write_below(data, offset, fua))
        self.totals["target-written"] += len(data)

    def target_zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Zeroes and trims of the primary; they destroy data, so they are copied before like writes."""
        stack = self._for_target_write()
        if stack is None:
            self._target("zero", offset, length, lambda: self.disk.zero(offset, length, may_trim, fua))
        else:
            self._target("zero", offset, length, lambda: stack.zero_below(offset, length, may_trim, fua))
        self.totals["target-written"] += length

    def target_flush(self) -> None:
        """Make stable what the primary was answered for."""
        self._for_target()
        stack = self.stack if self.stage is Stage.RUNNING else None
        self._target("flush", 0, 0, self.disk.flush if stack is None else stack.flush_below)

    def target_extents(self, offset: int, length: int) -> list[Extent]:
        """What is known of the secondary disk's content."""
        self._for_target()
        return self.disk.extents(offset, length)

    def _for_target(self) -> None:
        """From the first instant of failover on the old primary is kept out."""
        if self.stage not in (Stage.NONE, Stage.RUNNING):
            raise DiskError(
                f"disk '{self.name}' takes nothing from its old primary any more (stage {self.stage.value})",
                errno.ESHUTDOWN,
            )

    def _for_target_write(self) -> Stack | None:
        self._for_target()
        if self.stage is Stage.NONE:
            return None
        if not self.backup_running:
            error = DiskError(f"disk '{self.name}' takes no writes: copy-before-write has ended")
            self._faults.report(Case.COPY_BEFORE_WRITE, self.name, "write", 0, 0, error, write_lost=True)
            raise error
        return self.stack

    def _target(self, operation: str, offset: int, length: int, action: Callable[[], None]) -> None:
        try:
            action()
        except DiskError as error:
            case = Case.SECONDARY_DISK
            if isinstance(error, LayerError):
                case = _TARGET_CASES[error.layer]
                operation, offset, length = error.operation, error.offset, error.length
            if self.stage is Stage.RUNNING:
                self._faults.report(case, self.name, operation, offset, length, error, write_lost=True)
                if case is Case.COPY_BEFORE_WRITE:
                    self._backup_ended(str(error))
            raise

    def close(self) -> None:
        """Let go of the images."""
        if self.stack is not None:
            self.stack.close()
        self.disk.close()


def backup_job(jobs: JobList, disk: SecondaryDisk, ended: Callable[[str], None]) -> Job:
    """Show copy-before-write of a disk as a job: bytes that hidden holds, of the disk's size."""

    def held() -> int:
        return 0 if disk.stack is None else disk.stack.hidden.bytes_held

    job = Job("backup", disk.name, lambda: disk.size, held)
    job.cancel = lambda: ended("cancelled by job-cancel")
    return jobs.add(job)
