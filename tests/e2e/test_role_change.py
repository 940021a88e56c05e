# SPDX-License-Identifier: BSD-3-Clause
"""Role change: a promoted secondary becomes the primary of a new pair, and its guest notices nothing.

    a   the old primary          b   its secondary, promoted, then a primary          c, d   new secondaries

The guest of `b` is a thread that writes, zeroes, trims, flushes and reads on one connection and knows every byte
(Writer). What has to be on the new secondary is compared with that, and with the raw disks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import nbd
import pytest

from content import KIB, MIB, changed, make_raw, pattern
from lab import Lab
from nbdprocess import NbdProcess, silent
from nodes import Primary, Secondary, Server, disk_name, drained, error_kept, nbd_refusal, top_id
from pausepoints import PausePoints
from qmp import QmpError
from waiting import DEADLINE_S, wait_until

GRAIN = 64 * KIB
SIZE = 2 * MIB
TIMEOUT_S = 3.0
"""`timeout` of a promoted primary, where a test has to wait for it."""


class Writer:
    """A guest with one connection and a model of its disk: a thread that writes and verifies until `stop`."""

    def __init__(self, server: NbdProcess, export: str, content: bytes, seed: int) -> None:
        self.model = bytearray(content)
        self._handle = server.connect(export)
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._done = 0
        self._thread = threading.Thread(target=self._run, name="guest", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(DEADLINE_S)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self.step()
        except BaseException as error:  # noqa: BLE001 (raised again by `stop` and `go_on`)
            self._error = error

    def step(self) -> None:
        """One random request; the model is changed when it has been answered."""
        pick = self._random
        length = pick.choice((1, 511, 512, 4096, 4097, 12288, 65536, 70001))
        offset = pick.randrange(len(self.model) - length + 1)
        if pick.random() < 0.5:
            offset = offset // 4096 * 4096
        kind = pick.randrange(10)
        if kind < 6:
            data = pick.randbytes(length)
            self._handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if kind == 0 else 0)
            self.model[offset : offset + length] = data
        elif kind == 6:
            self._handle.zero(length, offset)
            self.model[offset : offset + length] = bytes(length)
        elif kind == 7:
            self._handle.trim(length, offset)
            self.model[offset : offset + length] = bytes(length)
        elif kind == 8:
            self._handle.flush()
        else:
            assert bytes(self._handle.pread(length, offset)) == self.model[offset : offset + length]
        self._done += 1

    def go_on(self, requests: int = 20) -> None:
        """Wait until it has done some more."""
        wanted = self._done + requests

        def enough() -> bool:
            self.check()
            return self._done >= wanted

        wait_until(enough, "the guest goes on")

    def check(self) -> None:
        """Raise what the guest has met."""
        if self._error is not None:
            raise self._error

    def stop(self) -> bytes:
        """End, look at the whole disk once more over the same connection, and return its content."""
        self._stopping.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.check()
        content = bytes(self.model)
        assert bytes(self._handle.pread(len(content), 0)) == content
        return content


def old(index: int = 0) -> bytes:
    """What disk number `index` holds at first, on both sides."""
    return pattern(100 + index, SIZE)


def new_secondary(
    lab: Lab, name: str = "c", sizes: Sequence[int] = (SIZE,), contents: Sequence[bytes] = (), **options: Any
) -> Secondary:
    """A started secondary in stage none, with disks of its own."""
    return lab.start(Secondary(lab.folder, sizes, name=name, contents=contents, **options))


class Promotion:
    """`a` and `b` in replication; `promote` parts them."""

    def __init__(
        self,
        lab: Lab,
        disks: int = 1,
        arguments: Sequence[str] = (),
        primary_arguments: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.lab = lab
        sizes, contents = [SIZE] * disks, [old(index) for index in range(disks)]
        self.b = new_secondary(lab, "b", sizes, contents, extra_arguments=arguments, **options)
        self.a = lab.start(
            Primary(lab.folder, self.b.uri(), sizes, name="a", contents=contents, extra_arguments=primary_arguments)
        )
        self.b.start_replication()
        self.a.start_replication()
        self.old_writes = self.a.connect(disk_name(0))
        self.target = self.b.connect(disk_name(0))

    def promote(self, how: str) -> Secondary:
        """`b`, done. By "failover", or "planned"."""
        if how == "planned":
            self.a.checkpoint()
            self.a.execute("replication-stop")
            self.b.execute("replication-stop")
            left(self.b)
        else:
            self.b.failover()
        assert self.b.status()["stage"] == "done"
        return self.b

    def returned(self) -> Secondary:
        """The old primary as a new secondary, with the disks and the state folder that it has."""
        self.a.terminate()
        return self.lab.start(Secondary(self.lab.folder, self.a.sizes, name="a"))


def left(b: Secondary) -> None:
    """Wait until the old primary has left: after a failover it does so when it has seen that."""
    wait_until(lambda: b.status()["peer-node"] is None, "the old primary has left")


def become_primary(server: Server, secondary: str, sync: str | None = None) -> None:
    """The role change, or the next pair of one that is a primary already."""
    arguments = {"mode": "primary", "secondary": secondary}
    server.execute("replication-start", arguments if sync is None else {**arguments, "sync": sync})
    status = server.status()
    assert (status["mode"], status["stage"]) == ("primary", "running")


def all_sent(server: Server) -> None:
    """Wait until the resync has ended, then take a barrier, which ends when all is there. (While a guest writes,
    something is always on its way, so to wait for nothing out of sync is to wait for chance.)"""
    with server.qmp() as qmp:

        def sent() -> bool:
            jobs = [job for job in qmp.execute("query-jobs") if job["type"] == "resync"]
            assert all(job["status"] == "running" for job in jobs), jobs
            return not jobs

        wait_until(sent, "the resync has ended")
        qmp.execute("replication-checkpoint")


def forwarded(server: Server) -> int:
    """Bytes that a primary's secondary has taken, all disks together."""
    return sum(int(disk["totals"]["forwarded"]) for disk in server.status()["disks"])


