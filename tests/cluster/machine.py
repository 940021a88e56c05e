#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""The guest, as writer.py, but in QEMU: what it says on its console becomes the lines of the journal.

`machine.py JOURNAL KERNEL INITRAMFS`: runs the guest of guest_init.sh; the end of either is the end of both.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cluster.consoles import Hearing
from cluster.writer import NODE, Journal

PARAMETERS = (
    "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check nokaslr mitigations=off audit=0 vm.tag=1 vm.disks=1"
)


def main() -> None:
    path, kernel, initramfs = sys.argv[1:]
    generation = secrets.token_hex(4)
    journal = Journal(path, generation)
    disk = f"nbd+unix:///guest?socket=/run/nbdkit-replication/{NODE}/guest.sock"
    machine = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL"),
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-M", "pc,accel=tcg", "-m", "96", "-kernel", kernel, "-initrd", initramfs, "-append", PARAMETERS),
            *("-drive", f"file={disk},format=raw,if=virtio,cache=none", "-serial", "stdio"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )

    def end(_signal: int, _frame: FrameType | None) -> None:
        machine.kill()
        machine.wait()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    hearing = Hearing(journal, path)
    assert machine.stdout is not None
    for line in machine.stdout:
        hearing.hear(line)
    sys.exit(1)


if __name__ == "__main__":
    main()
