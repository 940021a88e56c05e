# SPDX-License-Identifier: BSD-3-Clause
"""Who may read, and what they get."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority
from fakenode import FakeNode
from replication.errors import ConfigError
from replication.monitor import web
from replication.monitor.access import Access, make_access
from replication.monitor.fleet import Fleet
from replication.monitor.page import POLICY
from replication.monitor.service import Given, split_node
from replication.monitor.web import WebServer
from waiting import DEADLINE_S, begin, wait_until

Nodes = Callable[..., FakeNode]
Fleets = Callable[..., Fleet]
TOKEN = "0123456789abcdef-token"


@contextlib.contextmanager
def serving(fleet: Fleet, access: Access | None = None) -> Iterator[WebServer]:
    server = WebServer(fleet, access or make_access("127.0.0.1:0"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(DEADLINE_S)
        server.server_close()


def get(
    server: WebServer, path: str, method: str = "GET", tls: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, str, bytes]:
    """Code, type and body."""
    if tls is None:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=DEADLINE_S)
    else:
        connection = http.client.HTTPSConnection("localhost", server.server_port, timeout=DEADLINE_S, context=tls)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Content-Type", ""), answer.read()


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\nignored\n")
    path.chmod(0o640)
    return str(path)


def test_what_is_served(node: Nodes, fleet: Fleets) -> None:
    there = node("a", "secondary")
    watched = fleet({"a": str(there.path), "gone": "/nowhere"})
    wait_until(lambda: watched.watchers()[0].sight.up, "it is up")
    with serving(watched) as server:
        code, kind, body = get(server, "/metrics")
        assert (code, kind.partition(";")[0]) == (200, "text/plain")
        assert b'nbdkit_replication_up{node="a"} 1.0' in body
        state = json.loads(get(server, "/api/state")[2])
        assert [(one["name"], one["up"]) for one in state["nodes"]] == [("a", True), ("gone", False)]
        assert state["nodes"][0]["failover"]["allowed"] is True
        assert state["nodes"][1]["trouble"] == "No such file or directory"
        # It comes a moment after the node is seen.
        wait_until(watched.watchers()[0].journal.events, "the first event")
        assert [one["event"] for one in json.loads(get(server, "/api/events?node=a")[2])] == ["MONITOR_NODE_UP"]
        assert json.loads(get(server, "/api/events?node=gone")[2]) == []
        assert set(json.loads(get(server, "/api/samples")[2])) == {"a", "gone"}
        code, kind, body = get(server, "/")
        assert (code, kind) == (200, "text/html; charset=utf-8")
        assert not re.findall(rb"(?:src|href)=.(?!/metrics|data:,|#nodes)", body), "something from elsewhere"
        script = re.findall(rb"<script>(.*?)</script>", body, re.DOTALL)
        assert len(script) == 1
        assert base64.b64encode(hashlib.sha256(script[0]).digest()).decode() in POLICY
        assert get(server, "/metrics", "HEAD")[2] == b""
        assert get(server, "/api/stream", "HEAD")[0] == 404
        assert get(server, "/../etc/passwd")[0] == 404
        assert get(server, "/metrics", "POST")[0] == 501


def test_the_stream_tells_what_happens(node: Nodes, fleet: Fleets) -> None:
    there = node()
    watched = fleet({"a": str(there.path)})
    wait_until(lambda: watched.watchers()[0].sight.up, "it is up")
    with serving(watched) as server, socket.create_connection(("127.0.0.1", server.server_port), DEADLINE_S) as client:
        client.sendall(b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        stream = client.makefile("rb")

        def told(kind: str, fits: Callable[[Any], bool] = lambda data: True) -> Any:
            for line in stream:
                if line == f"event: {kind}\n".encode():
                    data = json.loads(stream.readline().removeprefix(b"data: "))
                    if fits(data):
                        return data
            raise AssertionError("the stream has ended")

        assert told("state")["nodes"][0]["name"] == "a"
        there.emit("REPLICATION_LINK", state="lost")
        assert told("event", lambda data: data["event"] == "REPLICATION_LINK")["data"] == {"state": "lost"}
        there.die()
        assert told("node", lambda data: not data["up"])["name"] == "a"
        watched.stop()
        assert stream.read().endswith(b"\n")  # it ends, and after a whole line


def test_requests_and_streams_are_bounded(fleet: Fleets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "REQUESTS_MAX", 2)
    monkeypatch.setattr(web, "STREAMS_MAX", 1)
    watched = fleet({})
    with serving(watched) as server, contextlib.ExitStack() as held:
        stream = held.enter_context(socket.create_connection(("127.0.0.1", server.server_port), DEADLINE_S))
        stream.sendall(b"GET /api/stream HTTP/1.0\r\n\r\n")
        assert stream.recv(1)
        assert get(server, "/api/stream")[0] == 503
        slow = held.enter_context(socket.create_connection(("127.0.0.1", server.server_port), DEADLINE_S))
        wait_until(lambda: not _served(server), "the slow one has the last place")
        slow.close()
        wait_until(lambda: _served(server), "there is a place again")
        watched.stop()


def _served(server: WebServer) -> bool:
    with contextlib.suppress(http.client.HTTPException, OSError):
        return get(server, "/metrics")[0] == 200
    return False


def test_a_page_of_a_stranger_cannot_read_over_a_name_of_its_own(fleet: Fleets) -> None:
    with serving(fleet({})) as server:
        assert get(server, "/metrics", Host="evil.example:80")[0] == 421
        for host in ("localhost:1", "127.0.0.1", "[::1]:10810", "LOCALHOST"):
            assert get(server, "/metrics", Host=host)[0] == 200, host


def test_a_token_over_tls(fleet: Fleets, token_file: str, tmp_path: Path) -> None:
    folder = Authority(tmp_path).server()
    access = make_access("127.0.0.1:0", token_file, str(folder / "server-cert.pem"), str(folder / "server-key.pem"))
    trusting = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
    basic = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
    with serving(fleet({}), access) as server:
        for header, code in (
            (f"Bearer {TOKEN}", 200),
            (f"Basic {basic}", 200),
            (f"Bearer {TOKEN}x", 401),
            ("Basic ???", 401),
            ("Basic " + base64.b64encode(TOKEN.encode()).decode(), 401),
            (TOKEN, 401),
            ("", 401),
        ):
            assert get(server, "/metrics", tls=trusting, Authorization=header)[0] == code, header
        assert get(server, "/api/state", tls=trusting)[0] == 401
        # Who says nothing, or does not speak TLS, delays nobody.
        with socket.create_connection(("127.0.0.1", server.server_port)), contextlib.suppress(OSError):
            plain = begin(get, server, "/metrics")
            assert get(server, "/metrics", tls=trusting, Authorization=f"Bearer {TOKEN}")[0] == 200
            assert plain.exception(DEADLINE_S) is not None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("0.0.0.0:1",), "needs --tls-certificate and --token-file"),
        (("monitor.example:1",), "needs --tls-certificate and --token-file"),
        (("[2001:db8::1]:1",), "needs --tls-certificate and --token-file"),
        (("127.0.0.1",), "is not ADDRESS:PORT"),
        ((":80",), "is not ADDRESS:PORT"),
        (("127.0.0.1:http",), "is not ADDRESS:PORT"),
        (("127.0.0.1:65536",), "is not ADDRESS:PORT"),
        (("127.0.0.1:1", "/nowhere"), "No such file or directory"),
        (("127.0.0.1:1", None, "/nowhere"), "--tls-certificate=/nowhere"),
        (("127.0.0.1:1", None, None, "/key"), "--tls-key needs --tls-certificate"),
    ],
)
def test_what_is_not_safe_is_refused(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_access(*arguments)
    assert text in str(refused.value)


def test_other_addresses_need_both(token_file: str, tmp_path: Path) -> None:
    folder = Authority(tmp_path).server()
    pem = (str(folder / "server-cert.pem"), str(folder / "server-key.pem"))
    for token, tls in ((None, pem), (token_file, (None, None))):
        with pytest.raises(ConfigError, match="needs --tls-certificate and --token-file"):
            make_access("0.0.0.0:1", token, *tls)
    assert make_access("[::1]:5").host == "::1"
    found = make_access("0.0.0.0:1", token_file, *pem)
    assert (found.host, found.port, found.token) == ("0.0.0.0", 1, TOKEN.encode())


def test_a_token_that_is_no_secret_is_refused(token_file: str) -> None:
    os.chmod(token_file, 0o644)
    with pytest.raises(ConfigError, match="everybody may read"):
        make_access("127.0.0.1:1", token_file)
    os.chmod(token_file, 0o600)
    Path(token_file).write_text("short\n")
    with pytest.raises(ConfigError, match="16 to 1024 characters"):
        make_access("127.0.0.1:1", token_file)


def test_nodes_of_the_command_line() -> None:
    assert split_node("web=/run/a.sock") == ("web", "/run/a.sock")
    assert split_node("/srv/a=b/c.sock") == ("/srv/a=b/c.sock", "/srv/a=b/c.sock")
    assert Given(["x=/a", "/b"])().sockets == {"x": "/a", "/b": "/b"}
    for wrong in (["=/a"], ["x="], ["x=/a", "x=/b"]):
        with pytest.raises(ConfigError):
            Given(wrong)
