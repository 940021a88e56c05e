# SPDX-License-Identifier: BSD-3-Clause
"""follow-owner=true: a guest has the disk over the socket of its own host, whoever owns it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from subprocess import CompletedProcess

import nbd
import pytest

from commandline import replctl
from content import MIB, whole
from lab import Lab
from nodes import Server, code_of, nbd_refusal, refused, top_id
from qmp import QmpError
from standing import completed, stands
from twins import Twins
from waiting import DEADLINE_S, begin, wait_until

GUEST = top_id(0)


def owned_by_a(lab: Lab, environment: Mapping[str, str] | None = None) -> Twins:
    """A owns the disk, and B is its secondary."""
    made = Twins(lab, "follow-owner=true", environment=environment)
    made.a.execute("replication-set-role", role="primary")
    made.joined(made.a)
    return made


@pytest.fixture
def twins(lab: Lab) -> Twins:
    return owned_by_a(lab)


def wait_connection_lost(guest: nbd.NBD) -> None:
    """Until none of a guest's requests is in flight any more."""

    def over() -> bool:
        with suppress(nbd.Error):
            guest.poll(100)
        return not guest.aio_in_flight()

    wait_until(over, "its connection is lost", DEADLINE_S)


def test_a_guest_on_the_secondary_uses_the_owners_disk(twins: Twins) -> None:
    here, there = twins.a.connect(GUEST), twins.b.connect(GUEST)
    here.pwrite(b"1" * 4096, 0)
    there.pwrite(b"2" * 4096, 4096)
    there.zero(4096, 8192)
    there.trim(4096, 12288)
    there.pwrite(b"3" * 512, 16384, nbd.CMD_FLAG_FUA)
    there.flush()
    expected = b"1" * 4096 + b"2" * 4096 + bytes(8192) + b"3" * 512
    for handle in (here, there):
        assert bytes(handle.pread(len(expected), 0)) == expected
    assert twins.a.disks[0].read_bytes()[: len(expected)] == expected
    status = twins.b.status()
    assert status["disks"][0]["active-bytes"] == 0, "nothing was written here"
    idle = {"owner-heard": True, "obstacle": None, "guests": 1, "held": False, "in-flight": 0, "waiting": 0}
    idle |= {"handed-over": False, "owner-left": False, "guests-over": 0}
    assert status["passing"] == idle
    answer = twins.b.execute("query-role")
    assert (answer["role"], answer["may-run"], answer["code"]) == ("secondary", None, "passes-on")
    twins.joined(twins.a)
    assert twins.b.disks[0].read_bytes()[: len(expected)] == expected, "it is replicated as what a guest there writes"


def test_nothing_is_passed_on_by_who_is_not_the_owners_secondary(twins: Twins) -> None:
    """Nor to a node that is no owner, so nothing is passed on twice."""
    for node in (twins.a, twins.b):
        for token in ("", "0" * 32):
            with pytest.raises(nbd.Error):
                node.connect(f".owner:{token}:disk0")
        node.wait_said("there is nothing to pass on", 2)


def test_a_hold_ends_by_itself_and_by_a_word(twins: Twins) -> None:
    a, b = twins.a, twins.b
    assert code_of(a, "replication-suspend-io", timeout=1) == "wrong-stage"
    assert "60" in refused(b, "replication-suspend-io", {"timeout": 61})
    handle = b.connect(GUEST)
    handle.pwrite(b"1" * 512, 0)
    b.execute("replication-suspend-io", timeout=60)
    write = handle.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 0)
    wait_until(lambda: b.status()["passing"]["waiting"] == 1, "the request waits", DEADLINE_S)
    assert a.disks[0].read_bytes()[:1] == b"1"
    b.execute("replication-resume-io")
    completed(handle, write)
    assert a.disks[0].read_bytes()[:512] == b"2" * 512
    begun = time.monotonic()
    b.execute("replication-suspend-io", timeout=1)
    handle.pwrite(b"3" * 512, 0)
    assert time.monotonic() - begun >= 1
    assert not b.status()["passing"]["held"]


