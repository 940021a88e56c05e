# SPDX-License-Identifier: BSD-3-Clause
"""The edges of a session: what comes to a secondary before one, between two, after a role change, and from two at once.

test_lineage.py has what two nodes decide when they meet. Here are the moments in which a pairing, a stop or the loss of
a link is half done, each held by a pause point or a process that stands still.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbd
import pytest

from content import KIB, MIB, make_raw, pattern, whole
from lab import Lab
from nbdprocess import NbdProcess, silent
from nodes import Primary, Secondary, Server, drained, nbd_refusal, refused
from pausepoints import PausePoints
from qmp import QmpError
from replication.disk.unflushed import EXPOSED
from replication.options import CONTROL_EXPORT, DATA_EXPORT
from replication.record.boot import BOOT_ID_ENVIRONMENT
from replication.record.lineage import Lineage
from replication.side import OF_PAIRS, TARGET_FACE
from waiting import DEADLINE_S, wait_until

GRAIN = 64 * KIB
BLOCK = 4 * KIB
SIZE = MIB

PATIENT = "timeout=30"
"""What a test holds must not be taken for a lost link, however busy the machine is."""


class Asking:
    """A command that is under way in a thread."""

    def __init__(self, server: Server, command: str, **arguments: object) -> None:
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(server, command, arguments), daemon=True)
        self._thread.start()

    def _run(self, server: Server, command: str, arguments: dict[str, object]) -> None:
        try:
            server.execute(command, arguments)
        except (QmpError, OSError, EOFError, AssertionError) as error:
            self.error = error

    def ends_within(self, timeout_s: float) -> bool:
        """Whether it has been answered, or does so in that time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def answer(self) -> None:
        """Wait until it has succeeded."""
        assert self.ends_within(DEADLINE_S)
        if self.error is not None:
            raise self.error


class Session:
    """A session of a primary that says and sends nothing."""

    def __init__(self, secondary: Server) -> None:
        self._handle = secondary.connect(CONTROL_EXPORT)
        self._call("qmp_capabilities", {})
        told = {"node": "1" * 16, "lineage": Lineage().to_json(), "disks": {"disk0": SIZE}, "epoch": 0, "timeout": 60.0}
        self.token = str(self._call("replication-pair", told)["token"])

    def close(self) -> None:
        """It ends."""
        self._handle.shutdown()

    def _call(self, command: str, arguments: dict[str, Any]) -> Any:
        request = {"execute": command, "arguments": arguments, "id": command}
        self._handle.pwrite(json.dumps(request).encode() + b"\n", 0)
        said = b""

        def answer() -> dict[str, Any] | None:
            nonlocal said
            said += bytes(self._handle.pread(16 * KIB, 0)).rstrip(b"\0")
            lines = [json.loads(line) for line in said.split(b"\n")[:-1] if line.strip()]
            return next((line for line in lines if line.get("id") == command), None)

        return wait_until(answer, f"an answer to {command}")["return"]


def link_of(server: Server) -> str:
    """The state of the link."""
    return str(server.status()["link"]["state"])


def wait_link(server: Server, state: str) -> None:
    """Wait until the link is in that state."""
    wait_until(lambda: link_of(server) == state, f"the link of {server.name} is {state}")


def in_sync(primary: Server) -> None:
    """Wait until the secondary has everything, and the primary has told it so."""
    wait_link(primary, "in-sync")
    drained(primary)


def forwarded(primary: Server) -> int:
    """Bytes that this process has brought to its secondary."""
    return int(primary.status()["disks"][0]["totals"].get("forwarded", 0))


def record(server: Primary | Secondary) -> dict[str, Any]:
    """state.json."""
    return dict(json.loads((server.state / "state.json").read_text()))


def nobody_paired(secondary: Server) -> None:
    """Wait until the secondary has noticed that its primary has gone."""
    wait_until(lambda: secondary.status()["link"]["primary"] is None, "the secondary has no session")


