# SPDX-License-Identifier: BSD-3-Clause
"""What a NAME stands for: /etc/nbdkit-replication.d/NAME.toml, read and checked (replication.toml(5)).

Top level and [disk.NAME] are the plugin's keys (options.py). [service] is for whoever starts the node, [[handler]] for
whoever watches it; the plugin ignores both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

from replication.errors import ConfigError
from replication.options import OptionParser, Options
from replication.service.handlers import Handler, read_handlers
from replication.uri import PORT, SOCKET_PATH_MAX, is_uri

CONFIG_DIR, CONFIG_VARIABLE = "/etc/nbdkit-replication.d", "NBDKIT_REPLICATION_CONFIG_DIR"
STATE_DIR, STATE_VARIABLE = "/var/lib/nbdkit-replication", "NBDKIT_REPLICATION_STATE_DIR"
RUN_DIR, RUN_VARIABLE = "/run/nbdkit-replication", "NBDKIT_REPLICATION_RUN_DIR"
"""Folders, and the environment variables that name others in their place. All programs of a host have to agree."""

SUFFIX = ".toml"

SOCKET_MODE = 0o660
"""Of the guest's socket: its user and its group may connect."""

WATCHDOG_MIN_S, WATCHDOG_MAX_S = 2.0, 3600.0
"""Shorter ones would end a node whose host is busy; 0 is none."""

THREADS_MAX = 1024

TLS = ("off", "on", "require")
LOG_LEVELS = ("info", "debug")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}\Z")
_GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\Z")
_MODE = re.compile(r"0?[0-7]{3}\Z")
_PATHS = ("state", "control", "tls-certificates", "tls-psk")
_DISK_PATHS = ("disk", "active", "hidden")


@dataclass(frozen=True)
class Address:
    """Where to listen; an empty host is every address of this machine."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Service:
    """[service]: how the node is started."""

    listen: tuple[Address, ...] = ()
    """TCP, for the pair."""
    guest_socket: str = ""
    socket_group: str | None = None
    socket_mode: int = SOCKET_MODE
    tls: str = "off"
    tls_certificates: str | None = None
    tls_psk: str | None = None
    tls_verify_peer: bool = False
    threads: int | None = None
    """Requests of one connection side by side; None is nbdkit's default."""
    log_level: str = "info"
    watchdog_s: float | None = None
    """Seconds; 0 for none, None for what the unit says."""
    nbdkit: tuple[str, ...] = ()
    """More options of nbdkit's own."""


@dataclass(frozen=True)
class ServiceConfig:
    """One node of this host."""

    name: str
    path: str
    """The file."""
    options: Options
    """What the plugin gets: the file's keys, with `state` and `control` as the service completes them."""
    given: frozenset[str]
    """The keys that the file's top level has."""
    service: Service
    run: str
    """The folder of the sockets."""
    handlers: tuple[Handler, ...] = ()
    """The [[handler]] tables."""

    @property
    def control(self) -> str:
        """The path of the control socket."""
        assert self.options.control is not None  # `load` completes it
        return self.options.control

    @property
    def state(self) -> str:
        """The state folder."""
        assert self.options.state is not None  # `load` completes it
        return self.options.state

    @property
    def guest_socket(self) -> str:
        """The path of the guest's socket."""
        return self.service.guest_socket


def folder_of(variable: str, default: str) -> str:
    """The folder that the environment names, or the default."""
    return os.path.abspath(os.environ.get(variable) or default)


def names(folder: str | None = None) -> list[str]:
    """The nodes that have a file, in order; none when there is no such folder."""
    folder = folder or folder_of(CONFIG_VARIABLE, CONFIG_DIR)
    try:
        files = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot read {folder}: {error.strerror}") from error
    found = (file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX))
    return sorted(name for name in found if _NAME.match(name))


def load(name: str, folder: str | None = None) -> ServiceConfig:
    """Read and check the file of a node; ConfigError is one line that names the file and the key."""
    if not _NAME.match(name):
        raise ConfigError(f"'{name}' cannot be the name of a node: use letters, digits and _ . + -, at most 64")
    path = os.path.join(folder or folder_of(CONFIG_VARIABLE, CONFIG_DIR), name + SUFFIX)
    try:
        return _read(name, path)
    except ConfigError as error:
        raise ConfigError(str(error) if path in str(error) else f"{path}: {error}") from error


def _read(name: str, path: str) -> ServiceConfig:
    run = os.path.join(folder_of(RUN_VARIABLE, RUN_DIR), name)
    parser = OptionParser()
    parser.add("config", path)
    given = frozenset(parser.given())
    _check_paths(parser)
    defaults = {
        "state": os.path.join(folder_of(STATE_VARIABLE, STATE_DIR), name),
        "control": os.path.join(run, "control.sock"),
    }
    for key, value in defaults.items():
        if key not in given:
            parser.add(key, value)
    options = parser.finish()
    service = _service(parser.service, run, options)
    return ServiceConfig(name, path, options, given, service, run, read_handlers(parser.handlers))


def _check_paths(parser: OptionParser) -> None:
    values = parser.given()
    found = [(key, values[key]) for key in _PATHS if key in values]
    found += [
        (f"{key} of [disk.{disk}]", value)
        for disk, table in parser.given_disks().items()
        for key, value in table.items()
        if key in _DISK_PATHS
    ]
    for key, value in found:
        if not is_uri(value):
            _absolute(key, value)


