# SPDX-License-Identifier: BSD-3-Clause
"""The checks of `replctl doctor` that look at this host: the node's file, disks, folders, ports and certificates."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator

from replication.disk.lock import used_by_other
from replication.errors import ConfigError
from replication.service import config
from replication.uri import is_uri

from .finding import Check, Finding, Subject, bad, existing, ok, size_of, warning

USER = "nbdkit-replication"
"""Of the units."""

MIB = 1 << 20
STATE_BYTES_MIN = 16 * MIB
OVERLAY_PART_MIN, OVERLAY_PART_LOW = 0.01, 0.1
"""Of the disks' sizes: what is overwritten between two checkpoints has to fit."""

EXPIRES_S = 14 * 86400.0
NBDKIT_TESTED = (1, 32)
NBDKIT_ENDS_HANGUPS = (1, 34)
"""Before it, the threads of a client that hung up in mid-request may stay (server/hangup.py)."""
NBDKIT_TELLS_NAMES = (1, 40)
KERNEL_REPORTS_LOSSES = (4, 13)
"""From this Linux on, each who has a file open learns of a failed write-back (errseq_t); before, only one did."""


def software(_: Subject) -> Iterator[Finding]:
    """nbdkit, its Python plugin, and what they need; the kernel."""
    packages = {"nbdkit": "nbdkit", "qemu-img": "qemu-utils"}
    missing = [package for program, package in packages.items() if shutil.which(program) is None]
    if missing:
        yield bad(f"not installed: {', '.join(missing)}", f"apt install {' '.join(missing)}")
    if "nbdkit" in missing:
        return
    dumped = _output("nbdkit", "--dump-plugin", "python")
    if dumped is None:
        yield bad("nbdkit has no Python plugin", "apt install nbdkit-plugin-python")
        return
    version = nbdkit_version()
    shown = ".".join(map(str, version))
    if version < NBDKIT_TESTED:
        yield warning(f"nbdkit {shown} is older than what was tested", "use a Debian from 12 on, or nbdkit 1.32")
    kernel = _numbers(os.uname().release)
    if kernel < KERNEL_REPORTS_LOSSES:
        yield bad(
            f"Linux {os.uname().release} tells only one process of a failed write: losses may stay unknown",
            "use Linux 4.13 or newer",
        )
    if not missing:
        known = "" if version >= NBDKIT_ENDS_HANGUPS else " (threads of clients that hang up may stay)"
        yield ok(f"nbdkit {shown}{known}, Linux {os.uname().release}")


def identities(node: Subject) -> Iterator[Finding]:
    """Whether this nbdkit can tell the names in certificates, if they count."""
    options = node.config.options
    keys = {"primary-identity": options.primary_identity, "guest-identity": options.guest_identity}
    given = [key for key, value in keys.items() if value is not None]
    if given and nbdkit_version() < NBDKIT_TELLS_NAMES:
        yield bad(f"{' and '.join(given)} need nbdkit 1.40", "remove them, or upgrade to Debian 13")


def file(node: Subject) -> Iterator[Finding]:
    """The node's file."""
    yield ok(f"{node.config.path} can be used")


def running(node: Subject) -> Iterator[Finding]:
    """Whether the node answers, and replication has not failed."""
    status = node.status
    if status is None:
        yield warning(
            f"the node does not answer at {node.config.control}",
            f"systemctl enable --now nbdkit-replication@{node.name}; "
            f"journalctl -u nbdkit-replication@{node.name} has its log",
        )
        return
    error = status.get("error")
    if error:
        desc = error.get("desc") if isinstance(error, dict) else error
        yield bad(f"replication has failed: {desc}", f"replctl {node.name} status; docs/operating.md has what to do")
    else:
        yield ok(f"the node answers: {status.get('mode')}, stage {status.get('stage')}")


def disks(node: Subject) -> Iterator[Finding]:
    """Each disk is there and may be used."""
    for disk in node.config.options.disks:
        if disk.location is None:
            continue
        if is_uri(disk.location):
            if node.sizes.get(disk.name):
                yield ok(f"{disk.location} has {node.sizes[disk.name]} bytes")
            continue
        try:
            size = size_of(disk.location)
        except OSError as error:
            yield bad(f"{disk.location}: {error.strerror}", _make(node, disk.location))
            continue
        if not size:
            yield bad(f"{disk.location} is empty", _make(node, disk.location))
        elif not may_write(disk.location, USER):
            yield bad(f"the user {USER} may not write to {disk.location}", f"chown {USER} {disk.location}")
        elif (former := node.remembered.get(disk.name, size)) < size:
            yield warning(
                f"{disk.location} has {size} bytes, but {node.config.state} is of {former}: these are used",
                "when the disks of both nodes were grown, `replctl NAME resize` on the primary",
            )
        elif former > size:
            # Without its folder the node is one that knows of no content, and nobody is overwritten for it.
            yield bad(
                f"{disk.location} has {size} bytes, but {node.config.state} is of {former}: the node does not start",
                f"bring back the size that it had; or, for a disk of another size, move {node.config.state} away: "
                "everything is sent anew then",
            )
        else:
            yield ok(f"{disk.location} has {size} bytes")


