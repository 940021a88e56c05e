# SPDX-License-Identifier: BSD-3-Clause
"""The link of a pair over a network that fails, under load: case 8 of docs/failures.md, and coming back by itself.

Two hosts and a relay (wire.py), a guest that writes all the time and knows what its disk must hold (netpair.py). After
each fault: how long the guest has waited, both disks, what the secondary's guest sees, how much was sent again, and
which events came in which order.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from content import KIB, MIB
from lab import Lab
from namespaces import Host
from nbdprocess import silent
from netpair import PORT, SECTOR, SIZE, Instant, NetPair, NetSecondary, stamps_in
from nodes import drained, refused, top_id
from process import Process
from waiting import DEADLINE_S, wait_until
from wire import Wire

TIMEOUT_S = 2.0

GOES_ON_S = 1.5
"""Longest wait of a guest that waits for nobody: less than the timeout, and all of it is a busy machine's."""

SYNC_S = 1.25 * TIMEOUT_S + 2.5
"""Longest wait of a guest that waits for both disks, when one of them falls silent."""

NOTICED_S = 1.25 * TIMEOUT_S + 4.0
"""From a fault to the event, which a request's own limit of four timeouts would bring later."""

BACK = ["lost", "connecting", "synchronizing", "in-sync"]

HERE = (8 * MIB, 16 * MIB)
"""Where the guest writes while a fault lasts: an eighth of the disk, so a full resync would be noticed."""

Made = Callable[..., NetPair]

