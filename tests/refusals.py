# SPDX-License-Identifier: BSD-3-Clause
"""A command that was refused has changed nothing, or its answer says what: query-replication before and after."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from content import whole
from nodes import Secondary, Server
from waiting import Stuck, wait_until

OWNED_UP = {
    "what is to be sent is noted": ("generation", "lineage", "out-of-sync-bytes", "missing-bytes", "marks"),
    "had been asked to end what it sends": ("peer-node", "link"),
    "which was held, is aborted": ("held-epoch",),
    "is aborted, and replication goes on": ("held-epoch",),
    "the link to the secondary was cut": ("link",),
    "the overlays, which nobody could see": (
        *("epoch", "checkpoint", "active-bytes", "hidden-bytes", "marks", "checkpoint-of-primary"),
    ),
    "nothing of the primary is taken any more": ("checkpoint-obstacle",),
}
"""What a refusal says that it has changed all the same, and what of query-replication that is."""


UNCOUNTED = ("totals", "active-limit-bytes", "hidden-limit-bytes")


def owned_up(refusal: str) -> set[str]:
    """The members of query-replication of which a refusal says that they are other ones now."""
    return {name for words, names in OWNED_UP.items() if words in refusal for name in names}


def said(node: Server, unsaid: Collection[str] = ()) -> dict[str, Any]:
    """What a command that was refused must not have changed: all of query-replication, but for what went wrong, what
    has been counted, and what is a matter of the file system."""
    status = node.status()
    shown = {name: value for name, value in status.items() if name not in ("error", "in-sync-until", "peer-consistent")}
    shown["checkpoint"] = {name: value for name, value in status["checkpoint"].items() if name != "age"}
    shown["link"] = {name: value for name, value in status["link"].items() if name != "reason"}
    shown["disks"] = [
        {name: value for name, value in disk.items() if name not in (*UNCOUNTED, *unsaid)} for disk in status["disks"]
    ]
    return {name: value for name, value in shown.items() if name not in unsaid}


def seen(node: Server, export: str = "") -> bytes | None:
    """What the guest sees, None when that is nothing."""
    try:
        return whole(node.connect(export or ("top0" if isinstance(node, Secondary) else "disk0")))
    except Exception:  # noqa: BLE001 (there is nothing to be seen, before and afterwards)
        return None


def unchanged(node: Server, before: dict[str, Any], unsaid: Collection[str], why: object) -> None:
    """It is as it was. A link that comes back by itself may be on its way."""
    expected = {name: value for name, value in before.items() if name not in unsaid}
    expected["disks"] = [
        {name: value for name, value in disk.items() if name not in unsaid} for disk in before["disks"]
    ]
    if "disks" in unsaid:
        del expected["disks"]
    try:
        wait_until(lambda: said(node, unsaid) == expected, "everything is as it was")
    except Stuck:
        found = said(node, unsaid)
        differing = {
            name: (expected.get(name), found.get(name)) for name in expected if expected[name] != found.get(name)
        }
        raise AssertionError(f"{node.name}: {differing} after: {why}") from None
