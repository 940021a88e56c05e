# SPDX-License-Identifier: BSD-3-Clause
"""Which promotions a node knows of, as its host keeps them, over restarts and a loss of the cluster's configuration.

Each promotion has an id, and notes the ids of those that it knew of. The register has both, too, but the cluster may
lose an entry: of two parts of a cluster that was cut in two one part's configuration survives. A node whose own
promotion the register does not know of knows by this that the register cannot judge it. (The serial number is one more
than any that is known of. It is for a person: two parts that cannot see each other count from the same number.)

The file is in a folder of root's own: the node's process, which speaks to the network, has no access to it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from .codes import note
from .told import Told

# The same as in service/config.py.
_STATE, _STATE_VARIABLE = "/var/lib/nbdkit-replication", "NBDKIT_REPLICATION_STATE_DIR"
_BYTES_MAX = 16384
_SERIAL_MAX = 1 << 62
_PAST_MAX = 32
"""Promotions that are remembered. One that was forgotten is unknown, and a person decides."""
_ID = re.compile(r"[0-9a-f]{16}\Z")


@dataclass(frozen=True)
class Known:
    """What one node knows, or the register."""

    serial: int = 0
    """The number of its last promotion; 0: never, or by an agent that had none."""
    id: str = ""
    """Its id, with the same meaning of ""."""
    past: tuple[str, ...] = ()
    """The ids of those that it knew of, newest first."""
    seen: int = 0
    """The highest number that was in the register."""

    def knows(self, promotion: str) -> bool:
        """Whether that one is or was before its own."""
        return bool(promotion) and (promotion == self.id or promotion in self.past)

    def next(self, register: Known) -> Known:
        """A promotion now, of this node, which has seen the register."""
        serial = 1 + max(self.serial, self.seen, register.serial)
        past = dict.fromkeys(filter(None, (self.id, register.id, *register.past, *self.past)))
        return Known(min(serial, _SERIAL_MAX), secrets.token_hex(8), tuple(past)[:_PAST_MAX])


def read_known(found: dict[str, object]) -> Known:
    """ValueError for what no agent has written."""
    serial, own, past, seen = (found.get(name) for name in ("serial", "id", "past", "seen"))
    for number in (serial, seen):
        if number is not None and not (type(number) is int and 0 <= number <= _SERIAL_MAX):
            raise ValueError("a serial number cannot be read")
    ids = [own or "", *(past if isinstance(past, list) else [])]
    if not all(isinstance(each, str) and (_ID.match(each) or not each) for each in ids) or len(ids) > _PAST_MAX + 1:
        raise ValueError("the id of a promotion cannot be read")
    return Known(int(str(serial or 0)), str(ids[0]), tuple(map(str, ids[1:])), int(str(seen or 0)))


def to_json(known: Known) -> dict[str, object]:
    """What `read_known` reads; empty if nothing is known."""
    found: dict[str, object] = {"serial": known.serial, "id": known.id, "past": list(known.past), "seen": known.seen}
    return {name: value for name, value in found.items() if value}


class Serials:
    """Of one node and one resource."""

    def __init__(self, told: Told) -> None:
        self._told = told
        folder = f"{os.environ.get(_STATE_VARIABLE) or _STATE}-cluster"
        self._path = Path(folder) / f"{told.node}.json"

    def read(self) -> Known | None:
        """What is known; None, which is logged, if that cannot be told."""
        try:
            found = self._load().get(self._told.resource, {})
            if not isinstance(found, dict):
                raise ValueError("it is not what the agent has written")
            return read_known(found)
        except FileNotFoundError:
            return Known()
        except (OSError, ValueError, RecursionError) as error:
            note(f"{self._path} cannot be read: {error}")
            return None

    def write(self, known: Known) -> None:
        """It outlives a loss of power when this returns. A failure is logged only: by it the node loses its say against
        a register that does not know of it, and no more."""
        try:
            self._path.parent.mkdir(mode=0o755, exist_ok=True)
            try:
                content = self._load()
            except (OSError, ValueError, RecursionError):
                content = {}
            self._replace(json.dumps({**content, self._told.resource: to_json(known)}))
        except OSError as error:
            note(f"{self._path} cannot be written: {error}")

    def saw(self, serial: int) -> None:
        """The register has that number."""
        known = self.read()
        if known is not None and serial > max(known.serial, known.seen):
            self.write(Known(known.serial, known.id, known.past, serial))

    def _load(self) -> dict[str, object]:
        file = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ValueError("it is no file")
            found = json.loads(os.read(file, _BYTES_MAX))
        finally:
            os.close(file)
        if not isinstance(found, dict):
            raise ValueError("it is not what the agent has written")
        return found

    def _replace(self, text: str) -> None:
        new = self._path.with_suffix(".new")
        new.unlink(missing_ok=True)
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with open(file, "w", encoding="ascii", closefd=False) as stream:
                stream.write(text)
            os.fsync(file)
        finally:
            os.close(file)
        new.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
