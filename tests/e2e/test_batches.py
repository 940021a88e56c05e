# SPDX-License-Identifier: BSD-3-Clause
"""Many small writes in one request, on a real secondary: what they meet there, who may send them, and who learns what.

Half of the tests are the primary themselves (`Sender`), so that a batch is exactly what the test has packed; the others
have a real pair, whose forwarding thread is held until enough writes wait to go together. What came is read off a log
of the requests (nbdkit's log filter) in front of the secondary.
"""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import nbd
import pytest

from certificates import SecondaryWithTwoDoors, psk_file
from content import KIB, MIB, changed, make_raw, pattern, whole
from lab import Lab
from mounts import SmallFolder
from nodes import Primary, Secondary, Server, drained, nbd_refusal
from pausepoints import PausePoints
from replication.batch import SPACE, pack
from replication.disk.connection import Connection
from replication.options import DATA_EXPORT, DIGEST_EXPORT
from replication.primary.peer import Peer
from replication.record.lineage import Lineage, new_id
from waiting import DEADLINE_S, begin, chance, wait_until

BLOCK = 4 * KIB
GRAIN = 64 * KIB
SIZE = MIB
OLD = pattern(1, SIZE)
"""How long something that ought to wait gets to do the wrong thing: a correct product never fails by it."""

BATCH = [(0, pattern(2, BLOCK)), (5 * BLOCK, pattern(3, 3 * BLOCK)), (20 * BLOCK + 100, pattern(4, 5000))]
"""Whole blocks, neighbours, and two blocks in part."""
NEW = changed(OLD, *BATCH)

ALONE = 8 * BLOCK
"""Where the write is that holds up the others; it changes nothing."""

COPYING = ("copy-before-write.read", "copy-before-write.before-mark", "target-write.preserved")
"""Where a batch is held before it has changed the disk."""


class Sender:
    """A primary as far as the secondary can see: a session that says that all is there, and a connection for data."""

    def __init__(self, secondary: Server, former: Sender | None = None) -> None:
        """`former`: a session of the same primary."""
        peer = Peer.open(secondary.uri(), DEADLINE_S, Connection, lambda *_: None, lambda _: None)
        assert peer is not None
        self.peer = peer
        self.generation = new_id()
        lineage = Lineage() if former is None else Lineage(former.generation)
        told = {"node": "1" * 16, "lineage": lineage.to_json(), "disks": {"disk0": SIZE}, "epoch": 0, "timeout": 60.0}
        self.answer = self.call("replication-pair", **told)
        self.token = str(self.answer["token"])
        for verdict in ("equal", "complete"):
            self.call(
                "replication-pair-sync", token=self.token, verdict=verdict, generation=self.generation, marked=False
            )
        self.data = secondary.connect(f"{DATA_EXPORT}:{self.token}:disk0")

    def call(self, command: str, **arguments: Any) -> Any:
        return self.peer.call(command, arguments, DEADLINE_S)

    def send(self, *writes: tuple[int, bytes]) -> None:
        """One batch, answered."""
        self.data.pwrite(pack(writes), SIZE)

    def close(self) -> None:
        self.peer.close()


class Bench:
    """A secondary in `running` with OLD on its disk, its guest, and a Sender."""

    def __init__(self, lab: Lab, **options: Any) -> None:
        self.points: PausePoints = lab.pause_points()
        self.secondary: Secondary = lab.secondary(
            [SIZE], contents=[OLD], extra_environment=self.points.environment, **options
        )
        self.secondary.start_replication()
        self.guest = self.secondary.connect("top0")
        self.sender = Sender(self.secondary)

    def disk(self) -> bytes:
        return self.secondary.disks[0].read_bytes()

    def held(self, point: str) -> Future[None]:
        """A batch that is held there."""
        self.points.arm(point)
        batch = begin(lambda: self.sender.send(*BATCH))
        self.points.wait_hit(point)
        return batch


@pytest.fixture
def bench(lab: Lab) -> Any:
    made = Bench(lab)
    yield made
    made.sender.close()


# -- what a batch meets ------------------------------------------------------------------------------------------------


def test_a_batch_does_what_its_writes_do(bench: Bench) -> None:
    bench.sender.send(*BATCH)
    assert bench.disk() == NEW
    assert whole(bench.guest) == OLD
    bench.secondary.checkpoint()
    assert whole(bench.guest) == NEW
    again = [(offset + 7, data[:-9]) for offset, data in BATCH]
    bench.sender.send(*again)
    bench.sender.send(*BATCH)  # these blocks are preserved already
    assert whole(bench.guest) == NEW


