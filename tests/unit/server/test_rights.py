# SPDX-License-Identifier: BSD-3-Clause
"""export.py: who may open which export. What counts is the name, not what is behind it at the moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from content import make_raw
from replication.control.inband import ControlExport
from replication.errors import DiskError
from replication.events import EventHub
from replication.node import Node
from replication.options import DiskOptions, OptionParser, Options
from replication.record.state import StateFolder
from replication.secondary.disk import changing_face
from replication.server.clients import Client
from replication.server.export import Exports, RehearsalExport
from replication.side import FOR_GUESTS, TEST_FACE
from replication.stage import Mode

HERE = Client("a client on this host", True)
FAR = Client("the client at 192.0.2.1 port 1", False)
PRIMARY, GUEST = "CN=primary,O=pair", "CN=guest,O=pair"


def far(dn: str | None) -> Client:
    return FAR._replace(tls=True, tls_dn=dn)


@pytest.fixture
def exports(tmp_path: Path) -> Any:
    """`exports(mode, key=value...)`: those of a node with these options."""
    nodes: list[Node] = []

    def made(mode: Mode, **keys: Any) -> Exports:
        disk = DiskOptions("disk0", str(make_raw(tmp_path / "disk", 1 << 20)))
        if mode is Mode.SECONDARY:
            disk.top_id, disk.active, disk.hidden = "top", str(tmp_path / "a.qcow2"), str(tmp_path / "h.qcow2")
        options = Options(mode, [disk], str(tmp_path / "state"), None, **keys)
        node = Node(options, EventHub(), StateFolder(options.state))
        nodes.append(node)
        return Exports(node, lambda: cast(ControlExport, "control"), options)

    yield made
    for node in nodes:
        node.close()


def refused(exports: Exports, name: str, client: Client) -> str:
    with pytest.raises(DiskError) as caught:
        exports.open(name, client)
    return str(caught.value)


@pytest.mark.parametrize(("mode", "guest", "other"), [(Mode.SECONDARY, "top", "disk0"), (Mode.PRIMARY, "disk0", None)])
def test_a_guests_name_is_for_this_host(exports: Any, mode: Mode, guest: str, other: str | None) -> None:
    opened = exports(mode, guests_local=True)
    assert refused(opened, guest, FAR).startswith(f"guest-access=local: '{guest}' is for clients on this host")
    opened.open(guest, HERE)
    if other is not None:
        opened.open(other, FAR)


def test_a_guests_name_is_for_this_host_also_while_the_role_changes(exports: Any) -> None:
    """A client that got in during a demote had the guest face afterwards."""
    opened = exports(Mode.SECONDARY, guests_local=True)
    for name, face in list(opened._node.faces.items()):
        opened._node.faces[name] = changing_face(name, face.size())
    assert refused(opened, "top", FAR).startswith("guest-access=local: 'top'")
    opened.open("disk0", FAR)


@pytest.mark.parametrize("name", ["disk0", ".control", ".data:token:disk0"])
def test_the_primarys_exports_are_for_the_primary_that_is_named(exports: Any, name: str) -> None:
    opened = exports(Mode.SECONDARY, primary_identity=PRIMARY)
    export = name.rpartition(":")[2]
    assert refused(opened, name, far(GUEST)) == (
        f"primary-identity: '{export}' is for '{PRIMARY}', and {FAR.name} has shown the certificate of '{GUEST}'"
    )
    assert refused(opened, name, far("")).endswith("has shown no certificate")
    assert refused(opened, name, HERE).endswith("has shown no certificate")
    opened.open(name, far(PRIMARY))
    opened.open("top", far(GUEST))


@pytest.mark.parametrize(("mode", "name"), [(Mode.SECONDARY, "top"), (Mode.PRIMARY, "disk0"), (Mode.PRIMARY, "")])
def test_a_guests_export_is_for_the_guest_that_is_named(exports: Any, mode: Mode, name: str) -> None:
    opened = exports(mode, guest_identity=GUEST)
    for client in (far(PRIMARY), far(""), far(None), HERE):
        assert refused(opened, name, client).startswith(f"guest-identity: '{name or 'disk0'}' is for '{GUEST}'")
    opened.open(name, far(GUEST))
    if mode is Mode.SECONDARY:
        opened.open("disk0", FAR)


def test_a_test_is_a_guests(exports: Any) -> None:
    opened = exports(Mode.SECONDARY, guests_local=True)
    opened._node.side.start(None, "auto")
    opened._node.start_test("x", None)
    assert ("top.x", TEST_FACE) in opened.names()
    assert refused(opened, "top.x", FAR).startswith("guest-access=local: 'top.x' is for clients on this host")
    assert isinstance(opened.open("top.x", HERE), RehearsalExport)
    assert "the exports are 'disk0', 'top', 'top.x'" in refused(opened, "top.y", HERE)
    opened._options.guests_local, opened._options.guest_identity = False, GUEST
    assert refused(opened, "top.x", far(PRIMARY)).startswith(f"guest-identity: 'top.x' is for '{GUEST}'")
    opened.open("top.x", far(GUEST))
    assert TEST_FACE in FOR_GUESTS  # no primary takes it for its secondary


def test_an_identity_is_a_distinguished_name_and_of_the_secondary_only_the_primarys() -> None:
    def parse(*pairs: tuple[str, str]) -> Options:
        parser = OptionParser()
        for key, value in pairs:
            parser.add(key, value)
        return parser.finish()

    common = (("state", "/s"), ("disk", "/d"))
    secondary = (("mode", "secondary"), *common, ("top-id", "t"))
    options = parse(*secondary, ("primary-identity", PRIMARY), ("guest-identity", GUEST))
    assert (options.primary_identity, options.guest_identity) == (PRIMARY, GUEST)
    with pytest.raises(Exception, match="primary-identity='paul' should be the distinguished name"):
        parse(*secondary, ("primary-identity", "paul"))
    with pytest.raises(Exception, match="The primary side does not support option primary-identity"):
        parse(("mode", "primary"), *common, ("primary-identity", PRIMARY))
