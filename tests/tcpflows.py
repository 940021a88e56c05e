# SPDX-License-Identifier: BSD-3-Clause
"""The TCP connections that a relay has seen, so that it can reset them."""

from __future__ import annotations

import socket
import struct

from namespaces import HOSTS

_TCP_START, _TCP_END = 34, 54  # in a frame
_ADDRESSES = slice(26, 38)  # both IP addresses and both ports: what tells connections apart
_TCP_HEADER = struct.Struct(">LLBB")
_FIN, _SYN, RST, _ACK = 1, 2, 4, 16
_FLOWS_MAX = 4096
_BETWEEN_HOSTS = frozenset(
    socket.inet_aton(HOSTS[source][0]) + socket.inet_aton(HOSTS[target][0]) for source, target in ("ab", "ba")
)


class Segment:
    """What the relay needs of a TCP segment."""

    __slots__ = ("ack", "end", "flags", "flow", "payload")

    def __init__(self, flow: Flow, end: int, ack: int, flags: int, payload: int) -> None:
        self.flow = flow
        self.end = end  # sequence number of what comes after it
        self.ack = ack
        self.flags = flags
        self.payload = payload


class Flow:
    """One direction of a TCP connection, with what is known of its sender."""

    __slots__ = ("addresses", "awaits", "ended", "refused", "reverse", "sent")

    def __init__(self, addresses: bytes) -> None:
        self.addresses = addresses
        self.reverse = self
        self.sent: int | None = None  # the highest sequence number sent, and one
        self.awaits: int | None = None  # the next sequence number that the sender awaits from the other side
        self.ended = False
        self.refused = False

    @property
    def open(self) -> bool:
        """Whether there is something to reset."""
        return not self.refused and not (self.ended and self.reverse.ended)


def _later(number: int | None, other: int) -> int:
    """The later one of two sequence numbers, which count modulo 2**32."""
    return other if number is None or (other - number) & 0xFFFFFFFF < 1 << 31 else number


class Flows:
    """The TCP connections that the relay has seen, the oldest forgotten first.

    To be obeyed, a reset must carry exactly the sequence number that its receiver awaits (RFC 5961, 3.2). That is the
    latest of what the receiver has acknowledged and what was passed on to it. If a frame before was lost, this is
    too high, but within the receiver's window: it answers with its true number, and `Lane` resets again with that.
    """

    def __init__(self) -> None:
        self._flows: dict[bytes, Flow] = {}

    def segment(self, frame: bytes) -> Segment | None:
        """What arrived, noted down; None unless it is TCP between the hosts, without IP options (Linux sends none)."""
        if len(frame) < _TCP_END or frame[12:15] != b"\x08\x00\x45" or frame[23] != socket.IPPROTO_TCP:
            return None
        if frame[_ADDRESSES.start : _ADDRESSES.start + 8] not in _BETWEEN_HOSTS:
            return None
        sequence, ack, header, flags = _TCP_HEADER.unpack_from(frame, _TCP_START + 4)
        payload = (frame[16] << 8 | frame[17]) - 20 - (header >> 4) * 4
        addresses = frame[_ADDRESSES]
        flow = self._flows.get(addresses)
        if flow is None or flags & (_SYN | _ACK) == _SYN:
            flow = self._new(addresses)  # ports are used again: what is known of a connection before would mislead
        end = (sequence + payload + bool(flags & _SYN) + bool(flags & _FIN)) & 0xFFFFFFFF
        flow.sent = _later(flow.sent, end)
        if flags & _ACK:
            flow.awaits = _later(flow.awaits, ack)
        return Segment(flow, end, ack, flags, payload)

    def _new(self, addresses: bytes) -> Flow:
        there, back = Flow(addresses), Flow(addresses[4:8] + addresses[:4] + addresses[10:] + addresses[8:10])
        there.reverse, back.reverse = back, there
        for flow in (there, back):
            self._flows.pop(flow.addresses, None)
            self._flows[flow.addresses] = flow
        while len(self._flows) > _FLOWS_MAX:
            del self._flows[next(iter(self._flows))]
        return there

    @staticmethod
    def passed(segment: Segment) -> None:
        """Note down that the segment is on its way to its receiver."""
        flow = segment.flow
        flow.reverse.awaits = _later(flow.reverse.awaits, segment.end)
        if segment.flags & RST:
            flow.ended = flow.reverse.ended = True
        elif segment.flags & _FIN:
            flow.ended = True

    def refuse_all(self) -> list[Flow]:
        """Give up every open connection; both flows of each."""
        refused = [flow for flow in self._flows.values() if flow.open]
        for flow in refused:
            flow.refused = True
        return refused


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def reset_frame(receiver: Flow, target_mac: bytes, source_mac: bytes, sequence: int) -> bytes:
    """A TCP reset for the sender of the flow `receiver`, as if from the other end of the connection.

    It acknowledges all that was sent: a connection that is still being opened obeys only then.
    """
    source, target = receiver.addresses[4:8], receiver.addresses[:4]
    ports = receiver.addresses[10:] + receiver.addresses[8:10]
    tcp = ports + struct.pack(">LLBBHHH", sequence, receiver.sent or 0, 5 << 4, RST | _ACK, 0, 0, 0)
    tcp_sum = checksum(source + target + struct.pack(">HH", socket.IPPROTO_TCP, len(tcp)) + tcp)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, socket.IPPROTO_TCP, 0) + source + target
    return (
        target_mac
        + source_mac
        + b"\x08\x00"
        + ip[:10]
        + struct.pack(">H", checksum(ip))
        + ip[12:]
        + tcp[:16]
        + struct.pack(">H", tcp_sum)
        + tcp[18:]
    )