def test_writes_of_a_batch_that_overlap_are_done_in_their_order(bench: Bench) -> None:
    """A primary sends no such thing."""
    writes = [(BLOCK * (number % 3) + number * 100, bytes([number]) * 3000) for number in range(1, 9)]
    bench.sender.send(*writes)
    assert bench.disk() == changed(OLD, *writes)
    assert whole(bench.guest) == OLD


@pytest.mark.parametrize("at", [0, 5 * BLOCK, 20 * BLOCK], ids=["first", "middle", "last"])
def test_a_guest_read_that_a_batch_overtakes_sees_the_checkpoint(bench: Bench, at: int) -> None:
    """
    guest read:  not in hidden, reads the disk ------------------------- looks at hidden again
    batch:                                      preserves, writes all
    """
    bench.points.arm("guest-read.disk-read")
    read = begin(lambda: bench.guest.pread(2 * BLOCK, at))
    bench.points.wait_hit("guest-read.disk-read")
    bench.sender.send(*BATCH)
    bench.points.release("guest-read.disk-read")
    assert read.result(DEADLINE_S) == OLD[at : at + 2 * BLOCK]


@pytest.mark.parametrize("point", [*COPYING, "target-write.written"])
def test_a_guest_reads_the_checkpoint_while_a_batch_is_at_work(bench: Bench, point: str) -> None:
    batch = bench.held(point)
    assert whole(bench.guest) == OLD
    bench.points.release(point)
    batch.result(DEADLINE_S)
    assert whole(bench.guest) == OLD
    assert bench.disk() == NEW


@pytest.mark.parametrize("point", [*COPYING, "target-write.written"])
def test_a_checkpoint_waits_for_the_batch_in_flight(bench: Bench, point: str) -> None:
    batch = bench.held(point)
    checkpoint = begin(bench.secondary.checkpoint)
    assert not chance(checkpoint)
    bench.points.release(point)
    checkpoint.result(DEADLINE_S)
    batch.result(DEADLINE_S)
    assert whole(bench.guest) == bench.disk() == NEW


@pytest.mark.parametrize("point", [*COPYING, "target-write.written"])
def test_failover_undoes_the_batch_in_flight_and_refuses_later_ones(bench: Bench, point: str) -> None:
    batch = bench.held(point)
    failover = begin(bench.secondary.failover)
    assert not chance(failover)
    bench.points.release(point)
    failover.result(DEADLINE_S)
    batch.result(DEADLINE_S)  # it was done, and undone
    assert bench.disk() == OLD
    with nbd_refusal(errno.ESHUTDOWN):
        bench.sender.send(*BATCH)
    assert bench.disk() == whole(bench.guest) == OLD


def test_a_batch_that_comes_while_failover_begins_is_refused_as_a_whole(bench: Bench) -> None:
    """It came after the first instant of failover, and before the commit has begun."""
    bench.sender.send(BATCH[0])
    bench.points.arm("failover.entered")
    failover = begin(bench.secondary.failover)
    bench.points.wait_hit("failover.entered")
    with nbd_refusal(errno.ESHUTDOWN):
        bench.sender.send(*BATCH)
    assert bench.disk() == changed(OLD, BATCH[0])
    bench.points.release("failover.entered")
    failover.result(DEADLINE_S)
    assert bench.disk() == OLD


@pytest.mark.parametrize("point", [*COPYING, "target-write.written"])
def test_a_planned_stop_finishes_the_batch_in_flight_and_refuses_later_ones(bench: Bench, point: str) -> None:
    batch = bench.held(point)
    stop = begin(lambda: bench.secondary.execute("replication-stop"))
    assert not chance(stop)
    bench.points.release(point)
    stop.result(DEADLINE_S)
    batch.result(DEADLINE_S)
    with nbd_refusal(errno.ESHUTDOWN):
        bench.sender.send((0, OLD[:BLOCK]))
    assert bench.disk() == whole(bench.guest) == NEW


@pytest.mark.parametrize("point", [*COPYING, "target-write.written"])
def test_after_a_kill_in_mid_batch_each_block_is_old_or_new_and_the_checkpoint_is_valid(
    bench: Bench, point: str
) -> None:
    batch = bench.held(point)
    bench.secondary.kill()
    with pytest.raises(nbd.Error):
        batch.result(DEADLINE_S)
    bench.points.disarm(point)
    bench.secondary.start()
    assert whole(bench.secondary.connect("top0")) == OLD
    disk = bench.disk()
    for at in range(0, SIZE, BLOCK):
        assert disk[at : at + BLOCK] in (OLD[at : at + BLOCK], NEW[at : at + BLOCK])
    bench.secondary.failover()
    assert bench.disk() == OLD


