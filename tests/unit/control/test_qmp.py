# SPDX-License-Identifier: BSD-3-Clause
"""QMP: first the protocol alone, bytes in and bytes out, then on the Unix socket with real clients."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replication import VERSION
from replication.control import qmp, server
from replication.control.qmp import Answer, Session
from replication.control.server import ControlServer
from replication.errors import CommandError, ConfigError
from replication.events import EventHub

CAPABILITIES = b'{"execute": "qmp_capabilities"}'
NOTHING = {"return": {}}


def echo(name: str, arguments: dict[str, Any]) -> Answer:
    """Commands that show what arrived, and fail in each way a command can."""
    if name == "echo":
        return Answer(arguments)
    if name == "refuse":
        raise CommandError("Job not found", "DeviceNotActive")
    if name == "crash":
        raise RuntimeError("first line\nsecond line")
    if name == "unserializable":
        return Answer({"value": object()})
    raise CommandError(f"The command {name} has not been found", "CommandNotFound")


def answers(session: Session, data: bytes) -> list[Any]:
    return [json.loads(line) for line in session.feed(data)]


def failure(desc: str, error_class: str = "GenericError", **identity: Any) -> dict[str, Any]:
    return {"error": {"class": error_class, "desc": desc}} | identity


@pytest.fixture
def session() -> Session:
    ready = Session(echo)
    assert answers(ready, CAPABILITIES) == [NOTHING]
    return ready


def test_greeting_is_qemus() -> None:
    greeting = json.loads(Session(echo).greeting())
    assert greeting == {
        "QMP": {
            "version": {
                "qemu": {"major": 7, "minor": 2, "micro": 0},
                "package": f"nbdkit-replication {VERSION}",
            },
            "capabilities": [],
        }
    }


def test_every_message_ends_with_crlf(session: Session) -> None:
    assert session.greeting().endswith(b"}\r\n")
    assert list(session.feed(b'{"execute": "echo"}')) == [b'{"return": {}}\r\n']


def test_negotiation() -> None:
    session = Session(echo)
    assert not session.negotiated
    assert answers(session, b'{"execute": "echo", "id": 1}') == [
        failure("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound", id=1)
    ]
    assert not session.negotiated
    assert answers(session, CAPABILITIES) == [NOTHING]
    assert session.negotiated
    assert answers(session, CAPABILITIES) == [
        failure("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
    ]
    assert answers(session, b'{"execute": "echo"}') == [NOTHING]


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ('{"enable": ["oob"]}', "Capability oob not available"),
        ('{"enable": ["zz"]}', "Parameter 'enable[0]' does not accept value 'zz'"),
        ('{"enable": [1]}', "Invalid parameter type for 'enable[0]', expected: string"),
        ('{"enable": 1}', "Invalid parameter type for 'enable', expected: array"),
        ('{"foo": 1}', "Parameter 'foo' is unexpected"),
    ],
)
def test_refused_negotiation_can_be_repeated(arguments: str, desc: str) -> None:
    session = Session(echo)
    message = f'{{"execute": "qmp_capabilities", "arguments": {arguments}}}'.encode()
    assert answers(session, message) == [failure(desc)]
    assert not session.negotiated
    assert answers(session, b'{"execute": "qmp_capabilities", "arguments": {"enable": []}}') == [NOTHING]


@pytest.mark.parametrize(
    ("message", "desc", "identity"),
    [
        ("[1]", "QMP input must be a JSON object", {}),
        ("12\n", "QMP input must be a JSON object", {}),
        ('"abc"\n', "QMP input must be a JSON object", {}),
        ("null\r\n", "QMP input must be a JSON object", {}),
        ("{}", "QMP input lacks member 'execute'", {}),
        ('{"id": 3}', "QMP input lacks member 'execute'", {"id": 3}),
        ('{"execute": 1, "id": 3}', "QMP input member 'execute' must be a string", {"id": 3}),
        ('{"execute": "echo", "foo": 1, "id": 4}', "QMP input member 'foo' is unexpected", {"id": 4}),
        ('{"exec-oob": "echo", "id": 4}', "QMP input member 'exec-oob' is unexpected", {"id": 4}),
        (
            '{"execute": "echo", "arguments": [], "id": 5}',
            "QMP input member 'arguments' must be an object",
            {"id": 5},
        ),
        ('{"execute": "echo", "arguments": null}', "QMP input member 'arguments' must be an object", {}),
    ],
)
def test_what_is_no_command(session: Session, message: str, desc: str, identity: dict[str, Any]) -> None:
    assert answers(session, message.encode()) == [failure(desc, **identity)]
    assert answers(session, b'\n{"execute": "echo"}') == [NOTHING]


@pytest.mark.parametrize(
    ("message", "detail"),
    [
        (b"}", "expecting value"),
        (b"@", "expecting value"),
        (b'{"execute" "echo"}', "expecting ':' delimiter"),
        (b'{"execute": "echo",}', " at character 1"),
        (b'{"execute": bogus}', "expecting value"),
        (b"{1: 2}", "expecting property name"),
        (b"[1 2]", "expecting ',' delimiter"),
        (b'{"execute": "echo"]', "unexpected ']'"),
        (b'{"execute": "echo', "control character in string"),
        (b'{"execute": "a\tb"}', "control character in string"),
        (b'{"execute": "a\\qb"}', "invalid \\escape"),
        (b'{"execute": "a\\', "invalid escape sequence"),
        (b'{"execute": NaN}', "invalid keyword 'NaN'"),
        (b'{"execute": -Infinity}', "invalid keyword '-Infinity'"),
        (b'{"id": 1e999}', "number out of range"),
        (b'{"id": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"id": 01}', "expecting ',' delimiter"),
        (b'{"execute": "echo", "execute": "echo"}', "duplicate key"),
        (b'{"arguments": {"a": 1, "a": 1}}', "duplicate key"),
        (b'{"execute": "\xff"}', "invalid UTF-8"),
        (b'{"execute": "\x80"}', "invalid UTF-8 at byte 13"),
        (b'{"execute": "\xed\xa0\x80"}', "invalid UTF-8 at byte 13"),
        (b'\xff{"execute": "echo"}', "invalid UTF-8"),
        (b'{"id": "\\ud83d"}', "\\ud83d is not a valid Unicode character"),
        (b'{"\\udc00": 1}', "\\udc00 is not a valid Unicode character"),
        (b'\xef\xbb\xbf{"execute": "echo"}', "unexpected UTF-8 BOM"),
        (b"{'execute': 'echo'}", "expecting property name"),
    ],
)
def test_bad_json_gets_one_error_and_the_session_goes_on(session: Session, message: bytes, detail: str) -> None:
    first, second = answers(session, message + b'\n{"execute": "echo", "id": 2}')
    assert first["error"]["class"] == "GenericError"
    assert first["error"]["desc"].startswith("JSON parse error, ") or "not a valid Unicode" in first["error"]["desc"]
    assert detail in first["error"]["desc"]
    assert set(first) == {"error"}
    assert second == {"return": {}, "id": 2}


@pytest.mark.parametrize(
    "identity",
    [0, -5, 1.5, True, None, "", "é\u00e9 \U0001f600", "a\0b", [1, {"a": None}], {"x": []}, 2**64 - 1, -(2**63)],
    ids=repr,
)
def test_any_id_is_echoed(session: Session, identity: Any) -> None:
    for command, member in (("echo", "return"), ("refuse", "error"), ("crash", "error"), ("foo", "error")):
        for ascii_only in (True, False):
            message = json.dumps({"execute": command, "id": identity}, ensure_ascii=ascii_only)
            (answer,) = answers(session, message.encode())
            assert set(answer) == {member, "id"}
            assert answer["id"] == identity
            assert type(answer["id"]) is type(identity)


def test_integers_beyond_64_bits_become_floating_point_as_in_qemu(session: Session) -> None:
    (answer,) = answers(session, b'{"execute": "echo", "arguments": {"n": 99999999999999999999}}')
    assert answer["return"] == {"n": 1e20}


def test_stream_not_lines(session: Session) -> None:
    stream = (
        b'{"execute":"echo","id":1}{"execute":"echo","id":2} \t[1]{"execute":\r\n\r\n"echo",\n"id"\n:3}\r\n'
        b'{"execute":"echo","id":"}{\\"]\\\\"}'
    )
    assert answers(session, stream) == [
        {"return": {}, "id": 1},
        {"return": {}, "id": 2},
        failure("QMP input must be a JSON object"),
        {"return": {}, "id": 3},
        {"return": {}, "id": '}{"]\\'},
    ]


def test_errors_of_commands(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert answers(session, b'{"execute": "refuse", "id": 1}') == [failure("Job not found", "DeviceNotActive", id=1)]
    assert answers(session, b'{"execute": "foo"}') == [failure("The command foo has not been found", "CommandNotFound")]
    assert capsys.readouterr().err == ""
    assert answers(session, b'{"execute": "crash", "id": 2}') == [
        failure("Internal error, see nbdkit's log: RuntimeError: first line second line", id=2)
    ]
    assert "Traceback" in capsys.readouterr().err
    (answer,) = answers(session, b'{"execute": "unserializable", "id": 3}')
    assert answer["id"] == 3
    assert "TypeError" in answer["error"]["desc"]
    assert answers(session, b'{"execute": "echo"}') == [NOTHING]


def test_after_runs_behind_the_answer_even_if_nobody_takes_it() -> None:
    ran: list[str] = []
    session = Session(lambda name, _arguments: Answer({}, after=lambda: ran.append(name)))
    assert answers(session, CAPABILITIES) == [NOTHING]
    messages = session.feed(b'{"execute": "quit"}')
    next(messages)
    assert ran == []
    assert list(messages) == []
    assert ran == ["quit"]
    messages = session.feed(b'{"execute": "again"}')
    next(messages)
    messages.close()
    assert ran == ["quit", "again"]


def test_after_that_fails_is_logged_only(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no shutdown today")

    session = Session(lambda _name, _arguments: Answer({}, after=fail))
    assert answers(session, CAPABILITIES + b'{"execute": "quit"}{"execute": "quit"}') == [NOTHING] * 3
    assert capsys.readouterr().err.count("RuntimeError: no shutdown today") == 2


def padded(size: int) -> bytes:
    """An `echo` of exactly `size` bytes."""
    head, tail = b'{"execute": "echo", "id": "', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


def test_size_bound_is_exact(session: Session) -> None:
    (answer,) = answers(session, padded(qmp.MESSAGE_BYTES_MAX))
    assert "return" in answer
    oversize = failure(f"JSON message size limit of {qmp.MESSAGE_BYTES_MAX} bytes exceeded")
    assert answers(session, padded(qmp.MESSAGE_BYTES_MAX + 1) + CAPABILITIES) == [oversize]
    assert answers(session, b'{"execute": "echo"}\n{"execute": "echo", "id": 1}') == [{"return": {}, "id": 1}]


@pytest.mark.parametrize("start", [b'{"execute": "', b"x", b"[1,", b"{"], ids=repr)
def test_ten_megabytes_get_one_error_and_take_no_memory(session: Session, start: bytes) -> None:
    seen = answers(session, start)
    chunk = b"y" * (1 << 16)
    for _ in range(160):
        seen += answers(session, chunk)
        assert len(session._framer._message) <= qmp.MESSAGE_BYTES_MAX
    assert seen == [failure(f"JSON message size limit of {qmp.MESSAGE_BYTES_MAX} bytes exceeded")]
    assert answers(session, b'"}{"execute": "echo"}\n{"execute": "echo", "id": 1}') == [{"return": {}, "id": 1}]


def test_depth_bound(session: Session) -> None:
    # The message itself is one level.
    deep = "[" * (qmp.DEPTH_MAX - 1) + "]" * (qmp.DEPTH_MAX - 1)
    (answer,) = answers(session, f'{{"execute": "echo", "id": {deep}}}'.encode())
    assert answer["id"] == json.loads(deep)
    too_deep = f'{{"execute": "echo", "id": [{deep}]}}{{"execute": "echo"}}\n'
    assert answers(session, too_deep.encode() + b'{"execute": "echo"}') == [
        failure("JSON nesting depth limit exceeded"),
        NOTHING,
    ]
    assert answers(session, b"[" * 100_000 + b"\n" + b'{"execute": "echo"}') == [
        failure("JSON nesting depth limit exceeded"),
        NOTHING,
    ]


# Pieces from which a random stream gets deep into every branch of the framer, unlike random bytes.
PIECES = st.sampled_from(
    [
        b'{"execute":"echo"}',
        b'{"execute":"echo","id":"\xc3\xa9\\u00e9"}',
        b'{"execute": "crash"}',
        CAPABILITIES,
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b"\\u",
        b"\\ud83d",
        b":",
        b",",
        b"\n",
        b"\r\n",
        b" ",
        b"\0",
        b"\xff",
        b"\xc3",
        b"\xa9",
        b"1e999",
        b"NaN",
        b"123",
        b"x" * 60,
        b"[" * 65,
        b'{"a":' * 65,
    ]
)
STREAMS = st.one_of(st.binary(max_size=300), st.lists(PIECES, max_size=40).map(b"".join))


@settings(max_examples=400)
@given(stream=STREAMS, cuts=st.lists(st.integers(0, 3000), max_size=30), bound=st.sampled_from([1 << 20, 64, 19, 1]))
def test_any_chunking_gives_the_same_answers_and_nothing_ends_the_session(
    stream: bytes, cuts: list[int], bound: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(None):
        patch.setattr(qmp, "MESSAGE_BYTES_MAX", bound)
        whole, chunked = Session(echo), Session(echo)
        expected = answers(whole, stream)
        edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        chunks = [stream[a:b] for a, b in itertools.pairwise(edges)]
        assert [answer for chunk in chunks for answer in answers(chunked, chunk)] == expected
        assert all(set(answer) <= {"return", "error", "id"} for answer in expected)
        assert len(whole._framer._message) <= bound
    # A string, then every bracket, then garbage: a faulty character in each place, and a newline after it.
    answers(whole, b'\x01"\x01\n' + b"\xff\n")
    assert answers(whole, b'{"execute":"foo","id":"alive"}')[-1]["id"] == "alive"


@settings(max_examples=200)
@given(
    identity=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        # surrogates are no characters
        | st.text(st.characters(blacklist_categories=["Cs"])),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\\\"{}[]'\n", max_size=4), inner),
        max_leaves=15,
    ),
    indent=st.sampled_from([None, 1]),
)
def test_any_json_survives_the_framer(identity: Any, indent: int | None) -> None:
    session = Session(echo)
    message = json.dumps({"execute": "qmp_capabilities", "id": identity}, indent=indent).encode()
    (answer,) = [a for i in range(len(message)) for a in answers(session, message[i : i + 1])]
    assert answer == {"return": {}, "id": identity}


# On the socket

DEADLINE_S = 20.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a state that another thread brings about."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


class Client:
    """A plain QMP client."""

    def __init__(self, path: Path, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")
        self.first = self.receive()
        if negotiate:
            assert self.call("qmp_capabilities") == NOTHING

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> Any:
        """The next message; None at the end of the connection."""
        line = self._lines.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def call(self, command: str, **arguments: Any) -> Any:
        self.send(json.dumps({"execute": command, "arguments": arguments}).encode())
        return self.receive()

    def close(self) -> None:
        self._lines.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class Stage:
    """A server with commands that a test can hold."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "control.sock"
        self.hub = EventHub()
        self.entered = threading.Event()
        self.release = threading.Event()
        self.server = ControlServer(str(self.path), self.execute, self.hub)

    def execute(self, name: str, arguments: dict[str, Any]) -> Answer:
        if name == "hold" or "hold" in arguments:
            self.entered.set()
            assert self.release.wait(DEADLINE_S)
            return Answer({"held": True})
        if name == "big":
            return Answer("x" * arguments["size"])
        if name.startswith(("query-", "replication-", "x-", "xen-", "quit")):
            return Answer(arguments)
        return echo(name, arguments)

    def clients(self) -> int:
        return len(self.server._clients)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(server, "IDLE_S", 1000.0)  # who is idle is what a test says
    stage = Stage(tmp_path)
    stage.server.bind()
    stage.server.start()
    yield stage
    stage.release.set()
    stage.server.stop()
    assert not stage.path.exists()
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("control-")])


