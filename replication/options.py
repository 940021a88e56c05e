# SPDX-License-Identifier: BSD-3-Clause
"""The command line and the TOML file: from KEY=VALUE to Options, or one clear line."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from replication.errors import ConfigError
from replication.stage import Mode
from replication.tls import Tls
from replication.uri import absolute, export_of, is_tls, is_uri

DEFAULT_DISK = "disk0"
CONTROL_EXPORT = ".control"
"""Reserved export name (nbdkit-replication-plugin(1), Exports)."""

DATA_EXPORT = ".data"
"""`.data:TOKEN:NAME` is the target face NAME for the primary that has the token (secondary/pairing.py)."""

DIGEST_EXPORT = ".data-digests"
"""`.data-digests:TOKEN:NAME`: the same for a primary that knows of digests (digests.py)."""

OWNER_EXPORT = ".owner"
"""`.owner:PROOF:NAME` is the disk NAME of a primary, for its secondary (acquaintance.py)."""

QUEUE_LIMIT = 64 << 20
"""Bytes of guest data waiting for the secondary. More rides out longer hiccups of the link without making the
guest wait, and costs as much memory."""

TIMEOUT_S = 5.0
"""Longest time without progress before the link counts as lost, and so the longest that a dead secondary can hold up
a guest. Shorter than the 30 s after which Linux guests report a stuck disk."""

OVERLAY_WATERMARK = 80.0
"""Per cent of an overlay's file system in use, from which on an event warns that the next checkpoint is due."""

TEST_SPACE = 4 << 30
"""Bytes that all tests of a failover together may take. A guest that boots writes some hundred megabytes; the rest is
what the primary overwrites meanwhile."""

_RESERVED = tuple(f"{prefix}:" for prefix in (DATA_EXPORT, DIGEST_EXPORT, OWNER_EXPORT))
_FILE_MAX = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}\Z")
_EXPORT_MAX = 4096  # NBD specification: longest string
_SIZE = re.compile(r"([0-9]{1,15})([kKMGT]?)\Z")
_SCALE = {"": 0, "k": 10, "K": 10, "M": 20, "G": 30, "T": 40}
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on", "y", "t"), True),
    **dict.fromkeys(("false", "0", "no", "off", "n", "f"), False),
}


URI_MAX = 4096
"""Characters: it is part of the record in the state folder, which has its room from the start."""


def check_uri(uri: str, disks: int) -> None:
    """ConfigError unless the URI can name the secondary of that many disks."""
    if len(uri) > URI_MAX:
        raise ConfigError(f"'{uri[:40]}...' has {len(uri)} characters; the URI of a secondary has {URI_MAX} at most")
    if not is_uri(uri) or "\0" in uri or "%00" in uri:  # which no export, path or host has
        raise ConfigError(f"'{uri}' is not an NBD URI such as nbd://HOST:PORT or nbd+unix:///?socket=PATH")
    if export_of(uri) and disks > 1:
        raise ConfigError(f"'{uri}' names an export, but there are {disks} disks; leave the export out")


class Durability(Enum):
    """What a secondary's checkpoint outlives."""

    PROCESS = "process"
    POWER = "power"


LEASE_MIN_S, LEASE_MAX_S = 1.0, 3600.0


class OnOutdated(Enum):
    """What the guest of an owner gets once it is outdated."""

    CONTINUE = "continue"
    SUSPEND_IO = "suspend-io"
    IO_ERROR = "io-error"


class Fencing(Enum):
    """What a primary does when its link is lost."""

    DONT_CARE = "dont-care"
    SUSPEND_IO = "suspend-io"


@dataclass
class DiskOptions:
    """One disk. `location` is a path, an NBD URI, or None on a primary that only forwards."""

    name: str
    location: str | None
    top_id: str | None = None
    active: str | None = None
    hidden: str | None = None


