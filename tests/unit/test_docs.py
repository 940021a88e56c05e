# SPDX-License-Identifier: BSD-3-Clause
"""README.md, docs/ and man/ against the code: every key, command, stage, event and case, in both directions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from advice import unknown
from manpages import MAN, Entry, Page, plain, verbatim
from replication import VERSION, options
from replication.control.commands import TABLE
from replication.errors import ConfigError
from replication.fault import Case
from replication.primary.link import LinkState
from replication.reason import Reason
from replication.service.handlers import EVENTS, FILTERS, read_handlers
from replication.stage import Mode, Stage

ROOT = MAN.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PAGES = {path.stem: Page(path.stem) for path in sorted(MAN.glob("*.pod"))}
PLUGIN = PAGES["nbdkit-replication-plugin"]


def _table(document: str, first: str) -> list[list[str]]:
    """Rows of cells of the first table of a document whose first heading is `first`."""
    lines = DOCUMENTS[document].splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|(?:-+\|)+", line) and _cells(lines[number - 1])[0] == first:
            rows = []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(_cells(row))
            return rows
    raise AssertionError(f"{document} has no table of each '{first}'")


def _cells(row: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# The plugin's options


def _option(key: str) -> Entry:
    [entry] = [entry for entry in PLUGIN.entries("OPTIONS") if entry.plain.partition("=")[0] == key]
    return entry


def _default(key: str) -> str:
    match = re.search(r"Default: C<([^>]+)>\.", _option(key).text)
    assert match is not None, f"{key}: no 'Default: C<...>.'"
    return match[1]


def test_every_option_is_there_and_no_other() -> None:
    assert sorted(entry.plain.partition("=")[0] for entry in PLUGIN.entries("OPTIONS")) == sorted(options.ALL_KEYS)


@pytest.mark.parametrize("key", sorted(options.ALL_KEYS))
def test_side_and_default_of_options(key: str) -> None:
    of_secondary = options.DISK_KEYS | options.SECONDARY_KEYS
    side = "primary" if key in options.PRIMARY_KEYS else "secondary" if key in of_secondary else "both"
    first = _option(key).text.partition("\n\n")[0]
    assert re.match(rf"Side: {side}\. (Default: .+|Required.*)\.$", first), first


@pytest.mark.parametrize("key", ["queue-limit", "timeout", "protocol", "autostart"])
def test_defaults_of_options(key: str) -> None:
    """The default that the page gives, given as an option, changes nothing."""
    plain_parser, given = options.OptionParser(), options.OptionParser()
    for parser in (plain_parser, given):
        for name, value in (("mode", "primary"), ("disk", "/d"), ("secondary", "nbd://b"), ("state", "/s")):
            parser.add(name, value)
    given.add(key, _default(key))
    assert given.finish() == plain_parser.finish()


def test_default_paths_and_names() -> None:
    parser = options.OptionParser()
    for name, value in (("mode", "secondary"), ("disk", "/d"), ("top-id", "guest"), ("state", "STATE")):
        parser.add(name, value)
    found = parser.finish()
    disk = found.disks[0]
    folder = found.state
    assert folder is not None
    for key, path in (("active", disk.active), ("hidden", disk.hidden), ("control", found.control)):
        stated = _default(key).replace("NAME", disk.name)
        assert path == stated.replace("STATE", folder), key
    assert f"C<{disk.name}>" in _option("disk").text


WORDS = [entry.plain for entry in PLUGIN.entries("OPTIONS") if re.search(r"=>B<", entry.head)]


@pytest.mark.parametrize("head", WORDS)
def test_values_of_options(head: str) -> None:
    """Every value that the page lists is taken, by name."""
    key, _, values = head.partition("=")
    assert len(values.split("|")) > 1
    for value in values.split("|"):
        parser = options.OptionParser()
        given = {"mode": "primary", "disk": "/d", "state": "/s"}
        if key in options.SECONDARY_KEYS or (key, value) == ("mode", Mode.SECONDARY.value):
            given |= {"mode": "secondary", "top-id": "guest"}
        for name, text in (given | {key: value}).items():
            parser.add(name, text)
        parser.finish()


def test_the_values_are_listed() -> None:
    stated = {head.partition("=")[0] for head in WORDS}
    assert {"mode", "protocol", "autostart", "guest-access", "placement", "durability", "on-outdated"} <= stated


@pytest.mark.parametrize(
    ("key", "pattern", "too_small", "too_big"),
    [
        ("queue-limit", r"(1M) to (1T)", "1023k", "1025G"),
        ("resync-rate", r"(64K) to (1T)", "65535", "1025G"),
        ("timeout", r"(0\.1) to (30)\.", "0.09", "30.1"),
        ("checkpoint-interval", r"(0\.05) to (86400)\.", "0.04", "86401"),
        ("lease", r"(1) to (3600)\.", "0.9", "3601"),
        ("wfc-timeout", r"(0\.1) to (10000000)\.", "0.09", "10000001"),
        ("checkpoint-age-limit", r"(0\.05) to (10000000)\.", "0.04", "10000001"),
        ("overlay-watermark", r"(1) to (100)\.", "0", "101"),
        ("test-space", r"(1M) to (1T)\.", "1023k", "1025G"),
    ],
)
def test_bounds_of_options(key: str, pattern: str, too_small: str, too_big: str) -> None:
    match = re.search(pattern, " ".join(_option(key).text.split()))
    assert match is not None

    def take(value: str) -> None:
        parser = options.OptionParser()
        given = {"mode": "primary", "disk": "/d", "state": "/s", key: value}
        if key in options.SECONDARY_KEYS:
            given |= {"mode": "secondary"}
        for name, text in given.items():
            parser.add(name, text)
            if name == "disk" and key in options.SECONDARY_KEYS:
                parser.add("top-id", "guest")
        parser.finish()

    for value in match.groups():
        take(value)
    for value in (too_small, too_big):
        with pytest.raises(ConfigError, match=re.escape(key)):
            take(value)


def test_the_toml_file(tmp_path: Path) -> None:
    page = PAGES["replication.toml"]
    text = re.sub(r"^ ", "", verbatim(page.section("EXAMPLE")), flags=re.MULTILINE).partition('mode = "primary"')[0]
    path = tmp_path / "config.toml"
    path.write_text(text)
    parser = options.OptionParser()
    parser.add("config", str(path))
    found = parser.finish()
    assert [(disk.name, disk.top_id) for disk in found.disks] == [("system", "guest-system"), ("data", "guest-data")]


def test_the_keys_of_the_toml_file() -> None:
    page = PAGES["replication.toml"]
    lists = {
        title: page.section(title).strip().partition("\n\n")[0] for title in ("KEYS OF THE NODE", "KEYS OF A DISK")
    }
    node, disk = ([*re.findall(r"C<([^>]+)>", text)] for text in lists.values())
    assert sorted(node) == sorted(options.KEYS)
    assert sorted(disk) == sorted(("disk", *options.DISK_KEYS))


def test_the_events_of_handlers() -> None:
    section = PAGES["replication.toml"].section("KEYS OF HANDLERS")
    items = " ".join(re.findall(r"^=item (.*)", section, re.MULTILINE))
    named = re.findall(r"C<([a-z-]+)>", items)
    assert sorted(named) == sorted(EVENTS)
    assert set(re.findall(r"B<([a-z]+)", items)) == {"event", "command", "shell", "timeout", *FILTERS}
    examples = "\n".join(line[1:] for line in verbatim(section).splitlines())
    assert len(read_handlers(tomllib.loads(examples)["handler"])) == 2


# Commands that are there to be copied


def _shell() -> dict[str, str]:
    """All commands of each document and page."""
    return {
        **{
            name: "\n".join(re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))
            for name, text in DOCUMENTS.items()
        },
        **{name: page.verbatim() for name, page in PAGES.items()},
    }


@pytest.mark.parametrize("name", _shell())
def test_every_key_in_a_command_line_exists(name: str) -> None:
    """No command gives nbdkit a key that there is not."""
    for command in re.findall(r"^ *(?:[^\n]*\b)?(?<!ocf:)nbdkit\b(?:.|\\\n)*", _shell()[name], re.MULTILINE):
        if re.search(r"\b(replication|plugin\.py)\b", command):
            assert set(re.findall(r"\s\[?([a-z][a-z-]*)=", command)) <= options.ALL_KEYS, command


def test_the_command_lines_are_found() -> None:
    starts = [name for name, text in _shell().items() if re.search(r"nbdkit (?:.|\\\n)*mode=", text)]
    assert {"docs/by-hand.md", "docs/security.md", "docs/lab.md", "docs/operating/after-failover.md"} <= set(starts)
    assert "nbdkit-replication-plugin" in starts


def test_every_use_of_replctl_is_a_command() -> None:
    used = set()
    for text in (*DOCUMENTS.values(), *(plain(page.text) for page in PAGES.values())):
        used |= set(re.findall(r"(?:\breplctl --(?:state|control) [^\s\[\]|]+|`replctl) ([a-z]+(?:-[a-z]+)*)", text))
    assert {"start", "checkpoint", "failover", "switchover", "jobs", "retry", "status", "discard", "demote"} <= used
    assert used <= set(_commands("replctl"))


@pytest.mark.parametrize("name", _shell())
def test_options_in_command_lines_exist(name: str) -> None:
    for tool in ("replctl", "ft-agent"):
        shared = _options(tool) | {"--control", "--state"}
        for line in re.findall(rf"^[^\n#]*\b{tool} (?:.|\\\n)*", _shell()[name], re.MULTILINE):
            [command] = re.findall(rf"\b{tool}\b(?: +--?[a-z]+ \S+)*(?: +web\d)? +([a-z][a-z-]*)", line) or [""]
            if command in _commands(tool):
                stated = set(re.findall(r"(?<=[\s\[])(--[a-z-]+)", line.partition("#")[0]))
                assert stated <= shared | _options(tool, command), line


# QMP, stages, the link, failures


def test_every_control_command_and_its_arguments() -> None:
    stated = {}
    for entry in PLUGIN.entries("QMP COMMANDS"):
        name, *arguments = re.findall(r"\[?[BI]<[^>]+>\]?", entry.head)
        stated[plain(name)] = {re.sub(r"\[(.*)\]", r"\1?", plain(argument)) for argument in arguments}
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
    assert {entry.plain.partition(" ")[0] for entry in PLUGIN.entries("EVENTS")} == _emitted()


def test_every_reason_code() -> None:
    assert [entry.plain for entry in PLUGIN.entries("REASON CODES")] == sorted(reason.value for reason in Reason)


def test_every_state_of_the_link() -> None:
    states = {state.value for state in LinkState}
    [event] = [entry for entry in PLUGIN.entries("EVENTS") if entry.plain.startswith("REPLICATION_LINK")]
    assert set(re.findall(r"C<([^>]+)>", event.text)) == states
    assert {_code(row[0])[0] for row in _table("docs/link.md", "State")} == states


def test_every_stage() -> None:
    stages = [stage.value for stage in Stage]
    assert [entry.plain for entry in PLUGIN.entries("STAGES")] == stages
    assert [_code(row[0])[0] for row in _table("docs/operating.md", "Stage")] == stages


def test_every_case_of_failure() -> None:
    assert [int(row[0]) for row in _table("docs/failures.md", "Case")] == [case.value for case in Case]


# The tools, as their --help shows them


def _help(tool: str, command: str | None = None) -> str:
    arguments = [sys.executable, str(ROOT / "scripts" / tool), *([] if command is None else [command]), "--help"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    return subprocess.run(arguments, stdout=subprocess.PIPE, text=True, timeout=30, check=True, env=environment).stdout


_HELP: dict[tuple[str, str | None], str] = {}


def _cached_help(tool: str, command: str | None = None) -> str:
    if (tool, command) not in _HELP:
        _HELP[tool, command] = _help(tool, command)
    return _HELP[tool, command]


def _commands(tool: str) -> list[str]:
    section = re.split(r"^positional arguments:$", _cached_help(tool), flags=re.MULTILINE)[1]
    return re.findall(r"^    ([a-z][a-z-]*)(?: |$)", re.split(r"^\S", section, flags=re.MULTILINE)[0], re.MULTILINE)


def _options(tool: str, command: str | None = None) -> set[str]:
    """The long options of a command, or those before it."""
    [section] = re.findall(r"^options:\n((?:(?: .*)?\n)*)", _cached_help(tool, command), re.MULTILINE)
    return set(re.findall(r"^  (?:-\w(?: \S+)?, )?(--[a-z-]+)", section, re.MULTILINE))


def _bold(text: str) -> set[str]:
    return set(re.findall(r"B<(--[a-z-]+)>", text))


@pytest.mark.parametrize("tool", ["replctl", "ft-agent"])
def test_every_command_of_the_tools(tool: str) -> None:
    stated = [re.findall(r"B<([a-z][a-z-]*)>", entry.head)[0] for entry in PAGES[tool].entries("COMMANDS")]
    assert sorted(stated) == sorted(_commands(tool))


@pytest.mark.parametrize("tool", ["replctl", "ft-agent"])
def test_every_option_of_the_tools(tool: str) -> None:
    """Each command's options are in its entry; those that all have, or that stand before it, below OPTIONS."""
    known = {command: _options(tool, command) for command in _commands(tool)}
    shared = _options(tool) | set.intersection(*known.values())
    assert _bold("".join(entry.head for entry in PAGES[tool].entries("OPTIONS"))) == shared
    for entry in PAGES[tool].entries("COMMANDS"):
        command = re.findall(r"B<([a-z][a-z-]*)>", entry.head)[0]
        assert known[command] - shared <= _bold(entry.head), f"{command}: an option is not in the head of its entry"
        assert _bold(entry.head + entry.text) <= known[command], f"{command}: an option that there is not"


