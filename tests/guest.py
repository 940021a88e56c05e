# SPDX-License-Identifier: BSD-3-Clause
"""A small Linux guest in stock QEMU, with NBD disks.

guestimages.py   what it is made of
guest_init.sh    what it does: it writes records, and tells which of them are durable
records.py       what a record looks like
console.py       what it says, and when
accelerator      which of KVM and TCG runs a guest on this machine
Guest            one qemu-system-x86_64; a lab.Process, so `Lab.start` and `Lab.add` own it
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

from console import Console
from guestimages import CACHE, GuestError, Images, run
from nbdprocess import NbdProcess
from process import Process
from qmp import Qmp
from records import Acknowledged
from waiting import Stuck, wait_until

MEMORY_MIB = 96
BOOT_S = 60.0
"""Longest time from the start of QEMU to the guest's first line: 2 to 4 s under TCG on an idle machine."""
PROOF_S = 15.0
"""Longest time that KVM gets for that: machines are known where it opens, but runs no guest."""

KERNEL_PARAMETERS = "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check nokaslr mitigations=off audit=0"
"""The last four save a guest under TCG a third of its boot. panic=-1 with -no-reboot: QEMU ends when the guest does."""


@cache
def accelerator() -> str:
    """`kvm` if a guest has proved here that it runs with it, else `tcg`.

    /dev/kvm is no proof: there are machines, virtual ones themselves, where QEMU opens it and the guest never says a
    word. What came of the trial is kept for as long as this host is up.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    host = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), run("qemu-system-x86_64", "--version")]
    verdict = CACHE / "accelerator.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(verdict.read_text())
        if known["host"] == host:
            return str(known["accelerator"])
    found = "kvm" if _kvm_works() else "tcg"
    partial = verdict.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"host": host, "accelerator": found}))
    partial.replace(verdict)
    return found


def _kvm_works() -> bool:
    with tempfile.TemporaryDirectory(prefix="kvm-") as folder:
        trial = Guest(Path(folder), "trial", Images.get(), [], accelerator="kvm")
        try:
            trial.start()
            trial.console.wait("alive", PROOF_S)
        except (Stuck, GuestError, AssertionError, EOFError):
            return False
        finally:
            trial.kill()
    return True


def nbd_node(node: str, server: NbdProcess, export: str, **more: Any) -> dict[str, Any]:
    """The -blockdev of an export, as docs/operating/everyday.md says to attach one."""
    address = {"type": "unix", "path": str(server.socket_path)}
    return {"driver": "nbd", "node-name": node, "server": address, "export": export, **more}


class Guest(Process):
    """One qemu-system-x86_64; `start` returns when its monitor (`qmp`) and its console are connected, not booted.

    `disks` become /dev/vda and so on: each a -blockdev whose node a virtio-blk device gets, or the name of a node that
    is in `nodes`. `paused`: the processor stands still until `qmp.execute("cont")`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        images: Images,
        disks: Sequence[Mapping[str, Any] | str],
        *,
        tag: int = 1,
        accelerator: str = "tcg",
        nodes: Sequence[Mapping[str, Any]] = (),
        paused: bool = False,
        parameters: str = "",
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, name)
        self.tag = tag
        self.begun: float = 0.0
        """time.monotonic() of the last start."""
        self._images = images
        self._disks = list(disks)
        self._accelerator = accelerator
        self._nodes = list(nodes)
        self._paused = paused
        self._parameters = f"{KERNEL_PARAMETERS} vm.tag={tag} vm.disks={len(disks)} {parameters}".strip()
        self._options = list(options)
        self.qmp: Qmp
        self.console: Console

    def command(self) -> list[str]:
        command = (
            [] if threading.current_thread() is not threading.main_thread() else ["setpriv", "--pdeathsig", "KILL"]
        )
        command += [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-M", f"pc,accel={self._accelerator}", "-m", str(MEMORY_MIB)),
            *("-kernel", str(self._images.kernel), "-initrd", str(self._images.initramfs)),
            *("-append", self._parameters),
            *("-chardev", f"socket,id=console,path={self._path('console')}", "-serial", "chardev:console"),
            *("-qmp", f"unix:{self._path('qmp')}"),
        ]
        for node in self._nodes:
            command += ["-blockdev", json.dumps(node)]
        for disk in self._disks:
            name = disk if isinstance(disk, str) else disk["node-name"]
            if not isinstance(disk, str):
                command += ["-blockdev", json.dumps(disk)]
            command += ["-device", f"virtio-blk-pci,drive={name}"]
        return [*command, *(["-S"] if self._paused else []), *self._options]

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}"

    def start(self) -> Self:
        # QEMU connects to us, for the reason in lab.Qemu, and so that no word of the guest is lost.
        with self._listener("qmp") as self._qmp_listener, self._listener("console") as self._console_listener:
            self.begun = time.monotonic()
            return super().start()

    @contextlib.contextmanager
    def _listener(self, kind: str) -> Iterator[socket.socket]:
        self._path(kind).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(os.fspath(self._path(kind)))
            listener.listen(1)
            listener.setblocking(False)
            yield listener

    def wait_ready(self) -> None:
        def come(listener: socket.socket) -> Callable[[], socket.socket | None]:
            def accepted() -> socket.socket | None:
                self.check_alive()
                try:
                    connection = listener.accept()[0]
                except BlockingIOError:
                    return None
                connection.setblocking(True)
                return connection

            return accepted

        console = wait_until(come(self._console_listener), f"{self.name} connects its console")
        self.console = Console(console, self._path("log"))
        self.qmp = Qmp(wait_until(come(self._qmp_listener), f"{self.name} connects its monitor"))

    def wait_working(self, records: int = 1, timeout_s: float = BOOT_S) -> Acknowledged:
        """Wait until the guest has booted and acknowledged so many records; errors as Console.wait."""
        self.console.wait("mounted", timeout_s)
        return self.console.wait_more(records, timeout_s)

    def switch_off(self, timeout_s: float = BOOT_S) -> int:
        """Have the guest stop writing, unmount, and switch itself off: the number of its last record."""
        self.console.send("stop")
        last = int(self.console.wait("stopped", timeout_s))
        self.wait_ended(timeout_s)
        self.qmp.close()
        return last

    def kill(self) -> None:
        super().kill()
        if hasattr(self, "console"):
            self.console.wait_end(BOOT_S)
            self.qmp.close()
