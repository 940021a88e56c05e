# SPDX-License-Identifier: BSD-3-Clause
"""What `replctl NAME domain-xml` and `qemu-args` print, used: libvirt's schema takes the XML, and a QEMU that was
started with the arguments reads and writes the node's disk, also after a restart of the node."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkout import REPOSITORY as ROOT
from commandline import REPLCTL
from namednodes import give_name
from nodes import Pair
from qmp import Qmp
from waiting import DEADLINE_S

DOMAIN = """\
<domain type='qemu'>
  <name>web1</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>
{disks}
  </devices>
</domain>
"""


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A pair with two disks, whose nodes are `a` and `b` of this host."""
    config = tmp_path / "config"
    config.mkdir()
    monkeypatch.setenv("NBDKIT_REPLICATION_CONFIG_DIR", str(config))
    pair = Pair(tmp_path, [1 << 20, 1 << 20])
    for name, node in (("a", pair.primary), ("b", pair.secondary)):
        give_name(config, name, node)
    pair.start()
    pair.start_replication()
    yield pair
    pair.close()


@pytest.fixture(autouse=True)
def libvirtd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the daemon of this host, which says that it is libvirt 11.3: what counts is its version."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    says(folder / "libvirtd", "libvirtd (libvirt) 11.3.0")
    return folder / "libvirtd"


def says(daemon: Path, text: str) -> None:
    daemon.write_text(f'#!/bin/sh\n[ "$*" = --version ] && echo "{text}"\n')
    daemon.chmod(0o755)


def printed(*arguments: str) -> str:
    done = subprocess.run([REPLCTL, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def validated(tmp_path: Path, disks: str) -> subprocess.CompletedProcess[str]:
    domain = tmp_path / "domain.xml"
    domain.write_text(DOMAIN.format(disks=disks))
    return subprocess.run(
        ["virt-xml-validate", domain, "domain"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def knows_reconnect() -> bool:
    """Whether this libvirt has the element for NBD: 9.0 (Debian 12) has not."""
    schema = Path("/usr/share/libvirt/schemas/domaincommon.rng").read_text(encoding="utf-8")
    return (
        'name="reconnect"' in schema.partition('<define name="diskSourceNetworkProtocolNBD">')[2].split("</define>")[0]
    )


@pytest.mark.parametrize("name", ["a", "b"])
def test_libvirts_schema_takes_the_xml(pair: Pair, tmp_path: Path, name: str) -> None:
    disks = printed(name, "domain-xml")
    assert json.loads(printed(name, "domain-xml", "--json"))["xml"] + "\n" == disks
    exports = ["disk0", "disk1"] if name == "a" else ["top0", "top1"]
    assert re.findall("protocol='nbd' name=\"(.*?)\"", disks) == exports
    assert disks.count("    <reconnect delay='60'/>\n") == 2
    without = printed(name, "domain-xml", "--reconnect", "0")
    assert without == disks.replace("    <reconnect delay='60'/>\n", "")
    checked = validated(tmp_path, disks if knows_reconnect() else without)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert validated(tmp_path, without.replace("transport='unix'", "transport='pigeon'")).returncode != 0


@pytest.mark.parametrize("daemon", ["libvirtd", "virtqemud"])
def test_a_libvirt_that_cannot_wait_stops_the_guest(pair: Pair, tmp_path: Path, libvirtd: Path, daemon: str) -> None:
    wants = printed("a", "domain-xml")
    libvirtd.unlink()
    says(libvirtd.with_name(daemon), f"/usr/sbin/{daemon} (libvirt) 9.0.0")
    disks = printed("a", "domain-xml")
    assert "reconnect" not in disks
    assert disks.count(" discard='unmap' error_policy='stop' rerror_policy='stop'/>") == 2
    checked = validated(tmp_path, disks)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    # Who says how long is given what he says.
    assert printed("a", "domain-xml", "--reconnect", "60") == wants
    says(libvirtd.with_name(daemon), f"/usr/sbin/{daemon} (libvirt) 9.1.0")
    assert printed("a", "domain-xml") == wants
    says(libvirtd.with_name(daemon), "no version")
    if not any(Path("/usr/sbin", name).exists() for name in ("libvirtd", "virtqemud")):
        assert printed("a", "domain-xml") == wants


def test_the_domain_xml_of_the_documentation_is_what_is_printed(pair: Pair) -> None:
    shown = re.search(r"```xml\n(.*?)```", (ROOT / "docs" / "vm.md").read_text(), re.DOTALL)
    assert shown is not None
    first = printed("a", "domain-xml").split("</disk>\n")[0] + "</disk>\n"
    place = "/run/nbdkit-replication/web1/guest.sock"
    assert first.replace('"', "'").replace(str(pair.primary.socket_path), place) == shown[1]


def test_qemu_uses_the_node_and_survives_its_restart(pair: Pair, tmp_path: Path) -> None:
    monitor = tmp_path / "q.sock"
    rest = ["-machine", "pc", "-accel", "tcg", "-m", "16", "-display", "none", "-nodefaults", "-no-user-config", "-S"]
    rest += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    # As a person would: the text of the command, read by a shell.
    command = f"exec qemu-system-x86_64 {' '.join(rest)} $(cat args)"
    (tmp_path / "args").write_text(printed("a", "qemu-args", "--reconnect", "30"))
    process = subprocess.Popen(["bash", "-c", f'eval "{command}"'], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        with Qmp(monitor) as qmp:

            def io(disk: int, text: str) -> None:
                line = f'qemu-io -d /machine/peripheral-anon/device[{disk}]/virtio-backend "{text}"'
                assert qmp.execute("human-monitor-command", **{"command-line": line}) == ""  # it prints to stdout

            io(1, "write -P 7 4096 8192")
            pair.primary.kill()
            pair.primary.start()
            io(1, "write -P 9 65536 4096")
            io(0, "write -P 8 0 512")
            io(1, "flush")
            content = pair.primary.disks[1].read_bytes()
            assert content[4096 : 4096 + 8192] == b"\7" * 8192
            assert content[65536 : 65536 + 4096] == b"\t" * 4096
            assert pair.primary.disks[0].read_bytes()[:513] == b"\b" * 512 + b"\0"
            qmp.execute("quit")
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.communicate()
