# SPDX-License-Identifier: BSD-3-Clause
"""README.md against the code: every key, command, stage, event and case, in both directions."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from replication import options
from replication.control.commands import TABLE
from replication.errors import ConfigError
from replication.fault import Case
from replication.primary.link import LinkState
from replication.stage import Mode, Stage

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _section(title: str) -> str:
    """The text below one heading, up to the next of the same or a higher level."""
    match = re.search(rf"^(#+) {re.escape(title)}\n", README, re.MULTILINE)
    assert match is not None, f"README.md has no section '{title}'"
    rest = README[match.end() :]
    following = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest if following is None else rest[: following.start()]


def _tables(section: str) -> dict[str, list[list[str]]]:
    """Rows of cells of every table of a section, by the table's first heading."""
    tables: dict[str, list[list[str]]] = {}
    lines = section.splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|(?:-+\|)+", line):
            rows = []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(_cells(row))
            tables[_cells(lines[number - 1])[0]] = rows
    return tables


def _cells(row: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _option_rows() -> dict[str, tuple[str, str]]:
    """Side and default, by key."""
    return {_code(row[0])[0].partition("=")[0]: (row[1], row[2]) for row in _tables(_section("Options"))["Key"]}


def test_every_option_is_there_and_no_other() -> None:
    assert _option_rows().keys() == options.ALL_KEYS


@pytest.mark.parametrize("key", sorted(options.ALL_KEYS))
def test_sides_of_options(key: str) -> None:
    of_secondary = options.DISK_KEYS | options.SECONDARY_KEYS
    expected = "primary" if key in options.PRIMARY_KEYS else "secondary" if key in of_secondary else "both"
    assert _option_rows()[key][0] == expected


@pytest.mark.parametrize("key", ["queue-limit", "timeout", "protocol", "autostart"])
def test_defaults_of_options(key: str) -> None:
    """The default that README gives, given as an option, changes nothing."""
    default = _code(_option_rows()[key][1])[0]
    plain, given = options.OptionParser(), options.OptionParser()
    for parser in (plain, given):
        for name, value in (("mode", "primary"), ("disk", "/d"), ("secondary", "nbd://b"), ("state", "/s")):
            parser.add(name, value)
    given.add(key, default)
    assert given.finish() == plain.finish()


def test_default_paths_and_names() -> None:
    parser = options.OptionParser()
    for name, value in (("mode", "secondary"), ("disk", "/d"), ("top-id", "guest"), ("state", "STATE")):
        parser.add(name, value)
    found = parser.finish()
    rows = _option_rows()
    disk = found.disks[0]
    folder = found.state
    assert folder is not None
    for key, path in (("active", disk.active), ("hidden", disk.hidden), ("control", found.control)):
        stated = _code(rows[key][1])[0].replace("NAME", disk.name)
        assert path == stated.replace("STATE", folder), key
    assert f"`{disk.name}`" in _section("Options")


@pytest.mark.parametrize("key", ["mode", "protocol", "autostart", "guest-access", "placement"])
def test_values_of_options(key: str) -> None:
    """Every value that the table lists is taken, by name."""
    [values] = [
        _code(row[0])[0].partition("=")[2].split("|")
        for row in _tables(_section("Options"))["Key"]
        if _code(row[0])[0].startswith(f"{key}=")
    ]
    assert len(values) == 2
    for value in values:
        parser = options.OptionParser()
        secondary = key == "mode" and value == Mode.SECONDARY.value
        given = {"mode": "primary", "disk": "/d", "state": "/s", key: value}
        if secondary:
            given["top-id"] = "guest"
        for name, text in given.items():
            parser.add(name, text)
        parser.finish()


@pytest.mark.parametrize(
    ("key", "pattern", "too_small", "too_big"),
    [
        ("queue-limit", r"(1M) to (1T)", "1023k", "1025G"),
        ("resync-rate", r"(64K) to (1T)", "65535", "1025G"),
        ("timeout", r"(0\.1) to (30)\.", "0.09", "30.1"),
        ("checkpoint-interval", r"(0\.05) to (86400)\.", "0.04", "86401"),
    ],
)
def test_bounds_of_options(key: str, pattern: str, too_small: str, too_big: str) -> None:
    [row] = [row for row in _tables(_section("Options"))["Key"] if _code(row[0])[0].startswith(f"{key}=")]
    match = re.search(pattern, row[3])
    assert match is not None

    def take(value: str) -> None:
        parser = options.OptionParser()
        for name, text in (("mode", "primary"), ("disk", "/d"), ("state", "/s"), (key, value)):
            parser.add(name, text)
        parser.finish()

    for value in match.groups():
        take(value)
    for value in (too_small, too_big):
        with pytest.raises(ConfigError, match=re.escape(key)):
            take(value)


def test_the_toml_file(tmp_path: Path) -> None:
    [text] = re.findall(r"^```toml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    path = tmp_path / "config.toml"
    path.write_text(text)
    parser = options.OptionParser()
    parser.add("config", str(path))
    found = parser.finish()
    assert [(disk.name, disk.top_id) for disk in found.disks] == [("system", "guest-system"), ("data", "guest-data")]


def test_every_key_in_a_command_line_exists() -> None:
    """No command of README gives nbdkit a key that there is not."""
    used: set[str] = set()
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for command in re.findall(r"^nbdkit (?:.|\\\n)*", block, re.MULTILINE):
            used |= set(re.findall(r"\s([a-z][a-z-]*)=", command))
    assert used
    assert used <= options.ALL_KEYS


def test_every_control_command_and_its_arguments() -> None:
    rows = _tables(_section("QMP"))["Command"]
    stated = {_code(row[0])[0]: set(_code(row[1])) for row in rows}
    assert stated == {
        name: {argument + ("" if row.required else "?") for argument, row in command.arguments.items()}
        for name, command in TABLE.items()
    }


def _emitted() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "replication").rglob("*.py"):
        names |= set(re.findall(r"\.emit\(\s*\"([A-Z_]+)\"", path.read_text(encoding="utf-8")))
    return names


def test_every_event() -> None:
    rows = _tables(_section("QMP"))["Event"]
    assert {_code(row[0])[0] for row in rows} == _emitted()


def test_every_state_of_the_link() -> None:
    [row] = [row for row in _tables(_section("QMP"))["Event"] if _code(row[0]) == ["REPLICATION_LINK"]]
    assert set(_code(row[1])) - {"state"} == {state.value for state in LinkState}


def test_every_stage() -> None:
    rows = _tables(_section("Stages"))["Stage"]
    assert [_code(row[0])[0] for row in rows] == [stage.value for stage in Stage]


def test_every_case_of_failure() -> None:
    rows = _tables(_section("Failures"))["Case"]
    assert [int(row[0]) for row in rows] == [case.value for case in Case]


def _script(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def _replctl_commands() -> dict[str, argparse.ArgumentParser]:
    parser: argparse.ArgumentParser = _script("replctl").parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


def test_every_command_of_replctl() -> None:
    rows = _tables(_section("replctl"))["Command"]
    assert {_code(row[0])[0] for row in rows} == set(_replctl_commands())


def test_options_of_replctl_exist() -> None:
    commands = _replctl_commands()
    for name, text in _tables(_section("replctl"))["Command"]:
        known = commands[_code(name)[0]].format_help()
        for option in re.findall(r"`(--[a-z]+)`", text):
            assert option in known, f"{name} {option}"


def test_every_use_of_replctl_is_a_command() -> None:
    used = set(re.findall(r"(?:\breplctl --state \S+|`replctl) ([a-z]+)", README))
    assert {"start", "checkpoint", "failover", "switchover", "jobs", "retry", "status"} <= used
    assert used <= set(_replctl_commands())


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_paths_and_targets_exist() -> None:
    for path in re.findall(r"`((?:scripts|replication|tests)/[^`\s]*|plugin\.py|LICENSE)", README):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "lint", "install"} <= named
    assert named <= targets


def test_it_stands_alone() -> None:
    """Someone new reads only this: no design papers, no numbers of issues."""
    assert not re.search(r"DESIGN|STYLE\.md|(?<![\w&])#\d", README)
    assert README.isascii() or set(re.findall(r"[^\x00-\x7f]", README)) <= {"·", "→"}
