# SPDX-License-Identifier: BSD-3-Clause
"""`replctl doctor`: looks at what a new user gets wrong, and says what to do.

Each check runs in a thread of its own, with a deadline of its own: a disk that hangs, or a host that does not answer,
is one line, and holds no other check up. Nothing is changed.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from collections.abc import Iterator

from replication.client.values import printable
from replication.errors import ConfigError, ReplicationError

from . import nodes
from .finding import Check, Finding, Result, Subject, bad
from .hostchecks import OF_HOST, OF_NODE
from .outcome import Exit, Failed
from .peerchecks import OF_PEER


def show(options: argparse.Namespace) -> None:
    """Look at one node, or at all; Failed with code 1 if something is bad."""
    word = options.name or options.node
    if word is not None:
        nodes.known(word)
    names = nodes.names() if word is None else [word]
    found: dict[str | None, list[tuple[str, Finding]]] = {None: list(examine(Subject(""), OF_HOST))}
    found |= {name: list(examine(Subject(name), (*OF_NODE, *OF_PEER))) for name in names}
    if options.json:
        rows = [
            {"node": node, "check": check, "result": one.result.value, "text": one.text, "advice": one.advice}
            for node, findings in found.items()
            for check, one in findings
        ]
        print(json.dumps(rows))
    else:
        for node, findings in found.items():
            print("\n".join(_lines(node, findings)))
        if not names:
            print(f"no nodes: there is no file NAME.toml in {nodes.folder()}; replctl init makes one")
    if any(one.result is Result.BAD for findings in found.values() for _, one in findings):
        raise Failed(Exit.REFUSED)


def _lines(node: str | None, findings: list[tuple[str, Finding]]) -> Iterator[str]:
    yield "this host" if node is None else f"node {node}"
    for check, one in findings:
        yield f"  {one.result.value:<7}  {check:<12}  {printable(one.text)}"
        if one.advice is not None:
            yield f"  {'':<7}  {'':<12}  -> {printable(one.advice)}"


def examine(node: Subject, checks: tuple[Check, ...]) -> Iterator[tuple[str, Finding]]:
    """(check, what it has found), in the order of the checks."""
    if node.name:
        try:
            assert node.config
        except ConfigError as error:
            # Nothing else can be asked.
            yield "file", bad(str(error), f"replctl check-config {node.name} says when it is right")
            return
    begin = time.monotonic()
    answers: dict[str, queue.SimpleQueue[list[Finding]]] = {}
    for check in checks:
        answers[check.name] = queue.SimpleQueue()
        # A daemon: what hangs does not keep the process.
        threading.Thread(target=_look, args=(node, check, answers[check.name]), daemon=True).start()
    for check in checks:
        try:
            left_s = begin + check.deadline_s - time.monotonic()
            findings = answers[check.name].get(timeout=max(left_s, 0))
        except queue.Empty:
            text = f"no result within {check.deadline_s:g} s"
            findings = [bad(text, "a disk, a folder or a host that this check looks at does not answer")]
        yield from ((check.name, one) for one in findings)


def _look(node: Subject, check: Check, answer: queue.SimpleQueue[list[Finding]]) -> None:
    try:
        found = list(check.look(node))
    except (OSError, ReplicationError) as error:
        found = [bad(str(error), "look at what the line names")]
    except Exception as error:  # noqa: BLE001  a defect of a check must not hide what the others have found
        found = [bad(f"the check has failed: {type(error).__name__}: {error}", "report this as a defect")]
    answer.put(found)
