# SPDX-License-Identifier: BSD-3-Clause
"""The nodes of this host, by name: one file FOLDER/NAME.toml each (replication.toml(5)).

Of a file only what leads to the control socket is read here, and nothing of the plugin is needed for it: a node that
runs can be failed over by its name although somebody has put an error into its file since it was started.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from replication.client.session import Unusable

# The same as in service/config.py.
FOLDER, FOLDER_VARIABLE = "/etc/nbdkit-replication.d", "NBDKIT_REPLICATION_CONFIG_DIR"
RUN, RUN_VARIABLE = "/run/nbdkit-replication", "NBDKIT_REPLICATION_RUN_DIR"
SUFFIX = ".toml"
_SOCKET_KEY = "guest-socket"
_SOCKET_LINE = re.compile(rf"""^\s*{_SOCKET_KEY}\s*=\s*(["'])([^"'\\]+)\1\s*(?:#.*)?$""", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}\Z")


def folder() -> Path:
    """Where the files are."""
    return Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)


def names() -> list[str]:
    """The nodes of this host, sorted; none if there is no folder. Unusable if it cannot be read."""
    try:
        found = [entry.name.removesuffix(SUFFIX) for entry in folder().iterdir() if entry.name.endswith(SUFFIX)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise Unusable(f"cannot read {folder()}: {error.strerror}") from error
    return sorted(name for name in found if is_name(name))


def is_name(name: str) -> bool:
    """Whether a node can be called so."""
    return _NAME.match(name) is not None


def path_of(name: str) -> Path:
    """The node's file, whether it is there or not; Unusable if nothing can be called so."""
    if not is_name(name):
        raise Unusable(f"'{name}' cannot be the name of a node: use letters, digits and _ . + -, at most 64")
    return folder() / f"{name}{SUFFIX}"


def known(name: str) -> Path:
    """The node's file; Unusable if there is no such node."""
    path = path_of(name)
    if not path.exists():
        here = ", ".join(names()) or "none"
        raise Unusable(f"there is no node {name} on this host ({path} does not exist); known are: {here}")
    return path


def usual_control(name: str) -> str:
    """The path of the control socket of a node whose file says nothing of it."""
    return os.path.join(os.environ.get(RUN_VARIABLE) or RUN, name, "control.sock")


def control_of(name: str) -> str:
    """The path of the node's control socket; Unusable if there is no such node."""
    path = known(name)
    usual = usual_control(name)
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if os.path.exists(usual):
            return usual
        why = f"cannot read {path}: {error.strerror}" if isinstance(error, OSError) else f"{path} is not TOML: {error}"
        raise Unusable(why) from error
    control, state = content.get("control"), content.get("state")
    if isinstance(control, str) and control:
        return control
    # Started by hand with config=FILE, a node has it in its state folder.
    by_hand = os.path.join(state, "control.sock") if isinstance(state, str) and state else usual
    return by_hand if os.path.exists(by_hand) and not os.path.exists(usual) else usual


def guest_socket_of(name: str) -> str:
    """Where the guest of a node connects, whatever else is wrong with its file; Unusable if it cannot be told."""
    path = known(name)
    usual = os.path.join(os.environ.get(RUN_VARIABLE) or RUN, name, "guest.sock")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Unusable(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Unusable(f"{path} is not UTF-8: {error}") from error
    try:
        content: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        lines = _SOCKET_LINE.findall(text)
        if _SOCKET_KEY not in text:
            return usual
        if len(lines) == 1:
            return str(lines[0][1])
        raise Unusable(f"{path} is not TOML, and does not say where its guest connects: {error}") from error
    service = content.get("service", {})
    socket = service.get(_SOCKET_KEY, usual) if isinstance(service, dict) else None
    if not isinstance(socket, str) or not socket:
        raise Unusable(f"{_SOCKET_KEY} of [service] in {path} is no path")
    return socket
