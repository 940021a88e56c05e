# SPDX-License-Identifier: BSD-3-Clause
"""The serial numbers of promotions, as a node's state folder keeps them.

Each promotion has a number of its own, one more than any that is known of. The register has it too, but the cluster may
lose an entry: of two parts of a cluster that was cut in two one part's configuration survives. A node that finds the
entry of a promotion that was not after its own knows by this that the register cannot judge it.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replication.replctl import nodes

from .codes import Code, Failed, note
from .told import Told

# The same as in service/config.py.
_STATE, _STATE_VARIABLE = "/var/lib/nbdkit-replication", "NBDKIT_REPLICATION_STATE_DIR"
_MODE = 0o644


@dataclass(frozen=True)
class Known:
    """What one node knows."""

    promoted: int = 0
    """The number with which it was promoted last; 0: never, or by an agent that had none."""
    seen: int = 0
    """The highest that was in the register."""

    @property
    def next(self) -> int:
        """Of a promotion now."""
        return max(self.promoted, self.seen) + 1


def is_serial(value: object) -> bool:
    """Whether it is one, or 0."""
    return type(value) is int and 0 <= value < 1 << 63


class Serials:
    """Of one node and one resource."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def read(self) -> Known:
        """What is known; nothing if it cannot be read, which is logged."""
        try:
            found = json.loads(self._path.read_text(encoding="ascii")).get(self._told.resource, {})
            promoted, seen = found.get("promoted", 0), found.get("seen", 0)
            if not (is_serial(promoted) and is_serial(seen)):
                raise ValueError("no serial numbers")
            return Known(promoted, seen)
        except FileNotFoundError:
            return Known()
        except (OSError, ValueError, AttributeError) as error:
            note(f"the serial numbers of promotions cannot be read: {error}")
            return Known()

    def promoted(self, serial: int) -> None:
        """The node has been promoted with that one. Failed."""
        try:
            self._write({"promoted": serial, "seen": serial})
        except OSError as error:
            raise Failed(Code.GENERIC, f"cannot note the serial number of this promotion: {error}") from error

    def saw(self, serial: int) -> None:
        """The register has that one."""
        known = self.read()
        if serial <= max(known.promoted, known.seen):
            return
        try:
            self._write({"promoted": known.promoted, "seen": serial})
        except OSError as error:
            note(f"cannot note the serial number of the last promotion: {error}")

    @property
    def _path(self) -> Path:
        return Path(_state_of(self._told.node)) / "cluster.json"

    def _write(self, known: dict[str, int]) -> None:
        """It outlives a loss of power when this returns."""
        path, new = self._path, self._path.with_suffix(".new")
        with new.open("w", encoding="ascii") as file:
            json.dump({self._told.resource: known}, file)
            file.flush()
            os.fchmod(file.fileno(), _MODE)
            os.fsync(file.fileno())
        new.rename(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _state_of(node: str) -> str:
    """The node's state folder."""
    content: dict[str, Any] = {}
    try:
        content = tomllib.loads(nodes.path_of(node).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        note(f"its state folder is taken for the usual one: {error}")
    state = content.get("state")
    if isinstance(state, str) and state:
        return state
    return os.path.join(os.environ.get(_STATE_VARIABLE) or _STATE, node)
