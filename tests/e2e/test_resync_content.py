# SPDX-License-Identifier: BSD-3-Clause
"""The resync of a real pair: holes stay holes, the rate is kept, and what the guest writes meanwhile arrives newest."""

from __future__ import annotations

import errno
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from content import KIB, MIB, pattern
from lab import Lab
from nodes import Pair, disk_name, nbd_refusal, top_id
from qmp import QmpError
from replication.options import DIGEST_EXPORT
from waiting import DEADLINE_S, wait_until

GRAIN = 64 * KIB
SIZE = 1024 * MIB
RATE = 4 * MIB


def allocated(path: Path) -> int:
    """Bytes of the file's blocks."""
    return path.stat().st_blocks * 512


def same(one: Path, other: Path) -> bool:
    """Whether two files are equal; reads no more than their data, and a megabyte at a time."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            data = first.read(MIB)
            if data != second.read(MIB):
                return False
            if not data:
                return True


def put(path: Path, *writes: tuple[int, bytes]) -> None:
    """Change a file in place; what is not written stays a hole."""
    with open(path, "r+b") as file:
        for offset, data in writes:
            file.seek(offset)
            file.write(data)


def disk_of(pair: Pair) -> dict[str, Any]:
    """What query-replication says of the primary's disk."""
    (disk,) = pair.primary.status()["disks"]
    return dict(disk)


def full_resync(pair: Pair) -> None:
    """Stop and start again, with everything to be sent; returns when it has begun."""
    pair.primary.execute("replication-stop")
    pair.primary.execute("replication-start", secondary=pair.secondary.uri(), sync="full")


def wait_in_sync(pair: Pair) -> None:
    """Wait until the resync has ended well."""
    with pair.primary.qmp() as qmp:

        def ended() -> bool:
            jobs = qmp.execute("query-jobs")
            assert all(job["status"] == "running" for job in jobs), jobs
            return not jobs and qmp.execute("query-replication")["disks"][0]["out-of-sync-bytes"] == 0

        wait_until(ended, "the resync has ended")


@pytest.fixture
def sent(lab: Lab) -> Path:
    """The file in which nbdkit's log filter notes the requests to the secondary."""
    return lab.folder / "requests.log"


def test_a_full_resync_of_a_sparse_disk_sends_its_data_only_and_leaves_it_sparse(lab: Lab, sent: Path) -> None:
    options = {"filters": ["log"], "filter_arguments": [f"logfile={sent}"]}
    pair = lab.pair([SIZE], secondary_options=options)
    data = [(offset, pattern(offset, 300 * KIB)) for offset in (0, 100 * MIB + 5, 511 * MIB, SIZE - 300 * KIB)]
    put(pair.primary.disks[0], *data)
    # Where the primary has holes the secondary has something else: they have to be sent, too.
    put(pair.secondary.disks[0], (0, b"x" * MIB), (300 * MIB, b"x" * 5 * MIB))
    pair.start_replication()
    before = len(sent.read_text())
    full_resync(pair)
    wait_in_sync(pair)
    pair.primary.checkpoint()
    assert same(*pair.primary.disks, *pair.secondary.disks)
    log = sent.read_text()
    # Not those to the control export, by which the primary looks at the secondary several times a second.
    data_connections = set(re.findall(rf" connection=(\d+) Connect export='?{re.escape(DIGEST_EXPORT)}:", log))
    changes = re.findall(r" connection=(\d+) (Write|Zero) id=\d+ offset=\S+ count=0x([0-9a-f]+)", log[before:])
    requests = [(kind, int(count, 16)) for connection, kind, count in changes if connection in data_connections]
    written = sum(count for kind, count in requests if kind == "Write")
    assert 4 * 300 * KIB <= written <= 4 * (300 * KIB + 2 * GRAIN)
    assert len(requests) < SIZE // (4 * MIB) + 20
    assert allocated(pair.secondary.disks[0]) <= allocated(pair.primary.disks[0]) + 8 * GRAIN
    # And it is a checkpoint like any other on the secondary.
    pair.secondary.checkpoint()
    assert pair.secondary.status()["consistent"] is True