def test_the_end_of_a_hold_ends_no_other_standstill(twins: Twins) -> None:
    """The disk has moved meanwhile, and the cluster says that yet another node went on."""
    a, b = twins.a, twins.b
    b.execute("replication-suspend-io", timeout=60)
    a.execute("replication-stop")
    b.execute("replication-stop")
    b.execute("replication-outdate", reason="the cluster has promoted c")
    b.execute("replication-suspend-io", timeout=0)
    status = b.status()
    assert (status["passing"]["held"], status["guest-suspended-reason"]["code"]) == (False, "outdated")


def test_without_the_key_nothing_is_passed_on(lab: Lab) -> None:
    twins = Twins(lab)
    assert code_of(twins.b, "replication-suspend-io", timeout=1) == "wrong-mode"
    assert "passing" not in twins.b.status()


class Guest:
    """Writes its next record (its number, in a block of its own) when the former one is answered, and remembers which
    were: a disk that has lost one, or has an older one, shows it. One request at a time."""

    BLOCK = 512
    COUNT = MIB // BLOCK

    def __init__(self, server: Server, after: int = 0) -> None:
        self.answered = after
        self.failure: Exception | None = None
        self.still = threading.Lock()
        """Who holds it keeps the guest from writing: one that never rests may keep a resync from its end."""
        self._handle = server.connect(GUEST)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def record(self, number: int) -> bytes:
        return number.to_bytes(8, "big") * (self.BLOCK // 8)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with self.still:
                    number = self.answered + 1
                    self._handle.pwrite(self.record(number), number % self.COUNT * self.BLOCK)
                    self.answered = number
                self._stop.wait(0.001)  # whoever wants it to stand still gets his turn
        except nbd.Error as error:
            self.failure = error

    def wait_more(self, count: int = 20) -> None:
        goal = self.answered + count
        wait_until(lambda: self.failure or self.answered >= goal, "the guest goes on", DEADLINE_S)
        assert self.failure is None

    def finish(self) -> bytes:
        """End it; what the disk has to hold, but for the block of the next record."""
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        assert self.failure is None
        first = max(1, self.answered - self.COUNT + 1)
        image = bytearray(MIB)
        for number in range(first, self.answered + 1):
            at = number % self.COUNT * self.BLOCK
            image[at : at + self.BLOCK] = self.record(number)
        return bytes(image)


def move(here: Server, peer: Server, *more: str) -> CompletedProcess[str]:
    """`replctl switchover --live`, given at one of the two."""
    command = ("switchover", "--live", "--within", "60", "--yes", *more, "--peer", peer.control_path)
    return replctl("--state", here.state, *command)


def check_goes_on(guest: Guest, twins: Twins, owner: Server) -> None:
    """It writes still, and both disks have in the end what it has written."""
    guest.wait_more()
    image = guest.finish()
    twins.joined(owner)
    for node in (twins.a, twins.b):
        assert node.disks[0].read_bytes() == image


def test_the_disk_moves_under_a_guest_that_goes_on_and_back(lab: Lab, twins: Twins) -> None:
    a, b = twins.a, twins.b
    guest = Guest(b)
    guest.wait_more()
    done = move(a, b, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["owner"], answer["done"]) == ("peer", True)
    guest.wait_more()
    with guest.still:
        twins.joined(b)
    assert (b.status()["mode"], a.status()["mode"]) == ("primary", "secondary")
    guest.wait_more()
    assert b.status()["disks"][0]["totals"]["written"] > 0, "it is served where it runs"
    again = move(b, a)
    assert (again.returncode, "no guest is attached" in again.stderr) == (1, True)
    # The way back begins with the migration, here: a guest that goes on over the other socket.
    image = guest.finish()
    assert whole(b.connect(GUEST)) == image
    guest = Guest(a, guest.answered)
    guest.wait_more()
    done = move(a, b)
    assert done.returncode == 0, done.stderr
    check_goes_on(guest, twins, a)


def test_a_guest_that_writes_on_the_owners_host_is_no_guest_to_move(lab: Lab) -> None:
    """It would go on there, on a disk that nobody owns. Everything is as before."""
    points = lab.pause_points()
    twins = owned_by_a(lab, environment=points.environment)
    a, b = twins.a, twins.b
    here, there = Guest(a), b.connect(GUEST)
    here.wait_more()
    points.arm("epoch.reached")
    moving = begin(move, a, b)
    points.wait_hit("epoch.reached")
    here.wait_more()
    points.release("epoch.reached")
    done = moving.result(DEADLINE_S)
    assert (done.returncode, "the guest still writes" in done.stderr) == (1, True), done.stderr
    assert "nothing has changed" in done.stderr
    here.wait_more()
    image = here.finish()
    twins.joined(a)
    assert whole(there) == image
    assert (a.status()["stage"], b.status()["stage"], b.status()["passing"]["held"]) == ("running", "running", False)


def test_a_guest_waits_for_an_owner_that_is_started_again(twins: Twins) -> None:
    """What had been sent when its process was killed is done once more, and nothing else is."""
    a, b = twins.a, twins.b
    guest = Guest(b)
    guest.wait_more()
    for _ in range(2):
        a.kill()
        a.start()
        guest.wait_more()
    image = guest.finish()
    assert whole(b.connect(GUEST)) == image
    assert a.disks[0].read_bytes() == image


def test_a_guest_goes_on_with_the_disk_of_a_secondary_that_is_stopped(twins: Twins) -> None:
    """Its primary ends the stream behind all that the guest was answered for."""
    b = twins.b
    guest = Guest(b)
    guest.wait_more()
    b.execute("replication-stop")
    guest.wait_more()
    assert b.status()["stage"] == "done"
    image = guest.finish()
    assert whole(b.connect(GUEST)) == image
    assert b.disks[0].read_bytes() == image


@pytest.mark.parametrize("checkpoint", [False, True], ids=["after-a-checkpoint", "idle-since"])
def test_a_guest_goes_on_where_an_owner_has_left_in_good_order(twins: Twins, checkpoint: bool) -> None:
    """Whether it takes a planned stop to keep all of it, or the last checkpoint has it."""
    a, b = twins.a, twins.b
    guest = b.connect(GUEST)
    guest.pwrite(b"1" * 512, 0)
    if checkpoint:
        a.execute("replication-checkpoint")
    a.terminate()
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 512)
    wait_until(lambda: b.status()["passing"]["waiting"], "the guest waits", DEADLINE_S)
    assert b.status()["passing"]["owner-left"], "however long it takes"
    b.execute("replication-set-role", role="primary")
    completed(guest, write)
    b.wait_stage("done")
    assert b.status()["passing"]["guests-over"] == 0
    assert b.disks[0].read_bytes()[:1024] == b"1" * 512 + b"2" * 512


