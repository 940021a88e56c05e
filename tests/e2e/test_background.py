# SPDX-License-Identifier: BSD-3-Clause
"""In the background, which is how nbdkit starts unless it is told otherwise: another working folder, no terminal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import nbd
import pytest

from checkout import PLUGIN
from content import MIB, make_raw
from lab import Lab
from qmp import Qmp
from waiting import DEADLINE_S, wait_until


class Daemon:
    """An nbdkit that has gone into the background, started from `folder` with relative paths."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[str]) -> None:
        done = subprocess.run(
            ["nbdkit", "-U", f"{name}.sock", "-P", f"{name}.pid", "python", str(PLUGIN), *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.state = folder / f"{name}.state"
        pid_file = folder / f"{name}.pid"
        self._watch = os.pidfd_open(int(wait_until(lambda: pid_file.exists() and pid_file.read_text(), "a pid")))

    def qmp(self) -> Qmp:
        """A connection to the control socket."""
        return Qmp(self.state / "control.sock")

    def kill(self) -> None:
        """SIGKILL."""
        if self._watch >= 0:
            signal.pidfd_send_signal(self._watch, signal.SIGKILL)
            os.close(self._watch)
            self._watch = -1


def listens(path: Path) -> bool:
    """Whether somebody takes connections there; the file is there a moment earlier."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def folder(lab: Lab) -> Path:
    """A start folder with a disk for each node."""
    for name in "ab":
        make_raw(lab.folder / f"{name}.img", MIB)
    return lab.folder


SECONDARY = ["mode=secondary", "disk=b.img", "top-id=guest", "state=b.state"]
PRIMARY = ["mode=primary", "disk=a.img", "state=a.state"]


@pytest.mark.parametrize("way", ["secondary=", "start"])
def test_a_relative_path_in_a_uri_counts_from_the_start_folder(folder: Path, way: str) -> None:
    uri = "nbd+unix:///?socket=b.sock"
    key = [f"secondary={uri}"] if way == "secondary=" else []
    arguments = {} if key else {"secondary": uri}
    nodes = []
    try:
        nodes.append(Daemon(folder, "b", SECONDARY))
        nodes.append(Daemon(folder, "a", [*PRIMARY, *key]))
        with nodes[0].qmp() as qmp:
            qmp.execute("replication-start")
        with nodes[1].qmp() as qmp:
            qmp.execute("replication-start", arguments)
            assert qmp.execute("query-replication")["link"]["secondary"] == f"nbd+unix:///?socket={folder}/b.sock"
            qmp.execute("replication-checkpoint")
    finally:
        for node in nodes:
            node.kill()


def test_a_disk_behind_a_relative_socket_comes_back_in_the_background(folder: Path) -> None:
    """The first connection is made before nbdkit goes to the background, those after a loss are not."""
    below = ["nbdkit", "-f", "-U", str(folder / "d.sock"), "memory", str(MIB)]
    server = subprocess.Popen(below)
    node = None
    try:
        wait_until(lambda: listens(folder / "d.sock"), "the endpoint listens")
        node = Daemon(folder, "a", ["mode=primary", "disk=nbd+unix:///?socket=d.sock", "state=a.state"])
        server.kill()
        server.wait(DEADLINE_S)
        (folder / "d.sock").unlink()
        server = subprocess.Popen(below)
        wait_until(lambda: listens(folder / "d.sock"), "the endpoint listens again")

        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///disk0?socket={folder}/a.sock")

        def read() -> bool:
            try:
                return len(handle.pread(512, 0)) == 512
            except nbd.Error:
                return False

        wait_until(read, "the disk can be read again")
    finally:
        server.kill()
        server.wait(DEADLINE_S)
        if node is not None:
            node.kill()
