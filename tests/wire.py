# SPDX-License-Identifier: BSD-3-Clause
"""Two hosts on one machine, and a network between them that fails when it is told to.

    host a  --veth--  relay  --veth--  host b

A host is a named network namespace with one address; a process started behind `Host.prefix` is on that host. The
relay is a process in a third namespace that passes frames from one AF_PACKET socket to the other and does to them
what `Wire.shape`, `cut`, `blackhole` and `reset` say. It is a process of its own, and not the kernel's netem, because
netem is a module that many kernels lack (a container's host, a minimal VM's), cannot reset connections, and cannot
repeat a run.

    with Wire(seed=1) as wire:
        server = subprocess.Popen([*wire.b.prefix, "nbdkit", ...])
        wire.shape(delay=50, loss=1)
        with wire.a.entered():
            handle.connect_uri(f"nbd://{wire.b.address}/disk0")

Invariants
* The relay owns the namespaces and removes them when it ends. It ends when it is told to, on SIGTERM, and when the
  process that opened the Wire is gone, however that died. What is left if the relay itself is killed is removed by
  `Wire.close`, or by the next relay.
* Every queue is bounded, and so is every wait for the relay.
* What happens to a frame depends on the seed, on the frames before it in its direction, and on the clock.

Not reproduced: frames are not corrupted or duplicated, and jitter does not change their order (`reorder` does).
Neighbour entries are permanent, as if the hosts were behind routers: silence is never turned into EHOSTUNREACH.
Needs root, /usr/bin/python3 with pyroute2, and nsenter.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import heapq
import itertools
import json
import math
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

PYTHON = "/usr/bin/python3"
"""Debian's, which has pyroute2; a test may run in another."""

DIRECTIONS = ("ab", "ba")
"""From host a to host b, and back."""

MTU = 9000
"""Bytes. Six times Ethernet's, because the relay's work is by the frame."""

QUEUE_BYTES = 256 << 10
"""What waits for the transmitter when there is a rate, as in a router; more is dropped."""

ANSWER_S = 10.0
"""Longest wait for the relay's answer to a command."""

START_S = 30.0
"""Longest wait for the two hosts to be there: a Python start and some dozens of system calls on a busy machine."""

_NETNS_FOLDER = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_MNT_DETACH = 2
_MESSAGE_BYTES_MAX = 64 << 10
_WIRE_NAME = re.compile(r"wire-(\d+)-\d+-[ab]")

_libc = ctypes.CDLL(None, use_errno=True)


class WireError(Exception):
    """The network could not be made, or could not do what it was told; the text says why."""


@dataclass(frozen=True)
class Shape:
    """What one direction does to frames; the default is a perfect network."""

    rate: float = 0.0
    """bit/s, counting whole frames; 0 is unlimited."""
    delay: float = 0.0
    """ms."""
    jitter: float = 0.0
    """ms; the delay is up to so much shorter or longer, evenly distributed, but frames keep their order."""
    loss: float = 0.0
    """Percent of the frames."""
    reorder: float = 0.0
    """Percent of the frames that skip the delay, and so overtake those before them, as netem does it."""
    queue: int = QUEUE_BYTES
    """Bytes that may wait for the transmitter."""

    def __post_init__(self) -> None:
        """ValueError if it cannot be."""
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
        if self.loss > 100 or self.reorder > 100:
            raise ValueError("loss and reorder are percentages: at most 100")
        if self.jitter > self.delay:
            raise ValueError("jitter must not be larger than the delay")
        if self.reorder and not self.delay:
            raise ValueError("reorder needs a delay: without one there is nothing to overtake")


@dataclass
class Counters:
    """What one direction has done since the start."""

    frames: int = 0
    """Passed on."""
    bytes: int = 0
    """Passed on, headers included."""
    payload: int = 0
    """Bytes of TCP data passed on, those sent again included."""
    lost: int = 0
    """Frames dropped by `loss`."""
    overflow: int = 0
    """Frames that found the queue full."""
    silenced: int = 0
    """Frames dropped by a black hole, a cut or a reset."""
    reordered: int = 0
    """Frames that skipped the delay."""
    overrun: int = 0
    """Frames dropped because the relay was too slow for them."""
    waiting: int = 0
    """Frames under way at this instant."""