READER = """
import sys, nbd
guest = nbd.NBD()
guest.connect_uri(sys.argv[1])
sys.stdout.buffer.write(guest.pread(int(sys.argv[2]), 0))
"""


def content_for_another(server: Server, length: int) -> bytes:
    """What a guest reads that has not been there before."""
    command = [sys.executable, "-c", READER, server.uri(GUEST), str(length)]
    return subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S).stdout


def refused_guest(server: Server) -> None:
    """This process has used another disk."""
    with pytest.raises(nbd.Error):
        server.connect(GUEST)
    why = "this guest has used a disk that is another one now"
    wait_until(lambda: why in server.stderr(), "nbdkit says why", DEADLINE_S)


def test_a_failover_ends_the_guest_whose_disk_goes_back(twins: Twins) -> None:
    """What it was answered for after the checkpoint is gone: it must not go on as if it were there."""
    a, b = twins.a, twins.b
    guest = b.connect(GUEST)
    guest.pwrite(b"1" * 512, 0)
    a.execute("replication-checkpoint")
    guest.pwrite(b"2" * 512, 0)
    a.kill()
    b.failover()
    for request in (lambda: guest.pwrite(b"3" * 512, 512), lambda: guest.pread(512, 0), guest.flush):
        with nbd_refusal(errno.EIO):
            request()
    # It connects by itself, over the next process as well; another one is let in, and so is it by a word.
    refused_guest(b)
    assert content_for_another(b, 1024) == b"1" * 512 + bytes(512)
    b.wait_stage("done")
    b.kill()
    b.start()
    refused_guest(b)
    assert b.status()["passing"]["guests-over"] == 1
    assert content_for_another(b, 1024) == b"1" * 512 + bytes(512)
    b.execute("replication-resume-io", fenced=True)
    refused_guest(b)
    b.execute("replication-outdate", reason="the cluster has promoted c")
    b.execute("replication-resume-io")
    refused_guest(b)  # what was said ends the standstill, and nothing else
    b.execute("replication-resume-io")
    heir = b.connect(GUEST)
    assert bytes(heir.pread(1024, 0)) == b"1" * 512 + bytes(512)
    heir.pwrite(b"4" * 512, 0)
    assert bytes(heir.pread(512, 0)) == b"4" * 512


