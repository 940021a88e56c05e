# SPDX-License-Identifier: BSD-3-Clause
"""A node's file: `init` writes a first one, with a comment for each thing that one may want to change; `check-config`
reads files as a start of the node would."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from replication.client.qmp import Refused
from replication.client.session import Unusable
from replication.errors import ConfigError
from replication.service import config
from replication.uri import PORT, is_uri

from . import nodes
from .outcome import Exit, Failed

MODE = 0o644
"""The file names keys and certificates, and holds none; the user of the service reads it."""

NEXT = {
    "primary": """\
next, as root:
  chown nbdkit-replication {disks}     # the service works as this user
  systemctl enable --now nbdkit-replication@{name}
  replctl doctor {name}
  replctl {name} start --sync full     # after the secondary; sends everything
  replctl {name} domain-xml            # the disk for the guest; or qemu-args""",
    "secondary": """\
next, as root:
  truncate -s SIZE {disks}             # new ones, as large as the primary's, to the byte
  chown nbdkit-replication {disks}     # the service works as this user
  systemctl enable --now nbdkit-replication@{name}
  replctl {name} start                 # before the primary""",
}


def init(options: argparse.Namespace) -> None:
    """Write the file of a new node; a file that is there stays as it is."""
    path = nodes.path_of(options.name)
    text = _text(options)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).write_text(text, encoding="utf-8")
        try:
            config.load(options.name, folder)
        except ConfigError as error:
            raise Unusable(str(error).replace(f"{folder}/{path.name}: ", "")) from error
    _write(path, text)
    if options.json:
        print(json.dumps({"done": True, "name": options.name, "file": str(path)}))
        return
    disks = " ".join(location for _, location in _disks(options))
    print(f"wrote {path}\n" + NEXT[options.mode].format(name=options.name, disks=disks))


