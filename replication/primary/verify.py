# SPDX-License-Identifier: BSD-3-Clause
"""The comparison of the disks of both nodes: the job that replication-verify starts.

Why there is no false alarm
---------------------------
A range is compared at one place of the forward stream. While its range lock is held, so that no guest's write of it is
between the local disk and the queue, the range is read and a question is put into the queue (PrimaryDisk.check). The
question is sent when all writes of the range in front of it have been answered, and what is behind it waits for its
answer, as writes that overlap do (forward.py). So the secondary digests what the local disk held when it was read, and
nothing else, however fast the guest writes there, and without a pause for it.

What the secondary did not get is no finding either: a range of which something is known to be missing is compared when
a resync has sent it, and an answer does not count if anything became missing between the question and the answer
(ChangeMap.marks). The secondary answers only what it believes to have (SecondaryDisk.target_digest).

What becomes of a finding
-------------------------
It is marked in the change map like a write that was refused: the link is not in sync any more, no checkpoint is taken
of that, and the next resync sends it, which `repair` has begin at once. At the end: an error of the node, the event
REPLICATION_VERIFIED, and the result in the state folder (record/verified.py), from where a process that is started
anew also goes on with a comparison that was under way.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from replication.errors import CommandError, DiskError, ReplicationError
from replication.fault import Case
from replication.jobs import Job
from replication.log import log, log_defect
from replication.order.pause import pause
from replication.order.worker import Worker
from replication.primary.compare import WAIT_S, Comparison, Ended
from replication.primary.disk import PrimaryDisk
from replication.primary.link import Link
from replication.primary.pace import Pace
from replication.reason import Reason
from replication.record.verified import Place, Verified
from replication.side import Setting
from replication.stage import Stage

RANGES_MAX = 64
"""Ranges that a result names; how much differs in all is counted."""

SAVE_S = 30.0
"""Between two notes of how far a comparison is: so much is compared twice after a kill."""

PLAIN = "The secondary is a plain NBD server, which tells no digests of its disk: verify needs one of this software"
OLDER = "The secondary is of a version that tells no digests of its disk: upgrade it first"


@dataclass
class _Work:
    """A comparison of all disks."""

    rate: int | None
    repair: bool
    began: float
    """Seconds since 1970."""
    index: int = 0
    """Of the disk that is compared."""
    offset: int = 0
    """From where on, of that disk."""
    compared: int = 0
    left_out: int = 0
    different: int = 0
    ranges: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    """Why something was left out."""
    cancelled: bool = False
    comparison: Comparison | None = None
    saved_s: float = -math.inf


class Verify:
    """Compares the disks of one primary with its secondary's."""

    def __init__(
        self, setting: Setting, disks: Sequence[PrimaryDisk], link: Link, resync_now: Callable[[bool], None]
    ) -> None:
        """`resync_now(explicit)` has what is missing sent."""
        self._set = setting
        self._disks = disks
        self._link = link
        self._resync_now = resync_now
        self._verified = Verified(setting.state.path)
        self.wait_s = WAIT_S
        """For a test that does not wait so long for a link."""
        # Protects `_work`: which one there is. Never held across I/O.
        self._lock = threading.Lock()
        self._work: _Work | None = None
        self._worker = Worker("verify", self._round)

    # -- commands ------------------------------------------------------------------------------------------

    def start(self, rate: int | None, repair: bool) -> None:
        """replication-verify; CommandError when it cannot begin."""
        if self._set.record.stage is not Stage.RUNNING:
            raise CommandError("Block replication is not running", reason=Reason.NOT_RUNNING)
        for disk in self._disks:
            if disk.local is None:
                raise CommandError(f"Disk '{disk.name}' is not here, only what is written to it: nothing to compare")
        absence, unable = self._absence(), self._unable()
        if absence is not None:
            raise CommandError(absence, reason=Reason.PEER_UNREACHABLE)
        if unable is not None:
            raise CommandError(unable)
        self._begin(_Work(rate, repair, time.time()))

    def _begin(self, work: _Work) -> None:
        with self._lock:
            if self._work is not None:
                raise CommandError(
                    "The disks are being compared already: wait, or cancel that with `verify --cancel`",
                    reason=Reason.BUSY,
                )
            self._work = work
        try:
            self._worker.start()
        except CommandError:
            self._work = None
            raise
        self._worker.wake()

    def resume(self) -> None:
        """Go on with what a former process was at."""
        place = self._verified.place
        if place is None:
            return
        index = next((index for index, disk in enumerate(self._disks) if disk.name == place.disk), None)
        if index is None or not 0 <= place.offset <= self._disks[index].size:
            return
        before = sum(disk.size for disk in self._disks[:index]) + place.offset
        work = _Work(place.rate, place.repair, place.began, index, place.offset, max(0, before - place.left_out))
        work.left_out, work.different, work.ranges = place.left_out, place.different, place.ranges
        try:
            self._begin(work)
        except CommandError as error:
            log(f"the comparison of the disks does not go on: {error}")

    def cancel(self) -> None:
        """replication-verify-cancel; CommandError when there is nothing to cancel."""
        work = self._work
        if work is None:
            raise CommandError("The disks are not being compared")
        self._cancel(work)

    @staticmethod
    def _cancel(work: _Work) -> None:
        work.cancelled = True
        if work.comparison is not None:
            work.comparison.wake()

    def close(self, timeout_s: float) -> None:
        """End the thread; the next process goes on with what it was at."""
        work = self._work
        if work is not None and work.comparison is not None:
            work.comparison.wake()
        self._worker.stop(timeout_s)

    def query(self) -> dict[str, Any]:
        """What query-replication says of it."""
        work, now = self._work, None
        if work is not None:
            comparison = work.comparison
            now = {
                "current-progress": self._progress(work),
                "total-progress": sum(disk.size for disk in self._disks),
                "different-bytes": work.different,
                "rate": work.rate,
                "repair": work.repair,
                "waits-for": None if comparison is None else comparison.waits_for,
            }
        return {"verify": now, "last-verify": self._verified.last}

    def _progress(self, work: _Work) -> int:
        comparison = work.comparison
        return work.compared + work.left_out + (0 if comparison is None else comparison.compared)

    # -- why it does not go on -----------------------------------------------------------------------------

    def _absence(self) -> str | None:
        """Why nothing can be asked at present."""
        if self._link.agreement is None or not all(disk.forwarder.up for disk in self._disks):
            return f"The link to the secondary is not up ({self._link.reason or self._link.state.value})"
        return None

    @property
    def able(self) -> bool:
        """Whether there is a secondary that tells digests."""
        agreement = self._link.agreement
        return agreement is not None and agreement.digests

    def _unable(self) -> str | None:
        """Why this secondary cannot be asked."""
        agreement = self._link.agreement
        if agreement is None or agreement.digests:
            return None
        return PLAIN if agreement.peer is None else OLDER

    def _obstacle(self, work: _Work) -> str | None:
        if work.cancelled:
            return "the comparison was cancelled"
        if self._worker.closing:
            return "the process is ending"
        if self._set.record.stage is not Stage.RUNNING:
            return "replication was stopped"
        if time.monotonic() > work.saved_s + SAVE_S:
            self._save(work)
        return self._unable()

    # -- the thread ----------------------------------------------------------------------------------------

    def _round(self) -> None:
        work = self._work
        if work is None:
            return
        reason = None
        try:
            for index in range(work.index, len(self._disks)):
                work.index = index
                self._compare(work, self._disks[index])
                work.offset = 0
            reason = work.reason if work.left_out else None
        except ReplicationError as error:
            reason = str(error)
        except Exception as defect:  # noqa: BLE001 (it ends, and says so)
            log_defect(defect)
            reason = f"internal error, see the log: {type(defect).__name__}"
        if self._worker.closing and not work.cancelled:
            self._save(work)
        else:
            self._conclude(work, reason)

    def _compare(self, work: _Work, disk: PrimaryDisk) -> None:
        def found(disk: PrimaryDisk, offset: int, length: int) -> None:
            self._found(work, disk, offset, length)

        rate = self._set.options.resync_rate if work.rate is None else work.rate
        comparison = Comparison(
            disk, work.offset, Pace(rate), lambda: self._obstacle(work), self._absence, found, self.wait_s
        )
        job = Job("verify", disk.name, lambda: disk.size, lambda: work.offset + comparison.compared)
        job.cancel = lambda: self._cancel(work)
        work.comparison = comparison
        self._set.jobs.add(job)
        failure: str | None = "internal error, see the log"
        try:
            comparison.run()
            failure = comparison.reason if comparison.left_out else None
        except ReplicationError as error:
            failure = str(error)
            raise
        finally:
            if not self._worker.closing:  # then it goes on
                work.compared += comparison.compared
                work.left_out += comparison.left_out
                work.reason = comparison.reason if comparison.left_out else work.reason
                work.comparison = None
            self._set.jobs.conclude(job, failure)

    def _found(self, work: _Work, disk: PrimaryDisk, offset: int, length: int) -> None:
        """What the secondary has there is something else. Noted as if it had refused it."""
        pause("verify.found")
        work.different += length
        last = work.ranges[-1] if work.ranges else None
        if last is not None and last["disk"] == disk.name and last["offset"] + last["length"] == offset:
            last["length"] += length
        elif len(work.ranges) < RANGES_MAX:
            work.ranges.append({"disk": disk.name, "offset": offset, "length": length})
        disk.changes.mark(offset, length, found=True)
        self._link.desynchronized()
        try:
            self._set.ancestry.part()
        except DiskError as error:
            raise Ended(str(error)) from error
        if work.repair:
            self._resync_now(True)

    def _conclude(self, work: _Work, reason: str | None) -> None:
        result = "equal" if reason is None else "cancelled" if work.cancelled else "incomplete"
        if work.different:
            result = "different"
        now = time.time()
        outcome = {
            "result": result,
            "time": now,
            "duration": max(0.0, now - work.began),
            "compared-bytes": work.compared,
            "different-bytes": work.different,
            "left-out-bytes": work.left_out,
            "ranges": work.ranges,
            "repair": work.repair,
            "reason": reason,
        }
        try:
            if work.different:
                self._report(work)
            self._verified.conclude(outcome)
        finally:
            with self._lock:
                self._work = None
        why = "" if reason is None else f" ({reason})"
        log(f"the disks were compared: {result}{why}, {work.different} of {work.compared} bytes differ")
        self._set.hub.emit("REPLICATION_VERIFIED", **outcome)

    def _report(self, work: _Work) -> None:
        """An error of the node, unless it was repaired already."""
        if not any(disk.changes.missing for disk in self._disks):
            return
        first = work.ranges[0]
        error = DiskError(f"verify: {work.different} bytes of the secondary's disks are not what they should be")
        self._set.faults.report(
            Case.FORWARD, first["disk"], "verify", int(first["offset"]), int(first["length"]), error
        )

    def _save(self, work: _Work) -> None:
        """How far it is, for the next process."""
        work.saved_s = time.monotonic()
        comparison = work.comparison
        offset = work.offset if comparison is None else comparison.position
        self._verified.note(
            Place(
                self._disks[work.index].name,
                offset,
                work.rate,
                work.repair,
                work.began,
                work.left_out,
                work.different,
                work.ranges,
            )
        )