# --- Namespaces -----------------------------------------------------------------------------------------------


def _check(result: int, what: str) -> None:
    """Raise OSError for a libc call that returned -1."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


@contextlib.contextmanager
def namespace_entered(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the calling thread, and only it, into the network namespace at `path`; back at the end.

    A socket belongs for good to the namespace in which it was made; a thread or a process started meanwhile too.
    """
    with open("/proc/thread-self/ns/net", "rb") as before, open(path, "rb") as wanted:
        _check(_libc.setns(wanted.fileno(), _CLONE_NEWNET), f"cannot enter {os.fspath(path)}")
        try:
            yield
        finally:
            _check(_libc.setns(before.fileno(), _CLONE_NEWNET), "cannot go back to the network namespace before")


def namespace_path(name: str) -> Path:
    """Where the namespace `name` is to be found."""
    return _NETNS_FOLDER / name


def remove_namespace(name: str) -> None:
    """Take the name away; the namespace goes with the last process in it. Nothing happens if it is gone already."""
    path = os.fspath(namespace_path(name))
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        _check(-1, f"cannot unmount {path}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_stale_namespaces() -> None:
    """Remove the hosts of test processes that are dead, as are their relays."""
    for name in os.listdir(_NETNS_FOLDER) if _NETNS_FOLDER.is_dir() else []:
        found = _WIRE_NAME.fullmatch(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            remove_namespace(name)


# --- The two hosts, as a test sees them -----------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """One of the two hosts."""

    name: str
    """`a` or `b`."""
    address: str
    """Its IPv4 address, known only on the two hosts."""
    namespace: str
    """The name under which `ip netns` knows it."""

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to run it on this host; it replaces itself, so the pid is the command's.

        Not `ip netns exec`: that gives the command a mount namespace of its own.
        """
        return ["nsenter", f"--net={namespace_path(self.namespace)}", "--"]

    def run(
        self, command: Sequence[str], timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here and wait for it; its output is captured. `check`: a failure raises CalledProcessError."""
        return subprocess.run([*self.prefix, *command], timeout=timeout_s, check=check, capture_output=True, text=True)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Be on this host, for the calling thread only: sockets that it makes, and connects, are this host's.

        libnbd makes its socket in the thread that calls `connect_uri`, `connect_tcp` or `aio_connect_uri`.
        """
        return namespace_entered(namespace_path(self.namespace))


HOSTS = {
    "a": ("10.77.0.1", "02:00:00:00:00:0a"),
    "b": ("10.77.0.2", "02:00:00:00:00:0b"),
}
"""Address and MAC address. They are the same in every Wire, which cannot see each other."""


class Control:
    """A conversation with a relay; raises WireError when it refuses, or does not answer within ANSWER_S.

    Raises PermissionError instead where the kernel did not let it make the network.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    def connected(cls, path: str | os.PathLike[str]) -> Control:
        """To a relay that listens at `path`; raises OSError if none does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(ANSWER_S)
            connection.connect(os.fspath(path))
        except OSError:
            connection.close()
            raise
        return cls(connection)

    def call(self, command: str, **arguments: Any) -> Any:
        """Have the relay do `command` and return its answer."""
        try:
            self._socket.settimeout(ANSWER_S)
            self._socket.send(json.dumps({"do": command, **arguments}).encode())
        except OSError as error:
            raise WireError(f"the relay is gone: {error.strerror or error}") from error
        return self.answer(ANSWER_S)

    def answer(self, timeout_s: float) -> Any:
        """The relay's next message."""
        self._socket.settimeout(timeout_s)
        try:
            message = self._socket.recv(_MESSAGE_BYTES_MAX)
        except TimeoutError:
            raise WireError(f"the relay has not answered within {timeout_s:g} s") from None
        except OSError as error:
            raise WireError(f"the relay is gone: {error.strerror or error}") from error
        if not message:
            raise WireError("the relay has ended")
        answer = json.loads(message)
        if answer.get("forbidden"):
            raise PermissionError(errno.EPERM, answer["error"])
        if "error" in answer:
            raise WireError(answer["error"])
        return answer["return"]

    def wait_end(self) -> None:
        """Return when the relay has ended, which it does after it has removed everything."""
        self._socket.settimeout(ANSWER_S)
        try:
            while self._socket.recv(_MESSAGE_BYTES_MAX):
                pass
        except TimeoutError:
            raise WireError(f"the relay has not ended within {ANSWER_S:g} s") from None
        except ConnectionError:
            return  # it ended with something of ours unread

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def hosts_of(name: str) -> dict[str, Host]:
    """The two hosts of the wire `name`."""
    return {host: Host(host, address, f"{name}-{host}") for host, (address, _) in HOSTS.items()}


def start_relay(
    name: str, seed: int, mtu: int = MTU, listen: str | None = None, log: Any = None
) -> tuple[subprocess.Popen[bytes], Control]:
    """Make the hosts `name`-a and `name`-b and the relay between them.

    With `listen` the relay is a daemon with a control socket at that path; without, it lives as long as the Control.
    `log` gets its standard error. Raises PermissionError without root, or in a container that is not allowed to do
    this, and WireError for all else.
    """
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "network namespaces need root")
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control = Control(ours)
    command = [PYTHON, os.path.abspath(__file__), name, str(seed), str(mtu), *([listen] if listen else [])]
    with its:
        # A session of its own: Ctrl-C ends the test, which then ends the relay in good order.
        process = subprocess.Popen(
            command, stdin=its, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True, cwd="/"
        )
    try:
        control.answer(START_S)
    except BaseException:
        control.close()
        end_relay(process)
        raise
    return process, control


def end_relay(process: subprocess.Popen[bytes], ended_s: float = 0.0) -> None:
    """End the relay if it does not end by itself within `ended_s`; raises WireError if it had to be killed."""
    for signal_number, patience_s in ((signal.SIGTERM, ended_s), (signal.SIGKILL, ANSWER_S)):
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal_number)
    process.wait(ANSWER_S)
    raise WireError(f"the relay did not end within {ANSWER_S:g} s and was killed")


