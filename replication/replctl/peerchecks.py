# SPDX-License-Identifier: BSD-3-Clause
"""The checks of `replctl doctor` that ask the other side: for a primary, over the same NBD port that it uses itself."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from replication import VERSION
from replication.addresses import connect
from replication.disk.connection import Connection, ExportRefused
from replication.errors import DiskError, ReplicationError
from replication.primary.peer import Peer
from replication.uri import export_of, host_of, is_tls

from .finding import CONNECT_S, Check, Finding, Subject, bad, ok, warning

CLOCK_S = 2.0
"""A difference that a person sees; certificates and logs of two hosts are hard to compare beyond."""


def reachable(node: Subject) -> Iterator[Finding]:
    """The secondary's address answers."""
    uri = node.config.options.secondary
    if uri is None:
        if node.config.options.mode.value == "primary":
            yield warning("the primary has no secondary", "secondary = 'nbd://HOST' in its file")
        return
    place = host_of(uri)
    if place is None:
        return
    shown = f"{place[0]}, port {place[1]}"
    try:
        connect(*place, time.monotonic() + CONNECT_S).close()
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, socket.gaierror) else error
        yield bad(f"the name {place[0]} is not known: {why}", "put it into /etc/hosts, or use an address")
    except TimeoutError:
        yield bad(f"no answer from {shown}", "is the host up? A firewall that drops packets looks like this")
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            yield bad(f"nobody listens at {shown}", "start the secondary there, and look at its `listen`")
        else:
            yield bad(f"{shown}: {error.strerror}", "look at the network between the two hosts")
    else:
        yield ok(f"{shown} answers")


def sizes(node: Subject) -> Iterator[Finding]:
    """The disks of both sides are as large, to the byte, and have the same names."""
    uri = node.config.options.secondary
    if uri is None:
        return
    for disk in node.config.options.disks:
        try:
            connection = Connection(uri, None if export_of(uri) else disk.name, CONNECT_S, node.config.options.tls)
        except ExportRefused as error:
            yield bad(f"the secondary has no disk {disk.name}: {error}", f"call its table [disk.{disk.name}], too")
            continue
        except DiskError as error:
            yield bad(str(error), _advice(uri))
            return
        theirs = connection.size
        connection.close()
        ours = node.sizes.get(disk.name, theirs)
        if ours == theirs:
            yield ok(f"disk {disk.name} has {theirs} bytes there")
        else:
            first = "" if theirs < ours else f"what is there behind byte {ours} is lost with this: "
            yield bad(
                f"disk {disk.name} has {ours} bytes here and {theirs} bytes there",
                f"{first}stop the secondary, truncate -s {ours} its disk, and start it; if it does not start, doctor "
                "there says what its state folder knows of the former size",
            )


def _advice(uri: str) -> str:
    place = host_of(uri)
    if place is not None:
        try:
            connect(*place, time.monotonic() + CONNECT_S).close()
        except (OSError, UnicodeError):
            return "see `peer`, which is about its address"
    if is_tls(uri):
        return "docs/security.md has how to make certificates; the name in the URI has to be in the server's"
    return "does the secondary require TLS? Then the URI begins with nbds://, and tls-certificates is needed"


def versions(node: Subject) -> Iterator[Finding]:
    """Both sides run the same version."""
    answer = _asked(node, "query-version")
    if answer is None:
        return
    theirs = str(answer.get("package", "")).rpartition(" ")[2]
    if theirs == VERSION:
        yield ok(f"both sides run {VERSION}")
    else:
        yield warning(f"this side runs {VERSION}, the secondary {theirs}", "upgrade the older one; the secondary first")


def clock(node: Subject) -> Iterator[Finding]:
    """The clocks of both hosts agree: the secondary says when its checkpoint was, and how long ago."""
    asked = time.time()
    answer = _asked(node, "query-replication")
    answered = time.time()
    checkpoint = (answer or {}).get("checkpoint") or {}
    if not isinstance(checkpoint.get("time"), int | float) or not isinstance(checkpoint.get("age"), int | float):
        return  # none yet
    theirs = checkpoint["time"] + checkpoint["age"]
    # Its answer was made at some moment in between, however long a slow network or host has taken.
    ahead = max(theirs - answered, 0.0) + min(theirs - asked, 0.0)
    if abs(ahead) > CLOCK_S:
        yield warning(
            f"the clock of the secondary is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this one "
            "(or was set since its last checkpoint)",
            "let both hosts take the time from the network: systemctl enable --now systemd-timesyncd",
        )
    else:
        yield ok("the clocks of both hosts agree")


def _asked(node: Subject, command: str) -> dict[str, Any] | None:
    """The answer of the secondary's control export; None if there is none, which `reachable` and `sizes` explain."""
    uri = node.config.options.secondary
    if uri is None:
        return None
    tls = node.config.options.tls
    opened: Callable[[str, str, float], Connection] = lambda place, export, limit_s: Connection(  # noqa: E731
        place, export, limit_s, tls
    )
    try:
        peer = Peer.open(uri, CONNECT_S, opened, lambda *_: None, lambda _: None)
        if peer is None:
            return None
        try:
            answer: dict[str, Any] = peer.call(command, {}, CONNECT_S)
            return answer
        finally:
            peer.close()
    except ReplicationError:
        return None


def heard(node: Subject) -> Iterator[Finding]:
    """A secondary: whether its primary is connected."""
    if node.config.options.mode.value != "secondary" or node.status is None:
        return
    link = node.status.get("link") or {}
    if node.status.get("stage") == "running" and not link.get("primary"):
        yield warning("no primary is connected", "start replication on the primary; doctor there says what it lacks")
    elif node.status.get("stage") == "running":
        yield ok(f"the primary is connected: {link.get('state')}")


OF_PEER = (
    Check("peer", reachable, 12.0),
    Check("sizes", sizes, 20.0),
    Check("versions", versions, 12.0),
    Check("clock", clock, 12.0),
    Check("link", heard, 12.0),
)
