# SPDX-License-Identifier: BSD-3-Clause
"""scripts/setup against a pretended machine: stand-ins for dpkg-query, apt-get, id and sudo that note their calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# What the script runs besides the stand-ins. Nothing else is on its PATH, so a stand-in that was taken away is away.
TOOLS = ("cat", "env", "readlink", "rm", "sort")


class Machine:
    """A checkout and a Debian of which the test says what is installed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.log = folder / "calls"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(SCRIPTS / "setup", self.root / "scripts/setup")
        self.pin("# nothing")
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"{tool} is not on this machine"
            (self.bin / tool).symlink_to(found)
        self.missing()
        self.become(0)
        self.stand_in("apt-get", f'echo "$DEBIAN_FRONTEND apt-get $*" >>{self.log}')

    def stand_in(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def missing(self, unknown: str = "none", removed: str = "none") -> None:
        """dpkg-query has never heard of `unknown`, and says of `removed` that its configuration is left."""
        self.stand_in(
            "dpkg-query",
            'code=0; for word in "${@:4}"; do case $word in '
            f'{unknown}) echo "no packages found matching $word" >&2; code=1;; '
            f'{removed}) echo "config-files $word";; *) echo "installed $word";; esac; done; exit $code',
        )

    def become(self, uid: int) -> None:
        self.stand_in("id", f"echo {uid}")

    def pin(self, text: str) -> None:
        (self.root / "scripts/requirements-dev.txt").write_text(text + "\n")

    def setup(self, *purposes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", str(self.root / "scripts/setup"), *purposes],
            env={"PATH": str(self.bin), "HOME": str(self.root)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def apt_calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("purposes", [(), ("runtime",), ("demo",), ("vm",), ("runtime", "demo")], ids=" ".join)
def test_all_there_is_silent(machine: Machine, purposes: tuple[str, ...]) -> None:
    done = machine.setup(*purposes)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine.apt_calls() == []


def test_installs_only_what_is_missing(machine: Machine) -> None:
    machine.missing(unknown="python3-rich", removed="nbdkit")
    done = machine.setup("demo")
    assert (done.returncode, done.stderr) == (0, "setup: installing nbdkit python3-rich\n")
    update, install = machine.apt_calls()
    assert update.startswith("noninteractive apt-get ")
    assert update.endswith(" update")
    assert install.startswith("noninteractive apt-get ")
    assert install.endswith(" install -y --no-install-recommends nbdkit python3-rich")


def test_purposes_do_not_install_for_others(machine: Machine) -> None:
    machine.missing(unknown="libnbd-bin")
    assert machine.setup("runtime").returncode == 0
    assert machine.apt_calls() == []
    assert machine.setup("demo").returncode == 0
    assert len(machine.apt_calls()) == 2


def test_the_guest_has_a_purpose_of_its_own(machine: Machine) -> None:
    machine.missing(unknown="busybox-static")
    assert machine.setup("demo").returncode == 0
    assert machine.apt_calls() == []
    assert machine.setup("vm").returncode == 0
    assert machine.apt_calls()[-1].endswith(" busybox-static")


def test_the_compiler_is_for_who_compiles_or_tests(machine: Machine) -> None:
    machine.missing(unknown="gcc")
    assert machine.setup("demo", "bench", "lint").returncode == 0
    assert machine.apt_calls() == []
    for purpose in ("compile", "test"):
        assert machine.setup(purpose).returncode == 0
        assert " gcc" in machine.apt_calls()[-1]
    assert (machine.root / ".venv/bin/python").exists()


def test_goes_through_sudo(machine: Machine) -> None:
    machine.missing(unknown="nbdkit")
    machine.become(1000)
    machine.stand_in("sudo", f'echo "sudo $*" >>{machine.log}')
    assert machine.setup().returncode == 0
    calls = machine.apt_calls()
    assert calls[0] == "sudo -n true"
    assert all(call.startswith("sudo -n env DEBIAN_FRONTEND=noninteractive apt-get ") for call in calls[1:])
    assert calls[-1].endswith(" nbdkit")


def test_needs_no_root_when_all_is_there(machine: Machine) -> None:
    machine.become(1000)
    assert machine.setup("demo").returncode == 0


@pytest.mark.parametrize("sudo", [None, "exit 1"], ids=["no sudo", "sudo wants a password"])
def test_neither_root_nor_sudo(machine: Machine, sudo: str | None) -> None:
    machine.missing(unknown="nbdkit")
    machine.become(1000)
    if sudo:
        machine.stand_in("sudo", sudo)
    done = machine.setup()
    assert done.returncode == 1
    assert done.stderr == (
        "setup: neither root nor sudo without a password; as root run: apt-get install --no-install-recommends nbdkit\n"
    )


@pytest.mark.parametrize("tool", ["apt-get", "dpkg-query"])
def test_not_debian(machine: Machine, tool: str) -> None:
    (machine.bin / tool).unlink()
    done = machine.setup()
    assert done.returncode == 1
    assert done.stderr.startswith("setup: this is not Debian")
    assert done.stderr.count("\n") == 1


def test_failed_apt_is_a_failure(machine: Machine) -> None:
    machine.missing(unknown="nbdkit")
    machine.stand_in("apt-get", '[[ " $* " == *" update "* ]] || { echo "E: no such package" >&2; exit 100; }')
    done = machine.setup()
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ["E: no such package", "setup: apt-get install failed (see above)"]


def test_unknown_purpose(machine: Machine) -> None:
    done = machine.setup("tests")
    assert done.returncode == 2
    assert "unknown purpose 'tests'" in done.stderr
    assert machine.apt_calls() == []


def test_environment_is_made_once_for_each_list_of_pins(machine: Machine) -> None:
    first = machine.setup("test")
    assert (first.returncode, first.stderr.splitlines()[0]) == (0, "setup: making .venv")
    assert (machine.root / ".venv/bin/python").exists()

    again = machine.setup("test", "lint")
    assert (again.returncode, again.stderr) == (0, "")

    machine.pin("# still nothing, in other words")
    changed = machine.setup("lint")
    assert (changed.returncode, changed.stderr.splitlines()[0]) == (0, "setup: making .venv")


def test_interrupted_environment_is_made_again(machine: Machine) -> None:
    machine.pin("no such requirement !")
    broken = machine.setup("lint")
    assert broken.returncode == 1
    assert broken.stderr.splitlines()[-1].startswith("setup: pip could not install")
    assert machine.setup("lint").returncode == 1
