# SPDX-License-Identifier: BSD-3-Clause
"""The user that nbdkit becomes later (its options -u and -g).

nbdkit gives up root's rights after `get_ready`, in which the plugin opens its disks and makes its files. So that work
is done with the later user's rights: what is made belongs to that user, and what that user cannot use is refused before
anything is served. nbdkit tells its plugins neither user nor group, so its command line is read.
"""

from __future__ import annotations

import getopt
import grp
import os
import pwd
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from replication.errors import ConfigError

_SHORT = "46D:e:fg:i:nop:P:rst:u:U:vV"
_WITH_VALUE = (
    *("debug", "export", "export-name", "exportname", "filter", "group", "ip-addr", "ipaddr", "keepalive", "log"),
    *("mask-handshake", "pid-file", "pidfile", "port", "run", "selinux-label", "threads", "timeout", "tls"),
    *("tls-certificates", "tls-psk", "unix", "user"),
)
_WITHOUT_VALUE = (
    *("dump-config", "dump-plugin", "exit-with-parent", "foreground", "help", "ipv4-only", "ipv6-only"),
    *("long-options", "new-style", "newstyle", "no-fork", "no-mc", "no-meta-contexts", "no-sr", "old-style"),
    *("oldstyle", "print-uri", "read-only", "readonly", "short-options", "single", "stdin", "swap"),
    *("tls-verify-peer", "verbose", "version", "vsock"),
)
"""nbdkit's options (1.32 to 1.42), of which those with a value may hold what looks like others."""


class LaterUser(NamedTuple):
    """Whom nbdkit becomes; None is whoever it is now."""

    uid: int | None
    gid: int | None
    name: str

    @classmethod
    def of(cls, arguments: Sequence[str]) -> LaterUser | None:
        """What nbdkit's command line says, without the program's name; None if it says nothing (or cannot be read, or
        names nobody: nbdkit says so itself)."""
        try:
            options, _ = getopt.gnu_getopt(
                list(arguments), _SHORT, [*(f"{name}=" for name in _WITH_VALUE), *_WITHOUT_VALUE]
            )
        except getopt.GetoptError:
            return None
        given = {name.lstrip("-")[0]: value for name, value in options if name in ("-u", "--user", "-g", "--group")}
        if not given:
            return None
        try:
            uid = _number(given.get("u"), lambda name: pwd.getpwnam(name).pw_uid)
            gid = _number(given.get("g"), lambda name: grp.getgrnam(name).gr_gid)
        except (KeyError, ValueError):
            return None
        return cls(uid, gid, " ".join(f"-{option} {value}" for option, value in given.items()))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Work with this user's rights. ConfigError when they cannot be had; a ConfigError from inside says whose
        rights they were."""
        former = os.geteuid(), os.getegid(), os.getgroups()
        try:
            try:
                if self.gid is not None:
                    os.setgroups([self.gid])
                    os.setegid(self.gid)
                if self.uid is not None:
                    os.seteuid(self.uid)
            except OSError as error:
                raise ConfigError(f"cannot become the user of nbdkit's {self.name}: {error.strerror}") from error
            try:
                yield
            except ConfigError as error:
                raise ConfigError(f"{error} (with the rights of nbdkit's {self.name})") from error
        finally:
            os.seteuid(former[0])
            os.setegid(former[1])
            os.setgroups(former[2])


def current() -> LaterUser | None:
    """Of this process."""
    with open("/proc/self/cmdline", "rb") as file:
        words = file.read().split(b"\0")[1:-1]
    return LaterUser.of([os.fsdecode(word) for word in words])


def _number(name: str | None, look_up: Callable[[str], int]) -> int | None:
    if name is None:
        return None
    try:
        return look_up(name)
    except KeyError:
        return int(name)
