# SPDX-License-Identifier: BSD-3-Clause
"""The power of some hosts, and the switch by which the cluster cuts it.

The switch is what a BMC or a PDU is: a socket outside of both hosts, which fence_switch asks. It can be dead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from waiting import DEADLINE_S, wait_until

HERE = Path(__file__).resolve().parent
COMMAND_S = 60.0
PATIENCE_S = 10.0


class Host:
    """One host: namespaces of its own, its disk, and its part of the cluster. `folder` is what it keeps."""

    def __init__(self, name: str, folder: Path, network: str) -> None:
        self.name = name
        self.folder = folder
        self._network = network
        self._guard: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    @property
    def init(self) -> int:
        """The first process, 0 if there is no power."""
        guard = self._guard
        if guard is None or guard.poll() is not None:
            return 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{guard.pid}/task/{guard.pid}/children").read_text().split()[0])
        return 0

    @property
    def on(self) -> bool:
        """Whether it has power."""
        return self.init != 0

    def power_on(self, without: str = "") -> None:
        """Returns when it has power. `without` "cluster": its daemons are not started."""
        with self._changing:
            if self.on:
                return
            with (self.folder / "console").open("ab") as console:
                self._guard = subprocess.Popen(
                    ["nsenter", f"--net=/run/netns/{self._network}", *map(str, self.command(without))],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    start_new_session=True,
                )
            wait_until(lambda: self.init, f"{self.name} has power")
            if without:  # a command that comes next finds this host's folders
                wait_until(lambda: self.run("test", "-e", "/run/host-up").returncode == 0, f"{self.name} is up")

    def command(self, without: str) -> list[str | Path]:
        """Of what gets to be the parent of its first process."""
        own = ["--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"]
        return ["unshare", *own, HERE / "init.sh", self.name, self.folder, without]

    def enter(self) -> list[str]:
        """What is put before a command that is to run there."""
        inside = ["--mount", "--pid", "--ipc", "--uts", "--net", "--root", "--wd"]
        return ["nsenter", f"--target={self.init}", *inside]

    def power_off(self) -> None:
        """All its processes are gone, without a word, when this returns."""
        with self._changing:
            if self._guard is None:
                return
            if init := self.init:
                os.kill(init, signal.SIGKILL)
            else:
                self._guard.kill()
            self._guard.wait(DEADLINE_S)

    def run(self, *command: str | Path, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """A command of its administrator."""
        return subprocess.run(
            [*self.enter(), *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def told(self, *command: str | Path) -> str:
        """What it prints; AssertionError if it fails."""
        done = self.run(*command)
        assert done.returncode == 0, f"{self.name}: {' '.join(map(str, command))}: {done.returncode}: {done.stderr}"
        return done.stdout


class Switch:
    """The power switch of some hosts."""

    def __init__(self, path: Path, hosts: Sequence[Host]) -> None:
        self.path = path
        self.log: list[tuple[float, str, str]] = []
        """When, what, and of which host."""
        self.dead = False
        self.stays_off: set[str] = set()
        """Hosts that a reboot only switches off."""
        self._hosts = {host.name: host for host in hosts}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(os.fspath(path))
        self._socket.listen(8)
        threading.Thread(target=self._serve, name="switch", daemon=True).start()

    def close(self) -> None:
        """Nobody is served any more."""
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                client = self._socket.accept()[0]
            except OSError:
                return
            with client, contextlib.suppress(OSError, ValueError):
                client.settimeout(PATIENCE_S)
                asked = client.makefile().readline().split()
                answer = "error" if self.dead else self._do(*asked)
                client.sendall(f"{answer}\n".encode())

    def _do(self, what: str, name: str = "") -> str:
        if what == "ping":
            return "ok"
        host = self._hosts[name]
        if what == "status":
            return "on" if host.on else "off"
        self.log.append((time.time(), what, name))
        if what in ("off", "reboot"):
            host.power_off()
        if what == "on" or (what == "reboot" and name not in self.stays_off):
            host.power_on()
        return "ok"