# -- who may send one, and what is none --------------------------------------------------------------------------------


def test_only_the_token_of_the_session_opens_the_way_for_batches(bench: Bench) -> None:
    guessed = bench.secondary.connect(f"{DATA_EXPORT}:{'0' * 32}:disk0")
    empty = bench.secondary.connect(f"{DATA_EXPORT}::disk0")
    for stranger in (guessed, empty):
        with nbd_refusal(errno.ESHUTDOWN):
            stranger.pwrite(pack(BATCH), SIZE)
    plain = bench.secondary.connect("disk0", strict=False)
    assert plain.get_size() == SIZE, "there is no room for batches"
    with nbd_refusal(errno.EPERM):
        plain.pwrite(OLD[:1], 0)
    with nbd_refusal(errno.ENOSPC):  # nbdkit's own, for a write behind the end
        plain.pwrite(pack(BATCH), SIZE)
    assert bench.disk() == OLD


def test_the_token_of_a_former_session_sends_no_batch_any_more(bench: Bench) -> None:
    former = bench.sender
    bench.sender = Sender(bench.secondary, former)
    with nbd_refusal(errno.ESHUTDOWN):
        former.send(*BATCH)
    assert bench.disk() == OLD
    bench.sender.send(*BATCH)
    bench.sender.close()
    wait_until(lambda: bench.secondary.status()["link"]["primary"] is None, "the session has ended")
    with nbd_refusal(errno.ESHUTDOWN):
        bench.sender.send((0, OLD[:BLOCK]))
    assert bench.disk() == NEW
    former.close()


BEHIND: dict[str, Callable[[nbd.NBD], object]] = {
    "read": lambda data: data.pread(512, SIZE),
    "read-far": lambda data: data.pread(512, SIZE + SPACE - 512),
    "read-across": lambda data: data.pread(1024, SIZE - 512),
    "write-behind": lambda data: data.pwrite(pack(BATCH), SIZE + 1),
    "write-far": lambda data: data.pwrite(bytes(512), SIZE + SPACE - 512),
    "write-across": lambda data: data.pwrite(bytes(1024), SIZE - 512),
    "write-fua-across": lambda data: data.pwrite(bytes(1024), SIZE - 512, nbd.CMD_FLAG_FUA),
    "zero": lambda data: data.zero(512, SIZE),
    "zero-across": lambda data: data.zero(1024, SIZE - 512, nbd.CMD_FLAG_NO_HOLE),
    "zero-all": lambda data: data.zero(SPACE, SIZE),
    "trim": lambda data: data.trim(512, SIZE),
    "trim-across": lambda data: data.trim(1024, SIZE - 512),
    "extents": lambda data: data.block_status(512, SIZE, lambda *_: 0),
    "extents-across": lambda data: data.block_status(1024, SIZE - 512, lambda *_: 0),
    "cache": lambda data: data.cache(512, SIZE),
    "batch-with-fua": lambda data: data.pwrite(pack(BATCH), SIZE, nbd.CMD_FLAG_FUA),
    "no-batch": lambda data: data.pwrite(bytes(4096), SIZE),
    "batch-for-a-larger-disk": lambda data: data.pwrite(pack([(0, b"x"), (SIZE - 1, b"yz")]), SIZE),
    "cut-off-batch": lambda data: data.pwrite(pack(BATCH)[:-1], SIZE),
}


def test_nothing_but_a_batch_is_taken_behind_the_disks_end(bench: Bench) -> None:
    # Strict mode stays on: all of this is inside the export.
    data = bench.sender.data
    assert data.get_size() == SIZE + SPACE
    for what, request in BEHIND.items():
        with nbd_refusal(errno.EINVAL):
            request(data)
        assert bench.disk() == OLD, what
    assert data.pread(512, SIZE - 512) == OLD[-512:], "the connection goes on"
    bench.sender.send(*BATCH)
    assert bench.disk() == NEW
    assert bench.secondary.status()["error"] is None


# -- pairs -------------------------------------------------------------------------------------------------------------


