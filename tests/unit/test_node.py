# SPDX-License-Identifier: BSD-3-Clause
"""node.py: what the record says before, during and after a promoted secondary becomes a primary. The new secondary is
played by the test."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import make_raw, pattern, wait_until
from replication.boot import BOOT_ID_ENVIRONMENT
from replication.errors import CommandError, ConfigError, DiskError
from replication.events import EventHub
from replication.export import Exports
from replication.forward import Forwarder
from replication.image.qcow2 import BLOCK
from replication.node import Node
from replication.options import DiskOptions, Options
from replication.primary import PrimarySide
from replication.secondary import SecondarySide
from replication.stage import Mode, Stage
from replication.state import Record, StateError, StateFolder

SIZE = 1 << 20
URI = "nbd://new-secondary"


class NewSecondary:
    """In a connection's place."""

    size = SIZE

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Host:
    """A node over its processes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        make_raw(folder / "disk", SIZE, pattern(1, SIZE))
        self.connections: list[NewSecondary] = []
        self.reachable = True
        monkeypatch.setattr(PrimarySide, "_connect", lambda side, disk, uri: self.connect())
        monkeypatch.setattr(PrimarySide, "_check_open", staticmethod(lambda connection: None))
        monkeypatch.setattr(Forwarder, "adopt", lambda forwarder, connection: None)
        self.node: Node | None = None

    def connect(self) -> NewSecondary:
        if not self.reachable:
            raise DiskError("nobody there")
        self.connections.append(NewSecondary())
        return self.connections[-1]

    def start(self, mode: Mode = Mode.SECONDARY) -> Node:
        secondary = mode is Mode.SECONDARY
        disk = DiskOptions("disk0", str(self.folder / "disk"), "top" if secondary else None)
        if secondary:
            disk.active, disk.hidden = (str(self.folder / f"{role}.qcow2") for role in ("active", "hidden"))
        self.state = StateFolder(str(self.folder / "state"))
        try:
            options = Options(mode, [disk], str(self.folder / "state"), None)
            self.events: list[dict[str, Any]] = []
            hub = EventHub()
            hub.subscribe(self.events.append)
            self.node = Node(options, hub, self.state)
        except BaseException:
            self.state.close()
            raise
        self.node.launch()
        return self.node

    def end(self) -> None:
        if self.node is not None:
            self.node.close()
            self.node = None

    def promoted(self) -> Node:
        """A secondary whose failover is over."""
        node = self.start()
        node.start(None, None, "auto")
        node.stop(failover=True)
        wait_until(lambda: node.stage is Stage.DONE, "the commit is over")
        return node

    def saved(self) -> tuple[Mode, Stage, bool, str | None]:
        record = self.state.load()
        assert record is not None
        return record.mode, record.stage, record.promoted, record.secondary


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv(BOOT_ID_ENVIRONMENT, "first")
    opened = Host(tmp_path, monkeypatch)
    yield opened
    opened.end()


AS_SECONDARY = (Mode.SECONDARY, Stage.DONE, False, None)
AS_PRIMARY = (Mode.PRIMARY, Stage.RUNNING, True, URI)


def test_a_promoted_secondary_that_has_become_a_primary_says_so_in_its_record(host: Host) -> None:
    node = host.promoted()
    assert host.saved() == AS_SECONDARY
    node.start(Mode.PRIMARY, URI, "auto")
    assert host.saved() == AS_PRIMARY
    assert isinstance(node.side, PrimarySide)
    assert node.query()["mode"] == "primary"
    change = [event["data"] for event in host.events if event["event"] == "REPLICATION_STAGE_CHANGE"][-1]
    assert change == {"mode": "primary", "from": "done", "to": "running"}


def test_its_guest_goes_on_over_the_export_that_it_has_and_the_old_primary_is_kept_out(host: Host) -> None:
    node = host.promoted()
    exports = Exports(node)
    guest, target = exports.open("top"), exports.open("disk0")
    guest.write(memoryview(b"\xaa" * BLOCK), 0, False)
    node.start(Mode.PRIMARY, URI, "auto")
    guest.write(memoryview(b"\xbb" * BLOCK), BLOCK, False)
    data = bytearray(2 * BLOCK)
    guest.read(memoryview(data), 0)
    assert data == b"\xaa" * BLOCK + b"\xbb" * BLOCK
    for request in (
        lambda: target.write(memoryview(b"x"), 0, False),
        lambda: target.read(memoryview(bytearray(1)), 0),
        lambda: target.zero(0, 1, True, False),
        lambda: target.extents(0, 1),
        target.flush,
    ):
        with pytest.raises(DiskError, match="takes nothing from its old primary any more") as refusal:
            request()
        assert refusal.value.wire_errno == errno.ESHUTDOWN
    assert exports.default() == "", "whoever names none may be the old primary"
    assert [name for name, _ in exports.names()] == ["top", "disk0"]


def test_the_next_process_is_a_primary_by_either_command_line(host: Host) -> None:
    host.promoted().start(Mode.PRIMARY, URI, "auto")
    for mode in (Mode.SECONDARY, Mode.PRIMARY):
        host.end()
        node = host.start(mode)
        assert isinstance(node.side, PrimarySide)
        assert node.stage is Stage.RUNNING
        assert host.saved() == AS_PRIMARY


def test_a_start_that_finds_nobody_changes_nothing(host: Host) -> None:
    node = host.promoted()
    host.reachable = False
    before = dict(node.faces)
    with pytest.raises(CommandError, match="cannot start: nobody there"):
        node.start(Mode.PRIMARY, URI, "auto")
    assert host.saved() == AS_SECONDARY
    assert isinstance(node.side, SecondarySide)
    assert (node.stage, node.faces) == (Stage.DONE, before)
    host.reachable = True
    node.start(Mode.PRIMARY, URI, "auto")
    assert host.saved() == AS_PRIMARY


def test_a_start_whose_state_cannot_be_written_changes_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StateError("cannot write it")

    node = host.promoted()
    before = dict(node.faces)
    with monkeypatch.context() as broken:
        broken.setattr(host.state, "save", refuse)
        with pytest.raises(CommandError, match="cannot write it"):
            node.start(Mode.PRIMARY, URI, "auto")
    assert all(connection.closed for connection in host.connections)
    assert host.saved() == AS_SECONDARY
    assert isinstance(node.side, SecondarySide)
    assert (node.stage, node.faces) == (Stage.DONE, before)
    node.start(Mode.PRIMARY, URI, "auto")
    assert host.saved() == AS_PRIMARY


@pytest.mark.parametrize(
    ("record", "mode"),
    [
        (Record(Mode.PRIMARY, Stage.RUNNING), Mode.SECONDARY),
        (Record(Mode.SECONDARY, Stage.DONE), Mode.PRIMARY),
    ],
    ids=["a primary", "a secondary"],
)
def test_the_state_of_the_other_mode_is_refused_unless_it_was_promoted(host: Host, record: Record, mode: Mode) -> None:
    state = StateFolder(str(host.folder / "state"))
    state.save(record)
    state.close()
    with pytest.raises(ConfigError, match=f"belongs to a {record.mode.value}; start with mode={record.mode.value}"):
        host.start(mode)


def test_an_unknown_export_is_refused_and_the_valid_ones_are_named(host: Host) -> None:
    exports = Exports(host.start())
    for name in ("", "other"):
        with pytest.raises(DiskError, match=r"there is no export '.*': the exports are 'disk0', 'top'"):
            exports.open(name)
    assert exports.open("disk0").size == SIZE
    assert exports.open("top").description.startswith("guest face")
