# SPDX-License-Identifier: BSD-3-Clause
"""guard.py: real commands that agree, refuse, hang, and say something."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from replication.errors import CommandError, ConfigError
from replication.service import guard as module
from replication.service.guard import Guard
from replication.service.handlers import ASKED, ASKED_MAX_S
from waiting import DEADLINE_S, wait_until


def guard(*commands: str, timeout: float = ASKED_MAX_S) -> Guard:
    tables: list[dict[str, Any]] = [
        {"event": ASKED, "command": command, "shell": True, "timeout": timeout} for command in commands
    ]
    others = [{"event": "disconnected", "command": "nonsense that the monitor has to read"}]
    return Guard.of([*tables, *others], {"mode": "secondary", "control": "/c.sock"})


def refusal(asked: Guard) -> str:
    with pytest.raises(CommandError) as refused:
        asked.ask({"verdict": "full"})
    return str(refused.value)


def test_without_a_handler_nobody_is_asked() -> None:
    Guard.of([{"event": "disconnected"}], {}).ask({})


def test_all_have_to_agree_and_find_what_it_is_about(tmp_path: Path) -> None:
    out = tmp_path / "out"
    python = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('NBDKIT_REP')}))"
    asked = guard(f'/usr/bin/python3 -c "{python}" > {out}', "true")
    asked.ask({"verdict": "full", "peer": "p", "stage": "running"})
    found = json.loads(out.read_text())
    values = {
        "EVENT": ASKED,
        "MODE": "secondary",
        "CONTROL": "/c.sock",
        "VERDICT": "full",
        "PEER": "p",
        "STAGE": "running",
    }
    assert found == {f"NBDKIT_REPLICATION_{name}": value for name, value in values.items()}
    asked.ask({"verdict": "full"})
    assert "exit code 3" in refusal(guard("true", "exit 3", f"rm {out}"))
    assert out.exists(), "those behind one that refuses are not asked"


def test_the_last_line_that_it_prints_is_the_reason() -> None:
    said = refusal(guard("seq 100000; echo; printf 'not before the backup\\033[31m\\n\\n' >&2; exit 1"))
    assert said.endswith("refuses the resync with exit code 1: not before the backup\\x1b[31m")
    assert said.startswith(f"{ASKED}: the handler /bin/sh")
    assert refusal(guard("exit 7")).endswith("exit code 7")


def test_the_log_has_a_refusal_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary tries again every few seconds."""
    lines: list[str] = []
    monkeypatch.setattr(module, "log", lines.append)
    code = tmp_path / "code"
    asked = guard(f"exit $(cat {code})")
    for wanted in ("1", "1", "2", "0", "2"):
        code.write_text(wanted)
        if wanted == "0":
            asked.ask({})
        else:
            refusal(asked)
    assert [line[-1] for line in lines] == ["1", "2", "2"]


def test_one_that_cannot_be_run_refuses() -> None:
    asked = Guard.of([{"event": ASKED, "command": "/nonexistent/command"}], {})
    assert "cannot be run, so the resync is not begun: No such file or directory" in refusal(asked)


@pytest.mark.parametrize("command", ["exec sleep 600", "sleep 600 & wait", "exec >&-; sleep 600"])
def test_one_that_hangs_is_ended_with_what_it_has_started(command: str) -> None:
    assert refusal(guard(command, timeout=0.2)).endswith("has not answered in time, so the resync is not begun")


def test_all_together_have_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASKED_MAX_S", 0.3)
    begun = time.monotonic()
    assert "has not answered in time" in refusal(guard("sleep 0.2", *["sleep 600"] * 5))
    assert time.monotonic() - begun < DEADLINE_S


def test_what_it_leaves_in_the_background_is_not_waited_for() -> None:
    """Which keeps its output open."""
    guard("sleep 5 & exit 0").ask({})


def test_one_question_at_a_time(tmp_path: Path) -> None:
    asked, let_go = guard(f"touch {tmp_path}/asked; while [ ! -e {tmp_path}/go ]; do sleep 0.01; done"), tmp_path / "go"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(asked.ask, {})
        wait_until((tmp_path / "asked").exists, "the command is at work")
        assert refusal(asked).endswith("is at work still")
        let_go.touch()
        first.result(DEADLINE_S)
    asked.ask({})


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"timeout": 21}, "should be from 0.1 to 20 seconds"),
        ({"case": 1}, "has no case"),
        ({"command": "relative"}, "absolute path"),
    ],
)
def test_what_a_file_may_not_say(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Guard.of([{"event": ASKED, "command": "/bin/true", **more}], {})