class Wire:
    """Two hosts and the network between them, for one process and as long as that lives."""

    _serial = itertools.count()

    def __init__(self, seed: int = 0, mtu: int = MTU) -> None:
        """Make them. The same `seed` loses and reorders the same frames. Raises as start_relay."""
        self.name = f"wire-{os.getpid()}-{next(self._serial)}"
        hosts = hosts_of(self.name)
        self.a, self.b = hosts["a"], hosts["b"]
        self._relay, self._control = start_relay(self.name, seed, mtu)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The relay's process."""
        return self._relay.pid

    def shape(
        self,
        *,
        rate: float = 0,
        delay: float = 0,
        jitter: float = 0,
        loss: float = 0,
        reorder: float = 0,
        queue: int = QUEUE_BYTES,
        direction: str | None = None,
    ) -> None:
        """From now on frames meet with this, in both directions or in one; units as in Shape.

        What is not given is perfect again, so `shape()` undoes all shaping. The other direction stays as it is.
        """
        shape = Shape(rate, delay, jitter, loss, reorder, queue)
        self._control.call("shape", direction=direction, shape=asdict(shape))

    def cut(self) -> None:
        """Pull the cable: both hosts lose the carrier, what is under way is lost."""
        self._control.call("cut")

    def blackhole(self, direction: str | None = None) -> None:
        """Drop everything in both directions or in one; the hosts see a network in order."""
        self._control.call("blackhole", direction=direction)

    def mend(self) -> None:
        """End cut and blackhole; the shape stays."""
        self._control.call("mend")

    def reset(self) -> int:
        """Reset every open TCP connection on both ends, as a firewall does, and return how many there were.

        What is under way is lost. New connections are not affected.
        """
        return int(self._control.call("reset"))

    def counters(self) -> dict[str, Counters]:
        """By direction."""
        return {name: Counters(**values) for name, values in self._control.call("status")["counters"].items()}

    def close(self) -> None:
        """Remove both hosts; processes that still run there are left without a network. Can be called again."""
        self._control.close()
        try:
            end_relay(self._relay, ANSWER_S)
        finally:
            for host in (self.a, self.b):
                remove_namespace(host.namespace)


