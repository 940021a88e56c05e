# SPDX-License-Identifier: BSD-3-Clause
"""`replctl libvirt-hook`, run as libvirt does: who may start, who may not, and who is not asked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkout import REPOSITORY
from fakenode import FakeNode
from waiting import DEADLINE_S

OWNER = {"role": "primary", "score": 10000, "may-run": True}
SECONDARY = {"role": "secondary", "may-run": False, "code": "is-secondary", "reason": "it is a secondary"}
FOLLOWS = {"role": "secondary", "may-run": None, "code": "passes-on", "reason": "it passes requests on"}
UNSURE = {"role": "primary", "may-run": None, "code": "peer-unknown", "reason": "the other may have gone on"}
DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <devices>
    <disk type='network'><source protocol='nbd' name='disk0'><host transport='unix' socket='{disk}'/></source></disk>
  </devices>
  <qemu:commandline><qemu:arg value='{{"driver": "nbd", "path": "{argument}", "export": "x"}}'/></qemu:commandline>
</domain>
"""


class Host:
    """Two nodes, `a` and `b`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes = {name: self._node(name) for name in "ab"}

    def _node(self, name: str) -> FakeNode:
        lines = [
            'mode = "primary"',
            f'control = "{self.folder}/{name}.sock"',
            f'state = "{self.folder}/state-{name}"',
            "[service]",
            f'guest-socket = "{self.socket(name)}"',
            "[disk.disk0]",
            f'disk = "{self.folder}/{name}.img"',
        ]
        (self.folder / f"{name}.toml").write_text("\n".join([*lines, ""]))
        node = FakeNode(self.folder / f"{name}.sock").start()
        node.answers["query-role"] = OWNER
        return node

    def socket(self, name: str) -> str:
        return f"{self.folder}/{name}-guest.sock"

    def starts(
        self, *options: str, disk: str = "", argument: str = "", operation: str = "prepare", domain: str = DOMAIN
    ) -> tuple[int, str]:
        """libvirt starts a guest that uses these sockets: exit code and stderr."""
        done = subprocess.run(
            [REPOSITORY / "scripts/replctl", "libvirt-hook", *options, "web", operation, "begin", "-"],
            input=domain.format(disk=disk, argument=argument),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.stdout == ""
        return done.returncode, done.stderr


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("NBDKIT_REPLICATION_CONFIG_DIR", str(tmp_path))
    made = Host(tmp_path)
    yield made
    for node in made.nodes.values():
        node.die()


def test_the_nodes_of_the_guest_are_asked(host: Host) -> None:
    a, b = host.nodes["a"], host.nodes["b"]
    b.answers["query-role"] = SECONDARY
    assert host.starts(disk=host.socket("a")) == (0, "")
    code, said = host.starts(disk=host.socket("b"))
    assert code == 1
    assert "the guest web may not run on the node b of this host now: it is a secondary" in said
    assert host.starts(disk=host.socket("a"), argument=host.socket("b"))[0] == 1
    assert host.starts(disk=f"{host.socket('b')}.other", argument=host.socket("a")) == (0, "")
    a.asked.clear()
    assert host.starts() == (0, "")
    assert a.asked == []


def test_where_it_cannot_be_told(host: Host) -> None:
    host.nodes["a"].answers["query-role"] = UNSURE
    code, said = host.starts(disk=host.socket("a"))
    assert code == 1
    assert "might not be allowed to run on the node a of this host now: the other may have gone on" in said
    assert host.starts("--allow-unknown", disk=host.socket("a")) == (0, "")
    host.nodes["a"].answers["query-role"] = SECONDARY
    assert host.starts("--allow-unknown", disk=host.socket("a"))[0] == 1
    host.nodes["a"].die()
    assert host.starts(disk=host.socket("a"))[0] == 1


def test_a_secondary_that_passes_requests_on_lets_one_in_that_is_migrated_and_none_that_starts(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDKIT_REPLICATION_RUN_DIR", str(host.folder))
    host.nodes["a"].answers["query-role"] = FOLLOWS
    disk, allowing = host.socket("a"), ("--allow-migration", "--allow-unknown")

    def prepared(*options: str) -> int:
        return host.starts(*options, disk=disk)[0]

    def migrated(*options: str) -> None:
        assert host.starts(*options, disk=disk, operation="migrate") == (0, "")

    assert prepared() == prepared(*allowing) == 1, "it starts"
    migrated("--allow-unknown")
    assert prepared(*allowing) == 1, "nobody has noted that"
    migrated("--allow-migration")
    assert prepared("--allow-migration") == 0
    assert prepared("--allow-migration") == 1, "once"
    migrated("--allow-migration")
    assert prepared("--allow-unknown") == 1
    migrated("--allow-migration")
    (mark,) = host.folder.glob(".migrating-*")
    os.utime(mark, (1000, 1000))
    assert prepared("--allow-migration") == 1, "it was long ago"
    host.nodes["a"].answers["query-role"] = SECONDARY
    migrated("--allow-migration")
    assert prepared("--allow-migration") == 1
    host.nodes["a"].answers["query-role"] = UNSURE
    migrated("--allow-migration")
    assert prepared("--allow-migration") == 1


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "release", "migrate", "restore", "reconnect"])
def test_only_before_a_start(host: Host, operation: str) -> None:
    host.nodes["a"].answers["query-role"] = SECONDARY
    assert host.starts(disk=host.socket("a"), operation=operation) == (0, "")


def test_a_file_of_a_node_that_cannot_be_used(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was changed since the node was started, which still has the usual socket."""
    monkeypatch.setenv("NBDKIT_REPLICATION_RUN_DIR", str(host.folder))
    (host.folder / "b.toml").write_text(f'control = "{host.folder}/b.sock"\nmode = "nothing"\n')
    host.nodes["b"].answers["query-role"] = SECONDARY
    assert host.starts(disk=f"{host.folder}/b/guest.sock")[0] == 1


@pytest.mark.parametrize("error", ["timout = 5\n", "= broken\n", "[disk.disk0\n"])
def test_an_error_elsewhere_in_a_file_hides_no_socket(host: Host, error: str) -> None:
    """The node was started before the typing error; the guest started on a host whose node is a secondary."""
    (host.folder / "b.toml").write_text(
        f'{error}control = "{host.folder}/b.sock"\n[service]\n guest-socket = "{host.socket("b")}" # ours\n'
    )
    host.nodes["b"].answers["query-role"] = SECONDARY
    assert host.starts(disk=host.socket("b"))[0] == 1
    assert host.starts(disk=host.socket("a")) == (0, "")


@pytest.mark.parametrize(
    "content", [b"[service]\nguest-socket = 5\n", b"[service\nguest-socket = x\n", b"\xff", b"service = 1\n"]
)
def test_a_file_that_hides_a_socket_lets_no_guest_start(host: Host, content: bytes) -> None:
    (host.folder / "b.toml").write_bytes(content)
    code, said = host.starts(disk=host.socket("a"))
    assert code == 1
    assert "the guest web might not be allowed to run on this host now, because it may use the node b" in said
    assert f"{host.folder}/b.toml" in said
    assert host.starts("--allow-unknown", disk=host.socket("a")) == (0, "")


def test_what_is_no_xml(host: Host) -> None:
    code, said = host.starts(domain="<domain>")
    assert (code, "is no XML" in said) == (2, True)
