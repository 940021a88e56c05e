# SPDX-License-Identifier: BSD-3-Clause
"""[[handler]] in the file of a node."""

from __future__ import annotations

import re
from typing import Any

import pytest

from replication.errors import ConfigError
from replication.service.handlers import EVENTS, HANDLERS_MAX, Handler, read_handlers

LINE: dict[str, Any] = {"event": "disconnected", "command": "/bin/true"}


def test_a_line_is_taken_apart_into_words_and_no_shell_sees_it() -> None:
    (found,) = read_handlers([{**LINE, "command": "/bin/echo 'a b' $HOME; x"}])
    assert found.command == ("/bin/echo", "a b", "$HOME;", "x")
    assert (found.timeout_s, found.filters) == (60.0, {})


def test_words_and_the_shell() -> None:
    words, line = read_handlers(
        [{**LINE, "command": ["/bin/echo", "a b"]}, {**LINE, "command": "echo $HOME", "shell": True, "timeout": 5}]
    )
    assert words.command == ("/bin/echo", "a b")
    assert (line.command, line.timeout_s) == (("/bin/sh", "-c", "echo $HOME"), 5.0)


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"event": "disconnected"}, "lacks command ="),
        ({"command": "/x"}, "lacks event ="),
        ({**LINE, "event": "fire"}, f"event = 'fire' in [[handler]] number 2 should be one of {', '.join(EVENTS)}"),
        ({**LINE, "on": 1}, "unknown key 'on' in [[handler]] number 2: the keys are case, command, disk, event, from"),
        ({**LINE, "command": "true"}, "must begin with the absolute path"),
        ({**LINE, "command": []}, "must begin with the absolute path"),
        ({**LINE, "command": "/x 'y"}, "No closing quotation"),
        ({**LINE, "command": ["/x", 1]}, "must be a string, or a list of strings"),
        ({**LINE, "command": ["/x", "\0"]}, "must be a string, or a list of strings"),
        ({**LINE, "command": ["/x"], "shell": True}, "must be a line for the shell"),
        ({**LINE, "shell": "yes"}, "shell in [[handler]] number 2 must be true or false"),
        ({**LINE, "timeout": 0}, "timeout = 0 in"),
        ({**LINE, "timeout": True}, "timeout = True in"),
        ({**LINE, "timeout": 3601}, "timeout = 3601 in"),
        ({**LINE, "case": 9}, "case = 9 in [[handler]] number 2: the cases are 1, 2"),
        ({**LINE, "to": []}, "to in [[handler]] number 2 must be a value or a list of values"),
        ({**LINE, "disk": [True]}, "disk in"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(table: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)) as caught:
        read_handlers([LINE, table])
    assert "\n" not in str(caught.value)


def test_there_are_not_too_many() -> None:
    assert len(read_handlers([LINE] * HANDLERS_MAX)) == HANDLERS_MAX
    with pytest.raises(ConfigError, match=r"at most 32"):
        read_handlers([LINE] * (HANDLERS_MAX + 1))


@pytest.mark.parametrize(
    ("filters", "values", "fits"),
    [
        ({}, {}, True),
        ({"case": [1, 4]}, {"case": "4"}, True),
        ({"case": [1, 4]}, {"case": "2"}, False),
        ({"case": 1}, {}, False),
        ({"from": "running", "to": ["failover", "done"]}, {"from": "running", "to": "done"}, True),
        ({"from": "running", "to": "done"}, {"from": "none", "to": "done"}, False),
    ],
)
def test_filters(filters: dict[str, Any], values: dict[str, str], fits: bool) -> None:
    (handler,) = read_handlers([{**LINE, **filters}])
    assert handler.fits("disconnected", values) is fits
    assert not handler.fits("error", values)


def test_two_that_say_the_same_are_equal() -> None:
    """By that the monitor sees that nothing has changed in a file."""
    assert read_handlers([LINE]) == (Handler("disconnected", ("/bin/true",)),)
