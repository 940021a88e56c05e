# SPDX-License-Identifier: BSD-3-Clause
"""The table of commands, names instead of sockets, exit codes and the JSON of each."""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import pytest

from commandline import replctl
from nodes import Secondary
from replication.replctl import line, nodes
from replication.replctl.table import TABLE, On, Row
from replication.service import config

DEADLINE_S = 30.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the nodes' files."""
    made = tmp_path / "config"
    made.mkdir()
    monkeypatch.setenv("NBDKIT_REPLICATION_CONFIG_DIR", str(made))
    monkeypatch.delenv("REPLCTL_SOCKET", raising=False)
    return made


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_row_leads_to_a_function(row: Row) -> None:
    assert callable(row.function())
    assert row.function().__doc__


NEEDED = {
    "cancel": ["job"],
    "compare": ["./a", "./b"],
    "demote": ["--yes"],
    "discard": ["--yes"],
    "failover": ["--yes"],
    "history": ["--monitor", "http://127.0.0.1:1"],
    "init": ["new", "--mode", "secondary", "--disk", "/srv/b"],
    "libvirt-hook": ["web1", "stopped"],
    "switchover": ["--peer", "./b", "--yes"],
    "test": ["start"],
    "top": ["--monitor", "http://127.0.0.1:1", "--once"],
    "wait": ["--stage", "done", "--timeout", "0.1"],
}
"""What commands do not go without."""


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_command_prints_json_and_nothing_else_also_when_it_fails(
    row: Row, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no such node, or a node that does not run."""
    monkeypatch.chdir(folder)
    (folder / "web1.toml").write_text('mode = "secondary"\n[disk.disk0]\ndisk = "/srv/b"\ntop-id = "guest"\n')
    where = {On.NODE: ["-s", "./none"], On.SOCKET: ["-s", "./none"], On.CONFIG: ["web1"]}.get(row.on, [])
    code = line.run([*where, row.name, *NEEDED.get(row.name, []), "--json"])
    printed = capsys.readouterr().out.splitlines()
    assert printed
    for text in printed:
        json.loads(text)
    assert (code != 0) == (row.on in (On.NODE, On.SOCKET) or row.name in ("compare", "doctor", "top", "history"))


def test_names_and_options_are_unique() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    line.parser()  # argparse refuses an option that is there twice


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("status", "status"),
        ("web1 status", "--node web1 status"),
        ("-s a status", "-s a status"),
        ("--control=a web1 status", "--control=a --node web1 status"),
        ("--timeout 3 web1 status --json", "--timeout 3 --node web1 status --json"),
        ("--time 3 web1 status", "--time 3 --node web1 status"),
        ("-n stop status", "-n stop status"),
        ("-h", "-h"),
        ("dance", "dance"),
        ("cancel web1", "cancel web1"),
    ],
)
def test_a_word_that_is_no_command_is_a_node(typed: str, read: str) -> None:
    assert line.with_node(typed.split()) == read.split()


def test_a_node_by_its_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to its socket; the names of other files do no harm."""
    monkeypatch.setenv("NBDKIT_REPLICATION_RUN_DIR", f"{tmp_path}/run")
    (folder / "a.toml").write_text(f'control = "{tmp_path}/c.sock"\nstate = "/elsewhere"\n')
    (folder / "b.toml").write_text(f'state = "{tmp_path}/state"\n')
    (folder / "c.toml").write_text("")
    for other in ("README", "a.toml.dpkg-old", ".hidden.toml", "-x.toml"):
        (folder / other).write_text("")
    assert nodes.names() == ["a", "b", "c"] == config.names()
    assert nodes.control_of("a") == f"{tmp_path}/c.sock"
    assert nodes.control_of("b") == f"{tmp_path}/run/b/control.sock"
    assert nodes.control_of("c") == f"{tmp_path}/run/c/control.sock"
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "control.sock").touch()  # config=FILE, started by hand
    assert nodes.control_of("b") == f"{tmp_path}/state/control.sock"


@pytest.mark.parametrize("control", ["", 'control = "/srv/c.sock"\n'])
def test_who_starts_a_node_and_who_calls_it_mean_the_same_socket(folder: Path, control: str) -> None:
    (folder / "a.toml").write_text(f'mode = "primary"\n{control}state = "/srv/state"\n[disk.d]\ndisk = "/srv/d"\n')
    assert nodes.control_of("a") == config.load("a").control


def test_a_file_that_was_broken_since_does_not_hide_a_node_that_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDKIT_REPLICATION_RUN_DIR", str(tmp_path))
    (folder / "a.toml").write_text("mode = primary")
    assert "is not TOML" in replctl("a", "status").stderr
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "control.sock").touch()
    assert nodes.control_of("a") == str(tmp_path / "a" / "control.sock")


def test_a_real_node_by_its_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "n").mkdir()
    with Secondary(tmp_path / "n", [1 << 20]) as node:
        (folder / "web1.toml").write_text(f'mode = "secondary"\ncontrol = "{node.control_path}"\n')
        shown = replctl("web1", "status", "--json")
        assert (shown.returncode, json.loads(shown.stdout)["stage"]) == (0, "none")
        started = replctl("--node", "web1", "start", "--json")
        assert (started.returncode, json.loads(started.stdout)) == (0, {"done": True})
        refused = replctl("web1", "start", "--json")
        failed = json.loads(refused.stdout)["failed"]
        assert (refused.returncode, failed["code"], failed["reason"]) == (1, 1, "refused")
        assert refused.stderr == f"replctl: {failed['text']}\n"
        check = json.loads(replctl("web1", "failover", "--check", "--json").stdout)
        assert not check["done"]
        assert check["preflight"]["stage"] == "running"
        asked = replctl("web1", "demote", "--json")
        assert (asked.returncode, json.loads(asked.stdout)["failed"]["reason"]) == (2, "usage")


def test_exit_codes_tell_a_node_that_is_down_from_one_that_hangs(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    (folder / "web1.toml").write_text(f'control = "{path}"\n')

    def ended(*arguments: str) -> tuple[int, str]:
        done = replctl(*arguments, "--timeout", "0.3", "web1", "status", "--json")
        return done.returncode, json.loads(done.stdout)["failed"]["reason"]

    assert ended() == (3, "not-running")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert ended() == (3, "not-running")
        listener.listen()
        assert ended() == (4, "no-answer")
        # By its path both are 2, as they always were.
        by_path = replctl("--timeout", "0.3", "-s", path, "status", "--json")
        assert (by_path.returncode, json.loads(by_path.stdout)["failed"]["reason"]) == (2, "no-answer")
    assert "web1 is not running" in replctl("web1", "status").stderr


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("web2 status", "there is no node web2"),
        ("../x status", "cannot be the name"),
        ("-s a web1 status", "not allowed with argument"),
    ],
)
def test_wrong_names(folder: Path, typed: str, why: str) -> None:
    (folder / "web1.toml").write_text("")
    done = replctl(*typed.split())
    assert done.returncode == 2
    assert why in done.stderr


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    options = argparse.Namespace(control=None, state=None, node="x")
    with pytest.raises(line.Unusable, match=r"cannot read .*Permission denied"):
        line.socket_path(options)
