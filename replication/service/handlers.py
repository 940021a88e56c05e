# SPDX-License-Identifier: BSD-3-Clause
"""[[handler]]: which command is run when something has happened to a node (replication.toml(5)).

Read, checked and started here; replication-monitor decides when (monitor/handlers.py), and for the one that may refuse
guard.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from replication.errors import ConfigError
from replication.fault import Case

EVENTS = (
    "after-resync-target",
    "before-resync-target",
    "checkpoint-age",
    "disconnected",
    "error",
    "guest-suspended",
    "inconsistent",
    "link-change",
    "local-io-error",
    "node-down",
    "node-up",
    "out-of-sync",
    "outdated",
    "overlay-watermark",
    "split-brain",
    "stage-change",
    "test-failed",
)
"""What a handler can be for; the names of DRBD's handlers where there is one for the same."""

ASKED = "before-resync-target"
"""The one that is run by the node itself, and may refuse (guard.py)."""

ASKED_S, ASKED_MAX_S = 10.0, 20.0
"""How long it may take, unless its file says otherwise, and at most: a primary waits 30 s for an answer."""

FILTERS = ("case", "disk", "from", "to")
"""Keys that narrow an event down, each one value or a list of values. Not every event has each of them."""

HANDLERS_MAX = 32
"""Of one node."""

TIMEOUT_S, TIMEOUT_MAX_S = 60.0, 3600.0

_KEYS = ("event", "command", "shell", "timeout", *FILTERS)


@dataclass(frozen=True)
class Handler:
    """One table [[handler]]."""

    event: str
    command: tuple[str, ...]
    timeout_s: float = TIMEOUT_S
    """After so many seconds the command is ended."""
    filters: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def fits(self, event: str, values: Mapping[str, str]) -> bool:
        """Whether the command is to be run for an event with these values."""
        return event == self.event and all(values.get(key) in wanted for key, wanted in self.filters.items())

    def start(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Begin the command, with `environment` beside its own; OSError. It leads a session, so that what it starts can
        be ended with it, and what it prints is read from `stdout`."""
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd="/",
            start_new_session=True,
        )


def read_handlers(tables: Sequence[Mapping[str, Any]]) -> tuple[Handler, ...]:
    """ConfigError is one line that names the handler by its place in the file, and the key."""
    if len(tables) > HANDLERS_MAX:
        raise ConfigError(f"there are {len(tables)} tables [[handler]]: at most {HANDLERS_MAX} can be run for a node")
    return tuple(_read(f"[[handler]] number {place}", table) for place, table in enumerate(tables, 1))


def _read(where: str, table: Mapping[str, Any]) -> Handler:
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"unknown key '{key}' in {where}: the keys are {', '.join(sorted(_KEYS))}")
    for key in ("event", "command"):
        if key not in table:
            raise ConfigError(f"{where} lacks {key} =")
    if table["event"] not in EVENTS:
        raise ConfigError(f"event = {table['event']!r} in {where} should be one of {', '.join(EVENTS)}")
    filters = {key: _filter(where, key, table[key]) for key in FILTERS if key in table}
    asked = table["event"] == ASKED
    if asked and filters:
        raise ConfigError(f"{where}: {ASKED} has no {', '.join(filters)}")
    usual_s, most_s = (ASKED_S, ASKED_MAX_S) if asked else (TIMEOUT_S, TIMEOUT_MAX_S)
    timeout_s = _timeout(where, table.get("timeout", usual_s), most_s)
    return Handler(table["event"], _command(where, table), timeout_s, filters)


def _command(where: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    """A list of words, or a line: taken apart into words, or given to the shell where `shell = true` asks for that."""
    command, shell = table["command"], table.get("shell", False)
    if not isinstance(shell, bool):
        raise ConfigError(f"shell in {where} must be true or false")
    if shell:
        if not isinstance(command, str) or not command.strip() or "\0" in command:
            raise ConfigError(f"command in {where} must be a line for the shell")
        return ("/bin/sh", "-c", command)
    try:
        words = shlex.split(command) if isinstance(command, str) else command
    except ValueError as error:
        raise ConfigError(f"command in {where}: {error}") from error
    if not isinstance(words, list) or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise ConfigError(f"command in {where} must be a string, or a list of strings")
    if not words or not words[0].startswith("/"):
        raise ConfigError(f"command in {where} must begin with the absolute path of a program, or have shell = true")
    return tuple(words)


def _timeout(where: str, value: object, most_s: float) -> float:
    seconds = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
    if not 0.1 <= seconds <= most_s:
        raise ConfigError(f"timeout = {value!r} in {where} should be from 0.1 to {most_s:g} seconds")
    return seconds


def _filter(where: str, key: str, value: object) -> frozenset[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str | int) and not isinstance(one, bool) for one in values):
        raise ConfigError(f"{key} in {where} must be a value or a list of values")
    found = frozenset(str(one) for one in values)
    cases = {str(case.value) for case in Case}
    if key == "case" and not found <= cases:
        raise ConfigError(f"case = {value!r} in {where}: the cases are {', '.join(sorted(cases))}")
    return found