def out_of_sync(server: Server) -> int:
    """Bytes that the secondary may lack, all disks together."""
    return sum(int(disk["out-of-sync-bytes"]) for disk in server.status()["disks"])


def raw(server: Secondary | Primary, index: int = 0) -> bytes:
    """The disk itself."""
    return server.disks[index].read_bytes()


def standing(server: Server) -> dict[str, Any]:
    """The status, without what changes by itself."""
    status = server.status()
    del status["checkpoint"]["age"]
    return status


def record(server: Secondary) -> dict[str, Any]:
    """The saved state."""
    saved: dict[str, Any] = json.loads((server.state / "state.json").read_text())
    return saved


def refusal(server: Server, arguments: dict[str, Any]) -> str:
    """What replication-start says to `arguments`, which it must refuse."""
    with pytest.raises(QmpError) as refused:
        server.execute("replication-start", arguments)
    assert refused.value.error_class == "GenericError"
    assert "\n" not in refused.value.desc
    return refused.value.desc


# -- the guest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_guest_under_load_goes_on_over_its_connection_through_failover_and_role_change(
    lab: Lab, protocol: str
) -> None:
    points = lab.pause_points()
    setup = Promotion(lab, 2, [f"protocol={protocol}"], extra_environment=points.environment)
    b = setup.b
    c = new_secondary(lab, sizes=[SIZE] * 2)
    with Writer(b, top_id(0), old(0), 1) as guest, Writer(b, top_id(1), old(1), 2) as other:
        guests = (guest, other)

        def go_on() -> None:
            for each in guests:
                each.go_on()

        for at in range(0, SIZE, GRAIN):
            setup.old_writes.pwrite(pattern(at, 4096), at)  # is not to be seen: it is after the last checkpoint
        go_on()
        points.arm("failover.entered")
        failing_over = threading.Thread(target=b.failover)
        failing_over.start()
        points.wait_hit("failover.entered")
        go_on()  # while nothing has been committed yet
        assert b.status()["stage"] == "failover"
        points.release("failover.entered")
        failing_over.join(DEADLINE_S)
        assert b.status()["stage"] == "done"
        go_on()
        points.arm("forward.send")
        become_primary(b, c.uri())
        points.wait_hit("forward.send")
        if protocol == "async":
            go_on()  # while the resync has sent nothing yet
        # Of one disk, or of both: the thread that is held may be at a guest's write, too.
        assert {job["status"] for job in b.execute("query-jobs") if job["type"] == "resync"} == {"running"}
        points.release("forward.send")
        go_on()
        all_sent(b)
        # The new secondary, which has taken the first copy by now, is started under load, and has its guest.
        c.start_replication()
        go_on()
        b.execute("replication-checkpoint")
        c.checkpoint()
        go_on()
        contents = [each.stop() for each in guests]
    b.execute("replication-checkpoint")
    assert [raw(c, 0), raw(c, 1)] == contents
    assert [raw(b, 0), raw(b, 1)] == contents
    c.checkpoint()
    for index, content in enumerate(contents):
        assert bytes(c.connect(top_id(index)).pread(SIZE, 0)) == content
    assert b.execute("query-xen-replication-status") == {"error": False}
    assert b.status()["link"] == {"state": "in-sync", "secondary": c.uri(), "reason": None}


def test_a_guest_connected_before_a_planned_stop_goes_on_through_the_role_change(lab: Lab) -> None:
    setup = Promotion(lab)
    setup.old_writes.pwrite(pattern(7, GRAIN), 3 * GRAIN)
    expected = changed(old(), (3 * GRAIN, pattern(7, GRAIN)))
    guest = Writer(setup.b, top_id(0), expected, 3)  # connected now, at work later: its writes would be dropped
    c = new_secondary(lab, contents=[expected])
    b = setup.promote("planned")
    with guest:
        guest.go_on()
        become_primary(b, c.uri())
        guest.go_on()
        all_sent(b)
        guest.go_on()
        content = guest.stop()
    b.execute("replication-checkpoint")
    assert raw(c) == raw(b) == content


def test_with_protocol_sync_a_promoted_primary_answers_when_the_new_secondary_has_it(lab: Lab) -> None:
    b = Promotion(lab, arguments=["protocol=sync"]).promote("planned")
    c = new_secondary(lab, contents=[old()])
    become_primary(b, c.uri())
    guest = b.connect(top_id(0))
    for number in range(8):
        at = number * GRAIN + number
        guest.pwrite(pattern(number, 5000), at)
        assert raw(c)[at : at + 5000] == pattern(number, 5000)


