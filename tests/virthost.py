# SPDX-License-Identifier: BSD-3-Clause
"""A host with a libvirtd of its own, and a guest in one of its domains.

Libvirtd     Debian's daemon in namespaces of its own: its folders, its processes; a power cut takes them all
VirtHost     that, a node by its name, and what an administrator types there
Domain       the test guest (guest.py has it without libvirt), started by virsh

libvirtd knows no folders but those that were built in, so each host has others mounted over them. Its QEMU works as the
user libvirt-qemu, as on a real host: what it opens has to be open to that user.
"""

from __future__ import annotations

import grp
import os
import shutil
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Self

from checkout import REPOSITORY
from console import Console
from guest import BOOT_S, KERNEL_PARAMETERS, MEMORY_MIB
from guestimages import Images, copy_sparse
from lab import Lab
from process import Process
from services import ServiceNode, folders
from waiting import DEADLINE_S, wait_until

GROUP = "libvirt-qemu"
NODE = "web1"

PLACES = {
    "run": "/run",
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}
"""What is mounted where."""

# The first process of the namespace waits for orphans: libvirt's probing of QEMU leaves some, and waits for their end.
INIT = """
folder=$1; shift
for place; do mkdir -p "${place#*:}" && mount --bind "$folder/${place%%:*}" "${place#*:}" || exit 1; done
mount -t proc proc /proc || exit 1
libvirtd &
while :; do wait -n || sleep 0.1; done
"""

# There is neither virtlogd nor a systemd that would hand out control groups.
QEMU_CONF = 'stdio_handler = "file"\ncgroup_controllers = [ ]\n'
LIBVIRTD_CONF = 'auth_unix_rw = "none"\nhost_uuid = "{uuid}"\n'

DOMAIN = """\
<domain type='qemu'>
  <name>{node}</name>
  <memory unit='MiB'>{memory}</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{folder}/vmlinuz</kernel>
    <initrd>{folder}/initramfs</initrd>
    <cmdline>{parameters}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='unix'><source mode='connect' path='{console}'/></serial>
{disks}
  </devices>
</domain>
"""


class Libvirtd(Process):
    """The daemon, started by root in `folder`, which others may enter."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "libvirtd")
        for name in PLACES:
            (folder / name).mkdir()
        etc = folder / "etc"
        shutil.copytree("/etc/libvirt", etc, symlinks=True, dirs_exist_ok=True)
        # Its bridge would be one of this machine's.
        shutil.rmtree(etc / "qemu/networks/autostart", ignore_errors=True)
        (etc / "qemu.conf").write_text(QEMU_CONF)
        (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(uuid=uuid.uuid4()))
        self.uri = f"qemu+unix:///system?socket={folder}/run/libvirt/libvirt-sock"

    def command(self) -> list[str]:
        places = [f"{name}:{place}" for name, place in PLACES.items()]
        own = ["--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"]
        return ["unshare", *own, "--", "bash", "-c", INIT, "libvirtd", str(self.folder), *places]

    def environment(self) -> dict[str, str]:
        # It reads the certificates and logs of nobody.
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

    def wait_ready(self) -> None:
        def answers() -> bool:
            self.check_alive()
            return self._virsh("uri").returncode == 0

        wait_until(answers, "libvirtd answers")

    def virsh(self, *words: str | Path) -> str:
        """What it prints; AssertionError if it fails."""
        done = self._virsh(*words)
        if done.returncode != 0:
            raise AssertionError(f"virsh {' '.join(map(str, words))}: exit {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def _virsh(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["virsh", "-q", "-c", self.uri, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=BOOT_S, check=False)

    def terminate(self, timeout_s: float = DEADLINE_S) -> None:
        """As `kill`: the first process of a namespace hears no other signal."""
        del timeout_s
        self.kill()


class Domain:
    """A guest in a domain of libvirt's: `start` defines it with `disks`, and returns when its console is connected."""

    def __init__(self, libvirtd: Libvirtd, images: Images, disks: str, tag: int) -> None:
        self._libvirtd = libvirtd
        self._folder = libvirtd.folder / f"guest{tag}"
        self._folder.mkdir()
        for source, name in ((images.kernel, "vmlinuz"), (images.initramfs, "initramfs")):
            shutil.copyfile(source, self._folder / name)
        self._listener = self._folder / "console.sock"
        self.xml = DOMAIN.format(
            node=NODE,
            memory=MEMORY_MIB,
            folder=self._folder,
            parameters=f"{KERNEL_PARAMETERS} vm.tag={tag} vm.disks=1",
            console=self._listener,
            disks=disks,
        )
        self.console: Console

    def start(self) -> Self:
        """Define it, as the schema of this libvirt has it, and start it."""
        path = self._folder / "domain.xml"
        path.write_text(self.xml)
        self._libvirtd.virsh("define", "--validate", path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(self._listener))
            self._listener.chmod(0o666)
            listener.listen(1)
            listener.settimeout(DEADLINE_S)
            self._libvirtd.virsh("start", NODE)
            connection = listener.accept()[0]
        connection.setblocking(True)
        self.console = Console(connection, self._folder / "console.log")
        return self

    def wait_working(self, records: int) -> int:
        """Wait until the guest has booted and so many records are durable: the number of the last one."""
        self.console.wait("mounted", BOOT_S)
        return self.console.wait_more(records, BOOT_S).number

    def state(self) -> str:
        """As `virsh domstate --reason` says: the state, and why."""
        return self._libvirtd.virsh("domstate", NODE, "--reason")

    def switch_off(self) -> int:
        """Have the guest stop writing, unmount and switch itself off: the number of its last record."""
        self.console.send("stop")
        last = int(self.console.wait("stopped", BOOT_S))
        wait_until(lambda: self.state().startswith("shut off"), "the domain is off")
        return last


