# SPDX-License-Identifier: BSD-3-Clause
"""Whatever comes in on the control socket of a running node: it answers with errors, changes nothing, and goes on.

The inputs are made from the command table itself, so a command that is added to it is tried as well. Everything is
derandomized: a failure is the same on every machine.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from content import MIB
from lab import Lab
from nodes import Primary, Server
from replication.control.commands import TABLE
from replication.control.qmp import DEPTH_MAX, MESSAGE_BYTES_MAX, Argument
from waiting import DEADLINE_S, wait_until

FUZZ = settings(
    derandomize=True,
    database=None,
    # One server for all examples is the point: it has to outlive them.
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)
EXAMPLES = 200
GROWTH_MAX = 40 * MIB
"""Bytes that a server may grow by over a test: less than all that is sent to it in the largest one (64 MiB).
Measured is up to 20 MiB, because a message of 1 MiB can be 90,000 Python objects, and the allocator keeps their
memory."""

LISTENS = "00010000"
"""In /proc/net/unix."""

HARMLESS = [
    name for name in TABLE if name.startswith("query-") or name in ("replication-get-error", "xen-colo-do-checkpoint")
]
"""Commands that leave the stage as it is; only they may come in undamaged, or damaged in a random place."""


class Node:
    """A server under fuzz, as it was when the test began."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.stage = server.status()["stage"]
        self.wait_unused()
        self.descriptors = self._count("fd")
        self.threads = self._count("task")
        self.resident = self.resident_bytes()

    def _count(self, what: str) -> int:
        return len(list(Path(f"/proc/{self.server.pid}/{what}").iterdir()))

    def resident_bytes(self) -> int:
        """Memory in use."""
        for line in Path(f"/proc/{self.server.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def check(self) -> None:
        """It serves a new client and is in its stage."""
        self.server.check_alive()
        assert self.server.status()["stage"] == self.stage

    def check_at_the_end(self) -> None:
        """It has let go of all clients, has not grown, and has said nothing of a defect."""
        self.check()
        self.wait_alone()
        assert self.resident_bytes() - self.resident < GROWTH_MAX
        assert "Traceback" not in self.server.stderr()
        assert "Internal error" not in self.server.stderr()

    def wait_alone(self) -> None:
        """Until it has let go of all clients."""
        self.wait_unused()
        wait_until(lambda: self._count("fd") <= self.descriptors, "the clients' descriptors are closed")
        wait_until(lambda: self._count("task") <= self.threads, "the clients' threads have ended")

    def wait_unused(self) -> None:
        """Until its control socket has no connection, not even one that is at work for a client that has left. (What
        was counted at the beginning does not tell: something else may have ended since.)"""

        def connections() -> list[str]:
            lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
            named = [(line[3], line[6], line[7]) for line in lines if line[-1].endswith(".control")]
            own = set()
            for each in Path(f"/proc/{self.server.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    own.add(os.readlink(each))
            (path,) = {path for flags, inode, path in named if flags == LISTENS and f"socket:[{inode}]" in own}
            return [inode for flags, inode, other in named if other == path and flags != LISTENS]

        wait_until(lambda: not connections(), "only the listening socket is left")

    def exchange(self, data: bytes, cuts: list[int]) -> list[dict[str, Any]]:
        """Send `data` in pieces, then nothing more; all that is answered before the server hangs up."""
        with self._connected() as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
                for start, stop in itertools.pairwise(edges):
                    client.sendall(data[start:stop])
                client.shutdown(socket.SHUT_WR)
            answers = b""
            while more := client.recv(65536):
                answers += more
        assert answers.endswith(b"\r\n")
        messages = [json.loads(line) for line in answers.splitlines()]
        assert "QMP" in messages[0]
        assert all({"return", "error", "event"} & set(message) for message in messages[1:])
        assert all("Internal error" not in message["error"]["desc"] for message in messages if "error" in message)
        return [message for message in messages[1:] if "event" not in message]

    def drop(self, data: bytes) -> None:
        """Send `data` and leave at once, without reading."""
        with self._connected() as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(data)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(str(self.server.control_path))
            yield client


@pytest.fixture(params=["secondary", "primary"])
def node(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Node]:
    """Either half of a pair that runs."""
    pair = lab.pair()
    pair.start_replication()
    fuzzed = Node(getattr(pair, request.param))
    yield fuzzed
    fuzzed.check_at_the_end()


# -- inputs ------------------------------------------------------------------------------------------------------

NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["true", "secondary", "primary", "auto", "full", "nbd://", "disk0", "backup-disk0", "\0", "\ud800"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def fits(argument: Argument, value: Any) -> bool:
    """Whether QMP would take the value; written down a second time, not asked of the product."""
    kinds: dict[str, Any] = {"boolean": bool, "string": str, "array": list, "object": dict}
    if argument.type == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if argument.type == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kinds[argument.type]) and (not argument.values or value in argument.values)


def good(argument: Argument) -> Any:
    """A value that the argument takes."""
    if argument.values:
        return argument.values[0]
    return {"boolean": False, "string": "x", "integer": 1, "number": 1.5, "array": [], "object": {}}[argument.type]


@st.composite
def refused(draw: st.DrawFn) -> dict[str, Any]:
    """A command of the table, `quit` and failover among them, whose arguments have just one fault."""
    name = draw(st.sampled_from(sorted(TABLE)))
    declared: Mapping[str, Argument] = TABLE[name].arguments
    arguments = {key: good(argument) for key, argument in declared.items()}
    required = [key for key, argument in declared.items() if argument.required]
    faults = ["unexpected", *(["type"] if declared else []), *(["missing"] if required else [])]
    fault = draw(st.sampled_from(faults))
    if fault == "unexpected":
        unknown = st.text(max_size=8).filter(lambda key: key not in declared)
        arguments[draw(unknown | st.sampled_from(["Mode", "enable ", "__class__"]))] = draw(VALUES)
    elif fault == "type":
        key = draw(st.sampled_from(sorted(declared)))
        arguments[key] = draw(VALUES.filter(lambda value: not fits(declared[key], value)))
    else:
        del arguments[draw(st.sampled_from(required))]
    return {"execute": name, "arguments": arguments, "id": draw(st.integers(0, 99))}


JUNK = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=20).map(lambda text: json.dumps(text).encode()),
    st.sampled_from(
        [
            b"\xff",
            b"\xc3(",
            b'"\\ud800"',
            b'{"execute":"query-jobs","id":"\\udc00"}',
            b'{"execute":"query-jobs","execute":"query-version"}',
            b'{"execute":"query-jobs","arguments":{"a":1,"a":2}}',
            b'{"execute":"query-jobs","id":' + b"9" * 5000 + b"}",
            b'{"execute":"query-jobs","id":-1e400}',
            b'{"execute":"query-jobs","id":NaN}',
            b"[" * (DEPTH_MAX + 1),
            b'{"id":' * (DEPTH_MAX + 1),
            b"\0",
            b"'",
            b"\n",
            b"}",
            b"]",
            b"\\",
            b'"',
        ]
    ),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A harmless command with a few bytes changed, taken out or put in."""
    request = {"execute": draw(st.sampled_from(HARMLESS)), "id": draw(VALUES)}
    message = bytearray(json.dumps(request).encode())
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(message) - 1, 0)))
        match draw(st.integers(0, 3)):
            case 0:
                message[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del message[at : at + draw(st.integers(1, 8))]
            case 2:
                message[at:at] = draw(JUNK)
            case 3:
                message[at:at] = message[at : at + draw(st.integers(1, 20))]
    return bytes(message)


STREAMS = st.lists(damaged() | JUNK | st.sampled_from([NEGOTIATE, b"\n", b" "]), max_size=8).map(b"".join)
CUTS = st.lists(st.integers(0, 4000), max_size=6)


# -- tests -------------------------------------------------------------------------------------------------------


@settings(FUZZ, max_examples=EXAMPLES)
@given(requests=st.lists(refused(), min_size=1, max_size=8), cuts=CUTS)
def test_every_command_with_a_wrong_argument_is_refused_and_changes_nothing(
    node: Node, requests: list[dict[str, Any]], cuts: list[int]
) -> None:
    """json.dumps writes NaN and Infinity, and half surrogate pairs: those are faults, too, of the whole message."""
    data = NEGOTIATE + b"".join(json.dumps(request).encode() + b"\n" for request in requests)
    negotiated, *answers = node.exchange(data, cuts)
    assert negotiated == {"return": {}}
    assert len(answers) == len(requests), "one answer each"
    for request, answer in zip(requests, answers, strict=True):
        assert answer["error"]["class"] == "GenericError", (request, answer)
        assert answer.get("id", request["id"]) == request["id"]
    node.check()


@settings(FUZZ, max_examples=EXAMPLES)
@given(stream=STREAMS, cuts=CUTS)
def test_damaged_messages_and_garbage_are_answered_and_change_nothing(
    node: Node, stream: bytes, cuts: list[int]
) -> None:
    node.exchange(NEGOTIATE + stream, cuts)
    node.check()


@settings(FUZZ, max_examples=EXAMPLES // 2)
@given(stream=STREAMS, stop=st.integers(0, 4000))
def test_clients_that_leave_in_the_midst_leave_nothing_behind(node: Node, stream: bytes, stop: int) -> None:
    data = NEGOTIATE + stream
    node.drop(data[: stop % (len(data) + 1)])
    node.check()


HUGE = {
    "digits": b'{"execute":"query-version","id":%s}' % (b"7" * (MESSAGE_BYTES_MAX - 100)),
    "fraction": b'{"execute":"query-version","id":0.%s}' % (b"3" * (MESSAGE_BYTES_MAX - 100)),
    "text": b'{"execute":"query-version","id":"%s"}' % (b"x" * (MESSAGE_BYTES_MAX - 100)),
    "escapes": b'{"execute":"query-version","id":"%s"}' % (rb"\u0041" * (MESSAGE_BYTES_MAX // 7)),
    "quotes": b'{"execute":"query-version","id":[%s""]}' % (b'"",' * (MESSAGE_BYTES_MAX // 4)),
    "lists": b'{"execute":"query-version","id":[%s[]]}' % (b"[]," * (MESSAGE_BYTES_MAX // 4)),
    "members": b"{%s}" % b",".join(b'"%d":0' % number for number in range(MESSAGE_BYTES_MAX // 12)),
    "too long": b'{"execute":"query-version","id":"' + b"x" * (2 * MESSAGE_BYTES_MAX),
    "garbage": b"x" * (2 * MESSAGE_BYTES_MAX),
    "blanks": b" " * (2 * MESSAGE_BYTES_MAX),
    "too deep": b"[" * MESSAGE_BYTES_MAX,
    "deep and wide": b'{"execute":"query-version","id":[%s[]]}'
    % ((b"[" * (DEPTH_MAX - 2) + b"]" * (DEPTH_MAX - 2) + b",") * (MESSAGE_BYTES_MAX // (2 * DEPTH_MAX + 1))),
    "name": b'{"execute":"%s"}' % (b"q" * (MESSAGE_BYTES_MAX - 100)),
}


@pytest.mark.timeout(400)  # half a minute on an idle machine
def test_the_largest_messages_of_every_kind_cost_neither_memory_nor_the_node(node: Node) -> None:
    for _ in range(2):
        for message in HUGE.values():
            node.exchange(NEGOTIATE + message + b"\n", [])
            node.drop(NEGOTIATE + message)
            node.check()
            # One after the other, or the peak would depend on how many of them are worked on at once.
            node.wait_alone()


# Nothing listens there, so a start that is not refused for its text fails for want of a secondary.
ADDRESSES = st.tuples(st.sampled_from(["nbd+unix://", "nbds+unix://", "nbd+unix", "", "file://"]), st.text(max_size=20))


@settings(FUZZ, max_examples=EXAMPLES)
@given(address=ADDRESSES)
@example(address=("nbd+unix:///", "?socket=/nowhere\0"))
@example(address=("nbd+unix:///", "disk0\0"))
@example(address=("nbd+unix:///", "?socket=" + "x" * 200))
@example(address=("nbd+unix:///", "x" * 5000 + "?socket=/nowhere"))
@example(address=("nbd+unix://", "[::"))
@example(address=("nbd+unix:///", "%ff%00?socket=%00"))
@example(address=("nbds+unix://", "@/?socket=/&tls-psk-file=/nowhere"))
def test_a_primary_refuses_every_address_that_is_no_secondary(address: tuple[str, str], idle: Node) -> None:
    request = {"execute": "replication-start", "arguments": {"secondary": "".join(address)}}
    _, answer = idle.exchange(NEGOTIATE + json.dumps(request).encode() + b"\n", [])
    assert answer["error"]["class"] == "GenericError"
    idle.check()


@pytest.fixture
def idle(lab: Lab) -> Iterator[Node]:
    """A primary in stage none."""
    primary: Primary = lab.primary(f"nbd+unix:///?socket={lab.folder}/nobody")
    fuzzed = Node(primary)
    yield fuzzed
    fuzzed.check_at_the_end()
