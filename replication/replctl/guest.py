# SPDX-License-Identifier: BSD-3-Clause
"""What a guest needs in order to use a node: the disks as libvirt's XML, or as arguments of QEMU.

The guest reaches the node over its Unix socket, and waits while there is no answer (`reconnect-delay`): a restart of
the node, an upgrade say, costs it a pause.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
from xml.sax.saxutils import quoteattr

from replication.client.session import Unusable
from replication.errors import ConfigError
from replication.options import DiskOptions
from replication.service import config
from replication.stage import Mode

from . import nodes

_TLS_ID = "replicated-tls"
_RECONNECT_S = 60
"""As the default of qemu-args (table.RECONNECT_S)."""
_DAEMONS = ("libvirtd", "virtqemud")
_RECONNECT_SINCE = (9, 1)
"""The libvirt that has <reconnect> for NBD. Debian 12 has 9.0, whose schema refuses it, and whose parser drops it."""
_VERSION_S = 5.0
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def domain_xml(name: str, options: argparse.Namespace) -> None:
    """Print a <disk> element for each disk."""
    found, exports = _faces(name)
    delay_s, on_error = options.reconnect, ""
    if delay_s is None:
        delay_s = _RECONNECT_S
        version = _libvirt_version()
        if version is not None and version < _RECONNECT_SINCE:
            # The next best: the guest stands still, and `virsh resume` has QEMU try again.
            delay_s, on_error = 0, " error_policy='stop' rerror_policy='stop'"
    text = "\n".join(_element(export, found, index, delay_s, on_error) for index, export in enumerate(exports))
    print(json.dumps({"xml": text}) if options.json else text)


def _libvirt_version() -> tuple[int, ...] | None:
    """That of the daemon that is installed on this host; None if none is: the domain is for another host, or to be."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for daemon in filter(None, (shutil.which(name, path=path) for name in _DAEMONS)):
        try:
            done = subprocess.run(
                [daemon, "--version"], capture_output=True, text=True, timeout=_VERSION_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        said = re.search(r"\(libvirt\) (\d+)\.(\d+)", done.stdout)
        if said is not None:
            return int(said[1]), int(said[2])
    return None


def qemu_args(name: str, options: argparse.Namespace) -> None:
    """Print a -blockdev and a -device for each disk, quoted for a shell."""
    found, exports = _faces(name)
    arguments = _credentials(found.service)
    more = {"tls-creds": _TLS_ID} if arguments else {}
    for index, export in enumerate(exports):
        node = f"replicated{index}"
        blockdev = {
            "driver": "raw",
            "node-name": node,
            "cache": {"direct": True},
            "discard": "unmap",
            "file": {
                "driver": "nbd",
                "server": {"type": "unix", "path": found.guest_socket},
                "export": export,
                "reconnect-delay": options.reconnect,
                **more,
            },
        }
        arguments += ["-blockdev", json.dumps(blockdev), "-device", f"virtio-blk-pci,drive={node}"]
    if options.json:
        print(json.dumps({"arguments": arguments}))
    else:
        pairs = (shlex.join(arguments[index : index + 2]) for index in range(0, len(arguments), 2))
        print(" \\\n".join(pairs))


def _credentials(service: config.Service) -> list[str]:
    """nbdkit demands TLS at its Unix socket as well, and then a certificate, or the key. Who listens there is a matter
    of its folder's permissions, so the guest does not verify it."""
    if service.tls != "require":
        return []
    if service.tls_certificates is not None:
        what = f"tls-creds-x509,id={_TLS_ID},endpoint=client,verify-peer=off,dir={service.tls_certificates}"
        return ["-object", what]
    raise Unusable(
        "the node demands TLS with a pre-shared key of its guest, too: give QEMU the key as in its manual "
        "(tls-creds-psk), or the node certificates"
    )


def _element(export: str, found: config.ServiceConfig, index: int, delay_s: int, on_error: str) -> str:
    reconnect = f"    <reconnect delay='{delay_s}'/>\n" if delay_s else ""
    tls = " tls='yes'" if found.service.tls == "require" else ""
    return f"""\
<disk type='network' device='disk'>
  <driver name='qemu' type='raw' cache='none' discard='unmap'{on_error}/>
  <source protocol='nbd' name={quoteattr(export)}{tls}>
    <host transport='unix' socket={quoteattr(found.guest_socket)}/>
{reconnect}  </source>
  <target dev='vd{_letters(index)}' bus='virtio'/>
</disk>"""


def _letters(index: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + _LETTERS[index % 26]


def _faces(name: str) -> tuple[config.ServiceConfig, list[str]]:
    """(the node's file, the export of each disk)"""
    nodes.known(name)
    try:
        found = config.load(name)
    except ConfigError as error:
        raise Unusable(str(error)) from error
    return found, [_export(disk, found.options.mode) for disk in found.options.disks]


def _export(disk: DiskOptions, mode: Mode) -> str:
    if mode is Mode.PRIMARY:
        return disk.name
    assert disk.top_id is not None  # a secondary has one for each disk
    return disk.top_id
