# SPDX-License-Identifier: BSD-3-Clause
"""Servers that are not ours: qemu-nbd, nbdkit's own plugins behind filters, and QEMU itself."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from nbdprocess import NbdProcess, nbdkit_command
from process import Process
from qmp import Qmp
from waiting import wait_until


class QemuNbd(NbdProcess):
    """qemu-nbd serving `path` until it is closed; `shared` is its --shared (0: any number of clients)."""

    def __init__(
        self,
        folder: Path,
        path: Path,
        *,
        name: str = "qemu-nbd",
        image_format: str = "raw",
        shared: int = 0,
        cache: str = "writeback",
        export: str = "",
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, name)
        self.path = path
        self.image_format = image_format
        self.shared = shared
        self.cache = cache
        self.export = export
        self.options = list(options)

    def command(self) -> list[str]:
        return [
            "qemu-nbd",
            f"--socket={self.socket_path}",
            f"--format={self.image_format}",
            f"--shared={self.shared}",
            f"--cache={self.cache}",
            "--persistent",
            *([f"--export-name={self.export}"] if self.export else []),
            *self.options,
            str(self.path),
        ]


ABORT = "Assertion `sock >= 0' failed"


class DelayedEndpoint(NbdProcess):
    """A slow or failing NBD endpoint: nbdkit's file plugin on `path`, or memory of `size` bytes, behind filters.

    `delay` and `error` are the parameters of those filters without the prefix (`delay={"write": "50ms"}`,
    `error={"pwrite": "ENOSPC"}`); the error filter fails requests only between `fail()` and `work()`, unless
    `error` has a rate or file of its own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        path: Path | None = None,
        size: int | None = None,
        name: str = "endpoint",
        delay: Mapping[str, str] | None = None,
        error: Mapping[str, str] | None = None,
        filters: Sequence[str] = (),
        filter_arguments: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, name)
        if (path is None) == (size is None):
            raise ValueError("either path or size")
        self.path = path
        self.size = size
        self.delay = dict(delay or {})
        self.error = dict(error or {})
        self.filters = list(filters)
        self.filter_arguments = list(filter_arguments)
        self.options = list(options)
        self.failing = folder / f"{name}.failing"

    def command(self) -> list[str]:
        command = [*nbdkit_command(self.socket_path), *self.options]
        parameters = list(self.filter_arguments)
        names = list(self.filters)
        if self.delay:
            names.append("delay")
            parameters += [f"delay-{key}={value}" for key, value in self.delay.items()]
        if self.error:
            names.append("error")
            for key, value in self.error.items():
                parameters += [f"error-{key}={value}"]
                if key in ("pread", "pwrite", "trim", "zero", "extents", "cache"):
                    parameters += [f"error-{key}-rate=100%", f"error-{key}-file={self.failing}"]
        command += [f"--filter={name}" for name in names]
        command += ["memory", str(self.size)] if self.path is None else ["file", str(self.path)]
        return command + parameters

    def excused(self, code: int) -> bool:
        # nbdkit 1.32 may abort when it answers a client that has gone. The plugin guards its own process against that
        # (hangup.py). Here nobody does, and a test that still needed the endpoint has noticed.
        return code == -signal.SIGABRT and ABORT in self.stderr()

    def fail(self) -> None:
        """From now on requests fail as `error` says."""
        self.failing.touch()

    def work(self) -> None:
        """Requests succeed again."""
        self.failing.unlink(missing_ok=True)


class Qemu(Process):
    """qemu-system without a machine, for its block layer and QMP monitor; `qmp` is connected while it runs."""

    def __init__(self, folder: Path, *, name: str = "qemu") -> None:
        super().__init__(folder, name)
        self.qmp_path = folder / f"{name}.qmp"
        self.socket_path = folder / f"{name}.sock"
        self.qmp: Qmp

    def command(self) -> list[str]:
        return [
            "qemu-system-x86_64",
            "-M",
            "none",
            "-display",
            "none",
            "-nodefaults",
            "-S",
            "-qmp",
            f"unix:{self.qmp_path}",
        ]

    def start(self) -> Self:
        # QEMU connects to us: when it listens itself, a client that comes while it is still starting is now and then
        # greeted twice, or never answered (QEMU 7.2, 1 of 3,000 starts).
        self.qmp_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as self._listener:
            self._listener.bind(os.fspath(self.qmp_path))
            self._listener.listen(1)
            self._listener.setblocking(False)
            return super().start()

    def wait_ready(self) -> None:
        def come() -> socket.socket | None:
            self.check_alive()
            try:
                return self._listener.accept()[0]
            except BlockingIOError:
                return None

        self.qmp = Qmp(wait_until(come, f"{self.name} connects its monitor"))

    def serve_nbd(self) -> None:
        """Start QEMU's NBD server on `socket_path`."""
        address = {"type": "unix", "data": {"path": str(self.socket_path)}}
        self.qmp.execute("nbd-server-start", {"addr": address})
