# SPDX-License-Identifier: BSD-3-Clause
"""node.py: what the record says before, during and after a promoted secondary becomes a primary. The new secondary is
played by the test."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from content import make_raw, pattern
from replication.control.commands import Commands
from replication.control.inband import ControlExport
from replication.errors import CommandError, ConfigError, DiskError
from replication.events import EventHub
from replication.fault import Case
from replication.image.qcow2 import BLOCK
from replication.node import Node
from replication.options import CONTROL_EXPORT, DiskOptions, Fencing, Options
from replication.order import gate
from replication.primary.dial import Dialler, Refusal
from replication.primary.forward import Forwarder
from replication.primary.peer import Peer
from replication.primary.side import PrimarySide
from replication.reason import Reason
from replication.record.boot import BOOT_ID_ENVIRONMENT
from replication.record.lineage import Lineage
from replication.record.state import Record, StateError, StateFolder
from replication.secondary.pairing import Channel
from replication.secondary.side import SecondarySide
from replication.server.clients import Client
from replication.server.export import Exports
from replication.stage import Mode, Stage
from waiting import DEADLINE_S, begin, wait_until

SIZE = 1 << 20
URI = "nbd://new-secondary"


class NewSecondary:
    """In a connection's place."""

    size = SIZE
    description = ""

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
        # A plain NBD server: nothing is known of what it comes from.
        monkeypatch.setattr(Peer, "open", lambda *_: None)
        monkeypatch.setattr(Dialler, "_plain", lambda dialler, disk, uri: self.connect())
        monkeypatch.setattr(Dialler, "_check_open", staticmethod(lambda connection: None))
        monkeypatch.setattr(Forwarder, "adopt", lambda *_: None)
        self.node: Node | None = None

    def connect(self) -> NewSecondary:
        if not self.reachable:
            raise DiskError("nobody there")
        self.connections.append(NewSecondary())
        return self.connections[-1]

    def start(self, mode: Mode = Mode.SECONDARY, **given: Any) -> Node:
        secondary = mode is Mode.SECONDARY
        disk = DiskOptions("disk0", str(self.folder / "disk"), "top" if secondary else None)
        if secondary:
            disk.active, disk.hidden = (str(self.folder / f"{role}.qcow2") for role in ("active", "hidden"))
        self.state = StateFolder(str(self.folder / "state"))
        try:
            options = Options(mode, [disk], str(self.folder / "state"), None, **given)
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

    def promoted(self, **given: Any) -> Node:
        """A secondary whose failover is over."""
        node = self.start(**given)
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


def exports_of(node: Node) -> Exports:
    def no_control() -> ControlExport:
        raise AssertionError("nobody pairs")

    return Exports(node, no_control, node._options)


HERE = Client("a client on this host", True)
NODE = "00000000000000ee"
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
    exports = exports_of(node)
    guest, target = exports.open("top", HERE), exports.open("disk0", HERE)
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
    def refuse(*_: object, **__: object) -> None:
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


NOT_ITS_OWN = [stage for stage in Stage if stage is not Stage.DONE]
LINEAGE = Lineage("00000000000000bb", shared=True, history=("00000000000000aa",))


def left(host: Host, record: Record) -> None:
    """What a former process has left."""
    state = StateFolder(str(host.folder / "state"))
    state.save(record)
    state.close()


@pytest.mark.parametrize("stage", NOT_ITS_OWN, ids=lambda stage: stage.value)
def test_the_state_of_a_secondary_is_no_primarys_until_the_disks_are_its_own(host: Host, stage: Stage) -> None:
    left(host, Record(Mode.SECONDARY, stage))
    with pytest.raises(ConfigError, match="belongs to a secondary; start with mode=secondary"):
        host.start(Mode.PRIMARY)


