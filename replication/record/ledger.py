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

What is kept in memory only, and what its loss with the process costs:

    Pairing._offered             no adoption; the primary offers again when it pairs again
    Session.agreed               `paired` stays, so it counts as a link that was lost in the midst of an epoch: LACKING
    SecondaryDisk.strange        goes with `_offered`, so nothing is cleared because of it; the marks are in the map
    Agreement.completed, refused the primary pairs again, and the maps say what is missing
    Hindrance                    found again with the next checkpoint that is refused
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

    def promise(self, number: int, change: Callable[[Lineage], Lineage] | None) -> None:
        """With epoch `number` there is a valid checkpoint, of the lineage that `change` makes of the present one.
        StateError, with nothing changed. `fulfil` or `withdraw` must follow."""
        lineage = None if change is None else change(self._ancestry.lineage).to_json()
        self._record.promise = Promise(number, lineage).to_json()
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
        self._record.inconsistent = None
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
    return record
