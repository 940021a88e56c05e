# SPDX-License-Identifier: BSD-3-Clause
"""Which event means what, and the commands that are run for it: real ones."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkout import REPOSITORY
from replication.monitor import handlers as module
from replication.monitor.handlers import WAITING_MAX, Handlers, Situations
from replication.monitor.sight import Sight
from replication.service.handlers import ASKED, EVENTS, Handler, read_handlers
from waiting import DEADLINE_S, wait_until


def sight(link: str | None = "in-sync", reason: str | None = None, **answer: Any) -> Sight:
    what = {"mode": "primary", "stage": "running", "consistent": True, "link": {"state": link, "reason": reason}}
    return Sight("web", "/run/web.sock", True, 0.0, 0.0, None, {**what, **answer})


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": {key.rstrip("_"): value for key, value in data.items()}, "timestamp": {}}


def told(found: list[module.Occasion]) -> list[str]:
    return [occasion.event for occasion in found]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What goes into the log."""
    found: list[str] = []
    monkeypatch.setattr(module, "log", found.append)
    return found


@contextmanager
def running(*tables: dict[str, Any]) -> Iterator[Handlers]:
    handlers = Handlers(lambda node: read_handlers(tables))
    try:
        yield handlers
    finally:
        handlers.stop(DEADLINE_S)


# -- situations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "means", "values"),
    [
        (event("REPLICATION_STAGE_CHANGE", mode="secondary", from_="running", to="failover"), ["stage-change"],
         {"from": "running", "to": "failover"}),
        (event("REPLICATION_ERROR", case=2, disk="d", desc="why"), ["error"],
         {"case": "2", "disk": "d", "reason": "why"}),
        (event("REPLICATION_ERROR", case=4, disk="d", desc="a\nb"), ["error", "local-io-error"],
         {"case": "4", "disk": "d", "reason": "a?b"}),
        (event("REPLICATION_CHECKPOINT_AGE", epoch=1, age=2.0, limit=1.0), ["checkpoint-age"], {}),
        (event("REPLICATION_OVERLAY_WATERMARK", disk="d", overlay="hidden"), ["overlay-watermark"], {"disk": "d"}),
        (event("REPLICATION_TEST", name_="x", state="stopped", result="failed", reason="why"), ["test-failed"],
         {"reason": "why"}),
        (event("REPLICATION_TEST", name_="x", state="stopped", result="passed", reason=None), [], None),
        (event("REPLICATION_TEST", name_="x", state="ended", result=None, reason="why"), [], None),
        (event("MONITOR_NODE_UP", mode="primary"), ["node-up"], {}),
        (event("MONITOR_NODE_DOWN", reason="gone"), ["node-down"], {"reason": "gone"}),
        (event("JOB_STATUS_CHANGE", id="x"), [], None),
        ({"event": 7, "data": []}, [], None),
    ],
)  # fmt: skip
def test_what_an_event_means(given: dict[str, Any], means: list[str], values: dict[str, str] | None) -> None:
    found = Situations().of_event(given)
    assert told(found) == means
    assert not found or found[0].values == values


def test_a_link_is_told_when_it_changes_by_whichever_comes_first() -> None:
    node = Situations()
    assert node.of_look(sight("synchronizing")) == []  # nothing has happened yet
    assert told(node.of_event(event("REPLICATION_LINK", state="in-sync"))) == ["link-change", "after-resync-target"]
    assert node.of_look(sight("in-sync")) == []
    (change, gone) = node.of_look(sight("lost"))
    assert told([change, gone]) == ["link-change", "disconnected"]
    assert gone.values == {"from": "in-sync", "to": "lost"}
    # It stays away, in another way.
    assert told(node.of_event(event("REPLICATION_LINK", state="connecting"))) == ["link-change"]
    assert told(node.of_event(event("REPLICATION_LINK", state="in-sync"))) == ["link-change"]  # nothing was sent