def test_every_option_of_the_monitor() -> None:
    stated = _bold("".join(entry.head for entry in PAGES["replication-monitor"].entries("OPTIONS")))
    assert stated == _options("replication-monitor") - {"--help"}


# The pages themselves


def test_pages_are_well_formed(tmp_path: Path) -> None:
    """`make man` makes them without a complaint, and `make install` has the same list."""
    assert shutil.which("pod2man"), "scripts/setup test installs perl"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    match = re.search(r"^MAN_PAGES := (.*)$", makefile, re.MULTILINE)
    assert match is not None
    assert sorted(name.rpartition(".")[0] for name in match[1].split()) == sorted(PAGES)
    for name in match[1].split():
        source, _, section = name.rpartition(".")
        made = subprocess.run(
            ["pod2man", "--errors=die", f"--section={section}", str(MAN / f"{source}.pod"), str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (made.returncode, made.stderr) == (0, ""), name
        assert Page(source).section("NAME").strip().startswith(f"{source} - ")


def test_pages_name_each_other() -> None:
    known = {name.rpartition(".")[0]: name.rpartition(".")[2] for name in re.findall(r"\S+\.\d", _pages_of_makefile())}
    for text in (*DOCUMENTS.values(), *(page.text for page in PAGES.values())):
        for name, section in re.findall(
            r"\b(nbdkit-replication-plugin|replctl|replication\.toml|ft-agent|nbdkit-replication|replication-monitor|ocf_nbdkit_replication)"
            r"\((\d)\)",
            text,
        ):
            assert known[name] == section


def _pages_of_makefile() -> str:
    match = re.search(r"^MAN_PAGES := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None
    return match[1]


# The documents among each other, and against what is in this repository


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_every_document_can_be_reached() -> None:
    reached, left = set(), ["README.md"]
    while left:
        name = left.pop()
        reached.add(name)
        for target in re.findall(r"\]\(([^)#]+\.md)[)#]", DOCUMENTS.get(name, "")):
            found = os.path.normpath((ROOT / name).parent / target)
            relative = os.path.relpath(found, ROOT)
            if relative not in reached and relative not in left:
                left.append(relative)
    assert reached >= set(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_and_targets_exist(name: str) -> None:
    for path in re.findall(r"`((?:scripts|replication|tests|man|docs)/[^`\s*]*|plugin\.py|LICENSE)", DOCUMENTS[name]):
        if not path.startswith("docs/block-replication"):  # QEMU's
            assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", DOCUMENTS[name], re.MULTILINE)) <= targets


def test_the_way_in() -> None:
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "install"} <= named
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", DOCUMENTS)
def test_it_stands_alone(name: str) -> None:
    """Someone new reads only this: no design papers, no numbers of issues."""
    text = DOCUMENTS[name]
    assert not re.search(r"DESIGN|STYLE\.md|(?<![\w&(])#\d", text)
    assert text.isascii() or set(re.findall(r"[^\x00-\x7f]", text)) <= {"·", "→"}


def test_the_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    [newest, *_] = re.findall(r"^## (\d+\.\d+)", changelog, re.MULTILINE)
    assert VERSION.startswith(f"{newest}.")


def test_every_text_that_advises_something_is_in_the_table_of_advice() -> None:
    assert unknown() == [], "new advice: say in tests/advice.py where it is printed, and what following it overwrites"
