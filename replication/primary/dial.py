# SPDX-License-Identifier: BSD-3-Clause
"""How a primary comes to an agreement with its secondary, before a byte of data goes there.

    1. the control export: a secondary of this software has it, any other NBD server does not (and is taken as an
       endpoint that just stores what it is sent: nothing is known of it, and nobody there takes checkpoints)
    2. `replication-pair`: both say who they are and what they descend from, and both decide by the same rule
       (lineage.decide) whether anything has to be sent; the secondary gives a token that lets this primary write, and
       from then on nothing of an older connection is accepted there
    3. `replication-pair-map`: what the secondary's disk has changed or lacks goes into the change map here
    4. a connection for every disk
    5. `settle`: the lineage, first here, then there (`replication-pair-sync`)

Up to and including 4 nothing has changed but the change map, which may say too much. An interruption between the steps
of 5 leads to a resync that sends too much, never to one that sends too little: lineage.py.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from replication import batch, digests
from replication.disk.connection import Connection
from replication.errors import DiskError, ReplicationError
from replication.options import DATA_EXPORT, DIGEST_EXPORT, Durability
from replication.primary.disk import PrimaryDisk
from replication.primary.peer import Peer, PeerError
from replication.reason import Reason
from replication.record.ancestry import Ancestry
from replication.record.lineage import OUTDATED, Lineage, Relation, Verdict, check_id, compare, decide, new_id
from replication.record.state import StateError, check_epoch
from replication.secondary.pairing import NOBODYS
from replication.side import FOR_GUESTS, OF_PAIRS, Setting
from replication.sizes import SIZE_MAX
from replication.stage import Stage
from replication.uri import export_of

ANSWER_S = 30.0
"""Longest wait for the secondary to answer: it saves its state on a disk that may be busy. That it is alive shows four
times a second; if not, the wait ends with the link, within `timeout`."""


EVERYTHING = ("full", "digest")
"""Values of `sync` with which all of the disks counts as missing."""
COMPARING = ("digest", "verify")
"""Those that need digests of the secondary's disks."""

_PART_MIN = 64 << 20
"""Bytes of the disk between two parts of a change map: the parts have 4096 runs of 64 KiB and as many gaps."""


class Noted(Enum):
    """What is left of an attempt that has come to nothing: with more than NOTHING, the next one may send more than has
    changed."""

    NOTHING = ""
    HERE = "what is to be sent is noted, so the next start may send more than has changed"
    BOTH = f"{HERE}, and until then the secondary may take no checkpoint"
    """The secondary was told, or perhaps was."""


class Refusal(ReplicationError):
    """The other side, or what the two sides descend from, does not allow it: a person has to do something."""

    def __init__(self, text: str, reason: Reason | None = None) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass
class Agreement:
    """A secondary that has been reached, and what has been agreed."""

    uri: str
    peer: Peer | None
    """None: a plain NBD server."""
    connections: list[Connection]
    verdict: Verdict
    token: str = ""
    generation: str = ""
    """What the secondary knows that it receives, or has."""
    node: str | None = None
    epoch: int = 0
    running: bool = False
    """The secondary has been started, so it has a first checkpoint."""
    batches: bool = False
    """The secondary takes small writes together (batch.py)."""
    digests: bool = False
    """The secondary tells digests of its disks (digests.py)."""
    durable: bool = False
    """The secondary flushes its disk for each checkpoint."""
    refused: int = 0
    """Requests that the secondary has refused; what was refused is missing there."""
    taken: int = 0
    """Checkpoints for which the secondary has answered."""
    completed: bool = False
    """The secondary knows that it has had everything at some time since."""
    settled: bool = False
    """It has everything, and knows it: nothing was refused since it was told."""
    parting: bool = False
    """The stream is about to end at a cut, or has: the secondary's guest is not served any more. Set before the cut,
    which closes the gate."""
    broken: DiskError | None = None
    """Set when the peer channel is lost."""
    losses: int = 0
    """Losses of a link before this one was up (admission.py)."""

    def disk_size(self, connection: Connection) -> int:
        """The size of the secondary's disk behind one of the connections (batch.py)."""
        behind = batch.SPACE + (digests.SPACE if self.digests else 0)
        return connection.size - (0 if self.peer is None else behind)

    def close(self) -> None:
        """It comes to nothing."""
        for connection in self.connections:
            connection.close()
        if self.peer is not None:
            self.peer.close()


