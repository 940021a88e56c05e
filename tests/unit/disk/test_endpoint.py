# SPDX-License-Identifier: BSD-3-Clause
"""endpoint.py: a disk behind NBD, over lost connections and servers that want whole blocks."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from content import make_raw, pattern
from lab import Lab
from nbdprocess import NbdProcess
from replication.disk import endpoint as endpoint_module
from replication.disk.endpoint import NbdDisk
from replication.disk.unflushed import Loss
from replication.errors import ConfigError, DiskError
from waiting import DEADLINE_S

SIZE = (1 << 20) + 4096 * 3


@pytest.fixture(autouse=True)
def _reconnect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "RETRY_S", 0.0)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "raw", SIZE, pattern(1, SIZE))


Attach = Callable[[NbdProcess], NbdDisk]


@pytest.fixture
def attach(lab: Lab) -> Iterator[Attach]:
    """Opens disks and closes them before the servers end, also when a test has failed: nbdkit waits for its clients."""
    with contextlib.ExitStack() as opened:

        def open_disk(server: NbdProcess) -> NbdDisk:
            disk = NbdDisk("disk0", server.uri())
            opened.callback(disk.close)
            return disk

        yield open_disk


def content(disk: NbdDisk, offset: int = 0, length: int = SIZE) -> bytes:
    data = bytearray(length)
    disk.read(memoryview(data), offset)
    return bytes(data)


@pytest.mark.parametrize("block_size", [1, 512, 4096])
def test_any_alignment_is_served_whatever_the_server_wants(
    lab: Lab, attach: Attach, raw: Path, block_size: int
) -> None:
    policy = [f"blocksize-minimum={block_size}", "blocksize-error-policy=error"]
    server = lab.endpoint(path=raw, filters=["blocksize-policy"], filter_arguments=policy)
    disk = attach(server)
    model = bytearray(pattern(1, SIZE))
    requests = st.tuples(
        st.sampled_from(["write", "zero", "read", "extents"]),
        st.one_of(st.integers(0, SIZE - 1), st.sampled_from([0, SIZE - 4096, SIZE - 1])),
        st.one_of(st.integers(1, 20_000), st.just(SIZE)),
        st.booleans(),
    )

    @given(st.lists(requests, min_size=1, max_size=12))
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    def histories(history: list[tuple[str, int, int, bool]]) -> None:
        for kind, offset, wanted, flag in history:
            length = min(wanted, SIZE - offset)
            if kind == "write":
                data = pattern(offset + length, length)
                disk.write([data[: length // 3], data[length // 3 :]], offset, flag)
                model[offset : offset + length] = data
            elif kind == "zero":
                disk.zero(offset, length, flag)
                model[offset : offset + length] = bytes(length)
            elif kind == "read":
                assert content(disk, offset, length) == model[offset : offset + length]
            else:
                at = offset
                for extent in disk.extents(offset, length):
                    assert extent.offset == at
                    at += extent.length
                    assert not extent.zero or not any(model[extent.offset : at])
                assert offset < at <= offset + length
        assert content(disk) == model

    histories()


def test_writes_to_parts_of_one_server_block_do_not_undo_each_other(lab: Lab, attach: Attach) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
    server = lab.endpoint(
        size=65536, filters=["blocksize-policy"], filter_arguments=policy, delay={"read": "2ms", "write": "2ms"}
    )
    disk = attach(server)
    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(disk.write, [bytes([number + 1]) * 512], number * 512) for number in range(8)]
        for end in ends:
            end.result(DEADLINE_S)
    assert content(disk, 0, 4096) == b"".join(bytes([number + 1]) * 512 for number in range(8))


def test_after_a_lost_connection_the_next_request_connects_anew(lab: Lab, attach: Attach, raw: Path) -> None:
    server = lab.endpoint(path=raw)
    disk = attach(server)
    assert disk.reachable()
    server.kill()
    with pytest.raises(DiskError):
        content(disk, 0, 10)
    assert not disk.reachable()
    server.start()
    assert content(disk, 0, 10) == pattern(1, 10)
    assert disk.reachable()


def lose_connection(server: Any, disk: NbdDisk) -> None:
    """The server is killed and started again, and the disk has noticed."""
    connection = disk._connection
    assert connection is not None
    server.kill()
    while not connection.dead:
        with pytest.raises(DiskError):
            content(disk, 0, 1)
    server.start()


@pytest.mark.parametrize("change", ["write", "zero"])
def test_a_flush_fails_once_when_unflushed_data_may_be_lost(lab: Lab, attach: Attach, raw: Path, change: str) -> None:
    server = lab.endpoint(path=raw)
    disk = attach(server)
    if change == "write":
        disk.write([b"x"], 0)
    else:
        disk.zero(0, 1, True)
    lose_connection(server, disk)
    with pytest.raises(DiskError, match="lost with unflushed writes"):
        disk.flush()
    disk.flush()


def test_a_look_finds_a_loss_also_when_it_is_too_soon_to_connect_anew(
    lab: Lab, attach: Attach, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint looks before it is taken, and must not have what is gone."""
    server = lab.endpoint(path=raw)
    disk = attach(server)
    disk.write([b"x"], 0)
    losses: list[str] = []

    def lost(loss: Loss) -> bool:
        losses.append(str(loss.error))
        return True

    disk._account.on_loss = lost
    monkeypatch.setattr(disk, "_retry_at", math.inf)  # another loss was a moment ago
    server.kill()
    for _ in range(2):  # and once
        disk.look()
    assert len(losses) == 1
    assert "lost with unflushed writes" in losses[0]


