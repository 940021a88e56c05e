# SPDX-License-Identifier: BSD-3-Clause
"""Two nodes, and which of them has the newer content: `replctl compare A B`."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from replication.client.qmp import Refused
from replication.client.session import Session, Unusable
from replication.client.values import human_value, printable
from replication.replctl import nodes
from replication.replctl.outcome import Exit, Failed

_TEXTS = {
    "same": "{a} and {b} are of the same generation; of two that replicate, the primary may be ahead",
    "newer": "{a} is newer: it went on from what {b} has",
    "older": "{b} is newer: it went on from what {a} has",
    "diverged": "split brain: {a} and {b} have both gone on from what they had in common ({common})",
    "unrelated": "{a} and {b} have nothing in common",
    "unknown": "{a} or {b} was never part of a pair, or has no complete copy of anything",
}

COMPARABLE = ("same", "newer", "older")
"""Where one of the two can be overwritten, and nothing is lost that both had agreed on."""


def compare(options: argparse.Namespace) -> None:
    """Say which is newer. Failed when that cannot be said of the two."""
    lineages = [_lineage(options.b, options.timeout)]
    with Session(_socket(options.a), options.timeout) as client:
        answer: dict[str, Any] = client.call("replication-compare", lineage=lineages[0])
    relation = str(answer.get("relation"))
    if options.json:
        print(json.dumps({"done": True, **answer}))
    else:
        text = _TEXTS.get(relation, "{a} to {b}: " + printable(relation))
        print(text.format(a=printable(options.a), b=printable(options.b), common=human_value(answer.get("common"))))
    if relation not in COMPARABLE:
        raise Failed(Exit.REFUSED)


def _lineage(name: str, timeout_s: float) -> dict[str, Any]:
    with Session(_socket(name), timeout_s) as client:
        lineage = client.call("query-replication").get("lineage")
    if not isinstance(lineage, dict):
        raise Refused(f"{name} does not say what its content comes from: it is of another version")
    return lineage


def _socket(name: str) -> str:
    """A node's control socket: by its name, or by the path of the socket or of its state folder."""
    if "/" not in name:
        return nodes.control_of(name)
    if os.path.isdir(name):
        return os.path.join(name, "control.sock")
    if not os.path.exists(name):
        raise Unusable(f"{name} is neither a control socket nor a state folder")
    return name
