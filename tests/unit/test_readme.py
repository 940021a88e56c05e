# SPDX-License-Identifier: BSD-3-Clause
"""README's table of supported versions against CI, scripts/setup, the Makefile and what is installed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def _own_release() -> str:
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    match = re.search(r'^VERSION_CODENAME="?(\w+)', text, re.MULTILINE)
    assert match is not None, text
    return match[1]


OWN = _own_release()


def _readme_table() -> dict[str, list[str]]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (Debian|nbdkit|Python|libnbd|QEMU) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    return {name: [oldest.strip(), newest.strip()] for name, oldest, newest in rows}


def test_readme_and_ci_name_the_same_releases() -> None:
    table = _readme_table()
    assert set(table) == {"Debian", "nbdkit", "Python", "libnbd", "QEMU"}
    named = [cell.partition(" (")[2].rstrip(")") for cell in table["Debian"]]
    ci = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\b(bookworm|trixie|forky)\b", ci))) == sorted(named)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    help_text = re.search(r"^test-debian:.*## .*\(RELEASE=([^;]+);", makefile, re.MULTILINE)
    assert help_text is not None
    assert sorted(help_text[1].split(", ")) == sorted(named)


def test_readme_has_the_versions_of_this_release() -> None:
    """On each release that CI runs on, the column of that release is right, as far as a minor version goes."""
    table = _readme_table()
    named = [OWN in cell for cell in table["Debian"]]
    if not any(named):
        pytest.skip(f"{OWN} is tried, not supported")
    column = named.index(True)
    for name, package in (
        ("nbdkit", "nbdkit"),
        ("Python", "python3"),
        ("libnbd", "python3-libnbd"),
        ("QEMU", "qemu-utils"),
    ):
        version = subprocess.run(
            ["dpkg-query", "-W", "-f", "${source:Upstream-Version}", package],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        told = table[name][column].split(".")[:2]
        assert re.split(r"[.+~-]", version)[:2] == told, f"{package} {version}"


def test_the_oldest_python_is_that_of_the_tools() -> None:
    major, minor, *_ = _readme_table()["Python"][0].split(".")
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^target-version = "py{major}{minor}"$', settings, re.MULTILINE)
    assert re.search(rf'^python_version = "{major}\.{minor}"$', settings, re.MULTILINE)


def test_what_runs_the_plugin_is_in_the_table_of_packages() -> None:
    """README names versions of nbdkit, Python, libnbd and QEMU: scripts/setup installs each for the run time."""
    setup = (REPOSITORY / "scripts/setup").read_text(encoding="utf-8")
    runtime = set(re.findall(r"^runtime +(\S+)", setup, re.MULTILINE))
    assert {"nbdkit", "python3", "python3-libnbd", "qemu-utils"} <= runtime


def test_ci_names_tests_that_there_are_in_one_line_each() -> None:
    """make takes a line break in TESTS for the end of a command, and goes on with the next line as another one."""
    text = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    lists = re.findall(r"^((?:HERE|THERE)_\w+)=", text, re.MULTILINE)
    assert lists
    script = text[text.index(f"{lists[0]}=") : text.index("# shellcheck")]
    said = subprocess.run(
        ["bash", "-c", script + "".join(f'printf "%s\\0" "${name}"; ' for name in lists)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for tests in said.rstrip("\0").split("\0"):
        assert "\n" not in tests
        assert all((REPOSITORY / name).exists() for name in tests.split())