# -- a role change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [False, True])
def test_connections_from_before_a_failover_write_nothing_into_the_next_pair(lab: Lab, gone: bool) -> None:
    """`gone`: the former primary has closed its control connection. If it stands still, it has not."""
    secondary = lab.secondary()
    secondary.start_replication()
    session = Session(secondary)
    data = f"{DATA_EXPORT}:{session.token}:disk0"
    stranger, old = secondary.connect("disk0"), secondary.connect(data)
    old.pwrite(pattern(2, BLOCK), 0)
    with nbd_refusal(errno.EPERM):
        stranger.pwrite(pattern(3, BLOCK), 0)
    if gone:
        session.close()
        nobody_paired(secondary)
    secondary.failover()
    for handle in (stranger, old):
        with nbd_refusal(errno.ESHUTDOWN):
            handle.pwrite(pattern(3, BLOCK), 0)
    while_owner = secondary.connect("disk0")
    secondary.execute("replication-demote")
    secondary.execute("replication-discard")
    new = lab.primary(secondary.uri(), name="new", extra_arguments=[PATIENT])
    new.execute("replication-start")
    in_sync(new)
    guest = new.connect("disk0")
    guest.pwrite(pattern(4, BLOCK), GRAIN)
    drained(new)
    for handle, number in ((stranger, errno.EPERM), (while_owner, errno.EPERM), (old, errno.ESHUTDOWN)):
        for write in (
            lambda handle=handle: handle.pwrite(pattern(5, BLOCK), GRAIN),
            lambda handle=handle: handle.zero(BLOCK, GRAIN),
        ):
            with nbd_refusal(number):
                write()
    assert secondary.disks[0].read_bytes() == new.disks[0].read_bytes() == whole(guest)
    assert link_of(new) == "in-sync"


# -- between two checkpoints -----------------------------------------------------------------------------------


