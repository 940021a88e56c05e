# SPDX-License-Identifier: BSD-3-Clause
"""replctl resize: disks that were grown on both hosts get their new size."""

from __future__ import annotations

import argparse
from typing import Any

from .commands import tell
from .session import Session
from .values import human_value, printable


def resize(client: Session, options: argparse.Namespace) -> None:
    """Grow one disk or all, and say what counts now."""
    given = {"disk": options.disk, "size": options.size}
    answer = client.call("replication-resize", **{name: value for name, value in given.items() if value is not None})
    disks = [disk for disk in answer.get("disks", []) if isinstance(disk, dict)]
    grown = any(disk.get("size") != disk.get("former-size") for disk in disks)
    tell(options, "\n".join(map(_line, disks)), done=grown, disks=disks)


def _line(disk: dict[str, Any]) -> str:
    """A disk, for a person: to the byte, since both hosts have to agree on it."""
    name, size, former = printable(disk.get("name")), disk.get("size"), disk.get("former-size")
    if size != former:
        return (
            f"disk {name} has {human_value(size)} bytes now, and had {human_value(former)}; guests see it when they "
            "connect anew"
        )
    there = disk.get("there-bytes")
    beyond = "" if there is None else f", its disk on the secondary {human_value(there)}"
    here = human_value(disk.get("here-bytes"))
    return f"disk {name} has {human_value(size)} bytes, as before: its disk here has {here} bytes{beyond}"
