# SPDX-License-Identifier: BSD-3-Clause
"""Tests of a failover on a real secondary: what they show, and that nothing else notices them.

Where two meet, one is held at a pause point in the process (replication/order/pause.py).
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import nbd
import pytest

from checkout import REPOSITORY
from content import KIB, MIB, changed, make_raw, pattern, whole
from lab import Lab
from mounts import SmallFolder
from nodes import Pair, Secondary, Server, code_of, disk_name, drained, in_sync, nbd_refusal, refused, top_id
from pausepoints import PausePoints
from waiting import DEADLINE_S, begin, chance, wait_until

T = TypeVar("T")

BLOCK = 4 * KIB
SIZE = 2 * MIB + 5 * BLOCK + 100
OLD = pattern(1, SIZE)
EVENT = "REPLICATION_TEST"


def end(future: Future[T]) -> T:
    """The result, which must come in time."""
    return future.result(DEADLINE_S)


class Bench:
    """A secondary in `running` over a disk with OLD in it, and both faces connected."""

    def __init__(self, lab: Lab, *arguments: str, overlays: Path | None = None) -> None:
        self.points: PausePoints = lab.pause_points()
        self.server: Secondary = lab.secondary(
            [SIZE],
            contents=[OLD],
            overlays=overlays,
            extra_arguments=arguments,
            extra_environment=self.points.environment,
        )
        self.server.start_replication()
        self.guest, self.target = self.server.connect(top_id(0)), self.server.connect(disk_name(0))

    def test(self, name: str = "test", **more: Any) -> nbd.NBD:
        """Start one, and connect to it."""
        self.server.execute("replication-test-start", name=name, **more)
        return self.server.connect(f"{top_id(0)}.{name}")

    def stop(self, name: str = "test", **more: Any) -> Any:
        return self.server.execute("replication-test-stop", name=name, **more)

    def status(self, name: str = "test") -> dict[str, Any]:
        """Of one test."""
        found: dict[str, Any] = next(test for test in self.server.status()["tests"] if test["name"] == name)
        return found

    def failing_over(self) -> Future[Any]:
        arguments = {"enable": False, "primary": False, "failover": True}
        return begin(self.server.execute, "xen-set-replication", arguments)


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_test_is_of_its_instant_and_its_own_writes_and_nothing_else_sees_them(lab: Lab, durability: str) -> None:
    bench = Bench(lab, f"durability={durability}")
    bench.guest.pwrite(b"\x01" * 100, 1000)
    bench.target.pwrite(b"\x02" * 3 * BLOCK, 0)
    first = bench.test("first")
    instant = changed(OLD, (1000, b"\x01" * 100))
    assert whole(first) == instant  # what a failover gives: the checkpoint, and the guest's own writes
    bench.target.pwrite(b"\x03" * 3 * BLOCK, 2 * BLOCK)
    bench.guest.pwrite(b"\x04" * 100, 1050)
    bench.server.checkpoint()
    second = bench.test("second")
    epoch = changed(OLD, (0, b"\x02" * 3 * BLOCK), (2 * BLOCK, b"\x03" * 3 * BLOCK))
    bench.target.pwrite(b"\x05" * BLOCK, 0)
    bench.target.zero(BLOCK, 8 * BLOCK)
    bench.guest.pwrite(b"\x06" * BLOCK, 0)
    first.pwrite(b"\x07" * 10, 5)
    second.zero(BLOCK, 3 * BLOCK)
    first.flush()
    bench.server.checkpoint()
    bench.target.trim(BLOCK, 40 * BLOCK)
    assert whole(first) == changed(instant, (5, b"\x07" * 10))
    assert whole(second) == changed(epoch, (3 * BLOCK, bytes(BLOCK)))
    assert [test["name"] for test in bench.server.status()["tests"]] == ["first", "second"]
    assert bench.status("first")["bytes"] >= BLOCK
    bench.stop("first")
    with nbd_refusal(errno.ESHUTDOWN):
        first.pread(1, 0)
    assert whole(second) == changed(epoch, (3 * BLOCK, bytes(BLOCK)))
    now = changed(epoch, (0, b"\x05" * BLOCK), (8 * BLOCK, bytes(BLOCK)))
    assert whole(bench.guest) == now
    bench.server.failover()
    assert whole(bench.guest) == now
    with nbd_refusal(errno.ESHUTDOWN):
        second.pread(1, 0)


def test_a_pair_goes_on_under_a_test_with_batches_and_epochs(lab: Lab) -> None:
    pair: Pair = lab.pair([SIZE, MIB], contents=[OLD, pattern(2, MIB)])
    pair.start_replication()
    in_sync(pair.primary)
    guest = pair.primary.connect(disk_name(0))
    guest.pwrite(b"\x01" * BLOCK, 0)
    pair.primary.checkpoint()
    pair.secondary.execute("replication-test-start", name="x")
    instant = changed(OLD, (0, b"\x01" * BLOCK))
    shown = [pair.secondary.connect(f"{top_id(index)}.x") for index in range(2)]
    for epoch in range(3):
        for block in range(40):
            guest.pwrite(bytes([2 + epoch]) * 600, block * (BLOCK + 700))
        drained(pair.primary)
        pair.primary.checkpoint()
    assert whole(shown[0]) == instant
    assert whole(shown[1]) == pattern(2, MIB)
    assert pair.secondary.disks[0].read_bytes() == pair.primary.disks[0].read_bytes()
    assert pair.secondary.status()["error"] is None


# -- who meets a request of a test ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["write", "zero", "trim"])
def test_a_read_that_the_primary_overtakes_gets_the_instant(lab: Lab, how: str) -> None:
    """test read: has read the disk, held           | target: keeps, changes the disk
    test read: looks again, and reads what was kept |"""
    bench = Bench(lab)
    test = bench.test()
    bench.server.checkpoint()
    bench.points.arm("test-read.read")
    read = begin(test.pread, 8 * BLOCK, 0)
    bench.points.wait_hit("test-read.read")
    if how == "write":
        bench.target.pwrite(b"\x0f" * 8 * BLOCK, 0)
    else:
        getattr(bench.target, how)(8 * BLOCK, 0)
    bench.points.release("test-read.read")
    assert bytes(end(read)) == OLD[: 8 * BLOCK]


def test_a_write_of_a_test_and_what_the_primary_overwrites_come_one_after_the_other(lab: Lab) -> None:
    """target: has kept the block in the test's file, held | test write: waits
    target: says so, goes on                               | writes over what was kept"""
    bench = Bench(lab)
    test = bench.test()
    bench.points.arm("test.kept")
    written = begin(bench.target.pwrite, b"\x02" * BLOCK, 0)
    bench.points.wait_hit("test.kept")
    own = begin(test.pwrite, b"\x03" * 100, 50)
    chance(own)
    bench.points.release("test.kept")
    end(written)
    end(own)
    assert bytes(test.pread(BLOCK, 0)) == changed(OLD[:BLOCK], (50, b"\x03" * 100))


@pytest.mark.parametrize("point", ["test-read.read", "test-write.written"])
def test_no_checkpoint_waits_for_a_request_of_a_test(lab: Lab, point: str) -> None:
    bench = Bench(lab)
    test = bench.test()
    bench.points.arm(point)
    held = begin(test.pread, BLOCK, 0) if point == "test-read.read" else begin(test.pwrite, b"\x01" * BLOCK, 0)
    bench.points.wait_hit(point)
    bench.target.pwrite(b"\x02" * BLOCK, 5 * BLOCK)
    bench.server.checkpoint()
    assert bytes(bench.guest.pread(BLOCK, 5 * BLOCK)) == b"\x02" * BLOCK
    bench.points.release(point)
    end(held)


@pytest.mark.parametrize("point", ["test-read.read", "test-write.written", "test.kept"])
def test_a_failover_waits_for_no_test_and_ends_it_at_once(lab: Lab, point: str) -> None:
    """The request of the test is in the midst of it, or the primary's write, which keeps something for it."""
    bench = Bench(lab)
    test = bench.test()
    other = bench.server.connect(f"{top_id(0)}.test")
    bench.target.pwrite(b"\x02" * BLOCK, 0)
    bench.points.arm(point)
    held: Future[Any]
    if point == "test-read.read":
        held = begin(test.pread, BLOCK, 8 * BLOCK)
    elif point == "test-write.written":
        held = begin(test.pwrite, b"\x01" * BLOCK, 8 * BLOCK)
    else:
        held = begin(bench.target.pwrite, b"\x03" * BLOCK, 8 * BLOCK)
    bench.points.wait_hit(point)
    end(bench.failing_over())
    assert bench.status()["ended"] == "the stage is failover"
    with nbd_refusal(errno.ESHUTDOWN):
        other.pread(1, 40 * BLOCK)
    bench.points.release(point)
    if point == "test.kept":
        end(held)  # what was in flight goes on as in stage running
    else:
        with nbd_refusal(errno.ESHUTDOWN):
            end(held)
    assert bench.server.wait_stage("done", "failover-failed")["stage"] == "done"
    assert whole(bench.guest) == OLD
    assert code_of(bench.server, "replication-test-start", name="late") == "failed-over"
    # A result that somebody claims of it is none: nobody has seen to the end what it shows.
    assert bench.stop(result="passed")["result"] is None
    assert bench.server.status()["last-test"] is None


