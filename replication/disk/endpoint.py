# SPDX-License-Identifier: BSD-3-Clause
"""A disk behind an NBD URI: qemu-nbd serving a qcow2 file, RBD, another nbdkit.

Invariants
* One connection, many requests in flight: no server is asked for more than one connection, because qemu-nbd
  serves one by default and a flush on one need not cover another.
* A lost connection fails the requests in flight. Later requests connect anew, at most once in RETRY_S seconds.
  What was written and not flushed when the connection went counts as lost from then on, because the server may have
  died (unflushed.py): whoever keeps account of it learns that before another request is answered, and the next flush
  fails once if nobody else has told the guest (as fsync(2) reports a lost page once).
* A change that was given up is waited for (fence.py): until its connection has answered it or has ended, every change
  that overlaps it is refused, so that it cannot land on top of a newer one. The rest of the disk goes on over a fresh
  connection; with FENCES_MAX such connections there is no further one.
* A server with a minimum block size gets only aligned requests; edges are read, changed and written back under a
  range lock that every write takes.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Sequence
from functools import partial

import nbd

from replication.disk import requests
from replication.disk.connection import CHUNK, Connection, Issue
from replication.disk.face import EXTENTS_MAX, ZEROES, Disk, Extent
from replication.disk.fence import Fence
from replication.disk.files import Buffer
from replication.disk.unflushed import Unflushed
from replication.errors import ConfigError, DiskError
from replication.order.rangelock import RangeLock
from replication.tls import Tls

CONNECT_S = 5.0
"""Longest time to connect: shorter than a request's, because a guest waits for it."""

TIMEOUT_S = 30.0
"""Longest time without progress before a request fails, as the kernel gives a SCSI disk."""

RETRY_S = 1.0
FENCES_MAX = 4
"""Connections at most that were given up and may still change something."""
_ZERO_CHUNK = 1 << 30
_GATHER_MAX = 256 << 10