def _make(node: Subject, path: str) -> str:
    state = node.config.options.state
    if state is not None and os.path.exists(os.path.join(state, "state.json")):
        # With an empty disk the node would go on as if that held what the folder says.
        return f"bring it back (is its file system mounted?); if it is lost, {state} goes with it: move that away, too"
    return f"make it, as large as on the other host: truncate -s SIZE {path}"


def locks(node: Subject) -> Iterator[Finding]:
    """Nobody but the node uses the disks: QEMU's locks, which nbdkit-replication takes as well."""
    for disk in node.config.options.disks:
        if disk.location is None or is_uri(disk.location):
            continue
        try:
            descriptor = os.open(disk.location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue  # `disks` says so
        try:
            if not used_by_other(descriptor):
                continue
            users = _users(os.fstat(descriptor))
        finally:
            os.close(descriptor)
        others = [f"{name} (process {pid})" for pid, name in users if name != "nbdkit" or node.status is None]
        if others or node.status is None:
            who = ", ".join(others) or "another process"
            yield bad(
                f"{disk.location} is in use by {who}",
                "end it: a guest uses the disk through the node (replctl NAME domain-xml), never the file itself",
            )


def _users(wanted: os.stat_result) -> Iterator[tuple[int, str]]:
    """(process, its name) of those that have the file open, as far as they can be seen."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                found = os.stat(f"/proc/{pid}/fd/{number}")
                if int(pid) != os.getpid() and (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
                        yield int(pid), name.read().strip()
                    break


def state(node: Subject) -> Iterator[Finding]:
    """The state folder is on a disk, and has room."""
    folder = existing(node.config.state)
    kind, free = file_system(folder), _free(folder)
    if kind in ("tmpfs", "ramfs"):
        yield bad(
            f"the state folder {node.config.state} is in memory ({kind}): after a reboot the node knows nothing of "
            "its peer, and everything has to be sent",
            "put state on a disk, /var/lib/nbdkit-replication say",
        )
    elif free < STATE_BYTES_MIN:
        yield bad(f"the file system of {node.config.state} has {free // MIB} MiB left", "make room there")
    else:
        yield ok(f"{node.config.state} is on {kind}, {free // MIB} MiB left")


def overlays(node: Subject) -> Iterator[Finding]:
    """The overlays of a secondary have room, and last as long as its checkpoints are to."""
    options = node.config.options
    total = sum(node.sizes.values())
    folders = {os.path.dirname(path) for disk in options.disks for path in (disk.active, disk.hidden) if path}
    for folder in sorted(folders):
        here = existing(folder)
        kind, free = file_system(here), _free(here)
        room = f"{folder} ({kind}) has {free // MIB} MiB left for the overlays of {total // MIB} MiB of disks"
        if kind in ("tmpfs", "ramfs") and options.durability.value == "power":
            yield bad(f"{folder} is in memory ({kind}), and durability is power", "put the overlays on a disk")
        elif free < total * OVERLAY_PART_MIN:
            yield bad(room, "make room there: a full overlay ends the protection until the next checkpoint")
        elif free < total * OVERLAY_PART_LOW:
            yield warning(room, "what the guest overwrites between two checkpoints has to fit there")
        else:
            yield ok(room)


def ports(node: Subject) -> Iterator[Finding]:
    """The addresses at which the node listens are this host's, and nobody else's."""
    service = node.config.service
    if not service.listen and node.config.options.mode.value == "secondary":
        yield warning("the node listens at no TCP port", 'listen = [":10809"] in [service], for the primary')
    for address in service.listen:
        twice = [name for name in config.names() if name != node.name and address in _listens(name)]
        if twice:
            yield bad(f"{address} is also in the file of {', '.join(twice)}", "give each node a port of its own")
            continue
        failure = None if node.status else _bind(address)
        if failure is None:
            yield ok(f"the node can listen at {address}" if node.status is None else f"the node listens at {address}")
        elif failure.errno == errno.EADDRINUSE:
            yield warning(
                f"somebody listens at {address} already",
                f"ss -ltnp shows who; it may be nbdkit-replication@{node.name}.socket, which waits for a client",
            )
        else:
            # It is listened on all the same, for when it comes up.
            yield warning(
                f"nobody can connect at {address} yet: {failure.strerror}", "`ip address` shows the addresses"
            )


def _listens(name: str) -> tuple[config.Address, ...]:
    try:
        return config.load(name).service.listen
    except ConfigError:
        return ()


def _bind(address: config.Address) -> OSError | None:
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(place)
                trial.listen(1)
    except OSError as error:
        return error
    return None


def guest_socket(node: Subject) -> Iterator[Finding]:
    """The group that may use the guest's socket exists."""
    group = node.config.service.socket_group
    if group is not None:
        try:
            grp.getgrnam(group)
            yield ok(f"the guest's socket is for the group {group}")
        except KeyError:
            yield bad(f"socket-group = '{group}': there is no such group", "getent group lists them")


def certificates(node: Subject) -> Iterator[Finding]:
    """The files for TLS belong together, are valid, and are nobody else's."""
    service, options = node.config.service, node.config.options
    folder = service.tls_certificates
    if service.tls != "off" and folder is not None:
        yield from _folder(folder, "server")
        if service.tls == "require" and service.tls_verify_peer and not os.path.exists(f"{folder}/client-cert.pem"):
            yield warning(
                "the node demands a certificate of its guest, too, also over the Unix socket",
                f"put client-cert.pem and client-key.pem into {folder}: qemu-args uses them",
            )
    if options.tls.certificates is not None and os.path.exists(f"{options.tls.certificates}/client-cert.pem"):
        yield from _folder(options.tls.certificates, "client")
    open_to_all = [str(address) for address in service.listen if address.host not in ("127.0.0.1", "::1", "localhost")]
    if service.tls == "off" and open_to_all:
        yield warning(
            f"no TLS at {', '.join(open_to_all)}: who reaches the port can read and write the disks",
            "docs/security.md has how to make certificates; or let only the other host through the firewall",
        )


def _folder(folder: str, kind: str) -> Iterator[Finding]:
    certificate, key = f"{folder}/{kind}-cert.pem", f"{folder}/{kind}-key.pem"
    for path in (f"{folder}/ca-cert.pem", certificate, key):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            yield bad(f"{path}: {error.strerror}", "docs/security.md has how to make the certificates")
            return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except (ssl.SSLError, OSError) as error:
        yield bad(f"{certificate} and {kind}-key.pem are no pair: {error}", "make both again, as in docs/security.md")
        return
    if os.stat(key).st_mode & 0o004:
        yield warning(f"{key} can be read by everybody", f"chmod o-rwx {key}")
    for path in (f"{folder}/ca-cert.pem", certificate):
        yield from _dates(path)


def _dates(path: str) -> Iterator[Finding]:
    try:
        # What the ssl module decodes a peer's certificate with; it is not public, so it may be missing.
        shown = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]
        begins, ends = (ssl.cert_time_to_seconds(shown[key]) for key in ("notBefore", "notAfter"))
    except (OSError, AttributeError, KeyError, ValueError):
        return
    names = ", ".join(value for _, value in shown.get("subjectAltName", ()))
    now = time.time()
    if not begins <= now < ends:
        yield bad(f"{path} is valid from {shown['notBefore']} to {shown['notAfter']}", "renew it; look at the clock")
    elif ends - now < EXPIRES_S:
        yield warning(f"{path} expires at {shown['notAfter']}", "renew it before that")
    else:
        yield ok(f"{path} is valid until {shown['notAfter']}" + (f", for {names}" if names else ""))


