# SPDX-License-Identifier: BSD-3-Clause
"""A pair on two hosts with a network between them, and a guest that knows what its disk must hold.

Load  --Unix socket-->  NetPrimary, host a  --TCP, through the relay of wire.py-->  NetSecondary, host b

NetPair     both nodes, their disks in memory, the network, and what is asked of them after a fault
 +- Load    one request after the other, each in a log: the disk after any number of them is known
 +- Watch   the primary's events in the order in which they came
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import nbd
import numpy as np
import numpy.typing as npt

from content import KIB, MIB
from lab import Lab
from namespaces import Host
from nodes import Primary, Secondary, Server, disk_name, drained, top_id
from waiting import DEADLINE_S, wait_until
from wire import Wire

PORT = 10809

SECTOR = 512
GRAIN = 64 * KIB
"""What a change map counts."""

SIZE = 64 * MIB

QUEUED_S = 0.25
"""What was begun so soon after a fault was decided on may still have got through: a busy machine."""

Stamps = npt.NDArray[np.uint64]
"""For every sector the number of the request that wrote it last, 0 for zeroes."""


class NetPrimary(Primary):
    """A primary on a host; its guest comes over the Unix socket, which has no network."""

    def __init__(self, folder: Path, host: Host, secondary: str, sizes: Sequence[int], **options: Any) -> None:
        super().__init__(folder, secondary, sizes, **options)
        self.host = host

    def command(self) -> list[str]:
        return [*self.host.prefix, *super().command()]


class OnHost(Server):
    """nbdkit on a host, which listens on TCP only."""

    host: Host

    def command(self) -> list[str]:
        command = super().command()
        at = command.index("-U")
        command[at : at + 2] = ["-p", str(PORT)]
        return [*self.host.prefix, *command]

    def wait_ready(self) -> None:
        wait_until(self._greets, f"{self.name} accepts NBD connections; it said: {self.stderr()}")

    def _greets(self) -> bool:
        self.check_alive()
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        try:
            with self.host.entered():
                handle.connect_uri(self.uri())
        except nbd.Error:
            return False
        handle.opt_abort()
        return True

    def uri(self, export: str = "") -> str:
        return f"nbd://{self.host.address}:{PORT}/{export}"

    def connect(self, export: str = "", *, strict: bool = True) -> nbd.NBD:
        """A handle of a client on the server's own host, which the network between the hosts does not concern."""
        with self.host.entered():
            return super().connect(export, strict=strict)


class NetSecondary(OnHost, Secondary):
    """A secondary on a host, which listens on TCP only."""

    def __init__(self, folder: Path, host: Host, sizes: Sequence[int], **options: Any) -> None:
        super().__init__(folder, sizes, **options)
        self.host = host


# --- the guest ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """One request of the guest; `begun` is by time.monotonic()."""

    offset: int
    length: int
    zero: bool
    begun: float


_HIDDEN_MAX = 4
"""The last requests of which nothing can be seen: each zeroes its sectors, or is zeroed wholly by one after it."""


