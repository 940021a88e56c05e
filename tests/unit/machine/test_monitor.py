# SPDX-License-Identifier: BSD-3-Clause
"""QMP with deadlines, with a socket in place of QEMU."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jsonend import JsonEnd
from replication.machine.monitor import Gone, Late, Monitor, Refused, stamp_s
from waiting import DEADLINE_S, begin

SOON_S = 0.25
"""Long enough for a command to be sent on a busy machine before nobody waits for its answer any more."""


class Qemu(JsonEnd):
    """The other end."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.accept()[0])
        self.tell({"QMP": {}})
        self.answer({})


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Monitor, Qemu]]:
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        accepted = begin(Qemu, listener)
        monitor = Monitor(path, "QEMU", DEADLINE_S)
        qemu = accepted.result(DEADLINE_S)
        yield monitor, qemu
        monitor.close()
        qemu.close()


def test_an_answer_that_comes_too_late_is_not_taken_for_another_ones(ends: tuple[Monitor, Qemu]) -> None:
    monitor, qemu = ends
    with pytest.raises(Late, match="QEMU does not answer to stop"):
        monitor.execute("stop", timeout_s=SOON_S)
    asked = begin(monitor.execute, "query-status")
    assert qemu.answer({"late": True}) == "stop"
    assert qemu.answer({"running": True}) == "query-status"
    assert asked.result(DEADLINE_S) == {"running": True}


def test_a_monitor_that_hangs_is_sent_no_further_commands(ends: tuple[Monitor, Qemu]) -> None:
    monitor, qemu = ends
    for _ in range(3):
        with pytest.raises(Late):
            monitor.execute("query-status", timeout_s=SOON_S)
    asked = begin(monitor.execute, "cont")
    assert [qemu.answer({}), qemu.answer({})] == ["query-status", "cont"]
    assert asked.result(DEADLINE_S) == {}


def test_events_are_kept_until_somebody_waits_for_them(ends: tuple[Monitor, Qemu]) -> None:
    monitor, qemu = ends
    for status in ("setup", "active"):
        qemu.tell({"event": "MIGRATION", "data": {"status": status}, "timestamp": {"seconds": 7, "microseconds": 5}})
    asked = begin(monitor.execute, "cont")
    qemu.answer({})
    asked.result(DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    found = monitor.wait_event("MIGRATION", deadline, lambda data: data["status"] == "active")
    assert stamp_s(found) == pytest.approx(7.000005)
    monitor.forget_events()
    with pytest.raises(Late, match="tells nothing of MIGRATION"):
        monitor.wait_event("MIGRATION", time.monotonic() + SOON_S)


def test_a_refusal_is_told_with_the_command(ends: tuple[Monitor, Qemu]) -> None:
    monitor, qemu = ends
    asked = begin(monitor.execute, "cont")
    qemu.tell({"error": {"class": "GenericError", "desc": "not now"}, "id": qemu.asked()["id"]})
    with pytest.raises(Refused, match="QEMU refuses cont: not now"):
        asked.result(DEADLINE_S)


def test_a_monitor_that_has_gone_is_noticed_at_once(ends: tuple[Monitor, Qemu]) -> None:
    monitor, qemu = ends
    qemu.close()
    for _ in range(2):
        with pytest.raises(Gone):
            monitor.execute("cont")


def test_a_socket_on_which_nobody_listens_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(Gone, match=f"cannot connect to QEMU on {tmp_path / 'none'}: No such file"):
        Monitor(tmp_path / "none", "QEMU", DEADLINE_S)


@pytest.mark.parametrize(
    ("said", "error", "text"),
    [
        (b"SSH-2.0\n", Gone, "QEMU talks nonsense: b'SSH-2.0'"),
        (b"NBDMAGICIHAVEOPT\0\3", Gone, "QEMU talks nonsense"),
        (b'{"error": {"class": "GenericError", "desc": "Too many clients"}}\n', Gone, "Too many clients"),
        (b"", Late, "QEMU does not answer"),
    ],
    ids=["text", "no line", "refusal", "nothing"],
)
def test_something_else_than_qmp_is_an_error(tmp_path: Path, said: bytes, error: type[Exception], text: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        made = begin(Monitor, tmp_path / "qmp", "QEMU", DEADLINE_S if said else SOON_S)
        connection = listener.accept()[0]
        connection.sendall(said)
        with connection, pytest.raises(error, match=text):
            made.result(DEADLINE_S)
