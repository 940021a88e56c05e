# SPDX-License-Identifier: BSD-3-Clause
"""scripts/debian with stand-ins for mmdebstrap, apt and unshare."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKOUT = "usr/src/nbdkit-replication"  # in the root


def _own_release() -> str:
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    match = re.search(r'^VERSION_CODENAME="?(\w+)', text, re.MULTILINE)
    assert match is not None, text
    return match[1]


OWN = _own_release()
OTHER = "bookworm" if OWN == "trixie" else "trixie"
# What apt knows of: its address, its suite, its component.
INDEXES = f"""\
http://deb.example/debian {OWN} contrib
http://deb.example/debian {OWN} main
http://deb.example/debian {OWN}-updates main
http://deb.example/debian-security {OWN}-security main
https://other.example/node nodistro main
https://packages.example/cloud cloud-{OWN} main
"""


class Machine:
    """A checkout, and a machine whose tools note their calls."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        (self.checkout / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        self.calls.mkdir()
        shutil.copy(REPOSITORY / "scripts/debian", self.checkout / "scripts/debian")
        (folder / "indexes").write_text(INDEXES)
        self.stand_in("id", "echo 0")
        self.stand_in("apt-get", f"cat {folder}/indexes")
        self.stand_in(
            "apt-config",
            "echo 'Acquire::http::Proxy \"http://proxy\";'; echo 'Acquire::IndexTargets::x \"y\";'; echo 'Dir \"/\";'",
        )
        # Keeps its arguments and the file of apt options, and makes what scripts/debian needs of a root.
        self.stand_in(
            "mmdebstrap",
            f'printf "%s\\n" "$@" >{self.calls}/mmdebstrap; for word; do [[ $word != --aptopt=* ]] || '
            f'cp "${{word#*=}}" {self.calls}/aptopt; [[ $word != /* ]] || mkdir -p "$word/usr/sbin"; done',
        )
        self.stand_in("unshare", f'printf "%s\\n" "$@" >{self.calls}/unshare; exit 7')

    def stand_in(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def debian(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.checkout / "scripts/debian", *arguments],
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def root(self, release: str = OTHER) -> Path:
        return self.checkout / "build/debian" / release

    def call(self, tool: str) -> list[str]:
        path = self.calls / tool
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "usage: scripts/debian [--clean] RELEASE COMMAND"),
        ((OTHER,), "usage: scripts/debian [--clean] RELEASE COMMAND"),
        (("--clean", OTHER), "usage: scripts/debian [--clean] RELEASE COMMAND"),
        (("13", "true"), "'13' is not the name of a release"),
        (("../escape", "true"), "'../escape' is not the name of a release"),
    ],
)
def test_wrong_arguments_make_nothing(machine: Machine, arguments: tuple[str, ...], says: str) -> None:
    done = machine.debian(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"debian: {says}")
    assert not (machine.checkout / "build").exists()
    assert machine.call("mmdebstrap") == machine.call("unshare") == []


def test_the_root_has_this_machines_sources_for_the_other_release(machine: Machine) -> None:
    assert machine.debian(OTHER, "true").returncode == 7
    *_, release, root, first, second, third = machine.call("mmdebstrap")
    assert (release, root) == (OTHER, f"{machine.root()}.new")
    assert [first, second, third] == [
        f"deb http://deb.example/debian {OTHER} main",
        f"deb http://deb.example/debian {OTHER}-updates main",
        f"deb http://deb.example/debian-security {OTHER}-security main",
    ]
    assert machine.call("aptopt") == ['Acquire::http::Proxy "http://proxy";', 'Acquire::Retries "3";']


def test_a_machine_without_sources_is_told_so(machine: Machine) -> None:
    machine.stand_in("apt-get", "echo https://other.example/node nodistro main")
    done = machine.debian(OTHER, "true")
    assert (done.returncode, done.stderr) == (1, "debian: this machine has no sources of Debian packages\n")
    assert not machine.root().exists()


def test_the_root_is_made_once_and_starts_no_service(machine: Machine) -> None:
    assert machine.debian(OTHER, "true").returncode == 7
    policy = machine.root() / "usr/sbin/policy-rc.d"
    assert subprocess.run([policy], check=False).returncode == 101
    (machine.calls / "mmdebstrap").unlink()
    done = machine.debian(OTHER, "true")
    assert (done.returncode, done.stderr) == (7, "")
    assert machine.call("mmdebstrap") == []


def test_a_root_that_cannot_be_made_leaves_none(machine: Machine) -> None:
    machine.stand_in("mmdebstrap", f'echo try >>{machine.calls}/tries; mkdir -p "$6"; exit 1')
    done = machine.debian(OTHER, "true")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "debian: mmdebstrap could not make it (see above)"
    assert len(machine.call("tries")) == 3
    assert [path.name for path in machine.root().parent.iterdir()] == [f"{OTHER}.lock"]
    assert machine.call("unshare") == []


def test_the_command_gets_its_arguments_as_they_are_and_its_exit_code_comes_back(machine: Machine) -> None:
    assert machine.debian(OTHER, "sh", "-c", "echo 'a  b' $x").returncode == 7
    words = machine.call("unshare")
    script = str(machine.checkout / "scripts/debian")
    assert words[words.index("--") + 1 :] == [script, "--inside", str(machine.root()), "sh", "-c", "echo 'a  b' $x"]
    assert {"--mount", "--pid", "--kill-child"} <= set(words)


def test_the_root_has_the_checkout_as_it_is_now(machine: Machine) -> None:
    for name in (".venv/bin/python", "build/old", ".git/HEAD", ".mypy_cache/x", ".hypothesis/x", "a/__pycache__/b.pyc"):
        path = machine.checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the checkout")
    (machine.checkout / "a/new.py").write_text("1")
    (machine.checkout / "gone.py").write_text("1")
    machine.debian(OTHER, "true")
    copy = machine.root() / CHECKOUT

    def files() -> set[str]:
        return {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}

    assert files() == {"a/new.py", "gone.py", "scripts/debian"}
    # The root's own stay, and what was removed from the checkout goes.
    for name in (".venv/stamp", "build/made", ".hypothesis/examples"):
        (copy / name).parent.mkdir(parents=True)
        (copy / name).touch()
    (machine.checkout / "gone.py").unlink()
    (machine.checkout / "a/new.py").write_text("2")
    machine.debian(OTHER, "true")
    assert files() == {"a/new.py", "scripts/debian", ".venv/stamp", "build/made", ".hypothesis/examples"}
    assert (copy / "a/new.py").read_text() == "2"


def test_a_clean_root_is_another_one(machine: Machine) -> None:
    machine.debian(OTHER, "true")
    assert machine.debian("--clean", OTHER, "true").returncode == 7
    *_, root, _, _, _ = machine.call("mmdebstrap")
    assert root == f"{machine.root()}-clean.new"
    assert machine.call("unshare")[-2:] == [f"{machine.root()}-clean", "true"]


def test_a_root_that_is_booted_is_a_clean_one(machine: Machine) -> None:
    machine.stand_in("systemd-nspawn", "exit 1")
    assert machine.debian("--boot", OTHER, "true", "x").returncode == 7
    words = machine.call("unshare")
    assert words[words.index("--") + 2 :] == ["--inside-boot", f"{machine.root()}-clean", "true", "x"]


def test_two_runs_do_not_share_a_root(machine: Machine) -> None:
    machine.stand_in("unshare", f"{machine.checkout}/scripts/debian {OTHER} true; exit 7")
    done = machine.debian(OTHER, "true")
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1] == f"debian: another run is in {machine.root()}"