def test_what_lasts_is_told_once_each_time_and_at_the_first_look() -> None:
    node = Situations()
    split = sight("disconnected", "Split brain: both have gone on")
    (found,) = node.of_look(split)
    assert (found.event, found.values["reason"]) == ("split-brain", "Split brain: both have gone on")
    assert node.of_look(split) == []
    assert told(node.of_look(sight("disconnected"))) == []
    assert told(node.of_look(split)) == ["split-brain"]
    assert told(node.of_look(sight("disconnected", consistent=False))) == ["inconsistent"]
    assert told(node.of_look(sight("disconnected", consistent=False))) == []
    # Before a start there is no checkpoint that could be missed.
    assert told(Situations().of_look(sight(consistent=False, stage="none"))) == []


@pytest.mark.parametrize(
    ("mode", "key"), [("primary", "missing-bytes"), ("secondary", "out-of-sync-bytes")], ids=["primary", "secondary"]
)
def test_what_is_missing_is_told_until_nothing_is(mode: str, key: str) -> None:
    """What of a primary's writes is on its way is not missing."""
    node = Situations()

    def look(*lacking: int) -> list[module.Occasion]:
        disks = [{"name": "d", "out-of-sync-bytes": 65536, key: count} for count in lacking]
        return node.of_look(sight(mode=mode, disks=disks))

    assert look(0, 0) == []
    (found,) = look(0, 131072)
    assert (found.event, found.data) == ("out-of-sync", {"bytes": 131072.0})
    assert look(65536, 0) == []
    assert look(0, 0) == []
    assert told(look(65536, 0)) == ["out-of-sync"]
    assert Situations().of_look(sight(mode="primary", disks=[{"name": "d", "out-of-sync-bytes": 1}])) == []


def test_a_node_that_has_learnt_that_the_other_has_gone_on() -> None:
    node = Situations()
    assert node.of_look(sight(outdated=False)) == []
    (found,) = node.of_look(sight(outdated=True, reason="the secondary has newer data"))
    assert (found.event, found.values["reason"]) == ("outdated", "the secondary has newer data")
    assert node.of_look(sight(outdated=True)) == []
    assert node.of_look(sight(outdated=False)) == []
    demoted = {"code": "demoted", "reason": "it was made a secondary", "time": 1.0}
    assert node.of_look(sight(outdated=True, **{"outdated-reason": demoted})) == [], "its own demotion is no news"
    (found,) = node.of_look(sight(outdated=True, **{"outdated-reason": {**demoted, "code": "told", "reason": "x"}}))
    assert found.values["reason"] == "x"


def test_a_guest_that_stands_still_is_told_once() -> None:
    node = Situations()

    def now(code: str | None) -> list[module.Occasion]:
        return node.of_event(event("REPLICATION_GUEST", suspended=code is not None, code=code, reason=code))

    assert now("not-promoted") == [], "nobody has decided yet"
    (found,) = now("wfc-timeout")
    assert (found.event, found.values["reason"]) == ("guest-suspended", "wfc-timeout")
    assert now("outdated") == []
    assert node.of_look(sight(**{"guest-suspended-reason": {"code": "outdated", "reason": "x"}})) == []
    assert node.of_look(sight(**{"guest-suspended-reason": None})) == []
    assert told(node.of_look(sight(**{"guest-suspended-reason": {"code": "outdated", "reason": "x"}}))) == [
        "guest-suspended"
    ]
    assert now(None) == []
    assert told(node.of_look(sight())) == [], "an older version"


def test_a_node_that_is_gone_says_nothing() -> None:
    gone = Sight("web", "/x", False, 0.0, 0.0, "gone", {"consistent": False, "stage": "running"})
    assert Situations().of_look(gone) == []


def test_every_event_that_a_file_may_name_can_come() -> None:
    node, found = Situations(), set()
    for given in (
        event("REPLICATION_STAGE_CHANGE"),
        event("REPLICATION_ERROR", case=1),
        event("REPLICATION_CHECKPOINT_AGE"),
        event("REPLICATION_OVERLAY_WATERMARK"),
        event("REPLICATION_TEST", result="failed"),
        event("REPLICATION_GUEST", suspended=True, code="fencing", reason="no link"),
        event("MONITOR_NODE_UP"),
        event("MONITOR_NODE_DOWN"),
    ):
        found |= set(told(node.of_event(given)))
    missing = [{"name": "d", "missing-bytes": 1}]
    last = sight("lost", "split brain", consistent=False, outdated=True, disks=missing)
    for look in (sight("synchronizing"), sight("in-sync"), last):
        found |= set(told(node.of_look(look)))
    assert found == set(EVENTS) - {ASKED}, "which the node itself asks"