# -- what is sent -----------------------------------------------------------------------------------------------


def test_after_a_planned_stop_auto_sends_only_the_grains_that_have_changed_since(lab: Lab) -> None:
    setup = Promotion(lab, 2)
    setup.old_writes.pwrite(pattern(5, 3 * GRAIN), GRAIN)  # both have it when they part
    b = setup.promote("planned")
    parted = [raw(b, index) for index in range(2)]
    guest, other = b.connect(top_id(0)), b.connect(top_id(1))
    guest.pwrite(b"x", 4 * GRAIN + 100)
    guest.pwrite(pattern(1, 2 * 512), 9 * GRAIN - 512)
    other.zero(10, 20 * GRAIN)
    other.trim(4096, SIZE - 4096)
    assert out_of_sync(b) == 0  # of a secondary: what it lacks
    c = setup.returned()
    assert [raw(c, index) for index in range(2)] == parted
    become_primary(b, c.uri(), "auto")
    all_sent(b)
    assert forwarded(b) == 5 * GRAIN
    assert [raw(c, 0), raw(c, 1)] == [raw(b, 0), raw(b, 1)]
    assert raw(b) == changed(parted[0], (4 * GRAIN + 100, b"x"), (9 * GRAIN - 512, pattern(1, 1024)))
    assert raw(b, 1) == changed(parted[1], (20 * GRAIN, bytes(10)), (SIZE - 4096, bytes(4096)))


def test_what_has_changed_since_a_planned_stop_is_known_after_a_kill(lab: Lab) -> None:
    setup = Promotion(lab)
    b = setup.promote("planned")
    parted = raw(b)
    b.connect(top_id(0)).pwrite(pattern(1, GRAIN), 5 * GRAIN)
    b.restart(signal.SIGKILL)
    b.connect(top_id(0)).pwrite(pattern(2, 1), 8 * GRAIN)
    c = setup.returned()
    become_primary(b, c.uri())
    all_sent(b)
    assert forwarded(b) == 2 * GRAIN
    assert raw(c) == raw(b) == changed(parted, (5 * GRAIN, pattern(1, GRAIN)), (8 * GRAIN, pattern(2, 1)))


def test_after_a_failover_auto_sends_everything(lab: Lab) -> None:
    b = Promotion(lab, 2).promote("failover")
    c = new_secondary(lab, sizes=[SIZE] * 2)
    become_primary(b, c.uri(), "auto")
    all_sent(b)
    assert forwarded(b) == 2 * SIZE
    assert [raw(c, 0), raw(c, 1)] == [old(0), old(1)]


def test_full_sends_everything_after_a_planned_stop_too(lab: Lab) -> None:
    b = Promotion(lab).promote("planned")
    c = new_secondary(lab)
    become_primary(b, c.uri(), "full")
    all_sent(b)
    assert forwarded(b) == SIZE
    assert raw(c) == old()


@pytest.mark.parametrize("how", ["planned", "failover"])
def test_none_sends_nothing_but_what_is_written_from_now_on(lab: Lab, how: str) -> None:
    b = Promotion(lab).promote(how)
    guest = b.connect(top_id(0))
    guest.pwrite(b"before", 2 * GRAIN)
    c = new_secondary(lab)
    become_primary(b, c.uri(), "none")
    assert out_of_sync(b) == 0
    guest.pwrite(b"after", 7 * GRAIN)
    all_sent(b)
    assert forwarded(b) == len(b"after")
    assert raw(c) == changed(bytes(SIZE), (7 * GRAIN, b"after"))
    b.restart(signal.SIGKILL)
    wait_until(lambda: b.status()["link"]["state"] == "in-sync", "the link is up again")
    b.execute("replication-checkpoint")
    assert raw(c) == changed(bytes(SIZE), (7 * GRAIN, b"after"))


def test_the_resync_is_a_job_that_shows_how_far_it_is_and_its_events(lab: Lab) -> None:
    points = lab.pause_points()
    b = Promotion(lab, extra_environment=points.environment).promote("failover")
    c = new_secondary(lab)
    with b.qmp() as events:
        points.arm("forward.send")
        become_primary(b, c.uri())
        points.wait_hit("forward.send")
        (job,) = b.execute("query-jobs")
        assert job == {
            "id": "resync-disk0",
            "type": "resync",
            "status": "running",
            "current-progress": 0,
            "total-progress": SIZE,
        }
        change = events.wait_event("REPLICATION_STAGE_CHANGE")["data"]
        assert change == {"mode": "primary", "from": "done", "to": "running"}
        events.wait_event("REPLICATION_LINK", lambda data: data["state"] == "synchronizing")
        for status in ("running", "concluded", "null"):
            expected = {"id": "resync-disk0", "status": status}
            if status == "concluded":
                points.release("forward.send")
            events.wait_event("JOB_STATUS_CHANGE", lambda data, expected=expected: data == expected)
    assert b.execute("query-jobs") == []
    assert raw(c) == old()


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.fixture
def parted(lab: Lab) -> Promotion:
    """`b` is done after a planned stop, with a change of its own that a later pair must get."""
    setup = Promotion(lab, arguments=[f"timeout={TIMEOUT_S}"])
    setup.promote("planned")
    setup.b.connect(top_id(0)).pwrite(pattern(1, 100), 6 * GRAIN)
    return setup


