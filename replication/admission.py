# SPDX-License-Identifier: BSD-3-Clause
"""When the guest of a node is served, and when it stands still.

It does so for five reasons, of which the first that holds counts:

    guest-face      nobody has promoted the node in this process: exports of guests are closed, and requests fail
    on-outdated     the node owns its disks, and has learnt that another one went on: as the option says
    wfc-timeout     a primary was started again and has not reached its peer yet: requests wait
    fencing         a primary's link is lost, and nobody has said yet that the peer is fenced: writes wait; reads go on
    lease           a primary that runs has heard neither of its secondary nor of the cluster in time (lease.py):
                    requests wait

Each method changes one thing and then decides anew from everything, under a lock: whoever has changed something last
has decided last. A node that is being made a secondary is an exception: its guest goes on standing still until it is
one, and what waited is turned away then, because the disk behind the export is not the one that it was for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from replication.errors import CommandError
from replication.log import log
from replication.options import Fencing, OnOutdated, Options
from replication.order.standstill import Standstill
from replication.order.worker import Worker
from replication.reason import Reason
from replication.record.boot import boot_clock_s

_CUT_OFF = "fencing=suspend-io: there is no link, and nobody has said that the other node is fenced"
_NOT_REACHED = "wfc-timeout: the other node was not reached since this one was started"
_LEASE_LATE_S, _LEASE_LOOK_S = 0.01, 1.0
_CLOSED = "guest-face=closed-until-promoted, and nobody has promoted this node"


class Ownership(NamedTuple):
    """What the decision needs of the node."""

    owner: bool
    forwards: bool
    """Whether it is a primary that runs."""
    outdated: str | None
    """Why it is outdated."""
    code: str | None = None
    """The same as a code."""


class Admission:
    """Of one node. Every method may be called by any thread."""

    def __init__(
        self,
        options: Options,
        ownership: Callable[[], Ownership],
        clock: Callable[[], float] = boot_clock_s,
        told: Callable[[dict[str, str] | None], None] = lambda _standing: None,
    ) -> None:
        """`clock()` is the one by which a lease ends, in seconds. `told(standing)` is called whenever that has changed,
        in order, under a lock, so it must not wait."""
        self._tell = told
        self._clock = clock
        self.still = Standstill(clock)
        """What the exports of guests look at."""
        self._options = options
        self._ownership = ownership
        # Protects the fields below, and who decides. Below all locks of the node but the one of `still`; never across
        # I/O.
        self._lock = threading.Lock()
        self._closed = options.guest_face_closed
        self._waits_for_peer = False
        self._cut_off = False
        # Somebody has said that the peer is fenced, and there was no agreement with it since.
        self._fenced = False
        self.losses = 0
        """Of a link, as far as fencing counts them."""
        # Somebody has let the guest go on although the node is outdated.
        self._resumed = False
        # What the node has learnt of the other one (codes) since the two last agreed: the link meets the same refusal
        # every few seconds.
        self._heard: set[str] = set()
        # How many are at work who say that the node is outdated.
        self._hearing = 0
        # How many are making it a secondary: a command, and a step of that.
        self._demoting = 0
        # What the log has.
        self._told: dict[str, str] | None = None
        self._patient_until = 0.0
        self._patience = Worker("wfc", self._peer_has_not_come)
        # Until when the lease lasts, by the clock; and whether somebody lets the guest go on without.
        self._leased_until = 0.0
        self._lease_waived = False
        # The primary has taken leave, or is about to: nothing that it hears counts before the next agreement.
        self._left = False
        # It was stopped on the way to a secondary: it may be a primary again, so its lease goes on.
        self._lease_kept = False
        self._lease_watch = Worker("lease", self._look_at_lease)

    @property
    def closed(self) -> str | None:
        """Why guests cannot open their exports, None if they can."""
        return _CLOSED if self._closed else None

    @property
    def standing(self) -> dict[str, str] | None:
        """Why the guest stands still, as `code` and `reason`; None if it does not."""
        found = self.still.standing
        return None if found is None else {"code": found[0], "reason": found[1]}

    def begin(self, restarted: bool, of_pair: bool, kept_back: bool = False, left: bool = False) -> None:
        """The node is there. `restarted`: as a primary whose replication ran; `of_pair`: which has had a secondary.
        `kept_back`: its guest stood still in a demotion that a former process has begun, and not ended. `left`: that
        has ended in good order, and may have said good-bye."""
        with self._lock:
            self._left = restarted and left
            patient = kept_back or (restarted and of_pair)
            self._waits_for_peer = patient and self._options.wfc_timeout_s is not None
            self._cut_off = (restarted or kept_back) and self._options.fencing is Fencing.SUSPEND_IO
            self._lease_kept = kept_back and self._options.lease_s is not None
            self._decide_locked()
        self.tell()

    def launch(self) -> None:
        """The process is served from now on."""
        if self._waits_for_peer and self._options.wfc_timeout_s is not None:
            self._patient_until = time.monotonic() + self._options.wfc_timeout_s
            self._patience.start(self._options.wfc_timeout_s)
        if self._options.lease_s is not None:
            self._lease_watch.start()

    def end(self) -> None:
        """The process ends: what waits fails."""
        self.still.end()

    def close(self) -> None:
        """The node ends."""
        self.still.end()
        self._patience.stop(0.0)
        self._lease_watch.stop(0.0)

    # -- what changes --------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change: then it is decided anew, and the log gets it. Who raises has changed nothing."""
        with self._lock:
            yield
            self._decide_locked()
        self.tell()

    def review(self) -> None:
        """The stage, or why the node is outdated, has changed."""
        with self._changing():
            pass

    def learnt(self, code: Reason, again: bool = False) -> bool:
        """The node has learnt that another one went on: what was said before about its guest does not count. `again`:
        it was outdated already, and may have learnt just this. Whether a guest that somebody had let go on stops."""
        with self._changing():
            news = not (again and code.value in self._heard)
            self._heard.add(code.value)
            stops, self._resumed = news and self._resumed, self._resumed and not news
        return stops

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Around a command which says that the node is outdated: its guest stands still while that waits for another
        command, or for the storage, and as before when it fails."""
        with self._lock:
            self._hearing += 1
            self._decide_locked()
        try:
            yield
        finally:
            with self._changing():
                self._hearing -= 1

    def accepted(self) -> None:
        """The peer takes this node's writes: what is learnt of it from now on is new."""
        with self._lock:
            self._heard.clear()
        self.reached()

    def promoted(self) -> None:
        """Somebody has made the node an owner. If it is one still: the command may be late."""
        with self._changing():
            if self._ownership().owner:
                self._closed = False

    @property
    def keeps_back(self) -> bool:
        """Whether the guest stands still, in a demotion, for something that ends with a stop otherwise."""
        with self._lock:
            return self._demoting > 0 and (self._waits_for_peer or self._cut_off or self._leased_locked())

    @contextmanager
    def demoting(self) -> Iterator[None]:
        """Around what makes the node a secondary, or fails to."""
        with self._lock:
            self._demoting += 1
        try:
            yield
        finally:
            with self._changing():
                self._demoting -= 1

    def reached(self) -> None:
        """The peer was reached, and has not gone on; or its time is over."""
        with self._changing():
            self._waits_for_peer = False

    def stopped(self) -> None:
        """The stage is done: whoever has stopped a primary says that it goes on without its peer, unless it is on the
        way to a secondary."""
        with self._changing():
            if not self._demoting:
                self._waits_for_peer = self._cut_off = self._lease_kept = False
            elif self._options.lease_s is not None:
                # The secondary may hear the good-bye next, and wait for nothing then.
                self._lease_kept, self._leased_until = not (self._lease_waived or self._fenced), 0.0

    def alone(self) -> None:
        """Somebody insists that the primary goes on without its peer."""
        with self._changing():
            self._waits_for_peer = self._cut_off = self._lease_kept = False
            self._lease_waived = True

    def linked(self, losses: int) -> None:
        """The link is up, which came up after so many losses. It may be lost already."""
        with self._changing():
            if self._ownership().forwards:
                self._left = False
            if self.losses == losses:
                self._cut_off = self._fenced = False

    def heard(self, asked_s: float) -> None:
        """The secondary has answered what it was asked at that moment, by the clock."""
        if self._options.lease_s is None:
            return
        with self._changing():
            if not self._left:
                self._lease_waived = False
                self._leased_until = max(self._leased_until, asked_s + self._options.lease_s)

    def leave(self) -> None:
        """The secondary is about to hear that it has everything, and may fail over then."""
        with self._changing():
            self._left, self._leased_until = True, 0.0

    def stay(self) -> None:
        """It has not taken that."""
        with self._changing():
            self._left = False

    def renew(self) -> float:
        """The cluster, which has the last word on who fails over, knows that this primary is to go on; for how many
        seconds. CommandError where there is no lease, or its secondary may wait for none: it has heard a good-bye."""
        lease_s = self._options.lease_s
        with self._changing():
            if lease_s is None or not self._ownership().forwards:
                raise CommandError(
                    "There is no lease to renew: it is of a primary that runs, with the key lease",
                    reason=Reason.WRONG_STAGE,
                )
            if self._left:
                raise CommandError(
                    "There is no lease to renew: this primary has said good-bye to its secondary, which may fail over "
                    "at any time, and has not reached it since",
                    reason=Reason.WRONG_STAGE,
                )
            self._leased_until = max(self._leased_until, self._clock() + lease_s)
        return lease_s

    def _look_at_lease(self) -> float:
        """For the log: the requests look at the clock themselves."""
        self.tell()
        left_s = self._leased_until - self._clock()
        return left_s + _LEASE_LATE_S if left_s > 0 else _LEASE_LOOK_S

    def cut_off(self) -> None:
        """The link is lost: before anybody else knows, and before a write that waits for the secondary goes on. Whoever
        says so may hold a lock of the link, so it is for others to `tell`."""
        if self._options.fencing is Fencing.SUSPEND_IO:
            with self._lock:
                self.losses += 1
                if self._ownership().forwards and not self._fenced:
                    self._cut_off = True
                    self._decide_locked()

    def resume(self, fenced: bool = False) -> None:
        """Somebody lets the guest go on, until the node learns anew that it is outdated. `fenced`: because the peer is,
        so that a loss of the link which is noticed only later does not count either, until the next agreement.
        CommandError if that takes a promotion, or the node is being made a secondary."""
        with self._changing():
            if self._closed:
                raise CommandError(f"The guest does not go on: {_CLOSED}", reason=Reason.NOT_PROMOTED)
            if self._demoting:
                raise CommandError("The guest does not go on: the node is being made a secondary", reason=Reason.BUSY)
            if fenced:
                # An agreement from before this says nothing of what comes after it.
                self._fenced, self.losses = True, self.losses + 1
            if self.still.stands(reads=False):
                self._waits_for_peer = self._cut_off = False
                self._resumed = self._lease_waived = True
                self._lease_kept = False
                if (code := self._ownership().code) is not None:
                    self._heard.add(code)

    def tell(self) -> None:
        """Say what has been decided, in the log without a lock."""
        with self._lock:
            standing = self.standing
            news, self._told = standing != self._told, standing
            if news:
                self._tell(standing)
        if news:
            log("the guest goes on" if standing is None else f"the guest stands still: {standing['reason']}")

    def _peer_has_not_come(self) -> float | None:
        """The time of wfc-timeout is over, or so much of it as a thread sleeps."""
        left_s = self._patient_until - time.monotonic()
        if not self._waits_for_peer:
            return None
        if left_s > 0:
            return left_s
        log("the other node was not reached within wfc-timeout: the guest is served without it")
        self.reached()
        return None

    def _decide_locked(self) -> None:
        if self._demoting and self._ownership().owner:
            if not self.still.stands(reads=False):
                self._choose_locked()
            return  # what stands goes on standing, whatever changes on the way
        if self._demoting:
            self._closed = self._options.guest_face_closed
            self._waits_for_peer = self._cut_off = self._resumed = self._fenced = self._lease_kept = False
            self.still.turn_away("the node has been made a secondary")
        self._choose_locked()

    def _stand_locked(self, code: Reason, why: str, *, fails: bool = False, writes_only: bool = False) -> None:
        self.still.begin(why, fails=fails, writes_only=writes_only, code=code.value)

    def _leased_locked(self) -> bool:
        if self._options.lease_s is None or self._lease_waived or self._fenced:
            return False
        return self._lease_kept or self._ownership().forwards

    def _choose_locked(self) -> None:
        ownership, choice = self._ownership(), self._options.on_outdated
        leased = self._leased_locked()
        if leased:  # what keeps the guest back comes first, and what lets it go on last
            self.still.lease(self._leased_until)
        if self._closed:
            self._stand_locked(Reason.NOT_PROMOTED, _CLOSED, fails=True)
        elif ownership.owner and self._hearing and choice is not _CONTINUE:
            # In front of the next one: nothing fails before that is saved, and so is certain.
            self._stand_locked(Reason.OUTDATED, "somebody is saying that this node is outdated")
        elif ownership.owner and ownership.outdated is not None and not self._resumed and choice is not _CONTINUE:
            fails = choice is OnOutdated.IO_ERROR
            self._stand_locked(Reason.OUTDATED, f"this node is outdated ({ownership.outdated})", fails=fails)
        elif ownership.owner and self._waits_for_peer:
            self._stand_locked(Reason.WFC_TIMEOUT, _NOT_REACHED)
        elif ownership.owner and self._cut_off:
            self._stand_locked(Reason.FENCING, _CUT_OFF, writes_only=True)
        else:
            self.still.over()
        if not leased:
            self.still.lease(None)


_CONTINUE = OnOutdated.CONTINUE
