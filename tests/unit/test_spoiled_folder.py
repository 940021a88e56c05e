# SPDX-License-Identifier: BSD-3-Clause
"""What a node claims when a file of its state folder is gone, cut off, or not the one that it was: in every stage, for
every file, everything may differ, and nothing that is not known counts as a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from content import make_raw, pattern
from replication.errors import ConfigError
from replication.events import EventHub
from replication.node import Node
from replication.options import DiskOptions, Options
from replication.primary.dial import Dialler
from replication.primary.forward import Forwarder
from replication.primary.peer import Peer
from replication.primary.side import PrimarySide
from replication.record.lineage import new_id
from replication.record.state import StateError, StateFolder
from replication.secondary.failover import Failover
from replication.secondary.side import SecondarySide
from replication.stage import Mode, Stage
from waiting import wait_until

SIZE = 1 << 20
URI = "nbd://plain"
STAGES = [
    (Mode.SECONDARY, Stage.NONE),
    (Mode.SECONDARY, Stage.RUNNING),
    (Mode.SECONDARY, Stage.FAILOVER),
    (Mode.SECONDARY, Stage.DONE),
    (Mode.PRIMARY, Stage.NONE),
    (Mode.PRIMARY, Stage.RUNNING),
    (Mode.PRIMARY, Stage.DONE),
]
FILES = ["state.json", "epoch", "disk0.changes", "disk0.lost", "disk0.unflushed"]
HOWS = ["missing", "empty", "short", "older", "another's"]


class Connection:
    """In the place of one to a plain NBD server."""

    size = SIZE
    description = ""
    dead = False
    fence = None
    uri = URI

    def close(self) -> None:
        pass


class Host:
    """Where one node's processes run, one after the other."""

    def __init__(self, folder: Path, mode: Mode) -> None:
        self.folder = folder
        self.mode = mode
        self.node: Node | None = None

    def start(self) -> Node:
        disk = DiskOptions("disk0", str(self.folder / "disk"), "top" if self.mode is Mode.SECONDARY else None)
        if self.mode is Mode.SECONDARY:
            disk.active, disk.hidden = (str(self.folder / f"{role}.qcow2") for role in ("active", "hidden"))
        self.state = StateFolder(str(self.folder / "state"))
        try:
            self.node = Node(Options(self.mode, [disk], str(self.folder / "state"), None), EventHub(), self.state)
        except BaseException:
            self.state.close()
            raise
        self.node.launch()
        return self.node

    def end(self) -> None:
        if self.node is not None:
            self.node.close()
            self.node = None


def reach(node: Node, mode: Mode, stage: Stage) -> None:
    if stage is not Stage.NONE:
        node.start(None, URI if mode is Mode.PRIMARY else None, "auto")
    if stage is Stage.FAILOVER:
        node.stop(failover=True)
    if stage is Stage.DONE:
        node.stop(failover=False)


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: f"{stage[0].value}-{stage[1].value}")
def left(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Mode, Stage]]:
    """Copies of folders as a killed process leaves them: "now", "older" (the process before) and "another's"."""
    mode, stage = request.param
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patched:
        plain_server(patched)
        patched.setattr(Failover, "begin", lambda failover: None)
        for name in ("this", "another's"):
            host = Host(folder / "host" / name, mode)
            host.folder.mkdir(parents=True)
            make_raw(host.folder / "disk", SIZE, pattern(1, SIZE))
            node = host.start()
            reach(node, mode, stage)
            # Copied while it is at work, so nothing has ended well; the next one comes to such a copy.
            copy_at_work(host, folder / ("older" if name == "this" else name))
            host.end()
        again = Host(folder / "now.at-work", mode)
        shutil.copytree(folder / "older", again.folder)
        move(again.folder, folder / "host" / "this")
        again.folder = folder / "host" / "this"
        again.start()
        copy_at_work(again, folder / "now")
        again.end()
    return folder, mode, stage


def copy_at_work(host: Host, target: Path) -> None:
    """As a kill would leave it: without a save between the copies of two files."""
    for _ in range(20):
        assert host.state._file is not None
        serial = host.state._file.serial
        shutil.copytree(host.folder, target)
        if host.state._file.serial == serial:
            return
        shutil.rmtree(target)
    pytest.fail("it saves all the time")


def move(source: Path, target: Path) -> None:
    """In its place: images name the files below them."""
    shutil.rmtree(target)
    source.rename(target)


def plain_server(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Peer, "open", lambda *_: None)
    patched.setattr(Dialler, "_plain", lambda *_: Connection())
    patched.setattr(Dialler, "_check_open", staticmethod(lambda connection: None))
    patched.setattr(Forwarder, "adopt", lambda *_: None)