def check_unchanged(setup: Promotion, attempt: Callable[[], None]) -> None:
    """`attempt` leaves `b` a promoted secondary, and a role change is possible afterwards with all that it needs."""
    b = setup.b
    kept = raw(b)
    guest = b.connect(top_id(0))
    before = (standing(b), record(b), b.execute("query-jobs"))
    with b.qmp() as events:
        attempt()
        after = (standing(b), record(b), b.execute("query-jobs"))
        events.execute("query-version")
        assert [event["event"] for event in events.events] == []
    assert after == before
    assert bytes(guest.pread(SIZE, 0)) == raw(b) == kept
    guest.pwrite(b"y", 11 * GRAIN)
    with nbd_refusal(errno.ESHUTDOWN):
        setup.target.pwrite(b"z", 0)
    c = setup.returned()
    assert raw(c) == old()
    become_primary(b, c.uri())
    all_sent(b)
    assert forwarded(b) == 2 * GRAIN
    assert raw(c) == raw(b) == changed(kept, (11 * GRAIN, b"y"))


@pytest.mark.parametrize(
    "uri",
    [
        "nbd+unix:///?socket=/nonexistent/socket",
        "/nonexistent/socket",
        "",
        "http://localhost/",
        "nbd://localhost:1/",
        "nbd+unix:///nosuch?socket={c}",
        "nbd+unix:///?socket={dir}",
        "nbd://[::1/",
    ],
)
def test_a_wrong_uri_leaves_everything_as_it_was(lab: Lab, parted: Promotion, uri: str) -> None:
    c = new_secondary(lab)
    uri = uri.format(c=c.socket_path, dir=lab.folder)
    check_unchanged(parted, lambda: refusal(parted.b, {"mode": "primary", "secondary": uri, "sync": "full"}).encode())
    assert raw(c) == bytes(SIZE)


@pytest.mark.parametrize("size", [SIZE - 512, SIZE + MIB])
def test_a_secondary_of_another_size_is_refused(lab: Lab, parted: Promotion, size: int) -> None:
    c = new_secondary(lab, sizes=[size])

    def attempt() -> None:
        text = refusal(parted.b, {"mode": "primary", "secondary": c.uri(), "sync": "full"})
        assert str(SIZE) in text
        assert str(size) in text

    check_unchanged(parted, attempt)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"mode": "secondary"}, {"mode": "secondary", "sync": "full"}, {"sync": "none"}],
    ids=["no mode", "secondary", "secondary full", "no mode, sync"],
)
def test_only_mode_primary_changes_the_role(lab: Lab, parted: Promotion, arguments: dict[str, str]) -> None:
    c = new_secondary(lab)
    check_unchanged(parted, lambda: refusal(parted.b, {**arguments, "secondary": c.uri()}).encode())
    assert raw(c) == bytes(SIZE)


@pytest.mark.parametrize(
    "arguments", [{}, {"mode": "primary"}, {"mode": "secondary"}, {"mode": "primary", "sync": "full"}]
)
def test_a_start_without_a_new_secondary_is_accepted_and_ignored(parted: Promotion, arguments: dict[str, str]) -> None:
    check_unchanged(parted, lambda: parted.b.execute("replication-start", arguments))


def test_old_starts_by_qemus_name_are_accepted_and_ignored(parted: Promotion) -> None:
    def attempt() -> None:
        for primary in (False, True):
            assert parted.b.execute("xen-set-replication", enable=True, primary=primary) == {}

    check_unchanged(parted, attempt)


def test_a_silent_secondary_is_refused_within_the_timeout_and_the_guest_does_not_wait(
    lab: Lab, parted: Promotion
) -> None:
    c = new_secondary(lab)
    told: list[str] = []

    def attempt() -> None:
        # On a thread, so that the guest is seen to go on while the command waits.
        asking = threading.Thread(
            target=lambda: told.append(refusal(parted.b, {"mode": "primary", "secondary": c.uri(), "sync": "full"}))
        )
        guest = parted.b.connect(top_id(0))
        with silent(c):
            asking.start()
            answered = 0
            while asking.is_alive():
                assert bytes(guest.pread(100, 6 * GRAIN)) == pattern(1, 100)
                answered += 1
            asking.join(TIMEOUT_S)
        assert answered > 10
        assert told

    check_unchanged_reads_apart(parted, attempt)


def check_unchanged_reads_apart(setup: Promotion, attempt: Callable[[], None]) -> None:
    """As check_unchanged, for an attempt in which the guest reads."""
    before = standing(setup.b)
    attempt()
    after = standing(setup.b)
    for status in (before, after):
        for disk in status["disks"]:
            del disk["totals"]["guest-read"]
    assert after == before
    check_unchanged(setup, lambda: None)


