# SPDX-License-Identifier: BSD-3-Clause
"""scripts/replctl as a person runs it: a process, against a made-up node behind a real control socket."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import commandline
from commandline import REPLCTL
from replication.control import server
from replication.control.commands import Commands
from replication.control.server import CLIENTS_MAX, ControlServer
from replication.errors import CommandError
from replication.events import EventHub
from replication.stage import Mode

DEADLINE_S = 30.0

STATUS: dict[str, Any] = {
    "mode": "secondary",
    "stage": "running",
    "error": {
        "case": 3,
        "disk": "disk0",
        "operation": "write",
        "offset": 4096,
        "length": 512,
        "errno": 28,
        "count": 2,
        "first": 1.0,
        "last": 2.0,
        "desc": "copy-before-write failed",
    },
    "consistent": True,
    "epoch": 12,
    "checkpoint": {"time": 1700000000.5, "duration": 0.0125},
    "link": {"state": "connected", "peer": "nbd://a"},
    "novelty": {"a": [1]},
    "disks": [
        {
            "name": "disk0",
            "top-id": "top0",
            "size": 10 << 30,
            "active-bytes": 0,
            "hidden-bytes": 3 << 20,
            "totals": {"written-bytes": 5 << 20, "reads": 7},
        },
        {"name": "disk[1]", "size": 512, "cow-bytes": 1536, "mood": "good"},
    ],
}


PREFLIGHT = {
    "allowed": True,
    "force": False,
    "stage": "running",
    "epoch": 12,
    "checkpoint-age": 1.25,
    "bytes-to-commit": 3 << 20,
    "predicted-seconds": 0.008,
    "commit-rate": 4e8,
}
PREFLIGHT_TEXT = """\
failover allowed   yes
last checkpoint    number 12, 1.2 s old: what the primary wrote since is lost
to commit          3.0 MiB, about 8.0 ms; the guest need not wait for it
"""
LOST = PREFLIGHT | {"allowed": False, "force": True, "reason": "Failover is refused: no checkpoint"}


def job(name: str, kind: str, status: str, current: int, total: int, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "type": kind,
        "status": status,
        "current-progress": current,
        "total-progress": total,
    } | more


class Node:
    """Answers as it is told to, and records what it was asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status: dict[str, Any] = STATUS
        self.jobs: list[list[dict[str, Any]]] = [[]]
        self.error: str | None = None
        self.refusal: Exception | None = None
        self.preflight: dict[str, Any] = PREFLIGHT
        self.hold: threading.Event | None = None

    def _act(self, *call: Any) -> None:
        self.calls.append(call)
        if self.hold is not None:
            assert self.hold.wait(DEADLINE_S)
        if self.refusal is not None:
            raise self.refusal

    def start(self, mode: Mode | None, secondary: str | None, sync: str) -> None:
        self._act("start", mode, secondary, sync)

    def checkpoint(self) -> tuple[int, float]:
        self._act("checkpoint")
        return 13, 0.0421

    def get_error(self) -> str | None:
        return self.error

    def stop(self, failover: bool, force: bool = False) -> None:
        self._act("stop", failover, *(["force"] if force else []))

    def retry(self, force: bool = False) -> None:
        self._act("retry", *(["force"] if force else []))

    def query_failover(self) -> dict[str, Any]:
        return self.preflight

    def lost_heartbeat(self) -> None:
        self._act("lost_heartbeat")

    def query(self) -> dict[str, Any]:
        return self.status

    def query_jobs(self) -> list[dict[str, Any]]:
        return self.jobs.pop(0) if len(self.jobs) > 1 else self.jobs[0]

    def cancel_job(self, id: str) -> None:
        self._act("cancel", id)

    def dismiss_job(self, id: str) -> None:
        self._act("dismiss", id)


