# SPDX-License-Identifier: BSD-3-Clause
"""What a check of `replctl doctor` has found, and what it looks at."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from replication.client.qmp import Refused
from replication.client.session import Session, Unusable
from replication.disk.connection import Connection
from replication.record.twin import TwinFile
from replication.service import config
from replication.uri import is_uri

CONNECT_S = 4.0
"""For a connection to a node, or to an NBD server, each."""


class Result(Enum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not as one may think; or it will stop working."""
    BAD = "bad"
    """It does not work."""


@dataclass(frozen=True)
class Finding:
    """One fact."""

    result: Result
    text: str
    advice: str | None = None
    """What to do."""


def ok(text: str) -> Finding:
    """All is well."""
    return Finding(Result.OK, text)


def warning(text: str, advice: str) -> Finding:
    """Something to know."""
    return Finding(Result.WARNING, text, advice)


def bad(text: str, advice: str) -> Finding:
    """Something to mend."""
    return Finding(Result.BAD, text, advice)


class Subject:
    """The node that is looked at. What several checks need is asked for once; nothing is changed."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def config(self) -> config.ServiceConfig:
        """ConfigError if the file cannot be used."""
        return config.load(self.name)

    @cached_property
    def status(self) -> dict[str, Any] | None:
        """query-replication; None if nobody answers."""
        try:
            with Session(self.config.control, CONNECT_S) as session:
                answer: dict[str, Any] = session.call("query-replication")
                return answer
        except (Unusable, Refused):
            return None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each disk of this node by its name; without those that cannot be seen."""
        found = {}
        for disk in self.config.options.disks:
            size = None if disk.location is None else self._size(disk.location)
            if size is not None:
                found[disk.name] = size
        return found

    @cached_property
    def remembered(self) -> dict[str, int]:
        """Bytes of each disk by its name as the state folder has them; nothing where it has none, or cannot be read."""
        file = TwinFile(os.path.join(self.config.state, "state.json"))
        try:
            disks = (file.read() or {}).get("disks")
        except (OSError, ValueError, TypeError, RecursionError):
            return {}
        finally:
            file.close()
        return disks if isinstance(disks, dict) else {}

    def _size(self, location: str) -> int | None:
        if not is_uri(location):
            try:
                return size_of(location)
            except OSError:
                return None
        connection = Connection(location, None, CONNECT_S, self.config.options.tls)
        try:
            return int(connection.size)
        finally:
            connection.close()


Look = Callable[[Subject], Iterator[Finding]]


@dataclass(frozen=True)
class Check:
    """One question. A check that ends with nothing to say was not about this node."""

    name: str
    look: Look
    deadline_s: float = 6.0


def size_of(path: str) -> int:
    """Bytes of a file or a block device; OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise OSError(22, "neither a file nor a block device")
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def existing(path: str) -> str:
    """The path, or the nearest folder above it that is there."""
    while not os.path.exists(path):
        path = os.path.dirname(path) or "/"
    return path