def _absolute(key: str, value: str) -> str:
    if not os.path.isabs(value) or "\0" in value:
        raise ConfigError(f"{key} = '{value}' must be an absolute path: a service is started in no folder of its own")
    return value


# -- [service] -------------------------------------------------------------------------------------------------


def _service(table: Mapping[str, Any], run: str, options: Options) -> Service:
    values: dict[str, Any] = {"guest_socket": os.path.join(run, "guest.sock")}
    for key, value in table.items():
        if key not in _KEYS:
            raise ConfigError(f"unknown key '{key}' in [service]: the keys are {', '.join(sorted(_KEYS))}")
        member, convert = _KEYS[key]
        values[member] = convert(key, value)
    service = Service(**values)
    if len(os.fsencode(service.guest_socket)) > SOCKET_PATH_MAX:
        raise ConfigError(f"guest-socket = '{service.guest_socket}' is longer than {SOCKET_PATH_MAX} bytes")
    if service.guest_socket == options.control:
        raise ConfigError(f"guest-socket = '{service.guest_socket}' is the control socket")
    _check_tls(service, options)
    return service


def _check_tls(service: Service, options: Options) -> None:
    """nbdkit would look for certificates in folders of its own, and a node must not take those by accident."""
    own = (service.tls_certificates, service.tls_psk)
    both = (options.tls.certificates, options.tls.psk)
    if service.tls == "off":
        if any(own) or service.tls_verify_peer:
            raise ConfigError("the tls- keys in [service] need tls = 'on' or 'require' there")
    elif all(own):
        raise ConfigError("tls-certificates and tls-psk in [service] exclude each other")
    elif not any(own) and not any(both):
        raise ConfigError(f"tls = '{service.tls}' in [service] needs tls-certificates or tls-psk there")


def _word(key: str, value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigError(f"{key} in [service] must be a string that is not empty")
    return value


def _one_of(choices: tuple[str, ...]) -> Callable[[str, object], str]:
    def convert(key: str, value: object) -> str:
        if value not in choices:
            raise ConfigError(f"{key} = {value!r} in [service] should be one of {', '.join(choices)}")
        return str(value)

    return convert


def _path(key: str, value: object) -> str:
    return _absolute(f"[service] {key}", _word(key, value))


def _truth(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} in [service] must be true or false")
    return value


def _words(key: str, value: object) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(_word(key, word) for word in values)


def _addresses(key: str, value: object) -> tuple[Address, ...]:
    found = tuple(_address(key, word) for word in _words(key, value))
    for index, address in enumerate(found):
        if address in found[:index]:
            raise ConfigError(f"{key} in [service] has {address} twice")
    return found


def _address(key: str, text: str) -> Address:
    """HOST:PORT, [V6]:PORT, HOST or :PORT."""
    match = re.match(r"(?:\[([^\]]*)\]|([^:]*))(?::([0-9]{1,5}))?\Z", text)
    port = PORT if match is None or match[3] is None else int(match[3])
    if match is None or not 0 < port < 65536:
        raise ConfigError(f"{key} = '{text}' in [service] is not an address such as 10.0.0.1:{PORT} or [::]:{PORT}")
    if match[1] is not None:
        try:
            IPv6Address(match[1])
        except ValueError as error:
            raise ConfigError(f"{key} = '{text}' in [service]: {error}") from error
    return Address(match[1] if match[1] is not None else match[2], port)


def _group(key: str, value: object) -> str:
    name = _word(key, value)
    if not _GROUP.match(name):
        raise ConfigError(f"{key} = '{name}' in [service] cannot be a group's name")
    return name


def _mode(key: str, value: object) -> int:
    """As text, in the octal digits of chmod: TOML's 660 would be another number."""
    if not isinstance(value, str) or not _MODE.match(value):
        raise ConfigError(f"{key} = {value!r} in [service] should be a mode in quotes, such as '0660'")
    return int(value, 8)


def _threads(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= THREADS_MAX:
        raise ConfigError(f"{key} = {value!r} in [service] should be a number from 1 to {THREADS_MAX}")
    return value


def _watchdog(key: str, value: object) -> float:
    seconds = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
    if seconds and not WATCHDOG_MIN_S <= seconds <= WATCHDOG_MAX_S:
        raise ConfigError(
            f"{key} = {value!r} in [service] should be from {WATCHDOG_MIN_S:g} to {WATCHDOG_MAX_S:g} seconds, or 0"
        )
    return seconds


_KEYS: dict[str, tuple[str, Callable[[str, object], Any]]] = {
    "listen": ("listen", _addresses),
    "guest-socket": ("guest_socket", _path),
    "socket-group": ("socket_group", _group),
    "socket-mode": ("socket_mode", _mode),
    "tls": ("tls", _one_of(TLS)),
    "tls-certificates": ("tls_certificates", _path),
    "tls-psk": ("tls_psk", _path),
    "tls-verify-peer": ("tls_verify_peer", _truth),
    "threads": ("threads", _threads),
    "log-level": ("log_level", _one_of(LOG_LEVELS)),
    "watchdog": ("watchdog_s", _watchdog),
    "nbdkit": ("nbdkit", _words),
}
SERVICE_KEYS = frozenset(_KEYS)