pytestmark = pytest.mark.usefixtures("networks")


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A perfect network, which outlives the pair."""
    with Wire(seed=1) as made:
        yield made


@pytest.fixture
def make_pair(wire: Wire, lab: Lab) -> Iterator[Made]:
    """Makes a NetPair that is in sync and under load."""
    with contextlib.ExitStack() as ending:

        def made(*arguments: str, timeout_s: float = TIMEOUT_S, **options: Any) -> NetPair:
            pair = NetPair(lab, wire, timeout_s=timeout_s, primary_arguments=arguments, **options)
            # The network first: a node that ends has something to say.
            ending.callback(pair.close)
            ending.callback(wire.mend)
            pair.start()
            return pair

        yield made


def lasting(pair: NetPair, seconds: float) -> None:
    """Let a fault last, while the guest goes on and the status is asked for."""
    until = time.monotonic() + seconds
    wait_until(lambda: pair.watch.look() and time.monotonic() >= until, "time passes")


def begin(pair: NetPair) -> Instant:
    """The guest goes where it stays during the fault, which begins now, in the midst of its writes."""
    with pair.load.pausing():
        drained(pair.primary)  # what was written elsewhere is not to be sent again
        pair.load.region = HERE
        settled = time.monotonic()
    pair.load.wait_more()
    return pair.instant(settled)


def check_latched(pair: NetPair) -> None:
    """The primary says that its link is at fault."""
    assert refused(pair.primary, "replication-get-error") == "I/O error occurred"
    assert pair.watch.look()["error"]["case"] == 8
    assert set(pair.watch.cases) == {8}


def check_back(pair: NetPair, fault: Instant, mended: float) -> None:
    """Wait until the pair is in sync again, by itself, and check what that has cost."""
    pair.watch.wait_state("in-sync")
    pair.load.wait_more()
    with pair.load.pausing():
        sent, changed = pair.check_little_was_sent(fault, mended)
    print(f"resync: {sent / MIB:.1f} MiB sent, {changed / MIB:.1f} changed; guest waited {pair.load.longest_s:.3f} s")


SILENCES: dict[str, Callable[[Wire], None]] = {
    "cut": Wire.cut,
    "both": Wire.blackhole,
    "there": lambda wire: wire.blackhole("ab"),
    "back": lambda wire: wire.blackhole("ba"),
}


@pytest.mark.parametrize("kind", SILENCES)
@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_silent_network_costs_one_timeout_and_what_changed_meanwhile(
    make_pair: Made, wire: Wire, kind: str, protocol: str
) -> None:
    pair = make_pair(f"protocol={protocol}")
    fault = begin(pair)
    SILENCES[kind](wire)
    pair.watch.wait_lost()
    assert time.monotonic() - fault.at <= NOTICED_S
    check_latched(pair)
    pair.load.wait_more(200)
    assert pair.watch.look()["link"]["state"] == "lost"
    pair.check_guest_sees_checkpoint()
    wire.mend()
    mended = time.monotonic()
    check_back(pair, fault, mended)
    assert pair.watch.links == BACK
    # The error stays, and the secondary's guest sees what it saw, until the next checkpoint.
    check_latched(pair)
    pair.check_guest_sees_checkpoint()
    pair.finish()
    if protocol == "async":
        pair.check_waits(GOES_ON_S)
    else:
        pair.check_waits(SYNC_S)
        # Once for the timeout, not once a write; what is shorter may be a busy machine's.
        assert sum(took >= TIMEOUT_S for _, took in pair.load.waits) <= 1, pair.load.waits


def test_a_full_queue_holds_the_guest_up_once_and_for_a_timeout_at_most(make_pair: Made, wire: Wire) -> None:
    pair = make_pair("queue-limit=1M", rate=15 * MIB)
    fault = begin(pair)
    wire.blackhole()
    pair.watch.wait_lost()
    assert time.monotonic() - fault.at <= NOTICED_S
    pair.load.wait_more(300)
    pair.check_waits(SYNC_S)
    held_up = [took for begun, took in pair.load.waits if begun + took > fault.at and took > GOES_ON_S]
    assert len(held_up) == 1, f"the queue holds a fifteenth of a second's writes: {pair.load.waits}"
    wire.mend()
    check_back(pair, fault, time.monotonic())
    assert pair.watch.links == BACK
    pair.finish()
    pair.check_waits(SYNC_S)


def test_a_cut_of_a_second_within_the_timeout_is_ridden_out(make_pair: Made, wire: Wire) -> None:
    pair = make_pair("checkpoint-interval=0.2", timeout_s=6)
    fault = begin(pair)
    wire.cut()
    lasting(pair, 1.0)
    wire.mend()
    pair.checkpoint()
    assert pair.watch.links == []
    assert pair.watch.cases == []
    with pair.load.pausing():
        drained(pair.primary)
        sent = pair.forwarded() - fault.forwarded
        assert sent <= pair.load.written_bytes(fault.since)
    pair.finish()
    pair.check_waits(GOES_ON_S)


@pytest.mark.parametrize(("cut_s", "timeout_s"), [(1.0, 0.5), (30.0, 2.0)])
def test_a_cut_beyond_the_timeout_ends_with_the_next_automatic_checkpoint(
    make_pair: Made, wire: Wire, cut_s: float, timeout_s: float
) -> None:
    pair = make_pair("checkpoint-interval=0.2", timeout_s=timeout_s)
    fault = begin(pair)
    wire.cut()
    pair.watch.wait_lost()
    lasting(pair, cut_s - (time.monotonic() - fault.at))
    check_latched(pair)
    taken = pair.watch.checkpoints
    wire.mend()
    mended = time.monotonic()
    check_back(pair, fault, mended)
    print(f"back after {time.monotonic() - mended:.1f} s")
    assert pair.watch.links == BACK
    wait_until(lambda: pair.watch.look() and pair.watch.checkpoints > taken, "a checkpoint")
    wait_until(lambda: pair.watch.look()["error"] is None, "the error ends with it")
    pair.finish()
    pair.check_waits(GOES_ON_S)


def test_loss_and_delay_slow_the_secondary_down_and_not_the_guest(make_pair: Made, wire: Wire) -> None:
    pair = make_pair("checkpoint-interval=0.5", timeout_s=10, rate=100 * KIB, length_max=8 * KIB)
    wire.shape(delay=50, loss=5)
    taken = pair.watch.checkpoints
    lasting(pair, 6)
    wait_until(lambda: pair.watch.look() and pair.watch.checkpoints > taken + 2, "checkpoints are taken")
    assert wire.counters()["ab"].lost > 0
    pair.load.stop()
    drained(pair.primary)
    assert pair.watch.look()["link"]["state"] == "in-sync"
    assert pair.watch.links == []
    wire.shape()
    pair.finish()
    pair.check_waits(GOES_ON_S)


def test_a_link_too_slow_for_the_guest_pushes_back_and_is_not_lost(make_pair: Made, wire: Wire) -> None:
    pair = make_pair("queue-limit=1M", timeout_s=1, rate=100e6 / 8)
    wire.shape(rate=10e6)
    begun = time.monotonic()
    lasting(pair, 6)
    written = pair.load.written_bytes(begun)
    lasted = time.monotonic() - begun
    status = pair.watch.look()
    assert status["link"]["state"] == "in-sync"
    assert pair.watch.links == []
    assert pair.watch.cases == []
    # What the link carries, and what fits into the queue and the sockets.
    assert 0.5 * lasted * 10e6 / 8 <= written <= 1.05 * lasted * 10e6 / 8 + 6 * MIB
    assert 0 < status["disks"][0]["forward-queue-bytes"] <= MIB
    wire.shape()
    pair.finish()
    pair.check_waits(1.25 * pair.timeout_s + 2.5)


def test_connections_that_are_reset_in_mid_request_are_made_again(make_pair: Made, wire: Wire) -> None:
    pair = make_pair("checkpoint-interval=0.1", rate=30 * MIB, length_max=256 * KIB)
    for number in range(1, 4):
        fault = begin(pair)
        assert wire.reset() >= 2
        mended = time.monotonic()
        pair.watch.wait_lost()
        check_back(pair, fault, mended)
        assert pair.watch.links == BACK * number
    pair.finish()
    pair.check_waits(GOES_ON_S)


def test_a_killed_secondary_comes_back_with_its_checkpoint_and_gets_what_it_lacks(make_pair: Made) -> None:
    pair = make_pair()
    fault = begin(pair)
    pair.secondary.kill()
    pair.watch.wait_lost(NOTICED_S)
    check_latched(pair)
    pair.load.wait_more(100)
    mended = time.monotonic()
    pair.secondary.start()
    check_back(pair, fault, mended)
    assert pair.watch.links == BACK
    pair.check_guest_sees_checkpoint()
    pair.finish()
    pair.check_waits(GOES_ON_S)


@pytest.mark.parametrize("both", [False, True], ids=["alone", "with-its-secondary"])
def test_a_killed_primary_sends_what_was_on_its_way_and_no_more(make_pair: Made, both: bool) -> None:
    pair = make_pair("checkpoint-interval=0.3")
    pair.load.outages_allowed = True
    fault = begin(pair)
    pair.primary.kill()
    if both:
        pair.secondary.kill()
        pair.secondary.start()
    mended = time.monotonic()
    pair.primary.start()
    pair.reconnect()
    pair.watch.wait_state("in-sync")
    pair.load.wait_more()
    with pair.load.pausing():
        sent, changed = pair.check_little_was_sent(fault, mended, forwarded=0)
    print(f"{sent} sent, {changed} changed")
    assert pair.watch.look()["link"]["state"] == "in-sync"
    pair.load.wait_more()
    pair.finish()
    pair.check_waits(GOES_ON_S)


def test_a_secondary_that_stood_still_comes_back_and_has_nothing_old_after_newer_writes(make_pair: Made) -> None:
    # Twice the timeout's worth fits into the queue.
    pair = make_pair(rate=15 * MIB, length_max=128 * KIB)
    # The same place over and over: whatever is late is older than what is there.
    pair.load.region = (0, MIB)
    pair.load.wait_more(200)
    with silent(pair.secondary):
        pair.watch.wait_lost(NOTICED_S)
        pair.load.wait_more(200)
    pair.watch.wait_state("in-sync")
    assert pair.watch.links == BACK
    pair.load.wait_more()
    pair.finish()
    pair.check_waits(GOES_ON_S)


def waits_at_the_gate(secondary: NetSecondary) -> bool:
    """Whether a read of the secondary's guest waits: a command has closed the gate, and waits for a request in it."""
    handle = secondary.connect(top_id(0))
    buffer = nbd.Buffer(SECTOR)
    cookie = handle.aio_pread(buffer, 0)
    until = time.monotonic() + 0.5
    while not handle.aio_command_completed(cookie):
        left_s = until - time.monotonic()
        if left_s <= 0:
            return True
        handle.poll(int(left_s * 1000) + 1)
    handle.shutdown()
    return False


