# SPDX-License-Identifier: BSD-3-Clause
"""Exports: which name leads to which face, and the gate before every request.

What is behind a name may change while clients are connected (a promoted secondary becomes a primary), and so may who
is allowed to write there. So an export looks its face up, and asks the side at work, for every request, inside the
gate, with which such a change is alone.

A guest that stands still (standstill.py) waits outside the gate, where no command waits for it, and everything is
looked at again when it goes on.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from replication import digests
from replication.batch import SPACE, unpack
from replication.control.inband import ControlExport
from replication.digests import DIGEST_BYTES, what_is_asked
from replication.disk.connection import Connection
from replication.disk.face import EXTENTS_MAX, Extent
from replication.errors import DiskError, Elsewhere, Refusal
from replication.node import Node
from replication.options import CONTROL_EXPORT, DIGEST_EXPORT, OWNER_EXPORT, Options
from replication.order.latency import BATCH, FLUSH, READ, WRITE, ZERO
from replication.order.standstill import GONE, NEVER
from replication.passing import Passage, Passer, Passing, Patience
from replication.secondary.disk import ended_face
from replication.server.clients import Client
from replication.side import Face
from replication.stage import Mode

ZERO_MAX = 16 << 20
"""Bytes of zeroes that are made inside the gate at a time: a request may have 4 GiB, all of which has to be copied
before it goes."""


class Export:
    """One export as one client sees it. Every method may be called by several threads at once; they raise DiskError."""

    def __init__(self, node: Node, name: str, token: str | None = None, of_guest: bool = True) -> None:
        """`token`: what a primary's connection has been given. `of_guest`: whether it is a guest's, not a primary's."""
        self._node = node
        self._gate = node.gate
        self._faces = node.faces
        self._name = name
        self._token = token
        self._still = node.admission.still if of_guest else NEVER
        self.gone: Callable[[], bool] = _unknown
        """Whether the client has, of which nbdkit does not know yet."""
        face = node.faces[name]
        self.size = face.size()
        self.description = face.description
        latency = node.gate.latency
        account = latency.guests if of_guest else latency.primarys
        self._reads, self._writes = account.tally(name, READ), account.tally(name, WRITE)
        self._zeroes, self._flushes = account.tally(name, ZERO), account.tally(name, FLUSH)
        self._batches = account.tally(name, BATCH)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from `offset`."""
        course = self._gate.enter(self._reads)
        try:
            if self._still.reads_on:
                self._stand(reads=True)
            self._faces[self._name].read(buffer, offset)
            if self._still.leased:
                self._stand(reads=True)
        finally:
            self._gate.leave(course)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Write the data at `offset`."""
        course = self._gate.enter(self._writes)
        try:
            if self._still.on:
                self._stand()
            self._node.side.admit(self._name, self._token)
            self._faces[self._name].write(data, offset, fua)
            if self._still.on:
                self._stand()
        finally:
            self._gate.leave(course)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        """Make a range read as zeroes: a long one in steps, between which a command finds the gate empty."""
        course = self._gate.enter(self._zeroes)
        try:
            at, stop = offset, offset + length
            stable = fua and length > ZERO_MAX
            while at < stop:
                if at != offset:
                    self._gate.give_way()
                if self._still.on:
                    self._stand()
                end = min(stop, (at // ZERO_MAX + 1) * ZERO_MAX)
                self._node.side.admit(self._name, self._token)
                self._faces[self._name].zero(at, end - at, may_trim, fua and not stable)
                at = end
            if stable:
                self._gate.give_way()
                if self._still.on:
                    self._stand()
                self._faces[self._name].flush()  # once, which covers all steps
            if self._still.on:
                self._stand()
        finally:
            self._gate.leave(course)

    def flush(self) -> None:
        """Make stable what was answered."""
        course = self._gate.enter(self._flushes)
        try:
            if self._still.on:
                self._stand()
            self._faces[self._name].flush()
            if self._still.on:
                self._stand()
        finally:
            self._gate.leave(course)

    def extents(self, offset: int, length: int, one: bool = False) -> list[Extent]:
        """Extents from `offset` on; `one`: the first, for a client that asks for no more (NBD_CMD_FLAG_REQ_ONE)."""
        with self._gate:
            if self._still.reads_on:
                self._stand(reads=True)
            found = self._faces[self._name].extents(offset, length, 1 if one else EXTENTS_MAX)
            if self._still.leased:
                self._stand(reads=True)
        return within(found, offset, length)

    def _stand(self, reads: bool = False) -> None:
        """Inside the gate, of a guest that stands still: wait outside until it goes on. DiskError."""
        still, latency = self._still, self._node.gate.latency
        era = still.era  # in here it is that of what is behind the export
        while still.stands(reads):
            self._gate.wait_outside(lambda: still.stand(latency, era, reads, self._has_gone))

    def _has_gone(self) -> bool:
        """Whether the client has. What it had sent before, and nbdkit reads only now, is not done either."""
        gone = self.gone()
        if gone:
            self._still = GONE
        return gone

    def close(self) -> None:
        """The client has gone."""


class FollowingExport(Export):
    """A guest's export with follow-owner=true: what another node owns is passed on to that (passing.py)."""

    def __init__(self, node: Node, name: str, passing: Passing) -> None:
        super().__init__(node, name)
        # What is passed on the owner does only in the size that it has itself.
        self.size = min(self.size, node.side.size_of_owner(name) or self.size)
        self._passing = passing
        self._over: str | None = None
        passing.attend(self)

    def read(self, buffer: memoryview, offset: int) -> None:
        try:
            super().read(buffer, offset)
        except Elsewhere:
            self._pass_on(
                lambda: Export.read(self, buffer, offset),
                lambda passer, connection: passer.read(connection, buffer, offset),
            )

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        try:
            super().write(data, offset, fua)
        except Elsewhere:
            self._pass_on(
                lambda: Export.write(self, data, offset, fua),
                lambda passer, connection: passer.write(connection, data, offset, fua),
            )

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        try:
            super().zero(offset, length, may_trim, fua)
        except Elsewhere:
            self._pass_on(
                lambda: Export.zero(self, offset, length, may_trim, fua),
                lambda passer, connection: passer.zero(connection, offset, length, may_trim, fua),
            )

    def flush(self) -> None:
        try:
            super().flush()
        except Elsewhere:
            self._pass_on(lambda: Export.flush(self), lambda passer, connection: passer.flush(connection))

    def extents(self, offset: int, length: int, one: bool = False) -> list[Extent]:
        found: list[Extent] = []
        try:
            return super().extents(offset, length, one)
        except Elsewhere:
            self._pass_on(
                lambda: found.extend(Export.extents(self, offset, length, one)),
                lambda passer, connection: found.extend(
                    passer.extents(connection, offset, length, 1 if one else EXTENTS_MAX)
                ),
            )
        return within(found, offset, length)

    def _pass_on(self, here: Callable[[], None], there: Callable[[Passer, Connection], None]) -> None:
        """Have the owner do a request, or do it here as soon as this node owns the disk. DiskError."""
        patience = Patience()
        while not self._passing.run(self._name, there, patience, self._has_gone):
            try:
                here()
            except Elsewhere:
                continue
            return
        if self._over is not None:  # meanwhile: what the owner has done is lost
            raise DiskError(self._over)

    def end(self, why: str) -> None:
        """The disk is not the one any more that this guest has used: its requests fail from now on. The gate is
        closed."""
        self._over = f"the guest has to be started anew: {why}"
        self._faces = {self._name: ended_face(self.size, self._over)}

    def close(self) -> None:
        self._passing.forget(self)


class PassedExport(Export):
    """A disk of this owner, for what its secondary passes on of a guest there. Whether that is this node's secondary,
    and whether this one owns the disk, is asked for each request, inside the gate."""

    def __init__(self, node: Node, name: str, session: tuple[str, str], passage: Passage) -> None:
        """`session`: what is asked in it, and the name that the disk has in the pair."""
        super().__init__(node, name)
        self._session = session
        self._passage = passage
        self.description = node.side.answer_to(session[0])
        face = node.faces[name]
        self._faces = {
            name: Face(
                face.description,
                face.size,
                lambda buffer, offset: self._do(lambda own: own.read(buffer, offset)),
                lambda data, offset, fua: self._do(lambda own: own.write(data, offset, fua)),
                lambda offset, length, may_trim, fua: self._do(lambda own: own.zero(offset, length, may_trim, fua)),
                lambda: self._do(lambda own: own.flush()),
                self._extents_of_owner,
            )
        }

    def read(self, buffer: memoryview, offset: int) -> None:
        with self._as_owner():
            super().read(buffer, offset)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        with self._as_owner():
            super().write(data, offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        with self._as_owner():
            super().zero(offset, length, may_trim, fua)

    def flush(self) -> None:
        with self._as_owner():
            super().flush()

    def extents(self, offset: int, length: int, one: bool = False) -> list[Extent]:
        with self._as_owner():
            return super().extents(offset, length, one)

    @contextmanager
    def _as_owner(self) -> Iterator[None]:
        """What fails when this node is that no more is nobody's failure: it was turned away, say, because the role has
        changed. Whoever owns the disk by now does it (again)."""
        try:
            yield
        except DiskError as error:
            asked, disk = self._session
            if error.errno != errno.ESHUTDOWN and self._node.side.owned_by(asked, disk) is None:
                raise DiskError(f"this node does not own the disk any more: {error}", errno.ESHUTDOWN) from error
            raise

    def _extents_of_owner(self, offset: int, length: int, count: int) -> list[Extent]:
        found: list[Extent] = []
        self._do(lambda own: found.extend(own.extents(offset, length, count)))
        return found

    def _do(self, request: Callable[[Face], None]) -> None:
        """DiskError with ESHUTDOWN when nothing was done, because it is not for this node to do."""
        self._passage.begin(self)
        try:
            asked, disk = self._session
            if self._node.side.owned_by(asked, disk) != self._name:
                raise DiskError(
                    f"disk '{disk}' is not this node's, or not for that secondary any more", errno.ESHUTDOWN
                )
            request(self._node.faces[self._name])
        finally:
            self._passage.end(self)


class RehearsalExport(Export):
    """The face of a test, which is not the node's: it does not pass the gate, so nothing waits for its requests, and it
    is no other one's when the name is given to another test."""

    def __init__(self, face: Face) -> None:
        self._face = face
        self.size = face.size()
        self.description = face.description

    def read(self, buffer: memoryview, offset: int) -> None:
        self._face.read(buffer, offset)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        self._face.write(data, offset, fua)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        self._face.zero(offset, length, may_trim, fua)

    def flush(self) -> None:
        self._face.flush()

    def extents(self, offset: int, length: int, one: bool = False) -> list[Extent]:
        return within(self._face.extents(offset, length, 1 if one else EXTENTS_MAX), offset, length)


def _unknown() -> bool:
    """It is taken for there."""
    return False


def within(extents: list[Extent], offset: int, length: int) -> list[Extent]:
    """What the extents say of a request's range. A longer answer would be allowed, but nbdkit up to 1.42.2 ends at an
    extent of 4 GiB (CVE-2025-47711), and a request is always shorter."""
    end = offset + length
    if extents and extents[0].offset == offset and extents[-1].offset + extents[-1].length <= end:
        return extents
    found = []
    for extent in extents:
        begin = max(extent.offset, offset)
        stop = min(extent.offset + extent.length, end)
        if begin < stop:
            found.append(Extent(begin, stop - begin, extent.zero, extent.hole))
    return found


class DataExport(Export):
    """The target face for a primary: larger than the disk by the room for batches (batch.py)."""

    def __init__(self, node: Node, name: str, token: str) -> None:
        super().__init__(node, name, token, of_guest=False)
        # What is behind a disk, a primary finds by the size that it has itself.
        self._disk_size = min(self.size, node.side.size_named(name, token) or self.size)
        self.size = self._disk_size + SPACE

    def read(self, buffer: memoryview, offset: int) -> None:
        self._check(offset, len(buffer))
        super().read(buffer, offset)

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        if offset != self._disk_size:
            self._check(offset, len(data))
            super().write(data, offset, fua)
            return
        if fua:
            raise DiskError("a batch of writes cannot be forced to stable storage: flush", errno.EINVAL)
        writes = unpack(data, self._disk_size)
        course = self._gate.enter(self._batches)
        try:
            self._node.side.admit(self._name, self._token)
            self._gate.count(len(writes) - 1)
            self._faces[self._name].write_batch(writes)
        finally:
            self._gate.leave(course)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool) -> None:
        self._check(offset, length)
        super().zero(offset, length, may_trim, fua)

    def extents(self, offset: int, length: int, one: bool = False) -> list[Extent]:
        self._check(offset, length)
        return super().extents(offset, length, one)

    def _check(self, offset: int, length: int) -> None:
        if offset + length > self._disk_size:
            raise DiskError(f"{length} bytes at {offset} are behind the disk's end", errno.EINVAL)


class DigestExport(DataExport):
    """The same, and digests of the disk behind the room for batches (digests.py)."""

    def __init__(self, node: Node, name: str, token: str) -> None:
        super().__init__(node, name, token)
        self.size += digests.SPACE

    def read(self, buffer: memoryview, offset: int) -> None:
        if offset < self._disk_size + SPACE:
            super().read(buffer, offset)
            return
        asked = what_is_asked(self._disk_size, offset, len(buffer))
        for place in range(0, len(buffer), DIGEST_BYTES):
            at = asked.offset + place // DIGEST_BYTES * asked.unit
            length = min(asked.unit, asked.offset + asked.length - at)
            # Each for itself: between two of them a command finds the gate empty.
            with self._gate:
                # As for a write: a connection that was replaced is at no place of the stream.
                self._node.side.admit(self._name, self._token)
                buffer[place : place + DIGEST_BYTES] = self._faces[self._name].digest(at, length)


class Exports:
    """The exports of a node, by name."""

    def __init__(self, node: Node, control: Callable[[], ControlExport], options: Options) -> None:
        """`control()` makes the export over which a primary talks to this node. The options say who may open what."""
        self._node = node
        self._options = options
        self._control = control
        # By name, not by what is behind it at the moment: during a change of role that is nothing, and the client that
        # gets in then has the guest's disk afterwards.
        secondary = options.mode is Mode.SECONDARY
        self._of_guests = frozenset(disk.top_id if secondary else disk.name for disk in options.disks)
        self._passages = {disk.name: Passage() for disk in options.disks}

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of all exports."""
        return [
            (name, face.description) for name, face in [*self._node.faces.items(), *self._node.side.tests().items()]
        ]

    def default(self) -> str:
        """What the empty export name stands for: the first disk of a primary; nothing on a secondary, where a
        mistaken primary must not write into the guest face."""
        return self._node.side.default

    def open(self, name: str, client: Client, gone: Callable[[], bool] = _unknown) -> Export | ControlExport:
        """An export by name; Refusal names the valid ones, or says that it is not for this client; DiskError. `gone()`:
        whether the client has."""
        if name == CONTROL_EXPORT and self._node.side.mode is Mode.SECONDARY:
            self._check_identity("primary-identity", self._options.primary_identity, name, client)
            return self._control()
        if name.startswith(f"{OWNER_EXPORT}:"):
            return self._passed(name, client, gone)
        wanted, token = self._node.side.face_of(name or self.default())
        if wanted not in self._node.faces:
            test = self._node.side.tests().get(wanted)
            if test is not None:
                self._check_guest(wanted, client)
                return RehearsalExport(test)
            valid = ", ".join(f"'{known}'" for known, _ in self.names())
            raise Refusal(f"there is no export '{name[:255]}': the exports are {valid}")
        if wanted in self._of_guests:
            closed = self._node.admission.closed
            if closed is not None:
                raise Refusal(f"'{wanted}' is closed: {closed}", errno.EPERM)
            self._check_guest(wanted, client)
        else:
            self._check_identity("primary-identity", self._options.primary_identity, wanted, client)
        if token is None:
            passing = self._node.passing if wanted in self._of_guests else None
            if passing is not None:
                return self._following(wanted, passing, client, gone)
            export = Export(self._node, wanted, of_guest=wanted in self._of_guests)
            export.gone = gone
            return export
        kind = DigestExport if name.startswith(f"{DIGEST_EXPORT}:") else DataExport
        return kind(self._node, wanted, token)

    def _following(self, name: str, passing: Passing, client: Client, gone: Callable[[], bool]) -> Export:
        """For a guest that has used no other disk than this one. Refusal, DiskError."""
        guests, credentials = self._node.guests, client.credentials
        guest = guests.note(None if credentials is None else credentials.pid)
        export = FollowingExport(self._node, name, passing)
        export.gone = gone
        try:
            guests.check(guest)  # again: from here on it learns by itself that its disk has become another one
        except BaseException:
            export.close()
            raise
        return export

    def _passed(self, name: str, client: Client, gone: Callable[[], bool]) -> Export:
        """What the secondary of this owner opens, for a guest there. Refusal, DiskError."""
        self._check_identity("primary-identity", self._options.primary_identity, OWNER_EXPORT, client)
        asked, _, disk = name[len(OWNER_EXPORT) + 1 :].partition(":")
        export = self._node.side.owned_by(asked, disk) if self._options.follow_owner else None
        if export is None or disk not in self._passages:
            raise Refusal("there is nothing to pass on: this node is not the owner that is meant", errno.EPERM)
        passed = PassedExport(self._node, export, (asked, disk), self._passages[disk])
        passed.gone = gone
        self._passages[disk].take_over(passed)
        return passed

    def _check_guest(self, export: str, client: Client) -> None:
        """DiskError unless the client may have what is a guest's."""
        if self._options.guests_local and not client.local:
            raise Refusal(
                f"guest-access=local: '{export}' is for clients on this host, and {client.name} is not", errno.EPERM
            )
        self._check_identity("guest-identity", self._options.guest_identity, export, client)

    @staticmethod
    def _check_identity(key: str, wanted: str | None, export: str, client: Client) -> None:
        """DiskError unless the client has shown the certificate that the key names, if it names one. Wherever the
        client is: a user of this host is not yet the primary, or the guest."""
        if wanted is None or client.tls_dn == wanted:
            return
        shown = f"has shown the certificate of '{client.tls_dn}'" if client.tls_dn else "has shown no certificate"
        raise DiskError(f"{key}: '{export}' is for '{wanted}', and {client.name} {shown}", errno.EPERM)