def test_client_from_greeting_to_close(stage: Stage) -> None:
    with Client(stage.path, negotiate=False) as client:
        assert client.first == json.loads(Session(echo).greeting())
        assert client.call("echo")["error"]["class"] == "CommandNotFound"
        assert client.call("qmp_capabilities") == NOTHING
        assert client.call("echo", a=[1]) == {"return": {"a": [1]}}
        assert client.call("big", size=3_000_000) == {"return": "x" * 3_000_000}
    wait_until(lambda: stage.clients() == 0)


def test_events_come_only_after_negotiation_and_behind_its_answer(stage: Stage) -> None:
    with Client(stage.path, negotiate=False) as client:
        # The second answer proves that all is done that the first message could set off.
        for _ in range(2):
            assert client.call("echo")["error"]["class"] == "CommandNotFound"
        stage.hub.emit("TOO_EARLY")
        assert client.call("qmp_capabilities") == NOTHING
        # The subscription follows the answer; the next answer proves that it is there.
        assert client.call("echo") == NOTHING
        stage.hub.emit("REPLICATION_STAGE_CHANGE", mode="primary", from_="none", to="running")
        event = client.receive()
        assert event["event"] == "REPLICATION_STAGE_CHANGE"
        assert event["data"] == {"mode": "primary", "from": "none", "to": "running"}
        assert set(event["timestamp"]) == {"seconds", "microseconds"}