@pytest.fixture
def host(left: tuple[Path, Mode, Stage], monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    plain_server(monkeypatch)
    folder, mode, _ = left
    host = Host(folder / "host" / "this", mode)
    shutil.copytree(folder / "now", folder / "copy")
    move(folder / "copy", host.folder)
    yield host
    host.end()


def spoil(path: Path, how: str, folder: Path) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "short":
        path.write_bytes(path.read_bytes()[:10])
    else:
        shutil.copy(folder / how / "state" / path.name, path)


def marked(node: Node) -> dict[str, int]:
    side: Any = node.side
    kinds = ("changes", "lost") if isinstance(side, SecondarySide) else ("changes",)
    return {kind: getattr(side.disks[0], kind).marked_bytes for kind in kinds}


def test_untouched_all_is_believed(left: tuple[Path, Mode, Stage], host: Host) -> None:
    node = host.start()
    stage = left[2]
    if stage is Stage.FAILOVER:
        wait_until(lambda: node.stage is Stage.DONE, "the commit is over")
    assert node.stage is (Stage.DONE if stage is Stage.FAILOVER else stage)
    assert not any(marked(node).values())
    assert node.query()["consistent"] is True


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_what_it_was_is_never_taken_for_nothing_has_changed(
    left: tuple[Path, Mode, Stage], host: Host, name: str, how: str
) -> None:
    folder, mode, stage = left
    if name == "disk0.lost" and (mode is Mode.PRIMARY or stage is Stage.DONE):
        pytest.skip("says nothing of the owner of the disks")
    if name == "state.json" and stage is Stage.NONE:
        pytest.skip("nothing has been saved")
    spoil(host.folder / "state" / name, how, folder)
    if name == "state.json" and how in ("empty", "short"):
        with pytest.raises(ConfigError, match="move it away to start anew"):
            host.start()
        (host.folder / "state" / name).unlink()  # as that says
    node = host.start()
    gone = name == "state.json" and how in ("missing", "empty", "short")
    whole = name in ("epoch", "disk0.unflushed", "state.json")
    if stage is Stage.FAILOVER and not gone:
        wait_until(lambda: node.stage in (Stage.DONE, Stage.FAILOVER_FAILED), "the commit has ended")
        assert node.stage is (Stage.FAILOVER_FAILED if whole else Stage.DONE)
    else:
        assert node.stage is (Stage.NONE if gone else stage)
    found = marked(node)
    assert max(found.values()) == SIZE
    if mode is Mode.SECONDARY and stage is Stage.RUNNING and not gone:
        assert node.query()["consistent"] is not whole
        assert node.query_failover()["allowed"] is not whole
        if name != "disk0.changes":
            assert found["lost"] == SIZE
    host.end()
    # What was not believed once was taken note of: the next process knows the same, and doubts nothing any more.
    node = host.start()
    assert max(marked(node).values()) == SIZE
    if mode is Mode.SECONDARY and stage is Stage.RUNNING and not gone:
        assert node.query()["consistent"] is not whole


def test_a_secondary_whose_record_is_not_believed_keeps_its_own_writes(
    left: tuple[Path, Mode, Stage], host: Host
) -> None:
    """Nobody has allowed that they are overwritten: a primary is refused until somebody discards them."""
    _, mode, stage = left
    if mode is not Mode.SECONDARY or stage is not Stage.DONE:
        pytest.skip("it has no writes of its own")
    node = host.start()
    assert isinstance(node.side, SecondarySide)
    node.side.disks[0].guest_write(memoryview(pattern(2, 4096)), 0, False)
    generation = node.query()["generation"]
    host.end()
    (host.folder / "state" / "state.json").unlink()
    node = host.start()
    found = node._ancestry.lineage
    assert found.current
    assert not found.shared
    assert generation != found.current


def test_a_primary_whose_epoch_page_is_gone_has_parted(left: tuple[Path, Mode, Stage], host: Host) -> None:
    """The page has the generation that its own writes had begun."""
    _, mode, stage = left
    if mode is not Mode.PRIMARY or stage is not Stage.DONE:
        pytest.skip("one is enough")
    node = host.start()
    assert isinstance(node.side, PrimarySide)
    node._ancestry.become(lambda lineage: lineage.paired_as_equal(new_id()))
    shared = node.query()["generation"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StateFolder, "save", _full)  # as if killed before anything else is saved
        node.side.disks[0].write(memoryview(pattern(2, 4096)), 0, False)
        host.end()
    (host.folder / "state" / "epoch").unlink()
    node = host.start()
    assert node.query()["generation"] != shared
    assert node._ancestry.lineage.base == shared


def _full(*_arguments: object, **_options: object) -> None:
    raise StateError("not saved")