def test_a_planned_stop_ends_it(lab: Lab) -> None:
    bench = Bench(lab)
    test = bench.test()
    bench.target.pwrite(b"\x02" * BLOCK, 0)
    bench.server.execute("replication-stop")
    bench.guest.pwrite(b"\x03" * BLOCK, 0)
    with nbd_refusal(errno.ESHUTDOWN):
        test.pread(1, 0)


# -- who meets the start -------------------------------------------------------------------------------------------


def test_a_start_holds_up_neither_a_checkpoint_nor_a_failover(lab: Lab) -> None:
    """start: has made its files, held | checkpoint
    start: held                        | failover
    start: finds that there is nothing to test any more"""
    bench = Bench(lab)
    bench.points.arm("test.made")
    start = begin(bench.server.execute, "replication-test-start", {"name": "x"})
    bench.points.wait_hit("test.made")
    bench.target.pwrite(b"\x02" * BLOCK, 0)
    bench.server.checkpoint()
    end(bench.failing_over())
    bench.points.release("test.made")
    with pytest.raises(Exception, match="has failed over already"):
        end(start)
    assert bench.server.status()["tests"] == []
    assert bench.server.wait_stage("done")["stage"] == "done"


def test_a_start_after_a_checkpoint_is_of_that_one_and_of_two_with_one_name_one_is_made(lab: Lab) -> None:
    bench = Bench(lab)
    bench.points.arm("test.made")
    start = begin(bench.server.execute, "replication-test-start", {"name": "x"})
    bench.points.wait_hit("test.made")
    bench.target.pwrite(b"\x02" * BLOCK, 0)
    bench.server.checkpoint()
    bench.target.pwrite(b"\x03" * BLOCK, 0)
    answer = bench.server.execute("replication-test-start", name="x")
    assert answer == {
        "name": "x",
        "id": answer["id"],
        "epoch": bench.server.status()["epoch"],
        "exports": [{"disk": "disk0", "export": "top0.x", "size": SIZE}],
    }
    bench.points.release("test.made")
    with pytest.raises(Exception, match="There is a test of the name 'x'"):
        end(start)
    assert whole(bench.server.connect("top0.x")) == changed(OLD, (0, b"\x02" * BLOCK))
    assert len(bench.server.status()["tests"]) == 1


