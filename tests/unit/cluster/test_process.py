# SPDX-License-Identifier: BSD-3-Clause
"""Who runs the node: systemd, played by a script, or the agent itself."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from replication.cluster.process import LAUNCHER_VARIABLE, Child, Either, StartFailed, Unit, runner
from replication.cluster.told import Told, read
from waiting import DEADLINE_S, wait_until

SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>"$0.asked"
case "$1" in
    show) cat "$0.$2" ;;
    start) exit "$(cat "$0.code")" ;;
esac
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = read({"OCF_RESKEY_node": "vm1", "HA_RSCTMP": str(tmp_path / "run")})
    return replace(found, log=str(tmp_path / "log"), deadline=time.monotonic() + DEADLINE_S)


class Systemctl:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "systemctl"
        self.path.write_text(SYSTEMCTL)
        self.path.chmod(0o755)
        self.answer("code", "0")

    def answer(self, name: str, text: str) -> None:
        Path(f"{self.path}.{name}").write_text(f"{text}\n")

    def asked(self) -> list[str]:
        return Path(f"{self.path}.asked").read_text().splitlines()


def test_a_unit_is_started_with_its_socket_and_stopped_with_it(told: Told, tmp_path: Path) -> None:
    systemctl, unit = Systemctl(tmp_path), Unit(told)
    systemctl.answer("--property=ActiveState", "active")
    unit.start()
    unit.check()
    assert unit.alive()
    unit.reload()
    assert not unit.stop(), "it is there still"
    systemctl.answer("--property=ActiveState", "failed")
    assert unit.stop()
    with pytest.raises(StartFailed, match="journalctl"):
        unit.check()
    both = "nbdkit-replication@vm1.socket nbdkit-replication@vm1.service"
    assert [line for line in systemctl.asked() if not line.startswith("show")] == [
        f"start {both}",
        "reload nbdkit-replication@vm1.service",
        f"stop --job-mode=ignore-dependencies {both}",
        f"stop --job-mode=ignore-dependencies {both}",
    ]


@pytest.mark.parametrize("state", ["activating", "reloading", "deactivating"])
def test_a_unit_that_systemd_starts_again_is_there(told: Told, tmp_path: Path, state: str) -> None:
    Systemctl(tmp_path).answer("--property=ActiveState", state)
    assert Unit(told).alive()


@pytest.mark.parametrize(("status", "lasting"), [("78", True), ("1", False)])
def test_a_unit_whose_file_is_wrong_is_not_tried_again(told: Told, tmp_path: Path, status: str, lasting: bool) -> None:
    systemctl = Systemctl(tmp_path)
    systemctl.answer("code", "1")
    systemctl.answer("--property=ExecMainStatus", status)
    with pytest.raises(StartFailed) as error:
        Unit(told).start()
    assert error.value.lasting is lasting


def test_a_systemd_that_does_not_answer_has_not_said_that_the_unit_is_gone(told: Told, tmp_path: Path) -> None:
    systemctl = Systemctl(tmp_path)
    systemctl.answer("--property=ActiveState", "inactive")
    assert not Unit(told).alive()
    systemctl.path.write_text("#!/bin/sh\nexec sleep 60\n")
    late = Unit(replace(told, deadline=time.monotonic()))
    assert late.alive()
    assert not late.stop()


def test_where_there_is_no_systemctl_there_is_no_unit(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    assert not Unit(told).alive()


def test_with_a_service_that_is_none_both_are_asked(told: Told, tmp_path: Path) -> None:
    """A stop must work whatever the parameters are."""
    assert isinstance(runner(replace(told, service=""), "x"), Either)
    systemctl = Systemctl(tmp_path)
    systemctl.answer("--property=ActiveState", "active")
    child = Child(told, launcher(tmp_path, "import time; time.sleep(600)"))
    child.start()
    wait_until(child.alive, "it is noted")
    either = Either((Child(told, "none"), Unit(told)))
    assert not either.stop(), "the unit is there"
    assert not child.alive()
    assert either.alive()
    systemctl.answer("--property=ActiveState", "inactive")
    assert either.stop()
    assert not either.alive()
    with pytest.raises(StartFailed):
        either.start()


def launcher(folder: Path, text: str) -> str:
    path = folder / "launcher.py"
    path.write_text(text)
    return str(path)


def test_a_child_outlives_the_agent_and_is_found_again(told: Told, tmp_path: Path) -> None:
    child = Child(told, launcher(tmp_path, "import time; time.sleep(600)"))
    assert not child.alive()
    child.start()
    wait_until(child.alive, "it is noted")
    again = Child(told, "none")
    assert again.alive()
    again.start()
    assert again.stop()
    assert not child.alive()
    assert again.stop(), "there is nothing to stop"


def test_a_child_that_ends_at_once_says_with_which_code(told: Told, tmp_path: Path) -> None:
    for code, lasting in ((78, True), (1, False)):
        child = Child(told, launcher(tmp_path, f"raise SystemExit({code})"))
        child.start()

        def ended(child: Child = child) -> StartFailed | None:
            try:
                child.check()
            except StartFailed as said:
                return said
            return None

        error = wait_until(ended, "its end is noticed")
        assert (error.lasting, f"code {code}:" in str(error)) == (lasting, True)


def test_a_number_that_another_process_has_is_nobodys(told: Told, tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "600"])
    try:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/nbdkit-replication-vm1.pid").write_text(f"{other.pid} 1\n")
        child = Child(told, "none")
        assert not child.alive()
        assert child.stop()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_who_it_is(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(runner(replace(told, service="systemd"), "x"), Unit)
    assert isinstance(runner(replace(told, service="process"), "x"), Child)
    monkeypatch.setenv(LAUNCHER_VARIABLE, "/none")
    with pytest.raises(StartFailed):
        Child(replace(told, log="/none/log"), "x").start()
