# SPDX-License-Identifier: BSD-3-Clause
"""A node as a service: the launcher, started as systemd starts it, and who hears what it tells systemd."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkout import REPOSITORY
from content import MIB, make_raw
from nbdprocess import NbdProcess
from qmp import Qmp
from waiting import DEADLINE_S, wait_until

LAUNCHER = [sys.executable, str(REPOSITORY / "scripts/nbdkit-replication")]


class NotifySocket:
    """Plays systemd: takes the datagrams of sd_notify(3). A name that begins with @ is an abstract one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._socket.setblocking(False)
        self.heard: list[dict[str, str]] = []

    def listen(self) -> list[dict[str, str]]:
        """All that was heard so far."""
        while True:
            try:
                text = self._socket.recv(4096).decode()
            except BlockingIOError:
                return self.heard
            self.heard.append(dict(line.split("=", 1) for line in text.split("\n")))

    def count(self, key: str) -> int:
        """How often `key` was told."""
        return sum(key in message for message in self.listen())

    def wait_for(self, key: str, value: str = "", since: int = 0, timeout_s: float = DEADLINE_S) -> dict[str, str]:
        """Wait for a message, after the first `since` ones, in which `key` has a value that contains this one."""

        def found() -> dict[str, str] | None:
            told = self.listen()[since:]
            return next((message for message in told if key in message and value in message[key]), None)

        message: dict[str, str] = wait_until(found, f"{key}={value} is told; told was {self.heard[-5:]}", timeout_s)
        return message

    def close(self) -> None:
        self._socket.close()


class ServiceNode(NbdProcess):
    """The launcher with a file of its own; `before` is put before it (systemd-socket-activate ..., setpriv ...)."""

    def __init__(
        self,
        folder: Path,
        text: str,
        *,
        name: str = "vm1",
        before: Sequence[str] = (),
        extra_environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, name)
        self.run = folder / "run" / name
        self.socket_path = self.run / "guest.sock"
        self.control_path = self.run / "control.sock"
        self.state = folder / "var" / name
        self.config = folder / "etc" / f"{name}.toml"
        self.config.parent.mkdir(exist_ok=True)
        self.write(text)
        self.before = list(before)
        self.notify = NotifySocket(str(folder / f"{name}.notify"))
        self.extra_environment = {"NOTIFY_SOCKET": self.notify.name, **(extra_environment or {})}

    def write(self, text: str) -> None:
        """Another content of the file."""
        self.config.write_text(text)

    def start(self) -> Any:
        # Not that of NbdProcess, which removes the socket: here it is the launcher's to make way.
        return super(NbdProcess, self).start()

    def command(self) -> list[str]:
        return [*self.before, *LAUNCHER, self.name]

    def environment(self) -> dict[str, str]:
        return {**os.environ, **folders(self.folder), **self.extra_environment}

    def wait_ready(self) -> None:
        since = self.notify.count("READY")

        def told() -> bool:
            self.check_alive()
            return self.notify.count("READY") > since

        wait_until(told, f"{self.name} says that it is ready; it printed: {self.stderr()}")

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /, **more: Any) -> Any:
        """Run one QMP command on a connection of its own."""
        with Qmp(self.control_path) as qmp:
            return qmp.execute(command, arguments, **more)

    def status(self) -> dict[str, Any]:
        """`query-replication`."""
        status: dict[str, Any] = self.execute("query-replication")
        return status

    def close(self) -> None:
        super().close()
        self.notify.close()


def folders(folder: Path) -> dict[str, str]:
    """The folders of the services of a host, in `folder`."""
    names = {"CONFIG": "etc", "STATE": "var", "RUN": "run"}
    return {f"NBDKIT_REPLICATION_{name}_DIR": str(folder / below) for name, below in names.items()}


def secondary_file(folder: Path, more: str = "", service: str = "") -> str:
    """The file of a secondary with one disk of 1 MiB, which is made."""
    disk = folder / "b.raw"
    if not disk.exists():
        make_raw(disk, MIB)
    return f'mode = "secondary"\n{more}\n[disk.disk0]\ndisk = "{disk}"\ntop-id = "guest"\n[service]\n{service}\n'


def primary_file(folder: Path, secondary: str, more: str = "", service: str = "") -> str:
    """The same of its primary."""
    disk = folder / "a.raw"
    if not disk.exists():
        make_raw(disk, MIB)
    return f'mode = "primary"\nsecondary = "{secondary}"\n{more}\n[disk.disk0]\ndisk = "{disk}"\n[service]\n{service}\n'