def test_a_start_is_refused_where_there_is_nothing_to_test(lab: Lab) -> None:
    pair: Pair = lab.pair([MIB])
    assert code_of(pair.secondary, "replication-test-start") == "not-running"
    assert code_of(pair.primary, "replication-test-start") == "wrong-mode"
    pair.start_replication()
    pair.secondary.execute("replication-test-start", name="x")
    assert code_of(pair.secondary, "replication-test-start", name="x") == "test-exists"
    assert code_of(pair.secondary, "replication-test-stop", name="y") == "no-test"
    assert "cannot be a test's name" in refused(pair.secondary, "replication-test-start", {"name": "a/b"})
    assert "expects seconds" in refused(pair.secondary, "replication-test-start", {"name": "y", "timeout": -1})
    pair.secondary.execute("replication-test-stop")
    assert code_of(pair.secondary, "replication-test-stop") == "no-test"


# -- space ---------------------------------------------------------------------------------------------------------


def test_a_full_test_is_refused_everything_and_replication_goes_on(lab: Lab) -> None:
    bench = Bench(lab, "test-space=1M")
    test = bench.test()
    with bench.server.qmp() as events:
        bench.target.pwrite(pattern(5, MIB + 64 * KIB), 0)
        event = events.wait_event(EVENT)
        assert event["data"]["state"] == "ended"
        assert "of test-space" in event["data"]["reason"]
    with nbd_refusal(errno.ENOSPC):
        test.pread(1, SIZE - 1)
    with nbd_refusal(errno.ENOSPC):
        test.pwrite(b"x", 0)
    status = bench.server.status()
    assert status["error"] is None
    assert status["tests"][0]["bytes"] == 0
    assert whole(bench.guest) == OLD
    assert bench.stop(result="passed")["result"] == "failed"
    assert "test-space" in bench.server.status()["last-test"]["reason"]
    again = bench.test()  # with all of the space
    assert bytes(again.pread(BLOCK, 0)) == OLD[:BLOCK]


