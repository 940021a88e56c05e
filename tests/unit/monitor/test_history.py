# SPDX-License-Identifier: BSD-3-Clause
"""`replctl history` and `replctl top` against a monitor."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from checkout import REPOSITORY
from fakenode import FakeNode
from replication.client.history import sparkline
from replication.monitor.access import make_access
from replication.monitor.fleet import Fleet
from replication.monitor.web import WebServer
from waiting import DEADLINE_S, wait_until

Nodes = Callable[..., FakeNode]
Fleets = Callable[..., Fleet]


def replctl(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "scripts/replctl", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "REPLCTL_MONITOR": url},
    )


@pytest.fixture
def url(node: Nodes, fleet: Fleets) -> Iterator[str]:
    """A monitor of the primary a, which has lost its link, and of b, which is not there."""
    there = node("a")
    there.answers["query-jobs"] = [
        {"id": "resync-disk0", "type": "resync", "status": "running", "current-progress": 25, "total-progress": 100}
    ]
    watched = fleet({"a": str(there.path), "b": "/nowhere"})
    wait_until(lambda: watched.watchers()[0].sight.up, "it is up")
    there.emit("REPLICATION_LINK", state="lost\x1b[2J")
    wait_until(lambda: len(watched.watchers()[0].journal.events()) == 2, "the event")
    server = WebServer(watched, make_access("127.0.0.1:0"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(DEADLINE_S)
    server.server_close()


def test_history(url: str) -> None:
    done = replctl(url, "history")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert "MONITOR_NODE_UP" in first
    assert second.startswith("a  ")
    assert second.endswith("REPLICATION_LINK  state=lost [2J")
    [event] = map(json.loads, replctl(url, "a", "history", "--json").stdout.splitlines()[1:])
    assert (event["node"], event["event"]) == ("a", "REPLICATION_LINK")
    assert replctl(url, "b", "history").stdout == ""


def test_top_without_a_terminal(url: str) -> None:
    done = replctl(url, "top")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "running" in rows["a"]
    assert "in-sync" in rows["a"]
    assert "resync-disk0 25%" in rows["a"]
    assert "No such file or directory" in rows["b"]
    assert [one["name"] for one in json.loads(replctl(url, "top", "--json").stdout)["nodes"]] == ["a", "b"]


def test_no_monitor() -> None:
    with socket.socket() as kept:  # bound, so that nobody else gets the port, and nobody listens
        kept.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{kept.getsockname()[1]}"
        for command in ("history", "top"):
            done = replctl(url, command)
            assert done.returncode == 2
            assert done.stderr == f"replctl: cannot ask replication-monitor at {url}: Connection refused\n"
    assert "is not the address of a monitor" in replctl("file:///etc/passwd", "top").stderr


def test_sparklines() -> None:
    assert sparkline([]) == ""
    assert sparkline([None, 0.0, 1.0, 7.0]) == " ▁▂█"
    assert sparkline([0.0, None]) == "▁ "
    assert len(sparkline([1.0] * 720)) == 30
