# SPDX-License-Identifier: BSD-3-Clause
"""The largest zero and the largest block status that one request can ask for, 4 GiB - 4 KiB, on sparse disks larger
than that: nbdkit up to 1.42.2 ends at an answer that reaches 4 GiB (CVE-2025-47711, CVE-2025-47712)."""

from __future__ import annotations

import nbd
import pytest

from lab import DEADLINE_S, KIB, MIB, Lab, NbdProcess, Primary, Secondary, Server, make_raw, wait_until

GIB = 1024 * MIB
SIZE = 9 * GIB
LENGTH = 4 * GIB - 4 * KIB
OFFSETS = (0, 4 * KIB, GIB + 4 * KIB, SIZE - LENGTH)
MARK = b"mark" * KIB
"""A block of data, so that not all is one hole."""


def status(handle: nbd.NBD, offset: int) -> list[int]:
    """The lengths of what is known of LENGTH bytes from `offset` on."""
    lengths: list[int] = []

    def told(_context: str, _offset: int, entries: list[int], _error: object) -> int:
        lengths.extend(entries[::2])
        return 0

    handle.block_status(LENGTH, offset, told)
    return lengths


def uses_the_limits(server: NbdProcess, export: str) -> None:
    """Zeroes, then asks, then writes and asks again, of ranges that begin anywhere."""
    disk = server.connect(export)
    assert disk.get_size() == SIZE
    for offset in OFFSETS:
        lengths = status(disk, offset)
        assert 0 < sum(lengths) <= LENGTH, offset
        disk.zero(LENGTH, offset)
        disk.pwrite(MARK, offset + GIB)
        lengths = status(disk, offset)
        assert 0 < sum(lengths) <= LENGTH, offset
        disk.trim(LENGTH, offset)
        assert disk.pread(len(MARK), offset + GIB) == bytes(len(MARK))
        assert 0 < sum(status(disk, offset)) <= LENGTH, offset
    server.check_alive()
    disk.shutdown()


@pytest.mark.parametrize("over_nbd", [False, True], ids=["file", "over NBD"])
def test_a_primary_at_the_limits(lab: Lab, over_nbd: bool) -> None:
    raw = make_raw(lab.folder / "disk.raw", SIZE)
    disk = lab.endpoint(path=raw).uri() if over_nbd else str(raw)
    server = lab.start(Server(lab.folder, "primary", ["mode=primary", f"disk={disk}", f"state={lab.folder}/state"]))
    uses_the_limits(server, "")


@pytest.mark.parametrize(("face", "running"), [("disk0", False), ("disk0", True), ("top0", True)])
def test_a_secondary_at_the_limits(lab: Lab, face: str, running: bool) -> None:
    server = lab.secondary([SIZE])
    if running:
        server.start_replication()
    uses_the_limits(server, face)


def test_a_pair_at_the_limits(lab: Lab) -> None:
    """The primary forwards the zeroes, and asks its secondary's disk in a resync."""
    pair = lab.pair([SIZE])
    pair.start_replication()
    primary: Primary = pair.primary
    secondary: Secondary = pair.secondary
    uses_the_limits(primary, "disk0")
    primary.checkpoint()
    guest = secondary.connect("top0")
    wait_until(lambda: guest.pread(4 * KIB, GIB) == bytes(4 * KIB), "the zeroes arrive", DEADLINE_S)
