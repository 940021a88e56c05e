# SPDX-License-Identifier: BSD-3-Clause
"""Comparing the disks of a real pair while guests write: what differs is found and sent, and nothing else is found."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest

from checkout import PLUGIN
from content import KIB, MIB, make_raw, pattern, whole
from lab import Lab
from nodes import Pair, Primary, Secondary, Server, drained, in_sync, refused
from replication.digests import DIGEST_BYTES, RANGE
from replication.options import DIGEST_EXPORT
from waiting import DEADLINE_S, begin, chance, wait_until

BLOCK = 4 * KIB
GRAIN = 64 * KIB
SIZE = 3 * MIB + 5 * BLOCK + 100
"""Neither whole ranges nor whole grains nor whole blocks."""
OLD = pattern(1, SIZE)
EVENT = "REPLICATION_VERIFIED"


class Bench:
    """A pair with equal disks, of whose threads the primary's can be held."""

    def __init__(self, lab: Lab, size: int = SIZE, content: bytes = OLD, **options: Any) -> None:
        self.points = lab.pause_points()
        self.pair: Pair = lab.pair(
            [size],
            contents=[content],
            primary_arguments=["timeout=30", *options.pop("primary_arguments", ())],
            primary_options={"extra_environment": self.points.environment},
            **options,
        )
        self.primary: Primary = self.pair.primary
        self.secondary: Secondary = self.pair.secondary
        self.pair.start_replication()
        in_sync(self.primary)
        self.guest = self.primary.connect("disk0")

    @property
    def there(self) -> Path:
        """The secondary's disk."""
        return self.secondary.disks[0]

    def spoil(self, offset: int) -> None:
        """Something has changed a byte of the secondary's disk behind everybody's back."""
        with open(self.there, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    def held(self, point: str = "verify.read", **arguments: Any) -> None:
        """Begin a comparison, and hold it at its first range."""
        self.points.arm(point)
        self.primary.execute("replication-verify", **arguments)
        self.points.wait_hit(point)


def concluded(server: Server, since: float = 0.0) -> dict[str, Any]:
    """The result of the comparison that began last."""

    def ended() -> dict[str, Any] | None:
        status = server.status()
        last: dict[str, Any] | None = status["last-verify"]
        return last if status["verify"] is None and last is not None and last["time"] > since else None

    result: dict[str, Any] = wait_until(ended, "the comparison ends")
    return result


def compared(server: Server, **arguments: Any) -> dict[str, Any]:
    """Compare, and wait for the result."""
    last = server.status()["last-verify"]
    server.execute("replication-verify", **arguments)
    return concluded(server, 0.0 if last is None else last["time"])


def waits(server: Server) -> str:
    """What the comparison waits for."""
    text: str = wait_until(lambda: (server.status()["verify"] or {}).get("waits-for"), "the comparison waits")
    return text


@pytest.fixture
def bench(lab: Lab) -> Bench:
    return Bench(lab)


# -- what is found -----------------------------------------------------------------------------------------------------


def test_equal_disks_are_equal_and_the_result_outlives_the_process(bench: Bench) -> None:
    bench.guest.pwrite(pattern(2, 3 * BLOCK), MIB - BLOCK)
    bench.guest.zero(GRAIN, 2 * MIB)
    assert bench.primary.status()["last-verify"] is None
    with bench.primary.qmp() as qmp:
        qmp.execute("replication-verify")
        told = qmp.wait_event(EVENT)["data"]
        jobs = [event["data"] for event in qmp.events if event["data"].get("id") == "verify-disk0"]
    result = concluded(bench.primary)
    assert result == told
    assert (result["result"], result["compared-bytes"], result["different-bytes"]) == ("equal", SIZE, 0)
    assert (result["left-out-bytes"], result["ranges"], result["reason"]) == (0, [], None)
    assert abs(result["time"] - time.time()) < 3600
    assert [job["status"] for job in jobs] == ["running", "concluded", "null"]
    bench.primary.kill()
    bench.primary.start()
    assert bench.primary.status()["last-verify"] == result
    assert bench.primary.status()["verify"] is None


@pytest.mark.parametrize("offset", [0, MIB + GRAIN - 1, SIZE - 1], ids=["first", "inside", "last"])
def test_a_byte_that_differs_is_found_marked_and_sent_by_the_next_checkpoint(bench: Bench, offset: int) -> None:
    bench.spoil(offset)
    result = compared(bench.primary)
    start = offset // GRAIN * GRAIN
    length = min(GRAIN, SIZE - start)
    assert (result["result"], result["different-bytes"], result["compared-bytes"]) == ("different", length, SIZE)
    assert result["ranges"] == [{"disk": "disk0", "offset": start, "length": length}]
    status = bench.primary.status()
    assert status["disks"][0]["out-of-sync-bytes"] == GRAIN
    assert status["link"]["state"] == "synchronizing"
    assert (status["error"]["operation"], status["error"]["offset"]) == ("verify", start)
    bench.primary.checkpoint()
    assert bench.there.read_bytes() == OLD
    in_sync(bench.primary)
    assert bench.primary.status()["error"] is None
    assert compared(bench.primary)["result"] == "equal"


def test_repair_sends_what_differs_at_once(bench: Bench) -> None:
    bench.spoil(5)
    bench.spoil(2 * MIB)
    result = compared(bench.primary, repair=True)
    assert (result["result"], result["different-bytes"], result["repair"]) == ("different", 2 * GRAIN, True)
    drained(bench.primary)
    in_sync(bench.primary)
    assert bench.there.read_bytes() == OLD
    wait_until(lambda: bench.primary.status()["error"] is None, "there is no error any more")


def test_the_checkpoint_of_a_repaired_disk_is_right(bench: Bench) -> None:
    """What was spoiled was the checkpoint as well; the next one is whole again."""
    bench.spoil(MIB)
    compared(bench.primary, repair=True)
    in_sync(bench.primary)
    bench.primary.checkpoint()
    assert whole(bench.secondary.connect("top0")) == OLD


def test_disks_that_have_nothing_in_common(lab: Lab) -> None:
    """All of it is found, and the ranges that are told are few."""
    bench = Bench(lab, 8 * MIB, pattern(1, 8 * MIB))
    for at in range(0, 8 * MIB, 2 * GRAIN):
        bench.spoil(at)
    result = compared(bench.primary)
    assert (result["different-bytes"], result["left-out-bytes"]) == (4 * MIB, 0)
    assert len(result["ranges"]) == 64
    assert bench.primary.status()["disks"][0]["out-of-sync-bytes"] == 4 * MIB


def test_holes_are_compared_with_what_is_there(lab: Lab) -> None:
    bench = Bench(lab, 40 * MIB, b"")
    assert compared(bench.primary)["compared-bytes"] == 40 * MIB
    bench.spoil(33 * MIB + 1)
    assert compared(bench.primary)["ranges"] == [{"disk": "disk0", "offset": 33 * MIB, "length": GRAIN}]


def test_every_disk_is_compared(lab: Lab) -> None:
    pair = lab.pair([MIB, 2 * MIB], contents=[pattern(1, MIB), pattern(2, 2 * MIB)])
    pair.start_replication()
    in_sync(pair.primary)
    with open(pair.secondary.disks[1], "r+b") as file:
        file.write(bytes(1))
    result = compared(pair.primary)
    assert result["compared-bytes"] == 3 * MIB
    assert result["ranges"] == [{"disk": "disk1", "offset": 0, "length": GRAIN}]


def test_the_link_carries_sixteen_bytes_for_each_megabyte(lab: Lab) -> None:
    log = lab.folder / "requests.log"
    bench = Bench(lab, secondary_options={"filters": ["log"], "filter_arguments": [f"logfile={log}"]})
    compared(bench.primary)
    text = log.read_text()
    data = set(re.findall(rf" connection=(\d+) Connect export='?{re.escape(DIGEST_EXPORT)}:", text))
    reads = re.findall(r" connection=(\d+) Read id=\d+ offset=0x[0-9a-f]+ count=0x([0-9a-f]+)", text)
    asked = [int(count, 16) for number, count in reads if number in data]
    assert sum(asked) == -(-SIZE // RANGE) * DIGEST_BYTES


# -- no false alarm ----------------------------------------------------------------------------------------------------


def test_a_write_to_the_range_that_is_read_waits_and_comes_behind_the_question(bench: Bench) -> None:
    bench.held()
    write = begin(bench.guest.pwrite, pattern(2, BLOCK), 7 * BLOCK)
    assert not chance(write), "the range that is being read was written to"
    bench.points.release("verify.read")
    write.result(DEADLINE_S)
    assert concluded(bench.primary)["result"] == "equal"


def test_what_is_written_behind_the_question_is_sent_behind_it(bench: Bench) -> None:
    """The question waits for the guest's queue, and is in it as soon as something comes that overlaps it.

    forwarding thread   W1 is being sent -----------------------> W1, the question, W2
    verify                     the range is read, and asked of
    guest               W1                                     W2, to the same block
    """
    bench.points.arm("forward.send")
    bench.guest.pwrite(pattern(2, BLOCK), 7 * BLOCK)
    bench.points.wait_hit("forward.send")
    bench.points.arm("verify.read")
    bench.primary.execute("replication-verify")
    bench.points.wait_hit("verify.read")
    bench.points.arm("verify.read")
    bench.points.release("verify.read")
    bench.points.wait_hit("verify.read")  # of the second range: the first question is in the queue
    bench.guest.pwrite(pattern(3, BLOCK), 7 * BLOCK)
    bench.points.release("forward.send")
    bench.points.release("verify.read")
    assert concluded(bench.primary)["result"] == "equal"


@contextmanager
def writers(server: Server, size: int, count: int = 2) -> Iterator[None]:
    """Guests that write, zero, trim and flush small and large ranges all over the disk."""
    over = threading.Event()
    failures: list[BaseException] = []

    def write(seed: int, guest: nbd.NBD) -> None:
        rng = random.Random(seed)
        try:
            while not over.is_set():
                length = rng.choice((1, 512, BLOCK, 3 * BLOCK, GRAIN, 300 * KIB))
                offset = rng.randrange(size - length)
                match rng.randrange(12):
                    case 0:
                        guest.zero(length, offset)
                    case 1:
                        guest.trim(length, offset)
                    case 2:
                        guest.flush()
                    case _:
                        guest.pwrite(rng.randbytes(length), offset)
        except BaseException as error:  # noqa: BLE001 (the test's business)
            failures.append(error)

    threads = [
        threading.Thread(target=write, args=(seed, server.connect("disk0")), daemon=True) for seed in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert not failures


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_nothing_is_found_while_guests_write_anything_anywhere(lab: Lab, protocol: str) -> None:
    """Two megabytes, so that nearly every range is being written to, and checkpoints in between."""
    bench = Bench(lab, 2 * MIB, primary_arguments=[f"protocol={protocol}", "checkpoint-interval=0.1"])
    with writers(bench.primary, 2 * MIB):
        results = [compared(bench.primary) for _ in range(12)]
    assert {(result["result"], result["compared-bytes"]) for result in results} == {("equal", 2 * MIB)}
    drained(bench.primary)
    assert bench.there.read_bytes() == whole(bench.guest)


def test_under_load_a_difference_is_found_all_the_same(lab: Lab) -> None:
    bench = Bench(lab, 4 * MIB)
    with writers(bench.primary, 2 * MIB):
        bench.spoil(3 * MIB + 70 * KIB)
        result = compared(bench.primary, repair=True)
    assert result["ranges"] == [{"disk": "disk0", "offset": 3 * MIB + GRAIN, "length": GRAIN}]
    drained(bench.primary)
    assert bench.there.read_bytes() == whole(bench.guest)


def test_what_the_secondary_is_known_to_lack_is_no_finding(lab: Lab) -> None:
    """Written while the link was down, and compared when the resync has sent it."""
    bench = Bench(lab)
    bench.secondary.kill()
    wait_until(lambda: bench.primary.status()["link"]["state"] == "lost", "the link is lost")
    bench.guest.pwrite(pattern(2, MIB), MIB)
    bench.secondary.start()
    wait_until(lambda: bench.primary.status()["link"]["state"] in ("synchronizing", "in-sync"), "the link is back")
    assert compared(bench.primary)["result"] == "equal"


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("replication-verify-cancel", {}), ("job-cancel", {"id": "verify-disk0"})],
    ids=["command", "job"],
)
def test_it_is_cancelled(bench: Bench, command: str, arguments: dict[str, Any]) -> None:
    bench.held()
    status = bench.primary.status()["verify"]
    assert (status["total-progress"], status["different-bytes"], status["repair"]) == (SIZE, 0, False)
    assert "being compared already" in refused(bench.primary, "replication-verify")
    bench.primary.execute(command, arguments)
    bench.points.release("verify.read")
    result = concluded(bench.primary)
    assert (result["result"], result["reason"]) == ("cancelled", "the comparison was cancelled")
    assert "not being compared" in refused(bench.primary, "replication-verify-cancel")
    assert compared(bench.primary)["result"] == "equal"


def test_a_stop_ends_it(bench: Bench) -> None:
    bench.held()
    stop = begin(bench.primary.execute, "replication-stop")
    bench.points.release("verify.read")
    stop.result(DEADLINE_S)
    result = concluded(bench.primary)
    assert result["result"] in ("incomplete", "equal")
    assert "not running" in refused(bench.primary, "replication-verify")


def test_it_waits_for_a_link_that_is_lost(bench: Bench) -> None:
    bench.held()
    bench.secondary.kill()
    wait_until(lambda: bench.primary.status()["link"]["state"] == "lost", "the link is lost")
    bench.points.release("verify.read")
    assert "not up" in waits(bench.primary)
    bench.guest.pwrite(pattern(2, MIB), MIB - GRAIN)
    bench.secondary.start()
    result = concluded(bench.primary)
    assert (result["result"], result["compared-bytes"]) == ("equal", SIZE)


def test_a_secondary_that_fails_over_meanwhile_is_no_finding(bench: Bench) -> None:
    """What its guest writes then is another disk's content."""
    bench.held()
    bench.secondary.failover()
    bench.secondary.connect("top0").pwrite(pattern(9, MIB), 0)
    bench.points.release("verify.read")
    assert "not up" in waits(bench.primary)
    bench.primary.execute("replication-verify-cancel")
    result = concluded(bench.primary)
    assert (result["result"], result["different-bytes"]) == ("cancelled", 0)


def test_a_primary_that_is_killed_goes_on_with_it(bench: Bench) -> None:
    bench.spoil(5)
    bench.held(repair=True)
    bench.primary.kill()
    bench.points.disarm("verify.read")
    bench.primary.start()
    result = concluded(bench.primary)
    assert (result["result"], result["compared-bytes"], result["repair"]) == ("different", SIZE, True)
    drained(bench.primary)
    assert bench.there.read_bytes() == OLD


def test_the_rate_bounds_it(lab: Lab) -> None:
    """At 64 KiB a second 4 MiB take a minute: they are not compared yet when there was time for much more."""
    bench = Bench(lab, 4 * MIB, pattern(1, 4 * MIB))
    bench.primary.execute("replication-verify", rate=64 * KIB)
    wait_until(lambda: bench.primary.status()["verify"]["current-progress"], "something is compared")
    status = bench.primary.status()["verify"]
    assert status["rate"] == 64 * KIB
    assert status["current-progress"] < 4 * MIB
    bench.primary.execute("replication-verify-cancel")
    assert concluded(bench.primary)["result"] == "cancelled"


# -- who cannot --------------------------------------------------------------------------------------------------------

OLDER = """
import sys
sys.path.insert(0, {folder!r})
sys.path.append("/usr/lib/python3/dist-packages")
import replication.compiled
from replication.node import Node

def older(*arguments, pair=Node.pair):
    answer = pair(*arguments)
    del answer["digests"]
    return answer

Node.pair = older
__file__ = {plugin!r}
exec(compile(open(__file__).read(), __file__, "exec"), globals())
"""


class OlderSecondary(Secondary):
    """One that does not say that it tells digests."""

    def command(self) -> list[str]:
        script = self.folder / "older.py"
        script.write_text(OLDER.format(folder=str(PLUGIN.parent), plugin=str(PLUGIN)))
        return [str(script) if word == str(PLUGIN) else word for word in super().command()]


def test_an_older_secondary_is_refused_in_one_line(lab: Lab) -> None:
    secondary = lab.start(OlderSecondary(lab.folder, [MIB]))
    primary = lab.primary(secondary.uri(), [MIB])
    secondary.start_replication()
    primary.start_replication()
    in_sync(primary)
    assert refused(primary, "replication-verify") == (
        "The secondary is of a version that tells no digests of its disk: upgrade it first"
    )


def test_a_plain_server_is_refused_in_one_line(lab: Lab) -> None:
    endpoint = lab.endpoint(path=make_raw(lab.folder / "plain.raw", MIB))
    primary = lab.primary(endpoint.uri(), [MIB])
    primary.start_replication()
    assert "plain NBD server" in refused(primary, "replication-verify")


def test_a_secondary_and_a_node_that_does_not_run_are_refused(lab: Lab) -> None:
    pair = lab.pair()
    assert "not running" in refused(pair.primary, "replication-verify")
    pair.start_replication()
    assert "matter of its primary" in refused(pair.secondary, "replication-verify")
    assert "matter of its primary" in refused(pair.secondary, "replication-verify-cancel")
    for rate in (0, 1 << 41):
        assert "Parameter 'rate' expects" in refused(pair.primary, "replication-verify", {"rate": rate})
    pair.secondary.kill()
    wait_until(lambda: pair.primary.status()["link"]["state"] == "lost", "the link is lost")
    assert "The link to the secondary is not up" in refused(pair.primary, "replication-verify")
