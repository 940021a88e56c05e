# SPDX-License-Identifier: BSD-3-Clause
"""systemd/: what systemd itself says of the units, and that they, the code and the pages agree."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from checkout import REPOSITORY
from manpages import Page
from replication.options import ALL_KEYS, CHANGEABLE, Options
from replication.replctl.line import _apart, parser, with_node
from replication.replctl.outcome import Exit
from replication.server.disconnect import END_S
from replication.service import config, reload
from waiting import DEADLINE_S

SYSTEMD = REPOSITORY / "systemd"
EXPOSURE_MAX, TEST_EXPOSURE_MAX = 3.0, 5.0
"""Of `systemd-analyze security`, from 0 to 10. A machine may be whatever a person wants to try."""


def unit(suffix: str) -> configparser.ConfigParser:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read(SYSTEMD / f"nbdkit-replication@.{suffix}")
    return read


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A root with the units of a node vm1 and what they name."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for suffix in ("service", "socket"):
        text = (SYSTEMD / f"nbdkit-replication@.{suffix}").read_text()
        # There are no such programs and pages here, and a unit of another one would be complained of.
        text = re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE)
        text = text.replace("/usr/bin/nbdkit-replication", "/bin/true").replace("/bin/kill", "/bin/true")
        (units / f"nbdkit-replication@vm1.{suffix}").write_text(text)
    return units


@pytest.fixture
def tested(host: Path) -> Path:
    """The service of the test of vm1, in that root."""
    for suffix in ("service", "timer"):
        text = (SYSTEMD / f"nbdkit-replication-test@.{suffix}").read_text()
        text = re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE).replace("/usr/bin/replctl", "/bin/true")
        (host / f"nbdkit-replication-test@vm1.{suffix}").write_text(text)
    return host / "nbdkit-replication-test@vm1.service"


def analyzed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd")
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_systemd_understands_the_units(host: Path) -> None:
    # Of these units alone: what is wrong in others of this machine is not ours.
    done = analyzed("verify", "--man=no", "--recursive-errors=no", *sorted(host.iterdir()))
    said = [line for line in done.stderr.splitlines() if "nbdkit-replication" in line]
    assert (done.returncode, said) == (0, [])


def test_systemd_understands_the_units_of_a_test(tested: Path) -> None:
    test_systemd_understands_the_units(tested.parent)
    done = analyzed("security", "--offline=true", "--no-pager", tested)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done
    assert float(found[1]) < TEST_EXPOSURE_MAX


def test_a_test_is_given_what_replctl_takes() -> None:
    """The line of the unit, and those of the document that go into its file."""
    read = (SYSTEMD / "nbdkit-replication-test@.service").read_text()
    line = re.search(r"^ExecStart=/usr/bin/replctl (.*)$", read, re.MULTILINE)
    assert line is not None
    assert f"{config.CONFIG_DIR}/%i.test" in read
    assert f"\nSuccessExitStatus={Exit.NOT_RUNNING:d}\n" in read  # of a node that does not run there is no test
    text = (REPOSITORY / "docs/operating/test.md").read_text()
    given = re.findall(r"^echo 'TEST=(.*)' >/etc/nbdkit-replication\.d/web1\.test$", text, re.MULTILINE)
    assert given
    for words in given:
        typed, command = _apart([*line[1].replace("%i", "web1").replace("$TEST", words).split()])
        options = parser().parse_args(with_node(typed))
        assert (options.node, options.action, options.if_secondary, command) == ("web1", "run", True, [])


def test_the_service_is_locked_down(host: Path) -> None:
    done = analyzed("security", "--offline=true", "--no-pager", host / "nbdkit-replication@vm1.service")
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done
    assert float(found[1]) < EXPOSURE_MAX


def test_the_units_have_the_paths_of_the_code() -> None:
    service, listener = unit("service"), unit("socket")
    assert f"{config.STATE_DIR}/%i" == f"/var/lib/{service['Service']['StateDirectory']}"
    assert f"{config.RUN_DIR}/%i" == f"/run/{service['Service']['RuntimeDirectory']}"
    assert listener["Socket"]["ListenStream"] == f"{config.RUN_DIR}/%i/guest.sock"
    for read in (service, listener):
        assert read["Unit"]["AssertPathExists"] == f"{config.CONFIG_DIR}/%i{config.SUFFIX}"
    assert int(listener["Socket"]["SocketMode"], 8) == config.SOCKET_MODE
    for conf in ("sysusers", "tmpfiles"):
        assert service["Service"]["User"] in (SYSTEMD / f"{conf}.conf").read_text()


def test_a_stop_has_the_time_that_the_node_takes() -> None:
    given_s = float(unit("service")["Service"]["TimeoutStopSec"].removesuffix("s"))
    assert END_S < given_s <= 10
    assert f"ends within {END_S:g} seconds" in Page("nbdkit-replication").text


def test_the_exit_codes_are_those_of_the_page() -> None:
    script = (REPOSITORY / "scripts/nbdkit-replication").read_text()
    codes = re.search(r"^EXIT_FAILED, EXIT_CONFIG = (\d+), (\d+)$", script, re.MULTILINE)
    assert codes is not None
    heads = [entry.plain for entry in Page("nbdkit-replication").entries("EXIT CODES")]
    assert heads == ["0", codes[1], "2", codes[2]]
    assert unit("service")["Service"]["RestartPreventExitStatus"] == codes[2]


def test_what_a_reload_changes_is_in_the_documents() -> None:
    keys = {reload._key(member) for member in (*CHANGEABLE, *reload._SERVICE_CHANGEABLE)}
    page = Page("nbdkit-replication").section("SIGNALS AND NOTIFICATIONS")
    listed = re.findall(r"^(?:C<[a-z-]+>[,.]\s+)+", page, re.MULTILINE)
    assert set(re.findall(r"C<([a-z-]+)>", "".join(listed))) == keys
    rows = re.findall(r"^\| (.*) \| changes at once \|$", (REPOSITORY / "docs/service.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`([a-z-]+)`", "".join(rows))) == keys
    known = (*ALL_KEYS, *config.SERVICE_KEYS)
    members = {field.name for kind in (Options, config.Service) for field in fields(kind)} - reload._NO_KEYS
    assert {reload._key(member) for member in members if " " not in reload._key(member)} <= set(known)


def test_the_unit_reloads_by_the_signal_that_the_node_hears() -> None:
    assert unit("service")["Service"]["ExecReload"] == "/bin/kill -HUP $MAINPID"


def test_the_files_of_the_document_are_taken(tmp_path: Path) -> None:
    files = re.findall(r"^```toml\n(.*?)^```", (REPOSITORY / "docs/service.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(files) == 2
    for name, text in zip(("b", "a"), files, strict=True):
        (tmp_path / f"{name}.toml").write_text(text)
        assert config.load(name, str(tmp_path)).options.autostart
