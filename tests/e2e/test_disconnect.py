# SPDX-License-Identifier: BSD-3-Clause
"""The process ends on a signal and on `quit` although clients stay connected, and answers what is in flight."""

from __future__ import annotations

import os
import signal
import threading

import nbd
import pytest

from lab import Lab
from pausepoints import PausePoints
from waiting import wait_until

END_S = 5.0


def connect(uri: str) -> nbd.NBD:
    """A handle that the laboratory knows nothing of, so that it stays connected."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, "quit"], ids=str)
def test_ends_although_clients_are_idle(lab: Lab, how: signal.Signals | str) -> None:
    server = lab.secondary()
    handles = [connect(server.uri(export)) for export in ("disk0", "top0")]
    if isinstance(how, str):
        server.execute(how)
    else:
        os.kill(server.pid, how)
    server.wait_ended(END_S)
    for handle in handles:
        with pytest.raises(nbd.Error):
            handle.pread(512, 0)


def test_answers_the_request_in_flight_before_it_ends(lab: Lab) -> None:
    """
    client: pwrite ----------- held at the pause point ------------- answered
    test:              SIGTERM                          release
    """
    pauses = PausePoints(lab.folder / "pauses")
    server = lab.secondary(extra_environment=pauses.environment)
    server.start_replication()
    handle = connect(server.uri("disk0"))
    pauses.arm("target-write.preserved")
    answered = threading.Event()

    def write() -> None:
        handle.pwrite(b"\x55" * 4096, 4096)
        answered.set()

    writer = threading.Thread(target=write)
    writer.start()
    pauses.wait_hit("target-write.preserved")
    idle = connect(server.uri("top0"))
    os.kill(server.pid, signal.SIGTERM)

    def sent_away() -> bool:
        try:
            idle.pread(512, 0)
        except nbd.Error:
            return True
        return False

    wait_until(sent_away, "an idle client is sent away")
    assert not answered.is_set()
    pauses.release("target-write.preserved")
    writer.join(END_S)
    assert answered.is_set()
    server.wait_ended(END_S)
    assert server.disks[0].read_bytes()[4096:8192] == b"\x55" * 4096
