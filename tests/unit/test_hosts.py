# SPDX-License-Identifier: BSD-3-Clause
"""When a checkpoint was cut, as far as a primary that is dead by now has told."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from hosts import CLOCKS_S, Checkpoints
from qmp import Qmp
from waiting import DEADLINE_S, Stuck, begin


class Primary:
    """A control socket that tells of checkpoints."""

    def __init__(self, tmp_path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._path = tmp_path / "control.sock"
        self._listener.bind(str(self._path))
        self._listener.listen()
        self.connection: socket.socket

    def qmp(self) -> Qmp:
        accepted = begin(self._accept)
        client = Qmp(self._path)
        self.connection = accepted.result(DEADLINE_S)
        return client

    def _accept(self) -> socket.socket:
        connection = self._listener.accept()[0]
        connection.sendall(b'{"QMP": {}}\n')
        connection.recv(4096)
        connection.sendall(b'{"return": {}, "id": 1}\n')
        return connection

    def tell(self, epoch: int, ended: float, duration_s: float) -> None:
        """Checkpoint `epoch` was complete at `ended` (time.time())."""
        stamp = {"seconds": int(ended), "microseconds": int(ended % 1 * 1e6)}
        data = {"epoch": epoch, "duration": duration_s}
        event = {"event": "REPLICATION_CHECKPOINT", "timestamp": stamp, "data": data}
        self.connection.sendall(json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        self.connection.close()
        self._listener.close()


def test_a_checkpoint_was_not_cut_before_the_one_before_it_was_complete(tmp_path: Path) -> None:
    primary = Primary(tmp_path)
    checkpoints = Checkpoints(primary)  # type: ignore[arg-type]
    now = time.time()
    offset = time.monotonic() - now
    primary.tell(4, now - 30, 0.5)
    primary.tell(5, now - 20, 0.5)
    primary.tell(6, now - 19.9, 0.5)
    checkpoints.wait(6)
    assert checkpoints.last == 6
    assert checkpoints.not_before(4) - offset == pytest.approx(now - 30.5 - CLOCKS_S, abs=0.04)
    assert checkpoints.not_before(5) - offset == pytest.approx(now - 20.5 - CLOCKS_S, abs=0.04)
    assert checkpoints.not_before(6) - offset == pytest.approx(now - 20, abs=0.04)
    # It was taken, but the primary was killed before it told.
    assert checkpoints.not_before(7) - offset == pytest.approx(now - 19.9, abs=0.04)
    assert checkpoints.not_before(3) == 0.0
    with pytest.raises(Stuck, match=r"no checkpoint 7 .*\[4, 5, 6\]"):
        checkpoints.wait(7, 0.05)
    primary.close()