def test_a_write_for_which_a_test_has_no_room_fails_alone(lab: Lab) -> None:
    bench = Bench(lab, "test-space=1M")
    test = bench.test()
    test.pwrite(pattern(5, MIB), 0)
    with nbd_refusal(errno.ENOSPC):
        test.pwrite(b"x", MIB)
    test.trim(64 * KIB, 0)
    test.pwrite(b"x", MIB)
    assert bytes(test.pread(MIB - 64 * KIB, 64 * KIB)) == pattern(5, MIB)[64 * KIB :]


def beside_a_test(lab: Lab, small: SmallFolder, size: int, written: int) -> Secondary:
    """A secondary with all that it has in one small file system, which is full: so much of it a test has written."""
    server = lab.start(Secondary(small.folder, [size], contents=[OLD], extra_arguments=["overlay-watermark=100"]))
    server.start_replication()
    server.execute("replication-test-start", name="x")
    server.connect(f"{top_id(0)}.x").pwrite(pattern(5, written), 0)
    small.fill()
    return server


def test_hidden_gets_the_room_that_a_test_has(lab: Lab, small_folder: Callable[[int], SmallFolder]) -> None:
    """All of it in one small file system: the test writes first, then the primary overwrites more than is left."""
    small = small_folder(16 * MIB)
    server = beside_a_test(lab, small, size=4 * MIB, written=4 * MIB)
    filler = small.folder / "filler"
    os.truncate(filler, filler.stat().st_size - MIB)
    server.connect(disk_name(0)).pwrite(pattern(6, SIZE), 0)
    status = server.status()
    assert status["error"] is None
    assert status["tests"][0]["ended"] is not None
    assert whole(server.connect(top_id(0)))[:SIZE] == OLD


