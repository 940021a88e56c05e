# SPDX-License-Identifier: BSD-3-Clause
"""Completion in a real bash: the function is loaded from completion/replctl, and called as bash calls it."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from replication.replctl.table import TABLE, On

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "web1.toml").write_text("")
    (tmp_path / "web2.toml").write_text("")
    (tmp_path / "sockets").mkdir()
    (tmp_path / "some file").write_text("")
    return tmp_path


def completed(folder: Path, line: str) -> list[str]:
    """What bash would offer for the last word of the line, sorted."""
    words = [*shlex.split(line), *([""] if line.endswith(" ") else [])]
    script = f"""
        source {ROOT}/completion/replctl
        compopt() {{ :; }}  # only within a completion that bash itself has begun
        COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
        spec=$(complete -p replctl); [[ $spec == "complete -F _replctl replctl" ]] || exit 1
        _replctl
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {
        **os.environ,
        "PATH": f"{ROOT}/scripts:{os.environ['PATH']}",
        "NBDKIT_REPLICATION_CONFIG_DIR": str(folder),
    }
    done = subprocess.run(
        ["bash", "--norc", "-euc", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(line for line in done.stdout.splitlines() if line)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("replctl web", ["web1", "web2"]),
        ("replctl star", ["start"]),
        ("replctl web1 sta", ["start", "status"]),
        ("replctl web1 li", []),
        ("replctl --node ", ["web1", "web2"]),
        ("replctl --node web1 sto", ["stop"]),
        ("replctl --timeout 5 check", sorted(row.name for row in TABLE if row.name.startswith("check"))),
        ("replctl --st", ["--state"]),
        ("replctl start --mode ", ["primary", "secondary"]),
        ("replctl web1 start --sync f", ["full"]),
        (
            "replctl web1 failover --",
            [
                "--check",
                "--fenced",
                "--force",
                "--help",
                "--json",
                "--lossless",
                "--max-age",
                "--no-primary",
                "--only-in-sync",
                "--yes",
            ],
        ),
        ("replctl status --watch --j", ["--json"]),
        ("replctl --timeout ", []),
        ("replctl --control some", ["some file"]),
        ("replctl --state so", ["sockets"]),
        ("replctl switchover --peer sock", ["sockets"]),
    ],
)
def test_bash_completes(folder: Path, line: str, offered: list[str]) -> None:
    assert completed(folder, line) == offered


def test_it_knows_all_commands(folder: Path) -> None:
    assert completed(folder, "replctl ") == sorted(["web1", "web2", *(row.name for row in TABLE)])
    assert completed(folder, "replctl web1 ") == sorted(row.name for row in TABLE if row.on is not On.HOST)