# -- commands --------------------------------------------------------------------------------------------------

DOWN = event("MONITOR_NODE_DOWN", reason="it's gone; rm -rf /")


def test_a_command_finds_all_in_its_environment(tmp_path: Path, lines: list[str]) -> None:
    out = tmp_path / "out"
    with running(
        {"event": "node-down", "shell": True, "command": f"env > {out}.new && mv {out}.new {out}"}
    ) as handlers:
        handlers.heard(sight(), event("MONITOR_NODE_UP"))
        handlers.heard(sight(), DOWN)
        wait_until(out.exists, "it has run")
    pairs = [line.partition("=") for line in out.read_text().splitlines()]
    found = {key.removeprefix("NBDKIT_REPLICATION_"): value for key, _, value in pairs if key.startswith("NBDKIT_REP")}
    whole = json.loads(found.pop("JSON"))
    assert found == {
        "EVENT": "node-down",
        "NODE": "web",
        "CONTROL": "/run/web.sock",
        "MODE": "primary",
        "STAGE": "running",
        "REASON": "it's gone; rm -rf /",
    }
    assert whole == {key.lower(): value for key, value in found.items()} | {"data": DOWN["data"]}
    assert lines == []


def test_what_a_command_prints_and_how_it_ends_is_in_the_log(lines: list[str]) -> None:
    table = {"event": "node-down", "shell": True, "command": "echo one; seq 30 >&2; printf last; exit 3"}
    with running(table) as handlers:
        handlers.heard(sight(), DOWN)
        wait_until(lambda: lines and lines[-1].endswith("ended with 3"), "it has ended")
    name = "the handler of web for node-down (/bin/sh)"
    assert lines[0] == f"{name}: one"
    assert lines[1] == f"{name}: 1"
    assert lines[module.LINES_MAX :] == [f"{name} has said 12 lines more", f"{name} ended with 3"]


def test_a_program_that_is_not_there_is_named(lines: list[str]) -> None:
    with running({"event": "node-down", "command": "/nonexistent/x y"}) as handlers:
        handlers.heard(sight(), DOWN)
        wait_until(lambda: lines, "it is told")
    assert lines == [
        "the handler of web for node-down (/nonexistent/x) cannot be run: No such file or directory"
    ]  # fmt: skip