def test_an_overlay_gets_the_old_data_of_another_one_that_a_test_needs(
    lab: Lab, small_folder: Callable[[int], SmallFolder]
) -> None:
    """The test's own file is elsewhere; active has nothing at its instant."""
    small = small_folder(8 * MIB)
    bench = Bench(lab, "overlay-watermark=100", overlays=small.folder)
    bench.target.pwrite(pattern(5, 2 * MIB), 0)
    test = bench.test()
    bench.server.checkpoint()
    small.fill()
    bench.guest.pwrite(pattern(6, MIB), 0)
    assert "its space was needed by" in bench.status()["ended"]
    with nbd_refusal(errno.ENOSPC):
        test.pread(1, 0)
    assert bytes(bench.guest.pread(MIB, 0)) == pattern(6, MIB)
    assert bench.server.status()["error"] is None


def test_a_secondary_disk_that_finds_no_room_gets_that_of_a_test(
    lab: Lab, small_folder: Callable[[int], SmallFolder]
) -> None:
    """The disk is a sparse file beside all the rest."""
    small = small_folder(16 * MIB)
    server = beside_a_test(lab, small, size=6 * MIB, written=2 * MIB)
    target = server.connect(disk_name(0))
    target.pwrite(pattern(6, MIB), 4 * MIB)
    assert server.status()["error"] is None
    assert "its space was needed by" in server.status()["tests"][0]["ended"]
    assert bytes(target.pread(MIB, 4 * MIB)) == pattern(6, MIB)


# -- the end of the process, and results ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "quit"])
def test_nothing_of_a_test_outlives_the_process_but_the_last_result(lab: Lab, how: str) -> None:
    bench = Bench(lab)
    bench.test("done")
    bench.stop("done", result="passed", rto=1.5)
    last = bench.server.status()["last-test"]
    assert (last["name"], last["result"], last["rto"]) == ("done", "passed", 1.5)
    test = bench.test()
    test.pwrite(b"\x07" * BLOCK, 0)
    bench.target.pwrite(b"\x02" * BLOCK, 0)
    assert not list(bench.server.state.glob("*test.*.data"))
    (bench.server.state / ".test.left.data").touch()
    if how == "kill":
        bench.server.kill()
    else:
        test.shutdown()
        bench.server.close()
    bench.server.start()
    status = bench.server.status()
    assert status["stage"] == "running"
    assert status["tests"] == []
    assert status["last-test"] == last
    with pytest.raises(nbd.Error):
        bench.server.connect(f"{top_id(0)}.test")
    assert whole(bench.server.connect(top_id(0))) == OLD
    assert whole(bench.test()) == OLD
    assert not (bench.server.state / ".test.left.data").exists()


def test_a_test_ends_by_itself_when_nobody_stops_it_in_time_and_has_failed(lab: Lab) -> None:
    bench = Bench(lab)
    with bench.server.qmp() as events:
        bench.server.execute("replication-test-start", timeout=0.1)
        assert events.wait_event(EVENT)["data"]["state"] == "started"
        event = events.wait_event(EVENT)["data"]
    assert (event["state"], event["result"]) == ("stopped", "failed")
    assert "nobody has stopped it" in event["reason"]
    assert bench.server.status()["tests"] == []
    assert bench.server.status()["last-test"]["result"] == "failed"


def test_who_has_begun_a_test_that_is_over_stops_no_later_one_of_its_name(lab: Lab) -> None:
    bench = Bench(lab)
    first = bench.server.execute("replication-test-start", name="run")["id"]
    assert bench.stop("run", id=first)["result"] is None
    later = bench.test("run")
    for given in ({"name": "run"}, {}):
        assert code_of(bench.server, "replication-test-stop", id=first, result="passed", **given) == "no-test"
    assert bytes(later.pread(BLOCK, 0)) == OLD[:BLOCK]
    assert bench.server.status()["last-test"] is None
    bench.stop("run", result="passed")
    assert bench.server.status()["last-test"]["result"] == "passed"