def test_event_that_is_no_json_is_logged_and_hurts_nobody(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(stage.path) as client:
        assert client.call("echo") == NOTHING
        stage.hub.emit("BROKEN", value=object())
        stage.hub.emit("WHOLE")
        assert client.receive()["event"] == "WHOLE"
    assert "event BROKEN is not JSON" in capsys.readouterr().err


def test_commands_of_two_clients_run_side_by_side(stage: Stage) -> None:
    with Client(stage.path) as slow, Client(stage.path) as quick:
        slow.send(b'{"execute": "hold"}')
        assert stage.entered.wait(DEADLINE_S)
        assert quick.call("echo") == NOTHING
        # The client whose command is running still gets its events.
        stage.hub.emit("MEANWHILE")
        assert slow.receive()["event"] == "MEANWHILE"
        stage.release.set()
        assert slow.receive() == {"return": {"held": True}}


def test_ten_megabyte_line(stage: Stage) -> None:
    with Client(stage.path) as client:
        client.send(b'{"execute": "' + b"x" * 10_000_000 + b'"}\n{"execute": "echo", "id": 1}\n')
        assert client.receive() == failure(f"JSON message size limit of {qmp.MESSAGE_BYTES_MAX} bytes exceeded")
        assert client.receive() == {"return": {}, "id": 1}


def test_close_in_mid_message(stage: Stage) -> None:
    with Client(stage.path) as witness:
        for _ in range(CLIENTS := 2 * server.CLIENTS_MAX):
            with Client(stage.path) as client:
                client.send(b'{"execute": "ec')
            wait_until(lambda: stage.clients() == 1)
        assert CLIENTS > server.CLIENTS_MAX
        assert witness.call("echo") == NOTHING


def test_close_while_a_command_runs(stage: Stage) -> None:
    with Client(stage.path) as witness:
        with Client(stage.path) as client:
            client.send(b'{"execute": "hold"}')
            assert stage.entered.wait(DEADLINE_S)
        assert witness.call("echo") == NOTHING
        stage.release.set()
        wait_until(lambda: stage.clients() == 1)
        assert witness.call("echo") == NOTHING


def test_half_closed_client_still_gets_its_answers(stage: Stage) -> None:
    with Client(stage.path) as client:
        client.send(b'{"execute": "echo", "id": 1}{"execute": "echo", "id": 2}{"execute":')
        client.socket.shutdown(socket.SHUT_WR)
        assert client.receive() == {"return": {}, "id": 1}
        assert client.receive() == {"return": {}, "id": 2}
        assert client.receive() is None


def test_client_that_does_not_read_events_is_disconnected_and_others_miss_nothing(stage: Stage) -> None:
    with Client(stage.path) as deaf, Client(stage.path) as reader:
        assert deaf.call("echo") == NOTHING
        assert reader.call("echo") == NOTHING
        for number in range(4000):
            stage.hub.emit("BURST", number=number, padding="x" * 2000)
            assert reader.receive()["data"]["number"] == number
            if stage.clients() == 1:
                break
        assert stage.clients() == 1
        assert reader.call("echo") == NOTHING
        got = 0
        while (event := deaf.receive()) is not None:
            assert event["data"]["number"] == got  # what arrives has no gaps
            got += 1
        assert got <= number


def test_client_that_does_not_read_answers_is_disconnected(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "DRAIN_S", 0.2)
    with Client(stage.path) as deaf, Client(stage.path) as witness:
        # The answers fill first the socket, then the queue, and then there is no room within DRAIN_S.
        deaf.send(b'{"execute": "big", "arguments": {"size": 1000000}}' * 12)
        wait_until(lambda: stage.clients() == 1)
        assert witness.call("echo") == NOTHING


def test_client_that_reads_late_gets_every_answer(stage: Stage) -> None:
    count = 3 * server.QUEUE_MESSAGES_MAX
    with Client(stage.path) as client:
        sender = threading.Thread(target=client.send, args=(b'{"execute": "echo", "id": 1}' * count,))
        sender.start()
        for _ in range(count):
            assert client.receive() == {"return": {}, "id": 1}
        sender.join(DEADLINE_S)


def test_client_too_many_gets_urgent_answers_only_and_a_free_place_can_be_taken(stage: Stage) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(stage.path)) for _ in range(server.CLIENTS_MAX)]
        with Client(stage.path) as reserved:
            assert reserved.call("echo") == failure("Too many clients: this socket serves at most 16 at a time")
            for name, arguments in (
                ("query-replication", {}),
                ("query-failover", {}),
                ("x-colo-lost-heartbeat", {}),
                ("replication-stop", {"failover": True, "force": True}),
                ("xen-set-replication", {"enable": False, "primary": False, "failover": True}),
                ("replication-set-role", {"role": "primary"}),
                ("replication-outdate", {}),
                ("replication-renew", {}),
                ("quit", {}),
            ):
                assert reserved.call(name, **arguments) == {"return": arguments}
            for name in ("replication-stop", "xen-set-replication", "replication-checkpoint"):
                assert "Too many clients" in reserved.call(name)["error"]["desc"]
            assert "Too many clients" in reserved.call("replication-set-role", role="secondary")["error"]["desc"]
            assert all(client.call("echo") == NOTHING for client in clients)
            clients[0].close()
            wait_until(lambda: stage.clients() == server.CLIENTS_MAX)
            assert reserved.call("echo") == NOTHING


