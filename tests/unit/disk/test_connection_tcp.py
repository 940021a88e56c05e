# SPDX-License-Identifier: BSD-3-Clause
"""connection.py over TCP and TLS: what counts as progress, the kernel's own deadlines, and libnbd's reading."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from certificates import Authority, EndpointWithTwoDoors, psk_file
from content import pattern
from issues import reading, writing
from lab import Lab
from nbdprocess import stop_still
from replication.disk.connection import Connection, Request
from replication.errors import DiskError
from replication.tls import Tls
from waiting import DEADLINE_S, wait_until

SIZE = 8 << 20


def write(connection: Connection, data: bytes, offset: int = 0) -> None:
    connection.wait(connection.issue(writing(data, offset), len(data)))


def read(connection: Connection, length: int, offset: int = 0) -> bytes:
    buffer = bytearray(length)
    connection.wait(connection.issue(reading(buffer, offset), 0, None, length))
    return bytes(buffer)


@contextlib.contextmanager
def connected(uri: str, timeout_s: float = DEADLINE_S, tls: Tls | None = None) -> Iterator[Connection]:
    """A connection with `timeout_s` for its requests; connecting itself has all the time that it needs."""
    connection = Connection(uri, None, DEADLINE_S, tls)
    connection.timeout_s = timeout_s
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture
def plain(lab: Lab) -> EndpointWithTwoDoors:
    return lab.start(EndpointWithTwoDoors(lab.folder, size=SIZE))


@pytest.fixture
def secret(lab: Lab) -> tuple[EndpointWithTwoDoors, Tls]:
    """A server that demands TLS with a PSK, and what to connect with."""
    psk = psk_file(lab.folder / "psk", "pair")
    options = ["--tls=require", f"--tls-psk={psk}"]
    return lab.start(EndpointWithTwoDoors(lab.folder, size=SIZE, options=options)), Tls(None, str(psk), "pair")


class Middle:
    """A TCP port that hands on what it gets, at `rate` bytes a second towards `slow` ("server" or "client"), and holds
    back what the server says beyond `hold` bytes until `let_go`."""

    def __init__(self, port: int, slow: str = "", rate: int = 1 << 30) -> None:
        self._rates = {"server": 1 << 30, "client": 1 << 30}
        if slow:
            self._rates[slow] = rate
        self._target = port
        self._listener = socket.socket()
        # Small, so that the kernel acknowledges little more than has been handed on.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port = int(self._listener.getsockname()[1])
        self.hold: int | None = None
        """Bytes of the server that may still pass."""
        self.from_client = 0
        self.held = threading.Event()
        self._go_on = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        server.connect(("127.0.0.1", self._target))
        self._sockets += [client, server]
        for end in self._sockets:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink, towards in ((client, server, "server"), (server, client, "client")):
            thread = threading.Thread(target=self._hand_on, args=(source, sink, towards), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _hand_on(self, source: socket.socket, sink: socket.socket, towards: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(8 << 10):
                if towards == "server":
                    self.from_client += len(data)
                elif self.hold is not None and not self._go_on.is_set():
                    now, data = data[: self.hold], data[self.hold :]
                    self.hold -= len(now)
                    sink.sendall(now)
                    if data:
                        self.held.set()
                        assert self._go_on.wait(DEADLINE_S)
                time.sleep(len(data) / self._rates[towards])
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def let_go(self) -> None:
        """Hand on what was held back."""
        self._go_on.set()

    def close(self) -> None:
        self._go_on.set()
        for end in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(DEADLINE_S)


@pytest.fixture
def between() -> Iterator[Callable[..., Middle]]:
    """Makes Middles."""
    with contextlib.ExitStack() as opened:

        def made(port: int, slow: str = "", rate: int = 1 << 30) -> Middle:
            middle = Middle(port, slow, rate)
            opened.callback(middle.close)
            return middle

        yield made


@contextlib.contextmanager
def stopped(server: EndpointWithTwoDoors) -> Iterator[None]:
    """The server stands still, and is killed in the end: with many requests in flight, nbdkit 1.32 may abort when it
    goes on and finds its client gone."""
    try:
        stop_still(server)
        yield
    finally:
        server.kill()


# -- the kernel's deadlines --------------------------------------------------------------------------------------------


def kernel_deadlines(connection: Connection) -> tuple[int, ...]:
    found = connection._socket
    assert found is not None
    options = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    asked = [found.getsockopt(socket.IPPROTO_TCP, option) for option in options]
    return (*asked, found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))


@pytest.mark.parametrize(
    ("timeout_s", "expected"),
    [
        (0.1, (0, 1, 1, 1, 1)),
        (5.0, (0, 2, 1, 3, 1)),
        (10.0, (0, 5, 1, 5, 1)),
        (30.0, (0, 15, 5, 3, 1)),
    ],
)
def test_the_kernel_gives_a_silent_peer_up_when_the_timeout_is_over(
    plain: EndpointWithTwoDoors, timeout_s: float, expected: tuple[int, ...]
) -> None:
    """Whichever timeout the owner sets, and whenever."""
    with connected(plain.tcp_uri("nbd"), 7.0) as connection:
        before = kernel_deadlines(connection)
        connection.timeout_s = timeout_s
        assert kernel_deadlines(connection) == expected != before
        _, idle_s, every_s, count, _ = expected
        assert idle_s + count * every_s <= max(2.0, timeout_s), "seconds until the last sign of life was asked for"
        assert connection.timeout_s == timeout_s
        found = connection._socket
        assert found is not None
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    connection.timeout_s = 1.0  # after `close`, it is only a number


def test_the_time_for_answers_leaves_the_kernel_its_own(plain: EndpointWithTwoDoors) -> None:
    with connected(plain.tcp_uri("nbd"), 7.0) as connection:
        before = kernel_deadlines(connection)
        connection.wait_for_answers(3600.0)
        assert (connection.timeout_s, kernel_deadlines(connection)) == (3600.0, before)
        write(connection, b"x")
        wait_until(lambda: connection.owing_s is None, "all is acknowledged")
    assert connection.owing_s is None


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["server", "client"])
@pytest.mark.parametrize("requests", [1, 8])
def test_a_slow_link_that_moves_bytes_is_not_lost(
    lab: Lab, between: Callable[..., Middle], direction: str, requests: int
) -> None:
    """2 MiB take more than the four timeouts that one request has on a server, in one request or in many."""
    # One thread: else the answer to the first may come last, which is more than four timeouts after its own bytes.
    plain = lab.start(EndpointWithTwoDoors(lab.folder, size=SIZE, options=["--threads=1"]))
    timeout_s = 1.5  # much less, and it is lost when this process gets no core
    middle = between(plain.port, direction, 300_000)
    with connected(f"nbd://127.0.0.1:{middle.port}", timeout_s) as connection:
        length = (2 << 20) // requests
        begun = time.monotonic()
        buffers = [bytearray(pattern(number, length)) for number in range(requests)]
        issued = []
        for number, buffer in enumerate(buffers):
            if direction == "server":
                issued.append(connection.issue(writing(bytes(buffer), number * length), length))
            else:
                issued.append(connection.issue(reading(buffer, number * length), 0, None, length))
        for request in issued:
            connection.wait(request)
        assert time.monotonic() - begun > 4 * timeout_s
        if direction == "client":
            assert not any(map(any, buffers))
    with connected(plain.tcp_uri("nbd")) as connection:
        expected = b"".join(map(bytes, buffers))
        assert read(connection, 2 << 20) == expected


def test_a_peer_that_takes_a_little_at_a_time_is_not_lost(
    plain: EndpointWithTwoDoors, between: Callable[..., Middle]
) -> None:
    """Its window is shut for longer than the kernel waits before it probes, and never open for a whole segment."""
    middle = between(plain.port, "server", 60_000)
    with connected(f"nbd://127.0.0.1:{middle.port}", 3.0) as connection:
        begun = time.monotonic()
        write(connection, b"x" * (500 << 10))
        assert time.monotonic() - begun > 2 * 3.0


def test_a_stopped_server_is_given_up_although_its_kernel_goes_on_acknowledging(plain: EndpointWithTwoDoors) -> None:
    """Every later write is acknowledged; the first one is not nearer to its end by that."""
    with connected(plain.tcp_uri("nbd"), 2.0) as connection, ThreadPoolExecutor(1) as pool:
        write(connection, b"x")
        with stopped(plain):
            begun = time.monotonic()
            first = pool.submit(write, connection, b"y" * 4096)
            written = 0

            def write_on() -> None:
                nonlocal written
                while time.monotonic() - begun < DEADLINE_S:
                    connection.issue(writing(b"z" * 512, 4096), 512)
                    written += 1
                    time.sleep(0.05)

            with pytest.raises(DiskError):
                write_on()
            lost_s = time.monotonic() - begun
            with pytest.raises(DiskError, match=r"no progress on the connection to .* for 2 s"):
                first.result(DEADLINE_S)
        assert 2.0 <= lost_s < 4 * 2.0, "well before the limit of a request"
        assert written > 5


def test_a_stopped_server_with_a_request_too_large_for_its_buffers_is_given_up(plain: EndpointWithTwoDoors) -> None:
    with connected(plain.tcp_uri("nbd"), 2.0) as connection, stopped(plain):
        begun = time.monotonic()
        with pytest.raises(DiskError):
            write(connection, bytes(SIZE))
        assert 2.0 <= time.monotonic() - begun < 4 * 2.0, "well before the limit of a request"


def test_a_server_that_never_answers_one_request_is_given_up_although_bytes_move(lab: Lab) -> None:
    server = lab.start(EndpointWithTwoDoors(lab.folder, size=SIZE, delay={"read": f"{DEADLINE_S:g}"}))
    with connected(server.tcp_uri("nbd"), 1.2) as connection:
        begun = time.monotonic()
        stuck = connection.issue(reading(bytearray(512)), 0, None, 512)

        def write_on() -> None:
            while time.monotonic() - begun < DEADLINE_S:
                write(connection, b"x" * 512, 4096)

        with pytest.raises(DiskError, match="no progress"):
            write_on()
        assert 4 * 1.2 <= time.monotonic() - begun < DEADLINE_S / 2
        with pytest.raises(DiskError):
            connection.wait(stuck)


# -- TLS ---------------------------------------------------------------------------------------------------------------

Secret = tuple[EndpointWithTwoDoors, Tls]


def test_many_threads_share_one_handle_over_tls(secret: Secret) -> None:
    """Requests below, at and above the size of a TLS record, each with its own content."""
    server, tls = secret
    with connected(server.tcp_uri(), 10.0, tls) as connection, ThreadPoolExecutor(8) as pool:

        def work(number: int) -> None:
            for round_ in range(25):
                length = (700, 4096, 16384, 50_000, 300_000)[(number + round_) % 5]
                data = pattern(number * 1000 + round_, length)
                write(connection, data, number << 20)
                assert read(connection, length, number << 20) == data

        begun = time.monotonic()
        for end in [pool.submit(work, number) for number in range(8)]:
            end.result(DEADLINE_S)
        assert connection.in_flight == 0
        assert time.monotonic() - begun < 20, "no answer lay there unread until something else happened"


def test_one_thread_alone_over_tls(secret: Secret) -> None:
    """The forwarder's calls: write_alone, drain_alone, nap and drive, with many writes in flight."""
    server, tls = secret
    with connected(server.tcp_uri(), 10.0, tls) as connection:
        ended: list[Request] = []
        model = bytearray(SIZE)
        for number in range(600):
            length = (512, 4096, 20_000, 70_000)[number % 4]
            offset = number % 64 << 17
            data = pattern(number, length)
            while connection.in_flight >= 16:
                connection.drive(1.0)
            connection.write_alone(data, offset, 0, ended.append)
            # The server may reorder writes to one place that are in flight together.
            while connection.in_flight and number % 48 == 47:
                connection.nap(0.0005)
                connection.drain_alone()
                connection.check_progress()
            model[offset : offset + length] = data
        while connection.in_flight:
            connection.drive(1.0)
        assert len(ended) == 600
        assert not any(request.errno for request in ended)
        assert read(connection, SIZE) == model