def test_a_first_copy_while_the_vm_runs_has_no_checkpoint_to_go_back_to_until_it_is_complete(lab: Lab) -> None:
    """README, One VM on two hosts, without step 2: two new nodes, the secondary started first."""
    pair = lab.pair([MIB])
    put(pair.primary.disks[0], (0, pattern(7, MIB)))
    pair.secondary.start_replication()
    guest = pair.secondary.connect(top_id(0))
    pair.primary.execute("replication-start", sync="full")
    wait_in_sync(pair)
    # All is there, but there has not been a checkpoint yet, and what was there at the start was a copy of nothing.
    status, preflight = pair.secondary.status(), pair.secondary.execute("query-failover")
    assert (status["consistent"], preflight["allowed"], preflight["force"]) == (False, False, True)
    with pytest.raises(QmpError) as refusal:
        pair.secondary.execute("replication-stop", failover=True)
    assert "a full resync from the primary is not complete" in refusal.value.desc
    with nbd_refusal(errno.EIO):
        guest.pread(512, 0)
    pair.primary.checkpoint()
    assert pair.secondary.status()["consistent"] is True
    assert guest.pread(MIB, 0) == pattern(7, MIB)


def test_the_rate_is_kept_although_a_barrier_waits_and_the_guest_is_not_slowed(lab: Lab) -> None:
    size = 10 * MIB
    rate = RATE // 2
    pair = lab.pair([size], contents=[pattern(1, size)], primary_arguments=[f"resync-rate={rate}"])
    pair.start_replication()
    disk = pair.primary.connect(disk_name(0))
    begun = time.monotonic()
    full_resync(pair)
    for number in range(100):
        disk.pwrite(pattern(number, 64 * KIB), number * 64 * KIB)
    wrote_s = time.monotonic() - begun
    job = pair.primary.execute("query-jobs")[0]
    assert (job["type"], job["total-progress"]) == ("resync", size)
    assert job["current-progress"] < size // 2
    barriers = threading.Thread(target=pair.primary.checkpoint)
    barriers.start()
    wait_in_sync(pair)
    took_s = time.monotonic() - begun
    barriers.join(DEADLINE_S)
    assert same(*pair.primary.disks, *pair.secondary.disks)
    # 6.25 MiB of the guest's own would have been 3.1 s at the rate of the resync.
    assert wrote_s < 2.0
    # A burst of 1 MiB is free. With the guest's own at the same rate it would be 8 s.
    assert 0.75 * (size - MIB) / rate <= took_s <= 1.5 * size / rate


def test_what_the_guest_writes_during_a_resync_arrives_newest(lab: Lab) -> None:
    size = 16 * MIB
    pair = lab.pair([size], contents=[pattern(2, size)], primary_arguments=[f"resync-rate={2 * RATE}"])
    pair.start_replication()
    disk = pair.primary.connect(disk_name(0))
    full_resync(pair)
    rng = random.Random(3)
    number = 0
    while pair.primary.execute("query-jobs"):
        for _ in range(50):
            number += 1
            offset = rng.randrange(0, size - 8 * KIB)
            if number % 5:
                disk.pwrite(pattern(number, rng.randrange(1, 8 * KIB)), offset)
            else:
                disk.zero(rng.randrange(1, 300 * KIB) if offset < size - 300 * KIB else 8 * KIB, offset)
    assert number >= 100, "the resync took long enough for the guest to meet it"
    pair.primary.checkpoint()
    assert disk_of(pair)["out-of-sync-bytes"] == 0
    assert same(*pair.primary.disks, *pair.secondary.disks)


def test_a_cancelled_resync_is_taken_up_by_the_next_barrier(lab: Lab) -> None:
    size = 8 * MIB
    pair = lab.pair([size], contents=[pattern(4, size)], primary_arguments=[f"resync-rate={MIB}"])
    pair.start_replication()
    full_resync(pair)
    with pair.primary.qmp() as qmp:
        qmp.execute("job-cancel", id="resync-disk0")
        qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data == {"id": "resync-disk0", "status": "concluded"})
        (job,) = qmp.execute("query-jobs")
        assert (job["status"], job["error"]) == ("concluded", "the resync was cancelled")
        assert job["current-progress"] <= job["total-progress"] == size
        wait_until(lambda: disk_of(pair)["forward-queue-bytes"] == 0, "what was on its way has arrived")
        (job,) = qmp.execute("query-jobs")
        assert job["current-progress"] < size // 2
        assert disk_of(pair)["out-of-sync-bytes"] == size - job["current-progress"]
        qmp.execute("replication-checkpoint")
    assert disk_of(pair)["out-of-sync-bytes"] == 0
    assert same(*pair.primary.disks, *pair.secondary.disks)
