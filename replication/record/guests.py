# SPDX-License-Identifier: BSD-3-Clause
"""Whose disk is another one than they have used: guests of a node with follow-owner=true (passing.py).

A guest that was attached when its disk went back to a checkpoint, or when its node was made a secondary, must not go
on: its memory is of another disk, or another guest runs by now. Its connection learns that; but QEMU connects anew by
itself, perhaps to the next process. So the record knows who was there, and, with the stage by which they are over, that
they are.

    noted       whoever opens a guest's export, before it is served. Saved, if it is new, and later where the storage
                does not answer: a failover by force is for that, and somebody is to use the disk then
    over        with a stage that makes the disk another one (`end`), or a former owner's record as a secondary's
                (Record.as_secondary): all that are noted
    let in      a word: replication-resume-io, unless it ends a standstill (`forgive`)

A client on the Unix socket is known by its process: the number, and where /proc shows it, when it was started
(systemd's ProtectProc=invisible shows none of other users: then a new process with the number of a former one needs the
word). One over TCP, or of another PID namespace, is nobody in particular: once such a one is over, so are all like it,
until the word. That it has closed its connection says nothing: it may have been cut, and come back. In another boot
there are no processes of this one.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from replication.errors import Refusal

NOBODY = "?"
"""A client that cannot be told from others."""

LOCAL = "local"
"""One of this host, such as one in a container."""

EVERYBODY = "*"
"""In place of more guests than the record has room for."""

_MAX = 32


def guest_of(pid: int | None) -> str:
    """How the record names a client, by the process at the other end of its Unix socket; None: it has none. 0: the
    process has no number here."""
    if pid is None:
        return NOBODY
    if pid <= 0:
        return LOCAL
    since = _since(pid)
    return f"{pid}" if since is None else f"{pid}.{since}"


def _since(pid: int) -> str | None:
    """When a process was started, in ticks after the boot; None if it is not shown."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]  # proc(5), starttime
    except (OSError, IndexError):
        return None


def same(one: str, other: str) -> bool:
    """Whether two names may be of one guest."""
    if EVERYBODY in (one, other):
        return True
    (pid, _, since), (number, _, begun) = one.partition("."), other.partition(".")
    return pid == number and (since == begun or not since or not begun)


def lives(guest: str) -> bool:
    """Whether it may be there still."""
    pid, _, since = guest.partition(".")
    if not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        pass  # it is another user's
    except (OSError, OverflowError):
        return False
    return not since or _since(int(pid)) in (since, None)


def of_this_boot(guests: Iterable[str], same_boot: bool) -> list[str]:
    """Without the processes of another boot."""
    return [guest for guest in guests if same_boot or guest in (NOBODY, EVERYBODY)]


def together(*lists: Iterable[str]) -> list[str]:
    """All of them, as many as the record has room for."""
    found = {guest for guests in lists for guest in guests if lives(guest)}
    return [EVERYBODY] if len(found) > _MAX or EVERYBODY in found else sorted(found)


class Noted(Protocol):
    """As much of a record as this needs. The lists are replaced, never changed."""

    guests: list[str]
    guests_over: list[str]


class Guests:
    """Of one node. Every method may be called by any thread."""

    def __init__(self, record: Noted, save: Callable[[], None]) -> None:
        """`save()` makes the record last, soon where it cannot at once."""
        self._record = record
        self._save = save
        # Protects the two lists of the record. Never held across I/O (but a look at /proc).
        self._lock = threading.Lock()

    def note(self, pid: int | None) -> str:
        """A client wants a guest's export; how it is named. `check` is to follow once it would learn of the end.
        Refusal if its disk is another one now."""
        guest = guest_of(pid)
        self.check(guest)
        record = self._record
        with self._lock:
            known = guest in record.guests
            if not known:
                record.guests = together(record.guests, [guest])
        if not known:
            self._save()
        return guest

    def check(self, guest: str) -> None:
        """Refusal if its disk is another one than it has used."""
        if any(same(guest, over) for over in self._record.guests_over):
            raise Refusal(
                "this guest has used a disk that is another one now: end it and start it anew, or let it in with "
                "`replctl resume-io`, if it is a new one",
                errno.EPERM,
            )

    def end(self) -> tuple[list[str], list[str]]:
        """Whoever is noted is over with what is saved next; what `take_back` needs."""
        record = self._record
        with self._lock:
            former = (record.guests, record.guests_over)
            record.guests_over, record.guests = together(record.guests_over, record.guests), []
            return former

    def take_back(self, former: tuple[list[str], list[str]]) -> None:
        """They are not."""
        record = self._record
        with self._lock:
            record.guests, record.guests_over = together(former[0], record.guests), former[1]

    def replace(self, kept: Noted, take: Callable[[], None]) -> None:
        """The record becomes, by `take`, what comes of `kept`: as it was, but for guests that have come since."""
        with self._lock:
            kept.guests = self._record.guests
            take()

    def forgive(self) -> int:
        """Somebody lets them in again; how many there were."""
        with self._lock:
            found, self._record.guests_over = len(self._record.guests_over), []
        return found
