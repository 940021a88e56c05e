# SPDX-License-Identifier: BSD-3-Clause
"""What tests/wire.py and scripts/lab do without a network: shapes, units, forged resets, the command line."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import socket
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from namespaces import HOSTS
from shape import Shape
from tcpflows import Flow, Flows, checksum, reset_frame

LAB = Path(__file__).resolve().parents[2] / "scripts/lab"
MACS = (b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b")
FIN, SYN, RST, ACK = 1, 2, 4, 16


@pytest.fixture(scope="module")
def lab() -> ModuleType:
    """scripts/lab as a module."""
    loader = importlib.machinery.SourceFileLoader("lab_script", str(LAB))
    spec = importlib.util.spec_from_loader("lab_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("unit", "text", "value"),
    [
        ("rate", "10mbit", 10e6),
        ("rate", "500KBIT", 500e3),
        ("rate", "1.5gbit", 1.5e9),
        ("rate", "0", 0),
        ("duration", "50ms", 50),
        ("duration", "200us", 0.2),
        ("duration", "1.5s", 1500),
        ("percentage", "5%", 5),
        ("percentage", "0.1", 0.1),
        ("size", "64k", 65536),
        ("size", "1m", 1 << 20),
    ],
)
def test_units(lab: ModuleType, unit: str, text: str, value: float) -> None:
    assert getattr(lab, unit)(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("rate", "10"),
        ("rate", "10mbps"),  # tc's megabytes per second: too easily taken for megabits
        ("rate", "-1mbit"),
        ("duration", "50"),
        ("duration", "50m"),
        ("percentage", "5ms"),
        ("size", "inf"),
        ("size", ""),
    ],
)
def test_bad_units(lab: ModuleType, unit: str, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number with a unit, as in"):
        getattr(lab, unit)(text)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param({"loss": 100.5}, "at most 100", id="loss"),
        pytest.param({"rate": -1}, "rate must be a number of at least 0, not -1", id="negative"),
        pytest.param({"delay": float("nan")}, "delay must be a number", id="nan"),
        pytest.param({"delay": True}, "delay must be a number", id="bool"),
        pytest.param({"queue": "1"}, "queue must be a number", id="text"),
        pytest.param({"delay": 1, "jitter": 2}, "larger than the delay", id="jitter"),
        pytest.param({"reorder": 1}, "nothing to overtake", id="reorder"),
    ],
)
def test_shapes_that_cannot_be(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Shape(**arguments)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["status"], 2, "lab: network namespaces need root: run this with sudo"),
        (["exec", "a"], 2, "lab: error: exec: a COMMAND is missing"),
        (["exec", "c", "true"], 2, "invalid choice: 'c'"),
        (["shape", "--loss", "much"], 2, "lab shape: error: argument --loss: 'much' is not a number with a unit"),
        ([], 2, "the following arguments are required: COMMAND"),
        (["--lab", "../x", "up"], 2, "'../x' is not a name"),
    ],
)
def test_command_lines_that_are_refused(
    lab: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("sys.argv", ["lab", *arguments])
    try:
        got = lab.main()
    except SystemExit as end:
        got = end.code
    assert got == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert line in last


def frame(sequence: int, ack: int, flags: int, payload: bytes = b"", from_a: bool = True) -> bytes:
    """A TCP frame between the hosts, without checksums."""
    ends = [(socket.inet_aton(HOSTS[host][0]), port) for host, port in (("a", 40000), ("b", 10809))]
    (source, source_port), (target, target_port) = ends if from_a else ends[::-1]
    tcp = struct.pack(">HHLLBBHHH", source_port, target_port, sequence, ack, 5 << 4, flags, 1000, 0, 0) + payload
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + source + target
    return MACS[1] + MACS[0] + b"\x08\x00" + ip + tcp


def opened(flows: Flows, isn_a: int = 1000, isn_b: int = 5000) -> Flow:
    """A connection after its handshake; host a's flow."""
    for sent in (
        frame(isn_a, 0, SYN),
        frame(isn_b, isn_a + 1, SYN | ACK, from_a=False),
        frame(isn_a + 1, isn_b + 1, ACK),
    ):
        segment = flows.segment(sent)
        assert segment is not None
        flows.passed(segment)
    return segment.flow


