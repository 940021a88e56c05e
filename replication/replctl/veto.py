# SPDX-License-Identifier: BSD-3-Clause
"""A hook of libvirt that keeps a guest from starting on a host where it may not run.

libvirt runs a hook as `HOOK GUEST OPERATION SUBOPERATION EXTRA`, gives it the domain's XML on stdin, waits for it, and
at `prepare` takes any exit code but 0 for no; what the hook prints on stderr reaches whoever wanted the guest
(https://libvirt.org/hooks.html). Which nodes a guest uses is seen from the sockets in its XML.

A guest that comes by live migration is prepared as one that starts, but `migrate` is called for it just before. With
--allow-migration that leaves a mark, which the next `prepare` takes away: only then a secondary that passes requests on
to the owner lets a guest in, whatever else is allowed. One that starts there would be a second one, as a rule.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

from replication.client.qmp import Refused
from replication.client.roles import ask_may_run
from replication.client.session import Unusable
from replication.client.values import printable

from . import nodes

_XML_MAX = 16 << 20
"""Characters: more than libvirt's own limit for a domain."""
_BEFORE_START, _BEFORE_MIGRATION = "prepare", "migrate"
_PASSES_ON = "passes-on"

_MIGRATION_S = 30.0
"""Between the two calls for a guest that comes is no time to speak of: libvirt makes them within one step."""


def libvirt_hook(options: argparse.Namespace) -> None:
    """Refused if the guest that libvirt is about to start uses a node on which it may not run now, or may use one of
    which that cannot be told."""
    if options.operation == _BEFORE_MIGRATION and options.allow_migration:
        _mark(options.guest)
    starts = options.operation == _BEFORE_START
    comes = starts and _take_mark(options.guest) and options.allow_migration
    used = list(_used(sys.stdin.read(_XML_MAX), options)) if starts else []
    for name in used:
        may, why = _ask(name, options.timeout)
        allowed = comes if why.get("code") == _PASSES_ON else options.allow_unknown
        if may is True or (may is not False and allowed):
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


def _mark_of(guest: str) -> str:
    name = hashlib.sha256(guest.encode(errors="replace")).hexdigest()[:32]
    return os.path.join(os.environ.get(nodes.RUN_VARIABLE) or nodes.RUN, f".migrating-{name}")


def _mark(guest: str) -> None:
    """Where it cannot be left, no node runs on this host, or the guest is not let in."""
    place = _mark_of(guest)
    with contextlib.suppress(OSError):
        os.unlink(place)
    with contextlib.suppress(OSError):
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _take_mark(guest: str) -> bool:
    """Whether one was left just now."""
    place = _mark_of(guest)
    try:
        age_s = time.time() - os.lstat(place).st_mtime
        os.unlink(place)
    except OSError:
        return False
    return 0 <= age_s < _MIGRATION_S


def _ask(name: str, timeout_s: float) -> tuple[object, dict[str, Any]]:
    try:
        return ask_may_run(nodes.control_of(name), timeout_s)
    except Unusable as error:  # nor is it known where to ask
        return None, {"reason": str(error)}


def _used(text: str, options: argparse.Namespace) -> Iterator[str]:
    """The nodes of this host whose sockets the domain has, as libvirt's disks or in arguments for QEMU. Refused where
    one of them cannot be known, unless that is allowed."""
    try:
        domain = ET.fromstring(text)
    except ET.ParseError as error:
        raise Unusable(f"what libvirt gives on stdin is no XML: {error}") from error
    said = [value for element in domain.iter() for value in (*element.attrib.values(), element.text or "")]
    for name in nodes.names():
        try:
            place = nodes.guest_socket_of(name)
        except Unusable as error:
            if options.allow_unknown:
                continue
            raise Refused(
                f"the guest {printable(options.guest)} might not be allowed to run on this host now, because it may "
                f"use the node {name}: {printable(str(error))}"
            ) from error
        socket = re.compile(rf"{re.escape(place)}(?![\w./-])")
        if any(socket.search(value) for value in said):
            yield name
