# SPDX-License-Identifier: BSD-3-Clause
"""What bash offers for a word: `replctl --complete WORD...` is asked by completion/replctl.

The last WORD is the one that is being typed. The first line of the answer says what may stand there: `words` (one a
line follow), `files` or `folders`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from replication.client.session import Unusable

from . import nodes
from .table import TABLE, On, Row, row_of

_BEFORE: dict[str, str | None] = {
    "--control": "files",
    "-s": "files",
    "--state": "folders",
    "--node": "nodes",
    "-n": "nodes",
    "--timeout": "",
    "--help": None,
    "-h": None,
}
"""The options before the command: what follows them; None for nothing, "" for what nobody can know."""


def show(words: Sequence[str]) -> None:
    """Print the answer."""
    kind, offered = offer(list(words[:-1]), words[-1] if words else "")
    print("\n".join([kind, *offered]))


def offer(before: list[str], current: str) -> tuple[str, list[str]]:
    """(what may stand there, the words that begin with `current`)"""
    row, node, rest = _read(before)
    if row is None:
        previous = before[-1] if before else ""
        if rest:  # an option that waits for its value
            return _of_kind(_BEFORE[previous] or "", current)
        if current.startswith("-"):
            return _words((name for name in _BEFORE if name.startswith("--")), current)
        rows = [row.name for row in TABLE if node is None or row.on is not On.HOST]
        return _words([*rows, *([] if node else _names())], current)
    return _after(row, rest, current)


def _read(before: list[str]) -> tuple[Row | None, str | None, list[str]]:
    """(the command, the node, the words after the command; before it, an option that waits for its value)"""
    node: str | None = None
    index = 0
    while index < len(before):
        word = before[index]
        if word.startswith("-"):
            waits = _BEFORE.get(word) is not None
            if waits and index + 1 == len(before):
                return None, node, [word]
            if waits:
                node = before[index + 1] if word not in ("--timeout",) else node
                index += 1
        elif (row := row_of(word)) is not None:
            return row, node, before[index + 1 :]
        else:
            node = word
        index += 1
    return None, node, []


def _after(row: Row, typed: list[str], current: str) -> tuple[str, list[str]]:
    options = {name: settings for names, settings in row.arguments for name in names if name.startswith("-")}
    if typed and (settings := options.get(typed[-1])) is not None and settings.get("action") != "store_true":
        offered = _of_value(settings, current)
        if settings.get("nargs") != "?" or not current.startswith("-"):
            return offered
    if current.startswith("-"):
        return _words([*options, "--json", "--help"], current)
    plain = [settings for names, settings in row.arguments if not names[0].startswith("-")]
    given = 0
    for index, word in enumerate(typed):
        valued = index and (options.get(typed[index - 1]) or {"action": "store_true"}).get("action") != "store_true"
        given += not word.startswith("-") and not valued
    return _of_value(plain[given], current) if given < len(plain) else ("words", [])


def _of_value(settings: dict[str, Any], current: str) -> tuple[str, list[str]]:
    if "choices" in settings:
        return _words(settings["choices"], current)
    return _of_kind(settings.get("complete", ""), current)


def _of_kind(kind: str, current: str) -> tuple[str, list[str]]:
    if kind == "nodes":
        return _words(_names(), current)
    return (kind, []) if kind in ("files", "folders") else ("words", [])


def _names() -> list[str]:
    try:
        return nodes.names()
    except Unusable:
        return []


def _words(words: Iterable[str], current: str) -> tuple[str, list[str]]:
    return "words", [word for word in words if word.startswith(current)]