def test_before_a_promotion_there_is_no_role_change(lab: Lab) -> None:
    points = lab.pause_points()
    b = new_secondary(lab, "b", contents=[old()], extra_environment=points.environment)
    c = new_secondary(lab)
    change = {"mode": "primary", "secondary": c.uri(), "sync": "full"}

    def check(stage: str) -> str:
        before = (standing(b), record(b) if stage != "none" else None)
        assert before[0]["stage"] == stage
        text = refusal(b, change)
        assert (standing(b), record(b) if stage != "none" else None) == before
        assert raw(c) == bytes(SIZE)
        return text

    assert check("none") == "The parameter mode's value is invalid, needs secondary, but got primary"
    a = lab.start(Primary(lab.folder, b.uri(), [SIZE], name="a", contents=[old()]))
    b.start_replication()
    a.start_replication()
    for server in (a, b):
        wait_until(lambda server=server: server.status()["link"]["state"] == "in-sync", "it stands as it will stand")
    assert check("running") == "Block replication is running or done"
    a.terminate()
    left(b)
    guest = b.connect(top_id(0))
    guest.pwrite(pattern(1, GRAIN), 0)
    points.arm("commit.written")
    b.execute("xen-set-replication", enable=False, primary=False, failover=True)
    points.wait_hit("commit.written")
    check("failover")
    b.execute("job-cancel", id="commit-disk0")
    points.release("commit.written")
    status = b.wait_stage("failover-failed", "done")
    if status["stage"] == "failover-failed":
        assert check("failover-failed") == "Block replication is running or done"
        b.execute("replication-retry")
        b.wait_stage("done")
    become_primary(b, c.uri())
    all_sent(b)
    assert raw(c) == raw(b) == changed(old(), (0, pattern(1, GRAIN)))


def test_one_disk_that_does_not_fit_refuses_them_all(lab: Lab) -> None:
    setup = Promotion(lab, 2)
    b = setup.promote("failover")
    c = new_secondary(lab, sizes=[SIZE, 2 * SIZE])
    left(b)
    before = (standing(b), record(b))
    assert "disk1" in refusal(b, {"mode": "primary", "secondary": c.uri()})
    assert (standing(b), record(b)) == before
    assert raw(c) == bytes(SIZE)
    d = new_secondary(lab, "d", sizes=[SIZE] * 2)
    assert "disk" in refusal(b, {"mode": "primary", "secondary": d.uri("disk0")})  # one export for two disks
    assert (standing(b), record(b)) == before
    become_primary(b, d.uri())
    all_sent(b)
    assert [raw(d, 0), raw(d, 1)] == [old(0), old(1)]


def test_a_primary_that_was_a_secondary_refuses_a_second_start(lab: Lab) -> None:
    b = Promotion(lab).promote("failover")
    c, d = new_secondary(lab), new_secondary(lab, "d")
    become_primary(b, c.uri())
    assert refusal(b, {"mode": "primary", "secondary": d.uri()}) == "Block replication is running or done"
    all_sent(b)
    assert (raw(c), raw(d)) == (old(), bytes(SIZE))


@pytest.mark.parametrize("which", ["itself", "the old primary", "a guest face"])
def test_what_a_guest_writes_to_is_not_taken_for_a_secondary(lab: Lab, which: str) -> None:
    """It would overwrite what that guest has written since they parted, or send its own writes round for ever."""
    setup = Promotion(lab, primary_arguments=["on-outdated=continue"])
    b = setup.promote("failover")
    setup.old_writes.pwrite(b"of the old primary's guest", 0)
    wait_until(lambda: setup.a.status()["error"], "they differ")
    left(b)
    other = new_secondary(lab, "other")
    other.start_replication()
    uri = {"itself": b.uri(top_id(0)), "the old primary": setup.a.uri(), "a guest face": other.uri(top_id(0))}[which]
    before = (standing(b), record(b))
    text = refusal(b, {"mode": "primary", "secondary": uri, "sync": "full"})
    assert ("the disks are 'top0' there" if which == "a guest face" else "no secondary") in text
    assert (standing(b), record(b)) == before
    assert raw(setup.a) == changed(old(), (0, b"of the old primary's guest"))
    assert bytes(other.connect(top_id(0)).pread(SIZE, 0)) == raw(other) == bytes(SIZE)
    c = new_secondary(lab)
    become_primary(b, c.uri())
    all_sent(b)
    assert raw(c) == raw(b) == old()


# -- the old primary --------------------------------------------------------------------------------------------


def check_kept_out(handle: nbd.NBD) -> None:
    """Every request of the target face is refused, and the connection lives."""
    for request in (
        lambda: handle.pwrite(b"z" * 4096, 0),
        lambda: handle.pwrite(b"z", 1, nbd.CMD_FLAG_FUA),
        lambda: handle.zero(4096, 0),
        lambda: handle.trim(4096, 0),
        handle.flush,
        lambda: handle.pread(4096, 0),
    ):
        with nbd_refusal(errno.ESHUTDOWN):
            request()


@pytest.mark.parametrize("how", ["planned", "failover"])
def test_the_target_face_stays_closed_for_ever(lab: Lab, how: str) -> None:
    setup = Promotion(lab)
    setup.old_writes.pwrite(pattern(3, 512), 0)
    drained(setup.a)
    b = setup.promote(how)
    kept = raw(b)
    c, d = new_secondary(lab), new_secondary(lab, "d")
    check_kept_out(setup.target)
    become_primary(b, c.uri(), "full")
    check_kept_out(setup.target)
    check_kept_out(b.connect(disk_name(0)))
    all_sent(b)
    b.execute("replication-stop")
    check_kept_out(setup.target)
    become_primary(b, d.uri(), "full")
    all_sent(b)
    check_kept_out(setup.target)
    for how_ended in (signal.SIGTERM, signal.SIGKILL):
        b.restart(how_ended)
        check_kept_out(b.connect(disk_name(0)))
    assert raw(b) == raw(c) == raw(d) == kept


