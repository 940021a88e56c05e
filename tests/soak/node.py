# SPDX-License-Identifier: BSD-3-Clause
"""A node of the soak: nbdkit with the plugin on a host of the network, its disk, its file systems and its clock."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbd

from content import MIB, make_raw
from lab import Lab
from namespaces import Host
from netpair import OnHost
from qmp import Qmp
from soak.bounds import Sample
from soak.moodydisk import MoodyDisk
from soak.plan import Setting

SIZE = 16 * MIB
CONNECT_S = 10.0

CLOCK = """\
import time
_time, _time_ns, _get = time.time, time.time_ns, time.clock_gettime

def _by():
    try:
        with open({path!r}) as file:
            return float(file.read() or 0)
    except (OSError, ValueError):
        return 0.0

time.time = lambda: _time() + _by()
time.time_ns = lambda: _time_ns() + int(_by() * 1e9)
time.clock_gettime = lambda clock: _get(clock) + (_by() if clock == time.CLOCK_REALTIME else 0.0)
"""
"""Read by Python when it starts (sitecustomize): the wall clock of one process, as far as Python sees it."""


class Node:
    """One of the two. What it is asked over NBD comes from its own host: the bad network is between the hosts."""

    def __init__(self, lab: Lab, host: Host, setting: Setting) -> None:
        self.name = host.name
        self.host = host
        self.lab = lab
        self.setting = setting
        self.expected_down = True
        """Whether somebody has ended it on purpose."""
        self.connections = 0
        """NBD clients that the soak has here, besides the guests."""
        self.line = ""
        """The mode on its command line."""
        self.spaces = {
            "state": lab.small_folder(4 * MIB),
            "overlays": lab.small_folder(3 * SIZE),
            "data": lab.small_folder(SIZE + 2 * MIB),
        }
        self.raw = make_raw(self.spaces["data"].folder / "disk.raw", SIZE)
        self.disk: MoodyDisk | None = None
        if setting.over_nbd[self.name]:
            self.disk = lab.start(MoodyDisk(lab.folder, self.raw, f"{self.name}-disk"))
        clock = lab.folder / f"{self.name}-clock"
        clock.mkdir()
        self._clock = clock / "by"
        (clock / "sitecustomize.py").write_text(CLOCK.format(path=str(self._clock)))
        self.process: OnHost
        self._count = 0
        self._log_read = 0
        self._stuck: Counter[int] = Counter()

    def begin(self, mode: str, secondary: str = "") -> None:
        """A process of that mode, with what a former one has left."""
        self._count += 1
        self.line = mode
        setting = self.setting
        disk = self.raw if self.disk is None else self.disk.uri()
        arguments = [f"mode={mode}", f"state={self.spaces['state'].folder / 'state'}", f"disk=disk0:{disk}"]
        arguments += [f"timeout={setting.timeout_s:g}", f"protocol={setting.protocol}", "queue-limit=8M"]
        arguments += [f"checkpoint-interval={setting.checkpoint_interval_s:g}", "resync-rate=20M"]
        if mode == "secondary":
            overlays = self.spaces["overlays"].folder
            arguments += ["top-id=top0", f"active={overlays}/active.qcow2", f"hidden={overlays}/hidden.qcow2"]
        else:
            arguments += [f"secondary={secondary}"]
        path = os.pathsep.join(filter(None, [str(self._clock.parent), os.environ.get("PYTHONPATH", "")]))
        process = OnHost(
            self.lab.folder, f"{self.name}{self._count}", arguments, extra_environment={"PYTHONPATH": path}
        )
        process.host = self.host
        self._log_read = 0
        self.process = process
        self.lab.add(process).start()
        self.expected_down = False

    def execute(self, command: str, /, arguments: Mapping[str, Any] | None = None, **more: Any) -> Any:
        """Run a control command, over a connection of its own. A node that is down is not waited for: OSError."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(CONNECT_S)
            connection.connect(os.fspath(self.process.control_path))
            with Qmp(connection) as qmp:
                return qmp.execute(command, arguments, **more)

    def status(self) -> dict[str, Any]:
        """`query-replication`."""
        status: dict[str, Any] = self.execute("query-replication")
        return status

    @property
    def export(self) -> str:
        """What a guest uses."""
        return "top0" if self.line == "secondary" else "disk0"

    def set_clock(self, by_s: float) -> None:
        """Its wall clock is so far from this machine's."""
        self._clock.with_suffix(".new").write_text(str(by_s))
        os.rename(self._clock.with_suffix(".new"), self._clock)

    def sample(self, connections: int) -> Sample | None:
        """How large it is; None when it does not run."""
        try:
            pid = self.process.pid
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
            )
            return Sample(
                pid=pid,
                resident=int(status["VmRSS"].split()[0]) << 10,
                anonymous=int(status["RssAnon"].split()[0]) << 10,
                threads=int(status["Threads"]),
                descriptors=len(os.listdir(f"/proc/{pid}/fd")),
                connections=connections,
                stuck=self._stuck[pid],
            )
        except (AssertionError, OSError, KeyError):
            return None

    def new_lines(self) -> list[str]:
        """What it has logged since the last time."""
        path = self.process.stderr_path
        if not path.exists():
            return []
        with open(path, "rb") as file:
            file.seek(self._log_read)
            whole, _, _ = file.read().rpartition(b"\n")
        self._log_read += len(whole) + bool(whole)
        lines = whole.decode(errors="replace").splitlines() if whole else []
        with contextlib.suppress(AssertionError):  # it has just ended
            self._stuck[self.process.pid] += sum("hung up with requests in flight" in line for line in lines)
        return lines

    def last_words(self) -> str:
        """The end of its log, in one line."""
        return " / ".join(self.process.stderr().splitlines()[-4:])[-600:]

    def content(self, export: str, offset: int, length: int, patience_s: float) -> bytes:
        """What an export shows; tried again until it can be read, AssertionError when that takes too long."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                handle = self.process.connect(export)
                data = b"".join(
                    bytes(handle.pread(min(MIB, offset + length - at), at))
                    for at in range(offset, offset + length, MIB)
                )
                handle.shutdown()
                return data
            except nbd.Error as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{self.name}: {export} cannot be read: {error}") from error
                time.sleep(0.1)