@dataclass
class Options:
    """What the user asked for, complete and checked."""

    mode: Mode
    disks: list[DiskOptions]
    state: str | None
    control: str | None
    autostart: bool = False
    secondary: str | None = None
    sync: bool = False
    queue_limit: int = QUEUE_LIMIT
    timeout_s: float = TIMEOUT_S
    durability: Durability = Durability.PROCESS
    overlay_watermark: float = OVERLAY_WATERMARK
    test_space: int = TEST_SPACE
    checkpoint_interval_s: float | None = None
    checkpoint_age_limit_s: float | None = None
    resync_rate: int | None = None
    """Bytes a second over all disks, None for as fast as it goes."""
    tls: Tls = field(default_factory=Tls)
    guests_local: bool = False
    """Whether guests' exports are only for clients on this host."""
    primary_identity: str | None = None
    guest_identity: str | None = None
    """Distinguished name in the certificate of the only client that may be the primary, or the guest."""
    on_outdated: OnOutdated = OnOutdated.SUSPEND_IO
    fencing: Fencing = Fencing.DONT_CARE
    role_auto: bool = False
    """The state folder says which mode the node has; a new one is a secondary."""
    guest_face_closed: bool = False
    """Whether guests' exports are closed until somebody has promoted the node."""
    lease_s: float | None = None
    """How long a primary serves its guest since it last heard of its secondary or of the cluster; None: for ever."""
    follow_owner: bool = False
    """Whether guests' requests are passed on to the other node while that owns the disks (passing.py)."""
    wfc_timeout_s: float | None = None
    """How long a primary that is started again waits for its peer before it serves its guest; None: not at all."""
    placement: bool = True
    """Whether the process chooses the cores of its threads (placement.py)."""
    folder: str = field(default_factory=os.getcwd)
    """Where nbdkit was started: relative paths count from there, also those that a command brings later on."""


CHANGEABLE = (
    "queue_limit",
    "overlay_watermark",
    "test_space",
    "checkpoint_interval_s",
    "checkpoint_age_limit_s",
    "resync_rate",
)
"""Members of Options that a running node takes over (Node.configure): rates, intervals and limits."""


@dataclass
class _Disk:
    name: str | None
    location: str
    more: dict[str, str] = field(default_factory=dict)


