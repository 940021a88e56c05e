# SPDX-License-Identifier: BSD-3-Clause
"""Errors, split by who has to act on them.

    ReplicationError        anything this package raises on purpose
     +- ConfigError         the command line or an image is wrong: nbdkit must not serve
     +- DiskError           one request failed; errno goes to the NBD client
     |   +- Elsewhere       and nothing of it was done, because another node owns the disk (passing.py)
     +- CommandError        one control command failed; desc goes to the QMP client

Every message is one line that names what failed, on which disk, file or key, and what to do about it. It is for the
log: a client that nbdkit tells of its error (since 1.42, when an export cannot be opened) gets a Refusal's text only.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

from replication.log import log_defect
from replication.reason import Reason

FULL = frozenset((_errno.ENOSPC, _errno.EDQUOT))
"""The errnos of a store that has no room left: a file system, a quota of a user, group or project, a thin volume."""


class ReplicationError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(ReplicationError):
    """An option or an image is unusable; nothing may be served."""


class DiskError(ReplicationError):
    """A request failed with an errno that the NBD protocol can carry.

    `errno` is one of EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN (NBD
    specification, "Error values"); nbdkit turns any other into EINVAL, so it is made EIO here, and EDQUOT ENOSPC (as
    QEMU and nbdkit do).
    """

    WIRE = frozenset(
        (
            _errno.EPERM,
            _errno.EIO,
            _errno.ENOMEM,
            _errno.EINVAL,
            _errno.ENOSPC,
            _errno.EOVERFLOW,
            _errno.ENOTSUP,
            _errno.ESHUTDOWN,
        )
    )

    def __init__(self, message: str, errno: int = _errno.EIO) -> None:
        super().__init__(message)
        self.errno = errno

    def again(self) -> DiskError:
        """The same failure, to be raised once more: an exception that several threads raise would collect their
        tracebacks."""
        return DiskError(str(self), self.errno)

    @property
    def wire_errno(self) -> int:
        """The errno for the NBD client."""
        if self.full:
            return _errno.ENOSPC
        return self.errno if self.errno in self.WIRE else _errno.EIO

    @property
    def full(self) -> bool:
        """There is no room; with more of it, or with less in use, the request would have succeeded."""
        return self.errno in FULL

    @classmethod
    def from_os(cls, what: str, error: OSError) -> DiskError:
        """The same failure with what was being done in front of it."""
        number = error.errno or _errno.EIO
        return cls(f"{what}: {os.strerror(number)}", number)

    @classmethod
    def from_defect(cls, defect: Exception) -> DiskError:
        """What nobody expected (a bug, or no memory), for whoever waits for a thread that has met it; the traceback is
        logged."""
        log_defect(defect)
        return cls(f"internal error, see the log: {defect!r}")


class Refusal(DiskError):
    """What the client has asked for is the reason; the text holds nothing that the client may not know."""


class Elsewhere(DiskError):
    """Nothing of the request was done: another node owns the disk, and it may be passed on to that."""

    def again(self) -> Elsewhere:
        return Elsewhere(str(self), self.errno)


class StillWaiting(DiskError):
    """What was waited for goes on still: nothing of it is known to have failed, and it may be tried again."""

    def again(self) -> StillWaiting:
        return StillWaiting(str(self), self.errno)


class CommandError(ReplicationError):
    """A control command failed and changed nothing; the text is QMP's `desc`, the reason goes beside it."""

    def __init__(self, desc: str, error_class: str = "GenericError", reason: Reason | None = None) -> None:
        super().__init__(desc)
        self.error_class = error_class
        self.reason = reason
        self.data: dict[str, Any] | None = None
        """What a program gets beside that."""
