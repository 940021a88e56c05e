# SPDX-License-Identifier: BSD-3-Clause
"""What becomes true with a checkpoint: whose content the disks have, and that it is valid.

The word of the epoch (state.py) is the point of no return of a checkpoint: from its store on the overlays count as
empty. What else the checkpoint means is in the record, and must be true from the same instant on, neither before (a
failover in between would take the old checkpoint for the new one) nor after (the answer would be an error for what has
happened). So the record promises it first, for the number of that one epoch:

    SETTLED   nothing is promised
       | promise(number, ...)   saved; StateError: nothing has changed
    PROMISED  the record has what will be true when the epoch is `number`
       |  | withdraw()          the epoch could not be begun: what the record promises counts no more
       |  +-----------> OWED    as below
       | fulfil()               the epoch was begun: it is true
    OWED      the record on stable storage says still "when": true, as long as the epoch stays what it is
       | tidy()                 saved; before the epoch becomes another one. StateError: it must not
    SETTLED

A process that finds a promise looks at the epoch (`settled`): the same number makes it true, any other makes it void.

What a secondary holds, which follows from the record and its maps and is stored nowhere else:

    WHOLE     nothing is lost, no resync, no link lost in the midst of an epoch: its next checkpoint will be valid
       |  ^   lost marks, `resync`, `paired` without a primary / all repaired, the primary says "complete"
    LACKING   something of the primary's is missing; the last checkpoint stays valid, and none is taken
       |  ^   `inconsistent` is set: what is lost was the checkpoint's, a full resync, a restart, a file of the folder
       |  |   that is not believed (binding.py) / never by itself
    INVALID   there is no checkpoint; the one that is fulfilled next (above) leads to WHOLE

What the primary has said of this content, in the record, each saved before the answer:

    NOTHING   no primary has been here, or it has left in good order and what it offered was adopted
       | "full", "quick" or "equal": `paired`, `resync`, and what is being received (`lineage`)
    RECEIVING <---------------------------------------------------+
       | "complete": `resync` ends, and `offered` is what the     | a primary says anew what it will send
       |             content is from the next checkpoint on       |
    OFFERED ------------------------------------------------------+
       | a checkpoint, a planned stop or a start adopts it: at one instant, as above. "unpair" ends `paired` before or
       |             after that; a restart of the host, and a file that is not believed, end the offer
    NOTHING

No claim about content rests on what is in memory only. What is there, and what it means that a kill or a power cut
takes it:

    the session of a primary   `paired` stays, so its link counts as lost in the midst of an epoch: LACKING. That the
                               primary has left in good order is saved before it is answered
    SecondaryDisk.strange      whether others have written to what was offered: taken for true where there is an offer,
                               so the marks of that stay, too many of them at most
    Agreement, Link, Watch     how far a primary is with its secondary: it pairs anew, nothing is in sync before that,
                               and the maps say what is missing. On its way counts as missing there
    Epochs                     an epoch that is held was never promised; its number is not used again
    Hindrance                  what refuses checkpoints: a record that cannot be saved, without which no process starts
                               in stage running; overlays, which each query looks at; requests that hang, which are gone
    Descent                    what has come down after a failover: all that is held comes down again
    ChangeMap.claim            what `sync=none` is about to clear: not cleared
    faults on their way to the record: the cause is not shown; the marks, which say what is lacking, come first
    a failed flush on its way to the guest: fails once more (Unflushed, TOLD)
    Fence                      which late writes a server may still do. The next process cannot know: docs/failures.md
                               says what is not promised, and what to do

Held to that, by a kill at the instant and a comparison of what is claimed with the disks: tests/e2e/test_lineage.py
(the offer, strangers, each step of a pairing), test_recovery.py (power cuts), test_hazards.py (a commit),
test_held_numbers.py and test_claims.py, tests/unit/disk/test_unflushed.py; and at random by tests/model/ledger.py and
tests/torture.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from replication.record.ancestry import Ancestry
from replication.record.lineage import Lineage
from replication.record.state import Promise, Record, StateError, StateFolder


class Settlement(Enum):
    """Where the record is between two checkpoints."""

    SETTLED = "settled"
    PROMISED = "promised"
    OWED = "owed"


class Ledger:
    """The promises of one node's record. Commands come one at a time (Node._command)."""

    def __init__(self, record: Record, ancestry: Ancestry, save: Callable[[], None]) -> None:
        """`save()` makes the record last; StateError."""
        self._record = record
        self._ancestry = ancestry
        self._save = save
        self.state = Settlement.SETTLED

    def promise(self, number: int, change: Callable[[Lineage], Lineage] | None, current: bool = False) -> None:
        """With epoch `number` there is a valid checkpoint, of the lineage that `change` makes of the present one, and
        (`current`) the node is not outdated any more. StateError, with nothing changed. `fulfil` or `withdraw` must
        follow."""
        lineage = None if change is None else change(self._ancestry.lineage).to_json()
        self._record.promise = Promise(number, lineage, current).to_json()
        try:
            self._save()
        except BaseException:
            self._record.promise = None
            # A save that failed may have come to stable storage all the same.
            self.state = Settlement.OWED
            raise
        self.state = Settlement.PROMISED

    def fulfil(self, change: Callable[[Lineage], Lineage] | None) -> None:
        """The epoch was begun. The record is saved if that is possible now, and is right if not."""
        record = self._record
        record.inconsistent = None
        if record.promise is not None and record.promise["current"]:
            record.outdated = None
        if change is not None:
            self._ancestry.note(change)
        self._owe()
        try:
            self.tidy()
        except StateError:
            return  # `tidy` is called again

    def withdraw(self) -> None:
        """The epoch could not be begun."""
        self._owe()

    def _owe(self) -> None:
        self._record.promise = None
        self.state = Settlement.OWED

    def tidy(self) -> None:
        """Have the record say without a condition what it says; before the epoch becomes another one. StateError."""
        if self.state is Settlement.OWED:
            self._save()
            self.state = Settlement.SETTLED


def settled(record: Record, state: StateFolder) -> Record:
    """The record of a former process, with what has become true of its promise. It has to be saved before the epoch
    becomes another one."""
    if record.promise is not None:
        promise, record.promise = Promise.from_json(record.promise), None
        if promise.epoch == state.epoch:
            record.inconsistent = None
            record.lineage = promise.lineage or record.lineage
            if promise.current:
                record.outdated = None
    return record