def test_a_failover_that_nothing_can_be_saved_of_serves_the_next_guest_at_once(lab: Lab) -> None:
    """And ends the former one: the state folder hangs, so the disk counts as in stage running for a while."""
    points = lab.pause_points()
    twins = owned_by_a(lab, environment=points.environment)
    a, b = twins.a, twins.b
    guest = b.connect(GUEST)
    guest.pwrite(b"1" * 512, 0)
    a.execute("replication-checkpoint")
    guest.pwrite(b"2" * 512, 0)
    a.kill()
    points.arm("record.sync")
    b.execute("replication-stop", failover=True, force=True)
    assert json.loads((b.state / "state.json").read_text())["stage"] == "running"
    with nbd_refusal(errno.EIO):
        guest.pread(512, 0)
    assert content_for_another(b, 1024) == b"1" * 512 + bytes(512)
    refused_guest(b)
    points.release("record.sync")
    b.wait_stage("done")
    assert content_for_another(b, 1024) == b"1" * 512 + bytes(512)


def test_a_guest_of_an_owner_is_not_passed_on_when_that_is_made_a_secondary(twins: Twins) -> None:
    """Perhaps the other one lacks what it has written, and another guest runs there."""
    a, b = twins.a, twins.b
    guest = a.connect(GUEST)
    guest.pwrite(b"1" * 512, 0)
    a.execute("replication-set-role", role="secondary")
    b.execute("replication-set-role", role="primary")
    twins.joined(b)
    with nbd_refusal(errno.EIO):
        guest.pwrite(b"2" * 512, 0)
    for _ in range(2):
        refused_guest(a)
        assert content_for_another(a, 512) == b"1" * 512
        a.kill()
        a.start()
        twins.joined(b)
    a.execute("replication-resume-io")
    heir = a.connect(GUEST)
    assert bytes(heir.pread(512, 0)) == b"1" * 512
    heir.pwrite(b"3" * 512, 0)
    assert b.disks[0].read_bytes()[:512] == b"3" * 512


def test_a_switch_over_that_was_cut_off_is_taken_back(twins: Twins) -> None:
    """By the word that docs/operating/live-migration.md has for it."""
    a, b = twins.a, twins.b
    guest = Guest(b)
    guest.wait_more()
    b.execute("replication-suspend-io", timeout=60)
    a.execute("replication-checkpoint")
    a.execute("replication-stop")
    b.execute("replication-suspend-io", timeout=0)
    wait_until(lambda: b.status()["passing"]["waiting"], "the guest waits", DEADLINE_S)
    done = replctl("--state", a.state, "promote", "--yes")
    assert done.returncode == 0, done.stderr
    check_goes_on(guest, twins, a)


@pytest.mark.parametrize("moved", [False, True], ids=["before the secondary stopped", "after it"])
def test_a_switch_over_that_was_cut_off_is_finished_by_a_second_one(twins: Twins, moved: bool) -> None:
    a, b = twins.a, twins.b
    guest = Guest(b)
    guest.wait_more()
    a.execute("replication-stop")
    if moved:
        b.execute("replication-stop")
        guest.wait_more()
    else:
        # Its request waits, and nobody owns the disk.
        wait_until(lambda: b.status()["passing"]["waiting"], "the guest waits", DEADLINE_S)
    done = move(a, b)
    assert done.returncode == 0, done.stderr
    check_goes_on(guest, twins, b)


@pytest.mark.parametrize("how", ["failed over", "went back", "written to"])
def test_what_is_over_is_no_move_to_finish_when_both_have_gone_on(twins: Twins, how: str) -> None:
    """Another switch-over, or a failover, has made B an owner; A has what B lacks, and would lose it."""
    a, b = twins.a, twins.b
    guest = a.connect(GUEST)
    guest.pwrite(b"0" * 512, 0)
    if how == "failed over":
        b.failover()
        b.wait_stage("done")
        a.execute("replication-stop")
    elif how == "went back":
        a.execute("replication-stop")
        b.failover()
        b.wait_stage("done")
    else:
        a.execute("replication-stop")
        b.execute("replication-stop")
        guest.pwrite(b"1" * 512, 0)
    before = [node.execute("query-role")["role"] for node in (a, b)]
    done = replctl("--state", a.state, "switchover", "--live", "--yes", "--peer", b.control_path)
    assert (done.returncode, "both own a disk" in done.stderr) == (1, True), done
    assert [node.execute("query-role")["role"] for node in (a, b)] == before