class Stage:
    def __init__(self, folder: Path, node: Node | None = None) -> None:
        self.path = folder / "control.sock"
        self.node = node or Node()
        self.hub = EventHub()
        self.server = ControlServer(str(self.path), Commands(self.node, lambda: None).execute, self.hub)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    stage.server.bind()
    stage.server.start()
    yield stage
    if stage.node.hold is not None:
        stage.node.hold.set()
    stage.server.stop()


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("REPLCTL_SOCKET", "COLUMNS")}
    return kept | {"TZ": "UTC"} | more


def replctl(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return commandline.replctl(*arguments, environ=environment(**environ))


@contextlib.contextmanager
def running(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A replctl that does not end by itself; it is killed when the test is done with it."""
    process = subprocess.Popen(
        [REPLCTL, *map(str, arguments)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def line_of(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return " ".join(line.split())


def test_status_shows_everything_the_node_says(stage: Stage) -> None:
    text = ok(replctl("-s", stage.path, "status"))
    assert line_of(text, "mode") == "mode secondary"
    assert line_of(text, "stage") == "stage running"
    assert line_of(text, "error") == (
        "error copy-before-write failed (case 3, disk disk0, operation write, offset 4096, length 512,"
        " No space left on device, 2 times, first 1970-01-01 00:00:01, last 1970-01-01 00:00:02)"
    )
    assert line_of(text, "consistent") == "consistent yes"
    assert line_of(text, "epoch") == "epoch 12"
    assert line_of(text, "checkpoint") == "checkpoint 2023-11-14 22:13:20, took 12.5 ms"
    assert line_of(text, "link") == "link connected, peer nbd://a"
    assert line_of(text, "novelty") == 'novelty {"a": [1]}'
    rows = [line.split() for line in text.splitlines()]
    assert ["disk", "guest", "face", "size", "active", "hidden", "cow-bytes", "mood"] in rows
    assert ["disk0", "top0", "10.0", "GiB", "0", "B", "3.0", "MiB", "-", "-"] in rows
    assert ["disk[1]", "-", "512", "B", "-", "-", "1.5", "KiB", "good"] in rows
    assert line_of(text, "disk0 in total") == "disk0 in total: written-bytes 5.0 MiB, reads 7"


def test_status_of_a_node_that_has_done_nothing(stage: Stage) -> None:
    stage.node.status = {
        "mode": "primary",
        "stage": "none",
        "error": None,
        "consistent": False,
        "epoch": 0,
        "checkpoint": {"time": None, "duration": None},
        "link": None,
        "disks": [],
    }
    text = ok(replctl("-s", stage.path, "status"))
    assert [line.split() for line in text.splitlines()] == [
        ["mode", "primary"],
        ["stage", "none"],
        ["error", "none"],
        ["consistent", "no"],
        ["epoch", "0"],
        ["checkpoint", "never"],
        ["link", "-"],
    ]


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"error": "text", "checkpoint": 5, "link": "up", "disks": None},
        {"checkpoint": {"time": "soon", "duration": []}, "disks": [{}, "what", {"size": "big", "totals": []}]},
        {"error": {"errno": "EIO"}, "link": {}, "checkpoint": {"time": 1e300, "duration": True}, "disks": [{"a": {}}]},
    ],
)
def test_status_shows_the_unexpected_as_it_is(stage: Stage, status: dict[str, Any]) -> None:
    stage.node.status = status
    ok(replctl("-s", stage.path, "status"))


def test_nothing_a_node_says_drives_the_terminal(stage: Stage) -> None:
    stage.node.status = {"mode": "\x1b[2Jmode\n\rx", "disks": [{"name": "\x1b]0;title\x07[red]disk[/red]"}]}
    text = ok(replctl("-s", stage.path, "status"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]disk[/red]" in text
    stage.node.refusal = CommandError("bad\x1b[2J\nnews")
    assert replctl("-s", stage.path, "stop").stderr == "replctl: bad [2J news\n"


def test_status_json_is_the_nodes_answer(stage: Stage) -> None:
    assert json.loads(ok(replctl("-s", stage.path, "status", "--json"))) == STATUS


def test_where_the_socket_is(stage: Stage) -> None:
    for done in (
        replctl("--control", stage.path, "error"),
        replctl("--state", stage.path.parent, "error"),
        replctl("error", REPLCTL_SOCKET=str(stage.path)),
        # The command line goes before the environment.
        replctl("-s", stage.path, "error", REPLCTL_SOCKET="/nowhere"),
    ):
        assert ok(done) == "no error\n"


@pytest.mark.parametrize(
    ("arguments", "call", "text"),
    [
        (["start"], ("start", None, None, "auto"), "replication started\n"),
        (
            ["start", "--mode", "primary", "--secondary", "nbd://b", "--sync", "full"],
            ("start", Mode.PRIMARY, "nbd://b", "full"),
            "replication started\n",
        ),
        (["checkpoint"], ("checkpoint",), "checkpoint 13 took 42.1 ms\n"),
        (["stop"], ("stop", False), "replication stopped\n"),
        (["retry"], ("retry",), "the commit goes on; `replctl jobs --watch` shows it\n"),
        (["retry", "--force"], ("retry", "force"), "the commit goes on; `replctl jobs --watch` shows it\n"),
        (
            ["failover", "--yes"],
            ("stop", True),
            PREFLIGHT_TEXT + "failed over; `replctl jobs --watch` shows the commit\n",
        ),
        (["cancel", "commit-disk0"], ("cancel", "commit-disk0"), "job commit-disk0 cancelled\n"),
    ],
)
def test_commands(stage: Stage, arguments: list[str], call: tuple[Any, ...], text: str) -> None:
    assert ok(replctl("-s", stage.path, *arguments)) == text
    assert stage.node.calls == [call]


@pytest.mark.parametrize("command", ["start", "checkpoint"])
@pytest.mark.parametrize("reached", ["failover", "done"])
def test_what_the_node_takes_and_ignores_is_not_said_to_be_done(stage: Stage, command: str, reached: str) -> None:
    stage.node.status = STATUS | {"stage": reached}
    text = ok(replctl("-s", stage.path, command))
    assert text.startswith(f"nothing to do: the stage is {reached}")
    assert ("new pair" in text) == (command == "start")


def test_a_line_is_not_broken_where_there_is_no_terminal(stage: Stage) -> None:
    desc = "/srv/" + "long name " * 50 + "is no longer there"
    stage.node.status = STATUS | {"error": desc}
    assert line_of(ok(replctl("-s", stage.path, "status")), "error") == f"error {desc}"


def test_failover_check_shows_and_does_nothing(stage: Stage) -> None:
    assert ok(replctl("-s", stage.path, "failover", "--check")) == PREFLIGHT_TEXT
    stage.node.preflight = LOST
    done = replctl("-s", stage.path, "failover", "--check")
    assert (done.returncode, done.stderr) == (1, "replctl: Failover is refused: no checkpoint\n")
    assert done.stdout.startswith("failover allowed   no: Failover is refused: no checkpoint\n")
    assert line_of(done.stdout, "last checkpoint") == "last checkpoint number 12, which is not valid any more"
    assert stage.node.calls == []


def test_a_failover_that_is_not_allowed_needs_force(stage: Stage) -> None:
    stage.node.preflight = LOST
    done = replctl("-s", stage.path, "failover", "--yes")
    assert (done.returncode, done.stderr) == (1, "replctl: Failover is refused: no checkpoint\n")
    assert stage.node.calls == []
    assert ok(replctl("-s", stage.path, "failover", "--yes", "--force"))
    assert stage.node.calls == [("stop", True, "force")]


def test_force_does_not_help_where_there_is_nothing_to_force(stage: Stage) -> None:
    stage.node.preflight = LOST | {"force": False, "stage": "none"}
    assert replctl("-s", stage.path, "failover", "--yes", "--force").returncode == 1
    assert stage.node.calls == []


@pytest.mark.parametrize("reached", ["failover", "done"])
def test_failing_over_twice_is_no_error(stage: Stage, reached: str) -> None:
    stage.node.preflight = LOST | {"stage": reached, "force": False}
    assert ok(replctl("-s", stage.path, "failover", "--yes")).endswith("nothing to do\n")
    assert stage.node.calls == []


@pytest.mark.parametrize("arguments", [["start"], ["checkpoint"], ["stop"], ["failover", "--yes"], ["cancel", "x"]])
def test_refusal_is_exit_code_1_and_the_nodes_words(stage: Stage, arguments: list[str]) -> None:
    stage.node.refusal = CommandError("Block replication is not running")
    done = replctl("-s", stage.path, *arguments)
    said = PREFLIGHT_TEXT if "failover" in arguments else ""
    assert (done.returncode, done.stdout, done.stderr) == (1, said, "replctl: Block replication is not running\n")


def test_error(stage: Stage) -> None:
    stage.node.error = "I/O error occurred"
    done = replctl("-s", stage.path, "error")
    assert (done.returncode, done.stderr) == (1, "replctl: I/O error occurred\n")


def test_failover_without_terminal_needs_yes(stage: Stage) -> None:
    done = replctl("-s", stage.path, "failover")
    assert done.returncode == 2
    assert done.stderr == ("replctl: failover asks for confirmation, and there is no terminal to ask on; use --yes\n")
    assert stage.node.calls == []


@pytest.mark.parametrize(
    ("typed", "code", "calls"), [("yes\n", 0, [("stop", True)]), ("y\n", 2, []), ("\n", 2, []), ("\x04", 2, [])]
)
def test_failover_on_a_terminal_explains_and_asks(stage: Stage, typed: str, code: int, calls: list[Any]) -> None:
    master, slave = pty.openpty()
    with (
        os.fdopen(master, "wb", buffering=0) as keyboard,
        running("-s", stage.path, "failover", stdin=slave) as process,
    ):
        os.close(slave)
        keyboard.write(typed.encode())
        out, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code
    assert "It cannot be undone" in out
    assert err == ("" if code == 0 else "replctl: failover was not confirmed, nothing done\n")
    assert stage.node.calls == calls


PAIR_OF_DISKS = [{"name": "disk0", "size": 4096, "out-of-sync-bytes": 0, "totals": {"written": 512}}]
RUNNING_PRIMARY = {
    "mode": "primary",
    "stage": "running",
    "error": None,
    "link": {"state": "in-sync", "secondary": "nbd://b"},
    "disks": PAIR_OF_DISKS,
}
RUNNING_SECONDARY = {
    "mode": "secondary",
    "stage": "running",
    "error": None,
    "disks": [{"name": "disk0", "size": 4096}],
}


class PrimaryNode(Node):
    """A primary whose guest writes `late` bytes more after the barrier."""

    late = 0

    def stop(self, failover: bool, force: bool = False) -> None:
        super().stop(failover, force)
        totals = {"written": 512 + self.late}
        self.status = self.status | {"stage": "done", "disks": [PAIR_OF_DISKS[0] | {"totals": totals}]}


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Stage, Stage]]:
    stages = []
    for name, node in (("p", PrimaryNode()), ("s", Node())):
        (tmp_path / name).mkdir()
        stages.append(Stage(tmp_path / name, node))
        stages[-1].server.bind()
        stages[-1].server.start()
    stages[0].node.status, stages[1].node.status = RUNNING_PRIMARY, RUNNING_SECONDARY
    yield stages[0], stages[1]
    for each in stages:
        each.server.stop()


STOPPED = [("checkpoint",), ("stop", False)]
STARTED_AGAIN = [*STOPPED, ("start", None, "nbd://b", "auto")]


@pytest.mark.parametrize("turned", [False, True], ids=["asked-at-the-primary", "asked-at-the-secondary"])
def test_switchover_drains_stops_and_promotes(both: tuple[Stage, Stage], turned: bool) -> None:
    here, there = both[::-1] if turned else both
    out = ok(replctl("-s", here.path, "switchover", "--yes", "--peer", there.path))
    assert out.endswith("start the guest there, on the export of its guest face\n")
    assert both[0].node.calls == STOPPED
    assert both[1].node.calls == [("stop", False)]


def test_switchover_is_taken_back_while_the_guest_still_writes(both: tuple[Stage, Stage]) -> None:
    assert isinstance(both[0].node, PrimaryNode)
    both[0].node.late = 512
    done = replctl("-s", both[0].path, "switchover", "--yes", "--peer", both[1].path)
    assert done.returncode == 1
    assert "still writes" in done.stderr
    assert "replicates again" in done.stderr
    assert both[0].node.calls == STARTED_AGAIN
    assert both[1].node.calls == []


def test_switchover_is_taken_back_when_the_secondary_refuses(both: tuple[Stage, Stage]) -> None:
    both[1].node.refusal = CommandError("Backup job was cancelled unexpectedly")
    done = replctl("-s", both[0].path, "switchover", "--yes", "--peer", both[1].path)
    assert (done.returncode, done.stderr) == (
        1,
        "replctl: Backup job was cancelled unexpectedly; nothing has changed, the primary replicates again\n",
    )
    assert both[0].node.calls == STARTED_AGAIN


@pytest.mark.parametrize(
    ("primary", "secondary", "why"),
    [
        ({"stage": "done"}, {}, "its stage is done"),
        ({}, {"stage": "none"}, "its stage is none"),
        ({"error": {"desc": "link lost"}}, {}, "link lost"),
        ({"mode": "secondary"}, {}, "both are secondary"),
        ({}, {"disks": [{"name": "disk0", "size": 512}]}, "not a pair"),
    ],
)
def test_switchover_of_what_is_no_healthy_pair_does_nothing(
    both: tuple[Stage, Stage], primary: dict[str, Any], secondary: dict[str, Any], why: str
) -> None:
    both[0].node.status, both[1].node.status = RUNNING_PRIMARY | primary, RUNNING_SECONDARY | secondary
    done = replctl("-s", both[0].path, "switchover", "--yes", "--peer", both[1].path)
    assert done.returncode == 1
    assert why in done.stderr
    assert both[0].node.calls == both[1].node.calls == []


def test_switchover_without_terminal_needs_yes_and_its_peer_must_be_there(both: tuple[Stage, Stage]) -> None:
    assert replctl("-s", both[0].path, "switchover", "--peer", both[1].path).returncode == 2
    assert replctl("-s", both[0].path, "switchover", "--yes", "--peer", "/nowhere").returncode == 2
    assert both[0].node.calls == []


def test_jobs(stage: Stage) -> None:
    assert ok(replctl("-s", stage.path, "jobs")) == "no jobs\n"
    stage.node.jobs = [
        [
            job("backup-disk0", "backup", "running", 0, 0),
            job("commit-disk0", "commit", "running", 512 << 20, 2 << 30),
            job("resync[0]", "resync", "concluded", 5, 10, error="No space left on device"),
        ]
    ]
    text = ok(replctl("-s", stage.path, "jobs"))
    backup, commit, resync = [" ".join(line.split()) for line in text.splitlines()]
    assert backup.startswith("backup-disk0 (backup)")
    assert " 0% " in backup
    assert commit.startswith("commit-disk0 (commit)")
    assert commit.endswith(" 25% 512.0 MiB of 2.0 GiB running")
    assert resync.startswith("resync[0] (resync)")
    assert resync.endswith(" 50% 5 B of 10 B concluded: No space left on device")
    assert json.loads(ok(replctl("-s", stage.path, "jobs", "--json"))) == stage.node.jobs[0]


def test_jobs_watch_ends_with_the_last_job_but_does_not_wait_for_copy_before_write(stage: Stage) -> None:
    backup = job("backup-disk0", "backup", "running", 1, 2)
    states = [
        [backup, job("commit-disk0", "commit", "running", 1, 4)],
        [backup, job("commit-disk0", "commit", "running", 3, 4), job("resync", "resync", "running", 0, 1)],
        [backup, job("commit-disk0", "commit", "concluded", 4, 4)],
    ]
    stage.node.jobs = [list(state) for state in states]
    lines = ok(replctl("-s", stage.path, "jobs", "--watch", "--json")).splitlines()
    assert [json.loads(line) for line in lines] == states
    stage.node.jobs = [list(state) for state in states]
    assert "100%" in ok(replctl("-s", stage.path, "jobs", "--watch"))


def test_jobs_watch_reports_a_job_that_failed(stage: Stage) -> None:
    stage.node.jobs = [
        [job("commit-disk0", "commit", "running", 1, 4)],
        [job("commit-disk0", "commit", "concluded", 2, 4, error="Input/output error")],
    ]
    done = replctl("-s", stage.path, "jobs", "--watch")
    assert (done.returncode, done.stderr) == (1, "replctl: job commit-disk0: Input/output error\n")


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line of a process's output, or a failed test."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], DEADLINE_S)[0]
    return process.stdout.readline()


def subscribed(stage: Stage) -> None:
    """Wait until the server has a subscriber for its events."""
    deadline = time.monotonic() + DEADLINE_S
    while not stage.hub._subscribers:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_events_as_they_come_and_a_clean_end(stage: Stage) -> None:
    with running("-s", stage.path, "events") as process:
        subscribed(stage)
        stage.hub.emit("REPLICATION_STAGE_CHANGE", mode="primary", from_="none", to="running")
        first = read_line(process)
        assert first.endswith("  REPLICATION_STAGE_CHANGE  mode=primary  from=none  to=running\n")
        stage.hub.emit("REPLICATION_LINK", state="down")
        assert "REPLICATION_LINK  state=down" in read_line(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out, err) == (130, "", "")


def test_events_json_and_a_node_that_goes_away(stage: Stage) -> None:
    with running("-s", stage.path, "events", "--json") as process:
        subscribed(stage)
        stage.hub.emit("REPLICATION_CHECKPOINT", epoch=1, duration=0.5)
        event = json.loads(read_line(process))
        assert event["event"] == "REPLICATION_CHECKPOINT"
        assert event["data"] == {"epoch": 1, "duration": 0.5}
        stage.server.stop()
        _, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, err) == (2, f"replctl: {stage.path}: the node closed the connection\n")


def test_status_watch(stage: Stage) -> None:
    with running("-s", stage.path, "status", "--watch", "0.01", "--json") as process:
        for _ in range(3):
            assert json.loads(read_line(process)) == STATUS
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, err) == (130, "")
    with running("-s", stage.path, "status", "--watch", "0.01") as process:
        seen = 0
        while seen < 2:
            seen += read_line(process).startswith("mode ")


def test_status_watch_on_a_terminal(stage: Stage) -> None:
    master, slave = pty.openpty()
    with (
        os.fdopen(master, "rb", buffering=0) as screen,
        running("-s", stage.path, "status", "--watch", "0.01", stdout=slave) as process,
    ):
        os.close(slave)
        shown = b""
        while shown.count(b"secondary") < 3:
            assert select.select([screen], [], [], DEADLINE_S)[0]
            shown += screen.read(4096)
        process.send_signal(signal.SIGINT)
        # The terminal's buffer is small: what still comes must be read for the process to end. EIO is its end.
        with contextlib.suppress(OSError):
            while screen.read(4096):
                pass
        assert process.wait(DEADLINE_S) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_reader_that_has_seen_enough(stage: Stage) -> None:
    with running("-s", stage.path, "status", "--watch", "0.01", "--json") as process:
        read_line(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_wrong_number_of_seconds_is_named() -> None:
    done = replctl("-s", "a", "--timeout", "soon", "status")
    assert done.stderr.splitlines()[-1].endswith("argument --timeout: soon is not a number of seconds above 0")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["-s", "a", "--state", "b", "status"],
        ["-s", "a", "start", "--mode", "third"],
        ["-s", "a", "start", "--sync", "often"],
        ["-s", "a", "--timeout", "0", "status"],
        ["-s", "a", "--timeout", "nan", "status"],
        ["-s", "a", "status", "--watch", "-1"],
        ["-s", "a", "cancel"],
        ["status"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    done = replctl(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("replctl")


def unreachable(done: subprocess.CompletedProcess[str], path: Path, what: str) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"replctl: {path}: {what}\n")


def test_no_node(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    unreachable(replctl("-s", path, "status"), path, "cannot connect: No such file or directory")
    path.write_text("")
    unreachable(replctl("-s", path, "status"), path, "cannot connect: Connection refused")
    long = tmp_path / ("x" * 120)
    unreachable(replctl("-s", long, "status"), long, "cannot connect: AF_UNIX path too long")


def test_node_that_is_full(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_S", 1000.0)
    with contextlib.ExitStack() as stack:
        for _ in range(CLIENTS_MAX):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(stage.path))
            assert client.recv(4096)
        # A reserved place is for what must get through.
        assert replctl("-s", stage.path, "status").returncode == 0
        done = replctl("-s", stage.path, "checkpoint")
        assert done.returncode == 1
        assert "Too many clients: this socket serves at most 16 at a time" in done.stderr


def test_node_that_does_not_answer_in_time(stage: Stage) -> None:
    stage.node.hold = threading.Event()
    unreachable(
        replctl("-s", stage.path, "--timeout", "0.3", "checkpoint"),
        stage.path,
        "no answer to replication-checkpoint within 0.3 s",
    )


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (b"", "no greeting within 0.3 s"),
        (b"SSH-2.0-OpenSSH\r\n", "what listens there does not speak QMP"),
        (b"NBDMAGICIHAVEOPT\0\3", "what listens there does not speak QMP"),
        (b"\xff\xfe\n", "what listens there does not speak QMP"),
        (b'{"hello": 1}\n', "what listens there does not speak QMP"),
        (b'{"error": 5}\n', "what listens there does not speak QMP"),
        (GREETING, "no answer to qmp_capabilities within 0.3 s"),
        (GREETING + b'{"return": {}}\r\n{"re', "no answer to query-replication within 0.3 s"),
        (GREETING + b'{"return": {}}\r\n{"what": 1}\r\n', "an answer to query-replication that is not QMP"),
    ],
)
def test_something_else_behind_the_socket(tmp_path: Path, said: bytes, what: str) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        peers: list[socket.socket] = []

        def talk() -> None:
            connection, _ = listener.accept()
            peers.append(connection)  # kept open: silence, not an end
            connection.sendall(said)

        talker = threading.Thread(target=talk)
        talker.start()
        done = replctl("-s", path, "--timeout", "0.3", "status")
        talker.join(DEADLINE_S)
        peers[0].close()
    unreachable(done, path, what)


def test_answer_in_an_unexpected_form_is_one_line(stage: Stage) -> None:
    stage.node.jobs = [[{"id": "x", "total-progress": "lots"}], 5]  # type: ignore[list-item]
    ok(replctl("-s", stage.path, "jobs"))
    done = replctl("-s", stage.path, "jobs")
    assert done.returncode == 2
    assert done.stderr.startswith("replctl: unexpected TypeError")
    assert done.stderr.count("\n") == 1


def test_failover_works_without_rich_and_tables_say_what_is_missing(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('No module named rich', name='rich')")
    assert ok(replctl("-s", stage.path, "failover", "--yes", PYTHONPATH=str(tmp_path)))
    assert ok(replctl("-s", stage.path, "status", "--json", PYTHONPATH=str(tmp_path)))
    done = replctl("-s", stage.path, "status", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (2, "replctl: rich is missing: install python3-rich, or use --json\n")
