# SPDX-License-Identifier: BSD-3-Clause
"""Takes over what has changed in the file of a node while it runs: rates, intervals, limits, and how much is logged.

A file that is wrong changes nothing. What needs a restart is named, and the rest is taken over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from replication.errors import ConfigError
from replication.log import LOG, log, surviving
from replication.options import CHANGEABLE, Options
from replication.service.config import Service, ServiceConfig, load
from replication.service.launch import NAME_VARIABLE
from replication.service.pulse import Pulse

_SERVICE_CHANGEABLE = ("log_level", "watchdog_s")

_NO_KEYS = frozenset(("folder",))
"""Members of Options that no key sets."""

_KEYS = {
    "sync": "protocol",
    "guests_local": "guest-access",
    "role_auto": "role",
    "guest_face_closed": "guest-face",
    "guest_socket": "guest-socket",
    "disks": "the [disk.NAME] tables",
    "tls": "the tls- keys",
}
"""Members whose names are not those of their keys."""


class Reloader:
    """Of a node that was started by its name."""

    @classmethod
    def of(cls, environment: Mapping[str, str], configure: Callable[[Options], None], pulse: Pulse) -> Reloader | None:
        """None for a node that has no name. ConfigError when its file cannot be read any more."""
        name = environment.get(NAME_VARIABLE)
        return None if name is None else cls(load(name), configure, pulse)

    def __init__(self, config: ServiceConfig, configure: Callable[[Options], None], pulse: Pulse) -> None:
        """`configure(options)` hands the node what it can change (options.CHANGEABLE)."""
        self._config = config
        self._configure = configure
        self._pulse = pulse
        # One reload at a time; protects the fields. Held across the reading of the file; no other thread wants it.
        self._lock = threading.Lock()
        self._started = False
        LOG.verbose = config.service.log_level == "debug"

    def start(self) -> None:
        """The node serves: it can be changed from now on."""
        with self._lock:
            self._started = True
            self._adopt_service(self._config.service)

    def reload(self) -> None:
        """Read the file again. Errors are logged."""
        with self._lock, self._pulse.reloading(), surviving():
            if not self._started:
                return  # it has just been read
            try:
                found = load(self._config.name)
            except ConfigError as error:
                log(f"reload: {error}; nothing has changed")
                return
            self._take_over(found)

    def _take_over(self, found: ServiceConfig) -> None:
        former = self._config
        options, fixed_options = _differences(former.options, found.options, CHANGEABLE)
        service, fixed_service = _differences(former.service, found.service, _SERVICE_CHANGEABLE)
        # Where the node differs from its file stays known, and is said at each reload.
        self._config = replace(
            former, options=replace(former.options, **options), service=replace(former.service, **service)
        )
        self._configure(self._config.options)
        self._adopt_service(self._config.service)
        log(f"reload: {', '.join(map(_key, [*options, *service])) or 'nothing'} changed")
        fixed = [*map(_key, [*fixed_options, *fixed_service])]
        if fixed:
            log(f"reload: the node has to be restarted for another value of {', '.join(fixed)}")

    def _adopt_service(self, service: Service) -> None:
        LOG.verbose = service.log_level == "debug"
        self._pulse.watch(service.watchdog_s)


def _differences(
    former: Options | Service, found: Options | Service, changeable: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The new values of what a running node can take over, by member, and the members that it cannot."""
    members = [member.name for member in fields(former) if member.name not in _NO_KEYS]
    changed = [name for name in members if getattr(former, name) != getattr(found, name)]
    values = {name: getattr(found, name) for name in changed if name in changeable}
    return values, [name for name in changed if name not in changeable]


def _key(member: str) -> str:
    return _KEYS.get(member, member.removesuffix("_s").replace("_", "-"))