def test_the_old_primary_goes_on_alone_and_cannot_write_a_byte_into_the_promoted_disk(lab: Lab) -> None:
    points = lab.pause_points()
    setup = Promotion(lab, extra_environment=points.environment, primary_arguments=["on-outdated=continue"])
    b, a = setup.b, setup.a
    # It asks twice a second how the other one is: it gets no answer, so that it learns of the failover by a write.
    points.arm("query.begun")
    points.wait_hit("query.begun")
    b.failover()
    setup.old_writes.pwrite(pattern(1, GRAIN), 0)  # its guest is answered all the same
    wait_until(lambda: a.status()["error"], "the old primary knows")
    wait_until(lambda: error_kept(lab.folder / "a.state"), "and has kept it")
    points.release("query.begun")
    c = new_secondary(lab)
    become_primary(b, c.uri())
    setup.old_writes.pwrite(pattern(2, GRAIN), GRAIN)
    a.restart(signal.SIGKILL)  # with its old command line: it is running, and tries to send what is missing
    wait_until(
        lambda: "not the secondary that it was" in (a.status()["link"]["reason"] or ""), "the old primary is refused"
    )
    assert a.status()["link"]["state"] == "lost"
    a.connect(disk_name(0)).pwrite(pattern(3, GRAIN), 2 * GRAIN)
    assert out_of_sync(a) == 3 * GRAIN
    with pytest.raises(QmpError, match="lacks"):
        a.checkpoint()
    fault = a.status()["error"]
    assert (fault["case"], fault["errno"]) == (2, "ESHUTDOWN")
    # Told to start over with the promoted one as a new secondary, it cannot either.
    a.execute("replication-stop")
    with pytest.raises(QmpError, match="nobody's secondary"):
        a.execute("replication-start", mode="primary", secondary=b.uri(), sync="full")
    all_sent(b)
    assert raw(b) == raw(c) == old()
    assert b.status()["disks"][0]["totals"]["written"] == 0
    assert b.execute("query-xen-replication-status") == {"error": False}


def test_an_old_primary_that_has_lost_its_state_and_starts_by_itself_cannot_write_either(lab: Lab) -> None:
    b = Promotion(lab).promote("failover")
    c = new_secondary(lab)
    become_primary(b, c.uri())
    make_raw(lab.folder / "other-disk0.raw", SIZE, pattern(9, SIZE))
    other = lab.start(Primary(lab.folder, b.uri(), [SIZE], name="other", extra_arguments=["autostart=true"]))
    wait_until(lambda: "nobody's secondary" in other.stderr(), "it is refused")
    other.connect(disk_name(0)).pwrite(pattern(1, GRAIN), 0)
    assert other.status()["stage"] == "none"
    all_sent(b)
    assert raw(b) == raw(c) == old()


def test_the_empty_export_name_is_refused_on_a_promoted_primary(lab: Lab) -> None:
    b = Promotion(lab).promote("failover")
    become_primary(b, new_secondary(lab).uri())
    all_sent(b)

    def check() -> None:
        with pytest.raises(nbd.Error):
            b.connect("")
        wait_until(lambda: "there is no export '': the exports are" in b.stderr(), "the log says why")
        assert bytes(b.connect(top_id(0)).pread(SIZE, 0)) == old()

    check()
    b.restart(signal.SIGKILL)
    check()
    b.execute("replication-stop")
    check()


# -- after the role change --------------------------------------------------------------------------------------


def test_after_a_restart_with_the_same_command_line_it_is_a_primary_again_and_goes_on(lab: Lab) -> None:
    points = lab.pause_points()
    b = Promotion(lab, 2, extra_environment=points.environment).promote("failover")
    c = new_secondary(lab, sizes=[SIZE] * 2)
    become_primary(b, c.uri())
    all_sent(b)
    saved = record(b)
    assert (saved["mode"], saved["promoted"], saved["stage"], saved["secondary"]) == (
        "primary",
        True,
        "running",
        c.uri(),
    )
    expected = [bytearray(old(0)), bytearray(old(1))]
    for turn, how in enumerate((signal.SIGKILL, signal.SIGTERM)):
        guests = [b.connect(top_id(index)) for index in range(2)]
        if how is signal.SIGKILL:
            points.arm("forward.send")  # what is answered now has not left when the process is killed
        for index, guest in enumerate(guests):
            at = (5 * turn + index) * GRAIN + 77
            guest.pwrite(pattern(turn, 300), at)
            expected[index][at : at + 300] = pattern(turn, 300)
        if how is signal.SIGKILL:
            points.wait_hit("forward.send")
            b.kill()
            points.disarm("forward.send")
            assert raw(c, 0) != expected[0] or raw(c, 1) != expected[1]
            b.start()
        else:
            b.restart(how)
        status = b.status()
        assert (status["mode"], status["stage"]) == ("primary", "running")
        wait_until(lambda: b.status()["link"]["state"] == "in-sync", "the link is up again")
        all_sent(b)
        for index in range(2):
            assert raw(c, index) == raw(b, index) == expected[index]
            assert bytes(b.connect(top_id(index)).pread(SIZE, 0)) == expected[index]