# --- The relay: TCP -------------------------------------------------------------------------------------------

_TCP_START, _TCP_END = 34, 54  # in a frame
_ADDRESSES = slice(26, 38)  # both IP addresses and both ports: what tells connections apart
_TCP_HEADER = struct.Struct(">LLBB")
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
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
        if segment.flags & _RST:
            flow.ended = flow.reverse.ended = True
        elif segment.flags & _FIN:
            flow.ended = True

    def refuse_all(self) -> list[Flow]:
        """Give up every open connection; both flows of each."""
        refused = [flow for flow in self._flows.values() if flow.open]
        for flow in refused:
            flow.refused = True
        return refused


def _checksum(data: bytes) -> int:
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
    tcp = ports + struct.pack(">LLBBHHH", sequence, receiver.sent or 0, 5 << 4, _RST | _ACK, 0, 0, 0)
    tcp_sum = _checksum(source + target + struct.pack(">HH", socket.IPPROTO_TCP, len(tcp)) + tcp)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, socket.IPPROTO_TCP, 0) + source + target
    return (
        target_mac
        + source_mac
        + b"\x08\x00"
        + ip[:10]
        + struct.pack(">H", _checksum(ip))
        + ip[12:]
        + tcp[:16]
        + struct.pack(">H", tcp_sum)
        + tcp[18:]
    )


# --- The relay: frames ----------------------------------------------------------------------------------------

_BATCH = 64  # frames of one direction before the other gets its turn
_FRAME_BYTES_MAX = 65536 + 14
_RECEIVE_BYTES = 16 << 20
_DELAYED_BYTES_MAX = 64 << 20
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 263, 6, 23
_SO_RCVBUFFORCE = 33
_ETH_P_ALL = 3


class Port:
    """The relay's end of the cable to one host."""

    def __init__(self, interface: str, mac: str) -> None:
        self.mac = bytes.fromhex(mac.replace(":", ""))
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ALL))
        self.socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
        self.socket.bind((interface, _ETH_P_ALL))
        self._overruns = 0

    def receive(self) -> bytes | None:
        """The next frame, if there is one. An interface that was just taken down says so once, and then nothing."""
        try:
            return self.socket.recv(_FRAME_BYTES_MAX)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENETDOWN:
                raise
            return None

    def send(self, frame: bytes) -> bool:
        """Put a frame on the cable; False if it finds no room, or the cable cut."""
        try:
            self.socket.send(frame)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ENETDOWN):
                raise
            return False
        return True

    def overruns(self) -> int:
        """Frames from the host that the kernel has dropped for want of room; its own count starts anew when read."""
        statistics = self.socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        _, dropped = struct.unpack("II", statistics)
        self._overruns += int(dropped)
        return self._overruns


@dataclass(order=True, slots=True)
class _Delayed:
    """A frame that waits for its time."""

    due: float
    serial: int
    frame: bytes = field(compare=False)
    segment: Segment | None = field(compare=False)