@pytest.mark.parametrize("alone", [False, True], ids=["shared", "alone"])
def test_half_a_tls_record_does_not_keep_the_next_request_back(
    secret: Secret, between: Callable[..., Middle], alone: bool
) -> None:
    """
    client                      link                        server
    write 1                 --> write 1                 --> answer 1
    half a record           <-- the rest is held back   <--
    write 2                 --> has to arrive
                                the rest                -->
    """
    server, tls = secret
    middle = between(server.port)
    with connected(f"nbds://127.0.0.1:{middle.port}", 10.0, tls) as connection:
        write(connection, b"x")
        ended: list[Request] = []

        def send(offset: int) -> None:
            if alone:
                connection.write_alone(b"y" * 100, offset, 0, ended.append)
            else:
                connection.issue(writing(b"y" * 100, offset), 100, ended.append)

        def drive() -> None:
            if alone:
                connection.drain_alone()
            else:
                connection.drive(0.01)

        middle.hold = 9
        send(0)
        assert middle.held.wait(DEADLINE_S)
        assert select.select([connection._fd], [], [], DEADLINE_S)[0]
        drive()
        before = middle.from_client
        send(4096)
        wait_until(lambda: middle.from_client > before, "the second request is on its way")
        assert not ended
        middle.let_go()
        wait_until(lambda: drive() or len(ended) == 2, "both are answered")
        assert [request.errno for request in ended] == [0, 0]


