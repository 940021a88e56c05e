# SPDX-License-Identifier: BSD-3-Clause
"""control/inband.py without NBD: what reads, writes and events give. tests/unit/test_peer.py has both ends."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from replication.control import inband
from replication.control.inband import INPUT_BYTES_MAX, INPUT_PIECES_MAX, WAIT_S, ControlExport
from replication.control.qmp import MESSAGE_BYTES_MAX, Answer
from replication.control.server import QUEUE_BYTES_MAX, QUEUE_MESSAGES_MAX
from replication.disk.face import Extent
from replication.errors import CommandError, DiskError
from replication.events import EventHub
from waiting import DEADLINE_S, wait_until

NEGOTIATE = b'{"execute": "qmp_capabilities", "id": 0}'


class Client:
    """A ControlExport with commands of the test's own, and a reader of its output."""

    def __init__(self) -> None:
        self.hub = EventHub()
        self.closed = 0
        self.ran: list[str] = []
        self.afters: list[str] = []
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.export = ControlExport(self._execute, self.hub, self._count)
        self.output = b""

    def _count(self) -> None:
        self.closed += 1

    def _execute(self, name: str, arguments: dict[str, Any]) -> Answer:
        self.ran.append(name)
        if name == "wait":
            self.begun.set()
            assert self.go_on.wait(DEADLINE_S)
        if name == "refuse":
            raise CommandError("No")
        if name == "event":
            self.hub.emit("TICK", **arguments)
        return Answer(arguments.get("value", {}), lambda: self.afters.append(name))

    def write(self, data: bytes) -> None:
        self.export.write(memoryview(data), 0, False)

    def command(self, name: str, **arguments: Any) -> None:
        self.write(json.dumps({"execute": name, "arguments": arguments}).encode())

    def read(self, length: int = 4096, offset: int = 0) -> bytes:
        buffer = bytearray(b"?" * length)
        self.export.read(memoryview(buffer), offset)
        return bytes(buffer)

    def message(self) -> dict[str, Any]:
        """The next message of the output."""

        def whole() -> bool:
            if b"\r\n" not in self.output:
                self.output += self.read(64 << 10)
            self.output = self.output.lstrip()
            return b"\r\n" in self.output

        wait_until(whole, "a message comes")
        line, _, self.output = self.output.partition(b"\r\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def negotiate(self) -> None:
        assert "QMP" in self.message()
        self.write(NEGOTIATE)
        assert self.message() == {"return": {}, "id": 0}


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    try:
        yield made
    finally:
        made.go_on.set()
        made.export.close()
        wait_until(lambda: not workers(), "no thread is left")


@pytest.fixture
def ready(client: Client) -> Client:
    client.negotiate()
    return client


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "control-inband"]


def refusal(call: Callable[[], object]) -> DiskError:
    with pytest.raises(DiskError) as refused:
        call()
    return refused.value


def test_the_greeting_comes_first_and_without_a_thread(client: Client) -> None:
    first = client.read()
    assert set(json.loads(first)) == {"QMP"}
    assert first.rstrip(b"\n").endswith(b"}\r")
    assert not workers()


def test_without_output_a_read_gives_newlines_after_a_while(client: Client) -> None:
    client.read()
    begun = time.monotonic()
    assert client.read(5) == b"\n" * 5
    assert WAIT_S <= time.monotonic() - begun < DEADLINE_S


def test_a_read_at_another_offset_does_not_wait(client: Client) -> None:
    assert client.read(7, 4096) == b'{"QMP":'
    client.read(4096, 1)
    begun = time.monotonic()
    for _ in range(100):
        assert client.read(3, 512) == b"\n\n\n"
    assert time.monotonic() - begun < 100 * WAIT_S / 2


def test_messages_cut_by_reads_and_writes_at_any_place_are_whole(ready: Client) -> None:
    message = json.dumps({"execute": "echo", "arguments": {"value": "v" * 50}}).encode()
    for start in range(0, len(message), 7):
        ready.export.write(memoryview(message[start : start + 7]), start * 1000, False)
    got = b""
    while not got.strip().endswith(b"}"):
        got += ready.read(9)
    assert json.loads(got) == {"return": "v" * 50}
    assert b"\n\n" not in got.strip()


def test_several_commands_in_one_write_are_answered_in_order(ready: Client) -> None:
    ready.write(b'{"execute": "a", "id": 1} {"execute": "refuse", "id": 2}\n{"execute": "b", "id": 3}')
    answers = [ready.message() for _ in range(3)]
    assert [answer["id"] for answer in answers] == [1, 2, 3]
    assert answers[1]["error"] == {"class": "GenericError", "desc": "No"}
    assert ready.ran == ["a", "refuse", "b"]