def test_what_an_end_awaits_is_what_it_acknowledged_or_was_sent() -> None:
    flows = Flows()
    flow = opened(flows)
    assert (flow.awaits, flow.reverse.awaits) == (5001, 1001)
    segment = flows.segment(frame(1001, 5001, ACK, b"x" * 100))
    assert segment is not None
    assert flow.reverse.awaits == 1001, "not on its way yet"
    flows.passed(segment)
    assert flow.reverse.awaits == 1101
    flows.segment(frame(5001, 1051, ACK, from_a=False))
    assert flow.reverse.awaits == 1101, "an older acknowledgement"


def test_sequence_numbers_wrap() -> None:
    flows = Flows()
    flow = opened(flows, isn_a=0xFFFFFFF0)
    segment = flows.segment(frame(0xFFFFFFF1, 5001, ACK, b"x" * 100))
    assert segment is not None
    flows.passed(segment)
    assert flow.reverse.awaits == flow.sent == (0xFFFFFFF1 + 100) & 0xFFFFFFFF


def test_each_open_connection_is_given_up_once_and_its_ports_can_be_used_again() -> None:
    flows = Flows()
    flow = opened(flows)
    assert {refused.reverse for refused in flows.refuse_all()} == {flow, flow.reverse}
    assert flows.refuse_all() == []
    again = opened(flows, isn_a=10)
    assert not again.refused
    assert again.reverse.awaits == 11
    assert len(flows.refuse_all()) == 2


@pytest.mark.parametrize("last", [[(RST, True)], [(FIN | ACK, True), (FIN | ACK, False)]], ids=["reset", "closed"])
def test_a_connection_that_has_ended_is_not_reset(last: list[tuple[int, bool]]) -> None:
    flows = Flows()
    opened(flows)
    for flags, from_a in last:
        segment = flows.segment(frame(1001 if from_a else 5001, 5001 if from_a else 1001, flags, from_a=from_a))
        assert segment is not None
        flows.passed(segment)
    assert flows.refuse_all() == []


def test_the_oldest_connections_are_forgotten() -> None:
    flows = Flows()
    template = frame(1, 0, SYN)
    for port in range(10000, 13000):
        flows.segment(template[:34] + struct.pack(">H", port) + template[36:])
    assert len(flows.refuse_all()) == 4096


@pytest.mark.parametrize(
    "other",
    [
        frame(1, 1, ACK)[:50],
        frame(1, 1, ACK).replace(b"\x08\x00\x45", b"\x08\x06\x45"),
        frame(1, 1, ACK).replace(socket.inet_aton(HOSTS["a"][0]), socket.inet_aton("10.77.0.9")),
    ],
    ids=["short", "not IPv4", "a third host"],
)
def test_what_is_no_segment_of_the_hosts_is_left_alone(other: bytes) -> None:
    assert Flows().segment(other) is None


def test_a_forged_reset_is_a_whole_frame_with_good_checksums() -> None:
    flow = opened(Flows())
    forged = reset_frame(flow, MACS[0], MACS[1], 5001)
    assert forged[:14] == MACS[0] + MACS[1] + b"\x08\x00"
    ip, tcp = forged[14:34], forged[34:]
    # A checksum over something that includes its own checksum is 0 (RFC 1071).
    assert checksum(ip) == 0
    assert checksum(ip[12:20] + struct.pack(">HH", 6, len(tcp)) + tcp) == 0
    assert struct.unpack(">HHLLBB", tcp[:14]) == (10809, 40000, 5001, 1001, 5 << 4, RST | ACK)
    assert ip[12:16] == socket.inet_aton(HOSTS["b"][0])
    assert ip[16:20] == socket.inet_aton(HOSTS["a"][0])