class Lane:
    """One direction: what arrives at `source` goes to `target`, or not. Times are in seconds, monotonic."""

    def __init__(self, source: Port, target: Port, flows: Flows, seed: str) -> None:
        self.source = source
        self.shape = Shape()
        self.silent = False
        self.counters = Counters()
        self._target = target
        self._flows = flows
        self._random = random.Random(seed)
        self._delayed: list[_Delayed] = []
        self._delayed_bytes = 0
        self._serial = 0
        self._sent_at = 0.0  # when the transmitter has sent all that waits for it
        self._last_due = 0.0
        self._unsent = 0

    @property
    def due(self) -> float:
        """When something is to be done next; infinity if nothing waits."""
        return self._delayed[0].due if self._delayed else math.inf

    def note_gauges(self) -> None:
        """Bring up to date what the counters get from elsewhere."""
        self.counters.overrun = self._unsent + self.source.overruns()
        self.counters.waiting = len(self._delayed)

    def drain(self, now: float) -> None:
        """Take what has arrived, up to a batch."""
        for _ in range(_BATCH):
            frame = self.source.receive()
            if frame is None:
                return
            self._arrived(frame, now)

    def deliver(self, now: float) -> None:
        """Pass on what is due."""
        while self._delayed and self._delayed[0].due <= now:
            delayed = heapq.heappop(self._delayed)
            self._delayed_bytes -= len(delayed.frame)
            self._pass(delayed.frame, delayed.segment)

    def forget(self, unwanted: Callable[[Segment | None], bool]) -> None:
        """Lose the frames under way that are `unwanted`."""
        kept = [delayed for delayed in self._delayed if not unwanted(delayed.segment)]
        self.counters.silenced += len(self._delayed) - len(kept)
        self._delayed_bytes = sum(len(delayed.frame) for delayed in kept)
        heapq.heapify(kept)
        self._delayed = kept

    def reset_source(self, flow: Flow, sequence: int) -> None:
        """Reset the connection whose sender is this lane's source."""
        self.source.send(reset_frame(flow, self.source.mac, self._target.mac, sequence))

    def _arrived(self, frame: bytes, now: float) -> None:
        segment = self._flows.segment(frame)
        if self.silent:
            self.counters.silenced += 1
        elif segment is not None and segment.flow.refused:
            self.counters.silenced += 1
            if not segment.flags & _RST:
                self.reset_source(segment.flow, segment.ack)
        elif self._chance(self.shape.loss):
            self.counters.lost += 1
        else:
            self._schedule(frame, segment, now)

    def _schedule(self, frame: bytes, segment: Segment | None, now: float) -> None:
        shape = self.shape
        if not (shape.rate or shape.delay or self._delayed):
            self._pass(frame, segment)
            return
        due = now
        if shape.rate:
            begin = max(now, self._sent_at)
            # Otherwise a frame larger than the whole queue could never pass.
            if begin > now and (begin - now) * shape.rate / 8 + len(frame) > shape.queue:
                self.counters.overflow += 1
                return
            due = self._sent_at = begin + len(frame) * 8 / shape.rate
        if self._delayed_bytes + len(frame) > _DELAYED_BYTES_MAX:
            self.counters.overflow += 1
            return
        if self._chance(shape.reorder):
            self.counters.reordered += 1
        else:
            due += (shape.delay + shape.jitter * self._random.uniform(-1, 1)) / 1000
            due = self._last_due = max(due, self._last_due)
        self._serial += 1
        self._delayed_bytes += len(frame)
        heapq.heappush(self._delayed, _Delayed(due, self._serial, frame, segment))

    def _chance(self, percent: float) -> bool:
        return bool(percent) and self._random.random() * 100 < percent

    def _pass(self, frame: bytes, segment: Segment | None) -> None:
        counters = self.counters
        if not self._target.send(frame):
            self._unsent += 1
            return
        counters.frames += 1
        counters.bytes += len(frame)
        if segment is not None:
            counters.payload += segment.payload
            self._flows.passed(segment)


# --- The relay: its process -----------------------------------------------------------------------------------

_SIOCETHTOOL = 0x8946
_OFFLOADS = {  # ETHTOOL_S... of linux/ethtool.h
    "transmit checksums": 0x17,
    "scatter-gather": 0x19,
    "TCP segmentation": 0x1F,
    "generic segmentation": 0x24,
}
_CLIENTS_MAX = 8