def test_nothing_is_executed_before_negotiation(client: Client) -> None:
    client.message()
    client.command("a")
    assert client.message()["error"]["class"] == "CommandNotFound"
    assert client.ran == []


def test_garbage_is_answered_and_white_space_counts_as_input(ready: Client) -> None:
    ready.write(b"garbage")
    ready.write(b"\n")
    assert "JSON parse error" in ready.message()["error"]["desc"]
    ready.command("a")
    assert ready.message() == {"return": {}}


def test_events_come_after_negotiation_and_before_the_answer_of_their_cause(client: Client) -> None:
    client.hub.emit("EARLY")
    client.negotiate()
    client.command("event", number=1)
    event = client.message()
    assert (event["event"], event["data"]) == ("TICK", {"number": 1})
    assert client.message() == {"return": {}}
    client.hub.emit("LATER")
    assert client.message()["event"] == "LATER"


def test_what_waits_until_after_the_answer_is_run_after_it(ready: Client) -> None:
    ready.command("a")
    assert ready.message() == {"return": {}}
    wait_until(lambda: ready.afters == ["a"], "the rest is done")


def test_a_read_that_waits_gets_the_answer_at_once(ready: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            begun = time.monotonic()
            reading = pool.submit(ready.message)
            ready.command("a")
            assert reading.result(DEADLINE_S) == {"return": {}}
            if time.monotonic() - begun < WAIT_S / 2:
                return
    raise AssertionError("each of 20 answers took as long as a read waits")


def test_white_space_ends_the_read_that_waits(ready: Client) -> None:
    for _ in range(20):
        ready.write(b"\n")
        begun = time.monotonic()
        assert ready.read(3) == b"\n\n\n"
        if time.monotonic() - begun < WAIT_S / 2:
            return
    raise AssertionError("each of 20 reads waited")


def test_a_command_at_work_holds_up_neither_reads_nor_writes(ready: Client) -> None:
    ready.command("wait")
    assert ready.begun.wait(DEADLINE_S)
    assert ready.read(2) == b"\n\n"
    ready.command("a")
    ready.go_on.set()
    assert [ready.message(), ready.message()] == [{"return": {}}, {"return": {}}]
    assert ready.ran == ["wait", "a"]


def test_input_beyond_the_pieces_that_may_wait_is_refused_and_may_be_sent_again(ready: Client) -> None:
    ready.command("wait")
    assert ready.begun.wait(DEADLINE_S)
    for number in range(INPUT_PIECES_MAX):
        ready.command("a", value=number)
    assert refusal(lambda: ready.command("b")).errno == errno.ENOMEM
    ready.go_on.set()
    assert ready.message() == {"return": {}}
    assert [ready.message()["return"] for _ in range(INPUT_PIECES_MAX)] == list(range(INPUT_PIECES_MAX))
    ready.command("b")
    assert ready.message() == {"return": {}}
    assert ready.ran[-2:] == ["a", "b"]


def test_input_beyond_the_bytes_that_may_wait_is_refused(ready: Client) -> None:
    ready.command("wait")
    assert ready.begun.wait(DEADLINE_S)
    spaces = b" " * MESSAGE_BYTES_MAX
    for _ in range(INPUT_BYTES_MAX // MESSAGE_BYTES_MAX):
        ready.write(spaces)
    assert refusal(lambda: ready.write(b" ")).errno == errno.ENOMEM


def test_a_client_that_does_not_read_its_events_is_ended(ready: Client) -> None:
    for number in range(QUEUE_MESSAGES_MAX):
        ready.hub.emit("TICK", number=number)
    ready.hub.emit("TICK", number=-1)
    for call in (ready.read, lambda: ready.command("a")):
        refused = refusal(call)
        assert (refused.errno, str(refused)) == (errno.ESHUTDOWN, "the control client does not read its events")
    assert ready.closed == 0
    ready.hub.emit("TICK")  # nobody minds
    ready.export.close()
    assert ready.closed == 1


def test_the_bytes_that_may_wait_to_be_read_are_bounded_and_counted(ready: Client) -> None:
    text = "t" * (1 << 20)
    for _ in range(3):
        for _ in range(QUEUE_BYTES_MAX // len(text) - 1):
            ready.hub.emit("TICK", text=text)
        for _ in range(QUEUE_BYTES_MAX // len(text) - 1):
            assert ready.message()["data"] == {"text": text}
    for _ in range(QUEUE_BYTES_MAX // len(text)):
        ready.hub.emit("TICK", text=text)
    assert str(refusal(ready.read)) == "the control client does not read its events"


def test_a_client_that_does_not_read_its_answers_is_ended(ready: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inband, "DRAIN_S", 0.05)
    ready.write(b'{"execute": "a"}' * (QUEUE_MESSAGES_MAX + 3))
    wait_until(lambda: not workers(), "its thread ends")
    assert str(refusal(ready.read)) == "the control client does not read its answers"
    assert len(ready.ran) == QUEUE_MESSAGES_MAX + 1
    assert len(ready.afters) == len(ready.ran), "what was promised is done, heard or not"


def test_an_answer_waits_for_room(ready: Client) -> None:
    ready.write(b'{"execute": "a"}' * (QUEUE_MESSAGES_MAX + 3))
    wait_until(lambda: len(ready.ran) > QUEUE_MESSAGES_MAX, "the output is full")
    assert [ready.message() for _ in range(QUEUE_MESSAGES_MAX + 3)] == [{"return": {}}] * (QUEUE_MESSAGES_MAX + 3)


def test_an_event_that_is_not_json_is_left_out(ready: Client, capsys: pytest.CaptureFixture[str]) -> None:
    ready.hub.emit("ODD", what=object())
    ready.hub.emit("EVEN")
    assert ready.message()["event"] == "EVEN"
    assert "event ODD is not JSON" in capsys.readouterr().err


def test_zeroes_are_refused_as_nbdkit_would_not_replace_by_writes(ready: Client) -> None:
    for may_trim in (False, True):
        assert refusal(lambda may_trim=may_trim: ready.export.zero(0, 512, may_trim, False)).errno == errno.EINVAL
    ready.export.flush()
    assert ready.export.extents(5, 7) == [Extent(5, 7, False, False)]


def test_close_wakes_a_read_and_ends_the_session_once(ready: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(ready.read)
        ready.export.close()
        error = reading.exception(DEADLINE_S)
    # The read may have been over before: then it gave newlines.
    assert error is None or (isinstance(error, DiskError) and error.errno == errno.ESHUTDOWN)
    ready.export.close()
    assert ready.closed == 1
    assert ready.hub._subscribers == []
    assert refusal(ready.read).errno == errno.ESHUTDOWN
    assert refusal(lambda: ready.command("a")).errno == errno.ESHUTDOWN
    assert ready.ran == []


def test_close_does_not_wait_for_the_command_at_work_nor_run_the_next(ready: Client) -> None:
    ready.write(b'{"execute": "wait"} {"execute": "a"}')
    ready.command("b")
    assert ready.begun.wait(DEADLINE_S)
    ready.export.close()
    assert ready.closed == 1
    ready.go_on.set()
    wait_until(lambda: not workers(), "the thread ends")
    assert ready.ran == ["wait"]
    assert ready.afters == ["wait"]


def test_a_session_closed_while_it_negotiates_stays_without_events(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe = client.hub.subscribe

    def closing_first(subscriber: Callable[[dict[str, Any]], None]) -> None:
        client.export.close()
        subscribe(subscriber)

    monkeypatch.setattr(client.hub, "subscribe", closing_first)
    client.write(NEGOTIATE)
    wait_until(lambda: client.closed == 1 and not workers(), "it is closed")
    assert client.hub._subscribers == []


def test_an_idle_session_has_no_thread_and_goes_on_with_the_next_command(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inband, "IDLE_S", 0.02)
    client.negotiate()
    for _ in range(3):
        wait_until(lambda: not workers(), "its thread ends")
        client.command("event")
        assert client.message()["event"] == "TICK", "it is still subscribed, once"
        assert client.message() == {"return": {}}
    assert len(client.hub._subscribers) == 1


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["none", "memory"])
def test_a_system_without_threads_refuses_the_command(
    ready: Client, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fresh = ControlExport(ready._execute, ready.hub, ready._count)

    def none_left(_: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        assert refusal(lambda: fresh.write(memoryview(NEGOTIATE), 0, False)).errno == errno.ENOMEM
    fresh.write(memoryview(NEGOTIATE), 0, False)
    fresh.close()


def test_a_defect_in_the_thread_ends_the_session_which_nobody_would_serve(
    ready: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = ControlExport(ready._execute, ready.hub, ready._count)

    def fail(_data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(fresh._session, "feed", fail)
    fresh.write(memoryview(NEGOTIATE), 0, False)
    wait_until(lambda: fresh._ended is not None, "the session has ended")
    assert "internal error, see the log" in str(refusal(lambda: fresh.read(memoryview(bytearray(512)), 0)))