class Dialler:
    """Reaches secondaries for the disks of one primary."""

    def __init__(
        self,
        setting: Setting,
        ancestry: Ancestry,
        disks: Sequence[PrimaryDisk],
        broken: Callable[[Agreement, DiskError], None],
    ) -> None:
        """`broken(agreement, error)` is called when a peer channel is lost, by its own thread."""
        self._set = setting
        self._ancestry = ancestry
        self._disks = disks
        self._broken = broken
        # Set at the end of the process, when the change maps are about to be closed.
        self._interrupted = False
        # The channel of the latest agreement that was sought: what `give_up` tears loose.
        self._peer: Peer | None = None
        self.noted = Noted.NOTHING
        """Of the latest attempt."""
        # Connections to plain servers, in use or given up: what they have sent the server may still do.
        self._plain_ones: list[Connection] = []

    # -- steps 1 to 4 --------------------------------------------------------------------------------------

    def dial(self, uri: str | None, sync: str, former: str | None) -> Agreement:
        """Reach the secondary at `uri`. `former`: it must be the node of that id, because a pair is to go on. DiskError
        when it cannot be reached, Refusal when it must not be used."""
        self.noted = Noted.NOTHING
        if uri is None:
            raise DiskError("there is no secondary: give the key secondary=URI or the argument 'secondary'")
        timeout_s = self._set.options.timeout_s
        agreement = Agreement(uri, None, [], Verdict.EQUAL)

        def broken(error: DiskError) -> None:
            agreement.broken = error
            self._broken(agreement, error)

        peer = Peer.open(uri, timeout_s, self._connection, _nothing, broken)
        if peer is None:
            if former is not None:
                raise Refusal(f"what answers at {uri} is not the secondary that it was")
            if self._set.options.lease_s is not None:
                raise Refusal(f"{uri} is a plain NBD server, of which nothing is heard: lease needs a secondary")
            if sync in COMPARING:
                raise Refusal(
                    f"{uri} is a plain NBD server, which tells no digests of its disk: sync={sync} needs them"
                )
            return self._dial_plain(agreement)
        agreement.peer = self._peer = peer
        try:
            self._pair(agreement, peer, sync, former)
            for disk in self._disks:
                name = export_of(uri) or disk.name
                export = DIGEST_EXPORT if agreement.digests else DATA_EXPORT
                connection = self._connection(uri, f"{export}:{agreement.token}:{name}", timeout_s)
                agreement.connections.append(connection)
                self._check(disk, connection, agreement.disk_size(connection))
        except PeerError as error:
            agreement.close()
            stranger = None if former is None else self._stranger(error, former)
            if stranger is not None:
                raise Refusal(
                    f"{uri} refuses: {error}; that is node {stranger}, which is not the secondary that it was",
                    Reason.OTHER_NODE,
                ) from error
            raise Refusal(f"the secondary {uri} refuses: {error}", _told(error)) from error
        except BaseException:
            agreement.close()
            raise
        return agreement

    def _stranger(self, error: PeerError, former: str) -> str | None:
        """Of a refusal because what answers is nobody's secondary: which node that is, if it is not the `former` one,
        and has nothing of this node's content. So the URI leads elsewhere, and nobody has gone on. None also of an
        older version, which does not say who it is."""
        if _told(error) is not Reason.NOT_SECONDARY or not isinstance(error.data, dict):
            return None
        node, lineage = error.data.get("node"), error.data.get("lineage")
        if not isinstance(node, str) or not isinstance(lineage, dict) or node == former:
            return None
        try:
            check_id("node", node)
            relation, _ = compare(self._ancestry.lineage, Lineage.from_json(lineage))
        except (KeyError, TypeError, ValueError):
            return None  # of another version: whoever it is, it may have gone on
        return node if relation in (Relation.UNRELATED, Relation.UNKNOWN) else None

    def interrupt(self) -> None:
        """The process ends: whatever is under way fails soon, and touches nothing any more."""
        self._interrupted = True
        self.give_up()

    def give_up(self) -> None:
        """An agreement that is being sought fails soon."""
        if self._peer is not None:
            self._peer.close()

    def size_of(self, disk: PrimaryDisk, uri: str | None) -> int:
        """The size of the target face, for an export that only forwards; DiskError."""
        if uri is None:
            raise DiskError("there is no secondary: give the key secondary=URI or the argument 'secondary'")
        connection = self._plain(disk, uri)
        connection.close()
        return connection.size

    def _connection(self, uri: str, export: str | None, timeout_s: float) -> Connection:
        return Connection(uri, export, timeout_s, self._set.options.tls)

    def _pair(self, agreement: Agreement, peer: Peer, sync: str, former: str | None) -> None:
        uri = agreement.uri
        names = {disk.name: export_of(uri) or disk.name for disk in self._disks}
        mine = self._ancestry.lineage
        answer = self._ask(
            peer,
            "replication-pair",
            {
                "node": self._set.record.node,
                "lineage": mine.to_json(),
                "disks": {names[disk.name]: disk.size for disk in self._disks},
                "epoch": self._set.state.epoch,
                "timeout": self._set.options.timeout_s,
                # A secondary that does not know of it refuses, and then there is no pair that it would not protect.
                **({} if self._set.options.lease_s is None else {"lease": self._set.options.lease_s}),
            },
        )
        try:
            agreement.token = _check_token(answer["token"])
            agreement.epoch = check_epoch(answer["epoch"])
            check_id("node", answer["node"])
            agreement.node = answer["node"]
            agreement.batches = bool(answer["batches"])
            agreement.digests = answer.get("digests") is True
            agreement.durable = answer["durability"] == Durability.POWER.value
            agreement.running = answer["stage"] == Stage.RUNNING.value
            decision = decide(mine, Lineage.from_json(answer["lineage"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Refusal(f"the secondary {uri} is of another version: {error}") from error
        if former is not None and former != agreement.node:
            raise Refusal(f"what answers at {uri} is another secondary than it was: stop, then start with it")
        if decision.verdict is Verdict.REFUSED:
            raise Refusal(decision.reason, decision.code)
        if sync in COMPARING and not agreement.digests:
            raise Refusal(
                f"the secondary {uri} is of a version that tells no digests of its disk: sync={sync} needs them"
            )
        agreement.verdict = Verdict.EQUAL if sync == "none" else decision.verdict
        if sync in EVERYTHING and agreement.verdict is Verdict.EQUAL:
            # Two new nodes, and who starts them says that the disks are not equal: this is the first copy, before which
            # the secondary has no checkpoint of anything.
            agreement.verdict = Verdict.FULL
        if agreement.verdict is Verdict.FULL or sync in EVERYTHING:
            for disk in self._disks:
                if disk.local is None:
                    raise Refusal(
                        f"the secondary needs all of disk '{disk.name}', and there is no local disk to send: copy it, "
                        "then start with sync=none"
                    )
        if agreement.verdict is Verdict.QUICK:
            for disk in self._disks:
                self._take_map(agreement, peer, disk, names[disk.name])
        if former is not None:
            self._check_sendable()

    def _check_sendable(self) -> None:
        """A start of an export that only forwards says that the disks are equal; a link that comes back does not."""
        for disk in self._disks:
            if disk.local is None and disk.changes.missing:
                raise Refusal(
                    f"the secondary lacks {disk.changes.marked_bytes} bytes of disk '{disk.name}', and there is no "
                    "local disk to send them from: stop, copy the disk, then start again"
                )

    def _take_map(self, agreement: Agreement, peer: Peer, disk: PrimaryDisk, name: str, *, lost: bool = False) -> None:
        """What the secondary's disk lacks, or (not with `lost`) has changed by itself."""
        start: int | None = 0
        only = {"lost": True} if lost else {}
        while start is not None:
            arguments = {"token": agreement.token, "disk": name, "start": start, **only}
            answer = self._ask(peer, "replication-pair-map", arguments)
            try:
                disk.changes.mark_ranges(answer["ranges"])
                if answer["ranges"]:
                    self.noted = Noted.HERE
                further = answer["next"]
                start = None if further is None else _check_further(start, further, disk.changes.size)
            except (KeyError, TypeError, ValueError) as error:
                raise Refusal(f"the secondary {agreement.uri} is of another version: {error}") from error

    def discard_checkpoint(self, agreement: Agreement) -> None:
        """The secondary need not keep its last checkpoint until it has everything. PeerError, DiskError."""
        if agreement.peer is None:
            return  # a plain server keeps none
        self._ask(agreement.peer, "replication-pair-discard", {"token": agreement.token})

    def take_lost(self, agreement: Agreement) -> bool:
        """Mark what the secondary has lost of what it was sent; whether that was anything. PeerError, DiskError,
        Refusal."""
        assert agreement.peer is not None
        for disk in self._disks:
            name = export_of(agreement.uri) or disk.name
            self._take_map(agreement, agreement.peer, disk, name, lost=True)
        taken = any(disk.changes.missing for disk in self._disks)
        if taken:
            self._ancestry.part()  # as for a write that was refused
        return taken

    def _ask(self, peer: Peer, command: str, arguments: dict[str, Any]) -> Any:
        self._check_interrupted()
        return peer.call(command, arguments, ANSWER_S)

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise DiskError("the process is ending")

    # -- plain servers -------------------------------------------------------------------------------------

    def _dial_plain(self, agreement: Agreement) -> Agreement:
        self._plain_ones = [one for one in self._plain_ones if not one.dead or (one.fence and one.fence.pending)]
        if any(one.uri == agreement.uri and one.fence and one.fence.pending for one in self._plain_ones):
            # A secondary of ours has both kept apart by the token of the session.
            raise DiskError(
                f"{agreement.uri} has neither answered what was sent over the former connection nor closed that: it "
                "may still write it, on top of what would be sent now"
            )
        try:
            for disk in self._disks:
                agreement.connections.append(self._plain(disk, agreement.uri))
                if agreement.connections[-1].description in OF_PAIRS:
                    # nbdkit says of every failure to open an export that there is none.
                    raise DiskError(
                        f"{agreement.uri} is a secondary, but its control export cannot be opened: try again"
                    )
                self._check_open(agreement.connections[-1])
                agreement.connections[-1].fenced = True
                self._plain_ones.append(agreement.connections[-1])
        except BaseException:
            agreement.close()
            raise
        return agreement

    def _plain(self, disk: PrimaryDisk, uri: str) -> Connection:
        connection = self._connection(uri, None if export_of(uri) else disk.name, self._set.options.timeout_s)
        try:
            self._check(disk, connection, connection.size)
        except BaseException:
            connection.close()
            raise
        return connection

    @staticmethod
    def _check(disk: PrimaryDisk, connection: Connection, size: int) -> None:
        """DiskError unless the export can be the target face of the disk; it is for one of `size` bytes."""
        uri = connection.uri
        if connection.read_only or not (connection.can_zero and connection.can_flush and connection.can_fua):
            raise DiskError(f"{uri} is read-only or lacks write-zeroes, flush or FUA: it is no secondary")
        if connection.description in FOR_GUESTS:
            # A primary (the old one, or this very process), or the wrong face: that guest's writes would be lost.
            raise DiskError(f"{uri} is no secondary, but a guest writes there ({connection.description})")
        if not 0 < size <= SIZE_MAX:
            raise DiskError(f"{uri} has {size} bytes: that is no size of a disk")
        if disk.size and size != disk.size:
            raise DiskError(f"disk '{disk.name}' has {disk.size} bytes here, but {size} on the secondary {uri}")

    @staticmethod
    def _check_open(connection: Connection) -> None:
        """DiskError when the secondary has failed over, or was promoted: it takes nothing from anybody."""
        block = memoryview(bytearray(connection.block_size))
        try:
            connection.wait(connection.issue(lambda handle, done: handle.aio_pread(block, 0, done), 0))
        except DiskError as error:
            if error.errno == errno.ESHUTDOWN:
                raise DiskError(
                    f"{connection.uri} has failed over or was promoted: it is nobody's secondary"
                ) from error
            if connection.dead:
                raise
            # A server that cannot be read may still be written to: what else is wrong shows with the first write.

    # -- step 5 --------------------------------------------------------------------------------------------

    def settle(self, agreement: Agreement, sync: str) -> None:
        """Make what was agreed last, here and there. No forwarder is up. DiskError, Refusal or StateError."""
        self._check_interrupted()
        if sync in EVERYTHING or agreement.verdict is Verdict.FULL:
            self.noted = Noted.HERE
            for disk in self._disks:
                disk.changes.mark_all()
        if agreement.peer is None:
            # Whoever had this generation until now has not got what this server will take off the change map. Nor has
            # a secondary that is still to come: it must not be taken for equal but for what that map marks. (Where
            # there is no local disk, a person says with each start that the disks are equal.)
            keeps = any(disk.local is not None for disk in self._disks)
            self._ancestry.become(lambda lineage: lineage.renewed(new_id()) if lineage.current or keeps else lineage)
            self.noted = Noted.HERE
            return
        marked = sync != "none" and any(disk.changes.missing for disk in self._disks)
        former = self._ancestry.lineage
        if agreement.verdict is Verdict.FULL or (agreement.verdict is Verdict.EQUAL and marked):
            # Not equal as long as something is marked: a failover there would make a mere ancestor of this node.
            self._ancestry.become(lambda lineage: lineage.renewed(new_id()))
        elif agreement.verdict is Verdict.EQUAL:
            self._ancestry.become(lambda lineage: lineage.paired_as_equal(new_id()))
            if any(disk.changes.outdated if sync == "none" else disk.changes.missing for disk in self._disks):
                self._ancestry.part()  # a write since the look above, which nobody will forward
        settled = self._ancestry.lineage
        before, self.noted = self.noted, Noted.BOTH
        try:
            self._tell(agreement, agreement.verdict.value, settled, marked)
        except PeerError as error:
            self.noted = Noted.HERE
            if settled == former:
                self.noted = before
            elif not former.shared:
                # It has changed nothing there, and nobody else has what this node had: so nothing has changed here.
                with contextlib.suppress(StateError):
                    self._ancestry.become(lambda lineage: former if lineage == settled else lineage)
                    self.noted = before
            raise Refusal(f"the secondary {agreement.uri} refuses: {error}", _told(error)) from error

    def tell_complete(self, agreement: Agreement) -> None:
        """Nothing is missing any more: the next checkpoint there is of this node's generation. DiskError, StateError or
        PeerError."""
        mine = self._ancestry.lineage
        if mine.current != agreement.generation:
            # The nodes have parted since, because a write was refused. Noted there before `base` goes here: else an
            # interruption before the checkpoint would make the secondary a mere ancestor, which needs a full resync.
            self._tell(agreement, Verdict.QUICK.value, mine, marked=True)
        mine = self._ancestry.become(lambda lineage: lineage.offered())
        if any(disk.changes.missing or not disk.forwarder.up for disk in self._disks):
            self._ancestry.part()  # a write since the caller's look, which nobody has forwarded
            return
        self._tell(agreement, "complete", mine, marked=False)
        agreement.completed = True

    def _tell(self, agreement: Agreement, verdict: str, mine: Lineage, marked: bool) -> None:
        """`replication-pair-sync`: what the secondary is going to receive, or has received."""
        assert agreement.peer is not None
        self._ask(
            agreement.peer,
            "replication-pair-sync",
            {
                "token": agreement.token,
                "verdict": verdict,
                "generation": mine.current,
                "history": list(mine.history),
                "marked": marked,
            },
        )
        agreement.generation = mine.current


def _told(error: PeerError) -> Reason | None:
    """Its reason; of a secondary of version 0.2, which gives no code, by its text."""
    return error.reason or {NOBODYS: Reason.NOT_SECONDARY, OUTDATED: Reason.PEER_NEWER}.get(str(error))


def _check_token(token: object) -> str:
    """What names a session is part of an export's name; ValueError unless it can be."""
    if not isinstance(token, str) or not re.fullmatch("[0-9A-Za-z]{1,64}", token):
        raise ValueError("its token is none")
    return token


def _check_further(start: int, further: object, size: int) -> int:
    """Where the next part of a change map begins; ValueError when that is not worth another message: one that has said
    all, or says it in steps so small that they would never end."""
    if type(further) is not int or not start + _PART_MIN <= further < size:
        raise ValueError("its change map does not end")
    return further


def _nothing(_name: str, _data: dict[str, Any]) -> None:
    """Events of the secondary are for its own operators; a primary sees what matters in the answers."""