def test_what_an_old_connection_has_in_its_socket_is_refused_once_there_is_a_new_one(make_pair: Made, lab: Lab) -> None:
    """
    old connection   W1 ......held......... done   W2 W3 ... (in the socket: one thread a connection)
    new connection            pairs, and waits    ^ from here on it alone may write
    """
    points = lab.pause_points()
    log = lab.folder / "requests.log"
    options = {
        "threads": 1,
        "extra_environment": points.environment,
        "filters": ["log"],
        "filter_arguments": [f"logfile={log}"],
    }
    # Few and small writes: each is soon in the socket as a whole, also one of a batch.
    pair = make_pair(rate=256 * KIB, length_max=4 * KIB, timeout_s=5.0, secondary_options=options)
    with pair.load.pausing():
        drained(pair.primary)
        pair.watch.wait_state("in-sync")  # a loss by a busy machine has been told: the next one is that of the write
        points.arm("target-write.written")
        already = log.stat().st_size
    points.wait_hit("target-write.written")
    pair.watch.wait_lost()
    wait_until(lambda: waits_at_the_gate(pair.secondary), "the primary pairs anew")
    points.release("target-write.written")
    pair.watch.wait_state("in-sync")
    pair.load.wait_more()
    pair.finish()
    requests = log.read_bytes()[already:].decode().splitlines()
    # Some of them zeroes, which are requests of another kind, also the one that was held.
    # What is no whole number of sectors is a message of the primary's, on the control connection.
    old = next(
        line for line in requests if re.search(r" (Write|Zero|Trim) id=.* count=0x\w*[02468ace]00 ", line)
    ).split()[2]
    ended = re.compile(rf" {old} \.\.\.(Write|Zero|Trim) id=")
    answers = [line.partition("return=")[2] for line in requests if ended.search(line)]
    assert answers[0] == "0", "the write that was held, which the new connection waited for"
    assert len(answers) > 1
    assert set(answers[1:]) == {"-1 error=ESHUTDOWN"}
    pair.check_waits(GOES_ON_S)


