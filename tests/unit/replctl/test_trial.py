# SPDX-License-Identifier: BSD-3-Clause
"""When something works on a test, and what is ended afterwards; and the whole of `replctl test run` against a node that
says what a node says."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import pytest

from replication.client.qmp import Refused
from replication.client.session import Session, Unusable
from replication.replctl import trial
from replication.replctl.line import _apart, parser, with_node
from replication.replctl.rehearsal import test as run_test
from replication.replctl.trial import Trial, boot
from waiting import DEADLINE_S, wait_until


def tried(script: str, marker: str | None = None, within_s: float = DEADLINE_S, agent: str | None = None) -> str | None:
    environment = {"REPLICATION_TEST_URI": "nbd://x"}
    return Trial(["sh", "-c", script], environment, marker, agent, time.monotonic() + within_s).run()


def test_a_command_has_passed_when_it_ends_well(capfd: pytest.CaptureFixture[str]) -> None:
    assert tried('echo "$REPLICATION_TEST_URI"; cat') is None  # there is nothing to read
    assert capfd.readouterr().out == "nbd://x\n"
    assert tried("exit 3") == "sh has ended with 3"
    assert tried("kill -9 $$") == "sh has ended with -9"


def test_a_marker_counts_in_however_many_pieces_it_comes() -> None:
    assert tried("printf 'lo'; sleep 0.1; printf 'gin: '; exec sleep 1000", "login:") is None
    assert tried("echo login; exit 0", "login:") == "sh has ended with 0, and has not said login:"
    assert tried("printf login:; exit 5", "login:") is None


def test_what_is_not_done_in_time_has_failed_and_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"sh -c 'trap \"\" TERM; echo $$ >{pid}.new; mv {pid}.new {pid}; exec sleep 1000' & wait"
    within_s = 0.5
    while not pid.exists():  # a slow machine has not even begun
        assert tried(script, within_s=within_s) == "sh was not done in time"
        within_s *= 2
    wait_until(lambda: not _alive(int(pid.read_text())), "what it has started has ended")


def _alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_who_never_stops_talking_is_ended_all_the_same() -> None:
    assert tried("while :; do echo x; done", "y", within_s=0.5) == "sh was not done in time"


def test_a_child_that_holds_the_output_open_holds_up_nothing() -> None:
    assert tried("sleep 1000 & exit 0") is None
    assert tried("(while :; do echo x; done) & exit 0") is None


def test_a_guest_agent_that_answers_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answers(path: str) -> bool:
        asked.append(path)
        return len(asked) == 3

    monkeypatch.setattr(trial, "_answers", answers)
    assert tried("exec sleep 1000", agent="/a") is None
    assert asked == ["/a"] * 3
    monkeypatch.setattr(trial, "_answers", lambda _path: False)
    assert tried("exit 0", agent="/a") == "sh has ended with 0 before the guest agent has answered"


def test_no_agent_answers_where_there_is_none(tmp_path: Path) -> None:
    assert not trial._answers(str(tmp_path / "none"))


def test_a_command_that_is_not_there_is_said() -> None:
    with pytest.raises(Unusable, match="/none cannot be run: No such file"):
        Trial(["/none"], {}, None, None, 0.0).run()


def machine(**more: Any) -> argparse.Namespace:
    given = {"qemu": "/q", "memory": 512, "network": False, "agent": False, "command": ["-cpu", "max"], **more}
    return argparse.Namespace(**given)


def test_a_machine_has_the_disks_of_the_test_and_no_network() -> None:
    with boot(["nbd+unix:///a.x?socket=/r,s", "nbd://h/b.x"], machine()) as (command, agent):
        assert agent is None
        assert command[:1] + command[-2:] == ["/q", "-cpu", "max"]
        disks = [word for word in command if word.startswith("file=")]
        assert [disk.partition(",format")[0] for disk in disks] == [
            "file=nbd+unix:///a.x?socket=/r,,s",
            "file=nbd://h/b.x",
        ]
        assert command[command.index("-nic") + 1] == "none"
    with boot(["nbd://h/b.x"], machine(network=True, agent=True)) as (command, agent):
        assert agent is not None
        assert os.path.isdir(os.path.dirname(agent))
        assert f"socket,id=agent,path={agent},server=on,wait=off" in command
        assert "restrict=on" in command[command.index("-nic") + 1]
    assert not os.path.exists(os.path.dirname(agent))
    with pytest.raises(Unusable, match="does not speak TLS"), boot(["nbds://h/b.x"], machine()):
        pass


# -- all of it -----------------------------------------------------------------------------------------------------


class Node:
    """Makes a test, unless it `refuses`, and keeps what it is told of it."""

    def __init__(self, refuses: Refused | None = None, keeps: dict[str, Any] | None = None) -> None:
        self.refuses = refuses
        self.keeps = keeps
        self.called: list[tuple[str, dict[str, Any]]] = []

    def call(self, command: str, **arguments: Any) -> Any:
        self.called.append((command, arguments))
        if command == "replication-test-start":
            if self.refuses is not None:
                raise self.refuses
            export = {"disk": "disk0", "export": f"top.{arguments['name']}", "size": 1}
            return {"name": arguments["name"], "id": "1a", "epoch": 3, "exports": [export]}
        return self.keeps or {
            "name": arguments["name"],
            "result": arguments.get("result"),
            "reason": arguments.get("reason"),
        }

    def again(self, _timeout_s: float) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass


def run(node: Node, *typed: str) -> None:
    words, command = _apart(list(typed))
    options = parser().parse_args(with_node(words))
    options.command, options.timeout = command, DEADLINE_S
    run_test(cast("Session", node), options)


URI = ("--uri", "nbd+unix:///?socket=/s")


def test_a_test_that_passes_is_kept_with_the_time_it_took(capfd: pytest.CaptureFixture[str]) -> None:
    node = Node()
    run(node, "test", "run", *URI, "--deadline", "50", "--json", "--", "sh", "-c", 'echo "$REPLICATION_TEST_URIS"')
    (start, stop) = node.called
    assert start == ("replication-test-start", {"name": "run", "timeout": 110.0})
    assert stop[0] == "replication-test-stop"
    assert (stop[1]["name"], stop[1]["id"], stop[1]["result"]) == ("run", "1a", "passed")
    assert 0 < stop[1]["rto"] < DEADLINE_S
    said = capfd.readouterr()
    assert said.err == "nbd+unix:///top.run?socket=/s\n"
    assert json.loads(said.out)["test"]["result"] == "passed"


@pytest.mark.parametrize(
    ("node", "script", "text"),
    [
        (Node(), "exit 1", "the test has failed: sh has ended with 1"),
        # The node knows better.
        (Node(keeps={"result": "failed", "reason": "it was full"}), "exit 0", "the test has failed: it was full"),
        (Node(keeps={"result": None, "reason": "a failover"}), "exit 0", "the test has no result: a failover"),
    ],
)
def test_a_test_that_fails_is_an_error(node: Node, script: str, text: str) -> None:
    with pytest.raises(Refused, match=text):
        run(node, "test", "run", *URI, "--", "sh", "-c", script)
    assert node.called[-1][0] == "replication-test-stop"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_interrupt_ends_the_test_as_a_failed_one(tmp_path: Path, number: signal.Signals) -> None:
    """It may come before Popen has returned."""
    node, pid = Node(), tmp_path / "pid"
    script = f"echo $$ >{pid}; kill -{number.name[3:]} $PPID; exec sleep 1000"
    with pytest.raises(KeyboardInterrupt):
        run(node, "test", "run", *URI, "--", "sh", "-c", script)
    wait_until(lambda: not _alive(int(pid.read_text())), "it has ended")
    assert node.called[-1][1] == {"name": "run", "id": "1a", "result": "failed", "reason": "it was interrupted"}


def test_an_interrupt_while_the_command_is_started_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    node, real, started = Node(), subprocess.Popen, []

    def popen(*arguments: Any, **options: Any) -> Any:
        started.append(real(*arguments, **options))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        run(node, "test", "run", *URI, "--", "sleep", "1000")
    assert started[0].poll() == -signal.SIGTERM
    assert node.called[-1][1]["reason"] == "it was interrupted"


@pytest.mark.parametrize("second", ["HUP", "INT"])
def test_a_second_interrupt_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    """It comes while the command, which takes no notice of SIGTERM, is being ended. A session that closes sends two."""
    monkeypatch.setattr(trial, "_END_S", 0.5)
    pid, node, real = tmp_path / "pid", Node(), trial._signal

    def first(_trial: Trial, _data: bytes) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    def then(process: Any, number: int) -> None:
        real(process, number)
        os.kill(os.getpid(), getattr(signal, f"SIG{second}"))

    monkeypatch.setattr(Trial, "_hears", first)
    monkeypatch.setattr(trial, "_signal", then)
    script = f"trap '' TERM; echo $$ >{pid}; echo x; exec sleep 1000"
    with pytest.raises(KeyboardInterrupt):
        run(node, "test", "run", *URI, "--", "sh", "-c", script)
    wait_until(lambda: not _alive(int(pid.read_text())), "it has ended")
    assert node.called[-1][1]["result"] == "failed"


def test_an_interrupt_while_the_command_is_being_ended_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, node, real = tmp_path / "pid", Node(), trial._signal

    def interrupt(process: Any, number: int) -> None:
        real(process, number)
        if number == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trial, "_signal", interrupt)
    script = f"trap '' TERM; echo $$ >{pid}; echo login:; exec sleep 1000"
    with pytest.raises(KeyboardInterrupt):
        run(node, "test", "run", *URI, "--marker", "login:", "--", "sh", "-c", script)
    wait_until(lambda: not _alive(int(pid.read_text())), "it has ended")


@pytest.mark.parametrize("reads", [False, True], ids=["reads-nothing", "is-gone"])
def test_who_reads_the_output_decides_nothing(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """Wrong: BrokenPipeError makes it a failed test with exit code 0, and a full pipe holds up the deadline."""
    monkeypatch.setattr(trial, "_ECHO_S", 0.0)
    out, into = os.pipe()
    try:
        if reads:
            os.close(out)
        echo = trial._Echo(into)
        for _ in range(3):
            echo.say(b"x" * (1 << 20))
        echo.end()
        monkeypatch.setattr(trial, "_Echo", lambda _fd: echo)
        assert tried("head -c 1000000 /dev/zero; exit 3") == "sh has ended with 3"
        assert tried("head -c 1000000 /dev/zero") is None
    finally:
        os.close(into)
        if not reads:
            os.close(out)


@pytest.mark.parametrize("typed", [("--", "/none"), ("--", "true")], ids=["no-command", "no-uri"])
def test_what_cannot_be_tried_ends_the_test(typed: tuple[str, ...]) -> None:
    node = Node()
    with pytest.raises(Unusable):
        run(node, "test", "run", *(URI if "/none" in typed else ()), *typed)
    assert node.called[-1][1]["result"] == "failed"


def test_where_there_is_no_secondary_a_timer_does_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run(Node(Refused("this is a primary", code="wrong-mode")), "test", "run", "--if-secondary", "--", "true")
    assert capfd.readouterr().out == "nothing was tested: this is a primary\n"
    with pytest.raises(Refused, match="this is a primary"):
        run(Node(Refused("this is a primary", code="wrong-mode")), "test", "run", "--", "true")
    with pytest.raises(Refused, match="no checkpoint"):
        run(Node(Refused("no checkpoint", code="no-checkpoint")), "test", "run", "--if-secondary", "--", "true")


@pytest.mark.parametrize(
    "typed",
    [
        ("run",),
        ("run", "--agent", "--", "true"),
        ("run", "--ends", "5", "--", "true"),
        ("start", "--boot"),
        ("stop", "--marker", "x"),
        ("start", "--", "true"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_begins(typed: tuple[str, ...]) -> None:
    node = Node()
    with pytest.raises(Unusable):
        run(node, "test", *typed)
    assert node.called == []


def test_only_a_row_that_takes_a_command_has_one() -> None:
    takes: Callable[[list[str]], Any] = _apart
    assert takes(["web1", "test", "run", "--", "a", "--", "b"]) == (["web1", "test", "run"], ["a", "--", "b"])
    assert takes(["web1", "compare", "--", "a", "b"]) == (["web1", "compare", "--", "a", "b"], [])
