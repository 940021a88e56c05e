# SPDX-License-Identifier: BSD-3-Clause
"""A primary of which a test decides every word: what a secondary makes of one that is silent, late or lies."""

from __future__ import annotations

import json
import time
from typing import Any

import nbd
import pytest

from content import KIB
from nodes import Server
from qmp import QmpError
from replication.options import CONTROL_EXPORT, DATA_EXPORT
from replication.record.lineage import Lineage
from waiting import DEADLINE_S


class FakePrimary:
    """Says over the control export of a secondary what it is told to."""

    def __init__(self, server: Server, node: str, size: int) -> None:
        """The disk has `size` bytes."""
        self._handle = server.connect(CONTROL_EXPORT)
        self._server = server
        self._size = size
        self._node = node
        self._buffer = b""
        self._serial = 0
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: object) -> Any:
        """What the secondary returns; QmpError when it refuses."""
        self._serial += 1
        message = {"execute": command, "arguments": arguments, "id": self._serial}
        self._handle.pwrite(json.dumps(message).encode() + b"\n", 0)
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            self._buffer += bytes(self._handle.pread(16 * KIB, 0))
            *lines, self._buffer = self._buffer.split(b"\n")
            for answer in (json.loads(line) for line in lines if line):
                if answer.get("id") == self._serial:
                    if "error" in answer:
                        raise QmpError(answer["error"]["desc"], answer["error"]["class"])
                    return answer["return"]
        raise AssertionError(f"no answer to {command}")

    def pair(self, timeout_s: float = 60.0, **more: object) -> str:
        """Begin a session; its token. `more` instead of what a new primary says."""
        told = {
            "node": self._node,
            "lineage": Lineage().to_json(),
            "disks": {"disk0": self._size},
            "epoch": 0,
            "timeout": timeout_s,
        }
        return str(self.call("replication-pair", **{**told, **more})["token"])

    def refused_pair(self) -> str:
        """Why a session is refused."""
        with pytest.raises(QmpError) as caught:
            self.pair()
        return caught.value.desc

    def data(self, token: str) -> nbd.NBD:
        """A connection for data."""
        return self._server.connect(f"{DATA_EXPORT}:{token}:disk0")

    def close(self) -> None:
        """The connection ends."""
        self._handle.shutdown()