def idle_for_long(*clients: server._Client) -> None:
    """As if these, which have nothing at work, had said nothing for long."""
    wait_until(lambda: not any(client._working for client in clients))  # the answer comes a moment before
    for client in clients:
        client._idle_since -= 2 * server.IDLE_S


def without_a_word_for_long(*clients: server._Client) -> None:
    """The same of clients whose commands are at work."""
    for client in clients:
        client._idle_since -= 2 * server.IDLE_S


def test_idle_client_makes_room_and_is_told(stage: Stage) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(stage.path)) for _ in range(server.CLIENTS_MAX)]
        assert all(client.call("echo") == NOTHING for client in clients)
        idle_for_long(stage.server._clients[3])
        with Client(stage.path) as late:
            assert late.call("echo") == NOTHING
            assert clients[3].receive() == failure(server._EVICTED)
            assert clients[3].receive() is None
        assert all(client.call("echo") == NOTHING for client in clients if client is not clients[3])


def test_who_leaks_connections_loses_them(stage: Stage) -> None:
    """Of the idle the one goes whose process holds most connections, however long others have been idle."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(stage.path)) for _ in range(server.CLIENTS_MAX)]
        assert all(client.call("echo") == NOTHING for client in clients)
        served = list(stage.server._clients)
        served[0].process += 1  # a monitor that waits for events
        idle_for_long(*served[:2], served[0])
        with Client(stage.path) as late:
            assert late.call("echo") == NOTHING
            assert clients[1].receive() == failure(server._EVICTED)
        assert clients[0].call("echo") == NOTHING


def test_client_whose_command_is_at_work_keeps_its_place(stage: Stage) -> None:
    """All places are taken by commands that do not end: who wants to fail over gets in, again and again."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(stage.path)) for _ in range(server.CLIENTS_MAX)]
        for client in clients:
            client.send(b'{"execute": "hold"}')
        wait_until(lambda: all(client._working for client in stage.server._clients))
        without_a_word_for_long(*stage.server._clients)
        silent: list[Client] = []
        for _ in range(3 * server.RESERVED):
            client = stack.enter_context(Client(stage.path))
            assert client.call("replication-stop", failover=True) == {"return": {"failover": True}}
            # Of those with a reserved place one has to be idle when the next one comes, and the first for longest.
            wait_until(lambda: not any(other._working for other in stage.server._clients if other.reserved))
            silent.append(client)
            assert stage.clients() <= server.CLIENTS_MAX + server.RESERVED
        assert silent[0].receive() == failure(server._EVICTED)
        for client in silent[-server.RESERVED :]:
            client.send(b'{"execute": "quit", "arguments": {"hold": true}}')
        wait_until(lambda: all(client._working for client in stage.server._clients))
        with Client(stage.path, negotiate=False) as refused:
            assert refused.first == failure("Too many clients: this socket serves at most 16 at a time")
            assert refused.receive() is None
        stage.release.set()
        for client in clients:
            assert client.receive() == {"return": {"held": True}}