def test_a_promoted_secondary_may_be_started_as_the_primary_that_it_is(host: Host) -> None:
    left(host, Record(Mode.SECONDARY, Stage.DONE, disks={"disk0": SIZE}, lineage=LINEAGE.to_json(), node=NODE))
    node = host.start(Mode.PRIMARY)
    assert isinstance(node.side, PrimarySide)
    assert node.stage is Stage.DONE
    node.start(None, URI, "auto")
    assert host.saved() == (Mode.PRIMARY, Stage.RUNNING, False, URI)
    record = host.state.load()
    assert record is not None
    assert record.node == NODE


@pytest.mark.parametrize("stage", [Stage.NONE, Stage.RUNNING, Stage.DONE], ids=lambda stage: stage.value)
def test_a_former_primary_comes_back_as_a_secondary_and_knows_what_its_content_is(host: Host, stage: Stage) -> None:
    left(
        host,
        Record(
            Mode.PRIMARY,
            stage,
            secondary=URI,
            partner="00000000000000cc",
            disks={"disk0": SIZE},
            lineage=LINEAGE.to_json(),
            node=NODE,
            paired=True,
            resync=True,
        ),
    )
    node = host.start()
    assert isinstance(node.side, SecondarySide)
    assert node.stage is Stage.NONE
    node.start(None, None, "auto")
    record = host.state.load()
    assert record is not None
    assert (record.mode, record.stage, record.promoted) == (Mode.SECONDARY, Stage.RUNNING, False)
    assert (record.secondary, record.partner, record.paired, record.led, record.resync) == (
        None,
        None,
        False,
        False,
        False,
    )
    assert (record.node, record.lineage) == (NODE, LINEAGE.to_json())


def test_what_a_former_primary_has_begun_is_not_forgotten_when_it_comes_back_as_a_secondary(host: Host) -> None:
    """It was killed when its guest had written what the other node did not get."""
    begun = "00000000000000dd"
    left(
        host,
        Record(Mode.PRIMARY, Stage.RUNNING, disks={"disk0": SIZE}, lineage=LINEAGE.to_json(), next_generation=begun),
    )
    state = StateFolder(str(host.folder / "state"))
    state.move_to(begun)
    state.close()
    host.start().start(None, None, "auto")
    record = host.state.load()
    assert record is not None
    assert record.lineage == LINEAGE.moved(begun).to_json()
    assert record.next_generation != begun


def test_an_unknown_export_is_refused_and_the_valid_ones_are_named(host: Host) -> None:
    exports = exports_of(host.start())
    for name in ("", "other"):
        with pytest.raises(DiskError, match=r"there is no export '.*': the exports are 'disk0', 'top'"):
            exports.open(name, HERE)
    assert exports.open("disk0", HERE).size == SIZE
    assert exports.open("top", HERE).description.startswith("guest face")


def test_only_a_secondary_has_a_control_export(host: Host) -> None:
    made = []
    node = host.promoted()
    exports = Exports(node, lambda: made.append(1) or cast(ControlExport, "control"), node._options)
    assert exports.open(CONTROL_EXPORT, HERE) == "control"
    assert CONTROL_EXPORT not in dict(exports.names())
    node.start(Mode.PRIMARY, URI, "auto")
    with pytest.raises(DiskError, match=r"there is no export '\.control'"):
        exports.open(CONTROL_EXPORT, HERE)
    assert made == [1]