def test_what_is_passed_on_stands_still_with_the_owners_guest(twins: Twins) -> None:
    a, b = twins.a, twins.b
    guest = b.connect(GUEST)
    guest.pwrite(b"1" * 512, 0)
    a.execute("replication-outdate", reason="the cluster has promoted c")
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 0)
    stands(a, guest, write)
    assert a.disks[0].read_bytes()[:1] == b"1"
    a.execute("replication-resume-io")
    completed(guest, write)
    assert a.disks[0].read_bytes()[:512] == b"2" * 512


WRITER = """
import sys, nbd
guest = nbd.NBD()
guest.connect_uri(sys.argv[1])
write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"1" * 512), 0)
guest.poll(0)
print("sent", flush=True)
while True:
    guest.poll(-1)
"""


def test_what_stands_still_of_a_guest_that_has_gone_is_not_done_after_that(twins: Twins) -> None:
    """Another one may use the disk by then."""
    a, b = twins.a, twins.b
    a.execute("replication-outdate", reason="the cluster has promoted c")
    with subprocess.Popen([sys.executable, "-c", WRITER, b.uri(GUEST)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"sent\n"
        wait_until(lambda: b.status()["passing"]["in-flight"] == 1, "the owner has it", DEADLINE_S)
        writer.kill()
    wait_until(lambda: b.status()["passing"]["in-flight"] == 0, "it is given up", DEADLINE_S)
    heir = b.connect(GUEST)
    write = heir.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 512)
    a.execute("replication-resume-io")
    completed(heir, write)
    assert bytes(heir.pread(1024, 0)) == bytes(512) + b"2" * 512


def test_what_the_owner_has_when_a_secondary_is_ended_gets_no_error(twins: Twins) -> None:
    """A guest whose connection is lost asks again; one that gets an error has lost its disk."""
    a, b = twins.a, twins.b
    guest = b.connect(GUEST)
    guest.pwrite(b"1" * 512, 0)
    a.execute("replication-outdate", reason="the cluster has promoted c")
    writes = [guest.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 512 * number) for number in range(6)]
    wait_until(lambda: b.status()["passing"]["in-flight"] == len(writes), "the owner has them", DEADLINE_S)
    os.kill(b.pid, signal.SIGTERM)
    wait_connection_lost(guest)
    for write in writes:
        with nbd_refusal(errno.ENOTCONN):
            guest.aio_command_completed(write)
    b.terminate()


def test_a_guest_that_waits_for_an_owner_does_not_keep_the_process(twins: Twins) -> None:
    """Nor does it get an error of its disk: it asks again over its next connection."""
    a, b = twins.a, twins.b
    guest = b.connect(GUEST)
    a.kill()
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 0)
    wait_until(lambda: b.status()["passing"]["waiting"], "it waits", DEADLINE_S)
    os.kill(b.pid, signal.SIGTERM)
    wait_connection_lost(guest)
    with nbd_refusal(errno.ENOTCONN):
        guest.aio_command_completed(write)
    b.terminate()


def test_what_the_owner_has_answered_is_in_front_of_the_end_of_its_stream(lab: Lab) -> None:
    """The secondary is stopped, and the stream is cut: what comes then is the secondary's own to do."""
    points = lab.pause_points()
    b = owned_by_a(lab, environment=points.environment).b
    guest = b.connect(GUEST)
    guest.pwrite(b"1" * 512, 0)
    points.arm("epoch.cut")
    stopping = begin(b.execute, "replication-stop")
    points.wait_hit("epoch.cut")
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 512)
    wait_until(lambda: b.status()["passing"]["waiting"], "the request is nobody's", DEADLINE_S)
    points.release("epoch.cut")
    with suppress(QmpError):  # where the primary was too slow for it
        stopping.result(DEADLINE_S)
    b.execute("replication-stop")
    completed(guest, write)
    assert b.disks[0].read_bytes()[:1024] == b"1" * 512 + b"2" * 512