def test_system_without_threads_costs_one_client_not_the_server(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.endswith("-read"):
            raise RuntimeError("can't start new thread")
        real(thread)

    with Client(stage.path) as witness:
        monkeypatch.setattr(threading.Thread, "start", start)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(str(stage.path))
            while client.recv(4096):
                pass
        monkeypatch.undo()
        wait_until(lambda: stage.clients() == 1)
        with Client(stage.path) as late:
            assert late.call("echo") == NOTHING
        assert witness.call("echo") == NOTHING


def test_failure_to_accept_is_survived(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = socket.socket.accept
    failures = iter([OSError(24, "Too many open files")])

    def accept(self: socket.socket) -> tuple[socket.socket, Any]:
        for error in failures:
            raise error
        return real(self)

    monkeypatch.setattr(server, "_ACCEPT_RETRY_S", 0.01)
    monkeypatch.setattr(socket.socket, "accept", accept)
    with Client(stage.path) as client:
        assert client.call("echo") == NOTHING
    assert "cannot accept a control client: Too many open files" in capsys.readouterr().err


def test_stop_sends_what_is_queued_and_ends_every_connection(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STOP_DRAIN_S", DEADLINE_S)  # a loaded machine needs more than a second for 3 MB
    with Client(stage.path) as client, Client(stage.path) as idle:
        client.send(b'{"execute": "big", "arguments": {"size": 1000000}}' * 3)
        # All three are answered: one answer is being sent, two wait behind it.
        wait_until(lambda: any(len(c._outbox._messages) == 2 and not c._working for c in stage.server._clients))
        stopper = threading.Thread(target=stage.server.stop)
        stopper.start()
        for _ in range(3):
            assert client.receive() == {"return": "x" * 1_000_000}
        assert client.receive() is None
        assert idle.receive() is None
        stopper.join(DEADLINE_S)
        assert not stopper.is_alive()
        assert not stage.path.exists()


def test_stop_does_not_wait_for_ever_for_a_command(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "STOP_S", 0.3)
    with Client(stage.path) as client:
        client.send(b'{"execute": "hold"}')
        assert stage.entered.wait(DEADLINE_S)
        stage.server.stop()
        assert not stage.release.is_set(), "the command is at work still"
        assert client.receive() is None
        assert "1 control client(s) still had a command running" in capsys.readouterr().err


# The socket file


def bound(path: Path) -> ControlServer:
    server = ControlServer(str(path), echo, EventHub())
    server.bind()
    return server


def test_mode_is_0600_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    old = os.umask(0)
    try:
        server = bound(path)
    finally:
        os.umask(old)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.stop()
    assert list(tmp_path.iterdir()) == []


def test_path_too_long_for_a_socket(tmp_path: Path) -> None:
    room = server.PATH_BYTES_MAX - len(os.fsencode(tmp_path)) - 1
    fits = bound(tmp_path / ("x" * room))
    fits.start()
    with Client(tmp_path / ("x" * room)) as client:
        assert client.call("echo") == NOTHING
    fits.stop()
    with pytest.raises(ConfigError, match=r"control=.* may have 107 bytes, this one has 108; give a shorter"):
        bound(tmp_path / ("x" * (room + 1)))
    assert list(tmp_path.iterdir()) == []


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    server = bound(path)
    assert list(tmp_path.iterdir()) == [path]
    server.start()
    with Client(path) as client:
        assert client.call("echo") == NOTHING
    server.stop()


def test_live_socket_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    first = bound(path)
    with pytest.raises(ConfigError, match=r"control=.*/control\.sock: the socket is in use by another process"):
        bound(path)
    first.start()
    with Client(path) as client:
        assert client.call("echo") == NOTHING
    first.stop()
    assert list(tmp_path.iterdir()) == []


def test_clients_that_come_at_once_find_room_without_waiting(tmp_path: Path) -> None:
    """One with a timeout connects without blocking, and would get EAGAIN: from Python, for example."""
    path = tmp_path / "control.sock"
    listening = bound(path)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(5 * server.CLIENTS_MAX):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
    finally:
        listening.stop()


def test_live_socket_with_a_full_backlog_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(path))
        with pytest.raises(ConfigError, match="in use by another process"):
            bound(path)


def test_second_start_waits_while_the_first_clears_a_stale_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    real_link, real_flock = os.link, fcntl.flock
    waiting = threading.Event()
    outcome: list[ConfigError] = []

    def rival() -> None:
        with pytest.raises(ConfigError) as caught:
            bound(path)
        outcome.append(caught.value)

    second = threading.Thread(target=rival)

    def link(*arguments: Any, **options: Any) -> None:
        # The stale socket is gone and the new one not there yet.
        second.start()
        assert waiting.wait(DEADLINE_S)
        real_link(*arguments, **options)

    def flock(descriptor: int, operation: int) -> None:
        try:
            real_flock(descriptor, operation)
        except BlockingIOError:
            waiting.set()
            raise

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(fcntl, "flock", flock)
    first = bound(path)
    second.join(DEADLINE_S)
    assert "in use by another process" in str(outcome[0])
    assert list(tmp_path.iterdir()) == [path]
    first.start()
    with Client(path) as client:
        assert client.call("echo") == NOTHING
    first.stop()


def test_start_does_not_wait_for_ever_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LOCK_S", 0.05)
    path = tmp_path / "control.sock"
    lock = tmp_path / ".control.sock.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by another process"):
            bound(path)
    assert list(tmp_path.iterdir()) == [lock]
    # What a killed process leaves behind is in nobody's way.
    bound(path).stop()
    assert list(tmp_path.iterdir()) == []


def test_many_starts_at_once_on_a_stale_socket_leave_one_alive(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    barrier = threading.Barrier(8)
    won: list[ControlServer] = []
    lost: list[ConfigError] = []

    def start() -> None:
        barrier.wait(DEADLINE_S)
        try:
            won.append(bound(path))
        except ConfigError as error:
            lost.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(won) + len(lost) == 8
    assert len(won) == 1
    won[0].start()
    with Client(path) as client:
        assert client.call("echo") == NOTHING
    won[0].stop()
    assert list(tmp_path.iterdir()) == []


def test_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"control=.*/control\.sock: there is a file in the way that is no socket"):
        bound(path)
    assert path.read_text() == "precious"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no socket"):
        bound(path)
    assert path.is_symlink()
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"control=.*: cannot create the control socket: No such file or directory"):
        bound(tmp_path / "nowhere" / "control.sock")


def test_stop_removes_only_its_own_socket(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    first = bound(path)
    path.unlink()
    second = bound(path)
    first.stop()
    assert path.exists()
    second.stop()
    assert not path.exists()


def test_client_that_connects_before_start_is_served_after_it(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    server = bound(path)
    early = socket.socket(socket.AF_UNIX)
    early.settimeout(DEADLINE_S)
    early.connect(str(path))
    server.start()
    with early, early.makefile("rb") as lines:
        assert b"QMP" in lines.readline()
    server.stop()
    server.stop()