# --- somebody else at the secondary's address -----------------------------------------------------------------------


class PlainNbd(Process):
    """An nbdkit that just stores what it is sent, as whatever export, at the secondary's address."""

    def __init__(self, folder: Path, host: Host) -> None:
        super().__init__(folder, "plain")
        self.host = host
        self.disk = folder / "plain.raw"
        with open(self.disk, "wb") as file:
            file.truncate(SIZE)

    def command(self) -> list[str]:
        return [*self.host.prefix, "nbdkit", "-f", "--exit-with-parent", "-p", str(PORT), "file", str(self.disk)]

    def wait_ready(self) -> None:
        def accepts() -> bool:
            self.check_alive()
            with self.host.entered(), contextlib.suppress(ConnectionRefusedError):
                socket.create_connection((self.host.address, PORT), DEADLINE_S).close()
                return True
            return False

        wait_until(accepts, "the plain server accepts")


class Garbage:
    """A TCP server at the secondary's address which says `answer` to everybody, and then nothing."""

    def __init__(self, host: Host, answer: bytes) -> None:
        with host.entered():
            self._listener = socket.create_server((host.address, PORT))
        self._answer = answer
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, name="garbage", daemon=True)
        self._thread.start()

    @property
    def visits(self) -> int:
        """How many have come."""
        return len(self._clients)

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._clients.append(client)
            with contextlib.suppress(OSError):
                client.sendall(self._answer)

    def close(self) -> None:
        """End, with all connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        self._listener.close()
        for client in self._clients:
            client.close()


def wait_reason(pair: NetPair, reason: str) -> None:
    """Wait until the link is lost for that reason."""

    def told() -> bool:
        link = pair.watch.look()["link"]
        return link["state"] == "lost" and reason in link["reason"]

    wait_until(told, f"the link is lost because {reason}")


def allocated(path: Path) -> int:
    """Bytes that a file takes."""
    return path.stat().st_blocks * 512


def check_back_with_its_own(pair: NetPair, fault: Instant) -> None:
    """The right secondary is started again, and the pair is in sync by itself."""
    mended = time.monotonic()
    pair.secondary.start()
    check_back(pair, fault, mended)
    assert pair.watch.links[0] == "lost"
    assert pair.watch.links[-3:] == BACK[1:]
    assert set(pair.watch.links[:-3]) <= {"lost", "connecting"}
    pair.finish()
    pair.check_waits(GOES_ON_S)


def test_another_secondary_at_the_address_gets_nothing(make_pair: Made, wire: Wire) -> None:
    pair = make_pair()
    fault = begin(pair)
    pair.secondary.kill()
    pair.watch.wait_lost()
    with NetSecondary(pair.folder, wire.b, [SIZE], name="stranger") as stranger:
        stranger.start_replication()
        wait_reason(pair, "another secondary")
        pair.load.wait_more(100)
        assert stranger.status()["disks"][0]["totals"]["target-written"] == 0
        assert allocated(stranger.disks[0]) == 0
        assert stranger.status()["stage"] == "running"
    check_back_with_its_own(pair, fault)


def test_a_plain_nbd_server_at_the_address_gets_nothing(make_pair: Made, wire: Wire) -> None:
    pair = make_pair()
    fault = begin(pair)
    pair.secondary.kill()
    pair.watch.wait_lost()
    with PlainNbd(pair.folder, wire.b) as plain:
        wait_reason(pair, "not the secondary")
        pair.load.wait_more(100)
        assert allocated(plain.disk) == 0
    check_back_with_its_own(pair, fault)


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"NBDMAGICIHAVEOPT\0\3" + bytes(range(256)) * 256],
    ids=["silence", "another-protocol", "half-a-handshake"],
)
def test_a_server_at_the_address_that_makes_no_sense_does_no_harm(make_pair: Made, wire: Wire, answer: bytes) -> None:
    pair = make_pair()
    fault = begin(pair)
    pair.secondary.kill()
    pair.watch.wait_lost()
    with contextlib.closing(Garbage(wire.b, answer)) as garbage:
        wait_until(lambda: garbage.visits >= 2, "the primary has tried, and has tried again")
        pair.load.wait_more(100)
        assert pair.watch.look()["link"]["state"] == "lost"
    check_back_with_its_own(pair, fault)


# --- failover in the midst of it ------------------------------------------------------------------------------------


def check_stays(pair: NetPair) -> None:
    """Fail over in the midst of something: the disk is exactly the last checkpoint, and stays so although the primary
    goes on, and its network is in order again."""
    failed_over = pair.fail_over()
    pair.wire.mend()
    wait_until(lambda: pair.watch.look()["error"], "the primary notices")
    pair.load.wait_more(200)
    assert pair.watch.look()["link"]["state"] != "in-sync"
    pair.load.stop()
    pair.check_waits(GOES_ON_S)
    assert (stamps_in(pair.secondary.disks[0].read_bytes()) == failed_over).all()
    assert pair.secondary.status()["stage"] == "done"
    assert (stamps_in(pair.primary.disks[0].read_bytes()) == pair.load.after(pair.load.answered)).all()


@pytest.mark.parametrize("noticed", [False, True], ids=["before-it-is-noticed", "after-it-is-noticed"])
@pytest.mark.parametrize("kind", SILENCES)
def test_failover_in_the_midst_of_a_silence_is_exactly_the_last_checkpoint(
    make_pair: Made, wire: Wire, kind: str, noticed: bool
) -> None:
    pair = make_pair()
    pair.load.wait_more(100)
    pair.checkpoint()
    # Beyond the checkpoint, and on the secondary already.
    pair.load.wait_more(50)
    SILENCES[kind](wire)
    if noticed:
        pair.watch.wait_lost()
    check_stays(pair)


def test_the_link_is_lost_to_a_secondary_that_fails_over_while_it_is_in_order(make_pair: Made) -> None:
    pair = make_pair()
    pair.checkpoint()
    pair.load.wait_more(50)
    pair.fail_over()
    wait_reason(pair, "failed over")
    pair.load.wait_more()
    pair.load.stop()
    pair.check_waits(GOES_ON_S)
    assert pair.secondary.status()["link"]["state"] not in ("in-sync", "synchronizing")


def test_failover_in_the_midst_of_a_resync_is_exactly_the_last_checkpoint(make_pair: Made, wire: Wire) -> None:
    # Automatic checkpoints are due all the time: none may be taken of a disk that is neither old nor new.
    pair = make_pair("resync-rate=1M", "checkpoint-interval=0.1", timeout_s=1)
    pair.load.wait_more(50)
    pair.checkpoint()
    begin(pair)
    wire.cut()
    pair.watch.wait_lost()
    pair.most = len(pair.load.log)
    pair.load.wait_more(200)
    wire.mend()
    pair.watch.wait_state("synchronizing")

    def under_way() -> bool:
        jobs = [job for job in pair.primary.execute("query-jobs") if job["type"] == "resync"]
        return any(2 * MIB <= job["current-progress"] < job["total-progress"] for job in jobs)

    wait_until(under_way, "some of it has been sent")
    assert pair.secondary.status()["link"]["state"] == "synchronizing"
    check_stays(pair)


def test_failover_under_automatic_checkpoints_has_one_of_them_whole(make_pair: Made, wire: Wire) -> None:
    pair = make_pair("checkpoint-interval=0.05")
    for _ in range(5):
        pair.load.wait_more(20)
        pair.checkpoint()
    pair.load.wait_more(30)
    wire.blackhole("ba")
    # The one that is being taken at this moment may have been.
    pair.most = len(pair.load.log)
    check_stays(pair)