class Load:
    """A guest that writes, one request after the other, at most `rate` bytes a second.

    Request number n fills its sectors with n (or, one in twenty, zeroes them), so a disk tells which requests it has,
    and since they came one by one there is one right content after each.
    """

    def __init__(self, primary: NetPrimary, size: int, rate: float, length_max: int = 64 * KIB, seed: int = 1) -> None:
        self.log: list[Sent] = []
        """All requests issued; number n is at n - 1."""
        self.answered = 0
        """Requests answered: all but perhaps the last of `log`."""
        self.region = (0, size)
        """Where it writes, in bytes: whole sectors."""
        self.outages_allowed = False
        """Whether the primary may go: then the guest connects again, and repeats what was not answered."""
        self.waits: list[tuple[float, float]] = []
        """When a request began and how many seconds it took, of those that took more than a tenth of one."""
        self._primary = primary
        self._size = size
        self._rate = rate
        self._length_max = length_max
        self._random = Random(seed)
        self._ending = threading.Event()
        self._going = threading.Event()
        self._resting = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="guest", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._going.set()
        self._thread.start()

    def stop(self) -> None:
        """End; raises what the guest has met, unless the primary's outage explains it."""
        self.end()
        assert not self._thread.is_alive(), "a request of the guest has not ended"
        if self._failure is not None:
            raise AssertionError(f"the guest has met {self._failure}") from self._failure

    def end(self) -> None:
        """End, and raise nothing."""
        self._ending.set()
        self._going.set()
        if self._thread.is_alive():
            self._thread.join(DEADLINE_S)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Inside, no request is under way."""
        self._going.clear()
        assert self._resting.wait(DEADLINE_S), "a request of the guest has not ended"
        try:
            yield
        finally:
            self._resting.clear()
            self._going.set()

    def wait_more(self, count: int = 20) -> None:
        """Wait until so many more requests were answered."""
        target = self.answered + count
        wait_until(lambda: self.answered >= target or self._failure, "the guest goes on")
        if self._failure is not None:
            self.stop()

    @property
    def longest_s(self) -> float:
        """The longest request's time."""
        return max((took for _, took in self.waits), default=0.0)

    # -- what the disk must hold ---------------------------------------------------------------------------

    def after(self, count: int) -> Stamps:
        """The disk after so many requests."""
        stamps = np.zeros(self._size // SECTOR, np.uint64)
        for number, sent in enumerate(self.log[:count], 1):
            at = sent.offset // SECTOR
            stamps[at : at + sent.length // SECTOR] = 0 if sent.zero else number
        return stamps

    def prefix(self, stamps: Stamps) -> range:
        """Those numbers of requests after which the disk is exactly `stamps`; AssertionError if there are none."""
        newest = int(stamps.max(initial=0))
        last = min(newest + _HIDDEN_MAX, len(self.log))
        found = [count for count in range(newest, last + 1) if self._is_after(stamps, count)]
        if not found:
            differing = np.flatnonzero(stamps != self.after(newest))
            raise AssertionError(
                f"the newest request there is {newest}, but {len(differing)} sectors are not as after it"
            )
        return range(found[0], found[-1] + 1)

    def _is_after(self, stamps: Stamps, count: int) -> bool:
        return bool(np.array_equal(stamps, self.after(count)))

    def grain_bytes(self, since: float, until: float = float("inf")) -> int:
        """Bytes of all grains that requests begun in that time touch."""
        grains: set[int] = set()
        for sent in self._between(since, until):
            grains.update(range(sent.offset // GRAIN, (sent.offset + sent.length - 1) // GRAIN + 1))
        return len(grains) * GRAIN

    def written_bytes(self, since: float, until: float = float("inf")) -> int:
        """Bytes of requests begun in that time."""
        return sum(sent.length for sent in self._between(since, until))

    def _between(self, since: float, until: float) -> list[Sent]:
        return [sent for sent in self.log if since <= sent.begun < until]

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        due = time.monotonic()
        handle: nbd.NBD | None = None
        try:
            while not self._ending.is_set():
                if not self._going.is_set():
                    self._resting.set()
                    self._going.wait(DEADLINE_S)
                    continue
                self._ending.wait(max(0.0, due - time.monotonic()))
                sent = self._next()
                # What a guest could not write for a while it does not make up for.
                due = max(due, time.monotonic() - 0.1) + sent.length / self._rate
                self.log.append(sent)
                handle = self._do(handle, sent)
                self.answered += 1
        except (nbd.Error, AssertionError, OSError) as error:
            self._failure = error
        finally:
            self._resting.set()

    def _next(self) -> Sent:
        first, last = (edge // SECTOR for edge in self.region)
        length = self._random.randint(1, min(self._length_max // SECTOR, last - first))
        at = self._random.randint(first, last - length)
        return Sent(at * SECTOR, length * SECTOR, self._random.random() < 0.05, time.monotonic())

    def _do(self, handle: nbd.NBD | None, sent: Sent) -> nbd.NBD:
        """One request, over a new connection if there is none; the connection that it has used in the end."""
        data = len(self.log).to_bytes(8, "big") * (sent.length // 8)
        deadline = time.monotonic() + DEADLINE_S
        while True:
            begun = time.monotonic()
            try:
                if handle is None:
                    handle = nbd.NBD()
                    handle.connect_uri(self._primary.uri(disk_name(0)))
                    begun = time.monotonic()
                if sent.zero:
                    handle.zero(sent.length, sent.offset)
                else:
                    handle.pwrite(data, sent.offset)
            except nbd.Error:
                if not self.outages_allowed or begun > deadline or (handle is not None and handle.aio_is_ready()):
                    raise
                handle = None
                self._ending.wait(0.01)
                continue
            took = time.monotonic() - begun
            if took > 0.1:
                self.waits.append((begun, took))
            return handle


def stamps_in(content: bytes | np.memmap[Any, Any]) -> Stamps:
    """What the sectors hold; AssertionError if one is not wholly of one request."""
    words = np.frombuffer(content, ">u8").reshape(-1, SECTOR // 8)
    torn = np.flatnonzero((words != words[:, :1]).any(axis=1))
    assert not len(torn), f"{len(torn)} sectors are of more than one request, the first is number {torn[0]}"
    return words[:, 0].astype(np.uint64)


# --- the events -----------------------------------------------------------------------------------------------------


class Watch:
    """A QMP client of the primary that keeps what the events said of the link."""

    def __init__(self, primary: NetPrimary) -> None:
        self.links: list[str] = []
        """States of REPLICATION_LINK."""
        self.cases: list[int] = []
        """Cases of REPLICATION_ERROR."""
        self.checkpoints = 0
        self._qmp = primary.qmp()

    def look(self) -> dict[str, Any]:
        """Take in the events up to now, and return the status."""
        status: dict[str, Any] = self._qmp.execute("query-replication")
        events, self._qmp.events = self._qmp.events, []
        for event in events:
            if event["event"] == "REPLICATION_LINK":
                self.links.append(event["data"]["state"])
            elif event["event"] == "REPLICATION_ERROR":
                self.cases.append(event["data"]["case"])
            self.checkpoints += event["event"] == "REPLICATION_CHECKPOINT"
        return status

    def wait_lost(self, timeout_s: float = DEADLINE_S) -> None:
        """Wait until the link was lost, once more than events have told."""
        before = self.links.count("lost")
        wait_until(lambda: self.look() and self.links.count("lost") > before, "the link is lost", timeout_s)

    def wait_state(self, state: str) -> dict[str, Any]:
        """Wait until the link is in this state; the status then."""

        def reached() -> dict[str, Any] | None:
            status = self.look()
            return status if status["link"]["state"] == state else None

        found: dict[str, Any] = wait_until(reached, f"the link is {state}; its states were {self.links}")
        return found

    def close(self) -> None:
        """Hang up."""
        self._qmp.close()


# --- the pair -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instant:
    """Where a pair stood when a fault began."""

    at: float
    since: float
    """When everything written up to then had arrived."""
    forwarded: int
    """Bytes that the primary has counted."""
    carried: int
    """Bytes of TCP data that the network has carried to the secondary, including what was sent again."""


class NetPair:
    """A running pair under load. Everything that it writes is in memory, so that no disk makes it wait."""

    def __init__(
        self,
        lab: Lab,
        wire: Wire,
        *,
        timeout_s: float = 2.0,
        rate: float = 4 * MIB,
        length_max: int = 64 * KIB,
        size: int = SIZE,
        primary_arguments: Sequence[str] = (),
        secondary_options: Mapping[str, Any] | None = None,
    ) -> None:
        """PermissionError if that is not allowed."""
        self.lab = lab
        self.wire = wire
        self.timeout_s = timeout_s
        self.folder = lab.small_folder(4 * size + 64 * MIB).folder
        self.secondary = lab.add(NetSecondary(self.folder, wire.b, [size], **(secondary_options or {})))
        # What the link does is looked at beneath a guest that writes, also after a failover.
        arguments = [f"timeout={timeout_s:g}", "on-outdated=continue", *primary_arguments]
        self.primary = lab.add(NetPrimary(self.folder, wire.a, self.secondary.uri(), [size], extra_arguments=arguments))
        self.load = Load(self.primary, size, rate, length_max)
        self.watch: Any = None
        self.least = self.most = 0
        """How many requests the last checkpoint that `checkpoint` took has: between these."""

    def start(self) -> None:
        """Start all, until the pair is in sync under load and has a checkpoint."""
        self.secondary.start()
        self.primary.start()
        self.secondary.start_replication()
        self.primary.start_replication()
        self.watch = Watch(self.primary)
        self.watch.wait_state("in-sync")
        self.watch.look()
        self.load.start()
        self.load.wait_more()
        self.checkpoint()
        self.load.wait_more()
        self.watch.look()
        self.watch.links.clear()

    def reconnect(self) -> None:
        """Listen to a primary that was started again."""
        self.watch.close()
        self.watch = Watch(self.primary)

    def close(self) -> None:
        """End the guest, whatever it has met; the nodes are the lab's."""
        self.load.end()
        if self.watch is not None:
            self.watch.close()

    def checkpoint(self) -> None:
        """Take one under load."""
        self.least = self.load.answered
        self.primary.checkpoint()
        self.most = len(self.load.log)

    def instant(self, since: float) -> Instant:
        """Now, before a fault."""
        at = time.monotonic()
        return Instant(at, since, self.forwarded(), self._carried())

    def forwarded(self) -> int:
        """Bytes that the primary has counted."""
        (disk,) = self.primary.status()["disks"]
        return int(disk["totals"]["forwarded"])

    def _carried(self) -> int:
        return self.wire.counters()["ab"].payload

    # -- what must hold afterwards -------------------------------------------------------------------------

    def check_little_was_sent(self, fault: Instant, mended: float, forwarded: int = -1) -> tuple[int, int]:
        """What was sent for the resync after the fault is at most 1.2 times the grains changed meanwhile, by the
        primary's count and by the network's. Returns the primary's count and the grains' bytes.

        To be called with the guest paused. `forwarded`: the primary's count before, if not as at the fault.
        """
        drained(self.primary)
        sent = self.forwarded() - (fault.forwarded if forwarded < 0 else forwarded)
        guest = self.load.written_bytes(mended) + self.load.written_bytes(fault.at, fault.at + QUEUED_S)
        changed = self.load.grain_bytes(fault.since)
        assert sent <= 1.2 * changed + guest, f"{sent} bytes were sent, {changed} changed, and {guest} were new"
        carried = self._carried() - fault.carried
        assert carried <= 1.2 * changed + guest, f"{carried} bytes went there, {changed} changed, {guest} were new"
        return sent, changed

    def finish(self) -> None:
        """End the load; both disks are as the log says, no error is left after a checkpoint, which the secondary's
        guest sees."""
        self.load.stop()
        assert self.load.answered == len(self.load.log) > 0
        drained(self.primary)
        wanted = self.load.after(self.load.answered)
        (ours,), (theirs,) = self.primary.disks, self.secondary.disks
        assert np.array_equal(stamps_in(ours.read_bytes()), wanted), "the primary's disk"
        assert np.array_equal(stamps_in(theirs.read_bytes()), wanted), "the secondary's disk"
        self.primary.checkpoint()
        assert self.primary.execute("replication-get-error") == {}
        assert self.secondary.execute("replication-get-error") == {}
        assert self.secondary.status()["consistent"] is True
        assert np.array_equal(self.guest_sees(), wanted), "the guest face"

    def guest_sees(self) -> Stamps:
        """What the secondary's guest reads."""
        handle = self.secondary.connect(top_id(0))
        size = handle.get_size()
        parts = [handle.pread(min(16 * MIB, size - at), at) for at in range(0, size, 16 * MIB)]
        handle.shutdown()
        return stamps_in(b"".join(bytes(part) for part in parts))

    def check_guest_sees_checkpoint(self) -> None:
        """The secondary's guest sees exactly the last checkpoint, one that `checkpoint` took."""
        self._check_prefix(self.guest_sees())

    def _check_prefix(self, stamps: Stamps) -> None:
        found = self.load.prefix(stamps)
        assert found[-1] >= self.least, f"as after {found[0]} requests, but {self.least} were in the checkpoint"
        assert found[0] <= self.most, f"as after {found[0]} requests, but only {self.most} may be in the checkpoint"

    def fail_over(self) -> Stamps:
        """The disk is exactly the last checkpoint then, one that `checkpoint` took, and so is what the guest sees
        before (if it has read no more than one epoch) and after; that."""
        epoch = self.secondary.status()["epoch"]
        seen = self.guest_sees()
        self.secondary.failover()
        stamps = stamps_in(self.secondary.disks[0].read_bytes())
        self._check_prefix(stamps)
        if self.secondary.status()["epoch"] == epoch:
            assert np.array_equal(stamps, seen), "the disk is not what the guest saw before"
        assert np.array_equal(stamps, self.guest_sees())
        return stamps

    def check_waits(self, most_s: float) -> None:
        """No request of the guest took longer."""
        assert self.load.longest_s <= most_s, f"the guest has waited: {self.load.waits}"
