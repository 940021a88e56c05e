#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""The guest: appends numbered records to the disk that this host's node serves, and says in one file for both hosts
which were acknowledged, and which the owner's last checkpoint has.

A record is a block of 4096 bytes: `GENERATION NUMBER`, where the generation is that of this run of the guest. Lines:

    begin HOST GENERATION NUMBER BEFORE   it goes on with NUMBER, and the generation of the record before is BEFORE
    ack HOST GENERATION NUMBER
    safe HOST GENERATION NUMBER           the checkpoint that was taken last has this one and all before

A guest flushes after each record, or, if its generation ends with an even digit, after each second only: of what it was
answered since, a loss of power may take the last, but nothing that a checkpoint has. Each line begins with a time in
seconds. Lines are appended whole, so their order is the order in which it happened.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time

import nbd

NODE = "vm1"
CONTROL = f"/run/nbdkit-replication/{NODE}/control.sock"
BLOCK = 4096
PAUSE_S = 0.02
LAZY_EACH = 50
"""Records between two flushes of a guest that does not flush each."""
LOOK_S = 0.3
CUT_SPARE_S = 0.1
"""Between the moment at which the owner measures how long a checkpoint took, and the one that it notes."""


class Journal:
    def __init__(self, path: str, generation: str, host: str = "") -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._who = f"{host or socket.gethostname()} {generation}"

    def say(self, word: str, *more: object) -> None:
        line = " ".join(map(str, (f"{time.time():.3f}", word, self._who, *more)))
        os.write(self._file, f"{line}\n".encode())


class Disk:
    def __init__(self) -> None:
        self._nbd = nbd.NBD()
        self._nbd.connect_uri(f"nbd+unix:///guest?socket=/run/nbdkit-replication/{NODE}/guest.sock")
        self.blocks = self._nbd.get_size() // BLOCK

    def read(self, number: int) -> str:
        """The generation of a record, "" if there is none."""
        generation, _, rest = bytes(self._nbd.pread(BLOCK, number * BLOCK)).partition(b" ")
        return generation.decode() if rest.startswith(b"%d\n" % number) else ""

    def write(self, generation: str, number: int, each: int) -> None:
        self._nbd.pwrite(f"{generation} {number}\n".encode().ljust(BLOCK, b"."), number * BLOCK)
        if number % each == 0:
            self._nbd.flush()


def checkpoint(path: str = CONTROL) -> dict[str, float] | None:
    """The owner's last."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(5)
        control.connect(path)
        lines = control.makefile()
        lines.readline()
        for command in ("qmp_capabilities", "query-replication"):
            control.sendall(json.dumps({"execute": command}).encode() + b"\n")
            answer = {}
            while "return" not in answer:
                answer = json.loads(lines.readline())
    found = answer["return"]
    return found["checkpoint"] if found["mode"] == "primary" and found["checkpoint"]["time"] else None


def watch(
    journal: Journal, acknowledged: list[tuple[float, int]], path: str = CONTROL, ended: threading.Event | None = None
) -> None:
    """Tell what each checkpoint has, until the guest has `ended`. `acknowledged` grows meanwhile."""
    last = None
    begun = time.time()
    ended = ended or threading.Event()
    while not ended.wait(LOOK_S):
        try:
            taken = checkpoint(path)
        except (OSError, ValueError, KeyError):
            continue
        if taken is None or taken["time"] == last or taken["time"] < begun:
            continue
        last = taken["time"]
        cut = last - taken["duration"] - CUT_SPARE_S
        had = [number for when, number in list(acknowledged) if when < cut]
        if had:
            journal.say("safe", had[-1])


def main() -> None:
    generation = secrets.token_hex(4)
    journal = Journal(sys.argv[1], generation)
    disk = Disk()
    low, high = 0, disk.blocks
    while low < high:
        middle = (low + high) // 2
        if disk.read(middle):
            low = middle + 1
        else:
            high = middle
    journal.say("begin", low, disk.read(low - 1) if low else "-")
    acknowledged: list[tuple[float, int]] = []
    threading.Thread(target=watch, args=(journal, acknowledged), daemon=True).start()
    each = LAZY_EACH if int(generation, 16) % 2 == 0 else 1
    for number in range(low, disk.blocks):
        disk.write(generation, number, each)
        acknowledged.append((time.time(), number))
        journal.say("ack", number)
        time.sleep(PAUSE_S)
    time.sleep(1e6)


if __name__ == "__main__":
    main()