def _without_offloads(interface: str) -> None:
    """Have the kernel finish its frames: the relay would else see segments of 64 KiB without a checksum."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        for what, command in _OFFLOADS.items():
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            try:
                fcntl.ioctl(anything, _SIOCETHTOOL, request)
            except OSError as error:
                raise WireError(f"cannot turn off {what} on {interface}: {error.strerror}") from error


class Relay:
    """The process between the hosts: makes them, passes frames, and removes them."""

    def __init__(self, name: str, seed: int, mtu: int) -> None:
        self._name = name
        self._seed = seed
        self._mtu = mtu
        self._made: list[str] = []
        self._cut = False
        self._ended = False
        self._clients: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._flows = Flows()
        self._lanes: dict[str, Lane] = {}

    def make(self) -> None:
        """Make the hosts, the cables, and the namespace in which the relay is, which goes with the process."""
        # Here, so that the tests themselves do not need it: it takes a quarter of a second to load.
        from pyroute2 import IPRoute, netns  # noqa: PLC0415

        remove_stale_namespaces()
        _check(_libc.unshare(_CLONE_NEWNET), "cannot make a network namespace")
        # Before there is an interface. IPv6 would send things that no test has asked for.
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1", encoding="ascii")
        with IPRoute() as route:
            for name, host in hosts_of(self._name).items():
                remove_namespace(host.namespace)  # of a relay that was killed
                self._made.append(host.namespace)
                netns.create(host.namespace)
                mac = HOSTS[name][1]
                peer = {"ifname": "eth0", "net_ns_fd": host.namespace, "address": mac, "mtu": self._mtu}
                route.link("add", ifname=name, kind="veth", mtu=self._mtu, peer=peer)
                route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
                self._furnish(host)
        ports = {name: Port(name, mac) for name, (_, mac) in HOSTS.items()}
        for name in DIRECTIONS:
            self._lanes[name] = Lane(ports[name[0]], ports[name[1]], self._flows, f"{self._seed} {name}")

    @staticmethod
    def _furnish(host: Host) -> None:
        """Give a host its address and its loopback."""
        from pyroute2 import IPRoute  # noqa: PLC0415

        with host.entered(), IPRoute() as route:
            Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("1", encoding="ascii")
            _without_offloads("eth0")
            (index,) = route.link_lookup(ifname="eth0")
            route.addr("add", index=index, address=host.address, prefixlen=24)
            route.link("set", index=index, state="up")
            route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
            for name, (address, mac) in HOSTS.items():
                if name != host.name:
                    route.neigh("add", dst=address, lladdr=mac, ifindex=index, state=0x80)  # NUD_PERMANENT

    def listen(self, path: str) -> None:
        """Take commands at a socket as well, for root only; raises WireError if another relay does already."""
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            Control.connected(path).close()
            raise WireError(f"a relay listens at {path} already")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a relay that was killed
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        mask = os.umask(0o077)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        self._listener = listener
        listener.listen(_CLIENTS_MAX)

    def unmake(self) -> None:
        """Remove the hosts and the control socket."""
        for namespace in self._made:
            remove_namespace(namespace)
        if self._listener is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._listener.getsockname())

    def run(self, parent: socket.socket) -> None:
        """Pass frames and obey until `end`, or, unless there is a socket to listen at, until the parent is gone."""
        self._clients = [parent]
        by_socket = {lane.source.socket: lane for lane in self._lanes.values()}
        while not self._ended:
            due = min(lane.due for lane in by_socket.values())
            timeout_s = None if due == math.inf else max(0.0, due - time.monotonic())
            listeners = [self._listener] if self._listener and len(self._clients) < _CLIENTS_MAX else []
            # select, because epoll counts in milliseconds.
            readable, _, _ = select.select([*by_socket, *listeners, *self._clients], [], [], timeout_s)
            for lane in by_socket.values():
                lane.deliver(time.monotonic())
            for ready in readable:
                if ready in by_socket:
                    by_socket[ready].drain(time.monotonic())
                elif ready is self._listener:
                    self._clients.append(ready.accept()[0])
                else:
                    self._serve(ready)
            if parent not in self._clients and self._listener is None:
                return

    def _serve(self, client: socket.socket) -> None:
        """Do one command of a client's and answer it; drop one that has gone or does not take its answers."""
        try:
            message = client.recv(_MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
            if message:
                client.send(json.dumps(self._answer(message)).encode(), socket.MSG_DONTWAIT)
                return
        except OSError as error:
            print(f"relay: a client was dropped: {error.strerror}", file=sys.stderr)
        self._clients.remove(client)
        client.close()

    def _answer(self, message: bytes) -> dict[str, Any]:
        commands: dict[str, Callable[..., Any]] = {
            "blackhole": self._do_blackhole,
            "cut": self._do_cut,
            "end": self._do_end,
            "mend": self._do_mend,
            "reset": self._do_reset,
            "shape": self._do_shape,
            "status": self._do_status,
        }
        try:
            request = json.loads(message)
            command = request.pop("do") if isinstance(request, dict) and "do" in request else None
            if command not in commands:
                raise WireError(f"there is no command {command!r}")
            return {"return": commands[command](**request)}
        except (WireError, ValueError, TypeError) as error:
            return {"error": str(error)}

    def _chosen(self, direction: str | None) -> list[Lane]:
        if direction is None:
            return list(self._lanes.values())
        if direction not in self._lanes:
            raise WireError(f"there is no direction {direction!r}: {' and '.join(DIRECTIONS)} are the two")
        return [self._lanes[direction]]

    def _do_shape(self, shape: dict[str, Any], direction: str | None = None) -> None:
        for lane in self._chosen(direction):
            lane.shape = Shape(**shape)

    def _do_blackhole(self, direction: str | None = None) -> None:
        for lane in self._chosen(direction):
            lane.silent = True
            lane.forget(lambda _: True)

    def _do_cut(self) -> None:
        self._set_cables("down")
        self._cut = True
        for lane in self._lanes.values():
            lane.forget(lambda _: True)

    def _do_mend(self) -> None:
        for lane in self._lanes.values():
            lane.silent = False
        if self._cut:
            self._set_cables("up")
            self._cut = False

    def _do_reset(self) -> int:
        if self._cut or any(lane.silent for lane in self._lanes.values()):
            raise WireError("a reset could not get through: mend the network first")
        refused = self._flows.refuse_all()
        for lane in self._lanes.values():
            lane.forget(lambda segment: segment is not None and segment.flow.refused)
        lanes = {socket.inet_aton(HOSTS[name[0]][0]): lane for name, lane in self._lanes.items()}
        for flow in refused:
            lanes[flow.addresses[:4]].reset_source(flow, flow.awaits or 0)
        return len(refused) // 2

    def _do_status(self) -> dict[str, Any]:
        for lane in self._lanes.values():
            lane.note_gauges()
        silent = [name for name, lane in self._lanes.items() if lane.silent]
        return {
            "name": self._name,
            "pid": os.getpid(),
            "seed": self._seed,
            "mtu": self._mtu,
            "link": "cut" if self._cut else "black hole " + " and ".join(silent) if silent else "up",
            "hosts": {name: asdict(host) for name, host in hosts_of(self._name).items()},
            "shapes": {name: asdict(lane.shape) for name, lane in self._lanes.items()},
            "counters": {name: asdict(lane.counters) for name, lane in self._lanes.items()},
        }

    def _do_end(self) -> None:
        self._ended = True

    @staticmethod
    def _set_cables(state: str) -> None:
        """Take the relay's ends up or down; the hosts' ends lose their carrier with them."""
        from pyroute2 import IPRoute  # noqa: PLC0415

        with IPRoute() as route:
            for name in HOSTS:
                route.link("set", index=route.link_lookup(ifname=name)[0], state=state)


def main(name: str, seed: str, mtu: str, listen: str | None = None) -> int:
    """The relay's process; standard input is the parent's socket, which hears when all is made, or why it is not."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    parent = socket.socket(fileno=0)
    relay = Relay(name, int(seed), int(mtu))
    try:
        try:
            if listen is not None:
                relay.listen(listen)
            relay.make()
        except Exception as error:  # noqa: BLE001
            # Whatever it is (pyroute2 has exceptions of its own): the parent is the one to tell.
            text = (error.strerror if isinstance(error, OSError) else None) or str(error)
            message = {"error": f"cannot make the network: {text}", "forbidden": isinstance(error, PermissionError)}
            parent.send(json.dumps(message).encode())
            return 1
        parent.send(json.dumps({"return": None}).encode())
        relay.run(parent)
    finally:
        # From here on nothing may keep the namespaces from being removed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        relay.unmake()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
