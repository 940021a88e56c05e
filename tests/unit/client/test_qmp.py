# SPDX-License-Identifier: BSD-3-Clause
"""The QMP client, with a socket in place of a server."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jsonend import JsonEnd
from replication.client.lines import LINE_BYTES_MAX, Gone, Late, Lines, Nonsense, Step
from replication.client.qmp import Malformed, Qmp, Refused, Unwelcome
from waiting import DEADLINE_S, begin

SOON_S = 0.25
"""Long enough for a command to be sent on a busy machine before nobody waits for its answer any more."""


def in_s(seconds: float) -> float:
    return time.monotonic() + seconds


Ends = tuple[Callable[..., Qmp], JsonEnd]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, its = socket.socketpair()
    server = JsonEnd(its)
    yield lambda **options: Qmp(Lines(ours, 0), **options), server
    ours.close()
    server.close()


@pytest.mark.parametrize(
    ("greeting", "error"),
    [({"error": {"desc": "too many"}}, Unwelcome), ({"hello": 1}, Nonsense), ([], Nonsense), ({"error": 5}, Nonsense)],
)
def test_what_greets_otherwise_is_no_server(ends: Ends, greeting: Any, error: type[Exception]) -> None:
    make, server = ends
    server.tell(greeting)
    with pytest.raises(error):
        make().greet(in_s(DEADLINE_S))


def test_an_answer_to_a_command_that_was_given_up_is_not_taken_for_another_ones(ends: Ends) -> None:
    make, server = ends
    qmp = make()
    for _ in range(2):  # the second time nothing is sent
        with pytest.raises(Late):
            qmp.execute("stop", None, in_s(SOON_S))
    asked = begin(qmp.execute, "query-status", {"a": 1}, in_s(DEADLINE_S))
    assert server.answer({"late": True}) == "stop"
    request = server.asked()
    assert (request["execute"], request["arguments"]) == ("query-status", {"a": 1})
    server.tell({"return": {"running": True}, "id": request["id"]})
    assert asked.result(DEADLINE_S) == {"running": True}


def test_an_answer_to_a_command_that_was_given_up_can_be_waited_for(ends: Ends) -> None:
    make, server = ends
    qmp = make()
    assert qmp.overdue(in_s(0)) is None
    for answer in ({"return": 5}, {"error": {"desc": "no"}}):
        with pytest.raises(Late):
            qmp.execute("stop", None, in_s(SOON_S))
        with pytest.raises(Late):
            qmp.overdue(in_s(0))
        asked = begin(qmp.overdue, in_s(DEADLINE_S))
        server.tell(answer | {"id": server.asked()["id"]})
        if "error" in answer:
            with pytest.raises(Refused, match="no"):
                asked.result(DEADLINE_S)
        else:
            assert asked.result(DEADLINE_S) == 5
        assert qmp.overdue(in_s(0)) is None


def test_an_answer_to_a_command_at_whose_sending_the_program_was_interrupted_can_be_waited_for(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, server = ends
    qmp = make()
    send = Lines.send

    def interrupted(lines: Lines, message: Mapping[str, Any], deadline: float) -> None:
        send(lines, message, deadline)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qmp.execute("stop", None, in_s(DEADLINE_S))
    server.tell({"return": 5, "id": server.asked()["id"]})
    assert qmp.overdue(in_s(DEADLINE_S)) == 5


def test_refusals_and_answers_of_a_server_that_knows_no_ids(ends: Ends) -> None:
    make, server = ends
    qmp = make()
    server.tell({"error": {"class": "CommandNotFound", "desc": "no such command"}})
    with pytest.raises(Refused, match="no such command") as refused:
        qmp.execute("x", None, in_s(DEADLINE_S))
    assert refused.value.error_class == "CommandNotFound"
    server.tell({"return": 5})
    assert qmp.execute("x", None, in_s(DEADLINE_S)) == 5
    server.tell({"what": 5})
    with pytest.raises(Malformed):
        qmp.execute("x", None, in_s(DEADLINE_S))


def test_events_are_kept_in_order_and_the_last_of_them_only(ends: Ends) -> None:
    make, server = ends
    qmp = make(events_max=3)
    for number in range(5):
        server.tell({"event": "E", "data": {"number": number}})
    server.tell({"return": {}})
    qmp.execute("x", None, in_s(DEADLINE_S))
    assert [event["data"]["number"] for event in qmp.events] == [2, 3, 4]
    asked = begin(qmp.wait_event, "E", in_s(DEADLINE_S), lambda data: data["number"] == 5)
    server.tell({"event": "E", "data": {"number": 5}})
    assert asked.result(DEADLINE_S)["data"] == {"number": 5}
    assert [qmp.next_event(None)["data"]["number"] for _ in range(2)] == [3, 4]
    with pytest.raises(Late):
        qmp.next_event(in_s(SOON_S))


def test_an_end_is_noticed_at_once_and_every_time(ends: Ends) -> None:
    make, server = ends
    qmp = make()
    server.close()
    for _ in range(2):
        with pytest.raises(Gone):
            qmp.execute("x", None, in_s(DEADLINE_S))


def test_a_server_that_takes_nothing_is_late_and_the_half_of_a_command_is_the_last(ends: Ends) -> None:
    make, _ = ends
    qmp = make()
    with pytest.raises(Late) as late:
        qmp.execute("x", {"much": "x" * (8 << 20)}, in_s(SOON_S))
    assert late.value.step is Step.SEND
    with pytest.raises(Gone):
        qmp.execute("x", None, in_s(DEADLINE_S))


def test_a_line_without_an_end_does_not_fill_the_memory(ends: Ends) -> None:
    make, server = ends
    qmp = make()
    piece = b"{" + b" " * ((1 << 20) - 1)
    sent = begin(lambda: [server.connection.sendall(piece) for _ in range((LINE_BYTES_MAX >> 20) + 1)])
    with pytest.raises(Nonsense):
        qmp.receive(in_s(DEADLINE_S))
    qmp.close()
    sent.exception(DEADLINE_S)  # or none: it may have been through with it


def test_a_server_whose_backlog_is_full_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        first = Lines(path, in_s(DEADLINE_S))
        with pytest.raises(Late) as late:
            Lines(path, in_s(SOON_S))
        assert late.value.step is Step.CONNECT
        second = begin(Lines, path, in_s(DEADLINE_S))
        for _ in range(2):
            listener.accept()[0].close()
        second.result(DEADLINE_S).close()
        first.close()


def test_why_nobody_is_there(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / ("x" * 200), "AF_UNIX path too long"),
    ):
        with pytest.raises(Gone) as gone:
            Lines(path, in_s(DEADLINE_S))
        assert (gone.value.step, gone.value.reason) == (Step.CONNECT, reason)
