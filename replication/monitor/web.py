# SPDX-License-Identifier: BSD-3-Clause
"""The web server: metrics, the page for people, and what the page and replctl read as JSON.

    /metrics               Prometheus' text format
    /                      the page
    /api/state             all nodes, as they are known
    /api/events            all events, oldest first; ?node=NAME those of one node
    /api/samples           the last hour of each node
    /api/stream            server-sent events: `state` at first, then `node`, `event` and `nodes`

Invariants: it only reads what the watchers have learned; at most REQUESTS_MAX requests at a time, and STREAMS_MAX of
them streams; a client that is slow for IO_S is cut off. There is nothing that could be changed by a request.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from replication.log import log
from replication.monitor import metrics
from replication.monitor.access import Access
from replication.monitor.fleet import Fleet
from replication.monitor.page import PAGE, POLICY
from replication.monitor.watcher import Watcher

REQUESTS_MAX = 64
STREAMS_MAX = 32
IO_S = 10.0
ALIVE_S = 10.0
"""A stream says something so often, which is also when the end of its client is noticed at the latest."""


def node_state(watcher: Watcher) -> dict[str, Any]:
    """A node, as it is known."""
    sight = watcher.sight
    return {
        "name": sight.name,
        "path": sight.path,
        "up": sight.up,
        "since": sight.since,
        "looked": sight.looked,
        "trouble": sight.trouble,
        "version": sight.version,
        "status": sight.answer,
        "jobs": sight.jobs,
        "failover": sight.failover,
    }


def state(fleet: Fleet) -> dict[str, Any]:
    """All nodes, as they are known."""
    return {"time": time.time(), "trouble": fleet.trouble, "nodes": [node_state(one) for one in fleet.watchers()]}


def events(fleet: Fleet, node: str | None = None) -> list[dict[str, Any]]:
    """The events of all nodes or of one, oldest first, each with the name of its node."""
    found = [
        {"node": watcher.name, **event}
        for watcher in fleet.watchers()
        if node in (None, watcher.name)
        for event in watcher.journal.events()
    ]
    return sorted(found, key=_moment)


def samples(fleet: Fleet) -> dict[str, Any]:
    """The last hour of each node."""
    return {watcher.name: [one._asdict() for one in watcher.journal.samples()] for watcher in fleet.watchers()}


def _moment(event: dict[str, Any]) -> float:
    stamp = event["timestamp"]
    parts = [stamp.get(key) for key in ("seconds", "microseconds")]
    numbers = [part if isinstance(part, int | float) else 0 for part in parts]
    return float(numbers[0] + numbers[1] / 1e6)


class WebServer(ThreadingHTTPServer):
    """Serves `fleet` to whom `access` admits."""

    daemon_threads = True
    request_queue_size = 64
    allow_reuse_address = True

    def __init__(self, fleet: Fleet, access: Access) -> None:
        """Bind and listen; OSError."""
        self.fleet = fleet
        self.access = access
        self.places = threading.BoundedSemaphore(REQUESTS_MAX)
        self.streams = threading.BoundedSemaphore(STREAMS_MAX)
        family, _, _, _, address = socket.getaddrinfo(
            access.host, access.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        super().__init__(address[:2], _Request)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Without looking up the host's name, which may take a minute, and which nobody asks for."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each, as far as there are places."""
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the thread, so that a handshake that hangs delays nobody."""
        request.settimeout(IO_S)
        if self.access.tls is not None:
            request = self.access.tls.wrap_socket(request, server_side=True)
        try:
            super().finish_request(request, client_address)
        finally:
            if self.access.tls is not None:
                request.close()  # it has taken the descriptor over

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of ours; what else there is goes to the log."""
        import sys  # noqa: PLC0415

        error = sys.exception()
        if not isinstance(error, ssl.SSLError | OSError):
            log(f"a request failed: {type(error).__name__}: {error}")


class _Request(BaseHTTPRequestHandler):
    """One request."""

    server: WebServer
    server_version = "replication-monitor"
    sys_version = ""
    timeout = IO_S

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Who reads is not logged."""

    def _answer(self) -> None:
        access, fleet = self.server.access, self.server.fleet
        if not access.knows_host(self.headers.get("Host")):
            self._send(421, "text/plain", b"this is not the host that was asked for\n")
            return
        if not access.admits(self.headers.get("Authorization")):
            self._send(401, "text/plain", b"a token is needed\n", {"WWW-Authenticate": 'Basic realm="replication"'})
            return
        where = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(where.query)
        documents: dict[str, Callable[[], Any]] = {
            "/api/state": lambda: state(fleet),
            "/api/events": lambda: events(fleet, next(iter(query.get("node", [])), None)),
            "/api/samples": lambda: samples(fleet),
        }
        if where.path == "/metrics":
            self._send(200, metrics.CONTENT_TYPE, metrics.render(fleet))
        elif where.path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.encode(), {"Content-Security-Policy": POLICY})
        elif where.path in documents:
            self._send(200, "application/json", json.dumps(documents[where.path]()).encode())
        elif where.path == "/api/stream" and self.command == "GET":
            self._stream()
        else:
            self._send(404, "text/plain", b"there is no such page\n")

    def _send(self, code: int, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            **(more or {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self) -> None:
        if not self.server.streams.acquire(blocking=False):
            self._send(503, "text/plain", b"too many streams\n", {"Retry-After": "30"})
            return
        subscription = self.server.fleet.subscribe()
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self._tell("state", state(self.server.fleet))
            while not self.server.fleet.ended:
                news = subscription.next(ALIVE_S)
                if news is None:
                    self.wfile.write(b": alive\n\n")
                elif news["kind"] == "node":
                    self._tell_node(news["node"])
                else:
                    self._tell(news["kind"], {**news.get("event", {}), "node": news.get("node")})
        finally:
            self.server.fleet.unsubscribe(subscription)
            self.server.streams.release()

    def _tell_node(self, name: str) -> None:
        for watcher in self.server.fleet.watchers():
            if watcher.name == name:
                self._tell("node", node_state(watcher))

    def _tell(self, kind: str, content: Any) -> None:
        self.wfile.write(f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()