class Logged:
    """A pair whose primary's forwarding thread can be held, and whose secondary notes the requests."""

    def __init__(
        self, lab: Lab, *, secondary_disk: str | None = None, secondary: Secondary | None = None, **options: Any
    ) -> None:
        self.points = lab.pause_points()
        self.log = lab.folder / "requests.log"
        logging: dict[str, Any] = {"filters": ["log"], "filter_arguments": [f"logfile={self.log}"]}
        arguments = options.get("secondary_arguments", ())
        self.secondary: Server
        if secondary_disk is not None:
            told = ["mode=secondary", f"state={lab.folder}/s", f"disk=disk0:{secondary_disk}", "top-id=top0"]
            self.secondary = lab.start(Server(lab.folder, "secondary", told, **logging))
        elif secondary is not None:
            secondary.filters, secondary.filter_arguments = logging["filters"], logging["filter_arguments"]
            self.secondary = lab.start(secondary)
        else:
            self.secondary = lab.secondary([SIZE], contents=[OLD], extra_arguments=arguments, **logging)
        self.primary: Primary = lab.primary(
            options.get("uri", self.secondary.uri()),
            [SIZE],
            contents=[OLD],
            extra_arguments=["timeout=30", *options.get("primary_arguments", ())],
            extra_environment=self.points.environment,
        )
        self.secondary.execute("xen-set-replication", enable=True, primary=False)
        self.primary.start_replication()
        self.disk = self.primary.connect("disk0")
        self.guest = self.secondary.connect("top0")

    def write_together(self, *writes: tuple[int, bytes]) -> None:
        """Write, in such a way that the primary has all of them in its queue when it sends the first."""
        self.points.arm("forward.send")
        self.disk.pwrite(OLD[ALONE : ALONE + BLOCK], ALONE)
        self.points.wait_hit("forward.send")
        for offset, data in writes:
            self.disk.pwrite(data, offset)
        self.points.release("forward.send")

    def writes(self) -> list[tuple[int, int]]:
        """(offset, length) of the write requests that came to the secondary's data export."""
        log = self.log.read_text()
        data = set(re.findall(rf" connection=(\d+) Connect export='?{re.escape(DIGEST_EXPORT)}:", log))
        found = re.findall(r" connection=(\d+) Write id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", log)
        return [(int(offset, 16), int(length, 16)) for number, offset, length in found if number in data]

    def batches(self) -> int:
        return sum(offset == SIZE for offset, _ in self.writes())


def small_writes(count: int = 8, seed: int = 10) -> list[tuple[int, bytes]]:
    """Each in a grain of its own."""
    return [(number * GRAIN + number * BLOCK, pattern(seed + number, BLOCK)) for number in range(count)]


def test_writes_that_wait_together_go_together(lab: Lab) -> None:
    pair = Logged(lab)
    writes = small_writes()
    pair.write_together(*writes)
    drained(pair.primary)
    assert pair.batches() == 1
    assert [offset for offset, _ in pair.writes() if offset != SIZE] == [ALONE], "only what was sent alone"
    assert pair.secondary.disks[0].read_bytes() == changed(OLD, *writes)  # type: ignore[attr-defined]
    assert whole(pair.guest) == OLD
    pair.primary.checkpoint()
    assert whole(pair.guest) == whole(pair.disk) == changed(OLD, *writes)


def test_a_secondary_whose_disk_is_behind_nbd_gets_single_writes(lab: Lab) -> None:
    raw = make_raw(lab.folder / "behind.raw", SIZE, OLD)
    pair = Logged(lab, secondary_disk=lab.endpoint(path=raw).uri())
    writes = small_writes()
    pair.write_together(*writes)
    drained(pair.primary)
    assert pair.batches() == 0
    assert sorted(offset for offset, _ in pair.writes()) == sorted([ALONE, *(offset for offset, _ in writes)])
    assert raw.read_bytes() == changed(OLD, *writes)


def test_batches_go_over_tls(lab: Lab, tmp_path: Path) -> None:
    psk = psk_file(tmp_path / "psk", "pair")
    far = SecondaryWithTwoDoors(lab.folder, [SIZE], contents=[OLD], options=["--tls=on", f"--tls-psk={psk}"])
    pair = Logged(lab, secondary=far, uri=far.tcp_uri(), primary_arguments=[f"tls-psk={psk}", "tls-username=pair"])
    writes = small_writes()
    for seed in (10, 50):
        writes = small_writes(seed=seed)
        pair.write_together(*writes)
        drained(pair.primary)
    assert pair.batches() == 2
    pair.primary.checkpoint()
    assert whole(pair.guest) == whole(pair.disk) == changed(OLD, *writes)


def learns(server: Server) -> dict[str, Any]:
    error: dict[str, Any] = wait_until(lambda: server.status()["error"], f"{server.name} learns of it")
    return error


def out_of_sync(server: Server) -> int:
    return int(server.status()["disks"][0]["out-of-sync-bytes"])


