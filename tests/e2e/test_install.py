# SPDX-License-Identifier: BSD-3-Clause
"""`make install` and `make uninstall`, into a folder of the test's: what is installed works from there alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkout import REPOSITORY
from lab import Lab
from waiting import DEADLINE_S

PREFIX = "/usr/local"
PLUGINS = "/usr/lib/nbdkit/plugins"
SCRIPTS = ("replctl", "ft-agent", "nbdkit-replication", "replication-monitor")
PAGES = (
    "man1/nbdkit-replication-plugin.1",
    "man5/replication.toml.5",
    "man7/ocf_nbdkit_replication.7",
    "man8/ft-agent.8",
    "man8/nbdkit-replication.8",
    "man8/replctl.8",
    "man8/replication-monitor.8",
)


@dataclass
class Installed:
    """What `make install` has made, below `root`."""

    root: Path

    def make(self, target: str) -> None:
        command = [
            "make",
            "-s",
            target,
            f"DESTDIR={self.root}",
            f"PREFIX={PREFIX}",
            f"PLUGINDIR={PLUGINS}",
            "COMPILED=",
        ]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=DEADLINE_S)

    @property
    def bin(self) -> Path:
        return self.root / PREFIX.lstrip("/") / "bin"

    def files(self) -> list[Path]:
        return [path for path in self.root.rglob("*") if not path.is_dir()]


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    made = Installed(tmp_path / "root")
    made.make("install")
    return made


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """In another folder than the sources, and without the tests' own paths."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_installed_scripts_find_their_library_also_by_a_symbolic_link(installed: Installed, tmp_path: Path) -> None:
    for name in SCRIPTS:
        link, chain = tmp_path / f"{name}-link", tmp_path / f"{name}-chain"
        link.symlink_to(installed.bin / name)
        chain.symlink_to(link)
        for path in (installed.bin / name, link, chain, REPOSITORY / "scripts" / name):
            done = run(path, "--help")
            assert (done.returncode, done.stderr) == (0, ""), path
            assert done.stdout.startswith(f"usage: {name}")


def test_on_this_host_what_is_installed_is_compiled_once(tmp_path: Path) -> None:
    """A node that may not write there would do it with each start. A package does it when it is installed."""
    places = [f"{name}={tmp_path / name}" for name in ("PREFIX", "PLUGINDIR", "OCFDIR")]
    subprocess.run(
        ["make", "-s", "install", "DESTDIR=", "COMPILED=", *places],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    library = tmp_path / "PREFIX/lib/nbdkit-replication"
    assert all(
        any((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc"))
        for source in library.glob("replication/**/*.py")
    )


def test_installed_replctl_asks_a_node(installed: Installed, lab: Lab) -> None:
    secondary = lab.secondary()
    done = run(installed.bin / "replctl", "--state", secondary.state, "status")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:2] == ["mode", "secondary"]


def test_pacemaker_finds_the_agent(installed: Installed) -> None:
    agent = installed.root / "usr/lib/ocf/resource.d/nbdkit/replication"
    target = Path(os.readlink(agent))
    # It leads to where it will be without DESTDIR.
    assert target == Path(PREFIX) / "lib/nbdkit-replication/ocf/replication"
    done = run(installed.root / target.relative_to("/"), "meta-data")
    assert (done.returncode, done.stderr) == (0, "")
    assert '<resource-agent name="replication"' in done.stdout


def test_installed_agent_gets_as_far_as_qemu(installed: Installed, tmp_path: Path) -> None:
    done = run(installed.bin / "ft-agent", "protect", "--control", "c", "--qmp", tmp_path / "none", "--receiver", "r")
    assert done.returncode == 1
    assert done.stderr == f"ft-agent: cannot connect to QEMU on {tmp_path / 'none'}: No such file or directory\n"


def test_the_manual_pages_are_installed(installed: Installed) -> None:
    folder = installed.root / PREFIX.lstrip("/") / "share/man"
    assert sorted(str(path.relative_to(folder)) for path in folder.glob("*/*")) == sorted(PAGES)
    for page in PAGES:
        name, _, section = Path(page).name.rpartition(".")
        assert f".TH {name.upper()} {section} " in (folder / page).read_text(encoding="utf-8").replace('"', "")


def test_the_units_start_what_is_installed(installed: Installed) -> None:
    folder = installed.root / PREFIX.lstrip("/") / "lib"
    unit = (folder / "systemd/system/nbdkit-replication@.service").read_text()
    assert f"\nExecStart={PREFIX}/bin/nbdkit-replication %i\n" in unit
    assert (
        f"\nExecStart={PREFIX}/bin/replication-monitor"
        in (folder / "systemd/system/replication-monitor.service").read_text()
    )
    test = (folder / "systemd/system/nbdkit-replication-test@.service").read_text()
    assert f"\nExecStart={PREFIX}/bin/replctl %i test run --if-secondary $TEST\n" in test
    assert (folder / "systemd/system/nbdkit-replication-test@.timer").is_file()
    assert (installed.bin / "nbdkit-replication").is_file()
    assert "ListenStream=" in (folder / "systemd/system/nbdkit-replication@.socket").read_text()
    for conf in ("sysusers", "tmpfiles"):
        assert "nbdkit-replication" in (folder / f"{conf}.d/nbdkit-replication.conf").read_text()


def test_the_installed_launcher_starts_the_installed_plugin(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "vm1.toml").write_text('mode = "primary"\n[disk.a]\ndisk = "/d"\n')
    done = run(
        "env", f"NBDKIT_REPLICATION_CONFIG_DIR={tmp_path}", installed.bin / "nbdkit-replication", "--print", "vm1"
    )
    assert done.returncode == 0
    assert f"{installed.root}{PREFIX}/lib/nbdkit-replication/plugin.py" in done.stdout.split()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_its_library_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "bin").mkdir()
    shutil.copy(REPOSITORY / "scripts" / name, tmp_path / "bin" / name)
    done = run(tmp_path / "bin" / name, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: No module named 'replication': it needs the library that is installed with it\n"


def test_nothing_of_the_tests_is_installed_and_uninstall_leaves_nothing(installed: Installed) -> None:
    names = {path.relative_to(installed.root).parts for path in installed.files()}
    assert not any("tests" in parts or "demo" in parts for parts in names)
    assert (PREFIX.lstrip("/") + "/lib/nbdkit-replication/replication/machine/agent.py") in map("/".join, names)
    installed.make("uninstall")
    assert installed.files() == []
    assert not [*installed.root.rglob("nbdkit-replication*")]
