# SPDX-License-Identifier: BSD-3-Clause
"""Which secondary a primary calls: the command line's or that of an earlier start, and what the log says when they
differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from content import make_raw
from lab import Lab
from replication.errors import CommandError
from replication.events import EventHub
from replication.node import Node
from replication.options import DiskOptions, Options
from replication.record.state import StateError, StateFolder
from replication.stage import Mode

SIZE = 1 << 20
FIRST, SECOND, GIVEN = (f"nbd+unix:///?socket=/nowhere/{name}" for name in ("first", "second", "given"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for module in ("primary.side", "node"):
        monkeypatch.setattr(f"replication.{module}.log", lines.append)
    return lines


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[str | None], Node]:
    """Opens the node with `secondary=` as given."""
    disk = DiskOptions("disk0", str(make_raw(tmp_path / "disk", SIZE)), None)
    state = str(tmp_path / "state")

    def node(secondary: str | None) -> Node:
        return Node(
            Options(Mode.PRIMARY, [disk], state, None, secondary=secondary, timeout_s=0.5),
            EventHub(),
            StateFolder(state),
        )

    return node


def shown(node: Node) -> str:
    """Which one counts; the node is closed."""
    address: str = node.query()["link"]["secondary"]
    node.close()
    return address


def started(lab: Lab, node: Node) -> str:
    """The address of a plain server with which it was started by a command."""
    given = lab.endpoint(size=SIZE).uri()
    node.launch()
    node.start(Mode.PRIMARY, given, "none")
    node.close()
    return given


def test_a_command_line_that_has_changed_since_the_command_counts(
    lab: Lab, opened: Callable[[str | None], Node], said: list[str]
) -> None:
    given = started(lab, opened(FIRST))
    assert said == []
    assert shown(opened(SECOND)) == SECOND
    assert said == [f"secondary={SECOND} is new and counts from now on, not {given} of an earlier start"]


def test_a_command_line_that_came_after_the_command_counts(
    lab: Lab, opened: Callable[[str | None], Node], said: list[str]
) -> None:
    given = started(lab, opened(None))
    assert shown(opened(SECOND)) == SECOND
    assert said == [f"secondary={SECOND} is new and counts from now on, not {given} of an earlier start"]


def test_the_command_counts_while_the_command_line_is_as_it_was(
    lab: Lab, opened: Callable[[str | None], Node], said: list[str]
) -> None:
    given = started(lab, opened(FIRST))
    assert shown(opened(FIRST)) == given
    (line,) = said
    assert line.startswith(f"secondary={FIRST} is not used: an earlier start has given {given}")


def test_what_a_command_gave_counts_where_the_command_line_is_silent_or_says_the_same(
    lab: Lab, opened: Callable[[str | None], Node], said: list[str]
) -> None:
    given = started(lab, opened(FIRST))
    assert shown(opened(None)) == given
    assert shown(opened(given)) == given
    assert said == []


def test_a_state_of_an_older_version_counts_and_says_so(
    lab: Lab, opened: Callable[[str | None], Node], said: list[str]
) -> None:
    """It does not know what the command line was."""
    given = started(lab, opened(FIRST))
    node = opened(FIRST)
    node._record.replaced = ""
    node._save()
    node.close()
    said.clear()
    assert shown(opened(SECOND)) == given
    (line,) = said
    assert line.startswith(f"secondary={SECOND} is not used")


def test_a_refused_start_changes_nothing(
    lab: Lab, opened: Callable[[str | None], Node], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = started(lab, opened(FIRST))
    node = opened(SECOND)
    node.launch()
    node.stop(failover=False)

    def full(*_: object, **__: object) -> None:
        raise StateError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(StateFolder, "save", full)
        with pytest.raises(CommandError, match="no room"):
            node.start(Mode.PRIMARY, given, "none")
    assert (node._record.secondary, node._record.replaced) == (None, FIRST)
    assert shown(node) == SECOND


def test_autostart_in_stage_done_says_that_it_starts_nothing(
    lab: Lab, opened: Callable[[str | None], Node], said: list[str]
) -> None:
    given = lab.endpoint(size=SIZE).uri()
    node = opened(given)
    node.launch()
    node.start(Mode.PRIMARY, None, "none")
    node.stop(failover=False)
    node.close()
    node = opened(given)
    node._options.autostart = True
    node.launch()
    node.close()
    assert said == ["autostart=true starts nothing in stage done: a person says who owns the disks now"]