class NbdDisk(Disk):
    """A disk served by an NBD server, opened for writing."""

    def __init__(self, name: str, uri: str, tls: Tls | None = None) -> None:
        """Connect, with `tls` over an nbds: URI; ConfigError when the server does not answer, refuses, or serves it
        read-only."""
        try:
            connection = Connection(uri, None, CONNECT_S, tls)
        except DiskError as error:
            raise ConfigError(f"disk '{name}': {error}") from error
        if connection.read_only:
            connection.close()
            raise ConfigError(f"disk '{name}': {uri} is served read-only")
        super().__init__(name, uri, connection.size)
        self._tls = tls
        # Of the first connection: another process finds out that it was grown since.
        self._room = connection.size
        self._block_size = connection.block_size
        connection.timeout_s = TIMEOUT_S
        connection.fenced = True
        # Former connections. Replaced, under the lock, before a fresh connection can be used.
        self._fences: tuple[Fence, ...] = ()
        # Protects the three fields below it, and the one above; held while connecting, by intent: the others wait for
        # the same server.
        self._lock = threading.Lock()
        self._connection: Connection | None = connection
        self._retry_at = 0.0
        # The connection whose end has been told, until there is another one.
        self._lost: Connection | None = None
        self._account = Unflushed(connection.size)
        self._edges = RangeLock()

    def watch(self, unflushed: Unflushed) -> None:
        super().watch(unflushed)
        self._account = unflushed

    def room(self) -> int:
        return self._room

    @property
    def outlives(self) -> bool:
        return False  # its server may have been started anew before the next process comes

    # -- Disk ----------------------------------------------------------------------------------------------

    def read(self, buffer: memoryview, offset: int) -> None:
        head, tail = self._slack(offset, len(buffer))
        if head or tail:
            whole = memoryview(bytearray(head + len(buffer) + tail))
            self.read(whole, offset - head)
            buffer[:] = whole[head : head + len(buffer)]
            return
        for start in range(0, len(buffer), CHUNK):
            part = buffer[start : start + CHUNK] if len(buffer) > CHUNK else buffer
            self._run(partial(requests.pread, part, offset + start), 0, len(part))

    def write(self, pieces: Sequence[Buffer], offset: int, fua: bool = False) -> None:
        length = sum(map(len, pieces))
        if self._block_size > 1:
            self._write_blocks(pieces, offset, length, fua)
            return
        if len(pieces) > 1 and length <= _GATHER_MAX:
            pieces = [b"".join(pieces)]
        for piece in pieces:
            self._write_aligned(memoryview(piece), offset, fua)
            offset += len(piece)

    def zero(self, offset: int, length: int, may_trim: bool, fua: bool = False) -> None:
        head, tail = self._slack(offset, length)
        connection = self._connected()
        if head or tail or not connection.can_zero:
            for start in range(offset, offset + length, len(ZEROES)):
                self.write([ZEROES[: min(len(ZEROES), offset + length - start)]], start, fua)
            return
        flags = 0 if may_trim else nbd.CMD_FLAG_NO_HOLE
        number = self._account.begin(offset, length)
        try:
            for start in range(offset, offset + length, _ZERO_CHUNK):
                count = min(_ZERO_CHUNK, offset + length - start)
                self._run(partial(requests.zero, count, start, flags), change=(start, count))
        finally:
            self._account.end(number)
        if fua:
            self.flush()

    def flush(self) -> None:
        self._account.flush(self._flush)

    def _flush(self) -> None:
        if self._connected().can_flush:
            self._run(requests.flush)

    def look(self) -> None:
        connection = self._connection
        if connection is not None and (connection.dead or connection.hung_up()):
            with contextlib.suppress(DiskError):
                self._connected()

    def await_turn(self) -> None:
        connection, wait_s = self._connection, self._retry_at - time.monotonic()
        if wait_s > 0 and (connection is None or connection.dead):
            time.sleep(min(wait_s, RETRY_S))

    def check_settled(self, offset: int, length: int) -> None:
        self._connected()  # what a lost connection may still do is known before there is another one
        if self._fences:
            self._check_fences(offset, length, f"what is read at {offset} may still change: a write there")

    def extents(self, offset: int, length: int, count: int = EXTENTS_MAX) -> list[Extent]:
        if not self._connected().can_extents or self._slack(offset, length) != (0, 0):
            return [Extent(offset, length, False, False)]
        return requests.extents(offset, length, count, self._run)

    def reachable(self) -> bool:
        # Asked of the server, because an idle connection does not notice that it has gone; twice, because the first
        # request may only find that out and the second connects anew.
        for _ in range(2):
            try:
                self.read(memoryview(bytearray(1)), 0)
            except DiskError:
                continue
            return True
        return False

    def close(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            self._retry_at = float("inf")
        if connection is not None:
            connection.close()

    # -- requests ------------------------------------------------------------------------------------------

    def _run(self, issue: Issue, payload: int = 0, answer: int = 0, change: tuple[int, int] | None = None) -> None:
        connection = self._connected()
        if change is not None and self._fences:
            offset, length = change
            self._check_fences(
                offset, length, f"a change of {length} bytes at {offset} is refused, because a former one there"
            )
        connection.wait(connection.issue(issue, payload, None, answer, change))

    def _check_fences(self, offset: int, length: int, concerned: str) -> None:
        if any(fence.covers(offset, length) for fence in self._fences):
            raise DiskError(
                f"{self.location}: {concerned} was given up, and the server has neither answered it nor closed that "
                "connection",
                errno.EIO,
            )
        with self._lock:
            self._fences = tuple(fence for fence in self._fences if fence.pending)

    def _connected(self) -> Connection:
        connection = self._connection
        if connection is not None and not connection.dead:
            return connection
        with self._lock:
            connection = self._connection
            if connection is not None and not connection.dead:
                return connection
            now = time.monotonic()
            early = now < self._retry_at
            if self._account.any and not (early and connection is self._lost):
                # Before there is another connection: whoever reads over that must not take old data for new. Once also
                # when it is too soon for one: a checkpoint that looks at this moment must not be taken.
                self._lost = connection
                self._account.lose(
                    DiskError(f"{self.location}: the connection was lost with unflushed writes, some may be gone")
                )
            if early:
                raise DiskError(f"{self.location} is not connected", errno.EIO)
            self._retry_at = now + RETRY_S
            if connection is not None and connection.fence is not None and connection.fence not in self._fences:
                self._fences = (*(fence for fence in self._fences if fence.pending), connection.fence)
            if sum(fence.pending for fence in self._fences) >= FENCES_MAX:
                raise DiskError(
                    f"{self.location} has not answered what {FENCES_MAX} former connections sent", errno.EIO
                )
            # The lost connection is not closed here: other threads may still be fetching their errors from it.
            # It goes when the last of them lets go of it.
            fresh = Connection(self.location, None, CONNECT_S, self._tls)
            if fresh.size != self._room or fresh.block_size != self._block_size or fresh.read_only:
                fresh.close()
                raise DiskError(f"{self.location} came back as a different disk")
            fresh.timeout_s = TIMEOUT_S
            fresh.fenced = True
            self._connection, self._lost = fresh, None
            return fresh

    def _write_aligned(self, view: memoryview, offset: int, fua: bool) -> None:
        connection = self._connected()  # before the account: what goes over a new one has not been lost with the old
        if fua and connection.can_fua:
            try:
                self._write_parts(view, offset, nbd.CMD_FLAG_FUA)
            except DiskError as error:
                # A server that makes a flush of it tells it once that it could not.
                self._account.lose(error, told=True)
                raise
            return
        number = self._account.begin(offset, len(view))
        try:
            self._write_parts(view, offset, 0)
        finally:
            self._account.end(number)
        if fua:
            self.flush()

    def _write_parts(self, view: memoryview, offset: int, flags: int) -> None:
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._run(
                partial(requests.pwrite, part, offset + start, flags), len(part), change=(offset + start, len(part))
            )

    def _slack(self, offset: int, length: int) -> tuple[int, int]:
        """Bytes missing before and after a range to whole server blocks; the disk's end counts as an edge."""
        unit = self._block_size
        if unit == 1:
            return 0, 0
        stop = offset + length
        return offset % unit, min(-stop % unit, self._room - stop)

    def _write_blocks(self, pieces: Sequence[Buffer], offset: int, length: int, fua: bool) -> None:
        """Write to a server with a minimum block size. The range lock keeps an aligned write from falling between
        the reading and the writing back of an edge."""
        head, tail = self._slack(offset, length)
        start, stop = offset - head, offset + length + tail
        held = self._edges.acquire(start, stop)
        try:
            whole = memoryview(bytearray(stop - start))
            unit = self._block_size
            if head:
                self.read(whole[:unit], start)
            if tail and (len(whole) > unit or not head):
                last = (len(whole) - 1) // unit * unit
                self.read(whole[last:], start + last)
            whole[head : head + length] = b"".join(pieces)
            self._write_aligned(whole, start, fua)
        finally:
            self._edges.release(held)