def test_a_resync_that_was_ended_by_sigterm_goes_on_after_the_restart(lab: Lab) -> None:
    points = lab.pause_points()
    setup = Promotion(lab, arguments=[f"timeout={TIMEOUT_S}"], extra_environment=points.environment)
    b = setup.promote("failover")
    c = new_secondary(lab)
    points.arm("forward.send")
    become_primary(b, c.uri())
    points.wait_hit("forward.send")
    b.connect(top_id(0)).pwrite(pattern(1, GRAIN), SIZE - GRAIN)
    with silent(c):
        points.release("forward.send")
        (job,) = b.execute("query-jobs")
        assert (job["id"], job["status"]) == ("resync-disk0", "running")
        b.terminate()
    assert raw(c) != raw(b)
    b.start()
    wait_until(lambda: b.status()["link"]["state"] == "in-sync", "the link is up again")
    all_sent(b)
    assert raw(c) == raw(b) == changed(old(), (SIZE - GRAIN, pattern(1, GRAIN)))


def test_stopped_it_is_done_and_can_start_again_with_another_secondary(lab: Lab) -> None:
    b = Promotion(lab).promote("failover")
    c = new_secondary(lab)
    become_primary(b, c.uri())
    all_sent(b)
    with Writer(b, top_id(0), old(), 5) as guest:
        guest.go_on()
        b.execute("replication-stop")
        assert b.status()["stage"] == "done"
        b.execute("replication-stop")  # ignored
        left = raw(c)
        guest.go_on()
        assert raw(c) == left
        d = new_secondary(lab, "d")
        become_primary(b, d.uri(), "full")
        guest.go_on()
        all_sent(b)
        content = guest.stop()
    b.execute("replication-checkpoint")
    assert raw(d) == raw(b) == content
    assert raw(c) == left
    # Back to the former one: what has changed since the stop is known, whoever got it meanwhile.
    assert b.status()["link"]["secondary"] == d.uri()


def test_started_again_with_the_secondary_that_it_was_stopped_with_it_sends_what_has_changed(lab: Lab) -> None:
    b = Promotion(lab).promote("failover")
    c = new_secondary(lab)
    become_primary(b, c.uri())
    all_sent(b)
    b.execute("replication-stop")
    b.connect(top_id(0)).pwrite(b"x", 5 * GRAIN)
    before = forwarded(b)
    b.execute("replication-start", secondary=c.uri())
    all_sent(b)
    assert forwarded(b) - before == GRAIN
    assert raw(c) == raw(b) == changed(old(), (5 * GRAIN, b"x"))


def test_a_lost_heartbeat_stops_a_promoted_primary(lab: Lab) -> None:
    b = Promotion(lab).promote("failover")
    c = new_secondary(lab)
    become_primary(b, c.uri())
    all_sent(b)
    b.execute("x-colo-lost-heartbeat")
    status = b.status()
    assert (status["mode"], status["stage"]) == ("primary", "done")
    b.connect(top_id(0)).pwrite(b"alone", 0)
    assert raw(c) == old()
    b.restart(signal.SIGKILL)
    assert (b.status()["mode"], b.status()["stage"]) == ("primary", "done")
    assert bytes(b.connect(top_id(0)).pread(5, 0)) == b"alone"


def test_a_write_that_the_new_secondary_refuses_is_case_2(lab: Lab) -> None:
    b = Promotion(lab, arguments=["on-outdated=continue"]).promote("failover")
    points = lab.pause_points()
    c = new_secondary(lab, extra_environment=points.environment)
    become_primary(b, c.uri())
    all_sent(b)
    c.start_replication()
    points.arm("query.begun")  # as above
    points.wait_hit("query.begun")
    c.failover()
    guest = b.connect(top_id(0))
    with b.qmp() as events:
        guest.pwrite(b"x", 3 * GRAIN)  # the guest is not told
        told = events.wait_event("REPLICATION_ERROR")["data"]
    assert (told["case"], told["disk"], told["offset"], told["errno"]) == (2, "disk0", 3 * GRAIN, "ESHUTDOWN")
    assert b.execute("query-xen-replication-status") == {"error": True, "desc": "I/O error occurred"}
    assert b.status()["error"]["case"] == 2
    assert out_of_sync(b) == GRAIN
    assert raw(c) == old()
    points.release("query.begun")


def test_a_new_secondary_that_dies_is_case_8_and_the_guest_goes_on(lab: Lab) -> None:
    b = Promotion(lab, arguments=[f"timeout={TIMEOUT_S}"]).promote("failover")
    c = new_secondary(lab)
    become_primary(b, c.uri())
    all_sent(b)
    with Writer(b, top_id(0), old(), 6) as guest, b.qmp() as events:
        guest.go_on()
        c.kill()
        told = events.wait_event("REPLICATION_ERROR")["data"]
        assert (told["case"], told["disk"]) == (8, "disk0")
        guest.go_on()
        assert b.execute("query-xen-replication-status") == {"error": True, "desc": "I/O error occurred"}
        assert b.status()["link"]["state"] == "lost"
        c.start()
        b.execute("replication-stop")
        b.execute("replication-start", secondary=c.uri())  # sends what was lost
        guest.go_on()
        all_sent(b)
        content = guest.stop()
    b.execute("replication-checkpoint")
    assert raw(c) == raw(b) == content
    assert b.execute("query-xen-replication-status") == {"error": False}


