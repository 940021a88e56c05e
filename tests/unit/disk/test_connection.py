# SPDX-License-Identifier: BSD-3-Clause
"""connection.py: requests end, with the right answer or an error, whatever the server does."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from content import pattern
from issues import reading, writing
from lab import Lab
from nbdprocess import NbdProcess, silent
from replication.disk.connection import Connection, Issue, Request
from replication.errors import DiskError
from waiting import DEADLINE_S, wait_until

SIZE = 8 << 20


def issue(connection: Connection, request: Issue, on_done: Callable[[Request], None] | None = None) -> Request:
    """Send a request as one that may not fit into the socket's buffer."""
    return connection.issue(request, 1 << 20, on_done)


@contextlib.contextmanager
def connected(server: NbdProcess, timeout_s: float = DEADLINE_S) -> Iterator[Connection]:
    """A connection with `timeout_s` for its requests; connecting itself has all the time that it needs."""
    connection = Connection(server.uri(), None, DEADLINE_S)
    connection.timeout_s = timeout_s
    try:
        yield connection
    finally:
        connection.close()


def test_many_threads_share_one_handle_and_each_gets_its_own_answer(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, delay={"read": "1ms"})
    with connected(server) as connection, ThreadPoolExecutor(12) as pool:

        def work(number: int) -> None:
            for round_ in range(30):
                data = pattern(number * 1000 + round_, 5000)
                connection.wait(issue(connection, writing(data, number * 8192)))
                buffer = bytearray(5000)
                connection.wait(issue(connection, reading(buffer, number * 8192)))
                assert buffer == data

        for end in [pool.submit(work, number) for number in range(12)]:
            end.result(DEADLINE_S)
        assert connection.in_flight == 0


def test_large_requests_fill_the_socket_and_still_end(lab: Lab) -> None:
    server = lab.endpoint(size=64 << 20)
    with connected(server) as connection, ThreadPoolExecutor(4) as pool:

        def work(number: int) -> None:
            data = pattern(number, 1 << 20) * 16
            connection.wait(issue(connection, writing(data, number << 24)))
            buffer = bytearray(16 << 20)
            connection.wait(issue(connection, reading(buffer, number << 24)))
            assert buffer == data

        for end in [pool.submit(work, number) for number in range(4)]:
            end.result(DEADLINE_S)


def test_what_the_server_refuses_fails_with_its_errno_and_the_connection_stays(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, error={"pwrite": "ENOSPC"})
    with connected(server) as connection:
        server.fail()
        with pytest.raises(DiskError, match="No space left") as refusal:
            connection.wait(issue(connection, writing(b"x" * 512)))
        assert refusal.value.errno == errno.ENOSPC
        server.work()
        connection.wait(issue(connection, writing(b"x" * 512)))
        assert not connection.dead


def test_what_libnbd_refuses_fails_and_the_connection_stays(lab: Lab) -> None:
    with connected(lab.endpoint(size=SIZE)) as connection:
        with pytest.raises(DiskError) as refusal:
            issue(connection, writing(b"x" * 512, SIZE))
        assert refusal.value.errno == errno.ENOSPC
        assert not connection.dead
        assert connection.in_flight == 0
        connection.wait(issue(connection, writing(b"x" * 512)))


def test_a_server_that_goes_away_in_mid_request_fails_all_requests_at_once(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, delay={"read": f"{DEADLINE_S:g}"})
    with connected(server) as connection, ThreadPoolExecutor(5) as pool:
        requests = [issue(connection, reading(bytearray(4096))) for _ in range(5)]
        ends = [pool.submit(connection.wait, request) for request in requests]
        begun = time.monotonic()
        server.kill()
        for end in ends:
            with pytest.raises(DiskError, match=r"endpoint\.sock"):
                end.result(DEADLINE_S)
        assert time.monotonic() - begun < DEADLINE_S / 2, "before the server would have answered"
        assert connection.in_flight == 0
        with pytest.raises(DiskError, match=r"endpoint\.sock"):
            issue(connection, reading(bytearray(4096)))
        assert connection.dead


def test_a_silent_server_is_given_up_and_the_buffer_is_nobody_elses_afterwards(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE)
    with connected(server, timeout_s=1.0) as connection:
        connection.wait(issue(connection, writing(b"\xaa" * 4096)))
        buffer = bytearray(4096)
        with silent(server):
            begun = time.monotonic()
            request = issue(connection, reading(buffer))
            with pytest.raises(DiskError, match=r"no progress on the connection .* for 1 s"):
                connection.wait(request)
            assert 0.95 < time.monotonic() - begun < DEADLINE_S / 2
            assert request.done
            buffer[:] = b"\x55" * 4096
        # The server works again and has answered: it takes another connection's request after that one.
        assert bytes(server.connect().pread(4096, 0)) == b"\xaa" * 4096
        connection.drive(0.01)
        assert buffer == b"\x55" * 4096


