# SPDX-License-Identifier: BSD-3-Clause
"""What guests in QEMU (guest_init.sh) say on their consoles, as lines of the journal (writer.py)."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from cluster.power import Host
from cluster.writer import CONTROL, Journal, watch


def writer_of(journal: str, number: int) -> str:
    """The generation that was answered that record last, "-" if none was."""
    lines = (line.split() for line in Path(journal).read_text().splitlines())
    found = [words[3] for words in lines if words[1] == "ack" and int(words[4]) == number]
    return found[-1] if found else "-"


class Hearing:
    """One run of a guest. `control` is the socket of the node that serves it."""

    def __init__(self, journal: Journal, path: str, control: str = CONTROL) -> None:
        self._journal = journal
        self._path = path
        self._control = control
        self._acknowledged: list[tuple[float, int]] = []
        self._ended = threading.Event()

    def hear(self, line: str) -> None:
        """A line of the console."""
        who, _, said = line.strip().partition(" ")
        word, _, rest = said.partition(" ")
        if who != "vm:":
            return
        if word == "mounted":
            # The guest counts from 1, the journal from 0.
            following = int(rest)
            self._journal.say("begin", following, writer_of(self._path, following - 1) if following else "-")
            told = (self._journal, self._acknowledged, self._control, self._ended)
            threading.Thread(target=watch, args=told, daemon=True).start()
        elif word == "record":
            number = int(rest.split()[0]) - 1
            self._acknowledged.append((time.time(), number))
            self._journal.say("ack", number)
        elif word == "error":
            print(f"{self._path}: {said}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The guest is gone."""
        self._ended.set()


class Consoles:
    """Of a host: where the QEMU of its libvirt connects the console of each guest that it starts."""

    def __init__(self, host: Host, path: Path, journal: Path) -> None:
        self._host = host
        self._journal = journal
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(os.fspath(path))
        path.chmod(0o666)  # QEMU is a user of its own
        self._socket.listen(8)
        threading.Thread(target=self._serve, name=f"consoles {host.name}", daemon=True).start()

    def close(self) -> None:
        """Nobody is heard any more."""
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                client = self._socket.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._hear, args=(client,), daemon=True).start()

    def _hear(self, client: socket.socket) -> None:
        journal = Journal(os.fspath(self._journal), secrets.token_hex(4), self._host.name)
        hearing = Hearing(journal, os.fspath(self._journal), f"/proc/{self._host.init}/root{CONTROL}")
        with client, client.makefile(errors="replace") as lines:
            try:
                for line in lines:
                    hearing.hear(line)
            except OSError:
                pass  # its host has no power any more
        hearing.end()