def _write(path: Path, text: str) -> None:
    """As a whole, or not at all; Refused if there is such a file."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), MODE)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(new, path)  # fails where rename would replace
    except FileExistsError:
        raise Refused(f"{path} is there already, and stays as it is: change it with an editor, or remove it") from None
    except OSError as error:
        raise Unusable(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


# -- the text --------------------------------------------------------------------------------------------------


def _text(options: argparse.Namespace) -> str:
    """The file; Unusable for what contradicts."""
    primary = options.mode == "primary"
    if primary and not options.peer:
        raise Unusable("a primary needs --peer HOST: where its secondary listens")
    if not primary and options.checkpoint_interval is not None:
        raise Unusable("--checkpoint-interval is for the primary, which takes the checkpoints")
    if primary and (options.overlays or options.top_id):
        raise Unusable("--overlays and --top-id are for a secondary")
    top = [
        f"# Node {options.name}: see replication.toml(5). After a change: replctl check-config {options.name}, and",
        f"# systemctl restart nbdkit-replication@{options.name}. A guest that reconnects only waits meanwhile.",
        "",
        f"mode = {_quoted(options.mode)}",
        "",
        *(_of_primary(options) if primary else _of_secondary()),
        "",
        "# What the node knows of itself and its peer. It must outlive a reboot: no tmpfs.",
        f'# state = "/var/lib/nbdkit-replication/{options.name}"',
        "",
        *_tls_of_node(options),
        "[service]",
        *_service(options, primary),
    ]
    for name, location in _disks(options):
        top += ["", f"[disk.{_key(name)}]", f"disk = {_quoted(location)}"]
        if not primary:
            top += _of_overlays(options, name)
    return "\n".join(top) + "\n"


def _of_primary(options: argparse.Namespace) -> list[str]:
    interval = 1.0 if options.checkpoint_interval is None else options.checkpoint_interval
    return [
        "# Where the secondary listens.",
        f"secondary = {_quoted(_peer_uri(options))}",
        "",
        "# Seconds between checkpoints: what a failover loses at most. Without the line only commands take them.",
        f"checkpoint-interval = {interval:g}",
        "",
        "# sync: a write is answered when both hosts have it. async: when this host has it.",
        '# protocol = "async"',
        "",
        "# Seconds without an answer of the secondary before the guest goes on without it.",
        "# timeout = 5",
        "",
        "# Bytes a second for a resync, over all disks.",
        '# resync-rate = "100M"',
    ]


def _of_secondary() -> list[str]:
    return [
        "# power: a checkpoint survives a power cut of this host. process: only the end of the process; faster.",
        '# durability = "process"',
        "",
        "# Seconds: an event says when the last checkpoint is older.",
        "# checkpoint-age-limit = 60",
    ]


def _tls_of_node(options: argparse.Namespace) -> list[str]:
    lines = ["# The certificates (ca-cert.pem, client-cert.pem, client-key.pem) for connections that this node makes."]
    if options.tls and options.mode == "primary":
        return [*lines, f"tls-certificates = {_quoted(options.tls)}", ""]
    return [*lines, '# tls-certificates = "/etc/nbdkit-replication.d/tls"', ""]


def _service(options: argparse.Namespace, primary: bool) -> list[str]:
    addresses = options.listen or ([] if primary else [f":{PORT}"])
    listen = "[" + ", ".join(_quoted(address) for address in addresses) + "]"
    lines = ["# TCP, for the other host; let nobody else reach it (firewall, TLS). A secondary needs one."]
    lines.append(f"listen = {listen}" if addresses else f'# listen = [":{PORT}"]')
    lines += [
        "",
        "# The Unix socket for the guest, and who may use it. (Of a socket that systemd holds, a drop-in for",
        f"# nbdkit-replication@{options.name}.socket says it: SocketGroup=, SocketMode=.)",
        f'# guest-socket = "/run/nbdkit-replication/{options.name}/guest.sock"',
        '# socket-group = "libvirt-qemu"',
        '# socket-mode = "0660"',
        "",
        "# TLS for those who connect to this node: ca-cert.pem, server-cert.pem, server-key.pem.",
    ]
    if options.tls and addresses:
        lines += ['tls = "require"', f"tls-certificates = {_quoted(options.tls)}", "tls-verify-peer = true"]
    else:
        lines += [
            '# tls = "require"',
            '# tls-certificates = "/etc/nbdkit-replication.d/tls"',
            "# tls-verify-peer = true",
        ]
    return lines


def _of_overlays(options: argparse.Namespace, name: str) -> list[str]:
    disks = _disks(options)
    top = options.top_id or "guest"
    lines = [
        "# The export for the guest on this host, after a failover.",
        f"top-id = {_quoted(top if len(disks) == 1 else f'{top}-{name}')}",
        "# What the primary has overwritten since the last checkpoint, and what a guest here writes. In the state",
        "# folder by default; in memory (/dev/shm) they are faster.",
    ]
    for kind in ("active", "hidden"):
        place = os.path.join(options.overlays or f"/dev/shm/{options.name}", f"{name}.{kind}.qcow2")
        lines.append(f"{'' if options.overlays else '# '}{kind} = {_quoted(place)}")
    return lines


def _disks(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, path or URI), from [NAME:]PATH."""
    found = []
    for index, word in enumerate(options.disk):
        name, colon, location = word.partition(":")
        if not colon or is_uri(word) or "/" in name:
            name, location = f"disk{index}", word
        found.append((name, location if is_uri(location) else os.path.abspath(location)))
    if len({name for name, _ in found}) < len(found):
        raise Unusable("two disks have the same name")
    return found


def _peer_uri(options: argparse.Namespace) -> str:
    """HOST, HOST:PORT, an IPv6 address, or a whole URI."""
    peer: str = options.peer
    if is_uri(peer):
        return peer
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(peer).version == 6:
            peer = f"[{peer}]"
    return f"{'nbds' if options.tls else 'nbd'}://{peer}"


def _quoted(text: str) -> str:
    """A TOML string: JSON's escapes are among TOML's."""
    return json.dumps(text)


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else _quoted(name)


# -- check-config ----------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> None:
    """Read the file of one node, or of all; Failed with code 1 if one cannot be used."""
    word = options.what or options.node
    results = [_checked(*_place(each)) for each in ([word] if word else nodes.names())]
    if options.json:
        print(json.dumps(results))
    elif not results:
        print(f"no nodes: there is no file NAME.toml in {nodes.folder()}")
    for result in results if not options.json else ():
        print(f"{result['file']}: ok" if result["ok"] else result["error"])
    if not all(result["ok"] for result in results):
        raise Failed(Exit.REFUSED)


def _place(word: str) -> tuple[str, Path]:
    """(name, file), from a name or the path of a file."""
    if os.sep in word or word.endswith(nodes.SUFFIX):
        path = Path(os.path.abspath(word))
        if path.suffix != nodes.SUFFIX:
            raise Unusable(f"{word}: the file of a node is called NAME{nodes.SUFFIX}")
        return path.name.removesuffix(nodes.SUFFIX), path
    return word, nodes.known(word)


def _checked(name: str, path: Path) -> dict[str, Any]:
    error = None
    try:
        config.load(name, str(path.parent))
    except ConfigError as wrong:
        error = str(wrong)
    return {"name": name, "file": str(path), "ok": error is None, "error": error}