def test_an_idle_connection_to_a_silent_server_does_not_age(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE)
    with connected(server, timeout_s=1.0) as connection:
        connection.wait(issue(connection, writing(b"x")))
        until = time.monotonic() + 1.5
        wait_until(lambda: time.monotonic() > until, "longer than the timeout has passed")
        connection.drive(0)
        connection.wait(issue(connection, writing(b"y")))
        assert not connection.dead


def test_one_request_that_never_ends_is_given_up_although_others_make_progress(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, delay={"read": f"{DEADLINE_S:g}"})
    with connected(server, timeout_s=1.2) as connection:
        begun = time.monotonic()
        stuck = issue(connection, reading(bytearray(512)))

        def write_on() -> None:
            while time.monotonic() - begun < DEADLINE_S:
                connection.wait(issue(connection, writing(b"x" * 512)))

        with pytest.raises(DiskError, match="no progress"):
            write_on()
        assert 4 * 1.2 <= time.monotonic() - begun < DEADLINE_S / 2
        with pytest.raises(DiskError):
            connection.wait(stuck)


def test_who_calls_back_is_called_once_for_each_request(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE)
    done: list[Request] = []
    with connected(server) as connection:
        requests = [issue(connection, writing(b"x", number), done.append) for number in range(20)]
        while connection.in_flight:
            connection.drive(1.0)
        server.kill()
        with contextlib.suppress(DiskError):
            for number in range(3):
                requests.append(issue(connection, writing(b"x", number), done.append))
        while connection.in_flight:
            connection.drive(1.0)
        assert sorted(map(id, done)) == sorted(map(id, requests))


def test_failing_a_connection_fails_its_requests_with_the_first_cause(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE, delay={"read": "10"})
    with connected(server) as connection:
        request = issue(connection, reading(bytearray(10)))
        connection.fail("the first cause")
        connection.fail("another one")
        with pytest.raises(DiskError, match=r"^the first cause$"):
            connection.wait(request)
        assert connection.cause == "the first cause"


# -- connecting ------------------------------------------------------------------------------------------------------


def test_an_export_that_the_server_refuses_is_named(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    server = lab.qemu_nbd(image, export="there")
    with pytest.raises(DiskError, match="refuses the export 'elsewhere': No such file or directory"):
        Connection(server.uri("elsewhere"), None, DEADLINE_S)
    connection = Connection(server.uri("elsewhere"), "there", DEADLINE_S)
    assert connection.size == 4096
    connection.close()


def test_nobody_listening_is_an_error_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(DiskError, match="cannot connect to nbd\\+unix"):
        Connection(f"nbd+unix:///?socket={tmp_path}/nobody", None, DEADLINE_S)
    with pytest.raises(DiskError, match=r"cannot connect to nbd://127\.0\.0\.1:1"):
        Connection("nbd://127.0.0.1:1", None, DEADLINE_S)
    assert time.monotonic() - begun < DEADLINE_S / 2


def test_what_is_no_uri_is_an_error() -> None:
    with pytest.raises(DiskError, match="cannot connect to what"):
        Connection("what", None, DEADLINE_S)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (None, "no answer within 0.4 s"),
        (b"", "cannot connect"),
        (b"HTTP/1.0 400 Bad Request\r\n\r\n", "cannot connect"),
    ],
    ids=["silent", "closes", "speaks something else"],
)
def test_a_server_that_does_not_speak_nbd_is_an_error_in_time(tmp_path: Path, said: bytes | None, error: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        uri = f"nbd+unix:///?socket={tmp_path}/s"
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(Connection, uri, None, 0.4 if said is None else DEADLINE_S)
            client, _ = listener.accept()
            with client:
                if said is not None:
                    client.sendall(said)
                    client.shutdown(socket.SHUT_WR)
                with pytest.raises(DiskError, match=error):
                    end.result(DEADLINE_S)


def test_connections_leave_no_descriptors(lab: Lab) -> None:
    server = lab.endpoint(size=SIZE)
    # What other tests have left to the collector must not go in between.
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        with connected(server) as connection:
            connection.wait(issue(connection, writing(b"x")))
            if number % 2:
                connection.fail("on purpose")
        with pytest.raises(DiskError):
            Connection(f"nbd+unix:///?socket={server.socket_path}.nobody", None, DEADLINE_S)
    assert len(os.listdir("/proc/self/fd")) <= before