def test_a_command_that_does_not_end_is_ended_with_all_that_it_has_started(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    # Its time is over when it has begun, and not before.
    clock = SimpleNamespace(monotonic=lambda: 1e9 if pid.exists() and pid.read_text() else 0.0)
    monkeypatch.setattr(module, "time", clock)
    table = {
        "event": "node-down",
        "shell": True,
        "timeout": 0.3,
        "command": f"trap '' TERM; sleep 1000 & echo $! > {pid}; wait; sleep 1000",
    }
    with running(table) as handlers:
        handlers.heard(sight(), DOWN)
        wait_until(lambda: lines, "it was ended")
        monkeypatch.setattr(module, "time", time)  # for the end of the handlers
    assert lines == ["the handler of web for node-down (/bin/sh) was ended: it has not ended within 0.3 s"]
    wait_until(lambda: not _alive(int(pid.read_text())), "what it has started is gone")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_at_a_time_the_others_wait_and_not_too_many(tmp_path: Path, lines: list[str]) -> None:
    go, log = tmp_path / "go", tmp_path / "log"
    begun = tmp_path / "begun"
    command = f'touch {begun}; until test -e {go}; do sleep 0.02; done; echo "$NBDKIT_REPLICATION_DISK" >> {log}'
    with running({"event": "error", "shell": True, "command": command}) as handlers:
        handlers.heard(sight(), event("REPLICATION_ERROR", case=2, disk="0"))
        wait_until(begun.exists, "the first is at work")
        for disk in range(1, 1 + WAITING_MAX + 3):
            handlers.heard(sight(), event("REPLICATION_ERROR", case=2, disk=str(disk)))
        assert not log.exists(), "whoever tells waits for no command"
        go.touch()
        ran = [str(disk) for disk in range(1 + WAITING_MAX)]
        wait_until(lambda: log.exists() and len(log.read_text().split()) == len(ran), "all that waited have run")
        wait_until(lambda: lines, "what was left out is told")
    assert log.read_text().split() == ran
    assert lines == ["the handler of web for error (/bin/sh) is too slow: 3 events were left out"]


def test_a_file_that_changes_counts_from_the_next_event_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = ["a"]

    def configured(_node: str) -> tuple[Handler, ...]:
        return read_handlers([{"event": "node-up", "shell": True, "command": f"echo {said[0]} >> {out}"}])

    handlers = Handlers(configured)
    try:
        for word in ("a", "a", "b"):
            said[0] = word
            before = out.read_text() if out.exists() else ""
            handlers.heard(sight(), event("MONITOR_NODE_UP"))
            wait_until(lambda before=before: out.exists() and out.read_text() != before, "it has run")
        assert out.read_text() == "a\na\nb\n"
        handlers.keep(["other"])
        assert not handlers._runners
        assert not handlers._situations
    finally:
        handlers.stop(DEADLINE_S)


def test_the_end_ends_what_runs(tmp_path: Path, lines: list[str]) -> None:
    pid = tmp_path / "pid"
    table = {"event": "node-down", "shell": True, "command": f"echo $$ > {pid}; exec sleep 1000"}
    with running(table) as handlers:
        handlers.heard(sight(), DOWN)
        wait_until(lambda: pid.exists() and pid.read_text(), "it runs")
        handlers.stop(DEADLINE_S)
    assert not _alive(int(pid.read_text())), "a thousand seconds are not over"
    assert lines == []


def test_no_thread_for_a_command_is_told_and_the_next_one_has_one(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with running({"event": "node-down", "shell": True, "command": f"echo x >> {out}"}) as handlers:
        with monkeypatch.context() as patch:

            def refuse(_thread: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", refuse)
            handlers.heard(sight(), DOWN)
        assert lines == ["the handler of web for node-down (/bin/sh) was not run: can't start new thread"]
        handlers.heard(sight(), DOWN)
        wait_until(lambda: out.exists() and out.read_text() == "x\n", "it has run once")


# -- those that come along -------------------------------------------------------------------------------------

READY = REPOSITORY / "monitoring/handlers"


def ready(tmp_path: Path, name: str, *arguments: str, tool: str) -> tuple[list[str], str]:
    """What a handler gives to the tool that does the work: its arguments, and what it reads."""
    fake = tmp_path / tool
    fake.write_text(f'#!/bin/sh\nfor word; do echo "$word"; done > {tmp_path}/words\ncat > {tmp_path}/input\n')
    fake.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "NBDKIT_REPLICATION_NODE": "web",
        "NBDKIT_REPLICATION_EVENT": "split-brain",
        "NBDKIT_REPLICATION_REASON": "both went on",
        "NBDKIT_REPLICATION_JSON": '{"event": "split-brain"}',
    }
    subprocess.run([READY / name, *arguments], env=environment, check=True, stdin=subprocess.DEVNULL)
    return (tmp_path / "words").read_text().splitlines(), (tmp_path / "input").read_text()


def test_mail(tmp_path: Path) -> None:
    words, letter = ready(tmp_path, "mail", "a@x", "b@x", tool="sendmail")
    assert words == ["-i", "--", "a@x", "b@x"]
    assert letter.startswith("To: a@x, b@x\nSubject: web: split-brain on ")
    assert "\n\nEVENT: split-brain\n" in letter
    assert "\nREASON: both went on\n" in letter


def test_wall(tmp_path: Path) -> None:
    words, _ = ready(tmp_path, "wall", tool="wall")
    assert words == ["nbdkit-replication: web: split-brain (both went on)"]


def test_webhook(tmp_path: Path) -> None:
    words, body = ready(tmp_path, "webhook", "https://x/y", "--header", "A: b", tool="curl")
    assert body == '{"event": "split-brain"}'
    assert words[-4:] == ["--header", "A: b", "--", "https://x/y"]
    assert "--fail" in words


@pytest.mark.parametrize("name", ["mail", "webhook"])
def test_without_an_address_it_says_how(name: str) -> None:
    done = subprocess.run([READY / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith(f"usage: {name} ")) == (2, True)