def hanging_server(said: bytes, enough: threading.Event) -> tuple[socket.socket, threading.Thread]:
    """One that takes STARTTLS, says `said` of TLS, and then nothing until it closes the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
            client.recv(4 + 16, socket.MSG_WAITALL)
            client.sendall(struct.pack(">QIII", 0x3E889045565A9, 5, 1, 0) + said)
            enough.wait(DEADLINE_S)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return listener, thread


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x03\x00\x7a\x02"], ids=["nothing", "a part of its hello"])
def test_a_handshake_that_hangs_ends_in_time(said: bytes) -> None:
    enough = threading.Event()
    listener, thread = hanging_server(said, enough)
    with listener:
        begun = time.monotonic()
        with pytest.raises(DiskError, match=r"cannot connect to nbds://.*: no answer within 0\.5 s"):
            Connection(f"nbds://127.0.0.1:{listener.getsockname()[1]}", None, 0.5)
        assert 0.5 <= time.monotonic() - begun < DEADLINE_S / 2
    enough.set()
    thread.join(DEADLINE_S)
    # GnuTLS lets go of the handle now, and not only after its 40 s.
    wait_until(lambda: not any(left.name == "tls-connect" for left in threading.enumerate()), "it ends", 30.0)


def test_who_is_refused_for_its_certificate_is_asked_again_only_within_the_deadline(tmp_path: Path, lab: Lab) -> None:
    """The server hangs when it is asked what is wrong with its certificate: the answer is vaguer, and in time."""
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    options = ["--tls=require", f"--tls-certificates={theirs.server()}"]
    server = lab.start(EndpointWithTwoDoors(lab.folder, size=SIZE, options=options))
    tls = Tls(str(ours.client()))
    with pytest.raises(DiskError, match="its CA is not the one in"):
        Connection(server.tcp_uri(), None, DEADLINE_S, tls)
    real = socket.create_connection

    def stopped(*arguments: object, **options: object) -> socket.socket:
        stop_still(server)
        return real(*arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", stopped)
        begun = time.monotonic()
        try:
            with pytest.raises(DiskError, match="of another CA, expired, or of another host"):
                Connection(server.tcp_uri(), None, 4.0, tls)  # of which the handshake needs a part
            assert time.monotonic() - begun < 4 * 4.0
        finally:
            os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["none", "memory"])
@pytest.mark.parametrize("where", ["start", "body"])
def test_a_connection_over_tls_that_gets_no_thread_or_no_memory_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(*((threading.Thread, "start") if where == "start" else (Connection, "_connect")), fail)
    begun = time.monotonic()
    with pytest.raises(DiskError):
        Connection("nbds://localhost:1", None, DEADLINE_S, Tls())
    assert time.monotonic() - begun < DEADLINE_S / 2
