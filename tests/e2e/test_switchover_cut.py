# SPDX-License-Identifier: BSD-3-Clause
"""`replctl switchover` that is cut off: at each command, before it has arrived and after, by each end.

What must hold: it is as before, or the disk is moved, or a second run finishes it; and replctl never says otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from commandline import REPLCTL
from content import KIB, MIB
from lab import Lab
from nodes import Pair
from waiting import DEADLINE_S, wait_until


class Relay:
    """A control socket before another one, which is cut at a command."""

    def __init__(self, path: Path, behind: Path, command: str, how: str) -> None:
        """`how`: "before" (the command does not arrive), "after" (its answer does not), or "silent" (neither, and
        nothing is closed)."""
        self.path = path
        self._behind, self._command, self._how = behind, command.encode(), how
        self.cut = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._behind))
                self._open += [near, far]
                threading.Thread(target=self._forth, args=(near, far), daemon=True).start()
                threading.Thread(target=self._back, args=(near, far), daemon=True).start()

    def _forth(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 16):
                if self._command in data:
                    self.cut.set()
                    if self._how == "after":
                        far.sendall(data)
                        return
                    if self._how == "silent":
                        return
                    self.close()
                far.sendall(data)

    def _back(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(1 << 16):
                if self.cut.is_set() and self._how == "after" and b"return" in data:
                    self.close()
                    return
                near.sendall(data)

    def close(self) -> None:
        """Cut all, and take no more."""
        for one in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def pair(lab: Lab) -> Pair:
    made = lab.pair()
    made.start_replication()
    wait_until(lambda: made.primary.status()["link"]["state"] == "in-sync", "the link is in sync")
    made.primary.connect("disk0").pwrite(b"1" * 4 * KIB, 0)
    return made


def replctl(*arguments: object) -> subprocess.Popen[str]:
    command = [str(REPLCTL), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stages(pair: Pair) -> tuple[str, str]:
    return pair.primary.status()["stage"], pair.secondary.status()["stage"]


def judge(pair: Pair, code: int, said: str) -> None:
    """Whether what replctl has said is so, and the end is within reach of what it is told to type."""
    found = stages(pair)
    assert found in (("running", "running"), ("done", "done"), ("done", "running")), said
    assert (code == 0) == (found == ("done", "done")), said
    if "nothing has changed" in said:
        assert found == ("running", "running")
        wait_until(lambda: pair.primary.status()["link"]["state"] == "in-sync", "it replicates again")
    again = replctl("-s", pair.primary.control_path, "switchover", "--yes", "--peer", pair.secondary.control_path)
    out, err = again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 0, out + err
    assert stages(pair) == ("done", "done")
    assert bytes(pair.secondary.connect("top0").pread(4 * KIB, 0)) == b"1" * 4 * KIB


@pytest.fixture(params=["before", "after"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("side", "command"),
    [("primary", "replication-checkpoint"), ("primary", "replication-stop"), ("secondary", "replication-stop")],
)
def test_cut_off(lab: Lab, pair: Pair, side: str, command: str, how: str) -> None:
    sockets = {"primary": pair.primary.control_path, "secondary": pair.secondary.control_path}
    relay = Relay(lab.folder / "relay", sockets[side], command, how)
    sockets[side] = relay.path
    done = replctl("-s", sockets["primary"], "switchover", "--yes", "--peer", sockets["secondary"])
    out, err = done.communicate(timeout=DEADLINE_S)
    assert relay.cut.is_set(), out + err
    judge(pair, done.returncode, out + err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_interrupted(lab: Lab, pair: Pair, side: str, number: signal.Signals) -> None:
    """While the command is on its way and never arrives."""
    sockets = {"primary": pair.primary.control_path, "secondary": pair.secondary.control_path}
    relay = Relay(lab.folder / "relay", sockets[side], "replication-stop", "silent")
    sockets[side] = relay.path
    done = replctl("-s", sockets["primary"], "switchover", "--yes", "--peer", sockets["secondary"])
    assert relay.cut.wait(DEADLINE_S)
    os.kill(done.pid, number)
    out, err = done.communicate(timeout=DEADLINE_S)
    assert done.returncode != 0
    judge(pair, done.returncode, out + err)


def test_a_third_node_is_refused(lab: Lab, pair: Pair) -> None:
    other = lab.secondary(name="other")
    other.start_replication()
    done = replctl("-s", pair.primary.control_path, "switchover", "--yes", "--peer", other.control_path)
    _, err = done.communicate(timeout=DEADLINE_S)
    assert (done.returncode, "not a pair" in err) == (1, True), err
    assert stages(pair) == ("running", "running")
    assert other.status()["stage"] == "running"


def test_a_stop_says_what_was_not_sent(pair: Pair) -> None:
    pair.secondary.kill()
    pair.primary.connect("disk0").pwrite(b"2" * MIB, 0)
    done = replctl("-s", pair.primary.control_path, "stop")
    out, err = done.communicate(timeout=DEADLINE_S)
    assert (done.returncode, "that was not sent" in err) == (1, True), out + err
    assert pair.primary.status()["stage"] == "done"
