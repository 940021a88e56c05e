# SPDX-License-Identifier: BSD-3-Clause
"""The sizes of a node's disks: what counts when a disk was grown, and what each of them is asked for by a resize.

A disk that is larger than its state folder says is served in the size of the folder until somebody says otherwise, on
both nodes: the one whose disk was grown first must not be written to behind the other one's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from replication.disk.face import Disk
from replication.errors import CommandError, ConfigError, DiskError
from replication.log import log
from replication.reason import Reason
from replication.side import disk_list

SIZE_MAX = 1 << 47
"""Of a disk whose size the other side, or a command, tells: one change map of it takes 2 GiB."""


def served(folder: str | None, known: Mapping[str, int], found: Mapping[str, int]) -> dict[str, int]:
    """The sizes that are served of disks that have the sizes `found`, by the record of the state folder (`known`, empty
    when it knows of none). ConfigError when these are other disks."""
    if not known or known == found:
        return dict(found)
    said = f"the state folder {folder} is of the disks {disk_list(dict(known))}, but these are {disk_list(dict(found))}"
    if known.keys() != found.keys() or any(found[name] < size for name, size in known.items()):
        raise ConfigError(said)
    log(f"{said}: what was added is not used before `replctl resize` on the primary, when both nodes' disks were grown")
    return dict(known)


def wanted(disks: Mapping[str, tuple[int, Disk]], name: str | None, size: int | None) -> dict[str, int]:
    """The sizes to ask for of disks, each with the size that is served. `name`: of that one; `size`: this one, all
    that is there if it is not given. CommandError."""
    if name is not None and name not in disks:
        raise CommandError(f"There is no disk '{name[:80]}'")
    if size is not None and name is None and len(disks) > 1:
        raise CommandError("Parameter 'size' is of one disk: give 'disk' as well")
    asked = {}
    for each in disks if name is None else (name,):
        now, disk = disks[each]
        there = room_of(disk)
        if there < now:
            raise CommandError(f"disk '{each}' has shrunk: {disk.location} has {there} bytes, but {now} are in use")
        asked[each] = max(now, min(there, SIZE_MAX)) if size is None else size
        if asked[each] < now:
            raise CommandError(f"disk '{each}' has {now} bytes: a disk can be grown, and not made smaller")
        if asked[each] > there:
            raise CommandError(f"disk '{each}' cannot have {asked[each]} bytes: {disk.location} has {there}, grow it")
    return asked


def room_of(disk: Disk) -> int:
    """Bytes that there are below a disk. CommandError."""
    try:
        return disk.room()
    except DiskError as error:
        raise CommandError(str(error), reason=Reason.STORAGE) from error


def outcome(name: str, former: int, size: int, here: int, there: int | None) -> dict[str, object]:
    """What a resize has made of a disk; `here` and `there`: the room below on this node and on the secondary."""
    return {"name": name, "size": size, "former-size": former, "here-bytes": here, "there-bytes": there}


def names(disks: Sequence[str]) -> str:
    """For a message."""
    return ", ".join(f"'{name}'" for name in disks)
