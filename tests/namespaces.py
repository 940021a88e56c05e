# SPDX-License-Identifier: BSD-3-Clause
"""The two hosts of a Wire: network namespaces, with one address each."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_NETNS_FOLDER = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_MNT_DETACH = 2
_WIRE_NAME = re.compile(r"wire-(\d+)-\d+-[ab]")
_libc = ctypes.CDLL(None, use_errno=True)


class WireError(Exception):
    """The network could not be made, or could not do what it was told; the text says why."""


def _check(result: int, what: str) -> None:
    """Raise OSError for a libc call that returned -1."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


@contextlib.contextmanager
def namespace_entered(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the calling thread, and only it, into the network namespace at `path`; back at the end.

    A socket belongs for good to the namespace in which it was made; a thread or a process started meanwhile too.
    """
    with open("/proc/thread-self/ns/net", "rb") as before, open(path, "rb") as wanted:
        _check(_libc.setns(wanted.fileno(), _CLONE_NEWNET), f"cannot enter {os.fspath(path)}")
        try:
            yield
        finally:
            _check(_libc.setns(before.fileno(), _CLONE_NEWNET), "cannot go back to the network namespace before")


def leave_network_namespace() -> None:
    """Put the calling thread into a network namespace of its own, which goes with it."""
    _check(_libc.unshare(_CLONE_NEWNET), "cannot make a network namespace")


def namespace_path(name: str) -> Path:
    """Where the namespace `name` is to be found."""
    return _NETNS_FOLDER / name


def remove_namespace(name: str) -> None:
    """Take the name away; the namespace goes with the last process in it. Nothing happens if it is gone already."""
    path = os.fspath(namespace_path(name))
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        _check(-1, f"cannot unmount {path}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_stale_namespaces() -> None:
    """Remove the hosts of test processes that are dead, as are their relays."""
    for name in os.listdir(_NETNS_FOLDER) if _NETNS_FOLDER.is_dir() else []:
        found = _WIRE_NAME.fullmatch(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            remove_namespace(name)


@dataclass(frozen=True)
class Host:
    """One of the two hosts."""

    name: str
    """`a` or `b`."""
    address: str
    """Its IPv4 address, known only on the two hosts."""
    namespace: str
    """The name under which `ip netns` knows it."""

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to run it on this host; it replaces itself, so the pid is the command's.

        Not `ip netns exec`: that gives the command a mount namespace of its own.
        """
        return ["nsenter", f"--net={namespace_path(self.namespace)}", "--"]

    def run(
        self, command: Sequence[str], timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here and wait for it; its output is captured. `check`: a failure raises CalledProcessError."""
        return subprocess.run([*self.prefix, *command], timeout=timeout_s, check=check, capture_output=True, text=True)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Be on this host, for the calling thread only: sockets that it makes, and connects, are this host's.

        libnbd makes its socket in the thread that calls `connect_uri`, `connect_tcp` or `aio_connect_uri`.
        """
        return namespace_entered(namespace_path(self.namespace))


HOSTS = {
    "a": ("10.77.0.1", "02:00:00:00:00:0a"),
    "b": ("10.77.0.2", "02:00:00:00:00:0b"),
}
"""Address and MAC address. They are the same in every Wire, which cannot see each other."""


def hosts_of(name: str) -> dict[str, Host]:
    """The two hosts of the wire `name`."""
    return {host: Host(host, address, f"{name}-{host}") for host, (address, _) in HOSTS.items()}