def test_an_old_connection_does_not_get_into_the_next_test_of_the_name(lab: Lab) -> None:
    bench = Bench(lab)
    test = bench.test()
    bench.stop()
    bench.test()
    with nbd_refusal(errno.ESHUTDOWN):
        test.pwrite(b"x", 0)
    wait_until(lambda: len(bench.server.status()["tests"]) == 1, "there is one")


# -- replctl -------------------------------------------------------------------------------------------------------


def replctl(server: Secondary, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, REPOSITORY / "scripts/replctl", "--state", server.state, *arguments],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )


TRIED = """
import nbd, os, sys
disk = nbd.NBD()
disk.connect_uri(os.environ["REPLICATION_TEST_URI"])
disk.pwrite(b"x" * 4096, 0)
sys.exit(disk.pread(4096, 0) != b"x" * 4096 or disk.pread(4096, 4096).hex() != sys.argv[1])
"""


def test_a_test_is_run_by_replctl_from_beginning_to_end(lab: Lab) -> None:
    bench = Bench(lab)
    run = ("test", "run", "--uri", bench.server.uri(), "--", sys.executable, "-c", TRIED)
    done = replctl(bench.server, *run, OLD[BLOCK : 2 * BLOCK].hex())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the test has passed in ")
    last = bench.server.status()["last-test"]
    assert (last["result"], last["name"], last["reason"]) == ("passed", "run", None)
    assert last["rto"] > 0
    done = replctl(bench.server, *run, "00")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the test has failed: " in done.stderr
    status = bench.server.status()
    assert status["last-test"]["result"] == "failed"
    assert status["tests"] == []
    assert whole(bench.guest) == OLD
    shown = replctl(bench.server, "status").stdout
    assert ", failed (" in shown
    started = replctl(bench.server, "test", "start", "--name", "a", "--uri", bench.server.uri())
    assert started.stdout.startswith("test a, of checkpoint ")
    uri = started.stdout.split()[-1]
    handle = nbd.NBD()
    handle.connect_uri(uri)
    assert bytes(handle.pread(BLOCK, 0)) == OLD[:BLOCK]
    assert replctl(bench.server, "test", "stop").stdout == "test a is over, and nothing of it is left\n"
    assert replctl(bench.server, "test", "stop").returncode == 1


def test_a_failover_in_the_midst_of_a_run_leaves_no_result(lab: Lab) -> None:
    bench = Bench(lab)
    failover = f"{sys.executable} {REPOSITORY / 'scripts/replctl'} --state {bench.server.state} failover --yes"
    failing = f"until {failover}; do sleep 0.1; done"  # as it says where the storage is slow
    done = replctl(bench.server, "test", "run", "--uri", bench.server.uri(), "--", "sh", "-c", failing)
    assert done.returncode == 1
    assert "the test has no result: the stage is failover" in done.stderr
    assert bench.server.status()["last-test"] is None
    assert bench.server.wait_stage("done")["tests"] == []


def test_a_disk_may_be_called_test(lab: Lab) -> None:
    """Its overlays are in the state folder, where files of tests are made and those of a killed process removed."""
    disk = make_raw(lab.folder / "disk.raw", SIZE, OLD)
    arguments = ["mode=secondary", f"state={lab.folder / 'state'}", f"disk=test:{disk}", "top-id=top"]
    server = lab.start(Server(lab.folder, "secondary", arguments))
    server.execute("xen-set-replication", enable=True, primary=False)
    server.connect("test").pwrite(b"\x02" * BLOCK, 0)
    server.execute("replication-test-start")
    assert whole(server.connect("top.test")) == OLD
    server.connect("test").pwrite(b"\x03" * BLOCK, BLOCK)
    server.kill()
    server.start()
    assert whole(server.connect("top")) == OLD
    server.execute("replication-test-start")
    assert whole(server.connect("top.test")) == OLD
    server.execute("xen-colo-do-checkpoint")
