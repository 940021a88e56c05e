# SPDX-License-Identifier: BSD-3-Clause
"""The two faces of a real secondary as NBD clients see them, in the model's words."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from typing import Any

import nbd

from model.model import CommandRefused, Face, Refused
from nodes import disk_name, top_id
from qmp import QmpError


class NbdFaces:
    """Requests by libnbd on connections that are made when first needed; `connect(export)` makes one."""

    def __init__(self, connect: Callable[[str], nbd.NBD]) -> None:
        self._connect = connect
        self._handles: dict[tuple[Face, int], nbd.NBD] = {}

    def handle(self, face: Face, disk: int) -> nbd.NBD:
        """The connection to one face of disk number `disk`."""
        key = face, disk
        if key not in self._handles:
            self._handles[key] = self._connect(disk_name(disk) if face is Face.TARGET else top_id(disk))
        return self._handles[key]

    def forget(self) -> None:
        """The server has gone, and the connections with it."""
        self._handles.clear()

    def read(self, face: Face, disk: int, offset: int, length: int) -> bytes:
        """Read; raises Refused."""
        return bytes(_answered(lambda: self.handle(face, disk).pread(length, offset)))

    def write(self, face: Face, disk: int, offset: int, data: bytes, fua: bool = False) -> None:
        """Write; raises Refused."""
        _answered(lambda: self.handle(face, disk).pwrite(data, offset, _flags(fua)))

    def zero(self, face: Face, disk: int, offset: int, length: int, fua: bool = False) -> None:
        """Write zeros; raises Refused."""
        _answered(lambda: self.handle(face, disk).zero(length, offset, _flags(fua)))

    def trim(self, face: Face, disk: int, offset: int, length: int, fua: bool = False) -> None:
        """Trim; raises Refused."""
        _answered(lambda: self.handle(face, disk).trim(length, offset, _flags(fua)))

    def flush(self, face: Face, disk: int) -> None:
        """Flush; raises Refused."""
        _answered(lambda: self.handle(face, disk).flush())


class RealSecondary(NbdFaces):
    """And the commands of both by QMP, in QEMU's words."""

    def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Run a QMP command; raises QmpError."""
        raise NotImplementedError

    def command(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; raises CommandRefused."""
        try:
            return self.execute(command, arguments)
        except QmpError as error:
            raise CommandRefused(error.desc) from error

    def start(self) -> None:
        """Start replication."""
        self.command("xen-set-replication", enable=True, primary=False)

    def checkpoint(self) -> None:
        """Take a checkpoint."""
        self.command("xen-colo-do-checkpoint")

    def stop(self) -> None:
        """Planned stop."""
        self.command("xen-set-replication", enable=False, primary=False, failover=False)

    def get_error(self) -> str | None:
        """The error that get-error reports."""
        status = self.command("query-xen-replication-status")
        return status["desc"] if status["error"] else None


def _flags(fua: bool) -> int:
    return nbd.CMD_FLAG_FUA if fua else 0


def _answered(request: Callable[[], bytes | None]) -> bytes:
    """The request's result; an errno that the server answered with becomes Refused, all else is raised as it is."""
    try:
        return request() or b""
    except nbd.Error as error:
        # libnbd words a server's refusal "command failed: STRERROR", and a lost connection as if the server had
        # answered ENOTCONN, which is no errno of the NBD protocol; its own refusals read otherwise.
        answered = f"command failed: {os.strerror(error.errnum)}" in error.string
        if answered and error.errnum != errno.ENOTCONN:
            raise Refused(error.errnum) from error
        raise
