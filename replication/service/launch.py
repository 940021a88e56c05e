# SPDX-License-Identifier: BSD-3-Clause
"""Starts a node by its NAME: makes its folders, opens its sockets, and becomes nbdkit.

It becomes nbdkit (execve) instead of starting it: the process that systemd has started is the node, whose end, signals
and notifications are those of the service.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

from replication.errors import ConfigError
from replication.service import sockets
from replication.service.config import ServiceConfig

NAME_VARIABLE = "NBDKIT_REPLICATION_SERVICE"
"""Says to the plugin which node of this host it is."""

PLUGIN = Path(__file__).resolve().parents[2] / "plugin.py"

STATE_MODE = 0o700
RUN_MODE = 0o755
"""Others may enter: the sockets in it have modes of their own."""

_LOCK = ".lock"
_LOCK_MIN = 200
"""Number of the descriptor that holds the lock, at least: below are the sockets."""


def command(config: ServiceConfig) -> list[str]:
    """nbdkit's command line."""
    service = config.service
    words = ["nbdkit", "-f"]
    if service.threads is not None:
        words.append(f"--threads={service.threads}")
    if service.tls != "off":
        words.append(f"--tls={service.tls}")
        words += _keys(config)
        if service.tls_verify_peer:
            words.append("--tls-verify-peer")
    words += [*service.nbdkit, "python", str(PLUGIN), f"config={config.path}"]
    defaults = {"state": config.state, "control": config.control}
    return words + [f"{key}={value}" for key, value in defaults.items() if key not in config.given]


def _keys(config: ServiceConfig) -> list[str]:
    """Those of [service], or else those that the node shows to others."""
    service, node = config.service, config.options.tls
    own = service.tls_certificates or service.tls_psk
    certificates = service.tls_certificates if own else node.certificates
    psk = service.tls_psk if own else node.psk
    return [f"--tls-certificates={certificates}"] if certificates is not None else [f"--tls-psk={psk}"]


def launch(config: ServiceConfig, environment: Mapping[str, str]) -> None:
    """Become nbdkit; ConfigError when that cannot be done."""
    given = sockets.passed(environment, os.getpid())
    _make_folder(config.run, RUN_MODE)
    _make_folder(config.state, STATE_MODE)
    _lock(config)
    handed = sockets.hand_over(sockets.complete(given, config.service))
    kept = {key: value for key, value in environment.items() if key != "LISTEN_FDNAMES"}  # of systemd's sockets alone
    words = command(config)
    try:
        os.execvpe(words[0], words, {**kept, **handed, NAME_VARIABLE: config.name})
    except OSError as error:
        raise ConfigError(f"cannot run {words[0]}: {error.strerror}") from error


def _make_folder(path: str, mode: int) -> None:
    """With this mode if it is new, whatever the umask."""
    try:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        else:
            os.chmod(path, mode)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {path}: {error.strerror}") from error


def _lock(config: ServiceConfig) -> None:
    """From here to the end of the node nobody else is this node, nor takes its sockets for left behind. The descriptor
    stays open in nbdkit."""
    path = os.path.join(config.run, _LOCK)
    try:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot lock {path}: {error.strerror}") from error
    lock = fcntl.fcntl(opened, fcntl.F_DUPFD, _LOCK_MIN)
    os.close(opened)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ConfigError(f"node {config.name} is running already: another process holds {path}") from error