def test_a_link_lost_after_a_refused_write_was_repaired_comes_back_quickly_and_costs_no_checkpoint(lab: Lab) -> None:
    content = pattern(1, SIZE)
    disk = lab.endpoint(path=make_raw(lab.folder / "far.raw", SIZE, content), error={"pwrite": "EIO"})
    state = lab.folder / "secondary.state"
    secondary = lab.start(
        Server(lab.folder, "secondary", ["mode=secondary", f"state={state}", f"disk=disk0:{disk.uri()}", "top-id=top0"])
    )
    primary = lab.primary(secondary.uri(), contents=[content], extra_arguments=[PATIENT])
    secondary.execute("replication-start")
    primary.start_replication()
    guest = primary.connect("disk0")
    guest.pwrite(pattern(2, BLOCK), 0)
    in_sync(primary)
    primary.checkpoint()
    checkpoint = whole(guest)
    disk.fail()
    guest.pwrite(pattern(3, BLOCK), 2 * GRAIN)
    wait_until(lambda: primary.status()["disks"][0]["out-of-sync-bytes"], "the write has been refused")
    disk.work()
    in_sync(primary)
    assert disk.path is not None
    assert disk.path.read_bytes() == whole(guest)
    before = forwarded(primary)
    # Until the disk's server has flushed what the checkpoint has of it, a kill costs the checkpoint.
    unflushed = state / "disk0.unflushed"
    wait_until(
        lambda: not any(grain & EXPOSED for grain in unflushed.read_bytes()[: SIZE // GRAIN]),
        "the checkpoint was flushed",
    )
    secondary.kill()
    wait_link(primary, "lost")
    guest.pwrite(pattern(4, BLOCK), 4 * GRAIN)
    secondary.start()
    in_sync(primary)
    assert forwarded(primary) - before <= 4 * GRAIN < SIZE // 2
    assert disk.path.read_bytes() == whole(guest)
    assert secondary.status()["consistent"] is True
    secondary.execute("xen-set-replication", enable=False, primary=False, failover=True)
    assert secondary.wait_stage("done", "failover-failed")["stage"] == "done"
    assert disk.path.read_bytes() == checkpoint


def test_until_a_primary_that_is_back_has_said_what_it_sends_the_last_checkpoint_stays(lab: Lab) -> None:
    points = lab.pause_points()
    pair = lab.pair(primary_arguments=[PATIENT], primary_options={"extra_environment": points.environment})
    pair.start_replication()
    primary, secondary = pair.primary, pair.secondary
    guest = primary.connect("disk0")
    in_sync(primary)
    primary.checkpoint()
    checkpoint = secondary.disks[0].read_bytes()
    epoch = secondary.status()["epoch"]
    guest.pwrite(pattern(2, BLOCK), 0)
    drained(primary)
    points.arm("link.dialled")
    secondary.kill()
    wait_link(primary, "lost")
    for grain in (1, 2):
        guest.pwrite(pattern(3, BLOCK), grain * GRAIN)
    secondary.start()
    points.wait_hit("link.dialled")
    assert secondary.status()["link"]["primary"] == record(primary)["node"]
    assert link_of(secondary) == "connecting"
    refused(secondary, "xen-colo-do-checkpoint")
    refused(secondary, "replication-stop")
    status = secondary.status()
    assert (status["stage"], status["epoch"], status["consistent"]) == ("running", epoch, True)
    assert whole(secondary.connect("top0")) == checkpoint
    points.release("link.dialled")
    in_sync(primary)
    primary.checkpoint()
    assert whole(secondary.connect("top0")) == secondary.disks[0].read_bytes() == whole(guest)


def test_a_primary_killed_before_it_has_said_what_it_sends_leaves_the_secondary_as_it_was(lab: Lab) -> None:
    points = lab.pause_points()
    content = pattern(1, SIZE)
    pair = lab.pair(
        contents=[content],
        primary_arguments=[PATIENT],
        primary_options={"extra_environment": points.environment},
    )
    primary, secondary = pair.primary, pair.secondary
    points.arm("start.connected")
    start = Asking(primary, "replication-start")
    points.wait_hit("start.connected")
    assert secondary.status()["link"]["primary"] is not None
    primary.kill()
    assert start.ends_within(DEADLINE_S)
    assert start.error is not None
    nobody_paired(secondary)
    assert secondary.disks[0].read_bytes() == content
    assert link_of(secondary) == "disconnected"
    secondary.start_replication()
    status = secondary.status()
    assert (status["consistent"], status["link"]["reason"]) == (True, None)
    secondary.checkpoint()
    assert whole(secondary.connect("top0")) == content
    secondary.execute("replication-stop")
    assert secondary.disks[0].read_bytes() == content


def test_a_primary_that_was_about_to_say_what_it_sends_changes_nothing_of_who_has_failed_over_meanwhile(
    lab: Lab,
) -> None:
    points = lab.pause_points()
    pair = lab.pair(primary_arguments=[PATIENT], primary_options={"extra_environment": points.environment})
    pair.start_replication()
    primary, secondary = pair.primary, pair.secondary
    other = lab.secondary(name="other")
    guest = primary.connect("disk0")
    in_sync(primary)
    primary.checkpoint()
    points.arm("link.dialled")
    secondary.kill()
    wait_link(primary, "lost")
    guest.pwrite(pattern(2, BLOCK), GRAIN)
    secondary.start()
    points.wait_hit("link.dialled")
    secondary.failover()
    known = record(secondary)["lineage"]
    points.release("link.dialled")
    wait_until(lambda: "nobody's secondary" in str(primary.status()["link"]["reason"]), "the primary is told")
    assert record(secondary)["lineage"] == known
    # It is the owner of its disks, and no unfinished copy of the old primary's.
    secondary.execute("replication-start", mode="primary", secondary=other.uri())
    in_sync(secondary)
    assert other.disks[0].read_bytes() == secondary.disks[0].read_bytes() != primary.disks[0].read_bytes()


@pytest.mark.parametrize("how", ["failover", "planned", "promoted"])
@pytest.mark.parametrize("by", ["hand", "interval"])
def test_a_primary_whose_guest_is_idle_learns_of_a_failover_by_its_next_checkpoint(lab: Lab, how: str, by: str) -> None:
    pair = lab.pair(primary_arguments=["checkpoint-interval=0.1"] if by == "interval" else [])
    pair.start_replication()
    in_sync(pair.primary)
    pair.primary.checkpoint()
    if how == "planned":
        pair.secondary.execute("replication-stop")
    else:
        pair.secondary.failover()
    if how == "promoted":
        other = lab.secondary(name="other")
        pair.secondary.execute("replication-start", mode="primary", secondary=other.uri())
    if by == "hand":
        # Or it has asked the secondary, as it does twice a second, and knows already: then it says what it knows.
        said = refused(pair.primary, "replication-checkpoint")
        told = "has become a|nobody's secondary|stopped as planned|is not the secondary that it was"
        knew = rf"The link to the secondary .*({told})"
        assert "has not taken the checkpoint" in said or re.search(knew, said), said
    wait_link(pair.primary, "lost")
    assert refused(pair.primary, "replication-get-error") == "I/O error occurred"


# -- stop and start --------------------------------------------------------------------------------------------


def test_a_start_with_another_secondary_waits_for_an_attempt_to_the_former_one(lab: Lab) -> None:
    points = lab.pause_points()
    pair = lab.pair(primary_arguments=[PATIENT], primary_options={"extra_environment": points.environment})
    pair.start_replication()
    primary, former = pair.primary, pair.secondary
    other = lab.secondary(name="other")
    guest = primary.connect("disk0")
    in_sync(primary)
    primary.checkpoint()
    former.kill()
    wait_link(primary, "lost")
    guest.pwrite(pattern(2, BLOCK), 0)  # the nodes have parted, so that the verdict is not that of equal disks
    points.arm("link.dialled")
    former.start()
    points.wait_hit("link.dialled")
    known = record(former)["lineage"]
    primary.execute("replication-stop")
    begin = Asking(primary, "replication-start", secondary=other.uri())
    # Nothing shows that it has come to wait; one that does not wait has long been answered.
    assert not begin.ends_within(1.0)
    points.release("link.dialled")
    begin.answer()
    in_sync(primary)
    guest.pwrite(pattern(3, BLOCK), 5 * GRAIN)
    drained(primary)
    assert other.disks[0].read_bytes() == whole(guest)
    nobody_paired(former)
    assert record(former)["lineage"] == known
    # Whatever the held attempt has said to it: it lacks what the other one was sent.
    primary.execute("replication-stop")
    primary.execute("replication-start", secondary=former.uri())
    in_sync(primary)
    assert former.disks[0].read_bytes() == whole(guest)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_the_secondary_lacks_of_an_export_that_only_forwards_is_not_forgotten(
    lab: Lab, how: signal.Signals
) -> None:
    """Nobody can send it: a link that comes back is refused, whichever process has noted why."""
    secondary = lab.secondary()
    primary = lab.primary(secondary.uri(), sizes=())
    secondary.start_replication()
    primary.start_replication()
    guest = primary.connect("disk0")
    in_sync(primary)
    guest.pwrite(pattern(1, BLOCK), 0)
    primary.checkpoint()
    secondary.kill()
    wait_link(primary, "lost")
    guest.pwrite(pattern(2, BLOCK), GRAIN)
    primary.restart(how)
    secondary.start()
    wait_until(lambda: "no local disk to send them from" in str(primary.status()["link"]["reason"]), "it is refused")
    assert link_of(primary) == "lost"
    assert primary.status()["disks"][0]["out-of-sync-bytes"] == GRAIN
    refused(primary, "replication-checkpoint")
    # A person says that the disks are equal.
    primary.execute("replication-stop")
    primary.execute("replication-start", secondary=secondary.uri())
    in_sync(primary)
    primary.checkpoint()
    primary.restart(how)
    in_sync(primary)


@pytest.mark.parametrize("in_good_order", [False, True])
def test_a_power_loss_before_the_first_start_is_one_for_the_record_of_what_has_changed(
    lab: Lab, in_good_order: bool
) -> None:
    """In stage none no state is saved, but the guest writes, and the secondary has to get that with the start."""
    content = pattern(1, SIZE)
    secondary = lab.secondary(contents=[content])
    primary = lab.primary(secondary.uri(), contents=[content])
    guest = primary.connect("disk0")
    guest.pwrite(pattern(2, BLOCK), GRAIN)
    guest.flush()
    changes = primary.state / "disk0.changes"
    if in_good_order:
        primary.terminate()
    else:
        primary.kill()
        changes.write_bytes(bytes(changes.stat().st_size))  # it never got to the disk
    primary.extra_environment[BOOT_ID_ENVIRONMENT] = "after the power loss"
    primary.start()
    assert primary.status()["disks"][0]["out-of-sync-bytes"] == (GRAIN if in_good_order else SIZE)
    secondary.start_replication()
    primary.start_replication()
    in_sync(primary)
    primary.checkpoint()
    assert secondary.disks[0].read_bytes() == primary.disks[0].read_bytes() != content


def test_a_new_secondary_after_a_plain_server_gets_what_only_that_one_was_sent(lab: Lab) -> None:
    content = pattern(1, SIZE)
    plain = lab.endpoint(size=SIZE)
    primary = lab.primary(plain.uri(), contents=[content])
    secondary = lab.secondary(contents=[content])
    primary.start_replication()
    guest = primary.connect("disk0")
    in_sync(primary)
    guest.pwrite(pattern(2, BLOCK), GRAIN)
    drained(primary)
    primary.execute("replication-stop")
    secondary.start_replication()
    primary.execute("replication-start", secondary=secondary.uri())
    in_sync(primary)
    primary.checkpoint()
    assert secondary.disks[0].read_bytes() == whole(guest)


class EvalServer(NbdProcess):
    """A server that describes every export as it is told to, has no control export, and keeps what is written."""

    def __init__(self, folder: Path, description: str) -> None:
        super().__init__(folder, "eval")
        self.written = folder / "eval.written"
        self._description = description

    def command(self) -> list[str]:
        actions = {
            "open": f'if [ "$3" = {CONTROL_EXPORT} ]; then echo "EMFILE Too many open files" >&2; exit 1; fi',
            "export_description": f"echo '{self._description}'",
            "get_size": f"echo {SIZE}",
            "pread": "head -c $3 /dev/zero",
            "pwrite": f"cat >/dev/null; touch {self.written}",
            "zero": f"touch {self.written}",
            "flush": ":",
            **dict.fromkeys(("can_write", "can_flush", "can_zero"), "exit 0"),
            "can_fua": "echo native",
        }
        base = ["nbdkit", "-f", "-U", str(self.socket_path), "--exit-with-parent", "eval"]
        return base + [f"{name}={script}" for name, script in actions.items()]


@pytest.mark.parametrize("description", [*OF_PAIRS, "some disk"])
def test_a_secondary_whose_control_export_cannot_be_opened_is_not_taken_for_a_plain_server(
    lab: Lab, description: str
) -> None:
    server = lab.start(EvalServer(lab.folder, description))
    primary = lab.primary(server.uri())
    guest = primary.connect("disk0")
    if description in OF_PAIRS:
        refused(primary, "replication-start")
        guest.pwrite(pattern(2, BLOCK), 0)
        status = primary.status()
        assert (status["stage"], status["link"]["state"]) == ("none", "disconnected")
        assert not server.written.exists()
    else:
        primary.execute("replication-start")
        guest.pwrite(pattern(2, BLOCK), 0)
        drained(primary)
        assert server.written.exists()


def test_the_description_of_a_target_face_is_the_one_that_is_recognised(lab: Lab) -> None:
    secondary = lab.secondary()
    handle = nbd.NBD()
    handle.set_full_info(True)
    handle.connect_uri(secondary.uri("disk0"))
    assert handle.get_export_description() == TARGET_FACE
    handle.shutdown()


def test_a_secondary_may_be_stopped_after_its_primary_whose_guest_went_on_writing(lab: Lab) -> None:
    points = lab.pause_points()
    pair = lab.pair(primary_arguments=[PATIENT], primary_options={"extra_environment": points.environment})
    pair.start_replication()
    primary, secondary = pair.primary, pair.secondary
    guest = primary.connect("disk0")
    in_sync(primary)
    primary.checkpoint()
    points.arm("forward.send")
    guest.pwrite(pattern(2, BLOCK), 0)
    points.wait_hit("forward.send")
    guest.pwrite(pattern(3, BLOCK), GRAIN)
    stopped = whole(guest)
    stop = Asking(primary, "replication-stop")
    primary.wait_stage("done")
    guest.pwrite(pattern(4, BLOCK), 2 * GRAIN)
    assert not stop.ends_within(0)  # the queue is being sent
    points.release("forward.send")
    stop.answer()
    nobody_paired(secondary)
    assert secondary.status()["link"] == {"state": "disconnected", "primary": None, "reason": None}
    secondary.execute("replication-stop")
    assert secondary.status()["stage"] == "done"
    assert secondary.disks[0].read_bytes() == stopped != whole(guest)


# -- between two sessions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_stranger_writes_between_two_sessions_is_sent_again(lab: Lab, how: signal.Signals) -> None:
    content = pattern(1, SIZE)
    pair = lab.pair(contents=[content], primary_arguments=[PATIENT])
    pair.start_replication()
    primary, secondary = pair.primary, pair.secondary
    guest = primary.connect("disk0")
    guest.pwrite(pattern(2, BLOCK), 0)
    in_sync(primary)
    primary.checkpoint()
    expected = whole(guest)
    primary.kill() if how is signal.SIGKILL else primary.terminate()
    nobody_paired(secondary)
    stranger = secondary.connect("disk0")
    stranger.pwrite(pattern(3, BLOCK), 3 * GRAIN)
    stranger.zero(BLOCK, 9 * GRAIN)
    stranger.trim(BLOCK, 11 * GRAIN)
    assert secondary.disks[0].read_bytes() != expected
    primary.start()
    in_sync(primary)
    assert secondary.disks[0].read_bytes() == primary.disks[0].read_bytes() == expected
    # That, and no more than the grains beside it: not the whole disk.
    assert 3 * GRAIN <= forwarded(primary) < SIZE
    primary.checkpoint()
    assert whole(secondary.connect("top0")) == expected


def test_a_primary_with_a_full_queue_and_a_silent_secondary_ends_in_good_order_within_five_seconds(lab: Lab) -> None:
    pair = lab.pair([4 * MIB], primary_arguments=[PATIENT, "queue-limit=1M"])
    pair.start_replication()
    primary, secondary = pair.primary, pair.secondary
    guest = primary.connect("disk0")
    in_sync(primary)
    # Of each entry 512 bytes count besides its data: sixteen of these leave no room for even a barrier.
    length = GRAIN - 512
    with silent(secondary):
        for index in range(16):
            guest.pwrite(pattern(index, length), index * GRAIN)
        assert primary.status()["disks"][0]["forward-queue-bytes"] == 16 * length
        begun = time.monotonic()
        primary.terminate()
        assert time.monotonic() - begun < 5 + 10  # of which 4 s on any machine, and 10 s for a busy one
    assert record(primary)["clean"] is True
    primary.start()
    in_sync(primary)
    assert secondary.disks[0].read_bytes() == primary.disks[0].read_bytes()


# -- two primaries that are one node -----------------------------------------------------------------------------


def copied(lab: Lab, original: Primary, points: PausePoints) -> Primary:
    """A primary with a copy of the disk and the state folder of one that has ended."""
    clone = Primary(
        lab.folder,
        original.arguments[2].removeprefix("secondary="),
        name="clone",
        contents=[original.disks[0].read_bytes()],
        extra_arguments=[PATIENT],
        extra_environment=points.environment,
    )
    shutil.copytree(original.state, clone.state, ignore=shutil.ignore_patterns("*.sock"))
    return lab.add(clone)


def sessions_begun(primary: Primary) -> Callable[[], int]:
    """Counts how often that primary has begun a session from now on."""
    qmp = primary.qmp()

    def count() -> int:
        qmp.execute("query-replication")
        return sum(
            event["event"] == "REPLICATION_LINK" and event["data"]["state"] == "connecting" for event in qmp.events
        )

    return count


def test_two_primaries_with_one_state_folder_take_turns_slowly_and_the_loser_writes_nothing(lab: Lab) -> None:
    own, there = PausePoints(lab.folder / "own"), PausePoints(lab.folder / "there")
    secondary = lab.secondary(extra_environment=there.environment)
    first = lab.primary(secondary.uri(), extra_arguments=[PATIENT], extra_environment=own.environment)
    secondary.start_replication()
    first.start_replication()
    in_sync(first)
    first.checkpoint()
    first.terminate()
    clone = copied(lab, first, there)
    first.start()
    in_sync(first)
    guest = first.connect("disk0")
    own.arm("forward.send")
    guest.pwrite(pattern(2, BLOCK), 0)
    own.wait_hit("forward.send")
    clone.start()
    in_sync(clone)
    other = clone.connect("disk0")
    other.pwrite(pattern(3, BLOCK), GRAIN)
    in_sync(clone)
    # The next session of anybody is held before it may write, so all that there is was written by the clone.
    there.arm("pairing.begun")
    own.release("forward.send")
    there.wait_hit("pairing.begun")
    assert secondary.disks[0].read_bytes() == clone.disks[0].read_bytes() == whole(other)
    counts = [sessions_begun(primary) for primary in (first, clone)]
    begun = time.monotonic()
    there.release("pairing.begun")

    def have_written() -> bool:
        # A loser that has nothing to send does not notice that it is one.
        at = BLOCK * (int((time.monotonic() - begun) * 1000) % 16)
        guest.pwrite(pattern(4, BLOCK), at)
        other.pwrite(pattern(5, BLOCK), GRAIN + at % GRAIN)
        return time.monotonic() - begun > 3 and all(count() for count in counts)

    wait_until(have_written, "three seconds are over, and each has had its turn")
    came = [count() for count in counts]
    # After a loss 0.1 s, and from then on each time twice as long; the first one waits for nothing.
    most = math.log2((time.monotonic() - begun) / 0.1 + 1) + 2
    assert all(1 <= count <= most for count in came), (came, most)
    clone.terminate()
    in_sync(first)
