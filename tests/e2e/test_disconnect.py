# SPDX-License-Identifier: BSD-3-Clause
"""The process ends on a signal and on `quit` although clients stay connected, and answers what is in flight. Whoever
asks for more has lost its connection, and gets no error: what reconnects, as QEMU does, notices nothing else."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

import nbd
import pytest

from lab import Lab
from pausepoints import PausePoints
from waiting import DEADLINE_S, wait_until

END_S = 20.0
"""On a busy machine. Without what is tested here nbdkit would wait for its clients for ever."""

BUSY = 8


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


class Busy:
    """A guest that writes one block after the other, and comes back as soon as it has lost its connection, until nobody
    is there any more."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.ends: Counter[str] = Counter()
        """How its connections have ended."""
        self.writing = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            handle = nbd.NBD()
            try:
                handle.connect_uri(self._uri)
            except nbd.Error:
                return
            try:
                while True:
                    handle.pwrite(b"\x55" * 512, 0)
                    self.writing.set()
            except nbd.Error as error:
                refused = handle.aio_is_ready()
                self.ends[f"refused: {error.errnum}" if refused else "lost"] += 1
                if refused:
                    return


@pytest.mark.parametrize("how", ["quit", signal.SIGTERM], ids=str)
@pytest.mark.parametrize("export", ["top0", "disk0"])
def test_no_request_is_refused_because_the_process_ends(lab: Lab, how: signal.Signals | str, export: str) -> None:
    """nbdkit answers with ESHUTDOWN what it reads when it has been told to end, and what it had just read when it sees
    the end of the stream: an I/O error, which a guest with `reconnect-delay` does not expect of a restart. With so many
    at it, one of them is always about to ask."""
    server = lab.secondary()
    server.start_replication()
    guests = [Busy(server.uri(export)) for _ in range(BUSY)]
    for guest in guests:
        assert guest.writing.wait(DEADLINE_S)
    if isinstance(how, str):
        server.execute(how)
    else:
        os.kill(server.pid, how)
    server.wait_ended()
    for guest in guests:
        guest.thread.join(DEADLINE_S)
        assert set(guest.ends) == {"lost"}