class OptionParser:
    """Collects KEY=VALUE pairs in their order, then checks the whole."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._disks: list[_Disk] = []
        self._from_file = False
        self.service: Mapping[str, Any] = {}
        """The table [service] of the file, for whoever starts the node (service/config.py)."""
        self.handlers: Sequence[Mapping[str, Any]] = ()
        """Its tables [[handler]], for whoever watches the node."""

    def given(self) -> Mapping[str, str]:
        """The node's keys, as they were given so far."""
        return self._values

    def given_disks(self) -> Mapping[str, Mapping[str, str]]:
        """The disks' keys, as they were given so far."""
        return {disk.name or DEFAULT_DISK: {"disk": disk.location, **disk.more} for disk in self._disks}

    def add(self, key: str, value: str) -> None:
        """One pair; ConfigError for an unknown key or one out of place."""
        if key == "config":
            self._read_file(os.path.abspath(value))
        elif key == "disk":
            self._disks.append(_split_disk(value))
        elif key in DISK_KEYS:
            if not self._disks:
                raise ConfigError(f"{key}={value} belongs to a disk: put it after its disk=")
            if key in self._disks[-1].more:
                raise ConfigError(f"{key} is given twice for disk={self._disks[-1].location}")
            self._disks[-1].more[key] = value
        elif key in KEYS:
            if key in self._values:
                raise ConfigError(f"{key} is given twice")
            self._values[key] = value
        else:
            raise _unknown(key)

    # -- TOML ----------------------------------------------------------------------------------------------

    def _read_file(self, path: str) -> None:
        if self._from_file:
            raise ConfigError("config is given twice")
        self._from_file = True
        try:
            with open(path, "rb") as file:
                text = file.read(_FILE_MAX + 1)
            if len(text) > _FILE_MAX:
                raise ConfigError(f"{path} is larger than {_FILE_MAX} bytes")
            content = tomllib.loads(text.decode())
        except OSError as error:
            raise ConfigError(f"cannot read config={path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # of tomllib, also for numbers of 4300 digits
            raise ConfigError(f"{path} is not TOML: {error}") from error
        disks = content.pop("disk", {})
        if not isinstance(disks, dict) or not all(isinstance(table, dict) for table in disks.values()):
            raise ConfigError(f"{path}: write one table [disk.NAME] for each disk")
        self._take_others(path, content)
        for key, value in content.items():
            if key not in ALL_KEYS:
                raise _unknown(key)
            if key == "config" or key in DISK_KEYS:
                raise ConfigError(f"{path}: {key} does not belong on the top level of the file")
            self.add(key, _text(path, key, value))
        for name, table in disks.items():
            self._add_table(path, name, table)

    def _take_others(self, path: str, content: dict[str, Any]) -> None:
        """The tables that are not the plugin's."""
        service, handlers = content.pop("service", {}), content.pop("handler", [])
        if not isinstance(service, dict):
            raise ConfigError(f"{path}: service must be a table [service]")
        if not isinstance(handlers, list) or not all(isinstance(table, dict) for table in handlers):
            raise ConfigError(f"{path}: write one table [[handler]] for each handler")
        self.service, self.handlers = service, handlers

    def _add_table(self, path: str, name: str, table: dict[str, object]) -> None:
        if "disk" not in table:
            raise ConfigError(f"{path}: [disk.{name}] lacks disk = 'PATH-or-NBD-URI'")
        disk = _Disk(name, _text(path, "disk", table["disk"]))
        for key, value in table.items():
            if key in DISK_KEYS:
                disk.more[key] = _text(path, key, value)
            elif key != "disk":
                raise ConfigError(f"{path}: unknown key '{key}' in [disk.{name}]")
        self._disks.append(disk)

    # -- the whole -----------------------------------------------------------------------------------------

    def finish(self) -> Options:
        """Check and complete; ConfigError names the first thing that is wrong."""
        values = self._values
        mode = self._mode()
        if "peer" in values and "secondary" in values:
            raise ConfigError("peer and secondary are given both: peer is the other node in either role")
        for key in sorted(values):
            if mode is Mode.SECONDARY and key in PRIMARY_KEYS:
                raise ConfigError(f"The secondary side does not support option {key}")
            if mode is Mode.PRIMARY and key in SECONDARY_KEYS:
                raise ConfigError(f"The primary side does not support option {key}")
        state = _path(values.get("state"), "state")
        options = Options(mode, [], state, _path(values.get("control"), "control"))
        options.role_auto = "role" in values
        if options.control is None and state is not None:
            options.control = os.path.join(state, "control.sock")
        for key, convert in _CONVERTERS.items():
            if key in values:
                convert(options, values[key])
        options.disks = self._named_disks(options)
        _check_places(options.disks)
        if options.secondary is not None:
            try:
                check_uri(options.secondary, len(options.disks))
                options.secondary = absolute(options.secondary, options.folder)
            except ConfigError as error:
                key = "peer" if "peer" in values else "secondary"
                raise ConfigError(f"{key}={error}") from error
        _check_tls(options)
        _check_follow_owner(options)
        if options.durability is Durability.POWER and state is None:
            raise ConfigError("Missing the option state: durability=power has to write the checkpoints somewhere")
        if options.control is None and not options.autostart:
            raise ConfigError(
                "Missing the option state or control: without a control socket only autostart=true starts replication"
            )
        return options

    def _mode(self) -> Mode:
        if "role" in self._values:
            if "mode" in self._values:
                raise ConfigError("role and mode are given both: with role=auto the state folder says the mode")
            if self._values["role"] != "auto":
                raise ConfigError(f"role={self._values['role']} should be auto")
            return Mode.SECONDARY
        if "mode" not in self._values:
            raise ConfigError("Missing the option mode")
        try:
            return Mode(self._values["mode"])
        except ValueError as error:
            raise ConfigError("The option mode's value should be primary or secondary") from error

    def _named_disks(self, options: Options) -> list[DiskOptions]:
        named: list[DiskOptions] = []
        for disk in self._disks:
            if disk.name is None and len(self._disks) > 1:
                raise ConfigError(
                    f"there are {len(self._disks)} disks, so disk={disk.location} needs a name: disk=NAME:..."
                )
            name = DEFAULT_DISK if disk.name is None else disk.name
            if not _NAME.match(name):
                raise ConfigError(f"'{name}' cannot be a disk's name: use letters, digits and _ . + -")
            if any(name == other.name for other in named):
                raise ConfigError(f"there are two disks of the name '{name}'")
            named.append(DiskOptions(name, _location(disk.location)))
            if options.mode is Mode.PRIMARY:
                for key in disk.more:
                    raise ConfigError(f"The primary side does not support option {key}")
            else:
                self._complete_secondary(named[-1], disk.more, options.state)
        if options.mode is Mode.SECONDARY:
            _check_top_ids(named)
        elif not named:
            if options.secondary is None:
                raise ConfigError("Missing the option disk or secondary: there is nothing to replicate")
            try:
                name = export_of(options.secondary)
            except ConfigError as error:
                raise ConfigError(f"secondary={error}") from error
            named.append(DiskOptions(name or DEFAULT_DISK, None))
        return named

    @staticmethod
    def _complete_secondary(disk: DiskOptions, more: dict[str, str], state: str | None) -> None:
        disk.top_id = more.get("top-id")
        for key in ("active", "hidden"):
            path = _path(more.get(key), key)
            if path is None:
                if state is None:
                    raise ConfigError(
                        f"Missing the option {key} of disk '{disk.name}' (or state, where it goes by default)"
                    )
                path = os.path.join(state, f"{disk.name}.{key}.qcow2")
            setattr(disk, key, path)


def _check_top_ids(disks: list[DiskOptions]) -> None:
    if not disks:
        raise ConfigError("Missing the option disk")
    names = {disk.name for disk in disks}
    for index, disk in enumerate(disks):
        if not disk.top_id:
            raise ConfigError(
                "Missing the option top-id" if len(disks) == 1 else f"Missing the option top-id of disk '{disk.name}'"
            )
        reserved = disk.top_id == CONTROL_EXPORT or disk.top_id.startswith(_RESERVED)
        if reserved or len(disk.top_id.encode()) > _EXPORT_MAX or "\0" in disk.top_id:
            raise ConfigError(f"top-id={disk.top_id[:80]} cannot be an export's name")
        # Its own disk's name is left to start, which says what QEMU says ("No top_bs or it is invalid").
        if disk.top_id in names - {disk.name} or any(disk.top_id == other.top_id for other in disks[:index]):
            raise ConfigError(f"top-id={disk.top_id} of disk '{disk.name}' is already the name of another export")


def _check_places(disks: list[DiskOptions]) -> None:
    """ConfigError when the disks and overlays are not all different: of files the lock would say so, in words about
    another process, but of NBD exports nobody."""
    owners: dict[str, str] = {}
    for disk in disks:
        for key, place in (("disk", disk.location), ("active", disk.active), ("hidden", disk.hidden)):
            if place is None:
                continue
            owner = f"{key}= of disk '{disk.name}'"
            former = owners.setdefault(place if is_uri(place) else os.path.realpath(place), owner)
            if former != owner:
                raise ConfigError(f"{place} is given twice: as {former} and as {owner}")


def _unknown(key: str) -> ConfigError:
    return ConfigError(f"unknown key '{key}': the keys are {', '.join(sorted(ALL_KEYS))}")


def _split_disk(value: str) -> _Disk:
    name, colon, location = value.partition(":")
    if colon and not is_uri(value) and "/" not in name:
        return _Disk(name, location)
    return _Disk(None, value)


def _location(location: str) -> str:
    if not location or "\0" in location:
        raise ConfigError("disk= needs a path or an NBD URI")
    if not is_uri(location):
        return os.path.abspath(location)
    try:
        return absolute(location, os.getcwd())
    except ConfigError as error:
        raise ConfigError(f"disk={location}: {error}") from error


def _path(value: str | None, key: str) -> str | None:
    if value is None:
        return None
    if not value or "\0" in value:
        raise ConfigError(f"{key}= needs a path")
    return os.path.abspath(value)


def _text(path: str, key: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        if isinstance(value, str | int | float):
            return str(value)
    except ValueError as error:  # more digits than Python prints
        raise ConfigError(f"{path}: the value of {key} is too large") from error
    raise ConfigError(f"{path}: the value of {key} must be a string, a number, true or false")


def _boolean(key: str, value: str) -> bool:
    if value.lower() not in _BOOLEANS:
        raise ConfigError(f"{key}={value} should be true or false")
    return _BOOLEANS[value.lower()]


def _set_autostart(options: Options, value: str) -> None:
    options.autostart = _boolean("autostart", value)


def _set_protocol(options: Options, value: str) -> None:
    if value not in ("async", "sync"):
        raise ConfigError(f"protocol={value} should be async or sync")
    options.sync = value == "sync"


def _set_queue_limit(options: Options, value: str) -> None:
    options.queue_limit = _size("queue-limit", value, 1 << 20, "1M")


def _set_test_space(options: Options, value: str) -> None:
    options.test_space = _size("test-space", value, 1 << 20, "1M")


def _set_resync_rate(options: Options, value: str) -> None:
    options.resync_rate = _size("resync-rate", value, 64 << 10, "64K")


def _size(key: str, value: str, least: int, least_text: str) -> int:
    """A number of bytes from `least` to 1T."""
    match = _SIZE.match(value)
    if match is None:
        raise ConfigError(f"{key}={value} is not a size such as 64M")
    size = int(match[1]) << _SCALE[match[2]]
    if not least <= size <= 1 << 40:
        raise ConfigError(f"{key}={value} should be between {least_text} and 1T")
    return size


def _set_timeout(options: Options, value: str) -> None:
    options.timeout_s = _seconds("timeout", value, 0.1, 30)


def _set_durability(options: Options, value: str) -> None:
    try:
        options.durability = Durability(value)
    except ValueError as error:
        raise ConfigError(f"durability={value} should be process or power") from error


def _set_overlay_watermark(options: Options, value: str) -> None:
    try:
        options.overlay_watermark = float(value.removesuffix("%"))
    except ValueError as error:
        raise ConfigError(f"overlay-watermark={value} is not a number of per cent") from error
    if not 1 <= options.overlay_watermark <= 100:
        raise ConfigError(f"overlay-watermark={value} should be between 1 and 100 per cent")


def _set_checkpoint_interval(options: Options, value: str) -> None:
    options.checkpoint_interval_s = _seconds("checkpoint-interval", value, 0.05, 86400)


def _set_checkpoint_age_limit(options: Options, value: str) -> None:
    options.checkpoint_age_limit_s = _seconds("checkpoint-age-limit", value, 0.05, 1e7)


def _seconds(key: str, value: str, least: float, most: float) -> float:
    try:
        seconds = float(value)
    except ValueError as error:
        raise ConfigError(f"{key}={value} is not a number of seconds") from error
    if not least <= seconds <= most:
        raise ConfigError(f"{key}={value} should be between {least:g} and {most:g} seconds")
    return seconds


def _set_tls_certificates(options: Options, value: str) -> None:
    options.tls = replace(options.tls, certificates=_path(value, "tls-certificates"))


def _set_tls_psk(options: Options, value: str) -> None:
    options.tls = replace(options.tls, psk=_path(value, "tls-psk"))


def _set_tls_username(options: Options, value: str) -> None:
    if not value or "\0" in value or ":" in value:
        raise ConfigError(f"tls-username={value[:80]} cannot be a user's name")
    options.tls = replace(options.tls, username=value)


def _check_tls(options: Options) -> None:
    options.tls.check()
    if options.secondary is None or options.tls == Tls():
        return  # a secondary may become a primary, and a primary may be told its secondary later
    if not any(is_tls(uri) for uri in (options.secondary, *(disk.location or "" for disk in options.disks))):
        raise ConfigError("the tls- keys are for nbds: URIs, and neither secondary= nor disk= is one")


def _check_follow_owner(options: Options) -> None:
    if not options.follow_owner:
        return
    if options.mode is Mode.SECONDARY and options.secondary is None:
        raise ConfigError("Missing the option peer: follow-owner=true passes requests on to it")
    if options.guest_face_closed:
        raise ConfigError("follow-owner=true opens what guest-face=closed-until-promoted closes: give one of them")


def _set_guest_access(options: Options, value: str) -> None:
    if value not in ("any", "local"):
        raise ConfigError(f"guest-access={value} should be any or local")
    options.guests_local = value == "local"


def _set_primary_identity(options: Options, value: str) -> None:
    options.primary_identity = _identity("primary-identity", value)


def _set_guest_identity(options: Options, value: str) -> None:
    options.guest_identity = _identity("guest-identity", value)


def _identity(key: str, value: str) -> str:
    if "=" not in value or not value.isprintable():
        raise ConfigError(
            f"{key}={value[:80]!r} should be the distinguished name in a client's certificate, such as "
            "CN=primary,O=pair (a user of tls-psk cannot be told from another one: nbdkit does not say which it was)"
        )
    return value


def _set_placement(options: Options, value: str) -> None:
    if value not in ("auto", "none"):
        raise ConfigError(f"placement={value} should be auto or none")
    options.placement = value == "auto"


def _set_on_outdated(options: Options, value: str) -> None:
    try:
        options.on_outdated = OnOutdated(value)
    except ValueError as error:
        raise ConfigError(f"on-outdated={value} should be continue, suspend-io or io-error") from error


def _set_fencing(options: Options, value: str) -> None:
    try:
        options.fencing = Fencing(value)
    except ValueError as error:
        raise ConfigError(f"fencing={value} should be dont-care or suspend-io") from error


def _set_wfc_timeout(options: Options, value: str) -> None:
    options.wfc_timeout_s = _seconds("wfc-timeout", value, 0.1, 1e7)


def _set_lease(options: Options, value: str) -> None:
    options.lease_s = _seconds("lease", value, LEASE_MIN_S, LEASE_MAX_S)


def _set_guest_face(options: Options, value: str) -> None:
    if value not in ("open", "closed-until-promoted"):
        raise ConfigError(f"guest-face={value} should be open or closed-until-promoted")
    options.guest_face_closed = value == "closed-until-promoted"


def _set_follow_owner(options: Options, value: str) -> None:
    options.follow_owner = _boolean("follow-owner", value)


def _set_secondary(options: Options, value: str) -> None:
    options.secondary = value


_CONVERTERS: dict[str, Callable[[Options, str], None]] = {
    "autostart": _set_autostart,
    "secondary": _set_secondary,
    "protocol": _set_protocol,
    "queue-limit": _set_queue_limit,
    "timeout": _set_timeout,
    "durability": _set_durability,
    "overlay-watermark": _set_overlay_watermark,
    "test-space": _set_test_space,
    "checkpoint-interval": _set_checkpoint_interval,
    "checkpoint-age-limit": _set_checkpoint_age_limit,
    "resync-rate": _set_resync_rate,
    "tls-certificates": _set_tls_certificates,
    "tls-psk": _set_tls_psk,
    "tls-username": _set_tls_username,
    "guest-access": _set_guest_access,
    "primary-identity": _set_primary_identity,
    "guest-identity": _set_guest_identity,
    "placement": _set_placement,
    "on-outdated": _set_on_outdated,
    "fencing": _set_fencing,
    "wfc-timeout": _set_wfc_timeout,
    "lease": _set_lease,
    "guest-face": _set_guest_face,
    "follow-owner": _set_follow_owner,
    "peer": _set_secondary,
}

DISK_KEYS = frozenset(("top-id", "active", "hidden"))
PRIMARY_KEYS = frozenset(("secondary",))
SECONDARY_KEYS = frozenset(("durability", "overlay-watermark", "primary-identity", "test-space"))
KEYS = frozenset(("mode", "role", "state", "control", *_CONVERTERS))
ALL_KEYS = frozenset(("config", "disk", *DISK_KEYS, *KEYS))
