# SPDX-License-Identifier: BSD-3-Clause
"""A hook of libvirt that keeps a guest from starting on a host where it may not run.

libvirt runs a hook as `HOOK GUEST OPERATION SUBOPERATION EXTRA`, gives it the domain's XML on stdin, waits for it, and
at `prepare` takes any exit code but 0 for no; what the hook prints on stderr reaches whoever wanted the guest
(https://libvirt.org/hooks.html). Which nodes a guest uses is seen from the sockets in its XML.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from replication.client.qmp import Refused
from replication.client.roles import ask_may_run
from replication.client.session import Unusable
from replication.client.values import printable
from replication.errors import ConfigError
from replication.service import config

from . import nodes

_XML_MAX = 16 << 20
"""Characters: more than libvirt's own limit for a domain."""
_BEFORE_START = "prepare"


def libvirt_hook(options: argparse.Namespace) -> None:
    """Refused if the guest that libvirt is about to start uses a node on which it may not run now."""
    used = list(_used(sys.stdin.read(_XML_MAX))) if options.operation == _BEFORE_START else []
    for name in used:
        may, why = ask_may_run(nodes.control_of(name), options.timeout)
        if may is True or (may is not False and options.allow_unknown):
            continue
        verb = "may not" if may is False else "might not be allowed to"
        reason = f"{why['reason']}" if why.get("reason") else "no reason was given"
        code = why.get("code")
        raise Refused(
            f"the guest {printable(options.guest)} {verb} run on the node {name} of this host now: {printable(reason)}",
            code=code if isinstance(code, str) else None,
        )
    if options.json:
        print(json.dumps({"guest": options.guest, "nodes": used}))


def _used(text: str) -> Iterator[str]:
    """The nodes of this host whose sockets the domain has, as libvirt's disks or in arguments for QEMU."""
    try:
        domain = ET.fromstring(text)
    except ET.ParseError as error:
        raise Unusable(f"what libvirt gives on stdin is no XML: {error}") from error
    said = [value for element in domain.iter() for value in (*element.attrib.values(), element.text or "")]
    for name in nodes.names():
        socket = re.compile(rf"{re.escape(_guest_socket(name))}(?![\w./-])")
        if any(socket.search(value) for value in said):
            yield name


def _guest_socket(name: str) -> str:
    """Where the guest of a node connects; with a file that cannot be used, the usual place."""
    try:
        return config.load(name).guest_socket
    except ConfigError:
        return os.path.join(os.environ.get(nodes.RUN_VARIABLE) or nodes.RUN, name, "guest.sock")
