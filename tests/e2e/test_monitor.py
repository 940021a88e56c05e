# SPDX-License-Identifier: BSD-3-Clause
"""replication-monitor, the process, beside a real pair."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from checkout import REPOSITORY
from lab import MIB, Lab, Pair
from waiting import DEADLINE_S, wait_until

SCRIPT = REPOSITORY / "scripts/replication-monitor"


class Monitor:
    """What a running monitor serves."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=DEADLINE_S) as answer:
            return str(answer.read().decode())

    def value(self, metric: str, **labels: str) -> float | None:
        """One series of nbdkit_replication_..., None if there is none."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for name, given, value in re.findall(r"^nbdkit_replication_(\w+)\{(.*)\} (\S+)$", self.get("/metrics"), re.M):
            if name == metric and wanted <= set(given.split(",")):
                return float(value)
        return None

    def events(self, node: str) -> list[str]:
        return [event["event"] for event in json.loads(self.get(f"/api/events?node={node}"))]


@contextmanager
def monitor(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[Monitor]:
    """A started one, which has to end in good order."""
    process = subprocess.Popen(
        [SCRIPT, "--listen", "127.0.0.1:0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert process.stderr is not None
        found = re.search(r"(http://\S+)$", process.stderr.readline())
        assert found
        yield Monitor(found[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.communicate()


def of_pair(pair: Pair) -> list[str]:
    return [f"--node=a={pair.primary.control_path}", f"--node=b={pair.secondary.control_path}"]


def test_a_pair_from_its_start_to_a_failover(lab: Lab) -> None:
    pair = lab.pair((MIB,))
    with monitor(*of_pair(pair)) as watching:
        for node in "ab":
            wait_until(lambda node=node: watching.value("stage", node=node, stage="none") == 1, "both are seen")
        pair.secondary.start_replication()
        pair.primary.start_replication()
        pair.primary.connect("disk0").pwrite(b"x" * 8192, 0)
        pair.primary.checkpoint()
        wait_until(lambda: watching.value("written_bytes_total", node="a") == 8192, "what the guest has written")
        wait_until(lambda: watching.value("link_state", node="a", state="in-sync") == 1, "the link")
        wait_until(lambda: watching.value("checkpoint_duration_seconds_count", node="b") == 1, "the checkpoint")
        epoch = pair.secondary.status()["epoch"]
        wait_until(lambda: watching.value("epoch", node="b") == epoch, "its number")
        pair.primary.close()
        pair.secondary.failover()
        wait_until(lambda: watching.value("up", node="a") == 0, "the primary is gone")
        wait_until(lambda: watching.value("stage", node="b", stage="done") == 1, "the failover")
        assert watching.value("stage", node="a", stage="running") is None
        wait_until(lambda: "MONITOR_NODE_DOWN" in watching.events("a"), "the event of it")
        wait_until(lambda: watching.events("b").count("REPLICATION_STAGE_CHANGE") == 3, "none, running, failover, done")


def test_a_node_that_stands_still_is_down_and_the_other_is_not(lab: Lab) -> None:
    pair = lab.pair((MIB,))
    with monitor(*of_pair(pair)) as watching:
        for node in "ab":
            wait_until(lambda node=node: watching.value("up", node=node) == 1, "both are up")
        pid = pair.primary.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: watching.value("up", node="a") == 0, "it is down")
            assert watching.value("up", node="b") == 1
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: watching.value("up", node="a") == 1, "it is up again")


def test_the_nodes_of_the_folder(lab: Lab) -> None:
    secondary = lab.secondary()
    folder = lab.folder / "conf"
    folder.mkdir()

    def configure(name: str, control: Path) -> None:
        # Renamed, since the monitor may read at any moment.
        (folder / "new").write_text(
            f'mode = "secondary"\ncontrol = "{control}"\n[disk.disk0]\ndisk = "/nowhere"\ntop-id = "t"\n'
        )
        (folder / "new").rename(folder / f"{name}.toml")

    configure("web", secondary.control_path)
    with monitor(environment={"NBDKIT_REPLICATION_CONFIG_DIR": str(folder)}) as watching:
        wait_until(lambda: watching.value("up", node="web") == 1, "the node of the file")
        configure("db", lab.folder / "nobody")
        wait_until(lambda: watching.value("up", node="db") == 0, "a new file")
        (folder / "new").write_text("mode = [")
        (folder / "new").rename(folder / "web.toml")
        wait_until(lambda: "web.toml" in str(json.loads(watching.get("/api/state"))["trouble"]), "it is told")
        assert watching.value("up", node="web") == 1


def test_a_handler_of_the_file_runs(lab: Lab) -> None:
    secondary = lab.secondary()
    told, folder = lab.folder / "told", lab.folder / "conf"
    folder.mkdir()
    (folder / "web.toml").write_text(
        f'mode = "secondary"\ncontrol = "{secondary.control_path}"\n[disk.disk0]\ndisk = "/nowhere"\ntop-id = "t"\n'
        '[[handler]]\nevent = "stage-change"\nto = "running"\nshell = true\n'
        f'command = "echo $NBDKIT_REPLICATION_NODE $NBDKIT_REPLICATION_TO >> {told}"\n'
        f'[[handler]]\nevent = "node-down"\nshell = true\ncommand = "echo down >> {told}"\n'
    )
    with monitor(environment={"NBDKIT_REPLICATION_CONFIG_DIR": str(folder)}) as watching:
        wait_until(lambda: watching.value("up", node="web") == 1, "the node of the file")
        secondary.start_replication()
        wait_until(lambda: told.exists() and told.read_text() == "web running\n", "the stage")
        secondary.close()
        wait_until(lambda: told.read_text() == "web running\ndown\n", "the end")


def test_systemd_learns_when_it_is_ready(lab: Lab) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(lab.folder / "notify"))
        systemd.settimeout(DEADLINE_S)
        with monitor("--node=/nowhere", environment={"NOTIFY_SOCKET": str(lab.folder / "notify")}):
            assert systemd.recv(100) == b"READY=1"
        assert systemd.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--listen", "0.0.0.0:0"], "needs --tls-certificate and --token-file"),
        (["--node", "a=/x", "--node", "a=/y"], "another node of the name a"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options: list[str], text: str) -> None:
    done = subprocess.run([SCRIPT, *options], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_in_use(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: Any = taken.getsockname()[1]
        done = subprocess.run(
            [SCRIPT, "--listen", f"127.0.0.1:{port}", "--node", "/x"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "Address already in use" in done.stderr