# -- kill -9 in the midst of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["auto", "full", "none"])
@pytest.mark.parametrize("point", ["start.connected", "start.entered", "forward.send"])
def test_a_kill_during_the_role_change_leaves_the_old_or_the_new_role(lab: Lab, point: str, sync: str) -> None:
    points: PausePoints = lab.pause_points()
    b = Promotion(lab, extra_environment=points.environment).promote("planned")
    guest = b.connect(top_id(0))
    guest.pwrite(pattern(1, 3 * GRAIN), 4 * GRAIN)
    parted_content = old()
    expected = changed(old(), (4 * GRAIN, pattern(1, 3 * GRAIN)))
    c = new_secondary(lab, contents=[parted_content])
    points.arm(point)
    arguments = {"mode": "primary", "secondary": c.uri(), "sync": sync}
    asking = threading.Thread(target=_ask_a_process_that_dies, args=(b, arguments))
    asking.start()
    if (point, sync) == ("forward.send", "none"):
        wait_until(lambda: b.status()["stage"] == "running", "the role has changed")
        guest.pwrite(b"after", 0)
        expected = changed(expected, (0, b"after"))
    points.wait_hit(point)
    b.kill()
    asking.join(DEADLINE_S)
    points.disarm(point)
    assert raw(c) == parted_content
    b.start()
    status = b.status()
    assert bytes(b.connect(top_id(0)).pread(SIZE, 0)) == raw(b) == expected
    with nbd_refusal(errno.ESHUTDOWN):
        b.connect(disk_name(0)).pwrite(b"z", 0)
    if point == "start.connected":
        assert (status["mode"], status["stage"]) == ("secondary", "done")
        assert record(b)["promoted"] is False
        become_primary(b, c.uri())
    else:
        assert (status["mode"], status["stage"]) == ("primary", "running")
        wait_until(lambda: b.status()["link"]["state"] == "in-sync", "the link is up")
    all_sent(b)
    if (point, sync) == ("forward.send", "none"):
        # Only the grain that was written after the start; nothing of what none has left out.
        assert raw(c) == changed(parted_content, (0, expected[:GRAIN]))
    else:
        assert raw(c) == expected
    if (point, sync) == ("start.entered", "full"):
        assert forwarded(b) == SIZE


def _ask_a_process_that_dies(server: Server, arguments: dict[str, Any]) -> None:
    """The answer may come before the kill or never."""
    with server.qmp() as qmp, contextlib.suppress(EOFError, ConnectionError):
        qmp.execute("replication-start", arguments)


def test_a_state_folder_that_cannot_be_written_refuses_the_role_change(lab: Lab, tmp_path: Path) -> None:
    b = Promotion(lab).promote("failover")
    c = new_secondary(lab)
    state, aside = b.state, tmp_path / "aside"
    left(b)
    before = standing(b)
    with b.qmp() as qmp:
        # Not by permission bits: the test may run as root.
        shutil.move(state, aside)
        with pytest.raises(QmpError, match="was removed or replaced while in use"):
            qmp.execute("replication-start", mode="primary", secondary=c.uri(), sync="none")
        shutil.move(aside, state)
    assert standing(b) == before
    with nbd_refusal(errno.ESHUTDOWN):
        b.connect(disk_name(0)).pwrite(b"z", 0)
    guest = b.connect(top_id(0))
    guest.pwrite(b"x", 0)
    become_primary(b, c.uri())
    all_sent(b)
    assert forwarded(b) == SIZE  # nothing was forgotten by the start that failed
    assert raw(c) == raw(b) == changed(old(), (0, b"x"))
    # The same with the next secondary of a promoted primary that was stopped.
    b.execute("replication-stop")
    d = new_secondary(lab, "d")
    before = standing(b)
    with b.qmp() as qmp:
        shutil.move(state, aside)
        with pytest.raises(QmpError, match="was removed or replaced while in use"):
            qmp.execute("replication-start", mode="primary", secondary=d.uri(), sync="none")
        shutil.move(aside, state)
    assert standing(b) == before
    assert before["link"]["secondary"] == c.uri()
    assert raw(d) == bytes(SIZE)


@pytest.mark.parametrize("promoted", ["failed-over", "stopped", "become-a-primary"])
def test_what_was_promoted_is_nobodys_secondary(lab: Lab, promoted: str) -> None:
    pair = lab.pair([MIB])
    pair.start_replication()
    if promoted == "stopped":
        pair.secondary.execute("replication-stop")
    else:
        pair.secondary.failover()
    if promoted == "become-a-primary":
        third = lab.secondary([MIB], name="third")
        pair.secondary.execute("replication-start", mode="primary", secondary=third.uri())
    pair.primary.execute("replication-stop")
    with pytest.raises(QmpError, match="nobody's secondary"):
        pair.primary.execute("replication-start", secondary=pair.secondary.uri())
    assert pair.primary.status()["stage"] == "done"