def test_a_fault_that_could_not_be_saved_is_saved_later(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    node = host.start()
    real, works = StateFolder.save, False

    def save(folder: StateFolder, record: Record, *_: float, **__: bool) -> None:
        if not works:
            raise StateError("no room")
        real(folder, record)

    monkeypatch.setattr(StateFolder, "save", save)
    monkeypatch.setattr("replication.node.SAVE_AGAIN_MIN_S", 0.02)
    for _ in range(3):
        node._faults.report(Case.SECONDARY_DISK, "disk0", "write", 0, 4096, DiskError("bad disk"))
        node._keep_fault()
    works = True
    wait_until(lambda: node._record.fault and not node._unsaved, "it is saved")
    wait_until(lambda: "bad disk" in (host.folder / "state/state.json").read_text(), "the file has it")


def test_a_demotion_that_meets_a_defect_leaves_the_owner(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    node = host.promoted()
    before = host.saved()

    def start(*_: object) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(SecondarySide, "start", start)
        with pytest.raises(CommandError, match="cannot become a secondary: a defect"):
            node.demote()
    assert (node.stage, host.saved()) == (Stage.DONE, before)
    buffer = bytearray(BLOCK)
    node.faces["top"].read(memoryview(buffer), 0)
    assert bytes(buffer) == pattern(1, SIZE)[:BLOCK]
    node.demote()
    assert node.stage is Stage.RUNNING


QUERIES = ("query-replication", "query-failover", "query-role", "query-jobs", "query-replication-latency")


@pytest.mark.parametrize("was", ["a failover", "a stop"])
def test_a_node_is_asked_how_it_is_while_its_disks_change_hands(
    host: Host, monkeypatch: pytest.MonkeyPatch, was: str
) -> None:
    """The side that they were of is closed by then, and its maps are no longer in memory."""
    node = host.promoted()
    if was == "a stop":
        node.start(Mode.PRIMARY, URI, "auto")
        node.stop(failover=False)
    commands = Commands(node, lambda: None)
    real, told = SecondarySide.open, {}

    def asked_before(side: SecondarySide) -> None:
        for name in QUERIES:
            with contextlib.suppress(CommandError):  # a primary has no failover to tell of
                told[name] = commands.execute(name, {}).value
        real(side)

    before = node.query()
    with monkeypatch.context() as patch:
        patch.setattr(SecondarySide, "open", asked_before)
        node.demote()
    assert node.stage is Stage.RUNNING
    assert told.keys() >= {"query-replication", "query-role"}
    assert told["query-replication"]["disks"] == before["disks"]


def test_a_full_resync_that_requests_in_flight_refuse_costs_no_checkpoint(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = host.start()
    node.start(None, None, "auto")
    token = node.pair(Channel(), "1" * 16, Lineage("2" * 16), {"disk0": SIZE}, 0, 60.0)["token"]
    monkeypatch.setattr(gate, "DRAIN_S", 0.05)
    before = node.query()
    with node.gate, pytest.raises(CommandError, match="in flight"):
        node.pair_sync(token, "full", "2" * 16, False, ())
    assert node.query()["consistent"] is True
    assert (node.query()["link"], node.query()["generation"]) == (before["link"], before["generation"])
    node.pair_sync(token, "full", "2" * 16, False, ())
    assert node.query()["consistent"] is False


# -- a guest that must not go on -------------------------------------------------------------------------------


def code(node: Node) -> str | None:
    """Why it is outdated."""
    outdated = node.query()["outdated-reason"]
    return None if outdated is None else outdated["code"]


def test_what_somebody_has_told_an_owner_no_acceptance_ends(host: Host) -> None:
    """The other one is a secondary until it is promoted, which is still to come."""
    node = host.promoted()
    node._outdate(Reason.PEER_PROMOTED, "it was promoted")
    node._accepted()
    assert (code(node), node.admission.still.on) == (None, False)
    node._outdate(Reason.PEER_PROMOTED, "it was promoted")
    node.outdate("the cluster has decided")
    node._accepted()
    assert (code(node), node.admission.still.on) == ("told", True)
    host.end()
    node = host.start()
    node._accepted()
    assert (code(node), node.admission.still.on) == ("told", True)
    node.set_role(primary=True, peer=None, force=True)
    assert (code(node), node.admission.still.on) == (None, False)


def test_what_is_learnt_after_a_guest_was_let_go_on(host: Host) -> None:
    node = host.promoted()
    node.outdate("the cluster has decided")
    node.resume_io()
    assert not node.admission.still.on
    host.events.clear()
    for _ in range(2):
        node._outdate(Reason.PEER_PROMOTED, "it was promoted")
    assert node.admission.still.on
    node.resume_io()
    node._outdate(Reason.PEER_PROMOTED, "it was promoted")
    assert not node.admission.still.on, "the link meets it every few seconds"
    node.outdate("the cluster has decided")
    assert node.admission.still.on, "who says it again, in the same words, means it"
    told = [event["data"]["code"] for event in host.events if event["event"] == "REPLICATION_OUTDATED"]
    assert told == ["peer-promoted", "told"]
    assert code(node) == "told", "which an acceptance does not end"


def test_a_guest_stands_before_the_node_can_save_what_it_was_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command holds it up, then the storage, which fails."""
    node = host.promoted()
    still, stood = node.admission.still, []

    def fails() -> None:
        stood.append(still.waits)
        raise StateError("no storage")

    monkeypatch.setattr(node, "_save", fails)
    with node._command:
        outdated = begin(node.outdate, "the cluster has decided")
        wait_until(lambda: still.waits, "the guest stands still")
    with pytest.raises(CommandError, match="no storage"):
        outdated.result(DEADLINE_S)
    assert stood == [True]
    assert (code(node), still.on) == (None, False), "it was refused, so nothing has changed"


def test_a_guest_stands_before_the_fault_is_kept_that_says_the_same(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That waits for the storage."""
    node = host.promoted()
    node.start(Mode.PRIMARY, URI, "auto")
    stood: list[bool] = []
    monkeypatch.setattr(node, "_save", lambda *_: stood.append(node.admission.still.on))
    node.side._link._failed(Refusal("it was promoted", Reason.NOT_SECONDARY), True)  # type: ignore[attr-defined]
    assert len(stood) > 1
    assert all(stood)


def test_a_guest_that_stood_when_its_node_was_stopped_to_be_demoted_stands_after_a_restart(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between the stop and the demotion."""
    fencing = {"fencing": Fencing.SUSPEND_IO}
    node = host.promoted(**fencing)
    node.start(Mode.PRIMARY, URI, "auto")
    node.admission.cut_off()

    def ends() -> None:
        assert loaded(host).kept_back, "with the stage"
        raise CommandError("the process ends here")

    monkeypatch.setattr(node, "demote", ends)
    monkeypatch.setattr(node._promotion, "_look_for", lambda sought: None)
    with pytest.raises(CommandError, match="the process ends here"):
        node.set_role(primary=False, peer=None, force=False)
    assert host.saved()[1] is Stage.DONE
    for _ in range(2):
        host.end()
        node = host.start(**fencing)
        assert node.stage is Stage.DONE
        assert node.admission.still.on
    node.resume_io()
    wait_until(lambda: not loaded(host).kept_back, "that is saved")
    host.end()
    assert not host.start(**fencing).admission.still.on


def test_who_has_used_the_disk_is_over_with_the_stage(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed before it has told them leaves one that does not let them in."""
    node = host.start(follow_owner=True)
    node.start(None, None, "auto")
    node.guests.note(os.getpid())
    refusing = StateError("no room")

    def refuse(_haste: object = None) -> None:
        raise refusing

    with monkeypatch.context() as patch:
        patch.setattr(node, "_save", refuse)
        with pytest.raises(CommandError, match="no room"):
            node.stop(failover=True)
    assert (loaded(host).guests_over, len(node._record.guests)) == ([], 1)
    with monkeypatch.context() as patch:
        patch.setattr(node, "_tell_followers", lambda *_what: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            node.stop(failover=True)
    record = loaded(host)
    assert (record.stage, record.guests, len(record.guests_over)) == (Stage.FAILOVER, [], 1)


def loaded(host: Host) -> Record:
    record = host.state.load()
    assert record is not None
    return record


def test_a_failover_of_a_node_that_has_failed_over_already_opens_its_guest_face(host: Host) -> None:
    closed = {"guest_face_closed": True}
    node = host.promoted(**closed)
    assert node.admission.closed is None
    for failover in (True, False):
        host.end()
        node = host.start(**closed)
        assert node.admission.closed
        node.stop(failover)
        assert node.admission.closed is None