def test_when_the_hidden_disk_is_full_only_the_grains_that_could_not_be_preserved_stay_marked(
    lab: Lab, small_folder: Callable[[int], SmallFolder]
) -> None:
    """Case 3: the guest is not told; both nodes know, and the checkpoint stays valid until a resync."""
    small = small_folder(4 * MIB)
    pair = Logged(lab, secondary_arguments=[f"hidden={small.folder / 'hidden.qcow2'}"])
    preserved, fresh = small_writes(4), small_writes(8)[4:]
    pair.write_together(*preserved)
    drained(pair.primary)
    small.fill()
    again = [(offset, pattern(70 + number, BLOCK)) for number, (offset, _) in enumerate(preserved)]
    mixed = [write for two in zip(again, fresh, strict=True) for write in two]
    pair.write_together(*mixed)  # the guest is not told
    learns(pair.primary)
    wait_until(lambda: out_of_sync(pair.primary) == 4 * GRAIN, "exactly what failed stays marked")
    known, cause = pair.primary.status()["error"], pair.secondary.status()["error"]
    assert (known["case"], known["errno"], known["operation"]) == (2, "ENOSPC", "write")
    assert (cause["case"], cause["errno"]) == (3, "ENOSPC")
    assert {known["offset"], cause["offset"]} <= {offset for offset, _ in fresh}
    assert pair.batches() == 2
    raw = pair.secondary.disks[0]  # type: ignore[attr-defined]
    assert raw.read_bytes() == changed(OLD, *again), "the others have arrived, and nothing that was not preserved"
    assert whole(pair.guest) == OLD
    small.make_room()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "the resync has sent what was missing")
    pair.primary.checkpoint()
    assert whole(pair.guest) == whole(pair.disk) == raw.read_bytes() == changed(OLD, *mixed)
    assert pair.primary.status()["error"] is None
    assert pair.secondary.status()["error"] is None


def limit_files(server: Server, size: int) -> None:
    """Writes of the process behind `size` bytes of any file fail, with EFBIG, which a client sees as EIO."""
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.parametrize("preserved", [True, False], ids=["the-disk-fails", "copying-fails"])
def test_when_some_blocks_cannot_be_written_only_theirs_stay_marked(lab: Lab, preserved: bool) -> None:
    """Case 4, or 3 when it is already the copy before the write that fails."""
    pair = Logged(lab)
    writes = small_writes()
    middle = 4 * GRAIN
    if preserved:
        pair.write_together(*writes)
        drained(pair.primary)
    before = whole(pair.disk)
    limit_files(pair.secondary, middle)
    again = small_writes(seed=40)
    pair.write_together(*again)
    learns(pair.primary)
    wait_until(lambda: out_of_sync(pair.primary) == 4 * GRAIN, "exactly what failed stays marked")
    known, cause = pair.primary.status()["error"], pair.secondary.status()["error"]
    assert (known["case"], known["errno"], known["operation"]) == (2, "EIO", "write")
    assert cause["case"] == (4 if preserved else 3)
    assert known["offset"] >= middle <= cause["offset"]
    raw = pair.secondary.disks[0]  # type: ignore[attr-defined]
    assert raw.read_bytes() == changed(before, *[write for write in again if write[0] < middle])
    assert whole(pair.guest) == OLD
    limit_files(pair.secondary, resource.RLIM_INFINITY)
    wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "the resync has sent what was missing")
    pair.primary.checkpoint()
    assert whole(pair.guest) == whole(pair.disk) == raw.read_bytes() == changed(before, *again)


def test_what_a_failover_refuses_of_a_batch_stays_marked_on_the_primary(lab: Lab) -> None:
    """
    primary:    has a batch ready, held ---------------- sends it: refused, and so is each of its writes
    secondary:                           fails over
    """
    pair = Logged(lab)
    writes = small_writes()
    pair.points.arm("forward.send")
    pair.disk.pwrite(OLD[ALONE : ALONE + BLOCK], ALONE)
    pair.points.wait_hit("forward.send")
    for offset, data in writes:
        pair.disk.pwrite(data, offset)
    pair.secondary.failover()  # type: ignore[attr-defined]
    pair.points.release("forward.send")
    learns(pair.primary)
    wait_until(lambda: out_of_sync(pair.primary) == 8 * GRAIN, "nothing was taken, everything is marked")
    raw = pair.secondary.disks[0]  # type: ignore[attr-defined]
    assert raw.read_bytes() == whole(pair.guest) == OLD
    assert pair.primary.disks[0].read_bytes() == changed(OLD, *writes)