class VirtHost:
    """`name` is its folder in the lab. It has an image, a node NODE, and a libvirtd that is started at once."""

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab = lab
        self._images = Images.get()
        self.folder = lab.folder / name
        for folder in (self.folder, self.folder / "etc"):
            folder.mkdir()
        # QEMU looks for the socket of the node as a user of its own.
        lab.folder.chmod(0o711)
        virt = self.folder / "virt"
        virt.mkdir()
        self.libvirtd = lab.start(Libvirtd(virt))
        self.disk = self.folder / "disk.img"
        self.node: ServiceNode

    def make_disk(self, empty: bool = False) -> None:
        """With the file system of the guest; `empty`: with nothing."""
        if empty:
            with self.disk.open("wb") as file:
                file.truncate(self._images.disk.stat().st_size)
        else:
            copy_sparse(self._images.disk, self.disk)

    def start_node(self, *options: str) -> None:
        """`replctl init` with these options, and the node that it describes, open to QEMU."""
        self.replctl("init", NODE, "--disk", str(self.disk), *options)
        text = (self.folder / f"etc/{NODE}.toml").read_text()
        opened = text.replace("# socket-group", "socket-group")
        assert opened != text
        assert grp.getgrnam(GROUP).gr_name in opened
        self.node = self._lab.start(ServiceNode(self.folder, opened, name=NODE))

    def replctl(self, *words: str) -> str:
        """What it prints; AssertionError if it fails."""
        command = [str(REPOSITORY / "scripts/replctl"), *words]
        environment = {**os.environ, **folders(self.folder)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        if done.returncode != 0:
            raise AssertionError(f"replctl {' '.join(words)}: exit {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def guest(self, tag: int) -> Domain:
        """A domain with what the node's `domain-xml` prints, started."""
        return Domain(self.libvirtd, self._images, self.replctl(NODE, "domain-xml"), tag).start()

    def cut_power(self, guest: Domain) -> None:
        """SIGKILL to libvirtd, QEMU and the node."""
        self.libvirtd.kill()
        self.node.kill()
        guest.console.wait_end(DEADLINE_S)
