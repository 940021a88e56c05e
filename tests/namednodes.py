# SPDX-License-Identifier: BSD-3-Clause
"""Files that make the servers of a test nodes of this host, by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nodes import Server


def give_name(folder: Path, name: str, node: Server, *more: str, service: Sequence[str] = ()) -> Path:
    """Write folder/NAME.toml with what the server was started with; `more` and `service` are lines for the top level
    and [service]."""
    pairs = [argument.partition("=") for argument in node.arguments]
    disks: list[str] = []
    top = [f"control = {json.dumps(str(node.control_path))}", *more]
    for key, _, value in pairs:
        if key == "disk":
            export, _, location = value.partition(":")
            disks += [f"[disk.{export}]", f"disk = {json.dumps(location)}"]
        elif key in ("top-id", "active", "hidden"):
            disks.append(f"{key} = {json.dumps(value)}")
        elif key != "control":
            top.append(f"{key} = {json.dumps(value)}")
    path = folder / f"{name}.toml"
    socket = f"guest-socket = {json.dumps(str(node.socket_path))}"
    path.write_text("\n".join([*top, "[service]", socket, *service, *disks, ""]))
    return path
