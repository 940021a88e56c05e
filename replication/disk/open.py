# SPDX-License-Identifier: BSD-3-Clause
"""Opening a disk by what the user wrote after `disk=`."""

from __future__ import annotations

from replication.disk.endpoint import NbdDisk
from replication.disk.face import Disk
from replication.disk.file import FileDisk
from replication.errors import ConfigError
from replication.tls import Tls
from replication.uri import is_uri


def open_disk(name: str, location: str, tls: Tls | None = None) -> Disk:
    """Open the disk, with `tls` for an nbds: URI; ConfigError names what is wrong."""
    disk = NbdDisk(name, location, tls) if is_uri(location) else FileDisk(name, location)
    if not disk.size:
        disk.close()
        raise ConfigError(f"{location} of disk '{name}' has no bytes")
    return disk
