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
import threading
import time
from pathlib import Path
from types import FrameType

from writer import NODE, Journal, watch

PARAMETERS = (
    "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check nokaslr mitigations=off audit=0 vm.tag=1 vm.disks=1"
)


def writer_of(journal: str, number: int) -> str:
    """The generation that was answered that record last, "-" if none was."""
    lines = (line.split() for line in Path(journal).read_text().splitlines())
    found = [words[3] for words in lines if words[1] == "ack" and int(words[4]) == number]
    return found[-1] if found else "-"


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
    acknowledged: list[tuple[float, int]] = []
    assert machine.stdout is not None
    for line in machine.stdout:
        who, _, said = line.strip().partition(" ")
        word, _, rest = said.partition(" ")
        if who != "vm:":
            continue
        if word == "mounted":
            # The guest counts from 1, the journal from 0.
            following = int(rest)
            journal.say("begin", following, writer_of(path, following - 1) if following else "-")
            threading.Thread(target=watch, args=(journal, acknowledged), daemon=True).start()
        elif word == "record":
            number = int(rest.split()[0]) - 1
            acknowledged.append((time.time(), number))
            journal.say("ack", number)
        elif word == "error":
            print(f"machine.py: {said}", file=sys.stderr, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
