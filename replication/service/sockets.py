# SPDX-License-Identifier: BSD-3-Clause
"""The sockets on which a node listens: those that systemd has opened, and those that are missing.

nbdkit serves any number of sockets that it gets in systemd's way (sd_listen_fds(3): descriptors from 3 on, LISTEN_FDS
of them, for the process LISTEN_PID), and only so a Unix and a TCP one in one process. So whoever starts it opens what
systemd has not, and hands all of them over. nbdkit removes no socket that it has got so: one that nobody listens on any
more is replaced here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence

from replication.errors import ConfigError
from replication.service.config import Address, Service

FIRST = 3
"""SD_LISTEN_FDS_START."""

_PASSED_MAX = 64
_BACKLOG = 128
_ASIDE = 100
"""Descriptors of this number and above are out of the way of those that are handed over."""

_IP_FREEBIND, _IPV6_FREEBIND = 15, 78
"""linux/in.h, linux/in6.h: an address may be bound before the network is up, and Python has no names for it."""

_WILDCARDS = ("0.0.0.0", "::")


def passed(environment: Mapping[str, str], pid: int) -> list[socket.socket]:
    """The listening sockets that this process was started with; ConfigError when one is none."""
    if environment.get("LISTEN_PID") != str(pid):
        return []
    count = environment.get("LISTEN_FDS", "")
    if not count.isascii() or not count.isdigit() or int(count) > _PASSED_MAX:
        raise ConfigError(f"LISTEN_FDS={count} is not a number of sockets")
    found = []
    for number in range(FIRST, FIRST + int(count)):
        try:
            found.append(socket.socket(fileno=number))
            if not found[-1].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ConfigError(f"descriptor {number} of LISTEN_FDS={count} does not listen: use ListenStream=")
        except OSError as error:
            raise ConfigError(f"descriptor {number} of LISTEN_FDS={count}: {error.strerror}") from error
    return found


def complete(given: Sequence[socket.socket], service: Service) -> list[socket.socket]:
    """All sockets of a node: those given, and the others that its file names; ConfigError when one cannot be opened."""
    sockets = list(given)
    if not any(_is_path(found, service.guest_socket) for found in given):
        sockets.append(_opened_path(service))
    for address in service.listen:
        if not any(_covers(found, address) for found in given):
            sockets += _opened_address(address)
    return sockets


def hand_over(sockets: Sequence[socket.socket]) -> dict[str, str]:
    """Put the sockets where the next program of this process expects them; the environment that tells it so."""
    # First out of the way, so that none is overwritten by another one.
    aside = [fcntl.fcntl(found.detach(), fcntl.F_DUPFD_CLOEXEC, _ASIDE) for found in sockets]
    for index, number in enumerate(aside):
        os.dup2(number, FIRST + index, inheritable=True)
        os.close(number)
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(aside))}


def _is_path(found: socket.socket, path: str) -> bool:
    name = found.getsockname() if found.family == socket.AF_UNIX else None
    return isinstance(name, str) and os.path.realpath(name) == os.path.realpath(path)


def _covers(found: socket.socket, address: Address) -> bool:
    if found.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    host, port, *_ = found.getsockname()
    if port != address.port:
        return False
    return host in _WILDCARDS or any(host == place[0] for _, place in _resolved(address))


# -- opening ---------------------------------------------------------------------------------------------------


def _opened_path(service: Service) -> socket.socket:
    path = service.guest_socket
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_way(path)
        # Before bind, the mode of the descriptor becomes that of the file: nobody but the owner until all is set.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        os.chmod(path, 0o600)
        if service.socket_group is not None:
            os.chown(path, -1, _group(service.socket_group))
        listener.listen(_BACKLOG)
        os.chmod(path, service.socket_mode)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on guest-socket = '{path}': {error.strerror}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _make_way(path: str) -> None:
    """Remove a socket that nobody listens on; ConfigError for anything else that is there."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"guest-socket = '{path}': there is a file in the way that is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a live listener whose backlog is full would hold us up, and is in use as well
            if probe.connect_ex(path) != errno.ECONNREFUSED:
                raise ConfigError(f"guest-socket = '{path}' is in use by another process")
        os.unlink(path)


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ConfigError(f"socket-group = '{name}': there is no such group") from error


def _opened_address(address: Address) -> list[socket.socket]:
    opened: list[socket.socket] = []
    try:
        for family, place in _resolved(address):
            with _unless_the_kernel_lacks_it():
                opened.append(_bound(family, place))
        if not opened:
            raise ConfigError(f"cannot listen on {address}: this host has no such network protocol")
    except OSError as error:
        for found in opened:
            found.close()
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error
    return opened


def _resolved(address: Address) -> list[tuple[int, tuple[str, int]]]:
    """Family and place of each address of a host; of none, one that takes both families, if there is IPv6."""
    if not address.host:
        return [(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET, ("", address.port))]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error
    return [(family, (str(place[0]), address.port)) for family, _, _, _, place in found]


@contextlib.contextmanager
def _unless_the_kernel_lacks_it() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise


def _bound(family: int, place: tuple[str, int]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # One that is for all addresses takes IPv4 as well; one of a name has another one beside it for that.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(place[0])))
            listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
