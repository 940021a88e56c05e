# SPDX-License-Identifier: BSD-3-Clause
"""How long a conversation with a node may take."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from replication.client.session import NotRunning, Session, Unreachable
from waiting import DEADLINE_S


def test_a_conversation_ends_at_its_end_however_long_a_step_may_take(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as node:
        node.bind(str(tmp_path / "control.sock"))
        node.listen()
        began = time.monotonic()
        with pytest.raises(Unreachable):
            Session(str(tmp_path / "control.sock"), 100 * DEADLINE_S, began)
        assert time.monotonic() - began < DEADLINE_S


def test_that_nobody_listens_is_known_however_late_it_is(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        Session(str(tmp_path / "control.sock"), DEADLINE_S, time.monotonic() - 1)