# -- facts of the host -----------------------------------------------------------------------------------------


def may_write(path: str, user: str) -> bool:
    """Whether a user may read and write a file by its mode, and get there; true where there is no such user."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return True
    groups = os.getgrouplist(user, entry.pw_gid)

    def lets(place: str, bits: int) -> bool:
        status = os.stat(place)
        if status.st_uid == entry.pw_uid:
            return status.st_mode >> 6 & bits == bits
        return status.st_mode >> (3 if status.st_gid in groups else 0) & bits == bits

    real = os.path.realpath(path)
    above = os.path.dirname(real)
    while above != "/":
        if not lets(above, 1):
            return False
        above = os.path.dirname(above)
    return lets(real, 6)


def file_system(path: str) -> str:
    """The type of the file system that holds a path (proc(5), mountinfo)."""
    real, best, kind = os.path.realpath(path), "", "unknown"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
        for line in table:
            fields = line.split()
            place = fields[4].encode().decode("unicode_escape")
            inside = real == place or real.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= len(best):  # a later one lies on top
                best, kind = place, fields[fields.index("-") + 1]
    return kind


def _free(path: str) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def nbdkit_version() -> tuple[int, ...]:
    """Of the nbdkit in PATH; (0,) if there is none."""
    return _numbers(_output("nbdkit", "--version") or "")


def _numbers(text: str) -> tuple[int, ...]:
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


OF_HOST = (Check("software", software, 12.0),)
OF_NODE = (
    Check("file", file),
    Check("running", running, 12.0),
    Check("identities", identities),
    Check("disks", disks, 12.0),
    Check("locks", locks, 15.0),
    Check("state", state),
    Check("overlays", overlays, 12.0),
    Check("ports", ports, 12.0),
    Check("guest-socket", guest_socket),
    Check("certificates", certificates),
)
