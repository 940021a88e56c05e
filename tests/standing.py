# SPDX-License-Identifier: BSD-3-Clause
"""Requests of a guest that stands still, and what becomes of them."""

from __future__ import annotations

import nbd

from nodes import Pair, Server, disk_name
from waiting import wait_until


def stands(server: Server, handle: nbd.NBD, *cookies: int) -> None:
    """These requests have come as far as they may, and are not answered."""

    def waits() -> bool:
        stall = server.execute("query-replication-latency")["longest-stall"]
        return stall is not None and (stall["reason"], stall["under-way"]) == ("standstill", True)

    wait_until(waits, "the guest's request stands still")
    handle.poll(0)
    assert not any(handle.aio_command_completed(cookie) for cookie in cookies)


def completed(handle: nbd.NBD, *cookies: int) -> None:
    """Wait until these requests have succeeded."""
    left = set(cookies)

    def over() -> bool:
        handle.poll(100)
        for cookie in [cookie for cookie in left if handle.aio_command_completed(cookie)]:
            left.discard(cookie)
        return not left

    wait_until(over, "the guest's requests are answered")


def restarted_alone(pair: Pair) -> tuple[nbd.NBD, int]:
    """The primary, killed and started without its secondary; a guest of it, and the cookie of its write, which stands
    still."""
    pair.secondary.kill()
    pair.primary.kill()
    pair.primary.start()
    guest = pair.primary.connect(disk_name(0))
    write = guest.aio_pwrite(nbd.Buffer.from_bytearray(b"2" * 512), 0)
    stands(pair.primary, guest, write)
    return guest, write
