# SPDX-License-Identifier: BSD-3-Clause
"""A site whose guest is a domain of libvirt's, run by ocf:heartbeat:VirtualDomain, in a cluster that was made by the
commands of docs/cluster.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
from pathlib import Path

from checkout import REPOSITORY
from cluster.configuration import NAMES, NODE
from cluster.consoles import Consoles
from cluster.power import Host
from cluster.site import REPLCTL, Site
from guest import KERNEL_PARAMETERS
from guestimages import Images
from virthost import DOMAIN, LIBVIRTD_CONF, QEMU_CONF

COMMAND_S = 120
TOOLS = {"crm": "The cluster, with crm", "pcs": "The same with pcs"}
"""The headings below which their commands stand."""
XML = f"/etc/libvirt/qemu/{NODE}.xml"
HOOK = '#!/bin/sh\nexec replctl libvirt-hook "$@"\n'
"""As docs/vm.md has it."""


def commands(tool: str, heading: str = "") -> list[str]:
    """Those of docs/cluster.md with that tool, each in one line; `heading`: those below another one."""
    text = (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {heading or TOOLS[tool]}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    blocks = re.findall(rf"^```sh\n({tool} .*?)^```", section[1], re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def run(command: str, cib: Path) -> str:
    """What a shell command prints that changes, or reads, the configuration in a file; AssertionError if it fails."""
    done = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "CIB_file": str(cib), "HOME": "/root"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def typed(tool: str, lines: list[str], cib: Path) -> None:
    """Type them into an empty configuration."""
    cib.write_text(run("cibadmin --empty", cib))
    for line in lines:
        assert line.startswith(f"{tool} ")
        run(line.replace("pcs ", f"pcs -f {cib} ", 1), cib)


def of_this_site(line: str, folder: Path) -> str:
    """The command with the names of this site: its switch, and a guest that knows no power button."""
    line = line.replace("hosta", NAMES[0]).replace("hostb", NAMES[1]).replace("web1", NODE)
    line = re.sub(r"fence_ipmilan\b", "fence_switch", line)
    line = re.sub(r"ip=\S+ +username=\S+ +password=\S+ +lanplus=1", f"path={folder}/switch.sock", line)
    return line.replace(f"config={XML}", f"config={XML} force_stop=true")


class VirtSite(Site):
    """Both hosts have a libvirtd; the VM is the test guest, and says on its console what the journal has."""

    def __init__(self, folder: Path, tool: str) -> None:
        folder.joinpath("made").mkdir()
        cib = folder / "made/cib.xml"
        typed(tool, [of_this_site(line, folder) for line in commands(tool)], cib)
        # As at the first start of a cluster, which nobody has to wait for here.
        waits = {"crm": "crm configure property dc-deadtime=2s", "pcs": f"pcs -f {cib} property set dc-deadtime=2s"}
        run(waits[tool], cib)
        super().__init__(
            folder, images=Images.get(), made=cib.read_text(), node_lines='socket-group = "libvirt-qemu"\n'
        )
        self._consoles = [Consoles(host, self._console(host), self.journal.path) for host in self.hosts]
        for host in self.hosts:
            self._prepare(host)

    def close(self) -> None:
        super().close()
        for consoles in self._consoles:
            consoles.close()

    def _console(self, host: Host) -> Path:
        return self.folder / f"{host.name}.console"

    def _prepare(self, host: Host) -> None:
        """Its libvirt, and the VM's XML in it, with what the node's `domain-xml` prints."""
        images = Images.get()
        etc = host.folder / "libvirt/etc"
        shutil.copytree("/etc/libvirt", etc, symlinks=True)
        shutil.rmtree(etc / "qemu/networks/autostart", ignore_errors=True)
        (etc / "qemu.conf").write_text(QEMU_CONF)
        (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(uuid=uuid.uuid4()))
        hook = etc / "hooks/qemu.d/nbdkit-replication"
        hook.parent.mkdir(parents=True, exist_ok=True)
        hook.write_text(HOOK)
        hook.chmod(0o755)
        for source, name in ((images.kernel, "vmlinuz"), (images.initramfs, "initramfs")):
            shutil.copyfile(source, host.folder / "srv" / name)
        printed = subprocess.run(
            [REPLCTL, NODE, "domain-xml"],
            env={**os.environ, "NBDKIT_REPLICATION_CONFIG_DIR": str(host.folder / "etc")},
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert printed.returncode == 0, printed.stderr
        text = DOMAIN.format(
            node=NODE,
            memory=96,
            folder="/srv",
            parameters=f"{KERNEL_PARAMETERS} vm.tag={1 + self.hosts.index(host)} vm.disks=1",
            console=self._console(host),
            disks=printed.stdout,
        )
        (host.folder / "libvirt/etc/qemu" / f"{NODE}.xml").write_text(text)