@pytest.mark.parametrize("fua", [False, True], ids=["flushed", "forced"])
def test_a_flush_does_not_fail_for_data_that_was_stable_when_the_connection_went(
    lab: Lab, attach: Attach, raw: Path, fua: bool
) -> None:
    server = lab.endpoint(path=raw)
    disk = attach(server)
    disk.write([b"x"], 0, fua)
    if not fua:
        disk.flush()
    lose_connection(server, disk)
    disk.write([b"y"], 0)  # goes to the new connection, and is flushed there
    disk.flush()


def test_a_write_that_ends_after_a_flush_counts_as_unflushed(
    lab: Lab, attach: Attach, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = lab.endpoint(path=raw)
    disk = attach(server)
    at_server, go_on = threading.Event(), threading.Event()
    real = disk._run

    def run(*arguments: Any, **named: Any) -> None:
        if threading.current_thread() is writer:
            at_server.set()
            assert go_on.wait(DEADLINE_S)
        real(*arguments, **named)

    monkeypatch.setattr(disk, "_run", run)
    writer = threading.Thread(target=disk.write, args=([b"x"], 0))
    writer.start()
    assert at_server.wait(DEADLINE_S)
    disk.flush()
    go_on.set()
    writer.join(DEADLINE_S)
    lose_connection(server, disk)
    with pytest.raises(DiskError, match="lost with unflushed writes"):
        disk.flush()


def test_another_disk_behind_the_same_address_is_not_taken(lab: Lab, attach: Attach, raw: Path) -> None:
    server = lab.endpoint(path=raw)
    disk = attach(server)
    server.kill()
    os.truncate(raw, SIZE + 4096)
    with pytest.raises(DiskError):
        content(disk, 0, 1)
    server.start()
    with pytest.raises(DiskError, match="came back as a different disk"):
        content(disk, 0, 1)


@pytest.fixture
def read_only(lab: Lab, raw: Path) -> Iterator[str]:
    return lab.endpoint(path=raw, options=["--read-only"]).uri()


def test_a_server_that_cannot_be_written_is_refused(read_only: str) -> None:
    with pytest.raises(ConfigError, match=r"disk 'disk0': .* is served read-only"):
        NbdDisk("disk0", read_only)


def test_a_server_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk 'disk0': cannot connect to"):
        NbdDisk("disk0", f"nbd+unix:///?socket={tmp_path}/nobody")
