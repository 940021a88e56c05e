# SPDX-License-Identifier: BSD-3-Clause
"""One nbdkit with plugin.py, asked by replctl as a person does it, and its changes of stage."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd

from ..client.lines import Lines, Trouble
from ..client.qmp import Qmp
from .processes import STEP_S, DemoError, Processes, run, wait_until

ROOT = Path(__file__).resolve().parents[2]


class Node:
    """One nbdkit with plugin.py, and replctl for it."""

    def __init__(self, processes: Processes, folder: Path, mode: str, *arguments: str) -> None:
        """Start it and wait until it serves."""
        self.mode = mode
        self.state = folder / mode
        self.state.mkdir(mode=0o700)
        self.socket = folder / f"{mode}.sock"
        self.log = folder / f"{mode}.log"
        self._pid_file = folder / f"{mode}.pid"
        options: tuple[str | Path, ...] = ("--foreground", "--exit-with-parent", "--unix", self.socket)
        options += ("--pidfile", self._pid_file)
        plugin: tuple[str | Path, ...] = (
            "python",
            ROOT / "plugin.py",
            f"mode={mode}",
            f"state={self.state}",
            *arguments,
        )
        self.process = processes.start(("nbdkit", *options, *plugin), self.log)
        wait_until(self._ready, f"the {mode} serves")

    def _ready(self) -> bool:
        if self.process.poll() is not None:
            raise DemoError(f"the {self.mode} ended with {self.process.returncode}: {self.said()}")
        return self._pid_file.exists() and self._pid_file.stat().st_size > 0

    def said(self) -> str:
        """The end of what it has printed."""
        return self.log.read_text(errors="replace")[-2000:].strip()

    def uri(self, export: str = "") -> str:
        """libnbd's and QEMU's name of an export."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    def replctl(self, *arguments: str) -> str:
        """Run replctl and return what it prints."""
        try:
            return run(ROOT / "scripts" / "replctl", "--state", self.state, *arguments).strip()
        except DemoError as error:
            if self.process.poll() is None:
                raise
            raise DemoError(f"the {self.mode} ended with {self.process.returncode}: {self.said()}") from error

    def status(self) -> dict[str, Any]:
        """query-replication."""
        answer: dict[str, Any] = json.loads(self.replctl("status", "--json"))
        return answer

    def disk(self) -> dict[str, Any]:
        """The first disk's part of it."""
        found: dict[str, Any] = self.status()["disks"][0]
        return found

    def connect(self, export: str) -> nbd.NBD:
        """A client of one export."""
        handle = nbd.NBD()
        handle.set_export_name(export)
        handle.connect_unix(str(self.socket))
        return handle


class StageWatch:
    """When the node has entered which stage, by its own events. Times are seconds since 1970."""

    def __init__(self, control: Path) -> None:
        """Listen from now on; DemoError."""
        deadline = time.monotonic() + STEP_S
        with self._heard():
            self._qmp = Qmp(Lines(control, deadline))
            self._qmp.greet(deadline)
            # Events come from the answer to qmp_capabilities on: the next command is answered after that.
            for command in ("qmp_capabilities", "query-version"):
                self._qmp.execute(command, None, deadline)

    def next(self) -> tuple[str, float]:
        """Wait for the next change of stage: the stage entered and when; DemoError."""
        with self._heard():
            event = self._qmp.wait_event("REPLICATION_STAGE_CHANGE", time.monotonic() + STEP_S)
        stamp = event["timestamp"]
        return str(event["data"]["to"]), float(stamp["seconds"] + stamp["microseconds"] / 1e6)

    def close(self) -> None:
        """Listen no more."""
        self._qmp.close()

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except Trouble as error:
            raise DemoError(f"the control socket of the secondary: {error}") from error
